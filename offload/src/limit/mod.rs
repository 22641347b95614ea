//! Provisioned performance: at most so many operations and so many bytes a second, shared by any
//! number of queues and sockets.
//!
//! # What is promised
//! Each of the two kinds of unit has a *sustained* rate and may have a *burst*: a higher rate that
//! is available as long as credit lasts. Credit is earned at the sustained rate while less is used,
//! and is full after enough rest (and at the start), as with the burst bucket of EBS gp2 volumes.
//! A burst is given as rate and time: from full credit, the burst rate lasts that long; so the
//! credit is `(burst - sustained) * seconds` units. This is the pair of GCRAs of ATM's variable bit
//! rate (peak and sustained cell rate, I.371), QEMU's `iops-total`, `-max` and `-max-length`.
//!
//! In any span of time `t` at most `rate * (t + 20 ms) + credit` units pass, and one request: a
//! request is never cut nor too large, it takes its bucket into debt and the next one waits.
//! The 20 ms ([`SLACK_MS`]) are for threads that wake late: without it each late wake-up would
//! lose a part of what was paid for.
//!
//! Reading and writing draw on one limit, as with EBS: it is one disk below, and a limit for each
//! would promise a neighbour the sum of the two. Requests that move no data (a flush, a discarded
//! range) are operations without bytes.
//!
//! # How it waits
//! ```text
//!  queue 0   Gate [ head ... ]──┐ take(cost) -> start      each gate has at most one reservation,
//!  queue 1   Gate [ head ... ]──┼──► Limit ─► Plan ─► 1-4 atomics    in the order of the calls
//!  queue n   Gate [ empty    ]──┘
//! ```
//! A request reserves its place in the shared budget before it may start (`Bucket::take`,
//! one compare-and-swap a rate, no lock) and is told when it may. If that is not now it
//! waits in its own queue's [`Gate`], those behind it wait for it, and nobody holds up another
//! queue's thread. Only the head of a gate has a reservation, so queues that all wait take turns,
//! whatever their depths: none starves. The alternative, to try again whenever the time might have
//! come, would serve whoever asks most often.
//!
//! Without limits a request costs one relaxed load.
//!
//! # Changing
//! [`Limit::set`] puts a new, immutable plan in place of the old one; gates notice by a number that
//! has changed, give up their reservation and make one in the new plan. Credit that was spent stays
//! spent, so that setting the same limits again earns nothing; debt is forgiven.
//!
//! Time is a number of nanoseconds that the caller passes in; all users of a limit must count from
//! the same moment. [`TimedLimit`] and [`TimedGate`] do so by the real clock, for the cards.

mod bucket;
mod gate;
mod rates;
mod timed;

pub use gate::{Gate, Released};
pub use rates::{BURST_SECONDS, BURST_SECONDS_MAX, Burst, RateError, Rates, in_words};
pub use timed::{TimedGate, TimedLimit};

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use self::bucket::Bucket;

#[cfg(test)]
mod tests;

/// What may pass at once although it was not saved up for, in milliseconds of a rate.
pub const SLACK_MS: u64 = 20;

/// What a request takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// Operations, at least.
    pub ops: u64,
    /// Bytes moved.
    pub bytes: u64,
}

/// One kind of unit.
#[derive(Debug)]
struct Meter {
    sustained: Bucket,
    burst: Option<Bucket>,
}

impl Meter {
    /// For checked rates, with the credit of the meter before it.
    fn new(rate: u64, burst: Option<Burst>, old: Option<&Self>, now: u64) -> Self {
        let slack = |rate: u64| rate.saturating_mul(SLACK_MS) / 1000;
        let credit = |burst: Burst| (burst.rate - rate).saturating_mul(u64::from(burst.seconds));
        let spent = |bucket: fn(&Self) -> Option<&Bucket>| {
            old.and_then(bucket).map_or(0, |bucket| bucket.spent(now))
        };
        Self {
            sustained: Bucket::new(
                rate,
                slack(rate).saturating_add(burst.map_or(0, credit)),
                spent(|old| Some(&old.sustained)),
                now,
            ),
            burst: burst.map(|burst| {
                let spent = spent(|old| old.burst.as_ref());
                Bucket::new(burst.rate, slack(burst.rate), spent, now)
            }),
        }
    }

