//! Killed, stopped, restarted, read-only, write-through: what becomes of what was acknowledged.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashMap;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use common::*;

#[test]
fn kill_9_under_load_loses_no_acknowledged_write() {
    kill_9_under_load(&Files::with_volume("64M"), 150);
}

/// Where the card does not use io_uring for data.
#[test]
fn kill_9_under_load_loses_no_acknowledged_write_in_memory() {
    let memory = std::path::Path::new("/dev/shm");
    if !memory.is_dir() {
        eprintln!("no tmpfs at /dev/shm: not tested");
        return;
    }
    let files = Files::within(memory);
    files.create("64M");
    kill_9_under_load(&files, 15);
}

/// Kills the card again and again, up to 7 `step`s of a microsecond after its queues were filled.
fn kill_9_under_load(files: &Files, step: u64) {
    let mut card = files.serve(&["--queues", "2"]);
    let options = Options {
        queues: 2,
        ..Options::default()
    };
    let mut guest = Guest::with(&card, options);
    const BLOCKS: u64 = 64;
    // What each block may read as: the last acknowledged version, or any sent after it.
    let mut acknowledged: HashMap<u64, u64> = HashMap::new();
    let mut out: Vec<(u64, u64, Ticket)> = Vec::new();
    let mut version = 0;
    let mut resubmissions = 0;
    // A kill can find the card idle, in memory above all: then there are more of them.
    let mut round = 0;
    while round < 8 || (resubmissions == 0 && round < 100) {
        let mut done = 0;
        let target = 150 + round % 8 * 37;
        // The queues are filled once more at the end, so that the kill meets a card at work.
        loop {
            while out.len() < 40 {
                version += 1;
                // One version of a block at a time, so that their order is known.
                let busy = |block: u64| out.iter().any(|(other, ..)| *other == block);
                let Some(block) = (0..BLOCKS)
                    .map(|i| (version * 7 + i) % BLOCKS)
                    .find(|block| !busy(*block))
                else {
                    break;
                };
                let queue = (version % 2) as usize;
                let data = pattern(version, 4096);
                match guest.send(queue, OUT, block * 8, &data, 0) {
                    Some(ticket) => out.push((block, version, ticket)),
                    None => break,
                }
                if version % 50 == 0 {
                    // Commits in between, so that the ring wraps over batches.
                    if let Some(flush) = guest.send(queue, FLUSH, 0, &[], 0) {
                        out.push((u64::MAX, version, flush));
                    }
                }
            }
            if done >= target {
                // With a full queue, in the middle of whatever it is at.
                break;
            }
            let mut still = Vec::new();
            for (block, version, ticket) in out {
                match guest.poll(&ticket) {
                    Some(reply) => {
                        assert_eq!(reply.status, OK);
                        acknowledged.insert(block, version);
                        done += 1;
                    }
                    None => still.push((block, version, ticket)),
                }
            }
            out = still;
        }
        // Not asleep: that would take longer than the whole load does in memory.
        let moment = Instant::now();
        while moment.elapsed() < Duration::from_micros(round % 8 * step) {
            std::hint::spin_loop();
        }
        card.kill();
        card = files.serve(&["--queues", "2"]);
        guest.reconnect(&card);
        resubmissions += card.log().matches("taking up chains").count();
        if round % 2 == 0 {
            // Let what was in flight come back, then look at everything.
            for (block, version, ticket) in std::mem::take(&mut out) {
                assert_eq!(guest.wait(&ticket).status, OK);
                acknowledged.insert(block, version);
            }
            for block in 0..BLOCKS {
                if let Some(version) = acknowledged.get(&block) {
                    let found = guest.read(block * 8, 4096);
                    assert!(
                        found == pattern(*version, 4096),
                        "block {block}, round {round}"
                    );
                }
            }
        }
        round += 1;
    }
    for (block, version, ticket) in std::mem::take(&mut out) {
        assert_eq!(guest.wait(&ticket).status, OK);
        acknowledged.insert(block, version);
    }
    assert!(resubmissions > 0, "no kill met a request under way");
    // A clean end, and the guest's region is of no use to anybody any more.
    drop(guest);
    card.stop();
    assert!(files.on_volume("check", &[]).status.success());
    let card = files.serve(&["--read-only"]);
    let mut guest = Guest::new(&card);
    for (block, version) in acknowledged.iter().filter(|(block, _)| **block < BLOCKS) {
        assert!(
            guest.read(block * 8, 4096) == pattern(*version, 4096),
            "block {block}"
        );
    }
    drop(guest);
    card.stop();
}

