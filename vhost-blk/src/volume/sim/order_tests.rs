//! Steps that must not come before others, shown with a backing that answers when the test says so:
//! a schedule that chance seldom finds.

use std::cell::RefCell;
use std::rc::Rc;

use super::rig::{Bytes, Rig, volume_on};
use super::world::small_geometry;
use crate::volume::engine::Op;
use crate::volume::geometry::BLOCK_LEN;
use crate::volume::mutant::{self, Mutant};

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
