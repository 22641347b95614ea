//! Opening a volume: from what is on disk to a state in memory. Nothing is written here.
//!
//! 1. The valid superblock copy with the higher generation.
//! 2. The space tree, and the map's pages above the leaves, which say where pages are. A page that
//!    cannot be had costs what is below it. Leaves are read when they are needed.
//! 3. The log records whose chain holds, batch by batch; a batch without its last record is
//!    dropped.
//! 4. The data of the last batch: if one slot does not authenticate, the whole batch is dropped.
//!    It was then never acknowledged: its one barrier, which covers log and data alike, cannot
//!    have completed. This is what makes one barrier for a commit enough. If the batch before it is
//!    a [draft](log::Ending::Draft), that may have been its barrier too, and the draft is the last batch
//!    now.
//!    (A batch behind a draft that had no barrier has all of the draft's blocks again.)
//! 5. What the log changes goes into the leaves, which are read for that. They stay in memory until
//!    the next checkpoint: the budget of the process that wrote the log bounded them (see
//!    [`map`](super::map)). Changes wait until there are many of them, in a quarter of the map's memory
//!    at most besides it: 1.3 million of them in 64,000 leaves took 1.05 s in groups of 64 Ki, a read
//!    for each leaf; in one group, in which nearly all leaves have their neighbours, 0.49 s.
//!
//! How many blocks and pages name a session stands in the superblock's key table, so nothing has
//! to be counted.
//!
//! # Pages that cannot be had
//! One that does not *authenticate* is lost, and so is what is below it: it may be overwritten. Of one
//! that cannot be *read* nothing can be said; the device may give it later. If it is a leaf, its
//! requests fail and nothing else. If it is a page above, or one that the log changes, the volume
//! can be read, but taking writes is refused: where the pages below are is not known, and the
//! log's changes of it would be dropped.
//!
//! What is read may still be in a volatile cache. Nothing is acted on before the activation's first
//! barrier, which covers everything that was read.
//!
//! Batches before these are not verified: the next commit only began after their barrier.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;

use crypto::aead::Engine;
use crypto::keys::{Dek, Secret32};
use crypto::session::Session;
use crypto::slot::{SLOT_LEN, SlotError};
use crypto::source::KeyMaterial;
use smallvec::SmallVec;
use thiserror::Error;
use zeroize::Zeroizing;

use super::backing::Backing;
use super::buffer::Buffer;
use super::entry::Entry;
use super::geometry::{BLOCK_LEN, CHUNK_SLOTS, FANOUT, Geometry, Slot};
use super::log::{self, Delta, Ending, RECORD_BLOCKS_MAX, RecordPlace};
use super::map::{
    LostLeaf, MapTree, Visit, default_budget, each_leaf, load_leaves, open_upper, smallest_budget,
};
use super::mutant::{self, Mutant};
use super::page::{PagePlace, TreeKind};
use super::page_reader::{PageFault, PageReader};
use super::sealing::Keyring;
use super::slot_reader::SlotReader;
use super::space::Space;
use super::superblock::{
    COPIES, COPY_LEN, Superblock, SuperblockError, session_context, volume_context,
};
use super::tree::Tree;

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
    /// The key opens only the copy that does not count.
    #[error(
        "this key opens only the older copy of the volume's header: the newer one, which counts, has other key \
         slots; give the key that opens those"
    )]
    OtherKeySlots,
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
    /// The map cannot be served in so little memory.
    #[error(
        "a metadata cache of {given} bytes is too small for this volume: give at least {least} ({} MiB)", least >> 20
    )]
    CacheTooSmall {
        /// Bytes that were to be enough.
        given: u64,
        /// Bytes that are.
        least: u64,
    },
}

