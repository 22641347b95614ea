//! A guest that opens, uses and closes more than it should, on real sockets of the host's loopback:
//! nothing leaks, nothing grows, and who behaves is served meanwhile.
//!
//! One test, in a process of its own: descriptors and memory are the process's.

#![allow(clippy::unwrap_used, missing_docs)]

mod harness;

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::sync::Arc;
use std::time::{Duration, Instant};

use etherparse::PacketBuilder;
use harness::Lab;
use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp::State;
use vhost_net::services::imds::{CONNECTIONS_MAX, MetadataSpec};

const FLOWS_MAX: usize = 1000;
const CONNECTIONS: usize = 10_000;
const AT_ONCE: usize = 100;

type Server = (Ipv4Addr, u16);

fn fresh() -> Lab {
    Lab::new(FLOWS_MAX, &MetadataSpec::default())
}

fn connect(lab: &mut Lab, to: Server) -> SocketHandle {
    lab.connect((IpAddr::V4(to.0), to.1))
}

/// Opens, uses and closes `count` connections at once.
fn use_connections(lab: &mut Lab, to: Server, count: usize) {
    let all: Vec<_> = (0..count).map(|_| connect(lab, to)).collect();
    lab.until("all are there", |lab| {
        all.iter()
            .all(|it| lab.socket(*it).state() == State::Established)
    });
    for handle in &all {
        lab.socket(*handle).send_slice(b"sixteen letters!").unwrap();
    }
    lab.until("all are answered", |lab| {
        all.iter().all(|it| lab.socket(*it).recv_queue() == 16)
    });
    for handle in &all {
        let mut echoed = [0; 16];
        let socket = lab.socket(*handle);
        assert_eq!(socket.recv_slice(&mut echoed), Ok(16));
        assert_eq!(&echoed, b"sixteen letters!");
        socket.close();
    }
    lab.until("all are closed", |lab| {
        let is_closed = |state| matches!(state, State::TimeWait | State::Closed);
        all.iter().all(|it| is_closed(lab.socket(*it).state()))
    });
    for handle in all {
        lab.sockets.remove(handle);
    }
}

fn has_no_flows(lab: &mut Lab) {
    lab.until("no flow is left", |lab| lab.card.stack.flow_count() == 0);
}

/// Answers 16 bytes with the same, and closes when the other side does.
fn echo() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    // Or the kernel drops what a flood brings at once, and tries it again later and later.
    rustix::net::listen(&listener, 4096).unwrap();
    let port = listener.local_addr().unwrap().port();
    let (sender, streams) = std::sync::mpsc::channel::<std::net::TcpStream>();
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            sender.send(stream).unwrap();
        }
    });
    let streams = Arc::new(std::sync::Mutex::new(streams));
    for _ in 0..AT_ONCE + 8 {
        let streams = Arc::clone(&streams);
        std::thread::spawn(move || {
            loop {
                let next = streams.lock().unwrap().recv();
                let Ok(mut stream) = next else { return };
                let mut buffer = [0; 16];
                while stream.read_exact(&mut buffer).is_ok() {
                    if stream.write_all(&buffer).is_err() {
                        break;
                    }
                }
            }
        });
    }
    port
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Resident memory in KiB.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .unwrap();
    line.split_ascii_whitespace()
        .nth(1)
        .unwrap()
        .parse()
        .unwrap()
}

