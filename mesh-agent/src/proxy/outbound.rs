//! A connection that an application in the pod opened.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use rustls::{ClientConfig, pki_types::ServerName};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::{
    PodProxy, TURN_PATIENCE, arrival,
    neighbour::Crossing,
    peer,
    peer::Failed,
    registration, reusable_until,
    route::{Denied, Route, Way},
    shared,
};
use crate::{
    bpf::Tag,
    identity::{Svid, Workload},
    stats::{ConnectionGuard, Direction, HandshakeFailure, Parties, Party},
    tls::{Stream, connect, is_worn},
    tunnel::{
        AppSocket, End, Header, Outcome, Reason, Role, TraceId, Traffic,
        pool::{Key, Proof, Tunnel},
        relay, relay_plain,
        sharing::Place,
    },
};

pub(super) async fn connection(
    pod: &Arc<PodProxy>,
    mut app: AppSocket,
    client: SocketAddr,
    destination: SocketAddr,
    kill: &CancellationToken,
) {
    arrival::of_own(&pod.registry, &pod.uid, client.ip()).await;
    let trace = TraceId(rand::random());
    let mut parties = Parties {
        direction: Direction::Outbound,
        client: Party { address: client, workload: pod.registry().by_uid(&pod.uid).cloned() },
        server: Party { address: destination, workload: None },
        endpoint: None,
        trace: None,
    };
    let mut route = Route::new(pod, client.ip(), destination);
    let mut hop = match route.first() {
        Ok(hop) => hop,
        Err(Denied { endpoint, reason }) => {
            parties.endpoint = endpoint;
            return pod.stats.deny(&parties, reason);
        }
    };
    if let Some(own) = parties.client.workload.as_ref().filter(|_| hop.is_in_mesh()) {
        pod.habits.note(&own.id, destination, Instant::now());
    }
    parties.endpoint = hop.endpoint();
    parties.server.workload = hop.server().cloned();
    parties.trace = hop.is_in_mesh().then_some(trace);
    let Ok(mut guard) = pod.stats.open(parties, hop.kind(), kill) else { return };
    let header = Header::new(client, trace);
    loop {
        let Ended { why, untouched } = match &hop.way {
            Way::Plaintext => plaintext(pod, app, client, hop.address, guard.traffic()).await,
            Way::Neighbour { neighbour, server } => {
                let address = hop.address;
                let crossing = Crossing { pod, client, address, server, neighbour, trace, kill };
                crossing.carry(app, guard.traffic()).await
            }
            Way::Mesh { own, server } => {
                let role = if hop.replaceable {
                    Role::PatientClient(header)
                } else {
                    Role::Client(header)
                };
                let mesh = Mesh { pod, client: client.ip(), address: hop.address, own, server };
                mesh.carry(app, role, &guard).await
            }
        };
        let next = untouched.and_then(|app| Some((app, route.next(&hop)?)));
        let Some((again, next)) = next else { return guard.finish(why) };
        let (from, to) = (hop.address, next.address);
        tracing::debug!(%client, %destination, %from, %to, why, "passed on to another endpoint");
        guard.pass_to(next.address, next.server().cloned(), next.kind());
        (app, hop) = (again, next);
    }
}

/// How it went with one server.
pub(super) struct Ended {
    /// In words.
    pub(super) why: String,
    /// The application as it was, if another server can still take the connection. Dropped, it sees
    /// a reset.
    pub(super) untouched: Option<AppSocket>,
}

impl Ended {
    /// The two pods have not proven to each other who they are.
    pub(super) fn unproven(failed: &Failed, app: AppSocket) -> Self {
        // Without a certificate of its own, the pod gets nowhere else either.
        let elsewhere = failed.kind != HandshakeFailure::NoCertificate;
        Self { why: failed.to_string(), untouched: elsewhere.then_some(app) }
    }
}

async fn plaintext(
    pod: &PodProxy,
    app: AppSocket,
    client: SocketAddr,
    address: SocketAddr,
    traffic: &Traffic,
) -> Ended {
    let dial = pod.sockets.dial_network(client.ip(), address, Tag::Plaintext);
    match patient(pod.timeouts.dial, dial).await.and_then(AppSocket::new) {
        Ok(server) => {
            let end = relay_plain(app, server, &[traffic]).await;
            Ended { why: end.to_string(), untouched: None }
        }
        Err(error) => Ended { why: format!("cannot connect: {error}"), untouched: Some(app) },
    }
}

/// A connection to another pod of the mesh.
pub(super) struct Mesh<'a> {
    pub(super) pod: &'a Arc<PodProxy>,
    /// The address that the application has.
    pub(super) client: IpAddr,
    /// What is dialled.
    pub(super) address: SocketAddr,
    pub(super) own: &'a Arc<Workload>,
    pub(super) server: &'a Arc<Workload>,
}

