//! What applications connect to instead of a pod: services, their endpoints, and where nodes are.
//!
//! An agent refuses a snapshot that contradicts itself, and with it everything else in it. So what
//! is published is without contradictions: see [`resolve`].

mod file;

use std::{
    collections::{BTreeMap, HashMap, HashSet, btree_map},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use mesh_common::api;

pub use self::file::Files;
use crate::{
    keyed::{self, Keyed},
    registry::{Problem, Registry, is_host},
};

/// What agents are told of services. Always in the same order, by name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Services {
    /// The services.
    pub services: Vec<Arc<api::Service>>,
    /// Their endpoints.
    pub slices: Vec<Arc<api::EndpointSlice>>,
    /// The zones of nodes.
    pub nodes: Vec<Arc<api::Node>>,
}

impl Services {
    /// Takes over from `before` what has not changed.
    #[must_use]
    pub fn sharing_with(mut self, before: &Self) -> Self {
        keyed::share(&before.services, &mut self.services);
        keyed::share(&before.slices, &mut self.slices);
        keyed::share(&before.nodes, &mut self.nodes);
        self
    }
}

impl Keyed for api::Service {
    fn key(&self) -> (&str, &str) {
        (&self.namespace, &self.name)
    }
}

impl Keyed for api::EndpointSlice {
    fn key(&self) -> (&str, &str) {
        (&self.namespace, &self.name)
    }
}

impl Keyed for api::Node {
    fn key(&self) -> (&str, &str) {
        ("", &self.name)
    }
}

/// A service, with its endpoints, that somebody wants to be published.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Claim {
    /// Who wants it, for people: the file's name, or what Kubernetes calls it.
    pub origin: String,
    /// The service. Good in itself: no address or port in it is one that agents would refuse.
    pub service: api::Service,
    /// All slices of the service.
    pub slices: Vec<Arc<api::EndpointSlice>>,
}

/// Decides what is in force: `workloads` go before services, and the first claims before later ones.
/// A service whose name is taken is left out; of one with an address of somebody else, only that
/// address is. Of two zones of a node the first counts.
pub fn resolve<'a>(
    claims: impl IntoIterator<Item = &'a Claim>,
    nodes: impl IntoIterator<Item = &'a api::Node>,
    workloads: &Registry,
) -> (Services, Vec<Problem>) {
    let claims: Vec<&Claim> = claims.into_iter().collect();
    let wanted = claims.iter().flat_map(|claim| &claim.service.addresses);
    let wanted: HashSet<IpAddr> =
        wanted.filter_map(|text| Some(text.parse::<IpAddr>().ok()?.to_canonical())).collect();
    // Of the many workloads those that matter.
    let pods: HashMap<IpAddr, &str> = workloads
        .workloads()
        .flat_map(|workload| workload.addresses.iter().map(|a| (*a, workload.uid.as_str())))
        .filter(|(address, _)| wanted.contains(address))
        .collect();
    let mut problems = Vec::new();
    let mut taken = HashMap::<SocketAddr, &str>::new();
    let mut services = BTreeMap::new();
    let mut slices = BTreeMap::new();
    for Claim { origin, service, slices: theirs } in claims {
        let mut problem = |reason| problems.push(Problem { file: origin.clone(), reason });
        let key = (&*service.namespace, &*service.name);
        let entry = match services.entry(key) {
            btree_map::Entry::Vacant(entry) => entry,
            btree_map::Entry::Occupied(_) => {
                let (namespace, name) = key;
                problem(format!("there is a service {namespace}/{name} already"));
                continue;
            }
        };
        let mut service = service.clone();
        let mut seen = HashSet::new();
        service.addresses.retain(|text| {
            let ports = service.ports.iter().filter_map(|port| u16::try_from(port.port).ok());
            match conflict(text, ports, &pods, &taken) {
                Ok(address) => seen.insert(address),
                Err(reason) => {
                    problem(reason);
                    false
                }
            }
        });
        for address in seen {
            let ports = service.ports.iter().filter_map(|port| u16::try_from(port.port).ok());
            taken.extend(ports.map(|port| (SocketAddr::new(address, port), &**origin)));
        }
        entry.insert(service);
        slices.extend(theirs.iter().map(|slice| ((&*slice.namespace, &*slice.name), slice)));
    }
    let mut zones = BTreeMap::new();
    for node in nodes {
        zones.entry(&*node.name).or_insert(node);
    }
    let services = Services {
        services: services.into_values().map(Arc::new).collect(),
        slices: slices.into_values().cloned().collect(),
        nodes: zones.into_values().cloned().map(Arc::new).collect(),
    };
    (services, problems)
}

/// The address, if a service may have it.
fn conflict(
    text: &str,
    mut ports: impl Iterator<Item = u16>,
    pods: &HashMap<IpAddr, &str>,
    taken: &HashMap<SocketAddr, &str>,
) -> Result<IpAddr, String> {
    let address: IpAddr = text.parse().map_err(|_| format!("{text:?} is no address"))?;
    let address = address.to_canonical();
    if !is_host(address) {
        return Err(format!("{address} is not an address to connect to"));
    }
    if let Some(uid) = pods.get(&address) {
        return Err(format!("the address {address} is the workload's with the UID {uid}"));
    }
    let first = ports.find_map(|port| {
        let address = SocketAddr::new(address, port);
        Some((address, taken.get(&address)?))
    });
    match first {
        Some((address, first)) => Err(format!("{address} is taken by {first} already")),
        None => Ok(address),
    }
}

#[cfg(test)]
mod tests;
