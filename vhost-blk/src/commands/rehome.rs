//! Walks over a volume that move blocks: all of it at full speed for `compact`, and what random
//! writes have scattered while a served volume is idle.
//!
//! A walk needs whole free chunks to gather to. When there are none left, what has moved is
//! committed, which frees the old places; if that leaves no whole chunk either, the emptiest
//! chunks are emptied into the holes of others, for all of which one walk over the map is enough.
//! So gathering all of a full volume writes it about twice.
//!
//! A walk goes in slices that end with nothing under way, and holds the volume still only for a
//! slice: whoever wants to settle the volume waits for no more than that. The idle walk ends its
//! slice as soon as a guest's request shows.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use offload::control::{ControlError, ControlServer};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::pump::{Bytes, Pump};
use crate::device::BlockDevice;
use crate::volume::backing::FileBacking;
use crate::volume::engine::{Failure, Op, PART_BLOCKS, Phase, Rehoming, Shared, Volume};
use crate::volume::geometry::{BLOCK_LEN, CHUNK_LEN};

/// Bytes of a part.
const PART_LEN: u64 = PART_BLOCKS * BLOCK_LEN as u64;
/// Parts under way at a time.
const DEPTH: usize = 4;
/// Parts of a slice.
const SLICE: u64 = 16;
/// What looking at a part counts for the rate, so that looking has a bound too.
const LOOK_COST: u64 = 32 << 10;
/// A volume without requests for so long is idle.
const IDLE: Duration = Duration::from_secs(1);
/// Walks in a row that an idle volume makes at most.
const PASSES: usize = 4;
/// Free chunks that an idle volume keeps in the backing besides a quarter of what it holds; never more
/// than it holds.
const KEEP_CHUNKS: u64 = 8;

/// How far a `compact` is, and what came of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Progress {
    /// Whether it is at work.
    pub(super) is_running: bool,
    /// Parts of the volume that are done.
    pub(super) done: u64,
    /// Parts of the volume.
    pub(super) parts: u64,
    /// Blocks moved.
    pub(super) moved: u64,
    /// Bytes that chunks with backing took at first.
    pub(super) before: u64,
    /// Bytes that they take now.
    pub(super) after: u64,
    /// There was no room to move everything.
    pub(super) is_cut_short: bool,
    /// Why it failed.
    pub(super) error: Option<String>,
}

enum End {
    Finished,
    /// No room to move this part.
    NoRoom(u64),
    Stopped,
}

/// Moves blocks of one volume.
pub(super) struct Walker<'a> {
    pump: Pump,
    shared: &'a Shared,
    may_go_on: &'a dyn Fn() -> bool,
    /// Tells how far it is; called between slices, where it may wait.
    told: &'a dyn Fn(u64),
}

impl<'a> Walker<'a> {
    pub(super) fn new(
        volume: &'a Volume,
        backing: Arc<FileBacking>,
        may_go_on: &'a dyn Fn() -> bool,
        told: &'a dyn Fn(u64),
    ) -> anyhow::Result<Self> {
        Ok(Self {
            pump: Pump::new(volume, backing).context("cannot set up io_uring")?,
            shared: volume.shared(),
            may_go_on,
            told,
        })
    }

    /// Waits until nothing is under way.
    fn drain(&mut self) -> anyhow::Result<()> {
        while let Some(done) = self.pump.next()? {
            check(done.result)?;
        }
        Ok(())
    }

    /// Makes durable what has moved, which frees the old places.
    fn flush(&mut self) -> anyhow::Result<()> {
        let _still = self.shared.hold_still();
        let nothing = Bytes {
            offset: 0,
            data: Vec::new(),
        };
        self.pump.submit(Op::Flush, nothing);
        self.drain()
    }

    fn give_back(&mut self, keep: u64) -> anyhow::Result<()> {
        let _still = self.shared.hold_still();
        self.pump.give_back(keep);
        self.drain()
    }

