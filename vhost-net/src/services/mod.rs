//! What the card itself is on the guest's link: gateway, DHCP server, resolver, metadata service.
//!
//! ```text
//!             ┌── arp, nd ───────── addresses of the card; router advertisements
//!  frame ─────┼── dhcp4, dhcp6 ──── the lease, which is a function of the specification
//!             ├── echo ──────────── ping to the card
//!             ├── ntp ───────────── the time of day
//!             └── dns ───────────── names; asks upstream through the outbox
//!
//!  TCP ────┬───── imds ──────────── metadata, terminated by the stack
//!          └───── dns::stream ───── names again, for answers that fit no datagram
//! ```
//!
//! [`Services::receive`] looks at a frame of the guest's first; what is for no service goes on to
//! policy and stack. Everything here is free of I/O: frames and a `now` come in, an [`Outbox`]
//! goes out.
//!
//! Each queue's thread has its own `Services`. All are built from one specification and answer
//! alike, so it does not matter which queue a guest's request comes through, and no lock is
//! shared; what they share is the [`Admission`], one number. Only one of them sends router advertisements on its own account.
//!
//! What the guest can cost: one answer a frame, of bounded size, at most
//! [`PACKETS_PER_SECOND`] a second, as a VPC allows towards link-local services; what is above is
//! dropped and counted, TCP to the link-local addresses too. Datagrams to ports of the card's that have no service pass on to the stack,
//! which refuses them, or leads them to the host's loopback where it was told to.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use smoltcp::wire::{EthernetFrame, EthernetProtocol};

use crate::frame::TCP;
use crate::local::{FlowKey, Outbox, TcpService, Verdict};
use crate::spec::{METADATA_V4, METADATA_V6, Spec, TIME_V4, TIME_V6, is_link_service};

pub mod admission;
pub mod arp;
pub mod dhcp4;
pub mod dhcp6;
pub mod dns;
pub mod echo;
pub mod imds;
pub mod nd;
pub mod ntp;
pub mod wire;

use admission::Admission;
pub use admission::PACKETS_PER_SECOND;
use arp::Arp;
use dhcp4::Dhcp4;
use dhcp6::Dhcp6;
use dns::stream::Streams;
use dns::{Client, Dns, DnsOut, DnsStats};
use imds::Imds;
use nd::Nd;
use ntp::Ntp;

/// Counters of all services.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ServiceStats {
    /// ARP.
    pub arp: arp::ArpStats,
    /// Neighbour discovery.
    pub nd: nd::NdStats,
    /// DHCP.
    pub dhcp4: dhcp4::Dhcp4Stats,
    /// DHCPv6.
    pub dhcp6: dhcp6::Dhcp6Stats,
    /// DNS.
    pub dns: DnsStats,
    /// NTP.
    pub ntp: ntp::NtpStats,
    /// Echo requests answered.
    pub echoed: u64,
    /// Above [`PACKETS_PER_SECOND`].
    pub limited: u64,
    /// Frames for a service from another hardware address than the guest's.
    pub spoofed: u64,
    /// Packets for a service with broken headers or checksums.
    pub malformed: u64,
    /// Packets to an address of the card's that no service wants.
    pub unwanted: u64,
}

/// The services of one interface, as one queue's thread has them.
#[derive(Debug)]
pub struct Services {
    spec: Arc<Spec>,
    arp: Arp,
    nd: Nd,
    dhcp4: Dhcp4,
    dhcp6: Dhcp6,
    ntp: Ntp,
    dns: Option<Dns>,
    streams: Streams,
    imds: Option<Arc<Imds>>,
    admission: Arc<Admission>,
    stats: ServiceStats,
}

impl Services {
    /// `advertises` says whether this instance sends router advertisements unasked, from `now` on.
    #[must_use]
    pub fn new(spec: Arc<Spec>, advertises: bool, now: Instant) -> Self {
        Self {
            spec,
            arp: Arp::default(),
            nd: Nd::new(advertises.then_some(now)),
            dhcp4: Dhcp4::default(),
            dhcp6: Dhcp6::default(),
            ntp: Ntp::default(),
            dns: None,
            streams: Streams::default(),
            imds: None,
            admission: Arc::new(Admission::new(now)),
            stats: ServiceStats::default(),
        }
    }

    /// With a resolver; without one, questions are swallowed.
    #[must_use]
    pub fn with_dns(mut self, dns: Dns) -> Self {
        self.dns = Some(dns);
        self
    }

    /// With a metadata service; without one, connections to it are refused.
    #[must_use]
    pub fn with_imds(mut self, imds: Arc<Imds>) -> Self {
        self.imds = Some(imds);
        self
    }

    /// Under one limit with the services of the interface's other queues.
    #[must_use]
    pub fn with_admission(mut self, admission: Arc<Admission>) -> Self {
        self.admission = admission;
        self
    }

