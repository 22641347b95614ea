//! The second opinion is etherparse, and a receiver that puts segments together again.

use etherparse::{PacketBuilder, SlicedPacket, TransportSlice};
use proptest::prelude::*;

use super::*;

fn header(gso_type: u8, gso_size: u16, start: u16, offset: u16) -> NetHeader {
    NetHeader {
        flags: NEEDS_CSUM,
        gso_type,
        gso_size,
        csum_start: start,
        csum_offset: offset,
        ..NetHeader::default()
    }
}

/// A frame of TCP with a partial checksum, as a guest leaves it.
fn tcp(is_v4: bool, data: &[u8], flags: u8) -> Vec<u8> {
    let ethernet = PacketBuilder::ethernet2([2; 6], [4; 6]);
    let ip = if is_v4 {
        ethernet.ipv4([10, 0, 2, 15], [10, 0, 2, 16], 64)
    } else {
        let address = |last| std::net::Ipv6Addr::from([0xfd00, 0, 0, 2, 0, 0, 0, last]).octets();
        ethernet.ipv6(address(0x15), address(0x16), 64)
    };
    let mut bytes = Vec::new();
    let builder = ip.tcp(40000, 80, u32::MAX - 5000, 1000).ack(9);
    builder.write(&mut bytes, data).unwrap();
    let at = if is_v4 { 34 } else { 54 };
    bytes[at + 13] |= flags;
    // No checksum yet: whoever gets this one as it is sees that it is wrong.
    bytes[at + 16..at + 18].fill(0);
    bytes
}

fn deliver_all(
    bytes: &[u8],
    header: &NetHeader,
    takes: Takes,
) -> Result<Vec<(NetHeader, Vec<u8>)>, Unfit> {
    let frame = Frame::parse(bytes, header).unwrap();
    let mut got = Vec::new();
    let mut scratch = Vec::new();
    deliver(&frame, takes, 9001, &mut scratch, |header, bytes| {
        got.push((header, bytes.to_vec()));
    })?;
    Ok(got)
}

/// Whether a transport checksum is right, as etherparse computes it.
fn is_right(bytes: &[u8]) -> bool {
    let packet = SlicedPacket::from_ethernet(bytes).unwrap();
    let Some(TransportSlice::Tcp(tcp)) = &packet.transport else {
        panic!("no TCP")
    };
    let header = tcp.to_header();
    let sum = match packet.net.as_ref().unwrap() {
        etherparse::NetSlice::Ipv4(ip) => {
            let ip = ip.header();
            assert_eq!(ip.to_header().calc_header_checksum(), ip.header_checksum());
            header.calc_checksum_ipv4_raw(ip.source(), ip.destination(), tcp.payload())
        }
        etherparse::NetSlice::Ipv6(ip) => {
            let ip = ip.header();
            header.calc_checksum_ipv6_raw(ip.source(), ip.destination(), tcp.payload())
        }
        _ => panic!("no IP"),
    };
    sum.unwrap() == header.checksum
}

#[test]
fn a_super_segment_goes_whole_to_a_guest_that_takes_it() {
    let data = vec![7; 60_000];
    for (is_v4, gso_type) in [(true, GSO_TCPV4), (false, GSO_TCPV6)] {
        let start = if is_v4 { 34 } else { 54 };
        let bytes = tcp(is_v4, &data, PSH);
        let takes = Takes {
            partial: true,
            tso4: true,
            tso6: true,
        };
        let sent = header(gso_type, 8929, start, 16);
        let got = deliver_all(&bytes, &sent, takes).unwrap();
        let [(header, whole)] = &got[..] else {
            panic!("{} frames", got.len())
        };
        assert_eq!(whole, &bytes);
        assert_eq!((header.gso_type, header.gso_size), (gso_type, 8929));
        assert_eq!((header.csum_start, header.csum_offset), (start, 16));
        assert_eq!((header.flags, header.hdr_len), (NEEDS_CSUM, start + 20));
    }
}

