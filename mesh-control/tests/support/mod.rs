//! A control plane on loopback, and an agent's side of its API.

use std::{
    fs, io,
    net::SocketAddr,
    os::unix::fs::DirBuilderExt as _,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use hyper_util::rt::TokioIo;
use mesh_common::{
    api::{self, ALPN, control_plane_client::ControlPlaneClient},
    join::JoinToken,
    svid::{Kind, PeerVerifier, TrustBundle, certified_key, client_config},
};
use mesh_control::{
    config::{Config, Kubernetes},
    control::Control,
    kubernetes::{attest::Attestor, cluster::Cluster, events::Events},
    server, watch,
};
use rcgen::{CertificateParams, KeyPair};
use rustls::{
    pki_types::{CertificateDer, PrivateKeyDer, ServerName},
    sign::CertifiedKey,
};
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_util::sync::CancellationToken;
use tonic::{
    Status,
    transport::{Channel, Endpoint},
};

pub(crate) type Client = ControlPlaneClient<Channel>;

/// A control plane, with everything it needs in one directory.
pub(crate) struct Lab {
    dir: Arc<tempfile::TempDir>,
    more: String,
    pub(crate) control: Arc<Control>,
    pub(crate) address: SocketAddr,
    shutdown: CancellationToken,
    tasks: Vec<JoinHandle<()>>,
}

impl Lab {
    pub(crate) async fn start() -> Self {
        Self::start_with("").await
    }

    /// With further lines of configuration.
    pub(crate) async fn start_with(more: &str) -> Self {
        Self::start_in(Arc::new(tempfile::tempdir().unwrap()), more.to_owned(), None).await
    }

    /// In a cluster with this API server.
    pub(crate) async fn start_on_kubernetes(client: kube::Client) -> Self {
        let dir = Arc::new(tempfile::tempdir().unwrap());
        Self::start_in(dir, "kubernetes: {}\n".to_owned(), Some(client)).await
    }

    /// Another replica, with the same root.
    pub(crate) async fn replica(&self, client: kube::Client) -> Self {
        let dir = Arc::new(tempfile::tempdir().unwrap());
        let ca = dir.path().join("state/ca");
        for private in [dir.path().join("state"), ca.clone()] {
            fs::DirBuilder::new().mode(0o700).create(private).unwrap();
        }
        fs::copy(self.state("ca/root.pem"), ca.join("root.pem")).unwrap();
        Self::start_in(dir, self.more.clone(), Some(client)).await
    }

    async fn start_in(
        dir: Arc<tempfile::TempDir>,
        more: String,
        api: Option<kube::Client>,
    ) -> Self {
        let path = dir.path().join("config.yaml");
        let state = dir.path().join("state");
        let text = format!("trust_domain: mesh.example\nstate_dir: {}\n{more}", state.display());
        fs::write(&path, text).unwrap();
        let config = Config::load(&path).unwrap();
        let dirs = config.watched_dirs().to_vec();
        let control = Arc::new(Control::open(config, SystemTime::now()).unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let reloading = Arc::clone(&control);
        let cluster = api.map(|client| {
            let config = Kubernetes::default();
            let cluster = Arc::new(Cluster::watch(&client, config.namespace.clone()));
            let events = Events::start(client.clone(), cluster, Arc::clone(&control));
            (Attestor::new(client, config), events)
        });
        let serving = server::serve(Arc::clone(&control), cluster, listener, shutdown.clone());
        let tasks = vec![
            tokio::spawn(async { serving.await.unwrap() }),
            tokio::spawn(watch::watch(dirs, move || reloading.reload())),
        ];
        Self { dir, more, control, address, shutdown, tasks }
    }

    /// Ends the server and starts another on the same directory.
    pub(crate) async fn restart(mut self) -> Self {
        self.shutdown.cancel();
        self.tasks.remove(0).await.unwrap();
        self.tasks.remove(0).abort();
        Self::start_in(Arc::clone(&self.dir), self.more.clone(), None).await
    }

    pub(crate) fn state(&self, path: &str) -> PathBuf {
        self.dir.path().join("state").join(path)
    }

    pub(crate) fn token(&self, node: &str) -> String {
        let ttl = Duration::from_secs(60);
        self.control.create_token(node, ttl, SystemTime::now()).unwrap()
    }

    /// Registers a pod by a file, and waits until it is in force.
    pub(crate) async fn register(&self, uid: &str, node: &str, address: &str) {
        let text = format!(
            "uid: {uid}\nname: {uid}-name\nnamespace: shop\nservice_account: cart\nnode: {node}\n\
             addresses: [{address}]\n"
        );
        fs::write(self.state(&format!("registry/{uid}.yaml")), text).unwrap();
        until(|| self.control.view().registry.get(uid).is_some()).await;
    }

    /// The certificate of a node, as if it had joined.
    pub(crate) fn node_identity(&self, node: &str) -> Arc<CertifiedKey> {
        let (key, csr) = key_and_csr();
        let issued = self.control.renew_node(node.to_owned(), &csr, SystemTime::now()).unwrap();
        certified_key(issued.chain, PrivateKeyDer::Pkcs8(key.serialize_der().into())).unwrap()
    }

    /// A node that has joined.
    pub(crate) async fn node(&self, name: &str) -> Node {
        join(self.address, &self.token(name)).await.unwrap()
    }

    pub(crate) fn refused(&self, reason: &str) -> u64 {
        self.control.metrics.refused_by_reason().get(reason).copied().unwrap_or_default()
    }
}

/// Waits for a condition, but not for ever.
pub(crate) async fn until(condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "it did not come true");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A key with a signing request for it.
pub(crate) fn key_and_csr() -> (KeyPair, Vec<u8>) {
    let key = KeyPair::generate().unwrap();
    let csr = CertificateParams::default().serialize_request(&key).unwrap().der().to_vec();
    (key, csr)
}

pub(crate) fn chain(der: Vec<Vec<u8>>) -> Vec<CertificateDer<'static>> {
    der.into_iter().map(CertificateDer::from).collect()
}

pub(crate) fn identity(der: Vec<Vec<u8>>, key: &KeyPair) -> Arc<CertifiedKey> {
    let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
    certified_key(chain(der), key).unwrap()
}

/// Connects like an agent, as far as TLS.
pub(crate) fn connect_tls(
    address: SocketAddr,
    verifier: PeerVerifier,
    identity: Option<Arc<CertifiedKey>>,
) -> impl Future<Output = io::Result<TlsStream<TcpStream>>> {
    let config = client_config(Arc::new(verifier), identity, ALPN).unwrap();
    dial(TlsConnector::from(Arc::new(config)), address)
}

async fn dial(connector: TlsConnector, address: SocketAddr) -> io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    let name = ServerName::try_from("control.invalid").unwrap();
    connector.connect(name, stream).await
}

