//! A pod's certificate over its life: rotated in time, kept while the CA is away, withdrawn when
//! it is no longer true.

use super::*;

#[tokio::test(start_paused = true)]
async fn certificates_rotate_at_half_of_their_lifetime_without_a_gap() {
    let bench = Bench::new();
    let identity = bench.start();
    let handle = identity.track(UID);
    let mut svid = handle.wait(DEADLINE).await.unwrap();
    let mut receiver = handle.receiver();
    receiver.mark_unchanged();
    for _ in 0..20 {
        let issued = bench.clock.now();
        timeout(DEADLINE, receiver.changed()).await.expect("rotated in time").unwrap();
        let next = receiver.borrow_and_update().clone().expect("no gap");
        let served = bench.clock.now().duration_since(issued).unwrap().div_duration_f64(LIFETIME);
        assert!((0.449..0.552).contains(&served), "{served}");
        assert_ne!(next.leaf.serial, svid.leaf.serial);
        assert!(next.generation > svid.generation);
        assert_eq!((&next.id, &next.pod), (&svid.id, &svid.pod));
        svid = next;
    }
    assert_eq!(identity.counters().svids_issued.load(Ordering::Relaxed), 21);
    assert_eq!(identity.counters().svid_failures.load(Ordering::Relaxed), 0);
}

#[tokio::test(start_paused = true)]
async fn short_lives_leave_no_gap_either() {
    let bench = Bench::new();
    bench.fake.set_svid_lifetime(Duration::from_secs(10));
    let identity = bench.start();
    let handle = identity.track(UID);
    handle.wait(DEADLINE).await.unwrap();
    let mut receiver = handle.receiver();
    let until = bench.clock.now() + Duration::from_secs(120);
    while bench.clock.now() < until {
        receiver.changed().await.unwrap();
        let svid = receiver.borrow_and_update().clone().expect("no gap");
        assert!(svid.remaining(bench.clock.now()) > Duration::from_secs(8), "{svid:?}");
    }
    assert!(bench.fake.issued() >= 120 / 6, "{}", bench.fake.issued());
    assert!(bench.fake.issued() <= 120 / 4, "{}", bench.fake.issued());
}

#[tokio::test(start_paused = true)]
async fn while_the_ca_is_away_the_old_certificate_serves() {
    let bench = Bench::new();
    let identity = bench.start();
    let handle = identity.track(UID);
    let svid = handle.wait(DEADLINE).await.unwrap();
    bench.fake.set_reachable(false);
    tokio::time::sleep(LIFETIME * 9 / 10).await;
    assert!(Arc::ptr_eq(&handle.current().unwrap(), &svid));
    assert!(handle.problem().unwrap().message.contains("not connected"));

    bench.fake.set_reachable(true);
    let mut receiver = handle.receiver();
    receiver.mark_unchanged();
    receiver.changed().await.unwrap();
    let next = receiver.borrow().clone().expect("no gap");
    assert!(svid.remaining(bench.clock.now()) > Duration::ZERO);
    assert_ne!(next.leaf.serial, svid.leaf.serial);
    assert_eq!(handle.problem(), None);
}

#[tokio::test(start_paused = true)]
async fn an_expired_certificate_is_no_longer_offered() {
    let bench = Bench::new();
    let identity = bench.start();
    let handle = identity.track(UID);
    let svid = handle.wait(DEADLINE).await.unwrap();
    bench.fake.set_reachable(false);
    until(handle.receiver(), "the certificate is withdrawn", Option::is_none).await;
    let late = bench.clock.now().duration_since(svid.leaf.not_after).unwrap();
    assert!(late <= Duration::from_secs(1), "{late:?}");
    assert!(handle.problem().unwrap().message.contains("expired"));
    assert_eq!(identity.counters().svids_expired.load(Ordering::Relaxed), 1);
    let refusal = handle.wait(Duration::from_secs(60)).await.unwrap_err();
    assert!(refusal.to_string().contains(UID), "{refusal}");

    // Nor after a restart.
    drop((handle, identity));
    let identity = bench.start();
    let handle = identity.track(UID);
    handle.wait(Duration::from_secs(60)).await.unwrap_err();
    bench.fake.set_reachable(true);
    next_svid(&handle, &svid).await;
}

#[tokio::test(start_paused = true)]
async fn a_wrong_certificate_never_replaces_a_right_one() {
    let cases = [
        (Mischief::OtherIdentity, "sa/cartx"),
        (Mischief::OtherPod, "the registry says"),
        (Mischief::OtherName, "pod another"),
        (Mischief::OtherKey, "does not go with the private key"),
        (Mischief::OtherRoot, "peers would refuse it"),
        (Mischief::Expired, "expired"),
        (Mischief::ClientOnly, "peers would refuse it"),
        (Mischief::NotACertificate, "is not used"),
        (Mischief::NoChain, "is not used"),
        (Mischief::Refusal, "not your pod"),
    ];
    for (mischief, expected) in cases {
        let bench = Bench::new();
        let identity = bench.start();
        let handle = identity.track(UID);
        let svid = handle.wait(DEADLINE).await.unwrap();
        let stored = fs::read(bench.svid_file(UID)).unwrap();

        bench.fake.set_mischief(Some(mischief));
        tokio::time::sleep(LIFETIME * 6 / 10).await;
        assert!(Arc::ptr_eq(&handle.current().unwrap(), &svid), "{mischief:?}");
        assert_eq!(fs::read(bench.svid_file(UID)).unwrap(), stored, "{mischief:?}");
        let problem = handle.problem().expect("it is reported").message;
        assert!(problem.contains(expected), "{mischief:?}: {problem}");
        let rejected = identity.counters().svids_rejected.load(Ordering::Relaxed);
        assert_eq!(rejected > 0, mischief != Mischief::Refusal, "{mischief:?}");

        bench.fake.set_mischief(None);
        next_svid(&handle, &svid).await;
        assert_eq!(handle.problem(), None);
    }
}

