//! The programs and maps that exist once per pod.

use std::{
    collections::BTreeSet,
    fs,
    os::fd::{AsFd, AsRawFd},
    path::Path,
};

use aya::{
    Ebpf, EbpfLoader,
    maps::SockMap,
    programs::{
        SchedClassifier, SkLookup, TcAttachType,
        links::{FdLink, PinnedLink},
        tc::SchedClassifierLink,
    },
};
use mesh_common::abi::{INBOUND_LISTENER, OUTBOUND_LISTENER};

use super::{BpfError, Datapath, OBJECT, node::program, pins};

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
    fn load_for(&self, cookie: u64) -> Result<Ebpf, BpfError> {
        let directory = self.pins.pod(cookie);
        fs::create_dir_all(&directory).map_err(BpfError::io(&directory))?;
        let mut loader = EbpfLoader::new();
        self.pins.share_maps(&mut loader);
        loader.map_pin_path("LISTENERS", directory.join("LISTENERS"));
        loader.override_global("POD_COOKIE", &cookie, true);
        Ok(loader.load(OBJECT)?)
    }

    /// Guards the pod's devices. Call in the pod's network namespace.
    ///
    /// Devices guarded before get this agent's program in the old one's place; pins of devices that
    /// are gone are removed.
    ///
    /// # Errors
    ///
    /// See [`BpfError`]. Every device that could be guarded is.
    pub fn guard_devices(&self, cookie: u64, devices: &[Device]) -> Result<(), BpfError> {
        let mut ebpf = self.load_for(cookie)?;
        let mut result = Ok(());
        for (name, link) in [("device", DeviceLink::Ethernet), ("device_l3", DeviceLink::None)] {
            let devices: Vec<&Device> = devices.iter().filter(|d| d.link == link).collect();
            if !devices.is_empty() {
                let attached = self.attach(&mut ebpf, cookie, name, "device", &devices);
                result = result.and(attached);
            }
        }
        self.forget_devices(cookie, "device", devices)?;
        result
    }

    /// Guards the host-side peers of the pod's devices. Call in the network namespace of the host,
    /// after [`Self::guard_devices`]: what the devices did not see is dropped here.
    ///
    /// # Errors
    ///
    /// See [`BpfError`].
    pub fn guard_peers(&self, cookie: u64, peers: &[Device]) -> Result<(), BpfError> {
        let mut ebpf = self.load_for(cookie)?;
        let all: Vec<&Device> = peers.iter().collect();
        let result = self.attach(&mut ebpf, cookie, "peer", "peer", &all);
        self.forget_devices(cookie, "peer", peers)?;
        result
    }

    fn attach(
        &self,
        ebpf: &mut Ebpf,
        cookie: u64,
        name: &str,
        prefix: &str,
        devices: &[&Device],
    ) -> Result<(), BpfError> {
        let program: &mut SchedClassifier = program(ebpf, name)?;
        program.load().map_err(BpfError::program(name))?;
        let direction = if prefix == "peer" { TcAttachType::Ingress } else { TcAttachType::Egress };
        let mut result = Ok(());
        for device in devices {
            let pin = self.pins.pod(cookie).join(format!("{prefix}-{}", device.index));
            let attached = attach_device(program, name, device, direction, &pin);
            result = result.and(attached);
        }
        result
    }

    fn forget_devices(
        &self,
        cookie: u64,
        prefix: &str,
        present: &[Device],
    ) -> Result<(), BpfError> {
        let present: BTreeSet<u32> = present.iter().map(|device| device.index).collect();
        for index in self.guarded_devices(cookie, prefix) {
            if !present.contains(&index) {
                pins::remove(&self.pins.pod(cookie).join(format!("{prefix}-{index}")))?;
            }
        }
        Ok(())
    }

    fn guarded_devices(&self, cookie: u64, prefix: &str) -> Vec<u32> {
        let Ok(entries) = fs::read_dir(self.pins.pod(cookie)) else { return Vec::new() };
        entries
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name();
                let (found, index) = name.to_str()?.split_once('-')?;
                if found == prefix { index.parse().ok() } else { None }
            })
            .collect()
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
        let map = ebpf.take_map("LISTENERS").ok_or_else(|| {
            BpfError::Unsupported("the eBPF object has no map LISTENERS".to_owned())
        })?;
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

    /// Whether everything that a pod's guards were attached to is gone. Without devices there is
    /// nothing by which anything could leave.
    ///
    /// # Errors
    ///
    /// See [`BpfError`].
    pub fn is_dead(&self, cookie: u64) -> Result<bool, BpfError> {
        let mut ebpf = self.load_for(cookie)?;
        let program: &mut SchedClassifier = program(&mut ebpf, "device")?;
        program.load().map_err(BpfError::program("device"))?;
        for index in self.guarded_devices(cookie, "device") {
            let pin = self.pins.pod(cookie).join(format!("device-{index}"));
            if replace_in_place(program, &pin)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Detaches a pod's programs: the third guard before the second, whose stamp it wants.
    pub(super) fn release_pod(&self, cookie: u64) -> Result<(), BpfError> {
        self.forget_devices(cookie, "peer", &[])?;
        let directory = self.pins.pod(cookie);
        match fs::remove_dir_all(&directory) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(BpfError::io(directory)(error))
            }
            Ok(()) | Err(_) => Ok(()),
        }
    }
}

fn attach_device(
    program: &mut SchedClassifier,
    name: &str,
    device: &Device,
    direction: TcAttachType,
    pin: &Path,
) -> Result<(), BpfError> {
    if pin.exists() {
        if replace_in_place(program, pin)? {
            return Ok(());
        }
        pins::remove(pin)?;
    }
    let id = program.attach(&device.name, direction).map_err(BpfError::program(name))?;
    let link = program.take_link(id).map_err(BpfError::program(name))?;
    pins::replace(FdLink::try_from(link)?, pin)
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
