//! Split virtqueues, the device's side (virtio 1.3, 2.7).
//!
//! [`Virtqueue`] pops descriptor chains off the available ring, returns them on the used ring, and
//! decides about notifications in both directions. It does no I/O: the queue's thread signals.
//!
//! # Why not `virtio_queue::Queue`
//! It resolves a guest address for each access to a ring, clones the memory handle for each chain,
//! walks chains lazily (so that what is wrong with one shows up in the middle of a request), and
//! has no place for in-flight tracking between popping and walking or between writing the used
//! elements and moving the index. This is the data path, so it is our own, and `virtio-queue`
//! serves in the tests as a second opinion.
//!
//! # Memory
//! The three rings are found once, when the queue starts: each must lie whole in one region, and
//! the queue keeps that mapping alive. After that an access is a bounds check and a load. Chains
//! that were popped while an older memory map was in force keep it alive until they are returned,
//! so I/O into their buffers never hits an unmapped (or worse: newly mapped) page.
//!
//! # Two kinds of wrong
//! - A *chain* can be malformed ([`ChainFault`]): it comes back with nothing written and the queue
//!   goes on; the next chain may be fine.
//! - The *ring* can be broken ([`RingFault`]): an index that makes no sense, or a head that is
//!   already out. Nothing that follows can be trusted, so the queue stops popping until it is
//!   started anew. What is out is still returned. Other queues do not notice.
//!
//! Descriptors are read once, into values; an indirect table is copied before it is walked. What
//! the guest changes afterwards has no effect.
//!
//! # Memory ordering
//! - `avail.idx` is loaded with Acquire: ring entries and descriptors that the driver wrote before
//!   it are seen (2.7.13.3).
//! - `used.idx` is stored with Release: the driver that sees it sees the used elements and the
//!   data written before (2.7.14).
//! - Publishing and asking whether to interrupt ([`Virtqueue::publish`]) are a store and a load of
//!   different places, as are asking for kicks and looking for new chains
//!   ([`Virtqueue::enable_kicks`]). Only a SeqCst fence between the two keeps them apart; the driver
//!   has the mirror image. Without it both sides may miss each other, and the queue sleeps for ever.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};

use crate::device::{Chain, ChainToken};
use crate::inflight::QueueInflight;
use crate::memory::{GuestMemory, Window};

mod walk;

pub use walk::{ChainFault, TABLE_MAX};
use walk::{Descriptor, Walker};

#[cfg(test)]
mod tests;

/// Largest size of a split virtqueue (virtio 1.3, 2.7).
pub const SIZE_MAX: u16 = 32768;

const DESC_LEN: usize = 16;
const AVAIL_FLAGS: usize = 0;
const USED_FLAGS: usize = 0;
const IDX: usize = 2;
const RING: usize = 4;
const USED_ELEM_LEN: usize = 8;
const AVAIL_NO_INTERRUPT: u16 = 1;
const USED_NO_NOTIFY: u16 = 1;

/// Why a ring cannot be started.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RingError {
    /// Not a power of two, or too large.
    #[error("a queue size of {size} is not a power of two from 1 to {SIZE_MAX}")]
    Size {
        /// What the frontend wants.
        size: u16,
    },
    /// A ring is not where one memory region holds all of it.
    #[error("the {part} at {addr:#x} ({len} bytes) does not lie in one region of guest memory")]
    NotInMemory {
        /// Which part of the virtqueue.
        part: &'static str,
        /// Guest physical address.
        addr: u64,
        /// Its size in bytes.
        len: usize,
    },
    /// A ring is not aligned (virtio 1.3, 2.7).
    #[error("the {part} at {addr:#x} is not aligned to {align} bytes")]
    Alignment {
        /// Which part of the virtqueue.
        part: &'static str,
        /// Guest physical address.
        addr: u64,
        /// What it must be a multiple of.
        align: usize,
    },
    /// The in-flight region tracks fewer descriptors than the queue has.
    #[error("the in-flight region tracks {desc_num} descriptors, the queue has {size}")]
    InflightTooSmall {
        /// Descriptors tracked.
        desc_num: u16,
        /// Size of the queue.
        size: u16,
    },
}

