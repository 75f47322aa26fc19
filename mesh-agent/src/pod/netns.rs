//! A pod's network namespace.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process,
    sync::OnceLock,
};

use nix::sched::{CloneFlags, setns};

use crate::sys::socket::netns_cookie_here;

/// Why a path is no pod's network namespace.
#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    /// It cannot be opened.
    #[error("cannot open the network namespace {path}: {source}", path = path.display())]
    Open {
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It is something else.
    #[error("{path} is no network namespace: {source}", path = path.display())]
    NotANamespace {
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It is the agent's own.
    #[error(
        "{path} is the agent's own network namespace: a pod on the host's network is not enrolled",
        path = path.display()
    )]
    Host {
        /// The path.
        path: PathBuf,
    },
}

/// A network namespace, held open. It lives as long as this does, whatever becomes of its path.
#[derive(Debug)]
pub struct Netns {
    file: File,
    inode: u64,
    cookie: u64,
}

impl Netns {
    /// Opens the network namespace mounted at `path`.
    ///
    /// # Errors
    ///
    /// See [`NetnsError`].
    pub fn open(path: &Path) -> Result<Self, NetnsError> {
        let opened = |source| NetnsError::Open { path: path.to_owned(), source };
        let file = File::open(path).map_err(opened)?;
        let inode = file.metadata().map_err(opened)?.ino();
        let mut netns = Self { file, inode, cookie: 0 };
        let wrong = |source| NetnsError::NotANamespace { path: path.to_owned(), source };
        let host = netns_cookie_here().map_err(wrong)?;
        netns.cookie = netns.try_run(netns_cookie_here).and_then(|cookie| cookie).map_err(wrong)?;
        if netns.cookie == host {
            return Err(NetnsError::Host { path: path.to_owned() });
        }
        Ok(netns)
    }

    /// Unique while the machine is up: what identity hangs on.
    pub const fn cookie(&self) -> u64 {
        self.cookie
    }

    /// The inode of the namespace, as `ip netns` and `lsns` show it.
    pub const fn inode(&self) -> u64 {
        self.inode
    }

    /// Runs `f` in the namespace. Sockets made there stay there.
    ///
    /// # Errors
    ///
    /// When the namespace cannot be entered, which needs `CAP_SYS_ADMIN`.
    pub fn try_run<T>(&self, f: impl FnOnce() -> T) -> io::Result<T> {
        let home = home()?;
        setns(&self.file, CloneFlags::CLONE_NEWNET)?;
        // Also when `f` panics.
        let _back = Home(home);
        Ok(f())
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The namespace of the agent itself, opened once.
fn home() -> io::Result<&'static File> {
    static HOME: OnceLock<File> = OnceLock::new();
    if let Some(home) = HOME.get() {
        return Ok(home);
    }
    let file = File::open("/proc/self/ns/net")?;
    Ok(HOME.get_or_init(|| file))
}

struct Home(&'static File);

impl Drop for Home {
    fn drop(&mut self) {
        if let Err(error) = setns(self.0, CloneFlags::CLONE_NEWNET) {
            // Whatever this thread did next would happen in a pod.
            tracing::error!(%error, "cannot return from a pod's network namespace");
            process::abort();
        }
    }
}
