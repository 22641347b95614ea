//! Memory of flows is given back when they end, and what they never used is never there.
//!
//! A flow's buffers are large, and most flows use little of them. Fresh pages from the kernel cost
//! nothing until they are touched; but glibc, having once seen such a block freed, takes the next one
//! from its heap and fills it with zeros: each new connection would then touch a megabyte, and hold
//! it. So the size from which blocks are pages of their own is fixed.

/// Blocks of at least so many bytes are pages of their own: less than a flow's buffers.
pub const PAGES_FROM: usize = 128 << 10;

/// Fixes that size for the whole process. To be called first of all.
pub fn use_fresh_pages() {
    #[cfg(target_env = "gnu")]
    {
        let bytes = libc::c_int::try_from(PAGES_FROM).unwrap_or(libc::c_int::MAX);
        // SAFETY: the call takes two numbers and has no requirement on memory; the parameter and its
        // range are those of mallopt(3). It only fails for sizes that are out of range.
        let is_set = unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, bytes) };
        debug_assert_eq!(is_set, 1);
        // SAFETY: as above. Each flow has two blocks, and there may be a million flows.
        let is_set = unsafe { libc::mallopt(libc::M_MMAP_MAX, libc::c_int::MAX) };
        debug_assert_eq!(is_set, 1);
    }
}
