//! `check`: is everything that a volume holds what was written to it?
//!
//! | what | how |
//! |---|---|
//! | header | both copies authenticate |
//! | map and space tree | every page authenticates |
//! | log | replayed as an opening does; a batch that the last power cut left half-written is no damage |
//! | space | each slot is used once, and map and space tree agree on which |
//! | data | every mapped block is read and authenticated |
//!
//! The map is gone through twice, page by page: for the space, then for the data, which several
//! threads read. So memory does not grow with the volume beyond two bits for each slot, the space
//! tree, and faults, should there be many.
//!
//! With `--repair` the volume is opened for writing, and what was found is handed to [`repair`].

use std::ops::{ControlFlow, Range};
use std::sync::{Arc, Mutex, mpsc};

use anyhow::Context;
use offload::cli::format_size;
use serde_json::{Value, json};

use super::open::{id_text, key, serial_text};
use super::progress;
use super::repair::{self, Repaired};
use crate::args::CheckArgs;
use crate::volume::backing::{Access, Backing, FileBacking};
use crate::volume::buffer::Buffer;
use crate::volume::entry::Entry;
use crate::volume::geometry::{BLOCK_LEN, Block, CHUNK_SLOTS, FANOUT, Geometry, Slot};
use crate::volume::map::Visit;
use crate::volume::page::{Page, PagePlace};
use crate::volume::page_reader::PageFault;
use crate::volume::recover::{Recovered, recover};
use crate::volume::sealing::Keyring;

/// Problems that are listed; the rest is counted.
const LISTED: usize = 100;
/// Reading threads: enough to keep a disk busy while one of them decrypts.
const THREADS: usize = 4;
/// Stretches found that none of them has taken yet.
const QUEUED: usize = 256;

/// Checks, and repairs if asked to; whether all is well (then).
pub(super) fn run(args: &CheckArgs) -> anyhow::Result<bool> {
    let access = if args.repair {
        Access::Write
    } else {
        Access::Read
    };
    let material = key(args.key.source())?;
    let backing = Arc::new(FileBacking::open(&args.volume, access)?);
    let recovered = recover(&*backing, &material)
        .with_context(|| format!("cannot open the volume {}", args.volume.display()))?;
    if args.repair {
        repair::refuse(args, &recovered)?;
    }
    let mut findings = Findings::default();
    if recovered.superblock.incomplete {
        findings.add("the import into it has not ended: parts of the image are missing".to_owned());
    }
    let blocks = check_structure(&recovered, &*backing, &mut findings);
    findings.faults = check_data(&recovered, &*backing, blocks);
    add_faults(&mut findings);
    let about = About::of(&recovered, blocks);
    if !args.json {
        about.say(args);
        findings.say("damaged");
    }
    let repaired = match args.repair {
        true => Some(repair::run(
            args, &backing, recovered, &material, &findings,
        )?),
        false => None,
    };
    let left = repaired.as_ref().map_or(findings.count, |r| r.left.count);
    let word = match (left, findings.count, &repaired) {
        (0, _, Some(repaired)) if !repaired.done.is_empty() => "repaired",
        (0, ..) => "clean",
        _ => "damaged",
    };
    if args.json {
        say!("{:#}", about.json(&findings, repaired.as_ref(), left == 0));
        return Ok(left == 0);
    }
    if let Some(repaired) = repaired {
        repaired.say();
    }
    say!("{word}");
    Ok(left == 0)
}

/// All but the data. How many blocks are mapped.
pub(super) fn check_structure(
    recovered: &Recovered,
    backing: &dyn Backing,
    findings: &mut Findings,
) -> u64 {
    check_copies(recovered, findings);
    check_pages(recovered, findings);
    check_space(recovered, backing, findings)
}

#[derive(Debug, Default)]
pub(super) struct Findings {
    pub(super) listed: Vec<String>,
    pub(super) count: u64,
    /// Pages of the map that cannot be had, with the blocks below them.
    pub(super) lost: Vec<(PagePlace, Range<u64>, PageFault)>,
    /// Blocks that are said to be where no data can be.
    pub(super) impossible: Vec<u64>,
    /// Blocks whose data are not what was written, or cannot be had.
    pub(super) faults: Vec<(u64, Fault)>,
}

impl Findings {
    fn add(&mut self, text: String) {
        self.count += 1;
        if self.listed.len() < LISTED {
            self.listed.push(text);
        }
    }

