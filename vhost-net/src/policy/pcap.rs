//! Frames as a pcapng stream (draft-ietf-opsawg-pcapng), which tshark and tcpdump read.
//!
//! Only the writing, and only four kinds of blocks: one section, one Ethernet interface with
//! nanoseconds, enhanced packets that say which way they went, and in the end how many there were.
//! Of reading just enough to cut a stream of ours into its blocks. pcapng rather than pcap for
//! that, and for the interface's name. Reader crates exist; what they write allocates and cannot
//! say the direction, so these few lines are our own, and tests read them back with another's
//! parser.
//!
//! A frame is what the guest's queue holds: with segmentation offload one of up to 64 KiB, and a
//! checksum may be left to the device, as in a capture on any Linux interface.

use std::time::Duration;

use crate::local::Direction;

/// Longest part of a frame that is kept unless somebody asks for less.
pub const SNAPLEN: u32 = 262_144;

/// Bytes of a packet's block besides the frame and its padding.
pub const OVERHEAD: usize = 28 + 12 + 4;

/// Kind of the block of a frame.
pub const PACKET: u32 = 6;
/// Kind of the block with which a stream of ours ends.
pub const STATISTICS: u32 = 5;
/// Longest block that is written.
const BLOCK_MAX: u32 = SNAPLEN + OVERHEAD as u32 + 4;

/// What a stream begins with. `interface` is what the reader shows as the interface's name.
#[must_use]
pub fn header(interface: &str, snaplen: u32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(96);
    // Section header: length unknown, this machine's byte order told by the magic number.
    block(&mut bytes, 0x0a0d_0d0a, |body| {
        body.extend(0x1a2b_3c4d_u32.to_le_bytes());
        body.extend(1_u16.to_le_bytes());
        body.extend(0_u16.to_le_bytes());
        body.extend(u64::MAX.to_le_bytes());
    });
    // Interface description: LINKTYPE_ETHERNET, if_name (2), if_tsresol (9) of 10^-9.
    block(&mut bytes, 1, |body| {
        body.extend(1_u16.to_le_bytes());
        body.extend(0_u16.to_le_bytes());
        body.extend(snaplen.to_le_bytes());
        let name = interface.as_bytes();
        let name = name.get(..name.len().min(255)).unwrap_or_default();
        option(body, 2, name);
        option(body, 9, &[9]);
        option(body, 0, &[]);
    });
    bytes
}

/// Appends a frame. `unix` is the time since 1970.
pub fn packet(
    bytes: &mut Vec<u8>,
    direction: Direction,
    unix: Duration,
    frame: &[u8],
    snaplen: u32,
) {
    let kept = frame.get(..snaplen as usize).unwrap_or(frame);
    let nanoseconds = u64::try_from(unix.as_nanos()).unwrap_or(u64::MAX);
    let length = |length: usize| u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes();
    let (high, low) = ((nanoseconds >> 32) as u32, nanoseconds as u32);
    bytes.reserve(OVERHEAD + kept.len() + 3);
    block(bytes, PACKET, |body| {
        body.extend(0_u32.to_le_bytes());
        body.extend(high.to_le_bytes());
        body.extend(low.to_le_bytes());
        body.extend(length(kept.len()));
        body.extend(length(frame.len()));
        body.extend(kept);
        pad(body);
        // epb_flags (2): 1 is inbound and 2 outbound, as the guest sees it.
        let flags: u32 = match direction {
            Direction::In => 1,
            Direction::Out => 2,
        };
        option(body, 2, &flags.to_le_bytes());
        option(body, 0, &[]);
    });
}

