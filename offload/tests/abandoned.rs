//! A queue's thread that ends before its time tells its handler. One test, so that the process has one
//! io_uring at a time.

#![allow(clippy::unwrap_used)]

use std::mem::ManuallyDrop;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};

use offload::device::{Chain, Device, DeviceError, QueueHandler};
use offload::inflight::SharedRegion;
use offload::worker::{QueueIo, QueueThread, Waker};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// A call of the handler panics.
    Panic,
    /// The io_uring becomes something else.
    Ring,
    /// None before it is told to.
    InTime,
}

struct Doomed {
    end: End,
    abandoned: Arc<AtomicU64>,
    dropped: Arc<AtomicU64>,
}

impl Device for Doomed {
    type Queue = DoomedQueue;

    fn features(&self) -> u64 {
        0
    }
    fn queue_count(&self) -> u16 {
        1
    }
    fn queue_size_max(&self) -> u16 {
        256
    }
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }
    fn write_config(&self, _: u32, _: &[u8]) -> Result<(), DeviceError> {
        Err("read-only".into())
    }
    fn set_features(&self, _: u64) {}
    fn start(&self, _: Option<Arc<SharedRegion>>) -> Result<(), DeviceError> {
        Ok(())
    }
    fn stop(&self) {}

    fn queue(&self, _: u16, waker: Waker) -> Result<DoomedQueue, DeviceError> {
        waker.wake();
        Ok(DoomedQueue {
            end: self.end,
            abandoned: Arc::clone(&self.abandoned),
            dropped: Arc::clone(&self.dropped),
        })
    }
}

struct DoomedQueue {
    end: End,
    abandoned: Arc<AtomicU64>,
    dropped: Arc<AtomicU64>,
}

/// The io_uring of this process's only queue.
fn ring() -> RawFd {
    let all = std::fs::read_dir("/proc/self/fd").unwrap();
    let rings = all.filter_map(|entry| {
        let path = entry.ok()?.path();
        let target = std::fs::read_link(&path).ok()?;
        let is_ring = target.to_str()?.contains("io_uring");
        is_ring.then(|| path.file_name()?.to_str()?.parse().ok())?
    });
    // The newest; that of a thread that panicked is still there.
    rings.max().unwrap()
}

impl QueueHandler for DoomedQueue {
    fn request(&mut self, _: Chain, _: &mut QueueIo<'_>) {}
    fn batch_end(&mut self, _: &mut QueueIo<'_>) {}
    fn completion(&mut self, _: u64, _: i32, _: &mut QueueIo<'_>) {}
    fn wake(&mut self, _: &mut QueueIo<'_>) {
        match self.end {
            End::Panic => panic!("as it was told to"),
            End::Ring => {
                let null = rustix::fs::open("/dev/null", OFlags::RDWR, Mode::empty()).unwrap();
                // SAFETY: the descriptor is open and its owner never closes it (it is leaked with the
                // rest of the thread); it is only made to mean another file.
                let mut ring = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(ring()) });
                rustix::io::dup2(&null, &mut ring).unwrap();
            }
            End::InTime => {}
        }
    }
    fn abandoned(&mut self) {
        self.abandoned.fetch_add(1, Ordering::Relaxed);
    }
    fn chains_held(&self) -> usize {
        0
    }
}

impl Drop for DoomedQueue {
    fn drop(&mut self) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
    }
}

/// What came of a thread that ends so: how often it was told, and dropped.
fn outcome(end: End) -> (u64, u64) {
    let (abandoned, dropped) = (Arc::default(), Arc::default());
    let device = Doomed {
        end,
        abandoned: Arc::clone(&abandoned),
        dropped: Arc::clone(&dropped),
    };
    let thread = QueueThread::spawn(Arc::new(device), 0, Arc::default()).unwrap();
    let patience = Instant::now() + Duration::from_secs(10);
    while end != End::InTime && thread.is_alive() {
        assert!(Instant::now() < patience, "{end:?}: the thread goes on");
        std::thread::sleep(Duration::from_millis(1));
    }
    drop(thread);
    (
        abandoned.load(Ordering::Relaxed),
        dropped.load(Ordering::Relaxed),
    )
}

#[test]
fn a_handler_whose_thread_ends_before_its_time_is_told_and_not_dropped() {
    assert_eq!(outcome(End::Panic), (1, 0));
    assert_eq!(outcome(End::InTime), (0, 1));
    // Last, for that ring is never closed.
    assert_eq!(outcome(End::Ring), (1, 0));
}
