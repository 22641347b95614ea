//! The volume's state, shared by all lanes behind one lock.
//!
//! Everything here is memory: no call does I/O or sealing of data, so the lock is held for
//! fractions of a microsecond a request, and a lane takes it once a batch.
//!
//! Where a block's entry is looked for, newest first:
//!
//! ```text
//! open    acknowledged since the last commit began   also in the delta ring
//! sealed  being committed                            also in the delta ring
//! map     committed: in the log, or in the pages on disk
//! ```

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crypto::keys::Dek;
use crypto::session::Session;

use super::checkpoint::Checkpoint;
use super::commit::Commit;
use super::draft::{Draft, Habit};
use super::pages::Load;
use super::rehome::Scattered;
use super::{Failure, WakeLane};
use crate::volume::entry::Entry;
use crate::volume::geometry::{Block, CHUNK_SLOTS, FANOUT, Geometry, Slot};
use crate::volume::log::{RECORD_BLOCKS_MAX, RECORD_DELTAS_MAX};
use crate::volume::map::{MapTree, Missing};
use crate::volume::mutant::{self, Mutant};
use crate::volume::ranges::{Held, Ranges, Ticket};
use crate::volume::recover::{LogPoint, Recovered};
use crate::volume::ring::RingWriter;
use crate::volume::sealing::Keyring;
use crate::volume::space::{Run, Space};
use crate::volume::superblock::Superblock;
use crate::volume::tree::Tree;

/// Blocks to entries that are not committed yet.
pub(super) type Deltas = HashMap<u64, Entry, foldhash::fast::RandomState>;

/// Sequence numbers of a session that are used at most: 2^36 writes, 256 TiB (see the format
/// document on nonces).
pub(super) const SEQUENCE_LIMIT: u64 = 1 << 36;

/// What a lane is told by others.
#[derive(Debug)]
pub(super) enum Event {
    /// A piece got its range.
    Granted(u32, Held),
    /// A task's commit is durable, or failed.
    Committed(u32, Result<(), Failure>),
    /// Room may be found now: try stalled pieces again.
    Room,
    /// The page that a piece waits for was read, or cannot be had.
    Page(u32, Result<(), Failure>),
}

pub(super) struct Inbox {
    pub(super) events: VecDeque<Event>,
    pub(super) wake: WakeLane,
    pub(super) is_awake: bool,
}

/// Whether writes are possible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Opened, nothing written: reads work.
    Opened,
    /// A session is active.
    Serving,
    /// Closed clean.
    Closed,
}

/// See the module.
pub struct Core {
    pub(super) phase: Phase,
    pub(super) is_poisoned: bool,
    pub(super) geometry: Geometry,
    pub(super) superblock: Superblock,
    pub(super) dek: Dek,
    pub(super) keyring: Arc<Keyring>,
    pub(super) keyring_version: u64,
    pub(super) session: Option<(u16, Arc<Session>)>,
    pub(super) map: MapTree,
    pub(super) space_tree: Tree,
    pub(super) space: Space,
    pub(super) open: Deltas,
    pub(super) sealed: Deltas,
    /// The batch that `open` will be, unless all of it is in a draft.
    pub(super) next_batch: u64,
    /// The log behind the last batch that is in the map.
    pub(super) applied: LogPoint,
    pub(super) log_used: u64,
    pub(super) commit: Option<Commit>,
    /// Log behind `applied` that is written already.
    pub(super) draft: Option<Draft>,
    pub(super) habit: Habit,
    /// Tasks that wait for the next commit.
    pub(super) flush_waiters: Vec<Ticket>,
    pub(super) checkpoint: Option<Checkpoint>,
    pub(super) wants_checkpoint: bool,
    /// Sizes that the next checkpoint gives the volume; the backing is long enough for them.
    pub(super) grow_to: Option<Geometry>,
    /// Bytes that the guest sees, for those who do not want the lock.
    pub(super) volume_len: Arc<AtomicU64>,
    /// The second superblock copy is being written.
    pub(super) is_mirroring: bool,
    /// The superblock copy that must not be written first, as only it holds what counts.
    pub(super) sole_copy: Option<u64>,
    pub(super) ring: Option<RingWriter>,
    pub(super) ring_pressure: bool,
    /// Slots that only records of the delta ring name: of writes that a discard undid, or a write
    /// that the ring had no room for. A kill now would bring them back, so they stay as they are
    /// until a commit has released those records.
    pub(super) ring_only: Vec<Slot>,
    pub(super) ranges: Ranges,
    pub(super) inboxes: Vec<Inbox>,
    /// Inboxes of lanes that are gone, for new ones.
    pub(super) idle_inboxes: Vec<u16>,
    /// Lanes with stalled pieces.
    pub(super) starved: Vec<u16>,
    /// A run of slots for pages is being allocated in the backing.
    pub(super) growing: bool,
    /// Page slots that a piece waits for.
    pub(super) page_goal: usize,
    /// The backing gave no room for pages.
    pub(super) backing_full: bool,
    pub(super) can_punch: bool,
    /// Punches under way: their slots are free afterwards.
    pub(super) punches: usize,
    pub(super) live: HashMap<u16, i64>,
    /// Where blocks may lie scattered.
    pub(super) scattered: Scattered,
    /// Rounds of lanes with requests of a guest.
    pub(super) activity: u64,
    /// Blocks admitted and not yet published.
    pub(super) landing: usize,
    /// How many of them are in which leaf.
    pub(super) landing_leaves: HashMap<u64, u32, foldhash::fast::RandomState>,
    /// Pages of the map that are being read.
    pub(super) loads: HashMap<u64, Load, foldhash::fast::RandomState>,
    /// Chunks with pages in them, until an activation sets the rest of them aside for pages.
    pub(super) page_chunks: BTreeSet<u64>,
    /// Whether it is known which slots are free.
    pub(super) is_space_known: bool,
    /// Pages that a writer must know could not be read.
    pub(super) is_unreadable: bool,
    /// Bytes of memory that the map of a volume of so many blocks has to have.
    pub(super) cache_for: fn(u64) -> u64,
}