/// Deltas of the log that are put into the map together, at least. The more, the more of their leaves
/// lie side by side in the backing and are read at once: a checkpoint wrote them in a row.
const REPLAY_GROUP: usize = 64 << 10;
/// The share of the map's memory that they may take, which only opening needs.
const REPLAY_SHARE: u64 = 4;

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
    pub map: MapTree,
    /// Chunks to bitmaps, log included.
    pub space: Tree,
    /// Slots that are in use.
    pub(super) allocator: Space,
    /// Chunks with pages in them.
    pub(super) page_chunks: BTreeSet<u64>,
    /// Blocks and pages that name a session.
    pub(super) live: HashMap<u16, i64>,
    /// Pages of the map, of level 1 and above, that could not be had.
    pub missing: Vec<(PagePlace, PageFault)>,
    /// Leaves that the log changes and that could not be had.
    pub lost_leaves: Vec<LostLeaf>,
    /// Whether it is known which slots are free: not if pages of both trees are lost.
    pub is_space_known: bool,
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
    /// Bytes of memory that the map of a volume of so many blocks has to have, should it grow.
    pub(super) cache_for: fn(u64) -> u64,
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

/// The volume key of the first key slot that opens, and that slot.
fn volume_key(
    copies: &[Vec<u8>; 2],
    unlock: Unlock<'_>,
) -> Result<(Dek, Option<[u8; SLOT_LEN]>), RecoverError> {
    let material = match unlock {
        Unlock::Material(material) => material,
        Unlock::Key(key) => {
            let first = copies.iter().find_map(|copy| Superblock::peek(copy).ok());
            first.ok_or(RecoverError::Foreign)?;
            let secret = Secret32::take(&mut Zeroizing::new(*key.secret().expose()));
            return Ok((Dek::from_secret(secret), None));
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
                Ok(dek) => return Ok((dek, Some(*slot))),
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

/// Opens a volume with as much memory for its map as it gets by default.
///
/// # Errors
/// See [`RecoverError`].
pub fn recover<'a>(
    backing: &dyn Backing,
    unlock: impl Into<Unlock<'a>>,
) -> Result<Recovered, RecoverError> {
    recover_with(backing, unlock, None)
}

/// Opens a volume. `cache`: bytes of memory for its map.
///
/// # Errors
/// See [`RecoverError`].
pub fn recover_with<'a>(
    backing: &dyn Backing,
    unlock: impl Into<Unlock<'a>>,
    cache: Option<u64>,
) -> Result<Recovered, RecoverError> {
    let mut recovered = open(backing, unlock.into(), &|geometry| {
        let least = smallest_budget(geometry.blocks);
        match cache {
            Some(given) if given < least => Err(RecoverError::CacheTooSmall { given, least }),
            Some(given) => Ok(given),
            None => Ok(default_budget(geometry.blocks)),
        }
    })?;
    recovered.cache_for = match cache {
        Some(_) => smallest_budget,
        None => default_budget,
    };
    Ok(recovered)
}

/// As [`recover_with`], however little memory it is.
///
/// # Errors
/// See [`RecoverError`].
#[cfg(test)]
pub(crate) fn recover_within(
    backing: &dyn Backing,
    material: &KeyMaterial,
    cache: u64,
) -> Result<Recovered, RecoverError> {
    open(backing, material.into(), &|_| Ok(cache))
}

fn open(
    backing: &dyn Backing,
    unlock: Unlock<'_>,
    budget: &dyn Fn(&Geometry) -> Result<u64, RecoverError>,
) -> Result<Recovered, RecoverError> {
    if backing.len() < COPIES[1] + COPY_LEN as u64 {
        return Err(RecoverError::TooShort(backing.len()));
    }
    let (images, unreadable) = read_copies(backing)?;
    let (dek, opened_by) = match volume_key(&images, unlock) {
        Ok(found) => found,
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
    // The first checkpoint writes these slots to both copies.
    if opened_by.is_some_and(|slot| !superblock.key_slots.contains(&slot)) {
        return Err(RecoverError::OtherKeySlots);
    }
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
    let geometry = superblock.geometry;
    let reader = PageReader {
        backing,
        keyring: &keyring,
        id: superblock.id,
        geometry,
    };
    let mut allocator = Space::new(geometry);
    let mut page_chunks = BTreeSet::new();
    let mut named = |entry: Entry| {
        allocator.mark(entry.slot());
        if geometry.is_data_slot(entry.slot()) {
            page_chunks.insert(entry.slot().chunk());
        }
    };
    let space = Tree::load(TreeKind::Space, superblock.space_root, &reader);
    space.page_entries().for_each(&mut named);
    let cache = budget(&geometry)?;
    let mut map = MapTree::new(superblock.map_root, cache);
    let missing = open_upper(&mut map, &reader, &mut named);
    // No more can name a session than there are slots; what counts on from here must not overflow.
    let slots = geometry.chunks.saturating_mul(CHUNK_SLOTS);
    let live = superblock
        .table
        .iter()
        .map(|row| (row.id, row.live.min(slots).cast_signed()))
        .collect();
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
        allocator,
        page_chunks,
        live,
        missing,
        lost_leaves: Vec::new(),
        is_space_known: true,
        end,
        log_used: 0,
        replayed: 0,
        dropped: false,
        lost_deltas: 0,
        cache_for: |_| 0,
    };
    if !recovered.superblock.clean {
        let group =
            usize::try_from(cache / REPLAY_SHARE).unwrap_or(usize::MAX) / size_of::<Delta>();
        recovered.replay(backing, group.max(REPLAY_GROUP))?;
    }
    recovered.find_used_slots(backing);
    Ok(recovered)
}

/// A complete batch of the log.
struct Batch {
    deltas: Vec<Delta>,
    /// The log before it, and blocks in use there.
    before: (LogPoint, u64),
    end: LogPoint,
    used: u64,
    is_draft: bool,
}

impl Recovered {
    /// Reads the records of the batch that would follow `self.end`. `None`: there is no complete
    /// one.
    fn next_batch(&self, reader: &mut SlotReader<'_>) -> io::Result<Option<Batch>> {
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
            if record.ending != Ending::More {
                at.batch = place.batch;
                return Ok(Some(Batch {
                    deltas,
                    before: (self.end, self.log_used),
                    end: at,
                    used,
                    is_draft: record.ending == Ending::Draft,
                }));
            }
        }
        Ok(None)
    }

    /// `group`: how many deltas are put into the map together.
    fn replay(&mut self, backing: &dyn Backing, group: usize) -> io::Result<()> {
        let mut reader = SlotReader::new(backing);
        let mut good = Vec::new();
        // The newest batch, and before it a draft whose barrier may be the same.
        let mut tail: SmallVec<[Batch; 2]> = SmallVec::new();
        while let Some(batch) = self.next_batch(&mut reader)? {
            self.end = batch.end;
            self.log_used += batch.used;
            let is_open = tail.last().is_some_and(|newest| newest.is_draft);
            let durable = tail.len() - usize::from(is_open);
            for batch in tail.drain(..durable) {
                good.extend(batch.deltas);
                self.replayed += 1;
            }
            if good.len() >= group {
                self.apply(backing, &mut good);
            }
            tail.push(batch);
        }
        let sound = self.sound(backing, &tail)?;
        if let Some(dropped) = tail.get(sound) {
            (self.end, self.log_used) = dropped.before;
            self.dropped = true;
        }
        for batch in tail.drain(..sound) {
            good.extend(batch.deltas);
            self.replayed += 1;
        }
        self.apply(backing, &mut good);
        Ok(())
    }

    /// How many of the last batches have their data: the newest, or if that has not, a draft before it.
    fn sound(&self, backing: &dyn Backing, tail: &[Batch]) -> io::Result<usize> {
        let Some((newest, before)) = tail.split_last() else {
            return Ok(0);
        };
        if mutant::is(Mutant::SkipVerify) || self.verify(backing, &newest.deltas)? {
            Ok(tail.len())
        } else if mutant::is(Mutant::SkipDraft) {
            Ok(before.len())
        } else {
            self.sound(backing, before)
        }
    }

    /// Whether the data of every delta authenticate.
    fn verify(&self, backing: &dyn Backing, deltas: &[Delta]) -> io::Result<bool> {
        let data: Vec<&Delta> = deltas.iter().filter(|d| !d.entry.is_hole()).collect();
        let slots: Vec<Slot> = data.iter().map(|delta| delta.entry.slot()).collect();
        let geometry = &self.superblock.geometry;
        if !slots.iter().all(|slot| geometry.is_data_slot(*slot)) {
            return Ok(false);
        }
        let mut failed = None;
        let mut is_authentic = true;
        backing.read_many(
            &slots,
            &mut |index, outcome| match (outcome, data.get(index)) {
                (Ok(stored), Some(delta)) => {
                    let opened = self.keyring.open_block(delta.block, &delta.entry, stored);
                    is_authentic &= opened.is_ok();
                }
                (Err(error), _) => failed = Some(error),
                (Ok(_), None) => {}
            },
        );
        match failed {
            // One that does not authenticate tells more than one that cannot be read.
            Some(error) if is_authentic => Err(error),
            _ => Ok(is_authentic),
        }
    }

    /// Puts deltas into map and space tree.
    fn apply(&mut self, backing: &dyn Backing, deltas: &mut Vec<Delta>) {
        let geometry = self.superblock.geometry;
        let reader = PageReader {
            backing,
            keyring: &self.keyring,
            id: self.superblock.id,
            geometry,
        };
        let inside = |delta: &&Delta| delta.block.0 < geometry.blocks;
        let leaves = deltas
            .iter()
            .filter(inside)
            .map(|delta| delta.block.0 / FANOUT);
        for lost in load_leaves(&mut self.map, &reader, leaves) {
            if self.map.lose(lost.leaf) {
                self.lost_leaves.push(lost);
            }
        }
        for delta in deltas.drain(..) {
            let leaf = delta.block.0 / FANOUT;
            let is_known = delta.block.0 < geometry.blocks && self.map.leaf(leaf).is_ok();
            let page = is_known.then(|| self.map.leaf_mut(leaf)).flatten();
            let Some(page) = page else {
                self.lost_deltas += 1;
                continue;
            };
            let old = page.entry(delta.block.0);
            page.set_entry(delta.block.0, delta.entry);
            for (entry, change) in [(old, -1), (delta.entry, 1)] {
                if !entry.is_hole() {
                    *self.live.entry(entry.session()).or_default() += change;
                }
            }
            if geometry.is_data_slot(delta.old) {
                self.space.set_used(delta.old, false);
            }
            if geometry.is_data_slot(delta.entry.slot()) {
                self.space.set_used(delta.entry.slot(), true);
            }
        }
    }

    /// Tells the allocator what the space tree says.
    fn find_used_slots(&mut self, backing: &dyn Backing) {
        if !self.space.damaged().is_empty() {
            self.remake_bitmaps(backing);
        }
        for (leaf, page) in self.space.leaves() {
            for field in 0..FANOUT {
                let first = (leaf * FANOUT + field) * CHUNK_SLOTS;
                for (index, byte) in page.field(field).iter().enumerate() {
                    for bit in (0..8).filter(|bit| byte & (1 << bit) != 0) {
                        self.allocator.mark(Slot(first + index as u64 * 8 + bit));
                    }
                }
            }
        }
    }

    /// What a lost bitmap said stands in the map too. Without this the next checkpoint would write
    /// an authentic one that has data slots as free.
    fn remake_bitmaps(&mut self, backing: &dyn Backing) {
        let geometry = self.superblock.geometry;
        let reader = PageReader {
            backing,
            keyring: &self.keyring,
            id: self.superblock.id,
            geometry,
        };
        let (map, space) = (&self.map, &mut self.space);
        let is_space_known = &mut self.is_space_known;
        let _ = each_leaf(map, &reader, 0, &mut |visit| {
            match visit {
                Visit::Leaf(_, page) => {
                    for slot in (0..FANOUT).map(|field| page.entry(field).slot()) {
                        if geometry.is_data_slot(slot) && space.is_damaged(slot.chunk() / FANOUT) {
                            space.set_used(slot, true);
                        }
                    }
                }
                Visit::Lost(..) => *is_space_known = false,
                Visit::Upper(..) => {}
            }
            ControlFlow::Continue(())
        });
    }

    /// The copy that holds the superblock that counts, if the other one does not.
    pub(super) fn sole_copy(&self) -> Option<u64> {
        let generation = self.superblock.generation;
        let holds = |copy: &Result<u64, SuperblockError>| matches!(copy, Ok(g) if *g == generation);
        match self.copies.each_ref().map(holds) {
            [true, false] => Some(0),
            [false, true] => Some(1),
            _ => None,
        }
    }

    /// Pages above the leaves, of both trees, that could not be had.
    pub fn missing_pages(&self) -> usize {
        self.missing.len() + self.lost_leaves.len() + self.space.damaged().len()
    }

    /// Whether something could not be read that a writer must know. See the module.
    pub(super) fn is_unreadable(&self) -> bool {
        let upper = self.missing.iter().map(|(_, fault)| fault);
        let leaves = self.lost_leaves.iter().map(|lost| &lost.fault);
        upper
            .chain(leaves)
            .any(|fault| *fault == PageFault::Unreadable)
    }

    /// Visits all leaves from `from` on in order, in bounded memory.
    pub fn each_leaf(
        &self,
        backing: &dyn Backing,
        from: u64,
        visit: &mut dyn FnMut(Visit<'_>) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        let reader = PageReader {
            backing,
            keyring: &self.keyring,
            id: self.superblock.id,
            geometry: self.superblock.geometry,
        };
        each_leaf(&self.map, &reader, from, visit)
    }

    /// Every mapped block in order, all at once: for volumes that are known to be small.
    pub fn blocks(&self, backing: &dyn Backing) -> Vec<(u64, Entry)> {
        let mut blocks = Vec::new();
        let _ = self.each_leaf(backing, 0, &mut |visit| {
            if let Visit::Leaf(leaf, page) = visit {
                blocks.extend(
                    (0..FANOUT)
                        .map(|field| (leaf * FANOUT + field, page.entry(field)))
                        .filter(|(_, entry)| !entry.is_hole()),
                );
            }
            ControlFlow::Continue(())
        });
        blocks
    }

    /// Every slot that the space tree has in use.
    pub fn used_slots(&self) -> impl Iterator<Item = Slot> {
        self.space.leaves().flat_map(|(leaf, page)| {
            (0..FANOUT).flat_map(move |field| {
                let first = (leaf * FANOUT + field) * CHUNK_SLOTS;
                let bits = *page.field(field);
                (0..CHUNK_SLOTS)
                    .filter(move |bit| bits[(bit / 8) as usize] & (1 << (bit % 8)) != 0)
                    .map(move |bit| Slot(first + bit))
            })
        })
    }

    /// Slots that the space tree has in use: blocks that are mapped.
    pub fn used_count(&self) -> u64 {
        let bits = |page: &super::page::Page| {
            page.0
                .iter()
                .map(|b| u64::from(b.count_ones()))
                .sum::<u64>()
        };
        self.space.leaves().map(|(_, page)| bits(page)).sum()
    }
}

