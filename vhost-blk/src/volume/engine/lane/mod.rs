//! One queue's part of the engine.
//!
//! A request becomes a *task*; a task is cut into *pieces* of at most 64 blocks, issued as the
//! lane's budget of buffered bytes allows; a piece becomes I/O. So neither a guest's request size
//! nor its queue depth decides how much memory a card uses.
//!
//! A turn has two parts. [`Lane::advance`] takes the core's lock once: everything that has landed
//! is published, everything new gets its entries, ranges and slots, and reads are emitted.
//! [`Lane::work`] opens what was read and copies and seals what is to be written into *staging*
//! buffers, where the writes of a batch, of whichever requests, take consecutive slots and leave
//! as one contiguous write. It stops after some blocks, so that what is done is told and what is
//! new is submitted while the rest waits: a guest and a disk that wait for the last of sixteen
//! large requests before they go on stand still most of the time. [`Lane::turn`] does all there is.

mod admit;
mod flight;
mod jobs;
mod rehome;

use std::collections::VecDeque;
use std::sync::Arc;

use slab::Slab;
use smallvec::SmallVec;

use self::flight::{Arrived, Flight, Landed, Staging};
use self::jobs::Job;
use self::rehome::{MoveWrite, Moved, Moving};
use super::core::{Core, Event, Phase};
use super::request::{Done, Io, Op, Payload};
use super::volume::Shared;
use super::{Failure, WakeLane};
use crate::volume::buffer::{Buffer, Pool};
use crate::volume::entry::Entry;
use crate::volume::geometry::{BLOCK_LEN, SECTOR_LEN, Slot};
use crate::volume::map::Want;
use crate::volume::ranges::Held;
use crate::volume::sealing::Keyring;
use crate::volume::space::Run;

/// Bytes that a lane's requests may have in buffers at a time.
const BUDGET_BYTES: usize = 8 << 20;
/// Blocks of a discard that are looked at under one lock.
const ERASE_BLOCKS: u64 = 1024;
/// Bytes of the budget for such a piece.
const ERASE_COST: usize = 64 << 10;

