//! Packets of the guest's that came in fragments, put together again.
//!
//! A guest fragments a datagram that is larger than its MTU, or than a path that it was told of.
//! The card ends the guest's network, so it does what a destination does: RFC 791, 3.2 with RFC
//! 1122, 3.3.2 for IPv4, and RFC 8200, 4.5 with RFC 5722 for IPv6.
//!
//! - **Overlapping fragments** make the whole packet void, of either family, also fragments of it
//!   that are still to come. There is no good reason for them, and every way to choose among them
//!   has been an attack. An exact duplicate is dropped by itself.
//! - **Time**: [`TIMEOUT`] from the first that came. If the packet's beginning is there, the guest is
//!   told (time exceeded in reassembly).
//! - **Memory**: [`PACKETS_MAX`] packets at a time, each of at most 64 KiB and [`PIECES_MAX`] pieces:
//!   about 2 MB. When one more begins, the oldest is given up: a guest can only harm itself, and
//!   one that floods the card with beginnings keeps its own packets from being whole, not others'.
//!
//! Ports are looked at when the packet is whole, so no fragment passes policy by itself. The result
//! is a frame that is parsed like any other. Of IPv6, what is not TCP keeps a fragment header that
//! says that nothing is missing: it tells that the guest lets the packet be fragmented
//! ([`super::Packet::dont_fragment`]), as it has done itself.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::ops::Range;
use std::time::{Duration, Instant};

use super::sum::Sum;
use super::{ETHERNET_LEN, Frame, Net, TCP, Transport, half};

/// How long the parts of a packet are waited for (RFC 8200, 4.5; RFC 1122, 3.3.2).
pub const TIMEOUT: Duration = Duration::from_secs(60);
/// Packets in parts at a time.
pub const PACKETS_MAX: usize = 32;
/// Fragments of one packet: enough for the least MTU that anyone has.
pub const PIECES_MAX: usize = 256;

/// Bytes of a packet behind its fragmentable part's beginning, at most.
const LEN_MAX: usize = 65535;
/// Bytes of the first fragment that are kept to be quoted in an ICMP error.
const QUOTE: usize = 548;
const FRAGMENT_HEADER: usize = 8;

/// What became of a fragment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was the last that was missing: the frame, from its Ethernet header on.
    Whole(Box<[u8]>),
    /// It is kept, or it had come before.
    Kept,
    /// It contradicts another one, or there are too many of them: its packet is void.
    Void,
    /// It makes no sense. For IPv6, the place in the IP packet of the field that is wrong.
    Malformed(Option<u32>),
}

/// A packet that was given up because its time is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expired {
    /// From.
    pub source: IpAddr,
    /// To.
    pub destination: IpAddr,
    /// The beginning of its first fragment, if that had come: then the guest is to be told.
    pub quote: Option<Box<[u8]>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Key {
    source: IpAddr,
    destination: IpAddr,
    /// Of IPv4; 0 for IPv6.
    protocol: u8,
    identification: u32,
}

#[derive(Debug)]
struct Entry {
    key: Key,
    until: Instant,
    /// Nothing can become of it any more.
    is_void: bool,
    /// Ethernet and IP header of the first fragment, for IPv6 with the fragment header.
    head: Vec<u8>,
    quote: Vec<u8>,
    data: Vec<u8>,
    /// What of `data` has come, in order; no two overlap.
    pieces: Vec<Range<usize>>,
    /// How long `data` is to be, when the last fragment has come.
    len: Option<usize>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Reassembly {
    /// The oldest first.
    entries: VecDeque<Entry>,
    /// Packets given up for want of room.
    evicted: u64,
}

/// A fragment's own facts.
struct Piece {
    key: Key,
    place: Range<usize>,
    is_last: bool,
}

impl Reassembly {
    /// Packets of which fragments are kept.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Packets given up because newer ones needed their place, since the beginning.
    #[must_use]
    pub fn evicted(&self) -> u64 {
        self.evicted
    }

    /// Takes a frame whose transport is [`Transport::Fragment`].
    pub fn add(&mut self, frame: &Frame<'_>, now: Instant) -> Outcome {
        let piece = match piece(frame) {
            Ok(piece) => piece,
            Err(pointer) => return Outcome::Malformed(pointer),
        };
        let Piece { key, place, .. } = &piece;
        let found = self.entries.iter().position(|entry| entry.key == *key);
        let at = found.unwrap_or_else(|| {
            if self.entries.len() >= PACKETS_MAX {
                self.evicted += u64::from(!self.entries[0].is_void);
                self.entries.pop_front();
            }
            self.entries.push_back(Entry::new(*key, now + TIMEOUT));
            self.entries.len() - 1
        });
        let Some(entry) = self.entries.get_mut(at) else {
            return Outcome::Void;
        };
        if entry.is_void {
            return Outcome::Void;
        }
        if entry.pieces.contains(place) {
            return Outcome::Kept;
        }
        if !entry.take(&piece, frame) {
            entry.give_up();
            return Outcome::Void;
        }
        if !entry.is_whole() {
            return Outcome::Kept;
        }
        let entry = self.entries.remove(at);
        match entry.and_then(Entry::join) {
            Some(whole) => Outcome::Whole(whole.into()),
            None => Outcome::Malformed(None),
        }
    }

    /// Takes away a packet whose time is over, if there is one.
    pub fn expire(&mut self, now: Instant) -> Option<Expired> {
        if self.entries.front()?.until > now {
            return None;
        }
        let entry = self.entries.pop_front()?;
        Some(Expired {
            source: entry.key.source,
            destination: entry.key.destination,
            quote: (!entry.quote.is_empty()).then(|| entry.quote.into()),
        })
    }

