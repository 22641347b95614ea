//! Opening a volume: from what is on disk to a map in memory. Nothing is written here.
//!
//! 1. The valid superblock copy with the higher generation.
//! 2. All pages below its roots. A page that does not authenticate costs the blocks below it.
//! 3. The log records whose chain holds, batch by batch; a batch without its last record is
//!    dropped.
//! 4. The data of the last batch: if one slot does not authenticate, the whole batch is dropped.
//!    It was then never acknowledged: its one barrier, which covers log and data alike, cannot
//!    have completed. This is what makes one barrier for a commit enough.
//!
//! What is read may still be in a volatile cache. That needs no barrier here: nothing is acted on
//! before the activation's checkpoint, whose first barrier covers everything that was read.
//!
//! Batches before the last one are not verified: the next commit only began after their barrier.

use std::io;
use std::sync::Arc;

use crypto::aead::Engine;
use crypto::keys::{Dek, Secret32};
use crypto::session::Session;
use crypto::slot::SlotError;
use crypto::source::KeyMaterial;
use thiserror::Error;
use zeroize::Zeroizing;

use super::backing::Backing;
use super::buffer::Buffer;
use super::entry::Entry;
use super::geometry::{BLOCK_LEN, FANOUT, Slot};
use super::log::{self, Delta, RECORD_BLOCKS_MAX, RecordPlace};
use super::mutant::{self, Mutant};
use super::page::{Page, PagePlace, TreeKind};
use super::sealing::Keyring;
use super::slot_reader::SlotReader;
use super::superblock::{
    COPIES, COPY_LEN, Superblock, SuperblockError, VolumeId, session_context, volume_context,
};
use super::tree::{PageFault, Tree};

/// Why a volume cannot be opened.
#[derive(Debug, Error)]
pub enum RecoverError {
    /// The backing failed.
    #[error("reading the backing failed: {0}")]
    Io(#[from] io::Error),
    /// Too short for a volume.
    #[error(
        "this is no offload volume: it has {0} bytes, a volume has at least 6 MiB; is the path right?"
    )]
    TooShort(u64),
    /// No header in either copy.
    #[error("this is no offload volume: neither copy of its header is there; is the path right?")]
    Foreign,
    /// A header of another version.
    #[error(transparent)]
    Version(SuperblockError),
    /// The key does not fit.
    #[error(transparent)]
    Key(SlotError),
    /// Both superblock copies are unusable.
    #[error(
        "both copies of the volume's header are damaged (first: {0}; second: {1}): restore from a backup"
    )]
    BothDamaged(SuperblockError, SuperblockError),
    /// A session of the key table does not unwrap.
    #[error("session {0} of the key table does not unwrap: the volume's header is damaged")]
    Session(u16),
    /// The backing was cut.
    #[error(
        "the backing has {have} bytes but its header says {need}: it was truncated; restore it to its full length"
    )]
    Truncated {
        /// Bytes that are there.
        have: u64,
        /// Bytes that the header wants.
        need: u64,
    },
}

/// Where the log stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogPoint {
    /// Ring block of the next record.
    pub position: u64,
    /// Tag of the last record.
    pub chain: [u8; 16],
    /// The last batch before it.
    pub batch: u64,
}

/// What opening found.
pub struct Recovered {
    /// The superblock that counts.
    pub superblock: Superblock,
    /// Health of each copy.
    pub copies: [Result<u64, SuperblockError>; 2],
    /// The volume's key.
    pub dek: Dek,
    /// All sessions.
    pub keyring: Keyring,
    /// Blocks to entries, log included.
    pub map: Tree,
    /// Chunks to bitmaps, log included.
    pub space: Tree,
    /// The end of the log.
    pub end: LogPoint,
    /// Log blocks in use.
    pub log_used: u64,
    /// Batches replayed from the log.
    pub replayed: u64,
    /// Whether a last batch was found and dropped.
    pub dropped: bool,
    /// Deltas that could not be applied since their leaf is damaged.
    pub lost_deltas: u64,
}

