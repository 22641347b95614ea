//! A queue's requests on their way through the volume: chain, request, engine, io_uring, status.
//!
//! ```text
//!  Chain ──► request ──► gate ──► Held (token, status address) ──► Lane::submit
//!                                   ▲                                  │ turn
//!                                   │ last part                        ▼
//!           status, used ring ◄── end ◄── Lane::next_done      Lane::next_io ──► Driver ──► io_uring
//! ```
//!
//! Every chain that was taken is in `gate`, where it waits for the volume's limits, or in `held`
//! until it is completed, so `chains_held` is what the stop of a ring waits for. A request is one
//! operation of the engine, or one a segment for DISCARD and WRITE_ZEROES; the worst of their
//! outcomes is its status.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use offload::device::{Chain, ChainToken, QueueHandler, Segments};
use offload::limit::TimedGate;
use offload::telemetry::{ErrorKind, Histogram, QueueStats};
use offload::worker::QueueIo;
use slab::Slab;
use smallvec::SmallVec;
use vm_memory::{Bytes, GuestAddress};

use super::config::RANGES_MAX;
use super::driver::{Driver, Started};
use super::limits::cost;
use super::payload::{GuestPayload, View, gather};
use super::request::{HEADER_LEN, RANGE_LEN, Refusal, Request, Shape, Status, parse, range, shape};
use super::{QueueTerms, State};
use crate::volume::buffer::Buffer;
use crate::volume::engine::{Failure, Lane, Op, Payload};

/// Blocks that are opened and sealed in a round of the queue's loop, or as many more as the last
/// piece has: some 30 µs. With few, what is done is told to the guest, and what the guest asks
/// then gets to the disk, while the rest is still being worked on; with many, fewer notifications.
const WORK_BLOCKS: usize = 32;
/// The same at least, in memory, where nothing but this keeps a round from taking all that a queue
/// has: then guest and card take turns, and whoever's it is not sleeps. A quarter of the requests is
/// enough for the guest to be at work when the next quarter is done (4 KiB random reads in tmpfs,
/// depth 32: 209,000 a second with 32, 350,000 with 8; at depth 128 32 is better by a tenth).
const WORK_BLOCKS_MIN: usize = 8;

/// Latencies of one queue, from popping a chain to its status; what throttled requests wait before
/// is shown apart.
#[derive(Debug, Default)]
pub struct Latencies {
    /// IN.
    pub read: Arc<Histogram>,
    /// OUT.
    pub write: Arc<Histogram>,
    /// FLUSH, DISCARD and WRITE_ZEROES: what waits for a barrier.
    pub flush: Arc<Histogram>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Flush,
}

/// A request that waits for the volume's limits.
#[derive(Debug)]
pub(super) struct Waiting {
    chain: Chain,
    request: Request,
    shape: Shape,
    view: View,
}

/// A request that the engine has.
struct Held {
    token: ChainToken,
    status_at: u64,
    kind: Kind,
    began: Instant,
    /// Operations of the engine that are not done.
    parts: u16,
    status: Status,
    /// Bytes written to the guest so far.
    written: u64,
    len: u64,
}

/// One queue of the card.
pub struct BlockQueue {
    state: Arc<State>,
    stats: Arc<QueueStats>,
    latencies: Arc<Latencies>,
    gate: TimedGate<Waiting>,
    lane: Lane<GuestPayload>,
    driver: Driver,
    held: Slab<Held>,
    view: View,
}

impl BlockQueue {
    pub(super) fn new(
        state: Arc<State>,
        stats: Arc<QueueStats>,
        latencies: Arc<Latencies>,
        gate: TimedGate<Waiting>,
        lane: Lane<GuestPayload>,
        driver: Driver,
    ) -> Self {
        Self {
            state,
            stats,
            latencies,
            gate,
            lane,
            driver,
            held: Slab::new(),
            view: Rc::default(),
        }
    }

