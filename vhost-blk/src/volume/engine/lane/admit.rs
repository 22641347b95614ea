//! What a piece needs from the core before it can move: entries, a range, slots, a sequence
//! number.

use std::ops::RangeInclusive;

use smallvec::SmallVec;

use super::{Lane, PieceKind, ReadPlan};
use crate::volume::engine::Failure;
use crate::volume::engine::core::{Core, Event, PAGE_SLOTS_AHEAD, SEQUENCE_LIMIT};
use crate::volume::engine::request::Payload;
use crate::volume::entry::Entry;
use crate::volume::geometry::{BLOCK_LEN, Block, FANOUT, Slot};
use crate::volume::ranges::Held;
use crate::volume::space::Run;

/// What keeps a write from going on.
pub(super) enum Hurdle {
    /// It waits for a commit, or for slots.
    Stall,
    Fail(Failure),
}

impl Core {
    pub(in crate::volume::engine) fn release_range(&mut self, held: Held) {
        let Self {
            ranges, inboxes, ..
        } = self;
        ranges.release(held, &mut |(lane, piece), held| {
            if let Some(inbox) = inboxes.get_mut(usize::from(lane)) {
                inbox.events.push_back(Event::Granted(piece, held));
            }
        });
    }

    /// Whether a change of `blocks` blocks in `leaves` may begin.
    pub(super) fn hurdle(
        &mut self,
        leaves: RangeInclusive<u64>,
        blocks: usize,
        sequence: u64,
    ) -> Option<Hurdle> {
        if let Some(failure) = self.refuses_writes() {
            return Some(Hurdle::Fail(failure));
        }
        if sequence + blocks as u64 > SEQUENCE_LIMIT {
            return Some(Hurdle::Fail(Failure::NoncesUsedUp));
        }
        if self.is_crowded(blocks) {
            return Some(Hurdle::Stall);
        }
        if blocks == 0 {
            return None;
        }
        // The last slots are for leaves that are there: what is mapped stays writable when no new
        // leaf has room any more.
        let has_new = leaves.clone().any(|leaf| self.map.leaf(leaf).is_none());
        let reserve = if has_new { PAGE_SLOTS_AHEAD } else { 0 };
        let needed = self.page_slots_needed(leaves.count(), blocks) + reserve;
        if self.space.page_slots() < needed {
            // A checkpoint must never need room that the backing has not given yet.
            self.page_goal = self.page_goal.max(needed);
            if self.wants_page_slots() || self.may_find_room() {
                return Some(Hurdle::Stall);
            }
            let dirty = self.map.dirty_leaves() + self.space_tree.dirty_leaves();
            if dirty > 0 && self.space.page_slots() >= self.page_slots_taken() {
                // A checkpoint gives the pages back that it replaces.
                self.wants_checkpoint = true;
                return Some(Hurdle::Stall);
            }
            // The next one asks the backing again.
            self.backing_full = false;
            self.page_goal = 0;
            return Some(Hurdle::Fail(Failure::NoSpace));
        }
        None
    }
}

impl<P: Payload> Lane<P> {
    pub(super) fn admit_all(&mut self, core: &mut Core) {
        while let Some(key) = self.admit.pop_front() {
            let kind = self.pieces[key as usize].kind;
            if kind == PieceKind::Read {
                self.plan_read(core, key);
            } else if kind == PieceKind::Move {
                self.admit_move(core, key);
            } else if self.take_range(core, key) {
                self.admit_write(core, key);
            }
        }
    }

