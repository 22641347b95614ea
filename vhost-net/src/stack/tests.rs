//! A guest of smoltcp's own on one side, sockets made up on the other.

use std::collections::HashMap;

use smoltcp::iface::SocketHandle;
use smoltcp::phy::Checksum;
use smoltcp::socket::tcp::{self, State};
use smoltcp::wire::{IpAddress, IpCidr};

use super::*;
use crate::frame::ETHERNET_LEN;
use crate::frame::header::{GSO_TCPV4, NEEDS_CSUM};
use crate::testing::Nic;

mod kept;
mod offload;

const SERVER: &str = "192.0.2.7:80";

/// Frames to the guest.
#[derive(Default)]
struct Frames {
    frames: Vec<(NetHeader, Vec<u8>)>,
    is_full: bool,
    has_enough: bool,
}

impl Wire for Frames {
    fn has_room(&self) -> bool {
        !self.is_full
    }
    fn has_enough(&self) -> bool {
        self.has_enough
    }
    fn send(&mut self, header: NetHeader, frame: &[u8]) {
        self.frames.push((header, frame.to_vec()));
    }
}

#[derive(Default)]
struct FakeSocket {
    to: Option<SocketAddr>,
    inbox: VecDeque<u8>,
    datagrams: VecDeque<Vec<u8>>,
    outbox: Vec<u8>,
    has_ended: bool,
    /// What it receives stays there until it is dropped.
    is_keeping: bool,
    /// It cannot drop anything now.
    is_stuck: bool,
    fails: Option<i32>,
    /// Room for what is sent.
    room: usize,
    finished: bool,
    /// Closed, and whether by a reset.
    closed: Option<bool>,
    /// Hop limits that were set.
    hops: Vec<u8>,
    /// ICMP errors about what was sent.
    reports: VecDeque<Report>,
}

#[derive(Default)]
struct FakeHost {
    sockets: HashMap<usize, FakeSocket>,
    refuses: Option<i32>,
    /// Its sockets can keep what they receive.
    keeps: bool,
    mtu: Option<u32>,
}

