//! Cards without devices: ports that meet in a directory, with guests that are lists of frames.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;

use etherparse::PacketBuilder;
use offload::testing::fuzz;
use rustix::event::epoll;
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use smoltcp::wire::EthernetAddress;

use super::*;
use crate::frame::Frame;
use crate::frame::header::{GSO_TCPV4, NEEDS_CSUM, NetHeader};
use crate::lan::meeting::Meeting;
use crate::lan::{QUEUE_BYTES, message, segment};
use crate::spec::Spec;

/// Far more than is needed: machines that run tests are slow and shared.
const LONG: Duration = Duration::from_secs(30);
const WHOLE: Takes = Takes {
    partial: true,
    tso4: true,
    tso6: true,
};

/// The real thing: edges as the kernel tells of them.
struct Edges {
    epoll: OwnedFd,
    seen: HashMap<RawFd, u64>,
}

impl Watcher for Edges {
    fn watch(&mut self, fd: BorrowedFd<'_>, mark: u64) -> io::Result<()> {
        use epoll::EventFlags as F;
        self.seen.insert(fd.as_raw_fd(), mark);
        let flags = F::IN | F::OUT | F::RDHUP | F::ET;
        Ok(epoll::add(
            &self.epoll,
            fd,
            epoll::EventData::new_u64(mark),
            flags,
        )?)
    }
}

#[derive(Default)]
struct Frames {
    got: Vec<(NetHeader, Vec<u8>)>,
    is_full: bool,
}

impl Wire for Frames {
    fn has_room(&self) -> bool {
        !self.is_full
    }

    fn send(&mut self, header: NetHeader, frame: &[u8]) {
        self.got.push((header, frame.to_vec()));
    }
}

/// Allows what has not been forbidden, and remembers what it was asked.
#[derive(Default)]
struct Doorman {
    forbids: Option<Direction>,
    asked: Vec<(Direction, Meta)>,
    errors: Vec<FlowKey>,
}

impl Judge for Doorman {
    fn lets_pass(&mut self, direction: Direction, meta: &Meta, _: Instant) -> bool {
        self.asked.push((direction, *meta));
        self.forbids != Some(direction)
    }

    fn lets_error_pass(&mut self, flow: &FlowKey, _: Instant) -> bool {
        self.errors.push(*flow);
        self.forbids.is_none()
    }
}

struct Card {
    lan: Arc<Lan>,
    port: Port,
    edges: Edges,
    wire: Frames,
    door: Doorman,
    takes: Takes,
    stats: CardStats,
    mac: EthernetAddress,
}

fn spec(last: u8) -> Spec {
    let mut spec = Spec {
        mac: EthernetAddress([0x52, 0x54, 0, 0, 0, last]),
        hostname: Some(format!("vm-{last}")),
        ..Spec::default()
    };
    spec.v4.as_mut().unwrap().address = [10, 0, 2, last].into();
    let v6 = spec.v6.as_mut().unwrap();
    v6.address = std::net::Ipv6Addr::from_bits(v6.prefix.to_bits() | u128::from(last));
    spec
}

impl Card {
    fn new(path: &Path, last: u8) -> Self {
        let spec = Arc::new(spec(last));
        let mac = spec.mac;
        let meeting = Meeting::open(path, Id::new(mac), None).unwrap();
        let lan = Arc::new(Lan::new(meeting, spec, None));
        let mut edges = Edges {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC).unwrap(),
            seen: HashMap::new(),
        };
        let port = Port::new(Arc::clone(&lan), &mut edges, Instant::now()).unwrap();
        Self {
            lan,
            port,
            edges,
            wire: Frames::default(),
            door: Doorman::default(),
            takes: WHOLE,
            stats: CardStats::default(),
            mac,
        }
    }

    fn step(&mut self) {
        self.step_at(Instant::now());
    }

    fn step_at(&mut self, now: Instant) {
        let mut events = [const { std::mem::MaybeUninit::<epoll::Event>::uninit() }; 64];
        let none = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let (events, _) = epoll::wait(&self.edges.epoll, &mut events[..], Some(&none)).unwrap();
        for event in &*events {
            use epoll::EventFlags as F;
            let (mark, flags) = (event.data.u64(), event.flags);
            let event = Event {
                readable: flags.intersects(F::IN | F::ERR),
                writable: flags.intersects(F::OUT | F::HUP),
                hangup: flags.intersects(F::HUP | F::RDHUP),
            };
            self.port.on_event(mark, event, now);
        }
        let (wire, door) = (&mut self.wire, &mut self.door);
        self.port
            .run(now, self.takes, wire, door, &mut self.edges, &self.stats);
    }

    fn members(&mut self) -> Vec<EthernetAddress> {
        let list = self.port.view().members.list().to_vec();
        list.iter().map(|member| member.is.mac).collect()
    }

    fn says(&mut self, header: NetHeader, frame: &[u8]) -> bool {
        let now = Instant::now();
        self.port
            .from_guest(&header, frame, now, &mut self.door, &self.stats)
    }
}

