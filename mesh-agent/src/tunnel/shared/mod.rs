//! `nodemesh/2`: many connections of one pair of pods in one tunnel.
//!
//! One task owns the tunnel and the sockets of all its connections, so that what they have to say
//! at a time is encrypted, sent and received together: with many connections that saves most of
//! the system calls, and of the packets on the wire.

mod credit;
mod member;

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use tokio::{
    sync::{mpsc, oneshot},
    task::coop,
};

pub use self::credit::Growth;
use self::member::{AROUND, Member, say};
use super::{
    Malformed, Refusal,
    app::{App, AppSocket},
    buffer::Buffer,
    frame::{Decoded, Frame, Header, MAX_FRAME, NUMBERS, Numbered},
    pump::{AT_ONCE, TURN},
    relay::{End, Outcome, Role, Traffic, Transport},
    server::TunnelError,
};

/// Where a connection's bytes are counted.
pub type Counted = Arc<dyn AsRef<Traffic> + Send + Sync>;

/// A connection for a tunnel.
struct Joining<A> {
    app: A,
    role: Role,
    counted: Counted,
    reply: oneshot::Sender<Outcome<A>>,
}

enum Command<A> {
    /// The client's agent has another connection.
    Ask(Joining<A>),
    /// The server's agent has decided about one.
    Accept(Id, Joining<A>),
    /// It has decided against it.
    Refuse(Id, Refusal),
    /// Somebody who had a connection carried is gone.
    Forsaken,
}

/// Which connection of a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Id {
    number: u8,
    /// Numbers come again, and this does not.
    id: u64,
}

/// Where a tunnel's task is told of connections.
pub struct Port<A = AppSocket>(mpsc::UnboundedSender<Command<A>>);

impl<A> Clone for Port<A> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

/// What a [`Shared`] hears from its [`Port`]s.
pub struct Commands<A = AppSocket>(mpsc::UnboundedReceiver<Command<A>>);

/// A way to a tunnel that may not be there yet.
#[must_use]
pub fn port<A>() -> (Port<A>, Commands<A>) {
    let (sender, receiver) = mpsc::unbounded_channel();
    (Port(sender), Commands(receiver))
}

impl<A> Commands<A> {
    /// There is no tunnel, and why: who waits for it gets the application back.
    pub fn reject(&mut self, why: &str) {
        self.0.close();
        while let Ok(command) = self.0.try_recv() {
            if let Command::Ask(Joining { app, reply, .. }) = command {
                let end = End::TunnelLost(io::Error::new(io::ErrorKind::NotConnected, why));
                let _nobody_asks = reply.send(Outcome::among_others(end, Some(app)));
            }
        }
    }
}

impl<A> Port<A> {
    /// Has a connection carried to its end. `role` is one of a client.
    ///
    /// Dropping the future aborts it.
    pub async fn carry(&self, app: A, role: Role, counted: Counted) -> Outcome<A> {
        self.send(app, role, counted, Command::Ask).await
    }

    async fn send(
        &self,
        app: A,
        role: Role,
        counted: Counted,
        command: impl FnOnce(Joining<A>) -> Command<A>,
    ) -> Outcome<A> {
        let (reply, outcome) = oneshot::channel();
        let lost = |untouched| {
            let end = End::TunnelLost(io::ErrorKind::NotConnected.into());
            Outcome::among_others(end, untouched)
        };
        let sent = self.0.send(command(Joining { app, role, counted, reply }));
        if let Err(mpsc::error::SendError(command)) = sent {
            return lost(command.into_app());
        }
        let mut waiting = Waiting { port: self, outcome, ended: false };
        let outcome = (&mut waiting.outcome).await;
        waiting.ended = true;
        outcome.unwrap_or_else(|_| lost(None))
    }
}

impl<A> Command<A> {
    fn into_app(self) -> Option<A> {
        match self {
            Self::Ask(joining) | Self::Accept(_, joining) => Some(joining.app),
            Self::Refuse(..) | Self::Forsaken => None,
        }
    }
}

/// Waits for an outcome, and says so if it does no longer.
struct Waiting<'a, A> {
    port: &'a Port<A>,
    outcome: oneshot::Receiver<Outcome<A>>,
    ended: bool,
}

