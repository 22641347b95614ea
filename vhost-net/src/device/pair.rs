//! The data path of a queue pair: transmit chains in, receive buffers filled, sockets and timers in
//! between, all on one thread.
//!
//! In a round, the transmit ring's chains come first (each is copied and returned at once), then
//! sockets' events, then flows get their turns, which fill receive buffers; both rings are published
//! once. The pair holds no chain from round to round but those that wait for the interface's limits
//! or for another pair (see [`super::exchange`]).

use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use io_uring::{opcode, types};
use offload::device::{Chain, QueueHandler};
use offload::limit::TimedGate;
use offload::telemetry::{ErrorKind, QueueStats};
use offload::worker::QueueIo;

use super::exchange::{Link, Mail};
use super::limits::offer;
use super::rings::{ROUND_BYTES, RxSide, gather};
use super::{Negotiated, Shared, network};
use crate::card::Card;
use crate::frame::FRAME_MAX;
use crate::frame::header::{HEADER_LEN, NetHeader};
use crate::host::publish::Transport;
use crate::host::{Happened, HostSockets};
use crate::lan::port::Port;
use crate::local::Direction;
use crate::locals::LocalSide;
use crate::stack::{Host, Wire};

/// `user_data` of the poll on the sockets.
const SOCKETS: u64 = 1;
/// `user_data` of its cancellation.
const CANCEL: u64 = 2;
/// POLLIN.
const POLL_IN: u32 = 1;
/// Connections or datagrams taken from a published port in one round.
const PUBLISHED_BATCH: usize = 32;

/// See the module.
pub struct Pair {
    rx: RxSide,
    shared: Arc<Shared>,
    tx_stats: Arc<QueueStats>,
    session: u64,
    /// Version of the published ports, and whether this pair is watching them.
    published: (u64, bool),
    card: Card<LocalSide>,
    host: HostSockets,
    /// The private network, if this pair has it.
    port: Option<Port>,
    tx_gate: TimedGate<Chain>,
    /// Chains that wait for another pair's inbox, or behind one that does.
    held: VecDeque<Chain>,
    buffer: Box<[u8]>,
    /// Bytes that came from the guest since the rings were published.
    taken: usize,
    happened: Vec<Happened>,
    /// Sockets may have events that were not taken yet.
    has_events: bool,
    is_armed: bool,
    is_ending: bool,
    /// No frame for the guest can be taken: an event will tell when.
    is_stalled: bool,
    now: Instant,
}

impl std::fmt::Debug for Pair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pair")
            .field("rx", &self.rx.queue)
            .finish_non_exhaustive()
    }
}

impl Pair {
    pub(super) fn new(
        rx: u16,
        shared: Arc<Shared>,
        rx_stats: Arc<QueueStats>,
        tx_stats: Arc<QueueStats>,
    ) -> std::io::Result<Self> {
        let now = Instant::now();
        let negotiated = Negotiated::new(shared.acked.load(Ordering::Acquire));
        let link = shared.exchange.as_ref();
        let link = link.map(|exchange| Link::new(Arc::clone(exchange), rx / 2));
        let mut host = super::host()?;
        let lan = shared.local.lan.clone().filter(|_| rx == 0);
        let port = lan.map(|lan| Port::new(lan, &mut host, now)).transpose()?;
        Ok(Self {
            rx: RxSide::new(
                rx,
                negotiated,
                shared.limits.rx_gate(),
                rx_stats,
                Arc::clone(&shared),
                link,
            ),
            tx_stats,
            session: 0,
            published: (0, false),
            card: super::card(&shared, negotiated, rx / 2, now)?,
            host,
            port,
            held: VecDeque::new(),
            tx_gate: shared.limits.tx_gate(),
            buffer: vec![0; HEADER_LEN + FRAME_MAX].into_boxed_slice(),
            taken: 0,
            happened: Vec::new(),
            has_events: false,
            is_armed: false,
            is_ending: false,
            is_stalled: false,
            now,
            shared,
        })
    }

