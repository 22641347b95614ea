//! The card's own side of a queue pair: its services and its policy, as the data path calls them.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::card::Local;
use crate::frame::Frame;
use crate::lan::port::Judge;
use crate::lan::{Lan, View};
use crate::local::{Decision, Direction, FlowKey, Meta, Outbox, TcpService, Verdict};
use crate::metrics::{LocalMetrics, Told};
use crate::policy::flowfile::Feed;
use crate::policy::flowlog::{FLOWS_MAX, FlowLog};
use crate::policy::{Policy, PolicyOptions, SharedRules};
use crate::services::Services;
use crate::services::admission::Admission;
use crate::services::dns::Dns;
use crate::services::dns::upstream::Upstream;
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
    /// The name servers, which may change; `None`: those of the specification.
    pub upstream: Option<Arc<Upstream>>,
    /// Names of other machines on the guest's network.
    pub peers: Vec<(String, Vec<IpAddr>)>,
    /// The private network, if the interface is on one.
    pub lan: Option<Arc<Lan>>,
    /// The flow log; `None`, or no rules: there is none.
    pub flow_log: Option<FlowLogOptions>,
    /// Where counters are added up.
    pub metrics: Arc<LocalMetrics>,
    /// How many packets the services take.
    pub admission: Arc<Admission>,
}

/// Where a flow log goes.
#[derive(Clone, Debug)]
pub struct FlowLogOptions {
    /// The writer.
    pub feed: Feed,
    /// Seconds of a window.
    pub interval: u32,
}

/// See the module.
#[derive(Debug)]
pub struct LocalSide {
    services: Services,
    /// `None`: everything is allowed, and nothing is tracked.
    policy: Option<Policy>,
    expire_at: Instant,
    /// Where the flow log's windows go, and when the next one is over.
    windows: Option<(Feed, Instant)>,
    lan: Option<View>,
    metrics: Arc<LocalMetrics>,
    told: Told,
}

impl LocalSide {
    /// For one pair of an interface. One pair alone advertises the router by itself.
    #[must_use]
    pub fn new(spec: &Arc<Spec>, options: &LocalOptions, advertises: bool, now: Instant) -> Self {
        let mut policy = options.rules.as_ref().map(|rules| {
            let (spec, rules) = (Arc::clone(spec), Arc::clone(rules));
            let log = options.flow_log.as_ref().map(|log| {
                // A clock before 1970 has no time worth a log.
                let unix = SystemTime::now().duration_since(UNIX_EPOCH);
                FlowLog::new(log.interval, FLOWS_MAX, now, unix.unwrap_or_default())
            });
            Policy::new(spec, rules, &options.policy, log, now)
        });
        let log = policy.as_mut().and_then(Policy::log);
        let windows = log.zip(options.flow_log.as_ref());
        let windows = windows.map(|(log, options)| (options.feed.clone(), log.due()));
        let mut dns = Dns::new(spec, &options.peers, Box::new(random));
        if let Some(upstream) = &options.upstream {
            dns = dns.following(Arc::clone(upstream));
        }
        let mut services = Services::new(Arc::clone(spec), advertises, now)
            .with_admission(Arc::clone(&options.admission))
            .with_dns(dns);
        if let Some(imds) = &options.imds {
            services = services.with_imds(Arc::clone(imds));
        }
        Self {
            services,
            policy,
            expire_at: now + EXPIRE_INTERVAL,
            windows,
            lan: options.lan.clone().map(View::new),
            metrics: Arc::clone(&options.metrics),
            told: Told::default(),
        }
    }

    fn tell(&mut self) {
        let policy = self.policy.as_ref().map(Policy::stats).unwrap_or_default();
        let services = self.services.stats();
        self.metrics.tell(&mut self.told, &services, &policy);
    }

    /// Whether a frame of the guest's goes to a member of its private network.
    pub fn is_for_member(&mut self, frame: &[u8]) -> bool {
        self.follow_lan();
        let view = self.lan.as_ref();
        view.is_some_and(|view| view.is_for_member(frame))
    }

    fn follow_lan(&mut self) {
        if let Some(view) = &mut self.lan
            && view.refresh()
        {
            self.services.set_peers(&view.names());
        }
    }

    fn pass_window(&mut self, now: Instant) {
        if let Some((feed, due)) = &mut self.windows
            && *due <= now
            && let Some(log) = self.policy.as_mut().and_then(Policy::log)
        {
            if let Some(window) = log.take(now) {
                feed.put(window);
            }
            *due = log.due();
        }
    }
}

impl Drop for LocalSide {
    /// What the flow log has counted of its interval is not lost when the driver starts anew or the
    /// card ends. An interval of which nothing is known is not told of.
    fn drop(&mut self) {
        self.tell();
        if let Some((feed, _)) = &mut self.windows
            && let Some(log) = self.policy.as_mut().and_then(Policy::log)
        {
            let window = log.finish(Instant::now());
            if !window.records.is_empty() || window.skipped > 0 {
                feed.put(window);
            }
        }
    }
}

impl Locals for LocalSide {
    fn connect(&mut self, to: SocketAddr, from: SocketAddr) -> Option<Box<dyn TcpService>> {
        self.services.connect(to, from, Instant::now())
    }
}

