//! One thread and one io_uring a queue.
//!
//! ```text
//!        ┌────────────────────────────── a round ──────────────────────────────┐
//!        ▼                                                                     │
//!  completions ──► commands, wake ──► pop ≤ 64 chains ──► round_end ──► publish, one call
//!  (≤ 4)                              batch_end                          │
//!                                                                        ▼
//!                  more to pop, or to do: submit, next round    else: ask for kicks, look again,
//!                                                                submit and wait (or deadline)
//! ```
//!
//! # One wait
//! Kicks, commands, wakes and I/O completions all arrive as completions of the one ring, so there
//! is one place to sleep, no wakeup while nothing happens, and one system call submits a batch and
//! waits. The ring is made by its thread with SINGLE_ISSUER and DEFER_TASKRUN: completions are
//! delivered when this thread asks for them, not by interrupting it. Kernels that refuse the flags
//! get a plain ring.
//!
//! # Eventfds that are never read
//! Kick and doorbell eventfds are watched by one multishot POLL_ADD each. Such a poll reports
//! *writes*, not levels: each write wakes it whether or not the counter was drained. So nobody
//! reads the counter, which saves a system call or an SQE for each kick; it takes 2^64 kicks to
//! fill. A READ that is armed again after each kick was the other choice: an SQE a kick instead of
//! none. A non-zero counter at the start costs one look at an empty ring.
//!
//! # Notifications
//! A queue that finds work asks for no more kicks until it has found none; then it asks for them
//! and looks once more before it sleeps. Used chains are published once a round, with at most one
//! write to the call eventfd.
//!
//! # Stopping
//! A stopped queue pops no more, but runs on until the handler holds no chain; only then it
//! answers with its next available index; a handler that throttles is told to stop doing so. When the thread ends it also waits for every
//! operation in the kernel. A handler that panics, or an io_uring that fails, ends the thread at
//! once; what the kernel may still write to is then leaked rather than freed, and the handler is told
//! ([`crate::device::QueueHandler::abandoned`]), so that nobody waits for it.
//!
//! # Several queues on one thread
//! A device whose queues share state (a network card's receive and transmit queue) names a leader
//! for each ([`Device::leader`]): they share thread, io_uring and handler, and need no lock
//! between them. A queue whose chains are empty buffers to be filled some day is *pulled*: the
//! handler takes chains when it has something to put in, and the driver is asked to kick only
//! while the handler lacks some.
//!
//! # Polling
//! A device may allow a queue to look for its next event for some microseconds before it sleeps
//! ([`Device::poll_limit`]). When that is worth it is told in `patience`. An idle queue sleeps.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use io_uring::squeue;
use rustix::event::EventfdFlags;

use crate::device::{Chain, ChainToken, Device, DeviceError};
use crate::inflight::QueueInflight;
use crate::memory::GuestMemory;
use crate::telemetry::QueueStats;
use crate::virtqueue::{RingError, RingLayout};

mod engine;
mod patience;
mod ring;
mod rounds;
mod tag;
mod uring;

use engine::Engine;
use rounds::Rounds;

#[cfg(test)]
mod tests;

/// Why a queue's thread could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The thread, its io_uring or its eventfd could not be made.
    #[error("cannot set up the thread of queue {queue}")]
    Setup {
        /// Which queue.
        queue: u16,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// The device could not make the queue's handler.
    #[error("the device cannot set up queue {queue}")]
    Handler {
        /// Which queue.
        queue: u16,
        /// What the device said.
        source: DeviceError,
    },
    /// The ring is not where the frontend says or not of a valid size.
    #[error("queue {queue} cannot be started")]
    Ring {
        /// Which queue.
        queue: u16,
        /// What is wrong with it.
        #[source]
        source: RingError,
    },
    /// Start without stop.
    #[error("queue {queue} is already running")]
    Running {
        /// Which queue.
        queue: u16,
    },
    /// Stop without start.
    #[error("queue {queue} is not running")]
    NotRunning {
        /// Which queue.
        queue: u16,
    },
    /// The thread has ended: it panicked, or its io_uring failed. The log has the reason.
    #[error("the thread of queue {queue} is gone; the log says why")]
    Gone {
        /// Which queue.
        queue: u16,
    },
}

