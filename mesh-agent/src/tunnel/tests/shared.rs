//! Connections that share a tunnel, as applications see them.

use std::sync::Arc;

use futures::future::join_all;
use rand::{Rng as _, RngCore as _, SeedableRng as _, rngs::StdRng};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::mpsc,
    task::{AbortHandle, JoinHandle},
};

use super::{
    super::{
        App, AppSocket, Header, Outcome, Reason, Refusal, Role, Shared, Traffic,
        server::TunnelError,
        shared::{Event, Growth, Port, Ticket, port},
    },
    bounds::InMemory,
    connection::write_in_pieces,
    lab::{assert_reset, header, hear, read_all, reset, say, tcp_pair, tunnel, within},
};
use crate::tls::Stream;

/// A shared tunnel between two agents.
struct Lab {
    port: Port,
    /// What the server's agent is asked.
    asked: mpsc::UnboundedReceiver<(Header, Ticket)>,
    client_agent: JoinHandle<Result<(), TunnelError>>,
    server_agent: JoinHandle<Result<(), TunnelError>>,
    growth: Growth,
}

/// Runs one end until the tunnel is closed.
async fn run<A: App>(
    mut shared: Shared<A, Stream>,
    asked: mpsc::UnboundedSender<(Header, Ticket<A>)>,
) -> Result<(), TunnelError> {
    loop {
        match shared.next().await? {
            Event::Asked(header, ticket) => asked.send((header, ticket)).unwrap_or_default(),
            Event::Closed => return Ok(()),
            Event::Idle | Event::GoingAway => {}
        }
    }
}

/// A connection in progress: both applications, and what each agent will say of it.
struct Carried {
    client: TcpStream,
    server: TcpStream,
    at_client: JoinHandle<Outcome>,
    at_server: JoinHandle<Outcome>,
    traffic: Arc<Traffic>,
}

impl Lab {
    async fn new() -> Self {
        let (near, far) = tunnel().await;
        let growth = Growth::default();
        let (port, commands) = port();
        let (sender, asked) = mpsc::unbounded_channel();
        let client = Shared::client(near, commands, Growth::default());
        let server = Shared::server(far, growth.clone());
        let client_agent = tokio::spawn(run(client, sender.clone()));
        Self { port, asked, client_agent, server_agent: tokio::spawn(run(server, sender)), growth }
    }

    /// Asks for a connection: its application, and what the agent will say.
    async fn ask(&self) -> (TcpStream, JoinHandle<Outcome>, Arc<Traffic>) {
        let (client, app) = tcp_pair().await;
        let (port, traffic) = (self.port.clone(), Arc::<Traffic>::default());
        let counted = Arc::clone(&traffic);
        let app = AppSocket::new(app).unwrap();
        let carried =
            tokio::spawn(async move { port.carry(app, Role::Client(header()), counted).await });
        (client, carried, traffic)
    }

    async fn asked(&mut self) -> Ticket {
        let (asked, ticket) = within("the question", self.asked.recv()).await.unwrap();
        assert_eq!(asked, header());
        ticket
    }

    async fn open(&mut self) -> Carried {
        let (client, at_client, traffic) = self.ask().await;
        let ticket = self.asked().await;
        let (server, app) = tcp_pair().await;
        let app = AppSocket::new(app).unwrap();
        let accepted = ticket.accept(app, Arc::<Traffic>::default());
        let at_server = tokio::spawn(accepted);
        Carried { client, server, at_client, at_server, traffic }
    }

    /// Both ends go on and have nothing open: a connection can still be opened, and ends in order.
    async fn works(&mut self) {
        let mut carried = self.open().await;
        say(&mut carried.client, b"question").await;
        hear(&mut carried.server, b"question").await;
        say(&mut carried.server, b"answer").await;
        hear(&mut carried.client, b"answer").await;
        carried.client.shutdown().await.unwrap();
        assert_eq!(read_all(&mut carried.server).await, b"");
        carried.server.shutdown().await.unwrap();
        assert_eq!(read_all(&mut carried.client).await, b"");
        assert_eq!(carried.ended().await, ("finished", "finished"));
    }
}

