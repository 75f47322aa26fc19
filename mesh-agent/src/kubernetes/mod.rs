//! The agent as a pod of a Kubernetes cluster. The CNI plugin enrols pods as they start, and ends
//! that with them. What it cannot do is done here: pods that ran before the agent did come under
//! guard, and those that were taken out of the mesh are let go. Neither restarts a pod.

mod discovery;
pub(crate) mod facts;
mod leaving;
mod missing;
mod processes;

#[cfg(test)]
pub(crate) mod scripted;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, io,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use kube::Client;
use tokio::{sync::watch, time::Instant};

use self::{
    discovery::Doubt,
    leaving::{Fate, Name},
    missing::{AGAIN, Missing},
    processes::Scene,
};
use crate::{
    identity::{Snapshot, Workload},
    pod::source::directory::PodDirectory,
};

/// How often it is looked whether the enrolled pods are all known yet.
const SOON: Duration = Duration::from_secs(1);

/// Pods of this node that are in the mesh and not under guard, by UID.
pub type Unguarded = BTreeMap<String, UnguardedPod>;

/// A pod of this node that is in the mesh and not under guard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnguardedPod {
    /// `<namespace>/<name>`.
    pub name: String,
    /// Why, in the operator's words.
    pub problem: String,
}

/// The enrolled pods, by UID; none as long as they are not all known.
type Enrolled = Box<dyn Fn() -> Option<BTreeSet<String>> + Send + Sync>;

/// Makes the enrolled pods those that are in the mesh.
pub struct Controller {
    node: String,
    own_namespace: String,
    client: Client,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    pods: PodDirectory,
    enrolled: Enrolled,
    look_around: Arc<dyn Fn() -> io::Result<Scene> + Send + Sync>,
    unguarded: watch::Sender<Unguarded>,
    missing: Missing,
    known: BTreeMap<String, Known>,
}

/// A pod that was registered once.
struct Known {
    name: Name,
    /// Not before this time the API server is asked about it.
    ask: Instant,
}

impl fmt::Debug for Controller {
    /// The client has credentials.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Controller").field("node", &self.node).finish_non_exhaustive()
    }
}

impl Controller {
    /// One for the pods of `node`. `own_namespace` is where nodemesh is installed; `enrolled` says
    /// which pods are enrolled, nothing as long as they are not all known; `unguarded` hears of
    /// those that should be and are not.
    pub fn new(
        node: String,
        own_namespace: String,
        client: Client,
        snapshots: watch::Receiver<Arc<Snapshot>>,
        pods: PodDirectory,
        enrolled: impl Fn() -> Option<BTreeSet<String>> + Send + Sync + 'static,
        unguarded: watch::Sender<Unguarded>,
    ) -> Self {
        Self {
            node,
            own_namespace,
            client,
            snapshots,
            pods,
            enrolled: Box::new(enrolled),
            look_around: Arc::new(Scene::read),
            unguarded,
            missing: Missing::default(),
            known: BTreeMap::new(),
        }
    }

    /// Does so until the registry ends.
    pub async fn run(mut self) {
        loop {
            let pause = if self.round().await { AGAIN } else { SOON };
            let next = Instant::now() + pause;
            let next = self.missing.next().map_or(next, |due| due.min(next));
            tokio::select! {
                changed = self.snapshots.changed() => if changed.is_err() {
                    return;
                },
                () = tokio::time::sleep_until(next) => {}
            }
        }
    }

    /// Whether everything is known that is needed for it.
    async fn round(&mut self) -> bool {
        let registry = Arc::clone(&self.snapshots.borrow_and_update());
        let Some(enrolled) = (self.enrolled)().filter(|_| registry.is_known()) else {
            return false;
        };
        let here: BTreeMap<&str, &Workload> = registry
            .on_node(&self.node)
            .map(|workload| (workload.uid.as_str(), &**workload))
            .collect();
        self.let_go(&here, &enrolled).await;
        self.bring_in(&here, &enrolled).await;
        true
    }

