//! The controller with a scripted API server and a scripted node, and the look at a real one.

use std::{
    fs,
    path::Path,
    process::{Child, Command},
    sync::Mutex,
};

use kube::Client;
use mesh_common::api;
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{sync::mpsc, time::timeout};

use super::{
    processes::{Pin, Process},
    scripted::scripted,
    *,
};
use crate::{
    config::Udp,
    node::cgroup2_root,
    pod::source::{
        PodEvent, PodSource as _, Removal,
        directory::{DirectorySource, PodDirectory},
    },
};

const NODE: &str = "n1";
const UID: &str = "0b9c5d0e-6a0f-4a54-9e0c-3f8f3c1f7a11";

/// Longer than anything here takes, on the clock of the test.
const PATIENCE: Duration = Duration::from_secs(3600);

/// A network namespace mounted at a path, until dropped. Needs root.
struct Mounted(PathBuf);

impl Mounted {
    fn new(path: PathBuf) -> Self {
        fs::write(&path, "").unwrap();
        let target = path.clone();
        in_thread(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root");
            bind(Path::new("/proc/thread-self/ns/net"), &target);
        });
        Self(path)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        umount2(&self.0, MntFlags::MNT_DETACH).unwrap();
    }
}

fn bind(from: &Path, to: &Path) {
    mount(Some(from), to, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
}

/// On a thread of its own, which takes what it unshares with it.
fn in_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    std::thread::spawn(work).join().unwrap()
}

/// What the API server says of the only pod: its namespace has these labels.
type Answer = Arc<Mutex<(u16, Value)>>;

struct Bench {
    snapshots: watch::Sender<Arc<Snapshot>>,
    scene: Arc<Mutex<Scene>>,
    enrolled: Arc<Mutex<Option<BTreeSet<String>>>>,
    unguarded: watch::Receiver<Unguarded>,
    namespace: Answer,
    /// How often the API server was asked for the pod.
    asked: Arc<Mutex<u32>>,
    pods: PodDirectory,
    events: mpsc::Receiver<PodEvent>,
    netns: Mounted,
    _root: TempDir,
}

impl Bench {
    /// A node on which nothing runs and nobody is enrolled.
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let netns = Mounted::new(root.path().join("cni-1"));
        let (source, pods) = DirectorySource::new(root.path().join("pods"), Udp::Allow);
        let (sender, events) = mpsc::channel(16);
        tokio::spawn(source.run(sender));
        let (snapshots, seen) = watch::channel(Arc::default());
        let (unguarded_sender, unguarded) = watch::channel(Unguarded::new());
        let scene = Arc::new(Mutex::new(Scene::default()));
        let enrolled = Arc::new(Mutex::new(Some(BTreeSet::new())));
        let namespace = Arc::new(Mutex::new((200, json!({"nodemesh.io/mesh": "enabled"}))));
        let asked = Arc::new(Mutex::new(0));
        let client = api_server(&namespace, &asked);
        let [node, own] = [NODE, "nodemesh-system"].map(str::to_owned);
        let look = Arc::clone(&enrolled);
        let look = move || look.lock().unwrap().clone();
        let mut controller =
            Controller::new(node, own, client, seen, pods.clone(), look, unguarded_sender);
        let look = Arc::clone(&scene);
        controller.look_around = Arc::new(move || Ok(look.lock().unwrap().clone()));
        tokio::spawn(controller.run());
        Self {
            snapshots,
            scene,
            enrolled,
            unguarded,
            namespace,
            asked,
            pods,
            events,
            netns,
            _root: root,
        }
    }

    /// The control plane registers these pods, each with its node and addresses.
    fn register(&self, workloads: &[(&str, &str, &[&str])]) {
        let version = self.snapshots.borrow().version() + 1;
        self.snapshots.send_replace(Arc::new(registry(version, workloads)));
    }

    /// A process of the pod runs in its namespace.
    fn start(&self) {
        let pods = BTreeSet::from([UID.to_owned()]);
        *self.scene.lock().unwrap() = Scene {
            processes: vec![Process { pods, netns: 7 }],
            pins: vec![Pin { netns: 7, path: self.netns.0.clone() }],
            host: 1,
        };
    }

    /// Does what the source wants next, as the manager would.
    async fn manage(&mut self) -> String {
        loop {
            let event = timeout(PATIENCE, self.events.recv()).await.expect("nothing is wanted");
            let mut enrolled = self.enrolled.lock().unwrap();
            let pods = enrolled.get_or_insert_default();
            match event.unwrap() {
                PodEvent::Synced => {}
                PodEvent::Upsert(spec, ack) => {
                    pods.insert(spec.uid.clone());
                    ack.answer(Ok(()));
                    assert_eq!(spec.netns, self.netns.0);
                    return format!("enrol {}", spec.uid);
                }
                PodEvent::Remove { uid, cause, ack } => {
                    assert_eq!(cause, Removal::Withdrawn);
                    pods.remove(&uid);
                    ack.answer(Ok(()));
                    return format!("let go {uid}");
                }
            }
        }
    }

    /// Nothing is wanted for a long time.
    async fn expect_quiet(&mut self) {
        let quiet = timeout(PATIENCE, async {
            loop {
                match self.events.recv().await {
                    Some(PodEvent::Synced) => {}
                    other => return other,
                }
            }
        });
        assert!(quiet.await.is_err(), "something is wanted");
    }

    async fn problem(&mut self) -> Option<String> {
        tokio::time::sleep(Duration::from_secs(60)).await;
        self.unguarded.borrow().get(UID).map(|pod| format!("{}: {}", pod.name, pod.problem))
    }

    fn asked(&self) -> u32 {
        *self.asked.lock().unwrap()
    }
}

