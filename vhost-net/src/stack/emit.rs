//! Frames that the stack writes itself: datagrams to the guest and ICMP errors; and what every
//! frame to the guest gets in the end.

use std::net::{IpAddr, SocketAddr};

use smoltcp::wire::EthernetAddress;

use crate::frame::header::{GSO_TCPV4, GSO_TCPV6, NEEDS_CSUM, NetHeader};
use crate::frame::sum::Sum;
use crate::frame::{ETHERNET_LEN, ICMP, ICMPV6, IPV4, IPV6, TCP, UDP};

/// Bytes of a UDP header.
pub const UDP_LEN: usize = 8;
/// Time to live of what the card sends.
const HOP_LIMIT: u8 = 64;
/// Bytes of the packet that an ICMP error quotes, at most: RFC 4443, 2.4 (c), and less for IPv4
/// (RFC 1812, 4.3.2.3).
const QUOTE_V4: usize = 548;
const QUOTE_V6: usize = 1232;

/// The two ends of the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ends {
    /// The guest.
    pub guest: EthernetAddress,
    /// The card.
    pub card: EthernetAddress,
}

/// Why a packet did not get through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unreachable {
    /// No route to the network.
    Network,
    /// The host does not answer.
    Host,
    /// Nobody listens on the port.
    Port,
    /// A filter says no.
    Prohibited,
    /// It has passed as many routers as it may.
    HopLimit,
    /// What somebody on the way says: ICMP type and code as they came, and the header's rest.
    Told(u8, u8, u32),
    /// Larger than the path takes; how much it takes, in bytes of IP packet.
    TooBig(u32),
    /// Its fragments did not all come in time.
    Reassembly,
    /// The field at this place of the IPv6 packet makes no sense.
    Parameter(u32),
}

fn put(bytes: &mut [u8], at: usize, part: &[u8]) {
    if let Some(place) = bytes
        .get_mut(at..)
        .and_then(|rest| rest.get_mut(..part.len()))
    {
        place.copy_from_slice(part);
    }
}

/// Bytes of an IP header for this address.
#[must_use]
pub const fn ip_len(address: IpAddr) -> usize {
    if address.is_ipv4() { 20 } else { 40 }
}

/// Writes the Ethernet header, and leaves the TCP checksum to the driver if it takes that
/// (`partial`). `frame` holds a whole IP packet behind the place for the Ethernet header.
pub(super) fn finish(
    frame: &mut [u8],
    ends: Ends,
    partial: bool,
    segment: Option<u16>,
) -> NetHeader {
    let is_v4 = frame.get(ETHERNET_LEN).is_some_and(|byte| byte >> 4 == 4);
    put(frame, 0, &ends.guest.0);
    put(frame, 6, &ends.card.0);
    put(frame, 12, &if is_v4 { IPV4 } else { IPV6 }.to_be_bytes());
    let packet = frame.get(ETHERNET_LEN..).unwrap_or_default();
    let (ip_len, protocol) = if is_v4 {
        (20, packet.get(9).copied())
    } else {
        (40, packet.get(6).copied())
    };
    if protocol != Some(TCP) || !partial {
        return NetHeader::default();
    }
    let transport = packet.len().saturating_sub(ip_len) as u32;
    // smoltcp writes no IP options and no extension headers.
    let addresses = if is_v4 { 12..20 } else { 8..40 };
    let sum = Sum::default()
        .bytes(packet.get(addresses).unwrap_or_default())
        .bytes(&transport.to_be_bytes())
        .word(u16::from(TCP))
        .partial();
    let header_len = packet.get(ip_len + 12).map_or(20, |byte| byte >> 4 << 2);
    let start = ETHERNET_LEN + ip_len;
    put(frame, start + 16, &sum.to_be_bytes());
    NetHeader {
        flags: NEEDS_CSUM,
        gso_type: match segment {
            None => 0,
            Some(_) if is_v4 => GSO_TCPV4,
            Some(_) => GSO_TCPV6,
        },
        hdr_len: (start + usize::from(header_len)) as u16,
        gso_size: segment.unwrap_or(0),
        csum_start: start as u16,
        csum_offset: 16,
        num_buffers: 0,
    }
}

/// What a frame of smoltcp's says about its TCP segment.
pub(super) struct Segment {
    pub(super) sequence: u32,
    pub(super) is_syn: bool,
    /// Where in the frame its payload is.
    pub(super) payload_at: usize,
}

