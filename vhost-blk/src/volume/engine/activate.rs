//! Making an opened volume writable: take over what a killed process left, draw a session.
//!
//! 1. The frontend's delta ring, if it brings one: records of later batches than the last on
//!    disk, newest of each block, each one's data authenticated.
//! 2. A barrier. The superblock that was read may be one that a killed process had only just
//!    written: the slots that it gives up are those of the pages that the older copy names, which is
//!    what counts should the power go before the newer one is durable.
//! 3. A new random session key, wrapped into the key table.
//! 4. Leaves that the log changes and that did not authenticate are condemned: with the log gone, an
//!    old version that somebody puts back must not be taken for the newest.
//! 5. Everything that differs from the pages on disk is checkpointed under the new session; its
//!    superblock makes ring, log and session durable at one instant. A kill before it leaves the
//!    old state and the ring as they were.
//! 6. The ring is bound to the new session, empty.
//!
//! Each activation has its own session, also after a kill: continuing the old one would need a
//! trustworthy record of the last nonce used, and the frontend's memory is none.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use crypto::aead::Engine;
use crypto::keys::SessionKey;
use crypto::session::Session;
use thiserror::Error;

use super::core::{Core, PAGE_SLOTS_AHEAD, Phase};
use crate::volume::backing::Backing;
use crate::volume::entry::Entry;
use crate::volume::geometry::{BLOCK_LEN, Block, FANOUT, Slot};
use crate::volume::mutant::{self, Mutant};
use crate::volume::page_reader::PageFault;
use crate::volume::ring::{self, RingError, RingMemory, RingState, RingWriter};
use crate::volume::space::Run;
use crate::volume::superblock::{COUNTER_MAX, KeyEntry, TABLE_MAX, session_context};

/// Why a volume cannot be made writable.
#[derive(Debug, Error)]
pub enum AttachError {
    /// The backing failed.
    #[error("the backing failed while the volume was being made writable: {0}")]
    Io(#[from] io::Error),
    /// No room for the map's pages.
    #[error(
        "the backing has no room left for the volume's map: {0}; free space on it, or serve with --read-only"
    )]
    NoRoom(io::Error),
    /// Every slot is taken.
    #[error("every slot of the backing is in use; serve with --read-only and export")]
    Full,
    /// The in-flight region is not usable.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// It is from an earlier life of the volume.
    #[error(
        "the guest's in-flight region is of session {ring}, but the volume has since been used in session \
         {volume}: what this guest had written is lost to it. Restart the guest"
    )]
    StaleRing {
        /// The ring's session.
        ring: u16,
        /// The volume's.
        volume: u16,
    },
    /// The ring names data that is not there.
    #[error(
        "the in-flight region holds a write of block {0} whose data the backing does not have: it is not \
         the backing that this guest was using. Nothing was changed"
    )]
    RingMismatch(u64),
    /// Randomness or key wrapping failed.
    #[error("no key could be drawn: {0}")]
    Key(String),
    /// The key table has no place left.
    #[error(
        "the key table is full ({TABLE_MAX} sessions are in use): export the volume and import it into a new one"
    )]
    TableFull,
    /// Another header would not be one.
    #[error(
        "the header's counters are at their end, which no use of the volume brings about: export it and \
         import it into a new one"
    )]
    CountersUsedUp,
    /// Pages of the map are damaged in a way that leaves free space unknown.
    #[error(
        "damaged pages of both trees leave it unknown which slots are free; serve with --read-only and export"
    )]
    UnknownSpace,
    /// Pages that must be known before anything is written cannot be read.
    #[error(
        "the backing cannot read pages of the map that the volume needs to take writes: copy it to a good \
         device, or serve with --read-only and export"
    )]
    Unreadable,
    /// A commit is under way.
    #[error("the volume is still busy with its last frontend")]
    Busy,
    /// It was closed or has failed.
    #[error("the volume has failed earlier and takes no more writes; restart the card")]
    Failed,
}

/// Generations and batches that an activation must have before it: more than a volume sees in
/// its life.
const COUNTER_ROOM: u64 = 1 << 48;

