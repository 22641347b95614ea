//! Fragments as the guest meets them: what it is told of those that come to nothing.

use std::io;

use etherparse::{Icmpv4Type, Icmpv6Type, PacketBuilder, SlicedPacket, TransportSlice};

use super::*;
use crate::frame::reassembly;
use crate::local::{Outgoing, TcpService};
use crate::stack::{Kind, Settings};

#[derive(Default)]
struct Sent(Vec<Vec<u8>>);

impl Wire for Sent {
    fn has_room(&self) -> bool {
        true
    }
    fn send(&mut self, _: NetHeader, frame: &[u8]) {
        self.0.push(frame.to_vec());
    }
}

/// Takes datagrams, and notes which may be cut on the way.
#[derive(Default)]
struct Sink {
    taken: Vec<Vec<u8>>,
    may_be_cut: bool,
}

impl Host for Sink {
    fn open(&mut self, _: usize, kind: Kind, _: SocketAddr) -> io::Result<()> {
        if let Kind::Udp { dont_fragment } = kind {
            self.may_be_cut = !dont_fragment;
        }
        Ok(())
    }
    fn connected(&mut self, _: usize) -> io::Result<()> {
        Ok(())
    }
    fn recv(&mut self, _: usize, _: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }
    fn send(&mut self, _: usize, bytes: &[u8]) -> io::Result<usize> {
        self.taken.push(bytes.to_vec());
        Ok(bytes.len())
    }
    fn send_from(&mut self, _: usize, _: SocketAddr, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }
    fn finish(&mut self, _: usize) {}
    fn close(&mut self, _: usize, _: bool) {}
    fn set_dont_fragment(&mut self, _: usize, dont_fragment: bool) {
        self.may_be_cut = !dont_fragment;
    }
    fn path_mtu(&mut self, _: usize) -> Option<u32> {
        None
    }
    fn ask(&mut self, _: &Outgoing) -> io::Result<()> {
        Ok(())
    }
}

/// No services, and all is allowed.
struct Nothing;

impl Locals for Nothing {
    fn connect(&mut self, _: SocketAddr, _: SocketAddr) -> Option<Box<dyn TcpService>> {
        None
    }
}

impl Local for Nothing {
    fn frame(&mut self, _: &Frame<'_>, _: Instant, _: &mut Outbox) -> Verdict {
        Verdict::Pass
    }
    fn allows(&mut self, _: Direction, _: &Meta, _: Instant) -> bool {
        true
    }
    fn answered(&mut self, _: u64, _: &[u8], _: Instant, _: &mut Outbox) {}
    fn observes(&self) -> bool {
        false
    }
    fn observe(&mut self, _: &Meta, _: Instant) {}
    fn poll(&mut self, _: Instant, _: &mut Outbox) {}
    fn deadline(&self) -> Option<Instant> {
        None
    }
}

struct Bench {
    card: Card<Nothing>,
    wire: Sent,
    host: Sink,
    now: Instant,
}

impl Bench {
    fn new() -> Self {
        let (spec, stats, now) = (Arc::new(Spec::default()), Arc::default(), Instant::now());
        let settings = Settings::default();
        let stack = Stack::new(Arc::clone(&spec), settings, Arc::default(), 1, now);
        Self {
            card: Card::new(spec, stats, stack, Nothing),
            wire: Sent::default(),
            host: Sink::default(),
            now,
        }
    }

    fn hand_in(&mut self, frame: &[u8]) {
        let header = NetHeader::default();
        let (wire, host) = (&mut self.wire, &mut self.host);
        let elsewhere = self.card.from_guest(&header, frame, self.now, wire, host);
        assert!(elsewhere.is_none());
    }

    fn run(&mut self) {
        self.card.run(self.now, &mut self.wire, &mut self.host);
    }

    /// The type, code and second word of the only ICMP message to the guest.
    fn told(&mut self) -> (u8, u8, u32) {
        assert_eq!(self.wire.0.len(), 1);
        let frame = self.wire.0.pop().unwrap();
        let sliced = SlicedPacket::from_ethernet(&frame).unwrap();
        let word = |bytes: &[u8]| u32::from_be_bytes(bytes[4..8].try_into().unwrap());
        match sliced.transport.unwrap() {
            TransportSlice::Icmpv4(icmp) => {
                assert!(matches!(icmp.icmp_type(), Icmpv4Type::TimeExceeded(_)));
                let bytes = icmp.slice();
                (bytes[0], bytes[1], word(bytes))
            }
            TransportSlice::Icmpv6(icmp) => {
                assert!(!matches!(icmp.icmp_type(), Icmpv6Type::Unknown { .. }));
                let bytes = icmp.slice();
                (bytes[0], bytes[1], word(bytes))
            }
            other => panic!("{other:?}"),
        }
    }
}

