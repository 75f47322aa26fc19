//! Pods become workloads: a pure function of what the API server says.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::Arc,
};

use k8s_openapi::api::core::v1::Namespace;
use mesh_common::membership::Map;

use super::facts::Facts;
use crate::registry::Workload;

/// The labels of each namespace.
pub(super) type Labels<'a> = BTreeMap<&'a str, &'a Map>;

/// The workloads of the cluster. `own_namespace` is where nodemesh is installed.
///
/// The kubelet reports late and addresses are used again: of two pods that claim one, the running
/// one has it, then the newer one. The other stays registered, without that address.
///
/// Of pods that claim one UID the one whose own it is is registered, then the oldest; no other.
pub fn workloads<'a>(
    pods: impl IntoIterator<Item = &'a Facts>,
    namespaces: impl IntoIterator<Item = &'a Namespace>,
    own_namespace: &str,
) -> Vec<Arc<Workload>> {
    let labels = labels(namespaces);
    let (mut pods, mut standing_in): (Vec<&Facts>, Vec<&Facts>) =
        pods.into_iter().filter(|pod| !pod.over).partition(|pod| pod.has_own_uid());
    standing_in.sort_by_key(|pod| Reverse((&pod.created, pod.own_uid())));
    let mut standing_in: HashMap<_, _> =
        standing_in.into_iter().map(|pod| (&pod.workload.uid, pod)).collect();
    if !standing_in.is_empty() {
        for pod in &pods {
            standing_in.remove(&pod.workload.uid);
        }
    }
    pods.extend(standing_in.into_values());

    let rank = |pod: &'a Facts| (!pod.running, Reverse(&pod.created), pod.own_uid());
    let mut owners = HashMap::<IpAddr, &Facts>::with_capacity(pods.len());
    for pod in &pods {
        // A pod outside the mesh has its addresses as well.
        for address in &pod.workload.addresses {
            let owner = owners.entry(*address).or_insert(pod);
            if !std::ptr::eq(*owner, *pod) && rank(pod) < rank(owner) {
                *owner = pod;
            }
        }
    }
    let in_mesh = |pod: &&Facts| pod.usable && pod.membership(&labels, own_namespace).is_member();
    pods.into_iter()
        .filter(in_mesh)
        .map(|pod| {
            let is_own = |address: &&IpAddr| std::ptr::eq(owners[*address], pod);
            let claimed = &pod.workload.addresses;
            if claimed.iter().all(|address| is_own(&address)) {
                return Arc::clone(&pod.workload);
            }
            let addresses = claimed.iter().filter(is_own).copied().collect();
            Arc::new(Workload { addresses, ..pod.workload.as_ref().clone() })
        })
        .collect()
}

/// The labels of the namespaces.
pub(super) fn labels<'a>(namespaces: impl IntoIterator<Item = &'a Namespace>) -> Labels<'a> {
    let of = |found: &'a Namespace| {
        Some((found.metadata.name.as_deref()?, found.metadata.labels.as_ref()?))
    };
    namespaces.into_iter().filter_map(of).collect()
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Pod;
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
    fn a_static_pod_speaks_for_its_node_and_for_no_service_account() {
        for none in [json!(null), json!("")] {
            let mirror = json!({
                "/metadata/annotations": {"kubernetes.io/config.mirror": "hash"},
                "/spec/serviceAccountName": none,
            });
            assert_eq!(of(&[pod("a", mirror)])[0].service_account, "static_n1");
        }
        assert_eq!(of(&[pod("a", json!({}))])[0].service_account, "cart");
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
