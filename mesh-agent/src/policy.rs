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

use mesh_common::{spiffe::SpiffeId, svid::Leaf};

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
            let peer = registry.by_uid(&pod.uid).ok_or(DenyReason::UnregisteredPeer)?;
            if peer.id != *id || peer.name != pod.name {
                return Err(DenyReason::IdentityMismatch);
            }
            match registry.by_address(source) {
                Some(owner) if owner.uid == peer.uid => Ok(Verdict::Mesh(Arc::clone(peer))),
                Some(_) | None => Err(DenyReason::SourceAddress),
            }
        };
        allowed().unwrap_or_else(Verdict::Deny)
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
