//! A connection that reached the pod from outside.
#![expect(clippy::wildcard_enum_match_arm, reason = "foreign enums that grow")]

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use mesh_common::svid::Leaf;
use socket2::SockRef;
use tokio::{
    net::TcpStream,
    time::{Instant, sleep_until, timeout},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::{PodProxy, outbound::patient, peer, peer::Failed};
use crate::{
    identity::{Svid, Workload},
    policy::{DenyReason, Verdict},
    stats::{Direction, HandshakeFailure, Kind, Parties, Party},
    tunnel::{AppSocket, Header, ReadAhead, Reason, Refusal, Role, relay, relay_plain, server},
};

/// A client keeps an idle tunnel for `timeouts.idle_tunnel` of its own configuration; the server
/// only ends those whose client has forgotten them.
const IDLE_FACTOR: u32 = 10;

/// How long a connection may still come after the client was told that none should.
const FAREWELL: Duration = Duration::from_secs(5);

pub(super) async fn connection(
    pod: &PodProxy,
    stream: TcpStream,
    client: SocketAddr,
    destination: SocketAddr,
) {
    let registry = pod.registry();
    let source = client.ip();
    let parties = Parties {
        direction: Direction::Inbound,
        client: Party { address: client, workload: registry.by_address(source).cloned() },
        server: Party { address: destination, workload: registry.by_uid(&pod.uid).cloned() },
        trace: None,
    };
    match pod.policy.ingress_plaintext(source, &pod.uid, destination.port(), &registry) {
        Verdict::Plaintext(_) => plaintext(pod, stream, parties).await,
        // Only a pod of the mesh can have the certificate that this would end with.
        Verdict::Deny(reason) if parties.client.workload.is_none() => {
            pod.stats.deny(&parties, reason);
            reset(&stream);
        }
        Verdict::Deny(_) | Verdict::Mesh(_) => match handshake(pod, stream).await {
            Ok(tunnel) => tunnel.serve(client, destination).await,
            Err(failed) => {
                pod.no_tunnel(Direction::Inbound, client, &failed);
                if failed.kind == HandshakeFailure::Protocol {
                    pod.stats.deny(&parties, DenyReason::PlaintextRefused);
                }
            }
        },
    }
}

async fn plaintext(pod: &PodProxy, stream: TcpStream, parties: Parties) {
    let (client, destination) = (parties.client.address, parties.server.address);
    let Ok(guard) = pod.stats.open(parties, Kind::Plaintext) else { return reset(&stream) };
    let dial = pod.sockets.dial_application(client.ip(), destination);
    let dialled = patient(pod.timeouts.dial, dial).await;
    let sockets = dialled.and_then(|app| Ok((AppSocket::new(stream)?, AppSocket::new(app)?)));
    match sockets {
        Ok((client, app)) => {
            let end = relay_plain(client, app, guard.traffic()).await;
            guard.finish(end);
        }
        Err(error) => guard.finish(format_args!("cannot connect to the application: {error}")),
    }
}

fn reset(stream: &TcpStream) {
    // Where it fails, the client sees an orderly end of a connection on which nothing was said.
    SockRef::from(stream).set_linger(Some(Duration::ZERO)).ok();
}

/// A tunnel from a client that has proven who it is.
struct Tunnel<'a> {
    pod: &'a PodProxy,
    stream: TlsStream<ReadAhead<TcpStream>>,
    client: Leaf,
    /// The certificate that this pod has shown.
    svid: Arc<Svid>,
}

async fn handshake(pod: &PodProxy, stream: TcpStream) -> Result<Tunnel<'_>, Failed> {
    let svid = pod.svid().await.ok_or_else(|| {
        let detail = "the control plane has issued none, or it has expired";
        Failed::new(HandshakeFailure::NoCertificate, detail)
    })?;
    let closed = |_| Failed::new(HandshakeFailure::Closed, "the pod is going away");
    let turn = &pod.handshakes[Direction::Inbound as usize];
    let _turn = turn.acquire().await.map_err(closed)?;
    let accept = TlsAcceptor::from(Arc::clone(&svid.server)).accept(ReadAhead::new(stream));
    let stream = patient(pod.timeouts.handshake, accept).await.map_err(|e| Failed::tls(&e))?;
    let client = peer::leaf(stream.get_ref().1)?;
    pod.stats.handshake(Direction::Inbound);
    Ok(Tunnel { pod, stream, client, svid })
}

