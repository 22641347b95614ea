//! Chains come back, whatever the mode.

use super::*;
use crate::testing::driver::RawDescriptor;

#[test]
fn thousands_of_chains_come_back_with_what_was_sent() {
    for mode in [Mode::AtOnce, Mode::ThroughTheRing] {
        for event_idx in [0, EVENT_IDX] {
            for indirect in [false, true] {
                let echo = Echo::new(mode);
                let (thread, stats) = spawn(&echo, 0);
                let ram = GuestRam::new(4 << 20);
                let features = event_idx | INDIRECT_DESC;
                let mut client = Client::new(&ram, 64, features, indirect);
                thread.start(client.driver.ring_config(0, None)).unwrap();
                for depth in [1, 7, 32] {
                    client.exchange(3000, depth);
                }
                assert_eq!(thread.stop().unwrap(), 9000);
                assert_eq!(stats.requests.get(), 9000);
                assert_eq!(stats.completions.get(), 9000);
                assert_eq!(stats.malformed_chains.get(), 0);
                assert!(stats.kicks.get() > 0 && stats.notifications.get() > 0);
            }
        }
    }
}

#[test]
fn two_queues_work_side_by_side() {
    let echo = Echo::new(Mode::ThroughTheRing);
    let ram = GuestRam::new(4 << 20);
    std::thread::scope(|scope| {
        for index in 0..2 {
            let (echo, ram) = (&echo, &ram);
            scope.spawn(move || {
                let (thread, _) = spawn(echo, index);
                let mut client = Client::new(ram, 128, EVENT_IDX | INDIRECT_DESC, index == 1);
                thread.start(client.driver.ring_config(0, None)).unwrap();
                client.exchange(20_000, 64);
                assert_eq!(thread.stop().unwrap(), 20_000);
            });
        }
    });
}

#[test]
fn malformed_chains_come_back_and_are_counted() {
    let echo = Echo::new(Mode::AtOnce);
    let (thread, stats) = spawn(&echo, 0);
    let ram = GuestRam::new(1 << 20);
    let mut client = Client::new(&ram, 16, EVENT_IDX, false);
    thread.start(client.driver.ring_config(0, None)).unwrap();
    for _ in 0..10 {
        let endless = RawDescriptor {
            addr: RAM_BASE,
            len: 1,
            flags: RawDescriptor::NEXT,
            next: 0,
        };
        client.driver.add_bent(&[endless]).unwrap();
        client.driver.kick();
        assert_eq!(client.driver.wait_used(PATIENCE).unwrap().written, 0);
        client.exchange(3, 1);
    }
    assert_eq!(stats.malformed_chains.get(), 10);
    assert_eq!(stats.completions.get(), 40);
}

#[test]
fn a_broken_queue_leaves_its_neighbour_alone_and_recovers_when_started_anew() {
    let echo = Echo::new(Mode::ThroughTheRing);
    let ram = GuestRam::new(4 << 20);
    let (healthy, _) = spawn(&echo, 0);
    let (broken, stats) = spawn(&echo, 1);
    let mut client = Client::new(&ram, 64, EVENT_IDX, false);
    healthy.start(client.driver.ring_config(0, None)).unwrap();
    let mut villain = DriverQueue::new(&ram, 64, 0);
    broken.start(villain.ring_config(0, None)).unwrap();
    let err = rustix::event::eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    broken.set_err(Some(err.try_clone().unwrap()));
    client.exchange(1000, 32);
    villain.set_avail_idx(1000);
    villain.kick_now();
    let mut counter = [0; 8];
    let end = Instant::now() + PATIENCE;
    while rustix::io::read(&err, &mut counter).is_err() {
        assert!(Instant::now() < end, "the error eventfd stays silent");
        std::thread::sleep(Duration::from_millis(1));
    }
    for _ in 0..100 {
        villain.kick_now();
        client.exchange(100, 32);
    }
    assert_eq!(stats.broken.get(), 1);
    assert_eq!(broken.stop().unwrap(), 0);
    let mut fresh = Client::new(&ram, 64, 0, false);
    broken.start(fresh.driver.ring_config(0, None)).unwrap();
    fresh.exchange(100, 8);
}
