//! DHCPv6 (RFC 8415): one guest, one address.
//!
//! As with IPv4, everything follows from the specification, nothing is remembered, and a restart
//! of the card goes unnoticed. The server's identifier is made of the card's hardware address.
//!
//! Of the identity associations in a message, that for ordinary addresses with the lowest identifier
//! gets the lease, the others "no addresses"; temporary addresses and prefixes are never given. An address that the
//! guest names and that is not its own comes back with lifetimes of 0, so that it lets go of it.
//!
//! | message | server id | answer |
//! |---|---|---|
//! | SOLICIT | none | ADVERTISE; REPLY with rapid commit |
//! | REQUEST, RENEW | ours | REPLY with the address |
//! | REBIND | none | the same |
//! | CONFIRM | none | REPLY: on link, or not; none without an address |
//! | RELEASE, DECLINE | ours | REPLY: success |
//! | INFORMATION-REQUEST | none or ours | REPLY with resolver and search list |
//!
//! Only what comes from a link-local address to the servers' multicast address is looked at, which
//! every client does (RFC 8415, 14). Relays have no place on this link.

use std::net::Ipv6Addr;

use dhcproto::v6::{
    DhcpOption, DhcpOptions, IAAddr, IANA, IAPD, IATA, Message, MessageType, OptionCode, Status,
    StatusCode,
};
use dhcproto::{Decodable, Decoder, Encodable, Encoder};
use hickory_proto::rr::Name;

use crate::spec::{self, Ipv6, Spec};

/// The server's port.
pub const SERVER_PORT: u16 = 547;
/// The client's port.
pub const CLIENT_PORT: u16 = 546;
/// Where clients send: All_DHCP_Relay_Agents_and_Servers.
pub const SERVERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2);
/// Longest message taken.
const MESSAGE_MAX: usize = 1500;
/// Identity associations answered in one message.
const ASSOCIATIONS_MAX: usize = 8;
/// Renew, rebind, preferred, valid: seconds.
const TIMES: (u32, u32, u32, u32) = (1800, 2880, 3600, 7200);

/// What was seen and done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dhcp6Stats {
    /// ADVERTISE sent.
    pub advertised: u64,
    /// REPLY sent.
    pub replies: u64,
    /// For another server, relayed, or of a type that is not for servers.
    pub ignored: u64,
    /// Not DHCPv6, or against RFC 8415, 16.
    pub malformed: u64,
}

/// The server.
#[derive(Debug, Default)]
pub struct Dhcp6 {
    stats: Dhcp6Stats,
}

/// Why there is no answer.
enum Silence {
    Ignored,
    Malformed,
}

impl Dhcp6 {
    /// Counters.
    #[must_use]
    pub fn stats(&self) -> Dhcp6Stats {
        self.stats
    }

    /// Takes a message that came to [`SERVER_PORT`]; gives the one that goes back to its sender,
    /// from the gateway's address.
    pub fn handle(
        &mut self,
        spec: &Spec,
        (source, destination): (Ipv6Addr, Ipv6Addr),
        bytes: &[u8],
    ) -> Option<Vec<u8>> {
        let answer = match spec.v6 {
            Some(v6) if spec::is_link_local(source) && destination == SERVERS => {
                Server { spec, v6 }.answer(bytes)
            }
            _ => Err(Silence::Ignored),
        };
        let message = match answer {
            Ok(message) => message,
            Err(Silence::Ignored) => {
                self.stats.ignored += 1;
                return None;
            }
            Err(Silence::Malformed) => {
                self.stats.malformed += 1;
                return None;
            }
        };
        let mut reply = Vec::new();
        if message.encode(&mut Encoder::new(&mut reply)).is_err() {
            self.stats.malformed += 1;
            return None;
        }
        if message.msg_type() == MessageType::Advertise {
            self.stats.advertised += 1;
        } else {
            self.stats.replies += 1;
        }
        Some(reply)
    }
}

struct Server<'a> {
    spec: &'a Spec,
    v6: Ipv6,
}

