//! A frame of the guest's, checked once.
//!
//! [`Frame::parse`] takes the bytes behind the virtio-net header and that header, and either says
//! what is wrong ([`Malformed`], which is counted) or gives a view in which every length has been
//! checked against the bytes that are there, every checksum that should be right is, and the
//! offload metadata fits the packet. Nobody below looks at lengths again.
//!
//! What a driver may leave to the device (virtio 1.3, 5.1.6.2): a partial checksum (CSUM) and a TCP
//! super-segment of up to 64 KiB (HOST_TSO4, HOST_TSO6). Both end here as [`Frame::gso_size`] and
//! [`Frame::is_partial`]; the stack takes super-segments as they are, since it terminates TCP.
//!
//! Fragments have no transport header to look at, but for the first: their [`Packet::transport`] is
//! [`Transport::Fragment`] until [`reassembly`] has put them together.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use smoltcp::wire::EthernetAddress;

pub mod header;
pub mod reassembly;
pub mod sum;

use header::{GSO_ECN, GSO_NONE, GSO_TCPV4, GSO_TCPV6, NEEDS_CSUM, NetHeader};
use sum::Sum;

#[cfg(test)]
mod tests;

/// Bytes of an Ethernet header.
pub const ETHERNET_LEN: usize = 14;
/// Largest frame: a super-segment.
pub const FRAME_MAX: usize = ETHERNET_LEN + 65535 + 40;

/// EtherType of IPv4.
pub const IPV4: u16 = 0x0800;
/// EtherType of ARP.
pub const ARP: u16 = 0x0806;
/// EtherType of IPv6.
pub const IPV6: u16 = 0x86dd;

/// IP protocol number of TCP.
pub const TCP: u8 = 6;
/// IP protocol number of UDP.
pub const UDP: u8 = 17;
/// IP protocol number of ICMP.
pub const ICMP: u8 = 1;
/// IP protocol number of ICMPv6.
pub const ICMPV6: u8 = 58;

const IPV6_HOP_BY_HOP: u8 = 0;
const IPV6_ROUTING: u8 = 43;
const IPV6_FRAGMENT: u8 = 44;
const IPV6_DESTINATION: u8 = 60;
/// Extension headers walked; more are refused.
const IPV6_EXTENSIONS_MAX: usize = 8;

/// What is wrong with a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Shorter than its headers say.
    #[error("the frame is cut off")]
    Truncated,
    /// A field of the IP header contradicts another or the standard.
    #[error("the IP header makes no sense")]
    Ip,
    /// The IPv4 header's checksum is wrong.
    #[error("the IP header's checksum is wrong")]
    IpChecksum,
    /// A field of the transport header contradicts another.
    #[error("the transport header makes no sense")]
    Transport,
    /// The transport checksum is wrong.
    #[error("the transport checksum is wrong")]
    Checksum,
    /// The virtio-net header does not fit the packet.
    #[error("the offload metadata does not fit the packet")]
    Offload,
}

impl Malformed {
    /// All kinds, in the order in which they are shown.
    pub const ALL: [Self; 6] = [
        Self::Truncated,
        Self::Ip,
        Self::IpChecksum,
        Self::Transport,
        Self::Checksum,
        Self::Offload,
    ];

    /// The value of the label `kind` in metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Truncated => "truncated",
            Self::Ip => "ip",
            Self::IpChecksum => "ip_checksum",
            Self::Transport => "transport",
            Self::Checksum => "checksum",
            Self::Offload => "offload",
        }
    }
}

/// A sound frame.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    /// All of it, from the Ethernet header on.
    pub bytes: &'a [u8],
    /// From.
    pub source: EthernetAddress,
    /// To.
    pub destination: EthernetAddress,
    /// What it carries.
    pub net: Net,
    /// Payload bytes of a segment, if it is a super-segment.
    pub gso_size: Option<u16>,
    /// The transport checksum is the pseudo header's only.
    pub is_partial: bool,
}

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Net {
    /// ARP; not looked into.
    Arp,
    /// IP.
    Ip(Packet),
    /// Something else: its EtherType, or its length if below 1536.
    Other(u16),
}

