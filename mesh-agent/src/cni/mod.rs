//! The CNI plugin that puts the pods of a Kubernetes node under the mesh: it is chained behind the
//! plugin that makes their network, and holds the start of a pod that is in the mesh until the
//! agent has it under guard.
//!
//! No pod of the mesh starts outside because something was late: a failure is code 11, after which
//! the kubelet tries again. `docs/kubernetes.md` says what follows from that.

mod cluster;
mod decision;
mod durable;
pub mod install;
mod plugin;
mod protocol;
mod state;

use std::{
    ffi::OsStr,
    io::{Read as _, Write as _, stdin, stdout},
    path::Path,
    process::ExitCode,
};

use self::{
    plugin::Plugin,
    protocol::{CniError, Request},
};

/// The name by which network configurations call the plugin, and a binary is one.
pub const PLUGIN_NAME: &str = "nodemesh-cni";

/// More than any network configuration has.
const MAX_STDIN: u64 = 4 << 20;

/// Whether a program that was started by this name shall be the plugin.
pub fn is_plugin(program: &OsStr) -> bool {
    Path::new(program).file_name().is_some_and(|name| name == PLUGIN_NAME)
}

/// Answers the one question that the container runtime asks, in the environment and on standard
/// input.
pub fn run() -> ExitCode {
    let mut input = Vec::new();
    let read = stdin().take(MAX_STDIN).read_to_end(&mut input);
    match read.map_err(CniError::Start).and_then(|_| answer(&input)) {
        Ok(text) => print(&text, ExitCode::SUCCESS),
        Err(error) => print(&error.to_json(&input), ExitCode::FAILURE),
    }
}

fn answer(input: &[u8]) -> Result<String, CniError> {
    let (command, settings) = match protocol::read(&|name| std::env::var_os(name), input)? {
        Request::Version(version) => return Ok(protocol::versions(&version).to_string()),
        Request::Do(command, settings) => (command, settings),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let result =
        runtime.map_err(CniError::Start)?.block_on(Plugin::new(settings).execute(command))?;
    Ok(result.map(|result| result.to_string()).unwrap_or_default())
}

/// A runtime that does not read the answer must not take it for a good one.
fn print(text: &str, status: ExitCode) -> ExitCode {
    match stdout().write_all(text.as_bytes()) {
        Ok(()) => status,
        Err(_) => ExitCode::FAILURE,
    }
}
