//! The resolver: local names, a cache, and questions to the host's own servers.
//!
//! It forwards, it does not recurse: the servers that the host uses are asked, one after the other,
//! and what they say is what the guest gets. No I/O: a question to a server leaves as an
//! [`Outgoing`], its answer comes back by token, and time comes in as an argument.
//!
//! # Against forged answers
//! Each question has a random id and, as the edge makes a connected socket for each, a random port
//! that takes datagrams from that server only. An answer counts when token, id and question agree;
//! anything else is dropped and the wait goes on. A whole answer is cached under its question, and
//! never a record for another name.
//!
//! # Cache
//! Positive answers live as long as their shortest TTL, negative ones as RFC 2308 has it: the SOA's
//! TTL or minimum, whichever is less, and no SOA, no caching. Both are capped. TTLs in what is
//! handed out count down. Size is bounded in entries and bytes, the oldest goes first.
//!
//! # Sizes
//! An answer longer than what the guest takes (512 bytes, or its EDNS0 size) is cut to the question
//! with TC set, and a guest that wants the whole asks again over TCP ([`stream`]). The servers are asked
//! by UDP, with an EDNS0 size of [`UPSTREAM_SIZE`]; over TCP only when that was cut and the guest uses
//! TCP itself.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, PTR};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};

use crate::local::Outgoing;
use crate::spec::{METADATA_V4, METADATA_V6, Spec};

pub mod stream;
pub mod upstream;

use upstream::Upstream;

/// The port.
pub const PORT: u16 = 53;
/// EDNS0 size towards servers, and the largest answer that the guest gets by UDP.
pub const UPSTREAM_SIZE: u16 = 4096;
/// Questions to servers under way.
pub const PENDING_MAX: usize = 256;
/// Entries of the cache.
pub const CACHE_ENTRIES: usize = 4096;
/// Bytes of the cached answers, as they are on the wire.
pub const CACHE_BYTES: usize = 1 << 20;
/// How long a server has.
pub const ATTEMPT_TIME: Duration = Duration::from_secs(2);
/// How often servers are asked for one question.
pub const ATTEMPTS: u32 = 4;
/// Longest life of an answer in the cache.
pub const TTL_MAX: u32 = 3600;
/// Longest life of a negative answer in the cache (RFC 2308, 5, has hours).
pub const NEGATIVE_TTL_MAX: u32 = 300;
/// TTL of local names.
const LOCAL_TTL: u32 = 60;

/// Random 16 bits, from outside.
pub type Random = Box<dyn FnMut() -> u16 + Send>;

/// Who asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Client {
    /// The guest.
    pub client: (IpAddr, u16),
    /// The address of the card's that it asked.
    pub server: (IpAddr, u16),
    /// The connection that it asked over; `None`: by UDP.
    pub stream: Option<u64>,
}

/// What was seen and done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DnsStats {
    /// Questions.
    pub queries: u64,
    /// Answered from local names.
    pub local: u64,
    /// Answered from the cache.
    pub cached: u64,
    /// Questions sent to servers, repetitions included.
    pub asked: u64,
    /// Answers of servers that were passed on.
    pub answered: u64,
    /// Questions that no server answered.
    pub unanswered: u64,
    /// Questions refused because too many were under way.
    pub crowded: u64,
    /// Not DNS, or not a question.
    pub malformed: u64,
    /// Datagrams from servers that did not fit the question.
    pub forged: u64,
    /// Answers cut to fit.
    pub truncated: u64,
    /// Questions that came over TCP.
    pub streamed: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    name: Name,
    kind: RecordType,
    dnssec: bool,
    unchecked: bool,
}

struct Cached {
    message: Message,
    since: Instant,
    expires: Instant,
    bytes: usize,
    serial: u64,
}

struct Pending {
    client: Client,
    question: Message,
    key: Key,
    id: u16,
    attempt: u32,
    deadline: Instant,
    /// The servers are asked over TCP: their answer does not fit a datagram.
    over_tcp: bool,
}

/// The resolver.
pub struct Dns {
    upstream: Arc<Upstream>,
    version: u64,
    servers: Arc<[SocketAddr]>,
    names: BTreeMap<Name, Vec<IpAddr>>,
    addresses: BTreeMap<Name, Name>,
    /// Names of other machines that come and go; what is known besides goes before them.
    peer_names: BTreeMap<Name, Vec<IpAddr>>,
    peer_addresses: BTreeMap<Name, Name>,
    domain: Option<String>,
    random: Random,
    cache: HashMap<Key, Cached>,
    order: VecDeque<(Key, u64)>,
    cached_bytes: usize,
    pending: HashMap<u64, Pending>,
    token: u64,
    stats: DnsStats,
}

