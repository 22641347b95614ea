//! Every parser of bytes that a stranger stored, sent or left in shared memory, fed with what is
//! mostly valid and a little bent.
//!
//! What is stored is behind an AEAD, so most bends are sealed again with the right keys: what
//! somebody with the keys, or an older or newer program with a bug, may have written. It may be
//! refused or served in part, but nothing may panic, overflow, hang or take memory without bound.
//! What is bent without the keys must besides never be taken for true.

#![allow(clippy::unwrap_used)]

mod memory;

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use crypto::aead::{Engine, TAG_LEN};
use crypto::keys::{Dek, Secret32, SessionKey};
use crypto::session::Session;
use crypto::slot::Argon2Params;
use crypto::source::KeyMaterial;
use memory::{Image, Memory, Opened, Region, material, sheet};
use offload::device::Segment;
use offload::testing::fuzz::{self, Random};
use vhost_blk::device::config;
use vhost_blk::device::request::{self, Request, Terms};
use vhost_blk::volume::backing::Backing;
use vhost_blk::volume::create::create;
use vhost_blk::volume::engine::{Failure, Op};
use vhost_blk::volume::entry::Entry;
use vhost_blk::volume::geometry::{BLOCK_LEN, Block, Geometry, Slot};
use vhost_blk::volume::log::{self, Delta, Ending, RecordPlace};
use vhost_blk::volume::page::{Page, PagePlace, TreeKind};
use vhost_blk::volume::recover::recover;
use vhost_blk::volume::ring::{self, RingMemory, RingWriter};
use vhost_blk::volume::superblock::{
    COPIES, COPY_LEN, KeyEntry, Superblock, TABLE_MAX, session_context, volume_context,
};

/// Counts what is allocated, to notice who believes a length that a stranger wrote.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all calls go to the system's allocator with the arguments that came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(live, Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What all targets of this process may have at a time.
const MEMORY_MAX: usize = 600 << 20;

#[track_caller]
fn assert_bounded() {
    let peak = PEAK.load(Ordering::Relaxed);
    assert!(peak < MEMORY_MAX, "{} MiB were allocated", peak >> 20);
}

/// A log of one chunk and a map of eight leaves.
const GEOMETRY: Geometry = Geometry {
    blocks: 1024,
    chunks: 2 + 1 + 13,
    log_chunks: 1,
};

/// A volume to bend, with what seals it.
struct Base {
    image: Image,
    superblock: Superblock,
    dek: Dek,
    sessions: HashMap<u16, Session>,
    ring: Vec<u8>,
}

fn content(block: u64, version: u64) -> Vec<u8> {
    (block << 32 | version).to_le_bytes().repeat(BLOCK_LEN / 8)
}

impl Base {
    /// Two lives: one closed, one that goes on. `is_closed`: as it was between them.
    fn make(is_closed: bool) -> Self {
        let memory = Arc::new(Memory::new(GEOMETRY.backing_len(), Image::new()));
        create(
            &*memory,
            GEOMETRY,
            &material(),
            Argon2Params::fast_for_tests(),
        )
        .unwrap();
        let ring = Arc::new(Region::new(32 << 10));
        let mut open = Opened::new(recover(&*memory, &material()).unwrap(), &memory);
        ring::format_fresh(&*ring, &open.volume.id()).unwrap();
        open.volume.attach(Some(ring.clone())).unwrap();
        for block in (0..200).chain([500, 1023]) {
            open.write(block * BLOCK_LEN as u64, content(block, 1))
                .unwrap();
        }
        open.volume.close().unwrap();
        if !is_closed {
            open = Opened::new(recover(&*memory, &material()).unwrap(), &memory);
            open.volume.attach(Some(ring.clone())).unwrap();
            for round in 0..6 {
                for block in round * 3..round * 5 + 4 {
                    open.write(block * BLOCK_LEN as u64, content(block, 2 + round))
                        .unwrap();
                }
                if round < 5 {
                    open.flush().unwrap();
                }
            }
        }
        drop(open);
        let image = memory.image();
        let recovered = recover(&*memory, &material()).unwrap();
        let (superblock, dek) = (recovered.superblock, recovered.dek);
        let sessions = superblock.table.iter().map(|row| {
            let context = session_context(&superblock.id, row.id);
            let key = dek.unwrap_session(&row.wrapped, &context).unwrap();
            (row.id, Session::derive(Engine::default(), &key))
        });
        Self {
            sessions: sessions.collect(),
            ring: ring.0.lock().unwrap().clone(),
            image,
            superblock,
            dek,
        }
    }