impl Core {
    /// Makes the volume writable, or binds another ring to a volume that already is. Blocking.
    ///
    /// # Errors
    /// See [`AttachError`]. Nothing that counts was changed on the backing then; after an error of
    /// the backing itself only a new process can try again.
    pub(super) fn attach(
        &mut self,
        backing: &dyn Backing,
        memory: Option<Arc<dyn RingMemory>>,
        sequence: &mut dyn FnMut() -> u64,
    ) -> Result<(), AttachError> {
        if self.is_poisoned || self.phase == Phase::Closed {
            return Err(AttachError::Failed);
        }
        let state = memory
            .as_deref()
            .map(|memory| ring::inspect(memory, &self.superblock.id))
            .transpose()?;
        let stale = |ring, volume| Err(AttachError::StaleRing { ring, volume });
        if self.phase == Phase::Serving {
            if !self.open.is_empty() || self.commit.is_some() {
                return Err(AttachError::Busy);
            }
            match (state, &self.session) {
                (Some(RingState::Live { session }), Some((current, _))) if session != *current => {
                    return stale(session, *current);
                }
                _ => return self.bind(memory, sequence),
            }
        }
        let mut adopted = 0;
        if let (Some(RingState::Live { session }), Some(memory)) = (state, memory.as_deref()) {
            if session == self.superblock.session {
                self.adopt_ring(backing, memory, session)?;
                adopted = session;
            } else if session == self.superblock.adopted {
                // Killed between the checkpoint that took this ring over and its new binding.
                adopted = session;
            } else {
                return stale(session, self.superblock.session);
            }
        }
        if !self.is_space_known {
            return Err(AttachError::UnknownSpace);
        }
        if self.is_unreadable {
            return Err(AttachError::Unreadable);
        }
        if self.superblock.generation.max(self.applied.batch) > COUNTER_MAX - COUNTER_ROOM {
            return Err(AttachError::CountersUsedUp);
        }
        if !mutant::is(Mutant::NoFirstBarrier) {
            backing.sync()?;
        }
        self.map.condemn();
        self.find_page_slots();
        self.draw_session()?;
        #[cfg(test)]
        for row in &self.superblock.table {
            if self.session.as_ref().is_some_and(|(id, _)| *id == row.id) {
                crate::volume::sim::note_activation(&row.wrapped);
            }
        }
        self.superblock.adopted = adopted;
        self.checkpoint_now(backing, false, sequence)?;
        self.phase = Phase::Serving;
        self.bind(memory, sequence)
    }

    fn bind(
        &mut self,
        memory: Option<Arc<dyn RingMemory>>,
        sequence: &mut dyn FnMut() -> u64,
    ) -> Result<(), AttachError> {
        self.ring = None;
        if let (Some(memory), Some((id, session))) = (memory, &self.session) {
            let number = sequence();
            self.ring = Some(RingWriter::bind(
                memory,
                &self.superblock.id,
                (*id, session),
                number,
            )?);
        }
        Ok(())
    }

    /// Takes over the acknowledged writes of a ring.
    fn adopt_ring(
        &mut self,
        backing: &dyn Backing,
        memory: &dyn RingMemory,
        session_id: u16,
    ) -> Result<(), AttachError> {
        if mutant::is(Mutant::IgnoreRing) {
            return Ok(());
        }
        let session = self
            .keyring
            .get(session_id)
            .cloned()
            .ok_or(RingError::NotAuthentic)?;
        let mut newest: HashMap<u64, Entry> = HashMap::new();
        let mut last_batch = self.applied.batch;
        let records = ring::read_records(memory, &session)?;
        let inside = |block: &u64| *block < self.geometry.blocks;
        let blocks: Vec<u64> = records
            .iter()
            .map(|delta| delta.block.0)
            .filter(inside)
            .collect();
        let leaves = blocks.iter().map(|block| block / FANOUT);
        let lost = self.load_now(backing, leaves);
        if lost.iter().any(|lost| lost.fault == PageFault::Unreadable) {
            return Err(AttachError::Unreadable);
        }
        for delta in records {
            if delta.batch <= self.applied.batch && !mutant::is(Mutant::ReplayAllRing) {
                continue;
            }
            last_batch = last_batch.max(delta.batch);
            let block = delta.block.0;
            let is_possible = block < self.geometry.blocks && delta.batch <= COUNTER_MAX;
            if !is_possible || delta.entry.session() != session_id {
                return Err(AttachError::RingMismatch(block));
            }
            let known = newest
                .get(&block)
                .copied()
                .or_else(|| self.entry(block).ok())
                .unwrap_or(Entry::HOLE);
            if known.session() != session_id || known.sequence() < delta.entry.sequence() {
                newest.insert(block, delta.entry);
            }
        }
        let mut winners: Vec<(u64, Entry)> = newest.into_iter().collect();
        winners.sort_unstable_by_key(|(_, entry)| entry.slot());
        // All are verified before anything changes.
        for (block, entry) in &winners {
            let is_possible =
                self.geometry.is_data_slot(entry.slot()) && !self.space.is_used(entry.slot());
            if !is_possible || self.map.leaf(block / FANOUT).is_err() {
                return Err(AttachError::RingMismatch(*block));
            }
        }
        self.verify_ring(backing, &winners)?;
        for (block, entry) in winners {
            self.space.mark(entry.slot());
            let Some(page) = self.map.leaf_mut(block / FANOUT) else {
                // It was here a moment ago.
                self.poison();
                return Err(AttachError::Failed);
            };
            let old = page.entry(block);
            page.set_entry(block, entry);
            if !old.is_hole() {
                self.space_tree.set_used(old.slot(), false);
                // Not free before the new map is durable.
                self.space.retire(vec![old.slot()], false);
            }
            self.space_tree.set_used(entry.slot(), true);
            self.count_live(&old, &entry);
        }
        self.applied.batch = last_batch;
        self.next_batch = last_batch + 1;
        Ok(())
    }

