//! A volume in memory, opened by the engine of the card, for tests that need thousands of them.

#![allow(dead_code, clippy::unwrap_used)]

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::rc::Rc;
use std::sync::{Arc, Mutex};

use crypto::keys::Secret32;
use crypto::source::KeyMaterial;
use vhost_blk::volume::backing::Backing;
use vhost_blk::volume::engine::{
    Failure, IoKind, Lane, Op, Payload, PayloadFault, Reporter, Volume,
};
use vhost_blk::volume::geometry::BLOCK_LEN;
use vhost_blk::volume::recover::Recovered;
use vhost_blk::volume::ring::RingMemory;

/// The key that tests of the card's binary use, too.
pub fn material() -> KeyMaterial {
    KeyMaterial::File(Secret32::take(&mut [7; 32]))
}

pub type Sheet = Arc<[u8; BLOCK_LEN]>;
/// Contents by slot; what is not in it is zeros.
pub type Image = HashMap<u64, Sheet>;

pub fn sheet(bytes: &[u8]) -> Sheet {
    Arc::new(bytes.try_into().unwrap())
}

/// A backing that never fails.
pub struct Memory {
    len: u64,
    slots: Mutex<Image>,
}

impl Memory {
    pub fn new(len: u64, image: Image) -> Self {
        let slots = Mutex::new(image);
        Self { len, slots }
    }

    pub fn image(&self) -> Image {
        self.slots.lock().unwrap().clone()
    }

    pub fn slot(&self, slot: u64) -> [u8; BLOCK_LEN] {
        let slots = self.slots.lock().unwrap();
        slots.get(&slot).map_or([0; BLOCK_LEN], |sheet| **sheet)
    }
}

impl Backing for Memory {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(into.len() as u64);
        if end.is_none_or(|end| end > self.len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let slots = self.slots.lock().unwrap();
        for (part, slot) in into
            .chunks_exact_mut(BLOCK_LEN)
            .zip(offset / BLOCK_LEN as u64..)
        {
            match slots.get(&slot) {
                Some(sheet) => part.copy_from_slice(&sheet[..]),
                None => part.fill(0),
            }
        }
        Ok(())
    }

    fn extend(&self, _: u64) -> io::Result<u64> {
        Ok(self.len)
    }

    fn write_at(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        let end = offset.checked_add(from.len() as u64);
        assert!(
            end.is_some_and(|end| end <= self.len),
            "a write behind the end at {offset}"
        );
        let mut slots = self.slots.lock().unwrap();
        for (part, slot) in from
            .chunks_exact(BLOCK_LEN)
            .zip(offset / BLOCK_LEN as u64..)
        {
            slots.insert(slot, sheet(part));
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn allocate(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut slots = self.slots.lock().unwrap();
        for slot in offset / BLOCK_LEN as u64..(offset + len) / BLOCK_LEN as u64 {
            slots.remove(&slot);
        }
        Ok(())
    }

    fn len(&self) -> u64 {
        self.len
    }
}

/// An in-flight region.
pub struct Region(pub Mutex<Vec<u8>>);

impl Region {
    pub fn new(len: usize) -> Self {
        Self(Mutex::new(vec![0; len]))
    }
}

impl RingMemory for Region {
    fn len(&self) -> usize {
        self.0.lock().unwrap().len()
    }
    fn read(&self, at: usize, into: &mut [u8]) {
        let bytes = self.0.lock().unwrap();
        for (index, byte) in into.iter_mut().enumerate() {
            let at = at.checked_add(index);
            *byte = at.and_then(|at| bytes.get(at)).copied().unwrap_or(0);
        }
    }
    fn write(&self, at: usize, from: &[u8]) {
        let mut bytes = self.0.lock().unwrap();
        for (index, byte) in from.iter().enumerate() {
            if let Some(place) = at.checked_add(index).and_then(|at| bytes.get_mut(at)) {
                *place = *byte;
            }
        }
    }
    fn store(&self, at: usize, word: u64) {
        self.write(at, &word.to_le_bytes());
    }
}

pub struct Quiet;

impl Reporter for Quiet {
    fn not_authentic(&self, _: u64) {}
    fn backing_failed(&self, _: &'static str, _: i32) {}
    fn poisoned(&self, _: &'static str) {}
}

/// A request's memory.
#[derive(Clone)]
pub struct Bytes(pub Rc<RefCell<Vec<u8>>>);

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

/// An open volume with one lane.
pub struct Opened {
    pub volume: Volume,
    pub memory: Arc<Memory>,
    lane: Lane<Bytes>,
}

impl Opened {
    pub fn new(recovered: Recovered, memory: &Arc<Memory>) -> Self {
        let backing: Arc<dyn Backing> = memory.clone();
        let volume = Volume::new(recovered, backing, Box::new(Quiet));
        let lane = Lane::new(Arc::clone(volume.shared()), Arc::new(|| {}));
        let memory = Arc::clone(memory);
        Self {
            volume,
            memory,
            lane,
        }
    }

    /// Does what the lane wants until it wants nothing.
    fn drive(&mut self) {
        for _ in 0..100_000 {
            self.lane.turn();
            let Some(io) = self.lane.next_io() else {
                return;
            };
            let mut kind = io.kind;
            let moved = match &mut kind {
                IoKind::Read {
                    offset,
                    skip,
                    buffer,
                } => {
                    let part = &mut buffer[*skip..];
                    self.memory.read_at(*offset, part).map(|()| part.len())
                }
                IoKind::Write {
                    offset,
                    skip,
                    buffer,
                } => {
                    let part = &buffer[*skip..];
                    self.memory.write_at(*offset, part).map(|()| part.len())
                }
                IoKind::Punch { offset, len } => self.memory.punch(*offset, *len).map(|()| 0),
                IoKind::Sync(_) | IoKind::Allocate { .. } => Ok(0),
            };
            let result = moved.map_or(-5, |moved| moved as i32);
            self.lane.on_io(io.id, result, kind.into_buffer());
        }
        panic!("a lane wants I/O without end");
    }

    /// One request to its end: its memory.
    pub fn request(&mut self, op: Op, bytes: Vec<u8>) -> Result<Vec<u8>, Failure> {
        let memory = Rc::new(RefCell::new(bytes));
        self.lane.submit(op, Bytes(Rc::clone(&memory)));
        for _ in 0..1000 {
            self.lane.on_wake();
            self.drive();
            if let Some(done) = self.lane.next_done() {
                done.result?;
                return Ok(memory.borrow().clone());
            }
        }
        panic!("a request hangs");
    }

    pub fn read(&mut self, offset: u64, len: usize) -> Result<Vec<u8>, Failure> {
        let len_64 = len as u64;
        self.request(
            Op::Read {
                offset,
                len: len_64,
            },
            vec![0xee; len],
        )
    }

    pub fn write(&mut self, offset: u64, bytes: Vec<u8>) -> Result<(), Failure> {
        let len = bytes.len() as u64;
        let durable = false;
        self.request(
            Op::Write {
                offset,
                len,
                durable,
            },
            bytes,
        )
        .map(|_| ())
    }

    pub fn flush(&mut self) -> Result<(), Failure> {
        self.request(Op::Flush, Vec::new()).map(|_| ())
    }
}
