use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::device::Segment;
use crate::inflight::InflightRegion;
use crate::testing::driver::{
    Buffer, DriverQueue, EVENT_IDX, GuestRam, INDIRECT_DESC, RAM_BASE, RawDescriptor, VERSION_1,
};

const RAM: u64 = 4 << 20;

fn pair(size: u16, features: u64) -> (DriverQueue, Virtqueue) {
    let ram = GuestRam::new(RAM);
    let driver = DriverQueue::new(&ram, size, features);
    let queue = device(&driver, 0, features);
    (driver, queue)
}

fn device(driver: &DriverQueue, base: u16, features: u64) -> Virtqueue {
    let memory = Arc::clone(driver.ram().memory());
    Virtqueue::new(driver.layout(), base, features, memory, None)
        .unwrap()
        .0
}

fn chain(queue: &mut Virtqueue) -> Chain {
    match queue.pop() {
        Some(Popped::Chain(chain)) => chain,
        other => panic!("{other:?} instead of a chain; fault {:?}", queue.fault()),
    }
}

fn fault(queue: &mut Virtqueue) -> ChainFault {
    match queue.pop() {
        Some(Popped::Malformed(token, fault)) => {
            queue.add_used(token, 0);
            fault
        }
        other => panic!("{other:?} instead of a malformed chain"),
    }
}

fn segments(buffers: &[Buffer], writable: bool) -> Vec<Segment> {
    let of = buffers.iter().filter(|b| b.writable == writable);
    of.map(|b| Segment {
        addr: b.addr,
        len: b.len,
    })
    .collect()
}

#[test]
fn a_chain_comes_out_as_it_was_put_in_direct_or_indirect() {
    for indirect in [false, true] {
        let (mut driver, mut queue) = pair(16, INDIRECT_DESC);
        let buffers = [
            Buffer::readable(RAM_BASE, 16),
            Buffer::readable(RAM_BASE + 0x1000, 4096),
            Buffer::writable(RAM_BASE + 0x9000, 1),
        ];
        let head = if indirect {
            driver.add_indirect(&buffers).unwrap()
        } else {
            driver.add(&buffers).unwrap()
        };
        assert!(queue.pop().is_none(), "not published yet");
        driver.publish();
        let chain = chain(&mut queue);
        assert_eq!(chain.readable.to_vec(), segments(&buffers, false));
        assert_eq!(chain.writable.to_vec(), segments(&buffers, true));
        assert!(queue.pop().is_none());
        queue.add_used(chain.token, 1);
        assert_eq!(driver.poll_used(), None, "not published yet");
        let _ = queue.publish();
        let used = driver.poll_used().unwrap();
        assert_eq!((used.head, used.written), (head, 1));
    }
}

#[test]
fn direct_descriptors_may_come_before_an_indirect_one() {
    let (mut driver, mut queue) = pair(16, INDIRECT_DESC);
    let table = driver.ram().alloc(32, 16);
    let mut entry = RawDescriptor {
        addr: 2,
        len: 3,
        flags: RawDescriptor::WRITE,
        next: 0,
    };
    driver.ram().write(table, &entry.to_bytes());
    entry = RawDescriptor {
        addr: 1,
        len: 2,
        flags: RawDescriptor::NEXT,
        next: 1,
    };
    let flags = RawDescriptor::INDIRECT | RawDescriptor::WRITE;
    driver
        .add_bent(&[
            entry,
            RawDescriptor {
                addr: table,
                len: 16,
                flags,
                next: 0,
            },
        ])
        .unwrap();
    driver.publish();
    let chain = chain(&mut queue);
    assert_eq!(chain.readable.to_vec(), [Segment { addr: 1, len: 2 }]);
    assert_eq!(chain.writable.to_vec(), [Segment { addr: 2, len: 3 }]);
    queue.add_used(chain.token, 0);
}

