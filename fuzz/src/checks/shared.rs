//! What must hold of a tunnel that connections share, whatever the other agent says in it.

use std::{
    cell::Cell,
    collections::HashMap,
    net::SocketAddr,
    pin::{Pin, pin},
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
};

use super::{Application, Cuts, Delivered, Wire};
use crate::tunnel::{
    End, Header, Outcome, Reason, Refusal, Role, Shared, TraceId, Traffic,
    frame::{Frame, MAX_DATA, NUMBERS, Status},
    shared::{Commands, Event, Growth, Ticket, port},
};

/// What either side may send before it is granted more, in bytes.
const FIRST: u64 = 64 << 10;

/// Each application gets exactly the bytes that a naive reading of the tunnel finds for it, or
/// fewer if its connection or the tunnel broke; the tunnel is told a well-formed stream for each
/// connection, within what was granted; however reads and writes are cut.
///
/// The first byte picks the role, whether the other agent falls silent after its end, how many
/// connections a client asks for, and whether applications say the same again and again; the second
/// how much is cut; then come a length and as many bytes that every application sends; the rest is
/// what the other agent sends.
pub fn shared(data: &[u8]) {
    let Some((&[role, cuts, says], rest)) = data.split_first_chunk::<3>() else { return };
    let (said, received) = rest.split_at(rest.len().min(usize::from(says)));
    let said = &said.repeat(if role & 32 == 0 { 1 } else { 300 });
    let (client, closes, asks) = (role & 1 == 0, role & 2 == 0, 1 + (role >> 2) % 8);
    let cuts = Rc::new(Cuts(Cell::new(u32::from(cuts) + 1)));
    let input = received.to_vec();
    let wire = Wire { input, closes, shown: 0, output: Vec::new(), cuts: Rc::clone(&cuts) };
    let (port, commands) = port();
    let mut lab = Lab { shared: end(client, wire, commands), connections: Vec::new(), cuts, said };
    for source in (0..asks).filter(|_| client) {
        let (app, delivered) = lab.application();
        let header = Header::new(SocketAddr::from(([192, 0, 2, source], 40_000)), TraceId([7; 16]));
        let role = if source % 3 == 2 { Role::PatientClient } else { Role::Client };
        let (role, port) = (role(header), port.clone());
        let carried = async move { port.carry(app, role, Arc::<Traffic>::default()).await };
        let task = Box::pin(carried) as Task;
        lab.connections.push(Connection {
            header,
            ticket: None,
            task: Some(task),
            delivered,
            end: None,
        });
    }
    let lost = lab.run();

    let expected =
        if client { Expected::answers(received, asks) } else { Expected::questions(received) };
    for (n, connection) in lab.connections.iter().enumerate() {
        let (delivered, expected) = (connection.delivered.bytes.borrow(), &expected[n]);
        assert!(client || expected.header == Some(connection.header), "asked for another one");
        assert!(expected.payload.starts_with(&delivered), "other bytes than were sent");
        if connection.delivered.finished.get() {
            assert!(matches!(connection.end, Some(End::Finished)));
            assert!(expected.fin, "the application was told of an end that nobody has said");
        }
        let whole = matches!(connection.end, Some(End::Finished))
            || (connection.end.is_none() && connection.task.is_some() && !lost);
        assert!(!whole || *delivered == expected.payload, "bytes have vanished");
    }
    assert_well_formed(&lab.shared.tunnel().output, said, client, received);
}

fn end(client: bool, wire: Wire, commands: Commands<Application>) -> Shared<Application, Wire> {
    if client {
        Shared::client(wire, commands, Growth::default())
    } else {
        Shared::server(wire, Growth::default())
    }
}

type Task = Pin<Box<dyn Future<Output = Outcome<Application>>>>;

struct Connection {
    header: Header,
    /// It is decided about later.
    ticket: Option<Ticket<Application>>,
    /// None if it was refused, or is forsaken, or has ended.
    task: Option<Task>,
    delivered: Rc<Delivered>,
    end: Option<End>,
}

/// The end of a tunnel, and what an agent does around it.
struct Lab<'a> {
    shared: Shared<Application, Wire>,
    /// In the order of their OPENs.
    connections: Vec<Connection>,
    cuts: Rc<Cuts>,
    said: &'a [u8],
}

impl Lab<'_> {
    fn application(&self) -> (Application, Rc<Delivered>) {
        let log = Rc::<Delivered>::default();
        let (says, cuts) = (self.said.to_vec(), Rc::clone(&self.cuts));
        (Application { says, log: Rc::clone(&log), cuts }, log)
    }

    /// Runs until nothing moves any more. Whether the tunnel has come to its end.
    fn run(&mut self) -> bool {
        let lost = self.settle();
        // What could be decided earlier, or later.
        for n in 0..self.connections.len() {
            let choice = self.choice();
            if let Some(ticket) = self.connections[n].ticket.take() {
                self.decide(n, ticket, choice);
            } else if choice == 0 {
                self.connections[n].task = None;
            }
        }
        lost || self.settle()
    }

    fn settle(&mut self) -> bool {
        let woken = Arc::new(Flag(AtomicBool::new(true)));
        let waker = Waker::from(Arc::clone(&woken));
        let mut cx = Context::from_waker(&waker);
        let mut lost = false;
        while woken.0.swap(false, Ordering::Relaxed) {
            while !lost {
                // Begun anew each time: it may be cancelled.
                let Poll::Ready(event) = pin!(self.shared.next()).poll(&mut cx) else { break };
                match event {
                    Ok(Event::Asked(header, ticket)) => self.asked(header, ticket),
                    Ok(Event::Idle | Event::GoingAway) => {}
                    Ok(Event::Closed) | Err(_) => lost = true,
                }
            }
            for connection in &mut self.connections {
                if let Some(task) = &mut connection.task
                    && let Poll::Ready(outcome) = task.as_mut().poll(&mut cx)
                {
                    (connection.task, connection.end) = (None, Some(outcome.end));
                    woken.0.store(true, Ordering::Relaxed);
                }
            }
        }
        lost
    }

    fn asked(&mut self, header: Header, ticket: Ticket<Application>) {
        let (n, choice) = (self.connections.len(), self.choice());
        let delivered = Rc::default();
        self.connections.push(Connection {
            header,
            ticket: None,
            task: None,
            delivered,
            end: None,
        });
        if choice == 1 {
            self.connections[n].ticket = Some(ticket);
        } else {
            self.decide(n, ticket, choice);
        }
    }

    fn decide(&mut self, n: usize, ticket: Ticket<Application>, choice: u32) {
        match choice {
            2 => ticket.refuse(Refusal::new(Reason::Denied, "no rule allows it")),
            3 => drop(ticket),
            _ => {
                let (app, delivered) = self.application();
                let accepted = ticket.accept(app, Arc::<Traffic>::default());
                self.connections[n].task = Some(Box::pin(accepted));
                self.connections[n].delivered = delivered;
            }
        }
    }

    /// One of eight.
    fn choice(&self) -> u32 {
        self.cuts.draw() % 8
    }
}

