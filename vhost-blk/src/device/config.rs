//! Features and configuration space (virtio 1.3, 5.2.3 and 5.2.4).
//!
//! ```text
//! 0  capacity u64, sectors      24 physical_block_exp u8   36 max_discard_sectors u32
//! 8  size_max u32               25 alignment_offset u8     40 max_discard_seg u32
//! 12 seg_max u32                26 min_io_size u16         44 discard_sector_alignment u32
//! 16 geometry, 4 bytes          28 opt_io_size u32         48 max_write_zeroes_sectors u32
//! 20 blk_size u32               32 writeback u8, unused u8 52 max_write_zeroes_seg u32
//!                               34 num_queues u16          56 write_zeroes_may_unmap u8, 3 unused
//! ```
//!
//! The guest sees 512-byte sectors, for every driver takes those, and is told that 4 KiB are what
//! costs least: smaller writes are read, merged and written.

use virtio_bindings::virtio_blk;

use crate::volume::geometry::{BLOCK_LEN, SECTOR_LEN};

/// Largest size of a segment is given.
pub const SIZE_MAX: u64 = 1 << virtio_blk::VIRTIO_BLK_F_SIZE_MAX;
/// Largest number of segments is given.
pub const SEG_MAX: u64 = 1 << virtio_blk::VIRTIO_BLK_F_SEG_MAX;
/// The volume takes no writes.
pub const RO: u64 = 1 << virtio_blk::VIRTIO_BLK_F_RO;
/// The logical block size is given.
pub const BLK_SIZE: u64 = 1 << virtio_blk::VIRTIO_BLK_F_BLK_SIZE;
/// The FLUSH request.
pub const FLUSH: u64 = 1 << virtio_blk::VIRTIO_BLK_F_FLUSH;
/// Block sizes that perform well are given.
pub const TOPOLOGY: u64 = 1 << virtio_blk::VIRTIO_BLK_F_TOPOLOGY;
/// The driver may switch the cache between writeback and writethrough.
pub const CONFIG_WCE: u64 = 1 << virtio_blk::VIRTIO_BLK_F_CONFIG_WCE;
/// More than one queue.
pub const MQ: u64 = 1 << virtio_blk::VIRTIO_BLK_F_MQ;
/// The DISCARD request.
pub const DISCARD: u64 = 1 << virtio_blk::VIRTIO_BLK_F_DISCARD;
/// The WRITE_ZEROES request.
pub const WRITE_ZEROES: u64 = 1 << virtio_blk::VIRTIO_BLK_F_WRITE_ZEROES;

/// Segments of a DISCARD or WRITE_ZEROES.
pub const RANGES_MAX: usize = 16;
/// Sectors of one of them: 64 MiB, so that a request ends in bearable time.
pub const RANGE_SECTORS_MAX: u32 = (64 << 20) / SECTOR_LEN as u32;
/// Offset of `writeback`.
pub const WRITEBACK_AT: u32 = 32;

/// Bytes of a segment.
const SEGMENT_LEN_MAX: u32 = 1 << 20;
/// Sectors of a request that performs well: what the engine moves as one piece.
const OPTIMAL_SECTORS: u32 = (64 * BLOCK_LEN as u64 / SECTOR_LEN) as u32;
const BLOCK_SECTORS: u16 = (BLOCK_LEN as u64 / SECTOR_LEN) as u16;

/// The features of a volume.
pub const fn features(is_read_only: bool) -> u64 {
    let always = SIZE_MAX | SEG_MAX | BLK_SIZE | FLUSH | TOPOLOGY | CONFIG_WCE | MQ;
    if is_read_only {
        always | RO
    } else {
        always | DISCARD | WRITE_ZEROES
    }
}

/// What the configuration space shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Bytes of the volume.
    pub volume_len: u64,
    /// Queues.
    pub queues: u16,
    /// Largest queue size.
    pub queue_size: u16,
    /// Whether the cache is in writeback mode.
    pub is_writeback: bool,
}

impl Config {
    /// Data segments of a request: a chain is not longer than its queue (2.7.5.3.1) and carries a
    /// header and a status. Frontends choose their queue size themselves, mostly 128 or more.
    fn segments_max(&self) -> u32 {
        u32::from(self.queue_size.min(128).saturating_sub(2).max(1))
    }

    /// The configuration space.
    pub fn bytes(&self) -> Vec<u8> {
        let mut space = Vec::with_capacity(60);
        let sectors_max = RANGE_SECTORS_MAX.to_le_bytes();
        let ranges_max = (RANGES_MAX as u32).to_le_bytes();
        space.extend((self.volume_len / SECTOR_LEN).to_le_bytes());
        space.extend(SEGMENT_LEN_MAX.to_le_bytes());
        space.extend(self.segments_max().to_le_bytes());
        space.extend([0; 4]);
        space.extend((SECTOR_LEN as u32).to_le_bytes());
        space.push(BLOCK_SECTORS.trailing_zeros() as u8);
        space.push(0);
        space.extend(BLOCK_SECTORS.to_le_bytes());
        space.extend(OPTIMAL_SECTORS.to_le_bytes());
        space.push(u8::from(self.is_writeback));
        space.push(0);
        space.extend(self.queues.to_le_bytes());
        space.extend(sectors_max);
        space.extend(ranges_max);
        space.extend(u32::from(BLOCK_SECTORS).to_le_bytes());
        space.extend(sectors_max);
        space.extend(ranges_max);
        space.extend([1, 0, 0, 0]);
        space
    }
}