    /// Exchanges the names of other machines that come and go.
    pub fn set_peers(&mut self, peers: &[(String, Vec<IpAddr>)]) {
        if let Some(dns) = &mut self.dns {
            dns.set_peers(peers);
        }
    }

    /// Counters.
    #[must_use]
    pub fn stats(&self) -> ServiceStats {
        ServiceStats {
            dns: self.dns.as_ref().map(Dns::stats).unwrap_or_default(),
            arp: self.arp.stats(),
            nd: self.nd.stats(),
            dhcp4: self.dhcp4.stats(),
            dhcp6: self.dhcp6.stats(),
            ntp: self.ntp.stats(),
            ..self.stats
        }
    }

    /// Takes a frame of the guest's. `checksummed` is false when the guest left the transport
    /// checksum to the device (NEEDS_CSUM).
    ///
    /// TCP to the card's addresses passes: the stack terminates it.
    pub fn receive(
        &mut self,
        frame: &[u8],
        checksummed: bool,
        now: Instant,
        out: &mut Outbox,
    ) -> Verdict {
        let Ok(frame) = EthernetFrame::new_checked(frame) else {
            self.stats.malformed += 1;
            return Verdict::Handled;
        };
        let sender = frame.src_addr();
        if frame.ethertype() == EthernetProtocol::Arp {
            if self.admit(sender, now) {
                let reply = self.arp.handle(&self.spec, sender, frame.payload(), now);
                out.frames.extend(reply);
            }
            return Verdict::Handled;
        }
        let Some(packet) = wire::parse_ip(frame.ethertype(), frame.payload()) else {
            // Broken or of no concern here; the stack counts it.
            return Verdict::Pass;
        };
        let kind = self.kind(&packet);
        if kind == Kind::NotOurs {
            return Verdict::Pass;
        }
        if !self.admit(sender, now) {
            return Verdict::Handled;
        }
        let reply = match kind {
            Kind::NotOurs | Kind::Stream => return Verdict::Pass,
            Kind::Nd => self.nd.handle(&self.spec, &packet),
            Kind::Udp(port) => self.udp(&packet, port, checksummed, now, out),
            Kind::Echo => {
                let reply = echo::reply(&self.spec, &packet);
                match reply {
                    Some(_) => self.stats.echoed += 1,
                    None => self.stats.unwanted += 1,
                }
                reply
            }
            Kind::Unwanted => {
                self.stats.unwanted += 1;
                None
            }
        };
        out.frames.extend(reply);
        Verdict::Handled
    }

    /// What is due by now.
    pub fn poll(&mut self, now: Instant, out: &mut Outbox) {
        out.frames.extend(self.nd.poll(&self.spec, now));
        if let Some(dns) = &mut self.dns {
            let mut said = DnsOut::default();
            dns.poll(now, &mut said);
            while let Some(question) = self.streams.take() {
                let (guest, card) = (question.key.guest, question.key.peer);
                let client = Client {
                    client: (guest.ip(), guest.port()),
                    server: (card.ip(), card.port()),
                    stream: Some(question.stream),
                };
                let before = (dns.stats().malformed, said.replies.len());
                dns.query(client, &question.message, now, &mut said);
                let (malformed, replies) = before;
                if dns.stats().malformed > malformed && said.replies.len() == replies {
                    // What deserves no answer is not waited for.
                    said.replies.push((client, Vec::new()));
                }
            }
            deliver(&self.spec, &self.streams, said, out);
        }
    }

    /// Takes the answer to something that left as [`Outbox::outgoing`].
    pub fn answered(&mut self, token: u64, payload: &[u8], now: Instant, out: &mut Outbox) {
        if let Some(dns) = &mut self.dns {
            let mut said = DnsOut::default();
            dns.answered(token, payload, now, &mut said);
            deliver(&self.spec, &self.streams, said, out);
        }
    }

    /// The service behind a TCP port of the card's; none: the connection is to be refused.
    #[must_use]
    pub fn connect(
        &self,
        to: SocketAddr,
        from: SocketAddr,
        now: Instant,
    ) -> Option<Box<dyn TcpService>> {
        if to.port() == dns::PORT && self.dns.is_some() && self.spec.is_card(to.ip()) {
            let key = FlowKey {
                protocol: TCP,
                guest: from,
                peer: to,
            };
            return Some(Box::new(self.streams.connect(key, now)?));
        }
        let is_metadata = to.ip() == IpAddr::V4(METADATA_V4) || to.ip() == IpAddr::V6(METADATA_V6);
        if !is_metadata || to.port() != imds::PORT {
            return None;
        }
        let connection = self.imds.as_ref()?.connect(now)?;
        Some(Box::new(connection))
    }

    /// When [`Self::poll`] wants to be called.
    #[must_use]
    pub fn poll_at(&self) -> Option<Instant> {
        let nd = self.nd.poll_at().filter(|_| self.spec.v6.is_some());
        let dns = self.dns.as_ref().and_then(Dns::poll_at);
        let asked = self.streams.waiting_since();
        nd.into_iter().chain(dns).chain(asked).min()
    }

