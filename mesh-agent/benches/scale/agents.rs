//! The agents that are real, in processes of their own.

use std::{path::PathBuf, sync::Arc, time::Duration};

use hyper_util::rt::TokioIo;
use mesh_agent::identity::{self, Credential, Identity};
use mesh_common::{
    api::{self, control_plane_client::ControlPlaneClient, watch_request::Message},
    svid::{Kind, PeerVerifier, TrustBundle, certified_key, client_config},
};
use rcgen::{CertificateParams, KeyPair};
use rustls::{
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
    sign::CertifiedKey,
};
use tokio::{
    net::TcpStream,
    sync::{mpsc, watch},
    time::{Instant, sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};

use super::{Usage, cluster::node, mib};

/// Where the control plane is, and what is wanted.
#[derive(Debug, clap::Args)]
pub(super) struct Where {
    #[arg(long)]
    port: u16,
    /// The roots to know it by.
    #[arg(long)]
    roots: PathBuf,
    /// Where files may be.
    #[arg(long)]
    dir: PathBuf,
    #[arg(long)]
    count: usize,
    #[arg(long)]
    seconds: u64,
}

/// The identity subsystem of an agent.
pub(super) async fn one(at: &Where) {
    let token_file = at.dir.join("token");
    std::fs::write(&token_file, node(0)).unwrap();
    let runtime_dir = at.dir.join("run");
    let before = Usage::now();
    let identity = Identity::start(identity::Config {
        node: node(0),
        control_plane: vec![format!("127.0.0.1:{}", at.port)],
        credential: Credential::ServiceAccount { token_file, bundle_file: at.roots.clone() },
        runtime_dir: runtime_dir.clone(),
        state: watch::channel(None).1,
    })
    .unwrap();
    let mut snapshots = identity.snapshots();
    snapshots.wait_for(|snapshot| snapshot.is_known()).await.unwrap();
    let known = Usage::now();
    println!(
        "{} workloads known after {:.2} s, {:.2} s of CPU: {:.1} MiB, at most {:.1} MiB, {:.1} MiB \
         before",
        snapshots.borrow().workloads().len(),
        (known.at - before.at).as_secs_f64(),
        known.cpu_since(&before),
        known.rss,
        known.peak,
        before.rss,
    );
    sleep(Duration::from_secs(1)).await;
    let (begin, mut versions) = (Usage::now(), 0);
    let window = Duration::from_secs(at.seconds);
    while begin.at.elapsed() < window {
        let left = window.saturating_sub(begin.at.elapsed());
        if timeout(left, snapshots.changed()).await.is_ok() {
            drop(snapshots.borrow_and_update());
            versions += 1;
        }
    }
    let end = Usage::now();
    let size = |name: &str| mib(std::fs::metadata(runtime_dir.join(name)).map_or(0, |m| m.len()));
    println!(
        "{versions} differences, each {:.2} ms of CPU: {:.1} MiB; on disk {:.1} MiB and {:.2} MiB of \
         changes",
        end.cpu_since(&begin) / f64::from(versions.max(1)) * 1e3,
        end.rss,
        size("snapshot.pb"),
        size("snapshot-changes.pb"),
    );
}

/// As many agents as are wanted, each with a connection of its own, that throw away what they get.
pub(super) async fn many(at: &Where) {
    let begin = Instant::now();
    let (done, mut finished) = mpsc::channel(at.count);
    for place in 1..=at.count {
        let done = done.clone();
        let (port, roots) = (at.port, at.roots.clone());
        tokio::spawn(async move { stream(port, &roots, place, done).await });
    }
    let mut bytes = 0;
    for _ in 0..at.count {
        bytes += finished.recv().await.unwrap();
    }
    println!(
        "{} have the whole snapshot after {:.1} s, {:.0} MiB",
        at.count,
        begin.elapsed().as_secs_f64(),
        mib(bytes)
    );
    sleep(Duration::from_secs(at.seconds)).await;
}

async fn stream(port: u16, roots: &PathBuf, place: usize, done: mpsc::Sender<u64>) {
    let root = CertificateDer::from_pem_file(roots).unwrap();
    let trust_domain = "mesh.example".parse().unwrap();
    let bundle = Arc::new(TrustBundle { trust_domain, roots: vec![root] });
    let key = KeyPair::generate().unwrap();
    let csr = CertificateParams::default().serialize_request(&key).unwrap().der().to_vec();
    let request =
        api::JoinRequest { service_account_token: node(place), csr, ..Default::default() };
    let answer = connect(port, &bundle, None).await.join(request).await.unwrap().into_inner();
    let chain = answer.chain.into_iter().map(CertificateDer::from).collect();
    let key = certified_key(chain, PrivateKeyDer::Pkcs8(key.serialize_der().into())).unwrap();

    let mut client = connect(port, &bundle, Some(key)).await;
    let (answers, requests) = mpsc::channel(8);
    let say = async |message| {
        answers.send(api::WatchRequest { message: Some(message) }).await.unwrap();
    };
    say(Message::Hello(api::Hello { agent_version: "scale".to_owned(), deltas: true })).await;
    let mut snapshots = client.watch(ReceiverStream::new(requests)).await.unwrap().into_inner();
    let (mut whole, mut bytes) = (false, 0);
    while let Some(part) = snapshots.message().await.unwrap() {
        bytes += prost::Message::encoded_len(&part) as u64;
        if part.more {
            continue;
        }
        say(Message::Ack(api::Ack { version: part.version })).await;
        if !whole {
            whole = true;
            done.send(bytes).await.unwrap();
        }
    }
}

async fn connect(
    port: u16,
    bundle: &Arc<TrustBundle>,
    identity: Option<Arc<CertifiedKey>>,
) -> ControlPlaneClient<Channel> {
    let verifier = PeerVerifier::new(Arc::clone(bundle), Kind::Control);
    let config = client_config(Arc::new(verifier), identity, api::ALPN).unwrap();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let connect = tower::service_fn(move |_: tonic::codegen::http::Uri| {
        let connector = connector.clone();
        async move {
            let stream = TcpStream::connect(("127.0.0.1", port)).await?;
            let name = ServerName::try_from("control.invalid").unwrap();
            connector.connect(name, stream).await.map(TokioIo::new)
        }
    });
    let endpoint = Endpoint::from_static("http://control.invalid");
    ControlPlaneClient::new(endpoint.connect_with_connector(connect).await.unwrap())
}
