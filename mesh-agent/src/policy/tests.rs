use std::{net::Ipv6Addr, sync::LazyLock, time::SystemTime};

use mesh_common::{api, svid::PodRef};
use proptest::prelude::*;

use super::*;

const CLIENT: &str = "client-uid";
const SERVER: &str = "server-uid";
/// A pod whose address is in none of the cluster's ranges.
const FAR: &str = "far-uid";

fn registry() -> &'static Snapshot {
    static REGISTRY: LazyLock<Snapshot> = LazyLock::new(|| {
        let mut root = rcgen::CertificateParams::default();
        root.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        root.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
        let root = root.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap();
        let workload = |uid: &str, name: &str, addresses: &[&str]| api::Workload {
            uid: uid.to_owned(),
            namespace: "shop".to_owned(),
            service_account: name.to_owned(),
            name: format!("{name}-0"),
            node: "node-1".to_owned(),
            addresses: addresses.iter().map(|&a| a.to_owned()).collect(),
            owner: String::new(),
        };
        api::Snapshot {
            version: 1,
            bundle: Some(api::TrustBundle {
                trust_domain: "td".to_owned(),
                roots: vec![root.der().to_vec()],
            }),
            workloads: vec![
                workload(CLIENT, "client", &["10.1.0.1", "fd00::1"]),
                workload(SERVER, "server", &["10.1.0.2", "fd00::2"]),
                workload(FAR, "far", &["192.0.2.7"]),
            ],
            settings: Some(api::Settings { svid_lifetime_seconds: 14_400 }),
            ..Default::default()
        }
        .try_into()
        .unwrap()
    });
    &REGISTRY
}

fn ranges(list: &[&str]) -> AddressRanges {
    list.iter().map(|range| range.parse().unwrap()).collect::<Vec<_>>().try_into().unwrap()
}

