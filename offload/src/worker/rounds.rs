//! The loop of a queue's thread.

use std::io;
use std::mem::{ManuallyDrop, MaybeUninit};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::time::{Duration, Instant};

use io_uring::{cqueue, opcode, squeue, types};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;

use smallvec::SmallVec;

use super::patience::{Patience, Wait};
use super::uring::Uring;
use super::{Command, Doorbell, QueueIo, RingConfig, WorkerError};
use crate::device::{Chain, ChainToken, QueueHandler};
use crate::memory::GuestMemory;
use crate::telemetry::QueueStats;
use crate::virtqueue::{ChainFault, Popped, Virtqueue};

/// Chains popped in a round, so that completions get their turn.
const POP_BATCH: u64 = 64;
/// Completions handed out in a round. Few, so that guest, card and disk work at the same time: what is
/// done is told, and what the guest asks for next is in the kernel, while the next ones are being
/// decrypted. When all that are there make one round, requests clump: at 4 KiB and depth 32, 15 of
/// them moved together from the disk to the guest and back, and whoever did not have them waited.
const CQE_BATCH: usize = 4;
/// With so many chains of a ring out, the guest is told of a few completions together, while the
/// thread is at work anyway or looks for the next event: waking a guest's processor costs as much as
/// serving a small request, and a guest that has so much to wait for does not miss the first of it.
const BUSY_OUT: u16 = 12;
/// So many are not put off any more.
const TOLD_TOGETHER: u64 = 4;
/// For how long a look for more may put them off. Before sleeping, everything is told.
const TELL_AFTER: Duration = Duration::from_micros(8);
/// How often a ring without kick eventfd is looked at.
const NO_KICK_INTERVAL: Duration = Duration::from_millis(1);

/// How often a poll on a kick eventfd may end before it is taken for something else.
const KICK_ENDS_MAX: u8 = 8;

/// Top bit of `user_data`: ours. The bit below is spare.
const OWN: u64 = 1 << 63;
const RESERVED: u64 = 3 << 62;
const KIND: u64 = 0xff;
const DOORBELL: u64 = 1;
const KICK: u64 = 2;
const CANCEL: u64 = 3;
/// Where a kick's `user_data` has its ring; above the generation. 256 queues fit.
const SLOT_SHIFT: u32 = 40;
const SLOT_MASK: u64 = 0xffff;

/// What the handler reaches through [`QueueIo`].
pub(super) struct Engine {
    uring: Uring,
    /// The queues of this thread; mostly one.
    rings: SmallVec<[Ring; 1]>,
    /// The ring whose turn it is.
    current: usize,
    /// Memory to show while no ring runs.
    memory: Arc<GuestMemory>,
    /// The handler's operations in the kernel or on the way there.
    pending: usize,
    is_exiting: bool,
}

/// One queue of a thread.
struct Ring {
    index: u16,
    queue: Option<Virtqueue>,
    stats: Arc<QueueStats>,
    /// The handler takes chains as it needs them.
    is_pulled: bool,
    /// It wanted one and there was none.
    is_starved: bool,
    is_enabled: bool,
    stopping: Option<Sender<Result<u16, WorkerError>>>,
    kick: Kick,
    call: Option<Call>,
    /// Completions that were shown since the guest asked to be told of them and was not yet.
    untold: u64,
    err: Option<OwnedFd>,
    has_logged_fault: bool,
    has_logged_malformed: bool,
}

impl Ring {
    fn new(index: u16, stats: Arc<QueueStats>) -> Self {
        Self {
            index,
            queue: None,
            stats,
            is_pulled: false,
            is_starved: false,
            is_enabled: false,
            stopping: None,
            kick: Kick::default(),
            call: None,
            untold: 0,
            err: None,
            has_logged_fault: false,
            has_logged_malformed: false,
        }
    }

    fn is_popping(&self) -> bool {
        self.queue.is_some() && self.is_enabled && self.stopping.is_none()
    }

