//! The frame path and every parser of a service, fed with what is mostly valid and a little bent.
//!
//! Checksums are put right again after most bends, or left to the device as a driver may, so that
//! what is bent is looked at. What a guest sends may be answered, passed on or counted; nothing may
//! panic, hang, or take memory without bound, and each frame that leaves is one that another parser
//! takes whole.

#![allow(clippy::unwrap_used, missing_docs)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use dhcproto::{Encodable as _, Encoder, v4, v6};
use etherparse::{PacketBuilder, SlicedPacket};
use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query};
use hickory_proto::rr::rdata::{A, TXT};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use offload::testing::fuzz::{self, Random};
use vhost_net::card::{Card, CardStats};
use vhost_net::frame::FRAME_MAX;
use vhost_net::frame::header::{GSO_TCPV4, GSO_TCPV6, NEEDS_CSUM, NetHeader};
use vhost_net::local::{Outgoing, TcpService};
use vhost_net::locals::{LocalOptions, LocalSide};
use vhost_net::policy::SharedRules;
use vhost_net::policy::groups::GroupsSpec;
use vhost_net::services::dns::stream::Streams;
use vhost_net::services::dns::{Client, Dns, DnsOut};
use vhost_net::services::imds::{Imds, MetadataSpec, connection};
use vhost_net::spec::Spec;
use vhost_net::stack::{
    Accepts, BUFFER_TO_GUEST, BUFFER_TO_HOST, Event, Host, Kind, Settings, Stack, Wire,
};

/// Counts what is allocated, to notice what grows.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all calls go to the system's allocator with the arguments that came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(live, Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(live, Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const GUEST: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
const CARD: [u8; 6] = [0x52, 0x55, 0x0a, 0, 2, 2];
const FLOWS_MAX: usize = 12;
/// What a world may hold: its flows' buffers, tables, a few frames.
const MEMORY_MAX: usize = FLOWS_MAX * (BUFFER_TO_HOST + BUFFER_TO_GUEST) + (16 << 20);

/// Frames to the guest.
#[derive(Default)]
struct Frames {
    frames: Vec<Vec<u8>>,
    is_full: bool,
}

impl Wire for Frames {
    fn has_room(&self) -> bool {
        !self.is_full
    }
    fn send(&mut self, header: NetHeader, frame: &[u8]) {
        assert!(frame.len() <= FRAME_MAX);
        if header.flags & NEEDS_CSUM != 0 {
            let end = usize::from(header.csum_start) + usize::from(header.csum_offset) + 2;
            assert!(end <= frame.len(), "a sum outside of the frame");
        }
        self.frames.push(frame.to_vec());
    }
}

/// Sockets that do anything a socket may do.
struct Sockets {
    random: Random,
    open: HashMap<usize, u32>,
    asked: Vec<Outgoing>,
    opened: usize,
    closed: usize,
}

impl Sockets {
    fn outcome(&mut self, len: usize) -> io::Result<usize> {
        let errno = self.random.pick(&[
            libc::ECONNREFUSED,
            libc::ECONNRESET,
            libc::EHOSTUNREACH,
            libc::ENETUNREACH,
            libc::EMSGSIZE,
            libc::EPIPE,
            libc::ETIMEDOUT,
            libc::EINTR,
        ]);
        match self.random.below(10) {
            0 => Err(io::Error::from_raw_os_error(errno)),
            1..4 => Err(io::ErrorKind::WouldBlock.into()),
            4 => Ok(0),
            _ => Ok(self.random.index(len + 1)),
        }
    }
}

