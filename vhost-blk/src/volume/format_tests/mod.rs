//! The stored formats: golden bytes, round trips, and parsers against bytes of a stranger.

use std::sync::Mutex;

use crypto::aead::Engine;
use crypto::keys::{Dek, Secret32, SessionKey, Wrapped};
use crypto::session::Session;
use proptest::prelude::*;

use super::buffer::Buffer;
use super::entry::Entry;
use super::geometry::{BLOCK_LEN, Block, Geometry, Slot};
use super::log::{self, Delta, Ending, RECORD_DELTAS_MAX, RecordPlace};
use super::page::{Page, PagePlace, TreeKind};
use super::ring::{self, RingMemory, RingWriter};
use super::superblock::{KEY_SLOTS, KeyEntry, Superblock};

fn session() -> Session {
    let key = SessionKey::from_secret(Secret32::take(&mut [7; 32]));
    Session::derive(Engine::default(), &key)
}

fn dek() -> Dek {
    Dek::from_secret(Secret32::take(&mut [9; 32]))
}

/// The key that `session` comes from, wrapped once with `dek`: wrapping is random.
const WRAPPED: &[u8] = include_bytes!("golden/wrapped.bin");
const SUPERBLOCK: &[u8] = include_bytes!("golden/superblock.bin");
const RECORD: &[u8] = include_bytes!("golden/record.bin");
const PAGE: &[u8] = include_bytes!("golden/page.bin");

fn superblock() -> Superblock {
    let wrapped = Wrapped::from_bytes(*WRAPPED.first_chunk().expect("60 bytes"));
    let mut key_slots = [[0; crypto::slot::SLOT_LEN]; KEY_SLOTS];
    key_slots[0].fill(0x5a);
    Superblock {
        id: *b"sixteen byte id.",
        generation: 0x0102_0304,
        incomplete: false,
        clean: true,
        session: 3,
        sequence: 77,
        geometry: Geometry::with_spare(64 << 20, 4).expect("a size"),
        log_position: 5,
        batch: 99,
        chain: [0xc4; 16],
        map_root: Entry::new(Slot(4000), 3, 70, [1; 16]),
        space_root: Entry::new(Slot(4001), 3, 71, [2; 16]),
        adopted: 2,
        created: 1_700_000_000,
        serial: *b"vol0123456789abcdef0",
        key_slots,
        table: vec![KeyEntry {
            id: 3,
            live: 12,
            created: 1_700_000_001,
            wrapped,
        }],
    }
}

fn deltas(count: usize) -> Vec<Delta> {
    (0..count as u64)
        .map(|n| Delta {
            block: Block(n * 3),
            entry: if n % 5 == 4 {
                Entry::HOLE
            } else {
                Entry::new(Slot(2000 + n), 3, n + 1, [n as u8; 16])
            },
            old: Slot(n % 2 * (9000 + n)),
        })
        .collect()
}

const ID: [u8; 16] = *b"sixteen byte id.";
const PLACE: RecordPlace = RecordPlace {
    batch: 100,
    index: 0,
    chain: [0xc4; 16],
};
const PAGE_PLACE: PagePlace = PagePlace {
    tree: TreeKind::Map,
    level: 1,
    index: 5,
};

fn record() -> Vec<u8> {
    log::seal(PLACE, Ending::Last, &deltas(40), &ID, (3, &session()), 501)
        .0
        .to_vec()
}

fn page() -> (Vec<u8>, Entry, Page) {
    let mut page = Page::empty();
    page.set_entry(17, Entry::new(Slot(55), 2, 3, [4; 16]));
    let mut sealed = vec![0; BLOCK_LEN];
    let tag = page.seal_into(&mut sealed, PAGE_PLACE, &ID, &session(), 42);
    (sealed, Entry::new(Slot(1), 3, 42, tag), page)
}

