//! The loop of a queue's thread.

use std::io;
use std::mem::{ManuallyDrop, MaybeUninit};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use io_uring::cqueue;

use super::engine::Engine;
use super::patience::Patience;
use super::ring::Ring;
use super::tag::{DOORBELL, OWN};
use super::{Command, Doorbell, QueueIo};
use crate::device::QueueHandler;
use crate::virtqueue::Popped;

mod commands;
mod polls;
mod rest;

/// Chains popped in a round, so that completions get their turn.
const POP_BATCH: u64 = 64;
/// Completions handed out in a round. Few, so that guest, card and disk work at the same time: what is
/// done is told, and what the guest asks for next is in the kernel, while the next ones are being
/// decrypted. When all that are there make one round, requests clump: at 4 KiB and depth 32, 15 of
/// them moved together from the disk to the guest and back, and whoever did not have them waited.
const CQE_BATCH: usize = 4;
/// What must not be dropped while the kernel works on it.
struct Parts<H> {
    engine: Engine,
    handler: H,
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
        let outcome = catch_unwind(AssertUnwindSafe(|| self.go_round()));
        if let Ok(Ok(())) = outcome {
            // SAFETY: dropped once, here; `self.parts` is not touched afterwards, and `Rounds`
            // has no Drop. The kernel has nothing of it any more.
            unsafe { ManuallyDrop::drop(&mut self.parts) };
            return Ok(());
        }
        self.parts.handler.abandoned();
        outcome.unwrap_or_else(|panic| resume_unwind(panic))
    }

    fn go_round(&mut self) -> io::Result<()> {
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
        let mut has_enough = false;
        while popped < POP_BATCH && !has_enough {
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
                    has_enough = handler.has_enough();
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
        popped == POP_BATCH || has_enough
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
}
