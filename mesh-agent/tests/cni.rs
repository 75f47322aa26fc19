//! The CNI plugin as a container runtime sees it: the real binary between a scripted Kubernetes API
//! and a scripted agent.
#![expect(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Json, Router,
    body::Bytes,
    http::{Method, StatusCode, Uri},
    response::{IntoResponse as _, Response},
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::AsyncWriteExt as _,
    net::{TcpListener, UnixListener},
    process::Command,
    task::JoinHandle,
    time::timeout,
};

/// Longer than the plugin waits for anything.
const PATIENCE: Duration = Duration::from_secs(90);

const UID: &str = "0f3c6a1e-2c0e-4a55-9d0c-1f6f7f0c1a11";

/// How the API answers.
#[derive(Clone, Copy, PartialEq)]
enum Mood {
    Answers,
    Fails(StatusCode),
    Silent,
}

/// What the Kubernetes API has: the labels of namespaces, and pods by `namespace/name`.
struct Cluster {
    mood: Mood,
    namespaces: BTreeMap<String, Value>,
    pods: BTreeMap<String, Value>,
    asked: usize,
}

/// What the agent was asked, and how it answers.
#[derive(Default)]
struct Agent {
    calls: Vec<(Method, String, Value)>,
    refuses: Option<&'static str>,
    enrolled: Option<(String, PathBuf)>,
    unguarded: bool,
}

struct Fixture {
    root: TempDir,
    cluster: Arc<Mutex<Cluster>>,
    agent: Arc<Mutex<Agent>>,
    serving: Option<JoinHandle<()>>,
}

/// One call of the plugin.
struct Call<'a> {
    command: &'a str,
    container: &'a str,
    netns: PathBuf,
    args: String,
    network: Value,
    program: PathBuf,
}

/// How it ended.
#[derive(Debug)]
struct Outcome {
    success: bool,
    /// `Null`: nothing was printed.
    json: Value,
}

impl Fixture {
    /// With an agent, a namespace `shop` whose label enables the mesh, and `plain` that has none.
    async fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let cluster = Arc::new(Mutex::new(Cluster {
            mood: Mood::Answers,
            namespaces: [("shop", json!({"nodemesh.io/mesh": "enabled"})), ("plain", json!({}))]
                .map(|(name, labels)| (name.to_owned(), labels))
                .into(),
            pods: BTreeMap::new(),
            asked: 0,
        }));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let served = Arc::clone(&cluster);
        let router =
            Router::new().fallback(move |uri: Uri| answer_as_api(Arc::clone(&served), uri));
        tokio::spawn(async move { axum::serve(listener, router).await });
        let kubeconfig = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "clusters": [{"name": "c", "cluster": {"server": format!("http://{address}")}}],
            "users": [{"name": "u", "user": {"token": "t"}}],
        });
        fs::write(root.path().join("kubeconfig"), kubeconfig.to_string()).unwrap();
        for netns in ["a", "b"] {
            fs::write(root.path().join(netns), "").unwrap();
        }
        let mut fixture = Self { root, cluster, agent: Arc::default(), serving: None };
        fixture.start_agent();
        for namespace in ["shop", "plain"] {
            fixture.add_pod(namespace, json!({}));
        }
        fixture
    }

    fn start_agent(&mut self) {
        let listener = UnixListener::bind(self.path("agent.sock")).unwrap();
        let agent = Arc::clone(&self.agent);
        let router = Router::new().fallback(move |method: Method, uri: Uri, body: Bytes| {
            answer_as_agent(Arc::clone(&agent), method, uri, body)
        });
        self.serving =
            Some(tokio::spawn(async move { axum::serve(listener, router).await.unwrap() }));
    }

    async fn stop_agent(&mut self) {
        let serving = self.serving.take().expect("an agent");
        serving.abort();
        drop(serving.await);
        fs::remove_file(self.path("agent.sock")).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        // As the plugin tells it to the agent: without links.
        self.root.path().canonicalize().unwrap().join(name)
    }

    fn add_pod(&self, namespace: &str, labels: Value) {
        let pod = json!({
            "metadata": {"name": "cart-0", "namespace": namespace, "uid": UID, "labels": labels},
            "spec": {"containers": []},
        });
        self.cluster.lock().unwrap().pods.insert(format!("{namespace}/cart-0"), pod);
    }

    fn label(&self, namespace: &str, labels: Value) {
        self.cluster.lock().unwrap().namespaces.insert(namespace.to_owned(), labels);
    }

    fn mood(&self, mood: Mood) {
        self.cluster.lock().unwrap().mood = mood;
    }

    fn calls(&self) -> Vec<(Method, String, Value)> {
        std::mem::take(&mut self.agent.lock().unwrap().calls)
    }

    fn is_noted(&self, namespace: &str) -> bool {
        self.path("state/outside").join(namespace).exists()
    }

    fn call<'a>(&self, command: &'a str, namespace: &str) -> Call<'a> {
        Call {
            command,
            container: "c1",
            netns: self.path("a"),
            args: format!(
                "IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME=cart-0;\
                 K8S_POD_INFRA_CONTAINER_ID=c1;K8S_POD_UID={UID}"
            ),
            network: json!({
                "cniVersion": "1.0.0", "name": "n", "type": "nodemesh-cni",
                "admin_socket": self.path("agent.sock"), "kubeconfig": self.path("kubeconfig"),
                "namespace": "nodemesh", "state_dir": self.path("state"), "prevResult": result(),
            }),
            program: env!("CARGO_BIN_EXE_mesh-agent").into(),
        }
    }

    async fn add(&self, namespace: &str) -> Outcome {
        self.call("ADD", namespace).run().await
    }
}

