//! What the identity subsystem tells the operator about itself.

use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering},
    time::SystemTime,
};

/// The state of this node's relation to the control plane.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// Whether a connection stands.
    pub connection: Connection,
    /// When the control plane last confirmed what we know: a snapshot, or a connection over which
    /// none was newer. `None` if not since the agent started.
    pub last_sync: Option<SystemTime>,
    /// The version of the snapshot in use. 0: none.
    pub version: u64,
    /// The node's own certificate, if it has one.
    pub node_certificate: Option<NodeCertificate>,
    /// The latest thing that went wrong, in words, kept after it is over.
    pub last_error: Option<Problem>,
}

/// Whether the agent is connected to the control plane.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Connection {
    /// The agent has just started.
    #[default]
    Starting,
    /// The node has no certificate, and no token to get one with.
    AwaitingToken,
    /// It is not reachable, or refuses us. The agent goes on with what it knows.
    Disconnected {
        /// When the connection was lost, or the first attempt failed.
        since: SystemTime,
    },
    /// Snapshots flow.
    Connected {
        /// Which of the configured addresses.
        endpoint: String,
        /// Since when.
        since: SystemTime,
    },
}

/// The certificate by which the control plane knows this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeCertificate {
    /// Its serial number in hexadecimal.
    pub serial: String,
    /// When it expires.
    pub not_after: SystemTime,
    /// When the agent asks for the next one.
    pub next_renewal: SystemTime,
}

/// Something that went wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// When.
    pub at: SystemTime,
    /// What, and what to do about it.
    pub message: String,
}

/// What happened since the agent started. Only ever grows.
#[derive(Debug, Default)]
pub struct Counters {
    /// Workload certificates received, checked and put to use.
    pub svids_issued: AtomicU64,
    /// Requests for a workload certificate that failed, whatever the reason.
    pub svid_failures: AtomicU64,
    /// Workload certificates received and rejected by the agent's own check.
    pub svids_rejected: AtomicU64,
    /// Workload certificates that expired before there was another.
    pub svids_expired: AtomicU64,
    /// Workload certificates taken out of use because the registry or the trust bundle changed.
    pub svids_withdrawn: AtomicU64,
    /// Node certificates received: by joining and by renewal.
    pub node_certificates: AtomicU64,
    /// Attempts to join or to renew the node certificate that failed.
    pub node_certificate_failures: AtomicU64,
    /// Connections to the control plane.
    pub connects: AtomicU64,
    /// Connections to the control plane that failed or ended.
    pub disconnects: AtomicU64,
    /// Snapshots put to use.
    pub snapshots_applied: AtomicU64,
    /// Snapshots refused because their content was not usable.
    pub snapshots_refused: AtomicU64,
    /// Files in the runtime directory that could not be read, or not be written.
    pub file_errors: AtomicU64,
}

pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// An error and its causes in one line. Libraries often say only "transport error" and leave the
/// reason to the cause.
pub(crate) struct Chain<'a>(pub(crate) &'a (dyn std::error::Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut said = self.0.to_string();
        f.write_str(&said)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            let text = error.to_string();
            // Many errors repeat their cause in their own text.
            if !said.contains(&text) {
                write!(f, ": {text}")?;
                said = text;
            }
            cause = error.source();
        }
        Ok(())
    }
}
