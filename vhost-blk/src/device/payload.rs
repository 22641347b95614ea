//! The guest's buffers of a request, as the engine reads and writes them.
//!
//! The engine goes through a request mostly forwards and in pieces of 4 KiB, so the place of the
//! last access is kept and the next one is found from there. Addresses are checked by
//! [`vm_memory`] at each access: a buffer that is not in guest memory is a [`PayloadFault`].

use std::rc::Rc;
use std::sync::Arc;

use offload::device::{Segment, Segments};
use offload::memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use crate::volume::engine::{Payload, PayloadFault};

/// A queue's own handle on guest memory. Counted without atomics: requests come and go too often
/// for queues to share a counter.
pub type View = Rc<Arc<GuestMemory>>;

/// What of a request goes through the engine.
#[derive(Debug)]
pub struct GuestPayload {
    /// Names the request.
    pub request: u32,
    /// Bytes that were stored, ever.
    pub stored: u64,
    memory: View,
    segments: Segments,
    /// Bytes of the segments that come before the data.
    skip: u64,
    /// A segment and the bytes before it.
    cursor: (usize, u64),
}

impl GuestPayload {
    /// The data of a request: what is in `segments` behind the first `skip` bytes.
    pub fn new(request: u32, memory: View, segments: Segments, skip: usize) -> Self {
        Self {
            request,
            stored: 0,
            memory,
            segments,
            skip: skip as u64,
            cursor: (0, 0),
        }
    }

    /// Calls `copy` with the address and the part of `len` bytes for each stretch of guest memory
    /// from byte `at` of the data on.
    fn walk(
        &mut self,
        at: usize,
        len: usize,
        mut copy: impl FnMut(&GuestMemory, GuestAddress, std::ops::Range<usize>) -> bool,
    ) -> Result<(), PayloadFault> {
        let mut wanted = self.skip + at as u64;
        if wanted < self.cursor.1 {
            self.cursor = (0, 0);
        }
        let mut done = 0;
        while done < len {
            let (index, before) = self.cursor;
            let segment = self.segments.get(index).ok_or(PayloadFault)?;
            let within = wanted - before;
            let Some(left) = u64::from(segment.len)
                .checked_sub(within)
                .filter(|left| *left > 0)
            else {
                self.cursor = (index + 1, before + u64::from(segment.len));
                continue;
            };
            let part = left.min((len - done) as u64) as usize;
            let addr = GuestAddress(segment.addr.checked_add(within).ok_or(PayloadFault)?);
            if !copy(&self.memory, addr, done..done + part) {
                return Err(PayloadFault);
            }
            done += part;
            wanted += part as u64;
        }
        Ok(())
    }
}

impl Payload for GuestPayload {
    fn load(&mut self, at: usize, into: &mut [u8]) -> Result<(), PayloadFault> {
        let len = into.len();
        self.walk(at, len, |memory, addr, part| {
            into.get_mut(part)
                .is_some_and(|part| memory.read_slice(part, addr).is_ok())
        })
    }

    fn store(&mut self, at: usize, from: &[u8]) -> Result<(), PayloadFault> {
        self.walk(at, from.len(), |memory, addr, part| {
            from.get(part)
                .is_some_and(|part| memory.write_slice(part, addr).is_ok())
        })?;
        self.stored += from.len() as u64;
        Ok(())
    }
}