impl std::fmt::Debug for Dns {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Dns")
            .field("cached", &self.cache.len())
            .field("pending", &self.pending.len())
            .finish_non_exhaustive()
    }
}

/// What became of questions: answers for the guest, questions to servers, and tokens that nobody
/// waits for any more.
#[derive(Debug, Default)]
pub struct DnsOut {
    /// Answers.
    pub replies: Vec<(Client, Vec<u8>)>,
    /// Questions.
    pub outgoing: Vec<Outgoing>,
    /// Tokens whose sockets can be closed.
    pub over: Vec<u64>,
}

impl Dns {
    /// `peers` are names of other machines on the guest's network.
    #[must_use]
    pub fn new(spec: &Spec, peers: &[(String, Vec<IpAddr>)], random: Random) -> Self {
        let upstream = Arc::new(Upstream::new(&spec.upstream_dns));
        let mut dns = Self {
            version: upstream.version(),
            servers: upstream.servers(),
            upstream,
            names: BTreeMap::new(),
            addresses: BTreeMap::new(),
            peer_names: BTreeMap::new(),
            peer_addresses: BTreeMap::new(),
            domain: spec.domain.clone(),
            random,
            cache: HashMap::new(),
            order: VecDeque::new(),
            cached_bytes: 0,
            pending: HashMap::new(),
            token: 0,
            stats: DnsStats::default(),
        };
        let v4 = spec.v4.map(|v4| IpAddr::from(v4.address));
        let own = v4.into_iter().chain(spec.v6.map(|v6| v6.address.into()));
        let metadata = vec![METADATA_V4.into(), METADATA_V6.into()];
        let hostname = spec.hostname.iter();
        let mut names: Vec<_> = hostname
            .map(|name| (name.clone(), own.clone().collect()))
            .collect();
        names.push(("instance-data".into(), metadata));
        names.extend_from_slice(peers);
        for (name, addresses) in names {
            // The full name last: it is what an address is called.
            dns.add(&name, &addresses);
            if let Some(domain) = &spec.domain
                && !name.contains('.')
            {
                dns.add(&format!("{name}.{domain}"), &addresses);
            }
        }
        dns
    }

    /// Asks the servers of `upstream`, whichever they are at the time, instead of those of the
    /// specification.
    #[must_use]
    pub fn following(mut self, upstream: Arc<Upstream>) -> Self {
        self.version = upstream.version();
        self.servers = upstream.servers();
        self.upstream = upstream;
        self
    }

    /// Other servers may know other answers: what the old ones said is forgotten.
    fn follow_upstream(&mut self) {
        let version = self.upstream.version();
        if version != self.version {
            self.version = version;
            self.servers = self.upstream.servers();
            self.cache.clear();
            self.order.clear();
            self.cached_bytes = 0;
        }
    }

    fn add(&mut self, name: &str, addresses: &[IpAddr]) {
        add(&mut self.names, &mut self.addresses, name, addresses);
    }

    /// Exchanges the names of other machines that come and go. Of an address's names the last is what
    /// it is called.
    pub fn set_peers(&mut self, peers: &[(String, Vec<IpAddr>)]) {
        let (mut names, mut reverse) = (BTreeMap::new(), BTreeMap::new());
        for (name, addresses) in peers {
            add(&mut names, &mut reverse, name, addresses);
            if let Some(domain) = &self.domain
                && !name.contains('.')
            {
                let full = format!("{name}.{domain}");
                add(&mut names, &mut reverse, &full, addresses);
            }
        }
        (self.peer_names, self.peer_addresses) = (names, reverse);
    }

    /// Counters.
    #[must_use]
    pub fn stats(&self) -> DnsStats {
        self.stats
    }

