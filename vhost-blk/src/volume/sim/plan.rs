//! What kind of life a seed is given, and how its disk fails.

use super::world::Dice;
use crate::volume::engine::IoKind;
use crate::volume::geometry::{BLOCK_LEN, Geometry};
use crate::volume::map::PAGE_COST;

/// Stretches of consecutive blocks that requests go to: first block, blocks.
pub(super) type Stretches = &'static [(u64, usize)];

/// Eight blocks at the start and four over a leaf's border; eight that are there once the volume has
/// grown.
const FEW: Stretches = &[(0, 8), (126, 4), (508, 8)];
/// The same, and most others.
const MANY: Stretches = &[(0, 8), (126, 4), (130, 126), (10, 100), (508, 8)];
/// Bytes of volumes that have grown.
pub(super) const GROWN: [u64; 2] = [3 << 20, 4 << 20];

/// A few blocks in each of many leaves, under three pages of level 1.
const WIDE: Stretches = &[
    (0, 4),
    (126, 4),
    (1200, 3),
    (5000, 3),
    (9000, 2),
    (128 * 129, 3),
    (128 * 140 + 127, 2),
    (128 * 255 + 126, 4),
    (128 * 257, 2),
    (128 * 299, 3),
];

/// See the module.
#[derive(Clone, Copy)]
pub(super) struct Plan {
    pub(super) geometry: Geometry,
    pub(super) stretches: Stretches,
    pub(super) lanes: usize,
    pub(super) ring_len: usize,
    /// The longest request, in blocks.
    pub(super) longest: usize,
    /// A process lives for fewer steps than this.
    pub(super) steps: usize,
    /// Bytes of memory for the map: from too little for two leaves to enough for all.
    pub(super) cache: u64,
    /// Requests fail as operations of the backing and the guest's memory do.
    pub(super) is_faulty: bool,
}

pub(super) fn small_geometry() -> Geometry {
    // A log of one chunk, and few spare chunks: it wraps, checkpoints and fills holes.
    Geometry {
        blocks: 256,
        chunks: 2 + 1 + 6,
        log_chunks: 1,
    }
}

/// Pages of level 2 and above are always there, three of them.
fn cache(dice: &mut Dice) -> u64 {
    match dice.below(4) {
        0 => 1 << 20,
        1 => 12 * PAGE_COST,
        pages => (2 + pages as u64) * PAGE_COST,
    }
}

fn wide_geometry() -> Geometry {
    Geometry {
        blocks: 128 * 300,
        ..small_geometry()
    }
}

impl Plan {
    /// A disk that only dies.
    pub(super) fn plain(dice: &mut Dice) -> Self {
        let mut plan = Self::few(dice);
        plan.cache = cache(dice);
        if dice.chance(25) {
            plan.geometry = wide_geometry();
            plan.stretches = WIDE;
        }
        plan
    }

    /// The same with few blocks, and memory for all of their map: much happens to each.
    pub(super) fn few(dice: &mut Dice) -> Self {
        Self {
            geometry: small_geometry(),
            stretches: FEW,
            lanes: 2,
            // Small, so that it fills and wraps.
            ring_len: 8 << 10,
            longest: 3,
            steps: if dice.chance(8) { 1500 } else { 160 },
            cache: 1 << 20,
            is_faulty: false,
        }
    }

    /// A disk that fails, fills up and answers in part.
    pub(super) fn faulty(dice: &mut Dice) -> Self {
        let is_wide = dice.chance(30);
        Self {
            geometry: Geometry {
                blocks: if is_wide { 128 * 300 } else { 256 },
                // With three, the volume does not fit when all of it is written.
                chunks: 2 + 1 + 3 - u64::from(dice.chance(40)) + 2 * u64::from(dice.chance(30)),
                ..small_geometry()
            },
            stretches: match dice.chance(60) {
                _ if is_wide => WIDE,
                true => MANY,
                false => FEW,
            },
            lanes: 1 + dice.below(3),
            ring_len: (8 << 10) << dice.below(6),
            longest: if dice.chance(50) { 70 } else { 6 },
            steps: if dice.chance(20) { 1500 } else { 250 },
            cache: cache(dice),
            is_faulty: true,
        }
    }
}

/// How an operation goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// It was not done, or not all of it: this errno.
    Errno(i32),
    /// This many bytes were moved.
    Short(usize),
}

const EINTR: i32 = 4;
pub(super) const EIO: i32 = 5;
const EAGAIN: i32 = 11;
const ENOSPC: i32 = 28;
const EOPNOTSUPP: i32 = 95;

impl Fault {
    pub(super) fn of(kind: &IoKind, dice: &mut Dice) -> Self {
        let again = if dice.chance(50) { EINTR } else { EAGAIN };
        match kind {
            IoKind::Read { skip, buffer, .. } | IoKind::Write { skip, buffer, .. } => {
                let blocks = (buffer.len() - skip) / BLOCK_LEN;
                let is_read = matches!(kind, IoKind::Read { .. });
                match dice.below(8) {
                    0 => Self::Errno(EIO),
                    1 if !is_read => Self::Errno(ENOSPC),
                    2..5 => Self::Errno(again),
                    _ if blocks > 1 => Self::Short((1 + dice.below(blocks - 1)) * BLOCK_LEN),
                    _ => Self::Errno(again),
                }
            }
            IoKind::Sync(_) => Self::Errno(if dice.chance(30) { EIO } else { again }),
            IoKind::Allocate { .. } => Self::Errno(ENOSPC),
            IoKind::Punch { .. } => Self::Errno(EOPNOTSUPP),
        }
    }
}
