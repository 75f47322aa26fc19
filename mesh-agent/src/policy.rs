//! Who may talk to whom: the one place where that is decided.
//!
//! Pure functions from what is known about a connection to a verdict with a reason. Unknown means
//! deny. What the registry calls meshed is never spoken to in plaintext.

mod settings;

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
};

use mesh_common::{
    spiffe::{SpiffeId, WorkloadId},
    svid::{Leaf, PodRef},
};

pub use self::settings::{AddressRanges, Egress, PlaintextIngress, Ports};
use crate::identity::{Snapshot, Workload};

/// The operator's part of the decision.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// The cluster's pod and service addresses.
    pub cluster: AddressRanges,
    /// Plaintext to destinations outside `cluster`.
    pub egress: Egress,
    /// Plaintext into enrolled pods.
    pub plaintext_ingress: Vec<PlaintextIngress>,
}

/// What to do with a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It goes through the mesh; this is the pod at the other end.
    Mesh(Arc<Workload>),
    /// It passes as it is, unencrypted.
    Plaintext(PlaintextReason),
    /// It is reset.
    Deny(DenyReason),
}

/// Why a connection may go unencrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlaintextReason {
    /// The destination is outside the cluster's ranges.
    OutsideCluster,
    /// The source is listed in `ingress.plaintext`.
    ListedSource,
}

/// Why a connection is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DenyReason {
    /// The operator allows no plaintext out of the mesh.
    EgressDenied,
    /// The certificate's identity or pod is not what the registry says.
    IdentityMismatch,
    /// The destination is a service of which no endpoint is ready.
    NoEndpoints,
    /// The destination is loopback, multicast, unspecified, or the pod itself.
    NoRemoteAddress,
    /// The destination is the address of a service, which is not at that port.
    NoServicePort,
    /// Plaintext from outside, which is not listed in `ingress.plaintext`.
    PlaintextRefused,
    /// The registry is not known yet: the control plane was never reached.
    RegistryUnknown,
    /// The source address belongs to another pod, or to none.
    SourceAddress,
    /// The pod has as many connections as `limits.connections_per_pod` allows.
    TooManyConnections,
    /// The pod at the other end is not registered (any more).
    UnregisteredPeer,
    /// The pod itself is not registered (any more).
    UnregisteredPod,
    /// The destination is inside the cluster's ranges and not registered.
    UnknownInCluster,
}

impl DenyReason {
    /// Every reason, in the order of [`Self::index`].
    pub const ALL: [Self; 12] = [
        Self::EgressDenied,
        Self::IdentityMismatch,
        Self::NoEndpoints,
        Self::NoRemoteAddress,
        Self::NoServicePort,
        Self::PlaintextRefused,
        Self::RegistryUnknown,
        Self::SourceAddress,
        Self::TooManyConnections,
        Self::UnregisteredPeer,
        Self::UnregisteredPod,
        Self::UnknownInCluster,
    ];

    /// The place in [`Self::ALL`].
    pub const fn index(self) -> usize {
        self as usize
    }

    /// The name in metrics and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::EgressDenied => "egress-denied",
            Self::IdentityMismatch => "identity-mismatch",
            Self::NoEndpoints => "no-endpoints",
            Self::NoRemoteAddress => "no-remote-address",
            Self::NoServicePort => "no-service-port",
            Self::PlaintextRefused => "plaintext-refused",
            Self::RegistryUnknown => "registry-unknown",
            Self::SourceAddress => "source-address",
            Self::TooManyConnections => "too-many-connections",
            Self::UnregisteredPeer => "unregistered-peer",
            Self::UnregisteredPod => "unregistered-pod",
            Self::UnknownInCluster => "unknown-in-cluster",
        }
    }
}

