//! Packets as an attacker with raw sockets makes them.
#![allow(unsafe_code, reason = "nothing safe makes a packet(7) address or sets its options")]

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd as _;

use anyhow::{Context as _, Result, bail};
use nix::libc;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::{Netns, Node};

const TCP: u8 = 6;
const FRAGMENT: u8 = 44;

/// A packet(7) socket on one device.
#[derive(Debug)]
pub struct PacketSocket(Socket);

impl PacketSocket {
    /// Opens one in a namespace. With `bypass` its packets skip the queueing discipline, and with
    /// it the egress programs of the device.
    pub fn open(netns: &Netns, device: &str, bypass: bool) -> Result<Self> {
        let index = i32::try_from(netns.ifindex(device)?)?;
        let socket = netns.run(|| Socket::new(Domain::PACKET, Type::RAW, None))?;
        if bypass {
            let on: libc::c_int = 1;
            // SAFETY: the value is an int that outlives the call, and its size is given.
            let result = unsafe {
                libc::setsockopt(
                    socket.as_raw_fd(),
                    libc::SOL_PACKET,
                    libc::PACKET_QDISC_BYPASS,
                    (&raw const on).cast(),
                    size_of_val(&on) as libc::socklen_t,
                )
            };
            nix::errno::Errno::result(result).context("PACKET_QDISC_BYPASS")?;
        }
        // SAFETY: the storage is large enough for sockaddr_ll, of which every field is set or
        // zero, and the length is that of it.
        let ((), address) = unsafe {
            SockAddr::try_init(|storage, length| {
                let link: *mut libc::sockaddr_ll = storage.cast();
                link.write(libc::sockaddr_ll {
                    sll_family: libc::AF_PACKET as u16,
                    sll_protocol: 0,
                    sll_ifindex: index,
                    sll_hatype: 0,
                    sll_pkttype: 0,
                    sll_halen: 0,
                    sll_addr: [0; 8],
                });
                *length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
                io::Result::Ok(())
            })
        }?;
        socket.bind(&address)?;
        Ok(Self(socket))
    }

    /// Sends one frame. That a guard drops it is no error.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        match self.0.send(frame) {
            Ok(_) => Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(()),
            Err(error) => Err(error).context("sending the frame"),
        }
    }
}

/// Sends an IP packet, header and all, through a raw socket of this protocol. That a guard drops
/// it is no error.
pub fn send_packet(netns: &Netns, protocol: i32, to: IpAddr, packet: &[u8]) -> Result<()> {
    let domain = if to.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
    let socket = netns.run(|| Socket::new(domain, Type::RAW, Some(Protocol::from(protocol))))?;
    match to {
        IpAddr::V4(_) => socket.set_header_included_v4(true)?,
        IpAddr::V6(_) => socket.set_header_included_v6(true)?,
    }
    match socket.send_to(packet, &SocketAddr::new(to, 0).into()) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        Err(error) => Err(error).context("sending the packet"),
    }
}

/// The hardware address of the node's bridge, where its pods send what is for elsewhere.
pub fn gateway_address(node: &Node) -> Result<[u8; 6]> {
    let listing = node.output("ip", &["-o", "link", "show", "dev", "cni0"])?;
    let text = listing.split_whitespace().skip_while(|word| *word != "link/ether").nth(1);
    let bytes = text
        .context("cni0 has no hardware address")?
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16))
        .collect::<Result<Vec<_>, _>>()?;
    bytes.try_into().ok().context("a hardware address has 6 bytes")
}

/// An Ethernet frame; `tags` are VLAN tags, 4 bytes each.
pub fn frame(to: [u8; 6], tags: &[u8], ethertype: u16, packet: &[u8]) -> Vec<u8> {
    let mut frame = to.to_vec();
    frame.extend([2, 0, 0, 0, 0, 1]);
    frame.extend(tags);
    frame.extend(ethertype.to_be_bytes());
    frame.extend(packet);
    frame
}

/// A TCP segment with a payload in an IP packet of the family of the addresses.
pub fn tcp_packet(from: SocketAddr, to: SocketAddr, payload: &[u8]) -> Result<Vec<u8>> {
    match (from.ip(), to.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let segment = tcp_segment(from, to, payload);
            Ok([ipv4_header(source, destination, segment.len())?, segment].concat())
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let segment = tcp_segment(from, to, payload);
            Ok([ipv6_header(source, destination, TCP, segment.len())?, segment].concat())
        }
        _ => bail!("{from} and {to} are not of one family"),
    }
}

/// The same behind IPv6 extension headers, 8 bytes each.
pub fn tcp_behind(
    headers: &[u8],
    from: SocketAddr,
    to: SocketAddr,
    payload: &[u8],
) -> Result<Vec<u8>> {
    let (IpAddr::V6(source), IpAddr::V6(destination)) = (from.ip(), to.ip()) else {
        bail!("IPv4 has no extension headers");
    };
    let mut body = tcp_segment(from, to, payload);
    let mut next = TCP;
    for header in headers.iter().rev() {
        let bytes = match *header {
            // The first of several; the others never come.
            FRAGMENT => [next, 0, 0, 1, 0, 0, 0, 7],
            // Among options this is PadN of 4.
            _ => [next, 0, 1, 4, 0, 0, 0, 0],
        };
        body.splice(..0, bytes);
        next = *header;
    }
    Ok([ipv6_header(source, destination, next, body.len())?, body].concat())
}

fn ipv4_header(source: Ipv4Addr, destination: Ipv4Addr, payload: usize) -> Result<Vec<u8>> {
    let length = u16::try_from(20 + payload)?.to_be_bytes();
    let mut header = vec![0x45, 0, length[0], length[1], 0, 1, 0, 0, 64, TCP, 0, 0];
    header.extend(source.octets());
    header.extend(destination.octets());
    let checksum = checksum(&header).to_be_bytes();
    header[10..12].copy_from_slice(&checksum);
    Ok(header)
}

fn ipv6_header(
    source: Ipv6Addr,
    destination: Ipv6Addr,
    next: u8,
    payload: usize,
) -> Result<Vec<u8>> {
    let length = u16::try_from(payload)?.to_be_bytes();
    let mut header = vec![0x60, 0, 0, 0, length[0], length[1], next, 64];
    header.extend(source.octets());
    header.extend(destination.octets());
    Ok(header)
}

/// PSH and ACK, with no checksum: it is only to be seen on the wire, nobody shall accept it.
fn tcp_segment(from: SocketAddr, to: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let mut segment = Vec::new();
    segment.extend(from.port().to_be_bytes());
    segment.extend(to.port().to_be_bytes());
    segment.extend([0, 0, 0, 1, 0, 0, 0, 1, 5 << 4, 0x18, 0xff, 0xff, 0, 0, 0, 0]);
    segment.extend(payload);
    segment
}

/// RFC 1071, of an even number of bytes.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks_exact(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]));
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded + (folded >> 16)) & 0xffff) as u16
}
