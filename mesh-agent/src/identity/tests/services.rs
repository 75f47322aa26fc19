//! What makes the services of a snapshot, and what makes them unusable.

use std::net::SocketAddr;

use mesh_common::api;

use super::{
    super::{registry::*, services::*},
    fake::workload,
    registry::snapshot,
};

fn port(name: &str, port: u32) -> api::ServicePort {
    api::ServicePort { name: name.to_owned(), port }
}

fn service(name: &str, addresses: &[&str], ports: &[(&str, u32)]) -> api::Service {
    api::Service {
        namespace: "shop".to_owned(),
        name: name.to_owned(),
        addresses: addresses.iter().map(|&address| address.to_owned()).collect(),
        ports: ports.iter().map(|&(name, number)| port(name, number)).collect(),
        ..Default::default()
    }
}

fn endpoint(address: &str) -> api::Endpoint {
    let address = address.to_owned();
    api::Endpoint { address, ready: true, serving: true, ..Default::default() }
}

fn slice(name: &str, ports: &[(&str, u32)], endpoints: Vec<api::Endpoint>) -> api::EndpointSlice {
    api::EndpointSlice {
        namespace: "shop".to_owned(),
        name: name.to_owned(),
        service: name.split('-').next().unwrap_or_default().to_owned(),
        ports: ports.iter().map(|&(name, number)| port(name, number)).collect(),
        endpoints,
    }
}

/// A dual-stack service with two ports, behind it two slices that name different target ports.
fn good() -> api::Snapshot {
    let services = vec![
        service("cart", &["10.96.0.1", "fd96::1"], &[("http", 80), ("admin", 81)]),
        service("till", &["10.96.0.2"], &[("", 80)]),
    ];
    let slices = vec![
        slice("cart-0", &[("http", 8080)], vec![endpoint("10.0.0.1"), endpoint("fd00::1")]),
        slice("cart-1", &[("http", 8081), ("admin", 9)], vec![endpoint("::ffff:10.0.0.2")]),
    ];
    let zone = |name: &str, zone: &str| api::Node { name: name.to_owned(), zone: zone.to_owned() };
    let nodes = vec![zone("n1", "z1"), zone("n2", "")];
    let workloads = vec![workload("a", 1), workload("b", 2)];
    api::Snapshot { services, endpoint_slices: slices, nodes, ..snapshot(workloads) }
}

fn port_at(snapshot: &Snapshot, address: &str) -> Option<Vec<String>> {
    match snapshot.services().find(address.parse().unwrap()) {
        Found::Port(port) => {
            Some(port.endpoints.iter().map(|endpoint| endpoint.address.to_string()).collect())
        }
        Found::NoPort => None,
        Found::Nothing => panic!("{address} is no service's"),
    }
}

#[test]
fn slices_are_merged_by_the_name_of_the_port() {
    let snapshot = Snapshot::try_from(good()).unwrap();
    for (address, expected) in [
        ("10.96.0.1:80", Some(vec!["10.0.0.1:8080", "10.0.0.2:8081"])),
        ("[::ffff:10.96.0.1]:80", Some(vec!["10.0.0.1:8080", "10.0.0.2:8081"])),
        ("10.96.0.1:81", Some(vec!["10.0.0.2:9"])),
        ("[fd96::1]:80", Some(vec!["[fd00::1]:8080"])),
        ("[fd96::1]:81", Some(vec![])),
        ("10.96.0.2:80", Some(vec![])),
        ("10.96.0.1:8080", None),
        ("[fd96::1]:8080", None),
    ] {
        let expected = expected.map(|all| all.into_iter().map(str::to_owned).collect());
        assert_eq!(port_at(&snapshot, address), expected, "{address}");
    }
    for address in ["10.0.0.1:80", "10.96.0.3:80", "[fd96::2]:80"] {
        let found = snapshot.services().find(address.parse::<SocketAddr>().unwrap());
        assert_eq!(found, Found::Nothing, "{address}");
    }
    assert_eq!(snapshot.services().zone("n1"), Some("z1"));
    assert_eq!((snapshot.services().zone("n2"), snapshot.services().zone("n3")), (None, None));
}

