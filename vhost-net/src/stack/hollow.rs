//! Memory for frames of which only the headers matter.
//!
//! smoltcp copies a payload behind the headers that it writes, also where nobody wants it (see
//! [`super::kept`]), and 64 KiB take a while to be written: an eighth of the thread's time. Here they all
//! go to one page, which is mapped again and again behind the first one, and never leaves the
//! processor's nearest cache.

use std::ptr::{self, NonNull};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

/// From the C library, which has known it since the process began: its sandbox lets nothing be looked up.
fn page_size() -> Option<usize> {
    // SAFETY: the call takes a number and has no requirement on memory.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).ok().filter(|size| *size > 0)
}

/// A page of its own, and behind it one page as often as it takes.
#[derive(Debug)]
pub(super) struct Hollow {
    at: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to this value alone.
unsafe impl Send for Hollow {}

impl Hollow {
    /// Room for frames of at least `len` bytes. `None`: the kernel has no memory for it, or does not
    /// let the process map any.
    pub(super) fn new(len: usize) -> Option<Self> {
        let page = page_size()?;
        let len = len.checked_next_multiple_of(page)?.max(page);
        let fd = memfd_create("headers", MemfdFlags::CLOEXEC).ok()?;
        ftruncate(&fd, 2 * page as u64).ok()?;
        // SAFETY: a fresh mapping wherever the kernel likes.
        let at = unsafe {
            mmap_anonymous(ptr::null_mut(), len, ProtFlags::empty(), MapFlags::PRIVATE).ok()?
        };
        let hollow = Self {
            at: NonNull::new(at.cast())?,
            len,
        };
        for start in (0..len).step_by(page) {
            // SAFETY: the page lies in the mapping made above, which nothing else refers to.
            let done = unsafe {
                mmap(
                    at.wrapping_byte_add(start),
                    page,
                    ProtFlags::READ | ProtFlags::WRITE,
                    MapFlags::SHARED | MapFlags::FIXED,
                    &fd,
                    if start == 0 { 0 } else { page as u64 },
                )
            };
            done.ok()?;
        }
        Some(hollow)
    }

    /// The memory: what is written beyond the first page is lost, and what is read there is whatever
    /// was written last to any of those pages.
    pub(super) fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: all of it is mapped for reading and writing as long as this value lives, and it is
        // lent once at a time. That several addresses are the same memory changes what bytes are found
        // there, but any bytes are valid ones.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr(), self.len) }
    }
}

impl Drop for Hollow {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new`, and nobody has it any more. If it fails it stays.
        let _ = unsafe { munmap(self.at.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_page_keeps_what_is_written_and_the_others_are_one() {
        let page = page_size().unwrap();
        let mut hollow = Hollow::new(10 * page - 100).unwrap();
        let bytes = hollow.bytes();
        assert_eq!(bytes.len(), 10 * page);
        bytes[..page].fill(7);
        bytes[page..].fill(1);
        bytes[5 * page + 3] = 9;
        assert!(bytes[..page].iter().all(|byte| *byte == 7));
        // Read where the compiler has not seen it written.
        let other = std::hint::black_box(&*bytes)[2 * page + 3];
        assert_eq!(other, 9);
    }
}
