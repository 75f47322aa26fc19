//! The service account of the pod that installs the plugin, and how the plugin reads the Kubernetes API.

use std::{
    fs,
    path::{Path, PathBuf},
};

use kube::{Client, Config, config::KubeConfigOptions};
use serde_json::{Value, json};

use super::{super::durable, InstallError, failed};

/// Where a pod finds the credentials of its service account.
pub(super) struct Account<'a>(pub(super) &'a Path);

impl Account<'_> {
    /// The namespace of the pod: where nodemesh is installed.
    pub(super) fn namespace(&self) -> Result<String, InstallError> {
        self.read("namespace")
    }

    /// The token of the pod.
    pub(super) fn token(&self) -> Result<String, InstallError> {
        self.read("token")
    }

    /// Asks the API server as this pod.
    pub(super) async fn client(&self, server: &str) -> Result<Client, InstallError> {
        let failed = |error: &dyn std::error::Error| InstallError::Client(error.to_string());
        let content = kubeconfig(server, &self.0.join("ca.crt"), &self.token()?);
        let content = serde_json::from_value(content).map_err(|error| failed(&error))?;
        let mut config = Config::from_custom_kubeconfig(content, &KubeConfigOptions::default())
            .await
            .map_err(|error| failed(&error))?;
        // The next round does.
        config.default_retry = false;
        Client::try_from(config).map_err(|error| failed(&error))
    }

    /// Writes a kubeconfig, and the certificates it needs beside it, if they are not what they
    /// should be. Returns whether they were not.
    pub(super) fn write_kubeconfig(
        &self,
        server: &str,
        token: &str,
        kubeconfig: &Path,
    ) -> Result<bool, InstallError> {
        let certificates = kubeconfig.with_file_name("ca.crt");
        let content = self::kubeconfig(server, &certificates, token);
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

fn kubeconfig(server: &str, certificates: &Path, token: &str) -> Value {
    json!({
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
        "users": [{ "name": "nodemesh-cni", "user": { "token": token } }],
    })
}

fn update(path: &Path, text: &str) -> Result<bool, InstallError> {
    let differs = fs::read(path).ok().as_deref() != Some(text.as_bytes());
    if differs {
        durable::write(path, 0o600, text.as_bytes()).map_err(failed(path))?;
    }
    Ok(differs)
}