/// Each kind of malformed chain, and that the queue goes on after it.
#[test]
fn a_malformed_chain_comes_back_and_the_next_one_is_served() {
    const NEXT: u16 = RawDescriptor::NEXT;
    const WRITE: u16 = RawDescriptor::WRITE;
    const INDIRECT: u16 = RawDescriptor::INDIRECT;
    let (mut driver, mut queue) = pair(8, INDIRECT_DESC);
    let table = driver.ram().alloc(16 * 2048, 16);
    let d = |addr, len, flags, next| RawDescriptor {
        addr,
        len,
        flags,
        next,
    };
    let good = Buffer::readable(RAM_BASE, 8);
    let mut expect = |driver: &mut DriverQueue, chain: &[RawDescriptor], expected| {
        let head = driver.add_bent(chain).unwrap();
        driver.publish();
        assert_eq!(fault(&mut queue), expected);
        let _ = queue.publish();
        let used = driver.poll_used().unwrap();
        assert_eq!((used.head, used.written), (head, 0));
        driver.add(&[good]).unwrap();
        driver.publish();
        let Some(Popped::Chain(chain)) = queue.pop() else {
            panic!("the queue stopped")
        };
        queue.add_used(chain.token, 0);
        let _ = queue.publish();
        driver.poll_used().unwrap();
    };
    expect(&mut driver, &[d(1, 1, NEXT, 0)], ChainFault::Loop);
    expect(
        &mut driver,
        &[d(1, 1, NEXT, 1), d(2, 1, NEXT, 0)],
        ChainFault::Loop,
    );
    expect(
        &mut driver,
        &[d(1, 1, NEXT, 8)],
        ChainFault::NextOutOfRange { next: 8 },
    );
    expect(
        &mut driver,
        &[d(1, 1, NEXT, 0xffff)],
        ChainFault::NextOutOfRange { next: 0xffff },
    );
    expect(&mut driver, &[d(1, 0, 0, 0)], ChainFault::ZeroLength);
    expect(
        &mut driver,
        &[d(u64::MAX, 2, 0, 0)],
        ChainFault::AddressWraps,
    );
    let backwards = [d(1, 1, NEXT | WRITE, 1), d(1, 1, 0, 0)];
    expect(&mut driver, &backwards, ChainFault::ReadableAfterWritable);
    let long = [d(0, u32::MAX, NEXT, 1), d(0, 1, 0, 0)];
    expect(&mut driver, &long, ChainFault::TooLong);
    let long = [d(0, u32::MAX, NEXT | WRITE, 1), d(0, 1, WRITE, 0)];
    expect(&mut driver, &long, ChainFault::TooLong);

    expect(
        &mut driver,
        &[d(table, 16, INDIRECT | NEXT, 1), d(1, 1, 0, 0)],
        ChainFault::IndirectWithNext,
    );
    for len in [0, 8, 17, 16 * 1025, u32::MAX] {
        expect(
            &mut driver,
            &[d(table, len, INDIRECT, 0)],
            ChainFault::TableLength { len },
        );
    }
    let outside = [d(RAM_BASE + RAM - 16, 32, INDIRECT, 0)];
    expect(&mut driver, &outside, ChainFault::TableAddress);
    expect(
        &mut driver,
        &[d(u64::MAX - 8, 16, INDIRECT, 0)],
        ChainFault::TableAddress,
    );
    let nested = d(table, 16, INDIRECT, 0).to_bytes();
    driver.ram().write(table, &nested);
    expect(
        &mut driver,
        &[d(table, 16, INDIRECT, 0)],
        ChainFault::NestedIndirect,
    );
    driver.ram().write(table, &d(1, 1, NEXT, 0).to_bytes());
    expect(&mut driver, &[d(table, 16, INDIRECT, 0)], ChainFault::Loop);
    driver.ram().write(table, &d(1, 1, NEXT, 1).to_bytes());
    // Index 1 exists in memory, but not in a table of 16 bytes.
    expect(
        &mut driver,
        &[d(table, 16, INDIRECT, 0)],
        ChainFault::NextOutOfRange { next: 1 },
    );
    driver.ram().write(table, &d(1, 1, NEXT, 7).to_bytes());
    expect(
        &mut driver,
        &[d(table, 32, INDIRECT, 0)],
        ChainFault::NextOutOfRange { next: 7 },
    );
}

