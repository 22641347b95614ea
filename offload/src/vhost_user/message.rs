//! What comes over the vhost-user socket: bytes in, a checked [`Request`] out.
//!
//! A message is a header of 12 bytes (request, flags, length of the body), the body, and file
//! descriptors as ancillary data; all numbers are in the byte order of the host (vhost-user
//! specification, "Message Specification"). This is the one place where the frontend's bytes are
//! looked at: behind it every field is in range as far as the message alone can tell, and the
//! number of file descriptors fits the message. What depends on the state of the connection is
//! [`super::protocol`]'s.
//!
//! Two kinds of error, because they are answered differently. After a bad [`Header`] nobody knows
//! where the next message starts, so the connection is over. After a [`MessageError`] the stream is
//! still in step, and the frontend can be told.
//!
//! File descriptors are generic (`F`) so that the parser can be fuzzed with counted tokens. They
//! belong to the request once it is parsed and are closed by dropping when it is refused.
//!
//! Codes and feature bits are those of [`vhost::vhost_user::message`]. Its bodies are not used for
//! parsing: half of them can only be read from aligned memory, and their checks accept what we do
//! not (configuration accesses up to 4 KiB, ring sizes of any kind).

use std::os::fd::OwnedFd;

use thiserror::Error;
use vhost::vhost_user::message::FrontendReq;

use crate::memory::RegionInfo;

/// Length of a message header in bytes.
pub const HEADER_LEN: usize = 12;

/// Longest body accepted, in bytes. The longest one in use is a memory table of
/// [`MAX_MESSAGE_FDS`] regions, 1032 bytes.
pub const MAX_BODY_LEN: usize = 4096;

/// Most file descriptors that one message may carry. QEMU sends 8 at the most.
pub const MAX_MESSAGE_FDS: usize = 32;

/// Size of the part of the device configuration space that vhost-user can reach, in bytes
/// (`VHOST_USER_MAX_CONFIG_SIZE`).
pub const CONFIG_SPACE_LEN: u32 = 256;

const VERSION: u32 = 1;
const FLAG_VERSION: u32 = 0x3;
const FLAG_REPLY: u32 = 0x4;
const FLAG_NEED_REPLY: u32 = 0x8;

/// A message header that was accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Request code, known or not.
    pub request: u32,
    /// Does the frontend ask for an acknowledgement? To be honoured once REPLY_ACK is negotiated.
    pub needs_reply: bool,
    /// Length of the body in bytes, at most [`MAX_BODY_LEN`].
    pub body_len: usize,
}

/// Why a header was refused. The stream cannot be followed any further.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum HeaderError {
    /// Not protocol version 1.
    #[error(
        "message flags {0:#x}: vhost-user version 1 is the only one; is this a vhost-user frontend?"
    )]
    Version(u32),
    /// Bits that the specification does not define are set.
    #[error("message flags {0:#x} have reserved bits set")]
    ReservedFlags(u32),
    /// A reply, and nothing was asked.
    #[error("request {0} is marked as a reply, but nothing was asked")]
    Reply(u32),
    /// The body would be longer than any that is defined.
    #[error("request {request} announces a body of {len} bytes; the limit is {MAX_BODY_LEN}")]
    TooLong {
        /// Request code.
        request: u32,
        /// Length announced, in bytes.
        len: u32,
    },
}

impl Header {
    /// Checks the 12 bytes of a header.
    ///
    /// # Errors
    /// See [`HeaderError`].
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Result<Self, HeaderError> {
        let mut reader = Reader(bytes);
        // The array is long enough for all three.
        let request = reader.u32().unwrap_or_default();
        let flags = reader.u32().unwrap_or_default();
        let len = reader.u32().unwrap_or_default();
        if flags & FLAG_VERSION != VERSION {
            return Err(HeaderError::Version(flags));
        }
        if flags & !(FLAG_VERSION | FLAG_REPLY | FLAG_NEED_REPLY) != 0 {
            return Err(HeaderError::ReservedFlags(flags));
        }
        if flags & FLAG_REPLY != 0 {
            return Err(HeaderError::Reply(request));
        }
        let body_len = len as usize;
        if body_len > MAX_BODY_LEN {
            return Err(HeaderError::TooLong { request, len });
        }
        Ok(Self {
            request,
            needs_reply: flags & FLAG_NEED_REPLY != 0,
            body_len,
        })
    }
}

