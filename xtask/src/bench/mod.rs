//! `cargo xtask bench`: what the mesh costs, beside plain TCP and other proxies, in one run.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use xtask::lab;

use measure::Reading;
use plan::{Load, Metric, Route, Step};
use results::{Machine, Results, Sample};
use subjects::Subject;
use subjects::relay::Program;
use subjects::script::Peer;

mod cpu;
mod load;
mod measure;
mod memory;
mod plan;
mod results;
mod scale;
mod stats;
mod subjects;
mod svg;
mod table;

/// How long is looked at what others do.
const BACKGROUND: Duration = Duration::from_secs(2);

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// How often each measurement is repeated, the subjects taking turns.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// How many seconds a measurement takes.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
    /// Only the measurements whose names begin with one of these.
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    only: Vec<String>,
    /// Another node proxy: a script that sets it up and takes it down, see docs/performance.md.
    #[arg(long = "peer", value_name = "NAME=SCRIPT")]
    peers: Vec<Peer>,
    /// One round of one second.
    #[arg(long, conflicts_with_all = ["rounds", "seconds"])]
    quick: bool,
    /// Where the results go: results.json, results.md and bench.svg.
    #[arg(long, default_value = "target/bench")]
    out: PathBuf,
    /// The release binaries, this one among them, are built.
    #[arg(long, hide = true)]
    pub(crate) built: bool,
}

/// Runs it all, and cleans up after itself.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    lab::clean_up_on_interrupt(|| ())?;
    memory::raise_file_limit()?;
    let loads = arguments.loads()?;
    let (rounds, seconds) =
        if arguments.quick { (1, 1) } else { (arguments.rounds.into(), arguments.seconds) };
    let mut results = Results {
        machine: Machine::here()?,
        rounds,
        seconds,
        subjects: Vec::new(),
        samples: Vec::new(),
        failures: Vec::new(),
        background: Vec::new(),
    };
    let subjects = set_up(&mut results, &arguments.peers)?;
    let has = |subject: usize, route, load| subjects[subject].has(route, load);
    let steps = plan::steps(rounds, &loads, subjects.len(), has);
    for (number, step) in steps.iter().enumerate() {
        if results.background.len() <= step.round {
            results.background.push(measure::background(BACKGROUND)?);
        }
        let subject = &subjects[step.subject];
        eprintln!(
            "bench: {}/{}: round {}, {}, {}{}",
            number + 1,
            steps.len(),
            step.round + 1,
            step.load.name(),
            subject.name,
            if step.route == Route::Near { ", one node" } else { "" }
        );
        take(&mut results, subject, *step);
    }
    let text = table::render(&results);
    fs::create_dir_all(&arguments.out)?;
    fs::write(arguments.out.join("results.md"), &text)?;
    fs::write(arguments.out.join("bench.svg"), svg::render(&results))?;
    let json = serde_json::to_string_pretty(&results.json())?;
    fs::write(arguments.out.join("results.json"), json + "\n")?;
    println!("\n{text}\nin {}", arguments.out.display());
    Ok(())
}

impl Arguments {
    fn loads(&self) -> Result<Vec<Load>> {
        let wanted = |load: &Load| {
            let name = load.name();
            self.only.is_empty() || self.only.iter().any(|only| name.starts_with(only))
        };
        let loads: Vec<Load> = Load::ALL.into_iter().filter(wanted).collect();
        let names = Load::ALL.map(Load::name).join(", ");
        ensure!(!loads.is_empty(), "--only names no measurement: there are {names}");
        Ok(loads)
    }
}

/// Plain TCP, nodemesh, and who else comes up.
fn set_up(results: &mut Results, peers: &[Peer]) -> Result<Vec<Subject>> {
    let mut subjects = vec![
        subjects::plain::up().context("setting up plain TCP")?,
        subjects::nodemesh::up().context("setting up nodemesh")?,
    ];
    for subject in &subjects {
        subject.wait().with_context(|| subject.name.clone())?;
    }
    let relays = Program::ALL.into_iter().map(|program| (program.name(), program.up()));
    let peers = peers.iter().map(|peer| (&*peer.name, peer.up()));
    for (name, outcome) in relays.chain(peers) {
        match outcome.and_then(|subject| subject.wait().map(|()| subject)) {
            Ok(subject) => subjects.push(subject),
            Err(error) => results.fail(name, "coming up".into(), &error),
        }
    }
    results.subjects = subjects.iter().map(|subject| subject.name.clone()).collect();
    Ok(subjects)
}

/// Measures. What fails is missing in the results, and said to be.
fn take(results: &mut Results, subject: &Subject, step: Step) {
    let Step { round, route, load, .. } = step;
    match measure::measure(load, subject, route, results.seconds) {
        Ok(readings) => {
            let sample = |Reading { part, quantity, value }| Sample {
                round: round + part,
                subject: subject.name.clone(),
                metric: Metric { route, load, quantity },
                value,
            };
            results.samples.extend(readings.into_iter().map(sample));
        }
        Err(error) => {
            let what = format!("{} in round {}", load.name(), round + 1);
            results.fail(&subject.name, what, &error);
        }
    }
}
