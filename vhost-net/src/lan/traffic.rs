//! What a frame between two guests is, for policy. No I/O.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::frame::{ETHERNET_LEN, Frame, ICMP, ICMPV6, IPV4, IPV6, Net, Packet, TCP, Transport};
use crate::frame::{UDP, header::NetHeader};
use crate::local::{Direction, FlowKey, Meta};

/// Where a frame says that it goes, unchecked.
pub(super) fn destination(frame: &[u8]) -> Option<IpAddr> {
    let ethertype: &[u8; 2] = frame.get(12..)?.first_chunk()?;
    match u16::from_be_bytes(*ethertype) {
        IPV4 => {
            let octets: &[u8; 4] = frame.get(ETHERNET_LEN + 16..)?.first_chunk()?;
            Some(Ipv4Addr::from(*octets).into())
        }
        IPV6 => {
            let octets: &[u8; 16] = frame.get(ETHERNET_LEN + 24..)?.first_chunk()?;
            Some(Ipv6Addr::from(*octets).into())
        }
        _ => None,
    }
}

/// What policy is asked about a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Whether its flow may be.
    Flow(Meta),
    /// Whether the flow is there that this ICMP error is about.
    Error(FlowKey),
    /// Nothing yet: it is a part of a packet.
    Fragment,
    /// Nothing: neighbour discovery, redirects and errors about nothing that can be read do not pass
    /// between guests.
    Never,
}

/// Whether a packet is neighbour discovery or a redirect, which the own card deals with.
pub(super) fn is_link_business(packet: &Packet) -> bool {
    match (packet.protocol, packet.transport) {
        (ICMPV6, Transport::Icmp { kind, .. }) => (133..=137).contains(&kind),
        (ICMP, Transport::Icmp { kind, .. }) => kind == 5,
        _ => false,
    }
}

pub(super) fn kind(frame: &Frame<'_>, packet: &Packet, direction: Direction) -> Kind {
    if is_link_business(packet) {
        return Kind::Never;
    }
    if packet.transport == Transport::Fragment {
        return Kind::Fragment;
    }
    let meta = Meta::of(direction, frame, packet, packet.ports().unwrap_or((0, 0)));
    let is_error = match packet.protocol {
        ICMP => matches!(meta.icmp.0, 3 | 4 | 11 | 12),
        ICMPV6 => (1..=4).contains(&meta.icmp.0),
        _ => false,
    };
    if is_error {
        let quoted = frame.transport_bytes().get(8..).unwrap_or_default();
        return match quoted_flow(quoted) {
            // Who made the packet is who is told.
            Some((protocol, from, to)) if from.0 == packet.destination => {
                let told = match direction {
                    Direction::In => FlowKey::new(Direction::Out, protocol, from, to),
                    Direction::Out => FlowKey::new(Direction::In, protocol, from, to),
                };
                Kind::Error(told)
            }
            _ => Kind::Never,
        };
    }
    Kind::Flow(meta)
}

type End = (IpAddr, u16);

/// The flow of a packet of which an ICMP error quotes the beginning.
fn quoted_flow(bytes: &[u8]) -> Option<(u8, End, End)> {
    fn octets<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
        bytes.get(at..)?.first_chunk().copied()
    }
    let (protocol, from, to, at): (u8, IpAddr, IpAddr, usize) = match bytes.first()? >> 4 {
        4 => (
            *bytes.get(9)?,
            Ipv4Addr::from(octets::<4>(bytes, 12)?).into(),
            Ipv4Addr::from(octets::<4>(bytes, 16)?).into(),
            usize::from(bytes.first()? & 15) * 4,
        ),
        6 => (
            *bytes.get(6)?,
            Ipv6Addr::from(octets::<16>(bytes, 8)?).into(),
            Ipv6Addr::from(octets::<16>(bytes, 24)?).into(),
            40,
        ),
        _ => return None,
    };
    let half = |at: usize| octets::<2>(bytes, at).map(u16::from_be_bytes);
    let ports = match protocol {
        TCP | UDP => (half(at)?, half(at + 2)?),
        ICMP | ICMPV6 => (half(at + 4)?, half(at + 4)?),
        _ => (0, 0),
    };
    Some((protocol, (from, ports.0), (to, ports.1)))
}

/// The IP packet of a frame.
pub(super) fn packet<'a>(frame: &'a Frame<'_>) -> Option<&'a Packet> {
    match &frame.net {
        Net::Ip(packet) => Some(packet),
        Net::Arp | Net::Other(_) => None,
    }
}

/// A frame from a header and bytes that nobody has looked at.
pub(super) fn parse<'a>(header: &NetHeader, bytes: &'a [u8]) -> Option<Frame<'a>> {
    Frame::parse(bytes, header).ok()
}
