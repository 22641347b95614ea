//! ARP and neighbour discovery for the other members: the own card answers, out of what it knows.
//!
//! So no broadcast passes between guests, as in a VPC, and there is nothing with which one guest could
//! lead astray what is meant for another: who has which address is said by cards. A guest that probes
//! for an address that another member has (RFC 5227, RFC 4862) is told that it is taken.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, ETHERNET_HEADER_LEN, EthernetAddress, EthernetFrame,
    EthernetProtocol, EthernetRepr, Icmpv6Packet, Icmpv6Repr, IpProtocol, NdiscNeighborFlags,
    NdiscRepr,
};

use crate::frame::{Frame, ICMPV6, Net, Transport};
use crate::services::wire;

/// What a guest asks of its neighbours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Question {
    /// Who has an IPv4 address.
    Arp {
        /// The guest's, unspecified if it only probes.
        from: Ipv4Addr,
        /// The address.
        target: Ipv4Addr,
    },
    /// Who has an IPv6 address.
    Neighbor {
        /// The guest's, unspecified if it only probes.
        from: Ipv6Addr,
        /// The address.
        target: Ipv6Addr,
    },
}

impl Question {
    /// The address that is asked for.
    #[must_use]
    pub fn target(&self) -> IpAddr {
        match self {
            Self::Arp { target, .. } => (*target).into(),
            Self::Neighbor { target, .. } => (*target).into(),
        }
    }

    /// Whether the guest wants the address for itself.
    #[must_use]
    pub fn is_probe(&self) -> bool {
        match self {
            Self::Arp { from, .. } => from.is_unspecified(),
            Self::Neighbor { from, .. } => from.is_unspecified(),
        }
    }
}

/// The question in a frame of the guest's, if it is one and sound.
#[must_use]
pub fn question(frame: &Frame<'_>) -> Option<Question> {
    let ethernet = EthernetFrame::new_unchecked(frame.bytes);
    match &frame.net {
        Net::Arp => {
            let packet = ArpPacket::new_checked(ethernet.payload()).ok()?;
            let ArpRepr::EthernetIpv4 {
                operation: ArpOperation::Request,
                source_hardware_addr,
                source_protocol_addr: from,
                target_protocol_addr: target,
                ..
            } = ArpRepr::parse(&packet).ok()?
            else {
                return None;
            };
            // To itself it is an announcement.
            let is_question = source_hardware_addr == frame.source && from != target;
            is_question.then_some(Question::Arp { from, target })
        }
        Net::Ip(packet) => {
            // Looked into only if it is one: every packet of the guest's comes by here.
            if !matches!(packet.transport, Transport::Icmp { kind: 135, .. })
                || packet.protocol != ICMPV6
            {
                return None;
            }
            let packet = wire::parse_ip(ethernet.ethertype(), ethernet.payload())?;
            let (IpAddr::V6(from), IpAddr::V6(to)) = (packet.source, packet.destination) else {
                return None;
            };
            if packet.hop_limit != 255 {
                return None;
            }
            let icmp = Icmpv6Packet::new_checked(packet.payload).ok()?;
            let checks = ChecksumCapabilities::default();
            match Icmpv6Repr::parse(&from, &to, &icmp, &checks).ok()? {
                Icmpv6Repr::Ndisc(NdiscRepr::NeighborSolicit { target_addr, .. })
                    if !target_addr.is_multicast() =>
                {
                    Some(Question::Neighbor {
                        from,
                        target: target_addr,
                    })
                }
                _ => None,
            }
        }
        Net::Other(_) => None,
    }
}

