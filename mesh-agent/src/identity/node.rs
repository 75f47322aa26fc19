//! The node's own certificate, by which the control plane knows it: got for a join token, renewed
//! with itself from then on.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use mesh_common::{
    api,
    join::{JoinToken, TokenError},
    spiffe::{SpiffeId, TrustDomain},
    svid::{Kind, Leaf, PeerVerifier, SvidError, TrustBundle, Usage, client_config},
};
use rustls::sign::CertifiedKey;
use tokio::time::timeout;
use tonic::Code;
use zeroize::Zeroizing;

use super::{
    connect::{Client, ConnectError, Dialer, connect, words},
    credentials::{self, CredentialsError, NewKey},
    files::PrivateDir,
    schedule::rotation_time,
    status::NodeCertificate,
    svid::unix,
};

/// How long the control plane may take to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

const KEY_FILE: &str = "node.pem";
const ROOTS_FILE: &str = "node-roots.pem";

/// Why the node has no certificate, or no new one.
#[derive(Debug, thiserror::Error)]
pub(super) enum NodeError {
    /// There is no token to join with.
    #[error(
        "this node has no valid certificate and there is no join token: make one with \
         `mesh-control token create` for the node {node} and put it into {}", path.display()
    )]
    NoToken {
        /// This node.
        node: String,
        /// Where the token is expected.
        path: PathBuf,
    },
    /// The token cannot be read.
    #[error("cannot read the join token {}: {source}", path.display())]
    ReadToken {
        /// Where the token is expected.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The file contains something else.
    #[error("{}: {source}", path.display())]
    BadToken {
        /// Where the token is expected.
        path: PathBuf,
        /// What is wrong with it.
        source: TokenError,
    },
    /// A token for another node.
    #[error(
        "the join token is for the node {found}, this one is {node}: make one for this node, or \
         correct `node` in the configuration"
    )]
    OtherNode {
        /// This node.
        node: String,
        /// The one in the token.
        found: String,
    },
    /// The control plane knows the token and does not accept it, or does not know it.
    #[error(
        "the control plane refuses to let the node {node} join: {reason}. A token serves once and \
         not for ever: make a new one with `mesh-control token create` and put it into {}",
        path.display()
    )]
    JoinRefused {
        /// This node.
        node: String,
        /// What the control plane said.
        reason: String,
        /// Where the token is expected.
        path: PathBuf,
    },
    /// The control plane cannot be reached, or is not the one that it should be.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The control plane did not do it.
    #[error("the control plane does not issue a node certificate: {0}")]
    Failed(String),
    /// The key or the certificate is unusable.
    #[error("the node certificate from the control plane is not used: {0}")]
    Credentials(#[from] CredentialsError),
    /// The control plane itself would refuse it.
    #[error("the node certificate from the control plane is not used: {0}")]
    Verifier(#[from] SvidError),
    /// It is for another node.
    #[error("the node certificate is for {found}, this is {expected}")]
    Identity {
        /// This node's name.
        expected: Box<SpiffeId>,
        /// The name in the certificate.
        found: Box<SpiffeId>,
    },
    /// The cryptographic library does not work.
    #[error("cannot set up TLS: {0}")]
    Tls(#[from] rustls::Error),
}

impl NodeError {
    /// Whether trying again is of no use before the operator has done something.
    pub(super) const fn needs_a_token(&self) -> bool {
        matches!(
            self,
            Self::NoToken { .. }
                | Self::ReadToken { .. }
                | Self::BadToken { .. }
                | Self::OtherNode { .. }
                | Self::JoinRefused { .. }
        )
    }
}

/// The node's key and certificate, checked.
#[derive(Debug)]
pub(super) struct NodeIdentity {
    pub(super) key: Arc<CertifiedKey>,
    pub(super) leaf: Leaf,
    /// The roots that it was checked against.
    pub(super) bundle: Arc<TrustBundle>,
    /// When to ask for the next one.
    pub(super) next_renewal: SystemTime,
}

impl NodeIdentity {
    /// Checks a certificate. `issued` is when that was, if known.
    fn new(
        name: &SpiffeId,
        key: Arc<CertifiedKey>,
        bundle: Arc<TrustBundle>,
        issued: Option<SystemTime>,
        now: SystemTime,
    ) -> Result<Self, NodeError> {
        let leaf = verify(&key, &bundle, now)?;
        if leaf.id != *name {
            let (expected, found) = (Box::new(name.clone()), Box::new(leaf.id));
            return Err(NodeError::Identity { expected, found });
        }
        let issued = issued.unwrap_or(leaf.not_before);
        let next_renewal = rotation_time(issued, leaf.not_after, &mut rand::rng());
        Ok(Self { key, leaf, bundle, next_renewal })
    }

    /// Whether these roots vouch for it.
    pub(super) fn is_vouched_for_by(&self, bundle: &Arc<TrustBundle>, now: SystemTime) -> bool {
        verify(&self.key, bundle, now).is_ok()
    }

    /// What the operator sees of it.
    pub(super) fn status(&self) -> NodeCertificate {
        NodeCertificate {
            serial: self.leaf.serial.clone(),
            not_after: self.leaf.not_after,
            next_renewal: self.next_renewal,
        }
    }
}

fn verify(
    key: &CertifiedKey,
    bundle: &Arc<TrustBundle>,
    now: SystemTime,
) -> Result<Leaf, SvidError> {
    let verifier = PeerVerifier::new(Arc::clone(bundle), Kind::Node);
    verifier.verify(&key.cert, Usage::Client, unix(now))
}

/// Where and how a node gets its certificate.
#[derive(Debug)]
pub(super) struct NodeIssuer {
    pub(super) node: String,
    pub(super) endpoints: Vec<String>,
    pub(super) join_token_file: PathBuf,
    pub(super) dialer: Dialer,
    pub(super) dir: PrivateDir,
}

impl NodeIssuer {
    /// The stored identity. `None` if there is none; an error says why it cannot be used.
    pub(super) fn load(&self, now: SystemTime) -> Result<Option<NodeIdentity>, String> {
        self.load_inner(now)
            .map_err(|error| format!("{}: {error}", self.dir.path(KEY_FILE).display()))
    }

    fn load_inner(
        &self,
        now: SystemTime,
    ) -> Result<Option<NodeIdentity>, Box<dyn std::error::Error>> {
        let (Some(pem), Some(roots)) = (self.dir.read(KEY_FILE)?, self.dir.read(ROOTS_FILE)?)
        else {
            return Ok(None);
        };
        let key = credentials::from_pem(&pem)?;
        let leaf = Leaf::parse(key.end_entity_cert()?)?;
        let trust_domain = leaf.id.trust_domain().clone();
        let name = SpiffeId::Node(trust_domain.clone(), self.node.clone());
        let roots = credentials::certificates_from_pem(&roots)?;
        let bundle = TrustBundle { trust_domain, roots };
        bundle.check()?;
        Ok(Some(NodeIdentity::new(&name, key, Arc::new(bundle), None, now)?))
    }

    /// Trades a join token for a certificate.
    pub(super) async fn join(
        &self,
        token: &JoinToken,
        now: impl Fn() -> SystemTime,
    ) -> Result<NodeIdentity, NodeError> {
        let verifier = PeerVerifier::pinned(token.trust_domain.clone(), token.root);
        let tls = client_config(Arc::new(verifier), None, api::ALPN)?;
        let mut client = connect(&self.dialer, &self.endpoints, tls).await?.client;
        let key = NewKey::generate()?;
        let request = api::JoinRequest {
            token: token.reveal(),
            csr: key.csr()?,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            service_account_token: String::new(),
        };
        let answer = timeout(ANSWER_WITHIN, client.join(request))
            .await
            .map_err(|_| NodeError::Failed("no answer".to_owned()))?
            .map_err(|status| self.join_refused(&status))?
            .into_inner();
        let api::NodeCertificate { chain, bundle } = answer;
        let bundle = TrustBundle::from_api(bundle.unwrap_or_default())?;
        if !bundle.fingerprints().contains(&token.root) {
            return Err(SvidError::NotPinned(token.root).into());
        }
        self.accept(&key, &chain, bundle, &token.trust_domain, now())
    }

    /// Trades the certificate for a new one, which these roots must vouch for.
    pub(super) async fn renew(
        &self,
        current: &NodeIdentity,
        bundle: &TrustBundle,
        mut client: Client,
        now: impl Fn() -> SystemTime,
    ) -> Result<NodeIdentity, NodeError> {
        let key = NewKey::generate()?;
        let request = api::RenewNodeRequest { csr: key.csr()? };
        let answer = timeout(ANSWER_WITHIN, client.renew_node(request))
            .await
            .map_err(|_| NodeError::Failed("no answer".to_owned()))?
            .map_err(|status| NodeError::Failed(words(&status)))?
            .into_inner();
        let trust_domain = current.leaf.id.trust_domain();
        self.accept(&key, &answer.chain, bundle.clone(), trust_domain, now())
    }

    /// Checks a certificate from the control plane, and stores it.
    fn accept(
        &self,
        key: &NewKey,
        chain: &[Vec<u8>],
        bundle: TrustBundle,
        trust_domain: &TrustDomain,
        now: SystemTime,
    ) -> Result<NodeIdentity, NodeError> {
        let pem = key.to_pem(chain);
        let certified = credentials::from_pem(pem.as_bytes())?;
        let roots = credentials::certificates_to_pem(&bundle.roots);
        let name = SpiffeId::Node(trust_domain.clone(), self.node.clone());
        let identity = NodeIdentity::new(&name, certified, Arc::new(bundle), Some(now), now)?;
        let stored = self
            .dir
            .write(ROOTS_FILE, roots.as_bytes())
            .and_then(|()| self.dir.write(KEY_FILE, pem.as_bytes()));
        if let Err(error) = stored {
            let path = self.dir.path(KEY_FILE);
            tracing::error!(path = %path.display(), %error, "cannot store the node's certificate: \
                after a restart the node needs a new join token");
        }
        Ok(identity)
    }

    /// Reads the join token, and checks that it is for this node.
    pub(super) fn token(&self) -> Result<JoinToken, NodeError> {
        let path = self.join_token_file.as_path();
        let text = read_token(path)?
            .ok_or_else(|| NodeError::NoToken { node: self.node.clone(), path: path.to_owned() })?;
        let token: JoinToken =
            text.parse().map_err(|source| NodeError::BadToken { path: path.to_owned(), source })?;
        if token.node == self.node {
            Ok(token)
        } else {
            Err(NodeError::OtherNode { node: self.node.clone(), found: token.node })
        }
    }

    fn join_refused(&self, status: &tonic::Status) -> NodeError {
        match status.code() {
            // The control plane has looked at the token.
            Code::InvalidArgument
            | Code::NotFound
            | Code::AlreadyExists
            | Code::PermissionDenied
            | Code::FailedPrecondition
            | Code::Unauthenticated => NodeError::JoinRefused {
                node: self.node.clone(),
                reason: words(status),
                path: self.join_token_file.clone(),
            },
            Code::Ok
            | Code::Cancelled
            | Code::Unknown
            | Code::DeadlineExceeded
            | Code::ResourceExhausted
            | Code::Aborted
            | Code::OutOfRange
            | Code::Unimplemented
            | Code::Internal
            | Code::Unavailable
            | Code::DataLoss => NodeError::Failed(words(status)),
        }
    }
}

fn read_token(path: &Path) -> Result<Option<Zeroizing<String>>, NodeError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(Zeroizing::new(text))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(NodeError::ReadToken { path: path.to_owned(), source }),
    }
}
