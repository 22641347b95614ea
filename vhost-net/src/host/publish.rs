//! Ports of the host that lead into the guest: `[addr:]hostport:guestport[/udp]`.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::str::FromStr;

use rustix::net::{
    AddressFamily, RecvFlags, SocketAddrAny, SocketFlags, SocketType, ipproto, sockopt,
};

/// Ports that may be published at once.
pub const PUBLISHED_MAX: usize = 256;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// What a published port carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// Streams.
    Tcp,
    /// Datagrams.
    Udp,
}

/// A rule as the user writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Where the host listens. 127.0.0.1 if not said: whoever wants more says so.
    pub host: SocketAddr,
    /// The guest's port.
    pub guest_port: u16,
    /// What it carries.
    pub transport: Transport,
}

/// Why a rule cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no port forward; write [ADDRESS:]HOSTPORT:GUESTPORT[/udp], like 8080:80 or [::]:53:53/udp"
)]
pub struct RuleError(String);

impl FromStr for Rule {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let parse = || {
            let (rest, transport) = match text.rsplit_once('/') {
                None => (text, Transport::Tcp),
                Some((rest, "tcp")) => (rest, Transport::Tcp),
                Some((rest, "udp")) => (rest, Transport::Udp),
                Some(_) => return None,
            };
            let (rest, guest_port) = rest.rsplit_once(':')?;
            let guest_port = guest_port.parse().ok().filter(|port| *port != 0)?;
            let host = match rest.rsplit_once(':') {
                None => (IpAddr::from(Ipv4Addr::LOCALHOST), rest.parse().ok()?).into(),
                Some(_) => rest.parse().ok()?,
            };
            Some(Self {
                host,
                guest_port,
                transport,
            })
        };
        parse().ok_or_else(|| RuleError(text.to_owned()))
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let suffix = match self.transport {
            Transport::Tcp => "",
            Transport::Udp => "/udp",
        };
        write!(f, "{}:{}{suffix}", self.host, self.guest_port)
    }
}

/// Why a port is not published, or still is.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// Somebody else has it.
    #[error("{} is taken on the host; choose another port, or 0 for any", .0.host)]
    Taken(Rule),
    /// This one has it.
    #[error("{} leads into the guest already; remove that first", .0.host)]
    Twice(Rule),
    /// A low one.
    #[error(
        "port {} needs root (or a lower net.ipv4.ip_unprivileged_port_start), which a card that \
         serves has given up; choose a higher port, or publish it when the card starts as root",
        .0.host.port()
    )]
    Privileged(Rule),
    /// Not an address of the host's.
    #[error("the host has no address {}", .0.host.ip())]
    NotHere(Rule),
    /// There are enough.
    #[error("{PUBLISHED_MAX} ports are published already; remove one first")]
    TooMany,
    /// There is none to remove.
    #[error("{0} is not published")]
    Missing(Rule),
    /// The kernel says something else.
    #[error("cannot listen on {}", .0.host)]
    Listen(Rule, #[source] io::Error),
}

impl PublishError {
    fn new(rule: Rule, error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::AddrInUse => Self::Taken(rule),
            io::ErrorKind::PermissionDenied if (1..1024).contains(&rule.host.port()) => {
                Self::Privileged(rule)
            }
            io::ErrorKind::AddrNotAvailable => Self::NotHere(rule),
            _ => Self::Listen(rule, error),
        }
    }
}

/// A rule in force.
#[derive(Debug)]
pub struct Published {
    rule: Rule,
    fd: OwnedFd,
}

impl fmt::Display for Published {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.rule.fmt(f)
    }
}

impl Published {
    /// Listens. A host port of 0 lets the kernel choose; [`Self::rule`] has the choice.
    ///
    /// # Errors
    /// See [`PublishError`].
    pub fn open(rule: Rule) -> Result<Self, PublishError> {
        Self::listen(rule).map_err(|error| PublishError::new(rule, error))
    }

    fn listen(rule: Rule) -> io::Result<Self> {
        let family = match rule.host {
            SocketAddr::V4(_) => AddressFamily::INET,
            SocketAddr::V6(_) => AddressFamily::INET6,
        };
        let (socket_type, protocol) = match rule.transport {
            Transport::Tcp => (SocketType::STREAM, ipproto::TCP),
            Transport::Udp => (SocketType::DGRAM, ipproto::UDP),
        };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let fd = rustix::net::socket_with(family, socket_type, flags, Some(protocol))?;
        if rule.host.is_ipv6() {
            sockopt::set_ipv6_v6only(&fd, true)?;
        }
        if rule.transport == Transport::Tcp {
            sockopt::set_socket_reuseaddr(&fd, true)?;
        }
        rustix::net::bind(&fd, &rule.host)?;
        if rule.transport == Transport::Tcp {
            rustix::net::listen(&fd, BACKLOG)?;
        }
        let host = rustix::net::getsockname(&fd)?;
        let host = SocketAddr::try_from(host).unwrap_or(rule.host);
        Ok(Self {
            rule: Rule { host, ..rule },
            fd,
        })
    }

    /// The rule.
    #[must_use]
    pub fn rule(&self) -> Rule {
        self.rule
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Accepts a connection, if one waits.
    ///
    /// # Errors
    /// `WouldBlock`: none waits. Others are the kernel's.
    pub fn accept(&self) -> io::Result<(OwnedFd, SocketAddr)> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (fd, peer) = rustix::net::acceptfrom_with(&self.fd, flags)?;
        Ok((fd, address(peer)?))
    }

    /// Receives a datagram, if one waits.
    ///
    /// # Errors
    /// `WouldBlock`: none waits. Others are the kernel's.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        let (len, _, peer) = rustix::net::recvfrom(&self.fd, buffer, RecvFlags::empty())?;
        Ok((len, address(peer)?))
    }
}

fn address(peer: Option<SocketAddrAny>) -> io::Result<SocketAddr> {
    let peer = peer.and_then(|peer| SocketAddr::try_from(peer).ok());
    peer.ok_or(io::ErrorKind::AddrNotAvailable.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_read_as_they_are_written() {
        for (text, shown) in [
            ("8080:80", "127.0.0.1:8080:80"),
            ("0.0.0.0:53:5353/udp", "0.0.0.0:53:5353/udp"),
            ("[::1]:22:2222/tcp", "[::1]:22:2222"),
            ("0:80", "127.0.0.1:0:80"),
        ] {
            assert_eq!(text.parse::<Rule>().unwrap().to_string(), shown);
        }
        for wrong in [
            "",
            "80",
            "80:",
            ":80",
            "80:0",
            "80:99999",
            "80:80/sctp",
            "::1:80:80",
            "a:1:2",
        ] {
            let error = wrong.parse::<Rule>().unwrap_err().to_string();
            assert!(error.contains("GUESTPORT"), "{wrong}: {error}");
        }
    }

    #[test]
    fn a_port_that_is_taken_is_an_error() {
        let first = Published::open("0:80".parse().unwrap()).unwrap();
        assert_ne!(first.rule().host.port(), 0);
        let error = Published::open(first.rule()).unwrap_err();
        assert!(matches!(error, PublishError::Taken(_)), "{error}");
        let error = Published::open("192.0.2.1:0:80".parse().unwrap()).unwrap_err();
        assert!(matches!(error, PublishError::NotHere(_)), "{error}");
    }
}
