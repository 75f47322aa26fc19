//! Nodes and pods: what is plugged into what, and under which addresses.
//!
//! Every laboratory has the same addresses, which is no trouble: they never meet.
//!
//! | who               | IPv4            | IPv6           |
//! |-------------------|-----------------|----------------|
//! | node N            | 172.30.0.N/24   | fd78::N/64     |
//! | control plane     | 172.30.0.250/24 | fd78::250/64   |
//! | outside           | 172.30.0.200/24 | fd78::200/64   |
//! | pod P on node N   | 10.77.N.P/24    | fd77:N::P/64   |
//! | node N, to pods   | 10.77.N.1/24    | fd77:N::1/64   |
//! | crowd on node N   | 10.77.100.1/24… | fd77:N::1:0/64 |

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::Deref;

use anyhow::{Context as _, Result};

use super::{Capture, Lab, Netns, netns};

/// The range that holds every pod, IPv4.
pub const POD_RANGE_V4: &str = "10.77.0.0/16";
/// The range that holds every pod, IPv6.
pub const POD_RANGE_V6: &str = "fd77::/16";
/// The addresses of [`Lab::outside`].
pub const OUTSIDE_ADDRESSES: [&str; 2] = ["172.30.0.200", "fd78::200"];
/// Where the control plane is.
pub const CONTROL_ADDRESS: &str = "172.30.0.250";
/// The ranges that hold the nodes and the control plane.
pub const NODE_RANGES: [&str; 2] = ["172.30.0.0/24", "fd78::/64"];

/// A node: a namespace with `eth0` on the wire and a bridge `cni0` for its pods.
#[derive(Clone, Debug)]
pub struct Node {
    name: String,
    number: u8,
    pods: u8,
    netns: Netns,
}

/// A pod: a namespace with `eth0`, whose peer is a port of its node's `cni0`.
#[derive(Clone, Debug)]
pub struct Pod {
    name: String,
    node: String,
    v4: Ipv4Addr,
    v6: Ipv6Addr,
    gateways: [IpAddr; 2],
    netns: Netns,
}

impl Deref for Node {
    type Target = Netns;

    fn deref(&self) -> &Netns {
        &self.netns
    }
}

impl Deref for Pod {
    type Target = Netns;

    fn deref(&self) -> &Netns {
        &self.netns
    }
}

impl Node {
    /// The node's name.
    pub fn node_name(&self) -> &str {
        &self.name
    }

    /// Its IPv4 address on the wire.
    pub fn address(&self) -> IpAddr {
        Ipv4Addr::new(172, 30, 0, self.number).into()
    }

    /// Its IPv4 address towards its pods.
    pub fn address_to_pods(&self) -> IpAddr {
        Ipv4Addr::new(10, 77, self.number, 1).into()
    }

    /// The routes that lead to the node's pods from elsewhere on the wire.
    fn routes_to_pods(&self) -> [String; 2] {
        let n = self.number;
        [
            format!("route add 10.77.{n}.0/24 via 172.30.0.{n}"),
            format!("route add fd77:{n}::/64 via fd78::{n}"),
        ]
    }
}

impl Pod {
    /// The pod's name, unique in the laboratory.
    pub fn pod_name(&self) -> &str {
        &self.name
    }

    /// The UID under which the pod is registered.
    pub fn uid(&self) -> String {
        format!("uid-{}", self.name)
    }

    /// The name of the node it is on.
    pub fn node_name(&self) -> &str {
        &self.node
    }

    /// Its IPv4 address.
    pub fn v4(&self) -> IpAddr {
        self.v4.into()
    }

    /// Its IPv6 address.
    pub fn v6(&self) -> IpAddr {
        self.v6.into()
    }

    /// Both addresses: what is tested is tested over each.
    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.v4(), self.v6()]
    }

    /// The addresses of its node that it sends everything to.
    pub fn gateways(&self) -> [IpAddr; 2] {
        self.gateways
    }

    /// A port on each of its addresses.
    pub fn sockets(&self, port: u16) -> [SocketAddr; 2] {
        self.addresses().map(|address| SocketAddr::new(address, port))
    }

    /// The name of the port of `cni0`, in the node, that leads to the pod.
    pub fn peer_device(&self) -> String {
        format!("veth-{}", self.name)
    }
}

impl Lab {
    /// Adds a node and routes between it and the others. Names have at most 10 letters.
    pub fn node(&mut self, name: &str) -> Result<Node> {
        let netns = self.add_namespace(name)?;
        let number = u8::try_from(self.nodes.len() + 1).context("too many nodes")?;
        let node = Node { name: name.to_owned(), number, pods: 1, netns };
        node.sysctl("net/ipv4/ip_forward", "1")?;
        node.sysctl("net/ipv6/conf/all/forwarding", "1")?;
        self.plug(&node, name, &number.to_string())?;
        let n = number;
        let mut commands = vec![
            "link add cni0 type bridge forward_delay 0 mcast_snooping 0".to_owned(),
            format!("addr add 10.77.{n}.1/24 dev cni0"),
            format!("addr add fd77:{n}::1/64 dev cni0 nodad"),
            "link set cni0 up".to_owned(),
        ];
        for other in &self.nodes {
            commands.extend(other.routes_to_pods());
            other.ip(&node.routes_to_pods())?;
        }
        node.ip(&commands)?;
        self.nodes.push(node.clone());
        Ok(node)
    }

