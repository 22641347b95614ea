//! The region that outlives a killed card: which descriptor chains were popped and not returned.
//!
//! The available ring does not tell: a card completes requests in any order, and by the time it
//! dies the guest may have overwritten the slots of those still running. So the card writes them
//! down in a memfd that the *frontend* keeps (VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD): after a
//! crash the frontend hands it to the next process with SET_INFLIGHT_FD, which resubmits them.
//!
//! # Layout
//! Exactly the vhost-user specification's "Inflight I/O tracking" for split virtqueues, then
//! space that belongs to the device:
//!
//! ```text
//!  0                        one queue, padded to 64 bytes
//!  ├─ queue 0 ──────────┐   ┌──────────────┬─────────────┬──────────────┬─────────────────┬──────────────┐
//!  ├─ queue 1 ──────────┤   │ features u64 │ version u16 │ desc_num u16 │ last_batch_head │ used_idx u16 │
//!  ├─ ...               │   ├──────────────┴─────────────┴──────────────┴─────────────────┴──────────────┤
//!  ├─ (page boundary)   │   │ desc_num times: inflight u8 | padding 5 | next u16 | counter u64            │
//!  └─ device extra      │   └─────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! # Why each step comes where it does
//! Per chain and batch, with the kill that each step survives:
//!
//! 1. pop: `counter`, then `inflight = 1`. Killed before the 1: the chain was never started and is
//!    popped again, since the next index to pop is computed (used index + chains in flight).
//! 2. return: `next = last_batch_head; last_batch_head = head` for each chain of the batch. Killed
//!    here: the used index has not moved, all of them are resubmitted; the guest has seen nothing.
//! 3. the used ring's `idx` moves. From here on the guest owns the chains.
//! 4. `inflight = 0` for each chain of the batch, then `used_idx = idx`. Killed here: `idx -
//!    used_idx` is the batch's size and the list from `last_batch_head` names it, so recovery
//!    finishes step 4 before it looks at the flags.
//!
//! A killed process has made its stores in program order and all of them up to the kill (they
//! drain from the store buffer when the CPU takes the interrupt), so it is the compiler that must
//! not reorder: the stores are `Release`.
//!
//! # Trust
//! The region comes back from the frontend. Indices in it are bounded before use and lists are
//! walked for at most the queue's size; a region that contradicts the ring is not used (see
//! [`crate::virtqueue::Virtqueue::new`]).

use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{FileOffset, MmapRegion};

use crate::memory::{Window, dont_dump};

#[cfg(test)]
mod tests;

/// The version of the vhost-user part that we write and read.
const VERSION: u16 = 1;
/// Bytes before the descriptor states.
const HEADER_LEN: usize = 16;
/// Bytes of one descriptor state.
const STATE_LEN: usize = 16;
/// Queues are padded to this, as QEMU's libvhost-user does it.
const QUEUE_ALIGN: usize = 64;
/// The device's part starts on a multiple of this.
const PAGE: usize = 4096;

mod header {
    pub(super) const VERSION: usize = 8;
    pub(super) const DESC_NUM: usize = 10;
    pub(super) const LAST_BATCH_HEAD: usize = 12;
    pub(super) const USED_IDX: usize = 14;
}

mod state {
    pub(super) const INFLIGHT: usize = 0;
    pub(super) const NEXT: usize = 6;
    pub(super) const COUNTER: usize = 8;
}

