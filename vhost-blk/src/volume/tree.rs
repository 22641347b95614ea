//! A tree of [`Page`]s, all of it held in memory: the space tree (chunk to bitmap), a 32,768th of
//! what is written. The map, 256 times as large, has [`map`](super::map).
//!
//! Pages change in memory at once and on disk at a checkpoint: [`Tree::snapshot`] gives every
//! dirty page a new place, from the leaves up, so that the root entry it returns names a
//! consistent tree. Nothing is overwritten: the pages that it replaces are freed by the caller
//! once the new root is durable.

use std::collections::HashMap;
use std::ops::Range;

use super::entry::Entry;
use super::geometry::{FANOUT, Slot};
use super::map::Want;
use super::page::{Page, PagePlace, TreeKind};
use super::page_reader::PageReader;

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

    /// Loads all pages below `root`. One that cannot be had is no error: it is kept in
    /// [`Tree::damaged`].
    pub fn load(kind: TreeKind, root: Entry, reader: &PageReader<'_>) -> Self {
        let mut tree = Self::empty(kind);
        tree.root = root;
        let top = kind.levels() - 1;
        let mut wants = Vec::new();
        if !root.is_hole() {
            let place = PagePlace {
                tree: kind,
                level: top,
                index: 0,
            };
            wants.push(Want { place, entry: root });
        }
        for level in (0..=top).rev() {
            let mut below = Vec::new();
            reader.read(&wants, &mut |want, outcome| {
                let index = want.place.index;
                let Ok(bytes) = outcome else {
                    let leaves = FANOUT.pow(level as u32);
                    tree.damaged
                        .push((want.place, index * leaves..(index + 1) * leaves));
                    return;
                };
                if level > 0 {
                    let children = Page::entries(bytes).zip(index * FANOUT..);
                    below.extend(children.filter(|(entry, _)| !entry.is_hole()).map(
                        |(entry, index)| Want {
                            place: PagePlace {
                                tree: kind,
                                level: level - 1,
                                index,
                            },
                            entry,
                        },
                    ));
                }
                let mut page = Page::empty();
                page.0.copy_from_slice(bytes);
                let node = Node {
                    page,
                    is_dirty: false,
                };
                tree.levels[level].insert(index, node);
            });
            wants = below;
        }
        tree
    }

    /// Pages that could not be had, with the leaves that are lost with each.
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
