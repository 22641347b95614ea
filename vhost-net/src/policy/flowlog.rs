//! Flow logs, as a VPC writes them: version 2, fourteen fields, one line a flow, direction and
//! aggregation interval.
//!
//! ```text
//! version account-id interface-id srcaddr dstaddr srcport dstport protocol packets bytes start end action log-status
//! 2 000000000000 eni-0 10.0.2.15 93.184.216.34 40000 443 6 12 4031 1700000003 1700000044 ACCEPT OK
//! 2 000000000000 eni-0 - - - - - - - 1700000060 1700000120 - NODATA
//! ```
//!
//! [`FlowLog`] counts on the path of packets, one look-up each, in a table of bounded size; when the
//! interval is over its contents are taken as a [`Window`], which whoever has the file turns into
//! lines. What did not fit the table is not lost in silence: the window says SKIPDATA.
//!
//! Intervals begin at multiples of their length since 1970, so that the windows of several queues
//! are the same and can be joined. `start` and `end` are a flow's first and last packet in the
//! window, in Unix seconds; ICMP has ports of 0, as on AWS.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use crate::local::{Decision, Direction, Meta};

/// Most flows of a window, each direction and decision being one: about 2 MB.
pub const FLOWS_MAX: usize = 16_384;

/// Who a log is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Twelve digits.
    pub account: String,
    /// As `eni-0123`.
    pub interface: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Flow {
    source: (IpAddr, u16),
    destination: (IpAddr, u16),
    protocol: u8,
    is_accepted: bool,
}

#[derive(Clone, Copy, Debug)]
struct Count {
    packets: u64,
    bytes: u64,
    first: u64,
    last: u64,
}

/// Counts the flows of one window.
#[derive(Debug)]
pub struct FlowLog {
    interval: u64,
    /// A moment and what the wall clock said then; the log's clock goes on from there.
    epoch: (Instant, Duration),
    /// Unix seconds.
    window_start: u64,
    flows: HashMap<Flow, Count, foldhash::fast::RandomState>,
    capacity: usize,
    skipped: u64,
}

/// A flow of a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Sender.
    pub source: (IpAddr, u16),
    /// Receiver.
    pub destination: (IpAddr, u16),
    /// IP protocol number.
    pub protocol: u8,
    /// Packets as they would be on a wire.
    pub packets: u64,
    /// Bytes of IP packets.
    pub bytes: u64,
    /// First packet, in Unix seconds.
    pub start: u64,
    /// Last packet, in Unix seconds.
    pub end: u64,
    /// Whether policy let it pass.
    pub is_accepted: bool,
}

/// What an interval saw.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Window {
    /// Unix seconds.
    pub start: u64,
    /// Unix seconds.
    pub end: u64,
    /// The flows, in no order.
    pub records: Vec<Record>,
    /// Packets of flows that the table had no room for.
    pub skipped: u64,
}

impl FlowLog {
    /// `interval_seconds` is the length of a window, 60 and 600 on AWS; `unix` is what the wall
    /// clock says at `now`, since 1970.
    #[must_use]
    pub fn new(interval_seconds: u32, capacity: usize, now: Instant, unix: Duration) -> Self {
        let interval = u64::from(interval_seconds.max(1));
        Self {
            interval,
            epoch: (now, unix),
            window_start: unix.as_secs() / interval * interval,
            flows: HashMap::default(),
            capacity,
            skipped: 0,
        }
    }

    /// Counts a packet.
    pub fn record(&mut self, direction: Direction, meta: &Meta, decision: Decision, now: Instant) {
        let guest = (meta.key.guest.ip(), meta.key.guest.port());
        let peer = (meta.key.peer.ip(), meta.key.peer.port());
        let (mut source, mut destination) = match direction {
            Direction::Out => (guest, peer),
            Direction::In => (peer, guest),
        };
        if matches!(meta.key.protocol, 1 | 58) {
            (source.1, destination.1) = (0, 0);
        }
        let flow = Flow {
            source,
            destination,
            protocol: meta.key.protocol,
            is_accepted: decision == Decision::Allow,
        };
        let second = self.unix(now);
        let (packets, bytes) = (u64::from(meta.packets), u64::from(meta.bytes));
        if let Some(count) = self.flows.get_mut(&flow) {
            count.packets += packets;
            count.bytes += bytes;
            count.last = second;
        } else if self.flows.len() < self.capacity {
            let count = Count {
                packets,
                bytes,
                first: second,
                last: second,
            };
            self.flows.insert(flow, count);
        } else {
            self.skipped += packets;
        }
    }

    /// When the window ends.
    #[must_use]
    pub fn due(&self) -> Instant {
        let (then, unix) = self.epoch;
        let end = Duration::from_secs(self.window_start.saturating_add(self.interval));
        then.checked_add(end.saturating_sub(unix)).unwrap_or(then)
    }

    /// The window, when it is over by now.
    pub fn take(&mut self, now: Instant) -> Option<Window> {
        (now >= self.due()).then(|| self.finish(now))
    }

    /// The window as it stands, as when the card stops.
    pub fn finish(&mut self, now: Instant) -> Window {
        let start = self.window_start;
        let unix = self.unix(now);
        let end = unix.min(start.saturating_add(self.interval)).max(start);
        self.window_start = unix / self.interval * self.interval;
        let records = self.flows.drain().map(|(flow, count)| Record {
            source: flow.source,
            destination: flow.destination,
            protocol: flow.protocol,
            packets: count.packets,
            bytes: count.bytes,
            start: count.first,
            end: count.last,
            is_accepted: flow.is_accepted,
        });
        Window {
            start,
            end,
            records: records.collect(),
            skipped: std::mem::take(&mut self.skipped),
        }
    }

    fn unix(&self, now: Instant) -> u64 {
        let (then, unix) = self.epoch;
        (unix + now.saturating_duration_since(then)).as_secs()
    }
}

impl Window {
    /// Joins what another queue saw in the same interval.
    pub fn join(&mut self, other: Self) {
        self.start = self.start.min(other.start);
        self.end = self.end.max(other.end);
        self.records.extend(other.records);
        self.skipped += other.skipped;
    }

    /// The lines of the window, each with its end.
    #[must_use]
    pub fn lines(&self, who: &Identity) -> String {
        let mut text = String::new();
        let (account, interface) = (&who.account, &who.interface);
        for record in &self.records {
            let action = if record.is_accepted {
                "ACCEPT"
            } else {
                "REJECT"
            };
            // Writing to a string does not fail.
            let _ = writeln!(
                text,
                "2 {account} {interface} {} {} {} {} {} {} {} {} {} {action} OK",
                record.source.0,
                record.destination.0,
                record.source.1,
                record.destination.1,
                record.protocol,
                record.packets,
                record.bytes,
                record.start,
                record.end,
            );
        }
        let status = match (self.records.is_empty(), self.skipped) {
            (_, 1..) => "SKIPDATA",
            (true, 0) => "NODATA",
            (false, 0) => return text,
        };
        let (start, end) = (self.start, self.end);
        let _ = writeln!(
            text,
            "2 {account} {interface} - - - - - - - {start} {end} - {status}"
        );
        text
    }
}

#[cfg(test)]
mod tests;
