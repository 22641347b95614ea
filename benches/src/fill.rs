//! A volume as the worst `kill -9` leaves it: with a log that has no room for another commit.
//!
//! No client can bring a card to this point at will: a checkpoint begins when the log is half full, and
//! frees it long before the rest is used. So the card's own engine runs here, on a backing whose
//! checkpoint hangs at its last step, the superblock, while commits go on; and then it is dropped
//! as it stands. What lies in the file is what a killed card leaves behind.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use crypto::source::KeySource;
use vhost_blk::volume::backing::{Access, Backing, FileBacking};
use vhost_blk::volume::engine::{
    Io, IoKind, Lane, Op, Payload, PayloadFault, Reporter, Volume, perform,
};
use vhost_blk::volume::geometry::{BLOCK_LEN, FANOUT, Geometry};
use vhost_blk::volume::map::{PAGE_COST, pages_of};
use vhost_blk::volume::recover::recover_with;
use vhost_blk::volume::superblock::{COPIES, COPY_LEN};

/// Bytes of a leaf of the map.
pub const LEAF: u64 = FANOUT * BLOCK_LEN as u64;

/// Changes of a commit, but for the last, small ones.
const COMMIT: u64 = 2048;
/// Bytes of a change in the log, its share of the record's head included.
const DELTA_LEN: u64 = 49;

/// What is in the log.
#[derive(Clone, Copy, Debug)]
pub struct Filled {
    /// 4 KiB blocks that were written.
    pub writes: u64,
    /// Leaves of the map that they are in.
    pub leaves: u64,
}

/// Contents that do not matter.
struct Noise(u8);

impl Payload for Noise {
    fn load(&mut self, at: usize, into: &mut [u8]) -> Result<(), PayloadFault> {
        #[allow(clippy::cast_possible_truncation)]
        into.fill(self.0.wrapping_add((at / BLOCK_LEN) as u8));
        Ok(())
    }
    fn store(&mut self, _: usize, _: &[u8]) -> Result<(), PayloadFault> {
        Ok(())
    }
}

struct Quiet;

impl Reporter for Quiet {
    fn not_authentic(&self, _: u64) {}
    fn backing_failed(&self, _: &'static str, _: i32) {}
    fn poisoned(&self, _: &'static str) {}
}

/// Leaves that may be changed between two checkpoints, each below a page of its own: see
/// [`map`](vhost_blk::volume::map).
fn leaves_max(blocks: u64, cache: u64) -> usize {
    let pages = cache / PAGE_COST;
    if pages_of(blocks) <= pages {
        return usize::MAX;
    }
    usize::try_from(pages * 3 / 8 / 2).unwrap_or(usize::MAX)
}

/// Fills the log of the volume at `path` with changes of `leaves`, as many of them as `cache` bytes
/// of memory for its map allow.
///
/// # Errors
/// The volume cannot be opened, its backing fails, or the log does not get full.
pub fn fill_log(
    path: &Path,
    key: &Path,
    cache: u64,
    leaves: impl Iterator<Item = u64>,
) -> Result<Filled> {
    let material = KeySource::File(key.to_owned()).load().context("the key")?;
    let backing = Arc::new(FileBacking::open(path, Access::Write)?);
    let recovered = recover_with(&*backing, &material, Some(cache))?;
    let geometry = recovered.superblock.geometry;
    let shared = Arc::clone(&backing) as Arc<dyn Backing>;
    let volume = Volume::new(recovered, shared, Box::new(Quiet));
    volume.attach(None)?;
    let lane = Lane::new(Arc::clone(volume.shared()), Arc::new(|| {}));
    let mut filler = Filler {
        backing: &*backing,
        lane,
        hung: Vec::new(),
        geometry,
        logged: 0,
    };
    let leaves: Vec<u64> = leaves.collect();
    // The log holds what was changed before the checkpoint that hangs, and what was since.
    let each = leaves_max(geometry.blocks, cache).min(leaves.len() / 2);
    let (before, since) = leaves.split_at(each);
    ensure!(each > 0, "no leaves to write to");
    // As many leaves as there may be, each with as many changes as the log then has room for.
    let changes = geometry.log_blocks() * BLOCK_LEN as u64 / 48;
    let blocks = (changes / 2 / each as u64).clamp(1, FANOUT);
    let mut filled = Filled {
        writes: 0,
        leaves: 0,
    };
    let mut gathered = 0;
    for (part, is_before) in [(before, true), (since, false)] {
        let part = part.get(..each).unwrap_or(part);
        for (round, leaf) in (0..).zip(part.iter().cycle()) {
            ensure!(
                round < geometry.log_blocks() * 8,
                "the log does not get full"
            );
            if is_before && !filler.hung.is_empty() {
                break;
            }
            if !filler.write(leaf * LEAF, blocks * BLOCK_LEN as u64)? {
                break;
            }
            gathered += blocks;
            // Changes of the same blocks again are one change until they are committed.
            if gathered >= COMMIT && filler.has_room_for(2 * gathered) {
                ensure!(filler.request(Op::Flush)?, "a commit hangs");
                gathered = 0;
            } else if gathered >= COMMIT {
                break;
            }
            filled.writes += blocks;
            filled.leaves += u64::from(round < each as u64);
        }
    }
    // The rest of it, in commits that are as small as they get.
    while filler.request(Op::Flush)? && filler.write(before[0] * LEAF, BLOCK_LEN as u64)? {
        filled.writes += 1;
    }
    ensure!(!filler.hung.is_empty(), "no checkpoint has begun");
    Ok(filled)
}

/// The engine on a backing that never ends the write of a superblock.
struct Filler<'b> {
    backing: &'b dyn Backing,
    lane: Lane<Noise>,
    hung: Vec<Io>,
    geometry: Geometry,
    /// Bytes written to the log.
    logged: u64,
}

impl Filler<'_> {
    /// Whether the log, of which nothing is given back, takes so many changes more.
    fn has_room_for(&self, changes: u64) -> bool {
        self.logged + changes * DELTA_LEN < self.geometry.log_blocks() * BLOCK_LEN as u64
    }