#[test]
fn the_longest_table_is_taken_and_its_length_may_exceed_the_queue_size() {
    let (mut driver, mut queue) = pair(8, INDIRECT_DESC);
    let table = driver.ram().alloc(16 * 1024, 16);
    for i in 0..1024u16 {
        let flags = if i < 1023 { RawDescriptor::NEXT } else { 0 };
        let entry = RawDescriptor {
            addr: 1,
            len: 1,
            flags,
            next: i + 1,
        };
        driver
            .ram()
            .write(table + 16 * u64::from(i), &entry.to_bytes());
    }
    let flags = RawDescriptor::INDIRECT;
    driver
        .add_bent(&[RawDescriptor {
            addr: table,
            len: 16 * 1024,
            flags,
            next: 0,
        }])
        .unwrap();
    driver.publish();
    assert_eq!(chain(&mut queue).readable.len(), 1024);
}

#[test]
fn indirect_descriptors_need_the_feature() {
    let (mut driver, mut queue) = pair(8, 0);
    driver
        .add_indirect(&[Buffer::readable(RAM_BASE, 8)])
        .unwrap();
    driver.publish();
    assert_eq!(fault(&mut queue), ChainFault::IndirectNotNegotiated);
}

#[test]
fn a_broken_ring_stops_popping_and_still_returns_what_is_out() {
    type Breaker = fn(&mut DriverQueue);
    let breakers: [(Breaker, RingFault); 3] = [
        (
            |driver| driver.set_avail_idx(10),
            RingFault::AvailableIndex {
                from: 1,
                to: 10,
                size: 8,
            },
        ),
        (
            |driver| {
                driver.offer(8);
                driver.publish();
            },
            RingFault::HeadOutOfRange { head: 8, size: 8 },
        ),
        (
            |driver| {
                driver.offer(0);
                driver.publish();
            },
            RingFault::HeadInUse { head: 0 },
        ),
    ];
    for (break_it, expected) in breakers {
        let (mut driver, mut queue) = pair(8, 0);
        let head = driver.add(&[Buffer::readable(RAM_BASE, 8)]).unwrap();
        assert_eq!(head, 0);
        driver.publish();
        let chain = chain(&mut queue);
        break_it(&mut driver);
        assert!(queue.pop().is_none());
        assert_eq!(queue.fault(), Some(expected));
        driver.set_avail_idx(2);
        assert!(queue.pop().is_none(), "broken for good");
        assert!(!queue.enable_kicks());
        queue.add_used(chain.token, 5);
        assert!(queue.publish());
        assert_eq!(driver.poll_used().unwrap().written, 5);
    }
}

#[test]
fn a_full_ring_is_no_broken_ring() {
    let (mut driver, mut queue) = pair(8, 0);
    for _ in 0..8 {
        driver.add(&[Buffer::readable(RAM_BASE, 8)]).unwrap();
    }
    driver.publish();
    for _ in 0..8 {
        chain(&mut queue);
    }
    assert!(queue.pop().is_none());
    assert_eq!(queue.fault(), None);
    assert_eq!(queue.out_count(), 8);
}

