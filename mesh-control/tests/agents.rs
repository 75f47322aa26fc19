//! What agents get from the control plane, and what they do not, over real TLS.
#![expect(clippy::unwrap_used, reason = "a test ends where it fails")]

mod kubernetes;
mod support;
mod versions;

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    sync::Arc,
    time::{Duration, SystemTime},
};

use mesh_common::{
    api::{self, watch_request::Message},
    join::JoinToken,
    svid::{Fingerprint, Kind, Leaf, PeerVerifier, Usage},
};
use mesh_control::{
    admin,
    status::{self, Text},
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, KeyUsagePurpose};
use rustls::pki_types::UnixTime;
use tokio::{io::AsyncReadExt as _, net::TcpStream, sync::mpsc};
use tokio_rustls::client::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Streaming};

use support::{Lab, Node, connect, connect_pinned, connect_tls, join, key_and_csr, until};

#[tokio::test]
async fn a_node_joins_and_gets_its_pods_certificates() {
    let lab = Lab::start().await;
    lab.register("u1", "n1", "10.0.0.1").await;
    let mut node = lab.node("n1").await;
    let leaf = Leaf::parse(&node.identity.cert[0]).unwrap();
    assert_eq!(leaf.id.to_string(), "spiffe://mesh.example/nodemesh/node/n1");

    let (svid, _) = node.svid("u1").await.unwrap();
    let leaf = node.bundle.verify(&svid.cert, Usage::Server, UnixTime::now()).unwrap();
    assert_eq!(leaf.id.to_string(), "spiffe://mesh.example/ns/shop/sa/cart");
    assert_eq!(leaf.pod.unwrap().uid, "u1");

    let (_, csr) = key_and_csr();
    let renewed = node.client.renew_node(api::RenewNodeRequest { csr }).await.unwrap();
    let chain = support::chain(renewed.into_inner().chain);
    let again = node.bundle.verify(&chain, Usage::Client, UnixTime::now()).unwrap();
    assert_eq!(again.id.to_string(), "spiffe://mesh.example/nodemesh/node/n1");
    let issued = lab.control.metrics.issued_by_kind();
    assert_eq!((issued["node"], issued["workload"]), (2, 1));
}

#[tokio::test]
async fn a_token_is_good_once_in_time_and_here() {
    let lab = Lab::start().await;
    let token = lab.token("n1");
    join(lab.address, &token).await.unwrap();
    let reused = join(lab.address, &token).await.map(drop).unwrap_err();
    assert_eq!((reused.code(), lab.refused("token-used")), (Code::PermissionDenied, 1));

    let early = SystemTime::now() - Duration::from_secs(61);
    let token = lab.control.create_token("n1", Duration::from_secs(60), early).unwrap();
    let expired = join(lab.address, &token).await.map(drop).unwrap_err();
    assert_eq!((expired.code(), lab.refused("token-expired")), (Code::PermissionDenied, 1));

    let root = Fingerprint::of(lab.control.authority().root());
    let forged = JoinToken::new("mesh.example".parse().unwrap(), "n1", root, [1; 32]).unwrap();
    let forged = join(lab.address, &forged.reveal()).await.map(drop).unwrap_err();
    assert_eq!((forged.code(), lab.refused("token-unknown")), (Code::PermissionDenied, 1));

    let renamed = lab.token("n1").replace(":n1:", ":n2:");
    let renamed = join(lab.address, &renamed).await.map(drop).unwrap_err();
    assert_eq!((renamed.code(), lab.refused("token-unknown")), (Code::PermissionDenied, 2));
}

#[tokio::test]
async fn a_refused_signing_request_does_not_use_the_token_up() {
    let lab = Lab::start().await;
    let token = lab.token("n1");
    let mut client = connect_pinned(lab.address, &token).await;
    let request = api::JoinRequest { token: token.clone(), csr: vec![0; 9], ..Default::default() };
    assert_eq!(client.join(request).await.unwrap_err().code(), Code::InvalidArgument);
    join(lab.address, &token).await.unwrap();
}

#[tokio::test]
async fn of_many_agents_with_one_token_one_joins() {
    let lab = Lab::start().await;
    let token = lab.token("n1");
    let attempts = (0..8).map(|_| join(lab.address, &token));
    let joined =
        futures::future::join_all(attempts).await.into_iter().filter(Result::is_ok).count();
    assert_eq!(joined, 1);
}

