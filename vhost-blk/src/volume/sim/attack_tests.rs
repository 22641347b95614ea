//! What an attacker who can write to the backing, or to the in-flight region, gets: an error for
//! what was touched, the truth for everything else. One test an attack.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use crypto::slot::{Argon2Params, SLOT_LEN};
use crypto::source::KeyMaterial;

use super::disk::SimDisk;
use super::world::{Quiet, SimRing, material, small_geometry};
use crate::volume::backing::Backing;
use crate::volume::create::create;
use crate::volume::engine::{
    AttachError, Failure, Lane, Op, Payload, PayloadFault, Phase, Volume, drive,
};
use crate::volume::entry::Entry;
use crate::volume::geometry::{BLOCK_LEN, CHUNK_LEN};
use crate::volume::page::{PagePlace, TreeKind};
use crate::volume::recover::{RecoverError, Recovered, recover};
use crate::volume::ring::{self, RingError, RingMemory};
use crate::volume::superblock::{COPIES, COUNTER_MAX, KEY_SLOTS, Superblock};

#[derive(Clone)]
struct Bytes(Rc<RefCell<Vec<u8>>>);

impl Payload for Bytes {
    fn load(&mut self, at: usize, into: &mut [u8]) -> Result<(), PayloadFault> {
        into.copy_from_slice(&self.0.borrow()[at..at + into.len()]);
        Ok(())
    }
    fn store(&mut self, at: usize, from: &[u8]) -> Result<(), PayloadFault> {
        self.0.borrow_mut()[at..at + from.len()].copy_from_slice(from);
        Ok(())
    }
}

struct Bench {
    disk: Arc<SimDisk>,
}

struct Running {
    volume: Volume,
    lane: Lane<Bytes>,
    disk: Arc<SimDisk>,
}

impl Bench {
    fn new() -> Self {
        let disk = Arc::new(SimDisk::new(small_geometry().backing_len()));
        create(
            &*disk,
            small_geometry(),
            &material(),
            Argon2Params::fast_for_tests(),
        )
        .expect("creates");
        Self { disk }
    }

    fn open(&self) -> Result<Running, RecoverError> {
        let recovered = recover(&*self.disk, &material())?;
        let backing: Arc<dyn Backing> = self.disk.clone();
        let volume = Volume::new(recovered, backing, Box::new(Quiet));
        let lane = Lane::new(Arc::clone(volume.shared()), Arc::new(|| {}));
        Ok(Running {
            volume,
            lane,
            disk: Arc::clone(&self.disk),
        })
    }

    fn serve(&self) -> Running {
        let running = self.open().expect("opens");
        running.volume.attach(None).expect("attaches");
        running
    }

    /// Writes `block` = `byte` for each pair and closes.
    fn write(&self, blocks: &[(u64, u8)]) {
        let mut running = self.serve();
        for (block, byte) in blocks {
            running.write(*block, *byte).expect("writes");
        }
        running.volume.close().expect("closes");
    }

    fn entry(&self, block: u64) -> Entry {
        recover(&*self.disk, &material())
            .expect("opens")
            .entry(&*self.disk, block)
            .expect("is mapped")
    }

    fn sheet(&self, offset: u64) -> Vec<u8> {
        let mut bytes = vec![0; BLOCK_LEN];
        self.disk.read_at(offset, &mut bytes).expect("reads");
        bytes
    }

    fn put(&self, offset: u64, bytes: &[u8]) {
        self.disk.write_at(offset, bytes).expect("writes");
        self.disk.sync().expect("syncs");
    }

    fn read(&self, block: u64) -> Result<u8, Failure> {
        self.open().expect("opens").read(block)
    }
}

impl Running {
    fn request(&mut self, op: Op, bytes: Vec<u8>) -> Result<Vec<u8>, Failure> {
        let memory = Rc::new(RefCell::new(bytes));
        self.lane.submit(op, Bytes(Rc::clone(&memory)));
        for _ in 0..1000 {
            self.lane.on_wake();
            drive(&mut self.lane, &*self.disk);
            if let Some(done) = self.lane.next_done() {
                done.result?;
                return Ok(memory.borrow().clone());
            }
        }
        panic!("a request hangs");
    }

    fn write(&mut self, block: u64, byte: u8) -> Result<(), Failure> {
        let op = Op::Write {
            offset: block * 4096,
            len: 4096,
            durable: false,
        };
        self.request(op, vec![byte; BLOCK_LEN]).map(|_| ())
    }