struct Task<P> {
    payload: P,
    op: Op,
    /// Bytes of the request that pieces were made of.
    issued: u64,
    /// Pieces under way.
    pieces: u32,
    failure: Option<Failure>,
    wants_commit: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PieceKind {
    Read,
    /// Whole blocks.
    Write,
    /// Part of one block: read, merge, write.
    Merge,
    /// Part of one block becomes zeros.
    MergeZeroes,
    /// Whole blocks become holes.
    Erase,
    /// Whole blocks get other places.
    Move,
}

struct Piece {
    task: u32,
    kind: PieceKind,
    /// First block.
    first: u64,
    /// Blocks.
    count: u64,
    /// Where in the payload it begins.
    at: usize,
    /// Bytes of its first block that come before it.
    skip: usize,
    /// Bytes of it.
    len: usize,
    held: Option<Held>,
    slots: SmallVec<[Run; 2]>,
    sequence: u64,
    /// The merged block.
    merged: Option<Buffer>,
    /// What moves, once it is looked up.
    moving: Option<Box<Moving>>,
    /// Blocks or reads still under way.
    left: u64,
    /// Blocks, from the first on, that were looked up (a read) or erased.
    known: u64,
    failure: Option<Failure>,
}

impl Piece {
    /// Bytes of the budget that it takes. One that erases has no buffer; what it costs bounds how
    /// many a guest's discard of everything makes at a time.
    const fn cost(&self) -> usize {
        match self.kind {
            PieceKind::Erase => ERASE_COST,
            _ => self.count as usize * BLOCK_LEN,
        }
    }
}

/// A stretch of consecutive slots to read.
struct ReadPlan {
    piece: u32,
    /// First block, counted from the piece's first.
    from: u64,
    entries: SmallVec<[Entry; 1]>,
    epoch: u64,
}

/// See the module.
pub struct Lane<P> {
    shared: Arc<Shared>,
    id: u16,
    keyring: Arc<Keyring>,
    keyring_version: u64,
    tasks: Slab<Task<P>>,
    pieces: Slab<Piece>,
    flights: Slab<Flight>,
    jobs: Vec<Job>,
    /// Tasks with bytes to issue.
    unissued: VecDeque<u32>,
    /// Pieces that want the lock.
    admit: VecDeque<u32>,
    /// Pieces that wait for room; tried again when there is news.
    stalled: VecDeque<u32>,
    /// Pieces with slots, to be sealed.
    to_seal: VecDeque<u32>,
    to_read: Vec<ReadPlan>,
    /// Reads that have ended, to be opened.
    to_open: VecDeque<Arrived>,
    /// Pages of the map to be read.
    to_load: Vec<Want>,
    /// Pages of the map that have landed, opened.
    loaded: Vec<(Want, Result<Buffer, Failure>)>,
    landed: Vec<Landed>,
    /// Epochs of reads that ended.
    ended: Vec<u64>,
    /// Pieces that hold a range and are over.
    over: Vec<u32>,
    /// Slots that were taken and not used.
    unused: Vec<Slot>,
    to_commit: Vec<u32>,
    staging: Option<Staging>,
    /// Data writes in the hands of the backing.
    writes_under_way: usize,
    run: Run,
    /// Slots for blocks that move.
    move_run: Run,
    to_move: Vec<MoveWrite>,
    moved: Vec<Moved>,
    /// A guest's request came since the lock was last held.
    has_request: bool,
    pool: Pool,
    buffered: usize,
    out: VecDeque<Io>,
    done: VecDeque<Done<P>>,
    wants_lock: bool,
    /// A lone small write is probably followed by a flush.
    may_draft: bool,
}

/// The lane's unused slots and its inbox are for others. Slots of writes that are still under way
/// stay taken until the volume is opened again: the kernel may write to them yet.
impl<P> Drop for Lane<P> {
    fn drop(&mut self) {
        let mut core = self.shared.lock();
        for slot in self.run.slots().chain(self.move_run.slots()) {
            core.space.free_now(slot);
        }
        core.abandon_loads(self.id);
        let wakes = core.wakes(self.id);
        if self.tasks.is_empty() && self.flights.is_empty() && self.jobs.is_empty() {
            core.idle_inboxes.push(self.id);
        }
        drop(core);
        for wake in wakes {
            wake();
        }
    }
}

impl<P: Payload> Lane<P> {
    /// A lane of `shared`. `wake` must make its thread call [`Lane::on_wake`] and
    /// [`Lane::turn`].
    pub fn new(shared: Arc<Shared>, wake: WakeLane) -> Self {
        let mut core = shared.lock();
        let id = core.add_inbox(wake);
        let keyring = Arc::clone(&core.keyring);
        let keyring_version = core.keyring_version;
        drop(core);
        Self {
            shared,
            id,
            keyring,
            keyring_version,
            tasks: Slab::new(),
            pieces: Slab::new(),
            flights: Slab::new(),
            jobs: Vec::new(),
            unissued: VecDeque::new(),
            admit: VecDeque::new(),
            stalled: VecDeque::new(),
            to_seal: VecDeque::new(),
            to_read: Vec::new(),
            to_open: VecDeque::new(),
            to_load: Vec::new(),
            loaded: Vec::new(),
            landed: Vec::new(),
            ended: Vec::new(),
            over: Vec::new(),
            unused: Vec::new(),
            to_commit: Vec::new(),
            staging: None,
            writes_under_way: 0,
            run: Run::default(),
            move_run: Run::default(),
            to_move: Vec::new(),
            moved: Vec::new(),
            has_request: false,
            pool: Pool::default(),
            buffered: 0,
            out: VecDeque::new(),
            done: VecDeque::new(),
            wants_lock: false,
            may_draft: false,
        }
    }