    /// Tells of what was put off, if anything.
    fn tell(&mut self) {
        if self.untold > 0 {
            self.signal_call();
        }
    }

    fn signal_call(&mut self) {
        self.untold = 0;
        if let Some(call) = &self.call {
            self.stats.notifications.inc();
            call.signal();
        }
    }

    fn malformed(&mut self, fault: ChainFault) {
        if !std::mem::replace(&mut self.has_logged_malformed, true) {
            tracing::warn!(
                queue = self.index,
                %fault,
                "the guest sent a malformed descriptor chain; further ones are only counted"
            );
        }
    }

    /// Shows the guest what was completed in this round.
    fn publish(&mut self) {
        let Some(queue) = &mut self.queue else {
            return;
        };
        let completed = u64::from(queue.unpublished());
        let fault = queue.fault();
        let is_busy = !self.is_pulled && queue.out_count() >= BUSY_OUT;
        let mut wants_call = self.untold > 0;
        if completed > 0 {
            wants_call |= queue.publish();
            self.stats.completions.add(completed);
        }
        if wants_call {
            self.untold += completed;
            if !is_busy || completed == 0 || self.untold >= TOLD_TOGETHER {
                self.signal_call();
            }
        }
        if let Some(fault) = fault
            && !std::mem::replace(&mut self.has_logged_fault, true)
        {
            tracing::error!(
                queue = self.index,
                %fault,
                "the guest broke its ring: the queue is given up until it is started again"
            );
            self.stats.broken.inc();
            if let Some(err) = &self.err {
                let _ = rustix::io::write(err, &1u64.to_ne_bytes());
            }
        }
    }
}

impl Engine {
    fn tell(&mut self) {
        for ring in &mut self.rings {
            ring.tell();
        }
    }

    /// To be called on the queue's thread.
    pub(super) fn new(queues: Vec<(u16, Arc<QueueStats>)>) -> io::Result<Self> {
        let rings = queues.into_iter();
        Ok(Self {
            uring: Uring::new()?,
            rings: rings
                .map(|(index, stats)| Ring::new(index, stats))
                .collect(),
            current: 0,
            memory: Arc::default(),
            pending: 0,
            is_exiting: false,
        })
    }

    /// # Safety
    /// As for [`QueueIo::push`].
    #[inline]
    pub(super) unsafe fn push(&mut self, entry: squeue::Entry, user_data: u64) {
        debug_assert_eq!(user_data & RESERVED, 0, "the top bits are the loop's");
        self.pending += 1;
        // SAFETY: the caller's promise is the one asked for.
        unsafe { self.uring.push(entry.user_data(user_data & !RESERVED)) }
    }

    pub(super) fn submit(&mut self) {
        // An error is met again, and reported, when the round ends.
        let _ = self.uring.submit();
    }

    #[inline]
    pub(super) fn complete(&mut self, token: ChainToken, written: u32) {
        let ring = self.rings.get_mut(usize::from(token.slot));
        if let Some(queue) = ring.and_then(|ring| ring.queue.as_mut()) {
            queue.add_used(token, written);
        }
    }

    pub(super) fn memory(&self) -> &Arc<GuestMemory> {
        let queue = self.rings.get(self.current).and_then(|r| r.queue.as_ref());
        queue.map_or(&self.memory, |queue| queue.memory())
    }

    /// The queue whose turn it is.
    pub(super) fn queue(&self) -> u16 {
        self.rings.get(self.current).map_or(0, |ring| ring.index)
    }