    fn closed() -> &'static Self {
        static BASE: OnceLock<Base> = OnceLock::new();
        BASE.get_or_init(|| Self::make(true))
    }

    fn running() -> &'static Self {
        static BASE: OnceLock<Base> = OnceLock::new();
        BASE.get_or_init(|| Self::make(false))
    }

    fn session(&self, id: u16) -> &Session {
        let any = || self.sessions.values().next().unwrap();
        self.sessions.get(&id).unwrap_or_else(any)
    }
}

/// A volume that is being bent.
struct Bent<'b> {
    base: &'b Base,
    image: Image,
    superblock: Superblock,
    sequence: u64,
}

impl<'b> Bent<'b> {
    fn of(base: &'b Base) -> Self {
        Self {
            base,
            image: base.image.clone(),
            superblock: base.superblock.clone(),
            sequence: 1 << 40,
        }
    }

    fn next_sequence(&mut self) -> u64 {
        self.sequence += 1;
        self.sequence
    }

    fn page(&self, place: PagePlace, entry: &Entry) -> Option<Page> {
        let stored = self.image.get(&entry.slot().0)?;
        let session = self.base.sessions.get(&entry.session())?;
        Page::open(&stored[..], place, &self.superblock.id, session, entry).ok()
    }

    /// Bends a page anywhere in a tree and seals it and all above it again.
    fn bend_page(&mut self, random: &mut Random) {
        let tree = random.pick(&[TreeKind::Map, TreeKind::Space]);
        let mut entry = match tree {
            TreeKind::Map => self.superblock.map_root,
            TreeKind::Space => self.superblock.space_root,
        };
        let (mut level, mut index) = (tree.levels() - 1, 0);
        let mut path: Vec<(PagePlace, Entry, Page)> = Vec::new();
        let deepest = random.below(3) * random.below(3);
        while let Some(page) = self.page(PagePlace { tree, level, index }, &entry) {
            let children: Vec<u64> = (0..128).filter(|f| !page.entry(*f).is_hole()).collect();
            path.push((PagePlace { tree, level, index }, entry, page));
            if level as u64 <= deepest || children.is_empty() {
                break;
            }
            let field = random.pick(&children);
            entry = path.last().unwrap().2.entry(field);
            index = index * 128 + field;
            level -= 1;
        }
        let Some((place, _, page)) = path.last_mut() else {
            return;
        };
        for _ in 0..1 + random.below(3) {
            if place.tree == TreeKind::Space && place.level == 0 {
                let chunks = random.pick(&[16, 128]);
                let field = random.below(chunks);
                random.bend_bytes(page.field_mut(field));
                continue;
            }
            let from = page.entry(random.below(128));
            let field = random.below(128);
            page.set_entry(field, bend_entry(random, &from, &self.superblock));
        }
        self.seal_path(path);
    }

    fn seal_path(&mut self, mut path: Vec<(PagePlace, Entry, Page)>) {
        // A session of 0 is no session: such a page could not be named.
        let session_id = self.superblock.session.max(1);
        while let Some((place, entry, page)) = path.pop() {
            let sequence = self.next_sequence();
            let mut stored = [0; BLOCK_LEN];
            let session = self.base.session(session_id);
            let tag = page.seal_into(&mut stored, place, &self.superblock.id, session, sequence);
            self.image.insert(entry.slot().0, sheet(&stored));
            let sealed = Entry::new(entry.slot(), session_id, sequence, tag);
            match (path.last_mut(), place.tree) {
                (Some((_, _, parent)), _) => parent.set_entry(place.index, sealed),
                (None, TreeKind::Map) => self.superblock.map_root = sealed,
                (None, TreeKind::Space) => self.superblock.space_root = sealed,
            }
        }
    }

