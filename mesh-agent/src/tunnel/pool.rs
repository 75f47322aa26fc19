//! A client's idle tunnels, kept for the next connection of the same pair.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, SocketAddr},
    pin::{Pin, pin},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    task::{Context, Poll, Wake, Waker},
    time::{Duration, SystemTime},
};

use tokio::{
    sync::{Notify, watch},
    task::coop,
    time::{Instant, sleep_until},
};

use super::relay::Transport;

/// What a tunnel connects. The source is the address the client's application has, since a pod may
/// have several and the server checks it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// The UID of the client's pod.
    pub client: Arc<str>,
    /// The address the tunnel was dialled from.
    pub source: IpAddr,
    /// The original destination it was dialled to.
    pub destination: SocketAddr,
}

/// What a tunnel's authentication rested on. A tunnel serves another connection only while all of
/// it still holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Proof {
    /// The generation of the client pod's certificate.
    pub certificate: u64,
    /// The version of the trust bundle.
    pub bundle: u64,
    /// The version of the destination's entry in the registry.
    pub registration: u64,
}

/// A tunnel, with what it connects and what that rests on. It keeps both for life: a tunnel does
/// not become newer by being used.
#[derive(Debug)]
pub struct Tunnel<T> {
    /// What it connects.
    pub key: Key,
    /// What it was authenticated under.
    pub proof: Proof,
    /// When it was made.
    pub made: Instant,
    /// When the first of the two certificates expires.
    pub not_after: SystemTime,
    /// The TLS stream.
    pub stream: T,
}

/// Bounds of a [`Pool`].
#[derive(Clone, Copy, Debug)]
pub struct PoolLimits {
    /// Idle tunnels for one [`Key`]; the one made last gives way.
    pub per_key: usize,
    /// Idle tunnels in all; the one that has been idle longest gives way.
    pub total: usize,
    /// How long a tunnel may be idle.
    pub idle: Duration,
}

impl Default for PoolLimits {
    fn default() -> Self {
        Self { per_key: 64, total: 4096, idle: Duration::from_secs(60) }
    }
}

/// Idle tunnels, most recently used first. Clones share it.
///
/// A tunnel that its server closes, or that says GOAWAY, wakes a task of the pool and is dropped at
/// once: no polling, and no socket left in CLOSE_WAIT. That task ends with the last clone.
#[derive(Debug)]
pub struct Pool<T>(Arc<Shared<T>>);

impl<T> Clone for Pool<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

#[derive(Debug)]
struct Shared<T> {
    limits: PoolLimits,
    idle: Mutex<Idle<T>>,
    alarm: Arc<Alarm>,
    ended: watch::Sender<()>,
}

#[derive(Debug)]
struct Idle<T> {
    /// Per key, the most recently used last.
    tunnels: HashMap<Key, Vec<Entry<T>>>,
    /// In the order in which they became idle, hence in that of their ids.
    by_age: BTreeMap<u64, Key>,
    next_id: u64,
}

#[derive(Debug)]
struct Entry<T> {
    id: u64,
    since: Instant,
    tunnel: Tunnel<T>,
}

/// Says which idle tunnels have something to read. Apart from the pool's lock, because a waker may
/// be called while that is held.
#[derive(Debug, Default)]
struct Alarm {
    woken: Mutex<Vec<u64>>,
    notify: Notify,
}

struct EntryWaker {
    id: u64,
    alarm: Arc<Alarm>,
}

impl Wake for EntryWaker {
    fn wake(self: Arc<Self>) {
        lock(&self.alarm.woken).push(self.id);
        self.alarm.notify.notify_one();
    }
}

/// A panic elsewhere leaves nothing half done under these locks.
fn lock<V>(mutex: &Mutex<V>) -> MutexGuard<'_, V> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether an idle tunnel is still idle. Anything there to read is its end: closed, broken, GOAWAY,
/// or a server that speaks out of turn.
fn is_quiet<T: Transport>(stream: &mut T, cx: &mut Context<'_>) -> bool {
    // Out of the task's budget, a socket says "pending" without having looked.
    let look = std::future::poll_fn(|cx| Pin::new(&mut *stream).poll_fill_buf(cx).map(|_| ()));
    pin!(coop::unconstrained(look)).poll(cx) == Poll::Pending
}

