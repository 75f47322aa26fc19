//! Services, their endpoints and the nodes' zones, as agents get them: pure functions.

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
};

use k8s_openapi::api::{
    core::v1::{Node, Service},
    discovery::v1::{Endpoint, EndpointSlice},
};
use mesh_common::api::{self, Locality};

use crate::registry::{Problem, is_host};

/// The label by which a slice names its service.
pub(super) const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// The label of a node's zone.
pub(super) const ZONE: &str = "topology.kubernetes.io/zone";

/// Kubernetes' own default for the ClientIP affinity, in seconds.
const AFFINITY_SECONDS: i32 = 10_800;

/// The services of the cluster, by namespace and name, each with the addresses that are its alone.
/// `workloads` says whose the addresses of workloads are.
///
/// Agents refuse a snapshot that contradicts itself. Here a workload comes before a service, and of
/// two services at one address and port the older one has it, so that an address in use cannot be
/// taken over by adding a service. The other one loses the address, and is reported.
pub fn services<'a>(
    found: impl IntoIterator<Item = &'a Service>,
    workloads: &HashMap<IpAddr, String>,
) -> (Vec<api::Service>, Vec<Problem>) {
    let mut found: Vec<_> =
        found.into_iter().filter_map(|found| Some((found, service(found)?))).collect();
    let key = |service: &api::Service| (service.namespace.clone(), service.name.clone());
    found.sort_by_cached_key(|(found, service)| {
        (found.metadata.creation_timestamp.clone(), key(service))
    });
    let (mut services, mut problems) = (Vec::new(), Vec::new());
    let mut taken: HashMap<(IpAddr, u32), String> = HashMap::new();
    for (found, mut service) in found {
        let name = format!("{}/{}", service.namespace, service.name);
        for address in addresses(found) {
            let at = |port: &api::ServicePort| (address, port.port);
            let other = service.ports.iter().find_map(|port| taken.get(&at(port)));
            let reason = if !is_host(address) {
                format!("{address} is not an address to connect to")
            } else if let Some(workload) = workloads.get(&address) {
                format!("the address {address} is the workload {workload}'s")
            } else if let Some(other) = other {
                format!("the address {address} is the older service {other}'s, at the same port")
            } else {
                taken.extend(service.ports.iter().map(|port| (at(port), name.clone())));
                service.addresses.push(address.to_string());
                continue;
            };
            problems.push(Problem { file: format!("service {name}"), reason });
        }
        if !service.addresses.is_empty() {
            services.push(service);
        }
    }
    services.sort_by_cached_key(key);
    problems.sort_by(|a, b| (&a.file, &a.reason).cmp(&(&b.file, &b.reason)));
    (services, problems)
}

/// A service, without its addresses. None if it has no TCP port.
fn service(found: &Service) -> Option<api::Service> {
    let spec = found.spec.as_ref()?;
    let ports = ports(
        spec.ports
            .iter()
            .flatten()
            .map(|port| (port.name.as_deref(), Some(port.port), port.protocol.as_deref())),
    );
    if ports.is_empty() {
        return None;
    }
    let affinity = spec.session_affinity.as_deref() == Some("ClientIP");
    let timeout =
        spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
    let timeout = timeout.and_then(|config| config.timeout_seconds).unwrap_or(AFFINITY_SECONDS);
    let locality =
        locality(spec.internal_traffic_policy.as_deref(), spec.traffic_distribution.as_deref());
    Some(api::Service {
        namespace: found.metadata.namespace.clone()?,
        name: found.metadata.name.clone()?,
        addresses: Vec::new(),
        ports,
        client_ip_affinity_seconds: u32::try_from(timeout).ok().filter(|_| affinity).unwrap_or(0),
        locality: locality.into(),
        not_ready_too: spec.publish_not_ready_addresses.unwrap_or_default(),
    })
}

/// A headless service has none: its "None" is not an address.
fn addresses(found: &Service) -> BTreeSet<IpAddr> {
    let spec = found.spec.iter();
    let of_spec = spec.flat_map(|spec| spec.cluster_ips.iter().chain(&spec.external_ips).flatten());
    let ingress = found.status.iter().filter_map(|status| status.load_balancer.as_ref());
    let ingress = ingress.flat_map(|balancer| balancer.ingress.iter().flatten());
    of_spec
        .chain(ingress.filter_map(|ingress| ingress.ip.as_ref()))
        .filter_map(|address| address.parse().ok())
        .map(|address: IpAddr| address.to_canonical())
        .collect()
}

