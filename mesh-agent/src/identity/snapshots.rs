//! The snapshot in use: checked before it is published, and kept for the next start.

use std::{sync::Arc, time::SystemTime};

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
    svid::unix,
};

const FILE: &str = "snapshot.pb";

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
}

impl Snapshots {
    /// Starts with the snapshot that was in use last, or with none.
    pub(super) fn open(dir: PrivateDir, counters: Arc<Counters>) -> Self {
        let stored = load(&dir).unwrap_or_else(|error| {
            count(&counters.file_errors);
            let path = dir.path(FILE);
            tracing::warn!(path = %path.display(), error, "ignoring the stored snapshot: nothing \
                is known about any pod until the control plane sends one");
            Snapshot::default()
        });
        Self { dir, counters, current: watch::Sender::new(Arc::new(stored)) }
    }

    /// What everything else reads.
    pub(super) fn subscribe(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.current.subscribe()
    }

    /// The snapshot in use.
    pub(super) fn current(&self) -> Arc<Snapshot> {
        Arc::clone(&self.current.borrow())
    }

    /// Puts a snapshot to use, or leaves everything as it is. `server_chain` is what the control
    /// plane that sent it has shown.
    pub(super) fn apply(
        &self,
        message: api::Snapshot,
        server_chain: &[CertificateDer<'_>],
        now: SystemTime,
    ) -> Result<(), SnapshotError> {
        let bytes = message.encode_to_vec();
        let snapshot = Snapshot::try_from(message)?;
        if let Some(bundle) = snapshot.bundle() {
            PeerVerifier::new(Arc::clone(bundle), Kind::Control)
                .verify(server_chain, Usage::Server, unix(now))
                .map_err(SnapshotError::CutOff)?;
        }
        let before = self.current();
        if snapshot.version() < before.version() {
            tracing::warn!(
                version = snapshot.version(),
                before = before.version(),
                "the control plane has gone back to an older version: was its state restored?"
            );
        }
        tracing::debug!(version = snapshot.version(), "new snapshot");
        self.publish(snapshot, &bytes);
        Ok(())
    }

    /// Replaces the trust bundle of the snapshot in use, if there is one, by a newer one.
    pub(super) fn trust(&self, bundle: &TrustBundle) {
        if self.current().bundle().is_none_or(|current| **current == *bundle) {
            return;
        }
        let changed = load_message(&self.dir).and_then(|message| {
            let message = message.ok_or("it is gone")?;
            let message = api::Snapshot { bundle: Some(bundle.to_api()), ..message };
            let bytes = message.encode_to_vec();
            Ok((Snapshot::try_from(message).map_err(|error| error.to_string())?, bytes))
        });
        match changed {
            Ok((snapshot, bytes)) => self.publish(snapshot, &bytes),
            Err(error) => {
                count(&self.counters.file_errors);
                let path = self.dir.path(FILE);
                tracing::error!(path = %path.display(), error, "cannot read the stored snapshot, \
                    so the new trust bundle is not used: remove the file and restart the agent");
            }
        }
    }

    fn publish(&self, snapshot: Snapshot, bytes: &[u8]) {
        if let Err(error) = self.dir.write(FILE, bytes) {
            count(&self.counters.file_errors);
            let path = self.dir.path(FILE);
            tracing::error!(path = %path.display(), %error, "cannot store the snapshot: after a \
                restart an older one is used until the control plane is reached");
        }
        let snapshot = snapshot.sharing_with(&self.current());
        self.current.send_replace(Arc::new(snapshot));
    }
}

fn load(dir: &PrivateDir) -> Result<Snapshot, String> {
    load_message(dir)?.map_or_else(
        || Ok(Snapshot::default()),
        |message| message.try_into().map_err(|error: RegistryError| error.to_string()),
    )
}

fn load_message(dir: &PrivateDir) -> Result<Option<api::Snapshot>, String> {
    let bytes = dir.read(FILE).map_err(|error| error.to_string())?;
    bytes
        .map(|bytes| api::Snapshot::decode(bytes.as_slice()))
        .transpose()
        .map_err(|error| error.to_string())
}
