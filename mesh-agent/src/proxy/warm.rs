//! Tunnels that are made before they are asked for: a pod is likely to connect to what its workload
//! has connected to lately, also if it is new, its certificate is, or the endpoints of a service are.

use std::{
    collections::{HashMap, HashSet},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use mesh_common::spiffe::WorkloadId;
use tokio::sync::watch;

use super::{
    PodProxy,
    outbound::Mesh,
    route::{Way, place, way},
};
use crate::{
    balance::candidates,
    identity::{Found, Snapshot, Workload},
    tunnel::pool::{Key, Proof},
};

/// How many workloads of a node are remembered, and of each how many destinations.
const MOST_WORKLOADS: usize = 1024;
const MOST_DESTINATIONS: usize = 16;

/// To how many endpoints of a service a pod has a tunnel before it asks.
const MOST_ENDPOINTS: usize = 8;

/// For how long changes are gathered, and connections may end and leave their tunnels.
const PAUSE: Duration = Duration::from_secs(1);

/// What the workloads of a node have connected to through the mesh: services and pods, as their
/// applications named them. It is the workload's rather than the pod's: another pod of it will do
/// the same.
#[derive(Debug)]
pub struct Habits {
    seen: Mutex<HashMap<WorkloadId, HashMap<SocketAddr, Instant>>>,
    /// Something was seen for the first time.
    grown: watch::Sender<()>,
}

impl Default for Habits {
    fn default() -> Self {
        Self { seen: Mutex::default(), grown: watch::channel(()).0 }
    }
}

impl Habits {
    /// A pod of the workload has connected to this.
    pub(super) fn note(&self, workload: &WorkloadId, destination: SocketAddr, now: Instant) {
        let mut seen = self.seen();
        if let Some(last) = seen.get_mut(workload).and_then(|known| known.get_mut(&destination)) {
            *last = now;
            return;
        }
        if !seen.contains_key(workload)
            && seen.len() >= MOST_WORKLOADS
            && let Some(oldest) = oldest(&seen, |known| known.values().max().copied())
        {
            seen.remove(&oldest);
        }
        let known = seen.entry(workload.clone()).or_default();
        if known.len() >= MOST_DESTINATIONS
            && let Some(oldest) = oldest(known, |last| Some(*last))
        {
            known.remove(&oldest);
        }
        known.insert(destination, now);
        drop(seen);
        self.grown.send_replace(());
    }

    /// What pods of the workload have connected to since then.
    fn since(&self, workload: &WorkloadId, earliest: Option<Instant>) -> Vec<SocketAddr> {
        let seen = self.seen();
        let known = seen.get(workload).into_iter().flatten();
        let lately = known.filter(|(_, last)| earliest.is_none_or(|earliest| **last >= earliest));
        lately.map(|(destination, _)| *destination).collect()
    }

    fn seen(&self) -> MutexGuard<'_, HashMap<WorkloadId, HashMap<SocketAddr, Instant>>> {
        // Nothing is left half done by a panic.
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn oldest<K: Clone, V>(all: &HashMap<K, V>, age: impl Fn(&V) -> Option<Instant>) -> Option<K> {
    all.iter().min_by_key(|(_, value)| age(value)).map(|(key, _)| key.clone())
}

impl PodProxy {
    /// Makes the tunnels that the pod is likely to ask for, until the agent drains.
    pub async fn keep_warm(self: Arc<Self>) {
        if !self.pool.keeps_any() {
            return;
        }
        let (mut svid, mut registry) = (self.svid.clone(), self.registry.clone());
        let (mut habits, mut ended) = (self.habits.grown.subscribe(), self.pool.ended());
        // What failed is tried again when something of it has changed.
        let mut failed = HashSet::new();
        let work = async {
            loop {
                self.warm_up(&mut failed).await;
                let goes_on = tokio::select! {
                    changed = svid.changed() => changed,
                    changed = registry.changed() => changed,
                    changed = habits.changed() => changed,
                    changed = ended.changed() => changed,
                };
                if goes_on.is_err() {
                    return;
                }
                tokio::time::sleep(PAUSE).await;
            }
        };
        tokio::select! {
            () = self.drain.cancelled() => {}
            () = work => {}
        }
    }

    async fn warm_up(self: &Arc<Self>, failed: &mut HashSet<(Key, Proof)>) {
        let Some(svid) = self.svid.borrow().clone() else { return };
        let registry = self.registry();
        let Some(own) = registry.by_uid(&self.uid) else { return };
        let earliest = Instant::now().checked_sub(self.timeouts.idle_tunnel);
        let mut failing = HashSet::new();
        for destination in self.habits.since(&own.id, earliest) {
            for address in self.likely(destination, own, &registry) {
                let Some(client) = own.source(address) else { continue };
                let way = way(self, client, address, &registry);
                let Ok(Way::Mesh { own, server }) = way else { continue };
                let mesh = Mesh { pod: self, client, address, own: &own, server: &server };
                let (key, proof) = mesh.terms(&svid);
                if failed.contains(&(key.clone(), proof)) {
                    failing.insert((key, proof));
                } else if !self.pool.has(&key, proof) {
                    match mesh.handshake(&svid, key.clone(), proof, &svid.client).await {
                        Ok(tunnel) => self.pool.put(tunnel),
                        Err(why) => {
                            let pod = &self.uid;
                            tracing::debug!(%pod, %address, "no tunnel in advance: {why}");
                            failing.insert((key, proof));
                        }
                    }
                }
            }
        }
        *failed = failing;
    }

    /// What a connection to this destination may be carried to, as far as tunnels are made for it.
    fn likely(
        &self,
        destination: SocketAddr,
        own: &Workload,
        registry: &Snapshot,
    ) -> Vec<SocketAddr> {
        let services = registry.services();
        match services.find(destination) {
            Found::Nothing => vec![destination],
            Found::NoPort => Vec::new(),
            Found::Port(port) => {
                let itself = |address: SocketAddr| own.addresses.contains(&address.ip());
                let all = candidates(port, place(self, services), itself);
                let mut all: Vec<_> = all.into_iter().map(|endpoint| endpoint.address).collect();
                // Others than those of another pod, but the same every time.
                all.sort_by_cached_key(|address| {
                    let mut hasher = DefaultHasher::new();
                    (&self.uid, address).hash(&mut hasher);
                    hasher.finish()
                });
                all.truncate(MOST_ENDPOINTS);
                all
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workload(name: &str) -> WorkloadId {
        WorkloadId::new("td".parse().unwrap(), "shop", name).unwrap()
    }

    fn destination(port: usize) -> SocketAddr {
        ([10, 96, 0, 1], u16::try_from(port).unwrap()).into()
    }

    #[test]
    fn what_was_not_seen_lately_is_no_habit() {
        let (habits, start) = (Habits::default(), Instant::now());
        let after = |seconds| start + Duration::from_secs(seconds);
        let (cart, other) = (workload("cart"), workload("other"));
        habits.note(&cart, destination(1), start);
        habits.note(&cart, destination(2), start);
        habits.note(&cart, destination(1), after(10));
        assert_eq!(habits.since(&cart, Some(after(5))), [destination(1)]);
        assert_eq!(habits.since(&cart, None).len(), 2);
        assert!(habits.since(&cart, Some(after(11))).is_empty());
        assert!(habits.since(&other, None).is_empty());
    }

    #[test]
    fn the_oldest_habits_give_way() {
        let (habits, start) = (Habits::default(), Instant::now());
        let at = |number: usize| start + Duration::from_secs(u64::try_from(number).unwrap());
        for number in 0..=MOST_DESTINATIONS {
            habits.note(&workload("cart"), destination(number), at(number));
        }
        let kept = habits.since(&workload("cart"), None);
        assert_eq!(kept.len(), MOST_DESTINATIONS);
        assert!(!kept.contains(&destination(0)));
        for number in 1..=MOST_WORKLOADS {
            let last = at(MOST_DESTINATIONS + number);
            habits.note(&workload(&format!("w{number}")), destination(1), last);
        }
        assert!(habits.since(&workload("cart"), None).is_empty());
        assert_eq!(habits.since(&workload("w1"), None).len(), 1);
    }

    #[test]
    fn only_what_is_new_wakes() {
        let (habits, now) = (Habits::default(), Instant::now());
        let mut grown = habits.grown.subscribe();
        habits.note(&workload("cart"), destination(1), now);
        assert!(grown.has_changed().unwrap());
        grown.mark_unchanged();
        habits.note(&workload("cart"), destination(1), now);
        assert!(!grown.has_changed().unwrap());
    }
}
