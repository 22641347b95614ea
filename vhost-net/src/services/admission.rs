//! How many packets the services of an interface take: one limit over all of its queue pairs, as a VPC
//! has it for each interface.
//!
//! A bucket that holds one second's worth, in one number: when it is full again (GCRA, as in
//! [`offload::limit`]). Who is one too many is dropped, not made to wait: it is a flood.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// What the services take from the guest each second, and at most at once.
pub const PACKETS_PER_SECOND: u32 = 1024;

/// Nanoseconds for each of them.
const INTERVAL: u64 = SECOND / PACKETS_PER_SECOND as u64;
const SECOND: u64 = 1_000_000_000;

/// See the module.
#[derive(Debug)]
pub struct Admission {
    start: Instant,
    /// When the bucket is full again, in nanoseconds from the start.
    full_at: AtomicU64,
}

impl Default for Admission {
    fn default() -> Self {
        Self::new(Instant::now())
    }
}

impl Admission {
    /// A full bucket. No time before `start` is told from it.
    #[must_use]
    pub fn new(start: Instant) -> Self {
        Self {
            start,
            full_at: AtomicU64::new(0),
        }
    }

    /// Takes one packet. False: it is one too many.
    pub fn take(&self, now: Instant) -> bool {
        let now = now.saturating_duration_since(self.start).as_nanos();
        let now = u64::try_from(now).unwrap_or(u64::MAX);
        let taken = |full_at: u64| {
            let full_at = full_at.max(now);
            (full_at - now <= SECOND - INTERVAL).then(|| full_at.saturating_add(INTERVAL))
        };
        // Relaxed: the number orders nothing but itself.
        let order = Ordering::Relaxed;
        self.full_at.fetch_update(order, order, taken).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_seconds_worth_passes_at_once_and_then_the_rate() {
        let start = Instant::now();
        let admission = Admission::new(start);
        let passed = |now: Instant| (0..5000).filter(|_| admission.take(now)).count();
        assert_eq!(passed(start), 1024);
        assert_eq!(passed(start + Duration::from_millis(250)), 256);
        assert_eq!(passed(start + Duration::from_secs(60)), 1024);
        // Time that goes back, as seen by another thread, earns nothing.
        assert_eq!(passed(start), 0);
    }

    #[test]
    fn threads_that_take_at_once_get_no_more_together() {
        let start = Instant::now();
        let admission = Admission::new(start);
        let count = || (0..2000).filter(|_| admission.take(start)).count();
        let sum = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(count)).collect();
            let counts = threads.into_iter().map(|thread| thread.join().unwrap());
            counts.sum::<usize>()
        });
        assert_eq!(sum, 1024);
    }
}
