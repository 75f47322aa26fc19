//! Agents that do not keep to the protocol harm the connection they carry, and no other.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::{
    super::{
        Reason, Refusal, Role, Traffic, relay,
        server::{next_open, refuse},
    },
    lab::{
        Connection, assert_reset, client_agent, header, hear, joined, say, server_agent, tcp_pair,
        tunnel, within,
    },
};

const ACCEPTED: [u8; 4] = [2, 0, 1, 0];

/// An OPEN as [`header`] encodes it.
fn open() -> Vec<u8> {
    let mut bytes = vec![1, 0, 23, 1];
    bytes.extend([0xab; 16]);
    bytes.extend([0x9c, 0x41, 192, 0, 2, 7]);
    bytes
}

/// Streams that end a connection, what the log says of them, and how it begins.
fn malformed() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("unknown frame type 0x00", vec![0, 0, 0]),
        ("unknown frame type 0x47", b"GET / HTTP/1.1\r\n\r\n".to_vec()),
        ("a frame of type 0x03 cannot have a body of 0 bytes", vec![3, 0, 0]),
        ("a frame of type 0x03 cannot have a body of 16382 bytes", vec![3, 0x3f, 0xfe]),
        ("a frame of type 0x04 cannot have a body of 1 bytes", vec![4, 0, 1]),
        ("a frame of type 0x05 cannot have a body of 65535 bytes", vec![5, 0xff, 0xff]),
        ("a frame of type 0x02 cannot have a body of 258 bytes", vec![2, 1, 2]),
        ("a frame of type 0x01 cannot have a body of 22 bytes", vec![1, 0, 22]),
        ("a frame of type 0x02 has no place here", ACCEPTED.to_vec()),
        ("a frame of type 0x01 has no place here", open()),
        ("a frame of type 0x06 has no place here", vec![6, 0, 0]),
    ]
}

#[tokio::test]
async fn a_server_that_talks_nonsense_ends_only_its_own_connection() {
    let mut bystander = Connection::new().await;
    say(&mut bystander.client, b"before").await;
    for (error, bytes) in malformed() {
        let (near, mut far) = tunnel().await;
        let (mut client, client_side) = tcp_pair().await;
        let agent = client_agent(client_side, near, Default::default());
        within("the header", next_open(&mut far)).await.unwrap();
        say(&mut far, &[ACCEPTED.as_slice(), &[3, 0, 2, b'o', b'k'], bytes.as_slice()].concat())
            .await;
        hear(&mut client, b"ok").await;
        assert_reset(&mut client).await;
        let (outcome, _) = joined(agent).await;
        assert_eq!(outcome.end.to_string(), format!("protocol error: {error}"));
        assert!(!outcome.reusable);
    }
    hear(&mut bystander.server, b"before").await;
    say(&mut bystander.server, b"after").await;
    hear(&mut bystander.client, b"after").await;
}

#[tokio::test]
async fn a_client_that_talks_nonsense_ends_only_its_own_connection() {
    let mut bystander = Connection::new().await;
    say(&mut bystander.client, b"before").await;
    for (error, bytes) in malformed() {
        let (mut near, far) = tunnel().await;
        let (mut server, server_side) = tcp_pair().await;
        let agent = server_agent(server_side, far);
        say(&mut near, &[open().as_slice(), &[3, 0, 2, b'o', b'k'], &bytes].concat()).await;
        hear(&mut server, b"ok").await;
        assert_reset(&mut server).await;
        let (outcome, _) = joined(agent).await;
        assert_eq!(outcome.end.to_string(), format!("protocol error: {error}"));
        assert!(!outcome.reusable);
    }
    hear(&mut bystander.server, b"before").await;
}

#[tokio::test]
async fn a_server_that_answers_out_of_turn_gets_no_byte_through() {
    for bytes in [&[3, 0, 1, b'x'][..], &[4, 0, 0], &[5, 0, 0], &[6, 0, 0, 6, 0, 0]] {
        let (near, mut far) = tunnel().await;
        let (mut client, client_side) = tcp_pair().await;
        let agent = client_agent(client_side, near, Default::default());
        within("the header", next_open(&mut far)).await.unwrap();
        say(&mut far, bytes).await;
        assert_reset(&mut client).await;
        assert_eq!(joined(agent).await.0.end.words(), "protocol error");
    }
}

