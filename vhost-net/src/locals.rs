//! The card's own side of a queue pair: its services and its policy, as the data path calls them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::card::Local;
use crate::frame::Frame;
use crate::local::{Decision, Direction, Meta, Outbox, TcpService, Verdict};
use crate::policy::{Policy, PolicyOptions, SharedRules};
use crate::services::Services;
use crate::spec::Spec;
use crate::stack::Locals;

/// How often silent flows of the connection tracking are looked for.
const EXPIRE_INTERVAL: Duration = Duration::from_secs(5);

/// See the module.
#[derive(Debug)]
pub struct LocalSide {
    services: Services,
    /// `None`: everything is allowed, and nothing is tracked.
    policy: Option<Policy>,
    expire_at: Instant,
}

impl LocalSide {
    /// For one pair of an interface. One pair alone advertises the router by itself.
    #[must_use]
    pub fn new(
        spec: &Arc<Spec>,
        rules: Option<&Arc<SharedRules>>,
        advertises: bool,
        now: Instant,
    ) -> Self {
        let options = PolicyOptions::default();
        let policy = rules
            .map(|rules| Policy::new(Arc::clone(spec), Arc::clone(rules), &options, None, now));
        Self {
            services: Services::new(Arc::clone(spec), advertises, now),
            policy,
            expire_at: now + EXPIRE_INTERVAL,
        }
    }
}

impl Locals for LocalSide {
    fn connect(&mut self, _: SocketAddr, _: SocketAddr) -> Option<Box<dyn TcpService>> {
        None
    }
}

impl Local for LocalSide {
    fn frame(&mut self, frame: &Frame<'_>, now: Instant, out: &mut Outbox) -> Verdict {
        self.services
            .receive(frame.bytes, !frame.is_partial, now, out)
    }

    fn allows(&mut self, direction: Direction, meta: &Meta, now: Instant) -> bool {
        match &mut self.policy {
            Some(policy) => policy.check(direction, meta, now) == Decision::Allow,
            None => true,
        }
    }

    fn poll(&mut self, now: Instant, out: &mut Outbox) {
        self.services.poll(now, out);
        if let Some(policy) = &mut self.policy
            && self.expire_at <= now
        {
            let has_more = policy.expire(now);
            self.expire_at = now
                + if has_more {
                    Duration::ZERO
                } else {
                    EXPIRE_INTERVAL
                };
        }
    }

    fn deadline(&self) -> Option<Instant> {
        let expire = self.policy.as_ref().map(|_| self.expire_at);
        let ends = [self.services.poll_at(), expire];
        ends.into_iter().flatten().min()
    }
}
