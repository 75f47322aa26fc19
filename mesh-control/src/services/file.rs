//! Services that the operator has written down, one in a file.

use std::{
    collections::{BTreeMap, HashSet},
    net::IpAddr,
    num::NonZeroU16,
    sync::Arc,
    time::Duration,
};

use mesh_common::{
    api::{self, Locality},
    spiffe::check_segment,
};
use serde::{Deserialize, Deserializer, de};

use super::Claim;
use crate::{files::Source, registry::Problem, yaml};

/// The longest affinity, as in Kubernetes.
const MAX_AFFINITY: Duration = Duration::from_secs(24 * 60 * 60);

/// What the files of a directory say, each for itself.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Files {
    /// The services, those that were written first first.
    pub claims: Vec<Claim>,
    /// Nodes whose zone an endpoint names.
    pub nodes: Vec<api::Node>,
    /// Files that are no service.
    pub problems: Vec<Problem>,
}

impl Files {
    /// Reads them. A file with anything wrong in it is left out whole.
    pub fn read(mut sources: Vec<Source>) -> Self {
        sources.sort_by(|a, b| (a.modified, &a.file).cmp(&(b.modified, &b.file)));
        let mut files = Self::default();
        for Source { file, content, .. } in sources {
            let service = content.and_then(|text| yaml::parse(&text));
            match service.and_then(|service: Service| service.check().map(|()| service)) {
                Ok(service) => {
                    files.nodes.extend(service.nodes());
                    files.claims.push(service.claim(file));
                }
                Err(reason) => files.problems.push(Problem { file, reason }),
            }
        }
        files
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Service {
    #[serde(deserialize_with = "segment")]
    namespace: String,
    #[serde(deserialize_with = "segment")]
    name: String,
    addresses: Vec<Address>,
    ports: Vec<Port>,
    #[serde(default, deserialize_with = "affinity")]
    client_ip_affinity: Duration,
    #[serde(default)]
    locality: Nearness,
    endpoints: Vec<Endpoint>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Port {
    #[serde(default)]
    name: String,
    port: NonZeroU16,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Endpoint {
    address: Address,
    ports: Targets,
    #[serde(default = "yes")]
    ready: bool,
    #[serde(default, deserialize_with = "segment")]
    node: String,
    #[serde(default, deserialize_with = "segment")]
    zone: String,
}

/// Target ports.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(untagged, expecting = "`ports` of an endpoint is a port, or {name of the port: port}")]
enum Targets {
    One(NonZeroU16),
    Named(BTreeMap<String, NonZeroU16>),
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Nearness {
    #[default]
    Anywhere,
    SameZoneFirst,
    SameNodeFirst,
    SameNodeOnly,
}

impl From<Nearness> for Locality {
    fn from(nearness: Nearness) -> Self {
        match nearness {
            Nearness::Anywhere => Self::Anywhere,
            Nearness::SameZoneFirst => Self::SameZoneFirst,
            Nearness::SameNodeFirst => Self::SameNodeFirst,
            Nearness::SameNodeOnly => Self::SameNodeOnly,
        }
    }
}

/// An address that something other than this machine can have, canonical.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Address(IpAddr);

impl<'de> Deserialize<'de> for Address {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let address = IpAddr::deserialize(deserializer)?.to_canonical();
        if address.is_unspecified() || address.is_loopback() || address.is_multicast() {
            return Err(de::Error::custom(format!("nobody can connect to {address}")));
        }
        Ok(Self(address))
    }
}

const fn yes() -> bool {
    true
}

fn segment<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let name = String::deserialize(deserializer)?;
    check_segment(&name).map_err(de::Error::custom)?;
    Ok(name)
}

fn affinity<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let span: Duration = humantime_serde::deserialize(deserializer)?;
    if span.subsec_nanos() == 0 && (Duration::from_secs(1)..=MAX_AFFINITY).contains(&span) {
        Ok(span)
    } else {
        Err(de::Error::custom("the affinity must be whole seconds, from 1s to 1day"))
    }
}

impl Service {
    fn check(&self) -> Result<(), String> {
        if self.addresses.is_empty() || self.ports.is_empty() {
            return Err("a service has at least one of `addresses` and one of `ports`".to_owned());
        }
        let (mut names, mut numbers, mut hosts) = Default::default();
        all_new(&mut names, self.ports.iter().map(|port| &port.name), "names of ports")?;
        all_new(&mut numbers, self.ports.iter().map(|port| port.port), "ports")?;
        all_new(&mut hosts, self.endpoints.iter().map(|e| &e.address), "endpoints")?;
        for Endpoint { address: Address(address), ports, .. } in &self.endpoints {
            match ports {
                Targets::One(_) if self.ports.len() > 1 => {
                    return Err(format!(
                        "the endpoint {address} has one port, the service several: name them, \
                         `ports: {{name: port}}`"
                    ));
                }
                Targets::One(_) => {}
                Targets::Named(targets) => {
                    if let Some(name) = targets.keys().find(|name| !names.contains(name)) {
                        return Err(format!("the service has no port {name:?}, as {address} has"));
                    }
                }
            }
        }
        Ok(())
    }

    fn nodes(&self) -> impl Iterator<Item = api::Node> {
        let known = self.endpoints.iter().filter(|e| !e.node.is_empty() && !e.zone.is_empty());
        known.map(|e| api::Node { name: e.node.clone(), zone: e.zone.clone() })
    }

    /// Endpoints with the same target ports are a slice. The number at the end of a slice's name
    /// keeps those of two services apart.
    fn claim(self, origin: String) -> Claim {
        let Self { namespace, name, addresses, ports, client_ip_affinity, locality, endpoints } =
            self;
        let mut by_targets = BTreeMap::<_, Vec<_>>::new();
        for Endpoint { address, ports, ready, node, zone } in endpoints {
            by_targets.entry(ports).or_default().push(api::Endpoint {
                address: address.0.to_string(),
                node,
                zone,
                ready,
                serving: ready,
                terminating: false,
            });
        }
        let slices = by_targets.into_iter().enumerate().map(|(number, (targets, endpoints))| {
            let ports = match targets {
                Targets::One(target) => {
                    ports.iter().map(|port| service_port(&port.name, target)).collect()
                }
                Targets::Named(targets) => {
                    targets.iter().map(|(name, target)| service_port(name, *target)).collect()
                }
            };
            api::EndpointSlice {
                namespace: namespace.clone(),
                name: format!("{name}-{number}"),
                service: name.clone(),
                ports,
                endpoints,
            }
        });
        let slices = slices.map(Arc::new).collect();
        let service = api::Service {
            ports: ports.iter().map(|port| service_port(&port.name, port.port)).collect(),
            namespace,
            name,
            addresses: addresses.into_iter().map(|address| address.0.to_string()).collect(),
            client_ip_affinity_seconds: u32::try_from(client_ip_affinity.as_secs())
                .unwrap_or(u32::MAX),
            locality: Locality::from(locality).into(),
            not_ready_too: false,
        };
        Claim { origin, service, slices }
    }
}

fn service_port(name: &str, port: NonZeroU16) -> api::ServicePort {
    api::ServicePort { name: name.to_owned(), port: u32::from(port.get()) }
}

fn all_new<T: std::hash::Hash + Eq>(
    known: &mut HashSet<T>,
    mut all: impl Iterator<Item = T>,
    what: &str,
) -> Result<(), String> {
    if all.all(|one| known.insert(one)) { Ok(()) } else { Err(format!("two {what} are the same")) }
}
