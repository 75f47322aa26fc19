//! Connections as applications see them.

use futures::FutureExt as _;
use rand::{Rng as _, RngCore as _, SeedableRng as _, rngs::StdRng};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use super::{
    super::{
        AppSocket, End, Reason, Refusal, Role, Traffic, relay,
        server::{go_away, next_open, refuse},
    },
    lab::{
        Connection, assert_reset, client_agent, client_agent_as, header, hear, joined, read_all,
        reset, say, server_agent, tcp_pair, tunnel, within,
    },
};

/// Writes `bytes` in pieces of random sizes, then half-closes.
pub(super) async fn write_in_pieces(
    stream: &mut (impl tokio::io::AsyncWrite + Unpin),
    bytes: &[u8],
    mut rng: StdRng,
) {
    let mut rest = bytes;
    while !rest.is_empty() {
        let most = 1_usize << rng.random_range(0..18);
        let (piece, after) = rest.split_at(rng.random_range(1..=most).min(rest.len()));
        stream.write_all(piece).await.unwrap();
        if rng.random_ratio(1, 4) {
            tokio::task::yield_now().await;
        }
        rest = after;
    }
    stream.shutdown().await.unwrap();
}

#[tokio::test]
async fn every_byte_arrives_both_ways_however_it_is_cut() {
    let mut tunnel = tunnel().await;
    for seed in 0..12 {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut random = |most| {
            let mut bytes = vec![0; rng.random_range(0..most)];
            rng.fill_bytes(&mut bytes);
            bytes
        };
        let (question, answer) = (random(1 << (8 + seed)), random(1 << (20 - seed)));
        let mut connection = Connection::open(tunnel).await;
        let (mut client_in, mut client_out) = connection.client.split();
        let (mut server_in, mut server_out) = connection.server.split();
        let (_, _, answered, asked) = within("the exchange", async {
            tokio::join!(
                write_in_pieces(&mut client_out, &question, StdRng::seed_from_u64(seed + 100)),
                write_in_pieces(&mut server_out, &answer, StdRng::seed_from_u64(seed + 200)),
                read_all(&mut client_in),
                read_all(&mut server_in),
            )
        })
        .await;
        assert!(asked == question, "seed {seed}: the server reads something else");
        assert!(answered == answer, "seed {seed}: the client reads something else");
        let traffic = std::sync::Arc::clone(&connection.traffic);
        let (at_client, at_server, idle) = connection.ended().await;
        assert_eq!((at_client, at_server), ("finished", "finished"));
        assert_eq!(traffic.from_client(), question.len() as u64);
        assert_eq!(traffic.from_server(), answer.len() as u64);
        tunnel = idle;
    }
}

#[tokio::test]
async fn a_thousand_connections_use_one_tunnel() {
    let mut tunnel = tunnel().await;
    for n in 0..1000_u32 {
        let mut connection = Connection::open(tunnel).await;
        if n % 3 > 0 {
            say(&mut connection.client, &n.to_be_bytes()).await;
        }
        if n % 2 == 0 {
            connection.client.shutdown().await.unwrap();
            let question = read_all(&mut connection.server).await;
            assert_eq!(question, if n % 3 > 0 { n.to_be_bytes().to_vec() } else { Vec::new() });
            connection.server.shutdown().await.unwrap();
            assert_eq!(read_all(&mut connection.client).await, b"");
        } else {
            connection.server.shutdown().await.unwrap();
            assert_eq!(read_all(&mut connection.client).await, b"");
            connection.client.shutdown().await.unwrap();
            assert_eq!(read_all(&mut connection.server).await.len(), if n % 3 > 0 { 4 } else { 0 });
        }
        let (at_client, at_server, idle) = connection.ended().await;
        assert_eq!((at_client, at_server), ("finished", "finished"));
        tunnel = idle;
    }
}

#[tokio::test]
async fn the_server_may_speak_first_and_one_byte_at_a_time() {
    let mut connection = Connection::new().await;
    for n in 0..200_u8 {
        say(&mut connection.server, &[n]).await;
        hear(&mut connection.client, &[n]).await;
        say(&mut connection.client, &[!n]).await;
        hear(&mut connection.server, &[!n]).await;
    }
    drop(connection.client);
    assert_eq!(read_all(&mut connection.server).await, b"");
}

