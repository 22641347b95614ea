//! Pages of the map that are read while the volume runs, and what bounds how many have to stay.
//!
//! A piece that needs a page which is not in memory waits; the first to need it reads it, others
//! on whichever lane wait for the same read. When the page has landed, those who waited are
//! admitted again, on the reader's own lane before anything else can push the page out: so each
//! read brings somebody on, however small the cache is.
//!
//! A page that does not authenticate, or that the backing cannot read, fails those who wait and
//! is forgotten: who comes next tries again.

use smallvec::SmallVec;

use super::core::{Core, Event};
use super::{Failure, Stats};
use crate::volume::backing::Backing;
use crate::volume::geometry::{Block, FANOUT};
use crate::volume::map::{LostLeaf, Want, load_leaves};
use crate::volume::page_reader::PageReader;
use crate::volume::ranges::Ticket;

/// A page that a lane is reading.
pub(super) struct Load {
    want: Want,
    lane: u16,
    waiters: SmallVec<[Ticket; 2]>,
}

impl Core {
    /// `ticket` waits for a page from now on. Whether its lane has to read it.
    ///
    /// # Errors
    /// The page cannot be where its parent says.
    pub(super) fn await_page(&mut self, want: Want, ticket: Ticket) -> Result<bool, Failure> {
        let has_session = self.keyring.get(want.entry.session()).is_some();
        if !has_session || !self.geometry.is_data_slot(want.entry.slot()) {
            return Err(Failure::NotAuthentic);
        }
        if let Some(load) = self.loads.get_mut(&want.key()) {
            load.waiters.push(ticket);
            return Ok(false);
        }
        self.map.begin_read(&want);
        let load = Load {
            want,
            lane: ticket.0,
            waiters: SmallVec::from_slice(&[ticket]),
        };
        self.loads.insert(want.key(), load);
        Ok(true)
    }

    /// A page that `lane` read has landed. Its own pieces that waited are returned; other lanes
    /// are told.
    pub(super) fn page_landed(
        &mut self,
        lane: u16,
        want: &Want,
        outcome: Result<&[u8], Failure>,
    ) -> SmallVec<[u32; 2]> {
        let Some(load) = self.loads.remove(&want.key()) else {
            return SmallVec::new();
        };
        if let Ok(bytes) = outcome {
            self.map.insert(want, bytes);
        }
        self.map.end_read(want);
        let mut own = SmallVec::new();
        for (waiting, piece) in load.waiters {
            if waiting == lane {
                own.push(piece);
            } else {
                self.tell(waiting, Event::Page(piece, outcome.map(|_| ())));
            }
        }
        own
    }

    /// A lane ends: what it was reading is for others to read.
    pub(super) fn abandon_loads(&mut self, lane: u16) {
        let own: Vec<u64> = self
            .loads
            .iter()
            .filter(|(_, load)| load.lane == lane)
            .map(|(key, _)| *key)
            .collect();
        for key in own {
            let Some(load) = self.loads.remove(&key) else {
                continue;
            };
            self.map.end_read(&load.want);
            for (waiting, piece) in load.waiters {
                if waiting != lane {
                    self.tell(waiting, Event::Page(piece, Ok(())));
                }
            }
        }
    }

    /// Keeps a leaf in memory until the next checkpoint begins, if so many may be kept.
    pub(super) fn keep(&mut self, leaf: u64) -> bool {
        if self.is_pinned_full(leaf..leaf + 1) {
            return false;
        }
        self.map.touch(leaf);
        true
    }

    /// A write of `count` blocks is admitted: their leaves are needed until it is committed.
    pub(super) fn land(&mut self, first: u64, count: u64) {
        self.landing += count as usize;
        for leaf in first / FANOUT..=(first + count - 1) / FANOUT {
            let start = first.max(leaf * FANOUT);
            let end = (first + count).min((leaf + 1) * FANOUT);
            *self.landing_leaves.entry(leaf).or_default() += (end - start) as u32;
            self.map.touch(leaf);
        }
    }

    /// A block that was admitted has landed, or failed.
    pub(super) fn landed(&mut self, block: Block) {
        self.landing = self.landing.saturating_sub(1);
        let leaf = block.0 / FANOUT;
        if let Some(blocks) = self.landing_leaves.get_mut(&leaf) {
            *blocks -= 1;
            if *blocks == 0 {
                self.landing_leaves.remove(&leaf);
            }
        }
    }

    /// Only what is not committed yet keeps its leaves in memory from here on.
    pub(super) fn retouch(&mut self) {
        let Self {
            map,
            open,
            sealed,
            landing_leaves,
            ..
        } = self;
        let uncommitted = open.keys().chain(sealed.keys()).map(|block| block / FANOUT);
        map.retouch(uncommitted.chain(landing_leaves.keys().copied()));
    }

    /// Whether changes in `leaves` have to wait for a checkpoint, as more pages would have to
    /// stay in memory than may.
    pub(super) fn is_pinned_full(&mut self, leaves: std::ops::Range<u64>) -> bool {
        let limit = self.map.touch_limit(self.geometry.blocks);
        if limit == usize::MAX {
            return false;
        }
        let more = self.map.untouched(leaves);
        if more == 0 || self.map.touched_pages() + more <= limit {
            return false;
        }
        if self.map.dirty_leaves() > 0 {
            self.wants_checkpoint = true;
            return true;
        }
        // Writes that failed leave leaves touched that nothing will make dirty.
        if self.checkpoint.is_none() && self.commit.is_none() && self.open.is_empty() {
            self.retouch();
        }
        self.map.touched_pages() > 0 && self.map.touched_pages() + more > limit
    }

    /// Whether so many pages have to stay that it is time for a checkpoint.
    pub(super) fn is_pinned_high(&self) -> bool {
        let limit = self.map.touch_limit(self.geometry.blocks);
        limit != usize::MAX && self.map.touched_pages() > limit / 4 * 3
    }

    /// Brings leaves into memory with blocking reads. Those that cannot be had are returned.
    pub(super) fn load_now(
        &mut self,
        backing: &dyn Backing,
        leaves: impl Iterator<Item = u64>,
    ) -> Vec<LostLeaf> {
        let reader = PageReader {
            backing,
            keyring: &self.keyring,
            id: self.superblock.id,
            geometry: self.geometry,
        };
        load_leaves(&mut self.map, &reader, leaves)
    }

    /// Shows what the map's cache counted.
    pub(super) fn count_pages(&self, stats: &Stats) {
        use std::sync::atomic::Ordering::Relaxed;
        let counts = self.map.counts();
        stats.map_hits.store(counts.hits, Relaxed);
        stats.map_misses.store(counts.misses, Relaxed);
        stats.map_evictions.store(counts.evictions, Relaxed);
        let pages = [
            (&stats.map_pages, self.map.resident()),
            (&stats.map_unwritten, self.map.unwritten()),
        ];
        for (gauge, count) in pages {
            gauge.store(count as u64, Relaxed);
        }
    }
}