/// Which writes have to be durable before they are acknowledged (5.2.5.2, 5.2.6.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheMode {
    /// What `writeback` in the configuration space says.
    pub is_writeback: bool,
}

impl CacheMode {
    /// The mode that a driver with these features starts with. A driver that cannot flush gets a
    /// writethrough cache, for it has no other way to make its writes durable.
    pub const fn initial(acked: u64) -> Self {
        Self {
            is_writeback: acked & FLUSH != 0,
        }
    }

    /// After a write of the driver to the configuration space; `None`: it may not.
    pub fn written(acked: u64, offset: u32, data: &[u8]) -> Option<Self> {
        match data {
            [mode @ (0 | 1)] if offset == WRITEBACK_AT && acked & CONFIG_WCE != 0 => Some(Self {
                is_writeback: *mode == 1,
            }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: Config = Config {
        volume_len: 10 << 30,
        queues: 4,
        queue_size: 256,
        is_writeback: true,
    };

    #[test]
    fn the_configuration_space_has_its_fields_where_the_standard_has_them() {
        let space = CONFIG.bytes();
        let long = |at: usize| u64::from_le_bytes(*space[at..].first_chunk().unwrap());
        let word = |at: usize| u32::from_le_bytes(*space[at..].first_chunk().unwrap());
        let half = |at: usize| u16::from_le_bytes(*space[at..].first_chunk().unwrap());
        assert_eq!(space.len(), 60);
        assert_eq!(long(0), (10 << 30) / 512);
        assert_eq!((word(8), word(12), word(20)), (1 << 20, 126, 512));
        assert_eq!((space[24], space[25], half(26), word(28)), (3, 0, 8, 512));
        assert_eq!((space[32], half(34)), (1, 4));
        assert_eq!((word(36), word(40), word(44)), (131_072, 16, 8));
        assert_eq!((word(48), word(52), space[56]), (131_072, 16, 1));
        // The crate's own idea of the structure, field by field.
        use virtio_bindings::virtio_blk::virtio_blk_config as C;
        assert_eq!(std::mem::offset_of!(C, wce), WRITEBACK_AT as usize);
        assert_eq!(std::mem::offset_of!(C, num_queues), 34);
        assert_eq!(std::mem::offset_of!(C, max_discard_sectors), 36);
        assert_eq!(std::mem::offset_of!(C, write_zeroes_may_unmap), 56);
    }

    #[test]
    fn a_small_queue_gets_requests_that_fit_it() {
        for (queue_size, segments) in [(1, 1), (2, 1), (4, 2), (128, 126), (1024, 126)] {
            let config = Config {
                queue_size,
                ..CONFIG
            };
            assert_eq!(config.segments_max(), segments);
        }
    }

    #[test]
    fn a_driver_that_cannot_flush_gets_a_writethrough_cache() {
        assert!(CacheMode::initial(FLUSH).is_writeback);
        assert!(CacheMode::initial(FLUSH | CONFIG_WCE).is_writeback);
        assert!(!CacheMode::initial(0).is_writeback);
        assert!(!CacheMode::initial(CONFIG_WCE).is_writeback);
    }

    #[test]
    fn only_the_cache_mode_can_be_written_and_only_if_negotiated() {
        let mode = |acked, offset, data: &[u8]| {
            CacheMode::written(acked, offset, data).map(|mode| mode.is_writeback)
        };
        assert_eq!(mode(CONFIG_WCE, 32, &[0]), Some(false));
        assert_eq!(mode(CONFIG_WCE, 32, &[1]), Some(true));
        assert_eq!(mode(FLUSH, 32, &[1]), None);
        assert_eq!(mode(CONFIG_WCE, 32, &[2]), None);
        assert_eq!(mode(CONFIG_WCE, 32, &[1, 0]), None);
        assert_eq!(mode(CONFIG_WCE, 32, &[]), None);
        assert_eq!(mode(CONFIG_WCE, 0, &[1]), None);
        assert_eq!(mode(CONFIG_WCE, u32::MAX, &[1]), None);
    }

    #[test]
    fn a_read_only_volume_offers_nothing_that_changes_it() {
        let offered = features(true);
        assert_eq!(offered & (DISCARD | WRITE_ZEROES), 0);
        assert_eq!(offered & (RO | FLUSH), RO | FLUSH);
        assert_eq!(features(false) & RO, 0);
    }
}
