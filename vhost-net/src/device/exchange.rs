//! What queue pairs hand to each other, where there are several.
//!
//! ```text
//!  transmit queue of pair 1 ──► pair 1 ── the flow is pair 0's ──► inbox of pair 0 ──► pair 0
//!
//!  pair 1's flows ── its receive queue does not run ──► inbox of pair 0 ──► receive queue of pair 0
//! ```
//!
//! - **Frames from the guest** of a flow that another pair has (see [`crate::stack::Owners`]) are
//!   copied into that pair's inbox. A full inbox keeps the chain with the pair that has it: its
//!   transmit ring fills up, as it does when the card is too slow in any other way, and nothing is
//!   lost. An inbox is emptied in each round whatever state the guest's rings are in, so nobody
//!   waits for ever, nor do two for each other.
//! - **Frames to the guest** go through pair 0 while a pair's own receive queue does not run or is
//!   disabled: a driver may use fewer pairs than there are (`ethtool -L`, or it never set the others
//!   up), and a device must not use the queues above then (virtio 1.3, 5.1.6.5.6.1). The control
//!   queue with its VQ_PAIRS_SET is the frontend's: QEMU tells a backend by SET_VRING_ENABLE, queue
//!   by queue, and flows opened before live on. If pair 0 takes no more, the pair's flows stand
//!   still as if their own queue had no buffers.
//! - **Datagrams from a published port**, which pair 0 receives, of a flow that the guest began on
//!   another pair.
//!
//! An inbox is a locked queue, looked at when its flag says so. With one pair there is none.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use offload::worker::Waker;

use crate::frame::header::NetHeader;

/// Frames and bytes from which on an inbox takes no more frames from the guest.
const FROM_GUEST_FRAMES: usize = 256;
const FROM_GUEST_BYTES: usize = 4 << 20;
/// The same for frames to the guest: fewer than may wait for buffers.
const TO_GUEST_FRAMES: usize = 64;

/// Something for another pair.
#[derive(Debug)]
pub(super) enum Mail {
    /// A frame of a flow of that pair's, with the driver's header.
    Frame(NetHeader, Box<[u8]>),
    /// What a peer sent to a published port that leads to this port of the guest's.
    Datagram(SocketAddr, u16, Box<[u8]>),
}

/// A frame for the guest.
pub(super) type ToGuest = (NetHeader, Box<[u8]>);

#[derive(Debug, Default)]
struct Inbox {
    /// Each with the session it is of.
    from_guest: VecDeque<(u64, Mail)>,
    from_guest_bytes: usize,
    to_guest: VecDeque<(u64, ToGuest)>,
    /// A bit for each pair that waits for room.
    waiting: u64,
}

#[derive(Debug, Default)]
struct Post {
    inbox: Mutex<Inbox>,
    has_mail: AtomicBool,
    waker: OnceLock<Waker>,
}

impl Post {
    fn lock(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        if let Some(waker) = self.waker.get() {
            waker.wake();
        }
    }
}

/// The inboxes of all pairs of an interface, at most 64.
#[derive(Debug)]
pub(super) struct Exchange {
    posts: Box<[Post]>,
}

impl Exchange {
    pub(super) fn new(pairs: u16) -> Self {
        Self {
            posts: (0..pairs).map(|_| Post::default()).collect(),
        }
    }

    /// Says how to wake a pair.
    pub(super) fn register(&self, pair: u16, waker: Waker) {
        if let Some(post) = self.posts.get(usize::from(pair)) {
            // The thread of a pair is made once.
            let _ = post.waker.set(waker);
        }
    }
}

/// One pair's access to the exchange.
#[derive(Debug)]
pub(super) struct Link {
    exchange: Arc<Exchange>,
    pair: u16,
    /// What is handed over in another one is void.
    pub(super) session: u64,
}

impl Link {
    pub(super) fn new(exchange: Arc<Exchange>, pair: u16) -> Self {
        Self {
            exchange,
            pair,
            session: 0,
        }
    }

    fn post(&self, pair: u16) -> Option<&Post> {
        self.exchange.posts.get(usize::from(pair))
    }

    /// Hands something to another pair. `must`: even if its inbox is full.
    ///
    /// False: it is full, and this pair will be woken when it is not. Nobody to take it: it is
    /// dropped.
    pub(super) fn hand(&self, to: u16, must: bool, mail: impl FnOnce() -> Mail) -> bool {
        let Some(post) = self.post(to) else {
            return true;
        };
        let mut inbox = post.lock();
        let is_full = inbox.from_guest.len() >= FROM_GUEST_FRAMES
            || inbox.from_guest_bytes >= FROM_GUEST_BYTES;
        if is_full && !must {
            inbox.waiting |= 1 << self.pair;
            return false;
        }
        let mail = mail();
        inbox.from_guest_bytes += match &mail {
            Mail::Frame(_, bytes) | Mail::Datagram(.., bytes) => bytes.len(),
        };
        inbox.from_guest.push_back((self.session, mail));
        post.has_mail.store(true, Ordering::Release);
        drop(inbox);
        post.wake();
        true
    }

