use std::sync::Mutex;

use serde_json::{Value, json};

use super::*;
use crate::{kubernetes::scripted::scripted, services::resolve};

fn pod(uid: &str, ip: &str, version: u32) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": uid, "namespace": "shop", "uid": uid, "resourceVersion": version.to_string(),
            "labels": {"nodemesh.io/mesh": "enabled", "big": "x"}, "managedFields": [{}],
        },
        "spec": {"nodeName": "n1", "serviceAccountName": "cart", "containers": [{"name": "c"}]},
        "status": {"phase": "Running", "podIPs": [{"ip": ip}]},
    })
}

fn event(kind: &str, object: &Value) -> Value {
    json!({"type": kind, "object": object})
}

/// A cluster of pods: each list and each watch is answered by the next of its answers, and after
/// the last watch nothing happens any more.
fn cluster(lists: Vec<Vec<Value>>, watches: Vec<Vec<Value>>) -> Cluster {
    let mut lists = lists.into_iter();
    let mut watches = watches.into_iter();
    watched(move |path, watch| match path {
        path if path.starts_with("/api/v1/pods") && watch => watches.next(),
        path if path.starts_with("/api/v1/pods") => lists.next(),
        _ => (!watch).then(Vec::new),
    })
}

/// A cluster that answers lists and watches like this; a list that is not answered fails.
fn watched(answer: impl FnMut(&str, bool) -> Option<Vec<Value>> + Send + 'static) -> Cluster {
    let script = Mutex::new(answer);
    let client = scripted(move |_, path, _| {
        let answer = (*script.lock().unwrap())(path, path.contains("watch="));
        if path.contains("watch=") {
            // Without an event the server ends the watch, and the client comes again.
            return (200, Value::Array(answer.unwrap_or_default()));
        }
        match answer {
            Some(items) => {
                let metadata = json!({"resourceVersion": "1"});
                (200, json!({"kind": "List", "metadata": metadata, "items": items}))
            }
            None => (503, json!({"status": "Failure", "code": 503})),
        }
    });
    Cluster::watch(&client, "nodemesh-system".to_owned())
}

/// Waits until the workloads are those, by UID and first address.
async fn until(cluster: &Cluster, expected: &[(&str, &str)]) {
    let state = || {
        let (registry, _) = cluster.state();
        let workloads = registry.workloads();
        workloads
            .map(|w| (w.uid.clone(), w.addresses.first().map(ToString::to_string)))
            .collect::<Vec<_>>()
    };
    let expected: Vec<_> =
        expected.iter().map(|(uid, ip)| ((*uid).to_owned(), Some((*ip).to_owned()))).collect();
    let reached = async {
        while state() != expected {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let in_time = tokio::time::timeout(Duration::from_secs(20), reached).await;
    assert!(in_time.is_ok(), "{:?} is not {expected:?}", state());
}

#[tokio::test]
async fn events_change_the_workloads_also_twice() {
    let (a, b) = (pod("a", "10.0.0.1", 2), pod("b", "10.0.0.2", 3));
    let later = pod("a", "10.0.0.3", 4);
    let events = vec![
        event("ADDED", &b),
        event("ADDED", &b),
        event("MODIFIED", &later),
        event("DELETED", &b),
        event("DELETED", &b),
    ];
    let cluster = cluster(vec![vec![a]], vec![events]);
    cluster.ready().await.unwrap();
    until(&cluster, &[("a", "10.0.0.3")]).await;
}

#[tokio::test]
async fn a_static_pod_stays_who_it_is_when_its_stand_in_is_deleted() {
    let stand_in = |uid, ip, version| {
        let mut pod = pod(uid, ip, version);
        pod["metadata"]["annotations"] = json!({"kubernetes.io/config.mirror": "static"});
        pod
    };
    let (first, second) = (stand_in("a", "10.0.0.1", 2), stand_in("b", "10.0.0.2", 3));
    let events = vec![event("DELETED", &first), event("ADDED", &second)];
    let cluster = cluster(vec![vec![first]], vec![events]);
    cluster.ready().await.unwrap();
    until(&cluster, &[("static", "10.0.0.2")]).await;
}

#[tokio::test]
async fn events_of_what_is_unknown_are_no_harm() {
    let (a, b) = (pod("a", "10.0.0.1", 2), pod("b", "10.0.0.2", 3));
    let events = vec![event("DELETED", &b), event("MODIFIED", &a), event("ADDED", &a)];
    let cluster = cluster(vec![Vec::new()], vec![events]);
    cluster.ready().await.unwrap();
    until(&cluster, &[("a", "10.0.0.1")]).await;
}

/// Kinds are watched on their own, so nothing says which event comes first.
#[tokio::test]
async fn a_namespace_may_be_heard_of_after_its_pods() {
    let mut pod = pod("a", "10.0.0.1", 2);
    pod["metadata"]["labels"] = json!({});
    let mut pods = Some(vec![event("ADDED", &pod)]);
    let known = Arc::new(Mutex::new(false));
    let now_known = Arc::clone(&known);
    let namespace = json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": {
            "name": "shop", "resourceVersion": "9", "labels": {"nodemesh.io/mesh": "enabled"},
        },
    });
    let cluster = watched(move |path, watch| match path {
        path if path.starts_with("/api/v1/pods") && watch => pods.take(),
        path if path.starts_with("/api/v1/namespaces") && watch => {
            known.lock().unwrap().then(|| vec![event("ADDED", &namespace)])
        }
        _ => (!watch).then(Vec::new),
    });
    cluster.ready().await.unwrap();
    while cluster.pods.is_empty() {
        cluster.changed().await;
    }
    until(&cluster, &[]).await;
    *now_known.lock().unwrap() = true;
    until(&cluster, &[("a", "10.0.0.1")]).await;
}

