//! The data path of a queue pair: transmit chains in, receive buffers filled, sockets and timers in
//! between, all on one thread.
//!
//! In a round, the transmit ring's chains come first (each is copied and returned at once), then
//! sockets' events, then flows get their turns, which fill receive buffers; both rings are published
//! once. The pair holds no chain from round to round but those that wait for the interface's limits.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use io_uring::{opcode, types};
use offload::device::{Chain, QueueHandler};
use offload::limit::TimedGate;
use offload::telemetry::{ErrorKind, QueueStats};
use offload::worker::QueueIo;

use super::limits::{RxGate, offer};
use super::rings::{RxWire, Waiting, gather};
use super::{Negotiated, Shared};
use crate::card::Card;
use crate::frame::FRAME_MAX;
use crate::frame::header::{HEADER_LEN, NetHeader};
use crate::host::publish::Transport;
use crate::host::{Happened, HostSockets};
use crate::local::Direction;
use crate::locals::LocalSide;
use crate::stack::Host;

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
    rx: u16,
    shared: Arc<Shared>,
    rx_stats: Arc<QueueStats>,
    tx_stats: Arc<QueueStats>,
    negotiated: Negotiated,
    session: u64,
    published_version: u64,
    card: Card<LocalSide>,
    host: HostSockets,
    waiting: Waiting,
    rx_gate: RxGate,
    tx_gate: TimedGate<Chain>,
    buffer: Box<[u8]>,
    happened: Vec<Happened>,
    /// Sockets may have events that were not taken yet.
    has_events: bool,
    is_armed: bool,
    is_ending: bool,
    now: Instant,
}

impl std::fmt::Debug for Pair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pair")
            .field("rx", &self.rx)
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
        Ok(Self {
            rx,
            rx_stats,
            tx_stats,
            negotiated,
            session: 0,
            published_version: 0,
            card: super::card(&shared, negotiated, rx == 0, now)?,
            host: super::host()?,
            waiting: Waiting::default(),
            rx_gate: shared.limits.rx_gate(),
            tx_gate: shared.limits.tx_gate(),
            buffer: vec![0; HEADER_LEN + FRAME_MAX].into_boxed_slice(),
            happened: Vec::new(),
            has_events: false,
            is_armed: false,
            is_ending: false,
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
        self.negotiated = Negotiated::new(self.shared.acked.load(Ordering::Acquire));
        self.waiting.clear();
        self.card.stack.clear(&mut self.host);
        self.host.forget_all();
        match super::card(&self.shared, self.negotiated, self.rx == 0, self.now) {
            Ok(card) => self.card = card,
            Err(error) => tracing::error!(%error, "no randomness: the flows' seed stays"),
        }
    }

    fn follow_published(&mut self) {
        let version = self.shared.published_version.load(Ordering::Acquire);
        // One pair has them: the guest's answers come back to whichever sent.
        if version == self.published_version || self.rx != 0 {
            return;
        }
        self.published_version = version;
        let published = self.shared.published.lock();
        let published = published.unwrap_or_else(std::sync::PoisonError::into_inner);
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
            }
        }
    }

    fn take_answer(&mut self, token: u64, io: &mut QueueIo<'_>) {
        while let Ok(len) = self.host.answer(token, &mut self.buffer) {
            let payload = self.buffer.get(..len).unwrap_or_default();
            let mut wire = RxWire {
                queue: self.rx,
                io,
                negotiated: self.negotiated,
                waiting: &mut self.waiting,
                stats: &self.rx_stats,
                overruns: &self.shared.stats.overruns,
                gate: &mut self.rx_gate,
                tap: &self.shared.tap,
            };
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
                    let mut wire = RxWire {
                        queue: self.rx,
                        io,
                        negotiated: self.negotiated,
                        waiting: &mut self.waiting,
                        stats: &self.rx_stats,
                        overruns: &self.shared.stats.overruns,
                        gate: &mut self.rx_gate,
                        tap: &self.shared.tap,
                    };
                    self.card.datagram_in(
                        at,
                        peer,
                        guest_port,
                        payload,
                        self.now,
                        &mut wire,
                        &mut self.host,
                    );
                }
            }
        }
    }

    fn transmit(&mut self, chain: Chain, io: &mut QueueIo<'_>) {
        let memory = Arc::clone(io.memory());
        let bytes = gather(&chain.readable, &memory, &mut self.buffer);
        io.complete(chain.token, 0);
        let parts = bytes.and_then(|bytes| bytes.split_at_checked(self.negotiated.header_len));
        let header = parts.and_then(|(header, _)| NetHeader::from_bytes(header));
        let (Some(header), Some((_, frame))) = (header, parts) else {
            self.tx_stats.error(ErrorKind::Invalid);
            return;
        };
        self.tx_stats.bytes_written.add(frame.len() as u64);
        self.shared.tap.frame(Direction::Out, frame);
        let mut wire = RxWire {
            queue: self.rx,
            io,
            negotiated: self.negotiated,
            waiting: &mut self.waiting,
            stats: &self.rx_stats,
            overruns: &self.shared.stats.overruns,
            gate: &mut self.rx_gate,
            tap: &self.shared.tap,
        };
        self.card
            .from_guest(&header, frame, self.now, &mut wire, &mut self.host);
    }
}

impl QueueHandler for Pair {
    fn is_pulled(&self, queue: u16) -> bool {
        queue == self.rx
    }

    fn request(&mut self, chain: Chain, io: &mut QueueIo<'_>) {
        self.now = Instant::now();
        self.follow_session();
        let header_len = self.negotiated.header_len;
        if let Some(chain) = offer(&mut self.tx_gate, chain, io.memory(), header_len) {
            self.transmit(chain, io);
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
        self.follow_published();
        self.arm(io);
        while let Some(chain) = self.tx_gate.next() {
            self.transmit(chain, io);
        }
        if self.has_events {
            self.take_events(io);
        }
        let mut wire = RxWire {
            queue: self.rx,
            io,
            negotiated: self.negotiated,
            waiting: &mut self.waiting,
            stats: &self.rx_stats,
            overruns: &self.shared.stats.overruns,
            gate: &mut self.rx_gate,
            tap: &self.shared.tap,
        };
        wire.flush();
        self.card.run(self.now, &mut wire, &mut self.host);
    }

    fn has_more(&self) -> bool {
        self.has_events || (self.card.stack.has_work() && self.waiting.is_empty())
    }

    fn stopping(&mut self, io: &mut QueueIo<'_>) {
        while let Some(chain) = self.tx_gate.next_unlimited() {
            self.transmit(chain, io);
        }
    }

    fn deadline(&self) -> Option<Instant> {
        let gates = [self.rx_gate.deadline(), self.tx_gate.deadline()];
        let ends = gates.into_iter().chain([self.card.deadline()]);
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
        self.tx_gate.len()
    }
}
