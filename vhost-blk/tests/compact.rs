//! Blocks that move: by `compact` on a volume and on a card, and by a card that is idle.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use common::*;
use offload::control::ControlClient;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
const BLOCKS: u64 = 64 * MIB / 4096;

/// What each block was written with.
type Contents = HashMap<u64, u64>;

/// Fills the volume, overwrites many of its blocks out of order, discards some stretches.
fn scatter(guest: &mut Guest) -> Contents {
    let mut contents = Contents::new();
    for first in (0..BLOCKS).step_by(64) {
        let data: Vec<u8> = (first..first + 64)
            .flat_map(|block| pattern(block, 4096))
            .collect();
        guest.write(first * 8, &data);
        contents.extend((first..first + 64).map(|block| (block, block)));
    }
    for step in 0..BLOCKS / 3 {
        // 4099 is prime: each block once, far from the last.
        let block = step * 4099 % BLOCKS;
        guest.write(block * 8, &pattern(step + 1_000_000, 4096));
        contents.insert(block, step + 1_000_000);
        if step % 500 == 0 {
            guest.flush();
        }
    }
    for first in (0..BLOCKS / 2).step_by(64) {
        let reply = guest.request(DISCARD, 0, &segment(first * 8, 16 * 8, 0), 0);
        assert_eq!(reply.status, OK);
        for block in first..first + 16 {
            contents.remove(&block);
        }
    }
    guest.flush();
    contents
}

fn assert_same(guest: &mut Guest, contents: &Contents) {
    for first in (0..BLOCKS).step_by(64) {
        let data = guest.read(first * 8, 64 * 4096);
        for (block, data) in (first..).zip(data.chunks(4096)) {
            let expected = contents
                .get(&block)
                .map_or(vec![0; 4096], |seed| pattern(*seed, 4096));
            assert!(data == expected, "block {block} is not what was written");
        }
    }
}

fn allocated(files: &Files) -> u64 {
    std::fs::metadata(files.path("volume")).unwrap().blocks() * 512
}

fn ask(files: &Files, method: &str, params: Value) -> Value {
    let mut client = ControlClient::connect(&files.path("control")).unwrap();
    client.call(method, params).unwrap()
}

#[test]
fn compact_gives_room_back_and_changes_nothing_else() {
    let files = Files::with_volume("64M");
    let card = files.serve(&["--rehome-rate", "0"]);
    let mut guest = Guest::new(&card);
    let contents = scatter(&mut guest);
    drop(guest);
    card.stop();
    let before = allocated(&files);
    let said = files.on_volume("compact", &[]);
    assert!(said.status.success(), "{}", stderr(&said));
    assert!(stdout(&said).contains("moved "), "{}", stdout(&said));
    let after = allocated(&files);
    // 56 MiB are left, and the log, the headers and the map.
    assert!(
        after < 66 * MIB && after + 8 * MIB < before,
        "{before}, {after}"
    );
    assert!(files.on_volume("check", &[]).status.success());
    let card = files.serve(&["--rehome-rate", "0"]);
    assert_same(&mut Guest::new(&card), &contents);
    card.stop();
    // There is nothing left to do.
    let again = files.on_volume("compact", &[]);
    assert!(stdout(&again).starts_with("moved 0"), "{}", stdout(&again));
}

#[test]
fn a_served_volume_is_compacted_under_its_guest() {
    let files = Files::with_volume("64M");
    let control = files.text("control");
    let card = files.serve(&["--rehome-rate", "0", "--control-socket", &control]);
    let mut guest = Guest::new(&card);
    let contents = scatter(&mut guest);
    let before = allocated(&files);
    let said = succeeds(&["compact", "--control-socket", &control]);
    assert!(said.contains("moved "), "{said}");
    let after = allocated(&files);
    assert!(
        after < 68 * MIB && after + 8 * MIB < before,
        "{before}, {after}"
    );
    assert_same(&mut guest, &contents);
    let progress = ask(&files, "compact", Value::Null);
    assert_eq!(progress["is_running"], false);
    assert_eq!(progress["done"], progress["parts"]);
    drop(guest);
    card.stop();
    assert!(files.on_volume("check", &[]).status.success());
}

#[test]
fn an_idle_volume_is_moved_together_and_a_busy_one_is_left_alone() {
    let files = Files::with_volume("64M");
    let control = files.text("control");
    let card = files.serve(&["--rehome-rate", "0", "--control-socket", &control]);
    let mut guest = Guest::new(&card);
    let contents = scatter(&mut guest);
    let state = |params| ask(&files, "rehome", params);
    assert_eq!(state(Value::Null)["moved_blocks"], 0);
    assert_eq!(state(json!({"rate": 1 << 30}))["rate"], 1 << 30);
    let began = Instant::now();
    while state(Value::Null)["scattered_parts"] != 0 {
        assert!(
            began.elapsed() < Duration::from_secs(60),
            "{}",
            state(Value::Null)
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    let moved = state(Value::Null)["moved_blocks"].as_u64().unwrap();
    assert!(moved > BLOCKS / 2, "{moved} blocks moved");
    assert_same(&mut guest, &contents);
    // What lies together stays.
    std::thread::sleep(Duration::from_millis(2500));
    assert!(state(Value::Null)["moved_blocks"].as_u64().unwrap() < moved * 2);
    drop(guest);
    card.stop();
    assert!(files.on_volume("check", &[]).status.success());
}

#[test]
fn compact_says_what_it_needs() {
    let files = Files::with_volume("16M");
    assert!(fails(&["compact"], 2).contains("VOLUME"));
    let volume = files.text("volume");
    assert!(fails(&["compact", &volume], 1).contains("--key-file"));
    let nowhere = files.text("nowhere");
    let said = fails(&["compact", "--control-socket", &nowhere], 1);
    assert!(said.contains("is the card running?"), "{said}");
}

/// What was overwritten is free and still in the backing, and on a small volume little is much of it.
#[test]
fn an_idle_volume_of_which_all_was_discarded_keeps_no_room_for_data() {
    let files = Files::with_volume("24M");
    let card = files.serve(&[]);
    let mut guest = Guest::new(&card);
    for round in 0..3 {
        for mib in 0..24 {
            guest.write(mib * 2048, &pattern(round * 100 + mib, MIB as usize));
        }
        guest.flush();
    }
    assert!(allocated(&files) > 24 * MIB);
    let all = segment(0, 24 * 2048, 0);
    assert_eq!(guest.request(DISCARD, 0, &all, 0).status, OK);
    guest.flush();
    // Headers, the log of 4 MiB, and the chunks that hold the map's pages.
    let end = Instant::now() + PATIENCE;
    while allocated(&files) > 10 * MIB {
        assert!(Instant::now() < end, "{} bytes stay", allocated(&files));
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(guest.read(5 * 2048, 4096), [0; 4096]);
    guest.write(0, &[7; 8192]);
    guest.flush();
    assert_eq!(guest.read(0, 8192), [7; 8192]);
    drop(guest);
    card.stop();
    assert!(files.on_volume("check", &[]).status.success());
}