#[test]
fn what_a_choice_needs_is_kept() {
    let mut message = good();
    let cart = &mut message.services[0];
    (cart.client_ip_affinity_seconds, cart.not_ready_too) = (30, true);
    cart.set_locality(api::Locality::SameNodeFirst);
    let on = |node: &str, zone: &str| api::Endpoint {
        node: node.to_owned(),
        zone: zone.to_owned(),
        ..endpoint("10.0.0.3")
    };
    message.endpoint_slices[0].endpoints = vec![on("n1", "")];
    message.endpoint_slices[1].endpoints =
        vec![api::Endpoint { address: "10.0.0.4".to_owned(), ..on("n2", "z2") }];
    let snapshot = Snapshot::try_from(message).unwrap();
    let Found::Port(port) = snapshot.services().find("10.96.0.1:80".parse().unwrap()) else {
        panic!("the port is gone")
    };
    assert_eq!(&*port.name, "shop/cart:80");
    assert_eq!(port.affinity.map(|affinity| affinity.as_secs()), Some(30));
    assert!(port.not_ready_too && port.locality == api::Locality::SameNodeFirst);
    let places: Vec<_> = port.endpoints.iter().map(|e| (&*e.node, &*e.zone)).collect();
    assert_eq!(places, [("n1", "z1"), ("n2", "z2")], "a node's zone is its endpoints'");
}

#[test]
fn readiness_is_kube_proxy_s() {
    use Readiness::{Leaving, NotReady, Ready};
    for (ready, serving, terminating, expected) in [
        (true, true, false, Ready),
        (true, false, false, Ready),
        (true, true, true, Leaving),
        (false, true, true, Leaving),
        (false, true, false, NotReady),
        (false, false, true, NotReady),
        (true, false, true, NotReady),
        (false, false, false, NotReady),
    ] {
        let mut message = good();
        let word = api::Endpoint { ready, serving, terminating, ..endpoint("10.0.0.2") };
        // The other slice says worse of the same endpoint.
        let gone = api::Endpoint { ready: false, serving: false, ..endpoint("10.0.0.2") };
        message.endpoint_slices[0] = slice("cart-0", &[("admin", 9)], vec![gone]);
        message.endpoint_slices[1].endpoints = vec![word];
        let snapshot = Snapshot::try_from(message).unwrap();
        let Found::Port(port) = snapshot.services().find("10.96.0.1:81".parse().unwrap()) else {
            panic!("the port is gone")
        };
        let [endpoint] = &port.endpoints[..] else { panic!("{:?}", port.endpoints) };
        assert_eq!(endpoint.readiness, expected, "{ready} {serving} {terminating}");
    }
}

#[test]
fn one_bad_service_spoils_the_whole() {
    type Change = fn(&mut api::Snapshot);
    let cases: [(&str, Change); 15] = [
        ("services have the name shop/cart", |s| s.services[1].name = "cart".into()),
        ("both at 10.96.0.1:80", |s| s.services[1].addresses.push("10.96.0.1".into())),
        ("both at 10.96.0.1:80", |s| s.services[1].addresses[0] = "::ffff:10.96.0.1".into()),
        ("both at 10.96.0.1:80", |s| s.services[0].ports[1].port = 80),
        ("both at 10.96.0.2:80", |s| s.services[1].addresses.push("10.96.0.2".into())),
        ("of the workload \"a\"", |s| s.services[0].addresses.push("10.0.0.1".into())),
        ("of the workload \"b\"", |s| s.services[1].addresses[0] = "::ffff:10.0.0.2".into()),
        ("\"x\" is not an address", |s| s.services[0].addresses[0] = "x".into()),
        ("\"127.0.0.1\" is not", |s| s.services[0].addresses[0] = "127.0.0.1".into()),
        ("0 is no port", |s| s.services[0].ports[0].port = 0),
        ("65536 is no port", |s| s.endpoint_slices[0].ports[0].port = 65536),
        ("\"::\" is not", |s| s.endpoint_slices[0].endpoints[0].address = "::".into()),
        ("slices have the name shop/cart-0", |s| s.endpoint_slices[1].name = "cart-0".into()),
        ("ports have the name", |s| s.endpoint_slices[1].ports[0].name = "admin".into()),
        ("nodes have the name n1", |s| s.nodes[1].name = "n1".into()),
    ];
    for (expected, change) in cases {
        let mut message = good();
        change(&mut message);
        let refusal = Snapshot::try_from(message).unwrap_err().to_string();
        assert!(refusal.contains(expected), "{refusal:?} does not say {expected:?}");
    }
    let mut message = good();
    // One load balancer may be in front of two services.
    message.services[0].ports.remove(0);
    message.services[1].addresses.push("10.96.0.1".into());
    Snapshot::try_from(message).unwrap();
}
