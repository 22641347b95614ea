//! The frontend's side of vhost-user, for tests and benches.
//!
//! Two of them: [`RawFrontend`] sends any bytes with any descriptors, for what a good frontend never
//! does; [`TestFrontend`] is `vhost`'s [`Frontend`], an implementation that is not ours and so would
//! notice where we read the specification in our own way. Guest memory and the driver's rings are
//! [`super::driver`]'s.
//!
//! Everything panics on failure: this is for tests.

#![allow(clippy::unwrap_used, clippy::missing_panics_doc)]

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use vhost::vhost_user::message::{
    FrontendReq, VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};

use super::driver::{DriverQueue, GuestRam};
use crate::memory::RegionInfo;
use crate::vhost_user::message::{HEADER_LEN, MAX_MESSAGE_FDS};
use crate::virtqueue::RingLayout;

/// Set in the flags of every message.
pub const VERSION: u32 = 1;
/// Asks for an acknowledgement.
pub const NEED_REPLY: u32 = 8;

/// A reply as it came.
#[derive(Debug)]
pub struct RawReply {
    /// Request code.
    pub request: u32,
    /// Flags.
    pub flags: u32,
    /// Body.
    pub body: Vec<u8>,
    /// Descriptors that came along.
    pub fds: Vec<OwnedFd>,
}

impl RawReply {
    /// The body, which must be 8 bytes.
    #[must_use]
    pub fn u64(&self) -> u64 {
        u64::from_ne_bytes(self.body.as_slice().try_into().expect("a body of 8 bytes"))
    }
}

/// A frontend that sends whatever it is told.
#[derive(Debug)]
pub struct RawFrontend {
    stream: UnixStream,
}

impl RawFrontend {
    /// Over a connected socket. Receiving gives up after ten seconds.
    #[must_use]
    pub fn new(stream: UnixStream) -> Self {
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        Self { stream }
    }

    /// Connects to a backend, which may need a moment to listen.
    #[must_use]
    pub fn connect(path: &Path) -> Self {
        Self::new(connect(path))
    }

    /// The socket.
    #[must_use]
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Sends bytes as they are.
    pub fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space =
            [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_MESSAGE_FDS + 8))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        // The backend may have closed already: what then comes back is what tests look at.
        let _ = sendmsg(
            &self.stream,
            &[IoSlice::new(bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        );
    }

    /// Sends a message with these flags, [`VERSION`] included or not.
    pub fn send(&self, request: u32, flags: u32, body: &[u8], fds: &[BorrowedFd<'_>]) {
        let len = u32::try_from(body.len()).unwrap();
        let mut bytes = header(request, flags, len).to_vec();
        bytes.extend_from_slice(body);
        self.send_bytes(&bytes, fds);
    }

    /// Sends a request and waits for the reply.
    pub fn ask(&self, request: FrontendReq, body: &[u8], fds: &[BorrowedFd<'_>]) -> RawReply {
        self.send(request.into(), VERSION | NEED_REPLY, body, fds);
        self.receive().expect("a reply")
    }

    /// Sends a request with NEED_REPLY and waits for the acknowledgement: was it a yes?
    #[must_use]
    pub fn is_accepted(&self, request: FrontendReq, body: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        self.ask(request, body, fds).u64() == 0
    }

    /// The next reply, or `None` if the backend has closed the connection.
    #[must_use]
    pub fn receive(&self) -> Option<RawReply> {
        let mut fds = Vec::new();
        let mut head = [0; HEADER_LEN];
        self.fill(&mut head, &mut fds)?;
        let word = |n: usize| u32::from_ne_bytes(head[n..n + 4].try_into().unwrap());
        let mut body = vec![0; word(8) as usize];
        self.fill(&mut body, &mut fds)?;
        Some(RawReply {
            request: word(0),
            flags: word(4),
            body,
            fds,
        })
    }

    fn fill(&self, mut rest: &mut [u8], fds: &mut Vec<OwnedFd>) -> Option<()> {
        while !rest.is_empty() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let received = recvmsg(
                &self.stream,
                &mut [IoSliceMut::new(rest)],
                &mut control,
                RecvFlags::CMSG_CLOEXEC,
            );
            let received = match received {
                Err(rustix::io::Errno::CONNRESET) => return None,
                Err(errno) => panic!("no reply from the backend: {errno}"),
                Ok(received) if received.bytes == 0 => return None,
                Ok(received) => received.bytes,
            };
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(received) = message {
                    fds.extend(received);
                }
            }
            rest = &mut rest[received..];
        }
        Some(())
    }
}