/// How a guest broke its ring.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub enum RingFault {
    /// More new chains than the ring has room for.
    #[error("the available index went from {from} to {to} in a ring of {size}")]
    AvailableIndex {
        /// Next index to pop.
        from: u16,
        /// What the driver says.
        to: u16,
        /// Size of the queue.
        size: u16,
    },
    /// No such descriptor.
    #[error("available head {head} is not below the queue size {size}")]
    HeadOutOfRange {
        /// What the driver says.
        head: u16,
        /// Size of the queue.
        size: u16,
    },
    /// The device still has this chain.
    #[error("available head {head} was offered again before it was returned")]
    HeadInUse {
        /// What the driver says.
        head: u16,
    },
    /// The memory that held the rings was removed.
    #[error("the ring is no longer in guest memory")]
    MemoryRemoved,
}

/// Where the three rings are; guest physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingLayout {
    /// Descriptors, a power of two.
    pub size: u16,
    /// Address of the descriptor table.
    pub desc_table: u64,
    /// Address of the available ring.
    pub avail_ring: u64,
    /// Address of the used ring.
    pub used_ring: u64,
}

/// The rings, resolved.
#[derive(Debug)]
struct Rings {
    desc: Window,
    avail: Window,
    used: Window,
}

impl RingLayout {
    fn resolve(&self, memory: &GuestMemory) -> Result<Rings, RingError> {
        if !self.size.is_power_of_two() || self.size > SIZE_MAX {
            return Err(RingError::Size { size: self.size });
        }
        let size = usize::from(self.size);
        let find = |part, addr: u64, len, align| {
            let window = Window::of_guest(memory, addr, len);
            let window = window.ok_or(RingError::NotInMemory { part, addr, len })?;
            if !addr.is_multiple_of(align as u64) || !window.is_aligned_to(align) {
                return Err(RingError::Alignment { part, addr, align });
            }
            Ok(window)
        };
        Ok(Rings {
            desc: find("descriptor table", self.desc_table, size * DESC_LEN, 16)?,
            avail: find("available ring", self.avail_ring, RING + size * 2 + 2, 2)?,
            used: find(
                "used ring",
                self.used_ring,
                RING + size * USED_ELEM_LEN + 2,
                4,
            )?,
        })
    }
}

/// What [`Virtqueue::pop`] found.
#[derive(Debug)]
pub enum Popped {
    /// A sound chain.
    Chain(Chain),
    /// A chain to return with nothing written.
    Malformed(ChainToken, ChainFault),
}

/// What the in-flight region had to say when the queue started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recovery {
    /// Chains that will be popped again.
    pub resubmitted: u16,
    /// The region contradicts the ring and was cleared.
    pub was_stale: bool,
}

/// An older memory map with chains that still may use it.
#[derive(Debug)]
struct Retired {
    epoch: u32,
    chains: u16,
    _memory: Arc<GuestMemory>,
}

/// A split virtqueue.
#[derive(Debug)]
pub struct Virtqueue {
    layout: RingLayout,
    rings: Rings,
    memory: Arc<GuestMemory>,
    event_idx: bool,
    indirect: bool,
    /// Next available index to pop.
    next_avail: u16,
    /// The driver's available index as last seen; saves touching its cache line.
    seen_avail: u16,
    /// Where the next used element goes, and what `used.idx` says.
    next_used: u16,
    published_used: u16,
    /// Nothing was published since the start, so the driver may have missed an interrupt.
    first_publish: bool,
    /// Whether the driver was told that kicks are wanted. What an earlier user of the ring told it
    /// last, nobody knows.
    kicks_enabled: Option<bool>,
    fault: Option<RingFault>,
    /// For each head: 0 if it is the driver's, else the epoch of the memory map it came with.
    out: Box<[u32]>,
    out_count: u16,
    epoch: u32,
    retired: Vec<Retired>,
    /// Heads of the used elements not yet published.
    batch: Vec<u16>,
    walker: Walker,
    inflight: Option<QueueInflight>,
    resubmit: VecDeque<u16>,
}

