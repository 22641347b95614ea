//! A checkpoint: the map goes to disk, so that the log can be used again.
//!
//! 1. Give every changed page a new place and seal it there (a snapshot, taken at one instant;
//!    commits go on meanwhile and land behind it in the log).
//! 2. Wait for these writes, then a barrier.
//! 3. The superblock to one copy, generation + 1. Wait, barrier. From here on the new tree counts.
//!    Which copy follows from the generation; were it the only good one, it is generation + 2.
//! 4. Free the replaced pages and the log before the snapshot.
//! 5. The same superblock to the other copy. The next checkpoint's first barrier makes it durable
//!    before the first copy is overwritten.

use super::JobWrite;
use super::core::Core;
use crate::volume::buffer::{Buffer, Pool};
use crate::volume::entry::Entry;
use crate::volume::geometry::{BLOCK_LEN, Slot};
use crate::volume::mutant::{self, Mutant};
use crate::volume::recover::LogPoint;
use crate::volume::superblock::{COPIES, KeyEntry, Superblock};

/// A checkpoint under way.
pub(super) struct Checkpoint {
    superblock: Superblock,
    replaced: Vec<Slot>,
    log_blocks: u64,
    /// The sealed superblock, once the pages are durable.
    image: Vec<u8>,
}

/// Gathers sealed pages into writes of consecutive slots.
struct PageWrites<'s> {
    sink: &'s mut dyn FnMut(JobWrite),
    slots: Vec<Slot>,
    bytes: Vec<u8>,
}

impl PageWrites<'_> {
    fn push(&mut self, slot: Slot, seal: impl FnOnce(&mut [u8])) {
        let follows = self.slots.last().is_some_and(|last| last.0 + 1 == slot.0);
        if !follows || self.slots.len() == Pool::MAX_BLOCKS {
            self.cut();
        }
        let at = self.bytes.len();
        self.bytes.resize(at + BLOCK_LEN, 0);
        seal(&mut self.bytes[at..]);
        self.slots.push(slot);
    }

    fn cut(&mut self) {
        if let Some(first) = self.slots.first() {
            let buffer = Buffer::copy_of(&self.bytes);
            (self.sink)(JobWrite {
                offset: first.offset(),
                buffer,
            });
        }
        self.slots.clear();
        self.bytes.clear();
    }
}

impl Core {
    /// Begins a checkpoint: the pages to write. `None`: there are not enough slots for pages yet.
    pub(super) fn begin_checkpoint(
        &mut self,
        is_clean: bool,
        sequence: &mut dyn FnMut() -> u64,
    ) -> Option<Vec<JobWrite>> {
        let mut writes = Vec::new();
        self.place_checkpoint(is_clean, sequence, &mut |write| writes.push(write))?;
        Some(writes)
    }

