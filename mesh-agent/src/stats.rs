//! What happens to the pods' connections: who is connected, how much was carried, what was refused.
//!
//! Per connection this costs one lock at its start and one at its end; the bytes are counted by
//! whoever moves them, in the connection's own [`Traffic`].

mod access;
mod handshake;
mod problems;
mod reports;

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Instant, SystemTime},
};

use tokio_util::sync::CancellationToken;

pub use self::{
    handshake::HandshakeFailure,
    problems::{Problem, Problems},
    reports::{Report, Reports},
};
use crate::{
    identity::Workload,
    policy::DenyReason,
    tunnel::{TraceId, Traffic, shared::Counted},
};

/// From where a pod's connection comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    /// The pod's application opened it.
    Outbound,
    /// The pod's application accepted it.
    Inbound,
}

impl Direction {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Outbound, Self::Inbound];

    /// The name in logs, metrics and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
        }
    }
}

/// How a connection that was let through is carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// In mutual TLS.
    Mtls,
    /// From one pod of the mesh to another on this node, both of which have proven who they are. It
    /// never gets onto a wire.
    Local,
    /// As it is, because the policy allows that.
    Plaintext,
}

impl Kind {
    /// All.
    pub const ALL: [Self; 3] = [Self::Mtls, Self::Local, Self::Plaintext];

    /// The name in logs, metrics and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Mtls => "mtls",
            Self::Local => "local",
            Self::Plaintext => "plaintext",
        }
    }
}

/// One end of a connection.
#[derive(Clone, Debug)]
pub struct Party {
    /// As the applications see it.
    pub address: SocketAddr,
    /// The pod, if it is one that the mesh knows.
    pub workload: Option<Arc<Workload>>,
}

/// Who talks to whom.
#[derive(Clone, Debug)]
pub struct Parties {
    /// Seen from the pod that is counted.
    pub direction: Direction,
    /// Who opened the connection.
    pub client: Party,
    /// Who was dialled.
    pub server: Party,
    /// The endpoint that serves the connection, if the server's address is that of a service.
    pub endpoint: Option<SocketAddr>,
    /// What both agents call the connection. None if it never reached the tunnel.
    pub trace: Option<TraceId>,
}

/// A connection that is open.
#[derive(Debug)]
pub struct Connection {
    /// Who talks to whom.
    pub parties: Parties,
    /// How it is carried.
    pub kind: Kind,
    /// When it was let through.
    pub since: SystemTime,
    /// The bytes so far.
    pub traffic: Traffic,
    started: Instant,
    /// Ends its task.
    kill: CancellationToken,
    /// Why it may not go on.
    revoked: OnceLock<String>,
}

impl AsRef<Traffic> for Connection {
    fn as_ref(&self) -> &Traffic {
        &self.traffic
    }
}

/// The connections of one direction and kind. Only `open` ever falls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Open now.
    pub open: u64,
    /// Ever opened.
    pub opened: u64,
    /// Bytes that clients sent.
    pub from_client: u64,
    /// Bytes that servers sent.
    pub from_server: u64,
}

/// The counts of everything in the mesh's agent, by pod.
#[derive(Debug)]
pub struct Stats {
    pods: RwLock<BTreeMap<String, Arc<PodStats>>>,
    connections_per_pod: usize,
    reports: Arc<Reports>,
}

impl Stats {
    /// Nothing yet. A pod's connections beyond `connections_per_pod` are refused.
    pub fn new(connections_per_pod: usize) -> Self {
        Self { pods: RwLock::default(), connections_per_pod, reports: Arc::default() }
    }

    /// The counts of a pod, from zero if it is new.
    pub fn pod(&self, uid: &str) -> Arc<PodStats> {
        let mut pods = self.pods.write().unwrap_or_else(PoisonError::into_inner);
        let new = || {
            let reports = Arc::clone(&self.reports);
            Arc::new(PodStats::new(uid, self.connections_per_pod, reports))
        };
        Arc::clone(pods.entry(uid.to_owned()).or_insert_with(new))
    }

    /// Drops the counts of a pod that was un-enrolled.
    pub fn forget(&self, uid: &str) {
        self.pods.write().unwrap_or_else(PoisonError::into_inner).remove(uid);
        self.reports.forget(uid);
    }

