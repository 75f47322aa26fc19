//! A control plane in this process, real in its TLS, its gRPC and its certificates, with an
//! operator who can do things to it.

use std::{
    io,
    net::IpAddr,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use futures::{Stream, StreamExt as _, stream};
use mesh_common::{
    api::{
        self, Encoded,
        control_plane_server::{ControlPlane, ControlPlaneServer},
        watch_request::Message,
    },
    join::JoinToken,
    spiffe::SpiffeId,
    svid::{
        Fingerprint, Kind, Leaf, POD_EXTENSION_OID, PeerVerifier, PodRef, TrustBundle,
        certified_key, server_config,
    },
};
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertificateSigningRequestParams,
    CustomExtension, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PublicKeyData, SanType,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::{
    io::{
        AsyncRead, AsyncWrite, AsyncWriteExt as _, DuplexStream, ReadBuf, ReadHalf, WriteHalf,
        copy, duplex, split,
    },
    sync::watch,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::wrappers::WatchStream;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Code, Request, Response, Status, Streaming, transport::server::Connected};

use super::super::{connect::Dialer, schedule::Clock};

pub(super) const TRUST_DOMAIN: &str = "mesh.example";
pub(super) const NODE: &str = "node-1";
pub(super) const HOUR: Duration = Duration::from_secs(3600);
/// The default of the real one.
pub(super) const LIFETIME: Duration = Duration::from_secs(4 * 3600);

/// A CA: a root that signs leaves itself.
pub(super) struct Authority {
    certificate: Certificate,
    issuer: Issuer<'static, KeyPair>,
    born: SystemTime,
}

impl Authority {
    pub(super) fn new(name: &str) -> Self {
        let born = SystemTime::now() - Duration::from_secs(300);
        let mut params = CertificateParams::default();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        (params.not_before, params.not_after) = (born.into(), (born + 10_000 * HOUR).into());
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        Self { certificate, issuer: Issuer::new(params, key), born }
    }

    pub(super) fn root(&self) -> CertificateDer<'static> {
        self.certificate.der().clone()
    }

    pub(super) fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(self.certificate.der())
    }

    fn sign(&self, key: &impl PublicKeyData, leaf: &LeafParams) -> CertificateDer<'static> {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(leaf.uri.as_str().try_into().unwrap())];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages.clone_from(&leaf.usages);
        if let Some(pod) = &leaf.pod {
            let extension = CustomExtension::from_oid_content(POD_EXTENSION_OID, pod.encode());
            params.custom_extensions = vec![extension];
        }
        (params.not_before, params.not_after) = (self.born.into(), leaf.not_after.into());
        params.signed_by(key, &self.issuer).unwrap().der().clone()
    }
}

struct LeafParams {
    uri: String,
    pod: Option<PodRef>,
    usages: Vec<ExtendedKeyUsagePurpose>,
    not_after: SystemTime,
}

impl LeafParams {
    fn new(uri: String, pod: Option<PodRef>, not_after: SystemTime) -> Self {
        let usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        Self { uri, pod, usages, not_after }
    }
}

/// What is wrong with the certificates that it issues for pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mischief {
    OtherIdentity,
    OtherPod,
    OtherName,
    OtherKey,
    OtherRoot,
    Expired,
    ClientOnly,
    NotACertificate,
    NoChain,
    Refusal,
}

struct State {
    reachable: bool,
    /// Whose root the join tokens name, and who signs its own and the nodes' certificates.
    authority: Arc<Authority>,
    /// Who signs the pods' certificates.
    workload_authority: Arc<Authority>,
    mischief: Option<Mischief>,
    tokens: Vec<String>,
    node_lifetime: Duration,
    connections: Vec<AbortOnDropHandle<()>>,
    secrets: u8,
    /// Node certificates from before the next join are not accepted.
    void: bool,
    /// None is, whenever it was issued.
    stubborn: bool,
    /// Reports are answered with this.
    report_error: Option<Code>,
    /// The service account tokens of the agent's pod that the API server would accept.
    service_account_tokens: Vec<String>,
}

/// The control plane. Clones are the same one.
#[derive(Clone)]
pub(super) struct Fake(Arc<Shared>);

struct Shared {
    clock: Clock,
    state: Mutex<State>,
    frozen: watch::Sender<bool>,
    snapshot: watch::Sender<api::Snapshot>,
    messages: watch::Sender<api::Snapshot>,
    answers: watch::Sender<Vec<Message>>,
    reports: watch::Sender<Vec<api::PodReport>>,
    dialled: watch::Sender<Vec<String>>,
    issued: AtomicU64,
    joins: AtomicU64,
    renewals: AtomicU64,
}

