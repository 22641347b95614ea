//! Datagrams of the services: taken out of a guest's frame, put into one for the guest.
//!
//! Services see little traffic, so each frame is a buffer of its own and every checksum is filled
//! in here, whatever offloads the guest took.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ETHERNET_HEADER_LEN, EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr,
    IPV4_HEADER_LEN, IPV6_HEADER_LEN, IpProtocol, Ipv4Packet, Ipv4Repr, Ipv6Packet, Ipv6Repr,
    UDP_HEADER_LEN, UdpPacket, UdpRepr,
};

/// Longest payload of a datagram that [`udp`] makes: what an IPv4 packet can hold.
pub const UDP_PAYLOAD_MAX: usize = 65535 - IPV4_HEADER_LEN - UDP_HEADER_LEN;

/// An IP packet of the guest's with its headers checked; fragments are none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet<'a> {
    /// Sender.
    pub source: IpAddr,
    /// Receiver.
    pub destination: IpAddr,
    /// What the payload is.
    pub protocol: IpProtocol,
    /// TTL or hop limit.
    pub hop_limit: u8,
    /// What follows the IP header.
    pub payload: &'a [u8],
}

/// A UDP datagram of the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Datagram<'a> {
    /// Sender.
    pub source: (IpAddr, u16),
    /// Receiver.
    pub destination: (IpAddr, u16),
    /// What follows the UDP header.
    pub payload: &'a [u8],
}

/// The IP packet in an Ethernet frame. IPv6 extension headers make it none: no service needs them.
#[must_use]
pub fn parse_ip<'a>(ethertype: EthernetProtocol, payload: &'a [u8]) -> Option<Packet<'a>> {
    match ethertype {
        EthernetProtocol::Ipv4 => {
            let packet = Ipv4Packet::new_checked(payload).ok()?;
            if packet.version() != 4 || packet.more_frags() || packet.frag_offset() != 0 {
                return None;
            }
            if !packet.verify_checksum() {
                return None;
            }
            Some(Packet {
                source: packet.src_addr().into(),
                destination: packet.dst_addr().into(),
                protocol: packet.next_header(),
                hop_limit: packet.hop_limit(),
                payload: packet.payload(),
            })
        }
        EthernetProtocol::Ipv6 => {
            let packet = Ipv6Packet::new_checked(payload).ok()?;
            (packet.version() == 6).then_some(())?;
            Some(Packet {
                source: packet.src_addr().into(),
                destination: packet.dst_addr().into(),
                protocol: packet.next_header(),
                hop_limit: packet.hop_limit(),
                payload: packet.payload(),
            })
        }
        _ => None,
    }
}

/// The datagram in an IP packet. `checksummed` says that the checksum is complete: a guest that
/// leaves it to the device (virtio 1.3, 5.1.6.2, NEEDS_CSUM) has only begun it.
#[must_use]
pub fn parse_udp<'a>(packet: &Packet<'a>, checksummed: bool) -> Option<Datagram<'a>> {
    if packet.protocol != IpProtocol::Udp {
        return None;
    }
    let udp = UdpPacket::new_checked(packet.payload).ok()?;
    let mut checks = ChecksumCapabilities::default();
    if !checksummed {
        checks.udp = smoltcp::phy::Checksum::None;
    }
    let (source, destination) = (packet.source, packet.destination);
    let repr = UdpRepr::parse(&udp, &source.into(), &destination.into(), &checks).ok()?;
    // RFC 8200, 8.1: IPv6 has no datagrams without a checksum.
    if checksummed && source.is_ipv6() && udp.checksum() == 0 {
        return None;
    }
    Some(Datagram {
        source: (source, repr.src_port),
        destination: (destination, repr.dst_port),
        payload: udp.payload(),
    })
}

/// A frame with an IP packet: headers written, checksum of IPv4 too; `fill` writes the rest.
///
/// `None` when the addresses are of two families or the payload does not fit an IP packet.
pub fn ip(
    link: (EthernetAddress, EthernetAddress),
    (source, destination): (IpAddr, IpAddr),
    next_header: IpProtocol,
    hop_limit: u8,
    payload_len: usize,
    fill: impl FnOnce(&mut [u8]),
) -> Option<Vec<u8>> {
    let (ethertype, header_len) = match source {
        IpAddr::V4(_) => (EthernetProtocol::Ipv4, IPV4_HEADER_LEN),
        IpAddr::V6(_) => (EthernetProtocol::Ipv6, IPV6_HEADER_LEN),
    };
    if payload_len > usize::from(u16::MAX) - IPV4_HEADER_LEN {
        return None;
    }
    let mut bytes = vec![0; ETHERNET_HEADER_LEN + header_len + payload_len];
    let mut frame = EthernetFrame::new_unchecked(&mut bytes[..]);
    EthernetRepr {
        src_addr: link.0,
        dst_addr: link.1,
        ethertype,
    }
    .emit(&mut frame);
    match (source, destination) {
        (IpAddr::V4(src_addr), IpAddr::V4(dst_addr)) => {
            let mut packet = Ipv4Packet::new_unchecked(frame.payload_mut());
            let repr = Ipv4Repr {
                src_addr,
                dst_addr,
                next_header,
                payload_len,
                hop_limit,
            };
            repr.emit(&mut packet, &ChecksumCapabilities::default());
            fill(packet.payload_mut());
        }
        (IpAddr::V6(src_addr), IpAddr::V6(dst_addr)) => {
            let mut packet = Ipv6Packet::new_unchecked(frame.payload_mut());
            let repr = Ipv6Repr {
                src_addr,
                dst_addr,
                next_header,
                payload_len,
                hop_limit,
            };
            repr.emit(&mut packet);
            fill(packet.payload_mut());
        }
        _ => return None,
    }
    Some(bytes)
}

/// A frame with a UDP datagram. `link` and the addresses are (source, destination).
///
/// `None` as for [`ip`].
#[must_use]
pub fn udp(
    link: (EthernetAddress, EthernetAddress),
    source: (IpAddr, u16),
    destination: (IpAddr, u16),
    payload: &[u8],
) -> Option<Vec<u8>> {
    if payload.len() > UDP_PAYLOAD_MAX {
        return None;
    }
    ip(
        link,
        (source.0, destination.0),
        IpProtocol::Udp,
        64,
        UDP_HEADER_LEN + payload.len(),
        |bytes| {
            let repr = UdpRepr {
                src_port: source.1,
                dst_port: destination.1,
            };
            repr.emit(
                &mut UdpPacket::new_unchecked(bytes),
                &source.0.into(),
                &destination.0.into(),
                payload.len(),
                |buffer| buffer.copy_from_slice(payload),
                &ChecksumCapabilities::default(),
            );
        },
    )
}

/// The Ethernet address that an IPv4 multicast or broadcast address has; `None` for unicast.
#[must_use]
pub fn group_mac_v4(address: Ipv4Addr) -> Option<EthernetAddress> {
    if address.is_broadcast() {
        return Some(EthernetAddress::BROADCAST);
    }
    let [_, b, c, d] = address.octets();
    (address.is_multicast()).then_some(EthernetAddress([0x01, 0x00, 0x5e, b & 0x7f, c, d]))
}

/// The Ethernet address that an IPv6 multicast address has (RFC 2464, 7); `None` for unicast.
#[must_use]
pub fn group_mac_v6(address: Ipv6Addr) -> Option<EthernetAddress> {
    let [.., a, b, c, d] = address.octets();
    address
        .is_multicast()
        .then_some(EthernetAddress([0x33, 0x33, a, b, c, d]))
}
