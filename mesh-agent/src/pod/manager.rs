//! Enrols and un-enrols pods as the source says, and looks after what is left of dead ones.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use mesh_common::{abi, report::Reason};
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{
    enrolled::{Enrolled, Guarded, PodState, let_go, lock, unguard},
    ledger::{Entry, Ledger},
    netns::Netns,
    routing::Routing,
    source::{PodEvent, PodSpec, Removal},
};
use crate::{
    admin::{
        Inspect, PodFacts,
        status::{Drops, GuardLayer, Program},
    },
    balance::Balancer,
    bpf::{Counted, Datapath, Events, GuardEvent},
    config::Config,
    identity::{Identity, Snapshot, Svid, SvidHandle},
    observer::Observed,
    policy::Policy,
    proxy::{Habits, Neighbours, registration},
    stats::{Report, Stats},
    tls::{Encryption, Stream},
    tunnel::{
        Pool, Sharing,
        pool::{Key, Proof},
        shared::Growth,
    },
};

/// A setting is written just after the kernel tells of it: when to look.
const AFTER_WRITE: [Duration; 2] = [Duration::from_millis(10), Duration::from_millis(300)];

/// Of one pod, the guard's drops are logged at most this often.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// How long after a namespace's end was announced its remains are looked at, and then again.
const SWEEP_INTERVAL: Duration = Duration::from_secs(5);

/// What all pods of the node have in common.
pub struct Node {
    /// The operator's decisions.
    pub config: Config,
    /// The operator's decisions about connections.
    pub policy: Arc<Policy>,
    /// Which endpoint of a service a connection goes to.
    pub balancer: Arc<Balancer>,
    /// What the node's workloads have connected to lately.
    pub habits: Arc<Habits>,
    /// Pods of this node that need no tunnel to each other.
    pub neighbours: Arc<Neighbours>,
    /// The eBPF side.
    pub datapath: Arc<Datapath>,
    /// Who is who.
    pub identity: Identity,
    /// The pods' counts.
    pub stats: Arc<Stats>,
    /// Idle tunnels.
    pub pool: Pool<Stream>,
    /// Those that connections share.
    pub sharing: Sharing,
    /// How much more of shared tunnels may be under way.
    pub growth: Growth,
    /// Who encrypts what tunnels carry.
    pub encryption: Encryption,
    /// What is enrolled, on file.
    pub ledger: Ledger,
    /// No new connections.
    pub drain: CancellationToken,
    /// What the pod files lack; a reason not to sweep what may be theirs.
    pub unreadable_pods: Box<dyn Fn() -> bool + Send + Sync>,
}

/// What is enrolled, for whoever asks.
#[derive(Default)]
struct Known {
    pods: BTreeMap<String, Arc<PodState>>,
    /// Namespaces that are under guard though nothing serves them any more.
    leftovers: Vec<u64>,
}

/// The enrolled pods.
pub struct Manager {
    node: Arc<Node>,
    pods: BTreeMap<String, Enrolled>,
    /// The UIDs that the source wants, whether or not they could be enrolled: what is left of them
    /// stays under guard.
    wanted: BTreeSet<String>,
    /// When a drop was last logged, by the pod's cookie.
    logged: BTreeMap<u64, Instant>,
    /// A setting was written, in some pod or other.
    written: Arc<Notify>,
    view: Arc<View>,
}

/// The manager, as `status` sees it.
pub struct View {
    node: Arc<Node>,
    known: Mutex<Known>,
    synced: AtomicBool,
}

impl Manager {
    /// No pods yet. Whatever an earlier agent pinned goes on guarding.
    pub fn new(node: Arc<Node>) -> Self {
        let view = Arc::new(View {
            node: Arc::clone(&node),
            known: Mutex::default(),
            synced: AtomicBool::new(false),
        });
        Self {
            node,
            pods: BTreeMap::new(),
            wanted: BTreeSet::new(),
            logged: BTreeMap::new(),
            written: Arc::default(),
            view,
        }
    }

    /// What is enrolled, for whoever asks.
    pub fn view(&self) -> Arc<View> {
        Arc::clone(&self.view)
    }