#[test]
fn a_reset_device_loses_nothing_although_its_region_is_freed() {
    let files = Files::with_volume("16M");
    let card = files.serve(&[]);
    let mut guest = Guest::new(&card);
    let data = pattern(3, 65536);
    guest.write(0, &data);
    // As QEMU does at a reset: GET_VRING_BASE, then the region is gone. Then the card dies.
    guest.frontend.stop_ring(0);
    guest.inflight().write_all_at(&vec![0; 1 << 20], 0).unwrap();
    // While the frontend is still there: its leaving would settle the volume as well.
    card.kill();
    drop(guest);
    let card = files.serve(&[]);
    let mut guest = Guest::new(&card);
    assert!(guest.read(0, 65536) == data);
    drop(guest);
    card.stop();
}

#[test]
fn a_region_of_another_life_is_refused_rather_than_going_back_in_time() {
    let files = Files::with_volume("16M");
    let card = files.serve(&[]);
    let mut old = Guest::new(&card);
    old.write(0, &[1; 4096]);
    card.kill();
    // Somebody else uses the volume in between.
    let card = files.serve(&[]);
    let mut other = Guest::new(&card);
    other.write(8, &[2; 4096]);
    drop(other);
    card.stop();
    let mut card = files.serve(&[]);
    let refused = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| old.reconnect(&card)));
    assert!(refused.is_err());
    card.wait_for("Restart the guest");
    drop(old);
    // The card lives on.
    let mut guest = Guest::new(&card);
    assert_eq!(guest.read(8, 4096), [2; 4096]);
    drop(guest);
    card.stop();
}

#[test]
fn a_driver_that_cannot_flush_gets_durable_writes_without_a_region() {
    // Without FLUSH a write is durable when it is done; without an in-flight region nothing else
    // could save it.
    for (features, survives) in [(1 << 32, true), (1 << 32 | F_CONFIG_WCE, true)] {
        let files = Files::with_volume("16M");
        let card = files.serve(&[]);
        let options = Options {
            features,
            inflight: false,
            ..Options::default()
        };
        let mut guest = Guest::with(&card, options);
        let data = pattern(4, 20480);
        guest.write(5, &data);
        card.kill();
        let card = files.serve(&[]);
        let mut guest = Guest::new(&card);
        assert_eq!(guest.read(5, 20480) == data, survives);
        drop(guest);
        card.stop();
    }
}

#[test]
fn a_cache_mode_that_the_driver_chose_survives_a_killed_card() {
    let files = Files::with_volume("16M");
    let card = files.serve(&[]);
    let mut guest = Guest::new(&card);
    assert!(guest.set_config(32, &[0]));
    card.kill();
    let card = files.serve(&[]);
    guest.reconnect(&card);
    assert_eq!(guest.frontend.config(32, 1), [0], "still writethrough");
    assert!(guest.set_config(32, &[1]));
    drop(guest);
    // Another driver starts with what its features say.
    let mut guest = Guest::new(&card);
    assert_eq!(guest.frontend.config(32, 1), [1]);
    drop(guest);
    card.stop();
}

#[test]
fn the_cache_mode_is_the_drivers_to_choose() {
    let files = Files::with_volume("16M");
    let card = files.serve(&[]);
    let options = Options {
        inflight: false,
        ..Options::default()
    };
    let mut guest = Guest::with(&card, options);
    assert_eq!(
        guest.frontend.config(32, 1),
        [1],
        "writeback, since it can flush"
    );
    assert!(guest.set_config(32, &[0]));
    assert_eq!(guest.frontend.config(32, 1), [0]);
    guest.write(0, &[5; 4096]);
    assert!(!guest.set_config(32, &[2]), "no such mode");
    assert!(
        !guest.set_config(0, &[1]),
        "the capacity is not the driver's"
    );
    assert_eq!(
        guest.read(0, 4096),
        [5; 4096],
        "and the connection lives on"
    );
    card.kill();
    let card = files.serve(&[]);
    let mut guest = Guest::new(&card);
    assert_eq!(guest.read(0, 4096), [5; 4096]);
    drop(guest);
    card.stop();
}

#[test]
fn flushed_writes_survive_without_a_region_and_the_others_may_not() {
    let files = Files::with_volume("16M");
    let mut card = files.serve(&[]);
    let options = || Options {
        inflight: false,
        ..Options::default()
    };
    let mut guest = Guest::with(&card, options());
    card.wait_for("keeps no in-flight region");
    guest.write(0, &[1; 4096]);
    guest.flush();
    guest.write(0, &[2; 4096]);
    guest.write(8, &[3; 4096]);
    card.kill();
    let card = files.serve(&[]);
    let mut guest = Guest::with(&card, options());
    let first = guest.read(0, 4096);
    assert!(first == [1; 4096] || first == [2; 4096]);
    let second = guest.read(8, 4096);
    assert!(second == [0; 4096] || second == [3; 4096]);
    drop(guest);
    card.stop();
}

