//! Pods of this node that are in the mesh and not under guard: when each one is to be looked for.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use tokio::time::Instant;

/// How long the CNI plugin has for a pod that starts.
const GRACE: Duration = Duration::from_secs(5);

/// How often what was not found is looked for again.
pub(super) const AGAIN: Duration = Duration::from_secs(30);

/// The pods, by UID.
#[derive(Debug, Default)]
pub(super) struct Missing(BTreeMap<String, Search>);

#[derive(Debug)]
struct Search {
    /// Whether it has an address: then it runs.
    running: bool,
    next: Instant,
}

impl Missing {
    /// Takes in which pods are missing now, each with whether it has an address.
    pub(super) fn update<'a>(
        &mut self,
        now: Instant,
        missing: impl IntoIterator<Item = (&'a str, bool)>,
    ) {
        let mut before = std::mem::take(&mut self.0);
        for (uid, running) in missing {
            let known = before.remove(uid).filter(|search| search.running == running);
            let search = known.unwrap_or(Search { running, next: now + GRACE });
            self.0.insert(uid.to_owned(), search);
        }
    }

    /// Those to look for now. They are not due again before [`AGAIN`].
    pub(super) fn take_due(&mut self, now: Instant) -> BTreeSet<String> {
        let due = self.0.iter_mut().filter(|(_, search)| search.next <= now);
        due.map(|(uid, search)| {
            search.next = now + AGAIN;
            uid.clone()
        })
        .collect()
    }

    /// When the next one is due.
    pub(super) fn next(&self) -> Option<Instant> {
        self.0.values().map(|search| search.next).min()
    }

    /// Whether a pod is missing that runs.
    pub(super) fn is_running(&self, uid: &str) -> bool {
        self.0.get(uid).is_some_and(|search| search.running)
    }

    /// Whether a pod is missing.
    pub(super) fn contains(&self, uid: &str) -> bool {
        self.0.contains_key(uid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_pod_that_starts_is_left_to_the_plugin_for_a_while() {
        let start = Instant::now();
        let mut missing = Missing::default();
        let due = |missing: &mut Missing, seconds: u64, found: &[(&str, bool)]| {
            let now = start + Duration::from_secs(seconds);
            missing.update(now, found.iter().copied());
            missing.take_due(now).into_iter().collect::<Vec<_>>()
        };
        let nothing: [&str; 0] = [];
        assert_eq!(due(&mut missing, 0, &[("a", false)]), nothing);
        assert_eq!(missing.next(), Some(start + GRACE));
        assert_eq!(due(&mut missing, 4, &[("a", false), ("b", true)]), nothing);
        assert_eq!(due(&mut missing, 5, &[("a", false), ("b", true)]), ["a"]);
        assert_eq!(due(&mut missing, 9, &[("a", false), ("b", true)]), ["b"]);
        assert_eq!(due(&mut missing, 34, &[("a", false), ("b", true)]), nothing);
        // It has got its address: now it runs.
        assert_eq!(due(&mut missing, 35, &[("a", true)]), nothing);
        assert_eq!(due(&mut missing, 40, &[("a", true)]), ["a"]);
        assert_eq!(due(&mut missing, 69, &[("a", true)]), nothing);
        assert_eq!(due(&mut missing, 70, &[("a", true)]), ["a"]);
        // Enrolled, and later missing again.
        assert_eq!(due(&mut missing, 80, &[]), nothing);
        assert_eq!(missing.next(), None);
        assert_eq!(due(&mut missing, 101, &[("a", true)]), nothing);
        assert_eq!(due(&mut missing, 106, &[("a", true)]), ["a"]);
    }
}
