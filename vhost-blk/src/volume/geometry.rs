//! Sizes and places: how a backing is divided.
//!
//! ```text
//! 0          superblock A, its key table behind it     chunk 0
//! 1 MiB      superblock B, its key table behind it     chunk 1
//! 2 MiB      log ring                                  chunks 2 .. 2 + log_chunks
//! then       data and map pages, allocated when first written
//! ```
//!
//! A [`Slot`] is a 4 KiB place counted from the start of the backing, so slot 0 is the superblock
//! and never holds data: it serves as "no slot".

use thiserror::Error;

/// Bytes of a block, a slot and a page.
pub const BLOCK_LEN: usize = 4096;
/// Slots of a chunk.
pub const CHUNK_SLOTS: u64 = 256;
/// Bytes of a chunk: 1 MiB.
pub const CHUNK_LEN: u64 = CHUNK_SLOTS * BLOCK_LEN as u64;
/// Bytes of a virtio sector (virtio 1.3, 5.2.4).
pub const SECTOR_LEN: u64 = 512;
/// Entries of a map page, blocks of a leaf, chunks of a space leaf.
pub const FANOUT: u64 = 128;
/// Levels of the map tree: 128^5 blocks are 128 TiB. The height is fixed, so that growing a
/// volume never moves a page; the price is two more 4 KiB pages a checkpoint on small volumes.
pub const MAP_LEVELS: usize = 5;
/// Levels of the space tree: 128^4 chunks are 256 TiB.
pub const SPACE_LEVELS: usize = 4;
/// First chunk of the log.
pub const LOG_START_CHUNK: u64 = 2;
/// Largest volume: what the map can name.
pub const MAX_VOLUME_LEN: u64 = 1 << 47;
/// Smallest volume: one chunk.
pub const MIN_VOLUME_LEN: u64 = CHUNK_LEN;

/// Room besides a volume's size, in percent of it, unless another figure is asked for: of random
/// overwrites of a full volume two in five blocks then follow another one on disk (see
/// `docs/placement.md`). A file takes that room only when it is used.
pub const SPARE_PERCENT: u64 = 25;
/// The most of it.
pub const SPARE_MAX: u64 = 400;
/// Chunks of spare room on top, for volumes so small that a part of them is nothing.
const SPARE_CHUNKS: u64 = 24;

/// A 4 KiB block of the guest's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Block(pub u64);

/// A 4 KiB place in the backing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u64);

impl Slot {
    /// Byte offset in the backing.
    pub const fn offset(self) -> u64 {
        self.0 * BLOCK_LEN as u64
    }

    /// The chunk that it lies in.
    pub const fn chunk(self) -> u64 {
        self.0 / CHUNK_SLOTS
    }
}

/// What the superblock says of sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Blocks that the guest sees.
    pub blocks: u64,
    /// Chunks of the backing, superblocks and log included.
    pub chunks: u64,
    /// Chunks of the log ring.
    pub log_chunks: u64,
}

/// Why sizes are refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum GeometryError {
    /// The volume's size is out of range.
    #[error("a volume of {0} bytes is not possible: give a multiple of 4096 from 1 MiB to 128 TiB")]
    VolumeSize(u64),
    /// The backing cannot hold the volume.
    #[error(
        "the backing has {have} bytes, a volume of {volume} bytes needs {need} (log, map and \
         spare room included): use a larger device or a smaller --size"
    )]
    BackingTooSmall {
        /// Bytes that are there.
        have: u64,
        /// Bytes of the volume.
        volume: u64,
        /// Bytes that are needed.
        need: u64,
    },
    /// A volume only grows.
    #[error(
        "the volume has {have} bytes and cannot shrink to {asked}: what the guest keeps at its end would \
         be lost. To have a smaller one, copy the files into a new volume"
    )]
    Shrink {
        /// Bytes of the volume.
        have: u64,
        /// Bytes that were asked for.
        asked: u64,
    },
    /// Numbers read from a superblock contradict each other.
    #[error("the superblock's sizes contradict each other")]
    Inconsistent,
}

impl Geometry {
    /// The layout for a volume of `len` bytes with the usual spare room.
    ///
    /// # Errors
    /// `len` is not a multiple of 4 KiB or out of range.
    pub fn for_volume(len: u64) -> Result<Self, GeometryError> {
        Self::with_spare(len, SPARE_PERCENT)
    }

