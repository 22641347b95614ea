//! Ping to the card's own addresses (RFC 792, RFC 4443).

use std::net::IpAddr;

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{Icmpv4Packet, Icmpv4Repr, Icmpv6Packet, Icmpv6Repr, IpProtocol};

use super::wire::{self, Packet};
use crate::spec::Spec;

/// The frame that answers an echo request; `None` for anything else, and for wrong checksums.
#[must_use]
pub fn reply(spec: &Spec, packet: &Packet<'_>) -> Option<Vec<u8>> {
    let link = (spec.gateway_mac, spec.mac);
    let checks = ChecksumCapabilities::default();
    let back = (packet.destination, packet.source);
    match (packet.source, packet.destination) {
        (IpAddr::V4(source), IpAddr::V4(_)) if !source.is_unspecified() => {
            let icmp = Icmpv4Packet::new_checked(packet.payload).ok()?;
            let Icmpv4Repr::EchoRequest {
                ident,
                seq_no,
                data,
            } = Icmpv4Repr::parse(&icmp, &checks).ok()?
            else {
                return None;
            };
            let reply = Icmpv4Repr::EchoReply {
                ident,
                seq_no,
                data,
            };
            wire::ip(
                link,
                back,
                IpProtocol::Icmp,
                64,
                reply.buffer_len(),
                |bytes| {
                    reply.emit(&mut Icmpv4Packet::new_unchecked(bytes), &checks);
                },
            )
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) if !source.is_unspecified() => {
            let icmp = Icmpv6Packet::new_checked(packet.payload).ok()?;
            let Icmpv6Repr::EchoRequest {
                ident,
                seq_no,
                data,
            } = Icmpv6Repr::parse(&source, &destination, &icmp, &checks).ok()?
            else {
                return None;
            };
            let reply = Icmpv6Repr::EchoReply {
                ident,
                seq_no,
                data,
            };
            let length = reply.buffer_len();
            wire::ip(link, back, IpProtocol::Icmpv6, 64, length, |bytes| {
                let mut icmp = Icmpv6Packet::new_unchecked(bytes);
                reply.emit(&destination, &source, &mut icmp, &checks);
            })
        }
        _ => None,
    }
}
