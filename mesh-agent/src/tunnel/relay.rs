//! One application connection over one tunnel: the state machine that both agents run.

use std::{
    io,
    pin::Pin,
    sync::atomic::{AtomicU64, Ordering},
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncBufRead, AsyncWrite},
    time::Sleep,
};

use super::{
    app::{App, AppSocket},
    frame::{Decoded, Decoder, Frame, Header, Malformed, Refusal, Status},
    pump::{Framing, Pump, PumpError, TURN, Window},
};

/// How long the other agent may take to end its direction once a connection is aborted. A tunnel
/// that needs longer is closed.
const SETTLE: Duration = Duration::from_secs(5);

/// What carries a tunnel: a TLS stream. (`AsyncBufRead`, so that payloads go from the decrypted
/// record to the application without a copy.)
pub trait Transport: AsyncBufRead + AsyncWrite + Unpin {}
impl<T: AsyncBufRead + AsyncWrite + Unpin> Transport for T {}

/// Which end of the connection the local application is, and what the tunnel is to be told first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The application connected. The tunnel is idle, and is asked for a connection.
    Client(Header),
    /// The same, but nothing is read from the application before the server has accepted: until
    /// then another server can take its place, whatever the application has to say. It costs the
    /// first bytes a round trip.
    PatientClient(Header),
    /// The application accepted: [`next_open`](super::server::next_open) has returned a header, the
    /// application is connected, and the tunnel is told so.
    Server,
}

/// How an application connection ended.
#[derive(Debug)]
pub enum End {
    /// Both sides closed, and everything they had sent was delivered.
    Finished,
    /// The client's application reset the connection, or vanished.
    ClientReset,
    /// The server's application reset the connection, or vanished.
    ServerReset,
    /// The server's agent would not take the connection.
    Refused(Refusal),
    /// The tunnel broke off; the application is reset.
    TunnelLost(io::Error),
    /// The other agent does not keep to the protocol; the application is reset.
    Protocol(Malformed),
}

impl End {
    /// One or two words for an access log or a metric's label.
    #[must_use]
    pub fn words(&self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::ClientReset => "client reset",
            Self::ServerReset => "server reset",
            Self::Refused(refusal) => refusal.reason().words(),
            Self::TunnelLost(_) => "tunnel lost",
            Self::Protocol(_) => "protocol error",
        }
    }
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Finished | Self::ClientReset | Self::ServerReset => f.write_str(self.words()),
            Self::Refused(refusal) => write!(f, "refused: {refusal}"),
            Self::TunnelLost(error) => write!(f, "tunnel lost: {error}"),
            Self::Protocol(error) => write!(f, "protocol error: {error}"),
        }
    }
}

/// What became of a connection, and of what carried it.
#[derive(Debug)]
pub struct Outcome<A = AppSocket> {
    /// How it ended.
    pub end: End,
    /// The tunnel is idle and may carry another connection. If not, drop it.
    pub reusable: bool,
    /// The application's socket, back as it was: the server refused, or the tunnel was lost before
    /// it answered, and nothing was read from the application. So another tunnel can still carry
    /// the connection; dropping the socket resets it.
    pub untouched: Option<A>,
}

impl<A> Outcome<A> {
    /// That of a connection among others, whose tunnel is not its to give back.
    pub(super) const fn among_others(end: End, untouched: Option<A>) -> Self {
        Self { end, reusable: false, untouched }
    }
}

/// Bytes of payload, counted while they move. Shared with whoever shows open connections.
#[derive(Debug, Default)]
pub struct Traffic {
    pub(super) from_client: AtomicU64,
    pub(super) from_server: AtomicU64,
}

impl AsRef<Self> for Traffic {
    fn as_ref(&self) -> &Self {
        self
    }
}

impl Traffic {
    /// Bytes that the client's application has sent, as far as this agent has taken them.
    pub fn from_client(&self) -> u64 {
        self.from_client.load(Ordering::Relaxed)
    }

    /// Bytes that the server's application has sent, as far as this agent has taken them.
    pub fn from_server(&self) -> u64 {
        self.from_server.load(Ordering::Relaxed)
    }

    pub(crate) fn set(&self, from_client: u64, from_server: u64) {
        self.from_client.store(from_client, Ordering::Relaxed);
        self.from_server.store(from_server, Ordering::Relaxed);
    }
}

/// Carries one connection of an application through `tunnel`, to its end.
///
/// Dropping the future aborts: the application is reset at once, and `tunnel` must be dropped too.
pub async fn relay<A: App, T: Transport>(
    app: A,
    tunnel: &mut T,
    role: Role,
    traffic: &Traffic,
) -> Outcome<A> {
    Relay::new(Some(app), tunnel, role, traffic).run().await
}

