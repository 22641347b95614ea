//! What a card tells about itself: counters, latency histograms, and log lines.
//!
//! ```text
//!  queue thread ──relaxed add──► QueueStats, Histogram ◄──relaxed load── Registry ◄── control socket
//!                                (Arc, one writer mostly)                 (names, labels)
//! ```
//!
//! The data path only ever adds to an atomic that no other queue writes: no lock, no allocation,
//! no clock read that the caller did not make itself. Names, labels and formats live in
//! [`Registry`], which is asked a few times a minute. A snapshot reads one atomic after the other,
//! so numbers in it may be a few requests apart; each of them is exact and never goes back.

mod stats;

pub use stats::{Counter, ErrorKind, QueueStats};