#[test]
fn rings_that_are_not_in_memory_or_not_aligned_are_refused() {
    let ram = GuestRam::new(RAM);
    let good = DriverQueue::new(&ram, 8, 0).layout();
    let start = |layout| {
        let memory = Arc::clone(ram.memory());
        Virtqueue::new(layout, 0, 0, memory, None)
            .map(|_| ())
            .unwrap_err()
    };
    for size in [0, 3, 0x8001] {
        assert_eq!(start(RingLayout { size, ..good }), RingError::Size { size });
    }
    let end = RAM_BASE + RAM;
    for (layout, expected) in [
        (
            RingLayout {
                desc_table: end - 16,
                ..good
            },
            "descriptor table",
        ),
        (
            RingLayout {
                avail_ring: 0,
                ..good
            },
            "available ring",
        ),
        (
            RingLayout {
                used_ring: u64::MAX - 3,
                ..good
            },
            "used ring",
        ),
        // One byte too few for the event field behind the ring.
        (
            RingLayout {
                used_ring: end - 68,
                ..good
            },
            "used ring",
        ),
    ] {
        match start(layout) {
            RingError::NotInMemory { part, .. } => assert_eq!(part, expected),
            other => panic!("{other}"),
        }
    }
    for (layout, expected) in [
        (
            RingLayout {
                desc_table: good.desc_table + 8,
                ..good
            },
            16,
        ),
        (
            RingLayout {
                avail_ring: good.avail_ring + 1,
                ..good
            },
            2,
        ),
        (
            RingLayout {
                used_ring: good.used_ring + 2,
                ..good
            },
            4,
        ),
    ] {
        match start(layout) {
            RingError::Alignment { align, .. } => assert_eq!(align, expected),
            other => panic!("{other}"),
        }
    }
}

#[test]
fn without_event_idx_flags_say_who_wants_to_be_told() {
    let (mut driver, mut queue) = pair(8, 0);
    let mut turn = |driver: &mut DriverQueue| {
        driver.add(&[Buffer::readable(RAM_BASE, 8)]).unwrap();
        let wants_kick = driver.publish();
        let chain = match queue.pop() {
            Some(Popped::Chain(chain)) => chain,
            other => panic!("{other:?}"),
        };
        queue.add_used(chain.token, 0);
        let wants_call = queue.publish();
        driver.poll_used().unwrap();
        (wants_kick, wants_call)
    };
    assert_eq!(turn(&mut driver), (true, true));
    driver.set_no_interrupt(true);
    assert_eq!(turn(&mut driver), (true, false));
    driver.set_no_interrupt(false);
    assert_eq!(turn(&mut driver), (true, true));
    queue.disable_kicks();
    driver.add(&[Buffer::readable(RAM_BASE, 8)]).unwrap();
    assert!(!driver.publish());
    assert!(queue.enable_kicks(), "a chain came while kicks were off");
    chain(&mut queue);
    assert!(!queue.enable_kicks());
    driver.add(&[Buffer::readable(RAM_BASE, 8)]).unwrap();
    assert!(driver.publish());
}

/// The flag stays in the guest's memory when the card is killed, or the ring is stopped, in between.
#[test]
fn a_ring_that_was_left_while_kicks_were_off_asks_for_them_again() {
    let (mut driver, mut queue) = pair(8, 0);
    assert!(!queue.enable_kicks());
    queue.disable_kicks();
    drop(queue);
    let mut queue = device(&driver, 0, 0);
    assert!(!queue.enable_kicks());
    let at = driver.ram().alloc(16, 16);
    driver.add(&[Buffer::readable(at, 16)]).expect("room");
    assert!(
        driver.kick(),
        "the driver does not know that kicks are wanted"
    );
}

#[test]
fn with_event_idx_each_side_is_told_only_when_it_asked() {
    let (mut driver, mut queue) = pair(8, EVENT_IDX);
    let buffer = [Buffer::readable(RAM_BASE, 8)];
    assert!(!queue.enable_kicks());
    driver.add(&buffer).unwrap();
    assert!(driver.publish(), "the device asked for chain 0");
    driver.add(&buffer).unwrap();
    assert!(!driver.publish(), "it has not asked for chain 1");
    let (first, second) = (chain(&mut queue), chain(&mut queue));
    queue.add_used(first.token, 0);
    assert!(queue.publish(), "the first one always");
    // Waits for used index 1, that is, for the second chain.
    driver.poll_used().unwrap();
    assert_eq!(driver.wait_used(Duration::ZERO), None);
    queue.add_used(second.token, 0);
    assert!(queue.publish());
    // The driver has not asked again.
    driver.poll_used().unwrap();
    driver.add(&buffer).unwrap();
    driver.publish();
    let third = chain(&mut queue);
    queue.add_used(third.token, 0);
    assert!(!queue.publish());
    assert!(!queue.publish(), "nothing new");
}

