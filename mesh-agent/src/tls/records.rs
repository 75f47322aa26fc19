//! The records of a TLS 1.3 connection after its handshake. rustls encrypts and decrypts each of
//! them and derives the keys, but none passes its buffers, which would copy every received byte
//! twice and keep 4 KiB for each idle connection: a record is decrypted where it was received.
#![expect(clippy::wildcard_enum_match_arm, reason = "foreign enums that grow")]

use std::{
    collections::VecDeque,
    fmt,
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};

use rustls::{
    AlertDescription, ConnectionTrafficSecrets, ContentType, Error as TlsError, HandshakeType,
    ProtocolVersion, Tls13CipherSuite,
    crypto::cipher::{
        AeadKey, InboundOpaqueMessage, Iv, MessageDecrypter, MessageEncrypter, OutboundPlainMessage,
    },
    kernel::KernelConnection,
};
use tokio::io::{AsyncBufRead, AsyncRead, AsyncWrite, ReadBuf};

use super::{
    ALERT_CLOSE_NOTIFY, HEADER, MAX_TEXT, Peer, handshake::Established, invalid, poll_read_buffered,
};
use crate::tunnel::buffer::{Buffer, CAPACITY};

/// What is behind the header of the largest record, in bytes: RFC 8446, 5.2.
const MAX_BODY: usize = MAX_TEXT + 256;
/// How many records one system call takes.
const AT_ONCE: usize = 5;
/// `alert` levels: RFC 8446, 6.
const FATAL: u8 = 2;
/// A KeyUpdate message: what follows is encrypted with the next key. RFC 8446, 4.6.3.
const KEY_UPDATE: &[u8] = &[24, 0, 0, 1, 0];
/// The same, and the receiver is to take its next key as well.
const KEY_UPDATE_REQUESTED: &[u8] = &[24, 0, 0, 1, 1];

/// Where the next keys of a connection come from.
pub(super) trait Renewal: Send + Sync {
    /// What we encrypt with behind our KeyUpdate.
    fn transmit(&mut self) -> Result<(u64, ConnectionTrafficSecrets), TlsError>;
    /// What the peer encrypts with behind its own.
    fn receive(&mut self) -> Result<(u64, ConnectionTrafficSecrets), TlsError>;
}

impl<Data: Send + Sync> Renewal for KernelConnection<Data> {
    fn transmit(&mut self) -> Result<(u64, ConnectionTrafficSecrets), TlsError> {
        self.update_tx_secret()
    }

    fn receive(&mut self) -> Result<(u64, ConnectionTrafficSecrets), TlsError> {
        self.update_rx_secret()
    }
}

/// A TLS 1.3 connection over `S`, whose keys this process has.
pub struct Records<S> {
    socket: S,
    suite: &'static Tls13CipherSuite,
    renewal: Box<dyn Renewal>,
    peer: Peer,
    opener: Opener,
    sealer: Sealer,
    /// Records as they were received. The first has lost its header once it is decrypted.
    received: Buffer,
    /// So much of it is plaintext that nobody has taken, in bytes,
    text: usize,
    /// and so much behind that is nothing any more: padding, and the tag.
    rest: usize,
    /// The peer has said close_notify,
    closed: bool,
    /// and we have.
    ended: bool,
    /// The peer wants us to take a new key.
    asked: bool,
    /// Encrypted records that the socket has not taken,
    sealed: VecDeque<Vec<u8>>,
    /// but for the beginning of the first, in bytes.
    sent: usize,
}

impl<S> Records<S> {
    /// Goes on with a connection after its handshake, of which nothing may be left to send, and
    /// nothing that followed it may have been read.
    ///
    /// # Errors
    ///
    /// When it is not TLS 1.3.
    pub(super) fn new(
        socket: S,
        Established { suite, secrets, renewal, peer }: Established,
    ) -> Result<Self, TlsError> {
        let suite = suite.tls13().ok_or(TlsError::HandshakeNotComplete)?;
        Ok(Self {
            socket,
            suite,
            renewal,
            peer,
            opener: Opener::new(suite, secrets.rx)?,
            sealer: Sealer::new(suite, secrets.tx)?,
            received: Buffer::default(),
            text: 0,
            rest: 0,
            closed: false,
            ended: false,
            asked: false,
            sealed: VecDeque::new(),
            sent: 0,
        })
    }

    /// The other end.
    pub(super) const fn peer(&self) -> &Peer {
        &self.peer
    }

    /// Has the next write take a new key.
    #[cfg(test)]
    pub(super) fn wear_out(&mut self) {
        self.sealer.limit = 0;
    }

