//! TLS 1.3 with certificates of the mesh: one verifier for both roles, one way to configure it.

use std::{fmt, sync::Arc};

use rustls::{
    ClientConfig, DigitallySignedStruct, DistinguishedName, Error, ServerConfig, SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{
        CryptoProvider, WebPkiSupportedAlgorithms,
        aws_lc_rs::{self, cipher_suite, kx_group},
        verify_tls13_signature,
    },
    pki_types::{
        CertificateDer, PrivateKeyDer, ServerName, SignatureVerificationAlgorithm, UnixTime,
    },
    server::{
        NoServerSessionStorage,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::{CertifiedKey, SingleCertAndKey},
    version::TLS13,
};
use webpki::aws_lc_rs::{self as algorithm, ECDSA_P256_SHA256};

use super::{Fingerprint, Leaf, SvidError, TrustBundle, Usage, bundle::may_vouch_for};
use crate::spiffe::{SpiffeId, TrustDomain};

/// What may sign a certificate: ours are P-256, an operator's CA may be another.
pub(super) const SIGNATURES_IN_CHAINS: &[&dyn SignatureVerificationAlgorithm] = &[
    ECDSA_P256_SHA256,
    algorithm::ECDSA_P256_SHA384,
    algorithm::ECDSA_P384_SHA256,
    algorithm::ECDSA_P384_SHA384,
    algorithm::ED25519,
    algorithm::RSA_PKCS1_2048_8192_SHA256,
    algorithm::RSA_PKCS1_2048_8192_SHA384,
    algorithm::RSA_PKCS1_2048_8192_SHA512,
];

/// What may sign a handshake: every leaf has a P-256 key.
const SIGNATURES_IN_HANDSHAKES: WebPkiSupportedAlgorithms = WebPkiSupportedAlgorithms {
    all: SIGNATURES_IN_CHAINS,
    mapping: &[(SignatureScheme::ECDSA_NISTP256_SHA256, &[ECDSA_P256_SHA256])],
};

/// The three parts that have certificates. One kind is never accepted for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A pod.
    Workload,
    /// A node's agent.
    Node,
    /// The control plane.
    Control,
}

impl Kind {
    /// The kind of a name.
    pub const fn of(id: &SpiffeId) -> Self {
        match id {
            SpiffeId::Workload(_) => Self::Workload,
            SpiffeId::Node(..) => Self::Node,
            SpiffeId::Control(_) => Self::Control,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Workload => "a workload",
            Self::Node => "a node",
            Self::Control => "the control plane",
        })
    }
}

#[derive(Debug)]
enum Roots {
    Bundle(Arc<TrustBundle>),
    /// The first contact: whatever root of the peer's chain has this fingerprint.
    Pinned(TrustDomain, Fingerprint),
    /// The first contact, with roots at hand: the peer says which trust domain it is.
    Anchored(Vec<CertificateDer<'static>>),
}

/// Accepts the peers of one [`Kind`], or of two, as client and as server. The server's name is ignored: who
/// the peer is stands in its certificate, and who it ought to be is for the caller to compare.
#[derive(Debug)]
pub struct PeerVerifier {
    roots: Roots,
    kind: Kind,
    other: Option<Kind>,
    client_auth_mandatory: bool,
}

impl PeerVerifier {
    /// Peers of that kind, with a chain to the bundle. A client without a certificate is refused.
    pub const fn new(bundle: Arc<TrustBundle>, kind: Kind) -> Self {
        Self { roots: Roots::Bundle(bundle), kind, other: None, client_auth_mandatory: true }
    }

    /// The control plane, as known from a join token only: the root with that fingerprint must be
    /// part of the chain it shows.
    pub const fn pinned(trust_domain: TrustDomain, root: Fingerprint) -> Self {
        let roots = Roots::Pinned(trust_domain, root);
        Self { roots, kind: Kind::Control, other: None, client_auth_mandatory: true }
    }

    /// The control plane, as known from roots only. A root that names a trust domain vouches for no
    /// other one.
    pub const fn anchored(roots: Vec<CertificateDer<'static>>) -> Self {
        let roots = Roots::Anchored(roots);
        Self { roots, kind: Kind::Control, other: None, client_auth_mandatory: true }
    }

    /// Accepts peers of another kind as well: what each may ask is for the caller to tell apart.
    #[must_use]
    pub fn or(self, other: Kind) -> Self {
        Self { other: Some(other), ..self }
    }

    /// Also lets clients in that show no certificate. A wrong one is refused all the same.
    #[must_use]
    pub fn optional(self) -> Self {
        Self { client_auth_mandatory: false, ..self }
    }