#[test]
fn a_packet_longer_than_the_receivers_mtu_is_not_given_to_it() {
    let bytes = tcp(true, &[7; 9000], 0);
    let sent = header(0, 0, 34, 16);
    assert_eq!(
        deliver_all(&bytes, &sent, Takes::default()),
        Err(Unfit::TooBig)
    );
    let sent = header(GSO_TCPV4, 8980, 34, 16);
    let all = Takes {
        partial: true,
        tso4: true,
        tso6: true,
    };
    assert_eq!(deliver_all(&bytes, &sent, all), Err(Unfit::TooBig));
    let bytes = tcp(true, &[7; 60_000], 0);
    let sent = header(GSO_TCPV4, 100, 34, 16);
    assert_eq!(
        deliver_all(&bytes, &sent, Takes::default()),
        Err(Unfit::Pieces)
    );
}

#[test]
fn a_datagram_left_partial_is_summed_up_for_a_guest_that_wants_that() {
    for len in [0, 1, 1400] {
        let mut bytes = Vec::new();
        PacketBuilder::ethernet2([2; 6], [4; 6])
            .ipv4([10, 0, 2, 15], [10, 0, 2, 16], 64)
            .udp(5, 53)
            .write(&mut bytes, &vec![3; len])
            .unwrap();
        let whole = bytes.clone();
        bytes[40..42].copy_from_slice(&[0x12, 0x34]);
        let got = deliver_all(&bytes, &header(0, 0, 34, 6), Takes::default()).unwrap();
        assert_eq!(got, [(NetHeader::default(), whole)]);
    }
}

proptest! {
    #[test]
    fn pieces_are_packets_that_another_parser_takes_and_make_the_whole_again(
        data in proptest::collection::vec(any::<u8>(), 1..30_000),
        size in 536_u16..8900,
        is_v4: bool,
        partial: bool,
        flags in prop::sample::select(vec![0, PSH, FIN | PSH, CWR, CWR | FIN]),
    ) {
        let (start, gso_type) = if is_v4 { (34, GSO_TCPV4) } else { (54, GSO_TCPV6) };
        let bytes = tcp(is_v4, &data, flags);
        let takes = Takes { partial, ..Takes::default() };
        let sent = header(gso_type, size, start, 16);
        let got = deliver_all(&bytes, &sent, takes).unwrap();
        prop_assert_eq!(got.len(), data.len().div_ceil(usize::from(size)));
        let mut put_together = Vec::new();
        let last = got.len() - 1;
        for (index, (header, bytes)) in got.iter().enumerate() {
            let mut bytes = bytes.clone();
            if partial && got.len() > 1 {
                prop_assert_eq!(header.flags, NEEDS_CSUM);
                prop_assert_eq!((header.csum_start, header.csum_offset), (start, 16));
                // What the driver does (5.1.6.4): sum up from csum_start, what is there included.
                let sum = Sum::default().bytes(&bytes[usize::from(start)..]).checksum();
                bytes[usize::from(start) + 16..][..2].copy_from_slice(&sum.to_be_bytes());
            }
            if !partial || got.len() > 1 {
                prop_assert!(is_right(&bytes), "piece {} of {}", index, got.len());
            }
            let packet = SlicedPacket::from_ethernet(&bytes).unwrap();
            let Some(TransportSlice::Tcp(tcp)) = &packet.transport else { panic!("no TCP") };
            let at = (u32::MAX - 5000).wrapping_add(put_together.len() as u32);
            prop_assert_eq!(tcp.sequence_number(), at);
            prop_assert_eq!(tcp.fin(), flags & FIN != 0 && index == last);
            prop_assert_eq!(tcp.psh(), flags & PSH != 0 && index == last);
            prop_assert_eq!(tcp.cwr(), flags & CWR != 0 && index == 0);
            put_together.extend_from_slice(tcp.payload());
        }
        prop_assert_eq!(put_together, data);
    }
}
