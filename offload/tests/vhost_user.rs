//! A whole card, as small as can be, from the socket to the used ring: `vhost`'s frontend and a
//! driver of our own against real queue threads.

#![allow(clippy::unwrap_used)]

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use offload::cli::Listener;
use offload::device::{Chain, Device, DeviceError, QueueHandler};
use offload::inflight::SharedRegion;
use offload::stop::StopSignal;
use offload::telemetry::QueueStats;
use offload::testing::driver::{Buffer, DriverQueue, EVENT_IDX, GuestRam, RAM_BASE, RawDescriptor};
use offload::testing::frontend::TestFrontend;
use offload::vhost_user::{Backend, BackendError, Notified};
use offload::worker::{QueueIo, Waker};
use vhost::vhost_user::VhostUserFrontend;
use vm_memory::{Bytes, GuestAddress};

const PATIENCE: Duration = Duration::from_secs(10);

/// Writes the length of what it reads, plus its configuration byte, into the writable part.
#[derive(Default)]
struct Counting {
    config: Mutex<u8>,
}

impl Device for Counting {
    type Queue = CountingQueue;

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
        vec![*self.config.lock().unwrap()]
    }

    fn write_config(&self, _: u32, data: &[u8]) -> Result<(), DeviceError> {
        *self.config.lock().unwrap() = data[0];
        Ok(())
    }

    fn set_features(&self, _: u64) {}

    fn start(&self, _: Option<Arc<SharedRegion>>) -> Result<(), DeviceError> {
        Ok(())
    }

    fn stop(&self) {}

    fn queue(&self, _: u16, _: Waker) -> Result<CountingQueue, DeviceError> {
        Ok(CountingQueue)
    }
}

struct CountingQueue;

impl QueueHandler for CountingQueue {
    fn request(&mut self, chain: Chain, io: &mut QueueIo<'_>) {
        let len: u32 = chain.readable.iter().map(|segment| segment.len).sum();
        let mut written = 0;
        if let Some(answer) = chain.writable.first() {
            let at = GuestAddress(answer.addr);
            if io.memory().write_obj(len, at).is_ok() {
                written = 4;
            }
        }
        io.complete(chain.token, written);
    }

