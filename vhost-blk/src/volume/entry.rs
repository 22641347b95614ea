//! The 32 bytes that say where a block or a page is and what it must authenticate as.
//!
//! ```text
//! 0   slot      u48   place in the backing; 0 = hole
//! 6   session   u16   key-table id; 0 = hole
//! 8   sequence  u48   nonce counter within the session
//! 14  reserved  u16   zero
//! 16  tag       16 B  AES-256-GCM tag
//! ```
//!
//! All zero is an authenticated hole: it is authenticated because the page that holds it is.

use crypto::aead::Tag;

use super::geometry::Slot;

/// Bytes of an entry.
pub const ENTRY_LEN: usize = 32;

/// Largest sequence number that an entry can hold.
pub const SEQUENCE_MAX: u64 = (1 << 48) - 1;

/// Where a block or page is and what seals it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Entry {
    slot: u64,
    session: u16,
    sequence: u64,
    /// Tag of the sealed 4 KiB.
    pub tag: Tag,
}

impl Entry {
    /// A block that reads as zeros, a page that has no entries.
    pub const HOLE: Self = Self {
        slot: 0,
        session: 0,
        sequence: 0,
        tag: [0; 16],
    };

    /// The entry of something sealed under `session` and `sequence` at `slot`.
    pub fn new(slot: Slot, session: u16, sequence: u64, tag: Tag) -> Self {
        debug_assert!(slot.0 <= SEQUENCE_MAX && sequence <= SEQUENCE_MAX && session != 0);
        Self {
            slot: slot.0,
            session,
            sequence,
            tag,
        }
    }

    /// The entry of the same sealed bytes at another slot.
    pub fn moved_to(self, slot: Slot) -> Self {
        debug_assert!(slot.0 <= SEQUENCE_MAX);
        Self {
            slot: slot.0,
            ..self
        }
    }

    /// Whether there is nothing behind it.
    pub const fn is_hole(&self) -> bool {
        self.session == 0
    }

    /// Where it is; `Slot(0)` for a hole.
    pub const fn slot(&self) -> Slot {
        Slot(self.slot)
    }

    /// Which session's keys seal it.
    pub const fn session(&self) -> u16 {
        self.session
    }

    /// The nonce counter it is sealed with.
    pub const fn sequence(&self) -> u64 {
        self.sequence
    }

    /// The stored form.
    pub fn to_bytes(self) -> [u8; ENTRY_LEN] {
        let mut bytes = [0; ENTRY_LEN];
        bytes[0..6].copy_from_slice(&self.slot.to_le_bytes()[..6]);
        bytes[6..8].copy_from_slice(&self.session.to_le_bytes());
        bytes[8..14].copy_from_slice(&self.sequence.to_le_bytes()[..6]);
        bytes[16..32].copy_from_slice(&self.tag);
        bytes
    }

    /// From the stored form. Every pattern is an entry; whether its slot is possible is for
    /// whoever follows it to check.
    pub fn from_bytes(bytes: &[u8; ENTRY_LEN]) -> Self {
        let low = |range: std::ops::Range<usize>| {
            let mut word = [0; 8];
            word[..range.len()].copy_from_slice(&bytes[range]);
            u64::from_le_bytes(word)
        };
        let mut tag = [0; 16];
        tag.copy_from_slice(&bytes[16..32]);
        let session = u16::from_le_bytes([bytes[6], bytes[7]]);
        if session == 0 {
            return Self::HOLE;
        }
        Self {
            slot: low(0..6),
            session,
            sequence: low(8..14),
            tag,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes() {
        let entry = Entry::new(Slot(0x0102_0304_0506), 0x0708, 0x1112_1314_1516, [0xaa; 16]);
        let mut expected = [0u8; 32];
        expected[..14]
            .copy_from_slice(&[6, 5, 4, 3, 2, 1, 8, 7, 0x16, 0x15, 0x14, 0x13, 0x12, 0x11]);
        expected[16..].fill(0xaa);
        assert_eq!(entry.to_bytes(), expected);
        assert_eq!(Entry::from_bytes(&expected), entry);
    }

    #[test]
    fn all_zero_is_a_hole() {
        assert_eq!(Entry::from_bytes(&[0; 32]), Entry::HOLE);
        assert_eq!(Entry::HOLE.to_bytes(), [0; 32]);
        assert!(Entry::HOLE.is_hole());
    }
}
