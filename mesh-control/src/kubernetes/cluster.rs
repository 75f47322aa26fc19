//! The part of the cluster that the mesh needs, kept up to date by watching.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Debug,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use futures::StreamExt as _;
use k8s_openapi::api::{
    core::v1::{Namespace, Node, ObjectReference, Pod, PodSpec, PodStatus, Service},
    discovery::v1::{Endpoint, EndpointSlice},
};
use kube::{
    Api, Client, Resource,
    api::ObjectMeta,
    runtime::{
        WatchStreamExt as _,
        reflector::{self, ObjectRef, Store, store::WriterDropped},
        watcher,
    },
};
use mesh_common::membership::{MESH, MIRROR};
use serde::de::DeserializeOwned;
use tokio::sync::Notify;

use super::{
    pods::{self, Owner},
    registry, services,
};
use crate::{
    registry::{Registry, Workload},
    services::Files,
    status::OutsidePod,
};

/// A change is seldom alone: what comes within this time is taken together.
const SETTLE: Duration = Duration::from_millis(100);

/// What the API server said last. While it is away, this stays.
#[derive(Debug)]
pub struct Cluster {
    own_namespace: String,
    pods: Store<Pod>,
    namespaces: Store<Namespace>,
    nodes: Store<Node>,
    services: Store<Service>,
    slices: Store<EndpointSlice>,
    changed: Arc<Notify>,
}

impl Cluster {
    /// Begins to watch, for ever. `own_namespace` is where nodemesh is installed.
    pub fn watch(client: &Client, own_namespace: String) -> Self {
        let changed = Arc::new(Notify::new());
        Self {
            own_namespace,
            pods: follow(Api::all(client.clone()), &changed, strip_pod),
            namespaces: follow(Api::all(client.clone()), &changed, |namespace: &mut Namespace| {
                strip(&mut namespace.metadata, &[MESH]);
                (namespace.spec, namespace.status) = (None, None);
            }),
            nodes: follow(Api::all(client.clone()), &changed, |node: &mut Node| {
                strip(&mut node.metadata, &[services::ZONE]);
                (node.spec, node.status) = (None, None);
            }),
            services: follow(Api::all(client.clone()), &changed, |service: &mut Service| {
                strip(&mut service.metadata, &[]);
            }),
            slices: follow(Api::all(client.clone()), &changed, |slice: &mut EndpointSlice| {
                strip(&mut slice.metadata, &[services::SERVICE_NAME]);
                slice.endpoints.iter_mut().for_each(strip_endpoint);
            }),
            changed,
        }
    }

    /// Waits until everything was listed once. What is not known yet is not denied before.
    ///
    /// # Errors
    ///
    /// If a watch has ended, which none should.
    pub async fn ready(&self) -> Result<(), WriterDropped> {
        tokio::try_join!(
            self.pods.wait_until_ready(),
            self.namespaces.wait_until_ready(),
            self.nodes.wait_until_ready(),
            self.services.wait_until_ready(),
            self.slices.wait_until_ready(),
        )
        .map(drop)
    }

    /// Waits for the next change, and for those that come with it.
    pub async fn changed(&self) {
        self.changed.notified().await;
        tokio::time::sleep(SETTLE).await;
    }

    /// The workloads, and who wants which service, as they are now.
    pub fn state(&self) -> (Registry, Files) {
        let (pods, namespaces) = (self.pods.state(), self.namespaces.state());
        let workloads = registry::workloads(
            pods.iter().map(AsRef::as_ref),
            namespaces.iter().map(AsRef::as_ref),
            &self.own_namespace,
        );
        let (found, slices) = (self.services.state(), self.slices.state());
        let claims =
            services::claims(found.iter().map(AsRef::as_ref), slices.iter().map(AsRef::as_ref));
        let nodes = self.nodes.state().iter().filter_map(|node| services::node(node)).collect();
        let services = Files { claims, nodes, problems: Vec::new() };
        (Registry::from_cluster(workloads), services)
    }

    /// The pods that are not in the mesh.
    pub fn outside(&self) -> Vec<OutsidePod> {
        let (pods, namespaces) = (self.pods.state(), self.namespaces.state());
        pods::outside(
            pods.iter().map(AsRef::as_ref),
            namespaces.iter().map(AsRef::as_ref),
            &self.own_namespace,
        )
    }

    /// Who has an address, if it is somebody of this cluster.
    pub fn owner(&self, address: IpAddr) -> Option<Owner> {
        pods::owner(self.pods.state().iter().map(AsRef::as_ref), address)
    }

    /// The record of a workload's pod. Its UID is another one than the node's if the pod is static.
    pub fn record(&self, workload: &Workload) -> Option<ObjectReference> {
        let key = ObjectRef::new(&workload.name).within(&workload.namespace);
        let pod = self.pods.get(&key)?;
        (registry::uid(&pod) == Some(&*workload.uid)).then(|| pod.object_ref(&()))
    }

    /// Where the replicas of the control plane listen, this one included.
    pub fn replicas(&self) -> BTreeSet<SocketAddr> {
        let slices = self.slices.state();
        services::replicas(slices.iter().map(AsRef::as_ref), &self.own_namespace)
    }
}

fn follow<K>(api: Api<K>, changed: &Arc<Notify>, strip: fn(&mut K)) -> Store<K>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
{
    let (store, writer) = reflector::store();
    let changed = Arc::clone(changed);
    tokio::spawn(async move {
        let events = watcher(api, watcher::Config::default()).default_backoff();
        let mut events = std::pin::pin!(events.modify(strip).reflect(writer));
        while let Some(event) = events.next().await {
            match event {
                // A list that is not complete yet changes nothing.
                Ok(watcher::Event::Init | watcher::Event::InitApply(_)) => {}
                Ok(_) => changed.notify_one(),
                Err(error) => {
                    tracing::warn!(kind = %K::kind(&()), %error, "watching the API server failed");
                }
            }
        }
    });
    store
}

/// Keeps what identifies an object, and the labels and annotations that are asked for.
fn strip(metadata: &mut ObjectMeta, keys: &[&str]) {
    let found = std::mem::take(metadata);
    let wanted = |map: Option<BTreeMap<String, String>>| {
        map.map(|map| map.into_iter().filter(|(key, _)| keys.contains(&key.as_str())).collect())
    };
    *metadata = ObjectMeta {
        name: found.name,
        namespace: found.namespace,
        uid: found.uid,
        creation_timestamp: found.creation_timestamp,
        owner_references: found.owner_references,
        labels: wanted(found.labels),
        annotations: wanted(found.annotations),
        ..ObjectMeta::default()
    };
}

fn strip_pod(pod: &mut Pod) {
    strip(&mut pod.metadata, &[MESH, MIRROR, registry::TEMPLATE_HASH]);
    pod.spec = pod.spec.take().map(|spec| PodSpec {
        node_name: spec.node_name,
        service_account_name: spec.service_account_name,
        host_network: spec.host_network,
        ..PodSpec::default()
    });
    pod.status = pod.status.take().map(|status| PodStatus {
        phase: status.phase,
        pod_ips: status.pod_ips,
        ..PodStatus::default()
    });
}

fn strip_endpoint(endpoint: &mut Endpoint) {
    *endpoint = Endpoint {
        addresses: std::mem::take(&mut endpoint.addresses),
        conditions: endpoint.conditions.take(),
        node_name: endpoint.node_name.take(),
        zone: endpoint.zone.take(),
        ..Endpoint::default()
    };
}

#[cfg(test)]
mod tests;
