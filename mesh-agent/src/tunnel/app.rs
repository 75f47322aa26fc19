//! The socket that faces an application, and the two ways in which it can end.

use std::{
    io::{self, IoSliceMut},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use socket2::SockRef;
use tokio::{io::AsyncWrite, net::TcpStream};

use super::coalescing::Coalescing;

/// A stream that ends in order only if it is told to: dropped without [`App::finish`], its peer
/// sees a reset.
pub trait App: AsyncWrite + Unpin {
    /// Reads what is there into `parts`, each filled before the next. Returns how many bytes; 0 at
    /// the end.
    ///
    /// # Errors
    /// Those of the socket.
    fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        parts: &mut [IoSliceMut<'_>],
    ) -> Poll<io::Result<usize>>;

    /// Lets the peer have what was written, all of it, after the stream is gone.
    fn finish(self);
}

/// A TCP socket whose other end is an application (or, for plaintext that policy allows, any peer).
///
/// It lingers for zero seconds from the start, so that whatever ends this process, or drops the
/// socket early, resets the connection: a truncated stream never looks complete.
#[derive(Debug)]
pub struct AppSocket(Coalescing);

impl AppSocket {
    /// Takes a connected socket, at best the moment it is accepted or connected.
    ///
    /// # Errors
    /// What setting `SO_LINGER` or `TCP_NODELAY` says; the connection is then reset or closed.
    pub fn new(stream: TcpStream) -> io::Result<Self> {
        SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
        stream.set_nodelay(true)?;
        Ok(Self::prepared(stream))
    }

    /// Takes a socket that was made, or accepted by a listener that was made, with `SO_LINGER` 0 and
    /// `TCP_NODELAY`.
    #[must_use]
    pub const fn prepared(stream: TcpStream) -> Self {
        Self(Coalescing::new(stream))
    }

    /// The socket, for its addresses and options.
    #[must_use]
    pub const fn get_ref(&self) -> &TcpStream {
        self.0.get_ref()
    }
}

impl App for AppSocket {
    fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        parts: &mut [IoSliceMut<'_>],
    ) -> Poll<io::Result<usize>> {
        self.0.poll_read_parts(cx, parts)
    }

    fn finish(self) {
        // With linger zero, close() throws away what the peer has not acknowledged. If the option
        // cannot be cleared the peer is reset, which is safe.
        if let Err(error) = SockRef::from(self.get_ref()).set_linger(None) {
            tracing::debug!(%error, "cannot clear SO_LINGER: the application is reset");
        }
    }
}

impl AsyncWrite for AppSocket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