impl<T: Transport + Send + 'static> Pool<T> {
    /// An empty pool, and its task on the current runtime.
    #[must_use]
    pub fn new(limits: PoolLimits) -> Self {
        let idle = Idle { tunnels: HashMap::new(), by_age: BTreeMap::new(), next_id: 0 };
        let alarm = Arc::<Alarm>::default();
        let (idle, ended) = (Mutex::new(idle), watch::channel(()).0);
        let shared = Arc::new(Shared { limits, idle, alarm: Arc::clone(&alarm), ended });
        tokio::spawn(keep(Arc::downgrade(&shared), alarm, limits.idle));
        Self(shared)
    }

    /// A live tunnel for `key` that was authenticated under exactly `proof`, if there is one.
    /// Those of another proof are dropped on the way.
    #[must_use]
    pub fn take(&self, key: &Key, proof: Proof) -> Option<Tunnel<T>> {
        loop {
            // Closed after the lock is released.
            let mut stale = Vec::new();
            let mut entry = lock(&self.0.idle).pop(key, proof, &mut stale)?;
            if is_quiet(&mut entry.tunnel.stream, &mut Context::from_waker(Waker::noop())) {
                return Some(entry.tunnel);
            }
        }
    }

    /// Whether it keeps tunnels at all.
    #[must_use]
    pub fn keeps_any(&self) -> bool {
        self.0.limits.per_key > 0
    }

    /// Changes whenever servers have ended idle tunnels.
    #[must_use]
    pub fn ended(&self) -> watch::Receiver<()> {
        self.0.ended.subscribe()
    }

    /// Whether there is a tunnel that [`Self::take`] would give, unless it ends meanwhile.
    #[must_use]
    pub fn has(&self, key: &Key, proof: Proof) -> bool {
        let now = SystemTime::now();
        let idle = lock(&self.0.idle);
        let good = |entry: &Entry<T>| entry.tunnel.proof == proof && now < entry.tunnel.not_after;
        idle.tunnels.get(key).is_some_and(|entries| entries.iter().any(good))
    }

    /// Keeps an idle tunnel, if it still is one and there is room for it. Of a key that has enough,
    /// the one made last gives way to one that is as good: what was allocated one after the other
    /// stays, and tunnels kept from here and there do not hold the memory between them.
    pub fn put(&self, mut tunnel: Tunnel<T>) {
        let Shared { limits, idle, alarm, .. } = &*self.0;
        let mut evicted = None;
        let mut idle = lock(idle);
        let id = idle.next_id;
        idle.next_id += 1;
        let waker = Waker::from(Arc::new(EntryWaker { id, alarm: Arc::clone(alarm) }));
        let kept = idle.tunnels.get(&tunnel.key).map_or(0, Vec::len);
        let (full, crowded) = (kept >= limits.per_key, idle.by_age.len() >= limits.total);
        let gives_way = match (full, crowded) {
            (true, _) => idle.made_after(&tunnel),
            (false, true) => idle.oldest(),
            (false, false) => None,
        };
        let has_room = !full || gives_way.is_some();
        if has_room && is_quiet(&mut tunnel.stream, &mut Context::from_waker(&waker)) {
            evicted = gives_way.and_then(|id| idle.remove(id));
            idle.by_age.insert(id, tunnel.key.clone());
            let entries = idle.tunnels.entry(tunnel.key.clone()).or_default();
            entries.push(Entry { id, since: Instant::now(), tunnel });
        }
        drop(idle);
        drop(evicted);
    }

    /// Drops every idle tunnel for which `gone` is true. Returns how many.
    pub fn purge(&self, mut gone: impl FnMut(&Key, Proof) -> bool) -> usize {
        let mut idle = lock(&self.0.idle);
        let Idle { tunnels, by_age, .. } = &mut *idle;
        let mut dropped = Vec::new();
        tunnels.retain(|key, entries| {
            dropped.extend(entries.extract_if(.., |entry| gone(key, entry.tunnel.proof)));
            !entries.is_empty()
        });
        for entry in &dropped {
            by_age.remove(&entry.id);
        }
        drop(idle);
        dropped.len()
    }

    /// How many idle tunnels there are of the keys for which `counts` is true.
    pub fn count(&self, counts: impl Fn(&Key) -> bool) -> usize {
        let idle = lock(&self.0.idle);
        idle.tunnels.iter().filter(|(key, _)| counts(key)).map(|(_, entries)| entries.len()).sum()
    }

    /// How many tunnels are idle.
    #[must_use]
    pub fn len(&self) -> usize {
        lock(&self.0.idle).by_age.len()
    }

    /// Whether no tunnel is idle.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<T> Idle<T> {
    /// The most recently used tunnel that `proof` still covers; the others go to `stale`.
    fn pop(&mut self, key: &Key, proof: Proof, stale: &mut Vec<Entry<T>>) -> Option<Entry<T>> {
        let now = SystemTime::now();
        let entries = self.tunnels.get_mut(key)?;
        let mut found = None;
        while let Some(entry) = entries.pop() {
            self.by_age.remove(&entry.id);
            if entry.tunnel.proof == proof && now < entry.tunnel.not_after {
                found = Some(entry);
                break;
            }
            stale.push(entry);
        }
        if entries.is_empty() {
            self.tunnels.remove(key);
        }
        found
    }

    fn remove(&mut self, id: u64) -> Option<Entry<T>> {
        let key = self.by_age.remove(&id)?;
        let entries = self.tunnels.get_mut(&key)?;
        let at = entries.iter().position(|entry| entry.id == id)?;
        let entry = entries.remove(at);
        if entries.is_empty() {
            self.tunnels.remove(&key);
        }
        Some(entry)
    }

    /// Of the same key, the tunnel made last, if this one was made before it and is good for as long.
    fn made_after(&self, tunnel: &Tunnel<T>) -> Option<u64> {
        let last = self.tunnels.get(&tunnel.key)?.iter().max_by_key(|entry| entry.tunnel.made)?;
        let Tunnel { proof, made, not_after, .. } = &last.tunnel;
        let as_good = tunnel.proof == *proof && tunnel.not_after >= *not_after;
        (tunnel.made < *made && as_good).then_some(last.id)
    }

    fn oldest(&self) -> Option<u64> {
        self.by_age.first_key_value().map(|(id, _)| *id)
    }

    fn entry_mut(&mut self, id: u64) -> Option<&mut Entry<T>> {
        let key = self.by_age.get(&id)?;
        self.tunnels.get_mut(key)?.iter_mut().find(|entry| entry.id == id)
    }
}

