//! `[[nic]]`: a network interface, behind a network card of its own.
//!
//! What is left out follows from the VM's name and the interface's place, so that it is the same at
//! each start and differs between interfaces: the hardware address (a guest that names interfaces or
//! holds leases by it finds its own again) and the networks `10.0.(2+N).0/24` and `fd00:0:0:(2+N)::/64`
//! of the Nth. On a private network they follow from its name, so that all its members have the same:
//! `10.N.0.0/16` with N from 64 to 191, and a prefix of `fd00::/8`; the guest's address follows from the
//! VM's name. Two that fall on the same one are told apart with `ipv4`. What the card's own files say (security groups, metadata) is the card's to check.

use std::collections::{BTreeMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use toml::Spanned;

use super::limits::Amount;
use super::{Checker, SpecError};

mod traffic;

pub use traffic::{FlowLog, Traffic};

/// Bytes of an IP packet that an interface may be asked to carry.
const MTU: std::ops::RangeInclusive<u16> = 1280..=65520;
/// The MTU when nothing is said: jumbo frames, as clouds have them.
const MTU_DEFAULT: u16 = 9001;
/// Queue pairs that a card has at most.
const QUEUE_PAIRS: std::ops::RangeInclusive<u16> = 1..=8;
/// What the guest's address in its IPv6 prefix cannot end in: the anycast address of all routers
/// (RFC 4291, 2.6.1), the card's as router and as name server.
const RESERVED_V6: std::ops::RangeInclusive<u128> = 0..=3;
/// Most interfaces: the networks given out are numbered in one byte, and slots are few.
const NICS_MAX: usize = 16;

/// An IPv4 address and the network it is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Ipv4Net {
    /// The guest's address.
    pub address: Ipv4Addr,
    /// Bits of the network's prefix, 8 to 30.
    pub prefix_len: u8,
}

/// One network interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Nic {
    /// The private network that it is on.
    pub network: Option<String>,
    /// Hardware address, unicast, like `52:54:00:12:34:56`.
    pub mac: String,
    /// The guest's address and network.
    pub ipv4: Ipv4Net,
    /// The card's address as router and DHCP server; the network's second without it.
    pub gateway: Option<Ipv4Addr>,
    /// The card's address as name server; the network's third without it.
    pub dns: Option<Ipv4Addr>,
    /// The network's IPv6 prefix, 64 bits long; `None`: no IPv6.
    pub ipv6_prefix: Option<Ipv6Addr>,
    /// The guest's address in it; the one that autoconfiguration makes of `mac` without it.
    pub ipv6_address: Option<Ipv6Addr>,
    /// Bytes of an IP packet.
    pub mtu: u16,
    /// What the guest is called.
    pub hostname: Option<String>,
    /// Search domain.
    pub domain: Option<String>,
    /// Name servers that the guest's questions go to; the host's own without any.
    pub dns_upstream: Vec<IpAddr>,
    /// Ports of the host that lead into the guest, `[ADDRESS:]HOSTPORT:GUESTPORT[/udp]`.
    pub publish: Vec<String>,
    /// Addresses at which the guest reaches the host's loopback.
    pub map_host_loopback: Vec<IpAddr>,
    /// Queue pairs, each with a thread of the card's.
    pub queue_pairs: u16,
    /// Most flows at once; the card's own limit without it.
    pub flows: Option<u32>,
    /// What it may carry, how flows are followed and written down.
    pub traffic: Traffic,
    /// The card's security groups, as TOML.
    pub security_groups: Option<PathBuf>,
    /// What the metadata service tells, as TOML.
    pub metadata: Option<PathBuf>,
    /// The guest's user-data.
    pub user_data: Option<PathBuf>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct RawNic {
    network: Option<Spanned<String>>,
    mac: Option<Spanned<String>>,
    ipv4: Option<Spanned<String>>,
    gateway: Option<Spanned<String>>,
    dns: Option<Spanned<String>>,
    ipv6_prefix: Option<Spanned<String>>,
    ipv6_address: Option<Spanned<String>>,
    no_ipv6: Option<Spanned<bool>>,
    mtu: Option<Spanned<u16>>,
    hostname: Option<Spanned<String>>,
    domain: Option<Spanned<String>>,
    #[serde(default)]
    dns_upstream: Vec<Spanned<String>>,
    #[serde(default)]
    publish: Vec<Spanned<String>>,
    #[serde(default)]
    map_host_loopback: Vec<Spanned<String>>,
    queue_pairs: Option<Spanned<u16>>,
    flows: Option<Spanned<u32>>,
    rx_bps: Option<Spanned<Amount>>,
    rx_bps_burst: Option<Spanned<Amount>>,
    rx_pps: Option<Spanned<Amount>>,
    rx_pps_burst: Option<Spanned<Amount>>,
    tx_bps: Option<Spanned<Amount>>,
    tx_bps_burst: Option<Spanned<Amount>>,
    tx_pps: Option<Spanned<Amount>>,
    tx_pps_burst: Option<Spanned<Amount>>,
    flow_log: Option<PathBuf>,
    flow_log_interval: Option<Spanned<u32>>,
    flow_log_size: Option<Spanned<Amount>>,
    flow_log_keep: Option<Spanned<u32>>,
    #[serde(default)]
    flow_timeouts: BTreeMap<String, Spanned<u32>>,
    tracked_flows: Option<Spanned<u32>>,
    #[serde(default)]
    neighbors: BTreeMap<String, Vec<Spanned<String>>>,
    security_groups: Option<PathBuf>,
    metadata: Option<PathBuf>,
    user_data: Option<PathBuf>,
}

