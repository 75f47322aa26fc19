//! A CA's key with its certificates.

use std::time::SystemTime;

use rcgen::{Issuer, KeyPair, PublicKeyData as _};
use rustls::pki_types::CertificateDer;
use x509_parser::{certificate::X509Certificate, prelude::FromDer as _};

/// A span of time, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// Not valid before.
    pub not_before: SystemTime,
    /// Not valid after.
    pub not_after: SystemTime,
}

impl Validity {
    /// The middle, when it is time to renew.
    pub fn half(&self) -> SystemTime {
        let life = self.not_after.duration_since(self.not_before).unwrap_or_default();
        self.not_before + life / 2
    }
}

/// What leaves are signed with.
#[derive(Debug)]
pub(super) struct Issuing {
    pub(super) issuer: Issuer<'static, KeyPair>,
    /// The issuer's own certificate and those between it and the root, without the root.
    pub(super) chain: Vec<CertificateDer<'static>>,
    pub(super) validity: Validity,
}

/// Puts a CA's certificate and key together, having checked that it may sign certificates `now`
/// and that the key is its own.
pub(super) fn issuer(
    certificate: &CertificateDer<'static>,
    key: KeyPair,
    now: SystemTime,
) -> Result<(Issuer<'static, KeyPair>, Validity), String> {
    let x509 = parse(certificate)?;
    let validity = check(&x509, now)?;
    if x509.public_key().raw != key.subject_public_key_info() {
        return Err("the private key belongs to another certificate".to_owned());
    }
    let issuer = Issuer::from_ca_cert_der(certificate, key)
        .map_err(|error| format!("the certificate cannot be used to sign: {error}"))?;
    Ok((issuer, validity))
}

/// Checks that a root may stand above so many CAs `now`.
pub(super) fn root(
    certificate: &CertificateDer<'static>,
    intermediates: usize,
    now: SystemTime,
) -> Result<Validity, String> {
    let x509 = parse(certificate)?;
    let validity = check(&x509, now)?;
    let constraints = x509.basic_constraints().ok().flatten();
    match constraints.and_then(|extension| extension.value.path_len_constraint) {
        // webpki does not judge this in a root, others do.
        Some(longest) if (longest as usize) < intermediates => Err(format!(
            "the root allows {longest} CAs below it (path length), but there are {intermediates}"
        )),
        Some(_) | None => Ok(validity),
    }
}

fn parse<'a>(certificate: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, String> {
    X509Certificate::from_der(certificate)
        .map(|(_, x509)| x509)
        .map_err(|error| format!("not an X.509 certificate: {error}"))
}

/// Whether a certificate may sign others `now`.
fn check(x509: &X509Certificate<'_>, now: SystemTime) -> Result<Validity, String> {
    if !x509.is_ca() {
        return Err("not the certificate of a CA: its basic constraints do not say so".to_owned());
    }
    match x509.key_usage() {
        Ok(Some(usage)) if usage.value.key_cert_sign() => {}
        Ok(_) => return Err("the CA may not sign certificates (no keyCertSign)".to_owned()),
        Err(error) => return Err(format!("the key usage cannot be read: {error}")),
    }
    let time = |time: x509_parser::time::ASN1Time| SystemTime::from(time.to_datetime());
    let validity = Validity {
        not_before: time(x509.validity.not_before),
        not_after: time(x509.validity.not_after),
    };
    if now < validity.not_before {
        return Err("the certificate is not valid yet: check the clock".to_owned());
    }
    if now > validity.not_after {
        return Err("the certificate has expired: renew it".to_owned());
    }
    Ok(validity)
}
