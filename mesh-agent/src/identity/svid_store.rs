//! Where pods' keys and certificates outlive the agent's process: one PEM file per pod UID.

use std::{io, path::Path, sync::Arc};

use mesh_common::spiffe::check_segment;
use rustls::sign::CertifiedKey;

use super::{
    credentials,
    files::PrivateDir,
    status::{Counters, count},
};

/// The stored keys and certificates of this node's pods.
///
/// Losing a file costs one more request to the CA, so no failure here stops anything: it is
/// logged and counted.
#[derive(Debug)]
pub(super) struct SvidStore {
    dir: PrivateDir,
    counters: Arc<Counters>,
}

impl SvidStore {
    /// Opens the directory `svid` in the agent's runtime directory.
    pub(super) fn open(runtime_dir: &Path, counters: Arc<Counters>) -> io::Result<Self> {
        Ok(Self { dir: PrivateDir::open(&runtime_dir.join("svid"))?, counters })
    }

    /// What is stored for a pod. The key is checked to be the certificate's; what that says is
    /// not.
    pub(super) fn load(&self, uid: &str) -> Option<Arc<CertifiedKey>> {
        let name = file_name(uid);
        let result = self.dir.read(&name).map_err(|error| error.to_string()).and_then(|pem| {
            pem.map(|pem| credentials::from_pem(&pem))
                .transpose()
                .map_err(|error| error.to_string())
        });
        result.unwrap_or_else(|error| {
            count(&self.counters.file_errors);
            let path = self.dir.path(&name);
            tracing::warn!(path = %path.display(), error, "ignoring a stored certificate, asking \
                for a new one");
            None
        })
    }

    /// Stores what [`credentials::NewKey::to_pem`] made.
    pub(super) fn save(&self, uid: &str, pem: &str) {
        if let Err(error) = self.dir.write(&file_name(uid), pem.as_bytes()) {
            count(&self.counters.file_errors);
            let path = self.dir.path(&file_name(uid));
            tracing::warn!(path = %path.display(), %error, "cannot store a certificate: after a \
                restart the pod needs the control plane for a new one");
        }
    }

    /// Removes what is stored for a pod.
    pub(super) fn remove(&self, uid: &str) {
        // What is no name was never registered, so nothing was stored; and it may be a path.
        if check_segment(uid).is_err() {
            return;
        }
        if let Err(error) = self.dir.remove(&file_name(uid)) {
            count(&self.counters.file_errors);
            let path = self.dir.path(&file_name(uid));
            tracing::warn!(path = %path.display(), %error, "cannot remove a pod's key: remove it \
                by hand");
        }
    }
}

fn file_name(uid: &str) -> String {
    format!("{uid}.pem")
}