    /// The layout for a volume of `len` bytes and `spare` percent of it besides.
    ///
    /// # Errors
    /// `len` is not a multiple of 4 KiB or out of range.
    pub fn with_spare(len: u64, spare: u64) -> Result<Self, GeometryError> {
        if !len.is_multiple_of(BLOCK_LEN as u64)
            || !(MIN_VOLUME_LEN..=MAX_VOLUME_LEN).contains(&len)
        {
            return Err(GeometryError::VolumeSize(len));
        }
        let blocks = len / BLOCK_LEN as u64;
        // A checkpoint is due when half of the log is used, and costs two barriers, for which all
        // else waits. A record holds 48 bytes a block: with 1/64 of the volume two thirds of it are
        // written between checkpoints. Beyond 64 MiB a longer log only makes recovery longer.
        let log_chunks = (len / 64).div_ceil(CHUNK_LEN).clamp(4, 64);
        let data = len.div_ceil(CHUNK_LEN);
        // Out-of-place writes need room before the old slots are given back.
        let spare = data * spare.min(SPARE_MAX) / 100 + SPARE_CHUNKS;
        // Pages: the leaves and a level above, twice, for a checkpoint writes new ones first.
        let leaves = blocks.div_ceil(FANOUT);
        let pages = leaves + leaves.div_ceil(FANOUT) + 64;
        let meta = (2 * pages).div_ceil(CHUNK_SLOTS);
        Ok(Self {
            blocks,
            chunks: LOG_START_CHUNK + log_chunks + data + spare + meta,
            log_chunks,
        })
    }

    /// Chunks without the log.
    const fn body(&self) -> u64 {
        self.chunks.saturating_sub(self.log_chunks)
    }

    /// The percentage of spare room that the volume was made with. The header does not have it, and on a
    /// volume of less than 100 MiB several come to the same number of chunks: then it is the usual one
    /// if that is among them, else the highest.
    fn spare(&self) -> u64 {
        let gives = |spare| Self::with_spare(self.volume_len(), spare).map_or(0, |g| g.body());
        if gives(SPARE_PERCENT) == self.body() {
            return SPARE_PERCENT;
        }
        let (mut low, mut high) = (0, SPARE_MAX);
        while low < high {
            let middle = low + (high - low).div_ceil(2);
            (low, high) = match gives(middle) <= self.body() {
                true => (middle, high),
                false => (low, middle - 1),
            };
        }
        low
    }

    /// The layout once the volume has grown to `len` bytes, with as much spare room in proportion. The
    /// log stays as it is, for what is behind it cannot move.
    ///
    /// # Errors
    /// The size is impossible, or smaller than it was.
    pub fn grown(self, len: u64) -> Result<Self, GeometryError> {
        let fresh = Self::with_spare(len, self.spare())?;
        if fresh.blocks < self.blocks {
            let have = self.volume_len();
            return Err(GeometryError::Shrink { have, asked: len });
        }
        Self {
            blocks: fresh.blocks,
            chunks: (fresh.body() + self.log_chunks).max(self.chunks),
            log_chunks: self.log_chunks,
        }
        .check()
    }

    /// The largest size that the volume can grow to in a backing of `len` bytes; its own if the
    /// backing has no room for more.
    pub fn largest_grown_in(self, len: u64) -> u64 {
        let now = self.volume_len();
        let (mut low, mut high) = (0, (MAX_VOLUME_LEN - now) / CHUNK_LEN);
        while low < high {
            let middle = low + (high - low).div_ceil(2);
            let fits = self
                .grown(now + middle * CHUNK_LEN)
                .is_ok_and(|grown| grown.backing_len() <= len);
            (low, high) = if fits {
                (middle, high)
            } else {
                (low, middle - 1)
            };
        }
        now + low * CHUNK_LEN
    }