    /// A driver that starts anew knows of no flow.
    fn follow_session(&mut self) {
        let session = self.shared.session.load(Ordering::Acquire);
        if session == self.session {
            return;
        }
        self.session = session;
        let negotiated = Negotiated::new(self.shared.acked.load(Ordering::Acquire));
        self.rx.negotiated = negotiated;
        self.rx.clear();
        if let Some(link) = &mut self.rx.link {
            link.session = session;
        }
        self.card.stack.clear(&mut self.host);
        self.host.forget_all();
        match super::card(&self.shared, negotiated, self.rx.queue / 2, self.now) {
            Ok(card) => self.card = card,
            Err(error) => tracing::error!(%error, "no randomness: the flows' seed stays"),
        }
    }

    /// Connections to published ports are accepted by all pairs that the driver uses, whichever is
    /// first; datagrams are received by one, so that those of a peer stay in order.
    fn follow_published(&mut self, io: &QueueIo<'_>) {
        let is_first = self.rx.queue == 0;
        let watches = is_first || io.is_running(self.rx.queue);
        let version = self.shared.published_version.load(Ordering::Acquire);
        if (version, watches) == self.published {
            return;
        }
        self.published = (version, watches);
        let published = self.shared.published.lock();
        let mut published = published.unwrap_or_else(PoisonError::into_inner).clone();
        published.retain(|port| is_first || watches && port.rule().transport == Transport::Tcp);
        self.host.publish(&published);
    }

    fn arm(&mut self, io: &mut QueueIo<'_>) {
        if std::mem::replace(&mut self.is_armed, true) || self.is_ending {
            return;
        }
        let fd: RawFd = self.host.epoll_fd();
        // One shot, and anew in the next round: it then looks at the state and misses nothing.
        let entry = opcode::PollAdd::new(types::Fd(fd), POLL_IN).build();
        // SAFETY: the entry has no buffers; the descriptor belongs to `self.host`, which lives as
        // long as the handler, and the loop drops that only when no operation is under way.
        unsafe { io.push(entry, SOCKETS) };
    }

    fn take_events(&mut self, io: &mut QueueIo<'_>) {
        self.has_events = self.host.take_events(&mut self.happened);
        for happened in std::mem::take(&mut self.happened) {
            match happened {
                Happened::Socket(flow, event) => self.card.stack.on_host(flow, event),
                Happened::Published(at) => self.take_published(at, io),
                Happened::Answer(token) => self.take_answer(token, io),
                Happened::Watched(mark, event) => {
                    if let Some(port) = &mut self.port {
                        port.on_event(mark, event, self.now);
                    }
                }
            }
        }
    }

    fn take_answer(&mut self, token: u64, io: &mut QueueIo<'_>) {
        while let Ok(len) = self.host.answer(token, &mut self.buffer) {
            let payload = self.buffer.get(..len).unwrap_or_default();
            let mut wire = self.rx.wire(io);
            let (now, host) = (self.now, &mut self.host);
            self.card.answered(token, payload, now, &mut wire, host);
        }
    }

    fn take_published(&mut self, at: usize, io: &mut QueueIo<'_>) {
        let Some(port) = self.host.published(at) else {
            return;
        };
        let guest_port = port.rule().guest_port;
        for _ in 0..PUBLISHED_BATCH {
            match port.rule().transport {
                Transport::Tcp => {
                    let Ok((fd, peer)) = port.accept() else {
                        return;
                    };
                    if let Some(flow) = self.card.accept(peer, guest_port, self.now)
                        && self.host.adopt_stream(flow, fd).is_err()
                    {
                        self.host.close(flow, true);
                    }
                }
                Transport::Udp => {
                    let Ok((len, peer)) = port.receive(&mut self.buffer) else {
                        return;
                    };
                    let payload = self.buffer.get(..len).unwrap_or_default();
                    let mut wire = self.rx.wire(io);
                    let owner = self.card.datagram_in(
                        Some(at),
                        peer,
                        guest_port,
                        payload,
                        self.now,
                        &mut wire,
                        &mut self.host,
                    );
                    if let (Some(owner), Some(link)) = (owner, &self.rx.link) {
                        let mail = || Mail::Datagram(peer, guest_port, payload.into());
                        if !link.hand(owner, false, mail) {
                            self.shared.stats.stack.datagrams_dropped.inc();
                        }
                    }
                }
            }
        }
    }

