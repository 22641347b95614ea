//! What happens when the backing fails, fills up or answers late: one test a case, and seeded
//! lives on a disk that does all of it.

use std::cell::RefCell;
use std::collections::HashSet;
use std::rc::Rc;
use std::sync::Arc;

use super::disk::SimDisk;
use super::rig::{Bytes, Faulty, Rig, fresh_ring, open, volume_on};
use super::world::{Dice, Quiet, SimRing, material, small_geometry};
use crate::volume::backing::Backing;
use crate::volume::engine::{
    AttachError, Failure, Io, IoKind, Lane, Op, Phase, Volume, VolumeError,
};
use crate::volume::entry::Entry;
use crate::volume::geometry::{BLOCK_LEN, CHUNK_SLOTS, FANOUT, Geometry, Slot};
use crate::volume::map::PAGE_COST;
use crate::volume::mutant::{self, Mutant};
use crate::volume::page::{PagePlace, TreeKind};
use crate::volume::recover::{recover, recover_within};
use crate::volume::superblock::COPIES;

const EIO: i32 = 5;

fn is_log(log: &std::ops::Range<u64>, kind: &IoKind) -> bool {
    matches!(kind, IoKind::Write { offset, .. } if log.contains(offset))
}

pub(super) fn is_superblock(kind: &IoKind) -> bool {
    matches!(kind, IoKind::Write { offset, .. } if COPIES.contains(offset))
}

#[test]
fn slots_that_the_delta_ring_names_are_not_reused_before_a_discard_is_committed() {
    let disk = volume_on(small_geometry());
    let ring = fresh_ring(&disk, 1 << 20);
    let mut rig = Rig::serve(&disk, Some(ring.clone()), 1);
    let log = rig.log();
    rig.write(0, 1, 1);
    rig.run(|_| false);
    // The commit of the discard is under way, no further.
    rig.submit(
        0,
        Op::Discard {
            offset: 4096,
            len: 4096,
        },
    );
    rig.run(|kind| is_log(&log, kind));
    assert_eq!(rig.held.len(), 1);
    // Much is written meanwhile: every free slot comes into use once.
    for _ in 0..60 {
        rig.write(0, 100, 64);
        rig.run(|kind| is_log(&log, kind));
    }
    drop(rig);
    disk.sync().expect("syncs");
    // Killed here. The guest's region still has the write of block 1.
    open(&disk).attach(Some(ring)).expect("the ring fits");
}

#[test]
fn slots_that_the_delta_ring_names_are_not_reused_after_a_write_that_it_had_no_room_for() {
    let disk = volume_on(Geometry {
        chunks: 2 + 1 + 3,
        ..small_geometry()
    });
    let ring = fresh_ring(&disk, 8 << 10);
    let mut rig = Rig::serve(&disk, Some(ring.clone()), 1);
    let log = rig.log();
    // The first fits into the ring, the others do not: commits stand still.
    rig.write(0, 100, 64);
    rig.run(|_| false);
    for _ in 0..60 {
        rig.write(0, 100, 64);
        rig.run(|kind| is_log(&log, kind));
    }
    drop(rig);
    disk.sync().expect("syncs");
    open(&disk).attach(Some(ring)).expect("the ring fits");
}

#[test]
fn an_activation_that_failed_while_writing_is_not_built_upon() {
    for writes_left in 0..4 {
        let disk = volume_on(small_geometry());
        let ring = fresh_ring(&disk, 1 << 20);
        let mut rig = Rig::serve(&disk, Some(ring.clone()), 1);
        rig.write(0, 1, 3);
        rig.run(|_| false);
        drop(rig);
        disk.sync().expect("syncs");
        let backing = Faulty::over(&disk);
        let recovered = recover(&*disk, &material()).expect("opens");
        let volume = Volume::new(recovered, backing.clone(), Box::new(Quiet));
        *backing.writes_left.lock().expect("no panic") = Some(writes_left);
        let first = volume.attach(Some(ring.clone()));
        *backing.writes_left.lock().expect("no panic") = None;
        if first.is_ok() {
            continue;
        }
        assert!(
            matches!(volume.attach(Some(ring.clone())), Err(AttachError::Failed)),
            "after {writes_left} writes"
        );
        // A new process finds everything.
        open(&disk).attach(Some(ring)).expect("attaches");
        let found = recover(&*disk, &material()).expect("opens");
        assert!(found.lost_pages(&*disk).is_empty());
        assert_eq!(found.blocks(&*disk).len(), 3);
    }
}

