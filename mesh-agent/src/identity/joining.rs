//! How a node proves who it is before it has a certificate, and how it then knows the control plane.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use mesh_common::{
    api,
    join::{JoinToken, TokenError},
    svid::{PeerVerifier, SvidError, TrustBundle},
};
use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use tonic::Code;
use zeroize::Zeroizing;

use super::{connect::words, node::NodeError, token_watch::TokenWatch};

/// What a node joins with.
#[derive(Clone, Debug)]
pub enum Credential {
    /// A token that the operator has made for this node. It serves once.
    JoinToken {
        /// Where it is.
        file: PathBuf,
    },
    /// The token by which Kubernetes knows the agent's pod. It serves as often as need be.
    ServiceAccount {
        /// Where it is. The kubelet replaces it.
        token_file: PathBuf,
        /// The roots by which the control plane is known, in PEM.
        bundle_file: PathBuf,
    },
}

/// There is no usable join token: the operator has to do something.
#[derive(Debug, thiserror::Error)]
pub(super) enum JoinTokenError {
    /// There is none.
    #[error(
        "there is no join token: make one with `mesh-control token create` for the node {node} and \
         put it into {}", path.display()
    )]
    Missing {
        /// This node.
        node: String,
        /// Where it is expected.
        path: PathBuf,
    },
    /// It cannot be read.
    #[error("cannot read the join token {}: {source}", path.display())]
    Read {
        /// Where it is expected.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The file contains something else.
    #[error("{}: {source}", path.display())]
    Bad {
        /// Where it is expected.
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
    /// The control plane has seen it already.
    #[error(
        "the join token in {} has served, and serves once: put a new join token in place, and the \
         node joins anew", path.display()
    )]
    Spent {
        /// Where it is.
        path: PathBuf,
    },
    /// The control plane knows the token and does not accept it, or does not know it.
    #[error(
        "the control plane refuses to let the node {node} join: {reason}. A token serves once and \
         not for ever: make a new one with `mesh-control token create` and put it into {}",
        path.display()
    )]
    Refused {
        /// This node.
        node: String,
        /// What the control plane said.
        reason: String,
        /// Where it is expected.
        path: PathBuf,
    },
}

/// A node of a Kubernetes cluster cannot join now.
#[derive(Debug, thiserror::Error)]
pub(super) enum ServiceAccountError {
    /// There is no token.
    #[error(
        "cannot read the service account token {}: {source}. Is the projected volume mounted?",
        path.display()
    )]
    Token {
        /// Where it is expected.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// There are no roots.
    #[error(
        "cannot read the roots of the mesh {}: {source}. Has the control plane written the \
         ConfigMap nodemesh-bundle yet, and is it mounted?", path.display()
    )]
    Roots {
        /// Where they are expected.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The file of the roots contains something else.
    #[error("{}: {reason}. The control plane writes it as the ConfigMap nodemesh-bundle", path.display())]
    BadRoots {
        /// Where they are expected.
        path: PathBuf,
        /// What is wrong with them.
        reason: String,
    },
    /// The control plane does not accept the token.
    #[error(
        "the control plane refuses to let the node {node} join with the service account token of \
         the agent's pod: {reason}"
    )]
    Refused {
        /// This node.
        node: String,
        /// What the control plane said.
        reason: String,
    },
}

impl Credential {
    /// What there is to show now.
    pub(super) fn read(&self, node: &str) -> Result<Ticket, NodeError> {
        Ok(match self {
            Self::JoinToken { file } => Ticket::JoinToken(join_token(file, node)?),
            Self::ServiceAccount { token_file, bundle_file } => {
                let roots = roots(bundle_file)?;
                Ticket::ServiceAccount { token: service_account_token(token_file)?, roots }
            }
        })
    }

    /// Like [`read`](Self::read), but not what has served before.
    pub(super) fn read_another(&self, node: &str, spent: &Spent) -> Result<Ticket, NodeError> {
        let ticket = self.read(node)?;
        match self {
            Self::JoinToken { file } if spent.0.is_some() && ticket.spent() == *spent => {
                Err(JoinTokenError::Spent { path: file.clone() }.into())
            }
            Self::JoinToken { .. } | Self::ServiceAccount { .. } => Ok(ticket),
        }
    }

    /// Tells when there may be something else to show.
    pub(super) fn watch(&self) -> TokenWatch {
        match self {
            Self::JoinToken { file } => TokenWatch::start(file),
            Self::ServiceAccount { .. } => TokenWatch::never(),
        }
    }