    pub(super) fn pop(&mut self, queue: u16) -> Option<Chain> {
        let slot = self.rings.iter().position(|ring| ring.index == queue)?;
        let ring = self.rings.get_mut(slot)?;
        if !ring.is_popping() || self.is_exiting {
            return None;
        }
        loop {
            match ring.queue.as_mut()?.pop() {
                None => {
                    ring.is_starved = true;
                    return None;
                }
                Some(Popped::Chain(mut chain)) => {
                    chain.token.slot = slot as u16;
                    ring.stats.requests.inc();
                    ring.queue.as_mut()?.disable_kicks();
                    self.current = slot;
                    return Some(chain);
                }
                Some(Popped::Malformed(token, fault)) => {
                    ring.queue.as_mut()?.add_used(token, 0);
                    ring.stats.requests.inc();
                    ring.stats.malformed_chains.inc();
                    ring.malformed(fault);
                }
            }
        }
    }

    pub(super) fn unpop(&mut self, token: ChainToken) {
        if let Some(ring) = self.rings.get_mut(usize::from(token.slot))
            && let Some(queue) = &mut ring.queue
        {
            queue.unpop(token);
            ring.stats.completions.inc();
        }
    }

    /// Nothing more to pop for the handler until the driver has added something.
    pub(super) fn want(&mut self, queue: u16) {
        if let Some(ring) = self.rings.iter_mut().find(|ring| ring.index == queue) {
            ring.is_starved = true;
        }
    }
}

/// What must not be dropped while the kernel works on it.
struct Parts<H> {
    engine: Engine,
    handler: H,
}

/// The call eventfd.
struct Call {
    fd: OwnedFd,
    /// A full counter would block a write to it: ask first.
    may_block: bool,
}

impl Call {
    fn new(fd: OwnedFd) -> Self {
        let flags = rustix::fs::fcntl_getfl(&fd);
        let may_block = !flags.is_ok_and(|flags| flags.contains(OFlags::NONBLOCK));
        Self { fd, may_block }
    }

    fn signal(&self) {
        if self.may_block {
            let mut fds = [PollFd::new(&self.fd, PollFlags::OUT)];
            let now = Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            if poll(&mut fds, Some(&now)) != Ok(1) {
                // Full, so the other side has not looked since the last write.
                return;
            }
        }
        // A frontend that closed its end has no use for an error.
        let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
    }
}

/// The kick eventfd and the poll on it.
#[derive(Default)]
struct Kick {
    fd: Option<OwnedFd>,
    /// Tells the poll on this eventfd from those on earlier ones.
    generation: u32,
    is_armed: bool,
    /// How often the poll has ended by itself since it last went on.
    ends_in_a_row: u8,
}

impl Kick {
    fn user_data(&self, slot: usize) -> u64 {
        OWN | KICK | u64::from(self.generation) << 8 | (slot as u64) << SLOT_SHIFT
    }
}

/// The loop's state.
pub(super) struct Rounds<H> {
    parts: ManuallyDrop<Parts<H>>,
    doorbell: Arc<Doorbell>,
    inbox: Receiver<(usize, Command)>,
    patience: Patience,
    has_shut_down: bool,
    is_doorbell_armed: bool,
    /// Polls and cancellations in the kernel.
    own_pending: usize,
}

impl<H: QueueHandler> Rounds<H> {
    pub(super) fn new(
        mut engine: Engine,
        handler: H,
        doorbell: Arc<Doorbell>,
        inbox: Receiver<(usize, Command)>,
        poll_limit: Duration,
    ) -> Self {
        for ring in &mut engine.rings {
            ring.is_pulled = handler.is_pulled(ring.index);
        }
        Self {
            parts: ManuallyDrop::new(Parts { engine, handler }),
            doorbell,
            inbox,
            patience: Patience::new(poll_limit),
            has_shut_down: false,
            is_doorbell_armed: false,
            own_pending: 0,
        }
    }

    fn slots(&self) -> std::ops::Range<usize> {
        0..self.parts.engine.rings.len()
    }

    fn ring(&mut self, slot: usize) -> Option<&mut Ring> {
        self.parts.engine.rings.get_mut(slot)
    }

