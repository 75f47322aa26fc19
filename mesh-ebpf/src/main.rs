//! The eBPF programs of nodemesh: a table of verdicts over the decisions in the other modules.
//!
//! Every path that is not a decision to allow refuses or drops. Programs of the node find the pod by
//! its network namespace cookie. No helper tells it to those of a pod's devices and of `sk_lookup`, so
//! some are loaded for each pod, and know it from `POD`. Loading takes the kernel time for each
//! instruction: of the guards of devices a pod has but a few, which hand over to the node's.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![allow(unsafe_code, reason = "every helper call and context access in eBPF is unsafe")]
#![cfg_attr(not(target_arch = "bpf"), allow(dead_code, reason = "the host builds only the tests"))]
#![allow(
    missing_docs,
    unreachable_pub,
    reason = "aya's macros wrap each program in a bare `pub fn`"
)]

mod capture;
mod ctx;
mod guard;
mod log;
mod maps;
mod packet;

use aya_ebpf::{
    bindings::{
        BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_TCP_CONNECT_CB,
        sk_action::{SK_DROP, SK_PASS},
        tcx_action_base::{TCX_DROP, TCX_NEXT},
    },
    macros::{cgroup_skb, cgroup_sock_addr, cgroup_sysctl, classifier, sk_lookup, sock_ops},
    programs::{
        SkBuffContext, SkLookupContext, SockAddrContext, SockOpsContext, SysctlContext, TcContext,
    },
};
use mesh_common::abi::{
    Address, GUARD_DEVICE, GUARD_DEVICE_L3, GUARD_PEER, INBOUND_LISTENER, Layer, OUTBOUND_LISTENER,
    Reason,
};

use crate::{
    capture::{Connect, Steer},
    guard::{Link, Pass},
};

const CONNECT_ALLOWED: i32 = 1;
const CONNECT_REFUSED: i32 = 0;
const EGRESS_PASS: i32 = 1;
const EGRESS_DROP: i32 = 0;
const SYSCTL_ALLOWED: i32 = 1;
/// Leaves the reply as it is, which is for other programs to give.
const SOCK_OPS_DONE: u32 = 1;

/// Captures `connect()` over IPv4.
#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    connect(&ctx, ctx::destination4(&ctx))
}

/// Captures `connect()` over IPv6, which includes IPv4 through IPv4-mapped addresses.
#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    connect(&ctx, ctx::destination6(&ctx))
}

#[inline(always)]
fn connect(ctx: &SockAddrContext, destination: Address) -> i32 {
    let cookie = ctx::netns_cookie_of_connect(ctx);
    let Some(pod) = maps::pod(cookie) else {
        return CONNECT_ALLOWED;
    };
    match capture::connect(pod, &destination, ctx::connecting(ctx, pod)) {
        Ok(Connect::Leave) => CONNECT_ALLOWED,
        Ok(Connect::Capture) if ctx::mark_for_capture(ctx) => CONNECT_ALLOWED,
        Ok(Connect::Capture) => {
            log::drop(ctx, cookie, Layer::Connect, Reason::Unmarkable);
            ctx::refuse_connection(CONNECT_REFUSED)
        }
        Err(reason) => {
            log::drop(ctx, cookie, Layer::Connect, reason);
            ctx::refuse_connection(CONNECT_REFUSED)
        }
    }
}

/// First guard: whatever sockets in an enrolled namespace send. Runs for every packet of every socket
/// of the machine, so the cheapest question comes first.
#[cgroup_skb(egress)]
pub fn egress(ctx: SkBuffContext) -> i32 {
    let packet = ctx::CgroupPacket(&ctx);
    if guard::stays_inside(&packet) {
        return EGRESS_PASS;
    }
    let cookie = ctx::netns_cookie_of_packet(&ctx);
    let Some(pod) = maps::pod(cookie) else {
        return EGRESS_PASS;
    };
    match guard::cgroup(&packet, pod) {
        Ok(_) => EGRESS_PASS,
        Err(reason) => {
            log::drop(&ctx, cookie, Layer::Cgroup, reason);
            EGRESS_DROP
        }
    }
}

/// Loads where the first guard does: the kernel tells it whose a packet is (Linux 6.12).
#[cgroup_skb(egress)]
pub fn probe_egress(ctx: SkBuffContext) -> i32 {
    if ctx::netns_cookie_of_packet(&ctx) == 0 { EGRESS_DROP } else { EGRESS_PASS }
}

/// Of a pod: says whose device this is, to the second guard.
#[classifier]
pub fn pod_device(ctx: TcContext) -> i32 {
    hand_over(&ctx, GUARD_DEVICE, Layer::Device)
}

