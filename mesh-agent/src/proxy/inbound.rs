//! A connection that reached the pod from outside.
#![expect(clippy::wildcard_enum_match_arm, reason = "foreign enums that grow")]

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, SystemTime},
};

use mesh_common::svid::{Leaf, PodRef};
use tokio::{
    net::TcpStream,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{PodProxy, arrival, outbound::patient, peer, peer::Failed, reset, reusable_until};
use crate::{
    identity::{Svid, Workload},
    policy::{DenyReason, Verdict},
    stats::{Direction, HandshakeFailure, Kind, Parties, Party},
    tls::{Stream, accept, is_worn, peer_certificates},
    tunnel::{
        AppSocket, Header, Reason, Refusal, Role, relay, relay_plain,
        server::{self, TunnelError},
    },
};

/// A client keeps an idle tunnel for `timeouts.idle_tunnel` of its own configuration; the server
/// only ends those whose client has forgotten them.
const IDLE_FACTOR: u32 = 2;

/// The type of the record that a TLS connection begins with (RFC 8446, 5.1).
const TLS_HANDSHAKE: u8 = 22;

/// How long a connection may still come after the client was told that none should.
const FAREWELL: Duration = Duration::from_secs(5);

pub(super) async fn connection(
    pod: &PodProxy,
    stream: TcpStream,
    client: SocketAddr,
    destination: SocketAddr,
    kill: &CancellationToken,
) {
    let registry = pod.registry();
    let source = client.ip();
    let parties = Parties {
        direction: Direction::Inbound,
        client: Party { address: client, workload: registry.by_address(source).cloned() },
        server: Party { address: destination, workload: registry.by_uid(&pod.uid).cloned() },
        endpoint: None,
        trace: None,
    };
    match pod.policy.ingress_plaintext(source, &pod.uid, destination.port(), &registry) {
        Verdict::Plaintext(_) => plaintext(pod, stream, parties, kill).await,
        Verdict::Deny(reason) if !may_prove_itself(pod, source, reason, &parties) => {
            pod.stats.deny(&parties, reason);
            reset(&stream);
        }
        Verdict::Deny(_) | Verdict::Mesh(_) => {
            // Apart: its state is larger than all that a tunnel needs afterwards.
            match Box::pin(handshake(pod, stream, source, kill)).await {
                Ok(mut tunnel) => tunnel.serve(client, destination).await,
                Err(failed) => {
                    pod.no_tunnel(Direction::Inbound, client, &failed);
                    if failed.kind == HandshakeFailure::Protocol {
                        pod.stats.deny(&parties, DenyReason::PlaintextRefused);
                    }
                }
            }
        }
    }
}

/// Whether the source may have the certificate that a handshake would end with: it is a pod of the
/// mesh, or it lies where pods are and may have started before the registry knew its address.
fn may_prove_itself(pod: &PodProxy, source: IpAddr, reason: DenyReason, parties: &Parties) -> bool {
    let is_unknown = reason == DenyReason::PlaintextRefused && pod.policy.cluster.contains(source);
    parties.client.workload.is_some() || is_unknown
}

async fn plaintext(pod: &PodProxy, stream: TcpStream, parties: Parties, kill: &CancellationToken) {
    let (client, destination) = (parties.client.address, parties.server.address);
    let Ok(guard) = pod.stats.open(parties, Kind::Plaintext, kill) else { return reset(&stream) };
    let dial = async {
        pod.sockets.allow_plaintext(&stream)?;
        let app = pod.sockets.dial_application_in_plaintext(client.ip(), destination).await?;
        Ok((AppSocket::new(stream)?, app))
    };
    match patient(pod.timeouts.dial, dial).await {
        Ok((client, app)) => {
            let end = relay_plain(client, app, &[guard.traffic()]).await;
            guard.finish(end);
        }
        Err(error) => guard.finish(format_args!("cannot connect to the application: {error}")),
    }
}

/// A tunnel from a client that has proven who it is.
struct Tunnel<'a> {
    pod: &'a PodProxy,
    stream: Stream,
    client: Leaf,
    /// The certificate that this pod has shown.
    svid: Arc<Svid>,
    /// Ends the tunnel.
    kill: &'a CancellationToken,
}

/// A tunnel whose client has proven who it is within `timeouts.handshake`.
async fn handshake<'a>(
    pod: &'a PodProxy,
    stream: TcpStream,
    source: IpAddr,
    kill: &'a CancellationToken,
) -> Result<Tunnel<'a>, Failed> {
    let place = pod.arriving.enter(source);
    if place.is_crowded() {
        reset(&stream);
        let detail = "the peer has too many unfinished handshakes";
        return Err(Failed::new(HandshakeFailure::Overloaded, detail));
    }
    let going = |_| Failed::new(HandshakeFailure::Closed, "the pod is going");
    let late = |_| Failed::new(HandshakeFailure::Timeout, "the peer did not finish it in time");
    let proven = async {
        let svid = pod.svid().await.ok_or_else(|| {
            let detail = "the control plane has issued none, or it has expired";
            Failed::new(HandshakeFailure::NoCertificate, detail)
        })?;
        greeting(&stream).await?;
        let _share = place.share().await.map_err(going)?;
        let _turn = place.turn().await.map_err(going)?;
        let stream = accept(&svid.server, pod.encryption, stream).await;
        let stream = stream.map_err(|error| Failed::tls(&error))?;
        let client = peer::leaf(&stream)?;
        pod.stats.handshake(Direction::Inbound);
        Ok(Tunnel { pod, stream, client, svid, kill })
    };
    timeout(pod.timeouts.handshake, proven).await.map_err(late)?
}