    fn not_authentic(&self) -> u64 {
        let stats = self.volume.shared().stats();
        stats
            .not_authentic
            .load(std::sync::atomic::Ordering::Relaxed)
    }

    /// The byte that all of the block is.
    fn read(&mut self, block: u64) -> Result<u8, Failure> {
        let untouched = vec![0xee; BLOCK_LEN];
        let bytes = self.request(
            Op::Read {
                offset: block * 4096,
                len: 4096,
            },
            untouched,
        )?;
        assert!(
            bytes.iter().all(|byte| *byte == bytes[0]),
            "a mixture reached the guest"
        );
        Ok(bytes[0])
    }
}

#[test]
fn any_flipped_bit_of_a_block_fails_that_block_only_and_shows_nothing_of_it() {
    let bench = Bench::new();
    bench.write(&[(1, 11), (2, 22)]);
    let offset = bench.entry(1).slot().offset();
    for byte in [0, 1, 511, 512, 2048, 4095] {
        bench.disk.flip(offset + byte, 3);
        let mut running = bench.open().expect("opens");
        let memory = Rc::new(RefCell::new(vec![0xee; BLOCK_LEN]));
        running.lane.submit(
            Op::Read {
                offset: 4096,
                len: 4096,
            },
            Bytes(Rc::clone(&memory)),
        );
        drive(&mut running.lane, &*bench.disk);
        let done = running.lane.next_done().expect("done");
        assert_eq!(done.result, Err(Failure::NotAuthentic));
        assert!(
            memory.borrow().iter().all(|byte| *byte == 0xee),
            "unauthenticated bytes reached the guest"
        );
        assert_eq!(running.read(2), Ok(22));
        bench.disk.flip(offset + byte, 3);
    }
    assert_eq!(bench.read(1), Ok(11));
}

#[test]
fn a_block_moved_to_another_place_fails() {
    let bench = Bench::new();
    bench.write(&[(1, 11), (2, 22)]);
    let (a, b) = (
        bench.entry(1).slot().offset(),
        bench.entry(2).slot().offset(),
    );
    bench.put(b, &bench.sheet(a));
    assert_eq!(bench.read(2), Err(Failure::NotAuthentic));
    assert_eq!(bench.read(1), Ok(11));
}

#[test]
fn an_old_version_of_a_block_fails() {
    let bench = Bench::new();
    bench.write(&[(1, 11)]);
    let old = bench.sheet(bench.entry(1).slot().offset());
    bench.write(&[(1, 12)]);
    bench.put(bench.entry(1).slot().offset(), &old);
    assert_eq!(bench.read(1), Err(Failure::NotAuthentic));
}

#[test]
fn a_block_of_another_volume_with_the_same_key_file_fails() {
    let (one, other) = (Bench::new(), Bench::new());
    one.write(&[(1, 11)]);
    other.write(&[(1, 99)]);
    one.put(
        one.entry(1).slot().offset(),
        &other.sheet(other.entry(1).slot().offset()),
    );
    assert_eq!(one.read(1), Err(Failure::NotAuthentic));
}

#[test]
fn an_old_or_zeroed_map_page_costs_its_blocks_and_never_shows_old_data_or_holes() {
    let bench = Bench::new();
    bench.write(&[(1, 11), (200, 33)]);
    let leaf_slots = |bench: &Bench| -> Vec<u64> {
        let recovered = recover(&*bench.disk, &material()).expect("opens");
        recovered
            .map
            .page_entries()
            .map(|entry| entry.slot().offset())
            .collect()
    };
    let old: HashMap<u64, Vec<u8>> = leaf_slots(&bench)
        .into_iter()
        .map(|at| (at, bench.sheet(at)))
        .collect();
    bench.write(&[(1, 12)]);
    let image = bench.disk.image();
    for at in leaf_slots(&bench) {
        let forgeries = old.values().cloned().chain([vec![0; BLOCK_LEN]]);
        for forged in forgeries {
            if forged == bench.sheet(at) {
                continue;
            }
            bench.put(at, &forged);
            match bench.read(1) {
                Ok(12) | Err(Failure::NotAuthentic) => {}
                other => panic!("a forged page gave {other:?}"),
            }
            let recovered = recover(&*bench.disk, &material()).expect("opens");
            assert_eq!(
                recovered.lost_pages(&*bench.disk).len(),
                1,
                "the page is named"
            );
            bench.disk.restore(image.clone());
        }
    }
    assert_eq!(bench.read(1), Ok(12));
}