    /// Adds the namespace of the control plane, reachable from the nodes.
    pub(super) fn control_namespace(&mut self) -> Result<Netns> {
        let netns = self.add_namespace("control")?;
        self.plug(&netns, "control", "250")?;
        Ok(netns)
    }

    /// Adds a host outside of the cluster's ranges, with routes to the pods of every node there
    /// is by now. It is in no mesh.
    pub fn outside(&mut self) -> Result<Netns> {
        let netns = self.add_namespace("outside")?;
        self.plug(&netns, "outside", "200")?;
        for node in &self.nodes {
            netns.ip(&node.routes_to_pods())?;
        }
        Ok(netns)
    }

    /// Adds a pod to a node. Names have at most 10 letters.
    pub fn pod(&mut self, node: &Node, name: &str) -> Result<Pod> {
        let index = usize::from(node.number - 1);
        self.nodes[index].pods += 1;
        let number = self.nodes[index].pods;
        self.pod_at(node, name, number)
    }

    /// Adds a pod with the addresses of one that is gone.
    pub fn pod_in_place_of(&mut self, node: &Node, gone: &Pod, name: &str) -> Result<Pod> {
        self.pod_at(node, name, gone.v4.octets()[3])
    }

    fn pod_at(&mut self, node: &Node, name: &str, number: u8) -> Result<Pod> {
        let n = node.number;
        // The addresses are written as the table above shows them, digits as they are.
        let v6 = format!("fd77:{n}::{number}").parse()?;
        self.pod_with(node, name, Ipv4Addr::new(10, 77, n, number), v6)
    }

    /// Adds a pod of which there may be hundreds on a node, with addresses that lead nowhere.
    pub fn pod_of_crowd(&mut self, node: &Node, number: u16) -> Result<Pod> {
        let (network, host) = (u8::try_from(100 + number / 250)?, u8::try_from(1 + number % 250)?);
        let v4 = Ipv4Addr::new(10, 77, network, host);
        let v6 = format!("fd77:{}::1:{number}", node.number).parse()?;
        self.pod_with(node, &format!("crowd{number}"), v4, v6)
    }

    fn pod_with(&mut self, node: &Node, name: &str, v4: Ipv4Addr, v6: Ipv6Addr) -> Result<Pod> {
        let netns = self.add_namespace(&format!("{}-{name}", node.name))?;
        let gateway_v6: Ipv6Addr = format!("fd77:{}::1", node.number).parse()?;
        let gateways = [node.address_to_pods(), gateway_v6.into()];
        let (name, node_name) = (name.to_owned(), node.name.clone());
        let pod = Pod { name, node: node_name, v4, v6, gateways, netns };
        let peer = pod.peer_device();
        // As CNI's bridge plugin does it: who gets an address gets the hardware address that the
        // node remembers for it.
        let [a, b, c, d] = pod.v4.octets();
        netns::ip(
            None,
            &[format!(
                "link add eth0 address 0a:58:{a:02x}:{b:02x}:{c:02x}:{d:02x} netns {} type veth \
                 peer name {peer} netns {}",
                pod.name(),
                node.name()
            )],
        )?;
        node.ip(&[format!("link set dev {peer} master cni0 up")])?;
        let [v4, v6] = gateways;
        pod.ip(&[
            format!("addr add {}/24 dev eth0", pod.v4),
            format!("addr add {}/64 dev eth0 nodad", pod.v6),
            "link set eth0 up".to_owned(),
            format!("route add default via {v4} dev eth0 onlink"),
            format!("route add ::/0 via {v6} dev eth0"),
        ])?;
        Ok(pod)
    }

    /// Takes a pod away, as a runtime does: what runs in it ends, its device goes, and its name.
    /// The namespace itself lives on for as long as somebody holds it, such as `pod`.
    pub fn delete_pod(&mut self, pod: &Pod) -> Result<()> {
        netns::kill_inhabitants(&[pod.inode()?].into());
        pod.ip(&["link del eth0"])?;
        netns::ip(None, &[format!("netns del {}", pod.name())])?;
        self.namespaces.retain(|netns| netns.name() != pod.name());
        Ok(())
    }

    /// Captures what passes `eth0` of a pod. Packets are seen after the pod's egress programs.
    pub fn capture_pod(&self, pod: &Pod) -> Result<Capture> {
        Capture::start(pod, Some("eth0"), self.logs())
    }

    /// Captures what passes loopback of a pod, where the agent and the applications meet.
    pub fn capture_loopback(&self, pod: &Pod) -> Result<Capture> {
        Capture::start(pod, Some("lo"), self.logs())
    }

    fn plug(&self, netns: &Netns, port: &str, number: &str) -> Result<()> {
        netns::ip(
            None,
            &[format!(
                "link add eth0 netns {} type veth peer name {port} netns {}",
                netns.name(),
                self.wire.name()
            )],
        )?;
        self.wire.ip(&[format!("link set dev {port} master wire up")])?;
        netns.ip(&[
            format!("addr add 172.30.0.{number}/24 dev eth0"),
            format!("addr add fd78::{number}/64 dev eth0 nodad"),
            "link set eth0 up".to_owned(),
        ])
    }
}
