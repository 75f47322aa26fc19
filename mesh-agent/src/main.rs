//! The node agent: a thin shell around the library.

use std::process::ExitCode;

use clap::Parser as _;
use mesh_agent::{agent, cli::Cli};

fn main() -> ExitCode {
    Cli::parse().execute(agent::run, agent::uninstall)
}