    /// Does what the source and the eBPF programs say, until the `end`; then waits for open
    /// connections to end, for as long as `timeouts.drain`.
    ///
    /// # Errors
    ///
    /// When the source ends or the kernel no longer tells of events.
    pub async fn run(
        mut self,
        mut pods: mpsc::Receiver<PodEvent>,
        mut events: Events,
        end: CancellationToken,
    ) -> Result<()> {
        let registry =
            tokio::spawn(end_tunnels(self.node.identity.snapshots(), Arc::clone(&self.node)));
        let settings = tokio::spawn(check_settings(self.view(), Arc::clone(&self.written)));
        let mut sweep = tokio::time::interval(SWEEP_INTERVAL);
        let result = loop {
            tokio::select! {
                biased;
                () = end.cancelled() => break Ok(()),
                event = events.next() => match event {
                    Ok(event) => self.look_after(event),
                    Err(error) => break Err(error.into()),
                },
                event = pods.recv() => match event {
                    Some(event) => self.apply(event).await,
                    None => break Err(anyhow::anyhow!("the source of pods has ended")),
                },
                _ = sweep.tick(), if self.has_leftovers() => self.sweep().await,
            }
        };
        registry.abort();
        settings.abort();
        self.drain().await;
        result
    }

    async fn apply(&mut self, event: PodEvent) {
        match event {
            PodEvent::Upsert(spec, ack) => {
                let uid = spec.uid.clone();
                self.wanted.insert(uid.clone());
                let result = self.upsert(spec).await;
                if let Err(error) = &result {
                    tracing::warn!(pod = uid, "cannot enrol the pod: {error:#}");
                }
                ack.answer(result.map_err(|error| format!("{error:#}")));
            }
            PodEvent::Remove { uid, cause, ack } => {
                self.wanted.remove(&uid);
                let result = self.remove(&uid, cause).await;
                if let Err(error) = &result {
                    tracing::warn!(pod = uid, "cannot un-enrol the pod: {error:#}");
                }
                ack.answer(result.map_err(|error| format!("{error:#}")));
            }
            PodEvent::Synced => {
                if let Err(error) = self.find_leftovers() {
                    tracing::warn!("cannot look for what earlier agents left: {error:#}");
                }
                self.view.synced.store(true, Ordering::Relaxed);
                self.sweep().await;
                self.retire_other_versions();
            }
        }
    }

    async fn upsert(&mut self, spec: PodSpec) -> Result<()> {
        if let Some(pod) = self.pods.get_mut(&spec.uid) {
            if pod.is(&spec) {
                return pod.update(&self.node, spec).await;
            }
            // Another namespace: another pod, whatever it is called.
            self.remove(&spec.uid, Removal::NamespaceGone).await?;
        }
        let cookie = Netns::open(&spec.netns)?.cookie();
        if let Some(other) = self.pods.values().find(|pod| pod.state.cookie == cookie) {
            anyhow::bail!(
                "{} is the network namespace of the pod {} already: un-enrol that one first",
                spec.netns.display(),
                other.spec.uid
            );
        }
        let uid = spec.uid.clone();
        let pod = Enrolled::enrol(&self.node, spec).await?;
        tracing::info!(pod = uid, netns = %pod.spec.netns.display(), "enrolled");
        let mut known = lock(&self.view.known);
        known.leftovers.retain(|leftover| *leftover != cookie);
        known.pods.insert(uid.clone(), Arc::clone(&pod.state));
        drop(known);
        self.pods.insert(uid, pod);
        Ok(())
    }

    async fn remove(&mut self, uid: &str, cause: Removal) -> Result<()> {
        let Some(pod) = self.pods.remove(uid) else { return Ok(()) };
        let cookie = pod.state.cookie;
        let routing = pod.close(&self.node).await;
        lock(&self.view.known).pods.remove(uid);
        self.logged.remove(&cookie);
        tracing::info!(pod = uid, %cause, "un-enrolled");
        let released = match cause {
            Removal::Withdrawn => let_go(&self.node, cookie, &routing).await,
            // Somebody may live in it yet, and was promised that nothing leaves in plaintext.
            Removal::NamespaceGone => {
                lock(&self.view.known).leftovers.push(cookie);
                Ok(())
            }
        };
        if released.is_err() {
            // Tried again when leftovers are swept.
            lock(&self.view.known).leftovers.push(cookie);
        }
        released
    }

