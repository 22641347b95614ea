//! Frames out of and into the guest's buffers.
//!
//! A frame from the guest is gathered into one piece of memory of our own before anything looks at
//! it, so that the guest cannot change what was checked. A frame for the guest is spread over as
//! many of its buffers as it needs (MRG_RXBUF), or over one chain; when the buffers that are there
//! do not suffice they are all given back untouched, and the frame waits, in order, in a queue of
//! bounded length.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use offload::device::{Chain, Segment};
use offload::memory::GuestMemory;
use offload::telemetry::QueueStats;
use offload::worker::QueueIo;
use smallvec::SmallVec;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend as _, VolatileSlice};

use super::exchange::Link;
use super::limits::RxGate;
use super::{Negotiated, Shared};
use crate::frame::header::{HEADER_LEN, NetHeader};
use crate::local::Direction;
use crate::stack::{Read, Wire, gathered};

/// Frames that wait for buffers, at most; behind that they are dropped and counted. The stack
/// stops sending as soon as one waits.
const WAITING_MAX: usize = 256;
/// Buffers of one frame, at most: 64 KiB in buffers of 256 bytes, as small as anyone's are.
const BUFFERS_MAX: usize = 260;
/// Pieces of memory that the kernel fills in one go, at most (UIO_MAXIOV).
const PIECES_MAX: usize = 1024;

/// Copies device-readable segments into one piece. `None`: more than fits, or not in memory.
pub(super) fn gather<'b>(
    segments: &[Segment],
    memory: &GuestMemory,
    buffer: &'b mut [u8],
) -> Option<&'b [u8]> {
    let mut len = 0;
    for segment in segments {
        let end = len + segment.len as usize;
        let place = buffer.get_mut(len..end)?;
        memory.read_slice(place, GuestAddress(segment.addr)).ok()?;
        len = end;
    }
    buffer.get(..len)
}

/// Copies the first bytes of device-readable segments, as many as `front` has. `None`: they have
/// fewer, or are not in memory.
pub(super) fn gather_front<'b>(
    segments: &[Segment],
    memory: &GuestMemory,
    front: &'b mut [u8],
) -> Option<&'b [u8]> {
    let mut at = 0;
    for segment in segments {
        let len = (front.len() - at).min(segment.len as usize);
        let place = front.get_mut(at..at + len)?;
        memory.read_slice(place, GuestAddress(segment.addr)).ok()?;
        at += len;
        if at == front.len() {
            return Some(front);
        }
    }
    None
}

/// Bytes that are carried from the guest before the rings are published. Guest and card work at the
/// same time only when the one has something while the other works on the next: with all that a
/// window holds in one piece they take turns instead. Small enough to stay in a processor's cache
/// from one copy to the next, large enough for two super-segments.
pub(super) const ROUND_BYTES: usize = 128 << 10;

/// The same for what goes to the guest: as much as a flow that is alone sends in a turn.
const TO_GUEST_BYTES: usize = 1 << 20;

/// What a receive queue needs from round to round.
pub(super) struct RxSide {
    pub(super) queue: u16,
    pub(super) negotiated: Negotiated,
    /// Frames that wait for buffers or for the limits.
    waiting: VecDeque<(NetHeader, Box<[u8]>)>,
    /// Bytes since the last [`Self::next_round`].
    sent: usize,
    gate: RxGate,
    stats: Arc<QueueStats>,
    shared: Arc<Shared>,
    /// `None`: there is one pair.
    pub(super) link: Option<Link>,
}

impl RxSide {
    pub(super) fn new(
        queue: u16,
        negotiated: Negotiated,
        gate: RxGate,
        stats: Arc<QueueStats>,
        shared: Arc<Shared>,
        link: Option<Link>,
    ) -> Self {
        Self {
            queue,
            negotiated,
            waiting: VecDeque::new(),
            sent: 0,
            gate,
            stats,
            shared,
            link,
        }
    }

    /// Forgets what waits.
    pub(super) fn clear(&mut self) {
        self.waiting.clear();
        self.gate.forget();
    }

    /// The rings are about to be published.
    pub(super) fn next_round(&mut self) {
        self.sent = 0;
    }

