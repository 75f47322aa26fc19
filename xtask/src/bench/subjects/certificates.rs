//! What relays that are set up by hand show each other: a CA, and a certificate for each node.

use std::fs;
use std::path::Path;

use anyhow::Result;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

/// Writes `ca.pem`, and for each node `NODE.pem` (certificate, then key), `NODE.crt` and
/// `NODE.key`. The keys are ECDSA P-256, as the mesh's are.
pub(crate) fn write(directory: &Path, nodes: &[&str]) -> Result<()> {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "bench");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate()?;
    let root = params.self_signed(&key)?.pem();
    fs::write(directory.join("ca.pem"), root)?;
    let issuer = Issuer::new(params, key);
    for node in nodes {
        let mut params = CertificateParams::new([(*node).to_owned()])?;
        // Another name than the CA's: OpenSSL takes it for self-signed otherwise.
        params.distinguished_name.push(DnType::CommonName, *node);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate()?;
        let (certificate, key) = (params.signed_by(&key, &issuer)?.pem(), key.serialize_pem());
        fs::write(directory.join(format!("{node}.pem")), certificate.clone() + &key)?;
        fs::write(directory.join(format!("{node}.crt")), certificate)?;
        fs::write(directory.join(format!("{node}.key")), key)?;
    }
    Ok(())
}
