//! What more than one part of nodemesh must agree on.
//!
//! * [`abi`]: the types that the eBPF programs and the agent share through maps. `no_std`.
//! * `api`, `spiffe`, `svid`, `join`, `log`, `ending`, `membership`, `report` (feature `user`): the
//!   control plane's gRPC API, the names of workloads, the certificates that prove them, the tokens
//!   that nodes join with, what is to be logged, when a program is told to end, which pods of a
//!   Kubernetes cluster are in the mesh, and what their owners are told.
#![cfg_attr(not(feature = "user"), no_std)]

pub mod abi;
#[cfg(feature = "user")]
pub mod api;
#[cfg(feature = "user")]
pub mod ending;
#[cfg(feature = "user")]
mod hex;
#[cfg(feature = "user")]
pub mod join;
#[cfg(feature = "user")]
pub mod log;
#[cfg(feature = "user")]
pub mod membership;
#[cfg(feature = "user")]
pub mod report;
#[cfg(feature = "user")]
pub mod spiffe;
#[cfg(feature = "user")]
pub mod svid;
