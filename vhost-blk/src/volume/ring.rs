//! The delta ring: what was acknowledged and is not yet in the log, kept where it survives
//! `kill -9` of the card.
//!
//! It lies in the vhost-user in-flight region. The frontend owns that memory and hands it to the
//! next card process, so the ring lives exactly as long as the guest whose acknowledged writes it
//! holds, and needs no file. The frontend cannot forge it: records are authenticated under a
//! key of the session that wrote them.
//!
//! ```text
//! 0     header copy 0, 128 bytes          header copy:   0  magic u64        36 reserved
//! 128   header copy 1                                    8  version u32      40 session u32
//! 256   tail offset u64                                  12 state u32        44 reserved
//! 512   a word of the device's own
//! 4096  records                                          16 volume id 16     48 tag
//!                                                        32 change u32       64 sequence u64
//! record, 48 bytes + 40 a delta, 8-byte aligned, does not wrap:
//!   0 magic u32   4 deltas u32   8 batch u64   16 number u64   24 sequence u64   32 tag 16
//!   delta: 0 block u64   8 entry 32
//! ```
//!
//! A header is *fresh* (just handed to the frontend, no session yet) or *live* (bound to a
//! session, with a tag). The copy with the higher `change` that is valid counts, so that a kill
//! in the middle of rewriting one leaves the other.
//!
//! Records are appended at the head and released at the tail when the commit that holds them is
//! durable. Each says which batch it will be part of: recovery takes only those of later batches
//! than the last one it found on disk. Without that, a write that a committed discard undid would
//! come back. Numbers rise by one, so a record of an earlier lap ends the scan; one that is found
//! at the tail of an empty ring was released, so its batch is on disk and it is skipped.
//!
//! Stores reach the memory in program order and a killed process's memory is what it stored, so
//! no barrier is needed; a record that was cut short does not authenticate, and its write was
//! not acknowledged.

use crypto::aead::{TAG_LEN, Tag};
use crypto::session::Session;
use thiserror::Error;

use super::entry::{ENTRY_LEN, Entry};
use super::geometry::{BLOCK_LEN, Block};
use super::superblock::VolumeId;

/// Bytes that the ring asks for in the in-flight region: 16 MiB holds 65,536 single deltas with
/// room to spare. Pages that were never touched take no memory.
pub const RING_LEN: usize = 16 << 20;
/// Deltas of a record at most: the blocks of one write.
pub const RECORD_MAX: usize = super::buffer::Pool::MAX_BLOCKS;

const MAGIC: u64 = u64::from_le_bytes(*b"OFFLRING");
const RECORD_MAGIC: u32 = u32::from_le_bytes(*b"ODLT");
const SKIP_MAGIC: u32 = u32::from_le_bytes(*b"SKIP");
const VERSION: u32 = 1;
const HEADER_LEN: usize = 128;
const HEADER_TAG_AT: usize = 48;
const TAIL_AT: usize = 256;
/// Where a device may keep a word of its own beside the ring.
pub const DEVICE_WORD_AT: usize = 512;
const RECORDS_AT: usize = BLOCK_LEN;
const RECORD_HEADER: usize = 48;
const RECORD_TAG_AT: usize = 32;
const DELTA_LEN: usize = 8 + ENTRY_LEN;

/// The memory of a ring. Another process can write to it: nothing read from it is believed
/// before it authenticates.
pub trait RingMemory: Send + Sync {
    /// Bytes.
    fn len(&self) -> usize;
    /// Whether it has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Copies out; out-of-range bytes read as zero.
    fn read(&self, at: usize, into: &mut [u8]);
    /// Copies in; out-of-range bytes are dropped.
    fn write(&self, at: usize, from: &[u8]);
    /// Stores a word at a multiple of 8 in one piece: a kill leaves the old or the new value.
    fn store(&self, at: usize, word: u64);
}

/// Why a ring cannot be used.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum RingError {
    /// Too small or without a header.
    #[error("the in-flight region has no delta ring in it; it is not from this card")]
    NotARing,
    /// Another volume's.
    #[error("the in-flight region belongs to another volume; was another --volume given?")]
    OtherVolume,
    /// A record was cut or changed where it must not be.
    #[error("the in-flight region's header does not authenticate")]
    NotAuthentic,
}

/// What a ring's header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingState {
    /// Never bound to a session: its guest has not written through it.
    Fresh,
    /// Bound to a session. Not yet authenticated: see [`read_records`].
    Live {
        /// The session whose keys authenticate it.
        session: u16,
    },
}

struct Header {
    state: RingState,
    change: u32,
    copy: usize,
    bytes: [u8; HEADER_LEN],
}

fn header(memory: &dyn RingMemory, copy: usize) -> Option<Header> {
    let mut bytes = [0; HEADER_LEN];
    memory.read(copy * HEADER_LEN, &mut bytes);
    let word = |at: usize| {
        bytes[at..]
            .first_chunk()
            .map_or(0, |b| u32::from_le_bytes(*b))
    };
    let state = match (word(12), u16::try_from(word(40)).ok()?) {
        (1, 0) => RingState::Fresh,
        (2, session) if session != 0 => RingState::Live { session },
        _ => return None,
    };
    let is_ours = bytes[0..8] == MAGIC.to_le_bytes() && word(8) == VERSION;
    is_ours.then(|| Header {
        state,
        change: word(32),
        copy,
        bytes,
    })
}