    pub(super) fn say(&self, word: &str) {
        for problem in &self.listed {
            say!("  {word}: {problem}");
        }
        let rest = self.count - self.listed.len() as u64;
        if rest > 0 {
            say!("  and {rest} more");
        }
    }
}

fn check_copies(recovered: &Recovered, findings: &mut Findings) {
    for (copy, health) in ["first", "second"].iter().zip(&recovered.copies) {
        if let Err(error) = health {
            findings.add(format!(
                "the {copy} copy of the header is not usable ({error}); the other one serves, and \
                 the next checkpoint writes both"
            ));
        }
    }
}

fn check_pages(recovered: &Recovered, findings: &mut Findings) {
    for (place, _) in recovered.space.damaged() {
        findings.add(format!(
            "{place} does not authenticate or cannot be read: which slots are free is taken from \
             the map"
        ));
    }
    if recovered.lost_deltas > 0 {
        findings.add(format!(
            "{} changes of the log belong to lost pages",
            recovered.lost_deltas
        ));
    }
}

/// A bit for each slot of the backing.
struct SlotSet {
    geometry: Geometry,
    bits: Vec<u64>,
}

impl SlotSet {
    fn new(geometry: Geometry) -> Self {
        let slots = geometry.chunks * CHUNK_SLOTS;
        Self {
            geometry,
            bits: vec![0; slots.div_ceil(64) as usize],
        }
    }

    /// Adds a slot. `None`: it cannot hold data; `Some(false)`: it was in.
    fn add(&mut self, slot: Slot) -> Option<bool> {
        if !self.geometry.is_data_slot(slot) {
            return None;
        }
        let word = self.bits.get_mut((slot.0 / 64) as usize)?;
        let mask = 1 << (slot.0 % 64);
        let is_new = *word & mask == 0;
        *word |= mask;
        Some(is_new)
    }

    /// Slots that are in both sets.
    fn shared_with(&self, other: &Self) -> impl Iterator<Item = u64> {
        let both = self.bits.iter().zip(&other.bits).map(|(a, b)| a & b);
        (0_u64..).zip(both).flat_map(|(index, word)| {
            (0..64)
                .filter(move |bit| word & (1 << bit) != 0)
                .map(move |bit| index * 64 + bit)
        })
    }

    fn has(&self, slot: Slot) -> bool {
        let word = self.bits.get((slot.0 / 64) as usize);
        word.is_some_and(|word| word & (1 << (slot.0 % 64)) != 0)
    }
}

/// Goes through the map. How many blocks are mapped.
fn check_space(recovered: &Recovered, backing: &dyn Backing, findings: &mut Findings) -> u64 {
    let geometry = recovered.superblock.geometry;
    let mut data = SlotSet::new(geometry);
    let mut pages = SlotSet::new(geometry);
    let mut add_page = |entry: Entry, findings: &mut Findings| {
        let slot = entry.slot().0;
        match pages.add(entry.slot()) {
            Some(true) => {}
            Some(false) => findings.add(format!("slot {slot} is used by two pages")),
            None => findings.add(format!(
                "a page is said to be in slot {slot}, where none can be"
            )),
        }
    };
    for entry in recovered.space.page_entries().chain([recovered.map.root()]) {
        if !entry.is_hole() {
            add_page(entry, findings);
        }
    }
    let has_space = recovered.space.damaged().is_empty();
    let mut blocks = 0;
    let mut has_lost = false;
    let _ = recovered.each_leaf(backing, 0, &mut |visit| {
        match visit {
            Visit::Upper(_, page) => {
                let entries = (0..FANOUT).map(|field| page.entry(field));
                for entry in entries.filter(|entry| !entry.is_hole()) {
                    add_page(entry, findings);
                }
            }
            Visit::Leaf(leaf, page) => {
                for block in leaf * FANOUT..(leaf + 1) * FANOUT {
                    let entry = page.entry(block);
                    if !entry.is_hole() {
                        blocks += 1;
                        let is_free = has_space && !recovered.space.is_used(entry.slot());
                        check_slot(&mut data, block, entry.slot(), is_free, findings);
                    }
                }
            }
            Visit::Lost(place, leaves, fault) => {
                has_lost = true;
                let first = leaves.start.saturating_mul(FANOUT).min(geometry.blocks);
                let end = leaves.end.saturating_mul(FANOUT).min(geometry.blocks);
                findings.add(format!("{place} {fault}: blocks {first} to {end} are lost"));
                findings.lost.push((place, first..end, fault));
            }
        }
        ControlFlow::Continue(())
    });
    for slot in data.shared_with(&pages) {
        findings.add(format!("slot {slot} is used by a page and something else"));
    }
    // What is below a lost page of the map looks like a leak and is none.
    if !has_lost {
        let leaked = recovered.used_slots().filter(|slot| !data.has(*slot));
        let leaked = leaked.count();
        if leaked > 0 {
            findings.add(format!(
                "{leaked} slots are said to be in use, but no block is in them"
            ));
        }
    }
    blocks
}

