//! The laboratory: nodes, pods and the wire between them as network namespaces of this machine,
//! with the real binaries inside.
//!
//! Every namespace carries the process id of its maker in its name, so labs run in parallel and
//! what a killed run left behind is known and swept by the next. The host's own network is never
//! touched.

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Once, PoisonError, RwLock, RwLockReadGuard};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{SigSet, Signal};
use serde_json::Value;

pub mod agent;
pub mod canary;
pub mod capture;
pub mod compare;
pub mod control;
pub mod http;
pub mod load;
pub mod mesh;
pub mod netns;
pub mod packet;
pub mod process;
pub mod raw;
pub mod stream;
pub mod tls;
pub mod topology;
pub mod traffic;

pub use agent::Agent;
pub use canary::Canary;
pub use capture::{Capture, Recording};
pub use control::Control;
pub use load::Load;
pub use mesh::{Mesh, socket_guard};
pub use netns::Netns;
pub use process::Process;
pub use topology::{Node, Pod};
pub use traffic::Server;

/// How long anything in a laboratory may take before the test fails.
///
/// It is generous because nothing waits for it to pass: it is only reached when something hangs.
pub fn patience() -> Duration {
    Duration::from_secs(span(30))
}

/// Whether the CPU is emulated, and everything takes some twenty times as long. `cargo xtask test --vm`
/// says so in the environment.
fn is_emulated() -> bool {
    env::var_os("NODEMESH_EMULATED").is_some()
}

/// How much of a volume a test moves: all of it, or a sixteenth where the CPU is emulated.
pub fn volume(of: u16) -> u16 {
    if is_emulated() { of / 16 } else { of }
}

/// How many seconds something is good for with which the agents must keep up: four times as many where
/// the CPU is emulated.
pub fn span(seconds: u64) -> u64 {
    if is_emulated() { 4 * seconds } else { seconds }
}

/// Whether the kernel is an older one: what a test expects of it, and no decision of the agent.
///
/// # Panics
///
/// If the kernel's version is none.
pub fn kernel_before(version: (u32, u32)) -> bool {
    let kernel = nix::sys::utsname::uname().expect("uname");
    let release = kernel.release().to_str().expect("a version is text");
    let mut numbers = release.split('.').map(|part| part.parse().ok());
    let (Some(Some(major)), Some(Some(minor))) = (numbers.next(), numbers.next()) else {
        panic!("Linux {release}?")
    };
    (major, minor) < version
}

const PREFIX: &str = "nm-";
const STATE_DIR: &str = "/run/nodemesh-lab";

/// A laboratory. Dropping it, also in a panic, ends its processes and removes its namespaces.
#[derive(Debug)]
pub struct Lab {
    name: String,
    state: PathBuf,
    logs: PathBuf,
    namespaces: Vec<Netns>,
    nodes: Vec<Node>,
    wire: Netns,
}

impl Lab {
    /// Makes a laboratory with nothing in it but the wire. `title`, the name of the test, names
    /// the directory `target/lab/<title>` that keeps the logs.
    pub fn new(title: &str) -> Result<Self> {
        static SWEEP: Once = Once::new();
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        if !nix::unistd::geteuid().is_root() {
            bail!("the laboratory makes network namespaces and loads eBPF: run it as root");
        }
        SWEEP.call_once(sweep);
        raise_file_limit()?;

        let making = making();
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let name = format!("{PREFIX}{}-{number}", std::process::id());
        let state = Path::new(STATE_DIR).join(&name);
        fs::create_dir_all(state.join("bpf")).context("making the laboratory's directory")?;
        mount_fs("tmpfs", &state)?;
        fs::create_dir(state.join("bpf"))?;
        mount_fs("bpf", &state.join("bpf"))?;
        drop(making);

        let logs = binary_dir()?.parent().context("no target directory")?.join("lab").join(title);
        if logs.exists() {
            fs::remove_dir_all(&logs).context("removing the logs of the last run")?;
        }
        fs::create_dir_all(&logs)?;

        let wire = Netns::create(&format!("{name}-wire"))?;
        let lab =
            Self { namespaces: vec![wire.clone()], nodes: Vec::new(), name, state, logs, wire };
        lab.wire.ip(&[
            "link add wire type bridge forward_delay 0 mcast_snooping 0",
            "link set wire up",
        ])?;
        Ok(lab)
    }

    /// The namespace of the wire: a bridge with a port per node, named after it.
    pub fn wire(&self) -> &Netns {
        &self.wire
    }

    /// Captures every frame that any node puts on the wire.
    pub fn capture(&self) -> Result<Capture> {
        Capture::start(&self.wire, None, &self.logs)
    }

    /// A directory of the laboratory, on a tmpfs, made if it is not there.
    pub fn directory(&self, name: &str) -> Result<PathBuf> {
        let path = self.state.join(name);
        fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))?;
        Ok(path)
    }

    /// Where the logs of this laboratory are, and stay.
    pub fn logs(&self) -> &Path {
        &self.logs
    }

    /// A bpffs directory for one agent.
    pub(super) fn bpffs(&self, node: &str) -> PathBuf {
        self.state.join("bpf").join(node)
    }

    /// Adds a namespace with nothing but loopback in it.
    pub fn add_namespace(&mut self, role: &str) -> Result<Netns> {
        let netns = Netns::create(&format!("{}-{role}", self.name))?;
        self.namespaces.push(netns.clone());
        Ok(netns)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        remove(&self.name);
    }
}