    /// Takes a chain whose time has come, behind those that wait.
    fn take(&mut self, chain: Chain, io: &mut QueueIo<'_>) {
        if self.held.is_empty() {
            let refused = self.transmit(chain, false, false, io);
            self.held.extend(refused);
        } else {
            self.held.push_back(chain);
        }
    }

    /// Takes the chains that wait for another pair, as far as that has room now; `must`: all.
    fn take_held(&mut self, must: bool, io: &mut QueueIo<'_>) {
        // The first was tried when it came.
        let mut is_retry = true;
        while let Some(chain) = self.held.pop_front() {
            if let Some(chain) = self.transmit(chain, must, is_retry, io) {
                self.held.push_front(chain);
                return;
            }
            is_retry = false;
        }
    }

    /// Takes what is in a chain. Gives it back if its frame is another pair's, which has no room for
    /// it now, unless it `must`.
    fn transmit(
        &mut self,
        chain: Chain,
        must: bool,
        is_retry: bool,
        io: &mut QueueIo<'_>,
    ) -> Option<Chain> {
        let memory = Arc::clone(io.memory());
        let bytes = gather(&chain.readable, &memory, &mut self.buffer);
        let header_len = self.rx.negotiated.header_len;
        let parts = bytes.and_then(|bytes| bytes.split_at_checked(header_len));
        let header = parts.and_then(|(header, _)| NetHeader::from_bytes(header));
        let (Some(header), Some((_, frame))) = (header, parts) else {
            io.complete(chain.token, 0);
            self.tx_stats.error(ErrorKind::Invalid);
            return None;
        };
        if !is_retry {
            self.shared.tap.frame(Direction::Out, frame);
        }
        let (now, host) = (self.now, &mut self.host);
        let local = &mut self.card.local;
        if network::to_member(&mut self.port, &self.shared, local, &header, frame, now) {
            self.tx_stats.bytes_written.add(frame.len() as u64);
            self.taken += frame.len();
            io.complete(chain.token, 0);
            return None;
        }
        let mut wire = self.rx.wire(io);
        let owner = self.card.from_guest(&header, frame, now, &mut wire, host);
        if let (Some(owner), Some(link)) = (owner, &self.rx.link) {
            let handed = match owner.whole {
                // Its fragments are gone: there is nothing to wait with.
                Some(whole) => link.hand(owner.pair, true, || whole_frame(whole)),
                None => link.hand(owner.pair, must, || Mail::Frame(header, frame.into())),
            };
            if !handed {
                return Some(chain);
            }
            self.shared.stats.moved.inc();
        }
        self.tx_stats.bytes_written.add(frame.len() as u64);
        self.taken += frame.len();
        io.complete(chain.token, 0);
        None
    }

    /// Takes what other pairs have handed over.
    fn take_mail(&mut self, io: &mut QueueIo<'_>) {
        let Some(link) = &self.rx.link else {
            return;
        };
        let Some((mails, frames)) = link.take(!self.is_stalled) else {
            return;
        };
        let (now, host) = (self.now, &mut self.host);
        for mail in mails {
            let mut wire = self.rx.wire(io);
            let (card, wire) = (&mut self.card, &mut wire);
            let next = match mail {
                Mail::Frame(header, frame) => {
                    let owner = card.from_pair(&header, &frame, now, wire, host);
                    owner.map(|owner| match owner.whole {
                        Some(whole) => (owner.pair, whole_frame(whole)),
                        None => (owner.pair, Mail::Frame(header, frame)),
                    })
                }
                // Of a flow that has ended meanwhile.
                Mail::Datagram(peer, port, payload) => {
                    card.datagram_in(None, peer, port, &payload, now, wire, host);
                    None
                }
            };
            // It has changed hands on the way, which is rare enough not to wait for room.
            if let (Some((pair, mail)), Some(link)) = (next, &self.rx.link) {
                link.hand(pair, true, || mail);
            }
        }
        let mut wire = self.rx.wire(io);
        for (header, frame) in frames {
            wire.send(header, &frame);
        }
    }
}

