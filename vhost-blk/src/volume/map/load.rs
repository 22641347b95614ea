//! Bringing pages into memory with blocking, parallel reads.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use super::{MapTree, Missing, TOP, Want, place};
use crate::volume::entry::Entry;
use crate::volume::geometry::FANOUT;
use crate::volume::page::{Page, PagePlace, TreeKind};
use crate::volume::page_reader::{PageFault, PageReader};

/// Pages that are read at a time while a map is opened.
const BATCH: usize = 2048;

/// A leaf that could not be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LostLeaf {
    /// Which.
    pub leaf: u64,
    /// Why.
    pub fault: PageFault,
}

/// The leaves below a page.
pub(in crate::volume) fn leaves_below(place: &PagePlace) -> Range<u64> {
    let leaves = FANOUT.pow(place.level as u32);
    place.index * leaves..(place.index + 1) * leaves
}

/// Reads every page above the leaves of a map of which nothing is here. `named` is told the entry
/// of every page, leaves included. What could not be read is returned.
///
/// Pages of level 1 stay as far as there is room for them; they are many.
pub fn open_upper(
    map: &mut MapTree,
    reader: &PageReader<'_>,
    named: &mut dyn FnMut(Entry),
) -> Vec<(PagePlace, PageFault)> {
    let mut faults = Vec::new();
    let root = map.root();
    if root.is_hole() {
        return faults;
    }
    named(root);
    let top = PagePlace {
        tree: TreeKind::Map,
        level: TOP,
        index: 0,
    };
    let mut level_wants = vec![Want {
        place: top,
        entry: root,
    }];
    for level in (1..=TOP).rev() {
        let mut parents = Vec::new();
        for wants in level_wants.chunks(BATCH) {
            reader.read(wants, &mut |want, outcome| match outcome {
                Ok(bytes) => {
                    for entry in Page::entries(bytes).filter(|entry| !entry.is_hole()) {
                        named(entry);
                    }
                    if level > 1 {
                        map.insert(want, bytes);
                        parents.push(want.place);
                    } else if map.has_room() {
                        map.insert(want, bytes);
                    }
                }
                Err(fault) => faults.push((want.place, fault)),
            });
        }
        parents.sort_unstable_by_key(|place| place.index);
        level_wants = parents
            .iter()
            .flat_map(|place| children(map, place))
            .collect();
    }
    faults
}

/// What the page at `place`, which is here, names.
fn children(map: &MapTree, at: &PagePlace) -> Vec<Want> {
    let Some(page) = map.page(*at) else {
        return Vec::new();
    };
    let stored = (0..FANOUT).map(|field| (field, page.entry(field)));
    stored
        .filter(|(_, entry)| !entry.is_hole())
        .map(|(field, entry)| Want {
            place: place(super::key(at.level - 1, at.index * FANOUT + field)),
            entry,
        })
        .collect()
}

/// Brings `leaves` here, and touches them so that they stay. Those that cannot be had are
/// returned.
pub fn load_leaves(
    map: &mut MapTree,
    reader: &PageReader<'_>,
    leaves: impl Iterator<Item = u64>,
) -> Vec<LostLeaf> {
    let mut open: Vec<u64> = leaves.collect();
    open.sort_unstable();
    open.dedup();
    open.iter().for_each(|leaf| map.touch(*leaf));
    let mut lost = Vec::new();
    // A level each, from the root down.
    while !open.is_empty() {
        let mut seen = HashSet::new();
        let mut wants: Vec<Want> = Vec::new();
        let mut waiting = Vec::new();
        for leaf in open {
            match map.leaf(leaf) {
                Ok(_) => {}
                Err(Missing::Page(want)) => {
                    if seen.insert(want.key()) {
                        wants.push(want);
                    }
                    waiting.push((leaf, want.key()));
                }
                Err(Missing::Lost) => lost.push(LostLeaf {
                    leaf,
                    fault: PageFault::Damaged,
                }),
            }
        }
        let mut failed: HashMap<u64, PageFault> = HashMap::new();
        wants.iter().for_each(|want| map.begin_read(want));
        reader.read(&wants, &mut |want, outcome| match outcome {
            Ok(bytes) => map.insert(want, bytes),
            Err(fault) => drop(failed.insert(want.key(), fault)),
        });
        wants.iter().for_each(|want| map.end_read(want));
        open = Vec::new();
        for (leaf, key) in waiting {
            match failed.get(&key) {
                Some(fault) => lost.push(LostLeaf {
                    leaf,
                    fault: *fault,
                }),
                None => open.push(leaf),
            }
        }
    }
    lost
}
