//! What unusual sockets and unusual ends look like, with the mesh as without it.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::libc::IPPROTO_MPTCP;
use sha2::{Digest as _, Sha256};
use socket2::{Domain, Protocol, Socket, Type};
use xtask::lab::compare::{PORT, as_without_mesh, expect_end, expect_reset, pair};
use xtask::lab::traffic::{accept, canonical, reset_on_close, when_free};
use xtask::lab::{Mesh, Netns, patience, until};

/// A socket that is bound, if it should be, but not connected.
fn socket(
    netns: &Netns,
    address: SocketAddr,
    protocol: Protocol,
    bind: Option<SocketAddr>,
) -> Result<Socket> {
    let new = || Socket::new(Domain::for_address(address), Type::STREAM, Some(protocol));
    let socket = netns.run(new).context("making the socket")?;
    socket.set_read_timeout(Some(patience()))?;
    if let Some(own) = bind {
        socket.set_reuse_address(true)?;
        when_free(|| socket.bind(&own.into()))?;
    }
    Ok(socket)
}

/// Says something both ways, and ends both ways.
fn talk(mut outgoing: TcpStream, mut incoming: TcpStream) -> Result<()> {
    outgoing.write_all(b"there")?;
    outgoing.shutdown(Shutdown::Write)?;
    let (mut heard, mut answer) = (String::new(), String::new());
    incoming.read_to_string(&mut heard)?;
    incoming.write_all(b"and back")?;
    incoming.shutdown(Shutdown::Write)?;
    outgoing.read_to_string(&mut answer)?;
    ensure!(heard == "there" && answer == "and back", "heard {heard:?} and {answer:?}");
    Ok(())
}

#[test]
fn multipath_tcp() -> Result<()> {
    let mptcp = Protocol::from(IPPROTO_MPTCP);
    as_without_mesh("multipath_tcp", |client, server, family| {
        for (at_client, at_server) in [(true, false), (false, true), (true, true)] {
            let which = |multipath| if multipath { mptcp } else { Protocol::TCP };
            let to = server.sockets(PORT)[family];
            let listener = socket(server, to, which(at_server), Some(to))?;
            listener.listen(1)?;
            let outgoing = socket(client, to, which(at_client), None)?;
            outgoing.connect(&to.into())?;
            let (outgoing, listener) = (TcpStream::from(outgoing), listener.into());
            let (incoming, from) = accept(&listener)?;
            ensure!(from.ip() == client.addresses()[family], "the server sees {from}");
            ensure!(outgoing.peer_addr()? == to, "the client sees {}", outgoing.peer_addr()?);
            talk(outgoing, incoming)
                .with_context(|| format!("client {at_client}, server {at_server}"))?;
        }
        Ok(())
    })
}

#[test]
fn ipv4_through_ipv6_sockets() -> Result<()> {
    as_without_mesh("ipv4_through_ipv6_sockets", |client, server, _| {
        let mapped = |address: IpAddr| match address {
            IpAddr::V4(address) => address.to_ipv6_mapped().into(),
            IpAddr::V6(_) => address,
        };
        let to = SocketAddr::new(mapped(server.v4()), PORT);
        let listener = server.listen(PORT)?;
        let outgoing = client.connect(to)?;
        let (incoming, from) = accept(&listener)?;
        ensure!(outgoing.peer_addr()? == to, "getpeername: {}", outgoing.peer_addr()?);
        let own = outgoing.local_addr()?.ip();
        ensure!(own == mapped(client.v4()), "getsockname: {own}");
        ensure!(from.ip() == client.v4(), "the server's getpeername: {from}");
        talk(outgoing, incoming)
    })
}

#[test]
fn clients_that_choose_their_address_and_port() -> Result<()> {
    as_without_mesh("clients_that_choose_their_address_and_port", |client, server, family| {
        let to = server.sockets(PORT)[family];
        let listener = server.listen(PORT)?;
        for port in [0, 40_000, 999] {
            let own = client.sockets(port)[family];
            let outgoing = socket(client, to, Protocol::TCP, Some(own))?;
            outgoing.connect(&to.into())?;
            let outgoing = TcpStream::from(outgoing);
            let (incoming, from) = accept(&listener)?;
            let chosen = outgoing.local_addr()?;
            ensure!(chosen.ip() == own.ip(), "getsockname: {chosen}");
            ensure!(port == 0 || chosen.port() == port, "getsockname: {chosen}");
            ensure!(outgoing.peer_addr()? == to, "getpeername: {}", outgoing.peer_addr()?);
            // The port that the server sees is the agent's.
            ensure!(from.ip() == own.ip(), "the server sees {from}");
            let at = canonical(incoming.local_addr()?);
            ensure!(at == to, "the server's getsockname: {at}");
            talk(outgoing, incoming)?;
        }
        Ok(())
    })
}

