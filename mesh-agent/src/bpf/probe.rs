//! What the kernel must be able to do.

use std::path::Path;

use aya::{
    Ebpf,
    maps::MapType,
    programs::{CgroupSkb, ProgramType, SchedClassifier, TcAttachType},
    sys::{is_map_supported, is_program_supported},
    util::KernelVersion,
};

use super::node::program;

/// The first kernel that the mesh was seen running on.
const FIRST_KERNEL: KernelVersion = KernelVersion::new(6, 1, 0);

/// What not every kernel has that the mesh can run on. Found out by trying: distributions carry
/// features back to kernels with older numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// Whether the first guard can tell whose a packet is (Linux 6.12). Without it a pod has the
    /// guards of its devices alone.
    pub cgroup_guard: bool,
    /// Whether the guards of devices are links (tcx, Linux 6.6). Without them they are classic tc
    /// filters, which a pod with `CAP_NET_ADMIN` can take from its own devices; what then leaves
    /// them lacks the stamp that the third guard wants.
    pub tcx: bool,
}

impl Features {
    /// Tries them with the programs of the object.
    pub(super) fn of(ebpf: &mut Ebpf) -> Self {
        let probe: Result<&mut CgroupSkb, _> = program(ebpf, "probe_egress");
        Self {
            cgroup_guard: probe.is_ok_and(|probe| probe.load().is_ok()),
            tcx: SchedClassifier::query_tcx("lo", TcAttachType::Ingress).is_ok(),
        }
    }
}

const PROGRAMS: [(&str, ProgramType); 6] = [
    ("cgroup socket address programs", ProgramType::CgroupSockAddr),
    ("cgroup packet programs", ProgramType::CgroupSkb),
    ("cgroup sysctl programs", ProgramType::CgroupSysctl),
    ("socket operation programs", ProgramType::SockOps),
    ("tc programs", ProgramType::SchedClassifier),
    ("socket lookup programs", ProgramType::SkLookup),
];

const MAPS: [(&str, MapType); 4] = [
    ("socket storage", MapType::SkStorage),
    ("sockmap (CONFIG_BPF_STREAM_PARSER)", MapType::SockMap),
    ("hash maps that forget", MapType::LruHash),
    ("ring buffers", MapType::RingBuf),
];

/// What this kernel lacks, in words; nothing if the mesh can run. What cannot be found out is
/// taken for there: loading the programs then tells.
pub fn missing() -> Vec<&'static str> {
    let mut missing = Vec::new();
    if KernelVersion::current().is_ok_and(|version| version < FIRST_KERNEL) {
        missing.push("what came with Linux 6.1");
    }
    if !Path::new("/sys/kernel/btf/vmlinux").exists() {
        missing.push("type information (CONFIG_DEBUG_INFO_BTF)");
    }
    if !Path::new("/proc/sys/net/ipv6").exists() {
        missing.push("IPv6 (the listeners serve both families; ipv6.disable must not be set)");
    }
    let programs =
        PROGRAMS.into_iter().filter(|(_, kind)| is_program_supported(*kind).is_ok_and(|yes| !yes));
    let maps = MAPS.into_iter().filter(|(_, kind)| is_map_supported(*kind).is_ok_and(|yes| !yes));
    missing.extend(programs.map(|(name, _)| name));
    missing.extend(maps.map(|(name, _)| name));
    missing
}