fn result() -> Value {
    json!({
        "cniVersion": "1.0.0",
        "interfaces": [{"name": "eth0", "sandbox": "/run/netns/a"}],
        "ips": [{"address": "10.1.0.5/16", "interface": 0}],
        "dns": {}, "surprise": [1, 2.5, null],
    })
}

async fn answer_as_api(cluster: Arc<Mutex<Cluster>>, uri: Uri) -> Response {
    let mood = {
        let mut cluster = cluster.lock().unwrap();
        cluster.asked += 1;
        cluster.mood
    };
    match mood {
        Mood::Answers => {}
        Mood::Silent => std::future::pending().await,
        Mood::Fails(status) => return failure(status),
    }
    let cluster = cluster.lock().unwrap();
    let path = uri.path().strip_prefix("/api/v1/namespaces/").expect("only these are asked for");
    let found = match path.split_once("/pods/") {
        Some((namespace, name)) => cluster.pods.get(&format!("{namespace}/{name}")).cloned(),
        None => cluster.namespaces.get(path).map(|labels| json!({"metadata": {"labels": labels}})),
    };
    found.map_or_else(|| failure(StatusCode::NOT_FOUND), |found| Json(found).into_response())
}

fn failure(status: StatusCode) -> Response {
    let body = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "reason": status.canonical_reason().unwrap().replace(' ', ""), "code": status.as_u16(),
        "message": "as scripted",
    });
    (status, Json(body)).into_response()
}

async fn answer_as_agent(
    agent: Arc<Mutex<Agent>>,
    method: Method,
    uri: Uri,
    body: Bytes,
) -> Response {
    let mut agent = agent.lock().unwrap();
    if method == Method::GET {
        return Json(status(&agent)).into_response();
    }
    let body: Value = serde_json::from_slice(&body).unwrap();
    let uid = uri.path().strip_prefix("/v1/pods/").unwrap().to_owned();
    agent.calls.push((method.clone(), uid.clone(), body.clone()));
    if let Some(error) = agent.refuses {
        return (StatusCode::UNPROCESSABLE_ENTITY, Json(json!({"error": error}))).into_response();
    }
    let netns = PathBuf::from(body["netns"].as_str().unwrap());
    if method == Method::PUT {
        agent.enrolled = Some((uid, netns));
    } else if agent.enrolled == Some((uid, netns)) {
        agent.enrolled = None;
    }
    StatusCode::NO_CONTENT.into_response()
}

/// The documented example, with the pod that is enrolled.
fn status(agent: &Agent) -> Value {
    let documented = include_str!("../../docs/operations.md");
    let (_, rest) = documented.split_once("```json\n").unwrap();
    let mut status: Value = serde_json::from_str(rest.split_once("```").unwrap().0).unwrap();
    match &agent.enrolled {
        None => status["pods"] = json!([]),
        Some((uid, netns)) => {
            status["pods"][0]["uid"] = json!(uid);
            status["pods"][0]["netns"] = json!(netns);
            status["pods"][0]["guard"][1]["active"] = json!(!agent.unguarded);
        }
    }
    status
}

