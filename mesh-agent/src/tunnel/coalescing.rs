//! A TCP socket that sends full segments.

use std::{
    io::{self, IoSlice, IoSliceMut, Read as _},
    pin::Pin,
    task::{Context, Poll, ready},
};

use nix::libc::{MSG_MORE, MSG_NOSIGNAL};
use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::TcpStream,
};

/// A write of so many bytes is one of several, more often than not.
const LARGE: usize = 8 * 1024;

/// A TCP socket, with `TCP_NODELAY`, on which the end of a large write waits for what is written
/// next, or for `poll_flush`: until then the kernel sends full segments only, so that a stream of
/// large writes is not cut up into as many packets, and its reader not woken as often. What was sent
/// before and is acknowledged lets the end go, too.
#[derive(Debug)]
pub struct Coalescing {
    stream: TcpStream,
    /// The kernel may be waiting.
    held: bool,
    /// There was more to read than room for it.
    bulk: bool,
}

impl Coalescing {
    /// Takes a connected socket.
    #[must_use]
    pub const fn new(stream: TcpStream) -> Self {
        Self { stream, held: false, bulk: false }
    }

    /// The socket, for its addresses and options.
    #[must_use]
    pub const fn get_ref(&self) -> &TcpStream {
        &self.stream
    }

    /// Reads what is there by one system call: into the first of `parts`, or, after a read that was
    /// not enough for what was there, into all of them, each filled before the next.
    pub(super) fn poll_read_parts(
        &mut self,
        cx: &mut Context<'_>,
        parts: &mut [IoSliceMut<'_>],
    ) -> Poll<io::Result<usize>> {
        let parts = if self.bulk { parts } else { parts.get_mut(..1).unwrap_or_default() };
        let whole = parts.iter().map(|part| part.len()).sum();
        loop {
            ready!(self.stream.poll_read_ready(cx))?;
            let read = || match &mut *parts {
                [part] => (&*SockRef::from(&self.stream)).read(part),
                parts => (&*SockRef::from(&self.stream)).read_vectored(parts),
            };
            if let Some(read) = self.attempt(Interest::READABLE, whole, read) {
                self.bulk = read.as_ref().is_ok_and(|read| *read == whole);
                return Poll::Ready(read);
            }
        }
    }

    fn poll_write_large(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let whole = bufs.iter().map(|buf| buf.len()).sum();
        loop {
            ready!(self.stream.poll_write_ready(cx))?;
            let socket = SockRef::from(&self.stream);
            let write = || socket.send_vectored_with_flags(bufs, MSG_MORE | MSG_NOSIGNAL);
            if let Some(written) = self.attempt(Interest::WRITABLE, whole, write) {
                self.held = true;
                return Poll::Ready(written);
            }
        }
    }

    /// One system call; `None` if the socket was not ready. As in tokio's own, one that moves less
    /// than `whole` says that the next would not be, and saves it.
    fn attempt(
        &self,
        interest: Interest,
        whole: usize,
        call: impl FnOnce() -> io::Result<usize>,
    ) -> Option<io::Result<usize>> {
        let mut short = None;
        let done = self.stream.try_io(interest, || match call() {
            Ok(moved) if (1..whole).contains(&moved) => {
                short = Some(moved);
                Err(io::ErrorKind::WouldBlock.into())
            }
            done => done,
        });
        match (short, done) {
            (Some(moved), _) => Some(Ok(moved)),
            (None, Err(error)) if error.kind() == io::ErrorKind::WouldBlock => None,
            (None, done) => Some(done),
        }
    }
}

impl AsyncRead for Coalescing {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Coalescing {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        if buf.len() >= LARGE {
            return self.poll_write_large(cx, &[IoSlice::new(buf)]);
        }
        self.held = false;
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if let [buf] = bufs {
            return self.poll_write(cx, buf);
        }
        if bufs.iter().map(|buf| buf.len()).sum::<usize>() >= LARGE {
            return self.poll_write_large(cx, bufs);
        }
        self.held = false;
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.held {
            // Sets what is set, which sends what is pending: tcp(7).
            this.stream.set_nodelay(true)?;
            this.held = false;
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        time::timeout,
    };

    use super::{super::tests::lab::tcp_pair, *};

    /// Less than the kernel waits on its own.
    const SOON: Duration = Duration::from_millis(50);

    async fn pair() -> (Coalescing, TcpStream) {
        let (near, far) = tcp_pair().await;
        near.set_nodelay(true).unwrap();
        (Coalescing::new(near), far)
    }

    /// Whether something arrives at once that was sent on an idle connection.
    async fn arrives(bytes: usize, flush: bool) -> bool {
        let (mut near, far) = pair().await;
        near.write_all(&vec![1; bytes]).await.unwrap();
        if flush {
            near.flush().await.unwrap();
        }
        timeout(SOON, far.peek(&mut [0])).await.is_ok()
    }

    #[tokio::test]
    async fn the_end_of_a_large_write_waits_for_a_flush() {
        assert!(!arrives(LARGE, false).await);
        // On a busy machine not each time.
        for (bytes, flush) in [(LARGE, true), (LARGE - 1, false), (LARGE - 1, true)] {
            let mut arrived = false;
            for _ in 0..20 {
                arrived = arrived || arrives(bytes, flush).await;
            }
            assert!(arrived, "{bytes} bytes, flushed: {flush}");
        }
    }

    #[tokio::test]
    async fn what_follows_lets_go_of_what_was_held() {
        let (mut near, mut far) = pair().await;
        let sent: Vec<u8> = (0..LARGE + 1).map(|n| n.to_le_bytes()[0]).collect();
        let (large, small) = sent.split_at(LARGE);
        near.write_all(large).await.unwrap();
        near.write_all(small).await.unwrap();
        assert!(!near.held);
        let mut got = vec![0; sent.len()];
        far.read_exact(&mut got).await.unwrap();
        assert!(got == sent);
    }

    #[tokio::test]
    async fn a_read_that_was_not_enough_is_followed_by_a_larger_one() {
        let (mut near, mut far) = pair().await;
        far.write_all(b"hello, world").await.unwrap();
        near.stream.readable().await.unwrap();
        let (mut first, mut second) = ([0; 4], [0; 3]);
        for (expected, filled) in [(4, b"hell\0\0\0"), (7, b"o, worl"), (1, b"d, worl")] {
            let mut parts = [IoSliceMut::new(&mut first), IoSliceMut::new(&mut second)];
            let read = std::future::poll_fn(|cx| near.poll_read_parts(cx, &mut parts)).await;
            assert_eq!(read.unwrap(), expected);
            assert_eq!([&first[..], &second[..]].concat(), filled);
        }
        // The last one was short, and the next one waits without having asked the kernel.
        assert!(!near.bulk);
        let mut parts = [IoSliceMut::new(&mut first)];
        let cx = &mut Context::from_waker(std::task::Waker::noop());
        assert!(near.poll_read_parts(cx, &mut parts).is_pending());
        drop(far);
        let read = std::future::poll_fn(|cx| near.poll_read_parts(cx, &mut parts)).await;
        assert_eq!(read.unwrap(), 0);
    }
}
