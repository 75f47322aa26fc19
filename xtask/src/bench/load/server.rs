//! nginx in a pod.

use std::fs;
use std::net::SocketAddr;
use std::process::Command;

use anyhow::{Context as _, Result};
use xtask::lab::{Lab, Pod, Process, until};

pub(crate) const PORT: u16 = 8080;
/// What it answers.
pub(crate) const BODY: &str = "nodemesh-bench\n";

/// Starts it, and waits until it listens.
pub(crate) fn start(lab: &Lab, pod: &Pod) -> Result<Process> {
    let directory = lab.directory(&format!("nginx-{}", pod.pod_name()))?;
    let config = format!(
        "daemon off;\npid {directory}/pid;\nworker_processes auto;\n\
         events {{ worker_connections 16384; }}\n\
         http {{\n  access_log off;\n  keepalive_requests 1000000000;\n  keepalive_timeout 1h;\n\
         \x20 server {{\n    listen {PORT} reuseport;\n    listen [::]:{PORT} reuseport;\n\
         \x20   return 200 \"{body}\";\n  }}\n}}\n",
        directory = directory.display(),
        body = BODY.escape_default(),
    );
    let file = directory.join("nginx.conf");
    fs::write(&file, config)?;
    let log = lab.logs().join(format!("nginx-{}.log", pod.pod_name()));
    let mut command = Command::new("nginx");
    command.args(["-e", "stderr", "-c"]).arg(file);
    let mut process = Process::spawn(pod, &mut command, &log)?;
    let address = SocketAddr::new(pod.v4(), PORT);
    until("nginx to listen", || {
        if let Err(error) = process.check_alive() {
            return Some(Err(error));
        }
        pod.connect(address).ok().map(|_| Ok(()))
    })
    .and_then(|listening| listening)
    .with_context(|| process.log_tail())?;
    Ok(process)
}
