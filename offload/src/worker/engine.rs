//! What the handler and the loop share: the io_uring and the thread's queues.

use std::io;
use std::sync::Arc;

use io_uring::squeue;
use smallvec::SmallVec;

use super::ring::Ring;
use super::tag::RESERVED;
use super::uring::Uring;
use crate::device::{Chain, ChainToken};
use crate::memory::GuestMemory;
use crate::telemetry::QueueStats;
use crate::virtqueue::Popped;

/// What the handler reaches through [`super::QueueIo`].
pub(super) struct Engine {
    pub(super) uring: Uring,
    /// The queues of this thread; mostly one.
    pub(super) rings: SmallVec<[Ring; 1]>,
    /// The ring whose turn it is.
    pub(super) current: usize,
    /// Memory to show while no ring runs.
    pub(super) memory: Arc<GuestMemory>,
    /// The handler's operations in the kernel or on the way there.
    pub(super) pending: usize,
    pub(super) is_exiting: bool,
}

impl Engine {
    /// Tells of all that was put off.
    pub(super) fn tell(&mut self) {
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
    /// As for [`super::QueueIo::push`].
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

    pub(super) fn is_running(&self, queue: u16) -> bool {
        let ring = self.rings.iter().find(|ring| ring.index == queue);
        ring.is_some_and(Ring::is_popping) && !self.is_exiting
    }

    /// Nothing more to pop for the handler until the driver has added something.
    pub(super) fn want(&mut self, queue: u16) {
        if let Some(ring) = self.rings.iter_mut().find(|ring| ring.index == queue) {
            ring.is_starved = true;
        }
    }
}