    /// Whether the backing has the data that a ring names.
    fn verify_ring(
        &self,
        backing: &dyn Backing,
        winners: &[(u64, Entry)],
    ) -> Result<(), AttachError> {
        let slots: Vec<Slot> = winners.iter().map(|(_, entry)| entry.slot()).collect();
        let mut outcome = Ok(());
        backing.read_many(&slots, &mut |index, read| {
            let Some((block, entry)) = winners.get(index) else {
                return;
            };
            let verified = read.map_err(AttachError::Io).and_then(|stored| {
                let opened = self.keyring.open_block(Block(*block), entry, stored);
                opened.map_err(|_| AttachError::RingMismatch(*block))
            });
            if outcome.is_ok() {
                outcome = verified;
            }
        });
        outcome
    }

    /// Draws this activation's key. It becomes durable with the next superblock.
    fn draw_session(&mut self) -> Result<(), AttachError> {
        if mutant::is(Mutant::SameSession) && self.superblock.session > 1 {
            let id = self.superblock.session;
            self.session = self
                .keyring
                .get(id)
                .map(|session| (id, Arc::clone(session)));
            return Ok(());
        }
        // What is below a lost page still counts: should the page come back, from a backup or a
        // better disk, its blocks need their keys.
        let live = &self.live;
        self.superblock
            .table
            .retain(|row| live.get(&row.id).is_some_and(|count| *count > 0));
        if self.superblock.table.len() >= TABLE_MAX {
            return Err(AttachError::TableFull);
        }
        let is_taken = |id: u16| self.keyring.get(id).is_some();
        let next = self
            .superblock
            .session
            .checked_add(1)
            .filter(|id| !is_taken(*id));
        let id = next
            .or_else(|| (1..=u16::MAX).find(|id| !is_taken(*id)))
            .ok_or(AttachError::TableFull)?;
        let key = SessionKey::generate().map_err(|error| AttachError::Key(error.to_string()))?;
        let wrapped = self
            .dek
            .wrap_session(&key, &session_context(&self.superblock.id, id))
            .map_err(|error| AttachError::Key(error.to_string()))?;
        let session = Arc::new(Session::derive(Engine::default(), &key));
        self.superblock.table.push(KeyEntry {
            id,
            live: 0,
            created: super::unix_seconds(),
            wrapped,
        });
        let mut keyring = (*self.keyring).clone();
        keyring.insert(id, Arc::clone(&session));
        self.keyring = Arc::new(keyring);
        self.keyring_version += 1;
        self.session = Some((id, session));
        Ok(())
    }

    /// A whole checkpoint with blocking I/O, while nothing else is under way.
    pub(super) fn checkpoint_now(
        &mut self,
        backing: &dyn Backing,
        is_clean: bool,
        sequence: &mut dyn FnMut() -> u64,
    ) -> Result<(), AttachError> {
        self.find_room_for_pages(backing)?;
        let written = self.write_checkpoint(backing, is_clean, sequence);
        if written.is_err() {
            // The trees in memory count as written now, so another attempt would name pages that
            // are not there.
            self.poison();
        }
        written
    }

    fn find_room_for_pages(&mut self, backing: &dyn Backing) -> Result<(), AttachError> {
        let mut refused = Vec::new();
        // This checkpoint needs fewer than what is gone after it: the rest is for good measure.
        let needed = self.checkpoint_slots(0, 0);
        let wanted = self.page_slots_needed(0, 0, 0) + PAGE_SLOTS_AHEAD;
        let mut outcome = Ok(());
        while self.space.page_slots() < wanted {
            let Some(run) = self.take_run() else {
                outcome = outcome.and(Err(AttachError::Full));
                break;
            };
            let first = Slot(run.start).offset();
            let len = run.len * BLOCK_LEN as u64;
            match backing.allocate(first, len) {
                Ok(()) => self.space.add_page_slots(run),
                Err(error) => {
                    // Another run may have its room from before a crash.
                    refused.push(run);
                    self.backing_full = true;
                    outcome = Err(AttachError::NoRoom(error));
                    if self.space.page_slots() >= needed {
                        break;
                    }
                }
            }
        }
        for slot in refused.into_iter().flat_map(Run::slots) {
            self.space.free_now(slot);
        }
        if self.space.page_slots() >= needed {
            return Ok(());
        }
        outcome
    }

    fn write_checkpoint(
        &mut self,
        backing: &dyn Backing,
        is_clean: bool,
        sequence: &mut dyn FnMut() -> u64,
    ) -> Result<(), AttachError> {
        let mut begun = None;
        backing.write_many(&mut |write| {
            begun = self.place_checkpoint(is_clean, sequence, &mut |page| {
                write(page.offset, page.buffer);
            });
        })?;
        begun.ok_or(AttachError::Full)?;
        if !mutant::is(Mutant::NoPageBarrier) {
            backing.sync()?;
        }
        let first = self.seal_superblock(sequence).ok_or(AttachError::Full)?;
        backing.write_at(first.offset, &first.buffer)?;
        backing.sync()?;
        if let Some(second) = self.finish_checkpoint() {
            backing.write_at(second.offset, &second.buffer)?;
        }
        self.finish_mirror();
        if is_clean {
            backing.sync()?;
        }
        Ok(())
    }
}
