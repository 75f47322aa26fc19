//! A private key made here and the chain that certifies it, in memory and as PEM.

use std::sync::Arc;

use mesh_common::svid;
use rcgen::{CertificateParams, DistinguishedName, KeyPair};
use rustls::{
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    sign::CertifiedKey,
};
use zeroize::{Zeroize as _, Zeroizing};

/// Why a key or a certificate cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum CredentialsError {
    /// The cryptographic library failed.
    #[error("cannot make a key: {0}")]
    Key(#[from] rcgen::Error),
    /// Not PEM, or a part is missing.
    #[error("not a private key and certificates in PEM: {0}")]
    Pem(#[from] rustls::pki_types::pem::Error),
    /// The certificate is not for this key, or one of them is damaged.
    #[error("the certificate does not go with the private key: {0}")]
    Mismatch(#[from] rustls::Error),
}

/// A fresh P-256 key, for one certificate. It is wiped when dropped.
pub(super) struct NewKey(KeyPair);

impl NewKey {
    /// Makes a key.
    pub(super) fn generate() -> Result<Self, CredentialsError> {
        Ok(Self(KeyPair::generate()?))
    }

    /// A certificate signing request in DER that asks for no name: the CA knows who we are.
    pub(super) fn csr(&self) -> Result<Vec<u8>, CredentialsError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        Ok(params.serialize_request(&self.0)?.der().to_vec())
    }

    /// The key and its chain, leaf first, as PEM.
    pub(super) fn to_pem(&self, chain: &[Vec<u8>]) -> Zeroizing<String> {
        let key = Zeroizing::new(self.0.serialize_pem());
        let certificates = certificates_to_pem(chain);
        let mut all = Zeroizing::new(String::with_capacity(key.len() + certificates.len()));
        all.push_str(&key);
        all.push_str(&certificates);
        all
    }
}

impl Drop for NewKey {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// Certificates in DER as PEM.
pub(super) fn certificates_to_pem<C: AsRef<[u8]>>(certificates: &[C]) -> String {
    certificates
        .iter()
        .map(|der| pem::encode(&pem::Pem::new("CERTIFICATE", der.as_ref())))
        .collect()
}

/// Reads certificates from PEM.
pub(super) fn certificates_from_pem(
    pem: &[u8],
) -> Result<Vec<CertificateDer<'static>>, CredentialsError> {
    Ok(CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>()?)
}

/// Reads a key and the chain that certifies it, and checks that they belong together. What the
/// chain says is for the caller to judge.
pub(super) fn from_pem(pem: &[u8]) -> Result<Arc<CertifiedKey>, CredentialsError> {
    let key = PrivateKeyDer::from_pem_slice(pem)?;
    Ok(svid::certified_key(certificates_from_pem(pem)?, key)?)
}
