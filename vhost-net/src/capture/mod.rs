//! Frames of a running interface, for whoever asks for them (`vhost-net capture`).
//!
//! ```text
//!  queue threads ──Tap::frame──► Capture (bounded buffer) ──writer's thread──► control connection
//!                                                                                 │
//!                                   vhost-net capture, as the user who asked ◄────┘──► file
//! ```
//!
//! The file is written by the client: the sandboxed card may open none, and whose file it is and
//! where the disk is full are the client's matter. The frames go to it over the control connection
//! that asked for them, as a pcapng stream (see [`crate::policy::pcap`]). Passing a descriptor to
//! the card was the other choice: it would let a slow disk hold the card's thread, and could not say
//! in the end how much is missing.
//!
//! Without a capture a frame costs one relaxed load. With one it is copied, under a lock that is
//! held for the copy only, into a buffer of at most [`BUFFER_MAX`] bytes; a thread of the capture's
//! own sends that while the next one fills. A client that is too slow loses frames, which are
//! counted and told of in the stream's last block; the queue never waits. There are
//! [`CAPTURES_MAX`] at once, one more is refused: 32 MiB are the most that captures take.
//!
//! A frame from the guest is taken before anything looks at it, so that broken and refused ones are
//! seen; one to the guest when it lies in the guest's buffers. Frames look as in the rings: with
//! segmentation offload a TCP segment of up to 64 KiB, its checksum the pseudo header's only.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use offload::telemetry::{Counter, Registry};
use rustix::event::{EventfdFlags, eventfd};
use serde::{Deserialize, Serialize};

use crate::local::Direction;
use crate::policy::pcap;

mod writer;

pub use writer::spawn;

/// Captures at once.
pub const CAPTURES_MAX: usize = 4;
/// Bytes that wait for a client; as many are being sent to it.
pub const BUFFER_MAX: usize = 4 << 20;
/// Least part of a frame that can be asked for: the headers.
pub const SNAPLEN_MIN: u32 = 64;

/// What a client asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Wanted {
    /// Bytes of each frame that are kept, [`SNAPLEN_MIN`] to [`pcap::SNAPLEN`].
    pub snaplen: u32,
}

impl Default for Wanted {
    fn default() -> Self {
        Self {
            snaplen: pcap::SNAPLEN,
        }
    }
}

/// Why there is no capture.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// There are enough.
    #[error("{CAPTURES_MAX} captures are running already; end one of them first")]
    TooMany,
    /// Not that length.
    #[error("a snaplen is {SNAPLEN_MIN} to {} bytes", pcap::SNAPLEN)]
    Snaplen,
    /// No thread or no descriptor is to be had.
    #[error("the card cannot begin a capture")]
    Resources(#[from] io::Error),
}

/// Where the data path hands its frames in.
#[derive(Debug, Default)]
pub struct Tap {
    is_wanted: AtomicBool,
    captures: Mutex<Vec<Arc<Capture>>>,
    /// Captures whose memory is not given back.
    writers: AtomicUsize,
    captured: Arc<Counter>,
    dropped: Arc<Counter>,
}

