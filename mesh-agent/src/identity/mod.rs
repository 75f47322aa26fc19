//! Who is who: this node's own certificate, the registry of workloads as the control plane tells
//! it, and a certificate for every enrolled pod.
//!
//! Private keys are made here and never leave this process, but for files of mode 0600 in the
//! runtime directory, with which a restarted agent goes on, also while the control plane is down.
//! What is unknown, expired or no longer vouched for is not offered to anybody: whoever asks sees
//! `None` and refuses the connection.

mod connect;
mod control;
mod credentials;
mod files;
mod joining;
mod node;
mod parts;
mod registry;
mod reporting;
mod rotation;
mod schedule;
mod services;
mod snapshots;
mod status;
mod stored;
mod svid;
mod svid_store;
mod token_watch;

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use mesh_common::api;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

pub(crate) use self::status::Chain;
use self::{
    connect::Dialer,
    control::Link,
    files::PrivateDir,
    node::NodeIssuer,
    reporting::Reporting,
    rotation::{Context, Rotation},
    schedule::Clock,
    snapshots::Snapshots,
    svid_store::SvidStore,
};
pub use self::{
    joining::Credential,
    registry::{RegistryError, Settings, Snapshot, Workload},
    services::{Endpoint, Found, Readiness, ServicePort, Services, ServicesError},
    status::{Connection, Counters, NodeCertificate, Problem, Status},
    svid::Svid,
};
use crate::stats::Reports;

/// What the identity subsystem needs to know.
#[derive(Clone, Debug)]
pub struct Config {
    /// This node's name, as in its join token and in the registry.
    pub node: String,
    /// Where the control plane listens, each as `host:port`, tried in this order.
    pub control_plane: Vec<String>,
    /// What the node joins with while it has no usable certificate.
    pub credential: Credential,
    /// An existing directory of mode 0700. Used in it: `node.pem`, `node-roots.pem`,
    /// `snapshot.pb`, `snapshot-changes.pb` and the directory `svid`.
    pub runtime_dir: PathBuf,
    /// What the control plane is told of this node's pods; nothing as long as nobody has looked.
    pub state: watch::Receiver<Option<api::State>>,
}

/// The runtime directory cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot keep keys in {}: {source}", path.display())]
pub struct StartError {
    /// The directory.
    path: PathBuf,
    /// What is wrong with it.
    source: io::Error,
}

/// Why a pod has no certificate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the pod {uid} has no certificate: {reason}")]
pub struct NoSvid {
    /// The pod's UID.
    pub uid: String,
    /// The reason, in words.
    pub reason: String,
}

/// The identity subsystem of an agent. Dropping it ends everything it does.
#[derive(Debug)]
pub struct Identity {
    context: Arc<Context>,
    status: watch::Receiver<Status>,
    _link: AbortOnDropHandle<()>,
}

impl Identity {
    /// Starts with what the runtime directory holds, and connects to the control plane. Must be
    /// called in a tokio runtime.
    ///
    /// # Errors
    ///
    /// If the runtime directory cannot be used, or others can reach into it.
    pub fn start(config: Config) -> Result<Self, StartError> {
        Self::start_with(config, Dialer::tcp(), Clock::system())
    }

    fn start_with(config: Config, dialer: Dialer, clock: Clock) -> Result<Self, StartError> {
        let Config { node, control_plane, credential, runtime_dir, state } = config;
        let unusable = |source| StartError { path: runtime_dir.clone(), source };
        let counters = Arc::new(Counters::default());
        let dir = PrivateDir::open(&runtime_dir).map_err(unusable)?;
        let store = SvidStore::open(&runtime_dir, Arc::clone(&counters)).map_err(unusable)?;
        let snapshots = Arc::new(Snapshots::open(dir.clone(), Arc::clone(&counters)));
        let (connection, connected) = watch::channel(None);
        let (status, status_seen) =
            watch::channel(Status { version: snapshots.current().version(), ..Status::default() });
        let link = Link {
            clock: clock.clone(),
            counters: Arc::clone(&counters),
            issuer: NodeIssuer {
                node: node.clone(),
                endpoints: control_plane,
                credential,
                dialer,
                dir,
            },
            snapshots: Arc::clone(&snapshots),
            connection,
            status,
            state,
        };
        let context = Context {
            node,
            clock,
            store,
            counters,
            snapshots: snapshots.subscribe(),
            connection: connected,
        };
        Ok(Self {
            context: Arc::new(context),
            status: status_seen,
            _link: AbortOnDropHandle::new(tokio::spawn(link.run())),
        })
    }

