//! Guest memory made of the file descriptors that the frontend sends.
//!
//! A frontend describes the guest's memory as regions (vhost-user, "Memory region description"):
//! a range of guest physical addresses, the address at which the *frontend* has it mapped, and
//! an offset into a file descriptor. Descriptors of a virtqueue hold guest physical addresses;
//! ring addresses (SET_VRING_ADDR) and region removals come as frontend addresses. [`MemoryMap`]
//! keeps both views; the mapping itself is [`vm_memory`]'s.
//!
//! A map is never changed in place: adding or removing a region makes a new [`GuestMemory`] that
//! shares the mappings of the other regions. Whoever still holds the old `Arc` (a queue with
//! requests in flight) keeps what it uses mapped.
//!
//! # What is checked
//! No region is empty, wraps around, or overlaps another, in guest physical or in frontend
//! addresses, and the file is long enough. A file that is too short is nearly always a guest
//! whose memory backend lacks `share=on`, so the error says so.
//!
//! # SIGBUS
//! Touching a page behind the end of a file kills the process with SIGBUS. The length is checked
//! when a region is mapped; a frontend that shrinks the file afterwards kills its own card,
//! which serves nobody else. QEMU's `memory-backend-memfd` seals its size (`F_SEAL_SHRINK`), so
//! with it even that cannot happen; other backends (hugetlbfs, files) have no seals, which is why
//! they are not demanded. A SIGBUS handler that patches pages in was rejected: it would turn a
//! lost disk into wrong data.
//!
//! # Core dumps
//! Mappings are marked `MADV_DONTDUMP`: what a guest has in memory is nobody's business.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::Arc;

use vm_memory::bitmap::BS;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    AtomicInteger, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion,
    GuestRegionMmap, MmapRegion, VolatileMemory, VolatileSlice,
};

#[cfg(test)]
mod tests;

/// The guest's memory, by guest physical address.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;

/// Most regions a map takes. KVM itself gives a guest 509 slots for users in QEMU's accounting;
/// no frontend can have more memory regions than that.
pub const REGIONS_MAX: usize = 509;

/// Why guest memory could not be mapped or changed.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A region of zero bytes.
    #[error("the memory region at {guest_phys_addr:#x} is empty")]
    Empty {
        /// Guest physical address of the region.
        guest_phys_addr: u64,
    },
    /// Address or offset plus size exceeds 64 bits.
    #[error("the memory region at {guest_phys_addr:#x} with {size:#x} bytes wraps around")]
    Wraps {
        /// Guest physical address of the region.
        guest_phys_addr: u64,
        /// Size in bytes.
        size: u64,
    },
    /// Two regions share addresses.
    #[error("the memory region at {guest_phys_addr:#x} overlaps the one at {other:#x}")]
    Overlaps {
        /// Guest physical address of the new region.
        guest_phys_addr: u64,
        /// Guest physical address of the region that is there.
        other: u64,
    },
    /// The descriptor is shorter than the region.
    #[error(
        "the memory region at {guest_phys_addr:#x} needs {needed} bytes of its file, which has \
         {len}: is share=on missing on the guest's memory backend?"
    )]
    FileTooShort {
        /// Guest physical address of the region.
        guest_phys_addr: u64,
        /// Offset plus size in bytes.
        needed: u64,
        /// Length of the file in bytes.
        len: u64,
    },
    /// More than [`REGIONS_MAX`] regions.
    #[error("the frontend wants more than {REGIONS_MAX} memory regions")]
    TooMany,
    /// A region to remove that was never added.
    #[error("there is no memory region at {guest_phys_addr:#x} with {size:#x} bytes to remove")]
    Unknown {
        /// Guest physical address asked for.
        guest_phys_addr: u64,
        /// Size asked for, in bytes.
        size: u64,
    },
    /// The kernel refused.
    #[error("cannot look at the memory region's file descriptor")]
    Stat(#[source] std::io::Error),
    /// The kernel refused.
    #[error("cannot map the memory region at {guest_phys_addr:#x}")]
    Map {
        /// Guest physical address of the region.
        guest_phys_addr: u64,
        /// What mmap said.
        #[source]
        source: MmapRegionError,
    },
}

/// Where one region lies, as the frontend describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionInfo {
    /// First guest physical address.
    pub guest_phys_addr: u64,
    /// Size in bytes.
    pub size: u64,
    /// First address in the frontend's address space.
    pub userspace_addr: u64,
    /// Offset of the region in its file, in bytes.
    pub mmap_offset: u64,
}