/// Why an in-flight region cannot be made or used.
#[derive(Debug, thiserror::Error)]
pub enum InflightError {
    /// No queues or no descriptors, or sizes that overflow.
    #[error(
        "an in-flight region for {num_queues} queues of {queue_size} descriptors makes no sense"
    )]
    Dimensions {
        /// Queues asked for.
        num_queues: u16,
        /// Descriptors a queue.
        queue_size: u16,
    },
    /// The region or its file is smaller than its contents.
    #[error("the in-flight region has {len} bytes where {needed} are needed")]
    TooSmall {
        /// Bytes that are there.
        len: u64,
        /// Bytes that the layout takes.
        needed: u64,
    },
    /// Written by something newer, or not an in-flight region.
    #[error("queue {queue} of the in-flight region has version {found}, not {VERSION}")]
    Version {
        /// Which queue.
        queue: u16,
        /// What it says.
        found: u16,
    },
    /// The region was made for another queue size.
    #[error("queue {queue} of the in-flight region is for {found} descriptors, not {expected}")]
    DescNum {
        /// Which queue.
        queue: u16,
        /// What it says.
        found: u16,
        /// What the frontend says.
        expected: u16,
    },
    /// The kernel refused to make or look at the file.
    #[error("cannot make or inspect the in-flight region's memfd")]
    File(#[source] std::io::Error),
    /// The kernel refused to map it.
    #[error("cannot map the in-flight region")]
    Map(#[source] MmapRegionError),
}

/// Bytes shared with whoever else has the memfd. The contents change only through this process
/// while it runs, but they are a stranger's when it starts: another process wrote them.
#[derive(Clone, Debug)]
pub struct SharedRegion {
    window: Window,
}

/// An access outside of a [`SharedRegion`], or one that is not aligned.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "{len} bytes at {offset} are not in the shared region of {region_len} bytes, or not aligned"
)]
pub struct OutOfRegion {
    /// Offset asked for.
    pub offset: usize,
    /// Bytes asked for.
    pub len: usize,
    /// Bytes there are.
    pub region_len: usize,
}

impl SharedRegion {
    /// A region of its own, zeroed: for tests, and for devices whose frontend keeps none.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn anonymous(len: usize) -> Result<Self, InflightError> {
        let mapped = len.max(1).next_multiple_of(PAGE);
        let mapping = map(new_memfd(mapped)?, 0, mapped)?;
        let window = Window::new(mapping, 0, len).ok_or(InflightError::TooSmall {
            len: mapped as u64,
            needed: len as u64,
        })?;
        Ok(Self { window })
    }

    /// Size in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.window.len()
    }

    /// Whether there is nothing in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn out(&self, offset: usize, len: usize) -> OutOfRegion {
        OutOfRegion {
            offset,
            len,
            region_len: self.len(),
        }
    }

    /// Copies bytes out. Not atomic as a whole.
    ///
    /// # Errors
    /// The range is not in the region.
    pub fn read(&self, offset: usize, buf: &mut [u8]) -> Result<(), OutOfRegion> {
        let len = buf.len();
        let slice = self.window.slice(offset, len);
        slice.ok_or_else(|| self.out(offset, len))?.copy_to(buf);
        Ok(())
    }

    /// Copies bytes in. Not atomic as a whole: publish with [`Self::store_u64`].
    ///
    /// # Errors
    /// The range is not in the region; nothing is written.
    pub fn write(&self, offset: usize, buf: &[u8]) -> Result<(), OutOfRegion> {
        let slice = self.window.slice(offset, buf.len());
        slice
            .ok_or_else(|| self.out(offset, buf.len()))?
            .copy_from(buf);
        Ok(())
    }

    fn u64_at(&self, offset: usize) -> Result<&AtomicU64, OutOfRegion> {
        let fits = offset.checked_add(8).is_some_and(|end| end <= self.len());
        if !fits || !offset.is_multiple_of(8) {
            return Err(self.out(offset, 8));
        }
        Ok(self.window.atomic(offset))
    }

    /// Reads a native-endian integer, with Acquire ordering.
    ///
    /// # Errors
    /// It is not in the region, or `offset` is not a multiple of 8.
    pub fn load_u64(&self, offset: usize) -> Result<u64, OutOfRegion> {
        Ok(self.u64_at(offset)?.load(Ordering::Acquire))
    }

    /// Writes a native-endian integer, with Release ordering: what was written before is there
    /// when the integer is.
    ///
    /// # Errors
    /// It is not in the region, or `offset` is not a multiple of 8; nothing is written.
    pub fn store_u64(&self, offset: usize, value: u64) -> Result<(), OutOfRegion> {
        self.u64_at(offset)?.store(value, Ordering::Release);
        Ok(())
    }

    /// A part of the region, which keeps the mapping alive by itself. Its start must be a
    /// multiple of 8, so that alignment means the same in both.
    ///
    /// # Errors
    /// The range is not in the region, or starts unaligned.
    pub fn sub(&self, range: Range<usize>) -> Result<Self, OutOfRegion> {
        let len = range.end.saturating_sub(range.start);
        if range.start > range.end || !range.start.is_multiple_of(8) {
            return Err(self.out(range.start, len));
        }
        let window = self.window.sub(range.start, len);
        Ok(Self {
            window: window.ok_or_else(|| self.out(range.start, len))?,
        })
    }
}

