//! The map in memory: as many pages of it as a budget allows.
//!
//! Which block is where takes 32 bytes a block: 8 GiB for a full 1 TiB volume. So pages are read
//! when they are needed and forgotten when they have not been for a while. This module is the
//! memory only; who reads pages is told what is missing by a [`Want`] and brings it with
//! [`MapTree::insert`].
//!
//! # What may be forgotten
//! A page is *pinned*, and stays, while one of these holds:
//!
//! | | why |
//! |---|---|
//! | it is *dirty* | what it says is nowhere else but in the log |
//! | it is being *written* by a checkpoint | its place does not hold it yet |
//! | it is *touched* | a write below it was admitted since the last checkpoint began: the commit will need the old entry, the checkpoint the parent |
//! | a page below it is here, or being read | so that the way from a page to the root never has a gap, and no page can be replaced while it is being read |
//! | its level is 2 or higher | a 128th of a 128th of the leaves: not worth a second read on a miss |
//!
//! All others wait in one list, a hit only sets a mark, and the oldest without a mark goes first
//! (second chance). That is O(1) for a hit and, on average, for a miss, and allocates nothing: the
//! page that comes takes the memory of the one that goes. An exact LRU would move list nodes for
//! each hit under the lock that all queues share; a list for each frequency (ARC, 2Q) keeps
//! scans out, but costs history entries that the budget would have to hold too.
//!
//! # How much is pinned
//! [`MapTree::touch_limit`] bounds the touched pages to three eighths of the budget. A checkpoint
//! writes what was touched before it began, so touched and written pages together stay below
//! three quarters of the budget, and what a restart has to load to replay the log below three
//! eighths. If all of the map fits there is no limit.
//!
//! # Why a page's slot is not reused while it is being read
//! Its slot is given up by the checkpoint that replaces it, which only happens to dirty pages. A page
//! gets dirty when a write below it is committed; writes need their leaf to be here; it is not here
//! while it is being read, and its ancestors are pinned meanwhile. [`MapTree::insert`] compares
//! the parent's entry again all the same and drops what does not fit.

use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::ops::Range;

use super::entry::Entry;
use super::geometry::{BLOCK_LEN, FANOUT, MAP_LEVELS};
use super::mutant::{self, Mutant};
use super::page::{Page, PagePlace, TreeKind};

mod load;
mod walk;

#[cfg(test)]
mod tests;

pub(super) use self::load::leaves_below;
pub use self::load::{LostLeaf, load_leaves, open_upper};
pub use self::walk::{Visit, each_leaf};

/// Bytes that a page takes in memory, its bookkeeping included.
pub const PAGE_COST: u64 = BLOCK_LEN as u64 + 128;
/// Lowest level whose pages always stay.
const RESIDENT_LEVEL: usize = 2;
const TOP: usize = MAP_LEVELS - 1;
const NONE: u32 = u32::MAX;

type FastMap<V> = HashMap<u64, V, foldhash::fast::RandomState>;
type FastSet = HashSet<u64, foldhash::fast::RandomState>;

/// A page that has to be read before a question can be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Want {
    /// Where in the tree it belongs.
    pub place: PagePlace,
    /// Where it is stored and what it authenticates as.
    pub entry: Entry,
}

impl Want {
    /// Names the page.
    pub fn key(&self) -> u64 {
        key(self.place.level, self.place.index)
    }
}

/// Why a block's entry is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// This page has to be read first.
    Page(Want),
    /// Changes of the leaf were lost, as it could not be read when the log was replayed: what is
    /// stored of it is not what it was.
    Lost,
}

/// A leaf that is known.
#[derive(Clone, Copy, Debug)]
pub enum Leaf<'m> {
    /// Its page.
    Page(&'m Page),
    /// All holes.
    Hole,
}

impl Leaf<'_> {
    /// The entry of `block`, which must be in the leaf.
    pub fn entry(&self, block: u64) -> Entry {
        match self {
            Self::Page(page) => page.entry(block),
            Self::Hole => Entry::HOLE,
        }
    }
}

/// A page in memory. See the module for what pins it.
struct Frame {
    key: u64,
    page: Page,
    /// Reasons to stay.
    pins: u32,
    is_dirty: bool,
    is_written: bool,
    is_touched: bool,
    /// Used since the list was last looked through.
    is_marked: Cell<bool>,
    before: u32,
    behind: u32,
}