#[tokio::test]
async fn a_control_plane_with_another_root_is_not_talked_to() {
    let (lab, other) = (Lab::start().await, Lab::start().await);
    let token: JoinToken = other.token("n1").parse().unwrap();
    let verifier = || PeerVerifier::pinned(token.trust_domain.clone(), token.root);
    connect(lab.address, verifier(), None).await.unwrap_err();
    until(|| lab.refused("handshake") == 1).await;
    connect(other.address, verifier(), None).await.unwrap();
}

#[tokio::test]
async fn a_stolen_node_gets_no_pods_of_other_nodes() {
    let lab = Lab::start().await;
    lab.register("u1", "n1", "10.0.0.1").await;
    lab.register("u2", "n2", "10.0.0.2").await;
    let mut stolen = lab.node("n1").await;
    stolen.svid("u1").await.unwrap();
    let foreign = stolen.svid("u2").await.map(drop).unwrap_err();
    let unknown = stolen.svid("u3").await.map(drop).unwrap_err();
    assert_eq!((foreign.code(), unknown.code()), (Code::PermissionDenied, Code::PermissionDenied));
    assert_eq!(
        foreign.message().replace("u2", "u3"),
        unknown.message(),
        "a node does not learn what is elsewhere"
    );
    assert_eq!((lab.refused("pod-foreign"), lab.refused("pod-unknown")), (1, 1));

    fs::remove_file(lab.state("registry/u1.yaml")).unwrap();
    until(|| lab.control.view().registry.get("u1").is_none()).await;
    stolen.svid("u1").await.map(drop).unwrap_err();
}

#[tokio::test]
async fn joining_again_shuts_out_a_stolen_node_certificate() {
    let lab = Lab::start().await;
    lab.register("u1", "n1", "10.0.0.1").await;
    let mut stolen = lab.node("n1").await;
    stolen.svid("u1").await.unwrap();
    // Certificates count in whole seconds.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let mut node = lab.node("n1").await;
    node.svid("u1").await.unwrap();
    let refused = stolen.svid("u1").await.map(drop).unwrap_err();
    assert_eq!((refused.code(), lab.refused("node-void")), (Code::Unauthenticated, 1));
}

