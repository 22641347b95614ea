//! Page-aligned buffers for direct I/O, and a pool of them so that the data path does not
//! allocate.
//!
//! A pool cuts its buffers from chunks of the size of a huge page, and asks for huge pages. So a
//! buffer is one stretch of memory for the disk, too: with pages from here and there the kernel
//! looks up and pins each page of each transfer, and hands the disk a list of them.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use super::geometry::BLOCK_LEN;

/// Owned bytes, aligned to 4 KiB, a multiple of 4 KiB long.
pub struct Buffer {
    start: NonNull<u8>,
    /// Bytes in use.
    len: usize,
    /// Bytes allocated.
    capacity: usize,
    /// What it was cut from; `None`: an allocation of its own.
    chunk: Option<Arc<Chunk>>,
}

// SAFETY: a Buffer owns its allocation as a Vec<u8> does, or its part of a chunk, of which no two
// buffers have the same part; nothing else points into it.
unsafe impl Send for Buffer {}
// SAFETY: shared access only reads.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// Zeroed bytes for `blocks` blocks.
    pub fn zeroed(blocks: usize) -> Self {
        let capacity = blocks.max(1) * BLOCK_LEN;
        let layout = Self::layout(capacity);
        // SAFETY: the layout has a size that is not zero.
        let Some(start) = NonNull::new(unsafe { alloc_zeroed(layout) }) else {
            handle_alloc_error(layout)
        };
        Self {
            start,
            len: blocks * BLOCK_LEN,
            capacity,
            chunk: None,
        }
    }

    /// A copy of `bytes`, which is a multiple of 4 KiB long.
    pub fn copy_of(bytes: &[u8]) -> Self {
        debug_assert!(bytes.len().is_multiple_of(BLOCK_LEN));
        let mut buffer = Self::zeroed(bytes.len() / BLOCK_LEN);
        buffer.copy_from_slice(bytes);
        buffer
    }

    fn layout(capacity: usize) -> Layout {
        // Cannot fail: the alignment is a power of two and capacities are far below isize::MAX.
        Layout::from_size_align(capacity, BLOCK_LEN).expect("layout of a block buffer")
    }

    /// Sets how many of the allocated blocks are in use.
    ///
    /// # Panics
    /// More than were allocated.
    pub fn set_blocks(&mut self, blocks: usize) {
        let len = blocks * BLOCK_LEN;
        assert!(len <= self.capacity, "a buffer cannot grow");
        self.len = len;
    }

    /// Blocks that it has room for.
    pub const fn capacity_blocks(&self) -> usize {
        self.capacity / BLOCK_LEN
    }

    /// Blocks in use.
    pub const fn blocks(&self) -> usize {
        self.len / BLOCK_LEN
    }

    /// Block `index` of it.
    pub fn block(&self, index: usize) -> &[u8] {
        &self[index * BLOCK_LEN..(index + 1) * BLOCK_LEN]
    }

    /// Block `index` of it.
    pub fn block_mut(&mut self, index: usize) -> &mut [u8] {
        &mut self[index * BLOCK_LEN..(index + 1) * BLOCK_LEN]
    }
}

impl Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `start` points at `capacity >= len` initialised bytes that we own.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes the access unique.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.chunk.is_none() {
            // SAFETY: allocated in `zeroed` with this layout.
            unsafe { dealloc(self.start.as_ptr(), Self::layout(self.capacity)) }
        }
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Contents may be a guest's plaintext: never in a log.
        write!(f, "Buffer({} of {} bytes)", self.len, self.capacity)
    }
}

/// Memory that buffers are cut from. It lives as long as one of them.
struct Chunk {
    start: NonNull<u8>,
}

// SAFETY: it is only an address range to be unmapped; its bytes are the buffers'.
unsafe impl Send for Chunk {}
// SAFETY: as above.
unsafe impl Sync for Chunk {}

impl Chunk {
    /// A huge page. Tests open volumes by the thousand and would spend their time zeroing those.
    const LEN: usize = if cfg!(test) { 256 << 10 } else { 2 << 20 };

