//! A file system of one file that sees all that the card does to its backing, and can refuse it.
//!
//! A FUSE server, so it stands behind the real binary with its real io_uring, and in front of the
//! backing: it records what was written, when it was answered and which barriers were in between; it
//! answers in another order than it was asked; it fails, cuts short or holds back what a test wants.
//! (A fault-injecting layer in the card would test another program than the one that is shipped; a
//! device mapper target needs a kernel that has it.)
//!
//! It is mounted in a mount namespace of the test's own thread, which what it starts inherits: nothing
//! is left behind, whatever happens. Mounting needs root; [`Glass::new`] gives `None` without.

#![allow(dead_code, clippy::unwrap_used)]

use std::collections::HashSet;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use offload::testing::fuzz::Random;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

pub const EIO: i32 = 5;
pub const EAGAIN: i32 = 11;
pub const EINTR: i32 = 4;
pub const ENOSPC: i32 = 28;

/// What the card asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Read,
    Write,
    Sync,
    Allocate,
    Punch,
}

/// What becomes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// As it should be.
    Do,
    /// Nothing is done: this errno.
    Fail(i32),
    /// So many bytes of it are done.
    Cut(u32),
    /// Nothing yet: see [`Glass::release`].
    Hold,
}

/// Decides on an operation: kind, offset, bytes.
type Judge = Box<dyn FnMut(Kind, u64, u32) -> Verdict + Send>;

/// What happened at the backing, in order. Numbers name operations.
#[derive(Clone, Debug)]
pub enum Event {
    /// A write (or a punch: zeros) is under way from here on.
    Submit { id: u64, offset: u64, data: Vec<u8> },
    /// It was answered.
    Complete(u64),
    /// A barrier began.
    SyncBegin(u64),
    /// It was answered.
    SyncEnd(u64),
    /// What the test notes.
    Note(u64),
}

#[derive(Default)]
struct State {
    judge: Option<Judge>,
    events: Option<Vec<Event>>,
    release: bool,
    shuffle: Option<Random>,
    held: usize,
    /// Open files so far, and those that barriers came through.
    opened: u64,
    synced: HashSet<u64>,
}

/// See the module.
pub struct Glass {
    pub path: PathBuf,
    state: Arc<Mutex<State>>,
    stop: Arc<AtomicBool>,
    server: Option<JoinHandle<()>>,
}

