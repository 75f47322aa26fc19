use std::{collections::BTreeSet, time::Duration};

use rand::{SeedableRng as _, rngs::StdRng};

use super::*;
use crate::identity::Readiness::{Leaving, NotReady, Ready};

const HERE: Place<'_> = Place { node: "n1", zone: Some("z1") };
const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));

fn address(number: u8) -> SocketAddr {
    SocketAddr::from(([10, 1, 0, number], 80))
}

fn port(locality: Locality, endpoints: &[(Readiness, &str, &str)]) -> ServicePort {
    let endpoints = endpoints.iter().zip(1..).map(|(&(readiness, node, zone), number)| Endpoint {
        address: address(number),
        node: node.into(),
        zone: zone.into(),
        readiness,
    });
    ServicePort {
        name: "shop/cart:80".into(),
        affinity: None,
        locality,
        not_ready_too: false,
        endpoints: endpoints.collect(),
    }
}

fn numbers(endpoints: &[&Endpoint]) -> Vec<u8> {
    let last = |ip| if let IpAddr::V4(ip) = ip { ip.octets()[3] } else { 0 };
    endpoints.iter().map(|endpoint| last(endpoint.address.ip())).collect()
}

fn found(port: &ServicePort, excluded: &[u8]) -> Vec<u8> {
    let excluded = |tried| excluded.iter().any(|number| address(*number) == tried);
    numbers(&candidates(port, HERE, excluded))
}

#[test]
fn the_ready_serve_and_else_those_who_leave() {
    let mut port = port(
        Locality::Anywhere,
        &[(NotReady, "", ""), (Leaving, "", ""), (Ready, "", ""), (Ready, "", "")],
    );
    assert_eq!(found(&port, &[]), [3, 4]);
    assert_eq!(found(&port, &[3]), [4]);
    assert!(found(&port, &[3, 4]).is_empty(), "a ready one that fails makes no other ready");
    port.endpoints.truncate(2);
    assert_eq!(found(&port, &[]), [2]);
    port.endpoints.truncate(1);
    assert!(found(&port, &[]).is_empty());
    port.not_ready_too = true;
    assert_eq!(found(&port, &[]), [1]);
}

#[test]
fn all_serve_where_the_service_says_so() {
    let mut port =
        port(Locality::Anywhere, &[(NotReady, "", ""), (Leaving, "", ""), (Ready, "", "")]);
    port.not_ready_too = true;
    assert_eq!(found(&port, &[]), [1, 2, 3]);
}

#[test]
fn only_the_own_node_is_strict() {
    let mut port = port(
        Locality::SameNodeOnly,
        &[(Ready, "n2", "z1"), (Leaving, "n1", "z1"), (Ready, "n1", "z1")],
    );
    assert_eq!(found(&port, &[]), [3]);
    assert!(found(&port, &[3]).is_empty());
    port.endpoints.truncate(2);
    assert_eq!(found(&port, &[]), [2], "one who leaves, but here");
    port.endpoints.truncate(1);
    assert!(found(&port, &[]).is_empty());
}

#[test]
fn nearness_is_a_preference() {
    let all = [(Ready, "n3", "z2"), (Ready, "n2", "z1"), (Ready, "n1", "z1"), (Leaving, "n1", "")];
    for (locality, expected) in [
        (Locality::Anywhere, [&[1, 2, 3][..], &[1, 2], &[1]]),
        (Locality::SameZoneFirst, [&[2, 3], &[2], &[1]]),
        (Locality::SameNodeFirst, [&[3], &[2], &[1]]),
    ] {
        let port = port(locality, &all);
        for (excluded, expected) in [&[][..], &[3], &[3, 2]].into_iter().zip(expected) {
            assert_eq!(found(&port, excluded), expected, "{locality:?} {excluded:?}");
        }
    }
    // Nobody is in a zone, or on a node, that is not known.
    let port = port(Locality::SameZoneFirst, &[(Ready, "", ""), (Ready, "n2", "z1")]);
    let nowhere = Place { node: "n9", zone: None };
    assert_eq!(numbers(&candidates(&port, nowhere, |_| false)), [1, 2]);
}

