//! The command line.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use offload::cli::{SocketArgs, parse_size, parse_user};
use offload::sandbox::{Seccomp, User};
use offload::telemetry::LogArgs;
use smoltcp::wire::EthernetAddress;

use crate::device::PAIRS_MAX;
use crate::host::publish::Rule;
use crate::spec::{Ipv4, Ipv6, MTU_MAX, MTU_MIN, Spec};

mod limits;
mod operate;
mod policy;

pub use limits::LimitArgs;
pub use operate::{CaptureArgs, ControlArgs, GroupsArgs, LimitsArgs, PublishArgs, StatusArgs};
pub use policy::PolicyArgs;

/// Bytes of a flow log's file.
const LOG_MIN: u64 = 64 << 10;
const LOG_MAX: u64 = 1 << 30;

/// A virtual machine's network, served over vhost-user without any privilege.
#[derive(Debug, Parser)]
#[command(name = "vhost-net", version, max_term_width = 100)]
pub struct Cli {
    /// How much to say.
    #[command(flatten)]
    pub log: LogArgs,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve a network interface to a virtual machine
    Serve(Box<ServeArgs>),
    /// Say what the interface of a running card is
    Status(StatusArgs),
    /// Write the frames that pass a running card to a file, as pcapng for tshark or tcpdump -r
    Capture(CaptureArgs),
    /// Tell which ports of the host lead into the guest, or lead more or fewer
    Publish(PublishArgs),
    /// Tell what a running interface may carry, or change it
    Limits(Box<LimitsArgs>),
    /// Tell the security groups of a running card with their rules' counts, or replace them
    Groups(GroupsArgs),
}

/// `serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Where frontends come from.
    #[command(flatten)]
    pub socket: SocketArgs,
    /// The interface.
    #[command(flatten)]
    pub interface: InterfaceArgs,
    /// Queue pairs, each with a thread of its own; QEMU's `queues=` and `mq=on` have to ask for
    /// them
    #[arg(long, value_name = "N", default_value_t = 1,
        value_parser = clap::value_parser!(u16).range(1..=i64::from(PAIRS_MAX)))]
    pub queue_pairs: u16,
    /// Most flows at once; a full table refuses new ones
    #[arg(long, value_name = "N", default_value_t = 8192,
        value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub flows: u32,
    /// Lead a port of the host into the guest: `[ADDRESS:]HOSTPORT:GUESTPORT[/udp]`; without an
    /// address on the host's loopback. May be given more than once
    #[arg(long, value_name = "RULE")]
    pub publish: Vec<Rule>,
    /// Let the guest reach the host's loopback at this address, like 10.0.2.2. May be given more
    /// than once; off if left out
    #[arg(long, value_name = "ADDRESS")]
    pub map_host_loopback: Vec<IpAddr>,
    /// Security groups, as TOML; if left out the guest reaches everything, and it is reached by
    /// replies and through published ports
    #[arg(long, value_name = "FILE")]
    pub security_groups: Option<PathBuf>,
    /// What the metadata service tells the guest about itself, as TOML
    #[arg(long, value_name = "FILE")]
    pub metadata: Option<PathBuf>,
    /// The guest's user-data, on the metadata service
    #[arg(long, value_name = "FILE")]
    pub user_data: Option<PathBuf>,
    /// What it may carry.
    #[command(flatten)]
    pub limits: LimitArgs,
    /// What policy is told.
    #[command(flatten)]
    pub policy: PolicyArgs,
    /// Write a flow log (version 2) to this file, which rotates to FILE.1, FILE.2 and so on
    #[arg(long, value_name = "FILE")]
    pub flow_log: Option<PathBuf>,
    /// Seconds of one line of the flow log: 60 or 600
    #[arg(long, value_name = "SECONDS", default_value = "60", requires = "flow_log",
        value_parser = interval)]
    pub flow_log_interval: u32,
    /// How long the flow log's file may get before it rotates
    #[arg(long, value_name = "SIZE", default_value = "16M", requires = "flow_log",
        value_parser = log_size)]
    pub flow_log_size: u64,
    /// How many older files of the flow log are kept
    #[arg(long, value_name = "N", default_value_t = 4, requires = "flow_log",
        value_parser = clap::value_parser!(u32).range(0..=64))]
    pub flow_log_keep: u32,
    /// Answer questions about the running card on this socket (JSON lines)
    #[arg(long, value_name = "PATH")]
    pub control_socket: Option<PathBuf>,
    /// Become this user (UID or UID:GID, numbers) once all sockets are open. It removes them in the
    /// end if their folder is its own; else the next card there replaces them
    #[arg(long, value_name = "USER", value_parser = parse_user)]
    pub user: Option<User>,
    /// What happens at a system call that the card is not known to need
    #[arg(long, value_enum, value_name = "MODE", default_value = "enforce")]
    pub seccomp: Seccomp,
}

