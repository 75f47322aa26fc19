//! The agent as a whole: what starts in which order, and how it ends.

use std::{sync::Arc, time::SystemTime};

use anyhow::{Context as _, Result};
use mesh_common::ending::Ending;
use tokio::{
    runtime::Handle,
    sync::{mpsc, watch},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use crate::{
    admin::{Admin, Server},
    balance::Balancer,
    bpf::Datapath,
    config::Config,
    identity::{self, Identity},
    kubernetes::{Controller, Unguarded},
    logging, node,
    observer::Observer,
    pod::{
        ledger::Ledger,
        manager::{self, Manager, Node},
        source::{PodSource as _, directory::DirectorySource},
    },
    stats::Stats,
    sys::socket::netns_cookie_here,
    tls::{self, Encryption},
    tunnel::{Pool, PoolLimits, Sharing, shared::Growth},
};

/// Idle tunnels of the whole node: two descriptors of a million each.
const IDLE_TUNNELS: usize = 16_384;

/// Events of the pod source that wait for the manager.
const QUEUE: usize = 64;

/// A worker with work asks the kernel for more after so many tasks. tokio's 61 of bulk, a quarter of a
/// megabyte each, let a request wait for 50 ms.
const EVENT_INTERVAL: u32 = 4;

/// Runs the agent until it is told to end.
///
/// # Errors
///
/// What keeps it from starting, or from going on. The pods stay under guard.
pub fn run(config: Config) -> Result<()> {
    let problems = logging::init(&config.log).context("starting the log")?;
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    if let Some(workers) = config.workers {
        runtime.worker_threads(workers.get());
    }
    runtime.event_interval(EVENT_INTERVAL);
    runtime.enable_all().build().context("starting the runtime")?.block_on(async {
        let files = node::raise_file_limit()?;
        node::make_settings_writable()?;
        let api = match &config.kubernetes {
            Some(_) => Some(kube::Client::try_default().await.context(
                "finding the API server of Kubernetes: does the pod have its service account's \
                 token (automountServiceAccountToken)?",
            )?),
            None => None,
        };
        let server = Server::bind(&config.admin_socket(), config.http_listen).await?;
        let cgroup = config.cgroup.clone().map_or_else(node::cgroup2_root, Ok)?;
        let host = config.ingress.host_probes.then(netns_cookie_here).transpose();
        let host = host.context("asking for the agent's own network namespace")?;
        let (datapath, events) = Datapath::open(&config.bpffs, &cgroup, host)?;
        tracing::info!(
            node = config.node,
            files,
            cgroup = %cgroup.display(),
            pins = %datapath.pin_directory().display(),
            "the eBPF programs are attached"
        );
        let (encryption, kernel_tls) = match config.kernel_tls.then(tls::kernel::probe) {
            None => (Encryption::InProcess, "off".to_owned()),
            Some(Ok(())) => (Encryption::InKernel, "in use".to_owned()),
            Some(Err(why)) => (Encryption::InProcess, format!("not in use: {why}")),
        };
        let (state, state_seen) = watch::channel(None);
        let identity = Identity::start(identity::Config {
            node: config.node.clone(),
            control_plane: config.control_plane.iter().map(ToString::to_string).collect(),
            credential: config.credential(),
            runtime_dir: config.runtime_dir.clone(),
            state: state_seen,
        })?;
        let (source, pods) = DirectorySource::new(config.pods_dir.clone(), config.udp);
        let files = pods.clone();
        let node = Arc::new(Node {
            policy: Arc::new(config.policy()),
            balancer: Arc::new(Balancer::new(&config.node)),
            habits: Arc::default(),
            neighbours: Arc::default(),
            datapath: Arc::new(datapath),
            stats: Arc::new(Stats::new(config.limits.connections_per_pod.get() as usize)),
            pool: Pool::new(PoolLimits {
                per_key: config.limits.idle_tunnels_per_peer as usize,
                total: IDLE_TUNNELS,
                idle: config.timeouts.idle_tunnel,
            }),
            sharing: Sharing::new(Handle::current().metrics().num_workers()),
            growth: Growth::default(),
            encryption,
            ledger: Ledger::open(&config.runtime_dir).context("opening the runtime directory")?,
            drain: CancellationToken::new(),
            unreadable_pods: Box::new(move || !files.problems().is_empty()),
            identity,
            config,
        });
        let manager = Manager::new(Arc::clone(&node));
        let (unguarded, unguarded_seen) = watch::channel(Unguarded::new());
        let controller = api.zip(node.config.kubernetes.as_ref()).map(|(client, kubernetes)| {
            let view = manager.view();
            let controller = Controller::new(
                node.config.node.clone(),
                kubernetes.namespace.clone(),
                client,
                node.identity.snapshots(),
                pods.clone(),
                move || view.enrolled(),
                unguarded,
            );
            AbortOnDropHandle::new(tokio::spawn(controller.run()))
        });
        let view = manager.view();
        let observer = Observer {
            pods: Box::new(move || view.observed()),
            unguarded: unguarded_seen.clone(),
            reports: Arc::clone(node.stats.reports()),
            state,
        };
        let _observer = AbortOnDropHandle::new(tokio::spawn(observer.run()));
        let _reporting = node.identity.report(Arc::clone(node.stats.reports()));
        let admin = Arc::new(Admin {
            node: node.config.node.clone(),
            started: SystemTime::now(),
            kernel_tls,
            identity: node.identity.status(),
            counters: node.identity.counters(),
            snapshots: node.identity.snapshots(),
            stats: Arc::clone(&node.stats),
            problems,
            pods,
            unguarded: unguarded_seen,
            inspect: manager.view(),
        });
        let (sender, receiver) = mpsc::channel(QUEUE);
        let end = CancellationToken::new();
        let ended = end.clone();
        let mut ending = Ending::listen().context("waiting for signals")?;
        tokio::spawn(async move {
            ending.told().await;
            tracing::info!("draining: no new connections");
            ended.cancel();
        });
        let _controller = controller;
        tokio::select! {
            managed = manager.run(receiver, events, end) => managed,
            served = server.serve(admin) => served.context("serving the operator"),
            ended = source.run(sender) => ended.context("watching the pod files"),
        }
    })
}

/// Removes everything that the agent ever made on this node.
///
/// # Errors
///
/// When an agent is running, or something cannot be removed.
pub fn uninstall(config: Config) -> Result<()> {
    node::make_settings_writable()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        // Fails if an agent answers there.
        drop(Server::bind(&config.admin_socket(), config.http_listen).await?);
        manager::uninstall(&config).await?;
        println!("removed every program, map, rule and route of nodemesh from this node");
        Ok(())
    })
}
