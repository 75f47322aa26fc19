//! What is kept of a pod: a tenth of what the API server says of it, and there are many.

use std::{net::IpAddr, sync::Arc};

use k8s_openapi::{
    api::core::v1::{ObjectReference, Pod},
    apimachinery::pkg::apis::meta::v1::Time,
};
use mesh_common::{
    abi::MAX_POD_ADDRESSES,
    membership::{self, MESH, Map, Membership, Pod as Candidate},
    spiffe::check_segment,
};

use super::registry::Labels;
use crate::registry::{Workload, is_host};

/// The label that a Deployment gives to its ReplicaSets and their pods.
const TEMPLATE_HASH: &str = "pod-template-hash";

/// A pod.
#[derive(Clone, Debug)]
pub struct Facts {
    /// By the UID by which its node knows it, with all addresses that are reported. The registry
    /// has the same one as long as the pod is a workload and all these addresses are its own.
    pub(super) workload: Arc<Workload>,
    /// The UID of the record, if that is another one.
    own_uid: Option<String>,
    /// Whether agents could use it. They would refuse the whole snapshot for one name that is none.
    pub(super) usable: bool,
    /// Whether it has ended: its record and its addresses say nothing any more.
    pub(super) over: bool,
    pub(super) running: bool,
    pub(super) created: Option<Time>,
    pub(super) host_network: bool,
    labels: Map,
    annotations: Map,
}

impl Facts {
    /// Takes from a pod what counts.
    pub fn of(pod: Pod) -> Self {
        let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
        let (over, running) =
            (matches!(phase, Some("Succeeded" | "Failed")), phase == Some("Running"));
        let (addresses, owner) = (addresses(&pod), owner(&pod).unwrap_or_default());
        let Pod { metadata, spec, .. } = pod;
        let spec = spec.unwrap_or_default();
        let own_uid = metadata.uid.unwrap_or_default();
        let annotations = metadata.annotations.unwrap_or_default();
        let node = spec.node_name.unwrap_or_default();
        let workload = Workload {
            uid: membership::uid(&own_uid, &annotations).to_owned(),
            name: metadata.name.unwrap_or_default(),
            namespace: metadata.namespace.unwrap_or_default(),
            service_account: service_account(spec.service_account_name, &node),
            node,
            addresses,
            owner,
        };
        let Workload { uid, name, namespace, service_account, node, .. } = &workload;
        let names = [uid, name, namespace, service_account, node];
        let usable = names.iter().all(|name| check_segment(name).is_ok());
        let counts = |map: Map| map.into_iter().filter(|(key, _)| key == MESH).collect();
        Self {
            own_uid: Some(own_uid).filter(|own| *own != workload.uid),
            workload: Arc::new(workload),
            usable,
            over,
            running,
            created: metadata.creation_timestamp,
            host_network: spec.host_network.unwrap_or_default(),
            labels: counts(metadata.labels.unwrap_or_default()),
            annotations: counts(annotations),
        }
    }

    /// Whether the UID by which its node knows it is that of its record.
    pub(super) const fn has_own_uid(&self) -> bool {
        self.own_uid.is_none()
    }

    /// The UID of the record.
    pub(super) fn own_uid(&self) -> &str {
        self.own_uid.as_ref().unwrap_or(&self.workload.uid)
    }

    /// Whether it is in the mesh.
    pub(super) fn membership(&self, labels: &Labels<'_>, own_namespace: &str) -> Membership {
        let nothing = Map::new();
        let namespace = self.workload.namespace.as_str();
        let candidate = Candidate {
            namespace,
            namespace_labels: labels.get(namespace).copied().unwrap_or(&nothing),
            labels: &self.labels,
            annotations: &self.annotations,
            host_network: self.host_network,
        };
        Membership::of(&candidate, own_namespace)
    }

    /// Its record.
    pub(super) fn reference(&self) -> ObjectReference {
        ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            namespace: Some(self.workload.namespace.clone()),
            name: Some(self.workload.name.clone()),
            uid: Some(self.own_uid().to_owned()),
            ..ObjectReference::default()
        }
    }
}

/// Only static pods have no service account: the API server lets them have none, and ordinary pods get
/// one. A node makes them by itself, in whatever namespace it likes. So they are its own, by a name
/// that no service account can have.
fn service_account(own: Option<String>, node: &str) -> String {
    own.filter(|name| !name.is_empty()).unwrap_or_else(|| format!("static_{node}"))
}

/// The pod's addresses, canonical.
fn addresses(pod: &Pod) -> Vec<IpAddr> {
    let reported = pod.status.iter().flat_map(|status| status.pod_ips.iter().flatten());
    let mut addresses: Vec<IpAddr> = reported
        .filter_map(|found| found.ip.parse().ok())
        .map(|address: IpAddr| address.to_canonical())
        .filter(|address| is_host(*address))
        .collect();
    addresses.sort_unstable();
    addresses.dedup();
    addresses.truncate(MAX_POD_ADDRESSES);
    addresses
}

/// A ReplicaSet whose name ends with the pod's template hash was made by a Deployment.
fn owner(pod: &Pod) -> Option<String> {
    let owners = pod.metadata.owner_references.as_ref()?;
    let owner = owners.iter().find(|owner| owner.controller == Some(true))?;
    let hash = pod.metadata.labels.as_ref().and_then(|labels| labels.get(TEMPLATE_HASH));
    let deployment = hash
        .filter(|_| owner.kind == "ReplicaSet")
        .and_then(|hash| owner.name.strip_suffix(hash.as_str())?.strip_suffix('-'));
    Some(match deployment {
        Some(name) => format!("Deployment/{name}"),
        None => format!("{}/{}", owner.kind, owner.name),
    })
}
