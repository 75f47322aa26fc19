//! From the bytes of a packet to its transport protocol. Total: what cannot be followed to the end
//! is [`Malformed`].

use mesh_common::abi::{Address, V4_MAPPED_PREFIX};

const ICMP: u8 = 1;
const IGMP: u8 = 2;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;

/// RFC 8200 allows a sender six extension headers at most; some kernels repeat one.
const MAX_EXTENSION_HEADERS: usize = 8;

const IPV4_HEADER: u32 = 20;
const IPV6_HEADER: u32 = 40;
const TCP_HEADER: u32 = 20;

/// Bits of the TCP flags byte, RFC 9293 section 3.1.
pub(crate) const SYN: u8 = 0x02;
pub(crate) const RST: u8 = 0x04;
pub(crate) const ACK: u8 = 0x10;

/// Headers that cannot be followed to the transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Malformed;

/// Bytes of a packet.
pub(crate) trait Bytes {
    /// The bytes at `offset`, if the packet has them all.
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]>;
    /// The length of the packet in bytes.
    fn len(&self) -> u32;
}

/// What a packet carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    /// A TCP segment. `payload` counts every byte behind the header, trailers included.
    Tcp { ports: Ports, payload: u32, flags: u8 },
    /// A part of a TCP segment, or one that may be: its header cannot be trusted to be whole.
    TcpFragment,
    /// A UDP datagram; no port in later fragments.
    Udp { port: Option<u16> },
    /// ICMP, IGMP, ICMPv6.
    Control,
    /// Anything else.
    Other,
}

/// The ports of a segment, in host byte order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ports {
    pub(crate) source: u16,
    pub(crate) destination: u16,
}

/// Where the IPv4 or IPv6 packet that begins at `offset` says it comes from.
#[inline(always)]
pub(crate) fn source<B: Bytes>(packet: &B, offset: u32) -> Option<Address> {
    address(packet, offset, 12, 8)
}

/// Where the IPv4 or IPv6 packet that begins at `offset` goes.
#[inline(always)]
pub(crate) fn destination<B: Bytes>(packet: &B, offset: u32) -> Option<Address> {
    address(packet, offset, 16, 24)
}

/// The address that lies at `v4` in an IPv4 header, at `v6` in an IPv6 one.
#[inline(always)]
fn address<B: Bytes>(packet: &B, offset: u32, v4: u32, v6: u32) -> Option<Address> {
    let [first] = packet.load(offset)?;
    match first >> 4 {
        4 => {
            let mut address = [0; 16];
            address[..12].copy_from_slice(&V4_MAPPED_PREFIX);
            address[12..].copy_from_slice(&packet.load::<4>(offset + v4)?);
            Some(address)
        }
        6 => packet.load(offset + v6),
        _ => None,
    }
}

/// The transport of the IPv4 or IPv6 packet that begins at `offset`.
#[inline(always)]
pub(crate) fn transport<B: Bytes>(packet: &B, offset: u32) -> Result<Transport, Malformed> {
    let [first] = packet.load(offset).ok_or(Malformed)?;
    match first >> 4 {
        4 => ipv4(packet, offset, first),
        6 => ipv6(packet, offset),
        _ => Err(Malformed),
    }
}

#[inline(always)]
fn ipv4<B: Bytes>(packet: &B, offset: u32, first: u8) -> Result<Transport, Malformed> {
    let header = u32::from(first & 0x0f) * 4;
    if header < IPV4_HEADER {
        return Err(Malformed);
    }
    let [fragment_high, fragment_low] = packet.load(offset + 6).ok_or(Malformed)?;
    // More fragments to come, or not the first.
    let fragmented = fragment_high & 0x3f != 0 || fragment_low != 0;
    let first_fragment = fragment_high & 0x1f == 0 && fragment_low == 0;
    let [protocol] = packet.load(offset + 9).ok_or(Malformed)?;
    payload(packet, offset + header, protocol, fragmented, first_fragment)
}