/// The bytes of a reply to `request`, header and body.
#[must_use]
pub fn encode_reply(request: u32, body: &[u8]) -> Vec<u8> {
    encode(request, VERSION | FLAG_REPLY, body)
}

/// The bytes of a request that we send, on the backend channel, and that wants no reply.
#[must_use]
pub(crate) fn encode_request(request: u32, body: &[u8]) -> Vec<u8> {
    encode(request, VERSION, body)
}

fn encode(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let len =
        u32::try_from(body.len()).expect("bodies that we send are at most a few hundred bytes");
    let mut message = Vec::with_capacity(HEADER_LEN + body.len());
    for field in [request, flags, len] {
        message.extend_from_slice(&field.to_ne_bytes());
    }
    message.extend_from_slice(body);
    message
}

/// Why a message was refused although the stream is in step.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum MessageError {
    /// A request that this backend never offered to understand.
    #[error("request {0} is not supported; the features offered do not include it")]
    Unsupported(u32),
    /// The body is too short or too long for this request.
    #[error("{request:?} has a body of {len} bytes, which is not what it takes")]
    Length {
        /// The request.
        request: FrontendReq,
        /// Length of the body in bytes.
        len: usize,
    },
    /// Too few or too many file descriptors came along. They were closed.
    #[error("{request:?} came with {count} file descriptors, which is not what it takes")]
    Fds {
        /// The request.
        request: FrontendReq,
        /// File descriptors received.
        count: usize,
    },
    /// A field is out of range whatever the state.
    #[error("{request:?}: {field} is {value:#x}, which is out of range")]
    Field {
        /// The request.
        request: FrontendReq,
        /// Name of the field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
}

/// Addresses of a ring as the frontend gives them: addresses in the frontend's own address space
/// (specification: "user addresses"), to be translated by the memory table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UserRing {
    /// Descriptor table; aligned to 16 bytes (virtio 1.3, 2.7).
    pub desc_table: u64,
    /// Available ring (driver area); aligned to 2 bytes.
    pub avail_ring: u64,
    /// Used ring (device area); aligned to 4 bytes.
    pub used_ring: u64,
}

/// An access to the device configuration space; in range of [`CONFIG_SPACE_LEN`], not empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConfigRange {
    /// First byte.
    pub offset: u32,
    /// Length in bytes.
    pub len: u32,
    /// Flags of the message, to be repeated in the reply.
    pub flags: u32,
}

/// Where the in-flight region lies in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InflightArea {
    /// Length in bytes, not 0.
    pub mmap_size: u64,
    /// Offset in the file in bytes.
    pub mmap_offset: u64,
    /// Queues it has room for, not 0.
    pub num_queues: u16,
    /// Size of each queue, not 0.
    pub queue_size: u16,
}