impl Tap {
    /// Whether anybody captures.
    #[inline]
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        self.is_wanted.load(Ordering::Relaxed)
    }

    /// A frame passes, seen from the guest.
    #[inline]
    pub fn frame(&self, direction: Direction, frame: &[u8]) {
        if self.is_wanted() {
            self.hand_out(direction, frame);
        }
    }

    #[cold]
    fn hand_out(&self, direction: Direction, frame: &[u8]) {
        // A clock before 1970 tells no time worth keeping.
        let unix = SystemTime::now().duration_since(UNIX_EPOCH);
        let unix = unix.unwrap_or_default();
        for capture in self.captures().iter() {
            if capture.offer(direction, unix, frame) {
                self.captured.inc();
            } else {
                self.dropped.inc();
            }
        }
    }

    /// Begins a capture.
    ///
    /// # Errors
    /// See [`CaptureError`].
    pub fn begin(self: &Arc<Self>, wanted: Wanted) -> Result<Running, CaptureError> {
        if !(SNAPLEN_MIN..=pcap::SNAPLEN).contains(&wanted.snaplen) {
            return Err(CaptureError::Snaplen);
        }
        let mut captures = self.captures();
        // One whose client is gone and whose thread still sends has its memory, too.
        if self.writers.load(Ordering::Acquire) >= CAPTURES_MAX {
            return Err(CaptureError::TooMany);
        }
        let capture = Arc::new(Capture::new(wanted.snaplen)?);
        self.writers.fetch_add(1, Ordering::AcqRel);
        captures.push(Arc::clone(&capture));
        self.is_wanted.store(true, Ordering::Relaxed);
        Ok(Running {
            tap: Arc::clone(self),
            capture,
        })
    }

    /// No more frames for this one.
    fn end(&self, capture: &Arc<Capture>) {
        let mut captures = self.captures();
        captures.retain(|other| !Arc::ptr_eq(other, capture));
        self.is_wanted
            .store(!captures.is_empty(), Ordering::Relaxed);
    }

    /// Waits until all captures have told their clients the rest, or `patience` is over.
    pub fn wait_ended(&self, patience: Duration) {
        let end = Instant::now() + patience;
        while self.writers.load(Ordering::Acquire) > 0 && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Shows what it counts.
    pub fn register(self: &Arc<Self>, registry: &Registry) {
        for (name, help, counter) in [
            (
                "captured_frames",
                "Frames handed to captures",
                &self.captured,
            ),
            (
                "capture_drops",
                "Frames that captures lost because their clients were slow",
                &self.dropped,
            ),
        ] {
            registry.counter(name, help, Vec::new(), Arc::clone(counter));
        }
        let tap = Arc::clone(self);
        registry.gauge("captures", "Captures running", Vec::new(), move || {
            tap.writers.load(Ordering::Relaxed) as u64
        });
    }

    fn captures(&self) -> MutexGuard<'_, Vec<Arc<Capture>>> {
        self.captures.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A capture that takes frames, until this is dropped.
#[derive(Debug)]
pub struct Running {
    tap: Arc<Tap>,
    capture: Arc<Capture>,
}

impl Running {
    /// No more frames.
    fn end(&self) {
        self.tap.end(&self.capture);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
        self.tap.writers.fetch_sub(1, Ordering::AcqRel);
    }
}

#[derive(Debug, Default)]
struct Pending {
    bytes: Vec<u8>,
    /// Frames since the beginning, those dropped among them.
    frames: u64,
    dropped: u64,
}

/// One capture: what waits for its client.
#[derive(Debug)]
struct Capture {
    snaplen: u32,
    pending: Mutex<Pending>,
    /// Readable when something waits.
    bell: OwnedFd,
}

impl Capture {
    fn new(snaplen: u32) -> io::Result<Self> {
        let pending = Pending {
            // All at once, so that it never grows: pages that are not needed are not touched.
            bytes: Vec::with_capacity(BUFFER_MAX),
            ..Pending::default()
        };
        Ok(Self {
            snaplen,
            pending: Mutex::new(pending),
            bell: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    /// Takes a frame, if there is room.
    fn offer(&self, direction: Direction, unix: Duration, frame: &[u8]) -> bool {
        let mut pending = self.pending();
        pending.frames += 1;
        let kept = frame.len().min(self.snaplen as usize);
        if pending.bytes.len() + pcap::OVERHEAD + kept + 3 > BUFFER_MAX {
            pending.dropped += 1;
            return false;
        }
        let was_empty = pending.bytes.is_empty();
        pcap::packet(&mut pending.bytes, direction, unix, frame, self.snaplen);
        drop(pending);
        if was_empty {
            // A counter that is full is readable as well.
            let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
        }
        true
    }

    /// Exchanges what waits for an empty buffer.
    fn take(&self, empty: &mut Vec<u8>) {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.bell, &mut count);
        std::mem::swap(&mut self.pending().bytes, empty);
    }

    /// The stream's last block.
    fn conclusion(&self) -> Vec<u8> {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH);
        let pending = self.pending();
        let mut block = Vec::new();
        pcap::statistics(
            &mut block,
            unix.unwrap_or_default(),
            pending.frames,
            pending.dropped,
        );
        block
    }

    fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