    fn kind(&self, packet: &wire::Packet<'_>) -> Kind {
        use smoltcp::wire::IpProtocol as P;
        let is_card = self.spec.is_card(packet.destination);
        match packet.protocol {
            P::Icmpv6 if Nd::wants(packet) => Kind::Nd,
            P::Udp => {
                let port = match packet.payload {
                    [_, _, high, low, ..] => u16::from_be_bytes([*high, *low]),
                    _ => 0,
                };
                let is_dhcp4 = port == dhcp4::SERVER_PORT
                    && (is_card || packet.destination == IpAddr::V4(Ipv4Addr::BROADCAST));
                let is_dhcp6 =
                    port == dhcp6::SERVER_PORT && packet.destination == IpAddr::V6(dhcp6::SERVERS);
                let is_dns = port == dns::PORT && is_card && self.dns.is_some();
                let to = packet.destination;
                let is_time = to == IpAddr::V4(TIME_V4) || to == IpAddr::V6(TIME_V6);
                let is_ntp = port == ntp::PORT && is_time;
                if is_dhcp4 || is_dhcp6 || is_dns || is_ntp {
                    Kind::Udp(port)
                } else {
                    Kind::NotOurs
                }
            }
            P::Tcp if is_link_service(packet.destination) => Kind::Stream,
            P::Tcp => Kind::NotOurs,
            P::Icmp | P::Icmpv6 if is_card => Kind::Echo,
            _ if is_card => Kind::Unwanted,
            _ => Kind::NotOurs,
        }
    }

    fn udp(
        &mut self,
        packet: &wire::Packet<'_>,
        port: u16,
        checksummed: bool,
        now: Instant,
        out: &mut Outbox,
    ) -> Option<Vec<u8>> {
        let Some(datagram) = wire::parse_udp(packet, checksummed) else {
            self.stats.malformed += 1;
            return None;
        };
        let spec = &self.spec;
        match (port, packet.source, packet.destination) {
            (dhcp4::SERVER_PORT, IpAddr::V4(_), _) => {
                let reply = self.dhcp4.handle(spec, datagram.payload)?;
                wire::udp(
                    (spec.gateway_mac, reply.mac),
                    (reply.source.into(), dhcp4::SERVER_PORT),
                    (reply.destination.into(), dhcp4::CLIENT_PORT),
                    &reply.message,
                )
            }
            (dhcp6::SERVER_PORT, IpAddr::V6(source), IpAddr::V6(destination)) => {
                let ends = (source, destination);
                let reply = self.dhcp6.handle(spec, ends, datagram.payload)?;
                let gateway = spec.v6?.gateway;
                wire::udp(
                    (spec.gateway_mac, spec.mac),
                    (gateway.into(), dhcp6::SERVER_PORT),
                    (packet.source, dhcp6::CLIENT_PORT),
                    &reply,
                )
            }
            (dns::PORT, source, destination) if spec.is_guest(source) && self.dns.is_some() => {
                let client = Client {
                    client: datagram.source,
                    server: (destination, dns::PORT),
                    stream: None,
                };
                let mut said = DnsOut::default();
                if let Some(dns) = &mut self.dns {
                    dns.query(client, datagram.payload, now, &mut said);
                }
                deliver(&self.spec, &self.streams, said, out);
                None
            }
            (ntp::PORT, source, destination) if spec.is_guest(source) => {
                let reply = self.ntp.handle(datagram.payload)?;
                let link = (spec.gateway_mac, spec.mac);
                wire::udp(link, (destination, port), datagram.source, &reply)
            }
            _ => {
                self.stats.unwanted += 1;
                None
            }
        }
    }

    /// Whether a frame may cost something: it is the guest's, and not one too many.
    pub(crate) fn admit(&mut self, sender: smoltcp::wire::EthernetAddress, now: Instant) -> bool {
        if sender != self.spec.mac {
            self.stats.spoofed += 1;
            return false;
        }
        let has = self.admission.take(now);
        self.stats.limited += u64::from(!has);
        has
    }
}

/// Puts what the resolver has to say into the outbox.
fn deliver(spec: &Spec, streams: &Streams, said: DnsOut, out: &mut Outbox) {
    for (client, message) in said.replies {
        if let Some(stream) = client.stream {
            out.woken.extend(streams.answer(stream, &message));
            continue;
        }
        let link = (spec.gateway_mac, spec.mac);
        let frame = wire::udp(link, client.server, client.client, &message);
        out.frames.extend(frame);
    }
    out.outgoing.extend(said.outgoing);
    out.over.extend(said.over);
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    NotOurs,
    Nd,
    Udp(u16),
    Echo,
    /// TCP to a link-local service: it counts, and the stack terminates it.
    Stream,
    Unwanted,
}

#[cfg(test)]
mod tests;
