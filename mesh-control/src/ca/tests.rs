use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

use mesh_common::svid::{Leaf, POD_EXTENSION_OID, TrustBundle, Usage};
use rcgen::{
    BasicConstraints, Certificate, CustomExtension, DnType, IsCa, Issuer, KeyPair, PublicKeyData,
};
use x509_parser::prelude::FromDer as _;

use super::*;
use crate::{config::Config, control::unix};

const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_767_225_600)
}

fn config(dir: &Path, more: &str) -> Config {
    let path = dir.join("config.yaml");
    let state = dir.join("state");
    let text = format!("trust_domain: mesh.example\nstate_dir: {}\n{more}", state.display());
    fs::write(&path, text).unwrap();
    Config::load(&path).unwrap()
}

fn workload() -> Subject {
    Subject {
        id: "spiffe://mesh.example/ns/shop/sa/cart".parse().unwrap(),
        pod: Some(PodRef { name: "cart-0".to_owned(), uid: "u1".to_owned() }),
    }
}

fn issue(authority: &Authority, now: SystemTime) -> Issued {
    authority.issue(&workload(), &KeyPair::generate().unwrap(), HOUR, now).unwrap()
}

fn bundle(authority: &Authority) -> TrustBundle {
    let roots = vec![authority.root().clone()];
    TrustBundle { trust_domain: "mesh.example".parse().unwrap(), roots }
}

#[test]
fn certificates_have_the_profile() {
    let dir = tempfile::tempdir().unwrap();
    let authority = open(&config(dir.path(), ""), now()).unwrap();
    let key = KeyPair::generate().unwrap();
    let issued = authority.issue(&workload(), &key, HOUR, now()).unwrap();
    let leaf = bundle(&authority).verify(&issued.chain, Usage::Server, unix(now())).unwrap();
    assert_eq!(leaf, issued.leaf);
    assert_eq!((&leaf.id, &leaf.pod), (&workload().id, &workload().pod));
    assert_eq!(leaf.not_before, now() - Duration::from_secs(60));
    assert_eq!(leaf.not_after, now() + HOUR);

    let (_, x509) = x509_parser::certificate::X509Certificate::from_der(&issued.chain[0]).unwrap();
    assert_eq!(x509.subject().iter().count(), 0);
    assert!(x509.subject_alternative_name().unwrap().unwrap().critical);
    assert_eq!(x509.public_key().raw, key.subject_public_key_info());
    let oid = x509_parser::asn1_rs::Oid::from(POD_EXTENSION_OID).unwrap();
    assert!(!x509.get_extension_unique(&oid).unwrap().unwrap().critical);
    assert!(x509.raw_serial().len() <= 17 && x509.raw_serial()[0] < 0x80, "positive, 128 bits");
    assert_ne!(issue(&authority, now()).leaf.serial, leaf.serial);
}

#[test]
fn the_roles_of_the_mesh_s_own_certificates_are_kept_apart() {
    let dir = tempfile::tempdir().unwrap();
    let authority = open(&config(dir.path(), ""), now()).unwrap();
    let usages = [Usage::Client, Usage::Server];
    for (name, expected) in [
        ("spiffe://mesh.example/nodemesh/node/n1", [true, false]),
        // Replicas ask each other.
        ("spiffe://mesh.example/nodemesh/control", [true, true]),
    ] {
        let subject = Subject { id: name.parse().unwrap(), pod: None };
        let chain =
            authority.issue(&subject, &KeyPair::generate().unwrap(), HOUR, now()).unwrap().chain;
        let good =
            usages.map(|usage| bundle(&authority).verify(&chain, usage, unix(now())).is_ok());
        assert_eq!(good, expected, "{name}");
    }
}

#[test]
fn the_ca_is_kept_private_and_survives_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), "");
    let first = open(&config, now()).unwrap();
    let ca = dir.path().join("state/ca");
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&ca), 0o700);
    let files: Vec<_> = fs::read_dir(&ca).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(files.len(), 2, "{files:?}");
    assert!(files.iter().all(|path| mode(path) == 0o600));
    let again = open(&config, now() + HOUR).unwrap();
    assert_eq!(again.root(), first.root());
    assert_eq!(issue(&again, now()).chain[1], issue(&first, now()).chain[1]);
}

#[test]
fn the_issuer_is_renewed_at_half_of_its_life_and_the_old_chain_stays_good() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), "");
    let authority = open(&config, now()).unwrap();
    let old = issue(&authority, now() + 44 * DAY);
    assert!(!authority.renew(now() + 44 * DAY).unwrap());
    let later = now() + 45 * DAY;
    assert!(authority.renew(later).unwrap());
    let new = issue(&authority, later);
    assert_ne!(new.chain[1], old.chain[1]);
    bundle(&authority).verify(&old.chain, Usage::Client, unix(now() + 44 * DAY + HOUR)).unwrap();
    bundle(&authority).verify(&new.chain, Usage::Client, unix(later)).unwrap();
    let restarted = open(&config, later).unwrap();
    assert_eq!(issue(&restarted, later).chain[1], new.chain[1], "what was renewed is kept");
    let much_later = open(&config, now() + 200 * DAY).unwrap();
    issue(&much_later, now() + 200 * DAY);
}