#[tokio::test]
async fn services_that_contradict_each_other_do_not_reach_agents() {
    let service = |name: &str, ip: &str| {
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"namespace": "shop", "name": name},
            "spec": {"clusterIPs": [ip], "ports": [{"port": 80}]},
        })
    };
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {
            "namespace": "shop", "name": "cart-x",
            "labels": {"kubernetes.io/service-name": "cart"},
        },
        "ports": [{"port": 8080}], "endpoints": [{"addresses": ["10.0.0.1"], "hints": {}}],
    });
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}});
    let cluster = watched(move |path, watch| match path {
        _ if watch => None,
        path if path.starts_with("/api/v1/pods") => Some(vec![pod("a", "10.0.0.1", 2)]),
        path if path.starts_with("/api/v1/services") => {
            Some(vec![service("thief", "10.0.0.1"), service("cart", "10.96.0.1")])
        }
        path if path.contains("/endpointslices") => Some(vec![slice.clone()]),
        path if path.starts_with("/api/v1/nodes") => Some(vec![node.clone()]),
        _ => Some(Vec::new()),
    });
    cluster.ready().await.unwrap();
    let (registry, services) = cluster.state();
    let names: Vec<_> =
        services.claims.iter().map(|claim| (&*claim.service.name, claim.slices.len())).collect();
    assert_eq!(names, [("cart", 1), ("thief", 0)]);
    let (in_force, problems) = resolve(&services.claims, &services.nodes, &registry);
    assert_eq!(problems[0].file, "service shop/thief");
    assert_eq!((in_force.slices.len(), in_force.nodes.len()), (1, 1));
}

#[tokio::test]
async fn a_watch_that_ends_is_taken_up_again() {
    let (a, b) = (pod("a", "10.0.0.1", 2), pod("b", "10.0.0.2", 3));
    let cluster = cluster(vec![vec![a]], vec![Vec::new(), vec![event("ADDED", &b)]]);
    cluster.ready().await.unwrap();
    until(&cluster, &[("a", "10.0.0.1"), ("b", "10.0.0.2")]).await;
}

#[tokio::test]
async fn after_410_gone_a_missed_deletion_is_found() {
    let (a, b) = (pod("a", "10.0.0.1", 2), pod("b", "10.0.0.2", 3));
    let gone = json!({"kind": "Status", "status": "Failure", "code": 410, "reason": "Expired"});
    let cluster = cluster(vec![vec![a.clone(), b], vec![a]], vec![vec![event("ERROR", &gone)]]);
    cluster.ready().await.unwrap();
    until(&cluster, &[("a", "10.0.0.1")]).await;
}

#[tokio::test]
async fn what_is_not_needed_is_not_kept() {
    let namespace = json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": {
            "name": "shop", "labels": {"nodemesh.io/mesh": "enabled", "big": "x"},
            "annotations": {"big": "x"}, "managedFields": [{}],
        },
        "status": {"phase": "Active"},
    });
    let cluster = watched(move |path, watch| match path {
        path if path.starts_with("/api/v1/namespaces") && !watch => Some(vec![namespace.clone()]),
        _ => (!watch).then(Vec::new),
    });
    cluster.ready().await.unwrap();
    let kept = cluster.namespaces.state();
    let metadata = &kept[0].what.metadata;
    assert!(metadata.managed_fields.is_none() && kept[0].what.status.is_none());
    assert_eq!(metadata.labels.as_ref().unwrap().len(), 1);
    assert!(metadata.annotations.as_ref().unwrap().is_empty());
}
