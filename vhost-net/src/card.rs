//! A queue pair's share of the card: services, policy and stack in the order in which a packet
//! meets them, and the counters of what was wrong with it. No I/O.
//!
//! Frames of the guest's: parse, then services (ARP and DHCP come before any policy), then policy,
//! then the stack. Frames to the guest are the stack's and need no parsing.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use offload::telemetry::{Counter, Registry};

use crate::frame::header::NetHeader;
use crate::frame::reassembly::{Outcome, Reassembly};
use crate::frame::{Frame, Malformed, Net, TCP, Transport, UDP};
use crate::local::{Direction, FlowKey, Meta, Outbox, Verdict};
use crate::policy::observe;
use crate::spec::Spec;
use crate::stack::{Host, Locals, Read, Stack, Stats, Unreachable, Wire};

/// Why a packet in fragments came to nothing: its time was over, newer ones needed its place, its
/// fragments contradict each other, a fragment makes no sense by itself.
pub const FAILURES: [&str; 4] = ["timeout", "evicted", "contradiction", "malformed"];
const TIMEOUT: usize = 0;
const EVICTED: usize = 1;
const CONTRADICTION: usize = 2;
const MALFORMED: usize = 3;

/// A frame that is to be handed to another queue pair, see [`Card::from_pair`].
#[derive(Debug)]
pub struct Elsewhere {
    /// Which.
    pub pair: u16,
    /// The frame, if it is another one than was handed in: one put together from fragments, and
    /// without offload metadata.
    pub whole: Option<Box<[u8]>>,
}

/// What the card counts, over all queue pairs.
#[derive(Debug, Default)]
pub struct CardStats {
    /// What the engine counts.
    pub stack: Arc<Stats>,
    malformed: [Arc<Counter>; Malformed::ALL.len()],
    /// Frames from a hardware or IP address that is not the guest's.
    pub spoofed: Arc<Counter>,
    /// Packets that policy refused.
    pub denied: Arc<Counter>,
    /// Frames for nobody here: other EtherTypes.
    pub ignored: Arc<Counter>,
    /// Frames to the guest that were dropped for want of room.
    pub overruns: Arc<Counter>,
    /// Questions of the resolver's that the host's socket did not take.
    pub unasked: Arc<Counter>,
    /// Packets of the guest's that were put together from fragments.
    pub reassembled: Arc<Counter>,
    /// Fragmented packets that were not: by [`FAILURES`].
    pub not_reassembled: [Arc<Counter>; FAILURES.len()],
    /// Frames handed to the queue pair that has their flow.
    pub moved: Arc<Counter>,
}

impl CardStats {
    /// Counts a malformed frame.
    pub fn malformed(&self, what: Malformed) {
        if let Some(counter) = self.malformed.get(what as usize) {
            counter.inc();
        }
    }

    /// Malformed frames of a kind.
    #[must_use]
    pub fn malformed_count(&self, what: Malformed) -> u64 {
        self.malformed
            .get(what as usize)
            .map_or(0, |counter| counter.get())
    }

    /// Keeps a fragment of the guest's with others of its packet, and counts what comes of it.
    pub(crate) fn gather(
        &self,
        fragments: &mut Reassembly,
        fragment: &Frame<'_>,
        now: Instant,
    ) -> Outcome {
        let evicted = fragments.evicted();
        let outcome = fragments.add(fragment, now);
        let failed = &self.not_reassembled;
        failed[EVICTED].add(fragments.evicted() - evicted);
        match &outcome {
            Outcome::Whole(_) => self.reassembled.inc(),
            Outcome::Kept => {}
            Outcome::Void => failed[CONTRADICTION].inc(),
            Outcome::Malformed(_) => failed[MALFORMED].inc(),
        }
        outcome
    }

    /// Counts a packet whose fragments did not all come in time.
    pub(crate) fn fragments_late(&self) {
        self.not_reassembled[TIMEOUT].inc();
    }

