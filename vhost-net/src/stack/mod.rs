//! The engine: flows of the guest's on one side, sockets of the host's on the other, no I/O of its
//! own.
//!
//! ```text
//!  guest's frames ─► Stack::from_guest ─┐                 ┌─► Wire::send ─► guest
//!                                       ├─► a flow's turn ┤
//!  host's events ──► Stack::on_host ────┤                 └─► Host::{open, send, recv, ..}
//!  time ───────────► Stack::on_time ────┘
//! ```
//!
//! # One socket set for each flow
//! smoltcp looks through all sockets of a set for every packet and every poll: a thousand idle
//! flows make a bulk one ten times slower. So a flow is found by its 5-tuple in a hash table and
//! polled alone, through one shared interface that accepts every destination.
//!
//! # Turns
//! A flow that has something to do stands in a queue; its turn moves a bounded number of bytes and
//! segments, and if more is left it stands at the end again. So a bulk flow does not starve others,
//! and when the guest takes no packets all stand still where they are, with their windows closing:
//! no queue grows. Timers are a heap with at most a few entries a flow.
//!
//! # Limits
//! [`Settings::flows_max`] bounds the table, or those of all queue pairs together; a full one answers
//! new connections with a reset and drops new datagrams, and counts both. A TCP flow holds twice
//! [`tcp::BUFFER_SMALL`] bytes at most, and [`tcp::BULK_MAX`] of each queue pair hold
//! [`tcp::BUFFER_TO_HOST`] plus [`tcp::BUFFER_TO_GUEST`]: with one pair 1.5 GiB, and 4 GiB for 8192 others,
//! if the guest does its worst. Where sockets keep the bytes for the guest (see `kept`), the second of
//! either is the kernel's, and bounded by the host's `tcp_rmem`. Pages that were never needed are never touched: a silent flow takes
//! 36 KiB.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use offload::telemetry::Counter;
use slab::Slab;
use smoltcp::iface::{Config, Interface, SocketSet};
use smoltcp::phy::DeviceCapabilities;
use smoltcp::wire::HardwareAddress;
use vm_memory::VolatileSlice;

use crate::frame::header::NetHeader;
use crate::frame::{Frame, Net, Packet, TCP, Transport, UDP};
use crate::local::{Direction, FlowKey, Outgoing, TcpService};
use crate::spec::{self, Spec};

mod datagram;
mod emit;
mod hollow;
mod kept;
mod owners;
mod port;
mod tcp;

pub use datagram::{UDP_ONE_WAY, UDP_STREAM};
pub use emit::{Ends, Unreachable};
use owners::Claim;
pub use owners::{Owners, Share};
pub use port::Accepts;
use port::{Port, Scratch};
pub use tcp::{
    ACK_DELAY, BUFFER_SMALL, BUFFER_TO_GUEST, BUFFER_TO_HOST, BULK_MAX, HANDSHAKE, UNANSWERED,
};

#[cfg(test)]
mod tests;

/// Turns in one run, so that rings and sockets are looked at in between.
const TURNS_MAX: usize = 256;
/// Ports for peers that cannot keep their address: the dynamic ones (RFC 6335, 6).
const PORT_FIRST: u16 = 49152;
const PORTS: u16 = 16384;
/// Queue pairs that begin apart from each other in these.
const PAIRS: u16 = 8;

/// Where frames for the guest go.
pub trait Wire {
    /// Whether a frame of any size can be taken now.
    fn has_room(&self) -> bool;

    /// Whether it has taken so much that the guest should see it before the next flow's turn.
    fn has_enough(&self) -> bool {
        false
    }

    /// Takes a frame, whose Ethernet header comes first. When there is no room it may be dropped.
    fn send(&mut self, header: NetHeader, frame: &[u8]);

    /// Takes a frame that begins with `head`, and whose other `len` bytes are elsewhere: `read` copies
    /// them to where the frame is to be, or says that it cannot; the frame is lost then.
    fn send_from(&mut self, header: NetHeader, head: &[u8], len: usize, read: Read<'_>) {
        if let Some(frame) = gathered(head, len, read) {
            self.send(header, &frame);
        }
    }
}