    /// Moves what is to move in the parts that `next` gives, from `from` on.
    fn walk(
        &mut self,
        mode: Rehoming,
        from: u64,
        next: &dyn Fn(u64) -> Option<u64>,
    ) -> anyhow::Result<End> {
        let mut cursor = from;
        loop {
            let still = self.shared.hold_still();
            let mut left = SLICE;
            let mut full: Option<u64> = None;
            let mut is_end = false;
            loop {
                while self.pump.count() < DEPTH && left > 0 && full.is_none() && !is_end {
                    let Some(part) = next(cursor).filter(|_| (self.may_go_on)()) else {
                        is_end = true;
                        break;
                    };
                    self.shared.clear_scattered(part);
                    let offset = part * PART_LEN;
                    let len = PART_LEN.min(self.shared.volume_len() - offset);
                    let data = Vec::new();
                    let op = Op::Rehome { offset, len, mode };
                    self.pump.submit(op, Bytes { offset, data });
                    cursor = part + 1;
                    left -= 1;
                }
                let Some(done) = self.pump.next()? else { break };
                if done.result == Err(Failure::NoSpace) {
                    let part = done.payload.offset / PART_LEN;
                    full = Some(full.map_or(part, |first| first.min(part)));
                    self.shared.mark_scattered(part);
                } else {
                    check(done.result)?;
                }
            }
            drop(still);
            if let Some(part) = full {
                return Ok(End::NoRoom(part));
            }
            (self.told)(cursor);
            if !(self.may_go_on)() {
                return Ok(End::Stopped);
            }
            if is_end {
                return Ok(End::Finished);
            }
        }
    }

    /// Gets whole free chunks. `false`: there are none to be had.
    fn make_room(&mut self) -> anyhow::Result<bool> {
        self.flush()?;
        if self.shared.free_chunks() > 0 {
            return Ok(true);
        }
        if self.shared.choose_victims() > 0 {
            let parts = self.shared.parts();
            let all = |part| (part < parts).then_some(part);
            self.walk(Rehoming::Evacuate, 0, &all)?;
            self.shared.clear_victims();
            self.flush()?;
        }
        Ok(self.shared.free_chunks() > 0)
    }

    /// Gathers, and gets room for it as long as that helps.
    fn gather(&mut self, next: &dyn Fn(u64) -> Option<u64>, is_all: bool) -> anyhow::Result<bool> {
        let (mut from, mut tries) = (0, 0);
        loop {
            if is_all {
                self.shared.choose_sparse();
            }
            match self.walk(Rehoming::Gather, from, next)? {
                End::Finished => return Ok(true),
                End::Stopped => return Ok(false),
                End::NoRoom(part) => {
                    tries = if part == from { tries + 1 } else { 0 };
                    from = part;
                    if tries > 3 || !self.make_room()? {
                        return Ok(false);
                    }
                }
            }
        }
    }

    /// Gathers all of the volume and gives back what is free. `false`: there was not room for all.
    pub(super) fn compact(&mut self) -> anyhow::Result<bool> {
        let parts = self.shared.parts();
        let is_whole = self.gather(&|part| (part < parts).then_some(part), true);
        self.shared.clear_victims();
        let is_whole = is_whole?;
        self.flush()?;
        self.give_back(0)?;
        Ok(is_whole)
    }

    /// Gathers what may lie scattered, and gives back more than a little that is free. `false`:
    /// there was no room, or somebody came.
    fn tidy(&mut self) -> anyhow::Result<bool> {
        let shared = self.shared;
        // Making room scatters again a little of what was passed already.
        let mut is_whole = Ok(true);
        for _ in 0..PASSES {
            is_whole = self.gather(&|part| shared.next_scattered(part), false);
            if !matches!(is_whole, Ok(true)) || shared.next_scattered(0).is_none() {
                break;
            }
        }
        self.shared.clear_victims();
        let is_whole = is_whole?;
        self.flush()?;
        if (self.may_go_on)() {
            let (_, used) = self.shared.footprint();
            let used = used / CHUNK_LEN;
            self.give_back((used / 4 + KEEP_CHUNKS).min(used))?;
        }
        Ok(is_whole)
    }
}

/// Damage and unreadable places are reported by the engine, and the walk goes on: it is no check.
fn check(result: Result<(), Failure>) -> anyhow::Result<()> {
    match result {
        Ok(()) | Err(Failure::NotAuthentic | Failure::Io(_) | Failure::NoSpace) => Ok(()),
        Err(failure) => bail!("the volume cannot be written: {failure}"),
    }
}