async fn words<A>(agent: JoinHandle<Outcome<A>>) -> &'static str {
    within("the agent", agent).await.unwrap().end.words()
}

impl Carried {
    async fn ended(self) -> (&'static str, &'static str) {
        (words(self.at_client).await, words(self.at_server).await)
    }

    async fn exchange(&mut self, question: &[u8], answer: &[u8], seed: u64) {
        let (mut client_in, mut client_out) = self.client.split();
        let (mut server_in, mut server_out) = self.server.split();
        let (_, _, answered, asked) = within("the exchange", async {
            tokio::join!(
                write_in_pieces(&mut client_out, question, StdRng::seed_from_u64(seed + 100)),
                write_in_pieces(&mut server_out, answer, StdRng::seed_from_u64(seed + 200)),
                read_all(&mut client_in),
                read_all(&mut server_in),
            )
        })
        .await;
        assert!(asked == question, "seed {seed}: the server reads something else");
        assert!(answered == answer, "seed {seed}: the client reads something else");
    }
}

#[tokio::test]
async fn every_byte_arrives_where_it_belongs_however_it_is_cut() {
    let mut lab = Lab::new().await;
    for round in 0..3 {
        let mut all = Vec::new();
        for n in 0..40_u64 {
            let mut rng = StdRng::seed_from_u64(round * 100 + n);
            let mut random = |most| {
                let mut bytes = vec![0; rng.random_range(0..most)];
                rng.fill_bytes(&mut bytes);
                bytes
            };
            let (question, answer) = (random(1 << (6 + n % 13)), random(1 << (19 - n % 13)));
            all.push((lab.open().await, question, answer, n));
        }
        let exchanges = all.into_iter().map(|(mut carried, question, answer, seed)| async move {
            carried.exchange(&question, &answer, seed).await;
            let traffic = Arc::clone(&carried.traffic);
            assert_eq!(carried.ended().await, ("finished", "finished"));
            assert_eq!(traffic.from_client(), question.len() as u64);
            assert_eq!(traffic.from_server(), answer.len() as u64);
        });
        join_all(exchanges).await;
    }
    lab.works().await;
}

#[tokio::test]
async fn numbers_are_used_again_and_more_wait_than_there_are() {
    let mut lab = Lab::new().await;
    for _ in 0..200 {
        lab.works().await;
    }
    let mut all = Vec::new();
    for _ in 0..64 {
        all.push(lab.open().await);
    }
    let (mut waiting, at_client, _) = lab.ask().await;
    say(&mut waiting, b"patience").await;
    tokio::task::yield_now().await;
    assert!(lab.asked.try_recv().is_err());
    let first = all.swap_remove(17);
    reset(first.client);
    assert_eq!(words(first.at_client).await, "client reset");
    let ticket = lab.asked().await;
    let (mut server, app) = tcp_pair().await;
    let at_server =
        tokio::spawn(ticket.accept(AppSocket::new(app).unwrap(), Arc::<Traffic>::default()));
    hear(&mut server, b"patience").await;
    drop((waiting, server));
    assert_eq!((words(at_client).await, words(at_server).await), ("finished", "finished"));
}

#[tokio::test]
async fn each_side_may_close_its_half_first() {
    let mut lab = Lab::new().await;
    let mut carried = lab.open().await;
    say(&mut carried.client, b"question").await;
    carried.client.shutdown().await.unwrap();
    assert_eq!(read_all(&mut carried.server).await, b"question");
    for _ in 0..3 {
        say(&mut carried.server, b"late answer").await;
        hear(&mut carried.client, b"late answer").await;
    }
    carried.server.shutdown().await.unwrap();
    assert_eq!(read_all(&mut carried.client).await, b"");
    assert_eq!(carried.ended().await, ("finished", "finished"));

    let mut carried = lab.open().await;
    carried.server.shutdown().await.unwrap();
    assert_eq!(read_all(&mut carried.client).await, b"");
    say(&mut carried.client, b"still here").await;
    hear(&mut carried.server, b"still here").await;
    carried.client.shutdown().await.unwrap();
    assert_eq!(read_all(&mut carried.server).await, b"");
    assert_eq!(carried.ended().await, ("finished", "finished"));
}

