//! Two queue pairs as a frontend and a driver meet them, with sockets of the host's behind.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener, UdpSocket};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use etherparse::PacketBuilder;
use offload::stop::StopSignal;
use offload::testing::driver::{Buffer, DriverQueue, GuestRam};
use offload::testing::frontend::TestFrontend;
use offload::vhost_user::Backend;
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::wire::{HardwareAddress, IpAddress, IpCidr};
use vhost::vhost_user::VhostUserFrontend;

use super::*;
use crate::services::imds::MetadataSpec;
use crate::testing::Nic;

const PATIENCE: Duration = Duration::from_secs(60);
const BUFFER: u32 = 10_000;
const HEADER: usize = 12;

struct Queue {
    driver: DriverQueue,
    /// Where the buffer of a head lies.
    places: Vec<u64>,
    /// Buffers that are not out.
    free: Vec<u64>,
}

/// A guest of two pairs, behind a real vhost-user socket.
struct Guest {
    device: Arc<NetDevice>,
    frontend: Option<TestFrontend>,
    serving: Option<JoinHandle<()>>,
    spec: Spec,
    /// rx 0, tx 0, rx 1, tx 1.
    queues: Vec<Queue>,
    nic: Nic,
    guest: Interface,
    sockets: SocketSet<'static>,
    start: Instant,
    /// The pair that is sent through.
    tx_pair: usize,
    /// IPv4 packets received through each pair.
    received: [usize; 2],
    /// Frames that were not IPv4.
    others: Vec<(usize, Vec<u8>)>,
}

impl Guest {
    fn new() -> Self {
        let spec = Spec::default();
        let gateway = spec.v4.unwrap().gateway;
        let settings = Settings {
            host_loopback: vec![gateway.into()],
            ..Settings::default()
        };
        let metadata = MetadataSpec::default();
        let imds = crate::services::imds::Imds::new(&metadata, &spec, [7; 32], Instant::now());
        let local = LocalOptions {
            imds: Some(Arc::new(imds.unwrap())),
            rules: Some(Arc::new(
                crate::policy::SharedRules::new(Default::default()).unwrap(),
            )),
            ..LocalOptions::default()
        };
        let device = Arc::new(NetDevice::new(spec.clone(), settings, local, 2));
        let (ours, theirs) = UnixStream::pair().unwrap();
        let serving = std::thread::spawn({
            let device = Arc::clone(&device);
            move || {
                let stats = device.queue_stats().to_vec();
                let backend = Backend::new(device, &stats).unwrap();
                let stop = StopSignal::new().unwrap();
                backend.serve_connected(theirs, &stop).unwrap();
            }
        });
        let mut frontend = TestFrontend::new(ours, 4);
        let features = frontend.negotiate(VERSION_1 | MQ);
        assert_ne!(features & MQ, 0);
        let ram = GuestRam::new(32 << 20);
        frontend.add_memory(&ram);
        let mut queues = Vec::new();
        for index in 0..4 {
            let mut driver = DriverQueue::new(&ram, 256, VERSION_1);
            let mut places = vec![0; 256];
            let mut free = Vec::new();
            for _ in 0..256 {
                let place = ram.alloc(BUFFER.into(), 8);
                if index % 2 == 0 {
                    let head = driver.add(&[Buffer::writable(place, BUFFER)]).unwrap();
                    places[usize::from(head)] = place;
                } else {
                    free.push(place);
                }
            }
            driver.publish();
            frontend.start_ring(index, &driver, 0);
            queues.push(Queue {
                driver,
                places,
                free,
            });
        }
        let mut nic = Nic::default();
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = 7;
        let mut guest = Interface::new(config, &mut nic, smoltcp::time::Instant::ZERO);
        guest.update_ip_addrs(|addresses| {
            let address = IpAddress::from(spec.v4.unwrap().address);
            addresses.push(IpCidr::new(address, 24)).unwrap();
        });
        guest.routes_mut().add_default_ipv4_route(gateway).unwrap();
        Self {
            device,
            frontend: Some(frontend),
            serving: Some(serving),
            spec,
            queues,
            nic,
            guest,
            sockets: SocketSet::new(Vec::new()),
            start: Instant::now(),
            tx_pair: 0,
            received: [0; 2],
            others: Vec::new(),
        }
    }

    fn frontend(&mut self) -> &mut TestFrontend {
        self.frontend.as_mut().unwrap()
    }

