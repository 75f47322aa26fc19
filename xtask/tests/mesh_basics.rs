//! Ordinary traffic through the mesh: it must arrive as it would without, and must not be
//! readable on the way.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::thread;

use anyhow::{Context as _, Result, ensure};
use nix::sched::{CloneFlags, unshare};
use sha2::{Digest as _, Sha256};
use xtask::lab::compare::{PORT, as_without_mesh, expect_end, expect_reset, pair};
use xtask::lab::mesh::Settings;
use xtask::lab::topology::OUTSIDE_ADDRESSES;
use xtask::lab::traffic::{accept, canonical, exchange, expect_refusal, reset_on_close};
use xtask::lab::{Canary, Mesh, Pod, Recording, volume};

#[test]
fn both_sides_see_the_real_addresses() -> Result<()> {
    as_without_mesh("both_sides_see_the_real_addresses", |client, server, family| {
        let (outgoing, incoming) = pair(client, server, family)?;
        let dialled = server.sockets(PORT)[family];
        ensure!(outgoing.peer_addr()? == dialled, "getpeername: {}", outgoing.peer_addr()?);
        let own = client.addresses()[family];
        ensure!(outgoing.local_addr()?.ip() == own, "getsockname: {}", outgoing.local_addr()?);
        let seen = canonical(incoming.peer_addr()?).ip();
        ensure!(seen == own, "the server's getpeername: {seen}");
        let at = canonical(incoming.local_addr()?);
        ensure!(at == dialled, "the server's getsockname: {at}");
        Ok(())
    })
}

#[test]
fn each_direction_ends_by_itself() -> Result<()> {
    as_without_mesh("each_direction_ends_by_itself", |client, server, family| {
        let (outgoing, incoming) = pair(client, server, family)?;
        let (back, forth) = (pair(client, server, family)?, (outgoing, incoming));
        for (mut first, mut second) in [forth, (back.1, back.0)] {
            first.shutdown(Shutdown::Write)?;
            expect_end(&mut second)?;
            second.write_all(b"still open")?;
            second.shutdown(Shutdown::Write)?;
            let mut answer = String::new();
            first.read_to_string(&mut answer)?;
            ensure!(answer == "still open", "{answer:?}");
        }
        Ok(())
    })
}

#[test]
fn resets_arrive_as_resets() -> Result<()> {
    as_without_mesh("resets_arrive_as_resets", |client, server, family| {
        let (outgoing, mut incoming) = pair(client, server, family)?;
        reset_on_close(&outgoing)?;
        drop(outgoing);
        expect_reset(&mut incoming).context("at the server")?;
        let (mut outgoing, incoming) = pair(client, server, family)?;
        reset_on_close(&incoming)?;
        drop(incoming);
        expect_reset(&mut outgoing).context("at the client")
    })
}

#[test]
fn connections_without_a_byte_end_cleanly() -> Result<()> {
    as_without_mesh("connections_without_a_byte_end_cleanly", |client, server, family| {
        let (outgoing, mut incoming) = pair(client, server, family)?;
        drop(outgoing);
        expect_end(&mut incoming)?;
        let (mut outgoing, incoming) = pair(client, server, family)?;
        drop(incoming);
        expect_end(&mut outgoing)
    })
}

#[test]
fn the_server_may_speak_first() -> Result<()> {
    as_without_mesh("the_server_may_speak_first", |client, server, family| {
        let (mut outgoing, mut incoming) = pair(client, server, family)?;
        incoming.write_all(b"220 ready")?;
        let mut greeting = [0; 9];
        outgoing.read_exact(&mut greeting)?;
        ensure!(&greeting == b"220 ready", "{greeting:?}");
        Ok(())
    })
}

#[test]
fn single_bytes_pass_one_by_one() -> Result<()> {
    as_without_mesh("single_bytes_pass_one_by_one", |client, server, family| {
        let _echo = server.echo(PORT)?;
        let mut stream = client.connect(server.sockets(PORT)[family])?;
        stream.set_nodelay(true)?;
        for byte in 0..=u8::MAX {
            stream.write_all(&[byte])?;
            let mut back = [0];
            stream.read_exact(&mut back)?;
            ensure!(back == [byte], "sent {byte}, got {back:?}");
        }
        Ok(())
    })
}