    /// Runs until the thread is to end and nothing is in the kernel any more.
    pub(super) fn run(mut self) -> io::Result<()> {
        self.arm_doorbell();
        loop {
            if self.take_completions()? {
                self.take_commands();
            }
            self.wake();
            let mut has_more = false;
            for slot in self.slots() {
                has_more |= self.pop(slot);
            }
            self.patience.end(Instant::now);
            let engine = &self.parts.engine;
            let is_ending =
                engine.is_exiting || engine.rings.iter().any(|ring| ring.stopping.is_some());
            let Parts { engine, handler } = &mut *self.parts;
            if is_ending {
                handler.stopping(&mut QueueIo { engine });
            }
            handler.round_end(&mut QueueIo { engine });
            for ring in &mut engine.rings {
                ring.publish();
            }
            for slot in self.slots() {
                self.finish_stop(slot);
            }
            if self.finish_exit() {
                // SAFETY: dropped once, here; `self.parts` is not touched afterwards, and `Rounds`
                // has no Drop. The kernel has nothing of it any more.
                unsafe { ManuallyDrop::drop(&mut self.parts) };
                return Ok(());
            }
            self.rest(has_more)?;
        }
    }

    /// Hands out some completions. Whether the doorbell rang.
    fn take_completions(&mut self) -> io::Result<bool> {
        let mut has_rung = false;
        let mut buf = [const { MaybeUninit::<cqueue::Entry>::uninit() }; CQE_BATCH];
        for cqe in self.parts.engine.uring.completions(&mut buf) {
            if cqe.user_data() & OWN != 0 {
                has_rung |= self.own_completion(cqe)?;
                continue;
            }
            let Parts { engine, handler } = &mut *self.parts;
            if !cqueue::more(cqe.flags()) {
                engine.pending -= 1;
            }
            let (user_data, result) = (cqe.user_data(), cqe.result());
            handler.completion(user_data, result, &mut QueueIo { engine });
        }
        Ok(has_rung)
    }

    /// Whether it was the doorbell.
    fn own_completion(&mut self, cqe: &cqueue::Entry) -> io::Result<bool> {
        let has_ended = !cqueue::more(cqe.flags());
        if has_ended {
            self.own_pending -= 1;
        }
        match cqe.user_data() & KIND {
            DOORBELL => {
                self.is_doorbell_armed &= !has_ended;
                if cqe.result() < 0 && !self.parts.engine.is_exiting {
                    return Err(io::Error::from_raw_os_error(-cqe.result()));
                }
                if has_ended && !self.parts.engine.is_exiting {
                    // The completion queue was full once.
                    self.arm_doorbell();
                }
                Ok(true)
            }
            KICK => {
                let slot = (cqe.user_data() >> SLOT_SHIFT & SLOT_MASK) as usize;
                Ok(self.kicked(slot, cqe, has_ended))
            }
            _ => Ok(false),
        }
    }

    /// The poll on a ring's kick eventfd reports. Never the doorbell.
    fn kicked(&mut self, slot: usize, cqe: &cqueue::Entry, has_ended: bool) -> bool {
        let Some(ring) = self.ring(slot) else {
            return false;
        };
        if cqe.user_data() != ring.kick.user_data(slot) {
            return false;
        }
        ring.kick.is_armed &= !has_ended;
        // A multishot poll on an eventfd goes on, but for a full completion queue.
        ring.kick.ends_in_a_row = if has_ended {
            ring.kick.ends_in_a_row + 1
        } else {
            0
        };
        let readable = u32::from(PollFlags::IN.bits());
        if cqe.result() < 0
            || cqe.result() as u32 & readable == 0
            || ring.kick.ends_in_a_row > KICK_ENDS_MAX
        {
            // An error, a hang-up, or always ready as a file is.
            tracing::error!(
                queue = ring.index,
                result = cqe.result(),
                "the kick file descriptor cannot be waited for; is it an eventfd?"
            );
            self.disarm_kick(slot);
            return false;
        }
        ring.stats.kicks.inc();
        if has_ended {
            self.arm_kick(slot);
        }
        false
    }