/// The frame that tells `guest` that `member` has the address.
#[must_use]
pub fn answer(
    question: &Question,
    member: EthernetAddress,
    guest: EthernetAddress,
) -> Option<Vec<u8>> {
    match *question {
        Question::Arp { from, target } => {
            let repr = ArpRepr::EthernetIpv4 {
                operation: ArpOperation::Reply,
                source_hardware_addr: member,
                source_protocol_addr: target,
                target_hardware_addr: guest,
                target_protocol_addr: from,
            };
            let mut bytes = vec![0; ETHERNET_HEADER_LEN + repr.buffer_len()];
            let mut ethernet = EthernetFrame::new_unchecked(&mut bytes[..]);
            EthernetRepr {
                src_addr: member,
                dst_addr: guest,
                ethertype: EthernetProtocol::Arp,
            }
            .emit(&mut ethernet);
            repr.emit(&mut ArpPacket::new_unchecked(ethernet.payload_mut()));
            Some(bytes)
        }
        Question::Neighbor { from, target } => {
            let (to, mut flags) = (from, NdiscNeighborFlags::OVERRIDE);
            let (to, mac) = if to.is_unspecified() {
                let all = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
                (all, wire::group_mac_v6(all)?)
            } else {
                flags |= NdiscNeighborFlags::SOLICITED;
                (to, guest)
            };
            let repr = NdiscRepr::NeighborAdvert {
                flags,
                target_addr: target,
                lladdr: Some(member.into()),
            };
            wire::ip(
                (member, mac),
                (target.into(), to.into()),
                IpProtocol::Icmpv6,
                255,
                repr.buffer_len(),
                |bytes| {
                    repr.emit(&mut Icmpv6Packet::new_unchecked(&mut *bytes));
                    Icmpv6Packet::new_unchecked(bytes).fill_checksum(&target, &to);
                },
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::header::NetHeader;
    use crate::services::nd::solicited_node;

    const GUEST: EthernetAddress = EthernetAddress([0x52, 0x54, 0, 0x12, 0x34, 0x56]);
    const MEMBER: EthernetAddress = EthernetAddress([0x52, 0x54, 0, 1, 2, 3]);

    fn asked(bytes: &[u8]) -> Option<Question> {
        question(&Frame::parse(bytes, &NetHeader::default()).unwrap())
    }

    fn arp(from: [u8; 4], target: [u8; 4]) -> Vec<u8> {
        let question = Question::Arp {
            from: target.into(),
            target: from.into(),
        };
        let mut bytes = answer(&question, GUEST, EthernetAddress::BROADCAST).unwrap();
        bytes[21] = 1;
        bytes
    }

    fn solicit(from: Ipv6Addr, target: Ipv6Addr) -> Vec<u8> {
        let to = solicited_node(target);
        let repr = NdiscRepr::NeighborSolicit {
            target_addr: target,
            lladdr: (!from.is_unspecified()).then_some(GUEST.into()),
        };
        let link = (GUEST, wire::group_mac_v6(to).unwrap());
        let (ends, len) = ((from.into(), to.into()), repr.buffer_len());
        wire::ip(link, ends, IpProtocol::Icmpv6, 255, len, |bytes| {
            repr.emit(&mut Icmpv6Packet::new_unchecked(&mut *bytes));
            Icmpv6Packet::new_unchecked(bytes).fill_checksum(&from, &to);
        })
        .unwrap()
    }

    #[test]
    fn a_member_is_found_by_arp_under_its_own_hardware_address() {
        let ask = asked(&arp([10, 0, 2, 15], [10, 0, 2, 16])).unwrap();
        assert_eq!(ask.target(), "10.0.2.16".parse::<IpAddr>().unwrap());
        assert!(!ask.is_probe());
        let bytes = answer(&ask, MEMBER, GUEST).unwrap();
        let frame = EthernetFrame::new_checked(&bytes[..]).unwrap();
        assert_eq!((frame.src_addr(), frame.dst_addr()), (MEMBER, GUEST));
        let reply = ArpRepr::parse(&ArpPacket::new_checked(frame.payload()).unwrap());
        assert_eq!(
            reply,
            Ok(ArpRepr::EthernetIpv4 {
                operation: ArpOperation::Reply,
                source_hardware_addr: MEMBER,
                source_protocol_addr: Ipv4Addr::new(10, 0, 2, 16),
                target_hardware_addr: GUEST,
                target_protocol_addr: Ipv4Addr::new(10, 0, 2, 15),
            })
        );
        assert!(asked(&arp([0; 4], [10, 0, 2, 16])).unwrap().is_probe());
        let announcement = arp([10, 0, 2, 15], [10, 0, 2, 15]);
        assert_eq!(asked(&announcement), None);
        assert_eq!(asked(&answer(&ask, GUEST, MEMBER).unwrap()), None);
    }

    #[test]
    fn a_member_is_found_by_solicitation_and_a_probe_is_answered_to_all() {
        let target: Ipv6Addr = "fd00:0:0:2::16".parse().unwrap();
        for from in ["fd00:0:0:2::15", "::"] {
            let from: Ipv6Addr = from.parse().unwrap();
            let ask = asked(&solicit(from, target)).unwrap();
            assert_eq!(ask, Question::Neighbor { from, target });
            let bytes = answer(&ask, MEMBER, GUEST).unwrap();
            let frame = EthernetFrame::new_checked(&bytes[..]).unwrap();
            assert_eq!(frame.dst_addr() == GUEST, !ask.is_probe());
            let packet = wire::parse_ip(frame.ethertype(), frame.payload()).unwrap();
            let IpAddr::V6(to) = packet.destination else {
                panic!("IPv4")
            };
            let icmp = Icmpv6Packet::new_checked(packet.payload).unwrap();
            let checks = ChecksumCapabilities::default();
            let repr = Icmpv6Repr::parse(&target, &to, &icmp, &checks).unwrap();
            let Icmpv6Repr::Ndisc(NdiscRepr::NeighborAdvert {
                flags,
                target_addr,
                lladdr,
            }) = repr
            else {
                panic!("{repr:?}")
            };
            assert_eq!((target_addr, lladdr), (target, Some(MEMBER.into())));
            let is_solicited = flags.contains(NdiscNeighborFlags::SOLICITED);
            assert_eq!(is_solicited, !ask.is_probe());
            assert!(!flags.contains(NdiscNeighborFlags::ROUTER));
        }
    }
}