/// Writes the golden files anew. Only for a new version of the format: volumes that exist would
/// not open any more.
#[test]
#[ignore = "writes the golden files; run by hand when the format's version changes"]
fn bless() {
    let folder = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/src/volume/format_tests/golden/"
    );
    let write = |name: &str, bytes: &[u8]| {
        std::fs::write(format!("{folder}{name}"), bytes).expect("writes")
    };
    let key = SessionKey::from_secret(Secret32::take(&mut [7; 32]));
    let context = super::superblock::session_context(&ID, 3);
    // Run twice: what is written second has in it what was written first.
    if WRAPPED.iter().all(|byte| *byte == 0) {
        let wrapped = dek().wrap_session(&key, &context).expect("wraps");
        write("wrapped.bin", wrapped.as_bytes());
    }
    write("superblock.bin", &superblock().seal(&session()));
    write("record.bin", &record());
    write("page.bin", &page().0);
}

#[test]
fn the_stored_bytes_are_the_golden_ones() {
    assert!(superblock().seal(&session()) == SUPERBLOCK, "superblock");
    assert!(record() == RECORD, "log record");
    assert!(page().0 == PAGE, "page");
}

#[test]
fn golden_bytes_mean_what_they_meant() {
    assert_eq!(Superblock::open(SUPERBLOCK, &dek()), Ok(superblock()));
    let record = log::open(RECORD, PLACE, &ID, (3, &session())).expect("opens");
    assert_eq!(
        (record.deltas, record.ending, record.blocks),
        (deltas(40), Ending::Last, 1)
    );
    let (_, entry, page) = page();
    assert!(
        Page::open(PAGE, PAGE_PLACE, &ID, &session(), &entry).is_ok_and(|opened| opened == page)
    );
}

#[test]
fn a_page_fits_only_where_it_belongs() {
    let (sealed, entry, _) = page();
    for place in [
        PagePlace {
            tree: TreeKind::Space,
            ..PAGE_PLACE
        },
        PagePlace {
            level: 0,
            ..PAGE_PLACE
        },
        PagePlace {
            index: 6,
            ..PAGE_PLACE
        },
    ] {
        assert!(Page::open(&sealed, place, &ID, &session(), &entry).is_err());
    }
    assert!(Page::open(&sealed, PAGE_PLACE, b"another volume's", &session(), &entry).is_err());
}

#[test]
fn a_record_fits_only_into_its_chain() {
    let session = session();
    for place in [
        RecordPlace {
            batch: 101,
            ..PLACE
        },
        RecordPlace { index: 1, ..PLACE },
        RecordPlace {
            chain: [0xc5; 16],
            ..PLACE
        },
    ] {
        assert!(log::open(RECORD, place, &ID, (3, &session)).is_err());
    }
    assert!(log::open(RECORD, PLACE, b"another volume's", (3, &session)).is_err());
    assert!(log::open(RECORD, PLACE, &ID, (4, &session)).is_err());
}

struct Memory(Mutex<Vec<u8>>);

impl RingMemory for Memory {
    fn len(&self) -> usize {
        self.0.lock().expect("memory").len()
    }
    fn read(&self, at: usize, into: &mut [u8]) {
        let bytes = self.0.lock().expect("memory");
        into.iter_mut()
            .zip(at..)
            .for_each(|(byte, at)| *byte = bytes.get(at).copied().unwrap_or(0));
    }
    fn write(&self, at: usize, from: &[u8]) {
        let mut bytes = self.0.lock().expect("memory");
        for (byte, at) in from.iter().zip(at..) {
            if let Some(place) = bytes.get_mut(at) {
                *place = *byte;
            }
        }
    }
    fn store(&self, at: usize, word: u64) {
        self.write(at, &word.to_le_bytes());
    }
}