/// Looks into a frame of smoltcp's, which has no IP options and no extension headers. `None`: it is not
/// TCP.
pub(super) fn tcp_segment(frame: &[u8]) -> Option<Segment> {
    let packet = frame.get(ETHERNET_LEN..)?;
    let (ip_len, protocol) = match packet.first()? >> 4 {
        4 => (20, packet.get(9)?),
        _ => (40, packet.get(6)?),
    };
    if *protocol != TCP {
        return None;
    }
    let header = packet.get(ip_len..)?;
    let sequence = header.get(4..8)?.first_chunk()?;
    Some(Segment {
        sequence: u32::from_be_bytes(*sequence),
        is_syn: header.get(13)? & 2 != 0,
        payload_at: ETHERNET_LEN + ip_len + usize::from(header.get(12)? >> 4) * 4,
    })
}

/// An IP header's variable parts.
#[derive(Clone, Copy, Debug)]
struct IpHead {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    /// IPv4 flags and offset, in units of 8 bytes.
    fragment: u16,
    identification: u16,
}

/// Writes Ethernet and IP header for `len` bytes of payload; gives where the payload starts.
fn head(frame: &mut [u8], ends: Ends, ip: IpHead, len: usize) -> usize {
    put(frame, 0, &ends.guest.0);
    put(frame, 6, &ends.card.0);
    let at = ETHERNET_LEN;
    match (ip.source, ip.destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            put(frame, 12, &IPV4.to_be_bytes());
            let mut header = [0; 20];
            header[0] = 0x45;
            header[2..4].copy_from_slice(&((len + 20) as u16).to_be_bytes());
            header[4..6].copy_from_slice(&ip.identification.to_be_bytes());
            header[6..8].copy_from_slice(&ip.fragment.to_be_bytes());
            header[8] = HOP_LIMIT;
            header[9] = ip.protocol;
            header[12..16].copy_from_slice(&source.octets());
            header[16..].copy_from_slice(&destination.octets());
            let sum = Sum::default().bytes(&header).checksum();
            header[10..12].copy_from_slice(&sum.to_be_bytes());
            put(frame, at, &header);
        }
        (source, destination) => {
            put(frame, 12, &IPV6.to_be_bytes());
            let v6 = |address| match address {
                IpAddr::V4(v4) => v4.to_ipv6_mapped(),
                IpAddr::V6(v6) => v6,
            };
            let mut header = [0; 40];
            header[0] = 0x60;
            header[4..6].copy_from_slice(&(len as u16).to_be_bytes());
            header[6] = ip.protocol;
            header[7] = HOP_LIMIT;
            header[8..24].copy_from_slice(&v6(source).octets());
            header[24..].copy_from_slice(&v6(destination).octets());
            put(frame, at, &header);
        }
    }
    at + ip_len(ip.source)
}

/// Where a UDP payload of this source lies in a frame.
#[must_use]
pub(super) const fn udp_payload_at(source: IpAddr) -> usize {
    ETHERNET_LEN + ip_len(source) + UDP_LEN
}

/// Writes the headers of a UDP datagram around `len` bytes that lie at [`udp_payload_at`]; gives the
/// frame's length. The datagram may be larger than the MTU: see [`fragments`].
pub(super) fn udp(
    frame: &mut [u8],
    ends: Ends,
    source: SocketAddr,
    destination: SocketAddr,
    len: usize,
) -> usize {
    let ip = IpHead {
        source: source.ip(),
        destination: destination.ip(),
        protocol: UDP,
        fragment: 0x4000,
        identification: 0,
    };
    let at = head(frame, ends, ip, len + UDP_LEN);
    let end = at + UDP_LEN + len;
    put(frame, at, &source.port().to_be_bytes());
    put(frame, at + 2, &destination.port().to_be_bytes());
    put(frame, at + 4, &((len + UDP_LEN) as u16).to_be_bytes());
    put(frame, at + 6, &[0, 0]);
    let body = frame.get(at..end).unwrap_or_default();
    let sum = Sum::pseudo(ip.source, ip.destination, UDP, body.len() as u32).bytes(body);
    // 0 would say that there is none (RFC 768).
    let sum = Some(sum.checksum())
        .filter(|sum| *sum != 0)
        .unwrap_or(0xffff);
    put(frame, at + 6, &sum.to_be_bytes());
    end
}

/// Writes headers around `len` bytes of ICMP that lie behind them, and their checksum; gives the
/// frame's length.
pub(super) fn icmp(
    frame: &mut [u8],
    ends: Ends,
    source: IpAddr,
    destination: IpAddr,
    len: usize,
) -> usize {
    let protocol = if source.is_ipv4() { ICMP } else { ICMPV6 };
    let ip = IpHead {
        source,
        destination,
        protocol,
        fragment: 0,
        identification: 0,
    };
    let at = head(frame, ends, ip, len);
    put(frame, at + 2, &[0, 0]);
    let body = frame.get(at..at + len).unwrap_or_default();
    let sum = if source.is_ipv4() {
        Sum::default()
    } else {
        Sum::pseudo(source, destination, ICMPV6, len as u32)
    };
    let sum = sum.bytes(body).checksum();
    put(frame, at + 2, &sum.to_be_bytes());
    at + len
}

