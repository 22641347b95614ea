//! TCP: the guest's connection ends here, and another one begins at the host.
//!
//! A connection of the guest's is answered only when the host's is there: its SYN makes a listening
//! socket on the destination whose SYN-ACK is held back, the host connects, and what comes of that
//! releases the SYN-ACK, resets, or becomes an ICMP error. So the guest's `connect` fails as and
//! when the real one does.
//!
//! Bytes for the guest stay with the host's socket until it has acknowledged them ([`super::kept`]), or
//! go from there into smoltcp's ring if they cannot; those from the guest go from its other ring straight
//! to the host's socket. Neither side is read when the other has no room, so a stalled receiver is felt by
//! the sender, whichever it is. Each half closes by itself; a reset on one side is one on the other.
//!
//! # Memory
//! A single flow is as fast as its windows are large, for guest and card take turns on few processors
//! and each turn takes a while; but thousands of flows must not hold windows' worth of memory each. A
//! ring's pages are touched as bytes move through it, and it starts again at its front whenever it
//! runs empty. So a flow may put [`BUFFER_SMALL`] bytes into a ring before that runs empty; more only as
//! one of [`BULK_MAX`] flows, which it stays until it ends. Others wait for the guest's acknowledgement
//! (to the guest; a socket that keeps its bytes needs no ring), or lose a segment that the guest sends again (to the host, which then stands still,
//! or the ring were empty). Buffers of their own for all, as large as the small part, were the other
//! choice: one flow then reaches 13 Gbit/s where it reaches 20 so.
//!
//! # Patience
//! A guest that says nothing is not waited for without end, or its table would fill with flows that
//! nobody has: it has [`HANDSHAKE`] to complete a connection, and [`UNANSWERED`] to acknowledge what it
//! was sent. smoltcp's own time-out would not do: it ends connections that are idle, too.
//!
//! A flow that reaches TIME-WAIT is forgotten: the wire to the guest loses nothing, so the last
//! acknowledgement has arrived, and a table full of waiting flows would be a way to fill it.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use smoltcp::iface::{Context, PollResult, SocketHandle, SocketSet};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};

use super::kept::{Kept, Payload};
use super::{
    Bench, Claim, Event, Flow, Host, Kind, Locals, Opened, Port, Route, Stack, Turn, Unreachable,
    Wire, after, is_temporary, smoltcp_time, unreachable,
};
use crate::frame::{Frame, Packet, Transport};
use crate::local::{FlowKey, TcpService};

/// Bytes that wait for the host at most: the window that the guest sees.
pub const BUFFER_TO_HOST: usize = 2 << 20;
/// Bytes on the way to the guest at most.
pub const BUFFER_TO_GUEST: usize = 4 << 20;
/// Of each, what any flow may use.
pub const BUFFER_SMALL: usize = 256 << 10;
/// Flows of a queue pair that may use all of both.
pub const BULK_MAX: usize = 256;

/// How long the guest may take to complete a connection, whoever began it.
pub const HANDSHAKE: Duration = Duration::from_secs(60);
/// How long it may be silent while something waits for its acknowledgement: about what Linux allows
/// (`tcp_retries2`).
pub const UNANSWERED: Duration = Duration::from_secs(15 * 60);

/// How long a small segment waits for its acknowledgement, unless more than one segment's worth has
/// come by then.
///
/// A guest that writes little by little holds back what is less than a segment until all before it is
/// acknowledged (RFC 896): acknowledged at once, each little write becomes a packet, an
/// acknowledgement and an interrupt of its own. Half a millisecond lets it fill whole segments, and
/// is not noticed by one that waits for an answer. Larger segments are acknowledged at once: a
/// super-segment may be all that the guest's window allows.
pub const ACK_DELAY: Duration = Duration::from_micros(500);

/// Segments sent in one turn while other flows wait for theirs: few, so that they wait not long.
const SEGMENTS_SHARED: usize = 4;
/// Segments sent in one turn of a flow that is alone: what wakes the guest, and what the guest wakes with
/// its acknowledgements, costs more than a segment does.
const SEGMENTS_ALONE: usize = 16;
/// Bytes received from the host's socket in a turn: few, so that they are still in the processor's cache
/// when they go out.
const RECEIVE_MAX: usize = 128 << 10;
/// Bytes that smoltcp is told of in a turn, where they stay with the socket.
const LEND_MAX: usize = SEGMENTS_ALONE << 16;
/// Bytes of a SYN that are kept to be quoted in an ICMP error.
const QUOTE: usize = 128;

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

