//! Private networks: cards whose guests reach each other.
//!
//! ```text
//!  guest A ─► card A: source check, groups out ─┐            ┌─► card B: source check, groups in,
//!                │                              └─ message ──┘           cut and sum up ─► guest B
//!                └─ ARP, ND, DNS for the others: answered by the own card
//! ```
//!
//! # Card to card, no switch
//! Each pair of cards has a connection of its own (`SOCK_SEQPACKET`, [`meeting`]); nothing stands
//! between. A switch process was the other choice. It would copy each frame once more and be woken
//! for it, one stalled member's queue would have to be kept from the others' by more code, and its
//! end would be everybody's: two shims that start VMs of one network would have to agree who starts it,
//! and who starts it again. Here a card that stalls or dies is one connection of each other card,
//! the kernel says at once which, and nobody supervises what is not there. The price is a connection
//! for every two members, so [`MEMBERS_MAX`] bounds a network: it is one of a host, not of a region.
//!
//! A ring in shared memory was rejected too: a card would read what a neighbour still writes, and a
//! copy into memory of its own would cost about what the kernel's does, while sockets bring bounds, an
//! end that is told, and credentials.
//!
//! # What passes
//! Unicast IP between addresses that cards have announced ([`members`]), as frames with their
//! `virtio_net_hdr`: 64 KiB leave and arrive as one, and the receiver cuts them if its guest takes
//! none ([`segment`]). ARP and ND are answered by the own card ([`answer`]); broadcast and multicast
//! do not pass, as in a VPC. Both ends check the source, hardware address and IP, and both apply their
//! security groups, in which a group means its members here too.
//!
//! Fragments cannot be judged one by one, so the sender's card puts their packet together
//! ([`crate::frame::reassembly`]) and sends it whole, whatever its length, and the receiver's cuts it to its
//! own guest's MTU ([`fragment`]): the packet crosses between them once, and nobody but the sender's
//! card keeps parts of anything. To pass them on as they are, each judged by what was the verdict on its
//! first one, was rejected: order is not promised, overlaps would have to be kept out anyway, and the
//! receiver would have to believe or repeat all of it.
//!
//! # Who is trusted with what
//! A guest with nothing. A card is another one's equal if it runs as the same user: it may say which
//! free address of the network it has, and its name and groups, but it cannot take an address or a name
//! that is taken. What it sends is checked as a guest's is; what is wrong is counted and dropped, and an
//! announcement that cannot be read ends the connection.
//!
//! # Queues
//! What a peer's socket does not take waits in a queue of [`QUEUE_BYTES`] for that peer alone, and is
//! dropped and counted behind that. A card whose guest takes nothing stops reading for
//! [`PATIENCE`] and drops from then on. One thread, that of the first queue pair, has all connections
//! and so all flows' states; other pairs leave their frames with it.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use offload::telemetry::{Counter, Registry};
use offload::worker::Waker;
use serde_json::{Value, json};

use crate::frame::header::NetHeader;
use crate::frame::{Frame, Net};
use crate::policy::SharedRules;
use crate::spec::Spec;

pub mod answer;
pub mod fragment;
pub mod meeting;
pub mod members;
pub mod message;
pub mod port;
pub mod segment;
mod traffic;

use meeting::{Id, Meeting};
use members::{Members, Own};
use message::Announcement;

/// Most other members that a card speaks to.
pub const MEMBERS_MAX: usize = 64;
/// Bytes that wait for one peer, besides what its socket holds.
pub const QUEUE_BYTES: usize = 512 << 10;
/// Frames that wait for one peer.
pub const QUEUE_FRAMES: usize = 512;
/// How long a guest that takes nothing holds up those who send to it.
pub const PATIENCE: Duration = Duration::from_millis(100);
/// Frames that other queue pairs leave for the first one, at most.
const HANDED_MAX: usize = 256;
/// Members of which counters are kept when they have left.
const KNOWN_MAX: usize = 4 * MEMBERS_MAX;