/// Steps all of them until it is as it should be.
fn until(cards: &mut [&mut Card], mut is: impl FnMut(&mut [&mut Card]) -> bool) {
    let end = Instant::now() + LONG;
    while !is(cards) {
        assert!(Instant::now() < end, "it does not come");
        for card in &mut *cards {
            card.step();
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn meet(cards: &mut [&mut Card]) {
    let all = cards.len() - 1;
    until(cards, |cards| {
        cards.iter_mut().all(|it| it.members().len() == all)
    });
}

fn network() -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("network");
    (dir, path)
}

fn udp(from: &Card, to: &Card, text: &[u8]) -> Vec<u8> {
    let (a, b) = (from.mac.0, to.mac.0);
    let mut bytes = Vec::new();
    PacketBuilder::ethernet2(a, b)
        .ipv4([10, 0, 2, a[5]], [10, 0, 2, b[5]], 64)
        .udp(1000, 2000)
        .write(&mut bytes, text)
        .unwrap();
    bytes
}

/// A super-segment as a guest leaves it.
fn tcp(from: &Card, to: &Card, data: &[u8]) -> (NetHeader, Vec<u8>) {
    let (a, b) = (from.mac.0, to.mac.0);
    let mut bytes = Vec::new();
    PacketBuilder::ethernet2(a, b)
        .ipv4([10, 0, 2, a[5]], [10, 0, 2, b[5]], 64)
        .tcp(1000, 80, 7, 1000)
        .ack(1)
        .write(&mut bytes, data)
        .unwrap();
    let header = NetHeader {
        flags: NEEDS_CSUM,
        gso_type: GSO_TCPV4,
        gso_size: 8949,
        hdr_len: 54,
        csum_start: 34,
        csum_offset: 16,
        ..NetHeader::default()
    };
    (header, bytes)
}

#[test]
fn cards_meet_by_themselves_and_know_each_others_names_and_addresses() {
    let (_dir, path) = network();
    let (mut a, mut b) = (Card::new(&path, 21), Card::new(&path, 22));
    meet(&mut [&mut a, &mut b]);
    let mut c = Card::new(&path, 20);
    meet(&mut [&mut a, &mut b, &mut c]);
    let names = a.port.view().names();
    let address = |name: &str| {
        let found = names.iter().find(|(it, _)| it == name);
        found.map(|(_, addresses)| addresses[0].to_string())
    };
    assert_eq!(address("vm-22").as_deref(), Some("10.0.2.22"));
    assert_eq!(address("vm-20.internal").as_deref(), Some("10.0.2.20"));
    assert_eq!(address("vm-21.internal").as_deref(), Some("10.0.2.21"));
    let report = a.lan.report();
    assert_eq!(report["members"].as_array().unwrap().len(), 2, "{report}");
}

#[test]
fn a_super_segment_arrives_as_one_and_in_pieces_where_the_guest_takes_none() {
    let (_dir, path) = network();
    let (mut a, mut b) = (Card::new(&path, 21), Card::new(&path, 22));
    meet(&mut [&mut a, &mut b]);
    let data: Vec<u8> = (0..65_000_u32).map(|n| n as u8).collect();
    let (header, bytes) = tcp(&a, &b, &data);
    assert!(a.says(header, &bytes));
    until(&mut [&mut a, &mut b], |cards| !cards[1].wire.got.is_empty());
    let [(got, frame)] = &b.wire.got[..] else {
        panic!()
    };
    assert_eq!((got, frame), (&header, &bytes));
    assert_eq!(b.door.asked.last().unwrap().1.packets, 8);
    b.wire.got.clear();
    b.takes = Takes::default();
    assert!(a.says(header, &bytes));
    until(&mut [&mut a, &mut b], |cards| cards[1].wire.got.len() == 8);
    let mut whole = Vec::new();
    for (header, frame) in &b.wire.got {
        assert_eq!(*header, NetHeader::default());
        assert!(Frame::parse(frame, header).is_ok(), "checksums");
        assert!(frame.len() <= 14 + 9001);
        whole.extend_from_slice(&frame[54..]);
    }
    assert_eq!(whole, data);
    let stats = a.lan.peer_stats(Id::new(b.mac));
    assert_eq!((stats.frames_out.get(), stats.dropped_out.get()), (2, 0));
}

/// A packet as the guest of `from` sends it to that of `to` if its MTU is 1500, and whole.
fn in_fragments(from: &Card, to: &Card, text: &[u8]) -> (Vec<Vec<u8>>, Vec<u8>) {
    let mut whole = udp(from, to, text);
    // May be cut.
    whole[20] = 0;
    whole[24..26].fill(0);
    let sum = crate::frame::sum::Sum::default().bytes(&whole[14..34]);
    whole[24..26].copy_from_slice(&sum.checksum().to_be_bytes());
    let frame = Frame::parse(&whole, &NetHeader::default()).unwrap();
    let mut pieces = Vec::new();
    let keep = |_, piece: &[u8]| pieces.push(piece.to_vec());
    segment::deliver(&frame, WHOLE, 1500, &mut Vec::new(), keep).unwrap();
    (pieces, whole)
}

#[test]
fn a_packet_in_fragments_is_judged_whole_and_arrives_as_its_receiver_takes_it() {
    let (_dir, path) = network();
    let (mut a, mut b) = (Card::new(&path, 21), Card::new(&path, 22));
    meet(&mut [&mut a, &mut b]);
    let text: Vec<u8> = (0..20_000_u32).map(|n| n as u8).collect();
    let (pieces, whole) = in_fragments(&a, &b, &text);
    assert_eq!(pieces.len(), 14);
    let none = NetHeader::default();
    // In any order.
    for piece in pieces.iter().rev() {
        assert!(a.door.asked.is_empty());
        assert!(a.says(none, piece));
    }
    assert_eq!(a.stats.reassembled.get(), 1);
    until(&mut [&mut a, &mut b], |cards| cards[1].wire.got.len() == 3);
    for door in [&a.door, &b.door] {
        let [(_, meta)] = &door.asked[..] else {
            panic!("{:?}", door.asked)
        };
        assert_eq!(meta.bytes, 20_028);
    }
    let mut got = crate::frame::reassembly::Reassembly::default();
    let frames = b.wire.got.iter().map(|(header, bytes)| {
        assert!(bytes.len() <= 14 + 9001);
        let frame = Frame::parse(bytes, header).unwrap();
        got.add(&frame, Instant::now())
    });
    let crate::frame::reassembly::Outcome::Whole(got) = frames.last().unwrap() else {
        panic!("not whole");
    };
    assert_eq!(*got, *whole);

    // What the rules refuse is refused whole; what never comes whole is given up.
    a.door.forbids = Some(Direction::Out);
    for piece in &pieces {
        assert!(a.says(none, piece));
    }
    assert_eq!(a.stats.denied.get(), 1);
    a.door.forbids = None;
    assert!(a.says(none, &pieces[3]));
    let timeout = crate::frame::reassembly::TIMEOUT;
    let late = Instant::now() + timeout;
    assert!(a.port.deadline().unwrap() <= late);
    a.step_at(late + LONG);
    assert_eq!(a.stats.not_reassembled[0].get(), 1);
    // A card that passes a fragment on is not believed.
    let to = a.port.view.members.by_address("10.0.2.22".parse().unwrap());
    let to = Arc::clone(to.unwrap());
    a.port.send(&to.is, to.peer, &none, &pieces[0]);
    let stats = b.lan.peer_stats(Id::new(a.mac));
    until(&mut [&mut a, &mut b], |_| stats.denied_in.get() == 1);
}

#[test]
fn a_guest_cannot_send_as_another_and_a_card_does_not_believe_one_that_lets_it() {
    let (_dir, path) = network();
    let (mut a, mut b, mut c) = (
        Card::new(&path, 21),
        Card::new(&path, 22),
        Card::new(&path, 23),
    );
    meet(&mut [&mut a, &mut b, &mut c]);
    // As c, by IP address and by hardware address.
    let mut by_ip = udp(&c, &b, b"x");
    by_ip[6..12].copy_from_slice(&a.mac.0);
    let mut by_mac = udp(&a, &b, b"x");
    by_mac[6..12].copy_from_slice(&c.mac.0);
    for frame in [&by_ip, &by_mac] {
        assert!(a.says(NetHeader::default(), frame));
    }
    assert_eq!(a.stats.spoofed.get(), 2);
    // A card that lets its guest.
    for frame in [&by_ip, &by_mac, &udp(&a, &c, b"x")] {
        let to = a.port.view.members.by_address("10.0.2.22".parse().unwrap());
        let to = Arc::clone(to.unwrap());
        // A frame for c at b: `send` writes the receiver's hardware address, not its IP address.
        a.port.send(&to.is, to.peer, &NetHeader::default(), frame);
    }
    a.says(NetHeader::default(), &udp(&a, &b, b"good"));
    until(&mut [&mut a, &mut b], |cards| !cards[1].wire.got.is_empty());
    assert_eq!(b.wire.got.len(), 1);
    assert!(b.wire.got[0].1.ends_with(b"good"));
    assert_eq!(b.lan.peer_stats(Id::new(a.mac)).spoofed.get(), 3);
    assert_eq!(b.lan.peer_stats(Id::new(c.mac)).spoofed.get(), 0);
}

#[test]
fn an_address_that_another_member_has_cannot_be_had_until_that_has_left() {
    let (_dir, path) = network();
    let (mut a, mut b) = (Card::new(&path, 21), Card::new(&path, 22));
    meet(&mut [&mut a, &mut b]);
    let taken: std::net::IpAddr = "10.0.2.22".parse().unwrap();
    let mac = EthernetAddress([0x52, 0x54, 0, 0, 0, 23]);
    let thief = Announcement {
        mac,
        addresses: vec!["10.0.2.23".parse().unwrap(), taken],
        ..b.port.announced.clone()
    };
    let mut held = Vec::new();
    for card in [&a, &b] {
        let fd = stranger(&path, card);
        rustix::io::write(&fd, &thief.to_bytes().unwrap()).unwrap();
        held.push(fd);
    }
    until(&mut [&mut a, &mut b], |cards| {
        cards.iter_mut().all(|card| card.members().len() == 2)
    });
    let whose = |card: &mut Card| {
        let view = card.port.view();
        view.members.by_address(taken).map(|member| member.is.mac)
    };
    assert_eq!(whose(&mut a), Some(b.mac));
    assert_eq!(whose(&mut b), None, "it is its own guest's");
    assert!(a.lan.stats.refused_addresses.get() > 0);
    drop(b);
    until(&mut [&mut a], |cards| cards[0].members().len() == 1);
    assert_eq!(whose(&mut a), Some(mac));
}

#[test]
fn security_groups_are_asked_at_both_ends() {
    let (_dir, path) = network();
    let (mut a, mut b) = (Card::new(&path, 21), Card::new(&path, 22));
    meet(&mut [&mut a, &mut b]);
    a.door.forbids = Some(Direction::Out);
    assert!(a.says(NetHeader::default(), &udp(&a, &b, b"x")));
    assert_eq!(a.stats.denied.get(), 1);
    a.door.forbids = None;
    b.door.forbids = Some(Direction::In);
    assert!(a.says(NetHeader::default(), &udp(&a, &b, b"x")));
    let stats = b.lan.peer_stats(Id::new(a.mac));
    until(&mut [&mut a, &mut b], |_| stats.denied_in.get() == 1);
    assert!(b.wire.got.is_empty());
    let (direction, meta) = b.door.asked[0];
    assert_eq!(direction, Direction::In);
    assert_eq!(meta.key.guest, "10.0.2.22:2000".parse().unwrap());
    assert_eq!(meta.key.peer, "10.0.2.21:1000".parse().unwrap());
}

#[test]
fn an_icmp_error_passes_with_the_flow_that_it_tells_of_and_a_redirect_never() {
    let (_dir, path) = network();
    let (mut a, mut b) = (Card::new(&path, 21), Card::new(&path, 22));
    meet(&mut [&mut a, &mut b]);
    let told = udp(&b, &a, b"the question");
    let error = |kind: u8| {
        let mut bytes = Vec::new();
        PacketBuilder::ethernet2(a.mac.0, b.mac.0)
            .ipv4([10, 0, 2, 21], [10, 0, 2, 22], 64)
            .icmpv4_raw(kind, 3, [0; 4])
            .write(&mut bytes, &told[14..])
            .unwrap();
        bytes
    };
    let (unreachable, redirect) = (error(3), error(5));
    assert!(a.says(NetHeader::default(), &unreachable));
    assert!(!a.says(NetHeader::default(), &redirect));
    until(&mut [&mut a, &mut b], |cards| !cards[1].wire.got.is_empty());
    let flow = |guest: &str, peer: &str| FlowKey {
        protocol: 17,
        guest: guest.parse().unwrap(),
        peer: peer.parse().unwrap(),
    };
    assert_eq!(a.door.errors, [flow("10.0.2.21:2000", "10.0.2.22:1000")]);
    assert_eq!(b.door.errors, [flow("10.0.2.22:1000", "10.0.2.21:2000")]);
    assert!(a.door.asked.is_empty());
}

#[test]
fn a_stalled_peer_costs_its_own_frames_and_nobody_elses() {
    let (_dir, path) = network();
    let (mut a, mut b, mut c) = (
        Card::new(&path, 21),
        Card::new(&path, 22),
        Card::new(&path, 23),
    );
    meet(&mut [&mut a, &mut b, &mut c]);
    // b's process stands still. There is far more than its socket and its queue hold.
    let text = vec![7; 8000];
    let (to_b, to_c) = (udp(&a, &b, &text), udp(&a, &c, &text));
    for round in 0..3000 {
        assert!(a.says(NetHeader::default(), &to_b));
        if round % 3 == 0 {
            assert!(a.says(NetHeader::default(), &to_c));
        }
        c.step();
        a.step();
    }
    until(&mut [&mut a, &mut c], |cards| {
        cards[1].wire.got.len() == 1000
    });
    let to_b = a.lan.peer_stats(Id::new(b.mac));
    assert!(to_b.dropped_out.get() > 1000);
    assert_eq!(a.lan.peer_stats(Id::new(c.mac)).dropped_out.get(), 0);
    let queued = a.port.peers.iter().map(|(_, peer)| peer.waiting_bytes);
    assert!(queued.max().unwrap() <= QUEUE_BYTES);
    // When it goes on, what it was kept comes, in order, and then what is new.
    let kept = to_b.frames_out.get();
    until(&mut [&mut a, &mut b], |cards| {
        cards[1].wire.got.len() as u64 == kept
    });
    assert!(a.says(NetHeader::default(), &udp(&a, &b, b"new")));
    until(&mut [&mut a, &mut b], |cards| {
        cards[1].wire.got.len() as u64 == kept + 1
    });
}

#[test]
fn a_guest_that_takes_nothing_holds_up_others_for_a_moment_only() {
    let (_dir, path) = network();
    let (mut a, mut b) = (Card::new(&path, 21), Card::new(&path, 22));
    meet(&mut [&mut a, &mut b]);
    b.wire.is_full = true;
    assert!(a.says(NetHeader::default(), &udp(&a, &b, b"x")));
    let now = Instant::now();
    b.step_at(now);
    b.step_at(now);
    let stats = b.lan.peer_stats(Id::new(a.mac));
    assert_eq!(stats.dropped_in.get(), 0);
    assert!(b.port.deadline().unwrap() <= now + PATIENCE && !b.port.has_more(false));
    b.step_at(now + PATIENCE);
    assert_eq!(stats.dropped_in.get(), 1);
    // And a member that comes meanwhile is met.
    let mut c = Card::new(&path, 23);
    meet(&mut [&mut a, &mut b, &mut c]);
}

#[test]
fn a_card_that_dies_and_comes_back_is_met_again_within_a_second_whoever_connects() {
    for last in [20, 30] {
        let (_dir, path) = network();
        let mut a = Card::new(&path, 25);
        let mut b = Card::new(&path, last);
        meet(&mut [&mut a, &mut b]);
        // As kill -9 does: the socket's file stays.
        let file = path.join(Id::new(b.mac).to_string());
        drop(b);
        until(&mut [&mut a], |cards| cards[0].members().is_empty());
        assert!(!file.exists());
        let stale = rustix::net::socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
        rustix::net::bind(&stale, &SocketAddrUnix::new(&file).unwrap()).unwrap();
        drop(stale);
        // Long enough for attempts to have become rare.
        let start = Instant::now();
        for seconds in 0..100 {
            a.step_at(start + Duration::from_millis(100 * seconds));
        }
        let mut b = Card::new(&path, last);
        let back = Instant::now();
        meet(&mut [&mut a, &mut b]);
        assert!(a.says(NetHeader::default(), &udp(&a, &b, b"again")));
        until(&mut [&mut a, &mut b], |cards| !cards[1].wire.got.is_empty());
        assert!(
            back.elapsed() < Duration::from_secs(1),
            "{:?}",
            back.elapsed()
        );
    }
}

#[test]
fn an_address_that_the_guest_has_chosen_is_announced_before_it_is_used() {
    let (_dir, path) = network();
    let (mut a, mut b) = (Card::new(&path, 21), Card::new(&path, 22));
    meet(&mut [&mut a, &mut b]);
    let ip = |last| std::net::Ipv6Addr::from([0xfd00, 0, 0, 2, 0, 0, 0, last]).octets();
    let from = |source: [u8; 16]| {
        let mut bytes = Vec::new();
        PacketBuilder::ethernet2(a.mac.0, b.mac.0)
            .ipv6(source, ip(22), 64)
            .udp(5, 6)
            .write(&mut bytes, b"hello")
            .unwrap();
        bytes
    };
    let (chosen, stolen) = (from(ip(0xabc)), from(ip(22)));
    assert!(a.says(NetHeader::default(), &chosen));
    until(&mut [&mut a, &mut b], |cards| !cards[1].wire.got.is_empty());
    assert_eq!(b.lan.stats.all.spoofed.get(), 0);
    assert!(a.says(NetHeader::default(), &stolen));
    assert_eq!(a.stats.spoofed.get(), 1);
}

#[test]
fn addresses_are_learned_when_they_are_probed_for_and_when_they_are_used() {
    let (_dir, path) = network();
    let (mut a, mut b) = (Card::new(&path, 21), Card::new(&path, 22));
    meet(&mut [&mut a, &mut b]);
    let ip = |text: &str| text.parse::<std::net::Ipv6Addr>().unwrap();
    let (local, all) = (ip("fe80::5054:ff:fe00:15"), ip("ff02::2"));
    let mut used = Vec::new();
    PacketBuilder::ethernet2(a.mac.0, [0x33, 0x33, 0, 0, 0, 2])
        .ipv6(local.octets(), all.octets(), 255)
        .udp(5, 6)
        .write(&mut used, b"")
        .unwrap();
    let plain = NetHeader::default();
    let frame = Frame::parse(&used, &plain).unwrap();
    assert_eq!(a.port.view().answer(&frame), None);
    until(&mut [&mut a, &mut b], |cards| {
        let view = cards[1].port.view();
        view.members.by_address(local.into()).is_some()
    });
    assert!(a.port.view().own.contains(local.into()));
}

#[test]
fn what_is_not_for_a_member_is_left_to_others() {
    let (_dir, path) = network();
    let (mut a, mut b) = (Card::new(&path, 21), Card::new(&path, 22));
    meet(&mut [&mut a, &mut b]);
    let mut elsewhere = Vec::new();
    PacketBuilder::ethernet2(a.mac.0, [2; 6])
        .ipv4([10, 0, 2, 21], [192, 0, 2, 1], 64)
        .udp(1, 2)
        .write(&mut elsewhere, b"")
        .unwrap();
    assert!(!a.says(NetHeader::default(), &elsewhere));
    for len in 0..40 {
        let cut = udp(&a, &b, b"");
        assert!(!a.says(NetHeader::default(), &cut[..len]));
    }
}

/// A process of the same user that connects to a card and says what it likes.
fn stranger(path: &Path, to: &Card) -> OwnedFd {
    let kind = SocketType::SEQPACKET;
    let fd = rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::NONBLOCK, None);
    let fd = fd.unwrap();
    let file = path.join(Id::new(to.mac).to_string());
    rustix::net::connect(&fd, &SocketAddrUnix::new(file).unwrap()).unwrap();
    fd
}

fn has_hung_up(fd: &OwnedFd) -> bool {
    let mut buffer = [0; 9000];
    loop {
        match rustix::net::recv(fd, &mut buffer[..], RecvFlags::DONTWAIT) {
            Ok((0, _)) | Err(Errno::CONNRESET) => return true,
            Ok(_) => {}
            Err(_) => return false,
        }
    }
}

#[test]
fn who_says_nothing_or_is_not_who_it_should_be_is_hung_up_on() {
    let (_dir, path) = network();
    let (mut a, mut b) = (Card::new(&path, 21), Card::new(&path, 22));
    meet(&mut [&mut a, &mut b]);
    let said = |last: u8| {
        let is = Announcement {
            mac: EthernetAddress([0x52, 0x54, 0, 0, 0, last]),
            ..b.port.announced.clone()
        };
        is.to_bytes().unwrap()
    };
    // A member that is there; one with a lower address, which does not connect; the card itself;
    // a frame before the announcement.
    let frame = [
        &message::prefix(&NetHeader::default())[..],
        &udp(&b, &a, b"x"),
    ]
    .concat();
    for message in [said(22), said(3), said(21), frame] {
        let fd = stranger(&path, &a);
        rustix::io::write(&fd, &message).unwrap();
        until(&mut [&mut a], |_| has_hung_up(&fd));
        assert_eq!(a.members(), [b.mac]);
    }
    let silent = stranger(&path, &a);
    a.step();
    a.step();
    assert!(!has_hung_up(&silent));
    a.step_at(Instant::now() + GREETING);
    assert!(has_hung_up(&silent));
    // And the member that was there has noticed nothing.
    assert!(a.says(NetHeader::default(), &udp(&a, &b, b"still")));
    until(&mut [&mut a, &mut b], |cards| !cards[1].wire.got.is_empty());
    assert!(a.wire.got.is_empty());
}

/// Does something as another user, if this one may become it. `None`: it may not.
fn as_nobody<R: Send>(act: impl FnOnce() -> R + Send) -> Option<R> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let nobody = rustix::process::Uid::from_raw(65534);
    // The kernel keeps credentials for each thread.
    let act = || {
        rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
        act()
    };
    std::thread::scope(|scope| Some(scope.spawn(act).join().unwrap()))
}

