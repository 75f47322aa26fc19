//! Every rule of the profile, each with a certificate that differs from a good one in that rule.

use proptest::prelude::*;
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CustomExtension, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType, SerialNumber,
};
use rustls::{
    ClientConfig, ServerConfig,
    pki_types::{PrivateKeyDer, UnixTime},
};
use time::OffsetDateTime;

use super::*;

/// 2026-01-01: the tests never ask the clock.
const NOW: u64 = 1_767_225_600;
const HOUR: i64 = 3600;
const WORKLOAD: &str = "spiffe://mesh.example/ns/shop/sa/cart";
const NODE: &str = "spiffe://mesh.example/nodemesh/node/n1";

fn now() -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_secs(NOW))
}

fn at(offset_seconds: i64) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp(NOW as i64 + offset_seconds).unwrap()
}

struct Authority {
    certificate: Certificate,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn params(name: &str) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        (params.not_before, params.not_after) = (at(-HOUR), at(48 * HOUR));
        params
    }

    fn root(name: &str) -> Self {
        Self::root_with(Self::params(name))
    }

    fn root_with(params: CertificateParams) -> Self {
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        Self { certificate, issuer: Issuer::new(params, key) }
    }

    fn intermediate(&self) -> Self {
        let (params, key) = (Self::params("intermediate"), KeyPair::generate().unwrap());
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        Self { certificate, issuer: Issuer::new(params, key) }
    }

    fn sign(&self, params: &CertificateParams) -> CertificateDer<'static> {
        self.sign_key(params, &KeyPair::generate().unwrap())
    }

    fn sign_key(&self, params: &CertificateParams, key: &KeyPair) -> CertificateDer<'static> {
        params.signed_by(key, &self.issuer).unwrap().der().clone()
    }

    fn bundle(&self) -> TrustBundle {
        TrustBundle {
            trust_domain: "mesh.example".parse().unwrap(),
            roots: vec![self.certificate.der().clone()],
        }
    }
}

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

fn pod() -> PodRef {
    PodRef { name: "cart-0".to_owned(), uid: "0b0b".to_owned() }
}

fn pod_extension(content: Vec<u8>) -> CustomExtension {
    CustomExtension::from_oid_content(POD_EXTENSION_OID, content)
}

fn leaf(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.subject_alt_names = vec![uri(name)];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
    (params.not_before, params.not_after) = (at(-60), at(4 * HOUR));
    params.serial_number = Some(SerialNumber::from_slice(&[0x80, 0, 0x0f]));
    params
}

fn workload() -> CertificateParams {
    let mut params = leaf(WORKLOAD);
    params.custom_extensions = vec![pod_extension(pod().encode())];
    params
}

/// What becomes of a workload's certificate that is changed like this.
fn changed(change: impl FnOnce(&mut CertificateParams)) -> Result<Leaf, SvidError> {
    let root = Authority::root("root");
    let mut params = workload();
    change(&mut params);
    root.bundle().verify(&[root.sign(&params)], Usage::Client, now())
}

#[test]
fn a_workload_is_who_its_certificate_says() {
    let leaf = changed(|_| {}).unwrap();
    assert_eq!(leaf.id.to_string(), WORKLOAD);
    assert_eq!(leaf.pod, Some(pod()));
    assert_eq!(leaf.serial, "80000f");
    assert_eq!(leaf.not_before, UNIX_EPOCH + Duration::from_secs(NOW - 60));
    assert_eq!(leaf.not_after, UNIX_EPOCH + Duration::from_secs(NOW + 4 * HOUR as u64));
}