#[test]
fn the_less_loaded_of_two_is_chosen() {
    let port = port(Locality::Anywhere, &[(Ready, "", ""); 3]);
    let all = candidates(&port, HERE, |_| false);
    let mut rng = StdRng::seed_from_u64(7);
    let mut draw = |all: &[&Endpoint], loads: [usize; 3]| {
        let load = |a| all.iter().position(|e| e.address == a).map_or(0, |at| loads[at]);
        (0..200).filter_map(|_| choose(all, load, &mut rng)).map(|e| e.address).collect::<Vec<_>>()
    };
    let even: BTreeSet<_> = draw(&all, [1, 1, 1]).into_iter().collect();
    assert_eq!(even.len(), 3, "all of them get their share");
    let uneven = draw(&all, [5, 1, 0]);
    assert!(!uneven.contains(&address(1)), "there is always a lighter one");
    assert!(uneven.contains(&address(2)), "when it was not drawn with the lightest");
    assert_eq!(draw(&all[..1], [9, 0, 0]), vec![address(1); 200]);
    assert!(draw(&[], [0; 3]).is_empty());
}

#[test]
fn open_connections_are_counted_and_nothing_stays() {
    let port = port(Locality::Anywhere, &[(Ready, "", ""); 2]);
    let all = candidates(&port, HERE, |_| false);
    let (balancer, mut rng) = (Arc::new(Balancer::new("n1")), StdRng::seed_from_u64(7));
    let mut open: Vec<_> = (0..10)
        .filter_map(|_| balancer.choose(&port, &all, CLIENT, Instant::now(), &mut rng))
        .collect();
    let loads =
        |balancer: &Balancer| [1, 2].map(|n| balancer.state().loads.get(&address(n)).copied());
    assert_eq!(loads(&balancer), [Some(5), Some(5)], "with two, each is compared with the other");
    open.retain(|chosen| chosen.address() == address(2));
    assert_eq!(loads(&balancer), [None, Some(5)]);
    drop(open);
    assert!(balancer.state().loads.is_empty());
}

#[test]
fn a_client_keeps_its_endpoint_while_it_is_a_candidate() {
    let mut port = port(Locality::Anywhere, &[(Ready, "", ""); 8]);
    port.affinity = Some(Duration::from_secs(10));
    let (balancer, mut rng) = (Arc::new(Balancer::new("n1")), StdRng::seed_from_u64(7));
    let mut now = Instant::now();
    let all = candidates(&port, HERE, |_| false);
    let mut choose = |all: &[&Endpoint], client, now| {
        let chosen = balancer.choose(&port, all, client, now, &mut rng);
        chosen.map(|chosen| chosen.address())
    };
    let first = choose(&all, CLIENT, now).unwrap();
    // Each connection begins the time anew.
    for _ in 0..5 {
        now += Duration::from_secs(9);
        assert_eq!(choose(&all, CLIENT, now), Some(first));
    }
    let others: BTreeSet<_> =
        (2..40).filter_map(|n| choose(&all, [10, 0, 0, n].into(), now)).collect();
    assert!(others.len() > 1, "another client has a choice of its own");

    let rest = candidates(&port, HERE, |tried| tried == first);
    let second = choose(&rest, CLIENT, now).unwrap();
    assert_ne!(second, first);
    assert_eq!(choose(&all, CLIENT, now), Some(second), "the choice is a new one");
    now += Duration::from_secs(10);
    let later: BTreeSet<_> = (0..40)
        .filter_map(|_| {
            now += Duration::from_secs(10);
            choose(&all, CLIENT, now)
        })
        .collect();
    assert!(later.len() > 1, "nothing is kept for longer than the service says");
}
