//! What applications connect to instead of a pod: the services, each with its endpoints.
//!
//! Addresses, not workloads: whether an endpoint is in the mesh is decided when it is dialled, by
//! the registry of that moment.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

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
}

/// The services of one snapshot.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Services {
    ports: HashMap<SocketAddr, Arc<ServicePort>>,
    addresses: HashSet<IpAddr>,
    zones: HashMap<String, Arc<str>>,
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
            None if self.addresses.contains(&ip) => Found::NoPort,
            None => Found::Nothing,
        }
    }

    /// The zone of a node, if it is known.
    pub fn zone(&self, node: &str) -> Option<&str> {
        self.zones.get(node).map(AsRef::as_ref)
    }

    /// Puts services and endpoints together. `workload` tells whose an address is.
    pub(super) fn new<'a>(
        services: Vec<api::Service>,
        slices: Vec<api::EndpointSlice>,
        nodes: Vec<api::Node>,
        workload: impl Fn(IpAddr) -> Option<&'a str>,
    ) -> Result<Self, ServicesError> {
        let mut names = HashSet::new();
        let mut zones = HashMap::<_, Arc<str>>::new();
        for api::Node { name, zone } in nodes {
            if !names.insert(name.clone()) {
                return Err(duplicate("node", &name));
            }
            if !zone.is_empty() {
                zones.insert(name, zone.into());
            }
        }
        let slices = by_service(slices, &zones)?;
        let mut all = Self { zones, ..Self::default() };
        let mut names = HashSet::new();
        for service in services {
            let name = qualified(&service.namespace, &service.name);
            if !names.insert(name.clone()) {
                return Err(duplicate("service", &name));
            }
            let addresses = addresses(&name, &service.addresses)?;
            for &address in &addresses {
                if let Some(uid) = workload(address) {
                    let uid = uid.to_owned();
                    return Err(ServicesError::Workload { service: name, address, uid });
                }
                all.addresses.insert(address);
            }
            let slices = slices.get(&name).map_or(&[][..], Vec::as_slice);
            all.add(&name, &service, &addresses, slices)?;
        }
        Ok(all)
    }

    fn add(
        &mut self,
        name: &str,
        service: &api::Service,
        addresses: &[IpAddr],
        slices: &[Slice],
    ) -> Result<(), ServicesError> {
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
                    endpoints: endpoints(slices, port_name, v4),
                })
            };
            let families = [of_family(true), of_family(false)];
            for address in addresses {
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
}

/// An endpoint slice, checked.
struct Slice {
    /// Target ports by name.
    ports: HashMap<String, u16>,
    /// Their port is to be filled in.
    endpoints: Vec<Endpoint>,
}

fn by_service(
    slices: Vec<api::EndpointSlice>,
    zones: &HashMap<String, Arc<str>>,
) -> Result<HashMap<String, Vec<Slice>>, ServicesError> {
    let mut names = HashSet::new();
    let mut all = HashMap::<_, Vec<_>>::new();
    for slice in slices {
        let name = qualified(&slice.namespace, &slice.name);
        if !names.insert(name.clone()) {
            return Err(duplicate("endpoint slice", &name));
        }
        let mut ports = HashMap::new();
        for api::ServicePort { name: port_name, port } in slice.ports {
            let port = tcp_port(&name, port)?;
            if ports.insert(port_name, port).is_some() {
                return Err(duplicate("port", &format!("{name}:{port}")));
            }
        }
        let endpoints = slice
            .endpoints
            .into_iter()
            .map(|endpoint| self::endpoint(&name, endpoint, zones))
            .collect::<Result<_, _>>()?;
        let service = qualified(&slice.namespace, &slice.service);
        all.entry(service).or_default().push(Slice { ports, endpoints });
    }
    Ok(all)
}

fn endpoint(
    slice: &str,
    endpoint: api::Endpoint,
    zones: &HashMap<String, Arc<str>>,
) -> Result<Endpoint, ServicesError> {
    let api::Endpoint { address, node, zone, ready, serving, terminating } = endpoint;
    let ip = host_address(&address)
        .ok_or_else(|| ServicesError::Address { whose: slice.to_owned(), address })?;
    let of_node = || zones.get(&node).map_or_else(|| "".into(), Arc::clone);
    Ok(Endpoint {
        address: SocketAddr::new(ip, 0),
        zone: if zone.is_empty() { of_node() } else { zone.into() },
        node: node.into(),
        readiness: match (ready, serving, terminating) {
            (true, _, false) => Readiness::Ready,
            (_, true, true) => Readiness::Leaving,
            (_, _, _) => Readiness::NotReady,
        },
    })
}

/// The endpoints for a port of a service. One may be in two slices while it moves from one to the
/// other; the better word counts.
fn endpoints(slices: &[Slice], port_name: &str, v4: bool) -> Vec<Endpoint> {
    let mut places = HashMap::new();
    let mut all = Vec::<Endpoint>::new();
    for Slice { ports, endpoints } in slices {
        let Some(&port) = ports.get(port_name) else { continue };
        for endpoint in endpoints.iter().filter(|endpoint| endpoint.address.is_ipv4() == v4) {
            let address = SocketAddr::new(endpoint.address.ip(), port);
            let endpoint = Endpoint { address, ..endpoint.clone() };
            let place = *places.entry(address).or_insert(all.len());
            match all.get_mut(place) {
                None => all.push(endpoint),
                Some(known) if endpoint.readiness < known.readiness => *known = endpoint,
                Some(_) => {}
            }
        }
    }
    all
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
