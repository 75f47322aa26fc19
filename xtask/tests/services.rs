//! Connections to the address of a service: each goes to an endpoint, as to that pod itself.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};

use anyhow::{Context as _, Result, ensure};
use xtask::lab::mesh::{Settings, counted};
use xtask::lab::packet::Segment;
use xtask::lab::topology::OUTSIDE_ADDRESSES;
use xtask::lab::traffic::{canonical, exchange, expect_refusal};
use xtask::lab::{Canary, Mesh, Pod, Server, until};

/// Inside the laboratory's cluster ranges, and nobody's own.
const SERVICE: [&str; 2] = ["10.77.200.1", "fd77:200::1"];
const PORT: u16 = 80;
const TARGET: u16 = 8080;

/// Enough for two endpoints to be chosen both, whatever the dice say.
const MANY: usize = 40;

/// The file of a service, with more YAML and endpoints as lines of YAML.
fn service(more: &str, endpoints: &str) -> String {
    let [v4, v6] = SERVICE;
    format!(
        "namespace: default\nname: web\naddresses: [{v4}, '{v6}']\nports: [{{port: {PORT}}}]\n\
         {more}\nendpoints: [{endpoints}]\n"
    )
}

fn endpoints(pods: &[&Pod], ready: bool) -> String {
    pods.iter().fold(String::new(), |mut text, pod| {
        for address in pod.addresses() {
            let node = pod.node_name();
            let fields = format!("ports: {TARGET}, ready: {ready}, node: {node}");
            write!(text, "{{address: '{address}', {fields}}}, ").expect("memory is there");
        }
        text
    })
}

fn addresses() -> Result<[SocketAddr; 2]> {
    let [v4, v6] = SERVICE;
    Ok([SocketAddr::new(v4.parse()?, PORT), SocketAddr::new(v6.parse()?, PORT)])
}

/// Answers with its name, whom it sees, and what it has heard.
fn introduce(pod: &Pod) -> Result<Server> {
    let name = pod.pod_name().to_owned();
    pod.serve(TARGET, move |stream| {
        // A connection that breaks is the client's business to notice.
        answer(stream, &name).ok();
    })
}

fn answer(mut stream: TcpStream, name: &str) -> io::Result<()> {
    let mut heard = String::new();
    stream.read_to_string(&mut heard)?;
    let seen = canonical(stream.peer_addr()?).ip();
    write!(stream, "{name} {seen} {heard}")
}

/// Talks to the service as one connection: who answered.
fn ask(client: &Pod, to: SocketAddr, what: &str) -> Result<String> {
    let mut stream = client.connect(to)?;
    let own = stream.local_addr()?;
    ensure!(client.addresses().contains(&own.ip()), "connected from {own}");
    ensure!(stream.peer_addr()? == to, "getpeername: {}", stream.peer_addr()?);
    stream.write_all(what.as_bytes())?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).context("reading the answer")?;
    let (name, rest) = answer.split_once(' ').context("the answer has no name")?;
    ensure!(rest == format!("{} {what}", own.ip()), "{own} said {what:?}; answer: {answer:?}");
    Ok(name.to_owned())
}

/// Who answers many connections over both families.
fn answering(client: &Pod) -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for number in 0..MANY {
        for address in addresses()? {
            let name = ask(client, address, "who is there?")
                .with_context(|| format!("connection {number} to {address}"))?;
            names.insert(name);
        }
    }
    Ok(names)
}

fn denied(mesh: &Mesh, reason: &str) -> Result<u64> {
    Ok(counted(&mesh.agents[0].status()?, "denied", "reason", reason))
}