type Checked<T> = Result<T, Box<SpecError>>;

impl Checker<'_> {
    pub(super) fn nics(&self, raw: &[RawNic], vm: &str) -> Checked<Vec<Nic>> {
        let mut nics: Vec<Nic> = Vec::with_capacity(raw.len().min(NICS_MAX));
        let (mut macs, mut ports) = (HashSet::new(), HashSet::new());
        for (index, raw) in raw.iter().enumerate() {
            let number = u8::try_from(index).unwrap_or(u8::MAX);
            if usize::from(number) >= NICS_MAX {
                let message = format!("a VM has at most {NICS_MAX} network interfaces");
                return Err(self.error(None, message, "", None));
            }
            let nic = self.nic(raw, number, vm)?;
            if !macs.insert(nic.mac.clone()) {
                return Err(self.error(
                    raw.mac.as_ref().map(Spanned::span),
                    format!("two interfaces have the hardware address {}", nic.mac),
                    "already an interface of this VM",
                    Some("leave mac out, and each gets one of its own"),
                ));
            }
            if let Some(networks) = nics.iter().find_map(|other| overlap(other, &nic)) {
                let spans = [&raw.ipv4, &raw.ipv6_prefix];
                let span = spans.into_iter().flatten().next().map(Spanned::span);
                return Err(self.error(
                    span,
                    format!("the networks {networks} of two interfaces overlap"),
                    "here, or where it follows from the place",
                    Some("a guest could not tell where to send; give each a network of its own"),
                ));
            }
            for rule in &raw.publish {
                if !ports.insert(host_side(rule.get_ref())) {
                    return Err(self.error(
                        Some(rule.span()),
                        format!("`{}` publishes a port a second time", rule.get_ref()),
                        "already published",
                        Some("a port of the host leads to one place"),
                    ));
                }
            }
            nics.push(nic);
        }
        Ok(nics)
    }

    fn nic(&self, raw: &RawNic, number: u8, vm: &str) -> Checked<Nic> {
        let mac = match &raw.mac {
            Some(mac) => self.one_of(mac, parse_mac, "a hardware address of one machine", {
                "for example mac = \"52:54:00:12:34:56\""
            })?,
            None => own_mac(vm, number),
        };
        let network = raw.network.as_ref();
        let network = network
            .map(|name| {
                let help = "up to 32 letters, digits and dashes, like network = \"backend\"";
                self.one_of(name, parse_network, "the name of a network", help)
            })
            .transpose()?;
        let net = |text: &Spanned<String>| {
            self.one_of(text, parse_net, "an address and its network's prefix", {
                "for example ipv4 = \"10.0.2.15/24\", with a prefix from 8 to 30"
            })
        };
        let ipv4 = match &raw.ipv4 {
            Some(text) => net(text)?,
            None if let Some(network) = &network => own_address(network, vm, number),
            None => Ipv4Net {
                address: Ipv4Addr::new(10, 0, 2 + number, 15),
                prefix_len: 24,
            },
        };
        let v4 = |text: &Option<Spanned<String>>| {
            let text = text.as_ref();
            text.map(|text| self.in_network(text, ipv4)).transpose()
        };
        let ipv6_prefix = match (&raw.ipv6_prefix, &raw.no_ipv6) {
            (Some(prefix), Some(no)) if *no.get_ref() => {
                return Err(self.error(
                    Some(prefix.span()),
                    "ipv6-prefix and no-ipv6 exclude each other".to_owned(),
                    "this interface has no IPv6",
                    Some("leave one of the two out"),
                ));
            }
            (None, Some(no)) if *no.get_ref() => None,
            (Some(prefix), _) => Some(self.address(prefix, "an IPv6 prefix", "fd00:0:0:2::")?),
            (None, _) if let Some(network) = &network => Some(own_prefix(network)),
            (None, _) => {
                let subnet = 2 + u16::from(number);
                Some(Ipv6Addr::new(0xfd00, 0, 0, subnet, 0, 0, 0, 0))
            }
        };
        let ipv6_address = raw.ipv6_address.as_ref();
        let ipv6_address = ipv6_address
            .map(|text| self.in_prefix(text, ipv6_prefix))
            .transpose()?;
        Ok(Nic {
            network,
            mac,
            ipv4,
            gateway: v4(&raw.gateway)?,
            dns: v4(&raw.dns)?,
            ipv6_prefix,
            ipv6_address,
            mtu: self.ranged(raw.mtu.as_ref(), "mtu", &MTU)?.unwrap_or(MTU_DEFAULT),
            hostname: match &raw.hostname {
                Some(name) => Some(self.host_name(name)?),
                None => parse_name(vm),
            },
            domain: raw.domain.as_ref().map(|d| self.host_name(d)).transpose()?,
            dns_upstream: self.addresses(&raw.dns_upstream)?,
            publish: raw
                .publish
                .iter()
                .map(|rule| {
                    self.one_of(rule, parse_rule, "a port forward", {
                        "write [ADDRESS:]HOSTPORT:GUESTPORT[/udp], like \"8080:80\" or \"[::]:53:53/udp\""
                    })
                })
                .collect::<Checked<_>>()?,
            map_host_loopback: self.addresses(&raw.map_host_loopback)?,
            queue_pairs: self
                .ranged(raw.queue_pairs.as_ref(), "queue-pairs", &QUEUE_PAIRS)?
                .unwrap_or(1),
            flows: self.ranged(raw.flows.as_ref(), "flows", &(1..=1_000_000))?,
            traffic: self.traffic(raw)?,
            security_groups: raw.security_groups.as_deref().map(|p| self.path(p)),
            metadata: raw.metadata.as_deref().map(|p| self.path(p)),
            user_data: raw.user_data.as_deref().map(|p| self.path(p)),
        })
    }

    fn one_of<T>(
        &self,
        text: &Spanned<String>,
        parse: impl Fn(&str) -> Option<T>,
        what: &str,
        help: &str,
    ) -> Checked<T> {
        parse(text.get_ref()).ok_or_else(|| {
            self.error(
                Some(text.span()),
                format!("`{}` is not {what}", text.get_ref()),
                "here",
                Some(help),
            )
        })
    }

    fn address<T: FromStr>(&self, text: &Spanned<String>, what: &str, like: &str) -> Checked<T> {
        let parse = |text: &str| text.parse().ok();
        self.one_of(text, parse, what, &format!("for example \"{like}\""))
    }

    fn addresses(&self, texts: &[Spanned<String>]) -> Checked<Vec<IpAddr>> {
        let one = |text| self.address(text, "an IP address", "10.0.2.2");
        texts.iter().map(one).collect()
    }

    fn in_network(&self, text: &Spanned<String>, net: Ipv4Net) -> Checked<Ipv4Addr> {
        let address: Ipv4Addr = self.address(text, "an IPv4 address", "10.0.2.2")?;
        let shift = 32_u32.saturating_sub(u32::from(net.prefix_len));
        let is_inside = (address.to_bits() ^ net.address.to_bits()) >> shift == 0;
        if !is_inside || address == net.address {
            return Err(self.error(
                Some(text.span()),
                format!("the card cannot have the address {address}"),
                "of the network of ipv4, and not the guest's own",
                Some("the guest reaches the card without a router"),
            ));
        }
        Ok(address)
    }

    /// The guest's address in the interface's prefix, of which cards keep a few to themselves.
    fn in_prefix(&self, text: &Spanned<String>, prefix: Option<Ipv6Addr>) -> Checked<Ipv6Addr> {
        let address: Ipv6Addr = self.address(text, "an IPv6 address", "fd00:0:0:2::15")?;
        let Some(prefix) = prefix else {
            return Err(self.error(
                Some(text.span()),
                "ipv6-address and no-ipv6 exclude each other".to_owned(),
                "this interface has no IPv6",
                Some("leave one of the two out"),
            ));
        };
        let host = address.to_bits() & u128::from(u64::MAX);
        if address.to_bits() >> 64 != prefix.to_bits() >> 64 || RESERVED_V6.contains(&host) {
            return Err(self.error(
                Some(text.span()),
                format!("the guest cannot have the address {address}"),
                &format!(
                    "of {prefix}/64, and behind its first {}",
                    RESERVED_V6.end() + 1
                ),
                Some("set ipv6-prefix to the network that it is to be in"),
            ));
        }
        Ok(address)
    }

    fn host_name(&self, text: &Spanned<String>) -> Checked<String> {
        let help = "labels of letters, digits and dashes, with dots between";
        self.one_of(text, parse_name, "a host's name", help)
    }

    fn ranged<T: Copy + PartialOrd + std::fmt::Display>(
        &self,
        value: Option<&Spanned<T>>,
        name: &str,
        range: &std::ops::RangeInclusive<T>,
    ) -> Checked<Option<T>> {
        let Some(value) = value else { return Ok(None) };
        let n = *value.get_ref();
        if range.contains(&n) {
            return Ok(Some(n));
        }
        Err(self.error(
            Some(value.span()),
            format!("{name} = {n} cannot be had"),
            &format!("from {} to {}", range.start(), range.end()),
            None,
        ))
    }
}