impl Tunnel<'_> {
    /// Serves one connection after the other.
    async fn serve(mut self, peer: SocketAddr, destination: SocketAddr) {
        loop {
            let lapse = lapse(self.pod, &self.svid, &self.client);
            let opened = tokio::select! {
                biased;
                opened = server::next_open(&mut self.stream) => opened,
                () = lapse => {
                    if server::go_away(&mut self.stream).await.is_err() {
                        return;
                    }
                    match timeout(FAREWELL, server::next_open(&mut self.stream)).await {
                        Ok(opened) => opened,
                        Err(_elapsed) => return,
                    }
                }
            };
            match opened {
                Ok(Some(header)) => {
                    if !self.carry(header, peer, destination).await {
                        return;
                    }
                }
                Ok(None) => return,
                Err(error) => {
                    tracing::debug!(pod = %self.pod.uid, %peer, "a tunnel ended: {error}");
                    return;
                }
            }
        }
    }

    /// Carries one connection; false if the tunnel is done for.
    async fn carry(&mut self, header: Header, peer: SocketAddr, destination: SocketAddr) -> bool {
        let (app, parties) = match self.admit(header, peer, destination).await {
            Ok(admitted) => admitted,
            Err(refusal) => {
                tracing::debug!(%peer, %destination, %refusal, "refused a connection");
                return server::refuse(&mut self.stream, refusal).await;
            }
        };
        let Ok(guard) = self.pod.stats.open(parties, Kind::Mtls) else {
            let refusal = Refusal::new(Reason::Overloaded, "too many connections of this pod");
            return server::refuse(&mut self.stream, refusal).await;
        };
        let outcome = relay(app, &mut self.stream, Role::Server, guard.traffic()).await;
        guard.finish(outcome.end);
        outcome.reusable
    }

    /// Decides about a connection, and connects the application.
    async fn admit(
        &self,
        header: Header,
        peer: SocketAddr,
        destination: SocketAddr,
    ) -> Result<(AppSocket, Parties), Refusal> {
        let Self { pod, client, svid, .. } = self;
        if SystemTime::now() >= client.not_after.min(svid.leaf.not_after) {
            return Err(Refusal::new(Reason::Denied, "a certificate of this tunnel has expired"));
        }
        let registry = pod.registry();
        let parties = |workload: Option<Arc<Workload>>| Parties {
            direction: Direction::Inbound,
            client: Party { address: header.source(), workload },
            server: Party { address: destination, workload: registry.by_uid(&pod.uid).cloned() },
            trace: Some(header.trace()),
        };
        let deny = |reason: DenyReason| {
            pod.stats.deny(&parties(registry.by_address(peer.ip()).cloned()), reason);
            Refusal::new(wire_reason(reason), &reason.to_string())
        };
        let (source, port) = (peer.ip(), destination.port());
        let workload = match pod.policy.ingress_mesh(client, source, &pod.uid, port, &registry) {
            Verdict::Mesh(workload) => workload,
            Verdict::Deny(reason) => return Err(deny(reason)),
            Verdict::Plaintext(_) => return Err(deny(DenyReason::PlaintextRefused)),
        };
        if header.source().ip() != source {
            return Err(deny(DenyReason::SourceAddress));
        }
        let dial = pod.sockets.dial_application(source, destination);
        let app = patient(pod.timeouts.dial, dial).await.and_then(AppSocket::new);
        let app = app.map_err(|error| dial_refusal(&error))?;
        Ok((app, parties(Some(workload))))
    }
}

/// Returns when a tunnel should serve no further connection: what it rests on is no longer in
/// force, or the client has forgotten it.
async fn lapse(pod: &PodProxy, shown: &Svid, client: &Leaf) {
    let mut svid = pod.svid.clone();
    let replaced = svid.wait_for(|current| {
        current.as_ref().is_none_or(|current| current.generation != shown.generation)
    });
    let now = SystemTime::now();
    let valid = client.not_after.min(shown.leaf.not_after).duration_since(now).unwrap_or_default();
    let idle = pod.timeouts.idle_tunnel.saturating_mul(IDLE_FACTOR);
    tokio::select! {
        _ = replaced => {}
        () = sleep_until(Instant::now() + valid.min(idle)) => {}
        () = pod.drain.cancelled() => {}
    }
}

const fn wire_reason(reason: DenyReason) -> Reason {
    match reason {
        DenyReason::RegistryUnknown
        | DenyReason::UnregisteredPeer
        | DenyReason::UnregisteredPod
        | DenyReason::UnknownInCluster => Reason::NotRegistered,
        DenyReason::SourceAddress => Reason::WrongSource,
        DenyReason::TooManyConnections => Reason::Overloaded,
        DenyReason::EgressDenied
        | DenyReason::IdentityMismatch
        | DenyReason::NoRemoteAddress
        | DenyReason::PlaintextRefused => Reason::Denied,
    }
}

fn dial_refusal(error: &io::Error) -> Refusal {
    let reason = match error.kind() {
        io::ErrorKind::ConnectionRefused => Reason::ConnectionRefused,
        io::ErrorKind::TimedOut => Reason::TimedOut,
        io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => Reason::Unreachable,
        _ => Reason::Failed,
    };
    Refusal::new(reason, &format!("connecting to the application: {error}"))
}