/// Page slots that are got before they are needed.
pub(super) const PAGE_SLOTS_AHEAD: usize = 64;

/// Deltas that are acknowledged and not committed, at most.
pub(super) const OPEN_MAX: usize = 65_536;

/// Slots that a commit which nobody asked for gives back at least.
const ROOM_COMMIT_MIN: usize = 2048;

impl Core {
    /// The state of a volume that was just opened.
    pub fn new(recovered: Recovered) -> Self {
        let is_unreadable = recovered.is_unreadable();
        let sole_copy = recovered.sole_copy();
        let Recovered {
            superblock,
            dek,
            keyring,
            map,
            space: space_tree,
            allocator,
            page_chunks,
            live,
            is_space_known,
            end,
            log_used,
            cache_for,
            ..
        } = recovered;
        let geometry = superblock.geometry;
        Self {
            phase: Phase::Opened,
            is_poisoned: false,
            geometry,
            dek,
            keyring: Arc::new(keyring),
            keyring_version: 0,
            session: None,
            space: allocator,
            map,
            space_tree,
            open: Deltas::default(),
            sealed: Deltas::default(),
            next_batch: end.batch + 1,
            applied: end,
            log_used,
            commit: None,
            draft: None,
            habit: Habit::default(),
            flush_waiters: Vec::new(),
            checkpoint: None,
            wants_checkpoint: false,
            grow_to: None,
            volume_len: Arc::new(geometry.volume_len().into()),
            is_mirroring: false,
            sole_copy,
            ring: None,
            ring_pressure: false,
            ring_only: Vec::new(),
            ranges: Ranges::default(),
            inboxes: Vec::new(),
            idle_inboxes: Vec::new(),
            starved: Vec::new(),
            growing: false,
            page_goal: 0,
            backing_full: false,
            can_punch: true,
            punches: 0,
            live,
            scattered: Scattered::new(geometry.blocks),
            activity: 0,
            landing: 0,
            landing_leaves: HashMap::default(),
            loads: HashMap::default(),
            page_chunks,
            is_space_known,
            is_unreadable,
            cache_for,
            superblock,
        }
    }

    /// Sets the free slots of chunks that hold only pages aside for pages. Not before a ring was
    /// taken over: it names data slots that nothing else knows of.
    pub(super) fn find_page_slots(&mut self) {
        let (space, space_tree) = (&mut self.space, &self.space_tree);
        for chunk in std::mem::take(&mut self.page_chunks) {
            space.adopt_page_chunk(Slot(chunk * CHUNK_SLOTS), &|slot| space_tree.is_used(slot));
        }
    }

    /// A block's newest entry that is not committed yet.
    pub(super) fn uncommitted(&self, block: u64) -> Option<Entry> {
        let entry = self.open.get(&block).or_else(|| self.sealed.get(&block));
        entry.copied()
    }

    /// A block's newest acknowledged entry.
    pub(super) fn entry(&self, block: u64) -> Result<Entry, Missing> {
        match self.uncommitted(block) {
            Some(entry) => Ok(entry),
            None => self.committed(block),
        }
    }

