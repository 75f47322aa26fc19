//! Peers that have not proven yet who they are: how many connections they may have, and how many
//! handshakes. One peer that never finishes its own does not keep out the others.

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

/// The unproven connections of one pod.
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

    /// Counts a connection of a peer until the place is dropped; none if it has too many.
    pub(super) fn enter(&self, address: IpAddr) -> Option<Place<'_>> {
        let mut peers = self.peers();
        let share = (self.limit / PEER_SHARE).max(1);
        let new = || Peer { handshakes: Arc::new(Semaphore::new(share)), connections: 0 };
        let peer = peers.entry(address).or_insert_with(new);
        if peer.connections >= self.limit * WAITING {
            return None;
        }
        peer.connections += 1;
        Some(Place { admission: self, address, handshakes: Arc::clone(&peer.handshakes) })
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
}

impl Place<'_> {
    /// Waits until a handshake may begin. It is over when the turn is dropped.
    pub(super) async fn turn(&self) -> Result<Turn<'_>, AcquireError> {
        let of_peer = self.handshakes.acquire().await?;
        let of_all = self.admission.handshakes.acquire().await?;
        Ok(Turn { _of_peer: of_peer, _of_all: of_all })
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

/// A handshake in flight.
#[derive(Debug)]
pub(super) struct Turn<'a> {
    _of_peer: SemaphorePermit<'a>,
    _of_all: SemaphorePermit<'a>,
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
        let places: Vec<_> = (0..8).map(|_| admission.enter(ONE).unwrap()).collect();
        let turns: Vec<_> = places.iter().filter_map(|p| p.turn().now_or_never()).collect();
        assert_eq!(turns.len(), 2);
        let other = admission.enter(OTHER).unwrap();
        assert!(other.turn().now_or_never().is_some());
        let mut waiting = pin!(places[7].turn());
        assert!(waiting.as_mut().now_or_never().is_none());
        drop(turns);
        assert!(waiting.now_or_never().is_some());
    }

    #[test]
    fn a_peer_has_a_limit_and_leaves_nothing_behind() {
        let admission = Admission::new(2);
        let places: Vec<_> = std::iter::from_fn(|| admission.enter(ONE)).collect();
        assert_eq!(places.len(), 8);
        assert!(admission.enter(OTHER).is_some());
        drop(places);
        assert!(admission.peers().is_empty());
        assert!(admission.enter(ONE).is_some());
    }
}