impl Mesh<'_> {
    async fn carry(&self, mut app: AppSocket, role: Role, guard: &ConnectionGuard) -> Ended {
        loop {
            match self.attempt(app, role, guard).await {
                // It was dead, and we had not noticed yet.
                Ok((Outcome { end: End::TunnelLost(_), untouched: Some(untouched), .. }, true)) => {
                    app = untouched;
                }
                Ok((Outcome { end, untouched, .. }, _)) => {
                    let untouched = untouched.filter(|_| may_try_elsewhere(&end));
                    return Ended { why: end.to_string(), untouched };
                }
                Err((failed, app)) => {
                    self.pod.no_tunnel(Direction::Outbound, self.address, &failed);
                    return Ended::unproven(&failed, app);
                }
            }
        }
    }

    /// Carries a connection through one tunnel. Also says whether another may do better, if that one
    /// was lost.
    async fn attempt(
        &self,
        app: AppSocket,
        role: Role,
        guard: &ConnectionGuard,
    ) -> Result<(Outcome, bool), (Failed, AppSocket)> {
        let pod = self.pod;
        let Some(svid) = pod.svid().await else {
            let detail = "the control plane has issued none, or it has expired";
            return Err((Failed::new(HandshakeFailure::NoCertificate, detail), app));
        };
        let (key, proof) = self.terms(&svid);
        let (port, seat) = match pod.sharing.place(&key, proof) {
            Place::Alone(_seat) => {
                let (mut tunnel, pooled) = match pod.pool.take(&key, proof) {
                    Some(pooled) => (pooled, true),
                    // Apart: its state is larger than all that a connection needs afterwards.
                    None => match Box::pin(self.handshake(&svid, key, proof, &svid.client)).await {
                        Ok(tunnel) => (tunnel, false),
                        Err(failed) => return Err((failed, app)),
                    },
                };
                let outcome = relay(app, &mut tunnel.stream, role, guard.traffic()).await;
                if outcome.reusable && !is_worn(&tunnel.stream) {
                    pod.pool.put(tunnel);
                }
                return Ok((outcome, pooled));
            }
            Place::Shared(port, seat) => (port, seat),
            Place::New(port, seat, commands, made) => {
                shared::spawn(self, svid, (key, proof), commands, made);
                (port, seat)
            }
        };
        let outcome = port.carry(app, role, guard.counted()).await;
        let lost = matches!(outcome.end, End::TunnelLost(_)) && outcome.untouched.is_some();
        Ok((outcome, lost && seat.try_again()))
    }

    /// What a tunnel connects, and what it has to be authenticated under.
    pub(super) fn terms(&self, svid: &Svid) -> (Key, Proof) {
        let Self { pod, client, address, own, server } = *self;
        let key = Key { client: Arc::clone(&pod.uid), source: client, destination: address };
        let proof = Proof {
            certificate: svid.generation,
            // A change of the bundle makes another generation.
            bundle: 0,
            registration: registration([&**own, &**server]),
        };
        (key, proof)
    }

    pub(super) async fn handshake(
        &self,
        svid: &Svid,
        key: Key,
        proof: Proof,
        config: &Arc<ClientConfig>,
    ) -> Result<Tunnel<Stream>, Failed> {
        let Self { pod, client, address, server, .. } = self;
        let place = pod.leaving.enter(address.ip());
        let busy = |_| {
            let detail = "too many connections wait for a handshake with this peer";
            Failed::new(HandshakeFailure::Overloaded, detail)
        };
        let closed = |_| Failed::new(HandshakeFailure::Closed, "the pod is going");
        // Before the peer hears of it: what it has accepted counts there.
        let share = timeout(TURN_PATIENCE, place.share()).await.map_err(busy)?;
        let _share = share.map_err(closed)?;
        let dial = pod.sockets.dial_network(*client, *address, Tag::Tunnel);
        let tcp = patient(pod.timeouts.dial, dial)
            .await
            .map_err(|error| Failed::new(HandshakeFailure::Unreachable, error.to_string()))?;
        // Not before, or peers that nobody answers for would take every turn.
        let _turn = place.turn().await.map_err(closed)?;
        let name = ServerName::IpAddress(address.ip().into());
        let connect = connect(config, pod.encryption, name, tcp);
        let stream = patient(pod.timeouts.handshake, connect).await.map_err(|e| Failed::tls(&e))?;
        let leaf = peer::leaf(&stream)?;
        peer::check(&leaf, server)?;
        pod.stats.handshake(Direction::Outbound);
        let not_after = reusable_until([&leaf, &svid.leaf]);
        Ok(Tunnel { key, proof, made: tokio::time::Instant::now(), not_after, stream })
    }
}

/// Whether another endpoint may be asked when one has not taken the connection. The answer of its
/// policy is an answer.
fn may_try_elsewhere(end: &End) -> bool {
    let answered = |reason: Reason| matches!(reason, Reason::Denied | Reason::WrongSource);
    !matches!(end, End::Refused(refusal) if answered(refusal.reason()))
}

/// Waits for at most `limit`.
pub(super) async fn patient<T>(
    limit: Duration,
    work: impl Future<Output = io::Result<T>>,
) -> io::Result<T> {
    timeout(limit, work).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}