    fn look_after(&mut self, event: GuardEvent) {
        let known = lock(&self.view.known);
        match event {
            GuardEvent::Dropped { cookie, layer, reason } => {
                let pod = known.pods.values().find(|pod| pod.cookie == cookie);
                if let Some(pod) = pod {
                    pod.wake();
                }
                let now = Instant::now();
                // Each CPU tells of its own drops.
                if self.logged.get(&cookie).is_some_and(|last| now - *last < LOG_INTERVAL) {
                    return;
                }
                self.logged.insert(cookie, now);
                if let Some(pod) = pod
                    && let Some(report) = past_the_mesh(layer, reason)
                {
                    self.node.stats.reports().add(&pod.uid, report);
                }
                let uid = pod.map_or("none that is served", |pod| &pod.uid);
                let (layer, reason) = (layer.name(), reason.name());
                tracing::warn!(pod = uid, layer, reason, "the guard refused or dropped something");
            }
            GuardEvent::SettingWritten => self.written.notify_one(),
        }
    }

    fn has_leftovers(&self) -> bool {
        !lock(&self.view.known).leftovers.is_empty()
    }

    fn find_leftovers(&self) -> Result<()> {
        let served: Vec<u64> = self.pods.values().map(|pod| pod.state.cookie).collect();
        let mut leftovers = self.node.datapath.guarded()?;
        leftovers.retain(|cookie| !served.contains(cookie));
        lock(&self.view.known).leftovers = leftovers;
        Ok(())
    }

    /// Removes what agents of another version have left, once this one guards every pod that is
    /// wanted: until then their guards drop what they do not know.
    fn retire_other_versions(&self) {
        let unguarded = self.wanted.iter().find(|uid| !self.pods.contains_key(*uid));
        if let Some(uid) = unguarded {
            tracing::warn!(pod = uid, "not enrolled: guards of other versions, if any, stay");
        } else if let Err(error) = self.node.datapath.retire_other_versions() {
            tracing::warn!("cannot remove the pins of other versions: {error}");
        }
    }

    /// Lets go of leftovers: those whose namespace is dead, and those that were withdrawn while no
    /// agent ran. The rest stays under guard.
    async fn sweep(&self) {
        let leftovers = lock(&self.view.known).leftovers.clone();
        let entries = self.node.ledger.entries().unwrap_or_default();
        for cookie in leftovers {
            let entry = entries.iter().find(|entry| entry.cookie == cookie);
            match self.sweep_one(cookie, entry).await {
                Ok(true) => {
                    tracing::info!(cookie, "swept what was left of a pod");
                    lock(&self.view.known).leftovers.retain(|leftover| *leftover != cookie);
                }
                Ok(false) => {}
                Err(error) => tracing::warn!(cookie, "cannot sweep a leftover: {error:#}"),
            }
        }
    }

    async fn sweep_one(&self, cookie: u64, entry: Option<&Entry>) -> Result<bool> {
        let wanted = entry.is_some_and(|entry| self.wanted.contains(&entry.uid));
        // Filters tell nothing of whether their device is gone.
        let is_dead = if self.node.datapath.features().tcx {
            self.node.datapath.is_dead(cookie)?
        } else {
            entry.and_then(still_there).is_none()
        };
        if is_dead {
            self.node.datapath.release(cookie)?;
            self.node.ledger.strike(cookie)?;
        } else {
            // It may belong to a pod file that cannot be read just now.
            let settled =
                self.view.synced.load(Ordering::Relaxed) && !(self.node.unreadable_pods)();
            let Some(netns) = entry.filter(|_| settled && !wanted).and_then(still_there) else {
                return Ok(false);
            };
            let_go(&self.node, cookie, &Routing::connect(Arc::new(netns))?).await?;
        }
        if let Some(entry) = entry.filter(|_| !wanted) {
            self.node.identity.forget(&entry.uid);
        }
        Ok(true)
    }

    async fn drain(self) {
        // Their connect() is refused before the listeners go.
        for pod in self.pods.values() {
            if let Err(error) = pod.refuse(&self.node) {
                tracing::warn!(pod = pod.spec.uid, "new connections may hang: {error:#}");
            }
        }
        self.node.drain.cancel();
        let limit = self.node.config.timeouts.drain;
        let all = async {
            for pod in self.pods.values() {
                pod.tasks().close();
                pod.tasks().wait().await;
            }
        };
        match tokio::time::timeout(limit, all).await {
            Ok(()) => tracing::info!("every connection has ended"),
            Err(_elapsed) => tracing::warn!("connections are still open: they are reset"),
        }
    }
}