fn newest(memory: &dyn RingMemory) -> Option<Header> {
    let copies = (header(memory, 0), header(memory, 1));
    match copies {
        (Some(a), Some(b)) if b.change.wrapping_sub(a.change) < u32::MAX / 2 => Some(b),
        (Some(a), _) => Some(a),
        (None, b) => b,
    }
}

const HEADER_SEQUENCE_AT: usize = 64;

/// Writes a fresh header into zeroed memory.
///
/// # Errors
/// The memory is too small.
pub fn format_fresh(memory: &dyn RingMemory, id: &VolumeId) -> Result<(), RingError> {
    if memory.len() < RECORDS_AT + RECORD_HEADER + RECORD_MAX * DELTA_LEN {
        return Err(RingError::NotARing);
    }
    memory.write(0, &header_bytes(id, 1, 1, 0));
    Ok(())
}

fn header_bytes(id: &VolumeId, state: u32, change: u32, session: u16) -> [u8; HEADER_LEN] {
    let mut bytes = [0; HEADER_LEN];
    bytes[0..8].copy_from_slice(&MAGIC.to_le_bytes());
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[12..16].copy_from_slice(&state.to_le_bytes());
    bytes[16..32].copy_from_slice(id);
    bytes[32..36].copy_from_slice(&change.to_le_bytes());
    bytes[40..44].copy_from_slice(&u32::from(session).to_le_bytes());
    bytes
}

/// Looks at a ring that a frontend brought.
///
/// # Errors
/// It is no ring, or another volume's.
pub fn inspect(memory: &dyn RingMemory, id: &VolumeId) -> Result<RingState, RingError> {
    if memory.len() < RECORDS_AT + RECORD_HEADER + RECORD_MAX * DELTA_LEN {
        return Err(RingError::NotARing);
    }
    let header = newest(memory).ok_or(RingError::NotARing)?;
    if header.bytes[16..32] != id[..] {
        return Err(RingError::OtherVolume);
    }
    Ok(header.state)
}

/// A delta found in a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingDelta {
    /// Which block.
    pub block: Block,
    /// Its entry.
    pub entry: Entry,
    /// The batch that was to hold it.
    pub batch: u64,
}

fn record_aad(header: &[u8], deltas: &[u8]) -> Vec<u8> {
    let mut data = Vec::with_capacity(RECORD_TAG_AT + deltas.len());
    data.extend_from_slice(&header[..RECORD_TAG_AT]);
    data.extend_from_slice(deltas);
    data
}

const fn record_len(deltas: usize) -> usize {
    RECORD_HEADER + deltas * DELTA_LEN
}

/// Whether the ring goes on at its start from here.
fn is_skip(memory: &dyn RingMemory, at: usize) -> bool {
    let mut word = [0; 4];
    memory.read(at, &mut word);
    u32::from_le_bytes(word) == SKIP_MAGIC
}

/// Reads the records of a live ring from its tail on, in the order they were acknowledged.
///
/// # Errors
/// The header is not of this session.
pub fn read_records(
    memory: &dyn RingMemory,
    session: &Session,
) -> Result<Vec<RingDelta>, RingError> {
    let header = newest(memory).ok_or(RingError::NotARing)?;
    let long = |bytes: &[u8], at: usize| {
        bytes[at..]
            .first_chunk()
            .map_or(0, |b| u64::from_le_bytes(*b))
    };
    let stored: Tag = *header.bytes[HEADER_TAG_AT..]
        .first_chunk()
        .ok_or(RingError::NotARing)?;
    let sequence = long(&header.bytes, HEADER_SEQUENCE_AT);
    session
        .ring
        .open(sequence, &header.bytes[..HEADER_TAG_AT], &mut [], &stored)
        .map_err(|_| RingError::NotAuthentic)?;
    let mut tail = [0; 8];
    memory.read(TAIL_AT, &mut tail);
    let mut number = None;
    let mut found = Vec::new();
    let Ok(mut at) = usize::try_from(long(&tail, 0)) else {
        return Ok(found);
    };
    let mut has_wrapped = false;
    // Each record takes at least its header, so this many steps go once around.
    for _ in 0..memory.len() / RECORD_HEADER {
        if at < RECORDS_AT {
            break;
        }
        let is_at_end = at.saturating_add(RECORD_HEADER) > memory.len();
        if is_at_end || is_skip(memory, at) {
            if has_wrapped {
                break;
            }
            has_wrapped = true;
            at = RECORDS_AT;
            continue;
        }
        let mut head = [0; RECORD_HEADER];
        memory.read(at, &mut head);
        let word = |offset: usize| {
            head[offset..]
                .first_chunk()
                .map_or(0, |b| u32::from_le_bytes(*b))
        };
        let count = word(4) as usize;
        if word(0) != RECORD_MAGIC
            || count > RECORD_MAX
            || number.is_some_and(|number| long(&head, 16) != number)
        {
            break;
        }
        let mut deltas = vec![0; count * DELTA_LEN];
        memory.read(at + RECORD_HEADER, &mut deltas);
        let tag: Tag = *head[RECORD_TAG_AT..].first_chunk().unwrap_or(&[0; TAG_LEN]);
        if session
            .ring
            .open(long(&head, 24), &record_aad(&head, &deltas), &mut [], &tag)
            .is_err()
        {
            break;
        }
        let batch = long(&head, 8);
        found.extend(deltas.chunks_exact(DELTA_LEN).map(|bytes| RingDelta {
            block: Block(long(bytes, 0)),
            entry: Entry::from_bytes(bytes[8..].first_chunk().unwrap_or(&[0; ENTRY_LEN])),
            batch,
        }));
        number = Some(long(&head, 16).wrapping_add(1));
        at += record_len(count);
    }
    Ok(found)
}

