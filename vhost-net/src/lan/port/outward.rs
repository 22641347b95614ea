//! What the own guest and the own card say: frames and announcements, to the peers' sockets.

use std::io::IoSlice;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendFlags};
use smoltcp::wire::EthernetAddress;

use super::super::message::{self, Announcement};
use super::super::traffic::{self, Kind};
use super::super::{QUEUE_BYTES, QUEUE_FRAMES, lock};
use super::{Judge, Port};
use crate::card::CardStats;
use crate::frame::Frame;
use crate::frame::header::NetHeader;
use crate::frame::reassembly::Outcome;
use crate::local::Direction;

/// What sending came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sent {
    Gone,
    Later,
    /// The connection is of no use any more, which its next event says too.
    Never,
}

impl Port {
    /// Says what has changed about the own guest.
    pub(super) fn announce(&mut self) {
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
    pub(super) fn flush(&mut self, key: usize) {
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
                if let Some(whole) = self.gather(&frame, now, card) {
                    self.from_guest(&NetHeader::default(), &whole, now, judge, card);
                }
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

    /// Keeps a fragment, unless it was the last one that was missing of a packet.
    fn gather(&mut self, frame: &Frame<'_>, now: Instant, card: &CardStats) -> Option<Box<[u8]>> {
        match card.gather(&mut self.fragments, frame, now) {
            Outcome::Whole(whole) => Some(whole),
            Outcome::Kept | Outcome::Void | Outcome::Malformed(_) => None,
        }
    }

    /// Gives up packets whose fragments did not come in time.
    pub(super) fn expire_fragments(&mut self, now: Instant, card: &CardStats) {
        while self.fragments.expire(now).is_some() {
            card.fragments_late();
        }
    }

    pub(super) fn send(
        &mut self,
        member: &Announcement,
        key: usize,
        header: &NetHeader,
        frame: &[u8],
    ) {
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

    pub(super) fn take_handed(&mut self, now: Instant, judge: &mut impl Judge, card: &CardStats) {
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
