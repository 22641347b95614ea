//! Volumes and keys that are not as they should be, and what the guest of a damaged one gets.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashMap;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::process::Command;

use common::*;
use crypto::source::KeySource;
use vhost_blk::volume::backing::{Access, FileBacking};
use vhost_blk::volume::entry::Entry;
use vhost_blk::volume::recover::recover;

const MIB: u64 = 1 << 20;

/// `serve` ends at once with status 1; what it says.
#[track_caller]
fn refuses(files: &Files, volume: &str, key: &str) -> String {
    let socket = files.text("never");
    let serve = [
        "serve",
        "--socket-path",
        &socket,
        "--volume",
        volume,
        "--key-file",
        key,
    ];
    let said = fails(&serve, 1);
    assert!(!files.path("never").exists(), "no socket without a volume");
    said
}

#[test]
fn a_key_that_is_wrong_missing_or_careless_is_refused_with_a_clear_error() {
    let files = Files::with_volume("16M");
    let volume = files.text("volume");
    files.private("other", &[8; 32]);
    let said = refuses(&files, &volume, &files.text("other"));
    assert!(said.contains("wrong key"), "{said}");
    let said = refuses(&files, &volume, "/no/such/key");
    assert!(said.contains("/no/such/key"), "{said}");
    files.private("short", &[8; 31]);
    let said = refuses(&files, &volume, &files.text("short"));
    assert!(said.contains("32 raw bytes"), "{said}");
    let open = files.private("open", &[7; 32]);
    std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o644)).unwrap();
    let said = refuses(&files, &volume, &files.text("open"));
    assert!(said.contains("chmod 600"), "{said}");
    let said = fails(&["serve", "--socket-path", "s", "--volume", &volume], 2);
    assert!(said.contains("--key-file"), "{said}");
}

#[test]
fn what_is_no_volume_is_refused() {
    let files = Files::new();
    let key = files.text("key");
    let volume = files.text("volume");
    let said = refuses(&files, &volume, &key);
    assert!(said.contains("No such file"), "{said}");
    for content in [vec![], vec![0; 8 << 20], pattern(1, 8 << 20), vec![1; 100]] {
        std::fs::write(files.path("volume"), content).unwrap();
        let said = refuses(&files, &volume, &key);
        assert!(said.contains("no offload volume"), "{said}");
    }
    let said = refuses(&files, "/dev/null", &key);
    assert!(
        said.contains("neither a regular file nor a block device"),
        "{said}"
    );
    let said = refuses(&files, files.path("").to_str().unwrap(), &key);
    assert!(said.contains("neither a regular file"), "{said}");
}

#[test]
fn a_truncated_volume_is_refused() {
    let files = Files::with_volume("16M");
    files.raw().set_len(20 << 20).unwrap();
    let said = refuses(&files, &files.text("volume"), &files.text("key"));
    assert!(said.contains("truncated"), "{said}");
    let check = files.on_volume("check", &[]);
    assert_eq!(check.status.code(), Some(2));
}

#[test]
fn a_volume_in_use_is_refused_and_says_by_what_to_look_for() {
    let files = Files::with_volume("16M");
    let card = files.serve(&[]);
    let said = refuses(&files, &files.text("volume"), &files.text("key"));
    assert!(said.contains("in use by another process"), "{said}");
    let check = files.on_volume("check", &[]);
    assert_eq!(check.status.code(), Some(2));
    card.stop();
    // Readers do not mind each other.
    let card = files.serve(&["--read-only"]);
    assert!(files.on_volume("check", &[]).status.success());
    card.stop();
}

/// A volume with some data, closed.
fn filled() -> (Files, Vec<u8>) {
    let files = Files::with_volume("16M");
    let data = pattern(1, 1 << 20);
    let card = files.serve(&[]);
    let mut guest = Guest::new(&card);
    guest.write(0, &data);
    drop(guest);
    card.stop();
    (files, data)
}