#[test]
fn resets_after_data() -> Result<()> {
    as_without_mesh("resets_after_data", |client, server, family| {
        let (outgoing, incoming) = pair(client, server, family)?;
        let (forth, back) = ((outgoing, incoming), pair(client, server, family)?);
        for (mut first, mut second) in [forth, (back.1, back.0)] {
            first.write_all(b"data")?;
            let mut heard = [0; 4];
            second.read_exact(&mut heard)?;
            ensure!(&heard == b"data", "{heard:?}");
            reset_on_close(&first)?;
            drop(first);
            expect_reset(&mut second)?;
        }
        Ok(())
    })
}

/// Whichever side has ended its half, either side may still reset.
#[test]
fn resets_after_half_close() -> Result<()> {
    as_without_mesh("resets_after_half_close", |client, server, family| {
        let mut pairs = Vec::new();
        for _ in 0..2 {
            let (outgoing, incoming) = pair(client, server, family)?;
            pairs.push((outgoing, incoming));
            let (outgoing, incoming) = pair(client, server, family)?;
            pairs.push((incoming, outgoing));
        }
        for (number, (mut first, mut second)) in pairs.into_iter().enumerate() {
            first.write_all(b"data")?;
            first.shutdown(Shutdown::Write)?;
            second.read_exact(&mut [0; 4])?;
            expect_end(&mut second)?;
            if number < 2 {
                reset_on_close(&second)?;
                drop(second);
                expect_reset(&mut first).context("the one that listened resets")?;
            } else {
                reset_on_close(&first)?;
                drop(first);
                // It reads the end that came before, and is told when it writes.
                let error = until("writing to fail", || second.write_all(b"more").err())?;
                let kind = error.kind();
                let is_reset = matches!(kind, ErrorKind::ConnectionReset | ErrorKind::BrokenPipe);
                ensure!(is_reset, "the one that ended its half resets: {error}");
            }
        }
        Ok(())
    })
}

/// The writer is held up while the reader pauses, and nothing is lost.
#[test]
fn readers_may_pause() -> Result<()> {
    const PAUSE: Duration = Duration::from_secs(4);
    let mut mesh = Mesh::new("readers_may_pause")?;
    let (client, server) = (mesh.pod(0, "client")?, mesh.pod(1, "server")?);
    let pairs = [pair(&client, &server, 0)?, pair(&client, &server, 1)?];
    let writers: Vec<_> = pairs.iter().flat_map(|(one, other)| [one, other]).collect();
    let readers: Vec<_> = pairs.iter().flat_map(|(one, other)| [other, one]).collect();
    let finished = AtomicU64::new(0);
    thread::scope(|scope| {
        let writing: Vec<_> = writers
            .iter()
            .map(|writer| {
                scope.spawn(|| {
                    let hash = send_blocks(writer);
                    finished.fetch_add(1, Ordering::Relaxed);
                    hash
                })
            })
            .collect();
        // Not until something: the pause is what is tested.
        thread::sleep(PAUSE);
        let early = finished.load(Ordering::Relaxed);
        let reading: Vec<_> = readers
            .iter()
            .map(|reader| {
                scope.spawn(move || -> Result<_> {
                    let mut hash = Sha256::new();
                    std::io::copy(&mut &**reader, &mut hash)?;
                    Ok(hash.finalize())
                })
            })
            .collect();
        for (writer, reader) in writing.into_iter().zip(reading) {
            let received = reader.join().expect("the reader does not panic")?;
            let sent = writer.join().expect("the writer does not panic")?;
            ensure!(sent == received, "the hashes differ");
        }
        ensure!(early == 0, "{early} writers got rid of everything before anybody had read");
        Ok(())
    })
}

/// More than all buffers on the way together hold.
fn send_blocks(mut stream: &TcpStream) -> Result<sha2::digest::Output<Sha256>> {
    const BLOCK: usize = 1 << 16;
    const BLOCKS: u64 = 1024;
    let mut block = rand::random::<[u8; 64]>().repeat(BLOCK / 64);
    let mut hash = Sha256::new();
    for number in 0..BLOCKS {
        block[..8].copy_from_slice(&number.to_be_bytes());
        stream.write_all(&block)?;
        hash.update(&block);
    }
    stream.shutdown(Shutdown::Write)?;
    Ok(hash.finalize())
}