/// Connects like an agent.
pub(crate) async fn connect(
    address: SocketAddr,
    verifier: PeerVerifier,
    identity: Option<Arc<CertifiedKey>>,
) -> Result<Client, tonic::transport::Error> {
    channel(address, verifier, identity).await.map(Client::new)
}

/// Connects, for whatever there is to ask.
pub(crate) async fn channel(
    address: SocketAddr,
    verifier: PeerVerifier,
    identity: Option<Arc<CertifiedKey>>,
) -> Result<Channel, tonic::transport::Error> {
    let config = client_config(Arc::new(verifier), identity, ALPN).unwrap();
    let connector = TlsConnector::from(Arc::new(config));
    let connect = tower::service_fn(move |_: tonic::codegen::http::Uri| {
        let connector = connector.clone();
        async move { dial(connector, address).await.map(TokioIo::new) }
    });
    let endpoint = Endpoint::from_static("http://control.invalid");
    endpoint.connect_with_connector(connect).await
}

/// Connects like an agent that has nothing but a token.
pub(crate) async fn connect_pinned(address: SocketAddr, token: &str) -> Client {
    let token: JoinToken = token.parse().unwrap();
    let verifier = PeerVerifier::pinned(token.trust_domain.clone(), token.root);
    connect(address, verifier, None).await.unwrap()
}

/// A node's agent: its certificate, and a connection made with it.
pub(crate) struct Node {
    pub(crate) client: Client,
    pub(crate) identity: Arc<CertifiedKey>,
    pub(crate) bundle: Arc<TrustBundle>,
}

impl Node {
    pub(crate) async fn svid(&mut self, uid: &str) -> Result<(Arc<CertifiedKey>, KeyPair), Status> {
        let (key, csr) = key_and_csr();
        let request = api::IssueSvidRequest { pod_uid: uid.to_owned(), csr };
        let response = self.client.issue_svid(request).await?.into_inner();
        Ok((identity(response.chain, &key), key))
    }
}

/// Joins with a token, and connects with the certificate that it gave.
pub(crate) async fn join(address: SocketAddr, token: &str) -> Result<Node, Status> {
    let client = connect_pinned(address, token).await;
    let request = api::JoinRequest { token: token.to_owned(), ..Default::default() };
    join_with(address, client, request).await
}

/// Joins with whatever token is in the request.
pub(crate) async fn join_with(
    address: SocketAddr,
    mut client: Client,
    mut request: api::JoinRequest,
) -> Result<Node, Status> {
    let (key, csr) = key_and_csr();
    (request.csr, request.agent_version) = (csr, "test".to_owned());
    let response = client.join(request).await?.into_inner();
    let bundle = Arc::new(TrustBundle::from_api(response.bundle.unwrap()).unwrap());
    let identity = identity(response.chain, &key);
    let verifier = PeerVerifier::new(Arc::clone(&bundle), Kind::Control);
    let client = connect(address, verifier, Some(Arc::clone(&identity))).await.unwrap();
    Ok(Node { client, identity, bundle })
}
