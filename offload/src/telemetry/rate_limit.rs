//! Log lines that a stranger can cause, at a rate that the stranger cannot choose.

use std::time::{Duration, Instant};

/// Lets `burst` lines through at once and then one every `interval`; counts what it holds back.
///
/// The clock comes in as an argument. Each owner (a queue, a connection) has its own, so that a
/// noisy guest does not hide the lines of a quiet one.
///
/// ```
/// # use offload::telemetry::{RateLimited, shown};
/// # use std::time::{Duration, Instant};
/// let mut limit = RateLimited::new(5, Duration::from_secs(10));
/// if let Some(suppressed) = limit.allow(Instant::now()) {
///     tracing::warn!(suppressed = shown(suppressed), "the guest sent a descriptor loop");
/// }
/// ```
#[derive(Clone, Debug)]
pub struct RateLimited {
    interval: Duration,
    /// How far `next` may run ahead of the clock.
    tolerance: Duration,
    /// When the lines let through so far would be used up at one per interval.
    next: Option<Instant>,
    suppressed: u64,
}

impl RateLimited {
    /// `burst` is at least 1; 0 is taken as 1.
    #[must_use]
    pub fn new(burst: u32, interval: Duration) -> Self {
        Self {
            interval,
            tolerance: interval.saturating_mul(burst.saturating_sub(1)),
            next: None,
            suppressed: 0,
        }
    }

    /// May a line be written now? `Some` says yes, and how many were held back since the last one.
    pub fn allow(&mut self, now: Instant) -> Option<u64> {
        let next = self.next.map_or(now, |next| next.max(now));
        if next.duration_since(now) > self.tolerance {
            self.suppressed += 1;
            return None;
        }
        // An interval that no Instant can hold never ends; staying put would let all through.
        self.next = Some(next.checked_add(self.interval).unwrap_or(next + FAR));
        Some(std::mem::take(&mut self.suppressed))
    }
}

/// A count of lines held back as a field of a log line, which has none if none were.
#[must_use]
pub const fn shown(suppressed: u64) -> Option<u64> {
    if suppressed > 0 {
        Some(suppressed)
    } else {
        None
    }
}

/// Further away than any process lives, and near enough for an `Instant`.
const FAR: Duration = Duration::from_secs(100 * 365 * 86400);

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_burst_passes_then_one_line_an_interval_with_the_count_of_the_others() {
        let start = Instant::now();
        let mut limit = RateLimited::new(3, SECOND);
        for _ in 0..3 {
            assert_eq!(limit.allow(start), Some(0));
        }
        for _ in 0..100 {
            assert_eq!(limit.allow(start + SECOND / 2), None);
        }
        assert_eq!(limit.allow(start + SECOND), Some(100));
        assert_eq!(limit.allow(start + SECOND), None);
        assert_eq!(limit.allow(start + 2 * SECOND), Some(1));
    }

    #[test]
    fn quiet_time_refills_the_burst_and_not_more() {
        let start = Instant::now();
        let mut limit = RateLimited::new(2, SECOND);
        limit.allow(start);
        limit.allow(start);
        let later = start + 1000 * SECOND;
        assert_eq!(limit.allow(later), Some(0));
        assert_eq!(limit.allow(later), Some(0));
        assert_eq!(limit.allow(later), None);
    }

    #[test]
    fn a_clock_that_stands_or_an_endless_interval_never_opens_the_gate() {
        let now = Instant::now();
        let mut limit = RateLimited::new(0, Duration::MAX);
        assert_eq!(limit.allow(now), Some(0));
        for _ in 0..1000 {
            assert_eq!(limit.allow(now), None);
        }
    }
}
