//! `xtask pod`: what runs in the pods of `cargo xtask e2e`, whose image holds nothing else.
//!
//! What goes on until it is told to stop, ends when its standard input does, and then prints what
//! it has seen as JSON. Its first line is [`READY`].

mod client;
mod grpc;
mod node;
mod serve;
mod wire;

use std::io::{self, Read as _};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::Subcommand;
use nix::sys::signal::{SigSet, Signal};
use xtask::lab::Canary;

pub(crate) use self::serve::{ECHO, GREETING, GRPC, HTTP};

/// What is printed once it has begun.
pub(crate) const READY: &str = "ready";

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Serve on every port of this tool, until SIGTERM.
    Serve {
        /// In a network namespace of its own, once it listens in the pod's.
        #[arg(long)]
        unshare: bool,
    },
    /// Do nothing, until SIGTERM.
    Sleep,
    /// Send a text and print the answer; status 1 if there is none.
    Ask {
        address: SocketAddr,
        #[arg(default_value = "")]
        text: String,
        /// How often, one answer a line.
        #[arg(long, default_value_t = 1)]
        times: u32,
        /// For how many seconds it is tried again.
        #[arg(long, default_value_t = 0)]
        patience: u64,
    },
    /// Ask over new connections, again and again, and count.
    Load {
        address: SocketAddr,
        text: String,
        /// End after so many, not with standard input.
        #[arg(long)]
        count: Option<u64>,
    },
    /// Open a connection, and tell whether it was cut.
    Hold { address: SocketAddr },
    /// Capture what comes in over any device of this network namespace.
    Capture {
        /// What to look for.
        #[arg(long)]
        canary: Canary,
        /// What these say to each other is to be TLS 1.3.
        #[arg(long)]
        pod: Vec<IpAddr>,
    },
    /// Kill every process in cgroups with one of these in their name.
    Kill { names: Vec<String> },
    /// Print the node's files, and what is in its directories.
    Look { paths: Vec<PathBuf> },
    /// Write one of the node's files.
    Write { path: PathBuf, text: String },
    /// Remove one of the node's files, if it is there.
    Remove { path: PathBuf },
    /// Print the names of the tcx programs of every network namespace of the node.
    Tcx,
}

pub(crate) fn run(command: Command) -> Result<()> {
    match command {
        Command::Serve { unshare } => serve::run(unshare),
        Command::Sleep => until_terminated(),
        Command::Ask { address, text, times, patience } => {
            client::ask(address, &text, times, patience)
        }
        Command::Load { address, text, count } => client::load(address, &text, count),
        Command::Hold { address } => client::hold(address),
        Command::Capture { canary, pod } => wire::capture(&canary, &pod),
        Command::Kill { names } => node::kill(&names),
        Command::Look { paths } => node::look(&paths),
        Command::Write { path, text } => node::write(&path, &text),
        Command::Remove { path } => node::remove(&path),
        Command::Tcx => node::tcx(),
    }
}

/// A container's first process is only ended by a signal that it waits for.
fn until_terminated() -> Result<()> {
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM]);
    signals.thread_block().context("blocking the signals")?;
    signals.wait().context("waiting for a signal")?;
    Ok(())
}

/// Says that it has begun, and returns when standard input ends.
fn until_stdin_ends() -> Result<()> {
    println!("{READY}");
    io::stdin().read_to_end(&mut Vec::new()).context("reading standard input")?;
    Ok(())
}
