//! What only shows after a while: ports, descriptors, timers, and an agent that ends in order.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use xtask::lab::mesh::{Settings, pods};
use xtask::lab::traffic::{accept, exchange, expect_refusal, reset_on_close};
use xtask::lab::{Mesh, Pod, until, volume};

const PORT: u16 = 8080;
const NOBODY: u16 = 8081;

/// Few ports at the server, so that those which are not free again at once are missed early: each
/// half for one of the agent's two kinds of sockets there.
#[test]
fn sixty_seconds_of_new_connections() -> Result<()> {
    let half = volume(2000);
    let ports = format!("{} {}", 46_884 - half, 46_883 + half);
    const CLIENT_ENDS: u16 = 9001;
    const SERVER_ENDS: u16 = 9002;
    let mut mesh = Mesh::new("sixty_seconds_of_new_connections")?;
    let (client, server) = (mesh.pod(0, "client")?, mesh.pod(1, "server")?);
    server.sysctl("net/ipv4/ip_local_port_range", &ports)?;
    let answer = |mut stream: &TcpStream| -> std::io::Result<()> {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        stream.write_all(&byte)
    };
    let _client_ends = server.serve(CLIENT_ENDS, move |mut stream| {
        // A connection that breaks is the client's to notice.
        answer(&stream).and_then(|()| stream.read_to_end(&mut Vec::new())).ok();
    })?;
    let _server_ends = server.serve(SERVER_ENDS, move |stream| {
        answer(&stream).ok();
    })?;
    let end = Instant::now() + Duration::from_secs(60);
    let made = AtomicU64::new(0);
    let (client, made) = (&client, &made);
    let talk = |to: SocketAddr| -> Result<()> {
        while Instant::now() < end {
            let mut stream = client.connect(to)?;
            let byte = made.fetch_add(1, Ordering::Relaxed).to_le_bytes()[0];
            stream.write_all(&[byte])?;
            let mut back = [0];
            stream.read_exact(&mut back)?;
            ensure!(back == [byte], "sent {byte}, got {back:?}");
            if to.port() == SERVER_ENDS {
                let rest = stream.read(&mut back)?;
                ensure!(rest == 0, "{rest} bytes too many");
            }
        }
        Ok(())
    };
    thread::scope(|scope| {
        let threads: Vec<_> = [CLIENT_ENDS, SERVER_ENDS]
            .into_iter()
            .flat_map(|port| server.sockets(port))
            .map(|to| {
                let name = format!("to {to}");
                (scope.spawn(move || talk(to)), name)
            })
            .collect();
        for (thread, name) in threads {
            let outcome = thread.join().expect("the clients do not panic");
            outcome.with_context(|| {
                format!("{name}, of {} connections in all", made.load(Ordering::Relaxed))
            })?;
        }
        let made = made.load(Ordering::Relaxed);
        ensure!(
            made > 4 * u64::from(half),
            "inconclusive: {made} connections do not use up the ports"
        );
        Ok(())
    })
}

/// The client's agent or the server's: what is open goes on to its end, nothing new begins, and
/// the agent ends with the last connection.
#[test]
fn sigterm_drains() -> Result<()> {
    let bulk: Vec<u8> = rand::random::<[u8; 32]>().repeat(1 << 16);
    for (title, index) in [("sigterm_drains-client", 0), ("sigterm_drains-server", 1)] {
        let mut mesh = Mesh::new(title)?;
        let (client, server) = (mesh.pod(0, "client")?, mesh.pod(1, "server")?);
        let _echo = server.echo(PORT)?;
        let open = server
            .sockets(PORT)
            .into_iter()
            .chain(server.sockets(PORT))
            .map(|to| {
                let mut stream = client.connect(to)?;
                stream.write_all(b"before")?;
                let mut answer = [0; 6];
                stream.read_exact(&mut answer)?;
                Ok(stream)
            })
            .collect::<Result<Vec<_>>>()?;

        mesh.agents[index].process().signal(Signal::SIGTERM)?;
        for to in server.sockets(PORT) {
            // One may still come through by an idle tunnel, whose end is announced at the moment.
            until("new connections to be refused", || expect_refusal(&client, to, b"late").ok())?;
        }
        let mut open = open.into_iter();
        let last = open.next().context("there are four connections")?;
        for stream in open {
            through(stream, &bulk).context(title)?;
        }
        mesh.agents[index].process().check_alive().context("one connection is still open")?;
        through(last, &bulk).context(title)?;
        let status = mesh.agents[index].process().wait()?;
        ensure!(status.success(), "{title}: {status}");
        let log = mesh.agents[index].process().log()?;
        ensure!(log.contains("every connection has ended"), "{title}: it did not wait");
    }
    Ok(())
}

/// [`exchange`] with more bytes than any buffer on the way takes.
fn through(stream: TcpStream, bytes: &[u8]) -> Result<()> {
    thread::scope(|scope| {
        let reading = scope.spawn(|| {
            let mut back = Vec::new();
            (&stream).read_to_end(&mut back).map(|_| back)
        });
        (&stream).write_all(bytes)?;
        stream.shutdown(Shutdown::Write)?;
        let back = reading.join().expect("the reader does not panic")?;
        ensure!(back == bytes, "sent {} bytes, {} came back", bytes.len(), back.len());
        Ok(())
    })
}

