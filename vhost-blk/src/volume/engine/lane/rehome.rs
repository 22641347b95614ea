//! A piece that moves blocks: see [`rehome`](super::super::rehome) on why it may.
//!
//! Admitted twice: first its blocks are looked up and reads planned; when all have been read and
//! verified it takes slots, and what is written leaves at once, past the staging buffer of guests.

use super::admit::Hurdle;
use super::flight::FlightKind;
use super::{Lane, ReadPlan};
use crate::volume::buffer::Buffer;
use crate::volume::engine::core::Core;
use crate::volume::engine::request::{IoKind, Op, Payload, Rehoming};
use crate::volume::engine::{Failure, Stats};
use crate::volume::entry::Entry;
use crate::volume::geometry::{BLOCK_LEN, Block, FANOUT, Slot};
use crate::volume::mutant::{self, Mutant};
use crate::volume::space::Run;

/// A piece in more runs than this is gathered: one is ideal, and a border of chunks makes two.
const RUNS_MAX: u64 = 2;

/// What a piece moves.
pub(super) struct Moving {
    /// Counted from the piece's first block, with the entries that were looked up.
    blocks: Vec<(u64, Entry)>,
    /// The piece's sealed blocks; of those that do not move, old bytes.
    sealed: Buffer,
    is_read: bool,
}

impl Moving {
    pub(super) fn into_buffer(self) -> Buffer {
        self.sealed
    }
}

/// A block on its way.
#[derive(Clone, Copy)]
pub(super) struct Member {
    block: Block,
    from: Entry,
    to: Entry,
}

/// Consecutive slots to be written.
pub(super) struct MoveWrite {
    piece: u32,
    members: Vec<Member>,
}

/// They have landed, or failed.
pub(super) struct Moved {
    piece: u32,
    members: Vec<Member>,
    result: Result<(), Failure>,
}

impl<P: Payload> Lane<P> {
    pub(super) fn admit_move(&mut self, core: &mut Core, key: u32) {
        let piece = &self.pieces[key as usize];
        if let Some(failure) = core.refuses_writes() {
            return self.fail_piece(key, failure);
        }
        let leaves = piece.first / FANOUT..=(piece.first + piece.count - 1) / FANOUT;
        let has_many = leaves.start() != leaves.end();
        for leaf in leaves {
            if let Err(missing) = core.map.ask(leaf) {
                return self.await_page(core, key, missing);
            }
            if has_many && !core.keep(leaf) {
                return self.stall(core, key);
            }
        }
        let piece = &mut self.pieces[key as usize];
        if piece.moving.as_ref().is_some_and(|moving| moving.is_read) {
            self.place_move(core, key);
        } else {
            self.plan_move(core, key);
        }
    }

    fn mode(&self, key: u32) -> Rehoming {
        let task = self.pieces[key as usize].task;
        match self.tasks.get(task as usize).map(|task| task.op) {
            Some(Op::Rehome { mode, .. }) => mode,
            _ => Rehoming::Gather,
        }
    }

    fn plan_move(&mut self, core: &mut Core, key: u32) {
        let mode = self.mode(key);
        let piece = &mut self.pieces[key as usize];
        let (first, count) = (piece.first, piece.count);
        let mut blocks: Vec<(u64, Entry)> = Vec::new();
        let (mut runs, mut is_in_the_way) = (0, false);
        let mut last = 0;
        for index in 0..count {
            let Some(entry) = core.movable(first + index) else {
                continue;
            };
            let slot = entry.slot();
            runs += u64::from(slot.0 != last + 1);
            last = slot.0;
            let is_victim = core.space.is_victim(slot);
            is_in_the_way |= is_victim;
            if is_victim || mode == Rehoming::Gather {
                blocks.push((index, entry));
            }
        }
        if blocks.is_empty() || !(is_in_the_way || mode == Rehoming::Gather && runs > RUNS_MAX) {
            return self.over.push(key);
        }
        let mut plans: Vec<ReadPlan> = Vec::new();
        for (index, entry) in &blocks {
            match plans.last_mut() {
                Some(plan)
                    if plan.from + plan.blocks() as u64 == *index
                        && plan.is_continued_by(entry) =>
                {
                    plan.entries.push(*entry);
                }
                _ => plans.push(ReadPlan {
                    piece: key,
                    from: *index,
                    entries: smallvec::smallvec![*entry],
                    epoch: core.space.begin_read(),
                }),
            }
        }
        piece.left = plans.len() as u64;
        piece.moving = Some(Box::new(Moving {
            blocks,
            sealed: self.pool.take(count as usize),
            is_read: false,
        }));
        self.to_read.append(&mut plans);
    }

    /// What is to move was read: it is kept sealed as it is, if it authenticates.
    pub(super) fn move_read(
        &mut self,
        plan: ReadPlan,
        outcome: Result<(), i32>,
        mut buffer: Buffer,
    ) {
        let piece = &mut self.pieces[plan.piece as usize];
        piece.left -= 1;
        let is_last = piece.left == 0;
        if let Err(errno) = outcome {
            piece.failure = Some(Failure::Io(errno));
        }
        if let Some(moving) = &mut piece.moving {
            for (at, entry) in plan.entries.iter().enumerate() {
                let index = plan.from + at as u64;
                let block = Block(piece.first + index);
                let copy = moving.sealed.block_mut(index as usize);
                let data = buffer.block_mut(at);
                copy.copy_from_slice(data);
                let is_sound = outcome.is_ok()
                    && (self.keyring.open_block(block, entry, data).is_ok() || {
                        self.shared.damaged(block.0);
                        false
                    });
                if !is_sound {
                    moving.blocks.retain(|(other, _)| *other != index);
                }
            }
            moving.is_read = is_last;
        }
        self.pool.give(buffer);
        if is_last {
            self.admit.push_back(plan.piece);
        }
    }

