//! The node agent: a thin shell around the library.

use std::process::ExitCode;

use clap::Parser as _;
use mesh_agent::{agent, cli::Cli, cni};

fn main() -> ExitCode {
    // Not through the command line's parser, which complains in words: the runtime wants JSON.
    if std::env::args_os().next().is_some_and(|program| cni::is_plugin(&program)) {
        return cni::run();
    }
    Cli::parse().execute(agent::run, agent::uninstall)
}
