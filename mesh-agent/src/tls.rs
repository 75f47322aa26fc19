//! From a TCP connection between two agents to a tunnel: the handshake, and who encrypts after it,
//! this process or the kernel.

mod handshake;
pub mod kernel;
pub mod records;

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use rustls::{
    ClientConfig, Error as TlsError, ServerConfig,
    client::UnbufferedClientConnection,
    pki_types::{CertificateDer, ServerName},
    server::UnbufferedServerConnection,
};
use tokio::{
    io::{AsyncBufRead, ReadBuf},
    net::TcpStream,
};
use tokio_util::either::Either;

use self::{
    handshake::{Session, establish},
    kernel::KernelTls,
    records::Records,
};
use crate::tunnel::Coalescing;

/// Type, version and length of a record, in bytes.
const HEADER: usize = 5;

/// The plaintext of the largest record, in bytes.
const MAX_TEXT: usize = 1 << 14;

/// `alert` of level warning, that the connection has been closed in order: RFC 8446, 6.1.
const ALERT_CLOSE_NOTIFY: [u8; 2] = [1, 0];

/// What carries a tunnel between two agents.
pub type Stream = Either<Records<Coalescing>, KernelTls>;

/// Who encrypts what a tunnel carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encryption {
    /// This process.
    InProcess,
    /// The kernel, which is given the keys after the handshake.
    InKernel,
}

/// Dials: the client's part of the handshake. The configuration must let go of a connection's keys
/// (`enable_secret_extraction`).
///
/// # Errors
///
/// What went wrong, with a [`rustls::Error`] inside if it was TLS.
pub async fn connect(
    config: &Arc<ClientConfig>,
    encryption: Encryption,
    name: ServerName<'static>,
    tcp: TcpStream,
) -> io::Result<Stream> {
    let session = UnbufferedClientConnection::new(Arc::clone(config), name).map_err(invalid)?;
    encrypted(session, encryption, tcp).await
}

/// Accepts: the server's part of the handshake. The configuration must let go of a connection's
/// keys.
///
/// # Errors
///
/// As for [`connect`].
pub async fn accept(
    config: &Arc<ServerConfig>,
    encryption: Encryption,
    tcp: TcpStream,
) -> io::Result<Stream> {
    let session = UnbufferedServerConnection::new(Arc::clone(config)).map_err(invalid)?;
    encrypted(session, encryption, tcp).await
}

/// The other end of a tunnel.
#[derive(Default)]
struct Peer {
    /// The leaf first.
    certificates: Arc<[CertificateDer<'static>]>,
    /// It has agreed to share the tunnel.
    shares: bool,
}

fn peer(stream: &Stream) -> &Peer {
    match stream {
        Either::Left(stream) => stream.peer(),
        Either::Right(stream) => stream.peer(),
    }
}

/// The certificates that the peer has shown, the leaf first.
pub fn peer_certificates(stream: &Stream) -> &Arc<[CertificateDer<'static>]> {
    &peer(stream).certificates
}

/// Whether both ends have agreed that connections share the tunnel.
pub fn is_shared(stream: &Stream) -> bool {
    peer(stream).shares
}

/// Whether a tunnel should not carry another connection because its key has served for long. This
/// process takes a new one in time.
pub fn is_worn(stream: &Stream) -> bool {
    matches!(stream, Either::Right(stream) if stream.is_worn())
}

/// An error closes the connection.
async fn encrypted<S: Session>(
    session: S,
    encryption: Encryption,
    mut tcp: TcpStream,
) -> io::Result<Stream> {
    let established = establish(session, &mut tcp).await?;
    match encryption {
        Encryption::InProcess => {
            Records::new(Coalescing::new(tcp), established).map(Either::Left).map_err(invalid)
        }
        Encryption::InKernel => KernelTls::new(tcp, established.secrets, established.peer)
            .map(Either::Right)
            .map_err(|error| {
                let text = format!("the kernel does not take the keys: {error}");
                io::Error::new(error.kind(), text)
            }),
    }
}

/// Reads, for whoever has no use for the buffer itself.
fn poll_read_buffered<R: AsyncBufRead>(
    mut stream: Pin<&mut R>,
    cx: &mut Context<'_>,
    buf: &mut ReadBuf<'_>,
) -> Poll<io::Result<()>> {
    let input = ready!(stream.as_mut().poll_fill_buf(cx))?;
    let taken = input.len().min(buf.remaining());
    buf.put_slice(input.get(..taken).unwrap_or(input));
    stream.consume(taken);
    Poll::Ready(Ok(()))
}

fn invalid(error: TlsError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
