//! Socket options that neither `nix` nor `socket2` knows.
#![expect(unsafe_code, reason = "getsockopt takes a pointer")]

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use nix::libc;

/// `SO_NETNS_COOKIE`, since 5.14.
const SO_NETNS_COOKIE: libc::c_int = 71;

/// The cookie of the network namespace that a socket was made in: unique while the machine is up.
///
/// # Errors
///
/// What `getsockopt` answers; `ENOPROTOOPT` before 5.14.
pub(crate) fn netns_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    let mut cookie = 0u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the value has the length named, and both outlive the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}
