//! What a pod can do to get plaintext out past the agent, each tried from a pod outside of the
//! mesh, where it must work, and from an enrolled one, where nothing may leave and the guard must
//! count what it stopped: else something that has nothing to do with the guard passes for it.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::libc::{IPPROTO_RAW, IPPROTO_TCP};
use socket2::{Domain, SockRef, Socket, Type};
use xtask::lab::raw::{self, PacketSocket, frame, tcp_packet};
use xtask::lab::traffic::{exchange, reset_on_close};
use xtask::lab::{Canary, Mesh, Netns, Pod, Server, kernel_before, socket_guard, until};

const PORT: u16 = 8080;
const FAMILIES: [usize; 2] = [0, 1];
const ETHERTYPES: [u16; 2] = [0x0800, 0x86dd];
const BROADCAST: [u8; 6] = [0xff; 6];
const VLAN_7: [u8; 4] = [0x81, 0x00, 0, 7];

/// A layer of the guard, and the reason for which it drops.
type Drop = (&'static str, &'static str);

const BY_SOCKET: Drop = ("cgroup", "plaintext");
const BY_DEVICE: Drop = ("device", "plaintext");
const BY_PEER: Drop = ("peer", "bypass");

/// Where attacks are tried.
struct Range {
    mesh: Mesh,
    /// The attackers: outside of the mesh, and inside.
    pods: [Pod; 2],
    /// Echoes on [`PORT`] on another node; not in the mesh, so that it accepts plaintext.
    target: Pod,
    /// On the attackers' node: it sees what is sent to everybody.
    bystander: Pod,
    _echo: Server,
}

/// What an attack over one address family has to work with.
struct Attack<'a> {
    mesh: &'a mut Mesh,
    pod: &'a Pod,
    enrolled: bool,
    target: &'a Pod,
    family: usize,
    canary: &'a Canary,
}

impl Range {
    fn new(title: &str) -> Result<Self> {
        let mut mesh = Mesh::new(title)?;
        let target = mesh.plain_pod(1, "target")?;
        let bystander = mesh.plain_pod(0, "bystander")?;
        let pods = [mesh.plain_pod(0, "plain")?, mesh.pod(0, "enrolled")?];
        let echo = target.echo(PORT)?;
        // Who has not found his neighbour yet holds packets back, which nobody would see in time.
        for address in target.sockets(PORT) {
            exchange(bystander.connect(address)?, b"hello")?;
        }
        for pod in &pods {
            for gateway in pod.gateways() {
                meet(pod, gateway)?;
            }
        }
        Ok(Self { mesh, pods, target, bystander, _echo: echo })
    }

    /// Tries an attack from both pods. From the enrolled one the guard must stop it by these drops
    /// and no others.
    fn attack(
        &mut self,
        family: usize,
        expected: &[Drop],
        try_it: impl Fn(&mut Attack<'_>) -> Result<()>,
    ) -> Result<()> {
        let here = |&(layer, reason): &Drop| {
            (if layer == BY_SOCKET.0 { socket_guard() } else { layer }, reason)
        };
        let expected: BTreeSet<Drop> = expected.iter().map(here).collect();
        let Self { mesh, pods, target, bystander, .. } = self;
        for (pod, enrolled) in pods.iter().zip([false, true]) {
            let before = if enrolled { mesh.drops(pod)? } else { Default::default() };
            let canary = Canary::random();
            let captures = [mesh.lab.capture()?, mesh.lab.capture_pod(bystander)?];
            let from = || format!("from {}, family {family}", pod.pod_name());
            let mut attack =
                Attack { mesh: &mut *mesh, pod, enrolled, target, family, canary: &canary };
            try_it(&mut attack).with_context(from)?;
            let [wire, node] = captures.map(|capture| capture.stop());
            let recordings = [wire?, node?];
            if enrolled {
                for recording in recordings {
                    recording.expect_absent(&canary).with_context(from)?;
                }
                let mut grown = mesh.drops(pod)?;
                grown.retain(|drop, count| *count > before.get(drop).copied().unwrap_or(0));
                let grown: BTreeSet<_> =
                    grown.keys().map(|(layer, reason)| (layer.as_str(), reason.as_str())).collect();
                ensure!(grown == expected, "{}: dropped {grown:?}, not {expected:?}", from());
            } else {
                let escaped = recordings.iter().any(|recording| recording.contains(&canary));
                ensure!(escaped, "{}: it does not even work without the mesh", from());
            }
        }
        Ok(())
    }
}

impl Attack<'_> {
    fn to(&self) -> SocketAddr {
        self.target.sockets(PORT)[self.family]
    }

    fn tcp_packet(&self) -> Result<Vec<u8>> {
        tcp_packet(self.pod.sockets(PORT)[self.family], self.to(), self.canary.bytes())
    }