impl fmt::Display for DenyReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::EgressDenied => "the configuration denies plaintext out of the mesh (egress)",
            Self::IdentityMismatch => "the certificate names another pod than the registry",
            Self::NoEndpoints => "no endpoint of the service is ready",
            Self::NoServicePort => "the service is not at this port",
            Self::NoRemoteAddress => "the destination is not the address of another machine or pod",
            Self::PlaintextRefused => {
                "plaintext from a source that ingress.plaintext does not list"
            }
            Self::RegistryUnknown => "the control plane was not reached yet",
            Self::SourceAddress => "the source address is not one of the client pod's",
            Self::TooManyConnections => "the pod has limits.connections_per_pod connections",
            Self::UnregisteredPeer => "the client pod is not registered",
            Self::UnregisteredPod => "this pod is not registered on this node",
            Self::UnknownInCluster => {
                "the destination is inside cluster_ranges and not registered: \
                 `mesh-control register` it"
            }
        })
    }
}

impl fmt::Display for PlaintextReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OutsideCluster => "the destination is outside cluster_ranges",
            Self::ListedSource => "the source is listed in ingress.plaintext",
        })
    }
}

impl Policy {
    /// Decides about a connection that an application in the pod `uid` opens from the address
    /// `source`.
    pub fn egress(
        &self,
        uid: &str,
        source: IpAddr,
        destination: SocketAddr,
        registry: &Snapshot,
    ) -> Verdict {
        use DenyReason as Deny;
        let (source, destination) = (source.to_canonical(), destination.ip().to_canonical());
        let allowed = || {
            check_client(uid, source, registry)?;
            if !is_remote(destination) {
                return Err(Deny::NoRemoteAddress);
            }
            match (registry.by_address(destination), self.egress) {
                (Some(peer), _) if peer.uid == uid => Err(Deny::NoRemoteAddress),
                (Some(peer), _) => Ok(Verdict::Mesh(Arc::clone(peer))),
                (None, _) if self.cluster.contains(destination) => Err(Deny::UnknownInCluster),
                (None, Egress::Deny) => Err(Deny::EgressDenied),
                (None, Egress::Allow) => Ok(Verdict::Plaintext(PlaintextReason::OutsideCluster)),
            }
        };
        allowed().unwrap_or_else(Verdict::Deny)
    }

    /// Decides about a connection that reached `port` of the pod `uid` without TLS of the mesh.
    pub fn ingress_plaintext(
        &self,
        source: IpAddr,
        uid: &str,
        port: u16,
        registry: &Snapshot,
    ) -> Verdict {
        let listed = self
            .plaintext_ingress
            .iter()
            .any(|rule| rule.ranges.contains(source) && rule.ports.contains(port));
        let allowed = || {
            check_registered(uid, registry)?;
            // A pod of the mesh proves who it is, whatever address it has.
            if listed && registry.by_address(source).is_none() {
                Ok(Verdict::Plaintext(PlaintextReason::ListedSource))
            } else {
                Err(DenyReason::PlaintextRefused)
            }
        };
        allowed().unwrap_or_else(Verdict::Deny)
    }

    /// Decides about a connection to `port` of the pod `uid`, from a tunnel whose TCP connection
    /// comes from `source` and whose client showed the certificate `client`.
    ///
    /// Every registered pod may connect to every port: authorization policies are to come, here.
    pub fn ingress_mesh(
        &self,
        client: &Leaf,
        source: IpAddr,
        uid: &str,
        _port: u16,
        registry: &Snapshot,
    ) -> Verdict {
        let allowed = || {
            check_registered(uid, registry)?;
            let (SpiffeId::Workload(id), Some(pod)) = (&client.id, &client.pod) else {
                return Err(DenyReason::IdentityMismatch);
            };
            check_peer(pod, id, source, registry).map(|peer| Verdict::Mesh(Arc::clone(peer)))
        };
        allowed().unwrap_or_else(Verdict::Deny)
    }