#[tokio::test]
async fn a_reset_crosses_and_hurts_nobody_else() {
    let mut lab = Lab::new().await;
    let mut bystander = lab.open().await;
    for from_client in [true, false] {
        // Also when the other half is closed already, which nothing but a RESET can tell.
        for half_closed in [false, true] {
            let Carried { mut client, mut server, at_client, at_server, .. } = lab.open().await;
            say(&mut client, b"hello").await;
            hear(&mut server, b"hello").await;
            let (mut victim, mut culprit) =
                if from_client { (server, client) } else { (client, server) };
            if half_closed {
                culprit.shutdown().await.unwrap();
                assert_eq!(read_all(&mut victim).await, b"");
            }
            reset(culprit);
            let expected = if from_client { "client reset" } else { "server reset" };
            if half_closed {
                // Only who writes to it notices.
                while victim.write_all(b"anybody there?").await.is_ok() {
                    tokio::task::yield_now().await;
                }
            } else {
                assert_reset(&mut victim).await;
            }
            let ended = (words(at_client).await, words(at_server).await);
            assert_eq!(ended, (expected, expected), "half-closed: {half_closed}");
        }
    }
    say(&mut bystander.client, b"still here").await;
    hear(&mut bystander.server, b"still here").await;
    lab.works().await;
}

#[tokio::test]
async fn a_refusal_gives_the_application_back_as_it_was() {
    let mut lab = Lab::new().await;
    for said in [&b""[..], b"impatient"] {
        let (mut client, carried, traffic) = lab.ask().await;
        say(&mut client, said).await;
        let ticket = lab.asked().await;
        within("the first bytes", async {
            while traffic.from_client() < said.len() as u64 {
                tokio::task::yield_now().await;
            }
        })
        .await;
        ticket.refuse(Refusal::new(Reason::Denied, "no rule allows it"));
        let outcome = within("the refusal", carried).await.unwrap();
        assert_eq!(outcome.end.to_string(), "refused: denied by policy: no rule allows it");
        assert_eq!(outcome.untouched.is_some(), said.is_empty());
        drop(outcome);
        assert_reset(&mut client).await;
    }
    // Who does not answer has refused, too.
    let (_client, carried, _) = lab.ask().await;
    drop(lab.asked().await);
    assert_eq!(words(carried).await, "failed");
    lab.works().await;
}

#[tokio::test]
async fn a_tunnel_that_is_lost_resets_what_it_carries_and_gives_back_what_it_does_not() {
    let mut lab = Lab::new().await;
    let Carried { mut client, mut server, at_client, at_server, .. } = lab.open().await;
    let (mut waiting, carried, _) = lab.ask().await;
    let _ticket = lab.asked().await;
    lab.server_agent.abort();
    assert_reset(&mut client).await;
    assert_reset(&mut server).await;
    assert_eq!((words(at_client).await, words(at_server).await), ("tunnel lost", "tunnel lost"));
    let outcome = within("the loss", carried).await.unwrap();
    assert!(outcome.untouched.is_some(), "{}", outcome.end);
    within("the agent", lab.client_agent).await.unwrap().unwrap_err();
    // And whoever comes too late.
    let late = lab.port.carry(
        outcome.untouched.unwrap(),
        Role::Client(header()),
        Arc::<Traffic>::default(),
    );
    let outcome = within("the answer", late).await;
    assert!(outcome.untouched.is_some(), "{}", outcome.end);
    drop(outcome);
    assert_reset(&mut waiting).await;
}

