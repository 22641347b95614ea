//! Log records: what a commit changes in the map.
//!
//! A commit (a *batch*) is one or more records, written together and made durable by one barrier.
//! A record takes whole 4 KiB blocks of the ring and may wrap around its end.
//!
//! ```text
//! 0   magic "OLOG"  u32        24  records of the batch so far  u32
//! 4   blocks        u32        28  flags u32 (1 last of its batch, 2 draft)
//! 8   batch         u64        32  sequence u64
//! 16  deltas        u32        40  reserved, zero
//! 20  session       u32        48  tag
//! 64  deltas, 48 bytes each, sealed with the zeros behind them
//!
//! delta:  0 block u48   6 flags u16, zero   8 old slot u48   14 zero   16 entry, 32 bytes
//! ```
//!
//! The associated data are the header before the tag, the volume's id and the tag of the record
//! before it: a chain. A record of an earlier lap of the ring, of another volume, or behind a
//! dropped one does not fit the chain, which is how the end of the log is found without any
//! pointer. A torn record does not authenticate: it was not acknowledged.
//!
//! A *draft* is a batch that may not have had a barrier of its own when the next one was written; see
//! [`Ending::Draft`].
//!
//! The old slot is what the delta takes out of use. It lets recovery bring the allocator up to
//! date without reading the map.

use crypto::aead::{TAG_LEN, Tag};
use crypto::session::Session;
use thiserror::Error;

use super::buffer::Buffer;
use super::entry::Entry;
use super::geometry::{BLOCK_LEN, Block, Slot};
use super::superblock::VolumeId;

const MAGIC: u32 = u32::from_le_bytes(*b"OLOG");
const FLAG_LAST: u32 = 1;
const FLAG_DRAFT: u32 = 2;
const HEADER_LEN: usize = 64;
const TAG_AT: usize = 48;
const DELTA_LEN: usize = 48;
/// Blocks of a record at most: 64 KiB.
pub const RECORD_BLOCKS_MAX: u64 = 16;
/// Deltas of a record at most.
pub const RECORD_DELTAS_MAX: usize =
    (RECORD_BLOCKS_MAX as usize * BLOCK_LEN - HEADER_LEN) / DELTA_LEN;

/// One block's new entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delta {
    /// Which block.
    pub block: Block,
    /// What it is now; a hole after a discard.
    pub entry: Entry,
    /// The slot that it leaves; `Slot(0)` if it was a hole.
    pub old: Slot,
}

/// A record's place in the chain of records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordPlace {
    /// The commit that it belongs to.
    pub batch: u64,
    /// Which of the commit's records it is, from 0.
    pub index: u32,
    /// The tag of the record before it.
    pub chain: Tag,
}

/// What a record is to its batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// More of the batch follows.
    More,
    /// The last of its batch.
    Last,
    /// All of a batch that was written along with its data, before anybody asked for a commit: the
    /// barrier that makes it durable may be that of the batch behind it.
    Draft,
}

impl Ending {
    const fn flags(self) -> u32 {
        match self {
            Self::More => 0,
            Self::Last => FLAG_LAST,
            Self::Draft => FLAG_LAST | FLAG_DRAFT,
        }
    }
}

/// A record that was read and authenticated.
#[derive(Debug)]
pub struct Record {
    /// Blocks of the ring that it takes.
    pub blocks: u64,
    /// Whether its batch is complete with it.
    pub ending: Ending,
    /// What the next record is chained to.
    pub tag: Tag,
    /// What it changes, in order.
    pub deltas: Vec<Delta>,
}

/// Why the chain ends here.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum LogEnd {
    /// No record, or one of an earlier lap.
    #[error("no record of this batch")]
    NoRecord,
    /// A header, but nothing that authenticates: torn, or not of this chain.
    #[error("a record that does not authenticate")]
    NotAuthentic,
}

/// Ring blocks that a record of `deltas` deltas takes.
pub const fn record_blocks(deltas: usize) -> u64 {
    (HEADER_LEN + deltas * DELTA_LEN).div_ceil(BLOCK_LEN) as u64
}

/// Ring blocks that a batch of `deltas` deltas takes.
pub const fn batch_blocks(deltas: usize) -> u64 {
    let whole = (deltas / RECORD_DELTAS_MAX) as u64 * record_blocks(RECORD_DELTAS_MAX);
    match deltas % RECORD_DELTAS_MAX {
        0 => whole,
        rest => whole + record_blocks(rest),
    }
}

fn associated(header: &[u8], id: &VolumeId, chain: &Tag) -> [u8; TAG_AT + 16 + TAG_LEN] {
    let mut data = [0; TAG_AT + 16 + TAG_LEN];
    data[..TAG_AT].copy_from_slice(&header[..TAG_AT]);
    data[TAG_AT..TAG_AT + 16].copy_from_slice(id);
    data[TAG_AT + 16..].copy_from_slice(chain);
    data
}

