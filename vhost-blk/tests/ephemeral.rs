//! Volumes whose key only the card has: what is left of them.

#![allow(clippy::unwrap_used)]

mod common;
mod loops;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;
use std::time::{Duration, Instant};

use common::*;
use loops::Loop;

const MIB: u64 = 1 << 20;

fn serve(files: &Files, volume: &str) -> Card {
    Card::launch(files, &["--ephemeral", "64M", "--volume", volume])
}

/// Names in a folder.
fn names(files: &Files, folder: &str) -> Vec<String> {
    let entries = std::fs::read_dir(files.path(folder)).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

/// A small file system of its own, so that room can be counted; needs root.
struct Mounted(std::path::PathBuf);

impl Mounted {
    fn new(files: &Files, name: &str) -> Self {
        let path = files.path(name);
        std::fs::create_dir(&path).unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=48m", "none"]);
        assert!(mount.arg(&path).status().unwrap().success(), "needs root");
        Self(path)
    }

    fn free(&self) -> u64 {
        let found = rustix::fs::statvfs(&self.0).unwrap();
        found.f_bavail * found.f_frsize
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn an_ephemeral_volume_has_no_name_and_gives_its_room_back_however_the_card_ends() {
    let files = Files::new();
    let mounted = Mounted::new(&files, "scratch");
    let empty = mounted.free();
    for is_killed in [false, true] {
        // A folder, or a new name in it.
        let place = if is_killed { "scratch/new" } else { "scratch" };
        let card = serve(&files, &files.text(place));
        assert!(card.log().contains("64 MiB, ephemeral"), "{}", card.log());
        let mut guest = Guest::new(&card);
        assert!(guest.read(0, 65536).iter().all(|byte| *byte == 0));
        for mib in 0..16 {
            guest.write(mib * 2048, &pattern(mib, 1 << 20));
        }
        guest.flush();
        assert!(guest.read(7 * 2048, 1 << 20) == pattern(7, 1 << 20));
        assert_eq!(names(&files, "scratch"), Vec::<String>::new());
        assert!(mounted.free() + 16 * MIB <= empty);
        drop(guest);
        if is_killed {
            card.kill();
        } else {
            card.stop();
        }
        // The kernel takes down what is left of a process's io_uring a little behind it.
        let end = Instant::now() + Duration::from_secs(10);
        while mounted.free() != empty {
            assert!(Instant::now() < end, "killed: {is_killed}");
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(names(&files, "scratch"), Vec::<String>::new());
    }
}

#[test]
fn a_guest_that_outlives_its_card_is_told_so_and_never_shown_an_empty_disk() {
    let files = Files::new();
    let folder = files.path("scratch");
    std::fs::create_dir(&folder).unwrap();
    let card = serve(&files, folder.to_str().unwrap());
    let mut guest = Guest::new(&card);
    guest.write(0, &pattern(1, 4096));
    card.kill();
    let mut card = serve(&files, folder.to_str().unwrap());
    let refused = catch_unwind(AssertUnwindSafe(|| {
        guest.reconnect(&card);
        guest.read(0, 4096)
    }));
    assert!(refused.is_err(), "the guest went on");
    card.wait_for("its data and its key are gone");
    // A guest that begins anew is served.
    let mut fresh = Guest::new(&card);
    assert!(fresh.read(0, 4096).iter().all(|byte| *byte == 0));
    drop(fresh);
    card.stop();
}

const DISK_LEN: u64 = 160 * MIB;

fn bytes(device: &Loop) -> Vec<u8> {
    let mut bytes = vec![0; DISK_LEN as usize];
    let file = File::open(&device.0).unwrap();
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn what_a_killed_card_leaves_on_a_device_has_no_key_and_shows_nothing() {
    let files = Files::new();
    let device = Loop::new(&files, "disk", DISK_LEN, &[]);
    let secret = pattern(77, 64);
    let card = serve(&files, &device.0);
    let mut guest = Guest::new(&card);
    guest.write(2048, &secret.repeat(1024));
    guest.flush();
    card.kill();
    drop(guest);

    let left = bytes(&device);
    assert_eq!(left[..8], *b"OFFLDVOL");
    for copy in [0, 1 << 20] {
        let slots = &left[copy + 512..copy + 2560];
        assert!(slots.iter().all(|byte| *byte == 0), "a wrapped key is left");
    }
    assert!(!left.windows(16).any(|bytes| bytes == &secret[..16]));
    drop(left);
    let key = files.text("key");
    for command in ["check", "export"] {
        let back = files.text("back");
        let mut args = vec![command, "--key-file", &key, &device.0];
        args.extend((command == "export").then_some(back.as_str()));
        let output = run(&args);
        assert!(!output.status.success(), "{command}");
    }

    // What nobody can open any more is in nobody's way; a clean end takes it all away.
    let card = serve(&files, &device.0);
    let mut guest = Guest::new(&card);
    assert!(guest.read(2048, 65536).iter().all(|byte| *byte == 0));
    guest.write(2048, &secret.repeat(1024));
    drop(guest);
    card.stop();
    assert!(bytes(&device).iter().all(|byte| *byte == 0));
}

#[test]
fn an_ephemeral_volume_takes_nothing_that_is_somebodys() {
    let files = Files::with_volume("16M");
    let device = Loop::new(&files, "disk", DISK_LEN, &[]);
    let (key, volume) = (files.text("key"), files.text("volume"));
    succeeds(&["create", "--size", "16M", "--key-file", &key, &device.0]);
    let before = std::fs::read(files.path("volume")).unwrap();
    let socket = files.text("sock");
    let refused = |size: &str, volume: &str| {
        let args = [
            "--socket-path",
            &socket,
            "--ephemeral",
            size,
            "--volume",
            volume,
        ];
        fails(&[&["serve"], &args[..]].concat(), 1)
    };
    for (size, volume, hint) in [
        ("16M", volume.as_str(), "makes its own file"),
        ("16M", &device.0, "blank"),
        ("200T", &files.text("new"), "128 TiB"),
        ("5000", &files.text("new"), "multiple of 4096"),
        ("16M", &files.text("no/folder"), "No such file"),
        ("16M", "/dev/null", "there already"),
    ] {
        let said = refused(size, volume);
        assert!(said.contains(hint), "{volume}: {said}");
    }
    assert!(std::fs::read(files.path("volume")).unwrap() == before);
    succeeds(&["check", "--key-file", &key, &device.0]);
}
