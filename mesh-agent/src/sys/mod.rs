//! System calls that no library offers safely: the only module with `unsafe` beside `bpf`.

pub(crate) mod async_fd;
pub(crate) mod bpf;
pub(crate) mod socket;
pub(crate) mod tls;
