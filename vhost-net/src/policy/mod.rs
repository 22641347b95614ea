//! What may pass between guest and network: source check, security groups, flow log.
//!
//! ```text
//!  packet ─► source check ─► tracked? ──yes──────────────────────► allowed
//!                               │no
//!                               ▼
//!                            service of the card's? ──yes──► tracked, allowed
//!                               │no
//!                               ▼
//!                            rules of its direction ──one allows──► tracked, allowed
//!                               │none                  (table full: refused)
//!                               ▼
//!                            refused, silently, as in a VPC
//! ```
//!
//! The rules are seen by the first packet of a flow only; replies, in either direction, belong to
//! the flow. So a change of rules does not cut what is tracked, as AWS documents it for tracked
//! connections: it is new flows that the new rules decide. DHCP, DNS, time and metadata of the card
//! itself are not filtered.
//!
//! Each queue's thread has its own [`Policy`] with its own table of flows: the stack keeps a flow on
//! one thread, and so no lock is shared on the path of a packet. They share the rules
//! ([`SharedRules`]): a packet that begins a flow looks at one counter to see whether they have
//! changed. Rule counters are relaxed atomics, touched once a flow.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use serde::Serialize;

use crate::local::{Decision, Direction, FlowKey, Meta};
use crate::spec::Spec;

pub mod conntrack;
pub mod flowfile;
pub mod flowlog;
pub mod groups;
pub mod observe;
pub mod pcap;

use conntrack::{Conntrack, Timeouts};
use flowlog::FlowLog;
use groups::{GroupsError, GroupsSpec, Rule, RuleSpec};

/// Flows that one queue's thread can track unless it is told otherwise: about 10 MB when full.
pub const FLOWS: usize = 65_536;

/// The rules of an interface with their counters, shared by its queues.
#[derive(Debug)]
pub struct SharedRules {
    /// Changes with `current`; starts at 1.
    generation: AtomicU64,
    current: Mutex<Arc<RuleSet>>,
}

/// Rules as they were at one time.
#[derive(Debug, Default)]
struct RuleSet {
    spec: GroupsSpec,
    /// See [`SharedRules::set_members`].
    members: BTreeMap<String, Vec<IpAddr>>,
    ingress: Vec<Counted>,
    egress: Vec<Counted>,
}

/// A rule and how many flows it has let begin. The count stays with a rule over changes.
#[derive(Debug)]
struct Counted {
    rule: Rule,
    flows: Arc<AtomicU64>,
}

/// A rule as the control socket shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RuleReport {
    /// `ingress` or `egress`.
    pub direction: &'static str,
    /// The group that it is of.
    pub group: String,
    /// The rule.
    pub rule: RuleSpec,
    /// Flows that began because of it.
    pub flows: u64,
}

impl SharedRules {
    /// # Errors
    ///
    /// What is wrong with the groups.
    pub fn new(spec: GroupsSpec) -> Result<Self, GroupsError> {
        let set = RuleSet::new(spec, BTreeMap::new(), &RuleSet::default())?;
        Ok(Self {
            generation: AtomicU64::new(1),
            current: Mutex::new(Arc::new(set)),
        })
    }

    /// Changes the rules for flows that begin from now on. Rules that stay keep their counts.
    ///
    /// # Errors
    ///
    /// What is wrong with the groups; the old rules then stay.
    pub fn replace(&self, spec: GroupsSpec) -> Result<(), GroupsError> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let members = current.members.clone();
        *current = Arc::new(RuleSet::new(spec, members, &current)?);
        self.generation.fetch_add(1, Ordering::Release);
        Ok(())
    }

    /// Changes with the rules.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Addresses that are in groups besides the members that were written down: what a private network
    /// says of its members. For flows that begin from now on.
    pub fn set_members(&self, members: BTreeMap<String, Vec<IpAddr>>) {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.members == members {
            return;
        }
        let spec = current.spec.clone();
        // The groups were right before, and members cannot make them wrong.
        if let Ok(set) = RuleSet::new(spec, members, &current) {
            *current = Arc::new(set);
            self.generation.fetch_add(1, Ordering::Release);
        }
    }

    /// The groups as they were given last.
    #[must_use]
    pub fn spec(&self) -> GroupsSpec {
        self.load().1.spec.clone()
    }

    /// Each rule of the interface with its count.
    #[must_use]
    pub fn report(&self) -> Vec<RuleReport> {
        let set = self.load().1;
        let ingress = set.ingress.iter().map(|rule| ("ingress", rule));
        let egress = set.egress.iter().map(|rule| ("egress", rule));
        ingress
            .chain(egress)
            .map(|(direction, counted)| RuleReport {
                direction,
                group: counted.rule.group.clone(),
                rule: counted.rule.spec.clone(),
                flows: counted.flows.load(Ordering::Relaxed),
            })
            .collect()
    }

    fn load(&self) -> (u64, Arc<RuleSet>) {
        let current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        (self.generation.load(Ordering::Acquire), current.clone())
    }
}

