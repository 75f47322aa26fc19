//! What has changed since a snapshot: how it is applied, and when not.

use std::{collections::BTreeMap, net::Ipv4Addr};

use mesh_common::{
    api::{self, Encoded},
    svid::TrustBundle,
};
use mesh_control::{registry, services, snapshot::Content};
use proptest::prelude::*;
use prost::Message as _;

use super::{super::registry::Snapshot, fake::NODE, registry::snapshot, *};

/// What the agent gets of messages.
fn received(messages: &[Encoded]) -> api::Snapshot {
    let mut together = api::Snapshot::default();
    for message in messages {
        together.append(api::Snapshot::decode(message.as_ref()).unwrap());
    }
    together
}

/// Everything that a snapshot says.
fn said(snapshot: &Snapshot) -> Vec<api::Snapshot> {
    for workload in snapshot.workloads() {
        for address in &workload.addresses {
            assert!(Arc::ptr_eq(snapshot.by_address(*address).unwrap(), workload));
        }
        assert!(snapshot.on_node(&workload.node).any(|here| Arc::ptr_eq(here, workload)));
    }
    let nodes = ["n0", "n1", "n2", "n3", NODE];
    let here = nodes.iter().map(|node| snapshot.on_node(node).count()).sum::<usize>();
    assert_eq!(here, snapshot.workloads().len());
    snapshot.fields().collect()
}

/// What a registry holds: workloads, services with addresses, slices with ready endpoints, nodes.
#[derive(Clone, Debug)]
struct Mesh {
    workloads: BTreeMap<u8, u8>,
    services: BTreeMap<u8, (u8, bool)>,
    slices: BTreeMap<u8, (u8, BTreeMap<u8, bool>)>,
    nodes: BTreeMap<u8, bool>,
}

fn meshes() -> impl Strategy<Value = Mesh> {
    let map = prop::collection::btree_map::<std::ops::Range<u8>, std::ops::Range<u8>>;
    let services = prop::collection::btree_map(0..6_u8, (0..6_u8, any::<bool>()), 0..6);
    let endpoints = prop::collection::btree_map(0..9_u8, any::<bool>(), 0..5);
    let slices = prop::collection::btree_map(0..8_u8, (0..6_u8, endpoints), 0..8);
    let nodes = prop::collection::btree_map(0..4_u8, any::<bool>(), 0..4);
    (map(0..20, 0..12, 0..12), services, slices, nodes).prop_map(
        |(workloads, services, slices, nodes)| Mesh { workloads, services, slices, nodes },
    )
}

impl Mesh {
    /// As the control plane publishes it: of several that claim one address one has it.
    fn content(&self, bundle: &Arc<TrustBundle>) -> Content {
        let address = |net: u8, host: u8| Ipv4Addr::from([10, net, 0, host]).to_string();
        let mut taken = std::collections::BTreeSet::new();
        let workloads = self.workloads.iter().map(|(uid, host)| registry::Workload {
            uid: format!("u{uid:02}"),
            name: format!("pod-{uid}"),
            namespace: "shop".to_owned(),
            service_account: "cart".to_owned(),
            node: format!("n{}", uid % 4),
            addresses: Some(address(0, *host).parse().unwrap())
                .filter(|_| taken.insert(*host))
                .into_iter()
                .collect(),
            owner: String::new(),
        });
        let mut hosts = std::collections::BTreeSet::new();
        let services = self.services.iter().filter(|(_, (host, _))| hosts.insert(*host));
        let port = |name: &str, port| api::ServicePort { name: name.to_owned(), port };
        let services = services.map(|(name, (host, two))| api::Service {
            namespace: "shop".to_owned(),
            name: format!("s{name}"),
            addresses: vec![address(1, *host)],
            ports: [port("http", 80), port("admin", 81)][..if *two { 2 } else { 1 }].to_vec(),
            ..Default::default()
        });
        let slices = self.slices.iter().map(|(name, (service, endpoints))| api::EndpointSlice {
            namespace: "shop".to_owned(),
            name: format!("s{service}-{name}"),
            service: format!("s{service}"),
            ports: vec![port("http", 8080 + u32::from(name % 2))],
            endpoints: endpoints
                .iter()
                .map(|(host, ready)| api::Endpoint {
                    address: address(0, *host),
                    node: format!("n{}", host % 4),
                    zone: if *host < 3 { "far".to_owned() } else { String::new() },
                    ready: *ready,
                    serving: *ready,
                    terminating: false,
                })
                .collect(),
        });
        let mut slices: Vec<_> = slices.map(Arc::new).collect();
        slices.sort_by(|a, b| a.name.cmp(&b.name));
        let nodes = self.nodes.iter().map(|(name, zone)| api::Node {
            name: format!("n{name}"),
            zone: if *zone { "near".to_owned() } else { String::new() },
        });
        Content {
            bundle: Some(Arc::clone(bundle)),
            settings: api::Settings { svid_lifetime_seconds: 60 },
            workloads: workloads.map(Arc::new).collect(),
            services: services::Services {
                services: services.map(Arc::new).collect(),
                slices,
                nodes: nodes.map(Arc::new).collect(),
            },
        }
    }
}

