//! The vhost-user state machine, without I/O.
//!
//! ```text
//!  Request ──► Protocol::handle ──► Ok(Reply) or Err(Refusal)
//!                    │
//!                    ▼
//!              Protocol::next_action ──► Action, to be carried out by the connection, one after
//!                    ▲                   the other, before the reply is sent
//!                    └── what came of it: ring_stopped, memory_changed, failed
//! ```
//!
//! A refused request changes nothing. State that depends on the outside changes when the outside
//! has said that it did: the memory table in [`Protocol::memory_changed`], a ring's base in
//! [`Protocol::ring_stopped`]. So when an action fails, the frontend can be told and the connection
//! may live on.
//!
//! # Choices where the specification leaves some
//! - **SET_VRING_ENABLE is taken whenever it comes.** The specification wants PROTOCOL_FEATURES
//!   acknowledged first; QEMU's vhost-user-net enables its rings before it sends SET_FEATURES, and
//!   never again.
//! - **SET_FEATURES never disables a ring**; without PROTOCOL_FEATURES among the bits it enables all
//!   (rings are born disabled). Disabling would halt a device whose logging is switched on.
//! - **Changing the layout of a running ring is an error**, setting again what it has is not.
//! - **Memory may change under running rings**: rings that lie where they lay get the new memory;
//!   rings that moved are stopped and started at the new place; rings whose memory left are stopped
//!   and start again, from where they were, when it comes back. QEMU replaces regions so,
//!   remove before add, when firmware changes the memory layout.
//! - **RESET_OWNER does nothing**, as the specification recommends.
//!
//! # What is missing, and where it would go
//! LOG_SHMFD: two requests (SET_LOG_BASE, SET_LOG_FD), `VHOST_F_LOG_ALL` accepted by SET_FEATURES
//! while rings run, the flag of SET_VRING_ADDR, and one action that hands the log to the rings.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use thiserror::Error;
use vhost::vhost_user::VhostUserProtocolFeatures as ProtocolFeatures;

use super::message::{ConfigRange, InflightArea, Request};
use super::ring::{GuestRing, RingState};
use crate::memory::{REGIONS_MAX, RegionInfo};

/// VHOST_USER_F_PROTOCOL_FEATURES, bit 30 of the feature bits. It is between frontend and backend;
/// drivers and devices do not see it.
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;

/// The protocol features that [`Protocol`] understands. All are offered, but CONFIG only by a
/// device that has a configuration space (QEMU's vhost-user-net warns of it), and NET_MTU only by a
/// network device.
pub const PROTOCOL_FEATURES: ProtocolFeatures = ProtocolFeatures::MQ
    .union(ProtocolFeatures::REPLY_ACK)
    .union(ProtocolFeatures::CONFIG)
    .union(ProtocolFeatures::MTU)
    .union(ProtocolFeatures::BACKEND_REQ)
    .union(ProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(ProtocolFeatures::INFLIGHT_SHMFD);

/// What a backend offers to its frontends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Virtio feature bits, without [`F_PROTOCOL_FEATURES`], which is always offered.
    pub features: u64,
    /// Number of queues, at most 256 (SET_VRING_KICK has 8 bits for the index).
    pub queue_count: u16,
    /// Largest ring size, a power of two.
    pub queue_size_max: u16,
    /// Has the device a configuration space to read?
    pub has_config: bool,
    /// Does it want to be told an MTU?
    pub has_mtu: bool,
}

impl Offer {
    fn protocol_features(&self) -> ProtocolFeatures {
        let mut features = PROTOCOL_FEATURES;
        features.set(ProtocolFeatures::CONFIG, self.has_config);
        features.set(ProtocolFeatures::MTU, self.has_mtu);
        features
    }
}

/// Something for the connection to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Action<F = OwnedFd> {
    /// Tell the device which features the driver accepted.
    SetFeatures(u64),
    /// Map these regions and drop all others, then call [`Protocol::memory_changed`].
    ReplaceMemory(Vec<(RegionInfo, F)>),
    /// Map one region more, then call [`Protocol::memory_changed`].
    AddRegion(RegionInfo, F),
    /// Unmap a region, then call [`Protocol::memory_changed`].
    RemoveRegion(RegionInfo),
    /// Give the new memory to a running ring.
    UpdateMemory(u16),
    /// Start a ring with what [`Protocol::ring`] says.
    StartRing(u16),
    /// Stop a ring and wait until its requests are done, then call [`Protocol::ring_stopped`].
    StopRing(u16),
    /// Enable or disable a running ring as [`Protocol::ring`] says.
    SetEnabled(u16),
    /// A running ring has a new kick descriptor, or none any more.
    SetKick(u16),
    /// A running ring has a new call descriptor, or none any more.
    SetCall(u16),
    /// A ring, running or not, has a new error descriptor, or none any more.
    SetErr(u16, Option<F>),
    /// Tell the device the MTU.
    SetMtu(u64),
    /// Make an in-flight region, to be part of the reply. No ring runs.
    CreateInflight {
        /// Queues, not 0 and not more than there are.
        num_queues: u16,
        /// Descriptors a queue, a power of two.
        queue_size: u16,
    },
    /// Take the frontend's in-flight region. No ring runs.
    SetInflight(InflightArea, F),
    /// The socket for our own requests.
    SetBackendChannel(F),
    /// The driver writes to the configuration space.
    WriteConfig {
        /// First byte.
        offset: u32,
        /// What to write.
        data: Vec<u8>,
    },
}