#[tokio::test]
async fn a_connection_whose_owner_is_gone_is_reset_at_both_ends() {
    let mut lab = Lab::new().await;
    for client_first in [true, false] {
        let Carried { mut client, mut server, at_client, at_server, .. } = lab.open().await;
        say(&mut server, b"hello").await;
        hear(&mut client, b"hello").await;
        let (gone, other): (AbortHandle, _) = if client_first {
            (at_client.abort_handle(), at_server)
        } else {
            (at_server.abort_handle(), at_client)
        };
        gone.abort();
        assert_reset(&mut client).await;
        assert_reset(&mut server).await;
        let expected = if client_first { "client reset" } else { "server reset" };
        assert_eq!(words(other).await, expected);
    }
    // A server that has not decided yet.
    let (_client, carried, _) = lab.ask().await;
    let ticket = lab.asked().await;
    carried.abort();
    let (mut server, app) = tcp_pair().await;
    lab.works().await;
    let accepted = ticket.accept(AppSocket::new(app).unwrap(), Arc::<Traffic>::default());
    within("the outcome", accepted).await;
    assert_reset(&mut server).await;
    lab.works().await;
}

/// How much an application can say that nobody listens to.
async fn said_to_nobody(client: &mut TcpStream) -> usize {
    let mut said = 0;
    let chunk = vec![7; 64 << 10];
    loop {
        let write = client.write(&chunk);
        match tokio::time::timeout(std::time::Duration::from_millis(300), write).await {
            Ok(written) => said += written.unwrap(),
            Err(_) => return said,
        }
    }
}

#[tokio::test]
async fn an_application_that_does_not_read_stops_only_who_talks_to_it() {
    let mut lab = Lab::new().await;
    let mut deaf = lab.open().await;
    for app in [&deaf.client, &deaf.server] {
        // The kernel's own buffers are not what is measured.
        let socket = socket2::SockRef::from(app);
        socket.set_send_buffer_size(64 << 10).unwrap();
        socket.set_recv_buffer_size(64 << 10).unwrap();
    }
    let said = said_to_nobody(&mut deaf.client).await;
    // It waits where it was said, and not with the server's agent.
    let at_server = deaf.traffic.from_client();
    assert!(at_server < 8 << 20, "{at_server} of {said} bytes have left the client's agent");
    for _ in 0..10 {
        lab.works().await;
    }
    // Its answer is not held up either, and when it reads at last, all is there.
    say(&mut deaf.server, b"answer").await;
    hear(&mut deaf.client, b"answer").await;
    deaf.client.shutdown().await.unwrap();
    assert_eq!(read_all(&mut deaf.server).await.len(), said);
}

#[tokio::test]
async fn a_stream_that_fills_its_window_gets_a_larger_one() {
    let mut lab = Lab::new().await;
    let mut carried = lab.open().await;
    let question = vec![3; 64 << 20];
    let (mut client_in, mut client_out) = carried.client.split();
    let (mut server_in, mut server_out) = carried.server.split();
    let growth = lab.growth.clone();
    let read = async {
        let asked = read_all(&mut server_in).await;
        let grown = growth.used();
        server_out.shutdown().await.unwrap();
        (asked, grown)
    };
    let write = write_in_pieces(&mut client_out, &question, StdRng::seed_from_u64(1));
    let (_, (asked, grown), _) =
        within("the exchange", async { tokio::join!(write, read, read_all(&mut client_in)) }).await;
    assert!(asked == question);
    assert!(grown > 0, "the window was never full, or did not grow");
    assert_eq!(carried.ended().await, ("finished", "finished"));
    lab.works().await;
    assert_eq!(lab.growth.used(), 0, "what a window grew by is not given back");
}