/// Looks at every pod's settings when one was written. The kernel does not say whose it was.
async fn check_settings(view: Arc<View>, written: Arc<Notify>) {
    loop {
        written.notified().await;
        for delay in AFTER_WRITE {
            tokio::time::sleep(delay).await;
            let pods: Vec<_> = lock(&view.known).pods.values().cloned().collect();
            // With hundreds of pods it takes milliseconds. A panic is told of where it happens.
            let checked = tokio::task::spawn_blocking(move || {
                pods.iter().for_each(|pod| pod.check_settings());
            });
            drop(checked.await);
        }
    }
}

/// What a pod's owner is told of a drop: that something tried to send past the mesh. Not that the
/// agent was away, that UDP is denied, or that an address is missing.
fn past_the_mesh(layer: abi::Layer, reason: abi::Reason) -> Option<Report> {
    use abi::Reason as Why;
    let past = [Why::Plaintext, Why::Bypass, Why::Protocol, Why::EtherType, Why::Malformed];
    past.contains(&reason).then(|| {
        let (layer, reason) = (layer.name(), reason.name());
        let text = format!("the guard dropped what it sent past the mesh ({layer}: {reason})");
        Report { reason: Reason::GuardDropped, text, peer: None }
    })
}

/// The namespace of a ledger's entry, if it is still at its path.
fn still_there(entry: &Entry) -> Option<Netns> {
    Netns::open(&entry.netns).ok().filter(|netns| netns.cookie() == entry.cookie)
}

/// Removes everything that any agent with this configuration ever made.
///
/// # Errors
///
/// What cannot be removed; the rest is.
pub async fn uninstall(config: &Config) -> Result<()> {
    let mut failures = Vec::new();
    let ledger = Ledger::open(&config.runtime_dir).context("opening the runtime directory")?;
    for entry in ledger.entries().context("reading the runtime directory")? {
        // With its namespace, a pod's rules and routes are gone.
        let Some(netns) = still_there(&entry) else { continue };
        let removed = async {
            let routing = Routing::connect(Arc::new(netns))?;
            unguard(&routing).await?;
            anyhow::Ok(routing.remove().await?)
        };
        if let Err(error) = removed.await {
            failures.push(format!("pod {}: {error:#}", entry.uid));
        }
    }
    if let Err(error) = Datapath::uninstall(&config.bpffs) {
        failures.push(error.to_string());
    }
    anyhow::ensure!(
        failures.is_empty(),
        "not everything could be removed: {}",
        failures.join("; ")
    );
    remove_files(config).context("removing files")
}

/// Removes the agent's files, its keys among them. Pod files are its own only in Kubernetes, where
/// the CNI plugin has it write them; elsewhere they are the operator's.
fn remove_files(config: &Config) -> io::Result<()> {
    let socket = config.admin_socket();
    unless_gone(fs::remove_file(&socket))?;
    unless_gone(fs::remove_dir_all(&config.runtime_dir))?;
    if config.kubernetes.is_some() {
        unless_gone(fs::remove_dir_all(&config.pods_dir))?;
        // Where the DaemonSet has both.
        if let Some(parent) = socket.parent() {
            unless_gone(fs::remove_dir(parent))?;
        }
    }
    Ok(())
}

/// Not being there, or not being empty, is no failure.
fn unless_gone(done: io::Result<()>) -> io::Result<()> {
    done.or_else(|error| {
        let harmless = [io::ErrorKind::NotFound, io::ErrorKind::DirectoryNotEmpty];
        if harmless.contains(&error.kind()) { Ok(()) } else { Err(error) }
    })
}

impl Node {
    /// Ends the tunnels for which `gone` is true: at once, or after the connections they carry.
    pub(super) fn end_tunnels(&self, gone: impl Fn(&Key, Proof) -> bool) {
        self.pool.purge(&gone);
        self.sharing.retire(&gone);
    }
}

