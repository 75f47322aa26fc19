//! Counts drops, and tells of the first one of a pod in each interval: the agent through the event
//! buffer, and its debug log through aya-log.

use aya_ebpf::EbpfContext;
use aya_log_ebpf::debug;
use mesh_common::abi::{EVENT_DROP, EVENT_SYSCTL, Event, Layer, Reason};

use crate::maps;

#[inline(always)]
pub(crate) fn drop<C: EbpfContext>(ctx: &C, cookie: u64, layer: Layer, reason: Reason) {
    if maps::count(cookie, layer, reason) {
        let (layer, reason) = (layer as u32, reason as u32);
        maps::tell(&Event { cookie, kind: EVENT_DROP, layer, reason, reserved: 0 });
        debug!(ctx, "dropped: network namespace {} layer {} reason {}", cookie, layer, reason);
    }
}

#[inline(always)]
pub(crate) fn sysctl_write<C: EbpfContext>(ctx: &C) {
    maps::tell(&Event { cookie: 0, kind: EVENT_SYSCTL, layer: 0, reason: 0, reserved: 0 });
    debug!(ctx, "somebody writes a fwmark setting");
}
