//! Security groups: the form in which people write them, and the checks on it.
//!
//! A group is a set of addresses, its members, and two lists of rules; an interface is in one or
//! more groups, and what any rule of any of them allows is allowed. There are no rules that deny.
//! As in a VPC a rule names its peers by network or by group: a group stands for its members.
//!
//! ```toml
//! interface = ["web"]
//!
//! [[group]]
//! id = "web"
//! [[group.ingress]]
//! protocol = "tcp"
//! ports = "80"
//! peers = ["0.0.0.0/0", "::/0"]
//! [[group.ingress]]
//! protocol = "all"
//! peers = ["web"]
//! [[group.egress]]
//! protocol = "all"
//! peers = ["0.0.0.0/0", "::/0"]
//!
//! [[group]]
//! id = "db"
//! members = ["10.0.2.20"]
//! ```
//!
//! The same shape as JSON goes over the control socket. A group without rules lets nothing pass,
//! and a card that is told of no groups has [`GroupsSpec::default`]: everything out, and in what
//! comes from a member of the same group, as a VPC's default group.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// Most groups that an interface can be in, AWS's highest.
pub const INTERFACE_GROUPS_MAX: usize = 16;
/// Most groups in one specification.
pub const GROUPS_MAX: usize = 256;
/// Most rules of an interface each way, counted over its groups; AWS's highest.
pub const RULES_MAX: usize = 1000;
/// Most members of a group, and most peers of a rule.
pub const PEERS_MAX: usize = 1000;

/// Every security group that an interface has to know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct GroupsSpec {
    /// The groups that the interface is in.
    pub interface: Vec<String>,
    /// The groups, with their rules and members.
    #[serde(rename = "group")]
    pub groups: Vec<GroupSpec>,
}

/// A security group.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct GroupSpec {
    /// How rules and interfaces name it; letters, digits, `-`, `_`, `.`.
    pub id: String,
    /// For people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// The addresses of the interfaces in it, besides this one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub members: Vec<IpAddr>,
    /// What may come in.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ingress: Vec<RuleSpec>,
    /// What may go out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub egress: Vec<RuleSpec>,
}

/// A rule, which allows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct RuleSpec {
    /// `tcp`, `udp`, `icmp`, `icmpv6`, `all`, or a number.
    pub protocol: String,
    /// `80` or `8000-8100`; without it all of them. For `tcp` and `udp` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ports: Option<String>,
    /// ICMP type; without it all of them. For `icmp` and `icmpv6` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub icmp_type: Option<u8>,
    /// ICMP code; without it all of them. With `icmp-type` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub icmp_code: Option<u8>,
    /// Networks, addresses and groups at the other end.
    pub peers: Vec<String>,
    /// For people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
}

/// What is wrong with a specification. Each text names the place and what to write instead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the texts say it")]
pub enum GroupsError {
    #[error("group id {0:?} is not a name: use 1 to 64 letters, digits, '-', '_' or '.'")]
    BadId(String),
    #[error("group id {0:?} could be taken for an address: begin it with a letter that is none")]
    AmbiguousId(String),
    #[error("group {0:?} is there twice: give each an id of its own, or join their rules")]
    DuplicateGroup(String),
    #[error("the interface is in group {0:?}, which is not defined: add a [[group]] with this id")]
    UnknownInterfaceGroup(String),
    #[error("the interface is in no group: name one in `interface`, or leave all groups out")]
    NoGroup,
    #[error("{what}: {found}, and the limit is {limit}: use fewer or larger networks")]
    TooMany {
        what: &'static str,
        found: usize,
        limit: usize,
    },
    #[error("{place}: protocol {protocol:?}: use tcp, udp, icmp, icmpv6, all or a number to 255")]
    BadProtocol { place: Place, protocol: String },
    #[error("{place}: ports {ports:?}: use a number or `first-last`, 0 to 65535")]
    BadPorts { place: Place, ports: String },
    #[error("{place}: `ports` is for tcp and udp, and the protocol is {protocol:?}: leave it out")]
    PortsWithoutPorts { place: Place, protocol: String },
    #[error("{place}: `icmp-type` is for icmp and icmpv6, not {protocol:?}: leave it out")]
    TypeWithoutIcmp { place: Place, protocol: String },
    #[error("{place}: `icmp-code` needs `icmp-type`")]
    CodeWithoutType { place: Place },
    #[error("{place}: no peers: name networks or groups; 0.0.0.0/0 and ::/0 are everybody")]
    NoPeers { place: Place },
    #[error("{place}: {network} has bits set behind its prefix: write {instead}")]
    HostBits {
        place: Place,
        network: IpNet,
        instead: IpNet,
    },
    #[error("{place}: peer {peer:?} is neither a network, an address, nor a group that is defined")]
    UnknownPeer { place: Place, peer: String },
}

