//! Which slots are free, in memory.
//!
//! A slot is handed out as part of a [`Run`] of consecutive ones, whole free chunks first, so
//! that what is written together lies together: first those that take room in the backing
//! already, then ones that take none yet, as long as the volume takes no more than what it holds, a
//! quarter and [16 MiB](SLACK_CHUNKS); then the longest hole of the emptiest chunk; then the
//! other chunks.
//!
//! Slots that are given up pass through *limbo*: a read that looked its entry up earlier may still
//! be under way to them. Each read notes the epoch it began in; a slot leaves limbo when every read
//! of its epoch or before has ended.
//!
//! Map pages take their slots from chunks of their own, so that the space tree has to say
//! nothing about pages: which slots hold pages is known from walking the trees.

use std::collections::{BTreeSet, HashSet, VecDeque};

use super::geometry::{CHUNK_SLOTS, Geometry, Slot};
use super::mutant::{self, Mutant};

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
    /// Something was written there and not given back since: it takes room in the backing.
    is_backed: bool,
}

/// Chunks that a volume may take in the backing beyond what it holds and a quarter.
const SLACK_CHUNKS: u64 = 16;

/// Chunks that are emptied in one walk over the map.
const VICTIMS_MAX: usize = 1 << 16;
/// Ranks of chunks that are less than three quarters full.
const SPARSE_RANKS: usize = 7;

impl Chunk {
    fn is_free(&self) -> bool {
        self.used == 0
    }

    /// The longest stretch of free slots, counted from the chunk's start.
    fn longest_hole(&self) -> Run {
        if self.is_free() {
            return Run {
                start: 0,
                len: CHUNK_SLOTS,
            };
        }
        // After n steps the bits that are set are where stretches of more than n begin.
        let mut starts = self.bits.map(|word| !word);
        let mut hole = Run::default();
        while let Some(start) = first_bit(&starts) {
            hole.start = start;
            hole.len += 1;
            let [a, b, c, d] = starts;
            let rest = [a >> 1 | b << 63, b >> 1 | c << 63, c >> 1 | d << 63, d >> 1];
            let whole = self.bits.map(|word| !word);
            // `rest` has the starts of the last step's stretches, one place earlier.
            for ((start, rest), free) in starts.iter_mut().zip(rest).zip(whole) {
                *start = rest & free;
            }
        }
        hole
    }
}

