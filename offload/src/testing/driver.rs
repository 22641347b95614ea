//! The guest's side of a split virtqueue, for tests and benches: guest memory in a memfd, a
//! driver that adds chains (also deliberately bent ones), kicks, and waits for used ones.
//!
//! Everything here panics when it is used wrongly or the kernel refuses: it is test code.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::{Bytes, GuestAddress};

use crate::inflight::QueueInflight;
use crate::memory::{GuestMemory, MemoryMap, RegionInfo, Window};
use crate::virtqueue::RingLayout;
use crate::worker::RingConfig;

/// Feature bit RING_INDIRECT_DESC.
pub const INDIRECT_DESC: u64 = 1 << 28;
/// Feature bit RING_EVENT_IDX.
pub const EVENT_IDX: u64 = 1 << 29;
/// Feature bit VERSION_1.
pub const VERSION_1: u64 = 1 << 32;

/// Where a test guest's memory starts, so that address 0 is never valid.
pub const RAM_BASE: u64 = 0x10_0000;
/// What a test guest's frontend would have mapped [`RAM_BASE`] at.
pub const USER_BASE: u64 = 0x7f00_0000_0000;

/// Largest indirect table that [`DriverQueue::add_indirect`] makes.
const TABLE_ENTRIES: usize = 160;

/// A guest's memory: one region in a memfd, with an allocator that never frees.
#[derive(Debug)]
pub struct GuestRam {
    fd: OwnedFd,
    map: MemoryMap,
    size: u64,
    next: AtomicU64,
}

impl GuestRam {
    /// `size` bytes at [`RAM_BASE`], zeroed.
    #[must_use]
    pub fn new(size: u64) -> Arc<Self> {
        let fd = memfd_create("guest-ram", MemfdFlags::CLOEXEC).expect("memfd");
        ftruncate(&fd, size).expect("ftruncate");
        let region = RegionInfo {
            guest_phys_addr: RAM_BASE,
            size,
            userspace_addr: USER_BASE,
            mmap_offset: 0,
        };
        let twin = fd.try_clone().expect("dup");
        let map = MemoryMap::from_regions([(region, twin)]).expect("map guest memory");
        Arc::new(Self {
            fd,
            map,
            size,
            next: AtomicU64::new(RAM_BASE),
        })
    }

    /// The memfd, to be sent to a backend.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The region, as a frontend describes it.
    #[must_use]
    pub fn region(&self) -> RegionInfo {
        self.map.regions()[0]
    }

    /// The mapping.
    #[must_use]
    pub fn memory(&self) -> &Arc<GuestMemory> {
        self.map.memory()
    }

    /// Guest physical address of fresh zeroed bytes; `align` is a power of two.
    pub fn alloc(&self, len: u64, align: u64) -> u64 {
        let place = self
            .next
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |next| {
                let start = next.next_multiple_of(align);
                (start + len <= RAM_BASE + self.size).then_some(start + len)
            })
            .expect("the test guest has memory left");
        place.next_multiple_of(align)
    }

    /// Writes into guest memory.
    pub fn write(&self, addr: u64, bytes: &[u8]) {
        let at = GuestAddress(addr);
        self.memory().write_slice(bytes, at).expect("in memory");
    }

    /// Reads from guest memory.
    #[must_use]
    pub fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let at = GuestAddress(addr);
        self.memory().read_slice(&mut bytes, at).expect("in memory");
        bytes
    }

    /// The frontend's address of a guest physical address.
    #[must_use]
    pub fn user_addr(&self, addr: u64) -> u64 {
        addr - RAM_BASE + USER_BASE
    }
}

/// A buffer of a chain to add.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Guest physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// Whether the device writes to it.
    pub writable: bool,
}

impl Buffer {
    /// A buffer that the device reads.
    #[must_use]
    pub fn readable(addr: u64, len: u32) -> Self {
        Self {
            addr,
            len,
            writable: false,
        }
    }

    /// A buffer that the device writes.
    #[must_use]
    pub fn writable(addr: u64, len: u32) -> Self {
        Self {
            addr,
            len,
            writable: true,
        }
    }
}

