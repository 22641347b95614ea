//! The client that drives every vhost-user server: `blkio`'s virtio-blk driver, with one queue, or
//! with several, each of which has a thread while a job runs.
//!
//! It waits for completions by notification (eventfd), as a guest's kernel does, and not by
//! polling, which would take a core that the servers could use. Each request in flight has a slot
//! of shared memory of its own, filled with random bytes once, so that writing costs the client
//! nothing and no server can compress or deduplicate.

use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};
use hdrhistogram::Histogram;
use thiserror::Error;

use crate::job::{BLOCK_MAX, BLOCK_MIN, DEPTH_MAX, Job, Pattern, QUEUE_SIZE};

/// Bytes of shared memory of a queue.
const ARENA_LEN: usize = 32 << 20;
/// How long a server may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a request may take.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// Requests in flight while filling.
const FILL_DEPTH: usize = 8;
const FILL_LEN: usize = BLOCK_MAX as usize;
/// Longest latency that the histogram tells from longer ones, in nanoseconds.
const LATENCY_MAX: u64 = 60_000_000_000;

/// What went wrong between client and server.
#[derive(Debug, Error)]
pub enum ClientError {
    /// No connection.
    #[error("no virtio-blk connection over {socket}: {reason}")]
    Connect {
        /// Where.
        socket: PathBuf,
        /// What `blkio` says.
        reason: String,
    },
    /// Setting up memory or queues, or waiting, failed.
    #[error("{doing} failed: {source}")]
    Driver {
        /// What was tried.
        doing: &'static str,
        /// What `blkio` says.
        source: blkio::Error,
    },
    /// A request failed.
    #[error("the server failed a request (error {0})")]
    Request(i32),
    /// A block came back changed.
    #[error("the block at byte {0} is not what was written there: the server returns wrong data")]
    WrongData(u64),
    /// The disk is too small for the job.
    #[error("the disk has {capacity} bytes, too few for {job}")]
    TooSmall {
        /// Bytes of the disk.
        capacity: u64,
        /// Job.
        job: String,
    },
    /// The user stopped it.
    #[error("interrupted")]
    Interrupted,
}

/// What a job came to.
#[derive(Debug)]
pub struct Outcome {
    /// Requests; a write with its flush is one.
    pub requests: u64,
    /// From the first submission to the last completion.
    pub elapsed: Duration,
    /// Latencies in nanoseconds.
    pub latency: Histogram<u64>,
}

/// A connection to a server.
pub struct Client {
    // Dropped before the driver that owns their memory.
    lanes: Vec<Lane>,
    _driver: Blkio,
    capacity: u64,
}

/// A queue of it.
struct Lane {
    queue: Blkioq,
    arena: MemoryRegion,
    capacity: u64,
    /// Part of the disk at which jobs in order begin.
    begin: f64,
    random: fastrand::Rng,
    stop: Arc<AtomicBool>,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let capacity = self.capacity;
        f.debug_struct("Client")
            .field("capacity", &capacity)
            .finish_non_exhaustive()
    }
}

fn driver_error(doing: &'static str) -> impl Fn(blkio::Error) -> ClientError {
    move |source| ClientError::Driver { doing, source }
}

impl Client {
    /// Connects to the server that listens on `socket`, which has at least so many queues. When
    /// `stop` is set, whatever runs ends with [`ClientError::Interrupted`].
    ///
    /// # Errors
    /// No connection in time, or the driver refuses the device.
    pub fn connect(socket: &Path, queues: u16, stop: Arc<AtomicBool>) -> Result<Self, ClientError> {
        let mut driver = connect(socket)?;
        let start = driver_error("starting the queues");
        driver
            .set_i32("num-queues", i32::from(queues))
            .map_err(&start)?;
        driver
            .set_i32("queue-size", i32::from(QUEUE_SIZE))
            .map_err(&start)?;
        let capacity = driver.get_u64("capacity").map_err(&start)?;
        let started = driver.start().map_err(&start)?.queues;
        if started.len() != usize::from(queues) {
            return Err(ClientError::Connect {
                socket: socket.to_owned(),
                reason: format!("{} queues instead of {queues}", started.len()),
            });
        }
        let mut lanes = Vec::new();
        for (index, queue) in (0..queues).zip(started) {
            let memory = driver_error("sharing memory");
            let arena = driver.alloc_mem_region(ARENA_LEN).map_err(&memory)?;
            driver.map_mem_region(&arena).map_err(&memory)?;
            let mut lane = Lane {
                queue,
                arena,
                capacity,
                begin: f64::from(index) / f64::from(queues),
                random: fastrand::Rng::with_seed(0x0ff_10ad + u64::from(index)),
                stop: Arc::clone(&stop),
            };
            let mut random = lane.random.clone();
            random.fill(lane.slice(0, ARENA_LEN));
            lanes.push(lane);
        }
        Ok(Self {
            lanes,
            _driver: driver,
            capacity,
        })
    }

