//! A real run, recorded at the backing and replayed up to every kind of instant: the power goes
//! there, and what no barrier covered is there, or not, or torn. Recovery has to find in each such
//! image what the guest knew to be durable, and nothing that it never wrote.
//!
//! The simulated disk of the unit tests drives the engine through far more lives; this one shows the
//! same of the program as it is shipped: its io_uring, its threads, the guest's rings.
//!
//! `OFFLOAD_REPLAY_OPS` and `OFFLOAD_REPLAY_IMAGES` make it longer, `OFFLOAD_SEED` repeats a run (its
//! schedule is the kernel's all the same).

#![allow(clippy::unwrap_used)]

mod common;
mod glass;
mod memory;

use std::collections::{BTreeMap, HashMap};
use std::ops::ControlFlow;
use std::sync::Arc;

use common::*;
use glass::{Event, Glass};
use memory::{Image, Memory, Opened, Sheet, material, sheet};
use offload::testing::fuzz::Random;
use vhost_blk::volume::map::Visit;
use vhost_blk::volume::recover::recover;

/// Blocks that the guest uses: some at the start, some over a leaf's border.
const STRETCHES: [(u64, usize); 2] = [(0, 40), (120, 20)];
const SECTORS: usize = 60 * 8;
const OUT_MAX: usize = 24;

fn variable(name: &str, default: u64) -> u64 {
    let text = std::env::var(name).ok();
    text.map_or(default, |text| text.parse().unwrap())
}

/// What the guest did, in its order among the backing's events.
#[derive(Clone, Debug)]
enum Deed {
    /// From here on these sectors may read as this.
    Begin {
        first: usize,
        count: usize,
        version: u64,
        value: u64,
    },
    /// These are durable in this version or a later one.
    Durable(Vec<(usize, u64)>),
}

fn stamp(value: u64) -> Vec<u8> {
    value.to_le_bytes().repeat(64)
}

/// A recorded run.
struct Run {
    len: u64,
    start: Image,
    events: Vec<Event>,
    deeds: Vec<Deed>,
}

#[derive(Clone, Copy)]
enum Waiting {
    Write {
        first: usize,
        count: usize,
        version: u64,
        is_durable: bool,
    },
    Flush {
        deed: usize,
    },
}

struct Guesswork<'g> {
    guest: Guest,
    glass: &'g Glass,
    random: Random,
    deeds: Vec<Deed>,
    /// Newest acknowledged version of each sector, and whether a write of it is out.
    acked: Vec<u64>,
    is_busy: Vec<bool>,
    out: Vec<(Ticket, Waiting)>,
    version: u64,
}