impl Host for Sockets {
    fn open(&mut self, flow: usize, _: Kind, _: SocketAddr) -> io::Result<()> {
        if self.random.one_in(8) {
            return Err(io::Error::from_raw_os_error(libc::ENETUNREACH));
        }
        self.opened += 1;
        assert!(self.open.insert(flow, 0).is_none(), "a socket is left");
        Ok(())
    }
    fn connected(&mut self, _: usize) -> io::Result<()> {
        if self.random.one_in(4) {
            self.outcome(0).map(|_| ())
        } else {
            Ok(())
        }
    }
    fn recv(&mut self, flow: usize, buffer: &mut [u8]) -> io::Result<usize> {
        // As a kernel, it has an end.
        let calls = self.open.entry(flow).or_default();
        *calls += 1;
        if *calls > 50 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.outcome(buffer.len().min(9000))
    }
    fn send(&mut self, _: usize, bytes: &[u8]) -> io::Result<usize> {
        if bytes.is_empty() {
            return Ok(0);
        }
        match self.outcome(bytes.len()) {
            Ok(0) => Err(io::ErrorKind::WouldBlock.into()),
            outcome => outcome,
        }
    }
    fn send_from(&mut self, _: usize, _: SocketAddr, bytes: &[u8]) -> io::Result<usize> {
        self.outcome(bytes.len())
    }
    fn finish(&mut self, _: usize) {}
    fn close(&mut self, flow: usize, _: bool) {
        self.closed += usize::from(self.open.remove(&flow).is_some());
    }
    fn path_mtu(&mut self, _: usize) -> Option<u32> {
        Some(1 + self.random.next() as u32 % 70_000)
    }
    fn ask(&mut self, question: &Outgoing) -> io::Result<()> {
        self.asked.push(question.clone());
        self.outcome(0).map(|_| ())
    }
}

struct World {
    card: Card<LocalSide>,
    wire: Frames,
    host: Sockets,
    now: Instant,
    /// Ports, and the next numbers to send: guest's, card's, sequence, acknowledgement.
    talks: VecDeque<([u8; 4], u16, u16, u32, u32)>,
}

impl World {
    fn new(random: &mut Random) -> Self {
        let now = Instant::now();
        let spec = Arc::new(Spec {
            hostname: Some("web-1".into()),
            domain: Some("example.internal".into()),
            upstream_dns: vec!["192.0.2.53:53".parse().unwrap()],
            ..Spec::default()
        });
        let metadata = MetadataSpec {
            user_data: Some("x".repeat(random.index(60_000))),
            version_1: random.one_in(2),
            ..MetadataSpec::default()
        };
        let imds = Imds::new(&metadata, &spec, [7; 32], now).unwrap();
        let options = LocalOptions {
            rules: Some(Arc::new(SharedRules::new(GroupsSpec::default()).unwrap())),
            imds: Some(Arc::new(imds)),
            ..LocalOptions::default()
        };
        let settings = Settings {
            flows_max: FLOWS_MAX,
            host_loopback: vec!["10.0.2.2".parse().unwrap()],
            accepts: Accepts {
                partial: random.one_in(2),
                tso4: random.one_in(2),
            },
            ..Settings::default()
        };
        let stats = Arc::new(CardStats::default());
        let seed = random.next();
        let engine = Arc::clone(&stats.stack);
        let stack = Stack::new(Arc::clone(&spec), settings, engine, seed, now);
        let local = LocalSide::new(&spec, &options, true, now);
        Self {
            card: Card::new(spec, stats, stack, local),
            wire: Frames::default(),
            host: Sockets {
                random: Random::new(random.next()),
                open: HashMap::new(),
                asked: Vec::new(),
                opened: 0,
                closed: 0,
            },
            now,
            talks: VecDeque::new(),
        }
    }

    fn send(&mut self, header: &NetHeader, frame: &[u8]) {
        let (wire, host) = (&mut self.wire, &mut self.host);
        let elsewhere = self.card.from_guest(header, frame, self.now, wire, host);
        assert!(elsewhere.is_none(), "there is one pair");
    }

    fn run(&mut self) {
        let (wire, host) = (&mut self.wire, &mut self.host);
        self.card.run(self.now, wire, host);
    }

    /// What has come is whole; of TCP, what to answer is remembered.
    fn check(&mut self, longest: usize) -> usize {
        let frames = std::mem::take(&mut self.wire.frames);
        for frame in &frames {
            let sliced = SlicedPacket::from_ethernet(frame)
                .unwrap_or_else(|error| panic!("{error}: {frame:02x?}"));
            assert!(
                frame.starts_with(&GUEST) || frame[0] & 1 == 1,
                "not for the guest"
            );
            let (Some(etherparse::NetSlice::Ipv4(ip)), Some(etherparse::TransportSlice::Tcp(tcp))) =
                (&sliced.net, &sliced.transport)
            else {
                // An echo is as long as what it answers.
                assert!(
                    frame.len() <= longest.max(9001 + 14),
                    "{} bytes",
                    frame.len()
                );
                continue;
            };
            let length = tcp.payload().len() as u32 + u32::from(tcp.syn()) + u32::from(tcp.fin());
            let (to, from) = (tcp.destination_port(), tcp.source_port());
            let next = tcp.sequence_number().wrapping_add(length);
            let talk = (
                ip.header().source(),
                to,
                from,
                tcp.acknowledgment_number(),
                next,
            );
            self.talks.retain(|it| (it.1, it.2) != (to, from));
            if !tcp.rst() {
                self.talks.push_back(talk);
            }
            if self.talks.len() > 8 {
                self.talks.pop_front();
            }
        }
        assert!(self.card.stack.flow_count() <= FLOWS_MAX);
        frames.len()
    }
}

