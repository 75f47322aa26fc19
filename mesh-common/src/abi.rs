//! Map keys and values shared by the eBPF programs and the agent.
//!
//! Integers and byte arrays only, no implicit padding, sizes asserted. A change of any layout here
//! must raise [`ABI_VERSION`]: the pins of another version are never opened.

/// Names the bpffs directory that holds the pins, `v<ABI_VERSION>`.
pub const ABI_VERSION: u32 = 1;

/// Firewall mark of every captured packet, honoured by the pod's own policy rule.
///
/// It is no secret and grants nothing: a packet with this mark goes to loopback.
pub const CAPTURE_MARK: u32 = 0x4d45_5348;

/// Routing table, in each pod, that delivers marked packets to loopback.
pub const CAPTURE_TABLE: u32 = 0x4d45_5348;

/// Preference of the policy rule that selects [`CAPTURE_TABLE`]: behind `local` (0), which keeps
/// loopback and the pod's own addresses local, and before everybody else's.
pub const CAPTURE_RULE_PRIORITY: u32 = 1;

/// How many addresses a pod can have.
pub const MAX_POD_ADDRESSES: usize = 8;

/// How many pods one node can have. Kubernetes' default limit is 110.
pub const MAX_PODS: u32 = 4096;

/// How many connections that the node itself opened are remembered; the least recently used go
/// first, and with it the pod's answers stop. Some 3 MB.
pub const MAX_HOST_FLOWS: u32 = 32_768;

/// Index of a pod's outbound listener in its `LISTENERS` map.
pub const OUTBOUND_LISTENER: u32 = 0;

/// Index of a pod's inbound listener in its `LISTENERS` map.
pub const INBOUND_LISTENER: u32 = 1;

/// Index of the guard of pods' devices with an Ethernet header in the map `GUARDS`.
pub const GUARD_DEVICE: u32 = 0;

/// Index of the guard of pods' devices without one.
pub const GUARD_DEVICE_L3: u32 = 1;

/// Index of the guard of their other ends.
pub const GUARD_PEER: u32 = 2;

/// How many guards there are in the map.
pub const MAX_GUARDS: u32 = 3;

/// Tag of an agent's socket that carries a tunnel: whatever it sends is encrypted.
pub const TAG_TUNNEL: u32 = 1;

/// Tag of an agent's socket that carries plaintext which the policy allows, to the address that it
/// is connected to and nowhere else.
pub const TAG_PLAINTEXT: u32 = 2;

/// Tag of an agent's socket that faces an application, by loopback: what it sends must not leave.
pub const TAG_APPLICATION: u32 = 3;

/// Set in [`PodConfig::flags`]: UDP of this pod is dropped, except to port 53.
pub const POD_DENIES_UDP: u32 = 1;

/// Set in [`PodConfig::flags`]: IPv4 of this pod can be captured, it has an address to talk from.
pub const POD_HAS_V4: u32 = 2;

/// Set in [`PodConfig::flags`]: the same for IPv6.
pub const POD_HAS_V6: u32 = 4;

/// An IPv6 address, or an IPv4 one as IPv4-mapped IPv6, in network byte order.
pub type Address = [u8; 16];

/// The first 12 bytes of an IPv4-mapped IPv6 address.
pub const V4_MAPPED_PREFIX: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];

/// An enrolled pod: the value of the map `PODS`, whose key is the cookie of its network namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct PodConfig {
    /// The pod's own addresses, the first `address_count` valid.
    pub addresses: [Address; MAX_POD_ADDRESSES],
    /// How many of `addresses` are valid.
    pub address_count: u32,
    /// `POD_*` bits.
    pub flags: u32,
    /// Port of the agent's outbound listener in the pod, 0 while there is none: the connect hooks
    /// probe it to refuse at once when the agent is gone.
    pub listener_port: u32,
    /// No implicit padding.
    pub reserved: u32,
}

const _: () = assert!(size_of::<PodConfig>() == 16 * MAX_POD_ADDRESSES + 16);

/// A TCP connection, by its ends: the key of the map `HOST_FLOWS`, of those that the node itself
/// opened. The value is when it was closed, in nanoseconds of the monotonic clock; 0 while it is
/// open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Flow {
    /// The address that it was opened from.
    pub client: Address,
    /// The address that it was opened to.
    pub server: Address,
    /// The port that it was opened from.
    pub client_port: u16,
    /// The port that it was opened to.
    pub server_port: u16,
}

const _: () = assert!(size_of::<Flow>() == 36);

/// Where a verdict was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Layer {
    /// `connect()` of a socket in the pod.
    Connect = 0,
    /// The cgroup egress hook, by network namespace.
    Cgroup = 1,
    /// tcx egress on a device of the pod, by socket tag.
    Device = 2,
    /// tcx ingress on the host-side peer of a device of the pod.
    Peer = 3,
    /// `sk_lookup` in the pod.
    Lookup = 4,
}

