//! The card's own side of a queue pair: its services and its policy, as the data path calls them.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::card::Local;
use crate::frame::Frame;
use crate::local::{Decision, Direction, Meta, Outbox, TcpService, Verdict};
use crate::policy::{Policy, PolicyOptions, SharedRules};
use crate::services::Services;
use crate::services::dns::Dns;
use crate::services::imds::Imds;
use crate::spec::Spec;
use crate::stack::Locals;

/// How often silent flows of the connection tracking are looked for.
const EXPIRE_INTERVAL: Duration = Duration::from_secs(5);

/// What services and policy are told, the same for each pair.
#[derive(Clone, Debug, Default)]
pub struct LocalOptions {
    /// Security groups; `None`: everything is allowed, and nothing is tracked.
    pub rules: Option<Arc<SharedRules>>,
    /// How policy behaves.
    pub policy: PolicyOptions,
    /// The metadata service; `None`: connections to it are refused.
    pub imds: Option<Arc<Imds>>,
    /// Names of other machines on the guest's network.
    pub peers: Vec<(String, Vec<IpAddr>)>,
}

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
    pub fn new(spec: &Arc<Spec>, options: &LocalOptions, advertises: bool, now: Instant) -> Self {
        let policy = options.rules.as_ref().map(|rules| {
            let (spec, rules) = (Arc::clone(spec), Arc::clone(rules));
            Policy::new(spec, rules, &options.policy, None, now)
        });
        let dns = Dns::new(spec, &options.peers, Box::new(random));
        let mut services = Services::new(Arc::clone(spec), advertises, now).with_dns(dns);
        if let Some(imds) = &options.imds {
            services = services.with_imds(Arc::clone(imds));
        }
        Self {
            services,
            policy,
            expire_at: now + EXPIRE_INTERVAL,
        }
    }
}

impl Locals for LocalSide {
    fn connect(&mut self, to: SocketAddr, _: SocketAddr) -> Option<Box<dyn TcpService>> {
        self.services.connect(to, Instant::now())
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

    fn answered(&mut self, token: u64, payload: &[u8], now: Instant, out: &mut Outbox) {
        self.services.answered(token, payload, now, out);
    }

    fn observes(&self) -> bool {
        self.policy.is_some()
    }

    fn observe(&mut self, meta: &Meta, now: Instant) {
        if let Some(policy) = &mut self.policy {
            policy.observe(meta, now);
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

/// The id of a question. Without randomness the random port has to do.
fn random() -> u16 {
    let mut bytes = [0; 2];
    let _ = getrandom::fill(&mut bytes);
    u16::from_ne_bytes(bytes)
}
