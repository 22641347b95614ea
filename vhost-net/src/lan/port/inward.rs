//! What the peers say: announcements, and frames for the own guest.

use std::sync::Arc;
use std::time::Instant;

use rustix::io::Errno;
use rustix::net::RecvFlags;

use super::super::meeting::Id;
use super::super::message::{self, Announcement, Message};
use super::super::segment::{self, Takes};
use super::super::traffic::{self, Kind};
use super::{Judge, Peer, Port, RETRY_MIN, ROUND, TURN};
use crate::frame::header::NetHeader;
use crate::local::Direction;
use crate::stack::Wire;

impl Port {
    pub(super) fn receive(
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