/// Copies the bytes of a frame to where they are to be, and says whether it could.
pub type Read<'a> = &'a mut dyn FnMut(&[VolatileSlice<'_>]) -> bool;

/// A frame in one piece. `None`: its bytes are not there.
pub(crate) fn gathered(head: &[u8], len: usize, read: Read<'_>) -> Option<Vec<u8>> {
    let mut frame = vec![0; head.len() + len];
    let (front, rest) = frame.split_at_mut(head.len());
    front.copy_from_slice(head);
    read(&[VolatileSlice::from(rest)]).then_some(frame)
}

/// Whether what the host cannot do now it may do later.
fn is_temporary(error: &io::Error) -> bool {
    use io::ErrorKind::{Interrupted, WouldBlock};
    matches!(error.kind(), WouldBlock | Interrupted)
}

/// What kind of socket a flow needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A stream; [`Host::open`] only begins to connect.
    Tcp,
    /// Datagrams, connected.
    Udp {
        /// The guest wants to be told of a path that is too narrow.
        dont_fragment: bool,
    },
    /// Echo requests. What is sent and received starts with the ICMP header.
    Ping,
}

/// The host's sockets, each under the number of its flow. All calls return at once.
pub trait Host {
    /// Makes a socket and connects it. For TCP, an event says when the connection is there or has
    /// failed.
    ///
    /// # Errors
    /// The kernel's.
    fn open(&mut self, flow: usize, kind: Kind, to: SocketAddr) -> io::Result<()>;

    /// What became of a connection under way.
    ///
    /// # Errors
    /// It failed.
    fn connected(&mut self, flow: usize) -> io::Result<()>;

    /// Receives; 0 at the end of a stream.
    ///
    /// # Errors
    /// The kernel's; `WouldBlock`: nothing there.
    fn recv(&mut self, flow: usize, buffer: &mut [u8]) -> io::Result<usize>;

    /// Lets a stream's socket keep what it receives until [`Self::discard`]: see [`Self::peek`]. False:
    /// it cannot; then none of these calls are made.
    fn keep(&mut self, flow: usize) -> bool {
        let _ = flow;
        false
    }

    /// Bytes that the socket keeps.
    ///
    /// # Errors
    /// The kernel's.
    fn pending(&mut self, flow: usize) -> io::Result<usize> {
        let _ = flow;
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Copies kept bytes, from the one at `at` on; 0 at the end of a stream.
    ///
    /// # Errors
    /// The kernel's; `WouldBlock`: nothing there.
    fn peek(&mut self, flow: usize, at: usize, into: &[VolatileSlice<'_>]) -> io::Result<usize> {
        let _ = (flow, at, into);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Drops the first kept bytes, at most so many; gives how many.
    ///
    /// # Errors
    /// The kernel's.
    fn discard(&mut self, flow: usize, count: usize) -> io::Result<usize> {
        let _ = (flow, count);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Sends.
    ///
    /// # Errors
    /// The kernel's; `WouldBlock`: no room.
    fn send(&mut self, flow: usize, bytes: &[u8]) -> io::Result<usize>;

    /// Sends a datagram from a published port.
    ///
    /// # Errors
    /// The kernel's.
    fn send_from(&mut self, published: usize, to: SocketAddr, bytes: &[u8]) -> io::Result<usize>;

    /// Says that no more will be sent.
    fn finish(&mut self, flow: usize);

    /// Closes; with a reset to the other side if `is_reset`.
    fn close(&mut self, flow: usize, is_reset: bool);

    /// Changes whether the path may fragment what a datagram socket sends.
    fn set_dont_fragment(&mut self, flow: usize, dont_fragment: bool) {
        let _ = (flow, dont_fragment);
    }

    /// What the path of a datagram socket takes, in bytes of IP packet.
    fn path_mtu(&mut self, flow: usize) -> Option<u32>;

    /// Sets how many routers the datagrams of a socket may pass, and lets [`Self::report`] have what
    /// they say.
    ///
    /// # Errors
    /// The kernel's.
    fn set_hops(&mut self, flow: usize, is_v4: bool, hops: u8) -> io::Result<()> {
        let _ = (flow, is_v4, hops);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Takes an ICMP error about what a datagram socket has sent, if one is kept.
    fn report(&mut self, flow: usize) -> Option<Report> {
        let _ = flow;
        None
    }

    /// Asks a server something for the card itself, from a socket of its own; what it says is handed
    /// in with the token until [`Self::forget`].
    ///
    /// # Errors
    /// The kernel's.
    fn ask(&mut self, question: &Outgoing) -> io::Result<()> {
        let _ = question;
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Waits no more for what the server says.
    fn forget(&mut self, token: u64) {
        let _ = token;
    }
}

/// An ICMP error that came to a socket of the host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    /// Who says so.
    pub from: Option<IpAddr>,
    /// ICMP or ICMPv6 type.
    pub kind: u8,
    /// And code.
    pub code: u8,
    /// What is in its header besides: the MTU.
    pub rest: u32,
    /// Which echo request it is about.
    pub sequence: Option<u16>,
}

/// What services of the card's take streams.
pub trait Locals {
    /// The service at an address of the card's. `None`: the connection is refused.
    fn connect(&mut self, to: SocketAddr, from: SocketAddr) -> Option<Box<dyn TcpService>>;
}

/// What an event says about a socket of the host's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Event {
    /// There is something to receive, perhaps an error.
    pub readable: bool,
    /// There is room to send.
    pub writable: bool,
    /// The other side has ended its half, or both.
    pub hangup: bool,
}

/// How the engine behaves.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Most flows at once.
    pub flows_max: usize,
    /// Addresses at which the guest reaches the host's loopback.
    pub host_loopback: Vec<IpAddr>,
    /// How long a UDP flow lives on when only one side has spoken.
    pub udp_one_way: Duration,
    /// How long it lives on when both have.
    pub udp_stream: Duration,
    /// What the driver accepted.
    pub accepts: Accepts,
    /// Where flows of other queue pairs are found; `None`: there is one pair.
    pub share: Option<Share>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            flows_max: 8192,
            host_loopback: Vec::new(),
            udp_one_way: UDP_ONE_WAY,
            udp_stream: UDP_STREAM,
            accepts: Accepts::default(),
            share: None,
        }
    }
}

/// What the engine counts.
#[derive(Debug, Default)]
pub struct Stats {
    /// TCP flows opened.
    pub tcp_opened: Counter,
    /// UDP flows opened.
    pub udp_opened: Counter,
    /// Echo flows opened.
    pub ping_opened: Counter,
    /// Flows closed, of every kind.
    pub closed: Counter,
    /// Flows not opened because the table was full.
    pub table_full: Counter,
    /// Connections that the host refused or could not make.
    pub connect_failed: Counter,
    /// TCP segments that were dropped for want of memory while the host stood still.
    pub segments_dropped: Counter,
    /// Datagrams that the host's socket did not take.
    pub datagrams_dropped: Counter,
    /// Packets to where the guest may not send: loopback, multicast, other guests' addresses.
    pub unroutable: Counter,
    /// Fragments and protocols that no flow carries.
    pub unsupported: Counter,
    /// Echo requests for which the kernel gave no socket (`net.ipv4.ping_group_range`).
    pub ping_forbidden: Counter,
}

/// Where a guest's packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Route {
    /// Out, to this address.
    Host(IpAddr),
    /// To the card itself.
    Card,
    /// Nowhere.
    None,
}

enum Flow {
    Tcp(Box<tcp::TcpFlow>),
    Datagram(Box<datagram::DatagramFlow>),
}

struct Entry {
    flow: Flow,
    key: FlowKey,
    is_ready: bool,
    /// The earliest entry of it in the heap.
    timer: Option<Instant>,
    /// Tells the flow from earlier ones in the same place.
    serial: u64,
}

/// What became of a packet that has no flow yet.
enum Opened {
    /// It has this one now.
    Here(usize),
    /// Its flow is with this queue pair.
    Elsewhere(u16),
    /// It gets none.
    No,
}

/// What a turn left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// Another turn is wanted as soon as there is room.
    Again,
    /// Nothing until an event, or until this time.
    Wait(Option<Instant>),
    /// The flow is over.
    Over,
}

