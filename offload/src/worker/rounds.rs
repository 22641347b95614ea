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

use super::patience::{Patience, Wait};
use super::uring::Uring;
use super::{Command, Doorbell, QueueIo, RingConfig, WorkerError};
use crate::device::{ChainToken, QueueHandler};
use crate::memory::GuestMemory;
use crate::telemetry::QueueStats;
use crate::virtqueue::{Popped, Virtqueue};

/// Chains popped in a round, so that completions get their turn.
const POP_BATCH: u64 = 64;
/// Completions taken at a time, and how often in a round.
const CQE_BATCH: usize = 64;
const CQE_BATCHES: usize = 8;
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

/// What the handler reaches through [`QueueIo`].
pub(super) struct Engine {
    uring: Uring,
    queue: Option<Virtqueue>,
    /// Memory to show while no ring runs.
    memory: Arc<GuestMemory>,
    stats: Arc<QueueStats>,
    /// The handler's operations in the kernel or on the way there.
    pending: usize,
}

impl Engine {
    /// To be called on the queue's thread.
    pub(super) fn new(stats: Arc<QueueStats>) -> io::Result<Self> {
        Ok(Self {
            uring: Uring::new()?,
            queue: None,
            memory: Arc::default(),
            stats,
            pending: 0,
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
        if let Some(queue) = &mut self.queue {
            queue.add_used(token, written);
        }
    }

    pub(super) fn memory(&self) -> &Arc<GuestMemory> {
        self.queue
            .as_ref()
            .map_or(&self.memory, |queue| queue.memory())
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
    fn user_data(&self) -> u64 {
        OWN | KICK | u64::from(self.generation) << 8
    }
}

/// The loop's state.
pub(super) struct Rounds<H> {
    index: u16,
    parts: ManuallyDrop<Parts<H>>,
    doorbell: Arc<Doorbell>,
    inbox: Receiver<Command>,
    kick: Kick,
    call: Option<Call>,
    err: Option<OwnedFd>,
    is_enabled: bool,
    stopping: Option<Sender<Result<u16, WorkerError>>>,
    is_exiting: bool,
    patience: Patience,
    has_shut_down: bool,
    is_doorbell_armed: bool,
    has_logged_fault: bool,
    has_logged_malformed: bool,
    /// Polls and cancellations in the kernel.
    own_pending: usize,
}

impl<H: QueueHandler> Rounds<H> {
    pub(super) fn new(
        index: u16,
        engine: Engine,
        handler: H,
        doorbell: Arc<Doorbell>,
        inbox: Receiver<Command>,
        poll_limit: Duration,
    ) -> Self {
        Self {
            index,
            parts: ManuallyDrop::new(Parts { engine, handler }),
            doorbell,
            inbox,
            kick: Kick::default(),
            call: None,
            err: None,
            is_enabled: false,
            stopping: None,
            is_exiting: false,
            patience: Patience::new(poll_limit),
            has_shut_down: false,
            is_doorbell_armed: false,
            has_logged_fault: false,
            has_logged_malformed: false,
            own_pending: 0,
        }
    }

    /// Runs until the thread is to end and nothing is in the kernel any more.
    pub(super) fn run(mut self) -> io::Result<()> {
        self.arm_doorbell();
        loop {
            if self.take_completions()? {
                self.take_commands();
            }
            self.wake();
            let has_more = self.pop();
            self.patience.end(Instant::now);
            let is_ending = self.stopping.is_some() || self.is_exiting;
            let Parts { engine, handler } = &mut *self.parts;
            if is_ending {
                handler.stopping(&mut QueueIo { engine });
            }
            handler.round_end(&mut QueueIo { engine });
            self.publish();
            self.finish_stop();
            if self.finish_exit() {
                // SAFETY: dropped once, here; `self.parts` is not touched afterwards, and `Rounds`
                // has no Drop. The kernel has nothing of it any more.
                unsafe { ManuallyDrop::drop(&mut self.parts) };
                return Ok(());
            }
            self.rest(has_more)?;
        }
    }

    /// Hands out completions. Whether the doorbell rang.
    fn take_completions(&mut self) -> io::Result<bool> {
        let mut has_rung = false;
        let mut buf = [const { MaybeUninit::<cqueue::Entry>::uninit() }; CQE_BATCH];
        for _ in 0..CQE_BATCHES {
            let cqes = self.parts.engine.uring.completions(&mut buf);
            let is_last = cqes.len() < CQE_BATCH;
            for cqe in cqes {
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
            if is_last {
                break;
            }
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
                if cqe.result() < 0 && !self.is_exiting {
                    return Err(io::Error::from_raw_os_error(-cqe.result()));
                }
                if has_ended && !self.is_exiting {
                    // The completion queue was full once.
                    self.arm_doorbell();
                }
                Ok(true)
            }
            KICK if cqe.user_data() == self.kick.user_data() => {
                self.kick.is_armed &= !has_ended;
                // A multishot poll on an eventfd goes on, but for a full completion queue.
                self.kick.ends_in_a_row = if has_ended {
                    self.kick.ends_in_a_row + 1
                } else {
                    0
                };
                let readable = u32::from(PollFlags::IN.bits());
                if cqe.result() < 0
                    || cqe.result() as u32 & readable == 0
                    || self.kick.ends_in_a_row > KICK_ENDS_MAX
                {
                    // An error, a hang-up, or always ready as a file is.
                    tracing::error!(
                        queue = self.index,
                        result = cqe.result(),
                        "the kick file descriptor cannot be waited for; is it an eventfd?"
                    );
                    self.disarm_kick();
                    return Ok(false);
                }
                self.parts.engine.stats.kicks.inc();
                if has_ended {
                    self.arm_kick();
                }
                Ok(false)
            }
            _ => Ok(false),
        }
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

    fn arm_kick(&mut self) {
        if let Some(fd) = self.kick.fd.as_ref().map(AsRawFd::as_raw_fd) {
            self.arm(fd, self.kick.user_data());
            self.kick.is_armed = true;
        }
    }

    /// Ends the poll on the kick eventfd; what it still reports is ignored.
    fn disarm_kick(&mut self) {
        if std::mem::take(&mut self.kick.is_armed) {
            self.cancel(self.kick.user_data());
            // The descriptor number must not be reused before the kernel has looked at the
            // entries that name it.
            let _ = self.parts.engine.uring.submit();
        }
        self.kick.generation = self.kick.generation.wrapping_add(1);
        self.kick.ends_in_a_row = 0;
    }

    fn take_commands(&mut self) {
        loop {
            match self.inbox.try_recv() {
                Ok(command) => self.obey(command),
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => {
                    self.is_exiting = true;
                    return;
                }
            }
        }
    }

    fn obey(&mut self, command: Command) {
        // An answer that nobody waits for any more does not matter.
        match command {
            Command::Start(ring, reply) => {
                let _ = reply.send(self.start(*ring));
            }
            Command::Stop(reply) => {
                if self.parts.engine.queue.is_some() && self.stopping.is_none() {
                    self.stopping = Some(reply);
                } else {
                    let queue = self.index;
                    let _ = reply.send(Err(WorkerError::NotRunning { queue }));
                }
            }
            Command::Call(fd, reply) => {
                self.call = fd.map(Call::new);
                if self.parts.engine.queue.is_some() {
                    self.signal_call();
                }
                let _ = reply.send(());
            }
            Command::Kick(fd, reply) => {
                self.disarm_kick();
                self.kick.fd = fd;
                if self.parts.engine.queue.is_some() {
                    self.arm_kick();
                }
                let _ = reply.send(());
            }
            Command::Err(fd, reply) => {
                self.err = fd;
                let _ = reply.send(());
            }
            Command::Enabled(is_enabled, reply) => {
                self.is_enabled = is_enabled;
                let _ = reply.send(());
            }
            Command::Memory(memory, reply) => {
                if let Some(queue) = &mut self.parts.engine.queue {
                    queue.set_memory(Arc::clone(&memory));
                }
                self.parts.engine.memory = memory;
                let _ = reply.send(());
            }
            Command::Exit => self.is_exiting = true,
        }
    }

    fn start(&mut self, ring: RingConfig) -> Result<(), WorkerError> {
        let index = self.index;
        if self.parts.engine.queue.is_some() {
            return Err(WorkerError::Running { queue: index });
        }
        let layout = ring.layout();
        let memory = Arc::clone(&ring.memory);
        let has_inflight = ring.inflight.is_some();
        let (queue, recovery) =
            Virtqueue::new(layout, ring.base, ring.features, ring.memory, ring.inflight).map_err(
                |source| WorkerError::Ring {
                    queue: index,
                    source,
                },
            )?;
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
        self.parts.engine.queue = Some(queue);
        self.parts.engine.memory = memory;
        self.has_logged_fault = false;
        self.has_logged_malformed = false;
        self.is_enabled = ring.enabled;
        self.call = ring.call.map(Call::new);
        if has_inflight {
            // A killed process may have returned chains and died before it said so.
            self.signal_call();
        }
        self.disarm_kick();
        self.kick.fd = ring.kick;
        self.arm_kick();
        Ok(())
    }

    fn signal_call(&self) {
        if let Some(call) = &self.call {
            self.parts.engine.stats.notifications.inc();
            call.signal();
        }
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

    fn is_popping(&self) -> bool {
        self.parts.engine.queue.is_some()
            && self.is_enabled
            && self.stopping.is_none()
            && !self.is_exiting
    }

    /// Hands a batch of chains to the handler. Whether there may be more.
    fn pop(&mut self) -> bool {
        if !self.is_popping() {
            return false;
        }
        let Parts { engine, handler } = &mut *self.parts;
        let mut popped = 0;
        let mut malformed = None;
        while popped < POP_BATCH {
            let Some(queue) = &mut engine.queue else {
                break;
            };
            match queue.pop() {
                None => break,
                Some(Popped::Chain(chain)) => {
                    handler.request(chain, &mut QueueIo { engine });
                }
                Some(Popped::Malformed(token, fault)) => {
                    queue.add_used(token, 0);
                    engine.stats.malformed_chains.inc();
                    malformed = Some(fault);
                }
            }
            popped += 1;
        }
        if popped > 0 {
            engine.stats.requests.add(popped);
            if let Some(queue) = &mut engine.queue {
                queue.disable_kicks();
            }
            handler.batch_end(&mut QueueIo { engine });
        }
        if let Some(fault) = malformed
            && !std::mem::replace(&mut self.has_logged_malformed, true)
        {
            tracing::warn!(
                queue = self.index,
                %fault,
                "the guest sent a malformed descriptor chain; further ones are only counted"
            );
        }
        popped == POP_BATCH
    }

    /// Shows the guest what was completed in this round.
    fn publish(&mut self) {
        let Some(queue) = &mut self.parts.engine.queue else {
            return;
        };
        let completed = u64::from(queue.unpublished());
        let fault = queue.fault();
        if completed > 0 {
            let wants_call = queue.publish();
            self.parts.engine.stats.completions.add(completed);
            if wants_call {
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
            self.parts.engine.stats.broken.inc();
            if let Some(err) = &self.err {
                let _ = rustix::io::write(err, &1u64.to_ne_bytes());
            }
        }
    }

    /// Ends the ring once nothing of it is held.
    fn finish_stop(&mut self) {
        let is_wanted = self.stopping.is_some() || self.is_exiting;
        if !is_wanted || self.parts.handler.chains_held() > 0 {
            return;
        }
        let Some(queue) = self.parts.engine.queue.take() else {
            return;
        };
        if queue.out_count() > 0 {
            let chains = queue.out_count();
            tracing::error!(queue = self.index, chains, "chains were lost by the card");
        }
        self.disarm_kick();
        self.kick.fd = None;
        if let Some(reply) = self.stopping.take() {
            let _ = reply.send(Ok(queue.next_avail()));
        }
    }

    /// Whether everything is over.
    fn finish_exit(&mut self) -> bool {
        if !self.is_exiting || self.parts.engine.queue.is_some() {
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
    fn rest(&mut self, has_more: bool) -> io::Result<()> {
        let is_popping = self.is_popping();
        let has_more = has_more || self.parts.handler.has_more();
        if !has_more && self.look(is_popping)? {
            return self.parts.engine.uring.submit();
        }
        let Parts { engine, handler } = &mut *self.parts;
        let has_more =
            has_more || is_popping && engine.queue.as_mut().is_some_and(Virtqueue::enable_kicks);
        if has_more {
            return engine.uring.submit();
        }
        let mut timeout = handler
            .deadline()
            .map(|at| at.saturating_duration_since(Instant::now()));
        if is_popping && !self.kick.is_armed {
            let interval = timeout.map_or(NO_KICK_INTERVAL, |t| t.min(NO_KICK_INTERVAL));
            timeout = Some(interval);
        }
        engine.uring.wait(timeout)
    }

    /// Before sleeping: looks for a while if events have been coming quickly. Whether there is
    /// something to do.
    fn look(&mut self, is_popping: bool) -> io::Result<bool> {
        let Parts { engine, .. } = &mut *self.parts;
        let wait = match engine.pending {
            0 => Wait::Guest,
            _ => Wait::Kernel,
        };
        let Some(until) = self.patience.begin(wait, Instant::now) else {
            return Ok(false);
        };
        engine.uring.submit()?;
        loop {
            // A doorbell, too, is a completion.
            if engine.uring.has_news()
                || is_popping && engine.queue.as_mut().is_some_and(Virtqueue::has_next)
            {
                return Ok(true);
            }
            if Instant::now() >= until {
                return Ok(false);
            }
            std::hint::spin_loop();
        }
    }
}
