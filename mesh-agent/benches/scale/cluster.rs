//! A large cluster that is not there: what its API server would say, made up object by object.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use futures::{StreamExt as _, stream};
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{Request, Response, body::Frame};
use kube::{Client, client::Body};
use rand::Rng as _;
use serde_json::{Value, json};
use std::sync::Arc;
use tokio::sync::mpsc;
use tower::service_fn;

use super::Size;

type Answer = UnsyncBoxBody<Bytes, Infallible>;

/// The API server.
pub(super) struct Cluster {
    size: Size,
    /// How often the pod in each place was replaced, and whether it has an address.
    pods: Mutex<Vec<(u32, bool)>>,
    watchers: Mutex<BTreeMap<Kind, Vec<mpsc::UnboundedSender<Bytes>>>>,
    /// Watches that were opened.
    pub(super) watches: AtomicU64,
    /// Requests for lists, page by page.
    pub(super) pages: AtomicU64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Pods,
    Namespaces,
    Nodes,
    Services,
    Slices,
}

/// Namespaces, and zones.
const NAMESPACES: usize = 50;
const ZONES: usize = 3;

impl Cluster {
    pub(super) fn new(size: Size) -> Arc<Self> {
        Arc::new(Self {
            size,
            pods: Mutex::new(vec![(0, true); size.pods]),
            watchers: Mutex::default(),
            watches: AtomicU64::new(0),
            pages: AtomicU64::new(0),
        })
    }

    pub(super) fn client(self: &Arc<Self>) -> Client {
        let cluster = Arc::clone(self);
        let service = service_fn(move |request: Request<Body>| {
            let cluster = Arc::clone(&cluster);
            async move {
                let (head, body) = request.into_parts();
                let body = body.collect_bytes().await?;
                let query = head.uri.query().unwrap_or_default();
                let body = cluster.answer(head.uri.path(), query, &body);
                Ok::<_, kube::Error>(Response::new(body))
            }
        });
        Client::new(service, "default")
    }

    fn answer(&self, path: &str, query: &str, body: &[u8]) -> Answer {
        let (kind, count) = match path {
            "/api/v1/pods" => (Kind::Pods, self.size.pods),
            "/api/v1/namespaces" => (Kind::Namespaces, NAMESPACES),
            "/api/v1/nodes" => (Kind::Nodes, self.size.nodes),
            "/api/v1/services" => (Kind::Services, self.size.services),
            "/apis/discovery.k8s.io/v1/endpointslices" => (Kind::Slices, self.size.services),
            _ => return full(&attestation(path, body)),
        };
        if query.contains("watch=true") {
            self.watches.fetch_add(1, Ordering::Relaxed);
            let (sender, receiver) = mpsc::unbounded_channel();
            let mut watchers = self.watchers.lock().unwrap_or_else(PoisonError::into_inner);
            watchers.entry(kind).or_default().push(sender);
            let events = stream::unfold(receiver, async |mut receiver| {
                receiver.recv().await.map(|event| (event, receiver))
            });
            return StreamBody::new(events.map(|event| Ok(Frame::data(event)))).boxed_unsync();
        }
        self.pages.fetch_add(1, Ordering::Relaxed);
        let number = |key: &str| {
            query.split('&').find_map(|pair| pair.strip_prefix(key)?.parse::<usize>().ok())
        };
        let (from, limit) = (number("continue=").unwrap_or(0), number("limit=").unwrap_or(count));
        let to = count.min(from + limit);
        let items: Vec<_> = (from..to).map(|place| self.object(kind, place)).collect();
        let next = if to < count { to.to_string() } else { String::new() };
        let metadata = json!({"resourceVersion": "1", "continue": next});
        full(&json!({"kind": "List", "apiVersion": "v1", "metadata": metadata, "items": items}))
    }