/// All that a turn may use besides its flow.
struct Bench<'a, W, H> {
    id: usize,
    now: Instant,
    wire: &'a mut W,
    host: &'a mut H,
    iface: &'a mut Interface,
    scratch: &'a mut Scratch,
    caps: &'a DeviceCapabilities,
    accepts: Accepts,
    ends: Ends,
    epoch: Instant,
    mtu: u16,
    stats: &'a Stats,
    udp_one_way: Duration,
    udp_stream: Duration,
    /// No other flow waits for a turn.
    is_alone: bool,
    identification: &'a mut u32,
    /// Flows that use all of their buffers.
    bulk: &'a mut usize,
}

impl<W: Wire, H: Host> Bench<'_, W, H> {
    fn time(&self) -> smoltcp::time::Instant {
        smoltcp_time(self.epoch, self.now)
    }

    /// An ICMP error to the guest about a packet that begins with `quote`.
    fn unreachable(&mut self, from: IpAddr, to: IpAddr, why: Unreachable, quote: &[u8]) {
        if !self.wire.has_room() {
            return;
        }
        let frame = self.scratch.bytes();
        if let Some(len) = emit::error(frame, self.ends, from, to, why, quote)
            && let Some(frame) = frame.get(..len)
        {
            self.wire.send(NetHeader::default(), frame);
        }
    }
}

