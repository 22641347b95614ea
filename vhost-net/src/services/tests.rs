use std::time::Duration;

use dhcproto::v4::{DhcpOption, Message, MessageType};
use dhcproto::{Decodable, Decoder, Encodable, Encoder};
use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TransportSlice};

use super::*;

const GUEST: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
const CARD: [u8; 6] = [0x52, 0x55, 0x0a, 0, 2, 2];

fn services() -> (Services, Instant) {
    let now = Instant::now();
    (Services::new(Arc::new(Spec::default()), false, now), now)
}

fn discover() -> Vec<u8> {
    let none = Ipv4Addr::UNSPECIFIED;
    let mut message = Message::new_with_id(9, none, none, none, none, &GUEST);
    let kind = DhcpOption::MessageType(MessageType::Discover);
    message.opts_mut().insert(kind);
    let mut bytes = Vec::new();
    message.encode(&mut Encoder::new(&mut bytes)).unwrap();
    bytes
}

fn discover_frame() -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(GUEST, [0xff; 6])
        .ipv4([0, 0, 0, 0], [255, 255, 255, 255], 64)
        .udp(68, 67);
    let payload = discover();
    let mut frame = Vec::with_capacity(builder.size(payload.len()));
    builder.write(&mut frame, &payload).unwrap();
    frame
}

#[test]
fn a_discover_in_a_frame_is_answered_with_a_frame_that_another_parser_takes() {
    let (mut services, now) = services();
    let mut out = Outbox::default();
    let verdict = services.receive(&discover_frame(), true, now, &mut out);
    assert_eq!(verdict, Verdict::Handled);
    let sliced = SlicedPacket::from_ethernet(&out.frames[0]).unwrap();
    let ethernet = sliced
        .link
        .unwrap()
        .to_header()
        .unwrap()
        .ethernet2()
        .unwrap();
    assert_eq!((ethernet.source, ethernet.destination), (CARD, GUEST));
    let Some(NetSlice::Ipv4(ip)) = &sliced.net else {
        panic!("not IPv4")
    };
    let header = ip.header().to_header();
    assert_eq!(header.calc_header_checksum(), header.header_checksum);
    assert_eq!(header.source, [10, 0, 2, 2]);
    let Some(TransportSlice::Udp(udp)) = &sliced.transport else {
        panic!("not UDP")
    };
    assert_eq!((udp.source_port(), udp.destination_port()), (67, 68));
    let sum = udp
        .to_header()
        .calc_checksum_ipv4(&header, udp.payload())
        .unwrap();
    assert_eq!(sum, udp.checksum());
    let offer = Message::decode(&mut Decoder::new(udp.payload())).unwrap();
    assert_eq!(offer.yiaddr(), Ipv4Addr::new(10, 0, 2, 15));
}

#[test]
fn a_checksum_left_to_the_device_is_not_held_against_the_guest_and_a_wrong_one_is() {
    let mut frame = discover_frame();
    frame[40] ^= 0x55;
    let (mut services, now) = services();
    let mut out = Outbox::default();
    services.receive(&frame, true, now, &mut out);
    assert_eq!((out.frames.len(), services.stats().malformed), (0, 1));
    services.receive(&frame, false, now, &mut out);
    assert_eq!((out.frames.len(), services.stats().malformed), (1, 1));
}

#[test]
fn a_flood_is_answered_up_to_the_limit_and_counted_above_it() {
    let (mut services, now) = services();
    let frame = discover_frame();
    let mut out = Outbox::default();
    for _ in 0..5000 {
        services.receive(&frame, true, now, &mut out);
    }
    assert_eq!(out.frames.len(), 1024);
    assert_eq!(services.stats().limited, 5000 - 1024);
    services.receive(&frame, true, now + Duration::from_secs(1), &mut out);
    assert_eq!(out.frames.len(), 1025);
}

#[test]
fn another_hardware_address_gets_nothing() {
    let mut frame = discover_frame();
    frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
    let (mut services, now) = services();
    let mut out = Outbox::default();
    assert_eq!(
        services.receive(&frame, true, now, &mut out),
        Verdict::Handled
    );
    assert_eq!((out.frames.len(), services.stats().spoofed), (0, 1));
}