    /// Decides whether a connection of the pod `uid` that was let through earlier may go on.
    ///
    /// # Errors
    ///
    /// Why not.
    pub fn revise(
        &self,
        uid: &str,
        open: &Open<'_>,
        registry: &Snapshot,
    ) -> Result<(), Revocation> {
        let verdict = match *open {
            Open::Outbound { source, destination, peer } => {
                match (self.egress(uid, source, destination, registry), peer) {
                    (Verdict::Plaintext(_), None) => return Ok(()),
                    (Verdict::Mesh(now), Some(then)) if is_same(&now, then) => return Ok(()),
                    (verdict, _) => verdict,
                }
            }
            Open::Inbound { source, port, peer: None } => {
                match self.ingress_plaintext(source, uid, port, registry) {
                    Verdict::Plaintext(_) => return Ok(()),
                    verdict @ (Verdict::Mesh(_) | Verdict::Deny(_)) => verdict,
                }
            }
            Open::Inbound { source, peer: Some(then), .. } => {
                let pod = PodRef { name: then.name.clone(), uid: then.uid.clone() };
                let allowed = check_registered(uid, registry)
                    .and_then(|()| check_peer(&pod, &then.id, source, registry));
                match allowed {
                    Ok(_) => return Ok(()),
                    Err(reason) => Verdict::Deny(reason),
                }
            }
        };
        Err(match verdict {
            Verdict::Deny(reason) => Revocation::Denied(reason),
            Verdict::Mesh(_) => Revocation::OtherPeer,
            Verdict::Plaintext(_) => Revocation::PeerLeft,
        })
    }
}

/// A connection that was let through.
#[derive(Clone, Copy, Debug)]
pub enum Open<'a> {
    /// The pod's application opened it.
    Outbound {
        /// From where.
        source: IpAddr,
        /// What is dialled: the endpoint, if it was opened to a service.
        destination: SocketAddr,
        /// The server, if it is carried in the mesh.
        peer: Option<&'a Workload>,
    },
    /// The pod's application accepted it.
    Inbound {
        /// From where.
        source: IpAddr,
        /// Where the application listens.
        port: u16,
        /// The client, if it is carried in the mesh.
        peer: Option<&'a Workload>,
    },
}

/// Why a connection that was let through may not go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Revocation {
    /// It would be refused now.
    #[error("no longer allowed: {0}")]
    Denied(DenyReason),
    /// Another pod is at that address now, or one of the mesh where none was.
    #[error("no longer allowed: another pod of the mesh is there now")]
    OtherPeer,
    /// The pod at the other end is no longer in the mesh.
    #[error("no longer allowed: the pod there has left the mesh")]
    PeerLeft,
}

fn is_same(now: &Workload, then: &Workload) -> bool {
    (&now.uid, &now.id) == (&then.uid, &then.id)
}

/// Decides whether a pod that has proven who it is may speak from the address `source`.
fn check_peer<'a>(
    pod: &PodRef,
    id: &WorkloadId,
    source: IpAddr,
    registry: &'a Snapshot,
) -> Result<&'a Arc<Workload>, DenyReason> {
    let peer = registry.by_uid(&pod.uid).ok_or(DenyReason::UnregisteredPeer)?;
    if peer.id != *id || peer.name != pod.name {
        return Err(DenyReason::IdentityMismatch);
    }
    match registry.by_address(source) {
        Some(owner) if owner.uid == peer.uid => Ok(peer),
        Some(_) | None => Err(DenyReason::SourceAddress),
    }
}

/// Decides whether an application in the pod `uid` may open a connection from the address `source`
/// at all.
///
/// # Errors
///
/// Why not.
pub fn check_client(uid: &str, source: IpAddr, registry: &Snapshot) -> Result<(), DenyReason> {
    check_registered(uid, registry)?;
    match registry.by_address(source) {
        Some(owner) if owner.uid == uid => Ok(()),
        Some(_) | None => Err(DenyReason::SourceAddress),
    }
}

fn check_registered(uid: &str, registry: &Snapshot) -> Result<(), DenyReason> {
    if !registry.is_known() {
        Err(DenyReason::RegistryUnknown)
    } else if registry.by_uid(uid).is_none() {
        Err(DenyReason::UnregisteredPod)
    } else {
        Ok(())
    }
}

fn is_remote(address: IpAddr) -> bool {
    !(address.is_unspecified()
        || address.is_loopback()
        || address.is_multicast()
        || address == Ipv4Addr::BROADCAST)
}

#[cfg(test)]
mod tests;
