//! What a card tells without being asked: the way from any thread to the server's.
//!
//! A sender never waits. Lines are queued for the server's thread, which is woken by an eventfd and
//! copies them to each client that called `events`; how much may wait for a slow client is the
//! session's matter.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use serde_json::{Value, json};

/// Events that may wait for the server's thread; of more, the oldest are dropped.
const PENDING_MAX: usize = 256;

/// Sends events to all subscribed clients. Clones are the same.
#[derive(Clone, Debug)]
pub struct EventSender(Arc<Hub>);

#[derive(Debug)]
struct Hub {
    pending: Mutex<VecDeque<Arc<[u8]>>>,
    bell: OwnedFd,
}

impl EventSender {
    pub(super) fn new() -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Self(Arc::new(Hub {
            pending: Mutex::default(),
            bell: eventfd(0, flags)?,
        })))
    }

    /// Tells every subscribed client `{"event":{"kind":kind, ..fields}}`; `fields` is an object. Never
    /// blocks; without subscribers it is forgotten.
    pub fn send(&self, kind: &str, fields: Value) {
        let mut event = match fields {
            Value::Object(fields) => fields,
            _ => serde_json::Map::new(),
        };
        event.insert("kind".to_owned(), json!(kind));
        let line = json!({ "event": event }).to_string() + "\n";
        let mut pending = self.pending();
        if pending.len() >= PENDING_MAX {
            pending.pop_front();
        }
        pending.push_back(line.into_bytes().into());
        drop(pending);
        // A counter that is full is readable as well.
        let _ = rustix::io::write(&self.0.bell, &1_u64.to_ne_bytes());
    }

    /// Readable when events wait.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.0.bell.as_fd()
    }

    /// All events that wait.
    pub(super) fn take(&self) -> VecDeque<Arc<[u8]>> {
        let _ = rustix::io::read(&self.0.bell, &mut [0; 8]);
        std::mem::take(&mut *self.pending())
    }

    fn pending(&self) -> MutexGuard<'_, VecDeque<Arc<[u8]>>> {
        self.0
            .pending
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_that_nobody_takes_cost_a_bounded_amount() {
        let sender = EventSender::new().unwrap();
        for number in 0..PENDING_MAX + 10 {
            sender.send("count", json!({ "number": number }));
        }
        let pending = sender.take();
        assert_eq!(pending.len(), PENDING_MAX);
        assert_eq!(
            &pending[0][..],
            b"{\"event\":{\"kind\":\"count\",\"number\":10}}\n"
        );
        assert!(sender.take().is_empty());
    }
}
