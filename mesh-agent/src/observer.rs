//! Looks at the pods of the node every few seconds and tells the control plane how they are: for
//! `mesh-control status`, and of what lasts, for the owners of applications.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, SystemTime},
};

use mesh_common::{api, report::Reason};
use prost::Message as _;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::{sync::watch, time::Instant};

use crate::{
    identity::Svid,
    kubernetes::Unguarded,
    stats::{Report, Reports},
};

/// How often.
const EVERY: Duration = Duration::from_secs(5);

/// What is wrong for less than this may be over before anybody reads of it: a pod starts.
const GRACE: Duration = Duration::from_secs(30);

/// How often an owner is told of what stays wrong.
const AGAIN: Duration = Duration::from_secs(300);

/// The longest text about one pod, in bytes.
const MAX_PROBLEM: usize = 128;

/// The longest message that the control plane takes has 64 KiB.
const MAX_STATE: usize = 60 << 10;

/// Pods in one message, with the longest UIDs: more than a node has.
const MAX_PODS: usize = 400;

/// An enrolled pod.
#[derive(Clone, Debug)]
pub struct Observed {
    /// Its UID.
    pub uid: String,
    /// Its certificate.
    pub svid: Option<Arc<Svid>>,
    /// Why there is none, or no fresh one.
    pub certificate_problem: Option<String>,
    /// Why its guard, or what the capture rests on, is not what it should be.
    pub problem: Option<String>,
}

/// Looks as long as it is not dropped.
pub struct Observer {
    /// The enrolled pods; none as long as they are not all known.
    pub pods: Box<dyn Fn() -> Option<Vec<Observed>> + Send>,
    /// Pods that should be enrolled and are not.
    pub unguarded: watch::Receiver<Unguarded>,
    /// Where owners are told.
    pub reports: Arc<Reports>,
    /// Where the control plane is told.
    pub state: watch::Sender<Option<api::State>>,
}

impl Observer {
    /// Runs until it is dropped.
    pub async fn run(self) {
        let mut lasting = Lasting::default();
        let mut ticks = tokio::time::interval(EVERY);
        loop {
            ticks.tick().await;
            let Some(pods) = (self.pods)() else { continue };
            let unguarded = self.unguarded.borrow().clone();
            let wrong = wrong(&pods, &unguarded, SystemTime::now());
            for (uid, report) in lasting.due(wrong, Instant::now()) {
                self.reports.add(&uid, report);
            }
            let state = Some(state(pods, unguarded));
            self.state.send_if_modified(|known| {
                let changed = *known != state;
                if changed {
                    *known = state;
                }
                changed
            });
        }
    }
}

/// What `status` of the control plane shows. Cut so that it always fits into a message.
fn state(pods: Vec<Observed>, unguarded: Unguarded) -> api::State {
    let seconds = |svid: &Svid| OffsetDateTime::from(svid.leaf.not_after).unix_timestamp();
    let cut = |mut problem: String| {
        problem.truncate(problem.floor_char_boundary(MAX_PROBLEM));
        problem
    };
    let enrolled = pods.into_iter().map(|pod| api::PodState {
        certificate_not_after: pod.svid.as_deref().map(seconds).unwrap_or_default(),
        problem: cut(pod.problem.or(pod.certificate_problem).unwrap_or_default()),
        enrolled: true,
        uid: pod.uid,
    });
    let unguarded = unguarded.into_iter().map(|(uid, pod)| api::PodState {
        uid,
        problem: cut(format!("in the mesh, but not under guard: {}", pod.problem)),
        ..api::PodState::default()
    });
    let mut state = api::State { pods: enrolled.chain(unguarded).take(MAX_PODS).collect() };
    if state.encoded_len() > MAX_STATE {
        state.pods.iter_mut().for_each(|pod| pod.problem.clear());
    }
    state
}