fn os(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

impl FakeHost {
    fn get(&mut self, flow: usize) -> &mut FakeSocket {
        self.sockets.get_mut(&flow).expect("a socket")
    }

    fn only(&mut self) -> &mut FakeSocket {
        assert_eq!(self.sockets.len(), 1);
        self.sockets.values_mut().next().unwrap()
    }
}

impl Host for FakeHost {
    fn open(&mut self, flow: usize, _: Kind, to: SocketAddr) -> io::Result<()> {
        if let Some(errno) = self.refuses {
            return Err(os(errno));
        }
        let socket = FakeSocket {
            to: Some(to),
            room: usize::MAX,
            ..FakeSocket::default()
        };
        self.sockets.insert(flow, socket);
        Ok(())
    }
    fn connected(&mut self, flow: usize) -> io::Result<()> {
        self.get(flow).fails.map_or(Ok(()), |errno| Err(os(errno)))
    }
    fn recv(&mut self, flow: usize, buffer: &mut [u8]) -> io::Result<usize> {
        let socket = self.get(flow);
        assert!(!socket.is_keeping);
        if let Some(errno) = socket.fails.take() {
            return Err(os(errno));
        }
        if let Some(datagram) = socket.datagrams.pop_front() {
            buffer[..datagram.len()].copy_from_slice(&datagram);
            return Ok(datagram.len());
        }
        if socket.inbox.is_empty() {
            return if socket.has_ended {
                Ok(0)
            } else {
                Err(io::ErrorKind::WouldBlock.into())
            };
        }
        let len = buffer.len().min(socket.inbox.len());
        for (place, byte) in buffer.iter_mut().zip(socket.inbox.drain(..len)) {
            *place = byte;
        }
        Ok(len)
    }
    fn keep(&mut self, flow: usize) -> bool {
        let keeps = self.keeps;
        self.get(flow).is_keeping = keeps;
        keeps
    }
    fn pending(&mut self, flow: usize) -> io::Result<usize> {
        Ok(self.get(flow).inbox.len())
    }
    fn peek(&mut self, flow: usize, at: usize, into: &[VolatileSlice<'_>]) -> io::Result<usize> {
        let socket = self.get(flow);
        assert!(socket.is_keeping);
        if let Some(errno) = socket.fails.take() {
            return Err(os(errno));
        }
        let kept = &socket.inbox.make_contiguous()[at..];
        if kept.is_empty() {
            return match socket.has_ended {
                true => Ok(0),
                false => Err(io::ErrorKind::WouldBlock.into()),
            };
        }
        let mut read = 0;
        for part in into {
            let len = part.len().min(kept.len() - read);
            part.copy_from(&kept[read..read + len]);
            read += len;
        }
        Ok(read)
    }
    fn discard(&mut self, flow: usize, count: usize) -> io::Result<usize> {
        let socket = self.get(flow);
        if socket.is_stuck {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(socket.inbox.drain(..count).count())
    }
    fn send(&mut self, flow: usize, bytes: &[u8]) -> io::Result<usize> {
        let socket = self.get(flow);
        if let Some(errno) = socket.fails.take() {
            return Err(os(errno));
        }
        let len = bytes.len().min(socket.room);
        if len == 0 && !bytes.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        socket.room -= len;
        socket.outbox.extend_from_slice(&bytes[..len]);
        Ok(len)
    }
    fn send_from(&mut self, _: usize, _: SocketAddr, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }
    fn finish(&mut self, flow: usize) {
        self.get(flow).finished = true;
    }
    fn close(&mut self, flow: usize, is_reset: bool) {
        self.get(flow).closed = Some(is_reset);
    }
    fn set_hops(&mut self, flow: usize, _: bool, hops: u8) -> io::Result<()> {
        self.get(flow).hops.push(hops);
        Ok(())
    }
    fn report(&mut self, flow: usize) -> Option<Report> {
        self.get(flow).reports.pop_front()
    }
    fn path_mtu(&mut self, _: usize) -> Option<u32> {
        self.mtu
    }
}

struct NoLocals;

impl Locals for NoLocals {
    fn connect(&mut self, _: SocketAddr, _: SocketAddr) -> Option<Box<dyn TcpService>> {
        None
    }
}

/// Guest, card and host.
struct World {
    stack: Stack,
    wire: Frames,
    host: FakeHost,
    guest: Interface,
    nic: Nic,
    sockets: SocketSet<'static>,
    start: Instant,
    now: Instant,
    /// Frames to the guest that were not TCP.
    others: Vec<Vec<u8>>,
    largest: usize,
    /// Frames to the guest get lost.
    is_losing: bool,
    lost: usize,
}

impl World {
    fn new(settings: Settings) -> Self {
        Self::with(Spec::default(), settings)
    }

    fn with(spec: Spec, settings: Settings) -> Self {
        let now = Instant::now();
        let spec = Arc::new(spec);
        let mut nic = Nic::default();
        // The card leaves sums to it.
        nic.checksum.tcp = Checksum::Tx;
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = 7;
        let mut guest = Interface::new(config, &mut nic, smoltcp::time::Instant::ZERO);
        guest.update_ip_addrs(|addresses| {
            let address = IpAddress::from(spec.v4.unwrap().address);
            addresses.push(IpCidr::new(address, 24)).unwrap();
            let address = IpAddress::from(spec.v6.unwrap().address);
            addresses.push(IpCidr::new(address, 64)).unwrap();
        });
        let gateway = spec.v4.unwrap().gateway;
        guest.routes_mut().add_default_ipv4_route(gateway).unwrap();
        let gateway = spec.v6.unwrap().gateway;
        guest.routes_mut().add_default_ipv6_route(gateway).unwrap();
        Self {
            stack: Stack::new(spec, settings, Arc::default(), 1, now),
            wire: Frames::default(),
            host: FakeHost::default(),
            guest,
            nic,
            sockets: SocketSet::new(Vec::new()),
            start: now,
            now,
            others: Vec::new(),
            largest: 0,
            is_losing: false,
            lost: 0,
        }
    }

    fn usual() -> Self {
        Self::new(Settings {
            accepts: Accepts {
                partial: true,
                tso4: true,
            },
            ..Settings::default()
        })
    }

    fn connect(&mut self, to: &str, port: u16) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; 1 << 16]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        let to: SocketAddr = to.parse().unwrap();
        socket.connect(self.guest.context(), to, port).unwrap();
        self.sockets.add(socket)
    }

    fn socket(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    fn state(&mut self, handle: SocketHandle) -> State {
        self.socket(handle).state()
    }

    fn hand_in(&mut self, packet: &[u8]) {
        let spec = Spec::default();
        let mut frame = Vec::new();
        frame.extend_from_slice(&spec.gateway_mac.0);
        frame.extend_from_slice(&spec.mac.0);
        let is_v4 = packet[0] >> 4 == 4;
        frame.extend_from_slice(if is_v4 { &[8, 0] } else { &[0x86, 0xdd] });
        frame.extend_from_slice(packet);
        let parsed = Frame::parse(&frame, &NetHeader::default()).expect("a sound frame");
        let (wire, host) = (&mut self.wire, &mut self.host);
        self.stack
            .from_guest(&parsed, self.now, wire, host, &mut NoLocals);
    }

    /// Lets everything happen that happens by itself.
    fn settle(&mut self) {
        for _ in 0..400 {
            let time = smoltcp_time(self.start, self.now);
            self.guest.poll(time, &mut self.nic, &mut self.sockets);
            let sent = std::mem::take(&mut self.nic.tx);
            let mut is_quiet = sent.is_empty();
            for packet in sent {
                self.hand_in(&packet);
            }
            self.stack.run(self.now, &mut self.wire, &mut self.host);
            for (_, frame) in std::mem::take(&mut self.wire.frames) {
                is_quiet = false;
                if self.is_losing {
                    self.lost += 1;
                    continue;
                }
                self.largest = self.largest.max(frame.len());
                let packet = frame[ETHERNET_LEN..].to_vec();
                let is_v4 = packet[0] >> 4 == 4;
                if packet[if is_v4 { 9 } else { 6 }] == TCP {
                    self.nic.rx.push_back(packet);
                } else {
                    self.others.push(packet);
                }
            }
            if is_quiet && (!self.stack.has_work() || self.wire.is_full) {
                return;
            }
        }
    }

    fn event(&mut self, flow: usize, readable: bool, writable: bool, hangup: bool) {
        let event = Event {
            readable,
            writable,
            hangup,
        };
        self.stack.on_host(flow, event);
        self.settle();
    }

    fn flow(&self) -> usize {
        assert_eq!(self.stack.flow_count(), 1);
        self.stack.flows.iter().next().unwrap().0
    }

    /// A connection that both sides have.
    fn connected() -> (Self, SocketHandle, usize) {
        Self::connected_to(false)
    }

    /// The same to a host whose sockets can keep what they receive, or not.
    fn connected_to(keeps: bool) -> (Self, SocketHandle, usize) {
        let mut world = Self::usual();
        world.host.keeps = keeps;
        let handle = world.connect(SERVER, 40000);
        world.settle();
        let flow = world.flow();
        world.event(flow, false, true, false);
        assert_eq!(world.state(handle), State::Established);
        (world, handle, flow)
    }
}

#[test]
fn a_connection_is_answered_only_when_the_host_has_connected() {
    let mut world = World::usual();
    let handle = world.connect(SERVER, 40000);
    world.settle();
    assert_eq!(world.state(handle), State::SynSent);
    assert_eq!(world.host.only().to, Some(SERVER.parse().unwrap()));
    let flow = world.flow();
    world.event(flow, false, true, false);
    assert_eq!(world.state(handle), State::Established);
}

#[test]
fn a_refused_connect_is_refused_in_the_guest() {
    let mut world = World::usual();
    let handle = world.connect(SERVER, 40000);
    world.settle();
    let flow = world.flow();
    world.host.get(flow).fails = Some(libc::ECONNREFUSED);
    world.event(flow, true, true, true);
    assert_eq!(world.state(handle), State::Closed);
    assert_eq!(world.stack.flow_count(), 0);
    assert_eq!(world.host.only().closed, Some(false));
}

#[test]
fn an_unreachable_host_becomes_an_icmp_error_that_quotes_the_syn() {
    let mut world = World::usual();
    world.connect(SERVER, 40000);
    world.settle();
    let flow = world.flow();
    world.host.get(flow).fails = Some(libc::EHOSTUNREACH);
    world.event(flow, true, true, true);
    assert_eq!(world.stack.flow_count(), 0);
    let error = &world.others[0];
    assert_eq!((error[9], error[20], error[21]), (1, 3, 1));
    // The quoted packet is from the guest's port to the server's.
    assert_eq!(
        error[48..52],
        [40000_u16.to_be_bytes(), 80_u16.to_be_bytes()].concat()
    );
    // A guest that has not heard it asks again, and is told again.
    world.others.clear();
    world.now += Duration::from_millis(1500);
    world.settle();
    let flow = world.flow();
    world.host.get(flow).fails = Some(libc::EHOSTUNREACH);
    world.event(flow, true, true, true);
    assert_eq!((world.stack.flow_count(), world.others.len()), (0, 1));
}

#[test]
fn a_timed_out_connect_is_left_to_the_guests_own_patience() {
    let mut world = World::usual();
    let handle = world.connect(SERVER, 40000);
    world.settle();
    let flow = world.flow();
    world.host.get(flow).fails = Some(libc::ETIMEDOUT);
    world.event(flow, true, true, true);
    assert_eq!(world.state(handle), State::SynSent);
    assert_eq!(world.stack.flow_count(), 0);
    assert!(world.others.is_empty());
}

#[test]
fn a_megabyte_arrives_whole_each_way_and_in_super_segments() {
    let (mut world, handle, flow) = World::connected();
    let data: Vec<u8> = (0..1_000_003_u32).map(|n| ((n * 7) >> 3) as u8).collect();
    world.host.get(flow).inbox.extend(&data);
    world.event(flow, true, true, false);
    let (mut got, mut sent) = (Vec::new(), 0);
    for _ in 0..1000 {
        let socket = world.socket(handle);
        if socket.can_recv() {
            let take = |bytes: &mut [u8]| {
                got.extend_from_slice(bytes);
                (bytes.len(), ())
            };
            socket.recv(take).unwrap();
        }
        sent += socket.send_slice(&data[sent..]).unwrap();
        world.settle();
        if got.len() == data.len() && sent == data.len() {
            break;
        }
    }
    assert!(got == data, "{} bytes of {}", got.len(), data.len());
    assert!(world.host.get(flow).outbox == data);
    assert!(world.largest > 9001 + ETHERNET_LEN, "{}", world.largest);
}

#[test]
fn each_half_closes_by_itself() {
    for keeps in [false, true] {
        let (mut world, handle, flow) = World::connected_to(keeps);
        world.socket(handle).send_slice(b"request").unwrap();
        world.socket(handle).close();
        world.settle();
        assert_eq!(world.host.get(flow).outbox, b"request");
        assert!(world.host.get(flow).finished);
        assert_eq!(world.host.get(flow).closed, None);
        world.host.get(flow).inbox.extend(b"answer");
        world.host.get(flow).has_ended = true;
        world.event(flow, true, true, true);
        let mut answer = [0; 6];
        assert_eq!(world.socket(handle).recv_slice(&mut answer), Ok(6));
        assert_eq!(&answer, b"answer");
        // The guest's last acknowledgement is a delayed one.
        world.now += Duration::from_millis(20);
        world.settle();
        assert_eq!(world.stack.flow_count(), 0);
        assert_eq!(world.host.get(flow).closed, Some(false));
    }
}

#[test]
fn the_hosts_end_comes_behind_its_last_byte() {
    for keeps in [false, true] {
        let (mut world, handle, flow) = World::connected_to(keeps);
        world.host.get(flow).inbox.extend(b"all");
        world.host.get(flow).has_ended = true;
        world.event(flow, true, true, true);
        assert_eq!(world.state(handle), State::CloseWait);
        let mut all = [0; 9];
        assert_eq!(world.socket(handle).recv_slice(&mut all), Ok(3));
        world.socket(handle).send_slice(b"still").unwrap();
        world.settle();
        assert_eq!(world.host.get(flow).outbox, b"still");
        world.socket(handle).close();
        world.settle();
        assert_eq!(world.stack.flow_count(), 0);
        assert_eq!(world.host.get(flow).closed, Some(false));
    }
}

#[test]
fn a_reset_on_one_side_is_one_on_the_other() {
    for keeps in [false, true] {
        let (mut world, handle, flow) = World::connected_to(keeps);
        world.socket(handle).abort();
        world.settle();
        assert_eq!(world.host.get(flow).closed, Some(true));
        assert_eq!(world.stack.flow_count(), 0);

        let (mut world, handle, flow) = World::connected_to(keeps);
        world.host.get(flow).fails = Some(libc::ECONNRESET);
        world.event(flow, true, true, true);
        assert_eq!(world.state(handle), State::Closed);
        assert_eq!(world.stack.flow_count(), 0);
    }
}

#[test]
fn a_host_that_takes_nothing_closes_the_guests_window() {
    let (mut world, handle, flow) = World::connected();
    world.host.get(flow).room = 0;
    let mut sent = 0;
    for _ in 0..400 {
        sent += world.socket(handle).send_slice(&[1; 9000]).unwrap();
        world.settle();
    }
    assert!(sent <= BUFFER_TO_HOST + (1 << 16), "{sent}");
    assert!(sent >= BUFFER_TO_HOST, "{sent}");
    world.host.get(flow).room = usize::MAX;
    world.event(flow, false, true, false);
    for _ in 0..20 {
        world.now += Duration::from_millis(200);
        world.settle();
    }
    assert_eq!(world.host.get(flow).outbox.len(), sent);
}

#[test]
fn a_guest_that_takes_nothing_stops_the_reading_of_the_host() {
    let (mut world, handle, flow) = World::connected();
    world.wire.is_full = true;
    world
        .host
        .get(flow)
        .inbox
        .extend(std::iter::repeat_n(5, 3 << 20));
    world.event(flow, true, true, false);
    assert!(world.wire.frames.is_empty());
    world.wire.is_full = false;
    let mut got = 0;
    for _ in 0..2000 {
        let socket = world.socket(handle);
        if socket.can_recv() {
            got += socket.recv(|bytes| (bytes.len(), bytes.len())).unwrap();
        }
        world.settle();
    }
    assert_eq!(got, 3 << 20);
}

#[test]
fn a_wire_that_has_enough_is_given_the_rest_later() {
    let (mut world, handle, flow) = World::connected();
    world.host.get(flow).inbox.extend([7; 1000]);
    world.wire.has_enough = true;
    world.event(flow, true, true, false);
    assert!(!world.socket(handle).can_recv());
    assert!(world.stack.has_work());
    world.wire.has_enough = false;
    world.settle();
    assert_eq!(world.socket(handle).recv_queue(), 1000);
}

#[test]
fn a_flow_uses_large_buffers_only_when_it_needs_them_and_gives_them_back_at_its_end() {
    let (mut world, handle, flow) = World::connected();
    world.host.get(flow).inbox.extend([7; 1000]);
    world.event(flow, true, true, false);
    assert_eq!(world.stack.bulk, 0);
    world.host.get(flow).room = 0;
    for _ in 0..100 {
        world.socket(handle).send_slice(&[1; 9000]).unwrap();
        world.settle();
    }
    assert_eq!(world.stack.bulk, 1);
    world.socket(handle).abort();
    world.settle();
    assert_eq!((world.stack.flow_count(), world.stack.bulk), (0, 0));
}

#[test]
fn flows_beyond_the_large_ones_hold_little_and_lose_nothing() {
    let (mut world, handle, flow) = World::connected();
    world.stack.bulk = BULK_MAX;
    // To a host that takes nothing.
    world.host.get(flow).room = 0;
    let mut sent = 0;
    for _ in 0..100 {
        sent += world.socket(handle).send_slice(&[1; 9000]).unwrap();
        world.settle();
    }
    assert!(
        sent > BUFFER_SMALL && sent <= BUFFER_SMALL + (1 << 17),
        "{sent}"
    );
    assert!(world.stack.stats.segments_dropped.get() > 0);
    world.host.get(flow).room = usize::MAX;
    world.event(flow, false, true, false);
    for _ in 0..50 {
        world.now += Duration::from_millis(500);
        world.settle();
    }
    assert_eq!(world.host.get(flow).outbox.len(), sent);
    // To a guest that takes nothing.
    let total = 3 << 20;
    let inbox = &mut world.host.get(flow).inbox;
    inbox.extend(std::iter::repeat_n(5, total));
    world.event(flow, true, true, false);
    let held = total - world.host.get(flow).inbox.len();
    assert!(held <= BUFFER_SMALL, "{held}");
    let mut got = 0;
    for _ in 0..2000 {
        let socket = world.socket(handle);
        if socket.can_recv() {
            got += socket.recv(|bytes| (bytes.len(), bytes.len())).unwrap();
        }
        world.settle();
    }
    assert_eq!((got, world.stack.bulk), (total, BULK_MAX));
}

#[test]
fn a_full_table_resets_new_connections_and_does_not_grow() {
    let mut world = World::new(Settings {
        flows_max: 1,
        ..Settings::default()
    });
    world.connect(SERVER, 40000);
    world.settle();
    let second = world.connect(SERVER, 40001);
    world.settle();
    assert_eq!(world.state(second), State::Closed);
    assert_eq!(world.stack.flow_count(), 1);
    assert_eq!(world.stack.stats.table_full.get(), 1);
}

#[test]
fn a_segment_of_an_unknown_connection_is_reset() {
    let (mut world, handle, _) = World::connected();
    // As after a restart of the card.
    world.stack.clear(&mut world.host);
    world.socket(handle).send_slice(b"hello?").unwrap();
    world.settle();
    assert_eq!(world.state(handle), State::Closed);
}

#[test]
fn what_belongs_to_nobody_outside_is_refused() {
    for to in ["127.0.0.1:80", "224.0.0.1:80", "10.0.2.77:80"] {
        let mut world = World::usual();
        world.connect(to, 40000);
        world.settle();
        assert!(world.host.sockets.is_empty(), "{to}");
        assert_eq!(world.stack.stats.unroutable.get(), 1, "{to}");
    }
    // The card's own address: nothing listens there.
    let mut world = World::usual();
    let handle = world.connect("10.0.2.2:80", 40000);
    world.settle();
    assert_eq!(world.state(handle), State::Closed);
}

#[test]
fn the_hosts_loopback_is_reached_where_it_was_mapped() {
    let mut world = World::new(Settings {
        host_loopback: vec!["10.0.2.2".parse().unwrap()],
        ..Settings::default()
    });
    world.connect("10.0.2.2:80", 40000);
    world.settle();
    assert_eq!(world.host.only().to, Some("127.0.0.1:80".parse().unwrap()));
}

#[test]
fn a_connection_from_outside_reaches_the_guest_with_its_peers_address() {
    let mut world = World::usual();
    let buffer = || tcp::SocketBuffer::new(vec![0; 4096]);
    let mut socket = tcp::Socket::new(buffer(), buffer());
    socket.listen(22).unwrap();
    let handle = world.sockets.add(socket);
    let peer: SocketAddr = "198.51.100.9:5555".parse().unwrap();
    let flow = world.stack.accept(peer, 22, world.now).unwrap();
    world.host.open(flow, Kind::Tcp, peer).unwrap();
    world.settle();
    assert_eq!(world.state(handle), State::Established);
    let remote = world.socket(handle).remote_endpoint().unwrap();
    assert_eq!(
        SocketAddr::from((IpAddr::from(remote.addr), remote.port)),
        peer
    );
    // Loopback means something else in there.
    let local = world
        .stack
        .accept("127.0.0.1:9".parse().unwrap(), 22, world.now);
    let entry = &world.stack.flows[local.unwrap()];
    assert_eq!(entry.key.peer.ip(), Spec::default().v4.unwrap().gateway);
}

/// A UDP packet of the guest's.
fn udp(to: &str, payload: &[u8]) -> Vec<u8> {
    let spec = Spec::default();
    let mut frame = vec![0; 70_000];
    let at = emit::udp_payload_at(spec.v4.unwrap().address.into());
    frame[at..at + payload.len()].copy_from_slice(payload);
    let from = SocketAddr::from((spec.v4.unwrap().address, 5353));
    let len = emit::udp(
        &mut frame,
        ends(&spec),
        from,
        to.parse().unwrap(),
        payload.len(),
    );
    frame[ETHERNET_LEN..len].to_vec()
}

#[test]
fn datagrams_go_both_ways_and_the_flow_ends_when_it_is_silent() {
    let mut world = World::usual();
    world.hand_in(&udp("192.0.2.7:53", b"question"));
    world.settle();
    assert_eq!(world.host.only().outbox, b"question");
    let flow = world.flow();
    world.host.get(flow).datagrams.push_back(b"answer".to_vec());
    world.event(flow, true, true, false);
    let answer = world.others.pop().unwrap();
    assert_eq!(&answer[28..], b"answer");
    assert_eq!(answer[20..24], [0, 53, 20, 233]);
    world.now += UDP_STREAM - Duration::from_secs(1);
    world.settle();
    assert_eq!(world.stack.flow_count(), 1);
    world.now += Duration::from_secs(2);
    world.settle();
    assert_eq!(world.stack.flow_count(), 0);
    assert_eq!(world.host.only().closed, Some(false));
}

#[test]
fn a_one_way_flow_ends_sooner() {
    let mut world = World::usual();
    world.hand_in(&udp("192.0.2.7:9", b"into the void"));
    world.settle();
    world.now += UDP_ONE_WAY + Duration::from_secs(1);
    world.settle();
    assert_eq!(world.stack.flow_count(), 0);
}

#[test]
fn a_short_hop_limit_is_the_sockets_and_what_a_router_says_is_handed_on() {
    let mut world = World::usual();
    let with_hops = |hops: u8| {
        let mut packet = udp("192.0.2.7:33434", b"probe");
        packet[8] = hops;
        packet[10..12].copy_from_slice(&[0, 0]);
        let sum = crate::frame::sum::Sum::default().bytes(&packet[..20]);
        packet[10..12].copy_from_slice(&sum.checksum().to_be_bytes());
        packet
    };
    // The card is the first router.
    world.hand_in(&with_hops(1));
    world.settle();
    let error = world.others.pop().unwrap();
    assert_eq!((error[20], error[21]), (11, 0));
    assert_eq!(error[12..16], [10, 0, 2, 2]);
    assert_eq!(world.stack.flow_count(), 0);
    for hops in [3, 3, 2] {
        world.hand_in(&with_hops(hops));
        world.settle();
    }
    let flow = world.flow();
    assert_eq!(world.host.get(flow).hops, [2, 1]);
    let socket = world.host.get(flow);
    socket.fails = Some(libc::EHOSTUNREACH);
    socket.reports.push_back(Report {
        from: Some([203, 0, 113, 1].into()),
        kind: 11,
        code: 0,
        rest: 0,
        sequence: None,
    });
    world.event(flow, true, true, false);
    assert_eq!(world.others.len(), 1);
    let error = world.others.pop().unwrap();
    assert_eq!((error[20], error[21]), (11, 0));
    assert_eq!(error[12..16], [203, 0, 113, 1]);
    // It quotes the packet.
    assert_eq!(error[28..48][12..], with_hops(2)[12..20]);
    // One that comes to light when the next one is sent is handed on as well, and that one goes.
    let socket = world.host.get(flow);
    let before = socket.outbox.len();
    socket.fails = Some(libc::EHOSTUNREACH);
    socket.reports.push_back(Report {
        from: Some([203, 0, 113, 2].into()),
        kind: 3,
        code: 1,
        rest: 0,
        sequence: None,
    });
    world.hand_in(&with_hops(2));
    world.settle();
    assert_eq!(world.host.get(flow).outbox.len(), before + 5);
    let error = world.others.pop().unwrap();
    assert_eq!((error[20], error[21]), (3, 1));
    assert_eq!(error[12..16], [203, 0, 113, 2]);
    // An ordinary one costs no call.
    world.hand_in(&udp("192.0.2.8:9", b"x"));
    world.settle();
    let all = world.host.sockets.values();
    assert_eq!(all.map(|socket| socket.hops.len()).sum::<usize>(), 2);
}

#[test]
fn an_echo_request_that_the_host_forbids_is_answered_so() {
    let mut world = World::usual();
    world.host.refuses = Some(libc::EACCES);
    let spec = Spec::default();
    let guest = IpAddr::from(spec.v4.unwrap().address);
    let mut frame = vec![0; 100];
    let at = emit::icmp_at(guest);
    frame[at..at + 8].copy_from_slice(&[8, 0, 0, 0, 0, 7, 0, 1]);
    let len = emit::icmp(&mut frame, ends(&spec), guest, [192, 0, 2, 1].into(), 8);
    world.hand_in(&frame[ETHERNET_LEN..len]);
    world.settle();
    let error = world.others.pop().unwrap();
    assert_eq!((error[20], error[21]), (3, 13));
    assert_eq!(world.stack.stats.ping_forbidden.get(), 1);
}

#[test]
fn a_datagram_to_a_closed_port_comes_back_as_an_icmp_error() {
    let mut world = World::usual();
    world.hand_in(&udp("192.0.2.7:9", b"x"));
    world.settle();
    let flow = world.flow();
    world.host.get(flow).fails = Some(libc::ECONNREFUSED);
    world.event(flow, true, true, false);
    let error = world.others.pop().unwrap();
    assert_eq!((error[9], error[20], error[21]), (1, 3, 3));
    assert_eq!(error[12..16], [192, 0, 2, 7]);
}

#[test]
fn a_datagram_that_is_too_large_for_the_path_says_how_large_it_may_be() {
    let mut world = World::usual();
    world.host.mtu = Some(1400);
    world.hand_in(&udp("192.0.2.7:9", b"x"));
    let flow = world.flow();
    world.host.get(flow).fails = Some(libc::EMSGSIZE);
    world.hand_in(&udp("192.0.2.7:9", &[0; 2000]));
    world.settle();
    let error = world.others.pop().unwrap();
    assert_eq!((error[20], error[21]), (3, 4));
    assert_eq!(error[26..28], 1400_u16.to_be_bytes());
}

#[test]
fn a_path_too_narrow_for_ipv6_is_told_as_packet_too_big() {
    let mut world = World::usual();
    world.host.mtu = Some(1300);
    let from = Spec::default().v6.unwrap().address;
    let to: std::net::Ipv6Addr = "2001:db8::7".parse().unwrap();
    let packet = |len: usize| {
        let mut bytes = Vec::new();
        etherparse::PacketBuilder::ipv6(from.octets(), to.octets(), 64)
            .udp(5000, 9)
            .write(&mut bytes, &vec![0; len])
            .unwrap();
        bytes
    };
    world.hand_in(&packet(1));
    let flow = world.flow();
    world.host.get(flow).fails = Some(libc::EMSGSIZE);
    world.hand_in(&packet(2000));
    world.settle();
    let error = world.others.pop().unwrap();
    assert_eq!((error[6], error[40], error[41]), (58, 2, 0));
    assert_eq!(error[44..48], 1300_u32.to_be_bytes());
    // It quotes as much as keeps it within the least MTU of IPv6.
    assert_eq!(error.len(), 1280);
    assert_eq!(error[48..], packet(2000)[..1280 - 48]);
}

#[test]
fn a_datagram_above_the_mtu_reaches_the_guest_in_fragments() {
    let mut world = World::usual();
    world.hand_in(&udp("192.0.2.7:53", b"q"));
    world.settle();
    let flow = world.flow();
    let large: Vec<u8> = (0..20_000_u32).map(|n| n as u8).collect();
    world.host.get(flow).datagrams.push_back(large.clone());
    world.event(flow, true, true, false);
    assert_eq!(world.others.len(), 3);
    let mut whole = vec![0; 20_008];
    for piece in &world.others {
        assert!(piece.len() <= 9001);
        assert_eq!(
            crate::frame::sum::Sum::default()
                .bytes(&piece[..20])
                .checksum(),
            0
        );
        let field = u16::from_be_bytes([piece[6], piece[7]]);
        let at = usize::from(field & 0x1fff) * 8;
        whole[at..at + piece.len() - 20].copy_from_slice(&piece[20..]);
    }
    assert!(whole[8..] == large);
}

#[test]
fn an_echo_keeps_its_identifier() {
    let mut world = World::usual();
    let spec = Spec::default();
    let mut frame = vec![0; 100];
    let own = IpAddr::from(spec.v4.unwrap().address);
    let at = emit::icmp_at(own);
    frame[at..at + 12].copy_from_slice(&[8, 0, 0, 0, 0x12, 0x34, 0, 1, 1, 2, 3, 4]);
    let len = emit::icmp(
        &mut frame,
        ends(&spec),
        own,
        "192.0.2.7".parse().unwrap(),
        12,
    );
    world.hand_in(&frame[ETHERNET_LEN..len]);
    world.settle();
    let flow = world.flow();
    // The kernel puts an identifier of its own.
    let reply = vec![0, 0, 0, 0, 0x99, 0x99, 0, 1, 1, 2, 3, 4];
    world.host.get(flow).datagrams.push_back(reply);
    world.event(flow, true, true, false);
    let reply = world.others.pop().unwrap();
    assert_eq!((reply[20], &reply[24..28]), (0, &[0x12, 0x34, 0, 1][..]));
    assert_eq!(
        crate::frame::sum::Sum::default()
            .bytes(&reply[20..])
            .checksum(),
        0
    );
}

#[test]
fn offload_metadata_fits_what_the_driver_accepted() {
    for partial in [false, true] {
        for tso4 in [false, true] {
            let mut world = World::new(Settings {
                accepts: Accepts { partial, tso4 },
                ..Settings::default()
            });
            let handle = world.connect(SERVER, 40000);
            world.settle();
            let flow = world.flow();
            world.event(flow, false, true, false);
            assert_eq!(world.state(handle), State::Established);
            world
                .host
                .get(flow)
                .inbox
                .extend(std::iter::repeat_n(3, 60_000));
            let event = Event {
                readable: true,
                writable: true,
                hangup: false,
            };
            world.stack.on_host(flow, event);
            world.stack.run(world.now, &mut world.wire, &mut world.host);
            assert!(!world.wire.frames.is_empty());
            for (header, frame) in &world.wire.frames {
                let is_super = frame.len() > ETHERNET_LEN + 9001;
                assert_eq!(is_super, header.gso_type == GSO_TCPV4);
                assert!(!is_super || (partial && tso4 && header.gso_size == 8961));
                assert_eq!(header.flags == NEEDS_CSUM, partial);
                // What the card sends, it would take itself.
                Frame::parse(frame, header).expect("sound");
            }
        }
    }
}

#[test]
fn a_connection_that_the_guest_never_completes_is_given_up() {
    let mut world = World::usual();
    let handle = world.connect(SERVER, 40000);
    world.settle();
    let flow = world.flow();
    // The SYN-ACK is lost on a guest that only floods.
    world.sockets.remove(handle);
    world.stack.on_host(
        flow,
        Event {
            writable: true,
            ..Event::default()
        },
    );
    let (wire, host) = (&mut world.wire, &mut world.host);
    world.stack.run(world.now, wire, host);
    let end = world.now + HANDSHAKE;
    while world.stack.flow_count() > 0 {
        assert!(world.now <= end, "it is kept for ever");
        world.wire.frames.clear();
        world.now = world.stack.deadline().unwrap();
        let (wire, host) = (&mut world.wire, &mut world.host);
        world.stack.run(world.now, wire, host);
        if world.stack.has_work() {
            world.stack.run(world.now, wire, host);
        }
    }
    assert_eq!(world.host.get(flow).closed, Some(true));
    let (_, last) = world.wire.frames.last().unwrap();
    assert_eq!(last[ETHERNET_LEN + 20 + 13] & 4, 4, "it is told");
}

#[test]
fn a_guest_that_is_silent_about_what_it_was_sent_is_given_up_and_an_idle_one_is_not() {
    let (mut world, handle, flow) = World::connected();
    // Idle for a day: nothing is owed.
    world.now += Duration::from_secs(86_400);
    world.settle();
    assert_eq!(world.state(handle), State::Established);
    world.host.get(flow).inbox.extend(b"hello");
    world.event(flow, true, false, false);
    assert_eq!(world.socket(handle).recv_queue(), 5);
    world.now += Duration::from_secs(86_400);
    world.settle();
    assert_eq!(world.stack.flow_count(), 1, "all was acknowledged");
    // The guest is gone; the host sends.
    world.sockets.remove(handle);
    world.host.get(flow).inbox.extend(b"anybody there?");
    let readable = Event {
        readable: true,
        ..Event::default()
    };
    world.stack.on_host(flow, readable);
    let begun = world.now;
    let (wire, host) = (&mut world.wire, &mut world.host);
    world.stack.run(world.now, wire, host);
    for _ in 0..10_000 {
        if world.stack.flow_count() == 0 {
            break;
        }
        world.wire.frames.clear();
        if !world.stack.has_work() {
            world.now = world.stack.deadline().unwrap();
        }
        let (wire, host) = (&mut world.wire, &mut world.host);
        world.stack.run(world.now, wire, host);
    }
    let took = world.now - begun;
    assert!(
        took >= UNANSWERED && took < UNANSWERED + HANDSHAKE,
        "{took:?}"
    );
    assert_eq!(world.host.get(flow).closed, Some(true));
}

#[test]
fn a_small_segment_waits_for_company_before_it_is_acknowledged_and_a_large_one_does_not() {
    let (mut world, handle, flow) = World::connected();
    let waiting = |world: &mut World| world.socket(handle).send_queue();
    // As much as one segment holds.
    world.socket(handle).send_slice(&[1; 8961]).unwrap();
    world.settle();
    assert_eq!(waiting(&mut world), 0);
    world.socket(handle).send_slice(&[2; 100]).unwrap();
    world.settle();
    assert_eq!(waiting(&mut world), 100);
    // The host has it already.
    assert_eq!(world.host.get(flow).outbox.len(), 9061);
    // What the guest writes meanwhile fills a segment, which goes out and is acknowledged with it.
    world.socket(handle).send_slice(&[3; 8961]).unwrap();
    world.settle();
    assert_eq!(waiting(&mut world), 0);
    world.socket(handle).send_slice(&[4; 100]).unwrap();
    world.settle();
    assert_eq!(waiting(&mut world), 100);
    assert!(world.stack.deadline().unwrap() <= world.now + ACK_DELAY);
    world.now += ACK_DELAY;
    world.settle();
    assert_eq!(waiting(&mut world), 0);
}

#[test]
fn pairs_that_choose_a_peers_port_at_the_same_time_choose_different_ones() {
    let owners = Arc::new(Owners::new(100_000));
    let now = Instant::now();
    let mut stacks = [0, 1, 9].map(|pair| {
        let settings = Settings {
            share: Some(Share {
                owners: Arc::clone(&owners),
                pair,
            }),
            ..Settings::default()
        };
        Stack::new(Arc::new(Spec::default()), settings, Arc::default(), 1, now)
    });
    // More than lie between the places where they begin.
    let peer = "127.0.0.1:9".parse().unwrap();
    for _ in 0..3000 {
        for stack in &mut stacks {
            assert!(stack.accept(peer, 22, now).is_some());
        }
    }
}