/// What opens a volume.
#[derive(Clone, Copy, Debug)]
pub enum Unlock<'a> {
    /// What a key slot was sealed with.
    Material(&'a KeyMaterial),
    /// The volume's own key: an ephemeral volume has no key slots.
    Key(&'a Dek),
}

impl<'a> From<&'a KeyMaterial> for Unlock<'a> {
    fn from(material: &'a KeyMaterial) -> Self {
        Self::Material(material)
    }
}

impl<'a> From<&'a Dek> for Unlock<'a> {
    fn from(key: &'a Dek) -> Self {
        Self::Key(key)
    }
}

/// The volume key of the first key slot that opens.
fn volume_key(copies: &[Vec<u8>; 2], unlock: Unlock<'_>) -> Result<(Dek, VolumeId), RecoverError> {
    let material = match unlock {
        Unlock::Material(material) => material,
        Unlock::Key(key) => {
            let first = copies.iter().find_map(|copy| Superblock::peek(copy).ok());
            let (id, _) = first.ok_or(RecoverError::Foreign)?;
            let secret = Secret32::take(&mut Zeroizing::new(*key.secret().expose()));
            return Ok((Dek::from_secret(secret), id));
        }
    };
    let mut error = RecoverError::Foreign;
    for copy in copies {
        let (id, slots) = match Superblock::peek(copy) {
            Ok(found) => found,
            Err(version @ SuperblockError::Version(_)) => {
                error = RecoverError::Version(version);
                continue;
            }
            Err(_) => continue,
        };
        for slot in &slots {
            match crypto::slot::open(slot, material, &volume_context(&id)) {
                Ok(dek) => return Ok((dek, id)),
                Err(SlotError::Empty) => {}
                Err(refused) => {
                    if !matches!(error, RecoverError::Key(_)) {
                        error = RecoverError::Key(refused);
                    }
                }
            }
        }
    }
    Err(error)
}

/// Both superblock copies, and why one of them could not be read: that is what the other is for.
fn read_copies(backing: &dyn Backing) -> io::Result<([Vec<u8>; 2], Option<io::Error>)> {
    let mut copies = [Vec::new(), Vec::new()];
    let mut failed = None;
    for (copy, offset) in copies.iter_mut().zip(COPIES) {
        let mut buffer = Buffer::zeroed(COPY_LEN / BLOCK_LEN);
        match backing.read_at(offset, &mut buffer) {
            Ok(()) => *copy = buffer.to_vec(),
            Err(error) => {
                tracing::warn!(offset, %error, "a superblock copy cannot be read");
                if let Some(error) = failed.replace(error) {
                    return Err(error);
                }
            }
        }
    }
    Ok((copies, failed))
}

