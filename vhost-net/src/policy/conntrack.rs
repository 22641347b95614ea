//! Connection tracking: which flows have been let through, so that their packets need no rule.
//!
//! A table of flows, keyed by protocol, the guest's end and the peer's end; one entry for both
//! directions, which remembers who began. A packet costs one look-up and, at most once a second and
//! flow, one move in a list, whatever the number of flows and rules.
//!
//! # Time
//!
//! A flow's state decides how long it may be silent ([`Timeouts`]). All flows of one class have the
//! same timeout, so each class is a list ordered by the last packet: the oldest is at its head, and
//! expiry takes heads until one is young enough. Nothing is ever searched. Time counts in whole
//! seconds, so that busy flows are not moved for each packet; a flow may live one second longer.
//! Rejected: a heap (a logarithm per packet), a wheel (a sweep per second on an idle card).
//!
//! # TCP
//!
//! ```text
//!  SYN ─► SynSent ─SYN back─► SynReceived ─ACK─► Established ─FIN─► HalfClosed ─FIN back─► Closed
//!                                                     any state ─RST─► Closed
//! ```
//!
//! A SYN on a closed flow is a new flow, which the rules see. Sequence numbers are not followed:
//! the stack behind this table terminates TCP and checks them. A forged RST therefore only
//! shortens the timeout while the true ends keep sending and refresh it. A flow that is picked up
//! in the middle, as after a restart of the card, is `Loose` until both ends have spoken.
//!
//! # Bounds
//!
//! The table holds a fixed number of flows and about 150 bytes each; it grows to that on demand.
//! When it is full, new flows are refused and counted, and nothing that is tracked suffers:
//! evicting (as Linux does for unanswered flows) would let a guest's scan cut its own flows, and
//! a VPC refuses too. Half-open and closed flows have short timeouts, so a scan's leftovers are
//! soon gone.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::local::{Direction, FlowKey, Meta};

/// TCP flags that matter here.
pub(crate) const FIN: u8 = 1;
pub(crate) const SYN: u8 = 2;
pub(crate) const RST: u8 = 4;
pub(crate) const ACK: u8 = 16;

/// How long a flow may be silent before it is forgotten, in seconds. What AWS documents is its
/// default: 432000 for established TCP, 180 and 30 for UDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct Timeouts {
    /// TCP before the handshake is complete, or picked up in the middle.
    pub tcp_opening: u32,
    /// TCP with a complete handshake.
    pub tcp_established: u32,
    /// TCP of which one end has closed.
    pub tcp_half_closed: u32,
    /// TCP of which both ends have closed, or one has reset.
    pub tcp_closed: u32,
    /// UDP in one direction, or with a single question and answer.
    pub udp: u32,
    /// UDP with more than one question and answer.
    pub udp_stream: u32,
    /// ICMP queries.
    pub icmp: u32,
    /// Other protocols.
    pub other: u32,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            tcp_opening: 30,
            tcp_established: 432_000,
            tcp_half_closed: 120,
            tcp_closed: 10,
            udp: 30,
            udp_stream: 180,
            icmp: 30,
            other: 600,
        }
    }
}

impl Timeouts {
    /// The names of all of them.
    pub const KINDS: [&str; 8] = [
        "tcp-opening",
        "tcp-established",
        "tcp-half-closed",
        "tcp-closed",
        "udp",
        "udp-stream",
        "icmp",
        "other",
    ];

    /// One of them by its name.
    pub fn of(&mut self, kind: &str) -> Option<&mut u32> {
        Some(match kind {
            "tcp-opening" => &mut self.tcp_opening,
            "tcp-established" => &mut self.tcp_established,
            "tcp-half-closed" => &mut self.tcp_half_closed,
            "tcp-closed" => &mut self.tcp_closed,
            "udp" => &mut self.udp,
            "udp-stream" => &mut self.udp_stream,
            "icmp" => &mut self.icmp,
            "other" => &mut self.other,
            _ => return None,
        })
    }
}

/// The table cannot take another flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableFull;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    SynSent,
    SynReceived,
    Loose,
    Established,
    /// Who has closed.
    HalfClosed(Direction),
    Closed,
    /// UDP: asked, answered, asked again, answered again.
    Asked,
    Answered,
    AskedAgain,
    Stream,
    Icmp,
    Other,
}

/// Flows with the same timeout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Opening,
    Established,
    HalfClosed,
    Closed,
    Udp,
    UdpStream,
    Icmp,
    Other,
}

const CLASSES: usize = 8;

impl State {
    fn class(self) -> Class {
        match self {
            Self::SynSent | Self::SynReceived | Self::Loose => Class::Opening,
            Self::Established => Class::Established,
            Self::HalfClosed(_) => Class::HalfClosed,
            Self::Closed => Class::Closed,
            Self::Asked | Self::Answered | Self::AskedAgain => Class::Udp,
            Self::Stream => Class::UdpStream,
            Self::Icmp => Class::Icmp,
            Self::Other => Class::Other,
        }
    }

