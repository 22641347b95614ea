//! Which slots are free, in memory.
//!
//! A slot is handed out as part of a [`Run`] of consecutive ones, whole free chunks first, so
//! that what is written together lies together. Slots that are given up pass through *limbo*: a
//! read that looked its entry up earlier may still be under way to them. Each read notes the
//! epoch it began in; a slot leaves limbo when every read of its epoch or before has ended.
//!
//! Map pages take their slots from chunks of their own, so that the space tree has to say
//! nothing about pages: which slots hold pages is known from walking the trees.

use std::collections::{BTreeSet, VecDeque};

use super::geometry::{CHUNK_SLOTS, Geometry, Slot};

/// Consecutive slots that belong to who took them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Run {
    /// First slot.
    pub start: u64,
    /// How many.
    pub len: u64,
}

impl Run {
    /// Splits off up to `count` slots from the front.
    pub fn take(&mut self, count: u64) -> Self {
        let len = count.min(self.len);
        let front = Self {
            start: self.start,
            len,
        };
        self.start += len;
        self.len -= len;
        front
    }

    /// Its slots.
    pub fn slots(self) -> impl Iterator<Item = Slot> {
        (self.start..self.start + self.len).map(Slot)
    }

    /// Groups slots into runs of consecutive ones.
    pub fn group(mut slots: Vec<Slot>) -> Vec<Self> {
        slots.sort_unstable();
        let mut runs: Vec<Self> = Vec::new();
        for slot in slots {
            match runs.last_mut() {
                Some(run) if run.start + run.len == slot.0 => run.len += 1,
                _ => runs.push(Self {
                    start: slot.0,
                    len: 1,
                }),
            }
        }
        runs
    }
}

#[derive(Clone, Copy, Default)]
struct Chunk {
    bits: [u64; 4],
    used: u16,
}

impl Chunk {
    /// The longest stretch of free slots, counted from the chunk's start.
    fn longest_hole(&self) -> Run {
        let (mut longest, mut current) = (Run::default(), Run::default());
        for bit in 0..CHUNK_SLOTS {
            if self.bits[(bit / 64) as usize] & (1 << (bit % 64)) != 0 {
                current = Run::default();
                continue;
            }
            if current.len == 0 {
                current.start = bit;
            }
            current.len += 1;
            if current.len > longest.len {
                longest = current;
            }
        }
        longest
    }
}

/// Ranks of chunks: none used, then eighths.
const RANKS: usize = 9;

/// How full a chunk is; `None`: nothing to take. Coarse, so that most slots come and go without
/// a change of rank.
fn rank(used: u16) -> Option<usize> {
    match u64::from(used) {
        0 => Some(0),
        CHUNK_SLOTS => None,
        used => Some(1 + (used * 8 / CHUNK_SLOTS) as usize),
    }
}

struct Limbo {
    epoch: u64,
    slots: Vec<Slot>,
    punch: bool,
}

/// The allocator.
pub struct Space {
    geometry: Geometry,
    /// Chunks from `data_start` up to the highest one ever used.
    chunks: Vec<Chunk>,
    /// Chunks below that with a free slot, by how full they are: see [`rank`].
    ranks: [BTreeSet<usize>; RANKS],
    /// Slots set aside for pages.
    pages: BTreeSet<u64>,
    epoch: u64,
    /// Reads under way by the epoch they began in.
    reads: VecDeque<(u64, u64)>,
    limbo: VecDeque<Limbo>,
}

impl Space {
    /// All free.
    pub fn new(geometry: Geometry) -> Self {
        Self {
            geometry,
            chunks: Vec::new(),
            ranks: Default::default(),
            pages: BTreeSet::new(),
            epoch: 0,
            reads: VecDeque::new(),
            limbo: VecDeque::new(),
        }
    }

    fn place(&self, slot: Slot) -> Option<(usize, usize, u64)> {
        if !self.geometry.is_data_slot(slot) {
            return None;
        }
        let bit = slot.0 % CHUNK_SLOTS;
        Some((
            (slot.chunk() - self.geometry.data_start()) as usize,
            (bit / 64) as usize,
            1 << (bit % 64),
        ))
    }

    fn touch(&mut self, index: usize) {
        while self.chunks.len() <= index {
            self.ranks[0].insert(self.chunks.len());
            self.chunks.push(Chunk::default());
        }
    }

