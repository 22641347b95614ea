//! UDP and echo flows: one connected socket of the host's for each pair of addresses and ports.
//!
//! Connected, because the kernel then tells us of ICMP errors, and delivers what comes from the
//! peer only. Datagrams that the host's socket does not take are dropped, as a network does; those
//! for the guest wait in the socket until the wire has room.
//!
//! Echo goes through unprivileged ping sockets (`SOCK_DGRAM`, `IPPROTO_ICMP`), to which the kernel
//! gives an identifier of its own: the guest's is put back into replies. A kernel that does not let
//! us (`net.ipv4.ping_group_range`) makes the card answer that it is prohibited; that is counted.
//!
//! The card is a router: it takes one off the hop limit and says so when none is left. A short hop
//! limit is the socket's too, and what routers on the way then say is handed to the guest as it
//! came, so traceroute works by UDP and by echo. Longer ones are left to the host: a system call a
//! packet for nothing.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::{
    Bench, Claim, Event, Flow, Host, Kind, Opened, Report, Route, Stack, Turn, Unreachable, Wire,
    emit, unreachable,
};
use crate::frame::header::NetHeader;
use crate::frame::{ETHERNET_LEN, FRAME_MAX, Frame, ICMP, Packet, UDP};
use crate::local::FlowKey;

/// How long a UDP flow lives on when only one side has spoken, as AWS's security groups have it.
pub const UDP_ONE_WAY: Duration = Duration::from_secs(30);
/// How long it lives on when both have.
pub const UDP_STREAM: Duration = Duration::from_secs(180);
/// How long echo requests are waited for.
const PING: Duration = Duration::from_secs(30);

/// The longest way that is the guest's to choose: what traceroute tries.
const HOPS_MAX: u8 = 32;
/// ICMP errors taken from a socket at a time.
const REPORTS: usize = 16;

/// Datagrams to the guest in one turn.
const BATCH: usize = 32;
/// Bytes of the last packet that are kept to be quoted in an ICMP error.
const QUOTE: usize = 128;
/// Datagrams from a published port that wait for the flow's turn.
const INBOUND_MAX: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Via {
    Own,
    Published(usize, SocketAddr),
}

pub(super) struct DatagramFlow {
    via: Via,
    is_readable: bool,
    has_answered: bool,
    has_asked: bool,
    last: Instant,
    /// The beginning of the guest's last packet.
    quote: Vec<u8>,
    inbound: Vec<Vec<u8>>,
    is_over: bool,
    /// The socket's hop limit, if it was set.
    hops: Option<u8>,
    /// What the socket was told.
    dont_fragment: bool,
}

impl DatagramFlow {
    fn new(via: Via, dont_fragment: bool, now: Instant) -> Self {
        Self {
            via,
            is_readable: false,
            has_answered: false,
            has_asked: false,
            last: now,
            quote: Vec::new(),
            inbound: Vec::new(),
            is_over: false,
            hops: None,
            dont_fragment,
        }
    }

    pub(super) fn inward(published: usize, peer: SocketAddr, now: Instant) -> Self {
        Self::new(Via::Published(published, peer), false, now)
    }

    pub(super) fn has_socket(&self) -> bool {
        self.via == Via::Own
    }

    pub(super) fn on_host(&mut self, event: Event) {
        self.is_readable |= event.readable || event.hangup;
    }

    pub(super) fn inbound(&mut self, payload: &[u8]) {
        if self.inbound.len() < INBOUND_MAX {
            self.inbound.push(payload.to_vec());
        }
    }

    fn lifetime<W, H>(&self, key: &FlowKey, bench: &Bench<'_, W, H>) -> Duration {
        match key.protocol {
            UDP if self.has_answered && self.has_asked => bench.udp_stream,
            UDP => bench.udp_one_way,
            _ => PING,
        }
    }

