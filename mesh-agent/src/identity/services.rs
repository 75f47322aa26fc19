//! What applications connect to instead of a pod: the services, each with its endpoints.
//!
//! Addresses, not workloads: whether an endpoint is in the mesh is decided when it is dialled, by
//! the registry of that moment.

use std::{
    collections::{BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use imbl::OrdMap;
use mesh_common::api::{self, Locality};

use super::registry::host_address;

/// Why the services of a snapshot are not usable.
#[derive(Debug, thiserror::Error)]
pub enum ServicesError {
    /// Two have one name.
    #[error("two {kind}s have the name {name}")]
    Duplicate {
        /// What they are.
        kind: &'static str,
        /// The name, with the namespace if it is in one.
        name: String,
    },
    /// An address that nothing can have.
    #[error("{whose}: {address:?} is not an address to connect to")]
    Address {
        /// The service or the endpoint slice.
        whose: String,
        /// The address as received.
        address: String,
    },
    /// A port that no TCP connection can have.
    #[error("{whose}: {port} is no port")]
    Port {
        /// The service or the endpoint slice.
        whose: String,
        /// The port as received.
        port: u32,
    },
    /// Two services, or two ports of one, are at one address and port.
    #[error("the services {first} and {second} are both at {address}")]
    Clash {
        /// The address in question.
        address: SocketAddr,
        /// The port of one.
        first: Arc<str>,
        /// The port of the other.
        second: Arc<str>,
    },
    /// A service has the address of a pod.
    #[error("the service {service} has the address {address} of the workload {uid:?}")]
    Workload {
        /// The service.
        service: String,
        /// The address in question.
        address: IpAddr,
        /// The workload's UID.
        uid: String,
    },
    /// What is to be removed is not there.
    #[error("the difference removes the {kind} {name}, which is not there")]
    Missing {
        /// What it is.
        kind: &'static str,
        /// The name, with the namespace if it is in one.
        name: String,
    },
}

/// The services of one snapshot. Versions of it share what is the same in them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Services {
    services: OrdMap<Name, Arc<api::Service>>,
    slices: OrdMap<Name, Arc<Slice>>,
    /// The slices of each service, there or not.
    slices_of: OrdMap<Name, Vec<Name>>,
    /// The zones of the nodes, empty if they are in none.
    zones: OrdMap<Name, Arc<str>>,
    // What is looked up is made of the above, service by service.
    ports: OrdMap<SocketAddr, Arc<ServicePort>>,
    addresses: OrdMap<IpAddr, Vec<Name>>,
}

/// Of a node, or, with its namespace, of a service or a slice.
type Name = Arc<str>;

/// What services, slices and nodes become.
#[derive(Debug, Default)]
pub(super) struct Update {
    /// New, or in place of those of the same name.
    pub(super) services: Vec<api::Service>,
    /// Likewise.
    pub(super) slices: Vec<api::EndpointSlice>,
    /// Likewise.
    pub(super) nodes: Vec<api::Node>,
    /// What is gone.
    pub(super) removed: api::Removed,
}

/// What is at an address and port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found<'a> {
    /// No service has the address.
    Nothing,
    /// The address is a service's, but the service is not at that port.
    NoPort,
    /// The port of a service.
    Port(&'a Arc<ServicePort>),
}

/// A port of a service, for one address family.
#[derive(Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// `namespace/service:port`. It stays the same from snapshot to snapshot.
    pub name: Arc<str>,
    /// For how long a client keeps its endpoint.
    pub affinity: Option<Duration>,
    /// Which endpoints are preferred.
    pub locality: Locality,
    /// Endpoints serve whatever their readiness is.
    pub not_ready_too: bool,
    /// Where the connections go, each address once, all of the family of the service's address.
    pub endpoints: Vec<Endpoint>,
}

/// One of those who serve a port of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Address and target port.
    pub address: SocketAddr,
    /// Its node; empty if unknown.
    pub node: Arc<str>,
    /// Its zone; empty if unknown.
    pub zone: Arc<str>,
    /// Whether it may be given connections.
    pub readiness: Readiness,
}

/// Whether an endpoint may be given connections, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Readiness {
    /// Ready, and here to stay.
    Ready,
    /// Terminating, but it still serves: for when no other is ready.
    Leaving,
    /// Neither.
    NotReady,
}