/// Waits for the first byte. What is no handshake gets a reset, not an alert that its client would
/// take for an answer.
async fn greeting(stream: &TcpStream) -> Result<(), Failed> {
    let mut first = [0];
    let closed = |error: io::Error| Failed::new(HandshakeFailure::Closed, error.to_string());
    match (stream.peek(&mut first).await.map_err(closed)?, first) {
        (0, _) => Err(Failed::new(HandshakeFailure::Closed, "it said nothing")),
        (_, [TLS_HANDSHAKE]) => Ok(()),
        (_, [_]) => {
            reset(stream);
            Err(Failed::new(HandshakeFailure::Protocol, "it does not speak TLS"))
        }
    }
}

impl Tunnel<'_> {
    /// Serves one connection after the other. The first may be long in coming: the client may have
    /// made the tunnel in advance.
    async fn serve(&mut self, peer: SocketAddr, destination: SocketAddr) {
        while !is_worn(&self.stream) {
            let lapse = lapse(self.pod, &self.svid, &self.client);
            let opened = tokio::select! {
                biased;
                opened = server::next_open(&mut self.stream) => opened,
                () = lapse => break,
            };
            let Some(header) = self.opened(opened, peer) else { return };
            if !self.carry(header, peer, destination).await {
                return;
            }
        }
        // Told once that none should come, the client may have asked for one more by then.
        if server::go_away(&mut self.stream).await.is_ok()
            && let Ok(opened) = timeout(FAREWELL, server::next_open(&mut self.stream)).await
            && let Some(header) = self.opened(opened, peer)
        {
            self.carry(header, peer, destination).await;
        }
    }

    fn opened(
        &self,
        opened: Result<Option<Header>, TunnelError>,
        peer: SocketAddr,
    ) -> Option<Header> {
        opened.unwrap_or_else(|error| {
            tracing::debug!(pod = %self.pod.uid, %peer, "a tunnel ended: {error}");
            None
        })
    }

    /// Carries one connection; false if the tunnel is done for.
    async fn carry(&mut self, header: Header, peer: SocketAddr, destination: SocketAddr) -> bool {
        if let Some(PodRef { uid, .. }) = &self.client.pod {
            arrival::of_peer(&self.pod.registry, uid, peer.ip()).await;
        }
        let parties = match self.admit(header, peer, destination) {
            Ok(parties) => parties,
            Err(refusal) => {
                tracing::debug!(%peer, %destination, %refusal, "refused a connection");
                return server::refuse(&mut self.stream, refusal).await;
            }
        };
        let Ok(guard) = self.pod.stats.open(parties, Kind::Mtls, self.kill) else {
            let refusal = Refusal::new(Reason::Overloaded, "too many connections of this pod");
            return server::refuse(&mut self.stream, refusal).await;
        };
        let dial = self.pod.sockets.dial_application(peer.ip(), destination);
        match patient(self.pod.timeouts.dial, dial).await {
            Ok(app) => {
                let outcome = relay(app, &mut self.stream, Role::Server, guard.traffic()).await;
                guard.finish(outcome.end);
                outcome.reusable
            }
            Err(error) => {
                let refusal = dial_refusal(&error);
                guard.finish(&refusal);
                server::refuse(&mut self.stream, refusal).await
            }
        }
    }

    /// Decides about a connection.
    fn admit(
        &self,
        header: Header,
        peer: SocketAddr,
        destination: SocketAddr,
    ) -> Result<Parties, Refusal> {
        let Self { pod, client, .. } = self;
        self.check_proof().map_err(|why| Refusal::new(Reason::Denied, &why))?;
        let registry = pod.registry();
        let parties = |workload: Option<Arc<Workload>>| Parties {
            direction: Direction::Inbound,
            client: Party { address: header.source(), workload },
            server: Party { address: destination, workload: registry.by_uid(&pod.uid).cloned() },
            endpoint: None,
            trace: Some(header.trace()),
        };
        let deny = |reason: DenyReason| {
            pod.stats.deny(&parties(registry.by_address(peer.ip()).cloned()), reason);
            Refusal::new(wire_reason(reason), &reason.to_string())
        };
        let (source, port) = (peer.ip(), destination.port());
        match pod.policy.ingress_mesh(client, source, &pod.uid, port, &registry) {
            Verdict::Mesh(_) if header.source().ip() != source => {
                Err(deny(DenyReason::SourceAddress))
            }
            Verdict::Mesh(workload) => Ok(parties(Some(workload))),
            Verdict::Deny(reason) => Err(deny(reason)),
            Verdict::Plaintext(_) => Err(deny(DenyReason::PlaintextRefused)),
        }
    }

    /// Whether what both sides have proven in the handshake still holds.
    fn check_proof(&self) -> Result<(), String> {
        let Self { pod, stream, client, svid, .. } = self;
        let now = SystemTime::now();
        if now >= client.not_after.min(svid.leaf.not_after) {
            return Err("a certificate of this tunnel has expired".to_owned());
        }
        let current = pod.svid.borrow().clone().ok_or("this pod has no certificate any more")?;
        if Arc::ptr_eq(&current.bundle, &svid.bundle) {
            return Ok(());
        }
        current.trusts(peer_certificates(stream), now).map(drop).map_err(|error| error.to_string())
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
    let valid = reusable_until([client, &shown.leaf]).duration_since(now).unwrap_or_default();
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
        | DenyReason::NoEndpoints
        | DenyReason::NoRemoteAddress
        | DenyReason::NoServicePort
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
