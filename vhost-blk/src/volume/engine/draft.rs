//! Drafts: the log record of a write that is written along with its data.
//!
//! Who writes and flushes, writes and flushes (a database's log, a journal) waits for three trips to
//! the disk in a row: data, record, barrier. When the last few flushes each had one small write before
//! them, the next lone small write is taken for another: its record leaves together with its data, as a
//! batch of its own. The flush then finds all it needs written, and only its barrier is left.
//! (Write and flush of 4 KiB at depth 1: see the table in the README.)
//!
//! What was written is a promise of nothing, since nothing was asked for yet:
//!
//! - If more was written, or the same again, before the flush came, the commit is the next batch
//!   behind the draft, with everything in it, and one barrier for both. Recovery that has to drop
//!   it takes the draft for what it is ([`recover`](crate::volume::recover)).
//! - If the data could not be written, an empty batch takes the draft's place at once: a draft that does not
//!   authenticate would take the commit behind it along, and one that cannot be read keep the volume
//!   from opening.
//! - A write that another queue's later one of the same block has overtaken is not drafted, nor are two
//!   of one block together: all blocks of a draft that has landed are open deltas until the next commit.
//! - Neither begins before record and data have landed: a barrier is for what has completed.
//! - A slot that a draft names is not used again before the next commit is durable, also if its
//!   block was written again: replaying the draft would take it from its new owner.
//!
//! Rejected: recording each write this way. Writes that many flights share one record later cost a
//! fraction of a record each; and asking the disk for FUA instead of a barrier, which covers the record
//! but not the data before it.

use super::JobWrite;
use super::core::{Core, Deltas, Phase};
use crate::volume::entry::Entry;
use crate::volume::geometry::{Block, FANOUT, Slot};
use crate::volume::log::{Delta, Ending};
use crate::volume::mutant::{self, Mutant};
use crate::volume::recover::LogPoint;

/// Blocks of a write that is drafted, at most: their record is one block.
pub(super) const DRAFT_BLOCKS: usize = 16;
/// Flushes in a row with one small write before each, after which the next is expected.
const HABIT: u8 = 3;

/// See the module.
pub(super) struct Draft {
    pub(super) deltas: Vec<Delta>,
    pub(super) batch: u64,
    /// The log behind it.
    pub(super) end: LogPoint,
    is_written: bool,
    has_landed: bool,
    has_failed: bool,
}

/// Whether the next write should be drafted.
#[derive(Debug)]
pub(super) struct Habit {
    /// Flushes in a row that had one small write before them.
    seen: u8,
    wanted: u8,
    /// Writes that have landed since the last commit began, and their blocks.
    writes: usize,
    blocks: usize,
}

impl Default for Habit {
    fn default() -> Self {
        Self {
            seen: 0,
            wanted: HABIT,
            writes: 0,
            blocks: 0,
        }
    }
}

impl Habit {
    pub(super) fn note_write(&mut self, blocks: usize) {
        self.writes += 1;
        self.blocks += blocks;
    }

    /// A commit begins; `is_flush`: because somebody waits for it.
    pub(super) fn note_commit(&mut self, is_flush: bool, blocks: usize) {
        // More than was written was discarded.
        let is_all = self.writes == 1 && self.blocks == blocks;
        let is_one = is_flush && is_all && blocks <= DRAFT_BLOCKS;
        self.seen = if is_one {
            self.seen.saturating_add(1)
        } else {
            0
        };
        (self.writes, self.blocks) = (0, 0);
    }

    pub(super) fn is_formed(&self) -> bool {
        self.seen >= self.wanted
    }
}

impl Draft {
    fn names(&self, block: u64, entry: &Entry) -> bool {
        let mut deltas = self.deltas.iter();
        deltas.any(|delta| delta.block.0 == block && delta.entry == *entry)
    }

    /// Record and data are where they belong, or failed.
    pub(super) fn is_settled(&self) -> bool {
        self.is_written && (self.has_landed || mutant::is(Mutant::HastyDraft))
    }

    /// Nothing has to be done about it.
    pub(super) fn is_done(&self) -> bool {
        self.is_settled() && !self.is_void()
    }

    /// The data did not land: an empty batch has to take its place.
    pub(super) fn is_void(&self) -> bool {
        self.has_failed && !mutant::is(Mutant::KeepFailedDraft)
    }

