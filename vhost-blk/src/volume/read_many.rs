//! Blocking reads of many slots: in order of their places, neighbours at once, and on a file by
//! many threads.
//!
//! A volume with a scattered working set has tens of thousands of pages above the leaves, and a log
//! may end in a commit of as many blocks: read one after the other they would cost a round trip
//! to the disk each. Threads rather than an io_uring: recovery runs before the sandbox, which wants
//! to be alone in its process, and the workers that a ring may start (for reads that the file
//! system cannot do without waiting) end when the kernel likes; these threads are joined.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, mpsc};

use super::buffer::{Buffer, Pool};
use super::geometry::Slot;

/// Reads under way at a time.
const THREADS: usize = 32;
/// With fewer stretches than this, threads are not worth their start.
const WORTH_IT: usize = 8;

/// Consecutive slots: where they begin, and which of the slots asked for they are.
struct Stretch {
    start: Slot,
    members: Vec<usize>,
}

/// What is to be told of each slot.
pub type Each<'e> = &'e mut dyn FnMut(usize, io::Result<&mut [u8]>);

fn stretches(slots: &[Slot]) -> Vec<Stretch> {
    let mut order: Vec<(Slot, usize)> = slots.iter().copied().zip(0..).collect();
    order.sort_unstable();
    let mut list: Vec<Stretch> = Vec::new();
    for (slot, index) in order {
        match list.last_mut() {
            Some(Stretch { start, members })
                if members.len() < Pool::MAX_BLOCKS
                    && start.0.checked_add(members.len() as u64) == Some(slot.0) =>
            {
                members.push(index);
            }
            _ => list.push(Stretch {
                start: slot,
                members: vec![index],
            }),
        }
    }
    list
}

/// Reads a stretch; if it fails, block by block: a bad sector is not its neighbours' trouble.
fn read_stretch(
    stretch: &Stretch,
    buffer: &mut Buffer,
    read: &dyn Fn(u64, &mut [u8]) -> io::Result<()>,
    each: Each<'_>,
) {
    buffer.set_blocks(stretch.members.len());
    let whole = read(stretch.start.offset(), buffer);
    for (place, index) in stretch.members.iter().enumerate() {
        let slot = Slot(stretch.start.0 + place as u64);
        let block = buffer.block_mut(place);
        let outcome = match &whole {
            Ok(()) => Ok(()),
            Err(_) if stretch.members.len() > 1 => read(slot.offset(), block),
            Err(error) => Err(copy_of(error)),
        };
        each(*index, outcome.map(|()| block));
    }
}

fn copy_of(error: &io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(errno) => io::Error::from_raw_os_error(errno),
        None => io::Error::new(error.kind(), error.to_string()),
    }
}

/// One stretch after the other.
pub fn in_order(slots: &[Slot], read: &dyn Fn(u64, &mut [u8]) -> io::Result<()>, each: Each<'_>) {
    let mut buffer = Buffer::zeroed(Pool::MAX_BLOCKS.min(slots.len()));
    for stretch in stretches(slots) {
        read_stretch(&stretch, &mut buffer, read, each);
    }
}

/// Many stretches at a time. `each` is called on this thread.
pub fn in_parallel(file: &File, slots: &[Slot], each: Each<'_>) {
    let list = stretches(slots);
    let read = |offset: u64, into: &mut [u8]| file.read_exact_at(into, offset);
    if list.len() < WORTH_IT {
        return in_order(slots, &read, each);
    }
    let next = AtomicUsize::new(0);
    let (give_back, buffers) = mpsc::channel::<Buffer>();
    let buffers = Mutex::new(buffers);
    let (next, list, buffers) = (&next, &list, &buffers);
    std::thread::scope(|scope| {
        let (landed, results) = mpsc::sync_channel::<(usize, Buffer, io::Result<()>)>(THREADS);
        let take = move || {
            let kept = buffers.lock().ok().and_then(|kept| kept.try_recv().ok());
            kept.unwrap_or_else(|| Buffer::zeroed(Pool::MAX_BLOCKS))
        };
        let mut started = 0;
        for _ in 0..THREADS.min(list.len()) {
            let landed = landed.clone();
            let work = move || {
                while let Some(index) = Some(next.fetch_add(1, Ordering::Relaxed))
                    && let Some(stretch) = list.get(index)
                {
                    let mut buffer = take();
                    buffer.set_blocks(stretch.members.len());
                    let outcome = read(stretch.start.offset(), &mut buffer);
                    if landed.send((index, buffer, outcome)).is_err() {
                        return;
                    }
                }
            };
            let thread = std::thread::Builder::new().name("reader".into());
            started += usize::from(thread.spawn_scoped(scope, work).is_ok());
        }
        drop(landed);
        let mut spare = Buffer::zeroed(Pool::MAX_BLOCKS);
        if started == 0 {
            return list
                .iter()
                .for_each(|stretch| read_stretch(stretch, &mut spare, &read, each));
        }
        for (index, mut buffer, outcome) in results {
            let Some(stretch) = list.get(index) else {
                continue;
            };
            if outcome.is_err() {
                read_stretch(stretch, &mut spare, &read, each);
            } else {
                for (place, member) in stretch.members.iter().enumerate() {
                    each(*member, Ok(buffer.block_mut(place)));
                }
            }
            let _ = give_back.send(buffer);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::geometry::BLOCK_LEN;

    fn file(blocks: u64) -> File {
        let file = tempfile::tempfile().expect("a file");
        for block in 0..blocks {
            file.write_all_at(&[block as u8; BLOCK_LEN], block * BLOCK_LEN as u64)
                .expect("writes");
        }
        file
    }

    #[test]
    fn every_slot_is_told_once_with_its_own_bytes() {
        let file = file(200);
        // Backwards, with gaps, with one asked for twice, and long stretches.
        let mut slots: Vec<Slot> = (0..200).rev().filter(|n| n % 7 != 3).map(Slot).collect();
        slots.extend([Slot(5), Slot(5)]);
        for is_parallel in [false, true] {
            let mut told = vec![0; slots.len()];
            let mut each = |index: usize, outcome: io::Result<&mut [u8]>| {
                told[index] += 1;
                let bytes = outcome.expect("reads");
                assert!(bytes.iter().all(|byte| *byte == slots[index].0 as u8));
                assert_eq!(bytes.len(), BLOCK_LEN);
            };
            if is_parallel {
                in_parallel(&file, &slots, &mut each);
            } else {
                let read = |offset: u64, into: &mut [u8]| file.read_exact_at(into, offset);
                in_order(&slots, &read, &mut each);
            }
            assert!(told.iter().all(|times| *times == 1));
        }
    }

    #[test]
    fn what_cannot_be_read_does_not_cost_its_neighbours() {
        let file = file(100);
        let slots: Vec<Slot> = (90..110).chain((0..60).step_by(2)).map(Slot).collect();
        let (mut good, mut bad) = (0, 0);
        in_parallel(&file, &slots, &mut |index, outcome| {
            let is_there = slots[index].0 < 100;
            assert_eq!(outcome.is_ok(), is_there, "slot {:?}", slots[index]);
            if is_there { good += 1 } else { bad += 1 }
        });
        assert_eq!((good, bad), (40, 10));
    }
}