#[test]
fn the_time_is_told_at_the_addresses_that_a_vpc_has_it_at_and_nowhere_else() {
    let (mut services, now) = services();
    let mut question = [0; 48];
    question[0] = 0x23;
    question[40] = 9;
    let own: std::net::Ipv6Addr = "fd00:0:0:2::15".parse().unwrap();
    let time: std::net::Ipv6Addr = "fd00:ec2::123".parse().unwrap();
    let v4 = |to: [u8; 4], from: [u8; 4]| {
        let mut frame = Vec::new();
        let packet = PacketBuilder::ethernet2(GUEST, CARD).ipv4(from, to, 64);
        packet.udp(5123, 123).write(&mut frame, &question).unwrap();
        frame
    };
    let mut v6 = Vec::new();
    let packet = PacketBuilder::ethernet2(GUEST, CARD).ipv6(own.octets(), time.octets(), 64);
    packet.udp(5123, 123).write(&mut v6, &question).unwrap();
    let mut out = Outbox::default();
    let (server, guest) = ([169, 254, 169, 123], [10, 0, 2, 15]);
    for frame in [v4(server, guest), v6] {
        let verdict = services.receive(&frame, true, now, &mut out);
        assert_eq!(verdict, Verdict::Handled);
    }
    let unix = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let wanted = unix.unwrap().as_secs() + 2_208_988_800;
    let sources: [IpAddr; 2] = [Ipv4Addr::from(server).into(), time.into()];
    assert_eq!(out.frames.len(), 2);
    for (frame, source) in out.frames.iter().zip(sources) {
        let sliced = SlicedPacket::from_ethernet(frame).unwrap();
        let from: IpAddr = match &sliced.net {
            Some(NetSlice::Ipv4(ip)) => ip.header().source_addr().into(),
            Some(NetSlice::Ipv6(ip)) => ip.header().source_addr().into(),
            other => panic!("{other:?}"),
        };
        assert_eq!(from, source);
        let Some(TransportSlice::Udp(udp)) = &sliced.transport else {
            panic!("not UDP")
        };
        assert_eq!((udp.source_port(), udp.destination_port()), (123, 5123));
        let reply = udp.payload();
        assert_eq!((reply.len(), reply[0], reply[24]), (48, 0x24, 9));
        let seconds = u32::from_be_bytes(*reply[40..].first_chunk().unwrap());
        assert!((wanted as u32).wrapping_sub(seconds) < 60, "{seconds}");
    }
    assert_eq!(services.stats().ntp.answered, 2);
    // Others are not the card's to answer, and from others neither.
    let verdict = services.receive(&v4([10, 0, 2, 2], guest), true, now, &mut out);
    assert_eq!(verdict, Verdict::Pass);
    services.receive(&v4(server, [10, 0, 2, 16]), true, now, &mut out);
    assert_eq!((out.frames.len(), services.stats().unwanted), (2, 1));
}

#[test]
fn ping_to_the_gateway_is_answered_in_both_families() {
    let (mut services, now) = services();
    let mut out = Outbox::default();
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(GUEST, CARD)
        .ipv4([10, 0, 2, 15], [10, 0, 2, 2], 64)
        .icmpv4_echo_request(7, 1)
        .write(&mut frame, b"hello")
        .unwrap();
    services.receive(&frame, true, now, &mut out);
    let own: std::net::Ipv6Addr = "fd00:0:0:2::15".parse().unwrap();
    let gateway: std::net::Ipv6Addr = "fe80::2".parse().unwrap();
    frame.clear();
    PacketBuilder::ethernet2(GUEST, CARD)
        .ipv6(own.octets(), gateway.octets(), 64)
        .icmpv6_echo_request(7, 1)
        .write(&mut frame, b"hello")
        .unwrap();
    services.receive(&frame, true, now, &mut out);
    let [four, six] = &out.frames[..] else {
        panic!("{} replies", out.frames.len())
    };
    let sliced = SlicedPacket::from_ethernet(four).unwrap();
    let Some(TransportSlice::Icmpv4(icmp)) = &sliced.transport else {
        panic!("not ICMP")
    };
    assert_eq!((icmp.type_u8(), icmp.payload()), (0, &b"hello"[..]));
    let sliced = SlicedPacket::from_ethernet(six).unwrap();
    let Some(TransportSlice::Icmpv6(icmp)) = &sliced.transport else {
        panic!("not ICMPv6")
    };
    assert!(icmp.is_checksum_valid(gateway.octets(), own.octets()));
    assert_eq!((icmp.type_u8(), icmp.payload()), (129, &b"hello"[..]));
    assert_eq!(services.stats().echoed, 2);
}

