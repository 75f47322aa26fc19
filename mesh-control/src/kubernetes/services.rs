//! Services, their endpoints and the nodes' zones, as agents get them: pure functions.

use std::{
    collections::{BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use k8s_openapi::api::{
    core::v1::{Node, Service},
    discovery::v1::{Endpoint, EndpointSlice},
};
use mesh_common::api::{self, Locality};

use crate::{registry::is_host, services::Claim};

/// The label by which a slice names its service.
const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// The label of a node's zone.
const ZONE: &str = "topology.kubernetes.io/zone";

/// The control plane's own Service, and its port for agents, as in the chart.
const CONTROL: &str = "nodemesh-control";
const CONTROL_PORT: &str = "grpc";

/// Kubernetes' own default for the ClientIP affinity, in seconds.
const AFFINITY_SECONDS: i32 = 10_800;

/// Who wants which service, the oldest first: so that an address in use cannot be taken over by
/// adding a service. Services without an address or a TCP port are left out.
pub fn claims<'a>(
    services: impl IntoIterator<Item = &'a Service>,
    slices: impl IntoIterator<Item = &'a Arc<api::EndpointSlice>>,
) -> Vec<Claim> {
    let mut theirs: HashMap<_, Vec<_>> = HashMap::new();
    for slice in slices {
        let key = (slice.namespace.as_str(), slice.service.as_str());
        theirs.entry(key).or_default().push(Arc::clone(slice));
    }
    let mut found: Vec<_> = services
        .into_iter()
        .filter_map(|found| {
            let service = service(found)?;
            let metadata = &found.metadata;
            let key = (metadata.namespace.as_deref()?, metadata.name.as_deref()?);
            let slices = theirs.remove(&key).unwrap_or_default();
            let origin = format!("service {}/{}", key.0, key.1);
            let age = found.metadata.creation_timestamp.clone();
            Some(((age, key), Claim { origin, service, slices }))
        })
        .collect();
    found.sort_by(|(a, _), (b, _)| a.cmp(b));
    found.into_iter().map(|(_, claim)| claim).collect()
}

/// None without an address or a TCP port: the "None" of a headless service is not an address.
fn service(found: &Service) -> Option<api::Service> {
    let spec = found.spec.as_ref()?;
    let ports = ports(
        spec.ports
            .iter()
            .flatten()
            .map(|port| (port.name.as_deref(), Some(port.port), port.protocol.as_deref())),
    );
    let addresses: Vec<_> = addresses(found).iter().map(ToString::to_string).collect();
    if ports.is_empty() || addresses.is_empty() {
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
        addresses,
        ports,
        client_ip_affinity_seconds: u32::try_from(timeout).ok().filter(|_| affinity).unwrap_or(0),
        locality: locality.into(),
        not_ready_too: spec.publish_not_ready_addresses.unwrap_or_default(),
    })
}

/// In an order that does not depend on the API server's.
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

/// Where the replicas of the control plane listen, by the slices of their own Service. Each once: of
/// two address families IPv4. Those that are not ready, too.
pub fn replicas<'a>(
    slices: impl IntoIterator<Item = &'a Arc<api::EndpointSlice>>,
    own_namespace: &str,
) -> BTreeSet<SocketAddr> {
    let own = slices
        .into_iter()
        .filter(|slice| slice.namespace == own_namespace && slice.service == CONTROL);
    let addresses = own.flat_map(|slice| {
        let port = slice.ports.iter().find(|port| port.name == CONTROL_PORT);
        let port = port.and_then(|port| u16::try_from(port.port).ok());
        let of = move |endpoint: &api::Endpoint| {
            Some(SocketAddr::new(endpoint.address.parse().ok()?, port?))
        };
        slice.endpoints.iter().filter_map(of)
    });
    let (v4, v6): (BTreeSet<_>, BTreeSet<_>) = addresses.partition(SocketAddr::is_ipv4);
    if v4.is_empty() { v6 } else { v4 }
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
    use crate::{registry::Registry, services::resolve};

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
        claims(&[made("cart", 1, spec, ingress)], &[]).pop().map(|claim| claim.service)
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
        assert_eq!(claims(&[made("cart", 1, spec, json!([]))], &[]), []);
    }

    #[test]
    fn an_address_is_the_older_service_s() {
        let spec = |ip: &str| json!({"clusterIPs": [ip], "ports": [{"port": 80}], "externalIPs": ["192.0.2.1"]});
        let mut cluster = vec![
            made("z-first", 1, spec("10.96.0.1"), json!([])),
            made("a-thief", 2, spec("10.96.0.2"), json!([])),
        ];
        let found = claims(&cluster, &[]);
        let (services, problems) = resolve(&found, &[], &Registry::default());
        let addresses: Vec<_> =
            services.services.iter().map(|s| (s.name.as_str(), s.addresses.join(" "))).collect();
        let expected = [("a-thief", "10.96.0.2"), ("z-first", "10.96.0.1 192.0.2.1")];
        assert_eq!(addresses, expected.map(|(name, all)| (name, all.to_owned())));
        let texts: Vec<_> = problems.iter().map(ToString::to_string).collect();
        let expected =
            "service shop/a-thief: 192.0.2.1:80 is taken by service shop/z-first already";
        assert_eq!(texts, [expected]);
        cluster.reverse();
        assert_eq!(claims(&cluster, &[]), found, "whatever the order");
    }

    #[test]
    fn slices_go_with_their_service_and_nowhere_else() {
        let of = |namespace: &str, name: &str| {
            let value = json!({
                "metadata": {"namespace": namespace, "name": name,
                             "labels": {"kubernetes.io/service-name": "cart"}},
                "addressType": "IPv4", "endpoints": [],
            });
            Arc::new(slice(&serde_json::from_value(value).unwrap()).unwrap())
        };
        let slices = [of("shop", "cart-1"), of("other", "cart-2"), of("shop", "cart-3")];
        let cart = made(
            "cart",
            1,
            json!({"clusterIPs": ["10.96.0.9"], "ports": [{"port": 80}]}),
            json!([]),
        );
        let found = claims(&[cart], &slices);
        let names: Vec<_> = found[0].slices.iter().map(|slice| slice.name.as_str()).collect();
        assert_eq!((found.len(), names), (1, vec!["cart-1", "cart-3"]));
    }

    #[test]
    fn replicas_are_the_endpoints_of_the_own_service() {
        let of = |namespace: &str, service: &str, ips: &[&str]| {
            let endpoint = |ip| json!({"addresses": [ip], "conditions": {"ready": false}});
            let value = json!({
                "metadata": {
                    "namespace": namespace, "name": "x",
                    "labels": {"kubernetes.io/service-name": service},
                },
                "addressType": "IPv4",
                "ports": [{"name": "http", "port": 9464}, {"name": "grpc", "port": 8443}],
                "endpoints": ips.iter().map(endpoint).collect::<Vec<_>>(),
            });
            Arc::new(slice(&serde_json::from_value(value).unwrap()).unwrap())
        };
        let own = "nodemesh-system";
        let slices = [
            of(own, "nodemesh-control", &["fd00::1", "fd00::2"]),
            of(own, "nodemesh-control", &["10.0.0.2", "10.0.0.1"]),
            of(own, "other", &["10.0.0.8"]),
            of("shop", "nodemesh-control", &["10.0.0.9"]),
        ];
        let of = |slices: &[Arc<api::EndpointSlice>]| {
            replicas(slices, own).iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(of(&slices), ["10.0.0.1:8443", "10.0.0.2:8443"]);
        assert_eq!(of(&slices[..1]), ["[fd00::1]:8443", "[fd00::2]:8443"]);
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
