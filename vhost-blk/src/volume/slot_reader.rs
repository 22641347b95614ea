//! Blocking reads of the log for recovery, with read-ahead: records follow each other, so asking
//! for one mostly asks for the next slot.

use std::io;

use super::backing::Backing;
use super::buffer::Buffer;
use super::geometry::{BLOCK_LEN, Slot};

/// Blocks that are read at a time once it is clear that it goes on.
const AHEAD: usize = 256;

/// Reads slots of a backing that nobody writes to meanwhile.
pub struct SlotReader<'b> {
    backing: &'b dyn Backing,
    window: Buffer,
    /// Slot of the window's first block.
    start: u64,
    last: u64,
}

impl<'b> SlotReader<'b> {
    /// A reader of `backing`.
    pub fn new(backing: &'b dyn Backing) -> Self {
        let mut window = Buffer::zeroed(AHEAD);
        window.set_blocks(0);
        Self {
            backing,
            window,
            start: 0,
            last: u64::MAX,
        }
    }

    /// The contents of `slot`, which the caller may change.
    ///
    /// # Errors
    /// The backing fails at this slot, or ends before it.
    pub fn read(&mut self, slot: Slot) -> io::Result<&mut [u8]> {
        let is_next = slot.0 == self.last.wrapping_add(1);
        // Only forwards: what was handed out may have been changed.
        let is_there =
            slot.0 > self.last && slot.0.wrapping_sub(self.start) < self.window.blocks() as u64;
        self.last = slot.0;
        if !is_there {
            let left = (self.backing.len() / BLOCK_LEN as u64).saturating_sub(slot.0);
            let wanted = if is_next { AHEAD as u64 } else { 1 };
            self.fill(slot, wanted.min(left).max(1))?;
        }
        let index = slot.0 - self.start;
        Ok(self.window.block_mut(index as usize))
    }

    fn fill(&mut self, slot: Slot, blocks: u64) -> io::Result<()> {
        self.start = slot.0;
        self.window.set_blocks(blocks as usize);
        let mut outcome = self.backing.read_at(slot.offset(), &mut self.window);
        if outcome.is_err() && blocks > 1 {
            // A bad neighbour is not this slot's trouble.
            self.window.set_blocks(1);
            outcome = self.backing.read_at(slot.offset(), &mut self.window);
        }
        if outcome.is_err() {
            self.window.set_blocks(0);
        }
        outcome
    }
}
