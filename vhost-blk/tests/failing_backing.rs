//! The whole card, its real I/O included, on a backing that fails: what the guest gets, what the log
//! says, and what is there when the backing is well again.

#![allow(clippy::unwrap_used)]

mod common;
mod glass;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::*;
use glass::{EAGAIN, EINTR, EIO, ENOSPC, Glass, Kind, Verdict};

/// A volume behind glass, the card that serves it, and its guest. `None`: not on this machine.
fn behind_glass() -> Option<(Files, Glass, Card, Guest)> {
    let files = Files::with_volume("16M");
    let glass = Glass::new(&files.path("volume"), &files.path("glass"))?;
    let card = serve(&files, &glass);
    let guest = Guest::new(&card);
    Some((files, glass, card, guest))
}

fn serve(files: &Files, glass: &Glass) -> Card {
    Card::start(files, glass.path.to_str().unwrap(), &[])
}

/// The guest leaves, and the card closes a volume that is whole.
fn ends_well(files: &Files, guest: Guest, card: Card) {
    drop(guest);
    card.stop();
    assert!(files.on_volume("check", &[]).status.success());
}

fn status(guest: &mut Guest, kind: u32, sector: u64, data: &[u8]) -> u8 {
    guest.request(kind, sector, data, 0).status
}

#[test]
fn a_failed_barrier_ends_writing_for_good_and_costs_nothing_that_was_acknowledged() {
    let Some((files, glass, mut card, mut guest)) = behind_glass() else {
        return;
    };
    guest.write(0, &pattern(1, 65536));
    guest.flush();
    guest.write(0, &pattern(2, 4096));
    glass.judge(|kind, _, _| match kind {
        Kind::Sync => Verdict::Fail(EIO),
        _ => Verdict::Do,
    });
    assert_eq!(status(&mut guest, FLUSH, 0, &[]), IOERR);
    card.wait_for("takes no more writes");
    // The device is well again, and the card knows better than to believe it: what the kernel
    // dropped with that error is not known.
    glass.heal();
    assert_eq!(status(&mut guest, OUT, 64, &[9; 4096]), IOERR);
    assert_eq!(status(&mut guest, FLUSH, 0, &[]), IOERR);
    assert_eq!(guest.read(0, 4096), pattern(2, 4096));
    assert_eq!(guest.read(8, 4096), pattern(1, 65536)[4096..8192]);
    card.kill();
    let card = serve(&files, &glass);
    guest.reconnect(&card);
    assert_eq!(
        guest.read(0, 4096),
        pattern(2, 4096),
        "acknowledged, so it is in the ring"
    );
    assert_eq!(guest.read(8, 4096), pattern(1, 65536)[4096..8192]);
    assert_eq!(guest.read(64, 4096), pattern(1, 65536)[32768..36864]);
    guest.write(64, &[8; 4096]);
    guest.flush();
    ends_well(&files, guest, card);
}

#[test]
fn a_failed_write_fails_alone_and_the_next_one_does_not() {
    let Some((files, glass, mut card, mut guest)) = behind_glass() else {
        return;
    };
    guest.write(0, &pattern(1, 65536));
    glass.judge(|kind, _, _| match kind {
        Kind::Write => Verdict::Fail(EIO),
        _ => Verdict::Do,
    });
    assert_eq!(status(&mut guest, OUT, 0, &[9; 8192]), IOERR);
    card.wait_for("failed while writing data");
    assert_eq!(guest.read(0, 65536), pattern(1, 65536), "as it was");
    glass.heal();
    guest.write(0, &[7; 8192]);
    guest.flush();
    assert_eq!(guest.read(0, 8192), [7; 8192]);
    ends_well(&files, guest, card);
}

#[test]
fn a_log_that_cannot_be_written_fails_the_flush_and_all_writing_behind_it() {
    let Some((files, glass, mut card, mut guest)) = behind_glass() else {
        return;
    };
    guest.write(0, &pattern(1, 65536));
    guest.flush();
    guest.write(0, &[3; 4096]);
    // The log lies between 2 and 6 MiB in a volume of this size.
    glass.judge(|kind, offset, _| match kind {
        Kind::Write if (2 << 20..6 << 20).contains(&offset) => Verdict::Fail(EIO),
        _ => Verdict::Do,
    });
    assert_eq!(status(&mut guest, FLUSH, 0, &[]), IOERR);
    card.wait_for("takes no more writes");
    assert_eq!(status(&mut guest, OUT, 8, &[4; 4096]), IOERR);
    assert_eq!(guest.read(0, 4096), [3; 4096]);
    card.kill();
    glass.heal();
    let card = serve(&files, &glass);
    guest.reconnect(&card);
    assert_eq!(guest.read(0, 4096), [3; 4096]);
    assert_eq!(guest.read(8, 4096), pattern(1, 65536)[4096..8192]);
    ends_well(&files, guest, card);
}

