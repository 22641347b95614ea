//! Re-homing: what random writes have scattered is moved together again while nobody wants
//! anything, so that sequential reads come back and whole chunks become free.
//!
//! A move is a write whose contents are there already: read the sealed block, verify it (damage is
//! found, not carried along), write the same bytes to another slot, and once they have landed
//! publish the entry with the new slot, if the block's entry is still the one that was read. Key,
//! nonce and tag stay: the associated data name the block, not the slot. From there it is a delta
//! like any other: logged, made durable by the next commit, which frees the old slot.
//!
//! Three things make it safe:
//!
//! - **Only committed blocks move**, those that are neither among the open nor among the sealed
//!   deltas, when they are looked up and again when they are published. So no record of the delta
//!   ring counts that names the old slot: ring records carry the batch of their commit, and those
//!   of committed batches are skipped.
//! - **A move is in no ring.** It was acknowledged to nobody, so losing it in a kill loses nothing,
//!   and the old slot stays as it is until the commit.
//! - **The entry is compared whole.** Sequence numbers cannot order a move and the write that it
//!   moves, for they are equal; a later write of the guest differs in sequence or session, and a
//!   later move cannot be, for a block in the deltas does not move.
//!
//! Which parts are worth looking at is one bit a MiB, set by commits of short runs that are no
//! moves. What lies scattered from before the volume was opened is not known: everything is
//! looked at once.

use super::core::Core;
use super::volume::Shared;
use crate::volume::entry::Entry;
use crate::volume::geometry::{Block, CHUNK_SLOTS};
use crate::volume::mutant::{self, Mutant};

/// Blocks of a part of the volume that has a bit: 1 MiB.
pub const PART_BLOCKS: u64 = 256;
/// A run of so many blocks is no scatter.
const LONG_RUN: u64 = 32;

/// Which parts of the volume may lie scattered.
pub(super) struct Scattered {
    bits: Vec<u64>,
    /// Parts from here on have not been looked at since the volume was opened.
    unknown: u64,
    parts: u64,
}

impl Scattered {
    pub(super) fn new(blocks: u64) -> Self {
        Self {
            bits: Vec::new(),
            unknown: 0,
            parts: blocks.div_ceil(PART_BLOCKS),
        }
    }

    /// Notes committed blocks and their slots, in the order of the blocks.
    pub(super) fn note(&mut self, placed: impl Iterator<Item = (u64, u64)>) {
        let mut run: Option<(u64, u64, u64)> = None;
        for (block, slot) in placed {
            match &mut run {
                Some((first, at, len)) if block == *first + *len && slot == *at + *len => *len += 1,
                _ => {
                    self.end_run(run);
                    run = Some((block, slot, 1));
                }
            }
        }
        self.end_run(run);
    }

    fn end_run(&mut self, run: Option<(u64, u64, u64)>) {
        // A slot of 0 is a hole: nothing to read.
        let Some((first, 1.., len)) = run else { return };
        if len < LONG_RUN {
            self.set(first / PART_BLOCKS);
            self.set((first + len - 1) / PART_BLOCKS);
        }
    }

    /// A block goes where its neighbours are not.
    pub(super) fn mark(&mut self, block: u64) {
        self.set(block / PART_BLOCKS);
    }

    fn set(&mut self, part: u64) {
        let word = (part / 64) as usize;
        if self.bits.len() <= word {
            self.bits.resize(word + 1, 0);
        }
        self.bits[word] |= 1 << (part % 64);
    }

    /// The first part from `from` on that may lie scattered.
    fn next(&self, from: u64) -> Option<u64> {
        let set = (from..self.unknown).find(|part| {
            let word = self.bits.get((part / 64) as usize);
            word.is_some_and(|word| word & (1 << (part % 64)) != 0)
        });
        let rest = from.max(self.unknown);
        set.or_else(|| (rest < self.parts).then_some(rest))
    }

    fn count(&self) -> u64 {
        let set: u32 = self.bits.iter().map(|word| word.count_ones()).sum();
        u64::from(set) + self.parts.saturating_sub(self.unknown)
    }

