use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::device::ChainToken;
use crate::testing::driver::{Buffer, DriverQueue, EVENT_IDX, GuestRam, RAM_BASE};
use crate::virtqueue::{Popped, Recovery, Virtqueue};

#[test]
fn the_layout_is_that_of_the_specification() {
    let region = InflightRegion::create(2, 4, 100).unwrap();
    assert_eq!(region.mmap_size(), 8192);
    let mut queue = region.queue(1).unwrap();
    assert!(region.queue(2).is_none());
    assert!(queue.recover(0).is_empty());
    queue.on_pop(3);
    queue.on_pop(2);
    queue.on_used(3);
    let mut bytes = vec![0; 8192];
    rustix::io::pread(region.fd(), &mut bytes, 0).unwrap();
    // 16 + 4 * 16 is 80, padded to 128.
    let queue = &bytes[128..256];
    let u16_at = |at: usize| u16::from_ne_bytes([queue[at], queue[at + 1]]);
    assert_eq!(queue[..8], [0; 8], "features");
    assert_eq!(u16_at(8), 1, "version");
    assert_eq!(u16_at(10), 4, "desc_num");
    assert_eq!(u16_at(12), 3, "last_batch_head");
    assert_eq!(u16_at(14), 0, "used_idx");
    let desc = |i: usize| &queue[16 + 16 * i..32 + 16 * i];
    assert_eq!(desc(3)[0], 1);
    assert_eq!(desc(2)[0], 1);
    assert_eq!(desc(0), [0; 16]);
    assert_eq!(desc(3)[8..], 0u64.to_ne_bytes());
    assert_eq!(desc(2)[8..], 1u64.to_ne_bytes());
    region.extra().write(0, b"mine").unwrap();
    rustix::io::pread(region.fd(), &mut bytes, 0).unwrap();
    assert_eq!(&bytes[4096..4100], b"mine");
    assert_eq!(region.extra().len(), 100);
}

#[test]
fn the_memfd_cannot_be_shrunk_under_us() {
    let region = InflightRegion::create(1, 8, 0).unwrap();
    assert!(rustix::fs::ftruncate(region.fd(), 0).is_err());
}

#[test]
fn a_region_that_does_not_fit_is_refused() {
    let dup = |region: &InflightRegion| region.fd().try_clone_to_owned().unwrap();
    let region = InflightRegion::create(2, 8, 64).unwrap();
    let size = region.mmap_size();
    InflightRegion::from_fd(dup(&region), size, 0, 2, 8, 64).unwrap();
    let open = |size, offset, queues, queue_size, extra| {
        InflightRegion::from_fd(dup(&region), size, offset, queues, queue_size, extra).unwrap_err()
    };
    assert!(matches!(
        open(size - 1, 0, 2, 8, 64),
        InflightError::TooSmall { .. }
    ));
    assert!(matches!(
        open(size, 4096, 2, 8, 64),
        InflightError::TooSmall { .. }
    ));
    assert!(matches!(
        open(size, u64::MAX, 2, 8, 64),
        InflightError::TooSmall { .. }
    ));
    assert!(matches!(
        open(size, 0, 2, 8, 8192),
        InflightError::TooSmall { .. }
    ));
    assert!(matches!(
        open(u64::MAX, 0, 2, 8, usize::MAX),
        InflightError::Dimensions { .. }
    ));
    assert!(matches!(
        open(size, 0, 2, 4, 64),
        InflightError::DescNum { .. }
    ));
    assert!(matches!(
        open(size, 0, 0, 8, 64),
        InflightError::Dimensions { .. }
    ));
    rustix::io::pwrite(region.fd(), &[9], 8).unwrap();
    assert!(matches!(
        open(size, 0, 2, 8, 64),
        InflightError::Version { queue: 0, found: 9 }
    ));
    let file = tempfile_with(b"short");
    let error = InflightRegion::from_fd(file, 8192, 0, 1, 8, 0).unwrap_err();
    assert!(matches!(error, InflightError::TooSmall { len: 5, .. }));
}

