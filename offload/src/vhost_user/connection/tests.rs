//! Whole conversations over a real socket pair, with rings that only take notes.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vhost::vhost_user::VhostUserFrontend;
use vm_memory::GuestMemoryBackend;

use super::*;
use crate::device::{Chain, QueueHandler};
use crate::inflight::SharedRegion;
use crate::memory::RegionInfo;
use crate::stop::StopSignal;
use crate::testing::driver::{DriverQueue, GuestRam};
use crate::testing::frontend::{
    NEED_REPLY, RawFrontend, TestFrontend, VERSION, header, region_body, vring_addr, vring_state,
    words,
};
use crate::vhost_user::backend::Inner;
use crate::vhost_user::protocol::PROTOCOL_FEATURES;
use crate::vhost_user::{BackendError, Notified};
use crate::worker::{QueueIo, Waker};
use FrontendReq as R;

const FEATURE: u64 = 1 << 5;
const EXTRA: usize = 4096;

/// A device of two queues with 8 bytes of configuration, of which byte 4 can be written.
#[derive(Default)]
struct Toy {
    notes: Mutex<Vec<String>>,
    fails_to_start: bool,
}

impl Toy {
    fn note(&self, note: impl Into<String>) {
        self.notes.lock().unwrap().push(note.into());
    }

    fn notes(&self) -> Vec<String> {
        self.notes.lock().unwrap().clone()
    }

    fn count(&self, note: &str) -> usize {
        self.notes().iter().filter(|n| *n == note).count()
    }
}

impl Device for Toy {
    type Queue = NoQueue;

    fn features(&self) -> u64 {
        FEATURE
    }

    fn queue_count(&self) -> u16 {
        2
    }

    fn has_mtu(&self) -> bool {
        true
    }

    fn set_mtu(&self, mtu: u64) -> Result<(), DeviceError> {
        match mtu {
            1500 => Ok(()),
            _ => Err("another one".into()),
        }
    }

    fn queue_size_max(&self) -> u16 {
        256
    }

    fn config(&self) -> Vec<u8> {
        (1..9).collect()
    }

    fn write_config(&self, offset: u32, data: &[u8]) -> Result<(), DeviceError> {
        if offset != 4 || data.len() != 1 {
            return Err("read-only".into());
        }
        self.note(format!("config {}", data[0]));
        Ok(())
    }

    fn set_features(&self, acked: u64) {
        self.note(format!("features {acked:#x}"));
    }

    fn inflight_extra_len(&self) -> usize {
        EXTRA
    }

    fn inflight_create(&self, extra: &SharedRegion) -> Result<(), DeviceError> {
        assert_eq!(extra.len(), EXTRA);
        self.note("inflight created");
        Ok(())
    }

    fn start(&self, extra: Option<Arc<SharedRegion>>) -> Result<(), DeviceError> {
        if self.fails_to_start {
            return Err("the volume is in use".into());
        }
        match extra {
            None => self.note("start"),
            Some(extra) => {
                let mark = extra.load_u64(0)?;
                extra.store_u64(0, mark + 1)?;
                self.note(format!("start with {mark}"));
            }
        }
        Ok(())
    }

    fn stop(&self) {
        self.note("stop");
    }

    fn queue(&self, _: u16, _: Waker) -> Result<NoQueue, DeviceError> {
        Err("queues are fakes here".into())
    }
}

struct NoQueue;