/// An IP packet: where its parts are, from the frame's first byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// From.
    pub source: IpAddr,
    /// To.
    pub destination: IpAddr,
    /// Of the payload, behind extension headers.
    pub protocol: u8,
    /// Hop limit or time to live.
    pub hop_limit: u8,
    /// IPv4's don't-fragment bit; IPv6 has it unless there is a fragment header.
    pub dont_fragment: bool,
    /// Where the IP header starts.
    pub start: usize,
    /// Where the transport header starts.
    pub transport_start: usize,
    /// Where the packet ends; padding may follow.
    pub end: usize,
    /// The transport header.
    pub transport: Transport,
}

/// A transport header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    Tcp {
        /// Source port.
        source: u16,
        /// Destination port.
        destination: u16,
        /// FIN 1, SYN 2, RST 4, PSH 8, ACK 16, URG 32.
        flags: u8,
        /// Where the payload starts, from the frame's first byte.
        payload: usize,
    },
    /// UDP; the payload is 8 bytes behind the header's start.
    Udp {
        /// Source port.
        source: u16,
        /// Destination port.
        destination: u16,
    },
    /// ICMP or ICMPv6.
    Icmp {
        /// Type.
        kind: u8,
        /// Code.
        code: u8,
        /// Of echo requests and replies.
        identifier: u16,
    },
    /// A part of a packet.
    Fragment,
    /// Another protocol.
    Other,
}

impl Packet {
    /// The ports, as [`crate::local::FlowKey`] wants them. `None`: a fragment or another protocol.
    #[must_use]
    pub fn ports(&self) -> Option<(u16, u16)> {
        match self.transport {
            Transport::Tcp {
                source,
                destination,
                ..
            }
            | Transport::Udp {
                source,
                destination,
            } => Some((source, destination)),
            Transport::Icmp { identifier, .. } => Some((identifier, identifier)),
            Transport::Fragment | Transport::Other => None,
        }
    }
}

fn half(bytes: &[u8], at: usize) -> Result<u16, Malformed> {
    let bytes = bytes.get(at..).and_then(<[u8]>::first_chunk);
    bytes
        .copied()
        .map(u16::from_be_bytes)
        .ok_or(Malformed::Truncated)
}

fn byte(bytes: &[u8], at: usize) -> Result<u8, Malformed> {
    bytes.get(at).copied().ok_or(Malformed::Truncated)
}

fn chunk<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], Malformed> {
    let chunk = bytes.get(at..).and_then(<[u8]>::first_chunk);
    chunk.copied().ok_or(Malformed::Truncated)
}

/// What the IP header says.
struct Ip {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    hop_limit: u8,
    dont_fragment: bool,
    is_fragment: bool,
    transport_start: usize,
    end: usize,
}

fn ipv4(bytes: &[u8]) -> Result<Ip, Malformed> {
    let at = ETHERNET_LEN;
    let first = byte(bytes, at)?;
    let header_len = usize::from(first & 15) * 4;
    let total = usize::from(half(bytes, at + 2)?);
    if first >> 4 != 4 || header_len < 20 || total < header_len {
        return Err(Malformed::Ip);
    }
    let end = at + total;
    let header = bytes.get(at..at + header_len).ok_or(Malformed::Truncated)?;
    if end > bytes.len() {
        return Err(Malformed::Truncated);
    }
    if Sum::default().bytes(header).checksum() != 0 {
        return Err(Malformed::IpChecksum);
    }
    let fragment = half(bytes, at + 6)?;
    Ok(Ip {
        source: Ipv4Addr::from(chunk::<4>(bytes, at + 12)?).into(),
        destination: Ipv4Addr::from(chunk::<4>(bytes, at + 16)?).into(),
        protocol: byte(bytes, at + 9)?,
        hop_limit: byte(bytes, at + 8)?,
        dont_fragment: fragment & 0x4000 != 0,
        is_fragment: fragment & 0x3fff != 0,
        transport_start: at + header_len,
        end,
    })
}