impl Guesswork<'_> {
    fn tell(&mut self, deed: Deed) {
        self.glass.note(self.deeds.len() as u64);
        self.deeds.push(deed);
    }

    fn send(&mut self) {
        let queue = self.random.index(2);
        if self.random.one_in(7) {
            let covered = self
                .acked
                .iter()
                .copied()
                .enumerate()
                .filter(|(_, v)| *v > 0);
            let deed = Deed::Durable(covered.collect());
            if let Some(ticket) = self.guest.send(queue, FLUSH, 0, &[], 0) {
                // Told when it is acknowledged.
                self.deeds.push(deed);
                let deed = self.deeds.len() - 1;
                self.out.push((ticket, Waiting::Flush { deed }));
            }
            return;
        }
        let stretch = self.random.index(2);
        let (start, blocks) = STRETCHES[stretch];
        let base = stretch * STRETCHES[0].1 * 8;
        let is_whole = !self.random.one_in(4);
        let (at, count) = if is_whole {
            let block = self.random.index(blocks);
            let most = (blocks - block).min(if self.random.one_in(8) { 20 } else { 3 });
            (block * 8, (1 + self.random.index(most)) * 8)
        } else {
            let sector = self.random.index(blocks * 8);
            (sector, 1 + self.random.index((blocks * 8 - sector).min(20)))
        };
        let first = base + at;
        if self.is_busy[first..first + count].contains(&true) {
            return;
        }
        let sector = start * 8 + at as u64;
        let kind = match self.random.below(12) {
            0 if is_whole => DISCARD,
            1 => WRITE_ZEROES,
            _ => OUT,
        };
        self.version += 1;
        let version = self.version;
        let value = if kind == OUT { version } else { 0 };
        self.tell(Deed::Begin {
            first,
            count,
            version,
            value,
        });
        let data = match kind {
            OUT => stamp(value).repeat(count),
            _ => segment(sector, count as u32, 0),
        };
        let sector = if kind == OUT { sector } else { 0 };
        let is_durable = kind != OUT;
        let Some(ticket) = self.guest.send(queue, kind, sector, &data, 0) else {
            return;
        };
        self.is_busy[first..first + count].fill(true);
        self.out.push((
            ticket,
            Waiting::Write {
                first,
                count,
                version,
                is_durable,
            },
        ));
    }

    fn collect(&mut self) {
        for (ticket, waiting) in std::mem::take(&mut self.out) {
            let Some(reply) = self.guest.poll(&ticket) else {
                self.out.push((ticket, waiting));
                continue;
            };
            assert_eq!(reply.status, OK);
            match waiting {
                Waiting::Flush { deed } => self.glass.note(deed as u64),
                Waiting::Write {
                    first,
                    count,
                    version,
                    is_durable,
                } => {
                    self.acked[first..first + count].fill(version);
                    self.is_busy[first..first + count].fill(false);
                    if is_durable {
                        let all = (first..first + count).map(|sector| (sector, version));
                        self.tell(Deed::Durable(all.collect()));
                    }
                }
            }
        }
    }
}

fn image_of(path: &std::path::Path) -> (u64, Image) {
    let bytes = std::fs::read(path).unwrap();
    let slots = (0..).zip(bytes.chunks_exact(BLOCK));
    let used = slots.filter(|(_, slot)| slot.iter().any(|byte| *byte != 0));
    (
        bytes.len() as u64,
        used.map(|(index, slot)| (index, sheet(slot))).collect(),
    )
}

/// `None`: not on this machine.
fn record(seed: u64, ops: u64) -> Option<Run> {
    let files = Files::with_volume("16M");
    let (len, start) = image_of(&files.path("volume"));
    let glass = Glass::new(&files.path("volume"), &files.path("glass"))?;
    glass.record(seed);
    let card = Card::start(&files, glass.path.to_str().unwrap(), &["--queues", "2"]);
    let options = Options {
        queues: 2,
        ..Options::default()
    };
    let mut work = Guesswork {
        guest: Guest::with(&card, options),
        glass: &glass,
        random: Random::new(seed ^ 0xfeed),
        deeds: Vec::new(),
        acked: vec![0; SECTORS],
        is_busy: vec![false; SECTORS],
        out: Vec::new(),
        version: 0,
    };
    for _ in 0..ops {
        while work.out.len() >= OUT_MAX {
            work.collect();
        }
        work.send();
        work.collect();
    }
    while !work.out.is_empty() {
        work.collect();
    }
    let (guest, deeds) = (work.guest, work.deeds);
    drop(guest);
    card.stop();
    let events = glass.recorded();
    Some(Run {
        len,
        start,
        events,
        deeds,
    })
}

struct Part {
    id: u64,
    slot: u64,
    data: Sheet,
    is_done: bool,
}

#[derive(Clone, Default)]
struct Sector {
    /// Versions and their values.
    history: Vec<(u64, u64)>,
    durable: u64,
}

/// Where a replay stands.
struct Replay<'r> {
    run: &'r Run,
    durable: Image,
    pending: Vec<Part>,
    barriers: HashMap<u64, Vec<(u64, u64)>>,
    sectors: Vec<Sector>,
    /// Barriers do nothing: such a disk must be found out.
    is_lying: bool,
    images: u64,
}