#[test]
fn a_chain_leads_over_an_intermediate_to_any_root() {
    let root = Authority::root("root");
    let intermediate = root.intermediate();
    let mut bundle = Authority::root("other").bundle();
    bundle.roots.extend(root.bundle().roots);
    let leaf = intermediate.sign(&workload());
    let whole = [leaf.clone(), intermediate.certificate.der().clone()];
    for usage in [Usage::Client, Usage::Server] {
        bundle.verify(&whole, usage, now()).unwrap();
    }
    let with_root = [&whole[..], &root.bundle().roots].concat();
    bundle.verify(&with_root, Usage::Server, now()).unwrap();
    let error = bundle.verify(&[leaf], Usage::Client, now()).unwrap_err();
    assert_eq!(error, SvidError::UnknownIssuer(bundle.trust_domain.clone()));
    assert_eq!(bundle.verify(&[], Usage::Client, now()), Err(SvidError::NoCertificate));
}

#[test]
fn another_root_vouches_for_nobody_even_with_the_same_name() {
    let bundle = Authority::root("root").bundle();
    let impostor = Authority::root("root");
    let chain = [impostor.sign(&workload()), impostor.certificate.der().clone()];
    assert!(bundle.verify(&chain, Usage::Client, now()).is_err());
    impostor.bundle().verify(&chain, Usage::Client, now()).unwrap();
}

#[test]
fn a_workload_cannot_issue_certificates() {
    let root = Authority::root("root");
    let key = KeyPair::generate().unwrap();
    let certificate = workload().signed_by(&key, &root.issuer).unwrap();
    let pod = Authority { issuer: Issuer::new(workload(), key), certificate };
    let chain = [pod.sign(&workload()), pod.certificate.der().clone()];
    assert!(root.bundle().verify(&chain, Usage::Client, now()).is_err());
}

#[test]
fn names_are_exactly_one_uri_of_this_trust_domain() {
    let sans = |names: Vec<SanType>| changed(|params| params.subject_alt_names = names);
    let san = |result| matches!(result, Err(SvidError::SubjectAlternativeName(_)));
    assert!(san(sans(vec![])));
    assert!(san(sans(vec![uri(WORKLOAD), uri(WORKLOAD)])));
    assert!(san(sans(vec![SanType::DnsName("cart.example".try_into().unwrap())])));
    assert!(san(sans(vec![uri(WORKLOAD), SanType::DnsName("a.b".try_into().unwrap())])));
    assert!(san(sans(vec![uri(WORKLOAD), SanType::IpAddress([10, 0, 0, 1].into())])));
    assert!(matches!(sans(vec![uri("https://mesh.example/")]), Err(SvidError::Name(_))));
    let foreign = sans(vec![uri("spiffe://other.example/ns/shop/sa/cart")]);
    assert!(matches!(foreign, Err(SvidError::TrustDomain { .. })));
}

#[test]
fn time_has_two_ends() {
    let error = changed(|params| params.not_after = at(-1)).unwrap_err();
    assert_eq!(error, SvidError::Expired(UNIX_EPOCH + Duration::from_secs(NOW - 1)));
    let error = changed(|params| params.not_before = at(1)).unwrap_err();
    assert_eq!(error, SvidError::NotYetValid(UNIX_EPOCH + Duration::from_secs(NOW + 1)));
}

#[test]
fn an_expired_root_is_no_root() {
    let mut params = Authority::params("root");
    params.not_after = at(-1);
    let root = Authority::root_with(params);
    let error = root.bundle().verify(&[root.sign(&workload())], Usage::Client, now()).unwrap_err();
    assert!(matches!(error, SvidError::UnknownIssuer(_)), "{error}");
}

#[test]
fn usages_are_those_of_the_profile() {
    let usage = |change: fn(&mut CertificateParams)| changed(change).unwrap_err();
    let missing = usage(|params| params.key_usages.clear());
    assert!(matches!(missing, SvidError::KeyUsage(_)), "{missing}");
    let wrong = usage(|params| params.key_usages = vec![KeyUsagePurpose::KeyAgreement]);
    assert!(matches!(wrong, SvidError::KeyUsage(_)), "{wrong}");
    let missing = usage(|params| params.extended_key_usages.clear());
    assert!(matches!(missing, SvidError::KeyUsage(_)), "{missing}");
    let server = usage(|p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]);
    assert!(matches!(server, SvidError::Chain(_)), "{server}");
}