/// Opens a volume.
///
/// # Errors
/// See [`RecoverError`].
pub fn recover<'a>(
    backing: &dyn Backing,
    unlock: impl Into<Unlock<'a>>,
) -> Result<Recovered, RecoverError> {
    if backing.len() < COPIES[1] + COPY_LEN as u64 {
        return Err(RecoverError::TooShort(backing.len()));
    }
    let (images, unreadable) = read_copies(backing)?;
    let dek = match volume_key(&images, unlock.into()) {
        Ok((dek, _)) => dek,
        Err(error) => return Err(unreadable.map_or(error, RecoverError::Io)),
    };
    let opened = images.each_ref().map(|image| Superblock::open(image, &dek));
    let copies = opened.each_ref().map(|copy| match copy {
        Ok(superblock) => Ok(superblock.generation),
        Err(SuperblockError::Version(v)) => Err(SuperblockError::Version(*v)),
        Err(SuperblockError::NoMagic) => Err(SuperblockError::NoMagic),
        Err(SuperblockError::Field(field)) => Err(SuperblockError::Field(field)),
        Err(SuperblockError::Tag) => Err(SuperblockError::Tag),
    });
    let superblock = match opened {
        [Ok(a), Ok(b)] => {
            if b.generation > a.generation {
                b
            } else {
                a
            }
        }
        [Ok(one), Err(_)] | [Err(_), Ok(one)] => one,
        [Err(a), Err(b)] => {
            return Err(unreadable.map_or(RecoverError::BothDamaged(a, b), RecoverError::Io));
        }
    };
    let need = superblock.geometry.backing_len();
    if backing.len() < need {
        return Err(RecoverError::Truncated {
            have: backing.len(),
            need,
        });
    }
    let mut keyring = Keyring::default();
    for row in &superblock.table {
        let key = dek
            .unwrap_session(&row.wrapped, &session_context(&superblock.id, row.id))
            .map_err(|_| RecoverError::Session(row.id))?;
        keyring.insert(row.id, Arc::new(Session::derive(Engine::default(), &key)));
    }
    let map = load(
        backing,
        &superblock,
        &keyring,
        TreeKind::Map,
        superblock.map_root,
    )?;
    let space = load(
        backing,
        &superblock,
        &keyring,
        TreeKind::Space,
        superblock.space_root,
    )?;
    let end = LogPoint {
        position: superblock.log_position,
        chain: superblock.chain,
        batch: superblock.batch,
    };
    let mut recovered = Recovered {
        superblock,
        copies,
        dek,
        keyring,
        map,
        space,
        end,
        log_used: 0,
        replayed: 0,
        dropped: false,
        lost_deltas: 0,
    };
    if !recovered.superblock.clean {
        recovered.replay(backing)?;
    }
    Ok(recovered)
}

fn load(
    backing: &dyn Backing,
    superblock: &Superblock,
    keyring: &Keyring,
    kind: TreeKind,
    root: Entry,
) -> io::Result<Tree> {
    let mut reader = SlotReader::new(backing);
    Tree::load(kind, root, &mut |place: PagePlace, entry: &Entry| {
        let session = keyring.get(entry.session());
        let (Some(session), true) = (session, superblock.geometry.is_data_slot(entry.slot()))
        else {
            return Err(PageFault::Damaged);
        };
        let stored = reader.read(entry.slot()).map_err(PageFault::Io)?;
        Page::open(stored, place, &superblock.id, session, entry).map_err(|_| PageFault::Damaged)
    })
}

impl Recovered {
    /// Reads the records of the batch that would follow `self.end`. `None`: there is no complete
    /// one.
    fn next_batch(
        &self,
        reader: &mut SlotReader<'_>,
    ) -> io::Result<Option<(Vec<Delta>, LogPoint, u64)>> {
        let geometry = &self.superblock.geometry;
        let session_id = self.superblock.session;
        let Some(session) = self.keyring.get(session_id) else {
            return Ok(None);
        };
        let mut deltas = Vec::new();
        let mut at = self.end;
        let mut used = 0;
        let mut buffer = Buffer::zeroed(RECORD_BLOCKS_MAX as usize);
        for index in 0.. {
            let room = geometry.log_blocks() - self.log_used - used;
            let mut seen = 0;
            let mut wanted = 1;
            while seen < wanted && seen < room {
                let stored = reader.read(geometry.log_slot(at.position + seen))?;
                buffer.block_mut(seen as usize).copy_from_slice(stored);
                seen += 1;
                if seen == 1 {
                    wanted = log::claimed_blocks(&buffer[..BLOCK_LEN]).unwrap_or(1);
                }
            }
            let place = RecordPlace {
                batch: self.end.batch + 1,
                index,
                chain: at.chain,
            };
            let stored = &buffer[..seen as usize * BLOCK_LEN];
            let Ok(record) = log::open(stored, place, &self.superblock.id, (session_id, session))
            else {
                return Ok(None);
            };
            used += record.blocks;
            at.position = (at.position + record.blocks) % geometry.log_blocks();
            at.chain = record.tag;
            deltas.extend(record.deltas);
            if record.is_last {
                at.batch = place.batch;
                return Ok(Some((deltas, at, used)));
            }
        }
        Ok(None)
    }

