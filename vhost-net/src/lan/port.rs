//! The connections to the other members, on the thread of the first queue pair: see the
//! [module](super) for what passes and who is trusted.
//!
//! | what happens | what the port does |
//! |---|---|
//! | a socket appears in the directory | connects, if its own address is the higher one |
//! | that fails | tries again after [`RETRY_MIN`], twice as long each time up to [`RETRY_MAX`] |
//! | a connection | announces itself, and gives the other side [`GREETING`] to do so |
//! | an announcement | the member is there, or is another one now; the guest's card announces its own changes |
//! | the other side hangs up | the member is gone; what it sent last is dropped with it |
//!
//! Frames of a round come from the peers in turn, [`TURN`] from each, so that one that floods has its
//! share and no more.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use offload::telemetry::{RateLimited, shown};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags};
use slab::Slab;
use smoltcp::wire::EthernetAddress;

use super::meeting::Id;
use super::message::{self, Announcement, MESSAGE_MAX, Message};
use super::segment::{self, Takes};
use super::traffic::{self, Kind};
use super::{Lan, MEMBERS_MAX, PATIENCE, PeerStats, QUEUE_BYTES, QUEUE_FRAMES, View, lock};
use crate::card::CardStats;
use crate::frame::header::NetHeader;
use crate::local::{Direction, FlowKey, Meta};
use crate::stack::{Event, Wire};

/// How long a new connection may be silent.
pub const GREETING: Duration = Duration::from_secs(1);
/// Before the second attempt to connect.
pub const RETRY_MIN: Duration = Duration::from_millis(50);
/// Between attempts to connect to what does not answer. A card that comes back is told of by the
/// directory, so this is only for what the directory does not tell.
pub const RETRY_MAX: Duration = Duration::from_secs(5);
/// How often the directory is looked at unasked.
pub const LOOK: Duration = Duration::from_secs(5);
/// The same when the kernel does not tell of changes.
pub const LOOK_OFTEN: Duration = Duration::from_millis(400);
/// Messages of one peer in a row.
pub const TURN: usize = 16;
/// Messages in one round.
const ROUND: usize = 256;
/// Connections taken in one round.
const ACCEPTS: usize = 16;

/// What the port has to wait for: marks for the watcher.
const LISTENER: u64 = 0;
const DIRECTORY: u64 = 1;
/// Peers' marks begin here.
const PEERS: u64 = 2;

/// Who tells of events on descriptors: readable, writable, hung up, each once as it happens.
pub trait Watcher {
    /// Watches a descriptor until it is closed.
    ///
    /// # Errors
    /// The kernel's.
    fn watch(&mut self, fd: BorrowedFd<'_>, mark: u64) -> io::Result<()>;
}

/// Who decides what may pass.
pub trait Judge {
    /// Whether a packet of a flow may pass.
    fn lets_pass(&mut self, direction: Direction, meta: &Meta, now: Instant) -> bool;

    /// Whether an ICMP error may pass that tells of a flow.
    fn lets_error_pass(&mut self, flow: &FlowKey, now: Instant) -> bool;
}

struct Peer {
    fd: OwnedFd,
    /// Tells it from earlier ones of the same number.
    serial: u32,
    /// Whom it was connected to; `None`: it came by itself.
    expected: Option<Id>,
    is: Option<Announcement>,
    since: Instant,
    /// Before it is connected to again.
    wait: Duration,
    stats: Arc<PeerStats>,
    /// The own announcement has to go before any frame.
    announces: bool,
    waiting: VecDeque<Box<[u8]>>,
    waiting_bytes: usize,
    /// It is in the queue of those that have something to read.
    is_ready: bool,
}

/// Somebody to connect to.
struct Candidate {
    id: Id,
    at: Instant,
    wait: Duration,
}

/// What sending came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sent {
    Gone,
    Later,
    /// The connection is of no use any more, which its next event says too.
    Never,
}

/// See the module.
pub struct Port {
    view: View,
    peers: Slab<Peer>,
    serial: u32,
    candidates: Vec<Candidate>,
    ready: VecDeque<usize>,
    has_visitors: bool,
    look_at: Instant,
    announced: Announcement,
    /// Of network and rules, when that was made.
    announced_versions: (u64, u64),
    /// Since when the guest has had no room for what is there.
    blocked: Option<Instant>,
    buffer: Box<[u8]>,
    scratch: Vec<u8>,
    handed: u64,
    log: RateLimited,
}

