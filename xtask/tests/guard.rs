//! What a pod can do to get plaintext out past the agent, each tried from a pod outside of the
//! mesh, where it must work, and from an enrolled one, where nothing may leave.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use socket2::{Domain, SockRef, Socket, Type};
use xtask::lab::raw::{self, PacketSocket, frame, tcp_packet};
use xtask::lab::{Canary, Lab, Mesh, Netns, Node, Pod};

const PORT: u16 = 8080;
const IPV4: u16 = 0x0800;
const VLAN_7: [u8; 4] = [0x81, 0x00, 0, 7];

/// What an attack has to work with.
struct Attack<'a> {
    lab: &'a mut Lab,
    node: &'a Node,
    pod: &'a Pod,
    /// Echoes on [`PORT`] on another node; not in the mesh, so that it accepts plaintext.
    target: &'a Pod,
    canary: &'a Canary,
}

/// Runs an attack from a pod outside of the mesh and from one inside.
fn attack(title: &str, try_it: impl Fn(&mut Attack<'_>) -> Result<()>) -> Result<()> {
    let mut mesh = Mesh::new(title)?;
    let target = mesh.plain_pod(1, "target")?;
    let bystander = mesh.plain_pod(0, "bystander")?;
    let _echo = target.echo(PORT)?;
    for enrolled in [false, true] {
        let pod = match enrolled {
            false => mesh.plain_pod(0, "plain")?,
            true => mesh.pod(0, "enrolled")?,
        };
        let canary = Canary::random();
        let captures = [mesh.lab.capture()?, mesh.lab.capture_pod(&bystander)?];
        let node = mesh.nodes[0].clone();
        let mut attack =
            Attack { lab: &mut mesh.lab, node: &node, pod: &pod, target: &target, canary: &canary };
        try_it(&mut attack).with_context(|| format!("from {}", pod.pod_name()))?;
        let mut escaped = false;
        for capture in captures {
            let recording = capture.stop()?;
            escaped |= recording.contains(&canary);
            if enrolled {
                recording.expect_absent(&canary).context("from the enrolled pod")?;
            }
        }
        ensure!(enrolled || escaped, "the attack does not even work without the mesh");
    }
    Ok(())
}

/// Sends the canary over a connection that may be refused, or hang, or be reset: all of that is
/// the guard's right.
fn say_canary(from: &Netns, socket: &Socket, to: SocketAddr, canary: &Canary) {
    let patience = Duration::from_millis(500);
    let talk = || -> std::io::Result<()> {
        socket.connect_timeout(&to.into(), patience)?;
        socket.set_read_timeout(Some(patience))?;
        socket.set_write_timeout(Some(patience))?;
        (&*socket).write_all(canary.bytes())?;
        (&*socket).read_exact(&mut [0; 32])
    };
    from.run(talk).ok();
}

fn tcp_socket(netns: &Netns, to: IpAddr) -> Result<Socket> {
    let domain = if to.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
    Ok(netns.run(|| Socket::new(domain, Type::STREAM, None))?)
}

impl Attack<'_> {
    /// Sends IPv4 frames through a packet(7) socket.
    fn frames(&self, to: [u8; 6], tags: &[u8], ethertype: u16, bypass: bool) -> Result<()> {
        let [source, destination] = [self.pod, self.target].map(|pod| pod.sockets(PORT)[0]);
        let packet = tcp_packet(source, destination, self.canary.bytes())?;
        let socket = PacketSocket::open(self.pod, "eth0", bypass)?;
        socket.send(&frame(to, tags, ethertype, &packet))
    }
}

#[test]
fn a_socket_bound_to_the_device() -> Result<()> {
    attack("a_socket_bound_to_the_device", |attack| {
        for to in attack.target.sockets(PORT) {
            let socket = tcp_socket(attack.pod, to.ip())?;
            socket.bind_device(Some(b"eth0"))?;
            say_canary(attack.pod, &socket, to, attack.canary);
        }
        Ok(())
    })
}

#[test]
fn a_mark_of_its_own() -> Result<()> {
    attack("a_mark_of_its_own", |attack| {
        for to in attack.target.sockets(PORT) {
            for before in [true, false] {
                let socket = tcp_socket(attack.pod, to.ip())?;
                if before {
                    socket.set_mark(7)?;
                }
                attack.pod.run(|| socket.connect_timeout(&to.into(), Duration::from_secs(1))).ok();
                socket.set_mark(0)?;
                SockRef::from(&socket).set_write_timeout(Some(Duration::from_millis(500)))?;
                (&socket).write_all(attack.canary.bytes()).ok();
                socket.set_read_timeout(Some(Duration::from_millis(500)))?;
                (&socket).read_exact(&mut [0; 32]).ok();
            }
        }
        Ok(())
    })
}

