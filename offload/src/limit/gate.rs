//! A queue's requests that wait for their turn.

use std::collections::VecDeque;
use std::sync::Arc;

use super::{Cost, Limit, Plan};

/// A queue that waits is woken at most this often, in nanoseconds: what is due by then starts
/// together, and [`super::SLACK_MS`] sees to it that nothing is lost by it.
const PAUSE: u64 = 200_000;

struct Waiting<T> {
    item: T,
    cost: Cost,
    /// When it came.
    since: u64,
}

/// Lets requests of one queue through in order, as a [`Limit`] allows. Owned by the queue's thread.
pub struct Gate<T> {
    limit: Arc<Limit>,
    version: u64,
    plan: Option<Arc<Plan>>,
    backlog: VecDeque<Waiting<T>>,
    /// When the backlog's head may start.
    start: u64,
    /// When to look at it.
    wake: u64,
}

impl<T> std::fmt::Debug for Gate<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gate")
            .field("waiting", &self.backlog.len())
            .finish_non_exhaustive()
    }
}

/// A request that may start now after it has waited.
#[derive(Debug, PartialEq, Eq)]
pub struct Released<T> {
    /// What was offered.
    pub item: T,
    /// How long it has waited, in nanoseconds.
    pub waited: u64,
}

impl<T> Gate<T> {
    /// A gate of one queue.
    #[must_use]
    pub fn new(limit: Arc<Limit>) -> Self {
        let (version, plan) = limit.plan();
        Self {
            limit,
            version,
            plan,
            backlog: VecDeque::new(),
            start: 0,
            wake: 0,
        }
    }

    /// Whether everything may pass now: no limit, and nobody waits. One relaxed load.
    #[inline]
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.plan.is_none() && self.backlog.is_empty() && self.version == self.limit.version()
    }

    /// A request has come. Gives it back if it may start now, else keeps it behind those that
    /// wait. Call [`Gate::next`] first, or it waits behind what could go.
    pub fn offer(&mut self, item: T, cost: Cost, now: u64) -> Option<T> {
        self.follow(now);
        if self.backlog.is_empty() {
            let start = self.take(cost, now);
            if start <= now {
                return Some(item);
            }
            self.head_starts(start, now);
        }
        self.backlog.push_back(Waiting {
            item,
            cost,
            since: now,
        });
        None
    }

    /// The next request that may start by now.
    pub fn next(&mut self, now: u64) -> Option<Released<T>> {
        self.follow(now);
        if self.start > now {
            return None;
        }
        self.pop(now)
    }

    /// The next request that waits, whatever the limit says: for a queue that is to stop. What it
    /// costs is taken all the same, so that stopping does not pay.
    pub fn next_unlimited(&mut self, now: u64) -> Option<Released<T>> {
        self.follow(now);
        self.pop(now)
    }

    /// When [`Gate::next`] should be called again, in nanoseconds; `None` if nothing waits. A
    /// change of the limit may make it earlier: see [`Limit::watch`].
    #[must_use]
    pub fn deadline(&self) -> Option<u64> {
        (!self.backlog.is_empty()).then_some(self.wake)
    }

    /// Requests that wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.backlog.len()
    }

    /// Whether none waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.backlog.is_empty()
    }

    fn pop(&mut self, now: u64) -> Option<Released<T>> {
        let Waiting { item, since, .. } = self.backlog.pop_front()?;
        self.reserve(now);
        Some(Released {
            item,
            waited: now.saturating_sub(since),
        })
    }

    /// Moves over to a limit that was changed.
    #[inline]
    fn follow(&mut self, now: u64) {
        if self.version != self.limit.version() {
            (self.version, self.plan) = self.limit.plan();
            self.reserve(now);
        }
    }

    fn take(&self, cost: Cost, now: u64) -> u64 {
        self.plan.as_ref().map_or(now, |plan| plan.take(cost, now))
    }

    /// Makes the head's reservation.
    fn reserve(&mut self, now: u64) {
        if let Some(cost) = self.backlog.front().map(|head| head.cost) {
            let start = self.take(cost, now);
            self.head_starts(start, now);
        }
    }

    fn head_starts(&mut self, start: u64, now: u64) {
        self.start = start;
        self.wake = start.max(now.saturating_add(PAUSE));
    }
}
