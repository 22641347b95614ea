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
//! three quarters of the budget. So does what a restart has to load to replay the log, which holds
//! what was changed before a checkpoint began and since, until its superblock is durable. If
//! all of the map fits there is no limit.
//!
//! # Why a page's slot is not reused while it is being read
//! Its slot is given up by the checkpoint that replaces it, which only happens to dirty pages. A page
//! gets dirty when a write below it is committed; writes need their leaf to be here; it is not here
//! while it is being read, and its ancestors are pinned meanwhile. [`MapTree::insert`] compares
//! the parent's entry again all the same and drops what does not fit.

use std::cell::Cell;
use std::collections::{HashMap, HashSet};

use super::entry::Entry;
use super::geometry::{BLOCK_LEN, FANOUT, MAP_LEVELS};
use super::mutant::{self, Mutant};
use super::page::{Page, PagePlace, TreeKind};

mod change;
mod list;
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

    /// From here on it may hold `budget` bytes of pages, if that is more than it may now.
    pub fn allow(&mut self, budget: u64) {
        let pages = usize::try_from(budget / PAGE_COST).unwrap_or(usize::MAX);
        self.budget = self.budget.max(pages);
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
