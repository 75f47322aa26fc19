//! What one agent was sent, and what it is to be sent next: a pure state machine.

/// The state of one agent's stream.
#[derive(Clone, Copy, Debug)]
pub struct Feed {
    deltas: bool,
    /// The version that it was sent last, if nothing is to be sent before the next one.
    sent: Option<u64>,
    /// The version that it has, or will have when it has read what was sent.
    base: Option<u64>,
    /// Whether what was sent last was a difference.
    difference: bool,
}

impl Feed {
    /// Of an agent that was sent nothing yet. `deltas` is what it said of itself.
    pub const fn new(deltas: bool) -> Self {
        Self { deltas, sent: None, base: None, difference: false }
    }

    /// Whether this version, the present one, is to be sent.
    pub fn wants(&self, present: u64) -> bool {
        self.sent != Some(present)
    }

    /// To which version it can be told the difference. None: it needs the whole snapshot.
    pub const fn base(&self) -> Option<u64> {
        self.base
    }

    /// Notes what it was sent.
    pub fn sent(&mut self, version: u64, difference: bool) {
        self.sent = Some(version);
        self.base = Some(version).filter(|_| self.deltas);
        self.difference = difference;
    }

    /// Notes that it could not use a version. What it has is not known any more. The whole
    /// snapshot may help where a difference did not, at once; where the whole one did not, only
    /// another can.
    pub fn refused(&mut self, version: u64) {
        if self.difference {
            (self.sent, self.base, self.difference) = (None, None, false);
        } else if self.sent == Some(version) {
            self.base = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_the_whole_snapshot_come_differences() {
        let mut feed = Feed::new(true);
        assert!(feed.wants(7) && feed.base().is_none());
        feed.sent(7, false);
        assert!(!feed.wants(7) && feed.wants(9));
        assert_eq!(feed.base(), Some(7));
        feed.sent(9, true);
        assert_eq!(feed.base(), Some(9));
    }

    #[test]
    fn an_agent_that_knows_no_differences_gets_none() {
        let mut feed = Feed::new(false);
        feed.sent(7, false);
        assert!(!feed.wants(7) && feed.wants(8) && feed.base().is_none());
    }

    #[test]
    fn a_difference_that_was_refused_is_followed_by_the_whole_at_once() {
        let mut feed = Feed::new(true);
        feed.sent(7, false);
        feed.sent(8, true);
        feed.sent(9, true);
        feed.refused(8);
        assert!(feed.wants(9) && feed.base().is_none());
        feed.sent(9, false);
        // The difference to 9 was on its way, too.
        feed.refused(9);
        assert!(!feed.wants(9) && feed.wants(10) && feed.base().is_none());
    }

    #[test]
    fn a_whole_snapshot_that_was_refused_is_not_sent_again() {
        let mut feed = Feed::new(true);
        feed.sent(7, false);
        feed.refused(7);
        assert!(!feed.wants(7) && feed.wants(8) && feed.base().is_none());
        feed.sent(8, false);
        feed.refused(7);
        assert_eq!(feed.base(), Some(8), "a late answer says nothing of what was sent since");
    }
}
