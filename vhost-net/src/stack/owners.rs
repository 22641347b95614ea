//! Which queue pair a flow belongs to, where there are several.
//!
//! A flow stays with the pair that opened it: its sockets, its timers and what policy knows of it
//! live on that pair's thread. A driver sends the frames of a flow through whichever transmit queue
//! it likes, and moves it in the middle (Linux chooses by the processor that sends), so a pair that
//! gets a frame of a flow which it does not have asks here whose it is and hands it over.
//!
//! Other ways: **by a hash of the addresses and ports.** It needs no table, but hands over all but
//! one in N frames for ever; with a table a flow that stays on its queue, as nearly all do, never
//! leaves its thread. It also keeps the rule of virtio 1.3, 5.1.6.5.6.1, that what comes back
//! should use the queue of the pair on which the flow was sent, until the driver moves it.
//! **Moving the flow after the frames** would keep that rule always, but a sender that jumps
//! between processors would drag the connection and its host's socket along each time.
//!
//! The table is looked at for the first packet of a flow and for those of flows that are not the
//! pair's own; a packet of an own flow finds it in the pair's table and touches nothing shared.
//! With a single pair there is no such table at all.

use std::collections::HashMap;
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::local::FlowKey;

/// Parts with a lock each: threads that open flows at the same time seldom meet.
const SHARDS: usize = 16;

type Hasher = foldhash::fast::RandomState;

/// See the module.
#[derive(Debug)]
pub struct Owners {
    shards: [Mutex<HashMap<FlowKey, u16, Hasher>>; SHARDS],
    hasher: Hasher,
    count: AtomicUsize,
    flows_max: usize,
}

/// What came of wanting a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Claim {
    /// The flow is the asker's from now on, until it lets go of it.
    Granted,
    /// It is this pair's.
    Of(u16),
    /// There are as many flows as there may be.
    Full,
}

/// A pair's access to [`Owners`].
#[derive(Clone, Debug)]
pub struct Share {
    /// Shared by all pairs.
    pub owners: Arc<Owners>,
    /// The pair.
    pub pair: u16,
}

impl Owners {
    /// Nobody owns anything; all pairs together may own `flows_max` flows.
    #[must_use]
    pub fn new(flows_max: usize) -> Self {
        Self {
            shards: Default::default(),
            hasher: Hasher::default(),
            count: AtomicUsize::new(0),
            flows_max,
        }
    }

    fn shard(&self, key: &FlowKey) -> MutexGuard<'_, HashMap<FlowKey, u16, Hasher>> {
        let at = self.hasher.hash_one(key) as usize % SHARDS;
        let shard = &self.shards[at];
        shard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Share {
    /// The pair that has a flow, if it is another one.
    pub(super) fn elsewhere(&self, key: &FlowKey) -> Option<u16> {
        let owner = self.owners.shard(key).get(key).copied();
        owner.filter(|owner| *owner != self.pair)
    }

    /// Asks for a flow that this pair does not have.
    pub(super) fn claim(&self, key: &FlowKey) -> Claim {
        let mut shard = self.owners.shard(key);
        match shard.get(key) {
            Some(&owner) if owner != self.pair => Claim::Of(owner),
            Some(_) => Claim::Granted,
            None => {
                // Counted first, so that pairs that open at the same time do not pass the limit.
                if self.owners.count.fetch_add(1, Ordering::Relaxed) >= self.owners.flows_max {
                    self.owners.count.fetch_sub(1, Ordering::Relaxed);
                    return Claim::Full;
                }
                shard.insert(*key, self.pair);
                Claim::Granted
            }
        }
    }

    /// Lets go of a flow of this pair's; of no other's.
    pub(super) fn release(&self, key: &FlowKey) {
        let mut shard = self.owners.shard(key);
        if shard.get(key) == Some(&self.pair) {
            shard.remove(key);
            self.owners.count.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(port: u16) -> FlowKey {
        FlowKey {
            protocol: 6,
            guest: ([10, 0, 2, 15], port).into(),
            peer: ([192, 0, 2, 1], 80).into(),
        }
    }

    fn pairs(flows_max: usize) -> [Share; 2] {
        let owners = Arc::new(Owners::new(flows_max));
        [0, 1].map(|pair| Share {
            owners: Arc::clone(&owners),
            pair,
        })
    }

    #[test]
    fn a_flow_is_the_first_claimants_until_it_lets_go() {
        let [a, b] = pairs(10);
        assert_eq!(a.claim(&key(1)), Claim::Granted);
        assert_eq!(a.claim(&key(1)), Claim::Granted);
        assert_eq!(b.claim(&key(1)), Claim::Of(0));
        assert_eq!(
            (a.elsewhere(&key(1)), b.elsewhere(&key(1))),
            (None, Some(0))
        );
        b.release(&key(1));
        assert_eq!(b.claim(&key(1)), Claim::Of(0));
        a.release(&key(1));
        assert_eq!(b.claim(&key(1)), Claim::Granted);
        assert_eq!(a.elsewhere(&key(1)), Some(1));
    }

    #[test]
    fn all_pairs_together_have_as_many_flows_as_there_may_be() {
        let [a, b] = pairs(2);
        assert_eq!(a.claim(&key(1)), Claim::Granted);
        assert_eq!(b.claim(&key(2)), Claim::Granted);
        assert_eq!(b.claim(&key(3)), Claim::Full);
        assert_eq!(b.claim(&key(1)), Claim::Of(0));
        b.release(&key(1));
        assert_eq!(a.claim(&key(3)), Claim::Full);
        b.release(&key(2));
        assert_eq!(a.claim(&key(3)), Claim::Granted);
    }
}
