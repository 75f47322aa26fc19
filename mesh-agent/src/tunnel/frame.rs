//! The frames of tunnels: values, bytes, and decoders that never hold a payload.
//!
//! Every message is one frame: a type byte, a 16-bit big-endian length, and that many bytes. In a
//! tunnel that connections share (`nodemesh/2`), the number of a connection stands before it.
//! `docs/tunnel.md` is the specification; this file is its byte layouts.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

/// Bytes in front of every frame's body: type and length.
pub const FRAME_HEADER: usize = 3;
/// The largest frame, header included: the plaintext of one full TLS record, in bytes.
pub const MAX_FRAME: usize = 16 * 1024;
/// The largest body of a DATA frame, in bytes.
pub const MAX_DATA: usize = MAX_FRAME - FRAME_HEADER;
/// The longest text of a refusal, in bytes of UTF-8.
pub const MAX_TEXT: usize = 256;
/// The largest control frame (a STATUS with the longest text), in bytes.
pub const MAX_CONTROL: usize = FRAME_HEADER + 1 + MAX_TEXT;
/// Connections that may share a tunnel; their numbers are below this.
pub const NUMBERS: u8 = 64;

const VERSION: u8 = 1;
/// Version, trace id, port; the address follows and its length tells its family.
const OPEN_FIXED: usize = 1 + 16 + 2;
const OPEN_V4: usize = OPEN_FIXED + 4;
const OPEN_V6: usize = OPEN_FIXED + 16;

mod kind {
    pub(super) const OPEN: u8 = 1;
    pub(super) const STATUS: u8 = 2;
    pub(super) const DATA: u8 = 3;
    pub(super) const FIN: u8 = 4;
    pub(super) const RESET: u8 = 5;
    pub(super) const GOAWAY: u8 = 6;
    pub(super) const CREDIT: u8 = 7;
    pub(super) const BLOCKED: u8 = 8;
}

/// Ties the two agents' log lines about one connection together; shown as 32 hex digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TraceId(pub [u8; 16]);

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// What a client says about a connection before its first byte: the body of an OPEN frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    source: SocketAddr,
    trace: TraceId,
}

impl Header {
    /// A header for a connection that the application sees as coming from `source`.
    ///
    /// An IPv4-mapped IPv6 address becomes the IPv4 address it is: the protocol knows one spelling.
    #[must_use]
    pub fn new(source: SocketAddr, trace: TraceId) -> Self {
        Self { source: SocketAddr::new(source.ip().to_canonical(), source.port()), trace }
    }

    /// The client's own address. The server trusts it no further than it can check it.
    #[must_use]
    pub const fn source(&self) -> SocketAddr {
        self.source
    }

    /// The connection's trace id.
    #[must_use]
    pub const fn trace(&self) -> TraceId {
        self.trace
    }

    fn encode(&self, out: &mut Vec<u8>) {
        out.push(VERSION);
        out.extend_from_slice(&self.trace.0);
        out.extend_from_slice(&self.source.port().to_be_bytes());
        match self.source.ip() {
            IpAddr::V4(ip) => out.extend_from_slice(&ip.octets()),
            IpAddr::V6(ip) => out.extend_from_slice(&ip.octets()),
        }
    }

    fn decode(body: &[u8]) -> Result<Self, Malformed> {
        let (&version, rest) = body.split_first().ok_or(Malformed::Open)?;
        if version != VERSION {
            return Err(Malformed::Version(version));
        }
        let (trace, rest) = rest.split_first_chunk::<16>().ok_or(Malformed::Open)?;
        let (port, address) = rest.split_first_chunk::<2>().ok_or(Malformed::Open)?;
        let ip = if let Ok(v4) = <[u8; 4]>::try_from(address) {
            IpAddr::from(Ipv4Addr::from(v4))
        } else {
            let v6 = <[u8; 16]>::try_from(address).map_err(|_| Malformed::Open)?;
            IpAddr::from(Ipv6Addr::from(v6))
        };
        if ip != ip.to_canonical() {
            return Err(Malformed::MappedSource);
        }
        Ok(Self { source: SocketAddr::new(ip, u16::from_be_bytes(*port)), trace: TraceId(*trace) })
    }
}

/// Why a server did not take a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// The policy does not allow it.
    Denied,
    /// The client's pod, or the server's, is not in the registry.
    NotRegistered,
    /// The source address of the header or of the tunnel is not one of the client's pod.
    WrongSource,
    /// The application's port is closed.
    ConnectionRefused,
    /// The application's address cannot be reached.
    Unreachable,
    /// The application did not answer in time.
    TimedOut,
    /// The agent or the pod is going away.
    Draining,
    /// A limit of the agent is reached.
    Overloaded,
    /// Something else went wrong on the server's side; the text says what.
    Failed,
    /// A code that this version does not know. A refusal all the same.
    Unknown(u8),
}

