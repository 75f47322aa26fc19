//! Two applications, two agents and a tunnel, all on loopback.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use rustls::{ClientConfig, RootCertStore, ServerConfig, pki_types::PrivatePkcs8KeyDer};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

use super::super::{
    ALPN, AppSocket, Header, Outcome, Role, TraceId, Traffic, relay, server::next_open,
};
use crate::tls::{Encryption, Stream, accept, connect};

/// Names the ends of the tests' tunnels that the kernel is to encrypt: `client`, `server` or both.
const KERNEL_TLS: &str = "NODEMESH_TEST_KERNEL_TLS";

/// Nothing here takes that long unless it hangs.
const DEADLINE: Duration = Duration::from_secs(60);

pub(crate) async fn within<F: Future>(what: &str, future: F) -> F::Output {
    tokio::time::timeout(DEADLINE, future).await.unwrap_or_else(|_| panic!("{what}: it hangs"))
}

/// Both ends of a TCP connection.
pub(crate) async fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let dial = TcpStream::connect(listener.local_addr().unwrap());
    let (near, far) = tokio::join!(dial, listener.accept());
    (near.unwrap(), far.unwrap().0)
}

pub(crate) fn tls_configs() -> (Arc<ClientConfig>, Arc<ServerConfig>) {
    let rcgen::CertifiedKey { cert, signing_key } =
        rcgen::generate_simple_self_signed(["tunnel.test".to_owned()]).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(cert.der().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let versions = &[&rustls::version::TLS13];
    let mut client = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    client.alpn_protocols = vec![ALPN.to_vec()];
    client.enable_secret_extraction = true;
    let key = PrivatePkcs8KeyDer::from(signing_key.serialize_der());
    let mut server = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![cert.der().clone()], key.into())
        .unwrap();
    server.alpn_protocols = vec![ALPN.to_vec()];
    server.send_tls13_tickets = 0;
    server.enable_secret_extraction = true;
    (Arc::new(client), Arc::new(server))
}

/// A tunnel, both ends of it.
pub(crate) async fn tunnel() -> (Stream, Stream) {
    let ends = std::env::var(KERNEL_TLS).unwrap_or_default();
    tunnel_between(ends.contains("client"), ends.contains("server")).await.unwrap()
}

/// A tunnel whose ends the kernel encrypts, or not.
pub(crate) async fn tunnel_between(
    client_in_kernel: bool,
    server_in_kernel: bool,
) -> io::Result<(Stream, Stream)> {
    let (near, far) = tcp_pair().await;
    // As the agents do, and without it every second small record waits for a delayed ACK.
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    let (client, server) = tls_configs();
    let name = "tunnel.test".try_into().unwrap();
    let encryption =
        |in_kernel| if in_kernel { Encryption::InKernel } else { Encryption::InProcess };
    tokio::try_join!(
        connect(&client, encryption(client_in_kernel), name, near),
        accept(&server, encryption(server_in_kernel), far)
    )
}

pub(crate) fn header() -> Header {
    Header::new(SocketAddr::from(([192, 0, 2, 7], 40_001)), TraceId([0xab; 16]))
}

/// One agent's half of a connection: what became of it, and the tunnel back.
pub(crate) type Agent = JoinHandle<(Outcome, Stream)>;

/// A connection in progress.
pub(crate) struct Connection {
    /// The client's application.
    pub(crate) client: TcpStream,
    /// The server's application.
    pub(crate) server: TcpStream,
    pub(crate) client_agent: Agent,
    pub(crate) server_agent: Agent,
    pub(crate) traffic: Arc<Traffic>,
}

impl Connection {
    /// Opens a connection through an idle tunnel.
    pub(crate) async fn open((near, far): (Stream, Stream)) -> Self {
        let (client, client_side) = tcp_pair().await;
        let (server, server_side) = tcp_pair().await;
        let traffic = Arc::<Traffic>::default();
        Self {
            client,
            server,
            client_agent: client_agent(client_side, near, Arc::clone(&traffic)),
            server_agent: server_agent(server_side, far),
            traffic,
        }
    }

    pub(crate) async fn new() -> Self {
        Self::open(tunnel().await).await
    }

    /// Both agents' words for how it ended, and the tunnel, which must be idle again.
    pub(crate) async fn ended(self) -> (&'static str, &'static str, (Stream, Stream)) {
        let (at_client, near) = joined(self.client_agent).await;
        let (at_server, far) = joined(self.server_agent).await;
        assert!(at_client.reusable, "the client's agent: {}", at_client.end);
        assert!(at_server.reusable, "the server's agent: {}", at_server.end);
        (at_client.end.words(), at_server.end.words(), (near, far))
    }
}

pub(crate) async fn joined(agent: Agent) -> (Outcome, Stream) {
    within("the agent", agent).await.unwrap()
}

pub(crate) fn client_agent(app: TcpStream, tunnel: Stream, traffic: Arc<Traffic>) -> Agent {
    client_agent_as(Role::Client(header()), app, tunnel, traffic)
}

pub(crate) fn client_agent_as(
    role: Role,
    app: TcpStream,
    mut tunnel: Stream,
    traffic: Arc<Traffic>,
) -> Agent {
    let app = AppSocket::new(app).unwrap();
    tokio::spawn(async move {
        let outcome = relay(app, &mut tunnel, role, &traffic).await;
        (outcome, tunnel)
    })
}

pub(crate) fn server_agent(app: TcpStream, mut tunnel: Stream) -> Agent {
    let app = AppSocket::new(app).unwrap();
    tokio::spawn(async move {
        let opened = next_open(&mut tunnel).await.unwrap();
        assert_eq!(opened, Some(header()));
        let outcome = relay(app, &mut tunnel, Role::Server, &Traffic::default()).await;
        (outcome, tunnel)
    })
}

/// Reads to a clean end.
pub(crate) async fn read_all(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> Vec<u8> {
    let mut bytes = Vec::new();
    within("a read", stream.read_to_end(&mut bytes)).await.unwrap();
    bytes
}

/// Reads until something else than bytes comes, which must be a reset.
pub(crate) async fn assert_reset(stream: &mut TcpStream) {
    let mut bytes = Vec::new();
    let error = within("a read", stream.read_to_end(&mut bytes)).await;
    let error = error.expect_err("a clean end where a reset is due");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

/// Resets a connection.
pub(crate) fn reset(stream: TcpStream) {
    socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
}

pub(crate) async fn say(stream: &mut (impl tokio::io::AsyncWrite + Unpin), bytes: &[u8]) {
    within("a write", stream.write_all(bytes)).await.unwrap();
    within("a flush", stream.flush()).await.unwrap();
}

pub(crate) async fn hear(stream: &mut (impl tokio::io::AsyncRead + Unpin), bytes: &[u8]) {
    let mut heard = vec![0; bytes.len()];
    within("a read", stream.read_exact(&mut heard)).await.unwrap();
    assert_eq!(heard, bytes);
}
