//! Waiting for a file descriptor.
#![expect(unsafe_code, reason = "tokio cannot know that a descriptor stays what it is")]

use std::{io, os::fd::OwnedFd};

use tokio::io::{Interest, unix::AsyncFd};

/// Registers a descriptor with the runtime.
///
/// # Errors
///
/// When epoll refuses it.
pub(crate) fn register(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open and the same for as long as it lives, and lives in the result.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}
