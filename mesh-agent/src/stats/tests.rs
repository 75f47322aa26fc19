use std::io;

use tracing_subscriber::fmt::MakeWriter;

use super::*;

fn party(address: &str, name: Option<&str>) -> Party {
    let workload = name.map(|name| {
        Arc::new(Workload {
            uid: format!("{name}-uid"),
            id: format!("spiffe://td/ns/shop/sa/{name}").parse().unwrap(),
            name: name.to_owned(),
            node: "node-1".to_owned(),
            addresses: Vec::new(),
            owner: String::new(),
        })
    });
    Party { address: address.parse().unwrap(), workload }
}

fn parties(direction: Direction) -> Parties {
    Parties {
        direction,
        client: party("10.1.0.1:40000", Some("client")),
        server: party("[fd00::2]:80", Some("server")),
        endpoint: None,
        trace: Some(TraceId([0xab; 16])),
    }
}

fn outside() -> Parties {
    let server = party("198.51.100.1:443", None);
    Parties { server, trace: None, ..parties(Direction::Outbound) }
}

#[derive(Clone, Default)]
struct Written(Arc<Mutex<Vec<u8>>>);

impl io::Write for Written {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Written {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

/// The lines of the access log that `action` writes, without what every log line has.
fn access_log(action: impl FnOnce()) -> Vec<serde_json::Value> {
    let written = Written::default();
    let subscriber = tracing_subscriber::fmt()
        .json()
        .without_time()
        .with_level(false)
        .flatten_event(true)
        .with_writer(written.clone())
        .finish();
    tracing::subscriber::with_default(subscriber, action);
    let text = String::from_utf8(written.0.lock().unwrap().clone()).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn totals(pod: &PodStats, direction: Direction, kind: Kind) -> Totals {
    let all = pod.totals();
    assert_eq!(all.len(), 6);
    all.into_iter().find(|(d, k, _)| (*d, *k) == (direction, kind)).unwrap().2
}

#[test]
fn an_open_connection_is_seen_with_its_bytes_and_a_finished_one_stays_counted() {
    let pod = Stats::new(10).pod("client-uid");
    let mtls = || totals(&pod, Direction::Outbound, Kind::Mtls);
    let guard =
        pod.open(parties(Direction::Outbound), Kind::Mtls, &CancellationToken::new()).unwrap();
    guard.traffic().set(5, 7);
    assert_eq!(mtls(), Totals { open: 1, opened: 1, from_client: 5, from_server: 7 });
    let open = pod.connections();
    assert_eq!(open.len(), 1);
    assert_eq!(open[0].parties.server.address.port(), 80);

    guard.traffic().set(10, 20);
    guard.finish("finished");
    assert_eq!(mtls(), Totals { open: 0, opened: 1, from_client: 10, from_server: 20 });
    assert!(pod.connections().is_empty());

    let second =
        pod.open(parties(Direction::Outbound), Kind::Mtls, &CancellationToken::new()).unwrap();
    second.traffic().set(1, 1);
    assert_eq!(mtls(), Totals { open: 1, opened: 2, from_client: 11, from_server: 21 });
    assert_eq!(totals(&pod, Direction::Outbound, Kind::Plaintext), Totals::default());
    assert_eq!(totals(&pod, Direction::Inbound, Kind::Mtls), Totals::default());
}

#[test]
fn every_finished_connection_has_one_line() {
    let pod = Stats::new(10).pod("client-uid");
    let lines = access_log(|| {
        let guard =
            pod.open(parties(Direction::Inbound), Kind::Mtls, &CancellationToken::new()).unwrap();
        guard.traffic().set(10, 20);
        guard.finish("client reset");
        drop(pod.open(outside(), Kind::Plaintext, &CancellationToken::new()).unwrap());
        pod.deny(&outside(), DenyReason::EgressDenied);
    });
    let mut lines = lines.into_iter();
    let mut first = lines.next().unwrap();
    let duration = first.as_object_mut().unwrap().remove("duration_ms").unwrap();
    assert!(duration.is_u64());
    let expected = serde_json::json!({
        "target": "access",
        "direction": "inbound",
        "kind": "mtls",
        "client": "10.1.0.1:40000",
        "client_id": "spiffe://td/ns/shop/sa/client",
        "client_uid": "client-uid",
        "server": "[fd00::2]:80",
        "server_id": "spiffe://td/ns/shop/sa/server",
        "server_uid": "server-uid",
        "from_client": 10,
        "from_server": 20,
        "end": "client reset",
        "trace": "ab".repeat(16),
    });
    assert_eq!(first, expected);

    let second = lines.next().unwrap();
    assert_eq!((&second["kind"], &second["end"]), (&"plaintext".into(), &"aborted".into()));
    assert_eq!(second.get("server_id"), None);
    let third = lines.next().unwrap();
    assert_eq!((&third["kind"], &third["reason"]), (&"denied".into(), &"egress-denied".into()));
    assert_eq!(lines.next(), None);
}

#[test]
fn a_connection_that_is_passed_on_counts_once() {
    let pod = Stats::new(1).pod("client-uid");
    let service = Party { workload: None, ..party("10.96.0.1:80", None) };
    let endpoint = Some("10.1.0.2:8080".parse().unwrap());
    let parties = Parties { server: service, endpoint, ..parties(Direction::Outbound) };
    let lines = access_log(|| {
        let mut guard = pod.open(parties, Kind::Mtls, &CancellationToken::new()).unwrap();
        let other = party("10.1.0.3:8080", Some("other"));
        guard.pass_to(other.address, other.workload, Kind::Mtls);
        guard.traffic().set(5, 7);
        let expected = Totals { open: 1, opened: 1, from_client: 5, from_server: 7 };
        assert_eq!(totals(&pod, Direction::Outbound, Kind::Mtls), expected);
        assert_eq!(pod.connections()[0].parties.endpoint, Some(other.address));
        guard.finish("finished");
        assert!(pod.connections().is_empty());
    });
    let [line] = &lines[..] else { panic!("{lines:#?}") };
    assert_eq!(
        (&line["server"], &line["endpoint"]),
        (&"10.96.0.1:80".into(), &"10.1.0.3:8080".into())
    );
    assert_eq!((&line["server_uid"], &line["from_client"]), (&"other-uid".into(), &5.into()));
}

#[test]
fn what_is_no_longer_allowed_ends_and_says_why() {
    let pod = Stats::new(10).pod("client-uid");
    let (kept, ended) = (CancellationToken::new(), CancellationToken::new());
    let lines = access_log(|| {
        let _kept = pod.open(outside(), Kind::Plaintext, &kept).unwrap();
        let guard = pod.open(parties(Direction::Inbound), Kind::Mtls, &ended).unwrap();
        for _ in 0..2 {
            pod.revise(|connection| match connection.kind {
                Kind::Mtls => Err("the registry has changed".to_owned()),
                Kind::Local | Kind::Plaintext => Ok(()),
            });
        }
        assert_eq!(pod.revoked(), [(Direction::Outbound, 0), (Direction::Inbound, 1)]);
        assert!(ended.is_cancelled() && !kept.is_cancelled());
        drop(guard);
    });
    assert_eq!(lines[0]["end"], "the registry has changed");
}

#[test]
fn a_pod_s_connections_are_limited() {
    let stats = Stats::new(2);
    let pod = stats.pod("client-uid");
    let first = pod.open(outside(), Kind::Plaintext, &CancellationToken::new()).unwrap();
    let _second = pod.open(outside(), Kind::Plaintext, &CancellationToken::new()).unwrap();
    let refused = pod.open(outside(), Kind::Plaintext, &CancellationToken::new()).unwrap_err();
    assert_eq!(refused, DenyReason::TooManyConnections);
    assert_eq!(pod.denied(), [(Direction::Outbound, DenyReason::TooManyConnections, 1)]);
    let _other_pod =
        stats.pod("other").open(outside(), Kind::Plaintext, &CancellationToken::new()).unwrap();
    drop(first);
    let _third = pod.open(outside(), Kind::Plaintext, &CancellationToken::new()).unwrap();
}

#[test]
fn refusals_and_handshakes_are_counted_apart() {
    let pod = Stats::new(2).pod("client-uid");
    pod.deny(&parties(Direction::Inbound), DenyReason::SourceAddress);
    pod.deny(&parties(Direction::Inbound), DenyReason::SourceAddress);
    pod.deny(&outside(), DenyReason::EgressDenied);
    let expected = [
        (Direction::Outbound, DenyReason::EgressDenied, 1),
        (Direction::Inbound, DenyReason::SourceAddress, 2),
    ];
    assert_eq!(pod.denied(), expected);
    assert!(pod.totals().iter().all(|(_, _, totals)| *totals == Totals::default()));

    pod.handshake(Direction::Outbound);
    pod.handshake_failed(Direction::Inbound, HandshakeFailure::Timeout);
    assert_eq!(pod.handshakes(), [(Direction::Outbound, 1), (Direction::Inbound, 0)]);
    let failed = [(Direction::Inbound, HandshakeFailure::Timeout, 1)];
    assert_eq!(pod.failed_handshakes(), failed);
}

#[test]
fn a_pod_s_counts_last_until_it_is_forgotten() {
    let stats = Stats::new(2);
    stats.pod("client-uid").handshake(Direction::Outbound);
    assert_eq!(stats.pod("client-uid").handshakes()[0].1, 1);
    stats.forget("client-uid");
    assert_eq!(stats.pod("client-uid").handshakes()[0].1, 0);
}

#[test]
fn an_owner_is_told_of_refusals_that_mean_something_to_him() {
    let stats = Stats::new(2);
    let pod = stats.pod("client-uid");
    pod.deny(&parties(Direction::Inbound), DenyReason::PlaintextRefused);
    pod.deny(&parties(Direction::Inbound), DenyReason::PlaintextRefused);
    pod.deny(&outside(), DenyReason::UnknownInCluster);
    let endpoint = Some("10.1.0.2:8080".parse().unwrap());
    pod.deny(&Parties { endpoint, ..outside() }, DenyReason::EgressDenied);
    pod.deny(&outside(), DenyReason::NoEndpoints);
    pod.deny(&outside(), DenyReason::RegistryUnknown);
    let told: Vec<_> =
        stats.reports().take(9).into_iter().map(|r| (r.message, r.peer, r.count)).collect();
    let expected = [
        ("refused: STRICT, plaintext from", "10.1.0.1", 2),
        ("refused: not in the mesh, connection to", "198.51.100.1", 1),
        (
            "refused: the configuration denies plaintext out of the mesh (egress), connection to",
            "10.1.0.2",
            1,
        ),
    ];
    assert_eq!(told, expected.map(|(text, peer, n)| (text.to_owned(), peer.to_owned(), n)));
    pod.deny(&outside(), DenyReason::EgressDenied);
    stats.forget("client-uid");
    assert!(stats.reports().take(9).is_empty(), "it is no longer this agent's to tell of");
}