    /// Takes a question.
    pub fn query(&mut self, client: Client, bytes: &[u8], now: Instant, out: &mut DnsOut) {
        self.stats.queries += 1;
        self.stats.streamed += u64::from(client.stream.is_some());
        self.follow_upstream();
        let question = match Message::from_vec(bytes) {
            Ok(message) if message.metadata.message_type == MessageType::Query => message,
            // Answering an answer, or what is none, is how loops begin.
            Ok(_) => {
                self.stats.malformed += 1;
                return;
            }
            Err(_) => {
                self.stats.malformed += 1;
                if let Some(reply) = format_error(bytes) {
                    out.replies.push((client, reply));
                }
                return;
            }
        };
        let refuse = |code| {
            let meta = &question.metadata;
            let mut reply = Message::error_msg(meta.id, meta.op_code, code);
            reply.metadata.recursion_desired = meta.recursion_desired;
            reply.metadata.recursion_available = true;
            reply.queries.clone_from(&question.queries);
            reply
        };
        let [query] = &question.queries[..] else {
            self.stats.malformed += 1;
            self.reply(client, &question, refuse(ResponseCode::FormErr), out);
            return;
        };
        let is_transfer = matches!(query.query_type(), RecordType::AXFR | RecordType::IXFR);
        if question.metadata.op_code != OpCode::Query || is_transfer {
            self.reply(client, &question, refuse(ResponseCode::NotImp), out);
            return;
        }
        if question
            .edns
            .as_ref()
            .is_some_and(|edns| edns.version() > 0)
        {
            self.reply(client, &question, refuse(ResponseCode::BADVERS), out);
            return;
        }
        if query.query_class() != DNSClass::IN {
            self.reply(client, &question, refuse(ResponseCode::Refused), out);
            return;
        }
        if let Some(answers) = self.local(query) {
            self.stats.local += 1;
            let mut reply = refuse(ResponseCode::NoError);
            reply.metadata.authoritative = true;
            reply.answers = answers;
            self.reply(client, &question, reply, out);
            return;
        }
        let mut name = query.name().to_lowercase();
        name.set_fqdn(true);
        let key = Key {
            name,
            kind: query.query_type(),
            dnssec: question
                .edns
                .as_ref()
                .is_some_and(|edns| edns.flags().dnssec_ok),
            unchecked: question.metadata.checking_disabled,
        };
        if let Some(answer) = self.look_up(&key, now) {
            self.stats.cached += 1;
            self.reply(client, &question, answer, out);
            return;
        }
        if self.servers.is_empty() || self.pending.len() >= PENDING_MAX {
            self.stats.crowded += u64::from(!self.servers.is_empty());
            self.reply(client, &question, refuse(ResponseCode::ServFail), out);
            return;
        }
        let pending = Pending {
            client,
            question,
            key,
            id: 0,
            attempt: 0,
            deadline: now,
            over_tcp: false,
        };
        self.ask(pending, now, out);
    }

    /// Takes a datagram from a server.
    pub fn answered(&mut self, token: u64, bytes: &[u8], now: Instant, out: &mut DnsOut) {
        let Some(pending) = self.pending.get(&token) else {
            return;
        };
        let answer = Message::from_vec(bytes).ok().filter(|answer| {
            let same = |(a, b): (&Query, &Query)| {
                a.name().to_lowercase() == b.name().to_lowercase()
                    && a.query_type() == b.query_type()
                    && a.query_class() == b.query_class()
            };
            answer.metadata.message_type == MessageType::Response
                && answer.metadata.id == pending.id
                && answer.queries.len() == 1
                && answer
                    .queries
                    .iter()
                    .zip(&pending.question.queries)
                    .all(same)
        });
        let Some(mut answer) = answer else {
            self.stats.forged += 1;
            return;
        };
        let Some(mut pending) = self.pending.remove(&token) else {
            return;
        };
        out.over.push(token);
        if answer.metadata.truncation && pending.client.stream.is_some() && !pending.over_tcp {
            pending.over_tcp = true;
            // The same server: it has the answer.
            pending.attempt = pending.attempt.saturating_sub(1);
            self.ask(pending, now, out);
            return;
        }
        let failed = matches!(
            answer.metadata.response_code,
            ResponseCode::ServFail | ResponseCode::Refused | ResponseCode::NotImp
        );
        if failed && pending.attempt < self.attempts() && self.servers.len() > 1 {
            self.ask(pending, now, out);
            return;
        }
        self.stats.answered += 1;
        answer.edns = None;
        answer.metadata.recursion_available = true;
        self.store(pending.key, &answer, bytes.len(), now);
        self.reply(pending.client, &pending.question, answer, out);
    }