    /// The registry: at first what was known before a restart, then every version that the
    /// control plane sends.
    pub fn snapshots(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.context.snapshots.clone()
    }

    /// Gets a certificate for a pod and keeps it fresh until the handle is dropped. A pod that is
    /// not registered (yet) gets one when it is. Must be called in a tokio runtime, once per pod.
    pub fn track(&self, uid: &str) -> SvidHandle {
        let (svid, svid_seen) = watch::channel(None);
        let (problem, problem_seen) = watch::channel(None);
        let rotation =
            Rotation { uid: uid.to_owned(), context: Arc::clone(&self.context), svid, problem };
        SvidHandle {
            uid: uid.to_owned(),
            svid: svid_seen,
            problem: problem_seen,
            context: Arc::clone(&self.context),
            task: AbortOnDropHandle::new(tokio::spawn(rotation.run())),
        }
    }

    /// Tells the control plane what the owners of applications must see, until the handle is
    /// dropped. Must be called in a tokio runtime.
    pub fn report(&self, reports: Arc<Reports>) -> AbortOnDropHandle<()> {
        let reporting = Reporting {
            node: self.context.node.clone(),
            snapshots: self.snapshots(),
            connection: self.context.connection.clone(),
            reports,
        };
        AbortOnDropHandle::new(tokio::spawn(reporting.run()))
    }

    /// Removes the stored key and certificate of a pod that nobody tracks: what a pod that
    /// disappeared while the agent was not running has left behind.
    pub fn forget(&self, uid: &str) {
        self.context.store.remove(uid);
    }

    /// How it stands with the control plane.
    pub fn status(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }

    /// What happened so far.
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.context.counters)
    }
}

/// One pod's certificate. Dropping the handle stops the rotation, and every receiver sees `None`;
/// what is stored stays for the next start.
#[derive(Debug)]
pub struct SvidHandle {
    uid: String,
    svid: watch::Receiver<Option<Arc<Svid>>>,
    problem: watch::Receiver<Option<Problem>>,
    context: Arc<Context>,
    task: AbortOnDropHandle<()>,
}

impl SvidHandle {
    /// The certificate in use, now and after every change. `None` means that there is none that
    /// could be shown: the pod's connections are to be refused.
    pub fn receiver(&self) -> watch::Receiver<Option<Arc<Svid>>> {
        self.svid.clone()
    }

    /// The certificate in use.
    pub fn current(&self) -> Option<Arc<Svid>> {
        self.svid.borrow().clone()
    }

    /// What is wrong: why there is no certificate, or why there is no fresh one.
    pub fn problem(&self) -> Option<Problem> {
        self.problem.borrow().clone()
    }

    /// Waits for a certificate, at once if there is one.
    ///
    /// # Errors
    ///
    /// [`NoSvid`] after the timeout.
    pub async fn wait(&self, timeout: Duration) -> Result<Arc<Svid>, NoSvid> {
        let mut receiver = self.receiver();
        let waited = tokio::time::timeout(timeout, receiver.wait_for(Option::is_some)).await;
        if let Ok(Ok(svid)) = waited
            && let Some(svid) = svid.as_ref()
        {
            return Ok(Arc::clone(svid));
        }
        let problem = self.problem().map(|problem| problem.message);
        let reason = problem.unwrap_or_else(|| "the control plane has not answered".to_owned());
        Err(NoSvid { uid: self.uid.clone(), reason })
    }

    /// Ends the rotation and removes the stored key and certificate: the pod is un-enrolled.
    pub async fn forget(self) {
        let Self { uid, context, task, .. } = self;
        task.abort();
        // Only after the task has ended can it no longer store anything.
        if let Err(error) = task.await
            && error.is_panic()
        {
            tracing::error!(pod = uid, %error, "the rotation of a certificate had failed");
        }
        context.store.remove(&uid);
    }
}

#[cfg(test)]
mod tests;