/// What to answer once all actions are carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    /// Nothing of its own: an acknowledgement if the frontend wants one.
    Ack,
    /// A number.
    U64(u64),
    /// Index and base of this ring.
    VringBase(u16),
    /// This part of the device configuration space.
    Config(ConfigRange),
    /// The in-flight region that was created, in a body of this many bytes.
    Inflight {
        /// Length of the body in bytes.
        body_len: usize,
    },
}

/// Why a request was refused. It changed nothing.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Refusal {
    /// Feature bits that were never offered.
    #[error("the frontend acknowledges features {0:#x} that were not offered")]
    Features(u64),
    /// Protocol feature bits that were never offered.
    #[error("the frontend wants protocol features {0:#x} that were not offered")]
    ProtocolFeatures(u64),
    /// The request belongs to a protocol feature that was not negotiated.
    #[error("the request needs protocol feature {0:?}, which was not negotiated")]
    NotNegotiated(ProtocolFeatures),
    /// A queue that does not exist.
    #[error("queue {queue} of {count}")]
    Queue {
        /// Index asked for.
        queue: u16,
        /// Number of queues.
        count: u16,
    },
    /// A ring larger than offered.
    #[error("a ring of {size} descriptors; the largest is {max}")]
    RingSize {
        /// Size asked for.
        size: u16,
        /// Largest size.
        max: u16,
    },
    /// A running ring's layout or position cannot be changed.
    #[error("queue {0} is running; GET_VRING_BASE has to stop it first")]
    Running(u16),
    /// More queues than there are.
    #[error("an in-flight region for {queues} queues of {count}")]
    InflightQueues {
        /// Queues asked for.
        queues: u16,
        /// Number of queues.
        count: u16,
    },
}

/// What one connection has negotiated and set up. See the module's documentation.
#[derive(Debug)]
pub struct Protocol<F = OwnedFd> {
    offer: Offer,
    /// Acknowledged features; `None` before SET_FEATURES.
    acked: Option<u64>,
    protocol: ProtocolFeatures,
    regions: Vec<RegionInfo>,
    rings: Vec<RingState<F>>,
    actions: VecDeque<Action<F>>,
}

impl<F> Protocol<F> {
    /// The state of a new connection.
    #[must_use]
    pub fn new(offer: Offer) -> Self {
        Self {
            offer,
            acked: None,
            protocol: ProtocolFeatures::empty(),
            regions: Vec::new(),
            rings: (0..offer.queue_count)
                .map(|_| RingState::default())
                .collect(),
            actions: VecDeque::new(),
        }
    }

    /// Was REPLY_ACK negotiated?
    #[must_use]
    pub fn has_reply_ack(&self) -> bool {
        self.protocol.contains(ProtocolFeatures::REPLY_ACK)
    }

    /// May CONFIG_CHANGE be sent on the backend channel?
    #[must_use]
    pub fn has_config(&self) -> bool {
        self.protocol.contains(ProtocolFeatures::CONFIG)
    }

    /// The features that the driver accepted, without [`F_PROTOCOL_FEATURES`].
    #[must_use]
    pub fn features(&self) -> u64 {
        self.acked.unwrap_or(0) & !F_PROTOCOL_FEATURES
    }

    /// What is known about a ring; `None` if there is no such queue.
    #[must_use]
    pub fn ring(&self, queue: u16) -> Option<&RingState<F>> {
        self.rings.get(usize::from(queue))
    }

