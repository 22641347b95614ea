//! Sockets that keep what they receive until the guest has acknowledged it.

use super::*;

const TOTAL: usize = 1_000_003;

fn data() -> Vec<u8> {
    (0..TOTAL as u32).map(|n| ((n * 7) >> 3) as u8).collect()
}

fn connected() -> (World, SocketHandle, usize) {
    World::connected_to(true)
}

/// What the guest has received by now.
fn take(world: &mut World, handle: SocketHandle, got: &mut Vec<u8>) {
    while world.socket(handle).can_recv() {
        let all = |bytes: &mut [u8]| {
            got.extend_from_slice(bytes);
            (bytes.len(), ())
        };
        world.socket(handle).recv(all).unwrap();
    }
}

#[test]
fn a_megabyte_arrives_whole_and_is_dropped_as_it_is_acknowledged() {
    let (mut world, handle, flow) = connected();
    let data = data();
    world.host.get(flow).inbox.extend(&data);
    world.event(flow, true, true, false);
    let mut got = Vec::new();
    for _ in 0..1000 {
        take(&mut world, handle, &mut got);
        world.settle();
        let kept = world.host.get(flow).inbox.len();
        // What the guest has acknowledged and not read is in its socket.
        assert!(kept + got.len() + (1 << 16) >= TOTAL, "{kept}");
        if got.len() == TOTAL {
            break;
        }
    }
    assert!(got == data, "{} bytes of {TOTAL}", got.len());
    // The guest's last acknowledgement is a delayed one.
    world.now += Duration::from_millis(20);
    world.settle();
    assert_eq!(world.host.get(flow).inbox.len(), 0);
    assert!(world.largest > 9001 + ETHERNET_LEN, "{}", world.largest);
    assert_eq!(world.stack.bulk, 0, "no ring was filled");
}

#[test]
fn what_was_lost_on_the_way_to_the_guest_is_looked_at_again() {
    let (mut world, handle, flow) = connected();
    let data = data();
    world.host.get(flow).inbox.extend(&data);
    let mut got = Vec::new();
    for round in 0..400 {
        world.is_losing = round % 3 == 0;
        world.event(flow, true, true, false);
        take(&mut world, handle, &mut got);
        world.now += Duration::from_millis(700);
    }
    assert!(world.lost > 10);
    assert!(got == data, "{} bytes of {TOTAL}", got.len());
    assert_eq!(world.host.get(flow).inbox.len(), 0);
}

#[test]
fn bytes_that_come_while_others_wait_for_their_acknowledgement_follow_them() {
    let (mut world, handle, flow) = connected();
    let mut got = Vec::new();
    for n in 0..100_u8 {
        world.is_losing = n % 2 == 0;
        world.host.get(flow).inbox.extend([n; 100]);
        world.event(flow, true, false, false);
        take(&mut world, handle, &mut got);
    }
    world.now += Duration::from_secs(3);
    world.settle();
    world.now += Duration::from_secs(3);
    world.settle();
    take(&mut world, handle, &mut got);
    let expected: Vec<u8> = (0..100).flat_map(|n| [n; 100]).collect();
    assert!(got == expected, "{} bytes", got.len());
}

#[test]
fn a_driver_without_partial_checksums_is_sent_from_the_ring() {
    let mut world = World::new(Settings::default());
    world.host.keeps = true;
    let handle = world.connect(SERVER, 40000);
    world.settle();
    let flow = world.flow();
    world.event(flow, false, true, false);
    world.host.get(flow).inbox.extend([3; 5000]);
    world.event(flow, true, true, false);
    assert!(!world.host.get(flow).is_keeping);
    let mut got = Vec::new();
    take(&mut world, handle, &mut got);
    assert_eq!(got, [3; 5000]);
}

#[test]
fn a_socket_that_fails_while_it_is_looked_into_resets_the_guest() {
    let (mut world, handle, flow) = connected();
    world.host.get(flow).inbox.extend([1; 100]);
    world.event(flow, true, true, false);
    world.host.get(flow).fails = Some(libc::ECONNRESET);
    world.event(flow, true, true, true);
    assert_eq!(world.state(handle), State::Closed);
    assert_eq!(world.stack.flow_count(), 0);
}

#[test]
fn what_cannot_be_dropped_now_is_dropped_with_the_next() {
    let (mut world, handle, flow) = connected();
    world.host.get(flow).is_stuck = true;
    let mut got = Vec::new();
    for n in 1..=2 {
        world.host.get(flow).inbox.extend([n; 100]);
        world.event(flow, true, true, false);
        take(&mut world, handle, &mut got);
        // The guest's last acknowledgement is a delayed one.
        world.now += Duration::from_millis(20);
        world.settle();
        assert_eq!(world.state(handle), State::Established);
        let kept = if n == 1 { 100 } else { 0 };
        assert_eq!(world.host.get(flow).inbox.len(), kept);
        world.host.get(flow).is_stuck = false;
    }
    assert_eq!(got, [[1; 100], [2; 100]].concat());
}
