//! What a card implements: a [`Device`] that answers the control plane, and one [`QueueHandler`]
//! a virtqueue that moves data.
//!
//! ```text
//!  connection thread                         one thread a queue
//!  ─────────────────                         ──────────────────
//!  vhost_user::connection                    worker::QueueThread
//!    │ messages, fds                           │ kicks, completions, wakes: one io_uring, one wait
//!    ▼                                         ▼
//!  vhost_user::protocol (sans-IO)            QueueHandler::{request, batch_end, completion, wake}
//!    │ actions                                 │ I/O submitted through QueueIo
//!    ▼                                         ▼
//!  Device::{config, start, stop}  ───────►  the card's shared state
//! ```
//!
//! A device is shared by all threads; a handler belongs to one.

use std::sync::Arc;

use crate::inflight::SharedRegion;
use crate::worker::{QueueIo, Waker};

/// Why a device refuses what the frontend asks. The text is for the person who reads the log.
pub type DeviceError = Box<dyn std::error::Error + Send + Sync>;

/// A virtio device behind the vhost-user control plane.
pub trait Device: Send + Sync + 'static {
    /// The data path of one virtqueue.
    type Queue: QueueHandler;

    /// Device feature bits offered (virtio 1.3, 5.x.3), without those that the house adds:
    /// VERSION_1, RING_INDIRECT_DESC, RING_EVENT_IDX, VHOST_USER_F_PROTOCOL_FEATURES.
    fn features(&self) -> u64;

    /// Number of virtqueues.
    fn queue_count(&self) -> u16;

    /// Largest queue size accepted; a power of two.
    fn queue_size_max(&self) -> u16;

    /// The device configuration space as it is now.
    fn config(&self) -> Vec<u8>;

    /// A write of the driver to the configuration space.
    ///
    /// # Errors
    /// The range is out of bounds or the field is read-only.
    fn write_config(&self, offset: u32, data: &[u8]) -> Result<(), DeviceError>;

    /// The features that the driver accepted. Called before any ring starts.
    fn set_features(&self, acked: u64);

    /// Whether the frontend is to tell an MTU (VHOST_USER_PROTOCOL_F_NET_MTU): network devices.
    fn has_mtu(&self) -> bool {
        false
    }

    /// NET_SET_MTU: bytes of an IP packet that the driver's interface takes.
    ///
    /// # Errors
    /// The device cannot work with it; the frontend is told.
    fn set_mtu(&self, mtu: u64) -> Result<(), DeviceError> {
        Err(format!("an MTU of {mtu} for a device that has none").into())
    }

    /// Bytes that the device wants in the in-flight region behind the vhost-user part.
    fn inflight_extra_len(&self) -> usize {
        0
    }

    /// GET_INFLIGHT_FD made a new region; `extra` is zeroed and not yet used by any ring.
    ///
    /// # Errors
    /// The device cannot give up what an older region of it still holds.
    fn inflight_create(&self, extra: &SharedRegion) -> Result<(), DeviceError> {
        let _ = extra;
        Ok(())
    }

    /// Called once before the first ring of a connection starts, and again when SET_INFLIGHT_FD
    /// brings a region while no ring runs. `extra` is the device's part of the region that the
    /// frontend keeps: it may be one that an earlier, killed process filled. `None`: this
    /// frontend keeps no in-flight region.
    ///
    /// # Errors
    /// The device cannot serve this frontend; the connection is closed and the reason logged.
    fn start(&self, extra: Option<Arc<SharedRegion>>) -> Result<(), DeviceError>;

    /// GET_VRING_BASE has stopped the last ring that ran; called before its reply. Frontends free
    /// the in-flight region once a device is reset (QEMU does), so what only that region holds
    /// has to be safe elsewhere when this returns.
    fn rings_stopped(&self) {}

    /// All rings are stopped and the frontend has left or was dropped.
    fn stop(&self);

    /// The queue whose thread and handler serves `queue`; at most `queue`, and its own leader.
    /// Each has its own if the device does not say otherwise.
    fn leader(&self, queue: u16) -> u16 {
        queue
    }

    /// For how long a queue's thread may look for its next event before it sleeps, if events have
    /// been coming that quickly. Zero: never.
    fn poll_limit(&self) -> std::time::Duration {
        std::time::Duration::ZERO
    }

    /// Makes the handler of queue `index` (`0..queue_count()`), on the queue's own thread, once
    /// for each start of the process. `waker` makes the queue's loop call
    /// [`QueueHandler::wake`], from any thread.
    ///
    /// # Errors
    /// Resources could not be had.
    fn queue(&self, index: u16, waker: Waker) -> Result<Self::Queue, DeviceError>;
}