#[inline(always)]
fn ipv6<B: Bytes>(packet: &B, offset: u32) -> Result<Transport, Malformed> {
    let [mut next] = packet.load(offset + 6).ok_or(Malformed)?;
    let mut at = offset + IPV6_HEADER;
    let mut fragmented = false;
    let mut first_fragment = true;
    for _ in 0..MAX_EXTENSION_HEADERS {
        match next {
            HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS if first_fragment => {
                let [following, length] = packet.load(at).ok_or(Malformed)?;
                next = following;
                at += (u32::from(length) + 1) * 8;
            }
            FRAGMENT if !fragmented => {
                let [following, _, high, low] = packet.load(at).ok_or(Malformed)?;
                fragmented = true;
                first_fragment = high == 0 && low & 0xf8 == 0;
                next = following;
                at += 8;
            }
            protocol => return payload(packet, at, protocol, fragmented, first_fragment),
        }
    }
    Err(Malformed)
}

#[inline(always)]
fn payload<B: Bytes>(
    packet: &B,
    at: u32,
    protocol: u8,
    fragmented: bool,
    first_fragment: bool,
) -> Result<Transport, Malformed> {
    match protocol {
        TCP if fragmented => Ok(Transport::TcpFragment),
        TCP => {
            let [s, t, d, e, .., data_offset, flags] = packet.load::<14>(at).ok_or(Malformed)?;
            let ports = Ports {
                source: u16::from_be_bytes([s, t]),
                destination: u16::from_be_bytes([d, e]),
            };
            let header = u32::from(data_offset >> 4) * 4;
            let end = at + header;
            if header < TCP_HEADER || end > packet.len() {
                return Err(Malformed);
            }
            Ok(Transport::Tcp { ports, payload: packet.len() - end, flags })
        }
        UDP if first_fragment => {
            let port = packet.load(at + 2).ok_or(Malformed)?;
            Ok(Transport::Udp { port: Some(u16::from_be_bytes(port)) })
        }
        UDP => Ok(Transport::Udp { port: None }),
        ICMP | IGMP | ICMPV6 => Ok(Transport::Control),
        // A later fragment behind extension headers that only the first one shows.
        _ if !first_fragment => Err(Malformed),
        _ => Ok(Transport::Other),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    impl Bytes for Vec<u8> {
        fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
            let offset = offset as usize;
            self.get(offset..offset + N)?.try_into().ok()
        }

        fn len(&self) -> u32 {
            self.as_slice().len() as u32
        }
    }

    pub(crate) fn tcp(payload: usize, flags: u8) -> Vec<u8> {
        let mut segment = vec![0; 20 + payload];
        segment[12] = 5 << 4;
        segment[13] = flags;
        segment
    }

    pub(crate) fn v4(protocol: u8, fragment: u16, body: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; 20];
        packet[0] = 0x45;
        packet[6..8].copy_from_slice(&fragment.to_be_bytes());
        packet[9] = protocol;
        packet.extend_from_slice(body);
        packet
    }

    pub(crate) fn v6(next: u8, body: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; 40];
        packet[0] = 0x60;
        packet[6] = next;
        packet.extend_from_slice(body);
        packet
    }

    #[test]
    fn the_addresses_are_found_in_both_families() {
        let mut packet = v4(TCP, 0, &[]);
        packet[12..20].copy_from_slice(&[10, 1, 0, 2, 10, 1, 0, 3]);
        let mapped = |last| std::net::Ipv4Addr::new(10, 1, 0, last).to_ipv6_mapped().octets();
        assert_eq!(source(&packet, 0), Some(mapped(2)));
        assert_eq!(destination(&packet, 0), Some(mapped(3)));
        assert_eq!(source(&packet[..15].to_vec(), 0), None);
        assert_eq!(destination(&packet[..19].to_vec(), 0), None);
        let mut packet = v6(TCP, &[]);
        packet[8..24].copy_from_slice(&[6; 16]);
        packet[24..40].copy_from_slice(&[7; 16]);
        assert_eq!(source(&packet, 0), Some([6; 16]));
        assert_eq!(destination(&packet, 0), Some([7; 16]));
        assert_eq!(destination(&vec![0x50], 0), None);
    }

    fn extension(next: u8, units: u8) -> Vec<u8> {
        let mut header = vec![0; (usize::from(units) + 1) * 8];
        header[0] = next;
        header[1] = units;
        header
    }

    #[test]
    fn tcp_is_found_in_both_families() {
        let ports = Ports { source: 0x1f90, destination: 0x8001 };
        let expected = Ok(Transport::Tcp { ports, payload: 3, flags: RST });
        let mut segment = tcp(3, RST);
        segment[..4].copy_from_slice(&[0x1f, 0x90, 0x80, 0x01]);
        assert_eq!(transport(&v4(TCP, 0, &segment), 0), expected);
        assert_eq!(transport(&v6(TCP, &segment), 0), expected);
    }

    #[test]
    fn the_do_not_fragment_bit_is_no_fragment() {
        let packet = v4(TCP, 0x4000, &tcp(0, 0));
        let (ports, payload) = (Ports::default(), 0);
        assert_eq!(transport(&packet, 0), Ok(Transport::Tcp { ports, payload, flags: 0 }));
    }

    #[test]
    fn fragments_of_tcp_are_never_judged_by_their_header() {
        for fragment in [0x2000, 0x2001, 0x0001] {
            let packet = v4(TCP, fragment, &tcp(0, RST));
            assert_eq!(transport(&packet, 0), Ok(Transport::TcpFragment));
        }
    }

    #[test]
    fn extension_headers_are_walked() {
        for kind in [HOP_BY_HOP, ROUTING, DESTINATION_OPTIONS] {
            let mut body = extension(kind, 1);
            body.extend(extension(TCP, 0));
            body.extend(tcp(7, 0));
            let packet = v6(kind, &body);
            let (ports, payload) = (Ports::default(), 7);
            assert_eq!(transport(&packet, 0), Ok(Transport::Tcp { ports, payload, flags: 0 }));
        }
    }

    #[test]
    fn endless_or_unknown_chains_are_refused() {
        let endless: Vec<u8> = (0..20).flat_map(|_| extension(DESTINATION_OPTIONS, 0)).collect();
        assert_eq!(transport(&v6(DESTINATION_OPTIONS, &endless), 0), Err(Malformed));
        assert_eq!(transport(&v6(51, &extension(TCP, 0)), 0), Ok(Transport::Other));
    }

    #[test]
    fn truncated_headers_are_malformed() {
        for packet in [v4(TCP, 0, &tcp(0, 0)), v6(TCP, &tcp(0, 0))] {
            for length in 0..packet.as_slice().len() {
                assert_eq!(transport(&packet[..length].to_vec(), 0), Err(Malformed), "{length}");
            }
        }
    }

    #[test]
    fn a_lying_header_length_is_malformed() {
        let mut packet = v4(TCP, 0, &tcp(0, 0));
        packet[0] = 0x44;
        assert_eq!(transport(&packet, 0), Err(Malformed));
        let mut packet = v4(TCP, 0, &tcp(0, 0));
        packet[20 + 12] = 0xf0;
        assert_eq!(transport(&packet, 0), Err(Malformed));
    }

    #[test]
    fn udp_shows_its_port_in_the_first_fragment_only() {
        let mut datagram = vec![0; 8];
        datagram[3] = 53;
        assert_eq!(transport(&v4(UDP, 0, &datagram), 0), Ok(Transport::Udp { port: Some(53) }));
        assert_eq!(transport(&v4(UDP, 1, &datagram), 0), Ok(Transport::Udp { port: None }));
    }
}
