//! Requests a second that one queue thread takes through its ring, without a device behind it:
//! a handler that completes at once, and one that sends a NOP through the io_uring for each.
//!
//! `cargo run --release -p offload --features testing --example ring_speed [seconds]`

use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::opcode;
use offload::device::{Chain, ChainToken, Device, DeviceError, QueueHandler};
use offload::inflight::{InflightRegion, SharedRegion};
use offload::telemetry::QueueStats;
use offload::testing::driver::{
    Buffer, DriverQueue, EVENT_IDX, GuestRam, INDIRECT_DESC, VERSION_1,
};
use offload::worker::{QueueIo, QueueThread, Waker};

struct Nothing {
    through_ring: bool,
}

struct Handler {
    through_ring: bool,
    tokens: Vec<Option<ChainToken>>,
    free: Vec<usize>,
}

impl Device for Nothing {
    type Queue = Handler;

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
        Ok(())
    }
    fn set_features(&self, _: u64) {}
    fn start(&self, _: Option<Arc<SharedRegion>>) -> Result<(), DeviceError> {
        Ok(())
    }
    fn stop(&self) {}
    fn queue(&self, _: u16, _: Waker) -> Result<Handler, DeviceError> {
        Ok(Handler {
            through_ring: self.through_ring,
            tokens: (0..256).map(|_| None).collect(),
            free: (0..256).collect(),
        })
    }
}

impl QueueHandler for Handler {
    fn request(&mut self, chain: Chain, io: &mut QueueIo<'_>) {
        let slot = if self.through_ring {
            self.free.pop()
        } else {
            None
        };
        let Some(slot) = slot else {
            return io.complete(chain.token, 1);
        };
        self.tokens[slot] = Some(chain.token);
        // SAFETY: a NOP has no buffers.
        unsafe { io.push(opcode::Nop::new().build(), slot as u64) };
    }
    fn batch_end(&mut self, _: &mut QueueIo<'_>) {}
    fn completion(&mut self, slot: u64, _: i32, io: &mut QueueIo<'_>) {
        if let Some(token) = self.tokens[slot as usize].take() {
            self.free.push(slot as usize);
            io.complete(token, 1);
        }
    }
    fn wake(&mut self, _: &mut QueueIo<'_>) {}
    fn chains_held(&self) -> usize {
        256 - self.free.len()
    }
}

fn run(through_ring: bool, indirect: bool, tracked: bool, depth: usize, time: Duration) {
    let stats = Arc::new(QueueStats::new());
    let device = Arc::new(Nothing { through_ring });
    let thread = QueueThread::spawn(device, 0, Arc::clone(&stats)).expect("spawn");
    let ram = GuestRam::new(16 << 20);
    let features = EVENT_IDX | INDIRECT_DESC | VERSION_1;
    // Three descriptors a request, as in virtio-blk.
    let mut driver = DriverQueue::new(&ram, 512, features);
    let data = ram.alloc(4096 + 32, 4096);
    let chain = [
        Buffer::readable(data, 16),
        Buffer::writable(data + 32, 4096),
        Buffer::writable(data + 16, 1),
    ];
    let region = tracked.then(|| InflightRegion::create(1, 512, 0).expect("region"));
    let states = region.as_ref().and_then(|region| region.queue(0));
    thread.start(driver.ring_config(0, states)).expect("start");
    let start = Instant::now();
    let (mut out, mut done) = (0, 0u64);
    while start.elapsed() < time {
        for _ in 0..256 {
            while out < depth {
                let head = if indirect {
                    driver.add_indirect(&chain)
                } else {
                    driver.add(&chain)
                };
                assert!(head.is_some());
                out += 1;
            }
            driver.kick();
            driver.wait_used(Duration::from_secs(5)).expect("an answer");
            out -= 1;
            done += 1;
            while driver.poll_used().is_some() {
                out -= 1;
                done += 1;
            }
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let per_request = |n: u64| n as f64 / done as f64;
    println!(
        "{:8} {:8} {:9} depth {depth:3}: {:9.0} requests/s, {:.3} kicks and {:.3} calls each",
        if through_ring { "io_uring" } else { "at once" },
        if indirect { "indirect" } else { "direct" },
        if tracked { "in-flight" } else { "" },
        done as f64 / seconds,
        per_request(stats.kicks.get()),
        per_request(stats.notifications.get()),
    );
}

fn main() {
    let seconds = std::env::args().nth(1).and_then(|arg| arg.parse().ok());
    let time = Duration::from_secs_f64(seconds.unwrap_or(1.0));
    for through_ring in [false, true] {
        for (indirect, tracked) in [(false, false), (false, true), (true, true)] {
            for depth in [32, 128] {
                run(through_ring, indirect, tracked, depth, time);
            }
        }
    }
}
