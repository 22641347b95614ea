//! Frames out of and into the guest's buffers.
//!
//! A frame from the guest is gathered into one piece of memory of our own before anything looks at
//! it, so that the guest cannot change what was checked. A frame for the guest is spread over as
//! many of its buffers as it needs (MRG_RXBUF), or over one chain; when the buffers that are there
//! do not suffice they are all given back untouched, and the frame waits, in order, in a queue of
//! bounded length.

use std::collections::VecDeque;

use offload::device::{Chain, Segment};
use offload::memory::GuestMemory;
use offload::telemetry::{Counter, QueueStats};
use offload::worker::QueueIo;
use smallvec::SmallVec;
use vm_memory::{Bytes, GuestAddress};

use super::Negotiated;
use super::limits::RxGate;
use crate::capture::Tap;
use crate::frame::header::{HEADER_LEN, NetHeader};
use crate::local::Direction;
use crate::stack::Wire;

/// Frames that wait for buffers, at most; behind that they are dropped and counted. The stack
/// stops sending as soon as one waits.
const WAITING_MAX: usize = 256;
/// Buffers of one frame, at most: 64 KiB in buffers of 256 bytes, as small as anyone's are.
const BUFFERS_MAX: usize = 260;

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

/// Frames for the guest that wait.
#[derive(Debug, Default)]
pub(super) struct Waiting(VecDeque<(NetHeader, Box<[u8]>)>);

impl Waiting {
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// The receive queue, for as long as a call lasts.
pub(super) struct RxWire<'a, 'io> {
    pub(super) queue: u16,
    pub(super) io: &'a mut QueueIo<'io>,
    pub(super) negotiated: Negotiated,
    pub(super) waiting: &'a mut Waiting,
    pub(super) stats: &'a QueueStats,
    pub(super) overruns: &'a Counter,
    pub(super) gate: &'a mut RxGate,
    pub(super) tap: &'a Tap,
}

impl RxWire<'_, '_> {
    /// Sends what waits, as far as there are buffers.
    pub(super) fn flush(&mut self) {
        while let Some((header, frame)) = self.waiting.0.pop_front() {
            if !self.may_place(header, &frame) {
                self.waiting.0.push_front((header, frame));
                return;
            }
        }
    }

    /// [`Self::place`] when the limits allow it.
    fn may_place(&mut self, header: NetHeader, frame: &[u8]) -> bool {
        let has_gone = self.gate.may_send(&header, frame.len()) && self.place(header, frame);
        if has_gone {
            self.gate.sent();
        }
        has_gone
    }

    /// Puts a frame into the guest's buffers; false, and nothing done, if they do not suffice.
    fn place(&mut self, header: NetHeader, frame: &[u8]) -> bool {
        let needed = self.negotiated.header_len + frame.len();
        let mut chains: SmallVec<[Chain; 20]> = SmallVec::new();
        let mut room = 0;
        while room < needed {
            let may_take = if self.negotiated.merges {
                chains.len() < BUFFERS_MAX
            } else {
                chains.is_empty()
            };
            if !may_take {
                break;
            }
            let Some(chain) = self.io.pop(self.queue) else {
                break;
            };
            room += chain.writable.iter().map(|s| s.len as usize).sum::<usize>();
            chains.push(chain);
        }
        if room < needed {
            let is_hopeless = if self.negotiated.merges {
                chains.len() == BUFFERS_MAX
            } else {
                !chains.is_empty()
            };
            if is_hopeless {
                // A buffer that no frame fits would stop the queue for ever. The smallest harm is
                // to lose the frame.
                self.overruns.inc();
            }
            while let Some(chain) = chains.pop() {
                self.io.unpop(chain.token);
            }
            if !is_hopeless {
                self.io.want(self.queue);
            }
            return is_hopeless;
        }
        let header = NetHeader {
            num_buffers: chains.len() as u16,
            ..header
        };
        let header: [u8; HEADER_LEN] = header.to_bytes();
        let mut parts = [
            header.get(..self.negotiated.header_len).unwrap_or(&header),
            frame,
        ];
        for chain in chains {
            let mut written = 0;
            for segment in &chain.writable {
                written += fill(segment, self.io.memory(), &mut parts);
            }
            self.io.complete(chain.token, written);
        }
        self.stats.bytes_read.add(frame.len() as u64);
        self.tap.frame(Direction::In, frame);
        true
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
        self.waiting.0.is_empty()
    }

    fn send(&mut self, header: NetHeader, frame: &[u8]) {
        if self.waiting.0.is_empty() && self.may_place(header, frame) {
            return;
        }
        if self.waiting.0.len() >= WAITING_MAX {
            self.overruns.inc();
            return;
        }
        self.waiting.0.push_back((header, frame.into()));
    }
}