impl<A> Drop for Waiting<'_, A> {
    fn drop(&mut self) {
        if !self.ended {
            self.outcome.close();
            // Without a task there is nothing to abort.
            let _no_task = self.port.0.send(Command::Forsaken);
        }
    }
}

/// A connection that a client asks for, to be answered. Dropped, it is refused.
pub struct Ticket<A = AppSocket> {
    id: Id,
    port: Port<A>,
    answered: bool,
}

impl<A> Ticket<A> {
    /// The application is connected: carries the connection to its end.
    ///
    /// Dropping the future aborts it.
    pub async fn accept(mut self, app: A, counted: Counted) -> Outcome<A> {
        self.answered = true;
        let id = self.id;
        self.port.send(app, Role::Server, counted, |joining| Command::Accept(id, joining)).await
    }

    /// It will not be.
    pub fn refuse(mut self, refusal: Refusal) {
        self.answer(refusal);
    }

    fn answer(&mut self, refusal: Refusal) {
        self.answered = true;
        // Without a task there is nobody to tell.
        let _no_task = self.port.0.send(Command::Refuse(self.id, refusal));
    }
}

impl<A> Drop for Ticket<A> {
    fn drop(&mut self) {
        if !self.answered {
            self.answer(Refusal::new(super::Reason::Failed, "the server's agent gave up on it"));
        }
    }
}

/// What a tunnel's owner has to deal with.
pub enum Event<A = AppSocket> {
    /// At the server's agent: a client asks for a connection.
    Asked(Header, Ticket<A>),
    /// At the client's agent: the server wants no more connections here.
    GoingAway,
    /// The last connection has ended, also for the other agent.
    Idle,
    /// The other agent has closed the tunnel, which was idle.
    Closed,
}

/// A shared tunnel. [`Shared::next`] must be called until it is over.
pub struct Shared<A, T> {
    tunnel: T,
    client: bool,
    growth: Growth,
    /// By their numbers.
    members: Vec<Option<Box<Member<A>>>>,
    /// Those whose numbers are in use again, while their applications have not taken everything.
    lingering: Vec<Box<Member<A>>>,
    open: usize,
    /// [`Event::Idle`] is due when they have ended.
    busy: bool,
    last_id: u64,
    commands: Commands<A>,
    /// To be told of decisions.
    port: Option<Port<A>>,
    decoder: Numbered,
    out: Buffer,
    /// The tunnel has not taken all of `out`, and nothing is put behind it.
    stuck: bool,
    unflushed: bool,
    /// Who has the word next.
    turn: u8,
    /// At the server's agent: GOAWAY is to be said. At the client's: it was heard.
    going_away: bool,
}

impl<A: App, T: Transport> Shared<A, T> {
    /// The client's end of a new tunnel.
    pub fn client(tunnel: T, commands: Commands<A>, growth: Growth) -> Self {
        Self::new(tunnel, true, commands, None, growth)
    }

    /// The server's end.
    pub fn server(tunnel: T, growth: Growth) -> Self {
        let (port, commands) = port();
        Self::new(tunnel, false, commands, Some(port), growth)
    }

    fn new(
        tunnel: T,
        client: bool,
        commands: Commands<A>,
        port: Option<Port<A>>,
        growth: Growth,
    ) -> Self {
        Self {
            tunnel,
            client,
            growth,
            members: (0..NUMBERS).map(|_| None).collect(),
            lingering: Vec::new(),
            open: 0,
            busy: false,
            last_id: 0,
            commands,
            port,
            decoder: Numbered::default(),
            out: Buffer::default(),
            stuck: false,
            unflushed: false,
            turn: 0,
            going_away: false,
        }
    }

    /// What carries it.
    pub const fn tunnel(&self) -> &T {
        &self.tunnel
    }

    /// Whether it carries no connection, and the other agent has been told all of it.
    pub const fn is_idle(&self) -> bool {
        self.open == 0 && self.out.is_empty() && !self.unflushed
    }

    /// Tells the client to open no more connections here. Once.
    pub fn go_away(&mut self) {
        self.going_away = true;
    }

