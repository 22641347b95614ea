//! Neighbour and router discovery for IPv6 (RFC 4861, RFC 8106).
//!
//! As with ARP, the link has two ends: the card answers solicitations for its own addresses and
//! for no other, so the guest's duplicate address detection (RFC 4862, 5.4) finds its addresses
//! free and the card's taken. The card learns nothing from the guest.
//!
//! The card is the only router. It answers each solicitation at once, without the random delay of
//! RFC 4861, 6.2.6, which keeps several routers from speaking together, and it advertises itself
//! now and then: [`INITIAL_INTERVAL`] for the first few, so that a guest that boots while the card
//! comes up gets one early, then [`INTERVAL`].
//!
//! The advertisement says: default route; the prefix, on-link and for SLAAC; addresses and other
//! configuration also by DHCPv6 (M and O); MTU; resolver; search domain. Both ways of getting an
//! address are offered, since systems differ in which one they take; policy lets the guest send
//! from the whole prefix.

use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    EthernetAddress, Icmpv6Message, Icmpv6Packet, Icmpv6Repr, IpProtocol, NdiscNeighborFlags,
    NdiscPrefixInfoFlags, NdiscPrefixInformation, NdiscRepr, NdiscRouterFlags,
};

use super::wire::{self, Packet};
use crate::spec::{self, Ipv6, Spec};

/// Between two advertisements that nobody asked for.
pub const INTERVAL: Duration = Duration::from_secs(300);
/// Between the first [`INITIAL_COUNT`] of them (RFC 4861, 10).
pub const INITIAL_INTERVAL: Duration = Duration::from_secs(16);
/// How many come at [`INITIAL_INTERVAL`].
pub const INITIAL_COUNT: u32 = 3;
/// How long the router, the resolver and the search domain are good for without another word.
pub const ROUTER_LIFETIME: Duration = Duration::from_secs(1800);
/// How long an address of the prefix is preferred, and how long it is valid.
const PREFIX_LIFETIMES: (u64, u64) = (14_400, 86_400);

const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// What was seen and done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NdStats {
    /// Neighbour advertisements sent.
    pub answered: u64,
    /// Router advertisements sent.
    pub advertised: u64,
    /// Solicitations for others, and advertisements and redirects, which the card has no use for.
    pub ignored: u64,
    /// Fails the checks of RFC 4861, 6.1 and 7.1.
    pub malformed: u64,
}

/// The card's side of neighbour discovery.
#[derive(Debug)]
pub struct Nd {
    next: Option<Instant>,
    sent: u32,
    stats: NdStats,
}

impl Nd {
    /// `start` is when the first unsolicited advertisement goes out; `None`: never, as when another
    /// instance for the same link sends them.
    #[must_use]
    pub fn new(start: Option<Instant>) -> Self {
        Self {
            next: start,
            sent: 0,
            stats: NdStats::default(),
        }
    }

    /// Counters.
    #[must_use]
    pub fn stats(&self) -> NdStats {
        self.stats
    }

    /// When [`Self::poll`] has something to send.
    #[must_use]
    pub fn poll_at(&self) -> Option<Instant> {
        self.next
    }

    /// The unsolicited advertisement, when it is due.
    pub fn poll(&mut self, spec: &Spec, now: Instant) -> Option<Vec<u8>> {
        let v6 = spec.v6?;
        if now < self.next? {
            return None;
        }
        self.sent = self.sent.saturating_add(1);
        let interval = if self.sent <= INITIAL_COUNT {
            INITIAL_INTERVAL
        } else {
            INTERVAL
        };
        self.next = now.checked_add(interval);
        self.advertise(spec, &v6, ALL_NODES)
    }

    /// Whether an ICMPv6 packet is neighbour discovery and so [`Self::handle`]'s.
    #[must_use]
    pub fn wants(packet: &Packet<'_>) -> bool {
        packet.protocol == IpProtocol::Icmpv6
            && packet
                .payload
                .first()
                .is_some_and(|kind| Icmpv6Message::from(*kind).is_ndisc())
    }

    /// Takes a packet that [`Self::wants`] said yes to; gives the frame that answers it.
    pub fn handle(&mut self, spec: &Spec, packet: &Packet<'_>) -> Option<Vec<u8>> {
        let (IpAddr::V6(source), IpAddr::V6(destination)) = (packet.source, packet.destination)
        else {
            self.stats.malformed += 1;
            return None;
        };
        let Some(v6) = spec.v6 else {
            self.stats.ignored += 1;
            return None;
        };
        let icmp = Icmpv6Packet::new_checked(packet.payload).ok();
        let checks = ChecksumCapabilities::default();
        let repr = icmp
            .filter(|icmp| packet.hop_limit == 255 && icmp.msg_code() == 0)
            .and_then(|icmp| Icmpv6Repr::parse(&source, &destination, &icmp, &checks).ok());
        let unspecified = source.is_unspecified();
        match repr {
            // RFC 4861, 6.1.1 and 7.1.1: who has no address yet must not name a link-layer one.
            Some(Icmpv6Repr::Ndisc(
                NdiscRepr::RouterSolicit { lladdr } | NdiscRepr::NeighborSolicit { lladdr, .. },
            )) if unspecified && lladdr.is_some() => {}
            Some(Icmpv6Repr::Ndisc(NdiscRepr::NeighborSolicit { target_addr, .. }))
                if target_addr.is_multicast()
                    || (unspecified && destination != solicited_node(target_addr)) => {}
            Some(Icmpv6Repr::Ndisc(NdiscRepr::NeighborSolicit { target_addr, .. })) => {
                if !spec.is_card(target_addr.into()) {
                    self.stats.ignored += 1;
                    return None;
                }
                self.stats.answered += 1;
                let to = if unspecified { ALL_NODES } else { source };
                return neighbor_advertisement(spec, target_addr, to);
            }
            Some(Icmpv6Repr::Ndisc(NdiscRepr::RouterSolicit { .. })) => {
                let to = if unspecified { ALL_NODES } else { source };
                return self.advertise(spec, &v6, to);
            }
            Some(_) => {
                self.stats.ignored += 1;
                return None;
            }
            None => {}
        }
        self.stats.malformed += 1;
        None
    }

