//! Whether to look for the next event for a while before sleeping.
//!
//! To sleep and be woken costs a switch, an interrupt between processors and often the way out of
//! a deep sleep of the processor: more than many an event is away. So the loop may look at the
//! available ring and the completion queue for up to a limit before it asks for kicks and sleeps,
//! which spares the guest its kicks too. It does so only while at least [`HITS_MIN`] of the last
//! eight waits ended within the limit. So a queue without requests looks once, in vain, and
//! sleeps; one whose disk takes longer than the limit stops looking after a few requests, and
//! begins again when the disk becomes fast.
//!
//! Waits for the guest alone and waits with operations in the kernel are of different lengths and
//! often alternate, so each kind has its own history. QEMU's one window, which each long wait
//! closes, never opens at queue depth 1 on a disk that is slower than the limit.

use std::time::{Duration, Instant};

/// Hits among the last eight waits that make it worth looking.
const HITS_MIN: u32 = 6;

/// What a wait is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    /// Nothing is in the kernel: the guest's next chain.
    Guest,
    /// Operations are in the kernel.
    Kernel,
}

/// Histories of waits.
#[derive(Debug)]
pub(super) struct Patience {
    limit: Duration,
    /// A bit for each of the last waits, newest lowest: it ended within the limit.
    guest: u8,
    kernel: u8,
    /// What is being waited for, and since when.
    wait: Option<(Wait, Instant)>,
}

impl Patience {
    /// Looks for at most `limit`; zero: never.
    pub(super) const fn new(limit: Duration) -> Self {
        Self {
            limit,
            guest: 0,
            kernel: 0,
            wait: None,
        }
    }

    /// For how long is looked at most.
    pub(super) const fn limit(&self) -> Duration {
        self.limit
    }

    /// A wait begins at `now()`. Until when to look, if at all.
    pub(super) fn begin(&mut self, wait: Wait, now: impl FnOnce() -> Instant) -> Option<Instant> {
        if self.limit.is_zero() {
            return None;
        }
        let now = now();
        self.wait = Some((wait, now));
        let history = match wait {
            Wait::Guest => self.guest,
            Wait::Kernel => self.kernel,
        };
        (history.count_ones() >= HITS_MIN).then(|| now + self.limit)
    }

    /// Something has come.
    pub(super) fn end(&mut self, now: impl FnOnce() -> Instant) {
        let Some((wait, since)) = self.wait.take() else {
            return;
        };
        let is_hit = now().saturating_duration_since(since) <= self.limit;
        let history = match wait {
            Wait::Guest => &mut self.guest,
            Wait::Kernel => &mut self.kernel,
        };
        *history = *history << 1 | u8::from(is_hit);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_micros(32);

    /// Waits of these lengths in microseconds, and how long was looked in all.
    fn looked(patience: &mut Patience, waits: impl IntoIterator<Item = (Wait, u64)>) -> Duration {
        let mut now = Instant::now();
        let mut total = Duration::ZERO;
        for (wait, micros) in waits {
            let end = now + Duration::from_micros(micros);
            if let Some(until) = patience.begin(wait, || now) {
                total += until.min(end) - now;
            }
            now = end;
            patience.end(|| now);
        }
        total
    }

    #[test]
    fn with_no_limit_nobody_looks() {
        let mut patience = Patience::new(Duration::ZERO);
        let waits = [(Wait::Guest, 0); 100];
        assert_eq!(looked(&mut patience, waits), Duration::ZERO);
    }

    #[test]
    fn events_in_quick_succession_are_looked_for() {
        let mut patience = Patience::new(LIMIT);
        let total = looked(&mut patience, [(Wait::Kernel, 10); 100]);
        assert_eq!(total, Duration::from_micros(10 * 94));
    }

    #[test]
    fn slow_events_are_never_looked_for() {
        let mut patience = Patience::new(LIMIT);
        let waits = [(Wait::Kernel, 33); 1000];
        assert_eq!(looked(&mut patience, waits), Duration::ZERO);
    }

    #[test]
    fn a_queue_that_falls_idle_looks_for_three_limits_at_most() {
        let mut patience = Patience::new(LIMIT);
        looked(&mut patience, [(Wait::Guest, 5); 100]);
        let total = looked(&mut patience, [(Wait::Guest, 1_000_000); 100]);
        assert_eq!(total, 3 * LIMIT);
    }

    #[test]
    fn a_slow_disk_does_not_keep_from_looking_for_a_quick_guest() {
        let mut patience = Patience::new(LIMIT);
        let waits = (0..200).map(|n| {
            if n % 2 == 0 {
                (Wait::Guest, 8)
            } else {
                (Wait::Kernel, 90)
            }
        });
        assert_eq!(looked(&mut patience, waits), Duration::from_micros(8 * 94));
    }
}
