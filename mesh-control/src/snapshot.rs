//! What agents are told, numbered.

use std::{io, path::Path, sync::Arc, time::SystemTime};

use mesh_common::{api, svid::TrustBundle};
use tokio::sync::watch;

use crate::{files, registry::Registry, services::Services};

/// Every start of the server takes a block of this many versions.
const BLOCK: u64 = 1 << 32;

/// The present snapshot. Whoever watches it sees the newest, never a queue of old ones.
#[derive(Debug)]
pub struct Publisher {
    present: watch::Sender<Arc<api::Snapshot>>,
    /// What the next version must not be below.
    floor: fn() -> u64,
}

impl Publisher {
    /// Begins with an empty snapshot, whose version is higher than any of an earlier start.
    ///
    /// # Errors
    ///
    /// If the number of the start cannot be kept, or was damaged.
    pub fn open(path: &Path) -> io::Result<Self> {
        let starts = match files::read_optional(path)? {
            Some(text) => text.trim().parse::<u32>().map_err(io::Error::other)?,
            None => 0,
        };
        let starts = starts.checked_add(1).ok_or_else(|| io::Error::other("too many starts"))?;
        files::replace(path, format!("{starts}\n").as_bytes())?;
        Ok(Self::starting_at(u64::from(starts) * BLOCK, || 0))
    }

    /// Begins with an empty snapshot, and numbers by the wall clock: replicas share nothing, yet
    /// what is later has a higher version, whichever of them publishes it.
    pub fn by_clock() -> Self {
        Self::starting_at(microseconds(), microseconds)
    }

    fn starting_at(version: u64, floor: fn() -> u64) -> Self {
        let empty = api::Snapshot { version, ..Default::default() };
        Self { present: watch::Sender::new(Arc::new(empty)), floor }
    }

    /// Publishes a snapshot under the next version, if it differs from the present one.
    pub fn publish(
        &self,
        bundle: &TrustBundle,
        registry: &Registry,
        services: &Services,
        settings: api::Settings,
    ) -> bool {
        let bundle = Some(bundle.to_api());
        let workloads = registry.workloads().map(super::registry::Workload::to_api).collect();
        let Services { services, slices, nodes } = services.clone();
        let mut next = api::Snapshot {
            bundle,
            workloads,
            settings: Some(settings),
            services,
            endpoint_slices: slices,
            nodes,
            ..Default::default()
        };
        self.present.send_if_modified(|present| {
            next.version = present.version;
            if next == **present {
                return false;
            }
            next.version = (next.version + 1).max((self.floor)());
            *present = Arc::new(next);
            true
        })
    }

    /// The version that agents should have.
    pub fn version(&self) -> u64 {
        self.present.borrow().version
    }

    /// Sees the present snapshot and every later one, but those that were overtaken.
    pub fn subscribe(&self) -> watch::Receiver<Arc<api::Snapshot>> {
        let mut receiver = self.present.subscribe();
        receiver.mark_changed();
        receiver
    }
}

/// Since 1970. A double, which is what JSON readers have for a number, holds them until 2255.
fn microseconds() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use rustls::pki_types::CertificateDer;

    use super::*;

    fn publish(publisher: &Publisher, root: u8) -> (bool, u64) {
        let roots = vec![CertificateDer::from(vec![root])];
        let bundle = TrustBundle { trust_domain: "mesh.example".parse().unwrap(), roots };
        let settings = api::Settings { svid_lifetime_seconds: 10 };
        let (registry, services) = (Registry::default(), Services::default());
        (publisher.publish(&bundle, &registry, &services, settings), publisher.version())
    }

    #[test]
    fn versions_grow_with_changes_and_only_with_changes() {
        let dir = tempfile::tempdir().unwrap();
        let publisher = Publisher::open(&dir.path().join("starts")).unwrap();
        let (changed, first) = publish(&publisher, 1);
        assert!(changed);
        assert_eq!(publish(&publisher, 1), (false, first));
        assert_eq!(publish(&publisher, 2), (true, first + 1));
        let again = Publisher::open(&dir.path().join("starts")).unwrap();
        assert!(publish(&again, 2).1 > first + 1);
    }

    #[test]
    fn of_two_that_share_only_the_clock_the_later_is_higher() {
        let replicas = [Publisher::by_clock(), Publisher::by_clock()];
        let mut last = 0;
        for (root, publisher) in (0..8).zip(replicas.iter().cycle()) {
            std::thread::sleep(std::time::Duration::from_micros(10));
            let (changed, version) = publish(publisher, root);
            assert!(changed && version > last, "{version} after {last}");
            last = version;
        }
        assert!(last > u64::from(u32::MAX), "higher than those of a first start with a directory");
        assert!(last < 1 << 53);
    }

    #[test]
    fn a_clock_that_stands_still_does_not_stop_the_versions() {
        let publisher = Publisher::starting_at(7, || 5);
        assert_eq!(publish(&publisher, 1).1, 8);
        assert_eq!(publish(&publisher, 2).1, 9);
    }

    #[test]
    fn a_slow_watcher_sees_the_newest_only() {
        let dir = tempfile::tempdir().unwrap();
        let publisher = Publisher::open(&dir.path().join("starts")).unwrap();
        let mut receiver = publisher.subscribe();
        for root in 0..9 {
            publish(&publisher, root);
        }
        assert!(receiver.has_changed().unwrap());
        assert_eq!(receiver.borrow_and_update().version, publisher.version());
        assert!(!receiver.has_changed().unwrap());
    }

    #[test]
    fn a_damaged_number_is_not_guessed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("starts");
        std::fs::write(&path, "x").unwrap();
        Publisher::open(&path).unwrap_err();
    }
}
