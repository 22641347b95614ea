//! The volume as a virtio-blk device (virtio 1.3, 5.2).
//!
//! | module | knows | does I/O |
//! |---|---|---|
//! | [`request`] | what a chain asks for | no |
//! | [`config`] | features, configuration space, cache modes | no |
//! | [`payload`] | a request's buffers in guest memory | no |
//! | [`ring`] | the in-flight region as delta ring | no |
//! | [`limits`] | operations and bytes a second | reads the clock |
//! | [`driver`] | the engine's operations as io_uring entries | by its owner |
//! | [`queue`] | a queue's requests from chain to status | through its thread's io_uring |
//! | [`report`] | the engine's reports as log lines | |
//! | [`resize`] | growing under a running guest | in a thread of its own |
//! | [`watch`] | how much room is left | in a thread of its own |
//!
//! # Several sockets
//! A volume that nobody writes can be shown on several sockets: a [`BlockDevice::sibling`] each, with
//! rings, features and counters of its own, over one engine, one backing and one [`Limits`]. A
//! volume that is written has one frontend: its in-flight region is what survives a killed card,
//! and guests with a file system of their own each would destroy the one on the volume.
//!
//! # When what becomes durable
//! A write is acknowledged once its data are in the backing's hands and its delta is in the
//! in-flight region, which survives a kill of the card but not the end of the guest. Whatever
//! frees that region must find its contents safe elsewhere first: [`BlockDevice`] settles the
//! volume when the last ring stops (the frontend may be about to reset the device and free the
//! region), when a new region is asked for, and when the frontend leaves.

pub mod config;
pub mod driver;
pub mod limits;
pub mod payload;
pub mod queue;
pub mod report;
pub mod request;
pub mod resize;
pub mod ring;
pub mod watch;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use offload::device::{Device, DeviceError};
use offload::inflight::SharedRegion;
use offload::telemetry::{QueueStats, Registry};
use offload::worker::Waker;
use thiserror::Error;

use self::config::{CacheMode, Config};
use self::driver::Driver;
use self::limits::Limits;
use self::queue::{BlockQueue, Latencies};
use self::request::Terms;
use self::ring::RegionMemory;
use crate::volume::backing::FileBacking;
use crate::volume::engine::{AttachError, Lane, Phase, Stats, Volume};
use crate::volume::ring::{self as delta_ring, RING_LEN, RingError, RingMemory};
use crate::volume::superblock::SERIAL_LEN;

/// What the driver may not do.
#[derive(Debug, Error)]
enum DriverError {
    #[error(
        "the driver wrote {len} bytes at {offset} of the configuration, where only the cache mode \
         (one byte at 32, 0 or 1, with CONFIG_WCE) can be written"
    )]
    Config { offset: u32, len: usize },
}

/// A guest that outlived the card of its ephemeral volume must not find an empty disk instead.
const EPHEMERAL_LOST: &str = "this guest was using another ephemeral volume, whose card has ended: its \
    data and its key are gone. Restart the guest; it will find an empty disk";

/// How a volume is shown to the guest.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Takes no writes.
    pub is_read_only: bool,
    /// The volume and its key end with this process.
    pub is_ephemeral: bool,
    /// Queues.
    pub queues: u16,
    /// Largest queue size, a power of two.
    pub queue_size: u16,
    /// What GET_ID answers, zero-padded.
    pub serial: [u8; SERIAL_LEN],
    /// For how long a queue may look for its next event before it sleeps.
    pub poll_limit: Duration,
}

/// What all queues share.
pub(crate) struct State {
    volume: Arc<Volume>,
    backing: Arc<FileBacking>,
    settings: Settings,
    limits: Limits,
    acked: AtomicU64,
    is_writeback: AtomicBool,
    /// The driver's own choice of cache mode, for the in-flight region to remember.
    choice: Mutex<Choice>,
    has_warned: AtomicBool,
}

/// A cache mode that the driver chose, and where the next card process will find it.
#[derive(Default)]
struct Choice {
    mode: Option<CacheMode>,
    region: Option<Arc<SharedRegion>>,
}

/// What a queue looks up for each request.
struct QueueTerms {
    request: Terms,
    is_writeback: bool,
}

impl State {
    fn terms(&self) -> QueueTerms {
        // Relaxed: features change before a ring starts, which synchronises by itself; when a new
        // cache mode takes effect between two requests is nobody's promise.
        QueueTerms {
            request: Terms {
                features: self.acked.load(Ordering::Relaxed),
                volume_len: self.volume.shared().volume_len(),
                is_read_only: self.settings.is_read_only,
            },
            is_writeback: self.is_writeback.load(Ordering::Relaxed),
        }
    }

    fn serial(&self) -> &[u8; SERIAL_LEN] {
        &self.settings.serial
    }
}

