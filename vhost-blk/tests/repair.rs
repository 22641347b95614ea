//! `check --repair`: what is damaged becomes sound again, what is not stays as it is.

#![allow(clippy::unwrap_used)]

mod common;

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use common::*;
use crypto::source::{KeyMaterial, KeySource};
use vhost_blk::volume::backing::{Access, Backing, FileBacking};
use vhost_blk::volume::buffer::Buffer;
use vhost_blk::volume::engine::{Reporter, Volume};
use vhost_blk::volume::page::{PagePlace, TreeKind};
use vhost_blk::volume::recover::{Recovered, recover};

const MIB: usize = 1 << 20;
const SIZE: usize = 24 * MIB;
/// Where the disk has data: bytes, all in leaves of 512 KiB.
const FILLED: [std::ops::Range<usize>; 2] = [0..MIB, 16 * MIB..17 * MIB];

/// A closed volume with data, and the data.
fn filled() -> (Files, Vec<u8>) {
    let files = Files::new();
    let mut disk = vec![0; SIZE];
    for range in FILLED {
        let data = pattern(range.start as u64 + 1, range.len());
        disk[range].copy_from_slice(&data);
    }
    std::fs::write(files.path("raw"), &disk).unwrap();
    let (key, raw, volume) = (files.text("key"), files.text("raw"), files.text("volume"));
    succeeds(&[
        "import",
        "--format",
        "raw",
        "--key-file",
        &key,
        &raw,
        &volume,
    ]);
    (files, disk)
}

fn material(files: &Files) -> KeyMaterial {
    KeySource::File(files.path("key")).load().unwrap()
}

fn opened(files: &Files) -> (FileBacking, Recovered) {
    let backing = FileBacking::open(&files.path("volume"), Access::Read).unwrap();
    let recovered = recover(&backing, &material(files)).unwrap();
    (backing, recovered)
}

