//! Queues' threads with devices made for it, and a driver that knows what it sent.

use std::sync::Mutex;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use io_uring::opcode;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::device::{Chain, QueueHandler};
use crate::inflight::SharedRegion;
use crate::testing::driver::{
    Buffer, DriverQueue, EVENT_IDX, GuestRam, INDIRECT_DESC, RAM_BASE, Used, VERSION_1,
};

mod control;
mod flood;
mod groups;
mod telling;
mod traffic;

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
    /// In `request`, and each is enough for a round.
    EnoughAtOnce,
}

/// Copies the first readable buffer to the first writable one.
#[derive(Debug)]
struct Echo {
    mode: Mode,
    wakers: Mutex<Vec<Waker>>,
    released: AtomicBool,
    wakes: Arc<AtomicU64>,
    rounds: Arc<AtomicU64>,
    /// It was told to hold nothing back.
    stopping: AtomicBool,
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
            stopping: AtomicBool::new(false),
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

/// A device that is nothing but queues.
struct Queues<F> {
    count: u16,
    leader: fn(u16) -> u16,
    poll_limit: Duration,
    make: F,
}

impl<F> Queues<F> {
    /// `make` makes the handler of a queue.
    fn new(count: u16, make: F) -> Self {
        Self {
            count,
            leader: |queue| queue,
            poll_limit: Duration::ZERO,
            make,
        }
    }
}

impl<F, Q> Device for Queues<F>
where
    F: Fn(u16, Waker) -> Result<Q, DeviceError> + Send + Sync + 'static,
    Q: QueueHandler,
{
    type Queue = Q;

    fn features(&self) -> u64 {
        0
    }
    fn queue_count(&self) -> u16 {
        self.count
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
        self.poll_limit
    }
    fn leader(&self, queue: u16) -> u16 {
        (self.leader)(queue)
    }
    fn queue(&self, index: u16, waker: Waker) -> Result<Q, DeviceError> {
        (self.make)(index, waker)
    }
}

struct EchoQueue {
    echo: Arc<Echo>,
    held: Vec<Option<Chain>>,
    batch: Vec<usize>,
    count: usize,
}

fn echo_device(echo: &Arc<Echo>) -> Arc<impl Device<Queue = EchoQueue>> {
    let poll_limit = echo.poll_limit;
    let echo = Arc::clone(echo);
    let make = move |index, waker| {
        if index > 1 {
            return Err("there are two queues".into());
        }
        echo.wakers.lock().unwrap().push(waker);
        Ok(EchoQueue {
            echo: Arc::clone(&echo),
            held: Vec::new(),
            batch: Vec::new(),
            count: 0,
        })
    };
    Arc::new(Queues {
        poll_limit,
        ..Queues::new(2, make)
    })
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
        if matches!(self.echo.mode, Mode::AtOnce | Mode::EnoughAtOnce) {
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
        *self.echo.deadline.lock().unwrap() = None;
        self.echo.wakes.fetch_add(1, Ordering::Release);
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

    fn stopping(&mut self, _: &mut QueueIo<'_>) {
        self.echo.stopping.store(true, Ordering::Release);
    }

    fn has_more(&self) -> bool {
        self.echo.mode == Mode::OneARound && self.count > 0
    }

    fn has_enough(&self) -> bool {
        self.echo.mode == Mode::EnoughAtOnce
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
    let thread = QueueThread::spawn(echo_device(echo), index, Arc::clone(&stats)).unwrap();
    (thread, stats)
}

/// Waits until a thread has got to where nothing happens any more, however slow the machine.
fn settle(count: &AtomicU64) -> u64 {
    let end = Instant::now() + PATIENCE;
    let mut before = count.load(Ordering::Acquire);
    loop {
        std::thread::sleep(Duration::from_millis(100));
        let now = count.load(Ordering::Acquire);
        if now == before {
            return now;
        }
        assert!(Instant::now() < end, "it never comes to rest");
        before = now;
    }
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
