//! The card's binary under test: files to make volumes in, the process, and a guest that talks to
//! it over vhost-user with rings of its own.

#![allow(dead_code, clippy::unwrap_used)]

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use offload::testing::driver::{Buffer, DriverQueue, GuestRam};
use offload::testing::frontend::TestFrontend;
use vhost::vhost_user::message::VhostUserInflight;
use vhost::vhost_user::{VhostUserFrontend, message::VhostUserConfigFlags};

pub const PATIENCE: Duration = Duration::from_secs(30);
pub const BLOCK: usize = 4096;

pub const IN: u32 = 0;
pub const OUT: u32 = 1;
pub const FLUSH: u32 = 4;
pub const GET_ID: u32 = 8;
pub const DISCARD: u32 = 11;
pub const WRITE_ZEROES: u32 = 13;

pub const OK: u8 = 0;
pub const IOERR: u8 = 1;
pub const UNSUPP: u8 = 2;

pub const F_FLUSH: u64 = 1 << 9;
pub const F_CONFIG_WCE: u64 = 1 << 11;

/// A folder with a key and a name for a volume.
pub struct Files {
    dir: tempfile::TempDir,
}

impl Files {
    pub fn new() -> Self {
        Self::within(&std::env::temp_dir())
    }

    /// With the folder in this one.
    pub fn within(parent: &Path) -> Self {
        let dir = tempfile::tempdir_in(parent).unwrap();
        let files = Self { dir };
        files.private("key", &[7; 32]);
        files
    }

    /// With a volume of this size in it.
    pub fn with_volume(size: &str) -> Self {
        let files = Self::new();
        files.create(size);
        files
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// Makes a file that nobody else can read.
    pub fn private(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.path(name);
        let mut options = File::options();
        let file = options
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&path);
        file.unwrap().write_all_at(content, 0).unwrap();
        path
    }

    pub fn create(&self, size: &str) {
        let (volume, key) = (self.text("volume"), self.text("key"));
        succeeds(&["create", "--size", size, "--key-file", &key, &volume]);
    }

    /// The volume's file, to be looked at or damaged.
    pub fn raw(&self) -> File {
        File::options()
            .read(true)
            .write(true)
            .open(self.path("volume"))
            .unwrap()
    }

    /// Runs a subcommand on the volume with its key, plus `rest`.
    pub fn on_volume(&self, command: &str, rest: &[&str]) -> Output {
        let (volume, key) = (self.text("volume"), self.text("key"));
        run(&[&[command, "--key-file", &key], rest, &[&volume]].concat())
    }

    /// A card that serves the volume.
    pub fn serve(&self, rest: &[&str]) -> Card {
        Card::start(self, &self.text("volume"), rest)
    }
}