impl RegionInfo {
    /// Checks everything that needs no file.
    fn check(&self) -> Result<(), MemoryError> {
        if self.size == 0 {
            return Err(MemoryError::Empty {
                guest_phys_addr: self.guest_phys_addr,
            });
        }
        let wraps = |start: u64| start.checked_add(self.size).is_none();
        if wraps(self.guest_phys_addr)
            || wraps(self.userspace_addr)
            || wraps(self.mmap_offset)
            || usize::try_from(self.size).is_err()
            || i64::try_from(self.mmap_offset).is_err()
        {
            return Err(MemoryError::Wraps {
                guest_phys_addr: self.guest_phys_addr,
                size: self.size,
            });
        }
        Ok(())
    }

    /// Whether it is what REM_MEM_REG names by these; the offset in the file means nothing there.
    fn is_at(&self, guest_phys_addr: u64, size: u64, userspace_addr: u64) -> bool {
        self.guest_phys_addr == guest_phys_addr
            && self.size == size
            && self.userspace_addr == userspace_addr
    }

    fn is_same(&self, other: &Self) -> bool {
        self.is_at(other.guest_phys_addr, other.size, other.userspace_addr)
    }

    /// Whether the two share a guest physical or a frontend address. Both were checked.
    fn overlaps(&self, other: &Self) -> bool {
        let meet = |a: u64, b: u64| a < b + other.size && b < a + self.size;
        meet(self.guest_phys_addr, other.guest_phys_addr)
            || meet(self.userspace_addr, other.userspace_addr)
    }

    fn map(&self, fd: OwnedFd) -> Result<GuestRegionMmap<()>, MemoryError> {
        let file = File::from(fd);
        let len = file.metadata().map_err(MemoryError::Stat)?.len();
        let needed = self.mmap_offset + self.size;
        if len < needed {
            return Err(MemoryError::FileTooShort {
                guest_phys_addr: self.guest_phys_addr,
                needed,
                len,
            });
        }
        let mapping = MmapRegion::<()>::from_file(
            FileOffset::new(file, self.mmap_offset),
            self.size as usize,
        )
        .map_err(|source| MemoryError::Map {
            guest_phys_addr: self.guest_phys_addr,
            source,
        })?;
        dont_dump(&mapping);
        GuestRegionMmap::new(mapping, GuestAddress(self.guest_phys_addr)).ok_or(
            MemoryError::Wraps {
                guest_phys_addr: self.guest_phys_addr,
                size: self.size,
            },
        )
    }
}

/// Keeps a mapping out of core dumps. A kernel that cannot (device memory) loses nothing.
pub(crate) fn dont_dump(mapping: &MmapRegion<()>) {
    // SAFETY: the range is exactly one mapping that `mapping` owns; DONTDUMP changes no contents
    // and no access rights.
    let _ = unsafe {
        rustix::mm::madvise(
            mapping.as_ptr().cast(),
            mapping.size(),
            rustix::mm::Advice::LinuxDontDump,
        )
    };
}

/// The regions that the frontend has described, and their mapping.
#[derive(Clone, Debug, Default)]
pub struct MemoryMap {
    /// In no particular order; a handful.
    regions: Vec<RegionInfo>,
    /// Those that were removed last and not added again, oldest first: see [`Self::was_removed`].
    removed: VecDeque<RegionInfo>,
    memory: Arc<GuestMemory>,
}

impl MemoryMap {
    /// A map without memory.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Maps a whole table (SET_MEM_TABLE).
    ///
    /// # Errors
    /// A region is unsound or cannot be mapped; nothing stays mapped then.
    pub fn from_regions(
        regions: impl IntoIterator<Item = (RegionInfo, OwnedFd)>,
    ) -> Result<Self, MemoryError> {
        let mut map = Self::new();
        for (info, fd) in regions {
            map.add(info, fd)?;
        }
        Ok(map)
    }

    /// Maps one more region (ADD_MEM_REG). [`Self::memory`] is a new `Arc` afterwards.
    ///
    /// # Errors
    /// The region is unsound or cannot be mapped; the map is as before then.
    pub fn add(&mut self, info: RegionInfo, fd: OwnedFd) -> Result<(), MemoryError> {
        info.check()?;
        if self.regions.len() >= REGIONS_MAX {
            return Err(MemoryError::TooMany);
        }
        let overlaps = |other: u64| MemoryError::Overlaps {
            guest_phys_addr: info.guest_phys_addr,
            other,
        };
        if let Some(other) = self.regions.iter().find(|other| info.overlaps(other)) {
            return Err(overlaps(other.guest_phys_addr));
        }
        let region = Arc::new(info.map(fd)?);
        let memory = self
            .memory
            .insert_region(region)
            .map_err(|_| overlaps(info.guest_phys_addr))?;
        self.memory = Arc::new(memory);
        self.regions.push(info);
        self.removed.retain(|removed| !removed.is_same(&info));
        Ok(())
    }