/// What is counted over all peers.
#[derive(Debug, Default)]
pub struct LanStats {
    /// Connections of other users, refused.
    pub strangers: Arc<Counter>,
    /// Connections beyond [`MEMBERS_MAX`], or of a member that has one.
    pub crowded: Arc<Counter>,
    /// Connections that ended.
    pub ended: Arc<Counter>,
    /// Addresses that members announced and that were not theirs to have.
    pub refused_addresses: Arc<Counter>,
    /// Frames that another queue pair could not leave with the first.
    pub unhanded: Arc<Counter>,
    /// Totals of what [`PeerStats`] has for each.
    pub all: PeerStats,
}

/// What is counted for each peer. Frames are those of the ring: a super-segment is one.
#[derive(Debug, Default)]
pub struct PeerStats {
    /// Frames sent.
    pub frames_out: Arc<Counter>,
    /// Bytes of these.
    pub bytes_out: Arc<Counter>,
    /// Frames given to the guest.
    pub frames_in: Arc<Counter>,
    /// Bytes of these.
    pub bytes_in: Arc<Counter>,
    /// Frames to it that were dropped because its queue was full.
    pub dropped_out: Arc<Counter>,
    /// Frames from it that were dropped because the guest took none.
    pub dropped_in: Arc<Counter>,
    /// Messages and frames that could not be read.
    pub malformed: Arc<Counter>,
    /// Frames from or to addresses that are not whose they should be.
    pub spoofed: Arc<Counter>,
    /// Frames that the own security groups refused.
    pub denied_in: Arc<Counter>,
    /// Frames that the guest cannot be given: too long, too many pieces.
    pub unfit: Arc<Counter>,
}

type ReadPeer = fn(&PeerStats) -> &Arc<Counter>;

const COUNTED: [(&str, &str, ReadPeer); 10] = [
    ("frames_out", "Frames sent to peers", |s| &s.frames_out),
    ("bytes_out", "Bytes of frames sent to peers", |s| {
        &s.bytes_out
    }),
    ("frames_in", "Frames of peers' given to the guest", |s| {
        &s.frames_in
    }),
    ("bytes_in", "Bytes of frames of peers'", |s| &s.bytes_in),
    (
        "dropped_out",
        "Frames dropped because a peer took none",
        |s| &s.dropped_out,
    ),
    (
        "dropped_in",
        "Frames dropped because the guest took none",
        |s| &s.dropped_in,
    ),
    ("malformed", "Messages that could not be read", |s| {
        &s.malformed
    }),
    ("spoofed", "Frames of peers' with false addresses", |s| {
        &s.spoofed
    }),
    (
        "denied_in",
        "Frames of peers' that security groups refused",
        |s| &s.denied_in,
    ),
    (
        "unfit",
        "Frames of peers' that are too long for the guest",
        |s| &s.unfit,
    ),
];

impl PeerStats {
    fn report(&self) -> Value {
        let counted = COUNTED.iter();
        let pairs = counted.map(|(name, _, read)| ((*name).to_owned(), read(self).get().into()));
        Value::Object(pairs.collect())
    }
}

/// What changes, for all threads.
#[derive(Debug)]
struct State {
    own: Own,
    members: Arc<Members>,
}