    fn bend_superblock(&mut self, random: &mut Random) {
        let superblock = &mut self.superblock;
        match random.below(15) {
            0 => superblock.generation = random.bend(superblock.generation),
            1 => superblock.clean = !superblock.clean,
            2 => superblock.session = random.bend(superblock.session.into()) as u16,
            3 => superblock.geometry.blocks = random.bend(superblock.geometry.blocks),
            4 => superblock.geometry.chunks = random.bend(superblock.geometry.chunks),
            5 => superblock.geometry.log_chunks = random.bend(superblock.geometry.log_chunks),
            6 => superblock.log_position = random.bend(superblock.log_position),
            7 => superblock.batch = random.bend(superblock.batch),
            8 => random.bend_bytes(&mut superblock.chain),
            9 => superblock.map_root = bend_entry(random, &superblock.map_root, superblock),
            10 => superblock.space_root = bend_entry(random, &superblock.space_root, superblock),
            11 => superblock.adopted = random.bend(superblock.adopted.into()) as u16,
            12 => random.bend_bytes(&mut superblock.serial),
            13 => superblock.sequence = random.bend(superblock.sequence),
            _ => bend_table(random, &mut superblock.table),
        }
    }

    /// Puts batches into the log that nobody but the key's owner could have.
    fn bend_log(&mut self, random: &mut Random) {
        self.superblock.clean = false;
        let geometry = self.superblock.geometry;
        if !(1..=64).contains(&geometry.log_chunks) {
            return;
        }
        let session_id = self.superblock.session;
        let (mut position, mut chain) = (self.superblock.log_position, self.superblock.chain);
        for batch in 1..=1 + random.below(3) {
            let records = 1 + random.below(3);
            for index in 0..records {
                let count = match random.below(8) {
                    0 => 0,
                    1 => 1000,
                    _ => 1 + random.index(20),
                };
                let deltas: Vec<Delta> = (0..count).map(|_| self.delta(random)).collect();
                let place = RecordPlace {
                    batch: self.superblock.batch.wrapping_add(batch),
                    index: if random.one_in(30) {
                        random.next() as u32
                    } else {
                        index as u32
                    },
                    chain,
                };
                let is_last = (index + 1 == records) != random.one_in(20);
                let ending = match (is_last, random.one_in(3)) {
                    (false, _) => Ending::More,
                    (true, false) => Ending::Last,
                    (true, true) => Ending::Draft,
                };
                let sequence = self.next_sequence();
                let session = self.base.session(session_id);
                let id = self.superblock.id;
                let keys = (session_id, session);
                let (record, tag) = log::seal(place, ending, &deltas, &id, keys, sequence);
                let mut bytes = record.to_vec();
                chain = tag;
                if random.one_in(10) {
                    chain = reseal_record(random, &mut bytes, &id, &place, session);
                }
                for part in bytes.chunks_exact(BLOCK_LEN) {
                    let slot = geometry.log_slot(position % geometry.log_blocks());
                    self.image.insert(slot.0, sheet(part));
                    position = position.wrapping_add(1) % geometry.log_blocks();
                }
            }
        }
    }

    fn delta(&self, random: &mut Random) -> Delta {
        let block = random.below(self.superblock.geometry.blocks.clamp(1, 1 << 20));
        let real = self.base.superblock.map_root;
        let old = 3 * 256 + random.below(2048);
        let from = Entry::new(
            Slot(random.below(4096)),
            real.session(),
            real.sequence(),
            real.tag,
        );
        Delta {
            block: Block(if random.one_in(20) {
                random.bend(block) & ((1 << 48) - 1)
            } else {
                block
            }),
            entry: bend_entry(random, &from, &self.superblock),
            old: Slot(random.bend(old) & ((1 << 48) - 1)),
        }
    }