    /// Takes a request. It goes on with the next [`Lane::turn`].
    pub fn submit(&mut self, op: Op, payload: P) {
        let (len, wants_commit) = match op {
            Op::Read { len, .. } => (len, false),
            Op::Write { len, durable, .. } => (len, durable),
            Op::Discard { len, .. } | Op::WriteZeroes { len, .. } => (len, true),
            Op::Rehome { len, .. } => (len, false),
            Op::Flush => (0, true),
        };
        self.has_request |= !matches!(op, Op::Rehome { .. } | Op::Flush);
        let failure = (!self.is_in_volume(op)).then_some(Failure::Range);
        let task = Task {
            payload,
            op,
            issued: 0,
            pieces: 0,
            failure,
            wants_commit,
        };
        let key = self.tasks.insert(task) as u32;
        if len > 0 && failure.is_none() {
            self.unissued.push_back(key);
        } else {
            self.settle_task(key);
        }
    }

    fn is_in_volume(&self, op: Op) -> bool {
        let (Op::Read { offset, len }
        | Op::Write { offset, len, .. }
        | Op::Discard { offset, len }
        | Op::Rehome { offset, len, .. }
        | Op::WriteZeroes { offset, len }) = op
        else {
            return true;
        };
        offset.is_multiple_of(SECTOR_LEN)
            && len.is_multiple_of(SECTOR_LEN)
            && offset
                .checked_add(len)
                .is_some_and(|end| end <= self.shared.volume_len())
    }

    /// Does everything that can be done now. To be called after requests, results or wakes.
    pub fn turn(&mut self) {
        loop {
            self.advance();
            self.work(usize::MAX);
            if !self.has_work() {
                break;
            }
        }
    }

    /// The first part of a turn: all but opening and sealing.
    pub fn advance(&mut self) {
        loop {
            self.issue();
            if !self.has_work() {
                break;
            }
            self.locked();
            for want in std::mem::take(&mut self.to_load) {
                self.emit_load(want);
            }
            for plan in std::mem::take(&mut self.to_read) {
                self.emit_read(plan);
            }
        }
    }

    /// The second part of a turn: opens and seals, but stops when it has done `blocks` blocks.
    pub fn work(&mut self, blocks: usize) {
        let mut done = 0;
        while done < blocks
            && let Some(arrived) = self.to_open.pop_front()
        {
            done += arrived.blocks();
            self.open_arrived(arrived);
        }
        // At least one, so that reads do not keep writes waiting.
        while let Some(key) = self.to_seal.pop_front() {
            done += self.pieces[key as usize].count as usize;
            self.seal_piece(key);
            if done >= blocks {
                break;
            }
        }
        if self.to_seal.is_empty() {
            self.emit_staging();
        }
    }

    /// Whether [`Lane::work`] has something to do.
    pub fn has_blocks(&self) -> bool {
        !(self.to_open.is_empty() && self.to_seal.is_empty())
    }

    /// Whether a turn would do something.
    pub fn has_more(&self) -> bool {
        self.has_blocks() || self.has_work()
    }

    fn has_work(&self) -> bool {
        self.wants_lock
            || !(self.admit.is_empty()
                && self.landed.is_empty()
                && self.moved.is_empty()
                && self.loaded.is_empty()
                && self.ended.is_empty()
                && self.over.is_empty()
                && self.unused.is_empty()
                && self.to_commit.is_empty())
    }

    /// Whether there is an operation for the backing.
    pub fn has_io(&self) -> bool {
        !self.out.is_empty()
    }

    /// The next operation for the backing.
    pub fn next_io(&mut self) -> Option<Io> {
        self.out.pop_front()
    }

    /// The next finished request.
    pub fn next_done(&mut self) -> Option<Done<P>> {
        self.done.pop_front()
    }

    /// Somebody called this lane's waker.
    pub fn on_wake(&mut self) {
        self.wants_lock = true;
    }

    /// Requests taken and not yet given back.
    pub fn tasks(&self) -> usize {
        self.tasks.len() + self.done.len()
    }

    /// Operations and background jobs under way.
    pub fn is_idle(&self) -> bool {
        self.tasks() == 0
            && self.flights.is_empty()
            && self.jobs.is_empty()
            && self.out.is_empty()
            && self.to_open.is_empty()
    }