#[test]
fn a_ca_is_no_peer() {
    let ca = changed(|params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained));
    assert_eq!(ca, Err(SvidError::Authority));
    let signs = changed(|params| params.key_usages.push(KeyUsagePurpose::KeyCertSign));
    assert_eq!(signs, Err(SvidError::Authority));
}

#[test]
fn the_pod_extension_belongs_to_workloads() {
    let none = changed(|params| params.custom_extensions.clear());
    assert_eq!(none, Err(SvidError::NoPod));
    let node = changed(|params| params.subject_alt_names = vec![uri(NODE)]);
    assert_eq!(node, Err(SvidError::UnexpectedPod));
    let malformed = changed(|params| params.custom_extensions = vec![pod_extension(vec![0x30, 0])]);
    assert!(matches!(malformed, Err(SvidError::Pod(_))));
    let twice = changed(|params| params.custom_extensions.push(pod_extension(pod().encode())));
    assert!(matches!(twice, Err(SvidError::Malformed(_))), "{twice:?}");
}

#[test]
fn pod_references_have_one_encoding() {
    let der = pod().encode();
    assert_eq!(der, b"\x30\x0e\x0c\x06cart-0\x0c\x040b0b");
    assert_eq!(PodRef::decode(&der), Ok(pod()));
    let long = PodRef { name: "n".repeat(253), uid: "u".repeat(253) };
    assert_eq!(PodRef::decode(&long.encode()), Ok(long));
    for wrong in [
        &b""[..],
        b"\x30\x00",
        b"\x30\x08\x0c\x06cart-0",
        b"\x30\x0e\x0c\x06cart-0\x0c\x040b0b\x00",
        b"\x30\x10\x0c\x06cart-0\x0c\x040b0b\x05\x00",
        b"\x30\x81\x0e\x0c\x06cart-0\x0c\x040b0b",
        b"\x30\x0e\x16\x06cart-0\x16\x040b0b",
        b"\x30\x0e\x0c\x06cart/0\x0c\x040b0b",
        b"\x30\x0a\x0c\x06cart-0\x0c\x00",
    ] {
        assert!(PodRef::decode(wrong).is_err(), "{wrong:x?}");
    }
}

#[test]
fn garbage_is_refused() {
    let root = Authority::root("root");
    let mut long = root.sign(&workload()).to_vec();
    long.push(0);
    for garbage in [vec![], vec![0x30], long] {
        let certificate = CertificateDer::from(garbage);
        assert!(Leaf::parse(&certificate).is_err());
        assert!(root.bundle().verify(&[certificate], Usage::Client, now()).is_err());
    }
}

#[test]
fn bundles_are_checked_on_arrival() {
    let bundle = Authority::root("root").bundle();
    assert_eq!(TrustBundle::from_api(bundle.to_api()), Ok(bundle.clone()));
    let with = |roots: Vec<CertificateDer<'static>>| {
        TrustBundle::from_api(TrustBundle { roots, ..bundle.clone() }.to_api())
    };
    assert!(with(vec![]).is_err());
    assert!(with(vec![bundle.roots[0].clone(); 17]).is_err());
    assert!(with(vec![CertificateDer::from(vec![1])]).is_err());
    let leaf = Authority::root("root").sign(&workload());
    assert!(with(vec![bundle.roots[0].clone(), leaf]).is_err());
}

#[test]
fn fingerprints_are_those_of_openssl() {
    let fingerprint = Fingerprint::of(&CertificateDer::from(b"abc".to_vec()));
    let text = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    assert_eq!(fingerprint.to_string(), text);
    assert_eq!(text.parse(), Ok(fingerprint));
    assert!(text.to_uppercase().parse::<Fingerprint>().is_err());
    assert!(text[2..].parse::<Fingerprint>().is_err());
}