/// Two fragments of a datagram of 2000 bytes; the first has `first` bytes of it and the UDP header.
fn halves(is_v4: bool, first: usize) -> [Vec<u8>; 2] {
    let spec = Spec::default();
    let ethernet = PacketBuilder::ethernet2(spec.mac.0, spec.gateway_mac.0);
    let to = "2001:db8::7".parse::<std::net::Ipv6Addr>().unwrap();
    let ip = if is_v4 {
        ethernet.ipv4(spec.v4.unwrap().address.octets(), [192, 0, 2, 7], 60)
    } else {
        ethernet.ipv6(spec.v6.unwrap().address.octets(), to.octets(), 60)
    };
    let mut whole = Vec::new();
    ip.udp(1000, 2000).write(&mut whole, &[7; 2000]).unwrap();
    let head = if is_v4 { 34 } else { 54 };
    [(0..first, true), (first..2008, false)].map(|(range, has_more)| {
        let mut bytes = whole[..head].to_vec();
        let more = u16::from(has_more);
        if is_v4 {
            bytes[16..18].copy_from_slice(&(20 + range.len() as u16).to_be_bytes());
            let field = (range.start / 8) as u16 | more << 13;
            bytes[20..22].copy_from_slice(&field.to_be_bytes());
            bytes[24..26].fill(0);
            let sum = crate::frame::sum::Sum::default().bytes(&bytes[14..34]);
            bytes[24..26].copy_from_slice(&sum.checksum().to_be_bytes());
        } else {
            bytes[18..20].copy_from_slice(&(8 + range.len() as u16).to_be_bytes());
            let protocol = std::mem::replace(&mut bytes[20], 44);
            bytes.extend([protocol, 0]);
            bytes.extend((range.start as u16 | more).to_be_bytes());
            bytes.extend([0, 0, 0, 9]);
        }
        bytes.extend_from_slice(&whole[head + range.start..head + range.end]);
        bytes
    })
}

#[test]
fn a_datagram_in_fragments_reaches_the_host_whole_and_may_be_cut_again() {
    for is_v4 in [true, false] {
        let mut bench = Bench::new();
        for part in halves(is_v4, 1000).iter().rev() {
            assert!(bench.host.taken.is_empty());
            bench.hand_in(part);
        }
        assert_eq!(bench.host.taken, [[7; 2000]]);
        assert!(bench.host.may_be_cut);
        assert_eq!(bench.card.stats.reassembled.get(), 1);
        assert!(bench.wire.0.is_empty());
    }
}

#[test]
fn a_guest_is_told_when_the_rest_of_its_datagram_does_not_come() {
    for (is_v4, told) in [(true, (11, 1, 0)), (false, (3, 1, 0))] {
        let mut bench = Bench::new();
        let [first, second] = halves(is_v4, 1000);
        bench.hand_in(&first);
        let end = bench.card.deadline().unwrap();
        assert_eq!(end, bench.now + reassembly::TIMEOUT);
        bench.run();
        assert!(bench.wire.0.is_empty());
        bench.now = end;
        bench.run();
        assert_eq!(bench.told(), told);
        // Nobody can be told of what has no beginning.
        bench.hand_in(&second);
        bench.now += reassembly::TIMEOUT;
        bench.run();
        assert!(bench.wire.0.is_empty() && bench.host.taken.is_empty());
        assert_eq!(bench.card.stats.not_reassembled[TIMEOUT].get(), 2);
    }
}

#[test]
fn a_fragment_that_makes_no_sense_is_answered_where_the_standard_says_so() {
    let mut bench = Bench::new();
    let [odd, _] = halves(false, 1001);
    bench.hand_in(&odd);
    // The payload length, 4 bytes into the packet.
    assert_eq!(bench.told(), (4, 0, 4));
    let [odd, _] = halves(true, 1001);
    bench.hand_in(&odd);
    assert!(bench.wire.0.is_empty());
    assert_eq!(bench.card.stats.not_reassembled[MALFORMED].get(), 2);
}

#[test]
fn fragments_from_an_address_that_is_not_the_guests_cost_nothing() {
    let mut bench = Bench::new();
    let [mut first, _] = halves(false, 1000);
    first[22] ^= 0x40;
    bench.hand_in(&first);
    assert_eq!(bench.card.stats.spoofed.get(), 1);
    assert!(bench.card.fragments.is_empty());
}
