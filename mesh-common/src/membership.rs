//! Which pods of a Kubernetes cluster are in the mesh: one decision for the control plane, which
//! registers them, and for the CNI plugin, which holds a pod's start until it is enrolled.

use std::{collections::BTreeMap, fmt};

/// Label of a namespace or a pod, annotation of a pod.
pub const MESH: &str = "nodemesh.io/mesh";

/// Value of [`MESH`] as a label: the pod, or every pod of the namespace, is in the mesh.
pub const ENABLED: &str = "enabled";

/// Value of [`MESH`] as a label or annotation of a pod: it is not, whatever its namespace says.
pub const DISABLED: &str = "disabled";

/// The kubelet's annotation of the stand-in for a static pod: what it calls the pod itself.
pub const MIRROR: &str = "kubernetes.io/config.mirror";

/// Namespaces that are never in the mesh, so that nothing that the mesh needs waits for the mesh.
/// The namespace in which nodemesh itself is installed is another one.
pub const SYSTEM_NAMESPACES: [&str; 3] = ["kube-system", "kube-public", "kube-node-lease"];

/// Labels or annotations.
pub type Map = BTreeMap<String, String>;

/// What the decision hangs on.
#[derive(Clone, Copy, Debug)]
pub struct Pod<'a> {
    /// The name of the pod's namespace.
    pub namespace: &'a str,
    /// The labels of that namespace.
    pub namespace_labels: &'a Map,
    /// The pod's labels.
    pub labels: &'a Map,
    /// The pod's annotations.
    pub annotations: &'a Map,
    /// Whether it uses the node's network.
    pub host_network: bool,
}

/// Whether a pod is in the mesh, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Membership {
    /// It is: its own label says so.
    Pod,
    /// It is: the label of its namespace says so.
    Namespace,
    /// It is not.
    Outside(Outside),
}

/// Why a pod is outside the mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outside {
    /// Neither its namespace nor itself asks for the mesh.
    NotAsked,
    /// Its own annotation or label says so.
    OptedOut,
    /// It shares the node's network, which is not a pod's to encrypt.
    HostNetwork,
    /// It belongs to the cluster or to nodemesh.
    SystemNamespace,
}

impl Membership {
    /// Decides. `own_namespace` is where nodemesh itself is installed.
    pub fn of(pod: &Pod<'_>, own_namespace: &str) -> Self {
        let says = |map: &Map, value| map.get(MESH).is_some_and(|found| found == value);
        if is_system(pod.namespace, own_namespace) {
            Self::Outside(Outside::SystemNamespace)
        } else if pod.host_network {
            Self::Outside(Outside::HostNetwork)
        } else if says(pod.annotations, DISABLED) || says(pod.labels, DISABLED) {
            Self::Outside(Outside::OptedOut)
        } else if says(pod.labels, ENABLED) {
            Self::Pod
        } else if says(pod.namespace_labels, ENABLED) {
            Self::Namespace
        } else {
            Self::Outside(Outside::NotAsked)
        }
    }

    /// Whether the pod is in the mesh.
    pub const fn is_member(self) -> bool {
        !matches!(self, Self::Outside(_))
    }
}

/// The UID by which the mesh knows a pod with this UID in the API and these annotations: the one
/// that the kubelet and the container runtime use.
///
/// It is another one for a static pod. Of that the API has only a stand-in, which somebody may delete
/// while the pod runs on, and the next one has a new UID. Whoever makes pods can write any UID into
/// the annotation.
pub fn uid<'a>(in_api: &'a str, annotations: &'a Map) -> &'a str {
    annotations.get(MIRROR).map_or(in_api, String::as_str)
}

/// Whether the pods of a namespace are never in the mesh.
pub fn is_system(namespace: &str, own_namespace: &str) -> bool {
    namespace == own_namespace || SYSTEM_NAMESPACES.contains(&namespace)
}

impl fmt::Display for Membership {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pod => "the pod's label",
            Self::Namespace => "the label of its namespace",
            Self::Outside(Outside::NotAsked) => "neither the pod nor its namespace has the label",
            Self::Outside(Outside::OptedOut) => "the pod opts out",
            Self::Outside(Outside::HostNetwork) => "the pod uses the node's network",
            Self::Outside(Outside::SystemNamespace) => "system namespace",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(value: &str) -> Map {
        match value {
            "" => Map::new(),
            value => Map::from([(MESH.to_owned(), value.to_owned())]),
        }
    }

    #[test]
    fn a_stand_in_has_the_uid_of_the_static_pod() {
        assert_eq!(uid("own", &Map::new()), "own");
        let hash = ("kubernetes.io/config.hash".to_owned(), "other".to_owned());
        assert_eq!(uid("own", &Map::from([hash.clone()])), "own");
        let mirror = ("kubernetes.io/config.mirror".to_owned(), "static".to_owned());
        assert_eq!(uid("own", &Map::from([hash, mirror])), "static");
    }

    #[test]
    fn the_pod_has_the_last_word_and_the_cluster_the_first() {
        use Membership::{Namespace, Outside as Out, Pod as OwnLabel};
        for (namespace, namespace_label, label, annotation, host_network, expected) in [
            ("shop", "", "", "", false, Out(Outside::NotAsked)),
            ("shop", "enabled", "", "", false, Namespace),
            ("shop", "", "enabled", "", false, OwnLabel),
            ("shop", "enabled", "", "disabled", false, Out(Outside::OptedOut)),
            ("shop", "enabled", "disabled", "", false, Out(Outside::OptedOut)),
            ("shop", "", "enabled", "disabled", false, Out(Outside::OptedOut)),
            ("shop", "enabled", "enabled", "", true, Out(Outside::HostNetwork)),
            ("shop", "true", "yes", "", false, Out(Outside::NotAsked)),
            ("shop", "", "", "enabled", false, Out(Outside::NotAsked)),
            ("kube-system", "enabled", "enabled", "", false, Out(Outside::SystemNamespace)),
            ("mesh", "enabled", "enabled", "", false, Out(Outside::SystemNamespace)),
        ] {
            let pod = Pod {
                namespace,
                namespace_labels: &map(namespace_label),
                labels: &map(label),
                annotations: &map(annotation),
                host_network,
            };
            assert_eq!(Membership::of(&pod, "mesh"), expected, "{pod:?}");
        }
    }
}
