//! One connection among those that share a tunnel.

use std::{
    collections::VecDeque,
    io::{self, IoSliceMut},
    pin::Pin,
    task::{Context, Poll},
};

use tokio::sync::oneshot;

use super::{
    Counted, Joining,
    credit::{Credit, Growth, Window},
};
use crate::tunnel::{
    app::App,
    buffer::Buffer,
    frame::{FRAME_HEADER, Frame, MAX_CONTROL, MAX_FRAME, Malformed, Reason, Refusal, Status},
    relay::{End, Outcome, Role},
};

/// Bytes in front of a frame's body: the number, and what every frame has.
const HEADER: usize = 1 + FRAME_HEADER;
/// What a member may put around its payload in one go: a preface, a CREDIT, and an end.
pub(super) const AROUND: usize = 4 * HEADER + MAX_CONTROL;

/// The state of one connection.
pub(super) struct Member<A> {
    number: u8,
    /// Tells it from another of the same number, earlier or later.
    pub(super) id: u64,
    client: bool,
    phase: Phase<A>,
    outgoing: Outgoing,
    incoming: Incoming,
}

enum Phase<A> {
    /// The server has not decided yet.
    Deciding,
    /// Bytes move.
    Open(Open<A>),
    /// It is aborted or was refused. What still comes is discarded.
    Over,
}

struct Open<A> {
    app: A,
    counted: Counted,
    reply: oneshot::Sender<Outcome<A>>,
}

/// From the application to the tunnel.
struct Outgoing {
    /// OPEN or STATUS, until it is under way.
    preface: Option<Frame>,
    /// The application is read from only once the server has accepted.
    patient: bool,
    /// RESET is to be sent.
    resets: bool,
    /// FIN or RESET is under way, or the preface is the end.
    ended: bool,
    credit: Credit,
    /// Bytes read from the application.
    moved: u64,
}

/// From the tunnel to the application.
struct Incoming {
    state: State,
    window: Window,
    /// What the application has not taken. At most a window.
    pending: VecDeque<u8>,
    /// Something was written and perhaps held back.
    unflushed: bool,
    /// Bytes that came.
    moved: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The server has not answered yet.
    Status,
    /// DATA, until FIN or RESET.
    Frames,
    /// FIN: the application is to be told, after what is pending.
    Fin,
    /// Over.
    Ended,
}

impl<A: App> Member<A> {
    /// A connection that this agent asks for.
    pub(super) fn asking(number: u8, id: u64, joining: Joining<A>) -> Self {
        let Joining { app, role, counted, reply } = joining;
        let (header, patient) = match role {
            Role::Client(header) => (Some(header), false),
            Role::PatientClient(header) => (Some(header), true),
            Role::Server => (None, false),
        };
        let mut member = Self::new(number, id, header.map(Frame::Open));
        member.client = true;
        member.outgoing.patient = patient;
        member.incoming.state = State::Status;
        member.phase = Phase::Open(Open { app, counted, reply });
        member
    }

    /// A connection that this agent is asked for.
    pub(super) fn asked(number: u8, id: u64) -> Self {
        Self::new(number, id, None)
    }

    fn new(number: u8, id: u64, preface: Option<Frame>) -> Self {
        Self {
            number,
            id,
            client: false,
            phase: Phase::Deciding,
            outgoing: Outgoing {
                preface,
                patient: false,
                resets: false,
                ended: false,
                credit: Credit::default(),
                moved: 0,
            },
            incoming: Incoming {
                state: State::Frames,
                window: Window::default(),
                pending: VecDeque::new(),
                unflushed: false,
                moved: 0,
            },
        }
    }

    /// The server has accepted: bytes move from now on.
    pub(super) fn accept(&mut self, joining: Joining<A>) {
        if !matches!(self.phase, Phase::Deciding) {
            return;
        }
        let Joining { app, role: _, counted, reply } = joining;
        self.outgoing.preface = Some(Frame::Status(Status::Accepted));
        self.phase = Phase::Open(Open { app, counted, reply });
    }