/// Seals up to [`RECORD_DELTAS_MAX`] deltas. Returns the blocks to write and the record's tag.
pub fn seal(
    place: RecordPlace,
    ending: Ending,
    deltas: &[Delta],
    id: &VolumeId,
    (session_id, session): (u16, &Session),
    sequence: u64,
) -> (Buffer, Tag) {
    debug_assert!(deltas.len() <= RECORD_DELTAS_MAX);
    let blocks = record_blocks(deltas.len());
    let mut record = Buffer::zeroed(blocks as usize);
    record[0..4].copy_from_slice(&MAGIC.to_le_bytes());
    record[4..8].copy_from_slice(&(blocks as u32).to_le_bytes());
    record[8..16].copy_from_slice(&place.batch.to_le_bytes());
    record[16..20].copy_from_slice(&(deltas.len() as u32).to_le_bytes());
    record[20..24].copy_from_slice(&u32::from(session_id).to_le_bytes());
    record[24..28].copy_from_slice(&place.index.to_le_bytes());
    record[28..32].copy_from_slice(&ending.flags().to_le_bytes());
    record[32..40].copy_from_slice(&sequence.to_le_bytes());
    for (delta, out) in deltas
        .iter()
        .zip(record[HEADER_LEN..].chunks_exact_mut(DELTA_LEN))
    {
        out[0..6].copy_from_slice(&delta.block.0.to_le_bytes()[..6]);
        out[8..14].copy_from_slice(&delta.old.0.to_le_bytes()[..6]);
        out[16..48].copy_from_slice(&delta.entry.to_bytes());
    }
    let aad = associated(&record, id, &place.chain);
    let tag = session.log.seal(sequence, &aad, &mut record[HEADER_LEN..]);
    record[TAG_AT..HEADER_LEN].copy_from_slice(&tag);
    (record, tag)
}

/// Bytes that [`open`] needs to see of a record whose first block is `first`: what its header
/// claims, bounded.
pub fn claimed_blocks(first: &[u8]) -> Option<u64> {
    let magic = u32::from_le_bytes(*first.first_chunk()?);
    let blocks = u64::from(u32::from_le_bytes(*first.get(4..)?.first_chunk()?));
    (magic == MAGIC && (1..=RECORD_BLOCKS_MAX).contains(&blocks)).then_some(blocks)
}

/// Opens the record that is expected at `place` from its blocks.
///
/// # Errors
/// The chain ends here.
pub fn open(
    stored: &[u8],
    place: RecordPlace,
    id: &VolumeId,
    (session_id, session): (u16, &Session),
) -> Result<Record, LogEnd> {
    let blocks = claimed_blocks(stored).ok_or(LogEnd::NoRecord)?;
    let word = |at: usize| {
        stored
            .get(at..)
            .and_then(|b| b.first_chunk())
            .map_or(0, |b| u32::from_le_bytes(*b))
    };
    let long = |at: usize| {
        stored
            .get(at..)
            .and_then(|b| b.first_chunk())
            .map_or(0, |b| u64::from_le_bytes(*b))
    };
    let count = word(16) as usize;
    if long(8) != place.batch
        || word(20) != u32::from(session_id)
        || word(24) != place.index
        || count > RECORD_DELTAS_MAX
        || record_blocks(count) != blocks
    {
        return Err(LogEnd::NoRecord);
    }
    let len = blocks as usize * BLOCK_LEN;
    let mut record = stored.get(..len).ok_or(LogEnd::NoRecord)?.to_vec();
    let tag: Tag = *record[TAG_AT..].first_chunk().ok_or(LogEnd::NoRecord)?;
    let aad = associated(&record, id, &place.chain);
    session
        .log
        .open(long(32), &aad, &mut record[HEADER_LEN..], &tag)
        .map_err(|_| LogEnd::NotAuthentic)?;
    let low48 = |bytes: &[u8]| {
        let mut word = [0; 8];
        word[..6].copy_from_slice(&bytes[..6]);
        u64::from_le_bytes(word)
    };
    let deltas = record[HEADER_LEN..]
        .chunks_exact(DELTA_LEN)
        .take(count)
        .map(|bytes| Delta {
            block: Block(low48(bytes)),
            old: Slot(low48(&bytes[8..])),
            entry: Entry::from_bytes(bytes[16..48].first_chunk().expect("48 - 16 bytes")),
        })
        .collect();
    let flags = word(28);
    Ok(Record {
        blocks,
        ending: if flags & FLAG_LAST == 0 {
            Ending::More
        } else if flags & FLAG_DRAFT == 0 {
            Ending::Last
        } else {
            Ending::Draft
        },
        tag,
        deltas,
    })
}
