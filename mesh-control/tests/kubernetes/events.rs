//! What agents tell of pods becomes Events of those pods, and of no others.

use std::sync::Mutex;

use super::*;
use crate::support::until;

/// A control plane that has agents on n1, where p1 is, and n2, where p2 is; and the Events that
/// were made.
async fn start_with_events() -> (Lab, Arc<Mutex<Vec<Value>>>) {
    let events = Arc::new(Mutex::new(Vec::new()));
    let made = Arc::clone(&events);
    let client = api_server(move |event| {
        made.lock().unwrap().push(event.clone());
        (201, event.clone())
    });
    let lab = Lab::start_on_kubernetes(client).await;
    set_cluster(&lab, &["n1", "n2"], [pod("p1", "n1"), pod("p2", "n2")]);
    (lab, events)
}

fn refusal(uid: &str, peer: &str) -> api::PodReport {
    api::PodReport {
        pod_uid: uid.to_owned(),
        reason: "PlaintextRefused".to_owned(),
        message: "refused: STRICT, plaintext from".to_owned(),
        count: 3,
        peer: peer.to_owned(),
    }
}

async fn report(node: &mut Node, reports: Vec<api::PodReport>) -> Result<(), Status> {
    node.client.report(api::ReportRequest { reports }).await.map(drop)
}

fn counted(lab: &Lab, outcome: &str) -> u64 {
    let text = lab.control.metrics.encode().unwrap();
    let start = format!("nodemesh_control_events_total{{outcome=\"{outcome}\"}} ");
    let line = text.lines().find_map(|line| line.strip_prefix(&start)).unwrap();
    line.parse().unwrap()
}

#[tokio::test]
async fn an_owner_sees_who_was_refused() {
    let (lab, events) = start_with_events().await;
    let mut node = join(&lab, "of-n1").await.unwrap();
    report(&mut node, vec![refusal("p1", "10.0.0.9"), refusal("p1", "198.51.100.1")])
        .await
        .unwrap();
    until(|| counted(&lab, "written") == 2).await;
    let events = events.lock().unwrap().clone();
    let [first, second] = &events[..] else { panic!("{events:#?}") };
    assert_eq!(second["note"], "refused: STRICT, plaintext from 198.51.100.1");
    assert_eq!(first["note"], "refused: STRICT, plaintext from shop/legacy");
    assert_eq!((&first["type"], &first["reason"]), (&json!("Warning"), &json!("PlaintextRefused")));
    assert_eq!(first["reportingController"], "nodemesh.io/control");
    let regarding = json!({
        "apiVersion": "v1", "kind": "Pod", "namespace": "shop", "name": "cart-0", "uid": "p1",
    });
    assert_eq!(first["regarding"], regarding);
    assert_eq!(first["related"]["uid"], "legacy-uid");
}

#[tokio::test]
async fn a_node_may_not_speak_of_other_nodes_pods() {
    let (lab, events) = start_with_events().await;
    let mut node = join(&lab, "of-n1").await.unwrap();
    for uid in ["p2", "nobody"] {
        let both = vec![refusal("p1", "10.0.0.9"), refusal(uid, "10.0.0.9")];
        let refused = report(&mut node, both).await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied, "{uid}");
    }
    assert_eq!((lab.refused("pod-foreign"), lab.refused("pod-unknown")), (1, 1));
    let anonymous = stranger(&lab).await.report(api::ReportRequest::default()).await.unwrap_err();
    assert_eq!(anonymous.code(), Code::Unauthenticated);
    // What it may say comes after what it may not: so nothing of that was written.
    report(&mut node, vec![refusal("p1", "198.51.100.1")]).await.unwrap();
    until(|| counted(&lab, "written") == 1).await;
    let notes: Vec<_> = events.lock().unwrap().iter().map(|event| event["note"].clone()).collect();
    assert_eq!(notes, ["refused: STRICT, plaintext from 198.51.100.1"]);
}

#[tokio::test]
async fn a_flood_is_bounded() {
    let (lab, _events) = start_with_events().await;
    let mut node = join(&lab, "of-n1").await.unwrap();
    report(&mut node, vec![refusal("p1", "10.0.0.9"); 100]).await.unwrap();
    assert_eq!(counted(&lab, "dropped"), 90);
}

#[tokio::test]
async fn an_api_server_that_refuses_does_no_harm() {
    let client = api_server(|_| (403, json!({"status": "Failure", "code": 403})));
    let lab = Lab::start_on_kubernetes(client).await;
    set_nodes(&lab, &["n1"]);
    let mut node = join(&lab, "of-n1").await.unwrap();
    for _ in 0..2 {
        report(&mut node, vec![refusal("p1", "10.0.0.9")]).await.unwrap();
    }
    until(|| counted(&lab, "failed") == 2).await;
}