#[tokio::test]
async fn an_idle_tunnel_takes_nothing_but_a_whole_open() {
    let mut cases = malformed();
    // On an idle tunnel an OPEN is in its place, and RESET, FIN and DATA are not.
    cases.retain(|(error, _)| !error.contains("0x01 has no place"));
    cases.push(("a frame of type 0x03 has no place here", vec![3, 0, 1, 0]));
    cases.push(("a frame of type 0x05 has no place here", vec![5, 0, 0]));
    let mut version = open();
    version[3] = 2;
    cases.push(("version 2 of the tunnel header: only version 1 is known", version));
    for (error, bytes) in cases {
        let (mut near, mut far) = tunnel().await;
        say(&mut near, &bytes).await;
        let got = within("the frame", next_open(&mut far)).await.unwrap_err();
        assert_eq!(
            got.to_string(),
            format!("the client's agent does not speak nodemesh/1: {error}")
        );
    }
    for cut in 1..open().len() {
        let (mut near, mut far) = tunnel().await;
        say(&mut near, &open()[..cut]).await;
        near.shutdown().await.unwrap();
        let got = within("the end", next_open(&mut far)).await.unwrap_err();
        assert!(got.to_string().starts_with("the tunnel broke off"), "cut at {cut}: {got}");
    }
    // And the twins: all of it, and none of it.
    let (mut near, mut far) = tunnel().await;
    say(&mut near, &open()).await;
    assert_eq!(within("the header", next_open(&mut far)).await.unwrap(), Some(header()));
    let (near, mut far) = tunnel().await;
    drop(near);
    assert!(within("the end", next_open(&mut far)).await.unwrap().is_none());
}

#[tokio::test]
async fn a_peer_that_speaks_after_its_end_or_vanishes_is_noticed_by_a_silent_connection() {
    for (last, words) in [(&[3, 0, 1, b'x'][..], "protocol error"), (&[], "tunnel lost")] {
        let (near, mut far) = tunnel().await;
        let (mut client, client_side) = tcp_pair().await;
        let agent = client_agent(client_side, near, Default::default());
        within("the header", next_open(&mut far)).await.unwrap();
        say(&mut far, &[ACCEPTED.as_slice(), &[4, 0, 0]].concat()).await;
        assert_eq!(within("the end", client.read(&mut [0])).await.unwrap(), 0);
        say(&mut far, last).await;
        drop(far);
        let (outcome, _) = joined(agent).await;
        assert_eq!((outcome.end.words(), outcome.reusable), (words, false));
    }
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_never_ends_its_direction_is_not_waited_for() {
    // In memory: with the clock paused, time passes only when nothing else can happen.
    let (near, mut far) = tokio::io::duplex(1 << 16);
    let mut near = tokio::io::BufReader::new(near);
    far.write_all(&[3, 0, 1, 0]).await.unwrap();
    let refused = refuse(&mut near, Refusal::new(Reason::Overloaded, ""));
    let started = tokio::time::Instant::now();
    assert!(!refused.await, "a tunnel whose client has not ended its direction is no idle one");
    assert!(started.elapsed() < Duration::from_secs(60));
    let mut answer = [0; 4];
    far.read_exact(&mut answer).await.unwrap();
    assert_eq!(answer, [2, 0, 1, 8]);

    // The same for a client that is refused by a server that then does not read its RESET.
    let (app, mut application) = tokio::io::duplex(64);
    let (near, mut far) = tokio::io::duplex(40);
    let mut near = tokio::io::BufReader::new(near);
    application.write_all(&[1; 64]).await.unwrap();
    far.write_all(&[2, 0, 1, 1]).await.unwrap();
    let traffic = Traffic::default();
    let outcome =
        relay(super::bounds::InMemory(app), &mut near, Role::Client(header()), &traffic).await;
    assert_eq!((outcome.end.words(), outcome.reusable), ("denied by policy", false));
}