#[test]
fn raw_sockets() -> Result<()> {
    attack("raw_sockets", |attack| {
        for (from, to) in attack.pod.sockets(PORT).into_iter().zip(attack.target.sockets(PORT)) {
            let packet = tcp_packet(from, to, attack.canary.bytes())?;
            raw::send_packet(attack.pod, to.ip(), &packet)?;
        }
        Ok(())
    })
}

#[test]
fn tcp_behind_extension_headers() -> Result<()> {
    attack("tcp_behind_extension_headers", |attack| {
        let (IpAddr::V6(from), IpAddr::V6(to)) = (attack.pod.v6(), attack.target.v6()) else {
            bail!("these are IPv6 addresses");
        };
        let packet = raw::tcp_behind_options(from, to, PORT, attack.canary.bytes())?;
        raw::send_packet(attack.pod, to.into(), &packet)
    })
}

#[test]
fn packet_sockets() -> Result<()> {
    attack("packet_sockets", |attack| {
        attack.frames(raw::gateway_address(attack.node)?, &[], IPV4, false)
    })
}

#[test]
fn packet_sockets_past_the_queueing_discipline() -> Result<()> {
    attack("packet_sockets_past_the_queueing_discipline", |attack| {
        attack.frames(raw::gateway_address(attack.node)?, &[], IPV4, true)
    })
}

/// A router has no use for such frames, but the other pods on the node's bridge get them.
#[test]
fn vlan_tags_and_unknown_ethertypes() -> Result<()> {
    const BROADCAST: [u8; 6] = [0xff; 6];
    const EXPERIMENTAL: u16 = 0x88b5;
    for (name, tags, ethertype) in [
        ("vlan", &VLAN_7[..], IPV4),
        ("double_vlan", &[VLAN_7; 2].concat(), IPV4),
        ("unknown", &[], EXPERIMENTAL),
    ] {
        for bypass in [false, true] {
            attack(&format!("{name}-{bypass}"), |attack| {
                attack.frames(BROADCAST, tags, ethertype, bypass)
            })
            .with_context(|| format!("{name}, past the queueing discipline: {bypass}"))?;
        }
    }
    Ok(())
}

#[test]
fn the_device_in_a_namespace_of_its_own() -> Result<()> {
    attack("the_device_in_a_namespace_of_its_own", |attack| {
        let nested = attack.lab.add_namespace(&format!("nested-{}", attack.pod.pod_name()))?;
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
        for to in attack.target.sockets(PORT) {
            let socket = tcp_socket(&nested, to.ip())?;
            say_canary(&nested, &socket, to, attack.canary);
        }
        Ok(())
    })
}

#[test]
fn another_namespace_through_the_pod() -> Result<()> {
    attack("another_namespace_through_the_pod", |attack| {
        let nested = attack.lab.add_namespace(&format!("behind-{}", attack.pod.pod_name()))?;
        attack.pod.ip(&[
            format!("link add inner type veth peer name eth0 netns {}", nested.name()),
            "addr add 192.168.9.1/24 dev inner".to_owned(),
            "link set dev inner up".to_owned(),
        ])?;
        nested.ip(&[
            "addr add 192.168.9.2/24 dev eth0",
            "link set eth0 up",
            "route add default via 192.168.9.1",
        ])?;
        attack.pod.sysctl("net/ipv4/ip_forward", "1")?;
        let masquerade = "add table ip nat; \
             add chain ip nat out { type nat hook postrouting priority 100; }; \
             add rule ip nat out oifname eth0 masquerade";
        attack.pod.output("nft", &[masquerade])?;
        let to = attack.target.sockets(PORT)[0];
        let socket = tcp_socket(&nested, to.ip())?;
        say_canary(&nested, &socket, to, attack.canary);
        Ok(())
    })
}

/// In an enrolled pod the plaintext is on loopback, on its way to the agent; in the other one it
/// is put there by a route.
#[test]
fn loopback_duplicated_to_the_device() -> Result<()> {
    attack("loopback_duplicated_to_the_device", |attack| {
        let to = attack.target.sockets(PORT)[0];
        let [gateway, _] = attack.pod.gateways();
        let duplicate = format!(
            "add table ip steal; \
             add chain ip steal out {{ type filter hook output priority 0; }}; \
             add rule ip steal out oifname lo tcp dport {PORT} dup to {gateway} device eth0"
        );
        attack.pod.output("nft", &[&duplicate])?;
        let _listener = attack.pod.listen(PORT)?;
        if attack.pod.pod_name() == "plain" {
            // Without the source it would be the destination, which no router believes.
            attack.pod.ip(&[format!(
                "route add local {} dev lo src {}",
                to.ip(),
                attack.pod.v4()
            )])?;
        }
        let socket = tcp_socket(attack.pod, to.ip())?;
        say_canary(attack.pod, &socket, to, attack.canary);
        Ok(())
    })
}
