//! The control plane on Kubernetes: the API server says which pods there are, who an agent is and
//! where the CA's key is kept.
//!
//! Replicas need nothing of each other: each watches on its own, and any can sign. Nothing needs a
//! leader: what only one of them may do is a write that fails if another one was first.

pub mod attest;
pub mod cluster;
pub mod events;
mod facts;
pub mod pods;
pub mod preflight;
pub mod registry;
pub mod rotation;
pub mod secret;
pub mod services;

#[cfg(test)]
mod scripted;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use kube::Client;
use tokio::time::timeout;

use self::cluster::Cluster;
use crate::{config::Kubernetes, control::Control};

/// The ConfigMap is written again this often, in case somebody has changed or deleted it.
const REPUBLISH: Duration = Duration::from_secs(300);

/// How soon a failed attempt to write it is followed by another.
const RETRY: Duration = Duration::from_secs(5);

/// Tells the control plane what the cluster is now.
pub async fn update(control: &Arc<Control>, cluster: &Arc<Cluster>) {
    let (control, cluster) = (Arc::clone(control), Arc::clone(cluster));
    let update = move || {
        let (registry, services) = cluster.state();
        control.set_cluster(registry, services);
    };
    if tokio::task::spawn_blocking(update).await.is_err() {
        tracing::error!("taking over what the API server says failed");
    }
}

/// Does so after every change, for ever, and at most half of the time: the larger the cluster, the
/// longer it takes, and the more changes are taken together.
pub async fn follow(control: Arc<Control>, cluster: Arc<Cluster>) {
    loop {
        cluster.changed().await;
        let began = Instant::now();
        update(&control, &cluster).await;
        tokio::time::sleep(began.elapsed()).await;
    }
}

/// Keeps the roots in the ConfigMap those that agents are to trust, for ever.
pub async fn publish_roots(client: Client, config: Kubernetes, control: Arc<Control>) {
    let mut snapshots = control.publisher().subscribe();
    let mut published = Vec::new();
    loop {
        let roots = control.view().bundle.roots.clone();
        if roots != published {
            if let Err(error) = secret::publish_roots(&client, &config, &roots).await {
                let config_map = &config.bundle_config_map;
                tracing::warn!(config_map, %error, "publishing the roots failed: no node can join");
                tokio::time::sleep(RETRY).await;
                continue;
            }
            published = roots;
        }
        match timeout(REPUBLISH, snapshots.changed()).await {
            Ok(Ok(())) => {}
            // The control plane is gone.
            Ok(Err(_)) => return,
            Err(_) => published.clear(),
        }
    }
}
