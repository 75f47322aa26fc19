//! Buffers that exist while bytes move.

use std::cell::RefCell;

use super::frame::{MAX_CONTROL, MAX_FRAME};

/// The size of every buffer, in bytes: four full records, and some control frames.
pub const CAPACITY: usize = 4 * MAX_FRAME + 2 * MAX_CONTROL;

/// Buffers that each worker thread keeps when nobody uses them.
const SPARE: usize = 4;
thread_local! {
    static SPARES: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

/// Bytes on their way. It has room for [`CAPACITY`] only while there are any or some are expected:
/// mostly for the length of a poll. Only who is left with bytes that nobody takes keeps it for
/// longer, so idle connections hold none.
#[derive(Debug, Default)]
pub struct Buffer {
    /// All of it is initialised, so that several pieces can be read into at once.
    room: Box<[u8]>,
    taken: usize,
    filled: usize,
}

impl Buffer {
    /// What is there, not yet taken.
    pub fn bytes(&self) -> &[u8] {
        self.room.get(self.taken..self.filled).unwrap_or_default()
    }

    /// The same, to be changed in place.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.room.get_mut(self.taken..self.filled).unwrap_or_default()
    }

    /// Whether everything was taken.
    pub const fn is_empty(&self) -> bool {
        self.taken == self.filled
    }

    /// The room behind what is there. If nothing comes of it, say so with `take(0)`.
    pub fn room(&mut self) -> &mut [u8] {
        if self.room.is_empty() {
            let spare = SPARES.with_borrow_mut(Vec::pop);
            self.room = spare.unwrap_or_else(|| vec![0; CAPACITY].into_boxed_slice());
        }
        self.room.get_mut(self.filled..).unwrap_or_default()
    }

    /// The same, and the room of what was taken as well.
    pub fn all_room(&mut self) -> &mut [u8] {
        self.room.copy_within(self.taken..self.filled, 0);
        self.filled -= std::mem::take(&mut self.taken);
        self.room()
    }

    /// So many bytes of the room hold something now.
    pub fn fill(&mut self, bytes: usize) {
        self.filled = self.room.len().min(self.filled + bytes);
    }

    /// Takes bytes from the front. With the last one the room goes, too.
    pub fn take(&mut self, bytes: usize) {
        self.taken = self.filled.min(self.taken + bytes);
        if self.is_empty() {
            (self.taken, self.filled) = (0, 0);
            let room = std::mem::take(&mut self.room);
            SPARES.with_borrow_mut(|spares| {
                if !room.is_empty() && spares.len() < SPARE {
                    spares.push(room);
                }
            });
        }
    }

    /// Whether it has any room now.
    #[cfg(test)]
    pub fn is_lent(&self) -> bool {
        !self.room.is_empty()
    }

    /// Puts bytes behind what is there: control frames, for which every buffer has room.
    pub fn append(&mut self, bytes: &[u8]) {
        let room = self.room().get_mut(..bytes.len());
        debug_assert!(room.is_some(), "no room for a control frame");
        room.unwrap_or_default().copy_from_slice(bytes);
        self.fill(bytes.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_keeps_few_buffers() {
        let mut lent: Vec<_> = (0..SPARE + 3).map(|_| Buffer::default()).collect();
        for buffer in &mut lent {
            assert_eq!(buffer.room().len(), CAPACITY);
        }
        lent.iter_mut().for_each(|buffer| buffer.take(0));
        Buffer::default().take(0);
        let kept =
            SPARES.with_borrow(|spares| spares.iter().map(|room| room.len()).collect::<Vec<_>>());
        assert_eq!(kept, [CAPACITY; SPARE]);
    }

    #[test]
    fn what_was_put_in_comes_out_in_order() {
        let mut buffer = Buffer::default();
        buffer.append(b"control");
        buffer.room()[..4].copy_from_slice(b"data");
        buffer.fill(4);
        buffer.take(3);
        buffer.append(b"!");
        assert_eq!(buffer.bytes(), b"troldata!");
        buffer.take(9);
        assert!(buffer.is_empty() && buffer.room.is_empty());
        assert_eq!(buffer.room().len(), CAPACITY);
    }
}
