//! How much of a connection may be under way in a shared tunnel: its share of the memory of the
//! other agent, for an application there that does not read.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::tunnel::frame::Malformed;

/// What either side may send before it is granted more, in bytes.
const FIRST: u32 = 64 << 10;
/// What it may at most have under way, in bytes: what a 10 Gbit/s path of 0.8 ms holds.
const MOST: u32 = 1 << 20;
/// What all windows of an agent may have grown by, in units of [`FIRST`]: 64 MiB.
const GROWTH: usize = 1024;

/// What the windows of an agent may still grow by.
#[derive(Clone, Debug)]
pub struct Growth(Arc<Semaphore>);

impl Default for Growth {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(GROWTH)))
    }
}

#[cfg(test)]
impl Growth {
    /// By how much windows have grown, in units of [`FIRST`].
    pub(in crate::tunnel) fn used(&self) -> usize {
        GROWTH - self.0.available_permits()
    }
}

/// What this agent may still send.
#[derive(Debug)]
pub(super) struct Credit(u32);

impl Default for Credit {
    fn default() -> Self {
        Self(FIRST)
    }
}

impl Credit {
    pub(super) fn left(&self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }

    /// Takes so much; true if that was all.
    pub(super) fn spend(&mut self, bytes: usize) -> bool {
        self.0 = self.0.saturating_sub(u32::try_from(bytes).unwrap_or(u32::MAX));
        self.0 == 0
    }

    pub(super) fn grant(&mut self, bytes: u32) -> Result<(), Malformed> {
        self.0 = self.0.checked_add(bytes).ok_or(Malformed::Overflow)?;
        Ok(())
    }
}

/// What the other agent may still send.
#[derive(Debug)]
pub(super) struct Window {
    size: u32,
    /// What it may still send, as far as it knows.
    left: u32,
    /// What it may send besides, and is not told yet.
    owed: u32,
    /// It has nothing left, and more to say.
    blocked: bool,
    grown: Option<OwnedSemaphorePermit>,
}

impl Default for Window {
    fn default() -> Self {
        Self { size: FIRST, left: FIRST, owed: 0, blocked: false, grown: None }
    }
}

impl Window {
    /// It sends so much.
    pub(super) fn receive(&mut self, bytes: u32) -> Result<(), Malformed> {
        self.left = self.left.checked_sub(bytes).ok_or(Malformed::Window)?;
        Ok(())
    }

    /// It would send more if it might.
    pub(super) const fn blocked(&mut self) {
        self.blocked = true;
    }

    /// The application has taken so much, and perhaps `all` there was: then only the window holds
    /// the other agent up, and doubles.
    pub(super) fn deliver(&mut self, bytes: usize, all: bool, growth: &Growth) {
        self.owed += u32::try_from(bytes).unwrap_or(u32::MAX);
        if self.blocked && all && self.size < MOST {
            self.blocked = false;
            if let Ok(more) = Arc::clone(&growth.0).try_acquire_many_owned(self.size / FIRST) {
                match &mut self.grown {
                    Some(grown) => grown.merge(more),
                    None => self.grown = Some(more),
                }
                self.owed += self.size;
                self.size *= 2;
            }
        }
    }

    /// What it is to be granted now: not every crumb.
    pub(super) fn owed(&mut self) -> Option<u32> {
        if self.owed < self.size / 2 {
            return None;
        }
        let owed = std::mem::take(&mut self.owed);
        self.left += owed;
        Some(owed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_application_takes_is_granted_again_and_no_more() {
        let growth = Growth::default();
        let (mut credit, mut window) = (Credit::default(), Window::default());
        for _ in 0..100 {
            let bytes = credit.left().min(10_000);
            assert!(!credit.spend(bytes));
            window.receive(u32::try_from(bytes).unwrap()).unwrap();
            window.deliver(bytes, true, &growth);
            if let Some(more) = window.owed() {
                credit.grant(more).unwrap();
            }
            assert!(credit.left() > 20_000);
        }
        assert_eq!(window.size, FIRST);
        window.receive(window.left).unwrap();
        assert_eq!(window.receive(1), Err(Malformed::Window));
        assert_eq!(credit.grant(u32::MAX), Err(Malformed::Overflow));
    }

    #[test]
    fn a_window_grows_for_who_fills_it_and_only_for_an_application_that_reads() {
        let growth = Growth::default();
        let mut window = Window::default();
        for _ in 0..10 {
            window.blocked();
            window.deliver(0, false, &growth);
        }
        assert_eq!(window.size, FIRST);
        for _ in 0..10 {
            window.blocked();
            window.deliver(1, true, &growth);
        }
        assert_eq!(window.size, MOST);
        assert_eq!(window.owed(), Some(MOST - FIRST + 10));
        let taken = usize::try_from((MOST - FIRST) / FIRST).unwrap();
        assert_eq!(growth.0.available_permits(), GROWTH - taken);
        drop(window);
        assert_eq!(growth.0.available_permits(), GROWTH);
    }

    #[test]
    fn when_there_is_no_memory_left_windows_stay_as_they_are() {
        let growth = Growth(Arc::new(Semaphore::new(2)));
        let mut windows = [Window::default(), Window::default(), Window::default()];
        for window in &mut windows {
            window.blocked();
            window.deliver(0, true, &growth);
        }
        assert_eq!(windows.map(|window| window.size / FIRST), [2, 2, 1]);
    }
}
