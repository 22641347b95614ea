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
use crate::volume::map::{Leaf, Missing};
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

    /// As if `lane` had never waited for a range.
    pub(super) fn forget_ranges(&mut self, lane: u16) {
        let Self {
            ranges, inboxes, ..
        } = self;
        ranges.forget(lane, &mut |(lane, piece), held| {
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
        if self.is_pinned_full(*leaves.start()..leaves.end() + 1) {
            return Some(Hurdle::Stall);
        }
        // The last slots are for leaves that are there: what is mapped stays writable when no new
        // leaf has room any more.
        let holes = leaves.clone().map(|leaf| self.map.leaf(leaf));
        let fresh = holes.filter(|leaf| matches!(leaf, Ok(Leaf::Hole))).count();
        let reserve = if fresh > 0 { PAGE_SLOTS_AHEAD } else { 0 };
        let needed = self.page_slots_needed(leaves.count(), fresh, blocks) + reserve;
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

    /// Looks up a piece's blocks and plans a read for each stretch of consecutive slots, as far
    /// as the map is in memory; for the rest the piece comes back when its page has been read.
    fn plan_read(&mut self, core: &mut Core, key: u32) {
        let piece = &mut self.pieces[key as usize];
        let (first, count) = (piece.first, piece.count);
        let mut plans: SmallVec<[ReadPlan; 4]> = SmallVec::new();
        let mut from = piece.known;
        let mut missing = None;
        while from < count && missing.is_none() {
            let block = first + from;
            let leaf = core.map.ask(block / FANOUT);
            let end = count.min((block / FANOUT + 1) * FANOUT - first);
            while from < end {
                let block = first + from;
                let entry = match (core.uncommitted(block), leaf) {
                    (Some(entry), _) => entry,
                    (None, Ok(leaf)) => leaf.entry(block),
                    (None, Err(what)) => {
                        missing = Some(what);
                        break;
                    }
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
                from += 1;
            }
        }
        piece.known = from;
        // Who waits for a page counts as a read, so that the piece is not over before.
        piece.left += plans.len() as u64 + u64::from(missing.is_some());
        for mut plan in plans {
            if !plan.is_hole() {
                plan.epoch = core.space.begin_read();
            }
            self.to_read.push(plan);
        }
        if let Some(missing) = missing {
            self.await_page(core, key, missing);
        }
    }

    /// A piece goes on when a page has been read, or not at all.
    pub(super) fn await_page(&mut self, core: &mut Core, key: u32, missing: Missing) {
        match missing {
            Missing::Page(want) => match core.await_page(want, (self.id, key)) {
                Ok(true) => self.to_load.push(want),
                Ok(false) => {}
                Err(failure) => self.page_read(key, Err(failure)),
            },
            Missing::Lost => self.page_read(key, Err(Failure::NotAuthentic)),
        }
    }

    /// The page that a piece waited for is in memory, or cannot be had.
    pub(super) fn page_read(&mut self, key: u32, outcome: Result<(), Failure>) {
        let piece = &mut self.pieces[key as usize];
        let is_read = piece.kind == PieceKind::Read;
        if is_read {
            piece.left -= 1;
        }
        let Err(failure) = outcome else {
            return self.admit.push_back(key);
        };
        piece.failure = Some(failure);
        let block = piece.first + piece.known;
        if !is_read || piece.left == 0 {
            self.over.push(key);
        }
        if failure == Failure::NotAuthentic {
            self.shared.damaged(block);
        }
    }

    /// Puts pages that were read into the map. Those of this lane that waited for one go on
    /// before the next can push it out again.
    pub(super) fn insert_pages(&mut self, core: &mut Core) {
        for (want, outcome) in std::mem::take(&mut self.loaded) {
            let bytes = outcome.as_deref().map_err(|failure| *failure);
            let waiting = core.page_landed(self.id, &want, bytes);
            let outcome = outcome.map(|buffer| self.pool.give(buffer));
            for key in waiting {
                self.page_read(key, outcome);
            }
            self.admit_all(core);
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
        if piece.kind == PieceKind::Erase {
            return self.erase(core, key);
        }
        let (count, end) = (piece.count, piece.first + piece.count);
        let leaves = piece.first / FANOUT..=(end - 1) / FANOUT;
        if let Some(failure) = core.refuses_writes() {
            return self.fail_piece(key, failure);
        }
        let has_many = leaves.start() != leaves.end();
        for leaf in leaves.clone() {
            if let Err(missing) = core.map.ask(leaf) {
                return self.await_page(core, key, missing);
            }
            // In a small cache, reading one of its leaves could push out the other for ever.
            if has_many && !core.keep(leaf) {
                return self.stall(core, key);
            }
        }
        match core.hurdle(leaves, count as usize, self.shared.sequence_now()) {
            Some(Hurdle::Stall) => return self.stall(core, key),
            Some(Hurdle::Fail(failure)) => return self.fail_piece(key, failure),
            None => {}
        }
        match self.pieces[key as usize].kind {
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
        let entry = match core.entry(first) {
            Ok(entry) => entry,
            Err(missing) => return self.await_page(core, key, missing),
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
        core.land(first, count);
        self.to_seal.push_back(key);
    }

    /// Leaf by leaf, so that a discard of much needs neither all of its leaves at once nor room
    /// for all of its changes.
    fn erase(&mut self, core: &mut Core, key: u32) {
        let piece = &mut self.pieces[key as usize];
        let (first, end) = (piece.first, piece.first + piece.count);
        let mut mapped: SmallVec<[u64; FANOUT as usize]> = SmallVec::new();
        while first + piece.known < end {
            let from = first + piece.known;
            let leaf = from / FANOUT;
            let stop = end.min((leaf + 1) * FANOUT);
            let known = match core.map.ask(leaf) {
                Ok(known) => known,
                Err(missing) => return self.await_page(core, key, missing),
            };
            // Holes that become holes change nothing.
            mapped.clear();
            let is_blank = core.open.is_empty() && core.sealed.is_empty();
            if !(is_blank && matches!(known, Leaf::Hole)) {
                mapped.extend((from..stop).filter(|block| {
                    let newest = core.uncommitted(*block);
                    !newest.unwrap_or_else(|| known.entry(*block)).is_hole()
                }));
            }
            match core.hurdle(leaf..=leaf, mapped.len(), self.shared.sequence_now()) {
                Some(Hurdle::Stall) => return self.stall(core, key),
                Some(Hurdle::Fail(failure)) => return self.fail_piece(key, failure),
                None => {}
            }
            if !mapped.is_empty() {
                core.map.touch(leaf);
            }
            for block in &mapped {
                core.publish(Block(*block), Entry::HOLE, false);
            }
            piece.known = stop - first;
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