impl Services {
    /// What is at this address and port. IPv4 mapped into IPv6 is looked up as IPv4.
    pub fn find(&self, address: SocketAddr) -> Found<'_> {
        let ip = address.ip().to_canonical();
        match self.ports.get(&SocketAddr::new(ip, address.port())) {
            Some(port) => Found::Port(port),
            None if self.addresses.contains_key(&ip) => Found::NoPort,
            None => Found::Nothing,
        }
    }

    /// The zone of a node, if it is known.
    pub fn zone(&self, node: &str) -> Option<&str> {
        self.zones.get(node).map(AsRef::as_ref).filter(|zone: &&str| !zone.is_empty())
    }

    /// A service that has this address.
    pub(super) fn at(&self, address: IpAddr) -> Option<&str> {
        self.addresses.get(&address)?.first().map(AsRef::as_ref)
    }

    /// Puts services and endpoints together anew where something has changed. `workload` tells
    /// whose an address is. After an error this is of no use.
    pub(super) fn apply<'a>(
        &mut self,
        update: Update,
        workload: impl Fn(IpAddr) -> Option<&'a str>,
    ) -> Result<(), ServicesError> {
        let Update { services, slices, nodes, removed } = update;
        let mut touched = BTreeSet::new();
        if self.apply_nodes(nodes, &removed.nodes)? {
            touched.extend(self.services.keys().cloned());
        }
        self.apply_slices(slices, &removed.endpoint_slices, &mut touched)?;
        let services: Vec<_> = services
            .into_iter()
            .map(|service| (Name::from(qualified(&service.namespace, &service.name)), service))
            .collect();
        touched.extend(services.iter().map(|(name, _)| Arc::clone(name)));
        touched.extend(removed.services.iter().map(|name| Name::from(name.as_str())));
        // First what goes, so that an address can go from one to the other.
        for name in &touched {
            if let Some(service) = self.services.get(name).cloned() {
                self.withdraw(name, &service)?;
            }
        }
        for name in &removed.services {
            self.services.remove(name.as_str()).ok_or_else(|| missing("service", name))?;
        }
        for (name, _) in &services {
            self.services.remove(name);
        }
        for (name, service) in services {
            if self.services.insert(Arc::clone(&name), Arc::new(service)).is_some() {
                return Err(duplicate("service", &name));
            }
        }
        for name in &touched {
            if let Some(service) = self.services.get(name).cloned() {
                self.add(name, &service, &workload)?;
            }
        }
        Ok(())
    }

    /// Whether a zone has changed.
    fn apply_nodes(
        &mut self,
        nodes: Vec<api::Node>,
        removed: &[String],
    ) -> Result<bool, ServicesError> {
        let before = self.zones.clone();
        for name in removed {
            self.zones.remove(name.as_str()).ok_or_else(|| missing("node", name))?;
        }
        for node in &nodes {
            self.zones.remove(node.name.as_str());
        }
        let mut moved = removed.iter().any(|name| before.get(name.as_str()) != Some(&"".into()));
        for api::Node { name, zone } in nodes {
            let zone: Arc<str> = zone.into();
            moved |= before.get(name.as_str()).map_or("", AsRef::as_ref) != &*zone;
            if self.zones.insert(name.as_str().into(), zone).is_some() {
                return Err(duplicate("node", &name));
            }
        }
        Ok(moved)
    }

    /// Adds the services whose endpoints have changed to those that are `touched`.
    fn apply_slices(
        &mut self,
        slices: Vec<api::EndpointSlice>,
        removed: &[String],
        touched: &mut BTreeSet<Name>,
    ) -> Result<(), ServicesError> {
        let slices = slices
            .into_iter()
            .map(|slice| self.slice(slice))
            .collect::<Result<Vec<_>, ServicesError>>()?;
        for name in removed {
            let slice = self.slices.remove(name.as_str());
            let slice = slice.ok_or_else(|| missing("endpoint slice", name))?;
            self.unlink(name, &slice, touched);
        }
        for (name, _) in &slices {
            if let Some(slice) = self.slices.remove(name) {
                self.unlink(name, &slice, touched);
            }
        }
        for (name, slice) in slices {
            touched.insert(Arc::clone(&slice.service));
            let of_service = self.slices_of.entry(Arc::clone(&slice.service)).or_default();
            let place = of_service.partition_point(|other| *other < name);
            of_service.insert(place, Arc::clone(&name));
            if self.slices.insert(Arc::clone(&name), Arc::new(slice)).is_some() {
                return Err(duplicate("endpoint slice", &name));
            }
        }
        Ok(())
    }

    fn unlink(&mut self, name: &str, slice: &Slice, touched: &mut BTreeSet<Name>) {
        touched.insert(Arc::clone(&slice.service));
        if let Some(of_service) = self.slices_of.get_mut(&slice.service) {
            of_service.retain(|other| **other != *name);
            if of_service.is_empty() {
                self.slices_of.remove(&slice.service);
            }
        }
    }

    fn withdraw(&mut self, name: &str, service: &api::Service) -> Result<(), ServicesError> {
        for address in addresses(name, &service.addresses)? {
            for port in &service.ports {
                self.ports.remove(&SocketAddr::new(address, tcp_port(name, port.port)?));
            }
            if let Some(names) = self.addresses.get_mut(&address) {
                names.retain(|other| **other != *name);
                if names.is_empty() {
                    self.addresses.remove(&address);
                }
            }
        }
        Ok(())
    }

    fn add<'a>(
        &mut self,
        name: &Name,
        service: &api::Service,
        workload: impl Fn(IpAddr) -> Option<&'a str>,
    ) -> Result<(), ServicesError> {
        let addresses = addresses(name, &service.addresses)?;
        for &address in &addresses {
            if let Some(uid) = workload(address) {
                let (service, uid) = (name.to_string(), uid.to_owned());
                return Err(ServicesError::Workload { service, address, uid });
            }
            let names = self.addresses.entry(address).or_default();
            let place = names.partition_point(|other| other < name);
            names.insert(place, Arc::clone(name));
        }
        let slices = self.slices_of.get(name).into_iter().flatten();
        let slices: Vec<_> =
            slices.filter_map(|name| self.slices.get(name)).map(Arc::clone).collect();
        let affinity = u64::from(service.client_ip_affinity_seconds);
        for api::ServicePort { name: port_name, port } in &service.ports {
            let port = tcp_port(name, *port)?;
            // A pod cannot reach an endpoint of the other family from the address it has chosen.
            let of_family = |v4: bool| {
                Arc::new(ServicePort {
                    name: format!("{name}:{port}").into(),
                    affinity: (affinity > 0).then(|| Duration::from_secs(affinity)),
                    // A preference of a later version is no reason to know no services at all.
                    locality: service.locality(),
                    not_ready_too: service.not_ready_too,
                    endpoints: self.endpoints(&slices, port_name, v4),
                })
            };
            let families = [of_family(true), of_family(false)];
            for address in &addresses {
                let [v4, v6] = &families;
                let here = if address.is_ipv4() { v4 } else { v6 };
                let address = SocketAddr::new(*address, port);
                if let Some(first) = self.ports.insert(address, Arc::clone(here)) {
                    let (first, second) = (Arc::clone(&first.name), Arc::clone(&here.name));
                    return Err(ServicesError::Clash { address, first, second });
                }
            }
        }
        Ok(())
    }

    /// The endpoints for a port of a service. One may be in two slices while it moves from one to
    /// the other; the better word counts.
    fn endpoints(&self, slices: &[Arc<Slice>], port_name: &str, v4: bool) -> Vec<Endpoint> {
        let mut places = HashMap::new();
        let mut all = Vec::<Endpoint>::new();
        for slice in slices {
            let port = slice.ports.iter().find(|(name, _)| name == port_name);
            let Some(&(_, port)) = port else { continue };
            for endpoint in slice.endpoints.iter().filter(|e| e.address.is_ipv4() == v4) {
                let address = SocketAddr::new(endpoint.address.ip(), port);
                let mut endpoint = Endpoint { address, ..endpoint.clone() };
                if endpoint.zone.is_empty()
                    && let Some(zone) = self.zones.get(&endpoint.node)
                {
                    endpoint.zone = Arc::clone(zone);
                }
                let place = *places.entry(address).or_insert(all.len());
                match all.get_mut(place) {
                    None => all.push(endpoint),
                    Some(known) if endpoint.readiness < known.readiness => *known = endpoint,
                    Some(_) => {}
                }
            }
        }
        all.shrink_to_fit();
        all
    }

    /// Checks a slice.
    fn slice(&self, slice: api::EndpointSlice) -> Result<(Name, Slice), ServicesError> {
        let name = qualified(&slice.namespace, &slice.name);
        let mut ports = Vec::<(String, u16)>::new();
        for api::ServicePort { name: port_name, port } in slice.ports {
            let port = tcp_port(&name, port)?;
            if ports.iter().any(|(other, _)| *other == port_name) {
                return Err(duplicate("port", &format!("{name}:{port}")));
            }
            ports.push((port_name, port));
        }
        let endpoints = slice
            .endpoints
            .into_iter()
            .map(|endpoint| self.endpoint(&name, endpoint))
            .collect::<Result<_, _>>()?;
        let service = qualified(&slice.namespace, &slice.service).into();
        Ok((name.into(), Slice { service, ports, endpoints }))
    }

    fn endpoint(&self, slice: &str, endpoint: api::Endpoint) -> Result<Endpoint, ServicesError> {
        let api::Endpoint { address, node, zone, ready, serving, terminating } = endpoint;
        let ip = host_address(&address)
            .ok_or_else(|| ServicesError::Address { whose: slice.to_owned(), address })?;
        let known = self.zones.get_key_value(node.as_str());
        let (node, of_node) = match known {
            Some((name, zone)) => (Arc::clone(name), Arc::clone(zone)),
            None => (node.into(), Arc::default()),
        };
        Ok(Endpoint {
            address: SocketAddr::new(ip, 0),
            node,
            zone: if *of_node == *zone { of_node } else { zone.into() },
            readiness: match (ready, serving, terminating) {
                (true, _, false) => Readiness::Ready,
                (_, true, true) => Readiness::Leaving,
                (_, _, _) => Readiness::NotReady,
            },
        })
    }

    /// As in the API, one thing at a time.
    pub(super) fn fields(&self) -> impl Iterator<Item = api::Snapshot> {
        let nodes = self.zones.iter().map(|(name, zone)| {
            let node = api::Node { name: name.to_string(), zone: zone.to_string() };
            api::Snapshot { nodes: vec![node], ..Default::default() }
        });
        let services = self.services.values().map(|service| api::Snapshot {
            services: vec![service.as_ref().clone()],
            ..Default::default()
        });
        let slices = self.slices.iter().map(|(name, slice)| api::Snapshot {
            endpoint_slices: vec![slice.to_api(name)],
            ..Default::default()
        });
        nodes.chain(services).chain(slices)
    }
}

