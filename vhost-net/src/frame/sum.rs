//! The Internet checksum (RFC 1071).

use std::net::IpAddr;

/// A one's-complement sum, not folded yet. Addition is commutative, so parts of an even length can
/// be summed in any order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum(u64);

impl Sum {
    /// Adds bytes that start at an even offset. An odd byte at the end counts as followed by 0.
    #[must_use]
    pub fn bytes(self, bytes: &[u8]) -> Self {
        let mut sum = self.0;
        let (words, rest) = bytes.as_chunks::<4>();
        for word in words {
            sum += u64::from(u32::from_be_bytes(*word));
        }
        let (halves, rest) = rest.as_chunks::<2>();
        for half in halves {
            sum += u64::from(u16::from_be_bytes(*half));
        }
        if let [last] = rest {
            sum += u64::from(*last) << 8;
        }
        // At most 64 KiB come in, so 2^14 words: no overflow before this.
        Self((sum >> 32) + (sum & 0xffff_ffff))
    }

    /// Adds a number of 16 bits.
    #[must_use]
    pub fn word(self, word: u16) -> Self {
        Self(self.0 + u64::from(word))
    }

    /// The sum of a pseudo header (RFC 9293, 3.1; RFC 8200, 8.1).
    #[must_use]
    pub fn pseudo(source: IpAddr, destination: IpAddr, protocol: u8, len: u32) -> Self {
        let address = |sum: Self, address| match address {
            IpAddr::V4(v4) => sum.bytes(&v4.octets()),
            IpAddr::V6(v6) => sum.bytes(&v6.octets()),
        };
        let sum = address(address(Self::default(), source), destination);
        sum.bytes(&len.to_be_bytes()).word(u16::from(protocol))
    }

    /// Folded to 16 bits, not complemented: what a driver or device leaves in the checksum field
    /// with NEEDS_CSUM (virtio 1.3, 5.1.6.2).
    #[must_use]
    pub fn partial(self) -> u16 {
        let mut sum = self.0;
        while sum > 0xffff {
            sum = (sum >> 16) + (sum & 0xffff);
        }
        sum as u16
    }

    /// The checksum of what was summed. Over something that holds its checksum, 0 is right.
    #[must_use]
    pub fn checksum(self) -> u16 {
        !self.partial()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_of_rfc_1071_sums_up() {
        let sum = Sum::default().bytes(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]);
        assert_eq!(sum.partial(), 0xddf2);
        assert_eq!(Sum::default().bytes(&[0x12]).partial(), 0x1200);
        assert_eq!(
            Sum::default().bytes(&[0xff; 65535]).word(0xff).partial(),
            0xffff
        );
    }
}