/// A message of the frontend whose form is right.
#[derive(Debug, PartialEq, Eq)]
pub enum Request<F = OwnedFd> {
    /// GET_FEATURES.
    GetFeatures,
    /// SET_FEATURES: the virtio feature bits acknowledged.
    SetFeatures(u64),
    /// SET_OWNER.
    SetOwner,
    /// RESET_OWNER; deprecated.
    ResetOwner,
    /// GET_PROTOCOL_FEATURES.
    GetProtocolFeatures,
    /// SET_PROTOCOL_FEATURES: the protocol feature bits chosen.
    SetProtocolFeatures(u64),
    /// GET_QUEUE_NUM.
    GetQueueNum,
    /// SET_MEM_TABLE: all regions, each with its file.
    SetMemTable(Vec<(RegionInfo, F)>),
    /// NET_SET_MTU: bytes of an IP packet.
    NetSetMtu(u64),
    /// GET_MAX_MEM_SLOTS.
    GetMaxMemSlots,
    /// ADD_MEM_REG.
    AddMemReg(RegionInfo, F),
    /// REM_MEM_REG. The region's offset in its file means nothing.
    RemMemReg(RegionInfo),
    /// SET_VRING_NUM: size of the ring.
    SetVringNum {
        /// Queue index.
        queue: u16,
        /// Number of descriptors; a power of two.
        size: u16,
    },
    /// SET_VRING_ADDR.
    SetVringAddr {
        /// Queue index.
        queue: u16,
        /// Where the ring lies.
        ring: UserRing,
    },
    /// SET_VRING_BASE.
    SetVringBase {
        /// Queue index.
        queue: u16,
        /// Next entry of the available ring to look at.
        base: u16,
    },
    /// GET_VRING_BASE: stops the ring.
    GetVringBase {
        /// Queue index.
        queue: u16,
    },
    /// SET_VRING_KICK; without a file descriptor the frontend wants the ring polled.
    SetVringKick {
        /// Queue index.
        queue: u16,
        /// Becomes readable when there are buffers.
        fd: Option<F>,
    },
    /// SET_VRING_CALL; without a file descriptor the frontend polls.
    SetVringCall {
        /// Queue index.
        queue: u16,
        /// To be written when buffers were used.
        fd: Option<F>,
    },
    /// SET_VRING_ERR.
    SetVringErr {
        /// Queue index.
        queue: u16,
        /// To be written when the queue breaks.
        fd: Option<F>,
    },
    /// SET_VRING_ENABLE.
    SetVringEnable {
        /// Queue index.
        queue: u16,
        /// Enable or disable?
        enabled: bool,
    },
    /// SET_BACKEND_REQ_FD: the socket for our own requests.
    SetBackendReqFd(F),
    /// GET_CONFIG.
    GetConfig(ConfigRange),
    /// SET_CONFIG.
    SetConfig(ConfigRange, Vec<u8>),
    /// GET_INFLIGHT_FD: a new region is wanted.
    GetInflightFd {
        /// Queues it is to have room for, not 0.
        num_queues: u16,
        /// Size of each queue, not 0.
        queue_size: u16,
        /// Length of the message's body: the structure has padding in QEMU and none in the
        /// specification, and QEMU wants the reply to be as long as its request.
        body_len: usize,
    },
    /// SET_INFLIGHT_FD: the region that the frontend keeps.
    SetInflightFd(InflightArea, F),
}

impl<F> Request<F> {
    /// Checks the body and the file descriptors of a message. Descriptors of a refused message
    /// are dropped.
    ///
    /// # Errors
    /// See [`MessageError`].
    pub fn parse(header: &Header, body: &[u8], fds: Vec<F>) -> Result<Self, MessageError> {
        let request = FrontendReq::try_from(header.request)
            .map_err(|()| MessageError::Unsupported(header.request))?;
        Body {
            request,
            len: body.len(),
            reader: Reader(body),
            fds,
        }
        .parse()
    }
}

/// A message being taken apart.
struct Body<'a, F> {
    request: FrontendReq,
    len: usize,
    reader: Reader<'a>,
    fds: Vec<F>,
}