    fn push_own(&mut self, entry: squeue::Entry, user_data: u64) {
        self.own_pending += 1;
        // SAFETY: polls and cancellations have no buffers; the kernel holds the files itself.
        unsafe { self.parts.engine.uring.push(entry.user_data(user_data)) }
    }

    fn arm(&mut self, fd: i32, user_data: u64) {
        let entry = opcode::PollAdd::new(types::Fd(fd), u32::from(PollFlags::IN.bits()));
        self.push_own(entry.multi(true).build(), user_data);
    }

    /// Ends a poll. Not POLL_REMOVE: that one fails, and the poll goes on, if it is just reporting.
    fn cancel(&mut self, user_data: u64) {
        let entry = opcode::AsyncCancel::new(user_data).build();
        self.push_own(entry, OWN | CANCEL);
    }

    fn arm_doorbell(&mut self) {
        self.arm(self.doorbell.eventfd.as_raw_fd(), OWN | DOORBELL);
        self.is_doorbell_armed = true;
    }

    fn arm_kick(&mut self, slot: usize) {
        let Some(ring) = self.ring(slot) else { return };
        if let Some(fd) = ring.kick.fd.as_ref().map(AsRawFd::as_raw_fd) {
            ring.kick.is_armed = true;
            let user_data = ring.kick.user_data(slot);
            self.arm(fd, user_data);
        }
    }

    /// Ends the poll on the kick eventfd; what it still reports is ignored.
    fn disarm_kick(&mut self, slot: usize) {
        let Some(ring) = self.ring(slot) else { return };
        if std::mem::take(&mut ring.kick.is_armed) {
            let user_data = ring.kick.user_data(slot);
            self.cancel(user_data);
            // The descriptor number must not be reused before the kernel has looked at the
            // entries that name it.
            let _ = self.parts.engine.uring.submit();
        }
        let Some(ring) = self.ring(slot) else { return };
        ring.kick.generation = ring.kick.generation.wrapping_add(1);
        ring.kick.ends_in_a_row = 0;
    }

    fn take_commands(&mut self) {
        loop {
            match self.inbox.try_recv() {
                Ok((slot, command)) => self.obey(slot, command),
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => {
                    self.parts.engine.is_exiting = true;
                    return;
                }
            }
        }
    }

    fn obey(&mut self, slot: usize, command: Command) {
        let Some(ring) = self.ring(slot) else { return };
        let is_running = ring.queue.is_some();
        // An answer that nobody waits for any more does not matter.
        match command {
            Command::Start(config, reply) => {
                let _ = reply.send(self.start(slot, *config));
            }
            Command::Stop(reply) => {
                if is_running && ring.stopping.is_none() {
                    ring.stopping = Some(reply);
                } else {
                    let queue = ring.index;
                    let _ = reply.send(Err(WorkerError::NotRunning { queue }));
                }
            }
            Command::Call(fd, reply) => {
                ring.call = fd.map(Call::new);
                if is_running {
                    ring.signal_call();
                }
                let _ = reply.send(());
            }
            Command::Kick(fd, reply) => {
                self.disarm_kick(slot);
                if let Some(ring) = self.ring(slot) {
                    ring.kick.fd = fd;
                }
                if is_running {
                    self.arm_kick(slot);
                }
                let _ = reply.send(());
            }
            Command::Err(fd, reply) => {
                ring.err = fd;
                let _ = reply.send(());
            }
            Command::Enabled(is_enabled, reply) => {
                ring.is_enabled = is_enabled;
                let _ = reply.send(());
            }
            Command::Memory(memory, reply) => {
                if let Some(queue) = &mut ring.queue {
                    queue.set_memory(Arc::clone(&memory));
                }
                self.parts.engine.memory = memory;
                let _ = reply.send(());
            }
            Command::Exit => self.parts.engine.is_exiting = true,
        }
    }

