//! A commit: what makes acknowledged writes survive a power cut.
//!
//! 1. Take the open deltas as a batch; new ones gather for the next.
//! 2. Write their log records. Data writes are not waited for: a delta exists only once its data
//!    have landed. (A [draft](super::draft) has been written with its data.)
//! 3. **Wait until every record has completed**: a barrier is not ordered after writes that are
//!    still under way.
//! 4. One barrier, for data and log alike.
//! 5. Put the batch into the map, only then give up the old slots, release the delta ring,
//!    acknowledge.
//!
//! Flushes that arrive meanwhile share the next commit.

use super::core::{Core, Deltas, Event};
use super::draft::Draft;
use super::{Failure, JobWrite};
use crate::volume::buffer::Buffer;
use crate::volume::entry::Entry;
use crate::volume::geometry::{BLOCK_LEN, Block, FANOUT, Slot};
use crate::volume::log::{self, Delta, Ending, RECORD_DELTAS_MAX, RecordPlace};
use crate::volume::mutant::{self, Mutant};
use crate::volume::ranges::Ticket;
use crate::volume::recover::LogPoint;
use crate::volume::ring::Mark;

/// A commit under way.
pub(super) struct Commit {
    /// Tasks to tell.
    pub(super) waiters: Vec<Ticket>,
    deltas: Vec<Delta>,
    end: LogPoint,
    blocks: u64,
    ring: Option<Mark>,
    /// Slots that only ring records before `ring` name.
    pub(super) ring_only: Vec<Slot>,
}

impl Core {
    /// Begins a commit: what to write before the barrier. `None`: the log is full, a checkpoint
    /// has to come first.
    pub(super) fn begin_commit(
        &mut self,
        sequence: &mut dyn FnMut() -> u64,
    ) -> Option<Vec<JobWrite>> {
        self.session.as_ref()?;
        debug_assert!(self.commit.is_none() && self.sealed.is_empty());
        let blocks = log::batch_blocks(self.open.len());
        let drafted = u64::from(self.draft.is_some());
        if self.log_used + drafted + blocks > self.geometry.log_blocks() {
            self.wants_checkpoint = true;
            return None;
        }
        let is_flush = !self.flush_waiters.is_empty();
        self.habit.note_commit(is_flush, self.open.len());
        let mut writes = Vec::new();
        let (deltas, end, blocks) = match self.draft.take() {
            Some(draft) if draft.is_all_of(&self.open) => (draft.deltas, draft.end, drafted),
            draft => {
                let is_void = draft.as_ref().is_some_and(Draft::is_void);
                let deltas = self.open_deltas(draft.as_ref().filter(|_| !is_void));
                let mut seal = |batch, from, deltas: &[Delta]| {
                    self.seal_records(batch, from, deltas, Ending::Last, sequence, &mut writes)
                };
                let mut end = match draft {
                    Some(draft) if is_void => seal(draft.batch, self.applied, &[])?,
                    Some(draft) => draft.end,
                    None => self.applied,
                };
                if !deltas.is_empty() {
                    end = seal(self.next_batch, end, &deltas)?;
                    self.next_batch += 1;
                }
                (deltas, end, drafted + blocks)
            }
        };
        self.sealed = std::mem::take(&mut self.open);
        self.ring_pressure = false;
        if mutant::is(Mutant::EarlyRingRelease)
            && let Some(ring) = &mut self.ring
        {
            ring.release(ring.mark());
        }
        self.commit = Some(Commit {
            waiters: std::mem::take(&mut self.flush_waiters),
            deltas,
            end,
            blocks,
            ring: self.ring.as_ref().map(|ring| ring.mark()),
            ring_only: std::mem::take(&mut self.ring_only),
        });
        Some(writes)
    }

    /// What is open, as a commit behind `draft` writes it.
    fn open_deltas(&self, draft: Option<&Draft>) -> Vec<Delta> {
        let old = |block: u64| {
            let drafted = draft.and_then(|draft| draft.slot_of(block));
            drafted.unwrap_or_else(|| {
                // Known: it was touched when the change was admitted.
                let leaf = self.map.leaf(block / FANOUT);
                leaf.map_or(Entry::HOLE, |leaf| leaf.entry(block)).slot()
            })
        };
        let mut deltas: Vec<Delta> = self
            .open
            .iter()
            .map(|(block, entry)| Delta {
                block: Block(*block),
                entry: *entry,
                old: old(*block),
            })
            .collect();
        deltas.sort_unstable_by_key(|delta| delta.block);
        deltas
    }

