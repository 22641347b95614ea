//! The superblock and the key table behind it.
//!
//! There are two copies, at 0 and at 1 MiB, each a 4 KiB superblock followed by its key table.
//! A checkpoint writes one, makes it durable, then writes the same bytes to the other. So at any
//! instant one valid copy holds the newest durable state, and outside of that short window both
//! do: losing either to a bad sector loses nothing.
//!
//! ```text
//! 0    magic "OFFLDVOL"      8      144  space root entry       32
//! 8    version u32           4      176  adopted session u32     4
//! 12   flags u32, below      4      180  key table entries u32   4
//! 16   volume id            16      184  created, Unix s u64     8
//! 32   generation u64        8      192  serial, ASCII          20
//! 40   session u32           4      212  reserved, zero        300
//! 44   log chunks u32        4      512  8 key slots of 256   2048
//! 48   sequence u64          8      2560 reserved, zero       1520
//! 56   blocks u64            8      4080 tag                    16
//! 64   chunks u64            8
//! 72   log position u64      8      key table entry, 96 bytes:
//! 80   batch u64             8      0  id u32          24 reserved, zero 12
//! 88   log chain            16      4  flags u32, zero 36 wrapped key 60
//! 104  reserved, zero        8      8  live u64
//! 112  map root entry       32      16 created u64
//! ```
//!
//! Flags: 1 closed clean, 2 an import into it has not ended.
//!
//! Everything is authenticated and nothing in it is secret: the tag is AES-256-GCM over no
//! plaintext with both the superblock and the key table as associated data, under a key of the
//! session named in it and that session's sequence number. A nonce under the *volume's* key would
//! have to be a generation number, and two copies of an image that are both written would use
//! it twice; a session key is random for each activation.
//!
//! The superblock and its table may be torn apart by a power cut: the tag then fails and the
//! other copy, one generation older, is used. That is safe since nothing the older one names is
//! freed before the newer one is durable.

use crypto::aead::{Engine, TAG_LEN};
use crypto::keys::{Dek, WRAPPED_LEN, Wrapped};
use crypto::session::Session;
use crypto::slot::SLOT_LEN;
use thiserror::Error;

use super::entry::{ENTRY_LEN, Entry};
use super::geometry::{BLOCK_LEN, CHUNK_LEN, Geometry};

/// What a volume starts with.
pub const MAGIC: [u8; 8] = *b"OFFLDVOL";
/// Version of the whole format.
pub const VERSION: u32 = 1;
/// Byte offsets of the two copies.
pub const COPIES: [u64; 2] = [0, CHUNK_LEN];
/// Bytes of a copy.
pub const COPY_LEN: usize = CHUNK_LEN as usize;
/// Key slots of a superblock.
pub const KEY_SLOTS: usize = 8;
/// Bytes of a key-table entry.
pub const TABLE_ENTRY_LEN: usize = 96;
/// Sessions that a key table can hold.
pub const TABLE_MAX: usize = (COPY_LEN - BLOCK_LEN) / TABLE_ENTRY_LEN;
/// Bytes of a serial number (virtio 1.3, 5.2.6: VIRTIO_BLK_T_GET_ID).
pub const SERIAL_LEN: usize = 20;

/// Above what generations and batches can be counted to. Sums of one below it do not overflow.
pub const COUNTER_MAX: u64 = 1 << 62;

const KEY_SLOTS_AT: usize = 512;
const TAG_AT: usize = BLOCK_LEN - TAG_LEN;
const FLAG_CLEAN: u32 = 1;
const FLAG_INCOMPLETE: u32 = 2;

const _: () = assert!(KEY_SLOTS_AT + KEY_SLOTS * SLOT_LEN <= TAG_AT);
const _: () = assert!(36 + WRAPPED_LEN == TABLE_ENTRY_LEN);
const _: () = assert!(TABLE_MAX < u16::MAX as usize);

/// A random 16 bytes that name a volume.
pub type VolumeId = [u8; 16];

