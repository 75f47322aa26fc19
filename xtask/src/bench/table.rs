//! The results for people, in Markdown.

use std::fmt::Write as _;

use super::plan::Metric;
use super::results::{Judgement, Machine, Results};
use super::stats::{Bound, Summary, Verdict};
use super::subjects::{nodemesh, plain};

/// More than this, taken by others, is no quiet machine.
const QUIET: f64 = 0.05;

/// The whole report.
pub(crate) fn render(results: &Results) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    write(&mut text, results).ok();
    text
}

fn write(text: &mut String, results: &Results) -> std::fmt::Result {
    let Machine { date, commit, processor, cpus, kernel } = &results.machine;
    writeln!(
        text,
        "{date}, commit {commit}; {processor}, {cpus} CPUs, {kernel}; {} rounds of {} s.\n",
        results.rounds, results.seconds
    )?;
    write!(text, "| |")?;
    for subject in &results.subjects {
        write!(text, " {subject} |")?;
    }
    writeln!(text, "\n|---|{}", "---|".repeat(results.subjects.len()))?;
    for metric in results.metrics() {
        write!(text, "| {}, {} |", metric.name(), metric.unit())?;
        for subject in &results.subjects {
            write!(text, " {} |", cell(results, subject, metric))?;
        }
        writeln!(text)?;
    }
    writeln!(
        text,
        "\nMedians; × is the ratio to plain TCP in the same round, with half of its 95 % confidence \
         interval. ~ marks what cannot tell 5 % from noise.\n"
    )?;
    goals(text, &results.judgements())?;
    noise(text, results)?;
    for failure in &results.failures {
        writeln!(text, "* MISSING: {}, {}: {}", failure.subject, failure.what, failure.error)?;
    }
    Ok(())
}

fn cell(results: &Results, subject: &str, metric: Metric) -> String {
    let Some(value) = results.value(subject, metric) else { return "–".into() };
    match results.ratio(subject, metric).filter(|_| subject != plain::NAME) {
        Some(ratio) => format!("{} ×{}", number(value.median), with_noise(&ratio)),
        None => number(value.median),
    }
}

/// A ratio and what it is worth.
fn with_noise(ratio: &Summary) -> String {
    let mark = if ratio.tells_five_percent() { "" } else { "~" };
    match ratio.resolution {
        Some(0.0) => number(ratio.median),
        Some(noise) => format!("{} {mark}±{:.0} %", number(ratio.median), 1e2 * noise),
        None => format!("{} {mark}", number(ratio.median)),
    }
}

/// Three digits that mean something.
pub(super) fn number(value: f64) -> String {
    match value {
        ..10.0 => format!("{value:.2}"),
        10.0..100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

fn goals(text: &mut String, judgements: &[Judgement]) -> std::fmt::Result {
    writeln!(text, "| goal of {} | | reached | |\n|---|---|---|---|", nodemesh::NAME)?;
    for Judgement { goal, reached, verdict } in judgements {
        let unit = if goal.metric.load.is_relative() { "× plain" } else { goal.metric.unit() };
        let bound = match goal.bound {
            Bound::AtLeast(limit) => format!("≥ {limit} {unit}"),
            Bound::AtMost(limit) => format!("≤ {limit} {unit}"),
        };
        let verdict = match verdict {
            Verdict::Met => "met",
            Verdict::NotMet => "NOT MET",
            Verdict::Undecided => "too noisy to say",
        };
        let reached = with_noise(reached);
        writeln!(text, "| {} | {bound} | {reached} | {verdict} |", goal.metric.name())?;
    }
    writeln!(text)
}

/// What to think of the run as a whole.
fn noise(text: &mut String, results: &Results) -> std::fmt::Result {
    let ratios = results.metrics().into_iter().filter_map(|metric| {
        let ratio = results.ratio(nodemesh::NAME, metric)?;
        Some(ratio.tells_five_percent())
    });
    let (all, fine) = ratios.fold((0, 0), |(all, fine), tells| (all + 1, fine + i32::from(tells)));
    writeln!(text, "* {fine} of {all} ratios of {} can tell 5 % from noise.", nodemesh::NAME)?;
    let loudest = results.background.iter().copied().fold(0.0, f64::max);
    let verdict = if loudest <= QUIET { "quiet" } else { "NOT QUIET: its numbers are noise" };
    writeln!(
        text,
        "* Others took up to {:.0} % of the machine before a round: {verdict}.",
        1e2 * loudest
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_three_digits() {
        assert_eq!([0.5123, 51.23, 51_234.0].map(number), ["0.51", "51.2", "51234"]);
    }
}