#[tokio::test(start_paused = true)]
async fn failed_requests_slow_down() {
    let bench = Bench::new();
    bench.fake.set_mischief(Some(Mischief::Refusal));
    let identity = bench.start();
    let handle = identity.track(UID);
    handle.wait(HOUR).await.unwrap_err();
    let failures = identity.counters().svid_failures.load(Ordering::Relaxed);
    assert!((60..=130).contains(&failures), "one every 30 to 60 s, and a few more: {failures}");
}

#[tokio::test(start_paused = true)]
async fn a_new_root_is_trusted_at_once() {
    let bench = Bench::new();
    let identity = bench.start();
    let handle = identity.track(UID);
    let svid = handle.wait(DEADLINE).await.unwrap();
    let (old, new) = (bench.fake.authority(), Arc::new(Authority::new("new")));

    let version = bench.fake.trust(&[old.root(), new.root()]);
    assert_eq!(bench.fake.answer_to(version).await, Ok(()));
    let rebuilt = until(handle.receiver(), "the configurations are rebuilt", |now| {
        now.as_ref().is_some_and(|now| now.generation > svid.generation)
    });
    let rebuilt = rebuilt.await.unwrap();
    assert_eq!(rebuilt.leaf, svid.leaf, "the certificate is still good");
    assert_eq!(rebuilt.next_rotation, svid.next_rotation);
    assert_eq!(rebuilt.bundle.roots.len(), 2);
    assert_eq!(bench.fake.issued(), 1);
}

#[tokio::test(start_paused = true)]
async fn when_its_root_goes_a_certificate_is_replaced_at_once() {
    let bench = Bench::new();
    let (own, first) = (bench.fake.authority(), Arc::new(Authority::new("workloads")));
    let second = Arc::new(Authority::new("more workloads"));
    bench.fake.sign_workloads_with(&first);
    bench.fake.trust(&[own.root(), first.root()]);
    let identity = bench.start();
    let handle = identity.track(UID);
    let svid = handle.wait(DEADLINE).await.unwrap();

    // The CA goes on to sign with the old root for a while: better none than one nobody trusts.
    bench.fake.trust(&[own.root(), second.root()]);
    until(handle.receiver(), "the certificate is withdrawn", Option::is_none).await;
    assert_eq!(identity.counters().svids_withdrawn.load(Ordering::Relaxed), 1);
    handle.wait(Duration::from_secs(60)).await.unwrap_err();

    bench.fake.sign_workloads_with(&second);
    let started = bench.clock.now();
    let next = next_svid(&handle, &svid).await;
    assert!(bench.clock.now().duration_since(started).unwrap() < Duration::from_secs(61));
    assert_eq!(next.bundle.roots[1], second.root());
}

#[tokio::test(start_paused = true)]
async fn a_deregistered_pod_has_no_certificate() {
    let bench = Bench::new();
    let identity = bench.start();
    let handle = identity.track(UID);
    let svid = handle.wait(DEADLINE).await.unwrap();
    assert!(bench.svid_file(UID).exists());

    bench.fake.deregister(UID);
    until(handle.receiver(), "the certificate is withdrawn", Option::is_none).await;
    assert!(handle.problem().unwrap().message.contains("mesh-control register"));
    until(identity.status(), "the file is gone", |_| !bench.svid_file(UID).exists()).await;

    bench.fake.register(workload(UID, 1));
    next_svid(&handle, &svid).await;
}

#[tokio::test(start_paused = true)]
async fn a_pod_of_another_node_has_no_certificate() {
    let bench = Bench::new();
    let identity = bench.start();
    let handle = identity.track(UID);
    handle.wait(DEADLINE).await.unwrap();
    bench.fake.register(api::Workload { node: "node-2".into(), ..workload(UID, 1) });
    until(handle.receiver(), "the certificate is withdrawn", Option::is_none).await;
    assert!(handle.problem().unwrap().message.contains("node-2"));
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_becomes_another_gets_another_certificate() {
    let bench = Bench::new();
    let identity = bench.start();
    let handle = identity.track(UID);
    let svid = handle.wait(DEADLINE).await.unwrap();
    let service_account = "checkout".to_owned();
    bench.fake.register(api::Workload { service_account, ..workload(UID, 1) });
    let next = next_svid(&handle, &svid).await;
    assert_eq!(next.id.service_account(), "checkout");

    // New addresses alone change nothing.
    let addresses = vec!["10.0.0.99".to_owned()];
    let service_account = "checkout".to_owned();
    let moved = api::Workload { service_account, addresses, ..workload(UID, 1) };
    bench.fake.register(moved);
    let address = "10.0.0.99".parse().unwrap();
    until(identity.snapshots(), "the address is known", |s| s.by_address(address).is_some()).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(Arc::ptr_eq(&handle.current().unwrap(), &next));
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_is_registered_late_gets_its_certificate() {
    let bench = Bench::new();
    let identity = bench.start();
    let handle = identity.track("late");
    let refusal = handle.wait(Duration::from_secs(60)).await.unwrap_err().to_string();
    assert!(refusal.contains("no pod with the UID late is registered"), "{refusal}");
    bench.fake.register(workload("late", 5));
    assert_eq!(handle.wait(DEADLINE).await.unwrap().pod.uid, "late");
    assert_eq!(bench.fake.issued(), 1, "nothing was asked for before");
}
