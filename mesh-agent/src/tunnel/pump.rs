//! One direction of a relay: from a socket, perhaps framed, to whatever takes the bytes.

use std::{
    io,
    pin::{Pin, pin},
    task::{Context, Poll, ready},
};

use bytes::BufMut as _;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite};

use super::{
    buffer,
    frame::{FRAME_HEADER, Frame, MAX_CONTROL, MAX_DATA, MAX_FRAME},
};

/// Payload frames that one write may carry. A bulk stream then costs a quarter of the writes.
const BATCH: usize = 4;
// A preface (OPEN or STATUS) goes before the frames of a batch, and a FIN or RESET after them.
const _: () = assert!(BATCH * MAX_FRAME + 2 * MAX_CONTROL <= buffer::CAPACITY);
/// Bytes after which a direction lets other tasks run.
pub(super) const TURN: usize = 4 * BATCH * MAX_FRAME;

/// What the bytes look like on the sink.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Framing {
    /// DATA frames and a FIN.
    Frames,
    /// As they came.
    Raw,
}

/// How much may be read from the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Window {
    /// Nothing: it may turn out that somebody else is to get the bytes.
    Closed,
    /// No more than the first frame: the far side has not said yet that it wants the bytes.
    OneFrame,
    /// As much as the sink takes.
    Open,
}

/// Which end of a pump failed.
#[derive(Debug)]
pub(super) enum PumpError {
    /// Reading failed: the source's peer reset it.
    Source,
    /// Writing failed.
    Sink(io::Error),
}

/// Moves bytes one way. The sink's backpressure reaches the source: nothing is read before
/// everything read earlier is written and flushed.
#[derive(Debug)]
pub(super) struct Pump {
    framing: Framing,
    /// Bytes for the sink. Without capacity while there are none.
    buffer: Vec<u8>,
    /// How much of `buffer` the sink has taken.
    written: usize,
    unflushed: bool,
    /// Nothing follows what is in `buffer`.
    ended: bool,
    /// Bytes read from the source.
    moved: u64,
}

/// Why [`Pump::gather`] stopped.
enum Gathered {
    /// The source has nothing more at present and will wake the task.
    Blocked,
    /// There may be more, or the source has ended.
    Enough,
}

impl Pump {
    pub(super) const fn new(framing: Framing) -> Self {
        Self { framing, buffer: Vec::new(), written: 0, unflushed: false, ended: false, moved: 0 }
    }

    /// Puts a control frame behind what is already there.
    pub(super) fn push(&mut self, frame: &Frame) {
        if self.buffer.capacity() == 0 {
            self.buffer = buffer::borrow();
        }
        frame.encode(&mut self.buffer);
    }

    /// Puts a last frame behind what is already there.
    pub(super) fn end_with(&mut self, frame: &Frame) {
        self.push(frame);
        self.ended = true;
    }

    /// Whether the end of the source, or [`Pump::end_with`], has been seen.
    pub(super) const fn ended(&self) -> bool {
        self.ended
    }

    /// Bytes read from the source.
    pub(super) const fn moved(&self) -> u64 {
        self.moved
    }

    /// Moves what can be moved. Ready when the source has ended and the sink has everything.
    ///
    /// Without a source nothing is read.
    ///
    /// # Errors
    /// [`PumpError`]. After a [`PumpError::Source`] the pump goes on: end it with
    /// [`Pump::end_with`], and what was read before the error still comes first.
    pub(super) fn poll<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        mut source: Option<&mut R>,
        sink: &mut W,
        window: Window,
    ) -> Poll<Result<(), PumpError>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let mut turn = 0;
        loop {
            if self.written > 0 || self.unflushed {
                ready!(self.poll_drain(cx, sink)).map_err(PumpError::Sink)?;
            }
            let mut gathered = Gathered::Blocked;
            let open = match window {
                Window::Closed => false,
                Window::OneFrame => self.moved == 0,
                Window::Open => true,
            };
            if !self.ended
                && open
                && let Some(source) = source.as_deref_mut()
            {
                gathered = self.gather(cx, source, window).map_err(|_| PumpError::Source)?;
            }
            turn += self.buffer.len() - self.written;
            ready!(self.poll_drain(cx, sink)).map_err(PumpError::Sink)?;
            if self.ended {
                return Poll::Ready(Ok(()));
            }
            match gathered {
                Gathered::Blocked => return Poll::Pending,
                Gathered::Enough if turn >= TURN => {
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                Gathered::Enough => {}
            }
        }
    }

    /// Reads what is there, as far as the buffer has room for full frames.
    fn gather<R: AsyncRead + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut R,
        window: Window,
    ) -> io::Result<Gathered> {
        if self.buffer.capacity() == 0 {
            self.buffer = buffer::borrow();
        }
        let (header, most, batch) = match (self.framing, window) {
            (Framing::Frames, Window::Open) => (FRAME_HEADER, MAX_DATA, BATCH),
            (Framing::Frames, Window::Closed | Window::OneFrame) => (FRAME_HEADER, MAX_DATA, 1),
            (Framing::Raw, _) => (0, BATCH * MAX_DATA, 1),
        };
        for _ in 0..batch {
            let start = self.buffer.len();
            self.buffer.resize(start + header, 0);
            let read = pin!(source.read_buf(&mut (&mut self.buffer).limit(most))).poll(cx);
            let Poll::Ready(Ok(read @ 1..)) = read else {
                self.buffer.truncate(start);
                return match read {
                    Poll::Pending => Ok(Gathered::Blocked),
                    Poll::Ready(Err(error)) => Err(error),
                    Poll::Ready(Ok(_)) => {
                        self.ended = true;
                        if self.framing == Framing::Frames {
                            Frame::Fin.encode(&mut self.buffer);
                        }
                        Ok(Gathered::Enough)
                    }
                };
            };
            self.moved += read as u64;
            if self.framing == Framing::Frames
                && let Some(field) = self.buffer.get_mut(start..start + header)
            {
                field.copy_from_slice(&Frame::data_header(read));
            }
            if read < most {
                break;
            }
        }
        Ok(Gathered::Enough)
    }

    /// Writes and flushes the buffer, then gives it back.
    fn poll_drain<W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        sink: &mut W,
    ) -> Poll<io::Result<()>> {
        while let Some(rest) = self.buffer.get(self.written..).filter(|rest| !rest.is_empty()) {
            match ready!(Pin::new(&mut *sink).poll_write(cx, rest))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                n => self.written += n,
            }
            self.unflushed = true;
        }
        buffer::give_back(std::mem::take(&mut self.buffer));
        self.written = 0;
        if self.unflushed {
            ready!(Pin::new(sink).poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }
}
