use std::os::fd::AsFd;
use std::sync::Mutex;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use io_uring::{opcode, types};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::device::{Chain, QueueHandler};
use crate::inflight::{InflightRegion, SharedRegion};
use crate::testing::driver::{
    Buffer, DriverQueue, EVENT_IDX, GuestRam, INDIRECT_DESC, RAM_BASE, RawDescriptor, Used,
    VERSION_1,
};

const PATIENCE: Duration = Duration::from_secs(10);

/// How the echo device answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// In `request`.
    AtOnce,
    /// When a NOP has gone through the io_uring, one for each chain, in reverse order of batches.
    ThroughTheRing,
    /// When it is told to, by [`Echo::release`].
    WhenReleased,
    /// One for each wake.
    OneAWake,
    /// One in each round, and rounds go on until all are answered.
    OneARound,
}

/// Copies the first readable buffer to the first writable one.
#[derive(Debug)]
struct Echo {
    mode: Mode,
    wakers: Mutex<Vec<Waker>>,
    released: AtomicBool,
    wakes: Arc<AtomicU64>,
    rounds: Arc<AtomicU64>,
    deadline: Mutex<Option<Instant>>,
    poll_limit: Duration,
}

impl Echo {
    fn new(mode: Mode) -> Arc<Self> {
        Self::polling(mode, Duration::ZERO)
    }

    fn polling(mode: Mode, poll_limit: Duration) -> Arc<Self> {
        Arc::new(Self {
            mode,
            poll_limit,
            wakers: Mutex::default(),
            released: AtomicBool::new(false),
            wakes: Arc::default(),
            rounds: Arc::default(),
            deadline: Mutex::default(),
        })
    }

    fn release(&self) {
        self.released.store(true, Ordering::Release);
        for waker in self.wakers.lock().unwrap().iter() {
            waker.wake();
        }
    }
}

struct EchoDevice(Arc<Echo>);

impl Device for EchoDevice {
    type Queue = EchoQueue;

    fn features(&self) -> u64 {
        0
    }
    fn queue_count(&self) -> u16 {
        2
    }
    fn queue_size_max(&self) -> u16 {
        256
    }
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }
    fn write_config(&self, _: u32, _: &[u8]) -> Result<(), DeviceError> {
        Err("read-only".into())
    }
    fn set_features(&self, _: u64) {}
    fn start(&self, _: Option<Arc<SharedRegion>>) -> Result<(), DeviceError> {
        Ok(())
    }
    fn stop(&self) {}
    fn poll_limit(&self) -> Duration {
        self.0.poll_limit
    }

    fn queue(&self, index: u16, waker: Waker) -> Result<EchoQueue, DeviceError> {
        if index > 1 {
            return Err("there are two queues".into());
        }
        self.0.wakers.lock().unwrap().push(waker);
        Ok(EchoQueue {
            echo: Arc::clone(&self.0),
            held: Vec::new(),
            batch: Vec::new(),
            count: 0,
        })
    }
}

struct EchoQueue {
    echo: Arc<Echo>,
    held: Vec<Option<Chain>>,
    batch: Vec<usize>,
    count: usize,
}

impl EchoQueue {
    fn answer_one(&mut self, io: &mut QueueIo<'_>) {
        if let Some(chain) = self.held.iter_mut().find_map(Option::take) {
            self.count -= 1;
            self.answer(chain, io);
        }
    }

    fn answer(&mut self, chain: Chain, io: &mut QueueIo<'_>) {
        let mut written = 0;
        if let (Some(from), Some(to)) = (chain.readable.first(), chain.writable.first()) {
            let mut bytes = vec![0; from.len.min(to.len) as usize];
            let memory = io.memory();
            if memory
                .read_slice(&mut bytes, GuestAddress(from.addr))
                .is_ok()
                && memory.write_slice(&bytes, GuestAddress(to.addr)).is_ok()
            {
                written = bytes.len() as u32;
            }
        }
        io.complete(chain.token, written);
    }
}

impl QueueHandler for EchoQueue {
    fn request(&mut self, chain: Chain, io: &mut QueueIo<'_>) {
        if self.echo.mode == Mode::AtOnce {
            return self.answer(chain, io);
        }
        let place = self
            .held
            .iter()
            .position(Option::is_none)
            .unwrap_or_else(|| {
                self.held.push(None);
                self.held.len() - 1
            });
        self.held[place] = Some(chain);
        self.count += 1;
        self.batch.push(place);
    }

    fn batch_end(&mut self, io: &mut QueueIo<'_>) {
        if self.echo.mode == Mode::ThroughTheRing {
            for place in self.batch.drain(..).rev() {
                // SAFETY: a NOP has no buffers.
                unsafe { io.push(opcode::Nop::new().build(), place as u64) };
            }
        }
    }

    fn completion(&mut self, user_data: u64, res: i32, io: &mut QueueIo<'_>) {
        assert_eq!(res, 0);
        let chain = self.held[user_data as usize]
            .take()
            .expect("completed twice");
        self.count -= 1;
        self.answer(chain, io);
    }