#[test]
fn no_leaf_outlives_its_issuer() {
    let dir = tempfile::tempdir().unwrap();
    let authority = open(&config(dir.path(), ""), now()).unwrap();
    let end = authority.issuer_validity().not_after;
    assert_eq!(issue(&authority, end - HOUR / 2).leaf.not_after, end);
    let key = KeyPair::generate().unwrap();
    let late = authority.issue(&workload(), &key, HOUR, end);
    assert!(matches!(late, Err(CaError::Expired)));
}

#[test]
fn a_damaged_state_is_never_replaced_silently() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), "");
    let root = open(&config, now()).unwrap().root().clone();
    let path = dir.path().join("state/ca/root.pem");
    let issuer = dir.path().join("state/ca/issuer.pem");
    let good = fs::read_to_string(&path).unwrap();

    fs::write(&issuer, "damaged").unwrap();
    assert_eq!(open(&config, now()).unwrap().root(), &root, "the root can make another issuer");

    fs::write(&path, &good[..good.len() / 2]).unwrap();
    assert!(open(&config, now()).unwrap_err().to_string().contains("root.pem"));
    fs::remove_file(&path).unwrap();
    assert!(open(&config, now()).unwrap_err().to_string().contains("missing"));
    assert!(!path.exists());

    fs::write(&path, &good).unwrap();
    assert_eq!(open(&config, now()).unwrap().root(), &root);
    let expired = open(&config, now() + 4000 * DAY).unwrap_err().to_string();
    assert!(expired.contains("expired"), "{expired}");
}

#[test]
fn a_state_directory_serves_one_trust_domain() {
    let dir = tempfile::tempdir().unwrap();
    open(&config(dir.path(), ""), now()).unwrap();
    let path = dir.path().join("other.yaml");
    let state = dir.path().join("state");
    fs::write(&path, format!("trust_domain: other\nstate_dir: {}", state.display())).unwrap();
    let error = open(&Config::load(&path).unwrap(), now()).unwrap_err().to_string();
    assert!(error.contains("mesh.example") && error.contains("other"), "{error}");
}

/// A CA of the operator's own making.
struct Operator {
    dir: tempfile::TempDir,
    root: (Certificate, CertificateParams, KeyPair),
}

fn ca(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    (params.not_before, params.not_after) = ((now() - HOUR).into(), (now() + DAY).into());
    params
}

impl Operator {
    fn new(root: CertificateParams) -> Self {
        let key = KeyPair::generate().unwrap();
        let certificate = root.self_signed(&key).unwrap();
        Self { dir: tempfile::tempdir().unwrap(), root: (certificate, root, key) }
    }

    fn sign(&self, params: &CertificateParams, key: &KeyPair) -> Certificate {
        params.signed_by(key, &Issuer::from_params(&self.root.1, &self.root.2)).unwrap()
    }

    fn open(&self, cert: &str, key: &str, root: &str) -> Result<Authority, String> {
        let path = |name: &str| self.dir.path().join(name);
        for (name, text) in [("cert", cert), ("key", key), ("root", root)] {
            fs::write(path(name), text).unwrap();
        }
        let [cert, key, root] =
            ["cert", "key", "root"].map(|name| path(name).display().to_string());
        let more = format!("ca: {{cert: {cert}, key: {key}, root: {root}}}\n");
        open(&config(self.dir.path(), &more), now()).map_err(|error| error.to_string())
    }

    /// With an issuing CA that is changed like this.
    fn with(&self, change: impl FnOnce(&mut CertificateParams)) -> Result<Authority, String> {
        let mut params = ca("issuing");
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let certificate = self.sign(&params, &key);
        self.open(&certificate.pem(), &key.serialize_pem(), &self.root.0.pem())
    }
}

#[test]
fn an_operator_s_ca_is_used() {
    let operator = Operator::new(ca("root"));
    let authority = operator.with(|_| {}).unwrap();
    assert_eq!(authority.root(), operator.root.0.der());
    assert!(!authority.renews_itself() && !authority.renew(now() + 20 * HOUR).unwrap());
    assert_eq!(issue(&authority, now()).chain.len(), 2);
    let root = operator.root.0.pem();
    let direct = operator.open(&root, &operator.root.2.serialize_pem(), &root).unwrap();
    assert_eq!(issue(&direct, now()).chain.len(), 1, "the root is not part of the chain");
    assert!(!operator.dir.path().join("state/ca").exists());
}

