//! The programs and maps that exist once per node.
#![expect(clippy::wildcard_enum_match_arm, reason = "foreign enums that grow")]

use std::{
    collections::BTreeMap,
    fs::File,
    os::fd::{AsRawFd, RawFd},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{
        Array, HashMap, Map, MapData, MapError, PerCpuHashMap, PerCpuValues, ProgramArray,
        SkStorage,
    },
    programs::{
        CgroupAttachMode, CgroupSkb, CgroupSkbAttachType, CgroupSockAddr, CgroupSysctl, SockOps,
        cgroup_sysctl::CgroupSysctlLink,
        links::{FdLink, PinnedLink},
    },
    util::nr_cpus,
};
use mesh_common::abi::{
    Flow, Layer, MAX_PODS, PodConfig, PodCounters, Reason, TAG_APPLICATION, TAG_PLAINTEXT,
    TAG_TUNNEL,
};

use super::{
    BpfError, Events, Features, OBJECT, pins,
    pins::Pins,
    pod::{Guard, loaded},
    probe,
};

/// Drops of one pod for one reason at one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DropCount {
    /// Where.
    pub layer: Layer,
    /// Why.
    pub reason: Reason,
    /// How many packets, frames or `connect()` calls.
    pub count: u64,
}

/// What a socket of the agent is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Tag {
    /// Tunnels: what it sends is encrypted.
    Tunnel = TAG_TUNNEL,
    /// Plaintext that the policy allows, to where it is connected.
    Plaintext = TAG_PLAINTEXT,
    /// An application of the pod: what it sends must not leave.
    Application = TAG_APPLICATION,
}

/// What the guards have counted of one pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// What was dropped, the zeros left out.
    pub drops: Vec<DropCount>,
    /// UDP datagrams that left.
    pub datagrams: u64,
}

/// The eBPF side of the node. Dropping it leaves everything attached.
pub struct Datapath {
    pub(super) pins: Pins,
    /// Whether there is somebody whose connections reach the applications as they are.
    has_host: bool,
    features: Features,
    pods: Mutex<HashMap<MapData, u64, PodConfig>>,
    counters: Mutex<PerCpuHashMap<MapData, u64, PodCounters>>,
    sockets: Mutex<SkStorage<MapData, u32>>,
    /// Made once: that parses the types of the whole kernel, which takes longer than everything else
    /// of an enrolment.
    pub(super) loader: Mutex<EbpfLoader<'static>>,
    /// The ids of the programs that this agent has loaded for a pod's devices.
    pub(super) guards: Mutex<BTreeMap<(u64, Guard), u32>>,
    /// The object as it was last loaded, and for which pod: the steps of an enrolment share it.
    pub(super) loaded: Mutex<Option<(u64, Ebpf)>>,
    /// What the programs of pods' devices hand over to. Pinned, since the kernel empties it when
    /// nobody refers to it; held too, in case somebody removes the pin.
    _node_guards: ProgramArray<MapData>,
    /// Not pinned: it guards nothing, it only wakes this agent.
    _sysctl: CgroupSysctlLink,
}

impl Datapath {
    /// Opens or makes the maps, attaches the node's programs to the cgroup and pins everything.
    /// What the network namespace with the cookie `host` connects to reaches the applications of
    /// pods as it is, and is answered as it is.
    ///
    /// # Errors
    ///
    /// See [`BpfError`]. Whatever guarded before still does.
    pub fn open(
        bpffs: &Path,
        cgroup: &Path,
        host: Option<u64>,
    ) -> Result<(Self, Events), BpfError> {
        let missing = probe::missing();
        if !missing.is_empty() {
            return Err(BpfError::Unsupported(format!("the kernel lacks {}", missing.join(", "))));
        }
        let pins = Pins::open(bpffs)?;
        let mut loader = EbpfLoader::new();
        // The programs refer to none of the kernel's types.
        loader.btf(None);
        pins.share_maps(&mut loader);
        let host_cookie: &'static u64 = Box::leak(Box::new(host.unwrap_or(0)));
        loader.override_global("HOST_COOKIE", host_cookie, true);
        let mut ebpf = loader.load(OBJECT)?;
        let take = |ebpf: &mut Ebpf, name: &'static str| {
            ebpf.take_map(name).ok_or(BpfError::Map {
                name,
                source: MapError::InvalidName { name: name.to_owned() },
            })
        };

