//! What the operator sees of the agent, and how it is told about pods.
//!
//! Two listeners. A unix socket, for root only, answers `mesh-agent status`, `enroll` and
//! `unenroll`. A TCP socket, on loopback unless configured otherwise, answers `/metrics`,
//! `/healthz` and `/readyz` to anybody who reaches it, and changes nothing.
//!
//! `docs/operations.md` specifies the JSON, the metrics and the exit statuses.

mod client;
mod collect;
mod health;
mod metrics;
mod print;
mod server;
pub mod status;

pub use client::{Client, ClientError};
pub use collect::{Admin, Inspect, PodFacts};
pub use print::{Style, print_certs, print_connections, print_pods, print_status, printable};
pub use server::{BindError, Server};

#[cfg(test)]
mod tests;