/// Also to an endpoint that is new, and before anybody asked for either.
#[test]
fn tunnels_to_endpoints_are_made_in_advance() -> Result<()> {
    let title = "tunnels_to_endpoints_are_made_in_advance";
    let mut mesh = Mesh::with(title, 2, Settings::default())?;
    let client = mesh.pod(0, "client")?;
    let [one, two, three] = ["one", "two", "three"].map(|name| mesh.pod(1, name));
    let servers = [one?, two?, three?];
    let _servers = [introduce(&servers[0])?, introduce(&servers[1])?, introduce(&servers[2])?];
    let handshakes = |mesh: &Mesh, node: usize| -> Result<u64> {
        Ok(counted(&mesh.agents[node].status()?, "handshakes", "result", "ok"))
    };
    let has_tunnel = |mesh: &Mesh, server: &Pod| -> Option<bool> {
        let status = mesh.status_of(server).ok()?;
        let mut counts = status["handshakes"].as_array()?.iter();
        Some(counts.any(|entry| entry["result"] == "ok" && entry["count"].as_u64() > Some(0)))
    };
    // And no handshake is under way: where the first connection takes long, its endpoint is given
    // another tunnel meanwhile.
    let wait_for = |mesh: &Mesh, servers: &[Pod]| {
        until(&format!("tunnels to {} endpoints", servers.len()), || {
            let idle = mesh.status_of(&client).ok()?["idle_tunnels"].as_u64()?;
            let [made, accepted] = [handshakes(mesh, 0).ok()?, handshakes(mesh, 1).ok()?];
            let all = servers.iter().all(|server| has_tunnel(mesh, server) == Some(true));
            (all && idle == made && made == accepted).then_some(())
        })
    };

    mesh.serve("web", &service("", &endpoints(&[&servers[0], &servers[1]], true)))?;
    ensure!(handshakes(&mesh, 0)? == 0, "tunnels that nobody has a habit for");
    let to = addresses()?[0];
    ask(&client, to, "the first")?;
    wait_for(&mesh, &servers[..2])?;
    mesh.serve("web", &service("", &endpoints(&servers.each_ref(), true)))?;
    wait_for(&mesh, &servers)?;
    let before = handshakes(&mesh, 0)?;
    let mut names = BTreeSet::new();
    while names.len() < 3 {
        names.insert(ask(&client, to, "hello")?);
        ensure!(handshakes(&mesh, 0)? == before, "a connection had to wait for a handshake");
        wait_for(&mesh, &servers)?;
    }
    Ok(())
}

#[test]
fn both_endpoints_are_reached_in_tls_and_see_the_client() -> Result<()> {
    let title = "both_endpoints_are_reached_in_tls_and_see_the_client";
    let mut mesh = Mesh::with(title, 3, Settings::default())?;
    let client = mesh.pod(0, "client")?;
    let servers = [mesh.pod(1, "one")?, mesh.pod(2, "two")?];
    let _servers = [introduce(&servers[0])?, introduce(&servers[1])?];
    mesh.serve("web", &service("", &endpoints(&servers.each_ref(), true)))?;

    let wire = mesh.lab.capture()?;
    let canary = Canary::random();
    for address in addresses()? {
        let mut names = BTreeSet::new();
        for _ in 0..MANY {
            names.insert(ask(&client, address, canary.text())?);
        }
        ensure!(names.len() == 2, "{address}: only {names:?} answered");
    }
    let recording = wire.stop()?;
    recording.expect_absent(&canary)?;
    recording.expect_tls13(|stream| stream.from_start)?;
    let opened = mesh.opened(0, "mtls")?;
    ensure!(opened == 2 * MANY as u64, "{opened} connections were opened");

    // The same matcher, where it must fire: the endpoints are outside of the mesh, which the
    // default policy allows.
    let outside = mesh.lab.outside()?;
    let _echo = outside.echo(TARGET)?;
    let [v4, v6] = OUTSIDE_ADDRESSES;
    let endpoints =
        format!("{{address: {v4}, ports: {TARGET}}}, {{address: '{v6}', ports: {TARGET}}}");
    mesh.serve("web", &service("", &endpoints))?;
    let wire = mesh.lab.capture()?;
    for address in addresses()? {
        exchange(client.connect(address)?, canary.bytes())?;
        exchange(client.connect(address)?, canary.text().as_bytes())?;
    }
    wire.stop()?.expect_present(&canary)
}

#[test]
fn a_dead_endpoint_costs_no_connection() -> Result<()> {
    let mut mesh = Mesh::with("a_dead_endpoint_costs_no_connection", 3, Settings::default())?;
    let client = mesh.pod(0, "client")?;
    let (alive, dead) = (mesh.pod(1, "alive")?, mesh.pod(2, "dead")?);
    // Registered, and no agent is in it.
    let bare = mesh.plain_pod(2, "bare")?;
    mesh.control.register(&bare)?;
    let _server = introduce(&alive)?;
    mesh.serve("web", &service("", &endpoints(&[&alive, &dead, &bare], true)))?;
    let names = answering(&client)?;
    ensure!(names == BTreeSet::from(["alive".to_owned()]), "{names:?} answered");
    let opened = mesh.opened(0, "mtls")?;
    ensure!(opened == 2 * MANY as u64, "{opened} connections, though each is one");
    // Nobody was just lucky.
    ensure!(mesh.opened(2, "mtls")? > 0, "the dead endpoint was never asked");
    let unreachable = counted(&mesh.agents[0].status()?, "handshakes", "result", "unreachable");
    ensure!(unreachable > 0, "the bare endpoint was never asked");

    // With nobody left to ask, the application is told.
    mesh.serve("web", &service("", &endpoints(&[&dead, &bare], true)))?;
    for address in addresses()? {
        expect_refusal(&client, address, b"hello")?;
    }
    Ok(())
}