#[test]
fn a_backing_without_room_refuses_new_blocks_until_there_is_room_again() {
    let Some((files, glass, mut card, mut guest)) = behind_glass() else {
        return;
    };
    guest.write(0, &pattern(1, 65536));
    guest.flush();
    // Data and map pages lie behind the log.
    glass.judge(|kind, offset, _| match kind {
        Kind::Write if offset >= 6 << 20 => Verdict::Fail(ENOSPC),
        Kind::Allocate => Verdict::Fail(ENOSPC),
        _ => Verdict::Do,
    });
    assert_eq!(status(&mut guest, OUT, 1024, &[9; 4096]), IOERR);
    card.wait_for("No space left");
    assert_eq!(
        status(&mut guest, FLUSH, 0, &[]),
        OK,
        "what is there can be committed"
    );
    assert_eq!(guest.read(0, 65536), pattern(1, 65536));
    glass.heal();
    guest.write(1024, &[8; 4096]);
    guest.flush();
    assert_eq!(guest.read(1024, 4096), [8; 4096]);
    ends_well(&files, guest, card);
}

#[test]
fn a_sector_that_cannot_be_read_fails_its_request_and_no_other() {
    let Some((files, glass, mut card, mut guest)) = behind_glass() else {
        return;
    };
    let places: Arc<Mutex<Vec<u64>>> = Arc::default();
    let seen = Arc::clone(&places);
    glass.judge(move |kind, offset, _| {
        if kind == Kind::Write {
            seen.lock().unwrap().push(offset);
        }
        Verdict::Do
    });
    guest.write(0, &pattern(1, 4096));
    guest.write(8, &pattern(2, 4096));
    let bad = places.lock().unwrap()[0];
    glass.judge(move |kind, offset, _| match kind {
        Kind::Read if offset == bad => Verdict::Fail(EIO),
        _ => Verdict::Do,
    });
    assert_eq!(guest.request(IN, 0, &[], 4096).status, IOERR);
    card.wait_for("failed while reading data");
    assert_eq!(guest.read(8, 4096), pattern(2, 4096));
    // Half a block over what cannot be read is no write at all; a whole one is.
    assert_eq!(status(&mut guest, OUT, 0, &[5; 512]), IOERR);
    guest.write(0, &[6; 4096]);
    assert_eq!(guest.read(0, 4096), [6; 4096]);
    ends_well(&files, guest, card);
}

#[test]
fn short_interrupted_and_put_off_operations_are_gone_on_with_unseen() {
    let Some((files, glass, card, mut guest)) = behind_glass() else {
        return;
    };
    let odd = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&odd);
    // Never twice in a row for one kind: patience with a device ends somewhere.
    let mut turn = 0_u64;
    glass.judge(move |kind, _, len| {
        turn += 1;
        let verdict = match (turn % 4, kind) {
            (1, _) => Verdict::Fail(EINTR),
            (2, Kind::Read | Kind::Write | Kind::Sync) => Verdict::Fail(EAGAIN),
            // Of a short write FUSE itself makes an error.
            (3, Kind::Read) if len > 512 => Verdict::Cut(len / 2 / 512 * 512),
            _ => return Verdict::Do,
        };
        count.fetch_add(1, Ordering::Relaxed);
        verdict
    });
    for round in 0..10 {
        let written = status(&mut guest, OUT, round * 200, &pattern(round, 100 << 10));
        assert_eq!(written, OK, "{round}: {}", card.log());
        assert_eq!(
            status(&mut guest, FLUSH, 0, &[]),
            OK,
            "{round}: {}",
            card.log()
        );
        assert!(
            guest.read(round * 200, 100 << 10) == pattern(round, 100 << 10),
            "{round}"
        );
    }
    assert!(odd.load(Ordering::Relaxed) > 20);
    glass.heal();
    assert!(!card.log().contains("failed"), "{}", card.log());
    ends_well(&files, guest, card);
}