fn policy(egress: Egress) -> Policy {
    Policy {
        cluster: ranges(&["10.0.0.0/8", "fd00::/8"]),
        egress,
        plaintext_ingress: vec![PlaintextIngress {
            ranges: ranges(&["10.9.0.0/16", "10.1.0.1/32"]),
            ports: serde_json::from_str("[8080]").unwrap(),
        }],
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn egress(source: &str, destination: &str, mode: Egress) -> Verdict {
    let destination = SocketAddr::new(ip(destination), 80);
    policy(mode).egress(CLIENT, ip(source), destination, registry())
}

fn peer(uid: &str) -> Verdict {
    Verdict::Mesh(Arc::clone(registry().by_uid(uid).unwrap()))
}

#[test]
fn egress_by_destination() {
    use DenyReason as Deny;
    let outside = Verdict::Plaintext(PlaintextReason::OutsideCluster);
    for (destination, allow, deny) in [
        ("10.1.0.2", peer(SERVER), peer(SERVER)),
        ("::ffff:10.1.0.2", peer(SERVER), peer(SERVER)),
        ("fd00::2", peer(SERVER), peer(SERVER)),
        ("192.0.2.7", peer(FAR), peer(FAR)),
        ("198.51.100.1", outside.clone(), Verdict::Deny(Deny::EgressDenied)),
        ("2001:db8::1", outside, Verdict::Deny(Deny::EgressDenied)),
    ] {
        assert_eq!(egress("10.1.0.1", destination, Egress::Allow), allow, "{destination}");
        assert_eq!(egress("10.1.0.1", destination, Egress::Deny), deny, "{destination}");
    }
    for (destination, reason) in [
        ("10.1.0.3", Deny::UnknownInCluster),
        ("::ffff:10.1.0.3", Deny::UnknownInCluster),
        ("fd12::3", Deny::UnknownInCluster),
        ("10.1.0.1", Deny::NoRemoteAddress),
        ("fd00::1", Deny::NoRemoteAddress),
        ("127.0.0.1", Deny::NoRemoteAddress),
        ("::ffff:127.0.0.1", Deny::NoRemoteAddress),
        ("::1", Deny::NoRemoteAddress),
        ("0.0.0.0", Deny::NoRemoteAddress),
        ("::", Deny::NoRemoteAddress),
        ("224.0.0.1", Deny::NoRemoteAddress),
        ("ff02::1", Deny::NoRemoteAddress),
        ("255.255.255.255", Deny::NoRemoteAddress),
    ] {
        let verdict = egress("10.1.0.1", destination, Egress::Allow);
        assert_eq!(verdict, Verdict::Deny(reason), "{destination}");
    }
}

#[test]
fn egress_by_source() {
    for destination in ["10.1.0.2", "198.51.100.1"] {
        for source in ["10.1.0.2", "10.1.0.3", "198.51.100.1", "::"] {
            let verdict = egress(source, destination, Egress::Allow);
            assert_eq!(verdict, Verdict::Deny(DenyReason::SourceAddress), "{source}");
        }
        for source in ["10.1.0.1", "::ffff:10.1.0.1", "fd00::1"] {
            let verdict = egress(source, destination, Egress::Allow);
            assert!(!matches!(verdict, Verdict::Deny(_)), "{source}");
        }
    }
    let stranger = |registry| {
        let destination = SocketAddr::new(ip("198.51.100.1"), 80);
        policy(Egress::Allow).egress("stranger", ip("10.1.0.1"), destination, registry)
    };
    assert_eq!(stranger(registry()), Verdict::Deny(DenyReason::UnregisteredPod));
    assert_eq!(stranger(&Snapshot::default()), Verdict::Deny(DenyReason::RegistryUnknown));
}

#[test]
fn plaintext_comes_in_only_from_where_the_operator_says() {
    let listed = Verdict::Plaintext(PlaintextReason::ListedSource);
    let refused = Verdict::Deny(DenyReason::PlaintextRefused);
    for (source, port, expected) in [
        ("10.9.0.1", 8080, &listed),
        ("::ffff:10.9.0.1", 8080, &listed),
        ("10.9.0.1", 8081, &refused),
        ("10.8.0.1", 8080, &refused),
        // In the list, but a pod: it has a certificate, and must show it.
        ("10.1.0.1", 8080, &refused),
    ] {
        let verdict = policy(Egress::Allow).ingress_plaintext(ip(source), SERVER, port, registry());
        assert_eq!(verdict, *expected, "{source} {port}");
    }
    let unregistered =
        policy(Egress::Allow).ingress_plaintext(ip("10.9.0.1"), "stranger", 8080, registry());
    assert_eq!(unregistered, Verdict::Deny(DenyReason::UnregisteredPod));
}

fn leaf(id: &str, pod: Option<(&str, &str)>) -> Leaf {
    Leaf {
        id: id.parse().unwrap(),
        pod: pod.map(|(name, uid)| PodRef { name: name.to_owned(), uid: uid.to_owned() }),
        serial: "1".to_owned(),
        not_before: SystemTime::UNIX_EPOCH,
        not_after: SystemTime::UNIX_EPOCH,
    }
}

#[test]
fn a_client_is_the_pod_that_the_registry_knows() {
    use DenyReason as Deny;
    const ID: &str = "spiffe://td/ns/shop/sa/client";
    let pod = Some(("client-0", CLIENT));
    for (client, source, expected) in [
        (leaf(ID, pod), "10.1.0.1", peer(CLIENT)),
        (leaf(ID, pod), "fd00::1", peer(CLIENT)),
        (leaf(ID, pod), "::ffff:10.1.0.1", peer(CLIENT)),
        (leaf(ID, pod), "10.1.0.2", Verdict::Deny(Deny::SourceAddress)),
        (leaf(ID, pod), "10.1.0.3", Verdict::Deny(Deny::SourceAddress)),
        (leaf(ID, Some(("client-0", "gone"))), "10.1.0.1", Verdict::Deny(Deny::UnregisteredPeer)),
        (leaf(ID, Some(("client-1", CLIENT))), "10.1.0.1", Verdict::Deny(Deny::IdentityMismatch)),
        (leaf(ID, Some(("server-0", SERVER))), "10.1.0.1", Verdict::Deny(Deny::IdentityMismatch)),
        (
            leaf("spiffe://other/ns/shop/sa/client", pod),
            "10.1.0.1",
            Verdict::Deny(Deny::IdentityMismatch),
        ),
        (
            leaf("spiffe://td/nodemesh/node/node-1", None),
            "10.1.0.1",
            Verdict::Deny(Deny::IdentityMismatch),
        ),
    ] {
        let verdict =
            policy(Egress::Allow).ingress_mesh(&client, ip(source), SERVER, 80, registry());
        assert_eq!(verdict, expected, "{client:?} from {source}");
    }
    let to = |uid, registry| {
        policy(Egress::Allow).ingress_mesh(&leaf(ID, pod), ip("10.1.0.1"), uid, 80, registry)
    };
    assert_eq!(to("stranger", registry()), Verdict::Deny(Deny::UnregisteredPod));
    assert_eq!(to(SERVER, &Snapshot::default()), Verdict::Deny(Deny::RegistryUnknown));
}

/// Addresses around everything that the registry and the configuration know, and any others.
fn address() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        (0_u8..4, 0_u8..4).prop_map(|(c, d)| IpAddr::from([10, 1, c, d])),
        (0_u16..4).prop_map(|last| IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, last])),
        Just(ip("192.0.2.7")),
        any::<[u8; 4]>().prop_map(IpAddr::from),
        any::<[u8; 4]>().prop_map(|v4| Ipv4Addr::from(v4).to_ipv6_mapped().into()),
        any::<[u8; 16]>().prop_map(|v6| Ipv6Addr::from(v6).into()),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    #[test]
    fn what_leaves_unencrypted_was_meant_to(
        uid in prop_oneof![Just(CLIENT), Just(SERVER), Just("stranger")],
        source in address(),
        destination in address(),
        port: u16,
        deny: bool,
    ) {
        let mode = if deny { Egress::Deny } else { Egress::Allow };
        let decide = |destination| {
            policy(mode).egress(uid, source, SocketAddr::new(destination, port), registry())
        };
        let verdict = decide(destination);
        prop_assert_eq!(&verdict, &decide(destination.to_canonical()));
        let known = registry().by_address(destination);
        match verdict {
            Verdict::Plaintext(_) => {
                prop_assert_eq!(known, None);
                prop_assert!(!deny && !policy(mode).cluster.contains(destination));
            }
            Verdict::Mesh(peer) => prop_assert!(
                peer.uid != uid && peer.addresses.contains(&destination.to_canonical())
            ),
            Verdict::Deny(_) => {}
        }
    }

    #[test]
    fn what_comes_in_unencrypted_was_meant_to(source in address(), port in 8078_u16..8083) {
        let verdict = policy(Egress::Allow).ingress_plaintext(source, SERVER, port, registry());
        if let Verdict::Plaintext(_) = verdict {
            prop_assert!(port == 8080 && ranges(&["10.9.0.0/16"]).contains(source));
        }
    }

    #[test]
    fn nothing_passes_before_the_registry_is_known(source in address(), destination in address()) {
        let verdict = policy(Egress::Allow).egress(
            CLIENT,
            source,
            SocketAddr::new(destination, 80),
            &Snapshot::default(),
        );
        prop_assert_eq!(verdict, Verdict::Deny(DenyReason::RegistryUnknown));
    }
}

