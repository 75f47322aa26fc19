//! Every map of the programs, and the little that reads or writes them.
//!
//! All but `LISTENERS` and `POD` exist once per node; the agent pins them by name.

use core::{ffi::c_void, ptr};

use aya_ebpf::{
    Global,
    bindings::{
        BPF_F_CLONE, BPF_F_NO_PREALLOC, BPF_F_RDONLY_PROG, bpf_map_type::BPF_MAP_TYPE_SK_STORAGE,
        bpf_sock,
    },
    helpers::{bpf_ktime_get_ns, bpf_sk_storage_get},
    macros::{btf_map, map},
    maps::{Array, HashMap, LruHashMap, PerCpuHashMap, ProgramArray, RingBuf, SockMap},
    programs::{SkLookupContext, TcContext},
};
use mesh_common::abi::{
    Event, Flow, Layer, MAX_GUARDS, MAX_HOST_FLOWS, MAX_PODS, PodConfig, PodCounters, Reason,
};

/// A drop of a pod is told at most once in this many nanoseconds on each CPU.
const LOG_INTERVAL: u64 = 10_000_000_000;

/// For so many nanoseconds after the node closed a connection, the pod may go on to answer: a server
/// that speaks first has not begun when a health check is over, and wants the reset that comes back.
const LAST_WORDS: u64 = 300_000_000_000;

/// Enrolled pods by network namespace cookie.
#[map]
static PODS: HashMap<u64, PodConfig> = HashMap::with_max_entries(MAX_PODS, 0);

/// What was dropped, by the same key. The agent makes the entry, so that counting never allocates.
#[map]
static COUNTERS: PerCpuHashMap<u64, PodCounters> =
    PerCpuHashMap::with_max_entries(MAX_PODS, BPF_F_NO_PREALLOC);

/// The value that the second guard writes into a packet's hash and the third looks for. Random,
/// made by the agent that first loads the programs.
#[map]
static GUARD_KEY: Array<u32> = Array::with_max_entries(1, 0);

/// The guards of devices, by `GUARD_*`: what the programs of all pods hand over to.
#[map]
static GUARDS: ProgramArray = ProgramArray::with_max_entries(MAX_GUARDS, 0);

/// What the agent should know at once.
#[map]
static EVENTS: RingBuf = RingBuf::with_byte_size(1 << 16, 0);

/// The connections that the node itself opened. The least recently used go first: a flood of them
/// makes their answers stop, and nothing pass.
#[map]
static HOST_FLOWS: LruHashMap<Flow, u64> = LruHashMap::with_max_entries(MAX_HOST_FLOWS, 0);

/// The listeners of one pod, by `OUTBOUND_LISTENER` and `INBOUND_LISTENER`.
#[map]
static LISTENERS: SockMap = SockMap::with_max_entries(2, 0);

/// The tags on the agent's own sockets, which accepted ones inherit. By file descriptor only, so no
/// process in a pod can set it. Socket storage for TCP since 5.2, cloning since 5.4.
#[btf_map]
static AGENT_SOCKETS: SocketTags = SocketTags::new();

/// `aya_ebpf::btf_maps::SkStorage` has no `BPF_F_CLONE`.
#[repr(C)]
struct SocketTags {
    r#type: *const [i32; BPF_MAP_TYPE_SK_STORAGE as usize],
    key: *const i32,
    value: *const u32,
    max_entries: *const [i32; 0],
    map_flags: *const [i32; (BPF_F_NO_PREALLOC | BPF_F_CLONE) as usize],
}

// SAFETY: the loader replaces the definition by a map; nothing here is ever dereferenced.
unsafe impl Sync for SocketTags {}

impl SocketTags {
    const fn new() -> Self {
        Self {
            r#type: ptr::null(),
            key: ptr::null(),
            value: ptr::null(),
            max_entries: ptr::null(),
            map_flags: ptr::null(),
        }
    }
}

/// The pod that this instance of the programs serves, by network namespace cookie. No constant of
/// the object: so the agent can load it again and again without parsing the kernel's types anew.
#[map]
static POD: Array<u64> = Array::with_max_entries(1, BPF_F_RDONLY_PROG);

#[inline(always)]
pub(crate) fn pod_cookie() -> u64 {
    POD.get(0).copied().unwrap_or(0)
}

/// The node's own network namespace, by cookie, if its connections are let into pods; else 0, which
/// is no namespace's.
#[unsafe(no_mangle)]
static HOST_COOKIE: Global<u64> = Global::new(0);

#[inline(always)]
pub(crate) fn is_host(cookie: u64) -> bool {
    cookie != 0 && cookie == HOST_COOKIE.load()
}

