//! Where writes go: how they are gathered and what is moved afterwards.

use std::sync::Arc;

use super::rig::{Rig, volume_on};
use super::world::{Quiet, material, small_geometry};
use crate::volume::backing::Backing;
use crate::volume::engine::{IoKind, Op, Volume};
use crate::volume::geometry::{BLOCK_LEN, Geometry};
use crate::volume::map::{PAGE_COST, default_budget, smallest_budget};
use crate::volume::recover::recover_with;

const BLOCK: u64 = BLOCK_LEN as u64;

fn write_of(block: u64) -> Op {
    Op::Write {
        offset: block * BLOCK,
        len: BLOCK,
        durable: false,
    }
}

fn written_blocks(rig: &Rig) -> Vec<usize> {
    let blocks = rig.held.iter().map(|(_, io)| match &io.kind {
        IoKind::Write { buffer, .. } => buffer.blocks(),
        _ => 0,
    });
    blocks.filter(|blocks| *blocks > 0).collect()
}

#[test]
fn small_writes_gather_while_two_are_under_way_and_leave_as_one() {
    let mut rig = Rig::serve(&volume_on(small_geometry()), None, 1);
    rig.turn();
    rig.held.clear();
    for block in 0..10 {
        rig.submit(0, write_of(block * 7));
        rig.turn();
    }
    assert_eq!(
        written_blocks(&rig),
        [1, 1],
        "no third, and nobody waits yet"
    );
    rig.land(0, None);
    rig.turn();
    assert_eq!(rig.done.len(), 1);
    assert_eq!(written_blocks(&rig), [1, 8], "all that gathered, as one");
    while !rig.held.is_empty() {
        rig.land(0, None);
        rig.turn();
    }
    assert_eq!(rig.done, [Ok(()); 10]);
}

#[test]
fn what_is_large_does_not_wait_for_others() {
    let mut rig = Rig::serve(&volume_on(small_geometry()), None, 1);
    rig.turn();
    rig.held.clear();
    for part in 0..6 {
        let (offset, len) = (part * 32 * BLOCK, 32 * BLOCK);
        let durable = false;
        rig.submit(
            0,
            Op::Write {
                offset,
                len,
                durable,
            },
        );
        rig.turn();
    }
    assert_eq!(written_blocks(&rig), [32; 6]);
}

#[test]
fn the_memory_for_the_map_grows_with_the_volume() {
    let disk = volume_on(Geometry::for_volume(4 << 20).expect("size"));
    let (small, large) = (1_u64 << 10, 1_u64 << 28);
    let cases = [
        (None, default_budget(small), default_budget(large)),
        (
            Some(smallest_budget(small)),
            smallest_budget(small),
            smallest_budget(large),
        ),
    ];
    let image = disk.image();
    for (cache, before, after) in cases {
        disk.restore(image.clone());
        let recovered = recover_with(&*disk, &material(), cache).expect("opens");
        let backing: Arc<dyn Backing> = disk.clone();
        let volume = Volume::new(recovered, backing, Box::new(Quiet));
        volume.attach(None).expect("attaches");
        assert_eq!(volume.shared().cache_pages(), before / PAGE_COST);
        volume.grow(large * BLOCK_LEN as u64).expect("grows");
        assert_eq!(volume.shared().cache_pages(), after / PAGE_COST);
        volume.close().expect("closes");
    }
}
