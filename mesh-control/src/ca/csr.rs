//! Certificate signing requests, of which only the key is taken.

use rcgen::SubjectPublicKeyInfo;
use x509_parser::{
    certification_request::X509CertificationRequest,
    oid_registry::{OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY},
    prelude::FromDer as _,
};

/// More than a request for a P-256 key needs, whatever names are in it.
const MAX_CSR_BYTES: usize = 4096;

/// Why a request was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CsrError {
    /// Too long to be looked at.
    #[error("the signing request has {0} bytes, more than {MAX_CSR_BYTES}")]
    Size(usize),
    /// Not PKCS #10.
    #[error("not a PKCS #10 signing request in DER")]
    Malformed,
    /// A key that the mesh does not use.
    #[error("the signing request is not for an ECDSA key on the curve P-256")]
    Key,
    /// The requester may not have the private key.
    #[error("the signing request's signature does not fit its key")]
    Signature,
}

/// Takes the P-256 key out of a request, having checked that the requester has its private half.
/// Names and extensions that the request asks for are not even looked at.
///
/// # Errors
///
/// Any [`CsrError`].
pub fn requested_key(der: &[u8]) -> Result<SubjectPublicKeyInfo, CsrError> {
    /// An uncompressed point: a format byte and two coordinates.
    const POINT_BYTES: usize = 65;

    if der.len() > MAX_CSR_BYTES {
        return Err(CsrError::Size(der.len()));
    }
    let (rest, request) =
        X509CertificationRequest::from_der(der).map_err(|_| CsrError::Malformed)?;
    if !rest.is_empty() {
        return Err(CsrError::Malformed);
    }
    let spki = &request.certification_request_info.subject_pki;
    let curve = spki.algorithm.parameters.as_ref().and_then(|any| any.as_oid().ok());
    let point = &spki.subject_public_key.data;
    if spki.algorithm.algorithm != OID_KEY_TYPE_EC_PUBLIC_KEY
        || curve != Some(OID_EC_P256)
        || point.len() != POINT_BYTES
    {
        return Err(CsrError::Key);
    }
    request.verify_signature().map_err(|_| CsrError::Signature)?;
    SubjectPublicKeyInfo::from_der(spki.raw).map_err(|_| CsrError::Key)
}
