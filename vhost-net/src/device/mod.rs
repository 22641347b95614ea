//! The virtio-net device (virtio 1.3, 5.1): features, and queue pairs of one thread each.
//!
//! | feature | why |
//! |---|---|
//! | MRG_RXBUF | a super-segment lies in as many small buffers as it needs |
//! | CSUM, GUEST_CSUM | nobody sums up what never leaves memory |
//! | HOST_TSO4, HOST_TSO6 | the guest sends 64 KiB at once |
//! | GUEST_TSO4 | and is sent 64 KiB at once; the stack, which is smoltcp, has none for IPv6 |
//! | GUEST_TSO6 | the same from other guests of a private network |
//! | MTU | the guest's interface has the right one without DHCP |
//! | MQ | more pairs, more threads |
//!
//! # Several queue pairs
//! Each pair is a thread with a card of its own: services, policy, flows, sockets. A flow stays
//! with the pair that opened it, whose receive queue its packets come by; what the driver sends of
//! it through another pair is handed over (`exchange`, [`crate::stack::Owners`]). Services answer on
//! the pair that was asked. One pair is the default of `serve`, as it is QEMU's: it shares nothing,
//! and one thread carries more than most guests ask for. More of them pay where a guest has
//! processors to spare and the host has as many for the card.
//!
//! GET_QUEUE_NUM says how many queues there are, two for each pair. QEMU and DPDK compare it with
//! their number of pairs, Cloud Hypervisor with its queues; who asks for more pairs than there are
//! is refused at the first message about a queue that does not exist.
//!
//! MAC, the control queue and the configuration space are QEMU's for `vhost-user` network
//! backends: the device offers none, and thereby no CONFIG protocol feature.

use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use offload::device::{Device, DeviceError};
use offload::inflight::SharedRegion;
use offload::telemetry::{QueueStats, Registry};
use offload::worker::Waker;
use virtio_bindings::virtio_net;

use crate::capture::Tap;
use crate::card::{Card, CardStats};
use crate::host::HostSockets;
use crate::host::publish::Published;
use crate::lan::Lan;
use crate::lan::segment::Takes;
use crate::locals::{LocalOptions, LocalSide};
use crate::spec::{MTU_MIN, Spec};
use crate::stack::{Accepts, Owners, Settings, Share, Stack};

mod exchange;
pub mod limits;
mod network;
mod pair;
pub mod publisher;
mod rings;

use exchange::Exchange;
use limits::{Limits, LimitsError, LimitsSpec};
pub use pair::Pair;

#[cfg(test)]
mod pairs_tests;

const CSUM: u64 = 1 << virtio_net::VIRTIO_NET_F_CSUM;
const GUEST_CSUM: u64 = 1 << virtio_net::VIRTIO_NET_F_GUEST_CSUM;
const MTU: u64 = 1 << virtio_net::VIRTIO_NET_F_MTU;
const GUEST_TSO4: u64 = 1 << virtio_net::VIRTIO_NET_F_GUEST_TSO4;
const GUEST_TSO6: u64 = 1 << virtio_net::VIRTIO_NET_F_GUEST_TSO6;
const HOST_TSO4: u64 = 1 << virtio_net::VIRTIO_NET_F_HOST_TSO4;
const HOST_TSO6: u64 = 1 << virtio_net::VIRTIO_NET_F_HOST_TSO6;
const MRG_RXBUF: u64 = 1 << virtio_net::VIRTIO_NET_F_MRG_RXBUF;
const MQ: u64 = 1 << virtio_net::VIRTIO_NET_F_MQ;
const VERSION_1: u64 = 1 << 32;

/// What the device offers.
pub const FEATURES: u64 =
    CSUM | GUEST_CSUM | MTU | GUEST_TSO4 | GUEST_TSO6 | HOST_TSO4 | HOST_TSO6 | MRG_RXBUF | MQ;

/// Largest queue size: what QEMU has for network devices.
const QUEUE_SIZE_MAX: u16 = 1024;

/// Most queue pairs of an interface.
pub const PAIRS_MAX: u16 = 8;

/// What the driver accepted, in the form that the data path needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// Bytes of the virtio-net header.
    pub header_len: usize,
    /// A frame may lie in several buffers.
    pub merges: bool,
    /// What may be sent to it.
    pub accepts: Accepts,
    /// What a member of its private network may have sent.
    pub takes: Takes,
}

