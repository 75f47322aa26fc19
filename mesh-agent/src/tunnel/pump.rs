//! One direction of a relay: from a socket, perhaps framed, to whatever takes the bytes.

use std::{
    array,
    io::{self, IoSliceMut},
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::AsyncWrite;

use super::{
    app::App,
    buffer::{self, Buffer},
    frame::{FRAME_HEADER, Frame, MAX_CONTROL, MAX_DATA, MAX_FRAME},
};

/// Payload frames that one write may carry. A bulk stream then costs a quarter of the writes.
const BATCH: usize = 4;
/// Bytes that are read at once, with the headers of their frames: no more than a segment of the
/// loopback interface (MTU 65536) has room for, lest each is followed by another of a few bytes.
pub(super) const AT_ONCE: usize = (1 << 16) - 128;
// A preface (OPEN or STATUS) goes before the frames of a batch, and a FIN or RESET after them.
const _: () = assert!(AT_ONCE <= BATCH * MAX_FRAME);
const _: () = assert!(AT_ONCE + 2 * MAX_CONTROL <= buffer::CAPACITY);
/// Bytes after which a direction lets other tasks run.
pub(super) const TURN: usize = 4 * AT_ONCE;

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

/// Moves bytes one way. The sink's backpressure reaches the source: nothing is read before the sink
/// has taken everything read earlier. It is flushed when there is nothing more to read.
#[derive(Debug)]
pub(super) struct Pump {
    framing: Framing,
    /// Bytes for the sink.
    buffer: Buffer,
    /// The sink has not taken all of `buffer`, and nothing is put behind it.
    stuck: bool,
    /// The sink may be holding back what it has taken.
    unflushed: bool,
    /// Nothing follows what is in `buffer`.
    ended: bool,
    /// Bytes read from the source.
    moved: u64,
}

impl Pump {
    pub(super) fn new(framing: Framing) -> Self {
        Self {
            framing,
            buffer: Buffer::default(),
            stuck: false,
            unflushed: false,
            ended: false,
            moved: 0,
        }
    }

    /// Puts a control frame behind what is already there.
    pub(super) fn push(&mut self, frame: &Frame) {
        let mut bytes = Vec::with_capacity(MAX_CONTROL);
        frame.encode(&mut bytes);
        self.buffer.append(&bytes);
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
    pub(super) fn poll<R: App, W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        mut source: Option<&mut R>,
        sink: &mut W,
        window: Window,
    ) -> Poll<Result<(), PumpError>> {
        let mut turn = 0;
        loop {
            if self.stuck {
                ready!(self.poll_drain(cx, sink)).map_err(PumpError::Sink)?;
            }
            let more = match source.as_deref_mut() {
                Some(source) => self.gather(cx, source, window).map_err(|_| PumpError::Source)?,
                None => false,
            };
            turn += self.buffer.bytes().len();
            ready!(self.poll_drain(cx, sink)).map_err(PumpError::Sink)?;
            if !more {
                ready!(self.poll_flush(cx, sink)).map_err(PumpError::Sink)?;
                return if self.ended { Poll::Ready(Ok(())) } else { Poll::Pending };
            }
            if turn >= TURN {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
    }

    /// Reads what is there, as far as the window and the buffer allow. An end that is known to come
    /// right behind the last bytes goes with them. False if nothing more is to be had, at present or
    /// ever.
    fn gather<R: App>(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut R,
        window: Window,
    ) -> io::Result<bool> {
        while !self.ended {
            let batch = match window {
                Window::Open => BATCH,
                Window::OneFrame if self.moved == 0 => 1,
                Window::OneFrame | Window::Closed => return Ok(false),
            };
            let free = AT_ONCE.saturating_sub(self.buffer.bytes().len());
            if free < MAX_FRAME {
                return Ok(true);
            }
            match self.poll_read(cx, source, free, batch) {
                Poll::Pending => return Ok(false),
                Poll::Ready(read) => read?,
            }
        }
        Ok(false)
    }

    /// Reads once, at most `free` bytes with their headers, and at most `batch` frames.
    fn poll_read<R: App>(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut R,
        free: usize,
        batch: usize,
    ) -> Poll<io::Result<()>> {
        let (header, most, batch) = match self.framing {
            Framing::Frames => (FRAME_HEADER, MAX_DATA, batch),
            Framing::Raw => (0, free, 1),
        };
        let room = self.buffer.room().get_mut(..free).unwrap_or_default();
        let mut payloads = room.chunks_mut(header + most).filter_map(|it| it.get_mut(header..));
        let mut parts: [_; BATCH] =
            array::from_fn(|_| IoSliceMut::new(payloads.next().unwrap_or_default()));
        let read = source.poll_read(cx, parts.get_mut(..batch).unwrap_or_default());
        let Poll::Ready(Ok(read @ 1..)) = read else {
            self.buffer.take(0);
            return read.map_ok(|_| {
                self.ended = true;
                if self.framing == Framing::Frames {
                    self.push(&Frame::Fin);
                }
            });
        };
        self.moved += read as u64;
        let (mut rest, mut filled) = (read, read);
        let frames = self.buffer.room().chunks_mut(header + most);
        for frame in frames.take(read.div_ceil(most)) {
            let payload = rest.min(most);
            if let (Framing::Frames, Some(field)) = (self.framing, frame.get_mut(..header)) {
                field.copy_from_slice(&Frame::data_header(payload));
            }
            rest -= payload;
            filled += header;
        }
        self.buffer.fill(filled);
        Poll::Ready(Ok(()))
    }

    /// Has the sink take the buffer.
    fn poll_drain<W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        sink: &mut W,
    ) -> Poll<io::Result<()>> {
        while !self.buffer.is_empty() {
            self.stuck = true;
            match ready!(Pin::new(&mut *sink).poll_write(cx, self.buffer.bytes()))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                n => self.buffer.take(n),
            }
            self.unflushed = true;
        }
        self.stuck = false;
        Poll::Ready(Ok(()))
    }

    fn poll_flush<W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        sink: &mut W,
    ) -> Poll<io::Result<()>> {
        if self.unflushed {
            ready!(Pin::new(sink).poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }
}