    /// Looks up a piece's blocks and plans a read for each stretch of consecutive slots.
    fn plan_read(&mut self, core: &mut Core, key: u32) {
        let piece = &mut self.pieces[key as usize];
        let (first, count) = (piece.first, piece.count);
        let mut plans: SmallVec<[ReadPlan; 4]> = SmallVec::new();
        for from in 0..count {
            let Some(entry) = core.entry(first + from) else {
                piece.failure = Some(Failure::NotAuthentic);
                self.shared.damaged(first + from);
                plans.clear();
                break;
            };
            match plans.last_mut() {
                Some(plan) if plan.is_continued_by(&entry) => plan.entries.push(entry),
                _ => plans.push(ReadPlan {
                    piece: key,
                    from,
                    entries: SmallVec::from_slice(&[entry]),
                    epoch: 0,
                }),
            }
        }
        piece.left = plans.len() as u64;
        if plans.is_empty() {
            self.over.push(key);
        }
        for mut plan in plans {
            if !plan.is_hole() {
                plan.epoch = core.space.begin_read();
            }
            self.to_read.push(plan);
        }
    }

    /// Takes the piece's range; `false`: it waits for it.
    fn take_range(&mut self, core: &mut Core, key: u32) -> bool {
        let piece = &mut self.pieces[key as usize];
        if piece.held.is_none() {
            let is_exclusive = matches!(piece.kind, PieceKind::Merge | PieceKind::MergeZeroes);
            piece.held =
                core.ranges
                    .acquire((self.id, key), piece.first, piece.count, is_exclusive);
        }
        piece.held.is_some()
    }

    fn admit_write(&mut self, core: &mut Core, key: u32) {
        let piece = &self.pieces[key as usize];
        let (first, end) = (piece.first, piece.first + piece.count);
        let blocks = match piece.kind {
            // Holes that become holes change nothing.
            PieceKind::Erase => (first..end).filter(|block| core.is_mapped(*block)).count(),
            _ => piece.count as usize,
        };
        let leaves = first / FANOUT..=(end - 1) / FANOUT;
        match core.hurdle(leaves, blocks, self.shared.sequence_now()) {
            Some(Hurdle::Stall) => return self.stall(core, key),
            Some(Hurdle::Fail(failure)) => return self.fail_piece(key, failure),
            None => {}
        }
        match self.pieces[key as usize].kind {
            PieceKind::Erase => self.erase(core, key),
            PieceKind::Merge | PieceKind::MergeZeroes
                if self.pieces[key as usize].merged.is_none() =>
            {
                self.read_for_merge(core, key);
            }
            _ => self.take_slots(core, key),
        }
    }

    pub(super) fn stall(&mut self, core: &mut Core, key: u32) {
        self.stalled.push_back(key);
        if !core.starved.contains(&self.id) {
            core.starved.push(self.id);
        }
    }

    pub(super) fn fail_piece(&mut self, key: u32, failure: Failure) {
        self.pieces[key as usize].failure = Some(failure);
        self.over.push(key);
    }

    fn read_for_merge(&mut self, core: &mut Core, key: u32) {
        let first = self.pieces[key as usize].first;
        let Some(entry) = core.entry(first) else {
            self.shared.damaged(first);
            return self.fail_piece(key, Failure::NotAuthentic);
        };
        let mut plan = ReadPlan {
            piece: key,
            from: 0,
            entries: SmallVec::from_slice(&[entry]),
            epoch: 0,
        };
        if plan.is_hole() {
            let mut blank = self.pool.take(1);
            blank.fill(0);
            if self.merge(key, &mut blank) {
                self.pieces[key as usize].merged = Some(blank);
                self.take_slots(core, key);
            } else {
                self.pool.give(blank);
            }
        } else {
            plan.epoch = core.space.begin_read();
            self.pieces[key as usize].left = 1;
            self.to_read.push(plan);
        }
    }

    /// Puts the piece's bytes into the block it belongs to. `false`: the piece failed.
    pub(super) fn merge(&mut self, key: u32, block: &mut [u8]) -> bool {
        let piece = &self.pieces[key as usize];
        let part = &mut block[piece.skip..piece.skip + piece.len];
        if piece.kind == PieceKind::MergeZeroes {
            part.fill(0);
            return true;
        }
        let loaded = self
            .tasks
            .get_mut(piece.task as usize)
            .is_some_and(|task| task.payload.load(piece.at, part).is_ok());
        if !loaded {
            self.fail_piece(key, Failure::Payload);
        }
        loaded
    }