    /// Bytes of the disk.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    fn first(&mut self) -> &mut Lane {
        // `connect` saw to it that there are as many as were asked for, and `blkio` starts no
        // device without a queue.
        self.lanes.first_mut().expect("a queue")
    }

    /// Writes the whole disk with bytes that [`Self::verify`] knows, and flushes. `progress` gets
    /// the bytes done.
    ///
    /// # Errors
    /// A request fails.
    pub fn fill(&mut self, progress: impl Fn(u64)) -> Result<(), ClientError> {
        self.first().fill(progress)
    }

    /// Reads `count` random blocks and compares them with what [`Self::fill`] wrote.
    ///
    /// # Errors
    /// [`ClientError::WrongData`], or a request fails.
    pub fn verify(&mut self, count: u32) -> Result<(), ClientError> {
        self.first().verify(count)
    }

    /// Runs a job on all queues for this long; the job's depth is each queue's.
    ///
    /// # Errors
    /// A request fails or takes far too long; the disk is too small.
    pub fn run(&mut self, job: &Job, time: Duration) -> Result<Outcome, ClientError> {
        let [lane] = self.lanes.as_mut_slice() else {
            return std::thread::scope(|scope| {
                let threads: Vec<_> = self
                    .lanes
                    .iter_mut()
                    .map(|lane| scope.spawn(move || lane.run(job, time)))
                    .collect();
                let mut total = Outcome {
                    requests: 0,
                    elapsed: Duration::ZERO,
                    latency: histogram(),
                };
                for thread in threads {
                    let one = thread.join().expect("a queue's thread does not panic")?;
                    total.requests += one.requests;
                    total.elapsed = total.elapsed.max(one.elapsed);
                    // Both have the same bounds.
                    let _ = total.latency.add(&one.latency);
                }
                Ok(total)
            });
        };
        lane.run(job, time)
    }

    /// Reads or writes 4 KiB at each of these byte offsets, `depth` at a time, until there are no
    /// more. Writes carry random bytes.
    ///
    /// # Errors
    /// A request fails or takes far too long.
    pub fn each(
        &mut self,
        is_read: bool,
        depth: usize,
        offsets: impl Iterator<Item = u64>,
    ) -> Result<Outcome, ClientError> {
        self.first().each(is_read, depth, offsets)
    }

    /// Makes everything durable.
    ///
    /// # Errors
    /// The flush fails.
    pub fn flush(&mut self) -> Result<(), ClientError> {
        self.first().flush()
    }
}

impl Lane {
    fn fill(&mut self, progress: impl Fn(u64)) -> Result<(), ClientError> {
        let mut next = 0;
        let mut free: Vec<usize> = (0..FILL_DEPTH).collect();
        let mut done = [0; DEPTH_MAX as usize];
        loop {
            while next < self.capacity
                && let Some(slot) = free.pop()
            {
                let left = self.capacity - next;
                let len = usize::try_from(left).map_or(FILL_LEN, |left| left.min(FILL_LEN));
                let buffer = self.slice(slot * FILL_LEN, len);
                for (n, block) in (0_u64..).zip(buffer.chunks_mut(BLOCK_MIN as usize)) {
                    pattern(next + n * u64::from(BLOCK_MIN), block);
                }
                let buffer = buffer.as_mut_ptr();
                self.queue.write(next, buffer, len, slot, ReqFlags::empty());
                next += len as u64;
            }
            if free.len() == FILL_DEPTH {
                break;
            }
            let count = self.reap(&mut done)?;
            free.extend(done.iter().take(count));
            progress(next);
        }
        self.flush()
    }