/// Tries until there is something, or fails after [`patience`] saying what never came.
pub fn until<T>(what: &str, mut attempt: impl FnMut() -> Option<T>) -> Result<T> {
    let deadline = Instant::now() + patience();
    loop {
        if let Some(found) = attempt() {
            return Ok(found);
        }
        if Instant::now() > deadline {
            bail!("waited {} s in vain: {what}", patience().as_secs());
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Where cargo put the real binaries: beside this one.
pub fn binary_dir() -> Result<PathBuf> {
    let executable = env::current_exe()?;
    let directory = executable.parent().context("an executable is in a directory")?;
    Ok(if directory.ends_with("deps") {
        directory.parent().context("deps is in a directory")?.to_owned()
    } else {
        directory.to_owned()
    })
}

/// The path of one of the real binaries.
fn binary(name: &str) -> Result<PathBuf> {
    let path = binary_dir()?.join(name);
    if !path.exists() {
        bail!("{} is not there: run `cargo xtask build`", path.display());
    }
    Ok(path)
}

/// Runs a program to its end; its standard output, or an error that says all.
fn run_program(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output()?;
    if !output.status.success() {
        bail!(
            "{command:?}: {}\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The JSON that a program prints, whatever its exit status.
fn json_of(command: &mut Command) -> Result<Value> {
    let output = command.stdin(Stdio::null()).output()?;
    serde_json::from_slice(&output.stdout).with_context(|| {
        format!("{command:?} prints no JSON: {}", String::from_utf8_lossy(&output.stderr))
    })
}

/// Held by whoever makes something that outlives the process.
static MAKING: RwLock<()> = RwLock::new(());

/// Leave to make something, until the process ends.
fn making() -> RwLockReadGuard<'static, ()> {
    MAKING.read().unwrap_or_else(PoisonError::into_inner)
}

/// Ctrl-C removes every laboratory of this process, and what `also` removes, then ends it. Must be
/// called before there is any thread.
pub fn clean_up_on_interrupt(also: impl FnOnce() + Send + 'static) -> Result<()> {
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM]);
    signals.thread_block().context("blocking the signals")?;
    thread::spawn(move || {
        if signals.wait().is_ok() {
            eprintln!("\ninterrupted: cleaning up");
            also();
            remove_own_and_exit(130);
        }
    });
    Ok(())
}

/// Removes every laboratory of this process, and ends it.
fn remove_own_and_exit(status: i32) -> ! {
    // Held to the end: another thread may be about to make the next namespace.
    let _nothing_more = MAKING.write().unwrap_or_else(PoisonError::into_inner);
    let own = std::process::id();
    for name in names().filter(|(pid, _)| *pid == own).map(|(_, name)| name) {
        remove(&name);
    }
    std::process::exit(status)
}

/// Removes everything of the laboratory of this name. What is already gone is no failure, and
/// what cannot be removed does not keep the rest from being.
fn remove(name: &str) {
    let prefix = format!("{name}-");
    let namespaces: Vec<PathBuf> = entries(Path::new(netns::NETNS_DIR))
        .into_iter()
        .filter(|path| file_name(path).starts_with(&prefix))
        .collect();
    let inodes: BTreeSet<u64> =
        namespaces.iter().filter_map(|path| Some(fs::metadata(path).ok()?.ino())).collect();
    netns::kill_inhabitants(&inodes);
    for path in &namespaces {
        let removal = netns::ip(None, &[format!("netns del {}", file_name(path))]);
        report(removal, path);
    }
    let state = Path::new(STATE_DIR).join(name);
    for mounted in [state.join("bpf"), state.clone()] {
        // The pins go with their file system, and the links with the pins.
        umount2(&mounted, MntFlags::MNT_DETACH).ok();
    }
    report(fs::remove_dir_all(&state).map_err(Into::into), &state);
}

fn report(outcome: Result<()>, path: &Path) {
    if let Err(error) = outcome
        && path.exists()
    {
        eprintln!("laboratory: left behind {}: {error:#}", path.display());
    }
}

/// Removes the laboratories whose process is dead. The first [`Lab::new`] of a process does it.
pub fn sweep() {
    let dead = |pid: &u32| !Path::new("/proc").join(pid.to_string()).exists();
    for name in names().filter(|(pid, _)| dead(pid)).map(|(_, name)| name) {
        remove(&name);
    }
}

/// The laboratories there are, with the process of each.
fn names() -> impl Iterator<Item = (u32, String)> {
    let names: BTreeSet<_> = entries(Path::new(netns::NETNS_DIR))
        .iter()
        .chain(&entries(Path::new(STATE_DIR)))
        .filter_map(|path| {
            let mut parts = file_name(path).strip_prefix(PREFIX)?.splitn(3, '-');
            let (pid, number) = (parts.next()?, parts.next()?);
            Some((pid.parse().ok()?, format!("{PREFIX}{pid}-{number}")))
        })
        .collect();
    names.into_iter()
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    entries.filter_map(|entry| Some(entry.ok()?.path())).collect()
}

fn file_name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

fn mount_fs(kind: &str, target: &Path) -> Result<()> {
    mount(Some(kind), target, Some(kind), MsFlags::empty(), Some("mode=0700"))
        .with_context(|| format!("mounting {kind} on {}", target.display()))
}

/// Thousands of connections are thousands of sockets.
fn raise_file_limit() -> Result<()> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("raising the limit of open files")
}
