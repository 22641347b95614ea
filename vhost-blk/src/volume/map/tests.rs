//! The cache against a model.

use proptest::prelude::*;

use super::*;
use crate::volume::geometry::Slot;

fn entry(slot: u64) -> Entry {
    Entry::new(Slot(slot), 1, slot, [7; 16])
}

/// A map, where its pages are stored, and what it has to say.
struct Rig {
    map: MapTree,
    store: HashMap<u64, (PagePlace, Vec<u8>)>,
    model: HashMap<u64, Entry>,
    next: u64,
    /// Slots that the checkpoint under way replaces.
    replaced: Vec<Entry>,
    is_writing: bool,
}

impl Rig {
    fn new(pages: u64) -> Self {
        Self {
            map: MapTree::new(Entry::HOLE, pages * PAGE_COST),
            store: HashMap::new(),
            model: HashMap::new(),
            next: 1000,
            replaced: Vec::new(),
            is_writing: false,
        }
    }

    fn load(&mut self, leaf: u64) {
        for _ in 0..MAP_LEVELS + 1 {
            let Err(Missing::Page(want)) = self.map.leaf(leaf) else {
                return;
            };
            self.map.begin_read(&want);
            let (place, bytes) = &self.store[&want.entry.slot().0];
            assert_eq!(*place, want.place);
            self.map.insert(&want, bytes);
            self.map.end_read(&want);
        }
        panic!("it asks for pages without end");
    }

    fn read(&mut self, block: u64) {
        self.load(block / FANOUT);
        let found = self.map.leaf(block / FANOUT).expect("loaded").entry(block);
        let is = self.model.get(&block).copied().unwrap_or(Entry::HOLE);
        assert_eq!(found, is, "block {block}");
    }

    fn write(&mut self, block: u64, entry: Entry) {
        self.load(block / FANOUT);
        self.map.touch(block / FANOUT);
        let leaf = self.map.leaf_mut(block / FANOUT);
        leaf.expect("loaded").set_entry(block, entry);
        self.model.insert(block, entry);
    }

    fn begin(&mut self) {
        if self.is_writing {
            return;
        }
        self.map.retouch(std::iter::empty());
        let (store, next) = (&mut self.store, &mut self.next);
        let root = self.map.snapshot(
            &mut |place, page| {
                *next += 1;
                store.insert(*next, (place, page.0.to_vec()));
                entry(*next)
            },
            &mut self.replaced,
        );
        assert!(root.is_some(), "a gap above a changed page");
        self.is_writing = true;
    }

    fn finish(&mut self) {
        if std::mem::take(&mut self.is_writing) {
            self.map.written();
            for old in self.replaced.drain(..) {
                assert!(self.store.remove(&old.slot().0).is_some(), "freed twice");
            }
            assert!(self.map.index.len() <= self.map.budget.max(self.pinned()));
        }
    }

    fn pinned(&self) -> usize {
        let frames = self.map.index.values();
        frames
            .filter(|at| self.map.frames[**at as usize].pins > 0)
            .count()
    }

    fn check(&self) {
        let map = &self.map;
        let mut listed = Vec::new();
        let mut at = map.newest;
        while at != NONE {
            listed.push(at);
            at = map.frames[at as usize].behind;
        }
        let mut free: Vec<u32> = Vec::new();
        for (key, at) in &map.index {
            let frame = &map.frames[*at as usize];
            assert_eq!(frame.key, *key);
            let parent = parent_of(*key);
            assert!(
                level_of(*key) == TOP || map.index.contains_key(&parent),
                "a gap above"
            );
            let below = map.index.keys().filter(|below| parent_of(**below) == *key);
            let pins = below.count()
                + usize::from(frame.is_dirty)
                + usize::from(frame.is_written)
                + usize::from(frame.is_touched)
                + usize::from(level_of(*key) >= RESIDENT_LEVEL);
            assert_eq!(frame.pins as usize, pins, "level {}", level_of(*key));
            if pins == 0 {
                free.push(*at);
            }
        }
        free.sort_unstable();
        listed.sort_unstable();
        assert_eq!(free, listed, "the list has what may go");
        assert_eq!(map.frames.len(), map.index.len() + map.vacant.len());
    }
}

#[derive(Clone, Debug)]
enum Step {
    Read(u64),
    Write(u64),
    Erase(u64),
    Begin,
    Finish,
}