impl Call<'_> {
    async fn run(self) -> Outcome {
        let mut command = Command::new(&self.program);
        if self.program == Path::new(env!("CARGO_BIN_EXE_mesh-agent")) {
            command.arg("cni");
        }
        command
            .env("CNI_COMMAND", self.command)
            .env("CNI_CONTAINERID", self.container)
            .env("CNI_NETNS", &self.netns)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_ARGS", &self.args)
            .env("CNI_PATH", "/opt/cni/bin")
            // A runtime's, for its images: none of the plugin's business.
            .env("HTTPS_PROXY", "http://192.0.2.1:3128")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .kill_on_drop(true);
        let mut plugin = command.spawn().unwrap();
        let mut stdin = plugin.stdin.take().unwrap();
        // A plugin that has seen enough hangs up.
        drop(stdin.write_all(self.network.to_string().as_bytes()).await);
        drop(stdin);
        let output = timeout(PATIENCE, plugin.wait_with_output()).await.unwrap().unwrap();
        let json = match output.stdout.as_slice() {
            [] => Value::Null,
            text => serde_json::from_slice(text).expect("JSON or nothing"),
        };
        Outcome { success: output.status.success(), json }
    }
}

impl Outcome {
    /// The result of the plugins before, unchanged.
    #[track_caller]
    fn passed(&self) {
        assert!(self.success, "{self:?}");
        assert_eq!(self.json, result());
    }

    /// A command that prints nothing.
    #[track_caller]
    fn done(&self) {
        assert!(self.success && self.json.is_null(), "{self:?}");
    }

    #[track_caller]
    fn failed(&self, code: u32, word: &str) {
        assert!(!self.success, "{self:?}");
        assert_eq!((&self.json["cniVersion"], &self.json["code"]), (&json!("1.0.0"), &json!(code)));
        let message = self.json["msg"].as_str().unwrap();
        assert!(message.contains(word), "{message}");
    }
}

#[tokio::test]
async fn what_is_no_pod_of_the_mesh_by_its_name_asks_nobody() {
    let mut fixture = Fixture::new().await;
    fixture.stop_agent().await;
    fixture.mood(Mood::Fails(StatusCode::SERVICE_UNAVAILABLE));
    let kubeconfig = fs::read(fixture.path("kubeconfig")).unwrap();
    fs::remove_file(fixture.path("kubeconfig")).unwrap();
    for namespace in ["kube-system", "kube-public", "kube-node-lease", "nodemesh"] {
        fixture.add(namespace).await.passed();
        // Nor does a name that only begins like it get through.
        fixture.add(&format!("{namespace}-2")).await.failed(11, "kubeconfig");
        fixture.call("DEL", namespace).run().await.done();
    }
    let none = Call { args: "IgnoreUnknown=1".to_owned(), ..fixture.call("ADD", "shop") };
    none.run().await.passed();
    assert_eq!(fixture.cluster.lock().unwrap().asked, 0);
    fs::write(fixture.path("kubeconfig"), kubeconfig).unwrap();

    let args = "K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=cart-0".to_owned();
    Call { args, ..fixture.call("ADD", "shop") }.run().await.failed(4, "K8S_POD_UID");
    // The same names, were they not system namespaces, would not get through.
    fixture.add("shop").await.failed(11, "as scripted");
}

#[tokio::test]
async fn a_pod_of_the_mesh_starts_when_it_is_under_guard_and_not_before() {
    let mut fixture = Fixture::new().await;
    fixture.add("shop").await.passed();
    let enrolled = (Method::PUT, UID.to_owned(), json!({"netns": fixture.path("a")}));
    assert_eq!(fixture.calls(), [enrolled]);
    fixture.call("CHECK", "shop").run().await.done();

    fixture.agent.lock().unwrap().refuses = Some("no room");
    fixture.add("shop").await.failed(11, "no room");
    fixture.stop_agent().await;
    fixture.add("shop").await.failed(11, "no mesh-agent answers");
    fixture.call("CHECK", "shop").run().await.failed(11, "no mesh-agent answers");
}

