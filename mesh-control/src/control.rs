//! The control plane as a value: everything that the gRPC service, the admin socket and the
//! probes do, without a socket.

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use anyhow::Context as _;
use arc_swap::ArcSwap;
use mesh_common::{
    api,
    join::JoinToken,
    spiffe::SpiffeId,
    svid::{Fingerprint, Kind, Leaf, SvidError, TrustBundle, Usage, certified_key},
};
use rcgen::{KeyPair, PublicKeyData};
use rustls::{
    pki_types::{CertificateDer, PrivateKeyDer, UnixTime},
    sign::CertifiedKey,
};

use crate::{
    bundle,
    ca::{self, Authority, CaError, Issued, Subject},
    config::Config,
    files,
    kubernetes::attest::AttestError,
    metrics::Metrics,
    refusal::Refusal,
    registry::{self, Problem, Registry, Workload},
    reports::Budget,
    services::{self, Services},
    sessions::Sessions,
    snapshot::{Content, Publisher},
    tokens::Tokens,
};

/// The control plane.
#[derive(Debug)]
pub struct Control {
    config: Config,
    authority: ArcSwap<Authority>,
    tokens: Tokens,
    publisher: Publisher,
    /// Serialises what reads the directories and publishes.
    files: Mutex<()>,
    view: ArcSwap<View>,
    /// Whether the API server has said who is in the mesh. What it said is in the view.
    heard: AtomicBool,
    identity: ArcSwap<Identity>,
    /// Held while the authority or the server's own certificate is replaced.
    trouble: Mutex<Trouble>,
    budget: Mutex<Budget>,
    /// The agents that are connected.
    pub sessions: Sessions,
    /// Of this replica: its host's, on Kubernetes its pod's.
    pub name: String,
    /// Another one for each process.
    pub instance: u64,
    /// The counters.
    pub metrics: Metrics,
    /// When the server was started.
    pub started: SystemTime,
}

/// What the directories say at the moment.
#[derive(Debug)]
pub struct View {
    /// The workloads.
    pub registry: Registry,
    /// What each service file says.
    pub service_files: services::Files,
    /// The services in force.
    pub services: Services,
    /// Services, and addresses of services, that have no effect.
    pub service_problems: Vec<Problem>,
    /// The roots.
    pub bundle: Arc<TrustBundle>,
    /// Files of roots that have no effect.
    pub bundle_problems: Vec<Problem>,
    /// Directories that cannot be read. What they said before stays in force.
    pub unreadable: Vec<Problem>,
}

/// The server's own certificate.
#[derive(Debug)]
struct Identity {
    key: Arc<CertifiedKey>,
    renew: SystemTime,
}

/// What stands between the CA and its next certificate.
#[derive(Debug, Default)]
struct Trouble {
    renewal: Option<String>,
    secret: Option<String>,
}

/// Why the operator's request was not done.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// It contradicts what is there.
    #[error("{0}")]
    Conflict(String),
    /// There is nothing to do it to.
    #[error("{0}")]
    NotFound(String),
    /// It makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// A file cannot be written.
    #[error("cannot write {path}: {source}")]
    Storage {
        /// The file.
        path: String,
        /// What the kernel said.
        source: io::Error,
    },
}

impl Control {
    /// Opens or creates everything in the state directory and reads the registry.
    ///
    /// # Errors
    ///
    /// What stands against it, naming the file.
    pub fn open(config: Config, now: SystemTime) -> anyhow::Result<Self> {
        let dir = &config.state_dir;
        let named = |path: &std::path::Path| path.display().to_string();
        files::private_dir(dir).with_context(|| format!("state_dir {}", named(dir)))?;
        for dir in config.watched_dirs() {
            std::fs::create_dir_all(&dir).with_context(|| format!("creating {}", named(&dir)))?;
        }
        let authority = ca::open(&config, now).context("the certificate authority")?;
        let joins = dir.join("joins.json");
        let tokens = Tokens::open(joins.clone()).with_context(|| named(&joins))?;
        let starts = dir.join("starts");
        let publisher = match &config.kubernetes {
            Some(_) => Publisher::by_clock(),
            None => Publisher::open(&starts).with_context(|| named(&starts))?,
        };
        let metrics = Metrics::default();
        let identity = identity(&authority, &config, &metrics, now)?;
        let roots = authority.roots().to_vec();
        let bundle = TrustBundle { trust_domain: config.trust_domain.clone(), roots };
        let control = Self {
            authority: ArcSwap::from_pointee(authority),
            tokens,
            publisher,
            files: Mutex::new(()),
            view: ArcSwap::from_pointee(View {
                registry: Registry::default(),
                service_files: services::Files::default(),
                services: Services::default(),
                service_problems: Vec::new(),
                bundle: Arc::new(bundle),
                bundle_problems: Vec::new(),
                unreadable: Vec::new(),
            }),
            heard: AtomicBool::new(false),
            identity: ArcSwap::from_pointee(identity),
            trouble: Mutex::default(),
            budget: Mutex::default(),
            sessions: Sessions::default(),
            name: host_name(),
            instance: rand::random(),
            metrics,
            started: now,
            config,
        };
        control.reload();
        Ok(control)
    }