impl<'r> Replay<'r> {
    fn new(run: &'r Run, is_lying: bool) -> Self {
        let fresh = Sector {
            history: vec![(0, 0)],
            durable: 0,
        };
        Self {
            run,
            durable: run.start.clone(),
            pending: Vec::new(),
            barriers: HashMap::new(),
            sectors: vec![fresh; SECTORS],
            is_lying,
            images: 0,
        }
    }

    fn step(&mut self, event: &Event) {
        match event {
            Event::Submit { id, offset, data } => {
                let parts = data.chunks_exact(BLOCK).zip(offset / BLOCK as u64..);
                self.pending.extend(parts.map(|(data, slot)| Part {
                    id: *id,
                    slot,
                    data: sheet(data),
                    is_done: false,
                }));
            }
            Event::Complete(id) => {
                for part in self.pending.iter_mut().filter(|part| part.id == *id) {
                    part.is_done = true;
                }
            }
            Event::SyncBegin(id) => {
                let covered = self.pending.iter().filter(|part| part.is_done);
                let covered = covered.map(|part| (part.id, part.slot)).collect();
                self.barriers.insert(*id, covered);
            }
            Event::SyncEnd(id) => {
                let covered = self.barriers.remove(id).unwrap();
                if self.is_lying {
                    return;
                }
                let Self {
                    pending, durable, ..
                } = self;
                pending.retain(|part| {
                    let is_covered = covered.contains(&(part.id, part.slot));
                    if is_covered {
                        durable.insert(part.slot, Arc::clone(&part.data));
                    }
                    !is_covered
                });
            }
            Event::Note(deed) => match &self.run.deeds[*deed as usize] {
                Deed::Begin {
                    first,
                    count,
                    version,
                    value,
                } => {
                    for sector in &mut self.sectors[*first..first + count] {
                        sector.history.push((*version, *value));
                    }
                }
                Deed::Durable(all) => {
                    for (sector, version) in all {
                        let durable = &mut self.sectors[*sector].durable;
                        *durable = (*durable).max(*version);
                    }
                }
            },
        }
    }

    /// The power goes here: every image that there may be if they are few, some of them otherwise.
    fn crash(&mut self, random: &mut Random) -> Result<(), String> {
        let mut choices: BTreeMap<u64, Vec<Sheet>> = BTreeMap::new();
        for part in &self.pending {
            let old = || {
                self.durable
                    .get(&part.slot)
                    .cloned()
                    .unwrap_or_else(|| sheet(&[0; BLOCK]))
            };
            let values = choices.entry(part.slot).or_insert_with(|| vec![old()]);
            values.push(Arc::clone(&part.data));
        }
        let all: u64 = choices
            .values()
            .fold(1, |all, values| all.saturating_mul(values.len() as u64));
        if all <= 16 {
            for mut number in 0..all {
                let mut image = self.durable.clone();
                for (slot, values) in &choices {
                    let pick = number % values.len() as u64;
                    number /= values.len() as u64;
                    image.insert(*slot, Arc::clone(&values[pick as usize]));
                }
                self.judge(image, random)?;
            }
        }
        let samples = if all == 1 { 0 } else { 2 };
        for _ in 0..samples {
            let mut image = self.durable.clone();
            let torn = random.pick(&[4, 20]);
            for (slot, values) in &choices {
                let chosen = if random.one_in(torn) {
                    let sectors = (0..8).flat_map(|sector| {
                        let from = &values[random.index(values.len())];
                        from[sector * 512..(sector + 1) * 512].to_vec()
                    });
                    sheet(&sectors.collect::<Vec<u8>>())
                } else {
                    Arc::clone(&values[random.index(values.len())])
                };
                image.insert(*slot, chosen);
            }
            self.judge(image, random)?;
        }
        Ok(())
    }