#[test]
fn one_kind_is_never_accepted_for_another() {
    let root = Authority::root("root");
    let bundle = Arc::new(root.bundle());
    let certificates = [
        (Kind::Workload, root.sign(&workload())),
        (Kind::Node, root.sign(&leaf(NODE))),
        (Kind::Control, root.sign(&leaf("spiffe://mesh.example/nodemesh/control"))),
    ];
    for (shown, certificate) in &certificates {
        for accepted in [Kind::Workload, Kind::Node, Kind::Control] {
            let verifier = PeerVerifier::new(Arc::clone(&bundle), accepted);
            let result = verifier.verify(std::slice::from_ref(certificate), Usage::Client, now());
            assert_eq!(result.is_ok(), *shown == accepted, "{shown} as {accepted}: {result:?}");
        }
        let of_two = PeerVerifier::new(Arc::clone(&bundle), Kind::Node).or(Kind::Control);
        let result = of_two.verify(std::slice::from_ref(certificate), Usage::Client, now());
        assert_eq!(result.is_ok(), *shown != Kind::Workload, "{shown}: {result:?}");
    }
}

#[test]
fn a_pinned_root_must_be_shown() {
    let root = Authority::root("root");
    let control = root.sign(&leaf("spiffe://mesh.example/nodemesh/control"));
    let chain = [control, root.certificate.der().clone()];
    let pinned = |pin| PeerVerifier::pinned("mesh.example".parse().unwrap(), pin);
    let right = pinned(Fingerprint::of(&chain[1]));
    right.verify(&chain, Usage::Server, now()).unwrap();
    let error = right.verify(&chain[..1], Usage::Server, now()).unwrap_err();
    assert!(matches!(error, SvidError::NotPinned(_)));
    let other = Authority::root("root");
    let error = pinned(Fingerprint::of(other.certificate.der()))
        .verify(&chain, Usage::Server, now())
        .unwrap_err();
    assert!(matches!(error, SvidError::NotPinned(_)));
    // An interceptor may show the right root beside a chain of its own.
    let forged = other.sign(&leaf("spiffe://mesh.example/nodemesh/control"));
    right.verify(&[forged, chain[1].clone()], Usage::Server, now()).unwrap_err();
}

#[test]
fn a_root_at_hand_vouches_for_its_own_trust_domain_alone() {
    let root = |names: &[&str]| {
        let mut params = Authority::params("root");
        params.subject_alt_names = names.iter().map(|name| uri(name)).collect();
        Authority::root_with(params)
    };
    let right = root(&["spiffe://mesh.example"]);
    let nameless = root(&[]);
    let other = root(&["spiffe://other.example"]);
    let web = root(&["https://ca.example"]);
    let roots = [&right, &nameless, &other, &web].map(|root| root.certificate.der().clone());
    let judge = |roots: &[CertificateDer<'static>], by: &Authority, name: &str| {
        let verifier = PeerVerifier::anchored(roots.to_vec());
        verifier.verify(&[by.sign(&leaf(name))], Usage::Server, now())
    };
    const CONTROL: &str = "spiffe://mesh.example/nodemesh/control";
    for by in [&right, &nameless, &web] {
        judge(&roots, by, CONTROL).unwrap();
    }
    let unknown = SvidError::UnknownIssuer("mesh.example".parse().unwrap());
    assert_eq!(judge(&roots, &other, CONTROL), Err(unknown.clone()));
    judge(&roots, &other, "spiffe://other.example/nodemesh/control").unwrap();
    assert_eq!(judge(&roots, &root(&["spiffe://mesh.example"]), CONTROL), Err(unknown.clone()));
    assert_eq!(judge(&[], &right, CONTROL), Err(unknown));
    assert!(matches!(judge(&roots, &right, NODE), Err(SvidError::Kind { .. })));
}