    #[inline]
    fn take(&self, units: u64, now: u64) -> u64 {
        let start = self.sustained.take(units, now);
        match &self.burst {
            None => start,
            Some(burst) => burst.take(units, now).max(start),
        }
    }
}

/// Limits in force.
#[derive(Debug)]
struct Plan {
    rates: Rates,
    ops: Option<Meter>,
    bytes: Option<Meter>,
}

impl Plan {
    fn new(rates: Rates, old: Option<&Self>, now: u64) -> Self {
        let meter = |rate: Option<u64>, burst, of: fn(&Self) -> Option<&Meter>| {
            rate.map(|rate| Meter::new(rate, burst, old.and_then(of), now))
        };
        Self {
            rates,
            ops: meter(rates.ops, rates.ops_burst, |plan| plan.ops.as_ref()),
            bytes: meter(rates.bytes, rates.bytes_burst, |plan| plan.bytes.as_ref()),
        }
    }

    /// Takes what a request costs. When it may start.
    fn take(&self, cost: Cost, now: u64) -> u64 {
        let ops = match self.rates.op_len {
            Some(len) => cost.ops.max(cost.bytes.div_ceil(u64::from(len))),
            None => cost.ops,
        };
        let take = |meter: &Option<Meter>, units: u64| match meter {
            Some(meter) if units > 0 => meter.take(units, now),
            _ => now,
        };
        take(&self.ops, ops).max(take(&self.bytes, cost.bytes))
    }
}

type Watcher = Box<dyn Fn() + Send + Sync>;

/// A limit that queues share.
pub struct Limit {
    /// Changes with the plan.
    version: AtomicU64,
    plan: Mutex<Option<Arc<Plan>>>,
    watchers: Mutex<Vec<Watcher>>,
}

impl fmt::Debug for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Limit")
            .field("rates", &self.rates())
            .finish_non_exhaustive()
    }
}

impl Default for Limit {
    fn default() -> Self {
        Self::new()
    }
}

impl Limit {
    /// No limit yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            version: AtomicU64::new(0),
            plan: Mutex::default(),
            watchers: Mutex::default(),
        }
    }

    /// What is in force.
    #[must_use]
    pub fn rates(&self) -> Rates {
        lock(&self.plan)
            .as_ref()
            .map_or_else(Rates::default, |plan| plan.rates)
    }

    /// Puts these limits in force, all at once, from `now` (nanoseconds) on.
    ///
    /// # Errors
    /// They cannot be kept; then nothing has changed.
    pub fn set(&self, rates: Rates, now: u64) -> Result<(), RateError> {
        rates.check()?;
        {
            let mut plan = lock(&self.plan);
            let is_limited = rates.is_limited();
            *plan = is_limited.then(|| Arc::new(Plan::new(rates, plan.as_deref(), now)));
            // Under the lock: whoever sees the number finds its plan or a later one there.
            self.version.fetch_add(1, Ordering::Relaxed);
        }
        for watcher in lock(&self.watchers).iter() {
            watcher();
        }
        Ok(())
    }

    /// Calls `watcher` after each change, for as long as the limit lives: to wake a queue that may
    /// be asleep until a time that is no longer right.
    pub fn watch(&self, watcher: impl Fn() + Send + Sync + 'static) {
        lock(&self.watchers).push(Box::new(watcher));
    }

    #[inline]
    fn version(&self) -> u64 {
        self.version.load(Ordering::Relaxed)
    }

    fn plan(&self) -> (u64, Option<Arc<Plan>>) {
        let plan = lock(&self.plan);
        (self.version(), plan.clone())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing is left half done under these locks.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