fn leaf_entry(recovered: &Recovered, index: u64) -> Entry {
    let place = PagePlace {
        tree: TreeKind::Map,
        level: 0,
        index,
    };
    recovered.map.stored_as(place).expect("its parent is here")
}

#[test]
fn writes_below_a_damaged_map_page_fail_and_others_go_on() {
    let bench = Bench::new();
    bench.write(&[(1, 11), (200, 33)]);
    let recovered = recover(&*bench.disk, &material()).expect("opens");
    let leaf = leaf_entry(&recovered, 0);
    bench.disk.flip(leaf.slot().offset() + 17, 0);
    let mut running = bench.serve();
    assert_eq!(running.write(1, 13), Err(Failure::NotAuthentic));
    assert_eq!(running.write(200, 34), Ok(()));
    assert_eq!(running.read(200), Ok(34));
    running.volume.close().expect("closes");
    assert_eq!(bench.read(200), Ok(34));
    assert_eq!(
        bench.read(1),
        Err(Failure::NotAuthentic),
        "still, after a checkpoint"
    );
}

#[test]
fn one_destroyed_superblock_copy_changes_nothing() {
    let bench = Bench::new();
    bench.write(&[(1, 11)]);
    for copy in COPIES {
        let image = bench.disk.image();
        bench.put(copy, &[0xa5; BLOCK_LEN]);
        assert_eq!(bench.read(1), Ok(11));
        let recovered = recover(&*bench.disk, &material()).expect("opens");
        assert_eq!(
            recovered.copies.iter().filter(|copy| copy.is_err()).count(),
            1
        );
        bench.disk.restore(image);
    }
    for copy in COPIES {
        bench.put(copy, &[0xa5; BLOCK_LEN]);
    }
    assert!(matches!(bench.open().err(), Some(RecoverError::Foreign)));
}

#[test]
fn every_flipped_bit_of_a_superblock_or_key_table_is_noticed() {
    let bench = Bench::new();
    bench.write(&[(1, 11)]);
    bench.put(COPIES[1], &[0; BLOCK_LEN]);
    let entries = recover(&*bench.disk, &material())
        .expect("opens")
        .superblock
        .table
        .len();
    for byte in (0..BLOCK_LEN as u64 + entries as u64 * 96).step_by(5) {
        bench.disk.flip(COPIES[0] + byte, (byte % 8) as u8);
        assert!(
            bench.open().is_err(),
            "byte {byte} of the header can be changed unnoticed"
        );
        bench.disk.flip(COPIES[0] + byte, (byte % 8) as u8);
    }
    assert_eq!(bench.read(1), Ok(11));
}

#[test]
fn a_changed_log_gives_a_state_that_was_committed_never_a_mixture() {
    let bench = Bench::new();
    bench.write(&[(1, 1)]);
    let mut running = bench.serve();
    for version in 2..6 {
        running.write(1, version).expect("writes");
        running.request(Op::Flush, Vec::new()).expect("flushes");
    }
    drop(running);
    bench.disk.sync().expect("syncs");
    assert_eq!(bench.read(1), Ok(5));
    let start = recover(&*bench.disk, &material())
        .expect("opens")
        .superblock
        .log_position;
    for block in 0..4 {
        for byte in [0, 9, 33, 50, 70, 120] {
            let at = 2 * CHUNK_LEN + (start + block) * BLOCK_LEN as u64 + byte;
            bench.disk.flip(at, 1);
            // Cutting the log's end off is going back to an older image: only an anchor outside
            // of it can tell. But nothing that was never there may appear.
            let got = bench.read(1);
            assert_eq!(got, Ok(block as u8 + 1), "record {block}, byte {byte}");
            bench.disk.flip(at, 1);
        }
    }
}

#[test]
fn a_wrong_key_is_refused() {
    let bench = Bench::new();
    let wrong = KeyMaterial::File(crypto::keys::Secret32::take(&mut [0x43; 32]));
    let refused = recover(&*bench.disk, &wrong).err().expect("refused");
    assert!(matches!(refused, RecoverError::Key(_)), "{refused}");
}

