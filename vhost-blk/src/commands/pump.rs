//! A lane of a volume with an io_uring of its own, for commands that move data without a guest.
//! The same engine and the same operations as in the card.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use io_uring::{IoUring, squeue};

use crate::device::driver::{Driver, Started};
use crate::volume::backing::FileBacking;
use crate::volume::engine::{Done, Lane, Op, Payload, PayloadFault, Volume};

const SQ_ENTRIES: u32 = 128;
/// Bytes of a request: what the engine moves as one piece.
pub(super) const CHUNK: usize = 256 << 10;
/// Requests under way.
pub(super) const DEPTH: usize = 32;

/// Bytes of a request, and where in the volume they belong.
#[derive(Debug)]
pub(super) struct Bytes {
    pub(super) offset: u64,
    pub(super) data: Vec<u8>,
}

impl Payload for Bytes {
    fn load(&mut self, at: usize, into: &mut [u8]) -> Result<(), PayloadFault> {
        let part = self.data.get(at..).and_then(|rest| rest.get(..into.len()));
        into.copy_from_slice(part.ok_or(PayloadFault)?);
        Ok(())
    }

    fn store(&mut self, at: usize, from: &[u8]) -> Result<(), PayloadFault> {
        let rest = self.data.get_mut(at..).ok_or(PayloadFault)?;
        let part = rest.get_mut(..from.len()).ok_or(PayloadFault)?;
        part.copy_from_slice(from);
        Ok(())
    }
}

/// See the module.
pub(super) struct Pump {
    lane: Lane<Bytes>,
    driver: Driver,
    uring: IoUring,
    /// Entries that did not fit the submission queue.
    backlog: VecDeque<squeue::Entry>,
    has_news: Arc<AtomicBool>,
}

impl Pump {
    pub(super) fn new(volume: &Volume, backing: Arc<FileBacking>) -> io::Result<Self> {
        let has_news = Arc::new(AtomicBool::new(false));
        let bell = Arc::clone(&has_news);
        let wake = Arc::new(move || bell.store(true, Ordering::Release));
        Ok(Self {
            lane: Lane::new(Arc::clone(volume.shared()), wake),
            driver: Driver::new(backing),
            uring: IoUring::new(SQ_ENTRIES)?,
            backlog: VecDeque::new(),
            has_news,
        })
    }

    pub(super) fn submit(&mut self, op: Op, bytes: Bytes) {
        self.lane.submit(op, bytes);
    }

    /// Gives whole free chunks back: see [`Lane::give_back`].
    pub(super) fn give_back(&mut self, keep: u64) {
        self.lane.give_back(keep);
    }

    /// Requests under way.
    pub(super) fn count(&self) -> usize {
        self.lane.tasks()
    }

    /// Waits for the next finished request. `None`: nothing is under way any more, background
    /// work included.
    pub(super) fn next(&mut self) -> io::Result<Option<Done<Bytes>>> {
        loop {
            if self.has_news.swap(false, Ordering::AcqRel) {
                self.lane.on_wake();
            }
            self.lane.turn();
            let mut has_moved = false;
            while let Some(op) = self.lane.next_io() {
                match self.driver.start(op, self.lane.has_io()) {
                    Started::Entry(entry, user_data) => {
                        self.backlog.push_back(entry.user_data(user_data));
                    }
                    Started::Done(id, result, buffer) => {
                        has_moved = true;
                        self.lane.on_io(id, result, buffer);
                    }
                }
            }
            self.push_backlog();
            if let Some(done) = self.lane.next_done() {
                return Ok(Some(done));
            }
            if has_moved {
                continue;
            }
            if self.driver.count() == 0 {
                if self.lane.is_idle() {
                    return Ok(None);
                }
                // Another lane has to move first; it will set the flag.
                std::thread::sleep(Duration::from_millis(1));
                continue;
            }
            self.wait()?;
        }
    }

    fn push_backlog(&mut self) {
        while let Some(entry) = self.backlog.pop_front() {
            // SAFETY: buffer and descriptor belong to the driver until `finish`; `drop` waits for
            // every operation that was submitted.
            if unsafe { self.uring.submission().push(&entry) }.is_err() {
                self.backlog.push_front(entry);
                return;
            }
        }
    }

    fn wait(&mut self) -> io::Result<()> {
        match self.uring.submit_and_wait(1) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
            _ => {}
        }
        for cqe in self.uring.completion() {
            if let Some((id, result, buffer)) = self.driver.finish(cqe.user_data(), cqe.result()) {
                self.lane.on_io(id, result, buffer);
            }
        }
        Ok(())
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        // The kernel may still write to the driver's buffers.
        while self.driver.count() > self.backlog.len() {
            if self.wait().is_err() {
                // Better leaked than freed under the kernel's hands.
                let nothing = self.driver.successor();
                std::mem::forget(std::mem::replace(&mut self.driver, nothing));
                return;
            }
        }
    }
}
