//! What aya does not offer of bpf(2).
#![expect(unsafe_code, reason = "bpf takes a pointer to its arguments")]

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use nix::libc;

const BPF_OBJ_GET: libc::c_int = 7;

/// Since 5.9.
const BPF_LINK_DETACH: libc::c_int = 34;

#[repr(C)]
struct ObjGet {
    path: u64,
    fd: u32,
    flags: u32,
}

/// Detaches the link that is pinned at a path. When this returns, its program runs no more.
///
/// The kernel does so by itself after the last pin and descriptor are gone, but since 6.5 at some
/// later time.
///
/// # Errors
///
/// What `bpf` answers; `EINVAL` if it is no link.
pub(crate) fn detach_pinned_link(path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let link = bpf(BPF_OBJ_GET, &ObjGet { path: path.as_ptr() as u64, fd: 0, flags: 0 })?;
    // SAFETY: it was opened just now, and nobody else knows of it.
    let link = unsafe { OwnedFd::from_raw_fd(link) };
    bpf(BPF_LINK_DETACH, &link.as_raw_fd()).map(drop)
}

fn bpf<T>(command: libc::c_int, arguments: &T) -> io::Result<RawFd> {
    // SAFETY: the arguments, and what they point to, outlive the call, and their size is given. The
    // kernel takes what is missing at their end as zero.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(arguments), size_of::<T>())
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as RawFd) }
}