/// The state of one connection. Small: a node has tens of thousands.
pub(super) struct Relay<'a, A, T> {
    /// Gone (and reset, unless it was finished) once the connection is decided.
    app: Option<A>,
    tunnel: &'a mut T,
    traffic: &'a Traffic,
    client: bool,
    /// How much the application may say before the server has accepted.
    first: Window,
    /// The application that a server refused before it had said anything.
    refused: Option<A>,
    /// From the application to the tunnel.
    outgoing: Pump,
    decoder: Decoder,
    incoming: Incoming,
    /// Payload bytes from the tunnel, taken.
    received: u64,
    going_away: bool,
    /// Why the connection is being aborted.
    aborted: Option<End>,
    settle: Option<Pin<Box<Sleep>>>,
}

/// Where the tunnel's direction towards us stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Incoming {
    /// The server has not answered yet.
    Status,
    /// DATA, until FIN or RESET.
    Frames,
    /// FIN: the application is to be told.
    Fin,
    /// Over.
    Ended,
}

impl<'a, A: App, T: Transport> Relay<'a, A, T> {
    pub(super) fn new(app: Option<A>, tunnel: &'a mut T, role: Role, traffic: &'a Traffic) -> Self {
        let mut outgoing = Pump::new(Framing::Frames);
        let first =
            if matches!(role, Role::PatientClient(_)) { Window::Closed } else { Window::OneFrame };
        let (client, incoming) = match role {
            Role::Client(header) | Role::PatientClient(header) => {
                outgoing.push(&Frame::Open(header));
                (true, Incoming::Status)
            }
            Role::Server => {
                outgoing.push(&Frame::Status(Status::Accepted));
                (false, Incoming::Frames)
            }
        };
        Self {
            app,
            tunnel,
            traffic,
            client,
            first,
            refused: None,
            outgoing,
            decoder: Decoder::default(),
            incoming,
            received: 0,
            going_away: false,
            aborted: None,
            settle: None,
        }
    }

    /// A connection that is refused before there is an application.
    pub(super) fn refused(tunnel: &'a mut T, refusal: Refusal, traffic: &'a Traffic) -> Self {
        let mut outgoing = Pump::new(Framing::Frames);
        outgoing.end_with(&Frame::Status(Status::Refused(refusal.clone())));
        Self {
            app: None,
            tunnel,
            traffic,
            client: false,
            first: Window::Open,
            refused: None,
            outgoing,
            decoder: Decoder::default(),
            incoming: Incoming::Frames,
            received: 0,
            going_away: false,
            aborted: Some(End::Refused(refusal)),
            settle: None,
        }
    }

    pub(super) async fn run(mut self) -> Outcome<A> {
        let result = std::future::poll_fn(|cx| {
            let progress = self.poll(cx);
            let (ours, theirs) = (self.outgoing.moved(), self.received);
            let (client, server) = if self.client { (ours, theirs) } else { (theirs, ours) };
            self.traffic.set(client, server);
            progress
        })
        .await;
        self.outcome(result)
    }

