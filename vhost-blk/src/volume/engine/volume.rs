//! A volume that is open: what lanes share, and the blocking calls of the control plane.

use std::collections::VecDeque;
use std::io;
use std::ops::{ControlFlow, Range};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use crypto::session::Session;
use thiserror::Error;

use super::activate::AttachError;
use super::core::{Core, Event, Inbox, Phase};
use super::draft::Draft;
use super::lane::Lane;
use super::request::{IoKind, Op, Payload, PayloadFault};
use super::{Failure, Reporter, Stats, WakeLane};
use crate::volume::backing::{Backing, Room};
use crate::volume::geometry::{BLOCK_LEN, FANOUT};
use crate::volume::map::{Visit, each_leaf};
use crate::volume::page_reader::PageReader;
use crate::volume::recover::Recovered;
use crate::volume::ring::RingMemory;
use crate::volume::superblock::{SERIAL_LEN, VolumeId};

/// What the lanes of a volume have in common.
pub struct Shared {
    core: Mutex<Core>,
    sequence: AtomicU64,
    session: OnceLock<(u16, Arc<Session>)>,
    volume_len: Arc<AtomicU64>,
    id: VolumeId,
    stats: Stats,
    reporter: Box<dyn Reporter>,
    /// Held by a slice of moves, and by those who want none under way.
    moves: Mutex<()>,
}

impl Shared {
    /// The shared state of a volume that was just opened.
    pub fn new(recovered: Recovered, reporter: Box<dyn Reporter>) -> Arc<Self> {
        let core = Core::new(recovered);
        let volume_len = Arc::clone(&core.volume_len);
        Arc::new(Self {
            id: core.superblock.id,
            core: Mutex::new(core),
            sequence: AtomicU64::new(1),
            session: OnceLock::new(),
            volume_len,
            stats: Stats::default(),
            reporter,
            moves: Mutex::new(()),
        })
    }

    /// No blocks begin to move while the guard lives. Whoever moves some holds it until nothing of
    /// that is under way.
    pub fn hold_still(&self) -> MutexGuard<'_, ()> {
        self.moves.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Core> {
        // A panic under the lock is a bug that ends the process; until then nothing is gained by
        // panicking in every other thread.
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reserves consecutive sequence numbers. This is the only place where they come from, so
    /// none is used twice.
    pub(super) fn take_sequences(&self, count: u64) -> u64 {
        self.sequence.fetch_add(count, Ordering::Relaxed)
    }

    pub(super) fn sequence_now(&self) -> u64 {
        self.sequence.load(Ordering::Relaxed)
    }

    /// This activation's session.
    pub(super) fn session(&self) -> Option<(u16, &Session)> {
        self.session.get().map(|(id, session)| (*id, &**session))
    }

    /// Bytes that the guest sees.
    pub fn volume_len(&self) -> u64 {
        self.volume_len.load(Ordering::Relaxed)
    }

    /// Room in the volume's own slots.
    pub fn slots(&self) -> Room {
        let (used, total) = self.lock().space.count();
        Room {
            free: (total - used) * BLOCK_LEN as u64,
            total: total * BLOCK_LEN as u64,
        }
    }

    pub(super) fn id(&self) -> &VolumeId {
        &self.id
    }

    /// Counters.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    pub(super) fn reporter(&self) -> &dyn Reporter {
        &*self.reporter
    }

    /// Whether a failure ended writing.
    pub(crate) fn is_poisoned(&self) -> bool {
        self.lock().is_poisoned
    }

    /// Pages of the map that may be in memory.
    #[cfg(test)]
    pub(crate) fn cache_pages(&self) -> u64 {
        self.lock().map.budget() as u64
    }

    pub(super) fn damaged(&self, block: u64) {
        Stats::add(&self.stats.not_authentic, 1);
        self.reporter.not_authentic(block);
    }
}

impl Core {
    pub(super) fn add_inbox(&mut self, wake: WakeLane) -> u16 {
        let inbox = Inbox {
            events: Default::default(),
            wake,
            is_awake: false,
        };
        if let Some(id) = self.idle_inboxes.pop() {
            self.inboxes[usize::from(id)] = inbox;
            return id;
        }
        self.inboxes.push(inbox);
        (self.inboxes.len() - 1) as u16
    }

    pub(super) fn take_events(&mut self, lane: u16) -> std::collections::VecDeque<Event> {
        let inbox = &mut self.inboxes[usize::from(lane)];
        inbox.is_awake = false;
        std::mem::take(&mut inbox.events)
    }

    pub(super) fn has_events(&self, lane: u16) -> bool {
        !self.inboxes[usize::from(lane)].events.is_empty()
    }
}

