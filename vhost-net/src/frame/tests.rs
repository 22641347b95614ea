use etherparse::{PacketBuilder, SlicedPacket, TransportSlice};
use proptest::prelude::*;

use super::*;

fn addresses(is_v4: bool) -> (IpAddr, IpAddr) {
    if is_v4 {
        ("10.0.2.15".parse().unwrap(), "192.0.2.7".parse().unwrap())
    } else {
        ("fd00::15".parse().unwrap(), "2001:db8::7".parse().unwrap())
    }
}

/// A sound frame, made by another implementation.
fn frame(is_v4: bool, is_tcp: bool, ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
    let ethernet = PacketBuilder::ethernet2([1, 2, 3, 4, 5, 6], [2, 2, 2, 2, 2, 2]);
    let ip = match addresses(is_v4) {
        (IpAddr::V4(from), IpAddr::V4(to)) => ethernet.ipv4(from.octets(), to.octets(), 60),
        (IpAddr::V6(from), IpAddr::V6(to)) => ethernet.ipv6(from.octets(), to.octets(), 60),
        _ => unreachable!(),
    };
    let mut bytes = Vec::new();
    if is_tcp {
        let tcp = ip.tcp(ports.0, ports.1, 77, 1024).syn();
        tcp.write(&mut bytes, payload).unwrap();
    } else {
        ip.udp(ports.0, ports.1).write(&mut bytes, payload).unwrap();
    }
    bytes
}