    fn set_count(&mut self, index: usize, used: u16) {
        let before = std::mem::replace(&mut self.chunks[index].used, used);
        if rank(before) == rank(used) {
            return;
        }
        if let Some(rank) = rank(before) {
            self.ranks[rank].remove(&index);
        }
        if let Some(rank) = rank(used) {
            self.ranks[rank].insert(index);
        }
    }

    /// Marks a slot used while a volume is opened. Returns whether it was free and in range.
    pub fn mark(&mut self, slot: Slot) -> bool {
        let Some((index, word, mask)) = self.place(slot) else {
            return false;
        };
        self.touch(index);
        let chunk = &mut self.chunks[index];
        if chunk.bits[word] & mask != 0 {
            return false;
        }
        chunk.bits[word] |= mask;
        let used = chunk.used + 1;
        self.set_count(index, used);
        true
    }

    /// Whether a slot is used, set aside or in limbo.
    pub fn is_used(&self, slot: Slot) -> bool {
        self.place(slot).is_some_and(|(index, word, mask)| {
            self.chunks
                .get(index)
                .is_some_and(|chunk| chunk.bits[word] & mask != 0)
        })
    }

    /// Takes a run: a whole free chunk if there is one, else the longest hole of one of the
    /// emptiest, so that what is written together still lies together on a volume that is full.
    pub fn take_run(&mut self) -> Option<Run> {
        let fresh = self.chunks.len() as u64 + self.geometry.data_start() < self.geometry.chunks;
        if self.ranks[0].is_empty() && fresh {
            self.touch(self.chunks.len());
        }
        let index = self
            .ranks
            .iter()
            .find_map(|chunks| chunks.first().copied())?;
        let chunk = &mut self.chunks[index];
        let hole = chunk.longest_hole();
        for bit in hole.start..hole.start + hole.len {
            chunk.bits[(bit / 64) as usize] |= 1 << (bit % 64);
        }
        let used = chunk.used + hole.len as u16;
        self.set_count(index, used);
        let base = (self.geometry.data_start() + index as u64) * CHUNK_SLOTS;
        Some(Run {
            start: base + hole.start,
            len: hole.len,
        })
    }

    /// Gives back a slot that no entry ever named.
    pub fn free_now(&mut self, slot: Slot) {
        let Some((index, word, mask)) = self.place(slot) else {
            return;
        };
        let Some(chunk) = self.chunks.get_mut(index) else {
            return;
        };
        debug_assert!(chunk.bits[word] & mask != 0, "slot {slot:?} freed twice");
        if chunk.bits[word] & mask == 0 {
            return;
        }
        chunk.bits[word] &= !mask;
        let used = chunk.used - 1;
        self.set_count(index, used);
    }

    /// Gives up slots that reads may be under way to. `punch`: their backing is to be released
    /// before they are used again.
    pub fn retire(&mut self, slots: Vec<Slot>, punch: bool) {
        if !slots.is_empty() {
            self.limbo.push_back(Limbo {
                epoch: self.epoch,
                slots,
                punch,
            });
            self.epoch += 1;
        }
    }

    /// A read begins: what [`Space::end_read`] wants.
    pub fn begin_read(&mut self) -> u64 {
        match self.reads.back_mut() {
            Some((epoch, count)) if *epoch == self.epoch => *count += 1,
            _ => self.reads.push_back((self.epoch, 1)),
        }
        self.epoch
    }

    /// A read that began in `epoch` has ended.
    pub fn end_read(&mut self, epoch: u64) {
        if let Some((_, count)) = self.reads.iter_mut().find(|(began, _)| *began == epoch) {
            *count -= 1;
        }
        while self.reads.front().is_some_and(|(_, count)| *count == 0) {
            self.reads.pop_front();
        }
    }

    /// Frees what no read can be under way to. Slots to be punched first are returned: hand them
    /// to [`Space::free_now`] when that is done.
    pub fn release(&mut self) -> Vec<Slot> {
        let oldest = self.reads.front().map_or(u64::MAX, |(epoch, _)| *epoch);
        let mut punch = Vec::new();
        while self.limbo.front().is_some_and(|limbo| limbo.epoch < oldest) {
            let Some(limbo) = self.limbo.pop_front() else {
                break;
            };
            if limbo.punch {
                punch.extend(limbo.slots);
            } else {
                for slot in limbo.slots {
                    self.free_now(slot);
                }
            }
        }
        punch
    }

