//! What the API server says of a pod: all that decides whether it is in the mesh.

use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::{Api, Client};
use mesh_common::membership::{self, Map, Pod as Candidate};

/// A pod and its namespace.
#[derive(Clone, Debug, Default)]
pub(crate) struct Facts {
    /// The UID by which the mesh knows it.
    pub(crate) uid: String,
    pub(crate) namespace_labels: Map,
    pub(crate) labels: Map,
    pub(crate) annotations: Map,
    pub(crate) host_network: bool,
    /// None of its containers will run again.
    pub(crate) is_over: bool,
}

impl Facts {
    /// Asks for a pod; `None` if there is no such pod, or no such namespace.
    ///
    /// # Errors
    ///
    /// When the API server does not say.
    pub(crate) async fn read(
        client: Client,
        namespace: &str,
        name: &str,
    ) -> Result<Option<Self>, kube::Error> {
        let pods = Api::<Pod>::namespaced(client.clone(), namespace);
        let namespaces = Api::<Namespace>::all(client);
        let (pod, found) = tokio::try_join!(pods.get_opt(name), namespaces.get_opt(namespace))?;
        Ok(pod.zip(found).map(|(pod, namespace)| Self::new(pod, namespace)))
    }

    fn new(pod: Pod, namespace: Namespace) -> Self {
        let annotations = pod.metadata.annotations.unwrap_or_default();
        let phase = pod.status.and_then(|status| status.phase).unwrap_or_default();
        Self {
            uid: membership::uid(&pod.metadata.uid.unwrap_or_default(), &annotations).to_owned(),
            namespace_labels: namespace.metadata.labels.unwrap_or_default(),
            labels: pod.metadata.labels.unwrap_or_default(),
            annotations,
            host_network: pod.spec.and_then(|spec| spec.host_network).unwrap_or_default(),
            is_over: matches!(phase.as_str(), "Succeeded" | "Failed"),
        }
    }

    /// What membership hangs on.
    pub(crate) fn candidate<'a>(&'a self, namespace: &'a str) -> Candidate<'a> {
        Candidate {
            namespace,
            namespace_labels: &self.namespace_labels,
            labels: &self.labels,
            annotations: &self.annotations,
            host_network: self.host_network,
        }
    }
}