proptest! {
    /// The control plane's difference, applied by the agent, is the control plane's next snapshot.
    #[test]
    fn a_difference_leads_to_what_the_whole_snapshot_says(all in prop::collection::vec(meshes(), 2..5)) {
        static BUNDLE: std::sync::LazyLock<Arc<TrustBundle>> = std::sync::LazyLock::new(|| {
            Arc::new(TrustBundle::from_api(snapshot(Vec::new()).bundle.unwrap()).unwrap())
        });
        let mut contents = all.iter().map(|mesh| mesh.content(&BUNDLE));
        let mut before = contents.next().unwrap();
        let mut agent = Snapshot::try_from(received(&before.whole().messages(1, 0))).unwrap();
        for (version, after) in (2..).zip(contents) {
            let difference = received(&after.since(&before).messages(version, version - 1));
            agent = agent.updated(difference).unwrap();
            let whole = Snapshot::try_from(received(&after.whole().messages(version, 0))).unwrap();
            let one = received(&[after.whole().message(version)]);
            prop_assert_eq!(said(&agent), said(&whole));
            prop_assert_eq!(agent.services(), whole.services());
            prop_assert_eq!(said(&whole), said(&Snapshot::try_from(one).unwrap()));
            before = after;
        }
    }
}

/// What has changed since the snapshot that the agent has.
fn change(base_version: u64, version: u64, workloads: Vec<api::Workload>) -> api::Snapshot {
    api::Snapshot { version, base_version, workloads, ..Default::default() }
}

fn without(uid: &str, change: api::Snapshot) -> api::Snapshot {
    let removed = api::Removed { workload_uids: vec![uid.to_owned()], ..Default::default() };
    api::Snapshot { removed: Some(removed), ..change }
}

#[tokio::test(start_paused = true)]
async fn what_has_changed_is_put_to_use_and_kept() {
    let bench = Bench::new();
    bench.fake.register(workload("other", 2));
    let identity = bench.start();
    let base = connected(&identity).await.version;
    let before = Arc::clone(&identity.snapshots().borrow());

    // The address goes from one to the other.
    bench.fake.send(without("other", change(base, base + 5, vec![workload("third", 2)])));
    assert_eq!(bench.fake.answer_to(base + 5).await, Ok(()));
    let after = Arc::clone(&identity.snapshots().borrow());
    assert_eq!((after.version(), after.workloads().len()), (base + 5, 2));
    assert!(after.by_uid("other").is_none());
    assert_eq!(after.by_address("10.0.0.2".parse().unwrap()).unwrap().uid, "third");
    assert!(Arc::ptr_eq(before.bundle().unwrap(), after.bundle().unwrap()));
    assert!(Arc::ptr_eq(before.by_uid(UID).unwrap(), after.by_uid(UID).unwrap()));
    assert_eq!(before.by_uid("other").unwrap().name, "cart-2", "what was there is as it was");

    bench.fake.send(change(base + 5, base + 6, vec![workload("fourth", 4)]));
    assert_eq!(bench.fake.answer_to(base + 6).await, Ok(()));
    let after = said(&identity.snapshots().borrow());
    drop(identity);
    bench.fake.set_reachable(false);
    let identity = bench.start();
    assert_eq!(said(&identity.snapshots().borrow()), after);
}

