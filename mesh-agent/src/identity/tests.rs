//! The whole subsystem against a control plane in this process. Most tests run on tokio's paused
//! clock: days pass in no time, and nothing depends on how fast this machine is.

mod differences;
mod fake;
mod kubernetes;
mod node;
mod registry;
mod reporting;
mod rotation;
mod services;
mod versions;

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::PathBuf,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use mesh_common::svid::{Leaf, SvidError};
use rustls::pki_types::ServerName;
use tempfile::TempDir;
use tokio::{io::duplex, sync::watch, time::timeout};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use self::fake::{Authority, Fake, HOUR, LIFETIME, Mischief, NODE, workload};
use super::*;

const UID: &str = "7c9e6679-7425-40de-944b-e07fc1f90ae7";

/// Longer than anything here takes, on the clock of the test.
const DEADLINE: Duration = Duration::from_secs(48 * 3600);

/// A node with its runtime directory, and the control plane.
struct Bench {
    fake: Fake,
    clock: Clock,
    dir: TempDir,
}

impl Bench {
    /// With a join token in place and one pod registered.
    fn new() -> Self {
        Self::with_clock(Clock::of_tokio())
    }

    fn with_clock(clock: Clock) -> Self {
        let bench = Self {
            fake: Fake::new(clock.clone()),
            clock,
            dir: tempfile::Builder::new().tempdir().unwrap(),
        };
        bench.fake.register(workload(UID, 1));
        bench.write_token(&bench.fake.create_token(NODE));
        bench
    }

    fn token_file(&self) -> PathBuf {
        self.dir.path().join("join-token")
    }

    fn write_token(&self, token: &str) {
        fs::write(self.token_file(), format!("{token}\n")).unwrap();
    }

    fn runtime_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    fn svid_file(&self, uid: &str) -> PathBuf {
        self.runtime_dir().join("svid").join(format!("{uid}.pem"))
    }

    fn config(&self) -> Config {
        Config {
            node: NODE.to_owned(),
            control_plane: vec!["control:15443".to_owned()],
            credential: Credential::JoinToken { file: self.token_file() },
            runtime_dir: self.runtime_dir(),
            state: watch::channel(None).1,
        }
    }

    fn start(&self) -> Identity {
        self.start_with(self.config())
    }

    fn start_with(&self, config: Config) -> Identity {
        Identity::start_with(config, self.fake.dialer(), self.clock.clone()).unwrap()
    }
}

/// Waits for a value that fits.
async fn until<T: Clone>(
    mut receiver: watch::Receiver<T>,
    what: &str,
    fits: impl FnMut(&T) -> bool,
) -> T {
    match timeout(DEADLINE, receiver.wait_for(fits)).await {
        Ok(value) => value.unwrap().clone(),
        Err(_) => panic!("waited in vain until {what}"),
    }
}

async fn connected(identity: &Identity) -> Status {
    until(identity.status(), "the agent is connected", |status| {
        matches!(status.connection, Connection::Connected { .. }) && status.last_sync.is_some()
    })
    .await
}

async fn disconnected(identity: &Identity) -> Status {
    until(identity.status(), "the agent is disconnected", |status| {
        matches!(status.connection, Connection::Disconnected { .. })
    })
    .await
}

