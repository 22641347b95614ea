use std::time::Duration;

use super::*;
use Direction::{In, Out};

const SYN: u8 = conntrack::SYN;
const ACK: u8 = conntrack::ACK;

fn meta(protocol: u8, guest: &str, peer: &str, flags: u8) -> Meta {
    Meta {
        key: FlowKey {
            protocol,
            guest: guest.parse().unwrap(),
            peer: peer.parse().unwrap(),
        },
        bytes: 60,
        packets: 1,
        tcp_flags: flags,
        icmp: (8, 0),
    }
}

struct World {
    policy: Policy,
    shared: Arc<SharedRules>,
    now: Instant,
}

fn world(toml: &str) -> World {
    let spec: GroupsSpec = if toml.is_empty() {
        GroupsSpec::default()
    } else {
        toml::from_str(toml).unwrap()
    };
    let shared = Arc::new(SharedRules::new(spec).unwrap());
    let now = Instant::now();
    let spec = Arc::new(Spec::default());
    let options = PolicyOptions {
        flows: 100,
        ..PolicyOptions::default()
    };
    let policy = Policy::new(spec, shared.clone(), &options, None, now);
    World {
        policy,
        shared,
        now,
    }
}

impl World {
    fn passes(&mut self, direction: Direction, meta: &Meta) -> bool {
        self.policy.check(direction, meta, self.now) == Decision::Allow
    }
}

const GUEST: &str = "10.0.2.15:40000";
const WEB: &str = "93.184.216.34:443";

const SSH: &str = r#"
interface = ["a"]
[[group]]
id = "a"
[[group.ingress]]
protocol = "tcp"
ports = "22"
peers = ["0.0.0.0/0"]
"#;

#[test]
fn with_the_default_group_the_guest_reaches_out_and_only_replies_come_in() {
    let mut world = world("");
    assert!(!world.passes(In, &meta(6, "10.0.2.15:22", WEB, SYN)));
    assert!(world.passes(Out, &meta(6, GUEST, WEB, SYN)));
    assert!(world.passes(In, &meta(6, GUEST, WEB, SYN | ACK)));
    assert!(!world.passes(In, &meta(6, "10.0.2.15:40001", WEB, SYN | ACK)));
    assert!(world.passes(Out, &meta(17, GUEST, "8.8.8.8:53", 0)));
    assert!(world.passes(In, &meta(17, GUEST, "8.8.8.8:53", 0)));
    assert!(world.passes(Out, &meta(1, "10.0.2.15:7", "8.8.8.8:7", 0)));
    let mut reply = meta(1, "10.0.2.15:7", "8.8.8.8:7", 0);
    reply.icmp = (0, 0);
    assert!(world.passes(In, &reply));
    let stats = world.policy.stats();
    assert_eq!((stats.flows, stats.denied_in, stats.denied_out), (3, 2, 0));
}

#[test]
fn a_connection_let_in_may_be_answered_without_a_rule_outwards() {
    let mut world = world(SSH);
    let ssh = |flags| meta(6, "10.0.2.15:22", "198.51.100.9:5555", flags);
    assert!(world.passes(In, &ssh(SYN)));
    assert!(world.passes(Out, &ssh(SYN | ACK)));
    assert!(!world.passes(Out, &meta(6, GUEST, WEB, SYN)));
    let report = world.shared.report();
    assert_eq!((report[0].direction, report[0].flows), ("ingress", 1));
}

#[test]
fn a_change_of_rules_is_for_new_flows_and_tracked_ones_go_on() {
    let mut world = world(SSH);
    let ssh = |port: u16, flags| meta(6, "10.0.2.15:22", &format!("198.51.100.9:{port}"), flags);
    assert!(world.passes(In, &ssh(1, SYN)));
    assert!(world.passes(Out, &ssh(1, SYN | ACK)));
    assert!(world.passes(In, &ssh(1, ACK)));
    let mut spec = world.shared.spec();
    spec.groups[0].ingress.clear();
    world.shared.replace(spec.clone()).unwrap();
    assert!(world.passes(In, &ssh(1, ACK)));
    assert!(!world.passes(In, &ssh(2, SYN)));
    // A closed connection that begins anew is a new flow.
    assert!(world.passes(Out, &ssh(1, conntrack::RST)));
    assert!(!world.passes(In, &ssh(1, SYN)));

    spec.interface = vec!["nobody".into()];
    assert!(world.shared.replace(spec).is_err());
    assert_eq!(world.shared.report(), []);
}

#[test]
fn a_rule_that_stays_keeps_its_count_over_a_change() {
    let mut world = world(SSH);
    for port in 1..=5 {
        let peer = format!("198.51.100.9:{port}");
        assert!(world.passes(In, &meta(6, "10.0.2.15:22", &peer, SYN)));
    }
    let mut spec = world.shared.spec();
    let mut other = spec.groups[0].ingress[0].clone();
    other.ports = Some("80".into());
    spec.groups[0].ingress.insert(0, other);
    world.shared.replace(spec).unwrap();
    let counts: Vec<_> = world
        .shared
        .report()
        .iter()
        .map(|rule| rule.flows)
        .collect();
    assert_eq!(counts, [0, 5]);
}