fn first_bit(words: &[u64; 4]) -> Option<u64> {
    let (index, word) = (0..).zip(words).find(|(_, word)| **word != 0)?;
    Some(index * 64 + u64::from(word.trailing_zeros()))
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
    /// Backed chunks below that with a free slot, by how full they are: see [`rank`].
    ranks: [BTreeSet<usize>; RANKS],
    /// Chunks below that without backing, all free.
    bare: BTreeSet<usize>,
    /// Chunks with backing.
    backed: u64,
    /// Slots in use, set aside or in limbo.
    used: u64,
    /// Chunks to be emptied: where blocks are moved away from, and not to.
    victims: HashSet<usize, foldhash::fast::RandomState>,
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
            bare: BTreeSet::new(),
            backed: 0,
            used: 0,
            victims: HashSet::default(),
            pages: BTreeSet::new(),
            epoch: 0,
            reads: VecDeque::new(),
            limbo: VecDeque::new(),
        }
    }

    /// Slots that are used, and slots that there are.
    pub fn count(&self) -> (u64, u64) {
        let chunks = self.geometry.chunks - self.geometry.data_start();
        (self.used, chunks * CHUNK_SLOTS)
    }

    /// The backing has become longer.
    pub fn grow(&mut self, geometry: Geometry) {
        self.geometry = geometry;
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

    /// Chunks up to `index` are there. `is_known`: they were never used.
    fn touch(&mut self, index: usize, is_known: bool) {
        while self.chunks.len() <= index {
            let set = if is_known {
                &mut self.bare
            } else {
                self.backed += 1;
                &mut self.ranks[0]
            };
            set.insert(self.chunks.len());
            self.chunks.push(Chunk {
                is_backed: !is_known,
                ..Chunk::default()
            });
        }
    }

    /// The chunk behind the last that was ever used.
    pub fn end_of_use(&self) -> u64 {
        self.geometry.data_start() + self.chunks.len() as u64
    }

    fn set_count(&mut self, index: usize, used: u16) {
        let chunk = &mut self.chunks[index];
        let before = std::mem::replace(&mut chunk.used, used);
        self.used = self.used + u64::from(used) - u64::from(before);
        let was_backed = std::mem::replace(&mut chunk.is_backed, true);
        if was_backed && rank(before) == rank(used) {
            return;
        }
        if !was_backed {
            self.backed += 1;
            self.bare.remove(&index);
        } else if let Some(rank) = rank(before) {
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
        // What lies between may have room in the backing from an earlier life.
        self.touch(index, false);
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

    /// Takes a run: see the module on which one. `garbage`: slots in use that will be given up soon.
    pub fn take_run(&mut self, garbage: u64) -> Option<Run> {
        let chunk = self
            .free_chunk(self.used.saturating_sub(garbage))
            .or_else(|| self.ranks.iter().find_map(|set| set.first().copied()))
            .or_else(|| self.bare_chunk())?;
        Some(self.take_hole_of(chunk))
    }

    /// A chunk that is free, unless that would be a bare one more than `live` slots are worth.
    fn free_chunk(&mut self, live: u64) -> Option<usize> {
        if let Some(index) = self.ranks[0].first() {
            return Some(*index);
        }
        let worth = (live + live / 4).div_ceil(CHUNK_SLOTS) + SLACK_CHUNKS;
        (self.backed < worth).then(|| self.bare_chunk()).flatten()
    }

    fn bare_chunk(&mut self) -> Option<usize> {
        let fresh = self.chunks.len() as u64 + self.geometry.data_start() < self.geometry.chunks;
        if self.bare.is_empty() && fresh {
            self.touch(self.chunks.len(), true);
        }
        self.bare.first().copied()
    }

    /// Takes the longest hole of a chunk.
    fn take_hole_of(&mut self, index: usize) -> Run {
        let chunk = &mut self.chunks[index];
        let hole = chunk.longest_hole();
        for bit in hole.start..hole.start + hole.len {
            chunk.bits[(bit / 64) as usize] |= 1 << (bit % 64);
        }
        let used = chunk.used + hole.len as u16;
        self.set_count(index, used);
        let base = (self.geometry.data_start() + index as u64) * CHUNK_SLOTS;
        Run {
            start: base + hole.start,
            len: hole.len,
        }
    }

    /// Takes a whole free chunk within the volume's share, to move things together.
    pub fn take_whole(&mut self, garbage: u64) -> Option<Run> {
        let chunk = self.free_chunk(self.used.saturating_sub(garbage))?;
        Some(self.take_hole_of(chunk))
    }

    /// Takes a hole of one of the fullest chunks that are not to be emptied.
    pub fn take_hole(&mut self) -> Option<Run> {
        let (ranks, victims) = (&self.ranks[1..], &self.victims);
        let chunk = ranks.iter().rev().find_map(|chunks| {
            let mut others = chunks.iter().filter(|chunk| !victims.contains(chunk));
            others.next().copied()
        })?;
        Some(self.take_hole_of(chunk))
    }

    /// Chooses the emptiest chunks, as many as have room in the holes of the others; returns how
    /// many.
    pub fn choose_victims(&mut self) -> usize {
        self.victims.clear();
        let free = |index: usize| CHUNK_SLOTS - u64::from(self.chunks[index].used);
        let partial = || self.ranks[1..].iter().flatten().copied();
        let mut holes: u64 = partial().map(free).sum();
        for index in partial().take(VICTIMS_MAX) {
            let used = CHUNK_SLOTS - free(index);
            let rest = holes.saturating_sub(free(index));
            if used > rest {
                break;
            }
            holes = rest - used;
            self.victims.insert(index);
        }
        self.victims.len()
    }

    /// Chooses the chunks of which more than a quarter is free; returns how many.
    pub fn choose_sparse(&mut self) -> usize {
        let sparse = self.ranks[1..SPARSE_RANKS].iter().flatten().copied();
        self.victims = sparse.collect();
        if self.victims.len() == 1 {
            // It would only become another one.
            self.victims.clear();
        }
        self.victims.len()
    }

    /// No chunk is to be emptied any more.
    pub fn clear_victims(&mut self) {
        self.victims.clear();
    }

    /// Whether `slot` lies in a chunk to be emptied.
    pub fn is_victim(&self, slot: Slot) -> bool {
        !self.victims.is_empty()
            && self
                .place(slot)
                .is_some_and(|(index, ..)| self.victims.contains(&index))
    }

    /// Whole free chunks that [`Space::take_whole`] would give.
    pub fn free_chunks(&self) -> u64 {
        let all = self.geometry.chunks - self.geometry.data_start();
        let bare = all - self.chunks.len() as u64 + self.bare.len() as u64;
        let worth = (self.used + self.used / 4).div_ceil(CHUNK_SLOTS) + SLACK_CHUNKS;
        self.ranks[0].len() as u64 + bare.min(worth.saturating_sub(self.backed))
    }

    /// Chunks with backing, and slots in use.
    pub fn footprint(&self) -> (u64, u64) {
        (self.backed, self.used)
    }

    /// Takes the free chunks with backing but `keep`, to give their room back to the file system.
    pub fn take_backed(&mut self, keep: u64) -> Vec<Run> {
        let spare = self.ranks[0].len().saturating_sub(keep as usize);
        let chunks: Vec<usize> = self.ranks[0].iter().rev().take(spare).copied().collect();
        let mut runs: Vec<Run> = chunks
            .into_iter()
            .map(|chunk| self.take_hole_of(chunk))
            .collect();
        runs.reverse();
        runs
    }

    /// Chunks from [`Space::take_backed`] are free again; `is_bare`: without backing.
    pub fn return_chunks(&mut self, run: Run, is_bare: bool) {
        for slot in run.slots() {
            self.free_now(slot);
        }
        let first = (run.start / CHUNK_SLOTS - self.geometry.data_start()) as usize;
        for index in first..first + (run.len / CHUNK_SLOTS) as usize {
            if is_bare && self.ranks[0].remove(&index) {
                self.chunks[index].is_backed = false;
                self.backed -= 1;
                self.bare.insert(index);
            }
        }
    }

    /// Free slots that [`Space::take_run`] would hand out before the volume takes more than its
    /// share of the backing.
    pub fn room(&self, garbage: u64) -> u64 {
        let all = (self.geometry.chunks - self.geometry.data_start()) * CHUNK_SLOTS;
        let live = self.used.saturating_sub(garbage);
        let share = live + live / 4 + SLACK_CHUNKS * CHUNK_SLOTS;
        all.min(share).saturating_sub(self.used)
    }

    /// Gives back a slot that no entry ever named.
    pub fn free_now(&mut self, slot: Slot) {
        let Some((index, word, mask)) = self.place(slot) else {
            return;
        };
        let Some(chunk) = self.chunks.get_mut(index) else {
            return;
        };
        // Our own mistake in the crash tests. Elsewhere it may be the volume's: two blocks of an
        // authentic map in one slot, which no sound program wrote.
        debug_assert!(
            !cfg!(test) || chunk.bits[word] & mask != 0,
            "slot {slot:?} freed twice"
        );
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
        let oldest = match self.reads.front() {
            Some((epoch, _)) if !mutant::is(Mutant::SlotUnderRead) => *epoch,
            _ => u64::MAX,
        };
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
    /// One that was never possible, which a damaged page may have been said to be in, is not.
    pub fn give_page_slot(&mut self, slot: Slot) {
        if self.geometry.is_data_slot(slot) {
            self.pages.insert(slot.0);
        }
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
        let first = space.take_run(0).expect("a chunk");
        assert_eq!((first.start, first.len), (6 * 256, 256));
        let _second = space.take_run(0).expect("a chunk");
        let third = space.take_run(0).expect("a chunk");
        assert_eq!(space.take_run(0), None);
        for slot in [first.start + 3, first.start + 4, third.start] {
            space.free_now(Slot(slot));
        }
        assert_eq!(
            space.take_run(0),
            Some(Run {
                start: first.start + 3,
                len: 2
            })
        );
        assert_eq!(
            space.take_run(0),
            Some(Run {
                start: third.start,
                len: 1
            })
        );
        assert_eq!(space.take_run(0), None);
        for slot in first.slots() {
            space.free_now(slot);
        }
        assert_eq!(space.count(), (2 * 256, 3 * 256));
        assert_eq!(space.take_run(0), Some(first));
    }

    #[test]
    fn the_emptiest_chunk_and_its_longest_hole_come_first() {
        let mut space = space();
        let runs: Vec<Run> = std::iter::from_fn(|| space.take_run(0)).collect();
        let (full, empty) = (runs[0].start, runs[2].start);
        for slot in [full + 1, full + 2, full + 3, empty + 7].map(Slot) {
            space.free_now(slot);
        }
        for slot in empty + 100..empty + 180 {
            space.free_now(Slot(slot));
        }
        let run = |start, len| Some(Run { start, len });
        assert_eq!(space.take_run(0), run(empty + 100, 80));
        assert_eq!(space.take_run(0), run(full + 1, 3));
        assert_eq!(space.take_run(0), run(empty + 7, 1));
        assert_eq!(space.take_run(0), None);
    }

    #[test]
    fn a_thin_volume_takes_holes_before_it_takes_much_more_than_it_holds() {
        let mut space = Space::new(Geometry {
            blocks: 1 << 20,
            chunks: 4102,
            log_chunks: 4,
        });
        let held: Vec<Run> = (0..100).filter_map(|_| space.take_run(0)).collect();
        assert!(held.iter().all(|run| run.len == 256));
        for slot in held.iter().flat_map(|run| run.slots()).step_by(10) {
            space.free_now(slot);
        }
        // 90 chunks' worth is held: 113 and 16 may have backing. All of it is overwritten.
        let mut garbage = 0;
        let overwrite = |_| {
            let run = space.take_run(garbage)?;
            garbage += run.len;
            Some(run)
        };
        let more: Vec<Run> = (0..60).filter_map(overwrite).collect();
        let whole = more.iter().take_while(|run| run.len == 256).count();
        assert_eq!(whole, 29);
        assert!(more[whole..].iter().all(|run| run.len == 1));
        // Rather a bare chunk than none.
        while space.take_run(1 << 20).is_some_and(|run| run.len == 1) {}
        assert_eq!(space.take_run(1 << 20).map(|run| run.len), Some(256));
    }

    #[test]
    fn chunks_are_emptied_only_as_far_as_others_have_room() {
        let mut space = space();
        while space.take_run(0).is_some() {}
        let first = 6 * 256;
        for slot in (0..200).chain(300..340).chain(600..620) {
            space.free_now(Slot(first + slot));
        }
        // 56 blocks fit 40 + 20 holes; then 216 do not fit 4.
        assert_eq!(space.choose_victims(), 1);
        assert!(space.is_victim(Slot(first + 255)) && !space.is_victim(Slot(first + 256)));
        let holes: Vec<Run> = std::iter::from_fn(|| space.take_hole()).collect();
        assert_eq!(holes.iter().map(|run| run.len).sum::<u64>(), 60);
        assert!(holes.iter().all(|run| !space.is_victim(Slot(run.start))));
        assert_eq!(space.free_chunks(), 0);
        (200..256).for_each(|slot| space.free_now(Slot(first + slot)));
        assert_eq!(space.free_chunks(), 1);
        assert_eq!(space.take_whole(0).map(|run| run.start), Some(first));
    }

    #[test]
    fn chunks_given_back_have_no_backing_until_they_are_used_again() {
        let mut space = space();
        let runs: Vec<Run> = std::iter::from_fn(|| space.take_run(0)).collect();
        for slot in runs.iter().flat_map(|run| run.slots()) {
            space.free_now(slot);
        }
        assert_eq!(space.footprint(), (3, 0));
        let taken = space.take_backed(1);
        assert_eq!(taken.len(), 2);
        assert_eq!(taken[0].start + 256, taken[1].start);
        let both = Run {
            start: taken[0].start,
            len: 512,
        };
        space.return_chunks(both, true);
        assert_eq!(space.footprint(), (1, 0));
        assert_eq!(space.take_run(0), Some(runs[0]));
        assert_eq!(space.take_run(0), Some(runs[1]));
        assert_eq!(space.footprint(), (2, 512));
    }

    #[test]
    fn the_longest_hole_is_found_across_words() {
        let mut chunk = Chunk {
            bits: [u64::MAX; 4],
            used: 256,
            is_backed: true,
        };
        assert_eq!(chunk.longest_hole().len, 0);
        for (from, to) in [(0, 3), (60, 70), (120, 200), (255, 256)] {
            for bit in from..to {
                chunk.bits[bit / 64] &= !(1 << (bit % 64));
            }
            chunk.used -= (to - from) as u16;
        }
        let hole = Run {
            start: 120,
            len: 80,
        };
        assert_eq!(chunk.longest_hole(), hole);
    }

    #[test]
    fn a_slot_is_not_reused_while_a_read_may_be_under_way_to_it() {
        let mut space = space();
        while space.take_run(0).is_some() {}
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
        while space.take_run(0).is_some() {}
        let slot = Slot(6 * 256);
        space.retire(vec![slot], true);
        let late = space.begin_read();
        assert_eq!(space.release(), vec![slot]);
        assert!(space.is_used(slot), "until it is punched");
        space.end_read(late);
    }

    #[test]
    fn a_longer_backing_gives_more_chunks_where_there_were_none() {
        let mut space = space();
        while space.take_run(0).is_some() {}
        space.grow(Geometry {
            blocks: 512,
            chunks: 10,
            log_chunks: 4,
        });
        let run = space.take_run(0).expect("a new chunk");
        assert_eq!((run.start, run.len), (9 * 256, 256));
        assert_eq!(space.take_run(0), None);
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
