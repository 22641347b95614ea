//! Reads and writes of the backing under way, and what becomes of their results.

use std::io;

use rustix::io::Errno;

use super::{Lane, PieceKind, ReadPlan};
use crate::volume::backing::Barrier;
use crate::volume::buffer::{Buffer, Pool};
use crate::volume::engine::core::Core;
use crate::volume::engine::request::{Io, IoKind, Payload};
use crate::volume::engine::{Failure, Stats};
use crate::volume::entry::Entry;
use crate::volume::geometry::{BLOCK_LEN, Block, SECTOR_LEN, Slot};
use crate::volume::map::Want;
use crate::volume::mutant::{self, Mutant};
use crate::volume::page::Page;
use crate::volume::sealing::seal_block;
use crate::volume::space::Run;

/// How often an operation that was interrupted (EINTR) or put off (EAGAIN) is tried again, at once. Both
/// say that nothing was done, so trying again is safe; that there is an end keeps a broken device from
/// spinning a core.
const PATIENCE: u8 = 8;
/// The same for commits and checkpoints, whose failure ends all writing: worth more patience than a
/// request, which only fails itself.
const JOB_PATIENCE: u8 = 200;
/// With so many data writes of a lane under way, few blocks do not leave but gather in the staging
/// buffer until one of them completes. A batch is otherwise only what one round of a queue found,
/// and each write costs the backing about as much as ten blocks more. No timer: a lone write never
/// waits, and the busier the backing, the longer the writes.
const WRITES_UNDER_WAY: usize = 2;
/// So many blocks leave at once.
const STAGED_BLOCKS: usize = 32;

/// One sealed block of a staging buffer.
pub(super) struct Member {
    piece: u32,
    block: Block,
    entry: Entry,
}

impl Member {
    pub(super) fn delta(&self) -> (Block, Entry) {
        (self.block, self.entry)
    }
}

/// Sealed blocks that will leave as one write.
pub(super) struct Staging {
    start: u64,
    buffer: Buffer,
    members: Vec<Member>,
}

/// A write that has landed, or failed.
pub(super) struct Landed {
    members: Vec<Member>,
    result: Result<(), Failure>,
}

/// A read that has ended.
pub(super) struct Arrived {
    plan: ReadPlan,
    outcome: Result<(), i32>,
    buffer: Buffer,
}

impl Arrived {
    pub(super) fn blocks(&self) -> usize {
        self.plan.blocks()
    }
}

/// What an operation of the backing was for.
pub(super) enum FlightKind {
    Read(ReadPlan),
    /// A page of the map.
    Load(Want),
    Write(Vec<Member>),
    /// Blocks that move.
    Move(u32, Vec<super::rehome::Member>),
    /// Part of the job at this index of its own kind.
    Job(super::jobs::JobKind),
    Punch(Run),
    /// Whole free chunks.
    GiveBack(Run),
    Grow(Run),
}

/// An operation under way.
pub(super) struct Flight {
    pub(super) kind: FlightKind,
    /// Byte offset of the buffer's start.
    offset: u64,
    len: usize,
    /// Bytes that earlier, short transfers moved.
    moved: usize,
    tries: u8,
}

impl<P: Payload> Lane<P> {
    pub(super) fn emit(&mut self, kind: FlightKind, io: IoKind) {
        let (offset, len) = match &io {
            IoKind::Read { offset, buffer, .. } | IoKind::Write { offset, buffer, .. } => {
                (*offset, buffer.len())
            }
            _ => (0, 0),
        };
        let id = self.flights.insert(Flight {
            kind,
            offset,
            len,
            moved: 0,
            tries: 0,
        }) as u32;
        self.out.push_back(Io { id, kind: io });
    }

    pub(super) fn emit_punch(&mut self, run: Run) {
        let (offset, len) = (Slot(run.start).offset(), run.len * BLOCK_LEN as u64);
        self.emit(FlightKind::Punch(run), IoKind::Punch { offset, len });
    }