#[test]
fn one_header_copy_that_is_destroyed_is_reported_and_made_good_again() {
    for copy in [0, MIB] {
        let (files, data) = filled();
        files.raw().write_all_at(&pattern(9, 4096), copy).unwrap();
        let check = files.on_volume("check", &[]);
        assert_eq!(check.status.code(), Some(1), "{}", stderr(&check));
        let name = if copy == 0 { "first" } else { "second" };
        assert!(stdout(&check).contains(&format!("the {name} copy of the header")));

        let card = files.serve(&[]);
        assert!(
            card.log().contains(&format!("the {name} copy")),
            "{}",
            card.log()
        );
        let mut guest = Guest::new(&card);
        assert_eq!(guest.read(0, 1 << 20), data);
        guest.write(0, &data[..512]);
        drop(guest);
        card.stop();
        let check = files.on_volume("check", &[]);
        assert!(check.status.success(), "{}", stdout(&check));
    }
}

#[test]
fn both_header_copies_destroyed_are_the_end() {
    let (files, _) = filled();
    for copy in [0, MIB] {
        files.raw().write_all_at(&[0; 4096], copy).unwrap();
    }
    let said = refuses(&files, &files.text("volume"), &files.text("key"));
    assert!(said.contains("no offload volume"), "{said}");

    let (files, _) = filled();
    for copy in [0, MIB] {
        files.raw().write_all_at(&[1], copy + 60).unwrap();
    }
    let said = refuses(&files, &files.text("volume"), &files.text("key"));
    assert!(said.contains("both copies"), "{said}");
}

#[test]
fn too_little_memory_for_the_map_is_refused_with_what_is_needed() {
    let files = Files::with_volume("16M");
    let (socket, volume, key) = (files.text("never"), files.text("volume"), files.text("key"));
    let serve = ["serve", "--socket-path", &socket, "--volume", &volume];
    let cache = |size| [&serve[..], &["--key-file", &key, "--metadata-cache", size]].concat();
    let said = fails(&cache("4M"), 1);
    assert!(
        said.contains("4194304 bytes is too small") && said.contains("(5 MiB)"),
        "{said}"
    );
    assert!(!files.path("never").exists(), "no socket without a volume");
}

/// Where in the backing each block lies, in bytes.
fn places(files: &Files) -> HashMap<u64, u64> {
    let key = KeySource::File(files.path("key")).load().unwrap();
    let backing = FileBacking::open(&files.path("volume"), Access::Read).unwrap();
    let recovered = recover(&backing, &key).unwrap();
    let place = |(block, entry): (u64, Entry)| (block, entry.slot().offset());
    let blocks = recovered.blocks(&backing);
    blocks.into_iter().map(place).collect()
}

#[test]
fn a_flipped_byte_is_an_io_error_and_a_log_line_and_never_data() {
    let (files, data) = filled();
    let places = places(&files);
    let bad = [50, 51, 120];
    for block in &bad {
        let at = places[block] + 2000;
        let mut byte = [0];
        files.raw().read_exact_at(&mut byte, at).unwrap();
        files.raw().write_all_at(&[byte[0] ^ 0x10], at).unwrap();
    }

    let check = files.on_volume("check", &[]);
    assert_eq!(check.status.code(), Some(1));
    let said = stdout(&check);
    assert!(
        said.contains("does not authenticate") && said.ends_with("damaged\n"),
        "{said}"
    );
    let check = files.on_volume("check", &["--json"]);
    let report: serde_json::Value = serde_json::from_slice(&check.stdout).unwrap();
    assert_eq!(
        (&report["clean"], &report["problem_count"]),
        (&false.into(), &2.into())
    );

    let mut card = files.serve(&[]);
    let mut guest = Guest::new(&card);
    for block in 0..256 {
        let reply = guest.request(IN, block * 8, &[], 4096);
        let expected = &data[block as usize * 4096..][..4096];
        if bad.contains(&block) {
            assert_eq!((reply.status, reply.written), (IOERR, 1));
            let is_untouched = reply.data.iter().all(|byte| *byte == 0xee);
            assert!(is_untouched, "nothing reached the guest");
        } else {
            assert_eq!((reply.status, &reply.data[..]), (OK, expected));
        }
    }
    card.wait_for(&format!(
        "block {} (byte offset {}) of volume vol",
        bad[0],
        bad[0] * 4096
    ));
    assert!(card.log().contains("the guest gets an I/O error"));
    // A request that touches it fails, its neighbours do not; a partial write cannot be merged;
    // a whole new block makes it good.
    assert_eq!(
        guest.request(IN, (bad[0] - 1) * 8, &[], 16384).status,
        IOERR
    );
    assert_eq!(
        guest.request(OUT, bad[0] * 8 + 1, &[1; 512], 0).status,
        IOERR
    );
    guest.write(bad[0] * 8, &data[..4096]);
    assert_eq!(guest.read(bad[0] * 8, 4096), data[..4096]);
    // A guest that reads it for ever does not fill the log.
    for _ in 0..500 {
        assert_eq!(guest.request(IN, bad[2] * 8, &[], 512).status, IOERR);
    }
    assert!(card.log().lines().count() < 50);
    drop(guest);
    card.stop();

    // What can be saved is saved, and the rest is named.
    let (key, volume, image) = (files.text("key"), files.text("volume"), files.text("image"));
    let export = run(&["export", "--key-file", &key, &volume, &image]);
    assert_eq!(export.status.code(), Some(1));
    assert!(stderr(&export).contains("2 blocks"), "{}", stderr(&export));
    let image = std::fs::read(files.path("image")).unwrap();
    for block in 0..256 {
        let at = block as usize * 4096;
        let found = &image[at..at + 4096];
        if block == bad[1] || block == bad[2] {
            assert_eq!(found, [0; 4096]);
        } else if block == bad[0] {
            assert_eq!(found, &data[..4096]);
        } else {
            assert_eq!(found, &data[at..at + 4096]);
        }
    }
}

