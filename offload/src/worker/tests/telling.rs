//! When the thread looks, sleeps and wakes, and when the guest is told.

use super::*;

#[test]
fn a_queue_that_polls_answers_all_with_fewer_kicks_and_stops() {
    for mode in [Mode::AtOnce, Mode::ThroughTheRing] {
        let echo = Echo::polling(mode, Duration::from_millis(2));
        let (thread, stats) = spawn(&echo, 0);
        let ram = GuestRam::new(4 << 20);
        let mut client = Client::new(&ram, 64, EVENT_IDX, false);
        thread.start(client.driver.ring_config(0, None)).unwrap();
        for depth in [1, 7, 32] {
            client.exchange(3000, depth);
        }
        // On a machine that has no time for us, many waits are longer than the limit.
        assert!(stats.kicks.get() < 8500, "{} kicks", stats.kicks.get());
        assert_eq!(thread.stop().unwrap(), 9000);
        assert_eq!(stats.completions.get(), 9000);
    }
}

/// Serves 32 chains that are there when the queue starts, to the last.
fn serve_32_at_once(mode: Mode) -> (Arc<Echo>, Arc<QueueStats>) {
    let echo = Echo::new(mode);
    let (thread, stats) = spawn(&echo, 0);
    let ram = GuestRam::new(1 << 20);
    // Without EVENT_IDX the guest wants to be told of each.
    let mut client = Client::new(&ram, 64, 0, false);
    for _ in 0..32 {
        assert!(client.send());
    }
    client.driver.publish();
    thread.start(client.driver.ring_config(0, None)).unwrap();
    for _ in 0..32 {
        let used = client.driver.wait_used(PATIENCE).expect("an answer");
        client.check(used);
    }
    thread.stop().unwrap();
    (echo, stats)
}

#[test]
fn a_busy_guest_is_told_of_a_few_completions_together() {
    let (_, stats) = serve_32_at_once(Mode::OneARound);
    assert_eq!(stats.completions.get(), 32);
    // In fours while there are many more to come, then one by one.
    let told = stats.notifications.get();
    assert!((12..=20).contains(&told), "{told} notifications");
}

#[test]
fn a_handler_that_has_enough_gets_the_next_chain_in_the_next_round_without_a_kick() {
    let (echo, _) = serve_32_at_once(Mode::EnoughAtOnce);
    let rounds = echo.rounds.load(Ordering::Relaxed);
    assert!(rounds >= 32, "{rounds} rounds");
}

#[test]
fn a_busy_guest_is_told_of_a_completion_that_no_other_follows() {
    const WAIT: Duration = Duration::from_secs(5);
    for poll_limit in [0, 3, 3000].map(Duration::from_micros) {
        let echo = Echo::polling(Mode::OneAWake, poll_limit);
        let (thread, stats) = spawn(&echo, 0);
        let ram = GuestRam::new(1 << 20);
        let mut client = Client::new(&ram, 64, EVENT_IDX, false);
        while client.send() {}
        client.driver.publish();
        thread.start(client.driver.ring_config(0, None)).unwrap();
        while stats.requests.get() < 32 {
            std::thread::yield_now();
        }
        let mut untold = 0;
        for _ in 0..32 {
            let begin = Instant::now();
            echo.wakers.lock().unwrap()[0].wake();
            let used = client.driver.wait_used(WAIT).expect("an answer");
            client.check(used);
            // What was not told is seen when the wait ends.
            untold += u32::from(begin.elapsed() >= WAIT);
        }
        thread.stop().unwrap();
        assert_eq!(
            untold, 0,
            "answered, but not told, at a limit of {poll_limit:?}"
        );
    }
}

#[test]
fn a_queue_that_polls_sleeps_when_nothing_comes() {
    let echo = Echo::polling(Mode::AtOnce, Duration::from_millis(1));
    let (thread, _) = spawn(&echo, 0);
    let ram = GuestRam::new(4 << 20);
    let mut client = Client::new(&ram, 64, EVENT_IDX, false);
    thread.start(client.driver.ring_config(0, None)).unwrap();
    client.exchange(1000, 1);
    let rounds = settle(&echo.rounds);
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(echo.rounds.load(Ordering::Relaxed), rounds);
    client.exchange(10, 1);
    thread.stop().unwrap();
}

#[test]
fn an_idle_queue_never_wakes_up() {
    let echo = Echo::new(Mode::ThroughTheRing);
    let (thread, _) = spawn(&echo, 0);
    let ram = GuestRam::new(1 << 20);
    let mut client = Client::new(&ram, 16, EVENT_IDX, false);
    thread.start(client.driver.ring_config(0, None)).unwrap();
    client.exchange(10, 4);
    let rounds = settle(&echo.rounds);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(echo.rounds.load(Ordering::Relaxed), rounds);
    client.exchange(10, 4);
}

#[test]
fn wakes_from_many_threads_reach_the_handler_and_are_merged() {
    let echo = Echo::new(Mode::AtOnce);
    let (_thread, _) = spawn(&echo, 0);
    let waker = echo.wakers.lock().unwrap()[0].clone();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..10_000).for_each(|_| waker.wake()));
        }
    });
    let count = settle(&echo.wakes);
    assert!((1..=40_000).contains(&count), "{count}");
    waker.wake();
    let end = Instant::now() + PATIENCE;
    while echo.wakes.load(Ordering::Acquire) == count && Instant::now() < end {
        std::thread::yield_now();
    }
    assert_eq!(echo.wakes.load(Ordering::Acquire), count + 1);
}

#[test]
fn a_deadline_wakes_the_handler_without_anything_else_happening() {
    let echo = Echo::new(Mode::AtOnce);
    let (thread, _) = spawn(&echo, 0);
    for wakes in 1..=2 {
        let at = Instant::now() + Duration::from_millis(30);
        *echo.deadline.lock().unwrap() = Some(at);
        // The loop has to look at the deadline once: it goes round for a command.
        thread.set_enabled(true);
        while echo.wakes.load(Ordering::Acquire) < wakes {
            assert!(at.elapsed() < PATIENCE, "it sleeps past its deadline");
            std::thread::yield_now();
        }
        assert!(Instant::now() >= at, "it was woken too early");
    }
}
