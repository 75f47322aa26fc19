//! The server: puts the parts together and ends them in order.

use std::{
    os::unix::fs::OpenOptionsExt as _,
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::Context as _;
use mesh_common::ending::Ending;
use nix::{
    fcntl::{Flock, FlockArg},
    sys::resource::{Resource, getrlimit, setrlimit},
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{
    admin,
    config::Config,
    control::Control,
    files, http,
    kubernetes::{self, attest::Attestor, cluster::Cluster, events::Events, secret::CaSecret},
    server, watch,
};

/// How long calls in flight may take to end.
const DRAIN: Duration = Duration::from_secs(5);

/// Renewals are looked at this often at least: the clock may have been set.
const MAINTENANCE: Duration = Duration::from_secs(60);

/// How soon a failed renewal is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// Runs the server until SIGTERM or SIGINT.
///
/// # Errors
///
/// What keeps it from starting, or made it end.
pub async fn run(mut config: Config) -> anyhow::Result<()> {
    files::private_dir(&config.state_dir)
        .with_context(|| format!("state_dir {}", config.state_dir.display()))?;
    let _lock = lock(&config)?;
    raise_file_limit();
    let now = SystemTime::now();
    let api = match config.kubernetes.clone() {
        Some(kubernetes) => {
            let client = kube::Client::try_default().await.context("finding the API server")?;
            Some((client, kubernetes))
        }
        None => None,
    };
    let ca = api
        .clone()
        .filter(|_| config.ca.is_none())
        .map(|(client, kubernetes)| CaSecret::new(client, kubernetes, config.clone()));
    if let Some(ca) = &ca {
        config = ca.install(now).await?;
    }
    let control = Arc::new(Control::open(config, now)?);
    let config = control.config();
    let shutdown = CancellationToken::new();
    stop_on_signal(shutdown.clone())?;

    let http_listener = TcpListener::bind(config.http_listen)
        .await
        .with_context(|| format!("listening on {} (`http_listen`)", config.http_listen))?;
    let admin_listener = admin::bind(&config.admin_socket)
        .await
        .with_context(|| format!("admin_socket {}", config.admin_socket.display()))?;

    let reloading = Arc::clone(&control);
    let dirs = config.watched_dirs().to_vec();
    tokio::spawn(watch::watch(dirs, move || reloading.reload()));
    tokio::spawn(maintain(Arc::clone(&control)));
    let cluster = api
        .as_ref()
        .map(|(client, kubernetes)| Arc::new(Cluster::watch(client, kubernetes.namespace.clone())));
    let admin =
        admin::serve(Arc::clone(&control), cluster.clone(), admin_listener, shutdown.clone());
    let admin = tokio::spawn(admin);
    let http = tokio::spawn(http::serve(Arc::clone(&control), http_listener, shutdown.clone()));
    let mut doors = None;
    if let Some(((client, kubernetes), cluster)) = api.zip(cluster) {
        tokio::select! {
            ready = cluster.ready() => ready.context("watching the API server")?,
            () = shutdown.cancelled() => return Ok(()),
        }
        kubernetes::update(&control, &cluster).await;
        tokio::spawn(kubernetes::follow(Arc::clone(&control), Arc::clone(&cluster)));
        if let Some(ca) = ca {
            let control = Arc::clone(&control);
            tokio::spawn(async move { ca.follow(&control).await });
        }
        let publish = kubernetes::publish_roots;
        tokio::spawn(publish(client.clone(), kubernetes.clone(), Arc::clone(&control)));
        let events = Events::start(client.clone(), cluster, Arc::clone(&control));
        doors = Some((Attestor::new(client, kubernetes), events));
    }
    // Not before: an agent that is refused a connection goes to another replica.
    let listener = TcpListener::bind(config.listen)
        .await
        .with_context(|| format!("listening on {} (`listen`)", config.listen))?;
    let serve = server::serve(Arc::clone(&control), doors, listener, shutdown.clone());
    let agents = tokio::spawn(serve);
    tracing::info!(
        trust_domain = %config.trust_domain,
        listen = %config.listen,
        root = %mesh_common::svid::Fingerprint::of(control.authority().root()),
        version = env!("CARGO_PKG_VERSION"),
        "serving"
    );

    tokio::select! {
        result = agents => result?.context("serving agents")?,
        result = admin => result?.context("serving the admin socket")?,
        result = http => result?.context("serving HTTP")?,
        () = drained(&shutdown) => tracing::warn!("calls in flight were cut off"),
    }
    tracing::info!("stopped");
    Ok(())
}

/// Two servers on one state directory would use one token twice.
fn lock(config: &Config) -> anyhow::Result<Flock<std::fs::File>> {
    let path = config.state_dir.join("lock");
    let file = std::fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .with_context(|| path.display().to_string())?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| {
        anyhow::anyhow!("{}: another mesh-control is running here ({error})", path.display())
    })
}

/// Each agent is a file; the usual soft limit, 1024, is for programs that use `select()`.
fn raise_file_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_soft, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}

fn stop_on_signal(shutdown: CancellationToken) -> anyhow::Result<()> {
    let mut ending = Ending::listen()?;
    tokio::spawn(async move {
        ending.told().await;
        tracing::info!("stopping");
        shutdown.cancel();
    });
    Ok(())
}

async fn drained(shutdown: &CancellationToken) {
    shutdown.cancelled().await;
    tokio::time::sleep(DRAIN).await;
}

async fn maintain(control: Arc<Control>) {
    loop {
        let work = Arc::clone(&control);
        let due = tokio::task::spawn_blocking(move || work.maintain(SystemTime::now())).await;
        let wait = due.map_or(RETRY, |due| {
            due.duration_since(SystemTime::now()).unwrap_or(RETRY).min(MAINTENANCE)
        });
        tokio::time::sleep(wait).await;
    }
}