impl Negotiated {
    /// From feature bits.
    #[must_use]
    pub fn new(acked: u64) -> Self {
        let partial = acked & GUEST_CSUM != 0;
        Self {
            header_len: if acked & (VERSION_1 | MRG_RXBUF) == 0 {
                crate::frame::header::LEGACY_HEADER_LEN
            } else {
                crate::frame::header::HEADER_LEN
            },
            merges: acked & MRG_RXBUF != 0,
            accepts: Accepts {
                partial,
                // A driver must not accept it without GUEST_CSUM (5.1.3.1).
                tso4: partial && acked & GUEST_TSO4 != 0,
            },
            takes: Takes {
                partial,
                tso4: partial && acked & GUEST_TSO4 != 0,
                tso6: partial && acked & GUEST_TSO6 != 0,
            },
        }
    }
}

/// What all queue pairs share and the control plane changes.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) spec: Arc<Spec>,
    pub(crate) settings: Settings,
    pub(crate) stats: Arc<CardStats>,
    /// What services and policy are told.
    pub(crate) local: LocalOptions,
    pub(crate) limits: Limits,
    /// Where captures get frames from.
    pub(crate) tap: Arc<Tap>,
    pub(crate) acked: AtomicU64,
    /// The MTU that the frontend has told, if it is less than the interface's.
    mtu: AtomicU16,
    /// Grows when rings start anew: what belongs to an older one is over.
    pub(crate) session: AtomicU64,
    pub(crate) published: Mutex<Vec<Arc<Published>>>,
    /// Grows with each change of `published`.
    pub(crate) published_version: AtomicU64,
    wakers: Mutex<Vec<Waker>>,
    /// What pairs hand to each other and whose flows are whose; `None`: there is one pair.
    exchange: Option<Arc<Exchange>>,
    owners: Option<Arc<Owners>>,
}

/// A network interface behind vhost-user.
#[derive(Debug)]
pub struct NetDevice {
    shared: Arc<Shared>,
    pairs: u16,
    stats: Vec<Arc<QueueStats>>,
}

impl NetDevice {
    /// An interface with `pairs` queue pairs, from 1 to [`PAIRS_MAX`].
    #[must_use]
    pub fn new(spec: Spec, settings: Settings, local: LocalOptions, pairs: u16) -> Self {
        let pairs = pairs.clamp(1, PAIRS_MAX);
        let shares = pairs > 1;
        let flows_max = settings.flows_max;
        Self {
            shared: Arc::new(Shared {
                spec: Arc::new(spec),
                settings,
                stats: Arc::default(),
                local,
                limits: Limits::default(),
                tap: Arc::default(),
                acked: AtomicU64::new(0),
                mtu: AtomicU16::new(u16::MAX),
                session: AtomicU64::new(0),
                published: Mutex::default(),
                published_version: AtomicU64::new(0),
                wakers: Mutex::default(),
                exchange: shares.then(|| Arc::new(Exchange::new(pairs))),
                owners: shares.then(|| Arc::new(Owners::new(flows_max))),
            }),
            pairs,
            stats: (0..pairs * 2).map(|_| Arc::default()).collect(),
        }
    }

    /// The queues' counters.
    #[must_use]
    pub fn queue_stats(&self) -> &[Arc<QueueStats>] {
        &self.stats
    }

    /// The card's counters.
    #[must_use]
    pub fn stats(&self) -> &Arc<CardStats> {
        &self.shared.stats
    }

    /// The security groups, if there are any.
    #[must_use]
    pub fn rules(&self) -> Option<&Arc<crate::policy::SharedRules>> {
        self.shared.local.rules.as_ref()
    }

    /// Where captures get frames from.
    #[must_use]
    pub fn tap(&self) -> &Arc<Tap> {
        &self.shared.tap
    }

    /// The private network, if the interface is on one.
    #[must_use]
    pub fn lan(&self) -> Option<&Arc<Lan>> {
        self.shared.local.lan.as_ref()
    }

    /// What it may carry.
    #[must_use]
    pub fn limits(&self) -> LimitsSpec {
        self.shared.limits.spec()
    }

    /// Changes what it may carry, also for frames that wait.
    ///
    /// # Errors
    /// The limits cannot be kept; nothing has changed.
    pub fn set_limits(&self, spec: LimitsSpec) -> Result<(), LimitsError> {
        self.shared.limits.set(spec)?;
        self.wake();
        Ok(())
    }

    /// What the interface is.
    #[must_use]
    pub fn spec(&self) -> &Arc<Spec> {
        &self.shared.spec
    }

    /// Shows all counters.
    pub fn register(&self, registry: &Registry) {
        for (index, stats) in (0..).zip(&self.stats) {
            registry.queue(index, stats);
        }
        self.shared.stats.register(registry);
        self.shared.limits.register(registry);
        self.shared.tap.register(registry);
        let local = &self.shared.local;
        local.metrics.register(registry, local.imds.as_ref());
        if let Some(lan) = &local.lan {
            lan.register(registry);
        }
    }

