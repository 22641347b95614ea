//! ARP (RFC 826): the card answers for its own addresses, and only for them.
//!
//! The link has two ends. So a request for any other address on it stays unanswered, which is also
//! what duplicate address detection (RFC 5227) needs: the guest probes for its own address, hears
//! nothing, and takes it. A guest that claims an address of the card's gets the card's defence, as
//! RFC 5227, 2.4 (c) asks: one announcement, at most every [`DEFEND_INTERVAL`].
//!
//! The card learns nothing from ARP: the guest's addresses are the specification's. So there is no
//! cache to poison.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, ETHERNET_HEADER_LEN, EthernetAddress, EthernetFrame,
    EthernetProtocol, EthernetRepr,
};

use crate::spec::Spec;

/// Time between two defences of an address (RFC 5227, 1.1).
pub const DEFEND_INTERVAL: Duration = Duration::from_secs(10);

/// What was seen and done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ArpStats {
    /// Requests answered.
    pub answered: u64,
    /// Requests for others, announcements, replies that nobody asked for.
    pub ignored: u64,
    /// Not ARP over Ethernet for IPv4, or a sender that is not the frame's.
    pub malformed: u64,
    /// Claims of the card's addresses.
    pub conflicts: u64,
}

/// The card's side of ARP.
#[derive(Debug, Default)]
pub struct Arp {
    defended: Option<Instant>,
    stats: ArpStats,
}

impl Arp {
    /// Counters.
    #[must_use]
    pub fn stats(&self) -> ArpStats {
        self.stats
    }

    /// Takes the payload of an ARP frame that `sender` sent; gives the frame that answers it.
    pub fn handle(
        &mut self,
        spec: &Spec,
        sender: EthernetAddress,
        payload: &[u8],
        now: Instant,
    ) -> Option<Vec<u8>> {
        let packet = ArpPacket::new_checked(payload).ok();
        let Some(ArpRepr::EthernetIpv4 {
            operation,
            source_hardware_addr,
            source_protocol_addr,
            target_protocol_addr,
            ..
        }) = packet.and_then(|packet| ArpRepr::parse(&packet).ok())
        else {
            self.stats.malformed += 1;
            return None;
        };
        if source_hardware_addr != sender || !sender.is_unicast() {
            self.stats.malformed += 1;
            return None;
        }
        let is_card = |address: Ipv4Addr| spec.is_card(address.into());
        if is_card(source_protocol_addr) {
            self.stats.conflicts += 1;
            let quiet = |last: Instant| now.saturating_duration_since(last) < DEFEND_INTERVAL;
            if self.defended.is_some_and(quiet) {
                return None;
            }
            self.defended = Some(now);
            let address = source_protocol_addr;
            let all = EthernetAddress::BROADCAST;
            return Some(frame(spec, ArpOperation::Request, address, all, address));
        }
        if operation != ArpOperation::Request || !is_card(target_protocol_addr) {
            self.stats.ignored += 1;
            return None;
        }
        self.stats.answered += 1;
        Some(frame(
            spec,
            ArpOperation::Reply,
            target_protocol_addr,
            sender,
            source_protocol_addr,
        ))
    }
}