    /// Asks again, or gives up, where a server has not answered in time.
    pub fn poll(&mut self, now: Instant, out: &mut DnsOut) {
        let late = |(token, pending): (&u64, &Pending)| (pending.deadline <= now).then_some(*token);
        let tokens: Vec<u64> = self.pending.iter().filter_map(late).collect();
        for token in tokens {
            let Some(pending) = self.pending.remove(&token) else {
                continue;
            };
            out.over.push(token);
            self.follow_upstream();
            if pending.attempt < self.attempts() && !self.servers.is_empty() {
                self.ask(pending, now, out);
                continue;
            }
            self.stats.unanswered += 1;
            let meta = &pending.question.metadata;
            let mut reply = Message::error_msg(meta.id, meta.op_code, ResponseCode::ServFail);
            reply.metadata.recursion_desired = meta.recursion_desired;
            reply.metadata.recursion_available = true;
            reply.queries.clone_from(&pending.question.queries);
            self.reply(pending.client, &pending.question, reply, out);
        }
    }

    /// When [`Self::poll`] has something to do.
    #[must_use]
    pub fn poll_at(&self) -> Option<Instant> {
        self.pending.values().map(|pending| pending.deadline).min()
    }

    fn attempts(&self) -> u32 {
        ATTEMPTS
    }