#[test]
fn a_batch_that_passes_the_event_index_interrupts_once() {
    let (mut driver, mut queue) = pair(8, EVENT_IDX);
    for _ in 0..6 {
        driver.add(&[Buffer::readable(RAM_BASE, 8)]).unwrap();
    }
    driver.publish();
    let chains: Vec<Chain> = (0..6).map(|_| chain(&mut queue)).collect();
    let mut tokens = chains.into_iter().map(|chain| chain.token);
    queue.add_used(tokens.next().unwrap(), 0);
    assert!(queue.publish());
    driver.poll_used().unwrap();
    assert_eq!(driver.wait_used(Duration::ZERO), None);
    for token in tokens {
        queue.add_used(token, 0);
    }
    assert_eq!(queue.unpublished(), 5);
    assert!(queue.publish());
    assert_eq!(queue.unpublished(), 0);
}

#[test]
fn indices_wrap_after_65536_chains() {
    let (mut driver, mut queue) = pair(4, EVENT_IDX);
    for i in 0..70_000u32 {
        driver.add(&[Buffer::writable(RAM_BASE, 8)]).unwrap();
        driver.publish();
        let chain = chain(&mut queue);
        queue.add_used(chain.token, i);
        let _ = queue.publish();
        assert_eq!(driver.poll_used().unwrap().written, i);
    }
}

#[test]
fn old_memory_lives_as_long_as_chains_that_came_with_it() {
    let (mut driver, mut queue) = pair(8, 0);
    for _ in 0..2 {
        driver.add(&[Buffer::readable(RAM_BASE, 8)]).unwrap();
    }
    driver.publish();
    let (first, second) = (chain(&mut queue), chain(&mut queue));
    let mut other = crate::memory::MemoryMap::new();
    other
        .add(
            driver.ram().region(),
            driver.ram().fd().try_clone_to_owned().unwrap(),
        )
        .unwrap();
    let old = Arc::downgrade(driver.ram().memory());
    let held = old.strong_count();
    queue.set_memory(Arc::clone(other.memory()));
    queue.add_used(first.token, 0);
    assert_eq!(old.strong_count(), held, "one chain is still out");
    // New chains do not prolong it.
    driver.add(&[Buffer::readable(RAM_BASE, 8)]).unwrap();
    driver.publish();
    let third = chain(&mut queue);
    queue.add_used(second.token, 0);
    assert_eq!(old.strong_count(), held - 1);
    queue.add_used(third.token, 0);
    assert_eq!(queue.out_count(), 0);
    let _ = queue.publish();
    assert_eq!(std::iter::from_fn(|| driver.poll_used()).count(), 3);
}

#[test]
fn a_ring_whose_memory_is_removed_is_broken() {
    let (mut driver, mut queue) = pair(8, 0);
    driver.add(&[Buffer::readable(RAM_BASE, 8)]).unwrap();
    driver.publish();
    let chain = chain(&mut queue);
    queue.set_memory(Arc::default());
    assert_eq!(queue.fault(), Some(RingFault::MemoryRemoved));
    queue.add_used(chain.token, 3);
    let _ = queue.publish();
    assert_eq!(driver.poll_used().unwrap().written, 3);
}

