//! The programs and maps that exist once per pod.

use std::{
    fs,
    os::fd::{AsFd, AsRawFd},
    path::{Path, PathBuf},
};

use aya::{
    Ebpf,
    maps::{Array, SockMap},
    programs::{
        LinkOrder, SchedClassifier, SkLookup, TcAttachType,
        links::{FdLink, PinnedLink},
        tc::{SchedClassifierLink, TcAttachOptions},
    },
};
use mesh_common::abi::{
    GUARD_DEVICE, GUARD_DEVICE_L3, GUARD_PEER, INBOUND_LISTENER, OUTBOUND_LISTENER,
};

use super::{
    BpfError, Datapath, OBJECT, classic,
    node::{lock, program},
    pins,
};

/// How a device frames packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceLink {
    /// With an Ethernet header.
    Ethernet,
    /// Not at all: tunnels.
    None,
}

/// A device to guard, in the network namespace of the calling thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its index.
    pub index: u32,
    /// Its name, by which aya finds it.
    pub name: String,
    /// How it frames packets.
    pub link: DeviceLink,
}

impl Datapath {
    /// The object, for one pod. Whoever may need it for the same pod soon puts it into `loaded`.
    fn load_for(&self, cookie: u64) -> Result<Ebpf, BpfError> {
        if let Some((of, ebpf)) = lock(&self.loaded).take()
            && of == cookie
        {
            return Ok(ebpf);
        }
        let directory = self.pins.pod(cookie);
        fs::create_dir_all(&directory).map_err(BpfError::io(&directory))?;
        let mut ebpf = {
            let mut loader = lock(&self.loader);
            loader.map_pin_path("LISTENERS", directory.join("LISTENERS"));
            loader.load(OBJECT)?
        };
        let map = ebpf.map_mut("POD").ok_or_else(|| no_map("POD"))?;
        let mut pod: Array<_, u64> = map.try_into().map_err(BpfError::map("POD"))?;
        pod.set(0, cookie, 0).map_err(BpfError::map("POD"))?;
        Ok(ebpf)
    }

    /// Guards the pod's devices. Call in the pod's network namespace.
    ///
    /// Whatever was guarded before gets this agent's program in the old one's place, also a device
    /// that has left the namespace since: whoever took it elsewhere takes the guard along.
    ///
    /// # Errors
    ///
    /// See [`BpfError`]. Every device that could be guarded is.
    pub fn guard_devices(&self, cookie: u64, devices: &[Device]) -> Result<(), BpfError> {
        let of = |link| devices.iter().filter(|device| device.link == link).collect::<Vec<_>>();
        let ethernet = self.attach(cookie, Guard::Device, &of(DeviceLink::Ethernet));
        ethernet.and(self.attach(cookie, Guard::DeviceL3, &of(DeviceLink::None)))
    }

    /// Guards the host-side peers of the pod's devices. Call in the network namespace of the host,
    /// after [`Self::guard_devices`]: what the devices did not see is dropped here.
    ///
    /// # Errors
    ///
    /// See [`BpfError`].
    pub fn guard_peers(&self, cookie: u64, peers: &[Device]) -> Result<(), BpfError> {
        self.attach(cookie, Guard::Peer, &peers.iter().collect::<Vec<_>>())
    }

    fn attach(&self, cookie: u64, guard: Guard, devices: &[&Device]) -> Result<(), BpfError> {
        let name = guard.pod_program();
        let current = lock(&self.guards).get(&(cookie, guard)).copied();
        if current.is_some_and(|id| devices.iter().all(|device| is_attached(id, guard, device))) {
            return Ok(());
        }
        let pins = self.guard_pins(cookie, guard);
        if devices.is_empty() && pins.is_empty() {
            return Ok(());
        }
        let mut ebpf = self.load_for(cookie)?;
        let program = loaded(&mut ebpf, name)?;
        let id = program.info().map_err(BpfError::program(name))?.id();
        for pin in pins {
            if !replace_in_place(program, &pin)? {
                pins::remove(&pin)?;
            }
        }
        let mut result = Ok(());
        for device in devices {
            if !is_attached(id, guard, device) {
                result = result.and(self.attach_device(program, cookie, guard, device));
            }
        }
        if result.is_ok() {
            lock(&self.guards).insert((cookie, guard), id);
            *lock(&self.loaded) = Some((cookie, ebpf));
        }
        result
    }