fn locality(policy: Option<&str>, distribution: Option<&str>) -> Locality {
    match (policy, distribution) {
        (Some("Local"), _) => Locality::SameNodeOnly,
        (_, Some("PreferSameZone" | "PreferClose")) => Locality::SameZoneFirst,
        (_, Some("PreferSameNode")) => Locality::SameNodeFirst,
        (_, _) => Locality::Anywhere,
    }
}

/// A slice of a service's endpoints. None if it belongs to none, or has names instead of addresses.
pub fn slice(found: &EndpointSlice) -> Option<api::EndpointSlice> {
    let metadata = &found.metadata;
    if found.address_type == "FQDN" {
        return None;
    }
    Some(api::EndpointSlice {
        namespace: metadata.namespace.clone()?,
        name: metadata.name.clone()?,
        service: metadata.labels.as_ref()?.get(SERVICE_NAME)?.clone(),
        ports: ports(
            found
                .ports
                .iter()
                .flatten()
                .map(|port| (port.name.as_deref(), port.port, port.protocol.as_deref())),
        ),
        endpoints: found.endpoints.iter().flat_map(endpoints).collect(),
    })
}

fn endpoints(found: &Endpoint) -> impl Iterator<Item = api::Endpoint> {
    let conditions = found.conditions.clone().unwrap_or_default();
    // What is not said means ready; serving follows ready (the API's rules).
    let ready = conditions.ready.unwrap_or(true);
    found.addresses.iter().filter_map(move |address| {
        let address = address.parse::<IpAddr>().ok()?.to_canonical();
        // Whoever may write slices may write anything.
        is_host(address).then(|| api::Endpoint {
            address: address.to_string(),
            node: found.node_name.clone().unwrap_or_default(),
            zone: found.zone.clone().unwrap_or_default(),
            ready,
            serving: conditions.serving.unwrap_or(ready),
            terminating: conditions.terminating.unwrap_or_default(),
        })
    })
}

/// A node.
pub fn node(found: &Node) -> Option<api::Node> {
    let zone = found.metadata.labels.as_ref().and_then(|labels| labels.get(ZONE));
    let zone = zone.cloned().unwrap_or_default();
    Some(api::Node { name: found.metadata.name.clone()?, zone })
}