/// A volume behind vhost-user.
pub struct BlockDevice {
    state: Arc<State>,
    stats: Vec<Arc<QueueStats>>,
    latencies: Vec<Arc<Latencies>>,
    announcers: resize::Announcers,
}

impl BlockDevice {
    /// Shows `volume`, which lies in `backing` and may use what `limits` say.
    pub fn new(
        volume: Volume,
        backing: Arc<FileBacking>,
        settings: Settings,
        limits: Limits,
    ) -> Self {
        Self::with(Arc::new(volume), backing, settings, limits)
    }

    /// The same volume for the frontends of another socket.
    #[must_use]
    pub fn sibling(&self) -> Self {
        debug_assert!(self.state.settings.is_read_only, "writers do not share");
        Self::with(
            Arc::clone(&self.state.volume),
            Arc::clone(&self.state.backing),
            self.state.settings.clone(),
            self.state.limits.clone(),
        )
    }

    fn with(
        volume: Arc<Volume>,
        backing: Arc<FileBacking>,
        settings: Settings,
        limits: Limits,
    ) -> Self {
        let each = 0..settings.queues;
        Self {
            stats: each.clone().map(|_| Arc::default()).collect(),
            latencies: each.map(|_| Arc::default()).collect(),
            announcers: resize::Announcers::default(),
            state: Arc::new(State {
                volume,
                backing,
                settings,
                limits,
                acked: AtomicU64::new(0),
                is_writeback: AtomicBool::new(true),
                choice: Mutex::default(),
                has_warned: AtomicBool::new(false),
            }),
        }
    }

    /// The counters of each queue.
    pub fn queue_stats(&self) -> &[Arc<QueueStats>] {
        &self.stats
    }

    /// What the volume may use.
    pub fn limits(&self) -> &Limits {
        &self.state.limits
    }

    /// The volume.
    pub fn volume(&self) -> &Volume {
        &self.state.volume
    }

    /// Shows counters and latencies of its queues. `socket` tells it from its siblings.
    pub fn register_queues(&self, registry: &Registry, socket: Option<&str>) {
        for (index, (stats, latencies)) in (0_u16..).zip(self.stats.iter().zip(&self.latencies)) {
            let mut labels = vec![("queue", index.to_string())];
            labels.extend(socket.map(|socket| ("socket", socket.to_owned())));
            registry.labelled_queue(&labels, stats);
            for (name, help, histogram) in [
                ("read", "Latency of reads", &latencies.read),
                ("write", "Latency of writes", &latencies.write),
                (
                    "flush",
                    "Latency of flushes, discards and zero writes",
                    &latencies.flush,
                ),
            ] {
                registry.histogram(name, help, labels.clone(), Arc::clone(histogram));
            }
        }
    }

    /// Shows the counters of the volume, which siblings have in common.
    pub fn register_volume(&self, registry: &Registry) {
        self.state.limits.register(registry);
        type Field = fn(&Stats) -> &AtomicU64;
        let fields: [(Field, &'static str, &'static str); 12] = [
            (
                |s| &s.not_authentic,
                "not_authentic",
                "Blocks, pages and records that did not authenticate",
            ),
            (
                |s| &s.blocks_opened,
                "blocks_opened",
                "Blocks read and authenticated",
            ),
            (
                |s| &s.blocks_sealed,
                "blocks_sealed",
                "Blocks sealed and written",
            ),
            (
                |s| &s.blocks_moved,
                "blocks_moved",
                "Blocks moved together or out of the way",
            ),
            (|s| &s.commits, "commits", "Commits made durable"),
            (
                |s| &s.checkpoints,
                "checkpoints",
                "Checkpoints made durable",
            ),
            (
                |s| &s.backing_errors,
                "backing_errors",
                "Operations of the backing that failed",
            ),
            (
                |s| &s.map_hits,
                "map_hits",
                "Leaves of the map that were needed and in memory",
            ),
            (
                |s| &s.map_misses,
                "map_misses",
                "Pages of the map that had to be read first",
            ),
            (
                |s| &s.map_evictions,
                "map_evictions",
                "Pages of the map that made room for others",
            ),
            (
                |s| &s.map_pages,
                "map_pages",
                "Pages of the map in memory, 4 KiB each",
            ),
            (
                |s| &s.map_unwritten,
                "map_unwritten_pages",
                "Pages of the map in memory whose changes are not stored yet",
            ),
        ];
        for (field, name, help) in fields {
            let shared = Arc::clone(self.state.volume.shared());
            registry.gauge(name, help, vec![], move || {
                field(shared.stats()).load(Ordering::Relaxed)
            });
        }
    }