    fn ask(&mut self, mut pending: Pending, now: Instant, out: &mut DnsOut) {
        let turn = pending.attempt as usize % self.servers.len().max(1);
        let Some(to) = self.servers.get(turn).copied() else {
            return;
        };
        pending.attempt += 1;
        pending.id = (self.random)();
        pending.deadline = now.checked_add(ATTEMPT_TIME).unwrap_or(now);
        let mut message = Message::new(pending.id, MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = true;
        message.metadata.checking_disabled = pending.key.unchecked;
        message.metadata.authentic_data = pending.question.metadata.authentic_data;
        message.queries.clone_from(&pending.question.queries);
        let mut edns = Edns::new();
        edns.set_max_payload(UPSTREAM_SIZE);
        edns.set_dnssec_ok(pending.key.dnssec);
        message.edns = Some(edns);
        let Ok(payload) = message.to_vec() else {
            self.stats.malformed += 1;
            return;
        };
        self.token += 1;
        self.stats.asked += 1;
        out.outgoing.push(Outgoing {
            token: self.token,
            to,
            payload,
            is_stream: pending.over_tcp,
        });
        self.pending.insert(self.token, pending);
    }

    /// Sends `answer` as the answer to `question`, in a form that its sender takes.
    fn reply(&mut self, client: Client, question: &Message, mut answer: Message, out: &mut DnsOut) {
        answer.metadata.id = question.metadata.id;
        answer.metadata.message_type = MessageType::Response;
        answer.metadata.recursion_desired = question.metadata.recursion_desired;
        // The question goes back as it was written, capitals included.
        answer.queries.clone_from(&question.queries);
        let mut limit = 512;
        if let Some(edns) = &question.edns {
            limit = usize::from(edns.max_payload().clamp(512, UPSTREAM_SIZE));
            let mut own = Edns::new();
            own.set_max_payload(UPSTREAM_SIZE);
            own.set_dnssec_ok(edns.flags().dnssec_ok);
            let code = u16::from(answer.metadata.response_code);
            own.set_rcode_high(u8::try_from(code >> 4).unwrap_or(0));
            answer.edns = Some(own);
        }
        if client.stream.is_some() {
            limit = usize::from(u16::MAX);
        }
        let fits = |bytes: &Vec<u8>| bytes.len() <= limit;
        let bytes = answer.to_vec().ok().filter(fits).or_else(|| {
            self.stats.truncated += 1;
            answer.answers.clear();
            answer.authorities.clear();
            answer.additionals.clear();
            answer.metadata.truncation = true;
            answer.to_vec().ok().filter(fits)
        });
        if let Some(bytes) = bytes {
            out.replies.push((client, bytes));
        }
    }

    /// Records of a local name or address; empty when it has none of that type.
    fn local(&self, query: &Query) -> Option<Vec<Record>> {
        let mut name = query.name().to_lowercase();
        name.set_fqdn(true);
        let record = |data| Record::from_rdata(query.name().clone(), LOCAL_TTL, data);
        let kind = query.query_type();
        let target = self.addresses.get(&name);
        if let Some(target) = target.or_else(|| self.peer_addresses.get(&name)) {
            let is_asked = matches!(kind, RecordType::PTR | RecordType::ANY);
            let answer = is_asked.then(|| record(RData::PTR(PTR(target.clone()))));
            return Some(answer.into_iter().collect());
        }
        let addresses = self.names.get(&name);
        let addresses = addresses.or_else(|| self.peer_names.get(&name))?;
        let records = addresses
            .iter()
            .filter_map(|address| match (address, kind) {
                (IpAddr::V4(v4), RecordType::A | RecordType::ANY) => Some(record(RData::A(A(*v4)))),
                (IpAddr::V6(v6), RecordType::AAAA | RecordType::ANY) => {
                    Some(record(RData::AAAA(AAAA(*v6))))
                }
                _ => None,
            });
        Some(records.collect())
    }

    fn look_up(&mut self, key: &Key, now: Instant) -> Option<Message> {
        let cached = self.cache.get(key)?;
        if cached.expires <= now {
            self.forget(key);
            return None;
        }
        let mut message = cached.message.clone();
        let age = now.saturating_duration_since(cached.since).as_secs();
        let age = u32::try_from(age).unwrap_or(u32::MAX);
        for section in [
            &mut message.answers,
            &mut message.authorities,
            &mut message.additionals,
        ] {
            for record in section {
                record.ttl = record.ttl.saturating_sub(age);
            }
        }
        Some(message)
    }

    fn store(&mut self, key: Key, message: &Message, bytes: usize, now: Instant) {
        let ttl = match lifetime(message) {
            Some(ttl @ 1..) if bytes <= CACHE_BYTES / 16 => ttl,
            _ => return,
        };
        let Some(expires) = now.checked_add(Duration::from_secs(ttl.into())) else {
            return;
        };
        self.forget(&key);
        self.token += 1;
        let serial = self.token;
        self.cached_bytes += bytes;
        self.order.push_back((key.clone(), serial));
        let message = message.clone();
        let cached = Cached {
            message,
            since: now,
            expires,
            bytes,
            serial,
        };
        self.cache.insert(key, cached);
        while self.cache.len() > CACHE_ENTRIES
            || self.cached_bytes > CACHE_BYTES
            || self.order.len() > 2 * CACHE_ENTRIES
        {
            let Some((key, serial)) = self.order.pop_front() else {
                break;
            };
            if self.cache.get(&key).is_some_and(|it| it.serial == serial) {
                self.forget(&key);
            }
        }
    }

    fn forget(&mut self, key: &Key) {
        if let Some(cached) = self.cache.remove(key) {
            self.cached_bytes -= cached.bytes;
        }
    }
}

fn add(
    names: &mut BTreeMap<Name, Vec<IpAddr>>,
    reverse: &mut BTreeMap<Name, Name>,
    name: &str,
    addresses: &[IpAddr],
) {
    let Ok(name) = Name::from_ascii(name) else {
        return;
    };
    let mut name = name.to_lowercase();
    name.set_fqdn(true);
    for address in addresses {
        let mut pointer = Name::from(*address);
        pointer.set_fqdn(true);
        reverse.insert(pointer, name.clone());
    }
    names.insert(name, addresses.to_vec());
}

/// How long an answer may be cached, in seconds; `None`: not at all.
fn lifetime(message: &Message) -> Option<u32> {
    let code = message.metadata.response_code;
    if message.metadata.truncation
        || !matches!(code, ResponseCode::NoError | ResponseCode::NXDomain)
    {
        return None;
    }
    if code == ResponseCode::NoError && !message.answers.is_empty() {
        let records = message.answers.iter().chain(&message.authorities);
        return records
            .map(|record| record.ttl)
            .min()
            .map(|ttl| ttl.min(TTL_MAX));
    }
    let soa = message
        .authorities
        .iter()
        .find_map(|record| match &record.data {
            RData::SOA(soa) => Some(record.ttl.min(soa.minimum)),
            _ => None,
        });
    // A chain of aliases to a name that is not there has TTLs of its own.
    let aliases = message.answers.iter().map(|record| record.ttl).min();
    let ttl = soa?.min(aliases.unwrap_or(u32::MAX));
    Some(ttl.min(NEGATIVE_TTL_MAX))
}

/// FORMERR to what has at least a header that is a question's (RFC 1035, 4.1.1).
fn format_error(bytes: &[u8]) -> Option<Vec<u8>> {
    let [high, low, flags, ..] = *bytes.get(..12)? else {
        return None;
    };
    let is_response = flags & 0x80 != 0;
    (!is_response).then(|| {
        vec![
            high,
            low,
            0x80 | (flags & 0x79),
            0x81,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
        ]
    })
}

#[cfg(test)]
mod tests;
