//! A limit by the clock of this machine.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Cost, Gate, Limit, RateError, Rates, Released};
use crate::telemetry::Histogram;

/// No thread sleeps longer than a day ahead, which every clock can count: one that wakes early
/// looks again.
const FURTHEST: u64 = 86_400_000_000_000;

/// The moment from which all users of a limit count.
#[derive(Clone, Copy, Debug)]
struct Clock {
    start: Instant,
}

impl Clock {
    /// Nanoseconds since the start.
    fn now(self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// When that many nanoseconds have passed since the start.
    fn instant(self, at: u64) -> Instant {
        let ahead = at.saturating_sub(self.now()).min(FURTHEST);
        Instant::now() + Duration::from_nanos(ahead)
    }
}

/// A [`Limit`] that counts real time, and how long it made requests wait. Clones are the same
/// limit.
#[derive(Clone, Debug)]
pub struct TimedLimit {
    limit: Arc<Limit>,
    clock: Clock,
    waited: Arc<Histogram>,
}

impl Default for TimedLimit {
    fn default() -> Self {
        Self {
            limit: Arc::default(),
            clock: Clock {
                start: Instant::now(),
            },
            waited: Arc::default(),
        }
    }
}

impl TimedLimit {
    /// What is in force.
    #[must_use]
    pub fn rates(&self) -> Rates {
        self.limit.rates()
    }

    /// As [`Limit::set`], from now on.
    ///
    /// # Errors
    /// They cannot be kept; then nothing has changed.
    pub fn set(&self, rates: Rates) -> Result<(), RateError> {
        self.limit.set(rates, self.clock.now())
    }

    /// See [`Limit::watch`].
    pub fn watch(&self, watcher: impl Fn() + Send + Sync + 'static) {
        self.limit.watch(watcher);
    }

    /// The requests that waited, and for how long.
    #[must_use]
    pub fn waited(&self) -> Arc<Histogram> {
        Arc::clone(&self.waited)
    }

    /// A gate of one queue.
    #[must_use]
    pub fn gate<T>(&self) -> TimedGate<T> {
        TimedGate {
            gate: Gate::new(Arc::clone(&self.limit)),
            clock: self.clock,
            waited: self.waited(),
        }
    }
}

/// A [`Gate`] that counts real time. The clock is only looked at when something is limited or
/// waits.
#[derive(Debug)]
pub struct TimedGate<T> {
    gate: Gate<T>,
    clock: Clock,
    waited: Arc<Histogram>,
}

impl<T> TimedGate<T> {
    /// See [`Gate::is_open`].
    #[inline]
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.gate.is_open()
    }

    /// Gives a request back if it may start now, else keeps it. Call [`Self::next`] first: see
    /// [`Gate::offer`].
    pub fn offer(&mut self, item: T, cost: Cost) -> Option<T> {
        self.gate.offer(item, cost, self.clock.now())
    }

    /// The next request whose time has come.
    #[inline]
    #[expect(
        clippy::should_implement_trait,
        reason = "what gives nothing now may give something later, so it is no iterator"
    )]
    pub fn next(&mut self) -> Option<T> {
        if self.gate.is_empty() {
            return None;
        }
        let next = self.gate.next(self.clock.now());
        next.map(|released| self.told(released))
    }

    /// The next request that waits, whether its time has come or not: for a queue that is to stop.
    pub fn next_unlimited(&mut self) -> Option<T> {
        let next = self.gate.next_unlimited(self.clock.now());
        next.map(|released| self.told(released))
    }

    fn told(&self, released: Released<T>) -> T {
        self.waited.record_ns(released.waited);
        released.item
    }

    /// When [`Self::next`] is to be asked again; `None` if nothing waits.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.gate.deadline().map(|at| self.clock.instant(at))
    }

    /// Requests that wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.gate.len()
    }

    /// Whether none waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.gate.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Cost = Cost { ops: 1, bytes: 0 };

    fn slow() -> TimedLimit {
        let limit = TimedLimit::default();
        let rates = Rates {
            ops: Some(1),
            ..Rates::default()
        };
        limit.set(rates).unwrap();
        limit
    }

    #[test]
    fn what_waited_is_counted_with_its_time() {
        let limit = slow();
        let mut gate = limit.gate();
        // The first goes into debt, those behind it wait for a second each.
        let kept: Vec<_> = (0..3).filter(|&n| gate.offer(n, ONE).is_none()).collect();
        assert_eq!(gate.len(), kept.len());
        assert!(!kept.is_empty() && gate.deadline() > Some(Instant::now()));
        std::thread::sleep(Duration::from_millis(2));
        for n in kept {
            assert_eq!(gate.next_unlimited(), Some(n));
        }
        assert!(gate.is_empty() && gate.deadline().is_none() && gate.next().is_none());
        let waited = limit.waited().snapshot();
        assert!(waited.count() > 0 && waited.max_ns() >= 2_000_000);
    }

    #[test]
    fn a_time_that_no_clock_can_count_is_a_day_ahead() {
        let clock = TimedLimit::default().clock;
        let day = Duration::from_nanos(FURTHEST);
        let begin = Instant::now();
        assert!(clock.instant(u64::MAX) >= begin + day);
        assert!(clock.instant(u64::MAX) <= Instant::now() + day);
        assert!(clock.instant(0) <= Instant::now());
    }
}