    /// Sends a frame through the transmit queue of `tx_pair`, as soon as that has room.
    fn send(&mut self, frame: &[u8]) {
        let queue = &mut self.queues[2 * self.tx_pair + 1];
        let place = loop {
            while let Some(used) = queue.driver.poll_used() {
                queue.free.push(queue.places[usize::from(used.head)]);
            }
            if let Some(place) = queue.free.pop() {
                break place;
            }
            let used = queue.driver.wait_used(PATIENCE);
            let used = used.expect("the transmit ring does not stand still");
            queue.free.push(queue.places[usize::from(used.head)]);
        };
        let mut bytes = vec![0; HEADER];
        bytes.extend_from_slice(frame);
        queue.driver.ram().write(place, &bytes);
        let buffer = Buffer::readable(place, bytes.len() as u32);
        let head = queue.driver.add(&[buffer]).unwrap();
        queue.places[usize::from(head)] = place;
        queue.driver.kick();
    }

    fn send_packet(&mut self, packet: &[u8]) {
        let mut frame = Vec::new();
        frame.extend_from_slice(&self.spec.gateway_mac.0);
        frame.extend_from_slice(&self.spec.mac.0);
        frame.extend_from_slice(&[8, 0]);
        frame.extend_from_slice(packet);
        self.send(&frame);
    }

    fn receive(&mut self) {
        for pair in 0..2 {
            let queue = &mut self.queues[2 * pair];
            while let Some(used) = queue.driver.poll_used() {
                let place = queue.places[usize::from(used.head)];
                let bytes = queue.driver.ram().read(place, used.written as usize);
                let head = queue
                    .driver
                    .add(&[Buffer::writable(place, BUFFER)])
                    .unwrap();
                queue.places[usize::from(head)] = place;
                let frame = &bytes[HEADER..];
                if frame[12..14] == [8, 0] {
                    self.received[pair] += 1;
                    self.nic.rx.push_back(frame[14..].to_vec());
                } else {
                    self.others.push((pair, frame.to_vec()));
                }
            }
            queue.driver.kick();
        }
    }

    /// Lets card and guest work once.
    fn step(&mut self) {
        self.receive();
        let micros = self.start.elapsed().as_micros() as i64;
        let time = smoltcp::time::Instant::from_micros(micros);
        self.guest.poll(time, &mut self.nic, &mut self.sockets);
        for packet in std::mem::take(&mut self.nic.tx) {
            self.send_packet(&packet);
        }
    }

    fn until(&mut self, what: &str, mut is_there: impl FnMut(&mut Self) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !is_there(self) {
            assert!(Instant::now() < end, "{what}");
            self.step();
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    fn connect(&mut self, to: (IpAddr, u16), port: u16) -> SocketHandle {
        let buffer = || SocketBuffer::new(vec![0; 1 << 18]);
        let mut socket = Socket::new(buffer(), buffer());
        socket.connect(self.guest.context(), to, port).unwrap();
        let handle = self.sockets.add(socket);
        self.until("connected", |guest| {
            guest.socket(handle).state() == State::Established
        });
        handle
    }

    fn socket(&mut self, handle: SocketHandle) -> &mut Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// Sends `data` to an echo and takes it back; `between` is called every now and then with the
    /// number of bytes that are back.
    fn echo(
        &mut self,
        handle: SocketHandle,
        data: &[u8],
        mut between: impl FnMut(&mut Self, usize),
    ) {
        let (mut sent, mut back) = (0, Vec::new());
        self.until("everything came back", |guest| {
            let socket = guest.socket(handle);
            assert!(socket.is_active(), "reset after {} bytes", back.len());
            if socket.can_send() {
                sent += socket.send_slice(&data[sent..]).unwrap();
            }
            while socket.can_recv() {
                let mut part = vec![0; 1 << 16];
                let len = socket.recv_slice(&mut part).unwrap();
                back.extend_from_slice(&part[..len]);
            }
            between(guest, back.len());
            back.len() == data.len()
        });
        assert!(back == data, "other bytes came back");
    }

    fn close(&mut self, handle: SocketHandle) {
        self.socket(handle).close();
        self.until("closed in order", |guest| {
            matches!(
                guest.socket(handle).state(),
                State::TimeWait | State::Closed
            )
        });
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        drop(self.frontend.take());
        if let Some(serving) = self.serving.take()
            && !std::thread::panicking()
        {
            serving.join().unwrap();
        }
    }
}

/// A server of the host's that sends back what it gets, to the end.
fn echo_server() -> (u16, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let thread = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut buffer = vec![0; 1 << 16];
        loop {
            let len = stream.read(&mut buffer).unwrap();
            if len == 0 {
                return;
            }
            stream.write_all(&buffer[..len]).unwrap();
        }
    });
    (port, thread)
}

