//! What the programs tell: guard events, and their own log lines.

use aya::{
    Ebpf,
    maps::{Map, MapData, RingBuf},
};
use aya_log::EbpfLogger;
use mesh_common::abi::{EVENT_DROP, EVENT_SYSCTL, Event, Layer, Reason};
use tokio::io::{Interest, unix::AsyncFd};

use super::BpfError;
use crate::sys::async_fd;

/// Something the agent should look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuardEvent {
    /// Something of a pod was dropped. At most one per pod in some seconds.
    Dropped {
        /// The pod's network namespace.
        cookie: u64,
        /// Where.
        layer: Layer,
        /// Why.
        reason: Reason,
    },
    /// Somebody is writing a setting that the capture rests on, in some network namespace.
    SettingWritten,
}

/// The stream of [`GuardEvent`]s.
pub struct Events {
    ring: AsyncFd<RingBuf<MapData>>,
}

impl Events {
    /// Takes the ring buffer, and starts carrying the programs' log into the agent's.
    pub(super) fn new(ebpf: &mut Ebpf, ring: Map) -> Result<Self, BpfError> {
        let ring = RingBuf::try_from(ring).map_err(BpfError::map("EVENTS"))?;
        let ring = async_fd::register(ring, Interest::READABLE).map_err(BpfError::io("EVENTS"))?;
        match EbpfLogger::init(ebpf) {
            Ok(logger) => {
                let logger = async_fd::register(logger, Interest::READABLE)
                    .map_err(BpfError::io("AYA_LOGS"))?;
                tokio::spawn(carry_log(logger));
            }
            Err(error) => tracing::warn!(%error, "the eBPF programs' log lines are not shown"),
        }
        Ok(Self { ring })
    }

    /// Waits for the next event.
    ///
    /// # Errors
    ///
    /// When the descriptor cannot be waited for.
    pub async fn next(&mut self) -> Result<GuardEvent, BpfError> {
        loop {
            let mut ready = self.ring.readable_mut().await.map_err(BpfError::io("EVENTS"))?;
            while let Some(record) = ready.get_inner_mut().next() {
                if let Some(event) = Event::from_bytes(&record).and_then(guard_event) {
                    return Ok(event);
                }
            }
            ready.clear_ready();
        }
    }
}

fn guard_event(event: Event) -> Option<GuardEvent> {
    match event.kind {
        EVENT_SYSCTL => Some(GuardEvent::SettingWritten),
        EVENT_DROP => Some(GuardEvent::Dropped {
            cookie: event.cookie,
            layer: *Layer::ALL.get(event.layer as usize)?,
            reason: *Reason::ALL.get(event.reason as usize)?,
        }),
        _ => None,
    }
}

async fn carry_log(mut logger: AsyncFd<EbpfLogger<&'static dyn log::Log>>) {
    while let Ok(mut ready) = logger.readable_mut().await {
        ready.get_inner_mut().flush();
        ready.clear_ready();
    }
}
