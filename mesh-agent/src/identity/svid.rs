//! A pod's proof of who it is, checked and ready for use.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use mesh_common::{
    spiffe::{SpiffeId, WorkloadId},
    svid::{
        Kind, Leaf, PeerVerifier, PodRef, SvidError, TrustBundle, Usage, client_config,
        server_config,
    },
};
use rustls::{
    ClientConfig, ServerConfig,
    pki_types::{CertificateDer, UnixTime},
    sign::CertifiedKey,
};

use super::{
    registry::{Snapshot, Workload},
    schedule::Service,
};
use crate::tunnel::{ALPN, SHARED_ALPN};

/// Why a pod's new certificate is not put to use.
#[derive(Debug, thiserror::Error)]
pub(super) enum Rejection {
    /// Peers would refuse it.
    #[error("peers would refuse it: {0}")]
    Verifier(#[from] SvidError),
    /// It speaks for somebody else, or was issued for another pod.
    #[error("it is for {found}, the registry says {expected}")]
    Subject {
        /// The workload in the registry.
        expected: String,
        /// The one in the certificate.
        found: String,
    },
    /// The cryptographic library refuses it.
    #[error("it cannot be used: {0}")]
    Tls(#[from] rustls::Error),
}

/// What a pod's certificate must say, and who must vouch for it. A certificate that was made under
/// another assignment is not used any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Assignment {
    pub(super) id: WorkloadId,
    pub(super) pod: PodRef,
    pub(super) bundle: Arc<TrustBundle>,
}

/// What the registry says about a pod that is bound to a network namespace of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Registration {
    /// No snapshot yet.
    Unknown,
    /// The pod is not registered, or on another node; why, in words.
    Elsewhere(String),
    /// It is ours.
    Here(Assignment),
}

impl Registration {
    /// Looks a pod up.
    pub(super) fn of(uid: &str, node: &str, snapshot: &Snapshot) -> Self {
        let Some(bundle) = snapshot.bundle() else { return Self::Unknown };
        match snapshot.by_uid(uid).map(Arc::as_ref) {
            None => Self::Elsewhere(format!(
                "no pod with the UID {uid} is registered: `mesh-control register` it"
            )),
            Some(workload) if workload.node != node => Self::Elsewhere(format!(
                "the pod with the UID {uid} is registered on the node {}, not on this one ({node})",
                workload.node
            )),
            Some(Workload { id, name, .. }) => Self::Here(Assignment {
                id: id.clone(),
                pod: PodRef { name: name.clone(), uid: uid.to_owned() },
                bundle: Arc::clone(bundle),
            }),
        }
    }
}