/// Where a rule stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The group.
    pub group: String,
    /// Which list: `ingress` or `egress`.
    pub list: &'static str,
    /// Which of the list, from 0.
    pub index: usize,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "group {:?}, {} rule {}",
            self.group, self.list, self.index
        )
    }
}

/// A rule that has been checked, with its groups resolved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// The group that it is of.
    pub group: String,
    /// As it was written; what tells rules apart when they change.
    pub spec: RuleSpec,
    /// What it allows.
    pub matches: Match,
    /// At the other end.
    pub peers: Vec<IpNet>,
}

/// The part of a rule that is not about addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Match {
    /// Everything.
    All,
    /// A protocol whatever its ports.
    Protocol(u8),
    /// TCP or UDP to a port of the receiver's, both ends included.
    Ports {
        /// 6 or 17.
        protocol: u8,
        /// First port.
        first: u16,
        /// Last port.
        last: u16,
    },
    /// ICMP or ICMPv6 of a type, and of a code if one is named.
    Icmp {
        /// 1 or 58.
        protocol: u8,
        /// Type.
        kind: u8,
        /// Code.
        code: Option<u8>,
    },
}

/// The rules of an interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// What may come in.
    pub ingress: Vec<Rule>,
    /// What may go out.
    pub egress: Vec<Rule>,
}

impl Default for GroupsSpec {
    fn default() -> Self {
        let all = |peers: &[&str]| RuleSpec {
            protocol: "all".into(),
            ports: None,
            icmp_type: None,
            icmp_code: None,
            peers: peers.iter().map(|peer| (*peer).into()).collect(),
            description: None,
        };
        Self {
            interface: vec!["default".into()],
            groups: vec![GroupSpec {
                id: "default".into(),
                ingress: vec![all(&["default"])],
                egress: vec![all(&["0.0.0.0/0", "::/0"])],
                ..GroupSpec::default()
            }],
        }
    }
}

impl GroupsSpec {
    /// Checks everything and resolves the groups that rules name.
    ///
    /// # Errors
    ///
    /// The first thing that is wrong.
    pub fn compile(&self) -> Result<Rules, GroupsError> {
        self.compile_with(&BTreeMap::new())
    }

    /// As [`Self::compile`], with `more` addresses in groups than are written down. Those do not count
    /// towards the limits: who gives them has limits of its own.
    ///
    /// # Errors
    ///
    /// The first thing that is wrong.
    pub fn compile_with(&self, more: &BTreeMap<String, Vec<IpAddr>>) -> Result<Rules, GroupsError> {
        at_most("groups", self.groups.len(), GROUPS_MAX)?;
        at_most(
            "groups of the interface",
            self.interface.len(),
            INTERFACE_GROUPS_MAX,
        )?;
        if self.interface.is_empty() {
            return Err(GroupsError::NoGroup);
        }
        let mut groups = BTreeMap::new();
        for group in &self.groups {
            check_id(&group.id)?;
            at_most("members of a group", group.members.len(), PEERS_MAX)?;
            if groups.insert(group.id.as_str(), group).is_some() {
                return Err(GroupsError::DuplicateGroup(group.id.clone()));
            }
        }
        let mut rules = Rules::default();
        let mut seen = Vec::new();
        for id in &self.interface {
            if !groups.contains_key(id.as_str()) {
                return Err(GroupsError::UnknownInterfaceGroup(id.clone()));
            }
        }
        for group in &self.groups {
            let is_mine = self.interface.contains(&group.id) && !seen.contains(&&group.id);
            for (list, specs) in [("ingress", &group.ingress), ("egress", &group.egress)] {
                at_most("rules of a group", specs.len(), RULES_MAX)?;
                for (index, spec) in specs.iter().enumerate() {
                    let place = Place {
                        group: group.id.clone(),
                        list,
                        index,
                    };
                    // Rules of groups that the interface is not in are checked all the same: the
                    // text is right or wrong whoever reads it.
                    let rule = spec.compile(&groups, more, place)?;
                    match list {
                        _ if !is_mine => {}
                        "ingress" => rules.ingress.push(rule),
                        _ => rules.egress.push(rule),
                    }
                }
            }
            seen.push(&group.id);
        }
        at_most(
            "ingress rules of the interface",
            rules.ingress.len(),
            RULES_MAX,
        )?;
        at_most(
            "egress rules of the interface",
            rules.egress.len(),
            RULES_MAX,
        )?;
        Ok(rules)
    }
}

