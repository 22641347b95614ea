//! Sectors that tell what they are: the pattern that `stamper` writes inside a guest, and what can
//! be told from it.
//!
//! A sector of 512 bytes holds its own number and a version, and the rest is a function of both. So
//! a read tells whether it got the right sector, whether it is whole, and how old it is. Version 0
//! is a sector never written, or discarded: zeros.

/// Bytes a sector.
pub const SECTOR_LEN: usize = 512;
const WORDS: usize = SECTOR_LEN / 8;

/// One step of a well-mixed generator (splitmix64).
#[must_use]
pub fn mix(value: u64) -> u64 {
    let z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Random numbers that a seed decides.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// From a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(mix(seed))
    }

    /// Below `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = mix(self.0);
        self.0 % bound
    }
}

/// What a sector says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// The sector, in this version.
    Version(u32),
    /// Something else: another sector's bytes, a mixture, noise.
    Garbage,
}

fn word(sector: u64, version: u32, index: usize) -> u64 {
    match index {
        0 => sector,
        1 => u64::from(version),
        _ => mix(sector ^ u64::from(version).rotate_left(40) ^ (index as u64) << 56),
    }
}

/// Fills `sectors` (whole ones) as `version`, beginning with sector number `first`.
pub fn fill(sectors: &mut [u8], first: u64, version: u32) {
    for (number, sector) in (first..).zip(sectors.chunks_exact_mut(SECTOR_LEN)) {
        if version == 0 {
            sector.fill(0);
            continue;
        }
        for (index, place) in sector.chunks_exact_mut(8).enumerate() {
            place.copy_from_slice(&word(number, version, index).to_le_bytes());
        }
    }
}

/// What the bytes of sector `number` are.
#[must_use]
pub fn find(bytes: &[u8], number: u64) -> Found {
    let mut words = bytes.chunks_exact(8).map(|w| {
        let mut word = [0; 8];
        word.copy_from_slice(w);
        u64::from_le_bytes(word)
    });
    if bytes.len() != SECTOR_LEN {
        return Found::Garbage;
    }
    let version = words.clone().nth(1).unwrap_or_default();
    let Ok(version) = u32::try_from(version) else {
        return Found::Garbage;
    };
    let is_whole = if version == 0 {
        words.all(|word| word == 0)
    } else {
        (0..WORDS).all(|index| words.next() == Some(word(number, version, index)))
    };
    if is_whole {
        Found::Version(version)
    } else {
        Found::Garbage
    }
}

/// A number for the content of a whole disk, fed in order; finds accidents, not attacks.
#[derive(Debug, Clone, Copy, Default)]
pub struct Digest(u64);

impl Digest {
    /// Takes bytes, a multiple of 8.
    pub fn update(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks_exact(8) {
            let mut word = [0; 8];
            word.copy_from_slice(chunk);
            self.0 = (self.0.rotate_left(5) ^ u64::from_le_bytes(word))
                .wrapping_mul(0x517c_c1b7_2722_0a95);
        }
    }

    /// The number, as it is printed.
    #[must_use]
    pub fn text(self) -> String {
        format!("{:016x}", mix(self.0))
    }
}

/// Runs of sectors that one worker writes between two fsyncs: first sector, count.
///
/// The worker owns `region`; `epoch` counts from 1. Whoever knows the seed knows all epochs, so
/// that a disk can be held to what a guest wrote whose memory is lost.
#[must_use]
pub fn epoch_runs(seed: u64, region: (u64, u64), epoch: u32) -> Vec<(u64, u64)> {
    let mut random = Random::new(mix(seed) ^ mix(region.0) ^ u64::from(epoch) << 20);
    let (start, len) = region;
    let count = 1 + random.below(6);
    (0..count)
        .map(|_| {
            let sectors = (1 + random.below(40)).min(len);
            (start + random.below(len - sectors + 1), sectors)
        })
        .collect()
}

/// The part of a disk of `sectors` that worker `index` of `workers` owns: first sector, count.
/// Parts begin in the middle of 4 KiB blocks, so that neighbours share one.
#[must_use]
pub fn region(sectors: u64, workers: u64, index: u64) -> (u64, u64) {
    let start = |i: u64| {
        if i == 0 {
            0
        } else {
            sectors / workers * i / 8 * 8 + 3
        }
    };
    let end = if index + 1 == workers {
        sectors
    } else {
        start(index + 1)
    };
    (start(index), end - start(index))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sector_is_known_by_place_and_version_and_every_flipped_bit_is_seen() {
        let mut bytes = vec![0; 2 * SECTOR_LEN];
        fill(&mut bytes, 8, 3);
        assert_eq!(find(&bytes[..SECTOR_LEN], 8), Found::Version(3));
        assert_eq!(find(&bytes[SECTOR_LEN..], 9), Found::Version(3));
        assert_eq!(find(&bytes[SECTOR_LEN..], 8), Found::Garbage);
        for bit in 0..SECTOR_LEN * 8 {
            let mut bent = bytes[..SECTOR_LEN].to_vec();
            bent[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(find(&bent, 8), Found::Garbage, "bit {bit}");
        }
        assert_eq!(find(&[0; SECTOR_LEN], 8), Found::Version(0));
    }

    #[test]
    fn regions_cover_the_disk_and_share_blocks() {
        let mut next = 0;
        for index in 0..5 {
            let (start, len) = region(10_000, 5, index);
            assert_eq!(start, next);
            assert!(start == 0 || start % 8 != 0);
            next = start + len;
        }
        assert_eq!(next, 10_000);
    }

    #[test]
    fn epochs_stay_in_their_region_and_differ() {
        let region = (1003, 500);
        for epoch in 1..200 {
            for (start, len) in epoch_runs(7, region, epoch) {
                assert!(len > 0 && start >= 1003 && start + len <= 1503);
            }
        }
        assert_ne!(epoch_runs(7, region, 1), epoch_runs(7, region, 2));
        assert_eq!(epoch_runs(7, region, 1), epoch_runs(7, region, 1));
    }

    #[test]
    fn the_digest_depends_on_order() {
        let digest = |bytes: &[u8]| {
            let mut digest = Digest::default();
            digest.update(bytes);
            digest.text()
        };
        let mut bytes = vec![1; 16];
        bytes[0] = 2;
        let other = [&bytes[8..], &bytes[..8]].concat();
        assert_ne!(digest(&bytes), digest(&other));
    }
}
