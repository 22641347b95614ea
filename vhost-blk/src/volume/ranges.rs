//! Who may write which blocks at the same time.
//!
//! Writes of whole blocks need no lock against each other: each has slots of its own, and the
//! later sequence number wins, so any two that overlap in time end as one after the other. A
//! partial block is read, merged and written back (a read-modify-write): it would undo a write
//! that lands in between, so it runs alone on its block. Reads need no lock at all: they see the
//! entry before or after, and the slot that they are under way to is kept by its epoch.
//!
//! Those who have to wait are served in the order they came; a later one does not overtake an
//! earlier one that it overlaps.

use std::collections::VecDeque;

use super::mutant::{self, Mutant};

/// Who waits: opaque to this module.
pub type Ticket = (u16, u32);

#[derive(Clone, Copy, Debug)]
struct Range {
    first: u64,
    end: u64,
    is_exclusive: bool,
}

impl Range {
    const fn conflicts(&self, other: &Self) -> bool {
        (self.is_exclusive || other.is_exclusive)
            && self.first < other.end
            && other.first < self.end
    }
}

/// The ranges being written and those waiting.
#[derive(Debug, Default)]
pub struct Ranges {
    held: slab::Slab<Range>,
    exclusive: usize,
    waiting: VecDeque<(Ticket, Range)>,
}

/// Proof of a held range; give it back with [`Ranges::release`].
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub struct Held(usize);

impl Ranges {
    /// Takes `first..first + count`, or queues `ticket` for it.
    pub fn acquire(
        &mut self,
        ticket: Ticket,
        first: u64,
        count: u64,
        is_exclusive: bool,
    ) -> Option<Held> {
        let is_exclusive = is_exclusive && !mutant::is(Mutant::SharedRanges);
        let range = Range {
            first,
            end: first + count,
            is_exclusive,
        };
        let in_question = is_exclusive || self.exclusive > 0 || !self.waiting.is_empty();
        if in_question
            && (self.held.iter().any(|(_, held)| held.conflicts(&range))
                || self
                    .waiting
                    .iter()
                    .any(|(_, waiting)| waiting.conflicts(&range)))
        {
            self.waiting.push_back((ticket, range));
            return None;
        }
        Some(self.hold(range))
    }

    fn hold(&mut self, range: Range) -> Held {
        self.exclusive += usize::from(range.is_exclusive);
        Held(self.held.insert(range))
    }

    /// Gives a range back; `granted` is told who may go on.
    pub fn release(&mut self, held: Held, granted: &mut dyn FnMut(Ticket, Held)) {
        let range = self.held.remove(held.0);
        self.exclusive -= usize::from(range.is_exclusive);
        self.serve(granted);
    }

    /// Takes back what those with tickets of `owner` wait for; `granted` is told who may go on.
    pub fn forget(&mut self, owner: u16, granted: &mut dyn FnMut(Ticket, Held)) {
        self.waiting.retain(|((waiting, _), _)| *waiting != owner);
        self.serve(granted);
    }

    fn serve(&mut self, granted: &mut dyn FnMut(Ticket, Held)) {
        let mut index = 0;
        while index < self.waiting.len() {
            let (ticket, range) = self.waiting[index];
            let is_blocked = self.held.iter().any(|(_, held)| held.conflicts(&range))
                || self
                    .waiting
                    .iter()
                    .take(index)
                    .any(|(_, earlier)| earlier.conflicts(&range));
            if is_blocked {
                index += 1;
                continue;
            }
            self.waiting.remove(index);
            let held = self.hold(range);
            granted(ticket, held);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_block_writes_do_not_wait_for_each_other() {
        let mut ranges = Ranges::default();
        let a = ranges.acquire((0, 1), 0, 10, false);
        let b = ranges.acquire((0, 2), 5, 10, false);
        assert!(a.is_some() && b.is_some());
    }

    #[test]
    fn a_partial_write_runs_alone_on_its_block_and_in_turn() {
        let mut ranges = Ranges::default();
        let whole = ranges.acquire((0, 1), 0, 10, false).expect("free");
        assert_eq!(ranges.acquire((0, 2), 5, 1, true), None);
        assert_eq!(
            ranges.acquire((0, 3), 5, 2, false),
            None,
            "does not overtake the waiting one"
        );
        assert!(ranges.acquire((0, 4), 20, 2, false).is_some());
        let mut got = Vec::new();
        ranges.release(whole, &mut |ticket, held| got.push((ticket, held)));
        assert_eq!(got.len(), 1);
        let (ticket, held) = got.pop().expect("one");
        assert_eq!(ticket, (0, 2));
        ranges.release(held, &mut |ticket, held| got.push((ticket, held)));
        assert_eq!(got.pop().expect("one").0, (0, 3));
    }

    #[test]
    fn who_is_gone_keeps_nobody_waiting() {
        let mut ranges = Ranges::default();
        let held = ranges.acquire((0, 1), 5, 1, true).expect("free");
        assert_eq!(ranges.acquire((7, 2), 5, 2, true), None);
        assert_eq!(ranges.acquire((0, 3), 6, 1, false), None);
        let mut got = Vec::new();
        ranges.forget(7, &mut |ticket, held| got.push((ticket, held)));
        assert_eq!(got.len(), 1);
        assert_eq!(got.pop().expect("one").0, (0, 3));
        ranges.release(held, &mut |ticket, _| {
            panic!("{ticket:?} waits for nothing")
        });
    }
}
