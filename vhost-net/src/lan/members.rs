//! Who is on the network: the own guest's addresses, and the other members with theirs. No I/O.
//!
//! # Whose address it is
//! First come, first served (as RFC 6620 has it for IPv6): an address belongs to whoever had it first,
//! and a later claim of it is not heard, counted, until the first one has left. What was given on the
//! command line is the own guest's from the start. Addresses of other networks than the interface's
//! own are not heard either, so that no member can take the traffic to a host elsewhere.
//!
//! IPv6 guests choose further addresses of their prefix, and a link-local one. The card learns those
//! when the guest first asks whether they are free (RFC 4862, 5.4) or sends from them, and announces
//! them; of more than fit, the one learned first is forgotten.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use super::message::{ADDRESSES_MAX, Announcement};
use crate::spec::{Spec, is_link_local};

/// A member other than the own guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its number at the [port](super::port).
    pub peer: usize,
    /// What it said of itself, less what is not its own.
    pub is: Announcement,
}

/// All members other than the own guest, as they are at one time.
#[derive(Debug, Default)]
pub struct Members {
    list: Vec<Arc<Member>>,
    by_address: HashMap<IpAddr, Arc<Member>>,
}

impl Members {
    /// From announcements in the order in which their senders came; `own` are the own guest's
    /// addresses. Also gives how many addresses were not heard.
    #[must_use]
    pub fn new(
        spec: &Spec,
        own: &[IpAddr],
        announced: impl IntoIterator<Item = (usize, Announcement)>,
    ) -> (Self, u64) {
        let mut members = Self::default();
        let mut refused = 0;
        for (peer, mut is) in announced {
            let is_free = |address: &IpAddr| {
                is_near(spec, *address)
                    && !own.contains(address)
                    && !members.by_address.contains_key(address)
            };
            let all = is.addresses.len();
            is.addresses.retain(is_free);
            refused += (all - is.addresses.len()) as u64;
            let member = Arc::new(Member { peer, is });
            for address in &member.is.addresses {
                members.by_address.insert(*address, Arc::clone(&member));
            }
            members.list.push(member);
        }
        (members, refused)
    }

    /// All, in the order in which they came.
    #[must_use]
    pub fn list(&self) -> &[Arc<Member>] {
        &self.list
    }

    /// Whose address it is.
    #[must_use]
    pub fn by_address(&self, address: IpAddr) -> Option<&Arc<Member>> {
        self.by_address.get(&address)
    }

    /// Names with the addresses that others should use, which are not link-local. Of members that
    /// go by one name the first has it, and nobody has the own guest's.
    #[must_use]
    pub fn names(&self, own: Option<&str>) -> Vec<(String, Vec<IpAddr>)> {
        let mut names: BTreeMap<String, Vec<IpAddr>> = BTreeMap::new();
        for member in &self.list {
            let Some(name) = &member.is.name else {
                continue;
            };
            let name = name.to_ascii_lowercase();
            let is_own = own.is_some_and(|own| own.eq_ignore_ascii_case(&name));
            // The first of each family is what was given; others come and go.
            let mut addresses = Vec::new();
            for address in &member.is.addresses {
                let is_there = |other: &IpAddr| other.is_ipv4() == address.is_ipv4();
                let is_local = matches!(address, IpAddr::V6(v6) if is_link_local(*v6));
                if !is_local && !addresses.iter().any(is_there) {
                    addresses.push(*address);
                }
            }
            if !is_own && !addresses.is_empty() {
                names.entry(name).or_insert(addresses);
            }
        }
        names.into_iter().collect()
    }

    /// The addresses of the members of each security group.
    #[must_use]
    pub fn groups(&self) -> BTreeMap<String, Vec<IpAddr>> {
        let mut groups: BTreeMap<String, Vec<IpAddr>> = BTreeMap::new();
        for member in &self.list {
            for group in &member.is.groups {
                let addresses = groups.entry(group.clone()).or_default();
                addresses.extend(&member.is.addresses);
            }
        }
        groups
    }
}

/// Whether an address may be a member's: of the interface's own networks, and not the card's.
fn is_near(spec: &Spec, address: IpAddr) -> bool {
    if spec.is_card(address) {
        return false;
    }
    match address {
        IpAddr::V4(v4) => spec
            .v4
            .is_some_and(|own| own.contains(v4) && v4 != own.broadcast()),
        IpAddr::V6(v6) => spec
            .v6
            .is_some_and(|own| own.contains(v6) || is_link_local(v6)),
    }
}

/// The own guest's addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Own {
    addresses: Vec<IpAddr>,
    /// How many of them were given, not learned.
    given: usize,
}

