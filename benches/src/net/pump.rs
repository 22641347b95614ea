//! The client: a vhost-user frontend that carries frames between a backend and a TAP.
//!
//! Two threads, one a direction. Frames of the guest are read from the TAP straight into shared memory;
//! received ones are written from there. So the client adds one copy by the kernel each way, for every
//! backend alike. Buffers for receiving are as a Linux driver posts them for bulk data (mergeable, one
//! page each).

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use offload::testing::driver::{Buffer, DriverQueue, EVENT_IDX, GuestRam, VERSION_1};
use offload::testing::frontend::TestFrontend;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vm_memory::{GuestAddress, GuestMemoryBackend as _};

use super::space::Space;
use super::tap::{self, HEADER_LEN, feature};

/// Descriptors of a ring: the most that QEMU allows.
const QUEUE_SIZE: u16 = 1024;
/// Frames of the guest under way.
const TX_SLOTS: usize = 256;
/// Header, Ethernet, and the largest IP packet.
const TX_LEN: usize = HEADER_LEN + 14 + 65_536 + 256;
/// What a Linux driver posts for mergeable receive buffers.
const RX_LEN: usize = 4096;
/// Frames between two looks at what came back.
const BATCH: usize = 64;
/// Frames of the guest between two kicks, behind the first: what a queueing discipline hands a driver
/// at once.
const TX_BATCH: usize = 4;
const NAP: Duration = Duration::from_millis(50);

/// A connected backend. Dropping it ends the threads.
pub struct Pump {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    // The connection: the backend serves as long as it lives.
    _frontend: TestFrontend,
    /// Features that were negotiated.
    pub features: u64,
}

impl std::fmt::Debug for Pump {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let features = self.features;
        f.debug_struct("Pump")
            .field("features", &features)
            .finish_non_exhaustive()
    }
}