#[test]
fn idle_connections_outlive_every_timer() -> Result<()> {
    const IDLE: Duration = Duration::from_secs(5);
    let agent = "timeouts: {dial: 1s, handshake: 1s, unacknowledged: 1s, idle_tunnel: 1s}";
    let settings = Settings { agent, ..Settings::default() };
    let mut mesh = Mesh::with("idle_connections_outlive_every_timer", 2, settings)?;
    let (client, far, near) = (mesh.pod(0, "client")?, mesh.pod(1, "far")?, mesh.pod(0, "near")?);
    let mut open = Vec::new();
    for server in [&far, &near] {
        let listener = server.listen(PORT)?;
        for to in server.sockets(PORT) {
            for half_closed in [false, true] {
                let mut outgoing = client.connect(to)?;
                outgoing.write_all(b"before")?;
                let (mut incoming, _) = accept(&listener)?;
                incoming.read_exact(&mut [0; 6])?;
                if half_closed {
                    outgoing.shutdown(Shutdown::Write)?;
                    ensure!(incoming.read(&mut [0])? == 0, "bytes after the end");
                }
                open.push((outgoing, incoming, half_closed));
            }
        }
    }
    // The one thing here that is about time.
    thread::sleep(IDLE);
    for (mut outgoing, mut incoming, half_closed) in open {
        let to = outgoing.peer_addr()?;
        let mut check = || -> Result<()> {
            if !half_closed {
                outgoing.write_all(b"after")?;
                outgoing.shutdown(Shutdown::Write)?;
                let mut heard = String::new();
                incoming.read_to_string(&mut heard)?;
                ensure!(heard == "after", "the server heard {heard:?}");
            }
            incoming.write_all(b"answer")?;
            incoming.shutdown(Shutdown::Write)?;
            let mut answer = String::new();
            outgoing.read_to_string(&mut answer)?;
            ensure!(answer == "answer", "the client heard {answer:?}");
            Ok(())
        };
        check().with_context(|| format!("to {to}, half closed: {half_closed}"))?;
    }
    // The tunnels that were kept have gone meanwhile.
    let _echo = far.echo(PORT)?;
    exchange(client.connect(far.sockets(PORT)[0])?, b"once more")
}

/// However connections end, nothing of them is left at either agent.
#[test]
fn descriptors_do_not_leak() -> Result<()> {
    let at_once = volume(500).into();
    const ROUNDS: usize = 2;
    let agent = "timeouts: {idle_tunnel: 1s}";
    let settings = Settings { agent, ..Settings::default() };
    let mut mesh = Mesh::with("descriptors_do_not_leak", 2, settings)?;
    let (client, server) = (mesh.pod(0, "client")?, mesh.pod(1, "server")?);
    let _echo = server.echo(PORT)?;
    // Whatever is opened once and kept.
    every_end(&client, &server, 1)?;
    let before = resting(&mut mesh)?;
    for _ in 0..ROUNDS {
        every_end(&client, &server, at_once)?;
    }
    until("the agents to have no more open than before", || {
        let now = descriptors(&mut mesh).ok()?;
        now.iter().zip(&before).all(|(now, before)| now <= before).then_some(())
    })
    .with_context(|| format!("before {before:?}, now {:?}", descriptors(&mut mesh)))
}

/// Twice that many connections at once, of which half end in order and half are reset, and some
/// that are refused.
fn every_end(client: &Pod, server: &Pod, count: usize) -> Result<()> {
    let mut streams = Vec::new();
    for to in server.sockets(PORT) {
        for _ in 0..count {
            let mut stream = client.connect(to)?;
            stream.write_all(b"hello")?;
            streams.push(stream);
        }
    }
    for (number, mut stream) in streams.into_iter().enumerate() {
        stream.read_exact(&mut [0; 5])?;
        if number % 2 == 0 {
            reset_on_close(&stream)?;
        } else {
            exchange(stream, b"and good bye")?;
        }
    }
    for to in server.sockets(NOBODY) {
        for _ in 0..count.min(20) {
            expect_refusal(client, to, b"hello")?;
        }
    }
    Ok(())
}

/// The descriptors of each agent once no connection and no idle tunnel is left.
fn resting(mesh: &mut Mesh) -> Result<Vec<usize>> {
    until("the agents to come to rest", || {
        let at_rest = mesh.agents.iter().all(|agent| {
            agent.status().is_ok_and(|status| {
                pods(&status).all(|pod| {
                    let mut open = pod["connections"].as_array().into_iter().flatten();
                    pod["idle_tunnels"] == 0 && open.all(|entry| entry["open"] == 0)
                })
            })
        });
        at_rest.then_some(())
    })?;
    descriptors(mesh)
}

fn descriptors(mesh: &mut Mesh) -> Result<Vec<usize>> {
    let count = |pid: u32| Ok(fs::read_dir(format!("/proc/{pid}/fd"))?.count());
    mesh.agents.iter_mut().map(|agent| count(agent.process().pid())).collect()
}