    /// Un-enrols pods that were taken out of the mesh.
    async fn let_go(&mut self, here: &BTreeMap<&str, &Workload>, enrolled: &BTreeSet<String>) {
        let now = Instant::now();
        self.known.retain(|uid, _| enrolled.contains(uid));
        // Those that are not enrolled yet, too: the next snapshot may already be without them.
        for (uid, workload) in here {
            self.known.insert((*uid).to_owned(), Known { name: Name::of(workload), ask: now });
        }
        for uid in enrolled.iter().filter(|uid| !here.contains_key(uid.as_str())) {
            // One that was not registered since the agent knows it stays as it is: under guard.
            let Some(known) = self.known.get_mut(uid).filter(|known| known.ask <= now) else {
                continue;
            };
            known.ask = now + AGAIN;
            let name = &known.name;
            match leaving::ask(&self.client, name, uid, &self.own_namespace).await {
                Ok(Fate::Member) => {}
                Ok(Fate::Over) => {
                    self.known.remove(uid);
                }
                Ok(Fate::Outside(why)) => {
                    tracing::info!(pod = uid, %name, ?why, "taken out of the mesh");
                    if let Err(error) = self.pods.unenroll(uid.clone(), None).await {
                        tracing::warn!(pod = uid, %name, "cannot let the pod go: {error}");
                    }
                }
                Err(error) => tracing::warn!(
                    pod = uid, %name, "is it still in the mesh? It stays under guard: {error}"
                ),
            }
        }
    }

    /// Enrols pods that ran before the agent did.
    async fn bring_in(&mut self, here: &BTreeMap<&str, &Workload>, enrolled: &BTreeSet<String>) {
        let missing = here.iter().filter(|(uid, _)| !enrolled.contains(**uid));
        let missing = missing.map(|(uid, workload)| (*uid, !workload.addresses.is_empty()));
        let now = Instant::now();
        self.missing.update(now, missing);
        let due = self.missing.take_due(now);
        let mut unguarded = self.unguarded.borrow().clone();
        unguarded.retain(|uid, _| self.missing.contains(uid) && !due.contains(uid));
        if !due.is_empty() {
            for (uid, found) in self.find(due).await {
                let problem = match found {
                    Ok(netns) => self.enrol(&uid, netns).await.err(),
                    // It has not started yet.
                    Err(Looking::Doubt(Doubt::NoProcess)) if !self.missing.is_running(&uid) => None,
                    Err(error) => Some(error.to_string()),
                };
                let pod = problem.zip(here.get(uid.as_str()));
                if let Some((problem, workload)) = pod {
                    let name = Name::of(workload).to_string();
                    unguarded.insert(uid, UnguardedPod { name, problem });
                }
            }
        }
        self.unguarded.send_if_modified(|before| {
            for (uid, pod) in unguarded.iter().filter(|(uid, pod)| before.get(*uid) != Some(pod)) {
                let UnguardedPod { name, problem } = pod;
                tracing::warn!(pod = uid, name, "in the mesh, but not under guard: {problem}");
            }
            let changed = *before != unguarded;
            *before = unguarded;
            changed
        });
    }

    async fn find(&self, due: BTreeSet<String>) -> BTreeMap<String, Result<PathBuf, Looking>> {
        let look_around = Arc::clone(&self.look_around);
        let scene = tokio::task::spawn_blocking(move || look_around()).await;
        let scene = scene.map_err(|error| error.to_string());
        match scene.and_then(|scene| scene.map_err(|error| error.to_string())) {
            Ok(scene) => discovery::find(&due, &scene)
                .into_iter()
                .map(|(uid, found)| (uid, found.map_err(Looking::Doubt)))
                .collect(),
            Err(error) => {
                due.into_iter().map(|uid| (uid, Err(Looking::Failed(error.clone())))).collect()
            }
        }
    }

    async fn enrol(&self, uid: &str, netns: PathBuf) -> Result<(), String> {
        let path = netns.display().to_string();
        self.pods.enroll(uid.to_owned(), netns, None).await?;
        tracing::info!(pod = uid, netns = path, "enrolled a pod that ran before");
        Ok(())
    }
}

/// Why a pod's namespace was not found.
#[derive(Debug, thiserror::Error)]
enum Looking {
    #[error(transparent)]
    Doubt(Doubt),
    #[error("cannot look at the node's processes (hostPID, CAP_SYS_PTRACE): {0}")]
    Failed(String),
}

impl Name {
    fn of(workload: &Workload) -> Self {
        Self { namespace: workload.id.namespace().to_owned(), name: workload.name.clone() }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}