/// Waits for another certificate than that one.
async fn next_svid(handle: &SvidHandle, before: &Svid) -> Arc<Svid> {
    let svid = until(handle.receiver(), "there is another certificate", |svid| {
        svid.as_ref().is_some_and(|svid| svid.leaf.serial != before.leaf.serial)
    });
    svid.await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn two_pods_prove_themselves_to_each_other() {
    let bench = Bench::new();
    bench.fake.register(workload("other", 2));
    let identity = bench.start();
    let (client, server) = (identity.track(UID), identity.track("other"));
    let client = client.wait(DEADLINE).await.unwrap();
    let server = server.wait(DEADLINE).await.unwrap();
    assert_eq!(client.id.to_string(), "spiffe://mesh.example/ns/shop/sa/cart");
    assert_eq!((client.pod.uid.as_str(), server.pod.uid.as_str()), (UID, "other"));
    assert_ne!(client.generation, server.generation);

    let (dialled, accepted) = duplex(1 << 16);
    let name = ServerName::try_from("pod").unwrap();
    let (dialled, accepted) = tokio::try_join!(
        TlsConnector::from(Arc::clone(&client.client)).connect(name, dialled),
        TlsAcceptor::from(Arc::clone(&server.server)).accept(accepted),
    )
    .unwrap();
    let (dialled, accepted) = (dialled.get_ref().1, accepted.get_ref().1);
    let leaf = |chain: Option<&[_]>| Leaf::parse(&chain.unwrap()[0]).unwrap();
    assert_eq!(leaf(dialled.peer_certificates()), server.leaf);
    assert_eq!(leaf(accepted.peer_certificates()), client.leaf);
    assert_eq!(dialled.alpn_protocol(), Some(crate::tunnel::ALPN));

    let key_file = fs::metadata(bench.svid_file(UID)).unwrap();
    assert_eq!(key_file.mode() & 0o777, 0o600);
}

#[tokio::test(start_paused = true)]
async fn two_pods_of_one_node_vouch_for_each_other_while_both_are_valid_and_for_no_stranger() {
    let bench = Bench::new();
    bench.fake.register(workload("other", 2));
    let identity = bench.start();
    let client = identity.track(UID).wait(DEADLINE).await.unwrap();
    let server = identity.track("other").wait(DEADLINE).await.unwrap();
    let now = bench.clock.now();
    client.vouch(&server, now).unwrap();
    server.vouch(&client, now).unwrap();
    let first = client.leaf.not_after.min(server.leaf.not_after);
    client.vouch(&server, first - Duration::from_secs(1)).unwrap();
    for (client, server) in [(&client, &server), (&server, &client)] {
        let expired = client.vouch(server, first);
        assert!(matches!(expired, Err(SvidError::Expired(at)) if at == first), "{expired:?}");
    }

    // Another root is trusted, too: that the bundle is another one says nothing about the pods.
    let handle = identity.track(UID);
    let roots = [bench.fake.authority().root(), Authority::new("next").root()];
    bench.fake.trust(&roots);
    let renewed = until(handle.receiver(), "the pod trusts both roots", |svid| {
        svid.as_ref().is_some_and(|svid| svid.bundle.roots.len() == 2)
    });
    let renewed = renewed.await.unwrap();
    renewed.vouch(&server, now).unwrap();
    server.vouch(&renewed, now).unwrap();

    let elsewhere = Bench::new();
    let stranger = elsewhere.start().track(UID).wait(DEADLINE).await.unwrap();
    for (client, server) in [(&client, &stranger), (&stranger, &client)] {
        let refused = client.vouch(server, now);
        assert!(matches!(refused, Err(SvidError::UnknownIssuer(_))), "{refused:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn after_a_restart_without_a_control_plane_everything_goes_on() {
    let bench = Bench::new();
    let identity = bench.start();
    let before = identity.track(UID).wait(DEADLINE).await.unwrap();
    let version = identity.snapshots().borrow().version();
    assert!(version > 1);
    drop(identity);
    bench.fake.set_reachable(false);

    let identity = bench.start();
    assert_eq!(identity.snapshots().borrow().version(), version);
    assert!(identity.snapshots().borrow().by_uid(UID).is_some());
    let handle = identity.track(UID);
    let after = handle.wait(Duration::from_secs(1)).await.unwrap();
    assert_eq!(after.leaf, before.leaf);
    let half = before.leaf.not_after - LIFETIME / 2;
    assert!(after.next_rotation > half - LIFETIME / 10, "counted from when it was issued");
    assert!(after.next_rotation < half + LIFETIME / 10);
    disconnected(&identity).await;

    bench.fake.set_reachable(true);
    assert_eq!(connected(&identity).await.version, version);
    assert_eq!((bench.fake.issued(), bench.fake.joins()), (1, 1), "nothing was asked for again");
    next_svid(&handle, &after).await;
}

#[tokio::test(start_paused = true)]
async fn damaged_files_are_ignored_and_made_anew() {
    let bench = Bench::new();
    let identity = bench.start();
    let first = identity.track(UID).wait(DEADLINE).await.unwrap();
    drop(identity);
    let files = ["node.pem", "snapshot.pb"].map(|name| bench.runtime_dir().join(name));
    for file in files.iter().chain([&bench.svid_file(UID)]) {
        let contents = fs::read(file).unwrap();
        fs::write(file, &contents[..contents.len() / 2]).unwrap();
    }
    bench.write_token(&bench.fake.create_token(NODE));

    let identity = bench.start();
    assert!(!identity.snapshots().borrow().is_known());
    let second = identity.track(UID).wait(DEADLINE).await.unwrap();
    assert_ne!(second.leaf.serial, first.leaf.serial);
    assert_eq!(identity.counters().file_errors.load(Ordering::Relaxed), 3);
    drop(identity);

    // The twin: with undamaged files none of this happens.
    let identity = bench.start();
    let third = identity.track(UID).wait(DEADLINE).await.unwrap();
    assert_eq!(third.leaf, second.leaf);
    assert_eq!(identity.counters().file_errors.load(Ordering::Relaxed), 0);
}

#[tokio::test(start_paused = true)]
async fn another_pod_s_stored_certificate_is_not_used() {
    let bench = Bench::new();
    bench.fake.register(workload("other", 2));
    let identity = bench.start();
    let first = identity.track(UID).wait(DEADLINE).await.unwrap();
    identity.track("other").wait(DEADLINE).await.unwrap();
    drop(identity);
    fs::copy(bench.svid_file("other"), bench.svid_file(UID)).unwrap();

    let identity = bench.start();
    let second = identity.track(UID).wait(DEADLINE).await.unwrap();
    assert_eq!(second.pod.uid, UID);
    assert_ne!(second.leaf.serial, first.leaf.serial);
}

#[tokio::test(start_paused = true)]
async fn forgetting_removes_what_dropping_keeps() {
    let bench = Bench::new();
    let identity = bench.start();
    let handle = identity.track(UID);
    let receiver = handle.receiver();
    handle.wait(DEADLINE).await.unwrap();
    drop(handle);
    until(receiver, "a dropped handle's certificate is gone", Option::is_none).await;
    assert!(bench.svid_file(UID).exists());

    let handle = identity.track(UID);
    let receiver = handle.receiver();
    handle.wait(DEADLINE).await.unwrap();
    handle.forget().await;
    assert!(receiver.borrow().is_none());
    assert!(!bench.svid_file(UID).exists());

    fs::write(bench.svid_file("swept"), "").unwrap();
    let outside = bench.runtime_dir().join("outside.pem");
    fs::write(&outside, "").unwrap();
    identity.forget("swept");
    identity.forget("../outside");
    assert!(!bench.svid_file("swept").exists() && outside.exists());
}

#[tokio::test(start_paused = true)]
async fn secrets_are_not_printed() {
    let bench = Bench::new();
    let identity = bench.start();
    let handle = identity.track(UID);
    let svid = handle.wait(DEADLINE).await.unwrap();
    let printed = format!("{svid:?} {handle:?} {identity:?} {:?}", bench.config());
    // The beginning of every P-256 key in PKCS #8 as a list of bytes, and in PEM.
    for secret in ["48, 129, 135, 2, 1", "PRIVATE KEY", "MIGHAgEA"] {
        assert!(!printed.contains(secret), "{printed}");
    }
    let stored = fs::read_to_string(bench.svid_file(UID)).unwrap();
    assert!(stored.contains("PRIVATE KEY") && stored.contains("MIGHAgEA"), "the same check fires");
}

#[tokio::test(start_paused = true)]
async fn an_unusable_snapshot_changes_nothing() {
    let bench = Bench::new();
    let identity = bench.start();
    connected(&identity).await;
    let before = Arc::clone(&identity.snapshots().borrow());

    let version = bench.fake.change(|snapshot| {
        snapshot.workloads[0].name = "renamed".to_owned();
        snapshot.workloads.push(workload("twin", 1));
    });
    let refusal = bench.fake.answer_to(version).await.unwrap_err();
    assert!(refusal.contains("both have the address 10.0.0.1"), "{refusal}");
    assert!(Arc::ptr_eq(&before, &identity.snapshots().borrow()));
    let status = identity.status().borrow().clone();
    assert_eq!(status.version, before.version());
    assert!(status.last_error.unwrap().message.contains("10.0.0.1"));
    assert_eq!(identity.counters().snapshots_refused.load(Ordering::Relaxed), 1);

    let version = bench.fake.change(|snapshot| snapshot.workloads.truncate(1));
    assert_eq!(bench.fake.answer_to(version).await, Ok(()));
    assert_eq!(identity.snapshots().borrow().by_uid(UID).unwrap().name, "renamed");
}

#[tokio::test(start_paused = true)]
async fn a_bundle_that_would_cut_every_agent_off_is_refused() {
    let bench = Bench::new();
    let identity = bench.start();
    connected(&identity).await;
    let (own, other) = (bench.fake.authority().root(), Authority::new("other").root());

    let version = bench.fake.trust(std::slice::from_ref(&other));
    let refusal = bench.fake.answer_to(version).await.unwrap_err();
    assert!(refusal.contains("could connect any more"), "{refusal}");

    let version = bench.fake.trust(&[own, other]);
    assert_eq!(bench.fake.answer_to(version).await, Ok(()));
}

#[tokio::test(start_paused = true)]
async fn unchanged_parts_of_a_snapshot_stay_the_same_in_memory() {
    let bench = Bench::new();
    bench.fake.register(workload("other", 2));
    let identity = bench.start();
    connected(&identity).await;
    let before = Arc::clone(&identity.snapshots().borrow());

    let version =
        bench.fake.change(|snapshot| snapshot.workloads[1].addresses = vec!["10.0.0.3".into()]);
    assert_eq!(bench.fake.answer_to(version).await, Ok(()));
    let after = Arc::clone(&identity.snapshots().borrow());
    assert!(Arc::ptr_eq(before.bundle().unwrap(), after.bundle().unwrap()));
    assert!(Arc::ptr_eq(before.by_uid(UID).unwrap(), after.by_uid(UID).unwrap()));
    assert!(Arc::ptr_eq(
        after.by_uid(UID).unwrap(),
        after.by_address("10.0.0.1".parse().unwrap()).unwrap(),
    ));
    assert!(!Arc::ptr_eq(before.by_uid("other").unwrap(), after.by_uid("other").unwrap()));
}