    fn advertise(&mut self, spec: &Spec, v6: &Ipv6, to: Ipv6Addr) -> Option<Vec<u8>> {
        self.stats.advertised += 1;
        let duration = |seconds| smoltcp::time::Duration::from_secs(seconds);
        let (preferred, valid) = PREFIX_LIFETIMES;
        let repr = NdiscRepr::RouterAdvert {
            hop_limit: 64,
            flags: NdiscRouterFlags::MANAGED | NdiscRouterFlags::OTHER,
            router_lifetime: duration(ROUTER_LIFETIME.as_secs()),
            reachable_time: duration(0),
            retrans_time: duration(0),
            lladdr: Some(spec.gateway_mac.into()),
            mtu: Some(u32::from(spec.mtu)),
            prefix_info: Some(NdiscPrefixInformation {
                prefix_len: 64,
                flags: NdiscPrefixInfoFlags::ON_LINK | NdiscPrefixInfoFlags::ADDRCONF,
                valid_lifetime: duration(valid),
                preferred_lifetime: duration(preferred),
                prefix: v6.prefix,
            }),
        };
        emit(spec, v6.gateway, to, repr, &dns_options(spec, v6))
    }
}

/// The solicited-node multicast address (RFC 4291, 2.7.1).
#[must_use]
pub fn solicited_node(address: Ipv6Addr) -> Ipv6Addr {
    let [.., a, b, c] = address.octets();
    Ipv6Addr::new(
        0xff02,
        0,
        0,
        0,
        0,
        1,
        0xff00 | u16::from(a),
        u16::from_be_bytes([b, c]),
    )
}

fn neighbor_advertisement(spec: &Spec, target: Ipv6Addr, to: Ipv6Addr) -> Option<Vec<u8>> {
    let mut flags = NdiscNeighborFlags::OVERRIDE | NdiscNeighborFlags::ROUTER;
    if !to.is_multicast() {
        flags |= NdiscNeighborFlags::SOLICITED;
    }
    let repr = NdiscRepr::NeighborAdvert {
        flags,
        target_addr: target,
        lladdr: Some(spec.gateway_mac.into()),
    };
    emit(spec, target, to, repr, &[])
}

/// Recursive DNS server and search list (RFC 8106, 5.1 and 5.2).
fn dns_options(spec: &Spec, v6: &Ipv6) -> Vec<u8> {
    let lifetime = u32::try_from(ROUTER_LIFETIME.as_secs()).unwrap_or(u32::MAX);
    let mut options = vec![25, 3, 0, 0];
    options.extend(lifetime.to_be_bytes());
    options.extend(v6.dns.octets());
    let Some(domain) = spec.domain.as_deref() else {
        return options;
    };
    let mut name = Vec::new();
    for label in domain.split('.').filter(|label| !label.is_empty()) {
        let Ok(length @ 1..=63) = u8::try_from(label.len()) else {
            return options;
        };
        name.push(length);
        name.extend(label.as_bytes());
    }
    name.push(0);
    if name.len() > 255 || name.len() == 1 {
        return options;
    }
    name.resize(name.len().next_multiple_of(8), 0);
    let units = u8::try_from(1 + name.len() / 8).unwrap_or(u8::MAX);
    options.extend([31, units, 0, 0]);
    options.extend(lifetime.to_be_bytes());
    options.extend(name);
    options
}

/// A frame of the card's with an ND message and options that smoltcp does not know behind it.
fn emit(
    spec: &Spec,
    source: Ipv6Addr,
    to: Ipv6Addr,
    repr: NdiscRepr<'_>,
    more: &[u8],
) -> Option<Vec<u8>> {
    let mac: EthernetAddress = wire::group_mac_v6(to).unwrap_or(spec.mac);
    let length = repr.buffer_len();
    debug_assert!(spec::is_link_local(source) || spec.is_card(source.into()));
    wire::ip(
        (spec.gateway_mac, mac),
        (source.into(), to.into()),
        IpProtocol::Icmpv6,
        255,
        length + more.len(),
        |bytes| {
            let (head, tail) = bytes.split_at_mut(length);
            repr.emit(&mut Icmpv6Packet::new_unchecked(head));
            tail.copy_from_slice(more);
            Icmpv6Packet::new_unchecked(bytes).fill_checksum(&source, &to);
        },
    )
}

#[cfg(test)]
mod tests;