    /// Blocks of this round.
    fn quantum(&self) -> usize {
        if self.driver.is_immediate() {
            (self.held.len() / 4).clamp(WORK_BLOCKS_MIN, WORK_BLOCKS)
        } else {
            WORK_BLOCKS
        }
    }

    /// Whether there was any to submit. What is done at once counts as work, of which a round does
    /// only so much.
    fn start_io(&mut self, quantum: usize, io: &mut QueueIo<'_>) -> bool {
        let mut has_some = false;
        let mut moved = 0;
        while moved < quantum
            && let Some(op) = self.lane.next_io()
        {
            match self.driver.start(op, self.lane.has_io()) {
                Started::Entry(entry, user_data) => {
                    // SAFETY: buffer and descriptor belong to `self.driver`, which gives a buffer
                    // away only in `finish`, on completion; the loop drops a handler only when none
                    // of its operations is under way.
                    unsafe { io.push(entry, user_data) };
                    has_some = true;
                }
                Started::Done(id, result, buffer) => {
                    moved += buffer.as_ref().map_or(1, Buffer::blocks);
                    self.lane.on_io(id, result, buffer);
                }
            }
        }
        has_some
    }

    /// Answers a chain that the engine has nothing to do with.
    fn answer(&self, io: &mut QueueIo<'_>, token: ChainToken, at: u64, status: Status, data: u64) {
        let is_told = self.view.write_obj(status.byte(), GuestAddress(at)).is_ok();
        io.complete(token, written(data, is_told));
    }

    fn take(&mut self, chain: Chain, io: &mut QueueIo<'_>) {
        let Some(shape) = shape(&chain.readable, &chain.writable) else {
            self.stats.error(ErrorKind::Invalid);
            io.complete(chain.token, 0);
            return;
        };
        let terms = self.state.terms();
        match self.understand(&chain.readable, &shape, &terms) {
            Ok(request) if self.gate.is_open() => self.start(chain, request, &shape, &terms, io),
            Ok(request) => self.queue_up(chain, request, shape, &terms, io),
            Err(refusal) => {
                self.stats.error(refusal.kind);
                self.answer(io, chain.token, shape.status_at, refusal.status, 0);
            }
        }
    }

    /// Starts a request when the volume's limits allow, which may be now.
    fn queue_up(
        &mut self,
        chain: Chain,
        request: Request,
        shape: Shape,
        terms: &QueueTerms,
        io: &mut QueueIo<'_>,
    ) {
        let Some(cost) = cost(&request, terms.request.is_read_only) else {
            return self.start(chain, request, &shape, terms, io);
        };
        let waiting = Waiting {
            chain,
            request,
            shape,
            view: Rc::clone(&self.view),
        };
        if let Some(waiting) = self.gate.offer(waiting, cost) {
            self.start_waiting(waiting, io);
        }
    }

    fn start_waiting(&mut self, waiting: Waiting, io: &mut QueueIo<'_>) {
        let Waiting {
            chain,
            request,
            shape,
            view,
        } = waiting;
        let terms = self.state.terms();
        // A chain keeps the memory that it came with.
        let current = std::mem::replace(&mut self.view, view);
        self.start(chain, request, &shape, &terms, io);
        self.view = current;
    }

    fn understand(
        &self,
        readable: &Segments,
        shape: &Shape,
        terms: &QueueTerms,
    ) -> Result<Request, Refusal> {
        let mut header = [0; HEADER_LEN];
        let got = gather(&self.view, readable, 0, &mut header).unwrap_or(0);
        parse(header.get(..got).unwrap_or_default(), shape, &terms.request)
    }