/// What is wrong now that an owner should know of if it lasts.
fn wrong(pods: &[Observed], unguarded: &Unguarded, now: SystemTime) -> Vec<(String, Report)> {
    let report = |reason, text| Report { reason, text, peer: None };
    let certificate = |pod: &Observed| {
        let problem = pod.certificate_problem.as_deref()?;
        let Some(svid) = &pod.svid else {
            let text = format!("has no certificate, its connections are refused: {problem}");
            return Some((pod.uid.clone(), report(Reason::NoCertificate, text)));
        };
        let not_after = svid.leaf.not_after;
        let left = not_after.duration_since(svid.next_rotation).unwrap_or_default();
        if now < svid.next_rotation + left / 2 {
            return None;
        }
        let ends = OffsetDateTime::from(not_after).format(&Rfc3339).unwrap_or_default();
        let text = format!("its certificate ends at {ends} and is not replaced: {problem}");
        Some((pod.uid.clone(), report(Reason::CertificateNotRotating, text)))
    };
    let unguarded = unguarded.iter().map(|(uid, pod)| {
        let text = format!("in the mesh, but not under guard: {}", pod.problem);
        (uid.clone(), report(Reason::NotUnderGuard, text))
    });
    pods.iter().filter_map(certificate).chain(unguarded).collect()
}

/// Since when something is wrong with a pod, as the time when its owner is to be told.
#[derive(Debug, Default)]
struct Lasting(BTreeMap<(String, Reason), Instant>);

impl Lasting {
    /// What is to be told now, of what is wrong now.
    fn due(&mut self, wrong: Vec<(String, Report)>, now: Instant) -> Vec<(String, Report)> {
        let mut before = std::mem::take(&mut self.0);
        let mut due = Vec::new();
        for (uid, report) in wrong {
            let key = (uid.clone(), report.reason);
            let mut next = before.remove(&key).unwrap_or(now + GRACE);
            if next <= now {
                next = now + AGAIN;
                due.push((uid, report));
            }
            self.0.insert(key, next);
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubernetes::UnguardedPod;

    fn without_certificate(uid: &str) -> Observed {
        Observed {
            uid: uid.to_owned(),
            svid: None,
            certificate_problem: Some("the control plane is not connected".to_owned()),
            problem: None,
        }
    }

    fn unguarded(uid: &str, problem: &str) -> Unguarded {
        let pod = UnguardedPod { name: "shop/old-0".to_owned(), problem: problem.to_owned() };
        Unguarded::from([(uid.to_owned(), pod)])
    }

    #[test]
    fn an_owner_is_told_of_what_lasts_and_not_of_what_passes() {
        let mut lasting = Lasting::default();
        let start = Instant::now();
        let mut told = |seconds: u64, pods: &[Observed]| {
            let wrong = wrong(pods, &unguarded("u", "no namespace"), SystemTime::now());
            let due = lasting.due(wrong, start + Duration::from_secs(seconds)).into_iter();
            due.map(|(uid, report)| (uid, report.reason.name())).collect::<Vec<_>>()
        };
        let nothing: Vec<(String, &str)> = Vec::new();
        let of_u = ("u".to_owned(), "NotUnderGuard");
        assert_eq!(told(0, &[without_certificate("a")]), nothing);
        assert_eq!(told(29, &[]), nothing);
        // Wrong again: from now on.
        assert_eq!(told(30, &[without_certificate("a")]), std::slice::from_ref(&of_u));
        assert_eq!(told(60, &[without_certificate("a")]), [("a".to_owned(), "NoCertificate")]);
        assert_eq!(told(329, &[without_certificate("a")]), nothing);
        assert_eq!(told(330, &[without_certificate("a")]), [of_u]);
    }

    #[test]
    fn the_state_says_what_is_enrolled_and_what_should_be() {
        let state = state(vec![without_certificate("a")], unguarded("u", "no namespace"));
        let pods: Vec<_> =
            state.pods.iter().map(|pod| (&*pod.uid, pod.enrolled, &*pod.problem)).collect();
        let expected = [
            ("a", true, "the control plane is not connected"),
            ("u", false, "in the mesh, but not under guard: no namespace"),
        ];
        assert_eq!(pods, expected);
    }

    #[test]
    fn the_state_fits_into_a_message() {
        let loud = |n: usize| Observed {
            problem: Some("ä".repeat(9999)),
            ..without_certificate(&format!("{n:0128}"))
        };
        let few = state((0..10).map(loud).collect(), Unguarded::new());
        assert_eq!(few.pods[0].problem.len(), MAX_PROBLEM);
        let many = state((0..9999).map(loud).collect(), Unguarded::new());
        assert!(many.pods.len() == MAX_PODS && many.encoded_len() <= MAX_STATE);
    }
}
