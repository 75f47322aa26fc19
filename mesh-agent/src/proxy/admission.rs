//! Peers that have not proven yet who they are: how many connections they may have, and how many
//! handshakes. One peer that never finishes its own does not keep out the others. The dialling side
//! keeps to the same shares, so that a burst of it waits at home and not at its peer's door.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::{AcquireError, Semaphore, SemaphorePermit};

/// Of the handshakes in flight, one peer may have this part.
const PEER_SHARE: usize = 4;

/// Connections of one peer that wait for their handshake, as a multiple of all handshakes.
const WAITING: usize = 4;

/// The unproven connections of one pod, in one direction.
#[derive(Debug)]
pub(crate) struct Admission {
    handshakes: Semaphore,
    limit: usize,
    peers: Mutex<HashMap<IpAddr, Peer>>,
}

#[derive(Debug)]
struct Peer {
    handshakes: Arc<Semaphore>,
    connections: usize,
}

impl Admission {
    /// At most `limit` handshakes in flight, at least one.
    pub(crate) fn new(limit: usize) -> Self {
        Self { handshakes: Semaphore::new(limit), limit, peers: Mutex::default() }
    }

    /// Counts a connection with a peer until the place is dropped.
    pub(super) fn enter(&self, address: IpAddr) -> Place<'_> {
        let mut peers = self.peers();
        let share = (self.limit / PEER_SHARE).max(1);
        let new = || Peer { handshakes: Arc::new(Semaphore::new(share)), connections: 0 };
        let peer = peers.entry(address).or_insert_with(new);
        peer.connections += 1;
        let crowded = peer.connections > self.limit * WAITING;
        Place { admission: self, address, handshakes: Arc::clone(&peer.handshakes), crowded }
    }

    fn peers(&self) -> MutexGuard<'_, HashMap<IpAddr, Peer>> {
        // Nothing is left half done by a panic.
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection whose peer is unproven.
#[derive(Debug)]
pub(super) struct Place<'a> {
    admission: &'a Admission,
    address: IpAddr,
    handshakes: Arc<Semaphore>,
    crowded: bool,
}

impl Place<'_> {
    /// Whether the peer has more connections than it should make another agent keep.
    pub(super) fn is_crowded(&self) -> bool {
        self.crowded
    }

    /// Waits until this is one of the peer's handshakes, until the permit is dropped.
    pub(super) async fn share(&self) -> Result<SemaphorePermit<'_>, AcquireError> {
        self.handshakes.acquire().await
    }

    /// Waits until it is one of the pod's as well. Only who has a share asks, or one peer's would
    /// fill the queue.
    pub(super) async fn turn(&self) -> Result<SemaphorePermit<'_>, AcquireError> {
        self.admission.handshakes.acquire().await
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut peers = self.admission.peers();
        if let Some(peer) = peers.get_mut(&self.address) {
            peer.connections -= 1;
            if peer.connections == 0 {
                peers.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use futures::FutureExt as _;

    use super::*;

    const ONE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));
    const OTHER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2));

    #[test]
    fn one_peer_cannot_take_every_turn() {
        let admission = Admission::new(8);
        let places: Vec<_> = (0..8).map(|_| admission.enter(ONE)).collect();
        let shares: Vec<_> = places.iter().filter_map(|p| p.share().now_or_never()).collect();
        assert_eq!(shares.len(), 2);
        let turns: Vec<_> = shares.iter().map(|_| places[0].turn().now_or_never()).collect();
        assert!(turns.iter().all(Option::is_some));
        let other = admission.enter(OTHER);
        assert!(other.share().now_or_never().is_some());
        assert!(other.turn().now_or_never().is_some());
        let mut waiting = pin!(places[7].share());
        assert!(waiting.as_mut().now_or_never().is_none());
        drop(shares);
        assert!(waiting.now_or_never().is_some());
    }

    #[test]
    fn a_peer_has_a_limit_and_leaves_nothing_behind() {
        let admission = Admission::new(2);
        let places: Vec<_> = (0..8).map(|_| admission.enter(ONE)).collect();
        assert!(!places.iter().any(Place::is_crowded));
        assert!(admission.enter(ONE).is_crowded());
        assert!(!admission.enter(OTHER).is_crowded());
        drop(places);
        assert!(admission.peers().is_empty());
        assert!(!admission.enter(ONE).is_crowded());
    }
}