/// What the interface is.
#[derive(Clone, Debug, Args)]
pub struct InterfaceArgs {
    /// The guest's hardware address, as the frontend has it
    #[arg(long, value_name = "MAC", default_value = "52:54:00:12:34:56", value_parser = mac)]
    pub mac: EthernetAddress,
    /// The guest's IPv4 address and its network's prefix
    #[arg(long, value_name = "ADDRESS/LEN", default_value = "10.0.2.15/24", value_parser = network)]
    pub ipv4: (Ipv4Addr, u8),
    /// The card's IPv4 address, as router and DHCP server; the network's second if left out
    #[arg(long, value_name = "ADDRESS")]
    pub gateway: Option<Ipv4Addr>,
    /// The card's IPv4 address as name server; the network's third if left out
    #[arg(long, value_name = "ADDRESS")]
    pub dns: Option<Ipv4Addr>,
    /// The network's IPv6 prefix, 64 bits long
    #[arg(long, value_name = "PREFIX", default_value = "fd00:0:0:2::")]
    pub ipv6_prefix: Ipv6Addr,
    /// The guest's IPv6 address, of that prefix; if left out the one that a guest without DHCPv6 makes
    /// of it and its hardware address (RFC 4291, appendix A)
    #[arg(long, value_name = "ADDRESS", conflicts_with = "no_ipv6")]
    pub ipv6_address: Option<Ipv6Addr>,
    /// No IPv6
    #[arg(long)]
    pub no_ipv6: bool,
    /// Bytes of an IP packet on the wire between guest and card
    #[arg(long, value_name = "BYTES", default_value_t = 9001,
        value_parser = clap::value_parser!(u16).range(i64::from(MTU_MIN)..=i64::from(MTU_MAX)))]
    pub mtu: u16,
    /// What the guest is called, in DHCP
    #[arg(long, value_name = "NAME", value_parser = name)]
    pub hostname: Option<String>,
    /// Search domain, in DHCP
    #[arg(long, value_name = "DOMAIN", value_parser = name)]
    pub domain: Option<String>,
    /// Directory of a private network, which is made if it is missing: guests whose cards are given the
    /// same one reach each other, by address and by name. Each needs its own --mac and --ipv4, all of
    /// one network; --hostname is its name there
    #[arg(long, value_name = "DIRECTORY")]
    pub network: Option<PathBuf>,
    /// Name server that the guest's questions go to, `ADDRESS` or `ADDRESS:PORT`; those of
    /// /etc/resolv.conf, also when it changes, if left out
    #[arg(long, value_name = "ADDRESS", value_parser = name_server)]
    pub dns_upstream: Vec<SocketAddr>,
}

impl InterfaceArgs {
    /// The interface; `resolvers` are asked if no others are named.
    #[must_use]
    pub fn spec(&self, resolvers: Vec<SocketAddr>) -> Spec {
        let (address, prefix_len) = self.ipv4;
        let shift = 32_u32.saturating_sub(u32::from(prefix_len));
        let mask = u32::MAX.checked_shl(shift).unwrap_or(0);
        let nth = |n: u32| Ipv4Addr::from_bits((address.to_bits() & mask) + n);
        let prefix = self.ipv6_prefix.to_bits() & !u128::from(u64::MAX);
        let [.., a, b, c] = self.mac.0;
        Spec {
            mac: self.mac,
            // Of the range that is given out locally, and never the guest's own.
            gateway_mac: EthernetAddress([0x0e, 0x0f, 0xf1, a, b, c]),
            v4: Some(Ipv4 {
                address,
                prefix_len,
                gateway: self.gateway.unwrap_or(nth(2)),
                dns: self.dns.unwrap_or(nth(3)),
            }),
            v6: (!self.no_ipv6).then(|| Ipv6 {
                address: self
                    .ipv6_address
                    .unwrap_or(Ipv6Addr::from_bits(prefix | eui_64(self.mac))),
                prefix: Ipv6Addr::from_bits(prefix),
                gateway: Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2),
                dns: Ipv6Addr::from_bits(prefix | 3),
            }),
            mtu: self.mtu,
            hostname: self.hostname.clone(),
            domain: self.domain.clone(),
            upstream_dns: if self.dns_upstream.is_empty() {
                resolvers
            } else {
                self.dns_upstream.clone()
            },
        }
    }
}