impl QueueHandler for NoQueue {
    fn request(&mut self, _: Chain, _: &mut QueueIo<'_>) {}
    fn batch_end(&mut self, _: &mut QueueIo<'_>) {}
    fn completion(&mut self, _: u64, _: i32, _: &mut QueueIo<'_>) {}
    fn wake(&mut self, _: &mut QueueIo<'_>) {}
    fn chains_held(&self) -> usize {
        0
    }
}

/// A ring that remembers how it was started.
#[derive(Default)]
struct FakeQueue {
    running: Mutex<Option<RingConfig>>,
    started: Mutex<Vec<RingConfig>>,
    bases: Mutex<VecDeque<u16>>,
    enabled: Mutex<Option<bool>>,
    is_gone: bool,
    is_unsound: bool,
}

impl Queue for Arc<FakeQueue> {
    fn start(&self, ring: RingConfig) -> Result<(), WorkerError> {
        if self.is_gone {
            return Err(WorkerError::Gone { queue: 0 });
        }
        if self.is_unsound {
            let source = crate::virtqueue::RingError::Size { size: ring.size };
            return Err(WorkerError::Ring { queue: 0, source });
        }
        *self.enabled.lock().unwrap() = Some(ring.enabled);
        let copy = RingConfig {
            kick: None,
            call: None,
            inflight: None,
            memory: Arc::clone(&ring.memory),
            ..ring
        };
        self.started.lock().unwrap().push(copy);
        let old = self.running.lock().unwrap().replace(ring);
        assert!(old.is_none(), "started twice");
        Ok(())
    }

    fn stop(&self) -> Result<u16, WorkerError> {
        let ring = self.running.lock().unwrap().take();
        let ring = ring.ok_or(WorkerError::NotRunning { queue: 0 })?;
        Ok(self.bases.lock().unwrap().pop_front().unwrap_or(ring.base))
    }

    fn set_kick(&self, _: Option<OwnedFd>) {}
    fn set_call(&self, _: Option<OwnedFd>) {}
    fn set_err(&self, _: Option<OwnedFd>) {}

    fn set_enabled(&self, enabled: bool) {
        *self.enabled.lock().unwrap() = Some(enabled);
    }

    fn set_memory(&self, memory: Arc<GuestMemory>) {
        self.running.lock().unwrap().as_mut().unwrap().memory = memory;
    }
}

/// A backend, and one frontend's end of its connection.
struct House {
    device: Arc<Toy>,
    queues: [Arc<FakeQueue>; 2],
    inner: Arc<Inner<Toy, Arc<FakeQueue>>>,
    stop: StopSignal,
    serving: Option<JoinHandle<Result<(), BackendError>>>,
}

impl House {
    fn new() -> Self {
        Self::with(Toy::default(), [FakeQueue::default(), FakeQueue::default()])
    }

    fn with(device: Toy, queues: [FakeQueue; 2]) -> Self {
        let device = Arc::new(device);
        let queues = queues.map(Arc::new);
        let inner = Inner::new(Arc::clone(&device), |_| Ok(queues.to_vec())).unwrap();
        Self {
            device,
            queues,
            inner: Arc::new(inner),
            stop: StopSignal::new().unwrap(),
            serving: None,
        }
    }

    fn connect(&mut self) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let inner = Arc::clone(&self.inner);
        let stop = self.stop.clone();
        let serve = move || inner.serve_connected(theirs, &stop);
        self.serving = Some(std::thread::spawn(serve));
        ours
    }

    fn raw(&mut self) -> RawFrontend {
        RawFrontend::new(self.connect())
    }

    /// A raw frontend that has negotiated everything and sees its requests acknowledged.
    fn negotiated(&mut self) -> RawFrontend {
        let raw = self.raw();
        let protocol = words(&[PROTOCOL_FEATURES.bits()]);
        assert!(raw.is_accepted(R::SET_PROTOCOL_FEATURES, &protocol, &[]));
        assert!(raw.is_accepted(R::SET_FEATURES, &words(&[1 << 30 | FEATURE]), &[]));
        raw
    }

    fn frontend(&mut self) -> TestFrontend {
        let mut frontend = TestFrontend::new(self.connect(), 2);
        frontend.negotiate(u64::MAX);
        frontend
    }

    /// What serving gave, within ten seconds.
    fn result(&mut self) -> Result<(), BackendError> {
        let serving = self.serving.take().unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while !serving.is_finished() {
            assert!(Instant::now() < deadline, "the connection does not end");
            std::thread::sleep(Duration::from_millis(1));
        }
        serving.join().unwrap()
    }

    fn started(&self, queue: usize) -> usize {
        self.queues[queue].started.lock().unwrap().len()
    }

    fn is_running(&self, queue: usize) -> bool {
        self.queues[queue].running.lock().unwrap().is_some()
    }
}

/// A guest with one queue of 128 descriptors.
fn guest() -> DriverQueue {
    DriverQueue::new(&GuestRam::new(0x1_0000), 128, 0)
}

fn add_memory(raw: &RawFrontend, driver: &DriverQueue) -> bool {
    let ram = driver.ram();
    raw.is_accepted(R::ADD_MEM_REG, &region_body(&ram.region()), &[ram.fd()])
}

fn eventfd() -> OwnedFd {
    rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap()
}

/// Number, address and kick of queue 0, in this order and each acknowledged.
fn describe_and_kick(raw: &RawFrontend, driver: &DriverQueue) -> [bool; 3] {
    let addr = vring_addr(0, driver.ram(), &driver.layout());
    [
        raw.is_accepted(R::SET_VRING_NUM, &vring_state(0, 128), &[]),
        raw.is_accepted(R::SET_VRING_ADDR, &addr, &[]),
        raw.is_accepted(R::SET_VRING_KICK, &words(&[0]), &[driver.kick_fd()]),
    ]
}

#[test]
fn vhosts_own_frontend_negotiates_starts_a_ring_and_stops_it() {
    let mut house = House::new();
    let mut frontend = house.frontend();
    assert_eq!(frontend.vhost.get_queue_num().unwrap(), 2);
    assert!(frontend.vhost.get_max_mem_slots().unwrap() >= 32);
    let guest = guest();
    frontend.add_memory(guest.ram());
    frontend.start_ring(1, &guest, 7);
    {
        let running = house.queues[1].running.lock().unwrap();
        let ring = running.as_ref().unwrap();
        assert_eq!((ring.size, ring.base), (128, 7));
        let layout = guest.layout();
        assert_eq!(ring.desc_table, layout.desc_table);
        assert_eq!(ring.avail_ring, layout.avail_ring);
        assert_eq!(ring.used_ring, layout.used_ring);
        assert_eq!(ring.features, FEATURE | 1 << 32 | 1 << 28 | 1 << 29);
        assert!(ring.kick.is_some());
        assert_eq!(ring.memory.num_regions(), 1);
        assert!(ring.inflight.is_none());
    }
    assert_eq!(*house.queues[1].enabled.lock().unwrap(), Some(true));
    house.queues[1].bases.lock().unwrap().push_back(99);
    assert_eq!(frontend.stop_ring(1), 99);
    assert!(!house.is_running(1));
    drop(frontend);
    house.result().unwrap();
    let notes = house.device.notes();
    assert_eq!(notes, ["features 0x130000020", "start", "stop"]);
}

#[test]
fn a_ring_restarts_many_times_from_the_base_it_is_given() {
    let mut house = House::new();
    let mut frontend = house.frontend();
    let guest = guest();
    frontend.add_memory(guest.ram());
    for base in [0, 5, 5, 65535, 3] {
        frontend.start_ring(0, &guest, base);
        assert_eq!(frontend.stop_ring(0), base);
    }
    assert_eq!(house.started(0), 5);
    assert_eq!(house.device.count("start"), 1);
}

#[test]
fn an_early_enable_is_acknowledged_and_kept_as_qemus_network_needs_it() {
    let mut house = House::new();
    let raw = house.raw();
    let protocol = words(&[PROTOCOL_FEATURES.bits()]);
    assert!(raw.is_accepted(R::SET_PROTOCOL_FEATURES, &protocol, &[]));
    assert!(raw.is_accepted(R::SET_VRING_ENABLE, &vring_state(0, 1), &[]));
    assert!(raw.is_accepted(R::SET_FEATURES, &words(&[1 << 30]), &[]));
    let guest = guest();
    assert!(add_memory(&raw, &guest));
    assert_eq!(describe_and_kick(&raw, &guest), [true; 3]);
    assert!(house.is_running(0));
    assert_eq!(*house.queues[0].enabled.lock().unwrap(), Some(true));
}

#[test]
fn memory_may_come_after_the_ring_and_leave_before_it() {
    let mut house = House::new();
    let raw = house.negotiated();
    let guest = guest();
    assert_eq!(describe_and_kick(&raw, &guest), [true; 3]);
    assert!(raw.is_accepted(R::SET_VRING_ENABLE, &vring_state(0, 1), &[]));
    assert_eq!(house.started(0), 0);
    assert!(add_memory(&raw, &guest));
    assert!(house.is_running(0));
    // Once more, as QEMU 7.2 does for each queue pair of a network device.
    assert!(add_memory(&raw, &guest));
    assert!(house.is_running(0));
    // Some more while it runs.
    let more = region_body(&RegionInfo {
        guest_phys_addr: 1 << 32,
        size: 0x1000,
        userspace_addr: 1 << 32,
        mmap_offset: 0,
    });
    assert!(raw.is_accepted(R::ADD_MEM_REG, &more, &[guest.ram().fd()]));
    let regions = |house: &House| {
        let running = house.queues[0].running.lock().unwrap();
        running.as_ref().map(|ring| ring.memory.num_regions())
    };
    assert_eq!(regions(&house), Some(2));
    // It goes, and as often as QEMU 7.2 says so for the other pairs.
    for _ in 0..2 {
        assert!(raw.is_accepted(R::REM_MEM_REG, &more, &[]));
        assert_eq!(regions(&house), Some(1));
    }
    house.queues[0].bases.lock().unwrap().push_back(42);
    assert!(raw.is_accepted(R::REM_MEM_REG, &region_body(&guest.ram().region()), &[]));
    assert!(!house.is_running(0));
    // Gone already, and never there.
    assert!(raw.is_accepted(R::REM_MEM_REG, &region_body(&guest.ram().region()), &[]));
    let never = RegionInfo {
        size: 0x2000,
        ..guest.ram().region()
    };
    assert!(!raw.is_accepted(R::REM_MEM_REG, &region_body(&never), &[]));
    assert!(add_memory(&raw, &guest));
    let running = house.queues[0].running.lock().unwrap();
    assert_eq!(running.as_ref().unwrap().base, 42);
}

#[test]
fn a_frontend_that_vanishes_leaves_no_ring_running_and_the_next_one_is_served() {
    let mut house = House::new();
    for round in 1..4 {
        let mut frontend = house.frontend();
        let guest = guest();
        frontend.add_memory(guest.ram());
        frontend.start_ring(0, &guest, 0);
        drop(frontend);
        house.result().unwrap();
        assert!(!house.is_running(0));
        assert_eq!(house.device.count("start"), round);
        assert_eq!(house.device.count("stop"), round);
    }
}

#[test]
fn vanishing_in_the_middle_of_a_message_is_a_normal_end() {
    let whole = [&header(8, VERSION, 8)[..], &vring_state(0, 128)].concat();
    for cut in 1..whole.len() {
        let mut house = House::new();
        let raw = house.raw();
        raw.send_bytes(&whole[..cut], &[]);
        drop(raw);
        house.result().unwrap();
        assert_eq!(house.device.notes(), ["stop"]);
    }
}

#[test]
fn a_message_in_single_bytes_is_a_message() {
    let mut house = House::new();
    let raw = house.negotiated();
    let request = u32::from(R::SET_VRING_NUM);
    let head = header(request, VERSION | NEED_REPLY, 8);
    for byte in [&head[..], &vring_state(1, 64)].concat() {
        raw.send_bytes(&[byte], &[]);
    }
    assert_eq!(raw.receive().unwrap().u64(), 0);
}

#[test]
fn a_descriptor_that_comes_with_the_body_is_taken() {
    let mut house = House::new();
    let raw = house.negotiated();
    let request = u32::from(R::SET_VRING_CALL);
    raw.send_bytes(&header(request, VERSION | NEED_REPLY, 8), &[]);
    raw.send_bytes(&words(&[0]), &[eventfd().as_fd()]);
    assert_eq!(raw.receive().unwrap().u64(), 0);
}

#[test]
fn a_stop_ends_a_silent_and_a_half_sent_conversation_at_once() {
    for sent in [0, 5, 15] {
        let mut house = House::new();
        let raw = house.raw();
        let whole = [&header(8, VERSION, 8)[..], &vring_state(0, 128)].concat();
        raw.send_bytes(&whole[..sent], &[]);
        std::thread::sleep(Duration::from_millis(20));
        let stopped = Instant::now();
        house.stop.stop();
        house.result().unwrap();
        assert!(stopped.elapsed() < Duration::from_secs(5));
        assert!(raw.receive().is_none());
    }
}

#[test]
fn a_stop_ends_the_wait_for_a_frontend_that_does_not_read_its_replies() {
    let mut house = House::new();
    let raw = house.raw();
    raw.stream().set_nonblocking(true).unwrap();
    let ask = header(R::GET_FEATURES.into(), VERSION, 0);
    // Far more replies than any socket buffer holds.
    for _ in 0..200_000 {
        raw.send_bytes(&ask, &[]);
    }
    house.stop.stop();
    house.result().unwrap();
}

#[test]
fn bad_framing_ends_the_connection_and_nothing_else() {
    let bad: [[u8; 12]; 5] = [
        header(1, 2, 0),
        header(1, VERSION | 0x10, 0),
        header(1, VERSION | 4, 0),
        header(5, VERSION, u32::MAX),
        header(5, VERSION | NEED_REPLY, 4097),
    ];
    let mut house = House::new();
    for bytes in bad {
        let raw = house.negotiated();
        raw.send_bytes(&bytes, &[]);
        assert!(raw.receive().is_none(), "{bytes:?}");
        house.result().unwrap();
    }
    assert_eq!(house.device.count("stop"), 5);
    house.frontend();
}

#[test]
fn more_descriptors_than_any_message_has_end_the_connection() {
    let mut house = House::new();
    let raw = house.negotiated();
    let fd = eventfd();
    let fds: Vec<_> = (0..40).map(|_| fd.as_fd()).collect();
    raw.send(R::SET_MEM_TABLE.into(), VERSION, &[0; 8], &fds);
    assert!(raw.receive().is_none());
    house.result().unwrap();
}

#[test]
fn refused_requests_are_answered_with_a_no_and_the_connection_goes_on() {
    let mut house = House::new();
    let raw = house.negotiated();
    let fd = eventfd();
    let one = [fd.as_fd()];
    let two = [fd.as_fd(), fd.as_fd()];
    let guest = guest();
    let file = [guest.ram().fd()];
    let region = || region_body(&guest.ram().region());
    let mut wrong_size = region();
    wrong_size.push(0);
    let refused: [(R, Vec<u8>, &[BorrowedFd<'_>]); 15] = [
        // Never offered.
        (R::SET_LOG_BASE, words(&[0]), &[]),
        (R::RESET_DEVICE, Vec::new(), &[]),
        (R::SET_FEATURES, words(&[1 << 26]), &[]),
        (R::SET_PROTOCOL_FEATURES, words(&[1 << 1]), &[]),
        // Wrong length.
        (R::SET_VRING_NUM, words(&[0, 0]), &[]),
        (R::ADD_MEM_REG, wrong_size, &file),
        // Wrong number of descriptors.
        (R::SET_VRING_KICK, words(&[0]), &[]),
        (R::SET_VRING_KICK, words(&[0]), &two),
        (R::SET_VRING_NUM, vring_state(0, 128), &one),
        (R::ADD_MEM_REG, region(), &[]),
        // An eventfd is no memory.
        (R::ADD_MEM_REG, region(), &one),
        // Out of range.
        (R::SET_VRING_NUM, vring_state(2, 128), &[]),
        (R::SET_VRING_NUM, vring_state(0, 512), &[]),
        (R::SET_VRING_ENABLE, vring_state(0, 2), &[]),
        // Never added.
        (R::REM_MEM_REG, region(), &[]),
    ];
    for (request, body, fds) in refused {
        assert!(!raw.is_accepted(request, &body, fds), "{request:?}");
    }
    // A code that nobody has defined.
    raw.send(4711, VERSION | NEED_REPLY, &[], &[]);
    assert_eq!(raw.receive().unwrap().u64(), 1);
    assert!(add_memory(&raw, &guest));
    assert_eq!(describe_and_kick(&raw, &guest), [true; 3]);
    assert!(house.is_running(0));
    // Out of order: the ring runs.
    assert!(!raw.is_accepted(R::SET_VRING_BASE, &vring_state(0, 1), &[]));
    assert!(house.is_running(0));
}

#[test]
fn a_refused_request_without_acknowledgement_ends_the_connection() {
    let mut house = House::new();
    let raw = house.negotiated();
    raw.send(R::SET_VRING_NUM.into(), VERSION, &vring_state(2, 128), &[]);
    assert!(raw.receive().is_none());
    house.result().unwrap();
    // NEED_REPLY means nothing before REPLY_ACK is negotiated.
    let raw = house.raw();
    let body = vring_state(2, 128);
    raw.send(R::SET_VRING_NUM.into(), VERSION | NEED_REPLY, &body, &[]);
    assert!(raw.receive().is_none());
    house.result().unwrap();
}

#[test]
fn a_request_whose_reply_has_no_room_for_a_no_ends_the_connection() {
    let mut house = House::new();
    let raw = house.negotiated();
    let body = vring_state(9, 0);
    raw.send(R::GET_VRING_BASE.into(), VERSION | NEED_REPLY, &body, &[]);
    assert!(raw.receive().is_none());
    house.result().unwrap();
}

#[test]
fn a_ring_that_cannot_start_is_lost_alone() {
    let unsound = FakeQueue {
        is_unsound: true,
        ..FakeQueue::default()
    };
    let mut house = House::with(Toy::default(), [unsound, FakeQueue::default()]);
    let raw = house.negotiated();
    let guest = guest();
    assert!(add_memory(&raw, &guest));
    assert_eq!(describe_and_kick(&raw, &guest), [true, true, false]);
    // QEMU asks for no acknowledgement here, and keeps its connection.
    let kick = [guest.kick_fd()];
    raw.send(R::SET_VRING_KICK.into(), VERSION, &words(&[0]), &kick);
    assert!(raw.is_accepted(R::SET_VRING_NUM, &vring_state(1, 128), &[]));
    drop(raw);
    house.result().unwrap();
}

#[test]
fn a_device_that_cannot_serve_says_no_and_ends_the_connection() {
    let device = Toy {
        fails_to_start: true,
        ..Toy::default()
    };
    let mut house = House::with(device, [FakeQueue::default(), FakeQueue::default()]);
    let raw = house.negotiated();
    let guest = guest();
    assert!(add_memory(&raw, &guest));
    assert_eq!(describe_and_kick(&raw, &guest), [true, true, false]);
    assert!(raw.receive().is_none());
    house.result().unwrap();
    assert_eq!(house.started(0), 0);
}

#[test]
fn a_dead_queue_thread_ends_serving_with_an_error() {
    let gone = FakeQueue {
        is_gone: true,
        ..FakeQueue::default()
    };
    let mut house = House::with(Toy::default(), [gone, FakeQueue::default()]);
    let raw = house.negotiated();
    let guest = guest();
    assert!(add_memory(&raw, &guest));
    assert_eq!(describe_and_kick(&raw, &guest), [true, true, false]);
    assert!(matches!(
        house.result(),
        Err(BackendError::Queue(WorkerError::Gone { .. }))
    ));
}

#[test]
fn configuration_is_read_with_zeros_behind_it_and_an_empty_reply_says_no() {
    let mut house = House::new();
    let mut frontend = house.frontend();
    assert_eq!(frontend.config(0, 8), [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(frontend.config(6, 4), [7, 8, 0, 0]);
    assert_eq!(frontend.config(255, 1), [0]);
    assert!(frontend.config(0, 256)[8..].iter().all(|byte| *byte == 0));
    drop(frontend);
    house.result().unwrap();
    let raw = house.negotiated();
    let mut body = [255u32, 2, 0].map(u32::to_ne_bytes).concat();
    body.extend([0; 2]);
    let reply = raw.ask(R::GET_CONFIG, &body, &[]);
    assert_eq!((reply.request, reply.flags), (24, 5));
    assert!(reply.body.is_empty());
    // And it goes on.
    assert_eq!(raw.ask(R::GET_QUEUE_NUM, &[], &[]).u64(), 2);
}

#[test]
fn a_write_to_the_configuration_that_the_device_refuses_never_ends_the_connection() {
    let mut house = House::new();
    let raw = house.negotiated();
    let write = |offset: u32, value: u8| {
        let mut body = [offset, 1, 0].map(u32::to_ne_bytes).concat();
        body.push(value);
        body
    };
    assert!(raw.is_accepted(R::SET_CONFIG, &write(4, 17), &[]));
    assert_eq!(house.device.count("config 17"), 1);
    assert!(!raw.is_accepted(R::SET_CONFIG, &write(0, 1), &[]));
    raw.send(R::SET_CONFIG.into(), VERSION, &write(0, 1), &[]);
    assert_eq!(raw.ask(R::GET_QUEUE_NUM, &[], &[]).u64(), 2);
}

#[test]
fn an_inflight_region_outlives_the_process_that_made_it() {
    let guest = guest();
    let mut house = House::new();
    let mut frontend = house.frontend();
    let (area, file) = frontend.get_inflight(2, 128);
    assert_eq!((area.num_queues, area.queue_size), (2, 128));
    assert!(area.mmap_size >= EXTRA as u64);
    frontend.set_inflight(&area, &file);
    frontend.add_memory(guest.ram());
    frontend.start_ring(0, &guest, 0);
    {
        let running = house.queues[0].running.lock().unwrap();
        let inflight = running.as_ref().unwrap().inflight.as_ref().unwrap();
        assert_eq!(inflight.desc_num(), 128);
    }
    assert_eq!(
        house.device.notes()[1..],
        ["inflight created", "start with 0"]
    );
    drop(frontend);
    house.result().unwrap();

    // Another backend, which has nothing but the file: as after kill -9.
    let mut second = House::new();
    let mut frontend = second.frontend();
    frontend.set_inflight(&area, &file);
    frontend.add_memory(guest.ram());
    frontend.start_ring(0, &guest, 0);
    assert_eq!(second.device.notes()[1..], ["start with 1"]);
    // Stopped and started again by the same frontend, with the region again: as firmware and
    // kernel do.
    frontend.stop_ring(0);
    frontend.set_inflight(&area, &file);
    frontend.start_ring(0, &guest, 0);
    assert_eq!(second.device.notes()[1..], ["start with 1", "start with 2"]);
}

#[test]
fn inflight_regions_that_do_not_fit_are_refused() {
    let mut house = House::new();
    let raw = house.negotiated();
    let area = |size: u64, queues: u16| {
        let mut body = words(&[size, 0]);
        body.extend([queues.to_ne_bytes(), 128u16.to_ne_bytes()].concat());
        body
    };
    let small = GuestRam::new(4096);
    let fd = [small.fd()];
    // Shorter than the queues need; longer than the file is; more queues than there are; no file.
    assert!(!raw.is_accepted(R::SET_INFLIGHT_FD, &area(4096, 2), &fd));
    assert!(!raw.is_accepted(R::SET_INFLIGHT_FD, &area(1 << 20, 2), &fd));
    assert!(!raw.is_accepted(R::SET_INFLIGHT_FD, &area(1 << 20, 3), &fd));
    assert!(!raw.is_accepted(R::SET_INFLIGHT_FD, &area(1 << 20, 2), &[]));
}

#[test]
fn an_mtu_that_the_device_refuses_is_answered_with_a_no_and_the_connection_goes_on() {
    let mut house = House::new();
    let raw = house.negotiated();
    for (mtu, is_right) in [(1500, true), (64, false), (1500, true)] {
        assert_eq!(
            raw.is_accepted(R::NET_SET_MTU, &words(&[mtu]), &[]),
            is_right
        );
    }
}

#[test]
fn the_reply_to_get_inflight_is_as_long_as_the_request() {
    let mut house = House::new();
    let raw = house.negotiated();
    for len in [20, 24] {
        let mut body = words(&[0, 0]);
        body.extend([2u16.to_ne_bytes(), 128u16.to_ne_bytes()].concat());
        body.resize(len, 0);
        let reply = raw.ask(R::GET_INFLIGHT_FD, &body, &[]);
        assert_eq!((reply.body.len(), reply.fds.len()), (len, 1));
    }
}

#[test]
fn a_change_of_the_configuration_reaches_the_frontend_that_gave_a_channel() {
    let mut house = House::new();
    let notifier = house.inner.notifier();
    assert_eq!(notifier.notify(), Notified::NobodyListens);
    let mut frontend = house.frontend();
    assert_eq!(notifier.notify(), Notified::NobodyListens);
    let mut channel = frontend.backend_channel();
    assert_eq!(notifier.notify(), Notified::Sent);
    // CONFIG_CHANGE_MSG, version 1, no reply wanted.
    assert_eq!(channel.receive(), (2, 1));
    drop(frontend);
    house.result().unwrap();
    assert_eq!(notifier.notify(), Notified::NobodyListens);
}

#[test]
fn a_channel_for_which_there_is_no_use_stays_open_until_the_frontend_leaves() {
    let mut house = House::new();
    let raw = house.raw();
    // Without CONFIG there is nothing to tell: QEMU's vhost-user-net.
    let protocol = words(&[PROTOCOL_FEATURES.bits() & !(1 << 9)]);
    assert!(raw.is_accepted(R::SET_PROTOCOL_FEATURES, &protocol, &[]));
    let (ours, theirs) = UnixStream::pair().unwrap();
    assert!(raw.is_accepted(R::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]));
    drop(theirs);
    assert_eq!(house.inner.notifier().notify(), Notified::NobodyListens);
    ours.set_nonblocking(true).unwrap();
    let mut byte = [0];
    let silent = std::io::Read::read(&mut &ours, &mut byte).unwrap_err();
    assert_eq!(silent.kind(), io::ErrorKind::WouldBlock);
    drop(raw);
    house.result().unwrap();
    assert_eq!(std::io::Read::read(&mut &ours, &mut byte).unwrap(), 0);
}

#[test]
fn guest_memory_without_enough_file_is_refused() {
    let mut house = House::new();
    let raw = house.negotiated();
    let guest = guest();
    let mut body = region_body(&guest.ram().region());
    // One byte more than the file has.
    body[16..24].copy_from_slice(&0x1_0001u64.to_ne_bytes());
    assert!(!raw.is_accepted(R::ADD_MEM_REG, &body, &[guest.ram().fd()]));
    assert!(raw.is_accepted(
        R::ADD_MEM_REG,
        &region_body(&guest.ram().region()),
        &[guest.ram().fd()]
    ));
}

#[test]
fn descriptors_do_not_pile_up() {
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let mut house = House::new();
    let raw = house.negotiated();
    let fd = eventfd();
    let before = open();
    for _ in 0..2000 {
        let two = [fd.as_fd(), fd.as_fd()];
        assert!(!raw.is_accepted(R::SET_VRING_KICK, &words(&[0]), &two));
        assert!(raw.is_accepted(R::SET_VRING_CALL, &words(&[1]), &[fd.as_fd()]));
    }
    // Other tests run in this process: only a pile counts.
    assert!(open() < before + 500);
}
