//! What services and policy look like from the data path.
//!
//! The data path hands each frame of the guest's to the services first. A service that answers
//! puts what it wants into an [`Outbox`]; nothing is sent from within. A query to a server of the
//! host's (DNS) leaves as an [`Outgoing`] and comes back by its token.
//!
//! TCP to an address of the card's (metadata, DNS over TCP) is terminated by the stack like any
//! other flow, but talks to a [`TcpService`] instead of a socket of the host's.

use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use crate::frame::{Frame, Packet, Transport};

/// What became of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It was for a service: answered, or dropped for a reason that the service has counted.
    Handled,
    /// Not for any service: it goes on to policy and stack.
    Pass,
}

/// A datagram for a server in the host's network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outgoing {
    /// Comes back with the answer. Chosen by the service.
    pub token: u64,
    /// The server.
    pub to: SocketAddr,
    /// What to send.
    pub payload: Vec<u8>,
    /// Over TCP, behind its length (RFC 7766); the answer is handed in without.
    pub is_stream: bool,
}

/// What services want to happen.
#[derive(Debug, Default)]
pub struct Outbox {
    /// Complete Ethernet frames to the guest, checksums filled in.
    pub frames: Vec<Vec<u8>>,
    /// Datagrams to servers. The answer, if one comes, is handed in with the token; there is
    /// no word of timeouts, the service has deadlines of its own.
    pub outgoing: Vec<Outgoing>,
    /// Tokens of earlier [`Self::outgoing`] whose answers are no longer waited for.
    pub over: Vec<u64>,
    /// Connections to services of the card's that have something to say.
    pub woken: Vec<FlowKey>,
}

/// A byte-stream service of the card's own. One object a connection.
pub trait TcpService {
    /// The guest sent these bytes. Nothing after [`Self::is_done`].
    fn receive(&mut self, data: &[u8], now: Instant);

    /// The guest will send no more.
    fn end(&mut self, now: Instant);

    /// Bytes for the guest; the data path takes them away from the front as they fit.
    fn output(&mut self) -> &mut std::collections::VecDeque<u8>;

    /// Whether the connection is to be closed once [`Self::output`] is empty.
    fn is_done(&self) -> bool;

    /// When the connection is to be cut if nothing has happened until then.
    fn deadline(&self) -> Option<Instant>;

    /// TTL or hop limit of what is sent from now on.
    fn hop_limit(&self) -> u8 {
        64
    }
}

/// Which way a packet goes, seen from the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// From the guest.
    Out,
    /// To the guest.
    In,
}

/// A flow, by what identifies it. For ICMP echo both ports are the identifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// IP protocol number: 6, 17, 1, 58.
    pub protocol: u8,
    /// The guest's side.
    pub guest: SocketAddr,
    /// The other side.
    pub peer: SocketAddr,
}

impl FlowKey {
    /// The key of a packet that goes `direction`.
    #[must_use]
    pub fn new(
        direction: Direction,
        protocol: u8,
        source: (IpAddr, u16),
        destination: (IpAddr, u16),
    ) -> Self {
        let (source, destination) = (SocketAddr::from(source), SocketAddr::from(destination));
        let (guest, peer) = match direction {
            Direction::Out => (source, destination),
            Direction::In => (destination, source),
        };
        Self {
            protocol,
            guest,
            peer,
        }
    }
}

/// What policy has to know about a packet, or about a super-segment that stands for several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Meta {
    /// The flow.
    pub key: FlowKey,
    /// Bytes of IP packets, as they would be on a wire.
    pub bytes: u32,
    /// Packets as they would be on a wire.
    pub packets: u32,
    /// The TCP flags (FIN 1, SYN 2, RST 4, ACK 16); 0 for others.
    pub tcp_flags: u8,
    /// ICMP type and code; 0 for others.
    pub icmp: (u8, u8),
}

impl Meta {
    /// Of the `packet` in `frame`, which goes that way from and to these ports.
    #[must_use]
    pub fn of(direction: Direction, frame: &Frame<'_>, packet: &Packet, ports: (u16, u16)) -> Self {
        let (tcp_flags, icmp) = match packet.transport {
            Transport::Tcp { flags, .. } => (flags, (0, 0)),
            Transport::Icmp { kind, code, .. } => (0, (kind, code)),
            Transport::Udp { .. } | Transport::Fragment | Transport::Other => (0, (0, 0)),
        };
        Self {
            key: FlowKey::new(
                direction,
                packet.protocol,
                (packet.source, ports.0),
                (packet.destination, ports.1),
            ),
            bytes: u32::try_from(packet.end - packet.start).unwrap_or(u32::MAX),
            packets: frame.packet_count(),
            tcp_flags,
            icmp,
        }
    }
}

/// What policy says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Goes on.
    Allow,
    /// Dropped without an answer, as security groups do.
    Deny,
}
