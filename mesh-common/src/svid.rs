//! Certificates of the mesh: X.509-SVIDs and the rules they are judged by.
//!
//! The profile is specified in `docs/identity.md`; it is that of
//! <https://github.com/spiffe/spiffe/blob/main/standards/X509-SVID.md>, made narrower. Whoever
//! accepts a certificate does so through [`TrustBundle::verify`], in a TLS handshake through
//! [`PeerVerifier`]: there is no other path.

mod bundle;
mod pod;
mod tls;

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustls::pki_types::CertificateDer;
use x509_parser::{
    certificate::X509Certificate, extensions::GeneralName, prelude::FromDer as _, time::ASN1Time,
};

pub use self::{
    bundle::{Fingerprint, TrustBundle, Usage},
    pod::{POD_EXTENSION_OID, PodRef},
    tls::{Kind, PeerVerifier, certified_key, client_config, crypto_provider, server_config},
};
use crate::spiffe::{SpiffeError, SpiffeId, TrustDomain};

/// Why a certificate, or a trust bundle, was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SvidError {
    /// No certificate was shown.
    #[error("the peer showed no certificate")]
    NoCertificate,
    /// Not an X.509 v3 certificate in DER.
    #[error("not an X.509 v3 certificate: {0}")]
    Malformed(String),
    /// Not exactly one URI among the subject alternative names.
    #[error("a certificate of the mesh has exactly one subject alternative name, a URI: found {0}")]
    SubjectAlternativeName(String),
    /// The URI is no name of the mesh.
    #[error(transparent)]
    Name(#[from] SpiffeError),
    /// A CA's certificate was shown as a peer's own.
    #[error("this is the certificate of a CA, which speaks for nobody")]
    Authority,
    /// Key usages other than those of the profile.
    #[error("key usage: {0}")]
    KeyUsage(&'static str),
    /// A workload's certificate that does not say which pod it was issued for.
    #[error("a workload's certificate without the pod extension: not issued by mesh-control")]
    NoPod,
    /// A certificate of the mesh's own parts that claims to be a pod's.
    #[error("a certificate with the pod extension that names no workload")]
    UnexpectedPod,
    /// The pod extension cannot be read.
    #[error("the pod extension is malformed: {0}")]
    Pod(String),
    /// The validity has ended.
    #[error(
        "the certificate (or its issuer's) expired at {}; check that the renewal works and that \
         the clocks agree", unix(.0)
    )]
    Expired(SystemTime),
    /// The validity has not begun.
    #[error(
        "the certificate (or its issuer's) is not valid before {}; check that the clocks agree",
        unix(.0)
    )]
    NotYetValid(SystemTime),
    /// No chain to a root of the bundle.
    #[error(
        "no root of the trust bundle of {0} vouches for it: it belongs to another mesh, or the \
         trust bundle is out of date"
    )]
    UnknownIssuer(TrustDomain),
    /// The chain is wrong in another way.
    #[error("the certificate chain is refused: {0}")]
    Chain(String),
    /// A name of another trust domain.
    #[error("{found} is not of the trust domain {expected}")]
    TrustDomain {
        /// Ours.
        expected: TrustDomain,
        /// The name in the certificate.
        found: SpiffeId,
    },
    /// A valid certificate, but not of the kind that is accepted here.
    #[error("{found} is not {expected}")]
    Kind {
        /// What is accepted here.
        expected: Kind,
        /// The name in the certificate.
        found: SpiffeId,
    },
    /// A trust bundle that cannot be used.
    #[error("trust bundle: {0}")]
    Bundle(String),
    /// The server did not show the root that was pinned.
    #[error(
        "the control plane's chain does not contain the root with the SHA-256 {0} that the join \
         token names: the token is of another mesh, or somebody intercepts the connection"
    )]
    NotPinned(Fingerprint),
}

/// Seconds since 1970: what `date -d @N` and `openssl` agree on, in whatever zone.
fn unix(time: &SystemTime) -> String {
    time.duration_since(UNIX_EPOCH)
        .map_or_else(|_| "before 1970".to_owned(), |t| format!("@{}", t.as_secs()))
}