    pub(super) fn turn<W: Wire, H: Host>(
        &mut self,
        key: &FlowKey,
        bench: &mut Bench<'_, W, H>,
    ) -> Turn {
        for payload in std::mem::take(&mut self.inbound) {
            let at = emit::udp_payload_at(key.peer.ip());
            let place = bench.scratch.bytes().get_mut(at..at + payload.len());
            if let Some(place) = place {
                place.copy_from_slice(&payload);
                self.deliver(key, payload.len(), bench);
            }
        }
        for _ in 0..BATCH {
            if !self.is_readable || self.via != Via::Own {
                break;
            }
            if !bench.wire.has_room() {
                return Turn::Again;
            }
            let at = match key.protocol {
                UDP => emit::udp_payload_at(key.peer.ip()),
                _ => emit::icmp_at(key.peer.ip()),
            };
            let buffer = bench.scratch.bytes().get_mut(at..).unwrap_or_default();
            match bench.host.recv(bench.id, buffer) {
                Ok(len) => self.deliver(key, len, bench),
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => {
                        self.is_readable = false;
                        // A call to send may have taken the error that came with it.
                        if self.keeps_errors(key) {
                            self.take_reports(key, bench);
                        }
                    }
                    io::ErrorKind::Interrupted => {}
                    _ => self.failed(key, &error, bench),
                },
            }
        }
        let end = self.last + self.lifetime(key, bench);
        if self.is_over || end <= bench.now {
            if self.via == Via::Own {
                bench.host.close(bench.id, false);
            }
            return Turn::Over;
        }
        if self.is_readable && self.via == Via::Own {
            Turn::Again
        } else {
            Turn::Wait(Some(end))
        }
    }

    /// A datagram of `len` bytes lies in the scratch frame, at its place.
    fn deliver<W: Wire, H: Host>(
        &mut self,
        key: &FlowKey,
        len: usize,
        bench: &mut Bench<'_, W, H>,
    ) {
        self.has_answered = true;
        self.last = bench.now;
        let frame = bench.scratch.bytes();
        let end = match key.protocol {
            UDP => emit::udp(frame, bench.ends, key.peer, key.guest, len),
            // Not even a header: no kernel does that.
            _ if len < emit::UDP_LEN => return,
            _ => {
                let at = emit::icmp_at(key.peer.ip());
                if let Some(place) = frame.get_mut(at + 4..at + 6) {
                    place.copy_from_slice(&key.guest.port().to_be_bytes());
                }
                emit::icmp(frame, bench.ends, key.peer.ip(), key.guest.ip(), len)
            }
        };
        let Some(frame) = frame.get(..end.min(FRAME_MAX)) else {
            return;
        };
        if frame.len() <= ETHERNET_LEN + usize::from(bench.mtu) {
            bench.wire.send(NetHeader::default(), frame);
            return;
        }
        *bench.identification = bench.identification.wrapping_add(1);
        let wire = &mut *bench.wire;
        emit::fragments(frame, bench.mtu, *bench.identification, |piece| {
            wire.send(NetHeader::default(), piece);
        });
    }

    /// Whether the socket keeps ICMP errors.
    fn keeps_errors(&self, key: &FlowKey) -> bool {
        self.via == Via::Own && (key.protocol != UDP || self.hops.is_some())
    }

    /// Hands on the ICMP errors that the socket has kept; true if there was one.
    fn take_reports<W: Wire, H: Host>(&self, key: &FlowKey, bench: &mut Bench<'_, W, H>) -> bool {
        let mut is_told = false;
        for _ in 0..REPORTS {
            let Some(report) = bench.host.report(bench.id) else {
                break;
            };
            is_told |= self.pass_on(key, &report, bench);
        }
        is_told
    }

    /// Hands an ICMP error on; false if it says nothing to the guest.
    fn pass_on<W: Wire, H: Host>(
        &self,
        key: &FlowKey,
        report: &Report,
        bench: &mut Bench<'_, W, H>,
    ) -> bool {
        let is_v4 = key.guest.is_ipv4();
        let Some(why) = told(report, is_v4) else {
            return false;
        };
        let mut quote = self.quote.clone();
        if let Some(sequence) = report.sequence {
            // Which request it was, if it was not the last.
            let at = emit::ip_len(key.guest.ip()) + 6;
            if let Some(place) = quote.get_mut(at..at + 2) {
                place.copy_from_slice(&sequence.to_be_bytes());
            }
        }
        let from = report.from.filter(|from| from.is_ipv4() == is_v4);
        let from = from.unwrap_or(key.peer.ip());
        bench.unreachable(from, key.guest.ip(), why, &quote);
        true
    }

    /// The host's socket reports an error of something sent earlier, or of what is sent now.
    fn failed<W: Wire, H: Host>(
        &mut self,
        key: &FlowKey,
        error: &io::Error,
        bench: &mut Bench<'_, W, H>,
    ) {
        if self.take_reports(key, bench) {
            return;
        }
        bench.stats.datagrams_dropped.inc();
        let is_too_big = error.raw_os_error() == Some(rustix::io::Errno::MSGSIZE.raw_os_error());
        let why = if is_too_big {
            bench.host.path_mtu(bench.id).map(Unreachable::TooBig)
        } else {
            unreachable(error)
        };
        if let Some(why) = why {
            let quote = std::mem::take(&mut self.quote);
            bench.unreachable(key.peer.ip(), key.guest.ip(), why, &quote);
            self.quote = quote;
        }
    }
}