    pub(super) fn emit_read(&mut self, plan: ReadPlan) {
        if plan.is_hole() {
            return self.read_hole(plan);
        }
        let buffer = self.pool.take(plan.blocks());
        let offset = plan.offset();
        self.emit(
            FlightKind::Read(plan),
            IoKind::Read {
                offset,
                skip: 0,
                buffer,
            },
        );
    }

    pub(super) fn emit_load(&mut self, want: Want) {
        let buffer = self.pool.take(1);
        let offset = want.entry.slot().offset();
        self.emit(
            FlightKind::Load(want),
            IoKind::Read {
                offset,
                skip: 0,
                buffer,
            },
        );
    }

    /// Opens a page here, without the lock.
    fn load_landed(&mut self, want: Want, outcome: Result<(), i32>, buffer: Option<Buffer>) {
        let Some(mut buffer) = buffer else {
            return self.loaded.push((want, Err(Failure::Io(EIO))));
        };
        let opened = outcome.map_err(Failure::Io).and_then(|()| {
            let session = self.keyring.get(want.entry.session());
            let session = session.ok_or(Failure::NotAuthentic)?;
            let id = self.shared.id();
            Page::open_in_place(&mut buffer, want.place, id, session, &want.entry)
                .map_err(|_| Failure::NotAuthentic)
        });
        match opened {
            Ok(()) => self.loaded.push((want, Ok(buffer))),
            Err(failure) => {
                self.pool.give(buffer);
                self.loaded.push((want, Err(failure)));
            }
        }
    }

    fn read_hole(&mut self, plan: ReadPlan) {
        const ZEROS: [u8; BLOCK_LEN] = [0; BLOCK_LEN];
        let piece = &mut self.pieces[plan.piece as usize];
        let payload = self
            .tasks
            .get_mut(piece.task as usize)
            .map(|task| &mut task.payload);
        if let Some(payload) = payload {
            for index in 0..plan.blocks() {
                let (part, at) = plan.part(index, piece);
                if payload.store(at, &ZEROS[part]).is_err() {
                    piece.failure = Some(Failure::Payload);
                }
            }
        }
        self.end_read_plan(plan.piece);
    }

    fn end_read_plan(&mut self, key: u32) {
        let piece = &mut self.pieces[key as usize];
        piece.left -= 1;
        if piece.left == 0 {
            // A read holds no range, so it needs no lock to end.
            self.finish_piece(key);
        }
    }

    /// Copies and seals a piece's blocks into staging buffers.
    pub(super) fn seal_piece(&mut self, key: u32) {
        let piece = &mut self.pieces[key as usize];
        let slots = std::mem::take(&mut piece.slots);
        let (first, mut sequence) = (piece.first, piece.sequence);
        let mut at = piece.at;
        let mut merged = piece.merged.take();
        let task = piece.task;
        for (index, slot) in slots.iter().flat_map(|run| run.slots()).enumerate() {
            let staging = Self::staging_for(&mut self.staging, &mut self.pool, slot);
            let staging = match staging {
                Ok(staging) => staging,
                Err(full) => {
                    self.emit_write(full);
                    let fresh = Staging::at(slot, &mut self.pool);
                    self.staging.insert(fresh)
                }
            };
            let place = staging.members.len();
            staging.buffer.set_blocks(place + 1);
            let data = staging.buffer.block_mut(place);
            let is_loaded = match &merged {
                Some(block) => {
                    data.copy_from_slice(block);
                    true
                }
                None => self
                    .tasks
                    .get_mut(task as usize)
                    .is_some_and(|task| task.payload.load(at, data).is_ok()),
            };
            if !is_loaded {
                // The guest's buffer is not there: the block is sealed as zeros nowhere, its slot
                // goes back.
                staging.buffer.set_blocks(place);
                if let Some(cut) = self.staging.take() {
                    self.emit_write(cut);
                }
                self.unused.push(slot);
                self.pieces[key as usize].failure = Some(Failure::Payload);
                self.landed
                    .push(Landed::nothing(key, Block(first + index as u64)));
            } else if let Some((id, session)) = self.shared.session() {
                let block = Block(first + index as u64);
                let entry = seal_block(block, slot, (id, session), sequence, data);
                staging.members.push(Member {
                    piece: key,
                    block,
                    entry,
                });
            }
            sequence += 1;
            at += BLOCK_LEN;
        }
        if let Some(buffer) = merged.take() {
            self.pool.give(buffer);
        }
    }