/// The interface identifier of a hardware address: RFC 4291, appendix A.
///
/// DHCPv6 gives out what autoconfiguration would choose, so that names and published ports lead to a
/// guest that has no DHCPv6 client, too.
fn eui_64(mac: EthernetAddress) -> u128 {
    let [a, b, c, d, e, f] = mac.0;
    u64::from_be_bytes([a ^ 2, b, c, 0xff, 0xfe, d, e, f]).into()
}

fn mac(text: &str) -> Result<EthernetAddress, String> {
    let mac: Option<EthernetAddress> = text.parse().ok();
    mac.filter(EthernetAddress::is_unicast).ok_or_else(|| {
        "a hardware address is like 52:54:00:12:34:56, and of one machine".to_owned()
    })
}

pub(crate) fn name_server(text: &str) -> Result<SocketAddr, String> {
    let address: Option<IpAddr> = text.parse().ok();
    let with_port = address.map(|address| (address, crate::services::dns::PORT).into());
    let parsed = with_port.or_else(|| text.parse().ok());
    parsed.ok_or_else(|| {
        "a name server is like 192.0.2.1, 192.0.2.1:5353 or [2001:db8::1]:5353".to_owned()
    })
}

fn network(text: &str) -> Result<(Ipv4Addr, u8), String> {
    let parsed = text.split_once('/').and_then(|(address, len)| {
        let len = len.parse().ok().filter(|len| (8..=30).contains(len))?;
        Some((address.parse().ok()?, len))
    });
    parsed.ok_or_else(|| "an address with its prefix is like 10.0.2.15/24".to_owned())
}

fn name(text: &str) -> Result<String, String> {
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if text.len() <= 253 && text.split('.').all(is_label) {
        Ok(text.to_owned())
    } else {
        Err("a name is made of labels of letters, digits and dashes".to_owned())
    }
}

fn interval(text: &str) -> Result<u32, String> {
    match text {
        "60" => Ok(60),
        "600" => Ok(600),
        _ => Err("a flow log's interval is 60 or 600 seconds".to_owned()),
    }
}

