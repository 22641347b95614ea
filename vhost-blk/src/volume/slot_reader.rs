//! Blocking reads of slots for recovery, with read-ahead.
//!
//! Pages and data of a commit were written in long runs, so asking for them in order mostly asks
//! for the next slot. One request a slot would cost a round trip to the disk each: a volume with
//! 10 GiB written has 20,000 leaves.

use std::io;

use super::backing::Backing;
use super::buffer::{Buffer, Pool};
use super::geometry::{BLOCK_LEN, Slot};

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
        let mut window = Buffer::zeroed(Pool::MAX_BLOCKS);
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
            let wanted = if is_next { Pool::MAX_BLOCKS as u64 } else { 1 };
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
