//! A connection between two pods of this node.
//!
//! Both ends prove who they are and both ends' policies decide, as between two nodes. But there is
//! no tunnel: both keys are this agent's, so that TLS would only prove to the agent what it holds.
//! The bytes go from one pod's loopback to the other's and are never on a wire.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::{Arc, PoisonError, RwLock},
    time::SystemTime,
};

use tokio_util::sync::CancellationToken;

use super::{
    PodProxy, arrival,
    outbound::{Ended, patient},
    peer::{self, Failed},
};
use crate::{
    identity::{Svid, Workload},
    pod::enrolled::PodState,
    policy::Verdict,
    stats::{Direction, HandshakeFailure, Kind, Parties, Party},
    tunnel::{AppSocket, TraceId, Traffic, relay_plain},
};

/// The pods that this agent serves. Empty if even those of one node are to speak TLS.
#[derive(Default)]
pub struct Neighbours {
    pods: RwLock<BTreeMap<String, Neighbour>>,
}

/// A pod that this agent serves.
#[derive(Clone)]
pub(super) struct Neighbour {
    proxy: Arc<PodProxy>,
    state: Arc<PodState>,
}

impl Neighbours {
    /// A pod is under guard, and served.
    pub(crate) fn insert(&self, proxy: &Arc<PodProxy>, state: &Arc<PodState>) {
        let neighbour = Neighbour { proxy: Arc::clone(proxy), state: Arc::clone(state) };
        let mut pods = self.pods.write().unwrap_or_else(PoisonError::into_inner);
        pods.insert(proxy.uid.to_string(), neighbour);
    }

    /// A pod is about to be served no longer.
    pub(crate) fn remove(&self, uid: &str) {
        self.pods.write().unwrap_or_else(PoisonError::into_inner).remove(uid);
    }

    /// The pod that is registered for an address, if it is here and really has that address.
    pub(super) fn find(&self, registered: &Workload, address: IpAddr) -> Option<Neighbour> {
        let pods = self.pods.read().unwrap_or_else(PoisonError::into_inner);
        pods.get(&registered.uid).filter(|found| found.state.has_address(address)).cloned()
    }
}

/// A connection to a neighbour.
pub(super) struct Crossing<'a> {
    pub(super) pod: &'a PodProxy,
    pub(super) client: SocketAddr,
    /// What is dialled.
    pub(super) address: SocketAddr,
    /// As the registry has it.
    pub(super) server: &'a Workload,
    pub(super) neighbour: &'a Neighbour,
    pub(super) trace: TraceId,
    pub(super) kill: &'a CancellationToken,
}

impl Crossing<'_> {
    pub(super) async fn carry(&self, app: AppSocket, traffic: &Traffic) -> Ended {
        let server = &*self.neighbour.proxy;
        // Un-enrolment waits for it, as for the connections that the pod's own listeners accepted.
        let _counted = server.tasks.token();
        tokio::select! {
            biased;
            () = server.kill.cancelled() => {
                Ended { why: "the server's pod is going".to_owned(), untouched: None }
            }
            ended = self.cross(app, traffic) => ended,
        }
    }

    async fn cross(&self, app: AppSocket, traffic: &Traffic) -> Ended {
        let Self { pod, client, address, neighbour, .. } = self;
        let server = &*neighbour.proxy;
        let own = match self.prove().await {
            Ok(own) => own,
            Err(failed) => {
                pod.no_tunnel(Direction::Outbound, *address, &failed);
                return Ended::unproven(&failed, app);
            }
        };
        arrival::of_peer(&server.registry, &pod.uid, client.ip()).await;
        let registry = server.registry();
        let verdict = server.policy.ingress_mesh(
            &own.leaf,
            client.ip(),
            &server.uid,
            address.port(),
            &registry,
        );
        let parties = Parties {
            direction: Direction::Inbound,
            client: Party { address: *client, workload: registry.by_uid(&pod.uid).cloned() },
            server: Party { address: *address, workload: registry.by_uid(&server.uid).cloned() },
            endpoint: None,
            trace: Some(self.trace),
        };
        match verdict {
            Verdict::Mesh(_) => {}
            Verdict::Deny(reason) => {
                server.stats.deny(&parties, reason);
                return Ended { why: reason.to_string(), untouched: None };
            }
            Verdict::Plaintext(_) => unreachable!("a certificate was shown"),
        }
        let guard = match server.stats.open(parties, Kind::Local, self.kill) {
            Ok(guard) => guard,
            Err(reason) => return Ended { why: reason.to_string(), untouched: Some(app) },
        };
        let dial = server.sockets.dial_application(client.ip(), *address);
        match patient(server.timeouts.dial, dial).await {
            Ok(application) => {
                let end = relay_plain(app, application, &[traffic, guard.traffic()]).await;
                guard.finish(&end);
                Ended { why: end.to_string(), untouched: None }
            }
            Err(error) => {
                let why = format!("connecting to the application: {error}");
                guard.finish(&why);
                Ended { why, untouched: Some(app) }
            }
        }
    }

    /// What a handshake between the two would prove. Returns the client's certificate.
    async fn prove(&self) -> Result<Arc<Svid>, Failed> {
        let server = &*self.neighbour.proxy;
        let missing = || {
            let detail = "the control plane has issued none, or it has expired";
            Failed::new(HandshakeFailure::NoCertificate, detail)
        };
        let own = self.pod.svid().await.ok_or_else(missing)?;
        let theirs = server.svid().await.ok_or_else(missing)?;
        let untrusted = |error: mesh_common::svid::SvidError| {
            Failed::new(HandshakeFailure::Certificate, error.to_string())
        };
        own.vouch(&theirs, SystemTime::now()).map_err(untrusted)?;
        peer::check(&theirs.leaf, self.server)?;
        Ok(own)
    }
}