fn tempfile_with(bytes: &[u8]) -> OwnedFd {
    let fd = rustix::fs::memfd_create("t", MemfdFlags::CLOEXEC).unwrap();
    rustix::io::write(&fd, bytes).unwrap();
    fd
}

#[test]
fn shared_bytes_are_bounds_checked() {
    let region = SharedRegion::anonymous(64).unwrap();
    region.write(60, &[1, 2, 3, 4]).unwrap();
    assert!(region.write(61, &[0; 4]).is_err());
    assert!(region.read(usize::MAX, &mut [0; 4]).is_err());
    let mut four = [0; 4];
    region.read(60, &mut four).unwrap();
    assert_eq!(four, [1, 2, 3, 4]);
    region.store_u64(8, 77).unwrap();
    assert_eq!(region.load_u64(8), Ok(77));
    assert!(region.load_u64(57).is_err());
    assert!(region.load_u64(64).is_err());
    assert!(region.store_u64(4, 0).is_err(), "unaligned");
    let part = region.sub(8..24).unwrap();
    assert_eq!(part.load_u64(0), Ok(77));
    assert!(part.load_u64(16).is_err());
    part.store_u64(8, 5).unwrap();
    assert_eq!(region.load_u64(16), Ok(5));
    assert!(region.sub(8..65).is_err());
    assert!(region.sub(4..8).is_err());
    drop(region);
    assert_eq!(part.load_u64(8), Ok(5));
}

#[test]
fn a_region_of_a_ring_that_was_reset_is_cleared() {
    let ram = GuestRam::new(1 << 20);
    let driver = DriverQueue::new(&ram, 8, 0);
    let region = InflightRegion::create(1, 8, 0).unwrap();
    let mut states = region.queue(0).unwrap();
    let _ = states.recover(0);
    states.on_pop(3);
    let open = || {
        let memory = Arc::clone(ram.memory());
        Virtqueue::new(driver.layout(), 0, 0, memory, region.queue(0)).unwrap()
    };
    let (queue, recovery) = open();
    assert_eq!(
        recovery,
        Recovery {
            resubmitted: 0,
            was_stale: true
        }
    );
    assert_eq!(queue.next_avail(), 0);
    assert!(!open().1.was_stale);
}

#[test]
fn a_region_full_of_garbage_does_no_harm() {
    let ram = GuestRam::new(1 << 20);
    for byte in [0xffu8, 1, 7, 0x80] {
        let mut driver = DriverQueue::new(&ram, 8, 0);
        let region = InflightRegion::create(1, 8, 0).unwrap();
        rustix::io::pwrite(region.fd(), &[byte; 4096 - 12], 12).unwrap();
        for _ in 0..8 {
            driver.add(&[Buffer::readable(RAM_BASE, 1)]).unwrap();
        }
        driver.publish();
        let memory = Arc::clone(ram.memory());
        let (mut queue, _) =
            Virtqueue::new(driver.layout(), 0, 0, memory, region.queue(0)).unwrap();
        let mut count = 0;
        while let Some(Popped::Chain(chain)) = queue.pop() {
            queue.add_used(chain.token, 0);
            count += 1;
        }
        let _ = queue.publish();
        assert_eq!(count, 8, "with {byte:#x}");
    }
}

/// A device that dies. Each chain's first buffer address is its name; the guest learns when it
/// comes back, the "disk" counts how often it was executed since it last came back.
struct Life {
    driver: DriverQueue,
    region: InflightRegion,
    queue: Virtqueue,
    held: Vec<(u64, ChainToken)>,
    /// Name of the chain that each head carries, from the driver's point of view.
    names: BTreeMap<u16, u64>,
    next_name: u64,
    returned: Vec<u64>,
}

const SIZE: u16 = 8;

impl Life {
    fn new() -> Self {
        let ram = GuestRam::new(1 << 20);
        let driver = DriverQueue::new(&ram, SIZE, EVENT_IDX);
        let region = InflightRegion::create(1, SIZE, 0).unwrap();
        let queue = Self::open(&driver, &region).0;
        Self {
            driver,
            region,
            queue,
            held: Vec::new(),
            names: BTreeMap::new(),
            next_name: RAM_BASE,
            returned: Vec::new(),
        }
    }

