//! Another frontend than QEMU: libblkio's virtio-blk driver, without a guest.

use std::mem::MaybeUninit;
use std::path::Path;
use std::time::{Duration, Instant};

use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};
use offload_tests::card::Card;
use offload_tests::guest::PATIENCE;
use offload_tests::lab::{Lab, text};
use offload_tests::stamp::{Found, SECTOR_LEN, fill, find};

const LEN: usize = 256 << 10;

struct Client {
    queue: Blkioq,
    region: MemoryRegion,
    driver: Blkio,
}

impl Client {
    fn connect(socket: &Path) -> Self {
        let end = Instant::now() + PATIENCE;
        let mut driver = loop {
            let mut driver = Blkio::new("virtio-blk-vhost-user").expect("a driver");
            driver.set_str("path", text(socket)).expect("a path");
            match driver.connect() {
                Ok(()) => break driver,
                Err(e) => assert!(Instant::now() < end, "{e}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        let mut queues = driver.start().expect("it starts").queues;
        let region = driver.alloc_mem_region(LEN).expect("memory");
        driver.map_mem_region(&region).expect("the card maps it");
        Self {
            queue: queues.remove(0),
            region,
            driver,
        }
    }

    /// The shared memory. No request may be under way.
    fn memory(&mut self) -> &mut [u8] {
        // SAFETY: the region was allocated by the driver with this length and stays mapped while
        // `driver` lives. `finish` waits for each request before it returns, so the card touches the
        // memory at no time when this borrow, which excludes `finish`, is alive.
        unsafe { std::slice::from_raw_parts_mut(self.region.addr as *mut u8, LEN) }
    }

    /// Waits for the one request under way; its result.
    fn finish(&mut self) -> i32 {
        let mut completion = [MaybeUninit::<Completion>::uninit()];
        let mut patience = PATIENCE;
        let done = self
            .queue
            .do_io(&mut completion, 1, Some(&mut patience), None);
        assert_eq!(done.expect("an answer in time"), 1);
        // SAFETY: `do_io` returned 1, so it has written the first completion.
        unsafe { completion[0].assume_init_ref() }.ret
    }

    fn write(&mut self, at: u64) -> i32 {
        let memory = self.region.addr as *const u8;
        self.queue.write(at, memory, LEN, 0, ReqFlags::empty());
        self.finish()
    }

    fn read(&mut self, at: u64) -> i32 {
        self.memory().fill(0xaa);
        let memory = self.region.addr as *mut u8;
        self.queue.read(at, memory, LEN, 0, ReqFlags::empty());
        self.finish()
    }

    fn flush(&mut self) -> i32 {
        self.queue.flush(0, ReqFlags::empty());
        self.finish()
    }
}

#[test]
fn libblkio_writes_leaves_and_finds_its_data_when_it_is_back() {
    let lab = Lab::without_guest();
    let volume = lab.volume("data.vol", "16M");
    let card = Card::start(&lab, &volume, &["sock"], &[]);
    let socket = card.socket("sock");
    let at = 3 * LEN as u64;
    let first = at / SECTOR_LEN as u64;

    let mut client = Client::connect(&socket);
    assert_eq!(client.driver.get_u64("capacity").expect("known"), 16 << 20);
    fill(client.memory(), first, 7);
    assert_eq!((client.write(at), client.flush()), (0, 0));
    assert!(client.write(16 << 20) < 0, "past the end");
    drop(client);

    for _ in 0..3 {
        let mut client = Client::connect(&socket);
        assert_eq!(client.read(at), 0);
        for (number, sector) in (first..).zip(client.memory().chunks_exact(SECTOR_LEN)) {
            assert_eq!(find(sector, number), Found::Version(7));
        }
        assert_eq!(client.read(0), 0);
        assert!(client.memory().iter().all(|&byte| byte == 0));
    }
    card.terminate();
    assert!(!socket.exists(), "the socket is removed");
    volume.assert_clean();
}