/// Compacts a volume that nobody else uses; `told` is told parts done.
pub(super) fn compact(
    volume: &Volume,
    backing: Arc<FileBacking>,
    may_go_on: &dyn Fn() -> bool,
    told: &dyn Fn(u64),
) -> anyhow::Result<Progress> {
    let shared = volume.shared();
    let moved = || shared.stats().blocks_moved.load(Ordering::Relaxed);
    let (at_first, before) = (moved(), shared.footprint().0);
    let is_whole = Walker::new(volume, backing, may_go_on, told)?.compact()?;
    Ok(Progress {
        is_running: false,
        done: shared.parts(),
        parts: shared.parts(),
        moved: moved() - at_first,
        before,
        after: shared.footprint().0,
        is_cut_short: !is_whole,
        error: None,
    })
}

/// What the thread is told, and tells.
struct Wishes {
    /// Bytes a second that an idle volume moves; 0: none.
    rate: AtomicU64,
    is_writable: bool,
    wants_compact: AtomicBool,
    is_over: AtomicBool,
    bell: Condvar,
    progress: Mutex<Progress>,
}

impl Wishes {
    fn progress(&self) -> std::sync::MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a wish or for `time`.
    fn wait(&self, time: Duration) {
        let guard = self.progress();
        let is_news =
            self.is_over.load(Ordering::Relaxed) || self.wants_compact.load(Ordering::Relaxed);
        if !is_news {
            drop(self.bell.wait_timeout(guard, time));
        }
    }
}

/// The thread that moves blocks of a served volume. Dropping ends it.
pub(super) struct Rehomer {
    wishes: Arc<Wishes>,
    thread: Option<JoinHandle<()>>,
}

/// What the thread of a [`Rehomer`] is asked over the control socket.
#[derive(Clone)]
pub(super) struct Handle(Arc<Wishes>);

impl Handle {
    pub(super) fn new(rate: u64, is_writable: bool) -> Self {
        Self(Arc::new(Wishes {
            is_writable,
            rate: rate.into(),
            wants_compact: AtomicBool::new(false),
            is_over: AtomicBool::new(false),
            bell: Condvar::new(),
            progress: Mutex::default(),
        }))
    }

    pub(super) fn rate(&self) -> u64 {
        self.0.rate.load(Ordering::Relaxed)
    }

    pub(super) fn set_rate(&self, rate: u64) {
        self.0.rate.store(rate, Ordering::Relaxed);
    }

    /// How far the last `compact` is.
    pub(super) fn progress(&self) -> Progress {
        self.0.progress().clone()
    }

    /// Asks for a `compact`; one that runs goes on.
    pub(super) fn compact(&self) {
        let mut progress = self.0.progress();
        if !progress.is_running {
            *progress = Progress {
                is_running: true,
                ..Progress::default()
            };
            self.0.wants_compact.store(true, Ordering::Relaxed);
        }
        drop(progress);
        self.0.bell.notify_all();
    }
}

impl Rehomer {
    pub(super) fn start(
        handle: &Handle,
        device: &Arc<BlockDevice>,
        backing: &Arc<FileBacking>,
    ) -> std::io::Result<Self> {
        let wishes = Arc::clone(&handle.0);
        let (device, backing, own) = (Arc::clone(device), Arc::clone(backing), wishes.clone());
        let thread = std::thread::Builder::new()
            .name("rehome".to_owned())
            .spawn(move || run(&own, device.volume(), &backing))?;
        Ok(Self {
            wishes,
            thread: Some(thread),
        })
    }
}

impl Drop for Rehomer {
    fn drop(&mut self) {
        self.wishes.is_over.store(true, Ordering::Relaxed);
        drop(self.wishes.progress());
        self.wishes.bell.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that moves blocks had panicked");
        }
    }
}

fn run(wishes: &Wishes, volume: &Volume, backing: &Arc<FileBacking>) {
    let shared = volume.shared();
    let is_over = || wishes.is_over.load(Ordering::Relaxed);
    let mut seen = shared.activity();
    let mut is_tidy = false;
    while !is_over() {
        wishes.wait(IDLE);
        if wishes.wants_compact.swap(false, Ordering::Relaxed) {
            serve_compact(wishes, volume, backing);
            continue;
        }
        let now = shared.activity();
        if now != seen {
            (seen, is_tidy) = (now, false);
            continue;
        }
        let rate = wishes.rate.load(Ordering::Relaxed);
        if is_tidy || rate == 0 || is_over() || volume.phase() != Phase::Serving {
            continue;
        }
        // Whatever comes of it: again after the next requests.
        is_tidy = true;
        if let Err(error) = tidy(wishes, volume, backing, seen) {
            tracing::warn!("moving scattered blocks together: {error:#}");
        }
    }
}

