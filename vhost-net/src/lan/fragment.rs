//! A packet of a peer's that is longer than the own guest's MTU, cut as a router cuts it (RFC 791, 3.2;
//! RFC 8200, 4.5).
//!
//! For IPv6 only the source may do so: it has, if there is a fragment header, which the packet kept when
//! the sender's card put it together ([`crate::frame::reassembly`]). Packets whose header says more than
//! the plain one does (options of IPv4, other extension headers in front of the fragment header) are not
//! cut: some of that would have to be in each piece, and some not.

use std::net::IpAddr;

use super::segment::Unfit;
use crate::frame::sum::Sum;
use crate::frame::{ETHERNET_LEN, Packet};

const IPV4_LEN: usize = 20;
const IPV6_LEN: usize = 40;
const FRAGMENT_LEN: usize = 8;
const FRAGMENT: u8 = 44;
const MORE: u16 = 0x2000;

/// Hands out the fragments of a frame that may be cut, whose checksums are complete and which ends
/// where its packet does; `scratch` is memory for that.
///
/// # Errors
/// [`Unfit::TooBig`]: it cannot be cut. Nothing was sent.
pub fn cut(
    bytes: &[u8],
    packet: &Packet,
    mtu: u16,
    scratch: &mut Vec<u8>,
    mut send: impl FnMut(&[u8]),
) -> Result<(), Unfit> {
    let is_v4 = packet.source.is_ipv4();
    let headers = match packet.source {
        IpAddr::V4(_) if packet.transport_start == ETHERNET_LEN + IPV4_LEN => IPV4_LEN,
        IpAddr::V6(_) if bytes.get(ETHERNET_LEN + 6) == Some(&FRAGMENT) => IPV6_LEN + FRAGMENT_LEN,
        _ => return Err(Unfit::TooBig),
    };
    let at = ETHERNET_LEN;
    let (head, data) = bytes.split_at_checked(at + headers).ok_or(Unfit::TooBig)?;
    // All but the last have a multiple of eight bytes. An MTU of less than headers there is not.
    let room = usize::from(mtu).saturating_sub(headers) & !7;
    if room == 0 {
        return Err(Unfit::TooBig);
    }
    let mut offset = 0;
    for part in data.chunks(room) {
        let has_more = offset + part.len() < data.len();
        scratch.clear();
        scratch.extend_from_slice(head);
        scratch.extend_from_slice(part);
        // Below 64 KiB: an IP packet has no more.
        let field = offset as u16;
        if is_v4 {
            put(scratch, at + 2, (IPV4_LEN + part.len()) as u16);
            let more = if has_more { MORE } else { 0 };
            put(scratch, at + 6, (field / 8) | more);
            put(scratch, at + 10, 0);
            let header = scratch.get(at..at + IPV4_LEN).unwrap_or_default();
            let sum = Sum::default().bytes(header).checksum();
            put(scratch, at + 10, sum);
        } else {
            put(scratch, at + 4, (FRAGMENT_LEN + part.len()) as u16);
            put(scratch, at + IPV6_LEN + 2, field | u16::from(has_more));
        }
        send(scratch);
        offset += part.len();
    }
    Ok(())
}

