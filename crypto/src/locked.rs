//! A secret alone on its own memory page, locked against swap.
//!
//! `mlock(2)` works on whole pages and does not nest: were two secrets on one page, releasing the first
//! would unlock the second. So each value gets a page of its own, by alignment, which needs no `unsafe`.
//! This costs 4 KiB a key, and a card holds a few dozen. (On a kernel with larger pages neighbours do
//! share, and the lock is weaker.)
//!
//! Locking is best effort: a small `RLIMIT_MEMLOCK` must not keep a volume from opening.
//!
//! On drop: wipe, unlock, release, in this order, so that the page is never both swappable and secret.

use zeroize::Zeroize;

const PAGE: usize = 4096;

#[repr(C, align(4096))]
struct Page<T>(T);

const _: () = assert!(size_of::<Page<[u8; 32]>>() == PAGE);

/// A value that can overwrite its secrets with public ones.
pub(crate) trait Wipe {
    /// Leaves nothing secret behind. Called once, before the memory is given back.
    fn wipe(&mut self);
}

impl Wipe for [u8; 32] {
    fn wipe(&mut self) {
        self.zeroize();
    }
}

/// A `T` on pages of its own.
pub(crate) struct Locked<T: Wipe> {
    // Declared before `page`: fields drop in this order, and a guard must not outlive its memory.
    guard: Option<region::LockGuard>,
    page: Box<Page<T>>,
}

impl<T: Wipe> Locked<T> {
    /// Moves `value` to its page. A secret should be written there afterwards by [`Locked::get_mut`], as
    /// what is moved here leaves a copy on the stack.
    pub(crate) fn new(value: T) -> Self {
        let page = Box::new(Page(value));
        let guard = region::lock(std::ptr::from_ref(&*page), size_of::<Page<T>>()).ok();
        Self { guard, page }
    }

    pub(crate) fn get(&self) -> &T {
        &self.page.0
    }

    pub(crate) fn get_mut(&mut self) -> &mut T {
        &mut self.page.0
    }

    /// Whether the kernel took the lock.
    pub(crate) fn is_locked(&self) -> bool {
        self.guard.is_some()
    }
}

impl<T: Wipe> Drop for Locked<T> {
    fn drop(&mut self) {
        self.page.0.wipe();
    }
}

/// Overwrites the stack below the caller, where callees that have just returned kept their temporaries.
///
/// Best effort: nothing in the language promises that the frames overlap. They do in practice, and it costs
/// a microsecond per key.
#[inline(never)]
pub(crate) fn scrub_stack() {
    let mut frame = [0u8; 8 * 1024];
    frame.zeroize();
    std::hint::black_box(&frame);
}

#[cfg(test)]
pub(crate) mod tests;
