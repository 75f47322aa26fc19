//! Puts the status together from what the parts of the agent know.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::{sync::watch, time::timeout};

use super::{
    health,
    status::{
        Certificate, Connections, ControlPlane, ControlPlaneState, Denied, Drops, GuardLayer,
        Handshakes, OpenConnection, OpenConnections, Party, Pod, PodFile, Problem, Program, SCHEMA,
        Status, UnguardedPod, timestamp,
    },
};
use crate::{
    config::Udp,
    identity::{self, Counters, Snapshot, Svid},
    kubernetes,
    pod::source::directory::PodDirectory,
    stats::{self, Problems, Stats},
};

/// What the datapath and the pod manager tell about themselves.
pub trait Inspect: Send + Sync + 'static {
    /// The eBPF programs that exist once per node.
    fn programs(&self) -> Vec<Program>;

    /// Whether the pod source has said [`Synced`](crate::pod::source::PodEvent::Synced) and
    /// everything before it has been dealt with.
    fn pods_synced(&self) -> bool;

    /// The enrolled pods.
    fn pods(&self) -> Vec<PodFacts>;

    /// The certificate of a pod, if that is enrolled.
    fn svid(&self, uid: &str) -> Option<watch::Receiver<Option<Arc<Svid>>>>;
}

/// What the pod manager knows of an enrolled pod.
#[derive(Clone, Debug)]
pub struct PodFacts {
    /// The UID under which it was enrolled.
    pub uid: String,
    /// Where its network namespace was found.
    pub netns: PathBuf,
    /// Whether its UDP passes.
    pub udp: Udp,
    /// Whether the agent's listeners in the pod are open.
    pub listening: bool,
    /// The layers of the guard; one that this pod cannot have is left out.
    pub guard: Vec<GuardLayer>,
    /// Why the guard, or what the capture rests on, is not what it should be.
    pub problem: Option<String>,
    /// UDP datagrams that left the pod.
    pub datagrams: u64,
    /// What the guard dropped, as far as it dropped anything.
    pub drops: Vec<Drops>,
    /// The certificate in use.
    pub svid: Option<Arc<Svid>>,
    /// Why there is no certificate, or no fresh one.
    pub certificate_problem: Option<String>,
    /// Tunnels kept for the next connection.
    pub idle_tunnels: u64,
    /// Tunnels that connections share.
    pub shared_tunnels: u64,
    /// How often something changed inside the pod was put back.
    pub repairs: u64,
    /// Connections from before the enrolment that were aborted.
    pub aborted: u64,
}

/// Everything that the admin interface speaks for.
pub struct Admin {
    /// The node's name.
    pub node: String,
    /// When the agent started.
    pub started: SystemTime,
    /// Whether the kernel encrypts tunnels, in words.
    pub kernel_tls: String,
    /// The relation to the control plane.
    pub identity: watch::Receiver<identity::Status>,
    /// What the identity subsystem has counted.
    pub counters: Arc<Counters>,
    /// The registry.
    pub snapshots: watch::Receiver<Arc<Snapshot>>,
    /// The pods' connections.
    pub stats: Arc<Stats>,
    /// The last warnings and errors.
    pub problems: Problems,
    /// Where pods are enrolled and un-enrolled.
    pub pods: PodDirectory,
    /// Pods that should be enrolled and are not; only on Kubernetes there can be any.
    pub unguarded: watch::Receiver<kubernetes::Unguarded>,
    /// The datapath and the pod manager.
    pub inspect: Arc<dyn Inspect>,
}

impl Admin {
    /// The state of everything.
    pub fn status(&self) -> Status {
        let registry = Arc::clone(&self.snapshots.borrow());
        let mut pods: Vec<_> =
            self.inspect.pods().into_iter().map(|facts| self.pod(facts, &registry)).collect();
        pods.sort_by(|a, b| (a.label(), &a.uid).cmp(&(b.label(), &b.uid)));
        let pod_files = self.pods.problems().into_iter();
        let mut status = Status {
            schema: SCHEMA,
            node: self.node.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            time: timestamp(SystemTime::now()),
            started: timestamp(self.started),
            ready: false,
            degraded: Vec::new(),
            control_plane: control_plane(&self.identity.borrow()),
            programs: self.inspect.programs(),
            kernel_tls: self.kernel_tls.clone(),
            pods_synced: self.inspect.pods_synced(),
            pods,
            unguarded: unguarded(&self.unguarded.borrow()),
            pod_files: pod_files.map(|(file, problem)| PodFile { file, problem }).collect(),
            problems: self.problems.list().into_iter().map(problem).collect(),
        };
        status.ready = health::is_ready(&status);
        status.degraded = health::degraded(&status);
        status
    }

    /// Waits until an enrolled pod has a certificate.
    ///
    /// # Errors
    ///
    /// Why it has none after this time, in the operator's words.
    pub async fn certified(&self, uid: &str, wait: Duration) -> Result<(), String> {
        let svid = self.inspect.svid(uid);
        let mut svid = svid.ok_or_else(|| format!("the pod {uid} is not enrolled"))?;
        if let Ok(Ok(_)) = timeout(wait, svid.wait_for(Option::is_some)).await {
            return Ok(());
        }
        let pod = self.inspect.pods().into_iter().find(|pod| pod.uid == uid);
        let reason = pod.and_then(|pod| pod.certificate_problem);
        Err(format!(
            "the pod {uid} is under guard, but has no certificate yet: {}",
            reason.as_deref().unwrap_or("the control plane has not answered")
        ))
    }