fn put(bytes: &mut [u8], at: usize, half: u16) {
    let place = bytes.get_mut(at..).and_then(<[u8]>::first_chunk_mut);
    if let Some(place) = place {
        *place = half.to_be_bytes();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use etherparse::PacketBuilder;
    use proptest::prelude::*;

    use super::*;
    use crate::frame::header::NetHeader;
    use crate::frame::reassembly::{Outcome, Reassembly};
    use crate::frame::{Frame, Net, Transport};
    use crate::lan::segment::{Takes, deliver};

    /// A datagram that may be cut, with a fragment header in case of IPv6.
    fn datagram(is_v4: bool, data: &[u8]) -> Vec<u8> {
        let ethernet = PacketBuilder::ethernet2([2; 6], [4; 6]);
        let mut bytes = Vec::new();
        if is_v4 {
            let ip = ethernet.ipv4([10, 0, 2, 15], [10, 0, 2, 16], 64);
            ip.udp(1000, 2000).write(&mut bytes, data).unwrap();
            put(&mut bytes, 18, 0x1234);
            put(&mut bytes, 20, 0);
            put(&mut bytes, 24, 0);
            let sum = Sum::default().bytes(&bytes[14..34]).checksum();
            put(&mut bytes, 24, sum);
        } else {
            let address = |last| [0xfd, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, last];
            let ip = ethernet.ipv6(address(15), address(16), 64);
            ip.udp(1000, 2000).write(&mut bytes, data).unwrap();
            bytes.splice(54..54, [17, 0, 0, 0, 1, 2, 3, 4]);
            bytes[20] = FRAGMENT;
            let len = bytes.len() as u16 - 54;
            put(&mut bytes, 18, len);
        }
        bytes
    }

    fn pieces(bytes: &[u8], mtu: u16) -> Result<Vec<Vec<u8>>, Unfit> {
        let frame = Frame::parse(bytes, &NetHeader::default()).unwrap();
        let mut got = Vec::new();
        let mut scratch = Vec::new();
        deliver(
            &frame,
            Takes::default(),
            mtu,
            &mut scratch,
            |header, bytes| {
                assert_eq!(header, NetHeader::default());
                got.push(bytes.to_vec());
            },
        )?;
        Ok(got)
    }

    proptest! {
        #[test]
        fn what_was_cut_is_the_same_when_it_is_whole_again(
            is_v4: bool,
            mtu in 1280..9100_u16,
            len in 9100..65_000_usize,
        ) {
            let data: Vec<u8> = (0..len).map(|n| (n * 7) as u8).collect();
            let bytes = datagram(is_v4, &data);
            let mut reassembly = Reassembly::default();
            let mut whole = None;
            let got = pieces(&bytes, mtu).unwrap();
            for piece in &got {
                prop_assert!(piece.len() <= 14 + usize::from(mtu));
                let frame = Frame::parse(piece, &NetHeader::default()).unwrap();
                let Net::Ip(packet) = frame.net else { panic!() };
                prop_assert_eq!(packet.transport, Transport::Fragment);
                match reassembly.add(&frame, Instant::now()) {
                    Outcome::Kept => {}
                    Outcome::Whole(frame) => whole = Some(frame),
                    other => panic!("{other:?}"),
                }
            }
            prop_assert_eq!(whole.as_deref(), Some(&bytes[..]));
            // As few as there can be.
            let room = (usize::from(mtu) - if is_v4 { 20 } else { 48 }) & !7;
            prop_assert_eq!(got.len(), (len + 8).div_ceil(room));
        }
    }

    #[test]
    fn what_must_not_or_cannot_be_cut_is_not() {
        let mut dont = datagram(true, &[7; 5000]);
        put(&mut dont, 20, 0x4000);
        put(&mut dont, 24, 0);
        let sum = Sum::default().bytes(&dont[14..34]).checksum();
        put(&mut dont, 24, sum);
        assert_eq!(pieces(&dont, 1500), Err(Unfit::TooBig));
        assert_eq!(pieces(&dont, 9001).unwrap(), [dont]);
        // With an option, "no operation" four times.
        let mut options = datagram(true, &[7; 5000]);
        options.splice(34..34, [1; 4]);
        options[14] = 0x46;
        let len = options.len() as u16 - 14;
        put(&mut options, 16, len);
        put(&mut options, 24, 0);
        let sum = Sum::default().bytes(&options[14..38]).checksum();
        put(&mut options, 24, sum);
        assert_eq!(pieces(&options, 1500), Err(Unfit::TooBig));
        let mut six = datagram(false, &[7; 5000]);
        six.drain(54..62);
        six[20] = 17;
        let len = six.len() as u16 - 54;
        put(&mut six, 18, len);
        assert_eq!(pieces(&six, 1500), Err(Unfit::TooBig));
    }
}