#[tokio::test]
async fn labels_decide() {
    let fixture = Fixture::new().await;
    fixture.add("plain").await.passed();
    assert!(fixture.is_noted("plain"));
    fixture.add_pod("plain", json!({"nodemesh.io/mesh": "enabled"}));
    fixture.add("plain").await.passed();
    assert_eq!(fixture.calls().len(), 1, "by its own label");
    assert!(!fixture.is_noted("plain"), "a pod of it is in the mesh");

    fixture.add_pod("shop", json!({"nodemesh.io/mesh": "disabled"}));
    fixture.add("shop").await.passed();
    assert_eq!(fixture.calls(), []);
    assert!(!fixture.is_noted("shop"), "others of it are in the mesh");

    fixture.add_pod("plain", json!({}));
    fixture.add("plain").await.passed();
    assert!(fixture.is_noted("plain"));
    fixture.label("plain", json!({"nodemesh.io/mesh": "enabled"}));
    fixture.add("plain").await.passed();
    assert!(!fixture.is_noted("plain"), "it joined");
}

#[tokio::test]
async fn another_pod_of_the_same_name_decides_nothing() {
    let fixture = Fixture::new().await;
    let change = |change: fn(&mut Value)| {
        change(fixture.cluster.lock().unwrap().pods.get_mut("plain/cart-0").unwrap());
    };
    change(|pod| pod["metadata"]["uid"] = json!("another"));
    fixture.add("plain").await.failed(11, "another UID");
    // The API's stand-in for a static pod, which the control plane knows by the node's UID, too.
    change(|pod| pod["metadata"]["annotations"] = json!({"kubernetes.io/config.mirror": UID}));
    fixture.add("plain").await.passed();
    change(|pod| pod["metadata"]["labels"] = json!({"nodemesh.io/mesh": "enabled"}));
    fixture.add("plain").await.passed();
    assert_eq!(fixture.calls()[0].1, UID);
    fixture.cluster.lock().unwrap().pods.clear();
    fixture.add("plain").await.failed(11, "no pod");
}

#[tokio::test]
async fn without_the_api_only_pods_of_namespaces_seen_outside_start() {
    let fixture = Fixture::new().await;
    fixture.add("plain").await.passed();
    for (mood, what_to_do) in [
        (Mood::Fails(StatusCode::INTERNAL_SERVER_ERROR), "API answers 500 as scripted"),
        (Mood::Fails(StatusCode::UNAUTHORIZED), "mesh-agent pod renews them"),
        (Mood::Fails(StatusCode::FORBIDDEN), "the verb get on pods and namespaces"),
        (Mood::Silent, "API did not answer within 5 s"),
    ] {
        fixture.mood(mood);
        fixture.add("plain").await.passed();
        fixture.add("shop").await.failed(11, what_to_do);
    }
    let unreachable = r#"{"current-context": "c", "users": [{"name": "u", "user": {"token": "t"}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:1"}}]}"#;
    fs::write(fixture.path("kubeconfig"), unreachable).unwrap();
    fixture.add("plain").await.passed();
    fixture.add("shop").await.failed(11, "refused");
    fs::remove_file(fixture.path("kubeconfig")).unwrap();
    fixture.add("plain").await.passed();
    fixture.add("shop").await.failed(11, "kubeconfig");
    fs::remove_dir_all(fixture.path("state")).unwrap();
    fixture.add("plain").await.failed(11, "kubeconfig");
    assert_eq!(fixture.calls(), []);
}

#[tokio::test]
async fn what_ends_is_the_sandbox_and_not_the_pod() {
    let fixture = Fixture::new().await;
    fixture.add("shop").await.passed();
    let again =
        || Call { container: "c2", netns: fixture.path("b"), ..fixture.call("ADD", "shop") };
    again().run().await.passed();
    let netns: Vec<_> =
        fixture.calls().into_iter().map(|(_, _, body)| body["netns"].clone()).collect();
    assert_eq!(netns, [json!(fixture.path("a")), json!(fixture.path("b"))]);

    // Late, and as runtimes do it: without a namespace, more than once.
    for _ in 0..2 {
        let late = Call { netns: PathBuf::new(), ..fixture.call("DEL", "shop") };
        late.run().await.done();
    }
    let ended =
        |netns: &str| (Method::DELETE, UID.to_owned(), json!({"netns": fixture.path(netns)}));
    assert_eq!(fixture.calls(), [ended("a")]);
    Call { command: "CHECK", ..again() }.run().await.done();
    Call { command: "DEL", ..again() }.run().await.done();
    assert_eq!(fixture.calls(), [ended("b")]);
    assert_eq!(fs::read_dir(fixture.path("state/ended")).unwrap().count(), 0);
}