impl Fake {
    pub(super) fn new(clock: Clock) -> Self {
        let authority = Arc::new(Authority::new("first"));
        let fake = Self(Arc::new(Shared {
            clock,
            state: Mutex::new(State {
                reachable: true,
                workload_authority: Arc::clone(&authority),
                authority,
                mischief: None,
                tokens: Vec::new(),
                node_lifetime: 1_000 * HOUR,
                connections: Vec::new(),
                secrets: 0,
                void: false,
                stubborn: false,
                report_error: None,
                service_account_tokens: Vec::new(),
            }),
            frozen: watch::Sender::new(false),
            snapshot: watch::Sender::new(api::Snapshot { version: 1, ..Default::default() }),
            messages: watch::Sender::default(),
            answers: watch::Sender::default(),
            reports: watch::Sender::default(),
            dialled: watch::Sender::default(),
            issued: AtomicU64::new(0),
            joins: AtomicU64::new(0),
            renewals: AtomicU64::new(0),
        }));
        let root = fake.authority().root();
        fake.change(|snapshot| {
            let lifetime = LIFETIME.as_secs().try_into().unwrap();
            snapshot.settings = Some(api::Settings { svid_lifetime_seconds: lifetime });
            snapshot.bundle = Some(bundle(&[root]));
        });
        fake
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap()
    }

    // What the operator does.

    /// Publishes a new version of the registry.
    pub(super) fn change(&self, change: impl FnOnce(&mut api::Snapshot)) -> u64 {
        self.0.snapshot.send_modify(|snapshot| {
            snapshot.version += 1;
            change(snapshot);
        });
        self.0.snapshot.borrow().version
    }

    /// Sends this to the agents that are connected, whatever the registry is.
    pub(super) fn send(&self, message: api::Snapshot) {
        self.0.messages.send_replace(message);
    }

    pub(super) fn register(&self, workload: api::Workload) {
        self.change(|snapshot| {
            snapshot.workloads.retain(|old| old.uid != workload.uid);
            snapshot.workloads.push(workload);
        });
    }

    pub(super) fn deregister(&self, uid: &str) {
        self.change(|snapshot| snapshot.workloads.retain(|workload| workload.uid != uid));
    }