    fn write(&mut self, offset: u64, len: u64) -> Result<bool> {
        self.request(Op::Write {
            offset,
            len,
            durable: false,
        })
    }

    /// Whether it ended: if not, it waits for room in the log.
    fn request(&mut self, op: Op) -> Result<bool> {
        self.lane.submit(op, Noise(0));
        self.drive();
        match self.lane.next_done() {
            Some(done) => done.result.context("filling the log").map(|()| true),
            None => Ok(false),
        }
    }

    fn drive(&mut self) {
        loop {
            self.lane.on_wake();
            self.lane.turn();
            let Some(io) = self.lane.next_io() else {
                return;
            };
            if let IoKind::Write { offset, buffer, .. } = &io.kind {
                if *offset < COPIES[1] + COPY_LEN as u64 {
                    self.hung.push(io);
                    continue;
                }
                let log = self.geometry.log_slot(0).offset();
                let log_len = self.geometry.log_blocks() * BLOCK_LEN as u64;
                if (log..log + log_len).contains(offset) {
                    self.logged += buffer.len() as u64;
                }
            }
            let (result, kind) = perform(io.kind, self.backing);
            self.lane.on_io(io.id, result, kind.into_buffer());
        }
    }
}

#[cfg(test)]
mod tests {
    use vhost_blk::volume::create::create;
    use vhost_blk::volume::geometry::Geometry;

    use super::*;
    use crate::target::write_private;

    #[test]
    fn a_filled_log_has_no_room_for_a_commit_and_is_read_back_whole() {
        let home = tempfile::tempdir().unwrap();
        let (path, key) = (home.path().join("volume"), home.path().join("key"));
        write_private(&key, &[7; 32]).unwrap();
        let geometry = Geometry::for_volume(64 << 20).unwrap();
        let material = KeySource::File(key.clone()).load().unwrap();
        let mut backing = FileBacking::create(&path, false).unwrap();
        backing.set_len(geometry.backing_len()).unwrap();
        create(
            &backing,
            geometry,
            &material,
            crypto::slot::Argon2Params::fast_for_tests(),
        )
        .unwrap();
        drop(backing);
        let filled = fill_log(&path, &key, 16 << 20, 3..40).unwrap();
        assert_eq!(filled.leaves, 36);
        let backing = FileBacking::open(&path, Access::Read).unwrap();
        let recovered = recover_with(&backing, &material, None).unwrap();
        assert!(!recovered.superblock.clean);
        assert!(recovered.log_used >= geometry.log_blocks() - 1);
        assert!(!recovered.dropped);
    }
}
