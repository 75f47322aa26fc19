//! Which connections of a client's agent share a tunnel.
//!
//! The first few of a pair have a tunnel each: alone in it, a connection has the whole window of
//! TCP and waits for nobody. With more than that, what counts is the cost of each, and all further
//! ones share tunnels, a few per processor.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    app::AppSocket,
    pool::{Key, Proof},
    shared::{Commands, Port, port},
};

/// So many connections of a pair are carried alone.
const ALONE: usize = 4;
/// A shared tunnel carries this many before there is another one, up to one per processor.
const FEW: usize = 8;
/// And this many before there are more than that: the more, the fewer packets and wake-ups, and the
/// more wait for the same packet if it is lost.
const MANY: usize = 32;
/// How long a peer that knows only `nodemesh/1` is not asked again.
const UNSHARED: Duration = Duration::from_secs(300);

/// The shared tunnels of a node's clients. Clones share them.
#[derive(Clone)]
pub struct Sharing {
    pairs: Arc<Mutex<HashMap<Key, Pair>>>,
    processors: usize,
}

#[derive(Default)]
struct Pair {
    /// Connections that are carried alone.
    alone: usize,
    tunnels: Vec<Entry>,
    last_id: u64,
    /// The peer does not share until then.
    unshared: Option<Instant>,
}

struct Entry {
    id: u64,
    proof: Proof,
    port: Port<AppSocket>,
    /// Connections that are carried, or are about to be.
    load: usize,
    /// The handshake has succeeded; until then it is good for.
    not_after: Option<SystemTime>,
    /// Cancelled: it takes no more connections.
    retired: CancellationToken,
    /// Nobody has a seat any more.
    vacated: Arc<Notify>,
}

/// Where a connection is to be carried.
pub enum Place {
    /// In a tunnel of its own.
    Alone(Seat),
    /// In one that is there, or about to be.
    Shared(Port<AppSocket>, Seat),
    /// In one that is to be made, and then announced with [`Made`].
    New(Port<AppSocket>, Seat, Commands<AppSocket>, Made),
}

/// Counts a connection for as long as it is carried.
pub struct Seat {
    sharing: Sharing,
    key: Key,
    /// None if it is alone.
    tunnel: Option<u64>,
    /// The tunnel was there.
    established: bool,
}

/// A shared tunnel, for its task. It is forgotten when this is dropped.
pub struct Made {
    sharing: Sharing,
    key: Key,
    id: u64,
    retired: CancellationToken,
    vacated: Arc<Notify>,
}

impl Sharing {
    /// None yet. `processors` many tunnels of a pair keep all processors busy.
    #[must_use]
    pub fn new(processors: usize) -> Self {
        Self { pairs: Arc::default(), processors }
    }

    /// Finds a place for a connection of this pair.
    #[must_use]
    pub fn place(&self, key: &Key, proof: Proof) -> Place {
        let (now, time) = (Instant::now(), SystemTime::now());
        let mut pairs = self.pairs();
        if !pairs.contains_key(key) {
            pairs.insert(key.clone(), Pair::default());
        }
        let Some(pair) = pairs.get_mut(key) else { return Place::Alone(self.seat(key, None)) };
        let unshared = pair.unshared.is_some_and(|until| now < until);
        if pair.alone < ALONE || unshared {
            pair.alone += 1;
            return Place::Alone(self.seat(key, None));
        }
        let takes = |entry: &Entry| {
            let valid = entry.not_after.is_none_or(|not_after| time < not_after);
            entry.proof == proof && valid && !entry.retired.is_cancelled()
        };
        let takers = pair.tunnels.iter_mut().filter(|entry| takes(entry));
        let (mut count, mut chosen) = (0, None::<&mut Entry>);
        for entry in takers {
            count += 1;
            if chosen.as_ref().is_none_or(|chosen| entry.load < chosen.load) {
                chosen = Some(entry);
            }
        }
        let enough = if count < self.processors { FEW } else { MANY };
        if let Some(entry) = chosen.filter(|entry| entry.load < enough) {
            entry.load += 1;
            let seat = self.seat(key, Some(entry));
            return Place::Shared(entry.port.clone(), seat);
        }
        pair.last_id += 1;
        let id = pair.last_id;
        let (port, commands) = port();
        let (retired, vacated) = (CancellationToken::new(), Arc::<Notify>::default());
        pair.tunnels.push(Entry {
            id,
            proof,
            port: port.clone(),
            load: 1,
            not_after: None,
            retired: retired.clone(),
            vacated: Arc::clone(&vacated),
        });
        let seat = self.seat(key, pair.tunnels.last());
        let made = Made { sharing: self.clone(), key: key.clone(), id, retired, vacated };
        Place::New(port, seat, commands, made)
    }

