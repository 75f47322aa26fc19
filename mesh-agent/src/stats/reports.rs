//! What the owners of applications must see, until the control plane has been told.
//!
//! Refusals may come in floods, and from whoever likes: what is alike is counted together, and of a
//! pod there are never more than some. Adding one costs a lock and a look at those few.

use std::{
    collections::{BTreeMap, VecDeque},
    net::IpAddr,
    sync::{Mutex, MutexGuard, PoisonError},
};

use mesh_common::{api, report::Reason};
use tokio::sync::Notify;

use super::{Direction, Parties};
use crate::policy::DenyReason;

/// Different reports of one pod. Of more, the oldest is dropped.
const PER_POD: usize = 16;

/// Pods of which there are reports. Those of further ones are dropped.
const MAX_PODS: usize = 1024;

/// The longest text, in bytes.
const MAX_TEXT: usize = 256;

/// Something about one pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// What it is about.
    pub reason: Reason,
    /// In words. Ends where the peer's name is to stand.
    pub text: String,
    /// The other end.
    pub peer: Option<IpAddr>,
}

impl Report {
    /// What a refused connection is reported as: what its pod's owner can do something about.
    pub fn of_denied(parties: &Parties, reason: DenyReason) -> Option<Self> {
        let connection = || format!("{reason}, connection");
        let (told, what) = match reason {
            DenyReason::PlaintextRefused => {
                (Reason::PlaintextRefused, "STRICT, plaintext".to_owned())
            }
            DenyReason::UnknownInCluster => {
                (Reason::DestinationNotInMesh, "not in the mesh, connection".to_owned())
            }
            DenyReason::IdentityMismatch
            | DenyReason::SourceAddress
            | DenyReason::UnregisteredPeer => (Reason::PeerNotAllowed, connection()),
            DenyReason::EgressDenied => (Reason::EgressDenied, connection()),
            DenyReason::TooManyConnections => (Reason::TooManyConnections, connection()),
            // The pod is new or gone, the control plane away, or it is as without a mesh.
            DenyReason::NoEndpoints
            | DenyReason::NoRemoteAddress
            | DenyReason::NoServicePort
            | DenyReason::RegistryUnknown
            | DenyReason::UnregisteredPod => return None,
        };
        let (towards, peer) = match parties.direction {
            Direction::Inbound => ("from", parties.client.address),
            Direction::Outbound => ("to", parties.endpoint.unwrap_or(parties.server.address)),
        };
        let text = format!("refused: {what} {towards}");
        Some(Self { reason: told, text, peer: Some(peer.ip()) })
    }
}

/// Reports that were not sent yet.
#[derive(Debug, Default)]
pub struct Reports {
    pending: Mutex<Pending>,
    some: Notify,
}

#[derive(Debug, Default)]
struct Pending {
    pods: BTreeMap<String, VecDeque<(Report, u64)>>,
    dropped: u64,
}

impl Reports {
    /// Adds one.
    pub fn add(&self, uid: &str, report: Report) {
        self.lock().add(uid, report, 1);
        self.some.notify_one();
    }

    /// Waits until there is one.
    pub async fn some(&self) {
        while self.lock().pods.is_empty() {
            self.some.notified().await;
        }
    }

    /// Takes out reports of some pods, at least `limit` if there are as many.
    pub fn take(&self, limit: usize) -> Vec<api::PodReport> {
        let mut taken = Vec::new();
        let mut pending = self.lock();
        while taken.len() < limit
            && let Some((uid, reports)) = pending.pods.pop_first()
        {
            taken.extend(reports.into_iter().map(|(report, count)| api::PodReport {
                pod_uid: uid.clone(),
                reason: report.reason.name().to_owned(),
                message: report.text,
                count,
                peer: report.peer.map(|peer| peer.to_string()).unwrap_or_default(),
            }));
        }
        taken
    }

    /// Puts back what could not be sent.
    pub fn put_back(&self, reports: Vec<api::PodReport>) {
        let mut pending = self.lock();
        for api::PodReport { pod_uid, reason, message, count, peer } in reports {
            if let Some(reason) = Reason::named(&reason) {
                let report = Report { reason, text: message, peer: peer.parse().ok() };
                pending.add(&pod_uid, report, count);
            }
        }
    }

    /// Counts reports that the control plane did not want.
    pub fn refused(&self, count: usize) {
        self.lock().dropped += count as u64;
    }

