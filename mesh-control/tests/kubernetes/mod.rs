//! What agents get from a control plane on Kubernetes, over real TLS. The API server is a script.

// The unit tests use it as well.
#[path = "../../src/kubernetes/scripted.rs"]
mod scripted;

mod events;
mod replicas;

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use mesh_common::{
    api,
    svid::{Kind, Leaf, PeerVerifier},
};
use mesh_control::{
    registry::{Registry, Workload},
    services::Files,
};
use prost::Message as _;
use serde_json::{Value, json};
use tonic::{Code, Status};

use self::scripted::scripted;
use crate::support::{Client, Lab, Node, connect, join_with, key_and_csr};

const NODE: &str = "spiffe://mesh.example/nodemesh/node/n1";

/// A control plane with [`api_server`].
async fn start() -> Lab {
    Lab::start_on_kubernetes(api_server(|_| unreachable!("nothing is to be told"))).await
}

/// An API server that knows one token, of an agent on the node n1, and a pod `legacy` outside of
/// the mesh, and has this answer to new Events.
fn api_server(event: impl Fn(&Value) -> (u16, Value) + Send + Sync + 'static) -> kube::Client {
    scripted(move |method, path, body| match (method, path) {
        ("POST", path) if path.starts_with("/apis/events.k8s.io/v1/namespaces/") => event(body),
        // Nothing happens any more; then the client comes again.
        ("GET", path) if path.contains("watch=") => (200, json!([])),
        ("GET", "/api/v1/pods") => (200, list(&[legacy()])),
        (
            "GET",
            "/api/v1/namespaces"
            | "/api/v1/nodes"
            | "/api/v1/services"
            | "/apis/discovery.k8s.io/v1/endpointslices",
        ) => (200, list(&[])),
        ("POST", "/apis/authentication.k8s.io/v1/tokenreviews") => {
            let known = body["spec"]["token"] == "of-n1";
            let user = json!({
                "username": "system:serviceaccount:nodemesh-system:nodemesh-agent",
                "extra": {
                    "authentication.kubernetes.io/pod-name": ["agent-x"],
                    "authentication.kubernetes.io/pod-uid": ["u1"],
                    "authentication.kubernetes.io/node-name": ["n1"],
                },
            });
            let status = json!({
                "authenticated": known, "audiences": ["nodemesh-control"], "user": user,
            });
            (201, json!({"metadata": {}, "spec": {}, "status": status}))
        }
        ("GET", "/api/v1/namespaces/nodemesh-system/pods/agent-x") => {
            let spec = json!({
                "nodeName": "n1", "serviceAccountName": "nodemesh-agent", "containers": [],
            });
            (200, json!({"metadata": {"name": "agent-x", "uid": "u1"}, "spec": spec}))
        }
        other => panic!("unexpected: {other:?}"),
    })
}

fn list(items: &[Value]) -> Value {
    json!({"kind": "List", "metadata": {"resourceVersion": "1"}, "items": items})
}

fn legacy() -> Value {
    json!({
        "metadata": {"namespace": "shop", "name": "legacy", "uid": "legacy-uid"},
        "spec": {"nodeName": "n2", "containers": []},
        "status": {"phase": "Running", "podIPs": [{"ip": "10.0.0.9"}]},
    })
}

/// The cluster has these nodes, and a pod `cart-0` with the UID p1 on n1.
fn set_nodes(lab: &Lab, nodes: &[&str]) {
    set_cluster(lab, nodes, [pod("p1", "n1")]);
}

/// A pod `cart-0`.
fn pod(uid: &str, node: &str) -> Workload {
    Workload {
        uid: uid.to_owned(),
        name: "cart-0".to_owned(),
        namespace: "shop".to_owned(),
        service_account: "cart".to_owned(),
        node: node.to_owned(),
        addresses: Vec::new(),
        owner: "StatefulSet/cart".to_owned(),
    }
}

