//! One rate with one credit, in one atomic.
//!
//! GCRA, the *generic cell rate algorithm* in its virtual scheduling form (ITU-T I.371, annex A),
//! kept in units instead of in time so that nothing is rounded: `full_at` is what the clock, which
//! brings `rate` units a second, has to show until the bucket is full again. A bucket at rest lies
//! behind the clock; its fill is `depth - (full_at - clock)`, and below 0 that is a debt.

use std::sync::atomic::{AtomicU64, Ordering};

const NS: u64 = 1_000_000_000;

/// Largest rate, in units a second: with it the clock lasts 34 years before it stands still.
pub(super) const RATE_MAX: u64 = 1 << 34;

/// A bucket of `depth` units into which `rate` units a second flow.
#[derive(Debug)]
pub(super) struct Bucket {
    rate: u64,
    depth: u64,
    full_at: AtomicU64,
}

impl Bucket {
    /// A bucket from which `spent` of its depth is missing at `now`. `rate` is 1 to [`RATE_MAX`].
    pub(super) fn new(rate: u64, depth: u64, spent: u64, now: u64) -> Self {
        debug_assert!((1..=RATE_MAX).contains(&rate));
        Self {
            rate,
            depth,
            full_at: AtomicU64::new(units_at(rate, now).saturating_add(spent.min(depth))),
        }
    }

    /// Takes `units` at `now` for whoever waits until the time given back, in nanoseconds: when
    /// the bucket is out of debt, `now` or earlier if it is not in debt.
    ///
    /// So one taker may go into debt for more than the depth, and the next waits for it: nothing
    /// is too large to pass. Takers are served in the order of their calls.
    #[inline]
    pub(super) fn take(&self, units: u64, now: u64) -> u64 {
        let clock = units_at(self.rate, now);
        let mut old = self.full_at.load(Ordering::Relaxed);
        loop {
            // Relaxed: the number orders nothing but itself.
            let new = old.max(clock).saturating_add(units);
            match self
                .full_at
                .compare_exchange_weak(old, new, Ordering::Relaxed, Ordering::Relaxed)
            {
                Ok(_) => break,
                Err(other) => old = other,
            }
        }
        match old.saturating_sub(self.depth) {
            no_debt if no_debt <= clock => now,
            debt_until => time_of(self.rate, debt_until),
        }
    }

    /// How much of the depth is missing at `now`; a debt beyond it does not count.
    pub(super) fn spent(&self, now: u64) -> u64 {
        let full_at = self.full_at.load(Ordering::Relaxed);
        full_at
            .saturating_sub(units_at(self.rate, now))
            .min(self.depth)
    }
}

/// What the clock shows at a time.
fn units_at(rate: u64, now: u64) -> u64 {
    // The fraction is below 2^30 * 2^34.
    let (seconds, ns) = (now / NS, now % NS);
    seconds.saturating_mul(rate).saturating_add(ns * rate / NS)
}

/// When the clock first shows that much.
fn time_of(rate: u64, units: u64) -> u64 {
    // The remainder is below `rate`, so the product is below 2^34 * 2^30.
    let (seconds, rest) = (units / rate, units % rate);
    seconds
        .saturating_mul(NS)
        .saturating_add((rest * NS).div_ceil(rate))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_full_bucket_gives_its_depth_at_once_and_then_the_rate() {
        let bucket = Bucket::new(1000, 5, 0, 0);
        // The last one takes the bucket below empty: it may, the next one waits for it.
        for _ in 0..6 {
            assert_eq!(bucket.take(1, 0), 0);
        }
        assert_eq!(bucket.take(1, 0), 1_000_000);
        assert_eq!(bucket.take(1, 0), 2_000_000);
    }

    #[test]
    fn what_is_larger_than_the_bucket_passes_and_is_paid_for_afterwards() {
        let bucket = Bucket::new(4096, 0, 0, 0);
        assert_eq!(bucket.take(1 << 20, 7), 7);
        assert_eq!(bucket.take(1, 7).div_ceil(NS), 256);
    }

    #[test]
    fn a_bucket_that_was_left_alone_is_full_and_not_fuller() {
        let bucket = Bucket::new(10, 20, 0, 0);
        assert_eq!(bucket.take(20, 0), 0);
        assert_eq!(bucket.spent(0), 20);
        assert_eq!(bucket.spent(NS), 10);
        let later = 3600 * NS;
        assert_eq!(bucket.spent(later), 0);
        assert_eq!(bucket.take(21, later), later);
        assert!(bucket.take(1, later) > later);
    }

    #[test]
    fn the_clock_stands_still_rather_than_going_back() {
        let bucket = Bucket::new(RATE_MAX, 0, 0, u64::MAX);
        assert_eq!(bucket.take(u64::MAX, u64::MAX), u64::MAX);
        assert_eq!(bucket.take(1, u64::MAX), u64::MAX);
    }

    proptest! {
        /// The bound of every leaky bucket: in any span no more starts than the rate times the
        /// span, the depth, and one taker.
        #[test]
        fn no_more_starts_than_rate_and_depth_allow(
            rate in 1..=RATE_MAX,
            depth in 0..1_000_000_u64,
            steps in prop::collection::vec((0..2_000_000_000_u64, 1..100_000_u64), 1..50),
        ) {
            let bucket = Bucket::new(rate, depth, 0, 0);
            let (mut now, mut starts) = (0, Vec::new());
            for (pause, units) in steps {
                now += pause;
                let start = bucket.take(units, now);
                prop_assert!(start >= now);
                prop_assert!(starts.last().is_none_or(|&(last, _)| last <= start));
                starts.push((start, units));
            }
            for (first, &(from, _)) in starts.iter().enumerate() {
                let mut sum = 0_u128;
                for &(to, units) in &starts[first..] {
                    let span = u128::from(to - from);
                    let allowed = span * u128::from(rate) / u128::from(NS) + u128::from(depth) + 1;
                    prop_assert!(sum <= allowed, "{sum} of {allowed} before the one at {to}");
                    sum += u128::from(units);
                }
            }
        }

        /// And no fewer: who always asks gets the whole rate.
        #[test]
        fn a_taker_that_always_waits_gets_the_rate_exactly(
            rate in 1..=RATE_MAX,
            units in 1..10_000_u64,
        ) {
            let bucket = Bucket::new(rate, 0, 0, 0);
            let mut now = 0;
            for _ in 0..1000 {
                now = bucket.take(units, now);
            }
            let exact = u128::from(units) * 999 * u128::from(NS) / u128::from(rate);
            prop_assert!(u128::from(now).abs_diff(exact) <= 1000, "{now} for {exact}");
        }
    }
}
