//! Waiting for a file descriptor.
#![expect(unsafe_code, reason = "tokio cannot know that a descriptor stays what it is")]

use std::{io, os::fd::AsRawFd};

use tokio::io::{Interest, unix::AsyncFd};

/// Registers the owner of a descriptor with the runtime, to wait for `interest`.
///
/// # Errors
///
/// When epoll refuses it.
pub(crate) fn register<T: AsRawFd>(owner: T, interest: Interest) -> io::Result<AsyncFd<T>> {
    // SAFETY: every caller hands over an owner that keeps one descriptor open for as long as it
    // lives (an `OwnedFd`, a ring buffer), and it lives in the result.
    Ok(unsafe { AsyncFd::register_with_interest(owner, interest) }?)
}
