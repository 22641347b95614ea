//! One seeded life of a volume: requests, completions, crashes, recoveries.

use std::cell::RefCell;
use std::collections::HashSet;
use std::rc::Rc;
use std::sync::{Arc, Mutex};

use crypto::keys::Secret32;
use crypto::slot::Argon2Params;
use crypto::source::KeyMaterial;

use super::disk::SimDisk;
use super::model::{Crash, Model};
pub(super) use super::plan::small_geometry;
use super::plan::{EIO, Fault, GROWN, Plan};
use crate::volume::backing::Backing;
use crate::volume::create::create;
use crate::volume::engine::{
    Done, Failure, GrowError, Io, IoKind, Lane, Op, Payload, PayloadFault, Rehoming, Reporter,
    Volume,
};
use crate::volume::geometry::BLOCK_LEN;
use crate::volume::recover::{recover, recover_within};
use crate::volume::ring::{self, RingMemory};

/// A small generator: what it gives depends on the seed alone (xorshift64*).
pub(super) struct Dice(u64);

impl Dice {
    pub(super) fn new(seed: u64) -> Self {
        let mut dice = Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
        for _ in 0..4 {
            dice.next();
        }
        dice
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 11
    }

    pub(super) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    pub(super) fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }
}

pub(super) fn material() -> KeyMaterial {
    KeyMaterial::File(Secret32::take(&mut [0x42; 32]))
}

/// A ring in memory that survives the process.
pub(super) struct SimRing(Mutex<Vec<u8>>);

impl SimRing {
    pub(super) fn new() -> Arc<Self> {
        Self::sized(8 << 10)
    }

    pub(super) fn sized(len: usize) -> Arc<Self> {
        Arc::new(Self(Mutex::new(vec![0; len])))
    }
}

impl RingMemory for SimRing {
    fn len(&self) -> usize {
        self.0.lock().expect("ring").len()
    }
    fn read(&self, at: usize, into: &mut [u8]) {
        let bytes = self.0.lock().expect("ring");
        for (index, byte) in into.iter_mut().enumerate() {
            *byte = bytes.get(at + index).copied().unwrap_or(0);
        }
    }
    fn write(&self, at: usize, from: &[u8]) {
        let mut bytes = self.0.lock().expect("ring");
        for (index, byte) in from.iter().enumerate() {
            if let Some(place) = bytes.get_mut(at + index) {
                *place = *byte;
            }
        }
    }
    fn store(&self, at: usize, word: u64) {
        self.write(at, &word.to_le_bytes());
    }
}

pub(super) struct Quiet;

