//! From a head descriptor to lists of buffers (virtio 1.3, 2.7.5): bounded, once, on values.

use vm_memory::{Bytes, GuestAddress};

use crate::device::{Segment, Segments};
use crate::memory::GuestMemory;

/// Most descriptors in an indirect table. The specification bounds a chain by the queue's size;
/// Linux goes beyond it with indirect tables, QEMU's own limit is 1024.
pub const TABLE_MAX: usize = 1024;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const LEN: usize = 16;

/// What is wrong with a chain.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub enum ChainFault {
    /// More descriptors than there are: it loops.
    #[error("the chain has more descriptors than its table")]
    Loop,
    /// Index of a next descriptor beyond the table.
    #[error("next descriptor {next} is beyond the table")]
    NextOutOfRange {
        /// What the descriptor says.
        next: u16,
    },
    /// A buffer of no bytes.
    #[error("a descriptor has length 0")]
    ZeroLength,
    /// A buffer that ends beyond 2^64.
    #[error("a buffer wraps around the address space")]
    AddressWraps,
    /// Virtio 1.3, 2.7.4.2.
    #[error("a device-readable buffer follows a device-writable one")]
    ReadableAfterWritable,
    /// More than 4 GiB in one direction.
    #[error("the buffers of one direction have 4 GiB or more")]
    TooLong,
    /// The driver did not accept RING_INDIRECT_DESC.
    #[error("an indirect descriptor without the feature")]
    IndirectNotNegotiated,
    /// Virtio 1.3, 2.7.5.3.1.
    #[error("an indirect descriptor within an indirect table")]
    NestedIndirect,
    /// Virtio 1.3, 2.7.5.3.1.
    #[error("an indirect descriptor with a next one")]
    IndirectWithNext,
    /// Not a positive multiple of 16, or beyond [`TABLE_MAX`].
    #[error("an indirect table of {len} bytes")]
    TableLength {
        /// Its length in bytes.
        len: u32,
    },
    /// The table is not in guest memory.
    #[error("an indirect table outside of guest memory")]
    TableAddress,
}

/// `struct virtq_desc`, as values.
#[derive(Clone, Copy, Debug)]
pub(super) struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    /// From the two little-endian words that it is made of.
    #[inline]
    pub(super) fn from_words(first: u64, second: u64) -> Self {
        let second = u64::from_le(second);
        Self {
            addr: u64::from_le(first),
            len: second as u32,
            flags: (second >> 32) as u16,
            next: (second >> 48) as u16,
        }
    }

    fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// The lists as they grow.
#[derive(Default)]
struct Lists {
    readable: Segments,
    writable: Segments,
    readable_len: u32,
    writable_len: u32,
}

impl Lists {
    #[inline]
    fn add(&mut self, d: &Descriptor) -> Result<(), ChainFault> {
        if d.len == 0 {
            return Err(ChainFault::ZeroLength);
        }
        if d.addr.checked_add(u64::from(d.len)).is_none() {
            return Err(ChainFault::AddressWraps);
        }
        let (list, total) = if d.has(WRITE) {
            (&mut self.writable, &mut self.writable_len)
        } else if self.writable.is_empty() {
            (&mut self.readable, &mut self.readable_len)
        } else {
            return Err(ChainFault::ReadableAfterWritable);
        };
        *total = total.checked_add(d.len).ok_or(ChainFault::TooLong)?;
        list.push(Segment {
            addr: d.addr,
            len: d.len,
        });
        Ok(())
    }
}

/// Walks chains. Owns the space for a copy of an indirect table.
#[derive(Debug, Default)]
pub(super) struct Walker {
    table: Vec<u8>,
}

impl Walker {
    /// The buffers of the chain at `head`, which is below `size`. `read` reads the descriptor at
    /// an index below `size`.
    #[inline]
    pub(super) fn walk(
        &mut self,
        head: u16,
        size: u16,
        read: impl Fn(u16) -> Descriptor,
        indirect: bool,
        memory: &GuestMemory,
    ) -> Result<(Segments, Segments), ChainFault> {
        let mut lists = Lists::default();
        let mut index = head;
        for _ in 0..size {
            let d = read(index);
            if d.has(INDIRECT) {
                if !indirect {
                    return Err(ChainFault::IndirectNotNegotiated);
                }
                if d.has(NEXT) {
                    return Err(ChainFault::IndirectWithNext);
                }
                // Its WRITE flag means nothing (2.7.5.3.2).
                self.walk_table(&d, memory, &mut lists)?;
                return Ok((lists.readable, lists.writable));
            }
            lists.add(&d)?;
            if !d.has(NEXT) {
                return Ok((lists.readable, lists.writable));
            }
            index = d.next;
            if index >= size {
                return Err(ChainFault::NextOutOfRange { next: index });
            }
        }
        Err(ChainFault::Loop)
    }

    fn walk_table(
        &mut self,
        d: &Descriptor,
        memory: &GuestMemory,
        lists: &mut Lists,
    ) -> Result<(), ChainFault> {
        let len = d.len as usize;
        if len == 0 || !len.is_multiple_of(LEN) || len > TABLE_MAX * LEN {
            return Err(ChainFault::TableLength { len: d.len });
        }
        if self.table.len() < len {
            // Grows to the largest table seen, at most 16 KiB.
            self.table.resize(len, 0);
        }
        let table = self.table.get_mut(..len).ok_or(ChainFault::TableAddress)?;
        memory
            .read_slice(table, GuestAddress(d.addr))
            .map_err(|_| ChainFault::TableAddress)?;
        let (entries, _) = table.as_chunks::<LEN>();
        let mut index = 0u16;
        for _ in 0..entries.len() {
            let Some(entry) = entries.get(usize::from(index)) else {
                return Err(ChainFault::NextOutOfRange { next: index });
            };
            let (words, _) = entry.as_chunks::<8>();
            let [first, second] = words else {
                return Err(ChainFault::TableAddress);
            };
            let d = Descriptor::from_words(u64::from_ne_bytes(*first), u64::from_ne_bytes(*second));
            if d.has(INDIRECT) {
                return Err(ChainFault::NestedIndirect);
            }
            lists.add(&d)?;
            if !d.has(NEXT) {
                return Ok(());
            }
            index = d.next;
        }
        if usize::from(index) >= entries.len() {
            return Err(ChainFault::NextOutOfRange { next: index });
        }
        Err(ChainFault::Loop)
    }
}