impl RuleSpec {
    fn compile(
        &self,
        groups: &BTreeMap<&str, &GroupSpec>,
        more: &BTreeMap<String, Vec<IpAddr>>,
        place: Place,
    ) -> Result<Rule, GroupsError> {
        let matches = self.matches(&place)?;
        if self.peers.is_empty() {
            return Err(GroupsError::NoPeers { place });
        }
        let mut peers = Vec::new();
        for peer in &self.peers {
            if let Ok(network) = peer.parse::<IpNet>() {
                if network.trunc() != network {
                    let instead = network.trunc();
                    return Err(GroupsError::HostBits {
                        place,
                        network,
                        instead,
                    });
                }
                peers.push(network);
            } else if let Ok(address) = peer.parse::<IpAddr>() {
                peers.push(address.into());
            } else if let Some(group) = groups.get(peer.as_str()) {
                peers.extend(group.members.iter().map(|member| IpNet::from(*member)));
            } else {
                let peer = peer.clone();
                return Err(GroupsError::UnknownPeer { place, peer });
            }
        }
        at_most("peers of a rule", peers.len(), PEERS_MAX)?;
        let named = |group: &&str| self.peers.iter().any(|peer| peer == *group);
        for (_, members) in more.iter().filter(|(group, _)| named(&group.as_str())) {
            peers.extend(members.iter().map(|member| IpNet::from(*member)));
        }
        Ok(Rule {
            group: place.group,
            spec: self.clone(),
            matches,
            peers,
        })
    }

    fn matches(&self, place: &Place) -> Result<Match, GroupsError> {
        let protocol = match self.protocol.as_str() {
            "all" | "-1" => None,
            "tcp" => Some(6),
            "udp" => Some(17),
            "icmp" => Some(1),
            "icmpv6" => Some(58),
            other => {
                let bad = |_| GroupsError::BadProtocol {
                    place: place.clone(),
                    protocol: other.into(),
                };
                Some(other.parse::<u8>().map_err(bad)?)
            }
        };
        let has_ports = matches!(protocol, Some(6 | 17));
        let is_icmp = matches!(protocol, Some(1 | 58));
        if self.ports.is_some() && !has_ports {
            return Err(GroupsError::PortsWithoutPorts {
                place: place.clone(),
                protocol: self.protocol.clone(),
            });
        }
        if self.icmp_type.is_some() && !is_icmp {
            return Err(GroupsError::TypeWithoutIcmp {
                place: place.clone(),
                protocol: self.protocol.clone(),
            });
        }
        if self.icmp_code.is_some() && self.icmp_type.is_none() {
            return Err(GroupsError::CodeWithoutType {
                place: place.clone(),
            });
        }
        Ok(match (protocol, &self.ports, self.icmp_type) {
            (None, ..) => Match::All,
            (Some(protocol), Some(ports), _) => {
                let (first, last) = parse_ports(ports).ok_or_else(|| GroupsError::BadPorts {
                    place: place.clone(),
                    ports: ports.clone(),
                })?;
                Match::Ports {
                    protocol,
                    first,
                    last,
                }
            }
            (Some(protocol), None, Some(kind)) => Match::Icmp {
                protocol,
                kind,
                code: self.icmp_code,
            },
            (Some(protocol), None, None) => Match::Protocol(protocol),
        })
    }
}

impl Rule {
    /// Whether it allows a packet: protocol, port of the receiver's, ICMP type and code, peer.
    #[must_use]
    pub fn allows(&self, protocol: u8, port: u16, icmp: (u8, u8), peer: IpAddr) -> bool {
        let fits = match self.matches {
            Match::All => true,
            Match::Protocol(wanted) => wanted == protocol,
            Match::Ports {
                protocol: wanted,
                first,
                last,
            } => wanted == protocol && (first..=last).contains(&port),
            Match::Icmp {
                protocol: wanted,
                kind,
                code,
            } => wanted == protocol && kind == icmp.0 && code.is_none_or(|wanted| wanted == icmp.1),
        };
        fits && self.peers.iter().any(|network| network.contains(&peer))
    }
}

fn parse_ports(text: &str) -> Option<(u16, u16)> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let range = (first.trim().parse().ok()?, last.trim().parse().ok()?);
    (range.0 <= range.1).then_some(range)
}

fn check_id(id: &str) -> Result<(), GroupsError> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if id.is_empty() || id.len() > 64 || !id.chars().all(is_name) {
        return Err(GroupsError::BadId(id.into()));
    }
    if id.parse::<IpAddr>().is_ok() {
        return Err(GroupsError::AmbiguousId(id.into()));
    }
    Ok(())
}

fn at_most(what: &'static str, found: usize, limit: usize) -> Result<(), GroupsError> {
    if found > limit {
        return Err(GroupsError::TooMany { what, found, limit });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
