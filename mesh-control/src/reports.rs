//! What agents tell of their pods for the owners of applications: judged, cut and kept within bounds.

use std::{
    collections::HashMap,
    net::IpAddr,
    time::{Duration, Instant},
};

use mesh_common::{api, report::Reason};

use crate::{
    refusal::Refusal,
    registry::{Registry, Workload},
};

/// Reports in one call. An agent sends fewer.
pub const MAX_REPORTS: usize = 256;

/// The longest text from an agent, in characters.
const MAX_MESSAGE: usize = 256;

/// Of one pod: so many at once, and then one in each of these times.
const POD: Rate = Rate { burst: 10.0, each: Duration::from_secs(60) };

/// Of all pods of one node.
const NODE: Rate = Rate { burst: 50.0, each: Duration::from_secs(5) };

/// What the owner of an application must see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The pod, on the node that tells of it.
    pub pod: Workload,
    /// Why.
    pub reason: Reason,
    /// For people. Ends with whoever has the address of the peer, if there is one.
    pub message: String,
    /// The other end.
    pub peer: Option<IpAddr>,
    /// How often.
    pub count: u64,
}

/// Judges a call of a node: it may speak of its own pods only. What a newer agent tells under a
/// reason that is not known here is left out.
///
/// # Errors
///
/// [`Refusal::ForeignPod`], [`Refusal::UnknownPod`]; then nothing of the call counts.
pub fn admit(
    registry: &Registry,
    node: &str,
    reports: Vec<api::PodReport>,
) -> Result<Vec<Report>, Refusal> {
    let mut admitted = Vec::new();
    for report in reports.into_iter().take(MAX_REPORTS) {
        let api::PodReport { pod_uid, reason, message, count, peer } = report;
        let pod = registry.on_node(&pod_uid, node)?.clone();
        let Some(reason) = Reason::named(&reason) else { continue };
        let message = cut(&message);
        admitted.push(Report { pod, reason, message, peer: peer.parse().ok(), count });
    }
    Ok(admitted)
}

/// An agent's text, as far as it is kept: in one line.
fn cut(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(MAX_MESSAGE).collect()
}

#[derive(Clone, Copy, Debug)]
struct Rate {
    burst: f64,
    each: Duration,
}

/// How much may still be told: a token bucket for each pod and each node. Full ones are forgotten,
/// so that there are no more of them than what was told of lately.
#[derive(Debug, Default)]
pub struct Budget {
    pods: HashMap<String, Bucket>,
    nodes: HashMap<String, Bucket>,
    swept: Option<Instant>,
}

#[derive(Clone, Copy, Debug)]
struct Bucket {
    left: f64,
    at: Instant,
}

impl Rate {
    fn now(self, bucket: Bucket, now: Instant) -> f64 {
        let gained = now.saturating_duration_since(bucket.at).div_duration_f64(self.each);
        (bucket.left + gained).min(self.burst)
    }

    fn available(self, buckets: &HashMap<String, Bucket>, key: &str, now: Instant) -> f64 {
        buckets.get(key).map_or(self.burst, |bucket| self.now(*bucket, now))
    }

    fn sweep(self, buckets: &mut HashMap<String, Bucket>, now: Instant) {
        buckets.retain(|_, bucket| self.now(*bucket, now) < self.burst);
    }
}