/// The networks that two interfaces would have in common.
fn overlap(one: &Nic, other: &Nic) -> Option<String> {
    let len = one.ipv4.prefix_len.min(other.ipv4.prefix_len);
    let shift = 32_u32.saturating_sub(len.into());
    if (one.ipv4.address.to_bits() ^ other.ipv4.address.to_bits()) >> shift == 0 {
        let text = |net: Ipv4Net| format!("{}/{}", net.address, net.prefix_len);
        return Some(format!("{} and {}", text(one.ipv4), text(other.ipv4)));
    }
    let (one, other) = one.ipv6_prefix.zip(other.ipv6_prefix)?;
    let is_same = one.to_bits() >> 64 == other.to_bits() >> 64;
    is_same.then(|| format!("{one}/64 and {other}/64"))
}

/// FNV-1a.
fn hash(text: &str) -> u32 {
    text.bytes().fold(0x811c_9dc5_u32, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    })
}

/// An address on a private network, from the VM's name and the place. The network's first and last 256
/// are left to cards and to those who write addresses down.
fn own_address(network: &str, vm: &str, number: u8) -> Ipv4Net {
    let [.., second, _] = hash(network).to_be_bytes();
    let [.., high, low] = hash(vm).to_be_bytes();
    Ipv4Net {
        address: Ipv4Addr::new(
            10,
            64 + second % 128,
            1 + high % 254,
            low.wrapping_add(number),
        ),
        prefix_len: 16,
    }
}