#[tokio::test]
async fn each_side_may_close_its_half_first() {
    let mut connection = Connection::new().await;
    say(&mut connection.client, b"question").await;
    connection.client.shutdown().await.unwrap();
    assert_eq!(read_all(&mut connection.server).await, b"question");
    for _ in 0..3 {
        say(&mut connection.server, b"late answer").await;
        hear(&mut connection.client, b"late answer").await;
    }
    connection.server.shutdown().await.unwrap();
    assert_eq!(read_all(&mut connection.client).await, b"");
    let (_, _, tunnel) = connection.ended().await;

    let mut connection = Connection::open(tunnel).await;
    connection.server.shutdown().await.unwrap();
    assert_eq!(read_all(&mut connection.client).await, b"");
    say(&mut connection.client, b"still here").await;
    hear(&mut connection.server, b"still here").await;
    connection.client.shutdown().await.unwrap();
    assert_eq!(read_all(&mut connection.server).await, b"");
    connection.ended().await;
}

#[tokio::test]
async fn a_reset_crosses_and_the_tunnel_survives_it() {
    let mut tunnel = tunnel().await;
    for from_client in [true, false] {
        for (talked, other_half_closed) in [(false, false), (true, false), (true, true)] {
            let mut connection = Connection::open(tunnel).await;
            if talked {
                say(&mut connection.client, b"hello").await;
                hear(&mut connection.server, b"hello").await;
            }
            let Connection { client, server, client_agent, server_agent, .. } = connection;
            let (mut dying, mut other) =
                if from_client { (client, server) } else { (server, client) };
            if other_half_closed {
                other.shutdown().await.unwrap();
                assert_eq!(read_all(&mut dying).await, b"");
            }
            reset(dying);
            assert_reset(&mut other).await;
            let (at_client, near) = joined(client_agent).await;
            let (at_server, far) = joined(server_agent).await;
            let words = if from_client { "client reset" } else { "server reset" };
            assert_eq!((at_client.end.words(), at_server.end.words()), (words, words));
            assert!(at_client.reusable && at_server.reusable);
            tunnel = (near, far);
        }
    }
}

#[tokio::test]
async fn a_reset_after_the_own_end_costs_the_tunnel_and_still_arrives() {
    let mut connection = Connection::new().await;
    connection.client.shutdown().await.unwrap();
    assert_eq!(read_all(&mut connection.server).await, b"");
    let Connection { client, mut server, client_agent, server_agent, .. } = connection;
    reset(client);
    // Nobody reads from a half-closed client any more: the next byte to it finds it gone.
    let (at_client, near) = within("the client's agent", async {
        let mut client_agent = client_agent;
        loop {
            // The server may learn of the reset by failing to write.
            let _written = server.write_all(b"are you there?").await;
            tokio::select! {
                done = &mut client_agent => break done.unwrap(),
                () = tokio::task::yield_now() => {}
            }
        }
    })
    .await;
    assert_eq!(at_client.end.words(), "client reset");
    assert!(!at_client.reusable);
    drop(near);
    let (at_server, _) = joined(server_agent).await;
    assert_eq!(at_server.end.words(), "tunnel lost");
    // It has read the client's end of file already, so the reset shows when it writes.
    let refused = async { while server.write_all(b"and now?").await.is_ok() {} };
    within("the server's application sees no reset", refused).await;
}

#[tokio::test]
async fn a_tunnel_cut_in_the_middle_is_never_a_clean_end() {
    for polite in [false, true] {
        let (near, mut far) = tunnel().await;
        let (mut client, client_side) = tcp_pair().await;
        let agent = client_agent(client_side, near, Default::default());
        within("the header", next_open(&mut far)).await.unwrap();
        // Accepted, one DATA frame of four bytes, and then no FIN.
        say(&mut far, &[2, 0, 1, 0, 3, 0, 4, b'p', b'a', b'r', b't']).await;
        hear(&mut client, b"part").await;
        if polite {
            // Even a close_notify, which says that TLS was not cut, does not say FIN.
            far.shutdown().await.unwrap();
        }
        drop(far);
        assert_reset(&mut client).await;
        let (outcome, _) = joined(agent).await;
        assert_eq!(outcome.end.words(), "tunnel lost");
        assert!(!outcome.reusable && outcome.untouched.is_none());
    }
}