/// A ring as the frontend describes it. Addresses are guest physical.
#[derive(Debug)]
pub struct RingConfig {
    /// Descriptors (SET_VRING_NUM), a power of two.
    pub size: u16,
    /// Address of the descriptor table.
    pub desc_table: u64,
    /// Address of the available ring.
    pub avail_ring: u64,
    /// Address of the used ring.
    pub used_ring: u64,
    /// Next available index to look at (SET_VRING_BASE). Not used when `inflight` is there.
    pub base: u16,
    /// Features that the driver accepted.
    pub features: u64,
    /// Kick eventfd; without one the ring is looked at every millisecond.
    pub kick: Option<OwnedFd>,
    /// Call eventfd; without one the guest polls.
    pub call: Option<OwnedFd>,
    /// Guest memory, which must hold the rings.
    pub memory: Arc<GuestMemory>,
    /// This queue's part of the in-flight region.
    pub inflight: Option<QueueInflight>,
    /// Whether chains may be popped (SET_VRING_ENABLE).
    pub enabled: bool,
}

impl RingConfig {
    fn layout(&self) -> RingLayout {
        RingLayout {
            size: self.size,
            desc_table: self.desc_table,
            avail_ring: self.avail_ring,
            used_ring: self.used_ring,
        }
    }
}

/// What the control plane asks of a queue's thread. Each is answered, so that what the frontend
/// has been told is true when it is told.
enum Command {
    Start(Box<RingConfig>, Sender<Result<(), WorkerError>>),
    Stop(Sender<Result<u16, WorkerError>>),
    Call(Option<OwnedFd>, Sender<()>),
    Kick(Option<OwnedFd>, Sender<()>),
    Err(Option<OwnedFd>, Sender<()>),
    Enabled(bool, Sender<()>),
    Memory(Arc<GuestMemory>, Sender<()>),
    Exit,
}

/// What wakes a queue's thread from outside.
#[derive(Debug)]
struct Doorbell {
    eventfd: OwnedFd,
    woken: AtomicBool,
}

impl Doorbell {
    fn ring(&self) {
        // It can only fail when the counter is full, and then the thread has been woken.
        let _ = rustix::io::write(&self.eventfd, &1u64.to_ne_bytes());
    }
}

/// Makes a queue's loop call [`crate::device::QueueHandler::wake`], from any thread. Cheap when
/// the loop has not got round to the last wake yet. Outliving the queue does no harm.
#[derive(Clone, Debug)]
pub struct Waker {
    doorbell: Arc<Doorbell>,
}

impl Waker {
    /// Wakes. What the caller wrote before is visible to the handler.
    pub fn wake(&self) {
        if !self.doorbell.woken.swap(true, Ordering::AcqRel) {
            self.doorbell.ring();
        }
    }
}

/// What a handler can do to its queue.
pub struct QueueIo<'a> {
    engine: &'a mut Engine,
}

impl std::fmt::Debug for QueueIo<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("QueueIo").finish_non_exhaustive()
    }
}

