//! What happens to traffic when the agent, the control plane or the pod's own configuration goes
//! wrong: it stops, it never becomes plaintext, and it comes back by itself.

use std::fs;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use aya::maps::{HashMap, Map, MapData, MapError, PerCpuHashMap};
use mesh_common::abi::{Layer, PodConfig, PodCounters, Reason};
use xtask::lab::mesh::pods;
use xtask::lab::raw::{PacketSocket, frame, gateway_address, tcp_packet};
use xtask::lab::traffic::{accept, exchange, reset_on_close};
use xtask::lab::{Canary, Capture, Load, Mesh, Netns, Pod, socket_guard, span, until};

const PORT: u16 = 8080;
const FAMILIES: [usize; 2] = [0, 1];

/// For what the kernel answers without the agent: nobody waits for a timeout.
const AT_ONCE: u64 = 1;

/// For what shall take a second or two: with some slack, because other tests run on the machine.
const SOON: u64 = 5;

struct Pair {
    mesh: Mesh,
    client: Pod,
    server: Pod,
}

fn pair(title: &str) -> Result<Pair> {
    let mut mesh = Mesh::new(title)?;
    let (client, server) = (mesh.pod(0, "client")?, mesh.pod(1, "server")?);
    Ok(Pair { mesh, client, server })
}

impl Pair {
    /// Captures of what the client says: at its own loopback, and between the nodes.
    fn captures(&self) -> Result<[Capture; 2]> {
        Ok([self.mesh.lab.capture_loopback(&self.client)?, self.mesh.lab.capture()?])
    }

    /// What pods outside of this mesh say is on its wire for everybody to see.
    fn expect_plain_load_on_the_wire(&mut self) -> Result<()> {
        let plain = self.plain()?;
        let load = Load::new(&plain[0], &plain[1], PORT)?;
        let wire = self.mesh.lab.capture()?;
        load.during(|| load.wait_for_successes(10))?;
        let recording = wire.stop()?;
        load.canaries().iter().try_for_each(|canary| recording.expect_present(canary))
    }

    /// The same of connections that stay open.
    fn expect_plain_streams_on_the_wire(&mut self) -> Result<()> {
        let plain = self.plain()?;
        let wire = self.mesh.lab.capture()?;
        let canaries = canaries();
        for family in FAMILIES {
            let (outgoing, incoming) = connection(&plain[0], &plain[1], family)?;
            say(&outgoing, &incoming, &canaries[family])?;
        }
        let recording = wire.stop()?;
        canaries.iter().try_for_each(|canary| recording.expect_present(canary))
    }

    fn plain(&mut self) -> Result<[Pod; 2]> {
        Ok([self.mesh.plain_pod(0, "plain1")?, self.mesh.plain_pod(1, "plain2")?])
    }
}

/// The client's loopback has every canary, the wire none.
fn expect_inside_only(captures: [Capture; 2], canaries: &[Canary; 2]) -> Result<()> {
    let [inside, wire] = captures.map(Capture::stop);
    let (inside, wire) = (inside?, wire?);
    for canary in canaries {
        inside.expect_present(canary).context("in the pod")?;
        wire.expect_absent(canary).context("on the wire")?;
    }
    Ok(())
}

/// One for each address family.
fn canaries() -> [Canary; 2] {
    [Canary::random(), Canary::random()]
}

fn connection(client: &Netns, server: &Pod, family: usize) -> Result<(TcpStream, TcpStream)> {
    let listener = server.listen(PORT + 1)?;
    let outgoing = client.connect(server.sockets(PORT + 1)[family])?;
    let (incoming, _) = accept(&listener)?;
    Ok((outgoing, incoming))
}

fn say(mut from: &TcpStream, to: &TcpStream, canary: &Canary) -> Result<()> {
    from.write_all(canary.bytes())?;
    hear(to, canary)
}

fn hear(mut stream: &TcpStream, canary: &Canary) -> Result<()> {
    let mut received = [0; 32];
    stream.read_exact(&mut received)?;
    ensure!(received == canary.bytes(), "something else arrived");
    Ok(())
}

fn expect_error(mut stream: &TcpStream, expected: ErrorKind) -> Result<()> {
    match stream.read(&mut [0; 16]) {
        Ok(count) => bail!("read {count} bytes instead of failing with {expected}"),
        Err(error) => {
            ensure!(error.kind() == expected, "{error} instead of {expected}");
            Ok(())
        }
    }
}

