//! One card, one volume, several sockets.

#![allow(clippy::unwrap_used)]

mod common;

use std::time::{Duration, Instant};

use common::{Card, Files, Guest, IN, IOERR, OK, OUT, fails, pattern};
use offload::control::ControlClient;
use serde_json::Value;

const LEN: usize = 16 << 10;
const SECTORS: u64 = (LEN / 512) as u64;
const PIECES: u64 = 64;

/// A volume with something in it.
fn filled() -> Files {
    let files = Files::with_volume("16M");
    let card = files.serve(&[]);
    let mut guest = Guest::new(&card);
    for n in 0..PIECES {
        guest.write(n * SECTORS, &pattern(n, LEN));
    }
    guest.flush();
    drop(guest);
    card.stop();
    files
}

/// A guest on another socket than the card's first.
fn guest_on(card: &Card, files: &Files, socket: &str) -> Guest {
    let first = &card.socket;
    let other = files.path(socket);
    assert_ne!(*first, other);
    Guest::at(&other, common::Options::default())
}

fn shared(files: &Files, rest: &[&str]) -> Card {
    let (second, third) = (files.text("sock2"), files.text("sock3"));
    let sockets = ["--socket-path", &second, "--socket-path", &third];
    files.serve(&[&["--read-only"], &sockets[..], rest].concat())
}

#[test]
fn clients_of_several_sockets_read_one_volume_at_once_and_come_and_go() {
    let files = filled();
    let card = shared(&files, &["--queues", "2"]);
    let mut first = Guest::new(&card);
    let mut second = guest_on(&card, &files, "sock2");
    // All requests of both are out at the same time.
    let send = |guest: &mut Guest, from: u64| -> Vec<_> {
        (0..15)
            .map(|n| (from + n) % PIECES)
            .map(|n| (n, guest.send(0, IN, n * SECTORS, &[], LEN).unwrap()))
            .collect()
    };
    for round in 0..20 {
        let (a, b) = (send(&mut first, round), send(&mut second, round * 7 + 30));
        for (guest, tickets) in [(&mut first, a), (&mut second, b)] {
            for (n, ticket) in tickets {
                let reply = guest.wait(&ticket);
                assert_eq!((reply.status, reply.data), (OK, pattern(n, LEN)));
            }
        }
    }
    let refused = second.request(OUT, 0, &[1; 512], 0);
    assert_eq!(refused.status, IOERR);

    // One leaves with requests under way; the other does not notice, and the place is free again.
    send(&mut second, 0);
    drop(second);
    assert_eq!(first.read(0, LEN), pattern(0, LEN));
    let mut third = guest_on(&card, &files, "sock3");
    let mut second = guest_on(&card, &files, "sock2");
    drop(first);
    for guest in [&mut second, &mut third] {
        assert_eq!(guest.read(5 * SECTORS, LEN), pattern(5, LEN));
    }

    // SIGTERM ends all, with clients connected, and takes the sockets away.
    card.stop();
    for socket in ["sock", "sock2", "sock3"] {
        assert!(!files.path(socket).exists(), "{socket}");
    }
    assert!(files.on_volume("check", &[]).status.success());
}

#[test]
fn clients_of_all_sockets_share_one_limit_and_are_told_apart_in_the_metrics() {
    let files = filled();
    let control = files.text("control");
    let card = shared(&files, &["--iops", "400", "--control-socket", &control]);
    let mut guests = [Guest::new(&card), guest_on(&card, &files, "sock2")];
    let begin = Instant::now();
    let mut counts = [0_u64; 2];
    // The first keeps eight requests under way, the second one.
    let mut tickets: Vec<Vec<_>> = [8, 1]
        .iter()
        .zip(&mut guests)
        .map(|(depth, guest)| {
            let send = |_| guest.send(0, IN, 0, &[], LEN).unwrap();
            (0..*depth).map(send).collect()
        })
        .collect();
    while begin.elapsed() < Duration::from_secs(2) {
        for ((guest, tickets), count) in guests.iter_mut().zip(&mut tickets).zip(&mut counts) {
            for ticket in tickets {
                if guest.poll(ticket).is_some() {
                    *count += 1;
                    *ticket = guest.send(0, IN, 0, &[], LEN).unwrap();
                }
            }
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let most = 400 * (begin.elapsed().as_millis() as u64 + 25) / 1000 + 1;
    let sum = counts[0] + counts[1];
    assert!((500..=most).contains(&sum), "{counts:?}, most {most}");
    assert!(counts[1] >= 120, "{counts:?}");

    let mut client = ControlClient::connect(&files.path("control")).unwrap();
    let stats = client.call("stats", Value::Null).unwrap();
    let requests = stats["requests"].as_array().unwrap();
    assert_eq!(requests.len(), 3, "{requests:?}");
    for (socket, count) in ["sock", "sock2"].iter().zip(counts) {
        let name = files.text(socket);
        let mut of = requests.iter().filter(|r| r["labels"]["socket"] == *name);
        assert!(of.next().unwrap()["value"].as_u64().unwrap() >= count);
    }
    assert_eq!(stats["blocks_opened"].as_array().unwrap().len(), 1);
    drop(guests);
    card.stop();
}

#[test]
fn a_volume_that_is_written_is_not_shared() {
    let files = Files::with_volume("16M");
    let (volume, key) = (files.text("volume"), files.text("key"));
    let (a, b) = (files.text("a"), files.text("b"));
    let serve = ["serve", "--volume", &volume, "--key-file", &key];
    let two = ["--socket-path", &a, "--socket-path", &b];
    let said = fails(&[&serve[..], &two].concat(), 1);
    assert!(said.contains("only with --read-only"), "{said}");
    assert!(said.contains("overwrite"), "{said}");
    assert!(!files.path("a").exists());
    // The same one twice is a mistake.
    let twice = ["--read-only", "--socket-path", &a, "--socket-path", &a];
    let said = fails(&[&serve[..], &twice].concat(), 1);
    assert!(said.contains("in use"), "{said}");
    assert!(!files.path("a").exists());
}
