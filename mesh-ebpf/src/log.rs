//! Counts drops, and tells of the first one of a pod in each interval: the agent through the event
//! buffer, and its debug log through aya-log.

use aya_ebpf::EbpfContext;
use aya_log_ebpf::debug;
use mesh_common::abi::{EVENT_DROP, EVENT_SYSCTL, Event, Layer, Reason};

use crate::maps;

#[inline(always)]
pub(crate) fn drop<C: EbpfContext>(ctx: &C, cookie: u64, layer: Layer, reason: Reason) {
    if drop_in_pod(cookie, layer, reason) {
        let (layer, reason) = (layer as u32, reason as u32);
        debug!(ctx, "dropped: network namespace {} layer {} reason {}", cookie, layer, reason);
    }
}

/// The same without the debug log, for programs that are loaded for each pod: the verifier looks at
/// thousands of instructions for a line of it. True if the agent was told.
#[inline(always)]
pub(crate) fn drop_in_pod(cookie: u64, layer: Layer, reason: Reason) -> bool {
    let due = maps::count(cookie, layer, reason);
    if due {
        let (layer, reason) = (layer as u32, reason as u32);
        maps::tell(&Event { cookie, kind: EVENT_DROP, layer, reason, reserved: 0 });
    }
    due
}

#[inline(always)]
pub(crate) fn sysctl_write<C: EbpfContext>(ctx: &C) {
    maps::tell(&Event { cookie: 0, kind: EVENT_SYSCTL, layer: 0, reason: 0, reserved: 0 });
    debug!(ctx, "somebody writes a fwmark setting");
}
