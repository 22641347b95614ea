//! Bytes for the guest that stay with the host's socket until the guest has acknowledged them.
//!
//! What the kernel has received for a flow is a buffer already. Read in the ordinary way it is copied
//! into smoltcp's ring, from there into a frame, and from that into the guest's memory. Instead it is
//! looked at (`MSG_PEEK`) when a segment leaves, straight into the guest's memory, and dropped from the
//! socket when the guest has acknowledged it: one copy instead of three, and a segment that has to be
//! sent again is looked at again.
//!
//! smoltcp, which knows nothing of it, decides as ever what is sent when. It is told *how many* bytes
//! there are, and the memory of its ring is never written: it is the kernel's page of zeros over and
//! over, of which it copies as many as the segment is long into a frame whose headers alone are used. A
//! segment's first byte is found by its sequence number.
//!
//! Memory: a flow's ring takes none then. What the socket holds is bounded by the host's `tcp_rmem`, and
//! its window closes when the guest's does.
//!
//! Needed are a kernel that keeps a place to look from for TCP (`SO_PEEK_OFF`: Linux 6.9 for IPv4, 6.11
//! for IPv6), which is asked for each socket, and a driver that takes partial checksums: a sum over
//! bytes that only the guest's memory has would have to be made there, from what the guest can change.
//! Without either, bytes are copied through the ring.

use std::io;

use vm_memory::VolatileSlice;

use super::{Host, is_temporary};

/// Acknowledged bytes from which on they are dropped while others are still to be acknowledged. Less
/// than the smallest window that a kernel opens by itself.
const DROP_MIN: usize = 48 << 10;

/// Where the payload of a flow's segments is, if it is not in smoltcp's ring.
pub(super) trait Source {
    /// The byte behind the SYN has this number.
    fn begins(&mut self, sequence: u32);

    /// Whether payload is looked at here.
    fn has_payload(&self) -> bool;

    /// Copies what has this number and follows. False: it is not all there.
    fn read(&mut self, sequence: u32, into: &[VolatileSlice<'_>]) -> bool;
}

/// What is known of the bytes that one socket keeps.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Kept {
    /// `None`: it was not asked yet whether it can.
    keeps: Option<bool>,
    /// Number of the first byte that was not dropped.
    front: u32,
    /// Bytes from there on that smoltcp was told of.
    len: usize,
}

impl Kept {
    /// Whether the socket keeps its bytes; `may`: the driver lets it.
    pub(super) fn keeps<H: Host>(&mut self, may: bool, flow: usize, host: &mut H) -> bool {
        *self.keeps.get_or_insert_with(|| may && host.keep(flow))
    }

    /// Whether what smoltcp holds no more, but for `left` bytes, should be dropped now: not for each
    /// little acknowledgement, unless it is the last.
    pub(super) fn should_drop(&self, left: usize) -> bool {
        self.len >= left + DROP_MIN || left == 0 && self.len > 0
    }

    /// Drops what smoltcp holds no more, of which it holds `left` bytes still. What the host cannot drop
    /// now is dropped with the next.
    pub(super) fn drop_to<H: Host>(
        &mut self,
        left: usize,
        flow: usize,
        host: &mut H,
    ) -> io::Result<()> {
        while self.len > left {
            let dropped = match host.discard(flow, self.len - left) {
                Err(error) if is_temporary(&error) => break,
                dropped => dropped?,
            };
            if dropped == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let dropped = dropped.min(self.len - left);
            self.len -= dropped;
            self.front = self.front.wrapping_add(dropped as u32);
        }
        Ok(())
    }

    /// Bytes in the socket of which smoltcp was not told. 0: nothing new, or the end.
    pub(super) fn new_bytes<H: Host>(&self, flow: usize, host: &mut H) -> io::Result<usize> {
        Ok(host.pending(flow)?.saturating_sub(self.len))
    }

    /// smoltcp was told of so many more.
    pub(super) fn told(&mut self, count: usize) {
        self.len += count;
    }

    /// Whether the stream ends behind what was told.
    pub(super) fn is_at_end<H: Host>(&self, flow: usize, host: &mut H) -> io::Result<bool> {
        let mut byte = [0];
        let found = host.peek(flow, self.len, &[VolatileSlice::from(&mut byte[..])])?;
        Ok(found == 0)
    }
}

/// A flow's bytes for one poll.
pub(super) struct Payload<'a, H> {
    pub(super) flow: usize,
    pub(super) kept: &'a mut Kept,
    pub(super) host: &'a mut H,
}

impl<H: Host> Source for Payload<'_, H> {
    fn begins(&mut self, sequence: u32) {
        self.kept.front = sequence;
    }

    fn has_payload(&self) -> bool {
        self.kept.keeps == Some(true)
    }

    fn read(&mut self, sequence: u32, into: &[VolatileSlice<'_>]) -> bool {
        let at = sequence.wrapping_sub(self.kept.front) as usize;
        let len: usize = into.iter().map(VolatileSlice::len).sum();
        at.checked_add(len).is_some_and(|end| end <= self.kept.len)
            && matches!(self.host.peek(self.flow, at, into), Ok(read) if read == len)
    }
}