fn smoltcp_time(epoch: Instant, now: Instant) -> smoltcp::time::Instant {
    let micros = now.saturating_duration_since(epoch).as_micros();
    smoltcp::time::Instant::from_micros(i64::try_from(micros).unwrap_or(i64::MAX))
}

/// Classifies what the kernel said about a path. `None`: no ICMP error has that meaning.
fn unreachable(error: &io::Error) -> Option<Unreachable> {
    use rustix::io::Errno;
    let errno = Errno::from_io_error(error)?;
    Some(match errno {
        Errno::CONNREFUSED => Unreachable::Port,
        Errno::HOSTUNREACH | Errno::HOSTDOWN => Unreachable::Host,
        Errno::NETUNREACH | Errno::NETDOWN | Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL => {
            Unreachable::Network
        }
        Errno::ACCESS | Errno::PERM => Unreachable::Prohibited,
        _ => return None,
    })
}

/// See the module.
pub struct Stack {
    spec: Arc<Spec>,
    settings: Settings,
    stats: Arc<Stats>,
    epoch: Instant,
    iface: Interface,
    caps: DeviceCapabilities,
    scratch: Scratch,
    flows: Slab<Entry>,
    by_key: HashMap<FlowKey, usize, foldhash::fast::RandomState>,
    ready: VecDeque<usize>,
    timers: BinaryHeap<Reverse<(Instant, usize, u64)>>,
    serial: u64,
    identification: u32,
    /// Flows that use all of their buffers.
    bulk: usize,
    next_port: u16,
}

impl std::fmt::Debug for Stack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stack")
            .field("flows", &self.flows.len())
            .finish_non_exhaustive()
    }
}

/// A wire for making the interface, which is polled for nothing but its capabilities then.
struct NoWire;

impl Wire for NoWire {
    fn has_room(&self) -> bool {
        false
    }
    fn send(&mut self, _: NetHeader, _: &[u8]) {}
}