fn ipv6(bytes: &[u8]) -> Result<Ip, Malformed> {
    let at = ETHERNET_LEN;
    if byte(bytes, at)? >> 4 != 6 {
        return Err(Malformed::Ip);
    }
    let end = at + 40 + usize::from(half(bytes, at + 4)?);
    let mut protocol = byte(bytes, at + 6)?;
    let hop_limit = byte(bytes, at + 7)?;
    let source = Ipv6Addr::from(chunk::<16>(bytes, at + 8)?);
    let destination = Ipv6Addr::from(chunk::<16>(bytes, at + 24)?);
    let bytes = bytes.get(..end).ok_or(Malformed::Truncated)?;
    let mut next = at + 40;
    let (mut is_fragment, mut dont_fragment) = (false, true);
    for _ in 0..IPV6_EXTENSIONS_MAX {
        match protocol {
            IPV6_HOP_BY_HOP | IPV6_ROUTING | IPV6_DESTINATION => {
                protocol = byte(bytes, next)?;
                next += (usize::from(byte(bytes, next + 1)?) + 1) * 8;
            }
            IPV6_FRAGMENT => {
                protocol = byte(bytes, next)?;
                is_fragment = half(bytes, next + 2)? & 0xfff9 != 0;
                dont_fragment = false;
                next += 8;
                if is_fragment {
                    break;
                }
            }
            _ => break,
        }
    }
    if next > end {
        return Err(Malformed::Truncated);
    }
    Ok(Ip {
        source: source.into(),
        destination: destination.into(),
        protocol,
        hop_limit,
        dont_fragment,
        is_fragment,
        transport_start: next,
        end,
    })
}

impl<'a> Frame<'a> {
    /// Checks a frame: `bytes` are what follows the virtio-net header.
    ///
    /// # Errors
    /// See [`Malformed`].
    pub fn parse(bytes: &'a [u8], header: &NetHeader) -> Result<Self, Malformed> {
        let destination = EthernetAddress(chunk(bytes, 0)?);
        let source = EthernetAddress(chunk(bytes, 6)?);
        let is_partial = header.flags & NEEDS_CSUM != 0;
        let (net, gso_size) = match half(bytes, 12)? {
            IPV4 => Self::ip(bytes, ipv4(bytes)?, header)?,
            IPV6 => Self::ip(bytes, ipv6(bytes)?, header)?,
            other if header.gso_type != GSO_NONE || is_partial => {
                let _ = other;
                return Err(Malformed::Offload);
            }
            ARP => (Net::Arp, None),
            other => (Net::Other(other), None),
        };
        Ok(Self {
            bytes,
            source,
            destination,
            net,
            gso_size,
            is_partial,
        })
    }

    fn ip(bytes: &[u8], ip: Ip, header: &NetHeader) -> Result<(Net, Option<u16>), Malformed> {
        let is_partial = header.flags & NEEDS_CSUM != 0;
        let at = ip.transport_start;
        let body = bytes.get(at..ip.end).ok_or(Malformed::Truncated)?;
        let (transport, sum_at) = if ip.is_fragment {
            (Transport::Fragment, None)
        } else {
            transport(&ip, body)?
        };
        let gso_size = match (header.gso_type & !GSO_ECN, &transport, ip.source) {
            (GSO_NONE, ..) => None,
            (GSO_TCPV4, Transport::Tcp { .. }, IpAddr::V4(_))
            | (GSO_TCPV6, Transport::Tcp { .. }, IpAddr::V6(_))
                if header.gso_size > 0 && is_partial =>
            {
                Some(header.gso_size)
            }
            _ => return Err(Malformed::Offload),
        };
        match sum_at {
            _ if is_partial => {
                // Elsewhere than the protocol has it would be a way to write into any packet.
                let place = (
                    usize::from(header.csum_start),
                    usize::from(header.csum_offset),
                );
                if sum_at.is_none_or(|sum_at| place != (at, sum_at)) {
                    return Err(Malformed::Offload);
                }
            }
            Some(sum_at) if !is_right(&ip, &transport, body, sum_at) => {
                return Err(Malformed::Checksum);
            }
            _ => {}
        }
        let packet = Packet {
            source: ip.source,
            destination: ip.destination,
            protocol: ip.protocol,
            hop_limit: ip.hop_limit,
            dont_fragment: ip.dont_fragment,
            start: ETHERNET_LEN,
            transport_start: at,
            end: ip.end,
            transport,
        };
        Ok((Net::Ip(packet), gso_size))
    }

