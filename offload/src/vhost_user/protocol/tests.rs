use super::*;
use crate::vhost_user::message::UserRing;

const OFFER: Offer = Offer {
    features: 0b1011 | 1 << 32,
    queue_count: 2,
    queue_size_max: 256,
    has_config: true,
    has_mtu: true,
};

const RING: UserRing = UserRing {
    desc_table: 0x7000_0000,
    avail_ring: 0x7000_1000,
    used_ring: 0x7000_2000,
};

const PLACE: GuestRing = GuestRing {
    desc_table: 0x10_0000,
    avail_ring: 0x10_1000,
    used_ring: 0x10_2000,
};

const REGION: RegionInfo = RegionInfo {
    guest_phys_addr: 0x10_0000,
    size: 0x10_0000,
    userspace_addr: 0x7000_0000,
    mmap_offset: 0,
};

/// File descriptors are numbers here.
type Fd = u32;

fn new() -> Protocol<Fd> {
    Protocol::new(OFFER)
}

/// Handles a request that must be accepted; gives its actions.
fn ok(protocol: &mut Protocol<Fd>, request: Request<Fd>) -> Vec<Action<Fd>> {
    protocol.handle(request).expect("accepted");
    actions(protocol)
}

fn actions(protocol: &mut Protocol<Fd>) -> Vec<Action<Fd>> {
    std::iter::from_fn(|| protocol.next_action()).collect()
}

fn negotiated() -> Protocol<Fd> {
    let mut protocol = new();
    ok(
        &mut protocol,
        Request::SetProtocolFeatures(PROTOCOL_FEATURES.bits()),
    );
    ok(
        &mut protocol,
        Request::SetFeatures(OFFER.features | F_PROTOCOL_FEATURES),
    );
    protocol
}

fn add_memory(protocol: &mut Protocol<Fd>) -> Vec<Action<Fd>> {
    assert_eq!(
        ok(protocol, Request::AddMemReg(REGION, 9)),
        [Action::AddRegion(REGION, 9)]
    );
    protocol.memory_changed(&[REGION]);
    actions(protocol)
}

fn describe_ring(protocol: &mut Protocol<Fd>, queue: u16) {
    for request in [
        Request::SetVringNum { queue, size: 128 },
        Request::SetVringBase { queue, base: 0 },
        Request::SetVringAddr { queue, ring: RING },
    ] {
        assert_eq!(ok(protocol, request), []);
    }
}

fn kick(queue: u16) -> Request<Fd> {
    Request::SetVringKick { queue, fd: Some(1) }
}

/// Queue 0 runs.
fn running() -> Protocol<Fd> {
    let mut protocol = negotiated();
    add_memory(&mut protocol);
    describe_ring(&mut protocol, 0);
    assert_eq!(ok(&mut protocol, kick(0)), [Action::StartRing(0)]);
    protocol
}

#[test]
fn what_is_offered_is_what_is_handled() {
    let mut protocol = new();
    assert_eq!(
        protocol.handle(Request::GetFeatures),
        Ok(Reply::U64(OFFER.features | 1 << 30))
    );
    // MQ, REPLY_ACK, BACKEND_REQ, CONFIG, INFLIGHT_SHMFD, CONFIGURE_MEM_SLOTS.
    assert_eq!(
        protocol.handle(Request::GetProtocolFeatures),
        Ok(Reply::U64(
            1 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 9 | 1 << 12 | 1 << 15
        ))
    );
    assert_eq!(protocol.handle(Request::GetQueueNum), Ok(Reply::U64(2)));
}

#[test]
fn an_mtu_is_told_to_a_device_that_wants_it_and_to_no_other() {
    let mut protocol: Protocol<Fd> = Protocol::new(OFFER);
    assert!(protocol.handle(Request::NetSetMtu(1500)).is_err());
    ok(&mut protocol, Request::SetProtocolFeatures(1 << 4));
    assert_eq!(protocol.handle(Request::NetSetMtu(1500)), Ok(Reply::Ack));
    assert_eq!(protocol.next_action(), Some(Action::SetMtu(1500)));
    let mut protocol: Protocol<Fd> = Protocol::new(Offer {
        has_mtu: false,
        ..OFFER
    });
    assert_eq!(
        protocol.handle(Request::SetProtocolFeatures(1 << 4)),
        Err(Refusal::ProtocolFeatures(1 << 4))
    );
}

