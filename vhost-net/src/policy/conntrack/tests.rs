use std::time::Duration;

use super::*;

use Direction::{In, Out};

fn meta(protocol: u8, port: u16, flags: u8) -> Meta {
    Meta {
        key: FlowKey {
            protocol,
            guest: format!("10.0.2.15:{port}").parse().unwrap(),
            peer: "93.184.216.34:443".parse().unwrap(),
        },
        bytes: 60,
        packets: 1,
        tcp_flags: flags,
        icmp: (8, 0),
    }
}

struct World {
    table: Conntrack,
    now: Instant,
}

impl World {
    fn new(capacity: usize) -> Self {
        let now = Instant::now();
        Self {
            table: Conntrack::new(capacity, &Timeouts::default(), now),
            now,
        }
    }

    fn wait(&mut self, seconds: u64) {
        self.now += Duration::from_secs(seconds);
    }

    fn tcp(&mut self, direction: Direction, flags: u8) -> bool {
        self.table
            .follow(direction, &meta(6, 1000, flags), self.now)
    }

    fn udp(&mut self, direction: Direction) -> bool {
        self.table.follow(direction, &meta(17, 1000, 0), self.now)
    }

    fn connect(&mut self) {
        self.table.open(Out, &meta(6, 1000, SYN), self.now).unwrap();
        assert!(self.tcp(In, SYN | ACK));
        assert!(self.tcp(Out, ACK));
    }
}

#[test]
fn an_established_connection_lives_five_silent_days_and_no_longer() {
    let mut world = World::new(10);
    world.connect();
    world.wait(432_000);
    assert!(world.tcp(In, ACK));
    world.wait(432_002);
    assert!(!world.tcp(In, ACK));
    assert!(world.table.is_empty());
}

#[test]
fn a_handshake_that_never_ends_is_forgotten_after_half_a_minute() {
    let mut world = World::new(10);
    world
        .table
        .open(Out, &meta(6, 1000, SYN), world.now)
        .unwrap();
    assert!(world.tcp(In, SYN | ACK));
    world.wait(32);
    assert!(!world.tcp(Out, ACK));
}

#[test]
fn closing_both_ends_ends_the_flow_and_a_new_syn_is_a_new_flow() {
    let mut world = World::new(10);
    world.connect();
    assert!(world.tcp(Out, FIN | ACK));
    world.wait(100);
    assert!(world.tcp(In, ACK), "the other half may still send");
    assert!(world.tcp(In, FIN | ACK));
    assert!(world.tcp(Out, ACK));
    assert!(!world.tcp(Out, SYN), "the rules must see it");
    assert!(world.table.is_empty());

    world.connect();
    assert!(world.tcp(Out, FIN | ACK) && world.tcp(In, FIN | ACK));
    world.wait(12);
    assert!(!world.tcp(Out, ACK));
}

#[test]
fn a_reset_shortens_the_timeout_and_traffic_keeps_the_flow() {
    let mut world = World::new(10);
    world.connect();
    assert!(world.tcp(In, RST));
    for _ in 0..10 {
        world.wait(9);
        assert!(world.tcp(Out, ACK));
    }
    world.wait(12);
    assert!(!world.tcp(Out, ACK));
}

#[test]
fn a_syn_of_the_other_side_on_a_closed_flow_is_a_new_flow_too() {
    let mut world = World::new(10);
    world.connect();
    assert!(world.tcp(Out, RST));
    assert!(!world.tcp(In, SYN));
}

#[test]
fn a_flow_picked_up_in_the_middle_is_established_once_both_ends_have_spoken() {
    let mut world = World::new(10);
    world
        .table
        .open(Out, &meta(6, 1000, ACK), world.now)
        .unwrap();
    assert!(world.tcp(Out, ACK));
    world.wait(32);
    assert!(!world.tcp(Out, ACK));
    world
        .table
        .open(Out, &meta(6, 1000, ACK), world.now)
        .unwrap();
    assert!(world.tcp(In, ACK));
    world.wait(400_000);
    assert!(world.tcp(Out, ACK));
}

#[test]
fn udp_has_thirty_seconds_for_one_exchange_and_three_minutes_for_a_stream() {
    let mut world = World::new(10);
    world
        .table
        .open(Out, &meta(17, 1000, 0), world.now)
        .unwrap();
    world.wait(30);
    assert!(world.udp(In));
    world.wait(32);
    assert!(!world.udp(In));

    world
        .table
        .open(Out, &meta(17, 1000, 0), world.now)
        .unwrap();
    assert!(world.udp(In) && world.udp(Out) && world.udp(In));
    world.wait(180);
    assert!(world.udp(Out));
    world.wait(182);
    assert!(!world.udp(Out));
}