/// The whole region: all queues' states and the device's part.
#[derive(Debug)]
pub struct InflightRegion {
    mapping: Arc<MmapRegion>,
    file: Arc<File>,
    mmap_offset: u64,
    dimensions: Dimensions,
    extra: Arc<SharedRegion>,
}

#[derive(Clone, Copy, Debug)]
struct Dimensions {
    num_queues: u16,
    queue_size: u16,
    queue_len: usize,
    extra_at: usize,
    extra_len: usize,
    total: usize,
}

impl Dimensions {
    fn new(num_queues: u16, queue_size: u16, extra_len: usize) -> Result<Self, InflightError> {
        let absurd = InflightError::Dimensions {
            num_queues,
            queue_size,
        };
        if num_queues == 0 || queue_size == 0 {
            return Err(absurd);
        }
        let queue_len =
            (HEADER_LEN + usize::from(queue_size) * STATE_LEN).next_multiple_of(QUEUE_ALIGN);
        let extra_at = (queue_len * usize::from(num_queues)).next_multiple_of(PAGE);
        let total = extra_len
            .checked_add(extra_at)
            .and_then(|end| end.checked_next_multiple_of(PAGE))
            .ok_or(absurd)?;
        Ok(Self {
            num_queues,
            queue_size,
            queue_len,
            extra_at,
            extra_len,
            total,
        })
    }
}

fn new_memfd(len: usize) -> Result<OwnedFd, InflightError> {
    let make = || {
        let fd = rustix::fs::memfd_create(
            "offload-inflight",
            MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
        )?;
        rustix::fs::ftruncate(&fd, len as u64)?;
        // Nobody, not even the frontend, can then make an access to it fail.
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok::<_, rustix::io::Errno>(fd)
    };
    make().map_err(|errno| InflightError::File(errno.into()))
}

fn map(fd: OwnedFd, offset: u64, len: usize) -> Result<Arc<MmapRegion>, InflightError> {
    let file = FileOffset::new(File::from(fd), offset);
    let mapping = MmapRegion::from_file(file, len).map_err(InflightError::Map)?;
    dont_dump(&mapping);
    Ok(Arc::new(mapping))
}

impl InflightRegion {
    /// Makes a region (GET_INFLIGHT_FD): nothing in flight, `extra_len` zero bytes for the
    /// device. The memfd is sealed against shrinking and growing.
    ///
    /// # Errors
    /// The dimensions make no sense or the kernel refused.
    pub fn create(
        num_queues: u16,
        queue_size: u16,
        extra_len: usize,
    ) -> Result<Self, InflightError> {
        let total = Dimensions::new(num_queues, queue_size, extra_len)?.total;
        let fd = new_memfd(total)?;
        Self::from_fd(fd, total as u64, 0, num_queues, queue_size, extra_len)
    }