    /// Shows all of them.
    pub fn register(&self, registry: &Registry) {
        for (kind, counter) in Malformed::ALL.iter().zip(&self.malformed) {
            registry.counter(
                "malformed_frames",
                "Frames of the guest's that were dropped because they are broken",
                vec![("kind", kind.name().to_owned())],
                Arc::clone(counter),
            );
        }
        for (why, counter) in FAILURES.iter().zip(&self.not_reassembled) {
            registry.counter(
                "fragments_lost",
                "Fragmented packets of the guest's that came to nothing; fragments, if malformed",
                vec![("why", (*why).to_owned())],
                Arc::clone(counter),
            );
        }
        for (name, help, counter) in [
            (
                "reassembled_packets",
                "Packets of the guest's put together from fragments",
                &self.reassembled,
            ),
            (
                "spoofed_frames",
                "Frames from an address that is not the guest's",
                &self.spoofed,
            ),
            (
                "denied_packets",
                "Packets that the security groups refused",
                &self.denied,
            ),
            (
                "ignored_frames",
                "Frames of protocols that the card does not speak",
                &self.ignored,
            ),
            (
                "overruns",
                "Frames to the guest dropped for want of buffers",
                &self.overruns,
            ),
            (
                "unasked_questions",
                "Questions to name servers that could not be sent",
                &self.unasked,
            ),
            (
                "moved_frames",
                "Frames that came through another queue pair than their flow's",
                &self.moved,
            ),
        ] {
            registry.counter(name, help, Vec::new(), Arc::clone(counter));
        }
        type Read = fn(&Stats) -> &Counter;
        let stack: [(&'static str, &'static str, Read); 11] = [
            ("tcp_flows_opened", "TCP flows opened", |s| &s.tcp_opened),
            ("udp_flows_opened", "UDP flows opened", |s| &s.udp_opened),
            ("ping_flows_opened", "Echo flows opened", |s| &s.ping_opened),
            ("flows_closed", "Flows closed", |s| &s.closed),
            (
                "flow_table_full",
                "Flows refused because the table was full",
                |s| &s.table_full,
            ),
            (
                "connects_failed",
                "Connections that the host could not make",
                |s| &s.connect_failed,
            ),
            (
                "tcp_segments_dropped",
                "TCP segments dropped for want of memory while the host stood still",
                |s| &s.segments_dropped,
            ),
            (
                "datagrams_dropped",
                "Datagrams that the host did not take",
                |s| &s.datagrams_dropped,
            ),
            (
                "unroutable_packets",
                "Packets to where the guest may not send",
                |s| &s.unroutable,
            ),
            ("unsupported_packets", "Protocols not carried", |s| {
                &s.unsupported
            }),
            (
                "pings_forbidden",
                "Echo requests without a socket (ping_group_range)",
                |s| &s.ping_forbidden,
            ),
        ];
        for (name, help, read) in stack {
            let stats = Arc::clone(&self.stack);
            registry.gauge(name, help, Vec::new(), move || read(&stats).get());
        }
    }
}

/// The card's own services and its policy, as the data path calls them.
pub trait Local: Locals {
    /// A frame of the guest's, before anything else.
    fn frame(&mut self, frame: &Frame<'_>, now: Instant, out: &mut Outbox) -> Verdict;

    /// Whether a packet may pass.
    fn allows(&mut self, direction: Direction, meta: &Meta, now: Instant) -> bool;

    /// What a server of the host's said to an [`Outbox::outgoing`].
    fn answered(&mut self, token: u64, payload: &[u8], now: Instant, out: &mut Outbox);

    /// Whether [`Self::observe`] wants to know of frames to the guest.
    fn observes(&self) -> bool;

    /// A packet went to the guest.
    fn observe(&mut self, meta: &Meta, now: Instant);

    /// What is due by now.
    fn poll(&mut self, now: Instant, out: &mut Outbox);

    /// When [`Self::poll`] is to be called.
    fn deadline(&self) -> Option<Instant>;
}

/// See the module.
pub struct Card<L> {
    spec: Arc<Spec>,
    stats: Arc<CardStats>,
    /// The engine.
    pub stack: Stack,
    /// Services and policy.
    pub local: L,
    outbox: Outbox,
    seen: Vec<Meta>,
    fragments: Reassembly,
}

/// A wire that notes whose packets go over it.
struct Watched<'a, W> {
    wire: &'a mut W,
    /// `None`: nobody wants to know.
    seen: Option<&'a mut Vec<Meta>>,
}

impl<W: Wire> Wire for Watched<'_, W> {
    fn has_room(&self) -> bool {
        self.wire.has_room()
    }

    fn has_enough(&self) -> bool {
        self.wire.has_enough()
    }

    fn send(&mut self, header: NetHeader, frame: &[u8]) {
        if let Some(seen) = &mut self.seen {
            seen.extend(observe::outgoing(&header, frame));
        }
        self.wire.send(header, frame);
    }

    fn send_from(&mut self, header: NetHeader, head: &[u8], len: usize, read: Read<'_>) {
        if let Some(seen) = &mut self.seen {
            seen.extend(observe::outgoing(&header, head));
        }
        self.wire.send_from(header, head, len, read);
    }
}

