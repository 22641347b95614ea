//! Records that are written along with their data, before anybody asked for them.

use super::rig::{Rig, volume_on};
use super::world::small_geometry;
use crate::volume::backing::Backing as _;
use crate::volume::engine::{Failure, Io, IoKind, Op};
use crate::volume::geometry::BLOCK_LEN;
use crate::volume::mutant::{self, Mutant};

const EIO: i32 = 5;

/// Two blocks are there; lone writes are drafted.
fn drafting() -> Rig {
    let mut rig = Rig::serve(&volume_on(small_geometry()), None, 1);
    rig.write(0, 5, 1);
    rig.write(0, 9, 1);
    rig.run(|_| false);
    flush(&mut rig);
    rig.volume.shared().draft_always();
    // A lane learns it in its next turn.
    rig.turn();
    rig.done.clear();
    rig
}

fn flush(rig: &mut Rig) {
    rig.submit(0, Op::Flush);
    rig.run(|_| false);
}

fn is_sync(kind: &IoKind) -> bool {
    matches!(kind, IoKind::Sync(_))
}

/// Where the writes go that are held, outside of the log and in it.
fn held_writes(rig: &Rig) -> (Vec<u64>, Vec<u64>) {
    let log = rig.log();
    let offsets = rig.held.iter().filter_map(|(_, io)| match &io.kind {
        IoKind::Write { offset, .. } => Some(*offset),
        _ => None,
    });
    offsets.partition(|offset| !log.contains(offset))
}

/// What reading the two blocks gives after a death.
fn read_after(rig: Rig) -> Vec<Result<(), Failure>> {
    let disk = rig.disk.clone();
    drop(rig);
    let mut rig = Rig::serve(&disk, None, 1);
    for block in [5, 9] {
        rig.submit(
            0,
            Op::Read {
                offset: block * BLOCK_LEN as u64,
                len: BLOCK_LEN as u64,
            },
        );
        rig.run(|_| false);
    }
    rig.done
}

#[test]
fn a_lone_write_leaves_with_its_record_and_its_flush_needs_a_barrier_only() {
    let mut rig = drafting();
    for _ in 0..3 {
        rig.write(0, 5, 1);
        rig.turn();
        let (data, log) = held_writes(&rig);
        assert_eq!((data.len(), log.len()), (1, 1));
        rig.run(|_| false);
        rig.submit(0, Op::Flush);
        rig.turn();
        assert!(rig.held.iter().all(|(_, io)| is_sync(&io.kind)));
        assert_eq!(rig.held.len(), 1);
        rig.run(|_| false);
    }
    assert_eq!(rig.done, [Ok(()); 6]);
    assert_eq!(read_after(rig), [Ok(()); 2]);
}

#[test]
fn a_flush_waits_for_the_data_and_for_the_record_of_a_draft() {
    for late in [0, 1] {
        let mut rig = drafting();
        rig.write(0, 5, 1);
        rig.turn();
        rig.land(1 - late, None);
        // Something else to flush, which is written already.
        rig.write(0, 9, 1);
        rig.turn();
        let other = rig.held.len() - 1;
        rig.land(other, None);
        rig.submit(0, Op::Flush);
        rig.turn();
        assert_eq!(rig.held.len(), 1, "nothing of a commit");
        rig.run(|_| false);
        assert_eq!(rig.done, [Ok(()); 3]);
        assert_eq!(read_after(rig), [Ok(()); 2]);
    }
}

/// A draft, a write that joins it, and a flush; then the draft's data are gone, as a power cut before
/// the barrier ended may have it. What is read afterwards.
fn after_losing_a_drafts_data() -> Vec<Result<(), Failure>> {
    let mut rig = drafting();
    rig.write(0, 5, 1);
    rig.turn();
    let (data, _) = held_writes(&rig);
    rig.run(|_| false);
    rig.write(0, 9, 1);
    rig.run(|_| false);
    rig.submit(0, Op::Flush);
    rig.run(is_sync);
    rig.disk.sync().expect("syncs");
    rig.disk.flip(data[0], 3);
    read_after(rig)
}

#[test]
fn a_draft_without_its_data_is_dropped_with_the_commit_behind_it() {
    assert_eq!(after_losing_a_drafts_data(), [Ok(()); 2]);
    mutant::set(Some(Mutant::SkipDraft));
    let found = after_losing_a_drafts_data();
    mutant::set(None);
    assert_eq!(found, [Err(Failure::NotAuthentic), Ok(())]);
}

/// A draft whose block is written again: whether its slot is still taken before the commit, and after.
fn is_taken_after_a_second_write() -> (bool, bool) {
    let mut rig = drafting();
    rig.write(0, 5, 1);
    rig.turn();
    let (data, _) = held_writes(&rig);
    rig.run(|_| false);
    rig.write(0, 5, 1);
    rig.run(|_| false);
    let is_taken = |rig: &Rig| rig.volume.shared().is_taken(data[0]);
    let before = is_taken(&rig);
    flush(&mut rig);
    rig.turn();
    (before, is_taken(&rig))
}

#[test]
fn the_slot_of_a_draft_that_was_superseded_is_free_once_the_commit_is_durable() {
    assert_eq!(is_taken_after_a_second_write(), (true, false));
    mutant::set(Some(Mutant::DraftSlotFree));
    let found = is_taken_after_a_second_write();
    mutant::set(None);
    assert_eq!(found, (false, false));
}

#[test]
fn a_write_that_a_later_one_has_overtaken_is_not_drafted() {
    let mut rig = Rig::serve(&volume_on(small_geometry()), None, 2);
    rig.volume.shared().draft_always();
    rig.run(|_| false);
    rig.write(0, 5, 1);
    rig.lanes[0].on_wake();
    rig.lanes[0].advance();
    rig.write(1, 5, 1);
    while rig.step(1, |_, _| true) {}
    rig.submit(1, Op::Flush);
    while rig.step(1, |_, _| true) {}
    assert_eq!(rig.done, [Ok(()); 2]);
    rig.lanes[0].work(usize::MAX);
    rig.turn();
    let (data, log) = held_writes(&rig);
    assert_eq!((data.len(), log.len()), (1, 0));
    rig.run(|_| false);
}

#[test]
fn two_writes_of_a_block_that_leave_together_are_not_drafted() {
    let mut rig = drafting();
    rig.write(0, 5, 1);
    rig.write(0, 5, 1);
    rig.turn();
    let (data, log) = held_writes(&rig);
    assert_eq!((data.len(), log.len()), (1, 0));
    rig.run(|_| false);
}

#[test]
fn a_draft_whose_data_could_not_be_written_costs_later_commits_nothing() {
    let mut rig = drafting();
    rig.write(0, 5, 1);
    rig.turn();
    let is_data = |(_, io): &(usize, Io)| match &io.kind {
        IoKind::Write { offset, .. } => !rig.log().contains(offset),
        _ => false,
    };
    let data = rig.held.iter().position(is_data).expect("a data write");
    rig.land(data, Some(EIO));
    // Its record lands, too, and is voided without anybody asking.
    rig.turn();
    assert_eq!(rig.held.len(), 1);
    rig.land(0, None);
    rig.turn();
    assert_eq!(held_writes(&rig).1.len(), 1);
    rig.run(|_| false);
    rig.write(0, 9, 1);
    rig.run(|_| false);
    flush(&mut rig);
    assert_eq!(rig.done, [Err(Failure::Io(EIO)), Ok(()), Ok(())]);
    assert_eq!(read_after(rig), [Ok(()); 2]);
}
