//! DHCP for IPv4 (RFC 2131, RFC 2132): one guest, one lease.
//!
//! The lease is a function of the specification: no database, no clock, and the same answer after a
//! restart of the card, so a guest that renews towards a new process never notices. The link has one
//! guest, so nothing can run out, and an address that the guest declines or releases is the address
//! that it gets again.
//!
//! What a message gets, by the state that its client is in (RFC 2131, 4.3.2):
//!
//! | message | server id | requested | ciaddr | answer |
//! |---|---|---|---|---|
//! | DISCOVER | | | | OFFER; ACK at once with option 80 (RFC 4039) |
//! | REQUEST selecting | ours | the lease | | ACK, another address: NAK |
//! | REQUEST selecting | other | | | none, it chose another server |
//! | REQUEST init-reboot | none | any | 0 | ACK or NAK |
//! | REQUEST renewing, rebinding | none | none | any | ACK to ciaddr, or NAK |
//! | INFORM | | | the sender's | ACK without address and times |
//! | DECLINE, RELEASE | | | | none, counted |
//!
//! The card is authoritative: it knows the only right answer, so init-reboot with an address of
//! another network gets a NAK at once instead of a timeout.
//!
//! Who is answered: hardware type 1, the interface's hardware address, no relay. A client identifier
//! (option 61) may be anything, as one machine has several in one boot (firmware, initramfs,
//! networkd), but one of type 1 that names another hardware address is refused. It is sent back
//! (RFC 6842).
//!
//! Options go out when asked for (option 55), and all of them when nothing was. There is no route to the
//! metadata address among them (option 121): the default route leads there, and cloud-init of Debian 12
//! (22.4) sets such a route up anew at each boot and fails when the network's own client has it already.

use std::net::Ipv4Addr;

use dhcproto::v4::{DhcpOption, Flags, HType, Message, MessageType, Opcode, OptionCode};
use dhcproto::{Decodable, Decoder, Encodable, Encoder};
use ipnet::Ipv4Net;
use smoltcp::wire::EthernetAddress;

use crate::spec::{Spec, TIME_V4};

/// The server's port.
pub const SERVER_PORT: u16 = 67;
/// The client's port.
pub const CLIENT_PORT: u16 = 68;
/// What a lease is good for, in seconds; it is renewed at half of it. AWS has the same.
pub const LEASE_SECONDS: u32 = 3600;

/// Where the fixed part of a message ends with the magic number (RFC 2131, figure 1).
const FIXED_LEN: usize = 240;
const MAGIC: [u8; 4] = [99, 130, 83, 99];
/// Shortest message that BOOTP clients take (RFC 1542, 2.1).
const MESSAGE_MIN: usize = 300;
/// Longest message that every client takes, without IP and UDP headers (RFC 2131, 2).
const MESSAGE_MAX: u16 = 576 - 28;

/// What was seen and done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dhcp4Stats {
    /// OFFERs sent.
    pub offers: u64,
    /// ACKs sent.
    pub acks: u64,
    /// NAKs sent.
    pub naks: u64,
    /// RELEASE and DECLINE taken.
    pub releases: u64,
    /// Of another client, for another server, over a relay, or of a type that is not for servers.
    pub ignored: u64,
    /// Not DHCP.
    pub malformed: u64,
}

/// An answer and where it goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The card's address, port [`SERVER_PORT`].
    pub source: Ipv4Addr,
    /// Port [`CLIENT_PORT`].
    pub destination: Ipv4Addr,
    /// Where the frame goes.
    pub mac: EthernetAddress,
    /// The message.
    pub message: Vec<u8>,
}

/// The server.
#[derive(Debug, Default)]
pub struct Dhcp4 {
    stats: Dhcp4Stats,
}

/// What the answer is built from.
struct Context<'a> {
    spec: &'a Spec,
    v4: crate::spec::Ipv4,
    request: &'a Message,
}

impl Dhcp4 {
    /// Counters.
    #[must_use]
    pub fn stats(&self) -> Dhcp4Stats {
        self.stats
    }