impl Reason {
    const KNOWN: [(u8, Self, &'static str); 9] = [
        (1, Self::Denied, "denied by policy"),
        (2, Self::NotRegistered, "not registered"),
        (3, Self::WrongSource, "wrong source address"),
        (4, Self::ConnectionRefused, "connection refused"),
        (5, Self::Unreachable, "unreachable"),
        (6, Self::TimedOut, "timed out"),
        (7, Self::Draining, "draining"),
        (8, Self::Overloaded, "overloaded"),
        (9, Self::Failed, "failed"),
    ];

    /// The code on the wire; never 0, which means accepted.
    fn code(self) -> u8 {
        let known = Self::KNOWN.iter().find(|(_, reason, _)| *reason == self);
        known.map_or_else(|| if let Self::Unknown(code) = self { code } else { 9 }, |k| k.0)
    }

    fn from_code(code: u8) -> Self {
        Self::KNOWN.iter().find(|k| k.0 == code).map_or(Self::Unknown(code), |k| k.1)
    }

    /// The reason in words, for logs and metrics.
    #[must_use]
    pub fn words(self) -> &'static str {
        Self::KNOWN.iter().find(|k| k.1 == self).map_or("unknown reason", |k| k.2)
    }
}

/// A server's "no": a reason for programs and a short text for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    reason: Reason,
    text: String,
}

impl Refusal {
    /// A refusal. The text is cut to [`MAX_TEXT`] bytes and its control characters become spaces,
    /// so that it can stand in a log line.
    #[must_use]
    pub fn new(reason: Reason, text: &str) -> Self {
        let text = text.get(..text.floor_char_boundary(MAX_TEXT)).unwrap_or_default();
        Self { reason, text: text.replace(char::is_control, " ") }
    }

    /// The reason.
    #[must_use]
    pub const fn reason(&self) -> Reason {
        self.reason
    }

    /// The text: at most [`MAX_TEXT`] bytes, no control characters.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.reason.words())?;
        if self.text.is_empty() { Ok(()) } else { write!(f, ": {}", self.text) }
    }
}

/// A server's answer to an OPEN: the body of a STATUS frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Status {
    /// The application is connected.
    Accepted,
    /// It is not, and the server's direction has ended with this frame.
    Refused(Refusal),
}

impl Status {
    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Accepted => out.push(0),
            Self::Refused(Refusal { reason, text }) => {
                out.push(reason.code());
                out.extend_from_slice(text.as_bytes());
            }
        }
    }

    fn decode(body: &[u8]) -> Result<Self, Malformed> {
        let (&code, text) = body.split_first().ok_or(Malformed::Status)?;
        if code == 0 {
            return if text.is_empty() { Ok(Self::Accepted) } else { Err(Malformed::Status) };
        }
        let text = str::from_utf8(text).map_err(|_| Malformed::Status)?;
        if text.chars().any(char::is_control) {
            return Err(Malformed::Status);
        }
        Ok(Self::Refused(Refusal { reason: Reason::from_code(code), text: text.to_owned() }))
    }
}

/// One frame. A DATA frame is known by its length alone: its body is passed on, never collected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Client to server: a new connection.
    Open(Header),
    /// Server to client: the answer to an OPEN.
    Status(Status),
    /// Either way: this many bytes of the application's follow, 1 to [`MAX_DATA`].
    Data(u16),
    /// Either way: the sender's direction has ended, all of it is there.
    Fin,
    /// Either way: the sender's direction is aborted, and with it the connection.
    Reset,
    /// Server to client: open no more connections on this tunnel.
    GoAway,
    /// Either way, where connections share a tunnel: the receiver may send so many bytes more.
    Credit(u32),
    /// Either way, where connections share a tunnel: the sender has used all of its credit.
    Blocked,
}