/// One session's row in the key table.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KeyEntry {
    /// 1..=65535; what entries name.
    pub id: u16,
    /// Blocks and pages that name it. A session that none names is dropped at an activation.
    pub live: u64,
    /// Seconds since the Unix epoch.
    pub created: u64,
    /// Its key, wrapped by the volume's.
    pub wrapped: Wrapped,
}

/// A superblock's meaning.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Superblock {
    /// Names the volume; part of what keys are wrapped and pages are sealed with.
    pub id: VolumeId,
    /// Counts superblocks; the valid copy with the higher one is current.
    pub generation: u64,
    /// Everything acknowledged is in the map; no log, no in-flight ring is needed.
    pub clean: bool,
    /// An import into it has not ended: what is missing reads as zeros.
    pub incomplete: bool,
    /// The session that authenticates this superblock.
    pub session: u16,
    /// Its nonce counter.
    pub sequence: u64,
    /// Sizes.
    pub geometry: Geometry,
    /// Where the first log record that is not in the map stands, in log blocks.
    pub log_position: u64,
    /// The last commit that is in the map.
    pub batch: u64,
    /// What the first record behind `log_position` is chained to.
    pub chain: [u8; 16],
    /// Root of the map tree.
    pub map_root: Entry,
    /// Root of the space tree.
    pub space_root: Entry,
    /// The earlier session whose in-flight ring this activation took over; 0 if none.
    pub adopted: u16,
    /// Seconds since the Unix epoch.
    pub created: u64,
    /// What GET_ID answers, zero-padded.
    pub serial: [u8; SERIAL_LEN],
    /// Wrapped volume keys.
    pub key_slots: [[u8; SLOT_LEN]; KEY_SLOTS],
    /// Sessions.
    pub table: Vec<KeyEntry>,
}

/// See [`Superblock::claims`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Claims {
    /// Version of the format.
    pub version: u32,
    /// Names the volume.
    pub id: VolumeId,
    /// Counts superblocks.
    pub generation: u64,
    /// Whether it was closed.
    pub is_clean: bool,
    /// Whether an import into it has not ended.
    pub is_incomplete: bool,
    /// Bytes that the guest sees.
    pub volume_len: u64,
    /// Bytes that the backing has to have.
    pub backing_len: u64,
    /// Seconds since the Unix epoch.
    pub created: u64,
    /// What GET_ID answers.
    pub serial: [u8; SERIAL_LEN],
    /// Wrapped volume keys.
    pub key_slots: [[u8; SLOT_LEN]; KEY_SLOTS],
}

/// Why a copy is not used.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum SuperblockError {
    /// Not one of ours.
    #[error("no volume header")]
    NoMagic,
    /// Ours, but of a version that this program does not know.
    #[error("volume format version {0} is not supported by this program (it knows version 1)")]
    Version(u32),
    /// A field is out of range.
    #[error("the header is damaged: {0}")]
    Field(&'static str),
    /// The tag does not fit.
    #[error("the header does not authenticate")]
    Tag,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[at..at + N]);
    array
}

/// What a session key is wrapped with as context.
pub fn session_context(id: &VolumeId, session: u16) -> Vec<u8> {
    let mut context = b"offload volume session".to_vec();
    context.extend_from_slice(id);
    context.extend_from_slice(&session.to_le_bytes());
    context
}

/// What the volume key is wrapped with as context.
pub fn volume_context(id: &VolumeId) -> Vec<u8> {
    let mut context = b"offload volume".to_vec();
    context.extend_from_slice(id);
    context
}

impl Superblock {
    /// Bytes of the copy that are written: the superblock and the used part of its table,
    /// rounded up to blocks.
    fn image_len(entries: usize) -> usize {
        BLOCK_LEN + (entries * TABLE_ENTRY_LEN).next_multiple_of(BLOCK_LEN)
    }