impl Virtqueue {
    /// Starts a queue at available index `base`. With an in-flight region, `base` is not used: the
    /// next index is the used index plus the chains in flight, which are popped first.
    ///
    /// A region that contradicts the ring (it names chains that the ring cannot have out, as when
    /// the guest was reset and the frontend kept the region) is cleared; the chains that count are
    /// those on the available ring.
    ///
    /// # Errors
    /// The size is wrong or the rings are not in memory.
    pub fn new(
        layout: RingLayout,
        base: u16,
        features: u64,
        memory: Arc<GuestMemory>,
        inflight: Option<QueueInflight>,
    ) -> Result<(Self, Recovery), RingError> {
        let rings = layout.resolve(&memory)?;
        let size = layout.size;
        let used_idx = rings.used.atomic::<AtomicU16>(IDX);
        let used_idx = u16::from_le(used_idx.load(Ordering::Acquire));
        let mut queue = Self {
            layout,
            rings,
            memory,
            event_idx: features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0,
            indirect: features & (1 << VIRTIO_RING_F_INDIRECT_DESC) != 0,
            next_avail: base,
            seen_avail: base,
            next_used: used_idx,
            published_used: used_idx,
            first_publish: true,
            kicks_enabled: None,
            fault: None,
            out: vec![0; usize::from(size)].into_boxed_slice(),
            out_count: 0,
            epoch: 1,
            retired: Vec::new(),
            batch: Vec::with_capacity(usize::from(size)),
            walker: Walker::default(),
            inflight: None,
            resubmit: VecDeque::new(),
        };
        let recovery = match inflight {
            Some(inflight) => queue.recover(inflight, used_idx)?,
            None => Recovery::default(),
        };
        Ok((queue, recovery))
    }

    fn recover(
        &mut self,
        mut inflight: QueueInflight,
        used_idx: u16,
    ) -> Result<Recovery, RingError> {
        let size = self.layout.size;
        let desc_num = inflight.desc_num();
        if desc_num < size {
            return Err(RingError::InflightTooSmall { desc_num, size });
        }
        let mut heads = inflight.recover(used_idx);
        let avail_idx = self.avail_idx(Ordering::Acquire);
        // Chains in flight are chains that the driver has made available and not got back.
        let offered = avail_idx.wrapping_sub(used_idx);
        let was_stale = !heads.is_empty()
            && (heads.iter().any(|&head| head >= size)
                || offered > size
                || heads.len() > usize::from(offered));
        if was_stale {
            inflight.clear(used_idx);
            heads.clear();
        }
        let resubmitted = heads.len() as u16;
        if !was_stale {
            self.next_avail = used_idx.wrapping_add(resubmitted);
            self.seen_avail = self.next_avail;
        }
        self.resubmit = heads.into();
        self.inflight = Some(inflight);
        Ok(Recovery {
            resubmitted,
            was_stale,
        })
    }

    fn avail_idx(&self, ordering: Ordering) -> u16 {
        let idx = self.rings.avail.atomic::<AtomicU16>(IDX).load(ordering);
        u16::from_le(idx)
    }

    fn slot(&self, index: u16) -> usize {
        usize::from(index & (self.layout.size - 1))
    }

    /// Takes the next chain. `None`: there is none, or the ring is broken.
    #[inline]
    pub fn pop(&mut self) -> Option<Popped> {
        if self.fault.is_some() {
            return None;
        }
        if let Some(head) = self.resubmit.pop_front() {
            return self.take(head);
        }
        if self.next_avail == self.seen_avail && !self.look() {
            return None;
        }
        let place = RING + 2 * self.slot(self.next_avail);
        let head = self.rings.avail.atomic::<AtomicU16>(place);
        let head = u16::from_le(head.load(Ordering::Relaxed));
        let size = self.layout.size;
        let Some(&out) = self.out.get(usize::from(head)) else {
            return self.give_up(RingFault::HeadOutOfRange { head, size });
        };
        if out != 0 {
            return self.give_up(RingFault::HeadInUse { head });
        }
        self.next_avail = self.next_avail.wrapping_add(1);
        if let Some(inflight) = &mut self.inflight {
            inflight.on_pop(head);
        }
        self.take(head)
    }

