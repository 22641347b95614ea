//! A card's vhost-user server: the queue threads, and one frontend after the other.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use thiserror::Error;
use tracing::{info, warn};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::config_change::{ConfigChangeNotifier, Notified};
use super::connection::{Connection, End, Queue, RequestError};
use super::message::CONFIG_SPACE_LEN;
use super::protocol::{F_PROTOCOL_FEATURES, Offer, Protocol};
use super::socket::Socket;
use crate::cli::Listener;
use crate::device::Device;
use crate::stop::StopSignal;
use crate::telemetry::{QueueStats, RateLimited, shown, with_causes};
use crate::worker::{QueueThread, WorkerError};

/// What the house adds to [`Device::features`].
const HOUSE_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

/// SET_VRING_KICK has 8 bits for the queue's index.
const QUEUES_MAX: u16 = 256;

/// How many lines a frontend may cause at once, and how often after that.
const LOG_BURST: u32 = 20;
const LOG_INTERVAL: Duration = Duration::from_secs(5);

/// Why a backend cannot be made, or cannot go on.
#[derive(Debug, Error)]
pub enum BackendError {
    /// The device describes itself in a way that cannot be offered.
    #[error("the device cannot be offered: {0}")]
    Device(&'static str),
    /// A queue's thread could not be started, or has died; the card has to be restarted.
    #[error(transparent)]
    Queue(#[from] WorkerError),
    /// The socket does not work.
    #[error("cannot accept frontends on the vhost-user socket")]
    Socket(#[source] io::Error),
    /// Another thread serves already.
    #[error("this backend is being served by another thread")]
    Busy,
}

/// A device behind vhost-user: one thread a queue, started with the backend and kept while
/// frontends come and go.
///
/// A frontend that errs loses its connection, or only the request, never the process; the table
/// in `docs/control-plane.md` says which.
#[derive(Debug)]
pub struct Backend<D: Device> {
    inner: Inner<D, QueueThread>,
}

impl<D: Device> Backend<D> {
    /// Starts the threads of all queues. `stats` has one entry a queue.
    ///
    /// # Errors
    /// A thread cannot be started, or the device's numbers make no sense.
    pub fn new(device: Arc<D>, stats: &[Arc<QueueStats>]) -> Result<Self, BackendError> {
        if stats.len() != usize::from(device.queue_count()) {
            return Err(BackendError::Device(
                "one QueueStats for each queue is needed",
            ));
        }
        let leads = |queue| device.leader(queue);
        if (0..device.queue_count()).any(|q| leads(q) > q || leads(leads(q)) != leads(q)) {
            return Err(BackendError::Device(
                "a queue has a leader that does not lead",
            ));
        }
        let inner = Inner::new(Arc::clone(&device), |device| {
            let queues = || (0..device.queue_count()).zip(stats);
            let mut threads = Vec::new();
            for leader in 0..device.queue_count() {
                let group: Vec<_> = queues()
                    .filter(|(queue, _)| device.leader(*queue) == leader)
                    .map(|(queue, stats)| (queue, Arc::clone(stats)))
                    .collect();
                threads.extend(QueueThread::spawn_group(Arc::clone(device), group)?);
            }
            threads.sort_by_key(QueueThread::index);
            Ok(threads)
        })?;
        Ok(Self { inner })
    }

    /// Serves frontends that come from `listener`, one at a time, until the stop or until there
    /// are no more. Others wait in the backlog. The socket's file is removed in the end.
    ///
    /// # Errors
    /// The listener is unusable, or a queue's thread died. What frontends do is no error.
    pub fn serve(&self, mut listener: Listener, stop: &StopSignal) -> Result<(), BackendError> {
        while let Some(stream) = listener.accept(stop).map_err(BackendError::Socket)? {
            self.serve_connected(stream, stop)?;
        }
        Ok(())
    }

    /// Serves one frontend that is connected already (`--fd`) until it leaves or the stop.
    ///
    /// # Errors
    /// A queue's thread died. What the frontend does is no error.
    pub fn serve_connected(
        &self,
        stream: UnixStream,
        stop: &StopSignal,
    ) -> Result<(), BackendError> {
        self.inner.serve_connected(stream, stop)
    }

    /// Tells the frontend that [`Device::config`] gives something new. Never blocks.
    pub fn config_changed(&self) -> Notified {
        self.inner.notifier.notify()
    }

    /// The same, to be kept by whoever changes the configuration.
    #[must_use]
    pub fn config_change_notifier(&self) -> ConfigChangeNotifier {
        self.inner.notifier()
    }
}

/// [`Backend`] with any kind of queue.
#[derive(Debug)]
pub(super) struct Inner<D, Q> {
    device: Arc<D>,
    queues: Vec<Q>,
    notifier: ConfigChangeNotifier,
    /// Held while serving.
    log: Mutex<RateLimited>,
}

impl<D: Device, Q: Queue> Inner<D, Q> {
    pub(super) fn new(
        device: Arc<D>,
        queues: impl FnOnce(&Arc<D>) -> Result<Vec<Q>, WorkerError>,
    ) -> Result<Self, BackendError> {
        if device.queue_count() == 0 || device.queue_count() > QUEUES_MAX {
            return Err(BackendError::Device("it needs between 1 and 256 queues"));
        }
        if !device.queue_size_max().is_power_of_two() {
            return Err(BackendError::Device("the queue size is not a power of two"));
        }
        if device.config().len() > CONFIG_SPACE_LEN as usize {
            return Err(BackendError::Device(
                "its configuration has more than 256 bytes",
            ));
        }
        Ok(Self {
            queues: queues(&device)?,
            device,
            notifier: ConfigChangeNotifier::default(),
            log: Mutex::new(RateLimited::new(LOG_BURST, LOG_INTERVAL)),
        })
    }

    pub(super) fn notifier(&self) -> ConfigChangeNotifier {
        self.notifier.clone()
    }

    pub(super) fn serve_connected(
        &self,
        stream: UnixStream,
        stop: &StopSignal,
    ) -> Result<(), BackendError> {
        let mut log = match self.log.try_lock() {
            Ok(log) => log,
            Err(std::sync::TryLockError::Poisoned(log)) => PoisonError::into_inner(log),
            Err(std::sync::TryLockError::WouldBlock) => return Err(BackendError::Busy),
        };
        let device = self.device.as_ref();
        let protocol = Protocol::new(Offer {
            features: (device.features() | HOUSE_FEATURES) & !F_PROTOCOL_FEATURES,
            queue_count: device.queue_count(),
            queue_size_max: device.queue_size_max(),
            has_config: !device.config().is_empty(),
            has_mtu: device.has_mtu(),
        });
        if let Some(suppressed) = log.allow(Instant::now()) {
            info!(suppressed = shown(suppressed), "a frontend has connected");
        }
        let mut report = |request: u32, error: &RequestError| {
            if let Some(suppressed) = log.allow(Instant::now()) {
                warn!(
                    request,
                    suppressed = shown(suppressed),
                    "a frontend's request failed: {}",
                    with_causes(error)
                );
            }
        };
        let end = Connection::new(
            Socket::new(stream, stop),
            device,
            &self.queues,
            &self.notifier,
            protocol,
            &mut report,
        )
        .run();
        match end {
            End::Stopped => {}
            End::Left => {
                if let Some(suppressed) = log.allow(Instant::now()) {
                    info!(suppressed = shown(suppressed), "the frontend has left");
                }
            }
            End::Request {
                source: RequestError::Queue(error),
                ..
            } => return Err(error.into()),
            End::Socket(_) | End::Request { .. } => {
                if let Some(suppressed) = log.allow(Instant::now()) {
                    warn!(
                        suppressed = shown(suppressed),
                        "the frontend is disconnected: {}",
                        with_causes(&end)
                    );
                }
            }
        }
        Ok(())
    }
}