    /// Decrypts the next record where it lies. False if it has not arrived in full.
    fn open(&mut self) -> Result<bool, TlsError> {
        let Some((&mut [kind, _, _, high, low], behind)) =
            self.received.bytes_mut().split_first_chunk_mut::<HEADER>()
        else {
            return Ok(false);
        };
        let kind = ContentType::from(kind);
        if kind != ContentType::ApplicationData {
            return Err(unexpected(kind));
        }
        let length = usize::from(u16::from_be_bytes([high, low]));
        if length > MAX_BODY {
            return Err(TlsError::PeerSentOversizedRecord);
        }
        let Some(body) = behind.get_mut(..length) else { return Ok(false) };
        let (kind, text) = self.opener.open(body)?;
        match (kind, text) {
            (ContentType::ApplicationData, _) => {
                self.text = text.len();
                self.rest = length - text.len();
                self.received.take(HEADER);
                // One without plaintext is over.
                self.skip(0);
                return Ok(true);
            }
            (ContentType::Alert, &[_, 0]) => self.closed = true,
            (ContentType::Alert, &[_, description]) => {
                return Err(TlsError::AlertReceived(description.into()));
            }
            (ContentType::Handshake, KEY_UPDATE | KEY_UPDATE_REQUESTED) => {
                self.asked |= text == KEY_UPDATE_REQUESTED;
                self.opener = Opener::new(self.suite, self.renewal.receive()?)?;
            }
            (ContentType::Handshake, text) => {
                return Err(TlsError::InappropriateHandshakeMessage {
                    expect_types: vec![HandshakeType::KeyUpdate],
                    got_type: text.first().map_or(HandshakeType::Unknown(0), |kind| (*kind).into()),
                });
            }
            (kind, _) => return Err(unexpected(kind)),
        }
        self.received.take(HEADER + length);
        Ok(true)
    }

    /// Takes plaintext, and with the last of a record what else there is of it.
    fn skip(&mut self, taken: usize) {
        let taken = taken.min(self.text);
        self.text -= taken;
        let rest = if self.text == 0 { std::mem::take(&mut self.rest) } else { 0 };
        self.received.take(taken + rest);
    }

    fn seal(&mut self, kind: ContentType, text: &[u8]) -> Result<(), TlsError> {
        let record = self.sealer.seal(kind, text)?;
        self.sealed.push_back(record);
        Ok(())
    }