#[test]
fn ten_thousand_connections_and_floods_of_every_kind_leave_nothing_and_starve_nobody() {
    vhost_net::memory::use_fresh_pages();
    let mut lab = fresh();
    let server = (Ipv4Addr::new(10, 0, 2, 2), echo());

    // 10,000 connections, a hundred at once.
    use_connections(&mut lab, server, AT_ONCE);
    has_no_flows(&mut lab);
    let (memory, fds) = (resident(), descriptors());
    let begun = Instant::now();
    for _ in 0..CONNECTIONS / AT_ONCE {
        use_connections(&mut lab, server, AT_ONCE);
    }
    has_no_flows(&mut lab);
    let took = begun.elapsed();
    lab.until("its sockets are closed", |_| descriptors() <= fds);
    let grown = resident().saturating_sub(memory);
    println!(
        "{CONNECTIONS} connections in {took:.1?}: {grown} KiB more, {fds} descriptors as before"
    );
    assert!(grown < 16 << 10, "{grown} KiB more than before");

    // A flood of SYNs to a server that answers: the table fills and no more, and what was there goes on.
    let held = connect(&mut lab, server);
    lab.until("it is there", |lab| {
        lab.socket(held).state() == State::Established
    });
    let before = resident();
    let flood = |lab: &mut Lab, from: std::ops::Range<u16>, to: (Ipv4Addr, u16)| {
        for port in from {
            let mut packet = Vec::new();
            PacketBuilder::ipv4([10, 0, 2, 15], to.0.octets(), 64)
                .tcp(port, to.1, 7, 60_000)
                .syn()
                .write(&mut packet, &[])
                .unwrap();
            lab.send(&packet);
        }
    };
    flood(&mut lab, 30_000..40_000, server);
    assert_eq!(lab.card.stack.flow_count(), FLOWS_MAX);
    let refused = lab.stats.stack.table_full.get();
    assert!(refused >= 9000, "{refused}");
    lab.nic.rx.clear();
    lab.wire.0.clear();
    lab.socket(held).send_slice(b"sixteen letters!").unwrap();
    lab.until("it is answered in the flood", |lab| {
        lab.socket(held).recv_queue() == 16
    });
    let grown = resident().saturating_sub(before);
    println!("a full table of {FLOWS_MAX} half-open flows: {grown} KiB, {refused} refused");
    assert!(
        grown < FLOWS_MAX as u64 * 64,
        "{grown} KiB for {FLOWS_MAX} flows"
    );
    // Nobody completes them: they end by themselves.
    lab.ahead += vhost_net::stack::HANDSHAKE + Duration::from_secs(1);
    lab.until("the flood is over", |lab| lab.card.stack.flow_count() == 1);
    lab.socket(held).close();
    has_no_flows(&mut lab);
    use_connections(&mut lab, server, AT_ONCE);

    drop(lab);
    // With a clock that is not ahead yet.
    let mut lab = fresh();

    // A flood of connections to the metadata service, each of which dribbles.
    let imds = (Ipv4Addr::new(169, 254, 169, 254), 80);
    let all: Vec<_> = (0..3 * CONNECTIONS_MAX)
        .map(|_| connect(&mut lab, imds))
        .collect();
    lab.until("as many as there may be", |lab| {
        let state = |it: &SocketHandle, lab: &mut Lab| lab.socket(*it).state();
        all.iter()
            .all(|it| matches!(state(it, lab), State::Established | State::Closed))
    });
    let open = |lab: &mut Lab| {
        all.iter()
            .filter(|it| lab.socket(**it).state() == State::Established)
            .count()
    };
    assert_eq!(open(&mut lab), CONNECTIONS_MAX);
    let crowded = lab
        .imds
        .stats()
        .crowded
        .load(std::sync::atomic::Ordering::Relaxed);
    assert!(crowded >= 2 * CONNECTIONS_MAX as u64);
    for second in 0..15 {
        for handle in &all {
            if lab.socket(*handle).can_send() {
                lab.socket(*handle).send_slice(b"G").unwrap();
            }
        }
        for _ in 0..20 {
            lab.round();
        }
        // Who is not of them is served all the while.
        use_connections(&mut lab, server, 1);
        lab.ahead += Duration::from_secs(1);
        if second < 4 {
            assert_eq!(open(&mut lab), CONNECTIONS_MAX, "after {second} s");
        }
    }
    lab.until("all dribblers are cut", |lab| open(lab) == 0);
    for handle in all {
        lab.sockets.remove(handle);
    }
    let again = connect(&mut lab, imds);
    lab.until("another one is let in", |lab| {
        lab.socket(again).state() == State::Established
    });
    lab.sockets.remove(again);

    lab.card.stack.clear(&mut lab.host);
    lab.until("its sockets are closed", |_| descriptors() <= fds);
}