#[test]
fn without_its_agent_a_pod_is_refused_at_once() -> Result<()> {
    let mut pair = pair("without_its_agent_a_pod_is_refused_at_once")?;
    let _echo = pair.server.echo(PORT)?;
    let [v4, v6] = pair.server.sockets(PORT);
    let IpAddr::V4(address) = v4.ip() else { bail!("the first address is IPv4") };
    let mapped = SocketAddr::new(address.to_ipv6_mapped().into(), PORT);
    let canary = Canary::random();
    for address in [v4, v6, mapped] {
        exchange(pair.client.connect(address)?, canary.bytes())?;
    }
    pair.mesh.agents[0].kill9()?;
    let wire = pair.mesh.lab.capture()?;
    for address in [v4, v6, mapped] {
        let begun = Instant::now();
        match pair.client.connect(address) {
            Ok(stream) => {
                exchange(stream, canary.bytes()).ok();
                bail!("connected to {address}");
            }
            Err(error) => {
                ensure!(error.kind() == ErrorKind::ConnectionRefused, "{address}: {error}");
            }
        }
        ensure!(
            begun.elapsed().as_secs() < span(AT_ONCE),
            "{address}: refused after {:?}",
            begun.elapsed()
        );
    }
    // What does not ask the agent, with nobody there to repair or to count for it.
    send_frame(&pair.mesh, &pair.client, &pair.server, &canary)?;
    wire.stop()?.expect_absent(&canary)?;

    pair.mesh.agents[0].start()?;
    for (layer, reason, count) in [("connect", "agent-gone", 3), ("device", "plaintext", 1)] {
        let dropped = pair.mesh.dropped(&pair.client, layer, reason)?;
        ensure!(dropped == count, "{layer}, {reason}: {dropped} instead of {count}");
    }

    // The same outside of the mesh.
    let plain = pair.plain()?;
    let wire = pair.mesh.lab.capture()?;
    send_frame(&pair.mesh, &plain[0], &plain[1], &canary)?;
    wire.stop()?.expect_present(&canary)
}

/// Sends plaintext past every socket that the agent could capture.
fn send_frame(mesh: &Mesh, from: &Pod, to: &Pod, canary: &Canary) -> Result<()> {
    const IPV4: u16 = 0x0800;
    let packet = tcp_packet(from.sockets(PORT)[0], to.sockets(PORT)[0], canary.bytes())?;
    let socket = PacketSocket::open(from, "eth0", false)?;
    socket.send(&frame(gateway_address(&mesh.nodes[0])?, &[], IPV4, &packet))
}

#[test]
fn a_stream_cut_by_a_killed_agent_is_reset() -> Result<()> {
    for (victim, title) in [(0, "killed_at_the_client"), (1, "killed_at_the_server")] {
        let mut pair = pair(title)?;
        let canaries = canaries();
        let captures = pair.captures()?;
        let (client, server) = (&pair.client, &pair.server);
        let open = || FAMILIES.map(|family| connection(client, server, family));
        let (idle, up, down) = (open(), open(), open());
        let heard = AtomicU64::new(0);
        thread::scope(|scope| {
            let mut ends = Vec::new();
            for ((up, down), canary) in up.into_iter().zip(down).zip(&canaries) {
                let ((up_from, up_to), (down_to, down_from)) = (up?, down?);
                for (from, to) in [(up_from, up_to), (down_from, down_to)] {
                    let heard = &heard;
                    ends.push((
                        scope.spawn(move || talk_on(from, canary)),
                        scope.spawn(move || listen_on(to, heard)),
                    ));
                }
            }
            let idle = idle.into_iter().collect::<Result<Vec<_>>>()?;
            for ((outgoing, incoming), canary) in idle.iter().zip(&canaries) {
                say(outgoing, incoming, canary)?;
            }
            until("the streams to flow", || {
                (heard.load(Ordering::Relaxed) > 100_000).then_some(())
            })?;
            pair.mesh.agents[victim].kill9()?;
            for (outgoing, incoming) in &idle {
                expect_error(outgoing, ErrorKind::ConnectionReset)
                    .with_context(|| format!("{title}: client"))?;
                expect_error(incoming, ErrorKind::ConnectionReset)
                    .with_context(|| format!("{title}: server"))?;
            }
            for (from, to) in ends {
                let [from, to] = [from, to].map(|end| end.join().expect("no end panics"));
                ensure!(from == Some(ErrorKind::ConnectionReset), "{title}: sender: {from:?}");
                ensure!(to == Some(ErrorKind::ConnectionReset), "{title}: receiver: {to:?}");
            }
            Ok(())
        })?;
        expect_inside_only(captures, &canaries)?;
        pair.expect_plain_streams_on_the_wire()?;
    }
    Ok(())
}