fn check_slot(
    data: &mut SlotSet,
    block: u64,
    slot: Slot,
    is_said_to_be_free: bool,
    findings: &mut Findings,
) {
    match data.add(slot) {
        None => {
            findings.impossible.push(block);
            findings.add(format!(
                "block {block} is said to be in slot {}, where no data can be",
                slot.0
            ));
        }
        Some(false) => findings.add(format!(
            "slot {} is used by block {block} and another one",
            slot.0
        )),
        Some(true) if is_said_to_be_free => findings.add(format!(
            "slot {} holds block {block} but is said to be free",
            slot.0
        )),
        Some(true) => {}
    }
}

/// A stretch of blocks of one leaf in consecutive slots.
struct Stretch {
    first: u64,
    entries: Vec<Entry>,
}

fn stretches(geometry: &Geometry, leaf: u64, page: &Page) -> Vec<Stretch> {
    let mut list: Vec<Stretch> = Vec::new();
    for field in 0..FANOUT {
        let (block, entry) = (leaf * FANOUT + field, page.entry(field));
        if entry.is_hole() || !geometry.is_data_slot(entry.slot()) {
            continue;
        }
        match list.last_mut() {
            Some(last)
                if last.first + last.entries.len() as u64 == block
                    && last
                        .entries
                        .last()
                        .is_some_and(|e| e.slot().0 + 1 == entry.slot().0) =>
            {
                last.entries.push(entry);
            }
            _ => list.push(Stretch {
                first: block,
                entries: vec![entry],
            }),
        }
    }
    list
}

/// What is wrong with a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    NotAuthentic,
    Unreadable,
}

/// Reads and authenticates all data, `blocks` blocks. What is wrong, in order.
fn check_data(recovered: &Recovered, backing: &dyn Backing, blocks: u64) -> Vec<(u64, Fault)> {
    let bar = progress::bytes(blocks * BLOCK_LEN as u64, "checking");
    let geometry = &recovered.superblock.geometry;
    let keyring = &recovered.keyring;
    let faults = Mutex::new(Vec::new());
    let (found, queue) = mpsc::sync_channel::<Stretch>(QUEUED);
    let queue = Mutex::new(queue);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                let mut buffer = Buffer::zeroed(FANOUT as usize);
                let next = || queue.lock().unwrap_or_else(|e| e.into_inner()).recv();
                while let Ok(stretch) = next() {
                    let found = check_stretch(keyring, backing, &stretch, &mut buffer);
                    bar.inc(stretch.entries.len() as u64 * BLOCK_LEN as u64);
                    if !found.is_empty() {
                        let mut faults = faults.lock().unwrap_or_else(|e| e.into_inner());
                        faults.extend(found);
                    }
                }
            });
        }
        // What is lost was told before.
        let _ = recovered.each_leaf(backing, 0, &mut |visit| {
            if let Visit::Leaf(leaf, page) = visit {
                for stretch in stretches(geometry, leaf, page) {
                    if found.send(stretch).is_err() {
                        return ControlFlow::Break(());
                    }
                }
            }
            ControlFlow::Continue(())
        });
        drop(found);
    });
    bar.finish_and_clear();
    let mut faults = faults.into_inner().unwrap_or_else(|e| e.into_inner());
    faults.sort_unstable_by_key(|(block, _)| *block);
    faults
}

/// Lists the faults of data.
pub(super) fn add_faults(findings: &mut Findings) {
    for (first, last, fault) in group(&findings.faults) {
        let what = match fault {
            Fault::NotAuthentic => "does not authenticate",
            Fault::Unreadable => "cannot be read from the backing",
        };
        let block = BLOCK_LEN as u64;
        let (from, to) = (first * block, (last + 1) * block);
        findings.add(match last - first {
            0 => format!("block {first} (bytes {from} to {to} of the disk) {what}"),
            _ => format!(
                "each of blocks {first} to {last} (bytes {from} to {to} of the disk) {what}"
            ),
        });
    }
}

