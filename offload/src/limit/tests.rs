//! Gates over one limit, with time as a number.

use super::*;

const SECOND: u64 = 1_000_000_000;

fn limit(rates: Rates) -> Arc<Limit> {
    let limit = Limit::new();
    limit.set(rates, 0).unwrap();
    Arc::new(limit)
}

fn ops(ops: u64) -> Rates {
    Rates {
        ops: Some(ops),
        ..Rates::default()
    }
}

fn bytes(len: u64) -> Cost {
    Cost { ops: 1, bytes: len }
}

/// A queue whose guest keeps some requests of one size waiting at all times.
struct Queue {
    gate: Gate<u64>,
    depth: usize,
    cost: Cost,
    offered: u64,
    started: u64,
}

impl Queue {
    fn new(limit: &Arc<Limit>, depth: usize, cost: Cost) -> Self {
        Self {
            gate: Gate::new(Arc::clone(limit)),
            depth,
            cost,
            offered: 0,
            started: 0,
        }
    }

    fn start(&mut self, number: u64) {
        assert_eq!(number, self.started, "requests keep their order");
        self.started += 1;
    }

    /// What the queue's thread does when it wakes. At most some, where nothing limits.
    fn turn(&mut self, now: u64) {
        for _ in 0..10_000 {
            if let Some(Released { item, .. }) = self.gate.next(now) {
                self.start(item);
            } else if self.gate.len() < self.depth {
                let number = self.offered;
                self.offered += 1;
                if let Some(number) = self.gate.offer(number, self.cost, now) {
                    self.start(number);
                }
            } else {
                return;
            }
        }
    }
}

/// Lets the queues run, each woken `late` after its deadline.
fn run(queues: &mut [Queue], from: u64, to: u64, late: u64) {
    let mut now = from;
    for queue in &mut *queues {
        queue.turn(now);
    }
    loop {
        let next = queues.iter().enumerate();
        let next = next.filter_map(|(n, queue)| Some((queue.gate.deadline()?, n)));
        let Some((at, n)) = next.min() else { return };
        now = now.max(at + late);
        if now >= to {
            return;
        }
        queues[n].turn(now);
    }
}

/// Within a hundredth, and what passes at once.
#[track_caller]
fn about(count: u64, expected: u64, rate: u64) {
    let slack = rate * SLACK_MS / 1000 + 2;
    assert!(
        count + expected / 100 >= expected && count <= expected + slack,
        "{count} instead of {expected}"
    );
}

#[test]
fn a_queue_gets_its_rate_although_its_thread_wakes_late() {
    for late in [0, 60_000, 1_000_000, 15_000_000] {
        let limit = limit(ops(5000));
        let mut queues = [Queue::new(&limit, 32, bytes(4096))];
        run(&mut queues, 0, 10 * SECOND, late);
        about(queues[0].started, 50_000, 5000);
    }
}

#[test]
fn queues_share_one_limit_and_a_deep_one_does_not_starve_a_shallow_one() {
    let limit = limit(ops(9000));
    let depths = [1, 128, 8];
    let mut queues = depths.map(|depth| Queue::new(&limit, depth, bytes(4096)));
    run(&mut queues, 0, 10 * SECOND, 50_000);
    about(queues.iter().map(|queue| queue.started).sum(), 90_000, 9000);
    for queue in &queues {
        // The slack goes to who asks first.
        assert!(queue.started >= 29_500, "{}", queue.started);
    }
}

#[test]
fn both_rates_hold_and_the_tighter_one_decides() {
    let rates = Rates {
        bytes: Some(1 << 20),
        ..ops(100)
    };
    let small = limit(rates);
    let mut queues = [Queue::new(&small, 4, bytes(4096))];
    run(&mut queues, 0, 10 * SECOND, 0);
    about(queues[0].started, 1000, 100);
    let large = limit(rates);
    let mut queues = [Queue::new(&large, 4, bytes(64 << 10))];
    run(&mut queues, 0, 10 * SECOND, 0);
    about(queues[0].started, 160, 16);
    // No bytes: only the operation counts.
    let none = limit(rates);
    let mut queues = [Queue::new(&none, 4, bytes(0))];
    run(&mut queues, 0, 10 * SECOND, 0);
    about(queues[0].started, 1000, 100);
}

#[test]
fn long_requests_count_as_several_operations_if_asked_for() {
    let rates = Rates {
        op_len: Some(16 << 10),
        ..ops(1000)
    };
    for (len, each) in [(0, 1), (4096, 1), (16384, 1), (16385, 2), (1 << 20, 64)] {
        let limit = limit(rates);
        let mut queues = [Queue::new(&limit, 4, bytes(len))];
        run(&mut queues, 0, 10 * SECOND, 0);
        about(queues[0].started, 10_000 / each, 1000);
    }
}

