//! Which completions are the loop's own: by their `user_data`.

/// Top bit of `user_data`: ours. The bit below is spare.
pub(super) const OWN: u64 = 1 << 63;
/// What a handler's `user_data` must not have.
pub(super) const RESERVED: u64 = 3 << 62;
/// What is left of ours to tell what it is.
pub(super) const KIND: u64 = 0xff;
/// The poll on the doorbell.
pub(super) const DOORBELL: u64 = 1;
/// The poll on a ring's kick eventfd.
pub(super) const KICK: u64 = 2;
/// The end of a poll.
pub(super) const CANCEL: u64 = 3;
/// Where a kick's `user_data` has its ring; above the generation. 256 queues fit.
const SLOT_SHIFT: u32 = 40;
const SLOT_MASK: u64 = 0xffff;

/// The `user_data` of the poll on a ring's kick eventfd.
pub(super) fn of_kick(generation: u32, slot: usize) -> u64 {
    OWN | KICK | u64::from(generation) << 8 | (slot as u64) << SLOT_SHIFT
}

/// Which ring such a `user_data` is of.
pub(super) fn slot_of(user_data: u64) -> usize {
    (user_data >> SLOT_SHIFT & SLOT_MASK) as usize
}