/// Sends without end; why it ended.
fn talk_on(mut stream: TcpStream, canary: &Canary) -> Option<ErrorKind> {
    loop {
        if let Err(error) = stream.write_all(canary.bytes()) {
            return Some(error.kind());
        }
    }
}

/// Receives for as long as something comes; why it ended, nothing being a clean end.
fn listen_on(mut stream: TcpStream, heard: &AtomicU64) -> Option<ErrorKind> {
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return None,
            Ok(count) => heard.fetch_add(count as u64, Ordering::Relaxed),
            Err(error) => return Some(error.kind()),
        };
    }
}

#[test]
fn killed_under_load_nothing_is_in_the_clear() -> Result<()> {
    let mut pair = pair("killed_under_load_nothing_is_in_the_clear")?;
    let load = Load::new(&pair.client, &pair.server, PORT)?;
    let captures = pair.captures()?;
    load.during(|| {
        load.wait_for_successes(50)?;
        for victim in [0, 1] {
            pair.mesh.agents[victim].kill9()?;
            load.wait_for_failures(50)?;
            pair.mesh.agents[victim].start()?;
            load.wait_for_successes(50)?;
        }
        Ok(())
    })?;
    expect_inside_only(captures, load.canaries())?;
    pair.expect_plain_load_on_the_wire()
}

#[test]
fn restarted_under_load_without_the_control_plane() -> Result<()> {
    let mut pair = pair("restarted_under_load_without_the_control_plane")?;
    let load = Load::new(&pair.client, &pair.server, PORT)?;
    pair.mesh.control.process().kill9()?;
    let captures = pair.captures()?;
    load.during(|| {
        load.wait_for_successes(50)?;
        for victim in [0, 1] {
            pair.mesh.agents[victim].kill9()?;
            let begun = Instant::now();
            pair.mesh.agents[victim].start()?;
            load.wait_for_successes(2)?;
            ensure!(begun.elapsed().as_secs() < span(SOON), "back after {:?}", begun.elapsed());
            load.wait_for_successes(50)?;
        }
        Ok(())
    })?;
    expect_inside_only(captures, load.canaries())?;
    pair.expect_plain_load_on_the_wire()
}

#[test]
fn a_stopped_agent_makes_wait_and_goes_on() -> Result<()> {
    for (victim, title) in [(0, "stopped_at_the_client"), (1, "stopped_at_the_server")] {
        let mut pair = pair(title)?;
        let _echo = pair.server.echo(PORT)?;
        let canaries = canaries();
        let streams = FAMILIES.map(|family| connection(&pair.client, &pair.server, family));
        let streams = streams.into_iter().collect::<Result<Vec<_>>>()?;
        let captures = pair.captures()?;
        pair.mesh.agents[victim].stop()?;
        let waiting = FAMILIES.map(|family| {
            let (client, canary) = (pair.client.clone(), canaries[family].clone());
            let address = pair.server.sockets(PORT)[family];
            thread::spawn(move || exchange(client.connect(address)?, canary.bytes()))
        });
        for ((outgoing, incoming), canary) in streams.iter().zip(&canaries) {
            let mut outgoing = outgoing;
            outgoing.write_all(canary.bytes())?;
            incoming.set_read_timeout(Some(Duration::from_millis(200)))?;
            expect_error(incoming, ErrorKind::WouldBlock).context(title)?;
            incoming.set_read_timeout(Some(xtask::lab::patience()))?;
        }
        for thread in &waiting {
            ensure!(!thread.is_finished(), "{title}: answered without an agent");
        }
        pair.mesh.agents[victim].cont()?;
        for thread in waiting {
            thread.join().expect("the client does not panic").context(title)?;
        }
        for ((_, incoming), canary) in streams.iter().zip(&canaries) {
            hear(incoming, canary).context("what was sent meanwhile arrives")?;
        }
        expect_inside_only(captures, &canaries)?;
        pair.expect_plain_streams_on_the_wire()?;
    }
    Ok(())
}