    fn object(&self, kind: Kind, place: usize) -> Value {
        match kind {
            Kind::Pods => {
                let (replaced, addressed) = self.pods()[place];
                self.pod(place, replaced, addressed)
            }
            Kind::Namespaces => {
                let labels = json!({"nodemesh.io/mesh": "enabled"});
                object(json!({"name": namespace(place), "labels": labels}), json!({}))
            }
            Kind::Nodes => {
                let labels = json!({"topology.kubernetes.io/zone": zone(place)});
                object(json!({"name": node(place), "labels": labels}), json!({}))
            }
            Kind::Services => {
                let address =
                    format!("10.{}.{}.{}", 64 + (place >> 16), place >> 8 & 255, place & 255);
                let port = json!({"name": "http", "port": 80, "targetPort": 8080});
                let spec = json!({"clusterIPs": [address], "ports": [port]});
                let metadata = json!({"name": service(place), "namespace": namespace(place)});
                object(metadata, json!({"spec": spec}))
            }
            Kind::Slices => self.slice(place),
        }
    }

    fn pods(&self) -> std::sync::MutexGuard<'_, Vec<(u32, bool)>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pod(&self, place: usize, replaced: u32, addressed: bool) -> Value {
        let of = place % self.size.services;
        let set = format!("{}-7d9f8b6c5d", service(of));
        let name = format!("{set}-{:05x}", place as u32 ^ (replaced << 20));
        let metadata = json!({
            "name": name, "namespace": namespace(of), "uid": uid(place, replaced),
            "creationTimestamp": "2026-11-25T10:00:00Z",
            "labels": {"app": service(of), "pod-template-hash": "7d9f8b6c5d"},
            "annotations": {"kubernetes.io/config.hash": "0123456789abcdef0123456789abcdef"},
            "ownerReferences": [{
                "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": set, "uid": uid(of, 9),
                "controller": true,
            }],
            "managedFields": [{
                "manager": "kubelet", "operation": "Update", "fieldsType": "FieldsV1",
                "fieldsV1": {"f:status": {"f:conditions": {"k:{\"type\":\"Ready\"}": {}}}},
            }],
        });
        let variable = |n: usize| json!({"name": format!("SETTING_{n}"), "value": "some value"});
        let container = json!({
            "name": "app", "image": "registry.example/shop/app:1.2.3", "env": (0..12).map(variable).collect::<Vec<_>>(),
            "ports": [{"containerPort": 8080}], "resources": {"requests": {"cpu": "100m", "memory": "64Mi"}},
        });
        let spec = json!({
            "nodeName": node(place % self.size.nodes), "serviceAccountName": service(of),
            "containers": [container], "restartPolicy": "Always",
        });
        let ips: Vec<_> =
            addressed.then(|| json!({"ip": address(place, replaced)})).into_iter().collect();
        let phase = if addressed { "Running" } else { "Pending" };
        let condition = |kind: &str| json!({"type": kind, "status": "True"});
        let conditions = ["Ready", "Initialized", "ContainersReady", "PodScheduled"].map(condition);
        let status = json!({"phase": phase, "podIPs": ips, "conditions": conditions});
        object(metadata, json!({"spec": spec, "status": status}))
    }

    /// All endpoints of a service.
    fn slice(&self, of: usize) -> Value {
        let pods = self.pods();
        let places = (of..self.size.pods).step_by(self.size.services);
        let endpoints: Vec<_> = places
            .filter(|place| pods[*place].1)
            .map(|place| {
                let at = place % self.size.nodes;
                json!({
                    "addresses": [address(place, pods[place].0)], "conditions": {"ready": true},
                    "nodeName": node(at), "zone": zone(at),
                    "targetRef": {"kind": "Pod", "uid": uid(place, pods[place].0)},
                })
            })
            .collect();
        drop(pods);
        let metadata = json!({
            "name": format!("{}-abcde", service(of)), "namespace": namespace(of),
            "labels": {"kubernetes.io/service-name": service(of)},
        });
        let ports = [json!({"name": "http", "port": 8080, "protocol": "TCP"})];
        let more = json!({"addressType": "IPv4", "ports": ports, "endpoints": endpoints});
        object(metadata, more)
    }

    /// What happens when a pod is replaced, two changes of pods at a time: the old one goes and a
    /// new one comes; or the one that has come gets its address, and its service an endpoint.
    pub(super) fn change(&self, place: usize) {
        let (replaced, addressed) = self.pods()[place];
        let of = place % self.size.services;
        if addressed {
            self.send(Kind::Pods, "DELETED", &self.pod(place, replaced, true));
            self.pods()[place] = (replaced + 1, false);
            self.send(Kind::Pods, "ADDED", &self.pod(place, replaced + 1, false));
        } else {
            self.pods()[place] = (replaced, true);
            self.send(Kind::Pods, "MODIFIED", &self.pod(place, replaced, true));
        }
        self.send(Kind::Slices, "MODIFIED", &self.slice(of));
    }

    /// Any pod.
    pub(super) fn any(&self) -> usize {
        rand::rng().random_range(0..self.size.pods)
    }

    fn send(&self, kind: Kind, what: &str, object: &Value) {
        let line = Bytes::from(format!("{}\n", json!({"type": what, "object": object})));
        let mut watchers = self.watchers.lock().unwrap_or_else(PoisonError::into_inner);
        let all = watchers.entry(kind).or_default();
        all.retain(|watcher| watcher.send(line.clone()).is_ok());
    }
}