    /// Takes a new key before the old one has served too long, or if the peer wants it.
    fn renew(&mut self) -> Result<(), TlsError> {
        if self.asked || self.sealer.is_worn() {
            self.seal(ContentType::Handshake, KEY_UPDATE)?;
            self.sealer = Sealer::new(self.suite, self.renewal.transmit()?)?;
            self.asked = false;
        }
        Ok(())
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Records<S> {
    /// Decrypts until there is plaintext, or the end.
    fn poll_text(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.text == 0 && !self.closed {
            match self.open() {
                Ok(true) => {}
                Ok(false) => ready!(self.poll_receive(cx))?,
                Err(error) => {
                    self.complain(cx, &error);
                    return Poll::Ready(Err(invalid(error)));
                }
            }
        }
        Poll::Ready(Ok(()))
    }

    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut room = ReadBuf::new(self.received.all_room());
        let read = Pin::new(&mut self.socket).poll_read(cx, &mut room);
        let got = room.filled().len();
        self.received.fill(got);
        if got > 0 {
            return Poll::Ready(Ok(()));
        }
        self.received.take(0);
        ready!(read)?;
        // Not even close_notify came before it: somebody cut the connection.
        Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()))
    }

    /// Tells the peer why, if the socket takes it at once.
    fn complain(&mut self, cx: &mut Context<'_>, error: &TlsError) {
        let alert = match error {
            // The peer has ended it.
            TlsError::AlertReceived(_) => return,
            TlsError::DecryptError => AlertDescription::BadRecordMac,
            TlsError::PeerSentOversizedRecord => AlertDescription::RecordOverflow,
            _ => AlertDescription::UnexpectedMessage,
        };
        if self.seal(ContentType::Alert, &[FATAL, alert.into()]).is_ok() {
            let _it_has_learned_or_not = self.poll_send(cx);
        }
    }

    /// Sends what is sealed.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.sealed.is_empty() {
            let mut parts = [IoSlice::new(&[]); AT_ONCE];
            let count = self.sealed.len().min(AT_ONCE);
            for (part, record) in parts.iter_mut().zip(&self.sealed) {
                *part = IoSlice::new(record);
            }
            let mut parts = parts.get_mut(..count).unwrap_or_default();
            IoSlice::advance_slices(&mut parts, self.sent);
            let written = ready!(Pin::new(&mut self.socket).poll_write_vectored(cx, parts))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.sent += written;
            while let Some(record) = self.sealed.pop_front_if(|record| record.len() <= self.sent) {
                self.sent -= record.len();
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl<S> fmt::Debug for Records<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Records").field("suite", &self.suite.common.suite).finish_non_exhaustive()
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncBufRead for Records<S> {
    fn poll_fill_buf(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<&[u8]>> {
        let this = self.get_mut();
        ready!(this.poll_text(cx))?;
        Poll::Ready(Ok(this.received.bytes().get(..this.text).unwrap_or_default()))
    }

    fn consume(self: Pin<&mut Self>, taken: usize) {
        self.get_mut().skip(taken);
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Records<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        poll_read_buffered(self, cx, buf)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Records<S> {
    /// Takes nothing while the socket has not taken what came before, so no more than one write is
    /// ever kept.
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_send(cx))?;
        let bytes = bytes.get(..CAPACITY).unwrap_or(bytes);
        this.renew().map_err(invalid)?;
        for text in bytes.chunks(MAX_TEXT) {
            this.seal(ContentType::ApplicationData, text).map_err(invalid)?;
        }
        if let Poll::Ready(Err(error)) = this.poll_send(cx) {
            return Poll::Ready(Err(error));
        }
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_send(cx))?;
        Pin::new(&mut this.socket).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.ended {
            this.seal(ContentType::Alert, &ALERT_CLOSE_NOTIFY).map_err(invalid)?;
            this.ended = true;
        }
        ready!(this.poll_send(cx))?;
        Pin::new(&mut this.socket).poll_shutdown(cx)
    }
}

/// Decrypts what the peer encrypts with one key.
struct Opener {
    decrypter: Box<dyn MessageDecrypter>,
    sequence: u64,
}

impl Opener {
    fn new(
        suite: &Tls13CipherSuite,
        (sequence, secrets): (u64, ConnectionTrafficSecrets),
    ) -> Result<Self, TlsError> {
        let (key, iv) = key(secrets)?;
        Ok(Self { decrypter: suite.aead_alg.decrypter(key, iv), sequence })
    }

    /// The type and the plaintext of a record, in the place of its body.
    fn open<'a>(&mut self, body: &'a mut [u8]) -> Result<(ContentType, &'a [u8]), TlsError> {
        let (outer, version) = (ContentType::ApplicationData, ProtocolVersion::TLSv1_2);
        let record = InboundOpaqueMessage::new(outer, version, body);
        let plain = self.decrypter.decrypt(record, self.sequence)?;
        self.sequence += 1;
        Ok((plain.typ, plain.payload))
    }
}

/// Encrypts with one key.
struct Sealer {
    encrypter: Box<dyn MessageEncrypter>,
    sequence: u64,
    /// So many records are enough. Half of what is safe: those that go on with another key, and
    /// those that end the connection, come on top.
    limit: u64,
}

impl Sealer {
    fn new(
        suite: &Tls13CipherSuite,
        (sequence, secrets): (u64, ConnectionTrafficSecrets),
    ) -> Result<Self, TlsError> {
        let (key, iv) = key(secrets)?;
        let limit = suite.common.confidentiality_limit / 2;
        Ok(Self { encrypter: suite.aead_alg.encrypter(key, iv), sequence, limit })
    }

    const fn is_worn(&self) -> bool {
        self.sequence >= self.limit
    }

    /// A record, header included.
    fn seal(&mut self, typ: ContentType, text: &[u8]) -> Result<Vec<u8>, TlsError> {
        let version = ProtocolVersion::TLSv1_2;
        let plain = OutboundPlainMessage { typ, version, payload: text.into() };
        let record = self.encrypter.encrypt(plain, self.sequence)?.encode();
        self.sequence += 1;
        Ok(record)
    }
}

/// A record of a kind that has no place here.
fn unexpected(kind: ContentType) -> TlsError {
    TlsError::InappropriateMessage {
        expect_types: vec![ContentType::ApplicationData],
        got_type: kind,
    }
}

fn key(secrets: ConnectionTrafficSecrets) -> Result<(AeadKey, Iv), TlsError> {
    match secrets {
        ConnectionTrafficSecrets::Aes128Gcm { key, iv }
        | ConnectionTrafficSecrets::Aes256Gcm { key, iv }
        | ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => Ok((key, iv)),
        _ => Err(TlsError::General("a key of an unknown cipher".to_owned())),
    }
}

#[cfg(test)]
pub(crate) mod tests;
