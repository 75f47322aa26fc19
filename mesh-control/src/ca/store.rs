//! Where the CA comes from: made on first start and kept in the state directory, or supplied by
//! the operator.
//!
//! A key and its certificate are one file, so that no crash can part them.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwap;
use mesh_common::{
    spiffe::{SpiffeId, TrustDomain, WorkloadId},
    svid::{PodRef, TrustBundle, Usage},
};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PublicKeyData as _, SanType, SerialNumber,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use time::OffsetDateTime;
use x509_parser::{
    certificate::X509Certificate, extensions::GeneralName, prelude::FromDer as _,
    x509::SubjectPublicKeyInfo,
};

use super::{
    Authority, CaError, Subject,
    issuer::{self, Issuing, Validity},
};
use crate::{
    bundle,
    config::{Config, OperatorCa},
    control::unix,
    files,
};

/// Opens the CA that the configuration asks for, and makes it if it is ours to make.
///
/// # Errors
///
/// A [`CaError`] that says which file is not what it must be. Nothing is overwritten.
pub fn open(config: &Config, now: SystemTime) -> Result<Authority, CaError> {
    let authority = match &config.ca {
        Some(files) => supplied(files, config.clock_skew, now)?,
        None => own(config, now)?,
    };
    check(&authority, &config.trust_domain, now)?;
    Ok(authority)
}

/// The proof is a certificate of its own making: it is judged as every peer will judge it.
fn check(
    authority: &Authority,
    trust_domain: &TrustDomain,
    now: SystemTime,
) -> Result<(), CaError> {
    let id = WorkloadId::new(trust_domain.clone(), "nodemesh", "self-test");
    let pod = PodRef { name: "self-test".to_owned(), uid: "self-test".to_owned() };
    let id = SpiffeId::Workload(id.map_err(mesh_common::svid::SvidError::from)?);
    let subject = Subject { id, pod: Some(pod) };
    let issued = authority.issue(&subject, &KeyPair::generate()?, Duration::from_secs(60), now)?;
    let mut bundle =
        TrustBundle { trust_domain: trust_domain.clone(), roots: authority.roots.clone() };
    bundle.check()?;
    bundle.roots.truncate(1);
    for usage in [Usage::Client, Usage::Server] {
        bundle.verify(&issued.chain, usage, unix(now))?;
    }
    Ok(())
}

fn supplied(
    paths: &OperatorCa,
    clock_skew: Duration,
    now: SystemTime,
) -> Result<Authority, CaError> {
    let roots = certificates(&paths.root, &read(&paths.root)?)?;
    let mut chain = certificates(&paths.cert, &read(&paths.cert)?)?;
    let key = key(&paths.key, &read(&paths.key)?)?;
    let (issuer, validity) = issuer::issuer(&chain[0], key, now).map_err(content(&paths.cert))?;
    chain.retain(|certificate| *certificate != roots[0]);
    let root_validity = issuer::root(&roots[0], chain.len(), now).map_err(content(&paths.root))?;
    Ok(Authority {
        roots,
        root_validity,
        issuing: ArcSwap::from_pointee(Issuing { issuer, chain, validity }),
        renewal: None,
        clock_skew,
    })
}

fn own(config: &Config, now: SystemTime) -> Result<Authority, CaError> {
    let dir = config.state_dir.join("ca");
    files::private_dir(&dir).map_err(file(&dir))?;
    let (root_path, issuer_path) = (dir.join("root.pem"), dir.join("issuer.pem"));
    let kept = match (optional(&root_path)?, optional(&issuer_path)?) {
        (Some(root), issuer) => (root, issuer),
        (None, None) => (create_root(&root_path, config, now)?, None),
        (None, Some(_)) => {
            return Err(content(&root_path)(
                "the root is missing, but an issuer signed by it is there: restore it from a \
                 backup, or remove the directory to begin with a new CA that no node knows"
                    .to_owned(),
            ));
        }
    };
    let roots = certificates(&root_path, &kept.0)?;
    for root in &roots {
        check_trust_domain(root, &config.trust_domain).map_err(content(&root_path))?;
    }
    let (root_issuer, root_validity) =
        issuer::issuer(&roots[0], key(&root_path, &kept.0)?, now).map_err(content(&root_path))?;
    let renewal = Renewal {
        root: root_issuer,
        root_validity,
        path: issuer_path,
        lifetime: config.intermediate_lifetime,
    };
    // Whatever is wrong with the one that was kept, a new one is as good.
    let issuing = match kept.1.map(|pem| renewal.load(&pem, now)) {
        Some(Ok(issuing)) if now < issuing.validity.half() => issuing,
        Some(Err(error)) => {
            tracing::warn!(%error, "the kept issuing CA cannot be used, making another one");
            renewal.renew(now, config.clock_skew)?
        }
        Some(Ok(_)) | None => renewal.renew(now, config.clock_skew)?,
    };
    Ok(Authority {
        roots,
        root_validity,
        issuing: ArcSwap::from_pointee(issuing),
        renewal: Some(renewal),
        clock_skew: config.clock_skew,
    })
}

fn create_root(path: &Path, config: &Config, now: SystemTime) -> Result<String, CaError> {
    let pem = new_root(config, now)?;
    files::replace(path, pem.as_bytes()).map_err(file(path))?;
    tracing::info!(path = %path.display(), "made the root of a new mesh: keep a backup of it");
    Ok(pem)
}

