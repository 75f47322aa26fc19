//! The node agent of nodemesh, as a library: `main.rs` is a thin shell around it.

pub mod bpf;
pub mod config;
pub mod identity;
pub mod node;
pub mod pod;
pub mod policy;
pub mod stats;
mod sys;
pub mod tunnel;
