//! Either end of a tunnel as somebody else than an agent makes it: with certificates of choice,
//! and then with whatever bytes. Written against `docs/identity.md` and `docs/tunnel.md`.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::{Context as _, Result, bail, ensure};
use mesh_common::svid::{
    Kind, POD_EXTENSION_OID, PeerVerifier, PodRef, TrustBundle, certified_key, client_config,
    server_config,
};
use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DistinguishedName,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _};
use rustls::sign::CertifiedKey;
use rustls::{ClientConnection, ServerConnection, StreamOwned};
use xtask::lab::control::TRUST_DOMAIN;
use xtask::lab::{Control, Netns, Pod};

pub(crate) const ALPN: &[u8] = b"nodemesh/1";
pub(crate) const FIN: [u8; 3] = [4, 0, 0];
pub(crate) const ACCEPTED: [u8; 4] = [2, 0, 1, 0];
const OPEN: u8 = 1;
const DATA: u8 = 3;

pub(crate) type Client = StreamOwned<ClientConnection, TcpStream>;

/// A CA that signs whatever it is asked for.
pub(crate) struct Ca {
    issuer: Issuer<'static, KeyPair>,
    /// Sent after each leaf.
    chain: Vec<CertificateDer<'static>>,
}

/// What a certificate says. [`Claim::of`] is what the control plane would issue.
pub(crate) struct Claim {
    pub(crate) names: Vec<SanType>,
    pub(crate) pod: Option<PodRef>,
    /// Seconds from now, which may be over.
    pub(crate) valid: std::ops::Range<i64>,
}

impl Ca {
    /// The mesh's own issuing CA, in the wrong hands.
    pub(crate) fn of(control: &Control) -> Result<Self> {
        let pem = fs::read(control.state_dir().join("ca/issuer.pem"))?;
        let key = KeyPair::try_from(&PrivateKeyDer::from_pem_slice(&pem)?)?;
        let chain =
            CertificateDer::pem_slice_iter(&pem).collect::<Result<Vec<_>, _>>().context("PEM")?;
        Ok(Self { issuer: Issuer::from_ca_cert_der(&chain[0], key)?, chain })
    }

    /// One that is like the mesh's in everything but its key.
    pub(crate) fn stranger() -> Result<Self> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate()?;
        let chain = vec![params.self_signed(&key)?.der().clone()];
        Ok(Self { issuer: Issuer::new(params, key), chain })
    }

    /// Signs.
    pub(crate) fn issue(&self, claim: &Claim) -> Result<Arc<CertifiedKey>> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = claim.names.clone();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.custom_extensions = claim
            .pod
            .iter()
            .map(|pod| CustomExtension::from_oid_content(POD_EXTENSION_OID, pod.encode()))
            .collect();
        params.use_authority_key_identifier_extension = true;
        let now = time::OffsetDateTime::from(SystemTime::now());
        params.not_before = now + time::Duration::seconds(claim.valid.start);
        params.not_after = now + time::Duration::seconds(claim.valid.end);
        let key = KeyPair::generate()?;
        let leaf = params.signed_by(&key, &self.issuer)?.der().clone();
        let chain = std::iter::once(leaf).chain(self.chain.iter().cloned()).collect();
        Ok(certified_key(chain, PrivateKeyDer::Pkcs8(key.serialize_der().into()))?)
    }
}

impl Claim {
    /// The truth about a registered pod.
    pub(crate) fn of(pod: &Pod) -> Result<Self> {
        let name = pod.pod_name().to_owned();
        Ok(Self {
            names: vec![uri(&workload(TRUST_DOMAIN, &name))?],
            pod: Some(PodRef { name, uid: pod.uid() }),
            valid: -60..3600,
        })
    }
}

/// The name of a workload of the laboratory, whose pods have service accounts of their own names.
pub(crate) fn workload(trust_domain: &str, name: &str) -> String {
    format!("spiffe://{trust_domain}/ns/default/sa/{name}")
}