    fn start(
        &mut self,
        chain: Chain,
        request: Request,
        shape: &Shape,
        terms: &QueueTerms,
        io: &mut QueueIo<'_>,
    ) {
        let Chain {
            token,
            readable,
            writable,
        } = chain;
        let none = Segments::new();
        let (op, kind, segments, skip) = match request {
            Request::In { len: 0, .. } | Request::Out { len: 0, .. } => {
                return self.answer(io, token, shape.status_at, Status::Ok, 0);
            }
            Request::GetId { room } => return self.tell_id(token, shape, room, writable, io),
            // Nothing was written that could be lost.
            Request::Flush if terms.request.is_read_only => {
                return self.answer(io, token, shape.status_at, Status::Ok, 0);
            }
            Request::In { offset, len } => (Op::Read { offset, len }, Kind::Read, writable, 0),
            Request::Out { offset, len } => {
                let durable = !terms.is_writeback;
                let op = Op::Write {
                    offset,
                    len,
                    durable,
                };
                (op, Kind::Write, readable, HEADER_LEN)
            }
            Request::Flush => (Op::Flush, Kind::Flush, none, 0),
            Request::Discard { ranges } | Request::WriteZeroes { ranges } => {
                let is_discard = matches!(request, Request::Discard { .. });
                return self.start_ranges(token, shape, terms, &readable, ranges, is_discard, io);
            }
        };
        let len = match op {
            Op::Read { len, .. } | Op::Write { len, .. } => len,
            _ => 0,
        };
        let key = self.hold(token, shape, kind, 1, len);
        let payload = GuestPayload::new(key, Rc::clone(&self.view), segments, skip);
        self.lane.submit(op, payload);
    }

    fn hold(&mut self, token: ChainToken, shape: &Shape, kind: Kind, parts: u16, len: u64) -> u32 {
        self.held.insert(Held {
            token,
            status_at: shape.status_at,
            kind,
            began: Instant::now(),
            parts,
            status: Status::Ok,
            written: 0,
            len,
        }) as u32
    }

    #[allow(clippy::too_many_arguments)]
    fn start_ranges(
        &mut self,
        token: ChainToken,
        shape: &Shape,
        terms: &QueueTerms,
        readable: &Segments,
        count: usize,
        is_discard: bool,
        io: &mut QueueIo<'_>,
    ) {
        let mut bytes = [0; RANGES_MAX * RANGE_LEN];
        let wanted = count * RANGE_LEN;
        let list = bytes.get_mut(..wanted).unwrap_or_default();
        let got = gather(&self.view, readable, HEADER_LEN, list);
        let mut ops: SmallVec<[Op; RANGES_MAX]> = SmallVec::new();
        let mut refusal = None;
        if got != Some(wanted) {
            refusal = Some((Status::IoError, ErrorKind::Invalid));
        }
        // All are looked at before one is carried out.
        for segment in list.as_chunks::<RANGE_LEN>().0 {
            match range(segment, is_discard, &terms.request) {
                Ok((_, 0)) => {}
                Ok((offset, len)) if is_discard => ops.push(Op::Discard { offset, len }),
                Ok((offset, len)) => ops.push(Op::WriteZeroes { offset, len }),
                Err(error) => refusal = refusal.or(Some((error.status, error.kind))),
            }
        }
        if let Some((status, kind)) = refusal {
            self.stats.error(kind);
            return self.answer(io, token, shape.status_at, status, 0);
        }
        if ops.is_empty() {
            return self.answer(io, token, shape.status_at, Status::Ok, 0);
        }
        let key = self.hold(token, shape, Kind::Flush, ops.len() as u16, 0);
        for op in ops {
            let payload = GuestPayload::new(key, Rc::clone(&self.view), Segments::new(), 0);
            self.lane.submit(op, payload);
        }
    }

    fn tell_id(
        &self,
        token: ChainToken,
        shape: &Shape,
        room: u64,
        writable: Segments,
        io: &mut QueueIo<'_>,
    ) {
        let mut payload = GuestPayload::new(0, Rc::clone(&self.view), writable, 0);
        let serial = self.state.serial();
        let told = serial.get(..room as usize).unwrap_or_default();
        let status = match payload.store(0, told) {
            Ok(()) => Status::Ok,
            Err(_) => {
                self.stats.error(ErrorKind::Invalid);
                Status::IoError
            }
        };
        self.answer(io, token, shape.status_at, status, payload.stored);
    }

