//! The flow log's file: a thread of its own writes what the queues' threads have counted.
//!
//! ```text
//!  queue's thread   FlowLog ─take─► Feed ─try_send─► [ 4 windows ] ─► writer's thread ─► FILE
//!                                     │ full                                              FILE.1
//!                                     └─► counted, told with the next window: SKIPDATA     ...
//! ```
//!
//! A slow disk holds up nobody but the writer: a window that finds the channel full is dropped, and
//! the next one says so. The same holds for windows that the disk did not take.
//!
//! Windows of several queues for one interval are joined: the writer keeps a window until one of
//! another interval comes or none has come for `PATIENCE`.
//!
//! # Rotation
//! When a window would take the file over its size, `FILE.1` becomes `FILE.2` and so on, `FILE`
//! becomes `FILE.1`, and `FILE` begins anew. The files are opened before the sandbox and it is
//! their contents that move. To rename them would be cheaper, but the card would need the right to
//! make and remove files in that folder for all of its life, perhaps as a user who may not; and a
//! log grows slowly enough for the copies. A crash in between leaves a part twice, never none.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use offload::telemetry::{Counter, RateLimited, Registry};
use thiserror::Error;

use super::flowlog::{Identity, Window};

/// Windows that wait for the writer, at most.
const WAITING: usize = 4;
/// How long the queues' windows of one interval may lie apart.
const PATIENCE: Duration = Duration::from_secs(2);
/// Copied at a time.
const COPY_LEN: usize = 1 << 16;

/// Why a log cannot be written.
#[derive(Debug, Error)]
pub enum FlowFileError {
    /// A file cannot be opened or made.
    #[error("cannot open the flow log {}: does its folder exist, and may this user write there?", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the kernel says.
        source: io::Error,
    },
    /// No more threads.
    #[error("cannot start the flow log's thread")]
    Thread(#[source] io::Error),
}

/// Counters of a flow log.
#[derive(Debug, Default)]
pub struct FlowFileStats {
    /// Lines written.
    pub lines: Arc<Counter>,
    /// Windows that were lost, because the disk was slow or full.
    pub lost: Arc<Counter>,
}

impl FlowFileStats {
    /// Shows them.
    pub fn register(&self, registry: &Registry) {
        let lines = "Lines of the flow log that were written";
        registry.counter("flow_log_lines", lines, Vec::new(), Arc::clone(&self.lines));
        let lost = "Intervals of the flow log that were lost to a slow or full disk";
        registry.counter("flow_log_lost", lost, Vec::new(), Arc::clone(&self.lost));
    }
}

#[derive(Debug)]
enum Message {
    Window(Window),
    End,
}

/// Where a queue's thread leaves its windows. Never waits.
#[derive(Debug, Clone)]
pub struct Feed {
    sender: SyncSender<Message>,
    stats: Arc<FlowFileStats>,
    /// Packets of windows that were dropped, to be told with the next one.
    skipped: u64,
}

impl Feed {
    /// Leaves a window to the writer.
    pub fn put(&mut self, mut window: Window) {
        window.skipped += self.skipped;
        let packets = window.records.iter().map(|record| record.packets);
        let packets = packets.sum::<u64>() + window.skipped;
        self.skipped = match self.sender.try_send(Message::Window(window)) {
            Ok(()) => 0,
            Err(_) => {
                self.stats.lost.inc();
                // Even if it was empty: the interval is missing.
                packets.max(1)
            }
        };
    }
}

/// An open log without a thread yet.
#[derive(Debug)]
pub struct FlowFile {
    rotated: Rotated,
    who: Identity,
    sender: SyncSender<Message>,
    receiver: Receiver<Message>,
    stats: Arc<FlowFileStats>,
}

/// The writer's thread. To drop it writes what has been left to it and ends it.
#[derive(Debug)]
pub struct FlowWriter {
    sender: SyncSender<Message>,
    thread: Option<JoinHandle<()>>,
}

impl FlowFile {
    /// Opens `path` and its `keep` older ones, which are made if they are not there. A file grows
    /// to `size` bytes, or one window if that is longer.
    ///
    /// # Errors
    /// [`FlowFileError::Open`].
    pub fn open(path: &Path, size: u64, keep: u32, who: Identity) -> Result<Self, FlowFileError> {
        let (sender, receiver) = sync_channel(WAITING);
        Ok(Self {
            rotated: Rotated::open(path, size, keep)?,
            who,
            sender,
            receiver,
            stats: Arc::default(),
        })
    }

    /// For one queue's thread.
    #[must_use]
    pub fn feed(&self) -> Feed {
        Feed {
            sender: self.sender.clone(),
            stats: Arc::clone(&self.stats),
            skipped: 0,
        }
    }