impl Layer {
    /// Every layer, in the order of their numbers.
    pub const ALL: [Self; 5] =
        [Self::Connect, Self::Cgroup, Self::Device, Self::Peer, Self::Lookup];

    /// The name shown by `status` and in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Cgroup => "cgroup",
            Self::Device => "device",
            Self::Peer => "peer",
            Self::Lookup => "lookup",
        }
    }
}

/// Why something of an enrolled pod was refused or dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Reason {
    /// TCP of a socket that is not the agent's.
    Plaintext = 0,
    /// A transport protocol that is neither TCP, UDP nor ICMP.
    Protocol = 1,
    /// UDP of a pod that denies it.
    Udp = 2,
    /// A frame that is neither ARP, IPv4 nor IPv6, or that carries a VLAN tag.
    EtherType = 3,
    /// Headers that cannot be followed to the transport protocol.
    Malformed = 4,
    /// A packet that did not pass the guard on the pod's own device.
    Bypass = 5,
    /// The agent has no listener in the pod: it is dead or starting.
    AgentGone = 6,
    /// The socket is bound to a device, which would take it past the capture.
    BoundDevice = 7,
    /// The kernel refused to mark the socket.
    Unmarkable = 8,
    /// The program found no configuration for the pod it guards, or the pod no guard.
    Unconfigured = 9,
    /// The pod has no address of the destination's family.
    NoAddress = 10,
}

/// The number of [`Reason`]s.
pub const REASONS: usize = 11;

impl Reason {
    /// Every reason, in the order of their numbers.
    pub const ALL: [Self; REASONS] = [
        Self::Plaintext,
        Self::Protocol,
        Self::Udp,
        Self::EtherType,
        Self::Malformed,
        Self::Bypass,
        Self::AgentGone,
        Self::BoundDevice,
        Self::Unmarkable,
        Self::Unconfigured,
        Self::NoAddress,
    ];

    /// The name shown by `status` and in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Plaintext => "plaintext",
            Self::Protocol => "protocol",
            Self::Udp => "udp",
            Self::EtherType => "ethertype",
            Self::Malformed => "malformed",
            Self::Bypass => "bypass",
            Self::AgentGone => "agent-gone",
            Self::BoundDevice => "bound-device",
            Self::Unmarkable => "unmarkable",
            Self::Unconfigured => "unconfigured",
            Self::NoAddress => "no-address",
        }
    }
}

/// What was dropped of a pod: the value of the map `COUNTERS`, keyed as `PODS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct PodCounters {
    /// Drops by `[Layer][Reason]`.
    pub drops: [[u64; REASONS]; Layer::ALL.len()],
    /// UDP datagrams that left by a device of the pod: nobody encrypts them.
    pub datagrams: u64,
    /// When a drop was last logged, in nanoseconds of the monotonic clock.
    pub last_logged: u64,
}

impl PodCounters {
    /// Nothing dropped yet.
    pub const ZERO: Self =
        Self { drops: [[0; REASONS]; Layer::ALL.len()], datagrams: 0, last_logged: 0 };
}

const _: () = assert!(size_of::<PodCounters>() == 8 * (REASONS * 5 + 2));

/// What the programs tell the agent at once, through the ring buffer `EVENTS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Event {
    /// The pod's network namespace cookie, 0 if the event is of no pod.
    pub cookie: u64,
    /// [`EVENT_DROP`] or [`EVENT_SYSCTL`].
    pub kind: u32,
    /// The [`Layer`] of a drop, as its number.
    pub layer: u32,
    /// The [`Reason`] of a drop, as its number.
    pub reason: u32,
    /// No implicit padding.
    pub reserved: u32,
}

const _: () = assert!(size_of::<Event>() == 24);

/// [`Event::kind`]: something of a pod was dropped. At most one in some seconds for each pod.
pub const EVENT_DROP: u32 = 1;

/// [`Event::kind`]: somebody is about to write a setting that the capture rests on.
pub const EVENT_SYSCTL: u32 = 2;

impl Event {
    /// Reads an event from the bytes of a ring buffer record.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let word = |at| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let cookie = u64::from_ne_bytes(bytes.get(..8)?.try_into().ok()?);
        let (kind, layer, reason) = (word(8)?, word(12)?, word(16)?);
        Some(Self { cookie, kind, layer, reason, reserved: 0 })
    }
}

#[cfg(feature = "aya")]
mod pod {
    #![allow(unsafe_code, reason = "the marker trait by which aya copies map values is unsafe")]

    // SAFETY: `repr(C)`, integers and arrays of integers only, and no padding: see the assertion.
    unsafe impl aya::Pod for super::PodConfig {}
    // SAFETY: the same.
    unsafe impl aya::Pod for super::PodCounters {}
    // SAFETY: the same.
    unsafe impl aya::Pod for super::Flow {}
}