fn api_server(namespace: &Answer, asked: &Arc<Mutex<u32>>) -> Client {
    let (namespace, asked) = (Arc::clone(namespace), Arc::clone(asked));
    scripted(move |_, path| {
        let (code, labels) = namespace.lock().unwrap().clone();
        if code != 200 {
            let reason = if code == 404 { "NotFound" } else { "Forbidden" };
            return (code, json!({"status": "Failure", "code": code, "reason": reason}));
        }
        if path.ends_with("/pods/cart-0") {
            *asked.lock().unwrap() += 1;
            (200, json!({"metadata": {"name": "cart-0", "uid": UID}}))
        } else {
            (200, json!({"metadata": {"name": "shop", "labels": labels}}))
        }
    })
}

fn registry(version: u64, workloads: &[(&str, &str, &[&str])]) -> Snapshot {
    let mut root = rcgen::CertificateParams::default();
    root.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    root.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
    let root = root.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap();
    let [namespace, service_account, name] = ["shop", "cart", "cart-0"].map(str::to_owned);
    let workload = |(uid, node, addresses): &(&str, &str, &[&str])| api::Workload {
        uid: (*uid).to_owned(),
        name: name.clone(),
        namespace: namespace.clone(),
        service_account: service_account.clone(),
        node: (*node).to_owned(),
        addresses: addresses.iter().map(|&address| address.to_owned()).collect(),
        owner: String::new(),
    };
    let roots = vec![root.der().to_vec()];
    let snapshot = api::Snapshot {
        version,
        bundle: Some(api::TrustBundle { trust_domain: "td".to_owned(), roots }),
        workloads: workloads.iter().map(workload).collect(),
        settings: Some(api::Settings { svid_lifetime_seconds: 14_400 }),
        ..Default::default()
    };
    snapshot.try_into().unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_ran_before_is_enrolled_after_the_plugin_had_its_time() {
    let mut bench = Bench::new();
    bench.start();
    let begun = Instant::now();
    bench.register(&[(UID, NODE, &["10.1.0.1"])]);
    assert_eq!(bench.manage().await, format!("enrol {UID}"));
    assert!(begun.elapsed() >= Duration::from_secs(5), "{:?}", begun.elapsed());
    bench.expect_quiet().await;
    assert_eq!(bench.problem().await, None);
}

#[tokio::test(start_paused = true)]
async fn a_pod_of_another_node_or_one_that_is_enrolled_is_left_alone() {
    let mut bench = Bench::new();
    bench.start();
    bench.register(&[(UID, "n2", &["10.1.0.1"])]);
    bench.expect_quiet().await;
    *bench.enrolled.lock().unwrap() = Some([UID.to_owned()].into());
    bench.register(&[(UID, NODE, &["10.1.0.1"])]);
    bench.expect_quiet().await;
    assert_eq!(bench.asked(), 0);
    // The twin: were it not.
    *bench.enrolled.lock().unwrap() = Some(BTreeSet::new());
    assert_eq!(bench.manage().await, format!("enrol {UID}"));
}

#[tokio::test(start_paused = true)]
async fn as_long_as_the_enrolled_pods_are_not_known_none_is_missing() {
    let mut bench = Bench::new();
    bench.start();
    *bench.enrolled.lock().unwrap() = None;
    bench.register(&[(UID, NODE, &["10.1.0.1"])]);
    bench.expect_quiet().await;
    *bench.enrolled.lock().unwrap() = Some(BTreeSet::new());
    assert_eq!(bench.manage().await, format!("enrol {UID}"));
}

#[tokio::test(start_paused = true)]
async fn what_is_in_doubt_is_said_and_looked_at_again() {
    let mut bench = Bench::new();
    bench.register(&[(UID, NODE, &[])]);
    assert_eq!(bench.problem().await, None, "it has not started yet");
    bench.register(&[(UID, NODE, &["10.1.0.1"])]);
    let problem = bench.problem().await.unwrap();
    assert!(problem.contains("shop/cart-0") && problem.contains("no process"), "{problem}");
    bench.start();
    bench.scene.lock().unwrap().host = 7;
    let problem = bench.problem().await.unwrap();
    assert!(problem.contains("node's own"), "{problem}");
    bench.start();
    assert_eq!(bench.manage().await, format!("enrol {UID}"));
    assert_eq!(bench.problem().await, None);
}

#[tokio::test(start_paused = true)]
async fn only_who_was_taken_out_is_let_go() {
    let mut bench = Bench::new();
    bench.start();
    bench.register(&[(UID, NODE, &["10.1.0.1"])]);
    bench.manage().await;
    bench.expect_quiet().await;
    assert_eq!(bench.asked(), 0, "registered pods need no question");

    // The registry is late, or lies.
    bench.register(&[]);
    bench.expect_quiet().await;
    let questions = bench.asked();
    assert!((2..=125).contains(&questions), "{questions} in an hour");
    *bench.namespace.lock().unwrap() = (403, Value::Null);
    bench.expect_quiet().await;

    *bench.namespace.lock().unwrap() = (200, json!({}));
    assert_eq!(bench.manage().await, format!("let go {UID}"));
    bench.expect_quiet().await;

    // Back in.
    bench.register(&[(UID, NODE, &["10.1.0.1"])]);
    assert_eq!(bench.manage().await, format!("enrol {UID}"));
    // It ends: that is for the plugin.
    *bench.namespace.lock().unwrap() = (404, Value::Null);
    bench.register(&[]);
    bench.expect_quiet().await;
    let pods = bench.pods.clone();
    let (ended, unenrolled) = tokio::join!(bench.manage(), pods.unenroll(UID.to_owned(), None));
    assert_eq!((ended, unenrolled), (format!("let go {UID}"), Ok(())));
}

#[tokio::test(start_paused = true)]
async fn who_is_taken_out_as_soon_as_enrolled_is_let_go() {
    let mut bench = Bench::new();
    bench.start();
    bench.register(&[(UID, NODE, &["10.1.0.1"])]);
    assert_eq!(bench.manage().await, format!("enrol {UID}"));
    // The controller has not looked again since.
    *bench.namespace.lock().unwrap() = (200, json!({}));
    bench.register(&[]);
    assert_eq!(bench.manage().await, format!("let go {UID}"));
}

#[tokio::test(start_paused = true)]
async fn who_was_never_seen_registered_stays_under_guard() {
    let mut bench = Bench::new();
    *bench.enrolled.lock().unwrap() = Some([UID.to_owned()].into());
    *bench.namespace.lock().unwrap() = (200, json!({}));
    bench.register(&[]);
    bench.expect_quiet().await;
    assert_eq!(bench.asked(), 0);
}

/// A cgroup of this test's own, in which a process may run.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(name: &str) -> Self {
        let root = cgroup2_root().unwrap();
        let path = root.join(format!("nodemesh-test-{}-{name}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn below(&self, name: &str) -> Self {
        let path = self.0.join(name);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    /// A process in it, in a network namespace of its own or in the one of this test.
    fn run(&self, own_netns: bool) -> Running {
        let child = in_thread(move || {
            if own_netns {
                unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root");
            }
            Command::new("sleep").arg("600").spawn().unwrap()
        });
        fs::write(self.0.join("cgroup.procs"), child.id().to_string()).unwrap();
        Running(child)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Its processes are gone, but the kernel may take a moment to count them out.
        while fs::remove_dir(&self.0).is_err_and(|e| e.kind() == io::ErrorKind::ResourceBusy) {
            std::thread::yield_now();
        }
    }
}

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn a_real_pod_is_found_by_its_processes() {
    let systemd = UID.replace('-', "_");
    let uids = ["7c9e6679-7425-40de-944b-e07fc1f90ae7", "f47ac10b-58cc-4372-a567-0e02b2c3d479"];
    let all = Cgroup::new("kubepods");
    let pod = all.below(&format!("kubepods-burstable-pod{systemd}.slice"));
    let container = pod.below("cri-containerd-01.scope");
    let on_host = all.below(&format!("pod{}", uids[0]));
    let running = [pod.run(true), on_host.run(false)];
    let target = format!("/proc/{}/ns/net", running[0].0.id());
    // The container shares the sandbox's namespace.
    let shared = target.clone();
    let second = in_thread(move || {
        nix::sched::setns(fs::File::open(shared).unwrap(), CloneFlags::CLONE_NEWNET).unwrap();
        Running(Command::new("sleep").arg("600").spawn().unwrap())
    });
    fs::write(container.0.join("cgroup.procs"), second.0.id().to_string()).unwrap();

    let scene = in_thread(move || {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
        fs::create_dir_all("/run/netns").unwrap();
        mount(Some("tmpfs"), "/run/netns", Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        fs::write("/run/netns/cni-1", "").unwrap();
        bind(Path::new(&target), Path::new("/run/netns/cni-1"));
        Scene::read().unwrap()
    });
    let wanted = BTreeSet::from([UID, uids[0], uids[1]].map(str::to_owned));
    let found = discovery::find(&wanted, &scene);
    assert_eq!(found[UID], Ok("/run/netns/cni-1".into()));
    assert_eq!(found[uids[0]], Err(Doubt::Host));
    assert_eq!(found[uids[1]], Err(Doubt::NoProcess));
    // Leaves its cgroups before they go.
    drop((running, second));
}
