//! Where a connection of an application goes: to what it was opened to or, if that is a service,
//! to one of its endpoints, and to another if nobody answers there.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Instant,
};

use super::{PodProxy, neighbour::Neighbour};
use crate::{
    balance::{Chosen, Place, candidates},
    identity::{Found, Services, Snapshot, Workload},
    policy::{DenyReason, Verdict, check_client},
    stats::Kind,
};

/// How many endpoints a connection is offered to.
const MOST_ENDPOINTS: usize = 3;

/// The way of one connection. It sees the registry of the moment at every turn.
pub(super) struct Route<'a> {
    pod: &'a PodProxy,
    client: IpAddr,
    destination: SocketAddr,
    /// Endpoints that are not to be chosen again.
    tried: Vec<SocketAddr>,
    /// How many endpoints were really asked.
    asked: usize,
}

/// Where a connection goes now.
pub(super) struct Hop {
    /// What is dialled.
    pub(super) address: SocketAddr,
    /// How it is carried there.
    pub(super) way: Way,
    /// Whether another endpoint may take this one's place.
    pub(super) replaceable: bool,
    /// An endpoint of the service that was asked for. None if a pod or a machine itself was.
    chosen: Option<Chosen>,
}

/// How a connection is carried.
pub(super) enum Way {
    /// As it is.
    Plaintext,
    /// To a pod of the mesh on this node.
    Neighbour {
        /// The pod.
        neighbour: Neighbour,
        /// As the registry has it.
        server: Arc<Workload>,
    },
    /// Through the mesh, from one pod to the other.
    Mesh {
        /// The client's.
        own: Arc<Workload>,
        /// The one that is dialled.
        server: Arc<Workload>,
    },
}

/// A connection goes nowhere.
pub(super) struct Denied {
    /// The endpoint that it may not go to, if there was a choice at all.
    pub(super) endpoint: Option<SocketAddr>,
    pub(super) reason: DenyReason,
}

impl Hop {
    /// The endpoint, if the connection was opened to a service.
    pub(super) fn endpoint(&self) -> Option<SocketAddr> {
        self.chosen.as_ref().map(Chosen::address)
    }

    /// The pod at the other end.
    pub(super) fn server(&self) -> Option<&Arc<Workload>> {
        match &self.way {
            Way::Plaintext => None,
            Way::Neighbour { server, .. } | Way::Mesh { server, .. } => Some(server),
        }
    }

    /// Whether both ends prove who they are.
    pub(super) const fn is_in_mesh(&self) -> bool {
        !matches!(self.way, Way::Plaintext)
    }

    /// How it is counted.
    pub(super) const fn kind(&self) -> Kind {
        match self.way {
            Way::Plaintext => Kind::Plaintext,
            Way::Neighbour { .. } => Kind::Local,
            Way::Mesh { .. } => Kind::Mtls,
        }
    }
}

impl<'a> Route<'a> {
    pub(super) const fn new(pod: &'a PodProxy, client: IpAddr, destination: SocketAddr) -> Self {
        Self { pod, client, destination, tried: Vec::new(), asked: 0 }
    }

    /// Where the connection goes first.
    pub(super) fn first(&mut self) -> Result<Hop, Denied> {
        let registry = self.pod.registry();
        match self.choose(&registry) {
            Ok(Some((chosen, others))) => {
                self.hop(&registry, chosen.address(), Some(chosen), others)
            }
            Ok(None) => self.hop(&registry, self.destination, None, false),
            Err(reason) => Err(Denied { endpoint: None, reason }),
        }
    }

    /// Where it goes when `before` failed and nothing was said yet: in the mesh or not, as what it was
    /// let through for.
    pub(super) fn next(&mut self, before: &Hop) -> Option<Hop> {
        if !before.replaceable {
            return None;
        }
        let registry = self.pod.registry();
        loop {
            let (chosen, others) = self.choose(&registry).ok()??;
            match self.hop(&registry, chosen.address(), Some(chosen), others) {
                Ok(hop) if hop.is_in_mesh() == before.is_in_mesh() => return Some(hop),
                Ok(_) | Err(_) => {}
            }
        }
    }

    /// An endpoint that was not tried, and whether there are others yet. None if the destination is no
    /// service.
    fn choose(&mut self, registry: &Snapshot) -> Result<Option<(Chosen, bool)>, DenyReason> {
        let Self { pod, client, .. } = *self;
        let services = registry.services();
        let found = services.find(self.destination);
        if found == Found::Nothing {
            return Ok(None);
        }
        check_client(&pod.uid, client, registry)?;
        let Found::Port(port) = found else { return Err(DenyReason::NoServicePort) };
        let own = registry.by_uid(&pod.uid).map_or(&[][..], |own| &own.addresses);
        let place = place(pod, services);
        let tried = |address: SocketAddr| self.tried.contains(&address);
        // A pod has no tunnel to itself.
        let excluded = |address: SocketAddr| tried(address) || own.contains(&address.ip());
        let all = candidates(port, place, excluded);
        let (now, rng) = (Instant::now(), &mut rand::rng());
        let Some(chosen) = pod.balancer.choose(port, &all, client, now, rng) else {
            let itself = !candidates(port, place, tried).is_empty();
            return Err(if itself { DenyReason::NoRemoteAddress } else { DenyReason::NoEndpoints });
        };
        let excluded = |address| excluded(address) || address == chosen.address();
        let others = all.len() > 1 || !candidates(port, place, excluded).is_empty();
        self.tried.push(chosen.address());
        Ok(Some((chosen, others)))
    }

    fn hop(
        &mut self,
        registry: &Snapshot,
        address: SocketAddr,
        chosen: Option<Chosen>,
        others: bool,
    ) -> Result<Hop, Denied> {
        let way = way(self.pod, self.client, address, registry).map_err(|reason| {
            let endpoint = chosen.as_ref().map(Chosen::address);
            Denied { endpoint, reason }
        })?;
        self.asked += 1;
        let replaceable = others && self.asked < MOST_ENDPOINTS;
        Ok(Hop { address, way, replaceable, chosen })
    }
}

/// How a connection of the pod is carried to an address, as the policy decides.
pub(super) fn way(
    pod: &PodProxy,
    client: IpAddr,
    address: SocketAddr,
    registry: &Snapshot,
) -> Result<Way, DenyReason> {
    match pod.policy.egress(&pod.uid, client, address, registry) {
        Verdict::Deny(reason) => Err(reason),
        Verdict::Plaintext(_) => Ok(Way::Plaintext),
        Verdict::Mesh(server) => match registry.by_uid(&pod.uid) {
            Some(own) => Ok(match pod.neighbours.find(&server, address.ip()) {
                Some(neighbour) => Way::Neighbour { neighbour, server },
                None => Way::Mesh { own: Arc::clone(own), server },
            }),
            None => Err(DenyReason::UnregisteredPod),
        },
    }
}

/// Where the pod is, as services see it.
pub(super) fn place<'a>(pod: &'a PodProxy, services: &'a Services) -> Place<'a> {
    let node = pod.balancer.node();
    Place { node, zone: services.zone(node) }
}