    /// The IP packet's bytes without padding; empty for other frames.
    #[must_use]
    pub fn ip_bytes(&self) -> &'a [u8] {
        match &self.net {
            Net::Ip(packet) => self.bytes.get(packet.start..packet.end).unwrap_or_default(),
            _ => &[],
        }
    }

    /// The bytes from the transport header on; empty for other frames.
    #[must_use]
    pub fn transport_bytes(&self) -> &'a [u8] {
        match &self.net {
            Net::Ip(packet) => {
                let range = packet.transport_start..packet.end;
                self.bytes.get(range).unwrap_or_default()
            }
            _ => &[],
        }
    }

    /// Packets as they would be on a wire.
    #[must_use]
    pub fn packet_count(&self) -> u32 {
        match (&self.net, self.gso_size) {
            (
                Net::Ip(Packet {
                    transport: Transport::Tcp { payload, .. },
                    end,
                    ..
                }),
                Some(size),
            ) => (end.saturating_sub(*payload))
                .div_ceil(usize::from(size).max(1))
                .max(1) as u32,
            _ => 1,
        }
    }
}

/// The transport header, and where in it the checksum is.
fn transport(ip: &Ip, body: &[u8]) -> Result<(Transport, Option<usize>), Malformed> {
    let (transport, sum_at) = match (ip.protocol, ip.source) {
        (TCP, _) => {
            let header_len = usize::from(byte(body, 12)? >> 4) * 4;
            if header_len < 20 {
                return Err(Malformed::Transport);
            }
            if header_len > body.len() || body.len() < 20 {
                return Err(Malformed::Truncated);
            }
            let tcp = Transport::Tcp {
                source: half(body, 0)?,
                destination: half(body, 2)?,
                flags: byte(body, 13)?,
                payload: ip.transport_start + header_len,
            };
            (tcp, 16)
        }
        (UDP, _) => {
            let len = usize::from(half(body, 4)?);
            if len < 8 || len != body.len() {
                return Err(Malformed::Transport);
            }
            let udp = Transport::Udp {
                source: half(body, 0)?,
                destination: half(body, 2)?,
            };
            (udp, 6)
        }
        (ICMP, IpAddr::V4(_)) | (ICMPV6, IpAddr::V6(_)) => {
            if body.len() < 8 {
                return Err(Malformed::Truncated);
            }
            let icmp = Transport::Icmp {
                kind: byte(body, 0)?,
                code: byte(body, 1)?,
                identifier: half(body, 4)?,
            };
            (icmp, 2)
        }
        _ => return Ok((Transport::Other, None)),
    };
    Ok((transport, Some(sum_at)))
}

fn is_right(ip: &Ip, transport: &Transport, body: &[u8], sum_at: usize) -> bool {
    let sum = match (transport, ip.source) {
        // No checksum, which IPv4 alone allows (RFC 768; RFC 8200, 8.1).
        (Transport::Udp { .. }, IpAddr::V4(_)) if half(body, sum_at) == Ok(0) => return true,
        (Transport::Icmp { .. }, IpAddr::V4(_)) => Sum::default(),
        _ => Sum::pseudo(ip.source, ip.destination, ip.protocol, body.len() as u32),
    };
    sum.bytes(body).checksum() == 0
}