#[test]
fn a_gibibyte_each_way_arrives_whole() -> Result<()> {
    let mut mesh = Mesh::new("a_gibibyte_each_way_arrives_whole")?;
    let (client, server) = (mesh.pod(0, "client")?, mesh.pod(1, "server")?);
    for family in [0, 1] {
        let ends = pair(&client, &server, family)?;
        thread::scope(|scope| {
            let jobs = [&ends.0, &ends.1].map(|end| {
                (scope.spawn(move || send_bulk(end)), scope.spawn(move || hash_all(end)))
            });
            let [(sent_up, received_down), (sent_down, received_up)] = jobs;
            for (sent, received) in [(sent_up, received_up), (sent_down, received_down)] {
                let sent = sent.join().expect("the sender does not panic")?;
                let received = received.join().expect("the receiver does not panic")?;
                ensure!(sent == received, "the hashes differ");
            }
            Ok(())
        })?;
    }
    Ok(())
}

fn send_bulk(mut stream: &TcpStream) -> Result<Vec<u8>> {
    const MEBIBYTE: usize = 1 << 20;
    let seed: [u8; 64] = rand::random();
    let mut block = seed.repeat(MEBIBYTE / seed.len());
    let mut hash = Sha256::new();
    for number in 0..u64::from(volume(1024)) {
        block[..8].copy_from_slice(&number.to_be_bytes());
        stream.write_all(&block)?;
        hash.update(&block);
    }
    stream.shutdown(Shutdown::Write)?;
    Ok(hash.finalize().to_vec())
}

fn hash_all(mut stream: &TcpStream) -> Result<Vec<u8>> {
    let mut hash = Sha256::new();
    std::io::copy(&mut stream, &mut hash)?;
    Ok(hash.finalize().to_vec())
}

/// With so few ports, those of the tunnels and those by which the agent dials the application would
/// meet, did it not keep them apart.
#[test]
fn a_tunnel_never_has_the_port_of_an_application_s_connection() -> Result<()> {
    let title = "a_tunnel_never_has_the_port_of_an_application_s_connection";
    let mut mesh = Mesh::new(title)?;
    let (client, server) = (mesh.pod(0, "client")?, mesh.pod(1, "server")?);
    for pod in [&client, &server] {
        pod.sysctl("net/ipv4/ip_local_port_range", "46834 46933")?;
    }
    let listener = server.listen(PORT)?;
    let mut open = Vec::new();
    for number in 0..25_u8 {
        let mut outgoing = client.connect(server.sockets(PORT)[0])?;
        outgoing.write_all(&[number])?;
        let (incoming, _) = accept(&listener).with_context(|| format!("connection {number}"))?;
        open.push((outgoing, incoming));
    }
    for (number, (outgoing, incoming)) in open.iter_mut().enumerate() {
        incoming.write_all(b"and back")?;
        let (mut there, mut back) = ([0], [0; 8]);
        incoming.read_exact(&mut there)?;
        outgoing.read_exact(&mut back).with_context(|| format!("connection {number}"))?;
        ensure!(usize::from(there[0]) == number && &back == b"and back", "{there:?}, {back:?}");
    }
    Ok(())
}

#[test]
fn what_nobody_serves_is_refused() -> Result<()> {
    as_without_mesh("what_nobody_serves_is_refused", |client, server, family| {
        expect_refusal(client, server.sockets(PORT)[family], b"")
    })
}

#[test]
fn loopback_and_own_address_are_left_alone() -> Result<()> {
    let mut mesh = Mesh::new("loopback_and_own_address_are_left_alone")?;
    let pod = mesh.pod(0, "alone")?;
    let _echo = pod.echo(PORT)?;
    let own = pod.addresses();
    let loopback: [IpAddr; 2] = ["127.0.0.1".parse()?, "::1".parse()?];
    for address in own.into_iter().chain(loopback) {
        let canary = Canary::random();
        let capture = mesh.lab.capture_loopback(&pod)?;
        let stream = pod.connect(SocketAddr::new(address, PORT))?;
        ensure!(stream.local_addr()?.ip() == address, "from {}", stream.local_addr()?);
        exchange(stream, canary.bytes())?;
        let recording = capture.stop()?;
        recording.expect_present(&canary)?;
        // Had the agent been between, there would be a second connection.
        ensure!(recording.streams().len() == 2, "{address}: {:?}", recording.streams());
    }
    Ok(())
}