    /// What a new flow begins as.
    fn first(meta: &Meta) -> Self {
        match meta.key.protocol {
            6 if meta.tcp_flags & RST != 0 => Self::Closed,
            6 if meta.tcp_flags & (SYN | ACK) == SYN => Self::SynSent,
            6 => Self::Loose,
            17 => Self::Asked,
            1 | 58 => Self::Icmp,
            _ => Self::Other,
        }
    }

    /// What it becomes with a packet; `None` when the packet begins a new flow instead.
    fn next(self, direction: Direction, origin: Direction, flags: u8) -> Option<Self> {
        let back = direction != origin;
        Some(match self {
            Self::Closed if flags & (SYN | ACK) == SYN => return None,
            Self::Closed => Self::Closed,
            Self::SynSent | Self::SynReceived | Self::Loose | Self::Established
                if flags & RST != 0 =>
            {
                Self::Closed
            }
            Self::SynSent if back && flags & SYN != 0 => Self::SynReceived,
            Self::SynReceived if !back && flags & (SYN | ACK) == ACK => {
                Self::Established.closing(direction, flags)
            }
            Self::Loose if back && flags & (SYN | ACK) == ACK => {
                Self::Established.closing(direction, flags)
            }
            Self::Established => self.closing(direction, flags),
            Self::HalfClosed(_) if flags & RST != 0 => Self::Closed,
            Self::HalfClosed(closed) if closed != direction && flags & FIN != 0 => Self::Closed,
            Self::Asked if back => Self::Answered,
            Self::Answered if !back => Self::AskedAgain,
            Self::AskedAgain if back => Self::Stream,
            same => same,
        })
    }

    fn closing(self, direction: Direction, flags: u8) -> Self {
        if flags & FIN != 0 {
            Self::HalfClosed(direction)
        } else {
            self
        }
    }
}

/// [`FlowKey`] without the holes: IPv4 addresses as IPv6 has them mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    guest: u128,
    peer: u128,
    ports: u32,
    protocol: u8,
}

impl Key {
    fn new(key: &FlowKey) -> Self {
        let bits = |address: IpAddr| match address {
            IpAddr::V4(address) => address.to_ipv6_mapped().to_bits(),
            IpAddr::V6(address) => address.to_bits(),
        };
        Self {
            guest: bits(key.guest.ip()),
            peer: bits(key.peer.ip()),
            ports: u32::from(key.guest.port()) << 16 | u32::from(key.peer.port()),
            protocol: key.protocol,
        }
    }
}

/// No entry: the end of a list.
const NONE: u32 = u32::MAX;

#[derive(Clone, Debug)]
struct Entry {
    key: Key,
    /// When the last packet came, in seconds since the table began.
    seen: u32,
    older: u32,
    younger: u32,
    state: State,
    origin: Direction,
}

#[derive(Clone, Copy, Debug)]
struct List {
    oldest: u32,
    youngest: u32,
}

/// The table.
#[derive(Debug)]
pub struct Conntrack {
    start: Instant,
    timeouts: [u32; CLASSES],
    capacity: usize,
    flows: HashMap<Key, u32, foldhash::fast::RandomState>,
    entries: Vec<Entry>,
    free: Vec<u32>,
    lists: [List; CLASSES],
    refused: u64,
}

/// Expired flows taken away for each new one: two, so that they cannot pile up.
const EXPIRED_PER_NEW: usize = 2;

impl Conntrack {
    /// A table for `capacity` flows, at most 2^31.
    #[must_use]
    pub fn new(capacity: usize, timeouts: &Timeouts, now: Instant) -> Self {
        Self {
            start: now,
            timeouts: [
                timeouts.tcp_opening,
                timeouts.tcp_established,
                timeouts.tcp_half_closed,
                timeouts.tcp_closed,
                timeouts.udp,
                timeouts.udp_stream,
                timeouts.icmp,
                timeouts.other,
            ],
            capacity: capacity.min(1 << 31),
            flows: HashMap::default(),
            entries: Vec::new(),
            free: Vec::new(),
            lists: [List {
                oldest: NONE,
                youngest: NONE,
            }; CLASSES],
            refused: 0,
        }
    }

    /// Flows in the table; some may have expired.
    #[must_use]
    pub fn len(&self) -> usize {
        self.flows.len()
    }