#[test]
fn a_frontend_that_leaves_has_everything_durable() {
    let files = Files::with_volume("16M");
    let mut card = files.serve(&[]);
    let mut guest = Guest::new(&card);
    guest.write(0, &[6; 4096]);
    drop(guest);
    card.wait_for("the frontend has left");
    std::thread::sleep(std::time::Duration::from_millis(100));
    card.kill();
    let card = files.serve(&[]);
    let mut guest = Guest::new(&card);
    assert_eq!(guest.read(0, 4096), [6; 4096]);
    // One frontend after the other.
    drop(guest);
    let mut guest = Guest::new(&card);
    guest.write(0, &[7; 4096]);
    assert_eq!(guest.read(0, 4096), [7; 4096]);
    drop(guest);
    card.stop();
}

#[test]
fn a_read_only_volume_is_read_and_nothing_of_it_changes() {
    let files = Files::with_volume("16M");
    let card = files.serve(&[]);
    let mut guest = Guest::new(&card);
    guest.write(0, &[1; 8192]);
    drop(guest);
    card.stop();
    let before = std::fs::read(files.path("volume")).unwrap();
    let card = files.serve(&["--read-only"]);
    let mut guest = Guest::new(&card);
    assert_ne!(guest.features & (1 << 5), 0, "RO is offered");
    assert_eq!(guest.features & (1 << 13 | 1 << 14), 0, "DISCARD is not");
    assert_eq!(guest.read(0, 8192), [1; 8192]);
    assert_eq!(guest.request(OUT, 0, &[2; 512], 0).status, IOERR);
    assert_eq!(
        guest.request(DISCARD, 0, &segment(0, 8, 0), 0).status,
        UNSUPP
    );
    assert_eq!(guest.request(FLUSH, 0, &[], 0).status, OK);
    assert_eq!(guest.read(0, 8192), [1; 8192]);
    drop(guest);
    card.stop();
    assert!(std::fs::read(files.path("volume")).unwrap() == before);
}

#[test]
fn sigterm_under_load_ends_clean_and_loses_nothing() {
    let files = Files::with_volume("64M");
    let card = files.serve(&[]);
    let mut guest = Guest::new(&card);
    let tickets: Vec<Ticket> = (0..20)
        .map(|i| {
            guest
                .send(0, OUT, i * 512, &pattern(i, 200_704), 0)
                .unwrap()
        })
        .collect();
    card.stop();
    let before: Vec<Option<Reply>> = tickets.iter().map(|ticket| guest.poll(ticket)).collect();
    let card = files.serve(&[]);
    guest.reconnect(&card);
    for (ticket, reply) in tickets.iter().zip(before) {
        let reply = reply.unwrap_or_else(|| guest.wait(ticket));
        assert_eq!(reply.status, OK);
    }
    for i in 0..20 {
        assert!(guest.read(i * 512, 200_704) == pattern(i, 200_704), "{i}");
    }
    drop(guest);
    card.stop();
    let check = files.on_volume("check", &[]);
    assert!(check.status.success(), "{}", stdout(&check));
    assert!(stdout(&check).contains("the volume was closed"));
}

#[test]
fn the_control_socket_tells_what_the_card_does() {
    use offload::control::ControlClient;
    let files = Files::with_volume("16M");
    let control = files.text("control");
    let card = files.serve(&["--control-socket", &control]);
    let mut guest = Guest::new(&card);
    guest.write(0, &[1; 8192]);
    guest.read(0, 4096);
    let mut client = ControlClient::connect(&files.path("control")).unwrap();
    let null = serde_json::Value::Null;
    let volume = client.call("volume", null.clone()).unwrap();
    assert_eq!(volume["size_bytes"], 16 << 20);
    assert_eq!(volume["phase"], "serving");
    let stats = client.call("stats", null.clone()).unwrap();
    assert_eq!(stats["bytes_written"][0]["value"], 8192);
    assert_eq!(stats["bytes_read"][0]["value"], 4096);
    assert_eq!(stats["write"][0]["count"], 1);
    assert_eq!(stats["blocks_sealed"][0]["value"], 2);
    let metrics = client.call("metrics", null).unwrap();
    assert!(metrics.as_str().unwrap().contains("vhost_blk_read_seconds"));
    drop(guest);
    drop(client);
    card.stop();
    assert!(!files.path("control").exists() && !files.path("sock").exists());
}