/// A name in a certificate.
pub(crate) fn uri(text: &str) -> Result<SanType> {
    Ok(SanType::URI(text.try_into()?))
}

/// Judges as every peer of the mesh does.
pub(crate) fn verifier(control: &Control) -> Result<Arc<PeerVerifier>> {
    let root = CertificateDer::from_pem_file(control.state_dir().join("ca/root.pem"))?;
    let bundle = TrustBundle { trust_domain: TRUST_DOMAIN.parse()?, roots: vec![root] };
    Ok(Arc::new(PeerVerifier::new(Arc::new(bundle), Kind::Workload)))
}

/// Connects, and shows this certificate or none. A server may refuse it only after this.
pub(crate) fn dial(
    from: &Netns,
    to: SocketAddr,
    verifier: &Arc<PeerVerifier>,
    identity: Option<Arc<CertifiedKey>>,
    alpn: &[u8],
) -> Result<Client> {
    let mut config = client_config(Arc::clone(verifier), identity, alpn)?;
    config.alpn_protocols.retain(|name| !name.is_empty());
    let name = ServerName::try_from("nobody.invalid")?;
    let connection = ClientConnection::new(Arc::new(config), name)?;
    let mut stream = StreamOwned::new(connection, from.connect(to)?);
    while stream.conn.is_handshaking() {
        stream.conn.complete_io(&mut stream.sock).context("the handshake")?;
    }
    Ok(stream)
}

/// Lets one application connection go through a new tunnel, and checks that an echo server
/// answers.
pub(crate) fn converse(client: &mut Client, source: SocketAddr, bytes: &[u8]) -> Result<()> {
    client.write_all(&[open(source), data(bytes), FIN.to_vec()].concat())?;
    let mut status = ACCEPTED;
    client.read_exact(&mut status).context("waiting for the status")?;
    if status != ACCEPTED {
        bail!("refused: {status:02x?}");
    }
    let mut answer = vec![0; bytes.len() + 2 * FIN.len()];
    client.read_exact(&mut answer).context("waiting for the answer")?;
    ensure!(answer == [data(bytes), FIN.to_vec()].concat(), "answered {answer:02x?}");
    Ok(())
}

/// Serves one tunnel of one application connection, and echoes what comes; returns it.
pub(crate) fn serve(
    stream: TcpStream,
    verifier: Arc<PeerVerifier>,
    identity: Arc<CertifiedKey>,
) -> io::Result<Vec<u8>> {
    let config = server_config(verifier, identity, ALPN).map_err(io::Error::other)?;
    let connection = ServerConnection::new(Arc::new(config)).map_err(io::Error::other)?;
    let mut stream = StreamOwned::new(connection, stream);
    let mut heard = Vec::new();
    loop {
        let mut header = [0; 3];
        stream.read_exact(&mut header)?;
        let mut body = vec![0; usize::from(u16::from_be_bytes([header[1], header[2]]))];
        stream.read_exact(&mut body)?;
        match header[0] {
            OPEN => stream.write_all(&ACCEPTED)?,
            DATA => {
                stream.write_all(&data(&body))?;
                heard.append(&mut body);
            }
            _ => {
                stream.write_all(&FIN)?;
                return Ok(heard);
            }
        }
    }
}

/// An OPEN frame for a client that is seen as `source`.
pub(crate) fn open(source: SocketAddr) -> Vec<u8> {
    let trace: [u8; 16] = rand::random();
    let address = match source.ip() {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    frame(OPEN, &[&[1], &trace[..], &source.port().to_be_bytes(), &address].concat())
}

/// A DATA frame.
pub(crate) fn data(bytes: &[u8]) -> Vec<u8> {
    frame(DATA, bytes)
}

/// Any frame.
pub(crate) fn frame(kind: u8, body: &[u8]) -> Vec<u8> {
    let length = u16::try_from(body.len()).expect("a body of a frame is short");
    [&[kind], &length.to_be_bytes()[..], body].concat()
}