/// Who is behind the connection.
enum Peer {
    /// A socket of the host's.
    Host,
    /// A service of the card's.
    Local(Box<dyn TcpService>),
    /// Nobody any more: the reset or the last segments are still to be sent.
    Gone,
}

/// How far a flow is.
enum Phase {
    /// The host connects; the beginning of the guest's SYN.
    Connecting(Box<[u8]>),
    /// Both sides are there, or the guest is being connected to.
    Open,
}

pub(super) struct TcpFlow {
    sockets: SocketSet<'static>,
    handle: SocketHandle,
    phase: Phase,
    peer: Peer,
    is_readable: bool,
    is_writable: bool,
    has_hung_up: bool,
    /// What the host's socket keeps for the guest.
    kept: Kept,
    /// Bytes put into the ring to the guest since it was empty.
    filled_to_guest: usize,
    /// Bytes put into the ring to the host since it was empty.
    filled_to_host: usize,
    /// One of [`BULK_MAX`].
    pub(super) is_bulk: bool,
    /// The host's half has ended, and the guest is told.
    host_ended: bool,
    /// The guest's half has ended, and the host was told.
    guest_ended: bool,
    /// When the guest last said anything.
    heard: Option<Instant>,
    /// Since when it owes an answer.
    owes_since: Option<Instant>,
}

fn socket() -> Socket<'static> {
    let mut socket = Socket::new(
        SocketBuffer::new(vec![0; BUFFER_TO_HOST]),
        SocketBuffer::new(vec![0; BUFFER_TO_GUEST]),
    );
    // With a timer that has no delay an acknowledgement leaves at once, see `acknowledge`.
    socket.set_ack_delay(Some(smoltcp::time::Duration::ZERO));
    // What the host has sent as one piece arrives as one.
    socket.set_nagle_enabled(false);
    socket
}

impl TcpFlow {
    fn new(socket: Socket<'static>, phase: Phase, peer: Peer) -> Self {
        let mut sockets = SocketSet::new(Vec::with_capacity(1));
        let handle = sockets.add(socket);
        Self {
            sockets,
            handle,
            phase,
            peer,
            is_readable: false,
            is_writable: false,
            has_hung_up: false,
            kept: Kept::default(),
            filled_to_guest: 0,
            filled_to_host: 0,
            is_bulk: false,
            host_ended: false,
            guest_ended: false,
            heard: None,
            owes_since: None,
        }
    }

    /// Waits for the SYN that is about to be handed in.
    fn outward(key: &FlowKey, syn: &[u8], peer: Peer) -> Option<Self> {
        let mut socket = socket();
        socket.listen(key.peer).ok()?;
        let is_local = matches!(peer, Peer::Local(_));
        socket.pause_synack(!is_local);
        let phase = if is_local {
            Phase::Open
        } else {
            Phase::Connecting(syn.get(..QUOTE).unwrap_or(syn).into())
        };
        Some(Self::new(socket, phase, peer))
    }

    /// Connects to the guest.
    pub(super) fn inward(
        guest: SocketAddr,
        peer: SocketAddr,
        context: &mut Context,
    ) -> Option<Self> {
        let mut socket = socket();
        socket.connect(context, guest, peer).ok()?;
        let mut flow = Self::new(socket, Phase::Open, Peer::Host);
        flow.is_readable = true;
        flow.is_writable = true;
        Some(flow)
    }

    /// Says how soon what is about to come is acknowledged.
    fn acknowledge(&mut self, is_small: bool) {
        let delay = if is_small { ACK_DELAY } else { Duration::ZERO };
        let socket = self.sockets.get_mut::<Socket<'_>>(self.handle);
        socket.set_ack_delay(Some(delay.into()));
    }

    pub(super) fn has_socket(&self) -> bool {
        matches!(self.peer, Peer::Host)
    }

    pub(super) fn on_host(&mut self, event: Event) {
        self.is_readable |= event.readable || event.hangup;
        self.is_writable |= event.writable;
        self.has_hung_up |= event.hangup;
    }