#[test]
fn what_no_endpoint_serves_is_refused() -> Result<()> {
    let mut mesh = Mesh::new("what_no_endpoint_serves_is_refused")?;
    let (client, server) = (mesh.pod(0, "client")?, mesh.pod(1, "server")?);
    let _server = introduce(&server)?;
    mesh.serve("web", &service("", &endpoints(&[&server], false)))?;
    for address in addresses()? {
        expect_refusal(&client, address, b"hello")?;
    }
    ensure!(denied(&mesh, "no-endpoints")? == 2, "{:#}", mesh.status_of(&client)?);
    for address in addresses()? {
        expect_refusal(&client, SocketAddr::new(address.ip(), PORT + 1), b"hello")?;
    }
    ensure!(denied(&mesh, "no-service-port")? == 2, "{:#}", mesh.status_of(&client)?);
    // What the same endpoint serves once it is ready.
    mesh.serve("web", &service("", &endpoints(&[&server], true)))?;
    answering(&client)?;
    Ok(())
}

#[test]
fn new_connections_go_where_the_service_is_now() -> Result<()> {
    let mut mesh =
        Mesh::with("new_connections_go_where_the_service_is_now", 3, Settings::default())?;
    let client = mesh.pod(0, "client")?;
    let servers = [mesh.pod(1, "one")?, mesh.pod(2, "two")?];
    let _servers = [introduce(&servers[0])?, introduce(&servers[1])?];
    mesh.serve("web", &service("", &endpoints(&[&servers[0]], true)))?;
    ensure!(answering(&client)? == BTreeSet::from(["one".to_owned()]));
    let mut open = client.connect(addresses()?[0])?;
    open.write_all(b"still ")?;
    mesh.serve("web", &service("", &endpoints(&[&servers[1]], true)))?;
    ensure!(answering(&client)? == BTreeSet::from(["two".to_owned()]));
    open.write_all(b"here")?;
    open.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    open.read_to_string(&mut answer)?;
    ensure!(answer.starts_with("one ") && answer.ends_with(" still here"), "{answer:?}");

    // A client keeps its endpoint where the service says so.
    let both = endpoints(&servers.each_ref(), true);
    mesh.serve("web", &service("client_ip_affinity: 1h", &both))?;
    for address in addresses()? {
        let first = ask(&client, address, "who is there?")?;
        for _ in 0..MANY {
            let name = ask(&client, address, "and now?")?;
            ensure!(name == first, "{name} answered after {first}");
        }
    }
    // And the nearest one.
    let near = mesh.pod(0, "near")?;
    let _near = introduce(&near)?;
    let all = both + &endpoints(&[&near], true);
    mesh.serve("web", &service("locality: same-node-first", &all))?;
    ensure!(answering(&client)? == BTreeSet::from(["near".to_owned()]));
    Ok(())
}

#[test]
fn an_endpoint_that_is_not_registered_is_not_spoken_to() -> Result<()> {
    let mut mesh = Mesh::new("an_endpoint_that_is_not_registered_is_not_spoken_to")?;
    let client = mesh.pod(0, "client")?;
    let stranger = mesh.plain_pod(1, "stranger")?;
    let _server = introduce(&stranger)?;
    mesh.serve("web", &service("", &endpoints(&[&stranger], true)))?;
    let wire = mesh.lab.capture()?;
    let canary = Canary::random();
    for address in addresses()? {
        expect_refusal(&client, address, canary.bytes())?;
    }
    let recording = wire.stop()?;
    recording.expect_absent(&canary)?;
    let spoken = |segment: Segment<'_>| segment.destination.port() == TARGET;
    ensure!(!recording.segments().any(spoken), "the stranger was dialled");
    ensure!(denied(&mesh, "unknown-in-cluster")? == 2, "{:#}", mesh.status_of(&client)?);

    mesh.enroll(&stranger)?;
    let wire = mesh.lab.capture()?;
    answering(&client)?;
    ensure!(wire.stop()?.segments().any(spoken), "who has answered?");
    Ok(())
}

#[test]
fn a_pod_that_is_its_own_endpoint_goes_elsewhere() -> Result<()> {
    let mut mesh = Mesh::new("a_pod_that_is_its_own_endpoint_goes_elsewhere")?;
    let (client, other) = (mesh.pod(0, "client")?, mesh.pod(1, "other")?);
    let _servers = [introduce(&client)?, introduce(&other)?];
    mesh.serve("web", &service("", &endpoints(&[&client, &other], true)))?;
    ensure!(answering(&client)? == BTreeSet::from(["other".to_owned()]));
    mesh.serve("web", &service("", &endpoints(&[&client], true)))?;
    for address in addresses()? {
        expect_refusal(&client, address, b"hello")?;
    }
    ensure!(denied(&mesh, "no-remote-address")? == 2, "{:#}", mesh.status_of(&client)?);
    Ok(())
}
