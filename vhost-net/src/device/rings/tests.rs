//! A receive queue on a thread of its own, with a job instead of a card.

use std::sync::Mutex;
use std::sync::mpsc::channel;
use std::time::Duration;

use offload::device::{Device, DeviceError, QueueHandler};
use offload::inflight::SharedRegion;
use offload::testing::driver::{Buffer, DriverQueue, GuestRam};
use offload::worker::{QueueThread, Waker};

use super::super::limits::{DirectionSpec, LimitsSpec};
use super::super::{MRG_RXBUF, NetDevice, VERSION_1};
use super::*;
use crate::locals::LocalOptions;
use crate::spec::Spec;
use crate::stack::Settings;

const PATIENCE: Duration = Duration::from_secs(60);
const HEAD: [u8; 54] = [7; 54];

type Job = Box<dyn FnOnce(&mut QueueIo<'_>) + Send>;

/// A queue whose thread does a job as soon as the ring runs.
struct OneJob(Mutex<Option<Job>>);

struct OneJobQueue(Option<Job>);

impl Device for OneJob {
    type Queue = OneJobQueue;

    fn features(&self) -> u64 {
        VERSION_1
    }
    fn queue_count(&self) -> u16 {
        1
    }
    fn queue_size_max(&self) -> u16 {
        2048
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
    fn queue(&self, _: u16, _: Waker) -> Result<OneJobQueue, DeviceError> {
        Ok(OneJobQueue(self.0.lock().unwrap().take()))
    }
}

impl QueueHandler for OneJobQueue {
    fn request(&mut self, _: Chain, _: &mut QueueIo<'_>) {}
    fn batch_end(&mut self, _: &mut QueueIo<'_>) {}
    fn completion(&mut self, _: u64, _: i32, _: &mut QueueIo<'_>) {}
    fn wake(&mut self, _: &mut QueueIo<'_>) {}
    fn round_end(&mut self, io: &mut QueueIo<'_>) {
        if io.is_running(0)
            && let Some(job) = self.0.take()
        {
            job(io);
        }
    }
    fn is_pulled(&self, _: u16) -> bool {
        true
    }
    fn chains_held(&self) -> usize {
        0
    }
}

/// Runs a job on a queue to which the driver has given buffers, and gives its result.
fn on_queue<T: Send + 'static>(
    driver: &mut DriverQueue,
    job: impl FnOnce(&mut QueueIo<'_>) -> T + Send + 'static,
) -> T {
    let (done, result) = channel();
    let job: Job = Box::new(move |io| done.send(job(io)).unwrap());
    let device = Arc::new(OneJob(Mutex::new(Some(job))));
    let thread = QueueThread::spawn(device, 0, Arc::default()).unwrap();
    driver.publish();
    thread.start(driver.ring_config(0, None)).unwrap();
    let result = result.recv_timeout(PATIENCE).expect("the job is done");
    thread.stop().unwrap();
    result
}

fn device(pairs: u16, rx: DirectionSpec) -> NetDevice {
    let (settings, local) = (Settings::default(), LocalOptions::default());
    let device = NetDevice::new(Spec::default(), settings, local, pairs);
    let tx = DirectionSpec::default();
    device.set_limits(LimitsSpec { rx, tx }).unwrap();
    device
}

fn side(device: &NetDevice, queue: u16) -> RxSide {
    let shared = Arc::clone(&device.shared);
    let link = shared.exchange.clone();
    RxSide::new(
        queue,
        Negotiated::new(VERSION_1 | MRG_RXBUF),
        shared.limits.rx_gate(),
        Arc::default(),
        shared,
        link.map(|exchange| Link::new(exchange, queue / 2)),
    )
}

fn slow() -> DirectionSpec {
    DirectionSpec {
        pps: Some(1),
        ..DirectionSpec::default()
    }
}

fn driver_with(buffers: usize) -> DriverQueue {
    let ram = GuestRam::new(4 << 20);
    let mut driver = DriverQueue::new(&ram, 64, VERSION_1);
    for _ in 0..buffers {
        let place = ram.alloc(2048, 8);
        driver.add(&[Buffer::writable(place, 2048)]).unwrap();
    }
    driver
}

/// The limit is used up.
fn exhaust(side: &mut RxSide) {
    while side.gate.may_send(&NetHeader::default(), 60) {
        side.gate.sent();
    }
    side.gate.forget();
}

#[test]
fn a_frame_that_waits_for_the_limits_is_not_waited_for_when_a_session_has_ended() {
    let device = device(1, slow());
    let mut side = side(&device, 0);
    on_queue(&mut driver_with(4), move |io| {
        exhaust(&mut side);
        side.wire(io).send(NetHeader::default(), &[1; 60]);
        assert!(side.deadline().is_some());
        assert_eq!(side.waiting.len(), 1);
        side.clear();
        assert_eq!(side.deadline(), None);
    });
}

#[test]
fn a_frame_whose_bytes_are_gone_is_not_waited_for() {
    let device = device(1, slow());
    let mut side = side(&device, 0);
    on_queue(&mut driver_with(4), move |io| {
        exhaust(&mut side);
        let mut wire = side.wire(io);
        wire.send_from(NetHeader::default(), &HEAD, 100, &mut |_| false);
        assert!(wire.has_room());
        assert_eq!(side.deadline(), None);
    });
    assert_eq!(device.stats().overruns.get(), 1);
}

#[test]
fn a_frame_whose_bytes_are_gone_has_not_paid_for_the_next() {
    let device = device(1, slow());
    let mut side = side(&device, 0);
    on_queue(&mut driver_with(0), move |io| {
        let mut wire = side.wire(io);
        wire.send_from(NetHeader::default(), &HEAD, 100, &mut |_| false);
        assert!(!side.gate.is_paid());
    });
}

#[test]
fn a_frame_that_is_lost_behind_one_that_waits_leaves_that_its_turn() {
    let device = device(1, slow());
    let mut side = side(&device, 0);
    on_queue(&mut driver_with(4), move |io| {
        exhaust(&mut side);
        let mut wire = side.wire(io);
        wire.send(NetHeader::default(), &[1; 60]);
        wire.send_from(NetHeader::default(), &HEAD, 100, &mut |_| false);
        assert!(!wire.has_room());
        assert!(side.deadline().is_some());
    });
}

#[test]
fn a_frame_that_goes_round_through_pair_0_is_not_waited_for() {
    let device = device(2, slow());
    // Of a ring that does not run.
    let mut side = side(&device, 2);
    on_queue(&mut driver_with(0), move |io| {
        exhaust(&mut side);
        let header = NetHeader::default();
        side.waiting.push_back((header, [1; 60].into()));
        assert!(!side.gate.may_send(&header, 60));
        side.wire(io).flush();
        assert!(side.waiting.is_empty());
        assert_eq!(side.deadline(), None);
    });
}

#[test]
fn a_frame_for_more_pieces_than_the_kernel_fills_at_once_is_put_there_by_hand() {
    let ram = GuestRam::new(4 << 20);
    let mut driver = DriverQueue::new(&ram, 2048, VERSION_1);
    // Room for the headers, then crumbs of which none touches the next.
    let front = ram.alloc(66, 8);
    let crumbs: Vec<_> = (0..1500).map(|_| ram.alloc(4, 16)).collect();
    let len = 4 * crumbs.len();
    driver.add(&[Buffer::writable(front, 66)]).unwrap();
    for some in crumbs.chunks(500) {
        let some: Vec<_> = some.iter().map(|&at| Buffer::writable(at, 4)).collect();
        driver.add(&some).unwrap();
    }
    let device = device(1, DirectionSpec::default());
    let mut side = side(&device, 0);
    on_queue(&mut driver, move |io| {
        let mut read = |places: &[VolatileSlice<'_>]| {
            let mut byte = 0_u8;
            for place in places {
                for at in 0..place.len() {
                    place.write_obj(byte, at).unwrap();
                    byte = byte.wrapping_add(1);
                }
            }
            // As recvmsg(2): EMSGSIZE.
            places.len() <= 1024
        };
        let mut wire = side.wire(io);
        wire.send_from(NetHeader::default(), &HEAD, len, &mut read);
        assert!(wire.has_room());
    });
    assert_eq!(device.stats().overruns.get(), 0);
    let used: Vec<_> = std::iter::from_fn(|| driver.poll_used()).collect();
    let written: Vec<_> = used.iter().map(|used| used.written).collect();
    assert_eq!(written, [66, 2000, 2000, 2000]);
    assert_eq!(ram.read(front + 12, HEAD.len()), HEAD);
    let got: Vec<u8> = crumbs.iter().flat_map(|&at| ram.read(at, 4)).collect();
    let expected: Vec<u8> = (0..len).map(|n| n as u8).collect();
    assert!(got == expected);
}