/// A frame that was put together from fragments.
fn whole_frame(frame: Box<[u8]>) -> Mail {
    Mail::Frame(NetHeader::default(), frame)
}

impl QueueHandler for Pair {
    fn is_pulled(&self, queue: u16) -> bool {
        queue == self.rx.queue
    }

    fn request(&mut self, chain: Chain, io: &mut QueueIo<'_>) {
        self.now = Instant::now();
        self.follow_session();
        let header_len = self.rx.negotiated.header_len;
        if let Some(chain) = offer(&mut self.tx_gate, chain, io.memory(), header_len) {
            self.take(chain, io);
        }
    }

    fn batch_end(&mut self, _: &mut QueueIo<'_>) {}

    fn completion(&mut self, user_data: u64, res: i32, _: &mut QueueIo<'_>) {
        if user_data != SOCKETS {
            return;
        }
        self.is_armed = false;
        self.has_events = res >= 0;
    }

    fn wake(&mut self, _: &mut QueueIo<'_>) {}

    fn round_end(&mut self, io: &mut QueueIo<'_>) {
        self.now = Instant::now();
        self.follow_session();
        self.follow_published(io);
        self.arm(io);
        self.take_held(false, io);
        while let Some(chain) = self.tx_gate.next() {
            self.take(chain, io);
        }
        if self.has_events {
            self.take_events(io);
        }
        let mut wire = self.rx.wire(io);
        wire.flush();
        self.is_stalled = !wire.has_room();
        self.take_mail(io);
        let takes = self.rx.negotiated.takes;
        let mut wire = self.rx.wire(io);
        self.card.run(self.now, &mut wire, &mut self.host);
        if let Some(port) = &mut self.port {
            let (local, stats) = (&mut self.card.local, &self.shared.stats);
            port.run(self.now, takes, &mut wire, local, &mut self.host, stats);
        }
        self.is_stalled = !wire.has_room();
        self.rx.next_round();
        self.taken = 0;
    }

    fn has_enough(&self) -> bool {
        self.taken >= ROUND_BYTES
    }

    fn has_more(&self) -> bool {
        let port = self.port.as_ref();
        self.has_events
            || (self.card.stack.has_work() && !self.is_stalled)
            || port.is_some_and(|port| port.has_more(!self.is_stalled))
    }

    fn stopping(&mut self, io: &mut QueueIo<'_>) {
        self.take_held(true, io);
        while let Some(chain) = self.tx_gate.next_unlimited() {
            self.transmit(chain, true, false, io);
        }
    }

    fn deadline(&self) -> Option<Instant> {
        let gates = [self.rx.deadline(), self.tx_gate.deadline()];
        let network = self.port.as_ref().and_then(Port::deadline);
        let ends = gates.into_iter().chain([self.card.deadline(), network]);
        ends.flatten().min()
    }

    fn shutdown(&mut self, io: &mut QueueIo<'_>) {
        self.is_ending = true;
        self.card.stack.clear(&mut self.host);
        if self.is_armed {
            let entry = opcode::AsyncCancel::new(SOCKETS).build();
            // SAFETY: a cancellation has no buffers and no descriptor.
            unsafe { io.push(entry, CANCEL) };
        }
    }

    fn chains_held(&self) -> usize {
        self.tx_gate.len() + self.held.len()
    }
}