impl Glass {
    /// Shows the file `inner` as `folder/volume`. `None`: this user may not mount.
    pub fn new(inner: &Path, folder: &Path) -> Option<Self> {
        std::fs::create_dir(folder).unwrap();
        let refused = |what: &str, error: &dyn std::fmt::Display| {
            eprintln!("SKIPPED, {what}: {error}; this test needs root and /dev/fuse");
        };
        if let Err(error) = unshare(CloneFlags::CLONE_NEWNS) {
            refused("no mount namespace", &error);
            return None;
        }
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        let mut options = File::options();
        options
            .read(true)
            .write(true)
            .custom_flags(rustix::fs::OFlags::NONBLOCK.bits() as i32);
        let device = match options.open("/dev/fuse") {
            Ok(device) => device,
            Err(error) => {
                refused("no FUSE", &error);
                return None;
            }
        };
        let inner = File::options().read(true).write(true).open(inner).unwrap();
        let data = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,allow_other",
            device.as_raw_fd()
        );
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        if let Err(error) = mount(Some("glass"), folder, Some("fuse"), flags, Some(&*data)) {
            refused("no FUSE mount", &error);
            return None;
        }
        let state = Arc::new(Mutex::new(State::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let server = Server {
            device,
            inner,
            state: Arc::clone(&state),
            stop: Arc::clone(&stop),
            pending: Vec::new(),
            next_id: 0,
        };
        Some(Self {
            path: folder.join("volume"),
            state,
            stop,
            server: Some(std::thread::spawn(move || server.run())),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// From now on `judge` decides.
    pub fn judge(&self, judge: impl FnMut(Kind, u64, u32) -> Verdict + Send + 'static) {
        self.state().judge = Some(Box::new(judge));
    }

    /// All goes well again.
    pub fn heal(&self) {
        self.state().judge = None;
    }

    /// What was held back is done now.
    pub fn release(&self) {
        self.state().release = true;
    }

    /// Operations that are held back.
    pub fn held(&self) -> usize {
        self.state().held
    }

    /// Open files that barriers came through since this was asked last.
    pub fn synced(&self) -> HashSet<u64> {
        std::mem::take(&mut self.state().synced)
    }

    /// Records from now on, and answers in any order.
    pub fn record(&self, seed: u64) {
        let mut state = self.state();
        state.events = Some(Vec::new());
        state.shuffle = Some(Random::new(seed));
    }

    /// Notes something among the events.
    pub fn note(&self, note: u64) {
        if let Some(events) = &mut self.state().events {
            events.push(Event::Note(note));
        }
    }

    /// What was recorded; no more is, and answers come at once again.
    pub fn recorded(&self) -> Vec<Event> {
        let mut state = self.state();
        state.shuffle = None;
        state.events.take().unwrap_or_default()
    }
}

impl Drop for Glass {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(server) = self.server.take() {
            let outcome = server.join();
            assert!(
                outcome.is_ok() || std::thread::panicking(),
                "the server panicked"
            );
        }
    }
}

/// An operation that is not answered.
struct Operation {
    unique: u64,
    id: u64,
    kind: Kind,
    offset: u64,
    len: u64,
    data: Vec<u8>,
    verdict: Verdict,
}

struct Server {
    device: File,
    inner: File,
    state: Arc<Mutex<State>>,
    stop: Arc<AtomicBool>,
    pending: Vec<Operation>,
    next_id: u64,
}

/// Numbers of requests (include/uapi/linux/fuse.h).
mod op {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const INTERRUPT: u32 = 36;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
}

const ENOENT: i32 = 2;
const ENOSYS: i32 = 38;
const FOPEN_DIRECT_IO: u32 = 1;
const FOPEN_PARALLEL_DIRECT_WRITES: u32 = 1 << 6;
const INIT_FLAGS: u32 = 1 | 1 << 5 | 1 << 15 | 1 << 22;
const MAX_WRITE: u32 = 1 << 20;
const PUNCH_HOLE: u32 = 2;

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(*bytes[at..].first_chunk().unwrap())
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(*bytes[at..].first_chunk().unwrap())
}

impl Server {
    fn run(mut self) {
        let mut buffer = vec![0; MAX_WRITE as usize + 4096];
        while !self.stop.load(Ordering::Relaxed) {
            let is_busy = self.pending.iter().any(|op| op.verdict != Verdict::Hold);
            let patience = Timespec {
                tv_sec: 0,
                tv_nsec: if is_busy { 0 } else { 20_000_000 },
            };
            let mut fds = [PollFd::new(&self.device, PollFlags::IN)];
            let ready = poll(&mut fds, Some(&patience)).unwrap_or(0);
            if ready > 0 {
                match (&self.device).read(&mut buffer) {
                    Ok(len) => self.take(&buffer[..len]),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    // Of a request that was given up meanwhile.
                    Err(error) if error.raw_os_error() == Some(ENOENT) => {}
                    // Unmounted.
                    Err(_) => return,
                }
            }
            self.go_on(ready > 0);
        }
    }

    fn reply(&self, unique: u64, result: Result<&[u8], i32>) {
        let body = result.unwrap_or_default();
        let mut message = (16 + body.len() as u32).to_ne_bytes().to_vec();
        message.extend(result.err().map_or(0, |errno| -errno).to_ne_bytes());
        message.extend(unique.to_ne_bytes());
        message.extend(body);
        // Who asked may be dead.
        let _ = (&self.device).write(&message);
    }

    fn attributes(&self, node: u64) -> Vec<u8> {
        let meta = self.inner.metadata().unwrap();
        let (mode, size, blocks) = match node {
            1 => (0o40755, 4096, 8),
            _ => (0o100_600, meta.len(), meta.blocks()),
        };
        let longs = [node, size, blocks, 0, 0, 0];
        let words = [0, 0, 0, mode, 1, 0, 0, 0, 4096, 0u32];
        let longs = longs.iter().flat_map(|long: &u64| long.to_ne_bytes());
        longs
            .chain(words.iter().flat_map(|word| word.to_ne_bytes()))
            .collect()
    }

    fn take(&mut self, message: &[u8]) {
        let (kind, unique, node) = (word(message, 4), long(message, 8), long(message, 16));
        let body = &message[40..];
        match kind {
            op::INIT => {
                let flags = word(body, 12) & INIT_FLAGS;
                let mut out = Vec::new();
                for field in [
                    7,
                    31,
                    1 << 20,
                    flags,
                    64 | 48 << 16,
                    MAX_WRITE,
                    1,
                    MAX_WRITE / 4096,
                ] {
                    out.extend(field.to_ne_bytes());
                }
                out.resize(64, 0);
                self.reply(unique, Ok(&out));
            }
            op::LOOKUP if body == b"volume\0" => {
                let mut out = Vec::new();
                for field in [2, 0, 1, 1, 0u64] {
                    out.extend(field.to_ne_bytes());
                }
                out.extend(self.attributes(2));
                self.reply(unique, Ok(&out));
            }
            op::LOOKUP => self.reply(unique, Err(ENOENT)),
            op::GETATTR => {
                let mut out = [1u64, 0].map(u64::to_ne_bytes).concat();
                out.extend(self.attributes(node));
                self.reply(unique, Ok(&out));
            }
            op::OPEN => {
                let flags = FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES;
                let handle = {
                    let mut state = self.state.lock().unwrap();
                    state.opened += 1;
                    state.opened
                };
                let out = [handle, flags.into()].map(u64::to_ne_bytes).concat();
                self.reply(unique, Ok(&out));
            }
            op::READ => self.begin(
                unique,
                Kind::Read,
                long(body, 8),
                word(body, 16).into(),
                &[],
            ),
            op::WRITE => {
                let data = &body[40..40 + word(body, 16) as usize];
                self.begin(unique, Kind::Write, long(body, 8), data.len() as u64, data);
            }
            op::FSYNC => {
                self.state.lock().unwrap().synced.insert(long(body, 0));
                self.begin(unique, Kind::Sync, 0, 0, &[]);
            }
            op::FALLOCATE => {
                let is_punch = word(body, 24) & PUNCH_HOLE != 0;
                let kind = if is_punch {
                    Kind::Punch
                } else {
                    Kind::Allocate
                };
                self.begin(unique, kind, long(body, 8), long(body, 16), &[]);
            }
            op::FLUSH | op::RELEASE => self.reply(unique, Ok(&[])),
            op::FORGET | op::BATCH_FORGET | op::INTERRUPT => {}
            _ => self.reply(unique, Err(ENOSYS)),
        }
    }

    fn begin(&mut self, unique: u64, kind: Kind, offset: u64, len: u64, data: &[u8]) {
        self.next_id += 1;
        let id = self.next_id;
        let mut state = self.state.lock().unwrap();
        let verdict = match &mut state.judge {
            Some(judge) => judge(kind, offset, len as u32),
            None => Verdict::Do,
        };
        let data = match kind {
            Kind::Punch => vec![0; len as usize],
            _ => data.to_vec(),
        };
        if let Some(events) = &mut state.events {
            match kind {
                Kind::Write | Kind::Punch => {
                    let data = data.clone();
                    events.push(Event::Submit { id, offset, data });
                }
                Kind::Sync => events.push(Event::SyncBegin(id)),
                Kind::Read | Kind::Allocate => {}
            }
        }
        state.held += usize::from(verdict == Verdict::Hold);
        drop(state);
        self.pending.push(Operation {
            unique,
            id,
            kind,
            offset,
            len,
            data,
            verdict,
        });
    }

    /// Answers what is due.
    fn go_on(&mut self, is_ready: bool) {
        let mut state = self.state.lock().unwrap();
        if std::mem::take(&mut state.release) {
            for op in self
                .pending
                .iter_mut()
                .filter(|op| op.verdict == Verdict::Hold)
            {
                op.verdict = Verdict::Do;
            }
            state.held = 0;
        }
        let due = |op: &Operation| op.verdict != Verdict::Hold;
        let mut chosen = Vec::new();
        match &mut state.shuffle {
            Some(random) => {
                let due: Vec<usize> = (0..self.pending.len())
                    .filter(|i| due(&self.pending[*i]))
                    .collect();
                // More may come while it is being thought about.
                let waits = is_ready && random.one_in(2);
                if !due.is_empty() && !waits {
                    chosen.push(self.pending.remove(random.pick(&due)));
                }
            }
            None => chosen.extend(self.pending.extract_if(.., |op| due(op))),
        }
        drop(state);
        for op in chosen {
            self.finish(op);
        }
    }

    fn finish(&self, op: Operation) {
        let len = match op.verdict {
            Verdict::Fail(errno) => return self.reply(op.unique, Err(errno)),
            Verdict::Cut(len) => (op.len as usize).min(len as usize),
            Verdict::Do | Verdict::Hold => op.len as usize,
        };
        let mut out = Vec::new();
        match op.kind {
            Kind::Read => {
                out.resize(len, 0);
                let mut at = 0;
                while at < len {
                    match self
                        .inner
                        .read_at(&mut out[at..], op.offset + at as u64)
                        .unwrap()
                    {
                        0 => break,
                        got => at += got,
                    }
                }
                out.truncate(at);
            }
            Kind::Write => {
                self.inner.write_all_at(&op.data[..len], op.offset).unwrap();
                out.extend(u64::from(len as u32).to_ne_bytes());
            }
            Kind::Punch => self.inner.write_all_at(&op.data, op.offset).unwrap(),
            Kind::Sync | Kind::Allocate => {}
        }
        let mut state = self.state.lock().unwrap();
        if let Some(events) = &mut state.events {
            match op.kind {
                Kind::Write | Kind::Punch => events.push(Event::Complete(op.id)),
                Kind::Sync => events.push(Event::SyncEnd(op.id)),
                Kind::Read | Kind::Allocate => {}
            }
        }
        // Before the card can know of it: what it does then comes later in the record.
        drop(state);
        self.reply(op.unique, Ok(&out));
    }
}
