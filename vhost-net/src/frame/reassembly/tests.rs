use etherparse::PacketBuilder;
use proptest::prelude::*;

use super::*;
use crate::frame::header::NetHeader;

/// A UDP datagram, made by another implementation.
fn datagram(is_v4: bool, len: usize) -> Vec<u8> {
    let ethernet = PacketBuilder::ethernet2([1; 6], [2; 6]);
    let ip = if is_v4 {
        ethernet.ipv4([10, 0, 2, 15], [192, 0, 2, 7], 60)
    } else {
        ethernet.ipv6([0xfd; 16], [0x20; 16], 60)
    };
    let payload: Vec<u8> = (0..len).map(|n| (n * 7 / 3) as u8).collect();
    let mut bytes = Vec::new();
    ip.udp(1000, 2000).write(&mut bytes, &payload).unwrap();
    bytes
}

/// A fragment of it: `offset` in bytes.
fn fragment(whole: &[u8], id: u16, range: Range<usize>, has_more: bool) -> Vec<u8> {
    let is_v4 = whole[12..14] == [8, 0];
    let head = ETHERNET_LEN + if is_v4 { 20 } else { 40 };
    let mut bytes = whole[..head].to_vec();
    let data = &whole[head + range.start..head + range.end];
    if is_v4 {
        bytes[16..18].copy_from_slice(&(20 + data.len() as u16).to_be_bytes());
        bytes[18..20].copy_from_slice(&id.to_be_bytes());
        let field = (range.start / 8) as u16 | u16::from(has_more) << 13;
        bytes[20..22].copy_from_slice(&field.to_be_bytes());
        bytes[24..26].fill(0);
        let sum = Sum::default().bytes(&bytes[14..34]).checksum();
        bytes[24..26].copy_from_slice(&sum.to_be_bytes());
    } else {
        bytes[18..20].copy_from_slice(&(8 + data.len() as u16).to_be_bytes());
        let protocol = std::mem::replace(&mut bytes[20], 44);
        bytes.extend([protocol, 0]);
        let field = range.start as u16 & !7 | u16::from(has_more);
        bytes.extend(field.to_be_bytes());
        bytes.extend(u32::from(id).to_be_bytes());
    }
    bytes.extend_from_slice(data);
    bytes
}

fn add(reassembly: &mut Reassembly, bytes: &[u8], now: Instant) -> Outcome {
    let frame = Frame::parse(bytes, &NetHeader::default()).expect("a sound frame");
    reassembly.add(&frame, now)
}

/// All fragments of `size` bytes.
fn cut(whole: &[u8], id: u16, size: usize) -> Vec<Vec<u8>> {
    let head = ETHERNET_LEN + if whole[12..14] == [8, 0] { 20 } else { 40 };
    let len = whole.len() - head;
    let starts = (0..len).step_by(size);
    starts
        .map(|at| fragment(whole, id, at..len.min(at + size), at + size < len))
        .collect()
}

fn payload(frame: &[u8]) -> Vec<u8> {
    let frame = Frame::parse(frame, &NetHeader::default()).expect("sound when whole");
    let Net::Ip(packet) = &frame.net else {
        panic!("{frame:?}");
    };
    assert!(!packet.dont_fragment);
    assert_eq!(packet.ports(), Some((1000, 2000)));
    frame.transport_bytes().to_vec()
}