    /// What only the in-flight region holds becomes durable.
    fn settle(&self) {
        if self.state.volume.phase() != Phase::Serving {
            return;
        }
        if let Err(error) = self.state.volume.settle() {
            tracing::error!("{error}");
        }
    }
}

impl Device for BlockDevice {
    type Queue = BlockQueue;

    fn features(&self) -> u64 {
        config::features(self.state.settings.is_read_only)
    }

    fn queue_count(&self) -> u16 {
        self.state.settings.queues
    }

    fn queue_size_max(&self) -> u16 {
        self.state.settings.queue_size
    }

    fn config(&self) -> Vec<u8> {
        Config {
            volume_len: self.state.volume.shared().volume_len(),
            queues: self.state.settings.queues,
            queue_size: self.state.settings.queue_size,
            is_writeback: self.state.is_writeback.load(Ordering::Relaxed),
        }
        .bytes()
    }

    fn write_config(&self, offset: u32, data: &[u8]) -> Result<(), DeviceError> {
        let acked = self.state.acked.load(Ordering::Relaxed);
        let len = data.len();
        let mode =
            CacheMode::written(acked, offset, data).ok_or(DriverError::Config { offset, len })?;
        self.set_mode(mode);
        let mut choice = self.choice();
        choice.mode = Some(mode);
        if let Some(region) = &choice.region {
            ring::remember_mode(region, mode);
        }
        Ok(())
    }

    fn set_features(&self, acked: u64) {
        self.state.acked.store(acked, Ordering::Relaxed);
        self.set_mode(CacheMode::initial(acked));
        self.choice().mode = None;
    }

    fn inflight_extra_len(&self) -> usize {
        RING_LEN
    }

    fn inflight_create(&self, extra: &SharedRegion) -> Result<(), DeviceError> {
        let volume = &self.state.volume;
        if volume.phase() == Phase::Serving && !volume.shared().is_poisoned() {
            volume.settle()?;
        }
        let memory = RegionMemory(Arc::new(extra.clone()));
        Ok(delta_ring::format_fresh(&memory, &volume.id())?)
    }

    fn start(&self, extra: Option<Arc<SharedRegion>>) -> Result<(), DeviceError> {
        if self.state.settings.is_read_only {
            return Ok(());
        }
        if self.state.volume.shared().is_poisoned() {
            // What is acknowledged can still be read. The ring stays as it is: the next card process
            // takes over what it holds.
            tracing::warn!("the volume failed earlier: this frontend can read it, not write to it");
            return Ok(());
        }
        if extra.is_none() && !self.state.has_warned.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                "this frontend keeps no in-flight region: should the card be killed, writes that \
                 the guest has not flushed are lost, as in a power cut"
            );
        }
        let memory = extra
            .clone()
            .map(|region| Arc::new(RegionMemory(region)) as Arc<dyn RingMemory>);
        match self.state.volume.attach(memory) {
            Err(AttachError::Ring(RingError::OtherVolume)) if self.state.settings.is_ephemeral => {
                return Err(EPHEMERAL_LOST.into());
            }
            attached => attached?,
        }
        // A frontend does not write the configuration again to a card that was restarted, and the
        // guest still counts on the mode that it chose.
        let mut choice = self.choice();
        if let Some(region) = &extra {
            match (choice.mode, ring::recall_mode(region)) {
                (Some(mode), _) => ring::remember_mode(region, mode),
                (None, Some(mode)) => self.set_mode(mode),
                (None, None) => {}
            }
        }
        choice.region = extra;
        Ok(())
    }

    fn rings_stopped(&self) {
        self.settle();
    }

    fn stop(&self) {
        self.settle();
    }

    fn poll_limit(&self) -> Duration {
        self.state.settings.poll_limit
    }

    fn queue(&self, index: u16, waker: Waker) -> Result<BlockQueue, DeviceError> {
        let at = usize::from(index);
        let (Some(stats), Some(latencies)) = (self.stats.get(at), self.latencies.get(at)) else {
            return Err(format!("there is no queue {index}").into());
        };
        let shared = Arc::clone(self.state.volume.shared());
        let gate = self.state.limits.gate(waker.clone());
        let lane = Lane::new(shared, Arc::new(move || waker.wake()));
        Ok(BlockQueue::new(
            Arc::clone(&self.state),
            Arc::clone(stats),
            Arc::clone(latencies),
            gate,
            lane,
            Driver::new(Arc::clone(&self.state.backing)),
        ))
    }
}

impl BlockDevice {
    fn choice(&self) -> MutexGuard<'_, Choice> {
        let choice = self.state.choice.lock();
        choice.unwrap_or_else(PoisonError::into_inner)
    }

    fn set_mode(&self, mode: CacheMode) {
        let flag = &self.state.is_writeback;
        flag.store(mode.is_writeback, Ordering::Relaxed);
    }
}
