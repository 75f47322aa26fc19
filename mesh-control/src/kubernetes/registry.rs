//! Pods become workloads: a pure function of what the API server says.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashSet},
    net::IpAddr,
};

use k8s_openapi::{
    api::core::v1::{Namespace, Pod},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use mesh_common::{
    abi::MAX_POD_ADDRESSES,
    membership::{self, Map, Membership, Pod as Candidate},
    spiffe::check_segment,
};

use crate::registry::{Workload, is_host};

/// The label that a Deployment gives to its ReplicaSets and their pods.
pub(super) const TEMPLATE_HASH: &str = "pod-template-hash";

/// The workloads of the cluster. `own_namespace` is where nodemesh is installed.
///
/// The kubelet reports late and addresses are used again: of two pods that claim one, the running
/// one has it, then the newer one. The other stays registered, without that address.
///
/// Of pods that claim one UID the one whose own it is is registered, then the oldest; no other.
pub fn workloads<'a>(
    pods: impl IntoIterator<Item = &'a Pod>,
    namespaces: impl IntoIterator<Item = &'a Namespace>,
    own_namespace: &str,
) -> Vec<Workload> {
    let labels = labels(namespaces);
    let mut pods: Vec<&Pod> = pods.into_iter().filter(|pod| !is_over(pod)).collect();
    pods.sort_by_cached_key(|pod| {
        let ObjectMeta { creation_timestamp, uid: own, .. } = &pod.metadata;
        (uid(pod) != own.as_deref(), creation_timestamp.clone(), own.clone())
    });
    let mut known = HashSet::new();
    pods.retain(|pod| known.insert(uid(pod)));
    pods.sort_by_cached_key(|pod| {
        let ObjectMeta { creation_timestamp, uid, .. } = &pod.metadata;
        (phase(pod) != "Running", Reverse(creation_timestamp.clone()), uid.clone())
    });
    let mut taken = HashSet::new();
    pods.into_iter()
        .filter_map(|pod| {
            // A pod outside the mesh has its addresses as well.
            let mut addresses = addresses(pod);
            addresses.retain(|address| taken.insert(*address));
            workload(pod, addresses, &labels, own_namespace)
        })
        .collect()
}

/// The labels of the namespaces.
pub(super) fn labels<'a>(
    namespaces: impl IntoIterator<Item = &'a Namespace>,
) -> BTreeMap<&'a str, &'a Map> {
    let of = |found: &'a Namespace| {
        Some((found.metadata.name.as_deref()?, found.metadata.labels.as_ref()?))
    };
    namespaces.into_iter().filter_map(of).collect()
}

/// Whether a pod is in the mesh; none if its record is not complete.
pub(super) fn membership(
    pod: &Pod,
    labels: &BTreeMap<&str, &Map>,
    own_namespace: &str,
) -> Option<Membership> {
    let nothing = Map::new();
    let (metadata, spec) = (&pod.metadata, pod.spec.as_ref()?);
    let namespace = metadata.namespace.as_deref()?;
    let candidate = Candidate {
        namespace,
        namespace_labels: labels.get(namespace).copied().unwrap_or(&nothing),
        labels: metadata.labels.as_ref().unwrap_or(&nothing),
        annotations: metadata.annotations.as_ref().unwrap_or(&nothing),
        host_network: spec.host_network.unwrap_or_default(),
    };
    Some(Membership::of(&candidate, own_namespace))
}

fn workload(
    pod: &Pod,
    addresses: Vec<IpAddr>,
    labels: &BTreeMap<&str, &Map>,
    own_namespace: &str,
) -> Option<Workload> {
    if !membership(pod, labels, own_namespace)?.is_member() {
        return None;
    }
    let (metadata, spec) = (&pod.metadata, pod.spec.as_ref()?);
    let workload = Workload {
        uid: uid(pod)?.to_owned(),
        name: metadata.name.clone()?,
        namespace: metadata.namespace.clone()?,
        service_account: spec.service_account_name.clone().unwrap_or("default".to_owned()),
        node: spec.node_name.clone()?,
        addresses,
        owner: owner(pod).unwrap_or_default(),
    };
    let Workload { uid, name, namespace, service_account, node, .. } = &workload;
    // Agents would refuse the whole snapshot for one name that they cannot use.
    let usable = [uid, name, namespace, service_account, node];
    usable.iter().all(|name| check_segment(name).is_ok()).then_some(workload)
}

/// The UID by which the pod's node knows it.
pub(super) fn uid(pod: &Pod) -> Option<&str> {
    let own = pod.metadata.uid.as_deref()?;
    let annotations = pod.metadata.annotations.as_ref();
    Some(annotations.map_or(own, |annotations| membership::uid(own, annotations)))
}

/// Whether a pod has ended: its record and its addresses say nothing any more.
pub(super) fn is_over(pod: &Pod) -> bool {
    matches!(phase(pod), "Succeeded" | "Failed")
}

fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default()
}

/// The pod's addresses, canonical.
pub(super) fn addresses(pod: &Pod) -> Vec<IpAddr> {
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
        workloads(pods, &namespaces(), "nodemesh-system")
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
    fn a_static_pod_has_the_uid_that_its_node_knows_and_nobody_takes_one() {
        let claims = |what: &str, day: u8| {
            json!({
                "/metadata/annotations": {"kubernetes.io/config.mirror": what},
                "/metadata/creationTimestamp": format!("2026-01-{day:02}T00:00:00Z"),
                "/status/podIPs": [],
            })
        };
        let uids = |pods: &[Pod]| {
            let found = of(pods).into_iter().map(|workload| (workload.uid, workload.name));
            found.collect::<BTreeMap<_, _>>()
        };
        let is = |uid: &str, name: &str| (uid.to_owned(), name.to_owned());
        let stand_in = || pod("a", claims("hash", 3));
        let other = pod("b", json!({}));
        assert_eq!(uids(&[stand_in()]), [is("hash", "a-0")].into());
        // Others say that they stand in for the same one, or for a pod that is none of theirs.
        let late = pod("c", claims("hash", 4));
        let early = pod("d", claims("b", 1));
        let all = [late, early, stand_in(), other];
        assert_eq!(uids(&all), [is("hash", "a-0"), is("b", "b-0")].into());
        // It is another's also outside of the mesh.
        let outside = pod("b", json!({"/metadata/namespace": "other"}));
        assert_eq!(uids(&[pod("d", claims("b", 1)), outside]), [].into());
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