fn tidy(
    wishes: &Wishes,
    volume: &Volume,
    backing: &Arc<FileBacking>,
    seen: u64,
) -> anyhow::Result<()> {
    let shared = volume.shared();
    let began = Instant::now();
    let bytes_moved = || shared.stats().blocks_moved.load(Ordering::Relaxed) * BLOCK_LEN as u64;
    let first = bytes_moved();
    let looks = AtomicU64::new(0);
    let may_go_on = || {
        shared.activity() == seen
            && !wishes.is_over.load(Ordering::Relaxed)
            && !wishes.wants_compact.load(Ordering::Relaxed)
            && wishes.rate.load(Ordering::Relaxed) > 0
    };
    let pace = |_| {
        let looked = looks.fetch_add(SLICE, Ordering::Relaxed) * LOOK_COST;
        while may_go_on() {
            let rate = wishes.rate.load(Ordering::Relaxed).max(1);
            let cost = bytes_moved() - first + looked;
            let due = Duration::from_secs_f64(cost as f64 / rate as f64);
            let Some(rest) = due.checked_sub(began.elapsed()).filter(|d| !d.is_zero()) else {
                return;
            };
            wishes.wait(rest.min(Duration::from_millis(50)));
        }
    };
    let is_whole = Walker::new(volume, Arc::clone(backing), &may_go_on, &pace)?.tidy()?;
    let moved = (bytes_moved() - first) / BLOCK_LEN as u64;
    if moved > 0 {
        tracing::debug!(moved, is_whole, "moved scattered blocks together");
    }
    Ok(())
}

fn serve_compact(wishes: &Wishes, volume: &Volume, backing: &Arc<FileBacking>) {
    let parts = volume.shared().parts();
    let may_go_on = || !wishes.is_over.load(Ordering::Relaxed);
    let told = |done| {
        let mut progress = wishes.progress();
        (progress.done, progress.parts) = (done, parts);
    };
    let outcome = if volume.phase() == Phase::Serving {
        compact(volume, Arc::clone(backing), &may_go_on, &told)
    } else {
        Err(anyhow::anyhow!(
            "no guest is attached yet: stop the card and compact the volume itself"
        ))
    };
    *wishes.progress() = outcome.unwrap_or_else(|error| Progress {
        error: Some(format!("{error:#}")),
        ..Progress::default()
    });
}

/// Parameters of the method `compact`.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct CompactParams {
    start: bool,
}

/// Parameters of the method `rehome`.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RehomeParams {
    rate: Option<u64>,
}

fn params<T: Default + for<'de> Deserialize<'de>>(value: Value) -> Result<T, ControlError> {
    if value.is_null() {
        return Ok(T::default());
    }
    serde_json::from_value(value).map_err(|error| ControlError::bad_params(error.to_string()))
}

/// The control methods `compact` and `rehome`.
pub(super) fn methods(
    server: ControlServer,
    handle: &Handle,
    device: &Arc<BlockDevice>,
) -> ControlServer {
    let (of_compact, of_rehome, device) = (handle.clone(), handle.clone(), Arc::clone(device));
    let refused = |handle: &Handle| {
        let is_writable = handle.0.is_writable;
        let refusal = || ControlError::failed("the volume is served read-only: nothing moves");
        is_writable.then_some(()).ok_or_else(refusal)
    };
    server
        .method("compact", move |value| {
            if params::<CompactParams>(value)?.start {
                refused(&of_compact)?;
                of_compact.compact();
            }
            Ok(json!(of_compact.progress()))
        })
        .method("rehome", move |value| {
            if let Some(rate) = params::<RehomeParams>(value)?.rate {
                refused(&of_rehome)?;
                of_rehome.set_rate(rate);
            }
            let shared = device.volume().shared();
            Ok(json!({
                "rate": of_rehome.rate(),
                "moved_blocks": shared.stats().blocks_moved.load(Ordering::Relaxed),
                "scattered_parts": shared.scattered(),
                "parts": shared.parts(),
            }))
        })
}