#[tokio::test]
async fn only_nodes_are_nodes() {
    let lab = Lab::start().await;
    lab.register("u1", "n1", "10.0.0.1").await;
    let mut node = lab.node("n1").await;
    let (svid, _) = node.svid("u1").await.unwrap();
    let verifier = || PeerVerifier::new(Arc::clone(&node.bundle), Kind::Control);

    // TLS 1.3 tells a client that it was refused only when it reads.
    let refused = match connect(lab.address, verifier(), Some(svid)).await {
        Ok(mut client) => client.renew_node(api::RenewNodeRequest::default()).await.is_err(),
        Err(_) => true,
    };
    assert!(refused);
    until(|| lab.refused("handshake") == 1).await;

    let mut nobody = connect(lab.address, verifier(), None).await.unwrap();
    let (_, csr) = key_and_csr();
    let request = api::IssueSvidRequest { pod_uid: "u1".to_owned(), csr: csr.clone() };
    let refused = nobody.issue_svid(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    let refused = nobody.renew_node(api::RenewNodeRequest { csr }).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    let refused = nobody.watch(tokio_stream::pending()).await.map(drop).unwrap_err();
    assert_eq!((refused.code(), lab.refused("no-certificate")), (Code::Unauthenticated, 3));
}

#[tokio::test]
async fn a_node_of_another_mesh_is_a_stranger() {
    let (lab, other) = (Lab::start().await, Lab::start().await);
    let (node, stranger) = (lab.node("n1").await, other.node("n1").await);
    let verifier = PeerVerifier::new(Arc::clone(&node.bundle), Kind::Control);
    let refused = match connect(lab.address, verifier, Some(stranger.identity)).await {
        Ok(mut client) => client.renew_node(api::RenewNodeRequest::default()).await.is_err(),
        Err(_) => true,
    };
    assert!(refused);
    until(|| lab.refused("handshake") == 1).await;
}

/// An open stream of snapshots.
struct Watch {
    answers: mpsc::Sender<api::WatchRequest>,
    snapshots: Streaming<api::Snapshot>,
}

impl Watch {
    /// Of an agent that knows nothing but whole snapshots.
    async fn open(node: &mut Node) -> Self {
        Self::open_with(node, false).await
    }

    async fn open_with(node: &mut Node, deltas: bool) -> Self {
        let (answers, receiver) = mpsc::channel(8);
        let hello = api::Hello { agent_version: "test".to_owned(), deltas };
        answers.send(message(Message::Hello(hello))).await.unwrap();
        let snapshots =
            node.client.watch(ReceiverStream::new(receiver)).await.unwrap().into_inner();
        Self { answers, snapshots }
    }

    async fn next(&mut self) -> api::Snapshot {
        let next = tokio::time::timeout(Duration::from_secs(20), self.snapshots.message());
        next.await.expect("a snapshot in time").unwrap().expect("a snapshot")
    }

    async fn ack(&self, version: u64) {
        self.answer(Message::Ack(api::Ack { version })).await;
    }

    async fn nack(&self, version: u64) {
        let error = "no use".to_owned();
        self.answer(Message::Nack(api::Nack { version, error })).await;
    }

    async fn end(&mut self) -> Code {
        loop {
            let next = tokio::time::timeout(Duration::from_secs(20), self.snapshots.message());
            match next.await.expect("the end in time") {
                Ok(Some(_)) => {}
                Ok(None) => panic!("an end without a reason"),
                Err(status) => return status.code(),
            }
        }
    }

    async fn answer(&self, answer: Message) {
        self.answers.send(message(answer)).await.unwrap();
    }
}

fn message(message: Message) -> api::WatchRequest {
    api::WatchRequest { message: Some(message) }
}

fn agent(lab: &Lab, node: &str) -> Option<status::AgentStatus> {
    status::gather(&lab.control, SystemTime::now()).agents.remove(node)
}

#[tokio::test]
async fn snapshots_come_at_once_and_after_each_change() {
    let lab = Lab::start().await;
    let mut node = lab.node("n1").await;
    let mut watch = Watch::open(&mut node).await;
    let first = watch.next().await;
    assert!(first.workloads.is_empty());
    assert_eq!(first.settings.unwrap().svid_lifetime_seconds, 4 * 3600);

    lab.register("u1", "n1", "10.0.0.1").await;
    let second = watch.next().await;
    assert_eq!(second.version, first.version + 1);
    assert_eq!(second.workloads[0].uid, "u1");
    assert_eq!(agent(&lab, "n1").unwrap().acknowledged_version, None);

    watch.answer(Message::Ack(api::Ack { version: second.version })).await;
    until(|| agent(&lab, "n1").unwrap().in_sync).await;
    assert!(status::gather(&lab.control, SystemTime::now()).degraded.is_empty());

    fs::remove_file(lab.state("registry/u1.yaml")).unwrap();
    let third = watch.next().await;
    assert!(third.workloads.is_empty() && third.version > second.version);
    let nack = api::Nack { version: third.version, error: "no\nuse".to_owned() };
    watch.answer(Message::Nack(nack)).await;
    until(|| agent(&lab, "n1").unwrap().last_error.as_deref() == Some("nouse")).await;
    let degraded = status::gather(&lab.control, SystemTime::now()).degraded;
    assert!(degraded[0].contains("n1") && degraded[0].contains("nouse"), "{degraded:?}");

    drop(watch);
    until(|| agent(&lab, "n1").is_none()).await;
}

fn uids(snapshot: &api::Snapshot) -> Vec<&str> {
    snapshot.workloads.iter().map(|workload| workload.uid.as_str()).collect()
}

#[tokio::test]
async fn an_agent_that_knows_differences_is_told_what_has_changed() {
    let lab = Lab::start().await;
    lab.register("u1", "n1", "10.0.0.1").await;
    let mut node = lab.node("n1").await;
    let mut watch = Watch::open_with(&mut node, true).await;
    let first = watch.next().await;
    assert_eq!((first.base_version, uids(&first)), (0, vec!["u1"]));

    lab.register("u2", "n1", "10.0.0.2").await;
    let second = watch.next().await;
    assert_eq!((second.base_version, uids(&second)), (first.version, vec!["u2"]));
    assert_eq!((second.bundle.as_ref(), second.settings, &second.removed), (None, None, &None));

    fs::remove_file(lab.state("registry/u1.yaml")).unwrap();
    let third = watch.next().await;
    assert_eq!((third.base_version, uids(&third).len()), (second.version, 0));
    assert_eq!(third.removed.unwrap().workload_uids, ["u1"]);
    watch.ack(third.version).await;
    until(|| agent(&lab, "n1").unwrap().in_sync).await;

    // The same changes for one that does not know them, and after another start.
    let mut old = lab.node("n2").await;
    let mut old = Watch::open(&mut old).await;
    assert_eq!(uids(&old.next().await), ["u2"]);
    lab.register("u3", "n1", "10.0.0.3").await;
    let whole = old.next().await;
    assert_eq!((whole.base_version, uids(&whole)), (0, vec!["u2", "u3"]));
    assert!(whole.bundle.is_some() && whole.settings.is_some());
    let mut again = Watch::open_with(&mut node, true).await;
    let whole = again.next().await;
    assert_eq!((whole.base_version, uids(&whole)), (0, vec!["u2", "u3"]));
}

#[tokio::test]
async fn after_a_refused_difference_comes_the_whole_snapshot_and_then_differences() {
    let lab = Lab::start().await;
    lab.register("u1", "n1", "10.0.0.1").await;
    let mut node = lab.node("n1").await;
    let mut watch = Watch::open_with(&mut node, true).await;
    watch.next().await;
    lab.register("u2", "n1", "10.0.0.2").await;
    let refused = watch.next().await.version;
    watch.nack(refused).await;
    let whole = watch.next().await;
    assert_eq!((whole.version, whole.base_version, uids(&whole)), (refused, 0, vec!["u1", "u2"]));
    watch.ack(refused).await;
    until(|| agent(&lab, "n1").unwrap().in_sync).await;
    lab.register("u3", "n1", "10.0.0.3").await;
    let difference = watch.next().await;
    assert_eq!((difference.base_version, uids(&difference)), (refused, vec!["u3"]));

    // A whole one that was refused is not sent again; the next is whole, too.
    let mut watch = Watch::open_with(&mut node, true).await;
    let refused = watch.next().await.version;
    watch.nack(refused).await;
    until(|| agent(&lab, "n1").unwrap().last_error.is_some()).await;
    lab.register("u4", "n1", "10.0.0.4").await;
    let whole = watch.next().await;
    assert_eq!((whole.base_version, uids(&whole).len()), (0, 4));
    assert!(whole.version > refused);
}

/// Those of agents that know no parts are whole in memory: four at a time.
#[tokio::test]
async fn whole_snapshots_wait_for_their_turn() {
    let lab = Lab::start().await;
    let mut nodes = Vec::new();
    for name in ["n1", "n2", "n3", "n4", "n5", "n6"] {
        nodes.push(lab.node(name).await);
    }
    let (last, nodes) = nodes.split_last_mut().unwrap();
    let (fifth, four) = nodes.split_last_mut().unwrap();
    let mut watches = Vec::new();
    for node in four {
        let mut watch = Watch::open(node).await;
        watch.next().await;
        watches.push(watch);
    }
    let mut waiting = Watch::open(fifth).await;
    let mut next = std::pin::pin!(waiting.next());
    let early = tokio::time::timeout(Duration::from_millis(300), &mut next).await;
    early.unwrap_err();
    let version = lab.control.publisher().version();
    watches[2].ack(version).await;
    assert_eq!(next.await.version, version);
    // One that goes away gives way as well.
    let mut waiting = Watch::open(last).await;
    drop(watches);
    waiting.next().await;
}

#[tokio::test]
async fn services_reach_agents_without_what_contradicts() {
    let lab = Lab::start().await;
    let mut node = lab.node("n1").await;
    let mut watch = Watch::open(&mut node).await;
    assert!(watch.next().await.services.is_empty());

    let text = "namespace: shop\nname: cart\naddresses: [10.96.0.1, 10.0.0.1]\n\
                ports: [{port: 80}]\nendpoints: [{address: 10.0.0.7, ports: 8080, node: n1, zone: z}]\n";
    fs::write(lab.state("services/cart.yaml"), text).unwrap();
    let snapshot = watch.next().await;
    assert_eq!(snapshot.services[0].addresses, ["10.96.0.1", "10.0.0.1"]);
    assert_eq!(snapshot.endpoint_slices[0].endpoints[0].address, "10.0.0.7");
    assert_eq!((&*snapshot.nodes[0].name, &*snapshot.nodes[0].zone), ("n1", "z"));
    let status = || status::gather(&lab.control, SystemTime::now());
    assert_eq!((status().services, status().service_problems.len()), (1, 0));

    lab.register("u1", "n1", "10.0.0.1").await;
    assert_eq!(watch.next().await.services[0].addresses, ["10.96.0.1"]);
    let found = status();
    assert_eq!(found.service_problems[0].file, "cart.yaml");
    assert!(found.degraded.iter().any(|why| why.contains("10.0.0.1")), "{:?}", found.degraded);

    fs::write(lab.state("services/cart.yaml"), "?").unwrap();
    let gone = watch.next().await;
    assert!(gone.services.is_empty() && gone.endpoint_slices.is_empty() && gone.nodes.is_empty());
}

#[tokio::test]
async fn an_acknowledgement_of_what_was_never_sent_does_not_count() {
    let lab = Lab::start().await;
    let mut node = lab.node("n1").await;
    let mut watch = Watch::open(&mut node).await;
    let version = watch.next().await.version;
    watch.answer(Message::Ack(api::Ack { version: version + 1 })).await;
    watch.answer(Message::Nack(api::Nack { version, error: "after it".to_owned() })).await;
    until(|| agent(&lab, "n1").unwrap().last_error.is_some()).await;
    assert_eq!(agent(&lab, "n1").unwrap().acknowledged_version, None);
}

#[tokio::test]
async fn an_agent_tells_how_its_pods_are() {
    let lab = Lab::start().await;
    lab.register("u1", "n1", "10.0.0.1").await;
    lab.register("u2", "n1", "10.0.0.2").await;
    let mut node = lab.node("n1").await;
    let mut watch = Watch::open(&mut node).await;
    watch.next().await;
    assert_eq!(agent(&lab, "n1").unwrap().pods, None);
    let pod = api::PodState {
        uid: "u1".to_owned(),
        enrolled: true,
        certificate_not_after: 1_800_000_000,
        problem: String::new(),
    };
    // Of whatever else it speaks, it is heard about its own pods.
    let foreign = api::PodState { uid: "u9".to_owned(), ..pod.clone() };
    watch.answer(Message::State(api::State { pods: vec![pod, foreign] })).await;
    until(|| agent(&lab, "n1").unwrap().pods.is_some()).await;
    let status = admin::show_all(&lab.control, None).await;
    let states: Vec<_> = status
        .pods
        .iter()
        .map(|pod| {
            let state = pod.state.as_ref().unwrap();
            let not_after = state.certificate_not_after.map(|time| time.unix_timestamp());
            (&*pod.uid, state.enrolled, not_after)
        })
        .collect();
    assert_eq!(states, [("u1", true, Some(1_800_000_000)), ("u2", false, None)]);
    let text = Text { status: &status, pods: false }.to_string();
    assert!(text.contains("  shop  2 in the mesh; 1 NOT UNDER GUARD\n"), "{text}");
    let text = Text { status: &status, pods: true }.to_string();
    assert!(
        text.contains("  shop/u1-name  n1  certificate until 2027-01-15T08:00:00Z\n"),
        "{text}"
    );
    assert_eq!(status.agents["n1"].pods, None, "each pod is shown once");
}

#[tokio::test]
async fn the_trust_bundle_reaches_agents_and_shuts_out_what_it_no_longer_holds() {
    let lab = Lab::start().await;
    let mut node = lab.node("n1").await;
    let mut watch = Watch::open(&mut node).await;
    assert_eq!(watch.next().await.bundle.unwrap().roots.len(), 1);

    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let root = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
    let file = lab.state("bundle/next.pem");
    fs::write(&file, root.pem()).unwrap();
    let roots = watch.next().await.bundle.unwrap().roots;
    assert_eq!(roots[1], root.der().to_vec());
    fs::remove_file(&file).unwrap();
    assert_eq!(watch.next().await.bundle.unwrap().roots.len(), 1);
}

#[tokio::test]
async fn a_node_has_one_stream() {
    let lab = Lab::start().await;
    let mut node = lab.node("n1").await;
    let mut first = Watch::open(&mut node).await;
    first.next().await;
    let mut second = Watch::open(&mut node).await;
    second.next().await;
    assert_eq!(first.end().await, Code::Aborted);
    let _again = lab.node("n1").await;
    assert_eq!(second.end().await, Code::Aborted);
}

#[tokio::test]
async fn a_stream_ends_with_the_certificate_it_was_opened_with() {
    let lab = Lab::start_with("node_lifetime: 2s\n").await;
    let mut node = lab.node("n1").await;
    let mut watch = Watch::open(&mut node).await;
    watch.next().await;
    watch.end().await;
    let not_after = Leaf::parse(&node.identity.cert[0]).unwrap().not_after;
    assert!(not_after <= SystemTime::now());
    until(|| agent(&lab, "n1").is_none()).await;
    let verifier = PeerVerifier::new(Arc::clone(&node.bundle), Kind::Control);
    let refused = match connect(lab.address, verifier, Some(node.identity)).await {
        Ok(mut client) => client.renew_node(api::RenewNodeRequest::default()).await.is_err(),
        Err(_) => true,
    };
    assert!(refused);
}

/// Seen below gRPC, whose channel connects anew by itself.
#[tokio::test]
async fn a_connection_without_a_certificate_is_short() {
    let lab = Lab::start_with("limits: {join: 1s}\n").await;
    let node = lab.node("n1").await;
    let verifier = || PeerVerifier::new(Arc::clone(&node.bundle), Kind::Control);
    let anonymous = connect_tls(lab.address, verifier(), None).await.unwrap();
    let known = connect_tls(lab.address, verifier(), Some(Arc::clone(&node.identity)));
    let known = known.await.unwrap();
    tokio::select! {
        biased;
        () = ended(known) => panic!("an agent with a certificate was disconnected"),
        () = ended(anonymous) => {}
    }
}

/// Returns when the server ends a connection, in whatever way.
async fn ended(mut stream: TlsStream<TcpStream>) {
    let mut discarded = [0; 1024];
    while let Ok(1..) = stream.read(&mut discarded).await {}
}

#[tokio::test]
async fn a_restart_keeps_the_ca_the_nodes_and_the_order_of_snapshots() {
    let lab = Lab::start().await;
    lab.register("u1", "n1", "10.0.0.1").await;
    let mut node = lab.node("n1").await;
    let before = Watch::open(&mut node).await.next().await;
    let token = lab.token("n2");
    let lab = lab.restart().await;

    let verifier = PeerVerifier::new(Arc::clone(&node.bundle), Kind::Control);
    let client = connect(lab.address, verifier, Some(Arc::clone(&node.identity))).await.unwrap();
    let mut node = Node { client, ..node };
    node.svid("u1").await.unwrap();
    let after = Watch::open(&mut node).await.next().await;
    assert_eq!((after.bundle, after.workloads), (before.bundle, before.workloads));
    assert!(after.version > before.version);
    join(lab.address, &token).await.unwrap();
}

#[tokio::test]
async fn shutting_down_tells_the_agents() {
    let lab = Lab::start().await;
    let mut node = lab.node("n1").await;
    let mut watch = Watch::open(&mut node).await;
    watch.next().await;
    let _restarted = lab.restart().await;
    assert_eq!(watch.end().await, Code::Unavailable);
}

#[tokio::test]
async fn the_server_s_own_certificate_is_renewed() {
    let lab = Lab::start_with("node_lifetime: 10s\n").await;
    let first = lab.control.identity();
    let issued = SystemTime::now();
    lab.control.maintain(issued);
    assert_eq!(first.cert, lab.control.identity().cert);
    lab.control.maintain(issued + Duration::from_secs(6));
    assert_ne!(first.cert, lab.control.identity().cert);
    lab.node("n1").await;
}

#[tokio::test]
async fn everything_in_the_state_directory_is_private() {
    let lab = Lab::start().await;
    lab.node("n1").await;
    let mode = |path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(lab.state("")), 0o700);
    for file in ["ca/root.pem", "ca/issuer.pem", "joins.json", "starts"] {
        assert_eq!(mode(lab.state(file)), 0o600, "{file}");
    }
}

#[tokio::test]
async fn registration_by_the_operator_is_in_force_when_it_returns() {
    let lab = Lab::start().await;
    let mut node = lab.node("n1").await;
    let workload = |uid: &str, address: &str| mesh_control::registry::Workload {
        uid: uid.to_owned(),
        name: "cart-0".to_owned(),
        namespace: "shop".to_owned(),
        service_account: "cart".to_owned(),
        node: "n1".to_owned(),
        addresses: vec![address.parse().unwrap()],
        owner: String::new(),
    };
    lab.control.register(&workload("u1", "10.0.0.1")).unwrap();
    node.svid("u1").await.unwrap();
    lab.control.register(&workload("u1", "10.0.0.2")).unwrap();
    lab.control.register(&workload("u2", "10.0.0.2")).unwrap_err();
    lab.control.register(&workload("u2", "10.0.0.1")).unwrap();
    lab.control.deregister("u1").unwrap();
    lab.control.deregister("u1").unwrap_err();
    node.svid("u1").await.map(drop).unwrap_err();
    assert!(!lab.state("registry/u1.yaml").exists());
}
