//! The only raw access to program contexts and helpers.

use core::mem;

use aya_ebpf::{
    bindings::{
        BPF_F_CURRENT_NETNS, BPF_SOCK_OPS_STATE_CB_FLAG, bpf_sock, bpf_sock_tuple,
        bpf_sock_tuple__bindgen_ty_1, bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1,
    },
    helpers::{
        bpf_get_netns_cookie, bpf_set_hash, bpf_set_hash_invalid, bpf_set_retval, bpf_setsockopt,
        bpf_sk_fullsock, bpf_sk_lookup_tcp, bpf_sk_release, bpf_skb_load_bytes,
        bpf_sock_ops_cb_flags_set, bpf_sysctl_get_name, bpf_sysctl_get_new_value,
    },
    programs::{
        SkBuffContext, SkLookupContext, SockAddrContext, SockOpsContext, SysctlContext, TcContext,
    },
};
use mesh_common::abi::{
    Address, CAPTURE_MARK, Flow, PodConfig, TAG_APPLICATION, TAG_PLAINTEXT, TAG_TUNNEL,
    V4_MAPPED_PREFIX,
};

use crate::{
    capture::{Connecting, Lookup},
    guard::{Outgoing, Sender},
    maps,
    packet::Bytes,
};

const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;
const SOCK_RAW: u32 = 3;
const IPPROTO_TCP: u32 = 6;
const SOL_SOCKET: i32 = 1;
const SO_MARK: i32 = 36;
const TCP_CLOSE: u32 = 7;
const TCP_LISTEN: u32 = 10;
const ECONNREFUSED: i32 = 111;
const LOCALHOST: u32 = u32::from_ne_bytes([127, 0, 0, 1]);

#[inline(always)]
fn v4_mapped(v4: u32) -> Address {
    let mut address = [0; 16];
    address[..12].copy_from_slice(&V4_MAPPED_PREFIX);
    address[12..].copy_from_slice(&v4.to_ne_bytes());
    address
}

/// Reads an IPv6 address out of a context.
///
/// # Safety
///
/// `words` must be four words of a context.
#[inline(always)]
unsafe fn v6(words: *const [u32; 4]) -> Address {
    let words = words.cast::<u32>();
    // SAFETY: as required of the caller. The verifier allows 32-bit loads of a context only, and
    // volatile keeps them that wide. Both types are 16 bytes of plain integers, in network byte
    // order in memory.
    unsafe {
        mem::transmute([
            words.read_volatile(),
            words.add(1).read_volatile(),
            words.add(2).read_volatile(),
            words.add(3).read_volatile(),
        ])
    }
}

/// The local and the remote address in a context that calls them as `bpf_sk_lookup` and
/// `bpf_sock_ops` do.
macro_rules! addresses {
    ($context:expr) => {
        if (*$context).family == AF_INET {
            (v4_mapped((*$context).local_ip4), v4_mapped((*$context).remote_ip4))
        } else {
            (v6(&raw const (*$context).local_ip6), v6(&raw const (*$context).remote_ip6))
        }
    };
}

// connect()

#[inline(always)]
pub(crate) fn destination4(ctx: &SockAddrContext) -> Address {
    // SAFETY: the context is valid while the program runs.
    v4_mapped(unsafe { (*ctx.sock_addr).user_ip4 })
}

#[inline(always)]
pub(crate) fn destination6(ctx: &SockAddrContext) -> Address {
    // SAFETY: the context is valid while the program runs.
    unsafe { v6(&raw const (*ctx.sock_addr).user_ip6) }
}

#[inline(always)]
pub(crate) fn netns_cookie_of_connect(ctx: &SockAddrContext) -> u64 {
    // SAFETY: the helper takes this context.
    unsafe { bpf_get_netns_cookie(ctx.sock_addr.cast()) }
}

/// The socket of a `connect()`.
pub(crate) struct ConnectingSocket<'a> {
    ctx: &'a SockAddrContext,
    pod: &'a PodConfig,
}

#[inline(always)]
pub(crate) fn connecting<'a>(ctx: &'a SockAddrContext, pod: &'a PodConfig) -> ConnectingSocket<'a> {
    ConnectingSocket { ctx, pod }
}

