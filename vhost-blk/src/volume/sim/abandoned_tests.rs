//! A queue's thread ends with operations under way, whose results nobody will ever hear: its io_uring
//! failed, or it panicked. Whoever else uses the volume must not wait for it.

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use super::fault_tests::is_superblock;
use super::rig::{Rig, fresh_ring, open, volume_on};
use super::world::small_geometry;
use crate::volume::engine::{Failure, IoKind, Op, Volume, VolumeError};
use crate::volume::geometry::BLOCK_LEN;
use crate::volume::ring::RingMemory;

/// What an operation that hangs for ever is held back by.
type Holds = fn(&Rig, &IoKind) -> bool;

fn is_data(rig: &Rig, kind: &IoKind) -> bool {
    matches!(kind, IoKind::Write { offset, .. } if *offset >= rig.log().end)
}

/// Settles from another thread. `None`: it hangs.
fn settle(volume: &'static Volume) -> Option<Result<(), VolumeError>> {
    let (tell, told) = channel();
    std::thread::spawn(move || tell.send(volume.settle()));
    told.recv_timeout(Duration::from_secs(20)).ok()
}

#[test]
fn nobody_waits_for_a_lane_whose_thread_is_gone() {
    let cases: [(&str, Holds); 4] = [
        ("data", is_data),
        (
            "the log",
            |rig, kind| matches!(kind, IoKind::Write { offset, .. } if rig.log().contains(offset)),
        ),
        ("a barrier", |_, kind| matches!(kind, IoKind::Sync(_))),
        ("a superblock", |_, kind| is_superblock(kind)),
    ];
    for (what, holds) in cases {
        let disk = volume_on(small_geometry());
        let ring = fresh_ring(&disk, 64 << 10);
        let mut rig = Rig::serve(&disk, Some(Arc::clone(&ring)), 2);
        let mut rounds = 0;
        loop {
            let held: Vec<bool> = rig
                .held
                .iter()
                .map(|(_, io)| holds(&rig, &io.kind))
                .collect();
            if held.contains(&true) {
                break;
            }
            rig.write(1, rounds % 50, 1);
            rig.submit(1, Op::Flush);
            // Only the second lane, which so does all there is to do.
            while rig.step(1, |rig, kind| !holds(rig, kind)) {}
            rounds += 1;
            assert!(rounds < 1000, "{what} is never written");
        }
        let acknowledged = rig.done.len() / 2;
        let Rig {
            volume, mut lanes, ..
        } = rig;
        let mut dead = lanes.pop().expect("two lanes");
        dead.abandon();
        // As its thread does: the kernel may still have its buffers.
        std::mem::forget(dead);
        let volume: &'static Volume = Box::leak(Box::new(volume));
        let settled = settle(volume).unwrap_or_else(|| panic!("{what}: settling hangs"));
        assert!(
            matches!(settled, Err(VolumeError::Flush(Failure::Poisoned))),
            "{what}: {settled:?}"
        );
        assert!(volume.close().is_err(), "{what}");
        drop(lanes);
        // The next process finds what was acknowledged.
        let next = open(&disk);
        next.attach(Some(ring as Arc<dyn RingMemory>))
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        let blocks = next.mapped(0, 1, &mut |_| ()).0.len();
        assert!(
            blocks >= acknowledged.min(50),
            "{what}: {blocks} of {acknowledged}"
        );
    }
}

#[test]
fn a_partial_write_of_a_lane_that_is_gone_does_not_keep_its_block() {
    let mut rig = Rig::serve(&volume_on(small_geometry()), None, 3);
    rig.write(0, 7, 1);
    rig.run(|_| false);
    let part = |at: u64| Op::Write {
        offset: 7 * BLOCK_LEN as u64 + at,
        len: 512,
        durable: false,
    };
    // The first has the block and dies while it reads it, the second waits and dies, too.
    for lane in [2, 1, 0] {
        rig.submit(lane, part(lane as u64 * 512));
        rig.turn();
    }
    rig.held.retain(|(lane, _)| *lane == 0);
    for _ in 0..2 {
        let mut dead = rig.lanes.pop().expect("three lanes");
        dead.abandon();
        std::mem::forget(dead);
    }
    rig.run(|_| false);
    assert_eq!(rig.done, [Ok(()), Err(Failure::Poisoned)]);
}