/// The 12 bytes of a header.
#[must_use]
pub fn header(request: u32, flags: u32, len: u32) -> [u8; HEADER_LEN] {
    let mut bytes = [0; HEADER_LEN];
    for (place, field) in bytes.chunks_mut(4).zip([request, flags, len]) {
        place.copy_from_slice(&field.to_ne_bytes());
    }
    bytes
}

/// A body of 64-bit numbers.
#[must_use]
pub fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// The body "vring state description".
#[must_use]
pub fn vring_state(queue: u32, num: u32) -> Vec<u8> {
    [queue.to_ne_bytes(), num.to_ne_bytes()].concat()
}

fn connect(path: &Path) -> UnixStream {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return stream,
            Err(error) => assert!(Instant::now() < deadline, "{}: {error}", path.display()),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A region of guest memory as the body of ADD_MEM_REG and REM_MEM_REG.
#[must_use]
pub fn region_body(region: &RegionInfo) -> Vec<u8> {
    words(&[
        0,
        region.guest_phys_addr,
        region.size,
        region.userspace_addr,
        region.mmap_offset,
    ])
}

/// The body of SET_VRING_ADDR for a ring in `ram`.
#[must_use]
pub fn vring_addr(queue: u32, ram: &GuestRam, ring: &RingLayout) -> Vec<u8> {
    let mut body = vring_state(queue, 0);
    body.extend(words(&[
        ram.user_addr(ring.desc_table),
        ram.user_addr(ring.used_ring),
        ram.user_addr(ring.avail_ring),
        0,
    ]));
    body
}

/// A well-behaved frontend: `vhost`'s.
pub struct TestFrontend {
    /// `vhost`'s frontend, for what has no method here.
    pub vhost: Frontend,
    raw: RawFrontend,
}

impl std::fmt::Debug for TestFrontend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TestFrontend").finish_non_exhaustive()
    }
}

impl TestFrontend {
    /// Over a connected socket; `queues` is the largest number of queues it may use.
    #[must_use]
    pub fn new(stream: UnixStream, queues: u16) -> Self {
        let raw = RawFrontend::new(stream.try_clone().unwrap());
        Self {
            vhost: Frontend::from_stream(stream, queues.into()),
            raw,
        }
    }

    /// Connects to a backend, which may need a moment to listen.
    #[must_use]
    pub fn connect(path: &Path, queues: u16) -> Self {
        Self::new(connect(path), queues)
    }

    /// Negotiates what is offered of `features`, and all protocol features that are offered; from
    /// then on every request waits for its acknowledgement. Gives the features acknowledged.
    pub fn negotiate(&mut self, features: u64) -> u64 {
        self.vhost.set_owner().unwrap();
        let protocol_features = 1 << 30;
        let features = self.vhost.get_features().unwrap() & (features | protocol_features);
        let protocol = self.vhost.get_protocol_features().unwrap();
        self.vhost.set_protocol_features(protocol).unwrap();
        assert!(protocol.contains(VhostUserProtocolFeatures::REPLY_ACK));
        self.vhost.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        self.vhost.set_features(features).unwrap();
        features
    }

    /// For messages that have no method.
    #[must_use]
    pub fn raw(&self) -> &RawFrontend {
        &self.raw
    }

