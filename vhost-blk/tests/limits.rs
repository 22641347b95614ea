//! Provisioned performance, with a real card.
//!
//! Bounds from above are sharp: more than the limit must never come. From below they leave room
//! for a machine that is busy with other tests.

#![allow(clippy::unwrap_used)]

mod common;

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use common::{FLUSH, Files, Guest, IN, OK, OUT, Options, PATIENCE, Ticket, fails, succeeds};
use offload::control::ControlClient;
use serde_json::{Value, json};

const SECTORS: u64 = 8;
const LEN: usize = 4096;

/// Keeps `depth` reads under way on each queue for this long; how many came back on each.
fn read_for(guest: &mut Guest, depth: usize, len: usize, time: Duration) -> Vec<u64> {
    let queues = guest.queues.len();
    let mut counts = vec![0; queues];
    let mut tickets: Vec<Ticket> = Vec::new();
    for queue in 0..queues {
        for n in 0..depth as u64 {
            tickets.push(guest.send(queue, IN, n * SECTORS, &[], len).unwrap());
        }
    }
    let end = Instant::now() + time;
    while Instant::now() < end {
        for ticket in &mut tickets {
            if let Some(reply) = guest.poll(ticket) {
                assert_eq!(reply.status, OK);
                counts[ticket.queue] += 1;
                *ticket = guest.send(ticket.queue, IN, 0, &[], len).unwrap();
            }
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    // What is still out is not counted, and let go by stopping the ring when the guest goes.
    counts
}

/// What a rate may let pass: with its slack of 20 ms, and a request.
fn most(rate: u64, time: Duration) -> u64 {
    rate * (time.as_millis() as u64 + 25) / 1000 + 1
}

#[test]
fn a_limited_volume_gives_its_rate_and_not_more() {
    let files = Files::with_volume("16M");
    let time = Duration::from_secs(2);
    for (limit, len, rate) in [
        (&["--iops", "500"][..], LEN, 500),
        (&["--bps", "1M"], LEN, 256),
        (&["--bps", "1M"], 16 * LEN, 16),
        (&["--iops", "800", "--io-size", "16K"], 16 * LEN, 200),
    ] {
        let card = files.serve(limit);
        let mut guest = Guest::new(&card);
        let begin = Instant::now();
        let count = read_for(&mut guest, 16, len, time)[0];
        let most = most(rate, begin.elapsed());
        assert!(count <= most, "{limit:?}: {count} of {most}");
        assert!(count >= rate * 3 / 2, "{limit:?}: {count}");
        drop(guest);
        card.stop();
    }
}

#[test]
fn queues_share_the_limit_fairly() {
    let files = Files::with_volume("16M");
    let card = files.serve(&["--iops", "600", "--queues", "2"]);
    let options = Options {
        queues: 2,
        ..Options::default()
    };
    let mut guest = Guest::with(&card, options);
    // The first queue is deep before the second has anything.
    for n in 0..20 {
        guest.send(0, IN, n * SECTORS, &[], LEN).unwrap();
    }
    let begin = Instant::now();
    let counts = read_for(&mut guest, 1, LEN, Duration::from_secs(2));
    let sum: u64 = counts.iter().sum();
    assert!(sum <= most(600, begin.elapsed()), "{counts:?}");
    // With its one request the second queue waits for one request of the first at a time.
    assert!(counts[1] >= 200, "{counts:?}");
    drop(guest);
    card.stop();
}

#[test]
fn a_burst_is_spent_first_and_shows_in_the_metrics_when_it_is() {
    let files = Files::with_volume("16M");
    let control = files.text("control");
    let limits = ["--iops", "100", "--iops-burst", "1100:1"];
    let card = files.serve(&[&limits[..], &["--control-socket", &control]].concat());
    let mut guest = Guest::new(&card);
    let begin = Instant::now();
    let count = read_for(&mut guest, 16, LEN, Duration::from_secs(3))[0];
    // 1000 credits and 100 a second.
    let most = 1000 + most(100, begin.elapsed());
    assert!((900..=most).contains(&count), "{count} of {most}");
    let mut client = ControlClient::connect(&files.path("control")).unwrap();
    let stats = client.call("stats", Value::Null).unwrap();
    let throttled = &stats["throttled"][0];
    assert!(throttled["count"].as_u64().unwrap() > 100, "{throttled}");
    assert!(throttled["max_ns"].as_u64().unwrap() > 50_000_000);
    drop(guest);
    card.stop();
}

#[test]
fn a_ring_with_throttled_requests_stops_at_once_with_all_of_them_served() {
    let files = Files::with_volume("16M");
    let card = files.serve(&["--iops", "1"]);
    let mut guest = Guest::new(&card);
    let mut tickets = Vec::new();
    for n in 0..15 {
        let data = common::pattern(n, LEN);
        tickets.push(guest.send(0, OUT, n * SECTORS, &data, 0).unwrap());
    }
    tickets.push(guest.send(0, FLUSH, 0, &[], 0).unwrap());
    std::thread::sleep(Duration::from_millis(300));
    let back = tickets.iter().filter(|t| guest.poll(t).is_some()).count();
    assert!(back <= 2, "{back} passed");
    let begin = Instant::now();
    guest.frontend.stop_ring(0);
    assert!(begin.elapsed() < Duration::from_secs(5));
    while let Some(used) = guest.queues[0].poll_used() {
        tickets.retain(|ticket| ticket.head != used.head);
    }
    assert!(tickets.len() <= back, "{tickets:?} were not served");
    drop(guest);
    card.stop();
    // They were really written.
    let card = files.serve(&["--read-only"]);
    let mut guest = Guest::new(&card);
    for n in 0..15 {
        assert_eq!(guest.read(n * SECTORS, LEN), common::pattern(n, LEN));
    }
    drop(guest);
    card.stop();
}

#[test]
fn a_card_ends_at_once_although_requests_are_throttled() {
    let files = Files::with_volume("16M");
    let card = files.serve(&["--bps", "4096"]);
    let mut guest = Guest::new(&card);
    for n in 0..8 {
        guest.send(0, IN, n * SECTORS, &[], 1 << 20).unwrap();
    }
    std::thread::sleep(Duration::from_millis(50));
    let begin = Instant::now();
    card.stop();
    assert!(begin.elapsed() < Duration::from_secs(10));
}

#[test]
fn limits_are_changed_while_requests_wait_for_the_old_ones() {
    let files = Files::with_volume("16M");
    let control = files.text("control");
    let card = files.serve(&["--bps", "4096", "--control-socket", &control]);
    let mut guest = Guest::new(&card);
    let tickets: Vec<Ticket> = (0..8)
        .map(|n| guest.send(0, IN, n * SECTORS, &[], 1 << 20).unwrap())
        .collect();
    std::thread::sleep(Duration::from_millis(100));
    assert!(guest.poll(&tickets[7]).is_none());

    let mut client = ControlClient::connect(&files.path("control")).unwrap();
    let old = client.call("limits", Value::Null).unwrap();
    assert_eq!(old["bps"], 4096);
    for (wrong, hint) in [
        (json!({"iops": 0}), "let nothing pass"),
        (json!({"iops": 1.5}), "iops"),
        (json!({"iops": 5, "iops_burst": {"rate": 5}}), "not above"),
        (json!({"bps": 100}), "one block"),
        (json!({"io_size": 4096}), "without a limit"),
        (json!({"rate": 5}), "rate"),
        (json!([1]), "limits are"),
    ] {
        let error = client.call("limits", wrong.clone()).unwrap_err();
        assert!(error.to_string().contains(hint), "{wrong}: {error}");
    }
    assert_eq!(client.call("limits", Value::Null).unwrap(), old);

    // What the command line does, and it holds for those that wait.
    let set = ["limits", "--control-socket", &control, "--bps", "1G"];
    let begin = Instant::now();
    assert!(succeeds(&set).contains("1 GiB a second"));
    for ticket in &tickets {
        assert_eq!(guest.wait(ticket).status, OK);
    }
    assert!(begin.elapsed() < PATIENCE);
    assert!(card.log().contains("limits were changed"));
    let none = succeeds(&["limits", "--control-socket", &control, "--none", "--json"]);
    assert!(none.contains(r#""bps":null"#), "{none}");
    let both = [
        "limits",
        "--control-socket",
        &control,
        "--none",
        "--iops",
        "5",
    ];
    assert!(fails(&both, 1).contains("--none"));
    drop(guest);
    card.stop();
}

#[test]
fn a_card_does_not_start_with_limits_that_cannot_be_kept() {
    let files = Files::with_volume("16M");
    let (volume, key) = (files.text("volume"), files.text("key"));
    let socket = files.text("sock");
    let serve = ["serve", "--volume", &volume, "--key-file", &key];
    let serve = [&serve[..], &["--socket-path", &socket]].concat();
    for (limit, hint) in [
        (&["--iops", "0"][..], "let nothing pass"),
        (&["--bps", "1K"], "one block"),
        (&["--iops", "99999999999"], "too large"),
        (&["--iops", "100", "--iops-burst", "50"], "not above"),
        (&["--iops", "100", "--io-size", "5000"], "powers of two"),
    ] {
        let said = fails(&[&serve[..], limit].concat(), 1);
        assert!(said.contains(hint), "{limit:?}: {said}");
        assert!(!files.path("sock").exists());
    }
}

#[test]
fn another_user_may_not_change_the_limits_even_when_the_files_let_it_in() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can start a process of another user");
        return;
    }
    let files = Files::with_volume("16M");
    let control = files.text("control");
    let card = files.serve(&["--iops", "100", "--control-socket", &control]);
    let open = |name: &str, mode| {
        let permissions = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(files.path(name), permissions).unwrap();
    };
    // A copy, because the build directory need not be readable for others.
    std::fs::copy(env!("CARGO_BIN_EXE_vhost-blk"), files.path("program")).unwrap();
    open("program", 0o755);
    open("control", 0o666);
    open(".", 0o755);
    let call = |uid: u32, iops: &str| {
        let mut command = Command::new(files.path("program"));
        command.args(["limits", "--control-socket", &control, "--iops", iops]);
        command.uid(uid).output().unwrap()
    };
    let refused = call(65534, "7");
    assert_eq!(refused.status.code(), Some(1));
    let said = common::stderr(&refused);
    assert!(said.contains("user 65534 may not talk here"), "{said}");
    let mut client = ControlClient::connect(&files.path("control")).unwrap();
    assert_eq!(client.call("limits", Value::Null).unwrap()["iops"], 100);
    assert!(call(0, "7").status.success());
    assert_eq!(client.call("limits", Value::Null).unwrap()["iops"], 7);
    card.stop();
}