    /// Walks a chain whose head is in range and now ours.
    fn take(&mut self, head: u16) -> Option<Popped> {
        *self.out.get_mut(usize::from(head))? = self.epoch;
        self.out_count += 1;
        let table = &self.rings.desc;
        let read = |index: u16| {
            let at = usize::from(index) * DESC_LEN;
            Descriptor::from_words(
                table.atomic::<AtomicU64>(at).load(Ordering::Relaxed),
                table.atomic::<AtomicU64>(at + 8).load(Ordering::Relaxed),
            )
        };
        let token = ChainToken { head, slot: 0 };
        let walked = self
            .walker
            .walk(head, self.layout.size, read, self.indirect, &self.memory);
        Some(match walked {
            Ok((readable, writable)) => Popped::Chain(Chain {
                token,
                readable,
                writable,
            }),
            Err(fault) => Popped::Malformed(token, fault),
        })
    }

    /// Looks at the available index. Whether there is something to pop.
    fn look(&mut self) -> bool {
        let to = self.avail_idx(Ordering::Acquire);
        let size = self.layout.size;
        if to.wrapping_sub(self.next_avail) > size {
            let from = self.next_avail;
            self.give_up(RingFault::AvailableIndex { from, to, size });
            return false;
        }
        self.seen_avail = to;
        to != self.next_avail
    }

    fn give_up(&mut self, fault: RingFault) -> Option<Popped> {
        self.fault = Some(fault);
        None
    }

    /// A chain is out no more. False: it was not, and is not ours to return (a token of a larger
    /// queue, say).
    #[inline]
    fn take_back(&mut self, head: u16) -> bool {
        let out = self.out.get_mut(usize::from(head));
        let epoch = out.map_or(0, |out| std::mem::replace(out, 0));
        if epoch == 0 {
            debug_assert!(false, "token of another queue");
            return false;
        }
        self.out_count -= 1;
        if epoch != self.epoch {
            self.release(epoch);
        }
        true
    }

    /// Undoes the last [`Self::pop`]: the chain is the next to be popped again.
    pub fn unpop(&mut self, token: ChainToken) {
        let head = token.head;
        if !self.take_back(head) {
            return;
        }
        if self.inflight.is_some() {
            // The region has it as ours already; it is popped from there.
            self.resubmit.push_front(head);
        } else {
            self.next_avail = self.next_avail.wrapping_sub(1);
        }
    }

