//! The node agent: a thin shell around the library.

use std::process::ExitCode;

use clap::Parser as _;
use mesh_agent::{agent, cli::Cli, cni};
use tikv_jemallocator::Jemalloc;

/// Gives back what ten thousand connections needed, which glibc's allocator keeps. It is AWS-LC's as
/// well, since it is what C calls `malloc`. Its settings are in `.cargo/config.toml`.
#[global_allocator]
static ALLOCATOR: Jemalloc = Jemalloc;

fn main() -> ExitCode {
    // Not through the command line's parser, which complains in words: the runtime wants JSON.
    if std::env::args_os().next().is_some_and(|program| cni::is_plugin(&program)) {
        return cni::run();
    }
    Cli::parse().execute(agent::run, agent::uninstall)
}