    /// Counters.
    #[must_use]
    pub fn stats(&self) -> &Arc<FlowFileStats> {
        &self.stats
    }

    /// Starts to write.
    ///
    /// # Errors
    /// [`FlowFileError::Thread`].
    pub fn spawn(self) -> Result<FlowWriter, FlowFileError> {
        let sender = self.sender.clone();
        let thread = std::thread::Builder::new()
            .name("flow-log".into())
            .spawn(move || self.run())
            .map_err(FlowFileError::Thread)?;
        Ok(FlowWriter {
            sender,
            thread: Some(thread),
        })
    }

    fn run(mut self) {
        let mut pending: Option<Window> = None;
        let mut complaints = RateLimited::new(1, Duration::from_secs(60));
        loop {
            let message = match &pending {
                Some(_) => self.receiver.recv_timeout(PATIENCE),
                None => self.receiver.recv().map_err(RecvTimeoutError::from),
            };
            let next = match message {
                Ok(Message::Window(window)) => Some(window),
                Ok(Message::End) | Err(RecvTimeoutError::Disconnected) => {
                    self.write(pending, &mut complaints);
                    return;
                }
                Err(RecvTimeoutError::Timeout) => None,
            };
            pending = match (pending, next) {
                (Some(mut window), Some(other)) if window.start == other.start => {
                    window.join(other);
                    Some(window)
                }
                (old, new) => {
                    if self.write(old, &mut complaints) {
                        new
                    } else {
                        // One more window that is lost; the line after it tells.
                        new.map(|mut window| {
                            window.skipped += 1;
                            window
                        })
                    }
                }
            };
        }
    }

    /// False: lost.
    fn write(&mut self, window: Option<Window>, complaints: &mut RateLimited) -> bool {
        let Some(window) = window else { return true };
        let lines = window.lines(&self.who);
        match self.rotated.append(lines.as_bytes()) {
            Ok(()) => {
                self.stats.lines.add(lines.lines().count() as u64);
                true
            }
            Err(error) => {
                self.stats.lost.inc();
                if complaints.allow(Instant::now()).is_some() {
                    tracing::error!(%error, "the flow log cannot be written: is the disk full?");
                }
                false
            }
        }
    }
}

impl Drop for FlowWriter {
    fn drop(&mut self) {
        // Waits if the channel is full: the writer takes from it until this message comes.
        let _ = self.sender.send(Message::End);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Files of bounded size, the youngest first.
#[derive(Debug)]
struct Rotated {
    files: Vec<File>,
    len: u64,
    size: u64,
}

impl Rotated {
    fn open(path: &Path, size: u64, keep: u32) -> Result<Self, FlowFileError> {
        let open = |path: PathBuf| {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o640)
                .open(&path);
            file.map_err(|source| FlowFileError::Open { path, source })
        };
        let mut files = vec![open(path.to_owned())?];
        for number in 1..=keep {
            let mut name = path.as_os_str().to_owned();
            name.push(format!(".{number}"));
            files.push(open(name.into())?);
        }
        let len = files.first().map(length).transpose();
        let len = len.map_err(|source| FlowFileError::Open {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            files,
            len: len.unwrap_or(0),
            size,
        })
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let added = bytes.len() as u64;
        if self.len > 0 && self.len.saturating_add(added) > self.size {
            self.rotate()?;
        }
        let Some(file) = self.files.first() else {
            return Ok(());
        };
        if let Err(error) = file.write_all_at(bytes, self.len) {
            // Half a line would be read as a wrong one.
            let _ = file.set_len(self.len);
            return Err(error);
        }
        self.len += added;
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        for pair in self.files.windows(2).rev() {
            if let [younger, older] = pair {
                copy(younger, older)?;
            }
        }
        if let Some(file) = self.files.first() {
            file.set_len(0)?;
        }
        self.len = 0;
        Ok(())
    }
}

fn length(file: &File) -> io::Result<u64> {
    Ok(file.metadata()?.len())
}

/// Makes one file's contents the other's. By plain reads and writes: those the sandbox allows.
fn copy(from: &File, to: &File) -> io::Result<()> {
    to.set_len(0)?;
    let mut buffer = vec![0; COPY_LEN];
    let mut at = 0;
    loop {
        let len = from.read_at(&mut buffer, at)?;
        let Some(bytes) = buffer.get(..len).filter(|bytes| !bytes.is_empty()) else {
            return Ok(());
        };
        to.write_all_at(bytes, at)?;
        at += len as u64;
    }
}

#[cfg(test)]
mod tests;
