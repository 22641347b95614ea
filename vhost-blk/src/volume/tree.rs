//! A tree of [`Page`]s, held in memory: the map (block to entry) or the space tree (chunk to
//! bitmap).
//!
//! Pages change in memory at once and on disk at a checkpoint: [`Tree::snapshot`] gives every
//! dirty page a new place, from the leaves up, so that the root entry it returns names a
//! consistent tree. Nothing is overwritten: the pages that it replaces are freed by the caller
//! once the new root is durable.

use std::collections::HashMap;
use std::ops::Range;

use super::entry::Entry;
use super::geometry::{FANOUT, Slot};
use super::page::{Page, PagePlace, TreeKind};

struct Node {
    page: Page,
    is_dirty: bool,
}

/// A tree in memory.
pub struct Tree {
    kind: TreeKind,
    root: Entry,
    levels: Vec<HashMap<u64, Node, foldhash::fast::RandomState>>,
    dirty_leaves: usize,
    damaged: Vec<(PagePlace, Range<u64>)>,
}

/// Why a page could not be loaded.
#[derive(Debug)]
pub enum PageFault {
    /// It does not authenticate, or its entry names an impossible place: the tree goes on
    /// without what is below it.
    Damaged,
    /// The backing failed: nothing can be said of the page.
    Io(std::io::Error),
}

impl Tree {
    /// A tree of holes.
    pub fn empty(kind: TreeKind) -> Self {
        let levels = (0..kind.levels()).map(|_| HashMap::default()).collect();
        Self {
            kind,
            root: Entry::HOLE,
            levels,
            dirty_leaves: 0,
            damaged: Vec::new(),
        }
    }

    /// Loads all pages below `root`. `fetch` reads and authenticates one.
    ///
    /// # Errors
    /// The backing failed. A damaged page is not an error: it is kept in [`Tree::damaged`].
    pub fn load(
        kind: TreeKind,
        root: Entry,
        fetch: &mut dyn FnMut(PagePlace, &Entry) -> Result<Page, PageFault>,
    ) -> std::io::Result<Self> {
        let mut tree = Self::empty(kind);
        tree.root = root;
        let top = kind.levels() - 1;
        let mut wanted = if root.is_hole() {
            vec![]
        } else {
            vec![(0, root)]
        };
        for level in (0..=top).rev() {
            let mut below = Vec::new();
            for (index, entry) in wanted {
                let place = PagePlace {
                    tree: kind,
                    level,
                    index,
                };
                match fetch(place, &entry) {
                    Ok(page) => {
                        if level > 0 {
                            below.extend((0..FANOUT).filter_map(|field| {
                                let child = page.entry(field);
                                (!child.is_hole()).then_some((index * FANOUT + field, child))
                            }));
                        }
                        tree.levels[level].insert(
                            index,
                            Node {
                                page,
                                is_dirty: false,
                            },
                        );
                    }
                    Err(PageFault::Damaged) => {
                        let leaves = FANOUT.pow(level as u32);
                        tree.damaged
                            .push((place, index * leaves..(index + 1) * leaves));
                    }
                    Err(PageFault::Io(error)) => return Err(error),
                }
            }
            wanted = below;
        }
        Ok(tree)
    }

    /// Pages that did not authenticate, with the leaves that are lost with each.
    pub fn damaged(&self) -> &[(PagePlace, Range<u64>)] {
        &self.damaged
    }

    /// Whether the contents of leaf `index` are unknown.
    pub fn is_damaged(&self, index: u64) -> bool {
        !self.damaged.is_empty()
            && self
                .damaged
                .iter()
                .any(|(_, leaves)| leaves.contains(&index))
    }

    /// Leaf `index`, unless it is all holes.
    pub fn leaf(&self, index: u64) -> Option<&Page> {
        self.levels[0].get(&index).map(|node| &node.page)
    }

    /// Leaf `index`, to be changed.
    pub fn leaf_mut(&mut self, index: u64) -> &mut Page {
        let node = self.levels[0].entry(index).or_insert_with(|| Node {
            page: Page::empty(),
            is_dirty: false,
        });
        if !node.is_dirty {
            node.is_dirty = true;
            self.dirty_leaves += 1;
        }
        &mut node.page
    }

    /// What leaf `index` is stored as.
    pub fn leaf_entry(&self, index: u64) -> Entry {
        let parent = self.levels[1].get(&(index / FANOUT));
        parent.map_or(Entry::HOLE, |node| node.page.entry(index))
    }

    /// All leaves that are not all holes.
    pub fn leaves(&self) -> impl Iterator<Item = (u64, &Page)> {
        self.levels[0]
            .iter()
            .map(|(index, node)| (*index, &node.page))
    }

    /// Entries of all stored pages.
    pub fn page_entries(&self) -> impl Iterator<Item = Entry> {
        let below = self.levels[1..]
            .iter()
            .flat_map(|level| level.values())
            .flat_map(|node| (0..FANOUT).map(|field| node.page.entry(field)));
        below.chain([self.root]).filter(|entry| !entry.is_hole())
    }

    /// Leaves changed since the last snapshot.
    pub fn dirty_leaves(&self) -> usize {
        self.dirty_leaves
    }