    /// What the owners of applications must see.
    pub const fn reports(&self) -> &Arc<Reports> {
        &self.reports
    }
}

/// The counts of one pod.
#[derive(Debug)]
pub struct PodStats {
    uid: String,
    reports: Arc<Reports>,
    limit: usize,
    table: Mutex<Table>,
    denied: [[AtomicU64; DenyReason::ALL.len()]; 2],
    handshakes: [AtomicU64; 2],
    failed_handshakes: [[AtomicU64; HandshakeFailure::ALL.len()]; 2],
    revoked: [AtomicU64; 2],
}

#[derive(Debug, Default)]
struct Table {
    last_id: u64,
    open: HashMap<u64, Arc<Connection>>,
    /// Of the open connections only `opened` is in here.
    totals: [[Totals; Kind::ALL.len()]; 2],
}

impl PodStats {
    fn new(uid: &str, limit: usize, reports: Arc<Reports>) -> Self {
        Self {
            uid: uid.to_owned(),
            reports,
            limit,
            table: Mutex::default(),
            denied: Default::default(),
            handshakes: Default::default(),
            failed_handshakes: Default::default(),
            revoked: Default::default(),
        }
    }

    /// Registers a connection that the policy lets through, for as long as the guard lives. `kill`
    /// ends its task.
    ///
    /// # Errors
    ///
    /// [`DenyReason::TooManyConnections`], counted and logged.
    pub fn open(
        self: &Arc<Self>,
        parties: Parties,
        kind: Kind,
        kill: &CancellationToken,
    ) -> Result<ConnectionGuard, DenyReason> {
        let connection = Arc::new(Connection {
            parties,
            kind,
            since: SystemTime::now(),
            traffic: Traffic::default(),
            started: Instant::now(),
            kill: kill.clone(),
            revoked: OnceLock::new(),
        });
        let parties = &connection.parties;
        let mut table = self.table();
        if table.open.len() >= self.limit {
            drop(table);
            self.deny(parties, DenyReason::TooManyConnections);
            return Err(DenyReason::TooManyConnections);
        }
        table.totals[parties.direction as usize][kind as usize].opened += 1;
        table.last_id += 1;
        let id = table.last_id;
        table.open.insert(id, Arc::clone(&connection));
        drop(table);
        Ok(ConnectionGuard { pod: Arc::clone(self), id, connection, end: None })
    }

    /// Counts, logs and, if the pod's owner should know, reports a connection that is refused.
    pub fn deny(&self, parties: &Parties, reason: DenyReason) {
        self.denied[parties.direction as usize][reason.index()].fetch_add(1, Ordering::Relaxed);
        access::log_denied(parties, reason);
        if let Some(report) = Report::of_denied(parties, reason) {
            self.reports.add(&self.uid, report);
        }
    }

    /// Ends the open connections that are no longer allowed, as `judge` says with a reason.
    pub fn revise(&self, judge: impl Fn(&Connection) -> Result<(), String>) {
        for connection in self.connections() {
            if let Err(why) = judge(&connection)
                && connection.revoked.set(why).is_ok()
            {
                let direction = connection.parties.direction;
                self.revoked[direction as usize].fetch_add(1, Ordering::Relaxed);
                connection.kill.cancel();
            }
        }
    }

    /// The connections that were ended because they were no longer allowed.
    pub fn revoked(&self) -> [(Direction, u64); 2] {
        Direction::ALL
            .map(|direction| (direction, self.revoked[direction as usize].load(Ordering::Relaxed)))
    }

