//! What must hold of any bytes whatever. The fuzz targets call these functions, and the agent's
//! unit tests replay the corpus through them.

mod shared;

use std::{
    cell::{Cell, RefCell},
    io::{self, IoSliceMut},
    net::SocketAddr,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
};

use tokio::io::{AsyncBufRead, AsyncRead, AsyncWrite, ReadBuf};

pub use self::shared::shared;

use crate::tunnel::{
    self, App, End, Header, Malformed, Role, TraceId, Traffic,
    frame::{Decoded, Decoder, Frame, MAX_CONTROL, MAX_DATA, Status},
};

/// Frames do not depend on how the bytes were cut, and there is one spelling for each.
pub fn frames(data: &[u8]) {
    let whole = decode(data, |rest| rest);
    let mut size = 0;
    for pieces in [
        decode(data, |_| 1),
        decode(data, |_| 2),
        decode(data, |rest| {
            size = (size * 7 + 3) % 41;
            rest.min(1 + size)
        }),
    ] {
        assert_eq!(whole, pieces, "the cuts show");
    }
    let mut again = Vec::new();
    let mut payload = whole.payload.as_slice();
    for frame in &whole.frames {
        frame.encode(&mut again);
        if let Frame::Data(len) = frame {
            let (part, rest) = payload.split_at(payload.len().min(usize::from(*len)));
            again.extend_from_slice(part);
            payload = rest;
        }
    }
    assert!(data.starts_with(&again), "decoding and encoding is not the identity");
    let unfinished = data.len() - again.len();
    assert!(whole.error.is_some() || unfinished < MAX_CONTROL, "bytes have vanished");
}

/// The body of an OPEN is refused, or is a header that says the same again.
pub fn open(body: &[u8]) {
    let Some(Frame::Open(header)) = sole_frame(1, body) else { return };
    let again = Header::new(header.source(), header.trace());
    assert_eq!(header, again, "a source address has two spellings");
    assert_encodes(&Frame::Open(again), 1, body);
}

/// The body of a STATUS is refused, or is a status that can stand in a log line.
pub fn status(body: &[u8]) {
    let Some(Frame::Status(status)) = sole_frame(2, body) else { return };
    if let Status::Refused(refusal) = &status {
        assert!(!refusal.text().contains(char::is_control));
        assert!(!refusal.to_string().is_empty());
    }
    assert_encodes(&Frame::Status(status), 2, body);
}

fn frame_of(kind: u8, body: &[u8]) -> Option<Vec<u8>> {
    let [hi, lo] = u16::try_from(body.len()).ok()?.to_be_bytes();
    Some([&[kind, hi, lo], body].concat())
}

fn sole_frame(kind: u8, body: &[u8]) -> Option<Frame> {
    let bytes = frame_of(kind, body)?;
    let (frame, used) = Frame::parse(&bytes).ok()?.expect("the frame is whole");
    assert_eq!(used, bytes.len());
    Some(frame)
}