/// A card's place on a network, shared by its queue pairs and the control plane.
#[derive(Debug)]
pub struct Lan {
    meeting: Meeting,
    spec: Arc<Spec>,
    name: Option<String>,
    rules: Option<Arc<SharedRules>>,
    stats: LanStats,
    /// Grows with each change of `state`.
    version: AtomicU64,
    state: Mutex<State>,
    peers: Mutex<BTreeMap<Id, Arc<PeerStats>>>,
    handed: Mutex<VecDeque<(NetHeader, Box<[u8]>)>>,
    has_handed: AtomicU64,
    waker: Mutex<Option<Waker>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Lan {
    /// A card at a meeting.
    #[must_use]
    pub fn new(meeting: Meeting, spec: Arc<Spec>, rules: Option<Arc<SharedRules>>) -> Self {
        // Of a name with a domain the label that tells machines apart.
        let name = spec.hostname.as_deref().and_then(|name| {
            let label = name.split('.').next()?;
            message::is_label(label).then(|| label.to_ascii_lowercase())
        });
        let state = State {
            own: Own::new(&spec),
            members: Arc::default(),
        };
        Self {
            meeting,
            spec,
            name,
            rules,
            stats: LanStats::default(),
            version: AtomicU64::new(1),
            state: Mutex::new(state),
            peers: Mutex::default(),
            handed: Mutex::default(),
            has_handed: AtomicU64::new(0),
            waker: Mutex::default(),
        }
    }

    /// Counters.
    #[must_use]
    pub fn stats(&self) -> &LanStats {
        &self.stats
    }

    /// What the guest is called here.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// Shows all counters.
    pub fn register(&self, registry: &Registry) {
        const NAME: &str = "network_events";
        const HELP: &str = "What happened on the private network";
        let stats = &self.stats;
        for (event, counter) in [
            ("stranger", &stats.strangers),
            ("crowded", &stats.crowded),
            ("ended", &stats.ended),
            ("refused_address", &stats.refused_addresses),
            ("unhanded", &stats.unhanded),
        ] {
            let label = vec![("event", event.to_owned())];
            registry.counter(NAME, HELP, label, Arc::clone(counter));
        }
        for (event, _, read) in &COUNTED {
            let label = vec![("event", (*event).to_owned())];
            registry.counter(NAME, HELP, label, Arc::clone(read(&stats.all)));
        }
    }

    /// Who is there, with counters, for the control socket.
    #[must_use]
    pub fn report(&self) -> Value {
        let (own, members) = {
            let state = lock(&self.state);
            (state.own.clone(), Arc::clone(&state.members))
        };
        let known = lock(&self.peers).clone();
        let members = members.list().iter().map(|member| {
            let stats = known.get(&Id::new(member.is.mac));
            json!({
                "mac": member.is.mac.to_string(),
                "name": member.is.name,
                "mtu": member.is.mtu,
                "addresses": member.is.addresses,
                "groups": member.is.groups,
                "counters": stats.map(|stats| stats.report()),
            })
        });
        json!({
            "directory": self.meeting.path(),
            "name": self.name,
            "addresses": own.addresses(),
            "members": members.collect::<Vec<_>>(),
        })
    }

    /// Whoever has the connections is woken by this.
    pub fn set_waker(&self, waker: Waker) {
        *lock(&self.waker) = Some(waker);
    }

    fn wake(&self) {
        if let Some(waker) = &*lock(&self.waker) {
            waker.wake();
        }
    }

    /// The counters of a peer; they survive its connections.
    fn peer_stats(&self, id: Id) -> Arc<PeerStats> {
        let mut peers = lock(&self.peers);
        if peers.len() >= KNOWN_MAX && !peers.contains_key(&id) {
            let members = Arc::clone(&lock(&self.state).members);
            peers.retain(|id, _| members.list().iter().any(|it| Id::new(it.is.mac) == *id));
        }
        Arc::clone(peers.entry(id).or_default())
    }

    /// What this card says of itself now.
    fn announcement(&self) -> Announcement {
        let groups = self.rules.as_ref().map(|rules| rules.spec().interface);
        Announcement {
            mac: self.spec.mac,
            name: self.name.clone(),
            mtu: self.spec.mtu,
            addresses: lock(&self.state).own.addresses().to_vec(),
            groups: groups.unwrap_or_default(),
        }
    }

    /// The members have changed.
    fn set_members(&self, announced: Vec<(usize, Announcement)>) {
        let mut state = lock(&self.state);
        let own = state.own.addresses().to_vec();
        let (members, refused) = Members::new(&self.spec, &own, announced);
        self.stats.refused_addresses.add(refused);
        let groups = members.groups();
        state.members = Arc::new(members);
        drop(state);
        if let Some(rules) = &self.rules {
            rules.set_members(groups);
        }
        self.version.fetch_add(1, Ordering::Release);
    }

    /// The guest wants to use an address: see [`Own::claim`].
    fn claim(&self, address: IpAddr) -> bool {
        let mut state = lock(&self.state);
        let members = Arc::clone(&state.members);
        let is_new = state.own.claim(&self.spec, &members, address);
        drop(state);
        if is_new {
            self.version.fetch_add(1, Ordering::Release);
            self.wake();
        }
        is_new
    }

    /// Leaves a frame of the guest's with the thread that has the connections.
    pub fn hand_over(&self, header: NetHeader, frame: &[u8]) {
        let mut handed = lock(&self.handed);
        if handed.len() >= HANDED_MAX {
            self.stats.unhanded.inc();
            return;
        }
        handed.push_back((header, frame.into()));
        drop(handed);
        self.has_handed.fetch_add(1, Ordering::Release);
        self.wake();
    }
}

/// The network as one thread sees it: one look at a counter tells whether it has changed.
#[derive(Debug)]
pub struct View {
    lan: Arc<Lan>,
    version: u64,
    members: Arc<Members>,
    own: Own,
}

impl View {
    /// Of nothing yet.
    #[must_use]
    pub fn new(lan: Arc<Lan>) -> Self {
        let own = Own::new(&lan.spec);
        Self {
            lan,
            version: 0,
            members: Arc::default(),
            own,
        }
    }