proptest! {
    #[test]
    fn fragments_in_any_order_and_twice_become_the_datagram_once(
        is_v4: bool,
        len in 100_usize..65_000,
        size in 32_usize..1200,
        seed: u64,
    ) {
        let whole = datagram(is_v4, len);
        let size = (size * 8).max(len.div_ceil(PIECES_MAX - 1).next_multiple_of(8));
        let mut parts = cut(&whole, 7, size);
        prop_assume!(parts.len() > 1);
        let mut rng = fastrand::Rng::with_seed(seed);
        rng.shuffle(&mut parts);
        let twice = parts[rng.usize(..parts.len() - 1)].clone();
        parts.insert(parts.len() - 1, twice);
        let (mut reassembly, now) = (Reassembly::default(), Instant::now());
        let last = parts.pop().unwrap();
        for part in &parts {
            prop_assert_eq!(add(&mut reassembly, part, now), Outcome::Kept);
        }
        let Outcome::Whole(frame) = add(&mut reassembly, &last, now) else {
            panic!("not whole");
        };
        let head = ETHERNET_LEN + if is_v4 { 20 } else { 40 };
        prop_assert_eq!(payload(&frame), &whole[head..]);
        prop_assert!(reassembly.is_empty());
    }

    #[test]
    fn no_fragments_make_it_panic_grow_or_give_what_does_not_parse_as_one_packet(
        parts in proptest::collection::vec(
            (any::<bool>(), 0_u16..3, 0_usize..8000, 0_usize..300, any::<bool>()),
            0..200,
        ),
    ) {
        let (mut reassembly, now) = (Reassembly::default(), Instant::now());
        for (is_v4, id, at, len, has_more) in parts {
            // Lies about its place: the data are from anywhere.
            let whole = datagram(is_v4, 500);
            let mut bytes = fragment(&whole, id, 0..len, has_more);
            if is_v4 {
                let field = at as u16 | u16::from(has_more) << 13;
                bytes[20..22].copy_from_slice(&field.to_be_bytes());
                bytes[24..26].fill(0);
                let sum = Sum::default().bytes(&bytes[14..34]).checksum();
                bytes[24..26].copy_from_slice(&sum.to_be_bytes());
            } else {
                let field = (at as u16) << 3 | u16::from(has_more);
                bytes[56..58].copy_from_slice(&field.to_be_bytes());
            }
            let Ok(frame) = Frame::parse(&bytes, &NetHeader::default()) else { continue };
            if let Outcome::Whole(frame) = reassembly.add(&frame, now) {
                prop_assert!(frame.len() <= crate::frame::FRAME_MAX);
                if let Ok(Frame { net: Net::Ip(packet), .. }) =
                    Frame::parse(&frame, &NetHeader::default())
                {
                    prop_assert_ne!(packet.transport, Transport::Fragment);
                }
            }
            prop_assert!(reassembly.len() <= PACKETS_MAX);
        }
    }
}

#[test]
fn overlapping_fragments_make_their_packet_void_to_the_end() {
    for is_v4 in [true, false] {
        let whole = datagram(is_v4, 2000);
        for (second, what) in [
            (496..1000, "the front is there"),
            (0..1000, "contains another"),
            (8..160, "is contained in another"),
        ] {
            let (mut reassembly, now) = (Reassembly::default(), Instant::now());
            let first = fragment(&whole, 1, 0..504, true);
            assert_eq!(add(&mut reassembly, &first, now), Outcome::Kept);
            let part = fragment(&whole, 1, second, true);
            assert_eq!(add(&mut reassembly, &part, now), Outcome::Void, "{what}");
            for part in cut(&whole, 1, 504) {
                assert_eq!(add(&mut reassembly, &part, now), Outcome::Void);
            }
            // Another packet is none of its business, and its time ends as any other's.
            let mut outcomes = cut(&whole, 2, 504).into_iter();
            assert!(
                outcomes.any(|part| matches!(add(&mut reassembly, &part, now), Outcome::Whole(_)))
            );
            let expired = reassembly.expire(now + TIMEOUT).unwrap();
            assert_eq!(expired.quote, None);
        }
    }
}

#[test]
fn two_ends_or_more_behind_the_end_are_void() {
    for is_v4 in [true, false] {
        let whole = datagram(is_v4, 2000);
        for (first, second) in [
            ((1000..1100, false), (1200..1300, false)),
            ((1000..1100, false), (1200..1304, true)),
            ((1200..1304, true), (1000..1100, false)),
        ] {
            let (mut reassembly, now) = (Reassembly::default(), Instant::now());
            let part = fragment(&whole, 1, first.0, first.1);
            assert_eq!(add(&mut reassembly, &part, now), Outcome::Kept);
            let part = fragment(&whole, 1, second.0, second.1);
            assert_eq!(add(&mut reassembly, &part, now), Outcome::Void);
        }
    }
}