    /// Runs both directions until neither can move. An error means that the tunnel is of no use.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        let done = loop {
            let was_aborted = self.aborted.is_some();
            let was_waiting = self.incoming == Incoming::Status;
            let sent = self.poll_outgoing(cx)?;
            let received = self.poll_incoming(cx)?;
            let settled = was_aborted == self.aborted.is_some()
                && was_waiting == (self.incoming == Incoming::Status);
            if settled {
                break sent.is_ready() && received.is_ready();
            }
        };
        if done { Poll::Ready(Ok(())) } else { self.poll_settle(cx) }
    }

    fn poll_outgoing(&mut self, cx: &mut Context<'_>) -> Result<Poll<()>, End> {
        let window = if self.incoming == Incoming::Status { self.first } else { Window::Open };
        match self.outgoing.poll(cx, self.app.as_mut(), self.tunnel, window) {
            Poll::Ready(Ok(())) => Ok(Poll::Ready(())),
            Poll::Ready(Err(PumpError::Sink(error))) => Err(End::TunnelLost(error)),
            Poll::Ready(Err(PumpError::Source)) => {
                self.app_reset()?;
                Ok(Poll::Pending)
            }
            Poll::Pending => Ok(Poll::Pending),
        }
    }

    fn poll_incoming(&mut self, cx: &mut Context<'_>) -> Result<Poll<()>, End> {
        let mut turn = 0;
        loop {
            match (self.incoming, self.app.as_mut()) {
                (Incoming::Ended, _) => {
                    self.watch(cx)?;
                    return Ok(Poll::Ready(()));
                }
                (Incoming::Fin, Some(app)) => {
                    // An error means that the connection is gone, which reading it will say.
                    let Poll::Ready(_) = Pin::new(app).poll_shutdown(cx) else {
                        return Ok(Poll::Pending);
                    };
                    self.incoming = Incoming::Ended;
                    continue;
                }
                (Incoming::Fin, None) => {
                    self.incoming = Incoming::Ended;
                    continue;
                }
                (Incoming::Status | Incoming::Frames, _) => {}
            }
            if turn >= TURN {
                cx.waker().wake_by_ref();
                return Ok(Poll::Pending);
            }
            let Poll::Ready(input) = Pin::new(&mut *self.tunnel).poll_fill_buf(cx) else {
                if let Some(app) = self.app.as_mut() {
                    // An error means that the connection is gone, which reading it will say.
                    let _flushed = Pin::new(app).poll_flush(cx);
                }
                return Ok(Poll::Pending);
            };
            let input = input.map_err(End::TunnelLost)?;
            if input.is_empty() {
                return Err(End::TunnelLost(io::ErrorKind::UnexpectedEof.into()));
            }
            let (used, frame) = match self.decoder.decode(input).map_err(End::Protocol)? {
                Decoded::Partial(used) => (used, None),
                Decoded::Frame(used, frame) => (used, Some(frame)),
                Decoded::Payload(payload) => {
                    let taken = match self.app.as_mut() {
                        None => Ok(payload.len()),
                        Some(app) => match Pin::new(app).poll_write(cx, payload) {
                            Poll::Pending => return Ok(Poll::Pending),
                            Poll::Ready(Ok(0)) => Err(()),
                            Poll::Ready(taken) => taken.map_err(|_| ()),
                        },
                    };
                    let Ok(taken) = taken else {
                        self.app_reset()?;
                        continue;
                    };
                    self.decoder.advance(taken);
                    self.received += taken as u64;
                    (taken, None)
                }
            };
            Pin::new(&mut *self.tunnel).consume(used);
            turn += used;
            if let Some(frame) = frame {
                self.take(frame)?;
            }
        }
    }

    /// While only our direction goes on, the tunnel has nothing to say but that it is lost.
    fn watch(&mut self, cx: &mut Context<'_>) -> Result<(), End> {
        if self.outgoing.ended() {
            return Ok(());
        }
        match Pin::new(&mut *self.tunnel).poll_fill_buf(cx) {
            Poll::Pending => Ok(()),
            Poll::Ready(Ok(&[kind, ..])) => Err(End::Protocol(Malformed::Unexpected(kind))),
            Poll::Ready(Ok([])) => Err(End::TunnelLost(io::ErrorKind::UnexpectedEof.into())),
            Poll::Ready(Err(error)) => Err(End::TunnelLost(error)),
        }
    }

    /// One frame from the other agent, against the state of its direction.
    fn take(&mut self, frame: Frame) -> Result<(), End> {
        match (self.incoming, frame) {
            (Incoming::Status, Frame::GoAway) if !self.going_away => self.going_away = true,
            (Incoming::Status, Frame::Status(Status::Accepted)) => self.incoming = Incoming::Frames,
            (Incoming::Status, Frame::Status(Status::Refused(refusal))) => {
                self.incoming = Incoming::Ended;
                self.refused = self.app.take().filter(|_| self.outgoing.moved() == 0);
                self.abort(End::Refused(refusal));
            }
            (Incoming::Frames, Frame::Data(_)) => {}
            (Incoming::Frames, Frame::Fin) => self.incoming = Incoming::Fin,
            (Incoming::Frames, Frame::Reset) => {
                self.incoming = Incoming::Ended;
                self.abort(if self.client { End::ServerReset } else { End::ClientReset });
            }
            (_, frame) => return Err(End::Protocol(Malformed::unexpected(&frame))),
        }
        Ok(())
    }

    /// The local application is gone. The other agent must learn it: by a RESET, or, where our
    /// direction has ended in order already, by the loss of the tunnel.
    fn app_reset(&mut self) -> Result<(), End> {
        let end = if self.client { End::ClientReset } else { End::ServerReset };
        if self.outgoing.ended() && self.incoming != Incoming::Ended {
            return Err(end);
        }
        self.abort(end);
        Ok(())
    }

    /// Resets the application, and ends our direction if it has not ended.
    fn abort(&mut self, end: End) {
        self.app = None;
        if !self.outgoing.ended() {
            self.outgoing.end_with(&Frame::Reset);
        }
        if self.aborted.is_none() {
            self.aborted = Some(end);
        }
    }

    /// An aborted connection does not wait for the other agent for ever.
    fn poll_settle(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        if self.aborted.is_none() {
            return Poll::Pending;
        }
        let settle = self.settle.get_or_insert_with(|| Box::pin(tokio::time::sleep(SETTLE)));
        ready!(settle.as_mut().poll(cx));
        Poll::Ready(Err(End::TunnelLost(io::ErrorKind::TimedOut.into())))
    }

    fn outcome(mut self, result: Result<(), End>) -> Outcome<A> {
        let untouched = self.refused.take();
        match (result, self.aborted.take()) {
            (Ok(()), None) => {
                if let Some(app) = self.app.take() {
                    app.finish();
                }
                Outcome { end: End::Finished, reusable: !self.going_away, untouched }
            }
            (Ok(()), Some(end)) => Outcome { end, reusable: !self.going_away, untouched },
            (Err(_), Some(end)) => Outcome { end, reusable: false, untouched },
            (Err(end), None) => {
                let unanswered = self.incoming == Incoming::Status && self.outgoing.moved() == 0;
                let lost = matches!(end, End::TunnelLost(_));
                let untouched = self.app.take().filter(|_| unanswered && lost);
                Outcome { end, reusable: false, untouched }
            }
        }
    }
}