    fn bend_ring(&mut self, random: &mut Random) -> Option<Arc<Region>> {
        if random.one_in(4) {
            return None;
        }
        let region = Arc::new(Region(self.base.ring.clone().into()));
        let session_id = self.superblock.session;
        let session = self.base.session(session_id);
        let id = self.superblock.id;
        if random.one_in(2) {
            let writer = RingWriter::bind(region.clone(), &id, (session_id, session), 1 << 39);
            let mut writer = writer.unwrap();
            for sequence in 0..random.below(40) {
                let deltas: Vec<(Block, Entry)> = (0..random.below(20))
                    .map(|_| self.delta(random))
                    .map(|delta| (delta.block, delta.entry))
                    .collect();
                let batch = match random.below(4) {
                    0 => random.bend(self.superblock.batch),
                    _ => self.superblock.batch.wrapping_add(1 + random.below(3)),
                };
                let sequence = (1 << 41) + sequence;
                writer.append(batch, &mut deltas.iter().copied(), session, sequence);
                if random.one_in(10) {
                    writer.release(writer.mark());
                }
            }
        }
        if random.one_in(3) {
            random.bend_bytes(&mut region.0.lock().unwrap()[..8192]);
        }
        Some(region)
    }

    /// Both copies of the header, one of them perhaps bent further.
    fn seal(&mut self, random: &mut Random) {
        let session = self.base.session(self.superblock.session);
        for copy in COPIES {
            let mut bytes = self.superblock.seal(session);
            if random.one_in(6) {
                random.bend_bytes(&mut bytes[..BLOCK_LEN]);
                if random.one_in(2) {
                    reseal_superblock(&mut bytes, session);
                }
            }
            for (part, slot) in bytes.chunks_exact(BLOCK_LEN).zip(copy / BLOCK_LEN as u64..) {
                self.image.insert(slot, sheet(part));
            }
        }
    }

    /// As a stranger without keys does it.
    fn bend_raw(&mut self, random: &mut Random) {
        let mut slots: Vec<u64> = self.image.keys().copied().collect();
        slots.sort_unstable();
        let slot = random.pick(&slots);
        let mut bytes = *self.image[&slot];
        random.bend_bytes(&mut bytes);
        let to = if random.one_in(3) {
            random.pick(&slots)
        } else {
            slot
        };
        self.image.insert(to, sheet(&bytes));
    }
}

