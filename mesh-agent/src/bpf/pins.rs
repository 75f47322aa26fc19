//! Where things are pinned.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use aya::{
    EbpfLoader,
    maps::MapInfo,
    programs::links::{FdLink, PinnedLink},
};
use mesh_common::abi::{ABI_VERSION, Event, Flow, PodConfig, PodCounters};
use nix::{
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

use super::BpfError;
use crate::sys::bpf::detach_pinned_link;

/// A map of the node, with the sizes of its keys and values in bytes. aya does not compare them.
struct NodeMap {
    name: &'static str,
    key: usize,
    value: usize,
}

const NODE_MAPS: [NodeMap; 8] = [
    NodeMap { name: "PODS", key: 8, value: size_of::<PodConfig>() },
    NodeMap { name: "COUNTERS", key: 8, value: size_of::<PodCounters>() },
    NodeMap { name: "GUARD_KEY", key: 4, value: 4 },
    NodeMap { name: "GUARDS", key: 4, value: 4 },
    NodeMap { name: "EVENTS", key: 0, value: 0 },
    NodeMap { name: "HOST_FLOWS", key: size_of::<Flow>(), value: 8 },
    NodeMap { name: "AGENT_SOCKETS", key: 4, value: 4 },
    NodeMap { name: "AYA_LOGS", key: 0, value: 0 },
];

const _: () = assert!(size_of::<Event>() == 24);

/// Whether a BPF file system is mounted at a path.
///
/// # Errors
///
/// When nothing is there.
pub fn is_bpffs(path: &Path) -> io::Result<bool> {
    Ok(statfs(path)?.filesystem_type() == BPF_FS_MAGIC)
}

/// The agent's directory in bpffs.
#[derive(Clone, Debug)]
pub(super) struct Pins {
    base: PathBuf,
    root: PathBuf,
}

impl Pins {
    /// Names the directory below a BPF file system, which is mounted if nothing is there yet.
    pub(super) fn open(bpffs: &Path) -> Result<Self, BpfError> {
        fs::create_dir_all(bpffs).map_err(BpfError::io(bpffs))?;
        if !is_bpffs(bpffs).map_err(BpfError::io(bpffs))? {
            let options = Some("mode=0700");
            mount(Some("bpf"), bpffs, Some("bpf"), MsFlags::empty(), options)
                .map_err(io::Error::from)
                .map_err(BpfError::io(bpffs))?;
            tracing::info!(path = %bpffs.display(), "mounted a BPF file system");
        }
        let base = bpffs.join("nodemesh");
        let pins = Self { root: base.join(format!("v{ABI_VERSION}")), base };
        for directory in ["maps", "links", "pods"] {
            let path = pins.root.join(directory);
            fs::create_dir_all(&path).map_err(BpfError::io(path))?;
        }
        pins.check_maps()?;
        Ok(pins)
    }

    fn check_maps(&self) -> Result<(), BpfError> {
        for NodeMap { name, key, value } in NODE_MAPS {
            let path = self.map(name);
            if !path.exists() {
                continue;
            }
            let info = MapInfo::from_pin(&path).map_err(BpfError::map(name))?;
            let found = (info.key_size() as usize, info.value_size() as usize);
            if found != (key, value) {
                let (found, expected) = (format!("{found:?}"), format!("{:?}", (key, value)));
                return Err(BpfError::ForeignPin { name, found, expected });
            }
        }
        Ok(())
    }

    /// Makes a loader use the node's maps.
    pub(super) fn share_maps(&self, loader: &mut EbpfLoader<'_>) {
        for NodeMap { name, .. } in NODE_MAPS {
            loader.map_pin_path(name, self.map(name));
        }
    }

    /// The pin of a map of the node.
    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.root.join("maps").join(name)
    }

    /// The pin of a node-wide link.
    pub(super) fn link(&self, program: &str) -> PathBuf {
        self.root.join("links").join(program)
    }

    /// The directory of a pod's pins.
    pub(super) fn pod(&self, cookie: u64) -> PathBuf {
        self.root.join("pods").join(cookie.to_string())
    }

    /// The pods that have pins.
    pub(super) fn pods(&self) -> Result<Vec<u64>, BpfError> {
        let path = self.root.join("pods");
        let entries = fs::read_dir(&path).map_err(BpfError::io(path))?;
        Ok(entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect())
    }

    /// Removes every pin, of every version, and with them whatever is attached.
    pub(super) fn remove_all(bpffs: &Path) -> Result<(), BpfError> {
        remove_directory(&bpffs.join("nodemesh"))
    }

    /// Removes the pins of other versions, and with them whatever is attached.
    pub(super) fn remove_other_versions(&self) -> Result<(), BpfError> {
        let entries = fs::read_dir(&self.base).map_err(BpfError::io(&self.base))?;
        for version in entries.flatten().map(|entry| entry.path()) {
            if version != self.root {
                remove_directory(&version)?;
                tracing::info!(path = %version.display(), "removed the pins of another version");
            }
        }
        Ok(())
    }

    /// The directory that holds every version.
    pub(super) fn base(&self) -> &Path {
        &self.base
    }
}

/// Pins a link in the place of another, which stays attached until this one is in force, and no
/// longer: as long as both are, both decide.
pub(super) fn replace(link: FdLink, path: &Path) -> Result<(), BpfError> {
    // bpffs refuses names with a dot.
    let mut beside = path.as_os_str().to_owned();
    beside.push("-new");
    let beside = PathBuf::from(beside);
    remove(&beside)?;
    let _pinned: PinnedLink = link.pin(&beside)?;
    detach(path);
    fs::rename(&beside, path).map_err(BpfError::io(path))
}

/// Removes a pin, if there is one, and detaches the link that it holds.
pub(super) fn remove(path: &Path) -> Result<(), BpfError> {
    detach(path);
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(BpfError::io(path)(error)),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Removes a directory of pins, if there is one, and detaches the links that they hold.
pub(super) fn remove_directory(path: &Path) -> Result<(), BpfError> {
    if !path.exists() {
        return Ok(());
    }
    for entry in fs::read_dir(path).map_err(BpfError::io(path))?.flatten() {
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        let remove = if is_directory { remove_directory } else { remove };
        remove(&entry.path())?;
    }
    fs::remove_dir(path).map_err(BpfError::io(path))
}

/// Detaches a pinned link at once. If that fails, the kernel will do it after its pin is gone.
fn detach(path: &Path) {
    match detach_pinned_link(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::debug!(path = %path.display(), %error, "cannot detach what is pinned here");
        }
        Ok(()) | Err(_) => {}
    }
}