/// Why a volume did not settle.
#[derive(Debug, Error)]
pub enum VolumeError {
    /// What was acknowledged could not be made durable.
    #[error("what the guest was told is written could not be made durable: {0}")]
    Flush(Failure),
    /// The last checkpoint failed.
    #[error(transparent)]
    Close(#[from] AttachError),
}

/// A request without memory, for flushes of our own.
pub(super) struct NoPayload;

impl Payload for NoPayload {
    fn load(&mut self, _: usize, _: &mut [u8]) -> Result<(), PayloadFault> {
        Err(PayloadFault)
    }
    fn store(&mut self, _: usize, _: &[u8]) -> Result<(), PayloadFault> {
        Err(PayloadFault)
    }
}

/// Wakes a thread that waits in [`drive`].
#[derive(Default)]
pub(super) struct Bell {
    has_rung: Mutex<bool>,
    rings: Condvar,
}

impl Bell {
    fn ring(&self) {
        *self.has_rung.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.rings.notify_all();
    }

    pub(super) fn wait(&self) {
        let has_rung = self.has_rung.lock().unwrap_or_else(PoisonError::into_inner);
        // The time-out is a belt: every event rings.
        let (mut has_rung, _) = self
            .rings
            .wait_timeout_while(has_rung, Duration::from_millis(20), |rung| !*rung)
            .unwrap_or_else(PoisonError::into_inner);
        *has_rung = false;
    }
}

/// Does a lane's I/O with blocking calls until it has nothing left to do itself.
pub(crate) fn drive<P: Payload>(lane: &mut Lane<P>, backing: &dyn Backing) {
    loop {
        lane.turn();
        let Some(io) = lane.next_io() else { return };
        let (result, kind) = perform(io.kind, backing);
        lane.on_io(io.id, result, kind.into_buffer());
    }
}

/// Performs one operation with blocking calls. Its result is as io_uring would give it: bytes moved
/// or the negated errno.
pub fn perform(mut kind: IoKind, backing: &dyn Backing) -> (i32, IoKind) {
    let (moved, result) = match &mut kind {
        IoKind::Read {
            offset,
            skip,
            buffer,
        } => {
            let part = &mut buffer[*skip..];
            (part.len(), backing.read_at(*offset, part))
        }
        IoKind::Write {
            offset,
            skip,
            buffer,
        } => {
            let part = &buffer[*skip..];
            (part.len(), backing.write_at(*offset, part))
        }
        IoKind::Sync(_) => (0, backing.sync()),
        IoKind::Allocate { offset, len } => (0, backing.allocate(*offset, *len)),
        IoKind::Punch { offset, len } => (0, backing.punch(*offset, *len)),
    };
    let errno = |error: io::Error| -error.raw_os_error().unwrap_or(5);
    (result.map_or_else(errno, |()| moved as i32), kind)
}

/// An open volume.
pub struct Volume {
    pub(super) shared: Arc<Shared>,
    pub(super) backing: Arc<dyn Backing>,
    /// Whoever has it is alone at settling, growing and closing.
    own: Mutex<Lane<NoPayload>>,
    pub(super) bell: Arc<Bell>,
}

impl Volume {
    /// A volume from what [`recover`](crate::volume::recover::recover) found.
    pub fn new(
        recovered: Recovered,
        backing: Arc<dyn Backing>,
        reporter: Box<dyn Reporter>,
    ) -> Self {
        let shared = Shared::new(recovered, reporter);
        let bell = Arc::new(Bell::default());
        let ring = Arc::clone(&bell);
        let own = Mutex::new(Lane::new(
            Arc::clone(&shared),
            Arc::new(move || ring.ring()),
        ));
        Self {
            shared,
            backing,
            own,
            bell,
        }
    }

    /// What lanes are made of.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Its id.
    pub fn id(&self) -> VolumeId {
        self.shared.id
    }

    /// What GET_ID answers.
    pub fn serial(&self) -> [u8; SERIAL_LEN] {
        self.shared.lock().superblock.serial
    }

    /// Whether it can be written now.
    pub fn phase(&self) -> Phase {
        self.shared.lock().phase
    }