    fn verify(&mut self, count: u32) -> Result<(), ClientError> {
        let len = BLOCK_MIN as usize;
        let mut expected = vec![0; len];
        for _ in 0..count {
            let offset = self.random.u64(0..self.capacity / len as u64) * len as u64;
            let buffer = self.slice(0, len).as_mut_ptr();
            self.queue.read(offset, buffer, len, 0, ReqFlags::empty());
            self.reap(&mut [0])?;
            pattern(offset, &mut expected);
            if self.slice(0, len) != expected {
                return Err(ClientError::WrongData(offset));
            }
        }
        Ok(())
    }

    fn run(&mut self, job: &Job, time: Duration) -> Result<Outcome, ClientError> {
        let depth = usize::from(job.depth);
        let blocks = self.capacity / u64::from(job.block);
        if blocks < u64::from(job.depth) {
            return Err(ClientError::TooSmall {
                capacity: self.capacity,
                job: job.to_string(),
            });
        }
        let mut latency = histogram();
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss
        )]
        let mut cursor = (blocks as f64 * self.begin) as u64;
        let mut done = [0; DEPTH_MAX as usize];
        let begin = Instant::now();
        // Per slot: when its request began, and whether what is under way is the flush.
        let mut began = vec![begin; depth];
        let mut is_flushing = vec![false; depth];
        let mut submit = |client: &mut Self, slot: usize| {
            let block = if job.pattern.is_random() {
                client.random.u64(0..blocks)
            } else {
                cursor = (cursor + 1) % blocks;
                cursor
            };
            client.submit(job, slot, block);
        };
        for slot in 0..depth {
            submit(self, slot);
        }
        let (mut in_flight, mut requests) = (depth, 0);
        let mut now = begin;
        while in_flight > 0 {
            let count = self.reap(&mut done)?;
            now = Instant::now();
            let is_over = now.duration_since(begin) >= time;
            for &slot in done.iter().take(count) {
                let (Some(began), Some(is_flushing)) =
                    (began.get_mut(slot), is_flushing.get_mut(slot))
                else {
                    continue;
                };
                if job.pattern == Pattern::WriteFlush && !*is_flushing {
                    *is_flushing = true;
                    self.queue.flush(slot, ReqFlags::empty());
                    continue;
                }
                *is_flushing = false;
                requests += 1;
                latency.saturating_record(nanos(now.duration_since(*began)));
                if is_over {
                    in_flight -= 1;
                } else {
                    *began = now;
                    submit(self, slot);
                }
            }
        }
        Ok(Outcome {
            requests,
            elapsed: now.duration_since(begin),
            latency,
        })
    }

    fn each(
        &mut self,
        is_read: bool,
        depth: usize,
        mut offsets: impl Iterator<Item = u64>,
    ) -> Result<Outcome, ClientError> {
        const LEN: usize = BLOCK_MIN as usize;
        let mut latency = histogram();
        let mut free: Vec<usize> = (0..depth.min(DEPTH_MAX.into())).collect();
        let depth = free.len();
        let begin = Instant::now();
        let mut began = vec![begin; depth];
        let mut done = [0; DEPTH_MAX as usize];
        let mut requests = 0;
        let mut now = begin;
        loop {
            while let Some(slot) = free.last().copied()
                && let Some(offset) = offsets.next()
            {
                free.pop();
                let buffer = self.slice(slot * LEN, LEN).as_mut_ptr();
                if is_read {
                    self.queue
                        .read(offset, buffer, LEN, slot, ReqFlags::empty());
                } else {
                    self.queue
                        .write(offset, buffer, LEN, slot, ReqFlags::empty());
                }
                if let Some(began) = began.get_mut(slot) {
                    *began = now;
                }
            }
            if free.len() == depth {
                break;
            }
            let count = self.reap(&mut done)?;
            now = Instant::now();
            for &slot in done.iter().take(count) {
                requests += 1;
                let began = began.get(slot).copied().unwrap_or(now);
                latency.saturating_record(nanos(now.duration_since(began)));
                free.push(slot);
            }
        }
        Ok(Outcome {
            requests,
            elapsed: now.duration_since(begin),
            latency,
        })
    }

    fn flush(&mut self) -> Result<(), ClientError> {
        self.queue.flush(0, ReqFlags::empty());
        self.reap(&mut [0]).map(drop)
    }

    fn submit(&mut self, job: &Job, slot: usize, block: u64) {
        let (offset, len) = (block * u64::from(job.block), job.block as usize);
        let buffer = self.slice(slot * len, len).as_mut_ptr();
        let flags = ReqFlags::empty();
        if job.pattern.is_read() {
            self.queue.read(offset, buffer, len, slot, flags);
        } else {
            self.queue.write(offset, buffer, len, slot, flags);
        }
    }

    /// Submits what is queued and waits for at least one completion. Gives the number of slots.
    fn reap(&mut self, slots: &mut [usize]) -> Result<usize, ClientError> {
        let mut completions: [MaybeUninit<Completion>; DEPTH_MAX as usize] =
            [const { MaybeUninit::uninit() }; DEPTH_MAX as usize];
        let room = slots.len().min(completions.len());
        let mut timeout = REQUEST_TIMEOUT;
        let place = completions.get_mut(..room).unwrap_or_default();
        let result = self.queue.do_io(place, 1, Some(&mut timeout), None);
        if self.stop.load(Ordering::Relaxed) {
            return Err(ClientError::Interrupted);
        }
        let count = result.map_err(driver_error("waiting for the server"))?;
        for (slot, completion) in slots.iter_mut().zip(completions.iter().take(count)) {
            // SAFETY: `do_io` has initialised the first `count` completions.
            let completion = unsafe { completion.assume_init_ref() };
            if completion.ret != 0 {
                return Err(ClientError::Request(completion.ret));
            }
            *slot = completion.user_data;
        }
        Ok(count)
    }

    /// A part of the shared memory. No request that is under way may use it.
    fn slice(&mut self, offset: usize, len: usize) -> &mut [u8] {
        assert!(
            offset.checked_add(len).is_some_and(|end| end <= ARENA_LEN),
            "job limits keep slots in the arena"
        );
        // SAFETY: `arena` is a mapping of ARENA_LEN bytes that lives as long as the driver and was
        // zeroed by the kernel; the range was checked. The server also reaches it, but as a peer that
        // only touches buffers of requests under way: callers take slots without one, and those that
        // want a pointer for a new request do not look at the bytes.
        unsafe { std::slice::from_raw_parts_mut((self.arena.addr as *mut u8).add(offset), len) }
    }
}