fn assert_encodes(frame: &Frame, kind: u8, body: &[u8]) {
    let mut bytes = Vec::new();
    frame.encode(&mut bytes);
    assert_eq!(Some(bytes), frame_of(kind, body));
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Stream {
    frames: Vec<Frame>,
    payload: Vec<u8>,
    error: Option<Malformed>,
}

/// Decodes `data`, shown to the decoder in pieces of `size(bytes left)`.
fn decode(data: &[u8], mut size: impl FnMut(usize) -> usize) -> Stream {
    let mut stream = Stream::default();
    let mut decoder = Decoder::default();
    let mut rest = data;
    while !rest.is_empty() {
        let (mut piece, after) = rest.split_at(size(rest.len()).clamp(1, rest.len()));
        rest = after;
        while !piece.is_empty() {
            let used = match decoder.decode(piece) {
                Ok(Decoded::Partial(used)) => used,
                Ok(Decoded::Frame(used, frame)) => {
                    stream.frames.push(frame);
                    used
                }
                Ok(Decoded::Payload(payload)) => {
                    // Half of it, as if the application took no more.
                    let taken = payload.len().div_ceil(2);
                    stream.payload.extend_from_slice(&payload[..taken]);
                    decoder.advance(taken);
                    taken
                }
                Err(error) => {
                    stream.error = Some(error);
                    return stream;
                }
            };
            assert!((1..=piece.len()).contains(&used), "the decoder stands still, or runs away");
            piece = &piece[used..];
        }
    }
    stream
}

/// A relay hands the application exactly the bytes that a naive reading of the tunnel finds, ends
/// as it says, and writes a well-formed stream of its own, however reads and writes are cut.
///
/// The first byte picks the role, and whether the other agent falls silent after its end; the second
/// how much is cut; then come a length and as many bytes that the application sends; the rest is
/// what the other agent sends.
pub fn relay(data: &[u8]) {
    let Some((&[role, cuts, says], rest)) = data.split_first_chunk::<3>() else { return };
    let (said, received) = rest.split_at(rest.len().min(usize::from(says)));
    let (client, silent) = (role & 1 == 0, role & 2 == 0);
    let expected = Expected::of(received, client);
    let received = &received[..if silent { expected.length } else { received.len() }];

    let delivered = Rc::new(Delivered::default());
    let cuts = Rc::new(Cuts(Cell::new(u32::from(cuts) + 1)));
    let app =
        Application { says: said.to_vec(), log: Rc::clone(&delivered), cuts: Rc::clone(&cuts) };
    let closes = !(silent && expected.settled);
    let mut wire = Wire { input: received.to_vec(), closes, shown: 0, output: Vec::new(), cuts };
    let source = SocketAddr::from(([192, 0, 2, 1], 40_000));
    let header = Header::new(source, TraceId([7; 16]));
    let role = match (client, role & 4 == 0) {
        (true, true) => Role::Client(header),
        (true, false) => Role::PatientClient(header),
        (false, _) => Role::Server,
    };
    let traffic = Traffic::default();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    let runtime = runtime.expect("a runtime without IO needs nothing");
    let outcome = runtime.block_on(tunnel::relay(app, &mut wire, role, &traffic));

    assert_eq!(*delivered.bytes.borrow(), expected.payload, "other bytes than were sent");
    let words = outcome.end.words();
    // What comes behind a FIN while our direction goes on is seen, or is too late to be.
    let disturbed =
        !silent && expected.end == "finished" && ["tunnel lost", "protocol error"].contains(&words);
    assert!(words == expected.end || disturbed, "{words}, not {}", expected.end);
    assert_eq!(delivered.finished.get(), matches!(outcome.end, End::Finished));
    assert_eq!(outcome.reusable, expected.settled && !expected.going_away && !disturbed);
    assert_well_formed(&wire.output, said, client, &outcome.end, outcome.reusable);
}

/// What the bytes from the other agent amount to, read all at once.
struct Expected {
    payload: Vec<u8>,
    end: &'static str,
    /// The end is one after which the tunnel is idle.
    settled: bool,
    going_away: bool,
    /// How much has been read to know that, in bytes.
    length: usize,
}

impl Expected {
    fn of(received: &[u8], client: bool) -> Self {
        let mut input = received;
        let mut payload = Vec::new();
        let mut answered = !client;
        let mut going_away = false;
        let (end, settled) = loop {
            let (frame, used) = match Frame::parse(input) {
                Ok(Some(found)) => found,
                Ok(None) => break ("tunnel lost", false),
                Err(_) => break ("protocol error", false),
            };
            input = &input[used..];
            match (answered, frame) {
                (false, Frame::GoAway) if !going_away => going_away = true,
                (false, Frame::Status(Status::Accepted)) => answered = true,
                (false, Frame::Status(Status::Refused(why))) => break (why.reason().words(), true),
                (true, Frame::Data(len)) => {
                    let (part, rest) = input.split_at(input.len().min(usize::from(len)));
                    payload.extend_from_slice(part);
                    input = rest;
                }
                (true, Frame::Fin) => break ("finished", true),
                (true, Frame::Reset) if client => break ("server reset", true),
                (true, Frame::Reset) => break ("client reset", true),
                _ => break ("protocol error", false),
            }
        };
        let length = if settled { received.len() - input.len() } else { received.len() };
        Self { payload, end, settled, going_away, length }
    }
}

/// A relay's own direction: a preface, the application's bytes in order, one end.
fn assert_well_formed(output: &[u8], said: &[u8], client: bool, end: &End, reusable: bool) {
    let stream = decode(output, |rest| rest);
    assert_eq!(stream.error, None, "the relay does not speak its own protocol");
    assert!(said.starts_with(&stream.payload), "the application did not say that");
    let mut frames = stream.frames.iter();
    match frames.next() {
        Some(Frame::Open(_)) => assert!(client),
        Some(Frame::Status(Status::Accepted)) => assert!(!client),
        None => assert!(!reusable),
        other => panic!("{other:?} opens the stream"),
    }
    let last = frames.find(|frame| match frame {
        Frame::Data(len) => {
            assert!((1..=MAX_DATA).contains(&usize::from(*len)));
            false
        }
        Frame::Fin | Frame::Reset => true,
        Frame::Open(_) | Frame::Status(_) | Frame::GoAway | Frame::Credit(_) | Frame::Blocked => {
            panic!("{frame:?} in the middle of the stream")
        }
    });
    assert_eq!(frames.next(), None, "a frame after the end");
    assert!(last.is_some() || !reusable, "a reusable tunnel whose stream has not ended");
    if matches!(last, Some(Frame::Fin)) {
        assert_eq!(stream.payload, said, "a clean end of a truncated stream");
    }
    if matches!(end, End::Finished) {
        assert_eq!(last, Some(&Frame::Fin));
    }
}

/// Decides, from a seed, how much of each read and write happens, and which wait first.
struct Cuts(Cell<u32>);

impl Cuts {
    /// At most `most`, at least 1, or "not now" (and then the task is woken).
    fn next(&self, cx: &mut Context<'_>, most: usize) -> Poll<usize> {
        let x = self.draw();
        if x.is_multiple_of(4) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let limit = 1 << ((x >> 8) % 12);
        Poll::Ready(most.min(limit).max(1))
    }

    /// A number that nobody expects.
    fn draw(&self) -> u32 {
        let mut x = self.0.get();
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        self.0.set(x);
        x
    }
}

#[derive(Default)]
struct Delivered {
    bytes: RefCell<Vec<u8>>,
    finished: Cell<bool>,
}

struct Application {
    says: Vec<u8>,
    log: Rc<Delivered>,
    cuts: Rc<Cuts>,
}

impl App for Application {
    fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        parts: &mut [IoSliceMut<'_>],
    ) -> Poll<io::Result<usize>> {
        let room: usize = parts.iter().map(|part| part.len()).sum();
        let n = std::task::ready!(self.cuts.next(cx, room.min(self.says.len())));
        let said: Vec<u8> = self.says.drain(..n.min(self.says.len())).collect();
        let mut rest = &said[..];
        for part in parts {
            let (now, later) = rest.split_at(part.len().min(rest.len()));
            part[..now.len()].copy_from_slice(now);
            rest = later;
        }
        Poll::Ready(Ok(said.len()))
    }

    fn finish(self) {
        self.log.finished.set(true);
    }
}

impl AsyncWrite for Application {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let n = std::task::ready!(self.cuts.next(cx, buf.len()));
        self.log.bytes.borrow_mut().extend_from_slice(&buf[..n]);
        Poll::Ready(Ok(n))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// The other agent, as a script.
struct Wire {
    input: Vec<u8>,
    /// Whether the end of the input is the end of the tunnel, or silence.
    closes: bool,
    /// How much of `input` the last `poll_fill_buf` showed, and what `consume` left of it.
    shown: usize,
    output: Vec<u8>,
    cuts: Rc<Cuts>,
}

impl AsyncRead for Wire {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        _: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        unreachable!("the relay reads what is buffered")
    }
}

impl AsyncBufRead for Wire {
    fn poll_fill_buf(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<&[u8]>> {
        let this = self.get_mut();
        if this.shown == 0 {
            let most = this.input.len();
            if most == 0 && !this.closes {
                return Poll::Pending;
            }
            this.shown = std::task::ready!(this.cuts.next(cx, most)).min(most);
        }
        Poll::Ready(Ok(&this.input[..this.shown]))
    }

    fn consume(mut self: Pin<&mut Self>, amount: usize) {
        self.shown = self.shown.checked_sub(amount).expect("consumed what was not shown");
        self.input.drain(..amount);
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let n = std::task::ready!(self.cuts.next(cx, buf.len()));
        self.output.extend_from_slice(&buf[..n]);
        Poll::Ready(Ok(n))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.cuts.next(cx, 1).map(|_| Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
