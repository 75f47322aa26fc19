//! Agents of the release before and of the one after.

use super::*;

#[tokio::test]
async fn one_that_says_less_is_served_and_what_it_does_not_say_is_unknown() {
    let lab = Lab::start().await;
    lab.register("u1", "n1", "10.0.0.1").await;
    let mut node = lab.node("n1").await;
    // No word of its pods, nor of what it understands.
    let mut watch = Watch::open(&mut node).await;
    let version = watch.next().await.version;
    watch.answer(Message::Ack(api::Ack { version })).await;
    until(|| agent(&lab, "n1").unwrap().in_sync).await;
    node.svid("u1").await.unwrap();
    let status = admin::show_all(&lab.control, None).await;
    assert_eq!(status.pods.len(), 1);
    assert_eq!(status.pods[0].state, None, "unknown, not bad");
    assert_eq!(status.degraded, [""; 0]);
    // Without the address of the other end, which was added later.
    let report = api::PodReport {
        pod_uid: "u1".to_owned(),
        reason: "PlaintextRefused".to_owned(),
        message: "refused: STRICT, plaintext from shop/legacy".to_owned(),
        count: 1,
        peer: String::new(),
    };
    node.client.report(api::ReportRequest { reports: vec![report] }).await.unwrap();
}

#[tokio::test]
async fn what_one_says_that_is_not_known_here_is_passed_over() {
    let lab = Lab::start().await;
    lab.register("u1", "n1", "10.0.0.1").await;
    let mut node = lab.node("n1").await;
    let mut watch = Watch::open(&mut node).await;
    watch.next().await;
    watch.answers.send(api::WatchRequest { message: None }).await.unwrap();
    let report = api::PodReport {
        pod_uid: "u1".to_owned(),
        reason: "WhatOnlyALaterReleaseKnows".to_owned(),
        ..Default::default()
    };
    node.client.report(api::ReportRequest { reports: vec![report] }).await.unwrap();
    lab.register("u2", "n1", "10.0.0.2").await;
    assert_eq!(watch.next().await.workloads.len(), 2, "the stream goes on");
}
