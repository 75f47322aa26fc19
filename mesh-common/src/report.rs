//! What the owner of an application must see: the fixed set of reasons by which agents tell of it, and
//! under which Kubernetes shows it as an Event of the pod.

/// Why a pod is told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// Somebody spoke plaintext to the pod.
    PlaintextRefused,
    /// Somebody did not prove to be the pod of the mesh that it says it is.
    PeerNotAllowed,
    /// The pod wanted to talk to what is in the cluster and not in the mesh.
    DestinationNotInMesh,
    /// The pod wanted to talk to what is outside the cluster, and may not.
    EgressDenied,
    /// The pod has too many connections.
    TooManyConnections,
    /// The guard dropped what the pod sent past the mesh.
    GuardDropped,
    /// Connections from before the pod came into the mesh were cut.
    ConnectionsCut,
    /// The pod has no certificate.
    NoCertificate,
    /// The pod's certificate is near its end, and there is no other.
    CertificateNotRotating,
    /// The pod is in the mesh, and its node's agent cannot enrol it.
    NotUnderGuard,
}

impl Reason {
    /// Every reason.
    pub const ALL: [Self; 10] = [
        Self::PlaintextRefused,
        Self::PeerNotAllowed,
        Self::DestinationNotInMesh,
        Self::EgressDenied,
        Self::TooManyConnections,
        Self::GuardDropped,
        Self::ConnectionsCut,
        Self::NoCertificate,
        Self::CertificateNotRotating,
        Self::NotUnderGuard,
    ];

    /// The name in the API and on Events.
    pub const fn name(self) -> &'static str {
        match self {
            Self::PlaintextRefused => "PlaintextRefused",
            Self::PeerNotAllowed => "PeerNotAllowed",
            Self::DestinationNotInMesh => "DestinationNotInMesh",
            Self::EgressDenied => "EgressDenied",
            Self::TooManyConnections => "TooManyConnections",
            Self::GuardDropped => "GuardDropped",
            Self::ConnectionsCut => "ConnectionsCut",
            Self::NoCertificate => "NoCertificate",
            Self::CertificateNotRotating => "CertificateNotRotating",
            Self::NotUnderGuard => "NotUnderGuard",
        }
    }

    /// The reason of that name; none that is not of this set.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.name() == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_one_name() {
        for reason in Reason::ALL {
            assert_eq!(Reason::named(reason.name()), Some(reason));
        }
        assert_eq!(Reason::named("Anything"), None);
    }
}