    pub(super) fn committed(&self, block: u64) -> Result<Entry, Missing> {
        Ok(self.map.leaf(block / FANOUT)?.entry(block))
    }

    /// Makes `entry` what `block` reads as, unless a later write of the same session already is.
    /// `is_in_ring`: the delta ring holds it.
    pub(super) fn publish(&mut self, block: Block, entry: Entry, is_in_ring: bool) {
        // Known: its leaf stays from the admission of the write on.
        let current = self.entry(block.0).unwrap_or(Entry::HOLE);
        if !entry.is_hole()
            && current.session() == entry.session()
            && current.sequence() > entry.sequence()
        {
            // The ring may hold this one and not the later one.
            if self.is_drafted(block, &entry) || is_in_ring && self.open.contains_key(&block.0) {
                self.ring_only.push(entry.slot());
            } else if is_in_ring
                && self.sealed.contains_key(&block.0)
                && let Some(commit) = &mut self.commit
            {
                commit.ring_only.push(entry.slot());
            } else {
                self.space.free_now(entry.slot());
            }
            return;
        }
        if let Some(never_committed) = self.open.insert(block.0, entry)
            && !never_committed.is_hole()
        {
            let is_drafted = self.is_drafted(block, &never_committed);
            if !is_drafted && (is_in_ring || self.ring.is_none()) {
                self.space.retire(vec![never_committed.slot()], false);
            } else {
                self.ring_only.push(never_committed.slot());
            }
        } else if mutant::is(Mutant::EarlyFree)
            && let Ok(old) = self.committed(block.0)
            && !old.is_hole()
        {
            self.space.retire(vec![old.slot()], false);
        }
    }

    /// Why a write cannot be taken at all now.
    pub(super) fn refuses_writes(&self) -> Option<Failure> {
        if self.is_poisoned {
            Some(Failure::Poisoned)
        } else if self.phase != Phase::Serving {
            Some(Failure::ReadOnly)
        } else {
            None
        }
    }

    /// Deltas that may gather for a commit: never more than an empty log can take.
    fn open_max(&self) -> usize {
        // A draft may be before them.
        let records = (self.geometry.log_blocks() - 1) / RECORD_BLOCKS_MAX;
        OPEN_MAX.min(records as usize * RECORD_DELTAS_MAX)
    }

    /// Whether `count` new deltas have to wait for a commit.
    pub(super) fn is_crowded(&self, count: usize) -> bool {
        self.open.len() + self.landing + count > self.open_max()
    }

    /// Page slots that a checkpoint of what is committed takes at most.
    pub(super) fn page_slots_taken(&self) -> usize {
        self.pages(self.map.dirty_leaves(), self.space_tree.dirty_leaves())
    }

    /// Page slots that there have to be for everything admitted so far, and for `blocks` more changed
    /// blocks in `leaves` leaves besides, of which `fresh` are stored nowhere yet.
    ///
    /// More than one checkpoint takes: what is admitted may be spread over several. Each gives back
    /// what it replaces before the next begins, but a page that is stored for the first time replaces
    /// none, and the next checkpoint may write it again.
    pub(super) fn page_slots_needed(&self, leaves: usize, fresh: usize, blocks: usize) -> usize {
        let stored_first = self.pages(self.map.fresh_leaves() + fresh, 0);
        self.checkpoint_slots(leaves, blocks) + stored_first
    }

    /// Page slots that a checkpoint takes at most once everything admitted so far is committed,
    /// and `blocks` more changed blocks in `leaves` leaves besides.
    pub(super) fn checkpoint_slots(&self, leaves: usize, blocks: usize) -> usize {
        let changed = self.map.dirty_leaves().max(self.map.touched_leaves());
        // Each block leaves a slot and takes one, anywhere: two bitmaps.
        let uncommitted = self.open.len() + self.sealed.len() + self.landing + blocks;
        let bitmaps = self.space_tree.dirty_leaves() + 2 * uncommitted;
        self.pages(changed + leaves, bitmaps) + 16
    }

    /// Pages that change at most with so many leaves of each tree.
    fn pages(&self, map_leaves: usize, space_leaves: usize) -> usize {
        let leaves = self.geometry.blocks.div_ceil(FANOUT) as usize;
        let bitmaps = self.geometry.chunks.div_ceil(FANOUT) as usize;
        let tree = |changed: usize, mut level: usize, levels: usize| {
            let mut pages = 0;
            for _ in 0..levels {
                pages += level.min(changed);
                level = level.div_ceil(FANOUT as usize);
            }
            pages
        };
        tree(map_leaves, leaves, crate::volume::geometry::MAP_LEVELS)
            + tree(space_leaves, bitmaps, crate::volume::geometry::SPACE_LEVELS)
    }

