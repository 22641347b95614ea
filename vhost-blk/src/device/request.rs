//! From a descriptor chain to a checked request (virtio 1.3, 5.2.6). Pure: it sees lengths and
//! the 16 header bytes, never guest memory.
//!
//! ```text
//! device-readable   type u32 | reserved u32 | sector u64 | data of OUT, segments of DISCARD ..
//! device-writable   data of IN and GET_ID                                          | status u8
//! ```
//!
//! Nothing says where one descriptor ends and the next begins (2.7.4.1), so neither is looked at:
//! the header is the first 16 readable bytes, the status the last writable one, whatever lies
//! between is data. All that a guest sends is checked here, once; behind it the types say that it
//! is sound. What is too much or too odd gets an error status, never more than that.
//!
//! | answer | for |
//! |---|---|
//! | nothing written | no writable byte: nowhere to put a status |
//! | IOERR | a short header, a length that is no multiple of 512, a range that is not in the volume, a write to a read-only volume, a segment list of the wrong length, a segment beyond the limits |
//! | UNSUPP | an unknown type, a type whose feature was not negotiated, an unknown flag, the unmap flag in a DISCARD (5.2.6.2) |

use offload::device::Segment;
use offload::telemetry::ErrorKind;
use virtio_bindings::virtio_blk;

use super::config;
use crate::volume::geometry::SECTOR_LEN;
use crate::volume::superblock::SERIAL_LEN;

/// Bytes of a request's header.
pub const HEADER_LEN: usize = 16;
/// Bytes of a segment of DISCARD and WRITE_ZEROES.
pub const RANGE_LEN: usize = 16;

/// The status byte of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// VIRTIO_BLK_S_OK.
    Ok,
    /// VIRTIO_BLK_S_IOERR.
    IoError,
    /// VIRTIO_BLK_S_UNSUPP.
    Unsupported,
}

impl Status {
    /// As the guest sees it.
    pub const fn byte(self) -> u8 {
        match self {
            Self::Ok => virtio_blk::VIRTIO_BLK_S_OK as u8,
            Self::IoError => virtio_blk::VIRTIO_BLK_S_IOERR as u8,
            Self::Unsupported => virtio_blk::VIRTIO_BLK_S_UNSUPP as u8,
        }
    }
}

/// How long the two parts of a chain are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Device-readable bytes, the header included.
    pub readable: u64,
    /// Device-writable bytes before the status byte.
    pub writable: u64,
    /// Guest physical address of the status byte.
    pub status_at: u64,
}

/// The shape of a chain; `None`: it has no place for a status.
pub fn shape(readable: &[Segment], writable: &[Segment]) -> Option<Shape> {
    let total = |list: &[Segment]| list.iter().map(|s| u64::from(s.len)).sum::<u64>();
    let last = writable.iter().rev().find(|segment| segment.len > 0)?;
    Some(Shape {
        readable: total(readable),
        writable: total(writable) - 1,
        status_at: last.addr.wrapping_add(u64::from(last.len) - 1),
    })
}

/// What requests are checked against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// Features that the driver accepted.
    pub features: u64,
    /// Bytes of the volume.
    pub volume_len: u64,
    /// Whether the volume takes no writes.
    pub is_read_only: bool,
}

impl Terms {
    const fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }
}

/// A request that is sound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Read `len` bytes; both multiples of 512 and in the volume.
    In {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Write `len` bytes, which begin behind the header.
    Out {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Make durable what was acknowledged.
    Flush,
    /// The serial number, as much as fits.
    GetId {
        /// Bytes that the guest has room for.
        room: u64,
    },
    /// Segments, to be read and checked with [`range`].
    Discard {
        /// How many, at least 1 and at most [`config::RANGES_MAX`].
        ranges: usize,
    },
    /// Segments, to be read and checked with [`range`].
    WriteZeroes {
        /// How many, at least 1 and at most [`config::RANGES_MAX`].
        ranges: usize,
    },
}

/// Why a request is answered with an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What the guest gets.
    pub status: Status,
    /// What it is counted as.
    pub kind: ErrorKind,
}

