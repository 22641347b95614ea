//! The wish to stop, as something that threads can poll.
//!
//! A [`StopSignal`] is a flag and the read end of a pipe. The flag is for loops that look; the
//! pipe, which turns readable once and stays so because nobody reads it, is for threads that
//! sleep in `poll` or in an io_uring. A signal handler sets the flag and then writes to the pipe,
//! so whoever is woken finds the flag set.
//!
//! A pipe and not an eventfd: signal handlers then need no code of ours, only `signal-hook`'s
//! ready-made actions (a handler that writes a byte; an eventfd takes writes of 8 bytes only).
//!
//! A second SIGTERM does nothing more. Killing at the second one is tempting, but Ctrl-C reaches
//! the whole process group, and a supervisor in that group also sends SIGTERM: each card would be
//! shot in its clean-up. SIGKILL is there for those who mean it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::{PipeFlags, pipe_with};
use signal_hook::SigId;
use signal_hook::consts::{SIGINT, SIGTERM};

/// The wish to stop. Clones are the same signal.
#[derive(Clone, Debug)]
pub struct StopSignal(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    stopped: Arc<AtomicBool>,
    readable: OwnedFd,
    writable: OwnedFd,
    registrations: Vec<SigId>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        for id in self.registrations.drain(..) {
            signal_hook::low_level::unregister(id);
        }
    }
}

impl StopSignal {
    /// A signal that only [`StopSignal::stop`] sets.
    ///
    /// # Errors
    /// The process is out of file descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(Inner::new()?)))
    }

    /// A signal that SIGTERM, SIGINT and [`StopSignal::stop`] set. Once the last clone is dropped
    /// the two signals are swallowed, so keep one as long as the process lives.
    ///
    /// # Errors
    /// The process is out of file descriptors, or the handlers could not be installed.
    pub fn from_signals() -> io::Result<Self> {
        let mut inner = Inner::new()?;
        for signal in [SIGTERM, SIGINT] {
            // In this order: actions run in the order in which they were registered.
            let flag = signal_hook::flag::register(signal, Arc::clone(&inner.stopped))?;
            inner.registrations.push(flag);
            let write = inner.writable.try_clone()?;
            let wake = signal_hook::low_level::pipe::register(signal, write)?;
            inner.registrations.push(wake);
        }
        Ok(Self(Arc::new(inner)))
    }

    /// Asks everyone to stop. Calling it again does nothing.
    pub fn stop(&self) {
        self.0.stopped.store(true, Ordering::SeqCst);
        // A full pipe is a readable pipe, so the only error that can come is no error.
        let _ = rustix::io::write(&self.0.writable, &[0]);
    }

    /// Has someone asked?
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.0.stopped.load(Ordering::SeqCst)
    }

    /// Readable from the stop on, for ever. Do not read it.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.readable.as_fd()
    }

    /// Sleeps until the stop or until `timeout` has passed; `None` waits for ever. Says whether
    /// it is a stop.
    #[must_use]
    pub fn wait(&self, timeout: Option<Duration>) -> bool {
        // A timeout beyond what an Instant can hold is as good as none.
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        while !self.is_stopped() {
            let left = match deadline {
                None => None,
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return false;
                    }
                    Some(timespec(left))
                }
            };
            let mut fds = [PollFd::new(&self.0.readable, PollFlags::IN)];
            if let Err(error) = poll(&mut fds, left.as_ref())
                && error != rustix::io::Errno::INTR
            {
                // Out of kernel memory, say. Look at the flag now and then instead of spinning.
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        true
    }
}

impl Inner {
    fn new() -> io::Result<Self> {
        let (readable, writable) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        Ok(Self {
            stopped: Arc::new(AtomicBool::new(false)),
            readable,
            writable,
            registrations: Vec::new(),
        })
    }
}

/// As the kernel takes it, cut to what it can hold.
pub(crate) fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: duration.subsec_nanos().into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_readable(stop: &StopSignal) -> bool {
        let fd = stop.fd();
        let mut fds = [PollFd::new(&fd, PollFlags::IN)];
        poll(&mut fds, Some(&timespec(Duration::ZERO))).unwrap() == 1
    }

    #[test]
    fn a_stop_reaches_every_clone_and_stays() {
        let stop = StopSignal::new().unwrap();
        let clone = stop.clone();
        assert!(!clone.is_stopped());
        assert!(!is_readable(&clone));
        stop.stop();
        for _ in 0..2 {
            assert!(clone.is_stopped());
            assert!(is_readable(&clone));
            assert!(clone.wait(None));
        }
    }

    #[test]
    fn stopping_a_hundred_thousand_times_neither_blocks_nor_fails() {
        let stop = StopSignal::new().unwrap();
        for _ in 0..100_000 {
            stop.stop();
        }
        assert!(is_readable(&stop));
    }

    #[test]
    fn waiting_ends_at_the_timeout_or_at_the_stop() {
        let stop = StopSignal::new().unwrap();
        assert!(!stop.wait(Some(Duration::from_millis(20))));
        let sleeper = std::thread::spawn({
            let stop = stop.clone();
            move || stop.wait(Some(Duration::MAX))
        });
        stop.stop();
        assert!(sleeper.join().unwrap());
    }

    #[test]
    fn sigterm_sets_the_signal() {
        let stop = StopSignal::from_signals().unwrap();
        assert!(!stop.is_stopped());
        signal_hook::low_level::raise(SIGTERM).unwrap();
        assert!(stop.wait(Some(Duration::from_secs(10))));
        assert!(is_readable(&stop));
    }
}
