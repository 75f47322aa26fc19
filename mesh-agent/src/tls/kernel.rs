//! TLS in the kernel: a tunnel whose keys the kernel has, and that this process reads and writes as
//! plaintext.
#![expect(clippy::wildcard_enum_match_arm, reason = "foreign enums that grow")]

use std::{
    fmt,
    io::{self, IoSliceMut},
    net::{Ipv4Addr, TcpListener},
    os::fd::{AsFd, AsRawFd as _},
    pin::Pin,
    task::{Context, Poll, ready},
};

use mesh_common::svid::crypto_provider;
use nix::{
    cmsg_space, libc,
    sys::socket::{
        ControlMessageOwned, MsgFlags, TlsGetRecordType as Record, recvmsg, setsockopt,
        sockopt::{TcpTlsRx, TcpTlsTx, TcpUlp, TlsCryptoInfo},
    },
};
use rustls::{
    AlertDescription, CipherSuite, ConnectionTrafficSecrets, Error as TlsError, ExtractedSecrets,
    crypto::cipher::{AeadKey, Iv},
};
use tokio::{
    io::{AsyncBufRead, AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::TcpStream,
};
use zeroize::Zeroize as _;

use super::{ALERT_CLOSE_NOTIFY, MAX_TEXT, Peer, poll_read_buffered};
use crate::{
    sys::tls::{expect_no_padding, send_record},
    tunnel::buffer::Buffer,
};

/// Blocks of 16 bytes that AES-GCM may encrypt under one key: RFC 8446, 5.5, has 2^24.5 full
/// records, of 2^10 blocks each. A sender in user space would take new keys then, which kernels take
/// since 6.14 only: here the tunnel ends.
const BLOCKS: u64 = 1 << 34;

/// A tunnel that has used up this much of its key carries no further connection.
const WORN: u64 = BLOCKS / 2;

/// `alert` of TLS's `ContentType`.
const ALERT: u8 = 21;

/// Why the kernel does not do it.
#[derive(Debug, thiserror::Error)]
pub enum Unavailable {
    /// There is no connection to try it on.
    #[error("cannot connect to this machine itself to try it: {0}")]
    Loopback(io::Error),
    /// It lacks it.
    #[error("the kernel has none (CONFIG_TLS, module tls): {0}")]
    Missing(io::Error),
    /// It has it, but not for what tunnels use.
    #[error("the kernel does not take TLS 1.3 with {suite:?}: {source}")]
    Suite {
        /// The cipher suite.
        suite: CipherSuite,
        /// What it said.
        source: io::Error,
    },
}

/// Tries on connections of this machine to itself whether the kernel takes the keys of every cipher
/// suite that tunnels use, for both directions.
///
/// # Errors
///
/// Why it does not.
pub fn probe() -> Result<(), Unavailable> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(Unavailable::Loopback)?;
    for suite in crypto_provider().cipher_suites {
        let suite = suite.suite();
        let connect = || std::net::TcpStream::connect(listener.local_addr()?);
        let socket = connect().map_err(Unavailable::Loopback)?;
        enable(&socket).map_err(Unavailable::Missing)?;
        let secrets = || (0, meaningless(suite));
        hand_over(&socket, ExtractedSecrets { tx: secrets(), rx: secrets() })
            .map_err(|source| Unavailable::Suite { suite, source })?;
    }
    Ok(())
}

/// Keys that nobody has agreed on.
fn meaningless(suite: CipherSuite) -> ConnectionTrafficSecrets {
    let (key, iv) = (AeadKey::from([0; 32]), Iv::from([0; 12]));
    match suite {
        CipherSuite::TLS13_AES_128_GCM_SHA256 => ConnectionTrafficSecrets::Aes128Gcm { key, iv },
        CipherSuite::TLS13_AES_256_GCM_SHA384 => ConnectionTrafficSecrets::Aes256Gcm { key, iv },
        // Which nobody here can hand over.
        _ => ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv },
    }
}

/// A TLS 1.3 connection whose keys the kernel has, both ways: what is written is encrypted.
pub struct KernelTls {
    socket: TcpStream,
    peer: Peer,
    /// What was received and not taken.
    buffer: Buffer,
    /// The peer has said close_notify.
    closed: bool,
    /// How many of [`BLOCKS`] are used.
    blocks: u64,
}

impl KernelTls {
    /// Gives the kernel the keys of a connection after its handshake. Nothing may have been read
    /// from the socket that followed the handshake.
    ///
    /// # Errors
    ///
    /// What the kernel says. The connection is closed then.
    pub(super) fn new(
        socket: TcpStream,
        secrets: ExtractedSecrets,
        peer: Peer,
    ) -> io::Result<Self> {
        enable(&socket)?;
        hand_over(&socket, secrets)?;
        Ok(Self { socket, peer, buffer: Buffer::default(), closed: false, blocks: 0 })
    }

    /// The other end.
    pub(super) const fn peer(&self) -> &Peer {
        &self.peer
    }

    /// Whether the key has served so long that the tunnel should end with the present connection.
    pub(super) const fn is_worn(&self) -> bool {
        self.blocks >= WORN
    }

