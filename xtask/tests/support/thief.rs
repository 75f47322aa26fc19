//! Somebody who has stolen a node's key, and asks the control plane in the node's name.

use std::{io, sync::Arc};

use anyhow::{Context as _, Result};
use hyper_util::rt::TokioIo;
use mesh_common::api::{ALPN, IssueSvidRequest, control_plane_client::ControlPlaneClient};
use mesh_common::svid::{Kind, Leaf, PeerVerifier, TrustBundle, certified_key, client_config};
use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::{Status, transport::Endpoint};
use xtask::lab::control::TRUST_DOMAIN;
use xtask::lab::{Agent, Control, Netns};

/// Asks for the certificate of a pod with what this agent has in its runtime directory.
pub(crate) fn issue_svid(agent: &Agent, from: &Netns, uid: &str) -> Result<Result<Leaf, Status>> {
    let certificates = |name: &str| -> Result<Vec<_>> {
        let path = agent.runtime_dir().join(name);
        let found = CertificateDer::pem_file_iter(&path)?.collect::<Result<_, _>>();
        found.with_context(|| path.display().to_string())
    };
    let key = PrivateKeyDer::from_pem_file(agent.runtime_dir().join("node.pem"))?;
    let identity = certified_key(certificates("node.pem")?, key)?;
    let trust_domain = TRUST_DOMAIN.parse()?;
    let bundle = TrustBundle { trust_domain, roots: certificates("node-roots.pem")? };
    let verifier = PeerVerifier::new(Arc::new(bundle), Kind::Control);
    let tls = client_config(Arc::new(verifier), Some(identity), ALPN)?;
    let connector = TlsConnector::from(Arc::new(tls));
    let stream = from.connect(Control::endpoint().parse()?)?;
    stream.set_nonblocking(true)?;

    let csr = CertificateParams::default().serialize_request(&KeyPair::generate()?)?.der().to_vec();
    let request = IssueSvidRequest { pod_uid: uid.to_owned(), csr };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let name = ServerName::try_from("control.invalid")?;
        let stream = connector.connect(name, TcpStream::from_std(stream)?).await?;
        let mut stream = Some(TokioIo::new(stream));
        let connect = tower::service_fn(move |_| {
            std::future::ready(stream.take().ok_or_else(|| io::Error::other("it was the only one")))
        });
        let endpoint = Endpoint::from_static("http://control.invalid");
        let channel = endpoint.connect_with_connector(connect).await?;
        match ControlPlaneClient::new(channel).issue_svid(request).await {
            Ok(response) => {
                let leaf = response.into_inner().chain.into_iter().next();
                let leaf = CertificateDer::from(leaf.context("an empty chain")?);
                Ok(Ok(Leaf::parse(&leaf)?))
            }
            Err(status) => Ok(Err(status)),
        }
    })
}
