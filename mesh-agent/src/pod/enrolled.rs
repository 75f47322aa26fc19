//! One enrolled pod: how it comes under guard, stays there, and is let go.

use std::{
    io::ErrorKind,
    net::IpAddr,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result};
use mesh_common::{
    abi::{Address, MAX_POD_ADDRESSES, POD_DENIES_UDP, POD_HAS_V4, POD_HAS_V6, PodConfig},
    report::Reason,
};
use tokio::{net::TcpListener, sync::Notify, time::Instant};
use tokio_util::{
    sync::CancellationToken,
    task::{AbortOnDropHandle, TaskTracker},
};

use super::{
    abort::abort_connections,
    inventory::{Inventory, host_peers},
    ledger::Entry,
    manager::Node,
    netns::Netns,
    routing::{Changes, Routing},
    settings::Settings,
    sockets::{Facing, PodSockets, port_problem},
    source::PodSpec,
};
use crate::{
    bpf::Datapath,
    config::Udp,
    identity::SvidHandle,
    proxy::{Admission, PodProxy},
    stats::Report,
};

/// A pod that changes its own network without end is looked at this often.
const REPAIR_INTERVAL: Duration = Duration::from_millis(200);

/// A repair that failed is tried again, whether or not anything changes.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// A pod under guard.
pub struct Enrolled {
    /// What it was enrolled as.
    pub spec: PodSpec,
    /// What there is to know about it.
    pub state: Arc<PodState>,
    keeper: Arc<Keeper>,
    proxy: Arc<PodProxy>,
    tasks: Vec<AbortOnDropHandle<()>>,
}

/// What is known of an enrolled pod, shared with whoever asks.
pub struct PodState {
    /// The pod's UID.
    pub uid: String,
    /// Where its network namespace was found.
    pub netns: PathBuf,
    /// The namespace.
    pub cookie: u64,
    /// What happens to its UDP.
    pub udp: Mutex<Udp>,
    /// How often something changed inside the pod was put back.
    pub repairs: AtomicU64,
    /// Connections from before the enrolment that were aborted.
    pub aborted: AtomicU64,
    /// Whether the agent's listeners in the pod are open.
    pub listening: AtomicBool,
    /// Its certificate; none once it is un-enrolled.
    pub svid: Mutex<Option<SvidHandle>>,
    settings: Arc<Settings>,
    guarded: Mutex<Guarded>,
    listener_port: AtomicU64,
    wake: Notify,
}

/// What the guards of a pod are attached to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Guarded {
    /// The pod's addresses and devices.
    pub inventory: Inventory,
    /// The names of the host-side peers.
    pub peers: Vec<String>,
    /// Why they, or what the capture rests on, are not what they should be.
    pub problem: Option<String>,
}

impl PodState {
    /// What the guards are attached to.
    pub fn guarded(&self) -> Guarded {
        lock(&self.guarded).clone()
    }

    /// Whether the pod has an address at present.
    pub fn has_address(&self, address: IpAddr) -> bool {
        lock(&self.guarded).inventory.addresses.contains(&address)
    }

    /// Has the pod's namespace looked at, because something may have changed in it.
    pub fn wake(&self) {
        self.wake.notify_one();
    }

    /// Has it looked at if a setting in it is not what it has to be.
    pub(super) fn check_settings(&self) {
        if !self.settings.hold() {
            self.wake();
        }
    }

    fn config(&self, inventory: &Inventory) -> PodConfig {
        let mut flags = 0;
        for (flag, set) in [
            (POD_DENIES_UDP, *lock(&self.udp) == Udp::Deny),
            (POD_HAS_V4, inventory.source(true).is_some()),
            (POD_HAS_V6, inventory.source(false).is_some()),
        ] {
            flags |= if set { flag } else { 0 };
        }
        let mut config = PodConfig {
            addresses: [[0; 16]; MAX_POD_ADDRESSES],
            address_count: 0,
            flags,
            listener_port: self.listener_port.load(Ordering::Relaxed) as u32,
            reserved: 0,
        };
        for (slot, address) in config.addresses.iter_mut().zip(&inventory.addresses) {
            *slot = octets(*address);
            config.address_count += 1;
        }
        config
    }
}

