//! What is different when the agent is a pod of a Kubernetes cluster.

use std::path::PathBuf;

use mesh_common::spiffe::check_segment;
use serde::Deserialize;

use super::{ConfigError, Endpoint, absolute, segment};

/// What the kubelet tells of the Service `nodemesh-control` to the pods of its namespace.
const SERVICE_HOST: &str = "NODEMESH_CONTROL_SERVICE_HOST";
const SERVICE_PORT: &str = "NODEMESH_CONTROL_SERVICE_PORT";

/// What the DaemonSet tells of `spec.nodeName`.
const NODE_NAME: &str = "NODE_NAME";

/// What an agent in a cluster proves itself with, and where nodemesh is.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Kubernetes {
    /// The token of the agent's service account for the control plane, of a projected volume. Read
    /// each time it is shown: the kubelet replaces it.
    #[serde(deserialize_with = "absolute")]
    pub service_account_token_file: PathBuf,
    /// The roots of the mesh: the key `ca.crt` of the ConfigMap `nodemesh-bundle`, mounted.
    #[serde(deserialize_with = "absolute")]
    pub bundle_file: PathBuf,
    /// Where nodemesh is installed. Never in the mesh itself.
    #[serde(deserialize_with = "segment")]
    pub namespace: String,
}

impl Default for Kubernetes {
    fn default() -> Self {
        Self {
            service_account_token_file: "/var/run/secrets/nodemesh/token".into(),
            bundle_file: "/var/run/nodemesh/bundle/ca.crt".into(),
            namespace: "nodemesh-system".to_owned(),
        }
    }
}

/// This node's name, when the configuration does not say.
pub(super) fn node_name(
    on_kubernetes: bool,
    environment: &dyn Fn(&str) -> Option<String>,
) -> Result<String, ConfigError> {
    let (found, name) = match environment(NODE_NAME).filter(|_| on_kubernetes) {
        Some(name) => ("NODE_NAME of the environment", name),
        None => ("the host name", host_name()),
    };
    match check_segment(&name) {
        Ok(()) => Ok(name),
        Err(source) => Err(ConfigError::NodeName { found, source }),
    }
}

/// Where the control plane is, when the configuration does not say; or what to do about it.
pub(super) fn control_plane(
    on_kubernetes: bool,
    environment: &dyn Fn(&str) -> Option<String>,
) -> Result<Endpoint, String> {
    if !on_kubernetes {
        return Err("name at least one host:port at which it listens".to_owned());
    }
    let service = environment(SERVICE_HOST).zip(environment(SERVICE_PORT));
    let (host, port) = service.ok_or_else(|| {
        format!(
            "{SERVICE_HOST} and {SERVICE_PORT} are not in the environment, where the kubelet puts \
             them when a container starts: is there a Service nodemesh-control in the agent's \
             namespace?"
        )
    })?;
    let text =
        if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
    text.parse().map_err(|error| format!("{SERVICE_HOST} and {SERVICE_PORT}: {error}"))
}

fn host_name() -> String {
    nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_default()
}