impl ConnectingSocket<'_> {
    #[inline(always)]
    fn sk(&self) -> *mut bpf_sock {
        // SAFETY: the context is valid while the program runs.
        unsafe { (*self.ctx.sock_addr).__bindgen_anon_1.sk }
    }
}

impl Connecting for ConnectingSocket<'_> {
    #[inline(always)]
    fn protocol(&self) -> u32 {
        // SAFETY: the context is valid while the program runs.
        unsafe { (*self.ctx.sock_addr).protocol }
    }

    #[inline(always)]
    fn is_agent(&self) -> bool {
        let sk = self.sk();
        // SAFETY: the context's own socket, checked.
        !sk.is_null() && matches!(unsafe { maps::tag(sk) }, TAG_TUNNEL | TAG_PLAINTEXT)
    }

    #[inline(always)]
    fn bound_ifindex(&self) -> u32 {
        let sk = self.sk();
        // Without a socket the answer is one that refuses.
        // SAFETY: the context's own socket, checked.
        if sk.is_null() { u32::MAX } else { unsafe { (*sk).bound_dev_if } }
    }

    /// Finds the agent's listener as a client in the pod would, by its port on loopback.
    #[inline(always)]
    fn agent_listens(&self) -> bool {
        let port = self.pod.listener_port;
        if port == 0 {
            return false;
        }
        let ipv4 = bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1 {
            saddr: LOCALHOST,
            daddr: LOCALHOST,
            sport: 0,
            dport: (port as u16).to_be(),
        };
        let mut tuple = bpf_sock_tuple { __bindgen_anon_1: bpf_sock_tuple__bindgen_ty_1 { ipv4 } };
        let size = size_of::<bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1>() as u32;
        // SAFETY: the tuple outlives the call, its size names the IPv4 form; the socket found is
        // released on every path.
        unsafe {
            let sk = bpf_sk_lookup_tcp(
                self.ctx.sock_addr.cast(),
                &raw mut tuple,
                size,
                BPF_F_CURRENT_NETNS as i64 as u64,
                0,
            );
            if sk.is_null() {
                return false;
            }
            let listening = (*sk).state == TCP_LISTEN && maps::tag(sk) == TAG_APPLICATION;
            bpf_sk_release(sk.cast());
            listening
        }
    }
}

/// Marks the socket so that the route lookup of this very `connect()` leads to loopback.
#[inline(always)]
pub(crate) fn mark_for_capture(ctx: &SockAddrContext) -> bool {
    let mut mark = CAPTURE_MARK;
    // SAFETY: the option's value outlives the call.
    let error = unsafe {
        bpf_setsockopt(
            ctx.sock_addr.cast(),
            SOL_SOCKET,
            SO_MARK,
            (&raw mut mark).cast(),
            size_of::<u32>() as i32,
        )
    };
    error == 0
}

/// Makes the refused `connect()` say `ECONNREFUSED` instead of `EPERM`. Since 5.18.
#[inline(always)]
pub(crate) fn refuse_connection(verdict: i32) -> i32 {
    // SAFETY: takes a number only. If it fails, the caller sees EPERM: refused all the same.
    let _still_refused = unsafe { bpf_set_retval(-ECONNREFUSED) };
    verdict
}

// Packets

/// A packet in the cgroup hook: bytes from the network header on.
pub(crate) struct CgroupPacket<'a>(pub(crate) &'a SkBuffContext);

/// A frame in tcx: bytes from the link header on.
pub(crate) struct DevicePacket<'a>(pub(crate) &'a TcContext);

#[inline(always)]
pub(crate) fn netns_cookie_of_packet(ctx: &SkBuffContext) -> u64 {
    // SAFETY: the helper takes this context.
    unsafe { bpf_get_netns_cookie(ctx.skb.skb.cast()) }
}

