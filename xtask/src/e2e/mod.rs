//! `cargo xtask e2e`: the chart on a real cluster, line by line of what it promises.
//!
//! The cluster is the one of `KUBECONFIG`. What a run makes bears its name, and is gone when it
//! ends, whatever happens.

mod changes;
mod chart;
mod control;
mod enrolment;
mod failures;
mod install;
mod kinds;
mod kubectl;
mod load;
mod objects;
mod ordinary;
mod reboot;
mod report;
mod rotation;
mod services;
mod stage;
mod static_pods;
mod strict;
mod uninstall;
mod wire;

use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::Ordering;
use std::thread;

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use nix::sys::signal::{SigSet, Signal};

use self::chart::Chart;
use self::report::Report;
use self::stage::Stage;
use crate::{commands, image};

const ARCHIVE: &str = "target/nodemesh.tar";

/// What a run needs to know of the cluster.
#[derive(Args)]
pub(crate) struct Arguments {
    /// A value for the chart, as helm takes it; clusterRanges is required.
    #[arg(long, value_name = "KEY=VALUE", required = true)]
    set: Vec<String>,
    /// Make the images, and let this command import the archive that it gets as argument.
    #[arg(long, value_name = "COMMAND")]
    import: Option<PathBuf>,
    /// Reboot a node, too: this command does it to the node that it gets as argument.
    #[arg(long, value_name = "COMMAND")]
    reboot: Option<PathBuf>,
    /// Only the groups with one of these in their name, with installation and removal.
    groups: Vec<String>,
}

type Group = (&'static str, fn(&Stage, &mut Report));

/// In this order: each leaves the cluster to the next as it found it.
const GROUPS: [Group; 11] = [
    ("enrolment", enrolment::check),
    ("kinds", kinds::check),
    ("static-pods", static_pods::check),
    ("wire", wire::check),
    ("strict", strict::check),
    ("services", services::check),
    ("ordinary", ordinary::check),
    ("changes", changes::check),
    ("rotation", rotation::check),
    ("failures", failures::check),
    ("reboot", reboot::check),
];

/// Checks everything, or some groups, and fails if a line of it does.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    stop_on_interrupt()?;
    if let Some(import) = &arguments.import {
        import_images(import)?;
    }
    let wanted = |name: &str| {
        arguments.groups.is_empty() || arguments.groups.iter().any(|group| name.contains(group))
    };
    ensure!(
        GROUPS.iter().any(|(name, _)| wanted(name)),
        "no group is named so; there are {}",
        GROUPS.map(|(name, _)| name).join(", ")
    );

    let mut report = Report::default();
    let stage = Stage::set_up(Chart::new(&arguments.set)?, arguments.reboot.clone())?;
    if install::check(&stage, &mut report) {
        for (name, check) in GROUPS.iter().filter(|(name, _)| wanted(name)) {
            eprintln!("== {name}");
            check(&stage, &mut report);
        }
    }
    // What follows is the cleaning up.
    kubectl::INTERRUPTED.store(false, Ordering::Relaxed);
    stage.keep_logs();
    uninstall::check(&stage, &mut report);
    drop(stage);
    println!("\n{}", report.text());
    ensure!(report.failures() == 0, "{} lines failed", report.failures());
    Ok(())
}

fn import_images(command: &PathBuf) -> Result<()> {
    let archive = commands::root()?.join(ARCHIVE);
    image::write(&commands::build_static(true, true)?, true, env!("CARGO_PKG_VERSION"), &archive)?;
    let status = Command::new(command)
        .arg(&archive)
        .status()
        .with_context(|| format!("running {}", command.display()))?;
    ensure!(status.success(), "{} {}: {status}", command.display(), archive.display());
    Ok(())
}

/// The first interrupt ends what is being done, and the rest is cleaned up as ever.
fn stop_on_interrupt() -> Result<()> {
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM]);
    signals.thread_block().context("blocking the signals")?;
    thread::spawn(move || {
        if signals.wait().is_ok() {
            eprintln!("\ninterrupted: cleaning up");
            kubectl::INTERRUPTED.store(true, Ordering::Relaxed);
        }
    });
    Ok(())
}

/// Whether a condition holds, or else what was seen instead.
fn expect(condition: bool, seen: impl FnOnce() -> String) -> Result<()> {
    if condition { Ok(()) } else { bail!(seen()) }
}
