//! What services and policy count, as the control socket shows it.
//!
//! They count in plain numbers of their queue's thread, so that nothing is shared on the path of a
//! packet. Every few seconds, and when a thread's side ends, what has been added since goes to the
//! shared [`Counter`]s: the numbers shown are that old at most, and survive a driver's new start.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use offload::telemetry::{Counter, Registry};

use crate::policy::PolicyStats;
use crate::services::ServiceStats;
use crate::services::imds::Imds;

type Read = fn(&ServiceStats, &PolicyStats) -> u64;

/// Of whom, what, and where it is found.
const COUNTED: [(&str, &str, Read); 34] = [
    ("arp", "answered", |s, _| s.arp.answered),
    ("arp", "malformed", |s, _| s.arp.malformed),
    ("arp", "conflict", |s, _| s.arp.conflicts),
    ("nd", "answered", |s, _| s.nd.answered),
    ("nd", "advertised", |s, _| s.nd.advertised),
    ("nd", "malformed", |s, _| s.nd.malformed),
    ("dhcp4", "offer", |s, _| s.dhcp4.offers),
    ("dhcp4", "ack", |s, _| s.dhcp4.acks),
    ("dhcp4", "nak", |s, _| s.dhcp4.naks),
    ("dhcp4", "release", |s, _| s.dhcp4.releases),
    ("dhcp4", "malformed", |s, _| s.dhcp4.malformed),
    ("dhcp6", "advertised", |s, _| s.dhcp6.advertised),
    ("dhcp6", "reply", |s, _| s.dhcp6.replies),
    ("dhcp6", "malformed", |s, _| s.dhcp6.malformed),
    ("dns", "query", |s, _| s.dns.queries),
    ("dns", "local", |s, _| s.dns.local),
    ("dns", "cached", |s, _| s.dns.cached),
    ("dns", "asked", |s, _| s.dns.asked),
    ("dns", "answered", |s, _| s.dns.answered),
    ("dns", "unanswered", |s, _| s.dns.unanswered),
    ("dns", "crowded", |s, _| s.dns.crowded),
    ("dns", "forged", |s, _| s.dns.forged),
    ("dns", "truncated", |s, _| s.dns.truncated),
    ("dns", "streamed", |s, _| s.dns.streamed),
    ("ntp", "answered", |s, _| s.ntp.answered),
    ("ntp", "ignored", |s, _| s.ntp.ignored),
    ("all", "limited", |s, _| s.limited),
    ("all", "spoofed", |s, _| s.spoofed),
    ("all", "malformed", |s, _| s.malformed),
    ("policy", "flow", |_, p| p.flows),
    ("policy", "denied_out", |_, p| p.denied_out),
    ("policy", "denied_in", |_, p| p.denied_in),
    ("policy", "source_check", |_, p| p.source_check),
    ("policy", "table_full", |_, p| p.table_full),
];

/// The shared numbers of an interface.
#[derive(Debug)]
pub struct LocalMetrics {
    counters: [Arc<Counter>; COUNTED.len()],
}

impl Default for LocalMetrics {
    fn default() -> Self {
        Self {
            counters: std::array::from_fn(|_| Arc::default()),
        }
    }
}

/// What one thread has told of.
#[derive(Debug)]
pub struct Told([u64; COUNTED.len()]);

impl Default for Told {
    fn default() -> Self {
        Self([0; COUNTED.len()])
    }
}

impl LocalMetrics {
    /// Shows them.
    pub fn register(&self, registry: &Registry, imds: Option<&Arc<Imds>>) {
        const NAME: &str = "service_events";
        const HELP: &str = "What the card's own services and its policy did, 5 s old at most";
        let labels = |service: &str, event: &str| {
            vec![("service", service.to_owned()), ("event", event.to_owned())]
        };
        for ((service, event, _), counter) in COUNTED.iter().zip(&self.counters) {
            registry.counter(NAME, HELP, labels(service, event), Arc::clone(counter));
        }
        let Some(imds) = imds else { return };
        type Read = fn(&Imds) -> u64;
        let counted: [(&str, Read); 5] = [
            ("token", |imds| imds.stats().tokens.load(Ordering::Relaxed)),
            ("found", |imds| imds.stats().found.load(Ordering::Relaxed)),
            ("refused", |imds| {
                imds.stats().refused.load(Ordering::Relaxed)
            }),
            ("failed", |imds| imds.stats().failed.load(Ordering::Relaxed)),
            ("crowded", |imds| {
                imds.stats().crowded.load(Ordering::Relaxed)
            }),
        ];
        for (event, read) in counted {
            let imds = Arc::clone(imds);
            const NAME: &str = "metadata_events";
            const HELP: &str = "Tokens given, and answers of the metadata service";
            let label = vec![("event", event.to_owned())];
            registry.gauge(NAME, HELP, label, move || read(&imds));
        }
    }

    /// Adds what has been counted since the last time.
    pub fn tell(&self, told: &mut Told, services: &ServiceStats, policy: &PolicyStats) {
        let all = COUNTED.iter().zip(&self.counters).zip(&mut told.0);
        for (((.., read), counter), old) in all {
            let new = read(services, policy);
            counter.add(new.saturating_sub(*old));
            *old = new;
        }
    }

    /// A number, for tests.
    #[cfg(test)]
    pub(crate) fn get(&self, service: &str, event: &str) -> u64 {
        let mut all = COUNTED.iter().zip(&self.counters);
        let found = all.find(|((of, what, _), _)| (*of, *what) == (service, event));
        found.expect("counted").1.get()
    }
}