impl Frame {
    /// Appends the frame's bytes to `out`; those of a DATA frame are its header.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&[self.kind(), 0, 0]);
        let mut announced = 0;
        match self {
            Self::Open(header) => header.encode(out),
            Self::Status(status) => status.encode(out),
            Self::Data(len) => announced = *len,
            Self::Credit(bytes) => out.extend_from_slice(&bytes.to_be_bytes()),
            Self::Fin | Self::Reset | Self::GoAway | Self::Blocked => {}
        }
        let body = u16::try_from(out.len() - start - FRAME_HEADER).unwrap_or(u16::MAX);
        let len = body + announced;
        if let Some(field) = out.get_mut(start + 1..start + FRAME_HEADER) {
            field.copy_from_slice(&len.to_be_bytes());
        }
    }

    /// The bytes in front of a payload of `len` bytes, which is 1 to [`MAX_DATA`].
    #[must_use]
    pub(super) fn data_header(len: usize) -> [u8; FRAME_HEADER] {
        debug_assert!((1..=MAX_DATA).contains(&len), "{len} bytes do not fit a DATA frame");
        let [.., hi, lo] = len.to_be_bytes();
        [kind::DATA, hi, lo]
    }

    const fn kind(&self) -> u8 {
        match self {
            Self::Open(_) => kind::OPEN,
            Self::Status(_) => kind::STATUS,
            Self::Data(_) => kind::DATA,
            Self::Fin => kind::FIN,
            Self::Reset => kind::RESET,
            Self::GoAway => kind::GOAWAY,
            Self::Credit(_) => kind::CREDIT,
            Self::Blocked => kind::BLOCKED,
        }
    }

    /// The frame at the start of `input` and the bytes it takes there (a DATA frame's payload not
    /// counted), or `None` if `input` is a proper prefix of it.
    ///
    /// # Errors
    /// [`Malformed`], as soon as the bytes present cannot become a frame.
    pub fn parse(input: &[u8]) -> Result<Option<(Self, usize)>, Malformed> {
        let needed = needed(input)?;
        let Some(frame) = input.get(..needed) else { return Ok(None) };
        let Some((&[kind, hi, lo], body)) = frame.split_first_chunk::<FRAME_HEADER>() else {
            return Ok(None);
        };
        let frame = match kind {
            kind::OPEN => Self::Open(Header::decode(body)?),
            kind::STATUS => Self::Status(Status::decode(body)?),
            kind::DATA => Self::Data(u16::from_be_bytes([hi, lo])),
            kind::FIN => Self::Fin,
            kind::RESET => Self::Reset,
            kind::GOAWAY => Self::GoAway,
            kind::CREDIT => Self::Credit(credit(body)?),
            kind::BLOCKED => Self::Blocked,
            other => return Err(Malformed::Kind(other)),
        };
        Ok(Some((frame, needed)))
    }
}

/// How many bytes [`Frame::parse`] must see of the frame that starts `input`, as far as they tell.
fn needed(input: &[u8]) -> Result<usize, Malformed> {
    let Some(&kind) = input.first() else { return Ok(FRAME_HEADER) };
    let (shortest, longest) = match kind {
        kind::OPEN => (OPEN_V4, OPEN_V6),
        kind::STATUS => (1, 1 + MAX_TEXT),
        kind::DATA => (1, MAX_DATA),
        kind::FIN | kind::RESET | kind::GOAWAY | kind::BLOCKED => (0, 0),
        kind::CREDIT => (size_of::<u32>(), size_of::<u32>()),
        other => return Err(Malformed::Kind(other)),
    };
    let Some(&[_, hi, lo]) = input.first_chunk::<FRAME_HEADER>() else { return Ok(FRAME_HEADER) };
    let len = usize::from(u16::from_be_bytes([hi, lo]));
    if len < shortest || len > longest {
        return Err(Malformed::Length { kind, len });
    }
    Ok(FRAME_HEADER + if kind == kind::DATA { 0 } else { len })
}

fn credit(body: &[u8]) -> Result<u32, Malformed> {
    let bytes = body.try_into().map(u32::from_be_bytes);
    bytes.ok().filter(|bytes| *bytes > 0).ok_or(Malformed::Credit)
}

/// Bytes that are no tunnel's. The tunnel they came from is of no further use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// A frame type that does not exist.
    #[error("unknown frame type {0:#04x}")]
    Kind(u8),
    /// A length that this type of frame cannot have.
    #[error("a frame of type {kind:#04x} cannot have a body of {len} bytes")]
    Length {
        /// The frame's type byte.
        kind: u8,
        /// The length it announced, in bytes.
        len: usize,
    },
    /// An OPEN of another version of the protocol.
    #[error("version {0} of the tunnel header: only version {VERSION} is known")]
    Version(u8),
    /// An OPEN whose body is neither that of an IPv4 nor of an IPv6 source.
    #[error("the body of an OPEN frame has the wrong length")]
    Open,
    /// An OPEN that spells an IPv4 address as IPv6.
    #[error("the source address is an IPv4-mapped IPv6 address")]
    MappedSource,
    /// A STATUS whose text is not plain UTF-8, or that accepts and still has a text.
    #[error("the text of a STATUS frame is not plain UTF-8")]
    Status,
    /// A CREDIT of nothing.
    #[error("a CREDIT frame must grant something")]
    Credit,
    /// A connection's number that is too high.
    #[error("a tunnel has no connection {0}: the numbers end at {last}", last = NUMBERS - 1)]
    Number(u8),
    /// More payload than was granted.
    #[error("more bytes than the receiver has granted")]
    Window,
    /// More credit than anybody needs.
    #[error("more credit than fits")]
    Overflow,
    /// A frame that the state of the connection does not allow.
    #[error("a frame of type {0:#04x} has no place here")]
    Unexpected(u8),
}