#[tokio::test]
async fn an_agent_that_stops_resets_both_applications() {
    let mut connection = Connection::new().await;
    say(&mut connection.client, b"hello").await;
    hear(&mut connection.server, b"hello").await;
    // As the end of the process would: every socket of the agent is closed as it is.
    connection.client_agent.abort();
    connection.server_agent.abort();
    assert_reset(&mut connection.client).await;
    assert_reset(&mut connection.server).await;
}

#[tokio::test]
async fn a_refusal_resets_the_client_and_the_tunnel_serves_the_next() {
    let (mut near, mut far) = tunnel().await;
    for early in [b"".as_slice(), b"early bytes"] {
        let (mut client, client_side) = tcp_pair().await;
        say(&mut client, early).await;
        let agent = client_agent(client_side, near, Default::default());
        within("the header", next_open(&mut far)).await.unwrap();
        let refusal = Refusal::new(Reason::Denied, "no rule allows it");
        assert!(within("the refusal", refuse(&mut far, refusal.clone())).await);
        let (outcome, tunnel) = joined(agent).await;
        // Who has said nothing could be carried by another tunnel: nobody wants that here.
        assert_eq!(outcome.untouched.is_some(), early.is_empty());
        drop(outcome.untouched);
        assert_reset(&mut client).await;
        assert!(matches!(&outcome.end, End::Refused(why) if *why == refusal));
        assert_eq!(outcome.end.to_string(), "refused: denied by policy: no rule allows it");
        assert!(outcome.reusable);
        near = tunnel;
    }
    let mut connection = Connection::open((near, far)).await;
    say(&mut connection.client, b"and now?").await;
    hear(&mut connection.server, b"and now?").await;
}

#[tokio::test]
async fn a_patient_client_says_nothing_to_a_server_that_refuses() {
    for early in [b"".as_slice(), b"early bytes"] {
        let (near, mut far) = tunnel().await;
        let (mut client, client_side) = tcp_pair().await;
        say(&mut client, early).await;
        client.shutdown().await.unwrap();
        let role = Role::PatientClient(header());
        let agent = client_agent_as(role, client_side, near, Default::default());
        within("the header", next_open(&mut far)).await.unwrap();
        let refusal = Refusal::new(Reason::ConnectionRefused, "");
        assert!(within("the refusal", refuse(&mut far, refusal)).await);
        let (outcome, near) = joined(agent).await;
        assert!(outcome.reusable && matches!(outcome.end, End::Refused(_)));
        // The next server hears everything.
        let app = outcome.untouched.expect("nothing was read from the application");
        let (mut server, server_side) = tcp_pair().await;
        let served = server_agent(server_side, far);
        let mut near = near;
        let relayed = tokio::spawn(async move {
            let role = Role::PatientClient(header());
            relay(app, &mut near, role, &Traffic::default()).await.end
        });
        assert_eq!(read_all(&mut server).await, early);
        say(&mut server, b"answer").await;
        server.shutdown().await.unwrap();
        assert_eq!(read_all(&mut client).await, b"answer");
        assert_eq!(within("the relay", relayed).await.unwrap().words(), "finished");
        drop(served);
    }
}

#[tokio::test]
async fn the_first_bytes_do_not_wait_for_the_answer_and_the_others_do() {
    let (near, mut far) = tunnel().await;
    let (mut client, client_side) = tcp_pair().await;
    // More than a frame.
    say(&mut client, &[7; 20_000]).await;
    let agent = client_agent(client_side, near, Default::default());
    within("the header", next_open(&mut far)).await.unwrap();
    let mut early = [0; 3];
    within("early data", far.read_exact(&mut early)).await.unwrap();
    let [3, hi, lo] = early else { panic!("{early:?} is no DATA frame") };
    let mut payload = vec![0; usize::from(u16::from_be_bytes([hi, lo]))];
    within("early data", far.read_exact(&mut payload)).await.unwrap();
    // The client's half-close would come at once if anything more than a frame could.
    client.shutdown().await.unwrap();
    let refused = refuse(&mut far, Refusal::new(Reason::ConnectionRefused, ""));
    assert!(within("the refusal", refused).await);
    let (outcome, mut near) = joined(agent).await;
    assert_eq!(outcome.end.words(), "connection refused");
    // What followed the early data was a RESET, and nothing else was ever sent.
    say(&mut near, &[4, 0, 0]).await;
    let error = within("the end", next_open(&mut far)).await.unwrap_err();
    assert!(error.to_string().contains("0x04"), "{error}");
}

