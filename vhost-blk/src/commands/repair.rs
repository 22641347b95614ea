//! What `check --repair` does about what was found, in this order:
//!
//! 1. A damaged or older copy of the header is written anew from the one that counts.
//! 2. With `--zero-damaged`: every range that is lost is listed, then made a hole. What the backing
//!    could not *read* may come back, so it is left, always.
//! 3. The space tree is made to say what the map says: see [`crate::volume::repair`].
//! 4. If 2 or 3 changed anything, the volume is activated, which is the one checkpoint that makes it
//!    all durable, and closed.
//! 5. What is stored then is opened and checked again, but for the data, which nothing has touched:
//!    what is reported as left is what the next check will find.
//!
//! A volume that was not closed is left alone unless forced: its guest may live, and keep writes that
//! only a card can put in. Activating it here would end that session.

use std::ops::Range;
use std::sync::Arc;

use anyhow::{Context, bail};
use crypto::source::KeyMaterial;
use serde_json::{Value, json};

use super::check::{Fault, Findings, add_faults, check_structure};
use super::open::serial_text;
use crate::args::CheckArgs;
use crate::device::report::LogReporter;
use crate::volume::backing::{Backing, FileBacking};
use crate::volume::engine::Volume;
use crate::volume::geometry::BLOCK_LEN;
use crate::volume::page::PagePlace;
use crate::volume::page_reader::PageFault;
use crate::volume::recover::{Recovered, recover};
use crate::volume::repair::Mended;

/// What a repair came to.
#[derive(Debug, Default)]
pub(super) struct Repaired {
    /// What was done.
    pub(super) done: Vec<String>,
    /// What could not be.
    notes: Vec<&'static str>,
    /// Bytes of the disk that read as zeros now.
    zeroed: Vec<Range<u64>>,
    /// What is still wrong.
    pub(super) left: Findings,
}

impl Repaired {
    pub(super) fn say(&self) {
        for done in &self.done {
            say!("  repaired: {done}");
        }
        for note in &self.notes {
            say!("  note: {note}");
        }
        self.left.say("left");
    }

    pub(super) fn zeroed_json(&self) -> Value {
        let ranges = self.zeroed.iter();
        let ranges = ranges.map(|r| json!({"offset": r.start, "length": r.end - r.start}));
        Value::Array(ranges.collect())
    }
}

/// Refuses volumes that must not be written to here.
pub(super) fn refuse(args: &CheckArgs, recovered: &Recovered) -> anyhow::Result<()> {
    let path = args.volume.display();
    if recovered.superblock.incomplete {
        bail!(
            "{path}: the import into this volume has not ended: there is nothing to repair; run \
             `vhost-blk import --force` again"
        );
    }
    if !recovered.superblock.clean && !args.force {
        bail!(
            "{path} was not closed: its card was killed, or the power failed. Should its guest still \
             run, start the card again, which takes over what the guest had written; if no guest is \
             left, give --force"
        );
    }
    if recovered.is_beyond_writing() {
        bail!(
            "{path}: the backing cannot read pages of the map that a writer must know; copy it to a \
             good device first. Nothing was changed"
        );
    }
    Ok(())
}

/// Repairs.
pub(super) fn run(
    args: &CheckArgs,
    backing: &Arc<FileBacking>,
    mut recovered: Recovered,
    material: &KeyMaterial,
    found: &Findings,
) -> anyhow::Result<Repaired> {
    let mut repaired = Repaired::default();
    let copied = recovered.mend_copies(&**backing);
    if copied.context("the other copy of the header could not be written")? {
        repaired
            .done
            .push("both copies of the header are the same again".to_owned());
    }
    let lost = Lost::of(found);
    let mut zeroed = Vec::new();
    if args.zero_damaged {
        let ranges = lost.ranges();
        tell(args, &ranges);
        if recovered.make_holes(&**backing, &lost.pages, &lost.blocks) {
            zeroed = ranges;
        }
    }
    let mended = recovered.mend_space(&**backing);
    describe(&mended, &mut repaired);
    if mended.is_hopeless || (zeroed.is_empty() && !mended.is_change()) {
        drop(recovered);
    } else {
        store(backing, recovered)?;
        let bytes: u64 = zeroed.iter().map(|range| range.end - range.start).sum();
        if bytes > 0 {
            let done = format!("{bytes} bytes that were lost read as zeros");
            repaired.done.push(done);
        }
        repaired.zeroed = zeroed;
    }
    let now = recover(&**backing, material).context("the repaired volume cannot be opened")?;
    check_structure(&now, &**backing, &mut repaired.left);
    let is_zeroed = args.zero_damaged && !mended.is_hopeless;
    let is_left = |fault: &Fault| !is_zeroed || *fault == Fault::Unreadable;
    let faults = found.faults.iter().copied();
    repaired.left.faults = faults.filter(|(_, fault)| is_left(fault)).collect();
    add_faults(&mut repaired.left);
    Ok(repaired)
}