/// The TCP ports, of names, numbers and protocols. TCP is also what is meant if nothing is said.
fn ports<'a>(
    found: impl Iterator<Item = (Option<&'a str>, Option<i32>, Option<&'a str>)>,
) -> Vec<api::ServicePort> {
    found
        .filter(|(_, _, protocol)| protocol.is_none_or(|protocol| protocol == "TCP"))
        .filter_map(|(name, port, _)| {
            let port = u16::try_from(port?).ok().filter(|port| *port != 0)?.into();
            Some(api::ServicePort { name: name.unwrap_or_default().to_owned(), port })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// A service `shop/<name>` that was made on that day.
    fn made(name: &str, day: u8, spec: Value, ingress: Value) -> Service {
        let service = json!({
            "metadata": {
                "namespace": "shop", "name": name,
                "creationTimestamp": format!("2026-01-{day:02}T00:00:00Z"),
            },
            "spec": spec,
            "status": {"loadBalancer": {"ingress": ingress}},
        });
        serde_json::from_value(service).unwrap()
    }

    fn of(spec: Value) -> Option<api::Service> {
        let ingress = json!([{"ip": "192.0.2.9"}, {"hostname": "x"}]);
        let (mut found, problems) = services(&[made("cart", 1, spec, ingress)], &HashMap::new());
        assert_eq!(problems, []);
        found.pop()
    }

    #[test]
    fn a_service_has_all_its_addresses_and_only_tcp() {
        let found = of(json!({
            "clusterIPs": ["10.96.0.9", "fd00::9"], "externalIPs": ["192.0.2.8"],
            "ports": [{"name": "http", "port": 80}, {"port": 53, "protocol": "UDP"}],
            "sessionAffinity": "ClientIP",
            "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}},
            "publishNotReadyAddresses": true,
        }))
        .unwrap();
        assert_eq!(found.addresses, ["10.96.0.9", "192.0.2.8", "192.0.2.9", "fd00::9"]);
        assert_eq!(found.ports, [api::ServicePort { name: "http".to_owned(), port: 80 }]);
        assert_eq!((found.client_ip_affinity_seconds, found.not_ready_too), (60, true));
        let spec = json!({"clusterIPs": ["10.96.0.9"], "ports": [{"port": 53, "protocol": "UDP"}]});
        assert_eq!(of(spec), None);
    }

    #[test]
    fn headless_services_are_left_out() {
        let spec = json!({"clusterIPs": ["None"], "ports": [{"port": 80}]});
        let (found, problems) = services(&[made("cart", 1, spec, json!([]))], &HashMap::new());
        assert_eq!((found, problems), (Vec::new(), Vec::new()));
    }

    #[test]
    fn an_address_is_the_workload_s_then_the_older_service_s() {
        let spec = |ip: &str, port: u16, external: &[&str]| json!({"clusterIPs": [ip], "ports": [{"port": port}], "externalIPs": external});
        let none = || json!([]);
        let mut cluster = vec![
            made("z-first", 1, spec("10.96.0.1", 80, &["192.0.2.1"]), none()),
            made("beside", 2, spec("10.96.0.2", 81, &["192.0.2.1"]), none()),
            made("a-thief", 3, spec("10.96.0.3", 80, &["192.0.2.1", "10.0.0.7"]), none()),
            made("nothing", 4, spec("10.96.0.1", 80, &["127.0.0.1"]), none()),
        ];
        let workloads = HashMap::from([("10.0.0.7".parse().unwrap(), "shop/cart-0".to_owned())]);
        let (found, problems) = services(&cluster, &workloads);
        let addresses: Vec<_> =
            found.iter().map(|s| (s.name.as_str(), s.addresses.join(" "))).collect();
        assert_eq!(
            addresses,
            [
                ("a-thief", "10.96.0.3".to_owned()),
                ("beside", "10.96.0.2 192.0.2.1".to_owned()),
                ("z-first", "10.96.0.1 192.0.2.1".to_owned()),
            ]
        );
        let texts: Vec<_> = problems.iter().map(ToString::to_string).collect();
        assert_eq!(
            texts,
            [
                "service shop/a-thief: the address 10.0.0.7 is the workload shop/cart-0's",
                "service shop/a-thief: the address 192.0.2.1 is the older service shop/z-first's, \
                 at the same port",
                "service shop/nothing: 127.0.0.1 is not an address to connect to",
                "service shop/nothing: the address 10.96.0.1 is the older service shop/z-first's, \
                 at the same port",
            ]
        );
        cluster.reverse();
        assert_eq!(services(&cluster, &workloads), (found, problems), "whatever the order");
    }

    #[test]
    fn the_stricter_locality_wins() {
        for (policy, distribution, expected) in [
            (None, None, Locality::Anywhere),
            (Some("Cluster"), Some("PreferClose"), Locality::SameZoneFirst),
            (None, Some("PreferSameZone"), Locality::SameZoneFirst),
            (None, Some("PreferSameNode"), Locality::SameNodeFirst),
            (Some("Local"), Some("PreferClose"), Locality::SameNodeOnly),
            (None, Some("Unheard"), Locality::Anywhere),
        ] {
            assert_eq!(locality(policy, distribution), expected, "{policy:?} {distribution:?}");
        }
    }

    #[test]
    fn endpoints_are_ready_unless_said_otherwise() {
        let of = |address_type: &str, labels: Value| {
            let value = json!({
                "metadata": {"namespace": "shop", "name": "cart-1", "labels": labels},
                "addressType": address_type,
                "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}, {"port": 53, "protocol": "UDP"}],
                "endpoints": [
                    {"addresses": ["10.0.0.7"], "nodeName": "n1", "zone": "z1"},
                    {"addresses": ["127.0.0.1"]},
                    {"addresses": ["10.0.0.8"],
                     "conditions": {"ready": false, "serving": true, "terminating": true}},
                ],
            });
            slice(&serde_json::from_value(value).unwrap())
        };
        let of_cart = json!({"kubernetes.io/service-name": "cart"});
        let found = of("IPv4", of_cart.clone()).unwrap();
        assert_eq!((found.service.as_str(), found.ports.len()), ("cart", 1));
        let states: Vec<_> =
            found.endpoints.iter().map(|e| (e.ready, e.serving, e.terminating)).collect();
        assert_eq!(states, [(true, true, false), (false, true, true)]);
        assert_eq!(
            (found.endpoints[0].node.as_str(), found.endpoints[0].zone.as_str()),
            ("n1", "z1")
        );
        assert_eq!(of("FQDN", of_cart), None);
        assert_eq!(of("IPv4", json!({})), None);
    }

    #[test]
    fn a_node_has_a_zone_or_none() {
        let value =
            json!({"metadata": {"name": "n1", "labels": {"topology.kubernetes.io/zone": "z"}}});
        let found = node(&serde_json::from_value(value).unwrap()).unwrap();
        assert_eq!((found.name.as_str(), found.zone.as_str()), ("n1", "z"));
    }
}
