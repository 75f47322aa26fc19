//! What may leave a pod. Pure decisions: an application's socket never has a reason to put TCP on
//! anything but loopback, so TCP that is not the agent's own is plaintext on its way out.

use mesh_common::abi::{Address, Flow, POD_DENIES_UDP, PodConfig, Reason};

use crate::{
    capture::is_own,
    packet::{ACK, Bytes, Malformed, Ports, RST, SYN, Transport, destination, source, transport},
};

const DNS: u16 = 53;
const LOOPBACK_IFINDEX: u32 = 1;

const ETHERNET_HEADER: u32 = 14;
const ETHERTYPE_OFFSET: u32 = 12;
const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_IPV6: u16 = 0x86dd;

/// Whose socket a packet belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sender {
    /// The agent's, encrypted.
    Tunnel,
    /// The agent's, allowed to this address as it is.
    Plaintext(Address),
    /// A request or TIME_WAIT socket, or the control socket of the kernel's own replies.
    Kernel,
    /// Any other socket, or none: forwarded, or made by packet sockets.
    Other,
}

/// What is let out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pass {
    /// Encrypted, allowed as it is, or nothing that applications say.
    Clean,
    /// A datagram, which nobody encrypts.
    Udp,
}

/// A packet on its way out of a pod.
pub(crate) trait Outgoing: Bytes {
    /// Whose it is.
    fn sender(&self) -> Sender;
    /// The index of the device it leaves by, as the pod counts.
    fn ifindex(&self) -> u32;
    /// Whether a VLAN tag is carried beside the bytes.
    fn vlan_tagged(&self) -> bool;
    /// Whether the node itself opened this connection, and may still be told something.
    fn host_listens(&self, flow: &Flow) -> bool;
}

/// How a device frames packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Link {
    /// With an Ethernet header.
    Ethernet,
    /// Not at all.
    None,
}

/// Whether a packet goes by loopback, which has this index in every network namespace: it stays
/// inside, whosever that is.
#[inline(always)]
pub(crate) fn stays_inside<P: Outgoing>(packet: &P) -> bool {
    packet.ifindex() == LOOPBACK_IFINDEX
}

/// The first guard: packets of sockets that do not stay inside, from the network header on.
#[inline(always)]
pub(crate) fn cgroup<P: Outgoing>(packet: &P, pod: &PodConfig) -> Result<Pass, Reason> {
    let sender = packet.sender();
    if sender == Sender::Tunnel {
        return Ok(Pass::Clean);
    }
    judge(packet, 0, sender, pod)
}

/// The second guard: frames on a device of the pod.
#[inline(always)]
pub(crate) fn device<P: Outgoing>(
    packet: &P,
    link: Link,
    pod: Option<&PodConfig>,
) -> Result<Pass, Reason> {
    let pod = pod.ok_or(Reason::Unconfigured)?;
    let sender = packet.sender();
    if sender == Sender::Tunnel {
        return Ok(Pass::Clean);
    }
    if packet.vlan_tagged() {
        return Err(Reason::EtherType);
    }
    let offset = match link {
        Link::None => 0,
        Link::Ethernet => {
            // The frame's own bytes: a packet socket sets the skb's protocol field at will.
            let ethertype = packet.load(ETHERTYPE_OFFSET).ok_or(Reason::Malformed)?;
            match u16::from_be_bytes(ethertype) {
                ETHERTYPE_ARP => return Ok(Pass::Clean),
                ETHERTYPE_IPV4 | ETHERTYPE_IPV6 => ETHERNET_HEADER,
                _ => return Err(Reason::EtherType),
            }
        }
    };
    judge(packet, offset, sender, pod)
}

/// The third guard: the stamp of the second, which no pod can forge or learn.
#[inline(always)]
pub(crate) fn peer(stamp: u32, key: Option<u32>) -> Result<(), Reason> {
    if key == Some(stamp) { Ok(()) } else { Err(Reason::Bypass) }
}

/// Judges the IP packet that begins at `offset`.
#[inline(always)]
fn judge<P: Outgoing>(
    packet: &P,
    offset: u32,
    sender: Sender,
    pod: &PodConfig,
) -> Result<Pass, Reason> {
    // Somebody in the pod may have given the packet another destination on its way.
    if let Sender::Plaintext(allowed) = sender
        && destination(packet, offset) == Some(allowed)
    {
        return Ok(Pass::Clean);
    }
    match transport(packet, offset) {
        Err(Malformed) => Err(Reason::Malformed),
        // SYN-ACKs and TIME_WAIT's ACKs carry nothing; without them a peer would hang.
        Ok(Transport::Tcp { payload: 0, .. }) if sender == Sender::Kernel => Ok(Pass::Clean),
        Ok(Transport::Tcp { payload: 0, flags, .. }) if flags & RST != 0 => Ok(Pass::Clean),
        Ok(Transport::Tcp { ports, flags, .. })
            if answers_host(packet, offset, ports, flags, pod) =>
        {
            Ok(Pass::Clean)
        }
        Ok(Transport::Tcp { .. } | Transport::TcpFragment) => Err(Reason::Plaintext),
        Ok(Transport::Udp { .. }) if pod.flags & POD_DENIES_UDP == 0 => Ok(Pass::Udp),
        Ok(Transport::Udp { port: Some(DNS) }) => Ok(Pass::Udp),
        Ok(Transport::Udp { .. }) => Err(Reason::Udp),
        Ok(Transport::Control) => Ok(Pass::Clean),
        Ok(Transport::Other) => Err(Reason::Protocol),
    }
}