    /// The records of a batch behind `from`; where the log then ends.
    pub(super) fn seal_records(
        &self,
        batch: u64,
        from: LogPoint,
        deltas: &[Delta],
        ending: Ending,
        sequence: &mut dyn FnMut() -> u64,
        writes: &mut Vec<JobWrite>,
    ) -> Option<LogPoint> {
        let (session_id, session) = self.session.as_ref()?;
        let mut end = LogPoint { batch, ..from };
        let records = deltas.len().div_ceil(RECORD_DELTAS_MAX).max(1);
        for index in 0..records {
            let first = index * RECORD_DELTAS_MAX;
            let part = &deltas[first..deltas.len().min(first + RECORD_DELTAS_MAX)];
            let place = RecordPlace {
                batch,
                index: index as u32,
                chain: end.chain,
            };
            let is_last = index + 1 == records;
            let (record, tag) = log::seal(
                place,
                if is_last { ending } else { Ending::More },
                part,
                &self.superblock.id,
                (*session_id, session),
                sequence(),
            );
            let wrap = (self.geometry.log_blocks() - end.position) as usize;
            let mut push = |position: u64, bytes: &[u8]| {
                let offset = self.geometry.log_slot(position).offset();
                writes.push(JobWrite {
                    offset,
                    buffer: Buffer::copy_of(bytes),
                });
            };
            if record.blocks() <= wrap {
                push(end.position, &record);
            } else {
                let (front, back) = record.split_at(wrap * BLOCK_LEN);
                push(end.position, front);
                push(0, back);
            }
            end.position = (end.position + record.blocks() as u64) % self.geometry.log_blocks();
            end.chain = tag;
        }
        Some(end)
    }

    /// The barrier of the commit has completed.
    pub(super) fn finish_commit(&mut self) {
        let Some(commit) = self.commit.take() else {
            return;
        };
        let (mut freed, mut discarded) = (Vec::new(), Vec::new());
        let mut written = Vec::with_capacity(commit.deltas.len());
        let mut unplaced = Deltas::default();
        for delta in &commit.deltas {
            let Some(page) = self.map.leaf_mut(delta.block.0 / FANOUT) else {
                unplaced.insert(delta.block.0, delta.entry);
                continue;
            };
            let old = page.entry(delta.block.0);
            page.set_entry(delta.block.0, delta.entry);
            if !old.is_hole() {
                self.space_tree.set_used(old.slot(), false);
                if mutant::is(Mutant::EarlyFree) {
                } else if delta.entry.is_hole() && self.can_punch {
                    discarded.push(old.slot());
                } else {
                    freed.push(old.slot());
                }
            }
            if !delta.entry.is_hole() {
                self.space_tree.set_used(delta.entry.slot(), true);
            }
            // A moved block keeps what it is sealed with.
            if delta.entry.moved_to(old.slot()) != old {
                written.push((delta.block.0, delta.entry.slot().0));
            }
            self.count_live(&old, &delta.entry);
        }
        self.scattered.note(written.into_iter());
        // Still what these blocks read as.
        let is_broken = !unplaced.is_empty();
        self.sealed = unplaced;
        self.applied = commit.end;
        self.log_used += commit.blocks;
        if let (Some(ring), Some(mark)) = (&mut self.ring, commit.ring) {
            ring.release(mark);
        }
        freed.extend(commit.ring_only);
        self.space.retire(freed, false);
        self.space.retire(discarded, true);
        // What was freed may do for pages, and somebody may have made room on the file system.
        self.backing_full = false;
        for (lane, task) in commit.waiters {
            self.tell(lane, Event::Committed(task, Ok(())));
        }
        if is_broken {
            // A leaf that an admitted write had touched is not here: a fault of ours. What was committed
            // is in the log, which must stay as it is, so no checkpoint may come any more.
            tracing::error!("a page of the map that a commit needs is not in memory");
            self.poison();
        }
        self.feed_starved();
    }

    /// A task wants what is acknowledged so far to be durable. `Some`: at once.
    pub(super) fn request_flush(&mut self, ticket: Ticket) -> Option<Result<(), Failure>> {
        if self.is_poisoned {
            return Some(Err(Failure::Poisoned));
        }
        if !self.open.is_empty() {
            self.flush_waiters.push(ticket);
            return None;
        }
        match &mut self.commit {
            Some(commit) => {
                commit.waiters.push(ticket);
                None
            }
            None => Some(Ok(())),
        }
    }
}