    /// Maps a region that the frontend kept (SET_INFLIGHT_FD).
    ///
    /// # Errors
    /// It is too small, of another version or for another queue size, or cannot be mapped.
    pub fn from_fd(
        fd: OwnedFd,
        mmap_size: u64,
        mmap_offset: u64,
        num_queues: u16,
        queue_size: u16,
        extra_len: usize,
    ) -> Result<Self, InflightError> {
        let dimensions = Dimensions::new(num_queues, queue_size, extra_len)?;
        let needed = dimensions.total as u64;
        if mmap_size < needed {
            return Err(InflightError::TooSmall {
                len: mmap_size,
                needed,
            });
        }
        let stat = rustix::fs::fstat(&fd).map_err(|e| InflightError::File(e.into()))?;
        let len = u64::try_from(stat.st_size).unwrap_or(0);
        let end = mmap_offset.saturating_add(needed);
        if len < end {
            return Err(InflightError::TooSmall { len, needed: end });
        }
        let mapping = map(fd, mmap_offset, dimensions.total)?;
        let too_small = || InflightError::TooSmall { len, needed };
        let file = mapping.file_offset().ok_or_else(too_small)?.arc().clone();
        let window = Window::new(
            Arc::clone(&mapping),
            dimensions.extra_at,
            dimensions.extra_len,
        );
        let extra = Arc::new(SharedRegion {
            window: window.ok_or_else(too_small)?,
        });
        let region = Self {
            mapping,
            file,
            mmap_offset,
            dimensions,
            extra,
        };
        for queue in 0..num_queues {
            region.check(queue)?;
        }
        Ok(region)
    }

    /// A version of 0 is a region that nobody has written to yet.
    fn check(&self, queue: u16) -> Result<(), InflightError> {
        let window = self.window(queue).ok_or(InflightError::TooSmall {
            len: self.mapping.size() as u64,
            needed: self.dimensions.total as u64,
        })?;
        let version = window.atomic::<AtomicU16>(header::VERSION);
        let desc_num = window.atomic::<AtomicU16>(header::DESC_NUM);
        match version.load(Ordering::Acquire) {
            0 => {
                desc_num.store(self.dimensions.queue_size, Ordering::Relaxed);
                version.store(VERSION, Ordering::Release);
                Ok(())
            }
            VERSION => {
                let found = desc_num.load(Ordering::Relaxed);
                if found == self.dimensions.queue_size {
                    return Ok(());
                }
                Err(InflightError::DescNum {
                    queue,
                    found,
                    expected: self.dimensions.queue_size,
                })
            }
            found => Err(InflightError::Version { queue, found }),
        }
    }

    fn window(&self, queue: u16) -> Option<Window> {
        if queue >= self.dimensions.num_queues {
            return None;
        }
        Window::new(
            Arc::clone(&self.mapping),
            usize::from(queue) * self.dimensions.queue_len,
            self.dimensions.queue_len,
        )
    }

    /// The file to hand to the frontend.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Bytes that the frontend has to map.
    #[must_use]
    pub fn mmap_size(&self) -> u64 {
        self.dimensions.total as u64
    }

    /// Where in the file the region starts.
    #[must_use]
    pub fn mmap_offset(&self) -> u64 {
        self.mmap_offset
    }

    /// Queues it tracks.
    #[must_use]
    pub fn num_queues(&self) -> u16 {
        self.dimensions.num_queues
    }

    /// Descriptors a queue.
    #[must_use]
    pub fn queue_size(&self) -> u16 {
        self.dimensions.queue_size
    }

    /// One queue's states, or `None` if the region has no such queue. Only one at a time may be
    /// in use: it has its own counter.
    #[must_use]
    pub fn queue(&self, queue: u16) -> Option<QueueInflight> {
        Some(QueueInflight {
            window: self.window(queue)?,
            desc_num: self.dimensions.queue_size,
            counter: 0,
        })
    }

    /// The device's part, `extra_len` bytes at a page boundary.
    #[must_use]
    pub fn extra(&self) -> Arc<SharedRegion> {
        Arc::clone(&self.extra)
    }
}

