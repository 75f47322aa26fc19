//! What a large cluster costs: a simulated measurement, see `docs/scale.md`.
//!
//! The control plane is the real one, fed by an API server that is not there. Most agents are
//! subscribers in its process; some connect over TLS from another process; one is the real
//! identity subsystem of an agent, in a third.
#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "it ends where it fails")]

mod agents;
mod cluster;

use std::{
    path::Path,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use clap::{Parser, Subcommand};
use mesh_control::{
    config::{Config, Kubernetes},
    control::Control,
    feed::Feed,
    kubernetes::{self, attest::Attestor, cluster::Cluster as Watched, events::Events},
    server,
    snapshot::Snapshot,
};
use nix::sys::resource::{UsageWho, getrusage};
use prost::Message as _;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader, Lines},
    net::TcpListener,
    process::{Child, ChildStdout, Command},
    sync::watch,
    time::sleep,
};
use tokio_util::sync::CancellationToken;

use self::cluster::Cluster;

#[derive(Debug, Parser)]
#[command(about = "Measures what a large cluster costs, without having one")]
struct Arguments {
    #[command(subcommand)]
    role: Option<Role>,
    #[command(flatten)]
    size: Size,
    /// Changes of pods in a second.
    #[arg(long, default_value_t = 50)]
    changes: u32,
    /// How long each measurement takes. In seconds.
    #[arg(long, default_value_t = 20)]
    seconds: u64,
    /// How many agents connect over TLS. The others are simulated in the process.
    #[arg(long, default_value_t = 100)]
    streams: usize,
    /// Cargo says so.
    #[arg(long, hide = true)]
    bench: bool,
}

/// How large the cluster is.
#[derive(Clone, Copy, Debug, clap::Args)]
struct Size {
    #[arg(long, default_value_t = 5_000)]
    nodes: usize,
    #[arg(long, default_value_t = 150_000)]
    pods: usize,
    #[arg(long, default_value_t = 10_000)]
    services: usize,
}

/// What the other processes are.
#[derive(Debug, Subcommand)]
enum Role {
    #[command(hide = true)]
    Agent(agents::Where),
    #[command(hide = true)]
    Streams(agents::Where),
}

/// After so long all have what is present.
const SETTLED: Duration = Duration::from_secs(2);

fn main() {
    let arguments = Arguments::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    match arguments.role {
        Some(Role::Agent(at)) => runtime.block_on(agents::one(&at)),
        Some(Role::Streams(at)) => runtime.block_on(agents::many(&at)),
        None => runtime.block_on(measure(&arguments)),
    }
}

/// What this process has used.
#[derive(Clone, Copy, Debug)]
struct Usage {
    /// In MiB.
    rss: f64,
    peak: f64,
    cpu: Duration,
    at: Instant,
}

impl Usage {
    fn now() -> Self {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let mib = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
            line.trim().trim_end_matches(" kB").parse::<f64>().unwrap() / 1024.0
        };
        let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
        let time = |time: nix::sys::time::TimeVal| {
            Duration::new(time.tv_sec() as u64, time.tv_usec() as u32 * 1000)
        };
        let cpu = time(usage.user_time()) + time(usage.system_time());
        Self { rss: mib("VmRSS:"), peak: mib("VmHWM:"), cpu, at: Instant::now() }
    }

    /// CPU time since then.
    fn cpu_since(&self, before: &Self) -> f64 {
        (self.cpu - before.cpu).as_secs_f64()
    }
}

/// What the simulated agents were sent.
#[derive(Debug, Default)]
struct Sent {
    messages: AtomicU64,
    bytes: AtomicU64,
    wholes: AtomicU64,
}