    /// The server has not.
    pub(super) fn refuse(&mut self, refusal: Refusal) {
        if !matches!(self.phase, Phase::Deciding) {
            return;
        }
        self.outgoing.preface = Some(Frame::Status(Status::Refused(refusal)));
        self.outgoing.ended = true;
        self.phase = Phase::Over;
    }

    /// Whether whoever wanted the outcome is gone, which aborts the connection.
    pub(super) fn is_forsaken(&self) -> bool {
        matches!(&self.phase, Phase::Open(open) if open.reply.is_closed())
    }

    /// Whether both directions have ended, so that the number may be used again.
    pub(super) fn has_said_all(&self) -> bool {
        let Outgoing { preface, resets, ended, .. } = &self.outgoing;
        let heard_all = matches!(self.incoming.state, State::Fin | State::Ended);
        *ended && !resets && preface.is_none() && heard_all
    }

    /// Counts what has moved. Whether the application has got all of it, too.
    pub(super) fn is_over_by_now(&self) -> bool {
        self.count();
        self.has_said_all() && self.incoming.state == State::Ended
    }

    /// The last of it: an orderly end, if it was one.
    pub(super) fn finish(self) {
        if let Phase::Open(open) = self.phase {
            open.app.finish();
            let _nobody_asks = open.reply.send(Outcome::among_others(End::Finished, None));
        }
    }

    /// The tunnel is gone, with whatever was under way.
    pub(super) fn lose(self, end: End) {
        let untouched = self.incoming.state == State::Status && self.outgoing.moved == 0;
        let untouched = untouched && matches!(end, End::TunnelLost(_));
        if let Phase::Open(Open { app, reply, .. }) = self.phase {
            let untouched = untouched.then_some(app);
            let _nobody_asks = reply.send(Outcome::among_others(end, untouched));
        }
    }

    /// Counts what has moved.
    pub(super) fn count(&self) {
        if let Phase::Open(open) = &self.phase {
            let (ours, theirs) = (self.outgoing.moved, self.incoming.moved);
            let (client, server) = if self.client { (ours, theirs) } else { (theirs, ours) };
            (*open.counted).as_ref().set(client, server);
        }
    }

    /// The application is reset. The other agent is told, unless it is who said so.
    pub(super) fn abort(&mut self, end: End) {
        let untouched = matches!(end, End::Refused(_)) && self.outgoing.moved == 0;
        self.count();
        if self.incoming.state == State::Fin {
            self.incoming.state = State::Ended;
        }
        self.incoming.forget();
        if matches!(self.phase, Phase::Deciding) {
            // The client waits for an answer, and that is the end.
            return self.refuse(Refusal::new(Reason::Failed, "the client has gone"));
        }
        self.outgoing.resets |= self.incoming.state != State::Ended || !self.outgoing.ended;
        let phase = std::mem::replace(&mut self.phase, Phase::Over);
        if let Phase::Open(Open { app, reply, .. }) = phase {
            let untouched = untouched.then_some(app);
            let _nobody_asks = reply.send(Outcome::among_others(end, untouched));
        }
    }

    /// The local application is gone.
    pub(super) fn abort_from_here(&mut self) {
        self.abort(if self.client { End::ClientReset } else { End::ServerReset });
    }