    /// Sends a packet to the node through a packet(7) socket.
    fn send_frame(&self, packet: &[u8], bypass: bool) -> Result<()> {
        let gateway = raw::gateway_address(&self.mesh.nodes[0])?;
        let frame = frame(gateway, &[], ETHERTYPES[self.family], packet);
        PacketSocket::open(self.pod, "eth0", bypass)?.send(&frame)
    }
}

/// Waits until a namespace knows the hardware address of a neighbour.
fn meet(netns: &Netns, neighbour: IpAddr) -> Result<()> {
    const DISCARD: u16 = 9;
    until("the neighbour to be known", || {
        let unspecified = if neighbour.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        netns.run(|| UdpSocket::bind(unspecified)?.send_to(b"hello", (neighbour, DISCARD))).ok()?;
        let known = netns.output("ip", &["neigh", "show", "to", &neighbour.to_string()]).ok()?;
        known.contains("lladdr").then_some(())
    })
}

/// Sends the canary over a connection that may be refused, or hang, or be reset: all of that is
/// the guard's right.
fn say_canary(
    from: &Netns,
    socket: &Socket,
    to: SocketAddr,
    canary: &Canary,
) -> std::io::Result<()> {
    let patience = Duration::from_millis(500);
    from.run(|| {
        socket.connect_timeout(&to.into(), patience)?;
        socket.set_read_timeout(Some(patience))?;
        socket.set_write_timeout(Some(patience))?;
        (&*socket).write_all(canary.bytes())?;
        (&*socket).read_exact(&mut [0; 32])
    })
}

fn tcp_socket(netns: &Netns, to: SocketAddr) -> Result<Socket> {
    Ok(netns.run(|| Socket::new(Domain::for_address(to), Type::STREAM, None))?)
}