#[test]
fn a_device_without_configuration_space_does_not_offer_config() {
    let mut protocol: Protocol<Fd> = Protocol::new(Offer {
        has_config: false,
        ..OFFER
    });
    let offered = PROTOCOL_FEATURES.bits() & !(1 << 9);
    assert_eq!(
        protocol.handle(Request::GetProtocolFeatures),
        Ok(Reply::U64(offered))
    );
    assert_eq!(
        protocol.handle(Request::SetProtocolFeatures(PROTOCOL_FEATURES.bits())),
        Err(Refusal::ProtocolFeatures(1 << 9))
    );
    ok(&mut protocol, Request::SetProtocolFeatures(offered));
}

#[test]
fn features_that_were_not_offered_are_refused_and_change_nothing() {
    let mut protocol = new();
    assert_eq!(
        protocol.handle(Request::SetFeatures(OFFER.features | 1 << 26)),
        Err(Refusal::Features(1 << 26))
    );
    assert_eq!(protocol.features(), 0);
    // LOG_SHMFD, and a bit that nobody has defined.
    for bit in [1u64 << 1, 1 << 60] {
        assert_eq!(
            protocol.handle(Request::SetProtocolFeatures(1 << 3 | bit)),
            Err(Refusal::ProtocolFeatures(bit))
        );
    }
    assert!(!protocol.has_reply_ack());
}

#[test]
fn the_device_never_sees_the_protocol_features_bit() {
    let mut protocol = new();
    assert_eq!(
        ok(
            &mut protocol,
            Request::SetFeatures(0b11 | F_PROTOCOL_FEATURES)
        ),
        [Action::SetFeatures(0b11)]
    );
}

#[test]
fn requests_of_protocol_features_that_were_not_negotiated_are_refused() {
    use ProtocolFeatures as P;
    let area = InflightArea {
        mmap_size: 4096,
        mmap_offset: 0,
        num_queues: 1,
        queue_size: 128,
    };
    let range = ConfigRange {
        offset: 0,
        len: 1,
        flags: 0,
    };
    for (request, feature) in [
        (Request::GetConfig(range), P::CONFIG),
        (Request::SetConfig(range, vec![0]), P::CONFIG),
        (
            Request::GetInflightFd {
                num_queues: 1,
                queue_size: 128,
                body_len: 24,
            },
            P::INFLIGHT_SHMFD,
        ),
        (Request::SetInflightFd(area, 1), P::INFLIGHT_SHMFD),
        (Request::GetMaxMemSlots, P::CONFIGURE_MEM_SLOTS),
        (Request::AddMemReg(REGION, 1), P::CONFIGURE_MEM_SLOTS),
        (Request::RemMemReg(REGION), P::CONFIGURE_MEM_SLOTS),
        (Request::SetBackendReqFd(1), P::BACKEND_REQ),
    ] {
        let mut protocol = new();
        assert_eq!(
            protocol.handle(request),
            Err(Refusal::NotNegotiated(feature))
        );
        assert_eq!(actions(&mut protocol), []);
    }
}

#[test]
fn a_ring_starts_when_the_last_of_kick_addresses_memory_and_features_is_there() {
    type Step = fn(&mut Protocol<Fd>) -> Vec<Action<Fd>>;
    let steps: [Step; 4] = [
        |protocol| ok(protocol, kick(0)),
        |protocol| {
            let size = Request::SetVringNum {
                queue: 0,
                size: 128,
            };
            let mut actions = ok(protocol, size);
            let addr = Request::SetVringAddr {
                queue: 0,
                ring: RING,
            };
            actions.extend(ok(protocol, addr));
            actions
        },
        add_memory,
        |protocol| ok(protocol, Request::SetFeatures(1 << 30)),
    ];
    for first in 0..4 {
        for shift in [1, 3] {
            let mut protocol = new();
            ok(
                &mut protocol,
                Request::SetProtocolFeatures(PROTOCOL_FEATURES.bits()),
            );
            let order: Vec<usize> = (0..4).map(|n| (first + n * shift) % 4).collect();
            for (n, step) in order.iter().enumerate() {
                let started = steps[*step](&mut protocol).contains(&Action::StartRing(0));
                assert_eq!(started, n == 3, "order {order:?}, step {n}");
            }
            assert_eq!(protocol.ring(0).unwrap().running, Some(PLACE));
        }
    }
}

