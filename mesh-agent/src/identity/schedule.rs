//! When things happen: rotation at half of a lifetime, retries with growing, scattered delays.

use std::{
    fmt,
    ops::RangeInclusive,
    sync::Arc,
    time::{Duration, SystemTime},
};

use backon::{BackoffBuilder as _, ExponentialBuilder};
use rand::Rng;

/// How much of its lifetime a certificate serves before the next one is asked for: half of it,
/// ±10 %, so that pods that started together do not rotate together.
const ROTATE_AFTER: RangeInclusive<f64> = 0.45..=0.55;

/// The first delay after a failure; doubled from then on, each with up to as much on top.
const FIRST_RETRY: Duration = Duration::from_millis(500);
const MAX_RETRY: Duration = Duration::from_secs(30);

/// The wall clock may be set, and sleeping does not count the time a machine is suspended: no
/// timer runs longer than this before it looks at the clock again.
const LONGEST_NAP: Duration = Duration::from_secs(30);

/// When to ask for the successor of a certificate that was issued at `issued`.
pub(super) fn rotation_time(
    issued: SystemTime,
    not_after: SystemTime,
    rng: &mut impl Rng,
) -> SystemTime {
    let lifetime = not_after.duration_since(issued).unwrap_or_default();
    issued + lifetime.mul_f64(rng.random_range(ROTATE_AFTER))
}

/// When a certificate was issued, and when its successor is asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Service {
    pub(super) issued: SystemTime,
    pub(super) next_rotation: SystemTime,
}

impl Service {
    /// Of a certificate that was issued at `issued`.
    pub(super) fn new(issued: SystemTime, not_after: SystemTime) -> Self {
        Self { issued, next_rotation: rotation_time(issued, not_after, &mut rand::rng()) }
    }
}

/// The delays between attempts, without an end.
pub(super) fn retry_delays() -> impl Iterator<Item = Duration> + Send {
    ExponentialBuilder::new()
        .with_min_delay(FIRST_RETRY)
        .with_max_delay(MAX_RETRY)
        .without_max_times()
        .with_jitter()
        .build()
}

/// Shortens a delay when the certificate that still serves would end before or soon after it:
/// `left` is what remains of it, `None` if there is none.
pub(super) fn before_it_is_too_late(delay: Duration, left: Option<Duration>) -> Duration {
    left.map_or(delay, |left| delay.min((left / 4).max(FIRST_RETRY)))
}

/// Shortens a delay between attempts to connect: pods ask for their next certificates when half of
/// a lifetime is over, and what then remains must suffice for several attempts. A `lifetime` of
/// zero is not known.
pub(super) fn while_certificates_last(delay: Duration, lifetime: Duration) -> Duration {
    before_it_is_too_late(delay, Some(lifetime / 2).filter(|left| !left.is_zero()))
}

/// Where the time of day comes from.
#[derive(Clone)]
pub(super) struct Clock(Arc<dyn Fn() -> SystemTime + Send + Sync>);

impl Clock {
    /// The system's clock.
    pub(super) fn system() -> Self {
        Self(Arc::new(SystemTime::now))
    }

    /// A clock that goes with tokio's, which a test can pause.
    #[cfg(test)]
    pub(super) fn of_tokio() -> Self {
        let (date, start) = (SystemTime::now(), tokio::time::Instant::now());
        Self(Arc::new(move || date + start.elapsed()))
    }

    /// The time of day.
    pub(super) fn now(&self) -> SystemTime {
        (self.0)()
    }

    /// Returns at this time of day, or up to [`LONGEST_NAP`] later if the clock was set meanwhile.
    pub(super) async fn sleep_until(&self, time: SystemTime) {
        while let Ok(left) = time.duration_since(self.now())
            && !left.is_zero()
        {
            tokio::time::sleep(left.min(LONGEST_NAP)).await;
        }
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Clock")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rand::{SeedableRng as _, rngs::StdRng};

    proptest! {
        #[test]
        fn rotation_starts_around_half_of_the_lifetime(seed: u64, seconds in 1_u64..10_000_000) {
            let issued = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
            let lifetime = Duration::from_secs(seconds);
            let rng = &mut StdRng::seed_from_u64(seed);
            let served = rotation_time(issued, issued + lifetime, rng).duration_since(issued);
            let share = served.unwrap().div_duration_f64(lifetime);
            prop_assert!((0.449..0.551).contains(&share), "{}", share);
        }

        #[test]
        fn a_retry_leaves_time_for_more(delay_ms in 0_u64..100_000, left_ms in 2_000_u64..100_000) {
            let (delay, left) = (Duration::from_millis(delay_ms), Duration::from_millis(left_ms));
            let shortened = before_it_is_too_late(delay, Some(left));
            prop_assert!(shortened <= delay && shortened <= left / 4);
            prop_assert_eq!(before_it_is_too_late(delay, None), delay);
        }

        #[test]
        fn the_second_half_of_a_life_has_time_for_four_attempts(seconds in 4_u64..100_000) {
            let lifetime = Duration::from_secs(seconds);
            for delay in retry_delays().take(20) {
                let shortened = while_certificates_last(delay, lifetime);
                prop_assert!(shortened <= delay && shortened <= lifetime / 8);
                prop_assert_eq!(while_certificates_last(delay, Duration::ZERO), delay);
            }
        }
    }

    #[test]
    fn rotation_times_are_scattered() {
        let issued = SystemTime::UNIX_EPOCH;
        let not_after = issued + Duration::from_secs(4 * 3600);
        let rng = &mut StdRng::seed_from_u64(1);
        let times: Vec<_> = (0..100).map(|_| rotation_time(issued, not_after, rng)).collect();
        let spread = times.iter().max().unwrap().duration_since(*times.iter().min().unwrap());
        assert!(spread.unwrap() > Duration::from_secs(4 * 360 * 9 / 10), "of 10 % of the lifetime");
    }

    #[test]
    fn an_ended_certificate_is_due_at_once() {
        let issued = SystemTime::UNIX_EPOCH + Duration::from_secs(10);
        let rng = &mut StdRng::seed_from_u64(1);
        assert_eq!(rotation_time(issued, SystemTime::UNIX_EPOCH, rng), issued);
    }

    #[test]
    fn retries_slow_down_to_a_limit_and_never_end() {
        let delays: Vec<_> = retry_delays().take(1_000).collect();
        assert!(delays[0] >= FIRST_RETRY && delays[0] < 2 * FIRST_RETRY);
        assert!(delays[999] >= MAX_RETRY && delays[999] < 2 * MAX_RETRY);
        assert!(delays.windows(2).any(|pair| pair[1] < pair[0]), "no jitter");
    }

    #[tokio::test(start_paused = true)]
    async fn sleeping_until_a_time_of_day() {
        let clock = Clock::of_tokio();
        let time = clock.now() + Duration::from_secs(3600);
        clock.sleep_until(time).await;
        assert_eq!(clock.now(), time);
        clock.sleep_until(time - Duration::from_secs(1)).await;
        assert_eq!(clock.now(), time);
    }
}