impl Stack {
    /// An engine without flows. `seed` is for what must not be guessed: sequence numbers.
    #[must_use]
    pub fn new(
        spec: Arc<Spec>,
        settings: Settings,
        stats: Arc<Stats>,
        seed: u64,
        now: Instant,
    ) -> Self {
        let caps = port::capabilities(spec.mtu, settings.accepts);
        let pair = settings.share.as_ref().map_or(0, |share| share.pair);
        let next_port = pair.wrapping_mul(PORTS / PAIRS);
        let mut scratch = Scratch::new();
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = seed;
        let mut port = Port {
            ingress: None,
            source: None,
            wire: &mut NoWire,
            scratch: &mut scratch,
            ends: ends(&spec),
            caps: &caps,
            accepts: settings.accepts,
        };
        let mut iface = Interface::new(config, &mut port, smoltcp_time(now, now));
        iface.set_any_ip(true);
        Self {
            spec,
            settings,
            stats,
            epoch: now,
            iface,
            caps,
            scratch,
            flows: Slab::new(),
            by_key: HashMap::default(),
            ready: VecDeque::new(),
            timers: BinaryHeap::new(),
            serial: 0,
            identification: seed as u32,
            bulk: 0,
            // Pairs begin apart from each other, so that they seldom choose the same.
            next_port,
        }
    }

    /// Bytes of an IP packet to the guest, at most.
    #[must_use]
    pub fn mtu(&self) -> u16 {
        self.spec.mtu
    }

    /// Flows there are.
    #[must_use]
    pub fn flow_count(&self) -> usize {
        self.flows.len()
    }

    /// Whether a flow is there.
    #[must_use]
    pub fn has_flow(&self, key: &FlowKey) -> bool {
        self.by_key.contains_key(key)
    }

    fn route(&self, to: IpAddr) -> Route {
        if self.settings.host_loopback.contains(&to) {
            return Route::Host(match to {
                IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
                IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
            });
        }
        if self.spec.is_card(to) {
            return Route::Card;
        }
        let is_outside = match to {
            IpAddr::V4(v4) => {
                !(v4.is_loopback()
                    || v4.is_unspecified()
                    || v4.is_multicast()
                    || v4.is_broadcast()
                    || v4.is_link_local()
                    || v4.octets()[0] == 0
                    || self.spec.v4.is_some_and(|own| own.contains(v4)))
            }
            IpAddr::V6(v6) => {
                !(v6.is_loopback()
                    || v6.is_unspecified()
                    || v6.is_multicast()
                    || spec::is_link_local(v6)
                    || v6.to_ipv4_mapped().is_some()
                    || self.spec.v6.is_some_and(|own| own.contains(v6)))
            }
        };
        if is_outside {
            Route::Host(to)
        } else {
            Route::None
        }
    }

    /// The card's address as the guest sees it, of the family of `like`.
    fn own_address(&self, like: IpAddr) -> IpAddr {
        match like {
            IpAddr::V4(_) => self
                .spec
                .v4
                .map_or(Ipv4Addr::UNSPECIFIED, |v4| v4.gateway)
                .into(),
            IpAddr::V6(_) => self
                .spec
                .v6
                .map_or(Ipv6Addr::UNSPECIFIED, |v6| v6.gateway)
                .into(),
        }
    }

    /// The other queue pair that has the flow of this packet, if one has.
    #[must_use]
    pub fn elsewhere(&self, packet: &Packet) -> Option<u16> {
        let share = self.settings.share.as_ref()?;
        if packet.transport == Transport::Fragment {
            // One pair puts them together: those of a packet may come through several.
            return (share.pair != 0).then_some(0);
        }
        let key = flow_key(packet)?;
        if self.by_key.contains_key(&key) {
            return None;
        }
        share.elsewhere(&key)
    }

    /// Takes a frame of the guest's. It is an IP packet from an address that the guest may have,
    /// and neither a service's nor refused by policy. `Some`: nothing was done, since this queue
    /// pair opened its flow at the same moment.
    pub fn from_guest<W: Wire, H: Host>(
        &mut self,
        frame: &Frame<'_>,
        now: Instant,
        wire: &mut W,
        host: &mut H,
        locals: &mut dyn Locals,
    ) -> Option<u16> {
        let Net::Ip(packet) = &frame.net else {
            self.stats.unsupported.inc();
            return None;
        };
        let Some(key) = flow_key(packet) else {
            self.stats.unsupported.inc();
            return None;
        };
        match packet.transport {
            Transport::Tcp { flags, .. } => {
                self.tcp_from_guest(frame, packet, key, flags, now, wire, host, locals)
            }
            Transport::Udp { .. }
            | Transport::Icmp {
                kind: 8 | 128,
                code: 0,
                ..
            } => self.datagram_from_guest(frame, packet, key, now, wire, host),
            _ => {
                self.stats.unsupported.inc();
                None
            }
        }
    }