fn open_to_all(path: &Path) {
    use std::os::unix::fs::PermissionsExt as _;
    let mode = std::fs::Permissions::from_mode;
    let parent = path.parent().unwrap();
    for dir in [parent, path] {
        std::fs::set_permissions(dir, mode(0o711)).unwrap();
    }
    for file in std::fs::read_dir(path).unwrap() {
        std::fs::set_permissions(file.unwrap().path(), mode(0o666)).unwrap();
    }
}

#[test]
fn another_user_who_gets_at_the_socket_is_refused_and_counted() {
    let (_dir, path) = network();
    let (mut a, mut b) = (Card::new(&path, 21), Card::new(&path, 22));
    meet(&mut [&mut a, &mut b]);
    // As the files are, nobody else comes that far.
    let denied = as_nobody(|| {
        let address = SocketAddrUnix::new(path.join(Id::new(a.mac).to_string())).unwrap();
        let fd = rustix::net::socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
        rustix::net::connect(&fd, &address)
    });
    let Some(denied) = denied else {
        println!("skipped: needs root");
        return;
    };
    assert_eq!(denied, Err(Errno::ACCESS));
    open_to_all(&path);
    let (to_a, to_b) = as_nobody(|| (stranger(&path, &a), stranger(&path, &b))).unwrap();
    until(&mut [&mut a, &mut b], |_| {
        has_hung_up(&to_a) && has_hung_up(&to_b)
    });
    for card in [&mut a, &mut b] {
        assert_eq!(card.lan.stats.strangers.get(), 1);
        assert_eq!(card.members().len(), 1);
    }
    // One who listens where a member might is told nothing either.
    let file = path.join(Id::new(EthernetAddress([0x52, 0x54, 0, 0, 0, 9])).to_string());
    let fd = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::NONBLOCK,
        None,
    );
    let fd = fd.unwrap();
    rustix::net::bind(&fd, &SocketAddrUnix::new(file).unwrap()).unwrap();
    // Whoever listens is who the socket's owner is taken for.
    as_nobody(|| rustix::net::listen(&fd, 8).unwrap()).unwrap();
    until(&mut [&mut a, &mut b], |cards| {
        cards.iter().all(|card| card.lan.stats.strangers.get() > 1)
    });
    let connected = rustix::net::accept(&fd).unwrap();
    let said = rustix::net::recv(&connected, &mut [0; 64][..], RecvFlags::DONTWAIT);
    assert_eq!(said.map(|(len, _)| len), Ok(0));
    // The members have noticed nothing.
    assert!(a.says(NetHeader::default(), &udp(&a, &b, b"still")));
    until(&mut [&mut a, &mut b], |cards| !cards[1].wire.got.is_empty());
}