impl Malformed {
    /// A frame where the state machine does not allow it.
    #[must_use]
    pub const fn unexpected(frame: &Frame) -> Self {
        Self::Unexpected(frame.kind())
    }
}

/// What [`Decoder::decode`] found at the start of its input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decoded<'a> {
    /// The beginning of a frame; this many bytes (all of the input) are taken.
    Partial(usize),
    /// A frame that ends after this many bytes of the input, which are taken.
    Frame(usize, Frame),
    /// Some of a DATA frame's payload. **Not** taken: report what was with [`Decoder::advance`].
    Payload(&'a [u8]),
}

/// Finds frames in a stream of bytes that arrives in pieces of any size.
#[derive(Debug, Default)]
pub struct Decoder {
    /// The beginning of a control frame that was cut between two pieces; at most [`MAX_CONTROL`]
    /// bytes, and allocates only then.
    partial: Vec<u8>,
    /// What is still to come of the current DATA frame, in bytes.
    payload: u16,
}

impl Decoder {
    /// Looks at the start of `input`, which must not be empty.
    ///
    /// # Errors
    /// [`Malformed`]; the decoder is then of no further use.
    pub fn decode<'a>(&mut self, input: &'a [u8]) -> Result<Decoded<'a>, Malformed> {
        if self.payload > 0 {
            let len = input.len().min(usize::from(self.payload));
            return Ok(Decoded::Payload(input.get(..len).unwrap_or(input)));
        }
        let found =
            if self.partial.is_empty() { Frame::parse(input)? } else { self.complete(input)? };
        let Some((frame, used)) = found else {
            if self.partial.is_empty() {
                self.partial.extend_from_slice(input);
            }
            return Ok(Decoded::Partial(input.len()));
        };
        if let Frame::Data(len) = frame {
            self.payload = len;
        }
        Ok(Decoded::Frame(used, frame))
    }

    /// Adds to the frame that was begun only what it needs; the rest of `input` stays untouched.
    fn complete(&mut self, input: &[u8]) -> Result<Option<(Frame, usize)>, Malformed> {
        let mut used = 0;
        loop {
            let missing = needed(&self.partial)?.saturating_sub(self.partial.len());
            let rest = input.get(used..).unwrap_or_default();
            let piece = rest.get(..missing).unwrap_or(rest);
            self.partial.extend_from_slice(piece);
            used += piece.len();
            if let Some((frame, _)) = Frame::parse(&self.partial)? {
                self.partial = Vec::new();
                return Ok(Some((frame, used)));
            }
            if used == input.len() {
                return Ok(None);
            }
        }
    }

    /// Takes `taken` bytes of the payload that [`Decoder::decode`] showed.
    pub fn advance(&mut self, taken: usize) {
        let taken = u16::try_from(taken).unwrap_or(u16::MAX);
        self.payload = self.payload.saturating_sub(taken);
    }

    /// Whether the stream stands between two frames.
    #[must_use]
    pub const fn at_boundary(&self) -> bool {
        self.partial.is_empty() && self.payload == 0
    }
}

/// Finds frames in the bytes of a tunnel that connections share, and whose they are.
#[derive(Debug, Default)]
pub struct Numbered {
    /// Whose frame has begun.
    number: Option<u8>,
    decoder: Decoder,
}

impl Numbered {
    /// As [`Decoder::decode`], with the number of the connection.
    ///
    /// # Errors
    /// [`Malformed`]; the decoder is then of no further use.
    pub fn decode<'a>(&mut self, input: &'a [u8]) -> Result<(u8, Decoded<'a>), Malformed> {
        let (number, frame, before) = match (self.number, input.split_first()) {
            (None, Some((&number, frame))) => (number, frame, 1),
            (number, _) => (number.unwrap_or_default(), input, 0),
        };
        if number >= NUMBERS {
            return Err(Malformed::Number(number));
        }
        self.number = Some(number);
        if frame.is_empty() {
            return Ok((number, Decoded::Partial(before)));
        }
        let decoded = match self.decoder.decode(frame)? {
            Decoded::Partial(used) => Decoded::Partial(before + used),
            Decoded::Frame(used, frame) => {
                self.number = self.number.filter(|_| matches!(frame, Frame::Data(_)));
                Decoded::Frame(before + used, frame)
            }
            payload @ Decoded::Payload(_) => payload,
        };
        Ok((number, decoded))
    }

    /// As [`Decoder::advance`].
    pub fn advance(&mut self, taken: usize) {
        self.decoder.advance(taken);
        self.number = self.number.filter(|_| !self.decoder.at_boundary());
    }

    /// Whether the stream stands between two frames.
    #[must_use]
    pub const fn at_boundary(&self) -> bool {
        self.number.is_none()
    }
}

#[cfg(test)]
mod tests;