/// What a cache counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheCounts {
    /// Leaves that were asked for and here, or known to be all holes.
    pub hits: u64,
    /// Pages that had to be read.
    pub misses: u64,
    /// Pages that were forgotten.
    pub evictions: u64,
}

/// See the module.
pub struct MapTree {
    root: Entry,
    frames: Vec<Frame>,
    /// Frames without a page.
    vacant: Vec<u32>,
    index: FastMap<u32>,
    /// Ends of the list of pages that may go: newest, oldest.
    newest: u32,
    oldest: u32,
    budget: usize,
    dirty: [Vec<u64>; MAP_LEVELS],
    written: Vec<u64>,
    touched_leaves: FastSet,
    touched_parents: FastSet,
    /// Touched leaves that are stored nowhere yet.
    fresh_leaves: FastSet,
    lost: FastSet,
    hits: Cell<u64>,
    misses: u64,
    evictions: u64,
}

const fn key(level: usize, index: u64) -> u64 {
    (level as u64) << 56 | index
}

const fn level_of(key: u64) -> usize {
    (key >> 56) as usize
}

const fn index_of(key: u64) -> u64 {
    key & ((1 << 56) - 1)
}

const fn parent_of(key: u64) -> u64 {
    self::key(level_of(key) + 1, index_of(key) / FANOUT)
}

/// Pages of the map of a volume of `blocks` blocks, if all of it is written.
pub fn pages_of(blocks: u64) -> u64 {
    let mut pages = 0;
    let mut level = blocks.div_ceil(FANOUT);
    for _ in 0..MAP_LEVELS {
        pages += level;
        level = level.div_ceil(FANOUT);
    }
    pages
}

/// The smallest budget in bytes that a volume of `blocks` blocks can be served with: its upper
/// levels and 4 MiB.
pub fn smallest_budget(blocks: u64) -> u64 {
    let leaves = blocks.div_ceil(FANOUT);
    let resident = pages_of(leaves.div_ceil(FANOUT)) + 2;
    (resident * PAGE_COST + (4 << 20)).next_multiple_of(1 << 20)
}

/// The budget in bytes that a volume of `blocks` blocks gets unless told otherwise: all of its
/// map, but at least 16 and at most 256 MiB (or what it needs at least).
pub fn default_budget(blocks: u64) -> u64 {
    (pages_of(blocks) * PAGE_COST)
        .next_multiple_of(1 << 20)
        .clamp(16 << 20, 256 << 20)
        .max(smallest_budget(blocks))
}

impl MapTree {
    /// A map of which nothing is read yet. `budget` is in bytes.
    pub fn new(root: Entry, budget: u64) -> Self {
        Self {
            root,
            frames: Vec::new(),
            vacant: Vec::new(),
            index: FastMap::default(),
            newest: NONE,
            oldest: NONE,
            budget: usize::try_from(budget / PAGE_COST).unwrap_or(usize::MAX),
            dirty: Default::default(),
            written: Vec::new(),
            touched_leaves: FastSet::default(),
            touched_parents: FastSet::default(),
            fresh_leaves: FastSet::default(),
            lost: FastSet::default(),
            hits: Cell::new(0),
            misses: 0,
            evictions: 0,
        }
    }

    /// What it counted so far.
    pub fn counts(&self) -> CacheCounts {
        CacheCounts {
            hits: self.hits.get(),
            misses: self.misses,
            evictions: self.evictions,
        }
    }

    /// Pages in memory.
    pub fn resident(&self) -> usize {
        self.index.len()
    }

    /// Pages that it may hold.
    pub fn budget(&self) -> usize {
        self.budget
    }

    /// Whether another page can come without one going.
    pub fn has_room(&self) -> bool {
        self.index.len() < self.budget
    }

    fn frame(&self, key: u64) -> Option<&Frame> {
        let at = *self.index.get(&key)?;
        self.frames.get(at as usize)
    }

    /// What the page `key` is stored as, according to its parent. `Err`: read that one first.
    fn entry_of(&self, key: u64) -> Result<Entry, Want> {
        if level_of(key) == TOP {
            return Ok(self.root);
        }
        let above = parent_of(key);
        if let Some(frame) = self.frame(above) {
            frame.is_marked.set(true);
            return Ok(frame.page.entry(index_of(key)));
        }
        let entry = self.entry_of(above)?;
        if entry.is_hole() {
            return Ok(Entry::HOLE);
        }
        Err(Want {
            place: place(above),
            entry,
        })
    }

