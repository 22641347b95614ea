//! The loop's own operations: polls on the doorbell and on kick eventfds.

use std::io;
use std::os::fd::AsRawFd;

use io_uring::{cqueue, opcode, squeue, types};
use rustix::event::PollFlags;

use super::Rounds;
use crate::device::QueueHandler;
use crate::worker::tag::{self, CANCEL, DOORBELL, KICK, KIND, OWN};

/// How often a poll on a kick eventfd may end before it is taken for something else.
const KICK_ENDS_MAX: u8 = 8;

impl<H: QueueHandler> Rounds<H> {
    /// Whether it was the doorbell.
    pub(super) fn own_completion(&mut self, cqe: &cqueue::Entry) -> io::Result<bool> {
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
                let slot = tag::slot_of(cqe.user_data());
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
    pub(super) fn cancel(&mut self, user_data: u64) {
        let entry = opcode::AsyncCancel::new(user_data).build();
        self.push_own(entry, OWN | CANCEL);
    }

    pub(super) fn arm_doorbell(&mut self) {
        self.arm(self.doorbell.eventfd.as_raw_fd(), OWN | DOORBELL);
        self.is_doorbell_armed = true;
    }

    pub(super) fn arm_kick(&mut self, slot: usize) {
        let Some(ring) = self.ring(slot) else { return };
        if let Some(fd) = ring.kick.fd.as_ref().map(AsRawFd::as_raw_fd) {
            ring.kick.is_armed = true;
            let user_data = ring.kick.user_data(slot);
            self.arm(fd, user_data);
        }
    }

    /// Ends the poll on the kick eventfd; what it still reports is ignored.
    pub(super) fn disarm_kick(&mut self, slot: usize) {
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
}
