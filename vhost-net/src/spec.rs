//! What an interface is: the addresses on both sides of the wire between guest and card, and what
//! the guest is told about its network.
//!
//! Addresses are [`std::net`]'s, which are smoltcp's too.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use smoltcp::wire::EthernetAddress;

/// Smallest MTU: what IPv6 needs (RFC 8200, section 5).
pub const MTU_MIN: u16 = 1280;
/// Largest MTU: what fits an IPv4 packet with room for headers, and what QEMU takes.
pub const MTU_MAX: u16 = 65520;

/// One interface of a virtual machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// The guest's hardware address.
    pub mac: EthernetAddress,
    /// The card's own hardware address: gateway, name server, metadata service.
    pub gateway_mac: EthernetAddress,
    /// IPv4, if the interface has it.
    pub v4: Option<Ipv4>,
    /// IPv6, if the interface has it.
    pub v6: Option<Ipv6>,
    /// Bytes of an IP packet on this interface, [`MTU_MIN`] to [`MTU_MAX`].
    pub mtu: u16,
    /// What the guest is called, in DHCP and DNS.
    pub hostname: Option<String>,
    /// Search domain.
    pub domain: Option<String>,
    /// The servers that the card's resolver asks, in the host's network; empty: no DNS.
    pub upstream_dns: Vec<SocketAddr>,
}

/// IPv4 of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipv4 {
    /// The guest's address.
    pub address: Ipv4Addr,
    /// Length of the network's prefix in bits.
    pub prefix_len: u8,
    /// The card, as router and DHCP server.
    pub gateway: Ipv4Addr,
    /// The card, as name server.
    pub dns: Ipv4Addr,
}

/// IPv6 of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipv6 {
    /// The guest's address, which DHCPv6 gives.
    pub address: Ipv6Addr,
    /// The network's prefix; 64 bits, as SLAAC needs.
    pub prefix: Ipv6Addr,
    /// The card, as router: a link-local address.
    pub gateway: Ipv6Addr,
    /// The card, as name server.
    pub dns: Ipv6Addr,
}

/// The metadata service's IPv4 address.
pub const METADATA_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// The metadata service's IPv6 address.
pub const METADATA_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);
/// The resolver's link-local address, as on AWS; it answers besides [`Ipv4::dns`].
pub const RESOLVER_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 253);
/// The resolver's well-known IPv6 address.
pub const RESOLVER_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x253);
/// The time server's IPv4 address.
pub const TIME_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 123);
/// The time server's IPv6 address.
pub const TIME_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x123);

impl Ipv4 {
    /// Whether an address is in the interface's network.
    #[must_use]
    pub fn contains(&self, address: Ipv4Addr) -> bool {
        let shift = 32_u32.saturating_sub(u32::from(self.prefix_len));
        let mask = u32::MAX.checked_shl(shift).unwrap_or(0);
        (address.to_bits() ^ self.address.to_bits()) & mask == 0
    }

    /// The network's broadcast address.
    #[must_use]
    pub fn broadcast(&self) -> Ipv4Addr {
        let host = u32::MAX
            .checked_shr(u32::from(self.prefix_len))
            .unwrap_or(0);
        Ipv4Addr::from_bits(self.address.to_bits() | host)
    }
}

impl Ipv6 {
    /// Whether an address is in the interface's /64.
    #[must_use]
    pub fn contains(&self, address: Ipv6Addr) -> bool {
        address.to_bits() >> 64 == self.prefix.to_bits() >> 64
    }
}

impl Spec {
    /// Whether `address` is the card itself: gateway, resolver, metadata, time. What goes there
    /// is answered by the card's services or not at all; it never reaches the host.
    #[must_use]
    pub fn is_card(&self, address: IpAddr) -> bool {
        is_link_service(address)
            || match address {
                IpAddr::V4(address) => self
                    .v4
                    .is_some_and(|v4| address == v4.gateway || address == v4.dns),
                IpAddr::V6(address) => self
                    .v6
                    .is_some_and(|v6| address == v6.gateway || address == v6.dns),
            }
    }