/// A descriptor as it lies in memory, for chains that no driver would build.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RawDescriptor {
    /// Guest physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// [`Self::NEXT`], [`Self::WRITE`], [`Self::INDIRECT`].
    pub flags: u16,
    /// Index of the next descriptor, with [`Self::NEXT`].
    pub next: u16,
}

impl RawDescriptor {
    /// There is a next descriptor.
    pub const NEXT: u16 = 1;
    /// The device writes.
    pub const WRITE: u16 = 2;
    /// The buffer is a table of descriptors.
    pub const INDIRECT: u16 = 4;

    /// As it lies in memory.
    #[must_use]
    pub fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// A chain that came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// Its head descriptor.
    pub head: u16,
    /// Bytes that the device says it wrote.
    pub written: u32,
}

/// The driver of one split virtqueue.
#[derive(Debug)]
pub struct DriverQueue {
    ram: Arc<GuestRam>,
    layout: RingLayout,
    features: u64,
    kick: OwnedFd,
    call: OwnedFd,
    desc: Window,
    avail: Window,
    used: Window,
    free: Vec<u16>,
    /// Descriptors of the chain with this head.
    chains: Vec<Vec<u16>>,
    /// Indirect table of this head, once it has one.
    tables: Vec<Option<u64>>,
    next_avail: u16,
    published_avail: u16,
    last_used: u16,
}

impl DriverQueue {
    /// A queue with fresh rings. `features`: those that the driver accepts; only EVENT_IDX matters
    /// to it.
    #[must_use]
    pub fn new(ram: &Arc<GuestRam>, size: u16, features: u64) -> Self {
        let n = usize::from(size);
        let (desc_len, avail_len, used_len) = (16 * n, 6 + 2 * n, 6 + 8 * n);
        let layout = RingLayout {
            size,
            desc_table: ram.alloc(desc_len as u64, 4096),
            avail_ring: ram.alloc(avail_len as u64, 64),
            used_ring: ram.alloc(used_len as u64, 4096),
        };
        let window = |addr, len| Window::of_guest(ram.memory(), addr, len).expect("in memory");
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("eventfd");
        Self {
            desc: window(layout.desc_table, desc_len),
            avail: window(layout.avail_ring, avail_len),
            used: window(layout.used_ring, used_len),
            ram: Arc::clone(ram),
            layout,
            features,
            kick: event(),
            call: event(),
            free: (0..size).rev().collect(),
            chains: vec![Vec::new(); n],
            tables: vec![None; n],
            next_avail: 0,
            published_avail: 0,
            last_used: 0,
        }
    }

    /// What a queue's thread needs to serve it.
    #[must_use]
    pub fn ring_config(&self, base: u16, inflight: Option<QueueInflight>) -> RingConfig {
        RingConfig {
            size: self.layout.size,
            desc_table: self.layout.desc_table,
            avail_ring: self.layout.avail_ring,
            used_ring: self.layout.used_ring,
            base,
            features: self.features,
            kick: Some(self.kick.try_clone().expect("dup")),
            call: Some(self.call.try_clone().expect("dup")),
            memory: Arc::clone(self.ram.memory()),
            inflight,
            enabled: true,
        }
    }

    /// Where the rings are.
    #[must_use]
    pub fn layout(&self) -> RingLayout {
        self.layout
    }