#[test]
fn packets_in_one_direction_never_make_a_stream() {
    let mut world = World::new(10);
    world
        .table
        .open(Out, &meta(17, 1000, 0), world.now)
        .unwrap();
    for _ in 0..1000 {
        assert!(world.udp(Out));
    }
    world.wait(32);
    assert!(!world.udp(Out));
}

#[test]
fn a_full_table_refuses_new_flows_counts_them_and_keeps_the_old() {
    let mut world = World::new(100);
    for port in 0..100 {
        world
            .table
            .open(Out, &meta(17, port, 0), world.now)
            .unwrap();
    }
    for port in 100..150 {
        let refused = world.table.open(Out, &meta(17, port, 0), world.now);
        assert_eq!(refused, Err(TableFull));
    }
    assert_eq!(world.table.refused(), 50);
    for port in 0..100 {
        assert!(world.table.follow(In, &meta(17, port, 0), world.now));
    }
    world.wait(32);
    world.table.open(Out, &meta(17, 100, 0), world.now).unwrap();
    assert!(world.table.len() < 100);
}

#[test]
fn expiry_takes_the_silent_flows_in_order_and_never_the_others() {
    let mut world = World::new(1000);
    for port in 0..100 {
        world
            .table
            .open(Out, &meta(17, port, 0), world.now)
            .unwrap();
    }
    world.wait(20);
    for port in (0..100).step_by(2) {
        assert!(world.table.follow(Out, &meta(17, port, 0), world.now));
    }
    world.wait(15);
    assert!(world.table.expire(world.now, 10));
    assert_eq!(world.table.len(), 90);
    assert!(!world.table.expire(world.now, 1000));
    assert_eq!(world.table.len(), 50);
    for port in 0..100 {
        assert_eq!(
            world.table.knows(&meta(17, port, 0).key, world.now),
            port % 2 == 0
        );
    }
}

#[test]
fn the_two_families_do_not_meet_and_neither_do_protocols() {
    let mut world = World::new(10);
    let four = meta(17, 1000, 0);
    world.table.open(Out, &four, world.now).unwrap();
    assert!(!world.table.follow(Out, &meta(6, 1000, ACK), world.now));
    let mut six = four;
    six.key.guest = "[fd00::15]:1000".parse().unwrap();
    assert!(!world.table.follow(Out, &six, world.now));
}

/// What the table should be: a map searched in full each time.
#[derive(Default)]
struct Model {
    flows: HashMap<u16, (State, Direction, u64)>,
}

#[test]
fn random_traffic_gives_what_a_table_without_lists_would_give() {
    let mut random = fastrand::Rng::with_seed(42);
    let mut world = World::new(64);
    let timeouts = Timeouts::default();
    let limit = |state: State| match state.class() {
        Class::Opening => timeouts.tcp_opening,
        Class::Established => timeouts.tcp_established,
        Class::HalfClosed => timeouts.tcp_half_closed,
        Class::Closed => timeouts.tcp_closed,
        _ => unreachable!("TCP only"),
    };
    let mut model = Model::default();
    let mut seconds = 0_u64;
    for _ in 0..100_000 {
        if random.u8(0..10) == 0 {
            let step = *random.choice(&[1, 5, 20, 60]).unwrap();
            world.wait(step);
            seconds += step;
        }
        let port = random.u16(0..100);
        let direction = if random.bool() { In } else { Out };
        let flags = *random
            .choice(&[SYN, SYN | ACK, ACK, ACK, ACK, FIN | ACK, RST])
            .unwrap();
        let packet = meta(6, port, flags);
        let expected = match model.flows.get(&port) {
            Some((state, origin, seen)) if seconds - seen <= u64::from(limit(*state)) => state
                .next(direction, *origin, flags)
                .map(|next| (next, *origin)),
            _ => None,
        };
        assert_eq!(
            world.table.follow(direction, &packet, world.now),
            expected.is_some()
        );
        match expected {
            Some((state, origin)) => {
                model.flows.insert(port, (state, origin, seconds));
            }
            None => {
                model.flows.remove(&port);
                // The table frees expired flows before it refuses; so does the model.
                if world.table.len() >= 60 {
                    world.table.expire(world.now, usize::MAX);
                    model
                        .flows
                        .retain(|_, (state, _, seen)| seconds - *seen <= u64::from(limit(*state)));
                    assert_eq!(world.table.len(), model.flows.len());
                }
                if world.table.open(direction, &packet, world.now).is_ok() {
                    model
                        .flows
                        .insert(port, (State::first(&packet), direction, seconds));
                }
            }
        }
        assert!(world.table.len() <= 64);
        assert!(world.table.entries.len() <= 64);
    }
    assert!(world.table.refused() > 0);
}