    /// The staging buffer that `slot` continues; `Err`: the one that has to leave first.
    fn staging_for<'s>(
        staging: &'s mut Option<Staging>,
        pool: &mut Pool,
        slot: Slot,
    ) -> Result<&'s mut Staging, Staging> {
        match staging.take() {
            None => Ok(staging.insert(Staging::at(slot, pool))),
            Some(current) if current.is_continued_by(slot) => Ok(staging.insert(current)),
            Some(full) => Err(full),
        }
    }

    /// The end of a turn. What is staged leaves, unless it is little and enough writes are under
    /// way: then it gathers more until one of them completes, which is the next turn.
    pub(super) fn emit_staging(&mut self) {
        let is_kept = self.staging.as_ref().is_some_and(|staging| {
            self.writes_under_way >= WRITES_UNDER_WAY && staging.members.len() < STAGED_BLOCKS
        });
        if !is_kept && let Some(staging) = self.staging.take() {
            self.emit_write(staging);
        }
    }

    fn emit_write(&mut self, staging: Staging) {
        let Staging {
            start,
            buffer,
            members,
        } = staging;
        if members.is_empty() {
            return self.pool.give(buffer);
        }
        Stats::add(&self.shared.stats().blocks_sealed, members.len() as u64);
        if mutant::is(Mutant::EarlyAck) {
            let early = members.iter().map(|m| Member {
                piece: m.piece,
                block: m.block,
                entry: m.entry,
            });
            self.landed.push(Landed {
                members: early.collect(),
                result: Ok(()),
            });
            self.wants_lock = true;
        }
        self.draft(&members);
        let buffer = self.fitted(buffer);
        let offset = Slot(start).offset();
        self.writes_under_way += 1;
        self.emit(
            FlightKind::Write(members),
            IoKind::Write {
                offset,
                skip: 0,
                buffer,
            },
        );
    }

    /// Staging buffers are as large as any. What is short leaves in a buffer of its own size: on
    /// fragmented space hundreds of one-block writes are under way, and 256 KiB for each would
    /// outgrow the pool and be allocated, and zeroed, anew.
    fn fitted(&mut self, buffer: Buffer) -> Buffer {
        if buffer.blocks() * 4 > buffer.capacity_blocks() {
            return buffer;
        }
        let mut small = self.pool.take(buffer.blocks());
        small.copy_from_slice(&buffer);
        self.pool.give(buffer);
        small
    }

    /// The result of an operation: bytes moved, or the negated errno, as io_uring gives it.
    /// `buffer` is the one that the operation came with.
    pub fn on_io(&mut self, id: u32, result: i32, buffer: Option<Buffer>) {
        let Some(flight) = self.flights.get_mut(id as usize) else {
            return;
        };
        let is_retry = [Errno::INTR, Errno::AGAIN]
            .map(|e| -e.raw_os_error())
            .contains(&result);
        let patience = match flight.kind {
            FlightKind::Job(_) => JOB_PATIENCE,
            _ => PATIENCE,
        };
        let outcome = if is_retry && flight.tries < patience {
            flight.tries += 1;
            None
        } else if result < 0 {
            Some(Err(-result))
        } else {
            // A short transfer goes on where it stopped.
            flight.moved += result as usize;
            match flight.len.saturating_sub(flight.moved) {
                0 => Some(Ok(())),
                _ if result == 0 || !(result as u64).is_multiple_of(SECTOR_LEN) => Some(Err(EIO)),
                _ => None,
            }
        };
        let Some(outcome) = outcome else {
            return self.retry(id, buffer);
        };
        let flight = self.flights.remove(id as usize);
        if let Err(errno) = outcome {
            Stats::add(&self.shared.stats().backing_errors, 1);
            self.shared
                .reporter()
                .backing_failed(flight.kind.name(), errno);
        }
        match flight.kind {
            FlightKind::Read(plan) => {
                // The backing's copy is no longer looked at.
                self.ended.push(plan.epoch);
                if let Some(buffer) = buffer {
                    self.to_open.push_back(Arrived {
                        plan,
                        outcome,
                        buffer,
                    });
                }
            }
            FlightKind::Load(want) => self.load_landed(want, outcome, buffer),
            FlightKind::Write(members) => {
                self.writes_under_way -= 1;
                let result = outcome.map_err(write_failure);
                if !mutant::is(Mutant::EarlyAck) {
                    self.landed.push(Landed { members, result });
                }
                if let Some(buffer) = buffer {
                    self.pool.give(buffer);
                }
            }
            FlightKind::Move(piece, members) => {
                self.move_landed(piece, members, outcome.map_err(write_failure));
                if let Some(buffer) = buffer {
                    self.pool.give(buffer);
                }
            }
            FlightKind::GiveBack(run) => self.given_back(run, outcome),
            FlightKind::Job(kind) => self.job_landed(kind, outcome),
            FlightKind::Punch(run) => self.punched(run, outcome),
            FlightKind::Grow(run) => self.grown(run, outcome),
        }
    }

    fn retry(&mut self, id: u32, buffer: Option<Buffer>) {
        let Some(flight) = self.flights.get(id as usize) else {
            return;
        };
        let (offset, skip) = (flight.offset + flight.moved as u64, flight.moved);
        let kind = match (&flight.kind, buffer) {
            (FlightKind::Read(_) | FlightKind::Load(_), Some(buffer)) => IoKind::Read {
                offset,
                skip,
                buffer,
            },
            (_, Some(buffer)) => IoKind::Write {
                offset,
                skip,
                buffer,
            },
            (FlightKind::Punch(run) | FlightKind::GiveBack(run), None) => IoKind::Punch {
                offset: Slot(run.start).offset(),
                len: run.len * BLOCK_LEN as u64,
            },
            (FlightKind::Grow(run), None) => IoKind::Allocate {
                offset: Slot(run.start).offset(),
                len: run.len * BLOCK_LEN as u64,
            },
            (FlightKind::Job(kind), None) => IoKind::Sync(kind.barrier()),
            _ => IoKind::Sync(Barrier::Commit),
        };
        self.out.push_back(Io { id, kind });
    }

    /// Opens what was read and hands it to the guest.
    pub(super) fn open_arrived(&mut self, arrived: Arrived) {
        let Arrived {
            plan,
            outcome,
            mut buffer,
        } = arrived;
        let key = plan.piece;
        let piece = &mut self.pieces[key as usize];
        if piece.kind == PieceKind::Move {
            return self.move_read(plan, outcome, buffer);
        }
        let is_merge = piece.kind != PieceKind::Read;
        if let Err(errno) = outcome {
            piece.failure = Some(Failure::Io(errno));
        } else {
            Stats::add(&self.shared.stats().blocks_opened, plan.blocks() as u64);
            for (index, entry) in plan.entries.iter().enumerate() {
                let block = piece.first + plan.from + index as u64;
                let data = buffer.block_mut(index);
                if self.keyring.open_block(Block(block), entry, data).is_err() {
                    piece.failure = Some(Failure::NotAuthentic);
                    self.shared.damaged(block);
                    continue;
                }
                if is_merge {
                    continue;
                }
                let (part, at) = plan.part(index, piece);
                let task = self.tasks.get_mut(piece.task as usize);
                if task.is_none_or(|task| task.payload.store(at, &data[part]).is_err()) {
                    piece.failure = Some(Failure::Payload);
                }
            }
        }
        if !is_merge {
            self.pool.give(buffer);
            self.end_read_plan(key);
        } else if piece.failure.is_some() {
            self.pool.give(buffer);
            self.over.push(key);
        } else if self.merge(key, &mut buffer) {
            self.pieces[key as usize].merged = Some(buffer);
            self.admit.push_back(key);
        } else {
            self.pool.give(buffer);
        }
    }

    /// Publishes what has landed: from here on it is what reads see, and it is acknowledged.
    pub(super) fn publish_landed(&mut self, core: &mut Core) {
        let had_landed = !self.landed.is_empty();
        let mut has_failed = false;
        for Landed { members, result } in std::mem::take(&mut self.landed) {
            has_failed |= result.is_err();
            let is_in_ring = result.is_ok() && self.append_to_ring(core, &members);
            core.habit.note_write(members.len());
            for member in members {
                let is_placeholder = member.entry.is_hole();
                core.draft_landed(member.block, &member.entry, result.is_ok());
                match result {
                    Ok(()) if !is_placeholder => {
                        core.publish(member.block, member.entry, is_in_ring);
                    }
                    Err(failure) if !is_placeholder => {
                        core.space.free_now(member.entry.slot());
                        self.pieces[member.piece as usize].failure = Some(failure);
                    }
                    _ => {}
                }
                core.landed(member.block);
                let piece = &mut self.pieces[member.piece as usize];
                piece.left -= 1;
                if piece.left == 0 {
                    self.over.push(member.piece);
                }
            }
        }
        if had_landed && (has_failed || core.open.is_empty()) {
            // Who waits for these to be committed waits for nothing.
            core.feed_starved();
        }
    }

    /// Whether the delta ring holds them now.
    fn append_to_ring(&mut self, core: &mut Core, members: &[Member]) -> bool {
        let Some((_, session)) = core.session.clone() else {
            return false;
        };
        let real = members.iter().filter(|member| !member.entry.is_hole());
        let deltas: smallvec::SmallVec<[(Block, Entry); 64]> =
            real.map(|member| (member.block, member.entry)).collect();
        let Some((block, entry)) = deltas.first() else {
            return false;
        };
        // A write is drafted whole or not at all.
        let batch = core.batch_of(*block, entry);
        let Some(ring) = &mut core.ring else {
            return false;
        };
        let sequence = self.shared.take_sequences(1);
        if ring.append(batch, &mut deltas.iter().copied(), &session, sequence) {
            return true;
        }
        // The ring is full: these are acknowledged only when they are durable.
        core.ring_pressure = true;
        for member in members {
            let task = self.pieces[member.piece as usize].task;
            if let Some(task) = self.tasks.get_mut(task as usize) {
                task.wants_commit = true;
            }
        }
        false
    }

    fn punched(&mut self, run: Run, outcome: Result<(), i32>) {
        let mut core = self.shared.lock();
        core.punches -= 1;
        if outcome.is_err() {
            // Not every backing can: the slots are free all the same.
            core.can_punch = false;
        }
        drop(core);
        self.unused.extend(run.slots());
    }
}

