//! The control plane's gRPC API, generated from `proto/nodemesh.proto`.
#![allow(
    missing_docs,
    unreachable_pub,
    clippy::allow_attributes_without_reason,
    clippy::wildcard_enum_match_arm,
    clippy::clone_on_ref_ptr,
    clippy::let_underscore_must_use,
    unused_qualifications,
    clippy::allow_attributes,
    reason = "generated code: the schema carries the documentation"
)]

tonic::include_proto!("nodemesh.v1");

/// The protocol that TLS negotiates for this API.
pub const ALPN: &[u8] = b"h2";

/// The longest message that an agent must be able to take: a snapshot with 4096 workloads on each
/// of a hundred nodes stays below it. In bytes.
pub const MAX_SNAPSHOT_BYTES: usize = 64 << 20;
