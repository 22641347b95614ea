//! A latency histogram that threads fill without a lock.
//!
//! Log-linear, like HdrHistogram: 64 buckets for each power of two, so a bucket is never wider
//! than 1/64 of the values in it and its middle is at most 0.8 % off. 2240 buckets (18 KiB) reach
//! from 1 ns to 2^40 ns, over 18 minutes; what takes longer is counted in the last bucket, and
//! the maximum is kept exactly.
//!
//! Why our own: `hdrhistogram`'s recorder needs `&mut` or a lock, and its `SyncHistogram` hands
//! whole histograms through channels. Three relaxed atomics are simpler and never wait. The crate
//! is the oracle in the tests.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde_json::{Value, json};

/// Buckets in each power of two, as a power of two.
const SUB_BITS: u32 = 6;
const SUBS: usize = 1 << SUB_BITS;
/// Values from 2^MAX_BITS on share the last bucket.
const MAX_BITS: u32 = 40;
const BUCKETS: usize = SUBS * (MAX_BITS - SUB_BITS + 1) as usize;

/// Latencies in nanoseconds, recorded from any thread.
#[derive(Debug)]
pub struct Histogram {
    buckets: Box<[AtomicU64]>,
    sum_ns: AtomicU64,
    max_ns: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self::new()
    }
}

impl Histogram {
    /// An empty histogram; the only allocation it ever makes.
    #[must_use]
    pub fn new() -> Self {
        Self {
            buckets: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect(),
            sum_ns: AtomicU64::new(0),
            max_ns: AtomicU64::new(0),
        }
    }

    /// Records one latency.
    #[inline]
    pub fn record(&self, latency: Duration) {
        self.record_ns(u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX));
    }

    /// Records one latency given in nanoseconds.
    #[inline]
    pub fn record_ns(&self, ns: u64) {
        // `bucket_of` stays below BUCKETS.
        self.buckets[bucket_of(ns)].fetch_add(1, Ordering::Relaxed);
        self.sum_ns.fetch_add(ns, Ordering::Relaxed);
        // Looking first spares the write that would be needed a few times in a process's life.
        if ns > self.max_ns.load(Ordering::Relaxed) {
            self.max_ns.fetch_max(ns, Ordering::Relaxed);
        }
    }

    /// What was recorded so far.
    #[must_use]
    pub fn snapshot(&self) -> HistogramSnapshot {
        let buckets: Vec<u64> = self
            .buckets
            .iter()
            .map(|b| b.load(Ordering::Relaxed))
            .collect();
        HistogramSnapshot {
            count: buckets.iter().sum(),
            buckets,
            sum_ns: self.sum_ns.load(Ordering::Relaxed),
            max_ns: self.max_ns.load(Ordering::Relaxed),
        }
    }
}

/// A histogram at one moment. Snapshots of several queues can be merged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HistogramSnapshot {
    buckets: Vec<u64>,
    count: u64,
    sum_ns: u64,
    max_ns: u64,
}

impl Default for HistogramSnapshot {
    fn default() -> Self {
        Self {
            buckets: vec![0; BUCKETS],
            count: 0,
            sum_ns: 0,
            max_ns: 0,
        }
    }
}

impl HistogramSnapshot {
    /// Number of values.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Sum of all values in nanoseconds.
    #[must_use]
    pub fn sum_ns(&self) -> u64 {
        self.sum_ns
    }

    /// Largest value in nanoseconds, exactly; 0 when there is none.
    #[must_use]
    pub fn max_ns(&self) -> u64 {
        self.max_ns
    }

    /// Mean in nanoseconds; 0 when there is no value.
    #[must_use]
    pub fn mean_ns(&self) -> u64 {
        self.sum_ns.checked_div(self.count).unwrap_or(0)
    }

    /// The value in nanoseconds that a share `quantile` (0.0 to 1.0, cut to that) of all values do
    /// not exceed, within 0.8 %; 0 when there is none.
    #[must_use]
    pub fn quantile_ns(&self, quantile: f64) -> u64 {
        // Float to integer casts saturate, and NaN becomes 0.
        #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)]
        let wanted = (quantile.clamp(0.0, 1.0) * self.count as f64).ceil() as u64;
        let wanted = wanted.clamp(1, self.count.max(1));
        let mut seen = 0;
        for (index, n) in self.buckets.iter().enumerate() {
            seen += n;
            if seen >= wanted {
                // The last bucket has no upper end but the maximum.
                return if index == BUCKETS - 1 {
                    self.max_ns
                } else {
                    middle(index).min(self.max_ns)
                };
            }
        }
        0
    }

    /// Adds what another queue recorded.
    pub fn merge(&mut self, other: &Self) {
        for (into, from) in self.buckets.iter_mut().zip(&other.buckets) {
            *into += from;
        }
        self.count += other.count;
        self.sum_ns = self.sum_ns.wrapping_add(other.sum_ns);
        self.max_ns = self.max_ns.max(other.max_ns);
    }