    fn clear(&mut self, part: u64) {
        if let Some(word) = self.bits.get_mut((part / 64) as usize) {
            *word &= !(1 << (part % 64));
        }
        if part == self.unknown {
            self.unknown += 1;
        }
    }
}

impl Core {
    /// A block's entry, if it may move: it is mapped and committed. `None` also where the map is
    /// damaged.
    pub(super) fn movable(&self, block: u64) -> Option<Entry> {
        if self.open.contains_key(&block) || self.sealed.contains_key(&block) {
            return None;
        }
        self.committed(block).ok().filter(|entry| !entry.is_hole())
    }

    /// The block that was `from` has landed as `to`. Returns whether that counts.
    pub(super) fn publish_move(&mut self, block: Block, from: &Entry, to: Entry) -> bool {
        let is_unchanged = self.movable(block.0) == Some(*from);
        if !is_unchanged && !mutant::is(Mutant::MoveBlindly) {
            self.space.free_now(to.slot());
            return false;
        }
        if mutant::is(Mutant::MoveEarlyFree) {
            self.space.retire(vec![from.slot()], false);
        }
        self.open.insert(block.0, to);
        true
    }
}

/// What the walk asks of a volume. Each takes the lock for a moment.
impl Shared {
    /// Counts on with each round of a queue that has requests: the volume is idle while it stands.
    pub fn activity(&self) -> u64 {
        self.lock().activity
    }

    /// Parts of [`PART_BLOCKS`] blocks that the volume has.
    pub fn parts(&self) -> u64 {
        (self.volume_len() / crate::volume::geometry::BLOCK_LEN as u64).div_ceil(PART_BLOCKS)
    }

    /// The next part from `from` on that may lie scattered.
    pub fn next_scattered(&self, from: u64) -> Option<u64> {
        self.lock().scattered.next(from)
    }

    /// The part will now be looked at.
    pub fn clear_scattered(&self, part: u64) {
        self.lock().scattered.clear(part);
    }

    /// The part is still to be looked at.
    pub fn mark_scattered(&self, part: u64) {
        self.lock().scattered.set(part);
    }

    /// Chooses chunks to be emptied into the holes of others; returns how many.
    pub fn choose_victims(&self) -> usize {
        self.lock().space.choose_victims()
    }

    /// Chooses chunks that are worth to be emptied since much of them is free.
    pub fn choose_sparse(&self) -> usize {
        self.lock().space.choose_sparse()
    }

    /// No chunk is to be emptied any more.
    pub fn clear_victims(&self) {
        self.lock().space.clear_victims();
    }

    /// Whole chunks that are free and could be written now.
    pub fn free_chunks(&self) -> u64 {
        self.lock().space.free_chunks()
    }

    /// The chunk behind the last that was ever used.
    pub fn end_of_use(&self) -> u64 {
        self.lock().space.end_of_use()
    }

    /// Parts that may lie scattered.
    pub fn scattered(&self) -> u64 {
        self.lock().scattered.count()
    }

    /// Bytes that chunks with backing take, and bytes in use.
    pub fn footprint(&self) -> (u64, u64) {
        let (chunks, slots) = self.lock().space.footprint();
        let block = crate::volume::geometry::BLOCK_LEN as u64;
        (chunks * CHUNK_SLOTS * block, slots * block)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_runs_leave_a_mark_and_long_ones_none() {
        let mut scattered = Scattered::new(4096 * 256);
        assert_eq!(scattered.next(0), Some(0), "nothing is known at first");
        for part in 0..4096 {
            scattered.clear(part);
        }
        assert_eq!(scattered.next(0), None);
        scattered.note((1000..1064).map(|block| (block, block + 5000)));
        assert_eq!(scattered.next(0), None);
        scattered.note([(700, 9), (2000, 10), (2001, 12), (5000, 0)].into_iter());
        assert_eq!(scattered.next(0), Some(2));
        assert_eq!(scattered.next(3), Some(7));
        assert_eq!(scattered.next(8), None);
        scattered.clear(2);
        assert_eq!(scattered.next(0), Some(7));
    }
}