impl Refusal {
    const INVALID: Self = Self {
        status: Status::IoError,
        kind: ErrorKind::Invalid,
    };
    const UNSUPPORTED: Self = Self {
        status: Status::Unsupported,
        kind: ErrorKind::Unsupported,
    };
}

/// Checks a request. `header` are the first readable bytes, as many of 16 as there are.
///
/// # Errors
/// The status that it has to be answered with.
pub fn parse(header: &[u8], shape: &Shape, terms: &Terms) -> Result<Request, Refusal> {
    let (Some(kind), Some(sector)) = (word(header, 0), long(header, 8)) else {
        return Err(Refusal::INVALID);
    };
    let payload = shape
        .readable
        .checked_sub(HEADER_LEN as u64)
        .ok_or(Refusal::INVALID)?;
    match kind {
        virtio_blk::VIRTIO_BLK_T_IN => {
            let (offset, len) = data(sector, shape.writable, terms)?;
            Ok(Request::In { offset, len })
        }
        virtio_blk::VIRTIO_BLK_T_OUT => {
            if terms.is_read_only {
                return Err(Refusal::INVALID);
            }
            let (offset, len) = data(sector, payload, terms)?;
            Ok(Request::Out { offset, len })
        }
        virtio_blk::VIRTIO_BLK_T_FLUSH if terms.has(config::FLUSH) => Ok(Request::Flush),
        virtio_blk::VIRTIO_BLK_T_GET_ID => Ok(Request::GetId {
            room: shape.writable.min(SERIAL_LEN as u64),
        }),
        virtio_blk::VIRTIO_BLK_T_DISCARD if terms.has(config::DISCARD) => Ok(Request::Discard {
            ranges: range_count(payload, terms)?,
        }),
        virtio_blk::VIRTIO_BLK_T_WRITE_ZEROES if terms.has(config::WRITE_ZEROES) => {
            Ok(Request::WriteZeroes {
                ranges: range_count(payload, terms)?,
            })
        }
        _ => Err(Refusal::UNSUPPORTED),
    }
}

/// Offset and length in bytes of a read or write. A length of 0 is sound: nothing forbids it.
fn data(sector: u64, len: u64, terms: &Terms) -> Result<(u64, u64), Refusal> {
    let offset = sector.checked_mul(SECTOR_LEN).ok_or(Refusal::INVALID)?;
    let end = offset.checked_add(len).ok_or(Refusal::INVALID)?;
    if !len.is_multiple_of(SECTOR_LEN) || end > terms.volume_len {
        return Err(Refusal::INVALID);
    }
    Ok((offset, len))
}

fn range_count(payload: u64, terms: &Terms) -> Result<usize, Refusal> {
    let ranges = payload / RANGE_LEN as u64;
    let is_sound = payload.is_multiple_of(RANGE_LEN as u64)
        && (1..=config::RANGES_MAX as u64).contains(&ranges)
        && !terms.is_read_only;
    if is_sound {
        Ok(ranges as usize)
    } else {
        Err(Refusal::INVALID)
    }
}

/// Checks one segment of DISCARD (`is_discard`) or WRITE_ZEROES: offset and length in bytes.
///
/// # Errors
/// The status that the request has to be answered with.
pub fn range(
    bytes: &[u8; RANGE_LEN],
    is_discard: bool,
    terms: &Terms,
) -> Result<(u64, u64), Refusal> {
    const UNMAP: u32 = 1;
    let (Some(sector), Some(sectors), Some(flags)) =
        (long(bytes, 0), word(bytes, 8), word(bytes, 12))
    else {
        return Err(Refusal::INVALID);
    };
    if flags & !UNMAP != 0 || (is_discard && flags & UNMAP != 0) {
        return Err(Refusal::UNSUPPORTED);
    }
    if sectors > config::RANGE_SECTORS_MAX {
        return Err(Refusal::INVALID);
    }
    data(sector, u64::from(sectors) * SECTOR_LEN, terms)
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let field = bytes.get(at..)?.first_chunk()?;
    Some(u32::from_le_bytes(*field))
}

fn long(bytes: &[u8], at: usize) -> Option<u64> {
    let field = bytes.get(at..)?.first_chunk()?;
    Some(u64::from_le_bytes(*field))
}

#[cfg(test)]
mod tests;
