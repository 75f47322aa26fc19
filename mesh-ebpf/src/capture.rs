//! Which connections go to the agent. Pure decisions.

use mesh_common::abi::{
    Address, Flow, MAX_POD_ADDRESSES, POD_HAS_V4, POD_HAS_V6, PodConfig, Reason, V4_MAPPED_PREFIX,
};

const LOOPBACK_IFINDEX: u32 = 1;

const IPPROTO_TCP: u32 = 6;
/// How the connect hooks see a multipath TCP socket, since 5.6.
const IPPROTO_MPTCP: u32 = 262;

/// What a connecting socket is, each fact asked for only when it matters.
pub(crate) trait Connecting {
    fn protocol(&self) -> u32;
    /// Tagged as one of the agent's own.
    fn is_agent(&self) -> bool;
    fn bound_ifindex(&self) -> u32;
    /// Whether the agent has its outbound listener open in the pod.
    fn agent_listens(&self) -> bool;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Connect {
    /// Not the mesh's: the guards judge what is sent.
    Leave,
    /// To be marked, so that it is routed to the agent.
    Capture,
}

/// What happens to a `connect()` of a socket in `pod`.
#[inline(always)]
pub(crate) fn connect<S: Connecting>(
    pod: &PodConfig,
    destination: &Address,
    socket: S,
) -> Result<Connect, Reason> {
    if !matches!(socket.protocol(), IPPROTO_TCP | IPPROTO_MPTCP)
        || is_local(pod, destination)
        || socket.is_agent()
    {
        return Ok(Connect::Leave);
    }
    // A link-local destination names its device, to which the kernel binds the socket after this.
    if socket.bound_ifindex() > LOOPBACK_IFINDEX || is_link_local_v6(destination) {
        return Err(Reason::BoundDevice);
    }
    let family = if is_v4(destination) { POD_HAS_V4 } else { POD_HAS_V6 };
    if pod.flags & family == 0 {
        return Err(Reason::NoAddress);
    }
    if !socket.agent_listens() {
        return Err(Reason::AgentGone);
    }
    Ok(Connect::Capture)
}

/// An incoming connection that looks for its listener.
#[derive(Clone, Copy)]
pub(crate) struct Lookup {
    pub(crate) protocol: u32,
    pub(crate) ingress_ifindex: u32,
    /// Where it says it comes from, and where it wants to go.
    pub(crate) flow: Flow,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Steer {
    /// To whoever listens there.
    Leave,
    Outbound,
    Inbound,
}

/// Who receives an incoming connection in `pod`; `host_connects` tells whether the node itself is
/// opening one, or has it open.
#[inline(always)]
pub(crate) fn steer(
    pod: Option<&PodConfig>,
    lookup: &Lookup,
    host_connects: impl FnOnce(&Flow) -> bool,
) -> Result<Steer, Reason> {
    let Lookup { flow, .. } = lookup;
    if lookup.protocol != IPPROTO_TCP || is_loopback(&flow.server) {
        return Ok(Steer::Leave);
    }
    let pod = pod.ok_or(Reason::Unconfigured)?;
    let to_itself = is_own(pod, &flow.server);
    if lookup.ingress_ifindex == LOOPBACK_IFINDEX {
        // To the pod itself over loopback comes only the agent, for a client outside.
        return Ok(if to_itself { Steer::Leave } else { Steer::Outbound });
    }
    // A pod that talks to its own address: the kernel names the device of that address, though
    // the packet came by loopback. From outside, IPv4 drops such sources (rp_filter or not), and
    // with IPv6 the answer goes to the pod itself, so that no connection comes about.
    if to_itself && (is_own(pod, &flow.client) || host_connects(flow)) {
        return Ok(Steer::Leave);
    }
    Ok(Steer::Inbound)
}

#[inline(always)]
fn is_local(pod: &PodConfig, address: &Address) -> bool {
    is_loopback(address) || is_unspecified(address) || is_own(pod, address)
}

#[inline(always)]
pub(crate) fn is_own(pod: &PodConfig, address: &Address) -> bool {
    for index in 0..MAX_POD_ADDRESSES {
        if index as u32 >= pod.address_count {
            return false;
        }
        if equal(&pod.addresses[index], address) {
            return true;
        }
    }
    false
}

#[inline(always)]
pub(crate) fn is_loopback(address: &Address) -> bool {
    if is_v4(address) { address[12] == 127 } else { word(address, 0) == 0 && tail(address) == 1 }
}

/// `connect()` to no address means the local host.
#[inline(always)]
fn is_unspecified(address: &Address) -> bool {
    let v4 = is_v4(address) && tail(address) as u32 == 0;
    v4 || (word(address, 0) == 0 && tail(address) == 0)
}

#[inline(always)]
fn is_link_local_v6(address: &Address) -> bool {
    address[0] == 0xfe && address[1] & 0xc0 == 0x80
}

#[inline(always)]
fn is_v4(address: &Address) -> bool {
    let [.., a, b, c, d] = V4_MAPPED_PREFIX;
    word(address, 0) == 0 && [address[8], address[9], address[10], address[11]] == [a, b, c, d]
}

#[inline(always)]
fn equal(a: &Address, b: &Address) -> bool {
    word(a, 0) == word(b, 0) && tail(a) == tail(b)
}

#[inline(always)]
fn tail(address: &Address) -> u64 {
    word(address, 8)
}

#[inline(always)]
fn word(address: &Address, at: usize) -> u64 {
    u64::from_be_bytes([
        address[at],
        address[at + 1],
        address[at + 2],
        address[at + 3],
        address[at + 4],
        address[at + 5],
        address[at + 6],
        address[at + 7],
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::IpAddr;

    fn address(text: &str) -> Address {
        match text.parse().unwrap() {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            IpAddr::V6(v6) => v6.octets(),
        }
    }

    fn pod() -> PodConfig {
        let mut addresses = [[0; 16]; MAX_POD_ADDRESSES];
        addresses[0] = address("10.1.0.2");
        addresses[1] = address("fd00:1::2");
        let flags = POD_HAS_V4 | POD_HAS_V6;
        PodConfig { addresses, address_count: 2, flags, listener_port: 1, reserved: 0 }
    }

    #[derive(Clone, Copy)]
    struct Socket {
        protocol: u32,
        agent: bool,
        bound: u32,
        listens: bool,
    }

    const APPLICATION: Socket =
        Socket { protocol: IPPROTO_TCP, agent: false, bound: 0, listens: true };

    impl Connecting for Socket {
        fn protocol(&self) -> u32 {
            self.protocol
        }

        fn is_agent(&self) -> bool {
            self.agent
        }

        fn bound_ifindex(&self) -> u32 {
            self.bound
        }

        fn agent_listens(&self) -> bool {
            self.listens
        }
    }

    fn to(destination: &str, socket: Socket) -> Result<Connect, Reason> {
        connect(&pod(), &address(destination), socket)
    }

    #[test]
    fn tcp_and_mptcp_to_others_are_captured() {
        for destination in ["10.1.0.3", "169.254.169.254", "8.8.8.8", "fd00:1::3", "::2"] {
            assert_eq!(to(destination, APPLICATION), Ok(Connect::Capture), "{destination}");
            let mptcp = Socket { protocol: IPPROTO_MPTCP, ..APPLICATION };
            assert_eq!(to(destination, mptcp), Ok(Connect::Capture), "{destination}");
        }
    }

    #[test]
    fn local_destinations_are_left_alone() {
        for destination in
            ["127.0.0.1", "127.9.9.9", "::1", "0.0.0.0", "::", "10.1.0.2", "fd00:1::2"]
        {
            let dead = Socket { listens: false, bound: 7, ..APPLICATION };
            assert_eq!(to(destination, dead), Ok(Connect::Leave), "{destination}");
        }
    }

    #[test]
    fn the_agent_and_other_protocols_are_left_alone() {
        assert_eq!(to("10.1.0.3", Socket { agent: true, ..APPLICATION }), Ok(Connect::Leave));
        assert_eq!(to("10.1.0.3", Socket { protocol: 17, ..APPLICATION }), Ok(Connect::Leave));
    }

    #[test]
    fn what_would_pass_the_agent_by_is_refused() {
        let bound = Socket { bound: 2, ..APPLICATION };
        assert_eq!(to("10.1.0.3", bound), Err(Reason::BoundDevice));
        assert_eq!(to("10.1.0.3", Socket { bound: 1, ..APPLICATION }), Ok(Connect::Capture));
        for link_local in ["fe80::1", "febf::1"] {
            assert_eq!(to(link_local, APPLICATION), Err(Reason::BoundDevice));
        }
        let dead = Socket { listens: false, ..APPLICATION };
        assert_eq!(to("10.1.0.3", dead), Err(Reason::AgentGone));
    }

    #[test]
    fn without_an_address_of_the_family_there_is_no_capture() {
        let without = |flag: u32| {
            let pod = pod();
            PodConfig { flags: pod.flags & !flag, ..pod }
        };
        let to = |pod, destination| connect(&pod, &address(destination), APPLICATION);
        assert_eq!(to(without(POD_HAS_V6), "fd00:1::3"), Err(Reason::NoAddress));
        assert_eq!(to(without(POD_HAS_V6), "10.1.0.3"), Ok(Connect::Capture));
        assert_eq!(to(without(POD_HAS_V4), "10.1.0.3"), Err(Reason::NoAddress));
    }

    fn lookup(ifindex: u32, client: &str, server: &str) -> Lookup {
        let (client, server) = (address(client), address(server));
        let flow = Flow { client, server, client_port: 40_000, server_port: 80 };
        Lookup { protocol: IPPROTO_TCP, ingress_ifindex: ifindex, flow }
    }

    fn arrives(ifindex: u32, client: &str, server: &str) -> Result<Steer, Reason> {
        steer(Some(&pod()), &lookup(ifindex, client, server), |_| false)
    }

    #[test]
    fn connections_find_the_agent_s_listeners() {
        assert_eq!(arrives(1, "10.1.0.2", "10.1.0.3"), Ok(Steer::Outbound));
        assert_eq!(arrives(1, "fd00:1::2", "fd00:1::3"), Ok(Steer::Outbound));
        assert_eq!(arrives(2, "10.1.0.3", "10.1.0.2"), Ok(Steer::Inbound));
        assert_eq!(arrives(2, "fd00:1::3", "fd00:1::2"), Ok(Steer::Inbound));
    }

    #[test]
    fn what_is_local_finds_its_own_listener() {
        assert_eq!(arrives(1, "127.0.0.1", "127.0.0.1"), Ok(Steer::Leave));
        assert_eq!(arrives(1, "10.9.9.9", "10.1.0.2"), Ok(Steer::Leave), "the agent's dial");
        assert_eq!(arrives(2, "10.1.0.2", "10.1.0.2"), Ok(Steer::Leave), "own address");
    }

    #[test]
    fn the_host_s_own_connections_find_the_application() {
        let steer = |ifindex, client, server, port| {
            let host = Flow { client_port: port, ..lookup(2, "10.1.0.1", "10.1.0.2").flow };
            steer(Some(&pod()), &lookup(ifindex, client, server), |flow| *flow == host)
        };
        assert_eq!(steer(2, "10.1.0.1", "10.1.0.2", 40_000), Ok(Steer::Leave));
        // Its address alone is no proof, and it has no business with captured connections.
        assert_eq!(steer(2, "10.1.0.1", "10.1.0.2", 40_001), Ok(Steer::Inbound));
        assert_eq!(steer(1, "10.1.0.1", "10.1.0.3", 40_000), Ok(Steer::Outbound));
    }

    #[test]
    fn without_a_configuration_everything_is_dropped() {
        let lookup = lookup(2, "10.1.0.3", "10.1.0.2");
        assert_eq!(steer(None, &lookup, |_| true), Err(Reason::Unconfigured));
    }
}