#[test]
fn a_failed_barrier_ends_writing_for_good() {
    let disk = volume_on(small_geometry());
    let backing = Faulty::over(&disk);
    let recovered = recover(&*disk, &material()).expect("opens");
    let volume = Volume::new(recovered, backing.clone(), Box::new(Quiet));
    volume.attach(None).expect("attaches");
    let mut lane: Lane<Bytes> = Lane::new(Arc::clone(volume.shared()), Arc::new(|| {}));
    let mut request = |op: Op| {
        lane.submit(op, Bytes(Rc::new(RefCell::new(vec![7; BLOCK_LEN]))));
        lane.on_wake();
        crate::volume::engine::drive(&mut lane, &*backing);
        lane.next_done().expect("it does not hang").result
    };
    let write = Op::Write {
        offset: 0,
        len: 4096,
        durable: false,
    };
    assert_eq!(request(write), Ok(()));
    *backing.fails_sync.lock().expect("no panic") = true;
    assert_eq!(request(Op::Flush), Err(Failure::Poisoned));
    // The backing says that all is well again, as a kernel that dropped the pages does.
    *backing.fails_sync.lock().expect("no panic") = false;
    assert_eq!(request(Op::Flush), Err(Failure::Poisoned));
    assert_eq!(request(write), Err(Failure::Poisoned));
    let read = Op::Read {
        offset: 0,
        len: 4096,
    };
    assert_eq!(request(read), Ok(()), "what was acknowledged is readable");
    assert!(matches!(
        volume.settle(),
        Err(VolumeError::Flush(Failure::Poisoned))
    ));
    assert!(volume.close().is_err());
    assert!(matches!(volume.attach(None), Err(AttachError::Failed)));
}

#[test]
fn a_close_that_failed_while_writing_is_not_tried_again() {
    let disk = volume_on(small_geometry());
    let backing = Faulty::over(&disk);
    let recovered = recover(&*disk, &material()).expect("opens");
    let volume = Volume::new(recovered, backing.clone(), Box::new(Quiet));
    volume.attach(None).expect("attaches");
    let mut lane: Lane<Bytes> = Lane::new(Arc::clone(volume.shared()), Arc::new(|| {}));
    let write = Op::Write {
        offset: 0,
        len: 4096,
        durable: true,
    };
    lane.submit(write, Bytes(Rc::new(RefCell::new(vec![7; BLOCK_LEN]))));
    crate::volume::engine::drive(&mut lane, &*backing);
    *backing.writes_left.lock().expect("no panic") = Some(0);
    assert!(volume.close().is_err());
    *backing.writes_left.lock().expect("no panic") = None;
    assert!(volume.close().is_err(), "pages are missing");
    disk.sync().expect("syncs");
    let found = recover(&*disk, &material()).expect("opens");
    assert!(found.lost_pages(&*disk).is_empty());
    assert_eq!(found.blocks(&*disk).len(), 1);
}