    fn wake(&mut self, io: &mut QueueIo<'_>) {
        self.echo.wakes.fetch_add(1, Ordering::Relaxed);
        *self.echo.deadline.lock().unwrap() = None;
        if self.echo.mode == Mode::OneAWake {
            self.answer_one(io);
        }
        if self.echo.mode == Mode::WhenReleased && self.echo.released.load(Ordering::Acquire) {
            for place in 0..self.held.len() {
                if let Some(chain) = self.held[place].take() {
                    self.count -= 1;
                    self.answer(chain, io);
                }
            }
        }
    }

    fn round_end(&mut self, io: &mut QueueIo<'_>) {
        self.echo.rounds.fetch_add(1, Ordering::Relaxed);
        if self.echo.mode == Mode::OneARound {
            self.answer_one(io);
        }
    }

    fn has_more(&self) -> bool {
        self.echo.mode == Mode::OneARound && self.count > 0
    }

    fn deadline(&self) -> Option<Instant> {
        *self.echo.deadline.lock().unwrap()
    }

    fn chains_held(&self) -> usize {
        self.count
    }
}

fn spawn(echo: &Arc<Echo>, index: u16) -> (QueueThread, Arc<QueueStats>) {
    let stats = Arc::new(QueueStats::new());
    let device = Arc::new(EchoDevice(Arc::clone(echo)));
    let thread = QueueThread::spawn(device, index, Arc::clone(&stats)).unwrap();
    (thread, stats)
}

/// Sends numbers and checks their echoes.
struct Client {
    driver: DriverQueue,
    indirect: bool,
    buffers: u64,
    /// The number that each head carries.
    numbers: Vec<Option<u64>>,
    next: u64,
}

impl Client {
    fn new(ram: &Arc<GuestRam>, size: u16, features: u64, indirect: bool) -> Self {
        Self {
            driver: DriverQueue::new(ram, size, features | VERSION_1),
            indirect,
            buffers: ram.alloc(16 * u64::from(size), 16),
            numbers: vec![None; usize::from(size)],
            next: 1,
        }
    }

    fn send(&mut self) -> bool {
        let ram = Arc::clone(self.driver.ram());
        // The head is only known afterwards, so numbers have slots of their own.
        let slot = self.next % self.numbers.len() as u64;
        let from = self.buffers + 16 * slot;
        let chain = [Buffer::readable(from, 8), Buffer::writable(from + 8, 8)];
        let free = self.numbers.iter().flatten();
        if free.clone().any(|n| n % self.numbers.len() as u64 == slot) {
            return false;
        }
        let head = if self.indirect {
            self.driver.add_indirect(&chain)
        } else {
            self.driver.add(&chain)
        };
        let Some(head) = head else { return false };
        ram.write(from, &self.next.to_ne_bytes());
        ram.write(from + 8, &[0; 8]);
        self.numbers[usize::from(head)] = Some(self.next);
        self.next += 1;
        true
    }

    fn check(&mut self, used: Used) {
        let number = self.numbers[usize::from(used.head)]
            .take()
            .expect("came back twice");
        assert_eq!(used.written, 8);
        let slot = number % self.numbers.len() as u64;
        let echo = self.driver.ram().read(self.buffers + 16 * slot + 8, 8);
        assert_eq!(echo, number.to_ne_bytes());
    }

    /// Sends and gets back `count` numbers, `depth` at a time.
    fn exchange(&mut self, count: u64, depth: u64) {
        let (mut sent, mut got) = (0, 0);
        while got < count {
            while sent < count && sent - got < depth && self.send() {
                sent += 1;
            }
            self.driver.kick();
            let used = self.driver.wait_used(PATIENCE).expect("an answer in time");
            self.check(used);
            got += 1;
            while let Some(used) = self.driver.poll_used() {
                self.check(used);
                got += 1;
            }
        }
    }
}

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

#[test]
fn a_busy_guest_is_told_of_a_few_completions_together() {
    let echo = Echo::new(Mode::OneARound);
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
    assert_eq!(stats.completions.get(), 32);
    // In fours while there are many more to come, then one by one.
    let told = stats.notifications.get();
    assert!((12..=20).contains(&told), "{told} notifications");
}

