//! The agents that are connected, and how far each has come.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use tokio_util::sync::CancellationToken;

use crate::status::PodState;

/// An agent with an open stream of snapshots.
#[derive(Clone, Debug)]
pub struct Session {
    /// Where it connects from.
    pub address: SocketAddr,
    /// Its version.
    pub agent_version: String,
    /// Since when.
    pub connected: SystemTime,
    /// When the certificate ends that it shows.
    pub certificate_not_after: SystemTime,
    /// The newest snapshot sent, and when.
    pub sent: Option<(u64, SystemTime)>,
    /// The newest snapshot that it uses.
    pub acknowledged: Option<u64>,
    /// The newest snapshot that it could not use, and why.
    pub refused: Option<(u64, String)>,
    /// Its pods, by UID, if it tells of them.
    pub pods: Option<BTreeMap<String, PodState>>,
    end: CancellationToken,
}

impl Session {
    /// A new one, which ends when the token is cancelled.
    pub fn new(
        address: SocketAddr,
        agent_version: String,
        connected: SystemTime,
        certificate_not_after: SystemTime,
        end: CancellationToken,
    ) -> Self {
        Self {
            address,
            agent_version,
            connected,
            certificate_not_after,
            sent: None,
            acknowledged: None,
            refused: None,
            pods: None,
            end,
        }
    }
}

/// All sessions, one for each node.
#[derive(Debug, Default)]
pub struct Sessions(Mutex<BTreeMap<String, (u64, Session)>>);

impl Sessions {
    /// Opens a session. One that the node has open already is ended: an agent that has lost its
    /// connection need not wait until the server notices.
    pub fn open(&self, node: &str, session: Session) -> Handle<'_> {
        let mut sessions = self.lock();
        let id = sessions.get(node).map_or(0, |(id, _)| id + 1);
        if let Some((_, replaced)) = sessions.insert(node.to_owned(), (id, session)) {
            replaced.end.cancel();
        }
        Handle { sessions: self, node: node.to_owned(), id }
    }

    /// Every session, by node.
    pub fn list(&self) -> Vec<(String, Session)> {
        self.lock().iter().map(|(node, (_, session))| (node.clone(), session.clone())).collect()
    }

    /// Ends the session of a node.
    pub fn end(&self, node: &str) {
        if let Some((_, session)) = self.lock().get(node) {
            session.end.cancel();
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, (u64, Session)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The open session of a stream: closed when dropped, unless another has taken its place.
#[derive(Debug)]
pub struct Handle<'a> {
    sessions: &'a Sessions,
    node: String,
    id: u64,
}

impl Handle<'_> {
    /// Notes what has become of a snapshot.
    pub fn update(&self, change: impl FnOnce(&mut Session)) {
        if let Some((id, session)) = self.sessions.lock().get_mut(&self.node)
            && *id == self.id
        {
            change(session);
        }
    }
}

impl Drop for Handle<'_> {
    fn drop(&mut self) {
        let mut sessions = self.sessions.lock();
        if sessions.get(&self.node).is_some_and(|(id, _)| *id == self.id) {
            sessions.remove(&self.node);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(version: &str) -> (Session, CancellationToken) {
        let end = CancellationToken::new();
        let address = "192.0.2.1:1".parse().unwrap();
        let time = SystemTime::UNIX_EPOCH;
        let session = Session::new(address, version.to_owned(), time, time, end.clone());
        (session, end)
    }

    #[test]
    fn the_newer_stream_replaces_the_older() {
        let sessions = Sessions::default();
        let (old, old_end) = session("old");
        let (new, new_end) = session("new");
        let old = sessions.open("n1", old);
        let new = sessions.open("n1", new);
        assert!(old_end.is_cancelled() && !new_end.is_cancelled());
        old.update(|session| session.acknowledged = Some(9));
        drop(old);
        let list = sessions.list();
        assert_eq!((list.len(), list[0].1.acknowledged), (1, None));
        assert_eq!(list[0].1.agent_version, "new");
        drop(new);
        assert!(sessions.list().is_empty());
    }

    #[test]
    fn nodes_do_not_replace_each_other() {
        let sessions = Sessions::default();
        let (a, a_end) = session("a");
        let (b, _) = session("b");
        let _a = sessions.open("n1", a);
        let _b = sessions.open("n2", b);
        assert!(!a_end.is_cancelled());
        sessions.end("n1");
        assert!(a_end.is_cancelled());
    }
}