    pub(super) fn trust(&self, roots: &[CertificateDer<'static>]) -> u64 {
        self.change(|snapshot| snapshot.bundle = Some(bundle(roots)))
    }

    pub(super) fn set_svid_lifetime(&self, lifetime: Duration) {
        self.change(|snapshot| {
            let lifetime = lifetime.as_secs().try_into().unwrap();
            snapshot.settings = Some(api::Settings { svid_lifetime_seconds: lifetime });
        });
    }

    pub(super) fn set_node_lifetime(&self, lifetime: Duration) {
        self.state().node_lifetime = lifetime;
    }

    pub(super) fn set_mischief(&self, mischief: Option<Mischief>) {
        self.state().mischief = mischief;
    }

    pub(super) fn sign_workloads_with(&self, authority: &Arc<Authority>) {
        self.state().workload_authority = Arc::clone(authority);
    }

    /// Everything that it signs from now on, its own certificate included.
    pub(super) fn sign_with(&self, authority: &Arc<Authority>) {
        self.state().authority = Arc::clone(authority);
        self.sign_workloads_with(authority);
    }

    /// As when somebody joins in the node's name.
    pub(super) fn void_node_certificates(&self) {
        let mut state = self.state();
        state.void = true;
        state.connections.clear();
    }

    pub(super) fn set_stubborn(&self) {
        let mut state = self.state();
        state.stubborn = true;
        state.connections.clear();
    }

    /// What the API server knows of the agent's pod from now on.
    pub(super) fn set_service_account_token(&self, token: &str) {
        self.state().service_account_tokens = vec![token.to_owned()];
    }

    /// Answers reports with an error, or takes them again.
    pub(super) fn set_report_error(&self, code: Option<Code>) {
        self.state().report_error = code;
    }

    pub(super) fn authority(&self) -> Arc<Authority> {
        Arc::clone(&self.state().authority)
    }

    /// Makes a token that the control plane knows.
    pub(super) fn create_token(&self, node: &str) -> String {
        let token = self.unknown_token(node, self.authority().fingerprint());
        self.state().tokens.push(token.clone());
        token
    }

    /// Makes a token that it does not know.
    pub(super) fn unknown_token(&self, node: &str, root: Fingerprint) -> String {
        let secret = {
            let mut state = self.state();
            state.secrets += 1;
            [state.secrets; 32]
        };
        JoinToken::new(TRUST_DOMAIN.parse().unwrap(), node, root, secret).unwrap().reveal()
    }

    /// Stops it, or starts it again.
    pub(super) fn set_reachable(&self, reachable: bool) {
        let mut state = self.state();
        state.reachable = reachable;
        state.connections.clear();
    }

    /// Lets what is sent vanish, in both directions, without closing anything.
    pub(super) fn set_frozen(&self, frozen: bool) {
        self.0.frozen.send_replace(frozen);
    }

    // What it has seen.

    pub(super) fn issued(&self) -> u64 {
        self.0.issued.load(Ordering::Relaxed)
    }

    pub(super) fn joins(&self) -> u64 {
        self.0.joins.load(Ordering::Relaxed)
    }

    pub(super) fn renewals(&self) -> u64 {
        self.0.renewals.load(Ordering::Relaxed)
    }

    /// Waits for the agent's answer to a snapshot: `Err` with the reason if it was refused.
    pub(super) async fn answer_to(&self, version: u64) -> Result<(), String> {
        let of = |message: &Message| match message {
            Message::Ack(ack) if ack.version == version => Some(Ok(())),
            Message::Nack(nack) if nack.version == version => Some(Err(nack.error.clone())),
            Message::Ack(_) | Message::Nack(_) | Message::Hello(_) | Message::State(_) => None,
        };
        let mut answers = self.0.answers.subscribe();
        let answers = answers.wait_for(|all| all.iter().any(|one| of(one).is_some())).await;
        answers.unwrap().iter().find_map(of).unwrap()
    }

    /// Every state of the pods that it was told, as UIDs.
    pub(super) fn states(&self) -> Vec<Vec<String>> {
        let uids = |state: &api::State| state.pods.iter().map(|pod| pod.uid.clone()).collect();
        let states = |message: &Message| match message {
            Message::State(state) => Some(uids(state)),
            Message::Ack(_) | Message::Nack(_) | Message::Hello(_) => None,
        };
        self.0.answers.borrow().iter().filter_map(states).collect()
    }

    /// Hears of its agent's answers.
    pub(super) fn answers(&self) -> watch::Receiver<Vec<Message>> {
        self.0.answers.subscribe()
    }

    /// The reports that it was sent, also those that it has refused.
    pub(super) fn reports(&self) -> watch::Receiver<Vec<api::PodReport>> {
        self.0.reports.subscribe()
    }

    /// Waits until the agent has refused a version, and returns why.
    pub(super) async fn refusal_of(&self, version: u64) -> String {
        let of = |message: &Message| match message {
            Message::Nack(nack) if nack.version == version => Some(nack.error.clone()),
            Message::Ack(_) | Message::Nack(_) | Message::Hello(_) | Message::State(_) => None,
        };
        let mut answers = self.0.answers.subscribe();
        let answers = answers.wait_for(|all| all.iter().any(|one| of(one).is_some())).await;
        answers.unwrap().iter().find_map(of).unwrap()
    }

    pub(super) fn dialled(&self) -> Vec<String> {
        self.0.dialled.borrow().clone()
    }

    // How it is reached.

    /// Connects to it at every address but those on port 9.
    pub(super) fn dialer(&self) -> Dialer {
        let fake = self.clone();
        Dialer::new(move |address| std::future::ready(fake.dial(address)))
    }

    fn dial(&self, address: String) -> io::Result<DuplexStream> {
        let refused = address.ends_with(":9") || !self.state().reachable;
        self.0.dialled.send_modify(|dialled| dialled.push(address));
        if refused {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let (ours, cable) = duplex(64 << 10);
        let (far_cable, theirs) = duplex(64 << 10);
        let mut frozen = self.0.frozen.subscribe();
        let relay = tokio::spawn(async move {
            let freezing = async { frozen.wait_for(|frozen| *frozen).await.map(drop) };
            tokio::select! {
                () = carry(cable, far_cable) => {}
                _ = freezing => std::future::pending().await,
            }
        });
        self.state().connections.push(AbortOnDropHandle::new(relay));
        let fake = self.clone();
        tokio::spawn(async move { fake.serve(theirs).await });
        Ok(ours)
    }

    async fn serve(&self, stream: DuplexStream) {
        let (authority, trusted) = (self.authority(), self.bundle());
        let key = KeyPair::generate().unwrap();
        let uri = format!("spiffe://{TRUST_DOMAIN}/nodemesh/control");
        let leaf = LeafParams::new(uri, None, authority.born + 9_000 * HOUR);
        let chain = vec![authority.sign(&key, &leaf), authority.root()];
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let verifier = PeerVerifier::new(Arc::new(trusted), Kind::Node).optional();
        let key = certified_key(chain, key).unwrap();
        let tls = server_config(Arc::new(verifier), key, api::ALPN).unwrap();
        // An agent that does not like our certificate goes away.
        let Ok(stream) = TlsAcceptor::from(Arc::new(tls)).accept(stream).await else { return };
        tonic::transport::Server::builder()
            .add_service(ControlPlaneServer::new(self.clone()))
            .serve_with_incoming(tokio_stream::once(Ok::<_, io::Error>(ServerStream(stream))))
            .await
            .unwrap();
    }

    fn bundle(&self) -> TrustBundle {
        TrustBundle::from_api(self.0.snapshot.borrow().bundle.clone().unwrap()).unwrap()
    }

    /// The node that the certificate of the connection names.
    fn node_of<T>(&self, request: &Request<T>) -> Result<String, Status> {
        if self.state().void || self.state().stubborn {
            return Err(Status::unauthenticated("this certificate is void"));
        }
        let leaf: &Option<Leaf> = request.extensions().get().unwrap();
        match leaf.as_ref().map(|leaf| &leaf.id) {
            Some(SpiffeId::Node(_, node)) => Ok(node.clone()),
            Some(SpiffeId::Workload(_) | SpiffeId::Control(_)) | None => {
                Err(Status::unauthenticated("show a node's certificate"))
            }
        }
    }

    fn node_certificate(&self, csr: Vec<u8>, node: &str) -> api::NodeCertificate {
        let csr = CertificateSigningRequestParams::from_der(&csr.into()).unwrap();
        let not_after = self.0.clock.now() + self.state().node_lifetime;
        let uri = format!("spiffe://{TRUST_DOMAIN}/nodemesh/node/{node}");
        let leaf = LeafParams::new(uri, None, not_after);
        let chain = vec![self.authority().sign(&csr.public_key, &leaf).to_vec()];
        api::NodeCertificate { chain, bundle: self.0.snapshot.borrow().bundle.clone() }
    }
}

#[tonic::async_trait]
impl ControlPlane for Fake {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<Encoded, Status>> + Send>>;

    async fn join(
        &self,
        request: Request<api::JoinRequest>,
    ) -> Result<Response<api::NodeCertificate>, Status> {
        self.0.joins.fetch_add(1, Ordering::Relaxed);
        let api::JoinRequest { token, csr, service_account_token, .. } = request.into_inner();
        if token.is_empty() {
            let mut state = self.state();
            if !state.service_account_tokens.contains(&service_account_token) {
                return Err(Status::permission_denied("the API server does not accept the token"));
            }
            state.void = false;
            drop(state);
            return Ok(Response::new(self.node_certificate(csr, NODE)));
        }
        let known = {
            let mut state = self.state();
            let before = state.tokens.len();
            state.tokens.retain(|known| *known != token);
            state.void &= state.tokens.len() == before;
            state.tokens.len() < before
        };
        if !known {
            return Err(Status::permission_denied("the token is unknown or was used before"));
        }
        let token: JoinToken = token.parse().unwrap();
        Ok(Response::new(self.node_certificate(csr, &token.node)))
    }

    async fn renew_node(
        &self,
        request: Request<api::RenewNodeRequest>,
    ) -> Result<Response<api::NodeCertificate>, Status> {
        let node = self.node_of(&request)?;
        self.0.renewals.fetch_add(1, Ordering::Relaxed);
        Ok(Response::new(self.node_certificate(request.into_inner().csr, &node)))
    }

    async fn issue_svid(
        &self,
        request: Request<api::IssueSvidRequest>,
    ) -> Result<Response<api::IssueSvidResponse>, Status> {
        self.node_of(&request)?;
        let api::IssueSvidRequest { pod_uid, csr } = request.into_inner();
        let snapshot = self.0.snapshot.borrow().clone();
        let workload = snapshot
            .workloads
            .into_iter()
            .find(|workload| workload.uid == pod_uid)
            .ok_or_else(|| Status::not_found("not registered"))?;
        let lifetime = snapshot.settings.unwrap().svid_lifetime_seconds;
        let not_after = self.0.clock.now() + Duration::from_secs(lifetime.into());
        let api::Workload { namespace, service_account, name, uid, .. } = workload;
        let uri = format!("spiffe://{TRUST_DOMAIN}/ns/{namespace}/sa/{service_account}");
        let mut leaf = LeafParams::new(uri, Some(PodRef { name, uid }), not_after);
        let csr = CertificateSigningRequestParams::from_der(&csr.into()).unwrap();
        let (mut authority, mischief) = {
            let state = self.state();
            (Arc::clone(&state.workload_authority), state.mischief)
        };
        let other = |name: &str| Some(PodRef { name: name.to_owned(), uid: pod_uid.clone() });
        let mut key = None;
        match mischief {
            None => {}
            Some(Mischief::OtherIdentity) => leaf.uri.push('x'),
            Some(Mischief::OtherPod) => leaf.pod.as_mut().unwrap().uid.push('x'),
            Some(Mischief::OtherName) => leaf.pod = other("another"),
            Some(Mischief::OtherKey) => key = Some(KeyPair::generate().unwrap()),
            Some(Mischief::OtherRoot) => authority = Arc::new(Authority::new("foreign")),
            Some(Mischief::Expired) => leaf.not_after = self.0.clock.now() - HOUR / 60,
            Some(Mischief::ClientOnly) => leaf.usages.truncate(1),
            Some(Mischief::NotACertificate) => {
                let chain = vec![b"certificate".to_vec()];
                return Ok(Response::new(api::IssueSvidResponse { chain }));
            }
            Some(Mischief::NoChain) => {
                return Ok(Response::new(api::IssueSvidResponse { chain: Vec::new() }));
            }
            Some(Mischief::Refusal) => return Err(Status::permission_denied("not your pod")),
        }
        let chain = vec![match key {
            Some(key) => authority.sign(&key, &leaf).to_vec(),
            None => authority.sign(&csr.public_key, &leaf).to_vec(),
        }];
        self.0.issued.fetch_add(1, Ordering::Relaxed);
        Ok(Response::new(api::IssueSvidResponse { chain }))
    }

    async fn watch(
        &self,
        request: Request<Streaming<api::WatchRequest>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        self.node_of(&request)?;
        let shared = Arc::clone(&self.0);
        let mut answers = request.into_inner();
        tokio::spawn(async move {
            while let Ok(Some(answer)) = answers.message().await {
                shared.answers.send_modify(|all| all.extend(answer.message));
            }
        });
        let snapshots = WatchStream::new(self.0.snapshot.subscribe());
        let messages = WatchStream::from_changes(self.0.messages.subscribe());
        let sent = stream::select(snapshots, messages).map(|message| Ok(Encoded::from(&message)));
        Ok(Response::new(Box::pin(stream::select(sent, stream::pending()))))
    }

    async fn report(
        &self,
        request: Request<api::ReportRequest>,
    ) -> Result<Response<api::ReportResponse>, Status> {
        self.node_of(&request)?;
        self.0.reports.send_modify(|all| all.extend(request.into_inner().reports));
        match self.state().report_error {
            Some(code) => Err(Status::new(code, "no")),
            None => Ok(Response::new(api::ReportResponse {})),
        }
    }
}

/// Moves bytes both ways. Who has hung up is heard to the end.
async fn carry(near: DuplexStream, far: DuplexStream) {
    let (near, far) = (split(near), split(far));
    let one_way = async |mut from: ReadHalf<DuplexStream>, mut to: WriteHalf<DuplexStream>| {
        // It fails only if one end is gone.
        copy(&mut from, &mut to).await.ok();
        to.shutdown().await.ok();
    };
    tokio::join!(one_way(near.0, far.1), one_way(far.0, near.1));
}

fn bundle(roots: &[CertificateDer<'static>]) -> api::TrustBundle {
    let trust_domain = TRUST_DOMAIN.parse().unwrap();
    TrustBundle { trust_domain, roots: roots.to_vec() }.to_api()
}

/// A pod of this node, `n` being anything.
pub(super) fn workload(uid: &str, n: u8) -> api::Workload {
    api::Workload {
        uid: uid.to_owned(),
        namespace: "shop".to_owned(),
        service_account: "cart".to_owned(),
        name: format!("cart-{n}"),
        node: NODE.to_owned(),
        addresses: vec![IpAddr::from([10, 0, 0, n]).to_string()],
        owner: String::new(),
    }
}

struct ServerStream(TlsStream<DuplexStream>);

impl Connected for ServerStream {
    type ConnectInfo = Option<Leaf>;

    fn connect_info(&self) -> Self::ConnectInfo {
        let chain = self.0.get_ref().1.peer_certificates()?;
        Some(Leaf::parse(&chain[0]).unwrap())
    }
}

impl AsyncRead for ServerStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl AsyncWrite for ServerStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buffer)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