    /// Takes a run for data.
    pub(super) fn take_run(&mut self) -> Option<Run> {
        self.space.take_run(self.garbage())
    }

    /// Slots that are given up once what is written is committed.
    pub(super) fn garbage(&self) -> u64 {
        (self.open.len() + self.sealed.len()) as u64
    }

    /// Whether a commit is worth its barrier for the slots that it gives back: before there are
    /// none left and everybody has to wait for it.
    fn is_short_of_room(&self) -> bool {
        self.open.len() >= ROOM_COMMIT_MIN && self.space.room(self.garbage()) < self.garbage()
    }

    /// Whether a commit or the end of reads could free slots.
    pub(super) fn may_find_room(&self) -> bool {
        !self.is_poisoned
            && (!self.open.is_empty()
                || self.commit.is_some()
                || self.checkpoint.is_some()
                || self.growing
                || self.landing > 0
                || self.punches > 0
                || self.space.has_limbo())
    }

    /// Whether a commit should start.
    pub(super) fn wants_commit(&self) -> bool {
        self.commit.is_none()
            && self.draft.as_ref().is_none_or(Draft::is_settled)
            && !self.is_poisoned
            && self.phase == Phase::Serving
            && (self.draft.as_ref().is_some_and(Draft::is_void) || self.has_reason_to_commit())
    }

    fn has_reason_to_commit(&self) -> bool {
        !self.open.is_empty()
            && (!self.flush_waiters.is_empty()
                || (self.is_pinned_high()
                    && self.map.dirty_leaves() * 2 < self.map.touched_leaves())
                || self.open.len() >= self.open_max() / 2
                || self.ring_pressure
                || self.is_short_of_room()
                || !self.starved.is_empty())
    }

    /// Whether a checkpoint should start.
    pub(super) fn wants_checkpoint(&self) -> bool {
        self.checkpoint.is_none()
            && !self.is_mirroring
            && !self.is_poisoned
            && self.phase == Phase::Serving
            && (self.wants_checkpoint
                || (self.is_pinned_high()
                    && self.map.dirty_leaves() * 2 >= self.map.touched_leaves())
                || self.log_used > self.geometry.log_blocks() / 2)
    }

    /// Whether more slots for pages should be allocated.
    pub(super) fn wants_page_slots(&self) -> bool {
        !self.growing
            && !self.backing_full
            && self.phase == Phase::Serving
            && self.space.page_slots()
                < self
                    .page_goal
                    .max(self.page_slots_needed(0, 0, 0) + PAGE_SLOTS_AHEAD)
    }

    /// Tells a lane something.
    pub(super) fn tell(&mut self, lane: u16, event: Event) {
        if let Some(inbox) = self.inboxes.get_mut(usize::from(lane)) {
            inbox.events.push_back(event);
        }
    }

    /// Tells every starved lane to try again.
    pub(super) fn feed_starved(&mut self) {
        for lane in std::mem::take(&mut self.starved) {
            self.tell(lane, Event::Room);
        }
    }

    /// Lanes with news, to be woken once the lock is released; `own` needs no wake.
    pub(super) fn wakes(&mut self, own: u16) -> Vec<WakeLane> {
        let mut wakes = Vec::new();
        for (index, inbox) in self.inboxes.iter_mut().enumerate() {
            if !inbox.events.is_empty() && !inbox.is_awake && index != usize::from(own) {
                inbox.is_awake = true;
                wakes.push(Arc::clone(&inbox.wake));
            }
        }
        wakes
    }

    /// Gives up writing for good. What was acknowledged stays readable; a restart recovers what
    /// is durable and what the delta ring holds.
    pub(super) fn poison(&mut self) {
        self.is_poisoned = true;
        // Its superblock must not be written any more: whether its pages are durable is not known.
        self.checkpoint = None;
        self.draft = None;
        let commit = self
            .commit
            .take()
            .map(|commit| commit.waiters)
            .unwrap_or_default();
        for (lane, task) in commit
            .into_iter()
            .chain(std::mem::take(&mut self.flush_waiters))
        {
            self.tell(lane, Event::Committed(task, Err(Failure::Poisoned)));
        }
        self.feed_starved();
    }

    /// Counts what names a session.
    pub(super) fn count_live(&mut self, gone: &Entry, come: &Entry) {
        if !gone.is_hole() {
            *self.live.entry(gone.session()).or_default() -= 1;
        }
        if !come.is_hole() {
            *self.live.entry(come.session()).or_default() += 1;
        }
    }
}