impl RuleSet {
    fn new(
        spec: GroupsSpec,
        members: BTreeMap<String, Vec<IpAddr>>,
        old: &Self,
    ) -> Result<Self, GroupsError> {
        let rules = spec.compile_with(&members)?;
        let count = |rules: Vec<Rule>, old: &[Counted]| {
            let mut left: Vec<_> = old.iter().map(Some).collect();
            rules
                .into_iter()
                .map(|rule| {
                    let same = left.iter_mut().find(|slot| {
                        slot.is_some_and(|it| {
                            it.rule.group == rule.group && it.rule.spec == rule.spec
                        })
                    });
                    let kept = same.and_then(Option::take);
                    Counted {
                        rule,
                        flows: kept.map(|it| it.flows.clone()).unwrap_or_default(),
                    }
                })
                .collect()
        };
        Ok(Self {
            ingress: count(rules.ingress, &old.ingress),
            egress: count(rules.egress, &old.egress),
            spec,
            members,
        })
    }
}

/// What was decided. Packets as they would be on a wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PolicyStats {
    /// Flows that began.
    pub flows: u64,
    /// Packets from the guest that no rule allowed.
    pub denied_out: u64,
    /// Packets to the guest that no rule allowed.
    pub denied_in: u64,
    /// Packets whose address at the guest's end is not the guest's.
    pub source_check: u64,
    /// Packets that would have begun a flow when the table was full.
    pub table_full: u64,
}

/// How a [`Policy`] behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PolicyOptions {
    /// Refuse packets whose address at the guest's end is not the guest's.
    pub source_check: bool,
    /// Flows that can be tracked.
    pub flows: usize,
    /// When they are forgotten.
    pub timeouts: Timeouts,
}

impl Default for PolicyOptions {
    fn default() -> Self {
        Self {
            source_check: true,
            flows: FLOWS,
            timeouts: Timeouts::default(),
        }
    }
}

/// The policy of an interface as one queue's thread has it.
#[derive(Debug)]
pub struct Policy {
    spec: Arc<Spec>,
    source_check: bool,
    shared: Arc<SharedRules>,
    generation: u64,
    rules: Arc<RuleSet>,
    flows: Conntrack,
    log: Option<FlowLog>,
    stats: PolicyStats,
}

impl Policy {
    /// `log` is the flow log, if there is one.
    #[must_use]
    pub fn new(
        spec: Arc<Spec>,
        shared: Arc<SharedRules>,
        options: &PolicyOptions,
        log: Option<FlowLog>,
        now: Instant,
    ) -> Self {
        let (generation, rules) = shared.load();
        Self {
            spec,
            source_check: options.source_check,
            shared,
            generation,
            rules,
            flows: Conntrack::new(options.flows, &options.timeouts, now),
            log,
            stats: PolicyStats::default(),
        }
    }

    /// Counters.
    #[must_use]
    pub fn stats(&self) -> PolicyStats {
        self.stats
    }

    /// Flows tracked now.
    #[must_use]
    pub fn tracked(&self) -> usize {
        self.flows.len()
    }

    /// The flow log, to have its windows taken.
    pub fn log(&mut self) -> Option<&mut FlowLog> {
        self.log.as_mut()
    }

    /// Decides about a packet, and follows its flow.
    pub fn check(&mut self, direction: Direction, meta: &Meta, now: Instant) -> Decision {
        if self.source_check && !self.spec.is_guest(meta.key.guest.ip()) {
            self.stats.source_check += u64::from(meta.packets);
            // Its addresses are a lie, so it is in no flow log either.
            return Decision::Deny;
        }
        let decision = if self.flows.follow(direction, meta, now) {
            Decision::Allow
        } else {
            self.begin(direction, meta, now)
        };
        if let Some(log) = &mut self.log
            && !is_service(&self.spec, &meta.key)
        {
            log.record(direction, meta, decision, now);
        }
        decision
    }