    /// Looks at the published ports.
    pub fn published<R>(&self, look: impl FnOnce(&[Arc<Published>]) -> R) -> R {
        let published = &self.shared.published;
        look(&published.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Exchanges the published ports; `change` gets those in force.
    pub fn publish<R>(&self, change: impl FnOnce(&mut Vec<Arc<Published>>) -> R) -> R {
        let shared = &self.shared;
        let mut published = shared
            .published
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let result = change(&mut published);
        drop(published);
        shared.published_version.fetch_add(1, Ordering::Release);
        self.wake();
        result
    }

    fn wake(&self) {
        let wakers = self
            .shared
            .wakers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        for waker in wakers.iter() {
            waker.wake();
        }
    }
}

impl Device for NetDevice {
    type Queue = Pair;

    fn features(&self) -> u64 {
        if self.pairs > 1 {
            FEATURES
        } else {
            FEATURES & !MQ
        }
    }

    fn queue_count(&self) -> u16 {
        self.pairs * 2
    }

    fn queue_size_max(&self) -> u16 {
        QUEUE_SIZE_MAX
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn write_config(&self, _: u32, _: &[u8]) -> Result<(), DeviceError> {
        Err("the configuration space of a network card is the frontend's".into())
    }

    fn set_features(&self, acked: u64) {
        // Flows and header of a driver that came before, like a firmware's, are not this one's.
        if self.shared.acked.swap(acked, Ordering::AcqRel) != acked {
            self.shared.session.fetch_add(1, Ordering::Release);
        }
    }

    fn has_mtu(&self) -> bool {
        true
    }

    /// The guest's interface has the frontend's MTU (QEMU's `host_mtu`), which may be less than the
    /// card's own: then no packet to the guest is larger, and DHCP and router advertisements say so.
    /// If it is more, what the card says on the link is the smaller one.
    fn set_mtu(&self, mtu: u64) -> Result<(), DeviceError> {
        let known = u16::try_from(mtu).ok().filter(|mtu| *mtu >= MTU_MIN);
        let known = known.ok_or_else(|| {
            format!("an MTU of {mtu} bytes; IPv6 needs {MTU_MIN} and an IPv4 header has 16 bits")
        })?;
        if self.shared.mtu.swap(known, Ordering::AcqRel) != known {
            self.shared.session.fetch_add(1, Ordering::Release);
        }
        Ok(())
    }

    fn start(&self, _: Option<Arc<SharedRegion>>) -> Result<(), DeviceError> {
        self.shared.session.fetch_add(1, Ordering::Release);
        Ok(())
    }

    fn stop(&self) {
        // The flows' host sides are closed by their threads.
        self.shared.session.fetch_add(1, Ordering::Release);
        self.wake();
    }

    fn leader(&self, queue: u16) -> u16 {
        queue & !1
    }

    fn queue(&self, index: u16, waker: Waker) -> Result<Pair, DeviceError> {
        let shared = Arc::clone(&self.shared);
        let mut wakers = shared.wakers.lock().unwrap_or_else(PoisonError::into_inner);
        if index == 0
            && let Some(lan) = &shared.local.lan
        {
            lan.set_waker(waker.clone());
        }
        wakers.push(waker.clone());
        drop(wakers);
        if let Some(exchange) = &shared.exchange {
            exchange.register(index / 2, waker);
        }
        let stats = |at: u16| self.stats.get(usize::from(at)).cloned().unwrap_or_default();
        Ok(Pair::new(index, shared, stats(index), stats(index + 1))?)
    }
}

/// The flows and services of one pair, for a driver that accepted `negotiated`. The first pair
/// advertises the router.
fn card(
    shared: &Arc<Shared>,
    negotiated: Negotiated,
    pair: u16,
    now: Instant,
) -> std::io::Result<Card<LocalSide>> {
    let mut seed = [0; 8];
    getrandom::fill(&mut seed).map_err(std::io::Error::other)?;
    let settings = Settings {
        accepts: negotiated.accepts,
        share: shared.owners.as_ref().map(|owners| Share {
            owners: Arc::clone(owners),
            pair,
        }),
        ..shared.settings.clone()
    };
    let mtu = shared.mtu.load(Ordering::Acquire);
    let mut spec = Arc::clone(&shared.spec);
    if mtu < spec.mtu {
        spec = Arc::new(Spec {
            mtu,
            ..Spec::clone(&spec)
        });
    }
    let stack = Stack::new(
        Arc::clone(&spec),
        settings,
        Arc::clone(&shared.stats.stack),
        u64::from_ne_bytes(seed),
        now,
    );
    let local = LocalSide::new(&spec, &shared.local, pair == 0, now);
    Ok(Card::new(spec, Arc::clone(&shared.stats), stack, local))
}

/// The host's sockets of one pair.
pub(crate) fn host() -> std::io::Result<HostSockets> {
    HostSockets::new()
}
