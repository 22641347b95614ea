//! Mending an opened volume, in memory: [`Recovered`] is made what the volume should be, and the next
//! activation's checkpoint makes all of it durable at one instant. A kill before that leaves the
//! volume as it was.
//!
//! - [`make_holes`](Recovered::make_holes) gives up what is lost. Only the map changes.
//! - [`mend_space`](Recovered::mend_space) then makes the space tree say what the map says. The map
//!   is the truth about data: a slot is in use if an entry names it, and for no other reason. While
//!   a page of the map is lost that is not known, so nothing is freed then.
//!
//! The allocator keeps every slot that it had as used: what is freed here can only be used after the
//! next opening. So the checkpoint overwrites nothing that the volume as it was still names, and
//! nothing has to wait for it.
//!
//! The exception is the header: [`mend_copies`](Recovered::mend_copies) writes at once, the sealed
//! bytes of the good copy over the other. A volume with no other damage then needs no activation.
//!
//! Changed leaves stay in memory until the checkpoint: 4 KiB for each that has a lost block in it.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::ops::ControlFlow;

use super::backing::Backing;
use super::buffer::Buffer;
use super::entry::Entry;
use super::geometry::{BLOCK_LEN, FANOUT};
use super::map::{Visit, leaves_below, load_leaves};
use super::page::{Page, PagePlace, TreeKind};
use super::page_reader::PageReader;
use super::recover::Recovered;
use super::superblock::{COPIES, COPY_LEN, Superblock};
use super::tree::Tree;

/// What became of the space tree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mended {
    /// Slots that were in use with no block in them.
    pub freed: u64,
    /// Slots with a block in them that were said to be free.
    pub marked: u64,
    /// Pages of the tree that could not be had and are made anew.
    pub rebuilt: usize,
    /// Pages of the map are lost: what may be below them was left in use.
    pub is_partial: bool,
    /// Pages of both trees are lost: nothing could be done.
    pub is_hopeless: bool,
}

impl Mended {
    /// Whether there is something to be made durable.
    pub fn is_change(&self) -> bool {
        self.freed > 0 || self.marked > 0 || self.rebuilt > 0
    }
}

/// What the map says.
struct Census {
    space: Tree,
    /// How often the map names each session.
    live: HashMap<u16, i64>,
    is_whole: bool,
}

fn count(live: &mut HashMap<u16, i64>, entry: &Entry, by: i64) {
    if !entry.is_hole() {
        *live.entry(entry.session()).or_default() += by;
    }
}

/// Bits that are in `a` and not in `b`.
fn bits_only_in(a: &Page, b: &Page) -> u64 {
    let bytes = a.0.iter().zip(b.0.iter());
    bytes.map(|(a, b)| u64::from((a & !b).count_ones())).sum()
}

impl Recovered {
    /// Whether something could not be read that a writer must know: then nothing can be mended.
    pub fn is_beyond_writing(&self) -> bool {
        self.is_unreadable()
    }

    /// Writes the header copy that counts over the other one, if that is damaged or older; durable
    /// when this returns. Whether it had to.
    ///
    /// # Errors
    /// The backing failed, or gives other bytes than a moment ago.
    pub fn mend_copies(&mut self, backing: &dyn Backing) -> io::Result<bool> {
        let generation = self.superblock.generation;
        let (good, other) = match self.sole_copy() {
            Some(0) => (0, 1),
            Some(_) => (1, 0),
            None => return Ok(false),
        };
        let mut image = Buffer::zeroed(COPY_LEN / BLOCK_LEN);
        backing.read_at(COPIES[good], &mut image)?;
        if !matches!(Superblock::open(&image, &self.dek), Ok(s) if s.generation == generation) {
            return Err(io::Error::other("the good copy of the header has changed"));
        }
        // It may have been read from a cache.
        backing.sync()?;
        backing.write_at(COPIES[other], &image)?;
        backing.sync()?;
        self.copies[other] = Ok(generation);
        Ok(true)
    }

