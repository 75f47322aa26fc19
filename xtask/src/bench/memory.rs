//! What proxies hold in memory.

use std::fs;
use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use xtask::lab::until;

use super::load::{churn, server};
use super::subjects::Subject;

/// How many connections are held, if files enough may be open.
const HELD: u64 = 10_000;
/// A proxy has two for each connection, and some of its own.
const FILES: u64 = 2 * HELD + OWN_FILES;
const OWN_FILES: u64 = 1_000;
/// What a proxy may keep open for later connections.
const KEPT_FILES: usize = 500;
/// Memory that was not given back for so long is not given back.
const SETTLED: Duration = Duration::from_secs(5);
const LONGEST: Duration = Duration::from_secs(60);

/// What connections cost the proxy that they cost most, in bytes.
pub(crate) struct Held {
    pub(crate) connections: u64,
    /// Before there was any.
    pub(crate) idle: u64,
    pub(crate) per_connection: u64,
    /// What is left when all are closed.
    pub(crate) left: u64,
}

/// Lets this process, and those that it starts, open enough files if that is allowed.
pub(crate) fn raise_file_limit() -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if hard < FILES && setrlimit(Resource::RLIMIT_NOFILE, FILES, FILES).is_err() {
        eprintln!("bench: only {hard} files may be open: `held` are less than {HELD} connections");
    }
    Ok(())
}

/// Holds connections that were used once.
pub(crate) fn hold(subject: &Subject) -> Result<Held> {
    ensure!(!subject.proxies.is_empty(), "it names no process whose memory could be looked at");
    let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let count = HELD.min(limit.saturating_sub(OWN_FILES) / 2);
    let (before, files) = (resident(&subject.proxies)?, open_files(&subject.proxies)?);
    let to = SocketAddr::new(subject.far.dialled, server::PORT);
    let connections = churn::hold(&subject.client, to, count)?;
    let (with, held) = (resident(&subject.proxies)?, connections.len() as u64);
    drop(connections);
    until("the proxies to have closed the connections", || {
        open_files(&subject.proxies).ok().filter(|now| *now <= files + KEPT_FILES)
    })?;
    let after = settled(&subject.proxies)?;
    let most = |now: &[u64]| {
        now.iter().zip(&before).map(|(now, before)| now.saturating_sub(*before)).max().unwrap_or(0)
    };
    Ok(Held {
        idle: before.iter().copied().max().unwrap_or(0),
        per_connection: most(&with) / held,
        connections: held,
        left: most(&after),
    })
}

/// The least of each once it does not fall any more.
fn settled(pids: &[u32]) -> Result<Vec<u64>> {
    let (begin, mut since) = (Instant::now(), Instant::now());
    let mut least = resident(pids)?;
    while since.elapsed() < SETTLED && begin.elapsed() < LONGEST {
        thread::sleep(Duration::from_millis(250));
        for (least, now) in least.iter_mut().zip(resident(pids)?) {
            if now < *least {
                (*least, since) = (now, Instant::now());
            }
        }
    }
    Ok(least)
}

/// How many files all of them have open.
fn open_files(pids: &[u32]) -> Result<usize> {
    let of = |pid: &u32| Ok(fs::read_dir(format!("/proc/{pid}/fd"))?.count());
    pids.iter().map(of).sum()
}

/// Bytes in memory of each process.
pub(crate) fn resident(pids: &[u32]) -> Result<Vec<u64>> {
    let of = |pid: &u32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))
            .with_context(|| format!("looking at process {pid}"))?;
        parse(&status).with_context(|| format!("process {pid} has no memory"))
    };
    pids.iter().map(of).collect()
}

/// proc_pid_status(5), `VmRSS` in KiB.
fn parse(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resident_memory_is_read() {
        assert_eq!(parse("VmSize:\t  20 kB\nVmRSS:\t     12 kB\n"), Some(12 * 1024));
        assert_eq!(parse("Name:\tkthreadd\n"), None);
        assert!(resident(&[std::process::id()]).unwrap()[0] > 0);
    }
}