    /// Leaf `leaf`, if that can be said without reading.
    ///
    /// # Errors
    /// What is missing.
    pub fn leaf(&self, leaf: u64) -> Result<Leaf<'_>, Missing> {
        if let Some(frame) = self.frame(key(0, leaf)) {
            frame.is_marked.set(true);
            return Ok(Leaf::Page(&frame.page));
        }
        if !self.lost.is_empty() && self.lost.contains(&leaf) {
            return Err(Missing::Lost);
        }
        if mutant::is(Mutant::MissIsHole) {
            return Ok(Leaf::Hole);
        }
        let entry = self.entry_of(key(0, leaf)).map_err(Missing::Page)?;
        if entry.is_hole() {
            return Ok(Leaf::Hole);
        }
        let place = place(key(0, leaf));
        Err(Missing::Page(Want { place, entry }))
    }

    /// As [`MapTree::leaf`], counted.
    ///
    /// # Errors
    /// What is missing.
    pub fn ask(&self, leaf: u64) -> Result<Leaf<'_>, Missing> {
        let found = self.leaf(leaf)?;
        self.hits.set(self.hits.get() + 1);
        Ok(found)
    }

    /// A page is about to be read: what it hangs from stays until [`MapTree::end_read`].
    pub fn begin_read(&mut self, want: &Want) {
        self.misses += 1;
        self.pin(parent_of(want.key()));
    }

    /// A read that was begun is over, after its page was inserted, if it was.
    pub fn end_read(&mut self, want: &Want) {
        // Nothing goes for it now: it might be the page that was just read, before it was used.
        self.unpin(parent_of(want.key()));
    }

    /// Takes a page that was read and authenticated. What its parent says now counts: a page that
    /// is not that one any more, or has come meanwhile, is dropped.
    pub fn insert(&mut self, want: &Want, bytes: &[u8]) {
        let key = want.key();
        let is_current = self.entry_of(key) == Ok(want.entry);
        if !is_current || self.index.contains_key(&key) || bytes.len() != BLOCK_LEN {
            return;
        }
        let at = self.add(key);
        if let Some(frame) = self.frames.get_mut(at as usize) {
            frame.page.0.copy_from_slice(bytes);
        }
    }

    /// A page of undefined contents for `key`, which has none, in the memory of one that goes if
    /// there is no room.
    fn add(&mut self, key: u64) -> u32 {
        let level = level_of(key);
        // Before making room, or the parent may be what goes.
        self.pin(parent_of(key));
        while self.index.len() >= self.budget && self.evict() {}
        let is_touched = match level {
            0 => self.touched_leaves.contains(&index_of(key)),
            1 => self.touched_parents.contains(&index_of(key)),
            _ => false,
        };
        let pins = u32::from(is_touched) + u32::from(level >= RESIDENT_LEVEL);
        let vacant = self.vacant.pop();
        let at = vacant.unwrap_or(self.frames.len() as u32);
        match self.frames.get_mut(at as usize) {
            Some(frame) => {
                frame.key = key;
                frame.pins = pins;
                frame.is_dirty = false;
                frame.is_written = false;
                frame.is_touched = is_touched;
                frame.is_marked.set(true);
            }
            None => self.frames.push(Frame {
                key,
                page: Page::empty(),
                pins,
                is_dirty: false,
                is_written: false,
                is_touched,
                is_marked: Cell::new(true),
                before: NONE,
                behind: NONE,
            }),
        }
        self.index.insert(key, at);
        if pins == 0 {
            self.link(at);
        }
        at
    }

    /// Forgets a page. It has no pins, or is known to be needed no more.
    fn remove(&mut self, key: u64) {
        let Some(at) = self.index.remove(&key) else {
            return;
        };
        if self.frames.get(at as usize).is_some_and(|f| f.pins == 0) {
            self.unlink(at);
        }
        self.vacant.push(at);
        self.unpin(parent_of(key));
    }

    /// Forgets the page that was not used for the longest time. Whether there was one to forget.
    fn evict(&mut self) -> bool {
        // Each step takes a mark away, so this ends after two rounds.
        while self.oldest != NONE {
            let at = self.oldest;
            let Some(frame) = self.frames.get(at as usize) else {
                return false;
            };
            if frame.is_marked.replace(false) {
                self.unlink(at);
                self.link(at);
                continue;
            }
            let key = frame.key;
            self.evictions += 1;
            self.remove(key);
            return true;
        }
        false
    }

    /// Comes back to the budget after more was pinned than it allows.
    fn shrink(&mut self) {
        self.trim();
        while self.index.len() > self.budget && self.evict() {
            self.trim();
        }
    }

    /// A frame without a page still has the memory of one.
    fn trim(&mut self) {
        while self.frames.len() > self.budget
            && let Some(at) = self.vacant.pop()
        {
            self.drop_frame(at);
        }
    }

    /// Gives a vacant frame's memory back: the last frame takes its place.
    fn drop_frame(&mut self, at: u32) {
        let last = (self.frames.len() - 1) as u32;
        if at != last {
            if let Some(place) = self.vacant.iter_mut().find(|vacant| **vacant == last) {
                *place = at;
            } else {
                let is_linked = self.frames[last as usize].pins == 0;
                let Frame {
                    key,
                    before,
                    behind,
                    ..
                } = self.frames[last as usize];
                self.index.insert(key, at);
                if is_linked {
                    self.set_behind(before, at);
                    self.set_before(behind, at);
                }
            }
        }
        self.frames.swap_remove(at as usize);
    }

    fn set_behind(&mut self, at: u32, behind: u32) {
        match self.frames.get_mut(at as usize) {
            Some(frame) => frame.behind = behind,
            None => self.newest = behind,
        }
    }

    fn set_before(&mut self, at: u32, before: u32) {
        match self.frames.get_mut(at as usize) {
            Some(frame) => frame.before = before,
            None => self.oldest = before,
        }
    }

    /// Puts a frame to the newest end of the list.
    fn link(&mut self, at: u32) {
        let behind = self.newest;
        if let Some(frame) = self.frames.get_mut(at as usize) {
            (frame.before, frame.behind) = (NONE, behind);
        }
        self.newest = at;
        self.set_before(behind, at);
    }

    fn unlink(&mut self, at: u32) {
        let Some(Frame { before, behind, .. }) = self.frames.get(at as usize) else {
            return;
        };
        let (before, behind) = (*before, *behind);
        self.set_behind(before, behind);
        self.set_before(behind, before);
    }

    fn pin(&mut self, key: u64) {
        if let Some(at) = self.index.get(&key).copied()
            && let Some(frame) = self.frames.get_mut(at as usize)
        {
            frame.pins += 1;
            if frame.pins == 1 {
                self.unlink(at);
            }
        }
    }

    fn unpin(&mut self, key: u64) {
        if let Some(at) = self.index.get(&key).copied()
            && let Some(frame) = self.frames.get_mut(at as usize)
        {
            debug_assert!(frame.pins > 0, "a pin is given back twice");
            frame.pins -= 1;
            if frame.pins == 0 {
                self.link(at);
            }
        }
    }

    /// Pins what a change of `leaf` will need until [`MapTree::retouch`]. The leaf must be known
    /// (see [`MapTree::leaf`]).
    pub fn touch(&mut self, leaf: u64) {
        if self.touched_leaves.insert(leaf) {
            self.set_touched(key(0, leaf));
            if self.is_unstored(leaf) {
                self.fresh_leaves.insert(leaf);
            }
            if self.touched_parents.insert(leaf / FANOUT) {
                self.set_touched(key(1, leaf / FANOUT));
            }
        }
    }

    fn is_unstored(&self, leaf: u64) -> bool {
        let entry = self.entry_of(key(0, leaf));
        entry.is_ok_and(|entry| entry.is_hole())
    }

    fn set_touched(&mut self, key: u64) {
        if mutant::is(Mutant::TouchWithoutPin) {
            return;
        }
        let at = self.index.get(&key).copied();
        let frame = at.and_then(|at| self.frames.get_mut(at as usize));
        if let Some(frame) = frame
            && !std::mem::replace(&mut frame.is_touched, true)
        {
            self.pin(key);
        }
    }

    /// From here on only `leaves` are touched.
    pub fn retouch(&mut self, leaves: impl Iterator<Item = u64>) {
        let old_leaves = std::mem::take(&mut self.touched_leaves);
        let old_parents = std::mem::take(&mut self.touched_parents);
        self.fresh_leaves.clear();
        leaves.for_each(|leaf| self.touch(leaf));
        let leaves = old_leaves
            .iter()
            .filter(|leaf| !self.touched_leaves.contains(leaf));
        let parents = old_parents
            .iter()
            .filter(|parent| !self.touched_parents.contains(parent));
        let gone: Vec<u64> = leaves
            .map(|leaf| key(0, *leaf))
            .chain(parents.map(|parent| key(1, *parent)))
            .collect();
        for key in gone {
            let at = self.index.get(&key).copied();
            let frame = at.and_then(|at| self.frames.get_mut(at as usize));
            if let Some(frame) = frame
                && std::mem::take(&mut frame.is_touched)
            {
                self.unpin(key);
            }
        }
    }

    /// Leaves that are touched.
    pub fn touched_leaves(&self) -> usize {
        self.touched_leaves.len()
    }

    /// Leaves that are touched and that no snapshot has given a place yet.
    pub fn fresh_leaves(&self) -> usize {
        self.fresh_leaves.len()
    }

    /// Pages that are pinned since writes were admitted below them.
    pub fn touched_pages(&self) -> usize {
        self.touched_leaves.len() + self.touched_parents.len()
    }

    /// Pages that would be touched besides if `leaves` were.
    pub fn untouched(&self, leaves: Range<u64>) -> usize {
        let parents = leaves.start / FANOUT..leaves.end.div_ceil(FANOUT);
        leaves
            .filter(|leaf| !self.touched_leaves.contains(leaf))
            .count()
            + parents
                .filter(|parent| !self.touched_parents.contains(parent))
                .count()
    }

    /// Pages that may be touched in a volume of `blocks` blocks. See the module.
    pub fn touch_limit(&self, blocks: u64) -> usize {
        if pages_of(blocks) <= self.budget as u64 {
            return usize::MAX;
        }
        (self.budget / 8 * 3).max(8)
    }

    /// Leaf `leaf`, to be changed. It must be known (see [`MapTree::leaf`]).
    pub fn leaf_mut(&mut self, leaf: u64) -> &mut Page {
        let at = self.ensure(key(0, leaf));
        self.set_dirty(at);
        &mut self.frames[at as usize].page
    }

    /// The frame of a page that is here or has nothing stored, with all above it.
    fn ensure(&mut self, key: u64) -> u32 {
        if let Some(at) = self.index.get(&key) {
            return *at;
        }
        if level_of(key) < TOP {
            self.ensure(parent_of(key));
        }
        debug_assert!(
            self.entry_of(key).is_ok_and(|entry| entry.is_hole()),
            "a page that was not read is changed"
        );
        let at = self.add(key);
        self.frames[at as usize].page.0.fill(0);
        at
    }

    fn set_dirty(&mut self, at: u32) {
        let Some(frame) = self.frames.get_mut(at as usize) else {
            return;
        };
        if std::mem::replace(&mut frame.is_dirty, true) {
            return;
        }
        let key = frame.key;
        if let Some(level) = self.dirty.get_mut(level_of(key)) {
            level.push(key);
        }
        if !mutant::is(Mutant::EvictDirty) {
            self.pin(key);
        }
    }

    /// Leaves changed since the last snapshot.
    pub fn dirty_leaves(&self) -> usize {
        self.dirty[0].len()
    }

    /// Pages that may not go since what they say is not stored yet.
    pub fn unwritten(&self) -> usize {
        self.dirty.iter().map(Vec::len).sum::<usize>() + self.written.len()
    }

    /// Gives each dirty page a new place with `place` (which seals and writes it), from the
    /// leaves up, and returns the new root. `replaced` gets the entries that are replaced. The
    /// pages stay until [`MapTree::written`].
    pub fn snapshot(
        &mut self,
        place_page: &mut dyn FnMut(PagePlace, &Page) -> Entry,
        replaced: &mut Vec<Entry>,
    ) -> Entry {
        for level in 0..=TOP {
            let mut dirty = std::mem::take(&mut self.dirty[level]);
            dirty.sort_unstable();
            for key in dirty.drain(..) {
                let entry = self.place_one(key, place_page);
                let old = if level == TOP {
                    std::mem::replace(&mut self.root, entry)
                } else {
                    let above = self.ensure(parent_of(key));
                    self.set_dirty(above);
                    let page = &mut self.frames[above as usize].page;
                    let old = page.entry(index_of(key));
                    page.set_entry(index_of(key), entry);
                    old
                };
                if !old.is_hole() {
                    replaced.push(old);
                }
                if entry.is_hole() {
                    self.forget_empty(key);
                }
            }
            // Its memory is for the next time.
            self.dirty[level] = dirty;
        }
        let mut fresh = std::mem::take(&mut self.fresh_leaves);
        fresh.retain(|leaf| self.is_unstored(*leaf));
        self.fresh_leaves = fresh;
        self.root
    }

    fn place_one(
        &mut self,
        key: u64,
        place_page: &mut dyn FnMut(PagePlace, &Page) -> Entry,
    ) -> Entry {
        let Some(at) = self.index.get(&key).copied() else {
            return Entry::HOLE;
        };
        let Some(frame) = self.frames.get_mut(at as usize) else {
            return Entry::HOLE;
        };
        frame.is_dirty = false;
        if frame.page.is_empty() {
            return Entry::HOLE;
        }
        let entry = place_page(place(key), &frame.page);
        debug_assert!(!frame.is_written, "one checkpoint at a time");
        if mutant::is(Mutant::EvictUnwritten) || mutant::is(Mutant::EvictDirty) {
            if !mutant::is(Mutant::EvictDirty) {
                self.unpin(key);
            }
        } else {
            // The pin of what was dirty becomes that of what is being written.
            frame.is_written = true;
            self.written.push(key);
        }
        entry
    }

    /// A page without entries is not stored, and need not be here: its parent says so.
    fn forget_empty(&mut self, key: u64) {
        if !mutant::is(Mutant::EvictDirty) {
            self.unpin(key);
        }
        let Some(frame) = self.frame(key) else { return };
        let own = u32::from(frame.is_touched) + u32::from(level_of(key) >= RESIDENT_LEVEL);
        // Else something below it is here or coming.
        if frame.pins == own && !frame.is_written {
            self.remove(key);
        }
    }

    /// What the last snapshot gave is stored.
    pub fn written(&mut self) {
        for key in std::mem::take(&mut self.written) {
            let at = self.index.get(&key).copied();
            let frame = at.and_then(|at| self.frames.get_mut(at as usize));
            if let Some(frame) = frame
                && std::mem::take(&mut frame.is_written)
            {
                self.unpin(key);
            }
        }
        self.shrink();
    }

    /// What leaf `leaf` holds from now on is not known: changes of it were lost. Whether that is
    /// news.
    pub fn lose(&mut self, leaf: u64) -> bool {
        self.lost.insert(leaf)
    }

    /// What is stored of the leaves below `at` is what they hold, changes that were lost or not.
    pub(super) fn find(&mut self, at: &PagePlace) {
        let leaves = leaves_below(at);
        self.lost.retain(|leaf| !leaves.contains(leaf));
    }

    /// Gives up the page at `at`, which cannot be had, and all below it: holes from the next
    /// snapshot on. Whether it did: not if the page has come, or what is above it is not here.
    ///
    /// An empty page takes its place, with one empty leaf below it: so the snapshot drops it as it
    /// does every emptied page, and a checkpoint counts the pages above it.
    pub(super) fn blank(&mut self, at: PagePlace) -> bool {
        let own = key(at.level, at.index);
        match self.index.get(&own).copied() {
            Some(_) if at.level > 0 => return false,
            Some(here) => self.frames[here as usize].page.0.fill(0),
            None if at.level < TOP && !self.index.contains_key(&parent_of(own)) => return false,
            None => {
                let blank = self.add(own);
                self.frames[blank as usize].page.0.fill(0);
            }
        }
        let leaf = self.ensure(key(0, leaves_below(&at).start));
        self.set_dirty(leaf);
        true
    }

    /// The entry of the tree's root.
    pub fn root(&self) -> Entry {
        self.root
    }

    /// The page at `place`, if it is here.
    pub(super) fn page(&self, place: PagePlace) -> Option<&Page> {
        self.frame(key(place.level, place.index))
            .map(|frame| &frame.page)
    }

    /// What the page at `place` is stored as, if what is above it is here.
    pub fn stored_as(&self, place: PagePlace) -> Option<Entry> {
        self.entry_of(key(place.level, place.index)).ok()
    }

    /// Entries of all pages that those in memory name.
    pub fn page_entries(&self) -> impl Iterator<Item = Entry> {
        let above = self.index.iter().filter(|(key, _)| level_of(**key) > 0);
        let frames = above.filter_map(|(_, at)| self.frames.get(*at as usize));
        frames
            .flat_map(|frame| (0..FANOUT).map(|field| frame.page.entry(field)))
            .chain([self.root])
            .filter(|entry| !entry.is_hole())
    }
}

const fn place(key: u64) -> PagePlace {
    PagePlace {
        tree: TreeKind::Map,
        level: level_of(key),
        index: index_of(key),
    }
}