fn bend_entry(random: &mut Random, from: &Entry, superblock: &Superblock) -> Entry {
    let mut bytes = from.to_bytes();
    let mut put = |at: usize, value: u64, len: usize| {
        bytes[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
    };
    match random.below(10) {
        // Somebody else's place, in range.
        0..3 => put(0, 3 * 256 + random.below(13 * 256), 6),
        3 => put(0, superblock.map_root.slot().0, 6),
        4 => put(0, random.below(3 * 256), 6),
        5 => put(0, random.bend(from.slot().0), 6),
        6 => put(6, random.bend(from.session().into()), 2),
        7 => put(8, random.bend(from.sequence()), 6),
        8 => bytes.fill(0),
        _ => random.bend_bytes(&mut bytes),
    }
    Entry::from_bytes(&bytes)
}

fn bend_table(random: &mut Random, table: &mut Vec<KeyEntry>) {
    let Some(row) = table.first().cloned() else {
        return;
    };
    match random.below(5) {
        // More is not for a header to hold.
        0 if table.len() < TABLE_MAX => table.push(row),
        0 => table.truncate(TABLE_MAX / 2),
        // Each costs the deriving of its keys.
        1 if random.one_in(10) => table.resize(TABLE_MAX, row),
        1 => table.resize(100, row),
        2 => table.clear(),
        3 => {
            let at = random.index(table.len());
            table[at].id = random.bend(row.id.into()) as u16;
        }
        _ => {
            let at = random.index(table.len());
            table[at].live = random.bend(row.live);
        }
    }
}

fn reseal_superblock(bytes: &mut [u8], session: &Session) {
    let tag_at = BLOCK_LEN - TAG_LEN;
    let sequence = u64::from_le_bytes(*bytes[48..].first_chunk().unwrap());
    let aad = [&bytes[..tag_at], &bytes[BLOCK_LEN..]].concat();
    let tag = session.superblock.seal(sequence, &aad, &mut []);
    bytes[tag_at..BLOCK_LEN].copy_from_slice(&tag);
}

/// Bends the header of a record and seals it again.
fn reseal_record(
    random: &mut Random,
    bytes: &mut [u8],
    id: &[u8; 16],
    place: &RecordPlace,
    session: &Session,
) -> [u8; TAG_LEN] {
    let sequence = u64::from_le_bytes(*bytes[32..].first_chunk().unwrap());
    let tag: [u8; TAG_LEN] = *bytes[48..].first_chunk().unwrap();
    let aad = |bytes: &[u8]| [&bytes[..48], &id[..], &place.chain[..]].concat();
    let before = aad(bytes);
    session
        .log
        .open(sequence, &before, &mut bytes[64..], &tag)
        .unwrap();
    random.bend_bytes(&mut bytes[..48]);
    let sequence = u64::from_le_bytes(*bytes[32..].first_chunk().unwrap());
    let after = aad(bytes);
    let tag = session.log.seal(sequence, &after, &mut bytes[64..]);
    bytes[48..64].copy_from_slice(&tag);
    tag
}

/// What became of a bent volume.
#[derive(Debug, Default)]
struct Tally {
    refused: u64,
    opened: u64,
    attached: u64,
}

/// Opens, looks, serves, closes and opens again, as `info`, `check` and `serve` do.
fn exercise(
    random: &mut Random,
    memory: &Arc<Memory>,
    ring: Option<Arc<Region>>,
    tally: &mut Tally,
) {
    let mut copy = vec![0; COPY_LEN];
    memory.read_at(COPIES[0], &mut copy).unwrap();
    let _ = Superblock::claims(&copy);
    let recovered = match recover(&**memory, &material()) {
        Ok(recovered) => recovered,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            tally.refused += 1;
            return;
        }
    };
    tally.opened += 1;
    let len = recovered.superblock.geometry.volume_len();
    let blocks = len / BLOCK_LEN as u64;
    assert!(recovered.blocks(&**memory).len() <= 1 << 20);
    recovered.used_slots().count();
    let mut open = Opened::new(recovered, memory);
    for _ in 0..3 {
        read_somewhere(random, &mut open, blocks);
    }
    let ring = ring.map(|ring| ring as Arc<dyn RingMemory>);
    if let Err(error) = open.volume.attach(ring) {
        assert!(!error.to_string().is_empty());
        read_somewhere(random, &mut open, blocks);
        return;
    }
    tally.attached += 1;
    for version in 0..random.below(30) {
        let offset = somewhere(random, blocks);
        let offset = offset * BLOCK_LEN as u64;
        let room = len - offset;
        let some = (1 + random.below(16)) * BLOCK_LEN as u64;
        let len = some.min(room);
        match random.below(8) {
            0..4 => {
                let _ = open.write(offset, vec![version as u8; len as usize]);
            }
            4 => {
                let _ = open.request(Op::Discard { offset, len }, Vec::new());
            }
            5 => {
                let len = len.min(512 * (1 + random.below(20)));
                let _ = open.request(Op::WriteZeroes { offset, len }, Vec::new());
            }
            6 => {
                let _ = open.flush();
            }
            _ => {
                let _ = open.write(offset, vec![version as u8; 512]);
            }
        }
        read_somewhere(random, &mut open, blocks);
    }
    let closed = open.volume.close();
    drop(open);
    if let Err(error) = recover(&**memory, &material()) {
        assert!(closed.is_err(), "closed, and then: {error}");
    }
}

