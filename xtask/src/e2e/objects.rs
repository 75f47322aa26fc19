//! Manifests of what a run makes.

use serde_json::{Value, json};

use super::kubectl::merged;
use crate::pod::{ECHO, HTTP};

/// The label of membership.
pub(super) const MESH: &str = "nodemesh.io/mesh";

/// Where a pod's container is in it.
const CONTAINER: &str = "main";

/// A namespace, in the mesh or outside.
pub(super) fn namespace(name: &str, in_mesh: bool) -> Value {
    let labels = if in_mesh { json!({ MESH: "enabled" }) } else { json!({}) };
    json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name, "labels": labels } })
}

/// A container that runs our tool.
pub(super) fn container(image: &str, tool: &[&str]) -> Value {
    let arguments: Vec<_> = ["pod"].iter().chain(tool).collect();
    json!({ "name": CONTAINER, "image": image, "imagePullPolicy": "IfNotPresent", "args": arguments })
}

/// What a pod's `spec` has to say.
pub(super) fn pod_spec(node: &str, container: &Value) -> Value {
    json!({
        "nodeSelector": { "kubernetes.io/hostname": node },
        "terminationGracePeriodSeconds": 1,
        "containers": [container],
    })
}

/// A pod on a node.
pub(super) fn pod(namespace: &str, name: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "name": name, "namespace": namespace, "labels": { "app": name } },
        "spec": spec,
    })
}

/// A container that serves, and is ready when it says so.
pub(super) fn server(image: &str) -> Value {
    merged(
        container(image, &["serve"]),
        json!({
            "ports": [{ "name": "echo", "containerPort": ECHO }],
            "readinessProbe": { "httpGet": { "path": "/ready", "port": HTTP }, "periodSeconds": 1, "failureThreshold": 1 },
        }),
    )
}

/// A Deployment of pods with a label `app` of its name.
pub(super) fn deployment(namespace: &str, name: &str, replicas: u32, spec: &Value) -> Value {
    json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": { "name": name, "namespace": namespace },
        "spec": { "replicas": replicas, "selector": { "matchLabels": { "app": name } }, "template": template(name, spec) },
    })
}

/// A template of pods with a label `app`.
pub(super) fn template(app: &str, spec: &Value) -> Value {
    json!({ "metadata": { "labels": { "app": app } }, "spec": spec })
}

/// A Service of port 80 for pods with a label `app`, at their port named `echo`.
pub(super) fn service(namespace: &str, name: &str, app: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": { "name": name, "namespace": namespace },
        "spec": { "selector": { "app": app }, "ports": [{ "port": 80, "targetPort": "echo" }] },
    })
}

/// A pod on every node that sees the node as it is.
pub(super) fn watchers(namespace: &str, name: &str, image: &str) -> Value {
    let container = merged(
        container(image, &["sleep"]),
        json!({
            "securityContext": { "privileged": true },
            "volumeMounts": [{ "name": "host", "mountPath": "/host", "mountPropagation": "HostToContainer" }],
        }),
    );
    let spec = json!({
        "hostNetwork": true,
        "hostPID": true,
        "tolerations": [{ "operator": "Exists" }],
        "terminationGracePeriodSeconds": 1,
        "containers": [container],
        "volumes": [{ "name": "host", "hostPath": { "path": "/" } }],
    });
    json!({
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": { "name": name, "namespace": namespace },
        "spec": { "selector": { "matchLabels": { "app": name } }, "template": template(name, &spec) },
    })
}
