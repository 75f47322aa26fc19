//! Buffers that exist while bytes move, and reading ahead of TLS through one.

use std::{
    cell::RefCell,
    io,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::frame::{MAX_CONTROL, MAX_FRAME};

/// The size of every buffer, in bytes: four full records, and some control frames.
pub(super) const CAPACITY: usize = 4 * MAX_FRAME + 2 * MAX_CONTROL;

/// Buffers that each worker thread keeps when nobody uses them.
const SPARE: usize = 4;
thread_local! {
    static SPARES: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

/// Bytes on their way. It has room for [`CAPACITY`] only while there are any or some are expected:
/// mostly for the length of a poll. Only who is left with bytes that nobody takes keeps it for
/// longer, so idle connections hold none.
#[derive(Debug, Default)]
pub(crate) struct Buffer {
    /// All of it is initialised, so that several pieces can be read into at once.
    room: Box<[u8]>,
    taken: usize,
    filled: usize,
}

impl Buffer {
    /// What is there, not yet taken.
    pub(crate) fn bytes(&self) -> &[u8] {
        self.room.get(self.taken..self.filled).unwrap_or_default()
    }

    /// Whether everything was taken.
    pub(crate) const fn is_empty(&self) -> bool {
        self.taken == self.filled
    }

    /// The room behind what is there. If nothing comes of it, say so with `take(0)`.
    pub(crate) fn room(&mut self) -> &mut [u8] {
        if self.room.is_empty() {
            let spare = SPARES.with_borrow_mut(Vec::pop);
            self.room = spare.unwrap_or_else(|| vec![0; CAPACITY].into_boxed_slice());
        }
        self.room.get_mut(self.filled..).unwrap_or_default()
    }

    /// So many bytes of the room hold something now.
    pub(crate) fn fill(&mut self, bytes: usize) {
        self.filled = self.room.len().min(self.filled + bytes);
    }

    /// Takes bytes from the front. With the last one the room goes, too.
    pub(crate) fn take(&mut self, bytes: usize) {
        self.taken = self.filled.min(self.taken + bytes);
        if self.is_empty() {
            (self.taken, self.filled) = (0, 0);
            let room = std::mem::take(&mut self.room);
            SPARES.with_borrow_mut(|spares| {
                if !room.is_empty() && spares.len() < SPARE {
                    spares.push(room);
                }
            });
        }
    }

    /// Puts bytes behind what is there: control frames, for which every buffer has room.
    pub(crate) fn append(&mut self, bytes: &[u8]) {
        let room = self.room().get_mut(..bytes.len());
        debug_assert!(room.is_some(), "no room for a control frame");
        room.unwrap_or_default().copy_from_slice(bytes);
        self.fill(bytes.len());
    }
}

/// A socket under TLS, read in large pieces: rustls asks for 4 KiB at a time, which makes five
/// system calls of every full record. Holds a buffer only while rustls has not taken all of it.
#[derive(Debug)]
pub struct ReadAhead<S> {
    inner: S,
    buffer: Buffer,
}

impl<S> ReadAhead<S> {
    /// Nothing has been read yet.
    pub fn new(inner: S) -> Self {
        Self { inner, buffer: Buffer::default() }
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
        let Self { inner, buffer } = self.get_mut();
        if buffer.is_empty() {
            let mut room = ReadBuf::new(buffer.room());
            let read = Pin::new(inner).poll_read(cx, &mut room);
            let got = room.filled().len();
            buffer.fill(got);
            if got == 0 {
                buffer.take(0);
                return read;
            }
        }
        let piece = buffer.bytes();
        let piece = piece.get(..buf.remaining()).unwrap_or(piece);
        buf.put_slice(piece);
        let taken = piece.len();
        buffer.take(taken);
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
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

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
            assert!(ahead.buffer.room.len() <= CAPACITY);
        }
        assert!(got == sent);
        assert_eq!(ahead.buffer.room.len(), 0);
    }

    #[test]
    fn a_thread_keeps_few_buffers() {
        let mut lent: Vec<_> = (0..SPARE + 3).map(|_| Buffer::default()).collect();
        for buffer in &mut lent {
            assert_eq!(buffer.room().len(), CAPACITY);
        }
        lent.iter_mut().for_each(|buffer| buffer.take(0));
        Buffer::default().take(0);
        let kept =
            SPARES.with_borrow(|spares| spares.iter().map(|room| room.len()).collect::<Vec<_>>());
        assert_eq!(kept, [CAPACITY; SPARE]);
    }

    #[test]
    fn what_was_put_in_comes_out_in_order() {
        let mut buffer = Buffer::default();
        buffer.append(b"control");
        buffer.room()[..4].copy_from_slice(b"data");
        buffer.fill(4);
        buffer.take(3);
        buffer.append(b"!");
        assert_eq!(buffer.bytes(), b"troldata!");
        buffer.take(9);
        assert!(buffer.is_empty() && buffer.room.is_empty());
        assert_eq!(buffer.room().len(), CAPACITY);
    }
}
