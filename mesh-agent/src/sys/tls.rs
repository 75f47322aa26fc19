//! Kernel TLS, as far as `nix` does not know it.
#![expect(unsafe_code, reason = "sendmsg and setsockopt take pointers")]

use std::{
    io,
    mem::{MaybeUninit, offset_of},
    os::fd::{AsRawFd as _, BorrowedFd},
};

use nix::libc;

use super::socket::set;

/// One control message that holds one byte, laid out as sendmsg(2) wants it.
#[repr(C)]
struct RecordType {
    header: libc::cmsghdr,
    record_type: u8,
}

/// Sends one record of a type other than application data. The socket must have its TX keys.
///
/// # Errors
///
/// What `sendmsg` answers; nothing is sent then.
pub(crate) fn send_record(socket: BorrowedFd<'_>, record_type: u8, body: &[u8]) -> io::Result<()> {
    let length = offset_of!(RecordType, record_type) + size_of::<u8>();
    let mut control = RecordType {
        header: libc::cmsghdr {
            cmsg_len: length,
            cmsg_level: libc::SOL_TLS,
            cmsg_type: libc::TLS_SET_RECORD_TYPE,
        },
        record_type,
    };
    let mut part = libc::iovec { iov_base: body.as_ptr().cast_mut().cast(), iov_len: body.len() };
    // SAFETY: all of it is integers and pointers, for which zero is a value.
    let mut message: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control).cast();
    message.msg_controllen = size_of::<RecordType>();
    // SAFETY: what the message points to outlives the call, and the kernel only reads it.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Tells the kernel that the peer does not pad its records: they can be decrypted into the reader's
/// own buffer. A record that is padded nonetheless is decrypted twice.
///
/// # Errors
///
/// What `setsockopt` answers; `ENOPROTOOPT` before 6.0.
pub(crate) fn expect_no_padding(socket: BorrowedFd<'_>) -> io::Result<()> {
    set(socket, libc::SOL_TLS, libc::TLS_RX_EXPECT_NO_PAD, 1)
}