    /// One frame from the other agent, against the state of its direction.
    pub(super) fn take(&mut self, frame: Frame) -> Result<(), Malformed> {
        match (self.incoming.state, frame) {
            (State::Status, Frame::Status(Status::Accepted)) => {
                self.incoming.state = State::Frames;
                self.outgoing.patient = false;
            }
            (State::Status, Frame::Status(Status::Refused(refusal))) => {
                self.incoming.state = State::Ended;
                self.abort(End::Refused(refusal));
            }
            // Of the connection that had this number before.
            (State::Status, Frame::Reset | Frame::Credit(_)) => {}
            (State::Frames, Frame::Data(len)) => self.incoming.window.receive(u32::from(len))?,
            (State::Frames, Frame::Fin) => {
                let over = matches!(self.phase, Phase::Over);
                self.incoming.state = if over { State::Ended } else { State::Fin };
            }
            // A RESET may follow a FIN.
            (State::Frames | State::Fin | State::Ended, Frame::Reset) => {
                self.incoming.state = State::Ended;
                self.abort(if self.client { End::ServerReset } else { End::ClientReset });
            }
            (State::Frames | State::Fin | State::Ended, Frame::Credit(bytes)) => {
                self.outgoing.credit.grant(bytes)?;
            }
            (State::Frames, Frame::Blocked) => self.incoming.window.blocked(),
            (_, frame) => return Err(Malformed::unexpected(&frame)),
        }
        Ok(())
    }

    /// Payload. The application gets what it takes, and the rest later.
    pub(super) fn deliver(&mut self, cx: &mut Context<'_>, payload: &[u8], growth: &Growth) {
        self.incoming.moved += payload.len() as u64;
        let open = match &mut self.phase {
            Phase::Over => return,
            Phase::Deciding => return self.incoming.pending.extend(payload),
            Phase::Open(open) => open,
        };
        let written = if self.incoming.pending.is_empty() {
            poll_write_all(cx, &mut open.app, payload)
        } else {
            Ok(0)
        };
        let Ok(written) = written else { return self.abort_from_here() };
        self.incoming.unflushed |= written > 0;
        self.incoming.pending.extend(payload.get(written..).unwrap_or_default());
        self.incoming.window.deliver(written, self.incoming.pending.is_empty(), growth);
    }

    /// Gives the application what it would not take before, and the end after that.
    pub(super) fn poll_deliver(&mut self, cx: &mut Context<'_>, growth: &Growth) {
        let Self { phase: Phase::Open(open), incoming, .. } = self else { return };
        if !incoming.pending.is_empty() {
            let rest = incoming.pending.make_contiguous();
            let Ok(written) = poll_write_all(cx, &mut open.app, rest) else {
                return self.abort_from_here();
            };
            incoming.unflushed |= written > 0;
            if written == rest.len() {
                incoming.forget();
            } else {
                incoming.pending.drain(..written);
            }
            incoming.window.deliver(written, incoming.pending.is_empty(), growth);
        }
        if incoming.pending.is_empty() && incoming.state == State::Fin {
            // An error means that the connection is gone, which reading it will say.
            if Pin::new(&mut open.app).poll_shutdown(cx).is_ready() {
                incoming.state = State::Ended;
            }
        } else if incoming.unflushed {
            let _flushed = Pin::new(&mut open.app).poll_flush(cx);
            incoming.unflushed = false;
        }
    }

    /// Puts into `out` what there is to say, at most one frame of payload and [`AROUND`] it.
    pub(super) fn gather(&mut self, cx: &mut Context<'_>, out: &mut Buffer, free: usize) -> bool {
        let before = out.bytes().len();
        if let Some(preface) = self.outgoing.preface.take() {
            say(out, self.number, &preface);
        }
        if self.incoming.state == State::Frames
            && let Some(bytes) = self.incoming.window.owed()
        {
            say(out, self.number, &Frame::Credit(bytes));
        }
        if let Err(_reset) = self.read(cx, out, free) {
            self.abort_from_here();
        }
        if self.outgoing.resets {
            self.outgoing.resets = false;
            self.outgoing.ended = true;
            say(out, self.number, &Frame::Reset);
        }
        out.bytes().len() > before
    }

