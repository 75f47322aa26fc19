//! How the plugin reads the Kubernetes API: the service account of the pod that installs it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::json;

use super::{super::durable, InstallError, failed};

/// Where a pod finds the credentials of its service account.
pub(super) struct Account<'a>(pub(super) &'a Path);

impl Account<'_> {
    /// The namespace of the pod: where nodemesh is installed.
    pub(super) fn namespace(&self) -> Result<String, InstallError> {
        self.read("namespace")
    }

    /// Writes a kubeconfig, and the certificates it needs beside it, if they are not what they
    /// should be. Returns whether they were not.
    pub(super) fn write_kubeconfig(
        &self,
        server: &str,
        kubeconfig: &Path,
    ) -> Result<bool, InstallError> {
        let certificates = kubeconfig.with_file_name("ca.crt");
        let content = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "nodemesh-cni",
            "contexts": [{
                "name": "nodemesh-cni",
                "context": { "cluster": "this", "user": "nodemesh-cni" },
            }],
            "clusters": [{
                "name": "this",
                "cluster": { "server": server, "certificate-authority": certificates },
            }],
            "users": [{ "name": "nodemesh-cni", "user": { "token": self.read("token")? } }],
        });
        // The certificates first: the kubeconfig needs them.
        let renewed = update(&certificates, &self.read("ca.crt")?)?;
        Ok(update(kubeconfig, &format!("{content:#}\n"))? || renewed)
    }

    fn read(&self, name: &str) -> Result<String, InstallError> {
        let path: PathBuf = self.0.join(name);
        let text = fs::read_to_string(&path).map_err(failed(&path))?;
        if text.trim().is_empty() {
            return Err(InstallError::Empty(path));
        }
        Ok(text.trim().to_owned())
    }
}

fn update(path: &Path, text: &str) -> Result<bool, InstallError> {
    let differs = fs::read(path).ok().as_deref() != Some(text.as_bytes());
    if differs {
        durable::write(path, 0o600, text.as_bytes()).map_err(failed(path))?;
    }
    Ok(differs)
}