fn octets(address: IpAddr) -> Address {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing behind these locks is left half done by a panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Enrolled {
    /// Puts a pod under guard and serves it. When this returns, nothing leaves the pod unencrypted
    /// that policy does not allow. If it fails, a pod that was not under guard before is not after.
    pub(super) async fn enrol(node: &Arc<Node>, spec: PodSpec) -> Result<Self> {
        let netns = Arc::new(Netns::open(&spec.netns)?);
        let cookie = netns.cookie();
        let adopted = node.datapath.configuration(cookie)?.is_some();
        let enrolled = Self::guard(node, spec, Arc::clone(&netns)).await;
        if enrolled.is_err() && !adopted {
            let_go(node, cookie, &Routing::connect(netns)?).await.context("undoing it")?;
        }
        enrolled
    }

    async fn guard(node: &Arc<Node>, spec: PodSpec, netns: Arc<Netns>) -> Result<Self> {
        let cookie = netns.cookie();
        let routing = Arc::new(Routing::connect(Arc::clone(&netns))?);
        let state = Arc::new(PodState {
            uid: spec.uid.clone(),
            netns: spec.netns.clone(),
            cookie,
            udp: Mutex::new(spec.udp),
            repairs: AtomicU64::new(0),
            aborted: AtomicU64::new(0),
            listening: AtomicBool::new(false),
            svid: Mutex::new(None),
            settings: Arc::clone(routing.settings()),
            guarded: Mutex::default(),
            listener_port: AtomicU64::new(0),
            wake: Notify::new(),
        });
        let entry = Entry { uid: spec.uid.clone(), netns: spec.netns.clone(), cookie };
        node.ledger.record(&entry).context("noting the pod down in the runtime directory")?;

        // An agent that got as far as this had aborted what was open before the enrolment.
        let was_served = node.datapath.is_steered(cookie);
        let changes = Changes::watch(&netns)?;
        let inventory = routing.inventory().await?;
        node.datapath.configure(cookie, &state.config(&inventory))?;
        guard_devices(node, &netns, &state, &inventory).await?;
        if !was_served {
            match abort_connections(&netns, &inventory.addresses) {
                Ok(aborted) => {
                    state.aborted.store(aborted.into(), Ordering::Relaxed);
                    if aborted > 0 {
                        node.stats.reports().add(&spec.uid, connections_cut(aborted));
                    }
                }
                // The guards drop what they send.
                Err(error) if error.kind() == ErrorKind::Unsupported => tracing::warn!(
                    pod = spec.uid,
                    "the kernel cannot abort connections (CONFIG_INET_DIAG_DESTROY): those that \
                     the pod had open will hang until they time out"
                ),
                Err(error) => return Err(error).context("aborting the pod's open connections"),
            }
        }
        routing.ensure(&inventory).await?;

        let unacknowledged = node.config.timeouts.unacknowledged;
        let sockets =
            PodSockets::new(Arc::clone(&netns), Arc::clone(&node.datapath), unacknowledged);
        let outbound = sockets.listen(Facing::Application).context("listening in the pod")?;
        let inbound = sockets.listen(Facing::Network).context("listening in the pod")?;
        node.datapath.steer(cookie, &*netns, &outbound, &inbound)?;
        let port = outbound.local_addr().context("listening in the pod")?.port();
        state.listener_port.store(port.into(), Ordering::Relaxed);
        node.datapath.configure(cookie, &state.config(&inventory))?;
        state.listening.store(true, Ordering::Relaxed);

        let svid = node.identity.track(&spec.uid);
        let proxy = Arc::new(node.proxy(&spec.uid, sockets, &svid));
        *lock(&state.svid) = Some(svid);
        let keeper = Arc::new(Keeper {
            node: Arc::clone(node),
            netns,
            routing,
            state: Arc::clone(&state),
            repairing: tokio::sync::Mutex::default(),
        });
        keeper.check()?;
        let tasks = tasks(&keeper, &proxy, changes, outbound, inbound);
        if !node.config.encrypt_same_node {
            node.neighbours.insert(&proxy, &state);
        }
        Ok(Self { spec, state, keeper, proxy, tasks })
    }

    /// Whether this is the pod of that specification, in the namespace that is at its path now.
    pub(super) fn is(&self, spec: &PodSpec) -> bool {
        self.spec.uid == spec.uid
            && Netns::open(&spec.netns).is_ok_and(|netns| netns.cookie() == self.state.cookie)
    }

    /// Applies what may change of an enrolled pod. When this returns, as much is true as after
    /// [`Self::enrol`].
    pub(super) async fn update(&mut self, node: &Node, spec: PodSpec) -> Result<()> {
        *lock(&self.state.udp) = spec.udp;
        let inventory = self.state.guarded().inventory;
        node.datapath.configure(self.state.cookie, &self.state.config(&inventory))?;
        self.spec = spec;
        self.keeper.repair().await?;
        self.keeper.check()
    }

    /// Has new connections of the pod's applications refused.
    pub(super) fn refuse(&self, node: &Node) -> Result<()> {
        self.state.listener_port.store(0, Ordering::Relaxed);
        let inventory = self.state.guarded().inventory;
        node.datapath.configure(self.state.cookie, &self.state.config(&inventory))?;
        Ok(())
    }

    /// Closes everything that the agent has in the pod; its connections are reset. The guards stay.
    pub(super) async fn close(self, node: &Node) -> Arc<Routing> {
        let Self { state, proxy, tasks, keeper, spec } = self;
        state.listening.store(false, Ordering::Relaxed);
        node.neighbours.remove(&spec.uid);
        drop(tasks);
        proxy.kill.cancel();
        proxy.tasks.close();
        proxy.tasks.wait().await;
        node.pool.purge(|key, _| *key.client == *spec.uid);
        let svid = lock(&state.svid).take();
        if let Some(svid) = svid {
            svid.forget().await;
        }
        node.stats.forget(&spec.uid);
        Arc::clone(&keeper.routing)
    }

    /// The pod's open connections.
    pub(super) fn tasks(&self) -> &TaskTracker {
        &self.proxy.tasks
    }
}

fn tasks(
    keeper: &Arc<Keeper>,
    proxy: &Arc<PodProxy>,
    changes: Changes,
    outbound: TcpListener,
    inbound: TcpListener,
) -> Vec<AbortOnDropHandle<()>> {
    let mut svid = proxy.svid.clone();
    let (node, uid) = (Arc::clone(&keeper.node), Arc::clone(&proxy.uid));
    let purge = async move {
        while svid.changed().await.is_ok() {
            let generation = svid.borrow_and_update().as_ref().map(|svid| svid.generation);
            node.end_tunnels(|key, proof| {
                key.client == uid && Some(proof.certificate) != generation
            });
        }
    };
    vec![
        AbortOnDropHandle::new(tokio::spawn(Arc::clone(keeper).run(changes))),
        AbortOnDropHandle::new(tokio::spawn(purge)),
        AbortOnDropHandle::new(tokio::spawn(Arc::clone(proxy).revise())),
        AbortOnDropHandle::new(tokio::spawn(Arc::clone(proxy).keep_warm())),
        AbortOnDropHandle::new(tokio::spawn(
            Arc::clone(proxy).serve(outbound, Facing::Application),
        )),
        AbortOnDropHandle::new(tokio::spawn(Arc::clone(proxy).serve(inbound, Facing::Network))),
    ]
}

/// Puts a pod's network back to what it has to be, whenever something changes in it.
struct Keeper {
    node: Arc<Node>,
    netns: Arc<Netns>,
    routing: Arc<Routing>,
    state: Arc<PodState>,
    /// Two repairs at once would attach everything twice.
    repairing: tokio::sync::Mutex<()>,
}

impl Keeper {
    async fn run(self: Arc<Self>, mut changes: Changes) {
        let mut next = Instant::now();
        let mut failed = false;
        loop {
            tokio::select! {
                alive = changes.next() => if !alive {
                    // What changed meanwhile is looked at now.
                    match Changes::watch(&self.netns) {
                        Ok(again) => changes = again,
                        Err(error) => self.report(&error.into()),
                    }
                },
                () = self.state.wake.notified() => {}
                () = tokio::time::sleep(RETRY_INTERVAL), if failed => {}
            }
            tokio::time::sleep_until(next).await;
            next = Instant::now() + REPAIR_INTERVAL;
            let repaired = self.repair().await;
            failed = repaired.is_err();
            if let Err(error) = repaired {
                self.report(&error);
            }
        }
    }

    fn report(&self, error: &anyhow::Error) {
        tracing::warn!(pod = self.state.uid, "cannot keep up the capture: {error:#}");
        lock(&self.state.guarded).problem = Some(format!("{error:#}"));
    }

    async fn repair(&self) -> Result<()> {
        let Self { node, netns, routing, state, repairing } = self;
        let _turn = repairing.lock().await;
        let inventory = routing.inventory().await?;
        if inventory != state.guarded().inventory {
            node.datapath.configure(state.cookie, &state.config(&inventory))?;
        }
        guard_devices(node, netns, state, &inventory).await?;
        let repaired = routing.ensure(&inventory).await?;
        if repaired > 0 {
            state.repairs.fetch_add(repaired.into(), Ordering::Relaxed);
            tracing::warn!(
                pod = state.uid,
                repaired,
                "somebody in the pod had changed its rules, routes or settings: put back"
            );
        }
        Ok(())
    }

    /// Whether that is there which no repair puts back: what all pods of the node share, and the way
    /// to the agent's listeners. Devices and peers have told of their own failures.
    fn check(&self) -> Result<()> {
        let datapath = &self.node.datapath;
        let programs = datapath.programs();
        let missing = programs.iter().find(|(_, attached)| !attached).map(|(name, _)| *name);
        let steered = datapath.is_steered(self.state.cookie);
        let missing = missing.or((!steered).then_some("steer"));
        missing.map_or(Ok(()), |name| {
            anyhow::bail!("the program {name} is not attached any more: restart the mesh-agent")
        })
    }
}

fn connections_cut(aborted: u32) -> Report {
    let text = format!("{aborted} connection(s) from before it came into the mesh were cut");
    Report { reason: Reason::ConnectionsCut, text, peer: None }
}

/// Attaches the second and the third guard to whatever the pod has for devices now.
async fn guard_devices(
    node: &Node,
    netns: &Netns,
    state: &PodState,
    inventory: &Inventory,
) -> Result<()> {
    let cookie = state.cookie;
    let peers = host_peers(netns, inventory).await?;
    netns
        .try_run(|| node.datapath.guard_devices(cookie, &inventory.devices))
        .context("entering the pod's network namespace")??;
    node.datapath.guard_peers(cookie, &peers)?;
    let peers = peers.into_iter().map(|peer| peer.name).collect();
    let problem = port_problem(&state.settings.port_range());
    *lock(&state.guarded) = Guarded { inventory: inventory.clone(), peers, problem };
    Ok(())
}

/// Takes from a pod everything that was done to it. While marks still lead to loopback nothing can
/// leave, so the guards go first and what the capture rests on goes last.
pub(super) async fn let_go(node: &Node, cookie: u64, routing: &Routing) -> Result<()> {
    if !node.datapath.features().tcx {
        unguard(routing).await?;
    }
    node.datapath.release(cookie)?;
    routing.remove().await?;
    node.ledger.strike(cookie).context("striking the pod out of the runtime directory")?;
    Ok(())
}

/// Takes classic tc filters from the pod's devices: the third guard before the second, whose stamp
/// it wants.
pub(super) async fn unguard(routing: &Routing) -> Result<()> {
    let inventory = routing.inventory().await?;
    let netns = routing.netns();
    Datapath::unguard_peers(&host_peers(netns, &inventory).await?)?;
    netns
        .try_run(|| Datapath::unguard_devices(&inventory.devices))
        .context("entering the pod's network namespace")??;
    Ok(())
}

/// What a pod's connections need besides the pod.
impl Node {
    fn proxy(&self, uid: &str, sockets: PodSockets, svid: &SvidHandle) -> PodProxy {
        let turns = self.config.limits.handshakes_per_pod.get() as usize;
        PodProxy {
            uid: uid.into(),
            sockets,
            svid: svid.receiver(),
            registry: self.identity.snapshots(),
            policy: Arc::clone(&self.policy),
            balancer: Arc::clone(&self.balancer),
            habits: Arc::clone(&self.habits),
            neighbours: Arc::clone(&self.neighbours),
            stats: self.stats.pod(uid),
            warned: Mutex::new(None),
            pool: self.pool.clone(),
            sharing: self.sharing.clone(),
            growth: self.growth.clone(),
            leaving: Admission::new(turns),
            arriving: Admission::new(turns),
            accepted: 2 * self.config.limits.connections_per_pod.get() as usize,
            encryption: self.encryption,
            timeouts: self.config.timeouts,
            drain: self.drain.clone(),
            kill: CancellationToken::new(),
            tasks: TaskTracker::new(),
        }
    }
}
