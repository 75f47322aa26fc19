//! The real control plane in its namespace.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use serde_json::Value;

use super::topology::CONTROL_ADDRESS;
use super::{Lab, Netns, Pod, Process, binary, http, json_of, run_program, until};

/// The trust domain of every laboratory.
pub const TRUST_DOMAIN: &str = "lab.test";

const LISTEN_PORT: u16 = 8443;
const HTTP_PORT: u16 = 9464;

/// A `mesh-control` that runs.
#[derive(Debug)]
pub struct Control {
    netns: Netns,
    process: Process,
    config: PathBuf,
    state: PathBuf,
    socket: PathBuf,
    log: PathBuf,
}

impl Lab {
    /// Starts the control plane and waits until it is ready. `extra` is more YAML for its
    /// configuration.
    pub fn control(&mut self, extra: &str) -> Result<Control> {
        let netns = self.control_namespace()?;
        let directory = self.directory("control")?;
        let state = directory.join("state");
        let socket = directory.join("admin.sock");
        let config = directory.join("config.yaml");
        let text = format!(
            "trust_domain: {TRUST_DOMAIN}\nstate_dir: {}\nadmin_socket: {}\n\
             listen: \"[::]:{LISTEN_PORT}\"\nhttp_listen: 127.0.0.1:{HTTP_PORT}\n{extra}\n",
            state.display(),
            socket.display(),
        );
        fs::write(&config, text)?;
        let log = self.logs().join("control.log");
        let process = start(&netns, &config, &log)?;
        let mut control = Control { netns, process, config, state, socket, log };
        control.wait_ready()?;
        Ok(control)
    }
}

impl Control {
    /// Where agents connect.
    pub fn endpoint() -> String {
        format!("{CONTROL_ADDRESS}:{LISTEN_PORT}")
    }

    /// The process, for signals and logs.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Its namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Its state directory, with the keys of its CA.
    pub fn state_dir(&self) -> &Path {
        &self.state
    }

    /// A page of its HTTP server, with status line and headers.
    pub fn http(&self, path: &str) -> Result<String> {
        Ok(http::get(&self.netns, HTTP_PORT, path)?)
    }

    /// Kills it and starts it again on the same state.
    pub fn restart(&mut self) -> Result<()> {
        self.process.kill9().ok();
        self.start()
    }

    /// Starts it again after it was killed.
    pub fn start(&mut self) -> Result<()> {
        self.process = start(&self.netns, &self.config, &self.log)?;
        self.wait_ready()
    }

    /// Registers a pod under the service account of its name, in namespace `default`.
    pub fn register(&self, pod: &Pod) -> Result<()> {
        let [v4, v6] = pod.addresses().map(|address| address.to_string());
        self.cli(&[
            "register",
            "--uid",
            &pod.uid(),
            "--namespace",
            "default",
            "--service-account",
            pod.pod_name(),
            "--name",
            pod.pod_name(),
            "--node",
            pod.node_name(),
            "--address",
            &v4,
            "--address",
            &v6,
        ])?;
        Ok(())
    }

    /// Takes a pod from the registry.
    pub fn deregister(&self, pod: &Pod) -> Result<()> {
        self.cli(&["deregister", &pod.uid()])?;
        Ok(())
    }

    /// Puts the file of a service in place, and waits until what it says is in force. It must say
    /// something new.
    pub fn serve(&self, name: &str, text: &str) -> Result<()> {
        let version = || self.status().ok()?["snapshot_version"].as_u64();
        let before = version();
        let path = self.state.join("services").join(format!("{name}.yaml"));
        let hidden = path.with_file_name(format!(".{name}.yaml"));
        fs::write(&hidden, text)?;
        fs::rename(&hidden, &path)?;
        until("the service to be in force", || (version()? > before?).then_some(()))
    }

    /// A join token for a node.
    pub fn token(&self, node: &str) -> Result<String> {
        Ok(self.cli(&["token", "create", "--node", node])?.trim().to_owned())
    }

    /// `mesh-control status --json`, whatever the exit status.
    pub fn status(&self) -> Result<Value> {
        json_of(&mut self.command(&["status", "--json"])?)
    }

    /// Runs a command of `mesh-control` against it, and returns what it prints.
    pub fn cli(&self, arguments: &[&str]) -> Result<String> {
        run_program(&mut self.command(arguments)?)
    }

    /// A command of `mesh-control` against it.
    pub fn command(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = Command::new(binary("mesh-control")?);
        command.args(arguments).arg("--admin-socket").arg(&self.socket);
        Ok(command)
    }

    fn wait_ready(&mut self) -> Result<()> {
        until("mesh-control to be ready", || {
            if let Err(error) = self.process.check_alive() {
                return Some(Err(error));
            }
            http::is_ok(&self.netns, HTTP_PORT, "/readyz").then_some(Ok(()))
        })?
    }
}

fn start(netns: &Netns, config: &Path, log: &Path) -> Result<Process> {
    let mut command = Command::new(binary("mesh-control")?);
    command.arg("run").arg("--config").arg(config);
    Process::spawn(netns, &mut command, log)
}