impl Server<'_> {
    /// DUID-LL (RFC 8415, 11.4).
    fn id(&self) -> Vec<u8> {
        let mut id = vec![0, 3, 0, 1];
        id.extend(self.spec.gateway_mac.as_bytes());
        id
    }

    fn answer(&self, bytes: &[u8]) -> Result<Message, Silence> {
        // Relayed messages (12, 13) have another shape, and no place here.
        if bytes.len() > MESSAGE_MAX || matches!(bytes.first(), None | Some(12 | 13)) {
            return Err(Silence::Malformed);
        }
        let (head, options) = bytes.split_at_checked(4).ok_or(Silence::Malformed)?;
        let options = essentials(options, false).ok_or(Silence::Malformed)?;
        let bytes = [head, &options].concat();
        let request = Message::decode(&mut Decoder::new(&bytes)).map_err(|_| Silence::Malformed)?;
        let options = request.opts();
        let client = match options.get(OptionCode::ClientId) {
            // RFC 8415, 11.1: two bytes of type and up to 128 of identifier.
            Some(DhcpOption::ClientId(id)) if (3..=130).contains(&id.len()) => Some(id.clone()),
            Some(_) => return Err(Silence::Malformed),
            None => None,
        };
        let server = match options.get(OptionCode::ServerId) {
            Some(DhcpOption::ServerId(id)) => Some(*id == self.id()),
            _ => None,
        };
        let kind = request.msg_type();
        // RFC 8415, 16.2 to 16.12.
        match (kind, &client, server) {
            (MessageType::Solicit | MessageType::Confirm | MessageType::Rebind, Some(_), None)
            | (
                MessageType::Request
                | MessageType::Renew
                | MessageType::Release
                | MessageType::Decline,
                Some(_),
                Some(true),
            )
            | (MessageType::InformationRequest, _, None | Some(true)) => {}
            (_, _, Some(false)) => return Err(Silence::Ignored),
            (
                MessageType::Solicit
                | MessageType::Confirm
                | MessageType::Rebind
                | MessageType::Request
                | MessageType::Renew
                | MessageType::Release
                | MessageType::Decline,
                ..,
            ) => return Err(Silence::Malformed),
            _ => return Err(Silence::Ignored),
        }

        let rapid = kind == MessageType::Solicit && options.get(OptionCode::RapidCommit).is_some();
        let answer = if kind == MessageType::Solicit && !rapid {
            MessageType::Advertise
        } else {
            MessageType::Reply
        };
        let mut reply = Message::new_with_id(answer, request.xid());
        reply.opts_mut().insert(DhcpOption::ServerId(self.id()));
        if let Some(id) = client {
            reply.opts_mut().insert(DhcpOption::ClientId(id));
        }
        if rapid {
            reply.opts_mut().insert(DhcpOption::RapidCommit);
        }
        match kind {
            MessageType::Confirm => {
                let mut named = named_addresses(options).peekable();
                if named.peek().is_none() {
                    return Err(Silence::Ignored);
                }
                let fits = named.all(|address| self.v6.contains(address));
                reply.opts_mut().insert(if fits {
                    status(Status::Success, "these addresses belong on this link")
                } else {
                    status(Status::NotOnLink, "these addresses belong on another link")
                });
            }
            MessageType::Release | MessageType::Decline => {
                reply.opts_mut().insert(status(Status::Success, "noted"));
            }
            MessageType::InformationRequest => self.add_parameters(options, &mut reply),
            _ => {
                self.add_associations(options, &mut reply);
                self.add_parameters(options, &mut reply);
            }
        }
        Ok(reply)
    }

    fn add_associations(&self, options: &DhcpOptions, reply: &mut Message) {
        let ids = options.iter().filter_map(|option| match option {
            DhcpOption::IANA(association) => Some(association.id),
            _ => None,
        });
        let first = ids.min();
        for option in options
            .iter()
            .filter(|it| is_association(it))
            .take(ASSOCIATIONS_MAX)
        {
            let none = || DhcpOptions::from_iter([status(Status::NoAddrsAvail, "one only")]);
            let answer = match option {
                DhcpOption::IANA(association) if Some(association.id) == first => {
                    self.lease(association)
                }
                DhcpOption::IANA(IANA { id, .. }) => DhcpOption::IANA(IANA {
                    id: *id,
                    t1: 0,
                    t2: 0,
                    opts: none(),
                }),
                DhcpOption::IATA(IATA { id, .. }) => DhcpOption::IATA(IATA {
                    id: *id,
                    opts: none(),
                }),
                DhcpOption::IAPD(IAPD { id, .. }) => DhcpOption::IAPD(IAPD {
                    id: *id,
                    t1: 0,
                    t2: 0,
                    opts: DhcpOptions::from_iter([status(Status::NoPrefixAvail, "no prefixes")]),
                }),
                _ => continue,
            };
            reply.opts_mut().insert(answer);
        }
    }

    fn lease(&self, association: &IANA) -> DhcpOption {
        let (t1, t2, preferred_life, valid_life) = TIMES;
        let own = self.v6.address;
        let mut opts = DhcpOptions::new();
        let foreign = addresses(&association.opts).filter(|address| *address != own);
        for addr in foreign.take(ASSOCIATIONS_MAX) {
            opts.insert(DhcpOption::IAAddr(IAAddr {
                addr,
                preferred_life: 0,
                valid_life: 0,
                opts: DhcpOptions::new(),
            }));
        }
        // Behind the loop, as `insert` puts an option before others of its kind.
        opts.insert(DhcpOption::IAAddr(IAAddr {
            addr: own,
            preferred_life,
            valid_life,
            opts: DhcpOptions::new(),
        }));
        DhcpOption::IANA(IANA {
            id: association.id,
            t1,
            t2,
            opts,
        })
    }

    fn add_parameters(&self, options: &DhcpOptions, reply: &mut Message) {
        let is_asked = |code| match options.get(OptionCode::ORO) {
            Some(DhcpOption::ORO(list)) => list.opts.contains(&code),
            _ => true,
        };
        if is_asked(OptionCode::DomainNameServers) {
            let servers = DhcpOption::DomainNameServers(vec![self.v6.dns]);
            reply.opts_mut().insert(servers);
        }
        let domain = self.spec.domain.as_deref();
        if let Some(Ok(name)) = domain.map(Name::from_ascii)
            && is_asked(OptionCode::DomainSearchList)
        {
            let list = DhcpOption::DomainSearchList(vec![name]);
            reply.opts_mut().insert(list);
        }
    }
}