    fn start(&mut self, slot: usize, config: RingConfig) -> Result<(), WorkerError> {
        let Some(ring) = self.ring(slot) else {
            return Err(WorkerError::Gone { queue: 0 });
        };
        let index = ring.index;
        if ring.queue.is_some() {
            return Err(WorkerError::Running { queue: index });
        }
        let layout = config.layout();
        let memory = Arc::clone(&config.memory);
        let has_inflight = config.inflight.is_some();
        let (queue, recovery) = Virtqueue::new(
            layout,
            config.base,
            config.features,
            config.memory,
            config.inflight,
        )
        .map_err(|source| WorkerError::Ring {
            queue: index,
            source,
        })?;
        if recovery.was_stale {
            tracing::warn!(
                queue = index,
                "the in-flight region is of another ring: cleared"
            );
        }
        if recovery.resubmitted > 0 {
            let chains = recovery.resubmitted;
            tracing::info!(
                queue = index,
                chains,
                "taking up chains of an earlier process"
            );
        }
        ring.queue = Some(queue);
        ring.has_logged_fault = false;
        ring.has_logged_malformed = false;
        ring.is_starved = false;
        ring.is_enabled = config.enabled;
        ring.call = config.call.map(Call::new);
        if has_inflight {
            // A killed process may have returned chains and died before it said so.
            ring.signal_call();
        }
        self.parts.engine.memory = memory;
        self.disarm_kick(slot);
        if let Some(ring) = self.ring(slot) {
            ring.kick.fd = config.kick;
        }
        self.arm_kick(slot);
        Ok(())
    }

    /// Calls the handler if somebody woke it or its deadline has passed.
    fn wake(&mut self) {
        let woken = &self.doorbell.woken;
        let is_woken = woken.load(Ordering::Relaxed) && woken.swap(false, Ordering::AcqRel);
        let Parts { engine, handler } = &mut *self.parts;
        if is_woken || handler.deadline().is_some_and(|at| at <= Instant::now()) {
            handler.wake(&mut QueueIo { engine });
        }
    }

    /// Hands a batch of chains to the handler. Whether there may be more.
    fn pop(&mut self, slot: usize) -> bool {
        let Parts { engine, handler } = &mut *self.parts;
        let is_exiting = engine.is_exiting;
        engine.current = slot;
        let mut popped = 0;
        let mut malformed = None;
        while popped < POP_BATCH {
            let Some(ring) = engine.rings.get_mut(slot) else {
                return false;
            };
            if !ring.is_popping() || ring.is_pulled || is_exiting {
                return false;
            }
            let Some(queue) = &mut ring.queue else {
                break;
            };
            match queue.pop() {
                None => break,
                Some(Popped::Chain(mut chain)) => {
                    chain.token.slot = slot as u16;
                    handler.request(chain, &mut QueueIo { engine });
                    engine.current = slot;
                }
                Some(Popped::Malformed(token, fault)) => {
                    queue.add_used(token, 0);
                    ring.stats.malformed_chains.inc();
                    malformed = Some(fault);
                }
            }
            popped += 1;
        }
        if popped > 0 {
            if let Some(ring) = engine.rings.get_mut(slot) {
                ring.stats.requests.add(popped);
                if let Some(queue) = &mut ring.queue {
                    queue.disable_kicks();
                }
                if let Some(fault) = malformed {
                    ring.malformed(fault);
                }
            }
            handler.batch_end(&mut QueueIo { engine });
        }
        popped == POP_BATCH
    }

