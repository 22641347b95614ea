//! One queue of a thread: its virtqueue, its eventfds, and when the guest is told.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;

use super::{WorkerError, tag};
use crate::telemetry::QueueStats;
use crate::virtqueue::{ChainFault, Virtqueue};

/// With so many chains of a ring out, the guest is told of a few completions together, while the
/// thread is at work anyway or looks for the next event: waking a guest's processor costs as much as
/// serving a small request, and a guest that has so much to wait for does not miss the first of it.
const BUSY_OUT: u16 = 12;
/// So many are not put off any more.
const TOLD_TOGETHER: u64 = 4;

/// One queue of a thread.
pub(super) struct Ring {
    pub(super) index: u16,
    pub(super) queue: Option<Virtqueue>,
    pub(super) stats: Arc<QueueStats>,
    /// The handler takes chains as it needs them.
    pub(super) is_pulled: bool,
    /// It wanted one and there was none.
    pub(super) is_starved: bool,
    pub(super) is_enabled: bool,
    pub(super) stopping: Option<Sender<Result<u16, WorkerError>>>,
    pub(super) kick: Kick,
    pub(super) call: Option<Call>,
    /// Completions that were shown since the guest asked to be told of them and was not yet.
    pub(super) untold: u64,
    pub(super) err: Option<OwnedFd>,
    pub(super) has_logged_fault: bool,
    pub(super) has_logged_malformed: bool,
}

impl Ring {
    pub(super) fn new(index: u16, stats: Arc<QueueStats>) -> Self {
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

    pub(super) fn is_popping(&self) -> bool {
        self.queue.is_some() && self.is_enabled && self.stopping.is_none()
    }

    /// Tells of what was put off, if anything.
    pub(super) fn tell(&mut self) {
        if self.untold > 0 {
            self.signal_call();
        }
    }

    pub(super) fn signal_call(&mut self) {
        self.untold = 0;
        if let Some(call) = &self.call {
            self.stats.notifications.inc();
            call.signal();
        }
    }

    pub(super) fn malformed(&mut self, fault: ChainFault) {
        if !std::mem::replace(&mut self.has_logged_malformed, true) {
            tracing::warn!(
                queue = self.index,
                %fault,
                "the guest sent a malformed descriptor chain; further ones are only counted"
            );
        }
    }

    /// Shows the guest what was completed in this round.
    pub(super) fn publish(&mut self) {
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

/// The call eventfd.
pub(super) struct Call {
    fd: OwnedFd,
    /// A full counter would block a write to it: ask first.
    may_block: bool,
}

impl Call {
    pub(super) fn new(fd: OwnedFd) -> Self {
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
pub(super) struct Kick {
    pub(super) fd: Option<OwnedFd>,
    /// Tells the poll on this eventfd from those on earlier ones.
    pub(super) generation: u32,
    pub(super) is_armed: bool,
    /// How often the poll has ended by itself since it last went on.
    pub(super) ends_in_a_row: u8,
}

impl Kick {
    pub(super) fn user_data(&self, slot: usize) -> u64 {
        tag::of_kick(self.generation, slot)
    }
}