#[test]
fn a_copied_image_that_is_written_too_uses_another_key() {
    let bench = Bench::new();
    bench.write(&[(1, 11)]);
    let image = bench.disk.image();
    super::take_activations();
    bench.write(&[(2, 22)]);
    bench.disk.restore(image);
    bench.write(&[(2, 23)]);
    let keys = super::take_activations();
    assert_eq!(keys.len(), 2);
    assert_ne!(keys[0], keys[1]);
}

fn ring(bench: &Bench) -> Arc<SimRing> {
    let ring = SimRing::new();
    let id = recover(&*bench.disk, &material())
        .expect("opens")
        .superblock
        .id;
    ring::format_fresh(&*ring, &id).expect("large enough");
    ring
}

/// A card that was killed after it acknowledged block 1 = 12.
fn killed(bench: &Bench) -> Arc<SimRing> {
    bench.write(&[(1, 11)]);
    let ring = ring(bench);
    let mut running = bench.open().expect("opens");
    running.volume.attach(Some(ring.clone())).expect("attaches");
    running.write(1, 12).expect("writes");
    bench.disk.sync().expect("syncs");
    ring
}

#[test]
fn a_ring_brings_back_what_was_acknowledged() {
    let bench = Bench::new();
    let ring = killed(&bench);
    let mut running = bench.open().expect("opens");
    assert_eq!(running.read(1), Ok(11));
    running.volume.attach(Some(ring)).expect("attaches");
    assert_eq!(running.read(1), Ok(12));
}

#[test]
fn a_ring_of_an_earlier_life_is_refused_and_changes_nothing() {
    let bench = Bench::new();
    let ring = killed(&bench);
    bench.write(&[(1, 13)]);
    let running = bench.open().expect("opens");
    let refused = running.volume.attach(Some(ring)).expect_err("refused");
    assert!(
        matches!(refused, AttachError::StaleRing { .. }),
        "{refused}"
    );
    assert_eq!(running.volume.phase(), Phase::Opened);
    assert_eq!(bench.read(1), Ok(13));
}

#[test]
fn a_ring_of_another_volume_or_none_at_all_is_refused() {
    let (bench, other) = (Bench::new(), Bench::new());
    let foreign = killed(&other);
    let running = bench.open().expect("opens");
    let refused = running.volume.attach(Some(foreign)).err();
    assert!(matches!(
        refused,
        Some(AttachError::Ring(RingError::OtherVolume))
    ));
    let refused = running.volume.attach(Some(SimRing::new())).err();
    assert!(matches!(
        refused,
        Some(AttachError::Ring(RingError::NotARing))
    ));
}

#[test]
fn a_ring_whose_data_the_backing_does_not_have_is_refused() {
    let bench = Bench::new();
    let image = {
        bench.write(&[(1, 11)]);
        bench.disk.image()
    };
    let ring = ring(&bench);
    let mut running = bench.open().expect("opens");
    running.volume.attach(Some(ring.clone())).expect("attaches");
    running.write(1, 12).expect("writes");
    bench.disk.sync().expect("syncs");
    // The superblock of that activation with the data of before.
    let now = bench.disk.image();
    bench.disk.restore(image);
    for copy in COPIES {
        for block in 0..2 {
            let slot = copy / 4096 + block;
            bench.put(slot * 4096, &now[&slot][..]);
        }
    }
    let refused = bench.open().expect("opens").volume.attach(Some(ring)).err();
    assert!(
        matches!(refused, Some(AttachError::RingMismatch(1))),
        "{refused:?}"
    );
}

#[test]
fn a_forged_ring_record_is_not_taken() {
    let (mut taken, mut cut, mut refused) = (0, 0, 0);
    for at in (4096..4096 + 88).chain([0, 40, 50, 130, 140, 150, 168, 180, 192]) {
        let bench = Bench::new();
        let ring = killed(&bench);
        let mut byte = [0];
        ring.read(at, &mut byte);
        ring.write(at, &[byte[0] ^ 4]);
        let mut running = bench.open().expect("opens");
        match running.volume.attach(Some(ring)) {
            Ok(()) => match running.read(1) {
                Ok(12) => taken += 1,
                Ok(11) => cut += 1,
                other => panic!("byte {at}: {other:?}"),
            },
            Err(_) => refused += 1,
        }
    }
    // Of the header copy that does not count, some bytes do not matter; every byte of a record does.
    assert!(
        taken <= 3 && cut >= 88 && refused >= 3,
        "{taken} {cut} {refused}"
    );
}