    /// Gives each dirty page a new place with `place` (which seals and writes it), from the
    /// leaves up, and returns the new root. `replaced` gets the entries that are replaced.
    pub fn snapshot(
        &mut self,
        place: &mut dyn FnMut(PagePlace, &Page) -> Entry,
        replaced: &mut Vec<Entry>,
    ) -> Entry {
        let top = self.kind.levels() - 1;
        for level in 0..=top {
            let mut dirty: Vec<u64> = self.levels[level]
                .iter()
                .filter(|(_, node)| node.is_dirty)
                .map(|(index, _)| *index)
                .collect();
            dirty.sort_unstable();
            for index in dirty {
                let entry = match self.levels[level].get_mut(&index) {
                    Some(node) if !node.page.is_empty() => {
                        node.is_dirty = false;
                        place(
                            PagePlace {
                                tree: self.kind,
                                level,
                                index,
                            },
                            &node.page,
                        )
                    }
                    _ => {
                        self.levels[level].remove(&index);
                        Entry::HOLE
                    }
                };
                let old = if level == top {
                    std::mem::replace(&mut self.root, entry)
                } else {
                    let parent =
                        self.levels[level + 1]
                            .entry(index / FANOUT)
                            .or_insert_with(|| Node {
                                page: Page::empty(),
                                is_dirty: false,
                            });
                    parent.is_dirty = true;
                    let old = parent.page.entry(index);
                    parent.page.set_entry(index, entry);
                    old
                };
                if !old.is_hole() {
                    replaced.push(old);
                }
            }
        }
        self.dirty_leaves = 0;
        self.root
    }
}

/// The bitmap of a space leaf's chunk.
pub fn chunk_bit(slot: Slot) -> (u64, u64, usize, u8) {
    let chunk = slot.chunk();
    let bit = slot.0 % super::geometry::CHUNK_SLOTS;
    (
        chunk / FANOUT,
        chunk % FANOUT,
        (bit / 8) as usize,
        1 << (bit % 8),
    )
}

impl Tree {
    /// Marks `slot` as used or not in a space tree.
    pub fn set_used(&mut self, slot: Slot, is_used: bool) {
        debug_assert_eq!(self.kind, TreeKind::Space);
        let (leaf, field, byte, mask) = chunk_bit(slot);
        let bits = self.leaf_mut(leaf).field_mut(field);
        if is_used {
            bits[byte] |= mask;
        } else {
            bits[byte] &= !mask;
        }
    }

    /// Whether a space tree has `slot` as used.
    pub fn is_used(&self, slot: Slot) -> bool {
        let (leaf, field, byte, mask) = chunk_bit(slot);
        self.leaf(leaf)
            .is_some_and(|page| page.field(field)[byte] & mask != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(slot: u64) -> Entry {
        Entry::new(Slot(slot), 1, slot, [7; 16])
    }

    #[test]
    fn a_snapshot_loads_as_the_same_tree() {
        let mut tree = Tree::empty(TreeKind::Map);
        for block in [0u64, 1, 127, 128, 5_000_000, 128u64.pow(5) - 1] {
            tree.leaf_mut(block / FANOUT)
                .set_entry(block, entry(block + 1));
        }
        let mut store = HashMap::new();
        let mut replaced = Vec::new();
        let root = tree.snapshot(
            &mut |place, page| {
                let at = store.len() as u64 + 1000;
                store.insert(at, (place, page.clone()));
                entry(at)
            },
            &mut replaced,
        );
        assert!(replaced.is_empty());
        let again = Tree::load(TreeKind::Map, root, &mut |place, entry| {
            let (at, page) = &store[&entry.slot().0];
            assert_eq!(*at, place);
            Ok(page.clone())
        })
        .expect("loads");
        assert_eq!(again.leaf(0).expect("leaf").entry(127), entry(128));
        assert_eq!(
            again.leaf(128u64.pow(4) - 1).expect("leaf").entry(127),
            entry(128u64.pow(5))
        );
        assert_eq!(again.page_entries().count(), store.len());
    }

    #[test]
    fn emptied_pages_leave_the_tree() {
        let mut tree = Tree::empty(TreeKind::Map);
        tree.leaf_mut(3).set_entry(5, entry(9));
        let mut next = 100;
        let mut place = |_: PagePlace, _: &Page| {
            next += 1;
            entry(next)
        };
        let mut replaced = Vec::new();
        assert!(!tree.snapshot(&mut place, &mut replaced).is_hole());
        tree.leaf_mut(3).set_entry(5, Entry::HOLE);
        assert!(tree.snapshot(&mut place, &mut replaced).is_hole());
        assert_eq!(replaced.len(), MAP_LEVELS_FOR_TEST);
    }

    const MAP_LEVELS_FOR_TEST: usize = super::super::geometry::MAP_LEVELS;

    #[test]
    fn a_damaged_page_takes_only_what_is_below_it() {
        let mut tree = Tree::empty(TreeKind::Map);
        for leaf in [0, 1, 200] {
            tree.leaf_mut(leaf).set_entry(0, entry(leaf + 1));
        }
        let mut store = HashMap::new();
        let root = tree.snapshot(
            &mut |place, page| {
                let at = store.len() as u64 + 1000;
                store.insert(at, (place, page.clone()));
                entry(at)
            },
            &mut Vec::new(),
        );
        let again = Tree::load(TreeKind::Map, root, &mut |place, entry| {
            if place.level == 1 && place.index == 0 {
                return Err(PageFault::Damaged);
            }
            Ok(store[&entry.slot().0].1.clone())
        })
        .expect("loads");
        assert!(again.is_damaged(0) && again.is_damaged(127) && !again.is_damaged(128));
        assert!(again.leaf(200).is_some() && again.leaf(0).is_none());
    }
}