    /// How many were dropped so far, since there were too many or the control plane refused them.
    pub fn dropped(&self) -> u64 {
        self.lock().dropped
    }

    /// Drops those of a pod that was un-enrolled.
    pub fn forget(&self, uid: &str) {
        self.lock().pods.remove(uid);
    }

    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pending {
    fn add(&mut self, uid: &str, mut report: Report, count: u64) {
        report.text.truncate(report.text.floor_char_boundary(MAX_TEXT));
        let full = self.pods.len() >= MAX_PODS;
        let Some(reports) = self.pods.get_mut(uid) else {
            if full {
                self.dropped += count;
            } else {
                self.pods.insert(uid.to_owned(), VecDeque::from([(report, count)]));
            }
            return;
        };
        let alike = |(known, _): &&mut (Report, u64)| {
            (known.reason, known.peer) == (report.reason, report.peer)
        };
        if let Some((_, known)) = reports.iter_mut().find(alike) {
            *known += count;
            return;
        }
        if reports.len() == PER_POD
            && let Some((_, dropped)) = reports.pop_front()
        {
            self.dropped += dropped;
        }
        reports.push_back((report, count));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(peer: &str) -> Report {
        let text = "refused: STRICT, plaintext from".to_owned();
        Report { reason: Reason::PlaintextRefused, text, peer: peer.parse().ok() }
    }

    fn counts(reports: &Reports) -> Vec<(String, String, u64)> {
        let taken = reports.take(usize::MAX).into_iter();
        taken.map(|report| (report.pod_uid, report.peer, report.count)).collect()
    }

    #[test]
    fn what_is_alike_is_counted_together() {
        let reports = Reports::default();
        for (uid, peer) in [("a", "10.0.0.1"), ("a", "10.0.0.1"), ("a", "10.0.0.2"), ("b", "")] {
            reports.add(uid, report(peer));
        }
        let other = Report { reason: Reason::PeerNotAllowed, ..report("10.0.0.1") };
        reports.add("a", other);
        let expected =
            [("a", "10.0.0.1", 2), ("a", "10.0.0.2", 1), ("a", "10.0.0.1", 1), ("b", "", 1)];
        let expected = expected.map(|(uid, peer, n)| (uid.to_owned(), peer.to_owned(), n));
        assert_eq!(counts(&reports), expected);
        assert_eq!((counts(&reports).len(), reports.dropped()), (0, 0));
    }

    #[test]
    fn a_flood_is_bounded_and_the_latest_stay() {
        let reports = Reports::default();
        reports.add("quiet", report("10.0.0.1"));
        for n in 0..100 {
            reports.add("loud", report(&format!("10.0.1.{n}")));
        }
        let kept = counts(&reports);
        assert_eq!((kept.len(), reports.dropped()), (PER_POD + 1, 100 - PER_POD as u64));
        assert_eq!((&*kept[0].1, &*kept[PER_POD].0), ("10.0.1.84", "quiet"));
        for n in 0..=MAX_PODS {
            reports.add(&format!("{n:04}"), report("10.0.0.1"));
        }
        assert_eq!(counts(&reports).len(), MAX_PODS);
    }

    #[test]
    fn what_could_not_be_sent_is_not_lost_and_not_sent_twice() {
        let reports = Reports::default();
        reports.add("a", report("10.0.0.1"));
        reports.add("b", report("10.0.0.1"));
        let unsent = reports.take(1);
        reports.add("a", report("10.0.0.1"));
        reports.put_back(unsent);
        reports.forget("b");
        assert_eq!(counts(&reports), [("a".to_owned(), "10.0.0.1".to_owned(), 2)]);
    }

    #[test]
    fn a_long_text_is_cut() {
        let reports = Reports::default();
        reports.add("a", Report { text: "ä".repeat(MAX_TEXT), ..report("") });
        assert_eq!(reports.take(1)[0].message, "ä".repeat(MAX_TEXT / 2));
    }

    #[tokio::test]
    async fn one_waits_for_the_first() {
        let reports = std::sync::Arc::new(Reports::default());
        let waiting = std::sync::Arc::clone(&reports);
        let waited = tokio::spawn(async move { waiting.some().await });
        tokio::task::yield_now().await;
        assert!(!waited.is_finished());
        reports.add("a", report(""));
        waited.await.unwrap();
    }
}