        let map = take(&mut ebpf, "GUARD_KEY")?;
        let mut guard_key: Array<_, u32> = map.try_into().map_err(BpfError::map("GUARD_KEY"))?;
        if guard_key.get(&0, 0).map_err(BpfError::map("GUARD_KEY"))? == 0 {
            let key = rand::random_range(1..=u32::MAX);
            guard_key.set(0, key, 0).map_err(BpfError::map("GUARD_KEY"))?;
        }
        let node_guards = install_guards(take(&mut ebpf, GUARDS)?, &mut ebpf)?;
        let pods = take(&mut ebpf, "PODS")?.try_into().map_err(BpfError::map("PODS"))?;
        let counters =
            take(&mut ebpf, "COUNTERS")?.try_into().map_err(BpfError::map("COUNTERS"))?;
        let sockets =
            take(&mut ebpf, "AGENT_SOCKETS")?.try_into().map_err(BpfError::map("AGENT_SOCKETS"))?;
        let events = take(&mut ebpf, "EVENTS")?;

        let cgroup_dir = File::open(cgroup).map_err(BpfError::io(cgroup))?;
        for name in ["connect4", "connect6"] {
            let program: &mut CgroupSockAddr = program(&mut ebpf, name)?;
            program.load().map_err(BpfError::program(name))?;
            let id = program
                .attach(&cgroup_dir, CgroupAttachMode::Single)
                .map_err(BpfError::program(name))?;
            let link = program.take_link(id).map_err(BpfError::program(name))?;
            pins::replace(FdLink::try_from(link)?, &pins.link(name))?;
        }
        let features = Features::of(&mut ebpf);
        let name = "egress";
        if features.cgroup_guard {
            let program: &mut CgroupSkb = program(&mut ebpf, name)?;
            program.load().map_err(BpfError::program(name))?;
            let id = program
                .attach(&cgroup_dir, CgroupSkbAttachType::Egress, CgroupAttachMode::Single)
                .map_err(BpfError::program(name))?;
            let link = program.take_link(id).map_err(BpfError::program(name))?;
            pins::replace(FdLink::try_from(link)?, &pins.link(name))?;
        } else {
            tracing::warn!(
                "this kernel does not tell the first guard whose a packet is (Linux 6.12 does): \
                 pods have the guards of their devices alone"
            );
        }
        if !features.tcx {
            tracing::warn!(
                "this kernel has no tcx (Linux 6.6 has): pods' devices are guarded by classic tc \
                 filters"
            );
        }
        let name = "host_flows";
        if host.is_some() {
            let program: &mut SockOps = program(&mut ebpf, name)?;
            program.load().map_err(BpfError::program(name))?;
            let id = program
                .attach(&cgroup_dir, CgroupAttachMode::Single)
                .map_err(BpfError::program(name))?;
            let link = program.take_link(id).map_err(BpfError::program(name))?;
            pins::replace(FdLink::try_from(link)?, &pins.link(name))?;
        } else {
            pins::remove(&pins.link(name))?;
            let map = take(&mut ebpf, "HOST_FLOWS")?;
            forget(map.try_into().map_err(BpfError::map("HOST_FLOWS"))?)?;
        }
        let sysctl = {
            let name = "sysctl";
            let program: &mut CgroupSysctl = program(&mut ebpf, name)?;
            program.load().map_err(BpfError::program(name))?;
            let id = program
                .attach(&cgroup_dir, CgroupAttachMode::Single)
                .map_err(BpfError::program(name))?;
            program.take_link(id).map_err(BpfError::program(name))?
        };
        let events = Events::new(&mut ebpf, events)?;
        let datapath = Self {
            pins,
            loader: Mutex::new(loader),
            has_host: host.is_some(),
            features,
            pods: Mutex::new(pods),
            counters: Mutex::new(counters),
            sockets: Mutex::new(sockets),
            guards: Mutex::default(),
            loaded: Mutex::default(),
            _node_guards: node_guards,
            _sysctl: sysctl,
        };
        Ok((datapath, events))
    }

    /// Puts a pod under guard, or changes its configuration.
    ///
    /// # Errors
    ///
    /// [`BpfError::TooManyPods`], or the map's own.
    pub fn configure(&self, cookie: u64, config: &PodConfig) -> Result<(), BpfError> {
        let full = |error| match error {
            MapError::SyscallError(error) if error.io_error.raw_os_error() == Some(E2BIG) => {
                BpfError::TooManyPods { limit: MAX_PODS }
            }
            source => BpfError::Map { name: "PODS", source },
        };
        {
            let mut counters = lock(&self.counters);
            if matches!(counters.get(&cookie, 0), Err(MapError::KeyNotFound)) {
                let cpus = nr_cpus()
                    .map_err(|(path, source)| BpfError::Io { path: PathBuf::from(path), source })?;
                let zero = PerCpuValues::try_from(vec![PodCounters::ZERO; cpus])
                    .map_err(BpfError::io("per-CPU values"))?;
                counters.insert(cookie, zero, 0).map_err(full)?;
            }
        }
        lock(&self.pods).insert(cookie, config, 0).map_err(full)
    }

    /// The configuration of a pod that is under guard.
    ///
    /// # Errors
    ///
    /// The map's own.
    pub fn configuration(&self, cookie: u64) -> Result<Option<PodConfig>, BpfError> {
        match lock(&self.pods).get(&cookie, 0) {
            Ok(config) => Ok(Some(config)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(source) => Err(BpfError::Map { name: "PODS", source }),
        }
    }

    /// Every pod under guard, by network namespace cookie, whether or not it still lives.
    ///
    /// # Errors
    ///
    /// The map's own.
    pub fn guarded(&self) -> Result<Vec<u64>, BpfError> {
        let mut cookies: Vec<u64> =
            lock(&self.pods).keys().collect::<Result<_, _>>().map_err(BpfError::map("PODS"))?;
        cookies.extend(self.pins.pods()?);
        cookies.sort_unstable();
        cookies.dedup();
        Ok(cookies)
    }

    /// Takes a pod from under guard: its programs first, so that nothing is dropped on the way.
    ///
    /// # Errors
    ///
    /// The map's own, or the file system's.
    pub fn release(&self, cookie: u64) -> Result<(), BpfError> {
        self.release_pod(cookie)?;
        gone(lock(&self.pods).remove(&cookie)).map_err(BpfError::map("PODS"))?;
        gone(lock(&self.counters).remove(&cookie)).map_err(BpfError::map("COUNTERS"))
    }

    /// What the guards have counted of a pod.
    ///
    /// # Errors
    ///
    /// The map's own.
    pub fn counted(&self, cookie: u64) -> Result<Counted, BpfError> {
        let per_cpu = match lock(&self.counters).get(&cookie, 0) {
            Ok(values) => values,
            Err(MapError::KeyNotFound) => return Ok(Counted::default()),
            Err(source) => return Err(BpfError::Map { name: "COUNTERS", source }),
        };
        let datagrams = per_cpu.iter().map(|counters| counters.datagrams).sum();
        let mut drops = Vec::new();
        for layer in Layer::ALL {
            for reason in Reason::ALL {
                let of = |c: &PodCounters| c.drops[layer as usize][reason as usize];
                let count = per_cpu.iter().map(of).sum();
                if count > 0 {
                    drops.push(DropCount { layer, reason, count });
                }
            }
        }
        Ok(Counted { drops, datagrams })
    }

    /// What this kernel gives.
    pub const fn features(&self) -> Features {
        self.features
    }

    /// The node's programs, and whether each is attached. `guards` are those that pods' devices have
    /// in common.
    pub fn programs(&self) -> Vec<(&'static str, bool)> {
        let egress = self.features.cgroup_guard.then_some("egress");
        let host_flows = self.has_host.then_some("host_flows");
        ["connect4", "connect6"]
            .into_iter()
            .chain(egress)
            .chain(host_flows)
            .map(|name| (name, PinnedLink::from_pin(self.pins.link(name)).is_ok()))
            .chain([("guards", self.pins.map(GUARDS).exists())])
            .collect()
    }

    /// Marks a socket as the agent's own, and with it every socket that it accepts: what the guards
    /// let pass of it.
    ///
    /// # Errors
    ///
    /// The map's own.
    pub fn tag(&self, socket: &impl AsRawFd, tag: Tag) -> Result<(), BpfError> {
        let fd: RawFd = socket.as_raw_fd();
        lock(&self.sockets).insert(&fd, tag as u32, 0).map_err(BpfError::map("AGENT_SOCKETS"))
    }

    /// Detaches and removes everything that any agent ever pinned below `bpffs`.
    ///
    /// # Errors
    ///
    /// The file system's.
    pub fn uninstall(bpffs: &Path) -> Result<(), BpfError> {
        Pins::remove_all(bpffs)
    }

    /// Detaches what agents with another layout of the maps have pinned.
    ///
    /// # Errors
    ///
    /// The file system's.
    pub fn retire_other_versions(&self) -> Result<(), BpfError> {
        self.pins.remove_other_versions()
    }

    /// Where everything is pinned.
    pub fn pin_directory(&self) -> &Path {
        self.pins.base()
    }
}