macro_rules! outgoing {
    ($packet:ty) => {
        impl Bytes for $packet {
            #[inline(always)]
            fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
                let mut bytes = [0; N];
                // SAFETY: the buffer has the size named.
                let error = unsafe {
                    bpf_skb_load_bytes(
                        self.0.skb.skb.cast(),
                        offset,
                        bytes.as_mut_ptr().cast(),
                        N as u32,
                    )
                };
                (error == 0).then_some(bytes)
            }

            #[inline(always)]
            fn len(&self) -> u32 {
                // SAFETY: the context is valid while the program runs.
                unsafe { (*self.0.skb.skb).len }
            }
        }

        impl Outgoing for $packet {
            #[inline(always)]
            fn sender(&self) -> Sender {
                // SAFETY: the context is valid while the program runs.
                let sk = unsafe { (*self.0.skb.skb).__bindgen_anon_2.sk };
                sender(sk)
            }

            #[inline(always)]
            fn ifindex(&self) -> u32 {
                // SAFETY: the context is valid while the program runs.
                unsafe { (*self.0.skb.skb).ifindex }
            }

            #[inline(always)]
            fn vlan_tagged(&self) -> bool {
                // SAFETY: the context is valid while the program runs.
                unsafe { (*self.0.skb.skb).vlan_present != 0 }
            }

            #[inline(always)]
            fn host_listens(&self, flow: &Flow) -> bool {
                maps::host_listens(flow)
            }
        }
    };
}