fn question(random: &mut Random) -> Vec<u8> {
    let kind = random.pick(&[
        RecordType::A,
        RecordType::AAAA,
        RecordType::TXT,
        RecordType::PTR,
    ]);
    let name = random.pick(&[
        "example.com.",
        "web-1.",
        "web-1.example.internal.",
        "instance-data.",
        "15.2.0.10.in-addr.arpa.",
        ".",
    ]);
    let mut message = Message::new(random.next() as u16, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    if random.one_in(2) {
        let mut edns = Edns::new();
        edns.set_max_payload(random.bend(1232) as u16);
        edns.set_dnssec_ok(random.one_in(2));
        message.edns = Some(edns);
    }
    message.to_vec().unwrap()
}

/// An answer to a question, of a server that may be anyone.
fn answer(question: &[u8], random: &mut Random) -> Vec<u8> {
    let Ok(asked) = Message::from_vec(question) else {
        return question.to_vec();
    };
    let mut answer = Message::response(asked.metadata.id, OpCode::Query);
    answer.queries.clone_from(&asked.queries);
    answer.metadata.truncation = random.one_in(4);
    for _ in 0..random.index(40) {
        let name = Name::from_ascii(random.pick(&["example.com.", "a.b.c.", "."])).unwrap();
        let data = if random.one_in(2) {
            RData::A(A([192, 0, 2, 1].into()))
        } else {
            RData::TXT(TXT::new(vec!["x".repeat(random.index(255))]))
        };
        let record = Record::from_rdata(name, random.bend(60) as u32, data);
        match random.below(3) {
            0 => answer.add_authority(record),
            _ => answer.add_answer(record),
        };
    }
    let mut bytes = answer.to_vec().unwrap_or_default();
    if !random.one_in(3) {
        random.bend_bytes(&mut bytes);
    }
    bytes
}

fn dhcp4(random: &mut Random) -> Vec<u8> {
    let none = std::net::Ipv4Addr::UNSPECIFIED;
    let mut message = v4::Message::new_with_id(9, none, none, none, none, &GUEST);
    let kind = random.pick(&[
        v4::MessageType::Discover,
        v4::MessageType::Request,
        v4::MessageType::Release,
        v4::MessageType::Inform,
        v4::MessageType::Decline,
    ]);
    let options = message.opts_mut();
    options.insert(v4::DhcpOption::MessageType(kind));
    if random.one_in(2) {
        options.insert(v4::DhcpOption::RequestedIpAddress([10, 0, 2, 15].into()));
    }
    if random.one_in(2) {
        options.insert(v4::DhcpOption::ServerIdentifier([10, 0, 2, 2].into()));
    }
    options.insert(v4::DhcpOption::MaxMessageSize(random.bend(576) as u16));
    let mut bytes = Vec::new();
    message.encode(&mut Encoder::new(&mut bytes)).unwrap();
    bytes
}

fn dhcp6(random: &mut Random) -> Vec<u8> {
    let mut message = v6::Message::new(random.pick(&[
        v6::MessageType::Solicit,
        v6::MessageType::Request,
        v6::MessageType::Renew,
        v6::MessageType::Rebind,
        v6::MessageType::Confirm,
        v6::MessageType::Release,
        v6::MessageType::InformationRequest,
    ]));
    let options = message.opts_mut();
    options.insert(v6::DhcpOption::ClientId(vec![0, 3, 0, 1, 1, 2, 3, 4, 5, 6]));
    options.insert(v6::DhcpOption::IANA(v6::IANA {
        id: random.next() as u32,
        t1: 0,
        t2: 0,
        opts: v6::DhcpOptions::new(),
    }));
    if random.one_in(2) {
        options.insert(v6::DhcpOption::RapidCommit);
    }
    let mut bytes = Vec::new();
    message.encode(&mut Encoder::new(&mut bytes)).unwrap();
    bytes
}

fn request(random: &mut Random, token: &str) -> Vec<u8> {
    let path = random.pick(&[
        "/",
        "/latest/meta-data/",
        "/latest/user-data",
        "/2021-03-23/meta-data/public-keys/0/openssh-key",
        "/latest/dynamic/instance-identity/document",
        "/latest/api/token",
    ]);
    let method = random.pick(&["GET", "PUT", "HEAD", "POST"]);
    let fields = random.pick(&[
        "",
        "X-aws-ec2-metadata-token-ttl-seconds: 60\r\n",
        "X-Forwarded-For: 10.0.0.1\r\n",
        "Content-Length: 5\r\n",
        "Connection: close\r\n",
        "Transfer-Encoding: chunked\r\n",
    ]);
    format!(
        "{method} {path} HTTP/1.1\r\nHost: x\r\nX-aws-ec2-metadata-token: {token}\r\n{fields}\r\n"
    )
    .into_bytes()
}

/// A valid frame, and where its transport header begins.
fn frame(random: &mut Random, talk: Option<([u8; 4], u16, u16, u32, u32)>) -> Vec<u8> {
    let guest = [10, 0, 2, 15];
    let guest6 = [0xfd, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0x15];
    let link = |to: [u8; 6]| PacketBuilder::ethernet2(GUEST, to);
    let mut out = Vec::new();
    let peer = random.pick(&[
        [192, 0, 2, 7],
        [169, 254, 169, 254],
        [10, 0, 2, 3],
        [10, 0, 2, 2],
        [127, 0, 0, 1],
    ]);
    let port = random.pick(&[80, 53, 443, 22]);
    let own = 40_000 + random.below(20) as u16;
    let mut peer6 = [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7];
    if random.one_in(2) {
        peer6 = [0xfd, 0, 0xe, 0xc2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0x54];
    }
    let payload: Vec<u8> = match random.below(4) {
        0 => request(random, "AAAA"),
        1 => {
            let asked = question(random);
            [&(asked.len() as u16).to_be_bytes()[..], &asked].concat()
        }
        2 => vec![7; random.index(2000)],
        _ => vec![7; random.index(40_000)],
    };
    let done = match random.below(14) {
        0 => link(CARD)
            .ipv4(guest, peer, 64)
            .tcp(own, port, 1, 60_000)
            .syn()
            .write(&mut out, &[]),
        1 => link(CARD)
            .ipv6(guest6, peer6, 64)
            .tcp(own, port, 1, 60_000)
            .syn()
            .write(&mut out, &[]),
        2..6 => match talk {
            Some((from, own, port, seq, ack)) => {
                let segment = link(CARD)
                    .ipv4(guest, from, 64)
                    .tcp(own, port, seq, 60_000)
                    .ack(ack);
                let segment = match random.below(6) {
                    0 => segment.fin(),
                    1 => segment.rst(),
                    _ => segment,
                };
                segment.write(&mut out, &payload)
            }
            None => link(CARD)
                .ipv4(guest, peer, 64)
                .tcp(own, port, 9, 9)
                .ack(7)
                .write(&mut out, &payload),
        },
        6 => link([0xff; 6])
            .ipv4([0; 4], [255; 4], 64)
            .udp(68, 67)
            .write(&mut out, &dhcp4(random)),
        7 => {
            let all = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 2];
            let own = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9];
            let to = [0x33, 0x33, 0, 1, 0, 2];
            link(to)
                .ipv6(own, all, 1)
                .udp(546, 547)
                .write(&mut out, &dhcp6(random))
        }
        8 | 9 => link(CARD)
            .ipv4(guest, [10, 0, 2, 3], 64)
            .udp(own, 53)
            .write(&mut out, &question(random)),
        10 => link(CARD)
            .ipv4(guest, peer, 64)
            .udp(own, port)
            .write(&mut out, &payload),
        11 => link(CARD)
            .ipv4(guest, peer, 64)
            .icmpv4_echo_request(7, 1)
            .write(&mut out, &payload),
        12 => {
            // Neighbour and router solicitations.
            let kind = random.pick(&[133, 135, 128]);
            let mut body = vec![0; 4];
            body.extend([0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
            body.extend([1, 1]);
            body.extend(GUEST);
            let to = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2];
            link(CARD)
                .ipv6(guest6, to, 255)
                .icmpv6_raw(kind, 0, [0; 4])
                .write(&mut out, &body[4..])
        }
        _ => {
            out.extend(CARD);
            out.extend(GUEST);
            out.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
            out.extend(GUEST);
            out.extend([10, 0, 2, 15, 0, 0, 0, 0, 0, 0, 10, 0, 2, 2]);
            Ok(())
        }
    };
    done.unwrap();
    out
}