/// The map of what pods' devices have in common.
const GUARDS: &str = "GUARDS";

/// Puts this agent's guards in the place of an earlier one's, for all pods at once.
fn install_guards(map: Map, ebpf: &mut Ebpf) -> Result<ProgramArray<MapData>, BpfError> {
    let mut guards = ProgramArray::try_from(map).map_err(BpfError::map(GUARDS))?;
    for guard in Guard::ALL {
        let name = guard.program();
        let program = loaded(ebpf, name)?.fd().map_err(BpfError::program(name))?;
        guards.set(guard.index(), program, 0).map_err(BpfError::map(GUARDS))?;
    }
    Ok(guards)
}

/// `E2BIG`: what a hash map answers when it is full.
const E2BIG: i32 = nix::libc::E2BIG;

/// Forgets what the node itself has connected to.
fn forget(mut flows: HashMap<MapData, Flow, u64>) -> Result<(), BpfError> {
    let known: Vec<Flow> =
        flows.keys().collect::<Result<_, _>>().map_err(BpfError::map("HOST_FLOWS"))?;
    known.iter().try_for_each(|flow| gone(flows.remove(flow))).map_err(BpfError::map("HOST_FLOWS"))
}

/// Removing what is not there is no failure.
fn gone(removed: Result<(), MapError>) -> Result<(), MapError> {
    match removed {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error))
            if error.io_error.kind() == std::io::ErrorKind::NotFound =>
        {
            Ok(())
        }
        other => other,
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A map handle has no invariant that a panic could break.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn program<'a, P>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut P, BpfError>
where
    &'a mut P: TryFrom<&'a mut aya::programs::Program, Error = aya::programs::ProgramError>,
{
    let program = ebpf
        .program_mut(name)
        .ok_or_else(|| BpfError::Unsupported(format!("the eBPF object has no program {name}")))?;
    program.try_into().map_err(BpfError::program(name))
}