/// Copies bytes out of a list of buffers from byte `at` on, as many as there are and fit. How
/// many; `None`: guest memory is not where the list says.
pub fn gather(memory: &GuestMemory, list: &[Segment], at: usize, into: &mut [u8]) -> Option<usize> {
    let mut skip = at as u64;
    let mut done = 0;
    for segment in list {
        let len = u64::from(segment.len);
        if skip >= len {
            skip -= len;
            continue;
        }
        let rest = into.get_mut(done..)?;
        let part = (len - skip).min(rest.len() as u64) as usize;
        let addr = GuestAddress(segment.addr.checked_add(skip)?);
        memory.read_slice(rest.get_mut(..part)?, addr).ok()?;
        done += part;
        skip = 0;
        if done == into.len() {
            break;
        }
    }
    Some(done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Segments over 64 KiB of memory at 1 MiB, each some bytes from the last.
    fn segments(lens: &[(u16, u16)]) -> (View, Segments, Vec<u64>) {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(1 << 20), 1 << 18)]).unwrap();
        let (mut addr, mut list, mut bytes) = (1 << 20, Segments::new(), Vec::new());
        for (gap, len) in lens {
            addr += u64::from(*gap);
            list.push(Segment {
                addr,
                len: u32::from(*len),
            });
            bytes.extend(addr..addr + u64::from(*len));
            addr += u64::from(*len);
        }
        (Rc::new(Arc::new(memory)), list, bytes)
    }

    proptest! {
        #[test]
        fn every_byte_of_any_access_is_where_a_list_of_bytes_says(
            lens in prop::collection::vec((0..600_u16, 1..900_u16), 1..12),
            skip in 0..40_usize,
            accesses in prop::collection::vec((any::<bool>(), 0..3000_usize, 1..1500_usize), 1..20),
        ) {
            let (memory, list, places) = segments(&lens);
            let mut payload = GuestPayload::new(7, Rc::clone(&memory), list, skip);
            let data = places.get(skip..).unwrap_or_default();
            for (index, (is_store, at, len)) in accesses.into_iter().enumerate() {
                let fits = at + len <= data.len();
                let pattern: Vec<u8> = (0..len).map(|i| (i * 7 + index * 13) as u8).collect();
                if is_store {
                    prop_assert_eq!(payload.store(at, &pattern).is_ok(), fits);
                } else if fits {
                    for (place, byte) in data[at..at + len].iter().zip(&pattern) {
                        memory.write_obj(*byte, GuestAddress(*place)).unwrap();
                    }
                    let mut read = vec![0; len];
                    prop_assert!(payload.load(at, &mut read).is_ok());
                    prop_assert_eq!(&read, &pattern);
                } else {
                    prop_assert!(payload.load(at, &mut vec![0; len]).is_err());
                }
                if is_store && fits {
                    for (place, byte) in data[at..at + len].iter().zip(&pattern) {
                        prop_assert_eq!(memory.read_obj::<u8>(GuestAddress(*place)).unwrap(), *byte);
                    }
                }
            }
        }

        #[test]
        fn gathering_gives_what_there_is(
            lens in prop::collection::vec((0..9_u16, 1..9_u16), 0..6),
            at in 0..20_usize,
            want in 0..40_usize,
        ) {
            let (memory, list, places) = segments(&lens);
            for place in &places {
                memory.write_obj(*place as u8, GuestAddress(*place)).unwrap();
            }
            let mut bytes = vec![0; want];
            let got = gather(&memory, &list, at, &mut bytes).unwrap();
            let expected: Vec<u8> =
                places.iter().skip(at).take(want).map(|place| *place as u8).collect();
            prop_assert_eq!(&bytes[..got], &expected[..]);
        }
    }

    #[test]
    fn buffers_outside_of_guest_memory_are_faults() {
        let (memory, ..) = segments(&[(0, 1)]);
        for addr in [0, (1 << 20) - 1, (1 << 20) + (1 << 18) - 1, u64::MAX - 5] {
            let list = Segments::from_slice(&[Segment { addr, len: 512 }]);
            let mut payload = GuestPayload::new(0, Rc::clone(&memory), list.clone(), 0);
            assert!(payload.load(0, &mut [0; 512]).is_err());
            assert!(payload.store(0, &[0; 512]).is_err());
            assert_eq!(payload.stored, 0);
            assert_eq!(gather(&memory, &list, 0, &mut [0; 16]), None);
        }
    }
}
