//! What agents are told, numbered: whole, or as the difference to what they were told before.

mod content;

use std::{
    io,
    path::Path,
    sync::{Arc, OnceLock},
    time::SystemTime,
};

use mesh_common::api::Encoded;
use tokio::sync::watch;

pub use self::content::{Content, Difference};
use crate::files;

/// Every start of the server takes a block of this many versions.
const BLOCK: u64 = 1 << 32;

/// To how many earlier versions the difference is known. They share what has not changed; what is
/// older is not worth a difference.
const REMEMBERED: usize = 16;

/// The present snapshot. Whoever watches it sees the newest, never a queue of old ones.
#[derive(Debug)]
pub struct Publisher {
    present: watch::Sender<Arc<Snapshot>>,
    /// What the next version must not be below.
    floor: fn() -> u64,
}

/// One version. What is sent of it is encoded once for all agents: when it is first asked for.
#[derive(Debug)]
pub struct Snapshot {
    version: u64,
    content: Arc<Content>,
    whole: OnceLock<Parts>,
    in_one: OnceLock<Encoded>,
    /// The newest first.
    earlier: Vec<Earlier>,
}

/// The messages that are one update, together.
pub type Parts = Arc<[Encoded]>;

/// A version that some agents may still have.
#[derive(Debug)]
struct Earlier {
    version: u64,
    content: Arc<Content>,
    difference: OnceLock<Option<Parts>>,
}

impl Snapshot {
    /// The version.
    pub const fn version(&self) -> u64 {
        self.version
    }

    /// What has changed since an earlier version. None if that is not remembered, or if the whole
    /// snapshot says it shorter. Takes some milliseconds in a large mesh if nobody asked before.
    pub fn since(&self, version: u64) -> Option<Parts> {
        let earlier = self.earlier.iter().find(|earlier| earlier.version == version)?;
        let encode = || {
            let difference = self.content.since(&earlier.content);
            messages(&difference, &self.content, self.version, version)
        };
        earlier.difference.get_or_init(encode).clone()
    }

    /// Everything. Takes a good part of a second in a large mesh if nobody asked before.
    pub fn whole(&self) -> Parts {
        let encode = || self.content.whole().messages(self.version, 0).into();
        Arc::clone(self.whole.get_or_init(encode))
    }

    /// Everything in one message, for an agent that knows no parts. Takes as long.
    pub fn in_one(&self) -> Encoded {
        self.in_one.get_or_init(|| self.content.whole().message(self.version)).clone()
    }
}