fn noise(len: usize) -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(7);
    std::iter::repeat_with(|| rng.u8(..)).take(len).collect()
}

#[test]
fn a_flow_that_moves_between_queues_in_the_middle_loses_nothing_and_is_not_reset() {
    let mut guest = Guest::new();
    let (port, server) = echo_server();
    let gateway = guest.spec.v4.unwrap().gateway;
    guest.tx_pair = 1;
    let handle = guest.connect((gateway.into(), port), 40_000);
    let mut turns = 0;
    guest.echo(handle, &noise(3 << 20), |guest, _| {
        turns += 1;
        if turns % 5 == 0 {
            guest.tx_pair ^= 1;
        }
    });
    guest.close(handle);
    server.join().unwrap();
    let stats = guest.device.stats();
    assert_eq!(stats.stack.tcp_opened.get(), 1);
    assert!(stats.moved.get() > 20, "{}", stats.moved.get());
    assert_eq!(stats.overruns.get(), 0);
    // All came by the queue of the pair that has the flow.
    assert_eq!(guest.received[0], 0);
}

#[test]
fn flows_of_a_pair_whose_queues_are_disabled_live_on_through_the_first() {
    let mut guest = Guest::new();
    let (port, server) = echo_server();
    let gateway = guest.spec.v4.unwrap().gateway;
    guest.tx_pair = 1;
    let handle = guest.connect((gateway.into(), port), 40_000);
    let (mut is_off, mut is_on_again) = (false, false);
    guest.echo(handle, &noise(3 << 20), |guest, back| {
        if !is_off && back > 1 << 20 {
            is_off = true;
            guest.tx_pair = 0;
            for queue in [2, 3] {
                guest
                    .frontend()
                    .vhost
                    .set_vring_enable(queue, false)
                    .unwrap();
            }
            guest.receive();
            guest.received = [0; 2];
        }
        if is_off && !is_on_again && back > 2 << 20 {
            is_on_again = true;
            assert!(guest.received[0] > 50, "{:?}", guest.received);
            assert_eq!(guest.received[1], 0);
            for queue in [2, 3] {
                guest
                    .frontend()
                    .vhost
                    .set_vring_enable(queue, true)
                    .unwrap();
            }
            guest.tx_pair = 1;
        }
    });
    assert!(guest.received[1] > 20, "{:?}", guest.received);
    guest.close(handle);
    server.join().unwrap();
    assert_eq!(guest.device.stats().overruns.get(), 0);
}

#[test]
fn each_pair_answers_for_the_card_and_metadata_move_too() {
    let mut guest = Guest::new();
    let v4 = guest.spec.v4.unwrap();
    for pair in [1, 0] {
        let mut frame = vec![0xff; 6];
        frame.extend(guest.spec.mac.0);
        frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        frame.extend(guest.spec.mac.0);
        frame.extend(v4.address.octets());
        frame.extend([0; 6]);
        frame.extend(v4.gateway.octets());
        guest.tx_pair = pair;
        guest.send(&frame);
        guest.until("an answer", |guest| {
            let is_arp = |(by, frame): &(usize, Vec<u8>)| *by == pair && frame[12..14] == [8, 6];
            guest.others.iter().any(is_arp)
        });
    }
    let metadata = IpAddr::from(Ipv4Addr::new(169, 254, 169, 254));
    guest.tx_pair = 1;
    let handle = guest.connect((metadata, 80), 40_001);
    guest.tx_pair = 0;
    let request = "PUT /latest/api/token HTTP/1.1\r\nHost: x\r\n\
                   X-aws-ec2-metadata-token-ttl-seconds: 60\r\n\r\n";
    guest.socket(handle).send_slice(request.as_bytes()).unwrap();
    let mut answer = Vec::new();
    guest.until("a token", |guest| {
        let socket = guest.socket(handle);
        while socket.can_recv() {
            let mut part = [0; 1024];
            let len = socket.recv_slice(&mut part).unwrap();
            answer.extend_from_slice(&part[..len]);
        }
        answer.starts_with(b"HTTP/1.1 200") && answer.len() > 100
    });
    assert!(guest.device.stats().moved.get() > 0);
}

