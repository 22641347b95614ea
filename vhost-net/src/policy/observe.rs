//! What goes to the guest, as policy has to see it.
//!
//! The stack makes these frames and lets nothing begin that policy has not admitted, so they are
//! not judged; but connection tracking and the flow log must know of them, or a flow whose guest
//! only listens would be forgotten. The headers are our own: nothing is summed up or checked twice.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use smoltcp::wire::{
    ETHERNET_HEADER_LEN, EthernetFrame, EthernetProtocol, IPV4_HEADER_LEN, IPV6_HEADER_LEN,
    IpProtocol, Ipv4Packet, Ipv6Packet,
};

use crate::frame::header::NetHeader;
use crate::local::{Direction, FlowKey, Meta};

/// The flow and size of a frame to the guest, of which the headers suffice. `None`: no flow's, as ARP, ND
/// and ICMP errors.
#[must_use]
pub fn outgoing(header: &NetHeader, frame: &[u8]) -> Option<Meta> {
    let ethernet = EthernetFrame::new_checked(frame).ok()?;
    let (source, destination, protocol, start, bytes): (IpAddr, IpAddr, _, _, _) =
        match ethernet.ethertype() {
            EthernetProtocol::Ipv4 => {
                let packet = ethernet.payload();
                packet.get(..IPV4_HEADER_LEN)?;
                let packet = Ipv4Packet::new_unchecked(packet);
                if packet.frag_offset() != 0 {
                    return None;
                }
                let source: Ipv4Addr = packet.src_addr();
                let header_len = usize::from(packet.header_len());
                let (protocol, total) = (packet.next_header(), packet.total_len());
                let destination: Ipv4Addr = packet.dst_addr();
                (
                    source.into(),
                    destination.into(),
                    protocol,
                    header_len,
                    usize::from(total),
                )
            }
            EthernetProtocol::Ipv6 => {
                let packet = ethernet.payload();
                packet.get(..IPV6_HEADER_LEN)?;
                let packet = Ipv6Packet::new_unchecked(packet);
                let source: Ipv6Addr = packet.src_addr();
                let destination: Ipv6Addr = packet.dst_addr();
                let total = IPV6_HEADER_LEN + usize::from(packet.payload_len());
                let protocol = packet.next_header();
                (
                    source.into(),
                    destination.into(),
                    protocol,
                    IPV6_HEADER_LEN,
                    total,
                )
            }
            _ => return None,
        };
    let transport = frame.get(ETHERNET_HEADER_LEN + start..)?;
    let half = |at: usize| {
        let bytes = transport.get(at..at + 2)?;
        Some(u16::from_be_bytes(bytes.try_into().ok()?))
    };
    let mut meta = Meta {
        key: FlowKey::new(
            Direction::In,
            protocol.into(),
            (source, 0),
            (destination, 0),
        ),
        bytes: u32::try_from(bytes).unwrap_or(u32::MAX),
        packets: 1,
        tcp_flags: 0,
        icmp: (0, 0),
    };
    match protocol {
        IpProtocol::Tcp | IpProtocol::Udp => {
            meta.key.peer.set_port(half(0)?);
            meta.key.guest.set_port(half(2)?);
            if protocol == IpProtocol::Tcp {
                meta.tcp_flags = *transport.get(13)?;
                let header_len = usize::from(transport.get(12)? >> 4) * 4;
                let payload = bytes.saturating_sub(start + header_len);
                if header.gso_size > 0 {
                    let packets = payload.div_ceil(usize::from(header.gso_size)).max(1);
                    meta.packets = u32::try_from(packets).unwrap_or(u32::MAX);
                }
            }
        }
        IpProtocol::Icmp | IpProtocol::Icmpv6 => {
            meta.icmp = (*transport.first()?, *transport.get(1)?);
            if !matches!(meta.icmp.0, 0 | 8 | 128 | 129) {
                return None;
            }
            let identifier = half(4)?;
            meta.key.peer.set_port(identifier);
            meta.key.guest.set_port(identifier);
        }
        _ => return None,
    }
    Some(meta)
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;

    use super::*;

    #[test]
    fn a_segment_of_another_builder_has_its_flow_flags_and_size() {
        let mut frame = Vec::new();
        PacketBuilder::ethernet2([2; 6], [4; 6])
            .ipv4([192, 0, 2, 1], [10, 0, 2, 15], 64)
            .tcp(443, 40000, 1, 1000)
            .syn()
            .ack(7)
            .write(&mut frame, &[0; 3000])
            .unwrap();
        let header = NetHeader {
            gso_size: 1448,
            ..NetHeader::default()
        };
        let meta = outgoing(&header, &frame).unwrap();
        assert_eq!(meta.key.guest, "10.0.2.15:40000".parse().unwrap());
        assert_eq!(meta.key.peer, "192.0.2.1:443".parse().unwrap());
        assert_eq!((meta.key.protocol, meta.tcp_flags), (6, 0x12));
        assert_eq!((meta.packets, meta.bytes), (3, 3040));
    }

    #[test]
    fn an_echo_reply_has_its_identifier_on_both_ends_and_an_error_is_no_flows() {
        let (from, to): (Ipv6Addr, Ipv6Addr) = (
            "2001:db8::1".parse().unwrap(),
            "fd00:0:0:2::15".parse().unwrap(),
        );
        let mut frame = Vec::new();
        let ip = || PacketBuilder::ethernet2([2; 6], [4; 6]).ipv6(from.octets(), to.octets(), 64);
        ip().icmpv6_echo_reply(77, 1)
            .write(&mut frame, b"x")
            .unwrap();
        let meta = outgoing(&NetHeader::default(), &frame).unwrap();
        assert_eq!((meta.key.guest.port(), meta.key.peer.port()), (77, 77));
        assert_eq!(meta.icmp, (129, 0));
        frame.clear();
        ip().icmpv6_raw(1, 4, [0; 4])
            .write(&mut frame, &[0; 48])
            .unwrap();
        assert_eq!(outgoing(&NetHeader::default(), &frame), None);
        for length in 0..60 {
            let _ = outgoing(&NetHeader::default(), &frame[..length]);
        }
    }
}