/// The unique local prefix (RFC 4193) of a private network.
fn own_prefix(network: &str) -> Ipv6Addr {
    let [a, b, c, d] = hash(network).to_be_bytes().map(u16::from);
    Ipv6Addr::new(0xfd00 | a, b << 8 | c, d << 8, 0, 0, 0, 0, 0)
}

/// An address of the range that QEMU's guests know, from the VM's name and the place.
fn own_mac(vm: &str, number: u8) -> String {
    let [_, a, b, c] = hash(vm).to_be_bytes();
    // The last byte counts, so that interfaces of one VM never share one.
    format!("52:54:00:{a:02x}:{b:02x}:{:02x}", c.wrapping_add(number))
}

fn parse_mac(text: &str) -> Option<String> {
    let byte = |part: &str| {
        let is_byte = part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
        is_byte.then(|| u8::from_str_radix(part, 16).ok())?
    };
    let bytes = text.split(':').map(byte).collect::<Option<Vec<u8>>>()?;
    let is_unicast = bytes.first().is_some_and(|first| first & 1 == 0);
    let is_some = bytes.iter().any(|&byte| byte != 0);
    (bytes.len() == 6 && is_unicast && is_some).then(|| text.to_ascii_lowercase())
}

fn parse_network(text: &str) -> Option<String> {
    let is_name = (1..=32).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        && !text.starts_with('-');
    is_name.then(|| text.to_owned())
}