/// Puts the IPv4 header's sum right, and says where the transport begins and of what it is.
fn reseal(frame: &mut [u8]) -> Option<(u16, u8)> {
    match frame.get(12..14)? {
        [8, 0] => {
            let len = usize::from(frame.get(14)? & 15) * 4;
            let header = frame.get_mut(14..14 + len)?;
            header.get_mut(10..12)?.fill(0);
            let words = header
                .chunks(2)
                .map(|it| u32::from(it[0]) << 8 | u32::from(it[1]));
            let mut sum: u32 = words.sum();
            while sum >> 16 != 0 {
                sum = (sum & 0xffff) + (sum >> 16);
            }
            header
                .get_mut(10..12)?
                .copy_from_slice(&(!(sum as u16)).to_be_bytes());
            let protocol = header[9];
            Some((14 + len as u16, protocol))
        }
        [0x86, 0xdd] => Some((54, *frame.get(20)?)),
        _ => None,
    }
}

fn header(random: &mut Random, frame: &mut [u8]) -> NetHeader {
    let mut header = NetHeader::default();
    if random.one_in(8) {
        return header;
    }
    let Some((start, protocol)) = reseal(frame) else {
        return header;
    };
    let offset = match protocol {
        6 => 16,
        17 => 6,
        _ => return header,
    };
    header.flags = NEEDS_CSUM;
    header.csum_start = start;
    header.csum_offset = offset;
    if protocol == 6 && frame.len() > 3000 {
        header.gso_type = if frame[12] == 8 { GSO_TCPV4 } else { GSO_TCPV6 };
        header.gso_size = 1448;
        header.hdr_len = start + 20;
    }
    if random.one_in(12) {
        let mut bytes = header.to_bytes();
        random.bend_bytes(&mut bytes);
        header = NetHeader::from_bytes(&bytes).unwrap();
    }
    header
}

