//! What the node itself connects to, kubelet's health checks above all: with `ingress.host_probes`
//! it reaches the applications of enrolled pods as it is. Only the node does, and whatever else
//! bears its address is refused like any plaintext.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use nix::libc::IPPROTO_RAW;
use socket2::{Domain, Socket, Type};
use xtask::lab::mesh::Settings;
use xtask::lab::raw::{self, PacketSocket, frame, gateway_address, tcp_packet};
use xtask::lab::traffic::{accept, canonical, exchange, expect_refusal};
use xtask::lab::{Canary, Mesh, Netns, Pod, Server, patience, socket_guard, until};

const PORT: u16 = 8080;
const FAMILIES: [usize; 2] = [0, 1];
const ETHERTYPES: [u16; 2] = [0x0800, 0x86dd];
const PROBES: Settings<'_> = Settings { agent: "ingress: {host_probes: true}", control: "" };

/// An application that echoes, and knows how often somebody reached it.
struct Application {
    address: [SocketAddr; 2],
    reached: Arc<AtomicU64>,
    _server: Server,
}

impl Application {
    fn start(pod: &Pod) -> Result<Self> {
        let reached = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&reached);
        let server = pod.serve(PORT, move |stream| {
            count.fetch_add(1, Ordering::SeqCst);
            // A connection that breaks is the client's business to notice.
            io::copy(&mut &stream, &mut &stream).ok();
            stream.shutdown(Shutdown::Write).ok();
        })?;
        Ok(Self { address: pod.sockets(PORT), reached, _server: server })
    }

    /// Answers the node over both families.
    fn expect_answers(&self, node: &Netns) -> Result<()> {
        self.address.into_iter().try_for_each(|to| exchange(node.connect(to)?, b"healthy?"))
    }

    /// Whoever this is may connect, and be heard out by the agent, but gets no answer, and the
    /// application does not know of it.
    fn expect_unreached(&self, connect: impl FnOnce() -> io::Result<TcpStream>) -> Result<()> {
        let before = self.reached.load(Ordering::SeqCst);
        let ask = |mut stream: TcpStream| {
            stream.write_all(Canary::random().bytes())?;
            stream.read(&mut [0; 64])
        };
        let answer = connect().and_then(ask);
        ensure!(!matches!(answer, Ok(1..)), "there was an answer");
        let reached = self.reached.load(Ordering::SeqCst) - before;
        ensure!(reached == 0, "the application was reached, and {answer:?}");
        Ok(())
    }
}

/// A connection of the node to the pod, both ends.
fn probe(node: &Netns, pod: &Pod, port: u16, family: usize) -> Result<(TcpStream, TcpStream)> {
    let listener = pod.listen(port)?;
    let outgoing = node.connect(pod.sockets(port)[family])?;
    let (incoming, peer) = accept(&listener)?;
    ensure!(peer == outgoing.local_addr()?, "the application sees {peer}");
    Ok((outgoing, incoming))
}

#[test]
fn the_node_reaches_the_application_and_nobody_else_does() -> Result<()> {
    let title = "the_node_reaches_the_application_and_nobody_else_does";
    let mut mesh = Mesh::with(title, 2, PROBES)?;
    let server = mesh.pod(0, "server")?;
    let application = Application::start(&server)?;
    let strangers = [mesh.plain_pod(0, "near")?, mesh.plain_pod(1, "far")?];
    let [node, other_node] = [&mesh.nodes[0], &mesh.nodes[1]];
    let others = [&**other_node, &*strangers[0], &*strangers[1]];
    for to in application.address {
        for _ in 0..3 {
            exchange(node.connect(to)?, b"healthy?").context("from the node")?;
        }
        for from in others {
            let unreached = application.expect_unreached(|| from.connect(to));
            unreached.with_context(|| format!("{} to {to}", from.name()))?;
        }
        // What nobody serves is refused by the pod's own kernel.
        expect_refusal(node, SocketAddr::new(to.ip(), PORT + 1), b"")?;
    }
    let IpAddr::V4(v4) = server.v4() else { bail!("the first address is IPv4") };
    let mapped = SocketAddr::new(v4.to_ipv6_mapped().into(), PORT);
    exchange(node.connect(mapped)?, b"healthy?").context("IPv4 by an IPv6 socket")?;
    let drops = mesh.drops(&server)?;
    ensure!(drops.is_empty(), "dropped {drops:?}");
    let opened = (mesh.opened(0, "plaintext")?, mesh.opened(0, "mtls")?);
    ensure!(opened == (0, 0), "the agent saw connections of the node: {opened:?}");
    Ok(())
}