    /// Whether there are no flows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.flows.is_empty()
    }

    /// Flows refused because the table was full.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.refused
    }

    /// Whether a packet belongs to a tracked flow. If so the flow has seen it.
    pub fn follow(&mut self, direction: Direction, meta: &Meta, now: Instant) -> bool {
        let key = Key::new(&meta.key);
        let Some(&index) = self.flows.get(&key) else {
            return false;
        };
        let seconds = self.seconds(now);
        let Some(entry) = self.entries.get_mut(index as usize) else {
            return false;
        };
        let (old, seen) = (entry.state.class(), entry.seen);
        let is_over = is_over(seen, self.timeouts[old as usize], seconds);
        let next = entry.state.next(direction, entry.origin, meta.tcp_flags);
        let Some(state) = next.filter(|_| !is_over) else {
            self.remove(index);
            return false;
        };
        entry.state = state;
        if state.class() != old || seconds != seen {
            entry.seen = seconds;
            self.unlink(index, old);
            self.link(index, state.class());
        }
        true
    }

    /// Whether a flow is tracked, without a packet of it.
    #[must_use]
    pub fn knows(&self, key: &FlowKey, now: Instant) -> bool {
        let seconds = self.seconds(now);
        let index = self.flows.get(&Key::new(key));
        let entry = index.and_then(|index| self.entries.get(*index as usize));
        entry.is_some_and(|entry| {
            let timeout = self.timeouts[entry.state.class() as usize];
            !is_over(entry.seen, timeout, seconds)
        })
    }

    /// Takes up a flow with its first packet.
    ///
    /// # Errors
    ///
    /// [`TableFull`].
    pub fn open(
        &mut self,
        direction: Direction,
        meta: &Meta,
        now: Instant,
    ) -> Result<(), TableFull> {
        self.expire(now, EXPIRED_PER_NEW);
        let key = Key::new(&meta.key);
        if let Some(&index) = self.flows.get(&key) {
            self.remove(index);
        }
        if self.flows.len() >= self.capacity {
            self.refused += 1;
            return Err(TableFull);
        }
        let entry = Entry {
            key,
            seen: self.seconds(now),
            older: NONE,
            younger: NONE,
            state: State::first(meta),
            origin: direction,
        };
        let class = entry.state.class();
        let index = match self.free.pop() {
            Some(index) => {
                if let Some(slot) = self.entries.get_mut(index as usize) {
                    *slot = entry;
                }
                index
            }
            None => {
                let index = u32::try_from(self.entries.len()).map_err(|_| TableFull)?;
                self.entries.push(entry);
                index
            }
        };
        self.flows.insert(key, index);
        self.link(index, class);
        Ok(())
    }

    /// Forgets flows that have been silent for too long, at most `limit` of them. True when there
    /// may be more.
    pub fn expire(&mut self, now: Instant, limit: usize) -> bool {
        let seconds = self.seconds(now);
        let mut left = limit;
        for class in 0..CLASSES {
            while let Some(list) = self.lists.get(class) {
                let index = list.oldest;
                let timeout = self.timeouts.get(class).copied().unwrap_or(0);
                let oldest = self.entries.get(index as usize);
                if !oldest.is_some_and(|entry| is_over(entry.seen, timeout, seconds)) {
                    break;
                }
                if left == 0 {
                    return true;
                }
                left -= 1;
                self.remove(index);
            }
        }
        false
    }

    fn seconds(&self, now: Instant) -> u32 {
        let passed = now.saturating_duration_since(self.start).as_secs();
        u32::try_from(passed).unwrap_or(u32::MAX)
    }

    fn remove(&mut self, index: u32) {
        let Some(entry) = self.entries.get(index as usize) else {
            return;
        };
        let (key, class) = (entry.key, entry.state.class());
        self.unlink(index, class);
        if self.flows.remove(&key).is_some() {
            self.free.push(index);
        }
    }

    fn link(&mut self, index: u32, class: Class) {
        let list = &mut self.lists[class as usize];
        let older = std::mem::replace(&mut list.youngest, index);
        if older == NONE {
            list.oldest = index;
        }
        if let Some(entry) = self.entries.get_mut(index as usize) {
            entry.older = older;
            entry.younger = NONE;
        }
        if let Some(entry) = self.entries.get_mut(older as usize) {
            entry.younger = index;
        }
    }

    fn unlink(&mut self, index: u32, class: Class) {
        let Some(entry) = self.entries.get(index as usize) else {
            return;
        };
        let (older, younger) = (entry.older, entry.younger);
        let list = &mut self.lists[class as usize];
        match self.entries.get_mut(older as usize) {
            Some(entry) => entry.younger = younger,
            None => list.oldest = younger,
        }
        match self.entries.get_mut(younger as usize) {
            Some(entry) => entry.older = older,
            None => list.youngest = older,
        }
    }
}

fn is_over(seen: u32, timeout: u32, now: u32) -> bool {
    now.saturating_sub(seen) > timeout
}

#[cfg(test)]
mod tests;