#[test]
fn a_socket_bound_to_the_device() -> Result<()> {
    // A hang would be as long as the patience of the client.
    const AT_ONCE: Duration = Duration::from_millis(400);
    let mut range = Range::new("a_socket_bound_to_the_device")?;
    for (family, mapped) in [(0, false), (1, false), (0, true)] {
        range.attack(family, &[("connect", "bound-device")], |attack| {
            let mut to = attack.to();
            if mapped && let IpAddr::V4(v4) = to.ip() {
                to.set_ip(v4.to_ipv6_mapped().into());
            }
            let socket = tcp_socket(attack.pod, to)?;
            socket.bind_device(Some(b"eth0"))?;
            let begun = Instant::now();
            let said = say_canary(attack.pod, &socket, to, attack.canary);
            if attack.enrolled {
                let Err(error) = said else { bail!("connected to {to}") };
                let refused = error.kind() == std::io::ErrorKind::ConnectionRefused;
                ensure!(refused && begun.elapsed() < AT_ONCE, "{to}: {error}");
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// The capture's mark takes its place.
#[test]
fn a_mark_before_connecting() -> Result<()> {
    let mut range = Range::new("a_mark_before_connecting")?;
    let meshed = range.mesh.pod(1, "meshed")?;
    let _echo = meshed.echo(PORT)?;
    for family in FAMILIES {
        range.attack(family, &[], |attack| {
            let server = if attack.enrolled { &meshed } else { attack.target };
            let to = server.sockets(PORT)[family];
            let socket = tcp_socket(attack.pod, to)?;
            socket.set_mark(7)?;
            attack.pod.run(|| socket.connect_timeout(&to.into(), xtask::lab::patience()))?;
            exchange(socket.into(), attack.canary.bytes())
        })?;
    }
    Ok(())
}

/// Changes a connection that is certainly open, through the mesh if the client is in it, and goes
/// on to talk.
fn mid_stream(title: &str, change: impl Fn(SockRef<'_>) -> std::io::Result<()>) -> Result<()> {
    let mut range = Range::new(title)?;
    let meshed = range.mesh.pod(1, "meshed")?;
    let _echo = meshed.echo(PORT)?;
    for family in FAMILIES {
        range.attack(family, &[BY_SOCKET], |attack| {
            let server = if attack.enrolled { &meshed } else { attack.target };
            let mut stream: TcpStream = attack.pod.connect(server.sockets(PORT)[family])?;
            stream.write_all(b"x")?;
            stream.read_exact(&mut [0])?;
            // Nothing of it is sent again during the next attack.
            reset_on_close(&stream)?;
            change(SockRef::from(&stream))?;
            stream.write_all(attack.canary.bytes()).context("the kernel takes it in any case")
        })?;
    }
    Ok(())
}

#[test]
fn a_mark_changed_after_connecting() -> Result<()> {
    mid_stream("a_mark_changed_after_connecting", |socket| socket.set_mark(0))
}

#[test]
fn bound_to_the_device_after_connecting() -> Result<()> {
    let title = "bound_to_the_device_after_connecting";
    mid_stream(title, |socket| socket.bind_device(Some(b"eth0")))
}

/// Those of the protocol TCP are what the kernel has for its own replies.
#[test]
fn raw_sockets() -> Result<()> {
    let mut range = Range::new("raw_sockets")?;
    for family in FAMILIES {
        for protocol in [IPPROTO_RAW, IPPROTO_TCP] {
            range.attack(family, &[BY_SOCKET], |attack| {
                let packet = attack.tcp_packet()?;
                raw::send_packet(attack.pod, protocol, attack.to().ip(), &packet)
            })?;
        }
    }
    Ok(())
}

#[test]
fn tcp_behind_extension_headers() -> Result<()> {
    const IPV6: usize = 1;
    const HOP_BY_HOP: u8 = 0;
    const ROUTING: u8 = 43;
    const FRAGMENT: u8 = 44;
    const MOBILITY: u8 = 135;
    const DESTINATION_OPTIONS: u8 = 60;
    let mut range = Range::new("tcp_behind_extension_headers")?;
    for (headers, reason) in [
        (&[HOP_BY_HOP][..], "plaintext"),
        (&[ROUTING], "plaintext"),
        (&[DESTINATION_OPTIONS], "plaintext"),
        (&[FRAGMENT], "plaintext"),
        (&[HOP_BY_HOP, DESTINATION_OPTIONS, ROUTING, FRAGMENT, DESTINATION_OPTIONS], "plaintext"),
        (&[MOBILITY], "protocol"),
        (&[DESTINATION_OPTIONS; 9], "malformed"),
    ] {
        let packet = |attack: &Attack<'_>| {
            let from = attack.pod.sockets(PORT)[IPV6];
            raw::tcp_behind(headers, from, attack.to(), attack.canary.bytes())
        };
        let what = || format!("behind {headers:?}");
        range
            .attack(IPV6, &[("cgroup", reason)], |attack| {
                raw::send_packet(attack.pod, IPPROTO_RAW, attack.to().ip(), &packet(attack)?)
            })
            .with_context(what)?;
        for (bypass, drop) in [(false, ("device", reason)), (true, BY_PEER)] {
            range
                .attack(IPV6, &[drop], |attack| attack.send_frame(&packet(attack)?, bypass))
                .with_context(what)?;
        }
    }
    Ok(())
}

#[test]
fn packet_sockets() -> Result<()> {
    let mut range = Range::new("packet_sockets")?;
    for family in FAMILIES {
        for (bypass, drop) in [(false, BY_DEVICE), (true, BY_PEER)] {
            range.attack(family, &[drop], |attack| {
                attack.send_frame(&attack.tcp_packet()?, bypass)
            })?;
        }
    }
    Ok(())
}

/// A router has no use for such frames, but the other pods on the node's bridge get them.
#[test]
fn vlan_tags_and_unknown_ethertypes() -> Result<()> {
    const EXPERIMENTAL: u16 = 0x88b5;
    let mut range = Range::new("vlan_tags_and_unknown_ethertypes")?;
    for family in FAMILIES {
        for (tags, ethertype) in [
            (&VLAN_7[..], ETHERTYPES[family]),
            (&[VLAN_7; 2].concat(), ETHERTYPES[family]),
            (&[], EXPERIMENTAL),
        ] {
            for (bypass, drop) in [(false, ("device", "ethertype")), (true, BY_PEER)] {
                range
                    .attack(family, &[drop], |attack| {
                        let frame = frame(BROADCAST, tags, ethertype, &attack.tcp_packet()?);
                        PacketSocket::open(attack.pod, "eth0", bypass)?.send(&frame)
                    })
                    .with_context(|| format!("tags {tags:x?}, ethertype {ethertype:#06x}"))?;
            }
        }
    }
    Ok(())
}

#[test]
fn the_device_in_a_namespace_of_its_own() -> Result<()> {
    for family in FAMILIES {
        let mut range = Range::new(&format!("the_device_in_a_namespace_of_its_own-{family}"))?;
        // A guard that is no link (before tcx) stays behind.
        let guard = if kernel_before((6, 6)) { BY_PEER } else { BY_DEVICE };
        range.attack(family, &[guard], |attack| {
            let role = format!("nested-{}", attack.pod.pod_name());
            let nested = attack.mesh.lab.add_namespace(&role)?;
            attack.pod.ip(&[format!("link set dev eth0 netns {}", nested.name())])?;
            let [v4, v6] = attack.pod.addresses();
            let [gateway_v4, gateway_v6] = attack.pod.gateways();
            nested.ip(&[
                format!("addr add {v4}/24 dev eth0"),
                format!("addr add {v6}/64 dev eth0 nodad"),
                "link set eth0 up".to_owned(),
                format!("route add default via {gateway_v4}"),
                format!("route add ::/0 via {gateway_v6}"),
            ])?;
            // The guard may let it meet nobody.
            let mac =
                raw::gateway_address(&attack.mesh.nodes[0])?.map(|byte| format!("{byte:02x}"));
            let (to, mac) = (attack.pod.gateways()[family], mac.join(":"));
            nested.ip(&[format!("neigh replace {to} lladdr {mac} dev eth0")])?;
            let socket = tcp_socket(&nested, attack.to())?;
            say_canary(&nested, &socket, attack.to(), attack.canary).ok();
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn another_namespace_through_the_pod() -> Result<()> {
    struct Inner {
        router: &'static str,
        host: &'static str,
        prefix: u8,
        everything: &'static str,
        forwarding: &'static str,
        nft: &'static str,
    }
    let inner = [
        Inner {
            router: "192.168.9.1",
            host: "192.168.9.2",
            prefix: 24,
            everything: "0.0.0.0/0",
            forwarding: "net/ipv4/ip_forward",
            nft: "ip",
        },
        Inner {
            router: "fd99::1",
            host: "fd99::2",
            prefix: 64,
            everything: "::/0",
            forwarding: "net/ipv6/conf/all/forwarding",
            nft: "ip6",
        },
    ];
    for family in FAMILIES {
        let Inner { router, host, prefix, everything, forwarding, nft } = &inner[family];
        let mut range = Range::new(&format!("another_namespace_through_the_pod-{family}"))?;
        range.attack(family, &[BY_DEVICE], |attack| {
            let role = format!("behind-{}", attack.pod.pod_name());
            let nested = attack.mesh.lab.add_namespace(&role)?;
            attack.pod.ip(&[
                format!("link add inner type veth peer name eth0 netns {}", nested.name()),
                format!("addr add {router}/{prefix} dev inner"),
                "link set dev inner up".to_owned(),
            ])?;
            nested.ip(&[
                format!("addr add {host}/{prefix} dev eth0"),
                "link set eth0 up".to_owned(),
                format!("route add {everything} via {router}"),
            ])?;
            meet(&nested, router.parse()?)?;
            attack.pod.sysctl(forwarding, "1")?;
            let masquerade = format!(
                "add table {nft} nat; \
                 add chain {nft} nat out {{ type nat hook postrouting priority 100; }}; \
                 add rule {nft} nat out oifname eth0 masquerade"
            );
            attack.pod.output("nft", &[&masquerade])?;
            let socket = tcp_socket(&nested, attack.to())?;
            say_canary(&nested, &socket, attack.to(), attack.canary).ok();
            Ok(())
        })?;
    }
    Ok(())
}

/// In an enrolled pod the plaintext is on loopback, on its way to the agent; in the other one it
/// is put there by a route.
#[test]
fn loopback_duplicated_to_the_device() -> Result<()> {
    for family in FAMILIES {
        let nft = ["ip", "ip6"][family];
        let mut range = Range::new(&format!("loopback_duplicated_to_the_device-{family}"))?;
        let meshed = range.mesh.pod(1, "meshed")?;
        let _echo = meshed.echo(PORT)?;
        range.attack(family, &[BY_DEVICE], |attack| {
            let server = if attack.enrolled { &meshed } else { attack.target };
            let (to, gateway) = (server.sockets(PORT)[family], attack.pod.gateways()[family]);
            let duplicate = format!(
                "add table {nft} steal; \
                 add chain {nft} steal out {{ type filter hook output priority 0; }}; \
                 add rule {nft} steal out oifname lo tcp dport {PORT} dup to {gateway} device eth0"
            );
            attack.pod.output("nft", &[&duplicate])?;
            let _echo = attack.pod.echo(PORT)?;
            if !attack.enrolled {
                // Without the source it would be the destination, which no router believes.
                let own = attack.pod.addresses()[family];
                attack.pod.ip(&[format!("route add local {} dev lo src {own}", to.ip())])?;
                // The true server answers what it gets of it, and disturbs.
                let quiet = format!(
                    "add chain {nft} steal in {{ type filter hook input priority 0; }}; \
                     add rule {nft} steal in iifname eth0 tcp sport {PORT} drop"
                );
                attack.pod.output("nft", &[&quiet])?;
            }
            let inside = attack.mesh.lab.capture_loopback(attack.pod)?;
            let socket = tcp_socket(attack.pod, to)?;
            say_canary(attack.pod, &socket, to, attack.canary)?;
            inside.stop()?.expect_present(attack.canary)
        })?;
    }
    Ok(())
}