#[tokio::test]
async fn a_number_is_used_again_while_the_one_before_is_still_delivered() {
    let (near, far) = tunnel().await;
    let (port, commands) = port();
    let mut client = Shared::client(near, commands, Growth::default());
    let mut server = Shared::server(far, Growth::default());
    tokio::spawn(async move { while client.next().await.is_ok() {} });
    let (sender, mut tickets) = mpsc::unbounded_channel::<Ticket<InMemory>>();
    tokio::spawn(async move {
        while let Ok(event) = server.next().await {
            if let Event::Asked(_, ticket) = event {
                sender.send(ticket).unwrap();
            }
        }
    });
    let mut applications = Vec::new();
    for n in 0..100_u8 {
        let (mut client, app) = tokio::io::duplex(1 << 16);
        let (port, counted) = (port.clone(), Arc::<Traffic>::default());
        let role = Role::Client(header());
        let at_client = tokio::spawn(async move { port.carry(InMemory(app), role, counted).await });
        let ticket = within("the question", tickets.recv()).await.unwrap();
        // It takes not even half of what it is told.
        let (mut server, app) = tokio::io::duplex(8);
        let accepted = ticket.accept(InMemory(app), Arc::<Traffic>::default());
        let at_server = tokio::spawn(accepted);
        say(&mut client, &[n; 20]).await;
        client.shutdown().await.unwrap();
        server.shutdown().await.unwrap();
        assert_eq!(read_all(&mut client).await, b"");
        assert_eq!(words(at_client).await, "finished");
        applications.push((server, at_server, n));
    }
    for (mut server, at_server, n) in applications {
        assert!(!at_server.is_finished());
        assert_eq!(read_all(&mut server).await, [n; 20]);
        assert_eq!(words(at_server).await, "finished");
    }
}

const ACCEPTED: &[u8] = &[0, 2, 0, 1, 0];

fn open(number: u8) -> Vec<u8> {
    let mut bytes = vec![number, 1, 0, 23, 1];
    bytes.extend([0xab; 16]);
    bytes.extend([0x9c, 0x41, 192, 0, 2, 7]);
    bytes
}

fn data(number: u8, payload: &[u8]) -> Vec<u8> {
    let [.., hi, lo] = payload.len().to_be_bytes();
    [&[number, 3, hi, lo], payload].concat()
}

/// What a peer may not say where connection 0 is open, and what the log says of it.
fn malformed() -> Vec<(&'static str, Vec<u8>)> {
    let overflow = [&[0, 7, 0, 4][..], &[0xff; 4]].concat();
    vec![
        ("a tunnel has no connection 64: the numbers end at 63", vec![64, 4, 0, 0]),
        ("unknown frame type 0x00", vec![0, 0, 0, 0]),
        ("unknown frame type 0x09", vec![0, 9, 0, 0]),
        ("a frame of type 0x07 cannot have a body of 0 bytes", vec![0, 7, 0, 0]),
        ("a frame of type 0x08 cannot have a body of 1 bytes", vec![0, 8, 0, 1]),
        ("a CREDIT frame must grant something", vec![0, 7, 0, 4, 0, 0, 0, 0]),
        ("more credit than fits", overflow),
        ("a frame of type 0x03 has no place here", data(1, b"x")),
        ("a frame of type 0x04 has no place here", vec![1, 4, 0, 0]),
        ("a frame of type 0x08 has no place here", vec![1, 8, 0, 0]),
        ("a frame of type 0x02 has no place here", ACCEPTED.to_vec()),
        ("a frame of type 0x01 has no place here", open(0)),
        ("a frame of type 0x03 has no place here", [&[0, 4, 0, 0][..], &data(0, b"x")].concat()),
        ("a frame of type 0x04 has no place here", vec![0, 4, 0, 0, 0, 4, 0, 0]),
        ("a frame of type 0x06 has no place here", vec![1, 6, 0, 0]),
        ("a frame of type 0x06 has no place here", vec![0, 6, 0, 0, 0, 6, 0, 0]),
    ]
}