impl<L> std::fmt::Debug for Card<L> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Card")
            .field("stack", &self.stack)
            .finish_non_exhaustive()
    }
}

impl<L: Local> Card<L> {
    /// Puts the parts together.
    pub fn new(spec: Arc<Spec>, stats: Arc<CardStats>, stack: Stack, local: L) -> Self {
        Self {
            spec,
            stats,
            stack,
            local,
            outbox: Outbox::default(),
            seen: Vec::new(),
            fragments: Reassembly::default(),
        }
    }

    /// Takes a frame of the guest's: `bytes` are what follows the virtio-net header. `Some`: its
    /// flow is with another queue pair.
    pub fn from_guest<W: Wire, H: Host>(
        &mut self,
        header: &NetHeader,
        bytes: &[u8],
        now: Instant,
        wire: &mut W,
        host: &mut H,
    ) -> Option<Elsewhere> {
        let frame = self.parse(header, bytes)?;
        if frame.source != self.spec.mac {
            self.stats.spoofed.inc();
            return None;
        }
        if self.local.frame(&frame, now, &mut self.outbox) == Verdict::Handled {
            self.flush(wire, host);
            return None;
        }
        self.pass_on(&frame, now, wire, host)
    }

    /// Takes a frame that another queue pair got from the guest, and that is of a flow of this
    /// pair's: it has been looked at by the services. `Some`: the flow has changed hands meanwhile.
    pub fn from_pair<W: Wire, H: Host>(
        &mut self,
        header: &NetHeader,
        bytes: &[u8],
        now: Instant,
        wire: &mut W,
        host: &mut H,
    ) -> Option<Elsewhere> {
        let frame = self.parse(header, bytes)?;
        self.pass_on(&frame, now, wire, host)
    }