#[test]
fn bent_frames_of_every_layer_leave_the_card_whole_and_bounded() {
    let (mut answered, mut flows) = (0, 0);
    vhost_net::memory::use_fresh_pages();
    let ran = fuzz::run("frames", 2000, |_, random| {
        let before = LIVE.load(Ordering::Relaxed);
        PEAK.store(before, Ordering::Relaxed);
        let mut world = World::new(random);
        let mut longest = 0;
        for _ in 0..1 + random.below(60) {
            let talk =
                (!world.talks.is_empty()).then(|| world.talks[random.index(world.talks.len())]);
            let mut bytes = frame(random, talk);
            if random.one_in(2) {
                // Behind the addresses, mostly: another sender is refused at once.
                let from = if random.one_in(8) {
                    0
                } else {
                    14.min(bytes.len())
                };
                random.bend_bytes(&mut bytes[from..]);
            }
            if random.one_in(16) {
                bytes.truncate(random.index(bytes.len() + 1));
            }
            let header = header(random, &mut bytes);
            longest = longest.max(bytes.len());
            world.wire.is_full = random.one_in(6);
            world.send(&header, &bytes);
            for _ in 0..random.below(3) {
                let event = Event {
                    readable: random.one_in(2),
                    writable: random.one_in(2),
                    hangup: random.one_in(8),
                };
                world.card.stack.on_host(random.index(FLOWS_MAX + 2), event);
            }
            if let Some(asked) = world.host.asked.pop() {
                let said = answer(&asked.payload, random);
                let token = if random.one_in(8) {
                    random.next()
                } else {
                    asked.token
                };
                let (wire, host) = (&mut world.wire, &mut world.host);
                world.card.answered(token, &said, world.now, wire, host);
            }
            world.now += Duration::from_millis(random.pick(&[0, 0, 1, 20, 900, 11_000]));
            world.run();
            answered += world.check(longest);
        }
        flows += world.host.opened;
        world.wire.is_full = false;
        world.card.stack.clear(&mut world.host);
        assert_eq!(world.host.opened, world.host.closed, "sockets are left");
        let peak = PEAK.load(Ordering::Relaxed) - before;
        assert!(peak < MEMORY_MAX, "{peak} bytes");
        drop(world);
    });
    // What is made is mostly good, or this tests only the door.
    assert!(answered as u64 > ran, "{answered} frames in {ran} cases");
    assert!(flows as u64 > ran, "{flows} flows in {ran} cases");
}

