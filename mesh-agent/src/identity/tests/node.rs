//! Joining, renewing, and staying connected.

use super::*;

async fn error_after_start(identity: &Identity) -> (Connection, String) {
    let status = until(identity.status(), "something goes wrong", |status| {
        status.last_error.is_some() && status.connection != Connection::Starting
    });
    let status = status.await;
    (status.connection, status.last_error.unwrap().message)
}

#[tokio::test(start_paused = true)]
async fn a_token_serves_to_join() {
    let bench = Bench::new();
    let identity = bench.start();
    let status = connected(&identity).await;
    assert_eq!(bench.fake.joins(), 1);
    assert_eq!(status.last_error, None);
    assert!(status.node_certificate.unwrap().not_after > bench.clock.now());
    assert!(
        matches!(status.connection, Connection::Connected { endpoint, .. } if endpoint == "control:15443")
    );
    for name in ["node.pem", "node-roots.pem", "snapshot.pb"] {
        let mode = fs::metadata(bench.runtime_dir().join(name)).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_control_plane_without_the_pinned_root_never_sees_the_token() {
    let bench = Bench::new();
    let elsewhere = Authority::new("elsewhere").fingerprint();
    bench.write_token(&bench.fake.unknown_token(NODE, elsewhere));
    let identity = bench.start();
    let (connection, error) = error_after_start(&identity).await;
    assert!(matches!(connection, Connection::Disconnected { .. }));
    assert!(error.contains(&elsewhere.to_string()) && error.contains("intercepts"), "{error}");
    assert_eq!(bench.fake.joins(), 0);
}

#[tokio::test(start_paused = true)]
async fn the_pinned_root_must_be_among_the_roots_that_are_trusted_from_then_on() {
    let bench = Bench::new();
    bench.fake.trust(&[Authority::new("other").root()]);
    let identity = bench.start();
    let (_, error) = error_after_start(&identity).await;
    let pinned = bench.fake.authority().fingerprint().to_string();
    assert!(error.contains(&pinned), "{error}");
    assert_eq!(bench.fake.joins(), 1);
    assert!(!bench.runtime_dir().join("node.pem").exists());
}

#[tokio::test(start_paused = true)]
async fn what_is_wrong_with_a_token_is_said() {
    let bench = Bench::new();
    let fingerprint = bench.fake.authority().fingerprint();
    let cases = [
        (bench.fake.unknown_token(NODE, fingerprint), "the token is unknown or was used before"),
        (bench.fake.create_token("node-2"), "for the node node-2, this one is node-1"),
        ("swordfish".to_owned(), "not a join token"),
    ];
    for (token, expected) in cases {
        bench.write_token(&token);
        let identity = bench.start();
        let (connection, error) = error_after_start(&identity).await;
        assert_eq!(connection, Connection::AwaitingToken);
        assert!(error.contains(expected), "{error}");
        assert!(!error.contains("swordfish"), "{error}");
    }
    fs::remove_file(bench.token_file()).unwrap();
    let (connection, error) = error_after_start(&bench.start()).await;
    assert_eq!(connection, Connection::AwaitingToken);
    assert!(error.contains("mesh-control token create"), "{error}");
    assert!(error.contains(bench.token_file().to_str().unwrap()), "{error}");
}

/// On the real clock, as inotify is. Without it the next attempt would come after a minute.
#[tokio::test]
async fn a_new_token_is_noticed() {
    let bench = Bench::with_clock(Clock::system());
    fs::remove_file(bench.token_file()).unwrap();
    let identity = bench.start();
    assert_eq!(error_after_start(&identity).await.0, Connection::AwaitingToken);
    bench.write_token(&bench.fake.create_token(NODE));
    timeout(Duration::from_secs(30), connected(&identity)).await.expect("joined without waiting");
}

#[tokio::test(start_paused = true)]
async fn the_node_certificate_renews_itself() {
    let bench = Bench::new();
    bench.fake.set_node_lifetime(24 * HOUR);
    let identity = bench.start();
    let mut before = connected(&identity).await.node_certificate.unwrap();
    for round in 1..=3 {
        let issued = bench.clock.now();
        let status = until(identity.status(), "the node certificate is renewed", |status| {
            status.node_certificate.as_ref().is_some_and(|new| new.serial != before.serial)
        });
        let renewed = status.await.node_certificate.unwrap();
        let waited = bench.clock.now().duration_since(issued).unwrap();
        assert!(waited > 10 * HOUR && waited < 14 * HOUR, "{waited:?}");
        assert_eq!(connected(&identity).await.node_certificate, Some(renewed.clone()));
        assert_eq!((bench.fake.joins(), bench.fake.renewals()), (1, round));
        before = renewed;
    }
}

#[tokio::test(start_paused = true)]
async fn a_node_certificate_is_not_renewed_in_vain() {
    let bench = Bench::new();
    bench.fake.set_node_lifetime(24 * HOUR);
    let identity = bench.start();
    connected(&identity).await;
    bench.fake.set_reachable(false);
    disconnected(&identity).await;
    tokio::time::sleep(20 * HOUR).await;
    assert_eq!(bench.fake.renewals(), 0);
    bench.fake.set_reachable(true);
    until(identity.status(), "it is renewed at once", |_| bench.fake.renewals() == 1).await;
    assert_eq!(bench.fake.joins(), 1);
}

#[tokio::test(start_paused = true)]
async fn an_expired_node_certificate_needs_a_new_token() {
    let bench = Bench::new();
    bench.fake.set_node_lifetime(24 * HOUR);
    let identity = bench.start();
    connected(&identity).await;
    bench.fake.set_reachable(false);
    tokio::time::sleep(25 * HOUR).await;
    bench.fake.set_reachable(true);
    let status = until(identity.status(), "a token is needed", |status| {
        status.connection == Connection::AwaitingToken
    });
    let status = status.await;
    assert_eq!(status.node_certificate, None);
    let error = status.last_error.unwrap().message;
    assert!(
        error.contains("serves once") && error.contains("mesh-control token create"),
        "{error}"
    );

    bench.write_token(&bench.fake.create_token(NODE));
    connected(&identity).await;
    drop(identity);

    // Nor does a restarted agent use one that has expired meanwhile.
    tokio::time::sleep(25 * HOUR).await;
    let (connection, _) = error_after_start(&bench.start()).await;
    assert_eq!(connection, Connection::AwaitingToken);
}

#[tokio::test(start_paused = true)]
async fn a_node_certificate_under_a_root_that_goes_is_replaced_at_once() {
    let bench = Bench::new();
    let identity = bench.start();
    connected(&identity).await;
    let (old, new) = (bench.fake.authority(), Arc::new(Authority::new("new")));
    let version = bench.fake.trust(&[old.root(), new.root()]);
    assert_eq!(bench.fake.answer_to(version).await, Ok(()));
    bench.fake.sign_with(&new);
    // Its own certificate is of the new root from the next connection on.
    bench.fake.set_reachable(false);
    disconnected(&identity).await;
    bench.fake.set_reachable(true);
    connected(&identity).await;
    assert_eq!(bench.fake.renewals(), 0, "the old root is still trusted");

    let version = bench.fake.trust(&[new.root()]);
    assert_eq!(bench.fake.answer_to(version).await, Ok(()));
    until(identity.status(), "it is renewed", |_| bench.fake.renewals() == 1).await;
    connected(&identity).await;
    drop(identity);

    let identity = bench.start();
    connected(&identity).await;
    assert_eq!((bench.fake.joins(), bench.fake.renewals()), (1, 1), "the stored one fits");
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_missed_the_new_root_joins_anew() {
    let bench = Bench::new();
    let identity = bench.start();
    let handle = identity.track(UID);
    let svid = handle.wait(DEADLINE).await.unwrap();
    bench.fake.set_reachable(false);
    let new = Arc::new(Authority::new("new"));
    bench.fake.trust(&[new.root()]);
    bench.fake.sign_with(&new);
    bench.fake.set_reachable(true);
    let error = until(identity.status(), "the control plane is distrusted", |status| {
        status.last_error.as_ref().is_some_and(|error| error.message.contains("vouches"))
    });
    let error = error.await.last_error.unwrap().message;
    assert!(error.contains("put a new join token in place"), "{error}");
    tokio::time::sleep(HOUR).await;
    assert_eq!(bench.fake.joins(), 1, "a token serves once");
    assert!(Arc::ptr_eq(&handle.current().unwrap(), &svid));

    bench.write_token(&bench.fake.create_token(NODE));
    connected(&identity).await;
    next_svid(&handle, &svid).await;
    bench.fake.set_reachable(false);
    drop((handle, identity));

    let identity = bench.start();
    let stored = Arc::clone(&identity.snapshots().borrow());
    assert_eq!(stored.bundle().unwrap().roots, [new.root()]);
    bench.fake.set_reachable(true);
    connected(&identity).await;
    assert_eq!(bench.fake.joins(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_void_node_certificate_is_replaced_with_a_new_token() {
    let bench = Bench::new();
    let identity = bench.start();
    connected(&identity).await;
    bench.fake.void_node_certificates();
    let error = until(identity.status(), "the control plane refuses", |status| {
        status.last_error.as_ref().is_some_and(|error| error.message.contains("void"))
    });
    error.await;
    tokio::time::sleep(HOUR).await;
    assert_eq!(bench.fake.joins(), 1, "a token serves once");
    let expected = "the token is unknown or was used before";
    assert!(!identity.status().borrow().last_error.as_ref().unwrap().message.contains(expected));

    bench.write_token(&bench.fake.create_token(NODE));
    until(identity.status(), "it has joined", |_| bench.fake.joins() == 2).await;
    connected(&identity).await;
}

#[tokio::test(start_paused = true)]
async fn the_addresses_are_tried_in_turn() {
    let bench = Bench::new();
    let addresses = ["first:9", "second:15443", "third:15443"];
    let control_plane = addresses.map(str::to_owned).to_vec();
    let identity = bench.start_with(Config { control_plane, ..bench.config() });
    let status = connected(&identity).await;
    assert!(
        matches!(status.connection, Connection::Connected { endpoint, .. } if endpoint == "second:15443")
    );
    assert_eq!(bench.fake.dialled(), ["first:9", "second:15443"].repeat(2), "to join, to watch");

    bench.fake.set_reachable(false);
    disconnected(&identity).await;
    let error = until(identity.status(), "every address has failed", |status| {
        status.last_error.as_ref().is_some_and(|error| error.message.contains("third:15443"))
    });
    let error = error.await.last_error.unwrap().message;
    assert!(addresses.iter().all(|address| error.contains(address)), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_control_plane_that_vanished_without_a_word_is_noticed() {
    let bench = Bench::new();
    let identity = bench.start();
    connected(&identity).await;
    tokio::time::sleep(HOUR).await;
    assert_eq!(identity.counters().disconnects.load(Ordering::Relaxed), 0, "quiet is not dead");

    bench.fake.set_frozen(true);
    let frozen = bench.clock.now();
    disconnected(&identity).await;
    let noticed = bench.clock.now().duration_since(frozen).unwrap();
    assert!(noticed <= Duration::from_secs(21), "{noticed:?}");
    bench.fake.set_frozen(false);
    connected(&identity).await;
}

#[tokio::test(start_paused = true)]
async fn a_runtime_directory_that_others_can_enter_is_refused() {
    let bench = Bench::new();
    fs::create_dir(bench.runtime_dir()).unwrap();
    let mode = |mode| {
        let permissions = std::os::unix::fs::PermissionsExt::from_mode(mode);
        fs::set_permissions(bench.runtime_dir(), permissions).unwrap();
    };
    mode(0o755);
    let start = || Identity::start_with(bench.config(), bench.fake.dialer(), bench.clock.clone());
    let error = start().unwrap_err().to_string();
    assert!(error.contains("with mode 0700"), "{error}");
    mode(0o700);
    start().unwrap();
}
