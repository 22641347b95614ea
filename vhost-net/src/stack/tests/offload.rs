//! Offload metadata of what the card sends, for each set of features that a driver may accept, as
//! another implementation sees the packets once a device has done with them what they ask for.

use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use proptest::prelude::*;

use super::*;

/// What a device makes of a frame: one packet or several, with all checksums.
fn finish(header: &NetHeader, frame: &[u8]) -> Vec<Vec<u8>> {
    let (start, offset) = (
        usize::from(header.csum_start),
        usize::from(header.csum_offset),
    );
    let is_v4 = frame[12..14] == [8, 0];
    if header.gso_type == 0 {
        let mut packet = frame.to_vec();
        if header.flags & NEEDS_CSUM != 0 {
            // The field holds the pseudo header's sum.
            let sum = crate::frame::sum::Sum::default().bytes(&packet[start..]);
            packet[start + offset..start + offset + 2]
                .copy_from_slice(&sum.checksum().to_be_bytes());
        }
        return vec![packet];
    }
    assert_eq!(
        header.flags, NEEDS_CSUM,
        "a super-segment leaves its sums to the device"
    );
    let (head, payload) = frame.split_at(usize::from(header.hdr_len));
    let mut sequence = u32::from_be_bytes(head[start + 4..start + 8].try_into().unwrap());
    let parts = payload.chunks(usize::from(header.gso_size)).map(|part| {
        let mut packet = [head, part].concat();
        packet[start + 4..start + 8].copy_from_slice(&sequence.to_be_bytes());
        sequence = sequence.wrapping_add(part.len() as u32);
        let transport = packet.len() - start;
        if is_v4 {
            let total = (packet.len() - ETHERNET_LEN) as u16;
            packet[16..18].copy_from_slice(&total.to_be_bytes());
            packet[24..26].fill(0);
            let sum = crate::frame::sum::Sum::default().bytes(&packet[14..34]);
            packet[24..26].copy_from_slice(&sum.checksum().to_be_bytes());
        } else {
            packet[18..20].copy_from_slice(&(transport as u16).to_be_bytes());
        }
        packet[start + offset..start + offset + 2].fill(0);
        let addresses = &packet[if is_v4 { 26..34 } else { 22..54 }];
        let sum = crate::frame::sum::Sum::default()
            .bytes(addresses)
            .word(transport as u16)
            .word(u16::from(TCP))
            .bytes(&packet[start..]);
        packet[start + offset..start + offset + 2].copy_from_slice(&sum.checksum().to_be_bytes());
        packet
    });
    parts.collect()
}

/// The TCP payload of a sound packet of at most `mtu` bytes, with its sequence number.
fn judge(packet: &[u8], mtu: u16) -> (u32, Vec<u8>) {
    assert!(
        packet.len() <= ETHERNET_LEN + usize::from(mtu),
        "{}",
        packet.len()
    );
    let sliced = SlicedPacket::from_ethernet(packet).expect("a packet");
    let Some(TransportSlice::Tcp(tcp)) = &sliced.transport else {
        panic!("{sliced:?}");
    };
    let sum = match sliced.net.as_ref().expect("IP") {
        NetSlice::Ipv4(ip) => {
            let header = ip.header().to_header();
            assert_eq!(header.calc_header_checksum(), header.header_checksum);
            assert_eq!(usize::from(header.total_len), packet.len() - ETHERNET_LEN);
            {
                let ends = (ip.header().source(), ip.header().destination());
                tcp.calc_checksum_ipv4(ends.0, ends.1).expect("short")
            }
        }
        NetSlice::Ipv6(ip) => {
            let len = usize::from(ip.header().payload_length());
            assert_eq!(len, packet.len() - ETHERNET_LEN - 40);
            {
                let ends = (ip.header().source(), ip.header().destination());
                tcp.calc_checksum_ipv6(ends.0, ends.1).expect("short")
            }
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(sum, tcp.checksum());
    (tcp.sequence_number(), tcp.payload().to_vec())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn what_the_host_sends_is_what_sound_packets_of_the_mtu_carry(
        partial: bool,
        tso4: bool,
        is_v4: bool,
        mtu in 1280_u16..=65_520,
        len in 1_usize..200_000,
    ) {
        let accepts = Accepts { partial, tso4 };
        let spec = Spec { mtu, ..Spec::default() };
        let mut world = World::with(spec, Settings { accepts, ..Settings::default() });
        let to = if is_v4 { SERVER } else { "[2001:db8::7]:80" };
        let handle = world.connect(to, 40_000);
        world.settle();
        let flow = world.flow();
        world.event(flow, false, true, false);
        prop_assert_eq!(world.state(handle), State::Established);
        let data: Vec<u8> = (0..len).map(|n| (n % 251) as u8).collect();
        world.host.get(flow).inbox.extend(&data);
        let event = Event { readable: true, writable: true, hangup: false };
        world.stack.on_host(flow, event);
        // The guest has a window of 64 KiB, and this is what it is sent without another word of it.
        world.stack.run(world.now, &mut world.wire, &mut world.host);
        let frames = std::mem::take(&mut world.wire.frames);
        prop_assert!(!frames.is_empty());
        let (mut stream, mut next) = (Vec::new(), None);
        for (header, frame) in &frames {
            prop_assert_eq!(header.flags & NEEDS_CSUM != 0, partial);
            prop_assert!(header.gso_type == 0 || (partial && tso4 && is_v4));
            for packet in finish(header, frame) {
                let (sequence, payload) = judge(&packet, mtu);
                prop_assert_eq!(next.unwrap_or(sequence), sequence);
                next = Some(sequence.wrapping_add(payload.len() as u32));
                stream.extend(payload);
            }
        }
        prop_assert!(stream.len() >= len.min(1200), "{} of {}", stream.len(), len);
        prop_assert!(stream[..] == data[..stream.len()]);
    }
}