/// A block, mostly one that is written.
fn somewhere(random: &mut Random, blocks: u64) -> u64 {
    let end = if random.one_in(4) { u64::MAX } else { 1024 };
    random.below(blocks.min(end))
}

fn read_somewhere(random: &mut Random, open: &mut Opened, blocks: u64) {
    let block = somewhere(random, blocks);
    let count = 1 + random.below((blocks - block).min(70));
    let _ = open.read(block * BLOCK_LEN as u64, count as usize * BLOCK_LEN);
}

#[test]
fn no_volume_bent_by_somebody_with_its_keys_breaks_who_opens_and_serves_it() {
    let mut tally = Tally::default();
    let ran = fuzz::run("volume", 800, |_, random| {
        let base = if random.one_in(3) {
            Base::closed()
        } else {
            Base::running()
        };
        let mut bent = Bent::of(base);
        for _ in 0..1 + random.below(4) {
            match random.below(8) {
                0 | 1 => bent.bend_superblock(random),
                2..5 => bent.bend_page(random),
                5 | 6 => bent.bend_log(random),
                _ => bent.bend_raw(random),
            }
        }
        let ring = bent.bend_ring(random);
        bent.seal(random);
        let len = bent.superblock.geometry.chunks.saturating_mul(1 << 20);
        let len = len.clamp(GEOMETRY.backing_len(), 64 << 30);
        let memory = Arc::new(Memory::new(len, bent.image));
        exercise(random, &memory, ring, &mut tally);
        assert_bounded();
    });
    println!("{tally:?}");
    if ran >= 500 {
        assert!(tally.refused > ran / 20, "{tally:?}");
        assert!(tally.opened > ran / 2, "{tally:?}");
        assert!(tally.attached > ran / 4, "{tally:?}");
    }
}

#[test]
fn no_volume_bent_by_somebody_without_its_keys_shows_what_was_never_written() {
    let ran = fuzz::run("backing", 600, |_, random| {
        let mut bent = Bent::of(Base::closed());
        for _ in 0..1 + random.below(4) {
            bent.bend_raw(random);
        }
        let memory = Arc::new(Memory::new(GEOMETRY.backing_len(), bent.image));
        let Ok(recovered) = recover(&*memory, &material()) else {
            return;
        };
        let mut open = Opened::new(recovered, &memory);
        if random.one_in(2) {
            let _ = open.volume.attach(None);
        }
        for block in (0..202).chain([500, 1022, 1023]) {
            let expected = match block {
                0..200 | 500 | 1023 => content(block, 1),
                _ => vec![0; BLOCK_LEN],
            };
            match open.read(block * BLOCK_LEN as u64, BLOCK_LEN) {
                Ok(found) => assert!(found == expected, "block {block} is not what was written"),
                Err(failure) => assert_eq!(failure, Failure::NotAuthentic, "block {block}"),
            }
        }
    });
    assert!(ran > 0);
    assert_bounded();
}

