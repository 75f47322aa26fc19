//! The node agent of nodemesh, as a library: `main.rs` is a thin shell around it.

pub mod admin;
pub mod agent;
pub mod balance;
pub mod bpf;
pub mod check;
pub mod cli;
pub mod cni;
pub mod config;
pub mod identity;
pub mod kubernetes;
pub mod logging;
pub mod node;
pub mod observer;
pub mod pod;
pub mod policy;
pub mod proxy;
pub mod stats;
mod sys;
pub mod tls;
pub mod tunnel;