    fn attach_device(
        &self,
        program: &mut SchedClassifier,
        cookie: u64,
        guard: Guard,
        device: &Device,
    ) -> Result<(), BpfError> {
        let name = guard.pod_program();
        if !self.features().tcx {
            return classic::attach(program, &device.name, guard.direction())
                .map_err(BpfError::program(name));
        }
        let last = TcAttachOptions::TcxOrder(LinkOrder::default());
        let id = program
            .attach_with_options(&device.name, guard.direction(), last)
            .map_err(BpfError::program(name))?;
        let link = FdLink::try_from(program.take_link(id).map_err(BpfError::program(name))?)?;
        // Named by the link: an index says nothing about a device that changes its namespace.
        let name = format!("{}-{}", guard.program(), link.info()?.id());
        let pin = self.pins.pod(cookie).join(name);
        pins::replace(link, &pin)
    }

    /// Takes the guards from a pod's devices where pins do not hold them, which [`Self::release`]
    /// removes. Call in the pod's network namespace, after [`Self::unguard_peers`].
    ///
    /// # Errors
    ///
    /// See [`BpfError`].
    pub fn unguard_devices(devices: &[Device]) -> Result<(), BpfError> {
        detach_all(&[Guard::Device, Guard::DeviceL3], devices)
    }

    /// The same with the host-side peers. Call in the network namespace of the host.
    ///
    /// # Errors
    ///
    /// See [`BpfError`].
    pub fn unguard_peers(peers: &[Device]) -> Result<(), BpfError> {
        detach_all(&[Guard::Peer], peers)
    }

    /// The pins of the links by which one guard is attached.
    fn guard_pins(&self, cookie: u64, guard: Guard) -> Vec<PathBuf> {
        let Ok(entries) = fs::read_dir(self.pins.pod(cookie)) else { return Vec::new() };
        let is_of_guard = |path: &PathBuf| {
            let name = path.file_name().and_then(|name| name.to_str());
            name.and_then(|name| name.split_once('-')).is_some_and(|(of, _)| of == guard.program())
        };
        entries.flatten().map(|entry| entry.path()).filter(is_of_guard).collect()
    }

    /// Hands the agent's listeners in the pod to the kernel, and has it deliver connections to
    /// them.
    ///
    /// # Errors
    ///
    /// See [`BpfError`].
    pub fn steer(
        &self,
        cookie: u64,
        netns: impl AsFd,
        outbound: &impl AsRawFd,
        inbound: &impl AsRawFd,
    ) -> Result<(), BpfError> {
        let mut ebpf = self.load_for(cookie)?;
        let map = ebpf.take_map("LISTENERS").ok_or_else(|| no_map("LISTENERS"))?;
        let mut listeners: SockMap<_> = map.try_into().map_err(BpfError::map("LISTENERS"))?;
        listeners.set(OUTBOUND_LISTENER, outbound, 0).map_err(BpfError::map("LISTENERS"))?;
        listeners.set(INBOUND_LISTENER, inbound, 0).map_err(BpfError::map("LISTENERS"))?;

        let name = "steer";
        let program: &mut SkLookup = program(&mut ebpf, name)?;
        program.load().map_err(BpfError::program(name))?;
        let id = program.attach(netns).map_err(BpfError::program(name))?;
        let link = program.take_link(id).map_err(BpfError::program(name))?;
        pins::replace(FdLink::from(link), &self.pins.pod(cookie).join(name))
    }

    /// Whether an agent got as far as [`Self::steer`] in this pod, the last step of an enrolment.
    pub fn is_steered(&self, cookie: u64) -> bool {
        self.pins.pod(cookie).join("steer").exists()
    }