    /// Takes a message that came to [`SERVER_PORT`].
    pub fn handle(&mut self, spec: &Spec, bytes: &[u8]) -> Option<Reply> {
        let Some(v4) = spec.v4 else {
            self.stats.ignored += 1;
            return None;
        };
        let Some(request) = parse(bytes) else {
            self.stats.malformed += 1;
            return None;
        };
        let context = Context {
            spec,
            v4,
            request: &request,
        };
        let kind = context.answer();
        match kind {
            Answer::Malformed => self.stats.malformed += 1,
            Answer::Ignore => self.stats.ignored += 1,
            Answer::Released => self.stats.releases += 1,
            Answer::Offer => self.stats.offers += 1,
            Answer::Ack { .. } | Answer::Inform => self.stats.acks += 1,
            Answer::Nak => self.stats.naks += 1,
        }
        context.reply(kind)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Malformed,
    Ignore,
    Released,
    Offer,
    Ack { rapid: bool },
    Inform,
    Nak,
}

/// A message of a client. What the decoder takes for granted is checked before it.
fn parse(bytes: &[u8]) -> Option<Message> {
    let fixed = bytes.get(..FIXED_LEN)?;
    // Ethernet with its six bytes: a longer hlen than the field holds panics in `chaddr()`.
    if fixed.get(..3)? != [1, 1, 6] || fixed.get(236..)? != MAGIC {
        return None;
    }
    let bytes = essentials(bytes)?;
    Message::decode(&mut Decoder::new(&bytes)).ok()
}

/// The message with only those options that the server looks at, if they are as long as they have to
/// be. The decoder (dhcproto 0.15) asserts the lengths of others or subtracts from them, as of the
/// client's full name, and reads some by their own idea of a length.
fn essentials(bytes: &[u8]) -> Option<Vec<u8>> {
    let (fixed, mut options) = bytes.split_at_checked(FIXED_LEN)?;
    let mut kept = fixed.to_vec();
    while let Some((&code, rest)) = options.split_first() {
        match code {
            0 => {
                options = rest;
                continue;
            }
            255 => break,
            _ => {}
        }
        let (&len, rest) = rest.split_first()?;
        let (body, rest) = rest.split_at_checked(usize::from(len))?;
        options = rest;
        let is_sound = match OptionCode::from(code) {
            OptionCode::RapidCommit => len == 0,
            OptionCode::MessageType => len == 1,
            OptionCode::MaxMessageSize => len == 2,
            OptionCode::RequestedIpAddress | OptionCode::ServerIdentifier => len == 4,
            OptionCode::ParameterRequestList | OptionCode::ClientIdentifier => true,
            _ => continue,
        };
        if !is_sound {
            return None;
        }
        kept.extend([code, len]);
        kept.extend_from_slice(body);
    }
    kept.push(255);
    Some(kept)
}

impl Context<'_> {
    fn answer(&self) -> Answer {
        let request = self.request;
        let options = request.opts();
        let Some(kind) = options.msg_type() else {
            return Answer::Malformed;
        };
        let ours = self.spec.mac.as_bytes();
        if request.chaddr() != ours || !request.giaddr().is_unspecified() {
            return Answer::Ignore;
        }
        if let Some(DhcpOption::ClientIdentifier(id)) = options.get(OptionCode::ClientIdentifier)
            && id.len() == 7
            && id.first() == Some(&1)
            && id.get(1..) != Some(ours)
        {
            return Answer::Ignore;
        }
        let server = match options.get(OptionCode::ServerIdentifier) {
            Some(DhcpOption::ServerIdentifier(address)) => Some(*address),
            _ => None,
        };
        if server.is_some_and(|server| server != self.v4.gateway) {
            return Answer::Ignore;
        }
        let requested = match options.get(OptionCode::RequestedIpAddress) {
            Some(DhcpOption::RequestedIpAddress(address)) => Some(*address),
            _ => None,
        };
        match kind {
            MessageType::Discover if options.contains(OptionCode::RapidCommit) => {
                Answer::Ack { rapid: true }
            }
            MessageType::Discover => Answer::Offer,
            MessageType::Request => {
                let ciaddr = request.ciaddr();
                let wanted = match requested {
                    // Selecting and init-reboot. RFC 2131 has ciaddr 0 here; some fill in both.
                    Some(address) => address,
                    None if !ciaddr.is_unspecified() => ciaddr,
                    None => return Answer::Malformed,
                };
                if wanted == self.v4.address {
                    Answer::Ack { rapid: false }
                } else {
                    Answer::Nak
                }
            }
            MessageType::Inform if request.ciaddr() == self.v4.address => Answer::Inform,
            MessageType::Decline | MessageType::Release => Answer::Released,
            _ => Answer::Ignore,
        }
    }