    /// Whether a flow may be opened here; if so, [`Self::insert`] or [`Self::release`] comes next.
    fn claim(&mut self, key: &FlowKey) -> Claim {
        let claim = match &self.settings.share {
            Some(share) => share.claim(key),
            None if self.flows.len() >= self.settings.flows_max => Claim::Full,
            None => Claim::Granted,
        };
        if claim == Claim::Full {
            self.stats.table_full.inc();
        }
        claim
    }

    fn release(&self, key: &FlowKey) {
        if let Some(share) = &self.settings.share {
            share.release(key);
        }
    }

    fn insert(&mut self, key: FlowKey, flow: Flow) -> usize {
        self.serial += 1;
        let id = self.flows.insert(Entry {
            flow,
            key,
            is_ready: false,
            timer: None,
            serial: self.serial,
        });
        self.by_key.insert(key, id);
        id
    }

    fn remove(&mut self, id: usize) {
        if let Some(entry) = self.flows.try_remove(id) {
            if let Flow::Tcp(flow) = &entry.flow
                && flow.is_bulk
            {
                self.bulk -= 1;
            }
            self.by_key.remove(&entry.key);
            self.release(&entry.key);
            self.stats.closed.inc();
        }
    }

    fn make_ready(&mut self, id: usize) {
        if let Some(entry) = self.flows.get_mut(id)
            && !std::mem::replace(&mut entry.is_ready, true)
        {
            self.ready.push_back(id);
        }
    }

    /// A socket of the host's has an event.
    pub fn on_host(&mut self, flow: usize, event: Event) {
        match self.flows.get_mut(flow).map(|entry| &mut entry.flow) {
            Some(Flow::Tcp(tcp)) => tcp.on_host(event),
            Some(Flow::Datagram(datagram)) => datagram.on_host(event),
            None => return,
        }
        self.make_ready(flow);
    }

    /// A service of the card's has something to say on this connection.
    pub fn wake(&mut self, key: &FlowKey) {
        if let Some(&id) = self.by_key.get(key) {
            self.make_ready(id);
        }
    }

