//! The parts of a test of one case: a volume on a simulated disk whose operations land when the test
//! says so, and a backing that fails when it is told to.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::sync::{Arc, Mutex};

use crypto::slot::Argon2Params;

use super::disk::SimDisk;
use super::world::{Quiet, SimRing, material};
use crate::volume::backing::Backing;
use crate::volume::create::create;
use crate::volume::engine::{Done, Failure, Io, IoKind, Lane, Op, Payload, PayloadFault, Volume};
use crate::volume::geometry::{BLOCK_LEN, Geometry};
use crate::volume::recover::recover;
use crate::volume::ring::{self, RingMemory};

const EIO: i32 = 5;

#[derive(Clone)]
pub(super) struct Bytes(pub(super) Rc<RefCell<Vec<u8>>>);

impl Payload for Bytes {
    fn load(&mut self, at: usize, into: &mut [u8]) -> Result<(), PayloadFault> {
        let bytes = self.0.borrow();
        into.copy_from_slice(bytes.get(at..at + into.len()).ok_or(PayloadFault)?);
        Ok(())
    }
    fn store(&mut self, at: usize, from: &[u8]) -> Result<(), PayloadFault> {
        let mut bytes = self.0.borrow_mut();
        let place = bytes.get_mut(at..at + from.len()).ok_or(PayloadFault)?;
        place.copy_from_slice(from);
        Ok(())
    }
}

/// A volume whose operations land when the test says so.
pub(super) struct Rig {
    pub(super) disk: Arc<SimDisk>,
    pub(super) volume: Volume,
    pub(super) lanes: Vec<Lane<Bytes>>,
    pub(super) held: Vec<(usize, Io)>,
    pub(super) done: Vec<Result<(), Failure>>,
}

pub(super) fn volume_on(geometry: Geometry) -> Arc<SimDisk> {
    let disk = Arc::new(SimDisk::new(geometry.backing_len()));
    create(
        &*disk,
        geometry,
        &material(),
        Argon2Params::fast_for_tests(),
    )
    .expect("creates");
    disk
}

pub(super) fn fresh_ring(disk: &SimDisk, len: usize) -> Arc<SimRing> {
    let id = recover(disk, &material()).expect("opens").superblock.id;
    let ring = SimRing::sized(len);
    ring::format_fresh(&*ring, &id).expect("large enough");
    ring
}

pub(super) fn open(disk: &Arc<SimDisk>) -> Volume {
    let recovered = recover(&**disk, &material()).expect("opens");
    let backing: Arc<dyn Backing> = disk.clone();
    Volume::new(recovered, backing, Box::new(Quiet))
}

impl Rig {
    pub(super) fn serve(disk: &Arc<SimDisk>, ring: Option<Arc<SimRing>>, lanes: usize) -> Self {
        let volume = open(disk);
        volume
            .attach(ring.map(|ring| ring as Arc<dyn RingMemory>))
            .expect("attaches");
        let lanes = (0..lanes)
            .map(|_| Lane::new(Arc::clone(volume.shared()), Arc::new(|| {})))
            .collect();
        Self {
            disk: Arc::clone(disk),
            volume,
            lanes,
            held: Vec::new(),
            done: Vec::new(),
        }
    }

    pub(super) fn submit(&mut self, lane: usize, op: Op) {
        let len = match op {
            Op::Read { len, .. } | Op::Write { len, .. } => len as usize,
            _ => 0,
        };
        let byte = (self.done.len() % 251) as u8;
        self.lanes[lane].submit(op, Bytes(Rc::new(RefCell::new(vec![byte; len]))));
    }

    pub(super) fn turn(&mut self) {
        for (index, lane) in self.lanes.iter_mut().enumerate() {
            lane.on_wake();
            lane.turn();
            while let Some(io) = lane.next_io() {
                self.held.push((index, io));
            }
            while let Some(Done { result, .. }) = lane.next_done() {
                self.done.push(result);
            }
        }
    }

