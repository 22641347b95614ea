//! The header in front of every frame (virtio 1.3, 5.1.6).

/// `flags`: the checksum is only the pseudo header's, and has to be completed.
pub const NEEDS_CSUM: u8 = 1;
/// `gso_type`: one packet.
pub const GSO_NONE: u8 = 0;
/// `gso_type`: to be cut into TCP segments over IPv4.
pub const GSO_TCPV4: u8 = 1;
/// `gso_type`: to be cut into TCP segments over IPv6.
pub const GSO_TCPV6: u8 = 4;
/// A flag of `gso_type`: explicit congestion notification. Not offered.
pub const GSO_ECN: u8 = 0x80;

/// Bytes of the header with VERSION_1 or MRG_RXBUF.
pub const HEADER_LEN: usize = 12;
/// Bytes of the header of a legacy driver without MRG_RXBUF.
pub const LEGACY_HEADER_LEN: usize = 10;

/// `struct virtio_net_hdr`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetHeader {
    /// [`NEEDS_CSUM`].
    pub flags: u8,
    /// [`GSO_NONE`] and its like.
    pub gso_type: u8,
    /// Bytes of all headers, for whoever cuts; a hint.
    pub hdr_len: u16,
    /// Payload bytes of a segment.
    pub gso_size: u16,
    /// Where the sum starts, from the frame's first byte.
    pub csum_start: u16,
    /// Where the sum goes, from `csum_start`.
    pub csum_offset: u16,
    /// Receive: how many buffers hold the frame.
    pub num_buffers: u16,
}

impl NetHeader {
    /// From the bytes that a driver wrote; they may be the 10 of a legacy one.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let [flags, gso_type, rest @ ..] = bytes else {
            return None;
        };
        let mut halves = rest
            .as_chunks::<2>()
            .0
            .iter()
            .copied()
            .map(u16::from_le_bytes);
        Some(Self {
            flags: *flags,
            gso_type: *gso_type,
            hdr_len: halves.next()?,
            gso_size: halves.next()?,
            csum_start: halves.next()?,
            csum_offset: halves.next()?,
            num_buffers: halves.next().unwrap_or(0),
        })
    }

    /// As it lies in memory; a legacy driver takes the first 10 bytes.
    #[must_use]
    pub fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = [self.flags, self.gso_type, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let halves = [
            self.hdr_len,
            self.gso_size,
            self.csum_start,
            self.csum_offset,
            self.num_buffers,
        ];
        for (place, half) in bytes[2..].as_chunks_mut::<2>().0.iter_mut().zip(halves) {
            *place = half.to_le_bytes();
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_its_bytes() {
        let header = NetHeader {
            flags: 1,
            gso_type: 4,
            hdr_len: 0x102,
            gso_size: 0x304,
            csum_start: 0x506,
            csum_offset: 0x708,
            num_buffers: 0x90a,
        };
        let bytes = header.to_bytes();
        assert_eq!(bytes, [1, 4, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9]);
        assert_eq!(NetHeader::from_bytes(&bytes), Some(header));
        let legacy = NetHeader::from_bytes(&bytes[..LEGACY_HEADER_LEN]);
        assert_eq!(
            legacy,
            Some(NetHeader {
                num_buffers: 0,
                ..header
            })
        );
        assert_eq!(NetHeader::from_bytes(&bytes[..9]), None);
    }
}