#[test]
fn connections_from_before_the_enrolment_are_aborted() -> Result<()> {
    let mut mesh = Mesh::new("connections_from_before_the_enrolment_are_aborted")?;
    let outside = mesh.lab.outside()?;
    for family in FAMILIES {
        let client = mesh.plain_pod(0, &format!("client{family}"))?;
        let server = mesh.plain_pod(1, &format!("server{family}"))?;
        // The pod that is enrolled opened the first, and was dialled for the second.
        for (client, pod) in [(&*client, &client), (&outside, &server)] {
            let (outgoing, incoming) = connection(client, &server, family)?;
            let ends = [&outgoing, &incoming];
            let canary = Canary::random();
            let wire = mesh.lab.capture()?;
            say(&outgoing, &incoming, &canary)?;
            say(&incoming, &outgoing, &canary)?;
            wire.stop()?.expect_present(&canary)?;

            mesh.enroll(pod)?;
            let canary = Canary::random();
            let wire = mesh.lab.capture()?;
            let (own, other) = if pod.pod_name() == server.pod_name() {
                (&incoming, &outgoing)
            } else {
                (&outgoing, &incoming)
            };
            expect_error(own, ErrorKind::ConnectionAborted).context("at the enrolled pod")?;
            expect_error(other, ErrorKind::ConnectionReset).context("at the other end")?;
            for mut end in ends {
                ensure!(end.write_all(canary.bytes()).is_err(), "the connection is still there");
            }
            wire.stop()?.expect_absent(&canary)?;
            let entry = mesh.status_of(pod)?;
            ensure!(entry["aborted"].as_u64() == Some(1), "not counted: {entry:#}");
        }
    }
    Ok(())
}

/// Something done to what the capture rests on in a pod.
struct Damage {
    /// For a shell in the pod.
    script: String,
    /// Whether it leads captured packets past the agent.
    diverts: bool,
}

/// What a pod can do to its own capture; `peer` is whom it talks to.
fn damages(pod: &Pod, peer: &Pod) -> Result<Vec<Damage>> {
    let (preference, table) = capture_rule(pod)?;
    let mut damages: Vec<Damage> =
        ["ipv4/tcp_fwmark_accept", "ipv4/fwmark_reflect", "ipv6/fwmark_reflect"]
            .map(|name| Damage { script: format!("echo 0 > /proc/sys/net/{name}"), diverts: false })
            .into();
    for (family, ip) in FAMILIES.into_iter().zip(["ip -4", "ip -6"]) {
        let (to, gateway) = (peer.addresses()[family], pod.gateways()[family]);
        damages.extend(
            [
                format!("{ip} rule del pref {preference}"),
                format!("{ip} rule add pref 0 lookup main"),
                format!("{ip} route flush table {table}"),
                format!("{ip} route add {to} via {gateway} dev eth0 table {table}"),
            ]
            .map(|script| Damage { script, diverts: true }),
        );
    }
    Ok(damages)
}

impl Damage {
    fn inflict(&self, pod: &Pod) -> Result<()> {
        pod.output("sh", &["-c", &self.script])?;
        Ok(())
    }
}

/// Waits until a pod looks as it did before it was damaged.
fn wait_repaired(pod: &Pod, intact: &str) -> Result<()> {
    let begun = Instant::now();
    until("the damage to be repaired", || (routing(pod).ok()? == intact).then_some(()))?;
    ensure!(begun.elapsed().as_secs() < span(SOON), "repaired after {:?}", begun.elapsed());
    Ok(())
}

