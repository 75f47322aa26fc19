//! Finds the TCP segment in an Ethernet frame.
//!
//! This judges what the mesh has put on the wire, so it shares no code with the mesh.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// The TCP flag FIN.
pub const FIN: u8 = 0x01;
/// The TCP flag SYN.
pub const SYN: u8 = 0x02;
/// The TCP flag RST.
pub const RST: u8 = 0x04;

const ETHERNET_HEADER: usize = 14;
const VLAN_TAG: usize = 4;
const TCP: u8 = 6;

/// A TCP segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment<'a> {
    /// Who sent it.
    pub source: SocketAddr,
    /// Whom it is for.
    pub destination: SocketAddr,
    /// The sequence number of its first byte.
    pub sequence: u32,
    /// [`FIN`], [`SYN`], [`RST`] and the others.
    pub flags: u8,
    /// What it carries.
    pub payload: &'a [u8],
}

/// The TCP segment in an Ethernet frame, if there is a whole one.
pub fn segment(frame: &[u8]) -> Option<Segment<'_>> {
    let mut ethertype = be16(frame, 12)?;
    let mut packet = frame.get(ETHERNET_HEADER..)?;
    while matches!(ethertype, 0x8100 | 0x88a8) {
        ethertype = be16(packet, 2)?;
        packet = packet.get(VLAN_TAG..)?;
    }
    match ethertype {
        0x0800 => ipv4(packet),
        0x86dd => ipv6(packet),
        _ => None,
    }
}

fn ipv4(packet: &[u8]) -> Option<Segment<'_>> {
    let header = usize::from(packet.first()? & 0xf) * 4;
    let fragment_offset = be16(packet, 6)? & 0x1fff;
    if *packet.get(9)? != TCP || fragment_offset != 0 {
        return None;
    }
    let address = |at| Some(Ipv4Addr::from(packet.get(at..at + 4)?.first_chunk::<4>().copied()?));
    // What is behind the packet is padding of a short frame.
    let segment = packet.get(header..usize::from(be16(packet, 2)?))?;
    tcp(address(12)?.into(), address(16)?.into(), segment)
}

fn ipv6(packet: &[u8]) -> Option<Segment<'_>> {
    const HEADER: usize = 40;
    let address = |at| Some(Ipv6Addr::from(packet.get(at..at + 16)?.first_chunk::<16>().copied()?));
    let mut rest = packet.get(HEADER..HEADER + usize::from(be16(packet, 4)?))?;
    let mut next = *packet.get(6)?;
    // Hop-by-hop options, routing, destination options: a length in units of 8 bytes.
    while matches!(next, 0 | 43 | 60) {
        next = *rest.first()?;
        rest = rest.get((usize::from(*rest.get(1)?) + 1) * 8..)?;
    }
    if next != TCP {
        return None;
    }
    tcp(address(8)?.into(), address(24)?.into(), rest)
}

fn tcp(source: IpAddr, destination: IpAddr, segment: &[u8]) -> Option<Segment<'_>> {
    let header = usize::from(segment.get(12)? >> 4) * 4;
    Some(Segment {
        source: SocketAddr::new(source, be16(segment, 0)?),
        destination: SocketAddr::new(destination, be16(segment, 2)?),
        sequence: u32::from_be_bytes(*segment.get(4..8)?.first_chunk()?),
        flags: *segment.get(13)?,
        payload: segment.get(header..)?,
    })
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..at + 2)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp_bytes(payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0x1f, 0x90, 0x00, 0x50, 0, 0, 0, 7, 0, 0, 0, 0, 5 << 4, SYN, 0, 0];
        bytes.extend([0; 4]);
        bytes.extend(payload);
        bytes
    }

    fn frame(tags: &[u8], ethertype: u16, packet: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 12];
        bytes.extend(tags);
        bytes.extend(ethertype.to_be_bytes());
        bytes.extend(packet);
        bytes
    }

    fn v4_packet(payload: &[u8]) -> Vec<u8> {
        let tcp = tcp_bytes(payload);
        let length = u8::try_from(20 + tcp.len()).unwrap();
        let mut bytes =
            vec![0x45, 0, 0, length, 0, 0, 0, 0, 64, TCP, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
        bytes.extend(tcp);
        bytes
    }

    #[test]
    fn v4_without_padding() {
        let mut padded = frame(&[], 0x0800, &v4_packet(b"hi"));
        padded.extend([0; 4]);
        let found = segment(&padded).unwrap();
        assert_eq!(found.source, "10.0.0.1:8080".parse().unwrap());
        assert_eq!(found.destination, "10.0.0.2:80".parse().unwrap());
        assert_eq!((found.sequence, found.flags, found.payload), (7, SYN, &b"hi"[..]));
    }

    #[test]
    fn vlan_tags_are_walked() {
        let tagged = frame(&[0x81, 0, 0, 5, 0x88, 0xa8, 0, 6], 0x0800, &v4_packet(b"x"));
        assert_eq!(segment(&tagged).unwrap().payload, b"x");
    }

    #[test]
    fn v6_extension_headers_are_walked() {
        let tcp = tcp_bytes(b"abc");
        let length = u8::try_from(tcp.len() + 8).unwrap();
        let mut packet = vec![0x60, 0, 0, 0, 0, length, 60, 64];
        packet.extend([0; 32]);
        packet.extend([TCP, 0, 1, 4, 0, 0, 0, 0]);
        packet.extend(tcp);
        assert_eq!(segment(&frame(&[], 0x86dd, &packet)).unwrap().payload, b"abc");
    }

    #[test]
    fn every_truncation_is_no_segment() {
        let whole = frame(&[], 0x0800, &v4_packet(b"payload"));
        for length in 0..whole.len() {
            assert_eq!(segment(&whole[..length]), None, "{length} bytes");
        }
    }
}
