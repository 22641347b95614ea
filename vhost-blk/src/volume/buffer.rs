//! Page-aligned buffers for direct I/O, and a pool of them so that the data path does not
//! allocate.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use super::geometry::BLOCK_LEN;

/// Owned bytes, aligned to 4 KiB, a multiple of 4 KiB long.
pub struct Buffer {
    start: NonNull<u8>,
    /// Bytes in use.
    len: usize,
    /// Bytes allocated.
    capacity: usize,
}

// SAFETY: a Buffer owns its allocation as a Vec<u8> does; nothing else points into it.
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
        // SAFETY: allocated in `zeroed` with this layout.
        unsafe { dealloc(self.start.as_ptr(), Self::layout(self.capacity)) }
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Contents may be a guest's plaintext: never in a log.
        write!(f, "Buffer({} of {} bytes)", self.len, self.capacity)
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
        let class = blocks.max(1).next_power_of_two().trailing_zeros() as usize;
        let mut buffer = self
            .classes
            .get_mut(class)
            .and_then(Vec::pop)
            .unwrap_or_else(|| Buffer::zeroed(blocks.max(1).next_power_of_two()));
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