    /// Makes `blocks`, and everything below the map's pages at `lost`, holes. Returns whether that
    /// changed anything. Blocks whose leaf cannot be had stay as they are.
    pub fn make_holes(
        &mut self,
        backing: &dyn Backing,
        lost: &[PagePlace],
        blocks: &[u64],
    ) -> bool {
        let reader = PageReader {
            backing,
            keyring: &self.keyring,
            id: self.superblock.id,
            geometry: self.superblock.geometry,
        };
        let mut is_change = false;
        for place in lost.iter().filter(|place| place.tree == TreeKind::Map) {
            self.map.find(place);
            // For what is above it; it cannot be had itself.
            let first = leaves_below(place).start;
            load_leaves(&mut self.map, &reader, [first].into_iter());
            is_change |= self.map.blank(*place);
        }
        load_leaves(
            &mut self.map,
            &reader,
            blocks.iter().map(|block| block / FANOUT),
        );
        for block in blocks {
            let leaf = block / FANOUT;
            let old = match self.map.leaf(leaf) {
                Ok(page) => page.entry(*block),
                Err(_) => continue,
            };
            if !old.is_hole()
                && let Some(page) = self.map.leaf_mut(leaf)
            {
                page.set_entry(*block, Entry::HOLE);
                count(&mut self.live, &old, -1);
                is_change = true;
            }
        }
        is_change
    }

    /// Makes the space tree say what the map says, as far as that is known.
    pub fn mend_space(&mut self, backing: &dyn Backing) -> Mended {
        let Census {
            space: said,
            mut live,
            is_whole,
        } = self.census(backing);
        let mut mended = Mended {
            is_partial: !is_whole,
            ..Mended::default()
        };
        let is_damaged = !self.space.damaged().is_empty();
        if !is_whole && is_damaged {
            mended.is_hopeless = true;
            return mended;
        }
        let leaves: BTreeSet<u64> = self
            .space
            .leaves()
            .chain(said.leaves())
            .map(|(leaf, _)| leaf)
            .collect();
        for leaf in leaves {
            let page = |tree: &Tree| tree.leaf(leaf).cloned().unwrap_or_else(Page::empty);
            let (has, mut wanted) = (page(&self.space), page(&said));
            if !is_whole {
                let bytes = wanted.0.iter_mut().zip(has.0.iter());
                bytes.for_each(|(wanted, has)| *wanted |= has);
            }
            mended.freed += bits_only_in(&has, &wanted);
            mended.marked += bits_only_in(&wanted, &has);
            if has != wanted {
                *self.space.leaf_mut(leaf) = wanted;
            }
        }
        if is_damaged {
            mended.rebuilt = self.space.damaged().len();
            self.space = said;
        }
        for slot in self.used_slots().collect::<Vec<_>>() {
            self.allocator.mark(slot);
        }
        if is_whole {
            self.space
                .page_entries()
                .for_each(|entry| count(&mut live, &entry, 1));
            self.live = live;
            self.is_space_known = true;
        }
        mended
    }

    fn census(&self, backing: &dyn Backing) -> Census {
        let geometry = self.superblock.geometry;
        let mut census = Census {
            space: Tree::empty(TreeKind::Space),
            live: HashMap::new(),
            is_whole: true,
        };
        count(&mut census.live, &self.map.root(), 1);
        let _ = self.each_leaf(backing, 0, &mut |visit| {
            let (page, is_leaf) = match visit {
                Visit::Upper(_, page) => (page, false),
                Visit::Leaf(_, page) => (page, true),
                Visit::Lost(..) => {
                    census.is_whole = false;
                    return ControlFlow::Continue(());
                }
            };
            for entry in (0..FANOUT).map(|field| page.entry(field)) {
                count(&mut census.live, &entry, 1);
                if is_leaf && geometry.is_data_slot(entry.slot()) {
                    census.space.set_used(entry.slot(), true);
                }
            }
            ControlFlow::Continue(())
        });
        census
    }
}
