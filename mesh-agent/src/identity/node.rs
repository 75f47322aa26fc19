//! The node's own certificate, by which the control plane knows it: got by joining, renewed with
//! itself from then on.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use mesh_common::{
    api,
    spiffe::{SpiffeId, TrustDomain},
    svid::{Kind, Leaf, PeerVerifier, SvidError, TrustBundle, Usage, client_config},
};
use rustls::sign::CertifiedKey;
use tokio::time::timeout;

use super::{
    connect::{Client, ConnectError, Connection, Dialer, connect, words},
    credentials::{self, CredentialsError, NewKey},
    files::PrivateDir,
    joining::{Credential, JoinTokenError, ServiceAccountError, Ticket},
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
    /// There is no join token that could serve.
    #[error(transparent)]
    JoinToken(#[from] JoinTokenError),
    /// The service account token does not serve.
    #[error(transparent)]
    ServiceAccount(#[from] ServiceAccountError),
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
        matches!(self, Self::JoinToken(_))
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
    pub(super) credential: Credential,
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

    /// Trades what the node joins with for a certificate.
    pub(super) async fn join(
        &self,
        ticket: &Ticket,
        now: impl Fn() -> SystemTime,
    ) -> Result<NodeIdentity, NodeError> {
        let tls = client_config(Arc::new(ticket.verifier()), None, api::ALPN)?;
        let connection = connect(&self.dialer, &self.endpoints, tls).await?;
        let Connection { mut client, server_chain, .. } = connection;
        let server = Leaf::parse(server_chain.first().ok_or(SvidError::NoCertificate)?)?;
        let key = NewKey::generate()?;
        let answer = timeout(ANSWER_WITHIN, client.join(ticket.request(key.csr()?)))
            .await
            .map_err(|_| NodeError::Failed("no answer".to_owned()))?
            .map_err(|status| self.credential.refused(&self.node, &status))?
            .into_inner();
        let api::NodeCertificate { chain, bundle } = answer;
        let bundle = TrustBundle::from_api(bundle.unwrap_or_default())?;
        ticket.check(&bundle)?;
        self.accept(&key, &chain, bundle, server.id.trust_domain(), now())
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
                after a restart the node has to join anew");
        }
        Ok(identity)
    }
}
