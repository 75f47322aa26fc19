//! Network namespaces: making them, working inside them, ending what lives in them.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};
use nix::unistd::Pid;

use super::{making, run_program};

/// Where `ip netns` keeps its namespaces.
pub(super) const NETNS_DIR: &str = "/run/netns";

/// A named network namespace. A clone refers to the same one.
#[derive(Clone, Debug)]
pub struct Netns {
    name: String,
    file: Arc<File>,
}

impl Netns {
    /// Makes a namespace of this name, with loopback up, IPv6 addresses usable at once and strict
    /// reverse path filtering.
    pub(super) fn create(name: &str) -> Result<Self> {
        let _making = making();
        ip(None, &[format!("netns add {name}")])?;
        let file = File::open(Path::new(NETNS_DIR).join(name))
            .with_context(|| format!("opening the namespace {name}"))?;
        let netns = Self { name: name.to_owned(), file: Arc::new(file) };
        for scope in ["all", "default"] {
            netns.sysctl(&format!("net/ipv4/conf/{scope}/rp_filter"), "1")?;
            netns.sysctl(&format!("net/ipv6/conf/{scope}/accept_dad"), "0")?;
        }
        netns.ip(&["link set lo up"])?;
        Ok(netns)
    }

    /// A namespace that somebody else made, and that has no name here.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
        ensure!(
            fstatfs(&file)?.filesystem_type() == NSFS_MAGIC,
            "{} is no namespace",
            path.display()
        );
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Self { name, file: Arc::new(file) })
    }

    /// The name under `/run/netns`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The path that others open to enter it.
    pub fn path(&self) -> PathBuf {
        Path::new(NETNS_DIR).join(&self.name)
    }

    /// The inode that names the namespace in `/proc/*/ns/net`.
    pub(super) fn inode(&self) -> Result<u64> {
        Ok(self.file.metadata()?.ino())
    }

    /// Runs `work` on a thread inside the namespace. Sockets and processes made there stay in it.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                self.enter();
                work()
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Starts a thread of its own inside the namespace.
    pub fn spawn<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> JoinHandle<T> {
        let netns = self.clone();
        thread::spawn(move || {
            netns.enter();
            work()
        })
    }

    fn enter(&self) {
        setns(&*self.file, CloneFlags::CLONE_NEWNET)
            .unwrap_or_else(|error| panic!("cannot enter the namespace {}: {error}", self.name));
    }

    /// Runs a program to its end inside the namespace; its standard output, or an error that says
    /// all.
    pub fn output(&self, program: &str, arguments: &[&str]) -> Result<String> {
        self.run(|| run_program(Command::new(program).args(arguments)))
            .with_context(|| format!("in {} (scripts/setup.sh installs the tools)", self.name))
    }

    /// Runs `ip` commands (without the `ip`) inside the namespace, in one process.
    pub fn ip<S: AsRef<str>>(&self, commands: &[S]) -> Result<()> {
        ip(Some(&self.name), commands)
    }

    /// Writes a sysctl of the namespace; the name is a path under `/proc/sys`.
    pub fn sysctl(&self, name: &str, value: &str) -> Result<()> {
        // /proc/sys/net shows the namespace of the task that opens it.
        self.run(|| fs::write(Path::new("/proc/sys").join(name), value))
            .with_context(|| format!("sysctl {name} in {}", self.name))
    }

    /// Reads a sysctl of the namespace.
    pub fn sysctl_value(&self, name: &str) -> Result<String> {
        self.run(|| fs::read_to_string(Path::new("/proc/sys").join(name)))
            .with_context(|| format!("sysctl {name} in {}", self.name))
    }

    /// The interface index of a device.
    pub fn ifindex(&self, device: &str) -> Result<u32> {
        self.run(|| nix::net::if_::if_nametoindex(device))
            .with_context(|| format!("no device {device} in {}", self.name))
    }
}

/// Runs `ip` commands in one process, in a named namespace or in the caller's.
pub(super) fn ip<S: AsRef<str>>(netns: Option<&str>, commands: &[S]) -> Result<()> {
    let mut command = Command::new("ip");
    if let Some(name) = netns {
        command.args(["-n", name]);
    }
    let mut child = command
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("running ip (Debian: iproute2)")?;
    let script = commands.iter().map(AsRef::as_ref).collect::<Vec<_>>().join("\n") + "\n";
    let mut stdin = child.stdin.take().context("ip has no standard input")?;
    stdin.write_all(script.as_bytes())?;
    drop(stdin);
    let output = child.wait_with_output()?;
    if !output.status.success() {
        let netns = netns.unwrap_or("the host");
        bail!("ip in {netns}: {}\n{script}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// Kills every process that lives in one of these namespaces, and waits until all are gone.
///
/// The namespaces are ours, so whatever is in them is too.
pub(super) fn kill_inhabitants(inodes: &BTreeSet<u64>) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while std::time::Instant::now() < deadline {
        let inhabitants = inhabitants(inodes);
        if inhabitants.is_empty() {
            return;
        }
        for pid in inhabitants {
            // It may have ended since.
            kill(pid, Signal::SIGKILL).ok();
        }
        thread::sleep(std::time::Duration::from_millis(2));
    }
}

fn inhabitants(inodes: &BTreeSet<u64>) -> Vec<Pid> {
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    processes
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|pid: &i32| {
            // A process that is ending has no namespace any more.
            fs::metadata(format!("/proc/{pid}/ns/net"))
                .is_ok_and(|namespace| inodes.contains(&namespace.ino()))
        })
        .map(Pid::from_raw)
        .collect()
}
