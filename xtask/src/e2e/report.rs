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
    outcome: Result<String>,
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
        let line = Line { section, what, outcome: work(), took: began.elapsed() };
        println!("{}", line.text());
        self.lines.push(line);
    }

    /// How many lines failed.
    pub(super) fn failures(&self) -> usize {
        self.lines.iter().filter(|line| line.outcome.is_err()).count()
    }

    /// All lines, in order.
    pub(super) fn text(&self) -> String {
        let lines: Vec<_> = self.lines.iter().map(Line::text).collect();
        let failures = self.failures();
        format!("{}\n{} checked, {failures} failed", lines.join("\n"), lines.len())
    }
}

impl Line {
    fn text(&self) -> String {
        let (verdict, note) = match &self.outcome {
            Ok(note) => ("ok    ", note.clone()),
            Err(error) => ("FAILED", format!("{error:#}")),
        };
        let Self { section, what, took, .. } = self;
        let note = if note.is_empty() { note } else { format!(": {note}") };
        format!("{section}  {verdict}  {what} ({:.1} s){note}", took.as_secs_f64())
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
        assert_eq!(report.failures(), 1);
        let text = report.text();
        assert!(text.contains("2  ok      one (0.0 s)\n3  FAILED  two (0.0 s): no\n"), "{text}");
        assert!(text.ends_with("4  ok      three (0.0 s): 7 ms\n3 checked, 1 failed"), "{text}");
    }
}