    /// Stretches of at most `longest` mapped blocks, from block `from` on: first block and how
    /// many. Not many at a time: where to go on comes with them, `None` if there is nothing more.
    /// Leaves that cannot be had are told to `lost`. Blocking; no lane may have writes.
    pub fn mapped(
        &self,
        from: u64,
        longest: u64,
        lost: &mut dyn FnMut(Range<u64>),
    ) -> (VecDeque<(u64, u64)>, Option<u64>) {
        const ENOUGH: usize = 4096;
        let core = self.shared.lock();
        let reader = PageReader {
            backing: &*self.backing,
            keyring: &core.keyring,
            id: self.shared.id,
            geometry: core.geometry,
        };
        let mut runs: VecDeque<(u64, u64)> = VecDeque::new();
        let mut next = None;
        let from = from.div_ceil(FANOUT);
        let _ = each_leaf(&core.map, &reader, from, &mut |visit| {
            let (leaf, page) = match visit {
                Visit::Leaf(leaf, page) => (leaf, page),
                Visit::Upper(..) => return ControlFlow::Continue(()),
                Visit::Lost(_, leaves, _) => {
                    lost(leaves.start.max(from)..leaves.end);
                    return ControlFlow::Continue(());
                }
            };
            if runs.len() >= ENOUGH {
                next = Some(leaf * FANOUT);
                return ControlFlow::Break(());
            }
            let blocks = (leaf * FANOUT..(leaf + 1) * FANOUT).filter(|b| !page.entry(*b).is_hole());
            for block in blocks {
                match runs.back_mut() {
                    Some((first, count)) if *first + *count == block && *count < longest => {
                        *count += 1;
                    }
                    _ => runs.push_back((block, 1)),
                }
            }
            ControlFlow::Continue(())
        });
        (runs, next)
    }

    /// Makes the volume writable for a frontend that keeps `ring` (or none), taking over what a
    /// killed card left in it. Blocking; no lane may have requests.
    ///
    /// # Errors
    /// See [`AttachError`].
    pub fn attach(&self, ring: Option<Arc<dyn RingMemory>>) -> Result<(), AttachError> {
        let _still = self.shared.hold_still();
        if self.phase() == Phase::Serving {
            self.settle_with(&mut self.own())
                .map_err(|_| AttachError::Failed)?;
        }
        let mut core = self.shared.lock();
        core.attach(&*self.backing, ring, &mut || self.shared.take_sequences(1))?;
        if let Some((id, session)) = &core.session {
            let _ = self.shared.session.set((*id, Arc::clone(session)));
        }
        Ok(())
    }

    /// Makes durable whatever is acknowledged and waits for background work. Blocking; other
    /// lanes' threads must be running if they have work under way.
    ///
    /// # Errors
    /// It could not be made durable.
    pub fn settle(&self) -> Result<(), VolumeError> {
        let _still = self.shared.hold_still();
        self.settle_with(&mut self.own())
    }

    pub(super) fn own(&self) -> MutexGuard<'_, Lane<NoPayload>> {
        self.own.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn settle_with(&self, lane: &mut Lane<NoPayload>) -> Result<(), VolumeError> {
        lane.submit(Op::Flush, NoPayload);
        loop {
            lane.on_wake();
            drive(lane, &*self.backing);
            let flushed = lane.next_done();
            if let Some(done) = flushed {
                done.result.map_err(VolumeError::Flush)?;
            }
            if lane.tasks() == 0 && self.shared.lock().is_quiet() {
                return Ok(());
            }
            self.bell.wait();
        }
    }

    /// An import into the volume has ended well: closing it says so.
    ///
    /// # Errors
    /// What was imported could not be made durable.
    pub fn complete(&self) -> Result<(), VolumeError> {
        // No checkpoint that began before is under way after this.
        let _still = self.shared.hold_still();
        let mut lane = self.own();
        self.settle_with(&mut lane)?;
        self.shared.lock().superblock.incomplete = false;
        Ok(())
    }

    /// Makes everything durable and marks the volume clean. No lane may have requests.
    ///
    /// # Errors
    /// It could not; the volume is then recovered at its next opening.
    pub fn close(&self) -> Result<(), VolumeError> {
        if self.phase() != Phase::Serving {
            return Ok(());
        }
        let _still = self.shared.hold_still();
        let mut lane = self.own();
        self.settle_with(&mut lane)?;
        let mut core = self.shared.lock();
        core.space
            .release()
            .into_iter()
            .for_each(|slot| core.space.free_now(slot));
        core.checkpoint_now(&*self.backing, true, &mut || self.shared.take_sequences(1))?;
        core.phase = Phase::Closed;
        Ok(())
    }
}

impl Core {
    /// No commit or checkpoint is under way and none is needed.
    fn is_quiet(&self) -> bool {
        self.is_poisoned
            || (self.commit.is_none()
                && self.draft.as_ref().is_none_or(Draft::is_done)
                && self.open.is_empty()
                && self.checkpoint.is_none()
                && !self.is_mirroring
                && !self.growing)
    }
}
