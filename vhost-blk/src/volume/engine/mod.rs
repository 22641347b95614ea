//! The running volume: a state machine that is given requests and completions and says what I/O
//! to do and what is done. It performs none itself: the card drives it with io_uring, the tools
//! with blocking calls, the crash tests with a simulated disk, all the same code.
//!
//! ```text
//!  request ──► Lane::submit ─► tasks ─► pieces ─┐                    ┌─► Lane::next_io ──► I/O
//!                                               ├── Core (one lock) ─┤
//!  I/O result ─► Lane::on_io ───────────────────┘                    └─► Lane::next_done
//! ```
//!
//! A [`Lane`] belongs to one queue and its thread. [`Shared`] is what lanes have in common; its
//! `Core` is behind a lock that a lane takes once a batch.

mod activate;
mod checkpoint;
mod commit;
mod core;
mod draft;
mod grow;
mod lane;
mod pages;
mod rehome;
mod request;
mod volume;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use thiserror::Error;

pub use self::activate::AttachError;
pub use self::core::Phase;
pub use self::grow::GrowError;
pub use self::lane::Lane;
pub use self::rehome::PART_BLOCKS;
pub use self::request::{Done, Io, IoKind, Op, Payload, PayloadFault, Rehoming};
#[cfg(test)]
pub(crate) use self::volume::drive;
pub use self::volume::perform;
pub use self::volume::{Shared, Volume, VolumeError};

use super::buffer::Buffer;

/// Wakes the thread of a lane.
pub type WakeLane = Arc<dyn Fn() + Send + Sync>;

/// Why a request failed.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Failure {
    /// The backing failed.
    #[error("the backing failed: {}", std::io::Error::from_raw_os_error(*.0))]
    Io(i32),
    /// What the backing holds is not what was written there.
    #[error("the block does not authenticate")]
    NotAuthentic,
    /// No room for a new block.
    #[error("no room left in the backing")]
    NoSpace,
    /// The volume is served read-only or not active.
    #[error("the volume takes no writes")]
    ReadOnly,
    /// An earlier failure made durability unknown.
    #[error("the volume failed earlier and takes no more writes")]
    Poisoned,
    /// Not in the volume, or not a multiple of 512 bytes.
    #[error("the range is not in the volume")]
    Range,
    /// The request's own memory cannot be accessed.
    #[error("the request's buffer is not accessible")]
    Payload,
    /// 2^36 blocks were sealed since the card started.
    #[error("this session's nonces are used up; restart the card")]
    NoncesUsedUp,
}

/// A write of a commit or checkpoint.
#[derive(Debug)]
pub(super) struct JobWrite {
    offset: u64,
    buffer: Buffer,
}

/// What a volume counts.
#[derive(Debug, Default)]
pub struct Stats {
    /// Blocks, pages or records that did not authenticate.
    pub not_authentic: AtomicU64,
    /// Blocks read and opened.
    pub blocks_opened: AtomicU64,
    /// Blocks sealed and written.
    pub blocks_sealed: AtomicU64,
    /// Blocks moved to where they are read faster or leave room.
    pub blocks_moved: AtomicU64,
    /// Commits made durable.
    pub commits: AtomicU64,
    /// Checkpoints made durable.
    pub checkpoints: AtomicU64,
    /// Reads, writes and barriers of the backing that failed.
    pub backing_errors: AtomicU64,
    /// Leaves of the map that were asked for and in memory.
    pub map_hits: AtomicU64,
    /// Pages of the map that were read as they were not in memory.
    pub map_misses: AtomicU64,
    /// Pages of the map that were forgotten for others.
    pub map_evictions: AtomicU64,
    /// Pages of the map that are in memory now.
    pub map_pages: AtomicU64,
    /// Of these, changed ones that are not stored yet.
    pub map_unwritten: AtomicU64,
}

impl Stats {
    fn add(counter: &AtomicU64, count: u64) {
        counter.fetch_add(count, Ordering::Relaxed);
    }
}

/// What the engine reports besides failing requests. Called on a lane's thread; rate-limiting is
/// the callee's.
pub trait Reporter: Send + Sync {
    /// A block did not authenticate.
    fn not_authentic(&self, block: u64);
    /// The backing failed at what an operation needed.
    fn backing_failed(&self, what: &'static str, errno: i32);
    /// Durability is unknown from now on: no more writes.
    fn poisoned(&self, what: &'static str);
}

/// Seconds since the Unix epoch.
pub(crate) fn unix_seconds() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |elapsed| elapsed.as_secs())
}