    /// Puts a chain on the used ring with the number of bytes written to it. The driver sees it
    /// after [`Self::publish`]. No operation on its buffers may be under way any more.
    #[inline]
    pub fn add_used(&mut self, token: ChainToken, written: u32) {
        let head = token.head;
        if !self.take_back(head) {
            return;
        }
        if let Some(inflight) = &mut self.inflight {
            inflight.on_used(head);
            self.batch.push(head);
        }
        let at = RING + USED_ELEM_LEN * self.slot(self.next_used);
        let used = &self.rings.used;
        let id = u32::from(head).to_le();
        used.atomic::<AtomicU32>(at).store(id, Ordering::Relaxed);
        let len = used.atomic::<AtomicU32>(at + 4);
        len.store(written.to_le(), Ordering::Relaxed);
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Shows the driver all chains added since the last time. Whether it wants an interrupt.
    #[inline]
    #[must_use = "the driver may be waiting for an interrupt"]
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.published_used, self.next_used);
        if old == new {
            return false;
        }
        let idx = self.rings.used.atomic::<AtomicU16>(IDX);
        idx.store(new.to_le(), Ordering::Release);
        self.published_used = new;
        if let Some(inflight) = &mut self.inflight {
            inflight.on_published(&self.batch, new);
            self.batch.clear();
        }
        fence(Ordering::SeqCst);
        if std::mem::take(&mut self.first_publish) {
            return true;
        }
        let avail = &self.rings.avail;
        if self.event_idx {
            let at = RING + 2 * usize::from(self.layout.size);
            let event = u16::from_le(avail.atomic::<AtomicU16>(at).load(Ordering::Relaxed));
            // virtio 1.3, 2.7.10.1: is `event` one of the indices just passed?
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            let flags = avail.atomic::<AtomicU16>(AVAIL_FLAGS);
            u16::from_le(flags.load(Ordering::Relaxed)) & AVAIL_NO_INTERRUPT == 0
        }
    }

    /// Chains added and not yet published.
    #[must_use]
    pub fn unpublished(&self) -> u16 {
        self.next_used.wrapping_sub(self.published_used)
    }

    /// Asks the driver not to kick: the ring is being watched.
    ///
    /// With EVENT_IDX nothing is written: the driver kicks when it passes `avail_event`, which is
    /// behind it already (and again after 65536 chains, which does no harm).
    #[inline]
    pub fn disable_kicks(&mut self) {
        if self.kicks_enabled.replace(false) != Some(false) && !self.event_idx {
            let flags = self.rings.used.atomic::<AtomicU16>(USED_FLAGS);
            flags.store(USED_NO_NOTIFY.to_le(), Ordering::Relaxed);
        }
    }

    /// Asks the driver to kick when it adds a chain, and looks once more. `true`: there is
    /// something to pop already, so don't sleep.
    #[inline]
    #[must_use = "chains that came in the meantime are not kicked for"]
    pub fn enable_kicks(&mut self) -> bool {
        self.ask_for_kicks(self.next_avail)
            && (!self.resubmit.is_empty() || self.next_avail != self.seen_avail || self.look())
    }

    /// As [`Self::enable_kicks`], for a device that has looked at all chains that there were and
    /// gave them back because they do not suffice. True: there are more now.
    pub fn enable_kicks_for_more(&mut self) -> bool {
        let seen = self.seen_avail;
        self.ask_for_kicks(seen) && self.look() && self.seen_avail != seen
    }

    /// Asks to be told of the chain at available index `from`. False: the ring is broken.
    fn ask_for_kicks(&mut self, from: u16) -> bool {
        if self.fault.is_some() {
            return false;
        }
        let used = &self.rings.used;
        if self.event_idx {
            let at = RING + USED_ELEM_LEN * usize::from(self.layout.size);
            let event = used.atomic::<AtomicU16>(at);
            event.store(from.to_le(), Ordering::Relaxed);
        } else if self.kicks_enabled != Some(true) {
            used.atomic::<AtomicU16>(USED_FLAGS)
                .store(0, Ordering::Relaxed);
        }
        self.kicks_enabled = Some(true);
        fence(Ordering::SeqCst);
        true
    }

    /// Whether [`Self::pop`] has something to give. Asks for no kick.
    #[inline]
    pub fn has_next(&mut self) -> bool {
        self.fault.is_none()
            && (!self.resubmit.is_empty() || self.next_avail != self.seen_avail || self.look())
    }

    /// Takes a new memory map into use. The old one lives on until the chains that came with it
    /// are returned. If the rings are not in the new one, the queue is broken.
    pub fn set_memory(&mut self, memory: Arc<GuestMemory>) {
        match self.layout.resolve(&memory) {
            Ok(rings) => self.rings = rings,
            // The old windows stay valid for what is still out.
            Err(_) => self.fault = self.fault.or(Some(RingFault::MemoryRemoved)),
        }
        let old = std::mem::replace(&mut self.memory, memory);
        let earlier: u16 = self.retired.iter().map(|r| r.chains).sum();
        let chains = self.out_count - earlier;
        if chains == 0 {
            return;
        }
        self.retired.push(Retired {
            epoch: self.epoch,
            chains,
            _memory: old,
        });
        // 0 means "not out". A wrap takes 2^32 memory changes within the life of one queue.
        self.epoch = self.epoch.checked_add(1).unwrap_or(1);
    }

    #[cold]
    fn release(&mut self, epoch: u32) {
        if let Some(place) = self.retired.iter().position(|r| r.epoch == epoch)
            && let Some(retired) = self.retired.get_mut(place)
        {
            retired.chains -= 1;
            if retired.chains == 0 {
                self.retired.swap_remove(place);
            }
        }
    }

    /// The memory map in force.
    #[must_use]
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Chains popped and not returned.
    #[must_use]
    pub fn out_count(&self) -> u16 {
        self.out_count
    }

    /// Next available index to pop: what GET_VRING_BASE answers.
    #[must_use]
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// How the guest broke the ring, if it did.
    #[must_use]
    pub fn fault(&self) -> Option<RingFault> {
        self.fault
    }
}