/// Whether a segment belongs to a connection that the node itself opened to this pod. The map of
/// them is the node's: without a look at the source, another pod could answer in this one's place.
#[inline(always)]
fn answers_host<P: Outgoing>(
    packet: &P,
    offset: u32,
    ports: Ports,
    flags: u8,
    pod: &PodConfig,
) -> bool {
    // A SYN alone opens a connection between the same two ends, of the pod's own.
    if flags & (SYN | ACK) == SYN {
        return false;
    }
    let (Some(server), Some(client)) = (source(packet, offset), destination(packet, offset)) else {
        return false;
    };
    let Ports { source: server_port, destination: client_port } = ports;
    is_own(pod, &server) && packet.host_listens(&Flow { client, server, client_port, server_port })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::tests::{tcp, v4, v6};
    use mesh_common::abi::MAX_POD_ADDRESSES;

    struct Frame {
        bytes: Vec<u8>,
        sender: Sender,
        vlan: bool,
        host: Option<Flow>,
    }

    impl Bytes for Frame {
        fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
            self.bytes.load(offset)
        }

        fn len(&self) -> u32 {
            Bytes::len(&self.bytes)
        }
    }

    impl Outgoing for Frame {
        fn sender(&self) -> Sender {
            self.sender
        }

        fn ifindex(&self) -> u32 {
            2
        }

        fn vlan_tagged(&self) -> bool {
            self.vlan
        }

        fn host_listens(&self, flow: &Flow) -> bool {
            self.host.as_ref() == Some(flow)
        }
    }

    fn pod(flags: u32) -> PodConfig {
        PodConfig {
            addresses: [[0; 16]; MAX_POD_ADDRESSES],
            address_count: 0,
            flags,
            listener_port: 0,
            reserved: 0,
        }
    }

    fn ethernet(ethertype: u16, packet: &[u8], sender: Sender) -> Frame {
        let mut bytes = vec![0; 12];
        bytes.extend(ethertype.to_be_bytes());
        bytes.extend(packet);
        Frame { bytes, sender, vlan: false, host: None }
    }

    fn verdict(ethertype: u16, packet: &[u8], sender: Sender) -> Result<Pass, Reason> {
        device(&ethernet(ethertype, packet, sender), Link::Ethernet, Some(&pod(0)))
    }

    #[test]
    fn only_the_agent_sends_tcp() {
        for (ethertype, packet) in
            [(ETHERTYPE_IPV4, v4(6, 0, &tcp(1, 0))), (ETHERTYPE_IPV6, v6(6, &tcp(1, 0)))]
        {
            assert_eq!(verdict(ethertype, &packet, Sender::Tunnel), Ok(Pass::Clean));
            for sender in [Sender::Kernel, Sender::Other] {
                assert_eq!(verdict(ethertype, &packet, sender), Err(Reason::Plaintext));
            }
        }
    }

    #[test]
    fn allowed_plaintext_goes_where_it_is_allowed_to_and_nowhere_else() {
        let mut packet = v4(6, 0, &tcp(1, 0));
        packet[16..20].copy_from_slice(&[192, 0, 2, 1]);
        let to = |last| {
            Sender::Plaintext(std::net::Ipv4Addr::new(192, 0, 2, last).to_ipv6_mapped().octets())
        };
        assert_eq!(verdict(ETHERTYPE_IPV4, &packet, to(1)), Ok(Pass::Clean));
        assert_eq!(verdict(ETHERTYPE_IPV4, &packet, to(2)), Err(Reason::Plaintext));
    }

    #[test]
    fn what_the_host_opened_is_answered_and_nothing_else() {
        let address = |last| std::net::Ipv4Addr::new(192, 0, 2, last).to_ipv6_mapped().octets();
        let flow =
            Flow { client: address(1), server: address(2), client_port: 40_000, server_port: 80 };
        let mut pod = pod(0);
        (pod.addresses[0], pod.address_count) = (address(2), 1);
        let answer = |server: u8, client: u8, ports: [u16; 2], flags: u8| {
            let mut packet = v4(6, 0, &tcp(1, flags));
            packet[12..20].copy_from_slice(&[192, 0, 2, server, 192, 0, 2, client]);
            packet[20..22].copy_from_slice(&ports[0].to_be_bytes());
            packet[22..24].copy_from_slice(&ports[1].to_be_bytes());
            let frame = ethernet(ETHERTYPE_IPV4, &packet, Sender::Other);
            let frame = Frame { host: Some(flow), ..frame };
            device(&frame, Link::Ethernet, Some(&pod))
        };
        for flags in [ACK, SYN | ACK] {
            assert_eq!(answer(2, 1, [80, 40_000], flags), Ok(Pass::Clean));
        }
        for (server, client, ports, flags) in [
            (2, 1, [80, 40_000], SYN),
            (2, 1, [80, 40_001], ACK),
            (2, 1, [81, 40_000], ACK),
            (2, 3, [80, 40_000], ACK),
            (1, 2, [40_000, 80], ACK),
        ] {
            let verdict = answer(server, client, ports, flags);
            assert_eq!(verdict, Err(Reason::Plaintext), "{server} {client} {ports:?} {flags}");
        }
        // In the name of another pod.
        pod.addresses[0] = address(9);
        let mut packet = v4(6, 0, &tcp(1, ACK));
        packet[12..20].copy_from_slice(&[192, 0, 2, 2, 192, 0, 2, 1]);
        packet[20..24].copy_from_slice(&[0, 80, 0x9c, 0x40]);
        let frame = Frame { host: Some(flow), ..ethernet(ETHERTYPE_IPV4, &packet, Sender::Other) };
        assert_eq!(device(&frame, Link::Ethernet, Some(&pod)), Err(Reason::Plaintext));
    }

    #[test]
    fn empty_segments_pass_where_the_kernel_needs_them() {
        let syn = v4(6, 0, &tcp(0, 0x02));
        let rst = v4(6, 0, &tcp(0, RST));
        assert_eq!(verdict(ETHERTYPE_IPV4, &syn, Sender::Other), Err(Reason::Plaintext));
        assert_eq!(verdict(ETHERTYPE_IPV4, &syn, Sender::Kernel), Ok(Pass::Clean));
        assert_eq!(verdict(ETHERTYPE_IPV4, &rst, Sender::Other), Ok(Pass::Clean));
        let rst_with_data = v4(6, 0, &tcp(1, RST));
        assert_eq!(verdict(ETHERTYPE_IPV4, &rst_with_data, Sender::Other), Err(Reason::Plaintext));
    }

    #[test]
    fn trailing_bytes_count_as_payload() {
        let mut rst = v4(6, 0, &tcp(0, RST));
        rst.push(b'x');
        assert_eq!(verdict(ETHERTYPE_IPV4, &rst, Sender::Other), Err(Reason::Plaintext));
    }

    #[test]
    fn only_arp_and_ip_frames_pass() {
        assert_eq!(verdict(ETHERTYPE_ARP, &[], Sender::Other), Ok(Pass::Clean));
        for ethertype in [0x8100, 0x88a8, 0x88b5, 0x0003] {
            let frame = v4(6, 0, &tcp(1, 0));
            assert_eq!(verdict(ethertype, &frame, Sender::Other), Err(Reason::EtherType));
        }
        let mut tagged = ethernet(ETHERTYPE_ARP, &[], Sender::Other);
        tagged.vlan = true;
        assert_eq!(device(&tagged, Link::Ethernet, Some(&pod(0))), Err(Reason::EtherType));
    }

    #[test]
    fn unknown_transports_and_pods_are_dropped() {
        assert_eq!(verdict(ETHERTYPE_IPV4, &v4(132, 0, &[]), Sender::Other), Err(Reason::Protocol));
        let frame = ethernet(ETHERTYPE_ARP, &[], Sender::Tunnel);
        assert_eq!(device(&frame, Link::Ethernet, None), Err(Reason::Unconfigured));
    }

    #[test]
    fn udp_follows_the_pod_s_setting_and_dns_is_exempt() {
        let datagram = |port: u8| v4(17, 0, &[0, 0, 0, port, 0, 8, 0, 0]);
        let frame = |port| ethernet(ETHERTYPE_IPV4, &datagram(port), Sender::Other);
        assert_eq!(device(&frame(9), Link::Ethernet, Some(&pod(0))), Ok(Pass::Udp));
        let denies = pod(POD_DENIES_UDP);
        assert_eq!(device(&frame(9), Link::Ethernet, Some(&denies)), Err(Reason::Udp));
        assert_eq!(device(&frame(53), Link::Ethernet, Some(&denies)), Ok(Pass::Udp));
    }

    #[test]
    fn the_peer_wants_the_very_stamp() {
        assert_eq!(peer(7, Some(7)), Ok(()));
        assert_eq!(peer(8, Some(7)), Err(Reason::Bypass));
        assert_eq!(peer(0, None), Err(Reason::Bypass));
    }
}