fn is_association(option: &DhcpOption) -> bool {
    matches!(
        option,
        DhcpOption::IANA(_) | DhcpOption::IATA(_) | DhcpOption::IAPD(_)
    )
}

fn addresses(options: &DhcpOptions) -> impl Iterator<Item = Ipv6Addr> {
    options.iter().filter_map(|option| match option {
        DhcpOption::IAAddr(address) => Some(address.addr),
        _ => None,
    })
}

fn named_addresses(options: &DhcpOptions) -> impl Iterator<Item = Ipv6Addr> {
    options.iter().flat_map(|option| match option {
        DhcpOption::IANA(association) => addresses(&association.opts).collect::<Vec<_>>(),
        DhcpOption::IATA(association) => addresses(&association.opts).collect(),
        _ => Vec::new(),
    })
}

fn status(status: Status, text: &str) -> DhcpOption {
    DhcpOption::StatusCode(StatusCode {
        status,
        msg: text.into(),
    })
}

/// The options, nested ones too, that the server looks at and no others, if they are as long as their
/// fixed fields and nest no deeper than they can.
///
/// The decoder (dhcproto 0.15) subtracts from lengths that it does not check (authentication, status,
/// vendor options), reads some options by an idea of its own of their length, so that what follows is
/// read as other options than it is, and recurses.
fn essentials(mut options: &[u8], is_nested: bool) -> Option<Vec<u8>> {
    let mut kept = Vec::with_capacity(options.len());
    while !options.is_empty() {
        let (&[a, b, c, d], rest) = options.split_first_chunk::<4>()?;
        let (code, len) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
        let (body, rest) = rest.split_at_checked(usize::from(len))?;
        options = rest;
        let fields = match (OptionCode::from(code), is_nested) {
            (OptionCode::ClientId | OptionCode::ServerId | OptionCode::ORO, false) => body.len(),
            (OptionCode::RapidCommit, false) => 0,
            (OptionCode::IANA | OptionCode::IAPD, false) => 12,
            (OptionCode::IATA, false) => 4,
            (OptionCode::IAAddr, true) => 24,
            _ => continue,
        };
        let (fields, inner) = body.split_at_checked(fields)?;
        let inner = match is_nested {
            // An address may have options of its own; none is of interest.
            true => Vec::new(),
            false => essentials(inner, true)?,
        };
        let len = u16::try_from(fields.len() + inner.len()).ok()?;
        kept.extend(code.to_be_bytes());
        kept.extend(len.to_be_bytes());
        kept.extend_from_slice(fields);
        kept.extend(inner);
    }
    Some(kept)
}

#[cfg(test)]
mod tests;