impl std::fmt::Debug for Port {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Port")
            .field("peers", &self.peers.len())
            .finish_non_exhaustive()
    }
}

impl Port {
    /// A port that goes to the meeting's directory when it first [runs](Self::run).
    ///
    /// # Errors
    /// The kernel cannot watch the meeting.
    pub fn new(lan: Arc<Lan>, watcher: &mut impl Watcher, now: Instant) -> io::Result<Self> {
        watcher.watch(lan.meeting.listener(), LISTENER)?;
        if let Some(watch) = lan.meeting.watch() {
            watcher.watch(watch, DIRECTORY)?;
        }
        let announced = lan.announcement();
        Ok(Self {
            view: View::new(lan),
            peers: Slab::new(),
            serial: 0,
            candidates: Vec::new(),
            ready: VecDeque::new(),
            has_visitors: true,
            look_at: now,
            announced,
            announced_versions: (0, 0),
            blocked: None,
            // One more, so that a message that is too long is seen.
            buffer: vec![0; MESSAGE_MAX + 1].into_boxed_slice(),
            scratch: Vec::new(),
            handed: 0,
            log: RateLimited::new(5, Duration::from_secs(10)),
        })
    }

    /// The network as it is now.
    pub fn view(&mut self) -> &View {
        self.view.refresh();
        &self.view
    }

    /// Something happened at a watched descriptor.
    pub fn on_event(&mut self, mark: u64, event: Event, now: Instant) {
        match mark {
            LISTENER => self.has_visitors = true,
            DIRECTORY => {
                if self.view.lan.meeting.has_changed() {
                    self.look_at = now;
                    // Whoever did not answer may be another one now.
                    for candidate in &mut self.candidates {
                        candidate.at = now;
                        candidate.wait = RETRY_MIN;
                    }
                }
            }
            mark => {
                let (key, serial) = (((mark - PEERS) >> 32) as usize, (mark - PEERS) as u32);
                let Some(peer) = self.peers.get(key).filter(|peer| peer.serial == serial) else {
                    return;
                };
                // Frames in flight go with the flow that they were of; an announcement that is the
                // last word is of no use.
                if event.hangup && peer.is.is_some() {
                    self.close(key, now);
                    return;
                }
                if event.writable {
                    self.flush(key);
                }
                if event.readable {
                    self.make_ready(key);
                }
            }
        }
    }

    fn make_ready(&mut self, key: usize) {
        if let Some(peer) = self.peers.get_mut(key)
            && !std::mem::replace(&mut peer.is_ready, true)
        {
            self.ready.push_back(key);
        }
    }

    /// Whether [`Self::run`] has more to do at once, given whether the guest has room.
    #[must_use]
    pub fn has_more(&self, has_room: bool) -> bool {
        self.has_visitors
            || !self.ready.is_empty() && (has_room || self.is_out_of_patience(Instant::now()))
    }

    fn is_out_of_patience(&self, now: Instant) -> bool {
        self.blocked
            .is_some_and(|since| now.saturating_duration_since(since) >= PATIENCE)
    }