async fn measure(arguments: &Arguments) {
    let size = arguments.size;
    println!("{size:?}, {} changes of pods/s", arguments.changes);
    let cluster = Cluster::new(size);
    let dir = tempfile::tempdir().unwrap();
    let start = Usage::now();

    let config = dir.path().join("config.yaml");
    let state = dir.path().join("state");
    let text =
        format!("trust_domain: mesh.example\nkubernetes: {{}}\nstate_dir: {}\n", state.display());
    std::fs::write(&config, text).unwrap();
    let config = Config::load(&config).unwrap();
    let control = Arc::new(Control::open(config, SystemTime::now()).unwrap());
    let watched = Arc::new(Watched::watch(&cluster.client(), "nodemesh-system".to_owned()));
    watched.ready().await.unwrap();
    let listed = Usage::now();
    println!(
        "control plane: everything listed in {} pages: {:.0} MiB (with what makes up the cluster; \
         {:.0} MiB before)",
        cluster.pages.load(Ordering::Relaxed),
        listed.rss,
        start.rss
    );
    kubernetes::update(&control, &watched).await;
    let taken = Usage::now();
    println!(
        "control plane: first snapshot: {:.0} MiB, {:.2} s of CPU",
        taken.rss,
        taken.cpu_since(&listed)
    );
    kubernetes::update(&control, &watched).await;
    let again = Usage::now();
    println!(
        "control plane: looking for changes: {:.0} MiB, {:.3} s of CPU",
        again.rss,
        again.cpu_since(&taken)
    );
    let present = Arc::clone(&control.publisher().subscribe().borrow());
    let parts = present.whole();
    let encoded = Usage::now();
    println!(
        "whole snapshot: {:.1} MiB in {} parts, encoded in {:.3} s of CPU",
        mib(parts.iter().map(|part| part.as_ref().len()).sum::<usize>() as u64),
        parts.len(),
        encoded.cpu_since(&again)
    );
    drop((present, parts));

    tokio::spawn(kubernetes::follow(Arc::clone(&control), Arc::clone(&watched)));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let attestor = Attestor::new(cluster.client(), Kubernetes::default());
    let events = Events::start(cluster.client(), Arc::clone(&watched), Arc::clone(&control));
    let doors = Some((attestor, events));
    tokio::spawn(server::serve(Arc::clone(&control), doors, listener, CancellationToken::new()));
    let roots = dir.path().join("roots.pem");
    let root = pem::Pem::new("CERTIFICATE", control.authority().root().to_vec());
    std::fs::write(&roots, pem::encode(&root)).unwrap();
    let changing = tokio::spawn(churn(Arc::clone(&cluster), arguments.changes));

    let window = Duration::from_secs(arguments.seconds);
    let alone = observe("nobody listens", &control, window, None).await;
    let sent = Arc::new(Sent::default());
    for _ in 0..size.nodes {
        let snapshots = control.publisher().subscribe();
        tokio::spawn(subscriber(snapshots, Arc::clone(&sent)));
    }
    let many = observe("simulated agents", &control, window, Some(&sent)).await;
    println!(
        "  each message to a simulated agent: {:.1} us of CPU",
        (many.0 - alone.0) / many.1 as f64 * 1e6
    );

    let mut agent = child("agent", address.port(), &roots, dir.path(), 1, arguments.seconds);
    while let Some(line) = agent.1.next_line().await.unwrap() {
        println!("agent: {line}");
    }
    agent.0.wait().await.unwrap();

    // What these agents cost is told apart from what the changes cost.
    changing.abort();
    sleep(SETTLED).await;
    let before = Usage::now();
    let count = arguments.streams;
    let mut streams = child("streams", address.port(), &roots, dir.path(), count, 1_000_000);
    println!("agents over TLS: {}", streams.1.next_line().await.unwrap().unwrap());
    let connected = Usage::now();
    println!(
        "  control plane: {:.2} s of CPU, {:.0} MiB, at most {:.0} MiB so far",
        connected.cpu_since(&before),
        connected.rss,
        connected.peak
    );
    tokio::spawn(churn(Arc::clone(&cluster), arguments.changes));
    observe("the same, and agents over TLS", &control, window, Some(&sent)).await;
    streams.0.kill().await.unwrap();
    println!(
        "API server: {} watches were opened, whatever the number of agents",
        cluster.watches.load(Ordering::Relaxed)
    );
}

