//! What a guest's card does to a peer's frame that its own guest does not take as it is: completes
//! the checksum, cuts a super-segment, or a packet that is too long and may be cut.
//!
//! Done by the receiver, since it alone knows what its guest accepted, and since then a frame between
//! two guests that both take super-segments is copied and never touched. Cutting follows what TCP
//! itself would have sent (virtio 1.3, 5.1.6.2; Linux `tcp_gso_segment`): sequence numbers and IPv4
//! identifications go on, FIN and PSH are the last one's, CWR the first one's.

use std::net::IpAddr;

use super::fragment;
use crate::frame::header::{GSO_TCPV4, GSO_TCPV6, NEEDS_CSUM, NetHeader};
use crate::frame::sum::Sum;
use crate::frame::{FRAME_MAX, Frame, Net, Packet, TCP, Transport, UDP};

/// Most pieces of one super-segment: 64 KiB in segments of 536 bytes, the smallest that TCP has to
/// make (RFC 9293, 3.7.1), have 122.
pub const PIECES_MAX: usize = 128;

const FIN: u8 = 1;
const PSH: u8 = 8;
const CWR: u8 = 0x80;

/// What a guest takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Takes {
    /// Partial checksums (GUEST_CSUM).
    pub partial: bool,
    /// TCP super-segments over IPv4 (GUEST_TSO4).
    pub tso4: bool,
    /// TCP super-segments over IPv6 (GUEST_TSO6).
    pub tso6: bool,
}

/// Why a frame cannot be given to a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// More than [`PIECES_MAX`] pieces.
    #[error("the super-segment has too many pieces")]
    Pieces,
    /// A packet is longer than the guest's MTU.
    #[error("the packet is longer than the receiver's MTU")]
    TooBig,
    /// Not what [`Frame::parse`] lets through.
    #[error("the frame is no IP packet")]
    Shape,
}

/// Gives a frame to a guest in a form that it takes; `scratch` is memory for that, kept from frame to
/// frame.
///
/// # Errors
/// See [`Unfit`]; nothing was sent.
pub fn deliver(
    frame: &Frame<'_>,
    takes: Takes,
    mtu: u16,
    scratch: &mut Vec<u8>,
    mut send: impl FnMut(NetHeader, &[u8]),
) -> Result<(), Unfit> {
    let Net::Ip(packet) = &frame.net else {
        return Err(Unfit::Shape);
    };
    let bytes = frame.bytes.get(..packet.end).ok_or(Unfit::Shape)?;
    if let (Some(size), Transport::Tcp { payload, .. }) = (frame.gso_size, packet.transport)
        && packet.end.saturating_sub(payload) > usize::from(size)
    {
        let one = payload.saturating_sub(packet.start) + usize::from(size);
        if one > usize::from(mtu) {
            return Err(Unfit::TooBig);
        }
        let (takes_whole, gso_type) = match packet.source {
            IpAddr::V4(_) => (takes.tso4, GSO_TCPV4),
            IpAddr::V6(_) => (takes.tso6, GSO_TCPV6),
        };
        if takes_whole && takes.partial {
            let header = NetHeader {
                gso_type,
                gso_size: size,
                hdr_len: to_u16(payload),
                ..partial(packet)
            };
            send(header, bytes);
            return Ok(());
        }
        return cut(bytes, packet, payload, size, takes.partial, scratch, send);
    }
    if packet.end - packet.start > usize::from(mtu) {
        if packet.dont_fragment {
            return Err(Unfit::TooBig);
        }
        let send = |piece: &[u8]| send(NetHeader::default(), piece);
        if !frame.is_partial {
            return fragment::cut(bytes, packet, mtu, scratch, send);
        }
        let mut whole = bytes.to_vec();
        sum_up(&mut whole, packet);
        return fragment::cut(&whole, packet, mtu, scratch, send);
    }
    if !frame.is_partial {
        send(NetHeader::default(), bytes);
    } else if takes.partial {
        send(partial(packet), bytes);
    } else {
        scratch.clear();
        scratch.extend_from_slice(bytes);
        sum_up(scratch, packet);
        send(NetHeader::default(), scratch);
    }
    Ok(())
}

fn to_u16(n: usize) -> u16 {
    u16::try_from(n).unwrap_or(u16::MAX)
}

/// Where the checksum is in the transport header.
fn sum_at(packet: &Packet) -> usize {
    match packet.protocol {
        TCP => 16,
        UDP => 6,
        _ => 2,
    }
}