#[test]
fn a_barrier_that_is_interrupted_again_and_again_is_not_given_up_soon() {
    let Some((files, glass, card, mut guest)) = behind_glass() else {
        return;
    };
    let mut left = 60;
    glass.judge(move |kind, _, _| match kind {
        Kind::Sync if left > 0 => {
            left -= 1;
            Verdict::Fail(if left % 2 == 0 { EINTR } else { EAGAIN })
        }
        _ => Verdict::Do,
    });
    guest.write(0, &[5; 4096]);
    guest.flush();
    guest.write(0, &[6; 4096]);
    guest.flush();
    ends_well(&files, guest, card);
}

#[test]
fn a_close_whose_last_checkpoint_fails_says_so_and_the_next_opening_recovers() {
    let Some((files, glass, mut card, mut guest)) = behind_glass() else {
        return;
    };
    guest.write(0, &pattern(4, 65536));
    guest.flush();
    // Both superblock copies.
    glass.judge(|kind, offset, _| match kind {
        Kind::Write if offset < 2 << 20 => Verdict::Fail(EIO),
        _ => Verdict::Do,
    });
    drop(guest);
    let status = card.terminate();
    assert_eq!(status.code(), Some(1), "{}", card.log());
    assert!(card.log().contains("could not be closed"), "{}", card.log());
    drop(card);
    std::fs::remove_file(files.path("log")).unwrap();
    glass.heal();
    let card = serve(&files, &glass);
    let mut guest = Guest::new(&card);
    assert_eq!(guest.read(0, 65536), pattern(4, 65536));
    ends_well(&files, guest, card);
}

/// The kernel may still write for a process that is dead. Whoever opened the volume in the meantime
/// would find it changed under its feet.
#[test]
fn a_volume_is_not_opened_while_a_write_of_a_killed_card_may_still_land() {
    let Some((files, glass, card, mut guest)) = behind_glass() else {
        return;
    };
    guest.write(0, &[1; 4096]);
    guest.flush();
    glass.judge(|kind, _, _| match kind {
        Kind::Write => Verdict::Hold,
        _ => Verdict::Do,
    });
    let late = guest.send(0, OUT, 0, &[2; 4096], 0).unwrap();
    while glass.held() == 0 {
        std::thread::sleep(Duration::from_millis(2));
    }
    // Its parent would wait for as long as its write is held.
    card.kill_without_waiting();
    std::thread::sleep(Duration::from_millis(100));
    glass.heal();
    let volume = glass.path.to_str().unwrap();
    let check = ["check", "--key-file", &files.text("key"), volume];
    let said = fails(&check, 2);
    assert!(said.contains("in use by another process"), "{said}");
    let is_over = Arc::new(AtomicBool::new(false));
    let over = Arc::clone(&is_over);
    let card = std::thread::scope(|scope| {
        let next = scope.spawn(|| {
            let card = serve(&files, &glass);
            assert!(
                over.load(Ordering::Relaxed),
                "opened before the late write had landed"
            );
            card
        });
        std::thread::sleep(Duration::from_millis(700));
        is_over.store(true, Ordering::Relaxed);
        glass.release();
        next.join().unwrap()
    });
    guest.reconnect(&card);
    assert_eq!(guest.wait(&late).status, OK);
    assert_eq!(guest.read(0, 4096), [2; 4096]);
    ends_well(&files, guest, card);
}

/// A kernel tells of a failed writeback once for each open file. Whichever of two barriers on one open file
/// is told, the other would acknowledge what is lost.
#[test]
fn barriers_of_commits_and_of_checkpoints_come_through_open_files_of_their_own() {
    let Some((files, glass, card, mut guest)) = behind_glass() else {
        return;
    };
    guest.write(0, &[1; 4096]);
    guest.flush();
    glass.synced();
    guest.write(0, &[2; 4096]);
    guest.flush();
    let commits = glass.synced();
    assert_eq!(commits.len(), 1, "{commits:?}");
    // Each flush takes a block of the log, of which half is enough for a checkpoint.
    let mut all = commits.clone();
    for round in 0..2000_u64 {
        guest.write(round % 64 * 8, &[round as u8; 4096]);
        guest.flush();
        all.extend(glass.synced());
        if all.len() > 1 {
            break;
        }
    }
    assert_eq!(all.len(), 2, "a checkpoint has its own");
    ends_well(&files, guest, card);
}
