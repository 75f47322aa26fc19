//! Pods become workloads: a pure function of what the API server says.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use k8s_openapi::{
    api::core::v1::{Namespace, Pod},
    apimachinery::pkg::apis::meta::v1::Time,
};
use mesh_common::{
    abi::MAX_POD_ADDRESSES,
    membership::{MESH, Map, Membership, Pod as Candidate},
    spiffe::check_segment,
};

use crate::registry::{Workload, is_host};

/// The label that a Deployment gives to its ReplicaSets and their pods.
const TEMPLATE_HASH: &str = "pod-template-hash";

/// What is kept of a pod.
#[derive(Clone, Debug)]
pub struct Facts {
    /// With all addresses that are reported. Shared with the registry as long as all are its own.
    workload: Arc<Workload>,
    /// Whether agents could use it. They would refuse the whole snapshot for one name that is none.
    usable: bool,
    over: bool,
    running: bool,
    created: Option<Time>,
    host_network: bool,
    labels: Map,
    annotations: Map,
}

impl Facts {
    /// Takes from a pod what counts.
    pub fn of(pod: Pod) -> Self {
        let (addresses, owner) = (addresses(&pod), owner(&pod).unwrap_or_default());
        let (over, running) =
            (matches!(phase(&pod), "Succeeded" | "Failed"), phase(&pod) == "Running");
        let Pod { metadata, spec, .. } = pod;
        let spec = spec.unwrap_or_default();
        let workload = Workload {
            uid: metadata.uid.unwrap_or_default(),
            name: metadata.name.unwrap_or_default(),
            namespace: metadata.namespace.unwrap_or_default(),
            service_account: spec.service_account_name.unwrap_or("default".to_owned()),
            node: spec.node_name.unwrap_or_default(),
            addresses,
            owner,
        };
        let Workload { uid, name, namespace, service_account, node, .. } = &workload;
        let usable = [uid, name, namespace, service_account, node]
            .iter()
            .all(|name| check_segment(name).is_ok());
        let counts = |map: Option<Map>| -> Map {
            map.into_iter().flatten().filter(|(key, _)| key == MESH).collect()
        };
        Self {
            workload: Arc::new(workload),
            usable,
            over,
            running,
            created: metadata.creation_timestamp,
            host_network: spec.host_network.unwrap_or_default(),
            labels: counts(metadata.labels),
            annotations: counts(metadata.annotations),
        }
    }
}

/// The workloads of the cluster. `own_namespace` is where nodemesh is installed.
///
/// The kubelet reports late and addresses are used again: of two pods that claim one, the running
/// one has it, then the newer one. The other stays registered, without that address.
pub fn workloads<'a>(
    pods: impl IntoIterator<Item = &'a Facts>,
    namespaces: impl IntoIterator<Item = &'a Namespace>,
    own_namespace: &str,
) -> Vec<Arc<Workload>> {
    let labels: BTreeMap<&str, &Map> = namespaces
        .into_iter()
        .filter_map(|found| {
            Some((found.metadata.name.as_deref()?, found.metadata.labels.as_ref()?))
        })
        .collect();
    let mut pods: Vec<&Facts> = pods.into_iter().filter(|pod| !pod.over).collect();
    let rank = |pod: &'a Facts| (!pod.running, Reverse(&pod.created), &pod.workload.uid);
    pods.sort_by(|a, b| rank(a).cmp(&rank(b)));
    let mut taken = HashSet::new();
    pods.into_iter()
        .filter_map(|pod| {
            // A pod outside the mesh has its addresses as well.
            let claimed = &pod.workload.addresses;
            let own: Vec<IpAddr> =
                claimed.iter().copied().filter(|address| taken.insert(*address)).collect();
            if !pod.usable || !is_member(pod, &labels, own_namespace) {
                return None;
            }
            Some(if own.len() == claimed.len() {
                Arc::clone(&pod.workload)
            } else {
                Arc::new(Workload { addresses: own, ..pod.workload.as_ref().clone() })
            })
        })
        .collect()
}

fn is_member(pod: &Facts, labels: &BTreeMap<&str, &Map>, own_namespace: &str) -> bool {
    let nothing = Map::new();
    let namespace = pod.workload.namespace.as_str();
    let candidate = Candidate {
        namespace,
        namespace_labels: labels.get(namespace).copied().unwrap_or(&nothing),
        labels: &pod.labels,
        annotations: &pod.annotations,
        host_network: pod.host_network,
    };
    Membership::of(&candidate, own_namespace).is_member()
}

fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default()
}

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

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn namespaces() -> Vec<Namespace> {
        let labels = json!({"nodemesh.io/mesh": "enabled"});
        let one = json!({"metadata": {"name": "shop", "labels": labels}});
        vec![serde_json::from_value(one).unwrap()]
    }

    fn pod(uid: &str, more: Value) -> Pod {
        let mut pod = json!({
            "metadata": {
                "uid": uid, "name": format!("{uid}-0"), "namespace": "shop",
                "creationTimestamp": "2026-01-01T00:00:00Z",
            },
            "spec": {"nodeName": "n1", "serviceAccountName": "cart", "containers": []},
            "status": {"phase": "Running", "podIPs": [{"ip": "10.0.0.7"}]},
        });
        for (pointer, value) in more.as_object().unwrap() {
            let (parent, key) = pointer.rsplit_once('/').unwrap();
            pod.pointer_mut(parent).unwrap()[key] = value.clone();
        }
        serde_json::from_value(pod).unwrap()
    }

    fn of(pods: &[Pod]) -> Vec<Workload> {
        let facts: Vec<_> = pods.iter().cloned().map(Facts::of).collect();
        let found = workloads(&facts, &namespaces(), "nodemesh-system");
        found.into_iter().map(Arc::unwrap_or_clone).collect()
    }

    #[test]
    fn a_pod_is_what_the_api_says() {
        let labels = json!({"pod-template-hash": "5d4"});
        let owner = json!([
            {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "cart-5d4", "uid": "r",
             "controller": true}
        ]);
        let ips = json!([{"ip": "fd00::7"}, {"ip": "10.0.0.7"}]);
        let more = json!({
            "/metadata/labels": labels, "/metadata/ownerReferences": owner, "/status/podIPs": ips
        });
        let found = of(&[pod("a", more)]);
        let expected = Workload {
            uid: "a".to_owned(),
            name: "a-0".to_owned(),
            namespace: "shop".to_owned(),
            service_account: "cart".to_owned(),
            node: "n1".to_owned(),
            addresses: vec!["10.0.0.7".parse().unwrap(), "fd00::7".parse().unwrap()],
            owner: "Deployment/cart".to_owned(),
        };
        assert_eq!(found, [expected]);
    }

    #[test]
    fn who_is_not_there_or_not_asked_is_no_workload() {
        assert_eq!(of(&[pod("a", json!({}))]).len(), 1);
        for more in [
            json!({"/status/phase": "Succeeded"}),
            json!({"/status/phase": "Failed"}),
            json!({"/spec/nodeName": null}),
            json!({"/spec/nodeName": ""}),
            json!({"/spec/serviceAccountName": "a/b"}),
            json!({"/spec/hostNetwork": true}),
            json!({"/metadata/namespace": "other"}),
            json!({"/metadata/namespace": "nodemesh-system"}),
            json!({"/metadata/annotations": {"nodemesh.io/mesh": "disabled"}}),
        ] {
            assert_eq!(of(&[pod("a", more.clone())]), [], "{more}");
        }
    }

    #[test]
    fn an_address_used_again_is_the_running_ones_then_the_newest_ones() {
        let later = json!("2026-01-02T00:00:00Z");
        let newer = |phase| json!({"/metadata/creationTimestamp": later, "/status/phase": phase});
        for (second, owner) in [(newer("Running"), "b"), (newer("Pending"), "a")] {
            let pods = [pod("a", json!({})), pod("b", second)];
            let mut found = of(&pods);
            found.sort_by(|a, b| a.uid.cmp(&b.uid));
            assert_eq!(found.len(), 2);
            for workload in found {
                assert_eq!(workload.addresses.len(), usize::from(workload.uid == owner));
            }
        }
    }

    #[test]
    fn an_address_that_a_pod_outside_the_mesh_has_now_is_not_a_workload_s() {
        let later = json!({
            "/metadata/creationTimestamp": "2026-01-02T00:00:00Z", "/metadata/namespace": "other"
        });
        let found = of(&[pod("a", json!({})), pod("b", later)]);
        assert_eq!((found.len(), found[0].addresses.len()), (1, 0));
    }

    #[test]
    fn a_pod_has_its_place_before_it_has_addresses() {
        let found = of(&[pod("a", json!({"/status/podIPs": null, "/status/phase": "Pending"}))]);
        assert_eq!((found.len(), found[0].addresses.len()), (1, 0));
    }
}