    /// The guest's memory.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// The eventfd that the driver kicks.
    #[must_use]
    pub fn kick_fd(&self) -> BorrowedFd<'_> {
        self.kick.as_fd()
    }

    /// The eventfd that the device signals.
    #[must_use]
    pub fn call_fd(&self) -> BorrowedFd<'_> {
        self.call.as_fd()
    }

    /// Free descriptors.
    #[must_use]
    pub fn free_descriptors(&self) -> usize {
        self.free.len()
    }

    /// Index of the next chain that will be added.
    #[must_use]
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// Puts a descriptor into the table.
    pub fn set_descriptor(&mut self, index: u16, raw: RawDescriptor) {
        let at = usize::from(index) * 16;
        let bytes = raw.to_bytes();
        let (words, _) = bytes.as_chunks::<8>();
        for (i, word) in words.iter().enumerate() {
            let place = self.desc.atomic::<AtomicU64>(at + 8 * i);
            place.store(u64::from_ne_bytes(*word), Ordering::Relaxed);
        }
    }

    /// Puts any head onto the available ring. Not visible before [`Self::publish`].
    pub fn offer(&mut self, head: u16) {
        let slot = usize::from(self.next_avail & (self.layout.size - 1));
        let place = self.avail.atomic::<AtomicU16>(4 + 2 * slot);
        place.store(head.to_le(), Ordering::Relaxed);
        self.next_avail = self.next_avail.wrapping_add(1);
    }

    /// Adds a chain with a descriptor for each buffer. Its head, or `None` if the table has no
    /// room. Not visible before [`Self::publish`].
    pub fn add(&mut self, buffers: &[Buffer]) -> Option<u16> {
        if buffers.is_empty() || self.free.len() < buffers.len() {
            return None;
        }
        let indices = self.free.split_off(self.free.len() - buffers.len());
        for (i, buffer) in buffers.iter().enumerate() {
            let next = indices.get(i + 1).copied();
            self.set_descriptor(indices[i], raw(buffer, next));
        }
        let head = indices[0];
        self.chains[usize::from(head)] = indices;
        self.offer(head);
        Some(head)
    }

    /// Adds a chain of one indirect descriptor, whose table holds the buffers.
    pub fn add_indirect(&mut self, buffers: &[Buffer]) -> Option<u16> {
        assert!(buffers.len() <= TABLE_ENTRIES, "table too long");
        let head = self.free.pop()?;
        let table = *self.tables[usize::from(head)]
            .get_or_insert_with(|| self.ram.alloc(16 * TABLE_ENTRIES as u64, 16));
        let mut bytes = Vec::with_capacity(16 * buffers.len());
        for (i, buffer) in buffers.iter().enumerate() {
            let next = (i + 1 < buffers.len()).then_some(i as u16 + 1);
            bytes.extend_from_slice(&raw(buffer, next).to_bytes());
        }
        self.ram.write(table, &bytes);
        let descriptor = RawDescriptor {
            addr: table,
            len: bytes.len() as u32,
            flags: RawDescriptor::INDIRECT,
            next: 0,
        };
        self.set_descriptor(head, descriptor);
        self.chains[usize::from(head)].push(head);
        self.offer(head);
        Some(head)
    }

    /// Adds a chain of arbitrary descriptors. `next` fields count from 0 within `descriptors` and
    /// are translated; others (beyond the last) stay as they are.
    pub fn add_bent(&mut self, descriptors: &[RawDescriptor]) -> Option<u16> {
        if descriptors.is_empty() || self.free.len() < descriptors.len() {
            return None;
        }
        let indices = self.free.split_off(self.free.len() - descriptors.len());
        for (descriptor, &index) in descriptors.iter().zip(&indices) {
            let next = indices.get(usize::from(descriptor.next)).copied();
            let next = next.unwrap_or(descriptor.next);
            self.set_descriptor(
                index,
                RawDescriptor {
                    next,
                    ..*descriptor
                },
            );
        }
        let head = indices[0];
        self.chains[usize::from(head)] = indices;
        self.offer(head);
        Some(head)
    }

    /// Sets the available index to anything.
    pub fn set_avail_idx(&mut self, idx: u16) {
        let place = self.avail.atomic::<AtomicU16>(2);
        place.store(idx.to_le(), Ordering::Release);
    }

    /// Shows the added chains to the device. Whether it wants a kick for them.
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.published_avail, self.next_avail);
        self.set_avail_idx(new);
        self.published_avail = new;
        fence(Ordering::SeqCst);
        if self.features & EVENT_IDX != 0 {
            let at = 4 + 8 * usize::from(self.layout.size);
            let event = self.used.atomic::<AtomicU16>(at).load(Ordering::Relaxed);
            new.wrapping_sub(u16::from_le(event)).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            let flags = self.used.atomic::<AtomicU16>(0).load(Ordering::Relaxed);
            new != old && u16::from_le(flags) & 1 == 0
        }
    }

    /// Publishes, and kicks if the device wants it. Whether it was kicked.
    pub fn kick(&mut self) -> bool {
        let wanted = self.publish();
        if wanted {
            self.kick_now();
        }
        wanted
    }

    /// Kicks, wanted or not.
    pub fn kick_now(&self) {
        rustix::io::write(&self.kick, &1u64.to_ne_bytes()).expect("kick");
    }

    /// The used index as the device has published it.
    #[must_use]
    pub fn used_idx(&self) -> u16 {
        u16::from_le(self.used.atomic::<AtomicU16>(2).load(Ordering::Acquire))
    }

    /// Takes a chain that came back, if there is one.
    ///
    /// # Panics
    /// The device returned what it was not given.
    pub fn poll_used(&mut self) -> Option<Used> {
        let new = self.used_idx().wrapping_sub(self.last_used);
        assert!(new <= self.layout.size, "the used index jumped by {new}");
        if new == 0 {
            return None;
        }
        let at = 4 + 8 * usize::from(self.last_used & (self.layout.size - 1));
        let load = |at| u32::from_le(self.used.atomic::<AtomicU32>(at).load(Ordering::Relaxed));
        let (id, written) = (load(at), load(at + 4));
        self.last_used = self.last_used.wrapping_add(1);
        let head = u16::try_from(id).expect("a head");
        let chain = &mut self.chains[usize::from(head)];
        assert!(!chain.is_empty(), "head {head} came back without being out");
        self.free.append(chain);
        Some(Used { head, written })
    }

    /// Waits for a chain to come back, by interrupt. `None` after `timeout`.
    pub fn wait_used(&mut self, timeout: Duration) -> Option<Used> {
        let end = Instant::now() + timeout;
        loop {
            if let Some(used) = self.poll_used() {
                return Some(used);
            }
            if self.features & EVENT_IDX != 0 {
                let at = 4 + 2 * usize::from(self.layout.size);
                let event = self.avail.atomic::<AtomicU16>(at);
                event.store(self.last_used.to_le(), Ordering::Relaxed);
            }
            fence(Ordering::SeqCst);
            if let Some(used) = self.poll_used() {
                return Some(used);
            }
            let left = end.saturating_duration_since(Instant::now());
            if !self.wait_call(left) {
                return self.poll_used();
            }
        }
    }

    /// Waits for an interrupt and takes it. `false` after `timeout`.
    pub fn wait_call(&self, timeout: Duration) -> bool {
        let mut fds = [PollFd::new(&self.call, PollFlags::IN)];
        let timeout = Timespec::try_from(timeout).expect("a timeout");
        let is_ready = matches!(poll(&mut fds, Some(&timeout)), Ok(1));
        let mut counter = [0; 8];
        is_ready && rustix::io::read(&self.call, &mut counter).is_ok()
    }

    /// Asks the device not to interrupt, or to interrupt again; does nothing with EVENT_IDX, where it is
    /// asked by [`Self::wait_used`].
    pub fn set_no_interrupt(&mut self, is_off: bool) {
        if self.features & EVENT_IDX != 0 {
            return;
        }
        let flags = self.avail.atomic::<AtomicU16>(0);
        flags.store(u16::from(is_off).to_le(), Ordering::Relaxed);
    }

    /// Chains that are out.
    #[must_use]
    pub fn out_count(&self) -> usize {
        self.chains.iter().filter(|chain| !chain.is_empty()).count()
    }
}

fn raw(buffer: &Buffer, next: Option<u16>) -> RawDescriptor {
    let mut flags = 0;
    if buffer.writable {
        flags |= RawDescriptor::WRITE;
    }
    if next.is_some() {
        flags |= RawDescriptor::NEXT;
    }
    RawDescriptor {
        addr: buffer.addr,
        len: buffer.len,
        flags,
        next: next.unwrap_or(0),
    }
}
