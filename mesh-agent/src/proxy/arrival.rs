//! Pods that have just started. A pod runs before anybody has told the registry its addresses, and
//! what it does first would be refused: it waits a little instead, and is then judged as ever.

use std::{net::IpAddr, sync::Arc, time::Duration};

use tokio::{sync::watch, time::timeout};

use crate::identity::{Snapshot, Workload};

/// How long the registry may take to learn the address of a pod that runs already.
const PATIENCE: Duration = Duration::from_secs(5);

/// Waits until the registry says of the pod `uid` of this node what it must, for a connection that
/// the pod opens from `source`.
pub(super) async fn of_own(registry: &watch::Receiver<Arc<Snapshot>>, uid: &str, source: IpAddr) {
    let early = |registry: &Snapshot| {
        registry.is_known() && registry.by_uid(uid).is_none_or(|own| lacks_address(own, source))
    };
    wait_while(registry, early).await;
}

/// The same for a connection of the pod `uid` elsewhere, which has proven who it is. Whom the
/// registry does not name at all is not waited for: it may have been taken out.
pub(super) async fn of_peer(registry: &watch::Receiver<Arc<Snapshot>>, uid: &str, source: IpAddr) {
    let early =
        |registry: &Snapshot| registry.by_uid(uid).is_some_and(|peer| lacks_address(peer, source));
    wait_while(registry, early).await;
}

/// Whether a pod is registered without an address of the family.
fn lacks_address(pod: &Workload, source: IpAddr) -> bool {
    let ipv4 = source.to_canonical().is_ipv4();
    !pod.addresses.iter().any(|address| address.is_ipv4() == ipv4)
}

async fn wait_while(registry: &watch::Receiver<Arc<Snapshot>>, early: impl Fn(&Snapshot) -> bool) {
    if early(&registry.borrow()) {
        let mut registry = registry.clone();
        // Late or not, the caller judges by what there is then.
        drop(timeout(PATIENCE, registry.wait_for(|registry| !early(registry))).await);
    }
}

#[cfg(test)]
mod tests {
    use mesh_common::api;
    use tokio::time::Instant;

    use super::*;

    const SOURCE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 1, 0, 1));

    /// A registry with these workloads, each with its addresses.
    fn registry(workloads: &[(&str, &[&str])]) -> Arc<Snapshot> {
        let mut root = rcgen::CertificateParams::default();
        root.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        root.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
        let root = root.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap();
        let [namespace, service_account, node] = ["shop", "cart", "n1"].map(str::to_owned);
        let workload = |(uid, addresses): &(&str, &[&str])| api::Workload {
            uid: (*uid).to_owned(),
            name: (*uid).to_owned(),
            namespace: namespace.clone(),
            service_account: service_account.clone(),
            node: node.clone(),
            addresses: addresses.iter().map(|&address| address.to_owned()).collect(),
            owner: String::new(),
        };
        let snapshot = api::Snapshot {
            version: 1,
            bundle: Some(api::TrustBundle {
                trust_domain: "td".to_owned(),
                roots: vec![root.der().to_vec()],
            }),
            workloads: workloads.iter().map(workload).collect(),
            settings: Some(api::Settings { svid_lifetime_seconds: 14_400 }),
            ..Default::default()
        };
        Arc::new(snapshot.try_into().unwrap())
    }

    /// How long a connection of the pod `a` waits, from this node and from elsewhere, when the
    /// registry changes after a second.
    async fn waited(before: Arc<Snapshot>, after: Arc<Snapshot>) -> [f32; 2] {
        let (sender, receiver) = watch::channel(before);
        let begun = Instant::now();
        let change = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            sender.send_replace(after);
            // The control plane goes on.
            tokio::time::sleep(Duration::from_secs(60)).await;
        };
        let own = async {
            of_own(&receiver, "a", SOURCE).await;
            begun.elapsed().as_secs_f32().round()
        };
        let peer = async {
            of_peer(&receiver, "a", SOURCE).await;
            begun.elapsed().as_secs_f32().round()
        };
        let ((), own, peer) = tokio::join!(change, own, peer);
        [own, peer]
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_that_starts_waits_for_its_address_and_no_longer() {
        let nobody = || registry(&[]);
        let nowhere = || registry(&[("a", &[])]);
        let there = || registry(&[("a", &["10.1.0.1"])]);
        for (what, before, after, expected) in [
            ("known", there(), there(), [0., 0.]),
            ("its address comes", nowhere(), there(), [1., 1.]),
            ("another address comes", nowhere(), registry(&[("a", &["10.1.0.2"])]), [1., 1.]),
            ("it has another address", registry(&[("a", &["10.1.0.2"])]), there(), [0., 0.]),
            ("the other family's", registry(&[("a", &["fd00::1"])]), there(), [1., 1.]),
            ("its address does not come", nowhere(), nowhere(), [5., 5.]),
            ("it is registered late", nobody(), there(), [1., 0.]),
            ("it is not registered", nobody(), nobody(), [5., 0.]),
            ("it goes", nowhere(), nobody(), [5., 1.]),
            ("nothing is known", Arc::default(), there(), [0., 0.]),
        ] {
            assert_eq!(waited(before, after).await, expected, "{what}");
        }
    }
}