    fn place_move(&mut self, core: &mut Core, key: u32) {
        let mode = self.mode(key);
        let piece = &mut self.pieces[key as usize];
        let (first, count) = (piece.first, piece.count);
        let Some(moving) = &mut piece.moving else {
            return self.over.push(key);
        };
        // What the guest wrote meanwhile stays where that is.
        moving
            .blocks
            .retain(|(index, entry)| core.movable(first + index) == Some(*entry));
        let blocks = moving.blocks.clone();
        if blocks.is_empty() {
            return self.over.push(key);
        }
        let leaves = first / FANOUT..=(first + count - 1) / FANOUT;
        match core.hurdle(leaves, blocks.len(), 0) {
            Some(Hurdle::Stall) => return self.stall(core, key),
            Some(Hurdle::Fail(failure)) => return self.fail_piece(key, failure),
            None => {}
        }
        let mut writes: Vec<MoveWrite> = Vec::new();
        let mut placed = 0;
        for (index, from) in blocks {
            let Some(slot) = self.slot_to_move_to(core, mode) else {
                self.pieces[key as usize].failure = Some(Failure::NoSpace);
                break;
            };
            if mode == Rehoming::Evacuate {
                core.scattered.mark(first + index);
            }
            let to = from.moved_to(slot);
            let block = Block(first + index);
            let member = Member { block, from, to };
            match writes.last_mut() {
                Some(MoveWrite { members, .. })
                    if members.last().is_some_and(|m| m.to.slot().0 + 1 == slot.0) =>
                {
                    members.push(member);
                }
                _ => writes.push(MoveWrite {
                    piece: key,
                    members: vec![member],
                }),
            }
            core.land(block.0, 1);
            placed += 1;
        }
        if placed == 0 {
            return self.over.push(key);
        }
        self.pieces[key as usize].left = placed;
        self.to_move.append(&mut writes);
    }

    fn slot_to_move_to(&mut self, core: &mut Core, mode: Rehoming) -> Option<Slot> {
        if self.move_run.len == 0 {
            let garbage = core.garbage();
            self.move_run = match mode {
                Rehoming::Gather => core.space.take_whole(garbage),
                Rehoming::Evacuate => core.space.take_hole(),
            }?;
        }
        self.move_run.take(1).slots().next()
    }

    /// Without the lock: writes what was placed.
    pub(super) fn emit_moves(&mut self) {
        for MoveWrite { piece, members } in std::mem::take(&mut self.to_move) {
            let mut buffer = self.pool.take(members.len());
            let owner = &self.pieces[piece as usize];
            let Some((moving, first)) = owner.moving.as_ref().zip(members.first()) else {
                continue;
            };
            for (at, member) in members.iter().enumerate() {
                let index = (member.block.0 - owner.first) as usize;
                let sealed = moving.sealed.block(index);
                buffer.block_mut(at).copy_from_slice(sealed);
            }
            let offset = first.to.slot().offset();
            if mutant::is(Mutant::MoveUnwritten) {
                self.moved.push(Moved {
                    piece,
                    members: members.clone(),
                    result: Ok(()),
                });
                self.wants_lock = true;
            }
            self.emit(
                FlightKind::Move(piece, members),
                IoKind::Write {
                    offset,
                    skip: 0,
                    buffer,
                },
            );
        }
    }

    pub(super) fn move_landed(
        &mut self,
        piece: u32,
        members: Vec<Member>,
        result: Result<(), Failure>,
    ) {
        if !mutant::is(Mutant::MoveUnwritten) {
            self.moved.push(Moved {
                piece,
                members,
                result,
            });
        }
    }

    pub(super) fn publish_moved(&mut self, core: &mut Core) {
        let mut has_failed = false;
        for moved in std::mem::take(&mut self.moved) {
            let piece = &mut self.pieces[moved.piece as usize];
            piece.left -= moved.members.len() as u64;
            if piece.left == 0 {
                self.over.push(moved.piece);
            }
            if let Err(failure) = moved.result {
                piece.failure = Some(failure);
            }
            has_failed |= moved.result.is_err();
            for Member { block, from, to } in moved.members {
                if moved.result.is_err() {
                    core.space.free_now(to.slot());
                } else if core.publish_move(block, &from, to) {
                    Stats::add(&self.shared.stats().blocks_moved, 1);
                }
                core.landed(block);
            }
            if has_failed || core.open.is_empty() {
                core.feed_starved();
            }
        }
    }

    /// Gives whole free chunks back to the file system, all but `keep` of those that have room
    /// there. To be called between requests; a [`Lane::turn`] has to follow.
    pub fn give_back(&mut self, keep: u64) {
        let shared = std::sync::Arc::clone(&self.shared);
        let mut core = shared.lock();
        if !core.can_punch {
            return;
        }
        let mut runs: Vec<Run> = Vec::new();
        for run in core.space.take_backed(keep) {
            match runs.last_mut() {
                Some(last) if last.start + last.len == run.start => last.len += run.len,
                _ => runs.push(run),
            }
        }
        core.punches += runs.len();
        drop(core);
        for run in runs {
            let (offset, len) = (Slot(run.start).offset(), run.len * BLOCK_LEN as u64);
            self.emit(FlightKind::GiveBack(run), IoKind::Punch { offset, len });
        }
    }

    pub(super) fn given_back(&mut self, run: Run, outcome: Result<(), i32>) {
        let mut core = self.shared.lock();
        core.punches -= 1;
        core.can_punch &= outcome.is_ok();
        core.space.return_chunks(run, outcome.is_ok());
        core.feed_starved();
        drop(core);
        self.wants_lock = true;
    }
}