    /// Has the tunnels for which `gone` is true take no more connections, and end after those that
    /// they have.
    pub fn retire(&self, mut gone: impl FnMut(&Key, Proof) -> bool) {
        for (key, pair) in &*self.pairs() {
            let gone = pair.tunnels.iter().filter(|entry| gone(key, entry.proof));
            gone.for_each(|entry| entry.retired.cancel());
        }
    }

    /// How many tunnels of such pairs there are, or are about to be.
    #[must_use]
    pub fn count(&self, counts: impl Fn(&Key) -> bool) -> usize {
        let pairs = self.pairs();
        pairs.iter().filter(|(key, _)| counts(key)).map(|(_, pair)| pair.tunnels.len()).sum()
    }

    fn seat(&self, key: &Key, tunnel: Option<&Entry>) -> Seat {
        let established = tunnel.is_some_and(|entry| entry.not_after.is_some());
        let tunnel = tunnel.map(|entry| entry.id);
        Seat { sharing: self.clone(), key: key.clone(), tunnel, established }
    }

    /// Changes what is known of a pair, and forgets it if nothing is left.
    fn change<R>(&self, key: &Key, change: impl FnOnce(&mut Pair) -> R) -> Option<R> {
        let mut pairs = self.pairs();
        let pair = pairs.get_mut(key)?;
        let result = change(pair);
        if pair.alone == 0 && pair.tunnels.is_empty() {
            pairs.remove(key);
        }
        Some(result)
    }

    fn pairs(&self) -> MutexGuard<'_, HashMap<Key, Pair>> {
        // Nothing is left half done by a panic.
        self.pairs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pair {
    fn entry(&mut self, id: u64) -> Option<&mut Entry> {
        self.tunnels.iter_mut().find(|entry| entry.id == id)
    }
}

impl Seat {
    /// The tunnel was lost before it was of any use. Whether to try again: it may have been dead for
    /// a while, or the peer knows no shared tunnels.
    pub fn try_again(&self) -> bool {
        let Self { sharing, key, tunnel, established } = self;
        let unshared = sharing.change(key, |pair| {
            if let Some(entry) = tunnel.and_then(|id| pair.entry(id)) {
                entry.retired.cancel();
            }
            pair.unshared.is_some()
        });
        *established || unshared.unwrap_or_default()
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let Self { sharing, key, tunnel, .. } = self;
        sharing.change(key, |pair| match tunnel {
            None => pair.alone -= 1,
            Some(id) => {
                if let Some(entry) = pair.entry(*id) {
                    entry.load -= 1;
                    if entry.load == 0 {
                        entry.vacated.notify_one();
                    }
                }
            }
        });
    }
}

impl Made {
    /// The handshake has succeeded.
    pub fn established(&self, not_after: SystemTime) {
        self.change(|pair, id| {
            if let Some(entry) = pair.entry(id) {
                entry.not_after = Some(not_after);
            }
        });
    }

    /// The peer knows only `nodemesh/1`.
    pub fn unshared(&self) {
        self.change(|pair, _| pair.unshared = Some(Instant::now() + UNSHARED));
    }

    /// It takes no more connections.
    pub fn retire(&self) {
        self.retired.cancel();
    }

    /// Returns when it takes no more connections.
    pub async fn retired(&self) {
        self.retired.cancelled().await;
    }

    /// Returns when the last seat is left, if it has been since the last time.
    pub async fn vacated(&self) {
        self.vacated.notified().await;
    }

    /// Whether there are more than the pair needs when it rests.
    pub fn is_surplus(&self) -> bool {
        let processors = self.sharing.processors;
        self.change(|pair, _| pair.tunnels.len() > processors).unwrap_or_default()
    }

    /// Gives it up if nobody has taken a seat meanwhile.
    pub fn leave(&self) -> bool {
        let left = self.change(|pair, id| {
            let before = pair.tunnels.len();
            pair.tunnels.retain(|entry| entry.id != id || entry.load > 0);
            pair.tunnels.len() < before
        });
        left.unwrap_or(true)
    }