    /// Fills the empty buffer, or finds the end.
    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.socket.poll_read_ready(cx))?;
            // Not `poll_read`: tokio takes a short read for the last one, but here it may be the end
            // of a record before another one.
            let received = self.socket.try_read(self.buffer.room());
            self.buffer.fill(received.as_ref().map_or(0, |received| *received));
            match received {
                Ok(1..) => return Poll::Ready(Ok(())),
                // Not even close_notify came before it: somebody cut the connection.
                Ok(0) => return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
                Err(error) => {
                    self.buffer.take(0);
                    if error.raw_os_error() == Some(libc::EIO) {
                        // There is a record that is no application data.
                        return Poll::Ready(self.take_control_record());
                    }
                    if error.kind() != io::ErrorKind::WouldBlock {
                        return Poll::Ready(Err(error));
                    }
                }
            }
        }
    }

    fn take_control_record(&mut self) -> io::Result<()> {
        let mut start = [0; 2];
        let mut parts = [IoSliceMut::new(&mut start)];
        let mut space = cmsg_space!(u8);
        let socket = self.socket.as_raw_fd();
        let received = recvmsg::<()>(socket, &mut parts, Some(&mut space), MsgFlags::MSG_DONTWAIT)?;
        let record = received.cmsgs()?.find_map(|message| match message {
            ControlMessageOwned::TlsGetRecordType(record) => Some(record),
            _ => None,
        });
        let length = received.bytes;
        match (record, start) {
            (Some(Record::Alert), [_, 0]) if length == 2 => {
                self.closed = true;
                Ok(())
            }
            (Some(Record::Alert), [_, description]) if length == 2 => {
                let alert = AlertDescription::from(description);
                Err(io::Error::new(io::ErrorKind::InvalidData, TlsError::AlertReceived(alert)))
            }
            // Tickets are not sent, so it asks for a new key.
            (Some(Record::Handshake), _) => Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the peer goes on with a new key, which TLS in the kernel does not have",
            )),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

impl fmt::Debug for KernelTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KernelTls").field("socket", &self.socket).finish_non_exhaustive()
    }
}

impl AsyncBufRead for KernelTls {
    fn poll_fill_buf(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<&[u8]>> {
        let this = self.get_mut();
        if this.buffer.is_empty() && !this.closed {
            ready!(this.poll_receive(cx))?;
        }
        Poll::Ready(Ok(this.buffer.bytes()))
    }

    fn consume(self: Pin<&mut Self>, taken: usize) {
        self.get_mut().buffer.take(taken);
    }
}

impl AsyncRead for KernelTls {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        poll_read_buffered(self, cx, buf)
    }
}

impl AsyncWrite for KernelTls {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.blocks >= BLOCKS {
            let spent = "TLS in the kernel has used up the key of this tunnel";
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::Unsupported, spent)));
        }
        loop {
            ready!(this.socket.poll_write_ready(cx))?;
            match this.socket.try_write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Ok(written) => {
                    this.blocks += blocks(written);
                    return Poll::Ready(Ok(written));
                }
                failed => return Poll::Ready(failed),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let socket = &mut self.get_mut().socket;
        loop {
            ready!(socket.poll_write_ready(cx))?;
            let said = socket.try_io(Interest::WRITABLE, || {
                send_record(socket.as_fd(), ALERT, &ALERT_CLOSE_NOTIFY)
            });
            match said {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                said => break said?,
            }
        }
        Pin::new(socket).poll_shutdown(cx)
    }
}

/// How many blocks AES-GCM makes of a write, at most: each record has one more for its type and one
/// for its tag.
const fn blocks(written: usize) -> u64 {
    (written.div_ceil(16) + 2 * written.div_ceil(MAX_TEXT)) as u64
}

fn enable(socket: &impl AsFd) -> io::Result<()> {
    Ok(setsockopt(socket, TcpUlp::default(), b"tls")?)
}

fn hand_over(socket: &impl AsFd, secrets: ExtractedSecrets) -> io::Result<()> {
    setsockopt(socket, TcpTlsTx, &Keys::new(secrets.tx)?.0)?;
    setsockopt(socket, TcpTlsRx, &Keys::new(secrets.rx)?.0)?;
    // Without it there is one copy more.
    expect_no_padding(socket.as_fd()).ok();
    Ok(())
}

/// The keys of one direction, as the kernel wants them. Gone from memory when dropped.
struct Keys(TlsCryptoInfo);

impl Keys {
    fn new((sequence, secrets): (u64, ConnectionTrafficSecrets)) -> io::Result<Self> {
        let info =
            |cipher_type| libc::tls_crypto_info { version: libc::TLS_1_3_VERSION, cipher_type };
        let rec_seq = sequence.to_be_bytes();
        let keys = match &secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => {
                let (salt, iv) = halves(iv)?;
                TlsCryptoInfo::Aes128Gcm(libc::tls12_crypto_info_aes_gcm_128 {
                    info: info(libc::TLS_CIPHER_AES_GCM_128),
                    iv,
                    key: *start(key)?,
                    salt,
                    rec_seq,
                })
            }
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => {
                let (salt, iv) = halves(iv)?;
                TlsCryptoInfo::Aes256Gcm(libc::tls12_crypto_info_aes_gcm_256 {
                    info: info(libc::TLS_CIPHER_AES_GCM_256),
                    iv,
                    key: *start(key)?,
                    salt,
                    rec_seq,
                })
            }
            _ => return Err(io::ErrorKind::Unsupported.into()),
        };
        Ok(Self(keys))
    }
}

impl Drop for Keys {
    fn drop(&mut self) {
        match &mut self.0 {
            TlsCryptoInfo::Aes128Gcm(keys) => keys.key.zeroize(),
            TlsCryptoInfo::Aes256Gcm(keys) => keys.key.zeroize(),
            TlsCryptoInfo::Chacha20Poly1305(keys) => keys.key.zeroize(),
        }
    }
}

fn start<const N: usize>(key: &AeadKey) -> io::Result<&[u8; N]> {
    key.as_ref().first_chunk().ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// The implicit and the explicit part of a nonce, as TLS 1.2 tells them apart.
fn halves(iv: &Iv) -> io::Result<([u8; 4], [u8; 8])> {
    let halves = iv.as_ref().split_first_chunk();
    let halves = halves.and_then(|(salt, rest)| Some((*salt, *rest.first_chunk()?)));
    halves.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests;