/// The header of a packet whose checksum is the driver's.
fn partial(packet: &Packet) -> NetHeader {
    let at = packet.transport_start;
    NetHeader {
        flags: NEEDS_CSUM,
        hdr_len: to_u16(at + sum_at(packet) + 2),
        csum_start: to_u16(at),
        csum_offset: to_u16(sum_at(packet)),
        ..NetHeader::default()
    }
}

fn put(bytes: &mut [u8], at: usize, half: u16) {
    let place = bytes.get_mut(at..).and_then(<[u8]>::first_chunk_mut);
    if let Some(place) = place {
        *place = half.to_be_bytes();
    }
}

/// Writes the whole transport checksum of a packet that ends where `bytes` do.
fn sum_up(bytes: &mut [u8], packet: &Packet) {
    let at = packet.transport_start;
    put(bytes, at + sum_at(packet), 0);
    let body = bytes.get(at..).unwrap_or_default();
    // ICMP for IPv4 alone has no pseudo header.
    let sum = match (packet.protocol, packet.source) {
        (TCP | UDP, _) | (_, IpAddr::V6(_)) => pseudo(packet, body.len()),
        _ => Sum::default(),
    };
    let sum = match (packet.protocol, sum.bytes(body).checksum()) {
        // 0 says that there is none (RFC 768).
        (UDP, 0) => 0xffff,
        (_, sum) => sum,
    };
    put(bytes, at + sum_at(packet), sum);
}

fn pseudo(packet: &Packet, len: usize) -> Sum {
    let len = u32::try_from(len).unwrap_or(u32::MAX);
    Sum::pseudo(packet.source, packet.destination, packet.protocol, len)
}

fn cut(
    bytes: &[u8],
    packet: &Packet,
    payload: usize,
    size: u16,
    takes_partial: bool,
    scratch: &mut Vec<u8>,
    mut send: impl FnMut(NetHeader, &[u8]),
) -> Result<(), Unfit> {
    let (headers, data) = bytes.split_at_checked(payload).ok_or(Unfit::Shape)?;
    let at = packet.transport_start;
    let half = |at: usize| {
        let half: Option<&[u8; 2]> = headers.get(at..).and_then(<[u8]>::first_chunk);
        half.map_or(0, |half| u16::from_be_bytes(*half))
    };
    let first: Option<&[u8; 4]> = headers.get(at + 4..).and_then(<[u8]>::first_chunk);
    let mut sequence = u32::from_be_bytes(*first.ok_or(Unfit::Shape)?);
    let mut identification = half(packet.start + 4);
    let flags = *headers.get(at + 13).ok_or(Unfit::Shape)?;
    let size = usize::from(size.max(1));
    if data.len().div_ceil(size) > PIECES_MAX {
        return Err(Unfit::Pieces);
    }
    let mut pieces = data.chunks(size).peekable();
    let mut is_first = true;
    while let Some(piece) = pieces.next() {
        scratch.clear();
        scratch.reserve(FRAME_MAX);
        scratch.extend_from_slice(headers);
        scratch.extend_from_slice(piece);
        let total = scratch.len() - packet.start;
        match packet.source {
            IpAddr::V4(_) => {
                put(scratch, packet.start + 2, to_u16(total));
                put(scratch, packet.start + 4, identification);
                put(scratch, packet.start + 10, 0);
                let header = scratch.get(packet.start..at).unwrap_or_default();
                let sum = Sum::default().bytes(header).checksum();
                put(scratch, packet.start + 10, sum);
            }
            IpAddr::V6(_) => put(scratch, packet.start + 4, to_u16(total - 40)),
        }
        if let Some(place) = scratch.get_mut(at + 4..).and_then(<[u8]>::first_chunk_mut) {
            *place = sequence.to_be_bytes();
        }
        let mut own = flags;
        if pieces.peek().is_some() {
            own &= !(FIN | PSH);
        }
        if !is_first {
            own &= !CWR;
        }
        if let Some(place) = scratch.get_mut(at + 13) {
            *place = own;
        }
        if takes_partial {
            let sum = pseudo(packet, scratch.len() - at).partial();
            put(scratch, at + 16, sum);
            send(partial(packet), scratch);
        } else {
            sum_up(scratch, packet);
            send(NetHeader::default(), scratch);
        }
        sequence = sequence.wrapping_add(u32::try_from(piece.len()).unwrap_or(0));
        identification = identification.wrapping_add(1);
        is_first = false;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
