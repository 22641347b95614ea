//! What goes in and out of a [`Lane`](super::Lane).

use super::Failure;
use crate::volume::backing::Barrier;
use crate::volume::buffer::Buffer;

/// A request. Offsets and lengths are bytes, multiples of 512.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Read into the payload.
    Read {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Write from the payload.
    Write {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Done only when durable (a writethrough cache).
        durable: bool,
    },
    /// Make durable what is acknowledged.
    Flush,
    /// The guest no longer needs the range. Whole blocks become holes, durably.
    Discard {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Moves what lies scattered or in the way, with its contents as they are. From the card
    /// itself, never from a guest. Done when the new places are published, not when they are
    /// durable; [`Failure::NoSpace`]: there is no room to move to.
    Rehome {
        /// First byte, a multiple of 4096.
        offset: u64,
        /// Bytes, a multiple of 4096.
        len: u64,
        /// What to move, and where to.
        mode: Rehoming,
    },
    /// The range reads as zeros, durably.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
}

/// What a [`Op::Rehome`] moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rehoming {
    /// What lies in many places, or in chunks to be emptied, to whole free chunks.
    Gather,
    /// Only what lies in chunks to be emptied, into the holes of others.
    Evacuate,
}

/// The memory that a request reads from or writes to.
pub trait Payload {
    /// Copies out of the request's memory, from byte `at` of the request on.
    ///
    /// # Errors
    /// The memory is not accessible.
    fn load(&mut self, at: usize, into: &mut [u8]) -> Result<(), PayloadFault>;
    /// Copies into the request's memory.
    ///
    /// # Errors
    /// The memory is not accessible.
    fn store(&mut self, at: usize, from: &[u8]) -> Result<(), PayloadFault>;
}

/// The memory of a request is not accessible.
#[derive(Clone, Copy, Debug)]
pub struct PayloadFault;

/// A finished request.
#[derive(Debug)]
pub struct Done<P> {
    /// What was submitted with it.
    pub payload: P,
    /// How it went.
    pub result: Result<(), Failure>,
}

/// An operation for the backing. It owns its buffer: keep it until the result is known and hand
/// it back with [`Lane::on_io`](super::Lane::on_io).
#[derive(Debug)]
pub struct Io {
    /// Names it in `on_io`.
    pub id: u32,
    /// What to do.
    pub kind: IoKind,
}

/// See [`Io`].
#[derive(Debug)]
pub enum IoKind {
    /// Fill the buffer from its `skip`th byte.
    Read {
        /// Byte offset in the backing of the first byte wanted now.
        offset: u64,
        /// Bytes that an earlier, short transfer already filled.
        skip: usize,
        /// Where to.
        buffer: Buffer,
    },
    /// Write the buffer from its `skip`th byte.
    Write {
        /// Byte offset in the backing of the first byte to write now.
        offset: u64,
        /// Bytes that an earlier, short transfer already wrote.
        skip: usize,
        /// What.
        buffer: Buffer,
    },
    /// A barrier: fdatasync.
    Sync(Barrier),
    /// Make room for later writes.
    Allocate {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Give room back.
    Punch {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
}

impl IoKind {
    /// The buffer, to be handed back.
    pub fn into_buffer(self) -> Option<Buffer> {
        match self {
            Self::Read { buffer, .. } | Self::Write { buffer, .. } => Some(buffer),
            Self::Sync(_) | Self::Allocate { .. } | Self::Punch { .. } => None,
        }
    }
}