#[test]
fn addresses_that_are_not_the_guests_are_refused_unless_the_check_is_off() {
    let mut world = world("");
    let spoofed = meta(17, "10.0.2.99:1", WEB, 0);
    assert!(!world.passes(Out, &spoofed));
    assert!(!world.passes(Out, &meta(17, "[2001:db8::1]:1", "[2001:db8::2]:1", 0)));
    assert_eq!(world.policy.stats().source_check, 2);
    let options = PolicyOptions {
        source_check: false,
        ..PolicyOptions::default()
    };
    let spec = Arc::new(Spec::default());
    world.policy = Policy::new(spec, world.shared.clone(), &options, None, world.now);
    assert!(world.passes(Out, &spoofed));
}

#[test]
fn the_cards_services_are_not_filtered_and_forwarded_connections_from_its_address_are() {
    let mut world = world(SSH);
    let imds = meta(6, GUEST, "169.254.169.254:80", SYN);
    assert!(world.passes(Out, &imds));
    assert!(world.passes(In, &meta(6, GUEST, "169.254.169.254:80", SYN | ACK)));
    assert!(world.passes(Out, &meta(17, GUEST, "10.0.2.3:53", 0)));
    // From the gateway's address, but not of a service's port.
    assert!(!world.passes(In, &meta(6, "10.0.2.15:80", "10.0.2.2:33333", SYN)));
    assert!(world.passes(In, &meta(6, "10.0.2.15:22", "10.0.2.2:33333", SYN)));
    // Nothing begins from a service towards the guest.
    assert!(!world.passes(In, &meta(6, "10.0.2.15:9", "169.254.169.254:80", SYN)));
}

#[test]
fn a_full_table_refuses_and_counts_and_what_is_tracked_goes_on() {
    let mut world = world("");
    for port in 1..=100 {
        let flow = meta(17, &format!("10.0.2.15:{port}"), WEB, 0);
        assert!(world.passes(Out, &flow));
    }
    assert!(!world.passes(Out, &meta(17, "10.0.2.15:101", WEB, 0)));
    assert!(world.passes(In, &meta(17, "10.0.2.15:1", WEB, 0)));
    assert_eq!(
        (world.policy.stats().table_full, world.policy.tracked()),
        (1, 100)
    );
    world.now += Duration::from_secs(32);
    assert!(!world.policy.expire(world.now));
    assert_eq!(world.policy.tracked(), 0);
}

#[test]
fn errors_pass_for_flows_that_are_tracked_only() {
    let mut world = world("");
    let flow = meta(17, GUEST, WEB, 0);
    assert_eq!(
        world.policy.check_error(&flow.key, world.now),
        Decision::Deny
    );
    assert!(world.passes(Out, &flow));
    assert_eq!(
        world.policy.check_error(&flow.key, world.now),
        Decision::Allow
    );
}

#[test]
fn a_published_port_is_let_in_by_the_groups_of_a_card_that_was_told_of_none() {
    let mut spec = GroupsSpec::default();
    spec.allow_published("tcp", 8080);
    let mut world = world("");
    world.shared.replace(spec).unwrap();
    assert!(world.passes(In, &meta(6, "10.0.2.15:8080", WEB, SYN)));
    assert!(!world.passes(In, &meta(6, "10.0.2.15:8081", WEB, SYN)));
}

#[test]
fn the_flow_log_has_what_was_accepted_and_rejected_but_not_the_services() {
    let mut world = world("");
    let unix = Duration::from_secs(1_700_000_040);
    let log = FlowLog::new(60, 100, world.now, unix);
    world.policy = Policy::new(
        Arc::new(Spec::default()),
        world.shared.clone(),
        &PolicyOptions::default(),
        Some(log),
        world.now,
    );
    world.passes(Out, &meta(6, GUEST, WEB, SYN));
    world.passes(In, &meta(6, "10.0.2.15:22", WEB, SYN));
    world.passes(Out, &meta(17, GUEST, "10.0.2.3:53", 0));
    let end = world.now + Duration::from_secs(60);
    let window = world.policy.log().unwrap().take(end).unwrap();
    let mut accepted: Vec<_> = window
        .records
        .iter()
        .map(|record| (record.is_accepted, record.destination.1))
        .collect();
    accepted.sort_unstable();
    assert_eq!(accepted, [(false, 22), (true, 443)]);
}

#[test]
fn a_flow_whose_guest_only_listens_stays_known_by_what_it_is_sent() {
    let mut world = world(SSH);
    let ssh = |flags| meta(6, "10.0.2.15:22", "198.51.100.9:5555", flags);
    assert!(world.passes(In, &ssh(SYN)));
    world.policy.observe(&ssh(SYN), world.now);
    assert!(world.passes(Out, &ssh(SYN | ACK)));
    world.policy.observe(&ssh(ACK), world.now);
    world.now += Duration::from_secs(3600);
    assert!(
        world.passes(Out, &ssh(ACK)),
        "no rule lets it out, the flow does"
    );
    // A peer that the stack shows under another address than policy was asked about.
    let seen = meta(6, "10.0.2.15:22", "10.0.2.2:50000", SYN);
    world.policy.observe(&seen, world.now);
    let reply = meta(6, "10.0.2.15:22", "10.0.2.2:50000", SYN | ACK);
    assert!(world.passes(Out, &reply));
}