    /// Counts a handshake between agents that succeeded.
    pub fn handshake(&self, direction: Direction) {
        self.handshakes[direction as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a handshake between agents that failed.
    pub fn handshake_failed(&self, direction: Direction, reason: HandshakeFailure) {
        self.failed_handshakes[direction as usize][reason.index()].fetch_add(1, Ordering::Relaxed);
    }

    /// The open connections, oldest first.
    pub fn connections(&self) -> Vec<Arc<Connection>> {
        let table = self.table();
        let mut open: Vec<_> =
            table.open.iter().map(|(id, open)| (*id, Arc::clone(open))).collect();
        drop(table);
        open.sort_unstable_by_key(|(id, _)| *id);
        open.into_iter().map(|(_, connection)| connection).collect()
    }

    /// The connections that were let through, the open ones' bytes included.
    pub fn totals(&self) -> Vec<(Direction, Kind, Totals)> {
        let table = self.table();
        let mut totals = table.totals;
        for connection in table.open.values() {
            let all = &mut totals[connection.parties.direction as usize][connection.kind as usize];
            all.open += 1;
            all.from_client += connection.traffic.from_client();
            all.from_server += connection.traffic.from_server();
        }
        drop(table);
        Direction::ALL
            .into_iter()
            .flat_map(|direction| Kind::ALL.map(|kind| (direction, kind)))
            .map(|(direction, kind)| (direction, kind, totals[direction as usize][kind as usize]))
            .collect()
    }

    /// The connections that were refused. Reasons that never occurred are left out.
    pub fn denied(&self) -> Vec<(Direction, DenyReason, u64)> {
        counted(&self.denied, DenyReason::ALL)
    }

    /// The handshakes that succeeded.
    pub fn handshakes(&self) -> [(Direction, u64); 2] {
        Direction::ALL.map(|direction| {
            (direction, self.handshakes[direction as usize].load(Ordering::Relaxed))
        })
    }

    /// The handshakes that failed. Reasons that never occurred are left out.
    pub fn failed_handshakes(&self) -> Vec<(Direction, HandshakeFailure, u64)> {
        counted(&self.failed_handshakes, HandshakeFailure::ALL)
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self, id: u64) {
        let mut table = self.table();
        if let Some(connection) = table.open.remove(&id) {
            let (direction, kind) = (connection.parties.direction, connection.kind);
            let all = &mut table.totals[direction as usize][kind as usize];
            all.from_client += connection.traffic.from_client();
            all.from_server += connection.traffic.from_server();
        }
    }
}

fn counted<R: Copy, const N: usize>(
    counters: &[[AtomicU64; N]; 2],
    reasons: [R; N],
) -> Vec<(Direction, R, u64)> {
    Direction::ALL
        .into_iter()
        .zip(counters)
        .flat_map(|(direction, counters)| {
            counters
                .iter()
                .zip(reasons)
                .map(move |(count, reason)| (direction, reason, count.load(Ordering::Relaxed)))
        })
        .filter(|(_, _, count)| *count > 0)
        .collect()
}

/// An open connection in its pod's table. Dropping it takes the connection out of the table and
/// writes its line in the access log.
#[derive(Debug)]
#[must_use = "the connection counts as open for as long as this lives"]
pub struct ConnectionGuard {
    pod: Arc<PodStats>,
    id: u64,
    connection: Arc<Connection>,
    end: Option<String>,
}

impl ConnectionGuard {
    /// Where to count the connection's bytes.
    pub fn traffic(&self) -> &Traffic {
        &self.connection.traffic
    }

    /// The same, for whoever carries it elsewhere.
    pub fn counted(&self) -> Counted {
        Arc::clone(&self.connection) as Counted
    }

    /// Who talks to whom.
    pub fn parties(&self) -> &Parties {
        &self.connection.parties
    }

    /// Another endpoint takes on the connection, before anything was said: it still is the same one.
    pub fn pass_to(&mut self, endpoint: SocketAddr, workload: Option<Arc<Workload>>, kind: Kind) {
        let Connection { parties, since, started, kill, .. } = &*self.connection;
        let server = Party { workload, ..parties.server.clone() };
        self.connection = Arc::new(Connection {
            parties: Parties { server, endpoint: Some(endpoint), ..parties.clone() },
            kind,
            since: *since,
            traffic: Traffic::default(),
            started: *started,
            kill: kill.clone(),
            revoked: OnceLock::new(),
        });
        let mut table = self.pod.table();
        let before = table.open.insert(self.id, Arc::clone(&self.connection));
        if before.is_some_and(|before| before.kind != kind) {
            table.totals[self.connection.parties.direction as usize][kind as usize].opened += 1;
        }
    }

    /// The connection has ended, like this. Without this call its task was aborted: by un-enrolment,
    /// or because the agent ends.
    pub fn finish(mut self, end: impl fmt::Display) {
        self.end = Some(end.to_string());
    }
}

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        self.pod.close(self.id);
        let revoked = self.connection.revoked.get();
        let end = revoked.or(self.end.as_ref()).map_or("aborted", String::as_str);
        access::log_finished(&self.connection, end);
    }
}

#[cfg(test)]
mod tests;