#[test]
fn what_is_for_the_world_passes_and_so_does_what_no_service_wants() {
    let (mut services, now) = services();
    let mut out = Outbox::default();
    let mut verdict = |to: [u8; 4], port: u16, tcp: bool| {
        let mut frame = Vec::new();
        let builder = PacketBuilder::ethernet2(GUEST, CARD).ipv4([10, 0, 2, 15], to, 64);
        if tcp {
            let builder = builder.tcp(1000, port, 1, 1000).syn();
            builder.write(&mut frame, &[]).unwrap();
        } else {
            builder.udp(1000, port).write(&mut frame, b"x").unwrap();
        }
        services.receive(&frame, true, now, &mut out)
    };
    assert_eq!(verdict([8, 8, 8, 8], 53, false), Verdict::Pass);
    assert_eq!(verdict([8, 8, 8, 8], 67, false), Verdict::Pass);
    assert_eq!(verdict([169, 254, 169, 254], 80, true), Verdict::Pass);
    assert_eq!(verdict([10, 0, 2, 2], 111, false), Verdict::Pass);
    assert_eq!(verdict([10, 0, 2, 3], 53, false), Verdict::Pass);
    assert_eq!((out.frames.len(), services.stats().unwanted), (0, 0));
}

#[test]
fn bent_frames_never_panic() {
    let (mut services, mut now) = services();
    let mut random = fastrand::Rng::with_seed(5);
    let good = discover_frame();
    for _ in 0..50_000 {
        let mut frame = good.clone();
        frame.truncate(random.usize(0..=good.len()));
        for _ in 0..random.usize(0..5) {
            if !frame.is_empty() {
                let at = random.usize(0..frame.len().min(60));
                frame[at] = random.u8(..);
            }
        }
        let mut out = Outbox::default();
        services.receive(&frame, random.bool(), now, &mut out);
        assert!(out.frames.len() <= 1);
        now += Duration::from_millis(1);
    }
    assert!(services.stats().dhcp4.offers > 0);
}

#[test]
fn a_question_in_a_frame_goes_to_the_server_and_its_answer_comes_back_in_one() {
    use hickory_proto::op::{Message as Dns_, MessageType as Kind, OpCode, Query};
    use hickory_proto::rr::{Name, RecordType};

    let now = Instant::now();
    let spec = Spec {
        upstream_dns: vec!["192.0.2.53:53".parse().unwrap()],
        ..Spec::default()
    };
    let resolver = Dns::new(&spec, &[], Box::new(|| 77));
    let mut services = Services::new(Arc::new(spec), false, now).with_dns(resolver);
    let mut question = Dns_::new(5, Kind::Query, OpCode::Query);
    let name = Name::from_ascii("example.com.").unwrap();
    question.add_query(Query::query(name, RecordType::A));
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(GUEST, CARD)
        .ipv4([10, 0, 2, 15], [10, 0, 2, 3], 64)
        .udp(4000, 53)
        .write(&mut frame, &question.to_vec().unwrap())
        .unwrap();
    let mut out = Outbox::default();
    assert_eq!(
        services.receive(&frame, true, now, &mut out),
        Verdict::Handled
    );
    let asked = out.outgoing.pop().unwrap();
    assert_eq!(asked.to, "192.0.2.53:53".parse().unwrap());
    assert!(out.frames.is_empty());
    let mut answer = Dns_::response(77, OpCode::Query);
    answer.queries.clone_from(&question.queries);
    services.answered(asked.token, &answer.to_vec().unwrap(), now, &mut out);
    assert_eq!(out.over, [asked.token]);
    let sliced = SlicedPacket::from_ethernet(&out.frames[0]).unwrap();
    let Some(TransportSlice::Udp(udp)) = &sliced.transport else {
        panic!("not UDP")
    };
    assert_eq!((udp.source_port(), udp.destination_port()), (53, 4000));
    assert_eq!(udp.payload()[..2], [0, 5]);
}

