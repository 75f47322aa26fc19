//! The eBPF programs and their maps, as the agent sees them: the only module that knows aya.
//!
//! Everything that guards is pinned, so that it outlives the agent:
//!
//! ```text
//! <bpffs>/nodemesh/v<ABI_VERSION>/maps/<NAME>            maps of the node
//!                                /links/<program>        connect4 connect6 egress host_flows
//!                                /pods/<cookie>/LISTENERS, steer, <guard>-<link id>
//! ```
//!
//! Before Linux 6.6 the guards of devices are classic tc filters, which need no pin to stay.
//!
//! A later agent opens the maps, attaches its own programs and only then lets go of the old ones:
//! at no moment is a pod unguarded.

mod classic;
mod events;
mod node;
mod pins;
mod pod;
mod probe;

use std::{io, path::PathBuf};

use aya::{
    EbpfError,
    maps::MapError,
    pin::PinError,
    programs::{ProgramError, links::LinkError},
};

pub use events::{Events, GuardEvent};
pub use node::{Counted, Datapath, DropCount, Tag};
pub use pins::is_bpffs;
pub use pod::{Device, DeviceLink};
pub use probe::{Features, missing};

/// What went wrong between the agent and the kernel's eBPF.
#[derive(Debug, thiserror::Error)]
pub enum BpfError {
    /// The kernel or its configuration lacks something the mesh stands on.
    #[error("this node cannot run the mesh: {0}")]
    Unsupported(String),
    /// The pinned maps are of another layout than this agent's.
    #[error(
        "the pinned map {name} has another layout than this agent expects ({found}, not \
         {expected}): run `mesh-agent uninstall` with the agent that made it"
    )]
    ForeignPin {
        /// The map.
        name: &'static str,
        /// Key and value sizes found, in bytes.
        found: String,
        /// Key and value sizes expected, in bytes.
        expected: String,
    },
    /// The BPF file system cannot be used.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// More pods than the maps have room for.
    #[error("this node has {limit} enrolled pods already, the most it can have")]
    TooManyPods {
        /// The limit.
        limit: u32,
    },
    /// Loading the object.
    #[error("loading the eBPF object: {0}")]
    Load(#[from] EbpfError),
    /// Loading or attaching a program.
    #[error("eBPF program {name}: {source}")]
    Program {
        /// Which one.
        name: String,
        /// Why.
        source: Box<ProgramError>,
    },
    /// Using a map.
    #[error("eBPF map {name}: {source}")]
    Map {
        /// Which one.
        name: &'static str,
        /// Why.
        source: MapError,
    },
    /// Using a link.
    #[error("eBPF link: {0}")]
    Link(#[from] LinkError),
    /// Pinning.
    #[error("pinning: {0}")]
    Pin(#[from] PinError),
}

impl BpfError {
    fn program(name: &str) -> impl FnOnce(ProgramError) -> Self {
        let name = name.to_owned();
        move |source| Self::Program { name, source: Box::new(source) }
    }

    fn map(name: &'static str) -> impl FnOnce(MapError) -> Self {
        move |source| Self::Map { name, source }
    }

    fn io(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}

/// Includes bytes with the alignment that the ELF parser wants.
const OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/mesh-ebpf"));