fn flip(files: &Files, at: u64) {
    let mut byte = [0];
    files.raw().read_exact_at(&mut byte, at).unwrap();
    files.raw().write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

/// Where a block of the disk lies in the backing.
fn block_at(files: &Files, block: u64) -> u64 {
    let (backing, recovered) = opened(files);
    let found = recovered.blocks(&backing).into_iter();
    let (_, entry) = found.into_iter().find(|(b, _)| *b == block).unwrap();
    entry.slot().offset()
}

fn page_at(files: &Files, level: usize) -> u64 {
    let place = PagePlace {
        tree: TreeKind::Map,
        level,
        index: 0,
    };
    let (_, recovered) = opened(files);
    recovered.map.stored_as(place).unwrap().slot().offset()
}

fn used(files: &Files) -> u64 {
    opened(files).1.used_count()
}

fn bytes(files: &Files) -> Vec<u8> {
    std::fs::read(files.path("volume")).unwrap()
}

/// `check` with these options ends with this status; what it says.
#[track_caller]
fn check(files: &Files, options: &[&str], code: i32) -> String {
    let output = files.on_volume("check", options);
    let said = stdout(&output) + &stderr(&output);
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert!(!said.contains("panicked"), "{said}");
    said
}

/// The volume is sound and holds this.
#[track_caller]
fn holds(files: &Files, disk: &[u8]) {
    assert!(check(files, &[], 0).ends_with("clean\n"));
    let (key, volume, back) = (files.text("key"), files.text("volume"), files.text("back"));
    succeeds(&["export", "--force", "--key-file", &key, &volume, &back]);
    assert!(std::fs::read(back).unwrap() == disk);
}

struct Silent;

impl Reporter for Silent {
    fn not_authentic(&self, _: u64) {}
    fn backing_failed(&self, _: &'static str, _: i32) {}
    fn poisoned(&self, _: &'static str) {}
}

/// Stores a change that no sound program makes.
fn spoil(files: &Files, change: impl FnOnce(&mut Recovered)) {
    let backing = FileBacking::open(&files.path("volume"), Access::Write).unwrap();
    let mut recovered = recover(&backing, &material(files)).unwrap();
    change(&mut recovered);
    let volume = Volume::new(recovered, Arc::new(backing), Box::new(Silent));
    volume.attach(None).unwrap();
    volume.close().unwrap();
}

#[test]
fn a_sound_volume_is_left_as_it_is() {
    let (files, disk) = filled();
    let before = bytes(&files);
    let said = check(&files, &["--repair", "--zero-damaged"], 0);
    assert!(said.ends_with("clean\n"), "{said}");
    assert!(bytes(&files) == before);
    holds(&files, &disk);
}

#[test]
fn a_damaged_or_old_copy_of_the_header_is_written_anew() {
    for copy in [0, MIB] {
        let (files, disk) = filled();
        let is_same = || {
            let bytes = bytes(&files);
            bytes[..MIB] == bytes[MIB..2 * MIB]
        };
        flip(&files, copy as u64 + 60);
        check(&files, &[], 1);
        assert!(!is_same());
        let said = check(&files, &["--repair"], 0);
        assert!(said.ends_with("repaired\n"), "{said}");
        assert!(is_same());
        holds(&files, &disk);

        let old = bytes(&files)[copy..copy + MIB].to_vec();
        spoil(&files, |_| {});
        files.raw().write_all_at(&old, copy as u64).unwrap();
        assert!(!is_same());
        check(&files, &["--repair"], 0);
        assert!(is_same());
        holds(&files, &disk);
    }
}

#[test]
fn slots_are_in_use_if_the_map_names_them_and_for_no_other_reason() {
    let (files, disk) = filled();
    let slots = used(&files);
    let slot = opened(&files).1.used_slots().next().unwrap();
    let mut free = slot;
    while opened(&files).1.space.is_used(free) {
        free.0 += 256;
    }
    spoil(&files, |recovered| recovered.space.set_used(free, true));
    assert_eq!(used(&files), slots + 1);
    assert!(check(&files, &[], 1).contains("1 slots are said to be in use"));
    let said = check(&files, &["--repair"], 0);
    assert!(said.contains("1 slots freed"), "{said}");
    assert_eq!(used(&files), slots);
    holds(&files, &disk);

    spoil(&files, |recovered| recovered.space.set_used(slot, false));
    assert!(check(&files, &[], 1).contains("is said to be free"));
    let said = check(&files, &["--repair"], 0);
    assert!(said.contains("1 slots marked"), "{said}");
    assert_eq!(used(&files), slots);
    holds(&files, &disk);
}

#[test]
fn damaged_pages_of_the_space_tree_are_made_anew_from_the_map() {
    for is_root in [false, true] {
        let (files, disk) = filled();
        let slots = used(&files);
        let (_, recovered) = opened(&files);
        let entry = match is_root {
            true => recovered.superblock.space_root,
            false => recovered.space.leaf_entry(0),
        };
        drop(recovered);
        flip(&files, entry.slot().offset() + 77);
        assert!(check(&files, &[], 1).contains("space page"));
        let said = check(&files, &["--repair"], 0);
        assert!(said.contains("1 lost pages of the space tree"), "{said}");
        assert_eq!(used(&files), slots);
        holds(&files, &disk);
    }
}

#[test]
fn a_damaged_block_reads_as_zeros_only_if_that_is_asked_for() {
    let (files, mut disk) = filled();
    let slots = used(&files);
    for block in [5, 6, 4100] {
        flip(&files, block_at(&files, block) + 2000);
    }
    let before = bytes(&files);
    let said = check(&files, &["--repair"], 1);
    assert!(said.contains("blocks 5 to 6"), "{said}");
    assert!(said.ends_with("damaged\n"), "{said}");
    assert!(bytes(&files) == before, "nothing was to be repaired");

    let said = check(&files, &["--repair", "--zero-damaged"], 0);
    let at = |text: &str| said.find(text).unwrap_or_else(|| panic!("{text}: {said}"));
    assert!(at("lost: 8192 bytes at offset 20480") < at("repaired: "));
    assert!(at("lost: 4096 bytes at offset 16793600") < at("repaired: "));
    for block in [5, 6, 4100] {
        disk[block * BLOCK..(block + 1) * BLOCK].fill(0);
    }
    assert_eq!(used(&files), slots - 3);
    holds(&files, &disk);
}

#[test]
fn below_a_damaged_leaf_nothing_is_freed_unless_it_is_given_up() {
    let (files, mut disk) = filled();
    let slots = used(&files);
    flip(&files, page_at(&files, 0) + 9);
    let said = check(&files, &["--repair"], 1);
    assert!(said.contains("blocks 0 to 128 are lost"), "{said}");
    assert!(said.contains("was left so"), "{said}");
    assert_eq!(used(&files), slots);

    let output = files.on_volume("check", &["--repair", "--zero-damaged", "--json"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let zeroed = serde_json::json!([{"offset": 0, "length": 128 * BLOCK}]);
    assert_eq!(report["zeroed"], zeroed, "{report}");
    assert_eq!(report["problems_left_count"], 0);
    assert!(stderr(&output).contains("lost: 524288 bytes at offset 0"));
    disk[..128 * BLOCK].fill(0);
    assert_eq!(used(&files), slots - 128);
    holds(&files, &disk);
}

#[test]
fn a_damaged_page_at_any_height_of_the_map_is_given_up_with_all_below_it() {
    for level in 1..5 {
        let (files, mut disk) = filled();
        flip(&files, page_at(&files, level) + 9);
        check(&files, &["--repair"], 1);
        // All of the disk is below one page of level 1: 64 MiB.
        check(&files, &["--repair", "--zero-damaged"], 0);
        disk.fill(0);
        assert_eq!(used(&files), 0);
        holds(&files, &disk);
        // Sessions are counted anew, so those that nothing names any more go.
        spoil(&files, |_| {});
        assert_eq!(opened(&files).1.superblock.table.len(), 1);
        let card = files.serve(&[]);
        let mut guest = Guest::new(&card);
        let data = pattern(3, MIB);
        guest.write(0, &data);
        drop(guest);
        card.stop();
        disk[..MIB].copy_from_slice(&data);
        holds(&files, &disk);
    }
}

#[test]
fn with_both_trees_damaged_nothing_is_done_unless_what_is_lost_is_given_up() {
    let (files, mut disk) = filled();
    let space = opened(&files).1.space.leaf_entry(0).slot().offset();
    flip(&files, page_at(&files, 0) + 9);
    flip(&files, space);
    let before = bytes(&files);
    let said = check(&files, &["--repair"], 1);
    assert!(said.contains("give --zero-damaged"), "{said}");
    assert!(bytes(&files) == before);
    check(&files, &["--repair", "--zero-damaged"], 0);
    disk[..128 * BLOCK].fill(0);
    holds(&files, &disk);
}

#[test]
fn a_volume_that_must_not_be_written_to_is_refused_and_not_changed() {
    let (files, disk) = filled();
    flip(&files, block_at(&files, 5));
    files.private("other", &[8; 32]);
    let (other, volume) = (files.text("other"), files.text("volume"));
    let before = bytes(&files);
    let repair = ["--repair", "--zero-damaged"];
    let wrong = [&["check", "--key-file", &other][..], &repair, &[&volume]].concat();
    assert!(fails(&wrong, 2).contains("wrong key"));
    assert!(bytes(&files) == before);
    let without = ["check", "--zero-damaged", "--key-file", &other, &volume];
    assert!(fails(&without, 2).contains("--repair"));

    let card = files.serve(&[]);
    let mut guest = Guest::new(&card);
    guest.write(80, &disk[..BLOCK]);
    assert!(check(&files, &repair, 2).contains("in use"));
    card.kill();
    let before = bytes(&files);
    let said = check(&files, &repair, 2);
    assert!(said.contains("was not closed"), "{said}");
    assert!(said.contains("--force"), "{said}");
    assert!(bytes(&files) == before);
    drop(guest);
    let said = check(&files, &[&repair[..], &["--force"]].concat(), 0);
    assert!(said.contains("lost: 4096 bytes at offset 20480"), "{said}");
    assert!(check(&files, &[], 0).ends_with("clean\n"));
}

/// A backing whose process dies after so many writes; its power, if the write under way is torn.
struct Mortal {
    backing: FileBacking,
    left: AtomicI64,
    is_torn: bool,
}

impl Mortal {
    fn live(&self) -> io::Result<()> {
        let left = self.left.fetch_sub(1, Ordering::Relaxed);
        (left > 0)
            .then_some(())
            .ok_or_else(|| io::Error::other("dead"))
    }
}

impl Backing for Mortal {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.backing.read_at(offset, into)
    }
    fn write_at(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        let alive = self.live();
        if alive.is_err() && self.is_torn && self.left.load(Ordering::Relaxed) == -1 {
            self.backing.write_at(offset, &Buffer::zeroed(1)).unwrap();
        }
        alive?;
        self.backing.write_at(offset, from)
    }
    fn sync(&self) -> io::Result<()> {
        self.backing.sync()
    }
    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        self.backing.allocate(offset, len)
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.live()?;
        self.backing.punch(offset, len)
    }
    fn extend(&self, len: u64) -> io::Result<u64> {
        self.backing.extend(len)
    }
    fn len(&self) -> u64 {
        self.backing.len()
    }
}

#[test]
fn a_repair_that_is_killed_leaves_the_volume_as_it_was_or_repaired() {
    let (files, mut disk) = filled();
    let place = PagePlace {
        tree: TreeKind::Map,
        level: 0,
        index: 0,
    };
    flip(&files, page_at(&files, 0));
    flip(&files, block_at(&files, 4100));
    let damaged = bytes(&files);
    let (mut was, mut is_new) = (0, 0);
    for writes in 0.. {
        std::fs::write(files.path("volume"), &damaged).unwrap();
        let backing = FileBacking::open(&files.path("volume"), Access::Write).unwrap();
        let backing = Arc::new(Mortal {
            backing,
            left: writes.into(),
            is_torn: false,
        });
        let mut recovered = recover(&*backing, &material(&files)).unwrap();
        assert!(recovered.make_holes(&*backing, &[place], &[4100]));
        assert_eq!(recovered.mend_space(&*backing).freed, 129);
        let volume = Volume::new(recovered, backing, Box::new(Silent));
        let is_done = volume.attach(None).is_ok() && volume.close().is_ok();
        drop(volume);
        // All that it had, or all that was to become of it.
        let (backing, now) = opened(&files);
        let blocks = now.blocks(&backing);
        assert!(now.missing_pages() == 0 && now.is_space_known);
        match now.used_count() {
            512 => {
                assert!(blocks.iter().any(|(block, _)| *block == 4100));
                was += 1;
            }
            383 => {
                assert_eq!(blocks.len(), 383);
                is_new += 1;
            }
            other => panic!("{other} slots after {writes} writes"),
        }
        if is_done {
            break;
        }
    }
    assert!(was > 1 && is_new > 1, "{was}, {is_new}");
    disk[..128 * BLOCK].fill(0);
    disk[4100 * BLOCK..4101 * BLOCK].fill(0);
    holds(&files, &disk);
}

#[test]
fn the_only_good_copy_of_the_header_is_not_what_an_activation_writes_first() {
    for copy in [0, MIB as u64] {
        let (files, disk) = filled();
        flip(&files, copy + 60);
        let damaged = bytes(&files);
        for writes in 0.. {
            std::fs::write(files.path("volume"), &damaged).unwrap();
            let file = FileBacking::open(&files.path("volume"), Access::Write).unwrap();
            let backing = Arc::new(Mortal {
                backing: file,
                left: writes.into(),
                is_torn: true,
            });
            let recovered = recover(&*backing, &material(&files)).unwrap();
            let volume = Volume::new(recovered, backing, Box::new(Silent));
            let is_done = volume.attach(None).is_ok() && volume.close().is_ok();
            drop(volume);
            let (backing, now) = opened(&files);
            assert_eq!(now.blocks(&backing).len(), 512, "after {writes} writes");
            if is_done {
                break;
            }
        }
        holds(&files, &disk);
    }
}