#[test]
fn an_enable_before_set_features_is_kept_as_vhost_user_net_needs_it() {
    let mut protocol = new();
    let enable = Request::SetVringEnable {
        queue: 0,
        enabled: true,
    };
    assert_eq!(ok(&mut protocol, enable), []);
    ok(
        &mut protocol,
        Request::SetFeatures(OFFER.features | F_PROTOCOL_FEATURES),
    );
    assert!(protocol.ring(0).unwrap().enabled);
    assert!(!protocol.ring(1).unwrap().enabled);
}

#[test]
fn rings_are_enabled_from_the_start_without_protocol_features() {
    let mut protocol = new();
    ok(&mut protocol, Request::SetFeatures(0));
    assert!(protocol.ring(0).unwrap().enabled);
    assert!(protocol.ring(1).unwrap().enabled);
}

#[test]
fn enabling_and_disabling_a_running_ring_reaches_it() {
    let mut protocol = running();
    for enabled in [true, false] {
        let request = Request::SetVringEnable { queue: 0, enabled };
        assert_eq!(ok(&mut protocol, request), [Action::SetEnabled(0)]);
        assert_eq!(protocol.ring(0).unwrap().enabled, enabled);
    }
}

#[test]
fn get_vring_base_stops_a_ring_which_a_new_kick_starts_from_a_given_base() {
    let mut protocol = running();
    for round in 1..5 {
        assert_eq!(
            protocol.handle(Request::GetVringBase { queue: 0 }),
            Ok(Reply::VringBase(0))
        );
        assert_eq!(actions(&mut protocol), [Action::StopRing(0)]);
        protocol.ring_stopped(0, round * 10);
        assert_eq!(actions(&mut protocol), []);
        assert_eq!(protocol.ring(0).unwrap().base, round * 10);
        let base = Request::SetVringBase {
            queue: 0,
            base: round,
        };
        assert_eq!(ok(&mut protocol, base), []);
        assert_eq!(ok(&mut protocol, kick(0)), [Action::StartRing(0)]);
        assert_eq!(protocol.ring(0).unwrap().base, round);
    }
}

#[test]
fn get_vring_base_of_a_ring_that_never_ran_gives_what_was_set() {
    let mut protocol = negotiated();
    let base = Request::SetVringBase {
        queue: 1,
        base: 0x1234,
    };
    ok(&mut protocol, base);
    assert_eq!(
        protocol.handle(Request::GetVringBase { queue: 1 }),
        Ok(Reply::VringBase(1))
    );
    assert_eq!(actions(&mut protocol), []);
    assert_eq!(protocol.ring(1).unwrap().base, 0x1234);
}

#[test]
fn a_kick_that_waits_for_memory_is_forgotten_by_get_vring_base() {
    let mut protocol = negotiated();
    describe_ring(&mut protocol, 0);
    assert_eq!(ok(&mut protocol, kick(0)), []);
    ok(&mut protocol, Request::GetVringBase { queue: 0 });
    assert_eq!(add_memory(&mut protocol), []);
}

#[test]
fn the_layout_of_a_running_ring_may_be_repeated_but_not_changed() {
    let mut protocol = running();
    let moved = UserRing {
        desc_table: RING.desc_table + 0x4000,
        ..RING
    };
    for request in [
        Request::SetVringNum { queue: 0, size: 64 },
        Request::SetVringBase { queue: 0, base: 1 },
        Request::SetVringAddr {
            queue: 0,
            ring: moved,
        },
        Request::SetFeatures(0),
    ] {
        assert_eq!(protocol.handle(request), Err(Refusal::Running(0)));
        assert_eq!(actions(&mut protocol), []);
    }
    for request in [
        Request::SetVringNum {
            queue: 0,
            size: 128,
        },
        Request::SetVringAddr {
            queue: 0,
            ring: RING,
        },
        Request::SetFeatures(OFFER.features | F_PROTOCOL_FEATURES),
    ] {
        assert_eq!(ok(&mut protocol, request), []);
    }
}

