//! The node agent of nodemesh, as a library: `main.rs` is a thin shell around it.

pub mod config;
pub mod identity;
pub mod pod;
pub mod policy;
mod sys;
pub mod tunnel;