#[test]
fn an_application_sees_an_ordinary_connection() -> Result<()> {
    let mut mesh = Mesh::with("an_application_sees_an_ordinary_connection", 1, PROBES)?;
    let server = mesh.pod(0, "server")?;
    let node = &mesh.nodes[0];
    for family in FAMILIES {
        // The application speaks first, and at length; the node ends first.
        let (mut outgoing, mut incoming) = probe(node, &server, PORT, family)?;
        let bulk = vec![7; 1 << 20];
        thread::scope(|scope| -> Result<()> {
            let sent = scope.spawn(|| incoming.write_all(&bulk));
            outgoing.read_exact(&mut vec![0; bulk.len()])?;
            Ok(sent.join().expect("the sender does not panic")?)
        })?;
        drop(outgoing);
        ensure!(incoming.read(&mut [0])? == 0, "no orderly end");
        // Were its last words dropped instead of reset, it would hang, and say them for long.
        until("what comes after the end to be reset", || {
            let error = incoming.write_all(b"220 ready").err()?;
            matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset).then_some(())
        })?;
        // The application ends first.
        let (mut outgoing, incoming) = probe(node, &server, PORT, family)?;
        drop(incoming);
        ensure!(outgoing.read(&mut [0])? == 0, "no orderly end");
    }
    let drops = mesh.drops(&server)?;
    ensure!(drops.is_empty(), "dropped {drops:?}");
    Ok(())
}

#[test]
fn off_by_default_and_switched_off_again() -> Result<()> {
    let mut mesh = Mesh::with("off_by_default_and_switched_off_again", 1, Settings::default())?;
    let server = mesh.pod(0, "server")?;
    let application = Application::start(&server)?;
    let node = mesh.nodes[0].clone();
    let version = format!("v{}", mesh_common::abi::ABI_VERSION);
    let pin = mesh.agents[0].bpffs().join("nodemesh").join(version).join("links/host_flows");
    let expect_refused = || {
        let each = |to| application.expect_unreached(|| node.connect(to));
        application.address.into_iter().try_for_each(each)
    };
    expect_refused().context("by default")?;
    ensure!(!pin.exists(), "the program is attached by default");

    restart_with(&mut mesh, "ingress: {host_probes: true}")?;
    application.expect_answers(&node).context("switched on")?;
    let (mut open, mut incoming) = probe(&node, &server, PORT + 1, 0)?;
    ensure!(pin.exists(), "the program is not pinned");

    restart_with(&mut mesh, "ingress: {host_probes: false}")?;
    expect_refused().context("switched off")?;
    ensure!(!pin.exists(), "the program is still attached");
    // What was open is not answered any more.
    incoming.write_all(b"too late")?;
    until("the guard to drop it", || {
        let dropped = mesh.dropped(&server, socket_guard(), "plaintext").ok()?;
        (dropped > 0).then_some(())
    })?;
    open.set_read_timeout(Some(Duration::from_millis(100)))?;
    ensure!(open.read(&mut [0; 8]).is_err(), "an answer after the switch");
    // Nor is it when the switch is on again.
    restart_with(&mut mesh, "ingress: {host_probes: true}")?;
    application.expect_answers(&node).context("switched on again")?;
    ensure!(open.read(&mut [0; 8]).is_err(), "an answer to what was forgotten");
    Ok(())
}

/// Restarts the first agent with this line about `ingress` in its configuration.
fn restart_with(mesh: &mut Mesh, ingress: &str) -> Result<()> {
    let config = mesh.agents[0].pods_dir().with_file_name("config.yaml");
    let text = std::fs::read_to_string(&config)?;
    let others = text.lines().filter(|line| !line.starts_with("ingress:"));
    let text: Vec<_> = others.chain([ingress]).collect();
    std::fs::write(&config, text.join("\n"))?;
    mesh.agents[0].restart()
}

#[test]
fn probes_go_on_without_the_agent() -> Result<()> {
    let mut mesh = Mesh::with("probes_go_on_without_the_agent", 1, PROBES)?;
    let server = mesh.pod(0, "server")?;
    let application = Application::start(&server)?;
    let stranger = mesh.plain_pod(0, "stranger")?;
    let node = mesh.nodes[0].clone();
    let (open, incoming) = probe(&node, &server, PORT + 1, 0)?;
    mesh.agents[0].kill9()?;
    application.expect_answers(&node).context("the agent is dead")?;
    for to in application.address {
        application.expect_unreached(|| stranger.connect(to))?;
    }
    mesh.agents[0].start()?;
    application.expect_answers(&node).context("the agent is back")?;
    for (mut from, mut to) in [(&open, &incoming), (&incoming, &open)] {
        from.write_all(b"still here")?;
        to.read_exact(&mut [0; 10]).context("what was open the whole time")?;
    }
    Ok(())
}