#[test]
fn a_checkpoint_under_way_ends_when_a_commit_fails() {
    let disk = volume_on(small_geometry());
    let mut rig = Rig::serve(&disk, None, 1);
    let log = rig.log();
    let is_page = |kind: &IoKind| {
        matches!(kind, IoKind::Write { offset, buffer, .. }
            if !log.contains(offset) && *offset >= log.start && buffer.blocks() > 1)
    };
    let mut commits = 0;
    while !rig.held.iter().any(|(_, io)| is_page(&io.kind)) {
        rig.write(0, 1, 1);
        rig.submit(0, Op::Flush);
        rig.run(is_page);
        commits += 1;
        assert!(commits < 1000, "no checkpoint comes");
    }
    rig.write(0, 1, 1);
    rig.run(is_page);
    rig.submit(0, Op::Flush);
    rig.run(|kind| is_page(kind) || is_log(&log, kind));
    let record = rig
        .held
        .iter()
        .position(|(_, io)| is_log(&log, &io.kind))
        .expect("a commit is under way");
    rig.land(record, Some(EIO));
    rig.run(|_| false);
    assert_eq!(rig.done.last(), Some(&Err(Failure::Poisoned)));
    assert!(rig.is_idle(), "a job is never over");
}

#[test]
fn a_discard_of_everything_takes_bounded_memory() {
    let disk = volume_on(Geometry::for_volume(1 << 40).expect("size"));
    let mut rig = Rig::serve(&disk, None, 1);
    let mut most = 0;
    rig.submit(
        0,
        Op::Discard {
            offset: 0,
            len: 1 << 40,
        },
    );
    rig.turn();
    most = most.max(rig.lanes[0].peak_pieces());
    rig.run(|_| false);
    assert_eq!(rig.done, [Ok(())]);
    assert!(most <= 1024, "{most} pieces at a time");
}

#[test]
fn more_deltas_than_the_log_can_hold_are_not_gathered() {
    let disk = volume_on(Geometry {
        blocks: 32 << 10,
        chunks: 400,
        log_chunks: 1,
    });
    let mut rig = Rig::serve(&disk, None, 1);
    let log = rig.log();
    rig.write(0, 0, 1);
    rig.submit(0, Op::Flush);
    rig.run(|kind| is_log(&log, kind));
    for first in (0..32 << 10).step_by(64) {
        rig.write(0, first, 64);
    }
    rig.run(|kind| is_log(&log, kind));
    rig.submit(0, Op::Flush);
    rig.run(|_| false);
    assert_eq!(rig.done.len(), 1 + 1 + 512 + 1, "requests hang");
    assert!(rig.is_idle());
}

#[test]
fn a_checkpoint_has_room_for_bitmaps_far_apart() {
    let geometry = Geometry {
        blocks: 512,
        chunks: FANOUT * 320,
        log_chunks: 1,
    };
    let disk = volume_on(geometry);
    let mut recovered = recover(&*disk, &material()).expect("opens");
    // Few leaves of the map, each block far from the next: a log that was replayed leaves such.
    for block in 0..300 {
        let slot = Slot((block + 1) * FANOUT * CHUNK_SLOTS);
        let entry = Entry::new(slot, 1, 100 + block, [1; 16]);
        let page = recovered.map.leaf_mut(block / FANOUT).expect("known");
        page.set_entry(block, entry);
        recovered.space.set_used(slot, true);
    }
    let backing: Arc<dyn Backing> = disk.clone();
    let volume = Volume::new(recovered, backing, Box::new(Quiet));
    volume.attach(None).expect("attaches");
    assert_eq!(volume.phase(), Phase::Serving);
}

#[test]
fn a_damaged_bitmap_is_made_anew_from_the_map() {
    let disk = volume_on(small_geometry());
    let mut rig = Rig::serve(&disk, None, 1);
    rig.write(0, 1, 40);
    rig.run(|_| false);
    rig.volume.close().expect("closes");
    let bitmap = recover(&*disk, &material())
        .expect("opens")
        .space
        .leaf_entry(0);
    disk.flip(bitmap.slot().offset() + 9, 1);
    let mut rig = Rig::serve(&disk, None, 1);
    rig.write(0, 100, 1);
    rig.run(|_| false);
    rig.volume.close().expect("closes");
    let found = recover(&*disk, &material()).expect("opens");
    assert!(found.space.damaged().is_empty());
    let mapped: HashSet<Slot> = found
        .blocks(&*disk)
        .into_iter()
        .map(|(_, entry)| entry.slot())
        .collect();
    let used: HashSet<Slot> = found.used_slots().collect();
    assert_eq!(mapped, used);
}