fn memory(len: usize) -> std::sync::Arc<Memory> {
    let memory = std::sync::Arc::new(Memory(Mutex::new(vec![0; len])));
    ring::format_fresh(&*memory, &ID).expect("large enough");
    memory
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Bytes of a stranger: mostly a valid header with some bytes changed.
    #[test]
    fn a_bent_superblock_is_refused_and_never_panics(
        cut in 0usize..=SUPERBLOCK.len(),
        changes in prop::collection::vec((0usize..SUPERBLOCK.len(), any::<u8>()), 0..4),
    ) {
        let mut bytes = SUPERBLOCK.to_vec();
        let mut is_changed = false;
        for (at, value) in changes {
            is_changed |= bytes[at] != value;
            bytes[at] = value;
        }
        bytes.truncate(cut);
        let opened = Superblock::open(&bytes, &dek());
        if is_changed || cut < SUPERBLOCK.len() {
            prop_assert!(opened.is_err() || opened == Ok(superblock()));
        }
        let _ = Superblock::open(&bytes, &Dek::generate().expect("random"));
    }

    #[test]
    fn arbitrary_bytes_are_no_superblock_record_page_or_ring(
        bytes in prop::collection::vec(any::<u8>(), 0..9000),
        keeps_magic in any::<bool>(),
    ) {
        let mut bytes = bytes;
        if keeps_magic && bytes.len() >= 64 {
            bytes[..16].copy_from_slice(&SUPERBLOCK[..16]);
        }
        prop_assert!(Superblock::open(&bytes, &dek()).is_err());
        if keeps_magic && bytes.len() >= 64 {
            bytes[..64].copy_from_slice(&RECORD[..64]);
        }
        prop_assert!(log::open(&bytes, PLACE, &ID, (3, &session())).is_err());
        let (_, entry, _) = page();
        prop_assert!(Page::open(&bytes, PAGE_PLACE, &ID, &session(), &entry).is_err());
        let ring = Memory(Mutex::new(bytes));
        prop_assert!(ring::inspect(&ring, &ID).is_err());
        prop_assert!(ring::read_records(&ring, &session()).is_err());
    }

    #[test]
    fn records_come_back_as_they_were(count in 1usize..RECORD_DELTAS_MAX, ending in prop::sample::select(&[Ending::More, Ending::Last, Ending::Draft][..])) {
        let (stored, tag) = log::seal(PLACE, ending, &deltas(count), &ID, (3, &session()), 9);
        let record = log::open(&stored, PLACE, &ID, (3, &session())).expect("opens");
        prop_assert_eq!(record.deltas, deltas(count));
        prop_assert_eq!((record.ending, record.tag), (ending, tag));
        prop_assert_eq!(record.blocks, log::record_blocks(count));
    }

    /// Appends and releases in any order; at each instant the ring gives exactly what was
    /// appended since the last release, in order (and perhaps older records, whose batch tells).
    #[test]
    fn a_ring_gives_back_what_was_not_released(
        steps in prop::collection::vec((0u8..10, 1usize..20), 1..200),
    ) {
        let session = session();
        let memory = memory(8 * 1024);
        let mut writer = RingWriter::bind(memory.clone(), &ID, (3, &session), 1).expect("binds");
        let (mut batch, mut sequence) = (1, 2);
        let mut live: Vec<(u64, Entry)> = Vec::new();
        for (kind, count) in steps {
            if kind == 0 {
                writer.release(writer.mark());
                live.clear();
                batch += 1;
                continue;
            }
            let new: Vec<(Block, Entry)> = (0..count as u64)
                .map(|n| (Block(n), Entry::new(Slot(n + 5000), 3, sequence * 100 + n, [1; 16])))
                .collect();
            if writer.append(batch, &mut new.iter().copied(), &session, sequence) {
                live.extend(new.iter().map(|(block, entry)| (block.0, *entry)));
            } else {
                prop_assert!(live.len() * 40 > 1000, "a ring that is nearly empty refused a record");
            }
            sequence += 1;
            let found = ring::read_records(&*memory, &session).expect("authentic");
            let found: Vec<_> =
                found.iter().filter(|d| d.batch == batch).map(|d| (d.block.0, d.entry)).collect();
            prop_assert_eq!(&found, &live);
        }
    }
}

#[test]
fn buffers_are_aligned_for_direct_io() {
    for blocks in [1, 3, 64] {
        let buffer = Buffer::zeroed(blocks);
        assert_eq!(
            (buffer.as_ptr() as usize % BLOCK_LEN, buffer.len()),
            (0, blocks * BLOCK_LEN)
        );
    }
}