/// Watches for a while. CPU time, and messages to simulated agents.
async fn observe(
    what: &str,
    control: &Control,
    window: Duration,
    sent: Option<&Sent>,
) -> (f64, u64) {
    sleep(SETTLED).await;
    let mut snapshots = control.publisher().subscribe();
    let count = |counter: fn(&Sent) -> &AtomicU64| {
        sent.map_or(0, |sent| counter(sent).load(Ordering::Relaxed))
    };
    let all = || [count(|s| &s.messages), count(|s| &s.bytes), count(|s| &s.wholes)];
    let (before, sent_before) = (Usage::now(), all());
    let mut versions = 0;
    while before.at.elapsed() < window {
        let left = window.saturating_sub(before.at.elapsed());
        if tokio::time::timeout(left, snapshots.changed()).await.is_ok() {
            drop(snapshots.borrow_and_update());
            versions += 1;
        }
    }
    let (after, sent_after) = (Usage::now(), all());
    let seconds = (after.at - before.at).as_secs_f64();
    let [messages, bytes, wholes] = [0, 1, 2].map(|i| sent_after[i] - sent_before[i]);
    println!(
        "{what}: {:.2} CPUs, {:.0} MiB, {:.1} versions/s, {:.0} messages/s, {:.1} MiB/s, {wholes} \
         whole",
        after.cpu_since(&before) / seconds,
        after.rss,
        versions as f64 / seconds,
        messages as f64 / seconds,
        mib(bytes) / seconds,
    );
    (after.cpu_since(&before), messages)
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

async fn churn(cluster: Arc<Cluster>, changes: u32) {
    // To replace a pod is three changes: one goes, one comes, it gets its address.
    let mut ticks = tokio::time::interval(Duration::from_secs(3) / changes.max(1));
    let mut coming = std::collections::VecDeque::new();
    loop {
        ticks.tick().await;
        let place = cluster.any();
        cluster.change(place);
        coming.push_back(place);
        // It takes a second until a pod has its address.
        if coming.len() > changes as usize / 3 {
            coming.pop_front().into_iter().for_each(|place| cluster.change(place));
        }
    }
}

/// What a session does, but for the connection.
async fn subscriber(mut snapshots: watch::Receiver<Arc<Snapshot>>, sent: Arc<Sent>) {
    let mut feed = Feed::new(true);
    feed.sent(snapshots.borrow().version(), false);
    loop {
        let Ok(present) = snapshots.wait_for(|present| feed.wants(present.version())).await else {
            return;
        };
        let snapshot = Arc::clone(&present);
        drop(present);
        let difference = feed.base().and_then(|base| snapshot.since(base));
        feed.sent(snapshot.version(), difference.is_some());
        let Some(parts) = difference else {
            sent.wholes.fetch_add(1, Ordering::Relaxed);
            continue;
        };
        for part in &*parts {
            let mut buffer = bytes::BytesMut::new();
            part.encode(&mut buffer).unwrap();
            sent.messages.fetch_add(1, Ordering::Relaxed);
            sent.bytes.fetch_add(buffer.len() as u64, Ordering::Relaxed);
        }
    }
}

/// Starts this program as another process.
fn child(
    role: &str,
    port: u16,
    roots: &Path,
    dir: &Path,
    count: usize,
    seconds: u64,
) -> (Child, Lines<BufReader<ChildStdout>>) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([role, "--port", &port.to_string(), "--count", &count.to_string()])
        .args(["--seconds", &seconds.to_string()])
        .args(["--roots".as_ref(), roots.as_os_str(), "--dir".as_ref(), dir.as_os_str()])
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    (child, lines)
}
