//! A connection to the control plane: TCP, TLS, gRPC, in this order, each with its own error.

use std::{
    fmt,
    future::Future,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use futures::future::BoxFuture;
use hyper_util::rt::TokioIo;
use mesh_common::api::control_plane_client::ControlPlaneClient;
use rustls::{
    ClientConfig,
    pki_types::{CertificateDer, ServerName},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

use super::status::Chain;

/// How long one address may take, separately for TCP and for TLS.
const STEP_WITHIN: Duration = Duration::from_secs(5);

/// How often a quiet connection is probed, and how long the answer may take: a control plane that
/// vanished without a word is noticed after the sum.
const PROBE_EVERY: Duration = Duration::from_secs(10);
const PROBE_WITHIN: Duration = Duration::from_secs(10);

/// From a control plane that knows no parts a snapshot is one message.
const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// The control plane's API over one connection. Once that is lost every call fails.
pub(super) type Client = ControlPlaneClient<Channel>;

/// A byte stream to an address of the control plane.
pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

type Dialing = BoxFuture<'static, io::Result<Box<dyn Stream>>>;

/// Opens byte streams to `host:port`. TCP, but for tests.
#[derive(Clone)]
pub(super) struct Dialer(Arc<dyn Fn(String) -> Dialing + Send + Sync>);

impl Dialer {
    /// Wraps a function.
    pub(super) fn new<F, S>(dial: impl Fn(String) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = io::Result<S>> + Send + 'static,
        S: Stream + 'static,
    {
        Self(Arc::new(move |address| {
            let stream = dial(address);
            Box::pin(async { Ok(Box::new(stream.await?) as Box<dyn Stream>) })
        }))
    }

    /// Plain TCP.
    pub(super) fn tcp() -> Self {
        Self::new(|address| async {
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            Ok(stream)
        })
    }
}

impl fmt::Debug for Dialer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Dialer")
    }
}

/// Why no address of the control plane can be used: for each one, in order, its reason.
#[derive(Debug)]
pub(super) struct ConnectError(Vec<(String, Reason)>);

/// Why one address cannot be used.
#[derive(Debug, thiserror::Error)]
enum Reason {
    #[error("no {0} within {STEP_WITHIN:?}")]
    Timeout(&'static str),
    /// Either another mesh, or a change of the roots that happened while this agent was away.
    #[error(
        "no root that this agent trusts vouches for its certificate: it is of another mesh, or the \
         mesh has got new roots meanwhile"
    )]
    Distrust,
    #[error("it does not accept this node's certificate: {0}")]
    Refused(String),
    #[error("{0}")]
    Other(String),
}

impl ConnectError {
    /// Whether a control plane answered that we have no reason to trust, or that does not trust us.
    pub(super) fn is_distrust(&self) -> bool {
        self.0.iter().any(|(_, reason)| matches!(reason, Reason::Distrust | Reason::Refused(_)))
    }
}

impl std::error::Error for ConnectError {}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the control plane cannot be used")?;
        for (i, (endpoint, reason)) in self.0.iter().enumerate() {
            write!(f, "{} {endpoint}: {reason}", if i == 0 { ":" } else { ";" })?;
        }
        Ok(())
    }
}

/// A connection that stands, TLS included.
pub(super) struct Connection {
    pub(super) client: Client,
    /// Which address answered.
    pub(super) endpoint: String,
    /// The chain that the control plane has shown, leaf first.
    pub(super) server_chain: Vec<CertificateDer<'static>>,
    refused: Arc<AtomicBool>,
}

impl Connection {
    /// Whether the control plane has refused the certificate that it was shown. With TLS 1.3 it says so
    /// after the handshake is over for us, and then every call fails.
    pub(super) fn is_refused(&self) -> bool {
        self.refused.load(Ordering::Relaxed)
    }
}