/// One end of a shared tunnel, which carries one connection, and who is in the place of the other
/// agent.
async fn against_a_server<A: App + Send + 'static>(
    app: A,
) -> (JoinHandle<Outcome<A>>, Agent, Stream) {
    let (near, mut far) = tunnel().await;
    let (port, commands) = port();
    let client = Shared::client(near, commands, Growth::default());
    let agent = tokio::spawn(run(client, mpsc::unbounded_channel().0));
    let counted = Arc::<Traffic>::default();
    let carried =
        tokio::spawn(async move { port.carry(app, Role::Client(header()), counted).await });
    let mut question = open(0);
    within("the question", far.read_exact(&mut question)).await.unwrap();
    (carried, agent, far)
}

async fn against_a_client<A: App + Send + 'static>(
    app: A,
) -> (JoinHandle<Outcome<A>>, Agent, Stream) {
    let (mut near, far) = tunnel().await;
    let (sender, mut asked) = mpsc::unbounded_channel();
    let agent = tokio::spawn(run(Shared::server(far, Growth::default()), sender));
    say(&mut near, &open(0)).await;
    let (_, ticket) = within("the question", asked.recv()).await.unwrap();
    let carried = tokio::spawn(ticket.accept(app, Arc::<Traffic>::default()));
    (carried, agent, near)
}

async fn app_socket() -> (TcpStream, AppSocket) {
    let (application, app) = tcp_pair().await;
    (application, AppSocket::new(app).unwrap())
}

/// What the log says of an agent that has given its tunnel up.
async fn protocol_error(agent: Agent) -> String {
    let mut said = within("the end", agent).await.unwrap().unwrap_err().to_string();
    said.split_off(said.find(": ").unwrap() + 2)
}

type Agent = JoinHandle<Result<(), TunnelError>>;

#[tokio::test]
async fn a_peer_that_talks_nonsense_ends_its_tunnel_and_no_other() {
    let mut bystander = Lab::new().await;
    for client in [true, false] {
        for (error, bytes) in malformed() {
            let (mut application, app) = app_socket().await;
            let (carried, agent, mut peer) = if client {
                let mut all = against_a_server(app).await;
                say(&mut all.2, ACCEPTED).await;
                all
            } else {
                against_a_client(app).await
            };
            say(&mut peer, &data(0, b"ok")).await;
            hear(&mut application, b"ok").await;
            say(&mut peer, &bytes).await;
            // GOAWAY once is in its place at the client.
            assert_eq!(protocol_error(agent).await, error, "at the client: {client}");
            assert_eq!(words(carried).await, "protocol error");
            assert_reset(&mut application).await;
        }
    }
    bystander.works().await;
}

#[tokio::test]
async fn a_peer_that_sends_more_than_it_was_granted_ends_its_tunnel() {
    for client in [true, false] {
        // It takes so little that nothing more is granted.
        let (_application, app) = tokio::io::duplex(8);
        let (carried, agent, mut peer) = if client {
            let mut all = against_a_server(InMemory(app)).await;
            say(&mut all.2, ACCEPTED).await;
            all
        } else {
            against_a_client(InMemory(app)).await
        };
        for _ in 0..8 {
            say(&mut peer, &data(0, &[7; 8192])).await;
        }
        say(&mut peer, &data(0, &[7])).await;
        assert_eq!(protocol_error(agent).await, "more bytes than the receiver has granted");
        assert_eq!(words(carried).await, "protocol error");
    }
}