#[test]
fn a_block_that_was_moved_put_back_or_wiped_is_detected() {
    let (files, data) = filled();
    let slot = |at: u64| {
        let mut bytes = vec![0; 4096];
        files.raw().read_exact_at(&mut bytes, at).unwrap();
        bytes
    };
    let old = slot(places(&files)[&3]);
    let card = files.serve(&[]);
    let mut guest = Guest::new(&card);
    guest.write(24, &pattern(2, 4096));
    drop(guest);
    card.stop();
    let places = places(&files);
    // Block 3 as it was before, block 9 with what block 5 has, block 12 never written.
    files.raw().write_all_at(&old, places[&3]).unwrap();
    files
        .raw()
        .write_all_at(&slot(places[&5]), places[&9])
        .unwrap();
    files.raw().write_all_at(&[0; 4096], places[&12]).unwrap();
    let check = files.on_volume("check", &["--json"]);
    let report: serde_json::Value = serde_json::from_slice(&check.stdout).unwrap();
    assert_eq!(report["problem_count"], 3, "{report}");
    let card = files.serve(&[]);
    let mut guest = Guest::new(&card);
    for block in 0..16 {
        let reply = guest.request(IN, block * 8, &[], 4096);
        if [3, 9, 12].contains(&block) {
            assert_eq!(reply.status, IOERR, "block {block}");
        } else {
            assert!(
                reply.data == data[block as usize * 4096..][..4096],
                "block {block}"
            );
        }
    }
    drop(guest);
    card.stop();
}

/// A small file system, which takes root to mount.
struct Mounted(std::path::PathBuf);