proptest! {
    #[test]
    fn sound_frames_are_read_as_another_parser_reads_them(
        is_v4: bool,
        is_tcp: bool,
        ports: (u16, u16),
        payload in proptest::collection::vec(any::<u8>(), 0..3000),
        padding in 0_usize..40,
    ) {
        let mut bytes = frame(is_v4, is_tcp, ports, &payload);
        let end = bytes.len();
        bytes.resize(end + padding, 0xee);
        let parsed = Frame::parse(&bytes, &NetHeader::default()).unwrap();
        let Net::Ip(packet) = parsed.net else { panic!("{:?}", parsed.net) };
        prop_assert_eq!((packet.source, packet.destination), addresses(is_v4));
        prop_assert_eq!(packet.ports(), Some(ports));
        prop_assert_eq!(packet.end, end);
        prop_assert_eq!(parsed.packet_count(), 1);
        let theirs = SlicedPacket::from_ethernet(&bytes).unwrap();
        match (packet.transport, theirs.transport.unwrap()) {
            (Transport::Tcp { payload: at, flags, .. }, TransportSlice::Tcp(tcp)) => {
                prop_assert_eq!(&bytes[at..end], tcp.payload());
                prop_assert_eq!(flags, 2);
            }
            (Transport::Udp { .. }, TransportSlice::Udp(udp)) => {
                prop_assert_eq!(&parsed.transport_bytes()[8..], udp.payload());
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn no_bytes_make_the_parser_panic_or_point_outside(
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
        kind in prop_oneof![Just(IPV4), Just(IPV6), any::<u16>()],
        header: [u8; 12],
    ) {
        let mut bytes = bytes;
        if let Some(place) = bytes.get_mut(12..14) {
            place.copy_from_slice(&kind.to_be_bytes());
        }
        let header = NetHeader::from_bytes(&header).unwrap();
        if let Ok(Frame { net: Net::Ip(packet), .. }) = Frame::parse(&bytes, &header) {
            prop_assert!(packet.start <= packet.transport_start);
            prop_assert!(packet.transport_start <= packet.end && packet.end <= bytes.len());
            if let Transport::Tcp { payload, .. } = packet.transport {
                prop_assert!(payload <= packet.end);
            }
        }
    }

    #[test]
    fn a_flipped_bit_is_noticed_or_harmless(
        is_v4: bool,
        is_tcp: bool,
        payload in proptest::collection::vec(any::<u8>(), 0..64),
        at: prop::sample::Index,
        bit in 0_u8..8,
    ) {
        let bytes = frame(is_v4, is_tcp, (1000, 2000), &payload);
        let mut bent = bytes.clone();
        let at = ETHERNET_LEN + at.index(bytes.len() - ETHERNET_LEN);
        bent[at] ^= 1 << bit;
        // Headers of IPv6 have no checksum of their own, and a UDP checksum of 0 is none.
        let is_covered = if is_v4 { is_tcp } else { at >= ETHERNET_LEN + 40 && is_tcp };
        if is_covered {
            prop_assert!(Frame::parse(&bent, &NetHeader::default()).is_err(), "byte {at}");
        } else {
            let _ = Frame::parse(&bent, &NetHeader::default());
        }
    }
}

/// A frame whose checksum was left to the device, and its header.
fn partial(is_v4: bool, payload: &[u8]) -> (Vec<u8>, NetHeader) {
    let mut bytes = frame(is_v4, true, (1, 2), payload);
    let start = ETHERNET_LEN + if is_v4 { 20 } else { 40 };
    bytes[start + 16..start + 18].fill(0x55);
    let header = NetHeader {
        flags: NEEDS_CSUM,
        csum_start: start as u16,
        csum_offset: 16,
        ..NetHeader::default()
    };
    (bytes, header)
}

#[test]
fn a_partial_checksum_is_taken_only_where_the_protocol_has_it() {
    for is_v4 in [true, false] {
        let (bytes, header) = partial(is_v4, b"payload");
        assert!(Frame::parse(&bytes, &header).unwrap().is_partial);
        let wrong = |bytes: &[u8], header: NetHeader| {
            let parsed = Frame::parse(bytes, &header).map(|_| ());
            assert_eq!(parsed, Err(Malformed::Offload), "{header:?}");
        };
        wrong(
            &bytes,
            NetHeader {
                csum_start: header.csum_start + 1,
                ..header
            },
        );
        wrong(
            &bytes,
            NetHeader {
                csum_offset: 6,
                ..header
            },
        );
        wrong(
            &bytes,
            NetHeader {
                csum_start: u16::MAX,
                csum_offset: u16::MAX,
                ..header
            },
        );
        let plain = NetHeader::default();
        let parsed = Frame::parse(&bytes, &plain).map(|_| ());
        assert_eq!(parsed, Err(Malformed::Checksum));
    }
}

#[test]
fn a_super_segment_has_to_be_what_it_says() {
    for (is_v4, right, other) in [(true, GSO_TCPV4, GSO_TCPV6), (false, GSO_TCPV6, GSO_TCPV4)] {
        let (bytes, header) = partial(is_v4, &[0; 10_000]);
        let gso = NetHeader {
            gso_type: right,
            gso_size: 1448,
            ..header
        };
        let parsed = Frame::parse(&bytes, &gso).unwrap();
        assert_eq!((parsed.gso_size, parsed.packet_count()), (Some(1448), 7));
        assert!(
            Frame::parse(
                &bytes,
                &NetHeader {
                    gso_type: right | GSO_ECN,
                    ..gso
                }
            )
            .is_ok()
        );
        for wrong in [
            NetHeader {
                gso_type: other,
                ..gso
            },
            NetHeader { gso_type: 3, ..gso },
            NetHeader { gso_size: 0, ..gso },
            NetHeader { flags: 0, ..gso },
        ] {
            let parsed = Frame::parse(&bytes, &wrong).map(|_| ());
            assert_eq!(parsed, Err(Malformed::Offload), "{wrong:?}");
        }
    }
}

#[test]
fn headers_that_lie_are_told_apart() {
    let parse = |bytes: &[u8]| Frame::parse(bytes, &NetHeader::default()).map(|_| ());
    let good = frame(true, true, (1, 2), b"x");
    let with = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        let sum = Sum::default()
            .bytes(&bytes[14..24])
            .bytes(&bytes[26..34])
            .checksum();
        bytes[24..26].copy_from_slice(&sum.to_be_bytes());
        bytes
    };
    assert_eq!(parse(&good), Ok(()));
    assert_eq!(parse(&good[..20]), Err(Malformed::Truncated));
    assert_eq!(parse(&with(14, 0x44)), Err(Malformed::Ip));
    assert_eq!(parse(&with(14, 0x65)), Err(Malformed::Ip));
    assert_eq!(parse(&with(16, 0xff)), Err(Malformed::Truncated));
    assert_eq!(parse(&with(46, 0x10)), Err(Malformed::Transport));
    assert_eq!(parse(&with(46, 0xf0)), Err(Malformed::Truncated));
    let mut bent = good.clone();
    bent[22] ^= 1;
    assert_eq!(parse(&bent), Err(Malformed::IpChecksum));
    let mut udp = frame(false, false, (1, 2), b"x");
    udp[59] += 1;
    assert_eq!(parse(&udp), Err(Malformed::Transport));
}
