//! The connections of one pod: from its applications to the network, and the other way.
//!
//! [`outbound`] and [`inbound`] each take one accepted connection to its end; what they do is
//! decided by [`crate::policy`] and carried by [`crate::tunnel`].

mod admission;
mod arrival;
mod inbound;
mod neighbour;
mod outbound;
mod peer;
mod route;
mod shared;
mod warm;

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io,
    net::SocketAddr,
    pin::pin,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use mesh_common::svid::Leaf;
use socket2::SockRef;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub(crate) use self::admission::Admission;
use self::peer::Failed;
pub use self::{neighbour::Neighbours, warm::Habits};
use crate::{
    balance::Balancer,
    config::Timeouts,
    identity::{Snapshot, Svid, Workload},
    pod::sockets::{Facing, PodSockets},
    policy::{Open, Policy},
    stats::{Connection, Direction, HandshakeFailure, Kind, Parties, PodStats},
    tls::{Encryption, Stream},
    tunnel::{AppSocket, Pool, Sharing, shared::Growth},
};

/// How long to wait before the next try when the agent is out of file descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How long the listeners stay open when the agent drains: a `connect()` that was let through just
/// before would hang without them.
const LAST_CALL: Duration = Duration::from_millis(50);

/// How often a pod's failed tunnels are worth a warning.
const WARN_INTERVAL: Duration = Duration::from_secs(10);

/// How long a connection of the pod waits for others to finish their handshakes with the same peer:
/// about as long as applications wait.
const TURN_PATIENCE: Duration = Duration::from_secs(30);

/// Tunnels are given up before they expire, so that no connection is asked for just then.
const EXPIRY_MARGIN: Duration = Duration::from_secs(2);

/// Everything that the connections of one pod have in common.
pub struct PodProxy {
    /// The pod's UID.
    pub uid: Arc<str>,
    /// Makes sockets in the pod.
    pub sockets: PodSockets,
    /// The pod's certificate.
    pub svid: watch::Receiver<Option<Arc<Svid>>>,
    /// The registry.
    pub registry: watch::Receiver<Arc<Snapshot>>,
    /// Who may talk to whom.
    pub policy: Arc<Policy>,
    /// Which endpoint of a service a connection goes to.
    pub balancer: Arc<Balancer>,
    /// What the node's workloads have connected to lately.
    pub habits: Arc<Habits>,
    /// The pods that need no tunnel.
    pub neighbours: Arc<Neighbours>,
    /// The pod's counts.
    pub stats: Arc<PodStats>,
    /// When a failure of one of the pod's tunnels was last logged as a warning.
    pub warned: Mutex<Option<Instant>>,
    /// The node's idle tunnels.
    pub pool: Pool<Stream>,
    /// Those that connections share.
    pub sharing: Sharing,
    /// How much more of shared tunnels may be under way.
    pub growth: Growth,
    /// Who encrypts what tunnels carry.
    pub encryption: Encryption,
    /// Bounds what the pod has under way to peers that have not proven yet who they are.
    pub(crate) leaving: Admission,
    /// Bounds what such peers have under way to the pod.
    pub(crate) arriving: Admission,
    /// Accepted connections, tunnels that are idle included.
    pub accepted: usize,
    /// How long things may take.
    pub timeouts: Timeouts,
    /// No new connections: the agent drains.
    pub drain: CancellationToken,
    /// The pod's connections end now, with a reset.
    pub kill: CancellationToken,
    /// The pod's connections.
    pub tasks: TaskTracker,
}