    /// Whether the guest may send from `address` (source check): its own address, and for IPv6 any
    /// of its prefix (temporary addresses, RFC 8981) and link-local ones.
    #[must_use]
    pub fn is_guest(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => self.v4.is_some_and(|v4| address == v4.address),
            IpAddr::V6(address) => self.v6.is_some_and(|v6| {
                (v6.contains(address) || is_link_local(address))
                    && address != v6.gateway
                    && address != v6.dns
            }),
        }
    }
}

/// Whether this is one of the well-known addresses of services, which a VPC limits the packets to.
#[must_use]
pub fn is_link_service(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => [METADATA_V4, RESOLVER_V4, TIME_V4].contains(&address),
        IpAddr::V6(address) => [METADATA_V6, RESOLVER_V6, TIME_V6].contains(&address),
    }
}

/// fe80::/10.
#[must_use]
pub const fn is_link_local(address: Ipv6Addr) -> bool {
    address.segments()[0] & 0xffc0 == 0xfe80
}

impl Default for Spec {
    /// What a card without options serves: addresses as QEMU's user network has them, so that
    /// guests need no change.
    fn default() -> Self {
        let v4 = |last| Ipv4Addr::new(10, 0, 2, last);
        let prefix = Ipv6Addr::new(0xfd00, 0, 0, 2, 0, 0, 0, 0);
        Self {
            mac: EthernetAddress([0x52, 0x54, 0x00, 0x12, 0x34, 0x56]),
            gateway_mac: EthernetAddress([0x52, 0x55, 0x0a, 0x00, 0x02, 0x02]),
            v4: Some(Ipv4 {
                address: v4(15),
                prefix_len: 24,
                gateway: v4(2),
                dns: v4(3),
            }),
            v6: Some(Ipv6 {
                address: Ipv6Addr::from_bits(prefix.to_bits() | 0x15),
                prefix,
                gateway: Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2),
                dns: Ipv6Addr::from_bits(prefix.to_bits() | 3),
            }),
            mtu: 9001,
            hostname: None,
            domain: None,
            upstream_dns: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_contains_its_addresses_and_no_others() {
        let v4 = Spec::default().v4.unwrap();
        assert!(v4.contains(Ipv4Addr::new(10, 0, 2, 255)));
        assert!(!v4.contains(Ipv4Addr::new(10, 0, 3, 0)));
        assert_eq!(v4.broadcast(), Ipv4Addr::new(10, 0, 2, 255));
        let all = Ipv4 {
            prefix_len: 0,
            ..v4
        };
        assert!(all.contains(Ipv4Addr::new(1, 1, 1, 1)));
        let one = Ipv4 {
            prefix_len: 32,
            ..v4
        };
        assert!(one.contains(v4.address) && !one.contains(v4.gateway));
        assert_eq!(one.broadcast(), v4.address);
    }

    #[test]
    fn the_guest_may_send_from_its_own_addresses_only() {
        let spec = Spec::default();
        let is_guest = |text: &str| spec.is_guest(text.parse().unwrap());
        assert!(is_guest("10.0.2.15"));
        assert!(!is_guest("10.0.2.16") && !is_guest("10.0.2.2") && !is_guest("0.0.0.0"));
        assert!(is_guest("fd00:0:0:2::abcd") && is_guest("fe80::1234"));
        assert!(!is_guest("fe80::2") && !is_guest("fd00:0:0:3::1") && !is_guest("::1"));
    }

    #[test]
    fn what_is_for_the_card_is_told_from_what_is_for_the_world() {
        let spec = Spec::default();
        let is_card = |text: &str| spec.is_card(text.parse().unwrap());
        assert!(is_card("10.0.2.2") && is_card("169.254.169.254") && is_card("fd00:ec2::253"));
        assert!(is_card("169.254.169.123") && is_card("fd00:ec2::123"));
        assert!(!is_card("10.0.2.4") && !is_card("127.0.0.1") && !is_card("fd00:ec2::252"));
    }
}
