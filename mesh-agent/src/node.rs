//! What the node offers: limits, mounts, kernel features.

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// The first cgroup2 hierarchy in the mount table: `/sys/fs/cgroup`, or beside the first version's
/// controllers where both are in use.
///
/// # Errors
///
/// When the mount table cannot be read or has none.
pub fn cgroup2_root() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("reading the mount table")?;
    mounts
        .lines()
        .find_map(|line| {
            let mut fields = line.split(' ');
            let (_device, path, kind) = (fields.next()?, fields.next()?, fields.next()?);
            (kind == "cgroup2").then(|| PathBuf::from(path))
        })
        .context("no cgroup2 hierarchy is mounted: mount one, or set `cgroup` to its directory")
}

/// Raises the limit of open files to what the kernel allows: a connection takes two.
///
/// # Errors
///
/// When the kernel refuses.
pub fn raise_file_limit() -> Result<u64> {
    let (_soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("reading the file limit")?;
    let wanted = hard.max(file_limit_ceiling());
    if setrlimit(Resource::RLIMIT_NOFILE, wanted, wanted).is_ok() {
        return Ok(wanted);
    }
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("raising the file limit")?;
    Ok(hard)
}

/// The most that any process may ask for, from `/proc/sys/fs/nr_open`.
fn file_limit_ceiling() -> u64 {
    let ceiling = fs::read_to_string("/proc/sys/fs/nr_open").ok();
    ceiling.and_then(|text| text.trim().parse().ok()).unwrap_or(1 << 20)
}