fn log_size(text: &str) -> Result<u64, String> {
    let size = parse_size(text).map_err(|error| error.to_string())?;
    if (LOG_MIN..=LOG_MAX).contains(&size) {
        Ok(size)
    } else {
        Err("a flow log's file takes 64K to 1G".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &str) -> Result<Cli, String> {
        Cli::try_parse_from(std::iter::once("vhost-net").chain(args.split_whitespace()))
            .map_err(|error| error.to_string())
    }

    fn serve(args: &str) -> Box<ServeArgs> {
        match parse(args).unwrap().command {
            Command::Serve(serve) => serve,
            other => panic!("{other:?}"),
        }
    }

    fn spec(args: &str) -> Spec {
        let serve = serve(&format!("serve --fd 3 {args}"));
        serve.interface.spec(Vec::new())
    }

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn without_options_the_network_is_the_one_that_guests_of_qemu_know() {
        let own = spec("");
        let usual = Spec::default();
        assert_eq!((own.v4, own.mac), (usual.v4, usual.mac));
        let (own, usual) = (own.v6.unwrap(), usual.v6.unwrap());
        assert_eq!((own.prefix, own.gateway), (usual.prefix, usual.gateway));
    }

    #[test]
    fn gateway_and_name_server_follow_the_network() {
        let v4 = spec("--ipv4 192.168.7.200/25").v4.unwrap();
        assert_eq!(v4.gateway, Ipv4Addr::new(192, 168, 7, 130));
        assert_eq!(v4.dns, Ipv4Addr::new(192, 168, 7, 131));
        assert!(spec("--no-ipv6").v6.is_none());
    }

    #[test]
    fn the_ipv6_address_is_the_one_that_autoconfiguration_makes_unless_one_is_named() {
        let v6 = |args: &str| spec(args).v6.unwrap().address;
        let address = |text: &str| text.parse::<Ipv6Addr>().unwrap();
        assert_eq!(v6(""), address("fd00:0:0:2:5054:ff:fe12:3456"));
        let named = "--mac 36:56:78:9a:bc:de --ipv6-prefix 2001:db8:1:2::";
        assert_eq!(v6(named), address("2001:db8:1:2:3456:78ff:fe9a:bcde"));
        assert_eq!(v6("--ipv6-address fd00:0:0:2::7"), address("fd00:0:0:2::7"));
    }

    #[test]
    fn limits_are_of_a_direction_and_may_burst() {
        let args = "serve --fd 3 --rx-bps 1M --rx-bps-burst 2M:5 --tx-pps 100";
        let serve = serve(args);
        let spec = serve.limits.spec();
        let burst = offload::limit::Burst {
            rate: 2 << 20,
            seconds: 5,
        };
        assert_eq!(
            (spec.rx.bps, spec.rx.bps_burst),
            (Some(1 << 20), Some(burst))
        );
        assert_eq!(
            (spec.rx.pps, spec.tx.pps, spec.tx.bps),
            (None, Some(100), None)
        );
    }

    #[test]
    fn timeouts_are_those_of_a_vpc_unless_told_otherwise() {
        let policy = serve("serve --fd 3").policy;
        assert_eq!(policy.options(), crate::policy::PolicyOptions::default());
        let args = "serve --fd 3 --flow-timeout tcp-established=3600 --flow-timeout icmp=5 \
                    --tracked-flows 100 --neighbor db=10.0.2.20,fd00::20";
        let policy = serve(args).policy;
        let options = policy.options();
        assert_eq!(options.flows, 100);
        let timeouts = options.timeouts;
        assert_eq!(timeouts.tcp_established, 3600);
        assert_eq!((timeouts.icmp, timeouts.udp_stream), (5, 180));
        let (name, addresses) = &policy.neighbor[0];
        assert_eq!((name.as_str(), addresses.len()), ("db", 2));
    }

    #[test]
    fn wrong_values_are_refused_with_a_hint() {
        for (wrong, hint) in [
            ("--mac 01:00:5e:00:00:01", "52:54"),
            ("--ipv4 10.0.2.15", "/24"),
            ("--ipv4 10.0.2.15/31", "/24"),
            ("--mtu 1000", "1280"),
            ("--hostname a_b", "labels"),
            ("--publish 80", "GUESTPORT"),
            ("--user root", "numbers"),
            ("--flow-log f --flow-log-interval 61", "60 or 600"),
            ("--flow-log f --flow-log-size 1K", "64K to 1G"),
            ("--rx-bps-burst 3M", "--rx-bps"),
            ("--tx-pps 3 --tx-pps-burst x", "N:SECONDS"),
            ("--flow-log-keep 3", "--flow-log"),
            ("--flow-timeout tcp=3", "tcp-established"),
            ("--flow-timeout udp=0", "31536000"),
            ("--neighbor db", "NAME=ADDRESS"),
            ("--neighbor db=10.0.2", "NAME=ADDRESS"),
        ] {
            let error = parse(&format!("serve --fd 3 {wrong}")).unwrap_err();
            assert!(error.contains(hint), "{wrong}: {error}");
        }
        for (wrong, hint) in [
            ("capture --control-socket s", "--write"),
            ("capture --write -", "--control-socket"),
            ("capture --control-socket s -w - --snaplen 63", "64"),
            ("capture --control-socket s -w - --duration 0", "0.5"),
            ("capture --control-socket s -w - --count 0", "count"),
            ("publish --control-socket s 80", "GUESTPORT"),
            ("limits --control-socket s --rx-bps-burst 3M", "--rx-bps"),
        ] {
            let error = parse(wrong).unwrap_err();
            assert!(error.contains(hint), "{wrong}: {error}");
        }
    }
}
