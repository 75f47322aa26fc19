//! The agents' door: TCP, TLS 1.3, gRPC, each with a bound on what one client can hold.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use mesh_common::{
    api::{ALPN, control_plane_server::ControlPlaneServer, replicas_server::ReplicasServer},
    svid::{Kind, Leaf, PeerVerifier, server_config},
};
use rustls::pki_types::CertificateDer;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::{Sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Server, server::Connected};

use crate::{
    control::Control,
    kubernetes::{attest::Attestor, events::Events},
    refusal::Reason,
    service::Service,
};

/// Requests are small: a token, a key, an acknowledgement.
const MAX_REQUEST_BYTES: usize = 64 * 1024;

/// Calls in flight on one connection: a stream of snapshots, and certificates of some pods.
const MAX_CALLS: u32 = 32;

/// How often a silent agent is asked whether it is there.
const KEEPALIVE: Duration = Duration::from_secs(20);

/// Who is at the other end of a connection: all that a call is judged by.
#[derive(Clone, Debug)]
pub struct Peer {
    /// The TCP peer.
    pub address: SocketAddr,
    /// The certificates it showed, leaf first, accepted in the handshake as a node's or a replica's.
    pub chain: Option<Arc<[CertificateDer<'static>]>>,
}

/// Serves agents and other replicas until `shutdown`, then lets calls in flight end. In a `cluster`
/// agents join with service account tokens, and what they tell of pods becomes Events.
///
/// # Errors
///
/// If the transport fails as a whole.
pub async fn serve(
    control: Arc<Control>,
    cluster: Option<(Attestor, Events)>,
    listener: TcpListener,
    shutdown: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    // One: what is accepted and cannot be served yet waits in the kernel's queue.
    let (sender, incoming) = mpsc::channel(1);
    let accepting = tokio::spawn(accept(Arc::clone(&control), listener, sender, shutdown.clone()));
    let service = Service::new(control, cluster, shutdown.clone());
    let replicas = ReplicasServer::new(service.clone()).max_decoding_message_size(0);
    let service = ControlPlaneServer::new(service).max_decoding_message_size(MAX_REQUEST_BYTES);
    let result = Server::builder()
        .max_concurrent_streams(MAX_CALLS)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE / 2))
        .http2_max_header_list_size(16 * 1024)
        .add_service(service)
        .add_service(replicas)
        .serve_with_incoming_shutdown(ReceiverStream::new(incoming), shutdown.cancelled())
        .await;
    accepting.abort();
    result
}

async fn accept(
    control: Arc<Control>,
    listener: TcpListener,
    sender: mpsc::Sender<io::Result<Connection>>,
    shutdown: CancellationToken,
) {
    let places = Arc::new(Semaphore::new(control.config().limits.connections));
    loop {
        let place = Arc::clone(&places).acquire_owned().await.expect("it is never closed");
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = shutdown.cancelled() => return,
        };
        match accepted {
            Ok((stream, address)) => {
                let (control, sender) = (Arc::clone(&control), sender.clone());
                tokio::spawn(async move {
                    match handshake(&control, stream, address, place).await {
                        // No receiver: the server is shutting down.
                        Ok(connection) => drop(sender.send(Ok(connection)).await),
                        Err(error) => {
                            control.metrics.refused(Reason::Handshake);
                            tracing::info!(%address, %error, "TLS handshake failed");
                        }
                    }
                });
            }
            // Out of files or memory: the next attempt may succeed, but not at once.
            Err(error) => {
                tracing::warn!(%error, "accepting a connection failed");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn handshake(
    control: &Control,
    stream: TcpStream,
    address: SocketAddr,
    place: OwnedSemaphorePermit,
) -> io::Result<Connection> {
    stream.set_nodelay(true)?;
    let limits = control.config().limits;
    // Made anew for each connection: it holds the roots and the certificate of this moment.
    let bundle = Arc::clone(&control.view().bundle);
    let verifier = PeerVerifier::new(bundle, Kind::Node).or(Kind::Control).optional();
    let config =
        server_config(Arc::new(verifier), control.identity(), ALPN).map_err(io::Error::other)?;
    let stream = timeout(limits.handshake, TlsAcceptor::from(Arc::new(config)).accept(stream))
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "it took too long"))??;
    let chain = stream.get_ref().1.peer_certificates().map(|chain| {
        chain.iter().map(|certificate| certificate.clone().into_owned()).collect::<Arc<[_]>>()
    });
    let lifetime = match chain.as_deref() {
        None => limits.join,
        Some(chain) => {
            let leaf = Leaf::parse(&chain[0]).map_err(io::Error::other)?;
            leaf.not_after.duration_since(SystemTime::now()).unwrap_or_default()
        }
    };
    let end = Box::pin(tokio::time::sleep(lifetime));
    Ok(Connection { stream, end, peer: Peer { address, chain }, _place: place })
}

/// A TLS connection that ends by itself: with the node's certificate, or, without one, soon.
#[derive(Debug)]
pub struct Connection {
    stream: TlsStream<TcpStream>,
    end: Pin<Box<Sleep>>,
    peer: Peer,
    _place: OwnedSemaphorePermit,
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.end.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buffer)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