    /// The open connections of every pod.
    pub fn connections(&self) -> OpenConnections {
        let mut uids: Vec<_> = self.inspect.pods().into_iter().map(|pod| pod.uid).collect();
        uids.sort_unstable();
        let connections = uids
            .iter()
            .flat_map(|uid| {
                let open = self.stats.pod(uid).connections();
                open.into_iter().map(|connection| open_connection(uid, &connection))
            })
            .collect();
        OpenConnections { schema: SCHEMA, time: timestamp(SystemTime::now()), connections }
    }

    fn pod(&self, facts: PodFacts, registry: &Snapshot) -> Pod {
        let PodFacts { uid, netns, udp, listening, guard, drops, svid, .. } = facts;
        let registered = registry.by_uid(&uid);
        let stats = self.stats.pod(&uid);
        let connections = stats.totals().into_iter().map(|(direction, kind, totals)| Connections {
            direction: direction.name().to_owned(),
            kind: kind.name().to_owned(),
            open: totals.open,
            opened: totals.opened,
            from_client: totals.from_client,
            from_server: totals.from_server,
        });
        let denied = stats.denied().into_iter().map(|(direction, reason, count)| Denied {
            direction: direction.name().to_owned(),
            reason: reason.name().to_owned(),
            count,
        });
        let ok = stats.handshakes().into_iter().map(|(direction, count)| (direction, "ok", count));
        let failed = stats.failed_handshakes().into_iter();
        let failed = failed.map(|(direction, failure, count)| (direction, failure.name(), count));
        let handshakes = ok.chain(failed).map(|(direction, result, count)| Handshakes {
            direction: direction.name().to_owned(),
            result: result.to_owned(),
            count,
        });
        Pod {
            name: registered.map(|pod| format!("{}/{}", pod.id.namespace(), pod.name)),
            workload: registered.map(|pod| pod.owner.clone()).filter(|owner| !owner.is_empty()),
            identity: registered.map(|pod| pod.id.to_string()),
            addresses: registered.map(|pod| pod.addresses.clone()).unwrap_or_default(),
            uid,
            netns,
            udp,
            listening,
            guard,
            problem: facts.problem,
            certificate: svid.map(|svid| Certificate {
                serial: svid.leaf.serial.clone(),
                issued: Some(timestamp(svid.issued)),
                not_after: timestamp(svid.leaf.not_after),
                next_rotation: timestamp(svid.next_rotation),
            }),
            certificate_problem: facts.certificate_problem,
            connections: connections.collect(),
            denied: denied.collect(),
            handshakes: handshakes.collect(),
            drops,
            datagrams: facts.datagrams,
            idle_tunnels: facts.idle_tunnels,
            shared_tunnels: facts.shared_tunnels,
            repairs: facts.repairs,
            aborted: facts.aborted,
            revoked: stats.revoked().into_iter().map(|(_, count)| count).sum(),
        }
    }
}

fn unguarded(pods: &kubernetes::Unguarded) -> Vec<UnguardedPod> {
    let pod = |(uid, pod): (&String, &kubernetes::UnguardedPod)| UnguardedPod {
        uid: uid.clone(),
        name: pod.name.clone(),
        problem: pod.problem.clone(),
    };
    pods.iter().map(pod).collect()
}

fn control_plane(status: &identity::Status) -> ControlPlane {
    use identity::Connection;
    let (state, endpoint, since) = match &status.connection {
        Connection::Starting => (ControlPlaneState::Starting, None, None),
        Connection::AwaitingToken => (ControlPlaneState::AwaitingToken, None, None),
        Connection::Disconnected { since } => (ControlPlaneState::Disconnected, None, Some(*since)),
        Connection::Connected { endpoint, since } => {
            (ControlPlaneState::Connected, Some(endpoint.clone()), Some(*since))
        }
    };
    ControlPlane {
        state,
        endpoint,
        since: since.map(timestamp),
        last_sync: status.last_sync.map(timestamp),
        snapshot_version: status.version,
        problem: status.last_error.as_ref().map(|problem| problem.message.clone()),
        certificate: status.node_certificate.as_ref().map(|certificate| Certificate {
            serial: certificate.serial.clone(),
            issued: None,
            not_after: timestamp(certificate.not_after),
            next_rotation: timestamp(certificate.next_renewal),
        }),
    }
}

fn problem(problem: stats::Problem) -> Problem {
    let stats::Problem { message, count, first, last } = problem;
    Problem { message, count, first: timestamp(first), last: timestamp(last) }
}

fn open_connection(uid: &str, connection: &stats::Connection) -> OpenConnection {
    let party = |party: &stats::Party| Party {
        address: party.address,
        identity: party.workload.as_ref().map(|pod| pod.id.to_string()),
        uid: party.workload.as_ref().map(|pod| pod.uid.clone()),
    };
    OpenConnection {
        pod: uid.to_owned(),
        direction: connection.parties.direction.name().to_owned(),
        kind: connection.kind.name().to_owned(),
        client: party(&connection.parties.client),
        server: party(&connection.parties.server),
        since: timestamp(connection.since),
        from_client: connection.traffic.from_client(),
        from_server: connection.traffic.from_server(),
        trace: connection.parties.trace.map(|trace| trace.to_string()),
    }
}