/// Where a ring's head stood: what to release once the commit is durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    at: usize,
    number: u64,
}

/// Appends to a ring and releases from it.
pub struct RingWriter {
    memory: std::sync::Arc<dyn RingMemory>,
    head: Mark,
    tail: usize,
    /// Records between tail and head.
    is_empty: bool,
    scratch: Vec<u8>,
}

impl RingWriter {
    /// Binds a ring to a session, empty. What it held must be durable elsewhere by now.
    ///
    /// # Errors
    /// It is no ring, or another volume's.
    pub fn bind(
        memory: std::sync::Arc<dyn RingMemory>,
        id: &VolumeId,
        (session_id, session): (u16, &Session),
        sequence: u64,
    ) -> Result<Self, RingError> {
        inspect(&*memory, id)?;
        let old = newest(&*memory).ok_or(RingError::NotARing)?;
        memory.store(TAIL_AT, RECORDS_AT as u64);
        let writer = Self {
            memory,
            head: Mark {
                at: RECORDS_AT,
                number: 1,
            },
            tail: RECORDS_AT,
            is_empty: true,
            scratch: Vec::with_capacity(record_len(RECORD_MAX)),
        };
        let mut bytes = header_bytes(id, 2, old.change.wrapping_add(1), session_id);
        let tag = session
            .ring
            .seal(sequence, &bytes[..HEADER_TAG_AT], &mut []);
        bytes[HEADER_TAG_AT..HEADER_TAG_AT + TAG_LEN].copy_from_slice(&tag);
        bytes[HEADER_SEQUENCE_AT..HEADER_SEQUENCE_AT + 8].copy_from_slice(&sequence.to_le_bytes());
        writer.memory.write((1 - old.copy) * HEADER_LEN, &bytes);
        Ok(writer)
    }

    fn room_at(&mut self, len: usize) -> Option<usize> {
        let end = self.memory.len();
        if self.is_empty || self.head.at >= self.tail {
            if self.head.at + len <= end {
                return Some(self.head.at);
            }
            // Not as far as the tail: head == tail means empty.
            if RECORDS_AT + len < self.tail {
                if self.head.at + 4 <= end {
                    self.memory.write(self.head.at, &SKIP_MAGIC.to_le_bytes());
                }
                return Some(RECORDS_AT);
            }
            return None;
        }
        (self.head.at + len < self.tail).then_some(self.head.at)
    }

    /// Appends a record. Returns whether there was room.
    pub fn append(
        &mut self,
        batch: u64,
        deltas: &mut dyn ExactSizeIterator<Item = (Block, Entry)>,
        session: &Session,
        sequence: u64,
    ) -> bool {
        let count = deltas.len();
        debug_assert!(count <= RECORD_MAX);
        let Some(at) = self.room_at(record_len(count)) else {
            return false;
        };
        let record = &mut self.scratch;
        record.clear();
        record.extend_from_slice(&RECORD_MAGIC.to_le_bytes());
        record.extend_from_slice(&(count as u32).to_le_bytes());
        record.extend_from_slice(&batch.to_le_bytes());
        record.extend_from_slice(&self.head.number.to_le_bytes());
        record.extend_from_slice(&sequence.to_le_bytes());
        // The associated data are the header before the tag and the deltas, which stand
        // together until the tag is put between them.
        for (block, entry) in deltas {
            record.extend_from_slice(&block.0.to_le_bytes());
            record.extend_from_slice(&entry.to_bytes());
        }
        let tag = session.ring.seal(sequence, record, &mut []);
        self.memory
            .write(at + RECORD_HEADER, &record[RECORD_TAG_AT..]);
        self.memory.write(at + RECORD_TAG_AT, &tag);
        self.memory.write(at, &record[..RECORD_TAG_AT]);
        self.head = Mark {
            at: at + record_len(count),
            number: self.head.number + 1,
        };
        self.is_empty = false;
        true
    }

    /// Where the head stands now.
    pub const fn mark(&self) -> Mark {
        self.head
    }

    /// Releases everything before `mark`.
    pub fn release(&mut self, mark: Mark) {
        self.tail = mark.at;
        self.is_empty = mark == self.head;
        self.memory.store(TAIL_AT, mark.at as u64);
    }
}