    fn replay(&mut self, backing: &dyn Backing) -> io::Result<()> {
        let mut reader = SlotReader::new(backing);
        let mut next = self.next_batch(&mut reader)?;
        while let Some((deltas, point, used)) = next {
            let before = (self.end, self.log_used);
            self.end = point;
            self.log_used += used;
            next = self.next_batch(&mut reader)?;
            let is_last = next.is_none();
            if is_last && !mutant::is(Mutant::SkipVerify) && !self.verify(backing, &deltas)? {
                (self.end, self.log_used) = before;
                self.dropped = true;
                break;
            }
            for delta in &deltas {
                self.apply(delta);
            }
            self.replayed += 1;
        }
        Ok(())
    }

    /// Whether the data of every delta authenticate.
    fn verify(&self, backing: &dyn Backing, deltas: &[Delta]) -> io::Result<bool> {
        let mut data: Vec<&Delta> = deltas.iter().filter(|d| !d.entry.is_hole()).collect();
        data.sort_unstable_by_key(|delta| delta.entry.slot());
        let mut reader = SlotReader::new(backing);
        for delta in data {
            if !self.superblock.geometry.is_data_slot(delta.entry.slot()) {
                return Ok(false);
            }
            let stored = reader.read(delta.entry.slot())?;
            let opened = self.keyring.open_block(delta.block, &delta.entry, stored);
            if opened.is_err() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Puts a delta into map and space tree.
    pub fn apply(&mut self, delta: &Delta) {
        let leaf = delta.block.0 / FANOUT;
        if delta.block.0 >= self.superblock.geometry.blocks || self.map.is_damaged(leaf) {
            self.lost_deltas += 1;
            return;
        }
        self.map
            .leaf_mut(leaf)
            .set_entry(delta.block.0, delta.entry);
        let geometry = self.superblock.geometry;
        if geometry.is_data_slot(delta.old) {
            self.space.set_used(delta.old, false);
        }
        if geometry.is_data_slot(delta.entry.slot()) {
            self.space.set_used(delta.entry.slot(), true);
        }
    }

    /// The entry of a block; `None` if its leaf is damaged or it is past the end.
    pub fn entry(&self, block: u64) -> Option<Entry> {
        let leaf = block / FANOUT;
        if block >= self.superblock.geometry.blocks || self.map.is_damaged(leaf) {
            return None;
        }
        Some(
            self.map
                .leaf(leaf)
                .map_or(Entry::HOLE, |page| page.entry(block)),
        )
    }

    /// Every mapped block in order.
    pub fn blocks(&self) -> impl Iterator<Item = (u64, Entry)> {
        let mut leaves: Vec<_> = self.map.leaves().collect();
        leaves.sort_unstable_by_key(|(index, _)| *index);
        leaves.into_iter().flat_map(|(index, page)| {
            (0..FANOUT)
                .map(move |field| (index * FANOUT + field, page.entry(field)))
                .filter(|(_, entry)| !entry.is_hole())
        })
    }

    /// Every slot that the space tree has in use.
    pub fn used_slots(&self) -> impl Iterator<Item = Slot> {
        self.space.leaves().flat_map(|(leaf, page)| {
            (0..FANOUT).flat_map(move |field| {
                let first = (leaf * FANOUT + field) * super::geometry::CHUNK_SLOTS;
                let bits = *page.field(field);
                (0..super::geometry::CHUNK_SLOTS)
                    .filter(move |bit| bits[(bit / 8) as usize] & (1 << (bit % 8)) != 0)
                    .map(move |bit| Slot(first + bit))
            })
        })
    }
}
