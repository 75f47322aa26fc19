//! A connection that an application in the pod opened.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use rustls::pki_types::ServerName;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::{
    ClientStream, PodProxy, TURN_PATIENCE, peer, peer::Failed, registration, reusable_until,
};
use crate::{
    bpf::Tag,
    identity::{Svid, Workload},
    policy::Verdict,
    stats::{ConnectionGuard, Direction, HandshakeFailure, Kind, Parties, Party},
    tunnel::{
        AppSocket, Header, ReadAhead, Role, TraceId,
        pool::{Key, Proof, Tunnel},
        relay, relay_plain,
    },
};

pub(super) async fn connection(
    pod: &PodProxy,
    app: AppSocket,
    client: SocketAddr,
    destination: SocketAddr,
) {
    let registry = pod.registry();
    let trace = TraceId(rand::random());
    let mut parties = Parties {
        direction: Direction::Outbound,
        client: Party { address: client, workload: registry.by_uid(&pod.uid).cloned() },
        server: Party { address: destination, workload: None },
        trace: None,
    };
    match pod.policy.egress(&pod.uid, client.ip(), destination, &registry) {
        Verdict::Deny(reason) => pod.stats.deny(&parties, reason),
        Verdict::Plaintext(_) => {
            if let Ok(guard) = pod.stats.open(parties, Kind::Plaintext) {
                plaintext(pod, app, client, destination, guard).await;
            }
        }
        Verdict::Mesh(server) => {
            let Some(own) = parties.client.workload.clone() else { return };
            parties.server.workload = Some(Arc::clone(&server));
            parties.trace = Some(trace);
            if let Ok(guard) = pod.stats.open(parties, Kind::Mtls) {
                let tunnel = Mesh { pod, client, destination, own, server };
                tunnel.carry(app, Header::new(client, trace), guard).await;
            }
        }
    }
}

async fn plaintext(
    pod: &PodProxy,
    app: AppSocket,
    client: SocketAddr,
    destination: SocketAddr,
    guard: ConnectionGuard,
) {
    let dial = pod.sockets.dial_network(client.ip(), destination, Tag::Plaintext);
    let dialled = patient(pod.timeouts.dial, dial).await.and_then(AppSocket::new);
    match dialled {
        Ok(server) => {
            let end = relay_plain(app, server, guard.traffic()).await;
            guard.finish(end);
        }
        Err(error) => guard.finish(format_args!("cannot connect: {error}")),
    }
}

/// A connection to another pod of the mesh.
struct Mesh<'a> {
    pod: &'a PodProxy,
    client: SocketAddr,
    destination: SocketAddr,
    own: Arc<Workload>,
    server: Arc<Workload>,
}

impl Mesh<'_> {
    async fn carry(&self, mut app: AppSocket, header: Header, guard: ConnectionGuard) {
        loop {
            let (mut tunnel, pooled) = match self.tunnel().await {
                Ok(found) => found,
                Err(failed) => {
                    self.pod.no_tunnel(Direction::Outbound, self.destination, &failed);
                    return guard.finish(failed);
                }
            };
            let role = Role::Client(header);
            let outcome = relay(app, &mut tunnel.stream, role, guard.traffic()).await;
            match outcome.untouched {
                // The server closed the tunnel while it was idle, and we had not noticed yet.
                Some(untouched) if pooled => app = untouched,
                Some(_) | None => {
                    if outcome.reusable {
                        self.pod.pool.put(tunnel);
                    }
                    return guard.finish(outcome.end);
                }
            }
        }
    }

    /// A tunnel that is ready for a connection, and whether it has carried others.
    async fn tunnel(&self) -> Result<(Tunnel<ClientStream>, bool), Failed> {
        let svid = self.pod.svid().await.ok_or_else(|| {
            let detail = "the control plane has issued none, or it has expired";
            Failed::new(HandshakeFailure::NoCertificate, detail)
        })?;
        let (client, source) = (Arc::clone(&self.pod.uid), self.client.ip());
        let key = Key { client, source, destination: self.destination };
        let proof = Proof {
            certificate: svid.generation,
            // A change of the bundle makes another generation.
            bundle: 0,
            registration: registration([&self.own, &self.server]),
        };
        match self.pod.pool.take(&key, proof) {
            Some(pooled) => Ok((pooled, true)),
            None => Ok((self.handshake(&svid, key, proof).await?, false)),
        }
    }

    async fn handshake(
        &self,
        svid: &Svid,
        key: Key,
        proof: Proof,
    ) -> Result<Tunnel<ClientStream>, Failed> {
        let Self { pod, client, destination, server, .. } = self;
        let place = pod.leaving.enter(destination.ip());
        let busy = |_| {
            let detail = "too many connections wait for a handshake with this peer";
            Failed::new(HandshakeFailure::Overloaded, detail)
        };
        let closed = |_| Failed::new(HandshakeFailure::Closed, "the pod is going");
        // Before the peer hears of it: what it has accepted counts there.
        let share = timeout(TURN_PATIENCE, place.share()).await.map_err(busy)?;
        let _share = share.map_err(closed)?;
        let dial = pod.sockets.dial_network(client.ip(), *destination, Tag::Tunnel);
        let tcp = patient(pod.timeouts.dial, dial)
            .await
            .map_err(|error| Failed::new(HandshakeFailure::Unreachable, error.to_string()))?;
        // Not before, or peers that nobody answers for would take every turn.
        let _turn = place.turn().await.map_err(closed)?;
        let name = ServerName::IpAddress(destination.ip().into());
        let connect =
            TlsConnector::from(Arc::clone(&svid.client)).connect(name, ReadAhead::new(tcp));
        let stream = patient(pod.timeouts.handshake, connect).await.map_err(|e| Failed::tls(&e))?;
        let leaf = peer::leaf(stream.get_ref().1)?;
        peer::check(&leaf, server)?;
        pod.stats.handshake(Direction::Outbound);
        Ok(Tunnel { key, proof, not_after: reusable_until([&leaf, &svid.leaf]), stream })
    }
}

/// Waits for at most `limit`.
pub(super) async fn patient<T>(
    limit: Duration,
    work: impl Future<Output = io::Result<T>>,
) -> io::Result<T> {
    timeout(limit, work).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}