#[test]
fn reasons_are_numbered_and_named_apart() {
    for (index, reason) in DenyReason::ALL.into_iter().enumerate() {
        assert_eq!(reason.index(), index);
    }
    let names: std::collections::HashSet<_> = DenyReason::ALL.map(DenyReason::name).into();
    assert_eq!(names.len(), DenyReason::ALL.len());
}

fn revise(open: &Open<'_>) -> Result<(), Revocation> {
    policy(Egress::Allow).revise(CLIENT, open, registry())
}

#[test]
fn an_open_connection_goes_on_while_it_would_be_let_through_to_the_same_peer() {
    let registered = |uid: &str| registry().by_uid(uid).unwrap().as_ref().clone();
    let (server, far) = (registered(SERVER), registered(FAR));
    let other_name = Workload { id: far.id.clone(), ..server.clone() };
    let source = ip("10.1.0.1");
    let denied = |reason| Err(Revocation::Denied(reason));
    for (destination, peer, expected) in [
        ("10.1.0.2", Some(&server), Ok(())),
        ("fd00::2", Some(&server), Ok(())),
        ("10.1.0.2", Some(&far), Err(Revocation::OtherPeer)),
        ("10.1.0.2", Some(&other_name), Err(Revocation::OtherPeer)),
        ("10.1.0.2", None, Err(Revocation::OtherPeer)),
        ("10.1.0.9", Some(&server), denied(DenyReason::UnknownInCluster)),
        ("198.51.100.1", Some(&server), Err(Revocation::PeerLeft)),
        ("198.51.100.1", None, Ok(())),
    ] {
        let destination = SocketAddr::new(ip(destination), 80);
        let open = Open::Outbound { source, destination, peer };
        assert_eq!(revise(&open), expected, "{open:?}");
    }
    let elsewhere = Open::Outbound {
        source: ip("10.1.0.9"),
        destination: "10.1.0.2:80".parse().unwrap(),
        peer: Some(&server),
    };
    assert_eq!(revise(&elsewhere), denied(DenyReason::SourceAddress));
    let gone = Workload { uid: "gone".to_owned(), ..server.clone() };
    for (source, port, peer, expected) in [
        ("10.1.0.2", 80, Some(&server), Ok(())),
        ("10.1.0.7", 80, Some(&server), denied(DenyReason::SourceAddress)),
        ("10.1.0.2", 80, Some(&gone), denied(DenyReason::UnregisteredPeer)),
        ("10.1.0.2", 80, Some(&other_name), denied(DenyReason::IdentityMismatch)),
        ("10.9.0.1", 8080, None, Ok(())),
        ("10.9.0.1", 8081, None, denied(DenyReason::PlaintextRefused)),
        ("10.1.0.1", 8080, None, denied(DenyReason::PlaintextRefused)),
    ] {
        let open = Open::Inbound { source: ip(source), port, peer };
        assert_eq!(revise(&open), expected, "{open:?}");
    }
    let unregistered = policy(Egress::Allow);
    let open = Open::Inbound { source: ip("10.1.0.2"), port: 80, peer: Some(&server) };
    let revised = unregistered.revise("nobody", &open, registry());
    assert_eq!(revised, denied(DenyReason::UnregisteredPod));
}