    /// Looks whether something has changed. True: something has.
    pub fn refresh(&mut self) -> bool {
        let version = self.lan.version.load(Ordering::Acquire);
        if version == self.version {
            return false;
        }
        self.version = version;
        let state = lock(&self.lan.state);
        self.members = Arc::clone(&state.members);
        self.own = state.own.clone();
        true
    }

    /// The network.
    #[must_use]
    pub fn lan(&self) -> &Arc<Lan> {
        &self.lan
    }

    /// Names of the members, as the resolver is to know them: the plain one, and `NAME.internal`.
    #[must_use]
    pub fn names(&self) -> Vec<(String, Vec<IpAddr>)> {
        let plain = self.members.names(self.lan.name());
        let own = self.lan.name().map(|name| {
            let given = Own::new(&self.lan.spec);
            (format!("{name}.internal"), given.addresses().to_vec())
        });
        let full = plain
            .iter()
            .map(|(name, addresses)| (format!("{name}.internal"), addresses.clone()))
            .chain(own);
        let full: Vec<_> = full.collect();
        plain.into_iter().chain(full).collect()
    }

    /// Whether a frame of the guest's goes to a member, as far as its first bytes tell.
    #[must_use]
    pub fn is_for_member(&self, frame: &[u8]) -> bool {
        traffic::destination(frame).is_some_and(|to| self.members.by_address(to).is_some())
    }

    /// Answers a guest that asks who has an address, for the members; hears what the guest wants for
    /// itself. `None`: it is not about a member.
    #[must_use]
    pub fn answer(&self, frame: &Frame<'_>) -> Option<Vec<u8>> {
        // An IPv6 guest asks once whether an address is free; a card that comes later learns it when
        // the address is used.
        if let Net::Ip(packet) = &frame.net
            && packet.source.is_ipv6()
            && !packet.source.is_unspecified()
            && frame.source == self.lan.spec.mac
            && !self.own.contains(packet.source)
        {
            self.lan.claim(packet.source);
        }
        let question = answer::question(frame)?;
        match self.members.by_address(question.target()) {
            Some(member) => answer::answer(&question, member.is.mac, self.lan.spec.mac),
            None => {
                if question.is_probe() && !self.own.contains(question.target()) {
                    self.lan.claim(question.target());
                }
                None
            }
        }
    }
}