    /// Ends the ring once nothing of it is held.
    fn finish_stop(&mut self, slot: usize) {
        let Parts { engine, handler } = &mut *self.parts;
        let is_exiting = engine.is_exiting;
        let Some(ring) = engine.rings.get_mut(slot) else {
            return;
        };
        let is_wanted = ring.stopping.is_some() || is_exiting;
        if !is_wanted || handler.chains_held() > 0 {
            return;
        }
        let Some(queue) = ring.queue.take() else {
            return;
        };
        if queue.out_count() > 0 {
            let chains = queue.out_count();
            tracing::error!(queue = ring.index, chains, "chains were lost by the card");
        }
        let reply = ring.stopping.take();
        self.disarm_kick(slot);
        if let Some(ring) = self.ring(slot) {
            ring.kick.fd = None;
        }
        if let Some(reply) = reply {
            let _ = reply.send(Ok(queue.next_avail()));
        }
    }

    /// Whether everything is over.
    fn finish_exit(&mut self) -> bool {
        let engine = &self.parts.engine;
        if !engine.is_exiting || engine.rings.iter().any(|ring| ring.queue.is_some()) {
            return false;
        }
        if !std::mem::replace(&mut self.has_shut_down, true) {
            let Parts { engine, handler } = &mut *self.parts;
            handler.shutdown(&mut QueueIo { engine });
            if std::mem::take(&mut self.is_doorbell_armed) {
                self.cancel(OWN | DOORBELL);
            }
        }
        self.parts.engine.pending == 0 && self.own_pending == 0
    }

    /// Submits, and sleeps if there is nothing to do.
    fn rest(&mut self, mut has_more: bool) -> io::Result<()> {
        has_more |= self.parts.handler.has_more() || self.parts.engine.uring.has_news();
        if !has_more && self.look()? {
            return self.parts.engine.uring.submit();
        }
        let Parts { engine, handler } = &mut *self.parts;
        let mut looks_soon = false;
        if !engine.is_exiting && !has_more {
            for ring in &mut engine.rings {
                if !ring.is_popping() {
                    continue;
                }
                looks_soon |= !ring.kick.is_armed;
                if ring.is_pulled && !ring.is_starved {
                    continue;
                }
                let enable = if ring.is_pulled {
                    Virtqueue::enable_kicks_for_more
                } else {
                    Virtqueue::enable_kicks
                };
                let has_new = ring.queue.as_mut().is_some_and(enable);
                if has_new {
                    ring.is_starved = false;
                }
                has_more |= has_new;
            }
        }
        if has_more {
            return engine.uring.submit();
        }
        let mut timeout = handler
            .deadline()
            .map(|at| at.saturating_duration_since(Instant::now()));
        if looks_soon {
            let interval = timeout.map_or(NO_KICK_INTERVAL, |t| t.min(NO_KICK_INTERVAL));
            timeout = Some(interval);
        }
        engine.uring.wait(timeout)
    }

    /// Before sleeping: looks for a while if events have been coming quickly. Whether there is
    /// something to do.
    fn look(&mut self) -> io::Result<bool> {
        let Parts { engine, .. } = &mut *self.parts;
        let wait = match engine.pending {
            0 => Wait::Guest,
            _ => Wait::Kernel,
        };
        let Some(until) = self.patience.begin(wait, Instant::now) else {
            engine.tell();
            return Ok(false);
        };
        engine.uring.submit()?;
        let tell_at = (until + TELL_AFTER).checked_sub(self.patience.limit());
        let mut tells = engine.rings.iter().any(|ring| ring.untold > 0);
        loop {
            // A doorbell, too, is a completion.
            let has_chain = |ring: &mut Ring| {
                ring.is_popping()
                    && !ring.is_pulled
                    && ring.queue.as_mut().is_some_and(Virtqueue::has_next)
            };
            if engine.uring.has_news()
                || !engine.is_exiting && engine.rings.iter_mut().any(has_chain)
            {
                return Ok(true);
            }
            let now = Instant::now();
            if tells && (now >= until || tell_at.is_none_or(|at| now >= at)) {
                engine.tell();
                tells = false;
            }
            if now >= until {
                return Ok(false);
            }
            std::hint::spin_loop();
        }
    }
}