fn check_stretch(
    keyring: &Keyring,
    backing: &dyn Backing,
    stretch: &Stretch,
    buffer: &mut Buffer,
) -> Vec<(u64, Fault)> {
    let mut faults = Vec::new();
    let Some(start) = stretch.entries.first().map(|entry| entry.slot().offset()) else {
        return faults;
    };
    buffer.set_blocks(stretch.entries.len());
    let is_read = backing.read_at(start, buffer).is_ok();
    for (index, entry) in stretch.entries.iter().enumerate() {
        let block = stretch.first + index as u64;
        let data = buffer.block_mut(index);
        // One bad sector must not hide the state of its neighbours.
        if !is_read && backing.read_at(entry.slot().offset(), data).is_err() {
            faults.push((block, Fault::Unreadable));
        } else if keyring.open_block(Block(block), entry, data).is_err() {
            faults.push((block, Fault::NotAuthentic));
        }
    }
    faults
}

/// Neighbours with the same fault: first, last, fault.
fn group(faults: &[(u64, Fault)]) -> Vec<(u64, u64, Fault)> {
    let mut groups: Vec<(u64, u64, Fault)> = Vec::new();
    for (block, fault) in faults {
        match groups.last_mut() {
            Some((_, last, same)) if *last + 1 == *block && same == fault => *last = *block,
            _ => groups.push((*block, *block, *fault)),
        }
    }
    groups
}

/// What the report begins with.
struct About {
    id: String,
    serial: String,
    len: u64,
    blocks: u64,
    log: String,
}

impl About {
    fn of(recovered: &Recovered, blocks: u64) -> Self {
        let superblock = &recovered.superblock;
        let log = match (superblock.clean, recovered.dropped) {
            (true, _) => "empty: the volume was closed".to_owned(),
            (false, dropped) => format!(
                "{} batches replayed{}",
                recovered.replayed,
                if dropped {
                    "; the last one was not complete and does not count"
                } else {
                    ""
                }
            ),
        };
        Self {
            id: id_text(&superblock.id),
            serial: serial_text(&superblock.serial),
            len: superblock.geometry.volume_len(),
            blocks,
            log,
        }
    }

    fn say(&self, args: &CheckArgs) {
        say!(
            "{}: volume {}, {}\n  data  {} blocks ({}) read\n  log   {}",
            args.volume.display(),
            self.serial,
            format_size(self.len),
            self.blocks,
            format_size(self.blocks * BLOCK_LEN as u64),
            self.log
        );
    }

    fn json(&self, findings: &Findings, repaired: Option<&Repaired>, is_clean: bool) -> Value {
        let mut report = json!({
            "clean": is_clean,
            "id": self.id,
            "serial": self.serial,
            "blocks_checked": self.blocks,
            "log": self.log,
            "problem_count": findings.count,
            "problems": findings.listed,
        });
        if let Some(repaired) = repaired {
            report["repairs"] = json!(repaired.done);
            report["zeroed"] = repaired.zeroed_json();
            report["problems_left_count"] = json!(repaired.left.count);
            report["problems_left"] = json!(repaired.left.listed);
        }
        report
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_told_as_one() {
        use Fault::{NotAuthentic as A, Unreadable as R};
        assert_eq!(
            group(&[(1, A), (2, A), (3, R), (4, R), (9, R)]),
            [(1, 2, A), (3, 4, R), (9, 9, R)]
        );
    }

    #[test]
    fn a_slot_set_tells_new_slots_from_old_and_impossible_ones() {
        let geometry = Geometry::for_volume(1 << 20).unwrap();
        let mut set = SlotSet::new(geometry);
        let slot = Slot(geometry.data_start() * CHUNK_SLOTS + 63);
        assert!(!set.has(slot));
        assert_eq!((set.add(slot), set.add(slot)), (Some(true), Some(false)));
        assert!(set.has(slot));
        for impossible in [0, CHUNK_SLOTS, geometry.chunks * CHUNK_SLOTS, u64::MAX] {
            assert_eq!(set.add(Slot(impossible)), None);
        }
    }
}
