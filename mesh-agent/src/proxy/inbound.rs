//! A connection that reached the pod from outside.
#![expect(clippy::wildcard_enum_match_arm, reason = "foreign enums that grow")]

use std::{
    io,
    net::{IpAddr, SocketAddr},
    pin::pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use mesh_common::svid::{Leaf, PodRef};
use rustls::pki_types::CertificateDer;
use tokio::{
    net::TcpStream,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{PodProxy, arrival, outbound::patient, peer, peer::Failed, reset, reusable_until};
use crate::{
    identity::{Svid, Workload},
    policy::{DenyReason, Verdict},
    stats::{ConnectionGuard, Direction, HandshakeFailure, Kind, Parties, Party},
    tls::{Stream, accept, is_shared, is_worn, peer_certificates},
    tunnel::{
        AppSocket, Header, Reason, Refusal, Role, Shared, relay, relay_plain,
        server::{self, TunnelError},
        shared::{Event, Ticket},
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
    pod: &Arc<PodProxy>,
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
            match Box::pin(handshake(pod, stream, client, destination)).await {
                Ok((stream, origin)) if is_shared(&stream) => {
                    shared(stream, Arc::new(origin), kill).await;
                }
                Ok((stream, origin)) => Tunnel { stream, origin, kill }.serve().await,
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

/// Where a tunnel comes from and goes to, and who is at its ends.
struct Origin {
    pod: Arc<PodProxy>,
    peer: SocketAddr,
    destination: SocketAddr,
    client: Leaf,
    /// What the client has shown.
    chain: Arc<[CertificateDer<'static>]>,
    /// The certificate that this pod has shown.
    svid: Arc<Svid>,
}

/// A tunnel from a client that has proven who it is, for one connection at a time.
struct Tunnel<'a> {
    stream: Stream,
    origin: Origin,
    /// Ends the tunnel.
    kill: &'a CancellationToken,
}

/// A tunnel whose client has proven who it is within `timeouts.handshake`.
async fn handshake(
    pod: &Arc<PodProxy>,
    stream: TcpStream,
    peer: SocketAddr,
    destination: SocketAddr,
) -> Result<(Stream, Origin), Failed> {
    let place = pod.arriving.enter(peer.ip());
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
        let (pod, chain) = (Arc::clone(pod), Arc::clone(peer_certificates(&stream)));
        Ok((stream, Origin { pod, peer, destination, client, chain, svid }))
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
    async fn serve(&mut self) {
        while !is_worn(&self.stream) {
            let opened = tokio::select! {
                biased;
                opened = server::next_open(&mut self.stream) => opened,
                () = self.origin.lapse() => break,
                () = self.origin.forgotten() => break,
            };
            let Some(header) = self.opened(opened) else { return };
            if !self.carry(header).await {
                return;
            }
        }
        // Told once that none should come, the client may have asked for one more by then.
        if server::go_away(&mut self.stream).await.is_ok()
            && let Ok(opened) = timeout(FAREWELL, server::next_open(&mut self.stream)).await
            && let Some(header) = self.opened(opened)
        {
            self.carry(header).await;
        }
    }

    fn opened(&self, opened: Result<Option<Header>, TunnelError>) -> Option<Header> {
        opened.unwrap_or_else(|error| {
            self.origin.ended(&error);
            None
        })
    }

    /// Carries one connection; false if the tunnel is done for.
    async fn carry(&mut self, header: Header) -> bool {
        match self.origin.connect(header, self.kill).await {
            Ok((app, guard)) => {
                let outcome = relay(app, &mut self.stream, Role::Server, guard.traffic()).await;
                guard.finish(outcome.end);
                outcome.reusable
            }
            Err(refusal) => server::refuse(&mut self.stream, refusal).await,
        }
    }
}

/// Serves a tunnel that connections share.
async fn shared(stream: Stream, origin: Arc<Origin>, kill: &CancellationToken) {
    let pod = &origin.pod;
    let mut shared = Shared::server(stream, pod.growth.clone());
    let mut lapse = pin!(origin.lapse());
    let mut going = false;
    loop {
        let idle = shared.is_idle();
        let forgotten =
            async { if going { sleep(FAREWELL).await } else { origin.forgotten().await } };
        let due = tokio::select! {
            biased;
            event = shared.next() => match event {
                Ok(Event::Asked(header, ticket)) => {
                    let (origin, kill) = (Arc::clone(&origin), kill.child_token());
                    pod.tasks.spawn(async move {
                        tokio::select! {
                            biased;
                            () = kill.cancelled() => {}
                            () = origin.carry(header, ticket, &kill) => {}
                        }
                    });
                    false
                }
                Ok(Event::Idle) => false,
                Ok(Event::Closed) => return,
                Ok(Event::GoingAway) => unreachable!("a client does not say so"),
                Err(error) => return origin.ended(&error),
            },
            () = &mut lapse, if !going => true,
            () = forgotten, if idle => {
                if going {
                    return;
                }
                true
            }
        };
        if !going && (due || is_worn(shared.tunnel())) {
            shared.go_away();
            going = true;
        }
    }
}

impl Origin {
    fn ended(&self, error: &TunnelError) {
        let Self { pod, peer, .. } = self;
        tracing::debug!(pod = %pod.uid, %peer, "a tunnel ended: {error}");
    }

    /// Carries one connection of a tunnel that it shares with others.
    async fn carry(&self, header: Header, ticket: Ticket, kill: &CancellationToken) {
        let connected = if self.pod.tasks.len() > self.pod.accepted {
            Err(Refusal::new(Reason::Overloaded, "too many connections of this pod"))
        } else {
            self.connect(header, kill).await
        };
        match connected {
            Ok((app, guard)) => {
                let outcome = ticket.accept(app, guard.counted()).await;
                guard.finish(outcome.end);
            }
            Err(refusal) => ticket.refuse(refusal),
        }
    }

    /// Connects to the application, if the connection is allowed.
    async fn connect(
        &self,
        header: Header,
        kill: &CancellationToken,
    ) -> Result<(AppSocket, ConnectionGuard), Refusal> {
        let Self { pod, peer, destination, .. } = self;
        if let Some(PodRef { uid, .. }) = &self.client.pod {
            arrival::of_peer(&pod.registry, uid, peer.ip()).await;
        }
        let parties = self.admit(header).inspect_err(|refusal| {
            tracing::debug!(%peer, %destination, %refusal, "refused a connection");
        })?;
        let guard = pod
            .stats
            .open(parties, Kind::Mtls, kill)
            .map_err(|_| Refusal::new(Reason::Overloaded, "too many connections of this pod"))?;
        let dial = pod.sockets.dial_application(peer.ip(), *destination);
        match patient(pod.timeouts.dial, dial).await {
            Ok(app) => Ok((app, guard)),
            Err(error) => {
                let refusal = dial_refusal(&error);
                guard.finish(&refusal);
                Err(refusal)
            }
        }
    }

    /// Decides about a connection.
    fn admit(&self, header: Header) -> Result<Parties, Refusal> {
        let Self { pod, peer, destination, client, .. } = self;
        self.check_proof().map_err(|why| Refusal::new(Reason::Denied, &why))?;
        let registry = pod.registry();
        let parties = |workload: Option<Arc<Workload>>| Parties {
            direction: Direction::Inbound,
            client: Party { address: header.source(), workload },
            server: Party { address: *destination, workload: registry.by_uid(&pod.uid).cloned() },
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
        let Self { pod, chain, client, svid, .. } = self;
        let now = SystemTime::now();
        if now >= client.not_after.min(svid.leaf.not_after) {
            return Err("a certificate of this tunnel has expired".to_owned());
        }
        let current = pod.svid.borrow().clone().ok_or("this pod has no certificate any more")?;
        if Arc::ptr_eq(&current.bundle, &svid.bundle) {
            return Ok(());
        }
        current.trusts(chain, now).map(drop).map_err(|error| error.to_string())
    }

    /// Returns when a tunnel should serve no further connection: what it rests on is no longer in
    /// force, or the agent drains.
    async fn lapse(&self) {
        let Self { pod, svid: shown, client, .. } = self;
        let mut svid = pod.svid.clone();
        let replaced = svid.wait_for(|current| {
            current.as_ref().is_none_or(|current| current.generation != shown.generation)
        });
        let now = SystemTime::now();
        let valid = reusable_until([client, &shown.leaf]).duration_since(now).unwrap_or_default();
        tokio::select! {
            _ = replaced => {}
            () = sleep(valid) => {}
            () = pod.drain.cancelled() => {}
        }
    }

    /// Returns when the client of an idle tunnel must have forgotten it.
    async fn forgotten(&self) {
        sleep(self.pod.timeouts.idle_tunnel.saturating_mul(IDLE_FACTOR)).await;
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
