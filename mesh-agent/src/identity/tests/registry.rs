//! What makes a snapshot, and what makes it unusable.

use mesh_common::api;
use proptest::prelude::*;

use super::{super::registry::*, fake::*};

pub(super) fn snapshot(workloads: Vec<api::Workload>) -> api::Snapshot {
    let bundle = api::TrustBundle {
        trust_domain: TRUST_DOMAIN.to_owned(),
        roots: vec![Authority::new("root").root().to_vec()],
    };
    let settings = api::Settings { svid_lifetime_seconds: 60 };
    api::Snapshot {
        version: 7,
        bundle: Some(bundle),
        workloads,
        settings: Some(settings),
        ..Default::default()
    }
}

fn refusal(change: impl FnOnce(&mut api::Snapshot)) -> String {
    let good = snapshot(vec![workload("a", 1), workload("b", 2)]);
    Snapshot::try_from(good.clone()).expect("the snapshot is good before the change");
    let mut bad = good;
    change(&mut bad);
    Snapshot::try_from(bad).unwrap_err().to_string()
}

#[test]
fn workloads_are_found_by_uid_and_by_every_address() {
    let mut pod = workload("a", 1);
    pod.addresses = vec!["10.0.0.1".into(), "fd00::1".into(), "::ffff:10.0.0.2".into()];
    let snapshot = Snapshot::try_from(snapshot(vec![pod, workload("b", 9)])).unwrap();
    assert_eq!((snapshot.version(), snapshot.workloads().len()), (7, 2));
    let pod = snapshot.by_uid("a").unwrap();
    assert_eq!(pod.id.to_string(), "spiffe://mesh.example/ns/shop/sa/cart");
    for address in ["10.0.0.1", "::ffff:10.0.0.1", "fd00::1", "10.0.0.2", "::ffff:10.0.0.2"] {
        assert_eq!(snapshot.by_address(address.parse().unwrap()), Some(pod), "{address}");
    }
    for address in ["10.0.0.3", "fd00::2", "::10.0.0.1"] {
        assert_eq!(snapshot.by_address(address.parse().unwrap()), None, "{address}");
    }
    assert!(snapshot.by_uid("c").is_none());
}

#[test]
fn before_the_first_snapshot_nothing_is_known() {
    let snapshot = Snapshot::default();
    assert!(!snapshot.is_known() && snapshot.bundle().is_none());
    assert!(snapshot.by_uid("a").is_none());
}

#[test]
fn one_bad_entry_spoils_the_whole() {
    type Change = fn(&mut api::Snapshot);
    let cases: [(&str, Change); 14] = [
        ("version 0", |s| s.version = 0),
        ("no trust bundle", |s| s.bundle = None),
        ("no settings", |s| s.settings = None),
        ("0 roots", |s| s.bundle.as_mut().unwrap().roots.clear()),
        ("trust bundle", |s| s.bundle.as_mut().unwrap().roots.push(b"no root".to_vec())),
        ("no trust domain", |s| s.bundle.as_mut().unwrap().trust_domain = "A".into()),
        ("UID \"a\"", |s| s.workloads[1].uid = "a".into()),
        ("address 10.0.0.1", |s| s.workloads[1].addresses[0] = "::ffff:10.0.0.1".into()),
        ("\"../b\"", |s| s.workloads[1].uid = "../b".into()),
        ("no name", |s| s.workloads[1].name = String::new()),
        ("no name", |s| s.workloads[1].node = "a/b".into()),
        ("no name", |s| s.workloads[1].namespace = "..".into()),
        ("no name", |s| s.workloads[1].service_account = "x y".into()),
        ("not the address of a pod", |s| s.workloads[1].addresses[0] = "10.0.0.256".into()),
    ];
    for (expected, change) in cases {
        let refusal = refusal(change);
        assert!(refusal.contains(expected), "{refusal:?} does not say {expected:?}");
    }
    for address in ["127.0.0.1", "::1", "0.0.0.0", "::", "224.0.0.1", "ff02::1", "::ffff:127.0.0.1"]
    {
        let refusal = refusal(|s| s.workloads[0].addresses.push(address.into()));
        assert!(refusal.contains(address), "{refusal}");
    }
}

proptest! {
    /// The registry is total: whatever arrives is either refused or consistent in itself.
    #[test]
    fn what_is_accepted_is_consistent(pods in prop::collection::vec(
        ("[a-c/]{1,2}", prop::collection::vec("(10\\.0\\.0\\.[0-9]|fd00::[0-9]|x)", 0..3)), 0..5,
    )) {
        let pods = pods.into_iter().map(|(uid, addresses)| api::Workload {
            addresses,
            ..workload(&uid, 0)
        });
        if let Ok(snapshot) = Snapshot::try_from(snapshot(pods.collect())) {
            for workload in snapshot.workloads() {
                prop_assert_eq!(snapshot.by_uid(&workload.uid), Some(workload));
                for address in &workload.addresses {
                    prop_assert_eq!(snapshot.by_address(*address), Some(workload));
                }
            }
        }
    }
}