/// What to tell the guest of an ICMP error that came to its socket: errors about a packet, no more.
fn told(report: &Report, is_v4: bool) -> Option<Unreachable> {
    let (kind, code) = (report.kind, report.code);
    match (is_v4, kind) {
        (true, 3) if code == 4 => Some(Unreachable::TooBig(report.rest)),
        (true, 3 | 11 | 12) | (false, 1 | 3 | 4) => Some(Unreachable::Told(kind, code, 0)),
        (false, 2) => Some(Unreachable::TooBig(report.rest)),
        _ => None,
    }
}

impl Stack {
    pub(super) fn datagram_from_guest<W: Wire, H: Host>(
        &mut self,
        frame: &Frame<'_>,
        packet: &Packet,
        key: FlowKey,
        now: Instant,
        wire: &mut W,
        host: &mut H,
    ) -> Option<u16> {
        let is_udp = packet.protocol == UDP;
        let body = frame.transport_bytes();
        let payload = if is_udp {
            body.get(emit::UDP_LEN..).unwrap_or_default()
        } else {
            body
        };
        let quote = frame.ip_bytes();
        // What is mapped to the host is the next hop itself.
        let is_beyond = !self.settings.host_loopback.contains(&packet.destination);
        if packet.hop_limit <= 1
            && is_beyond
            && matches!(self.route(packet.destination), Route::Host(_))
        {
            self.refuse(packet, quote, Unreachable::HopLimit, wire);
            return None;
        }
        let id = match self.by_key.get(&key) {
            Some(&id) => id,
            None => match self.open_datagram(packet, quote, key, now, wire, host) {
                Opened::Here(id) => id,
                Opened::Elsewhere(pair) => return Some(pair),
                Opened::No => return None,
            },
        };
        let Flow::Datagram(flow) = &mut self.flows.get_mut(id)?.flow else {
            return None;
        };
        flow.last = now;
        flow.has_asked = true;
        flow.quote.clear();
        flow.quote
            .extend_from_slice(quote.get(..QUOTE).unwrap_or(quote));
        let hops = packet.hop_limit.saturating_sub(1).max(1);
        let is_short = hops <= HOPS_MAX || flow.hops.is_some();
        if is_short && is_beyond && flow.via == Via::Own && flow.hops != Some(hops) {
            // One that cannot be set goes further than it should.
            let _ = host.set_hops(id, packet.source.is_ipv4(), hops);
            flow.hops = Some(hops);
        }
        let sent = match flow.via {
            Via::Own => {
                // What came in fragments, or may be cut, may be cut on the way, too.
                if flow.dont_fragment != packet.dont_fragment && is_udp {
                    flow.dont_fragment = packet.dont_fragment;
                    host.set_dont_fragment(id, packet.dont_fragment);
                }
                host.send(id, payload)
            }
            Via::Published(published, to) => host.send_from(published, to, payload),
        };
        // What an earlier packet met with comes first, and this one has not gone.
        let is_late = sent.is_err() && flow.keeps_errors(&key);
        let sent = if is_late {
            flow.is_readable = true;
            host.send(id, payload)
        } else {
            sent
        };
        match sent {
            Ok(_) => {}
            Err(error) => {
                self.stats.datagrams_dropped.inc();
                let is_too_big =
                    error.raw_os_error() == Some(rustix::io::Errno::MSGSIZE.raw_os_error());
                if is_too_big {
                    if let Some(mtu) = host.path_mtu(id) {
                        self.refuse(packet, quote, Unreachable::TooBig(mtu), wire);
                    }
                } else if let Some(why) = unreachable(&error) {
                    self.refuse(packet, quote, why, wire);
                }
            }
        }
        if let Some(entry) = self.flows.get(id)
            && (is_late || entry.timer.is_none())
        {
            self.make_ready(id);
        }
        None
    }