fn set_cluster(lab: &Lab, nodes: &[&str], pods: impl IntoIterator<Item = Workload>) {
    let node = |name: &&str| api::Node { name: (*name).to_owned(), zone: String::new() };
    let nodes = nodes.iter().map(node).collect();
    let services = Files { nodes, ..Files::default() };
    lab.control.set_cluster(Registry::from_cluster(pods), services);
}

/// Connects like an agent that knows the roots from the ConfigMap, and has no certificate yet.
async fn stranger(lab: &Lab) -> Client {
    let bundle = Arc::clone(&lab.control.view().bundle);
    connect(lab.address, PeerVerifier::new(bundle, Kind::Control), None).await.unwrap()
}

async fn join(lab: &Lab, token: &str) -> Result<Node, Status> {
    let service_account_token = token.to_owned();
    let request = api::JoinRequest { service_account_token, ..Default::default() };
    join_with(lab.address, stranger(lab).await, request).await
}

async fn renew(node: &mut Node) -> Result<(), Status> {
    let (_, csr) = key_and_csr();
    node.client.renew_node(api::RenewNodeRequest { csr }).await.map(drop)
}

#[tokio::test]
async fn an_agent_joins_with_its_service_account_token() {
    let lab = start().await;
    set_nodes(&lab, &["n1"]);
    let mut node = join(&lab, "of-n1").await.unwrap();
    assert_eq!(Leaf::parse(&node.identity.cert[0]).unwrap().id.to_string(), NODE);
    renew(&mut node).await.unwrap();
    node.svid("p1").await.unwrap();
    let snapshot = lab.control.publisher().subscribe().borrow().in_one();
    let snapshot = api::Snapshot::decode(snapshot.as_ref()).unwrap();
    assert_eq!(
        (snapshot.workloads[0].owner.as_str(), snapshot.nodes.len()),
        ("StatefulSet/cart", 1)
    );
    // The agent's container may start again.
    join(&lab, "of-n1").await.unwrap();

    let refused = join(&lab, "of-nobody").await.map(drop).unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert_eq!(lab.refused("service-account-token"), 1);
}

#[tokio::test]
async fn a_node_that_is_gone_gets_nothing() {
    let lab = start().await;
    set_nodes(&lab, &["n1", "n2"]);
    let mut node = join(&lab, "of-n1").await.unwrap();
    set_nodes(&lab, &["n2"]);
    let refused = [
        renew(&mut node).await.unwrap_err(),
        node.svid("p1").await.map(drop).unwrap_err(),
        join(&lab, "of-n1").await.map(drop).unwrap_err(),
    ];
    assert_eq!(refused.map(|status| status.code()), [Code::PermissionDenied; 3]);
    assert_eq!(lab.refused("node-gone"), 3);
    set_nodes(&lab, &["n1"]);
    renew(&mut node).await.unwrap();
}

#[tokio::test]
async fn the_operator_registers_nothing_here() {
    let lab = start().await;
    set_nodes(&lab, &["n1"]);
    let workload = lab.control.view().registry.get("p1").unwrap().clone();
    lab.control.register(&workload).unwrap_err();
    lab.control.deregister("p1").unwrap_err();
    let ttl = Duration::from_secs(60);
    lab.control.create_token("n1", ttl, SystemTime::now()).unwrap_err();
}

#[tokio::test]
async fn each_kind_of_token_is_for_one_kind_of_control_plane() {
    let lab = start().await;
    set_nodes(&lab, &["n1"]);
    let elsewhere = Lab::start().await;
    let request = api::JoinRequest { token: elsewhere.token("n1"), ..Default::default() };
    let refused = join_with(lab.address, stranger(&lab).await, request).await.map(drop);
    assert_eq!(refused.unwrap_err().code(), Code::PermissionDenied);
    let refused = join(&elsewhere, "of-n1").await.map(drop);
    assert_eq!(refused.unwrap_err().code(), Code::PermissionDenied);
    for lab in [lab, elsewhere] {
        assert_eq!(lab.refused("service-account-token"), 1);
    }
}