fn messages(
    difference: &Difference<'_>,
    content: &Content,
    version: u64,
    base: u64,
) -> Option<Parts> {
    let shorter = difference.len() <= content.entries();
    shorter.then(|| difference.messages(version, base).into())
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
        let empty = Snapshot {
            version,
            content: Arc::default(),
            whole: OnceLock::new(),
            in_one: OnceLock::new(),
            earlier: Vec::new(),
        };
        Self { present: watch::Sender::new(Arc::new(empty)), floor }
    }

    /// Publishes a snapshot under the next version, if it differs from the present one. One at a
    /// time.
    pub fn publish(&self, content: Content) -> bool {
        let present = Arc::clone(&self.present.borrow());
        let difference = content.since(&present.content);
        if difference.is_empty() {
            return false;
        }
        let version = (present.version + 1).max((self.floor)());
        let last = Earlier {
            version: present.version,
            content: Arc::clone(&present.content),
            difference: OnceLock::from(messages(&difference, &content, version, present.version)),
        };
        let older = present.earlier.iter().map(|earlier| Earlier {
            version: earlier.version,
            content: Arc::clone(&earlier.content),
            difference: OnceLock::new(),
        });
        let earlier = std::iter::once(last).chain(older).take(REMEMBERED).collect();
        drop(difference);
        self.present.send_replace(Arc::new(Snapshot {
            version,
            content: Arc::new(content),
            whole: OnceLock::new(),
            in_one: OnceLock::new(),
            earlier,
        }));
        true
    }

    /// The version that agents should have.
    pub fn version(&self) -> u64 {
        self.present.borrow().version
    }

    /// Sees the present snapshot and every later one, but those that were overtaken.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Snapshot>> {
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
    use mesh_common::{api, svid::TrustBundle};
    use prost::Message as _;
    use rustls::pki_types::CertificateDer;

    use super::*;

    fn content(root: u8) -> Content {
        let roots = vec![CertificateDer::from(vec![root])];
        let bundle = TrustBundle { trust_domain: "mesh.example".parse().unwrap(), roots };
        let settings = api::Settings { svid_lifetime_seconds: 10 };
        Content { bundle: Some(Arc::new(bundle)), settings, ..Content::default() }
    }

    fn publish(publisher: &Publisher, root: u8) -> (bool, u64) {
        (publisher.publish(content(root)), publisher.version())
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
        assert_eq!(receiver.borrow_and_update().version(), publisher.version());
        assert!(!receiver.has_changed().unwrap());
    }

    fn received(parts: &[Encoded]) -> api::Snapshot {
        let mut together = api::Snapshot::default();
        for part in parts {
            together.append(api::Snapshot::decode(part.as_ref()).unwrap());
        }
        together
    }

    fn with(workloads: u32) -> Content {
        let workload = |n| {
            let text = format!(
                "uid: u{n:06}\nname: a\nnamespace: a\nservice_account: a\nnode: a\n\
                 addresses: ['fd00::{n:x}']\n"
            );
            Arc::new(crate::registry::parse(&text).unwrap())
        };
        Content { workloads: (1..=workloads).map(workload).collect(), ..content(1) }
    }

    fn present(publisher: &Publisher) -> Arc<Snapshot> {
        Arc::clone(&publisher.present.borrow())
    }

    #[test]
    fn the_difference_to_some_earlier_versions_is_known() {
        let publisher = Publisher::starting_at(1, || 0);
        let last = REMEMBERED as u32 + 8;
        (1..=last).for_each(|n| assert!(publisher.publish(with(n))));
        let version = publisher.version();
        let present = present(&publisher);
        let length = |parts: Parts| received(&parts).workloads.len();
        assert_eq!(present.since(version - 1).map(length), Some(1));
        assert_eq!(present.since(version - 5).map(length), Some(5));
        let oldest = version - REMEMBERED as u64;
        assert_eq!(present.since(oldest).map(length), Some(REMEMBERED));
        for unknown in [0, 1, oldest - 1, version, version + 1] {
            assert!(present.since(unknown).is_none(), "{unknown}");
        }
        assert_eq!(length(present.whole()), last as usize);
        // Nothing is encoded twice.
        assert!(Arc::ptr_eq(&present.whole(), &present.whole()));
    }

    #[test]
    fn what_the_whole_snapshot_says_shorter_is_no_difference() {
        let publisher = Publisher::starting_at(1, || 0);
        for workloads in [100, 49] {
            publisher.publish(with(workloads));
        }
        assert!(present(&publisher).since(publisher.version() - 1).is_none());
        publisher.publish(with(25));
        let difference = present(&publisher).since(publisher.version() - 1).unwrap();
        let difference = received(&difference);
        assert_eq!(difference.base_version, publisher.version() - 1);
        assert_eq!(difference.removed.unwrap().workload_uids.len(), 24);
    }

    #[test]
    fn a_large_snapshot_comes_in_parts_that_are_the_whole() {
        let publisher = Publisher::starting_at(1, || 0);
        publisher.publish(with(50_000));
        let present = present(&publisher);
        let parts = present.whole();
        assert!(parts.len() > 2 && parts.iter().all(|part| part.as_ref().len() < 1 << 20));
        let more: Vec<_> =
            parts.iter().map(|part| received(std::slice::from_ref(part)).more).collect();
        assert_eq!(more.iter().rposition(|more| *more), Some(parts.len() - 2));
        assert_eq!(received(&parts), received(&[present.in_one()]));
        assert_eq!(received(&parts).workloads.len(), 50_000);
    }

    #[test]
    fn a_damaged_number_is_not_guessed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("starts");
        std::fs::write(&path, "x").unwrap();
        Publisher::open(&path).unwrap_err();
    }
}
