//! The two listeners and the command line's client, over real sockets.

use std::{
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpStream, UnixListener, UnixStream},
    sync::{mpsc, watch},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::{status::Program, *};
use crate::{
    config::Udp,
    identity::{self, Counters, Snapshot, Svid},
    pod::source::{PodEvent, directory::DirectorySource},
    stats::{Direction, Kind, Parties, Party, Problems, Stats},
    tunnel::TraceId,
};

const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Default)]
struct Fake(Mutex<Vec<PodFacts>>);

impl Inspect for Fake {
    fn programs(&self) -> Vec<Program> {
        vec![Program { name: "connect4".to_owned(), attached: true }]
    }

    fn pods_synced(&self) -> bool {
        true
    }

    fn pods(&self) -> Vec<PodFacts> {
        self.0.lock().unwrap().clone()
    }

    fn svid(&self, _: &str) -> Option<watch::Receiver<Option<Arc<Svid>>>> {
        None
    }
}

struct Fixture {
    root: TempDir,
    socket: PathBuf,
    http: std::net::SocketAddr,
    fake: Arc<Fake>,
    stats: Arc<Stats>,
    source: Option<DirectorySource>,
    identity: watch::Sender<identity::Status>,
    _snapshots: watch::Sender<Arc<Snapshot>>,
}

async fn start() -> Fixture {
    let root = tempfile::tempdir().unwrap();
    let socket = root.path().join("agent.sock");
    let (source, pods) = DirectorySource::new(root.path().join("pods"), Udp::Allow);
    let (identity, identity_seen) = watch::channel(identity::Status::default());
    let (snapshots, snapshots_seen) = watch::channel(Arc::new(Snapshot::default()));
    let (fake, stats) = (Arc::new(Fake::default()), Arc::new(Stats::new(10)));
    let admin = Admin {
        node: "node-1".to_owned(),
        kernel_tls: "off".to_owned(),
        started: SystemTime::now(),
        identity: identity_seen,
        counters: Arc::new(Counters::default()),
        snapshots: snapshots_seen,
        stats: Arc::clone(&stats),
        problems: Problems::default(),
        pods,
        unguarded: watch::channel(Default::default()).1,
        inspect: Arc::<Fake>::clone(&fake),
    };
    let server = Server::bind(&socket, "127.0.0.1:0".parse().unwrap()).await.unwrap();
    let http = server.http_address().unwrap();
    tokio::spawn(server.serve(Arc::new(admin)));
    let source = Some(source);
    Fixture { root, socket, http, fake, stats, source, identity, _snapshots: snapshots }
}

fn facts(uid: &str, netns: &Path) -> PodFacts {
    PodFacts {
        uid: uid.to_owned(),
        netns: netns.to_owned(),
        udp: Udp::Allow,
        listening: true,
        guard: Vec::new(),
        problem: None,
        datagrams: 0,
        drops: Vec::new(),
        svid: None,
        certificate_problem: None,
        idle_tunnels: 0,
        shared_tunnels: 0,
        repairs: 0,
        aborted: 0,
    }
}

async fn get(fixture: &Fixture, path: &str) -> String {
    let mut stream = TcpStream::connect(fixture.http).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    timeout(PATIENCE, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    answer
}

#[tokio::test]
async fn the_status_says_who_is_connected_to_whom() {
    let fixture = start().await;
    fixture.fake.0.lock().unwrap().push(facts("u1", Path::new("/run/netns/a")));
    let party = |address: &str| Party { address: address.parse().unwrap(), workload: None };
    let parties = Parties {
        direction: Direction::Outbound,
        client: party("10.1.0.1:4000"),
        server: party("198.51.100.1:443"),
        endpoint: None,
        trace: Some(TraceId([1; 16])),
    };
    let guard =
        fixture.stats.pod("u1").open(parties, Kind::Plaintext, &CancellationToken::new()).unwrap();
    guard.traffic().set(7, 9);

    let client = Client::new(&fixture.socket);
    let status = client.status().await.unwrap();
    assert_eq!((status.node.as_str(), status.schema), ("node-1", status::SCHEMA));
    let pod = &status.pods[0];
    let plaintext = pod.connections.iter().find(|c| c.open > 0).unwrap();
    assert_eq!((plaintext.kind.as_str(), plaintext.from_server), ("plaintext", 9));

    let open = client.connections().await.unwrap();
    assert_eq!(open.connections.len(), 1);
    assert_eq!(open.connections[0].server.address.port(), 443);
    assert_eq!(open.connections[0].trace.as_deref(), Some("01".repeat(16).as_str()));
    drop(guard);
    assert_eq!(client.connections().await.unwrap().connections, []);
}

#[tokio::test]
async fn http_says_whether_the_agent_is_ready_and_answers_nothing_else() {
    let fixture = start().await;
    assert!(get(&fixture, "/healthz").await.starts_with("HTTP/1.1 200"));
    let answer = get(&fixture, "/readyz").await;
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("registry"), "{answer}");
    fixture.identity.send_modify(|status| status.version = 1);
    assert!(get(&fixture, "/readyz").await.starts_with("HTTP/1.1 200"));
    let metrics = get(&fixture, "/metrics").await;
    assert!(metrics.contains("openmetrics-text") && metrics.contains("nodemesh_ready 1"));
    for path in ["/v1/status", "/v1/connections", "/v1/pods/u1"] {
        assert!(get(&fixture, path).await.starts_with("HTTP/1.1 404"), "{path}");
    }
}