impl Pump {
    /// Connects to the backend at `socket` and joins it with a new TAP in `guest`.
    ///
    /// # Errors
    /// The TAP cannot be made, or the backend refuses.
    pub fn start(socket: &Path, guest: &Space, name: &str) -> io::Result<Self> {
        let ram = GuestRam::new(96 << 20);
        let mut frontend = TestFrontend::connect(socket, 2);
        let features = frontend.negotiate(feature::ALL | VERSION_1 | EVENT_IDX);
        let region = ram.region();
        let info = VhostUserMemoryRegionInfo {
            guest_phys_addr: region.guest_phys_addr,
            memory_size: region.size,
            userspace_addr: region.userspace_addr,
            mmap_offset: region.mmap_offset,
            mmap_handle: std::os::fd::AsRawFd::as_raw_fd(&ram.fd()),
        };
        // The older message: passt knows no other.
        frontend
            .vhost
            .set_mem_table(&[info])
            .map_err(|error| io::Error::other(error.to_string()))?;
        let tap = tap::open(guest, name, features)?;
        let mut receive = DriverQueue::new(&ram, QUEUE_SIZE, features);
        let transmit = DriverQueue::new(&ram, QUEUE_SIZE, features);
        let buffers = post(&mut receive);
        frontend.start_ring(0, &receive, 0);
        frontend.start_ring(1, &transmit, 0);
        receive.kick_now();
        let stop = Arc::new(AtomicBool::new(false));
        let twin = tap.try_clone()?;
        let (to_guest, from_guest) = (Arc::clone(&stop), Arc::clone(&stop));
        let threads = vec![
            thread::spawn(move || receive_frames(receive, &buffers, &tap, &to_guest)),
            thread::spawn(move || transmit_frames(transmit, &twin, &from_guest)),
        ];
        Ok(Self {
            stop,
            threads,
            _frontend: frontend,
            features,
        })
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// A piece of guest memory.
#[derive(Clone, Copy)]
struct Piece {
    addr: u64,
    at: *mut u8,
    len: usize,
}

// SAFETY: the memory is shared with another process anyway; each piece is used by one thread.
unsafe impl Send for Piece {}

impl Piece {
    fn new(ram: &GuestRam, len: usize) -> Self {
        let addr = ram.alloc(len as u64, 64);
        let slice = ram.memory().get_slice(GuestAddress(addr), len);
        let at = slice.map_or(std::ptr::null_mut(), |s| s.ptr_guard_mut().as_ptr());
        assert!(!at.is_null(), "guest memory was just allocated");
        Self { addr, at, len }
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: `at` points to `len` bytes of the mapping, which lives as long as the queue that its
        // thread owns. The backend only writes to it while the buffer is posted, and then nobody looks.
        unsafe { std::slice::from_raw_parts(self.at, self.len) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; a piece to be filled is not posted.
        unsafe { std::slice::from_raw_parts_mut(self.at, self.len) }
    }
}

/// Posts all buffers for receiving; the one at each head.
fn post(queue: &mut DriverQueue) -> Vec<Option<Piece>> {
    let ram = Arc::clone(queue.ram());
    let mut buffers = vec![None; QUEUE_SIZE.into()];
    for _ in 0..QUEUE_SIZE {
        let piece = Piece::new(&ram, RX_LEN);
        let head = queue.add(&[Buffer::writable(piece.addr, RX_LEN as u32)]);
        if let Some(place) = head.and_then(|head| buffers.get_mut(usize::from(head))) {
            *place = Some(piece);
        }
    }
    queue.publish();
    buffers
}

fn receive_frames(mut queue: DriverQueue, posted: &[Option<Piece>], tap: &File, stop: &AtomicBool) {
    let mut buffers = posted.to_vec();
    let mut parts: Vec<(Piece, usize)> = Vec::new();
    let mut left = 0_u16;
    while !stop.load(Ordering::Relaxed) {
        let Some(first) = queue.wait_used(NAP) else {
            continue;
        };
        let mut next = Some(first);
        let mut count = 0;
        while let Some(used) = next {
            let head = usize::from(used.head);
            let Some(mut piece) = buffers.get_mut(head).and_then(Option::take) else {
                return;
            };
            if left == 0 {
                // num_buffers (virtio 1.3, 5.1.6.4).
                left = piece
                    .bytes()
                    .get(10..12)
                    .map_or(1, |bytes| u16::from_le_bytes([bytes[0], bytes[1]]))
                    .max(1);
            }
            if parts.is_empty() {
                trust(&mut piece);
            }
            parts.push((piece, used.written as usize));
            left -= 1;
            if left == 0 {
                let slices: Vec<io::IoSlice<'_>> = parts
                    .iter()
                    .map(|(piece, len)| {
                        io::IoSlice::new(piece.bytes().get(..*len).unwrap_or_default())
                    })
                    .collect();
                // A frame that the kernel refuses is lost, as on a wire.
                let _ = rustix::io::writev(tap, &slices);
                drop(slices);
                for (piece, _) in parts.drain(..) {
                    let buffer = Buffer::writable(piece.addr, RX_LEN as u32);
                    let head = queue.add(&[buffer]).map(usize::from);
                    if let Some(place) = head.and_then(|head| buffers.get_mut(head)) {
                        *place = Some(piece);
                    }
                }
            }
            count += 1;
            if count % BATCH == 0 {
                queue.kick();
            }
            next = queue.poll_used();
        }
        queue.kick();
    }
}

/// A virtio-net driver trusts the checksum of a frame that says DATA_VALID; a TAP does not know that
/// flag. What it takes unchecked is a checksum still to be completed, so that is what the frame says
/// then.
fn trust(piece: &mut Piece) {
    const NEEDS_CSUM: u8 = 1;
    const DATA_VALID: u8 = 2;
    let (ip, offset) = match piece.bytes() {
        [flags, ..] if flags & (NEEDS_CSUM | DATA_VALID) != DATA_VALID => return,
        bytes => {
            let at = HEADER_LEN + 14;
            let byte = |at: usize| bytes.get(at).copied().unwrap_or(0);
            let (len, protocol) = match byte(at) >> 4 {
                4 => (usize::from(byte(at) & 15) * 4, byte(at + 9)),
                6 => (40, byte(at + 6)),
                _ => return,
            };
            match protocol {
                6 => (14 + len, 16_u16),
                17 => (14 + len, 6),
                _ => return,
            }
        }
    };
    let start = u16::try_from(ip).unwrap_or(0);
    if let [flags, _, _, _, _, _, a, b, c, d, ..] = piece.bytes_mut() {
        *flags = NEEDS_CSUM;
        [*a, *b] = start.to_le_bytes();
        [*c, *d] = offset.to_le_bytes();
    }
}

fn transmit_frames(mut queue: DriverQueue, tap: &File, stop: &AtomicBool) {
    let ram = Arc::clone(queue.ram());
    let mut free: Vec<Piece> = (0..TX_SLOTS).map(|_| Piece::new(&ram, TX_LEN)).collect();
    let mut out: Vec<Option<Piece>> = vec![None; QUEUE_SIZE.into()];
    let take = |used: offload::testing::driver::Used, out: &mut Vec<Option<Piece>>| {
        out.get_mut(usize::from(used.head)).and_then(Option::take)
    };
    // As a driver does: what was sent is taken back with the next frames, without an interrupt.
    queue.set_no_interrupt(true);
    while !stop.load(Ordering::Relaxed) {
        while let Some(used) = queue.poll_used() {
            free.extend(take(used, &mut out));
        }
        let mut count = 0;
        while count < BATCH
            && let Some(mut piece) = free.pop()
        {
            let Ok(len) = rustix::io::read(tap, piece.bytes_mut()) else {
                free.push(piece);
                break;
            };
            let head = queue.add(&[Buffer::readable(piece.addr, len as u32)]);
            match head.and_then(|head| out.get_mut(usize::from(head))) {
                Some(place) => *place = Some(piece),
                None => free.push(piece),
            }
            count += 1;
            if count == 1 || count % TX_BATCH == 0 {
                queue.kick();
            }
        }
        if count > 0 {
            queue.kick();
        } else if free.is_empty() {
            queue.set_no_interrupt(false);
            if let Some(used) = queue.wait_used(NAP) {
                free.extend(take(used, &mut out));
            }
            queue.set_no_interrupt(true);
        } else {
            let timeout = Timespec::try_from(NAP).ok();
            let mut fds = [PollFd::from_borrowed_fd(tap.as_fd(), PollFlags::IN)];
            let _ = poll(&mut fds, timeout.as_ref());
        }
    }
}