/// Appends what is known at the end: how many frames there were since the beginning, and how many of
/// them are not in the stream because there was no room.
pub fn statistics(bytes: &mut Vec<u8>, unix: Duration, frames: u64, dropped: u64) {
    let nanoseconds = u64::try_from(unix.as_nanos()).unwrap_or(u64::MAX);
    block(bytes, STATISTICS, |body| {
        body.extend(0_u32.to_le_bytes());
        body.extend(((nanoseconds >> 32) as u32).to_le_bytes());
        body.extend((nanoseconds as u32).to_le_bytes());
        // isb_ifrecv (4) and isb_ifdrop (5).
        option(body, 4, &frames.to_le_bytes());
        option(body, 5, &dropped.to_le_bytes());
        option(body, 0, &[]);
    });
}

/// A block at the front of a stream of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// [`PACKET`], [`STATISTICS`] or another.
    pub kind: u32,
    /// Bytes of all of it.
    pub len: usize,
}

impl Block {
    /// Reads a block's head. `None`: more bytes are needed.
    ///
    /// # Errors
    /// No block begins like that, or it is longer than any of ours.
    pub fn read(bytes: &[u8]) -> Result<Option<Self>, NoBlock> {
        let word = |at: usize| {
            let bytes = bytes.get(at..at + 4)?;
            Some(u32::from_le_bytes(bytes.try_into().ok()?))
        };
        let (Some(kind), Some(len)) = (word(0), word(4)) else {
            return Ok(None);
        };
        let is_sound = (12..=BLOCK_MAX).contains(&len) && len % 4 == 0;
        if !is_sound {
            return Err(NoBlock);
        }
        Ok(Some(Self {
            kind,
            len: len as usize,
        }))
    }
}

/// This is no stream of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the card's stream is no pcapng")]
pub struct NoBlock;

/// Frames and drops that a whole block of [`STATISTICS`] tells of.
#[must_use]
pub fn told(block: &[u8]) -> Option<(u64, u64)> {
    let number = |at: usize| {
        let bytes = block.get(at..at + 8)?;
        Some(u64::from_le_bytes(bytes.try_into().ok()?))
    };
    // Behind head, interface and time; each number behind its option's head.
    Some((number(20 + 4)?, number(20 + 4 + 8 + 4)?))
}

fn block(bytes: &mut Vec<u8>, kind: u32, fill: impl FnOnce(&mut Vec<u8>)) {
    let start = bytes.len();
    bytes.extend(kind.to_le_bytes());
    bytes.extend([0; 4]);
    fill(bytes);
    let total = u32::try_from(bytes.len() - start + 4).unwrap_or(u32::MAX);
    bytes.extend(total.to_le_bytes());
    if let Some(field) = bytes.get_mut(start + 4..start + 8) {
        field.copy_from_slice(&total.to_le_bytes());
    }
}

fn option(body: &mut Vec<u8>, code: u16, value: &[u8]) {
    body.extend(code.to_le_bytes());
    body.extend(u16::try_from(value.len()).unwrap_or(0).to_le_bytes());
    body.extend(value);
    pad(body);
}