#[test]
fn a_lane_that_ends_gives_its_slots_back() {
    let disk = volume_on(small_geometry());
    let rig = Rig::serve(&disk, None, 0);
    // Five chunks are there for data.
    for block in 0..20 {
        let mut lane: Lane<Bytes> = Lane::new(Arc::clone(rig.volume.shared()), Arc::new(|| {}));
        let op = Op::Write {
            offset: block * 4096,
            len: 4096,
            durable: true,
        };
        lane.submit(op, Bytes(Rc::new(RefCell::new(vec![7; BLOCK_LEN]))));
        crate::volume::engine::drive(&mut lane, &*disk);
        assert_eq!(lane.next_done().expect("done").result, Ok(()));
    }
}

#[test]
fn an_overtaken_write_that_the_delta_ring_names_keeps_its_slot_until_the_commit() {
    let disk = volume_on(Geometry {
        chunks: 2 + 1 + 3,
        ..small_geometry()
    });
    let ring = fresh_ring(&disk, 8 << 10);
    let mut rig = Rig::serve(&disk, Some(ring.clone()), 1);
    let log = rig.log();
    rig.write(0, 100, 64);
    rig.run(|_| false);
    // An earlier write of block 1 lands after a later one. The ring has room for the earlier one
    // only, which is thereby acknowledged.
    for count in [1, 64] {
        rig.write(0, 1, count);
        rig.turn();
    }
    assert_eq!(rig.held.len(), 2);
    rig.land(1, None);
    rig.turn();
    rig.land(0, None);
    rig.run(|kind| is_log(&log, kind));
    for _ in 0..5 {
        rig.write(0, 100, 64);
        rig.run(|kind| is_log(&log, kind));
    }
    for block in 170..250 {
        rig.write(0, block, 1);
        rig.run(|kind| is_log(&log, kind));
    }
    drop(rig);
    disk.sync().expect("syncs");
    open(&disk).attach(Some(ring)).expect("the ring fits");
}

/// Many leaves, so that a few hundred blocks need more page slots than an activation gets.
fn many_leaves(chunks: u64) -> Geometry {
    Geometry {
        blocks: 1 << 20,
        chunks: 2 + 1 + chunks,
        log_chunks: 1,
    }
}

impl Rig {
    /// One block in each of many leaves. No room is given for pages. How many writes succeeded?
    fn spread(&mut self) -> usize {
        let before = self.done.len();
        for leaf in 0..600 {
            self.write(0, leaf * FANOUT, 1);
            for _ in 0..1000 {
                self.turn();
                match self.held.first().map(|(_, io)| &io.kind) {
                    Some(IoKind::Allocate { .. }) => self.land(0, Some(28)),
                    Some(_) => self.land(0, None),
                    None => break,
                }
            }
        }
        assert_eq!(self.done.len(), before + 600, "requests hang");
        self.done[before..]
            .iter()
            .filter(|result| result.is_ok())
            .count()
    }
}

#[test]
fn without_room_for_pages_writes_fail_and_go_on_when_there_is_some_again() {
    let disk = volume_on(many_leaves(40));
    let mut rig = Rig::serve(&disk, None, 1);
    let done = rig.spread();
    assert!((1..600).contains(&done), "{done}");
    rig.submit(0, Op::Flush);
    rig.run(|_| false);
    let before = rig.done.len();
    for leaf in 0..600 {
        rig.write(0, leaf * FANOUT, 1);
    }
    rig.run(|_| false);
    assert!(rig.is_idle());
    assert!(
        rig.done[before..].iter().all(Result::is_ok),
        "room is not looked for again"
    );
}

#[test]
fn without_slots_for_pages_writes_fail_and_do_not_hang() {
    let disk = volume_on(many_leaves(2));
    let mut rig = Rig::serve(&disk, None, 1);
    let done = rig.spread();
    assert!((1..600).contains(&done), "{done}");
    assert!(rig.is_idle());
}

