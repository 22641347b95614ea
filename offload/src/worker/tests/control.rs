//! What the control plane asks for: start, stop, other eventfds, other memory.

use std::os::fd::AsFd;

use super::*;
use crate::inflight::InflightRegion;

#[test]
fn a_ring_stops_and_starts_in_the_middle_of_traffic() {
    for region in [None, Some(InflightRegion::create(1, 64, 0).unwrap())] {
        let inflight = || region.as_ref().and_then(|region| region.queue(0));
        let echo = Echo::new(Mode::ThroughTheRing);
        let (thread, stats) = spawn(&echo, 0);
        let ram = GuestRam::new(4 << 20);
        let mut client = Client::new(&ram, 64, EVENT_IDX, false);
        let mut base = 0;
        let mut got = 0u64;
        for _ in 0..200 {
            thread
                .start(client.driver.ring_config(base, inflight()))
                .unwrap();
            while client.send() {}
            client.driver.kick();
            base = thread.stop().unwrap();
            // What was popped is back, nothing else.
            assert_eq!(client.driver.used_idx(), base);
            while let Some(used) = client.driver.poll_used() {
                client.check(used);
                got += 1;
            }
        }
        thread
            .start(client.driver.ring_config(base, inflight()))
            .unwrap();
        while client.driver.out_count() > 0 {
            let used = client.driver.wait_used(PATIENCE).unwrap();
            client.check(used);
            got += 1;
        }
        assert_eq!(got, client.next - 1);
        assert_eq!(stats.requests.get(), got);
    }
}

#[test]
fn stop_waits_for_the_chains_that_the_handler_holds() {
    let echo = Echo::new(Mode::WhenReleased);
    let (thread, stats) = spawn(&echo, 0);
    let ram = GuestRam::new(1 << 20);
    let mut client = Client::new(&ram, 16, 0, false);
    client.send();
    client.send();
    client.driver.publish();
    thread.start(client.driver.ring_config(0, None)).unwrap();
    while stats.requests.get() < 2 {
        std::thread::yield_now();
    }
    std::thread::scope(|scope| {
        let stop = scope.spawn(|| thread.stop());
        let end = Instant::now() + PATIENCE;
        while !echo.stopping.load(Ordering::Acquire) {
            assert!(Instant::now() < end, "the handler is not told to stop");
            std::thread::yield_now();
        }
        std::thread::sleep(Duration::from_millis(20));
        assert!(!stop.is_finished());
        // Too late for this one.
        client.send();
        client.driver.kick();
        echo.release();
        assert_eq!(stop.join().unwrap().unwrap(), 2);
    });
    assert_eq!(std::iter::from_fn(|| client.driver.poll_used()).count(), 2);
    assert!(matches!(
        thread.stop(),
        Err(WorkerError::NotRunning { queue: 0 })
    ));
}

#[test]
fn a_queue_without_kick_eventfd_is_polled() {
    let echo = Echo::new(Mode::AtOnce);
    let (thread, _) = spawn(&echo, 0);
    let ram = GuestRam::new(1 << 20);
    let mut client = Client::new(&ram, 16, 0, false);
    let mut config = client.driver.ring_config(0, None);
    config.kick = None;
    thread.start(config).unwrap();
    for _ in 0..20 {
        assert!(client.send());
        client.driver.publish();
        let used = client.driver.wait_used(PATIENCE).unwrap();
        client.check(used);
    }
    thread.set_kick(Some(client.driver.kick_fd().try_clone_to_owned().unwrap()));
    client.exchange(100, 8);
}

#[test]
fn a_disabled_ring_holds_still_until_it_is_enabled() {
    let echo = Echo::new(Mode::AtOnce);
    let (thread, stats) = spawn(&echo, 0);
    let ram = GuestRam::new(1 << 20);
    let mut client = Client::new(&ram, 16, 0, false);
    let mut config = client.driver.ring_config(0, None);
    config.enabled = false;
    thread.start(config).unwrap();
    client.send();
    client.driver.kick_now();
    client.driver.publish();
    assert!(client.driver.wait_used(Duration::from_millis(50)).is_none());
    assert_eq!(stats.requests.get(), 0);
    thread.set_enabled(true);
    let used = client.driver.wait_used(PATIENCE).unwrap();
    client.check(used);
    thread.set_enabled(false);
    client.send();
    client.driver.kick();
    assert!(client.driver.wait_used(Duration::from_millis(50)).is_none());
    assert_eq!(thread.stop().unwrap(), 1);
}