#[test]
fn tampering_inside_the_pod_is_repaired() -> Result<()> {
    let mut pair = pair("tampering_inside_the_pod_is_repaired")?;
    let load = Load::new(&pair.client, &pair.server, PORT)?;
    let captures = pair.captures()?;
    load.during(|| {
        for (pod, peer) in [(&pair.client, &pair.server), (&pair.server, &pair.client)] {
            let intact = routing(pod)?;
            let damages = damages(pod, peer)?;
            for damage in &damages {
                damage.inflict(pod)?;
                wait_repaired(pod, &intact)
                    .and_then(|()| load.wait_for_successes(2))
                    .with_context(|| format!("{}: {}", pod.pod_name(), damage.script))?;
            }
            let entry = pair.mesh.status_of(pod)?;
            let repairs = entry["repairs"].as_u64();
            ensure!(repairs >= Some(damages.len() as u64), "not counted: {entry:#}");
        }
        Ok(())
    })?;
    expect_inside_only(captures, load.canaries())?;
    pair.expect_plain_load_on_the_wire()
}

/// Talks over connections that were open before a pod is damaged, one of each address family, while
/// its agent is stopped, so that the damage lasts; then has it repaired. `check` gets to know how
/// often the guard stepped in meanwhile.
fn talk_over_damage(
    title: &str,
    check: impl Fn(&Damage, u64, &[Stream; 2]) -> Result<()>,
) -> Result<()> {
    let mut pair = pair(title)?;
    let canaries = canaries();
    let captures = pair.captures()?;
    for (victim, (pod, peer)) in
        [(&pair.client, &pair.server), (&pair.server, &pair.client)].into_iter().enumerate()
    {
        let intact = routing(pod)?;
        let agent = &pair.mesh.agents[victim];
        let mut damages = damages(pod, peer)?;
        let (preference, _) = capture_rule(pod)?;
        damages.extend(["ip -4", "ip -6"].map(|ip| {
            let rule = format!("{ip} rule del pref {preference}");
            let script = format!("{rule}; {ip} rule add pref {preference} lookup main");
            Damage { script, diverts: true }
        }));
        for damage in damages {
            let talk = || {
                let [v4, v6] = FAMILIES.map(|family| {
                    let (outgoing, incoming) = connection(&pair.client, &pair.server, family)?;
                    say(&outgoing, &incoming, &canaries[family])?;
                    // Nothing of it is sent again during the next damage.
                    reset_on_close(&outgoing)?;
                    reset_on_close(&incoming)?;
                    let [from, to] =
                        if victim == 0 { [outgoing, incoming] } else { [incoming, outgoing] };
                    anyhow::Ok(Stream { from, to, canary: canaries[family].clone() })
                });
                let streams = [v4?, v6?];
                let before = pair.mesh.dropped(pod, socket_guard(), "plaintext")?;
                agent.stop()?;
                damage.inflict(pod)?;
                for Stream { from, canary, .. } in &streams {
                    let mut from = from;
                    from.write_all(canary.bytes())?;
                }
                agent.cont()?;
                wait_repaired(pod, &intact)?;
                let dropped = pair.mesh.dropped(pod, socket_guard(), "plaintext")? - before;
                check(&damage, dropped, &streams)
            };
            talk().with_context(|| format!("{}: {}", pod.pod_name(), damage.script))?;
        }
    }
    expect_inside_only(captures, &canaries)?;
    pair.expect_plain_streams_on_the_wire()
}

/// An open connection, from the end at a damaged pod.
struct Stream {
    from: TcpStream,
    to: TcpStream,
    canary: Canary,
}

/// The guard is what is left.
#[test]
fn tampering_that_nobody_repairs_leads_nowhere() -> Result<()> {
    talk_over_damage("tampering_that_nobody_repairs_leads_nowhere", |damage, dropped, _| {
        ensure!((dropped > 0) == damage.diverts, "the guard dropped {dropped} packets");
        Ok(())
    })
}

#[test]
fn open_connections_go_on_after_the_repair() -> Result<()> {
    talk_over_damage("open_connections_go_on_after_the_repair", |_, _, streams| {
        for (Stream { to, canary, .. }, family) in streams.iter().zip(["IPv4", "IPv6"]) {
            hear(to, canary).with_context(|| format!("over {family}"))?;
        }
        Ok(())
    })
}

