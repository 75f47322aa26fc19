//! The agent's log: on standard error, with what libraries and the eBPF programs say through the
//! `log` crate, and a copy of the last warnings and errors for `status`.

use std::io::IsTerminal as _;

use mesh_common::log::{Log, LogFormat};
use tracing_subscriber::{
    Layer as _, layer::SubscriberExt as _, util::SubscriberInitExt as _, util::TryInitError,
};

use crate::stats::Problems;

/// Starts logging. Once per process.
///
/// # Errors
///
/// When something else has started it.
pub fn init(log: &Log) -> Result<Problems, TryInitError> {
    let problems = Problems::default();
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    let lines = match log.format {
        LogFormat::Text => lines.boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    tracing_subscriber::registry()
        .with(lines.with_filter(log.level.filter()))
        .with(problems.clone())
        .try_init()?;
    Ok(problems)
}