/// Makes the root of a new mesh: key and certificate in PEM, kept nowhere.
///
/// # Errors
///
/// [`CaError::Signing`].
pub fn new_root(config: &Config, now: SystemTime) -> Result<String, CaError> {
    let mut params = ca_params("nodemesh root");
    params.not_before = OffsetDateTime::from(now - config.clock_skew);
    params.not_after = OffsetDateTime::from(now + config.root_lifetime);
    // Says whose root it is, and keeps a state directory from serving another trust domain.
    params.subject_alt_names =
        vec![SanType::URI(format!("spiffe://{}", config.trust_domain).try_into()?)];
    let key = KeyPair::generate()?;
    Ok(key.serialize_pem() + &params.self_signed(&key)?.pem())
}

/// Puts a root that is kept elsewhere where [`open`] finds it: its key, its certificate, and the
/// roots that are trusted beside it.
///
/// # Errors
///
/// [`CaError::File`].
pub fn put_root(config: &Config, pem: &str) -> Result<(), CaError> {
    let dir = config.state_dir.join("ca");
    files::private_dir(&dir).map_err(file(&dir))?;
    let path = dir.join("root.pem");
    files::replace(&path, pem.as_bytes()).map_err(file(&path))
}

fn ca_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.serial_number = Some(SerialNumber::from_slice(&rand::random::<[u8; 16]>()));
    params.use_authority_key_identifier_extension = true;
    params
}

fn check_trust_domain(root: &CertificateDer<'_>, expected: &TrustDomain) -> Result<(), String> {
    let (_, x509) = X509Certificate::from_der(root).map_err(|error| error.to_string())?;
    let names = x509.subject_alternative_name().map_err(|error| error.to_string())?;
    let name = format!("spiffe://{expected}");
    match names.map(|extension| extension.value.general_names.as_slice()) {
        Some([GeneralName::URI(uri)]) if *uri == name => Ok(()),
        Some([GeneralName::URI(uri)]) => Err(format!(
            "this is the root of {uri}, but trust_domain is {expected}: correct it, or use \
             another state_dir"
        )),
        Some(_) | None => Err("not a root that mesh-control made".to_owned()),
    }
}

/// What makes issuers: the root's key.
#[derive(Debug)]
pub(super) struct Renewal {
    root: Issuer<'static, KeyPair>,
    root_validity: Validity,
    path: PathBuf,
    lifetime: Duration,
}

impl Renewal {
    /// Makes an issuer and keeps it.
    pub(super) fn renew(&self, now: SystemTime, clock_skew: Duration) -> Result<Issuing, CaError> {
        let mut params = ca_params("nodemesh issuing CA");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.not_before = OffsetDateTime::from(now - clock_skew);
        let not_after = (now + self.lifetime).min(self.root_validity.not_after);
        params.not_after = OffsetDateTime::from(not_after);
        let key = KeyPair::generate()?;
        let pem = key.serialize_pem() + &params.signed_by(&key, &self.root)?.pem();
        files::replace(&self.path, pem.as_bytes()).map_err(file(&self.path))?;
        let issuing = self.load(&pem, now)?;
        tracing::info!(not_after = %OffsetDateTime::from(not_after), "made an issuing CA");
        Ok(issuing)
    }

    fn load(&self, pem: &str, now: SystemTime) -> Result<Issuing, CaError> {
        let chain = certificates(&self.path, pem)?;
        self.check_signature(&chain[0]).map_err(content(&self.path))?;
        let (issuer, validity) =
            issuer::issuer(&chain[0], key(&self.path, pem)?, now).map_err(content(&self.path))?;
        Ok(Issuing { issuer, chain, validity })
    }

    /// The root may have been replaced since the issuer was made.
    fn check_signature(&self, issuer: &CertificateDer<'_>) -> Result<(), String> {
        let root = self.root.key().subject_public_key_info();
        let (_, root) = SubjectPublicKeyInfo::from_der(&root).map_err(|error| error.to_string())?;
        let (_, issuer) = X509Certificate::from_der(issuer).map_err(|error| error.to_string())?;
        issuer.verify_signature(Some(&root)).map_err(|_| "it was signed by another root".to_owned())
    }
}

fn certificates(path: &Path, pem: &str) -> Result<Vec<CertificateDer<'static>>, CaError> {
    bundle::certificates(pem).map_err(content(path))
}

fn key(path: &Path, pem: &str) -> Result<KeyPair, CaError> {
    PrivateKeyDer::from_pem_slice(pem.as_bytes())
        .map_err(|error| error.to_string())
        .and_then(|key| KeyPair::try_from(&key).map_err(|error| error.to_string()))
        .map_err(|error| {
            content(path)(format!(
                "no usable private key ({error}): it must be unencrypted PKCS #8, see `openssl \
                 pkcs8 -topk8 -nocrypt`"
            ))
        })
}

fn read(path: &Path) -> Result<String, CaError> {
    fs::read_to_string(path).map_err(file(path))
}

fn optional(path: &Path) -> Result<Option<String>, CaError> {
    files::read_optional(path).map_err(file(path))
}

fn file(path: &Path) -> impl Fn(std::io::Error) -> CaError {
    let path = path.display().to_string();
    move |source| CaError::File { path: path.clone(), source }
}

fn content(path: &Path) -> impl Fn(String) -> CaError {
    let path = path.display().to_string();
    move |reason| CaError::Content { path: path.clone(), reason }
}