/// Whether anybody wants to be polled.
struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What the other agent says of one connection.
#[derive(Default)]
struct Expected {
    header: Option<Header>,
    payload: Vec<u8>,
    fin: bool,
}

impl Expected {
    /// What a client says, by its OPENs.
    fn questions(received: &[u8]) -> Vec<Self> {
        let mut all = Vec::<Self>::new();
        let mut current = HashMap::new();
        for (number, frame, payload) in Frames(received) {
            if let Frame::Open(header) = frame {
                current.insert(number, all.len());
                all.push(Self { header: Some(header), ..Self::default() });
            } else if let Some(n) = current.get(&number) {
                all[*n].take(&frame, payload);
            }
        }
        all
    }

    /// What a server says to so many connections, which are asked for at once.
    fn answers(received: &[u8], asked: u8) -> Vec<Self> {
        let mut all: Vec<_> = (0..asked).map(|_| Self::default()).collect();
        for (number, frame, payload) in Frames(received) {
            if let Some(expected) = all.get_mut(usize::from(number)) {
                expected.take(&frame, payload);
            }
        }
        all
    }

    fn take(&mut self, frame: &Frame, payload: &[u8]) {
        if !self.fin {
            self.payload.extend_from_slice(payload);
            self.fin = *frame == Frame::Fin;
        }
    }
}

/// Reads a shared tunnel the simple way: all at once, as far as it can be read. The last payload
/// may be cut.
struct Frames<'a>(&'a [u8]);

impl<'a> Iterator for Frames<'a> {
    type Item = (u8, Frame, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let (&number, rest) = self.0.split_first().filter(|(number, _)| **number < NUMBERS)?;
        let (frame, used) = Frame::parse(rest).ok()??;
        let rest = &rest[used..];
        let length = if let Frame::Data(length) = frame { usize::from(length) } else { 0 };
        let (payload, rest) = rest.split_at(length.min(rest.len()));
        self.0 = rest;
        Some((number, frame, payload))
    }
}

/// What this end has said of one connection.
struct Spoken {
    payload: Vec<u8>,
    accepted: bool,
    ended: Option<Frame>,
}

/// For each connection a preface, the application's bytes in order and no more than were granted,
/// one end.
fn assert_well_formed(output: &[u8], said: &[u8], client: bool, received: &[u8]) {
    let mut granted = HashMap::<u8, u64>::new();
    for (number, frame, _) in Frames(received) {
        if let Frame::Credit(bytes) = frame {
            *granted.entry(number).or_default() += u64::from(bytes);
        }
    }
    let mut current = HashMap::<u8, Spoken>::new();
    for (number, frame, payload) in Frames(output) {
        let spoken = match frame {
            Frame::Open(_) | Frame::Status(_) => {
                assert_eq!(client, matches!(frame, Frame::Open(_)), "the preface of another role");
                let accepted = !matches!(frame, Frame::Status(Status::Refused(_)));
                let before =
                    current.insert(number, Spoken { payload: Vec::new(), accepted, ended: None });
                let over = before.is_none_or(|before| !before.accepted || before.ended.is_some());
                assert!(over, "a second connection of number {number}");
                continue;
            }
            Frame::GoAway => panic!("nobody asked for a farewell"),
            Frame::Data(_) | Frame::Fin | Frame::Reset | Frame::Credit(_) | Frame::Blocked => {
                current.get_mut(&number).expect("a frame of a connection that nobody opened")
            }
        };
        assert!(spoken.accepted, "{frame:?} after a refusal");
        match (&spoken.ended, &frame) {
            (None, Frame::Data(length)) => {
                assert!((1..MAX_DATA).contains(&usize::from(*length)));
                spoken.payload.extend_from_slice(payload);
            }
            (None, Frame::Blocked) | (None | Some(Frame::Fin), Frame::Credit(_)) => {}
            (None, Frame::Fin) => {
                assert_eq!(spoken.payload, said, "a clean end of a truncated stream");
                spoken.ended = Some(frame);
            }
            (None | Some(Frame::Fin), Frame::Reset) => spoken.ended = Some(frame),
            (ended, frame) => panic!("{frame:?} after {ended:?}"),
        }
        assert!(said.starts_with(&spoken.payload), "the application did not say that");
        let granted = FIRST + granted.get(&number).copied().unwrap_or_default();
        assert!(spoken.payload.len() as u64 <= granted, "more than was granted");
    }
}