#[test]
fn a_leaf_that_is_changed_while_the_volume_is_served_fails_its_blocks_only() {
    let bench = Bench::new();
    bench.write(&[(1, 11), (200, 33)]);
    let leaf = leaf_entry(&recover(&*bench.disk, &material()).expect("opens"), 0);
    let mut running = bench.serve();
    // Leaves are read when they are first needed, and this one is not yet.
    bench.disk.sync().expect("syncs");
    bench.disk.flip(leaf.slot().offset() + 17, 0);
    assert_eq!(running.read(1), Err(Failure::NotAuthentic));
    assert_eq!(running.write(2, 13), Err(Failure::NotAuthentic));
    assert_eq!(running.read(200), Ok(33));
    assert_eq!(running.write(201, 34), Ok(()));
    assert_eq!(running.not_authentic(), 2, "each is counted");
    // It is not held against the leaf: who mends the backing gets the block.
    bench.disk.sync().expect("syncs");
    bench.disk.flip(leaf.slot().offset() + 17, 0);
    assert_eq!(running.read(1), Ok(11));
    assert_eq!(running.write(2, 13), Ok(()));
    running.volume.close().expect("closes");
    assert_eq!(bench.read(2), Ok(13));
}

#[test]
fn an_old_leaf_put_back_while_the_volume_is_served_shows_nothing_old() {
    let bench = Bench::new();
    bench.write(&[(1, 11)]);
    let old = leaf_entry(&recover(&*bench.disk, &material()).expect("opens"), 0);
    let old = bench.sheet(old.slot().offset());
    bench.write(&[(1, 12)]);
    let now = leaf_entry(&recover(&*bench.disk, &material()).expect("opens"), 0);
    let mut running = bench.serve();
    bench.put(now.slot().offset(), &old);
    assert_eq!(running.read(1), Err(Failure::NotAuthentic));
    bench.put(now.slot().offset(), &vec![0; BLOCK_LEN]);
    assert_eq!(running.read(1), Err(Failure::NotAuthentic));
    // A discard of what is there would forget a slot; it fails as well.
    let discard = Op::Discard {
        offset: 4096,
        len: 4096,
    };
    assert_eq!(
        running.request(discard, Vec::new()),
        Err(Failure::NotAuthentic)
    );
}

#[test]
fn changes_in_the_log_of_a_leaf_that_is_lost_do_not_come_back_as_older_ones() {
    let bench = Bench::new();
    bench.write(&[(1, 11), (200, 33)]);
    let mut running = bench.serve();
    running.write(1, 12).expect("writes");
    running.request(Op::Flush, Vec::new()).expect("flushes");
    drop(running);
    bench.disk.sync().expect("syncs");
    let leaf = recover(&*bench.disk, &material()).expect("opens");
    let leaf = leaf_entry(&leaf, 0).slot().offset();
    bench.disk.flip(leaf + 17, 0);
    let mut running = bench.open().expect("opens");
    // It was damaged only while the log was replayed.
    bench.disk.flip(leaf + 17, 0);
    assert_eq!(running.read(1), Err(Failure::NotAuthentic));
    assert_eq!(running.read(200), Ok(33));
}

/// A volume that was killed with a change of block 1 in its log only, and the page above the leaves, or the
/// leaf, that the change belongs to: where it is stored and what it holds.
fn killed_with_a_change(level: usize) -> (Bench, u64, Vec<u8>) {
    let bench = Bench::new();
    bench.write(&[(1, 11), (2, 22), (200, 33)]);
    let mut running = bench.serve();
    running.write(1, 12).expect("writes");
    running.request(Op::Flush, Vec::new()).expect("flushes");
    drop(running);
    bench.disk.sync().expect("syncs");
    let recovered = recover(&*bench.disk, &material()).expect("opens");
    let place = PagePlace {
        tree: TreeKind::Map,
        level,
        index: 0,
    };
    let entry = recovered.map.stored_as(place).expect("its parent is here");
    let at = entry.slot().offset();
    let page = bench.sheet(at);
    (bench, at, page)
}