    /// Lets one operation end: done, or as `error`.
    pub(super) fn land(&mut self, index: usize, error: Option<i32>) {
        let (lane, mut io) = self.held.remove(index);
        let moved = match (&mut io.kind, error) {
            (_, Some(errno)) => -errno,
            (
                IoKind::Read {
                    offset,
                    skip,
                    buffer,
                },
                None,
            ) => {
                let part = &mut buffer[*skip..];
                self.disk.read_at(*offset, part).expect("reads");
                part.len() as i32
            }
            (
                IoKind::Write {
                    offset,
                    skip,
                    buffer,
                },
                None,
            ) => {
                let part = &buffer[*skip..];
                self.disk.write_at(*offset, part).expect("writes");
                part.len() as i32
            }
            (IoKind::Sync(_), None) => {
                self.disk.sync().expect("syncs");
                0
            }
            (IoKind::Punch { offset, len }, None) => {
                self.disk.punch(*offset, *len).expect("punches");
                0
            }
            (IoKind::Allocate { .. }, None) => 0,
        };
        self.lanes[lane].on_io(io.id, moved, io.kind.into_buffer());
    }

    /// Does a turn of one lane, and one of its operations that `may` says can end. Whether there was one.
    pub(super) fn step(&mut self, lane: usize, may: impl Fn(&Self, &IoKind) -> bool) -> bool {
        self.lanes[lane].on_wake();
        self.lanes[lane].turn();
        while let Some(io) = self.lanes[lane].next_io() {
            self.held.push((lane, io));
        }
        while let Some(Done { result, .. }) = self.lanes[lane].next_done() {
            self.done.push(result);
        }
        let is_next = |(of, io): &(usize, Io)| *of == lane && may(self, &io.kind);
        let next = self.held.iter().position(is_next);
        if let Some(index) = next {
            self.land(index, None);
        }
        next.is_some()
    }

    /// Goes on until nothing moves that `holds` does not hold back.
    pub(super) fn run(&mut self, holds: impl Fn(&IoKind) -> bool) {
        for _ in 0..100_000 {
            self.turn();
            let next = self.held.iter().position(|(_, io)| !holds(&io.kind));
            match next {
                Some(index) => self.land(index, None),
                None => return,
            }
        }
        panic!("it never comes to rest");
    }

    pub(super) fn is_idle(&self) -> bool {
        self.held.is_empty() && self.lanes.iter().all(Lane::is_idle)
    }

    pub(super) fn write(&mut self, lane: usize, first: u64, count: u64) {
        self.submit(
            lane,
            Op::Write {
                offset: first * BLOCK_LEN as u64,
                len: count * BLOCK_LEN as u64,
                durable: false,
            },
        );
    }

    pub(super) fn log(&self) -> std::ops::Range<u64> {
        let geometry = recover(&*self.disk, &material())
            .expect("opens")
            .superblock
            .geometry;
        let first = geometry.log_slot(0).offset();
        first..first + geometry.log_blocks() * BLOCK_LEN as u64
    }
}

/// A backing that fails when told to.
pub(super) struct Faulty {
    disk: Arc<SimDisk>,
    /// Writes that still succeed.
    pub(super) writes_left: Mutex<Option<u32>>,
    pub(super) fails_sync: Mutex<bool>,
    /// Places that cannot be read.
    pub(super) unreadable: Mutex<Vec<u64>>,
}

impl Faulty {
    pub(super) fn over(disk: &Arc<SimDisk>) -> Arc<Self> {
        Arc::new(Self {
            disk: Arc::clone(disk),
            writes_left: Mutex::new(None),
            fails_sync: Mutex::new(false),
            unreadable: Mutex::default(),
        })
    }
}

impl Backing for Faulty {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let read = offset..offset + into.len() as u64;
        let unreadable = self.unreadable.lock().expect("no panic under it");
        if unreadable.iter().any(|at| read.contains(at)) {
            return Err(io::Error::from_raw_os_error(EIO));
        }
        self.disk.read_at(offset, into)
    }
    fn write_at(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        match &mut *self.writes_left.lock().expect("no panic under it") {
            Some(0) => return Err(io::Error::from_raw_os_error(EIO)),
            Some(left) => *left -= 1,
            None => {}
        }
        self.disk.write_at(offset, from)
    }
    fn sync(&self) -> io::Result<()> {
        if *self.fails_sync.lock().expect("no panic under it") {
            return Err(io::Error::from_raw_os_error(EIO));
        }
        self.disk.sync()
    }
    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        self.disk.allocate(offset, len)
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.disk.punch(offset, len)
    }
    fn extend(&self, len: u64) -> io::Result<u64> {
        self.disk.extend(len)
    }
    fn len(&self) -> u64 {
        self.disk.len()
    }
}