impl Local for LocalSide {
    fn frame(&mut self, frame: &Frame<'_>, now: Instant, out: &mut Outbox) -> Verdict {
        self.follow_lan();
        if let Some(answer) = self.lan.as_ref().and_then(|view| view.answer(frame)) {
            if self.services.admit(frame.source, now) {
                out.frames.push(answer);
            }
            return Verdict::Handled;
        }
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
        self.pass_window(now);
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
            self.tell();
        }
    }

    fn deadline(&self) -> Option<Instant> {
        let expire = self.policy.as_ref().map(|_| self.expire_at);
        let window = self.windows.as_ref().map(|(_, due)| *due);
        let ends = [self.services.poll_at(), expire, window];
        ends.into_iter().flatten().min()
    }
}

impl Judge for LocalSide {
    fn lets_pass(&mut self, direction: Direction, meta: &Meta, now: Instant) -> bool {
        self.allows(direction, meta, now)
    }

    fn lets_error_pass(&mut self, flow: &FlowKey, now: Instant) -> bool {
        match &mut self.policy {
            Some(policy) => policy.check_error(flow, now) == Decision::Allow,
            None => true,
        }
    }
}

/// The id of a question. Without randomness the random port has to do.
fn random() -> u16 {
    let mut bytes = [0; 2];
    let _ = getrandom::fill(&mut bytes);
    u16::from_ne_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::frame::header::NetHeader;
    use crate::policy::flowfile::FlowFile;
    use crate::policy::flowlog::Identity;
    use crate::policy::groups::GroupsSpec;
    use crate::services::PACKETS_PER_SECOND;

    #[test]
    fn services_of_several_queue_pairs_have_one_limit() {
        let spec = Arc::new(Spec::default());
        let now = Instant::now();
        let options = LocalOptions {
            admission: Arc::new(Admission::new(now)),
            ..LocalOptions::default()
        };
        let mut sides = [0, 1].map(|pair| LocalSide::new(&spec, &options, pair == 0, now));
        let mut question = vec![0xff; 6];
        question.extend(spec.mac.0);
        question.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        question.extend(spec.mac.0);
        question.extend([10, 0, 2, 15, 0, 0, 0, 0, 0, 0, 10, 0, 2, 2]);
        let frame = Frame::parse(&question, &NetHeader::default()).unwrap();
        let mut out = Outbox::default();
        for side in &mut sides {
            for _ in 0..1000 {
                side.frame(&frame, now, &mut out);
            }
        }
        assert_eq!(out.frames.len(), PACKETS_PER_SECOND as usize);
    }

    #[test]
    fn what_policy_sees_is_in_the_flow_log_when_its_interval_is_over_and_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("flows");
        let who = Identity {
            account: "123456789012".into(),
            interface: "eni-7".into(),
        };
        let file = FlowFile::open(&path, 1 << 20, 0, who).unwrap();
        let options = LocalOptions {
            rules: Some(Arc::new(SharedRules::new(GroupsSpec::default()).unwrap())),
            flow_log: Some(FlowLogOptions {
                feed: file.feed(),
                interval: 60,
            }),
            ..LocalOptions::default()
        };
        let spec = Arc::new(Spec::default());
        let writer = file.spawn().unwrap();
        let now = Instant::now();
        let mut side = LocalSide::new(&spec, &options, true, now);
        let guest = SocketAddr::from((spec.v4.unwrap().address, 40_000));
        let meta = |peer: [u8; 4]| Meta {
            key: crate::local::FlowKey {
                protocol: 17,
                guest,
                peer: (Ipv4Addr::from(peer), 9).into(),
            },
            bytes: 100,
            packets: 1,
            tcp_flags: 0,
            icmp: (0, 0),
        };
        assert!(side.allows(Direction::Out, &meta([192, 0, 2, 1]), now));
        assert!(!side.allows(Direction::In, &meta([192, 0, 2, 2]), now));
        let mut out = Outbox::default();
        // It is one of the deadlines, all of which come within the interval.
        let end = now + Duration::from_secs(61);
        while side.deadline().unwrap() <= end {
            side.poll(side.deadline().unwrap(), &mut out);
        }
        let past = end + Duration::from_secs(1);
        assert!(side.allows(Direction::Out, &meta([192, 0, 2, 3]), past));
        assert_eq!(options.metrics.get("policy", "flow"), 1);
        drop((side, writer));
        // What was not told in time is told in the end, and nothing twice.
        assert_eq!(options.metrics.get("policy", "flow"), 2);
        assert_eq!(options.metrics.get("policy", "denied_in"), 1);
        assert_eq!(options.metrics.get("policy", "denied_out"), 0);
        let text = std::fs::read_to_string(&path).unwrap();
        for wanted in [
            " 10.0.2.15 192.0.2.1 40000 9 17 1 100 ",
            " 192.0.2.2 10.0.2.15 9 40000 17 1 100 ",
            " 10.0.2.15 192.0.2.3 40000 9 17 1 100 ",
        ] {
            let line = text.lines().find(|line| line.contains(wanted));
            let line = line.unwrap_or_else(|| panic!("{wanted}: {text}"));
            assert!(line.starts_with("2 123456789012 eni-7 "), "{line}");
            let action = if wanted.starts_with(" 192") {
                "REJECT OK"
            } else {
                "ACCEPT OK"
            };
            assert!(line.ends_with(action), "{line}");
        }
        // Windows end with the clock's minutes: one without anything may lie in between.
        let lines = text.lines().filter(|line| !line.ends_with(" - NODATA"));
        assert_eq!(lines.count(), 3, "{text}");
    }
}
