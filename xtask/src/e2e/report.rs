//! The lines of the issue that were checked.

use std::time::{Duration, Instant};

use anyhow::Result;

/// What was checked so far.
#[derive(Default)]
pub(super) struct Report {
    lines: Vec<Line>,
}

struct Line {
    section: &'static str,
    what: &'static str,
    took: Duration,
    outcome: Outcome,
}

enum Outcome {
    /// With something to note, or nothing.
    Held(String),
    Failed(anyhow::Error),
    /// This cluster cannot show it, and why.
    Skipped(String),
}

impl Report {
    /// Checks a line of a section. What fails does not keep others from being checked.
    pub(super) fn check(
        &mut self,
        section: &'static str,
        what: &'static str,
        work: impl FnOnce() -> Result<()>,
    ) {
        self.measure(section, what, || work().map(|()| String::new()));
    }

    /// The same, with something to note.
    pub(super) fn measure(
        &mut self,
        section: &'static str,
        what: &'static str,
        work: impl FnOnce() -> Result<String>,
    ) {
        eprintln!("...  {what}");
        let began = Instant::now();
        let outcome = work().map_or_else(Outcome::Failed, Outcome::Held);
        self.note(Line { section, what, outcome, took: began.elapsed() });
    }

    /// Says that this cluster has not what a line, and those after it, need.
    pub(super) fn skip(&mut self, section: &'static str, what: &'static str, why: &str) {
        let outcome = Outcome::Skipped(why.to_owned());
        self.note(Line { section, what, outcome, took: Duration::ZERO });
    }

    fn note(&mut self, line: Line) {
        println!("{}", line.text());
        self.lines.push(line);
    }

    /// How many lines failed.
    pub(super) fn failures(&self) -> usize {
        self.count(|outcome| matches!(outcome, Outcome::Failed(_)))
    }

    fn count(&self, which: impl Fn(&Outcome) -> bool) -> usize {
        self.lines.iter().filter(|line| which(&line.outcome)).count()
    }

    /// All lines, in order.
    pub(super) fn text(&self) -> String {
        let lines: Vec<_> = self.lines.iter().map(Line::text).collect();
        let skipped = self.count(|outcome| matches!(outcome, Outcome::Skipped(_)));
        let checked = lines.len() - skipped;
        let failed = self.failures();
        format!("{}\n{checked} checked, {failed} failed, {skipped} skipped", lines.join("\n"))
    }
}

impl Line {
    fn text(&self) -> String {
        let (verdict, note) = match &self.outcome {
            Outcome::Held(note) => ("ok     ", note.clone()),
            Outcome::Failed(error) => ("FAILED ", format!("{error:#}")),
            Outcome::Skipped(why) => ("SKIPPED", why.clone()),
        };
        let Self { section, what, took, .. } = self;
        let note = if note.is_empty() { note } else { format!(": {note}") };
        format!("{section}  {verdict} {what} ({:.1} s){note}", took.as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_counted_and_the_rest_goes_on() {
        let mut report = Report::default();
        report.check("2", "one", || Ok(()));
        report.check("3", "two", || anyhow::bail!("no"));
        report.measure("4", "three", || Ok("7 ms".to_owned()));
        report.skip("5", "four", "there is no moon");
        assert_eq!(report.failures(), 1);
        let text = report.text();
        assert!(text.contains("2  ok      one (0.0 s)\n3  FAILED  two (0.0 s): no\n"), "{text}");
        let end = "5  SKIPPED four (0.0 s): there is no moon\n3 checked, 1 failed, 1 skipped";
        assert!(text.ends_with(&format!("4  ok      three (0.0 s): 7 ms\n{end}")), "{text}");
    }
}