    fn batch_end(&mut self, _: &mut QueueIo<'_>) {}
    fn completion(&mut self, _: u64, _: i32, _: &mut QueueIo<'_>) {}
    fn wake(&mut self, _: &mut QueueIo<'_>) {}

    fn chains_held(&self) -> usize {
        0
    }
}

/// A card that listens in a directory of its own.
struct Card {
    _dir: tempfile::TempDir,
    path: PathBuf,
    backend: Arc<Backend<Counting>>,
    stop: StopSignal,
    serving: Option<JoinHandle<Result<(), BackendError>>>,
}

impl Card {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("card.sock");
        let listener = Listener::bind(&path, 0o600).unwrap();
        let stats: Vec<_> = (0..2).map(|_| Arc::new(QueueStats::new())).collect();
        let device = Arc::new(Counting::default());
        let backend = Arc::new(Backend::new(device, &stats).unwrap());
        let stop = StopSignal::new().unwrap();
        let serving = std::thread::spawn({
            let (backend, stop) = (Arc::clone(&backend), stop.clone());
            move || backend.serve(listener, &stop)
        });
        Self {
            _dir: dir,
            path,
            backend,
            stop,
            serving: Some(serving),
        }
    }

    fn connect(&self) -> TestFrontend {
        let mut frontend = TestFrontend::connect(&self.path, 2);
        frontend.negotiate(u64::MAX);
        frontend
    }

    fn finish(mut self) {
        self.stop.stop();
        let serving = self.serving.take().unwrap();
        let deadline = Instant::now() + PATIENCE;
        while !serving.is_finished() {
            assert!(Instant::now() < deadline, "the card does not stop");
            std::thread::sleep(Duration::from_millis(1));
        }
        serving.join().unwrap().unwrap();
    }
}

fn driver() -> DriverQueue {
    DriverQueue::new(&GuestRam::new(1 << 20), 64, EVENT_IDX)
}

/// Sends `len` bytes and expects to be told so.
fn ask(driver: &mut DriverQueue, len: u32) {
    let ram = Arc::clone(driver.ram());
    let at = ram.alloc(4, 4);
    let buffers = [Buffer::readable(RAM_BASE, len), Buffer::writable(at, 4)];
    let head = driver.add(&buffers).expect("room");
    driver.kick();
    let used = driver.wait_used(PATIENCE).expect("an answer");
    assert_eq!((used.head, used.written), (head, 4));
    assert_eq!(ram.read(at, 4), len.to_le_bytes());
}

#[test]
fn requests_come_back_through_restarts_and_reconnects() {
    let card = Card::new();
    let mut driver = driver();
    for _ in 0..3 {
        let mut frontend = card.connect();
        frontend.add_memory(driver.ram());
        for _ in 0..3 {
            let base = driver.next_avail();
            frontend.start_ring(0, &driver, base);
            for len in [1, 512, 4096] {
                ask(&mut driver, len);
            }
            assert_eq!(frontend.stop_ring(0), base.wrapping_add(3));
        }
    }
    card.finish();
}

#[test]
fn an_inflight_region_of_one_process_is_taken_by_the_next() {
    let mut driver = driver();
    let card = Card::new();
    let mut frontend = card.connect();
    let (area, file) = frontend.get_inflight(2, 64);
    frontend.set_inflight(&area, &file);
    frontend.add_memory(driver.ram());
    frontend.start_ring(1, &driver, 0);
    ask(&mut driver, 7);
    drop(frontend);
    card.finish();

    let card = Card::new();
    let mut frontend = card.connect();
    frontend.set_inflight(&area, &file);
    frontend.add_memory(driver.ram());
    // QEMU does not know the base of a backend that was killed and sends what it had before.
    frontend.start_ring(1, &driver, 0);
    ask(&mut driver, 8);
    assert_eq!(frontend.stop_ring(1), 2);
    card.finish();
}

#[test]
fn a_guest_that_breaks_one_queue_loses_that_queue() {
    let card = Card::new();
    let mut frontend = card.connect();
    let ram = GuestRam::new(1 << 20);
    let mut good = DriverQueue::new(&ram, 64, EVENT_IDX);
    let mut bad = DriverQueue::new(&ram, 64, EVENT_IDX);
    frontend.add_memory(&ram);
    frontend.start_ring(0, &bad, 0);
    frontend.start_ring(1, &good, 0);
    // More chains than the ring has room for.
    bad.set_avail_idx(40_000);
    bad.kick_now();
    for len in 1..20 {
        ask(&mut good, len);
    }
    assert!(bad.wait_used(Duration::from_millis(50)).is_none());
    // The control plane answers, and the broken ring stops and starts as any other.
    assert_eq!(frontend.config(0, 1), [0]);
    frontend.stop_ring(0);
    let mut fresh = DriverQueue::new(&ram, 64, EVENT_IDX);
    frontend.start_ring(0, &fresh, 0);
    ask(&mut fresh, 3);
    card.finish();
}

#[test]
fn a_chain_that_points_nowhere_is_answered_or_dropped_without_harm_to_the_next() {
    let card = Card::new();
    let mut frontend = card.connect();
    let mut driver = driver();
    frontend.add_memory(driver.ram());
    frontend.start_ring(0, &driver, 0);
    let nowhere = RawDescriptor {
        addr: u64::MAX - 8,
        len: 4,
        flags: RawDescriptor::WRITE,
        next: 0,
    };
    driver.add_bent(&[nowhere]).expect("room");
    driver.kick();
    let used = driver.wait_used(PATIENCE).expect("every chain comes back");
    assert_eq!(used.written, 0);
    ask(&mut driver, 5);
    card.finish();
}

#[test]
fn a_second_frontend_waits_until_the_first_has_left() {
    let card = Card::new();
    let first = card.connect();
    let path = card.path.clone();
    let second = std::thread::spawn(move || {
        let mut frontend = TestFrontend::connect(&path, 2);
        frontend.negotiate(u64::MAX);
        frontend.vhost.get_queue_num().unwrap()
    });
    std::thread::sleep(Duration::from_millis(50));
    assert!(!second.is_finished());
    drop(first);
    assert_eq!(second.join().unwrap(), 2);
    card.finish();
}

#[test]
fn a_connected_socket_is_served_once_and_a_listener_that_idles_stops_at_once() {
    let card = Card::new();
    card.finish();

    let stats: Vec<_> = (0..2).map(|_| Arc::new(QueueStats::new())).collect();
    let backend = Backend::new(Arc::new(Counting::default()), &stats).unwrap();
    let stop = StopSignal::new().unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        let serving = scope.spawn(|| backend.serve_connected(theirs, &stop));
        let mut frontend = TestFrontend::new(ours, 2);
        frontend.negotiate(u64::MAX);
        let mut driver = driver();
        frontend.add_memory(driver.ram());
        frontend.start_ring(0, &driver, 0);
        ask(&mut driver, 9);
        drop(frontend);
        serving.join().unwrap().unwrap();
    });
}

#[test]
fn a_resize_reaches_the_frontend_which_then_reads_the_new_configuration() {
    let card = Card::new();
    let mut frontend = card.connect();
    let mut channel = frontend.backend_channel();
    assert_eq!(frontend.config(0, 1), [0]);
    let flags = vhost::vhost_user::message::VhostUserConfigFlags::empty();
    frontend.vhost.set_config(0, flags, &[42]).unwrap();
    let notifier = card.backend.config_change_notifier();
    let notified = std::thread::spawn(move || notifier.notify()).join();
    assert_eq!(notified.unwrap(), Notified::Sent);
    assert_eq!(channel.receive(), (2, 1));
    assert_eq!(frontend.config(0, 1), [42]);
    card.finish();
}

#[test]
fn a_stop_ends_a_card_whose_ring_runs() {
    let card = Card::new();
    let mut frontend = card.connect();
    let mut driver = driver();
    frontend.add_memory(driver.ram());
    frontend.start_ring(0, &driver, 0);
    ask(&mut driver, 1);
    card.finish();
}
