//! More operations than the kernel takes at once.

use io_uring::types;

use super::*;

/// A handler that pushes far more operations at once than the submission queue holds.
struct Flood {
    done: Arc<AtomicU64>,
    in_kernel: usize,
}

const FLOOD: u64 = 20_000;

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
    let shared = Arc::clone(&done);
    let device = Queues::new(1, move |_, waker: Waker| {
        waker.wake();
        Ok(Flood {
            done: Arc::clone(&shared),
            in_kernel: 0,
        })
    });
    let thread = QueueThread::spawn(Arc::new(device), 0, Arc::default()).unwrap();
    // Dropping waits for all of them.
    drop(thread);
    assert_eq!(done.load(Ordering::Relaxed), FLOOD * (FLOOD + 1) / 2);
}