/// One checkpoint for all of it, and another that closes the volume.
fn store(backing: &Arc<FileBacking>, recovered: Recovered) -> anyhow::Result<()> {
    let reporter = Box::new(LogReporter::new(serial_text(&recovered.superblock.serial)));
    let as_backing = Arc::clone(backing) as Arc<dyn Backing>;
    let volume = Volume::new(recovered, as_backing, reporter);
    volume.attach(None)?;
    volume
        .close()
        .context("the volume is repaired but could not be closed")
}

fn describe(mended: &Mended, repaired: &mut Repaired) {
    let mut add = |count: u64, what: &str| {
        if count > 0 {
            repaired.done.push(format!("{count} {what}"));
        }
    };
    add(
        mended.rebuilt as u64,
        "lost pages of the space tree made anew from the map",
    );
    add(mended.freed, "slots freed that no block is in");
    add(mended.marked, "slots marked as used that a block is in");
    if mended.is_hopeless {
        repaired.notes.push(
            "pages of both trees are lost, so which slots are free is not known and cannot be \
             repaired: export what is left, or give --zero-damaged",
        );
    } else if mended.is_partial {
        repaired.notes.push(
            "pages of the map are lost: what the space tree has in use was left so, as their blocks \
             may be in it",
        );
    }
}

/// What authenticates no more.
struct Lost {
    pages: Vec<PagePlace>,
    below: Vec<Range<u64>>,
    blocks: Vec<u64>,
}

impl Lost {
    fn of(found: &Findings) -> Self {
        let pages = || {
            let lost = found.lost.iter();
            lost.filter(|(.., fault)| *fault == PageFault::Damaged)
        };
        let bad = found.faults.iter();
        let bad = bad.filter(|(_, fault)| *fault == Fault::NotAuthentic);
        let mut blocks: Vec<u64> = bad.map(|(block, _)| *block).collect();
        blocks.extend(&found.impossible);
        blocks.sort_unstable();
        blocks.dedup();
        Self {
            pages: pages().map(|(place, ..)| *place).collect(),
            below: pages().map(|(_, blocks, _)| blocks.clone()).collect(),
            blocks,
        }
    }

    /// In bytes of the disk, in order, neighbours together.
    fn ranges(&self) -> Vec<Range<u64>> {
        let single = self.blocks.iter().map(|block| *block..*block + 1);
        let mut all: Vec<Range<u64>> = single.chain(self.below.iter().cloned()).collect();
        all.sort_unstable_by_key(|range| range.start);
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for range in all {
            let range = range.start * BLOCK_LEN as u64..range.end * BLOCK_LEN as u64;
            match ranges.last_mut() {
                Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
                _ => ranges.push(range),
            }
        }
        ranges
    }
}

/// All of it, before any of it is given up; with `--json` the report comes too late for that.
fn tell(args: &CheckArgs, ranges: &[Range<u64>]) {
    for range in ranges {
        let (at, len) = (range.start, range.end - range.start);
        if args.json {
            eprintln!("vhost-blk: lost: {len} bytes at offset {at}");
        } else {
            say!("  lost: {len} bytes at offset {at}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::page::TreeKind;

    #[test]
    fn what_cannot_be_read_is_never_given_up() {
        let place = |index| PagePlace {
            tree: TreeKind::Map,
            level: 0,
            index,
        };
        let found = Findings {
            lost: vec![
                (place(1), 128..256, PageFault::Unreadable),
                (place(2), 256..384, PageFault::Damaged),
            ],
            faults: vec![(5, Fault::Unreadable), (7, Fault::NotAuthentic)],
            ..Findings::default()
        };
        let lost = Lost::of(&found);
        assert_eq!((lost.pages, lost.blocks), (vec![place(2)], vec![7]));
        assert_eq!(lost.below.first(), Some(&(256..384)));
    }

    #[test]
    fn what_is_lost_is_told_in_bytes_and_neighbours_as_one() {
        let lost = Lost {
            pages: Vec::new(),
            below: vec![128..256, 0..2],
            blocks: vec![2, 4, 130, 256],
        };
        assert_eq!(
            lost.ranges(),
            [0..3 * 4096, 4 * 4096..5 * 4096, 128 * 4096..257 * 4096]
        );
    }
}