    /// Why joining failed, if the control plane has answered.
    pub(super) fn refused(&self, node: &str, status: &tonic::Status) -> NodeError {
        let reason = words(status);
        match self {
            _ if !is_verdict(status.code()) => NodeError::Failed(reason),
            Self::JoinToken { file } => {
                let (node, path) = (node.to_owned(), file.clone());
                JoinTokenError::Refused { node, reason, path }.into()
            }
            Self::ServiceAccount { .. } => {
                ServiceAccountError::Refused { node: node.to_owned(), reason }.into()
            }
        }
    }
}

/// What is shown to join once.
pub(super) enum Ticket {
    JoinToken(JoinToken),
    ServiceAccount { token: Zeroizing<String>, roots: Vec<CertificateDer<'static>> },
}

/// What the control plane will not take again.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Spent(Option<String>);

impl Ticket {
    /// Accepts the control plane, and nobody else.
    pub(super) fn verifier(&self) -> PeerVerifier {
        match self {
            Self::JoinToken(token) => PeerVerifier::pinned(token.trust_domain.clone(), token.root),
            Self::ServiceAccount { roots, .. } => PeerVerifier::anchored(roots.clone()),
        }
    }

    /// Asks for a certificate.
    pub(super) fn request(&self, csr: Vec<u8>) -> api::JoinRequest {
        let (token, service_account_token) = match self {
            Self::JoinToken(token) => (token.reveal(), String::new()),
            Self::ServiceAccount { token, .. } => (String::new(), token.to_string()),
        };
        let agent_version = env!("CARGO_PKG_VERSION").to_owned();
        api::JoinRequest { token, csr, agent_version, service_account_token }
    }

    /// Checks the roots that the control plane sent against those by which it was known.
    pub(super) fn check(&self, bundle: &TrustBundle) -> Result<(), SvidError> {
        match self {
            Self::JoinToken(token) if !bundle.fingerprints().contains(&token.root) => {
                Err(SvidError::NotPinned(token.root))
            }
            Self::JoinToken(_) | Self::ServiceAccount { .. } => Ok(()),
        }
    }

    /// What is to be remembered of it once the control plane has judged it.
    pub(super) fn spent(&self) -> Spent {
        Spent(match self {
            Self::JoinToken(token) => Some(token.digest()),
            Self::ServiceAccount { .. } => None,
        })
    }
}

fn join_token(path: &Path, node: &str) -> Result<JoinToken, JoinTokenError> {
    let (node, path) = (node.to_owned(), path.to_owned());
    let text = match fs::read_to_string(&path) {
        Ok(text) => Zeroizing::new(text),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(JoinTokenError::Missing { node, path });
        }
        Err(source) => return Err(JoinTokenError::Read { path, source }),
    };
    match text.parse::<JoinToken>() {
        Ok(token) if token.node == node => Ok(token),
        Ok(token) => Err(JoinTokenError::OtherNode { node, found: token.node }),
        Err(source) => Err(JoinTokenError::Bad { path, source }),
    }
}

fn service_account_token(path: &Path) -> Result<Zeroizing<String>, ServiceAccountError> {
    let text = fs::read_to_string(path)
        .map_err(|source| ServiceAccountError::Token { path: path.to_owned(), source })?;
    Ok(Zeroizing::new(Zeroizing::new(text).trim().to_owned()))
}

fn roots(path: &Path) -> Result<Vec<CertificateDer<'static>>, ServiceAccountError> {
    let path = path.to_owned();
    let pem = match fs::read(&path) {
        Ok(pem) => pem,
        Err(source) => return Err(ServiceAccountError::Roots { path, source }),
    };
    match CertificateDer::pem_slice_iter(&pem).collect::<Result<Vec<_>, _>>() {
        Ok(roots) if roots.is_empty() => {
            let reason = "there is no certificate in it".to_owned();
            Err(ServiceAccountError::BadRoots { path, reason })
        }
        Ok(roots) => Ok(roots),
        Err(error) => Err(ServiceAccountError::BadRoots { path, reason: error.to_string() }),
    }
}

/// Whether the control plane has looked at the token.
const fn is_verdict(code: Code) -> bool {
    match code {
        Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::FailedPrecondition
        | Code::Unauthenticated => true,
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
        | Code::DataLoss => false,
    }
}
