//! Buffers that exist while bytes move, and reading ahead of TLS through one.

use std::{
    cell::RefCell,
    io,
    pin::{Pin, pin},
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};

use super::frame::{MAX_CONTROL, MAX_FRAME};

/// The size of every buffer, in bytes: four full records, and some control frames.
pub(super) const CAPACITY: usize = 4 * MAX_FRAME + 2 * MAX_CONTROL;

/// Buffers that each worker thread keeps when nobody uses them.
const SPARE: usize = 4;
thread_local! {
    static BUFFERS: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// An empty buffer, for the length of a poll. Only who is left with bytes that nobody takes keeps
/// it for longer, so idle connections hold none.
pub(crate) fn borrow() -> Vec<u8> {
    let spare = BUFFERS.with_borrow_mut(Vec::pop);
    spare.unwrap_or_else(|| Vec::with_capacity(CAPACITY))
}

/// Takes a buffer back; one that never was a buffer (no capacity) is nothing to keep.
pub(crate) fn give_back(mut buffer: Vec<u8>) {
    buffer.clear();
    BUFFERS.with_borrow_mut(|spare| {
        if buffer.capacity() > 0 && spare.len() < SPARE {
            spare.push(buffer);
        }
    });
}

/// A socket under TLS, read in large pieces: rustls asks for 4 KiB at a time, which makes five
/// system calls of every full record. Holds a buffer only while rustls has not taken all of it.
#[derive(Debug)]
pub struct ReadAhead<S> {
    inner: S,
    buffer: Vec<u8>,
    /// How much of `buffer` has been taken.
    taken: usize,
}

impl<S> ReadAhead<S> {
    /// Nothing has been read yet.
    pub const fn new(inner: S) -> Self {
        Self { inner, buffer: Vec::new(), taken: 0 }
    }

    /// The socket, for its addresses and options.
    pub const fn get_ref(&self) -> &S {
        &self.inner
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for ReadAhead<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.buffer.is_empty() {
            let mut buffer = borrow();
            let read = pin!(this.inner.read_buf(&mut buffer)).poll(cx);
            if buffer.is_empty() {
                give_back(buffer);
                return read.map_ok(|_| ());
            }
            this.buffer = buffer;
        }
        let rest = this.buffer.get(this.taken..).unwrap_or_default();
        let piece = rest.get(..buf.remaining()).unwrap_or(rest);
        buf.put_slice(piece);
        this.taken += piece.len();
        if this.taken == this.buffer.len() {
            give_back(std::mem::take(&mut this.buffer));
            this.taken = 0;
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for ReadAhead<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt as _;

    use super::*;

    #[tokio::test]
    async fn reading_ahead_changes_no_byte_and_keeps_no_buffer() {
        let (near, mut far) = tokio::io::duplex(1 << 20);
        let sent: Vec<u8> =
            (0..200_000_u32).map(|n| n.to_be_bytes()[3] ^ n.to_be_bytes()[2]).collect();
        far.write_all(&sent).await.unwrap();
        drop(far);
        let mut ahead = ReadAhead::new(near);
        let mut got = Vec::new();
        let mut piece = [0; 4096];
        loop {
            let n = ahead.read(&mut piece).await.unwrap();
            got.extend_from_slice(&piece[..n]);
            if n == 0 {
                break;
            }
            assert!(ahead.buffer.capacity() <= CAPACITY);
        }
        assert!(got == sent);
        assert_eq!(ahead.buffer.capacity(), 0);
    }

    #[test]
    fn a_thread_keeps_few_buffers() {
        let lent: Vec<_> = (0..SPARE + 3).map(|_| borrow()).collect();
        lent.into_iter().for_each(give_back);
        give_back(Vec::new());
        let kept = BUFFERS.with_borrow(|spare| spare.iter().map(Vec::capacity).collect::<Vec<_>>());
        assert_eq!(kept.len(), SPARE);
        assert!(kept.iter().all(|capacity| *capacity >= CAPACITY));
    }
}