impl PodProxy {
    /// Serves one of the pod's listeners until the agent drains or the pod goes.
    pub async fn serve(self: Arc<Self>, listener: TcpListener, facing: Facing) {
        let closing = async {
            self.drain.cancelled().await;
            tokio::time::sleep(LAST_CALL).await;
        };
        let mut closing = pin!(closing);
        loop {
            let accepted = tokio::select! {
                biased;
                () = self.kill.cancelled() => return,
                () = &mut closing => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, client)) if self.tasks.len() >= self.accepted => {
                    reset(&stream);
                    let detail = "the pod has limits.connections_per_pod connections";
                    let failed = Failed::new(HandshakeFailure::Overloaded, detail);
                    self.no_tunnel(facing.direction(), client, &failed);
                }
                Ok((stream, client)) => {
                    let proxy = Arc::clone(&self);
                    self.tasks.spawn(async move {
                        let kill = proxy.kill.child_token();
                        // Dropping a connection resets it.
                        tokio::select! {
                            biased;
                            () = kill.cancelled() => {}
                            () = proxy.connection(stream, client, facing, &kill) => {}
                        }
                    });
                }
                // The client gave up while it waited.
                Err(error) if is_transient(&error) => {}
                Err(error) => {
                    tracing::warn!(pod = %self.uid, %error, "cannot accept connections");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// Ends what is open and no longer allowed, whenever the registry changes.
    pub async fn revise(self: Arc<Self>) {
        let mut registry = self.registry.clone();
        while registry.changed().await.is_ok() {
            let registry = Arc::clone(&registry.borrow_and_update());
            self.stats.revise(|connection| {
                let open = as_policy_sees_it(connection);
                let revised = self.policy.revise(&self.uid, &open, &registry);
                revised.map_err(|why| why.to_string())
            });
        }
    }

    async fn connection(
        self: Arc<Self>,
        stream: TcpStream,
        client: SocketAddr,
        facing: Facing,
        kill: &CancellationToken,
    ) {
        let Ok(destination) = stream.local_addr() else { return };
        let (client, destination) = (canonical(client), canonical(destination));
        match facing {
            Facing::Application => {
                let app = AppSocket::prepared(stream);
                outbound::connection(&self, app, client, destination, kill).await;
            }
            Facing::Network => inbound::connection(&self, stream, client, destination, kill).await,
        }
    }

    /// Tells the operator why a tunnel did not come about. One of a pod in some seconds is a
    /// warning, which `status` shows; the rest is for the debug log.
    fn no_tunnel(&self, direction: Direction, other: SocketAddr, failed: &Failed) {
        self.stats.handshake_failed(direction, failed.kind);
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        let due = warned.is_none_or(|last| last.elapsed() >= WARN_INTERVAL);
        let (pod, direction) = (&self.uid, direction.name());
        if due {
            *warned = Some(Instant::now());
            tracing::warn!(%pod, direction, peer = %other.ip(), "no tunnel: {failed}");
        } else {
            tracing::debug!(%pod, direction, peer = %other.ip(), "no tunnel: {failed}");
        }
    }

    /// The registry as it is now.
    fn registry(&self) -> Arc<Snapshot> {
        Arc::clone(&self.registry.borrow())
    }

    /// The pod's certificate, waited for while the pod has just been enrolled.
    async fn svid(&self) -> Option<Arc<Svid>> {
        let mut svid = self.svid.clone();
        let waited =
            tokio::time::timeout(self.timeouts.handshake, svid.wait_for(Option::is_some)).await;
        waited.ok()?.ok()?.clone()
    }
}

fn as_policy_sees_it(connection: &Connection) -> Open<'_> {
    let Parties { direction, client, server, endpoint, .. } = &connection.parties;
    let source = client.address.ip();
    let in_mesh = connection.kind != Kind::Plaintext;
    match direction {
        Direction::Outbound => {
            let destination = endpoint.unwrap_or(server.address);
            let peer = server.workload.as_deref().filter(|_| in_mesh);
            Open::Outbound { source, destination, peer }
        }
        Direction::Inbound => {
            let peer = client.workload.as_deref().filter(|_| in_mesh);
            Open::Inbound { source, port: server.address.port(), peer }
        }
    }
}

/// Makes the end of a connection a reset.
fn reset(stream: &TcpStream) {
    // Where it fails, the client sees an orderly end of a connection on which nothing was said.
    SockRef::from(stream).set_linger(Some(Duration::ZERO)).ok();
}

/// Until when a tunnel between the owners of these certificates may be asked for a connection.
fn reusable_until(ends: [&Leaf; 2]) -> SystemTime {
    let [one, other] = ends.map(|leaf| leaf.not_after);
    let expiry = one.min(other);
    expiry.checked_sub(EXPIRY_MARGIN).unwrap_or(expiry)
}

/// IPv4 mapped into IPv6, as a dual-stack socket shows it, becomes IPv4.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::Interrupted
            | io::ErrorKind::WouldBlock
    )
}

/// Stands for what the registry says of both ends of a tunnel: another content, another number.
pub(crate) fn registration(ends: [&Workload; 2]) -> u64 {
    let mut hasher = DefaultHasher::new();
    for Workload { uid, id, name, node, addresses, owner: _ } in ends {
        (uid, id, name, node, addresses).hash(&mut hasher);
    }
    hasher.finish()
}