/// The kernel looks there before it looks where the capture leads: it holds what is local.
#[test]
fn a_route_among_the_local_ones_is_removed() -> Result<()> {
    let pair = pair("a_route_among_the_local_ones_is_removed")?;
    let _echo = pair.server.echo(PORT)?;
    let intact = routing(&pair.client)?;
    let canary = Canary::random();
    for (family, ip) in FAMILIES.into_iter().zip(["ip -4", "ip -6"]) {
        let (to, gateway) = (pair.server.sockets(PORT)[family], pair.client.gateways()[family]);
        let script = format!("{ip} route add {} via {gateway} dev eth0 table local", to.ip());
        let wire = pair.mesh.lab.capture()?;
        pair.client.output("sh", &["-c", &script])?;
        let repaired = wait_repaired(&pair.client, &intact);
        let talked = pair.client.connect(to).map(|stream| exchange(stream, canary.bytes()));
        wire.stop()?.expect_absent(&canary)?;
        repaired.and(talked?).context(script)?;
    }
    Ok(())
}

/// Everything that the agent configures in a pod.
fn routing(pod: &Pod) -> Result<String> {
    let mut listing = String::new();
    for name in ["ipv4/tcp_fwmark_accept", "ipv4/fwmark_reflect", "ipv6/fwmark_reflect"] {
        listing += &pod.sysctl_value(&format!("net/{name}"))?;
    }
    for family in ["-4", "-6"] {
        listing += &pod.output("ip", &[family, "rule"])?;
        listing += &pod.output("ip", &[family, "route", "show", "table", "all"])?;
    }
    Ok(listing)
}

/// The preference of the rule for marked packets, and the routing table it selects.
fn capture_rule(pod: &Pod) -> Result<(String, String)> {
    let rules = pod.output("ip", &["rule"])?;
    let rule = rules.lines().find(|rule| rule.contains("fwmark")).context("there is no rule")?;
    let (preference, _) = rule.split_once(':').context("a rule begins with its preference")?;
    let table = rule.split_whitespace().skip_while(|word| *word != "lookup").nth(1);
    Ok((preference.to_owned(), table.context("the rule selects no table")?.to_owned()))
}

/// What the programs of pods hand over to is gone when its pin is, and no agent holds it.
#[test]
fn without_the_node_s_guards_a_pod_sends_nothing() -> Result<()> {
    let mut pair = pair("without_the_node_s_guards_a_pod_sends_nothing")?;
    let to = pair.server.sockets(PORT)[0];
    let client = pair.client.clone();
    // Nothing but the guards stands between UDP and the wire.
    let say = |words: &[u8]| client.run(|| UdpSocket::bind("0.0.0.0:0")?.send_to(words, to));
    let maps = pair.mesh.agents[0].bpffs().join("nodemesh/v1/maps");
    let counters = Map::PerCpuHashMap(MapData::from_pin(maps.join("COUNTERS"))?);
    let counters: PerCpuHashMap<_, u64, PodCounters> = counters.try_into()?;
    let cookie = counters.keys().next().context("a pod is enrolled")??;
    let dropped = || -> Result<u64> {
        let counters = counters.get(&cookie, 0)?;
        let of = |c: &PodCounters| c.drops[Layer::Device as usize][Reason::Unconfigured as usize];
        Ok(counters.iter().map(of).sum())
    };

    pair.mesh.agents[0].kill9()?;
    let canary = Canary::random();
    let wire = pair.mesh.lab.capture()?;
    say(canary.bytes())?;
    wire.stop()?.expect_present(&canary).context("while the guards are pinned")?;

    fs::remove_file(maps.join("GUARDS"))?;
    // The kernel takes its time.
    until("the guards to be gone", || {
        let said = say(b"anything").map_err(anyhow::Error::from);
        said.and_then(|_| dropped()).map(|dropped| (dropped > 0).then_some(())).transpose()
    })??;
    let canary = Canary::random();
    let wire = pair.mesh.lab.capture()?;
    say(canary.bytes())?;
    send_frame(&pair.mesh, &pair.client, &pair.server, &canary)?;
    wire.stop()?.expect_absent(&canary)?;

    pair.mesh.agents[0].start()?;
    let canary = Canary::random();
    let wire = pair.mesh.lab.capture()?;
    say(canary.bytes())?;
    wire.stop()?.expect_present(&canary).context("after an agent has come")
}