/// `virtio-queue` walks the same chains.
#[test]
fn virtio_queue_sees_the_same_chains() {
    use virtio_queue::{Queue, QueueOwnedT, QueueT};
    let ram = GuestRam::new(RAM);
    let mut driver = DriverQueue::new(&ram, 64, INDIRECT_DESC);
    let mut ours = device(&driver, 0, INDIRECT_DESC);
    let layout = driver.layout();
    let mut theirs = Queue::new(64).unwrap();
    theirs.set_size(64);
    let low_high = |addr: u64| (Some(addr as u32), Some((addr >> 32) as u32));
    let (low, high) = low_high(layout.desc_table);
    theirs.set_desc_table_address(low, high);
    let (low, high) = low_high(layout.avail_ring);
    theirs.set_avail_ring_address(low, high);
    let (low, high) = low_high(layout.used_ring);
    theirs.set_used_ring_address(low, high);
    theirs.set_ready(true);
    for i in 0..10u32 {
        let buffers: Vec<Buffer> = (0..=i % 5)
            .map(|j| Buffer {
                addr: RAM_BASE + u64::from(i * 16 + j),
                len: 1 + j,
                writable: j * 2 > i % 5,
            })
            .collect();
        let added = if i % 2 == 0 {
            driver.add(&buffers)
        } else {
            driver.add_indirect(&buffers)
        };
        added.unwrap();
    }
    driver.publish();
    let memory: &GuestMemory = ram.memory();
    let mut count = 0;
    for reference in theirs.iter(memory).unwrap() {
        let chain = chain(&mut ours);
        assert_eq!(chain.token.head, reference.head_index());
        let (writable, readable): (Vec<_>, Vec<_>) = reference.partition(|d| d.is_write_only());
        for (expected, got) in [(readable, &chain.readable), (writable, &chain.writable)] {
            let expected: Vec<Segment> = expected
                .iter()
                .map(|d| Segment {
                    addr: d.addr().0,
                    len: d.len(),
                })
                .collect();
            assert_eq!(got.to_vec(), expected);
        }
        count += 1;
    }
    assert_eq!(count, 10);
}

#[test]
fn an_inflight_region_for_a_smaller_queue_is_refused() {
    let ram = GuestRam::new(RAM);
    let driver = DriverQueue::new(&ram, 16, 0);
    let region = InflightRegion::create(1, 8, 0).unwrap();
    let memory = Arc::clone(ram.memory());
    let error = Virtqueue::new(driver.layout(), 0, 0, memory, region.queue(0)).unwrap_err();
    assert_eq!(
        error,
        RingError::InflightTooSmall {
            desc_num: 8,
            size: 16
        }
    );
}

proptest! {
    /// Any bytes at all in the three rings and the tables: every chain that is popped can be
    /// returned, nothing panics, and pops end.
    #[test]
    fn arbitrary_rings_neither_panic_nor_hang(
        descs in proptest::collection::vec((0u64..0x2000, 0u32..0x4000, 0u16..8, 0u16..12), 8),
        avail in proptest::collection::vec(0u16..10, 8),
        idx in 0u16..12,
        table in proptest::collection::vec((any::<u64>(), 0u32..64, 0u16..8, 0u16..40), 32),
    ) {
        let ram = GuestRam::new(RAM);
        let mut driver = DriverQueue::new(&ram, 8, INDIRECT_DESC | VERSION_1);
        let mut queue = device(&driver, 0, INDIRECT_DESC);
        for (i, &(addr, len, flags, next)) in descs.iter().enumerate() {
            let addr = RAM_BASE + addr;
            driver.set_descriptor(i as u16, RawDescriptor { addr, len, flags, next });
        }
        for (i, &(addr, len, flags, next)) in table.iter().enumerate() {
            let bytes = RawDescriptor { addr, len, flags, next }.to_bytes();
            ram.memory().write_slice(&bytes, GuestAddress(RAM_BASE + 16 * i as u64)).unwrap();
        }
        for head in avail {
            driver.offer(head);
        }
        driver.set_avail_idx(idx);
        let mut tokens = Vec::new();
        while let Some(popped) = queue.pop() {
            tokens.push(match popped {
                Popped::Chain(chain) => chain.token,
                Popped::Malformed(token, _) => token,
            });
            prop_assert!(tokens.len() <= 8);
        }
        let count = tokens.len();
        for token in tokens {
            queue.add_used(token, 0);
        }
        let _ = queue.publish();
        prop_assert_eq!(usize::from(driver.used_idx()), count);
        prop_assert_eq!(queue.out_count(), 0);
    }
}