    /// The sealed copy. `session` must be the one that [`Superblock::session`] names and
    /// [`Superblock::sequence`] a fresh number of it.
    ///
    /// # Panics
    /// More sessions than a table holds: activation refuses before it comes to that.
    pub fn seal(&self, session: &Session) -> Vec<u8> {
        assert!(self.table.len() <= TABLE_MAX);
        let mut image = vec![0; Self::image_len(self.table.len())];
        let (block, table) = image.split_at_mut(BLOCK_LEN);
        block[0..8].copy_from_slice(&MAGIC);
        block[8..12].copy_from_slice(&VERSION.to_le_bytes());
        let flag = |is_set, flag| if is_set { flag } else { 0 };
        let flags = flag(self.clean, FLAG_CLEAN) | flag(self.incomplete, FLAG_INCOMPLETE);
        block[12..16].copy_from_slice(&flags.to_le_bytes());
        block[16..32].copy_from_slice(&self.id);
        block[32..40].copy_from_slice(&self.generation.to_le_bytes());
        block[40..44].copy_from_slice(&u32::from(self.session).to_le_bytes());
        block[44..48].copy_from_slice(&(self.geometry.log_chunks as u32).to_le_bytes());
        block[48..56].copy_from_slice(&self.sequence.to_le_bytes());
        block[56..64].copy_from_slice(&self.geometry.blocks.to_le_bytes());
        block[64..72].copy_from_slice(&self.geometry.chunks.to_le_bytes());
        block[72..80].copy_from_slice(&self.log_position.to_le_bytes());
        block[80..88].copy_from_slice(&self.batch.to_le_bytes());
        block[88..104].copy_from_slice(&self.chain);
        block[112..144].copy_from_slice(&self.map_root.to_bytes());
        block[144..176].copy_from_slice(&self.space_root.to_bytes());
        block[176..180].copy_from_slice(&u32::from(self.adopted).to_le_bytes());
        block[180..184].copy_from_slice(&(self.table.len() as u32).to_le_bytes());
        block[184..192].copy_from_slice(&self.created.to_le_bytes());
        block[192..212].copy_from_slice(&self.serial);
        for (index, slot) in self.key_slots.iter().enumerate() {
            let at = KEY_SLOTS_AT + index * SLOT_LEN;
            block[at..at + SLOT_LEN].copy_from_slice(slot);
        }
        for (entry, out) in self
            .table
            .iter()
            .zip(table.chunks_exact_mut(TABLE_ENTRY_LEN))
        {
            out[0..4].copy_from_slice(&u32::from(entry.id).to_le_bytes());
            out[8..16].copy_from_slice(&entry.live.to_le_bytes());
            out[16..24].copy_from_slice(&entry.created.to_le_bytes());
            out[36..].copy_from_slice(entry.wrapped.as_bytes());
        }
        let tag = session
            .superblock
            .seal(self.sequence, &associated(&image), &mut []);
        image[TAG_AT..BLOCK_LEN].copy_from_slice(&tag);
        image
    }

    /// Key slots and id of a copy, before anything is authenticated: what is needed to get the
    /// volume key that the rest is verified with.
    ///
    /// # Errors
    /// It is no header of a known version.
    pub fn peek(copy: &[u8]) -> Result<(VolumeId, [[u8; SLOT_LEN]; KEY_SLOTS]), SuperblockError> {
        if copy.len() < BLOCK_LEN || copy[0..8] != MAGIC {
            return Err(SuperblockError::NoMagic);
        }
        let version = u32_at(copy, 8);
        if version != VERSION {
            return Err(SuperblockError::Version(version));
        }
        let slots = std::array::from_fn(|index| array_at(copy, KEY_SLOTS_AT + index * SLOT_LEN));
        Ok((array_at(copy, 16), slots))
    }

    /// What a copy says of itself to those who have no key. Nothing of it is authenticated.
    ///
    /// # Errors
    /// It is no header of a known version.
    pub fn claims(copy: &[u8]) -> Result<Claims, SuperblockError> {
        let (id, key_slots) = Self::peek(copy)?;
        Ok(Claims {
            version: u32_at(copy, 8),
            id,
            generation: u64_at(copy, 32),
            is_clean: u32_at(copy, 12) & FLAG_CLEAN != 0,
            is_incomplete: u32_at(copy, 12) & FLAG_INCOMPLETE != 0,
            backing_len: u64_at(copy, 64).saturating_mul(CHUNK_LEN),
            volume_len: u64_at(copy, 56).saturating_mul(BLOCK_LEN as u64),
            created: u64_at(copy, 184),
            serial: array_at(copy, 192),
            key_slots,
        })
    }