    /// `count`, `sum_ns`, `mean_ns`, `p50_ns`, `p90_ns`, `p99_ns`, `p999_ns`, `max_ns`.
    #[must_use]
    pub fn to_json(&self) -> Value {
        json!({
            "count": self.count,
            "sum_ns": self.sum_ns,
            "mean_ns": self.mean_ns(),
            "p50_ns": self.quantile_ns(0.5),
            "p90_ns": self.quantile_ns(0.9),
            "p99_ns": self.quantile_ns(0.99),
            "p999_ns": self.quantile_ns(0.999),
            "max_ns": self.max_ns,
        })
    }
}

#[inline]
#[allow(clippy::cast_possible_truncation)] // everything is below BUCKETS
fn bucket_of(ns: u64) -> usize {
    if ns < SUBS as u64 {
        return ns as usize;
    }
    let octave = u64::BITS - 1 - ns.leading_zeros();
    if octave >= MAX_BITS {
        return BUCKETS - 1;
    }
    let shift = octave - SUB_BITS;
    // The leading 1 of the shifted value is the SUBS that the lowest octave's number skips.
    (shift as usize) * SUBS + (ns >> shift) as usize
}

fn middle(index: usize) -> u64 {
    if index < SUBS {
        return index as u64;
    }
    let shift = index / SUBS - 1;
    let low = ((SUBS + index % SUBS) as u64) << shift;
    low + ((1 << shift) >> 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn buckets_are_contiguous_and_the_middle_lies_in_its_bucket() {
        let mut last = 0;
        for ns in 0..100_000 {
            let bucket = bucket_of(ns);
            assert!(
                bucket == last || bucket == last + 1,
                "{ns}: {last} -> {bucket}"
            );
            last = bucket;
        }
        for index in 0..BUCKETS {
            assert_eq!(bucket_of(middle(index)), index);
        }
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
        assert_eq!(bucket_of((1 << MAX_BITS) - 1), BUCKETS - 1);
    }

    #[test]
    fn an_empty_histogram_reads_zero() {
        let empty = Histogram::new().snapshot();
        assert_eq!((empty.count(), empty.mean_ns(), empty.max_ns()), (0, 0, 0));
        assert_eq!(empty.quantile_ns(0.99), 0);
        assert_eq!(empty.quantile_ns(f64::NAN), 0);
    }

    #[test]
    fn the_maximum_is_exact_even_beyond_the_last_bucket() {
        let histogram = Histogram::new();
        histogram.record(Duration::from_secs(7200));
        histogram.record_ns(5);
        let snapshot = histogram.snapshot();
        assert_eq!(snapshot.max_ns(), 7_200_000_000_000);
        assert_eq!(snapshot.quantile_ns(1.0), 7_200_000_000_000);
        assert_eq!(snapshot.quantile_ns(0.5), 5);
    }

    #[test]
    fn no_value_is_lost_when_threads_record_at_once() {
        let histogram = Histogram::new();
        std::thread::scope(|scope| {
            for thread in 0..4_u64 {
                let histogram = &histogram;
                scope.spawn(move || {
                    (0..10_000).for_each(|n| histogram.record_ns(thread * 10_000 + n))
                });
            }
        });
        let snapshot = histogram.snapshot();
        assert_eq!(snapshot.count(), 40_000);
        assert_eq!(snapshot.sum_ns(), 39_999 * 40_000 / 2);
        assert_eq!(snapshot.max_ns(), 39_999);
    }

    proptest! {
        #[test]
        fn quantiles_agree_with_hdrhistogram(
            values in proptest::collection::vec(prop_oneof![1..1000_u64, 1..1_000_000_000_000_u64], 1..300),
            quantile in 0.0..=1.0_f64,
        ) {
            let ours = Histogram::new();
            let mut oracle = hdrhistogram::Histogram::<u64>::new_with_max(1 << MAX_BITS, 4).unwrap();
            for &value in &values {
                ours.record_ns(value);
                oracle.record(value).unwrap();
            }
            let (ours, oracle) = (ours.snapshot().quantile_ns(quantile), oracle.value_at_quantile(quantile));
            let off = ours.abs_diff(oracle) as f64 / oracle as f64;
            prop_assert!(off < 0.01, "{ours} against {oracle}: {off}");
        }

        #[test]
        fn merging_equals_recording_into_one(
            a in proptest::collection::vec(any::<u32>(), 0..100),
            b in proptest::collection::vec(any::<u32>(), 0..100),
        ) {
            let (left, right, both) = (Histogram::new(), Histogram::new(), Histogram::new());
            a.iter().for_each(|&v| { left.record_ns(v.into()); both.record_ns(v.into()); });
            b.iter().for_each(|&v| { right.record_ns(v.into()); both.record_ns(v.into()); });
            let mut merged = HistogramSnapshot::default();
            merged.merge(&left.snapshot());
            merged.merge(&right.snapshot());
            prop_assert_eq!(merged, both.snapshot());
        }
    }
}