    fn change<R>(&self, change: impl FnOnce(&mut Pair, u64) -> R) -> Option<R> {
        self.sharing.change(&self.key, |pair| change(pair, self.id))
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        self.change(|pair, id| pair.tunnels.retain(|entry| entry.id != id));
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    const PROOF: Proof = Proof { certificate: 1, bundle: 0, registration: 1 };

    fn key() -> Key {
        let destination = "192.0.2.1:80".parse().unwrap();
        Key { client: "pod".into(), source: "192.0.2.7".parse().unwrap(), destination }
    }

    fn later() -> SystemTime {
        SystemTime::now() + Duration::from_secs(3600)
    }

    /// Seats that are taken, and the tunnels that were made for them.
    #[derive(Default)]
    struct Taken {
        alone: Vec<Seat>,
        shared: Vec<Seat>,
        made: Vec<(Made, Commands<AppSocket>)>,
    }

    impl Taken {
        fn take(&mut self, sharing: &Sharing, proof: Proof, seats: usize) {
            for _ in 0..seats {
                match sharing.place(&key(), proof) {
                    Place::Alone(seat) => self.alone.push(seat),
                    Place::Shared(_, seat) => self.shared.push(seat),
                    Place::New(_, seat, commands, made) => {
                        made.established(later());
                        self.shared.push(seat);
                        self.made.push((made, commands));
                    }
                }
            }
        }

        fn counts(&self) -> (usize, usize, usize) {
            (self.alone.len(), self.shared.len(), self.made.len())
        }
    }

    #[test]
    fn the_first_few_are_alone_and_the_others_share_one_tunnel_per_processor_and_then_more() {
        let (sharing, mut taken) = (Sharing::new(2), Taken::default());
        for (seats, expected) in [
            (ALONE, (ALONE, 0, 0)),
            (FEW, (ALONE, FEW, 1)),
            (1, (ALONE, FEW + 1, 2)),
            (2 * MANY - FEW - 1, (ALONE, 2 * MANY, 2)),
            (MANY, (ALONE, 3 * MANY, 3)),
        ] {
            taken.take(&sharing, PROOF, seats);
            assert_eq!(taken.counts(), expected);
        }
        // Who leaves makes room, of either kind.
        taken.alone.pop();
        taken.shared.pop();
        taken.take(&sharing, PROOF, 2);
        assert_eq!(taken.counts(), (ALONE, 3 * MANY, 3));
        drop(taken);
        assert!(sharing.pairs().is_empty());
    }

    #[test]
    fn nobody_joins_what_rests_on_another_proof_or_is_retired_or_expires() {
        let (sharing, mut taken) = (Sharing::new(1), Taken::default());
        taken.take(&sharing, PROOF, ALONE + 1);
        taken.take(&sharing, Proof { certificate: 2, ..PROOF }, 1);
        assert_eq!(taken.made.len(), 2);
        sharing.retire(|_, proof| proof.certificate == 2);
        assert!(taken.made[1].0.retired.is_cancelled() && !taken.made[0].0.retired.is_cancelled());
        taken.take(&sharing, Proof { certificate: 2, ..PROOF }, 1);
        assert_eq!(taken.made.len(), 3);
        taken.made[0].0.established(SystemTime::now());
        taken.take(&sharing, PROOF, 1);
        assert_eq!(taken.made.len(), 4);
    }

    #[test]
    fn a_tunnel_is_left_when_nobody_has_a_seat() {
        let (sharing, mut taken) = (Sharing::new(1), Taken::default());
        taken.take(&sharing, PROOF, ALONE + 1);
        let vacated = |taken: &Taken| taken.made[0].0.vacated().now_or_never().is_some();
        assert!(!vacated(&taken) && !taken.made[0].0.leave());
        taken.shared.clear();
        assert!(vacated(&taken) && !vacated(&taken));
        assert!(!taken.made[0].0.is_surplus());
        assert!(taken.made[0].0.leave());
        taken.take(&sharing, PROOF, 1);
        assert_eq!(taken.made.len(), 2);
    }

    #[test]
    fn who_was_lost_tries_again_only_if_another_may_do_better() {
        let (sharing, mut taken) = (Sharing::new(1), Taken::default());
        taken.take(&sharing, PROOF, ALONE + 2);
        // It waited for a handshake that failed; it took a tunnel that was there.
        assert!(!taken.shared[0].try_again());
        assert!(taken.shared[1].try_again());
        // And nobody else gets the same one.
        taken.take(&sharing, PROOF, 1);
        assert_eq!(taken.made.len(), 2);
        // A peer that does not share.
        taken.made[1].0.unshared();
        assert!(taken.shared[2].try_again());
        taken.take(&sharing, PROOF, 5);
        assert_eq!(taken.counts(), (ALONE + 5, 3, 2));
    }
}