#[test]
fn no_region_bent_by_the_frontend_gives_records_that_the_card_did_not_write() {
    let base = Base::running();
    let (id, session_id) = (base.superblock.id, base.superblock.session);
    let session = base.session(session_id);
    let (mut found_some, mut refused) = (0, 0);
    let ran = fuzz::run("ring", 4000, |_, random| {
        let region = Arc::new(Region::new(8192 + random.index(8192)));
        ring::format_fresh(&*region, &id).unwrap();
        let keys = (session_id, session);
        let mut writer = RingWriter::bind(region.clone(), &id, keys, 1).unwrap();
        let mut written = Vec::new();
        for sequence in 2..2 + random.below(120) {
            let deltas: Vec<(Block, Entry)> = (0..1 + random.below(9))
                .map(|n| {
                    (
                        Block(n),
                        Entry::new(Slot(sequence * 16 + n), 3, sequence, [9; 16]),
                    )
                })
                .collect();
            if writer.append(sequence, &mut deltas.iter().copied(), session, sequence) {
                written.extend(
                    deltas
                        .iter()
                        .map(|(block, entry)| (*block, *entry, sequence)),
                );
            }
            if random.one_in(9) {
                writer.release(writer.mark());
            }
        }
        {
            let mut bytes = region.0.lock().unwrap();
            if random.one_in(3) {
                let tail = random.bend(u64::from_le_bytes(*bytes[256..].first_chunk().unwrap()));
                bytes[256..264].copy_from_slice(&tail.to_le_bytes());
            }
            let area = random.pick(&[264, 600, 16384]).min(bytes.len());
            for _ in 0..random.below(3) {
                random.bend_bytes(&mut bytes[..area]);
            }
            if random.one_in(20) {
                let len = random.index(bytes.len());
                bytes.truncate(len);
            }
        }
        let _ = ring::inspect(&*region, &id);
        match ring::read_records(&*region, session) {
            Ok(found) => {
                found_some += u64::from(!found.is_empty());
                for delta in found {
                    let key = (delta.block, delta.entry, delta.batch);
                    assert!(written.contains(&key), "{delta:?} was never written");
                }
            }
            Err(_) => refused += 1,
        }
    });
    if ran >= 1000 {
        assert!(
            found_some > ran / 8 && refused > ran / 50,
            "{found_some}, {refused} of {ran}"
        );
    }
    assert_bounded();
}

#[test]
fn no_bent_key_slot_opens_or_costs_more_than_a_slot_may() {
    let key = || Dek::from_secret(Secret32::take(&mut [9; 32]));
    let phrase = || KeyMaterial::Passphrase(b"correct horse".to_vec().into());
    let context = volume_context(&[3; 16]);
    let seal = |material: &KeyMaterial| {
        let params = Argon2Params::fast_for_tests();
        crypto::slot::seal(material, &key(), &context, params).unwrap()
    };
    let slots = [seal(&material()), seal(&phrase())];
    fuzz::run("key slot", 3000, |_, random| {
        let which = random.index(2);
        let mut slot = slots[which];
        if random.one_in(2) {
            random.bend_bytes(&mut slot[..16]);
        } else {
            random.bend_bytes(&mut slot);
        }
        let _ = crypto::slot::describe(&slot);
        // What is within the bounds may cost up to 1 GiB, by design: too much for this place.
        let memory = u32::from_le_bytes(*slot[4..].first_chunk().unwrap());
        if (1 << 12..=Argon2Params::MAX.memory_kib).contains(&memory) {
            return;
        }
        let material = if random.one_in(2) {
            material()
        } else {
            phrase()
        };
        let opened = crypto::slot::open(&slot, &material, &context);
        assert!(opened.is_err() || slot == slots[which], "a bent slot opens");
    });
    assert_bounded();
}

#[test]
fn no_bent_record_or_header_is_taken_for_one_that_was_sealed() {
    let key = SessionKey::from_secret(Secret32::take(&mut [5; 32]));
    let session = Session::derive(Engine::default(), &key);
    let id = [8; 16];
    let place = RecordPlace {
        batch: 7,
        index: 2,
        chain: [1; 16],
    };
    fuzz::run("log record", 5000, |_, random| {
        let deltas: Vec<Delta> = (0..random.below(200))
            .map(|n| Delta {
                block: Block(n),
                entry: Entry::new(Slot(n + 900), 3, n + 1, [n as u8; 16]),
                old: Slot(n),
            })
            .collect();
        let (record, _) = log::seal(place, Ending::Last, &deltas, &id, (3, &session), 11);
        let mut bytes = record.to_vec();
        let is_sealed = random.one_in(2);
        if is_sealed {
            reseal_record(random, &mut bytes, &id, &place, &session);
        } else {
            random.bend_bytes(&mut bytes);
        }
        if random.one_in(8) {
            bytes.truncate(random.index(bytes.len()));
        }
        let _ = log::claimed_blocks(&bytes);
        if let Ok(found) = log::open(&bytes, place, &id, (3, &session)) {
            assert!(
                is_sealed || bytes == record.to_vec(),
                "a bent record is taken for one"
            );
            assert!(found.deltas.len() <= log::RECORD_DELTAS_MAX);
        }
    });
    let base = Base::closed();
    fuzz::run("header", 5000, |_, random| {
        let session = base.session(base.superblock.session);
        let sealed = base.superblock.seal(session);
        let mut bytes = sealed.clone();
        random.bend_bytes(&mut bytes);
        let is_sealed = random.one_in(2);
        if is_sealed {
            reseal_superblock(&mut bytes, session);
        }
        if random.one_in(8) {
            bytes.truncate(random.index(bytes.len()));
        }
        let _ = Superblock::claims(&bytes);
        let opened = Superblock::open(&bytes, &base.dek);
        assert!(
            is_sealed || opened.is_err() || bytes == sealed,
            "a bent header opens"
        );
    });
    assert_bounded();
}

