//! The certificate authority: whom it may name is for others to decide, what a certificate looks
//! like is decided here. The profile is specified in `docs/identity.md`.

mod csr;
mod issuer;
mod store;

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwap;
use mesh_common::{
    spiffe::SpiffeId,
    svid::{Kind, Leaf, PodRef, SvidError},
};
use rcgen::{
    CertificateParams, CustomExtension, DistinguishedName, ExtendedKeyUsagePurpose,
    KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
};
use rustls::pki_types::CertificateDer;
use time::OffsetDateTime;

use self::issuer::Issuing;
pub use self::{
    csr::{CsrError, requested_key},
    issuer::Validity,
    store::{new_root, open, put_root},
};

/// Why the CA cannot be used, or cannot issue.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// A file cannot be read or written.
    #[error("{path}: {source}")]
    File {
        /// The file or directory.
        path: String,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// A file is not what it should be.
    #[error("{path}: {reason}")]
    Content {
        /// The file.
        path: String,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// Certificates of this CA would not be accepted.
    #[error("a certificate signed by this CA would be refused: {0}")]
    Unacceptable(#[from] SvidError),
    /// Signing failed.
    #[error("signing a certificate: {0}")]
    Signing(#[from] rcgen::Error),
    /// The server's own key cannot be used.
    #[error("the control plane's own certificate: {0}")]
    Unusable(String),
    /// The issuer's validity has ended.
    #[error("the issuing CA has expired: renew it and restart mesh-control")]
    Expired,
}

/// Who a certificate speaks for.
#[derive(Clone, Debug)]
pub struct Subject {
    /// The only name.
    pub id: SpiffeId,
    /// The pod, if the name is a workload's.
    pub pod: Option<PodRef>,
}

/// A certificate that was issued.
#[derive(Clone, Debug)]
pub struct Issued {
    /// The leaf, then the CAs up to, and without, the root.
    pub chain: Vec<CertificateDer<'static>>,
    /// What the leaf says.
    pub leaf: Leaf,
}

/// The CA in operation. The issuer is replaced while certificates are issued.
#[derive(Debug)]
pub struct Authority {
    /// The root of what is issued, then those that are trusted before and after its time.
    roots: Vec<CertificateDer<'static>>,
    root_validity: Validity,
    issuing: ArcSwap<Issuing>,
    renewal: Option<store::Renewal>,
    clock_skew: Duration,
}

impl Authority {
    /// The root above everything that is issued.
    pub fn root(&self) -> &CertificateDer<'static> {
        &self.roots[0]
    }

    /// The roots by which the mesh recognises this CA: the present one first, then those that
    /// precede or follow it.
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// When the root is valid.
    pub const fn root_validity(&self) -> Validity {
        self.root_validity
    }

    /// When the present issuer is valid.
    pub fn issuer_validity(&self) -> Validity {
        self.issuing.load().validity
    }

    /// Whether the issuer is renewed by [`Self::renew`], and not by the operator.
    pub const fn renews_itself(&self) -> bool {
        self.renewal.is_some()
    }

    /// Replaces the issuer, if this is its root's to do and half of the issuer's life is over.
    /// Certificates of the one before stay good: their chains carry it.
    ///
    /// # Errors
    ///
    /// Any [`CaError`]; the issuer is then as before.
    pub fn renew(&self, now: SystemTime) -> Result<bool, CaError> {
        match &self.renewal {
            Some(renewal) if now >= self.issuer_validity().half() => {
                self.issuing.store(Arc::new(renewal.renew(now, self.clock_skew)?));
                Ok(true)
            }
            Some(_) | None => Ok(false),
        }
    }

    /// Issues a certificate for a subject: nothing in it but the key is the requester's.
    ///
    /// # Errors
    ///
    /// [`CaError::Signing`], [`CaError::Expired`].
    pub fn issue(
        &self,
        subject: &Subject,
        key: &impl PublicKeyData,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Issued, CaError> {
        let issuing = self.issuing.load();
        let not_after = (now + lifetime).min(issuing.validity.not_after);
        if not_after <= now {
            return Err(CaError::Expired);
        }
        let mut params = profile(subject)?;
        params.serial_number = Some(SerialNumber::from_slice(&rand::random::<[u8; 16]>()));
        params.not_before = OffsetDateTime::from(now - self.clock_skew);
        params.not_after = OffsetDateTime::from(not_after);
        let certificate = params.signed_by(key, &issuing.issuer)?.der().clone();
        let leaf = Leaf::parse(&certificate)?;
        let chain = std::iter::once(certificate).chain(issuing.chain.iter().cloned()).collect();
        Ok(Issued { chain, leaf })
    }
}

/// The fields that are the same in every certificate of a kind.
fn profile(subject: &Subject) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::default();
    // Empty, which makes the alternative name critical (RFC 5280, 4.2.1.6).
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(subject.id.to_string().try_into()?)];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = match Kind::of(&subject.id) {
        // Replicas of the control plane ask each other.
        Kind::Workload | Kind::Control => {
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth]
        }
        Kind::Node => vec![ExtendedKeyUsagePurpose::ClientAuth],
    };
    params.custom_extensions = subject.pod.iter().map(pod_extension).collect();
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

fn pod_extension(pod: &PodRef) -> CustomExtension {
    CustomExtension::from_oid_content(mesh_common::svid::POD_EXTENSION_OID, pod.encode())
}

#[cfg(test)]
mod tests;