    /// When [`Self::expire`] is to be called.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.entries.front().map(|entry| entry.until)
    }
}

/// Reads a fragment's place. The error is [`Outcome::Malformed`]'s.
fn piece(frame: &Frame<'_>) -> Result<Piece, Option<u32>> {
    let Net::Ip(packet) = &frame.net else {
        return Err(None);
    };
    if packet.transport != Transport::Fragment {
        return Err(None);
    }
    let bytes = frame.bytes;
    let is_v4 = packet.source.is_ipv4();
    let header = packet.transport_start.saturating_sub(FRAGMENT_HEADER);
    let (offset, has_more, identification) = if is_v4 {
        let field = half(bytes, ETHERNET_LEN + 6).map_err(|_| None)?;
        let id = half(bytes, ETHERNET_LEN + 4).map_err(|_| None)?;
        let offset = usize::from(field & 0x1fff) * 8;
        (offset, field & 0x2000 != 0, u32::from(id))
    } else {
        let field = half(bytes, header + 2).map_err(|_| None)?;
        let id = super::chunk(bytes, header + 4).map_err(|_| None)?;
        let offset = usize::from(field & !7);
        (offset, field & 1 != 0, u32::from_be_bytes(id))
    };
    let len = packet.end.saturating_sub(packet.transport_start);
    let pointer = |at: usize| (!is_v4).then_some(at as u32);
    if len == 0 || has_more && len % 8 != 0 {
        // The payload length (RFC 8200, 4.5).
        return Err(pointer(4));
    }
    let head = packet.transport_start - ETHERNET_LEN - if is_v4 { 0 } else { 40 };
    if head + offset + len > LEN_MAX {
        // The fragment's offset.
        return Err(pointer(header.saturating_sub(ETHERNET_LEN) + 2));
    }
    Ok(Piece {
        key: Key {
            source: packet.source,
            destination: packet.destination,
            protocol: if is_v4 { packet.protocol } else { 0 },
            identification,
        },
        place: offset..offset + len,
        is_last: !has_more,
    })
}

impl Entry {
    fn new(key: Key, until: Instant) -> Self {
        Self {
            key,
            until,
            is_void: false,
            head: Vec::new(),
            quote: Vec::new(),
            data: Vec::new(),
            pieces: Vec::new(),
            len: None,
        }
    }

    /// Keeps a fragment. False: it does not fit those that are there.
    fn take(&mut self, piece: &Piece, frame: &Frame<'_>) -> bool {
        let place = &piece.place;
        let at = self
            .pieces
            .partition_point(|other| other.start < place.start);
        let before = at.checked_sub(1).and_then(|at| self.pieces.get(at));
        let overlaps = before.is_some_and(|before| before.end > place.start)
            || self
                .pieces
                .get(at)
                .is_some_and(|next| next.start < place.end);
        let last = self.pieces.last().map_or(0, |last| last.end);
        let contradicts = match (piece.is_last, self.len) {
            (true, Some(_)) => true,
            (true, None) => last > place.end,
            (false, Some(len)) => place.end > len,
            (false, None) => false,
        };
        if overlaps || contradicts || self.pieces.len() >= PIECES_MAX {
            return false;
        }
        if self.data.len() < place.end {
            self.data.resize(place.end, 0);
        }
        let bytes = frame.transport_bytes();
        if let Some(target) = self.data.get_mut(place.clone())
            && target.len() == bytes.len()
        {
            target.copy_from_slice(bytes);
        }
        self.pieces.insert(at, place.clone());
        if piece.is_last {
            self.len = Some(place.end);
        }
        if place.start == 0
            && let Net::Ip(packet) = &frame.net
        {
            let head = frame.bytes.get(..packet.transport_start);
            self.head = head.unwrap_or_default().to_vec();
            let ip = frame.ip_bytes();
            self.quote = ip.get(..QUOTE).unwrap_or(ip).to_vec();
        }
        true
    }

    /// Remembers only that it is void.
    fn give_up(&mut self) {
        *self = Self {
            is_void: true,
            ..Self::new(self.key, self.until)
        };
    }

    /// Whether the pieces, of which no two overlap, are all there are to be.
    fn is_whole(&self) -> bool {
        let len: usize = self.pieces.iter().map(ExactSizeIterator::len).sum();
        self.len == Some(len)
    }

    /// The frame.
    fn join(self) -> Option<Vec<u8>> {
        let mut frame = self.head;
        let at = ETHERNET_LEN;
        if self.key.source.is_ipv4() {
            let header_len = frame.len().checked_sub(at)?;
            let total = u16::try_from(header_len + self.data.len()).ok()?;
            frame
                .get_mut(at + 2..at + 4)?
                .copy_from_slice(&total.to_be_bytes());
            frame.get_mut(at + 6..at + 8)?.fill(0);
            frame.get_mut(at + 10..at + 12)?.fill(0);
            let sum = Sum::default().bytes(frame.get(at..)?).checksum();
            frame
                .get_mut(at + 10..at + 12)?
                .copy_from_slice(&sum.to_be_bytes());
        } else {
            let header = frame.len().checked_sub(FRAGMENT_HEADER)?;
            let protocol = *frame.get(header)?;
            if protocol == TCP && header == at + 40 {
                // Nothing but the stack's TCP looks at it.
                frame.truncate(header);
                *frame.get_mut(at + 6)? = TCP;
            } else {
                frame.get_mut(header + 2..header + 4)?.fill(0);
            }
            let len = u16::try_from(frame.len() - at - 40 + self.data.len()).ok()?;
            frame
                .get_mut(at + 4..at + 6)?
                .copy_from_slice(&len.to_be_bytes());
        }
        frame.extend_from_slice(&self.data);
        Some(frame)
    }
}

#[cfg(test)]
mod tests;