    /// Whether something was sent.
    fn egress<W: Wire, H: Host>(&mut self, bench: &mut Bench<'_, W, H>) -> bool {
        let time = bench.time();
        let mut payload = Payload {
            flow: bench.id,
            kept: &mut self.kept,
            host: bench.host,
        };
        let mut port = Port {
            ingress: None,
            source: Some(&mut payload),
            wire: bench.wire,
            scratch: bench.scratch,
            ends: bench.ends,
            caps: bench.caps,
            accepts: bench.accepts,
        };
        let polled = bench.iface.poll_egress(time, &mut port, &mut self.sockets);
        polled == PollResult::SocketStateChanged
    }

    fn abort(&mut self) {
        self.sockets.get_mut::<Socket<'_>>(self.handle).abort();
        self.peer = Peer::Gone;
        self.phase = Phase::Open;
    }

    pub(super) fn turn<W: Wire, H: Host>(&mut self, bench: &mut Bench<'_, W, H>) -> Turn {
        if let Phase::Connecting(syn) = &self.phase {
            if self.sockets.get::<Socket<'_>>(self.handle).state() != State::SynReceived {
                // The guest has given up.
                bench.host.close(bench.id, true);
                return Turn::Over;
            }
            if !self.is_writable && !self.has_hung_up {
                return Turn::Wait(None);
            }
            match bench.host.connected(bench.id) {
                Ok(()) => {
                    self.phase = Phase::Open;
                    let socket = self.sockets.get_mut::<Socket<'_>>(self.handle);
                    socket.pause_synack(false);
                }
                Err(error) => {
                    bench.stats.connect_failed.inc();
                    bench.host.close(bench.id, false);
                    match unreachable(&error) {
                        Some(Unreachable::Port) => self.abort(),
                        Some(why) => {
                            let syn = syn.clone();
                            let (from, to) = self.addresses();
                            bench.unreachable(from, to, why, &syn);
                            return Turn::Over;
                        }
                        // Silence: the guest's own patience decides.
                        None => return Turn::Over,
                    }
                }
            }
        }
        let mut left = segments_max(bench.is_alone);
        // The second round finds out that there is nothing to do, most often.
        for _ in 0..2 {
            let mut has_moved = match self.peer {
                Peer::Host => self.pump(bench),
                Peer::Local(_) => self.pump_local(bench.now),
                Peer::Gone => false,
            };
            while left > 0 && self.egress(bench) {
                has_moved = true;
                left -= 1;
            }
            if left == 0 {
                break;
            }
            if !has_moved {
                return self.rest(bench);
            }
        }
        Turn::Again
    }

    /// The guest's end and the other, for errors to the guest: from, to.
    fn addresses(&self) -> (std::net::IpAddr, std::net::IpAddr) {
        let socket = self.sockets.get::<Socket<'_>>(self.handle);
        let of = |end: Option<smoltcp::wire::IpEndpoint>| {
            end.map_or(std::net::Ipv4Addr::UNSPECIFIED.into(), |end| {
                end.addr.into()
            })
        };
        (of(socket.local_endpoint()), of(socket.remote_endpoint()))
    }

    /// When a guest that stays silent is given up; `None`: it owes nothing.
    fn patience(&mut self, now: Instant) -> Option<Instant> {
        let socket = self.sockets.get::<Socket<'_>>(self.handle);
        let (limit, counts_all) = match socket.state() {
            State::SynSent | State::SynReceived => (HANDSHAKE, false),
            State::FinWait1 | State::Closing | State::LastAck => (UNANSWERED, true),
            _ if socket.send_queue() > 0 => (UNANSWERED, true),
            _ => {
                self.owes_since = None;
                return None;
            }
        };
        let since = *self.owes_since.get_or_insert(now);
        let heard = self.heard.filter(|_| counts_all).unwrap_or(since);
        since.max(heard).checked_add(limit)
    }

    /// Nothing could be moved or sent: what to wait for.
    fn rest<W: Wire, H: Host>(&mut self, bench: &mut Bench<'_, W, H>) -> Turn {
        let socket = self.sockets.get::<Socket<'_>>(self.handle);
        let state = socket.state();
        let is_over = match state {
            // An aborted socket has a peer until its reset is sent.
            State::Closed => socket.remote_endpoint().is_none(),
            State::TimeWait => true,
            State::Listen => true,
            _ => false,
        };
        if is_over {
            if self.has_socket() {
                let is_graceful = self.host_ended && self.guest_ended;
                bench.host.close(bench.id, !is_graceful);
            }
            return Turn::Over;
        }
        let time = bench.time();
        let at = bench.iface.poll_at(time, &self.sockets);
        if at.is_some_and(|at| at <= time) {
            // It would send, if there were room.
            return Turn::Again;
        }
        let at = at.map(|at| {
            let micros = (at - time).total_micros();
            // Rounded up: a timer that fires early finds nothing to do, for ever.
            bench.now + std::time::Duration::from_micros(micros.max(1))
        });
        let patience = self.patience(bench.now);
        if patience.is_some_and(|at| at <= bench.now) && !matches!(self.peer, Peer::Gone) {
            if self.has_socket() {
                bench.host.close(bench.id, true);
            }
            self.abort();
            return Turn::Again;
        }
        let deadline = match &self.peer {
            Peer::Local(service) => patience.into_iter().chain(service.deadline()).min(),
            Peer::Gone => Some(after(bench.now, 60)),
            Peer::Host => patience,
        };
        if let Peer::Local(_) = &self.peer
            && deadline.is_some_and(|at| at <= bench.now)
        {
            self.abort();
            return Turn::Again;
        }
        Turn::Wait(match (at, deadline) {
            (Some(at), Some(deadline)) => Some(at.min(deadline)),
            (at, deadline) => at.or(deadline),
        })
    }

    /// Whether the guest's segment of `len` bytes of payload may come in.
    fn admits(&mut self, len: usize, bulk: &mut usize) -> bool {
        let socket = self.sockets.get::<Socket<'_>>(self.handle);
        if socket.recv_queue() == 0 {
            self.filled_to_host = 0;
        }
        let may = self.filled_to_host + len <= BUFFER_SMALL || grows(&mut self.is_bulk, bulk);
        self.filled_to_host += if may { len } else { 0 };
        may
    }

    /// Moves bytes between the guest and the host's socket. Whether it did, or ended something.
    fn pump<W: Wire, H: Host>(&mut self, bench: &mut Bench<'_, W, H>) -> bool {
        let (id, host) = (bench.id, &mut *bench.host);
        let to_guest = if self.kept.keeps(bench.accepts.partial, id, host) {
            self.lend(id, host)
        } else {
            self.fill(id, host, bench.bulk)
        };
        match to_guest.and_then(|moved| Ok(moved | self.drain(id, host)?)) {
            Ok(has_moved) => has_moved,
            Err(_) => {
                host.close(id, false);
                self.abort();
                true
            }
        }
    }

    /// The host's half has ended.
    fn end_host(&mut self) {
        self.host_ended = true;
        self.is_readable = false;
        self.sockets.get_mut::<Socket<'_>>(self.handle).close();
    }

    /// Tells smoltcp of bytes that the host's socket keeps, and drops there what the guest has
    /// acknowledged. Whether there was anything.
    fn lend<H: Host>(&mut self, id: usize, host: &mut H) -> io::Result<bool> {
        let socket = self.sockets.get_mut::<Socket<'_>>(self.handle);
        let unanswered = socket.send_queue();
        if self.kept.should_drop(unanswered) {
            self.kept.drop_to(unanswered, id, host)?;
        }
        if !self.is_readable || self.host_ended || !socket.can_send() {
            return Ok(false);
        }
        let there = self.kept.new_bytes(id, host)?;
        let mut left = there.min(LEND_MAX);
        let mut has_moved = false;
        // The ring's room may be in two pieces.
        while left > 0
            && let Ok(told) = socket.send(|ring| (ring.len().min(left), ring.len().min(left)))
            && told > 0
        {
            self.kept.told(told);
            left -= told;
            has_moved = true;
        }
        // What comes behind what was there is a new edge, but for the end.
        self.is_readable = there > LEND_MAX || left > 0 || self.has_hung_up;
        if there > 0 || !self.has_hung_up {
            return Ok(has_moved);
        }
        match self.kept.is_at_end(id, host) {
            Ok(true) => {
                self.end_host();
                Ok(true)
            }
            Ok(false) => Ok(false),
            Err(error) if is_temporary(&error) => {
                self.is_readable = error.kind() == io::ErrorKind::Interrupted;
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// Receives from the host's socket into smoltcp's ring. Whether there was anything.
    fn fill<H: Host>(&mut self, id: usize, host: &mut H, bulk: &mut usize) -> io::Result<bool> {
        let socket = self.sockets.get_mut::<Socket<'_>>(self.handle);
        let mut has_moved = false;
        if socket.send_queue() == 0 {
            self.filled_to_guest = 0;
        }
        let mut left = RECEIVE_MAX;
        if self.is_readable
            && self.filled_to_guest + left > BUFFER_SMALL
            && !grows(&mut self.is_bulk, bulk)
        {
            left = BUFFER_SMALL.saturating_sub(self.filled_to_guest);
        }
        while self.is_readable && !self.host_ended && left > 0 && socket.can_send() {
            let mut room = 0;
            let received = socket.send(|buffer| {
                room = buffer.len().min(left);
                let buffer = buffer.get_mut(..room).unwrap_or_default();
                let received = host.recv(id, buffer);
                (*received.as_ref().unwrap_or(&0), received)
            });
            match received {
                Ok(Ok(0)) => {
                    self.end_host();
                    return Ok(true);
                }
                Ok(Ok(n)) => {
                    has_moved = true;
                    left -= n;
                    self.filled_to_guest += n;
                    // A short receive has drained the socket, but for its end.
                    self.is_readable = n == room || self.has_hung_up;
                }
                Ok(Err(error)) if is_temporary(&error) => {
                    self.is_readable = error.kind() == io::ErrorKind::Interrupted;
                }
                Ok(Err(error)) => return Err(error),
                Err(_) => break,
            }
        }
        Ok(has_moved)
    }

    /// Sends to the host's socket what came from the guest. Whether there was anything.
    fn drain<H: Host>(&mut self, id: usize, host: &mut H) -> io::Result<bool> {
        let socket = self.sockets.get_mut::<Socket<'_>>(self.handle);
        let mut has_moved = false;
        while self.is_writable && socket.can_recv() {
            let mut had = 0;
            let sent = socket.recv(|buffer| {
                had = buffer.len();
                let sent = host.send(id, buffer);
                (*sent.as_ref().unwrap_or(&0), sent)
            });
            match sent {
                Ok(Ok(n)) => {
                    has_moved |= n > 0;
                    self.is_writable = n == had;
                }
                Ok(Err(error)) if is_temporary(&error) => {
                    self.is_writable = error.kind() == io::ErrorKind::Interrupted;
                }
                Ok(Err(error)) => return Err(error),
                Err(_) => break,
            }
        }
        if !self.guest_ended && has_ended(socket) {
            self.guest_ended = true;
            host.finish(id);
            has_moved = true;
        }
        Ok(has_moved)
    }

    /// The same for a service of the card's.
    fn pump_local(&mut self, now: Instant) -> bool {
        let socket = self.sockets.get_mut::<Socket<'_>>(self.handle);
        let Peer::Local(service) = &mut self.peer else {
            return false;
        };
        let mut has_moved = false;
        while socket.can_recv() {
            let received = socket.recv(|bytes| {
                if !service.is_done() {
                    service.receive(bytes, now);
                }
                (bytes.len(), bytes.len())
            });
            match received {
                Ok(n) if n > 0 => has_moved = true,
                _ => break,
            }
        }
        if !self.guest_ended && has_ended(socket) {
            self.guest_ended = true;
            service.end(now);
            has_moved = true;
        }
        if !service.output().is_empty() {
            socket.set_hop_limit(Some(service.hop_limit()));
        }
        while socket.can_send() && !service.output().is_empty() {
            let output = service.output();
            let (front, _) = output.as_slices();
            let Ok(sent) = socket.send_slice(front) else {
                break;
            };
            output.drain(..sent);
            has_moved |= sent > 0;
        }
        if !self.host_ended && service.is_done() && service.output().is_empty() {
            self.host_ended = true;
            socket.close();
            has_moved = true;
        }
        has_moved
    }
}

/// Whether a flow may use the whole of its buffers; it becomes one of those that do if there is room.
fn grows(is_bulk: &mut bool, bulk: &mut usize) -> bool {
    if !*is_bulk && *bulk < BULK_MAX {
        *is_bulk = true;
        *bulk += 1;
    }
    *is_bulk
}

fn segments_max(is_alone: bool) -> usize {
    if is_alone {
        SEGMENTS_ALONE
    } else {
        SEGMENTS_SHARED
    }
}

/// Whether the guest has ended its half and all of it was taken.
fn has_ended(socket: &Socket<'_>) -> bool {
    let state = socket.state();
    matches!(
        state,
        State::CloseWait | State::LastAck | State::Closing | State::TimeWait
    ) && !socket.can_recv()
}

impl Stack {
    #[allow(clippy::too_many_arguments)] // one call, one place
    pub(super) fn tcp_from_guest<W: Wire, H: Host>(
        &mut self,
        frame: &Frame<'_>,
        packet: &Packet,
        key: FlowKey,
        flags: u8,
        now: Instant,
        wire: &mut W,
        host: &mut H,
        locals: &mut dyn Locals,
    ) -> Option<u16> {
        let bytes = frame.ip_bytes();
        let id = match self.by_key.get(&key) {
            Some(&id) => id,
            None if flags & (SYN | ACK | RST) != SYN => {
                self.reset(bytes, now, wire);
                return None;
            }
            None => match self.open_tcp(packet, bytes, key, now, wire, host, locals) {
                Opened::Here(id) => id,
                Opened::Elsewhere(pair) => return Some(pair),
                Opened::No => return None,
            },
        };
        let Flow::Tcp(flow) = &mut self.flows.get_mut(id)?.flow else {
            return None;
        };
        flow.heard = Some(now);
        if let Transport::Tcp { payload, .. } = packet.transport
            && !flow.admits(packet.end.saturating_sub(payload), &mut self.bulk)
        {
            self.stats.segments_dropped.inc();
            return None;
        }
        let is_short = 2 * frame.transport_bytes().len() < usize::from(self.spec.mtu);
        flow.acknowledge(is_short && flags & (SYN | FIN) == 0);
        let mut port = Port {
            ingress: Some(bytes),
            source: None,
            wire,
            scratch: &mut self.scratch,
            ends: super::ends(&self.spec),
            caps: &self.caps,
            accepts: self.settings.accepts,
        };
        let time = smoltcp_time(self.epoch, now);
        self.iface
            .poll_ingress_single(time, &mut port, &mut flow.sockets);
        self.make_ready(id);
        None
    }

    #[allow(clippy::too_many_arguments)] // one call, one place
    fn open_tcp<W: Wire, H: Host>(
        &mut self,
        packet: &Packet,
        bytes: &[u8],
        key: FlowKey,
        now: Instant,
        wire: &mut W,
        host: &mut H,
        locals: &mut dyn Locals,
    ) -> Opened {
        let (to, peer) = match self.route(packet.destination) {
            Route::Host(to) => (Some(to), Peer::Host),
            Route::Card => match locals.connect(key.peer, key.guest) {
                Some(service) => (None, Peer::Local(service)),
                None => {
                    self.reset(bytes, now, wire);
                    return Opened::No;
                }
            },
            Route::None => {
                self.stats.unroutable.inc();
                self.refuse(packet, bytes, Unreachable::Host, wire);
                return Opened::No;
            }
        };
        match self.claim(&key) {
            Claim::Granted => {}
            Claim::Of(pair) => return Opened::Elsewhere(pair),
            Claim::Full => {
                self.reset(bytes, now, wire);
                return Opened::No;
            }
        }
        let Some(flow) = TcpFlow::outward(&key, bytes, peer) else {
            self.release(&key);
            return Opened::No;
        };
        let id = self.insert(key, Flow::Tcp(Box::new(flow)));
        self.stats.tcp_opened.inc();
        let Some(to) = to else {
            return Opened::Here(id);
        };
        if let Err(error) = host.open(id, Kind::Tcp, (to, key.peer.port()).into()) {
            self.stats.connect_failed.inc();
            self.remove(id);
            match unreachable(&error) {
                Some(Unreachable::Port) | None => self.reset(bytes, now, wire),
                Some(why) => self.refuse(packet, bytes, why, wire),
            }
            return Opened::No;
        }
        Opened::Here(id)
    }
}