impl QueueIo<'_> {
    /// Queues an operation, which is submitted at the latest when the round ends. Its result goes
    /// to [`crate::device::QueueHandler::completion`] with `user_data`, whose two top bits must be
    /// 0. Never fails: if the kernel takes no more at the moment, it is kept and submitted later.
    /// So a linked operation may be submitted apart from its predecessor: don't link.
    ///
    /// # Safety
    /// The buffers and file descriptors in `entry` must stay valid, and unused by others as far as
    /// the operation demands it, until its completion is delivered, even if the handler is dropped
    /// in between; guest memory counts as valid until the chain is completed.
    pub unsafe fn push(&mut self, entry: squeue::Entry, user_data: u64) {
        // SAFETY: the caller's promise is the one asked for.
        unsafe { self.engine.push(entry, user_data) }
    }

    /// Submits what was pushed now, not when the round ends: for a handler that is about to
    /// compute for a while.
    pub fn submit(&mut self) {
        self.engine.submit();
    }

    /// Returns a chain with the number of bytes written to its device-writable part. No operation
    /// on its buffers may be under way.
    pub fn complete(&mut self, token: ChainToken, written: u32) {
        self.engine.complete(token, written);
    }

    /// The queue whose chain was handed over or popped last. On a thread of several queues,
    /// [`Self::memory`] is that queue's.
    #[must_use]
    pub fn queue(&self) -> u16 {
        self.engine.queue()
    }

    /// Takes a chain of a queue that [`crate::device::QueueHandler::is_pulled`]. `None`: there is
    /// none, or the queue does not run; the loop goes round again when there may be one.
    #[must_use]
    pub fn pop(&mut self, queue: u16) -> Option<Chain> {
        self.engine.pop(queue)
    }

    /// Gives back the chain that was popped last, as if it had never been taken. Several go back
    /// in the reverse order.
    pub fn unpop(&mut self, token: ChainToken) {
        self.engine.unpop(token);
    }

    /// Whether a queue of this thread runs and is enabled: [`Self::pop`] may then find a chain.
    #[must_use]
    pub fn is_running(&self, queue: u16) -> bool {
        self.engine.is_running(queue)
    }

    /// The chains that a queue has do not suffice: the loop is to go round again when the driver
    /// has added some.
    pub fn want(&mut self, queue: u16) {
        self.engine.want(queue);
    }

    /// Guest memory as it is now; empty before the first start.
    #[must_use]
    pub fn memory(&self) -> &Arc<GuestMemory> {
        self.engine.memory()
    }
}

/// A queue's thread. It lives as long as the device; rings start and stop on it. Dropping stops,
/// waits for what is in flight, and joins.
#[derive(Debug)]
pub struct QueueThread {
    index: u16,
    /// Which ring of the thread it is.
    slot: usize,
    commands: Sender<(usize, Command)>,
    doorbell: Arc<Doorbell>,
    thread: Arc<Thread>,
}

/// A thread, joined when the last of its queues is dropped.
#[derive(Debug)]
struct Thread {
    index: u16,
    commands: Sender<(usize, Command)>,
    doorbell: Arc<Doorbell>,
    handle: Option<JoinHandle<()>>,
}

impl QueueThread {
    /// Starts the thread of queue `index`, makes its io_uring and the device's handler on it.
    ///
    /// # Errors
    /// Any of these failed.
    pub fn spawn<D: Device>(
        device: Arc<D>,
        index: u16,
        stats: Arc<QueueStats>,
    ) -> Result<Self, WorkerError> {
        let mut queues = Self::spawn_group(device, vec![(index, stats)])?;
        queues.pop().ok_or(WorkerError::Gone { queue: index })
    }