/// Runs the binary to its end.
pub fn run(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vhost-blk"))
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[track_caller]
pub fn succeeds(args: &[&str]) -> String {
    let output = run(args);
    assert!(output.status.success(), "{args:?}: {}", stderr(&output));
    stdout(&output)
}

/// The command fails with this exit status; what it says.
#[track_caller]
pub fn fails(args: &[&str], code: i32) -> String {
    let output = run(args);
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {said}");
    assert!(!said.contains("panicked"), "{said}");
    said
}

/// A running card.
pub struct Card {
    child: Child,
    pub socket: PathBuf,
    log: PathBuf,
}

impl Card {
    pub fn start(files: &Files, volume: &str, rest: &[&str]) -> Self {
        let key = files.text("key");
        Self::launch(
            files,
            &[&["--volume", volume, "--key-file", &key], rest].concat(),
        )
    }

    /// With these arguments and a socket.
    pub fn launch(files: &Files, args: &[&str]) -> Self {
        let (socket, log) = (files.path("sock"), files.path("log"));
        let _ = std::fs::remove_file(&socket);
        let to = File::options()
            .append(true)
            .create(true)
            .open(&log)
            .unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_vhost-blk"))
            .args(["serve", "--socket-path", socket.to_str().unwrap()])
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(to)
            .spawn()
            .unwrap();
        let mut card = Self { child, socket, log };
        card.wait_for("serving volume");
        card
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    /// Waits until the log has a text.
    #[track_caller]
    pub fn wait_for(&mut self, text: &str) {
        let end = Instant::now() + PATIENCE;
        while !self.log().contains(text) {
            let ended = self.child.try_wait().unwrap();
            assert!(
                ended.is_none() && Instant::now() < end,
                "no {text:?}; the card: {ended:?}, its log:\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// kill -9.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        std::fs::remove_file(&self.log).unwrap();
    }

    /// kill -9, of a process that may have to wait for its I/O before it is gone.
    pub fn kill_without_waiting(mut self) {
        self.child.kill().unwrap();
        std::fs::remove_file(&self.log).unwrap();
        std::thread::spawn(move || drop(self));
    }

    /// SIGTERM; how it ended.
    #[track_caller]
    pub fn terminate(&mut self) -> std::process::ExitStatus {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < end, "the card does not stop");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// SIGTERM; it must end cleanly.
    #[track_caller]
    pub fn stop(mut self) {
        let status = self.terminate();
        assert!(status.success(), "{status:?}: {}", self.log());
        assert!(!self.log().contains("panicked"), "{}", self.log());
        std::fs::remove_file(&self.log).unwrap();
    }
}

impl Drop for Card {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What came of a request.
#[derive(Debug, PartialEq, Eq)]
pub struct Reply {
    pub status: u8,
    pub data: Vec<u8>,
    pub written: u32,
}

/// A request that is out.
#[derive(Debug, Clone, Copy)]
pub struct Ticket {
    pub queue: usize,
    pub head: u16,
    status: u64,
    data: u64,
    len: usize,
}

/// A guest: memory, rings, and the frontend's socket.
pub struct Guest {
    pub frontend: TestFrontend,
    pub ram: Arc<GuestRam>,
    pub queues: Vec<DriverQueue>,
    pub features: u64,
    inflight: Option<(VhostUserInflight, File)>,
    /// Requests' memory, reused.
    free: Vec<(u64, usize)>,
    finished: Vec<(usize, u16, u32)>,
}

/// Bytes that a pooled request has for its data.
const SLOT: usize = 1 << 20;

pub struct Options {
    pub queues: u16,
    pub size: u16,
    pub features: u64,
    pub inflight: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            queues: 1,
            size: 64,
            features: u64::MAX,
            inflight: true,
        }
    }
}

impl Guest {
    pub fn new(card: &Card) -> Self {
        Self::with(card, Options::default())
    }

    pub fn with(card: &Card, options: Options) -> Self {
        Self::at(&card.socket, options)
    }

    /// A guest on any socket.
    pub fn at(socket: &Path, options: Options) -> Self {
        let ram = GuestRam::new(128 << 20);
        let mut frontend = TestFrontend::connect(socket, options.queues);
        let features = frontend.negotiate(options.features);
        frontend.add_memory(&ram);
        let inflight = options
            .inflight
            .then(|| frontend.get_inflight(options.queues, options.size));
        let queues = (0..options.queues)
            .map(|_| DriverQueue::new(&ram, options.size, features))
            .collect();
        let mut guest = Self {
            frontend,
            ram,
            queues,
            features,
            inflight,
            free: Vec::new(),
            finished: Vec::new(),
        };
        guest.start();
        guest
    }

    /// Gives the in-flight region to the card and starts all rings.
    fn start(&mut self) {
        if let Some((area, file)) = &self.inflight {
            self.frontend.set_inflight(area, file);
        }
        for (index, queue) in (0..).zip(&self.queues) {
            self.frontend.start_ring(index, queue, queue.used_idx());
        }
    }

    /// Goes on with another card: same memory, same rings, same in-flight region.
    pub fn reconnect(&mut self, card: &Card) {
        self.frontend = TestFrontend::connect(&card.socket, self.queues.len() as u16);
        let features = self.frontend.negotiate(self.features);
        assert_eq!(features, self.features);
        self.frontend.add_memory(&self.ram);
        self.start();
    }

    pub fn inflight(&self) -> &File {
        &self.inflight.as_ref().unwrap().1
    }

    fn slot(&mut self, len: usize) -> (u64, usize) {
        let place = self.free.iter().position(|(_, room)| *room >= len);
        match place {
            Some(index) => self.free.swap_remove(index),
            None => {
                let room = len.max(SLOT);
                (self.ram.alloc(room as u64 + 8192, 4096), room)
            }
        }
    }

    /// Sends a request without waiting. `None`: the ring is full.
    pub fn send(
        &mut self,
        queue: usize,
        kind: u32,
        sector: u64,
        out: &[u8],
        room: usize,
    ) -> Option<Ticket> {
        let (at, len) = self.slot(out.len().max(room));
        let (data, header, status) = (at, at + len as u64, at + len as u64 + 64);
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend([0; 4]);
        bytes.extend(sector.to_le_bytes());
        self.ram.write(header, &bytes);
        self.ram.write(status, &[0xee]);
        let mut chain = vec![Buffer::readable(header, 16)];
        if !out.is_empty() {
            self.ram.write(data, out);
            chain.push(Buffer::readable(data, out.len() as u32));
        }
        if room > 0 {
            self.ram.write(data, &vec![0xee; room]);
            chain.push(Buffer::writable(data, room as u32));
        }
        chain.push(Buffer::writable(status, 1));
        let driver = self.queues.get_mut(queue).unwrap();
        let Some(head) = driver.add(&chain) else {
            self.free.push((at, len));
            return None;
        };
        driver.kick();
        Some(Ticket {
            queue,
            head,
            status,
            data,
            len: room,
        })
    }

    /// Whether a request came back; its reply if it did.
    pub fn poll(&mut self, ticket: &Ticket) -> Option<Reply> {
        let driver = self.queues.get_mut(ticket.queue).unwrap();
        while let Some(used) = driver.poll_used() {
            self.finished.push((ticket.queue, used.head, used.written));
        }
        let at =
            |(queue, head, _): &(usize, u16, u32)| *queue == ticket.queue && *head == ticket.head;
        let index = self.finished.iter().position(at)?;
        let (_, _, written) = self.finished.remove(index);
        let status = self.ram.read(ticket.status, 1).first().copied().unwrap();
        let data = self.ram.read(ticket.data, ticket.len);
        let room = (ticket.status - 64 - ticket.data) as usize;
        self.free.push((ticket.data, room));
        Some(Reply {
            status,
            data,
            written,
        })
    }

    #[track_caller]
    pub fn wait(&mut self, ticket: &Ticket) -> Reply {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(reply) = self.poll(ticket) {
                return reply;
            }
            assert!(Instant::now() < end, "a request did not come back");
            std::thread::yield_now();
        }
    }

    #[track_caller]
    pub fn request(&mut self, kind: u32, sector: u64, out: &[u8], room: usize) -> Reply {
        let ticket = self.send(0, kind, sector, out, room).unwrap();
        self.wait(&ticket)
    }

    #[track_caller]
    pub fn write(&mut self, sector: u64, data: &[u8]) {
        let reply = self.request(OUT, sector, data, 0);
        assert_eq!((reply.status, reply.written), (OK, 1));
    }

    #[track_caller]
    pub fn read(&mut self, sector: u64, len: usize) -> Vec<u8> {
        let reply = self.request(IN, sector, &[], len);
        assert_eq!((reply.status, reply.written), (OK, len as u32 + 1));
        reply.data
    }

    #[track_caller]
    pub fn flush(&mut self) {
        assert_eq!(self.request(FLUSH, 0, &[], 0).status, OK);
    }

    /// Sends any chain and waits: bytes written.
    #[track_caller]
    pub fn raw_chain(&mut self, chain: &[Buffer]) -> u32 {
        let driver = self.queues.first_mut().unwrap();
        let head = driver.add(chain).unwrap();
        driver.kick();
        let used = driver.wait_used(PATIENCE).expect("the chain comes back");
        assert_eq!(used.head, head);
        used.written
    }

    /// A chain by a table of its own.
    #[track_caller]
    pub fn raw_indirect(&mut self, chain: &[Buffer]) -> u32 {
        let driver = self.queues.first_mut().unwrap();
        let head = driver.add_indirect(chain).unwrap();
        driver.kick();
        let used = driver.wait_used(PATIENCE).expect("the chain comes back");
        assert_eq!(used.head, head);
        used.written
    }

    /// Writes to the configuration space.
    pub fn set_config(&mut self, offset: u32, data: &[u8]) -> bool {
        let flags = VhostUserConfigFlags::WRITABLE;
        self.frontend.vhost.set_config(offset, flags, data).is_ok()
    }
}

/// Bytes that tell where they belong.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}

/// A segment of DISCARD and WRITE_ZEROES.
pub fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}
