//! The snapshot in use as files, for the next start: one that was whole, and what has changed since.

use std::io;

use mesh_common::api;
use prost::Message as _;

use super::{
    files::PrivateDir,
    registry::{RegistryError, Snapshot},
};

/// A whole snapshot.
pub(super) const FILE: &str = "snapshot.pb";

/// The differences to it, one after the other, each with its length before it.
const CHANGES: &str = "snapshot-changes.pb";

/// So many changes are always kept, however small the whole snapshot is. In bytes.
const FEW: u64 = 256 << 10;

/// The files.
#[derive(Debug)]
pub(super) struct Stored {
    dir: PrivateDir,
    /// How large the whole snapshot and the changes are. In bytes.
    whole: u64,
    changes: u64,
}

impl Stored {
    /// Reads what was in use last. An error says why there is nothing to go on with.
    ///
    /// What a crash cut off in the middle of a change, or left of changes to an earlier snapshot, is
    /// not used and no error: it is as if the change had not arrived.
    pub(super) fn load(dir: PrivateDir) -> (Self, Result<Snapshot, String>) {
        let mut stored = Self { dir, whole: 0, changes: 0 };
        let snapshot = stored.read();
        if snapshot.is_err() {
            // Whatever comes next is stored as a whole.
            (stored.whole, stored.changes) = (0, u64::MAX);
        }
        (stored, snapshot)
    }

    fn read(&mut self) -> Result<Snapshot, String> {
        let text = |error: io::Error| error.to_string();
        let Some(bytes) = self.dir.read(FILE).map_err(text)? else {
            return Ok(Snapshot::default());
        };
        self.whole = bytes.len() as u64;
        let message = api::Snapshot::decode(bytes.as_slice()).map_err(|error| error.to_string())?;
        drop(bytes);
        let mut snapshot =
            Snapshot::try_from(message).map_err(|error: RegistryError| error.to_string())?;
        let changes = self.dir.read(CHANGES).map_err(text)?.unwrap_or_default();
        let mut rest = changes.as_slice();
        while !rest.is_empty() {
            let next = api::Snapshot::decode_length_delimited(&mut rest)
                .ok()
                .filter(|change| change.base_version != 0)
                .and_then(|change| snapshot.updated(change).ok());
            let Some(next) = next else {
                self.changes = u64::MAX;
                return Ok(snapshot);
            };
            snapshot = next;
        }
        self.changes = changes.len() as u64;
        Ok(snapshot)
    }

    /// Stores a snapshot as a whole.
    pub(super) fn replace(&mut self, snapshot: &Snapshot) -> io::Result<()> {
        // Until it is done.
        self.changes = u64::MAX;
        let mut whole = 0;
        let pieces = snapshot.fields().map(|field| {
            let piece = field.encode_to_vec();
            whole += piece.len() as u64;
            piece
        });
        self.dir.write_all(FILE, pieces)?;
        self.dir.remove(CHANGES)?;
        (self.whole, self.changes) = (whole, 0);
        Ok(())
    }

    /// Stores the change that has made `snapshot` of what is stored: the change alone, as long as
    /// all changes together are small beside the whole: the directory is best one in memory.
    pub(super) fn add(&mut self, change: &[u8], snapshot: &Snapshot) -> io::Result<()> {
        let changes = self.changes.saturating_add(change.len() as u64);
        if changes > (self.whole / 4).max(FEW) {
            return self.replace(snapshot);
        }
        // Until it is done: after a part of a change no other can follow.
        self.changes = u64::MAX;
        self.dir.append(CHANGES, change)?;
        self.changes = changes;
        Ok(())
    }
}