/// The log is gone after the next activation. Who breaks the leaf for as long as that takes, and puts it
/// back then, must not get the block back as it was before the change.
#[test]
fn a_page_put_back_after_its_changes_in_the_log_were_dropped_shows_nothing_old() {
    for level in 0..5 {
        let (bench, at, page) = killed_with_a_change(level);
        bench.disk.flip(at + 17, 0);
        let mut running = bench.serve();
        assert_eq!(running.read(1), Err(Failure::NotAuthentic), "level {level}");
        bench.put(at, &page);
        assert_eq!(running.read(1), Err(Failure::NotAuthentic), "level {level}");
        running.volume.close().expect("closes");
        for opening in 0..3 {
            bench.put(at, &page);
            let mut running = bench.serve();
            let read = running.read(1);
            assert_eq!(read, Err(Failure::NotAuthentic), "level {level}, {opening}");
            assert_eq!(running.read(2), Err(Failure::NotAuthentic));
            assert_eq!(running.write(1, 13), Err(Failure::NotAuthentic));
            running.volume.close().expect("closes");
        }
    }
}

#[test]
fn an_activation_that_is_tried_again_condemns_the_same_pages() {
    let (bench, at, page) = killed_with_a_change(0);
    bench.disk.flip(at + 17, 0);
    let mut recovered = recover(&*bench.disk, &material()).expect("opens");
    recovered.map.condemn();
    let backing: Arc<dyn Backing> = bench.disk.clone();
    let volume = Volume::new(recovered, backing, Box::new(Quiet));
    volume.attach(None).expect("attaches");
    volume.close().expect("closes");
    bench.put(at, &page);
    assert_eq!(bench.read(1), Err(Failure::NotAuthentic));
    assert_eq!(bench.read(200), Ok(33));
}

/// Seals a header anew, as only somebody with the volume's key can.
fn reseal(bench: &Bench, copies: &[u64], change: impl FnOnce(&mut Superblock)) {
    let recovered = recover(&*bench.disk, &material()).expect("opens");
    let mut superblock = recovered.superblock.clone();
    change(&mut superblock);
    superblock.sequence += 1 << 40;
    let session = recovered.keyring.get(superblock.session).expect("known");
    let image = superblock.seal(session);
    for copy in copies {
        bench.put(*copy, &image);
    }
}

#[test]
fn a_header_whose_key_slots_are_others_is_not_made_the_only_one() {
    let bench = Bench::new();
    bench.write(&[(1, 11)]);
    let generation = recover(&*bench.disk, &material())
        .expect("opens")
        .superblock
        .generation;
    let copy = COPIES[(generation % 2) as usize];
    reseal(&bench, &[copy], |superblock| {
        superblock.generation += 1;
        superblock.key_slots = [[0; SLOT_LEN]; KEY_SLOTS];
        superblock.key_slots[0] = [7; SLOT_LEN];
    });
    let error = bench.open().err().expect("refused");
    assert!(matches!(error, RecoverError::OtherKeySlots), "{error}");
}

#[test]
fn a_header_that_cannot_be_counted_on_from_is_not_written_to() {
    let bench = Bench::new();
    bench.write(&[(1, 11)]);
    reseal(&bench, &COPIES, |superblock| {
        superblock.generation = COUNTER_MAX
    });
    let mut running = bench.open().expect("opens");
    let refused = running.volume.attach(None);
    assert!(
        matches!(refused, Err(AttachError::CountersUsedUp)),
        "{refused:?}"
    );
    assert_eq!(running.read(1), Ok(11));
    drop(running);
    assert_eq!(bench.read(1), Ok(11), "and it can be opened again");
}

#[test]
fn a_header_that_counts_more_uses_of_a_key_than_there_can_be_is_served() {
    for live in [u64::MAX, i64::MAX as u64] {
        let bench = Bench::new();
        bench.write(&[(1, 11), (200, 33)]);
        // Not closed, so that the next one counts on from its log.
        let mut running = bench.serve();
        for (block, byte) in [(1, 12), (2, 13), (3, 14)] {
            running.write(block, byte).expect("writes");
        }
        running.request(Op::Flush, Vec::new()).expect("flushes");
        drop(running);
        reseal(&bench, &COPIES, |superblock| {
            superblock.table.iter_mut().for_each(|row| row.live = live);
        });
        bench.write(&[(1, 15), (2, 16)]);
        let blocks = [1, 2, 3, 200].map(|block| bench.read(block));
        assert_eq!(blocks, [Ok(15), Ok(16), Ok(14), Ok(33)]);
    }
}