#[cfg(test)]
impl Recovered {
    /// The entry of a mapped block.
    pub(crate) fn entry(&self, backing: &dyn Backing, block: u64) -> Option<Entry> {
        let mut blocks = self.blocks(backing).into_iter();
        blocks.find(|(mapped, _)| *mapped == block).map(|(_, e)| e)
    }

    /// Pages of the map that cannot be had.
    pub(crate) fn lost_pages(&self, backing: &dyn Backing) -> Vec<PagePlace> {
        let mut lost = Vec::new();
        let _ = self.each_leaf(backing, 0, &mut |visit| {
            if let Visit::Lost(place, ..) = visit {
                lost.push(place);
            }
            ControlFlow::Continue(())
        });
        lost
    }

    /// What the whole of both trees says of how often each session is named.
    pub(crate) fn count_sessions(&self, backing: &dyn Backing) -> HashMap<u16, i64> {
        let mut counts = HashMap::new();
        let mut count = |entry: Entry| {
            if !entry.is_hole() {
                *counts.entry(entry.session()).or_default() += 1;
            }
        };
        count(self.map.root());
        self.space.page_entries().for_each(&mut count);
        let _ = self.each_leaf(backing, 0, &mut |visit| {
            if let Visit::Upper(_, page) | Visit::Leaf(_, page) = visit {
                (0..FANOUT).for_each(|field| count(page.entry(field)));
            }
            ControlFlow::Continue(())
        });
        counts
    }
}