#[test]
fn what_is_mapped_can_be_overwritten_for_ever_without_more_room_for_pages() {
    let disk = volume_on(many_leaves(40));
    let mut rig = Rig::serve(&disk, None, 1);
    for _ in 0..30 {
        for leaf in 0..40 {
            rig.write(0, leaf * 3 * FANOUT, 1);
            rig.run(|_| false);
        }
    }
    let mapped = rig.spread();
    let before = rig.done.len();
    for _ in 0..3 {
        for leaf in 0..40 {
            rig.write(0, leaf * 3 * FANOUT, 1);
            for _ in 0..1000 {
                rig.turn();
                match rig.held.first().map(|(_, io)| &io.kind) {
                    Some(IoKind::Allocate { .. }) => rig.land(0, Some(28)),
                    Some(_) => rig.land(0, None),
                    None => break,
                }
            }
        }
    }
    let failed = rig.done[before..]
        .iter()
        .filter(|result| result.is_err())
        .count();
    assert_eq!(failed, 0, "of 120, with {mapped} leaves more");
}

impl Rig {
    /// Goes on until nothing moves. No room is given for pages; whether some was asked for.
    fn run_full(&mut self) -> bool {
        let mut has_asked = false;
        for _ in 0..100_000 {
            self.turn();
            match self.held.first().map(|(_, io)| &io.kind) {
                Some(IoKind::Allocate { .. }) => {
                    has_asked = true;
                    self.land(0, Some(28));
                }
                Some(_) => self.land(0, None),
                None => return has_asked,
            }
        }
        panic!("it never comes to rest");
    }
}

#[test]
fn what_was_written_last_before_the_backing_was_full_can_be_overwritten_for_ever() {
    let disk = volume_on(many_leaves(40));
    let mut rig = Rig::serve(&disk, None, 1);
    // As many leaves as there are page slots for, so that nothing waits.
    let mut mapped = 0;
    while mapped < 90 {
        rig.write(0, mapped * FANOUT, 1);
        mapped += 1;
        if rig.run_full() {
            break;
        }
    }
    assert!(mapped > 30, "{mapped}");
    rig.submit(0, Op::Flush);
    rig.run_full();
    for round in 1..5 {
        // A checkpoint begins while every leaf has another change, which is not committed.
        for leaf in 0..mapped {
            rig.write(0, leaf * FANOUT, 1);
        }
        rig.run_full();
        let size = (4 << 30) + (round << 20);
        rig.volume.begin_grow(size).expect("begins");
        rig.run_full();
        rig.submit(0, Op::Flush);
        rig.run_full();
        assert!(rig.volume.has_grown().expect("is well"), "it never grows");
    }
    assert_eq!(rig.done.len() as u64, 5 * (mapped + 1));
    let failed = rig.done.iter().filter(|result| result.is_err()).count();
    assert_eq!(failed, 0, "of {mapped} leaves, five times");
    rig.volume.close().expect("closes");
}

#[test]
fn no_superblock_is_written_after_the_barrier_of_a_growing_volume_failed() {
    let disk = volume_on(small_geometry());
    let backing = Faulty::over(&disk);
    let recovered = recover(&*disk, &material()).expect("opens");
    let volume = Volume::new(recovered, backing.clone(), Box::new(Quiet));
    volume.attach(None).expect("attaches");
    let lanes = vec![Lane::new(Arc::clone(volume.shared()), Arc::new(|| {}))];
    let mut rig = Rig {
        disk: Arc::clone(&disk),
        volume,
        lanes,
        held: Vec::new(),
        done: Vec::new(),
    };
    let is_sync = |kind: &IoKind| matches!(kind, IoKind::Sync(_));
    for round in 1..=1000 {
        rig.write(0, round % 8, 1);
        rig.submit(0, Op::Flush);
        rig.run(is_sync);
        while rig.done.len() < 2 * round as usize {
            rig.land(0, None);
            rig.run(is_sync);
        }
        if !rig.held.is_empty() {
            break;
        }
    }
    assert!(!rig.held.is_empty(), "the barrier of a checkpoint");
    *backing.fails_sync.lock().expect("no panic") = true;
    assert!(rig.volume.begin_grow(3 << 20).is_err());
    rig.run(is_superblock);
    assert!(
        rig.held.is_empty(),
        "a superblock names pages that may be lost"
    );
}