/// An endpoint slice, checked.
#[derive(Debug, PartialEq, Eq)]
struct Slice {
    service: Name,
    /// Target ports by name.
    ports: Vec<(String, u16)>,
    /// Their port is to be filled in, and their zone, if it is empty, with their node's.
    endpoints: Vec<Endpoint>,
}

impl Slice {
    fn to_api(&self, name: &str) -> api::EndpointSlice {
        let split = |name: &str| name.split_once('/').unwrap_or_default().1.to_owned();
        let endpoint = |endpoint: &Endpoint| {
            let (ready, serving, terminating) = match endpoint.readiness {
                Readiness::Ready => (true, true, false),
                Readiness::Leaving => (false, true, true),
                Readiness::NotReady => (false, false, false),
            };
            api::Endpoint {
                address: endpoint.address.ip().to_string(),
                node: endpoint.node.to_string(),
                zone: endpoint.zone.to_string(),
                ready,
                serving,
                terminating,
            }
        };
        let port = |(name, port): &(String, u16)| api::ServicePort {
            name: name.clone(),
            port: u32::from(*port),
        };
        api::EndpointSlice {
            namespace: name.split('/').next().unwrap_or_default().to_owned(),
            name: split(name),
            service: split(&self.service),
            ports: self.ports.iter().map(port).collect(),
            endpoints: self.endpoints.iter().map(endpoint).collect(),
        }
    }
}

fn addresses(service: &str, texts: &[String]) -> Result<Vec<IpAddr>, ServicesError> {
    let parse = |text: &String| {
        host_address(text).ok_or_else(|| ServicesError::Address {
            whose: service.to_owned(),
            address: text.clone(),
        })
    };
    texts.iter().map(parse).collect()
}

fn tcp_port(whose: &str, port: u32) -> Result<u16, ServicesError> {
    u16::try_from(port)
        .ok()
        .filter(|port| *port > 0)
        .ok_or_else(|| ServicesError::Port { whose: whose.to_owned(), port })
}

fn qualified(namespace: &str, name: &str) -> String {
    format!("{namespace}/{name}")
}

fn duplicate(kind: &'static str, name: &str) -> ServicesError {
    ServicesError::Duplicate { kind, name: name.to_owned() }
}

fn missing(kind: &'static str, name: &str) -> ServicesError {
    ServicesError::Missing { kind, name: name.to_owned() }
}