fn parse_net(text: &str) -> Option<Ipv4Net> {
    let (address, len) = text.split_once('/')?;
    Some(Ipv4Net {
        address: address.parse().ok()?,
        prefix_len: len.parse().ok().filter(|len| (8..=30).contains(len))?,
    })
}

fn parse_name(text: &str) -> Option<String> {
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    (text.len() <= 253 && text.split('.').all(is_label)).then(|| text.to_owned())
}

fn parse_rule(text: &str) -> Option<String> {
    let (rest, transport) = text.rsplit_once('/').unwrap_or((text, "tcp"));
    let (host, guest) = rest.rsplit_once(':')?;
    let is_guest = guest.parse().is_ok_and(|port: u16| port != 0);
    let is_host = host.parse::<u16>().is_ok() || host.parse::<SocketAddr>().is_ok();
    (matches!(transport, "tcp" | "udp") && is_guest && is_host).then(|| text.to_owned())
}

/// Where the host listens for a rule that [`parse_rule`] took; port 0 is another one each time, so
/// the guest's port goes with it.
fn host_side(rule: &str) -> (String, bool) {
    let is_udp = rule.ends_with("/udp");
    let rest = rule.rsplit_once('/').map_or(rule, |(rest, _)| rest);
    let host = rest.rsplit_once(':').map_or(rest, |(host, _)| host);
    let host = match host.parse::<u16>() {
        Ok(0) => rest.to_owned(),
        Ok(port) => SocketAddr::from((Ipv4Addr::LOCALHOST, port)).to_string(),
        Err(_) => host.to_owned(),
    };
    (host, is_udp)
}
