//! The real agent of a node, in the node's namespace.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::topology::{POD_RANGE_V4, POD_RANGE_V6};
use super::{Control, Lab, Node, Pod, Process, binary, http, json_of, run_program, until};

const HTTP_PORT: u16 = 9465;

/// Set to anything: the kernel encrypts tunnels, and a kernel that cannot is an error.
const KERNEL_TLS: &str = "NODEMESH_TEST_KERNEL_TLS";

/// A `mesh-agent` that runs.
#[derive(Debug)]
pub struct Agent {
    node: Node,
    process: Process,
    config: PathBuf,
    socket: PathBuf,
    runtime: PathBuf,
    bpffs: PathBuf,
    log: PathBuf,
}

impl Lab {
    /// Starts the agent of a node, with a join token for it, and waits until it is ready. `extra`
    /// is more YAML for its configuration.
    pub fn agent(&self, node: &Node, control: &Control, extra: &str) -> Result<Agent> {
        let token = control.token(node.node_name())?;
        let mut agent = self.agent_with_token(node, &token, extra)?;
        agent.wait_ready()?;
        if kernel_tls() {
            let status = agent.status()?;
            let said = &status["kernel_tls"];
            ensure!(said == "in use", "{KERNEL_TLS} is set, but TLS in the kernel is {said}");
        }
        Ok(agent)
    }

    /// Starts the agent of a node with this join token, ready or not.
    pub fn agent_with_token(&self, node: &Node, token: &str, extra: &str) -> Result<Agent> {
        let directory = self.directory(&format!("node-{}", node.node_name()))?;
        let pods = directory.join("pods");
        fs::create_dir_all(&pods)?;
        let token_file = directory.join("join-token");
        fs::write(&token_file, token)?;
        fs::set_permissions(&token_file, fs::Permissions::from_mode(0o600))?;
        let runtime = directory.join("run");
        let bpffs = self.bpffs(node.node_name());
        let socket = runtime.join("agent.sock");
        let config = directory.join("config.yaml");
        let text = format!(
            "node: {}\ncontrol_plane: [\"{}\"]\ncluster_ranges: [{POD_RANGE_V4}, \"{POD_RANGE_V6}\"]\n\
             join_token_file: {}\nruntime_dir: {}\npods_dir: {}\nbpffs: {}\n\
             kernel_tls: {}\n{extra}\n",
            node.node_name(),
            Control::endpoint(),
            token_file.display(),
            runtime.display(),
            pods.display(),
            bpffs.display(),
            kernel_tls(),
        );
        fs::write(&config, text)?;
        let log = self.logs().join(format!("agent-{}.log", node.node_name()));
        let process = start(node, &config, &log)?;
        Ok(Agent { node: node.clone(), process, config, socket, runtime, bpffs, log })
    }
}

impl Agent {
    /// The process, for signals and logs.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Its runtime directory.
    pub fn runtime_dir(&self) -> &Path {
        &self.runtime
    }

    /// The directory of its pod files.
    pub fn pods_dir(&self) -> PathBuf {
        self.config.with_file_name("pods")
    }

    /// A page of its HTTP server, with status line and headers.
    pub fn http(&self, path: &str) -> Result<String> {
        Ok(http::get(&self.node, HTTP_PORT, path)?)
    }

    /// Kills it as the kernel would: nothing of it runs any more.
    pub fn kill9(&mut self) -> Result<()> {
        self.process.kill9()
    }

    /// Starts it again, with nothing but what it left behind.
    pub fn start(&mut self) -> Result<()> {
        self.process = start(&self.node, &self.config, &self.log)?;
        self.wait_ready()
    }

    /// Kills it and starts it again.
    pub fn restart(&mut self) -> Result<()> {
        self.kill9()?;
        self.start()
    }

    /// Freezes it, and waits until none of its threads runs any more.
    pub fn stop(&self) -> Result<()> {
        self.process.signal(Signal::SIGSTOP)?;
        until("every thread to have stopped", || self.process.is_stopped().ok()?.then_some(()))
    }

    /// Lets it go on.
    pub fn cont(&self) -> Result<()> {
        self.process.signal(Signal::SIGCONT)
    }

    /// Asks it to end, and waits until it has.
    pub fn terminate(&mut self) -> Result<()> {
        self.process.signal(Signal::SIGTERM)?;
        self.process.wait()?;
        Ok(())
    }

    /// Removes everything that it, not running any more, has left in the kernel.
    pub fn uninstall(&self) -> Result<()> {
        let mut command = Command::new(binary("mesh-agent")?);
        command.arg("uninstall").arg("--config").arg(&self.config);
        self.node.run(|| run_program(&mut command))?;
        Ok(())
    }

    /// The directory of its pins.
    pub fn bpffs(&self) -> &Path {
        &self.bpffs
    }

    /// Enrols a pod, and waits until it has a certificate.
    pub fn enroll(&self, pod: &Pod) -> Result<()> {
        let path = pod.path();
        let path = path.to_str().context("a namespace's path is text")?;
        self.cli(&["enroll", "--uid", &pod.uid(), "--netns", path])?;
        Ok(())
    }

    /// Un-enrols a pod.
    pub fn unenroll(&self, pod: &Pod) -> Result<()> {
        self.cli(&["unenroll", "--uid", &pod.uid()])?;
        Ok(())
    }

    /// `mesh-agent status --json`, whatever the exit status.
    pub fn status(&self) -> Result<Value> {
        json_of(&mut self.command(&["status", "--json"])?)
    }

    /// Runs a command of `mesh-agent` against it, and returns what it prints.
    pub fn cli(&self, arguments: &[&str]) -> Result<String> {
        run_program(&mut self.command(arguments)?)
    }

    /// A command of `mesh-agent` against it.
    pub fn command(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = Command::new(binary("mesh-agent")?);
        command.args(arguments).arg("--socket").arg(&self.socket);
        Ok(command)
    }

    /// Waits until `/readyz` says so.
    pub fn wait_ready(&mut self) -> Result<()> {
        until("mesh-agent to be ready", || {
            if let Err(error) = self.process.check_alive() {
                return Some(Err(error));
            }
            http::is_ok(&self.node, HTTP_PORT, "/readyz").then_some(Ok(()))
        })
        .and_then(|ready| ready)
        .with_context(|| self.process.log_tail())
    }
}

fn kernel_tls() -> bool {
    env::var_os(KERNEL_TLS).is_some_and(|value| !value.is_empty())
}

fn start(node: &Node, config: &Path, log: &Path) -> Result<Process> {
    let mut command = Command::new(binary("mesh-agent")?);
    command.arg("run").arg("--config").arg(config);
    Process::spawn(node, &mut command, log)
}
