//! The snapshot in use: checked before it is published, and kept for the next start.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use mesh_common::{
    api,
    svid::{Kind, PeerVerifier, SvidError, TrustBundle, Usage},
};
use prost::Message as _;
use rustls::pki_types::CertificateDer;
use tokio::sync::watch;

use super::{
    files::PrivateDir,
    registry::{RegistryError, Snapshot},
    status::{Counters, count},
    stored::{FILE, Stored},
    svid::unix,
};

/// Why a snapshot is refused.
#[derive(Debug, thiserror::Error)]
pub(super) enum SnapshotError {
    #[error(transparent)]
    Registry(#[from] RegistryError),
    #[error(
        "the trust bundle does not vouch for the control plane's own certificate, so no agent \
         could connect any more: {0}"
    )]
    CutOff(SvidError),
}

/// The only writer of the snapshot that everything else reads.
#[derive(Debug)]
pub(super) struct Snapshots {
    dir: PrivateDir,
    counters: Arc<Counters>,
    current: watch::Sender<Arc<Snapshot>>,
    /// Held while the snapshot is replaced.
    stored: Mutex<Stored>,
}

impl Snapshots {
    /// Starts with the snapshot that was in use last, or with none.
    pub(super) fn open(dir: PrivateDir, counters: Arc<Counters>) -> Self {
        let (stored, snapshot) = Stored::load(dir.clone());
        let snapshot = snapshot.unwrap_or_else(|error| {
            count(&counters.file_errors);
            let path = dir.path(FILE);
            tracing::warn!(path = %path.display(), error, "ignoring the stored snapshot: nothing \
                is known about any pod until the control plane sends one");
            Snapshot::default()
        });
        let current = watch::Sender::new(Arc::new(snapshot));
        Self { dir, counters, current, stored: Mutex::new(stored) }
    }

    /// What everything else reads.
    pub(super) fn subscribe(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.current.subscribe()
    }

    /// The snapshot in use.
    pub(super) fn current(&self) -> Arc<Snapshot> {
        Arc::clone(&self.current.borrow())
    }

    /// Puts a snapshot, or what has changed since the one in use, to use, or leaves everything as
    /// it is. `server_chain` is what the control plane that sent it has shown. Blocks on the file
    /// system.
    pub(super) fn apply(
        &self,
        update: api::Snapshot,
        server_chain: &[CertificateDer<'_>],
        now: SystemTime,
    ) -> Result<(), SnapshotError> {
        let mut stored = self.stored();
        let before = self.current();
        let change = (update.base_version != 0).then(|| update.encode_length_delimited_to_vec());
        let snapshot = before.updated(update)?;
        if let Some(bundle) = snapshot.bundle() {
            PeerVerifier::new(Arc::clone(bundle), Kind::Control)
                .verify(server_chain, Usage::Server, unix(now))
                .map_err(SnapshotError::CutOff)?;
        }
        if snapshot.version() < before.version() {
            tracing::warn!(
                version = snapshot.version(),
                before = before.version(),
                "the control plane has gone back to an older version: was its state restored?"
            );
        }
        tracing::debug!(version = snapshot.version(), "new snapshot");
        self.note(match change {
            Some(change) => stored.add(&change, &snapshot),
            None => stored.replace(&snapshot),
        });
        self.current.send_replace(Arc::new(snapshot));
        Ok(())
    }

    /// Replaces the trust bundle of the snapshot in use, if there is one, by a newer one. Blocks on
    /// the file system.
    pub(super) fn trust(&self, bundle: &TrustBundle) {
        let mut stored = self.stored();
        let before = self.current();
        if before.bundle().is_none_or(|current| **current == *bundle) {
            return;
        }
        let mut message = api::Snapshot::default();
        let fields = before.fields();
        let version = before.version();
        fields.for_each(|field| message.append(field));
        message = api::Snapshot { version, bundle: Some(bundle.to_api()), ..message };
        match before.updated(message) {
            Ok(snapshot) => {
                self.note(stored.replace(&snapshot));
                self.current.send_replace(Arc::new(snapshot));
            }
            Err(error) => tracing::error!(%error, "the new trust bundle is not used"),
        }
    }

    fn stored(&self) -> MutexGuard<'_, Stored> {
        self.stored.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, result: io::Result<()>) {
        if let Err(error) = result {
            count(&self.counters.file_errors);
            let path = self.dir.path(FILE);
            tracing::error!(path = %path.display(), %error, "cannot store the snapshot: after a \
                restart an older one is used until the control plane is reached");
        }
    }
}