#[tokio::test]
async fn what_came_too_late_for_the_connection_before_is_ignored() {
    let late = [&[0, 5, 0, 0][..], &[0, 7, 0, 4, 0, 0, 0, 1]].concat();
    // Before the answer, and for a number that is free.
    let (mut client, app) = app_socket().await;
    let (carried, _agent, mut peer) = against_a_server(app).await;
    say(&mut peer, &[&[9, 5, 0, 0], late.as_slice(), ACCEPTED, &data(0, b"ok")].concat()).await;
    hear(&mut client, b"ok").await;
    say(&mut peer, &[0, 4, 0, 0]).await;
    assert_eq!(read_all(&mut client).await, b"");
    client.shutdown().await.unwrap();
    assert_eq!(words(carried).await, "finished");

    let (mut server, app) = app_socket().await;
    let (carried, _agent, mut peer) = against_a_client(app).await;
    say(&mut peer, &[data(0, b"ok").as_slice(), &[0, 4, 0, 0]].concat()).await;
    hear(&mut server, b"ok").await;
    server.shutdown().await.unwrap();
    assert_eq!(words(carried).await, "finished");
    say(&mut peer, &[late.as_slice(), &open(0)].concat()).await;
    // STATUS and FIN of the first, and the second is refused, because nobody answers it.
    hear(&mut peer, &[ACCEPTED, &[0, 4, 0, 0]].concat()).await;
    hear(&mut peer, &[0, 2, 0]).await;
}

#[tokio::test]
async fn a_server_that_answers_out_of_turn_gets_no_byte_through() {
    for bytes in [data(0, b"x"), vec![0, 4, 0, 0], vec![0, 8, 0, 0], open(0), open(1)] {
        let (mut client, app) = app_socket().await;
        let (carried, agent, mut peer) = against_a_server(app).await;
        say(&mut peer, &bytes).await;
        assert_reset(&mut client).await;
        assert_eq!(words(carried).await, "protocol error");
        within("the end", agent).await.unwrap().unwrap_err();
    }
}

#[tokio::test]
async fn a_tunnel_that_is_cut_in_a_frame_is_lost_and_between_connections_is_closed() {
    for cut in 1..open(0).len() {
        let (mut near, far) = tunnel().await;
        let agent = tokio::spawn(run::<AppSocket>(
            Shared::server(far, Growth::default()),
            mpsc::unbounded_channel().0,
        ));
        say(&mut near, &open(0)[..cut]).await;
        near.shutdown().await.unwrap();
        let ended = within("the end", agent).await.unwrap().unwrap_err().to_string();
        assert!(ended.starts_with("the tunnel broke off"), "cut at {cut}: {ended}");
    }
    let (near, far) = tunnel().await;
    let agent = tokio::spawn(run::<AppSocket>(
        Shared::server(far, Growth::default()),
        mpsc::unbounded_channel().0,
    ));
    drop(near);
    within("the end", agent).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_connection_that_crosses_the_farewell_is_served() {
    let (near, far) = tunnel().await;
    let (port, commands) = port();
    let mut client = Shared::client(near, commands, Growth::default());
    let mut server = Shared::<AppSocket, _>::server(far, Growth::default());
    server.go_away();
    let (mut application, app) = tcp_pair().await;
    let app = AppSocket::new(app).unwrap();
    let carried = tokio::spawn(async move {
        port.carry(app, Role::Client(header()), Arc::<Traffic>::default()).await
    });
    let (heard, going) = tokio::sync::oneshot::channel();
    tokio::spawn(async move {
        assert!(matches!(client.next().await, Ok(Event::GoingAway)));
        heard.send(()).unwrap();
        while client.next().await.is_ok() {}
    });
    let Ok(Event::Asked(_, ticket)) = within("the question", server.next()).await else {
        panic!("no question")
    };
    within("the farewell", going).await.unwrap();
    tokio::spawn(async move { while server.next().await.is_ok() {} });
    let (mut far_application, app) = tcp_pair().await;
    let app = AppSocket::new(app).unwrap();
    tokio::spawn(ticket.accept(app, Arc::<Traffic>::default()));
    say(&mut application, b"hello").await;
    hear(&mut far_application, b"hello").await;
    drop((application, far_application));
    assert_eq!(words(carried).await, "finished");
}