    /// As a new process would: from the memfd alone.
    fn open(driver: &DriverQueue, region: &InflightRegion) -> (Virtqueue, Recovery) {
        let fd = region.fd().try_clone_to_owned().unwrap();
        let size = region.mmap_size();
        let region = InflightRegion::from_fd(fd, size, 0, 1, SIZE, 0).unwrap();
        let memory = Arc::clone(driver.ram().memory());
        // A base that would be wrong: the region must decide.
        Virtqueue::new(driver.layout(), 0x1234, EVENT_IDX, memory, region.queue(0)).unwrap()
    }

    fn offer(&mut self, count: usize) {
        for _ in 0..count {
            let name = self.next_name;
            if let Some(head) = self.driver.add(&[Buffer::readable(name, 1)]) {
                self.names.insert(head, name);
                self.next_name += 1;
            }
        }
        self.driver.publish();
    }

    fn pop(&mut self, count: usize) {
        for _ in 0..count {
            let Some(Popped::Chain(chain)) = self.queue.pop() else {
                break;
            };
            self.held.push((chain.readable[0].addr, chain.token));
        }
    }

    fn collect(&mut self) {
        while let Some(used) = self.driver.poll_used() {
            let name = self.names.remove(&used.head).unwrap();
            assert_eq!(
                u64::from(used.written),
                name - RAM_BASE,
                "came back as another chain"
            );
            self.returned.push(name);
        }
    }

    /// kill -9, restart: what must be resubmitted is exactly what the guest has out and what was
    /// popped, in the order of popping.
    fn kill(&mut self, popped_in_order: &[u64]) {
        assert_eq!(self.queue.fault(), None);
        self.held.clear();
        let (queue, recovery) = Self::open(&self.driver, &self.region);
        self.queue = queue;
        assert!(!recovery.was_stale);
        assert_eq!(usize::from(recovery.resubmitted), popped_in_order.len());
        self.pop(popped_in_order.len());
        let again: Vec<u64> = self.held.iter().map(|(name, _)| *name).collect();
        assert_eq!(again, popped_in_order);
    }
}

#[derive(Clone, Debug)]
enum Step {
    Offer(usize),
    Pop(usize),
    /// Return the chains with these positions (modulo what is held) as one batch.
    Return(Vec<usize>),
    Collect,
    /// Die after so many stores of the return protocol, while returning these.
    KillReturning(Vec<usize>, usize),
    Kill,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let places = || proptest::collection::vec(0usize..8, 1..5);
    let step = prop_oneof![
        (1usize..5).prop_map(Step::Offer),
        (1usize..5).prop_map(Step::Pop),
        places().prop_map(Step::Return),
        Just(Step::Collect),
        (places(), 0usize..14).prop_map(|(places, stores)| Step::KillReturning(places, stores)),
        Just(Step::Kill),
    ];
    proptest::collection::vec(step, 1..60)
}

impl Life {
    fn take(&mut self, places: &[usize]) -> Vec<(u64, ChainToken)> {
        let mut batch = Vec::new();
        for place in places {
            if !self.held.is_empty() {
                batch.push(self.held.remove(place % self.held.len()));
            }
        }
        batch
    }

