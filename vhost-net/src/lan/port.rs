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
//!
//! This file has who is there and how they meet; `outward` what goes to them, `inward` what comes.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use offload::telemetry::{RateLimited, shown};
use slab::Slab;

use super::meeting::Id;
use super::message::{Announcement, MESSAGE_MAX};
use super::segment::Takes;
use super::{Lan, MEMBERS_MAX, PATIENCE, PeerStats, View};
use crate::card::CardStats;
use crate::frame::reassembly::Reassembly;
use crate::local::{Direction, FlowKey, Meta};
use crate::stack::{Event, Wire};

mod inward;
mod outward;

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
    /// Packets of the guest's that are not whole yet.
    fragments: Reassembly,
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
            fragments: Reassembly::default(),
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
        let ends = ends.chain(self.fragments.deadline());
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
        self.expire_fragments(now, card);
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
}

#[cfg(test)]
mod tests;