impl Assignment {
    /// Judges a chain as every peer will, and checks that it says what the registry says.
    ///
    /// # Errors
    ///
    /// The first reason not to use it.
    pub(super) fn judge(
        &self,
        chain: &[CertificateDer<'_>],
        now: SystemTime,
    ) -> Result<Leaf, Rejection> {
        let verifier = PeerVerifier::new(Arc::clone(&self.bundle), Kind::Workload);
        let now = unix(now);
        verifier.verify(chain, Usage::Client, now)?;
        let leaf = verifier.verify(chain, Usage::Server, now)?;
        let found = (&leaf.id, leaf.pod.as_ref());
        let expected = (&SpiffeId::Workload(self.id.clone()), Some(&self.pod));
        if found != expected {
            return Err(Rejection::Subject { expected: words(expected), found: words(found) });
        }
        Ok(leaf)
    }
}

fn words((id, pod): (&SpiffeId, Option<&PodRef>)) -> String {
    match pod {
        Some(PodRef { name, uid }) => format!("{id}, pod {name} ({uid})"),
        None => id.to_string(),
    }
}

/// The time in the form in which certificates are judged.
pub(super) fn unix(time: SystemTime) -> UnixTime {
    UnixTime::since_unix_epoch(time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default())
}

/// A pod's certificate with its key and the roots it was checked against, ready for handshakes.
///
/// Immutable: rotation and every change of the trust bundle publish another one. Connections that
/// are kept for reuse must not outlive the `Svid` that they were made with: compare
/// [`Self::generation`].
pub struct Svid {
    /// Whom the pod speaks for.
    pub id: WorkloadId,
    /// Which pod it is.
    pub pod: PodRef,
    /// What the certificate says.
    pub leaf: Leaf,
    /// When it was issued. Not in the certificate, whose beginning is set back.
    pub issued: SystemTime,
    /// When the agent asks for the next one.
    pub next_rotation: SystemTime,
    /// For dialling other pods, ALPN [`ALPN`]. Whom one has reached is for the caller to compare
    /// with the registry.
    pub client: Arc<ClientConfig>,
    /// The same for a tunnel to be shared, ALPN [`SHARED_ALPN`] or, if the peer is older, [`ALPN`].
    pub sharing_client: Arc<ClientConfig>,
    /// For accepting other pods, either way. The client must show a certificate; whether that
    /// client may connect is for the caller to decide.
    pub server: Arc<ServerConfig>,
    /// The roots that both configurations trust.
    pub bundle: Arc<TrustBundle>,
    /// Tells this from every other `Svid` of this process.
    pub generation: u64,
    pub(super) key: Arc<CertifiedKey>,
}

impl Svid {
    /// Checks a certificate and makes it ready for use.
    ///
    /// # Errors
    ///
    /// The first reason not to use it.
    pub(super) fn new(
        assignment: &Assignment,
        key: Arc<CertifiedKey>,
        service: impl FnOnce(&Leaf) -> Service,
        now: SystemTime,
    ) -> Result<Self, Rejection> {
        static GENERATION: AtomicU64 = AtomicU64::new(1);
        let leaf = assignment.judge(&key.cert, now)?;
        let Assignment { id, pod, bundle } = assignment.clone();
        let verifier = Arc::new(PeerVerifier::new(Arc::clone(&bundle), Kind::Workload));
        let Service { issued, next_rotation } = service(&leaf);
        let mut client = client_config(Arc::clone(&verifier), Some(Arc::clone(&key)), ALPN)?;
        let mut server = server_config(verifier, Arc::clone(&key), ALPN)?;
        // For whoever encrypts after the handshake: see `tls`.
        client.enable_secret_extraction = true;
        server.enable_secret_extraction = true;
        let mut sharing_client = client.clone();
        for alpn in [&mut sharing_client.alpn_protocols, &mut server.alpn_protocols] {
            alpn.insert(0, SHARED_ALPN.to_vec());
        }
        Ok(Self {
            id,
            pod,
            issued,
            next_rotation,
            client: Arc::new(client),
            sharing_client: Arc::new(sharing_client),
            server: Arc::new(server),
            leaf,
            bundle,
            generation: GENERATION.fetch_add(1, Ordering::Relaxed),
            key,
        })
    }

    /// Judges a client's chain as a handshake would now.
    ///
    /// # Errors
    ///
    /// The first reason to refuse it.
    pub fn trusts(&self, chain: &[CertificateDer<'_>], now: SystemTime) -> Result<Leaf, SvidError> {
        let verifier = PeerVerifier::new(Arc::clone(&self.bundle), Kind::Workload);
        verifier.verify(chain, Usage::Client, unix(now))
    }

    /// Proves two pods of this node to each other, `self` being the client: what a handshake between
    /// them would.
    ///
    /// # Errors
    ///
    /// The first reason to refuse either.
    pub fn vouch(&self, server: &Self, now: SystemTime) -> Result<(), SvidError> {
        let first = self.leaf.not_after.min(server.leaf.not_after);
        if now >= first {
            return Err(SvidError::Expired(first));
        }
        // Each was judged by its own bundle when it was made ready for use.
        if !Arc::ptr_eq(&self.bundle, &server.bundle) {
            server.trusts(&self.key.cert, now)?;
            let verifier = PeerVerifier::new(Arc::clone(&self.bundle), Kind::Workload);
            verifier.verify(&server.key.cert, Usage::Server, unix(now))?;
        }
        Ok(())
    }

    /// How long it is still valid. Zero once it has expired.
    pub fn remaining(&self, now: SystemTime) -> Duration {
        self.leaf.not_after.duration_since(now).unwrap_or_default()
    }
}

impl fmt::Debug for Svid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Svid")
            .field("leaf", &self.leaf)
            .field("next_rotation", &self.next_rotation)
            .field("generation", &self.generation)
            .finish_non_exhaustive()
    }
}
