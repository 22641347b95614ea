//! The state of one ring as the frontend has described it, and the rule that says when it runs.
//!
//! ```text
//!              SET_FEATURES, SET_VRING_NUM, _ADDR, _BASE, memory: in any order
//!                                       │
//!   stopped ── SET_VRING_KICK ──► waiting for what is missing ──► running
//!      ▲                                       ▲                     │
//!      │                                       └── its memory left ──┤
//!      └───────────────────────── GET_VRING_BASE ────────────────────┘
//!
//!   enabled (SET_VRING_ENABLE) is remembered in every state: only a running and enabled ring is
//!   served.
//! ```
//!
//! The specification ("Ring states") starts a ring when its kick descriptor turns readable. As
//! everyone else does, we start it when the descriptor arrives and look at the ring at once: after
//! a crash of the backend, requests in flight must be resumed although nobody kicks again. A kick
//! that arrives before the ring's memory (a frontend may add memory whenever it likes) is kept, and
//! the ring starts when its addresses translate.

use super::message::UserRing;
use crate::memory::RegionInfo;

/// Where a ring lies in guest physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestRing {
    /// Descriptor table.
    pub desc_table: u64,
    /// Available ring.
    pub avail_ring: u64,
    /// Used ring.
    pub used_ring: u64,
}

/// What the frontend has said about one ring.
#[derive(Debug)]
pub struct RingState<F> {
    /// SET_VRING_NUM; 0: not yet.
    pub size: u16,
    /// SET_VRING_ADDR.
    pub user: Option<UserRing>,
    /// SET_VRING_BASE, or where the ring was when it was stopped.
    pub base: u16,
    /// SET_VRING_KICK: `None` before the message, `Some(None)` when the ring is to be polled.
    pub kick: Option<Option<F>>,
    /// SET_VRING_CALL. It outlives a stop: a ring that starts again without a new one uses it.
    pub call: Option<F>,
    /// SET_VRING_ENABLE.
    pub enabled: bool,
    /// Where the ring runs, while it runs.
    pub running: Option<GuestRing>,
}

impl<F> Default for RingState<F> {
    fn default() -> Self {
        Self {
            size: 0,
            user: None,
            base: 0,
            kick: None,
            call: None,
            enabled: false,
            running: None,
        }
    }
}

impl<F> RingState<F> {
    /// Where the ring lies, if all of it is known and in `regions`.
    pub(super) fn place(&self, regions: &[RegionInfo]) -> Option<GuestRing> {
        let user = self.user?;
        let size = u64::from(self.size);
        if size == 0 {
            return None;
        }
        // Lengths with the event index behind avail and used (virtio 1.3, 2.7).
        Some(GuestRing {
            desc_table: translate(regions, user.desc_table, 16 * size)?,
            avail_ring: translate(regions, user.avail_ring, 6 + 2 * size)?,
            used_ring: translate(regions, user.used_ring, 6 + 8 * size)?,
        })
    }
}

/// Guest physical address of `len` bytes at the frontend's address `user`. `None` unless first and
/// last byte lie in `regions` with as many guest physical bytes between them: a ring may cross
/// regions that touch in both spaces.
pub(super) fn translate(regions: &[RegionInfo], user: u64, len: u64) -> Option<u64> {
    let span = len.checked_sub(1)?;
    let first = translate_byte(regions, user)?;
    let last = translate_byte(regions, user.checked_add(span)?)?;
    (first.checked_add(span)? == last).then_some(first)
}

fn translate_byte(regions: &[RegionInfo], user: u64) -> Option<u64> {
    regions.iter().find_map(|region| {
        let offset = user.checked_sub(region.userspace_addr)?;
        if offset >= region.size {
            return None;
        }
        region.guest_phys_addr.checked_add(offset)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(guest: u64, len: u64, user: u64) -> RegionInfo {
        RegionInfo {
            guest_phys_addr: guest,
            size: len,
            userspace_addr: user,
            mmap_offset: 0,
        }
    }

    #[test]
    fn addresses_translate_up_to_the_last_byte_and_across_touching_regions() {
        let table = [
            region(0x1000, 0x1000, 0xa000),
            region(0x2000, 0x1000, 0xb000),
            region(0x9000, 0x1000, 0xc000),
        ];
        assert_eq!(translate(&table, 0xa010, 0xff0), Some(0x1010));
        assert_eq!(translate(&table, 0xa010, 0x1000), Some(0x1010));
        // These two touch in frontend addresses only.
        assert_eq!(translate(&table, 0xbff0, 0x20), None);
        assert_eq!(translate(&table, 0xcff0, 0x10), Some(0x9ff0));
        assert_eq!(translate(&table, 0xcff0, 0x11), None);
        assert_eq!(translate(&table, 0x9fff, 1), None);
        assert_eq!(translate(&table, 0xa000, 0), None);
        assert_eq!(translate(&table, u64::MAX, 2), None);
    }

    #[test]
    fn a_ring_has_no_place_before_its_size_is_known() {
        let table = [region(0, 0x10000, 0)];
        let mut ring = RingState::<()> {
            user: Some(UserRing {
                desc_table: 0,
                avail_ring: 0x1000,
                used_ring: 0x2000,
            }),
            ..RingState::default()
        };
        assert_eq!(ring.place(&table), None);
        ring.size = 8;
        assert!(ring.place(&table).is_some());
        // The used ring of 0x4000 descriptors would end behind the region.
        ring.size = 0x4000;
        assert_eq!(ring.place(&table), None);
    }
}