/// A frame in which the card says that `address` is its own.
fn frame(
    spec: &Spec,
    operation: ArpOperation,
    address: Ipv4Addr,
    to: EthernetAddress,
    target: Ipv4Addr,
) -> Vec<u8> {
    let repr = ArpRepr::EthernetIpv4 {
        operation,
        source_hardware_addr: spec.gateway_mac,
        source_protocol_addr: address,
        // An announcement's target hardware address is not looked at (RFC 5227, 2.3).
        target_hardware_addr: if to.is_broadcast() {
            EthernetAddress([0; 6])
        } else {
            to
        },
        target_protocol_addr: target,
    };
    let mut bytes = vec![0; ETHERNET_HEADER_LEN + repr.buffer_len()];
    let mut ethernet = EthernetFrame::new_unchecked(&mut bytes[..]);
    EthernetRepr {
        src_addr: spec.gateway_mac,
        dst_addr: to,
        ethertype: EthernetProtocol::Arp,
    }
    .emit(&mut ethernet);
    repr.emit(&mut ArpPacket::new_unchecked(ethernet.payload_mut()));
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUEST: EthernetAddress = EthernetAddress([0x52, 0x54, 0, 0x12, 0x34, 0x56]);

    fn arp(operation: ArpOperation, source: [u8; 4], target: [u8; 4]) -> Vec<u8> {
        let repr = ArpRepr::EthernetIpv4 {
            operation,
            source_hardware_addr: GUEST,
            source_protocol_addr: source.into(),
            target_hardware_addr: EthernetAddress([0; 6]),
            target_protocol_addr: target.into(),
        };
        let mut bytes = vec![0; repr.buffer_len()];
        repr.emit(&mut ArpPacket::new_unchecked(&mut bytes[..]));
        bytes
    }

    fn ask(arp_: &mut Arp, payload: &[u8], now: Instant) -> Option<ArpRepr> {
        let bytes = arp_.handle(&Spec::default(), GUEST, payload, now)?;
        let frame = EthernetFrame::new_checked(&bytes[..]).unwrap();
        assert_eq!(frame.src_addr(), Spec::default().gateway_mac);
        assert_eq!(frame.ethertype(), EthernetProtocol::Arp);
        Some(ArpRepr::parse(&ArpPacket::new_checked(frame.payload()).unwrap()).unwrap())
    }

    #[test]
    fn the_card_answers_for_each_of_its_addresses() {
        let mut service = Arp::default();
        for address in [[10, 0, 2, 2], [10, 0, 2, 3], [169, 254, 169, 254]] {
            let request = arp(ArpOperation::Request, [10, 0, 2, 15], address);
            let reply = ask(&mut service, &request, Instant::now()).unwrap();
            assert_eq!(
                reply,
                ArpRepr::EthernetIpv4 {
                    operation: ArpOperation::Reply,
                    source_hardware_addr: Spec::default().gateway_mac,
                    source_protocol_addr: address.into(),
                    target_hardware_addr: GUEST,
                    target_protocol_addr: [10, 0, 2, 15].into(),
                }
            );
        }
        assert_eq!(service.stats().answered, 3);
    }

    #[test]
    fn a_probe_for_the_guests_own_address_hears_nothing() {
        let mut service = Arp::default();
        let probe = arp(ArpOperation::Request, [0, 0, 0, 0], [10, 0, 2, 15]);
        assert_eq!(ask(&mut service, &probe, Instant::now()), None);
        let announcement = arp(ArpOperation::Request, [10, 0, 2, 15], [10, 0, 2, 15]);
        assert_eq!(ask(&mut service, &announcement, Instant::now()), None);
        assert_eq!(service.stats().ignored, 2);
    }

    #[test]
    fn a_probe_for_the_gateways_address_is_told_that_it_is_taken() {
        let probe = arp(ArpOperation::Request, [0, 0, 0, 0], [10, 0, 2, 2]);
        let reply = ask(&mut Arp::default(), &probe, Instant::now()).unwrap();
        let ArpRepr::EthernetIpv4 {
            operation,
            source_protocol_addr,
            ..
        } = reply
        else {
            panic!("not ARP for IPv4")
        };
        assert_eq!(operation, ArpOperation::Reply);
        assert_eq!(source_protocol_addr, Ipv4Addr::new(10, 0, 2, 2));
    }

    #[test]
    fn a_claim_of_the_gateways_address_is_defended_at_most_every_ten_seconds() {
        let (mut service, start) = (Arp::default(), Instant::now());
        let claim = arp(ArpOperation::Reply, [10, 0, 2, 2], [10, 0, 2, 2]);
        assert!(ask(&mut service, &claim, start).is_some());
        for _ in 0..100 {
            assert_eq!(ask(&mut service, &claim, start), None);
        }
        assert!(ask(&mut service, &claim, start + DEFEND_INTERVAL).is_some());
        assert_eq!(service.stats().conflicts, 102);
    }

    #[test]
    fn garbage_and_a_sender_that_lies_are_counted_and_not_answered() {
        let (mut service, now) = (Arp::default(), Instant::now());
        let spec = Spec::default();
        let good = arp(ArpOperation::Request, [10, 0, 2, 15], [10, 0, 2, 2]);
        for length in 0..good.len() {
            assert_eq!(service.handle(&spec, GUEST, &good[..length], now), None);
        }
        let other = EthernetAddress([2, 0, 0, 0, 0, 1]);
        assert_eq!(service.handle(&spec, other, &good, now), None);
        assert_eq!(service.stats().malformed, good.len() as u64 + 1);
        assert_eq!(service.stats().answered, 0);
    }
}
