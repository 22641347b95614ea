//! The device's part of the in-flight region as the memory of the volume's delta ring, and the one
//! word in it that is the device's own: the cache mode that the driver chose.

use std::sync::Arc;

use offload::inflight::SharedRegion;

use super::config::CacheMode;
use crate::volume::ring::{DEVICE_WORD_AT, RingMemory};

/// See the module.
#[derive(Clone, Debug)]
pub struct RegionMemory(pub Arc<SharedRegion>);

impl RingMemory for RegionMemory {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn read(&self, at: usize, into: &mut [u8]) {
        if self.0.read(at, into).is_ok() {
            return;
        }
        into.fill(0);
        let there = self.0.len().saturating_sub(at).min(into.len());
        if let Some(part) = into.get_mut(..there) {
            // In the region: cut to it above.
            let _ = self.0.read(at, part);
        }
    }

    fn write(&self, at: usize, from: &[u8]) {
        if self.0.write(at, from).is_ok() {
            return;
        }
        let there = self.0.len().saturating_sub(at).min(from.len());
        if let Some(part) = from.get(..there) {
            // In the region: cut to it above.
            let _ = self.0.write(at, part);
        }
    }

    fn store(&self, at: usize, word: u64) {
        // Words out of range are dropped, as the trait has it.
        let _ = self.0.store_u64(at, word.to_le());
    }
}

const WRITETHROUGH: u64 = 1;
const WRITEBACK: u64 = 2;

/// Leaves the driver's choice for the next card process.
pub fn remember_mode(region: &SharedRegion, mode: CacheMode) {
    let word = if mode.is_writeback {
        WRITEBACK
    } else {
        WRITETHROUGH
    };
    // A region always has room for it: it was checked to hold a ring.
    let _ = region.store_u64(DEVICE_WORD_AT, word);
}

/// The choice that an earlier card process left, if the driver made one. The frontend can forge
/// it; it could as well not pass the guest's flushes on.
pub fn recall_mode(region: &SharedRegion) -> Option<CacheMode> {
    let is_writeback = match region.load_u64(DEVICE_WORD_AT).ok()? {
        WRITETHROUGH => false,
        WRITEBACK => true,
        _ => return None,
    };
    Some(CacheMode { is_writeback })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_out_of_range_reads_as_zero_and_is_not_written() {
        let memory = RegionMemory(Arc::new(SharedRegion::anonymous(4096).unwrap()));
        memory.write(4090, &[7; 20]);
        let mut bytes = [9; 20];
        memory.read(4090, &mut bytes);
        assert_eq!(bytes[..6], [7; 6]);
        assert_eq!(bytes[6..], [0; 14]);
        memory.read(usize::MAX - 3, &mut bytes);
        assert_eq!(bytes, [0; 20]);
        memory.write(usize::MAX - 3, &[1; 20]);
        memory.store(4092, 1);
        memory.store(8, 0x0102_0304_0506_0708);
        memory.read(8, &mut bytes[..8]);
        assert_eq!(bytes[..8], [8, 7, 6, 5, 4, 3, 2, 1]);
        assert_eq!(memory.len(), 4096);
    }
}