    fn read(&mut self, cx: &mut Context<'_>, out: &mut Buffer, free: usize) -> io::Result<()> {
        let Self { phase: Phase::Open(open), outgoing, number, .. } = self else { return Ok(()) };
        if outgoing.ended || outgoing.patient {
            return Ok(());
        }
        let most = outgoing.credit.left().min(MAX_FRAME - HEADER).min(free.saturating_sub(AROUND));
        if most == 0 {
            return Ok(());
        }
        let room = out.room().get_mut(HEADER..HEADER + most).unwrap_or_default();
        let read = match open.app.poll_read(cx, &mut [IoSliceMut::new(room)]) {
            Poll::Pending => 0,
            Poll::Ready(Ok(0)) => {
                outgoing.ended = true;
                say(out, *number, &Frame::Fin);
                return Ok(());
            }
            Poll::Ready(read) => read?,
        };
        if read == 0 {
            return Ok(());
        }
        if let Some((first, header)) =
            out.room().get_mut(..HEADER).and_then(<[u8]>::split_first_mut)
        {
            *first = *number;
            header.copy_from_slice(&Frame::data_header(read));
        }
        out.fill(HEADER + read);
        outgoing.moved += read as u64;
        if outgoing.credit.spend(read) {
            say(out, *number, &Frame::Blocked);
        }
        Ok(())
    }
}

impl Incoming {
    /// Nobody gets what is pending.
    fn forget(&mut self) {
        self.pending = VecDeque::new();
    }
}

/// Puts a control frame behind what is there.
pub(super) fn say(out: &mut Buffer, number: u8, frame: &Frame) {
    let mut bytes = Vec::with_capacity(1 + MAX_CONTROL);
    bytes.push(number);
    frame.encode(&mut bytes);
    out.append(&bytes);
}

/// Writes as much as the application takes now.
fn poll_write_all<A: App>(cx: &mut Context<'_>, app: &mut A, bytes: &[u8]) -> io::Result<usize> {
    let mut written = 0;
    while let Some(rest) = bytes.get(written..).filter(|rest| !rest.is_empty()) {
        match Pin::new(&mut *app).poll_write(cx, rest) {
            Poll::Pending => break,
            Poll::Ready(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
            Poll::Ready(some) => written += some?,
        }
    }
    Ok(written)
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, task::Waker};

    use tokio::io::AsyncWrite;

    use super::*;
    use crate::tunnel::relay::Traffic;

    /// An application that takes so many bytes and then waits.
    struct Slow(usize);

    impl App for Slow {
        fn poll_read(
            &mut self,
            _: &mut Context<'_>,
            _: &mut [IoSliceMut<'_>],
        ) -> Poll<io::Result<usize>> {
            Poll::Pending
        }

        fn finish(self) {}
    }

    impl AsyncWrite for Slow {
        fn poll_write(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            let taken = bytes.len().min(self.0);
            self.0 -= taken;
            if taken == 0 { Poll::Pending } else { Poll::Ready(Ok(taken)) }
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }
    }

    #[test]
    fn an_application_that_never_catches_up_costs_no_more_than_its_window() {
        let growth = Growth::default();
        let cx = &mut Context::from_waker(Waker::noop());
        let (reply, _outcome) = oneshot::channel();
        let mut member = Member::asked(0, 1);
        let counted = Arc::<Traffic>::default();
        member.accept(Joining { app: Slow(0), role: Role::Server, counted, reply });
        let mut granted = 64 << 10;
        for _ in 0..1000 {
            let payload = vec![7; granted.min(10_000)];
            granted -= payload.len();
            let frame = Frame::Data(u16::try_from(payload.len()).unwrap());
            member.take(frame).unwrap();
            member.deliver(cx, &payload, &growth);
            if let Phase::Open(open) = &mut member.phase {
                open.app.0 = member.incoming.pending.len().saturating_sub(20_000);
            }
            member.poll_deliver(cx, &growth);
            assert!(!member.incoming.pending.is_empty());
            granted += usize::try_from(member.incoming.window.owed().unwrap_or(0)).unwrap();
        }
        assert!(member.incoming.moved > 1 << 20, "{}", member.incoming.moved);
        let held = member.incoming.pending.capacity();
        assert!(held <= 128 << 10, "{held} bytes for an application that reads slowly");
    }
}