/// Remembers a connection that the node is about to open. If it cannot be, it is refused.
#[inline(always)]
pub(crate) fn host_opens(flow: &Flow) {
    let _refused_if_full = HOST_FLOWS.insert(flow, 0, 0);
}

/// Remembers that the node has no such connection any more.
#[inline(always)]
pub(crate) fn host_closes(flow: &Flow) {
    if let Some(closed) = HOST_FLOWS.get_ptr_mut(flow) {
        // SAFETY: a map value, alive until the program ends; the helper takes no argument.
        unsafe { *closed = bpf_ktime_get_ns() };
    }
}

/// Whether the node is opening this connection, or has it open.
#[inline(always)]
pub(crate) fn host_connects(flow: &Flow) -> bool {
    host_flow(flow) == Some(0)
}

/// Whether the node has this connection open, or had it lately.
#[inline(always)]
pub(crate) fn host_listens(flow: &Flow) -> bool {
    match host_flow(flow) {
        None => false,
        Some(0) => true,
        // SAFETY: no argument.
        Some(closed) => unsafe { bpf_ktime_get_ns() }.wrapping_sub(closed) < LAST_WORDS,
    }
}

#[inline(always)]
fn host_flow(flow: &Flow) -> Option<u64> {
    if HOST_COOKIE.load() == 0 {
        return None;
    }
    // SAFETY: a map value, alive until the program ends, and written as one word.
    unsafe { HOST_FLOWS.get(flow) }.copied()
}

#[inline(always)]
pub(crate) fn pod(cookie: u64) -> Option<&'static PodConfig> {
    // SAFETY: an element that the agent deletes meanwhile stays readable until the program ends
    // (RCU); at worst it is read as half of the old and half of the new configuration.
    unsafe { PODS.get(cookie) }
}

/// The key of the guards, none before the agent made it.
#[inline(always)]
pub(crate) fn guard_key() -> Option<u32> {
    GUARD_KEY.get(0).copied().filter(|key| *key != 0)
}

/// Goes on as one of the node's guards. Returns only if that is not there.
#[inline(always)]
pub(crate) fn call_guard(ctx: &TcContext, guard: u32) {
    // SAFETY: nothing here is to be dropped; the guard takes this context.
    unsafe { GUARDS.tail_call(ctx, guard) };
}

#[inline(always)]
pub(crate) fn assign(ctx: &SkLookupContext, listener: u32) -> Result<(), Reason> {
    LISTENERS.redirect_sk_lookup(ctx, listener, 0).map_err(|_| Reason::AgentGone)
}

/// The agent's tag on a full socket, one of `TAG_*`; 0 if it is none of the agent's.
///
/// # Safety
///
/// `sk` must be a socket pointer that the verifier accepts, and not null.
#[inline(always)]
pub(crate) unsafe fn tag(sk: *mut bpf_sock) -> u32 {
    let map = ptr::from_ref(&AGENT_SOCKETS).cast_mut().cast::<c_void>();
    // SAFETY: the map is a socket storage and `sk` a socket, as required of the caller; the value
    // is alive until the program ends.
    unsafe {
        let tag = bpf_sk_storage_get(map, sk.cast(), ptr::null_mut(), 0).cast::<u32>();
        if tag.is_null() { 0 } else { *tag }
    }
}

/// Counts a drop; true if it is this pod's turn to be told of.
#[inline(always)]
pub(crate) fn count(cookie: u64, layer: Layer, reason: Reason) -> bool {
    let Some(counters) = COUNTERS.get_ptr_mut(cookie) else {
        return false;
    };
    // SAFETY: a map value, alive until the program ends, and this CPU's own.
    let counters = unsafe { &mut *counters };
    if let Some(drops) = counters.drops.get_mut(layer as usize)
        && let Some(drops) = drops.get_mut(reason as usize)
    {
        *drops += 1;
    }
    // SAFETY: no argument.
    let now = unsafe { bpf_ktime_get_ns() };
    let due = now.wrapping_sub(counters.last_logged) >= LOG_INTERVAL;
    if due {
        counters.last_logged = now;
    }
    due
}

/// Counts a datagram that leaves a pod.
#[inline(always)]
pub(crate) fn count_datagram(cookie: u64) {
    if let Some(counters) = COUNTERS.get_ptr_mut(cookie) {
        // SAFETY: a map value, alive until the program ends, and this CPU's own.
        unsafe { (*counters).datagrams += 1 };
    }
}

/// Tells the agent. A full buffer means that it is behind, and counters lose nothing.
#[inline(always)]
pub(crate) fn tell(event: &Event) {
    let _dropped_if_full = EVENTS.output::<Event>(event, 0);
}