/// The end of the first sandbox is made up for when the second is there.
#[tokio::test]
async fn a_namespace_at_the_same_path_is_not_ended_with_the_one_before() {
    let mut fixture = Fixture::new().await;
    fixture.add("shop").await.passed();
    fixture.stop_agent().await;
    fixture.call("DEL", "shop").run().await.done();
    fixture.start_agent();
    fixture.calls();
    let again = |command| Call { container: "c2", ..fixture.call(command, "shop") };
    again("ADD").run().await.passed();
    let methods = || fixture.calls().into_iter().map(|(method, _, _)| method).collect::<Vec<_>>();
    assert_eq!(methods(), [Method::PUT]);
    again("CHECK").run().await.done();
    again("DEL").run().await.done();
    assert_eq!(methods(), [Method::DELETE]);
}

#[tokio::test]
async fn what_ends_while_the_agent_is_away_is_made_up_for() {
    let mut fixture = Fixture::new().await;
    fixture.add("shop").await.passed();
    fixture.calls();
    fixture.stop_agent().await;
    fixture.call("DEL", "shop").run().await.done();
    fixture.start_agent();
    // Of a container that was never in the mesh.
    Call { container: "c9", ..fixture.call("DEL", "plain") }.run().await.done();
    assert_eq!(fixture.calls().len(), 1);
    assert_eq!(fixture.agent.lock().unwrap().enrolled, None);
    Call { container: "c9", ..fixture.call("DEL", "plain") }.run().await.done();
    assert_eq!(fixture.calls(), []);
}

#[tokio::test]
async fn a_check_fails_if_the_pod_should_be_guarded_and_is_not() {
    let fixture = Fixture::new().await;
    let check = |namespace| fixture.call("CHECK", namespace).run();
    check("plain").await.done();
    check("kube-system").await.done();
    check("shop").await.failed(100, "shop/cart-0");
    fixture.add("shop").await.passed();
    check("shop").await.done();
    fixture.agent.lock().unwrap().unguarded = true;
    check("shop").await.failed(100, "shop/cart-0");
    fixture.agent.lock().unwrap().unguarded = false;
    fixture.agent.lock().unwrap().enrolled = Some((UID.to_owned(), fixture.path("b")));
    check("shop").await.failed(100, "shop/cart-0");
}

#[tokio::test]
async fn garbage_is_what_the_runtime_no_longer_has() {
    let fixture = Fixture::new().await;
    fixture.add("shop").await.passed();
    fixture.calls();
    let collect = |valid: Value| {
        let mut call = fixture.call("GC", "shop");
        call.network["cni.dev/valid-attachments"] = valid;
        call.run()
    };
    collect(json!([{"containerID": "c1", "ifname": "eth0"}])).await.done();
    assert_eq!(fixture.calls(), []);
    collect(Value::Null).await.failed(7, "valid-attachments");
    assert_eq!(fixture.calls(), []);
    collect(json!([{"containerID": "c2", "ifname": "eth0"}])).await.done();
    assert_eq!(fixture.calls().len(), 1);
}

#[tokio::test]
async fn the_name_makes_the_plugin() {
    let mut fixture = Fixture::new().await;
    symlink(env!("CARGO_BIN_EXE_mesh-agent"), fixture.path("nodemesh-cni")).unwrap();
    let ask =
        |command| Call { program: fixture.path("nodemesh-cni"), ..fixture.call(command, "plain") };
    ask("ADD").run().await.passed();
    ask("PUT").run().await.failed(4, "PUT");
    let versions = ask("VERSION").run().await;
    let supported = versions.json["supportedVersions"].as_array().unwrap();
    assert!(supported.contains(&json!("1.0.0")) && supported.contains(&json!("1.1.0")));

    // Pods outside start without the agent: the node is ready.
    fixture.stop_agent().await;
    fixture.call("STATUS", "plain").run().await.done();
    fs::write(fixture.path("kubeconfig"), "nonsense").unwrap();
    fixture.call("STATUS", "plain").run().await.failed(50, "kubeconfig");
}