    /// When [`Self::run`] is to be called at the latest.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        let retries = self.candidates.iter().map(|candidate| candidate.at);
        let silent = self.peers.iter().filter(|(_, peer)| peer.is.is_none());
        let greetings = silent.map(|(_, peer)| peer.since + GREETING);
        let blocked = self.blocked.map(|since| since + PATIENCE);
        let ends = retries.chain(greetings).chain(blocked);
        ends.chain([self.look_at]).min()
    }

    /// Does what is due: meets others, gives the guest what they sent.
    pub fn run(
        &mut self,
        now: Instant,
        takes: Takes,
        wire: &mut impl Wire,
        judge: &mut impl Judge,
        watcher: &mut impl Watcher,
        card: &CardStats,
    ) {
        self.accept(now, watcher);
        self.look(now);
        self.connect(now, watcher);
        self.hang_up_on_silent(now);
        self.announce();
        self.take_handed(now, judge, card);
        self.receive(now, takes, wire, judge);
    }

    fn accept(&mut self, now: Instant, watcher: &mut impl Watcher) {
        if !self.has_visitors {
            return;
        }
        for _ in 0..ACCEPTS {
            match self.view.lan.meeting.accept() {
                Ok(Some(fd)) => self.open(fd, None, RETRY_MIN, now, watcher),
                Ok(None) => self.refuse_stranger(),
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    self.has_visitors = false;
                    if error.kind() != io::ErrorKind::WouldBlock {
                        self.warn(format_args!("cannot accept a card of the network: {error}"));
                        // They are still there: looked at again with the directory.
                    }
                    return;
                }
            }
        }
    }

    fn refuse_stranger(&mut self) {
        self.view.lan.stats.strangers.inc();
        self.warn(format_args!(
            "refused a connection of another user on the network's socket"
        ));
    }

    fn warn(&mut self, text: std::fmt::Arguments<'_>) {
        if let Some(suppressed) = self.log.allow(Instant::now()) {
            tracing::warn!(suppressed = shown(suppressed), "{text}");
        }
    }

    /// Looks who is there that should be connected to.
    fn look(&mut self, now: Instant) {
        if self.look_at > now {
            return;
        }
        let meeting = &self.view.lan.meeting;
        let often = meeting.watch().is_none();
        self.look_at = now + if often { LOOK_OFTEN } else { LOOK };
        self.has_visitors = true;
        let present = match meeting.present() {
            Ok(present) => present,
            Err(error) => {
                self.warn(format_args!(
                    "cannot look at the network's directory: {error}"
                ));
                return;
            }
        };
        let own = meeting.id();
        self.candidates.retain(|it| present.contains(&it.id));
        for id in present.into_iter().filter(|id| *id < own) {
            let is_known = self.candidates.iter().any(|it| it.id == id);
            let is_met = self.peers.iter().any(|(_, peer)| peer.expected == Some(id));
            if !is_known && !is_met && self.candidates.len() < MEMBERS_MAX {
                self.candidates.push(Candidate {
                    id,
                    at: now,
                    wait: RETRY_MIN,
                });
            }
        }
    }

    fn connect(&mut self, now: Instant, watcher: &mut impl Watcher) {
        let mut at = 0;
        while let Some(candidate) = self.candidates.get_mut(at) {
            if candidate.at > now {
                at += 1;
                continue;
            }
            let id = candidate.id;
            candidate.at = now + candidate.wait;
            candidate.wait = (candidate.wait * 2).min(RETRY_MAX);
            let wait = candidate.wait;
            match self.view.lan.meeting.connect(id) {
                Ok(Some(fd)) => {
                    self.candidates.swap_remove(at);
                    self.open(fd, Some(id), wait, now, watcher);
                }
                Ok(None) => {
                    self.refuse_stranger();
                    at += 1;
                }
                // Nobody is behind the socket, or not yet.
                Err(_) => at += 1,
            }
        }
    }

    fn open(
        &mut self,
        fd: OwnedFd,
        expected: Option<Id>,
        wait: Duration,
        now: Instant,
        watcher: &mut impl Watcher,
    ) {
        if self.peers.len() >= MEMBERS_MAX {
            self.view.lan.stats.crowded.inc();
            return;
        }
        self.serial = self.serial.wrapping_add(1);
        let serial = self.serial;
        let key = self.peers.vacant_key();
        let mark = PEERS + ((key as u64) << 32 | u64::from(serial));
        if let Err(error) = watcher.watch(fd.as_fd(), mark) {
            self.warn(format_args!(
                "cannot watch a connection of the network: {error}"
            ));
            return;
        }
        self.peers.insert(Peer {
            fd,
            serial,
            expected,
            is: None,
            since: now,
            wait,
            stats: Arc::default(),
            announces: true,
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            is_ready: false,
        });
        self.flush(key);
        self.make_ready(key);
    }

    fn close(&mut self, key: usize, now: Instant) {
        let Some(peer) = self.peers.try_remove(key) else {
            return;
        };
        self.ready.retain(|other| *other != key);
        self.view.lan.stats.ended.inc();
        for stats in [&*peer.stats, &self.view.lan.stats.all] {
            stats.dropped_out.add(peer.waiting.len() as u64);
        }
        if let Some(id) = peer.expected {
            // Not at once: one that refuses us would be asked without a pause.
            self.candidates.push(Candidate {
                id,
                at: now + peer.wait,
                wait: peer.wait,
            });
        }
        if let Some(is) = &peer.is {
            tracing::info!(mac = %is.mac, name = is.name, "a member of the network has left");
            self.tell_members();
        }
    }

    fn hang_up_on_silent(&mut self, now: Instant) {
        let silent = |(key, peer): (usize, &Peer)| {
            let is_late = now.saturating_duration_since(peer.since) >= GREETING;
            (peer.is.is_none() && is_late).then_some(key)
        };
        // There are few of them, but for somebody who tries.
        while let Some(key) = self.peers.iter().find_map(silent) {
            self.close(key, now);
        }
    }

    fn tell_members(&mut self) {
        let mut announced: Vec<_> = self
            .peers
            .iter()
            .filter_map(|(key, peer)| Some((peer.serial, key, peer.is.clone()?)))
            .collect();
        announced.sort_by_key(|(serial, ..)| *serial);
        let announced = announced.into_iter().map(|(_, key, is)| (key, is));
        self.view.lan.set_members(announced.collect());
        self.view.refresh();
    }

    /// Says what has changed about the own guest.
    fn announce(&mut self) {
        self.view.refresh();
        let rules = self.view.lan.rules.as_ref();
        let versions = (self.view.version, rules.map_or(0, |rules| rules.version()));
        if versions == self.announced_versions {
            return;
        }
        self.announced_versions = versions;
        let now = self.view.lan.announcement();
        if now == self.announced {
            return;
        }
        self.announced = now;
        let keys: Vec<usize> = self.peers.iter().map(|(key, _)| key).collect();
        for key in keys {
            if let Some(peer) = self.peers.get_mut(key) {
                peer.announces = true;
            }
            self.flush(key);
        }
    }

    /// Sends what waits for a peer, as far as its socket takes it.
    fn flush(&mut self, key: usize) {
        let Some(peer) = self.peers.get_mut(key) else {
            return;
        };
        if peer.announces {
            // Cannot fail: there is nothing in it that JSON has no form for.
            let bytes = self.announced.to_bytes().unwrap_or_default();
            match send(&peer.fd, &[&bytes]) {
                Sent::Gone => peer.announces = false,
                Sent::Later | Sent::Never => return,
            }
        }
        while let Some(front) = peer.waiting.front() {
            match send(&peer.fd, &[front]) {
                Sent::Gone => {
                    peer.waiting_bytes -= front.len();
                    peer.waiting.pop_front();
                }
                Sent::Later | Sent::Never => return,
            }
        }
    }

    /// Takes a frame of the guest's that may be for a member. False: it is not, and others may want it.
    pub fn from_guest(
        &mut self,
        header: &NetHeader,
        bytes: &[u8],
        now: Instant,
        judge: &mut impl Judge,
        card: &CardStats,
    ) -> bool {
        self.view.refresh();
        let Some(to) = traffic::destination(bytes) else {
            return false;
        };
        let Some(member) = self.view.members.by_address(to) else {
            return false;
        };
        let member = Arc::clone(member);
        let Some(frame) = traffic::parse(header, bytes) else {
            // The card says what is wrong with it.
            return false;
        };
        let Some(packet) = traffic::packet(&frame) else {
            return false;
        };
        if traffic::is_link_business(packet) {
            return false;
        }
        let lan = &self.view.lan;
        let is_to = |mac: EthernetAddress| frame.destination == mac;
        if frame.source != lan.spec.mac || !(is_to(member.is.mac) || is_to(lan.spec.gateway_mac)) {
            card.spoofed.inc();
            return true;
        }
        if !self.view.own.contains(packet.source) && !lan.claim(packet.source) {
            card.spoofed.inc();
            return true;
        }
        // A new address is announced before the frame that comes from it.
        self.announce();
        let may = match traffic::kind(&frame, packet, Direction::Out) {
            Kind::Flow(meta) => judge.lets_pass(Direction::Out, &meta, now),
            Kind::Error(flow) => judge.lets_error_pass(&flow, now),
            Kind::Fragment => {
                self.view.lan.stats.fragments.inc();
                return true;
            }
            Kind::Never => {
                card.ignored.inc();
                return true;
            }
        };
        if !may {
            card.denied.inc();
            return true;
        }
        let bytes = frame.bytes.get(..packet.end).unwrap_or_default();
        self.send(&member.is, member.peer, header, bytes);
        true
    }

    fn send(&mut self, member: &Announcement, key: usize, header: &NetHeader, frame: &[u8]) {
        let Some(peer) = self.peers.get_mut(key) else {
            return;
        };
        let all = &self.view.lan.stats.all;
        let prefix = message::prefix(header);
        let (_, rest) = frame.split_at_checked(6).unwrap_or_default();
        let parts = [&prefix[..], &member.mac.0, rest];
        let len: usize = parts.iter().map(|part| part.len()).sum();
        let is_waiting = peer.announces || !peer.waiting.is_empty();
        let sent = if is_waiting {
            Sent::Later
        } else {
            send(&peer.fd, &parts)
        };
        let is_taken = match sent {
            Sent::Gone => true,
            Sent::Never => false,
            Sent::Later => {
                let has_room =
                    peer.waiting.len() < QUEUE_FRAMES && peer.waiting_bytes + len <= QUEUE_BYTES;
                if has_room {
                    peer.waiting_bytes += len;
                    peer.waiting.push_back(parts.concat().into_boxed_slice());
                }
                has_room
            }
        };
        for stats in [&*peer.stats, all] {
            if is_taken {
                stats.frames_out.inc();
                stats.bytes_out.add(frame.len() as u64);
            } else {
                stats.dropped_out.inc();
            }
        }
    }

    fn take_handed(&mut self, now: Instant, judge: &mut impl Judge, card: &CardStats) {
        use std::sync::atomic::Ordering;
        let handed = self.view.lan.has_handed.load(Ordering::Acquire);
        if handed == self.handed {
            return;
        }
        self.handed = handed;
        let frames = std::mem::take(&mut *lock(&self.view.lan.handed));
        for (header, bytes) in frames {
            self.from_guest(&header, &bytes, now, judge, card);
        }
    }

    fn receive(
        &mut self,
        now: Instant,
        takes: Takes,
        wire: &mut impl Wire,
        judge: &mut impl Judge,
    ) {
        let mut left = ROUND;
        let mut turns = self.ready.len();
        while left > 0
            && let Some(key) = self.ready.pop_front()
        {
            let Some(peer) = self.peers.get_mut(key) else {
                continue;
            };
            let is_member = peer.is.is_some();
            if is_member && !wire.has_room() && !self.is_out_of_patience(now) {
                // Others that have not said who they are may still do so.
                self.blocked.get_or_insert(now);
                self.ready.push_back(key);
                turns = turns.saturating_sub(1);
                if turns == 0 {
                    return;
                }
                continue;
            }
            let mut is_empty = false;
            for _ in 0..TURN.min(left) {
                if wire.has_room() {
                    self.blocked = None;
                } else if is_member && !self.is_out_of_patience(now) {
                    break;
                }
                left -= 1;
                if !self.take_message(key, now, takes, wire, judge) {
                    is_empty = true;
                    break;
                }
            }
            if is_empty {
                if let Some(peer) = self.peers.get_mut(key) {
                    peer.is_ready = false;
                }
            } else {
                self.ready.push_back(key);
            }
        }
        if self.ready.is_empty() {
            self.blocked = None;
        }
    }

    /// Takes one message of a peer. False: there is none, or the peer is gone.
    fn take_message(
        &mut self,
        key: usize,
        now: Instant,
        takes: Takes,
        wire: &mut impl Wire,
        judge: &mut impl Judge,
    ) -> bool {
        let Some(peer) = self.peers.get(key) else {
            return false;
        };
        let mut buffer = std::mem::take(&mut self.buffer);
        let got = rustix::net::recv(&peer.fd, &mut buffer[..], RecvFlags::DONTWAIT);
        let has_more = match got {
            Ok((0, _)) => {
                self.close(key, now);
                false
            }
            Ok((len, _)) => {
                let bytes = buffer.get(..len).unwrap_or_default();
                self.message(key, bytes, now, takes, wire, judge)
            }
            Err(Errno::WOULDBLOCK | Errno::INTR) => false,
            Err(_) => {
                self.close(key, now);
                false
            }
        };
        self.buffer = buffer;
        has_more
    }

    fn message(
        &mut self,
        key: usize,
        bytes: &[u8],
        now: Instant,
        takes: Takes,
        wire: &mut impl Wire,
        judge: &mut impl Judge,
    ) -> bool {
        let Some(peer) = self.peers.get(key) else {
            return false;
        };
        match message::parse(bytes) {
            Ok(Message::Frame(header, frame)) if peer.is.is_some() => {
                self.frame(key, &header, frame, now, takes, wire, judge);
                true
            }
            Ok(Message::Announcement(is)) => self.introduce(key, is, now),
            other => {
                self.view.lan.stats.all.malformed.inc();
                peer.stats.malformed.inc();
                match other {
                    Err(error) => self.warn(format_args!("a card of the network: {error}")),
                    Ok(_) => {
                        self.warn(format_args!("a card of the network has not said who it is"))
                    }
                }
                self.close(key, now);
                false
            }
        }
    }

    /// A peer has said who it is. False: it was refused.
    fn introduce(&mut self, key: usize, is: Announcement, now: Instant) -> bool {
        let lan = Arc::clone(&self.view.lan);
        let id = Id::new(is.mac);
        let own = lan.meeting.id();
        let is_taken = |(other, peer): (usize, &Peer)| {
            other != key && peer.is.as_ref().is_some_and(|other| other.mac == is.mac)
        };
        let has_another = self.peers.iter().any(is_taken);
        let Some(peer) = self.peers.get_mut(key) else {
            return false;
        };
        let was = peer.is.as_ref().map(|was| was.mac);
        // Who connects has the higher address; nobody becomes another one.
        let is_right = match peer.expected {
            Some(expected) => id == expected,
            None => id > own && was.is_none_or(|was| was == is.mac),
        };
        if !is_right || has_another {
            if has_another {
                lan.stats.crowded.inc();
            } else {
                lan.stats.all.spoofed.inc();
            }
            self.warn(format_args!(
                "a card of the network says that it serves {}, which it cannot",
                is.mac
            ));
            self.close(key, now);
            return false;
        }
        if was.is_none() {
            peer.stats = lan.peer_stats(id);
            tracing::info!(mac = %is.mac, name = is.name, "a member of the network has come");
            if is.mtu != lan.spec.mtu {
                tracing::warn!(
                    mac = %is.mac, theirs = is.mtu, ours = lan.spec.mtu,
                    "a member of the network has another MTU: packets longer than a receiver's are dropped"
                );
            }
        }
        peer.is = Some(is);
        peer.wait = RETRY_MIN;
        let said = peer.is.as_ref().map_or(0, |is| is.addresses.len());
        self.tell_members();
        let members = self.view.members.list().iter();
        if let Some(member) = members.clone().find(|member| member.peer == key)
            && member.is.addresses.len() < said
        {
            let mac = member.is.mac;
            self.warn(format_args!(
                "the member {mac} has addresses that are taken or not of this network; give each guest its own"
            ));
        }
        true
    }

    #[allow(clippy::too_many_arguments)] // one call, one place
    fn frame(
        &mut self,
        key: usize,
        header: &NetHeader,
        bytes: &[u8],
        now: Instant,
        takes: Takes,
        wire: &mut impl Wire,
        judge: &mut impl Judge,
    ) {
        let Some(peer) = self.peers.get(key) else {
            return;
        };
        let lan = &self.view.lan;
        let stats = [&*peer.stats, &lan.stats.all];
        let Some(frame) = traffic::parse(header, bytes) else {
            stats.iter().for_each(|stats| stats.malformed.inc());
            return;
        };
        let from = traffic::packet(&frame).filter(|packet| {
            let member = self.view.members.by_address(packet.source);
            let is_senders = member.is_some_and(|member| member.peer == key)
                && peer.is.as_ref().is_some_and(|is| is.mac == frame.source);
            is_senders
                && frame.destination == lan.spec.mac
                && self.view.own.contains(packet.destination)
        });
        let Some(packet) = from else {
            stats.iter().for_each(|stats| stats.spoofed.inc());
            return;
        };
        let may = match traffic::kind(&frame, packet, Direction::In) {
            Kind::Flow(meta) => judge.lets_pass(Direction::In, &meta, now),
            Kind::Error(flow) => judge.lets_error_pass(&flow, now),
            Kind::Fragment | Kind::Never => false,
        };
        if !may {
            stats.iter().for_each(|stats| stats.denied_in.inc());
            return;
        }
        if !wire.has_room() {
            stats.iter().for_each(|stats| stats.dropped_in.inc());
            return;
        }
        let send = |header, bytes: &[u8]| wire.send(header, bytes);
        match segment::deliver(&frame, takes, lan.spec.mtu, &mut self.scratch, send) {
            Ok(()) => {
                for stats in stats {
                    stats.frames_in.inc();
                    stats.bytes_in.add((packet.end) as u64);
                }
            }
            Err(_) => stats.iter().for_each(|stats| stats.unfit.inc()),
        }
    }
}

fn send(fd: &OwnedFd, parts: &[&[u8]]) -> Sent {
    let slices: smallvec::SmallVec<[IoSlice<'_>; 3]> =
        parts.iter().map(|part| IoSlice::new(part)).collect();
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    match rustix::net::sendmsg(fd, &slices, &mut SendAncillaryBuffer::default(), flags) {
        Ok(_) => Sent::Gone,
        Err(Errno::WOULDBLOCK | Errno::INTR) => Sent::Later,
        Err(_) => Sent::Never,
    }
}

#[cfg(test)]
mod tests;