impl<F> Body<'_, F> {
    fn parse(mut self) -> Result<Request<F>, MessageError> {
        use FrontendReq as R;
        Ok(match self.request {
            R::GET_FEATURES => self.empty(Request::GetFeatures)?,
            R::SET_OWNER => self.empty(Request::SetOwner)?,
            R::RESET_OWNER => self.empty(Request::ResetOwner)?,
            R::GET_PROTOCOL_FEATURES => self.empty(Request::GetProtocolFeatures)?,
            R::GET_QUEUE_NUM => self.empty(Request::GetQueueNum)?,
            R::GET_MAX_MEM_SLOTS => self.empty(Request::GetMaxMemSlots)?,
            R::NET_SET_MTU => Request::NetSetMtu(self.only_u64()?),
            R::SET_FEATURES => Request::SetFeatures(self.only_u64()?),
            R::SET_PROTOCOL_FEATURES => Request::SetProtocolFeatures(self.only_u64()?),
            R::SET_MEM_TABLE => self.mem_table()?,
            R::ADD_MEM_REG => self.add_mem_reg()?,
            R::REM_MEM_REG => self.rem_mem_reg()?,
            R::SET_VRING_NUM => {
                let (queue, num) = self.vring_state()?;
                let size = match u16::try_from(num) {
                    Ok(size) if size.is_power_of_two() => size,
                    _ => return Err(self.field("ring size", num.into())),
                };
                Request::SetVringNum { queue, size }
            }
            R::SET_VRING_BASE => {
                let (queue, num) = self.vring_state()?;
                // Packed rings put more into it; they are not offered.
                let base = u16::try_from(num).map_err(|_| self.field("ring base", num.into()))?;
                Request::SetVringBase { queue, base }
            }
            R::GET_VRING_BASE => {
                let (queue, _) = self.vring_state()?;
                Request::GetVringBase { queue }
            }
            R::SET_VRING_ENABLE => {
                let (queue, num) = self.vring_state()?;
                let enabled = match num {
                    0 => false,
                    1 => true,
                    _ => return Err(self.field("enable", num.into())),
                };
                Request::SetVringEnable { queue, enabled }
            }
            R::SET_VRING_ADDR => self.vring_addr()?,
            R::SET_VRING_KICK => {
                let (queue, fd) = self.vring_fd()?;
                Request::SetVringKick { queue, fd }
            }
            R::SET_VRING_CALL => {
                let (queue, fd) = self.vring_fd()?;
                Request::SetVringCall { queue, fd }
            }
            R::SET_VRING_ERR => {
                let (queue, fd) = self.vring_fd()?;
                Request::SetVringErr { queue, fd }
            }
            R::SET_BACKEND_REQ_FD => {
                self.exactly(0)?;
                Request::SetBackendReqFd(self.one_fd()?)
            }
            R::GET_CONFIG => {
                let (range, _) = self.config()?;
                Request::GetConfig(range)
            }
            R::SET_CONFIG => {
                let (range, data) = self.config()?;
                Request::SetConfig(range, data)
            }
            R::GET_INFLIGHT_FD => {
                let area = self.inflight()?;
                self.no_fds()?;
                Request::GetInflightFd {
                    num_queues: area.num_queues,
                    queue_size: area.queue_size,
                    body_len: self.len,
                }
            }
            R::SET_INFLIGHT_FD => {
                let area = self.inflight()?;
                let in_file = area.mmap_offset.checked_add(area.mmap_size);
                if area.mmap_size == 0 || in_file.is_none() {
                    return Err(self.field("size of the in-flight region", area.mmap_size));
                }
                Request::SetInflightFd(area, self.one_fd()?)
            }
            other => return Err(MessageError::Unsupported(other.into())),
        })
    }

    fn empty(&self, request: Request<F>) -> Result<Request<F>, MessageError> {
        self.exactly(0)?;
        self.no_fds()?;
        Ok(request)
    }

    fn only_u64(&mut self) -> Result<u64, MessageError> {
        self.exactly(8)?;
        self.no_fds()?;
        self.u64()
    }

    fn vring_state(&mut self) -> Result<(u16, u32), MessageError> {
        self.exactly(8)?;
        self.no_fds()?;
        let queue = self.queue()?;
        Ok((queue, self.u32()?))
    }

    /// Index in bits 0 to 7, "no file descriptor" in bit 8.
    fn vring_fd(&mut self) -> Result<(u16, Option<F>), MessageError> {
        const INDEX: u64 = 0xff;
        const NO_FD: u64 = 0x100;
        self.exactly(8)?;
        let value = self.u64()?;
        if value & !(INDEX | NO_FD) != 0 {
            return Err(self.field("queue index and flags", value));
        }
        let queue = (value & INDEX) as u16;
        if value & NO_FD != 0 {
            self.no_fds()?;
            return Ok((queue, None));
        }
        Ok((queue, Some(self.one_fd()?)))
    }

    fn vring_addr(&mut self) -> Result<Request<F>, MessageError> {
        self.exactly(40)?;
        self.no_fds()?;
        let queue = self.queue()?;
        let flags = self.u32()?;
        let ring = UserRing {
            desc_table: self.u64()?,
            used_ring: self.u64()?,
            avail_ring: self.u64()?,
        };
        // VHOST_VRING_F_LOG comes with dirty logging, which is not offered.
        if flags != 0 {
            return Err(self.field("flags", flags.into()));
        }
        for (field, address, align) in [
            ("address of the descriptor table", ring.desc_table, 16),
            ("address of the available ring", ring.avail_ring, 2),
            ("address of the used ring", ring.used_ring, 4),
        ] {
            if address % align != 0 {
                return Err(self.field(field, address));
            }
        }
        Ok(Request::SetVringAddr { queue, ring })
    }

    fn mem_table(mut self) -> Result<Request<F>, MessageError> {
        let count = self.u32()? as usize;
        let _padding = self.u32()?;
        // `count` is the stranger's, `fds` and `len` are what really came: compare before use.
        if count != self.fds.len() || count > MAX_MESSAGE_FDS {
            return Err(self.fds_error());
        }
        self.exactly(8 + count * REGION_LEN)?;
        let mut regions = Vec::with_capacity(count);
        for fd in std::mem::take(&mut self.fds) {
            regions.push((self.region()?, fd));
        }
        Ok(Request::SetMemTable(regions))
    }

    fn add_mem_reg(&mut self) -> Result<Request<F>, MessageError> {
        let region = self.single_region()?;
        Ok(Request::AddMemReg(region, self.one_fd()?))
    }

    fn rem_mem_reg(&mut self) -> Result<Request<F>, MessageError> {
        let region = self.single_region()?;
        // Some frontends send a descriptor; the specification lets us close it unseen.
        if self.fds.len() > 1 {
            return Err(self.fds_error());
        }
        Ok(Request::RemMemReg(region))
    }

    fn single_region(&mut self) -> Result<RegionInfo, MessageError> {
        self.exactly(8 + REGION_LEN)?;
        let _padding = self.u64()?;
        self.region()
    }

    fn region(&mut self) -> Result<RegionInfo, MessageError> {
        Ok(RegionInfo {
            guest_phys_addr: self.u64()?,
            size: self.u64()?,
            userspace_addr: self.u64()?,
            mmap_offset: self.u64()?,
        })
    }

    fn config(&mut self) -> Result<(ConfigRange, Vec<u8>), MessageError> {
        let range = ConfigRange {
            offset: self.u32()?,
            len: self.u32()?,
            flags: self.u32()?,
        };
        self.no_fds()?;
        let end = range.offset.checked_add(range.len);
        if range.len == 0 || end.is_none_or(|end| end > CONFIG_SPACE_LEN) {
            return Err(self.field("length of the configuration access", range.len.into()));
        }
        // 0: the driver writes, 1: live migration writes.
        if range.flags > 1 {
            return Err(self.field("flags", range.flags.into()));
        }
        let data = self.reader.0.to_vec();
        if data.len() != range.len as usize {
            return Err(self.length());
        }
        Ok((range, data))
    }

    fn inflight(&mut self) -> Result<InflightArea, MessageError> {
        // 20 bytes in the specification, 24 with the padding of a C structure (QEMU).
        if self.len != 20 && self.len != 24 {
            return Err(self.length());
        }
        let area = InflightArea {
            mmap_size: self.u64()?,
            mmap_offset: self.u64()?,
            num_queues: self.u16()?,
            queue_size: self.u16()?,
        };
        if area.num_queues == 0 {
            return Err(self.field("number of queues", 0));
        }
        if !area.queue_size.is_power_of_two() {
            return Err(self.field("queue size", area.queue_size.into()));
        }
        Ok(area)
    }

    fn queue(&mut self) -> Result<u16, MessageError> {
        let index = self.u32()?;
        u16::try_from(index).map_err(|_| self.field("queue index", index.into()))
    }

    fn exactly(&self, len: usize) -> Result<(), MessageError> {
        if self.len == len {
            Ok(())
        } else {
            Err(self.length())
        }
    }

    fn no_fds(&self) -> Result<(), MessageError> {
        if self.fds.is_empty() {
            Ok(())
        } else {
            Err(self.fds_error())
        }
    }

    fn one_fd(&mut self) -> Result<F, MessageError> {
        let error = self.fds_error();
        let fd = self.fds.pop().ok_or(error)?;
        self.no_fds().map_err(|_| error)?;
        Ok(fd)
    }

    fn u16(&mut self) -> Result<u16, MessageError> {
        self.reader.u16().ok_or_else(|| self.length())
    }

    fn u32(&mut self) -> Result<u32, MessageError> {
        self.reader.u32().ok_or_else(|| self.length())
    }

    fn u64(&mut self) -> Result<u64, MessageError> {
        self.reader.u64().ok_or_else(|| self.length())
    }

    fn length(&self) -> MessageError {
        MessageError::Length {
            request: self.request,
            len: self.len,
        }
    }

    fn fds_error(&self) -> MessageError {
        MessageError::Fds {
            request: self.request,
            count: self.fds.len(),
        }
    }

    fn field(&self, field: &'static str, value: u64) -> MessageError {
        MessageError::Field {
            request: self.request,
            field,
            value,
        }
    }
}

/// Length of a memory region description in bytes.
const REGION_LEN: usize = 32;

/// Numbers in host byte order, one after the other.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (bytes, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*bytes)
    }

    fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_ne_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_ne_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_ne_bytes)
    }
}

#[cfg(test)]
mod tests;