#[test]
fn a_flood_of_moved_datagrams_waits_for_the_flows_pair_and_none_is_dropped_on_the_way() {
    const COUNT: u16 = 4000;
    let mut guest = Guest::new();
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    let v4 = guest.spec.v4.unwrap();
    let builder = || {
        let to = server.local_addr().unwrap().port();
        PacketBuilder::ipv4(v4.address.octets(), v4.gateway.octets(), 64).udp(5000, to)
    };
    let mut packet = Vec::new();
    builder().write(&mut packet, b"first").unwrap();
    guest.send_packet(&packet);
    let mut buffer = [0; 9000];
    let (len, peer) = server.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..len], b"first");
    let moved = guest.device.stats().moved.get();
    guest.tx_pair = 1;
    let drain = std::thread::spawn({
        let server = server.try_clone().unwrap();
        move || {
            let mut buffer = [0; 9000];
            while server.recv(&mut buffer).unwrap() != 4 {}
        }
    });
    let payload = vec![1; 8000];
    packet.clear();
    builder().write(&mut packet, &payload).unwrap();
    for _ in 0..COUNT {
        guest.send_packet(&packet);
    }
    guest.until("all were handed over", |guest| {
        guest.device.stats().moved.get() - moved == u64::from(COUNT)
    });
    assert_eq!(guest.device.stats().stack.datagrams_dropped.get(), 0);
    assert_eq!(guest.device.stats().stack.udp_opened.get(), 1);
    // The flow is as it was.
    packet.clear();
    builder().write(&mut packet, b"last").unwrap();
    while !drain.is_finished() {
        guest.send_packet(&packet);
        std::thread::sleep(Duration::from_millis(20));
    }
    server.send_to(b"answer", peer).unwrap();
    guest.until("the answer", |guest| guest.received[0] > 0);
    assert_eq!(guest.received[1], 0);
}

#[test]
fn what_comes_in_fragments_through_several_queues_reaches_the_host_whole() {
    let mut guest = Guest::new();
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    let v4 = guest.spec.v4.unwrap();
    let to = server.local_addr().unwrap().port();
    let payload = noise(40_000);
    for first_pair in [0, 1] {
        let mut packet = Vec::new();
        PacketBuilder::ipv4(v4.address.octets(), v4.gateway.octets(), 64)
            .udp(5000 + first_pair as u16, to)
            .write(&mut packet, &payload)
            .unwrap();
        // The flow is pair 1's, then pair 0's.
        guest.tx_pair = first_pair ^ 1;
        let mut small = Vec::new();
        PacketBuilder::ipv4(v4.address.octets(), v4.gateway.octets(), 64)
            .udp(5000 + first_pair as u16, to)
            .write(&mut small, b"small")
            .unwrap();
        guest.send_packet(&small);
        let mut buffer = vec![0; 1 << 16];
        assert_eq!(server.recv(&mut buffer).unwrap(), 5);
        for at in (0..packet.len() - 20).step_by(1480) {
            let end = (packet.len() - 20).min(at + 1480);
            let mut part = packet[..20].to_vec();
            part.extend_from_slice(&packet[20 + at..20 + end]);
            let len = part.len() as u16;
            part[2..4].copy_from_slice(&len.to_be_bytes());
            part[4..6].copy_from_slice(&[7, first_pair as u8]);
            let more = u16::from(end < packet.len() - 20) << 13;
            part[6..8].copy_from_slice(&((at / 8) as u16 | more).to_be_bytes());
            part[10..12].fill(0);
            let sum = crate::frame::sum::Sum::default().bytes(&part[..20]);
            part[10..12].copy_from_slice(&sum.checksum().to_be_bytes());
            guest.tx_pair ^= 1;
            guest.send_packet(&part);
        }
        let len = server.recv(&mut buffer).unwrap();
        assert!(buffer[..len] == payload);
    }
    assert_eq!(guest.device.stats().reassembled.get(), 2);
    assert_eq!(guest.device.stats().stack.udp_opened.get(), 2);
}

/// Connects to a port of the host's, over and over, and keeps what was accepted. Each says its number.
fn clients(port: u16, count: u32) -> JoinHandle<Vec<std::net::TcpStream>> {
    std::thread::spawn(move || {
        let connect = |number: u32| {
            let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream.write_all(&number.to_be_bytes()).unwrap();
            stream
        };
        (0..count).map(connect).collect()
    })
}

