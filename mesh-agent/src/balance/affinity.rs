//! Which client keeps which endpoint (`sessionAffinity: ClientIP`).

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

/// Clients are pods of this node, so this is far more than there are. Beyond it clients keep
/// nothing, which costs them nothing but their affinity.
const MOST: usize = 65_536;

/// How often a full table is searched for what has expired.
const SEARCH_INTERVAL: Duration = Duration::from_secs(1);

/// Who keeps what, until when.
#[derive(Debug, Default)]
pub(super) struct Affinity {
    kept: HashMap<(IpAddr, Arc<str>), Kept>,
    searched: Option<Instant>,
}

#[derive(Debug)]
struct Kept {
    endpoint: SocketAddr,
    until: Instant,
}

impl Affinity {
    /// The endpoint that a client keeps for a port of a service.
    pub(super) fn get(&self, client: IpAddr, port: &Arc<str>, now: Instant) -> Option<SocketAddr> {
        let kept = self.kept.get(&(client, Arc::clone(port)))?;
        (now < kept.until).then_some(kept.endpoint)
    }

    /// From now on for `span` the client keeps this one.
    pub(super) fn set(
        &mut self,
        client: IpAddr,
        port: &Arc<str>,
        endpoint: SocketAddr,
        now: Instant,
        span: Duration,
    ) {
        let key = (client, Arc::clone(port));
        if self.kept.len() >= MOST && !self.kept.contains_key(&key) {
            let due = self.searched.is_none_or(|at| now.duration_since(at) >= SEARCH_INTERVAL);
            if due {
                self.searched = Some(now);
                self.kept.retain(|_, kept| now < kept.until);
            }
            if self.kept.len() >= MOST {
                return;
            }
        }
        self.kept.insert(key, Kept { endpoint, until: now + span });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENDPOINT: SocketAddr =
        SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1)), 80);

    fn client(number: usize) -> IpAddr {
        u32::try_from(number).unwrap().to_be_bytes().into()
    }

    #[test]
    fn it_expires_and_is_bounded() {
        let (mut affinity, start) = (Affinity::default(), Instant::now());
        let (port, span) = (Arc::from("shop/cart:80"), Duration::from_secs(10));
        for number in 0..=MOST {
            affinity.set(client(number), &port, ENDPOINT, start, span);
        }
        assert_eq!(affinity.kept.len(), MOST);
        assert_eq!(affinity.get(client(MOST), &port, start), None, "there was no room");
        assert_eq!(affinity.get(client(0), &port, start), Some(ENDPOINT));
        assert_eq!(affinity.get(client(0), &Arc::from("shop/cart:81"), start), None);
        // Whoever is in may stay, and the rest goes when there is need.
        let later = start + Duration::from_secs(9);
        affinity.set(client(0), &port, ENDPOINT, later, span);
        let end = start + span;
        assert_eq!(affinity.get(client(1), &port, end), None);
        affinity.set(client(MOST), &port, ENDPOINT, end, span);
        assert_eq!(affinity.kept.len(), 2);
        assert_eq!(affinity.get(client(0), &port, end), Some(ENDPOINT));
    }
}