/// Ends tunnels whose ends are no longer registered as they were.
async fn end_tunnels(mut snapshots: watch::Receiver<Arc<Snapshot>>, node: Arc<Node>) {
    while snapshots.changed().await.is_ok() {
        let snapshot = Arc::clone(&snapshots.borrow_and_update());
        node.end_tunnels(|key, proof| {
            let ends = snapshot.by_uid(&key.client).zip(snapshot.by_address(key.destination.ip()));
            ends.is_none_or(|(own, server)| registration([own, server]) != proof.registration)
        });
    }
}

impl Inspect for View {
    fn programs(&self) -> Vec<Program> {
        let attached = self.node.datapath.programs();
        let name = |(name, attached): (&str, bool)| Program { name: name.to_owned(), attached };
        attached.into_iter().map(name).collect()
    }

    fn pods_synced(&self) -> bool {
        self.synced.load(Ordering::Relaxed)
    }

    fn pods(&self) -> Vec<PodFacts> {
        let pods: Vec<_> = lock(&self.known).pods.values().cloned().collect();
        let attached = self.node.datapath.programs().iter().all(|(_, attached)| *attached);
        pods.iter().map(|pod| self.facts(pod, attached)).collect()
    }

    fn svid(&self, uid: &str) -> Option<watch::Receiver<Option<Arc<Svid>>>> {
        let pod = lock(&self.known).pods.get(uid).cloned()?;
        lock(&pod.svid).as_ref().map(SvidHandle::receiver)
    }
}

impl View {
    /// The UIDs of the enrolled pods; none as long as those that were wanted at the start have not
    /// all been dealt with.
    pub fn enrolled(&self) -> Option<BTreeSet<String>> {
        self.pods_synced().then(|| lock(&self.known).pods.keys().cloned().collect())
    }

    /// What is told to the control plane of the enrolled pods: less than [`Inspect::pods`], and
    /// cheaper. None as long as they are not all known.
    pub fn observed(&self) -> Option<Vec<Observed>> {
        let observed = |pod: &Arc<PodState>| {
            let svid = lock(&pod.svid);
            Observed {
                uid: pod.uid.clone(),
                svid: svid.as_ref().and_then(|svid| svid.current()),
                certificate_problem: svid
                    .as_ref()
                    .and_then(|svid| svid.problem())
                    .map(|problem| problem.message),
                problem: pod.guarded().problem,
            }
        };
        self.pods_synced().then(|| {
            let pods: Vec<_> = lock(&self.known).pods.values().cloned().collect();
            pods.iter().map(observed).collect()
        })
    }

    fn facts(&self, pod: &PodState, attached: bool) -> PodFacts {
        let Guarded { inventory, peers, problem } = pod.guarded();
        let datapath = &self.node.datapath;
        let active = problem.is_none();
        let devices = inventory.devices.into_iter().map(|device| device.name).collect();
        let cgroup =
            datapath.configuration(pod.cookie).is_ok_and(|config| config.is_some()) && attached;
        let mut guard = Vec::new();
        if datapath.features().cgroup_guard {
            let layer = "cgroup".to_owned();
            guard.push(GuardLayer { layer, active: cgroup, devices: Vec::new() });
        }
        guard.push(GuardLayer { layer: "device".to_owned(), active, devices });
        if !peers.is_empty() {
            guard.push(GuardLayer { layer: "peer".to_owned(), active, devices: peers });
        }
        let Counted { drops, datagrams } = datapath.counted(pod.cookie).unwrap_or_default();
        let svid = lock(&pod.svid);
        PodFacts {
            uid: pod.uid.clone(),
            netns: pod.netns.clone(),
            udp: *lock(&pod.udp),
            listening: pod.listening.load(Ordering::Relaxed),
            guard,
            problem,
            datagrams,
            drops: drops
                .into_iter()
                .map(|drop| Drops {
                    layer: drop.layer.name().to_owned(),
                    reason: drop.reason.name().to_owned(),
                    count: drop.count,
                })
                .collect(),
            svid: svid.as_ref().and_then(|svid| svid.current()),
            certificate_problem: svid
                .as_ref()
                .and_then(|svid| svid.problem())
                .map(|problem| problem.message),
            idle_tunnels: self.node.pool.count(|key| *key.client == *pod.uid) as u64,
            shared_tunnels: self.node.sharing.count(|key| *key.client == *pod.uid) as u64,
            repairs: pod.repairs.load(Ordering::Relaxed),
            aborted: pod.aborted.load(Ordering::Relaxed),
        }
    }
}