#[test]
fn a_length_that_is_no_multiple_of_eight_or_leads_too_far_is_malformed() {
    let now = Instant::now();
    for (is_v4, odd, far) in [(true, None, None), (false, Some(4), Some(42))] {
        let whole = datagram(is_v4, 2000);
        let mut reassembly = Reassembly::default();
        let part = fragment(&whole, 1, 0..500, true);
        assert_eq!(add(&mut reassembly, &part, now), Outcome::Malformed(odd));
        let mut part = fragment(&whole, 1, 0..504, false);
        if is_v4 {
            part[20..22].copy_from_slice(&0x1fff_u16.to_be_bytes());
            part[24..26].fill(0);
            let sum = Sum::default().bytes(&part[14..34]).checksum();
            part[24..26].copy_from_slice(&sum.to_be_bytes());
        } else {
            part[56..58].copy_from_slice(&0xfff8_u16.to_be_bytes());
        }
        assert_eq!(add(&mut reassembly, &part, now), Outcome::Malformed(far));
        assert!(reassembly.is_empty());
    }
}

#[test]
fn a_packet_that_stays_incomplete_expires_and_the_guest_is_told_if_it_has_begun() {
    let now = Instant::now();
    for is_v4 in [true, false] {
        let whole = datagram(is_v4, 2000);
        let mut reassembly = Reassembly::default();
        let begin = fragment(&whole, 1, 0..504, true);
        let end = fragment(&whole, 2, 1000..1200, false);
        add(&mut reassembly, &begin, now);
        add(&mut reassembly, &end, now + Duration::from_secs(1));
        assert_eq!(reassembly.deadline(), Some(now + TIMEOUT));
        assert_eq!(reassembly.expire(now + TIMEOUT / 2), None);
        let first = reassembly.expire(now + TIMEOUT).unwrap();
        assert_eq!(
            first.quote.as_deref(),
            Some(&begin[14..][..(begin.len() - 14).min(QUOTE)])
        );
        assert_eq!(reassembly.expire(now + TIMEOUT), None);
        let second = reassembly.expire(now + TIMEOUT * 2).unwrap();
        assert_eq!(second.quote, None);
        assert_eq!(reassembly.deadline(), None);
    }
}

#[test]
fn a_flood_of_beginnings_costs_a_bounded_number_and_the_newest_gets_through() {
    let now = Instant::now();
    let whole = datagram(true, 2000);
    let mut reassembly = Reassembly::default();
    for id in 0..1000 {
        add(&mut reassembly, &fragment(&whole, id, 0..504, true), now);
        assert!(reassembly.len() <= PACKETS_MAX);
    }
    assert_eq!(reassembly.evicted(), 1000 - PACKETS_MAX as u64);
    let mut outcomes = cut(&whole, 2000, 504).into_iter();
    assert!(outcomes.any(|part| matches!(add(&mut reassembly, &part, now), Outcome::Whole(_))));
    // Too many pieces of one are void.
    let mut outcome = Outcome::Kept;
    for at in 0..=PIECES_MAX {
        // With a hole behind each, so that it is never whole.
        if at * 16 + 8 <= 2000 {
            outcome = add(
                &mut reassembly,
                &fragment(&whole, 3000, at * 16..at * 16 + 8, true),
                now,
            );
        }
    }
    assert_eq!(outcome, Outcome::Kept);
    let large = datagram(true, 8000);
    for at in 0..=PIECES_MAX {
        outcome = add(
            &mut reassembly,
            &fragment(&large, 3001, at * 16..at * 16 + 8, true),
            now,
        );
    }
    assert_eq!(outcome, Outcome::Void);
}

#[test]
fn tcp_over_ipv6_loses_its_fragment_header_for_the_stack() {
    let mut whole = Vec::new();
    PacketBuilder::ethernet2([1; 6], [2; 6])
        .ipv6([0xfd; 16], [0x20; 16], 60)
        .tcp(1, 2, 3, 4)
        .write(&mut whole, &[9; 1000])
        .unwrap();
    let mut reassembly = Reassembly::default();
    let outcomes = cut(&whole, 1, 504);
    let now = Instant::now();
    let outcomes = outcomes.iter().map(|part| add(&mut reassembly, part, now));
    let frame = outcomes.last().unwrap();
    assert_eq!(frame, Outcome::Whole(whole.into()));
}