    /// Follows a packet that the stack sends to the guest. It is of a flow that was let begin, or of
    /// one that the stack goes on with while the table has forgotten it; so it is not judged.
    pub fn observe(&mut self, meta: &Meta, now: Instant) {
        if !self.flows.follow(Direction::In, meta, now) && begins_a_flow(meta) {
            // A full table has counted it; the guest's next packet meets the rules.
            let _ = self.flows.open(Direction::In, meta, now);
        }
        if let Some(log) = &mut self.log
            && !is_service(&self.spec, &meta.key)
        {
            log.record(Direction::In, meta, Decision::Allow, now);
        }
    }

    /// Decides about an ICMP error that tells of `inner`'s packet: allowed when the flow is.
    pub fn check_error(&mut self, inner: &FlowKey, now: Instant) -> Decision {
        if self.flows.knows(inner, now) || is_service(&self.spec, inner) {
            Decision::Allow
        } else {
            Decision::Deny
        }
    }

    /// Forgets flows that have been silent for long, a bounded number at a time. To be called every
    /// few seconds; true when there is more to do.
    pub fn expire(&mut self, now: Instant) -> bool {
        self.flows.expire(now, 1024)
    }

    fn begin(&mut self, direction: Direction, meta: &Meta, now: Instant) -> Decision {
        if self.shared.generation.load(Ordering::Acquire) != self.generation {
            (self.generation, self.rules) = self.shared.load();
        }
        let packets = u64::from(meta.packets);
        let is_free = direction == Direction::Out && is_service(&self.spec, &meta.key);
        if !is_free {
            let (rules, port, denied) = match direction {
                Direction::Out => {
                    let port = meta.key.peer.port();
                    (&self.rules.egress, port, &mut self.stats.denied_out)
                }
                Direction::In => {
                    let port = meta.key.guest.port();
                    (&self.rules.ingress, port, &mut self.stats.denied_in)
                }
            };
            let peer = meta.key.peer.ip();
            let allows = |it: &&Counted| it.rule.allows(meta.key.protocol, port, meta.icmp, peer);
            let Some(rule) = rules.iter().find(allows) else {
                *denied += packets;
                return Decision::Deny;
            };
            rule.flows.fetch_add(1, Ordering::Relaxed);
        }
        if !begins_a_flow(meta) {
            return Decision::Allow;
        }
        if self.flows.open(direction, meta, now).is_err() {
            self.stats.table_full += packets;
            return Decision::Deny;
        }
        self.stats.flows += 1;
        Decision::Allow
    }
}

/// Whether a packet that the rules allow is worth an entry. A reset ends what is not there, and
/// ICMP but for queries has no answer.
fn begins_a_flow(meta: &Meta) -> bool {
    match meta.key.protocol {
        6 => meta.tcp_flags & conntrack::RST == 0,
        1 => matches!(meta.icmp.0, 8 | 13 | 15 | 17),
        58 => meta.icmp.0 == 128,
        _ => true,
    }
}

/// Whether a flow is with a service of the card's own: DNS, DHCP, metadata, time, and ping to it.
/// What merely comes from the card's address, as forwarded connections do, is not.
fn is_service(spec: &Spec, key: &FlowKey) -> bool {
    spec.is_card(key.peer.ip())
        && match key.protocol {
            6 => matches!(key.peer.port(), 53 | 80),
            17 => matches!(key.peer.port(), 53 | 67 | 123 | 547),
            protocol => matches!(protocol, 1 | 58),
        }
}

impl GroupsSpec {
    /// Lets everybody reach a port of the guest's, for a port that is forwarded into it.
    ///
    /// To forward a port is to want it reached, so the groups that a card has when it was told of
    /// none get this rule. Groups that somebody wrote are left as they are.
    pub fn allow_published(&mut self, protocol: &str, port: u16) {
        let Some(group) = self.groups.first_mut() else {
            return;
        };
        group.ingress.push(RuleSpec {
            protocol: protocol.into(),
            ports: Some(port.to_string()),
            icmp_type: None,
            icmp_code: None,
            peers: vec!["0.0.0.0/0".into(), "::/0".into()],
            description: Some("published port".into()),
        });
    }
}

#[cfg(test)]
mod tests;