    /// Carries what there is to carry, until something is to be dealt with. It may be cancelled, and
    /// called again.
    ///
    /// # Errors
    /// [`TunnelError`]: the tunnel is of no use, and its connections are reset.
    pub async fn next(&mut self) -> Result<Event<A>, TunnelError> {
        let next = coop::unconstrained(std::future::poll_fn(|cx| self.poll(cx))).await;
        if let Err(error) = &next {
            self.lose(error);
        }
        next
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Event<A>, TunnelError>> {
        self.poll_commands(cx);
        let (mut received, mut sent) = (0, 0);
        let event = self.poll_incoming(cx, &mut received)?;
        for member in self.members.iter_mut().flatten().chain(&mut self.lingering) {
            member.poll_deliver(cx, &self.growth);
        }
        if event.is_none() {
            while sent < TURN && self.poll_outgoing(cx, &mut sent)?.is_ready() {}
            if received.max(sent) >= TURN {
                cx.waker().wake_by_ref();
            }
        }
        let was_full = self.is_full();
        self.reap();
        if was_full && !self.is_full() {
            // Somebody may wait for the number.
            cx.waker().wake_by_ref();
        }
        let rests = self.busy && self.is_idle();
        match event {
            Some(event) => Poll::Ready(Ok(event)),
            None if rests => {
                self.busy = false;
                Poll::Ready(Ok(Event::Idle))
            }
            None => Poll::Pending,
        }
    }

    fn poll_commands(&mut self, cx: &mut Context<'_>) {
        loop {
            let free = self.members.iter().position(Option::is_none);
            if self.client && free.is_none() {
                return;
            }
            let Poll::Ready(Some(command)) = self.commands.0.poll_recv(cx) else { return };
            match command {
                Command::Ask(joining) => {
                    let Some(free) = free else { continue };
                    let number = u8::try_from(free).unwrap_or(NUMBERS);
                    self.last_id += 1;
                    self.insert(Member::asking(number, self.last_id, joining), free);
                }
                Command::Accept(id, joining) => {
                    if let Some(member) = self.member(id) {
                        member.accept(joining);
                    }
                }
                Command::Refuse(id, refusal) => {
                    if let Some(member) = self.member(id) {
                        member.refuse(refusal);
                    }
                }
                Command::Forsaken => {
                    let members = self.members.iter_mut().flatten();
                    members.filter(|member| member.is_forsaken()).for_each(|member| {
                        member.abort_from_here();
                    });
                }
            }
        }
    }

    fn is_full(&self) -> bool {
        self.members.iter().all(Option::is_some)
    }

    fn insert(&mut self, member: Member<A>, number: usize) {
        if let Some(place) = self.members.get_mut(number) {
            *place = Some(Box::new(member));
            self.open += 1;
            self.busy = true;
        }
    }

    fn member(&mut self, Id { number, id }: Id) -> Option<&mut Member<A>> {
        let member = self.members.get_mut(usize::from(number))?.as_deref_mut()?;
        (member.id == id).then_some(member)
    }

    /// Takes what the tunnel has.
    fn poll_incoming(
        &mut self,
        cx: &mut Context<'_>,
        turn: &mut usize,
    ) -> Result<Option<Event<A>>, TunnelError> {
        while *turn < TURN {
            let Poll::Ready(input) = Pin::new(&mut self.tunnel).poll_fill_buf(cx) else { break };
            let input = match input {
                Ok([]) => Err(io::ErrorKind::UnexpectedEof.into()),
                input => input,
            };
            let input = match input {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    let idle = self.open == 0 && self.decoder.at_boundary();
                    return if idle { Ok(Some(Event::Closed)) } else { Err(error.into()) };
                }
                input => input?,
            };
            let (number, decoded) = self.decoder.decode(input)?;
            let place = self.members.get_mut(usize::from(number));
            let (used, frame) = match decoded {
                Decoded::Partial(used) => (used, None),
                Decoded::Frame(used, frame) => (used, Some(frame)),
                Decoded::Payload(payload) => {
                    if let Some(member) = place.and_then(Option::as_deref_mut) {
                        member.deliver(cx, payload, &self.growth);
                    }
                    let used = payload.len();
                    self.decoder.advance(used);
                    (used, None)
                }
            };
            Pin::new(&mut self.tunnel).consume(used);
            *turn += used;
            let Some(frame) = frame else { continue };
            if let Some(event) = self.take(number, frame)? {
                return Ok(Some(event));
            }
        }
        Ok(None)
    }