    /// The queues whose rings run.
    pub fn running(&self) -> impl Iterator<Item = u16> + '_ {
        (0..self.offer.queue_count)
            .zip(&self.rings)
            .filter(|(_, ring)| ring.running.is_some())
            .map(|(queue, _)| queue)
    }

    /// Takes one request. Its actions then come from [`Self::next_action`].
    ///
    /// # Errors
    /// See [`Refusal`]; nothing has changed then and there are no actions.
    pub fn handle(&mut self, request: Request<F>) -> Result<Reply, Refusal> {
        debug_assert!(
            self.actions.is_empty(),
            "actions of the last request are left"
        );
        match request {
            Request::GetFeatures => {
                return Ok(Reply::U64(self.offer.features | F_PROTOCOL_FEATURES));
            }
            Request::GetProtocolFeatures => {
                return Ok(Reply::U64(self.offer.protocol_features().bits()));
            }
            Request::GetQueueNum => return Ok(Reply::U64(self.offer.queue_count.into())),
            Request::GetMaxMemSlots => {
                self.needs(ProtocolFeatures::CONFIGURE_MEM_SLOTS)?;
                return Ok(Reply::U64(REGIONS_MAX as u64));
            }
            Request::SetOwner | Request::ResetOwner => {}
            Request::SetFeatures(features) => self.set_features(features)?,
            Request::SetProtocolFeatures(features) => {
                let offered = self.offer.protocol_features();
                self.protocol = ProtocolFeatures::from_bits(features)
                    .filter(|features| offered.contains(*features))
                    .ok_or(Refusal::ProtocolFeatures(features & !offered.bits()))?;
            }
            Request::NetSetMtu(mtu) => {
                self.needs(ProtocolFeatures::MTU)?;
                self.act(Action::SetMtu(mtu));
            }
            Request::SetMemTable(regions) => self.act(Action::ReplaceMemory(regions)),
            Request::AddMemReg(region, fd) => {
                self.needs(ProtocolFeatures::CONFIGURE_MEM_SLOTS)?;
                self.act(Action::AddRegion(region, fd));
            }
            Request::RemMemReg(region) => {
                self.needs(ProtocolFeatures::CONFIGURE_MEM_SLOTS)?;
                self.act(Action::RemoveRegion(region));
            }
            Request::SetVringNum { queue, size } => {
                let max = self.offer.queue_size_max;
                if size > max {
                    return Err(Refusal::RingSize { size, max });
                }
                let ring = self.ring_mut(queue)?;
                if ring.running.is_some() && ring.size != size {
                    return Err(Refusal::Running(queue));
                }
                ring.size = size;
                self.start_if_ready(queue);
            }
            Request::SetVringAddr { queue, ring: user } => {
                let ring = self.ring_mut(queue)?;
                if ring.running.is_some() && ring.user != Some(user) {
                    return Err(Refusal::Running(queue));
                }
                ring.user = Some(user);
                self.start_if_ready(queue);
            }
            Request::SetVringBase { queue, base } => {
                let ring = self.ring_mut(queue)?;
                if ring.running.is_some() {
                    return Err(Refusal::Running(queue));
                }
                ring.base = base;
            }
            Request::GetVringBase { queue } => {
                let ring = self.ring_mut(queue)?;
                ring.kick = None;
                if ring.running.is_some() {
                    self.act(Action::StopRing(queue));
                }
                return Ok(Reply::VringBase(queue));
            }
            Request::SetVringKick { queue, fd } => {
                let ring = self.ring_mut(queue)?;
                ring.kick = Some(fd);
                if ring.running.is_some() {
                    self.act(Action::SetKick(queue));
                } else {
                    self.start_if_ready(queue);
                }
            }
            Request::SetVringCall { queue, fd } => {
                let ring = self.ring_mut(queue)?;
                ring.call = fd;
                if ring.running.is_some() {
                    self.act(Action::SetCall(queue));
                }
            }
            Request::SetVringErr { queue, fd } => {
                self.ring_mut(queue)?;
                self.act(Action::SetErr(queue, fd));
            }
            Request::SetVringEnable { queue, enabled } => {
                let ring = self.ring_mut(queue)?;
                ring.enabled = enabled;
                if ring.running.is_some() {
                    self.act(Action::SetEnabled(queue));
                }
            }
            Request::SetBackendReqFd(fd) => {
                self.needs(ProtocolFeatures::BACKEND_REQ)?;
                self.act(Action::SetBackendChannel(fd));
            }
            Request::GetConfig(range) => {
                self.needs(ProtocolFeatures::CONFIG)?;
                return Ok(Reply::Config(range));
            }
            Request::SetConfig(range, data) => {
                self.needs(ProtocolFeatures::CONFIG)?;
                let offset = range.offset;
                self.act(Action::WriteConfig { offset, data });
            }
            Request::GetInflightFd {
                num_queues,
                queue_size,
                body_len,
            } => {
                self.inflight_allowed(num_queues, queue_size)?;
                self.act(Action::CreateInflight {
                    num_queues,
                    queue_size,
                });
                return Ok(Reply::Inflight { body_len });
            }
            Request::SetInflightFd(area, fd) => {
                self.inflight_allowed(area.num_queues, area.queue_size)?;
                self.act(Action::SetInflight(area, fd));
            }
        }
        Ok(Reply::Ack)
    }

    /// The next thing to do for the request that was handled last.
    pub fn next_action(&mut self) -> Option<Action<F>> {
        self.actions.pop_front()
    }

    /// A memory action was carried out; `regions` are mapped now.
    pub fn memory_changed(&mut self, regions: &[RegionInfo]) {
        self.regions = regions.to_vec();
        for queue in 0..self.offer.queue_count {
            match self.ring(queue).and_then(|ring| ring.running) {
                None => self.start_if_ready(queue),
                Some(old) if self.place(queue) == Some(old) => {
                    self.act(Action::UpdateMemory(queue))
                }
                // ring_stopped() starts it again if it has a place.
                Some(_) => self.act(Action::StopRing(queue)),
            }
        }
    }

    /// A ring has stopped; `base` is the next entry of the available ring.
    pub fn ring_stopped(&mut self, queue: u16, base: u16) {
        if let Ok(ring) = self.ring_mut(queue) {
            ring.running = None;
            ring.base = base;
            self.start_if_ready(queue);
        }
    }

    /// [`Action::StartRing`] was not carried out: the ring is stopped, until the frontend gives it a
    /// kick descriptor again.
    pub fn ring_failed(&mut self, queue: u16) {
        if let Ok(ring) = self.ring_mut(queue) {
            ring.running = None;
            ring.kick = None;
        }
    }

    /// An action failed and the remaining ones are not wanted any more.
    pub fn drop_actions(&mut self) {
        self.actions.clear();
    }

    fn set_features(&mut self, features: u64) -> Result<(), Refusal> {
        let unknown = features & !(self.offer.features | F_PROTOCOL_FEATURES);
        if unknown != 0 {
            return Err(Refusal::Features(unknown));
        }
        let seen_by_driver = features & !F_PROTOCOL_FEATURES;
        if seen_by_driver != self.features()
            && let Some(queue) = self.running().next()
        {
            return Err(Refusal::Running(queue));
        }
        self.acked = Some(features);
        if self.running().next().is_none() {
            self.act(Action::SetFeatures(seen_by_driver));
        }
        for queue in 0..self.offer.queue_count {
            if features & F_PROTOCOL_FEATURES == 0 {
                let ring = self.ring_mut(queue)?;
                let was_enabled = std::mem::replace(&mut ring.enabled, true);
                if ring.running.is_some() && !was_enabled {
                    self.act(Action::SetEnabled(queue));
                }
            }
            self.start_if_ready(queue);
        }
        Ok(())
    }

    fn inflight_allowed(&self, queues: u16, queue_size: u16) -> Result<(), Refusal> {
        self.needs(ProtocolFeatures::INFLIGHT_SHMFD)?;
        let count = self.offer.queue_count;
        if queues > count {
            return Err(Refusal::InflightQueues { queues, count });
        }
        let max = self.offer.queue_size_max;
        if queue_size > max {
            let size = queue_size;
            return Err(Refusal::RingSize { size, max });
        }
        match self.running().next() {
            Some(queue) => Err(Refusal::Running(queue)),
            None => Ok(()),
        }
    }

    fn start_if_ready(&mut self, queue: u16) {
        let place = self.place(queue);
        let has_features = self.acked.is_some();
        let Ok(ring) = self.ring_mut(queue) else {
            return;
        };
        if ring.running.is_none() && ring.kick.is_some() && has_features && place.is_some() {
            ring.running = place;
            self.act(Action::StartRing(queue));
        }
    }

    fn place(&self, queue: u16) -> Option<GuestRing> {
        self.ring(queue)?.place(&self.regions)
    }

    fn ring_mut(&mut self, queue: u16) -> Result<&mut RingState<F>, Refusal> {
        let count = self.offer.queue_count;
        self.rings
            .get_mut(usize::from(queue))
            .ok_or(Refusal::Queue { queue, count })
    }

    fn needs(&self, feature: ProtocolFeatures) -> Result<(), Refusal> {
        if self.protocol.contains(feature) {
            Ok(())
        } else {
            Err(Refusal::NotNegotiated(feature))
        }
    }

    fn act(&mut self, action: Action<F>) {
        self.actions.push_back(action);
    }
}

#[cfg(test)]
mod tests;
