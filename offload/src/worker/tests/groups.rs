//! Several queues on one thread.

use super::*;

/// The queue whose buffers are filled, and the one whose chains say with what.
const RX: u16 = 0;
const TX: u16 = 1;

/// Gives each eight bytes back in two buffers of four.
struct Looper {
    waiting: Vec<[u8; 8]>,
}

impl QueueHandler for Looper {
    fn request(&mut self, chain: Chain, io: &mut QueueIo<'_>) {
        assert_eq!(io.queue(), TX);
        let mut bytes = [0; 8];
        let from = GuestAddress(chain.readable[0].addr);
        io.memory().read_slice(&mut bytes, from).unwrap();
        io.complete(chain.token, 0);
        self.waiting.push(bytes);
    }

    fn batch_end(&mut self, _: &mut QueueIo<'_>) {}
    fn completion(&mut self, _: u64, _: i32, _: &mut QueueIo<'_>) {}
    fn wake(&mut self, _: &mut QueueIo<'_>) {}

    fn round_end(&mut self, io: &mut QueueIo<'_>) {
        while !self.waiting.is_empty() {
            let Some(first) = io.pop(RX) else { return };
            let Some(second) = io.pop(RX) else {
                io.unpop(first.token);
                io.want(RX);
                return;
            };
            let bytes = self.waiting.remove(0);
            for (chain, half) in [first, second].into_iter().zip(bytes.chunks(4)) {
                let to = GuestAddress(chain.writable[0].addr);
                io.memory().write_slice(half, to).unwrap();
                io.complete(chain.token, 4);
            }
        }
    }

    fn is_pulled(&self, queue: u16) -> bool {
        queue == RX
    }

    fn chains_held(&self) -> usize {
        0
    }
}

fn spawn() -> (QueueThread, QueueThread) {
    let make = |index, _: Waker| {
        assert_eq!(index, RX, "the leader's handler serves both");
        Ok(Looper {
            waiting: Vec::new(),
        })
    };
    let device = Queues {
        leader: |_| RX,
        ..Queues::new(2, make)
    };
    let stats = |index| (index, Arc::new(QueueStats::new()));
    let queues = vec![stats(RX), stats(TX)];
    let mut threads = QueueThread::spawn_group(Arc::new(device), queues).unwrap();
    let tx = threads.pop().unwrap();
    (threads.pop().unwrap(), tx)
}

#[test]
fn chains_of_one_queue_fill_buffers_of_another_and_none_is_kept() {
    for features in [0, EVENT_IDX] {
        let (rx_thread, tx_thread) = spawn();
        let ram = GuestRam::new(4 << 20);
        let mut rx = DriverQueue::new(&ram, 64, features | VERSION_1);
        let mut tx = DriverQueue::new(&ram, 64, features | VERSION_1);
        let (from, to) = (ram.alloc(8, 8), ram.alloc(8, 8));
        rx_thread.start(rx.ring_config(0, None)).unwrap();
        tx_thread.start(tx.ring_config(0, None)).unwrap();
        for round in 0..500_u64 {
            ram.write(from, &round.to_ne_bytes());
            tx.add(&[Buffer::readable(from, 8)]).unwrap();
            tx.kick();
            tx.wait_used(PATIENCE).expect("sent");
            // One buffer does not suffice, and goes back untouched.
            rx.add(&[Buffer::writable(to, 4)]).unwrap();
            rx.kick();
            if round % 50 == 0 {
                assert!(rx.wait_used(Duration::from_millis(20)).is_none());
            }
            rx.add(&[Buffer::writable(to + 4, 4)]).unwrap();
            rx.kick();
            for _ in 0..2 {
                assert_eq!(rx.wait_used(PATIENCE).expect("filled").written, 4);
            }
            assert_eq!(ram.read(to, 8), round.to_ne_bytes());
        }
        // A buffer that nothing came for is still the driver's.
        rx.add(&[Buffer::writable(to, 4)]).unwrap();
        rx.kick();
        assert_eq!(tx_thread.stop().unwrap(), 500);
        assert_eq!(rx_thread.stop().unwrap(), 1000);
        drop(rx_thread);
        assert!(
            tx_thread.is_alive(),
            "the thread lives as long as one of its queues"
        );
    }
}

#[test]
fn each_queue_of_a_thread_stops_and_starts_by_itself() {
    let (rx_thread, tx_thread) = spawn();
    let ram = GuestRam::new(4 << 20);
    let mut rx = DriverQueue::new(&ram, 16, VERSION_1);
    let mut tx = DriverQueue::new(&ram, 16, VERSION_1);
    let (from, to) = (ram.alloc(8, 8), ram.alloc(8, 8));
    tx_thread.start(tx.ring_config(0, None)).unwrap();
    tx.add(&[Buffer::readable(from, 8)]).unwrap();
    tx.kick();
    tx.wait_used(PATIENCE).expect("sent");
    assert!(rx_thread.stop().is_err());
    rx.add(&[Buffer::writable(to, 4)]).unwrap();
    rx.add(&[Buffer::writable(to + 4, 4)]).unwrap();
    rx.publish();
    // What waited goes into the buffers of a queue that starts later.
    rx_thread.start(rx.ring_config(0, None)).unwrap();
    for _ in 0..2 {
        rx.wait_used(PATIENCE).expect("filled");
    }
    assert_eq!(tx_thread.stop().unwrap(), 1);
    assert_eq!(rx_thread.stop().unwrap(), 2);
}
