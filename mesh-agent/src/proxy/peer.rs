//! Who is at the other end of a TLS connection between agents.

use std::io;

use mesh_common::{
    spiffe::SpiffeId,
    svid::{Leaf, SvidError},
};

use crate::{
    identity::{Chain, Workload},
    stats::HandshakeFailure,
    tls::{Stream, peer_certificates},
};

/// A handshake that did not lead to a tunnel: the kind, and what an operator should read.
#[derive(Debug, thiserror::Error)]
#[error("{kind}: {detail}")]
pub(super) struct Failed {
    pub(super) kind: HandshakeFailure,
    pub(super) detail: String,
}

impl Failed {
    pub(super) fn new(kind: HandshakeFailure, detail: impl Into<String>) -> Self {
        Self { kind, detail: detail.into() }
    }

    pub(super) fn tls(error: &io::Error) -> Self {
        Self::new(HandshakeFailure::of(error), Chain(error).to_string())
    }
}

/// The peer's certificate, which the handshake has verified up to the trust bundle.
///
/// # Errors
///
/// When the peer shows no certificate of the mesh.
pub(super) fn leaf(stream: &Stream) -> Result<Leaf, Failed> {
    let certificate = peer_certificates(stream)
        .first()
        .ok_or_else(|| Failed::new(HandshakeFailure::Certificate, "it showed no certificate"))?;
    Leaf::parse(certificate)
        .map_err(|error: SvidError| Failed::new(HandshakeFailure::Certificate, error.to_string()))
}

/// Checks that a server is the pod that the registry names for the address that was dialled.
///
/// # Errors
///
/// When it is another.
pub(super) fn check(leaf: &Leaf, expected: &Workload) -> Result<(), Failed> {
    let is_expected = leaf.id == SpiffeId::Workload(expected.id.clone())
        && leaf.pod.as_ref().is_some_and(|pod| pod.uid == expected.uid);
    if is_expected {
        return Ok(());
    }
    let found = leaf.pod.as_ref().map_or("none", |pod| pod.uid.as_str());
    let detail = format!(
        "the registry names {} (pod {}) for this address, but {} (pod {found}) answered",
        expected.id, expected.uid, leaf.id
    );
    Err(Failed::new(HandshakeFailure::Identity, detail))
}