#[test]
fn the_metadata_service_is_at_its_two_addresses_on_port_80_and_nowhere_else() {
    let now = Instant::now();
    let spec = Spec::default();
    let metadata = imds::MetadataSpec::default();
    let service = Arc::new(Imds::new(&metadata, &spec, [1; 32], now).unwrap());
    let services = Services::new(Arc::new(spec), false, now).with_imds(service);
    let guest = "10.0.2.15:40000".parse().unwrap();
    let is_there = |to: &str| services.connect(to.parse().unwrap(), guest, now).is_some();
    assert!(is_there("169.254.169.254:80") && is_there("[fd00:ec2::254]:80"));
    assert!(!is_there("169.254.169.254:443") && !is_there("10.0.2.2:80"));
    assert!(!is_there("10.0.2.3:53"));
}

#[test]
fn questions_over_tcp_are_answered_on_the_connection_that_they_came_over() {
    use hickory_proto::op::{Message as Dns_, MessageType as Kind, OpCode, Query};
    use hickory_proto::rr::{Name, RecordType};

    let now = Instant::now();
    let spec = Spec {
        hostname: Some("web-1".into()),
        upstream_dns: vec!["192.0.2.53:53".parse().unwrap()],
        ..Spec::default()
    };
    let resolver = Dns::new(&spec, &[], Box::new(|| 77));
    let mut services = Services::new(Arc::new(spec), false, now).with_dns(resolver);
    let (card, guest) = ("10.0.2.3:53", "10.0.2.15:4000");
    let ends = (card.parse().unwrap(), guest.parse().unwrap());
    let mut connection = services.connect(ends.0, ends.1, now).unwrap();
    let framed = |name: &str| {
        let mut question = Dns_::new(5, Kind::Query, OpCode::Query);
        question.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
        let bytes = question.to_vec().unwrap();
        [&(bytes.len() as u16).to_be_bytes()[..], &bytes].concat()
    };
    let both = [framed("example.com."), framed("web-1.")].concat();
    connection.receive(&both, now);
    assert_eq!(services.poll_at(), Some(now), "it wants to be called");
    let mut out = Outbox::default();
    services.poll(now, &mut out);
    // What is known is there first; the other is asked.
    let key = FlowKey {
        protocol: TCP,
        guest: ends.1,
        peer: ends.0,
    };
    assert_eq!(out.woken, [key]);
    let said: Vec<u8> = connection.output().drain(..).collect();
    let reply = Dns_::from_vec(&said[2..]).unwrap();
    assert_eq!(reply.answers[0].data.to_string(), "10.0.2.15");
    let asked = out.outgoing.pop().unwrap();
    let mut answer = Dns_::response(77, OpCode::Query);
    answer.queries = Dns_::from_vec(&asked.payload).unwrap().queries;
    services.answered(asked.token, &answer.to_vec().unwrap(), now, &mut out);
    assert_eq!(out.woken, [key, key]);
    let said: Vec<u8> = connection.output().drain(..).collect();
    assert_eq!(said[2..4], [0, 5]);
    assert!(out.frames.is_empty());
    // What is no question gets none, and does not block what follows.
    connection.receive(&[&[0, 12, 0, 9, 0x80, 0][..], &[0; 8]].concat(), now);
    services.poll(now, &mut out);
    connection.receive(&framed("web-1.")[..], now);
    services.poll(now, &mut out);
    connection.end(now);
    assert!(!connection.output().is_empty() && connection.is_done());
}

#[test]
fn tcp_to_the_link_local_services_counts_and_is_dropped_above_the_limit() {
    let (mut services, now) = services();
    let syn = |to: [u8; 4]| {
        let mut frame = Vec::new();
        PacketBuilder::ethernet2(GUEST, CARD)
            .ipv4([10, 0, 2, 15], to, 64)
            .tcp(4000, 80, 1, 1000)
            .syn()
            .write(&mut frame, &[])
            .unwrap();
        frame
    };
    let mut out = Outbox::default();
    let passed = |services: &mut Services, to, out: &mut Outbox| {
        let frame = syn(to);
        (0..5000)
            .filter(|_| services.receive(&frame, true, now, out) == Verdict::Pass)
            .count()
    };
    let limit = PACKETS_PER_SECOND as usize;
    assert_eq!(passed(&mut services, [169, 254, 169, 254], &mut out), limit);
    assert_eq!(services.stats().limited, 5000 - limit as u64);
    // What is not for them goes on at any rate.
    assert_eq!(passed(&mut services, [192, 0, 2, 7], &mut out), 5000);
    assert_eq!(passed(&mut services, [10, 0, 2, 2], &mut out), 5000);
}