    fn judge(&mut self, image: Image, random: &mut Random) -> Result<(), String> {
        self.images += 1;
        let memory = Arc::new(Memory::new(self.run.len, image));
        let recovered = recover(&*memory, &material()).map_err(|error| error.to_string())?;
        let mut damaged = recovered.missing_pages();
        let _ = recovered.each_leaf(&*memory, 0, &mut |visit| {
            damaged += usize::from(matches!(visit, Visit::Lost(..)));
            ControlFlow::Continue(())
        });
        if damaged > 0 {
            return Err(format!("{damaged} pages do not authenticate"));
        }
        let mut open = Opened::new(recovered, &memory);
        if random.one_in(2) {
            let attached = open.volume.attach(None);
            attached.map_err(|error| error.to_string())?;
        }
        let mut sectors = self.sectors.iter().enumerate();
        for (start, blocks) in STRETCHES {
            let bytes = open.read(start * BLOCK as u64, blocks * BLOCK);
            let bytes = bytes.map_err(|failure| failure.to_string())?;
            for (found, (index, sector)) in bytes.chunks_exact(512).zip(&mut sectors) {
                let value = u64::from_le_bytes(*found.first_chunk().unwrap());
                if found != stamp(value) {
                    return Err(format!("sector {index} is a mixture"));
                }
                let is_possible =
                    |(version, v): &(u64, u64)| *v == value && *version >= sector.durable;
                if !sector.history.iter().any(is_possible) {
                    return Err(format!(
                        "sector {index} reads {value}, durable is {}, of {:?}",
                        sector.durable,
                        sector.history.iter().rev().take(5).collect::<Vec<_>>()
                    ));
                }
            }
        }
        Ok(())
    }

    /// Goes through the run and has about `images` crashes.
    fn run(mut self, images: u64, seed: u64) -> Result<u64, String> {
        let mut random = Random::new(seed);
        let events = self.run.events.len() as u64;
        for (index, event) in self.run.events.iter().enumerate() {
            self.step(event);
            // Barriers and superblocks are where order matters.
            let is_special = match event {
                Event::SyncBegin(_) | Event::SyncEnd(_) => true,
                Event::Submit { offset, .. } => *offset < 2 << 20,
                _ => false,
            };
            let weight = if is_special { 4 } else { 1 };
            if random.below(events * 4) < images * weight {
                let what = name(event);
                let at = |error| format!("power lost at event {index} ({what}): {error}");
                self.crash(&mut random).map_err(at)?;
            }
        }
        Ok(self.images)
    }
}

fn name(event: &Event) -> String {
    match event {
        Event::Submit { offset, data, .. } => format!("a write of {} at {offset}", data.len()),
        other => format!("{other:?}"),
    }
}

#[test]
fn the_power_may_go_at_any_instant_of_a_real_run() {
    let seed = variable("OFFLOAD_SEED", u64::from(std::process::id()));
    println!("OFFLOAD_SEED={seed}");
    let ops = variable("OFFLOAD_REPLAY_OPS", 2500);
    let images = variable("OFFLOAD_REPLAY_IMAGES", 1500);
    let Some(run) = record(seed, ops) else { return };
    let count = |is: fn(&Event) -> bool| run.events.iter().filter(|event| is(event)).count();
    let barriers = count(|event| matches!(event, Event::SyncEnd(_)));
    let writes = count(|event| matches!(event, Event::Submit { .. }));
    let outcome = Replay::new(&run, false).run(images, seed);
    println!("{writes} writes, {barriers} barriers, {outcome:?} images");
    let judged = outcome.unwrap_or_else(|error| panic!("OFFLOAD_SEED={seed}: {error}"));
    assert!(
        barriers > 50 && judged > images / 4,
        "{barriers} barriers, {judged} images"
    );
    let lie = Replay::new(&run, true).run(images, seed);
    assert!(lie.is_err(), "barriers that do nothing are not noticed");
}