    /// When the limits let the next frame go.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.gate.deadline()
    }

    /// The queue, for as long as a call lasts.
    pub(super) fn wire<'a, 'io>(&'a mut self, io: &'a mut QueueIo<'io>) -> RxWire<'a, 'io> {
        RxWire { side: self, io }
    }
}

type Chains = SmallVec<[Chain; 20]>;

/// A receive queue to send to.
pub(super) struct RxWire<'a, 'io> {
    side: &'a mut RxSide,
    io: &'a mut QueueIo<'io>,
}

impl RxWire<'_, '_> {
    /// The way round through pair 0, if the queue does not run.
    fn detour(&self) -> Option<&Link> {
        let link = self.side.link.as_ref()?;
        (self.side.queue != 0 && !self.io.is_running(self.side.queue)).then_some(link)
    }

    /// Sends what waits, as far as there are buffers.
    pub(super) fn flush(&mut self) {
        while let Some((header, frame)) = self.side.waiting.pop_front() {
            let has_gone = match self.detour() {
                Some(link) => {
                    let has_gone = link.has_room_to_guest() && link.to_guest(header, &frame);
                    // Pair 0 holds it to the limits.
                    self.side.gate.forget();
                    has_gone
                }
                None => self.may_place(header, &frame),
            };
            if !has_gone {
                self.side.waiting.push_front((header, frame));
                return;
            }
        }
    }

    /// [`Self::place`] when the limits allow it.
    fn may_place(&mut self, header: NetHeader, frame: &[u8]) -> bool {
        let has_gone = self.side.gate.may_send(&header, frame.len()) && self.place(header, frame);
        if has_gone {
            self.side.gate.sent();
        }
        has_gone
    }

    /// Puts a frame into the guest's buffers; false, and nothing done, if they do not suffice.
    fn place(&mut self, header: NetHeader, frame: &[u8]) -> bool {
        let chains = match self.take(frame.len()) {
            Ok(chains) => chains,
            Err(is_lost) => return is_lost,
        };
        let header = self.header_bytes(header, chains.len());
        let mut parts = [&header[..], frame];
        for chain in chains {
            let mut written = 0;
            for segment in &chain.writable {
                written += fill(segment, self.io.memory(), &mut parts);
            }
            self.io.complete(chain.token, written);
        }
        self.side.stats.bytes_read.add(frame.len() as u64);
        self.side.shared.tap.frame(Direction::In, frame);
        self.side.sent += frame.len();
        true
    }