#[tokio::test(start_paused = true)]
async fn what_does_not_follow_changes_nothing_and_the_whole_snapshot_helps() {
    let bench = Bench::new();
    bench.fake.register(workload("other", 2));
    let identity = bench.start();
    let base = connected(&identity).await.version;
    let before = Arc::clone(&identity.snapshots().borrow());
    let new = || vec![workload("new", 3)];
    let slices = api::Removed { endpoint_slices: vec!["a/b".into()], ..Default::default() };
    for (expected, message) in [
        ("the whole snapshot is needed", change(base - 1, base + 10, new())),
        ("the whole snapshot is needed", change(base + 1, base + 11, new())),
        ("the whole snapshot is needed", change(base, base, new())),
        ("\"missing\", which is not there", without("missing", change(base, base + 12, new()))),
        ("both have the address", change(base, base + 13, vec![workload("new", 2)])),
        ("two workloads", change(base, base + 14, [new(), vec![workload("new", 4)]].concat())),
        (
            "endpoint slice a/b, which is not there",
            api::Snapshot { removed: Some(slices), ..change(base, base + 15, new()) },
        ),
    ] {
        let version = message.version;
        bench.fake.send(message);
        let refusal = bench.fake.refusal_of(version).await;
        assert!(refusal.contains(expected), "{refusal:?} does not say {expected:?}");
        assert!(Arc::ptr_eq(&before, &identity.snapshots().borrow()));
    }
    // What the real one does next.
    let version = bench.fake.change(|snapshot| snapshot.version += 20);
    assert_eq!(bench.fake.answer_to(version).await, Ok(()));
    bench.fake.send(change(version, version + 1, new()));
    assert_eq!(bench.fake.answer_to(version + 1).await, Ok(()));
}

#[tokio::test(start_paused = true)]
async fn what_a_crash_left_of_a_change_is_as_if_it_had_not_arrived() {
    let bench = Bench::new();
    let identity = bench.start();
    let base = connected(&identity).await.version;
    for n in 1..=2 {
        let uid = format!("new-{n}");
        bench.fake.send(change(base + n - 1, base + n, vec![workload(&uid, 2 + n as u8)]));
        assert_eq!(bench.fake.answer_to(base + n).await, Ok(()));
    }
    drop(identity);
    bench.fake.set_reachable(false);
    let file = bench.runtime_dir().join("snapshot-changes.pb");
    let stored = fs::read(&file).unwrap();
    fs::write(&file, &stored[..stored.len() - 1]).unwrap();

    let identity = bench.start();
    let snapshot = Arc::clone(&identity.snapshots().borrow());
    assert_eq!((snapshot.version(), snapshot.by_uid("new-2").is_some()), (base + 1, false));
    assert!(snapshot.by_uid("new-1").is_some());
    assert_eq!(identity.counters().file_errors.load(Ordering::Relaxed), 0);

    // What follows is stored after the whole, not after the half.
    bench.fake.set_reachable(true);
    connected(&identity).await;
    let version = bench.fake.change(|snapshot| snapshot.version += 20);
    assert_eq!(bench.fake.answer_to(version).await, Ok(()));
    bench.fake.send(change(version, version + 1, vec![workload("new-3", 7)]));
    assert_eq!(bench.fake.answer_to(version + 1).await, Ok(()));
    drop(identity);
    bench.fake.set_reachable(false);
    let identity = bench.start();
    assert!(identity.snapshots().borrow().by_uid("new-3").is_some());
}

#[tokio::test(start_paused = true)]
async fn changes_do_not_pile_up() {
    let bench = Bench::new();
    let identity = bench.start();
    let base = connected(&identity).await.version;
    let long = |n: u8| api::Workload { name: "x".repeat(200), ..workload("long", n) };
    let file = bench.runtime_dir().join("snapshot-changes.pb");
    let mut largest = 0;
    for n in 1..=60 {
        // 50 KB of nodes that come and go.
        let nodes = (0..250).map(|i| api::Node { name: format!("{n}-{i}"), zone: "z".repeat(190) });
        let nodes: Vec<_> = nodes.collect();
        let names = |n: u64| (0..250).map(|i| format!("{n}-{i}")).collect();
        let gone = if n > 1 { names(n - 1) } else { Vec::new() };
        let removed = api::Removed { nodes: gone, ..Default::default() };
        let change = change(base + n - 1, base + n, vec![long(9)]);
        bench.fake.send(api::Snapshot { nodes, removed: Some(removed), ..change });
        assert_eq!(bench.fake.answer_to(base + n).await, Ok(()));
        largest = largest.max(fs::metadata(&file).map_or(0, |file| file.len()));
    }
    assert!((100_000..300_000).contains(&largest), "{largest}");
    let after = said(&identity.snapshots().borrow());
    drop(identity);
    bench.fake.set_reachable(false);
    assert_eq!(said(&bench.start().snapshots().borrow()), after);
}