    /// Judges a chain, leaf first, as the handshake does.
    ///
    /// # Errors
    ///
    /// Those of [`TrustBundle::verify`], [`SvidError::Kind`] and [`SvidError::NotPinned`].
    pub fn verify(
        &self,
        chain: &[CertificateDer<'_>],
        usage: Usage,
        now: UnixTime,
    ) -> Result<Leaf, SvidError> {
        let leaf = match &self.roots {
            Roots::Bundle(bundle) => bundle.verify(chain, usage, now)?,
            Roots::Pinned(trust_domain, pin) => {
                pinned_bundle(trust_domain, *pin, chain)?.verify(chain, usage, now)?
            }
            Roots::Anchored(roots) => anchored_bundle(roots, chain)?.verify(chain, usage, now)?,
        };
        let found = Kind::of(&leaf.id);
        if found != self.kind && Some(found) != self.other {
            return Err(SvidError::Kind { expected: self.kind, found: leaf.id });
        }
        Ok(leaf)
    }

    fn verify_handshake(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        usage: Usage,
        now: UnixTime,
    ) -> Result<(), SvidError> {
        let chain: Vec<_> = std::iter::once(end_entity)
            .chain(intermediates)
            .map(|certificate| CertificateDer::from(certificate.as_ref()))
            .collect();
        let result = self.verify(&chain, usage, now).map(drop);
        // rustls hides our reason behind an alert in some cases; the operator should see it.
        if let Err(error) = &result {
            tracing::debug!(%error, ?usage, "certificate refused");
        }
        result
    }
}

/// The bundle of a first contact.
fn pinned_bundle(
    trust_domain: &TrustDomain,
    pin: Fingerprint,
    chain: &[CertificateDer<'_>],
) -> Result<TrustBundle, SvidError> {
    let root = chain
        .iter()
        .find(|certificate| Fingerprint::of(certificate) == pin)
        .ok_or(SvidError::NotPinned(pin))?;
    Ok(TrustBundle { trust_domain: trust_domain.clone(), roots: vec![root.clone().into_owned()] })
}

/// The bundle of a first contact with roots at hand.
fn anchored_bundle(
    roots: &[CertificateDer<'static>],
    chain: &[CertificateDer<'_>],
) -> Result<TrustBundle, SvidError> {
    let leaf = Leaf::parse(chain.first().ok_or(SvidError::NoCertificate)?)?;
    let trust_domain = leaf.id.trust_domain().clone();
    let mut roots = roots.to_vec();
    roots.retain(|root| may_vouch_for(root, &trust_domain));
    Ok(TrustBundle { trust_domain, roots })
}

fn tls13_only() -> Error {
    Error::General("only TLS 1.3 is spoken".to_owned())
}

impl ServerCertVerifier for PeerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.verify_handshake(end_entity, intermediates, Usage::Server, now)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(tls13_only())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &SIGNATURES_IN_HANDSHAKES)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        SIGNATURES_IN_HANDSHAKES.supported_schemes()
    }
}

impl ClientCertVerifier for PeerVerifier {
    fn client_auth_mandatory(&self) -> bool {
        self.client_auth_mandatory
    }

    /// None: a client of the mesh has one certificate and needs no hint.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.verify_handshake(end_entity, intermediates, Usage::Client, now)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        ServerCertVerifier::verify_tls12_signature(self, message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        ServerCertVerifier::verify_tls13_signature(self, message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ServerCertVerifier::supported_verify_schemes(self)
    }
}

/// The cryptography of every connection of the mesh: aws-lc-rs, AES-GCM, and the key exchange that
/// a quantum computer does not break, with X25519 for a peer that lacks it.
pub fn crypto_provider() -> CryptoProvider {
    CryptoProvider {
        cipher_suites: vec![
            cipher_suite::TLS13_AES_256_GCM_SHA384,
            cipher_suite::TLS13_AES_128_GCM_SHA256,
        ],
        kx_groups: vec![kx_group::X25519MLKEM768, kx_group::X25519],
        ..aws_lc_rs::default_provider()
    }
}

/// A chain, leaf first, with its key.
///
/// # Errors
///
/// If the key cannot be read or is not the leaf's.
pub fn certified_key(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<Arc<CertifiedKey>, Error> {
    CertifiedKey::from_der(chain, key, &crypto_provider()).map(Arc::new)
}

/// TLS 1.3 as a client, without resumption: every connection proves both sides anew. Without an
/// identity, as only a joining agent does, no certificate is shown.
///
/// # Errors
///
/// If the cryptography is not available.
pub fn client_config(
    verifier: Arc<PeerVerifier>,
    identity: Option<Arc<CertifiedKey>>,
    alpn: &[u8],
) -> Result<ClientConfig, Error> {
    let builder = ClientConfig::builder_with_provider(Arc::new(crypto_provider()))
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut config = match identity {
        Some(identity) => {
            builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(identity)))
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![alpn.to_vec()];
    config.enable_sni = false;
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// TLS 1.3 as a server, without resumption.
///
/// # Errors
///
/// If the cryptography is not available.
pub fn server_config(
    verifier: Arc<PeerVerifier>,
    identity: Arc<CertifiedKey>,
    alpn: &[u8],
) -> Result<ServerConfig, Error> {
    let mut config = ServerConfig::builder_with_provider(Arc::new(crypto_provider()))
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(identity)));
    config.alpn_protocols = vec![alpn.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}