impl Mounted {
    fn new(files: &Files, kind: &str) -> Self {
        let mount = files.path("small");
        std::fs::create_dir(&mount).unwrap();
        let mut command = Command::new("mount");
        if kind == "tmpfs" {
            command.args(["-t", "tmpfs", "-o", "size=24m", "none"]);
        } else {
            let disk = files.path("small-disk");
            let file = std::fs::File::create(&disk).unwrap();
            file.set_len(32 << 20).unwrap();
            let mut mkfs = Command::new(format!("mkfs.{kind}"));
            assert!(mkfs.arg("-q").arg(&disk).status().unwrap().success());
            command.args(["-o", "loop"]).arg(&disk);
        }
        assert!(
            command.arg(&mount).status().unwrap().success(),
            "this test needs root"
        );
        Self(mount)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_full_tmpfs_costs_new_writes_only() {
    a_full_file_system_costs_new_writes_only("tmpfs");
}

#[test]
fn a_full_ext4_costs_new_writes_only() {
    a_full_file_system_costs_new_writes_only("ext4");
}

fn a_full_file_system_costs_new_writes_only(kind: &str) {
    let files = Files::new();
    let _mounted = Mounted::new(&files, kind);
    let (key, volume) = (files.text("key"), files.text("small/volume"));
    succeeds(&["create", "--size", "64M", "--key-file", &key, &volume]);

    let card = Card::start(&files, &volume, &[]);
    let mut guest = Guest::new(&card);
    let mut kept = Vec::new();
    let mut refused = 0;
    for mib in 0..48_u64 {
        let data = pattern(mib, 1 << 20);
        match guest.request(OUT, mib * 2048, &data, 0).status {
            OK => kept.push(mib),
            status => {
                assert_eq!(status, IOERR);
                refused += 1;
            }
        }
    }
    assert!(
        refused > 0 && kept.len() > 8,
        "{refused} refused, {} kept",
        kept.len()
    );
    assert_eq!(guest.request(FLUSH, 0, &[], 0).status, OK);
    for mib in &kept {
        assert!(
            guest.read(mib * 2048, 1 << 20) == pattern(*mib, 1 << 20),
            "MiB {mib}"
        );
    }
    drop(guest);
    card.stop();
    let card = Card::start(&files, &volume, &[]);
    let mut guest = Guest::new(&card);
    for mib in &kept {
        assert!(
            guest.read(mib * 2048, 1 << 20) == pattern(*mib, 1 << 20),
            "MiB {mib}"
        );
    }
    drop(guest);
    card.stop();
    assert!(succeeds(&["check", "--key-file", &key, &volume]).ends_with("clean\n"));
}

#[test]
fn the_event_and_the_log_line_come_before_the_file_system_is_full_and_only_once() {
    use offload::control::ControlClient;
    use serde_json::Value;
    use std::time::Duration;
    let files = Files::new();
    let _mounted = Mounted::new(&files, "tmpfs");
    let (key, volume) = (files.text("key"), files.text("small/volume"));
    succeeds(&["create", "--size", "64M", "--key-file", &key, &volume]);
    std::fs::write(files.path("small/ballast"), vec![1; 8 << 20]).unwrap();
    let control = files.path("control");
    let rest = [
        "--control-socket",
        control.to_str().unwrap(),
        "--low-space",
        "80",
    ];
    let mut card = Card::start(&files, &volume, &rest);
    let mut events = ControlClient::connect(&control)
        .unwrap()
        .subscribe()
        .unwrap();
    let mut guest = Guest::new(&card);
    let mut told = None;
    let mut mib = 0;
    while guest
        .request(OUT, mib * 2048, &pattern(mib, 1 << 20), 0)
        .status
        == OK
    {
        mib += 1;
        assert!(mib < 48, "it is never full");
        if let Some(event) = events.next(Duration::from_millis(100)).unwrap() {
            assert_eq!(told, None, "{event}");
            told = Some(mib);
            assert_eq!(
                (&event["kind"], &event["of"]),
                (&"low_space".into(), &"backing".into())
            );
            assert!(event["free_bytes"].as_u64().unwrap() > 1 << 20, "{event}");
            assert!(event["percent_used"].as_u64().unwrap() >= 80, "{event}");
        }
    }
    assert!(told.is_some_and(|at| at < mib), "{told:?} of {mib}");
    let mut client = ControlClient::connect(&control).unwrap();
    let stats = client.call("stats", Value::Null).unwrap();
    assert!(stats["backing_free_bytes"][0]["value"].as_u64().unwrap() < 4 << 20);
    assert!(stats["slots_free_bytes"][0]["value"].as_u64().unwrap() > 30 << 20);
    assert_eq!(card.log().matches("% full").count(), 1, "{}", card.log());

    // Somebody makes room.
    std::fs::remove_file(files.path("small/ballast")).unwrap();
    let event = events.next(PATIENCE).unwrap().unwrap();
    assert_eq!(event["kind"], "ample_space", "{event}");
    card.wait_for("there is room for the volume again");
    drop(guest);
    card.stop();
}

#[test]
fn an_event_tells_of_a_new_size() {
    use offload::control::ControlClient;
    use std::time::Duration;
    let files = Files::with_volume("16M");
    let control = files.path("control");
    let card = files.serve(&["--control-socket", control.to_str().unwrap()]);
    let guest = Guest::new(&card);
    let mut events = ControlClient::connect(&control)
        .unwrap()
        .subscribe()
        .unwrap();
    let control = control.to_str().unwrap();
    succeeds(&["resize", "--control-socket", control, "--size", "32M"]);
    let event = events.next(Duration::from_secs(10)).unwrap().unwrap();
    assert_eq!(event["kind"], "resized");
    assert_eq!(event["size_bytes"], 32 << 20);
    drop(guest);
    card.stop();
}