    fn reply(&self, answer: Answer) -> Option<Reply> {
        let request = self.request;
        let (kind, yiaddr) = match answer {
            Answer::Malformed | Answer::Ignore | Answer::Released => return None,
            Answer::Offer => (MessageType::Offer, self.v4.address),
            Answer::Ack { .. } => (MessageType::Ack, self.v4.address),
            Answer::Inform => (MessageType::Ack, Ipv4Addr::UNSPECIFIED),
            Answer::Nak => (MessageType::Nak, Ipv4Addr::UNSPECIFIED),
        };
        let is_nak = answer == Answer::Nak;
        let zero = Ipv4Addr::UNSPECIFIED;
        let ciaddr = if is_nak { zero } else { request.ciaddr() };
        let mut reply = Message::new_with_id(
            request.xid(),
            ciaddr,
            yiaddr,
            zero,
            zero,
            self.spec.mac.as_bytes(),
        );
        reply
            .set_opcode(Opcode::BootReply)
            .set_htype(HType::Eth)
            .set_flags(Flags::from(u16::from(request.flags()) & 0x8000));

        let options = reply.opts_mut();
        options.insert(DhcpOption::MessageType(kind));
        options.insert(DhcpOption::ServerIdentifier(self.v4.gateway));
        if let Some(id) = request.opts().get(OptionCode::ClientIdentifier) {
            options.insert(id.clone());
        }
        if matches!(answer, Answer::Offer | Answer::Ack { .. }) {
            options.insert(DhcpOption::AddressLeaseTime(LEASE_SECONDS));
            options.insert(DhcpOption::Renewal(LEASE_SECONDS / 2));
            options.insert(DhcpOption::Rebinding(LEASE_SECONDS / 8 * 7));
        }
        if answer == (Answer::Ack { rapid: true }) {
            options.insert(DhcpOption::RapidCommit);
        }
        if !is_nak {
            self.add_parameters(&mut reply);
        }

        // RFC 2131, 4.1: a client with an address hears it there; a NAK is always broadcast.
        let (destination, mac) = if is_nak || (ciaddr == zero && request.flags().broadcast()) {
            (Ipv4Addr::BROADCAST, EthernetAddress::BROADCAST)
        } else if ciaddr == zero {
            (yiaddr, self.spec.mac)
        } else {
            (ciaddr, self.spec.mac)
        };
        let mut message = encode(&reply)?;
        if message.len() < MESSAGE_MIN {
            message.resize(MESSAGE_MIN, 0);
        }
        Some(Reply {
            source: self.v4.gateway,
            destination,
            mac,
            message,
        })
    }

    /// Adds what the client asked for, the needful first, as far as its buffer goes.
    fn add_parameters(&self, reply: &mut Message) {
        let limit = match self.request.opts().get(OptionCode::MaxMessageSize) {
            Some(DhcpOption::MaxMessageSize(size)) => size.saturating_sub(28).max(MESSAGE_MAX),
            _ => MESSAGE_MAX,
        };
        for option in self.parameters() {
            let code = OptionCode::from(&option);
            let is_asked = match self.request.opts().get(OptionCode::ParameterRequestList) {
                Some(DhcpOption::ParameterRequestList(list)) => list.contains(&code),
                _ => true,
            };
            if !is_asked {
                continue;
            }
            reply.opts_mut().insert(option);
            if encode(reply).is_none_or(|bytes| bytes.len() > usize::from(limit)) {
                reply.opts_mut().remove(code);
            }
        }
    }

    fn parameters(&self) -> Vec<DhcpOption> {
        let v4 = self.v4;
        let spec = self.spec;
        let mut list = Vec::with_capacity(8);
        let mask = Ipv4Net::new(v4.address, v4.prefix_len).map(|net| net.netmask());
        list.push(DhcpOption::SubnetMask(mask.unwrap_or(Ipv4Addr::BROADCAST)));
        list.push(DhcpOption::Router(vec![v4.gateway]));
        list.push(DhcpOption::DomainNameServer(vec![v4.dns]));
        list.push(DhcpOption::InterfaceMtu(spec.mtu));
        list.push(DhcpOption::BroadcastAddr(v4.broadcast()));
        if let Some(name) = &spec.hostname {
            list.push(DhcpOption::Hostname(name.clone()));
        }
        if let Some(domain) = &spec.domain {
            list.push(DhcpOption::DomainName(domain.clone()));
        }
        list.push(DhcpOption::NtpServers(vec![TIME_V4]));
        list
    }
}

fn encode(message: &Message) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(MESSAGE_MIN);
    message.encode(&mut Encoder::new(&mut bytes)).ok()?;
    Some(bytes)
}

#[cfg(test)]
mod tests;
