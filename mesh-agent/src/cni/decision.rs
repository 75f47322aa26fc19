//! What becomes of a pod that starts, from what is known of it.

use mesh_common::membership::{Map, Membership, Pod};

use super::protocol::PodRef;
use crate::kubernetes::facts::Facts;

/// What becomes of the pod, and what is remembered of its namespace.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Decision {
    pub(super) verdict: Verdict,
    pub(super) note: Note,
}

/// What becomes of the pod.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It starts without the mesh.
    Pass,
    /// It starts once it is under guard, by this UID.
    Enrol(String),
    /// It does not start.
    Refuse(Refusal),
}

/// Why a pod does not start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The API was not readable, and nothing says that the pod's namespace is outside.
    Unknown,
    /// The API does not have it.
    NoSuchPod,
    /// The API has another one of its name.
    OtherPod,
}

/// What is to be remembered of a namespace, for when the API is not readable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Note {
    /// That its pods are outside.
    Outside,
    /// Nothing any more: a pod of it is inside, or would be.
    Forget,
    /// What was before.
    Keep,
}

/// Decides. `seen`: the API's answer, `Ok(None)` if it has no such pod. `outside`: whether the
/// namespace was noted as [`Note::Outside`]. `own_namespace` is where nodemesh is installed.
pub(super) fn decide<E>(
    pod: &PodRef,
    own_namespace: &str,
    seen: &Result<Option<Facts>, E>,
    outside: bool,
) -> Decision {
    let refuse = |refusal| Decision { verdict: Verdict::Refuse(refusal), note: Note::Keep };
    let facts = match seen {
        Err(_) if outside => return Decision { verdict: Verdict::Pass, note: Note::Keep },
        Err(_) => return refuse(Refusal::Unknown),
        Ok(None) => return refuse(Refusal::NoSuchPod),
        Ok(Some(facts)) => facts,
    };
    if facts.uid != pod.uid {
        return refuse(Refusal::OtherPod);
    }
    let pod = facts.candidate(&pod.namespace);
    let nothing = Map::new();
    let silent = Pod { labels: &nothing, annotations: &nothing, host_network: false, ..pod };
    let is_member = |pod: &Pod<'_>| Membership::of(pod, own_namespace).is_member();
    let verdict = if is_member(&pod) { Verdict::Enrol(facts.uid.clone()) } else { Verdict::Pass };
    let note = if is_member(&pod) || is_member(&silent) { Note::Forget } else { Note::Outside };
    Decision { verdict, note }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_common::membership::{DISABLED, ENABLED, MESH};

    fn map(value: &str) -> Map {
        Map::from_iter((!value.is_empty()).then(|| (MESH.to_owned(), value.to_owned())))
    }

    fn pod(namespace: &str) -> PodRef {
        let [namespace, name, uid] = [namespace, "cart-0", "u1"].map(str::to_owned);
        PodRef { namespace, name, uid }
    }

    fn all_facts() -> Vec<Facts> {
        const VALUES: [&str; 4] = ["", ENABLED, DISABLED, "else"];
        let mut all = vec![Facts::default()];
        let mut multiply = |change: &dyn Fn(&Facts) -> Vec<Facts>| {
            all = all.iter().flat_map(change).collect();
        };
        multiply(&|f| VALUES.map(|v| Facts { namespace_labels: map(v), ..f.clone() }).into());
        multiply(&|f| VALUES.map(|v| Facts { labels: map(v), ..f.clone() }).into());
        multiply(&|f| VALUES.map(|v| Facts { annotations: map(v), ..f.clone() }).into());
        multiply(&|f| [false, true].map(|host_network| Facts { host_network, ..f.clone() }).into());
        multiply(&|f| ["u1", "u2"].map(|uid| Facts { uid: uid.to_owned(), ..f.clone() }).into());
        all
    }

    /// What the issue asks for, said once more: in words that do not use the decision's own.
    fn expected(facts: &Facts, namespace: &str) -> Decision {
        let has = |map: &Map, value: &str| map.values().any(|found| found == value);
        if facts.uid != "u1" {
            return Decision { verdict: Verdict::Refuse(Refusal::OtherPod), note: Note::Keep };
        }
        let ordinary = namespace == "shop";
        let opted_out = has(&facts.annotations, DISABLED) || has(&facts.labels, DISABLED);
        let asked = has(&facts.labels, ENABLED) || has(&facts.namespace_labels, ENABLED);
        let inside = ordinary && !facts.host_network && !opted_out && asked;
        let forget = inside || ordinary && has(&facts.namespace_labels, ENABLED);
        Decision {
            verdict: if inside { Verdict::Enrol(facts.uid.clone()) } else { Verdict::Pass },
            note: if forget { Note::Forget } else { Note::Outside },
        }
    }

    #[test]
    fn every_combination_is_decided_as_specified() {
        let mut rows = 0;
        for namespace in ["shop", "mesh", "kube-system"] {
            for facts in all_facts() {
                for outside in [false, true] {
                    let wanted = expected(&facts, namespace);
                    let seen = Ok::<_, ()>(Some(facts.clone()));
                    let decision = decide(&pod(namespace), "mesh", &seen, outside);
                    assert_eq!(decision, wanted, "{namespace} {outside} {facts:?}");
                    rows += 1;
                }
            }
        }
        assert_eq!(rows, 3 * 4 * 4 * 4 * 2 * 2 * 2);
    }

    #[test]
    fn what_is_not_known_does_not_start_unless_its_namespace_was_seen_outside() {
        let refuse = Verdict::Refuse;
        for (seen, outside, verdict) in [
            (Err(()), false, refuse(Refusal::Unknown)),
            (Err(()), true, Verdict::Pass),
            (Ok(None), false, refuse(Refusal::NoSuchPod)),
            (Ok(None), true, refuse(Refusal::NoSuchPod)),
        ] {
            let decision = decide(&pod("shop"), "mesh", &seen, outside);
            assert_eq!(decision, Decision { verdict, note: Note::Keep }, "{seen:?} {outside}");
        }
    }
}