    /// Whether pair 0 takes a frame for the guest. If not, this pair will be woken when it does.
    pub(super) fn has_room_to_guest(&self) -> bool {
        let Some(post) = self.post(0) else {
            return false;
        };
        let mut inbox = post.lock();
        let has_room = inbox.to_guest.len() < TO_GUEST_FRAMES;
        if !has_room {
            inbox.waiting |= 1 << self.pair;
        }
        has_room
    }

    /// Leaves a frame for the guest to pair 0. False: it is lost.
    pub(super) fn to_guest(&self, header: NetHeader, frame: &[u8]) -> bool {
        let Some(post) = self.post(0) else {
            return false;
        };
        let mut inbox = post.lock();
        // Some more than there is room for: answers that were not asked whether there is room.
        if inbox.to_guest.len() >= 2 * TO_GUEST_FRAMES {
            return false;
        }
        let mail = (self.session, (header, frame.into()));
        inbox.to_guest.push_back(mail);
        post.has_mail.store(true, Ordering::Release);
        drop(inbox);
        post.wake();
        true
    }

    /// Takes what was handed to this pair; frames for the guest only if they are wanted. Those who
    /// waited for room are woken.
    pub(super) fn take(&self, wants_to_guest: bool) -> Option<(Vec<Mail>, Vec<ToGuest>)> {
        let post = self.post(self.pair)?;
        if !post.has_mail.load(Ordering::Acquire) {
            return None;
        }
        let mut inbox = post.lock();
        let from_guest = std::mem::take(&mut inbox.from_guest);
        inbox.from_guest_bytes = 0;
        let to_guest = if wants_to_guest {
            std::mem::take(&mut inbox.to_guest)
        } else {
            VecDeque::new()
        };
        let is_empty = inbox.to_guest.is_empty();
        post.has_mail.store(!is_empty, Ordering::Release);
        let waiting = std::mem::take(&mut inbox.waiting);
        drop(inbox);
        for (pair, post) in (0_u32..).zip(&self.exchange.posts) {
            if waiting.checked_shr(pair).unwrap_or(0) & 1 != 0 {
                post.wake();
            }
        }
        Some((self.current(from_guest), self.current(to_guest)))
    }

    fn current<T>(&self, mails: VecDeque<(u64, T)>) -> Vec<T> {
        let of_now = |(session, mail)| (session == self.session).then_some(mail);
        mails.into_iter().filter_map(of_now).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn links() -> [Link; 2] {
        let exchange = Arc::new(Exchange::new(2));
        [0, 1].map(|pair| Link::new(Arc::clone(&exchange), pair))
    }

    fn frame(len: usize) -> impl FnOnce() -> Mail {
        move || Mail::Frame(NetHeader::default(), vec![7; len].into())
    }

    #[test]
    fn a_full_inbox_refuses_and_takes_again_when_it_was_emptied() {
        for len in [60, 1 << 16] {
            let [a, b] = links();
            let mut handed = 0;
            while b.hand(0, false, frame(len)) {
                handed += 1;
                assert!(handed <= FROM_GUEST_FRAMES);
            }
            assert!(handed >= 64, "{handed} of {len} bytes");
            assert!(b.hand(0, true, frame(len)));
            let (mails, _) = a.take(true).unwrap();
            assert_eq!(mails.len(), handed + 1);
            assert!(a.take(true).is_none());
            assert!(b.hand(0, false, frame(len)));
        }
    }

    #[test]
    fn frames_for_the_guest_wait_until_they_are_wanted_and_are_few() {
        let [a, b] = links();
        let mut given = 0;
        while b.has_room_to_guest() {
            assert!(b.to_guest(NetHeader::default(), &[1; 60]));
            given += 1;
        }
        assert_eq!(given, TO_GUEST_FRAMES);
        let (_, none) = a.take(false).unwrap();
        assert!(none.is_empty() && !b.has_room_to_guest());
        while b.to_guest(NetHeader::default(), &[1; 60]) {
            given += 1;
        }
        assert_eq!(given, 2 * TO_GUEST_FRAMES);
        let (_, all) = a.take(true).unwrap();
        assert_eq!(all.len(), given);
        assert!(b.has_room_to_guest());
    }

    #[test]
    fn what_is_of_another_session_is_void() {
        let [mut a, mut b] = links();
        b.session = 1;
        assert!(b.hand(0, false, frame(60)));
        assert!(b.to_guest(NetHeader::default(), &[1; 60]));
        a.session = 2;
        let (mails, frames) = a.take(true).unwrap();
        assert!(mails.is_empty() && frames.is_empty());
    }
}