    /// Whether slots wait in limbo.
    pub fn has_limbo(&self) -> bool {
        !self.limbo.is_empty()
    }

    /// Sets a run aside for pages.
    pub fn add_page_slots(&mut self, run: Run) {
        self.pages.extend(run.slots().map(|slot| slot.0));
    }

    /// Slots set aside for pages.
    pub fn page_slots(&self) -> usize {
        self.pages.len()
    }

    /// A slot for a page.
    pub fn take_page_slot(&mut self) -> Option<Slot> {
        self.pages.pop_first().map(Slot)
    }

    /// A page's slot is free again, for pages.
    pub fn give_page_slot(&mut self, slot: Slot) {
        self.pages.insert(slot.0);
    }

    /// While a volume is opened: the free slots of the chunk of page `slot` are for pages.
    /// `is_data` tells the slots that hold data.
    pub fn adopt_page_chunk(&mut self, slot: Slot, is_data: &dyn Fn(Slot) -> bool) {
        let first = slot.chunk() * CHUNK_SLOTS;
        let slots = || (first..first + CHUNK_SLOTS).map(Slot);
        if slots().any(is_data) {
            return;
        }
        for slot in slots() {
            if self.mark(slot) {
                self.pages.insert(slot.0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> Space {
        Space::new(Geometry {
            blocks: 256,
            chunks: 9,
            log_chunks: 4,
        })
    }

    #[test]
    fn whole_chunks_come_first_then_holes() {
        let mut space = space();
        let first = space.take_run().expect("a chunk");
        assert_eq!((first.start, first.len), (6 * 256, 256));
        let _second = space.take_run().expect("a chunk");
        let third = space.take_run().expect("a chunk");
        assert_eq!(space.take_run(), None);
        for slot in [first.start + 3, first.start + 4, third.start] {
            space.free_now(Slot(slot));
        }
        assert_eq!(
            space.take_run(),
            Some(Run {
                start: first.start + 3,
                len: 2
            })
        );
        assert_eq!(
            space.take_run(),
            Some(Run {
                start: third.start,
                len: 1
            })
        );
        assert_eq!(space.take_run(), None);
        for slot in first.slots() {
            space.free_now(slot);
        }
        assert_eq!(space.take_run(), Some(first));
    }

    #[test]
    fn the_emptiest_chunk_and_its_longest_hole_come_first() {
        let mut space = space();
        let runs: Vec<Run> = std::iter::from_fn(|| space.take_run()).collect();
        let (full, empty) = (runs[0].start, runs[2].start);
        for slot in [full + 1, full + 2, full + 3, empty + 7].map(Slot) {
            space.free_now(slot);
        }
        for slot in empty + 100..empty + 180 {
            space.free_now(Slot(slot));
        }
        let run = |start, len| Some(Run { start, len });
        assert_eq!(space.take_run(), run(empty + 100, 80));
        assert_eq!(space.take_run(), run(full + 1, 3));
        assert_eq!(space.take_run(), run(empty + 7, 1));
        assert_eq!(space.take_run(), None);
    }

    #[test]
    fn a_slot_is_not_reused_while_a_read_may_be_under_way_to_it() {
        let mut space = space();
        while space.take_run().is_some() {}
        let slot = Slot(6 * 256 + 9);
        let early = space.begin_read();
        space.retire(vec![slot], false);
        let late = space.begin_read();
        assert!(space.release().is_empty() && space.is_used(slot));
        space.end_read(late);
        assert!(space.release().is_empty() && space.is_used(slot));
        space.end_read(early);
        assert!(space.release().is_empty() && !space.is_used(slot));
    }

    #[test]
    fn a_read_that_began_later_does_not_hold_a_slot() {
        let mut space = space();
        while space.take_run().is_some() {}
        let slot = Slot(6 * 256);
        space.retire(vec![slot], true);
        let late = space.begin_read();
        assert_eq!(space.release(), vec![slot]);
        assert!(space.is_used(slot), "until it is punched");
        space.end_read(late);
    }

    #[test]
    fn slots_of_a_stranger_are_refused() {
        let mut space = space();
        for slot in [0, 255, 256, 6 * 256 - 1, 9 * 256, u64::MAX / 4096] {
            assert!(!space.mark(Slot(slot)));
        }
        assert!(space.mark(Slot(6 * 256)) && !space.mark(Slot(6 * 256)));
    }
}