    fn open_datagram<W: Wire, H: Host>(
        &mut self,
        packet: &Packet,
        quote: &[u8],
        key: FlowKey,
        now: Instant,
        wire: &mut W,
        host: &mut H,
    ) -> Opened {
        let is_udp = packet.protocol == UDP;
        let to = match self.route(packet.destination) {
            Route::Host(to) => to,
            Route::Card => {
                if is_udp {
                    self.refuse(packet, quote, Unreachable::Port, wire);
                }
                return Opened::No;
            }
            Route::None => {
                self.stats.unroutable.inc();
                let is_unicast = match packet.destination {
                    std::net::IpAddr::V4(v4) => {
                        !v4.is_multicast()
                            && !v4.is_broadcast()
                            && self.spec.v4.is_none_or(|own| v4 != own.broadcast())
                    }
                    std::net::IpAddr::V6(v6) => !v6.is_multicast(),
                };
                if is_unicast {
                    self.refuse(packet, quote, Unreachable::Host, wire);
                }
                return Opened::No;
            }
        };
        let kind = if is_udp {
            Kind::Udp {
                dont_fragment: packet.dont_fragment,
            }
        } else {
            Kind::Ping
        };
        match self.claim(&key) {
            Claim::Granted => {}
            Claim::Of(pair) => return Opened::Elsewhere(pair),
            Claim::Full => return Opened::No,
        }
        let id = self.insert(
            key,
            Flow::Datagram(Box::new(DatagramFlow::new(
                Via::Own,
                packet.dont_fragment,
                now,
            ))),
        );
        match host.open(id, kind, (to, key.peer.port()).into()) {
            Ok(()) if is_udp => self.stats.udp_opened.inc(),
            Ok(()) => self.stats.ping_opened.inc(),
            Err(error) => {
                self.remove(id);
                let is_forbidden = error.kind() == io::ErrorKind::PermissionDenied;
                if !is_udp && is_forbidden {
                    self.stats.ping_forbidden.inc();
                    self.refuse(packet, quote, Unreachable::Prohibited, wire);
                } else if let Some(why) = unreachable(&error) {
                    self.refuse(packet, quote, why, wire);
                }
                return Opened::No;
            }
        }
        debug_assert!(is_udp || packet.protocol == ICMP || packet.source.is_ipv6());
        Opened::Here(id)
    }
}