impl Budget {
    /// Takes from the budget what a report of this pod costs, if there is as much.
    pub fn take(&mut self, pod: &Workload, now: Instant) -> bool {
        if self.swept.is_none_or(|swept| now.saturating_duration_since(swept) > POD.each) {
            POD.sweep(&mut self.pods, now);
            NODE.sweep(&mut self.nodes, now);
            self.swept = Some(now);
        }
        let of_pod = POD.available(&self.pods, &pod.uid, now);
        let of_node = NODE.available(&self.nodes, &pod.node, now);
        if of_pod < 1.0 || of_node < 1.0 {
            return false;
        }
        self.pods.insert(pod.uid.clone(), Bucket { left: of_pod - 1.0, at: now });
        self.nodes.insert(pod.node.clone(), Bucket { left: of_node - 1.0, at: now });
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(uid: &str, node: &str) -> Workload {
        Workload {
            uid: uid.to_owned(),
            name: format!("{uid}-0"),
            namespace: "shop".to_owned(),
            service_account: "cart".to_owned(),
            node: node.to_owned(),
            addresses: Vec::new(),
            owner: String::new(),
        }
    }

    fn report(uid: &str) -> api::PodReport {
        api::PodReport {
            pod_uid: uid.to_owned(),
            reason: "PlaintextRefused".to_owned(),
            message: "refused: STRICT,\n plaintext from\u{1b}".to_owned(),
            count: 3,
            peer: "10.0.0.7".to_owned(),
        }
    }

    #[test]
    fn a_node_tells_of_its_own_pods_only() {
        let registry = Registry::from_cluster([pod("a", "n1"), pod("b", "n2")]);
        let admitted = admit(&registry, "n1", vec![report("a")]).unwrap();
        let expected = Report {
            pod: pod("a", "n1"),
            reason: Reason::PlaintextRefused,
            message: "refused: STRICT, plaintext from".to_owned(),
            peer: Some("10.0.0.7".parse().unwrap()),
            count: 3,
        };
        assert_eq!(admitted, [expected]);
        let foreign = admit(&registry, "n1", vec![report("a"), report("b")]);
        assert!(matches!(foreign, Err(Refusal::ForeignPod { .. })), "{foreign:?}");
        let unknown = admit(&registry, "n1", vec![report("c")]);
        assert!(matches!(unknown, Err(Refusal::UnknownPod { .. })), "{unknown:?}");
    }

    #[test]
    fn what_is_unknown_or_too_much_is_left_out() {
        let registry = Registry::from_cluster([pod("a", "n1")]);
        let newer = api::PodReport { reason: "Rain".to_owned(), ..report("a") };
        assert_eq!(admit(&registry, "n1", vec![newer]).unwrap(), []);
        let long = api::PodReport { message: "ä".repeat(9999), ..report("a") };
        let nobody = api::PodReport { peer: "shop".to_owned(), ..report("a") };
        let admitted = admit(&registry, "n1", vec![long, nobody]).unwrap();
        assert_eq!(admitted[0].message, "ä".repeat(MAX_MESSAGE));
        assert_eq!(admitted[1].peer, None);
        let many = vec![report("a"); MAX_REPORTS + 1];
        assert_eq!(admit(&registry, "n1", many).unwrap().len(), MAX_REPORTS);
    }

    #[test]
    fn a_loud_pod_has_its_share_and_leaves_others_theirs() {
        let (start, mut budget) = (Instant::now(), Budget::default());
        let taken = |budget: &mut Budget, pod: &Workload, now: Instant| {
            (0..100).filter(|_| budget.take(pod, now)).count()
        };
        assert_eq!(taken(&mut budget, &pod("a", "n1"), start), 10);
        assert_eq!(taken(&mut budget, &pod("b", "n1"), start), 10);
        assert_eq!(taken(&mut budget, &pod("a", "n1"), start + POD.each), 1);
    }

    #[test]
    fn a_loud_node_has_its_share_and_leaves_others_theirs() {
        let (start, mut budget) = (Instant::now(), Budget::default());
        let pods = |node: &str| (0..100).map(|n| pod(&format!("{node}-{n}"), node)).collect();
        let taken = |budget: &mut Budget, pods: Vec<Workload>, now: Instant| {
            pods.iter().filter(|pod| budget.take(pod, now)).count()
        };
        assert_eq!(taken(&mut budget, pods("n1"), start), 50);
        assert_eq!(taken(&mut budget, pods("n2"), start), 50);
        assert_eq!(taken(&mut budget, pods("n1"), start + 2 * NODE.each), 2);
        // What is as it was at first takes no memory.
        assert!(budget.take(&pod("c", "n3"), start + 100 * POD.each));
        assert_eq!((budget.pods.len(), budget.nodes.len()), (1, 1));
    }
}
