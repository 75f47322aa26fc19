//! A snapshot that arrives in parts.

use mesh_common::api::{self, MAX_SNAPSHOT_BYTES};
use prost::Message as _;

/// Why parts are not one snapshot. Nothing that follows on the stream is of use.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum PartsError {
    #[error("it sends snapshots of more than {} MiB", MAX_SNAPSHOT_BYTES >> 20)]
    TooLong,
    #[error("it sends parts of different snapshots as one")]
    Mixed,
}

/// The parts so far.
#[derive(Debug, Default)]
pub(super) struct Parts {
    together: Option<api::Snapshot>,
    bytes: usize,
}

impl Parts {
    /// Adds what has arrived. Returns all of it with the last part.
    pub(super) fn add(&mut self, part: api::Snapshot) -> Result<Option<api::Snapshot>, PartsError> {
        self.bytes = self.bytes.saturating_add(part.encoded_len());
        if self.bytes > MAX_SNAPSHOT_BYTES {
            return Err(PartsError::TooLong);
        }
        let more = part.more;
        match &mut self.together {
            Some(together) => {
                let versions = |snapshot: &api::Snapshot| (snapshot.version, snapshot.base_version);
                if versions(together) != versions(&part) {
                    return Err(PartsError::Mixed);
                }
                together.append(part);
            }
            None => self.together = Some(part),
        }
        Ok(if more { None } else { std::mem::take(self).together })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(version: u64, uid: &str, more: bool) -> api::Snapshot {
        let workload = api::Workload { uid: uid.to_owned(), ..Default::default() };
        api::Snapshot { version, workloads: vec![workload], more, ..Default::default() }
    }

    #[test]
    fn parts_are_one_snapshot() {
        let mut parts = Parts::default();
        assert_eq!(parts.add(part(7, "a", true)), Ok(None));
        assert_eq!(parts.add(part(7, "b", true)), Ok(None));
        let whole = parts.add(part(7, "c", false)).unwrap().unwrap();
        let uids: Vec<_> = whole.workloads.iter().map(|workload| workload.uid.as_str()).collect();
        assert_eq!((whole.version, whole.more, uids), (7, false, vec!["a", "b", "c"]));
        assert_eq!(parts.add(part(8, "d", false)), Ok(Some(part(8, "d", false))));
    }

    #[test]
    fn parts_of_different_snapshots_are_none() {
        let mut parts = Parts::default();
        parts.add(part(7, "a", true)).unwrap();
        assert_eq!(parts.add(part(8, "b", false)), Err(PartsError::Mixed));
        let mut parts = Parts::default();
        parts.add(part(7, "a", true)).unwrap();
        let difference = api::Snapshot { base_version: 6, ..part(7, "b", false) };
        assert_eq!(parts.add(difference), Err(PartsError::Mixed));
    }

    #[test]
    fn there_is_an_end_to_it() {
        let mut parts = Parts::default();
        let long = "x".repeat(MAX_SNAPSHOT_BYTES / 8);
        let results: Vec<_> = (0..8).map(|_| parts.add(part(7, &long, true))).collect();
        assert_eq!(results[6], Ok(None));
        assert_eq!(results[7], Err(PartsError::TooLong));
    }
}