#[tokio::test]
async fn an_orderly_end_leaves_the_last_bytes_to_a_slow_reader() {
    // More than the reader's socket buffer takes at once, so that most of it waits in ours.
    let answer = vec![9; 400_000];
    let mut connection = Connection::new().await;
    connection.client.shutdown().await.unwrap();
    let (mut server, expected) = (connection.server, answer.clone());
    assert_eq!(read_all(&mut server).await, b"");
    tokio::spawn(async move {
        say(&mut server, &answer).await;
        server.shutdown().await.unwrap();
        server
    });
    let (at_client, _) = joined(connection.client_agent).await;
    assert_eq!(at_client.end.words(), "finished");
    // The agent has closed its socket before the application reads the first byte.
    assert!(read_all(&mut connection.client).await == expected);
}

#[tokio::test]
async fn without_the_orderly_end_the_same_bytes_are_lost() {
    let (mut reader, writer) = tcp_pair().await;
    let mut writer = AppSocket::new(writer).unwrap();
    // As many as fit, so that some are still in the writer's queue.
    let full = Box::pin(writer.write_all(&vec![9; 64 << 20])).now_or_never();
    assert!(full.is_none(), "64 MiB fit into a socket");
    writer.shutdown().await.unwrap();
    drop(writer);
    assert_reset(&mut reader).await;
}

#[tokio::test]
async fn after_goaway_a_crossing_connection_is_served_and_the_tunnel_ends() {
    let (near, mut far) = tunnel().await;
    go_away(&mut far).await.unwrap();
    let mut connection = Connection::open((near, far)).await;
    say(&mut connection.client, b"just in time").await;
    connection.client.shutdown().await.unwrap();
    assert_eq!(read_all(&mut connection.server).await, b"just in time");
    connection.server.shutdown().await.unwrap();
    assert_eq!(read_all(&mut connection.client).await, b"");
    let (at_client, near) = joined(connection.client_agent).await;
    assert_eq!((at_client.end.words(), at_client.reusable), ("finished", false));
    drop(near);
    let (_, mut far) = joined(connection.server_agent).await;
    assert!(within("the close", next_open(&mut far)).await.unwrap().is_none());
}

#[tokio::test]
async fn a_dead_tunnel_gives_an_untouched_application_back() {
    for (said, given_back) in [(b"".as_slice(), true), (b"spoken", false)] {
        let (near, far) = tunnel().await;
        drop(far);
        let (mut client, client_side) = tcp_pair().await;
        say(&mut client, said).await;
        client_side.readable_if(!said.is_empty()).await;
        let (outcome, _) = joined(client_agent(client_side, near, Default::default())).await;
        assert_eq!(outcome.end.words(), "tunnel lost");
        assert_eq!(outcome.untouched.is_some(), given_back);
        let Some(app) = outcome.untouched else {
            assert_reset(&mut client).await;
            continue;
        };
        // Another tunnel carries it as if nothing had happened.
        let (mut near, far) = tunnel().await;
        let (mut server, server_side) = tcp_pair().await;
        let served = server_agent(server_side, far);
        let relayed = tokio::spawn(async move {
            relay(app, &mut near, Role::Client(header()), &Traffic::default()).await.end
        });
        say(&mut client, b"hello").await;
        client.shutdown().await.unwrap();
        assert_eq!(read_all(&mut server).await, b"hello");
        drop(server);
        assert_eq!(read_all(&mut client).await, b"");
        assert_eq!(within("the relay", relayed).await.unwrap().words(), "finished");
        drop(served);
    }
}

/// Waits until a socket has something to read, if it is going to.
trait ReadableIf {
    async fn readable_if(&self, expected: bool);
}

impl ReadableIf for TcpStream {
    async fn readable_if(&self, expected: bool) {
        if expected {
            within("the application's bytes", self.readable()).await.unwrap();
        }
    }
}
