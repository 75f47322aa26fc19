//! Why a request of an agent was not granted.

use mesh_common::{join::TokenError, svid::SvidError};
use tonic::Status;

use crate::{
    ca::{CaError, CsrError},
    kubernetes::attest::AttestError,
    tokens::TokenRefusal,
};

/// Why a request of an agent was not granted. The text is for whoever runs the agent.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// Not the text of a token.
    #[error(transparent)]
    TokenForm(#[from] TokenError),
    /// A token that is not accepted.
    #[error(transparent)]
    Token(#[from] TokenRefusal),
    /// A service account token that is not accepted, or the wrong kind of token.
    #[error(transparent)]
    Attest(#[from] AttestError),
    /// The API server has no such node.
    #[error("the cluster has no node {0}, or this control plane has not heard of it yet")]
    NodeGone(String),
    /// The signing request.
    #[error(transparent)]
    Csr(#[from] CsrError),
    /// No certificate was shown on this connection.
    #[error("only a node may ask this: connect with the node's certificate")]
    NoCertificate,
    /// The certificate shown is not, or no longer, good.
    #[error(transparent)]
    Certificate(#[from] SvidError),
    /// The node has joined again since.
    #[error(
        "this certificate of node {0} is void: the node has joined again since, or never joined \
         here; join with a new token"
    )]
    Void(String),
    /// The registry does not know the pod.
    #[error("no pod with the UID {uid} is registered on node {node}")]
    UnknownPod {
        /// As asked for.
        uid: String,
        /// Who asked.
        node: String,
    },
    /// The registry places the pod elsewhere. To the node it says what the one before does.
    #[error("no pod with the UID {uid} is registered on node {node}")]
    ForeignPod {
        /// As asked for.
        uid: String,
        /// Who asked.
        node: String,
    },
    /// The CA cannot issue.
    #[error("the control plane cannot issue certificates at the moment: {0}")]
    Ca(#[from] CaError),
}

/// What refusals are counted by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The TLS handshake failed.
    Handshake,
    /// A token that was never made here, or a damaged one.
    TokenUnknown,
    /// A token that was used before.
    TokenUsed,
    /// A token that has expired.
    TokenExpired,
    /// A service account token that is not accepted.
    ServiceAccountToken,
    /// A node that is not in the cluster.
    NodeGone,
    /// A signing request that is not acceptable.
    Csr,
    /// A call that needs a certificate, without one.
    NoCertificate,
    /// A certificate that is not good, or not any more.
    Certificate,
    /// A node's certificate from before it joined again.
    NodeVoid,
    /// A pod that is not registered.
    PodUnknown,
    /// A pod of another node.
    PodForeign,
    /// Our own fault.
    Internal,
}

impl Reason {
    /// Every reason.
    pub const ALL: [Self; 13] = [
        Self::Handshake,
        Self::TokenUnknown,
        Self::TokenUsed,
        Self::TokenExpired,
        Self::ServiceAccountToken,
        Self::NodeGone,
        Self::Csr,
        Self::NoCertificate,
        Self::Certificate,
        Self::NodeVoid,
        Self::PodUnknown,
        Self::PodForeign,
        Self::Internal,
    ];

    /// The name shown by `status` and in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Handshake => "handshake",
            Self::TokenUnknown => "token-unknown",
            Self::TokenUsed => "token-used",
            Self::TokenExpired => "token-expired",
            Self::ServiceAccountToken => "service-account-token",
            Self::NodeGone => "node-gone",
            Self::Csr => "csr",
            Self::NoCertificate => "no-certificate",
            Self::Certificate => "certificate",
            Self::NodeVoid => "node-void",
            Self::PodUnknown => "pod-unknown",
            Self::PodForeign => "pod-foreign",
            Self::Internal => "internal",
        }
    }
}

impl Refusal {
    /// What it is counted as.
    pub const fn reason(&self) -> Reason {
        match self {
            Self::TokenForm(_) | Self::Token(TokenRefusal::Unknown) => Reason::TokenUnknown,
            Self::Token(TokenRefusal::Used) => Reason::TokenUsed,
            Self::Token(TokenRefusal::Expired) => Reason::TokenExpired,
            Self::Attest(AttestError::Api(_)) => Reason::Internal,
            Self::Attest(_) => Reason::ServiceAccountToken,
            Self::NodeGone(_) => Reason::NodeGone,
            Self::Csr(_) => Reason::Csr,
            Self::NoCertificate => Reason::NoCertificate,
            Self::Certificate(_) => Reason::Certificate,
            Self::Void(_) => Reason::NodeVoid,
            Self::UnknownPod { .. } => Reason::PodUnknown,
            Self::ForeignPod { .. } => Reason::PodForeign,
            Self::Ca(_) | Self::Token(TokenRefusal::Storage(_)) => Reason::Internal,
        }
    }

    /// What the agent is told.
    pub fn status(&self) -> Status {
        let text = self.to_string();
        match self.reason() {
            Reason::Csr => Status::invalid_argument(text),
            Reason::NoCertificate | Reason::Certificate | Reason::NodeVoid | Reason::Handshake => {
                Status::unauthenticated(text)
            }
            Reason::TokenUnknown
            | Reason::TokenUsed
            | Reason::TokenExpired
            | Reason::ServiceAccountToken
            | Reason::NodeGone
            | Reason::PodUnknown
            | Reason::PodForeign => Status::permission_denied(text),
            // The agent keeps what it has and tries again.
            Reason::Internal => Status::unavailable(text),
        }
    }
}
