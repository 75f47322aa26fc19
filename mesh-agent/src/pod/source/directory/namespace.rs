//! Which network namespace is mounted at a path, and when that may have changed.

use std::{
    fs, io,
    os::{fd::OwnedFd, unix::fs::MetadataExt as _},
    path::Path,
};

use nix::sys::statfs::{NSFS_MAGIC, statfs};
use tokio::io::{Interest, unix::AsyncFd};

use crate::sys::async_fd;

/// A namespace, for as long as someone holds it: device and inode number on nsfs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NamespaceId(u64, u64);

#[cfg(test)]
impl NamespaceId {
    pub(super) const fn for_test(inode: u64) -> Self {
        Self(0, inode)
    }
}

/// The namespace that is mounted at `path`.
///
/// # Errors
///
/// In the operator's words.
pub(super) fn mounted_at(path: &Path) -> Result<NamespaceId, String> {
    let found = fs::symlink_metadata(path)
        .map_err(|error| format!("no network namespace at {}: {error}", path.display()))?;
    let is_mount = found.is_file()
        && statfs(path).is_ok_and(|file_system| file_system.filesystem_type() == NSFS_MAGIC);
    if is_mount {
        Ok(NamespaceId(found.dev(), found.ino()))
    } else {
        // The links in /proc vanish with their process, which nothing tells us.
        Err(format!(
            "{} is not a mounted network namespace: mount it first, for example with \
             `ip netns attach NAME PID`",
            path.display()
        ))
    }
}

/// Tells of changes to the mount table of the agent's mount namespace: see proc_pid_mountinfo(5).
#[derive(Debug)]
pub(super) struct MountTable(AsyncFd<OwnedFd>);

impl MountTable {
    /// Starts watching.
    pub(super) fn watch() -> io::Result<Self> {
        let table = fs::File::open("/proc/self/mountinfo")?;
        Ok(Self(async_fd::register(table.into(), Interest::PRIORITY)?))
    }

    /// Returns when something was mounted or unmounted since the call before. Cancel safe.
    pub(super) async fn changed(&self) -> io::Result<()> {
        self.0.ready(Interest::PRIORITY).await?.clear_ready();
        Ok(())
    }
}