    /// Does by hand, store by store, what returning a batch does, and stops after `stores` of
    /// them. The names that the guest can see as returned by then.
    fn return_some_stores(&mut self, batch: &[(u64, u16)], stores: usize) -> bool {
        use std::sync::atomic::AtomicU32;
        let layout = self.driver.layout();
        let used_len = 6 + 8 * usize::from(SIZE);
        let memory = self.driver.ram().memory();
        let used = crate::memory::Window::of_guest(memory, layout.used_ring, used_len).unwrap();
        let states = self.region.queue(0).unwrap();
        let idx = self.driver.used_idx();
        let mut left = stores;
        let mut step = |run: &mut dyn FnMut()| {
            if left > 0 {
                left -= 1;
                run();
            }
            left > 0
        };
        for (i, &(name, head)) in batch.iter().enumerate() {
            let last = states.header(header::LAST_BATCH_HEAD);
            let next = states
                .window
                .atomic::<AtomicU16>(states.at(head, state::NEXT));
            step(&mut || next.store(last.load(Ordering::Relaxed), Ordering::Relaxed));
            if !step(&mut || last.store(head, Ordering::Relaxed)) {
                return false;
            }
            let slot = 4 + 8 * usize::from(idx.wrapping_add(i as u16) & (SIZE - 1));
            used.atomic::<AtomicU32>(slot)
                .store(u32::from(head), Ordering::Relaxed);
            let written = (name - RAM_BASE) as u32;
            used.atomic::<AtomicU32>(slot + 4)
                .store(written, Ordering::Relaxed);
        }
        let new = idx.wrapping_add(batch.len() as u16);
        step(&mut || used.atomic::<AtomicU16>(2).store(new, Ordering::Relaxed));
        for &(_, head) in batch {
            step(&mut || states.flag(head).store(0, Ordering::Relaxed));
        }
        step(&mut || {
            states
                .header(header::USED_IDX)
                .store(new, Ordering::Relaxed)
        });
        self.driver.used_idx() == new
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    #[test]
    fn whatever_step_it_dies_at_each_chain_comes_back_exactly_once(steps in steps()) {
        let mut life = Life::new();
        // The names in the order of popping, without those the guest can see as returned.
        let mut popped: Vec<u64> = Vec::new();
        for step in steps {
            match step {
                Step::Offer(count) => life.offer(count),
                Step::Pop(count) => {
                    let before = life.held.len();
                    life.pop(count);
                    popped.extend(life.held[before..].iter().map(|(name, _)| *name));
                }
                Step::Return(places) => {
                    for (name, token) in life.take(&places) {
                        popped.retain(|other| *other != name);
                        life.queue.add_used(token, (name - RAM_BASE) as u32);
                    }
                    let _ = life.queue.publish();
                }
                Step::Collect => life.collect(),
                Step::KillReturning(places, stores) => {
                    let batch: Vec<(u64, u16)> =
                        life.take(&places).into_iter().map(|(name, t)| (name, t.head)).collect();
                    if !batch.is_empty() && life.return_some_stores(&batch, stores) {
                        popped.retain(|other| batch.iter().all(|(name, _)| name != other));
                    }
                    life.kill(&popped);
                }
                Step::Kill => life.kill(&popped),
            }
        }
        // Everything comes back in the end, once.
        loop {
            life.pop(usize::from(SIZE));
            if life.held.is_empty() {
                break;
            }
            for (name, token) in std::mem::take(&mut life.held) {
                life.queue.add_used(token, (name - RAM_BASE) as u32);
            }
            let _ = life.queue.publish();
        }
        life.collect();
        prop_assert_eq!(life.driver.out_count(), 0);
        life.returned.sort_unstable();
        let all: Vec<u64> = (RAM_BASE..life.next_name).collect();
        prop_assert_eq!(&life.returned, &all);
    }
}

/// The return protocol by hand in the property test is the one that the code follows: the state
/// after all of its stores is the same.
#[test]
fn the_stores_of_the_property_test_are_those_of_the_code() {
    let state = |by_hand: bool| {
        let mut life = Life::new();
        life.offer(3);
        life.pop(3);
        let batch = life.take(&[2, 0]);
        if by_hand {
            let batch: Vec<_> = batch.into_iter().map(|(name, t)| (name, t.head)).collect();
            assert!(life.return_some_stores(&batch, 100));
        } else {
            for (name, token) in batch {
                life.queue.add_used(token, (name - RAM_BASE) as u32);
            }
            let _ = life.queue.publish();
        }
        let mut bytes = vec![0; 4096];
        rustix::io::pread(life.region.fd(), &mut bytes, 0).unwrap();
        (
            bytes,
            life.driver.ram().read(life.driver.layout().used_ring, 70),
        )
    };
    assert!(state(true) == state(false));
}