    fn take_slots(&mut self, core: &mut Core, key: u32) {
        let piece = &mut self.pieces[key as usize];
        if (0..piece.count).any(|index| core.is_leaf_damaged(piece.first + index)) {
            let first = piece.first;
            self.shared.damaged(first);
            return self.fail_piece(key, Failure::NotAuthentic);
        }
        let mut missing = piece.count;
        while missing > 0 {
            if self.run.len == 0 {
                match core.take_run() {
                    Some(run) => self.run = run,
                    None => break,
                }
            }
            let part = self.run.take(missing);
            missing -= part.len;
            piece.slots.push(part);
        }
        if missing > 0 {
            for run in std::mem::take(&mut piece.slots) {
                run.slots().for_each(|slot| core.space.free_now(slot));
            }
            if core.may_find_room() {
                self.stall(core, key);
            } else {
                self.fail_piece(key, Failure::NoSpace);
            }
            return;
        }
        piece.sequence = self.shared.take_sequences(piece.count);
        piece.left = piece.count;
        let (first, count) = (piece.first, piece.count);
        core.touch(first, count);
        core.landing += count as usize;
        self.to_seal.push_back(key);
    }

    fn erase(&mut self, core: &mut Core, key: u32) {
        let piece = &self.pieces[key as usize];
        let (first, count) = (piece.first, piece.count);
        let mut touched = None;
        for block in first..first + count {
            match core.entry(block) {
                Some(entry) if !entry.is_hole() => {
                    touched = Some(touched.map_or((block, block), |(low, _)| (low, block)));
                    core.publish(Block(block), Entry::HOLE, false);
                }
                Some(_) => {}
                None => {
                    self.shared.damaged(block);
                    return self.fail_piece(key, Failure::NotAuthentic);
                }
            }
        }
        if let Some((low, high)) = touched {
            core.touch(low, high - low + 1);
        }
        self.over.push(key);
    }

    /// What nothing is under way to any more goes back to the allocator, discarded slots by way of
    /// a punch.
    pub(super) fn reclaim(&mut self, core: &mut Core) {
        let had_limbo = core.space.has_limbo();
        let discarded = core.space.release();
        if had_limbo && !core.space.has_limbo() {
            core.feed_starved();
        }
        for run in Run::group(discarded) {
            if core.can_punch {
                core.punches += 1;
                self.emit_punch(run);
            } else {
                run.slots().for_each(|slot| core.space.free_now(slot));
            }
        }
    }
}

impl Core {
    fn is_mapped(&self, block: u64) -> bool {
        self.entry(block).is_some_and(|entry| !entry.is_hole())
    }

    fn is_leaf_damaged(&self, block: u64) -> bool {
        self.map.is_damaged(block / FANOUT)
    }
}

impl ReadPlan {
    pub(super) fn is_hole(&self) -> bool {
        self.entries.first().is_none_or(Entry::is_hole)
    }

    pub(super) fn is_continued_by(&self, next: &Entry) -> bool {
        let Some(last) = self.entries.last() else {
            return false;
        };
        if last.is_hole() || next.is_hole() {
            return last.is_hole() && next.is_hole();
        }
        last.slot().0 + 1 == next.slot().0
    }

    pub(super) fn offset(&self) -> u64 {
        self.entries.first().map_or(Slot(0), Entry::slot).offset()
    }

    pub(super) fn blocks(&self) -> usize {
        self.entries.len()
    }

    /// The bytes of the piece that lie in the plan's block `index`: where in the block, where in
    /// the payload.
    pub(super) fn part(
        &self,
        index: usize,
        piece: &super::Piece,
    ) -> (std::ops::Range<usize>, usize) {
        let start = (self.from as usize + index) * BLOCK_LEN;
        let low = start.max(piece.skip);
        let high = (start + BLOCK_LEN).min(piece.skip + piece.len);
        (low - start..high - start, piece.at + low - piece.skip)
    }
}