    /// Whether it is all that a commit of `open` has to write.
    pub(super) fn is_all_of(&self, open: &Deltas) -> bool {
        let is_open = |delta: &Delta| open.get(&delta.block.0) == Some(&delta.entry);
        let is_all = self.deltas.len() == open.len() && self.deltas.iter().all(is_open);
        !self.has_failed && (is_all || mutant::is(Mutant::DraftForAll))
    }

    /// The slot of a block in it.
    pub(super) fn slot_of(&self, block: u64) -> Option<Slot> {
        let mut deltas = self.deltas.iter();
        let found = deltas.find(|delta| delta.block.0 == block);
        found.map(|delta| delta.entry.slot())
    }
}

impl Core {
    /// A write's data are about to leave: its record, if it is to leave too.
    pub(super) fn begin_draft(
        &mut self,
        members: &mut dyn ExactSizeIterator<Item = (Block, Entry)>,
        sequence: &mut dyn FnMut() -> u64,
    ) -> Option<JobWrite> {
        let is_lone = self.draft.is_none()
            && self.commit.is_none()
            && self.open.is_empty()
            && self.sealed.is_empty()
            && self.landing == members.len();
        let is_possible = self.phase == Phase::Serving
            && !self.is_poisoned
            && members.len() <= DRAFT_BLOCKS
            && self.log_used < self.geometry.log_blocks();
        if !(self.habit.is_formed() && is_lone && is_possible) {
            return None;
        }
        let mut deltas = members
            .map(|(block, entry)| {
                let now = self.map.leaf(block.0 / FANOUT).ok()?.entry(block.0);
                // A later write of the block, through another queue, may have overtaken this one
                // and be committed: this one will never be published.
                let is_overtaken =
                    now.session() == entry.session() && now.sequence() > entry.sequence();
                let old = now.slot();
                (!is_overtaken).then_some(Delta { block, entry, old })
            })
            .collect::<Option<Vec<Delta>>>()?;
        deltas.sort_unstable_by_key(|delta| delta.block);
        if deltas.windows(2).any(|pair| pair[0].block == pair[1].block) {
            return None;
        }
        let batch = self.next_batch;
        let mut writes = Vec::new();
        let end = self.seal_records(
            batch,
            self.applied,
            &deltas,
            Ending::Draft,
            sequence,
            &mut writes,
        )?;
        self.next_batch += 1;
        self.draft = Some(Draft {
            deltas,
            batch,
            end,
            is_written: false,
            has_landed: false,
            has_failed: false,
        });
        writes.pop()
    }

    /// The draft's record is written.
    pub(super) fn draft_written(&mut self) {
        if let Some(draft) = &mut self.draft {
            draft.is_written = true;
        }
    }

    /// A write has landed, or failed.
    pub(super) fn draft_landed(&mut self, block: Block, entry: &Entry, is_good: bool) {
        if let Some(draft) = &mut self.draft
            && draft.names(block.0, entry)
        {
            draft.has_landed = true;
            draft.has_failed |= !is_good;
        }
    }

    /// The batch that an entry which has just landed is part of.
    pub(super) fn batch_of(&self, block: Block, entry: &Entry) -> u64 {
        let draft = self.draft.as_ref();
        let draft = draft.filter(|draft| draft.names(block.0, entry));
        draft.map_or(self.next_batch, |draft| draft.batch)
    }

    /// Whether a draft names this entry's slot, which then must stay as it is.
    pub(super) fn is_drafted(&self, block: Block, entry: &Entry) -> bool {
        let draft = self.draft.as_ref();
        draft.is_some_and(|draft| draft.names(block.0, entry)) && !mutant::is(Mutant::DraftSlotFree)
    }
}

#[cfg(test)]
impl super::Shared {
    /// Drafts every lone small write.
    pub(crate) fn draft_always(&self) {
        self.lock().habit.wanted = 0;
    }

    /// Whether the slot at a place of the backing is in use.
    pub(crate) fn is_taken(&self, offset: u64) -> bool {
        let slot =
            crate::volume::geometry::Slot(offset / crate::volume::geometry::BLOCK_LEN as u64);
        self.lock().space.is_used(slot)
    }
}