    /// When [`Self::run`] is to be called at the latest. In the past: it has work left, if the
    /// wire has room.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.timers.peek().map(|Reverse((at, ..))| *at)
    }

    /// Whether flows wait for a turn.
    #[must_use]
    pub fn has_work(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Gives turns to flows whose time has come or that have something to do, while the wire has
    /// room.
    pub fn run<W: Wire, H: Host>(&mut self, now: Instant, wire: &mut W, host: &mut H) {
        while let Some(Reverse((at, id, serial))) = self.timers.peek().copied()
            && at <= now
        {
            self.timers.pop();
            if let Some(entry) = self.flows.get_mut(id)
                && entry.serial == serial
                && entry.timer == Some(at)
            {
                entry.timer = None;
                self.make_ready(id);
            }
        }
        for _ in 0..TURNS_MAX.min(self.ready.len()) {
            if !wire.has_room() || wire.has_enough() {
                return;
            }
            let Some(id) = self.ready.pop_front() else {
                return;
            };
            if let Some(entry) = self.flows.get_mut(id) {
                entry.is_ready = false;
                self.turn(id, now, wire, host);
            }
        }
    }

    /// One turn of one flow.
    fn turn<W: Wire, H: Host>(&mut self, id: usize, now: Instant, wire: &mut W, host: &mut H) {
        let Some(entry) = self.flows.get_mut(id) else {
            return;
        };
        let mut bench = Bench {
            id,
            now,
            wire,
            host,
            iface: &mut self.iface,
            scratch: &mut self.scratch,
            caps: &self.caps,
            accepts: self.settings.accepts,
            ends: ends(&self.spec),
            epoch: self.epoch,
            mtu: self.spec.mtu,
            stats: &self.stats,
            udp_one_way: self.settings.udp_one_way,
            udp_stream: self.settings.udp_stream,
            is_alone: self.ready.is_empty(),
            identification: &mut self.identification,
            bulk: &mut self.bulk,
        };
        let turn = match &mut entry.flow {
            Flow::Tcp(flow) => flow.turn(&mut bench),
            Flow::Datagram(flow) => flow.turn(&entry.key, &mut bench),
        };
        match turn {
            Turn::Again => self.make_ready(id),
            Turn::Wait(None) => {}
            Turn::Wait(Some(at)) => {
                if entry.timer.is_none_or(|timer| at < timer) {
                    entry.timer = Some(at);
                    let serial = entry.serial;
                    self.timers.push(Reverse((at, id, serial)));
                }
            }
            Turn::Over => self.remove(id),
        }
    }

    /// Answers a packet that belongs to no flow as TCP has it: with a reset.
    fn reset<W: Wire>(&mut self, packet: &[u8], now: Instant, wire: &mut W) {
        let mut port = Port {
            ingress: Some(packet),
            source: None,
            wire,
            scratch: &mut self.scratch,
            ends: ends(&self.spec),
            caps: &self.caps,
            accepts: self.settings.accepts,
        };
        let time = smoltcp_time(self.epoch, now);
        let mut nothing = SocketSet::new(&mut [][..]);
        self.iface
            .poll_ingress_single(time, &mut port, &mut nothing);
    }

    /// An ICMP error about a packet that never became a flow's.
    fn refuse<W: Wire>(&mut self, packet: &Packet, quote: &[u8], why: Unreachable, wire: &mut W) {
        if !wire.has_room() {
            return;
        }
        let from = match why {
            Unreachable::Port => packet.destination,
            _ => self.own_address(packet.source),
        };
        let ends = ends(&self.spec);
        let frame = self.scratch.bytes();
        if let Some(len) = emit::error(frame, ends, from, packet.source, why, quote)
            && let Some(frame) = frame.get(..len)
        {
            wire.send(NetHeader::default(), frame);
        }
    }

    /// Tells the guest what became of a packet of its own to `from`, that begins with `quote`, before
    /// any flow saw it.
    pub fn tell<W: Wire>(
        &mut self,
        from: IpAddr,
        to: IpAddr,
        why: Unreachable,
        quote: &[u8],
        wire: &mut W,
    ) {
        // RFC 1122, 3.2.2; RFC 4443, 2.4 (e).
        let is_told = match from {
            IpAddr::V4(from) => !from.is_multicast() && !from.is_broadcast(),
            IpAddr::V6(from) => !from.is_multicast(),
        };
        if !is_told || !wire.has_room() {
            return;
        }
        let ends = ends(&self.spec);
        let frame = self.scratch.bytes();
        if let Some(len) = emit::error(frame, ends, from, to, why, quote)
            && let Some(frame) = frame.get(..len)
        {
            wire.send(NetHeader::default(), frame);
        }
    }

    /// A number for a connection into the guest that cannot keep its peer's address.
    fn port(&mut self) -> u16 {
        self.next_port = self.next_port.wrapping_add(1);
        PORT_FIRST + self.next_port % PORTS
    }

    /// The guest's address in the family of `like`.
    #[must_use]
    pub fn guest_address(&self, like: IpAddr) -> Option<IpAddr> {
        match like {
            IpAddr::V4(_) => self.spec.v4.map(|v4| v4.address.into()),
            IpAddr::V6(_) => self.spec.v6.map(|v6| v6.address.into()),
        }
    }

    /// Makes a flow of a peer's connection to a port of the guest's this pair's, with a port of the
    /// card's choice for a peer that cannot keep its address.
    fn claim_inward(&mut self, peer: SocketAddr, guest_port: u16) -> Option<FlowKey> {
        let is_kept = matches!(self.route(peer.ip()), Route::Host(_));
        let tries = if is_kept { 1 } else { PORTS };
        for _ in 0..tries {
            let peer = match is_kept {
                true => peer,
                false => (self.own_address(peer.ip()), self.port()).into(),
            };
            let key = FlowKey {
                protocol: TCP,
                guest: (self.guest_address(peer.ip())?, guest_port).into(),
                peer,
            };
            if self.by_key.contains_key(&key) {
                continue;
            }
            match self.claim(&key) {
                Claim::Granted => return Some(key),
                Claim::Full => return None,
                // Another pair has that number.
                Claim::Of(_) => {}
            }
        }
        None
    }

    /// A connection to a published port: `flow` is to be given its socket at once. `None`: the
    /// table is full, or the guest has no such address; the connection is to be closed.
    pub fn accept(&mut self, peer: SocketAddr, guest_port: u16, now: Instant) -> Option<usize> {
        let key = self.claim_inward(peer, guest_port)?;
        let (guest, peer) = (key.guest, key.peer);
        let time = smoltcp_time(self.epoch, now);
        // The interface has no call that only sets its clock.
        self.iface.poll_maintenance(time);
        let Some(flow) = tcp::TcpFlow::inward(guest, peer, self.iface.context()) else {
            self.release(&key);
            return None;
        };
        self.stats.tcp_opened.inc();
        let id = self.insert(key, Flow::Tcp(Box::new(flow)));
        self.make_ready(id);
        Some(id)
    }

    /// A datagram to a published port; `None` for the port: only a flow that is there takes it.
    /// `Some`: nothing was done, since this queue pair has the flow.
    #[expect(
        clippy::too_many_arguments,
        reason = "a datagram's four facts, and the three that every call takes"
    )]
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
        let seen = match self.route(peer.ip()) {
            Route::Host(_) => peer,
            // The port is kept, so that the same peer is the same flow.
            Route::Card | Route::None => (self.own_address(peer.ip()), peer.port()).into(),
        };
        let address = self.guest_address(seen.ip())?;
        let key = FlowKey {
            protocol: UDP,
            guest: (address, guest_port).into(),
            peer: seen,
        };
        let id = match self.by_key.get(&key) {
            Some(&id) => id,
            None => {
                let published = published?;
                match self.claim(&key) {
                    Claim::Granted => {}
                    Claim::Of(pair) => return Some(pair),
                    Claim::Full => return None,
                }
                self.stats.udp_opened.inc();
                let flow = datagram::DatagramFlow::inward(published, peer, now);
                self.insert(key, Flow::Datagram(Box::new(flow)))
            }
        };
        if let Some(Flow::Datagram(flow)) = self.flows.get_mut(id).map(|entry| &mut entry.flow) {
            flow.inbound(payload);
        }
        self.turn(id, now, wire, host);
        None
    }

    /// Ends all flows: the guest is gone, or its driver starts anew.
    pub fn clear<H: Host>(&mut self, host: &mut H) {
        for (id, entry) in &mut self.flows {
            if entry.flow.has_socket() {
                host.close(id, true);
            }
            if let Some(share) = &self.settings.share {
                share.release(&entry.key);
            }
        }
        self.flows.clear();
        self.bulk = 0;
        self.by_key.clear();
        self.ready.clear();
        self.timers.clear();
    }
}

impl Flow {
    fn has_socket(&self) -> bool {
        match self {
            Self::Tcp(flow) => flow.has_socket(),
            Self::Datagram(flow) => flow.has_socket(),
        }
    }
}

/// The flow of a packet of the guest's. `None`: it belongs to none.
fn flow_key(packet: &Packet) -> Option<FlowKey> {
    let (source, destination) = packet.ports()?;
    let mut key = FlowKey::new(
        Direction::Out,
        packet.protocol,
        (packet.source, source),
        (packet.destination, destination),
    );
    if let Transport::Icmp { .. } = packet.transport {
        // Echo has no ports: the identifier is the guest's.
        key.peer.set_port(0);
    }
    Some(key)
}

fn ends(spec: &Spec) -> Ends {
    Ends {
        guest: spec.mac,
        card: spec.gateway_mac,
    }
}

/// The later of the two, for timers that run on.
fn after(now: Instant, seconds: u64) -> Instant {
    now + Duration::from_secs(seconds)
}