    /// The lane's thread ends although operations of it are under way, and no result of them will ever
    /// come. What it was at is not known, so writing ends for all; nobody waits for the lane any
    /// more. It must not be dropped: the kernel may have its buffers.
    pub fn abandon(&mut self) {
        let shared = Arc::clone(&self.shared);
        let mut core = shared.lock();
        // First, so that nothing is granted to it any more.
        core.forget_ranges(self.id);
        for (_, piece) in &mut self.pieces {
            if let Some(held) = piece.held.take() {
                core.release_range(held);
            }
        }
        for event in core.take_events(self.id) {
            if let Event::Granted(_, held) = event {
                core.release_range(held);
            }
        }
        core.abandon_loads(self.id);
        if self.jobs.iter().any(Job::is_checkpoint) {
            core.is_mirroring = false;
        }
        let was_poisoned = core.is_poisoned;
        if core.phase == Phase::Serving {
            core.poison();
        }
        core.starved.retain(|lane| *lane != self.id);
        let is_news = core.is_poisoned && !was_poisoned;
        let wakes = core.wakes(self.id);
        drop(core);
        for wake in wakes {
            wake();
        }
        if is_news {
            shared.reporter().poisoned("serving a queue");
        }
    }

    /// The most pieces that there were at a time.
    #[cfg(test)]
    pub(crate) fn peak_pieces(&self) -> usize {
        self.pieces.capacity()
    }

    /// Cuts tasks into pieces while there is room for their bytes.
    fn issue(&mut self) {
        while let Some(key) = self.unissued.front().copied() {
            if self.buffered >= BUDGET_BYTES {
                return;
            }
            let Some(task) = self.tasks.get_mut(key as usize) else {
                self.unissued.pop_front();
                continue;
            };
            let piece = if task.failure.is_some() {
                None
            } else {
                next_piece(key, task)
            };
            let Some(piece) = piece else {
                self.unissued.pop_front();
                task.issued = u64::MAX;
                if task.pieces == 0 {
                    self.settle_task(key);
                }
                continue;
            };
            task.pieces += 1;
            self.buffered += piece.cost();
            let piece = self.pieces.insert(piece) as u32;
            self.admit.push_back(piece);
        }
    }

    /// All of a task's pieces are over (or it has none): on to the commit, or done.
    fn settle_task(&mut self, key: u32) {
        let Some(task) = self.tasks.get(key as usize) else {
            return;
        };
        if task.failure.is_none() && task.wants_commit {
            self.to_commit.push(key);
        } else {
            self.finish_task(key, Ok(()));
        }
    }

    fn finish_task(&mut self, key: u32, result: Result<(), Failure>) {
        let task = self.tasks.remove(key as usize);
        let result = task.failure.map_or(result, Err);
        self.done.push_back(Done {
            payload: task.payload,
            result,
        });
    }

    /// A piece that holds nothing any more is over.
    fn finish_piece(&mut self, key: u32) {
        let piece = self.pieces.remove(key as usize);
        debug_assert!(piece.held.is_none());
        self.buffered -= piece.cost();
        if let Some(buffer) = piece.merged {
            self.pool.give(buffer);
        }
        if let Some(moving) = piece.moving {
            self.pool.give(moving.into_buffer());
        }
        let Some(task) = self.tasks.get_mut(piece.task as usize) else {
            return;
        };
        task.pieces -= 1;
        task.failure = task.failure.or(piece.failure);
        if task.pieces == 0 && task.issued == u64::MAX {
            self.settle_task(piece.task);
        }
    }

