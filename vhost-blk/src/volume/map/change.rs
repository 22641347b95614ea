//! Changes of the map in memory, and how they come to be stored: touched, dirty, written.

use std::ops::Range;

use crypto::aead::TAG_LEN;

use super::{
    FANOUT, MapTree, RESIDENT_LEVEL, TOP, index_of, key, leaves_below, level_of, pages_of,
    parent_of, place,
};
use crate::volume::entry::Entry;
use crate::volume::mutant::{self, Mutant};
use crate::volume::page::{Page, PagePlace};

/// The tag of a page that was given up. That a page authenticates with it is as likely as with any
/// other tag that is not its own.
const CONDEMNED: [u8; TAG_LEN] = [0xff; TAG_LEN];

impl MapTree {
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

    /// Leaf `leaf`, to be changed. `None`: what is stored of it is not here (see [`MapTree::leaf`]).
    /// A page that began empty instead would be written over it, with all its other blocks as holes.
    #[must_use]
    pub fn leaf_mut(&mut self, leaf: u64) -> Option<&mut Page> {
        let at = self.ensure(key(0, leaf))?;
        self.set_dirty(at);
        self.frames
            .get_mut(at as usize)
            .map(|frame| &mut frame.page)
    }

    /// The frame of a page that is here or has nothing stored, with all above it. `None`: it is
    /// stored and was not read.
    fn ensure(&mut self, key: u64) -> Option<u32> {
        if let Some(at) = self.index.get(&key) {
            return Some(*at);
        }
        if level_of(key) < TOP {
            self.ensure(parent_of(key))?;
        }
        if !self.entry_of(key).is_ok_and(|entry| entry.is_hole()) {
            return None;
        }
        let at = self.add(key);
        self.frames.get_mut(at as usize)?.page.0.fill(0);
        Some(at)
    }

    pub(super) fn set_dirty(&mut self, at: u32) {
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
    /// pages stay until [`MapTree::written`]. `None`: what is above a changed page is not here, which
    /// nothing may cause; nothing of this may be stored then.
    #[must_use]
    pub fn snapshot(
        &mut self,
        place_page: &mut dyn FnMut(PagePlace, &Page) -> Entry,
        replaced: &mut Vec<Entry>,
    ) -> Option<Entry> {
        for level in 0..=TOP {
            let mut dirty = std::mem::take(&mut self.dirty[level]);
            dirty.sort_unstable();
            for key in dirty.drain(..) {
                let entry = self.place_one(key, place_page);
                let old = if level == TOP {
                    std::mem::replace(&mut self.root, entry)
                } else {
                    let above = self.ensure(parent_of(key))?;
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
        Some(self.root)
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
    pub(in crate::volume) fn find(&mut self, at: &PagePlace) {
        let leaves = leaves_below(at);
        self.lost.retain(|leaf| !leaves.contains(leaf));
    }

    /// Gives up the page at `at`, which cannot be had, and all below it: holes from the next
    /// snapshot on. Whether it did: not if the page has come, or what is above it is not here.
    ///
    /// An empty page takes its place, with one empty leaf below it: so the snapshot drops it as it
    /// does every emptied page, and a checkpoint counts the pages above it.
    pub(in crate::volume) fn blank(&mut self, at: PagePlace) -> bool {
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
        match self.ensure(key(0, leaves_below(&at).start)) {
            Some(leaf) => self.set_dirty(leaf),
            None => return false,
        }
        true
    }

    /// Makes what was lost stay lost. Changes of these leaves were in the log, which the next
    /// checkpoint gives up; the pages that could not be had are still what their parents name. Were
    /// one of them put back afterwards, it would authenticate, and old blocks in it would read as if
    /// nothing had come after them. So their parents name them from here on with a tag that no page
    /// has. All else stays as it was: their slots are in use, their sessions count.
    ///
    /// To be called before the first checkpoint, while what is above them is still here.
    pub fn condemn(&mut self) {
        let lost: Vec<u64> = self.lost.iter().copied().collect();
        for leaf in lost {
            let key = match self.entry_of(key(0, leaf)) {
                Ok(_) => key(0, leaf),
                Err(want) => want.key(),
            };
            if level_of(key) == TOP {
                self.root.tag = CONDEMNED;
                continue;
            }
            let Some(above) = self.index.get(&parent_of(key)).copied() else {
                continue;
            };
            let Some(frame) = self.frames.get_mut(above as usize) else {
                continue;
            };
            let mut entry = frame.page.entry(index_of(key));
            if entry.is_hole() || entry.tag == CONDEMNED {
                continue;
            }
            entry.tag = CONDEMNED;
            frame.page.set_entry(index_of(key), entry);
            self.set_dirty(above);
        }
    }
}
