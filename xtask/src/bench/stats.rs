//! What a run can say: medians, spreads, ratios, and whether they can be told from noise.

/// Student's t, two-sided 95 %, for 1, 2, 3 ... degrees of freedom.
const T95: [f64; 15] = [
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131,
];
/// The same for any number of rounds.
const T95_MANY: f64 = 1.96;

/// A quantity over the rounds of a run. All values are positive.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Summary {
    pub(crate) median: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
    /// The smallest relative difference that is not noise: half of the 95 % confidence interval,
    /// 0.05 for 5 %. One round tells none.
    pub(crate) resolution: Option<f64>,
}

/// Whether a goal was reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Met,
    NotMet,
    /// The goal is within the noise of this run.
    Undecided,
}

/// What a goal demands.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

impl Summary {
    /// Of at least one value, else there is none.
    pub(crate) fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (&low, &high) = (sorted.first()?, sorted.last()?);
        let middle = sorted.len() / 2;
        let median = if sorted.len().is_multiple_of(2) {
            f64::midpoint(sorted[middle - 1], sorted[middle])
        } else {
            sorted[middle]
        };
        Some(Self { median, low, high, resolution: resolution(values) })
    }

    /// Whether differences of 5 % are seen.
    pub(crate) fn tells_five_percent(&self) -> bool {
        self.resolution.is_some_and(|resolution| resolution <= 0.05)
    }

    /// Judges a goal by the median, and leaves open what the noise leaves open.
    pub(crate) fn judge(&self, bound: Bound) -> Verdict {
        let (met, limit) = match bound {
            Bound::AtLeast(limit) => (self.median >= limit, limit),
            Bound::AtMost(limit) => (self.median <= limit, limit),
        };
        let margin = 1.0 + self.resolution.unwrap_or(f64::INFINITY);
        if limit > self.median / margin && limit < self.median * margin {
            Verdict::Undecided
        } else if met {
            Verdict::Met
        } else {
            Verdict::NotMet
        }
    }
}

/// Half of the confidence interval of the geometric mean, as a factor less one.
fn resolution(values: &[f64]) -> Option<f64> {
    let freedom = values.len().checked_sub(1).filter(|&freedom| freedom > 0)?;
    let logarithms: Vec<f64> = values.iter().map(|value| value.ln()).collect();
    let mean = logarithms.iter().sum::<f64>() / values.len() as f64;
    let squares: f64 = logarithms.iter().map(|value| (value - mean).powi(2)).sum();
    let error = (squares / freedom as f64 / values.len() as f64).sqrt();
    let t = T95.get(freedom - 1).copied().unwrap_or(T95_MANY);
    Some((t * error).exp_m1())
}

/// The `percent`th percentile (nearest rank) of values that are sorted. None of none.
pub(crate) fn percentile(sorted: &[u32], percent: usize) -> Option<u32> {
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_spreads() {
        assert_eq!(Summary::of(&[]), None);
        let odd = Summary::of(&[3.0, 1.0, 2.0]).unwrap();
        assert_eq!((odd.median, odd.low, odd.high), (2.0, 1.0, 3.0));
        assert_eq!(Summary::of(&[4.0, 1.0, 3.0, 2.0]).unwrap().median, 2.5);
    }

    #[test]
    fn a_quiet_run_tells_five_percent_and_a_noisy_one_says_that_it_cannot() {
        let quiet = Summary::of(&[0.50, 0.51, 0.50, 0.49, 0.50]).unwrap();
        assert!(quiet.tells_five_percent(), "{quiet:?}");
        let noisy = Summary::of(&[0.50, 0.61, 0.44, 0.49, 0.57]).unwrap();
        assert!(!noisy.tells_five_percent(), "{noisy:?}");
        assert!(!Summary::of(&[0.5]).unwrap().tells_five_percent(), "one round tells nothing");
    }

    #[test]
    fn the_interval_is_students() {
        // ln 1 and ln e: mean 1/2, standard error 1/2.
        let two = Summary::of(&[1.0, std::f64::consts::E]).unwrap();
        assert!((two.resolution.unwrap() - (12.706_f64 / 2.0).exp_m1()).abs() < 1e-6);
        let equal = Summary::of(&[7.0; 30]).unwrap();
        assert!(equal.resolution.unwrap().abs() < 1e-12);
    }

    #[test]
    fn a_goal_within_the_noise_is_undecided() {
        let ratio = Summary { median: 0.52, low: 0.4, high: 0.6, resolution: Some(0.10) };
        assert_eq!(ratio.judge(Bound::AtLeast(0.40)), Verdict::Met);
        assert_eq!(ratio.judge(Bound::AtLeast(0.50)), Verdict::Undecided);
        assert_eq!(ratio.judge(Bound::AtLeast(0.60)), Verdict::NotMet);
        assert_eq!(ratio.judge(Bound::AtMost(0.60)), Verdict::Met);
        assert_eq!(ratio.judge(Bound::AtMost(0.40)), Verdict::NotMet);
        let once = Summary { resolution: None, ..ratio };
        assert_eq!(once.judge(Bound::AtLeast(0.01)), Verdict::Undecided);
    }

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let values: Vec<u32> = (1..=200).collect();
        assert_eq!(percentile(&values, 50), Some(100));
        assert_eq!(percentile(&values, 99), Some(198));
        assert_eq!(percentile(&[7], 99), Some(7));
        assert_eq!(percentile(&[], 50), None);
    }
}
