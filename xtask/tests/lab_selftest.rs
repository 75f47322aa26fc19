//! The laboratory itself, without any mesh: what it claims to see it must see.

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use xtask::lab::traffic::{accept, exchange, reset_on_close};
use xtask::lab::{Canary, Lab, Node, Pod, until};

struct Topology {
    lab: Lab,
    client: Pod,
    server: Pod,
    neighbour: Pod,
    node: Node,
}

fn topology(title: &str) -> Result<Topology> {
    let mut lab = Lab::new(title)?;
    let (a, b) = (lab.node("a")?, lab.node("b")?);
    let client = lab.pod(&a, "client")?;
    let neighbour = lab.pod(&a, "neighbour")?;
    let server = lab.pod(&b, "server")?;
    Ok(Topology { lab, client, server, neighbour, node: a })
}

#[test]
fn plaintext_between_nodes_is_seen() -> Result<()> {
    let Topology { lab, client, server, .. } = topology("plaintext_between_nodes_is_seen")?;
    let _echo = server.echo(8080)?;
    for address in server.sockets(8080) {
        let (wire, pod) = (lab.capture()?, lab.capture_pod(&client)?);
        let (canary, other) = (Canary::random(), Canary::random());
        exchange(client.connect(address)?, canary.bytes())?;
        for recording in [wire.stop()?, pod.stop()?] {
            recording.expect_present(&canary)?;
            recording.expect_absent(&other)?;
            ensure!(recording.expect_tls13(|_| true).is_err(), "an echo is no TLS");
            ensure!(recording.streams().len() == 2, "one connection has two streams");
        }
    }
    Ok(())
}

#[test]
fn a_canary_across_segments_is_found() -> Result<()> {
    let Topology { lab, client, server, .. } = topology("a_canary_across_segments_is_found")?;
    let _echo = server.echo(8080)?;
    let wire = lab.capture()?;
    let canary = Canary::random();
    let mut stream = client.connect(server.sockets(8080)[0])?;
    stream.set_nodelay(true)?;
    // The answer to each half makes sure that it went alone.
    for half in canary.bytes().chunks(16) {
        stream.write_all(half)?;
        stream.read_exact(&mut [0; 16])?;
    }
    wire.stop()?.expect_present(&canary)
}

#[test]
fn a_capture_ends_although_the_traffic_goes_on() -> Result<()> {
    let Topology { lab, client, server, .. } =
        topology("a_capture_ends_although_the_traffic_goes_on")?;
    let _echo = server.echo(8080)?;
    let wire = lab.capture()?;
    let mut stream = client.connect(server.sockets(8080)[0])?;
    stream.set_nodelay(true)?;
    let (ended, end) = mpsc::channel();
    let stopping = thread::spawn(move || ended.send(wire.stop()));
    let begun = Instant::now();
    let recording = loop {
        // The client waits for each answer: a steady stream, no flood.
        stream.write_all(b"x")?;
        stream.read_exact(&mut [0; 1])?;
        match end.try_recv() {
            Ok(recording) => break recording?,
            Err(_) => ensure!(begun.elapsed() < Duration::from_secs(60), "it goes on and on"),
        }
    };
    ensure!(!recording.is_empty(), "there was traffic");
    stopping.join().expect("no panic")?;
    Ok(())
}

#[test]
fn pods_of_one_node_do_not_use_the_wire() -> Result<()> {
    let Topology { lab, client, neighbour, .. } = topology("pods_of_one_node_do_not_use_the_wire")?;
    let _echo = neighbour.echo(8080)?;
    let (wire, pod) = (lab.capture()?, lab.capture_pod(&neighbour)?);
    let canary = Canary::random();
    for address in neighbour.sockets(8080) {
        exchange(client.connect(address)?, canary.text().as_bytes())?;
    }
    wire.stop()?.expect_absent(&canary)?;
    pod.stop()?.expect_present(&canary)
}

#[test]
fn half_close_and_reset_arrive() -> Result<()> {
    let Topology { client, server, .. } = &topology("half_close_and_reset_arrive")?;
    let listener = server.listen(8080)?;
    for (address, client_address) in server.sockets(8080).into_iter().zip(client.addresses()) {
        let mut outgoing = client.connect(address)?;
        let (mut incoming, peer) = accept(&listener)?;
        ensure!(peer.ip() == client_address, "the server sees {peer}");

        outgoing.shutdown(Shutdown::Write)?;
        ensure!(incoming.read(&mut [0])? == 0, "half-close is the end of input");
        incoming.write_all(b"still")?;
        outgoing.read_exact(&mut [0; 5])?;

        reset_on_close(&incoming)?;
        drop(incoming);
        let error = outgoing.read(&mut [0]).expect_err("a reset is an error");
        ensure!(error.kind() == std::io::ErrorKind::ConnectionReset, "{error}");
    }
    Ok(())
}

#[test]
fn a_laboratory_leaves_nothing_behind() -> Result<()> {
    let Topology { mut lab, client, server, node, .. } =
        topology("a_laboratory_leaves_nothing_behind")?;
    let replacement = {
        lab.delete_pod(&client)?;
        ensure!(!client.path().exists(), "the deleted pod is still there");
        lab.pod_in_place_of(&node, &client, "heir")?
    };
    ensure!(replacement.addresses() == client.addresses(), "the heir has other addresses");
    let _echo = server.echo(8080)?;
    exchange(replacement.connect(server.sockets(8080)[1])?, b"hello")?;

    let runtime = lab.directory("a")?;
    let paths = [node.path(), server.path(), replacement.path(), lab.wire().path(), runtime];
    let mut sleeper = server.run(|| Command::new("sleep").arg("1000").spawn())?;
    drop(lab);
    ensure!(!sleeper.wait()?.success(), "the inhabitant was killed");
    for path in &paths {
        ensure!(!Path::new(path).exists(), "{} is still there", path.display());
    }
    Ok(())
}

#[test]
fn what_a_killed_run_left_is_swept() -> Result<()> {
    let mut dead = Command::new("true").spawn()?;
    dead.wait()?;
    let name = format!("nm-{}-0-left", dead.id());
    let netns = Path::new("/run/netns").join(&name);
    ensure!(Command::new("ip").args(["netns", "add", &name]).status()?.success(), "ip netns add");
    let mut orphan = Command::new("ip").args(["netns", "exec", &name, "sleep", "1000"]).spawn()?;
    let entered = std::fs::read_link("/proc/self/ns/net")?;
    until("the orphan to be inside", || {
        let namespace = std::fs::read_link(format!("/proc/{}/ns/net", orphan.id())).ok()?;
        (namespace != entered).then_some(())
    })?;
    xtask::lab::sweep();
    ensure!(!orphan.wait()?.success(), "the orphan was killed");
    ensure!(!netns.exists(), "{} is still there", netns.display());
    Ok(())
}
