//! From a TCP connection between two agents to a tunnel: the handshake, and who encrypts after it,
//! rustls or the kernel. The TLS configuration says which: whether it lets go of a connection's keys
//! (`enable_secret_extraction`).

pub mod kernel;

use std::{io, sync::Arc};

use rustls::{
    ClientConfig, ClientConnection, CommonState, Connection, Error as TlsError, ServerConfig,
    ServerConnection,
    pki_types::{CertificateDer, ServerName},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};
use tokio_util::either::Either;

use self::kernel::KernelTls;
use crate::tunnel::{ALPN, Coalescing, ReadAhead};

/// What carries a tunnel between two agents.
pub type Stream = Either<TlsStream<ReadAhead<Coalescing>>, KernelTls>;

/// Dials: the client's part of the handshake.
///
/// # Errors
///
/// What went wrong, with a [`rustls::Error`] inside if it was TLS.
pub async fn connect(
    config: &Arc<ClientConfig>,
    name: ServerName<'static>,
    tcp: TcpStream,
) -> io::Result<Stream> {
    let config = Arc::clone(config);
    if config.enable_secret_extraction {
        let session = ClientConnection::new(config, name).map_err(invalid)?;
        return in_kernel(session.into(), tcp).await;
    }
    let stream = TlsConnector::from(config).connect(name, read_ahead(tcp)).await?;
    check_protocol(stream.get_ref().1)?;
    Ok(Either::Left(stream.into()))
}

/// Accepts: the server's part of the handshake.
///
/// # Errors
///
/// As for [`connect`].
pub async fn accept(config: &Arc<ServerConfig>, tcp: TcpStream) -> io::Result<Stream> {
    let config = Arc::clone(config);
    if config.enable_secret_extraction {
        let session = ServerConnection::new(config).map_err(invalid)?;
        return in_kernel(session.into(), tcp).await;
    }
    let stream = TlsAcceptor::from(config).accept(read_ahead(tcp)).await?;
    check_protocol(stream.get_ref().1)?;
    Ok(Either::Left(stream.into()))
}

/// The certificates that the peer has shown, the leaf first.
pub fn peer_certificates(stream: &Stream) -> &[CertificateDer<'static>] {
    match stream {
        Either::Left(stream) => stream.get_ref().1.peer_certificates().unwrap_or_default(),
        Either::Right(stream) => stream.peer_certificates(),
    }
}

/// Whether a tunnel should not carry another connection because its key has served for long. rustls
/// takes a new one in time.
pub fn is_worn(stream: &Stream) -> bool {
    matches!(stream, Either::Right(stream) if stream.is_worn())
}

fn read_ahead(tcp: TcpStream) -> ReadAhead<Coalescing> {
    ReadAhead::new(Coalescing::new(tcp))
}

fn check_protocol(session: &CommonState) -> io::Result<()> {
    if session.alpn_protocol() == Some(ALPN) {
        Ok(())
    } else {
        Err(invalid(TlsError::NoApplicationProtocol))
    }
}

/// A handshake after which the kernel has the keys. An error closes the connection.
async fn in_kernel(mut session: Connection, mut tcp: TcpStream) -> io::Result<Stream> {
    loop {
        send(&mut session, &mut tcp).await?;
        if !session.is_handshaking() {
            break;
        }
        if let Err(error) = receive(&mut session, &mut tcp).await {
            // The peer is told why, if it still listens.
            send(&mut session, &mut tcp).await.ok();
            return Err(error);
        }
    }
    check_protocol(&session)?;
    let peer = session.peer_certificates().unwrap_or_default().to_vec();
    let secrets = session.dangerous_extract_secrets().map_err(invalid)?;
    let stream = KernelTls::new(tcp, secrets, peer).map_err(|error| {
        io::Error::new(error.kind(), format!("the kernel does not take the keys: {error}"))
    })?;
    Ok(Either::Right(stream))
}

async fn send(session: &mut Connection, tcp: &mut TcpStream) -> io::Result<()> {
    let mut records = Vec::new();
    while session.wants_write() {
        session.write_tls(&mut records)?;
    }
    tcp.write_all(&records).await
}

/// Reads one record and not a byte more: what follows the handshake is for the kernel to decrypt.
async fn receive(session: &mut Connection, tcp: &mut TcpStream) -> io::Result<()> {
    // Type, version and length.
    let mut header = [0; 5];
    tcp.read_exact(&mut header).await?;
    take(session, &header)?;
    let [.., high, low] = header;
    let mut body = vec![0; u16::from_be_bytes([high, low]).into()];
    tcp.read_exact(&mut body).await?;
    take(session, &body)
}

fn take(session: &mut Connection, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        session.read_tls(&mut bytes)?;
        session.process_new_packets().map_err(invalid)?;
    }
    Ok(())
}

fn invalid(error: TlsError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