outgoing!(CgroupPacket<'_>);
outgoing!(DevicePacket<'_>);

#[inline(always)]
fn sender(sk: *mut bpf_sock) -> Sender {
    if sk.is_null() {
        return Sender::Other;
    }
    // SAFETY: not null, and only a full socket's fields are read.
    unsafe {
        let full = bpf_sk_fullsock(sk);
        if full.is_null() {
            return Sender::Kernel;
        }
        match maps::tag(full) {
            TAG_TUNNEL => return Sender::Tunnel,
            TAG_PLAINTEXT => return Sender::Plaintext(remote(full)),
            _ => {}
        }
        // The kernel's own resets and TIME_WAIT replies come from a raw TCP socket.
        let control = matches!((*full).family, AF_INET | AF_INET6)
            && (*full).type_ == SOCK_RAW
            && (*full).protocol == IPPROTO_TCP;
        if control { Sender::Kernel } else { Sender::Other }
    }
}

/// Whom a socket is connected to.
///
/// # Safety
///
/// `sk` must be a full socket.
#[inline(always)]
unsafe fn remote(sk: *mut bpf_sock) -> Address {
    // SAFETY: as required of the caller.
    unsafe {
        if (*sk).family == AF_INET {
            v4_mapped((*sk).dst_ip4)
        } else {
            v6(&raw const (*sk).dst_ip6)
        }
    }
}

/// Writes the guards' key where it survives the way through a veth: not the mark, the priority or
/// the control block, which the kernel clears, but the flow hash.
#[inline(always)]
pub(crate) fn stamp(ctx: &TcContext, key: Option<u32>) {
    if let Some(key) = key {
        // SAFETY: takes this context and a number. If it fails, the third guard drops the packet.
        let _unstamped = unsafe { bpf_set_hash(ctx.skb.skb, key) };
    }
}

/// Reads the stamp and clears it, so that whoever hashes the packet next does it afresh.
#[inline(always)]
pub(crate) fn take_stamp(ctx: &TcContext) -> u32 {
    // SAFETY: the context is valid while the program runs.
    unsafe {
        let stamp = (*ctx.skb.skb).hash;
        bpf_set_hash_invalid(ctx.skb.skb);
        stamp
    }
}

/// Says whose device this is, to the program that goes on with this packet. Nobody else runs in
/// between: whatever a pod or another program had in these words is overwritten. Which words they are
/// is part of the ABI: what an earlier agent attached hands over to the guards of a later one.
#[inline(always)]
pub(crate) fn hand_over(ctx: &TcContext, cookie: u64) {
    // SAFETY: the context is valid while the program runs. The verifier wants words, and volatile
    // keeps them.
    unsafe {
        let words = (&raw mut (*ctx.skb.skb).cb).cast::<u32>();
        words.write_volatile(cookie as u32);
        words.add(1).write_volatile((cookie >> 32) as u32);
    }
}

/// Whose device this is, as [`hand_over`] said.
#[inline(always)]
pub(crate) fn handed_over(ctx: &TcContext) -> u64 {
    // SAFETY: as there.
    unsafe {
        let words = (&raw const (*ctx.skb.skb).cb).cast::<u32>();
        u64::from(words.read_volatile()) | u64::from(words.add(1).read_volatile()) << 32
    }
}

// sk_lookup

#[inline(always)]
pub(crate) fn lookup(ctx: &SkLookupContext) -> Lookup {
    // SAFETY: the context is valid while the program runs.
    unsafe {
        let lookup = ctx.lookup;
        let (server, client) = addresses!(lookup);
        Lookup {
            protocol: (*lookup).protocol,
            ingress_ifindex: (*lookup).ingress_ifindex,
            flow: Flow {
                client,
                server,
                client_port: u16::from_be((*lookup).remote_port),
                server_port: (*lookup).local_port as u16,
            },
        }
    }
}

// sock_ops

/// Since 5.15.
#[inline(always)]
pub(crate) fn netns_cookie_of_socket(ctx: &SockOpsContext) -> u64 {
    // SAFETY: the helper takes this context.
    unsafe { bpf_get_netns_cookie(ctx.ops.cast()) }
}

/// The connection of a socket that opens it, or has opened it.
#[inline(always)]
pub(crate) fn opened(ctx: &SockOpsContext) -> Flow {
    // SAFETY: the context is valid while the program runs.
    unsafe {
        let (client, server) = addresses!(ctx.ops);
        Flow {
            client,
            server,
            client_port: (*ctx.ops).local_port as u16,
            // Of the two it alone is in network byte order, widened to 32 bits.
            server_port: u32::from_be((*ctx.ops).remote_port) as u16,
        }
    }
}

/// Asks the kernel to tell of this socket's changes of state, beside what others have asked for.
#[inline(always)]
pub(crate) fn follow(ctx: &SockOpsContext) -> bool {
    // SAFETY: the context is valid while the program runs, and the helper takes it.
    unsafe {
        let flags = (*ctx.ops).bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG;
        bpf_sock_ops_cb_flags_set(ctx.ops, flags as i32) == 0
    }
}

/// Whether the change of state that is told of is the socket's last.
#[inline(always)]
pub(crate) fn is_closing(ctx: &SockOpsContext) -> bool {
    // SAFETY: the context is valid while the program runs; its arguments are the old state and the
    // new one.
    unsafe { (*ctx.ops).__bindgen_anon_1.args[1] == TCP_CLOSE }
}

// sysctl

/// Whether this is a write to `net.ipv4.tcp_fwmark_accept`, `net.ipv4.fwmark_reflect` or
/// `net.ipv6.fwmark_reflect`, of anything but the 1 that the capture needs: the agent itself writes
/// that for every pod.
#[inline(always)]
pub(crate) fn spoils_fwmark_setting(ctx: &SysctlContext) -> bool {
    // SAFETY: the context is valid while the program runs.
    if unsafe { (*ctx.sysctl).write } == 0 {
        return false;
    }
    let mut name = [0u8; 32];
    // SAFETY: the buffer has the size named; the helper terminates what it writes.
    let length =
        unsafe { bpf_sysctl_get_name(ctx.sysctl, name.as_mut_ptr().cast(), name.len() as u64, 0) };
    let [a, b, c, d, e, f, g, h, i, j, k, ..] = name;
    let family = [a, b, c, d, e, f, g, h];
    let starts = [i, j, k];
    length > 0
        && (family == *b"net/ipv4" || family == *b"net/ipv6")
        && (starts == *b"/tc" || starts == *b"/fw")
        && !writes_one(ctx)
}

#[inline(always)]
fn writes_one(ctx: &SysctlContext) -> bool {
    let mut value = [0u8; 8];
    // SAFETY: the buffer has the size named; the helper terminates what it writes.
    let length = unsafe {
        bpf_sysctl_get_new_value(ctx.sysctl, value.as_mut_ptr().cast(), value.len() as u64)
    };
    let [first, second, ..] = value;
    first == b'1' && (length == 1 || length == 2 && second == b'\n')
}