#[test]
fn more_connections_than_a_network_has_members_are_closed_and_counted() {
    let (_dir, path) = network();
    let mut a = Card::new(&path, 21);
    let held: Vec<_> = (0..MEMBERS_MAX + 3)
        .map(|_| {
            let fd = stranger(&path, &a);
            a.port.has_visitors = true;
            a.port.accept(Instant::now(), &mut a.edges);
            fd
        })
        .collect();
    assert_eq!(a.port.peers.len(), MEMBERS_MAX);
    assert_eq!(a.lan.stats.crowded.get(), 3);
    drop(held);
}

#[test]
fn whatever_a_member_sends_the_card_goes_on() {
    let (_dir, path) = network();
    let mut a = Card::new(&path, 21);
    let b = Card::new(&path, 22);
    let is = b.port.announced.clone();
    let hello = is.to_bytes().unwrap();
    let (header, segment) = tcp(&b, &a, &[3; 2000]);
    let plain = udp(&b, &a, b"datagram");
    let messages = [
        [&message::prefix(&header)[..], &segment].concat(),
        [&message::prefix(&NetHeader::default())[..], &plain].concat(),
        hello.clone(),
    ];
    drop(b);
    let mut fd = None;
    let (mut given, mut refused) = (0, 0);
    fuzz::run("lan peers", 3000, |_, random| {
        let peer = fd.take().filter(|fd| !has_hung_up(fd)).unwrap_or_else(|| {
            let fd = stranger(&path, &a);
            rustix::io::write(&fd, &hello).unwrap();
            fd
        });
        for _ in 0..4 {
            let mut message = messages[random.index(3)].clone();
            if !random.one_in(3) {
                random.bend_bytes(&mut message);
            }
            if random.one_in(8) {
                message.truncate(1 + random.index(message.len()));
            }
            if random.one_in(50) {
                message.resize(70_000, 0);
            }
            let _ = rustix::net::send(&peer, &message, SendFlags::NOSIGNAL);
        }
        a.takes = random.pick(&[WHOLE, Takes::default()]);
        a.step();
        a.step();
        for (header, frame) in a.wire.got.drain(..) {
            given += 1;
            // Whatever the guest is given is sound, from the member, and for it.
            let frame = Frame::parse(&frame, &header).expect("sound");
            assert_eq!((frame.source, frame.destination), (is.mac, a.mac));
        }
        assert!(a.port.peers.len() <= MEMBERS_MAX);
        refused = a.lan.stats.all.malformed.get() + a.lan.stats.all.spoofed.get();
        fd = Some(peer);
    });
    assert!(
        given > 500 && refused > 500,
        "{given} given, {refused} refused"
    );
}