impl From<SvidError> for rustls::Error {
    /// Keeps the TLS alert that fits, so that the other side learns why as well.
    #[expect(clippy::wildcard_enum_match_arm, reason = "no alert fits the others better")]
    fn from(error: SvidError) -> Self {
        use rustls::CertificateError;
        Self::InvalidCertificate(match error {
            SvidError::Expired(_) => CertificateError::Expired,
            SvidError::NotYetValid(_) => CertificateError::NotValidYet,
            SvidError::UnknownIssuer(_) => CertificateError::UnknownIssuer,
            error => CertificateError::Other(rustls::OtherError(Arc::new(error))),
        })
    }
}

/// What a certificate of the mesh says, apart from who vouches for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// The only name in the certificate.
    pub id: SpiffeId,
    /// The pod it was issued for: present exactly if `id` is a workload's.
    pub pod: Option<PodRef>,
    /// The serial number in hexadecimal, as `openssl x509 -serial` prints it, but in lower case.
    pub serial: String,
    /// Not valid before.
    pub not_before: SystemTime,
    /// Not valid after.
    pub not_after: SystemTime,
}

impl Leaf {
    /// Reads a certificate and checks its form. It says nothing about who signed it: see
    /// [`TrustBundle::verify`].
    ///
    /// # Errors
    ///
    /// Every [`SvidError`] that concerns a single certificate.
    pub fn parse(certificate: &CertificateDer<'_>) -> Result<Self, SvidError> {
        let (rest, x509) = X509Certificate::from_der(certificate)
            .map_err(|error| SvidError::Malformed(error.to_string()))?;
        if !rest.is_empty() {
            return Err(SvidError::Malformed(format!("{} bytes too many", rest.len())));
        }
        check_usage(&x509)?;
        let id = subject(&x509)?;
        let pod = pod::find(&x509)?;
        match (&id, &pod) {
            (SpiffeId::Workload(_), None) => return Err(SvidError::NoPod),
            (SpiffeId::Node(..) | SpiffeId::Control(_), Some(_)) => {
                return Err(SvidError::UnexpectedPod);
            }
            (SpiffeId::Workload(_), Some(_))
            | (SpiffeId::Node(..) | SpiffeId::Control(_), None) => {}
        }
        Ok(Self {
            id,
            pod,
            serial: serial(x509.raw_serial()),
            not_before: system_time(x509.validity.not_before)?,
            not_after: system_time(x509.validity.not_after)?,
        })
    }
}

/// A leaf signs handshakes and nothing else.
fn check_usage(x509: &X509Certificate<'_>) -> Result<(), SvidError> {
    if x509.basic_constraints().map_err(malformed)?.is_some_and(|constraints| constraints.value.ca)
    {
        return Err(SvidError::Authority);
    }
    let usage = x509
        .key_usage()
        .map_err(malformed)?
        .ok_or(SvidError::KeyUsage("the extension is missing"))?;
    if !usage.value.digital_signature() {
        return Err(SvidError::KeyUsage("digitalSignature is missing"));
    }
    if usage.value.key_cert_sign() || usage.value.crl_sign() {
        return Err(SvidError::Authority);
    }
    // Which of the two is needed depends on the role and is checked with the chain. Without this
    // extension a certificate would be good for both.
    if x509.extended_key_usage().map_err(malformed)?.is_none() {
        return Err(SvidError::KeyUsage("the extended key usage is missing"));
    }
    Ok(())
}

fn subject(x509: &X509Certificate<'_>) -> Result<SpiffeId, SvidError> {
    let names = x509.subject_alternative_name().map_err(malformed)?;
    let found = match names.map(|extension| extension.value.general_names.as_slice()) {
        Some([GeneralName::URI(uri)]) => return Ok(uri.parse()?),
        Some([]) | None => "none".to_owned(),
        Some([other]) => other.to_string(),
        Some(several) => several.len().to_string(),
    };
    Err(SvidError::SubjectAlternativeName(found))
}

fn malformed(error: x509_parser::error::X509Error) -> SvidError {
    SvidError::Malformed(error.to_string())
}

/// Without the zero byte that keeps a DER integer positive.
fn serial(der: &[u8]) -> String {
    crate::hex::encode(match der {
        [0, rest @ ..] if !rest.is_empty() => rest,
        all => all,
    })
}

fn system_time(time: ASN1Time) -> Result<SystemTime, SvidError> {
    u64::try_from(time.timestamp())
        .map(|seconds| UNIX_EPOCH + Duration::from_secs(seconds))
        .map_err(|_| SvidError::Malformed("validity before 1970".to_owned()))
}

#[cfg(test)]
mod tests;