/// Tokens are names of nodes.
fn attestation(path: &str, body: &[u8]) -> Value {
    if let Some(pod) = path.strip_prefix("/api/v1/namespaces/nodemesh-system/pods/") {
        let node = pod.trim_start_matches("agent-");
        let metadata = json!({"name": pod, "uid": node});
        let spec =
            json!({"nodeName": node, "serviceAccountName": "nodemesh-agent", "containers": []});
        return json!({"metadata": metadata, "spec": spec});
    }
    let review: Value = serde_json::from_slice(body).unwrap_or_default();
    let node = review["spec"]["token"].as_str().unwrap_or_default().trim();
    let user = json!({
        "username": "system:serviceaccount:nodemesh-system:nodemesh-agent",
        "extra": {
            "authentication.kubernetes.io/pod-name": [format!("agent-{node}")],
            "authentication.kubernetes.io/pod-uid": [node],
            "authentication.kubernetes.io/node-name": [node],
        },
    });
    let status = json!({"authenticated": true, "audiences": ["nodemesh-control"], "user": user});
    json!({"metadata": {}, "spec": {}, "status": status})
}

fn object(mut metadata: Value, mut more: Value) -> Value {
    metadata["resourceVersion"] = json!("2");
    more["metadata"] = metadata;
    more
}

fn full(value: &Value) -> Answer {
    Full::new(Bytes::from(value.to_string())).boxed_unsync()
}

pub(super) fn node(place: usize) -> String {
    format!("ip-10-0-{}-{}.eu-central-1.compute.internal", place >> 8, place & 255)
}

fn zone(node: usize) -> String {
    format!("eu-central-1{}", ["a", "b", "c"][node % ZONES])
}

fn namespace(service: usize) -> String {
    format!("team-{:02}", service % NAMESPACES)
}

fn service(place: usize) -> String {
    format!("checkout-{place:05}")
}

fn uid(place: usize, replaced: u32) -> String {
    // Two rounds of splitmix64: as good as random, and always the same.
    let mix = |n: u64| {
        let n = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        n ^ (n >> 31)
    };
    let first = mix(((place as u64) << 32) | u64::from(replaced));
    let second = mix(first);
    format!(
        "{:08x}-{:04x}-4{:03x}-8{:03x}-{:012x}",
        first >> 32,
        first >> 16 & 0xffff,
        first & 0xfff,
        second >> 52,
        second & 0xffff_ffff_ffff
    )
}

fn address(place: usize, replaced: u32) -> String {
    let n = 2 * place + replaced as usize % 2 + 1;
    format!("10.{}.{}.{}", 128 + (n >> 16), n >> 8 & 255, n & 255)
}
