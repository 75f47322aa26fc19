//! Socket options that neither `nix` nor `socket2` knows.
#![expect(unsafe_code, reason = "getsockopt and setsockopt take a pointer")]

use std::{
    io,
    ops::RangeInclusive,
    os::fd::{AsFd as _, AsRawFd, BorrowedFd},
    time::Duration,
};

use nix::libc;
use socket2::{Domain, Socket, Type};

/// `SO_NETNS_COOKIE`, since 5.14.
const SO_NETNS_COOKIE: libc::c_int = 71;

/// `IP_LOCAL_PORT_RANGE`, since 6.3.
const IP_LOCAL_PORT_RANGE: libc::c_int = 51;

/// `TCP_RTO_MAX_MS`, since 6.15.
const TCP_RTO_MAX_MS: libc::c_int = 44;

/// The cookie of the calling thread's network namespace: unique while the machine is up.
///
/// # Errors
///
/// What `socket` and `getsockopt` answer; `ENOPROTOOPT` before 5.14.
pub(crate) fn netns_cookie_here() -> io::Result<u64> {
    netns_cookie(Socket::new(Domain::IPV4, Type::DGRAM, None)?.as_fd())
}

fn netns_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
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

/// Limits the ports that the kernel may choose for a socket, IPv4 or IPv6. Of a bound outside of
/// `net.ipv4.ip_local_port_range` the kernel takes no notice.
///
/// # Errors
///
/// What `setsockopt` answers; `ENOPROTOOPT` before 6.3.
pub(crate) fn limit_ports(socket: BorrowedFd<'_>, ports: &RangeInclusive<u16>) -> io::Result<()> {
    let value = u32::from(*ports.end()) << 16 | u32::from(*ports.start());
    set(socket, libc::IPPROTO_IP, IP_LOCAL_PORT_RANGE, value)
}

/// Limits the time between two retransmissions, to between 1 s and 120 s: the kernel gives up
/// after `net.ipv4.tcp_retries2` of them.
///
/// # Errors
///
/// What `setsockopt` answers; `ENOPROTOOPT` before 6.15.
pub(crate) fn limit_backoff(socket: BorrowedFd<'_>, longest: Duration) -> io::Result<()> {
    let milliseconds = u32::try_from(longest.as_millis()).unwrap_or(u32::MAX);
    set(socket, libc::IPPROTO_TCP, TCP_RTO_MAX_MS, milliseconds.clamp(1_000, 120_000))
}

pub(super) fn set(socket: BorrowedFd<'_>, level: i32, option: i32, value: u32) -> io::Result<()> {
    // SAFETY: the value outlives the call, and its size is given.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