    /// Zeroed memory, or `None` if there is none to be had.
    fn new() -> Option<Self> {
        // A mapping of twice the length has an aligned part of the length; the rest is returned.
        let len = 2 * Self::LEN;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new private mapping at an address of the kernel's choice touches nothing.
        let map =
            unsafe { mmap_anonymous(std::ptr::null_mut(), len, protection, MapFlags::PRIVATE) }
                .ok()?
                .cast::<u8>();
        let before = map.align_offset(Self::LEN);
        let start = map.wrapping_add(before);
        let after = len - before - Self::LEN;
        for (edge, edge_len) in [(map, before), (start.wrapping_add(Self::LEN), after)] {
            if edge_len > 0 {
                // SAFETY: a part of the mapping just made that nobody knows of; a failure leaves
                // it mapped, untouched.
                let _ = unsafe { munmap(edge.cast(), edge_len) };
            }
        }
        // Guest data have no business in a core dump. Neither piece of advice is needed.
        for advice in [Advice::LinuxHugepage, Advice::LinuxDontDump] {
            // SAFETY: the range is mapped and ours; neither advice changes what is read from it.
            let _ = unsafe { madvise(start.cast(), Self::LEN, advice) };
        }
        NonNull::new(start).map(|start| Self { start })
    }

    /// All of it, cut into buffers of `capacity` bytes each, a power of two.
    fn cut(self, capacity: usize) -> impl Iterator<Item = Buffer> {
        let chunk = Arc::new(self);
        (0..Self::LEN / capacity).map(move |index| Buffer {
            // SAFETY: within the chunk, since index * capacity < LEN.
            start: unsafe { chunk.start.add(index * capacity) },
            len: 0,
            capacity,
            chunk: Some(Arc::clone(&chunk)),
        })
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, and the last buffer cut from it is gone.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), Self::LEN) };
    }
}

/// Buffers to reuse, by power-of-two size.
#[derive(Debug, Default)]
pub struct Pool {
    classes: [Vec<Buffer>; Pool::CLASSES],
}

impl Pool {
    /// 1, 2, 4 .. 64 blocks.
    const CLASSES: usize = 7;
    /// Most blocks of a buffer.
    pub const MAX_BLOCKS: usize = 1 << (Self::CLASSES - 1);
    /// Bytes kept a class: enough for a deep queue of that size.
    const KEEP_BYTES: usize = 8 << 20;

    /// A buffer with `blocks` blocks in use; its contents are old bytes of this pool.
    pub fn take(&mut self, blocks: usize) -> Buffer {
        let capacity = blocks.max(1).next_power_of_two();
        let class = self.classes.get_mut(capacity.trailing_zeros() as usize);
        let kept = class.and_then(|kept| {
            if kept.is_empty() {
                kept.extend(Chunk::new()?.cut(capacity * BLOCK_LEN));
            }
            kept.pop()
        });
        let mut buffer = kept.unwrap_or_else(|| Buffer::zeroed(capacity));
        buffer.set_blocks(blocks);
        buffer
    }

    /// Keeps a buffer for later.
    pub fn give(&mut self, buffer: Buffer) {
        let class = buffer.capacity_blocks().trailing_zeros() as usize;
        if let Some(kept) = self.classes.get_mut(class)
            && kept.len() * buffer.capacity < Self::KEEP_BYTES
            && buffer.capacity_blocks().is_power_of_two()
        {
            kept.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_of_a_pool_do_not_overlap_and_outlive_it() {
        let mut pool = Pool::default();
        let mut buffers = Vec::new();
        for round in 0..5 {
            for blocks in [1, 2, 3, 7, 64, 1, 33] {
                let mut buffer = pool.take(blocks);
                assert_eq!(buffer.blocks(), blocks);
                assert!(buffer.as_ptr().addr().is_multiple_of(BLOCK_LEN));
                buffer.fill(buffers.len() as u8 + 1);
                buffers.push(buffer);
            }
            if round == 3 {
                pool = Pool::default();
            }
        }
        drop(pool);
        for (index, buffer) in buffers.iter().enumerate() {
            assert!(buffer.iter().all(|byte| *byte == index as u8 + 1));
        }
    }

    #[test]
    fn a_buffer_that_was_given_back_is_taken_again() {
        let mut pool = Pool::default();
        let buffer = pool.take(3);
        let place = buffer.as_ptr();
        pool.give(buffer);
        assert_eq!(pool.take(4).as_ptr(), place);
        assert_ne!(pool.take(4).as_ptr(), place);
    }
}
