//! The relay without a tunnel.

use std::sync::Arc;

use tokio::{io::AsyncWriteExt as _, net::TcpStream, task::JoinHandle};

use super::{
    super::{AppSocket, End, Traffic, relay_plain},
    lab::{assert_reset, hear, read_all, reset, say, tcp_pair, within},
};

async fn relayed() -> (TcpStream, TcpStream, JoinHandle<End>, Arc<Traffic>) {
    let (client, client_side) = tcp_pair().await;
    let (server, server_side) = tcp_pair().await;
    let traffic = Arc::<Traffic>::default();
    let counted = Arc::clone(&traffic);
    let agent = tokio::spawn(async move {
        let [client, server] = [client_side, server_side].map(|s| AppSocket::new(s).unwrap());
        relay_plain(client, server, &[&counted]).await
    });
    (client, server, agent, traffic)
}

#[tokio::test]
async fn bytes_and_half_closes_cross() {
    let (mut client, mut server, agent, traffic) = relayed().await;
    let question = vec![1; 300_000];
    let asked = async {
        say(&mut client, &question).await;
        client.shutdown().await.unwrap();
    };
    let ((), heard) = tokio::join!(asked, read_all(&mut server));
    assert!(heard == question);
    say(&mut server, b"answer").await;
    hear(&mut client, b"answer").await;
    server.shutdown().await.unwrap();
    assert_eq!(read_all(&mut client).await, b"");
    assert_eq!(within("the agent", agent).await.unwrap().words(), "finished");
    assert_eq!((traffic.from_client(), traffic.from_server()), (300_000, 6));
}

#[tokio::test]
async fn resets_cross() {
    for from_client in [true, false] {
        let (client, server, agent, _) = relayed().await;
        let (dying, mut other) = if from_client { (client, server) } else { (server, client) };
        reset(dying);
        assert_reset(&mut other).await;
        let words = if from_client { "client reset" } else { "server reset" };
        assert_eq!(within("the agent", agent).await.unwrap().words(), words);
    }
}

#[tokio::test]
async fn an_agent_that_stops_resets_both() {
    let (mut client, mut server, agent, _) = relayed().await;
    say(&mut client, b"hello").await;
    hear(&mut server, b"hello").await;
    agent.abort();
    assert_reset(&mut client).await;
    assert_reset(&mut server).await;
}
