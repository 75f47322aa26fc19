//! The handshake of a tunnel: rustls says what to send, and gives the keys when it is done.

use std::io;

use rustls::{
    CommonState, Error as TlsError, ExtractedSecrets, SupportedCipherSuite,
    client::{ClientConnectionData, UnbufferedClientConnection},
    server::{ServerConnectionData, UnbufferedServerConnection},
    unbuffered::{ConnectionState, EncodeError, EncodeTlsData, UnbufferedStatus},
};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use super::{HEADER, Peer, invalid, records::Renewal};
use crate::tunnel::{ALPN, SHARED_ALPN};

/// What a handshake has brought.
pub(super) struct Established {
    /// The cipher.
    pub(super) suite: SupportedCipherSuite,
    /// Its keys.
    pub(super) secrets: ExtractedSecrets,
    /// Where the next ones come from.
    pub(super) renewal: Box<dyn Renewal>,
    /// Whose they are.
    pub(super) peer: Peer,
}

/// Either side of a handshake.
pub(super) trait Session {
    type Data;

    /// See [`rustls::unbuffered`].
    fn step<'i>(&mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'_, 'i, Self::Data>;

    /// What has been agreed on.
    fn agreed(&self) -> &CommonState;

    /// The keys, after the handshake.
    fn into_keys(self) -> Result<(ExtractedSecrets, Box<dyn Renewal>), TlsError>;
}

macro_rules! session {
    ($connection:ty, $data:ty) => {
        impl Session for $connection {
            type Data = $data;

            fn step<'i>(&mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'_, 'i, $data> {
                self.process_tls_records(incoming)
            }

            fn agreed(&self) -> &CommonState {
                self
            }

            fn into_keys(self) -> Result<(ExtractedSecrets, Box<dyn Renewal>), TlsError> {
                let (secrets, renewal) = self.dangerous_into_kernel_connection()?;
                Ok((secrets, Box::new(renewal)))
            }
        }
    };
}

session!(UnbufferedClientConnection, ClientConnectionData);
session!(UnbufferedServerConnection, ServerConnectionData);

/// What a handshake waits for.
enum Next {
    Step,
    Send,
    Receive,
}

/// Makes a tunnel of a connection. Reads not a byte of what follows the handshake, which is for
/// whoever has the keys then.
///
/// # Errors
///
/// What went wrong, with a [`TlsError`] inside if it was TLS.
pub(super) async fn establish<S: Session>(
    mut session: S,
    tcp: &mut (impl AsyncRead + AsyncWrite + Unpin),
) -> io::Result<Established> {
    shake_hands(&mut session, tcp).await?;
    let agreed = session.agreed();
    let shares = match agreed.alpn_protocol() {
        Some(ALPN) => false,
        Some(SHARED_ALPN) => true,
        Some(_) | None => return Err(invalid(TlsError::NoApplicationProtocol)),
    };
    let suite = agreed.negotiated_cipher_suite().ok_or(TlsError::HandshakeNotComplete);
    let certificates = agreed.peer_certificates().unwrap_or_default().into();
    let peer = Peer { certificates, shares };
    let (secrets, renewal) = session.into_keys().map_err(invalid)?;
    Ok(Established { suite: suite.map_err(invalid)?, secrets, renewal, peer })
}

async fn shake_hands<S: Session>(
    session: &mut S,
    tcp: &mut (impl AsyncRead + AsyncWrite + Unpin),
) -> io::Result<()> {
    let (mut incoming, mut outgoing) = (Vec::new(), Vec::new());
    // What is to come of the record that has begun, in bytes.
    let mut body = 0;
    loop {
        let UnbufferedStatus { discard, state } = session.step(&mut incoming);
        let next = match state {
            Ok(ConnectionState::EncodeTlsData(mut record)) => {
                encode(&mut record, &mut outgoing).map_err(io::Error::other)?;
                Next::Step
            }
            Ok(ConnectionState::TransmitTlsData(sent)) => {
                sent.done();
                Next::Send
            }
            Ok(ConnectionState::BlockedHandshake | ConnectionState::WriteTraffic(_)) => {
                Next::Receive
            }
            Ok(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) => {
                // Why, for the peer: all that is left to say, and nothing is looked at again.
                let alert = session.step(&mut incoming).state;
                if let Ok(ConnectionState::EncodeTlsData(mut record)) = alert {
                    encode(&mut record, &mut outgoing).map_err(io::Error::other)?;
                }
                tcp.write_all(&outgoing).await.ok();
                return Err(invalid(error));
            }
        };
        incoming.drain(..discard);
        match next {
            Next::Step => {}
            Next::Send => {
                tcp.write_all(&outgoing).await?;
                outgoing.clear();
            }
            Next::Receive if !session.agreed().is_handshaking() => return Ok(()),
            Next::Receive => {
                // rustls sees the header first: what is no TLS may have no body.
                body = if body == 0 {
                    read(tcp, &mut incoming, HEADER).await?;
                    match incoming.last_chunk() {
                        Some(length) => u16::from_be_bytes(*length).into(),
                        None => 0,
                    }
                } else {
                    read(tcp, &mut incoming, body).await?;
                    0
                };
            }
        }
    }
}

async fn read(
    tcp: &mut (impl AsyncRead + Unpin),
    incoming: &mut Vec<u8>,
    bytes: usize,
) -> io::Result<()> {
    let start = incoming.len();
    incoming.resize(start + bytes, 0);
    tcp.read_exact(incoming.get_mut(start..).unwrap_or_default()).await.map(drop)
}

fn encode<Data>(
    record: &mut EncodeTlsData<'_, Data>,
    outgoing: &mut Vec<u8>,
) -> Result<(), EncodeError> {
    let Err(EncodeError::InsufficientSize(size)) = record.encode(&mut []) else { return Ok(()) };
    let start = outgoing.len();
    outgoing.resize(start + size.required_size, 0);
    record.encode(outgoing.get_mut(start..).unwrap_or_default()).map(drop)
}

#[cfg(test)]
mod tests;
