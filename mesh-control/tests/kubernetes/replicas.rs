//! Replicas tell each other of their agents, and nobody else.

use std::collections::BTreeSet;

use mesh_common::api::{replicas_client::ReplicasClient, watch_request::Message};
use mesh_control::{
    replicas,
    status::{self, PodState, Text},
};
use tokio::{net::TcpListener, sync::mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::*;
use crate::support::{channel, until};

/// Two replicas of one control plane, of a cluster with three nodes.
async fn start_two() -> [Lab; 2] {
    let first = start().await;
    let second = first.replica(api_server(|_| unreachable!("nothing is to be told"))).await;
    for lab in [&first, &second] {
        let pods = [pod("p1", "n1"), pod("p2", "n2"), pod("p3", "n3")];
        set_cluster(lab, &["n1", "n2", "n3", "n4"], pods);
    }
    [first, second]
}

/// An agent with a stream of snapshots, which has told of a pod.
struct Agent {
    _snapshots: Streaming<api::Snapshot>,
    _answers: mpsc::Sender<api::WatchRequest>,
}

impl Agent {
    async fn connect(lab: &Lab, node: &str, pod: &str) -> Self {
        let identity = lab.node_identity(node);
        let bundle = Arc::clone(&lab.control.view().bundle);
        let verifier = PeerVerifier::new(bundle, Kind::Control);
        let mut client = connect(lab.address, verifier, Some(identity)).await.unwrap();
        let (answers, requests) = mpsc::channel(4);
        let pod = api::PodState {
            uid: pod.to_owned(),
            enrolled: true,
            certificate_not_after: 1_800_000_000,
            problem: String::new(),
        };
        for message in
            [Message::Hello(api::Hello::default()), Message::State(api::State { pods: vec![pod] })]
        {
            answers.send(api::WatchRequest { message: Some(message) }).await.unwrap();
        }
        let stream = client.watch(ReceiverStream::new(requests)).await.unwrap();
        let told = || {
            let sessions = lab.control.sessions.list();
            sessions.iter().any(|(name, session)| name == node && session.pods.is_some())
        };
        until(told).await;
        Self { _snapshots: stream.into_inner(), _answers: answers }
    }
}

async fn whole(
    lab: &Lab,
    addresses: impl IntoIterator<Item = std::net::SocketAddr>,
) -> status::Status {
    let others = replicas::ask(&lab.control, &addresses.into_iter().collect()).await;
    let own = status::gather(&lab.control, SystemTime::now());
    status::whole(own, others, &lab.control.view(), Some(Vec::new()))
}

#[tokio::test]
async fn whichever_replica_is_asked_knows_the_whole_cluster() {
    let [first, second] = start_two().await;
    let _one = Agent::connect(&first, "n1", "p1").await;
    let _two = Agent::connect(&second, "n2", "p2").await;
    for lab in [&first, &second] {
        let status = whole(lab, [first.address, second.address]).await;
        assert_eq!(status.agents.keys().collect::<Vec<_>>(), ["n1", "n2"]);
        assert_eq!(status.nodes_without_agent, ["n3", "n4"]);
        let agents: Vec<_> = status.replicas.iter().map(|replica| replica.agents).collect();
        assert_eq!(agents, [1, 1]);
        let enrolled = |state: &PodState| state.enrolled;
        let pods: BTreeSet<_> =
            status.pods.iter().map(|pod| (&*pod.uid, pod.state.as_ref().map(enrolled))).collect();
        assert_eq!(pods, BTreeSet::from([("p1", Some(true)), ("p2", Some(true)), ("p3", None)]));
        // No pod of the mesh is on n4: it may be one that has no mesh.
        let missing: Vec<_> = status.degraded.iter().filter(|why| why.contains("n3")).collect();
        assert_eq!(missing.len(), 1, "{:?}", status.degraded);
        assert!(!status.degraded.iter().any(|why| why.contains("n4")), "{:?}", status.degraded);
        let text = Text { status: &status, pods: false }.to_string();
        assert!(text.contains("  shop  3 in the mesh; 1 UNKNOWN\n"), "{text}");
    }
}

#[tokio::test]
async fn a_replica_that_is_silent_or_an_impostor_is_named_and_nothing_is_concluded() {
    let [first, second] = start_two().await;
    let gone = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let impostor = Lab::start().await;
    let status = whole(&first, [first.address, second.address, gone, impostor.address]).await;
    let problems: BTreeSet<_> = status
        .replicas
        .iter()
        .filter(|replica| replica.problem.is_some())
        .map(|replica| replica.name.clone())
        .collect();
    assert_eq!(problems, BTreeSet::from([gone.to_string(), impostor.address.to_string()]));
    assert_eq!(status.replicas.len(), 4);
    for name in problems {
        assert!(status.degraded.iter().any(|why| why.contains(&name)), "{:?}", status.degraded);
    }
    assert!(!status.degraded.iter().any(|why| why.contains("is not connected")));
}

#[tokio::test]
async fn only_the_control_plane_may_ask() {
    let [first, second] = start_two().await;
    let bundle = Arc::clone(&first.control.view().bundle);
    let verifier = || PeerVerifier::new(Arc::clone(&bundle), Kind::Control);
    let ask = async |identity| {
        let channel = channel(second.address, verifier(), identity).await.unwrap();
        let answer = ReplicasClient::new(channel).status(api::ReplicaStatusRequest {}).await;
        answer.map(drop).map_err(|status| status.code())
    };
    assert_eq!(ask(Some(first.control.identity())).await, Ok(()));
    assert_eq!(ask(Some(first.node_identity("n1"))).await, Err(Code::Unauthenticated));
    assert_eq!(ask(None).await, Err(Code::Unauthenticated));
    assert_eq!((second.refused("certificate"), second.refused("no-certificate")), (1, 1));
}

#[tokio::test]
async fn the_control_plane_is_no_node() {
    let [first, second] = start_two().await;
    let bundle = Arc::clone(&first.control.view().bundle);
    let verifier = PeerVerifier::new(bundle, Kind::Control);
    let mut client =
        connect(second.address, verifier, Some(first.control.identity())).await.unwrap();
    let (_, csr) = key_and_csr();
    let request = api::IssueSvidRequest { pod_uid: "p1".to_owned(), csr };
    let refused = client.issue_svid(request).await.map(drop).unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    let report = client.report(api::ReportRequest::default()).await.map(drop).unwrap_err();
    assert_eq!(report.code(), Code::Unauthenticated);
}