    /// Takes back what the engine has done.
    fn end(&mut self, payload: &GuestPayload, result: Result<(), Failure>, io: &mut QueueIo<'_>) {
        let key = payload.request as usize;
        let Some(held) = self.held.get_mut(key) else {
            debug_assert!(false, "the engine returned a request that it was not given");
            return;
        };
        held.parts -= 1;
        held.written += payload.stored;
        if let Err(failure) = result {
            held.status = Status::IoError;
            self.stats.error(error_kind(failure));
        }
        if held.parts > 0 {
            return;
        }
        let held = self.held.remove(key);
        let histogram = match held.kind {
            Kind::Read => &self.latencies.read,
            Kind::Write => &self.latencies.write,
            Kind::Flush => &self.latencies.flush,
        };
        histogram.record(held.began.elapsed());
        if held.status == Status::Ok {
            match held.kind {
                Kind::Read => self.stats.bytes_read.add(held.len),
                Kind::Write => self.stats.bytes_written.add(held.len),
                Kind::Flush => {}
            }
        }
        self.answer(io, held.token, held.status_at, held.status, held.written);
    }
}

/// The used length of a chain.
fn written(data: u64, has_status: bool) -> u32 {
    // Below 4 GiB: the chain's writable part is.
    u32::try_from(data + u64::from(has_status)).unwrap_or(u32::MAX)
}

fn error_kind(failure: Failure) -> ErrorKind {
    match failure {
        Failure::Io(_) | Failure::Poisoned => ErrorKind::Io,
        Failure::NotAuthentic => ErrorKind::Integrity,
        Failure::NoSpace => ErrorKind::NoSpace,
        Failure::ReadOnly | Failure::Range | Failure::Payload => ErrorKind::Invalid,
        Failure::NoncesUsedUp => ErrorKind::Overload,
    }
}

impl QueueHandler for BlockQueue {
    fn request(&mut self, chain: Chain, io: &mut QueueIo<'_>) {
        if !Arc::ptr_eq(&self.view, io.memory()) {
            self.view = Rc::new(Arc::clone(io.memory()));
        }
        self.take(chain, io);
    }

    fn batch_end(&mut self, _: &mut QueueIo<'_>) {}

    fn completion(&mut self, user_data: u64, res: i32, _: &mut QueueIo<'_>) {
        if let Some((id, result, buffer)) = self.driver.finish(user_data, res) {
            self.lane.on_io(id, result, buffer);
        }
    }

    fn wake(&mut self, _: &mut QueueIo<'_>) {
        self.lane.on_wake();
    }

    fn stopping(&mut self, io: &mut QueueIo<'_>) {
        while let Some(waiting) = self.gate.next_unlimited() {
            self.start_waiting(waiting, io);
        }
    }

    fn abandoned(&mut self) {
        self.lane.abandon();
    }

    fn deadline(&self) -> Option<Instant> {
        self.gate.deadline()
    }

    fn round_end(&mut self, io: &mut QueueIo<'_>) {
        while let Some(waiting) = self.gate.next() {
            self.start_waiting(waiting, io);
        }
        self.lane.advance();
        let quantum = self.quantum();
        // Also without blocks if the operations bring some at once.
        if (self.driver.is_immediate() || self.lane.has_blocks()) && self.start_io(quantum, io) {
            // The disk can work meanwhile.
            io.submit();
        }
        // Also without blocks: writes that were gathered leave when one before them has landed.
        self.lane.work(quantum);
        self.start_io(quantum, io);
        while let Some(done) = self.lane.next_done() {
            self.end(&done.payload, done.result, io);
        }
    }

    fn has_more(&self) -> bool {
        // Operations are left when a round had enough of those that are done at once.
        self.lane.has_more() || self.lane.has_io()
    }

    fn chains_held(&self) -> usize {
        self.held.len() + self.gate.len()
    }
}