/// Every block before it has a length of whole words, so the end of the stream tells.
fn pad(body: &mut Vec<u8>) {
    body.resize(body.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use pcap_parser::traits::PcapReaderIterator;
    use pcap_parser::{Block as Block2, PcapBlockOwned, PcapNGReader};

    use super::*;

    /// Direction flags, nanoseconds, original length, kept bytes.
    type Packet = (u32, u64, u32, Vec<u8>);

    fn read(stream: &[u8]) -> (String, Vec<Packet>) {
        let mut reader = PcapNGReader::new(1 << 20, stream).unwrap();
        let (mut name, mut packets) = (String::new(), Vec::new());
        loop {
            let (used, block) = match reader.next() {
                Ok(block) => block,
                Err(pcap_parser::PcapError::Eof) => return (name, packets),
                Err(pcap_parser::PcapError::Incomplete(_)) => {
                    reader.refill().unwrap();
                    continue;
                }
                Err(error) => panic!("{error:?}"),
            };
            match block {
                PcapBlockOwned::NG(Block2::InterfaceDescription(interface)) => {
                    assert_eq!(interface.linktype, pcap_parser::Linktype::ETHERNET);
                    assert_eq!(interface.if_tsresol, 9);
                    let option = interface.options.iter().find(|it| it.code.0 == 2);
                    let option = option.unwrap();
                    let value = option.value[..usize::from(option.len)].to_vec();
                    name = String::from_utf8(value).unwrap();
                }
                PcapBlockOwned::NG(Block2::EnhancedPacket(packet)) => {
                    let flags = packet.options.iter().find(|it| it.code.0 == 2).unwrap();
                    let flags: [u8; 4] = flags.value[..4].try_into().unwrap();
                    let time = u64::from(packet.ts_high) << 32 | u64::from(packet.ts_low);
                    let data = packet.data[..packet.caplen as usize].to_vec();
                    packets.push((u32::from_le_bytes(flags), time, packet.origlen, data));
                }
                _ => {}
            }
            reader.consume(used);
        }
    }

    #[test]
    fn another_parser_reads_back_what_was_written() {
        let mut stream = header("eni-0", 96);
        let mut wanted = Vec::new();
        for length in 0..200_u32 {
            let frame: Vec<u8> = (0..length).map(|byte| byte as u8).collect();
            let direction = if length % 2 == 0 {
                Direction::Out
            } else {
                Direction::In
            };
            let time = Duration::new(1_700_000_000, 123_456_789) + Duration::from_nanos(1) * length;
            packet(&mut stream, direction, time, &frame, 96);
            wanted.push((
                2 - length % 2,
                time.as_nanos() as u64,
                length,
                frame[..frame.len().min(96)].to_vec(),
            ));
        }
        assert_eq!(read(&stream), ("eni-0".to_owned(), wanted));
    }

    #[test]
    fn a_super_frame_is_kept_whole_and_the_overhead_is_what_it_says() {
        let frame = vec![7; 65_549];
        let mut stream = Vec::new();
        packet(
            &mut stream,
            Direction::Out,
            Duration::from_secs(1),
            &frame,
            SNAPLEN,
        );
        assert_eq!(stream.len(), OVERHEAD + frame.len().next_multiple_of(4));
        let mut whole = header("x", SNAPLEN);
        whole.extend(stream);
        assert_eq!(read(&whole).1[0].3, frame);
    }

    #[test]
    fn a_stream_is_cut_into_its_blocks_and_another_parser_reads_the_statistics() {
        let mut stream = header("eni-0", 96);
        packet(&mut stream, Direction::In, Duration::ZERO, &[1; 77], 96);
        statistics(&mut stream, Duration::from_secs(5), 9, 2);
        let (mut rest, mut kinds, mut last) = (&stream[..], Vec::new(), None);
        while let Some(block) = Block::read(rest).unwrap() {
            kinds.push(block.kind);
            last = told(&rest[..block.len]);
            rest = &rest[block.len..];
        }
        assert_eq!(kinds, [0x0a0d_0d0a, 1, PACKET, STATISTICS]);
        assert_eq!(last, Some((9, 2)));
        assert_eq!(Block::read(&[0xff; 12]), Err(NoBlock));
        let (_, capture) = pcap_parser::parse_pcapng(&stream).unwrap();
        let Some(Block2::InterfaceStatistics(it)) = capture.sections[0].blocks.last() else {
            panic!("{capture:?}");
        };
        let option = |code| it.options.iter().find(|option| option.code.0 == code);
        assert_eq!(option(4).unwrap().value[..8], 9_u64.to_le_bytes());
        assert_eq!(option(5).unwrap().value[..8], 2_u64.to_le_bytes());
    }

    #[test]
    fn a_name_of_any_length_gives_a_stream_that_can_be_read() {
        for length in [0, 1, 3, 4, 255, 256, 100_000] {
            let (name, _) = read(&header(&"n".repeat(length), SNAPLEN));
            assert_eq!(name.len(), length.min(255));
        }
    }
}
