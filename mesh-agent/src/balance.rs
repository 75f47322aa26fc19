//! Which endpoint of a service a connection goes to.
//!
//! [`candidates`] and [`choose`] are pure; [`Balancer`] holds what they need to know of other
//! connections.

mod affinity;

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use mesh_common::api::Locality;
use rand::Rng;

use self::affinity::Affinity;
use crate::identity::{Endpoint, Readiness, ServicePort};

/// Where the client is.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// Its node.
    pub node: &'a str,
    /// Its zone, if it is known.
    pub zone: Option<&'a str>,
}

/// The endpoints that may be given a connection, as kube-proxy sees it: of those that are best by
/// readiness and not `excluded`, the nearest that the service's locality asks for.
///
/// Readiness goes before nearness, and does not look at `excluded`: an endpoint that failed to
/// answer does not make one ready that is not.
pub fn candidates<'a>(
    port: &'a ServicePort,
    place: Place<'_>,
    excluded: impl Fn(SocketAddr) -> bool,
) -> Vec<&'a Endpoint> {
    let here = |endpoint: &&Endpoint| *endpoint.node == *place.node;
    let near = |endpoint: &&Endpoint| place.zone.is_some_and(|zone| *endpoint.zone == *zone);
    let in_reach = |endpoint: &&Endpoint| port.locality != Locality::SameNodeOnly || here(endpoint);
    let of = |readiness: Readiness| -> Vec<_> {
        let serves = |endpoint: &&Endpoint| port.not_ready_too || endpoint.readiness == readiness;
        port.endpoints.iter().filter(in_reach).filter(serves).collect()
    };
    let mut serving = of(Readiness::Ready);
    if serving.is_empty() {
        serving = of(Readiness::Leaving);
    }
    serving.retain(|endpoint| !excluded(endpoint.address));
    let prefer = |preferred: &dyn Fn(&&Endpoint) -> bool, all: Vec<&'a Endpoint>| {
        let some: Vec<_> = all.iter().copied().filter(preferred).collect();
        if some.is_empty() { all } else { some }
    };
    match port.locality {
        Locality::Anywhere | Locality::SameNodeOnly => serving,
        Locality::SameZoneFirst => prefer(&near, serving),
        Locality::SameNodeFirst => match prefer(&here, serving) {
            // Nobody is here: the zone is the next best.
            all if all.iter().any(here) => all,
            all => prefer(&near, all),
        },
    }
}

/// The less loaded of two that are drawn at random. Compared with the least loaded of all, this
/// does not send every client to the same endpoint at once.
pub fn choose<'a>(
    candidates: &[&'a Endpoint],
    load: impl Fn(SocketAddr) -> usize,
    rng: &mut impl Rng,
) -> Option<&'a Endpoint> {
    let count = candidates.len();
    let first = rng.random_range(0..count.max(1));
    // Of the others, each as likely; there may be none.
    let other = rng.random_range(0..count.max(2) - 1);
    let second = if other < first { other } else { other + 1 };
    let drawn = *candidates.get(first)?;
    let lighter = |other: &&&Endpoint| load(other.address) < load(drawn.address);
    Some(candidates.get(second).filter(lighter).copied().unwrap_or(drawn))
}

/// What one connection's choice must know of the others, for the whole node.
#[derive(Debug)]
pub struct Balancer {
    node: String,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Open connections. No endpoint without one is in here, so there are never more entries than
    /// open connections.
    loads: HashMap<SocketAddr, usize>,
    affinity: Affinity,
}

/// An endpoint that a connection goes to: it counts there until this is dropped.
#[derive(Debug)]
#[must_use = "the connection counts as the endpoint's load for as long as this lives"]
pub struct Chosen {
    address: SocketAddr,
    balancer: Arc<Balancer>,
}

impl Chosen {
    /// Address and target port.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Chosen {
    fn drop(&mut self) {
        let mut state = self.balancer.state();
        if let Some(load) = state.loads.get_mut(&self.address) {
            *load -= 1;
            if *load == 0 {
                state.loads.remove(&self.address);
            }
        }
    }
}

impl Balancer {
    /// For the clients of a node.
    pub fn new(node: &str) -> Self {
        Self { node: node.to_owned(), state: Mutex::default() }
    }

    /// The node.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Chooses among the candidates for a connection of `client`, which keeps its endpoint if the
    /// service says so and the endpoint is still a candidate. None if there is no candidate.
    pub fn choose(
        self: &Arc<Self>,
        port: &ServicePort,
        candidates: &[&Endpoint],
        client: IpAddr,
        now: Instant,
        rng: &mut impl Rng,
    ) -> Option<Chosen> {
        let mut state = self.state();
        let State { loads, affinity } = &mut *state;
        let kept = port.affinity.and_then(|_| affinity.get(client, &port.name, now));
        let address = kept
            .filter(|kept| candidates.iter().any(|endpoint| endpoint.address == *kept))
            .or_else(|| {
                let load = |address| loads.get(&address).copied().unwrap_or_default();
                choose(candidates, load, rng).map(|endpoint| endpoint.address)
            })?;
        if let Some(span) = port.affinity {
            affinity.set(client, &port.name, address, now, span);
        }
        *loads.entry(address).or_default() += 1;
        drop(state);
        Some(Chosen { address, balancer: Arc::clone(self) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing is left half done by a panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