/// The two sides of a connection, joined in memory.
fn handshake(client: ClientConfig, server: ServerConfig) -> Result<(), rustls::Error> {
    let name = "control.invalid".try_into().unwrap();
    let mut client = rustls::ClientConnection::new(Arc::new(client), name)?;
    let mut server = rustls::ServerConnection::new(Arc::new(server))?;
    let mut wire = Vec::new();
    while client.is_handshaking() || server.is_handshaking() {
        wire.clear();
        client.write_tls(&mut wire).unwrap();
        let mut bytes = &wire[..];
        while !bytes.is_empty() {
            server.read_tls(&mut bytes).unwrap();
            server.process_new_packets()?;
        }
        wire.clear();
        server.write_tls(&mut wire).unwrap();
        let mut bytes = &wire[..];
        while !bytes.is_empty() {
            client.read_tls(&mut bytes).unwrap();
            client.process_new_packets()?;
        }
    }
    let group = client.negotiated_key_exchange_group().unwrap().name();
    assert_eq!(group, rustls::NamedGroup::X25519MLKEM768);
    assert_eq!(client.handshake_kind(), Some(rustls::HandshakeKind::Full));
    Ok(())
}

/// A handshake by the clock of the machine, with a client that shows this certificate or none.
fn connect(client: Option<CertificateParams>, optional: bool) -> Result<(), rustls::Error> {
    let mut params = Authority::params("root");
    params.not_before = OffsetDateTime::now_utc() - Duration::from_secs(3600);
    params.not_after = OffsetDateTime::now_utc() + Duration::from_secs(3600);
    let validity = (params.not_before, params.not_after);
    let root = Authority::root_with(params);
    let identity = |mut params: CertificateParams| {
        (params.not_before, params.not_after) = validity;
        let key = KeyPair::generate().unwrap();
        let chain = vec![root.sign_key(&params, &key)];
        certified_key(chain, PrivateKeyDer::Pkcs8(key.serialize_der().into())).unwrap()
    };
    let verifier = || PeerVerifier::new(Arc::new(root.bundle()), Kind::Workload);
    let accept = if optional { verifier().optional() } else { verifier() };
    let server = server_config(Arc::new(accept), identity(workload()), b"nodemesh/1")?;
    let client = client_config(Arc::new(verifier()), client.map(identity), b"nodemesh/1")?;
    handshake(client, server)
}

#[test]
fn two_workloads_shake_hands() {
    connect(Some(workload()), false).unwrap();
}

#[test]
fn a_client_without_a_certificate_is_let_in_only_where_that_is_said() {
    connect(None, false).unwrap_err();
    connect(None, true).unwrap();
    connect(Some(leaf(NODE)), true).unwrap_err();
}

#[test]
fn a_node_is_refused_in_the_handshake() {
    connect(Some(leaf(NODE)), false).unwrap_err();
}

#[test]
fn a_key_must_be_the_leaf_s() {
    let root = Authority::root("root");
    let key = PrivateKeyDer::Pkcs8(KeyPair::generate().unwrap().serialize_der().into());
    certified_key(vec![root.sign(&workload())], key).unwrap_err();
}

proptest! {
    #[test]
    fn parsers_are_total(der in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Ok(pod) = PodRef::decode(&der) {
            prop_assert_eq!(pod.encode(), der.clone());
        }
        prop_assert!(Leaf::parse(&CertificateDer::from(der)).is_err());
    }

    /// A certificate with one byte changed is refused, whether by its form or by its signature.
    #[test]
    fn no_byte_can_be_changed(position in any::<prop::sample::Index>(), bits in 1u8..) {
        let root = Authority::root("root");
        let mut der = root.sign(&workload()).to_vec();
        let at = position.index(der.len());
        der[at] ^= bits;
        let chain = [CertificateDer::from(der)];
        prop_assert!(root.bundle().verify(&chain, Usage::Client, now()).is_err());
    }
}
