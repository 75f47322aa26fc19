//! What the kernel must be able to do.

use std::path::Path;

use aya::{
    maps::MapType,
    programs::ProgramType,
    sys::{is_map_supported, is_program_supported},
    util::KernelVersion,
};

/// The first kernel with everything: that `cgroup_skb` programs may ask for the namespace's cookie is
/// its latest part.
const FIRST_KERNEL: KernelVersion = KernelVersion::new(6, 12, 0);

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
        missing.push("what came with Linux 6.12");
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
