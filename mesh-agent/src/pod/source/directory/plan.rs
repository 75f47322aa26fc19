//! From what is wanted to what has to change.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    super::{PodSpec, Removal},
    namespace::NamespaceId,
};

/// A pod whose namespace was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pod {
    pub(super) spec: PodSpec,
    pub(super) namespace: NamespaceId,
}

/// Pods by UID.
pub(super) type Pods = BTreeMap<String, Pod>;

/// One step.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Change {
    Remove(String, Removal),
    Upsert(Pod),
}

/// The steps from `reported` to `wanted`, removals first: what they free may be what an enrolment
/// needs. `declared` are the UIDs that some file names, with or without a namespace; `again` those
/// whose enrolment is to be repeated.
pub(super) fn changes(
    reported: &Pods,
    wanted: &Pods,
    declared: &BTreeSet<String>,
    again: &BTreeSet<String>,
) -> Vec<Change> {
    let removals = reported.iter().filter_map(|(uid, old)| {
        let removal = match wanted.get(uid) {
            Some(new) if new.namespace == old.namespace => return None,
            None if !declared.contains(uid) => Removal::Withdrawn,
            Some(_) | None => Removal::NamespaceGone,
        };
        Some(Change::Remove(uid.clone(), removal))
    });
    let upserts = wanted
        .iter()
        .filter(|(uid, new)| reported.get(*uid) != Some(*new) || again.contains(*uid))
        .map(|(_, new)| Change::Upsert(new.clone()));
    removals.chain(upserts).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Udp;
    use proptest::prelude::*;

    fn pods() -> impl Strategy<Value = Pods> {
        let pod = ("[a-d]", 0_u64..3, any::<bool>());
        prop::collection::vec(pod, 0..5).prop_map(|pods| {
            pods.into_iter()
                .map(|(uid, namespace, deny)| {
                    let udp = if deny { Udp::Deny } else { Udp::Allow };
                    let spec = PodSpec { uid: uid.clone(), netns: "/a".into(), udp };
                    (uid, Pod { spec, namespace: NamespaceId::for_test(namespace) })
                })
                .collect()
        })
    }

    proptest! {
        #[test]
        fn the_steps_lead_to_what_is_wanted(before in pods(), wanted in pods()) {
            let declared = wanted.keys().cloned().collect();
            let mut now = before.clone();
            for change in changes(&before, &wanted, &declared, &BTreeSet::new()) {
                match change {
                    Change::Remove(uid, cause) => {
                        let gone = now.remove(&uid).expect("only what is there is removed");
                        let replaced = wanted.get(&uid).map(|new| new.namespace != gone.namespace);
                        prop_assert_ne!(replaced, Some(false), "a pod is not interrupted");
                        prop_assert_eq!(cause == Removal::NamespaceGone, replaced.is_some());
                    }
                    Change::Upsert(pod) => {
                        let old = now.insert(pod.spec.uid.clone(), pod.clone());
                        let same = old.is_none_or(|old| old.namespace == pod.namespace);
                        prop_assert!(same, "one namespace never follows another directly");
                    }
                }
            }
            prop_assert_eq!(&now, &wanted);
            prop_assert_eq!(changes(&now, &wanted, &declared, &BTreeSet::new()), []);
        }

        #[test]
        fn what_is_repeated_is_only_what_is_wanted(wanted in pods()) {
            let everything: BTreeSet<_> = ["a", "b", "c", "d"].map(str::to_owned).into();
            let expected: Vec<_> = wanted.values().cloned().map(Change::Upsert).collect();
            prop_assert_eq!(changes(&wanted, &wanted, &everything, &everything), expected);
        }
    }

    #[test]
    fn a_declared_pod_without_a_namespace_has_lost_it() {
        let namespace = NamespaceId::for_test(1);
        let spec = PodSpec { uid: "a".to_owned(), netns: "/a".into(), udp: Udp::Allow };
        let before = Pods::from([("a".to_owned(), Pod { spec, namespace })]);
        for (declared, cause) in [
            (BTreeSet::from(["a".to_owned()]), Removal::NamespaceGone),
            (BTreeSet::new(), Removal::Withdrawn),
        ] {
            let steps = changes(&before, &Pods::new(), &declared, &BTreeSet::new());
            assert_eq!(steps, [Change::Remove("a".to_owned(), cause)]);
        }
    }
}