#[test]
fn the_wire_carries_tls_1_3_only() -> Result<()> {
    let mut mesh = Mesh::new("the_wire_carries_tls_1_3_only")?;
    let pods = [mesh.plain_pod(0, "client")?, mesh.plain_pod(1, "server")?];
    let _echo = pods[1].echo(PORT)?;
    let trial = |mesh: &Mesh| -> Result<_> {
        let canary = Canary::random();
        let wire = mesh.lab.capture()?;
        let inside = mesh.lab.capture_loopback(&pods[0])?;
        for address in pods[1].sockets(PORT) {
            exchange(pods[0].connect(address)?, canary.bytes())?;
            exchange(pods[0].connect(address)?, canary.text().as_bytes())?;
        }
        Ok((wire.stop()?, inside.stop()?, canary))
    };

    // The same matchers, where they must fire.
    let (wire, _, canary) = trial(&mesh)?;
    wire.expect_present(&canary)?;
    ensure!(wire.expect_tls13(|_| true).is_err(), "plaintext passes for TLS");

    for pod in &pods {
        mesh.enroll(pod)?;
    }
    let (wire, inside, canary) = trial(&mesh)?;
    inside.expect_present(&canary)?;
    wire.expect_absent(&canary)?;
    wire.expect_tls13(|stream| stream.from_start)?;
    for segment in wire.segments() {
        let meshed = [segment.source.ip(), segment.destination.ip()]
            .iter()
            .all(|address| pods.iter().any(|pod| pod.addresses().contains(address)));
        let control = segment.source.port() == 8443 || segment.destination.port() == 8443;
        ensure!(meshed || control, "between {} and {}", segment.source, segment.destination);
    }

    for pod in &pods {
        mesh.agent_of(pod)?.unenroll(pod)?;
        mesh.control.deregister(pod)?;
    }
    let (wire, _, canary) = trial(&mesh)?;
    wire.expect_present(&canary)
}

/// What two pods of one node say to each other, as the second one's device sees it.
fn between(mesh: &Mesh, pods: &[Pod; 2]) -> Result<(Recording, Canary)> {
    let _echo = pods[1].echo(PORT)?;
    let canary = Canary::random();
    let capture = mesh.lab.capture_pod(&pods[1])?;
    for address in pods[1].sockets(PORT) {
        exchange(pods[0].connect(address)?, canary.bytes())?;
    }
    Ok((capture.stop()?, canary))
}

#[test]
fn pods_of_one_node_share_no_wire() -> Result<()> {
    let mut mesh = Mesh::with("pods_of_one_node_share_no_wire", 1, Settings::default())?;
    let plain = [mesh.plain_pod(0, "plain1")?, mesh.plain_pod(0, "plain2")?];
    let meshed = [mesh.pod(0, "meshed1")?, mesh.pod(0, "meshed2")?];
    let (recording, canary) = between(&mesh, &plain)?;
    recording.expect_present(&canary)?;
    let (recording, canary) = between(&mesh, &meshed)?;
    recording.expect_absent(&canary)?;
    ensure!(recording.segments().next().is_none(), "TCP passed the device of a pod");
    // Each is counted by both pods, once for each family.
    let [local, mtls] = ["local", "mtls"].map(|kind| mesh.opened(0, kind));
    ensure!((local?, mtls?) == (4, 0), "the connections were carried in another way");

    mesh.control.deregister(&meshed[0])?;
    mesh.wait_synced()?;
    expect_refusal(&meshed[0], meshed[1].sockets(PORT)[0], canary.bytes())
}

#[test]
fn pods_of_one_node_may_be_encrypted_too() -> Result<()> {
    let settings = Settings { agent: "encrypt_same_node: true", ..Settings::default() };
    let mut mesh = Mesh::with("pods_of_one_node_may_be_encrypted_too", 1, settings)?;
    let meshed = [mesh.pod(0, "meshed1")?, mesh.pod(0, "meshed2")?];
    let (recording, canary) = between(&mesh, &meshed)?;
    recording.expect_absent(&canary)?;
    recording.expect_tls13(|_| true)
}