/// The data path of one virtqueue. All calls come from the queue's own thread.
pub trait QueueHandler {
    /// A descriptor chain was popped. It must come back through [`QueueIo::complete`], now or
    /// later, also on error.
    fn request(&mut self, chain: Chain, io: &mut QueueIo<'_>);

    /// The chains that were available have all been handed over (or a batch limit was reached).
    fn batch_end(&mut self, io: &mut QueueIo<'_>);

    /// An operation submitted with [`QueueIo::push`] has completed: the kernel's `res`.
    fn completion(&mut self, user_data: u64, res: i32, io: &mut QueueIo<'_>);

    /// [`Waker::wake`] was called since the last time. Wakes are merged.
    fn wake(&mut self, io: &mut QueueIo<'_>);

    /// Called after each round of the above, before the loop submits and sleeps.
    fn round_end(&mut self, io: &mut QueueIo<'_>) {
        let _ = io;
    }

    /// Whether the handler has work left that it put off to let others have their turn: then the
    /// loop goes on with a round, without sleeping.
    fn has_more(&self) -> bool {
        false
    }

    /// Whether what was done since the last round's end is enough to be shown to the driver before more
    /// chains are handed over. Asked after each chain: large ones would make the driver wait for all of
    /// a batch, and then the handler for the driver.
    fn has_enough(&self) -> bool {
        false
    }

    /// The ring is to stop: no chain comes any more, and the stop waits for those held. What the
    /// handler holds back by its own choice (rate limits) has to go on now. Called in each round
    /// until the ring has stopped.
    fn stopping(&mut self, io: &mut QueueIo<'_>) {
        let _ = io;
    }

    /// When [`QueueHandler::wake`] is to be called at the latest, if ever (rate limits, timers).
    fn deadline(&self) -> Option<std::time::Instant> {
        None
    }

    /// The thread is about to end, and no chain is held: cancel operations that would not complete
    /// by themselves. The handler is dropped when all of its operations have completed.
    fn shutdown(&mut self, io: &mut QueueIo<'_>) {
        let _ = io;
    }

    /// The thread ends at once: its io_uring failed, or a call of the handler panicked. Nothing else of
    /// the handler is called afterwards, and it is not dropped, since the kernel may still have
    /// its buffers. Whoever else waits for what it was doing must be told now.
    fn abandoned(&mut self) {}

    /// Whether the chains of `queue` are taken with [`QueueIo::pop`] as they are needed, not handed
    /// to [`Self::request`] as they come. Asked once.
    fn is_pulled(&self, queue: u16) -> bool {
        let _ = queue;
        false
    }

    /// Chains held by the handler. The ring is stopped only when this is 0.
    fn chains_held(&self) -> usize;
}

/// One buffer of a descriptor chain, in guest physical memory. Not yet checked against the
/// memory map: access through the guest memory fails cleanly when it is out of range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
}

/// Segments of one direction.
pub type Segments = smallvec::SmallVec<[Segment; 4]>;

/// A descriptor chain that was popped off the available ring. Its descriptors have been walked
/// once, with a bound: indirect tables resolved, no loop, device-readable before
/// device-writable (virtio 1.3, 2.7.4.2), both totals below 4 GiB.
#[derive(Debug)]
pub struct Chain {
    /// What must come back through [`QueueIo::complete`].
    pub token: ChainToken,
    /// Device-readable buffers in order.
    pub readable: Segments,
    /// Device-writable buffers in order.
    pub writable: Segments,
}

/// Proof that a chain is out and has to come back. Not `Copy`: completing takes it.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a chain that is not completed is lost to the guest"]
pub struct ChainToken {
    /// Head descriptor index.
    pub(crate) head: u16,
    /// Which ring of its thread it is of.
    pub(crate) slot: u16,
}