    /// Starts one thread for several queues; the handler is that of the first.
    ///
    /// # Errors
    /// The thread, its io_uring or the device's handler could not be made.
    pub fn spawn_group<D: Device>(
        device: Arc<D>,
        queues: Vec<(u16, Arc<QueueStats>)>,
    ) -> Result<Vec<Self>, WorkerError> {
        let Some(&(index, _)) = queues.first() else {
            return Ok(Vec::new());
        };
        let indices: Vec<u16> = queues.iter().map(|(index, _)| *index).collect();
        let setup = move |source| WorkerError::Setup {
            queue: index,
            source,
        };
        let eventfd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| setup(errno.into()))?;
        let doorbell = Arc::new(Doorbell {
            eventfd,
            woken: AtomicBool::new(false),
        });
        let (commands, inbox) = channel();
        let (ready, is_ready) = channel();
        let bell = Arc::clone(&doorbell);
        let body = move || {
            let waker = Waker {
                doorbell: Arc::clone(&bell),
            };
            let poll_limit = device.poll_limit();
            let made = Engine::new(queues).map_err(setup).and_then(|engine| {
                match device.queue(index, waker) {
                    Ok(handler) => Ok(Rounds::new(engine, handler, bell, inbox, poll_limit)),
                    Err(source) => Err(WorkerError::Handler {
                        queue: index,
                        source,
                    }),
                }
            });
            drop(device);
            match made {
                Ok(rounds) => {
                    let _ = ready.send(Ok(()));
                    if let Err(error) = rounds.run() {
                        tracing::error!(queue = index, %error, "the queue's io_uring failed");
                    }
                }
                Err(error) => {
                    let _ = ready.send(Err(error));
                }
            }
        };
        let thread = std::thread::Builder::new()
            .name(format!("vq-{index}"))
            .spawn(body)
            .map_err(setup)?;
        match is_ready.recv() {
            Ok(Ok(())) => {
                let thread = Arc::new(Thread {
                    index,
                    commands: commands.clone(),
                    doorbell: Arc::clone(&doorbell),
                    handle: Some(thread),
                });
                let of = |(slot, &index): (usize, &u16)| Self {
                    index,
                    slot,
                    commands: commands.clone(),
                    doorbell: Arc::clone(&doorbell),
                    thread: Arc::clone(&thread),
                };
                Ok(indices.iter().enumerate().map(of).collect())
            }
            Ok(Err(error)) => {
                let _ = thread.join();
                Err(error)
            }
            Err(_) => Err(WorkerError::Gone { queue: index }),
        }
    }

    /// The queue.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Sends a command and waits for the answer.
    fn ask<T>(&self, make: impl FnOnce(Sender<T>) -> Command) -> Result<T, WorkerError> {
        let gone = || WorkerError::Gone { queue: self.index };
        let (reply, answer) = channel();
        let command = (self.slot, make(reply));
        self.commands.send(command).map_err(|_| gone())?;
        self.doorbell.ring();
        answer.recv().map_err(|_| gone())
    }

    /// Starts a ring; it runs when this returns. The thread looks at it at once, without a kick.
    ///
    /// # Errors
    /// The ring is not sound, or one is running.
    pub fn start(&self, ring: RingConfig) -> Result<(), WorkerError> {
        self.ask(|reply| Command::Start(Box::new(ring), reply))?
    }

    /// Stops popping, waits until the handler holds no chain, and gives the next available index
    /// (what GET_VRING_BASE answers). Nothing touches guest memory afterwards.
    ///
    /// # Errors
    /// No ring is running.
    pub fn stop(&self) -> Result<u16, WorkerError> {
        self.ask(Command::Stop)?
    }

    /// Exchanges the call eventfd (SET_VRING_CALL) and signals the new one once, since an
    /// interrupt may have gone to the old one. In force when this returns.
    pub fn set_call(&self, call: Option<OwnedFd>) {
        let _ = self.ask(|reply| Command::Call(call, reply));
    }

    /// Exchanges the kick eventfd (SET_VRING_KICK) and looks at the ring once.
    pub fn set_kick(&self, kick: Option<OwnedFd>) {
        let _ = self.ask(|reply| Command::Kick(kick, reply));
    }

    /// Exchanges the error eventfd (SET_VRING_ERR), which is signalled when the guest breaks the
    /// ring.
    pub fn set_err(&self, err: Option<OwnedFd>) {
        let _ = self.ask(|reply| Command::Err(err, reply));
    }

    /// Enables or disables popping (SET_VRING_ENABLE). Chains that are out go on.
    pub fn set_enabled(&self, enabled: bool) {
        let _ = self.ask(|reply| Command::Enabled(enabled, reply));
    }

    /// Exchanges the guest's memory while the ring runs. When this returns, new chains are looked
    /// up in the new memory; chains that are out keep the old mapping.
    pub fn set_memory(&self, memory: Arc<GuestMemory>) {
        let _ = self.ask(|reply| Command::Memory(memory, reply));
    }

    /// Whether the thread still serves. It ends early only by a panic or a failing io_uring.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        let handle = self.thread.handle.as_ref();
        handle.is_some_and(|handle| !handle.is_finished())
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        let _ = self.commands.send((0, Command::Exit));
        self.doorbell.ring();
        if let Some(handle) = self.handle.take()
            && handle.join().is_err()
        {
            tracing::error!(queue = self.index, "the queue's thread had panicked");
        }
    }
}
