//! The other replicas of the control plane: each knows its own agents, and tells whoever shows a
//! certificate of the control plane.

use std::{collections::BTreeSet, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context as _;
use futures::future::join_all;
use hyper_util::rt::TokioIo;
use mesh_common::{
    api::{self, ALPN, replicas_client::ReplicasClient},
    svid::{Kind, PeerVerifier, client_config},
};
use rustls::pki_types::ServerName;
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::TlsConnector;
use tonic::transport::Endpoint;
use tower::service_fn;

use crate::{control::Control, status::Status};

/// How long a replica may take, from the connection to the answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(3);

/// Replicas that are asked. The rest is said not to have been.
const MAX_REPLICAS: usize = 16;

/// The longest answer: 1000 agents with 100 pods each have a fifth of it.
const MAX_ANSWER_BYTES: usize = 64 << 20;

/// What another replica says of itself, or why it says nothing.
pub type Answer = (SocketAddr, Result<Status, String>);

/// Asks all replicas at these addresses, but this one.
pub async fn ask(control: &Control, addresses: &BTreeSet<SocketAddr>) -> Vec<Answer> {
    let asked = addresses.iter().enumerate().map(|(n, address)| async move {
        if n >= MAX_REPLICAS {
            return Some((*address, Err("there are too many replicas to ask".to_owned())));
        }
        let answer = match timeout(ANSWER_WITHIN, ask_one(control, *address)).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(format!("{error:#}")),
            Err(_) => Err("no answer".to_owned()),
        };
        answer.transpose().map(|answer| (*address, answer))
    });
    join_all(asked).await.into_iter().flatten().collect()
}

/// None if it is this replica.
async fn ask_one(control: &Control, address: SocketAddr) -> anyhow::Result<Option<Status>> {
    let verifier = PeerVerifier::new(Arc::clone(&control.view().bundle), Kind::Control);
    let tls = client_config(Arc::new(verifier), Some(control.identity()), ALPN)?;
    let connector = TlsConnector::from(Arc::new(tls));
    let connect = service_fn(move |_| {
        let connector = connector.clone();
        async move {
            let stream = TcpStream::connect(address).await?;
            // Neither sent nor compared: the certificate names the control plane, not a host.
            let name = ServerName::try_from("control.nodemesh").expect("a valid host name");
            connector.connect(name, stream).await.map(TokioIo::new)
        }
    });
    let channel = Endpoint::from_static("http://control.nodemesh")
        .connect_with_connector(connect)
        .await
        .context("connecting")?;
    let mut client = ReplicasClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES);
    let answer = client.status(api::ReplicaStatusRequest {}).await;
    let api::ReplicaStatus { instance, status } =
        answer.map_err(|status| anyhow::anyhow!("{}", status.message()))?.into_inner();
    if instance == control.instance {
        return Ok(None);
    }
    serde_json::from_slice(&status).context("reading its answer").map(Some)
}
