//! The io_uring of a queue: submissions that are never lost, completions in bounded portions.

use std::collections::VecDeque;
use std::io;
use std::mem::MaybeUninit;
use std::time::Duration;

use io_uring::{IoUring, cqueue, squeue, types};
use rustix::io::Errno;

const SQ_ENTRIES: u32 = 256;
const CQ_ENTRIES: u32 = 2048;

pub(super) struct Uring {
    ring: IoUring,
    /// What did not fit; in order, submitted before anything newer.
    backlog: VecDeque<squeue::Entry>,
}

/// The kernel cannot take or give more right now; trying again after the completions have been
/// taken is the cure.
fn is_passing(error: &io::Error) -> bool {
    let passing = [Errno::INTR, Errno::AGAIN, Errno::BUSY, Errno::TIME];
    passing
        .iter()
        .any(|e| error.raw_os_error() == Some(e.raw_os_error()))
}

fn ignore_passing(result: io::Result<usize>) -> io::Result<()> {
    match result {
        Err(error) if !is_passing(&error) => Err(error),
        _ => Ok(()),
    }
}

impl Uring {
    /// To be called on the thread that uses it.
    pub(super) fn new() -> io::Result<Self> {
        let best = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_submit_all()
            .setup_clamp()
            .setup_cqsize(CQ_ENTRIES)
            .build(SQ_ENTRIES);
        let ring = match best {
            // Before Linux 6.1.
            Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {
                IoUring::builder()
                    .setup_clamp()
                    .setup_cqsize(CQ_ENTRIES)
                    .build(SQ_ENTRIES)?
            }
            other => other?,
        };
        Ok(Self {
            ring,
            backlog: VecDeque::new(),
        })
    }

    /// # Safety
    /// As for [`super::QueueIo::push`].
    #[inline]
    pub(super) unsafe fn push(&mut self, entry: squeue::Entry) {
        // SAFETY: the caller's promise is the one asked for.
        if !self.backlog.is_empty() || unsafe { self.try_push(&entry) }.is_err() {
            self.backlog.push_back(entry);
        }
    }

    /// # Safety
    /// As for [`super::QueueIo::push`].
    unsafe fn try_push(&mut self, entry: &squeue::Entry) -> Result<(), squeue::PushError> {
        // SAFETY: the caller's promise is the one asked for.
        if unsafe { self.ring.submission().push(entry) }.is_ok() {
            return Ok(());
        }
        // An error here is met again, and reported, when the round submits.
        let _ = self.ring.submit();
        // SAFETY: the caller's promise is the one asked for.
        unsafe { self.ring.submission().push(entry) }
    }

    fn take_backlog(&mut self) {
        while let Some(entry) = self.backlog.pop_front() {
            // SAFETY: whoever pushed the entry promised it for as long as it takes.
            if unsafe { self.try_push(&entry) }.is_err() {
                self.backlog.push_front(entry);
                return;
            }
        }
    }

    /// Submits without waiting, if there is anything to submit or to run.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        self.take_backlog();
        let sq = self.ring.submission();
        if sq.is_empty() && !sq.taskrun() && !sq.cq_overflow() {
            return Ok(());
        }
        drop(sq);
        ignore_passing(self.ring.submit())
    }

    /// Submits, and waits for a completion or until `timeout` has passed.
    pub(super) fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.take_backlog();
        if !self.backlog.is_empty() {
            // The kernel takes nothing now; completions may be what it lacks room for.
            return ignore_passing(self.ring.submit());
        }
        let Some(timeout) = timeout else {
            return ignore_passing(self.ring.submit_and_wait(1));
        };
        let timespec = types::Timespec::from(timeout);
        let args = types::SubmitArgs::new().timespec(&timespec);
        ignore_passing(self.ring.submitter().submit_with_args(1, &args))
    }

    /// Whether there are completions, or the kernel has some to deliver at the next call.
    #[inline]
    pub(super) fn has_news(&mut self) -> bool {
        let sq = self.ring.submission();
        let has_some = sq.taskrun() || sq.cq_overflow();
        drop(sq);
        has_some || !self.ring.completion().is_empty()
    }

    /// Takes completions that are there, as many as fit.
    #[inline]
    pub(super) fn completions<'b>(
        &mut self,
        buf: &'b mut [MaybeUninit<cqueue::Entry>],
    ) -> &'b mut [cqueue::Entry] {
        self.ring.completion().fill(buf)
    }
}