const EIO: i32 = 5;

fn write_failure(errno: i32) -> Failure {
    match io::Error::from_raw_os_error(errno).kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Failure::NoSpace,
        _ => Failure::Io(errno),
    }
}

impl FlightKind {
    fn name(&self) -> &'static str {
        match self {
            Self::Read(_) => "reading data",
            Self::Load(_) => "reading the map",
            Self::Write(_) => "writing data",
            Self::Job(kind) => kind.name(),
            Self::Move(..) => "moving data",
            Self::Punch(_) | Self::GiveBack(_) => "giving room back",
            Self::Grow(_) => "making room for the map",
        }
    }
}

impl Landed {
    /// A block of a piece that came to nothing.
    fn nothing(piece: u32, block: Block) -> Self {
        let member = Member {
            piece,
            block,
            entry: Entry::HOLE,
        };
        Self {
            members: vec![member],
            result: Ok(()),
        }
    }
}

impl Staging {
    fn at(slot: Slot, pool: &mut Pool) -> Self {
        let mut buffer = pool.take(Pool::MAX_BLOCKS);
        buffer.set_blocks(0);
        Self {
            start: slot.0,
            buffer,
            members: Vec::new(),
        }
    }

    fn is_continued_by(&self, slot: Slot) -> bool {
        self.members.len() < Pool::MAX_BLOCKS && self.start + self.members.len() as u64 == slot.0
    }
}
