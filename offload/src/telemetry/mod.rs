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
//!
//! Log lines are for what people must know. A good request writes none, and what a guest or a
//! frontend can cause goes through a [`RateLimited`].

mod causes;
mod histogram;
mod logging;
mod rate_limit;
mod registry;
mod stats;

pub use causes::with_causes;
pub use histogram::{Histogram, HistogramSnapshot};
pub use logging::{LOG_ENV, LogArgs, LogFormat, LoggingError, init_logging};
pub use rate_limit::{RateLimited, shown};
pub use registry::{Labels, Registry};
pub use stats::{Counter, ErrorKind, QueueStats};