/// Entries of namespaces that do not exist are as good as pods.
#[test]
fn with_a_full_map_no_pod_is_half_enrolled() -> Result<()> {
    let mut mesh = Mesh::new("with_a_full_map_no_pod_is_half_enrolled")?;
    let (client, late) = (mesh.pod(0, "client")?, mesh.plain_pod(0, "late")?);
    let (server, target) = (mesh.pod(1, "server")?, mesh.plain_pod(1, "target")?);
    let _echoes = (server.echo(PORT)?, target.echo(PORT)?);
    let untouched = routing(&late)?;

    let pin = mesh.agents[0].bpffs().join("nodemesh/v1/maps/PODS");
    let map = Map::HashMap(MapData::from_pin(pin)?);
    let mut entries: HashMap<_, u64, PodConfig> = map.try_into()?;
    let cookie = entries.keys().next().context("a pod is enrolled")??;
    let config = entries.get(&cookie, 0)?;
    let mut strangers = (0..u64::MAX).map(|number| u64::MAX - number);
    let full = strangers.find_map(|cookie| entries.insert(cookie, config, 0).err());
    ensure!(matches!(full, Some(MapError::SyscallError(_))), "the map takes no more: {full:?}");

    let Err(error) = mesh.enroll(&late) else { bail!("enrolled into a full map") };
    ensure!(format!("{error:#}").contains("4096"), "does not name the limit: {error:#}");
    ensure!(routing(&late)? == untouched, "the pod was changed: {}", routing(&late)?);
    ensure!(pods(&mesh.agents[0].status()?).count() == 1, "the pod counts as enrolled");

    // Who is enrolled is as well off as before, and the other one as badly.
    let canaries = canaries();
    for (pod, peer, canary, escapes) in
        [(&client, &server, &canaries[0], false), (&late, &target, &canaries[1], true)]
    {
        let wire = mesh.lab.capture()?;
        for address in peer.sockets(PORT) {
            exchange(pod.connect(address)?, canary.bytes())?;
        }
        send_frame(&mesh, pod, &target, canary)?;
        let recording = wire.stop()?;
        if escapes {
            recording.expect_present(canary)?;
        } else {
            recording.expect_absent(canary)?;
        }
    }
    ensure!(mesh.dropped(&client, "device", "plaintext")? == 1, "not counted");

    // It was the map and nothing else.
    entries.remove(&u64::MAX)?;
    mesh.agents[0].enroll(&late)?;
    mesh.wait_certified(&late)?;
    let canary = Canary::random();
    let wire = mesh.lab.capture()?;
    send_frame(&mesh, &late, &target, &canary)?;
    exchange(late.connect(server.sockets(PORT)[0])?, canary.bytes())?;
    wire.stop()?.expect_absent(&canary)
}

#[test]
fn an_uninstalled_agent_leaves_nothing() -> Result<()> {
    let mut mesh = Mesh::new("an_uninstalled_agent_leaves_nothing")?;
    let (client, server) = (mesh.plain_pod(0, "client")?, mesh.plain_pod(1, "server")?);
    let _echo = server.echo(PORT)?;
    let untouched = [routing(&client)?, routing(&server)?];
    for round in ["un-enrolled", "uninstalled"] {
        for pod in [&client, &server] {
            mesh.enroll(pod)?;
        }
        ensure!(routing(&client)? != untouched[0], "an enrolled pod looks like any other");
        exchange(client.connect(server.sockets(PORT)[0])?, b"meshed")?;
        if round == "un-enrolled" {
            for pod in [&client, &server] {
                mesh.agent_of(pod)?.unenroll(pod)?;
            }
        } else {
            for agent in &mut mesh.agents {
                ensure!(fs::read_dir(agent.bpffs())?.count() > 0, "nothing was pinned");
                agent.terminate()?;
                agent.uninstall()?;
                let pins = fs::read_dir(agent.bpffs())?.count();
                ensure!(pins == 0, "{pins} pins are left");
                ensure!(!agent.runtime_dir().exists(), "keys are left");
            }
        }
        for (pod, untouched) in [&client, &server].into_iter().zip(&untouched) {
            let now = routing(pod)?;
            ensure!(now == *untouched, "{round}, and still there: {now}");
        }
        let canary = Canary::random();
        let wire = mesh.lab.capture()?;
        exchange(client.connect(server.sockets(PORT)[1])?, canary.bytes())?;
        wire.stop()?.expect_present(&canary).context(round)?;
    }
    Ok(())
}