impl Own {
    /// What was given.
    #[must_use]
    pub fn new(spec: &Spec) -> Self {
        let v4 = spec.v4.map(|v4| IpAddr::from(v4.address));
        let v6 = spec.v6.map(|v6| IpAddr::from(v6.address));
        let addresses: Vec<_> = v4.into_iter().chain(v6).collect();
        Self {
            given: addresses.len(),
            addresses,
        }
    }

    /// All of them, those that were given first.
    #[must_use]
    pub fn addresses(&self) -> &[IpAddr] {
        &self.addresses
    }

    /// Whether it is one of them.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        self.addresses.contains(&address)
    }

    /// The guest wants to use an address. True if that is new and may be.
    pub fn claim(&mut self, spec: &Spec, members: &Members, address: IpAddr) -> bool {
        let may = address.is_ipv6()
            && spec.is_guest(address)
            && !self.contains(address)
            && members.by_address(address).is_none();
        if may {
            if self.addresses.len() >= ADDRESSES_MAX && self.given < self.addresses.len() {
                self.addresses.remove(self.given);
            }
            self.addresses.push(address);
        }
        may
    }
}

#[cfg(test)]
mod tests {
    use smoltcp::wire::EthernetAddress;

    use super::*;

    fn member(last: u8, name: &str, addresses: &[&str]) -> (usize, Announcement) {
        let is = Announcement {
            mac: EthernetAddress([0x52, 0x54, 0, 0, 0, last]),
            name: Some(name.into()),
            mtu: 9001,
            addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
            groups: vec![format!("group-{last}"), "default".into()],
        };
        (usize::from(last), is)
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn an_address_is_whose_had_it_first_and_never_the_cards_or_another_networks() {
        let spec = Spec::default();
        let own = Own::new(&spec);
        let (members, refused) = Members::new(
            &spec,
            own.addresses(),
            [
                member(1, "a", &["10.0.2.16", "10.0.2.15", "8.8.8.8", "10.0.2.2"]),
                member(2, "b", &["10.0.2.16", "10.0.2.17", "10.0.2.255"]),
                member(3, "c", &["fd00:0:0:2::16", "fd00:0:0:3::1", "fe80::2"]),
            ],
        );
        assert_eq!(refused, 7);
        let whose = |text: &str| members.by_address(ip(text)).map(|member| member.peer);
        assert_eq!(whose("10.0.2.16"), Some(1));
        assert_eq!(whose("10.0.2.17"), Some(2));
        assert_eq!(whose("fd00:0:0:2::16"), Some(3));
        for text in [
            "10.0.2.15",
            "8.8.8.8",
            "10.0.2.2",
            "fd00:0:0:3::1",
            "fe80::2",
        ] {
            assert_eq!(whose(text), None, "{text}");
        }
    }

    #[test]
    fn the_guest_learns_addresses_of_its_own_prefix_that_are_free_and_loses_the_oldest() {
        let spec = Spec::default();
        let mut own = Own::new(&spec);
        let theirs = [member(1, "a", &["fd00:0:0:2::77"])];
        let (members, _) = Members::new(&spec, own.addresses(), theirs);
        for refused in ["fd00:0:0:2::77", "fd00:0:0:3::1", "10.0.2.99", "fe80::2"] {
            assert!(!own.claim(&spec, &members, ip(refused)), "{refused}");
        }
        assert!(own.claim(&spec, &members, ip("fe80::1234")));
        assert!(!own.claim(&spec, &members, ip("fe80::1234")));
        for n in 0..100 {
            assert!(own.claim(&spec, &members, ip(&format!("fd00:0:0:2::1:{n:x}"))));
        }
        assert_eq!(own.addresses().len(), ADDRESSES_MAX);
        assert!(own.contains(ip("10.0.2.15")) && own.contains(ip("fd00:0:0:2::15")));
        assert!(!own.contains(ip("fe80::1234")) && own.contains(ip("fd00:0:0:2::1:63")));
    }

    #[test]
    fn a_name_is_whose_had_it_first_and_leads_to_the_given_addresses() {
        let spec = Spec::default();
        let (members, _) = Members::new(
            &spec,
            &[],
            [
                member(
                    1,
                    "Web",
                    &["10.0.2.16", "fe80::9", "fd00:0:0:2::16", "fd00:0:0:2::99"],
                ),
                member(2, "web", &["10.0.2.17"]),
                member(3, "me", &["10.0.2.18"]),
            ],
        );
        assert_eq!(
            members.names(Some("ME")),
            [(
                "web".to_owned(),
                vec![ip("10.0.2.16"), ip("fd00:0:0:2::16")]
            )]
        );
        let groups = members.groups();
        assert_eq!(groups["group-2"], [ip("10.0.2.17")]);
        assert_eq!(groups["default"].len(), 6);
    }
}