#[test]
fn a_burst_lasts_as_long_as_it_was_bought_and_comes_back_after_a_rest() {
    let rates = Rates {
        ops_burst: Some(Burst {
            rate: 3000,
            seconds: 10,
        }),
        ..ops(1000)
    };
    let limit = limit(rates);
    let mut queues = [Queue::new(&limit, 16, bytes(4096))];
    let mut before = 0;
    let mut during = |queues: &mut [Queue; 1], from: u64, to: u64| {
        run(queues, from * SECOND, to * SECOND, 0);
        let count = queues[0].started - before;
        before = queues[0].started;
        count
    };
    about(during(&mut queues, 0, 5), 15_000, 3000);
    about(during(&mut queues, 5, 10), 15_000, 3000);
    about(during(&mut queues, 10, 20), 10_000, 1000);
    // A rest: whoever waits is served, then nobody asks. 20,000 credits take 20 seconds.
    queues[0].depth = 0;
    during(&mut queues, 20, 30);
    queues[0].depth = 16;
    about(during(&mut queues, 30, 35), 15_000, 3000);
    during(&mut queues, 35, 40);
    about(during(&mut queues, 40, 50), 10_000, 1000);
}

#[test]
fn a_change_holds_at_once_for_those_that_wait_too() {
    let limit = limit(Rates {
        bytes: Some(4096),
        ..Rates::default()
    });
    let rings = Arc::new(AtomicU64::new(0));
    let bell = Arc::clone(&rings);
    limit.watch(move || {
        bell.fetch_add(1, Ordering::Relaxed);
    });
    let mut gate = Gate::new(Arc::clone(&limit));
    assert_eq!(gate.offer(0, bytes(1 << 20), 0), Some(0));
    for number in 1..4 {
        assert_eq!(gate.offer(number, bytes(1 << 20), 0), None);
    }
    // Over four minutes, but then somebody buys more.
    assert!(gate.deadline() > Some(200 * SECOND));
    assert_eq!(gate.next(SECOND), None);
    limit
        .set(
            Rates {
                bytes: Some(1 << 20),
                ..Rates::default()
            },
            SECOND,
        )
        .unwrap();
    assert_eq!(rings.load(Ordering::Relaxed), 1);
    let first = gate.next(SECOND).unwrap();
    assert_eq!((first.item, first.waited), (1, SECOND));
    assert_eq!(gate.next(SECOND + 1), None);
    let within = SECOND..3 * SECOND;
    assert!(within.contains(&gate.deadline().unwrap()), "{gate:?}");

    limit.set(Rates::default(), SECOND + 2).unwrap();
    assert_eq!(gate.next(SECOND + 2).unwrap().item, 2);
    assert_eq!(gate.next(SECOND + 2).unwrap().item, 3);
    assert!(gate.is_empty() && gate.deadline().is_none() && gate.is_open());

    // A limit that comes back holds what it sees first.
    limit.set(ops(1), 2 * SECOND).unwrap();
    assert!(!gate.is_open());
    assert_eq!(gate.offer(4, bytes(1), 2 * SECOND), Some(4));
    assert_eq!(gate.offer(5, bytes(1), 2 * SECOND), None);
}

#[test]
fn refused_limits_leave_those_in_force_as_they_are() {
    let limit = limit(ops(100));
    let version = limit.version();
    assert!(limit.set(ops(0), 0).is_err());
    assert_eq!((limit.rates(), limit.version()), (ops(100), version));
}

#[test]
fn setting_the_same_limits_again_earns_no_credit() {
    let rates = Rates {
        ops_burst: Some(Burst {
            rate: 1000,
            seconds: 10,
        }),
        ..ops(10)
    };
    let limit = limit(rates);
    let mut queues = [Queue::new(&limit, 16, bytes(512))];
    for second in 0..30 {
        run(&mut queues, second * SECOND, (second + 1) * SECOND, 0);
        limit.set(rates, (second + 1) * SECOND).unwrap();
    }
    // 9,900 credits and 10 a second; each change forgives the debt of one request.
    let started = queues[0].started;
    assert!((10_100..10_400).contains(&started), "{started}");
}

#[test]
fn a_queue_that_stops_gets_all_that_waits_and_pays_for_it() {
    let limit = limit(ops(10));
    let mut gate = Gate::new(Arc::clone(&limit));
    assert_eq!(gate.offer(0, bytes(1), 0), Some(0));
    for number in 1..=50 {
        assert_eq!(gate.offer(number, bytes(1), 0), None);
    }
    for number in 1..=50 {
        assert_eq!(gate.next_unlimited(0).unwrap().item, number);
    }
    assert_eq!(gate.next_unlimited(0), None);
    // A second queue has to wait until that is paid for.
    let mut other = Gate::new(limit);
    assert_eq!(other.offer(51, bytes(1), 0), None);
    assert!(other.deadline() > Some(4 * SECOND));
}

#[test]
fn threads_together_never_get_more_than_the_limit() {
    let limit = limit(ops(1_000_000));
    let taken: u64 = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let mut gate = Gate::new(Arc::clone(&limit));
                scope.spawn(move || {
                    let mut taken = 0;
                    // All at the same instant: only the slack can pass.
                    while gate.offer((), bytes(1), SECOND).is_some() {
                        taken += 1;
                    }
                    taken
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).sum()
    });
    assert_eq!(taken, 1_000_000 * SLACK_MS / 1000 + 1);
}