    /// Parses and authenticates a copy (up to [`COPY_LEN`] bytes of it).
    ///
    /// # Errors
    /// It is foreign, of another version, damaged, or sealed under another key.
    pub fn open(copy: &[u8], dek: &Dek) -> Result<Self, SuperblockError> {
        let (id, key_slots) = Self::peek(copy)?;
        let field =
            |value: u32, name| u16::try_from(value).map_err(|_| SuperblockError::Field(name));
        let flags = u32_at(copy, 12);
        if flags & !(FLAG_CLEAN | FLAG_INCOMPLETE) != 0 {
            return Err(SuperblockError::Field("unknown flags"));
        }
        let session = field(u32_at(copy, 40), "session")?;
        let entries = u32_at(copy, 180) as usize;
        let image_len = Self::image_len(entries.min(TABLE_MAX + 1));
        if entries > TABLE_MAX || copy.len() < image_len {
            return Err(SuperblockError::Field("key table length"));
        }
        let image = &copy[..image_len];
        let mut table = Vec::with_capacity(entries);
        for row in image[BLOCK_LEN..]
            .chunks_exact(TABLE_ENTRY_LEN)
            .take(entries)
        {
            let id = field(u32_at(row, 0), "session id")?;
            if id == 0 || u32_at(row, 4) != 0 {
                return Err(SuperblockError::Field("key table entry"));
            }
            table.push(KeyEntry {
                id,
                live: u64_at(row, 8),
                created: u64_at(row, 16),
                wrapped: Wrapped::from_bytes(array_at(row, 36)),
            });
        }
        let author =
            table
                .iter()
                .find(|entry| entry.id == session)
                .ok_or(SuperblockError::Field(
                    "its session is not in the key table",
                ))?;
        let key = dek
            .unwrap_session(&author.wrapped, &session_context(&id, session))
            .map_err(|_| SuperblockError::Tag)?;
        let sequence = u64_at(copy, 48);
        let keys = Session::derive(Engine::default(), &key);
        keys.superblock
            .open(
                sequence,
                &associated(image),
                &mut [],
                &array_at(image, TAG_AT),
            )
            .map_err(|_| SuperblockError::Tag)?;
        if u64_at(copy, 32) > COUNTER_MAX || u64_at(copy, 80) > COUNTER_MAX {
            return Err(SuperblockError::Field("generation or batch"));
        }
        let geometry = Geometry {
            blocks: u64_at(copy, 56),
            chunks: u64_at(copy, 64),
            log_chunks: u64::from(u32_at(copy, 44)),
        }
        .check()
        .map_err(|_| SuperblockError::Field("sizes"))?;
        Ok(Self {
            id,
            generation: u64_at(copy, 32),
            clean: flags & FLAG_CLEAN != 0,
            incomplete: flags & FLAG_INCOMPLETE != 0,
            session,
            sequence,
            geometry,
            log_position: u64_at(copy, 72) % geometry.log_blocks(),
            batch: u64_at(copy, 80),
            chain: array_at(copy, 88),
            map_root: Entry::from_bytes(&array_at::<ENTRY_LEN>(copy, 112)),
            space_root: Entry::from_bytes(&array_at::<ENTRY_LEN>(copy, 144)),
            adopted: field(u32_at(copy, 176), "adopted session")?,
            created: u64_at(copy, 184),
            serial: array_at(copy, 192),
            key_slots,
            table,
        })
    }
}

/// What the tag covers: all of the image but the tag itself.
fn associated(image: &[u8]) -> Vec<u8> {
    let mut data = Vec::with_capacity(image.len());
    data.extend_from_slice(&image[..TAG_AT]);
    data.extend_from_slice(&image[BLOCK_LEN..]);
    data
}