    /// Whether everything that a pod's guards were attached to is gone. Without devices there is
    /// nothing by which anything could leave. Known only where guards are links.
    ///
    /// # Errors
    ///
    /// See [`BpfError`].
    pub fn is_dead(&self, cookie: u64) -> Result<bool, BpfError> {
        for guard in [Guard::Device, Guard::DeviceL3] {
            let pins = self.guard_pins(cookie, guard);
            if pins.is_empty() {
                continue;
            }
            let mut ebpf = self.load_for(cookie)?;
            let program = loaded(&mut ebpf, guard.pod_program())?;
            for pin in pins {
                if replace_in_place(program, &pin)? {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// Detaches a pod's programs: the third guard before the second, whose stamp it wants.
    pub(super) fn release_pod(&self, cookie: u64) -> Result<(), BpfError> {
        lock(&self.guards).retain(|(of, _), _| *of != cookie);
        // Its map of listeners is the one whose pin goes now.
        drop(lock(&self.loaded).take());
        for pin in self.guard_pins(cookie, Guard::Peer) {
            pins::remove(&pin)?;
        }
        pins::remove_directory(&self.pins.pod(cookie))
    }
}

/// A program that judges what passes a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Guard {
    /// The pod's own device, with Ethernet headers.
    Device,
    /// The pod's own device, without.
    DeviceL3,
    /// The host's end of a device of the pod.
    Peer,
}

impl Guard {
    /// Every guard.
    pub(super) const ALL: [Self; 3] = [Self::Device, Self::DeviceL3, Self::Peer];

    /// Its name in the object, which the pins of its links begin with.
    pub(super) const fn program(self) -> &'static str {
        match self {
            Self::Device => "device",
            Self::DeviceL3 => "device_l3",
            Self::Peer => "peer",
        }
    }

    /// What a pod has of it: the program that is attached, which hands over to the guard.
    const fn pod_program(self) -> &'static str {
        match self {
            Self::Device => "pod_device",
            Self::DeviceL3 => "pod_device_l3",
            Self::Peer => "pod_peer",
        }
    }

    /// Its place in the map `GUARDS`.
    pub(super) const fn index(self) -> u32 {
        match self {
            Self::Device => GUARD_DEVICE,
            Self::DeviceL3 => GUARD_DEVICE_L3,
            Self::Peer => GUARD_PEER,
        }
    }

    /// What the device does with the packets that it judges.
    const fn direction(self) -> TcAttachType {
        match self {
            Self::Device | Self::DeviceL3 => TcAttachType::Egress,
            Self::Peer => TcAttachType::Ingress,
        }
    }
}

fn detach_all(guards: &[Guard], devices: &[Device]) -> Result<(), BpfError> {
    let mut all = guards.iter().flat_map(|guard| devices.iter().map(move |device| (guard, device)));
    all.try_for_each(|(guard, device)| {
        classic::detach(&device.name, guard.direction()).map_err(BpfError::program(guard.program()))
    })
}

fn no_map(name: &'static str) -> BpfError {
    BpfError::Unsupported(format!("the eBPF object has no map {name}"))
}

/// A program of the object, loaded into the kernel once.
pub(super) fn loaded<'a>(
    ebpf: &'a mut Ebpf,
    name: &str,
) -> Result<&'a mut SchedClassifier, BpfError> {
    let program: &mut SchedClassifier = program(ebpf, name)?;
    if program.fd().is_err() {
        program.load().map_err(BpfError::program(name))?;
    }
    Ok(program)
}

/// Whether a program is attached to a device. If the kernel does not say, it is not: attaching it
/// then tells why.
fn is_attached(program: u32, guard: Guard, device: &Device) -> bool {
    SchedClassifier::query_tcx(&device.name, guard.direction())
        .is_ok_and(|(_, attached)| attached.iter().any(|info| info.id() == program))
}

/// Puts the program in the place of the one that a pinned link holds; false if the device is gone.
fn replace_in_place(program: &mut SchedClassifier, pin: &Path) -> Result<bool, BpfError> {
    let link: FdLink = PinnedLink::from_pin(pin)?.into();
    let replaced =
        SchedClassifierLink::try_from(link).ok().and_then(|link| program.attach_to_link(link).ok());
    let Some(id) = replaced else { return Ok(false) };
    // The pin holds the link; giving up our descriptor does not detach it.
    drop(program.take_link(id).map_err(BpfError::program("tcx"))?);
    Ok(true)
}