#[test]
fn connections_to_a_published_port_come_through_every_pair_and_none_is_refused() {
    const COUNT: u32 = 64;
    let mut guest = Guest::new();
    let publisher = publisher::Publisher::new(Arc::clone(&guest.device), true);
    let rule = publisher.add("0:7777".parse().unwrap()).unwrap();
    let handles: Vec<_> = (0..COUNT)
        .map(|_| {
            let buffer = || SocketBuffer::new(vec![0; 1 << 12]);
            let mut socket = Socket::new(buffer(), buffer());
            socket.listen(7777).unwrap();
            guest.sockets.add(socket)
        })
        .collect();
    let mut clients = Some(clients(rule.host.port(), COUNT));
    let mut echoed = 0;
    guest.until("all were echoed", |guest| {
        for (at, handle) in handles.iter().enumerate() {
            guest.tx_pair = at % 2;
            let socket = guest.socket(*handle);
            if socket.recv_queue() >= 4 {
                let mut number = [0; 4];
                socket.recv_slice(&mut number).unwrap();
                socket.send_slice(&number).unwrap();
                echoed += 1;
            }
        }
        echoed == COUNT
    });
    let streams = clients.take().unwrap();
    guest.until("all are connected", |_| streams.is_finished());
    let streams = streams.join().unwrap();
    let answers = std::thread::spawn(move || {
        for (number, mut stream) in (0_u32..).zip(streams) {
            let mut answer = [0; 4];
            stream.read_exact(&mut answer).unwrap();
            assert_eq!(u32::from_be_bytes(answer), number);
        }
    });
    guest.until("all were answered", |_| answers.is_finished());
    answers.join().unwrap();
    let stats = &guest.device.stats().stack;
    assert_eq!(stats.tcp_opened.get(), u64::from(COUNT));
    // A flow has one port of the card's, whichever pair has the flow.
    let peers: std::collections::HashSet<_> = handles
        .iter()
        .map(|handle| guest.sockets.get::<Socket<'_>>(*handle).remote_endpoint())
        .collect();
    assert_eq!(peers.len(), COUNT as usize);
}

#[test]
fn datagrams_to_a_published_port_reach_a_guest_of_several_pairs_and_answers_go_back() {
    const COUNT: u32 = 200;
    let mut guest = Guest::new();
    let publisher = publisher::Publisher::new(Arc::clone(&guest.device), true);
    let rule = publisher.add("0:7000/udp".parse().unwrap()).unwrap();
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.connect(rule.host).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    let from = client.local_addr().unwrap().port();
    let v4 = guest.spec.v4.unwrap();
    for number in 0..COUNT {
        client.send(&number.to_be_bytes()).unwrap();
        // What the guest sends goes through the other pair every other time.
        guest.tx_pair = (number % 2) as usize;
        let end = Instant::now() + PATIENCE;
        let got = loop {
            assert!(Instant::now() < end, "{number} does not come");
            guest.receive();
            if let Some(packet) = guest.nic.rx.pop_front() {
                break packet;
            }
            std::thread::sleep(Duration::from_micros(50));
        };
        let sliced = etherparse::SlicedPacket::from_ip(&got).unwrap();
        let Some(etherparse::TransportSlice::Udp(udp)) = &sliced.transport else {
            panic!("no datagram")
        };
        // The gateway's address, and the peer's own port.
        assert_eq!(got[12..16], v4.gateway.octets());
        assert_eq!((udp.source_port(), udp.destination_port()), (from, 7000));
        assert_eq!(udp.payload(), number.to_be_bytes());
        let mut answer = Vec::new();
        PacketBuilder::ipv4(v4.address.octets(), v4.gateway.octets(), 64)
            .udp(7000, from)
            .write(&mut answer, &number.to_be_bytes())
            .unwrap();
        guest.send_packet(&answer);
        let mut buffer = [0; 64];
        let len = client.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..len], number.to_be_bytes());
    }
    assert_eq!(guest.device.stats().stack.udp_opened.get(), 1);
}

#[test]
fn a_smaller_mtu_of_the_frontends_is_kept_and_one_that_is_none_is_refused() {
    use offload::testing::frontend::words;
    use vhost::vhost_user::message::FrontendReq;
    let guest = Guest::new();
    let set = |mtu: u64| {
        let raw = guest.frontend.as_ref().unwrap().raw();
        raw.is_accepted(FrontendReq::NET_SET_MTU, &words(&[mtu]), &[])
    };
    assert!(!set(1279));
    assert!(!set(65_536));
    assert!(set(65_520));
    let mtu = || {
        let negotiated = Negotiated::new(0);
        let card = card(&guest.device.shared, negotiated, 0, Instant::now());
        card.unwrap().stack.mtu()
    };
    assert_eq!(mtu(), 9001);
    assert!(set(1500));
    assert_eq!(mtu(), 1500);
}
