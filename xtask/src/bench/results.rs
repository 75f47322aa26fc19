//! What a run has found, and what follows from it.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;
use std::thread;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::plan::{Goal, Metric, goals};
use super::stats::{Bound, Summary, Verdict};
use super::subjects::{nodemesh, plain};

/// A value of one round.
pub(crate) struct Sample {
    pub(crate) round: usize,
    pub(crate) subject: String,
    pub(crate) metric: Metric,
    pub(crate) value: f64,
}

/// Something that is missing in the results.
pub(crate) struct Failure {
    pub(crate) subject: String,
    /// What was to be done.
    pub(crate) what: String,
    pub(crate) error: String,
}

/// Where and when the run was.
pub(crate) struct Machine {
    pub(crate) date: String,
    pub(crate) commit: String,
    pub(crate) processor: String,
    pub(crate) cpus: usize,
    pub(crate) kernel: String,
}

/// Everything about a run.
pub(crate) struct Results {
    pub(crate) machine: Machine,
    pub(crate) rounds: usize,
    pub(crate) seconds: u64,
    /// Plain TCP first.
    pub(crate) subjects: Vec<String>,
    pub(crate) samples: Vec<Sample>,
    pub(crate) failures: Vec<Failure>,
    /// The share of the machine that others took, before each round.
    pub(crate) background: Vec<f64>,
}

/// How a goal was met.
pub(crate) struct Judgement {
    pub(crate) goal: Goal,
    /// A ratio to plain TCP, if there is one.
    pub(crate) reached: Summary,
    pub(crate) verdict: Verdict,
}

impl Machine {
    /// This one, now.
    pub(crate) fn here() -> Result<Self> {
        let output = |program: &str, arguments: &[&str]| -> Result<String> {
            let output = Command::new(program).args(arguments).output();
            let output = output.with_context(|| format!("running {program}"))?;
            Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
        };
        let cpuinfo = fs::read_to_string("/proc/cpuinfo")?;
        let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name"));
        let model =
            model.and_then(|rest| rest.split_once(": ")).map_or("unknown", |(_, name)| name);
        Ok(Self {
            date: output("date", &["-u", "+%Y-%m-%d %H:%M UTC"])?,
            commit: output("git", &["describe", "--always", "--dirty"])?,
            processor: model.trim().to_owned(),
            cpus: thread::available_parallelism()?.get(),
            kernel: output("uname", &["-sr"])?,
        })
    }
}

impl Results {
    /// Notes that something will be missing.
    pub(crate) fn fail(&mut self, subject: &str, what: String, error: &anyhow::Error) {
        let error = format!("{error:#}");
        eprintln!("bench: {subject}: {what}: {error}");
        self.failures.push(Failure { subject: subject.to_owned(), what, error });
    }

    /// The metrics there are values for, in the order of the plan.
    pub(crate) fn metrics(&self) -> Vec<Metric> {
        let mut metrics: Vec<Metric> = self.samples.iter().map(|sample| sample.metric).collect();
        metrics.sort_unstable();
        metrics.dedup();
        metrics
    }

    fn by_round(&self, subject: &str, metric: Metric) -> BTreeMap<usize, f64> {
        let samples = self.samples.iter();
        let of = samples.filter(|sample| sample.subject == subject && sample.metric == metric);
        of.map(|sample| (sample.round, sample.value)).collect()
    }

    /// What a subject reached.
    pub(crate) fn value(&self, subject: &str, metric: Metric) -> Option<Summary> {
        let values: Vec<f64> = self.by_round(subject, metric).into_values().collect();
        Summary::of(&values)
    }

    /// What it reached for each unit of plain TCP in the same round.
    pub(crate) fn ratio(&self, subject: &str, metric: Metric) -> Option<Summary> {
        let plain = self.by_round(plain::NAME, metric);
        let rounds = self.by_round(subject, metric).into_iter();
        let ratios: Vec<f64> =
            rounds.filter_map(|(round, value)| Some(value / plain.get(&round)?)).collect();
        Summary::of(&ratios)
    }

    /// The goals that this run can say something about.
    pub(crate) fn judgements(&self) -> Vec<Judgement> {
        let judge = |goal: Goal| {
            let Goal { metric, bound } = goal;
            let reached = if metric.load.is_relative() {
                self.ratio(nodemesh::NAME, metric)?
            } else {
                // Of what is counted once there is no noise to be known.
                let value = self.value(nodemesh::NAME, metric)?;
                Summary { resolution: value.resolution.or(Some(0.0)), ..value }
            };
            Some(Judgement { verdict: reached.judge(bound), reached, goal })
        };
        goals().into_iter().filter_map(judge).collect()
    }

    /// For programs. Documented in docs/performance.md.
    pub(crate) fn json(&self) -> Value {
        let Machine { date, commit, processor, cpus, kernel } = &self.machine;
        let metrics = self.metrics().into_iter().map(|metric| {
            let subjects = self.subjects.iter().filter_map(|subject| {
                let rounds = self.by_round(subject, metric);
                let entry = json!({
                    "rounds": rounds.into_values().collect::<Vec<_>>(),
                    "value": summary(&self.value(subject, metric)?),
                    "ratio": self.ratio(subject, metric).as_ref().map(summary),
                });
                Some((subject.clone(), entry))
            });
            let subjects: serde_json::Map<_, _> = subjects.collect();
            json!({ "metric": metric.name(), "unit": metric.unit(), "subjects": subjects })
        });
        let goals = self.judgements().into_iter().map(|judgement| {
            let (kind, limit) = match judgement.goal.bound {
                Bound::AtLeast(limit) => ("at-least", limit),
                Bound::AtMost(limit) => ("at-most", limit),
            };
            let verdict = match judgement.verdict {
                Verdict::Met => "met",
                Verdict::NotMet => "not-met",
                Verdict::Undecided => "undecided",
            };
            json!({
                "metric": judgement.goal.metric.name(),
                "bound": kind,
                "limit": limit,
                "of": if judgement.goal.metric.load.is_relative() { "ratio" } else { "value" },
                "reached": summary(&judgement.reached),
                "verdict": verdict,
            })
        });
        let failures = self.failures.iter().map(|Failure { subject, what, error }| {
            json!({ "subject": subject, "what": what, "error": error })
        });
        json!({
            "schema": 1,
            "date": date,
            "commit": commit,
            "machine": { "processor": processor, "cpus": cpus, "kernel": kernel },
            "rounds": self.rounds,
            "seconds": self.seconds,
            "background": self.background,
            "metrics": metrics.collect::<Vec<_>>(),
            "goals": goals.collect::<Vec<_>>(),
            "failures": failures.collect::<Vec<_>>(),
        })
    }
}

fn summary(summary: &Summary) -> Value {
    let Summary { median, low, high, resolution } = *summary;
    json!({ "median": median, "low": low, "high": high, "resolution": resolution })
}
