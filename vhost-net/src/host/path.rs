//! What a path does to datagrams: how far they may go, and who said on the way that they cannot.
//!
//! The kernel keeps the ICMP errors about a socket in its error queue, when it is asked to
//! (IP_RECVERR), with type, code and the router's address: enough to hand them to the guest as they
//! came, which is all that traceroute needs. It is asked to for echo sockets, and for those of UDP
//! whose guest has chosen a short way; the others' errors are `recv`'s.

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd};

use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt,
    sockopt::{Ipv4RecvErr, Ipv6RecvErr},
};
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, sockopt};

use crate::stack::Report;

/// SO_EE_ORIGIN_ICMP and SO_EE_ORIGIN_ICMP6: others are the kernel's own.
const ORIGIN_ICMP: u8 = 2;
const ORIGIN_ICMP6: u8 = 3;

/// Lets the errors about a socket be kept.
pub(super) fn keep_errors(fd: impl AsFd, is_v4: bool) -> io::Result<()> {
    if is_v4 {
        setsockopt(&fd, Ipv4RecvErr, &true)?;
    } else {
        setsockopt(&fd, Ipv6RecvErr, &true)?;
    }
    Ok(())
}

/// Sets how many routers what is sent may pass.
pub(super) fn set_hops(fd: impl AsFd, is_v4: bool, hops: u8) -> io::Result<()> {
    if is_v4 {
        sockopt::set_ip_ttl(fd, hops.into())?;
    } else {
        sockopt::set_ipv6_unicast_hops(fd, Some(hops))?;
    }
    Ok(())
}

/// Takes one error that was kept.
pub(super) fn take_error(fd: impl AsFd) -> Option<Report> {
    let mut head = [0; 8];
    let mut parts = [IoSliceMut::new(&mut head)];
    let mut space = nix::cmsg_space!(libc::sock_extended_err, libc::sockaddr_in6);
    let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
    let fd = fd.as_fd().as_raw_fd();
    let message = recvmsg::<SockaddrStorage>(fd, &mut parts, Some(&mut space), flags).ok()?;
    let (len, mut report) = (message.bytes, None);
    for part in message.cmsgs().ok()? {
        let (error, from): (_, Option<IpAddr>) = match part {
            ControlMessageOwned::Ipv4RecvErr(error, from) => {
                let address = |from: libc::sockaddr_in| {
                    Ipv4Addr::from(from.sin_addr.s_addr.to_ne_bytes()).into()
                };
                (error, from.map(address))
            }
            ControlMessageOwned::Ipv6RecvErr(error, from) => {
                let address =
                    |from: libc::sockaddr_in6| Ipv6Addr::from(from.sin6_addr.s6_addr).into();
                (error, from.map(address))
            }
            _ => continue,
        };
        if matches!(error.ee_origin, ORIGIN_ICMP | ORIGIN_ICMP6) {
            report = Some(Report {
                from,
                kind: error.ee_type,
                code: error.ee_code,
                rest: error.ee_info,
                sequence: None,
            });
        }
    }
    let mut report = report?;
    // Of an echo request, which comes back from its ICMP header on.
    if len == head.len() && matches!(head[0], 8 | 128) {
        report.sequence = Some(u16::from_be_bytes([head[6], head[7]]));
    }
    Some(report)
}

/// Whether the kernel gives this process echo sockets (`net.ipv4.ping_group_range`, for IPv6 too).
#[must_use]
pub fn may_ping() -> bool {
    let flags = SocketFlags::CLOEXEC;
    let protocol = Some(ipproto::ICMP);
    let made = rustix::net::socket_with(AddressFamily::INET, SocketType::DGRAM, flags, protocol);
    !matches!(
        made,
        Err(rustix::io::Errno::ACCESS | rustix::io::Errno::PERM)
    )
}