/// One queue's part of the region. The steps of the module documentation, as calls:
/// [`on_pop`](Self::on_pop), [`on_used`](Self::on_used), (the used index moves),
/// [`on_published`](Self::on_published); [`recover`](Self::recover) once before any of them.
#[derive(Debug)]
pub struct QueueInflight {
    window: Window,
    desc_num: u16,
    counter: u64,
}

impl QueueInflight {
    /// Descriptors that it tracks.
    #[must_use]
    pub fn desc_num(&self) -> u16 {
        self.desc_num
    }

    fn header(&self, offset: usize) -> &AtomicU16 {
        self.window.atomic(offset)
    }

    /// `head` is below `desc_num`: the queue is no larger and has checked its heads.
    fn at(&self, head: u16, offset: usize) -> usize {
        HEADER_LEN + usize::from(head) * STATE_LEN + offset
    }

    fn flag(&self, head: u16) -> &AtomicU8 {
        self.window.atomic(self.at(head, state::INFLIGHT))
    }

    /// A chain was taken off the available ring.
    #[inline]
    pub fn on_pop(&mut self, head: u16) {
        let counter = self
            .window
            .atomic::<AtomicU64>(self.at(head, state::COUNTER));
        counter.store(self.counter, Ordering::Relaxed);
        self.counter = self.counter.wrapping_add(1);
        self.flag(head).store(1, Ordering::Release);
    }

    /// A chain is about to be returned: before the used index moves over it.
    #[inline]
    pub fn on_used(&mut self, head: u16) {
        let last = self.header(header::LAST_BATCH_HEAD);
        let next = self.window.atomic::<AtomicU16>(self.at(head, state::NEXT));
        next.store(last.load(Ordering::Relaxed), Ordering::Relaxed);
        last.store(head, Ordering::Release);
    }

    /// The used ring's index is now `used_idx`; `batch` are the chains returned by that.
    #[inline]
    pub fn on_published(&mut self, batch: &[u16], used_idx: u16) {
        for &head in batch {
            self.flag(head).store(0, Ordering::Release);
        }
        self.header(header::USED_IDX)
            .store(used_idx, Ordering::Release);
    }

    /// Finishes what a killed process left half done and says which chains it had popped and not
    /// returned, oldest first. `used_idx` is the used ring's index as the guest sees it. Called
    /// twice, it gives the same.
    #[must_use]
    pub fn recover(&mut self, used_idx: u16) -> Vec<u16> {
        let noted = self.header(header::USED_IDX).load(Ordering::Acquire);
        let unfinished = used_idx.wrapping_sub(noted).min(self.desc_num);
        let mut head = self.header(header::LAST_BATCH_HEAD).load(Ordering::Acquire);
        for _ in 0..unfinished {
            if head >= self.desc_num {
                break;
            }
            self.flag(head).store(0, Ordering::Release);
            let next = self.window.atomic::<AtomicU16>(self.at(head, state::NEXT));
            head = next.load(Ordering::Acquire);
        }
        self.header(header::USED_IDX)
            .store(used_idx, Ordering::Release);

        let mut heads: Vec<(u64, u16)> = (0..self.desc_num)
            .filter(|&head| self.flag(head).load(Ordering::Acquire) == 1)
            .map(|head| {
                let counter = self
                    .window
                    .atomic::<AtomicU64>(self.at(head, state::COUNTER));
                (counter.load(Ordering::Acquire), head)
            })
            .collect();
        heads.sort_unstable();
        self.counter = heads
            .last()
            .map_or(0, |(counter, _)| counter.wrapping_add(1));
        heads.into_iter().map(|(_, head)| head).collect()
    }

    /// Forgets everything: the region does not belong to the ring.
    pub fn clear(&mut self, used_idx: u16) {
        for head in 0..self.desc_num {
            self.flag(head).store(0, Ordering::Release);
        }
        self.header(header::USED_IDX)
            .store(used_idx, Ordering::Release);
        self.counter = 0;
    }
}