/// Drops tunnels that are no longer quiet, or have been idle for too long.
async fn keep<T: Transport>(pool: Weak<Shared<T>>, alarm: Arc<Alarm>, limit: Duration) {
    let mut wake_at = Instant::now() + limit;
    loop {
        tokio::select! {
            () = alarm.notify.notified() => {}
            () = sleep_until(wake_at) => {}
        }
        let Some(shared) = pool.upgrade() else { return };
        let woken = std::mem::take(&mut *lock(&alarm.woken));
        let mut dropped = Vec::new();
        let mut idle = lock(&shared.idle);
        for id in woken {
            let waker = Waker::from(Arc::new(EntryWaker { id, alarm: Arc::clone(&alarm) }));
            let ended = idle
                .entry_mut(id)
                .is_some_and(|e| !is_quiet(&mut e.tunnel.stream, &mut Context::from_waker(&waker)));
            if ended {
                dropped.extend(idle.remove(id));
            }
        }
        if !dropped.is_empty() {
            shared.ended.send_replace(());
        }
        let now = Instant::now();
        wake_at = now + limit;
        while let Some(oldest) = idle.oldest() {
            let since = idle.entry_mut(oldest).map_or(now, |entry| entry.since);
            if since + limit > now {
                wake_at = since + limit;
                break;
            }
            dropped.extend(idle.remove(oldest));
        }
    }
}

impl<T> Drop for Shared<T> {
    fn drop(&mut self) {
        self.alarm.notify.notify_one();
    }
}

#[cfg(test)]
mod tests;