/// Blocks of some forty leaves, near and far.
fn block() -> impl Strategy<Value = u64> {
    (0_u64..6, 0_u64..7, 0_u64..3).prop_map(|(far, leaf, field)| {
        let top = [0, 1, 127, 128, 128 * 128, 128 * 128 * 128 - 1][far as usize];
        (top * FANOUT + leaf * 19) * FANOUT + field * 63
    })
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => block().prop_map(Step::Read),
        4 => block().prop_map(Step::Write),
        2 => block().prop_map(Step::Erase),
        1 => Just(Step::Begin),
        1 => Just(Step::Finish),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn it_says_what_was_written_however_small_it_is(
        pages in 1_u64..40,
        steps in proptest::collection::vec(step(), 1..200),
    ) {
        let mut rig = Rig::new(pages);
        for (number, step) in (1..).zip(steps) {
            match step {
                Step::Read(block) => rig.read(block),
                Step::Write(block) => rig.write(block, entry(1 << 30 | number)),
                Step::Erase(block) => rig.write(block, Entry::HOLE),
                Step::Begin => rig.begin(),
                Step::Finish => rig.finish(),
            }
            rig.check();
        }
        rig.finish();
        rig.begin();
        rig.finish();
        rig.check();
        let blocks: Vec<u64> = rig.model.keys().copied().collect();
        blocks.into_iter().for_each(|block| rig.read(block));
        let mapped = rig.model.values().filter(|entry| !entry.is_hole()).count();
        if mapped == 0 {
            prop_assert!(rig.store.is_empty(), "emptied pages leave the tree");
            prop_assert!(rig.map.root().is_hole());
        }
    }
}

#[test]
fn what_was_used_lately_stays_longer() {
    let mut rig = Rig::new(20);
    for leaf in 0..30 {
        rig.write(leaf * FANOUT, entry(leaf + 1));
    }
    rig.begin();
    rig.finish();
    assert!(rig.map.resident() <= 20);
    for leaf in 0..30 {
        rig.read(leaf * FANOUT);
        rig.read(0);
    }
    // Read thirty times among thirty others, in room for sixteen, and read once in all.
    let before = rig.map.counts().misses;
    rig.read(0);
    assert_eq!(rig.map.counts().misses, before);
}

#[test]
fn memory_comes_back_to_the_budget_after_a_checkpoint_of_more() {
    let mut rig = Rig::new(10);
    for leaf in 0..500 {
        rig.write(leaf * FANOUT, entry(leaf + 1));
    }
    assert!(rig.map.resident() > 500, "nothing of it may go");
    rig.begin();
    assert!(rig.map.resident() > 500, "still");
    rig.finish();
    assert!(rig.map.resident() <= 10);
    assert!(rig.map.frames.len() <= 10);
    rig.check();
    for leaf in 0..500 {
        rig.read(leaf * FANOUT);
    }
}

#[test]
fn a_page_that_is_not_what_its_parent_names_is_not_taken() {
    let mut rig = Rig::new(6);
    rig.write(0, entry(1));
    rig.begin();
    rig.finish();
    for leaf in 1..40 {
        rig.write(leaf * FANOUT, entry(leaf));
        rig.begin();
        rig.finish();
    }
    let Err(Missing::Page(want)) = rig.map.leaf(0) else {
        panic!("it was pushed out");
    };
    let stale = Want {
        entry: entry(77),
        ..want
    };
    rig.map.insert(&stale, &[0xff; BLOCK_LEN]);
    assert_eq!(rig.map.leaf(0).err(), Some(Missing::Page(want)));
}

#[test]
fn budgets_fit_the_volume() {
    let blocks = |gib: u64| gib << 18;
    assert_eq!(default_budget(blocks(1)), 16 << 20);
    assert!((32 << 20..36 << 20).contains(&default_budget(blocks(4))));
    assert_eq!(default_budget(blocks(1024)), 256 << 20);
    assert_eq!(smallest_budget(blocks(1)), 5 << 20);
    assert_eq!(smallest_budget(blocks(1024)), 5 << 20);
    assert!((70 << 20..80 << 20).contains(&smallest_budget(blocks(128 << 10))));
    // What fits whole needs no bound.
    let map = MapTree::new(Entry::HOLE, default_budget(blocks(8)));
    assert_eq!(map.touch_limit(blocks(8)), usize::MAX);
    assert!(map.touch_limit(blocks(1024)) < map.budget() / 2);
}

#[test]
fn a_leaf_that_is_stored_and_not_here_cannot_be_changed() {
    let mut rig = Rig::new(8);
    for leaf in 0..40 {
        rig.write(leaf * 19 * FANOUT, entry(leaf + 1));
    }
    rig.begin();
    rig.finish();
    let here = |map: &MapTree, leaf: u64| map.index.contains_key(&key(0, leaf));
    let gone = (0..40).map(|leaf| leaf * 19);
    let gone: Vec<u64> = gone.filter(|leaf| !here(&rig.map, *leaf)).collect();
    assert!(gone.len() > 20);
    let before = rig.map.dirty_leaves();
    for leaf in gone {
        assert!(rig.map.leaf_mut(leaf).is_none(), "{leaf}");
    }
    assert_eq!(rig.map.dirty_leaves(), before);
    rig.check();
    for leaf in 0..40 {
        rig.read(leaf * 19 * FANOUT);
    }
}
