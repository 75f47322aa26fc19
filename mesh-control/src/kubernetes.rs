//! The control plane on Kubernetes: the API server says which pods there are, who an agent is and
//! where the CA's key is kept.
//!
//! Replicas know nothing of each other: each watches on its own, and any can sign.

pub mod attest;
pub mod cluster;
pub mod registry;
pub mod secret;
pub mod services;

#[cfg(test)]
mod scripted;