    /// As [`Core::begin_checkpoint`]; `sink` is given each write as soon as it is made.
    pub(super) fn place_checkpoint(
        &mut self,
        is_clean: bool,
        sequence: &mut dyn FnMut() -> u64,
        sink: &mut dyn FnMut(JobWrite),
    ) -> Option<()> {
        let (session_id, session) = self.session.clone()?;
        if self.space.page_slots() < self.page_slots_taken() {
            return None;
        }
        self.wants_checkpoint = false;
        self.retouch();
        if mutant::is(Mutant::EarlyPageFree) {
            let pages = self
                .map
                .page_entries()
                .chain(self.space_tree.page_entries());
            pages.for_each(|entry| self.space.give_page_slot(entry.slot()));
        }
        let mut writes = PageWrites {
            sink,
            slots: Vec::new(),
            bytes: Vec::new(),
        };
        let mut replaced: Vec<Entry> = Vec::new();
        let mut placed = 0i64;
        let Self {
            map,
            space_tree,
            space,
            superblock,
            ..
        } = self;
        let id = superblock.id;
        let mut place = |place, page: &crate::volume::page::Page| {
            // Enough were counted above.
            let slot = space
                .take_page_slot()
                .expect("a slot was counted for every page");
            let number = sequence();
            let mut entry = Entry::HOLE;
            writes.push(slot, |out| {
                let tag = page.seal_into(out, place, &id, &session, number);
                entry = Entry::new(slot, session_id, number, tag);
            });
            placed += 1;
            entry
        };
        let map_root = map.snapshot(&mut place, &mut replaced);
        let space_root = space_tree.snapshot(&mut place, &mut replaced);
        writes.cut();
        let Some(map_root) = map_root else {
            tracing::error!("what is above a changed page of the map is not in memory");
            self.poison();
            return None;
        };
        *self.live.entry(session_id).or_default() += placed;
        for old in &replaced {
            self.count_live(old, &Entry::HOLE);
        }
        let replaced: Vec<Slot> = replaced.iter().map(Entry::slot).collect();
        if mutant::is(Mutant::EarlyPageFree) {
            replaced
                .iter()
                .for_each(|slot| self.space.give_page_slot(*slot));
        }
        let live = &self.live;
        let table = self.superblock.table.iter().map(|row| KeyEntry {
            live: live.get(&row.id).map_or(0, |count| (*count).max(0) as u64),
            ..row.clone()
        });
        let LogPoint {
            position,
            chain,
            batch,
        } = self.applied;
        let next = self.superblock.generation + 1;
        let is_sole = self.sole_copy == Some(next % 2);
        let superblock = Superblock {
            generation: next + u64::from(is_sole),
            clean: is_clean,
            session: session_id,
            log_position: position,
            batch,
            chain,
            map_root,
            space_root,
            geometry: self.grow_to.unwrap_or(self.geometry),
            table: table.collect(),
            ..self.superblock.clone()
        };
        // Leaves that were touched before may be touched anew.
        self.feed_starved();
        let mut log_blocks = self.log_used;
        if mutant::is(Mutant::EarlyLogFree) {
            self.log_used -= std::mem::take(&mut log_blocks);
        }
        self.checkpoint = Some(Checkpoint {
            superblock,
            replaced,
            log_blocks,
            image: Vec::new(),
        });
        Some(())
    }

    /// The pages are durable: the superblock to write.
    pub(super) fn seal_superblock(
        &mut self,
        sequence: &mut dyn FnMut() -> u64,
    ) -> Option<JobWrite> {
        let (_, session) = self.session.clone()?;
        let checkpoint = self.checkpoint.as_mut()?;
        checkpoint.superblock.sequence = sequence();
        checkpoint.image = checkpoint.superblock.seal(&session);
        let copy = if mutant::is(Mutant::OneSuperblock) {
            0
        } else {
            checkpoint.superblock.generation % 2
        };
        Some(JobWrite {
            offset: COPIES[copy as usize],
            buffer: Buffer::copy_of(&checkpoint.image),
        })
    }

    /// The superblock is durable: frees what it replaces and returns the write of the other copy.
    pub(super) fn finish_checkpoint(&mut self) -> Option<JobWrite> {
        let Checkpoint {
            superblock,
            replaced,
            log_blocks,
            image,
        } = self.checkpoint.take()?;
        if !mutant::is(Mutant::EarlyPageFree) {
            for slot in replaced {
                self.space.give_page_slot(slot);
            }
        }
        self.map.written();
        self.log_used -= log_blocks;
        self.backing_full = false;
        self.page_goal = 0;
        let copy = 1 - superblock.generation % 2;
        self.take_size(superblock.geometry);
        self.superblock = superblock;
        self.feed_starved();
        self.is_mirroring = true;
        (!mutant::is(Mutant::OneSuperblock)).then(|| JobWrite {
            offset: COPIES[copy as usize],
            buffer: Buffer::copy_of(&image),
        })
    }

    /// The second copy is written.
    pub(super) fn finish_mirror(&mut self) {
        self.is_mirroring = false;
        self.sole_copy = None;
    }
}
