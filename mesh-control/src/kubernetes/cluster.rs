//! The part of the cluster that the mesh needs, kept up to date by watching.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    fmt::Debug,
    marker::PhantomData,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::{
    core::v1::{Namespace, Node, ObjectReference, Pod, Service},
    discovery::v1::EndpointSlice,
};
use kube::{
    Api, Client, Resource,
    api::ObjectMeta,
    runtime::{
        WatchStreamExt as _, reflector,
        reflector::{
            Lookup, ObjectRef, Store,
            store::{Writer, WriterDropped},
        },
        watcher,
        watcher::Event,
    },
};
use mesh_common::{api, membership::MESH};
use serde::de::DeserializeOwned;
use tokio::sync::Notify;

use super::{
    facts::Facts,
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
    pods: Store<Kept<Pod, Facts>>,
    namespaces: Store<Kept<Namespace, Namespace>>,
    nodes: Store<Kept<Node, Option<api::Node>>>,
    services: Store<Kept<Service, Service>>,
    slices: Store<Kept<EndpointSlice, Option<Arc<api::EndpointSlice>>>>,
    changed: Arc<Notify>,
}

/// What is kept of an object of kind `K`.
#[derive(Clone, Debug)]
struct Kept<K, T> {
    namespace: Option<String>,
    name: Option<String>,
    what: T,
    kind: PhantomData<K>,
}

impl<K: Resource<DynamicType = ()>, T> Lookup for Kept<K, T> {
    type DynamicType = ();

    fn kind((): &()) -> Cow<'_, str> {
        K::kind(&())
    }

    fn group((): &()) -> Cow<'_, str> {
        K::group(&())
    }

    fn version((): &()) -> Cow<'_, str> {
        K::version(&())
    }

    fn plural((): &()) -> Cow<'_, str> {
        K::plural(&())
    }

    fn name(&self) -> Option<Cow<'_, str>> {
        self.name.as_deref().map(Cow::Borrowed)
    }

    fn namespace(&self) -> Option<Cow<'_, str>> {
        self.namespace.as_deref().map(Cow::Borrowed)
    }

    fn resource_version(&self) -> Option<Cow<'_, str>> {
        None
    }

    fn uid(&self) -> Option<Cow<'_, str>> {
        None
    }
}

impl Cluster {
    /// Begins to watch, for ever. `own_namespace` is where nodemesh is installed.
    pub fn watch(client: &Client, own_namespace: String) -> Self {
        let changed = Arc::new(Notify::new());
        Self {
            own_namespace,
            pods: follow(Api::all(client.clone()), &changed, Facts::of),
            namespaces: follow(Api::all(client.clone()), &changed, |mut found: Namespace| {
                strip(&mut found.metadata, &[MESH]);
                (found.spec, found.status) = (None, None);
                found
            }),
            nodes: follow(Api::all(client.clone()), &changed, |found| services::node(&found)),
            services: follow(Api::all(client.clone()), &changed, |mut found: Service| {
                strip(&mut found.metadata, &[]);
                found
            }),
            slices: follow(Api::all(client.clone()), &changed, |found| {
                services::slice(&found).map(Arc::new)
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
            pods.iter().map(|pod| &pod.what),
            namespaces.iter().map(|namespace| &namespace.what),
            &self.own_namespace,
        );
        let (found, slices) = (self.services.state(), self.slices.state());
        let claims = services::claims(
            found.iter().map(|service| &service.what),
            slices.iter().filter_map(|slice| slice.what.as_ref()),
        );
        let nodes = self.nodes.state().iter().filter_map(|node| node.what.clone()).collect();
        let services = Files { claims, nodes, problems: Vec::new() };
        (Registry::from_cluster(workloads), services)
    }

    /// The pods that are not in the mesh.
    pub fn outside(&self) -> Vec<OutsidePod> {
        let (pods, namespaces) = (self.pods.state(), self.namespaces.state());
        pods::outside(
            pods.iter().map(|pod| &pod.what),
            namespaces.iter().map(|namespace| &namespace.what),
            &self.own_namespace,
        )
    }

    /// Who has an address, if it is somebody of this cluster.
    pub fn owner(&self, address: IpAddr) -> Option<Owner> {
        pods::owner(self.pods.state().iter().map(|pod| &pod.what), address)
    }

    /// The record of a workload's pod. Its UID is another one than the node's if the pod is static.
    pub fn record(&self, workload: &Workload) -> Option<ObjectReference> {
        let key = ObjectRef::new(&workload.name).within(&workload.namespace);
        let pod = &self.pods.get(&key)?.what;
        (pod.workload.uid == workload.uid).then(|| pod.reference())
    }

    /// Where the replicas of the control plane listen, this one included.
    pub fn replicas(&self) -> BTreeSet<SocketAddr> {
        let slices = self.slices.state();
        let slices = slices.iter().filter_map(|slice| slice.what.as_ref());
        services::replicas(slices, &self.own_namespace)
    }
}

/// Watches all objects of one kind, and keeps of each what `keep` makes of it.
fn follow<K, T>(api: Api<K>, changed: &Arc<Notify>, keep: fn(K) -> T) -> Store<Kept<K, T>>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
    T: Clone + Send + Sync + 'static,
{
    let writer = Writer::default();
    let store = writer.as_reader();
    let changed = Arc::clone(changed);
    tokio::spawn(async move {
        let events = watcher(api, watcher::Config::default()).default_backoff();
        let events = events.map_ok(move |event| match event {
            Event::Apply(found) => Event::Apply(kept(found, keep)),
            Event::Delete(found) => Event::Delete(kept(found, keep)),
            Event::InitApply(found) => Event::InitApply(kept(found, keep)),
            Event::Init => Event::Init,
            Event::InitDone => Event::InitDone,
        });
        let mut events = std::pin::pin!(reflector(writer, events));
        while let Some(event) = events.next().await {
            match event {
                // A list that is not complete yet changes nothing.
                Ok(Event::Init | Event::InitApply(_)) => {}
                Ok(_) => changed.notify_one(),
                Err(error) => {
                    tracing::warn!(kind = %K::kind(&()), %error, "watching the API server failed");
                }
            }
        }
    });
    store
}

fn kept<K: Resource, T>(found: K, keep: fn(K) -> T) -> Kept<K, T> {
    let (namespace, name) = (found.meta().namespace.clone(), found.meta().name.clone());
    Kept { namespace, name, what: keep(found), kind: PhantomData }
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

#[cfg(test)]
mod tests;