    /// The largest volume with `spare` percent besides that fits a backing of `len` bytes.
    ///
    /// # Errors
    /// Not even the smallest fits.
    pub fn largest_in(len: u64, spare: u64) -> Result<Self, GeometryError> {
        let (mut low, mut high) = (MIN_VOLUME_LEN / CHUNK_LEN, MAX_VOLUME_LEN / CHUNK_LEN);
        let fits = |chunks: u64| {
            Self::with_spare(chunks * CHUNK_LEN, spare).is_ok_and(|g| g.backing_len() <= len)
        };
        if !fits(low) {
            let need = Self::with_spare(MIN_VOLUME_LEN, spare)?.backing_len();
            return Err(GeometryError::BackingTooSmall {
                have: len,
                volume: MIN_VOLUME_LEN,
                need,
            });
        }
        while low < high {
            let middle = low + (high - low).div_ceil(2);
            if fits(middle) {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        Self::with_spare(low * CHUNK_LEN, spare)
    }

    /// Checks numbers that come from a superblock.
    ///
    /// # Errors
    /// They contradict each other.
    pub fn check(self) -> Result<Self, GeometryError> {
        let len = self
            .blocks
            .checked_mul(BLOCK_LEN as u64)
            .ok_or(GeometryError::Inconsistent)?;
        let sound = (MIN_VOLUME_LEN..=MAX_VOLUME_LEN).contains(&len)
            && (1..=4096).contains(&self.log_chunks)
            && self.chunks <= FANOUT.pow(SPACE_LEVELS as u32)
            && self.chunks > self.data_start();
        if sound {
            Ok(self)
        } else {
            Err(GeometryError::Inconsistent)
        }
    }

    /// Bytes that the guest sees.
    pub const fn volume_len(&self) -> u64 {
        self.blocks * BLOCK_LEN as u64
    }

    /// Bytes of the backing when every chunk is written.
    pub const fn backing_len(&self) -> u64 {
        self.chunks * CHUNK_LEN
    }

    /// First chunk for data and pages.
    pub const fn data_start(&self) -> u64 {
        LOG_START_CHUNK + self.log_chunks
    }

    /// Blocks of the log ring.
    pub const fn log_blocks(&self) -> u64 {
        self.log_chunks * CHUNK_SLOTS
    }

    /// The slot of log block `position`.
    pub const fn log_slot(&self, position: u64) -> Slot {
        Slot(LOG_START_CHUNK * CHUNK_SLOTS + position % self.log_blocks())
    }

    /// Whether `slot` may hold data or a page.
    pub const fn is_data_slot(&self, slot: Slot) -> bool {
        slot.chunk() >= self.data_start() && slot.chunk() < self.chunks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_sizes_are_refused() {
        for len in [
            0,
            4096,
            CHUNK_LEN - 4096,
            CHUNK_LEN + 512,
            MAX_VOLUME_LEN + 4096,
            u64::MAX,
        ] {
            assert_eq!(
                Geometry::for_volume(len),
                Err(GeometryError::VolumeSize(len))
            );
        }
    }

    #[test]
    fn the_largest_volume_of_a_backing_fits_and_a_larger_one_does_not() {
        for len in [100 << 20, 1 << 30, 10 << 30, (10 << 30) + 4095, 1 << 41] {
            let found = Geometry::largest_in(len, SPARE_PERCENT).expect("fits");
            assert!(found.backing_len() <= len);
            let more = Geometry::for_volume(found.volume_len() + CHUNK_LEN).expect("size");
            assert!(more.backing_len() > len);
            assert_eq!(found.check(), Ok(found));
        }
        assert!(Geometry::largest_in(3 << 20, 3).is_err());
    }

    #[test]
    fn a_volume_grows_where_it_is_and_never_shrinks() {
        let small = Geometry::for_volume(64 << 20).expect("size");
        for len in [64 << 20, 65 << 20, 20 << 30, MAX_VOLUME_LEN] {
            let grown = small.grown(len).expect("grows");
            assert_eq!(grown.volume_len(), len);
            assert_eq!(grown.log_chunks, small.log_chunks);
            assert!(grown.chunks >= small.chunks);
            assert_eq!(grown.data_start(), small.data_start());
            let largest = small.largest_grown_in(grown.backing_len());
            assert!((len..len + (64 << 20)).contains(&largest), "{largest}");
        }
        assert_eq!(
            small.grown((64 << 20) - 4096),
            Err(GeometryError::Shrink {
                have: 64 << 20,
                asked: (64 << 20) - 4096
            })
        );
        for len in [0, (64 << 20) + 1, MAX_VOLUME_LEN + 4096, u64::MAX] {
            assert_eq!(small.grown(len), Err(GeometryError::VolumeSize(len)));
        }
        assert_eq!(small.largest_grown_in(small.backing_len()), 64 << 20);
        assert_eq!(small.largest_grown_in(0), 64 << 20);
        let roomy = Geometry::with_spare(1 << 30, 50).expect("size");
        let grown = roomy.grown(10 << 30).expect("grows");
        assert!(grown.chunks >= 15 << 10, "it keeps its spare room");
    }

    #[test]
    fn a_volume_that_grows_keeps_its_spare_room_however_small_it_was() {
        for spare in [3, 4, 10, 24, 25, 26, 50, 99, 100, 101, 399, 400] {
            for len in [1 << 20, 5 << 20, 24 << 20, 333 << 20, 1 << 30, 1 << 40] {
                let small = Geometry::with_spare(len, spare).expect("size");
                let usual = Geometry::with_spare(len, SPARE_PERCENT).expect("size");
                let told = if small == usual { SPARE_PERCENT } else { spare };
                for large in [len, len + (1 << 20), len * 3, len * 100] {
                    let Ok(asked) = Geometry::with_spare(large, told) else {
                        continue;
                    };
                    if asked.check().is_err() {
                        continue;
                    }
                    let (is, least) = (small.grown(large).expect("grows").body(), asked.body());
                    assert!(is >= least, "{spare} % of {len} grown to {large}: {is}");
                    // Once it is large enough to tell the percentages apart.
                    if len >= 1 << 30 {
                        assert_eq!(is, least, "{spare} % of {len} grown to {large}");
                    }
                }
            }
        }
    }

    #[test]
    fn sizes_from_a_stranger_are_checked_without_overflow() {
        let good = Geometry::for_volume(1 << 30).expect("size");
        for bad in [
            Geometry {
                blocks: u64::MAX,
                ..good
            },
            Geometry {
                chunks: u64::MAX,
                ..good
            },
            Geometry { chunks: 3, ..good },
            Geometry {
                log_chunks: 0,
                ..good
            },
            Geometry {
                log_chunks: u64::MAX,
                ..good
            },
        ] {
            assert_eq!(bad.check(), Err(GeometryError::Inconsistent));
        }
    }
}