    /// The same for a frame of which `len` bytes are elsewhere, which `read` copies straight into the
    /// guest's buffers. False, too, if they are not such that it can.
    fn place_from(&mut self, header: NetHeader, head: &[u8], len: usize, read: Read<'_>) -> bool {
        let total = head.len() + len;
        let mut chains = match self.take(total) {
            Ok(chains) => chains,
            Err(is_lost) => return is_lost,
        };
        let header = self.header_bytes(header, chains.len());
        let mut parts = [&header[..], head];
        let memory = Arc::clone(self.io.memory());
        let mut places: SmallVec<[VolatileSlice<'_>; 24]> = SmallVec::new();
        let mut left = len;
        let mut is_there = true;
        let mut written: SmallVec<[u32; 24]> = SmallVec::new();
        for chain in &chains {
            let mut of_chain = 0;
            for segment in &chain.writable {
                let head = fill(segment, &memory, &mut parts);
                let room = left.min((segment.len - head) as usize);
                of_chain += head + room as u32;
                left -= room;
                if room > 0 {
                    let at = GuestAddress(segment.addr.wrapping_add(head.into()));
                    for place in memory.get_slices(at, room) {
                        match place {
                            Ok(place) => places.push(place),
                            Err(_) => is_there = false,
                        }
                    }
                }
            }
            written.push(of_chain);
        }
        let is_in_crumbs = places.len() > PIECES_MAX;
        if is_in_crumbs || !is_there || !read(&places) {
            while let Some(chain) = chains.pop() {
                self.io.unpop(chain.token);
            }
            if is_in_crumbs {
                return false;
            }
            // The guest has taken memory away, or the host's socket has failed.
            self.side.shared.stats.overruns.inc();
            return true;
        }
        for (chain, written) in chains.into_iter().zip(written) {
            self.io.complete(chain.token, written);
        }
        self.side.stats.bytes_read.add(total as u64);
        self.side.sent += total;
        true
    }

    /// The virtio-net header of a frame in so many buffers, as long as was negotiated.
    fn header_bytes(&self, header: NetHeader, buffers: usize) -> SmallVec<[u8; HEADER_LEN]> {
        let header = NetHeader {
            num_buffers: buffers as u16,
            ..header
        };
        let mut bytes = SmallVec::from_buf(header.to_bytes());
        bytes.truncate(self.side.negotiated.header_len);
        bytes
    }

    /// Takes buffers for a frame of so many bytes. `Err`: there are too few now, or, if true, the frame
    /// fits in none that the guest has; it is lost then, and was counted.
    fn take(&mut self, len: usize) -> Result<Chains, bool> {
        let mut chains = Chains::new();
        let needed = self.side.negotiated.header_len + len;
        let mut room = 0;
        while room < needed {
            let may_take = if self.side.negotiated.merges {
                chains.len() < BUFFERS_MAX
            } else {
                chains.is_empty()
            };
            if !may_take {
                break;
            }
            let Some(chain) = self.io.pop(self.side.queue) else {
                break;
            };
            room += chain.writable.iter().map(|s| s.len as usize).sum::<usize>();
            chains.push(chain);
        }
        if room < needed {
            let is_hopeless = if self.side.negotiated.merges {
                chains.len() == BUFFERS_MAX
            } else {
                !chains.is_empty()
            };
            if is_hopeless {
                // A buffer that no frame fits would stop the queue for ever. The smallest harm is
                // to lose the frame.
                self.side.shared.stats.overruns.inc();
            }
            while let Some(chain) = chains.pop() {
                self.io.unpop(chain.token);
            }
            if !is_hopeless {
                self.io.want(self.side.queue);
            }
            return Err(is_hopeless);
        }
        Ok(chains)
    }
}

/// Writes the front of `parts` into a segment. Bytes that were taken.
fn fill(segment: &Segment, memory: &GuestMemory, parts: &mut [&[u8]; 2]) -> u32 {
    let mut at = 0;
    for part in parts {
        let len = part.len().min((segment.len - at) as usize);
        let (now, later) = part.split_at(len);
        if !now.is_empty() {
            // The address was checked when the chain was walked; memory that has left since takes
            // nothing, and the guest that took it away knows.
            let _ = memory.write_slice(now, GuestAddress(segment.addr.wrapping_add(at.into())));
        }
        at += len as u32;
        *part = later;
    }
    at
}

impl Wire for RxWire<'_, '_> {
    fn has_room(&self) -> bool {
        self.side.waiting.is_empty() && self.detour().is_none_or(Link::has_room_to_guest)
    }

    fn has_enough(&self) -> bool {
        self.side.sent >= TO_GUEST_BYTES
    }

    fn send(&mut self, header: NetHeader, frame: &[u8]) {
        if let Some(link) = self.detour() {
            if !link.to_guest(header, frame) {
                self.side.shared.stats.overruns.inc();
            }
            return;
        }
        if self.side.waiting.is_empty() && self.may_place(header, frame) {
            return;
        }
        if self.side.waiting.len() >= WAITING_MAX {
            self.side.shared.stats.overruns.inc();
            return;
        }
        self.side.waiting.push_back((header, frame.into()));
    }

    fn send_from(&mut self, header: NetHeader, head: &[u8], len: usize, read: Read<'_>) {
        let total = head.len() + len;
        let goes_straight = self.detour().is_none()
            && self.side.waiting.is_empty()
            && !self.side.shared.tap.is_wanted()
            && self.side.gate.may_send(&header, total);
        if goes_straight && self.place_from(header, head, len, read) {
            self.side.gate.sent();
        } else if let Some(frame) = gathered(head, len, read) {
            self.send(header, &frame);
        } else {
            self.side.shared.stats.overruns.inc();
            if self.side.waiting.is_empty() {
                // The gate was asked for this one, for which nobody will ask again.
                self.side.gate.forget();
            }
        }
    }
}

#[cfg(test)]
mod tests;