    fn take(&mut self, number: u8, frame: Frame) -> Result<Option<Event<A>>, Malformed> {
        let place = self.members.get_mut(usize::from(number));
        if let Some(place) = place
            && !self.client
            && matches!(frame, Frame::Open(_))
        {
            self.lingering.extend(place.take_if(|member| member.has_said_all()));
        }
        let place = self.members.get_mut(usize::from(number));
        match (place.and_then(Option::as_deref_mut), frame) {
            (None, Frame::Open(header)) if !self.client => {
                self.last_id += 1;
                let id = Id { number, id: self.last_id };
                self.insert(Member::asked(number, id.id), number.into());
                let Some(port) = self.port.clone() else { return Ok(None) };
                return Ok(Some(Event::Asked(header, Ticket { id, port, answered: false })));
            }
            (_, Frame::GoAway) if self.client && number == 0 && !self.going_away => {
                self.going_away = true;
                return Ok(Some(Event::GoingAway));
            }
            (Some(member), frame) => member.take(frame)?,
            // Of the connection that had this number before.
            (None, Frame::Reset | Frame::Credit(_)) => {}
            (None, frame) => return Err(Malformed::unexpected(&frame)),
        }
        Ok(None)
    }

    /// Sends what the connections have to say. Pending if the tunnel does not take it, or there is
    /// nothing more.
    fn poll_outgoing(&mut self, cx: &mut Context<'_>, turn: &mut usize) -> Poll<io::Result<()>> {
        if self.stuck {
            ready!(self.poll_drain(cx))?;
        }
        if self.going_away && !self.client {
            self.going_away = false;
            say(&mut self.out, 0, &Frame::GoAway);
        }
        self.gather(cx);
        if self.out.is_empty() {
            self.out.take(0);
            if self.unflushed {
                ready!(Pin::new(&mut self.tunnel).poll_flush(cx))?;
                self.unflushed = false;
            }
            return Poll::Pending;
        }
        *turn += self.out.bytes().len();
        self.poll_drain(cx)
    }

    /// Has every connection put its frames into the buffer, one after the other, until it is full or
    /// they have nothing to say.
    fn gather(&mut self, cx: &mut Context<'_>) {
        let mut silent = 0;
        while silent < NUMBERS {
            let free = AT_ONCE.saturating_sub(self.out.bytes().len());
            if free < 2 * AROUND {
                return;
            }
            let member =
                self.members.get_mut(usize::from(self.turn)).and_then(Option::as_deref_mut);
            let spoke = member.is_some_and(|member| member.gather(cx, &mut self.out, free));
            silent = if spoke { 0 } else { silent + 1 };
            self.turn = (self.turn + 1) % NUMBERS;
        }
    }

    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.out.is_empty() {
            self.stuck = true;
            match ready!(Pin::new(&mut self.tunnel).poll_write(cx, self.out.bytes()))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                taken => self.out.take(taken),
            }
            self.unflushed = true;
        }
        self.stuck = false;
        Poll::Ready(Ok(()))
    }

    /// Counts, and lets go of what has ended.
    fn reap(&mut self) {
        for place in &mut self.members {
            if let Some(member) = place.take_if(|member| member.is_over_by_now()) {
                self.open -= 1;
                member.finish();
            }
        }
        for member in self.lingering.extract_if(.., |member| member.is_over_by_now()) {
            self.open -= 1;
            member.finish();
        }
    }

    /// Nothing will be carried any more.
    fn lose(&mut self, error: &TunnelError) {
        let end = || match error {
            TunnelError::Io(error) => {
                End::TunnelLost(io::Error::new(error.kind(), error.to_string()))
            }
            TunnelError::Protocol(malformed) => End::Protocol(*malformed),
        };
        let members = self.members.iter_mut().filter_map(Option::take);
        for member in members.chain(std::mem::take(&mut self.lingering)) {
            member.count();
            member.lose(end());
        }
        self.open = 0;
        self.commands.reject(&error.to_string());
    }
}

const _: () = assert!(AT_ONCE >= MAX_FRAME + 2 * AROUND);
