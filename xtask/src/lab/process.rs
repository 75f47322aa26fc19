//! The real binaries as children, with their logs in files.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Netns, making, until};

/// A child process inside a namespace. Dropping it kills it.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts a program inside a namespace; both its outputs are appended to `log`.
    pub fn spawn(netns: &Netns, command: &mut Command, log: &Path) -> Result<Self> {
        let output = File::options()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("opening {}", log.display()))?;
        let _making = making();
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let child = netns
            .run(|| command.spawn())
            .with_context(|| format!("starting {}", command.get_program().display()))?;
        Ok(Self { child, log: log.to_owned() })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Everything it has logged, by all its incarnations.
    pub fn log(&self) -> Result<String> {
        fs::read_to_string(&self.log).context("reading the log")
    }

    /// The last lines of the log, for error messages.
    pub fn log_tail(&self) -> String {
        let log = self.log().unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.pid()).context("process ids are small")?;
        kill(Pid::from_raw(pid), signal).with_context(|| format!("sending {signal} to {pid}"))
    }

    /// Whether all its threads are stopped, proc_pid_stat(5).
    pub fn is_stopped(&self) -> Result<bool> {
        for thread in fs::read_dir(format!("/proc/{}/task", self.pid()))? {
            let stat = fs::read_to_string(thread?.path().join("stat"))?;
            let (_, after_name) = stat.rsplit_once(") ").context("a thread has a name")?;
            if !after_name.starts_with('T') {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Kills it and waits until it is gone.
    pub fn kill9(&mut self) -> Result<()> {
        self.signal(Signal::SIGKILL)?;
        self.child.wait().context("waiting for the killed process")?;
        Ok(())
    }

    /// Waits until it has ended by itself.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        until("the process to end", || self.child.try_wait().transpose())?
            .context("waiting for the process")
    }

    /// Fails, with its last words, if it has ended.
    pub fn check_alive(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("the process ended with {status}:\n{}", self.log_tail());
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Fails only if it has ended before.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