#[test]
fn bent_questions_and_answers_of_the_resolver_are_answered_within_its_limits() {
    let (mut replies, mut whole) = (0_u64, 0_u64);
    let ran = fuzz::run("resolver", 15_000, |_, random| {
        let servers = random.pick(&[1, 2]);
        let spec = Spec {
            upstream_dns: vec!["192.0.2.53:53".parse().unwrap(); servers],
            hostname: Some("web-1".into()),
            ..Spec::default()
        };
        let mut ids = Random::new(random.next());
        let mut dns = Dns::new(&spec, &[], Box::new(move || ids.next() as u16));
        let mut now = Instant::now();
        for _ in 0..random.below(20) {
            let mut out = DnsOut::default();
            let mut asked = question(random);
            if random.one_in(3) {
                random.bend_bytes(&mut asked);
            }
            let client = Client {
                client: ([10, 0, 2, 15].into(), 4000),
                server: ([10, 0, 2, 3].into(), 53),
                stream: random.one_in(3).then_some(1),
            };
            dns.query(client, &asked, now, &mut out);
            for _ in 0..3 {
                for outgoing in std::mem::take(&mut out.outgoing) {
                    let said = answer(&outgoing.payload, random);
                    dns.answered(outgoing.token, &said, now, &mut out);
                }
            }
            now += Duration::from_millis(random.pick(&[0, 100, 2000, 60_000]));
            dns.poll(now, &mut out);
            for (to, reply) in &out.replies {
                let limit = if to.stream.is_some() { 65535 } else { 4096 };
                assert!(reply.len() <= limit);
                assert!(reply.len() >= 12 && reply[2] & 0x80 != 0, "no answer");
                replies += 1;
                whole += u64::from(Message::from_vec(reply).is_ok());
            }
        }
    });
    assert!(
        replies > ran && whole > replies / 2,
        "{replies}, {whole} whole, in {ran}"
    );
}

#[test]
fn bent_bytes_on_the_services_connections_are_answered_within_their_limits() {
    let spec = Spec::default();
    let start = Instant::now();
    let metadata = MetadataSpec {
        user_data: Some("x".repeat(60_000)),
        version_1: true,
        ..MetadataSpec::default()
    };
    let imds = Arc::new(Imds::new(&metadata, &spec, [7; 32], start).unwrap());
    let mut said = 0;
    let ran = fuzz::run("connections", 50_000, |_, random| {
        let streams = Streams::default();
        let key = vhost_net::local::FlowKey {
            protocol: 6,
            guest: ([10, 0, 2, 15], 4000).into(),
            peer: ([10, 0, 2, 3], 53).into(),
        };
        let is_http = random.one_in(2);
        let (mut http, mut dns) = (
            imds.connect(start).unwrap(),
            streams.connect(key, start).unwrap(),
        );
        let mut now = start;
        for _ in 0..random.below(30) {
            let mut bytes = if is_http {
                request(random, "AAAA")
            } else {
                let asked = question(random);
                [&(asked.len() as u16).to_be_bytes()[..], &asked].concat()
            };
            if random.one_in(3) {
                random.bend_bytes(&mut bytes);
            }
            let service: &mut dyn TcpService = if is_http { &mut http } else { &mut dns };
            let mut rest = &bytes[..];
            while !rest.is_empty() && !service.is_done() {
                let (piece, more) = rest.split_at(1 + random.index(rest.len()));
                service.receive(piece, now);
                rest = more;
            }
            if random.one_in(20) {
                service.end(now);
            }
            let waiting = service.output().len();
            assert!(waiting < connection::OUTPUT_MAX + 80_000, "{waiting}");
            if !random.one_in(4) {
                said += service.output().drain(..).len();
            }
            assert!(service.deadline().is_some_and(|at| at > now), "no deadline");
            now += Duration::from_millis(random.below(50));
        }
    });
    assert!(said as u64 > 100 * ran, "{said} bytes in {ran} cases");
}