    /// Shares guest memory (ADD_MEM_REG).
    pub fn add_memory(&mut self, ram: &GuestRam) {
        let region = ram.region();
        let info = VhostUserMemoryRegionInfo {
            guest_phys_addr: region.guest_phys_addr,
            memory_size: region.size,
            userspace_addr: region.userspace_addr,
            mmap_offset: region.mmap_offset,
            mmap_handle: ram.fd().as_raw_fd(),
        };
        self.vhost.add_mem_region(&info).unwrap();
    }

    /// Describes the driver's ring, starts it at the available index `base`, and enables it.
    /// [`Self::negotiate`] and [`Self::add_memory`] come first.
    pub fn start_ring(&mut self, queue: u16, driver: &DriverQueue, base: u16) {
        let index = usize::from(queue);
        let ring = driver.layout();
        let ram = driver.ram();
        self.vhost.set_vring_num(index, ring.size).unwrap();
        self.vhost.set_vring_base(index, base).unwrap();
        let config = VringConfigData {
            queue_max_size: ring.size,
            queue_size: ring.size,
            flags: 0,
            desc_table_addr: ram.user_addr(ring.desc_table),
            used_ring_addr: ram.user_addr(ring.used_ring),
            avail_ring_addr: ram.user_addr(ring.avail_ring),
            log_addr: None,
        };
        self.vhost.set_vring_addr(index, &config).unwrap();
        // Not through `vhost`, whose eventfds are another crate's type. Call first: a ring that
        // finds buffers at once has to tell somebody.
        for (request, fd) in [
            (FrontendReq::SET_VRING_CALL, driver.call_fd()),
            (FrontendReq::SET_VRING_KICK, driver.kick_fd()),
        ] {
            let body = words(&[queue.into()]);
            assert!(self.raw.is_accepted(request, &body, &[fd]));
        }
        self.vhost.set_vring_enable(index, true).unwrap();
    }

    /// Stops a ring (GET_VRING_BASE); gives its next available index.
    pub fn stop_ring(&mut self, queue: u16) -> u16 {
        let base = self.vhost.get_vring_base(queue.into()).unwrap();
        u16::try_from(base).unwrap()
    }

    /// Asks for a new in-flight region.
    pub fn get_inflight(&mut self, queues: u16, queue_size: u16) -> (VhostUserInflight, File) {
        let wanted = VhostUserInflight::new(0, 0, queues, queue_size);
        self.vhost.get_inflight_fd(&wanted).unwrap()
    }

    /// Gives an in-flight region that was asked for before, maybe of another process.
    pub fn set_inflight(&mut self, area: &VhostUserInflight, file: &File) {
        self.vhost.set_inflight_fd(area, file.as_raw_fd()).unwrap();
    }

    /// Reads the configuration space.
    pub fn config(&mut self, offset: u32, len: u32) -> Vec<u8> {
        let buffer = vec![0; len as usize];
        let flags = VhostUserConfigFlags::empty();
        let (_, config) = self.vhost.get_config(offset, len, flags, &buffer).unwrap();
        config
    }

    /// Gives the backend a channel for its own requests; this is our end of it.
    pub fn backend_channel(&mut self) -> BackendChannel {
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.vhost.set_backend_request_fd(&theirs).unwrap();
        ours.set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        BackendChannel(ours)
    }
}

/// Our end of the backend channel.
#[derive(Debug)]
pub struct BackendChannel(UnixStream);

impl BackendChannel {
    /// Waits for a message that is a bare header; gives request code and flags.
    pub fn receive(&mut self) -> (u32, u32) {
        let mut head = [0; HEADER_LEN];
        self.0.read_exact(&mut head).unwrap();
        assert_eq!(head[8..], [0; 4], "a message with a body");
        let word = |n: usize| u32::from_ne_bytes(head[n..n + 4].try_into().unwrap());
        (word(0), word(4))
    }
}