#[test]
fn no_bent_request_reaches_past_the_volume_or_its_terms() {
    let mut sound = 0;
    let ran = fuzz::run("request", 300_000, |_, random| {
        let terms = Terms {
            features: if random.one_in(4) {
                random.next()
            } else {
                config::features(false)
            },
            volume_len: random.pick(&[1 << 20, 10 << 30, 1 << 47]),
            is_read_only: random.one_in(5),
        };
        let segment = |random: &mut Random| Segment {
            addr: random.bend(0x10_0000),
            len: match random.below(4) {
                0 => random.bend(4096) as u32,
                1 => 16,
                _ => 512 * random.below(300) as u32,
            },
        };
        let readable: Vec<Segment> = (0..random.below(5)).map(|_| segment(random)).collect();
        let writable: Vec<Segment> = (0..random.below(5)).map(|_| segment(random)).collect();
        let Some(shape) = request::shape(&readable, &writable) else {
            return;
        };
        let mut header = [0; 16];
        let kind = random.pick(&[0, 1, 1, 4, 8, 11, 13, 13, 2, 5, u32::MAX]);
        header[..4].copy_from_slice(&kind.to_le_bytes());
        let sector = random.below(terms.volume_len / 512);
        let sector = if random.one_in(4) {
            random.bend(sector)
        } else {
            sector
        };
        header[8..].copy_from_slice(&sector.to_le_bytes());
        let header = if random.one_in(20) {
            &header[..random.index(16)]
        } else {
            &header[..]
        };
        let is_within = |offset: u64, len: u64| {
            offset.is_multiple_of(512)
                && len.is_multiple_of(512)
                && offset
                    .checked_add(len)
                    .is_some_and(|end| end <= terms.volume_len)
        };
        let Ok(request) = request::parse(header, &shape, &terms) else {
            return;
        };
        sound += 1;
        match request {
            Request::In { offset, len } => {
                assert!(is_within(offset, len) && len <= shape.writable);
            }
            Request::Out { offset, len } => {
                assert!(is_within(offset, len) && len <= shape.readable && !terms.is_read_only);
            }
            Request::Flush => assert_ne!(terms.features & config::FLUSH, 0),
            Request::GetId { room } => assert!(room <= 20),
            Request::Discard { ranges } | Request::WriteZeroes { ranges } => {
                assert!((1..=config::RANGES_MAX).contains(&ranges) && !terms.is_read_only);
                let mut bytes = [0; 16];
                bytes[..8].copy_from_slice(&sector.to_le_bytes());
                let sectors = random.bend(8) as u32;
                bytes[8..12].copy_from_slice(&sectors.to_le_bytes());
                bytes[12..].copy_from_slice(&(random.below(4) as u32).to_le_bytes());
                let is_discard = random.one_in(2);
                if let Ok((offset, len)) = request::range(&bytes, is_discard, &terms) {
                    assert!(is_within(offset, len));
                    assert!(len <= u64::from(config::RANGE_SECTORS_MAX) * 512);
                }
            }
        }
    });
    if ran >= 1000 {
        assert!(sound > ran / 20, "{sound} of {ran} are sound");
    }
}