/// Where ICMP lies in a frame from this source.
#[must_use]
pub(super) const fn icmp_at(source: IpAddr) -> usize {
    ETHERNET_LEN + ip_len(source)
}

/// An ICMP error about a packet of the guest's, of which `quote` is the beginning, from its IP
/// header on. Gives the frame's length; `None`: there is no such error, or none may be sent.
pub(super) fn error(
    frame: &mut [u8],
    ends: Ends,
    source: IpAddr,
    destination: IpAddr,
    why: Unreachable,
    quote: &[u8],
) -> Option<usize> {
    let is_v4 = source.is_ipv4();
    let (kind, code, rest) = match (why, is_v4) {
        (Unreachable::Network, true) => (3, 0, 0),
        (Unreachable::Host, true) => (3, 1, 0),
        (Unreachable::Port, true) => (3, 3, 0),
        (Unreachable::Prohibited, true) => (3, 13, 0),
        (Unreachable::TooBig(mtu), true) => (3, 4, mtu.min(0xffff)),
        (Unreachable::HopLimit, true) => (11, 0, 0),
        (Unreachable::HopLimit, false) => (3, 0, 0),
        (Unreachable::Told(kind, code, rest), _) => (kind, code, rest),
        (Unreachable::Network, false) => (1, 0, 0),
        (Unreachable::Prohibited, false) => (1, 1, 0),
        (Unreachable::Host, false) => (1, 3, 0),
        (Unreachable::Port, false) => (1, 4, 0),
        (Unreachable::TooBig(mtu), false) => (2, 0, mtu),
        (Unreachable::Reassembly, true) => (11, 1, 0),
        (Unreachable::Reassembly, false) => (3, 1, 0),
        (Unreachable::Parameter(_), true) => return None,
        (Unreachable::Parameter(at), false) => (4, 0, at),
    };
    if source.is_ipv4() != destination.is_ipv4() {
        return None;
    }
    let quote = quote
        .get(..if is_v4 { QUOTE_V4 } else { QUOTE_V6 })
        .unwrap_or(quote);
    let at = icmp_at(source);
    put(frame, at, &[kind, code, 0, 0]);
    put(frame, at + 4, &rest.to_be_bytes());
    put(frame, at + 8, quote);
    Some(icmp(frame, ends, source, destination, 8 + quote.len()))
}

/// Cuts a frame that is larger than the MTU into fragments (RFC 791, 3.2; RFC 8200, 4.5) and hands
/// them out.
pub(super) fn fragments(frame: &[u8], mtu: u16, identification: u32, mut send: impl FnMut(&[u8])) {
    let is_v4 = frame.get(12..14) == Some(&IPV4.to_be_bytes());
    let header_len = if is_v4 { 20 } else { 40 };
    let extra = if is_v4 { 0 } else { 8 };
    let Some((head, payload)) = frame.split_at_checked(ETHERNET_LEN + header_len) else {
        return;
    };
    let room = (usize::from(mtu) - header_len - extra) & !7;
    let protocol = if is_v4 {
        0
    } else {
        *head.get(ETHERNET_LEN + 6).unwrap_or(&0)
    };
    let mut piece = Vec::with_capacity(ETHERNET_LEN + usize::from(mtu));
    let mut offset = 0;
    for part in payload.chunks(room.max(8)) {
        let is_last = offset + part.len() == payload.len();
        piece.clear();
        piece.extend_from_slice(head);
        if is_v4 {
            let flags = (offset / 8) as u16 | if is_last { 0 } else { 0x2000 };
            put(
                &mut piece,
                16,
                &((header_len + part.len()) as u16).to_be_bytes(),
            );
            put(&mut piece, 18, &(identification as u16).to_be_bytes());
            put(&mut piece, 20, &flags.to_be_bytes());
            put(&mut piece, 24, &[0, 0]);
            let sum = Sum::default().bytes(piece.get(14..34).unwrap_or_default());
            put(&mut piece, 24, &sum.checksum().to_be_bytes());
        } else {
            put(&mut piece, 18, &((extra + part.len()) as u16).to_be_bytes());
            put(&mut piece, 20, &[44]);
            piece.extend_from_slice(&[protocol, 0]);
            let flags = offset as u16 | u16::from(!is_last);
            piece.extend_from_slice(&flags.to_be_bytes());
            piece.extend_from_slice(&identification.to_be_bytes());
        }
        piece.extend_from_slice(part);
        send(&piece);
        offset += part.len();
    }
}
