//! Reading a pod and its namespace from the Kubernetes API.

use std::{path::Path, time::Duration};

use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig, KubeconfigError},
};

use super::protocol::PodRef;
use crate::kubernetes::facts::Facts;

/// A pod waits for its network, and the runtime tries again: better soon than patiently.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Why the API was not readable.
#[derive(Debug, thiserror::Error)]
pub(super) enum ClusterError {
    #[error("kubeconfig, which `mesh-agent cni-install` writes: {0}")]
    Kubeconfig(#[from] KubeconfigError),
    #[error(
        "the Kubernetes API does not accept the plugin's credentials (401 {0}): \
         `mesh-agent cni-install --watch` in the node's mesh-agent pod renews them. See whether that \
         pod runs, and what its container cni logs"
    )]
    Unauthorized(String),
    #[error(
        "the Kubernetes API does not let the plugin read (403 {0}): give the service account \
         nodemesh-cni the verb get on pods and namespaces"
    )]
    Forbidden(String),
    #[error("the Kubernetes API answers {code} {message}")]
    Failed { code: u16, message: String },
    #[error("the Kubernetes API cannot be asked: {0}")]
    Unreachable(String),
    #[error("the Kubernetes API did not answer within {} s", TIMEOUT.as_secs())]
    Timeout,
}

impl From<kube::Error> for ClusterError {
    fn from(error: kube::Error) -> Self {
        let kube::Error::Api(status) = error else {
            return Self::Unreachable(format!("{:#}", anyhow::Error::new(error)));
        };
        match status.code {
            401 => Self::Unauthorized(status.message),
            403 => Self::Forbidden(status.message),
            code => Self::Failed { code, message: status.message },
        }
    }
}

/// Checks that a kubeconfig can be used, and does not use it.
pub(super) async fn check(kubeconfig: &Path) -> Result<(), ClusterError> {
    connect(kubeconfig).await.map(drop)
}

/// What the API says about a pod; `None` if it has no such pod.
pub(super) async fn read(kubeconfig: &Path, pod: &PodRef) -> Result<Option<Facts>, ClusterError> {
    let reading = async {
        let client = connect(kubeconfig).await?;
        Ok(Facts::read(client, &pod.namespace, &pod.name).await?)
    };
    tokio::time::timeout(TIMEOUT, reading).await.unwrap_or(Err(ClusterError::Timeout))
}

async fn connect(kubeconfig: &Path) -> Result<Client, ClusterError> {
    let kubeconfig = Kubeconfig::read_from(kubeconfig)?;
    let mut config =
        Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    // Taken from the runtime's environment, where it is for pulling images.
    config.proxy_url = None;
    // The runtime does.
    config.default_retry = false;
    Ok(Client::try_from(config)?)
}