    /// The part of a turn that needs the core.
    fn locked(&mut self) {
        self.wants_lock = false;
        let shared = Arc::clone(&self.shared);
        let mut core = shared.lock();
        if core.keyring_version != self.keyring_version {
            self.keyring = Arc::clone(&core.keyring);
            self.keyring_version = core.keyring_version;
        }
        self.read_inbox(&mut core);
        core.activity += u64::from(std::mem::take(&mut self.has_request));
        self.publish_landed(&mut core);
        self.publish_moved(&mut core);
        for epoch in self.ended.drain(..) {
            core.space.end_read(epoch);
        }
        if !self.unused.is_empty() {
            core.feed_starved();
        }
        for slot in self.unused.drain(..) {
            core.space.free_now(slot);
        }
        self.release_ranges(&mut core);
        self.reclaim(&mut core);
        self.insert_pages(&mut core);
        self.admit_all(&mut core);
        for key in std::mem::take(&mut self.to_commit) {
            if let Some(result) = core.request_flush((self.id, key)) {
                self.finish_task(key, result);
            }
        }
        self.start_jobs(&mut core);
        self.may_draft = core.habit.is_formed();
        // Events for this lane itself, from releases and failures above.
        self.wants_lock |= core.has_events(self.id);
        core.count_pages(shared.stats());
        let wakes = core.wakes(self.id);
        drop(core);
        for wake in wakes {
            wake();
        }
        self.emit_moves();
    }

    fn read_inbox(&mut self, core: &mut Core) {
        for event in core.take_events(self.id) {
            match event {
                Event::Granted(piece, held) => {
                    self.pieces[piece as usize].held = Some(held);
                    self.admit.push_back(piece);
                }
                Event::Committed(task, result) => self.finish_task(task, result),
                Event::Room => self.admit.append(&mut self.stalled),
                Event::Page(piece, outcome) => self.page_read(piece, outcome),
            }
        }
    }

    fn release_ranges(&mut self, core: &mut Core) {
        for key in std::mem::take(&mut self.over) {
            if let Some(held) = self.pieces[key as usize].held.take() {
                core.release_range(held);
            }
            self.finish_piece(key);
        }
    }
}

/// The next piece of a task; `None` if all of it is issued.
fn next_piece<P>(key: u32, task: &mut Task<P>) -> Option<Piece> {
    let block = BLOCK_LEN as u64;
    let (offset, len) = match task.op {
        Op::Read { offset, len }
        | Op::Write { offset, len, .. }
        | Op::Discard { offset, len }
        | Op::Rehome { offset, len, .. }
        | Op::WriteZeroes { offset, len } => (offset, len),
        Op::Flush => return None,
    };
    loop {
        if task.issued >= len {
            return None;
        }
        let start = offset + task.issued;
        let end = offset + len;
        let first = start / block;
        let skip = start % block;
        let is_partial = skip != 0 || end - start < block;
        let (kind, piece_end) = match task.op {
            Op::Read { .. } => (
                PieceKind::Read,
                end.min((first + Pool::MAX_BLOCKS as u64) * block),
            ),
            Op::Rehome { .. } => (
                PieceKind::Move,
                end.min((first + Pool::MAX_BLOCKS as u64) * block),
            ),
            Op::Discard { .. } | Op::WriteZeroes { .. } | Op::Write { .. } if is_partial => {
                let kind = match task.op {
                    Op::Write { .. } => PieceKind::Merge,
                    _ => PieceKind::MergeZeroes,
                };
                (kind, end.min((first + 1) * block))
            }
            Op::Write { .. } => {
                let whole = end / block;
                (
                    PieceKind::Write,
                    whole.min(first + Pool::MAX_BLOCKS as u64) * block,
                )
            }
            _ => (
                PieceKind::Erase,
                (end / block).min(first + ERASE_BLOCKS) * block,
            ),
        };
        let at = task.issued;
        task.issued = piece_end - offset;
        if kind == PieceKind::MergeZeroes && matches!(task.op, Op::Discard { .. }) {
            // A discard is a wish: what is not a whole block stays as it is.
            continue;
        }
        return Some(Piece {
            task: key,
            kind,
            first,
            count: piece_end.div_ceil(block) - first,
            at: at as usize,
            skip: skip as usize,
            len: (piece_end - start) as usize,
            held: None,
            slots: SmallVec::new(),
            sequence: 0,
            merged: None,
            moving: None,
            left: 0,
            known: 0,
            failure: None,
        });
    }
}