impl Reporter for Quiet {
    fn not_authentic(&self, _: u64) {}
    fn backing_failed(&self, _: &'static str, _: i32) {}
    fn poisoned(&self, _: &'static str) {}
}

/// What a request was, and its memory.
#[derive(Clone)]
struct Request {
    memory: Rc<RefCell<Vec<u8>>>,
    kind: Kind,
}

#[derive(Clone)]
enum Kind {
    Write {
        first: usize,
        count: usize,
        version: u64,
        is_durable: bool,
    },
    Flush {
        covered: Vec<u64>,
        /// A barrier had failed before.
        is_late: bool,
    },
    Read {
        first: usize,
        floors: Vec<u64>,
    },
    /// The card moves blocks, which nobody must notice.
    Rehome,
}

impl Payload for Request {
    fn load(&mut self, at: usize, into: &mut [u8]) -> Result<(), PayloadFault> {
        let memory = self.memory.borrow();
        into.copy_from_slice(memory.get(at..at + into.len()).ok_or(PayloadFault)?);
        Ok(())
    }
    fn store(&mut self, at: usize, from: &[u8]) -> Result<(), PayloadFault> {
        let mut memory = self.memory.borrow_mut();
        let place = memory.get_mut(at..at + from.len()).ok_or(PayloadFault)?;
        place.copy_from_slice(from);
        Ok(())
    }
}

struct UnderWay {
    lane: usize,
    io: Io,
    parts: Vec<u64>,
}

fn stamp(value: u64) -> Vec<u8> {
    value.to_le_bytes().repeat(64)
}

fn read_stamp(bytes: &[u8]) -> Option<u64> {
    let value = u64::from_le_bytes(*bytes.first_chunk()?);
    (bytes == stamp(value)).then_some(value)
}

/// A process and its guest.
struct Card {
    volume: Volume,
    lanes: Vec<Lane<Request>>,
    under_way: Vec<UnderWay>,
}

/// See the module.
pub(super) struct World {
    pub(super) disk: Arc<SimDisk>,
    ring: Option<Arc<SimRing>>,
    pub(super) dice: Dice,
    pub(super) model: Model,
    plan: Plan,
    /// A barrier failed in this process.
    has_lost_barrier: bool,
    /// The size that the guest was told, in bytes.
    told_len: u64,
    /// This process is at growing the volume.
    is_growing: bool,
}

impl World {
    /// A life on a disk that only dies.
    pub(super) fn new(seed: u64) -> Self {
        let mut dice = Dice::new(seed);
        let plan = Plan::plain(&mut dice);
        Self::with(plan, dice)
    }

    /// The same with few blocks.
    pub(super) fn few(seed: u64) -> Self {
        let mut dice = Dice::new(seed);
        let plan = Plan::few(&mut dice);
        Self::with(plan, dice)
    }

    /// A life on a disk that does all that a disk may.
    pub(super) fn faulty(seed: u64) -> Self {
        let mut dice = Dice::new(seed);
        let plan = Plan::faulty(&mut dice);
        Self::with(plan, dice)
    }

    fn with(plan: Plan, dice: Dice) -> Self {
        let geometry = plan.geometry;
        let sectors = plan.stretches.iter().map(|(_, blocks)| blocks * 8).sum();
        let disk = Arc::new(SimDisk::new(geometry.backing_len()));
        create(
            &*disk,
            geometry,
            &material(),
            Argon2Params::fast_for_tests(),
        )
        .expect("creates");
        Self {
            disk,
            ring: None,
            dice,
            model: Model::new(sectors),
            plan,
            has_lost_barrier: false,
            told_len: geometry.volume_len(),
            is_growing: false,
        }
    }

    /// Opens the volume and attaches the ring that the guest keeps. `Err`: the process died in the
    /// middle.
    fn start(&mut self) -> Result<Option<Card>, String> {
        if self.dice.chance(15) {
            let fuse = self.dice.below(24) as u32;
            self.disk.set_fuse(Some(fuse));
        }
        let died = |world: &Self, what: String| {
            let has_died = world.disk.has_died();
            world.disk.set_fuse(None);
            if has_died { Ok(None) } else { Err(what) }
        };
        let recovered = match recover_within(&*self.disk, &material(), self.plan.cache) {
            Ok(recovered) => recovered,
            Err(error) => return died(self, error.to_string()),
        };
        if self.disk.has_died() {
            // It goes on past what it cannot read.
            return died(self, String::new());
        }
        if let Some((place, fault)) = recovered.missing.first() {
            return died(self, format!("{place} {fault}"));
        }
        if let Some(lost) = recovered.lost_leaves.first() {
            return died(self, format!("leaf {} {}", lost.leaf, lost.fault));
        }
        let backing: Arc<dyn Backing> = self.disk.clone();
        let volume = Volume::new(recovered, backing, Box::new(Quiet));
        let ring = self.ring.clone().unwrap_or_else(|| {
            let ring = SimRing::sized(self.plan.ring_len);
            ring::format_fresh(&*ring, &volume.id()).expect("large enough");
            ring
        });
        self.ring = Some(Arc::clone(&ring));
        if let Err(error) = volume.attach(Some(ring)) {
            return died(self, error.to_string());
        }
        self.disk.set_fuse(None);
        if self.dice.chance(70) {
            volume.shared().draft_always();
        }
        self.has_lost_barrier = false;
        self.is_growing = false;
        let len = volume.shared().volume_len();
        if len < self.told_len {
            return Err(format!("a volume of {} bytes has {len} now", self.told_len));
        }
        self.told_len = len;
        let lanes = (0..self.plan.lanes)
            .map(|_| Lane::new(Arc::clone(volume.shared()), Arc::new(|| {})))
            .collect();
        Ok(Some(Card {
            volume,
            lanes,
            under_way: Vec::new(),
        }))
    }

    fn submit(&mut self, card: &mut Card) {
        let lane = self.dice.below(card.lanes.len());
        let dice = self.dice.below(100);
        if dice < 12 {
            let kind = Kind::Flush {
                covered: self.model.begin_flush(),
                is_late: self.has_lost_barrier,
            };
            card.lanes[lane].submit(
                Op::Flush,
                Request {
                    memory: Rc::default(),
                    kind,
                },
            );
            return;
        }
        if dice >= 90 {
            return self.rehome(card);
        }
        let stretches = self.plan.stretches;
        let stretch = if self.dice.chance(60) {
            0
        } else {
            1 + self.dice.below(stretches.len() - 1)
        };
        let (start, blocks) = stretches[stretch];
        if !self.is_told(start, blocks) {
            return;
        }
        let base: usize = stretches[..stretch].iter().map(|(_, blocks)| blocks).sum();
        let (first, count) = if self.dice.chance(70) {
            let block = self.dice.below(blocks);
            (
                block * 8,
                (1 + self.dice.below((blocks - block).min(self.plan.longest))) * 8,
            )
        } else {
            let sector = self.dice.below(blocks * 8);
            (sector, 1 + self.dice.below((blocks * 8 - sector).min(20)))
        };
        let offset = start * BLOCK_LEN as u64 + first as u64 * 512;
        let (first, len) = (base * 8 + first, count as u64 * 512);
        if dice < 25 {
            let floors = (first..first + count)
                .map(|index| self.model.acked(index))
                .collect();
            let have = self.accessible(count);
            let memory = Rc::new(RefCell::new(vec![0xee; have * 512]));
            let kind = Kind::Read { first, floors };
            return card.lanes[lane].submit(Op::Read { offset, len }, Request { memory, kind });
        }
        if !self.model.is_free(first, count) {
            return;
        }
        let zeroes = dice < 33;
        let is_durable = zeroes || dice < 38;
        let version = self.model.begin(first, count, zeroes);
        let memory = if zeroes {
            Vec::new()
        } else {
            stamp(version).repeat(self.accessible(count))
        };
        let op = match (
            zeroes,
            first % 8 == 0 && count % 8 == 0 && self.dice.chance(50),
        ) {
            (true, true) => Op::Discard { offset, len },
            (true, false) => Op::WriteZeroes { offset, len },
            (false, _) => Op::Write {
                offset,
                len,
                durable: is_durable,
            },
        };
        let kind = Kind::Write {
            first,
            count,
            version,
            is_durable,
        };
        card.lanes[lane].submit(
            op,
            Request {
                memory: Rc::new(RefCell::new(memory)),
                kind,
            },
        );
    }

    /// Moves blocks of some part of the volume, by the lane that does so.
    fn rehome(&mut self, card: &mut Card) {
        let shared = card.volume.shared();
        match self.dice.below(8) {
            0 => _ = shared.choose_victims(),
            1 => _ = shared.choose_sparse(),
            2 => return card.lanes[0].give_back(self.dice.below(3) as u64),
            _ => {}
        }
        let mode = if self.dice.chance(70) {
            Rehoming::Gather
        } else {
            Rehoming::Evacuate
        };
        let op = Op::Rehome {
            offset: 0,
            len: self.plan.geometry.volume_len(),
            mode,
        };
        let kind = Kind::Rehome;
        let memory = Rc::default();
        card.lanes[0].submit(op, Request { memory, kind });
    }

    /// Whether the guest knows of these blocks.
    fn is_told(&self, start: u64, blocks: usize) -> bool {
        (start + blocks as u64) * BLOCK_LEN as u64 <= self.told_len
    }

    /// Begins to grow the volume, or looks whether it has grown. How the process ended, if it did.
    fn grow(&mut self, card: &Card) -> Result<Option<Crash>, String> {
        if self.is_growing {
            match card.volume.has_grown() {
                Ok(true) => {
                    self.is_growing = false;
                    self.told_len = card.volume.shared().volume_len();
                }
                Ok(false) => {}
                Err(_) if card.volume.shared().is_poisoned() => self.is_growing = false,
                Err(error) => return Err(error.to_string()),
            }
            return Ok(None);
        }
        if self.dice.below(250) != 0 {
            return Ok(None);
        }
        let len = GROWN[self.dice.below(GROWN.len())];
        let fuse = self.dice.below(6) as u32;
        self.disk.set_fuse(Some(fuse));
        let begun = card.volume.begin_grow(len);
        self.disk.set_fuse(None);
        match begun {
            Ok(()) => self.is_growing = true,
            Err(GrowError::Size(_)) if len < self.told_len => {}
            Err(GrowError::Failed) if self.plan.is_faulty => {}
            // The fuse: the process died before the barrier, or in it.
            Err(GrowError::Extend(_) | GrowError::Failed) => {
                if self.dice.chance(50) {
                    self.disk.kill(&mut self.dice);
                    return Ok(Some(Crash::Kill));
                }
                self.disk.cut_power(&mut self.dice);
                self.ring = None;
                return Ok(Some(Crash::Power));
            }
            Err(error) => return Err(error.to_string()),
        }
        Ok(None)
    }

    /// Sectors of a request's memory that are there.
    fn accessible(&mut self, count: usize) -> usize {
        if self.plan.is_faulty && self.dice.chance(3) {
            self.dice.below(count)
        } else {
            count
        }
    }

    /// Lets every lane do what it can.
    fn turn(&mut self, card: &mut Card) -> Result<(), String> {
        for lane in 0..card.lanes.len() {
            card.lanes[lane].on_wake();
            if self.dice.chance(15) {
                // What it admitted is sealed later than what others admit meanwhile.
                card.lanes[lane].advance();
            } else {
                card.lanes[lane].turn();
            }
            while let Some(io) = card.lanes[lane].next_io() {
                let parts = match &io.kind {
                    IoKind::Write {
                        offset,
                        skip,
                        buffer,
                    } => self.disk.submit(*offset, &buffer[*skip..]),
                    IoKind::Punch { offset, len } => {
                        self.disk.submit(*offset, &vec![0; *len as usize])
                    }
                    IoKind::Sync(_) => self.disk.begin_sync(),
                    IoKind::Read { .. } | IoKind::Allocate { .. } => Vec::new(),
                };
                card.under_way.push(UnderWay { lane, io, parts });
            }
            while let Some(done) = card.lanes[lane].next_done() {
                self.finish(done, card.volume.shared().is_poisoned())?;
            }
        }
        Ok(())
    }

    fn finish(
        &mut self,
        Done { payload, result }: Done<Request>,
        is_poisoned: bool,
    ) -> Result<(), String> {
        if matches!(payload.kind, Kind::Rehome) && result == Err(Failure::NoSpace) {
            return Ok(());
        }
        if let Err(failure) = result {
            let is_expected = self.plan.is_faulty
                && match failure {
                    Failure::Io(_) | Failure::NoSpace | Failure::Payload => true,
                    Failure::Poisoned => is_poisoned,
                    _ => false,
                };
            if !is_expected {
                return Err(format!("a request failed: {failure}"));
            }
            if let Kind::Write { first, count, .. } = payload.kind {
                self.model.fail(first, count);
            }
            return Ok(());
        }
        match payload.kind {
            Kind::Rehome => {}
            Kind::Flush { is_late: true, .. } => {
                return Err("a flush was acknowledged after a barrier had failed".into());
            }
            Kind::Flush { covered, .. } => self.model.ack_flush(&covered),
            Kind::Write {
                first,
                count,
                version,
                is_durable,
            } => {
                self.model.ack(first, count, version, is_durable);
            }
            Kind::Read { first, floors } => {
                for (index, sector) in payload.memory.borrow().chunks_exact(512).enumerate() {
                    let value =
                        read_stamp(sector).ok_or("a read returned a mixture in a sector")?;
                    if !self.model.may_read(first + index, floors[index], value) {
                        return Err(format!(
                            "a read of sector {} returned {value}",
                            first + index
                        ));
                    }
                }
            }
        }
        Ok(())
    }

    /// Completes a random operation of the backing.
    fn land(&mut self, card: &mut Card) {
        if card.under_way.is_empty() {
            return;
        }
        let index = self.dice.below(card.under_way.len());
        let UnderWay { lane, io, parts } = card.under_way.swap_remove(index);
        let mut kind = io.kind;
        let mut moved = 0;
        if self.plan.is_faulty && self.dice.chance(2) {
            let result = self.land_badly(&mut kind, &parts);
            return card.lanes[lane].on_io(io.id, result, kind.into_buffer());
        }
        match &mut kind {
            IoKind::Read {
                offset,
                skip,
                buffer,
            } => {
                let part = &mut buffer[*skip..];
                moved = part.len();
                self.disk.read_at(*offset, part).expect("no fuse is lit");
            }
            IoKind::Write { skip, buffer, .. } => {
                moved = buffer.len() - *skip;
                self.disk.complete(&parts);
            }
            IoKind::Punch { .. } => self.disk.complete(&parts),
            IoKind::Sync(_) => self.disk.end_sync(&parts),
            IoKind::Allocate { .. } => {}
        }
        card.lanes[lane].on_io(io.id, moved as i32, kind.into_buffer());
    }

    /// Completes an operation with an error, or a part of it.
    fn land_badly(&mut self, kind: &mut IoKind, parts: &[u64]) -> i32 {
        match Fault::of(kind, &mut self.dice) {
            Fault::Errno(errno) => {
                if matches!(kind, IoKind::Sync(_)) {
                    self.has_lost_barrier |= errno == EIO;
                } else {
                    self.disk.abandon(parts, &mut self.dice);
                }
                -errno
            }
            Fault::Short(len) => {
                let blocks = len / BLOCK_LEN;
                if let IoKind::Read {
                    offset,
                    skip,
                    buffer,
                } = kind
                {
                    let part = &mut buffer[*skip..*skip + len];
                    self.disk.read_at(*offset, part).expect("no fuse is lit");
                } else {
                    self.disk.complete(&parts[..blocks]);
                    self.disk.abandon(&parts[blocks..], &mut self.dice);
                }
                len as i32
            }
        }
    }

    fn drain(&mut self, card: &mut Card) -> Result<(), String> {
        for _ in 0..100_000 {
            self.turn(card)?;
            if card.under_way.is_empty() && card.lanes.iter().all(Lane::is_idle) {
                return Ok(());
            }
            self.land(card);
        }
        Err("requests hang".into())
    }

    /// Runs a card until something ends it.
    fn live(&mut self, mut card: Card) -> Result<Crash, String> {
        for _ in 0..self.dice.below(self.plan.steps) {
            match self.dice.below(10) {
                0..3 => self.submit(&mut card),
                3..9 => self.land(&mut card),
                _ => {}
            }
            if self.dice.chance(70) {
                self.turn(&mut card)?;
            }
            if let Some(crash) = self.grow(&card)? {
                return Ok(crash);
            }
            if self.dice.chance(1) {
                // The device is reset: the frontend lets its region go and asks for a new one.
                self.drain(&mut card)?;
                match card.volume.settle() {
                    Err(_) if card.volume.shared().is_poisoned() => continue,
                    settled => settled.map_err(|error| error.to_string())?,
                }
                let ring = SimRing::sized(self.plan.ring_len);
                ring::format_fresh(&*ring, &card.volume.id()).expect("large enough");
                self.ring = Some(Arc::clone(&ring));
                card.volume
                    .attach(Some(ring))
                    .map_err(|error| error.to_string())?;
            }
        }
        Ok(match self.dice.below(10) {
            0..5 => {
                self.disk.kill(&mut self.dice);
                Crash::Kill
            }
            5..9 => {
                self.disk.cut_power(&mut self.dice);
                self.ring = None;
                Crash::Power
            }
            _ => {
                self.drain(&mut card)?;
                if card.volume.shared().is_poisoned() {
                    if card.volume.close().is_ok() {
                        return Err("a poisoned volume was closed clean".into());
                    }
                    self.disk.kill(&mut self.dice);
                    return Ok(Crash::Kill);
                }
                card.volume.close().map_err(|error| error.to_string())?;
                if self.dice.chance(50) {
                    self.ring = None;
                }
                // Writes that failed may show or not.
                if self.plan.is_faulty {
                    Crash::Kill
                } else {
                    Crash::None
                }
            }
        })
    }

    /// Reads all sectors through a card.
    fn judge(&mut self, card: &mut Card, crash: Crash) -> Result<(), String> {
        let is_faulty = std::mem::take(&mut self.plan.is_faulty);
        let mut base = 0;
        for &(start, blocks) in self.plan.stretches {
            if !self.is_told(start, blocks) {
                // Nobody wrote there.
                base += blocks;
                continue;
            }
            let memory = Rc::new(RefCell::new(vec![0xee; blocks * BLOCK_LEN]));
            let op = Op::Read {
                offset: start * BLOCK_LEN as u64,
                len: (blocks * BLOCK_LEN) as u64,
            };
            let kind = Kind::Flush {
                covered: Vec::new(),
                is_late: false,
            };
            card.lanes[0].submit(
                op,
                Request {
                    memory: Rc::clone(&memory),
                    kind,
                },
            );
            self.drain(card)?;
            for (index, sector) in memory.borrow().chunks_exact(512).enumerate() {
                let value = read_stamp(sector).ok_or("a sector is a mixture")?;
                self.model.judge(base * 8 + index, value, crash)?;
            }
            base += blocks;
        }
        self.plan.is_faulty = is_faulty;
        Ok(())
    }

    /// A whole life. `Err`: what was violated.
    pub(super) fn run(&mut self) -> Result<(), String> {
        super::take_activations();
        let mut crash = Crash::None;
        for _ in 0..2 + self.dice.below(4) {
            let mut card = loop {
                match self.start()? {
                    Some(card) => break card,
                    // It died while starting; the guest may or may not live on.
                    None if self.dice.chance(50) || crash == Crash::Power => {
                        self.disk.cut_power(&mut self.dice);
                        self.ring = None;
                        crash = Crash::Power;
                    }
                    None => {
                        self.disk.kill(&mut self.dice);
                        crash = if crash == Crash::None {
                            Crash::None
                        } else {
                            Crash::Kill
                        };
                    }
                }
            };
            self.judge(&mut card, crash)?;
            self.audit()?;
            crash = self.live(card)?;
        }
        let keys = super::take_activations();
        let distinct: HashSet<&Vec<u8>> = keys.iter().collect();
        if distinct.len() != keys.len() {
            return Err("nonces repeat: a session was activated twice".into());
        }
        Ok(())
    }

    /// The space tree says what the map says, and no two blocks share a slot.
    fn audit(&self) -> Result<(), String> {
        let recovered = recover(&*self.disk, &material()).map_err(|error| error.to_string())?;
        if let Some(place) = recovered.lost_pages(&*self.disk).first() {
            return Err(format!("{place} does not authenticate"));
        }
        let blocks = recovered.blocks(&*self.disk);
        let mut mapped: Vec<_> = blocks.iter().map(|(_, entry)| entry.slot()).collect();
        let mut used: Vec<_> = recovered.used_slots().collect();
        mapped.sort_unstable();
        used.sort_unstable();
        if mapped != used {
            return Err(format!(
                "space tree and map differ: {} and {} slots",
                used.len(),
                mapped.len()
            ));
        }
        mapped.dedup();
        if mapped.len() != used.len() {
            return Err("two blocks share a slot".into());
        }
        let mut counted = recovered.count_sessions(&*self.disk);
        for row in &recovered.superblock.table {
            let is = counted.remove(&row.id).unwrap_or(0);
            let said = recovered.live.get(&row.id).copied().unwrap_or(0);
            if is != said {
                return Err(format!(
                    "session {} is named {is} times, not {said}",
                    row.id
                ));
            }
        }
        if !counted.is_empty() {
            return Err("a session that is named is not in the key table".into());
        }
        Ok(())
    }
}
