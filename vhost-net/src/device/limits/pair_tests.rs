//! Limits as a driver meets them: a pair of queues, and ARP's questions and answers on them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use offload::device::Device;
use offload::telemetry::QueueStats;
use offload::testing::driver::{Buffer, DriverQueue, GuestRam};
use offload::worker::QueueThread;

use super::super::NetDevice;
use super::{DirectionSpec, LimitsSpec};
use crate::locals::LocalOptions;
use crate::spec::Spec;
use crate::stack::Settings;

const PATIENCE: Duration = Duration::from_secs(60);
const VERSION_1: u64 = 1 << 32;
const QUESTIONS: u16 = 20;
const BUFFER_LEN: u32 = 2048;

struct Bench {
    device: Arc<NetDevice>,
    rx_thread: QueueThread,
    tx_thread: QueueThread,
    rx: DriverQueue,
    tx: DriverQueue,
    question: u64,
    begin: Instant,
}

fn pps(rate: u64) -> DirectionSpec {
    DirectionSpec {
        pps: Some(rate),
        ..DirectionSpec::default()
    }
}

impl Bench {
    /// The questions are asked, and there are buffers for the answers.
    fn new(rx: DirectionSpec, tx: DirectionSpec) -> Self {
        let spec = Spec::default();
        let mut frame = vec![0; 12];
        frame.extend([0xff; 6]);
        frame.extend(spec.mac.0);
        frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        frame.extend(spec.mac.0);
        let v4 = spec.v4.unwrap();
        frame.extend(v4.address.octets());
        frame.extend([0; 6]);
        frame.extend(v4.gateway.octets());
        let (settings, local) = (Settings::default(), LocalOptions::default());
        let device = Arc::new(NetDevice::new(spec, settings, local, 1));
        device.set_limits(LimitsSpec { rx, tx }).unwrap();
        device.set_features(VERSION_1);
        device.start(None).unwrap();
        let stats = |queue| (queue, Arc::<QueueStats>::default());
        let threads = QueueThread::spawn_group(Arc::clone(&device), vec![stats(0), stats(1)]);
        let Ok([rx_thread, tx_thread]) = <[_; 2]>::try_from(threads.unwrap()) else {
            panic!("two queues");
        };
        let ram = GuestRam::new(4 << 20);
        let (rx, tx) = (
            DriverQueue::new(&ram, 64, VERSION_1),
            DriverQueue::new(&ram, 64, VERSION_1),
        );
        let question = ram.alloc(frame.len() as u64, 8);
        ram.write(question, &frame);
        rx_thread.start(rx.ring_config(0, None)).unwrap();
        tx_thread.start(tx.ring_config(0, None)).unwrap();
        let mut bench = Self {
            device,
            rx_thread,
            tx_thread,
            rx,
            tx,
            question,
            begin: Instant::now(),
        };
        for _ in 0..QUESTIONS {
            let place = ram.alloc(u64::from(BUFFER_LEN), 8);
            bench.rx.add(&[Buffer::writable(place, BUFFER_LEN)]);
            // The header apart from the frame, and itself in two pieces.
            let at = bench.question;
            let parts = [(at, 5), (at + 5, 7), (at + 12, frame.len() as u32 - 12)];
            let parts = parts.map(|(addr, len)| Buffer::readable(addr, len));
            bench.tx.add(&parts).unwrap();
        }
        bench.rx.kick();
        bench.tx.kick();
        bench
    }

    fn wait_for_answers(&mut self) -> Duration {
        for number in 0..QUESTIONS {
            let used = self.rx.wait_used(PATIENCE);
            assert!(used.is_some(), "{number} answers");
        }
        self.begin.elapsed()
    }

    fn end(self) {
        assert_eq!(self.tx_thread.stop().unwrap(), QUESTIONS);
        assert_eq!(self.rx_thread.stop().unwrap(), QUESTIONS);
        assert_eq!(self.device.stats().overruns.get(), 0);
    }
}

#[test]
fn frames_wait_for_their_turn_in_either_direction_and_none_is_lost() {
    let none = DirectionSpec::default();
    for (rx, tx) in [(none, pps(50)), (pps(50), none)] {
        let mut bench = Bench::new(rx, tx);
        let took = bench.wait_for_answers();
        // All but the first wait for a fiftieth of a second each, less 20 ms and what rounding gives.
        assert!(took > Duration::from_millis(300), "{took:?}");
        bench.end();
    }
}

#[test]
fn lifting_a_limit_lets_go_at_once_what_waits() {
    let none = DirectionSpec::default();
    for (rx, tx) in [(none, pps(1)), (pps(1), none)] {
        let mut bench = Bench::new(rx, tx);
        std::thread::sleep(Duration::from_millis(200));
        assert!(bench.rx.used_idx() < 5, "{}", bench.rx.used_idx());
        bench.device.set_limits(LimitsSpec::default()).unwrap();
        let took = bench.wait_for_answers();
        assert!(took < Duration::from_secs(15), "{took:?}");
        bench.end();
    }
}

#[test]
fn a_ring_that_stops_gets_back_what_waits() {
    let bench = Bench::new(DirectionSpec::default(), pps(1));
    std::thread::sleep(Duration::from_millis(200));
    assert!(bench.tx.used_idx() < 5, "{}", bench.tx.used_idx());
    bench.tx_thread.stop().unwrap();
    assert_eq!(bench.tx.used_idx(), QUESTIONS);
    let took = bench.begin.elapsed();
    assert!(took < Duration::from_secs(15), "{took:?}");
}