    fn parse<'b>(&self, header: &NetHeader, bytes: &'b [u8]) -> Option<Frame<'b>> {
        let frame = Frame::parse(bytes, header);
        frame.inspect_err(|what| self.stats.malformed(*what)).ok()
    }

    fn pass_on<W: Wire, H: Host>(
        &mut self,
        frame: &Frame<'_>,
        now: Instant,
        wire: &mut W,
        host: &mut H,
    ) -> Option<Elsewhere> {
        let Net::Ip(packet) = &frame.net else {
            self.stats.ignored.inc();
            return None;
        };
        let as_it_is = |pair| Elsewhere { pair, whole: None };
        if !self.spec.is_guest(packet.source) {
            self.stats.spoofed.inc();
            return None;
        }
        // Before policy: the pair that has the flow tracks it.
        if let Some(pair) = self.stack.elsewhere(packet) {
            return Some(as_it_is(pair));
        }
        if packet.transport == Transport::Fragment {
            let whole = self.gather(frame, now, wire)?;
            let frame = self.parse(&NetHeader::default(), &whole)?;
            if self.local.frame(&frame, now, &mut self.outbox) == Verdict::Handled {
                self.flush(wire, host);
                return None;
            }
            // Whole, it is no fragment any more.
            let elsewhere = self.pass_on(&frame, now, wire, host)?;
            return Some(Elsewhere {
                whole: Some(whole),
                ..elsewhere
            });
        }
        if let Some(meta) = meta(frame)
            && !self.local.allows(Direction::Out, &meta, now)
        {
            self.stats.denied.inc();
            return None;
        }
        let mut wire = Watched {
            wire,
            seen: self.local.observes().then_some(&mut self.seen),
        };
        let (stack, local) = (&mut self.stack, &mut self.local);
        let pair = stack.from_guest(frame, now, &mut wire, host, local);
        self.tell(now);
        pair.map(as_it_is)
    }

    /// Keeps a fragment, unless it was the last one that was missing of a packet.
    fn gather<W: Wire>(
        &mut self,
        fragment: &Frame<'_>,
        now: Instant,
        wire: &mut W,
    ) -> Option<Box<[u8]>> {
        match self.stats.gather(&mut self.fragments, fragment, now) {
            Outcome::Whole(frame) => return Some(frame),
            Outcome::Kept | Outcome::Void => {}
            Outcome::Malformed(field) => {
                if let (Some(at), Net::Ip(packet)) = (field, &fragment.net) {
                    let why = Unreachable::Parameter(at);
                    let (from, to) = (packet.destination, packet.source);
                    self.stack.tell(from, to, why, fragment.ip_bytes(), wire);
                }
            }
        }
        None
    }

    /// Gives up packets whose fragments did not come in time.
    fn expire_fragments<W: Wire>(&mut self, now: Instant, wire: &mut W) {
        while let Some(expired) = self.fragments.expire(now) {
            self.stats.fragments_late();
            if let Some(quote) = expired.quote {
                let (from, to) = (expired.destination, expired.source);
                let why = Unreachable::Reassembly;
                self.stack.tell(from, to, why, &quote, wire);
            }
        }
    }

    /// Tells policy what went to the guest.
    fn tell(&mut self, now: Instant) {
        for meta in self.seen.drain(..) {
            self.local.observe(&meta, now);
        }
    }

    /// What a server of the host's said to a question of the card's own.
    pub fn answered<W: Wire, H: Host>(
        &mut self,
        token: u64,
        payload: &[u8],
        now: Instant,
        wire: &mut W,
        host: &mut H,
    ) {
        self.local.answered(token, payload, now, &mut self.outbox);
        self.flush(wire, host);
    }

    /// A connection to a published port: see [`Stack::accept`]. `None`: it is to be closed.
    pub fn accept(&mut self, peer: SocketAddr, guest_port: u16, now: Instant) -> Option<usize> {
        let guest = self.stack.guest_address(peer.ip())?;
        if !self.admits(TCP, peer, (guest, guest_port).into(), 2, now) {
            return None;
        }
        self.stack.accept(peer, guest_port, now)
    }

    /// A datagram to a published port: see [`Stack::datagram_in`].
    #[allow(clippy::too_many_arguments)] // one call, one place
    pub fn datagram_in<W: Wire, H: Host>(
        &mut self,
        published: Option<usize>,
        peer: SocketAddr,
        guest_port: u16,
        payload: &[u8],
        now: Instant,
        wire: &mut W,
        host: &mut H,
    ) -> Option<u16> {
        let guest = self.stack.guest_address(peer.ip())?;
        // Without a port it comes from another pair, which has asked.
        let admits =
            published.is_none() || self.admits(UDP, peer, (guest, guest_port).into(), 0, now);
        if admits {
            let mut wire = Watched {
                wire,
                seen: self.local.observes().then_some(&mut self.seen),
            };
            let stack = &mut self.stack;
            let pair =
                stack.datagram_in(published, peer, guest_port, payload, now, &mut wire, host);
            self.tell(now);
            return pair;
        }
        None
    }

    /// Whether policy lets a peer begin to talk to the guest.
    fn admits(
        &mut self,
        protocol: u8,
        peer: SocketAddr,
        guest: SocketAddr,
        tcp_flags: u8,
        now: Instant,
    ) -> bool {
        let meta = Meta {
            key: FlowKey {
                protocol,
                guest,
                peer,
            },
            bytes: 40,
            packets: 1,
            tcp_flags,
            icmp: (0, 0),
        };
        let admits = self.local.allows(Direction::In, &meta, now);
        if !admits {
            self.stats.denied.inc();
        }
        admits
    }

    fn flush<W: Wire, H: Host>(&mut self, wire: &mut W, host: &mut H) {
        for frame in self.outbox.frames.drain(..) {
            wire.send(NetHeader::default(), &frame);
        }
        for token in self.outbox.over.drain(..) {
            host.forget(token);
        }
        for question in self.outbox.outgoing.drain(..) {
            // A question that cannot be sent is one that nobody answers: the service's deadline.
            if host.ask(&question).is_err() {
                self.stats.unasked.inc();
            }
        }
        for key in self.outbox.woken.drain(..) {
            self.stack.wake(&key);
        }
    }

    /// Does what is due, and gives flows their turns.
    pub fn run<W: Wire, H: Host>(&mut self, now: Instant, wire: &mut W, host: &mut H) {
        if self.local.deadline().is_some_and(|at| at <= now) {
            self.local.poll(now, &mut self.outbox);
            self.flush(wire, host);
        }
        self.expire_fragments(now, wire);
        let mut wire = Watched {
            wire,
            seen: self.local.observes().then_some(&mut self.seen),
        };
        self.stack.run(now, &mut wire, host);
        self.tell(now);
    }

    /// When [`Self::run`] is to be called at the latest.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        let ends = [
            self.stack.deadline(),
            self.local.deadline(),
            self.fragments.deadline(),
        ];
        ends.into_iter().flatten().min()
    }
}

/// What policy has to know of a packet from the guest. `None`: it belongs to no flow.
fn meta(frame: &Frame<'_>) -> Option<Meta> {
    let Net::Ip(packet) = &frame.net else {
        return None;
    };
    let ports = packet.ports()?;
    Some(Meta::of(Direction::Out, frame, packet, ports))
}

#[cfg(test)]
mod tests;