#[test]
fn an_operator_s_ca_that_cannot_sign_is_refused_with_the_reason() {
    let operator = Operator::new(ca("root"));
    let refused = |reason: &str, change: fn(&mut CertificateParams)| {
        let error = operator.with(change).unwrap_err();
        assert!(error.contains(reason), "{reason}: {error}");
    };
    refused("not the certificate of a CA", |params| params.is_ca = IsCa::NoCa);
    refused("keyCertSign", |params| {
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    });
    refused("keyCertSign", |params| params.key_usages.clear());
    refused("expired", |params| params.not_after = (now() - HOUR / 2).into());
    refused("not valid yet", |params| params.not_before = (now() + HOUR).into());
    refused("would be refused", |params| {
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    });
    refused("would be refused", |params| {
        let mut unknown = CustomExtension::from_oid_content(&[2, 25, 1], vec![5, 0]);
        unknown.set_criticality(true);
        params.custom_extensions = vec![unknown];
    });

    let mut short = ca("root");
    short.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    let no_room = Operator::new(short).with(|_| {}).unwrap_err();
    assert!(no_room.contains("path length"), "{no_room}");
    let mut expired = ca("root");
    expired.not_after = (now() - HOUR / 2).into();
    let expired = Operator::new(expired).with(|_| {}).unwrap_err();
    assert!(expired.contains("root") && expired.contains("expired"), "{expired}");

    let other = Operator::new(ca("other"));
    let key = KeyPair::generate().unwrap();
    let (certificate, key) = (operator.sign(&ca("issuing"), &key).pem(), key.serialize_pem());
    let stranger = operator.open(&certificate, &key, &other.root.0.pem()).unwrap_err();
    assert!(stranger.contains("vouches"), "{stranger}");
    let other_key = KeyPair::generate().unwrap().serialize_pem();
    let error = operator.open(&certificate, &other_key, &operator.root.0.pem()).unwrap_err();
    assert!(error.contains("another certificate"), "{error}");
    for (cert, key, root) in
        [("", &key[..], "x"), (&certificate, "", "x"), (&certificate, &certificate, "x")]
    {
        operator.open(cert, key, root).unwrap_err();
    }
}

#[test]
fn a_path_that_is_too_long_is_refused() {
    let operator = Operator::new(ca("root"));
    let (mut middle, middle_key) = (ca("middle"), KeyPair::generate().unwrap());
    middle.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    let middle_pem = operator.sign(&middle, &middle_key).pem();
    let key = KeyPair::generate().unwrap();
    let issuing = ca("issuing").signed_by(&key, &Issuer::new(middle, middle_key)).unwrap();
    let chain = issuing.pem() + &middle_pem;
    let error = operator.open(&chain, &key.serialize_pem(), &operator.root.0.pem()).unwrap_err();
    assert!(error.contains("would be refused"), "{error}");
}

#[test]
fn of_a_signing_request_only_the_key_is_taken() {
    let dir = tempfile::tempdir().unwrap();
    let authority = open(&config(dir.path(), ""), now()).unwrap();
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "admin");
    params.subject_alt_names = vec![
        SanType::URI("spiffe://mesh.example/nodemesh/control".try_into().unwrap()),
        SanType::DnsName("bank.example".try_into().unwrap()),
    ];
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let csr = params.serialize_request(&key).unwrap();
    let requested = requested_key(csr.der()).unwrap();
    let issued = authority.issue(&workload(), &requested, HOUR, now()).unwrap();
    let leaf = Leaf::parse(&issued.chain[0]).unwrap();
    assert_eq!((leaf.id, leaf.pod), (workload().id, workload().pod));
    let (_, x509) = x509_parser::certificate::X509Certificate::from_der(&issued.chain[0]).unwrap();
    assert_eq!(x509.public_key().raw, key.subject_public_key_info());
    assert_eq!(x509.subject().iter().count(), 0);
}

#[test]
fn signing_requests_are_checked() {
    let request =
        |key: &KeyPair| CertificateParams::default().serialize_request(key).unwrap().der().to_vec();
    let good = request(&KeyPair::generate().unwrap());
    requested_key(&good).unwrap();
    let refused = |der: &[u8]| requested_key(der).unwrap_err();
    assert_eq!(refused(&[]), CsrError::Malformed);
    assert_eq!(refused(&good[..good.len() - 1]), CsrError::Malformed);
    assert_eq!(refused(&[&good[..], &[0]].concat()), CsrError::Malformed);
    assert_eq!(refused(&vec![0x30; 4097]), CsrError::Size(4097));
    let mut forged = good.clone();
    *forged.last_mut().unwrap() ^= 1;
    assert_eq!(refused(&forged), CsrError::Signature);
    for algorithm in [&rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_ED25519] {
        let key = KeyPair::generate_for(algorithm).unwrap();
        assert_eq!(refused(&request(&key)), CsrError::Key);
    }
    // Somebody else's key, signed with one's own.
    let mine = KeyPair::generate().unwrap();
    let theirs = KeyPair::generate().unwrap();
    let mut stolen = request(&mine);
    let at = stolen.windows(65).position(|w| w == mine.public_key_raw()).unwrap();
    stolen[at..at + 65].copy_from_slice(theirs.public_key_raw());
    assert_eq!(refused(&stolen), CsrError::Signature);
}