fn leaf_offset(disk: &Arc<SimDisk>, index: u64) -> u64 {
    let place = PagePlace {
        tree: TreeKind::Map,
        level: 0,
        index,
    };
    let recovered = recover(&**disk, &material()).expect("opens");
    let entry = recovered.map.stored_as(place).expect("its parent is here");
    entry.slot().offset()
}

/// A volume of three hundred leaves under three pages of level 1, each with one block.
fn spread_out() -> Arc<SimDisk> {
    let disk = volume_on(many_leaves(40));
    let mut rig = Rig::serve(&disk, None, 1);
    for leaf in 0..300 {
        rig.write(0, leaf * FANOUT, 1);
    }
    rig.run(|_| false);
    assert!(rig.done.iter().all(Result::is_ok));
    rig.volume.close().expect("closes");
    disk
}

fn serve_within(disk: &Arc<SimDisk>, pages: u64, lanes: usize) -> Rig {
    let recovered = recover_within(&**disk, &material(), pages * PAGE_COST).expect("opens");
    let backing: Arc<dyn Backing> = disk.clone();
    let volume = Volume::new(recovered, backing, Box::new(Quiet));
    volume.attach(None).expect("attaches");
    let lanes = (0..lanes)
        .map(|_| Lane::new(Arc::clone(volume.shared()), Arc::new(|| {})))
        .collect();
    Rig {
        disk: Arc::clone(disk),
        volume,
        lanes,
        held: Vec::new(),
        done: Vec::new(),
    }
}

impl Rig {
    fn read(&mut self, lane: usize, block: u64) {
        self.submit(
            lane,
            Op::Read {
                offset: block * BLOCK_LEN as u64,
                len: BLOCK_LEN as u64,
            },
        );
    }

    fn pages(&self) -> u64 {
        let stats = self.volume.shared().stats();
        stats.map_pages.load(std::sync::atomic::Ordering::Relaxed)
    }

    fn misses(&self) -> u64 {
        let stats = self.volume.shared().stats();
        stats.map_misses.load(std::sync::atomic::Ordering::Relaxed)
    }
}

#[test]
fn a_leaf_that_cannot_be_read_fails_its_requests_and_is_tried_again() {
    let disk = spread_out();
    let leaf = leaf_offset(&disk, 3);
    let mut rig = Rig::serve(&disk, None, 2);
    rig.read(0, 3 * FANOUT);
    rig.write(1, 3 * FANOUT + 1, 1);
    rig.read(0, 4 * FANOUT);
    rig.turn();
    let is_leaf = |kind: &IoKind| matches!(kind, IoKind::Read { offset, .. } if *offset == leaf);
    assert_eq!(rig.held.len(), 2, "two wait for the same read");
    let at = rig.held.iter().position(|(_, io)| is_leaf(&io.kind));
    rig.land(at.expect("it is being read"), Some(EIO));
    rig.run(|_| false);
    let failed = rig.done.iter().filter(|r| **r == Err(Failure::Io(EIO)));
    assert_eq!((failed.count(), rig.done.len()), (2, 3));
    rig.write(1, 3 * FANOUT + 1, 1);
    rig.read(0, 3 * FANOUT);
    rig.run(|_| false);
    assert_eq!(rig.done[3..], [Ok(()), Ok(())]);
}