#[test]
fn a_busy_guest_is_told_of_a_completion_that_no_other_follows() {
    const WAIT: Duration = Duration::from_secs(1);
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
    std::thread::sleep(Duration::from_millis(20));
    let rounds = echo.rounds.load(Ordering::Relaxed);
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(echo.rounds.load(Ordering::Relaxed), rounds);
    client.exchange(10, 1);
    thread.stop().unwrap();
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
        std::thread::sleep(Duration::from_millis(50));
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
fn an_idle_queue_never_wakes_up() {
    let echo = Echo::new(Mode::ThroughTheRing);
    let (thread, _) = spawn(&echo, 0);
    let ram = GuestRam::new(1 << 20);
    let mut client = Client::new(&ram, 16, EVENT_IDX, false);
    thread.start(client.driver.ring_config(0, None)).unwrap();
    client.exchange(10, 4);
    std::thread::sleep(Duration::from_millis(20));
    let rounds = echo.rounds.load(Ordering::Relaxed);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(echo.rounds.load(Ordering::Relaxed), rounds);
    client.exchange(10, 4);
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
    std::thread::sleep(Duration::from_millis(20));
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
    let device = Arc::new(EchoDevice(Echo::new(Mode::AtOnce)));
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
        let before = echo.rounds.load(Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(100));
        assert!(echo.rounds.load(Ordering::Relaxed) - before < 500);
        thread.set_kick(Some(client.driver.kick_fd().try_clone_to_owned().unwrap()));
        client.exchange(10, 2);
        thread.stop().unwrap();
    }
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
    let end = Instant::now() + PATIENCE;
    let seen = || echo.wakes.load(Ordering::Relaxed);
    while seen() == 0 && Instant::now() < end {
        std::thread::yield_now();
    }
    std::thread::sleep(Duration::from_millis(20));
    let count = seen();
    assert!((1..=40_000).contains(&count), "{count}");
    waker.wake();
    while seen() == count && Instant::now() < end {
        std::thread::yield_now();
    }
    assert_eq!(seen(), count + 1);
}

#[test]
fn a_deadline_wakes_the_handler_without_anything_else_happening() {
    let echo = Echo::new(Mode::AtOnce);
    let (_thread, _) = spawn(&echo, 0);
    let start = Instant::now();
    *echo.deadline.lock().unwrap() = Some(start + Duration::from_millis(30));
    // The loop has to look at the deadline once.
    echo.wakers.lock().unwrap()[0].wake();
    while echo.wakes.load(Ordering::Relaxed) < 1 {
        assert!(start.elapsed() < PATIENCE);
        std::thread::yield_now();
    }
    *echo.deadline.lock().unwrap() = Some(Instant::now() + Duration::from_millis(30));
    let again = Instant::now();
    echo.wakers.lock().unwrap()[0].wake();
    while echo.wakes.load(Ordering::Relaxed) < 2 {
        assert!(again.elapsed() < PATIENCE);
        std::thread::yield_now();
    }
}

/// A handler that pushes far more operations at once than the submission queue holds.
struct Flood {
    done: Arc<AtomicU64>,
    in_kernel: usize,
}

struct FloodDevice(Arc<AtomicU64>);

const FLOOD: u64 = 20_000;

impl Device for FloodDevice {
    type Queue = Flood;

    fn features(&self) -> u64 {
        0
    }
    fn queue_count(&self) -> u16 {
        1
    }
    fn queue_size_max(&self) -> u16 {
        256
    }
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }
    fn write_config(&self, _: u32, _: &[u8]) -> Result<(), DeviceError> {
        Err("read-only".into())
    }
    fn set_features(&self, _: u64) {}
    fn start(&self, _: Option<Arc<SharedRegion>>) -> Result<(), DeviceError> {
        Ok(())
    }
    fn stop(&self) {}
    fn queue(&self, _: u16, waker: Waker) -> Result<Flood, DeviceError> {
        waker.wake();
        Ok(Flood {
            done: Arc::clone(&self.0),
            in_kernel: 0,
        })
    }
}

impl QueueHandler for Flood {
    fn request(&mut self, chain: Chain, io: &mut QueueIo<'_>) {
        io.complete(chain.token, 0);
    }
    fn batch_end(&mut self, _: &mut QueueIo<'_>) {}
    fn completion(&mut self, user_data: u64, _: i32, _: &mut QueueIo<'_>) {
        self.in_kernel -= 1;
        self.done.fetch_add(user_data, Ordering::Relaxed);
    }
    fn wake(&mut self, io: &mut QueueIo<'_>) {
        for i in 1..=FLOOD {
            self.in_kernel += 1;
            if i % 16 == 0 {
                // Some that take a while; the kernel copies the time when it takes the entry,
                // which may be after this call, so it must live as long as the process.
                static SHORT: types::Timespec = types::Timespec::new().nsec(1_000_000);
                // SAFETY: `SHORT` lives for ever.
                unsafe { io.push(opcode::Timeout::new(&SHORT).build(), i) };
            } else {
                // SAFETY: a NOP has no buffers.
                unsafe { io.push(opcode::Nop::new().build(), i) };
            }
        }
    }
    fn chains_held(&self) -> usize {
        0
    }
}

#[test]
fn no_operation_is_lost_when_there_are_more_than_the_kernel_takes() {
    let done = Arc::new(AtomicU64::new(0));
    let device = Arc::new(FloodDevice(Arc::clone(&done)));
    let thread = QueueThread::spawn(device, 0, Arc::default()).unwrap();
    // Dropping waits for all of them.
    drop(thread);
    assert_eq!(done.load(Ordering::Relaxed), FLOOD * (FLOOD + 1) / 2);
}
