//! Counters, and the set of them that every virtqueue has.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number that only grows. Wraps at 2^64, which takes centuries.
///
/// All accesses are relaxed: a counter orders nothing and guards nothing.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// A counter at 0.
    #[must_use]
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Counts one.
    #[inline]
    pub fn inc(&self) {
        self.add(1);
    }

    /// Counts `n`.
    #[inline]
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The count so far.
    #[inline]
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Why a request was answered with an error: enough to tell a sick disk from a sick guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The backing failed (an errno, a short transfer).
    Io,
    /// The backing has no room left.
    NoSpace,
    /// Data did not authenticate.
    Integrity,
    /// The guest asked for something that the device does not have.
    Unsupported,
    /// The guest's request breaks the specification: out of range, unaligned, read-only.
    Invalid,
    /// A limit of the card was met (memory, in-flight requests).
    Overload,
}

impl ErrorKind {
    /// All kinds, in the order in which they are shown.
    pub const ALL: [Self; 6] = [
        Self::Io,
        Self::NoSpace,
        Self::Integrity,
        Self::Unsupported,
        Self::Invalid,
        Self::Overload,
    ];

    /// The name in snapshots, and the value of the label `kind` in metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Io => "io",
            Self::NoSpace => "no_space",
            Self::Integrity => "integrity",
            Self::Unsupported => "unsupported",
            Self::Invalid => "invalid",
            Self::Overload => "overload",
        }
    }

    const fn index(self) -> usize {
        self as usize
    }
}

/// What one virtqueue counts. Shared by the queue's loop (ring counters), its handler (bytes and
/// errors) and whoever asks for a snapshot.
///
/// Aligned to 128 bytes, two cache lines, because processors fetch lines in pairs: queues that
/// lie next to each other would otherwise slow each other down.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct QueueStats {
    /// Descriptor chains popped.
    pub requests: Counter,
    /// Chains put on the used ring.
    pub completions: Counter,
    /// Kicks taken from the guest.
    pub kicks: Counter,
    /// Interrupts sent to the guest.
    pub notifications: Counter,
    /// Chains that could not be walked: loop, address out of range, wrong order, too long.
    pub malformed_chains: Counter,
    /// Times that the queue was given up because the guest broke the ring.
    pub broken: Counter,
    /// Payload bytes handed to the guest.
    pub bytes_read: Counter,
    /// Payload bytes taken from the guest.
    pub bytes_written: Counter,
    errors: [Counter; ErrorKind::ALL.len()],
}

impl QueueStats {
    /// All zero.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Counts a request that was answered with an error.
    #[inline]
    pub fn error(&self, kind: ErrorKind) {
        // The index of a kind is below the length by construction of `ALL`.
        self.errors[kind.index()].inc();
    }

    /// Requests answered with an error of this kind.
    #[must_use]
    pub fn errors(&self, kind: ErrorKind) -> u64 {
        self.errors[kind.index()].get()
    }

    /// Chains popped and not yet returned.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        // Completions first: read the other way round, requests that finish in between would make
        // the difference negative.
        let done = self.completions.get();
        self.requests.get().saturating_sub(done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_error_kind_has_a_counter_of_its_own() {
        let stats = QueueStats::new();
        for (n, kind) in ErrorKind::ALL.into_iter().enumerate() {
            assert_eq!(kind.index(), n);
            for _ in 0..=n {
                stats.error(kind);
            }
        }
        for (n, kind) in ErrorKind::ALL.into_iter().enumerate() {
            assert_eq!(stats.errors(kind), n as u64 + 1);
        }
    }

    #[test]
    fn in_flight_is_what_was_popped_and_not_returned() {
        let stats = QueueStats::new();
        stats.requests.add(5);
        stats.completions.add(3);
        assert_eq!(stats.in_flight(), 2);
        stats.completions.add(9);
        assert_eq!(stats.in_flight(), 0);
    }

    #[test]
    fn two_queues_never_share_a_cache_line_pair() {
        assert_eq!(align_of::<QueueStats>(), 128);
        assert_eq!(size_of::<QueueStats>() % 128, 0);
    }
}