#[test]
fn whoever_waits_for_a_page_of_a_lane_that_ends_reads_it_himself() {
    let disk = spread_out();
    let leaf = leaf_offset(&disk, 3);
    let mut rig = Rig::serve(&disk, None, 2);
    rig.read(0, 3 * FANOUT);
    rig.turn();
    rig.read(1, 3 * FANOUT);
    rig.turn();
    assert_eq!(rig.held.len(), 1);
    rig.held.clear();
    drop(rig.lanes.remove(0));
    rig.turn();
    assert!(
        matches!(&rig.held[..], [(0, Io { kind: IoKind::Read { offset, .. }, .. })] if *offset == leaf)
    );
    rig.run(|_| false);
    assert_eq!(rig.done, [Ok(())]);
}

#[test]
fn a_volume_opens_without_its_leaves_and_is_served_within_its_budget() {
    let disk = spread_out();
    let mut rig = serve_within(&disk, 40, 1);
    let at_first = rig.misses();
    for round in 0..3 {
        for leaf in 0..300 {
            rig.read(0, leaf * FANOUT);
            rig.run(|_| false);
            assert!(rig.pages() <= 42, "{} pages in round {round}", rig.pages());
        }
    }
    assert!(rig.done.iter().all(Result::is_ok));
    assert!(rig.misses() - at_first >= 600, "they do not fit");
    // Many at a time, all at once.
    for leaf in 0..300 {
        rig.read(0, leaf * FANOUT);
    }
    rig.run(|_| false);
    assert!(rig.done.iter().all(Result::is_ok));
    rig.read(0, 0);
    rig.run(|_| false);
    assert!(rig.pages() <= 42);
}

#[test]
fn writes_that_would_pin_more_than_the_budget_wait_for_a_checkpoint() {
    let disk = spread_out();
    let mut rig = serve_within(&disk, 80, 2);
    let mut most = 0;
    for leaf in 0..900 {
        rig.write(leaf as usize % 2, leaf * FANOUT + 1, 1);
    }
    for _ in 0..100_000 {
        rig.turn();
        most = most.max(rig.pages());
        if rig.held.is_empty() {
            break;
        }
        rig.land(rig.held.len() / 2, None);
    }
    assert_eq!(rig.done.len(), 900, "requests hang");
    assert!(rig.done.iter().all(Result::is_ok));
    assert!(most <= 80 + 8, "{most} pages");
    rig.volume.close().expect("closes");
    let found = recover(&*disk, &material()).expect("opens");
    assert!(found.lost_pages(&*disk).is_empty());
    assert_eq!(found.blocks(&*disk).len(), 300 + 900);
}

#[test]
fn a_page_that_cannot_be_read_does_not_keep_a_volume_from_opening() {
    let disk = spread_out();
    let upper = |level| PagePlace {
        tree: TreeKind::Map,
        level,
        index: 0,
    };
    let recovered = recover(&*disk, &material()).expect("opens");
    let at = |level| {
        let entry = recovered.map.stored_as(upper(level));
        entry.expect("is here").slot().offset()
    };
    // A leaf: everything but its blocks. A page above: reads only. A bitmap: the map knows.
    for (bad, attaches, other_reads) in [
        (at(0), true, true),
        (at(1), false, true),
        (at(4), false, false),
        (recovered.space.leaf_entry(0).slot().offset(), true, true),
    ] {
        let backing = Faulty::over(&disk);
        backing.unreadable.lock().expect("no panic").push(bad);
        let image = disk.image();
        let found = recover(&*backing, &material()).expect("opens");
        let volume = Volume::new(found, backing.clone(), Box::new(Quiet));
        let mut lane: Lane<Bytes> = Lane::new(Arc::clone(volume.shared()), Arc::new(|| {}));
        let mut read = |block: u64| {
            let op = Op::Read {
                offset: block * BLOCK_LEN as u64,
                len: BLOCK_LEN as u64,
            };
            lane.submit(op, Bytes(Rc::new(RefCell::new(vec![7; BLOCK_LEN]))));
            crate::volume::engine::drive(&mut lane, &*backing);
            lane.next_done().expect("done").result.is_ok()
        };
        assert_eq!(read(200 * FANOUT), other_reads);
        let attached = volume.attach(None);
        match attached {
            Ok(()) => assert!(attaches),
            Err(AttachError::Unreadable) => assert!(!attaches),
            Err(other) => panic!("{other}"),
        }
        disk.sync().expect("syncs");
        disk.restore(image);
    }
}

