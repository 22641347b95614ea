//! Steps that must not come before others, shown with a backing that answers when the test says so:
//! a schedule that chance seldom finds.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use super::fault_tests::is_superblock;
use super::rig::{Bytes, Rig, volume_on};
use super::world::{material, small_geometry};
use crate::volume::engine::Op;
use crate::volume::geometry::BLOCK_LEN;
use crate::volume::mutant::{self, Mutant};
use crate::volume::recover::recover;

const BLOCK: u64 = BLOCK_LEN as u64;

fn read(rig: &mut Rig, offset: u64, len: usize) -> Vec<u8> {
    let memory = Rc::new(RefCell::new(vec![0xee; len]));
    let op = Op::Read {
        offset,
        len: len as u64,
    };
    rig.lanes[0].submit(op, Bytes(Rc::clone(&memory)));
    rig.run(|_| false);
    assert_eq!(rig.done.last(), Some(&Ok(())));
    memory.take()
}

/// Writes and flushes while the superblock of a checkpoint is on its way, as long as that goes, then dies
/// without it. Whether all that was flushed is there.
fn outlives_a_checkpoint_that_hangs(mutant: Option<Mutant>) -> bool {
    mutant::set(mutant);
    let disk = volume_on(small_geometry());
    let mut rig = Rig::serve(&disk, None, 1);
    let mut flushed = HashMap::new();
    for round in 0..600 {
        let (block, before) = (round % 200, rig.done.len());
        rig.write(0, block, 1);
        rig.run(is_superblock);
        // A flush covers what was answered before it.
        if rig.done.len() == before + 1 {
            rig.submit(0, Op::Flush);
            rig.run(is_superblock);
        }
        if rig.done.len() < before + 2 {
            // What this block holds now, nobody was told.
            flushed.remove(&block);
            break;
        }
        flushed.insert(block, (before % 251) as u8);
    }
    let has_hung = rig.held.iter().any(|(_, io)| is_superblock(&io.kind));
    assert!(has_hung, "no checkpoint came");
    assert!(rig.done.iter().all(Result::is_ok));
    drop(rig);
    mutant::set(None);
    if !recover(&*disk, &material()).is_ok_and(|found| found.missing_pages() == 0) {
        return false;
    }
    let mut rig = Rig::serve(&disk, None, 1);
    flushed
        .iter()
        .all(|(block, byte)| read(&mut rig, block * BLOCK, 1 << 12) == [*byte; BLOCK_LEN])
}

#[test]
fn the_log_is_not_used_again_before_the_superblock_that_gives_it_up_is_durable() {
    assert!(outlives_a_checkpoint_that_hangs(None));
}

#[test]
fn using_the_log_again_too_early_is_noticed() {
    assert!(!outlives_a_checkpoint_that_hangs(Some(
        Mutant::EarlyLogFree
    )));
}

/// Two queues write different sectors of one block at the same time. Whether both are there.
fn keeps_both_sectors(mutant: Option<Mutant>) -> bool {
    mutant::set(mutant);
    let mut rig = Rig::serve(&volume_on(small_geometry()), None, 2);
    rig.write(0, 7, 1);
    rig.run(|_| false);
    for lane in [0, 1] {
        let op = Op::Write {
            offset: 7 * BLOCK + lane as u64 * 512,
            len: 512,
            durable: false,
        };
        rig.submit(lane, op);
    }
    // Whatever can begin has begun before anything ends.
    rig.turn();
    rig.run(|_| false);
    assert_eq!(rig.done, [Ok(()); 3]);
    mutant::set(None);
    let block = read(&mut rig, 7 * BLOCK, BLOCK_LEN);
    block[..1024] == [1; 1024] && block[1024..] == [0; 3072]
}

#[test]
fn parts_of_a_block_that_are_written_at_the_same_time_are_both_there() {
    assert!(keeps_both_sectors(None));
}

#[test]
fn partial_writes_that_share_their_block_are_noticed() {
    assert!(!keeps_both_sectors(Some(Mutant::SharedRanges)));
}