#[tokio::test]
async fn enrolling_answers_in_words() {
    let mut fixture = start().await;
    let (events, mut changes) = mpsc::channel(4);
    let source = fixture.source.take().unwrap();
    tokio::spawn(crate::pod::source::PodSource::run(source, events));
    let client = Client::new(&fixture.socket);
    let missing = fixture.root.path().join("missing");
    let error = client.enroll("u1", &missing, None).await.unwrap_err();
    assert!(matches!(error, ClientError::Refused(_)), "{error}");
    assert!(error.to_string().contains("no network namespace at"), "{error}");
    let error = client.certified("u1", 1).await.unwrap_err();
    assert!(error.to_string().contains("u1 is not enrolled"), "{error}");
    let error = client.unenroll("u1", None).await.unwrap_err();
    assert!(error.to_string().contains("declares u1"), "{error}");
    client.unenroll("u1", Some(&missing)).await.unwrap();
    let event = timeout(PATIENCE, changes.recv()).await.unwrap().unwrap();
    assert!(matches!(event, PodEvent::Synced), "{event:?}");
}

/// The command line, or the CNI plugin, of another release: the answer to what it says, as it is.
async fn say(fixture: &Fixture, body: &str) -> String {
    let mut stream = UnixStream::connect(&fixture.socket).await.unwrap();
    let request = format!(
        "PUT /v1/pods/u1 HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
         content-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    timeout(PATIENCE, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    answer
}

#[tokio::test]
async fn a_plugin_of_another_release_enrols_unless_it_asks_for_what_is_not_known_here() {
    let mut fixture = start().await;
    let (events, _changes) = mpsc::channel(4);
    let source = fixture.source.take().unwrap();
    tokio::spawn(crate::pod::source::PodSource::run(source, events));
    for understood in [r#"{"netns": "/nowhere"}"#, r#"{"netns": "/nowhere", "udp": null}"#] {
        let answer = say(&fixture, understood).await;
        assert!(answer.contains("no network namespace at"), "{understood}: {answer}");
    }
    let answer = say(&fixture, r#"{"netns": "/nowhere", "later": "deny"}"#).await;
    assert!(answer.starts_with("HTTP/1.1 422") && answer.contains("later"), "{answer}");
    // And an agent of the last release is asked for nothing that it does not know.
    let enrollment = server::Enrollment { netns: "/nowhere".into(), udp: None };
    assert_eq!(serde_json::to_string(&enrollment).unwrap(), r#"{"netns":"/nowhere"}"#);
}

#[tokio::test]
async fn the_socket_is_for_root_only() {
    let fixture = start().await;
    let mode = std::fs::metadata(&fixture.socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    // Let everybody in as far as file permissions go: only the peer's credentials are left.
    let open = std::fs::Permissions::from_mode(0o777);
    std::fs::set_permissions(&fixture.socket, open.clone()).unwrap();
    std::fs::set_permissions(fixture.root.path(), open).unwrap();
    let ask_as = |user: u32| {
        let socket = fixture.socket.clone();
        tokio::task::spawn_blocking(move || answer_as(user, &socket))
    };
    assert!(ask_as(0).await.unwrap().starts_with("HTTP/1.1 200"));
    assert_eq!(ask_as(65_534).await.unwrap(), "");
}

/// What a process of another user reads from the socket when it asks for the status.
fn answer_as(user: u32, socket: &Path) -> String {
    use std::os::unix::process::CommandExt as _;
    const ASK: &str = r#"
        use IO::Socket::UNIX;
        $SIG{PIPE} = "IGNORE";
        my $socket = IO::Socket::UNIX->new($ARGV[0]) or die "connect: $!";
        print $socket "GET /v1/status HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        $socket->flush;
        print while <$socket>;
    "#;
    let output = std::process::Command::new("/usr/bin/perl")
        .args(["-e", ASK])
        .arg(socket)
        .uid(user)
        .output()
        .expect("this test needs root, and perl of any Debian");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test]
async fn a_leftover_socket_is_replaced_and_a_live_one_is_not() {
    let root = tempfile::tempdir().unwrap();
    let socket = root.path().join("agent.sock");
    let http = "127.0.0.1:0".parse().unwrap();
    drop(UnixListener::bind(&socket).unwrap());
    assert!(socket.exists());
    let first = Server::bind(&socket, http).await.unwrap();
    let error = Server::bind(&socket, http).await.unwrap_err();
    assert!(matches!(error, BindError::Running(_)), "{error}");
    drop(first);

    std::fs::remove_file(&socket).unwrap();
    std::fs::write(&socket, "precious").unwrap();
    let error = Server::bind(&socket, http).await.unwrap_err();
    assert!(matches!(error, BindError::Unix { .. }), "{error}");
    assert_eq!(std::fs::read_to_string(&socket).unwrap(), "precious");
}