#[test]
fn plaintext_leaves_only_where_it_may() -> Result<()> {
    for (policy, allowed) in [("allow", true), ("deny", false)] {
        let agent = format!("egress: {policy}");
        let title = format!("plaintext_leaves_only_where_it_may-{policy}");
        let mut mesh = Mesh::with(&title, 1, Settings { agent: &agent, ..Settings::default() })?;
        let client = mesh.pod(0, "client")?;
        let unknown = mesh.plain_pod(0, "unknown")?;
        let outside = mesh.lab.outside()?;
        let _echoes = (outside.echo(PORT)?, unknown.echo(PORT)?);

        let canary = Canary::random();
        let wire = mesh.lab.capture()?;
        for address in OUTSIDE_ADDRESSES {
            let address = SocketAddr::new(address.parse()?, PORT);
            if allowed {
                exchange(client.connect(address)?, canary.bytes())?;
            } else {
                expect_refusal(&client, address, b"")?;
            }
        }
        let recording = wire.stop()?;
        if allowed {
            recording.expect_present(&canary)?;
        } else {
            recording.expect_absent(&canary)?;
        }
        // Inside the cluster's ranges nobody unknown is ever spoken to.
        for address in unknown.sockets(PORT) {
            expect_refusal(&client, address, b"")?;
        }
        let counted = (mesh.opened(0, "plaintext")?, mesh.denied(0)?);
        let expected = if allowed { (2, 2) } else { (0, 4) };
        ensure!(counted == expected, "plaintext and denied: {counted:?}, not {expected:?}");
    }
    Ok(())
}

#[test]
fn plaintext_enters_only_where_it_may() -> Result<()> {
    let agent = "ingress: {plaintext: [{ranges: [172.30.0.0/24, 'fd78::/64'], ports: [9000]}]}";
    let title = "plaintext_enters_only_where_it_may";
    let mut mesh = Mesh::with(title, 1, Settings { agent, ..Settings::default() })?;
    let server = mesh.pod(0, "server")?;
    let stranger = mesh.plain_pod(0, "stranger")?;
    let outside = mesh.lab.outside()?;
    let _echoes = (server.echo(PORT)?, server.echo(9000)?);
    for family in [0, 1] {
        for (from, port) in [(&*stranger, PORT), (&*stranger, 9000), (&outside, PORT)] {
            let address = server.sockets(port)[family];
            let canary = Canary::random();
            let inside = mesh.lab.capture_loopback(&server)?;
            // The agent hears it out before it can tell that this is no tunnel.
            let answer = from.connect(address).and_then(|mut stream| {
                stream.write_all(canary.bytes())?;
                stream.read(&mut [0; 64])
            });
            ensure!(!matches!(answer, Ok(1..)), "{address} answered");
            inside.stop()?.expect_absent(&canary)?;
        }
        exchange(outside.connect(server.sockets(9000)[family])?, b"healthy?")?;
    }
    Ok(())
}

/// Spread over three nodes, and the clients over a thread with descriptors of its own: each agent
/// has two sockets for every connection at each of its ends, and the limit of open files may be
/// hardly more than that.
#[test]
fn ten_thousand_connections_at_once() -> Result<()> {
    let count = u64::from(volume(10_000));
    let mut mesh = Mesh::with("ten_thousand_connections_at_once", 3, Settings::default())?;
    let pods =
        (0..3).map(|node| mesh.pod(node, &format!("pod{node}"))).collect::<Result<Vec<_>>>()?;
    let listeners = pods.iter().map(|pod| pod.listen(PORT)).collect::<Result<Vec<_>>>()?;
    let ring = || (0..count).zip((0..pods.len()).cycle());
    let clients = || -> Result<()> {
        unshare(CloneFlags::CLONE_FILES)?;
        let mut streams = Vec::new();
        for (number, index) in ring() {
            let server = &pods[(index + 1) % pods.len()];
            let mut stream = pods[index]
                .connect(server.sockets(PORT)[0])
                .with_context(|| format!("connection {number}"))?;
            stream.write_all(&number.to_be_bytes())?;
            streams.push(stream);
        }
        for (number, stream) in (0..count).zip(&mut streams) {
            let mut answer = [0; 8];
            stream.read_exact(&mut answer)?;
            ensure!(answer == number.to_be_bytes(), "connection {number} has another's answer");
        }
        Ok(())
    };
    let servers = || -> Result<()> {
        let mut streams = Vec::new();
        for (number, index) in ring() {
            let (stream, _) = accept(&listeners[(index + 1) % pods.len()])
                .with_context(|| format!("connection {number}"))?;
            streams.push(stream);
        }
        // Now all of them are open, and every one still works.
        for stream in &mut streams {
            let mut number = [0; 8];
            stream.read_exact(&mut number)?;
            stream.write_all(&number)?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let clients = scope.spawn(clients);
        let served = servers();
        // A client's failure is the cause of the servers', if both have one.
        clients.join().expect("the clients do not panic").context("the clients")?;
        served
    })
}