/// An empty histogram of latencies in nanoseconds, three digits exact.
#[must_use]
pub fn histogram() -> Histogram<u64> {
    // The bounds are constants that the crate accepts, so this cannot fail.
    Histogram::new_with_bounds(1, LATENCY_MAX, 3).unwrap_or_else(|_| unreachable!())
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// What belongs into the block at this offset: random bytes, the same ones each time.
fn pattern(offset: u64, block: &mut [u8]) {
    fastrand::Rng::with_seed(offset ^ 0x9e37_79b9_7f4a_7c15).fill(block);
}

/// A server may listen a moment after its socket exists.
fn connect(socket: &Path) -> Result<Blkio, ClientError> {
    let try_once = || -> Result<Blkio, blkio::Error> {
        let mut driver = Blkio::new("virtio-blk-vhost-user")?;
        driver.set_str("path", &socket.to_string_lossy())?;
        driver.connect()?;
        Ok(driver)
    };
    let deadline = Instant::now() + CONNECT_TIMEOUT;
    loop {
        match try_once() {
            Ok(driver) => return Ok(driver),
            Err(error) if Instant::now() > deadline => {
                return Err(ClientError::Connect {
                    socket: socket.to_owned(),
                    reason: error.to_string(),
                });
            }
            Err(_) => sleep(Duration::from_millis(50)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_block_is_filled_with_bytes_of_its_own() {
        let (mut a, mut b, mut again) = ([0; 4096], [0; 4096], [0; 4096]);
        pattern(0, &mut a);
        pattern(4096, &mut b);
        pattern(0, &mut again);
        assert_eq!(a, again);
        assert_ne!(a, b);
        assert_ne!(a[..2048], a[2048..]);
    }

    #[test]
    fn slots_of_every_job_fit_the_shared_memory() {
        for job in Job::standard() {
            assert!(
                usize::from(job.depth) * job.block as usize <= ARENA_LEN,
                "{job}"
            );
            assert!(job.depth * 3 <= QUEUE_SIZE, "{job}");
        }
    }
}