#[test]
fn new_kick_and_call_descriptors_reach_a_running_ring() {
    let mut protocol = running();
    assert_eq!(ok(&mut protocol, kick(0)), [Action::SetKick(0)]);
    let call = Request::SetVringCall {
        queue: 0,
        fd: Some(5),
    };
    assert_eq!(ok(&mut protocol, call), [Action::SetCall(0)]);
    assert_eq!(protocol.ring(0).unwrap().call, Some(5));
}

#[test]
fn memory_that_comes_while_a_ring_runs_is_given_to_it() {
    let mut protocol = running();
    let other = RegionInfo {
        guest_phys_addr: 1 << 40,
        userspace_addr: 1 << 40,
        ..REGION
    };
    ok(&mut protocol, Request::AddMemReg(other, 3));
    protocol.memory_changed(&[REGION, other]);
    assert_eq!(actions(&mut protocol), [Action::UpdateMemory(0)]);
}

#[test]
fn a_ring_whose_memory_leaves_stops_and_goes_on_where_it_was_when_it_is_back() {
    let mut protocol = running();
    assert_eq!(
        ok(&mut protocol, Request::RemMemReg(REGION)),
        [Action::RemoveRegion(REGION)]
    );
    protocol.memory_changed(&[]);
    assert_eq!(actions(&mut protocol), [Action::StopRing(0)]);
    protocol.ring_stopped(0, 77);
    assert_eq!(actions(&mut protocol), []);
    assert_eq!(protocol.running().count(), 0);
    assert_eq!(add_memory(&mut protocol), [Action::StartRing(0)]);
    assert_eq!(protocol.ring(0).unwrap().base, 77);
}

#[test]
fn a_ring_whose_memory_moves_is_started_again_at_the_new_place() {
    let mut protocol = running();
    let moved = RegionInfo {
        guest_phys_addr: 0x80_0000,
        ..REGION
    };
    ok(&mut protocol, Request::SetMemTable(vec![(moved, 1)]));
    protocol.memory_changed(&[moved]);
    assert_eq!(actions(&mut protocol), [Action::StopRing(0)]);
    protocol.ring_stopped(0, 5);
    assert_eq!(actions(&mut protocol), [Action::StartRing(0)]);
    let place = protocol.ring(0).unwrap().running.unwrap();
    assert_eq!(place.desc_table, 0x80_0000);
}

#[test]
fn a_ring_that_did_not_start_stays_stopped_until_the_next_kick() {
    let mut protocol = running();
    protocol.ring_failed(0);
    assert_eq!(protocol.running().count(), 0);
    protocol.memory_changed(&[REGION]);
    assert_eq!(actions(&mut protocol), []);
    assert_eq!(ok(&mut protocol, kick(0)), [Action::StartRing(0)]);
}

#[test]
fn in_flight_regions_change_only_while_no_ring_runs() {
    let mut protocol = running();
    let get = |num_queues, queue_size| Request::GetInflightFd {
        num_queues,
        queue_size,
        body_len: 24,
    };
    assert_eq!(protocol.handle(get(2, 128)), Err(Refusal::Running(0)));
    ok(&mut protocol, Request::GetVringBase { queue: 0 });
    protocol.ring_stopped(0, 0);
    assert_eq!(
        ok(&mut protocol, get(2, 128)),
        [Action::CreateInflight {
            num_queues: 2,
            queue_size: 128
        }]
    );
    assert_eq!(
        protocol.handle(get(3, 128)),
        Err(Refusal::InflightQueues {
            queues: 3,
            count: 2
        })
    );
    assert_eq!(
        protocol.handle(get(2, 512)),
        Err(Refusal::RingSize {
            size: 512,
            max: 256
        })
    );
}

#[test]
fn queues_that_do_not_exist_and_rings_that_are_too_large_are_refused() {
    let mut protocol = negotiated();
    let unknown = Err(Refusal::Queue { queue: 2, count: 2 });
    assert_eq!(protocol.handle(kick(2)), unknown);
    assert_eq!(protocol.handle(Request::GetVringBase { queue: 2 }), unknown);
    let large = Request::SetVringNum {
        queue: 0,
        size: 512,
    };
    assert_eq!(
        protocol.handle(large),
        Err(Refusal::RingSize {
            size: 512,
            max: 256
        })
    );
}
