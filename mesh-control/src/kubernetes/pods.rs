//! Pods for people: which are outside the mesh and why, and whose an address is. Pure functions of
//! what the API server says.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Namespace, ObjectReference};

use super::{facts::Facts, registry::labels};
use crate::{registry::Workload, status::OutsidePod};

/// The pods that are on a node and not in the mesh, by namespace and name.
pub fn outside<'a>(
    pods: impl IntoIterator<Item = &'a Facts>,
    namespaces: impl IntoIterator<Item = &'a Namespace>,
    own_namespace: &str,
) -> Vec<OutsidePod> {
    let labels = labels(namespaces);
    let outside = |pod: &Facts| {
        let membership = pod.membership(&labels, own_namespace);
        let Workload { namespace, name, node, .. } = &*pod.workload;
        if membership.is_member() || pod.over || node.is_empty() {
            return None;
        }
        Some(OutsidePod {
            namespace: namespace.clone(),
            name: name.clone(),
            node: node.clone(),
            why: membership.to_string(),
        })
    };
    let mut found: Vec<_> = pods.into_iter().filter_map(outside).collect();
    found.sort();
    found
}

/// Who has an address.
#[derive(Clone, Debug, PartialEq)]
pub enum Owner {
    /// A pod with a network of its own.
    Pod(Box<ObjectReference>),
    /// A node: pods on its network cannot be told apart.
    Node(String),
}

/// Who has an address, if it is somebody of this cluster.
pub fn owner<'a>(pods: impl IntoIterator<Item = &'a Facts>, address: IpAddr) -> Option<Owner> {
    let has = |pod: &&Facts| !pod.over && pod.workload.addresses.contains(&address);
    // Of two the newer one: addresses are used again.
    let pod = pods.into_iter().filter(has).max_by_key(|pod| &pod.created)?;
    Some(if pod.host_network {
        Owner::Node(pod.workload.node.clone())
    } else {
        Owner::Pod(Box::new(pod.reference()))
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(namespace: &str, name: &str, ip: &str, spec: serde_json::Value) -> Facts {
        let mut pod = json!({
            "metadata": {"namespace": namespace, "name": name, "uid": format!("{name}-uid")},
            "spec": {"nodeName": "n1", "containers": []},
            "status": {"phase": "Running", "podIPs": [{"ip": ip}]},
        });
        let spec = spec.as_object().unwrap().clone();
        pod["spec"].as_object_mut().unwrap().extend(spec);
        Facts::of(serde_json::from_value(pod).unwrap())
    }

    #[test]
    fn pods_outside_are_listed_with_the_reason() {
        let labels = json!({"nodemesh.io/mesh": "enabled"});
        let shop = json!({"metadata": {"name": "shop", "labels": labels}});
        let shop: Namespace = serde_json::from_value(shop).unwrap();
        let mut over = pod("legacy", "job", "10.0.0.9", json!({}));
        over.over = true;
        let pods = [
            pod("shop", "cart", "10.0.0.1", json!({})),
            pod("shop", "exporter", "192.0.2.1", json!({"hostNetwork": true})),
            pod("legacy", "old", "10.0.0.2", json!({})),
            pod("legacy", "waits", "10.0.0.3", json!({"nodeName": null})),
            pod("kube-system", "dns", "10.0.0.4", json!({})),
            over,
        ];
        let found = outside(&pods, [&shop], "nodemesh-system");
        let found: Vec<_> =
            found.iter().map(|pod| (&*pod.namespace, &*pod.name, &*pod.why)).collect();
        let expected = [
            ("kube-system", "dns", "system namespace"),
            ("legacy", "old", "neither the pod nor its namespace has the label"),
            ("shop", "exporter", "the pod uses the node's network"),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn an_address_is_a_pod_s_or_a_node_s_or_nobody_s() {
        let pods = [
            pod("shop", "legacy", "10.0.0.1", json!({})),
            pod("shop", "exporter", "192.0.2.1", json!({"hostNetwork": true})),
        ];
        let owner = |address: &str| owner(&pods, address.parse().unwrap());
        let Some(Owner::Pod(found)) = owner("10.0.0.1") else { panic!("no pod") };
        assert_eq!(
            (found.kind.as_deref(), found.uid.as_deref()),
            (Some("Pod"), Some("legacy-uid"))
        );
        assert_eq!(owner("192.0.2.1"), Some(Owner::Node("n1".to_owned())));
        assert_eq!(owner("10.0.0.2"), None);
    }
}
