//! The roots that are trusted, and the one function that judges a chain.

use std::{fmt, str::FromStr, time::SystemTime};

use rustls::pki_types::{CertificateDer, TrustAnchor, UnixTime};
use sha2::{Digest as _, Sha256};
use webpki::{EndEntityCert, KeyUsage, anchor_from_trusted_cert};
use x509_parser::{
    certificate::X509Certificate, extensions::GeneralName, prelude::FromDer as _, time::ASN1Time,
};

use super::{Leaf, SvidError, tls};
use crate::{api, spiffe::TrustDomain};

/// More roots than any rotation needs: each one costs time in every handshake.
const MAX_ROOTS: usize = 16;

/// The role in which a peer shows its certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Usage {
    /// The peer has dialled.
    Client,
    /// The peer was dialled.
    Server,
}

/// The SHA-256 of a certificate's DER.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// Computes it.
    pub fn of(certificate: &CertificateDer<'_>) -> Self {
        Self(Sha256::digest(certificate).into())
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for Fingerprint {
    type Err = &'static str;

    /// Reads what `Display` prints: 64 digits of lower case hexadecimal.
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        crate::hex::decode(s).map(Self).ok_or("a fingerprint has 64 hexadecimal digits (0-9, a-f)")
    }
}

/// The roots of one trust domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrustBundle {
    /// The only trust domain these roots may vouch for.
    pub trust_domain: TrustDomain,
    /// Any of them will do.
    pub roots: Vec<CertificateDer<'static>>,
}

impl TrustBundle {
    /// Reads a bundle that the control plane sent, and checks that every root can be used.
    ///
    /// # Errors
    ///
    /// [`SvidError::Bundle`], [`SvidError::Name`].
    pub fn from_api(bundle: api::TrustBundle) -> Result<Self, SvidError> {
        let bundle = Self {
            trust_domain: bundle.trust_domain.parse()?,
            roots: bundle.roots.into_iter().map(CertificateDer::from).collect(),
        };
        bundle.check()?;
        Ok(bundle)
    }

    /// The form in which the control plane sends it.
    pub fn to_api(&self) -> api::TrustBundle {
        api::TrustBundle {
            trust_domain: self.trust_domain.to_string(),
            roots: self.roots.iter().map(|root| root.to_vec()).collect(),
        }
    }

    /// Checks that there are roots, not too many, and that each one can be used.
    ///
    /// # Errors
    ///
    /// [`SvidError::Bundle`].
    pub fn check(&self) -> Result<(), SvidError> {
        if self.roots.is_empty() || self.roots.len() > MAX_ROOTS {
            return Err(SvidError::Bundle(format!(
                "{} roots: there must be 1 to {MAX_ROOTS}",
                self.roots.len()
            )));
        }
        self.roots.iter().try_for_each(|root| anchor(root).map(drop))
    }

    /// The fingerprints of the roots, in their order.
    pub fn fingerprints(&self) -> Vec<Fingerprint> {
        self.roots.iter().map(Fingerprint::of).collect()
    }

    /// Judges a chain, leaf first: it leads to one of the roots, everything in it and the root are
    /// valid `now`, the leaf is of the mesh's profile, may be used in that role, and is of this
    /// trust domain.
    ///
    /// # Errors
    ///
    /// The first thing that is wrong.
    pub fn verify(
        &self,
        chain: &[CertificateDer<'_>],
        usage: Usage,
        now: UnixTime,
    ) -> Result<Leaf, SvidError> {
        let (end_entity, intermediates) = chain.split_first().ok_or(SvidError::NoCertificate)?;
        let mut anchors = Vec::with_capacity(self.roots.len());
        for root in &self.roots {
            let (anchor, validity) = anchor(root)?;
            // webpki takes an anchor as trusted for ever.
            if timestamp(now).is_some_and(|now| validity.is_valid_at(now)) {
                anchors.push(anchor);
            }
        }
        EndEntityCert::try_from(end_entity)
            .and_then(|certificate| {
                certificate
                    .verify_for_usage(
                        tls::SIGNATURES_IN_CHAINS,
                        &anchors,
                        intermediates,
                        now,
                        match usage {
                            Usage::Client => KeyUsage::client_auth(),
                            Usage::Server => KeyUsage::server_auth(),
                        },
                        None,
                        None,
                    )
                    .map(drop)
            })
            .map_err(|error| self.refusal(error))?;
        let leaf = Leaf::parse(end_entity)?;
        if *leaf.id.trust_domain() != self.trust_domain {
            let expected = self.trust_domain.clone();
            return Err(SvidError::TrustDomain { expected, found: leaf.id });
        }
        Ok(leaf)
    }

    #[expect(clippy::wildcard_enum_match_arm, reason = "webpki's text is good for all the others")]
    fn refusal(&self, error: webpki::Error) -> SvidError {
        let at = |time: UnixTime| {
            SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(time.as_secs())
        };
        match error {
            webpki::Error::CertExpired { not_after, .. } => SvidError::Expired(at(not_after)),
            webpki::Error::CertNotValidYet { not_before, .. } => {
                SvidError::NotYetValid(at(not_before))
            }
            // A root of the same name, with another key, is another root.
            webpki::Error::UnknownIssuer | webpki::Error::InvalidSignatureForPublicKey => {
                SvidError::UnknownIssuer(self.trust_domain.clone())
            }
            webpki::Error::CaUsedAsEndEntity => SvidError::Authority,
            error => SvidError::Chain(error.to_string()),
        }
    }
}

/// A root as webpki wants it, and when it is valid.
fn anchor<'a>(
    root: &'a CertificateDer<'_>,
) -> Result<(TrustAnchor<'a>, x509_parser::certificate::Validity), SvidError> {
    let unusable = |error: &dyn fmt::Display| {
        SvidError::Bundle(format!("the root {}: {error}", Fingerprint::of(root)))
    };
    let (_, x509) = X509Certificate::from_der(root).map_err(|error| unusable(&error))?;
    if !x509.is_ca() {
        return Err(unusable(&"not the certificate of a CA"));
    }
    let anchor = anchor_from_trusted_cert(root).map_err(|error| unusable(&error))?;
    Ok((anchor, x509.validity.clone()))
}

/// Whether a root does not name trust domains other than this one. An operator's own may name none.
pub(super) fn may_vouch_for(root: &CertificateDer<'_>, trust_domain: &TrustDomain) -> bool {
    // What cannot be read is found to be unusable by `anchor`.
    let Ok((_, x509)) = X509Certificate::from_der(root) else { return true };
    let Ok(names) = x509.subject_alternative_name() else { return false };
    let names = names.map(|extension| extension.value.general_names.as_slice()).unwrap_or_default();
    let named = |name: &GeneralName<'_>| {
        let GeneralName::URI(uri) = name else { return None };
        uri.strip_prefix("spiffe://").map(str::to_owned)
    };
    let named: Vec<_> = names.iter().filter_map(named).collect();
    named.is_empty() || named.iter().any(|name| name == trust_domain.as_str())
}

fn timestamp(time: UnixTime) -> Option<ASN1Time> {
    ASN1Time::from_timestamp(i64::try_from(time.as_secs()).ok()?).ok()
}