/// Somebody else on the node's bridge has the node's addresses, the pod believes him, and he even
/// uses the port of a connection that the node has had.
#[test]
fn the_node_s_address_is_no_proof() -> Result<()> {
    let mut mesh = Mesh::with("the_node_s_address_is_no_proof", 1, PROBES)?;
    let server = mesh.pod(0, "server")?;
    let plain = mesh.plain_pod(0, "plain")?;
    let impostor = mesh.plain_pod(0, "impostor")?;
    let node = mesh.nodes[0].clone();
    let (meshed, unmeshed) = (Application::start(&server)?, Application::start(&plain)?);
    let mut ports = Vec::new();
    for to in meshed.address {
        let stream = node.connect(to)?;
        ports.push(stream.local_addr()?.port());
        exchange(stream, b"healthy?")?;
    }

    let [v4, v6] = server.gateways();
    impostor
        .ip(&[format!("addr add {v4}/24 dev eth0"), format!("addr add {v6}/64 dev eth0 nodad")])?;
    let link = link_address(&impostor)?;
    for pod in [&server, &plain] {
        believe(pod, &link)?;
    }
    for (family, address) in [v4, v6].into_iter().enumerate() {
        for port in [0, ports[family]] {
            let from = SocketAddr::new(address, port);
            let to = meshed.address[family];
            meshed
                .expect_unreached(|| connect_from(&impostor, from, to))
                .with_context(|| format!("from {from}"))?;
        }
        // A pod outside of the mesh he fools.
        let from = SocketAddr::new(address, ports[family]);
        exchange(connect_from(&impostor, from, unmeshed.address[family])?, b"healthy?")?;
    }
    let [a, b, c, d, e, f] = gateway_address(&node)?;
    believe(&server, &format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}"))?;
    meshed.expect_answers(&node).context("from the node, in the end")
}

/// Tells a pod who the node is, by hardware address.
fn believe(pod: &Pod, link: &str) -> Result<()> {
    pod.ip(&pod.gateways().map(|node| format!("neigh replace {node} lladdr {link} dev eth0")))
}

fn link_address(pod: &Pod) -> Result<String> {
    let listing = pod.output("ip", &["-o", "link", "show", "dev", "eth0"])?;
    let address = listing.split_whitespace().skip_while(|word| *word != "link/ether").nth(1);
    Ok(address.context("eth0 has no hardware address")?.to_owned())
}

fn connect_from(netns: &Netns, from: SocketAddr, to: SocketAddr) -> io::Result<TcpStream> {
    let socket = netns.run(|| Socket::new(Domain::for_address(from), Type::STREAM, None))?;
    socket.set_reuse_address(true)?;
    socket.bind(&from.into())?;
    socket.connect_timeout(&to.into(), patience())?;
    socket.set_read_timeout(Some(patience()))?;
    Ok(socket.into())
}

#[test]
fn a_pod_says_nothing_to_the_node_of_its_own_accord() -> Result<()> {
    let title = "a_pod_says_nothing_to_the_node_of_its_own_accord";
    let mut mesh = Mesh::with(title, 1, PROBES)?;
    let (server, other) = (mesh.pod(0, "server")?, mesh.pod(0, "other")?);
    let plain = mesh.plain_pod(0, "plain")?;
    let node = mesh.nodes[0].clone();
    let _echo = node.echo(PORT)?;
    for family in FAMILIES {
        let to_node = SocketAddr::new(server.gateways()[family], PORT);
        exchange(plain.connect(to_node)?, b"the node does serve")?;
        expect_refusal(&server, to_node, b"")?;

        let (open, incoming) = probe(&node, &server, PORT + 1, family)?;
        let answer =
            Segment { family, from: canonical(incoming.local_addr()?), to: open.local_addr()? };
        let from_elsewhere = SocketAddr::new(answer.from.ip(), PORT + 2);
        for (pod, segment) in [
            (&server, Segment { to: to_node, ..answer }),
            (&server, Segment { from: from_elsewhere, ..answer }),
            // In the name of the pod that was asked.
            (&other, answer),
        ] {
            segment.expect_dropped(&mesh, pod)?;
        }
        // By the same means, from whom and to whom it may.
        let canary = Canary::random();
        let device = mesh.lab.capture_pod(&server)?;
        answer.send(&mesh, &server, &canary)?;
        device.stop()?.expect_present(&canary)?;
    }
    Ok(())
}

/// A segment with a payload that somebody makes by hand.
#[derive(Clone, Copy, Debug)]
struct Segment {
    family: usize,
    from: SocketAddr,
    to: SocketAddr,
}

impl Segment {
    /// Through a raw socket, and through a packet socket.
    fn send(&self, mesh: &Mesh, pod: &Pod, canary: &Canary) -> Result<()> {
        let packet = tcp_packet(self.from, self.to, canary.bytes())?;
        raw::send_packet(pod, IPPROTO_RAW, self.to.ip(), &packet)?;
        let node = gateway_address(&mesh.nodes[0])?;
        let frame = frame(node, &[], ETHERTYPES[self.family], &packet);
        PacketSocket::open(pod, "eth0", false)?.send(&frame)
    }

    fn expect_dropped(&self, mesh: &Mesh, pod: &Pod) -> Result<()> {
        let count = || -> Result<[u64; 2]> {
            let of = |layer| mesh.dropped(pod, layer, "plaintext");
            Ok([of(socket_guard())?, of("device")?])
        };
        let canary = Canary::random();
        let device = mesh.lab.capture_pod(pod)?;
        let before = count()?;
        self.send(mesh, pod, &canary)?;
        let after = count()?;
        device.stop()?.expect_absent(&canary).with_context(|| format!("{self:?}"))?;
        let counted = before.iter().zip(after).all(|(before, after)| after > *before);
        ensure!(counted, "{self:?}: drops of {before:?} became {after:?}");
        Ok(())
    }
}