    /// The configuration.
    pub const fn config(&self) -> &Config {
        &self.config
    }

    /// The CA.
    pub fn authority(&self) -> Arc<Authority> {
        self.authority.load_full()
    }

    /// The join tokens.
    pub const fn tokens(&self) -> &Tokens {
        &self.tokens
    }

    /// The snapshots.
    pub const fn publisher(&self) -> &Publisher {
        &self.publisher
    }

    /// What the directories say.
    pub fn view(&self) -> Arc<View> {
        self.view.load_full()
    }

    /// The certificate and key to serve with. The chain ends with the root, by whose fingerprint
    /// a joining agent knows it.
    pub fn identity(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.identity.load().key)
    }

    /// What keeps the CA from going on, for the operator.
    pub fn ca_trouble(&self) -> Vec<String> {
        let trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        let renewal = trouble
            .renewal
            .iter()
            .map(|error| format!("the control plane's certificates cannot be renewed: {error}"));
        renewal.chain(trouble.secret.iter().cloned()).collect()
    }

    /// Takes what the API server says for the registry. Blocks on the file system.
    pub fn set_cluster(&self, registry: Registry, services: services::Files) {
        let _one_at_a_time = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        self.reload_locked(Some((registry, services)));
        self.heard.store(true, Ordering::Release);
    }

    /// Whether it is known who is in the mesh: on Kubernetes, after the API server has said it.
    pub fn is_ready(&self) -> bool {
        self.config.kubernetes.is_none() || self.heard.load(Ordering::Acquire)
    }

    /// Whether a node may have a certificate: on Kubernetes, while the API server knows it.
    fn exists(&self, node: &str) -> Result<(), Refusal> {
        let view = self.view.load();
        let found = || view.services.nodes.binary_search_by(|found| (*found.name).cmp(node));
        if self.config.kubernetes.is_none() || found().is_ok() {
            Ok(())
        } else {
            Err(Refusal::NodeGone(node.to_owned()))
        }
    }

    /// Reads all directories anew and publishes what they say. Blocks on the file system.
    pub fn reload(&self) {
        let _one_at_a_time = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        self.reload_locked(None);
    }

    /// `said`: what the API server has just said, in place of the directories of workloads and
    /// services.
    fn reload_locked(&self, said: Option<(Registry, services::Files)>) {
        let [registry_dir, services_dir, bundle_dir] = self.config.watched_dirs();
        let before = self.view.load();
        let mut unreadable = Vec::new();
        let mut failed = |dir: &std::path::Path, error: io::Error| {
            let (file, reason) = (dir.display().to_string(), error.to_string());
            unreadable.push(Problem { file, reason });
        };
        let (registry, service_files) = match said {
            Some(said) => said,
            // Not an empty mesh, but one that is not known yet.
            None if !self.is_ready() => return,
            None if self.config.kubernetes.is_some() => {
                (before.registry.clone(), before.service_files.clone())
            }
            None => {
                let registry = match files::sources(&registry_dir, &["yaml", "yml"]) {
                    Ok(sources) => Registry::resolve(sources),
                    Err(error) => {
                        failed(&registry_dir, error);
                        before.registry.clone()
                    }
                };
                let services = match files::sources(&services_dir, &["yaml", "yml"]) {
                    Ok(sources) => services::Files::read(sources),
                    Err(error) => {
                        failed(&services_dir, error);
                        before.service_files.clone()
                    }
                };
                (registry, services)
            }
        };
        let registry = registry.sharing_with(&before.registry);
        let (services, conflicts) =
            services::resolve(&service_files.claims, &service_files.nodes, &registry);
        let services = services.sharing_with(&before.services);
        let service_problems = [service_files.problems.as_slice(), &conflicts].concat();
        let (bundle, bundle_problems) = match files::sources(&bundle_dir, &["pem", "crt"]) {
            Ok(sources) => {
                let (td, authority) = (&self.config.trust_domain, self.authority.load());
                let (bundle, problems) = bundle::assemble(td, authority.roots(), sources);
                // The same one as long as it says the same: certificates are judged anew by another.
                let same = Some(&before.bundle).filter(|before| ***before == bundle);
                (same.map_or_else(|| Arc::new(bundle.clone()), Arc::clone), problems)
            }
            Err(error) => {
                failed(&bundle_dir, error);
                (Arc::clone(&before.bundle), before.bundle_problems.clone())
            }
        };
        let view = View {
            registry,
            service_files,
            services,
            service_problems,
            bundle,
            bundle_problems,
            unreadable,
        };
        log_changes(&before, &view);
        let seconds = self.config.svid_lifetime.as_secs();
        let settings =
            api::Settings { svid_lifetime_seconds: u32::try_from(seconds).unwrap_or(u32::MAX) };
        let view = Arc::new(view);
        // First what requests are judged by, then what agents are told: an agent may ask at once.
        self.view.store(Arc::clone(&view));
        self.publisher.publish(Content {
            bundle: Some(Arc::clone(&view.bundle)),
            settings,
            workloads: view.registry.shared().cloned().collect(),
            services: view.services.clone(),
        });
    }

    /// Registers a workload, or changes the one that was registered like this before. It is in
    /// force when this returns. Blocks on the file system.
    ///
    /// # Errors
    ///
    /// [`AdminError::Conflict`], [`AdminError::Storage`].
    pub fn register(&self, workload: &Workload) -> Result<(), AdminError> {
        self.not_on_kubernetes()?;
        let _one_at_a_time = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        // The files may be ahead of the last event.
        self.reload_locked(None);
        let file = registry::file_name(&workload.uid);
        self.view.load().registry.admits(workload, &file).map_err(AdminError::Conflict)?;
        let path = self.config.registry_dir().join(&file);
        serde_saphyr::to_string(workload)
            .map_err(io::Error::other)
            .and_then(|text| files::replace(&path, text.as_bytes()))
            .map_err(|source| AdminError::Storage { path: path.display().to_string(), source })?;
        self.reload_locked(None);
        match self.view.load().registry.get(&workload.uid) {
            Some(found) if found == workload => Ok(()),
            Some(_) | None => Err(AdminError::Conflict(format!(
                "{file} was written but is not in force: see `mesh-control status`"
            ))),
        }
    }

    /// Removes a workload's file, whichever it is. Blocks on the file system.
    ///
    /// # Errors
    ///
    /// [`AdminError::NotFound`], [`AdminError::Storage`].
    pub fn deregister(&self, uid: &str) -> Result<(), AdminError> {
        self.not_on_kubernetes()?;
        let _one_at_a_time = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        self.reload_locked(None);
        let view = self.view.load();
        let file = view
            .registry
            .file(uid)
            .ok_or_else(|| AdminError::NotFound(format!("no workload has the UID {uid}")))?;
        let path = self.config.registry_dir().join(file);
        files::remove(&path)
            .map_err(|source| AdminError::Storage { path: path.display().to_string(), source })?;
        self.reload_locked(None);
        Ok(())
    }

    fn not_on_kubernetes(&self) -> Result<(), AdminError> {
        match self.config.kubernetes {
            Some(_) => Err(AdminError::Conflict(
                "on Kubernetes the API server says who is in the mesh: label pods or namespaces"
                    .to_owned(),
            )),
            None => Ok(()),
        }
    }

    /// Makes a join token. Its text is returned, and never known here again.
    ///
    /// # Errors
    ///
    /// [`AdminError::Invalid`], [`AdminError::Storage`].
    pub fn create_token(
        &self,
        node: &str,
        ttl: Duration,
        now: SystemTime,
    ) -> Result<String, AdminError> {
        const LONGEST: Duration = Duration::from_secs(30 * 24 * 60 * 60);
        self.not_on_kubernetes()?;
        if ttl < Duration::from_secs(1) || ttl > LONGEST {
            return Err(AdminError::Invalid("the ttl must be at least 1s, at most 30d".to_owned()));
        }
        let root = Fingerprint::of(self.authority.load().root());
        let token = JoinToken::new(self.config.trust_domain.clone(), node, root, rand::random())
            .map_err(|error| AdminError::Invalid(error.to_string()))?;
        self.tokens
            .add(&token, now + ttl, now)
            .map_err(|source| AdminError::Storage { path: "the join tokens".to_owned(), source })?;
        tracing::info!(node, ttl = %humantime::format_duration(ttl), "made a join token");
        Ok(token.reveal())
    }

    /// Trades a token for a node's certificate. Blocks on the file system.
    ///
    /// # Errors
    ///
    /// A [`Refusal`]; the token is then unused, unless signing itself failed.
    pub fn join(&self, token: &str, csr: &[u8], now: SystemTime) -> Result<Issued, Refusal> {
        if self.config.kubernetes.is_some() {
            return Err(AttestError::TokenNeeded.into());
        }
        let token: JoinToken = token.parse()?;
        let key = ca::requested_key(csr)?;
        let not_before = now - self.config.clock_skew;
        let node = self.tokens.consume(&token, not_before, now)?;
        self.sessions.end(&node);
        self.issue_node(node, &key, now)
    }

    /// Issues a certificate to a node that is known: by the certificate that it renews, or by its
    /// agent's service account token.
    ///
    /// # Errors
    ///
    /// A [`Refusal`].
    pub fn renew_node(&self, node: String, csr: &[u8], now: SystemTime) -> Result<Issued, Refusal> {
        self.exists(&node)?;
        self.issue_node(node, &ca::requested_key(csr)?, now)
    }

    fn issue_node(
        &self,
        node: String,
        key: &impl PublicKeyData,
        now: SystemTime,
    ) -> Result<Issued, Refusal> {
        let id = SpiffeId::Node(self.config.trust_domain.clone(), node);
        let lifetime = self.config.node_lifetime;
        self.issue(&Subject { id, pod: None }, key, lifetime, now)
    }

    /// Issues a pod's certificate to the node on which the registry places that pod.
    ///
    /// # Errors
    ///
    /// A [`Refusal`].
    pub fn issue_svid(
        &self,
        node: &str,
        uid: &str,
        csr: &[u8],
        now: SystemTime,
    ) -> Result<Issued, Refusal> {
        let view = self.view.load();
        let workload = view.registry.on_node(uid, node)?;
        let id = workload.id(&self.config.trust_domain).map_err(SvidError::from)?;
        let subject = Subject { id, pod: Some(workload.pod()) };
        self.issue(&subject, &ca::requested_key(csr)?, self.config.svid_lifetime, now)
    }

    fn issue(
        &self,
        subject: &Subject,
        key: &impl PublicKeyData,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Issued, Refusal> {
        let issued = self.authority.load().issue(subject, key, lifetime, now)?;
        self.metrics.issued(Kind::of(&subject.id));
        let pod = subject.pod.as_ref().map(|pod| pod.uid.as_str());
        let not_after = time::OffsetDateTime::from(issued.leaf.not_after);
        tracing::info!(id = %subject.id, pod, serial = issued.leaf.serial, %not_after, "issued");
        Ok(issued)
    }

    /// Decides which node a connection belongs to, from the chain it showed and nothing else. This
    /// is asked anew for each call: bundle, clock and joins may have changed since the handshake.
    ///
    /// # Errors
    ///
    /// A [`Refusal`].
    pub fn authenticate(
        &self,
        chain: Option<&[CertificateDer<'static>]>,
        now: SystemTime,
    ) -> Result<(String, Leaf), Refusal> {
        let leaf = self.verify(chain, now)?;
        let SpiffeId::Node(_, node) = &leaf.id else {
            return Err(SvidError::Kind { expected: Kind::Node, found: leaf.id }.into());
        };
        self.admits(node, &leaf)?;
        Ok((node.clone(), leaf))
    }

    /// Decides whether a node whose certificate is good is still one of the mesh.
    ///
    /// # Errors
    ///
    /// A [`Refusal`].
    pub fn admits(&self, node: &str, leaf: &Leaf) -> Result<(), Refusal> {
        self.exists(node)?;
        // Replicas share no record of joins: there the node's existence is what counts.
        if self.config.kubernetes.is_none() && self.tokens.is_void(node, leaf.not_before) {
            return Err(Refusal::Void(node.to_owned()));
        }
        Ok(())
    }

    /// Issues by another CA from now on, and trusts its roots. Blocks on the file system.
    ///
    /// # Errors
    ///
    /// Any [`CaError`] of making the server's own certificate; the CA is then the one before.
    pub fn set_authority(&self, authority: Authority, now: SystemTime) -> Result<(), CaError> {
        {
            let _one_at_a_time = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
            let identity = identity(&authority, &self.config, &self.metrics, now)?;
            self.authority.store(Arc::new(authority));
            self.identity.store(Arc::new(identity));
        }
        self.reload();
        Ok(())
    }

    /// Notes what is wrong with the Secret of the CA, or that nothing is.
    pub fn set_secret_trouble(&self, trouble: Option<String>) {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).secret = trouble;
    }

    /// Decides whether a connection is of a replica of this control plane, from the chain it showed.
    ///
    /// # Errors
    ///
    /// A [`Refusal`].
    pub fn authenticate_replica(
        &self,
        chain: Option<&[CertificateDer<'static>]>,
        now: SystemTime,
    ) -> Result<(), Refusal> {
        match self.verify(chain, now)?.id {
            SpiffeId::Control(_) => Ok(()),
            found @ (SpiffeId::Workload(_) | SpiffeId::Node(..)) => {
                Err(SvidError::Kind { expected: Kind::Control, found }.into())
            }
        }
    }

    fn verify(
        &self,
        chain: Option<&[CertificateDer<'static>]>,
        now: SystemTime,
    ) -> Result<Leaf, Refusal> {
        let chain = chain.ok_or(Refusal::NoCertificate)?;
        Ok(self.view.load().bundle.verify(chain, Usage::Client, unix(now))?)
    }

    /// Whether one more report of this pod may be shown.
    pub fn may_report(&self, pod: &Workload, now: Instant) -> bool {
        self.budget.lock().unwrap_or_else(PoisonError::into_inner).take(pod, now)
    }

    /// Renews what is past half of its life: the issuing CA, and the server's own certificate.
    /// Returns when to do it again.
    pub fn maintain(&self, now: SystemTime) -> SystemTime {
        let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        let authority = self.authority.load();
        let result = authority.renew(now).and_then(|_| {
            if now >= self.identity.load().renew {
                let identity = identity(&authority, &self.config, &self.metrics, now)?;
                self.identity.store(Arc::new(identity));
            }
            Ok(())
        });
        if let Err(error) = &result {
            tracing::error!(%error, "renewing the control plane's certificates failed");
        }
        trouble.renewal = result.err().map(|error| error.to_string());
        let due = self.identity.load().renew;
        if authority.renews_itself() { due.min(authority.issuer_validity().half()) } else { due }
    }
}

fn identity(
    authority: &Authority,
    config: &Config,
    metrics: &Metrics,
    now: SystemTime,
) -> Result<Identity, CaError> {
    let subject = Subject { id: SpiffeId::Control(config.trust_domain.clone()), pod: None };
    let key = KeyPair::generate()?;
    let mut issued = authority.issue(&subject, &key, config.node_lifetime, now)?;
    issued.chain.push(authority.root().clone());
    let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
    let key =
        certified_key(issued.chain, key).map_err(|error| CaError::Unusable(error.to_string()))?;
    metrics.issued(Kind::Control);
    let life = issued.leaf.not_after.duration_since(now).unwrap_or_default();
    Ok(Identity { key, renew: now + life / 2 })
}

fn log_changes(before: &View, after: &View) {
    let changes = before.registry.changes(&after.registry);
    for workload in changes.added {
        tracing::info!(uid = workload.uid, node = workload.node, "workload registered");
    }
    for workload in changes.changed {
        tracing::info!(uid = workload.uid, node = workload.node, "workload changed");
    }
    for workload in changes.removed {
        tracing::info!(uid = workload.uid, node = workload.node, "workload deregistered");
    }
    let new_in_bundle =
        after.bundle_problems.iter().filter(|p| !before.bundle_problems.contains(p));
    let new_in_services =
        after.service_problems.iter().filter(|p| !before.service_problems.contains(p));
    let new_dirs = after.unreadable.iter().filter(|p| !before.unreadable.contains(p));
    for problem in
        changes.problems.into_iter().chain(new_in_services).chain(new_in_bundle).chain(new_dirs)
    {
        tracing::warn!(file = problem.file, reason = problem.reason, "no effect");
    }
    if before.bundle.roots != after.bundle.roots {
        let roots: Vec<_> = after.bundle.fingerprints().iter().map(ToString::to_string).collect();
        tracing::info!(?roots, "trust bundle");
    }
}

fn host_name() -> String {
    nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_default()
}

/// The form in which certificates are judged.
pub(crate) fn unix(time: SystemTime) -> UnixTime {
    UnixTime::since_unix_epoch(time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default())
}
