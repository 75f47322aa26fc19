use super::*;
use crate::admin::status::{OpenConnection, SCHEMA, tests::healthy};

#[test]
fn a_person_reads_everything_that_matters() {
    let text = print_status(&healthy(), Style::Plain);
    let expected = "\
mesh-agent 0.1.0 on node-1, up 3h 12m: healthy

control plane     connected to mesh-control:9464 for 3h 12m, snapshot 42, synced 12s ago
node certificate  serial 80000f, expires in 4h 0m, rotates in 2h 0m
eBPF programs     connect4
kernel TLS        off

pod shop/cart-0 (u1) at /run/netns/cart
  identity     spiffe://td/ns/shop/sa/cart
  certificate  serial 80000f, issued 10m 0s ago, expires in 4h 0m, rotates in 2h 0m
  guard        device active (eth0)
  connections  mtls 3/120, local 0/0, plaintext 0/0 (open/total), denied 2 (unknown-in-cluster 2)
  payload      1.0 KiB sent, 2.0 KiB received
  handshakes   7 ok, failed 0; tunnels 1 idle, 2 shared
  udp          allow, 5 datagrams left
  drops        device/plaintext 12
  cut          4 connections at enrolment, 2 no longer allowed
  repairs      0

LAST       TIMES  PROBLEM
1m 0s ago  3      something [31m else
";
    assert_eq!(text, expected, "{text}");
}

#[test]
fn what_is_wrong_stands_out() {
    let mut status = healthy();
    status.degraded = vec!["pod x: broken".to_owned()];
    status.ready = false;
    status.pods[0].guard[0].active = false;
    status.pods[0].listening = false;
    status.pods[0].certificate = None;
    status.pods[0].certificate_problem = Some("CA away".to_owned());
    let text = print_status(&status, Style::Plain);
    for words in [
        "up 3h 12m: degraded, not ready\n  ! pod x: broken\n",
        "certificate  none: CA away",
        "device INACTIVE (eth0), listeners closed",
    ] {
        assert!(text.contains(words), "{words} not in\n{text}");
    }
    let pods = print_pods(&status, Style::Plain);
    assert!(pods.contains("none") && pods.contains("no device"), "{pods}");
    assert!(print_certs(&status, Style::Plain).contains("CA away"));
}

#[test]
fn a_terminal_is_not_at_the_mercy_of_names() {
    let mut status = healthy();
    let evil = "\u{1b}]0;owned\u{7}\n";
    status.node = evil.to_owned();
    status.pods[0].name = Some(evil.to_owned());
    status.pods[0].identity = Some(evil.to_owned());
    status.pods[0].denied[0].reason = evil.to_owned();
    status.degraded = vec![evil.to_owned()];
    for text in [
        print_status(&status, Style::Plain),
        print_pods(&status, Style::Plain),
        print_certs(&status, Style::Plain),
    ] {
        assert!(!text.contains('\u{1b}') && !text.contains('\u{7}'), "{text:?}");
    }
    assert!(print_status(&status, Style::Colour).contains('\u{1b}'), "colours are there");
}

#[test]
fn pods_and_connections_have_one_line_each() {
    let status = healthy();
    let pods = print_pods(&status, Style::Plain);
    assert_eq!(pods.lines().count(), 2, "{pods}");
    assert!(pods.contains("3/120") && pods.contains("4h 0m left"), "{pods}");

    let party = |address: &str, identity: Option<&str>| Party {
        address: address.parse().unwrap(),
        identity: identity.map(str::to_owned),
        uid: None,
    };
    let open = OpenConnections {
        schema: SCHEMA,
        time: status.time,
        connections: vec![OpenConnection {
            pod: "u1".to_owned(),
            direction: "outbound".to_owned(),
            kind: "plaintext".to_owned(),
            client: party("10.1.0.1:4000", Some("spiffe://td/ns/shop/sa/cart")),
            server: party("[2001:db8::1]:443", None),
            since: status.started,
            from_client: 10,
            from_server: 5000,
            trace: None,
        }],
    };
    let text = print_connections(&open, Style::Plain);
    assert_eq!(text.lines().count(), 2, "{text}");
    for cell in ["10.1.0.1:4000 spiffe://", "[2001:db8::1]:443", "3h 12m", "10 B", "4.9 KiB"] {
        assert!(text.contains(cell), "{cell} not in {text}");
    }
}