/// A ring that went around once and is empty: at its tail lies a record of the lap before, of a
/// write that a discard has undone since.
fn ring_with_a_released_record(disk: &Arc<SimDisk>) -> Arc<SimRing> {
    // Room for 46 records of one block.
    let ring = fresh_ring(disk, 8 << 10);
    let mut rig = Rig::serve(disk, Some(ring.clone()), 1);
    let mut write = |block: u64, then: Op| {
        rig.write(0, block, 1);
        rig.run(|_| false);
        rig.submit(0, then);
        rig.run(|_| false);
    };
    write(1, Op::Flush);
    write(
        5,
        Op::Discard {
            offset: 5 * BLOCK_LEN as u64,
            len: BLOCK_LEN as u64,
        },
    );
    for _ in 2..=46 {
        write(1, Op::Flush);
    }
    assert!(rig.done.iter().all(Result::is_ok));
    drop(rig);
    disk.sync().expect("syncs");
    ring
}

#[test]
fn a_write_that_a_discard_undid_does_not_come_back_from_the_delta_ring() {
    let disk = volume_on(small_geometry());
    let ring = ring_with_a_released_record(&disk);
    open(&disk).attach(Some(ring)).expect("the ring fits");
    let found = recover(&*disk, &material()).expect("opens");
    assert_eq!(found.blocks(&*disk).len(), 1);
}

#[test]
fn replaying_committed_ring_records_is_noticed() {
    let disk = volume_on(small_geometry());
    let ring = ring_with_a_released_record(&disk);
    mutant::set(Some(Mutant::ReplayAllRing));
    let attached = open(&disk).attach(Some(ring));
    mutant::set(None);
    let found = recover(&*disk, &material()).expect("opens");
    assert!(attached.is_err() || found.blocks(&*disk).len() > 1);
}

/// A card dies when its checkpoint's superblock is written and not durable yet; the next one is at its
/// activation when the power goes. Whether all is there.
fn outlives_a_cut_in_an_activation(seed: u64) -> bool {
    let mut dice = Dice::new(seed);
    let disk = volume_on(small_geometry());
    let mut rig = Rig::serve(&disk, None, 1);
    rig.write(0, 1, 8);
    rig.run(|_| false);
    rig.volume.close().expect("closes");
    let mut rig = Rig::serve(&disk, None, 1);
    rig.write(0, 1, 8);
    rig.run(|_| false);
    rig.submit(0, Op::Flush);
    rig.run(|_| false);
    rig.volume.begin_grow(2 << 20).expect("begins");
    rig.run(is_superblock);
    assert_eq!(rig.held.len(), 1, "the superblock");
    rig.land(0, None);
    // No barrier completes any more. The log has something for the next activation to write.
    let is_sync = |kind: &IoKind| matches!(kind, IoKind::Sync(_));
    rig.write(0, 20, 4);
    rig.run(is_sync);
    rig.submit(0, Op::Flush);
    rig.run(is_sync);
    drop(rig);
    let next = open(&disk);
    disk.set_fuse(Some(1 + dice.below(6) as u32));
    let _ = next.attach(None);
    disk.cut_power(&mut dice);
    disk.set_fuse(None);
    recover(&*disk, &material())
        .is_ok_and(|found| found.missing_pages() == 0 && found.blocks(&*disk).len() >= 8)
}

#[test]
fn an_activation_makes_what_it_found_durable_before_it_writes() {
    assert!((0..200).all(outlives_a_cut_in_an_activation));
}

#[test]
fn an_activation_without_a_first_barrier_is_noticed() {
    mutant::set(Some(Mutant::NoFirstBarrier));
    let is_unnoticed = (0..200).all(outlives_a_cut_in_an_activation);
    mutant::set(None);
    assert!(!is_unnoticed);
}