/// Of a pod: the same on a device without a link header.
#[classifier]
pub fn pod_device_l3(ctx: TcContext) -> i32 {
    hand_over(&ctx, GUARD_DEVICE_L3, Layer::Device)
}

/// Of a pod: says whose device's other end this is, to the third guard.
#[classifier]
pub fn pod_peer(ctx: TcContext) -> i32 {
    hand_over(&ctx, GUARD_PEER, Layer::Peer)
}

#[inline(always)]
fn hand_over(ctx: &TcContext, guard: u32, layer: Layer) -> i32 {
    let cookie = maps::pod_cookie();
    ctx::hand_over(ctx, cookie);
    maps::call_guard(ctx, guard);
    // Still here: there is no such guard.
    log::drop_in_pod(cookie, layer, Reason::Unconfigured);
    TCX_DROP
}

/// Second guard: whatever leaves by a device of a pod that carries Ethernet frames.
#[classifier]
pub fn device(ctx: TcContext) -> i32 {
    device_guard(&ctx, Link::Ethernet)
}

/// Second guard, on a device without a link header, such as a tunnel.
#[classifier]
pub fn device_l3(ctx: TcContext) -> i32 {
    device_guard(&ctx, Link::None)
}

#[inline(always)]
fn device_guard(ctx: &TcContext, link: Link) -> i32 {
    let cookie = ctx::handed_over(ctx);
    match guard::device(&ctx::DevicePacket(ctx), link, maps::pod(cookie)) {
        Ok(pass) => {
            if pass == Pass::Udp {
                maps::count_datagram(cookie);
            }
            ctx::stamp(ctx, maps::guard_key());
            TCX_NEXT
        }
        Err(reason) => {
            log::drop(ctx, cookie, Layer::Device, reason);
            TCX_DROP
        }
    }
}

/// Third guard: whatever arrives at the host side of a pod's device must have passed the second.
#[classifier]
pub fn peer(ctx: TcContext) -> i32 {
    let cookie = ctx::handed_over(&ctx);
    match guard::peer(ctx::take_stamp(&ctx), maps::guard_key()) {
        Ok(()) => TCX_NEXT,
        Err(reason) => {
            log::drop(&ctx, cookie, Layer::Peer, reason);
            TCX_DROP
        }
    }
}

/// Of a pod: delivers its connections to the agent's listeners in it. Its context is read-only, so
/// that it could not hand over what it knows.
#[sk_lookup]
pub fn steer(ctx: SkLookupContext) -> u32 {
    let cookie = maps::pod_cookie();
    let decision = capture::steer(maps::pod(cookie), &ctx::lookup(&ctx), maps::host_connects);
    let steered = decision.and_then(|steer| match steer {
        Steer::Leave => Ok(()),
        Steer::Outbound => maps::assign(&ctx, OUTBOUND_LISTENER),
        Steer::Inbound => maps::assign(&ctx, INBOUND_LISTENER),
    });
    match steered {
        Ok(()) => SK_PASS,
        Err(reason) => {
            log::drop_in_pod(cookie, Layer::Lookup, reason);
            SK_DROP
        }
    }
}

/// Remembers the connections that the node itself opens, before their first packet leaves. That a
/// socket is the node's the kernel knows by its network namespace, which no address can imitate.
#[sock_ops]
pub fn host_flows(ctx: SockOpsContext) -> u32 {
    let op = ctx.op();
    let is_known = matches!(op, BPF_SOCK_OPS_TCP_CONNECT_CB | BPF_SOCK_OPS_STATE_CB);
    if !is_known || !maps::is_host(ctx::netns_cookie_of_socket(&ctx)) {
        return SOCK_OPS_DONE;
    }
    let flow = ctx::opened(&ctx);
    if op == BPF_SOCK_OPS_STATE_CB {
        if ctx::is_closing(&ctx) {
            maps::host_closes(&flow);
        }
    } else if !capture::is_loopback(&flow.server) && ctx::follow(&ctx) {
        // One whose end nobody would tell is not remembered: a pod could go on to use it.
        maps::host_opens(&flow);
    }
    SOCK_OPS_DONE
}

/// Tells the agent that a setting which the capture rests on may be about to change.
#[cgroup_sysctl]
pub fn sysctl(ctx: SysctlContext) -> i32 {
    if ctx::spoils_fwmark_setting(&ctx) {
        log::sysctl_write(&ctx);
    }
    SYSCTL_ALLOWED
}

#[cfg(all(target_arch = "bpf", not(test)))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";

#[cfg(not(target_arch = "bpf"))]
fn main() {}