    /// Forgets a region (REM_MEM_REG). Address, size and frontend address must be those it was
    /// added with. It stays mapped until the last holder of the old `Arc` lets go.
    ///
    /// # Errors
    /// There is no such region.
    pub fn remove(
        &mut self,
        guest_phys_addr: u64,
        size: u64,
        userspace_addr: u64,
    ) -> Result<RegionInfo, MemoryError> {
        let unknown = || MemoryError::Unknown {
            guest_phys_addr,
            size,
        };
        let place = self
            .regions
            .iter()
            .position(|r| r.is_at(guest_phys_addr, size, userspace_addr))
            .ok_or_else(unknown)?;
        let (memory, _) = self
            .memory
            .remove_region(GuestAddress(guest_phys_addr), size)
            .map_err(|_| unknown())?;
        self.memory = Arc::new(memory);
        let gone = self.regions.swap_remove(place);
        if self.removed.len() >= REGIONS_MAX {
            self.removed.pop_front();
        }
        self.removed.push_back(gone);
        Ok(gone)
    }

    /// Whether there was a region that [`Self::remove`] has forgotten, and that did not come back: a
    /// frontend that says once more that it is gone is right. Remembered are the last
    /// [`REGIONS_MAX`].
    #[must_use]
    pub fn was_removed(&self, info: &RegionInfo) -> bool {
        self.removed.iter().any(|removed| removed.is_same(info))
    }

    /// The memory as it is now.
    #[must_use]
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// The regions as the frontend described them.
    #[must_use]
    pub fn regions(&self) -> &[RegionInfo] {
        &self.regions
    }

    /// The guest physical address of an address of the frontend's.
    #[must_use]
    pub fn user_to_guest(&self, userspace_addr: u64) -> Option<u64> {
        self.regions.iter().find_map(|r| {
            let offset = userspace_addr.checked_sub(r.userspace_addr)?;
            (offset < r.size).then(|| r.guest_phys_addr + offset)
        })
    }
}

/// A piece of a shared mapping that is accessed with atomics only, since another process writes to
/// it at the same time. Keeps the mapping alive.
#[derive(Clone, Debug)]
pub(crate) struct Window {
    start: NonNull<u8>,
    len: usize,
    mapping: Arc<MmapRegion>,
    offset: usize,
}

// SAFETY: the pointer stays valid as long as `mapping` lives, on any thread, and all accesses
// through it are atomic or volatile copies of plain bytes.
unsafe impl Send for Window {}
// SAFETY: as above; there is no unsynchronised state.
unsafe impl Sync for Window {}

impl Window {
    /// `len` bytes at `offset` of `mapping`, or `None` if they are not all in it.
    pub(crate) fn new(mapping: Arc<MmapRegion>, offset: usize, len: usize) -> Option<Self> {
        let end = offset.checked_add(len)?;
        if end > mapping.size() {
            return None;
        }
        Some(Self {
            start: NonNull::new(mapping.as_ptr().wrapping_add(offset))?,
            len,
            mapping,
            offset,
        })
    }

    /// `len` bytes of guest memory at `addr`, if one region holds all of them.
    pub(crate) fn of_guest(memory: &GuestMemory, addr: u64, len: usize) -> Option<Self> {
        let region = memory.find_region(GuestAddress(addr))?;
        let offset = usize::try_from(addr.checked_sub(region.start_addr().0)?).ok()?;
        Self::new(region.get_mmap(), offset, len)
    }

    /// A piece of this piece.
    pub(crate) fn sub(&self, offset: usize, len: usize) -> Option<Self> {
        let end = offset.checked_add(len)?;
        if end > self.len {
            return None;
        }
        Self::new(Arc::clone(&self.mapping), self.offset + offset, len)
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn is_aligned_to(&self, bytes: usize) -> bool {
        self.start.addr().get().is_multiple_of(bytes)
    }

    /// The integer at `offset`.
    ///
    /// # Panics
    /// It is out of bounds or not aligned. Callers compute offsets from what they have validated
    /// when they made the window, never from what a guest says, so no guest gets here.
    #[inline]
    pub(crate) fn atomic<T: AtomicInteger>(&self, offset: usize) -> &T {
        assert!(
            offset <= self.len && self.len - offset >= size_of::<T>(),
            "offset outside of the window"
        );
        // SAFETY: `offset` is within the window (just checked), so within one live mapping.
        let place = unsafe { self.start.add(offset) }.cast::<T>();
        assert!(place.is_aligned(), "misaligned access");
        // SAFETY: in bounds and aligned (checked above); the mapping is readable and writable and
        // lives as long as `self`; every bit pattern is a `T`; others change it at any time, for
        // which `T` is an atomic.
        unsafe { place.as_ref() }
    }

    /// The bytes as a volatile slice, for copies.
    pub(crate) fn slice(&self, offset: usize, len: usize) -> Option<VolatileSlice<'_, BS<'_, ()>>> {
        if offset.checked_add(len)? > self.len {
            return None;
        }
        self.mapping.get_slice(self.offset + offset, len).ok()
    }
}
