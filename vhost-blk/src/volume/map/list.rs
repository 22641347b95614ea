//! Which page goes when another one comes: pins, and the list of those without. See the module above
//! for what pins a page.

use std::cell::Cell;

use super::{Frame, MapTree, NONE, RESIDENT_LEVEL, index_of, level_of, parent_of};
use crate::volume::page::Page;

impl MapTree {
    /// A page of undefined contents for `key`, which has none, in the memory of one that goes if
    /// there is no room.
    pub(super) fn add(&mut self, key: u64) -> u32 {
        let level = level_of(key);
        // Before making room, or the parent may be what goes.
        self.pin(parent_of(key));
        while self.index.len() >= self.budget && self.evict() {}
        let is_touched = match level {
            0 => self.touched_leaves.contains(&index_of(key)),
            1 => self.touched_parents.contains(&index_of(key)),
            _ => false,
        };
        let pins = u32::from(is_touched) + u32::from(level >= RESIDENT_LEVEL);
        let vacant = self.vacant.pop();
        let at = vacant.unwrap_or(self.frames.len() as u32);
        match self.frames.get_mut(at as usize) {
            Some(frame) => {
                frame.key = key;
                frame.pins = pins;
                frame.is_dirty = false;
                frame.is_written = false;
                frame.is_touched = is_touched;
                frame.is_marked.set(true);
            }
            None => self.frames.push(Frame {
                key,
                page: Page::empty(),
                pins,
                is_dirty: false,
                is_written: false,
                is_touched,
                is_marked: Cell::new(true),
                before: NONE,
                behind: NONE,
            }),
        }
        self.index.insert(key, at);
        if pins == 0 {
            self.link(at);
        }
        at
    }

    /// Forgets a page. It has no pins, or is known to be needed no more.
    pub(super) fn remove(&mut self, key: u64) {
        let Some(at) = self.index.remove(&key) else {
            return;
        };
        if self.frames.get(at as usize).is_some_and(|f| f.pins == 0) {
            self.unlink(at);
        }
        self.vacant.push(at);
        self.unpin(parent_of(key));
    }

    /// Forgets the page that was not used for the longest time. Whether there was one to forget.
    fn evict(&mut self) -> bool {
        // Each step takes a mark away, so this ends after two rounds.
        while self.oldest != NONE {
            let at = self.oldest;
            let Some(frame) = self.frames.get(at as usize) else {
                return false;
            };
            if frame.is_marked.replace(false) {
                self.unlink(at);
                self.link(at);
                continue;
            }
            let key = frame.key;
            self.evictions += 1;
            self.remove(key);
            return true;
        }
        false
    }

    /// Comes back to the budget after more was pinned than it allows.
    pub(super) fn shrink(&mut self) {
        self.trim();
        while self.index.len() > self.budget && self.evict() {
            self.trim();
        }
    }

    /// A frame without a page still has the memory of one.
    fn trim(&mut self) {
        while self.frames.len() > self.budget
            && let Some(at) = self.vacant.pop()
        {
            self.drop_frame(at);
        }
    }

    /// Gives a vacant frame's memory back: the last frame takes its place.
    fn drop_frame(&mut self, at: u32) {
        let last = (self.frames.len() - 1) as u32;
        if at != last {
            if let Some(place) = self.vacant.iter_mut().find(|vacant| **vacant == last) {
                *place = at;
            } else {
                let is_linked = self.frames[last as usize].pins == 0;
                let Frame {
                    key,
                    before,
                    behind,
                    ..
                } = self.frames[last as usize];
                self.index.insert(key, at);
                if is_linked {
                    self.set_behind(before, at);
                    self.set_before(behind, at);
                }
            }
        }
        self.frames.swap_remove(at as usize);
    }

    fn set_behind(&mut self, at: u32, behind: u32) {
        match self.frames.get_mut(at as usize) {
            Some(frame) => frame.behind = behind,
            None => self.newest = behind,
        }
    }

    fn set_before(&mut self, at: u32, before: u32) {
        match self.frames.get_mut(at as usize) {
            Some(frame) => frame.before = before,
            None => self.oldest = before,
        }
    }

    /// Puts a frame to the newest end of the list.
    fn link(&mut self, at: u32) {
        let behind = self.newest;
        if let Some(frame) = self.frames.get_mut(at as usize) {
            (frame.before, frame.behind) = (NONE, behind);
        }
        self.newest = at;
        self.set_before(behind, at);
    }

    fn unlink(&mut self, at: u32) {
        let Some(Frame { before, behind, .. }) = self.frames.get(at as usize) else {
            return;
        };
        let (before, behind) = (*before, *behind);
        self.set_behind(before, behind);
        self.set_before(behind, before);
    }

    pub(super) fn pin(&mut self, key: u64) {
        if let Some(at) = self.index.get(&key).copied()
            && let Some(frame) = self.frames.get_mut(at as usize)
        {
            frame.pins += 1;
            if frame.pins == 1 {
                self.unlink(at);
            }
        }
    }

    pub(super) fn unpin(&mut self, key: u64) {
        if let Some(at) = self.index.get(&key).copied()
            && let Some(frame) = self.frames.get_mut(at as usize)
        {
            debug_assert!(frame.pins > 0, "a pin is given back twice");
            frame.pins -= 1;
            if frame.pins == 0 {
                self.link(at);
            }
        }
    }
}