/// Hears that a certificate is refused: HTTP/2 keeps only the words of an error.
struct Hearing<S> {
    stream: S,
    refused: Arc<AtomicBool>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Hearing<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.stream).poll_read(cx, buffer);
        if let Poll::Ready(Err(error)) = &read
            && is_refusal(error)
        {
            self.refused.store(true, Ordering::Relaxed);
        }
        read
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Hearing<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, buffer);
        if let Poll::Ready(Err(_)) = &written {
            // Nobody would read any more what the control plane has said before it hung up.
            drop(self.poll_read(cx, &mut ReadBuf::new(&mut [0; 64])));
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

fn is_refusal(error: &io::Error) -> bool {
    use rustls::{AlertDescription as Alert, Error::AlertReceived};
    matches!(
        error.get_ref().and_then(|error| error.downcast_ref()),
        Some(AlertReceived(
            Alert::UnknownCA
                | Alert::BadCertificate
                | Alert::CertificateExpired
                | Alert::CertificateRevoked
                | Alert::CertificateUnknown
        ))
    )
}

/// Tries the addresses in turn.
pub(super) async fn connect(
    dialer: &Dialer,
    endpoints: &[String],
    tls: ClientConfig,
) -> Result<Connection, ConnectError> {
    let connector = TlsConnector::from(Arc::new(tls));
    let mut failures = Vec::new();
    for endpoint in endpoints {
        match connect_one(dialer, endpoint, &connector).await {
            Ok(connection) => return Ok(connection),
            Err(reason) => failures.push((endpoint.clone(), reason)),
        }
    }
    Err(ConnectError(failures))
}

async fn connect_one(
    dialer: &Dialer,
    endpoint: &str,
    tls: &TlsConnector,
) -> Result<Connection, Reason> {
    let stream = timeout(STEP_WITHIN, (dialer.0)(endpoint.to_owned()))
        .await
        .map_err(|_| Reason::Timeout("answer"))?
        .map_err(|error| Reason::Other(error.to_string()))?;
    // Neither sent nor compared: the certificate names the control plane, not a host.
    let name = ServerName::try_from("control.nodemesh").expect("a valid host name");
    let stream = timeout(STEP_WITHIN, tls.connect(name, stream))
        .await
        .map_err(|_| Reason::Timeout("TLS handshake"))?
        .map_err(|error| tls_reason(&error))?;
    let server_chain = stream.get_ref().1.peer_certificates().unwrap_or_default().to_vec();

    let refused = Arc::new(AtomicBool::new(false));
    let mut stream = Some(TokioIo::new(Hearing { stream, refused: Arc::clone(&refused) }));
    let channel = Endpoint::from_static("http://control.nodemesh")
        .http2_keep_alive_interval(PROBE_EVERY)
        .keep_alive_timeout(PROBE_WITHIN)
        .connect_with_connector(service_fn(move |_| {
            // Reconnecting is for the task that owns the connection: it checks everything anew.
            let stream = stream.take().ok_or("the connection to the control plane is lost");
            std::future::ready(stream)
        }))
        .await
        .map_err(|error| {
            let why = Chain(&error).to_string();
            if refused.load(Ordering::Relaxed) { Reason::Refused(why) } else { Reason::Other(why) }
        })?;
    let client = Client::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
    Ok(Connection { client, endpoint: endpoint.to_owned(), server_chain, refused })
}

/// Why a handshake failed, in words: rustls has names for the reasons, not sentences.
fn tls_reason(error: &io::Error) -> Reason {
    use rustls::{CertificateError, Error::InvalidCertificate};
    match error.get_ref().and_then(|error| error.downcast_ref()) {
        Some(InvalidCertificate(CertificateError::UnknownIssuer)) => Reason::Distrust,
        Some(InvalidCertificate(CertificateError::Other(why))) => Reason::Other(why.0.to_string()),
        Some(_) | None => Reason::Other(error.to_string()),
    }
}

/// What the control plane answered, or why there is no answer, in words.
pub(super) fn words(status: &tonic::Status) -> String {
    match std::error::Error::source(status) {
        Some(cause) => Chain(cause).to_string(),
        None if status.message().is_empty() => status.code().description().to_owned(),
        None => status.message().to_owned(),
    }
}