#[test]
fn eventfds_and_memory_can_be_exchanged_while_the_ring_runs() {
    let echo = Echo::new(Mode::ThroughTheRing);
    let (thread, _) = spawn(&echo, 0);
    let ram = GuestRam::new(1 << 20);
    let mut client = Client::new(&ram, 16, EVENT_IDX, false);
    let mut config = client.driver.ring_config(0, None);
    let elsewhere = || rustix::event::eventfd(0, EventfdFlags::empty()).unwrap();
    config.kick = Some(elsewhere());
    config.call = Some(elsewhere());
    thread.start(config).unwrap();
    // It looks at the ring once without a kick.
    settle(&echo.rounds);
    client.send();
    client.driver.kick();
    assert!(client.driver.wait_used(Duration::from_millis(20)).is_none());
    thread.set_kick(Some(client.driver.kick_fd().try_clone_to_owned().unwrap()));
    thread.set_call(Some(client.driver.call_fd().try_clone_to_owned().unwrap()));
    let used = client.driver.wait_used(PATIENCE).unwrap();
    client.check(used);
    for _ in 0..20 {
        client.exchange(50, 8);
        let mut map = crate::memory::MemoryMap::new();
        map.add(ram.region(), ram.fd().try_clone_to_owned().unwrap())
            .unwrap();
        while client.send() {}
        client.driver.kick();
        thread.set_memory(Arc::clone(map.memory()));
        while client.driver.out_count() > 0 {
            let used = client.driver.wait_used(PATIENCE).unwrap();
            client.check(used);
        }
    }
}

#[test]
fn chains_of_a_killed_process_are_served_by_the_next_one() {
    let ram = GuestRam::new(1 << 20);
    let mut client = Client::new(&ram, 16, EVENT_IDX, false);
    let region = InflightRegion::create(1, 16, 0).unwrap();
    // A process that popped five, returned one, and died.
    for _ in 0..6 {
        client.send();
    }
    client.driver.publish();
    let layout = client.driver.layout();
    let memory = Arc::clone(ram.memory());
    let states = region.queue(0);
    let (mut dead, _) =
        crate::virtqueue::Virtqueue::new(layout, 0, EVENT_IDX, memory, states).unwrap();
    let mut tokens = Vec::new();
    for _ in 0..5 {
        let Some(crate::virtqueue::Popped::Chain(chain)) = dead.pop() else {
            panic!()
        };
        tokens.push(chain.token);
    }
    dead.add_used(tokens.remove(2), 99);
    let _ = dead.publish();
    drop(dead);
    let used = client.driver.poll_used().unwrap();
    client.numbers[usize::from(used.head)] = None;

    let (thread, stats) = spawn(&Echo::new(Mode::ThroughTheRing), 0);
    thread
        .start(client.driver.ring_config(0, region.queue(0)))
        .unwrap();
    for _ in 0..5 {
        let used = client.driver.wait_used(PATIENCE).unwrap();
        client.check(used);
    }
    assert_eq!(thread.stop().unwrap(), 6);
    assert_eq!(stats.requests.get(), 5);
}

#[test]
fn a_ring_that_cannot_be_started_says_why_and_a_second_start_is_refused() {
    let (thread, _) = spawn(&Echo::new(Mode::AtOnce), 0);
    let ram = GuestRam::new(1 << 20);
    let driver = DriverQueue::new(&ram, 16, 0);
    let mut config = driver.ring_config(0, None);
    config.used_ring = 0;
    assert!(matches!(
        thread.start(config),
        Err(WorkerError::Ring {
            source: RingError::NotInMemory { .. },
            ..
        })
    ));
    thread.start(driver.ring_config(0, None)).unwrap();
    let again = thread.start(driver.ring_config(0, None));
    assert!(matches!(again, Err(WorkerError::Running { .. })));
    assert!(thread.is_alive());
}

#[test]
fn a_handler_that_cannot_be_made_is_reported() {
    let device = echo_device(&Echo::new(Mode::AtOnce));
    let error = QueueThread::spawn(device, 2, Arc::default()).unwrap_err();
    assert!(matches!(error, WorkerError::Handler { queue: 2, .. }));
}

#[test]
fn a_kick_that_is_no_eventfd_ends_in_polling_not_in_spinning() {
    let echo = Echo::new(Mode::AtOnce);
    let (thread, _) = spawn(&echo, 0);
    let ram = GuestRam::new(1 << 20);
    let mut client = Client::new(&ram, 16, 0, false);
    let (read_end, write_end) = rustix::pipe::pipe().unwrap();
    drop(write_end);
    let file = rustix::fs::memfd_create("no-eventfd", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    for kick in [read_end, file] {
        thread.set_kick(Some(kick.as_fd().try_clone_to_owned().unwrap()));
        let mut config = client.driver.ring_config(client.driver.next_avail(), None);
        config.kick = Some(kick);
        thread.start(config).unwrap();
        let (began, before) = (Instant::now(), echo.rounds.load(Ordering::Relaxed));
        std::thread::sleep(Duration::from_millis(100));
        let rounds = echo.rounds.load(Ordering::Relaxed) - before;
        let most = 5 * began.elapsed().as_millis();
        assert!(u128::from(rounds) < most, "{rounds} rounds");
        thread.set_kick(Some(client.driver.kick_fd().try_clone_to_owned().unwrap()));
        client.exchange(10, 2);
        thread.stop().unwrap();
    }
}
