//! What the engine wants done to the backing, as io_uring operations.
//!
//! An operation's buffer is the kernel's until its completion: it is kept here, not in the engine,
//! and handed back with the result.
//!
//! A file in memory (tmpfs, ramfs) is another matter: its transfers are copies, which wait for
//! nothing, but these file systems do not tell io_uring so (no `FMODE_NOWAIT`), which then hands each
//! transfer to a thread of its own: two switches for a copy of a microsecond. There
//! [`Driver::start`] transfers at once. What may take longer, making room and giving it back, goes
//! to io_uring all the same. So do long transfers of which there are several: while the kernel's
//! thread copies one, this one seals or opens another (128 KiB reads at depth 16: 1.2 times as many,
//! writes 1.3 times; before that, a third of this thread's time was the copy).

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use io_uring::{opcode, squeue, types};

use crate::volume::backing::FileBacking;
use crate::volume::buffer::Buffer;
use crate::volume::engine::{Io, IoKind};

const FALLOC_FL_KEEP_SIZE: i32 = 1;
const FALLOC_FL_PUNCH_HOLE: i32 = 2;

/// A read in memory of so many bytes is long enough for a thread of its own.
const LONG_READ: usize = 32 << 10;
/// So is a write of more than this: more than a whole queue of small writes that leaves as one, for
/// which the guest waits.
const LONG_WRITE: usize = 128 << 10;

/// What became of an operation.
pub enum Started {
    /// It is to be submitted, with this `user_data`.
    Entry(squeue::Entry, u64),
    /// It is done: what [`Driver::finish`] gives.
    Done(u32, i32, Option<Buffer>),
}

/// Operations of one lane under way.
#[derive(Debug)]
pub struct Driver {
    backing: Arc<FileBacking>,
    /// By the operation's id, which the engine keeps small.
    under_way: Vec<Option<IoKind>>,
    count: usize,
}

impl Driver {
    /// For a lane of a volume in `backing`.
    pub fn new(backing: Arc<FileBacking>) -> Self {
        Self {
            backing,
            under_way: Vec::new(),
            count: 0,
        }
    }

    /// Whether short transfers are done when they are started.
    pub fn is_immediate(&self) -> bool {
        self.backing.is_memory()
    }

    /// Takes an operation over, and carries it out if that is but a copy. `has_next`: there is
    /// another to start right after it.
    ///
    /// The entry points into a buffer that this driver owns until [`Driver::finish`], and at a
    /// descriptor that is open as long as the driver lives: whoever submits it must finish it, or
    /// see that the driver is never dropped.
    pub fn start(&mut self, mut io: Io, has_next: bool) -> Started {
        let has_others = has_next || self.count > 0;
        if self.is_immediate()
            && !(has_others && is_long(&io.kind))
            && let Some(result) = transfer(self.backing.file(), &mut io.kind)
        {
            return Started::Done(io.id, result, io.kind.into_buffer());
        }
        let id = io.id as usize;
        if self.under_way.len() <= id {
            self.under_way.resize_with(id + 1, || None);
        }
        debug_assert!(self.under_way[id].is_none(), "an id that is under way");
        let kind = self.under_way[id].insert(io.kind);
        let fd = types::Fd(self.backing.file().as_raw_fd());
        let entry = match kind {
            IoKind::Read {
                offset,
                skip,
                buffer,
            } => {
                let part = buffer.get_mut(*skip..).unwrap_or_default();
                opcode::Read::new(fd, part.as_mut_ptr(), part.len() as u32)
                    .offset(*offset)
                    .build()
            }
            IoKind::Write {
                offset,
                skip,
                buffer,
            } => {
                let part = buffer.get(*skip..).unwrap_or_default();
                opcode::Write::new(fd, part.as_ptr(), part.len() as u32)
                    .offset(*offset)
                    .build()
            }
            IoKind::Sync(barrier) => {
                opcode::Fsync::new(types::Fd(self.backing.barrier(*barrier).as_raw_fd()))
                    .flags(types::FsyncFlags::DATASYNC)
                    .build()
            }
            // A device has its room from the start.
            IoKind::Allocate { .. } if self.backing.is_device() => opcode::Nop::new().build(),
            IoKind::Allocate { offset, len } => opcode::Fallocate::new(fd, *len)
                .offset(*offset)
                .mode(FALLOC_FL_KEEP_SIZE)
                .build(),
            IoKind::Punch { offset, len } => opcode::Fallocate::new(fd, *len)
                .offset(*offset)
                .mode(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE)
                .build(),
        };
        self.count += 1;
        Started::Entry(entry, io.id.into())
    }

    /// An operation has completed: its id, the result and the buffer for
    /// [`Lane::on_io`](crate::volume::engine::Lane::on_io). `None`: none of that name is under way.
    pub fn finish(&mut self, user_data: u64, result: i32) -> Option<(u32, i32, Option<Buffer>)> {
        let id = u32::try_from(user_data).ok()?;
        let kind = self.under_way.get_mut(id as usize)?.take()?;
        self.count -= 1;
        let result = match kind {
            // A file system without fallocate gives room as it is written.
            IoKind::Allocate { .. } if result == -EOPNOTSUPP => 0,
            _ => result,
        };
        Some((id, result, kind.into_buffer()))
    }

    /// A driver of the same backing with nothing under way.
    pub fn successor(&self) -> Self {
        Self::new(Arc::clone(&self.backing))
    }

    /// Operations under way.
    pub fn count(&self) -> usize {
        self.count
    }
}

/// Whether it is worth a switch to another thread.
fn is_long(kind: &IoKind) -> bool {
    match kind {
        IoKind::Read { skip, buffer, .. } => buffer.len().saturating_sub(*skip) >= LONG_READ,
        IoKind::Write { skip, buffer, .. } => buffer.len().saturating_sub(*skip) > LONG_WRITE,
        _ => false,
    }
}

/// Reads, writes or syncs now: bytes moved or the negated errno. `None`: it is none of these.
fn transfer(file: &File, kind: &mut IoKind) -> Option<i32> {
    let moved = match kind {
        IoKind::Read {
            offset,
            skip,
            buffer,
        } => file.read_at(buffer.get_mut(*skip..).unwrap_or_default(), *offset),
        IoKind::Write {
            offset,
            skip,
            buffer,
        } => file.write_at(buffer.get(*skip..).unwrap_or_default(), *offset),
        IoKind::Sync(_) => file.sync_data().map(|()| 0),
        IoKind::Allocate { .. } | IoKind::Punch { .. } => return None,
    };
    Some(match moved {
        // Buffers are far smaller than i32::MAX.
        Ok(len) => i32::try_from(len).unwrap_or(i32::MAX),
        Err(error) => -error.raw_os_error().unwrap_or(EIO),
    })
}

const EIO: i32 = rustix::io::Errno::IO.raw_os_error();
const EOPNOTSUPP: i32 = rustix::io::Errno::OPNOTSUPP.raw_os_error();

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::backing::Barrier;

    /// A backing of a megabyte in a folder on `place`, if there is such a place.
    fn driver_on(place: &str) -> Option<(tempfile::TempDir, Driver)> {
        let folder = tempfile::tempdir_in(place).ok()?;
        let path = folder.path().join("volume");
        let mut backing = FileBacking::create(&path, false).expect("creates");
        backing.set_len(1 << 20).expect("grows");
        Some((folder, Driver::new(Arc::new(backing))))
    }

    fn read(skip: usize, offset: u64) -> IoKind {
        IoKind::Read {
            offset,
            skip,
            buffer: Buffer::zeroed(2),
        }
    }

    #[test]
    fn a_file_in_memory_is_read_written_and_synced_at_once_but_makes_room_by_io_uring() {
        let Some((_folder, mut driver)) = driver_on("/dev/shm").filter(|(_, d)| d.is_immediate())
        else {
            eprintln!("no tmpfs at /dev/shm: not tested");
            return;
        };
        let mut start = |id, kind| driver.start(Io { id, kind }, true);
        let buffer = Buffer::copy_of(&[7; 8192]);
        let write = IoKind::Write {
            offset: 4096,
            skip: 4096,
            buffer,
        };
        assert!(matches!(start(3, write), Started::Done(3, 4096, Some(_))));
        let Started::Done(4, 8192, Some(buffer)) = start(4, read(0, 0)) else {
            panic!("a read is done at once");
        };
        assert_eq!((buffer[4095], buffer[4096], buffer[8191]), (0, 7, 7));
        // Short at the end, and nothing behind it, as the kernel has it.
        let end = (1 << 20) - 4096;
        assert!(matches!(start(5, read(0, end)), Started::Done(5, 4096, _)));
        let behind = start(5, read(4096, end + 4096));
        assert!(matches!(behind, Started::Done(5, 0, Some(_))));
        let invalid = start(6, read(0, u64::MAX));
        assert!(matches!(invalid, Started::Done(6, ..0, Some(_))));
        assert!(matches!(
            start(7, IoKind::Sync(Barrier::Commit)),
            Started::Done(7, 0, None)
        ));
        let room = IoKind::Allocate {
            offset: 0,
            len: 4096,
        };
        assert!(matches!(start(8, room), Started::Entry(_, 8)));
        assert_eq!(driver.count(), 1);
        assert_eq!(
            driver.finish(8, 0).map(|(id, result, _)| (id, result)),
            Some((8, 0))
        );
    }

    #[test]
    fn in_memory_long_transfers_go_side_by_side_and_a_lone_one_is_done_at_once() {
        let Some((_folder, mut driver)) = driver_on("/dev/shm").filter(|(_, d)| d.is_immediate())
        else {
            eprintln!("no tmpfs at /dev/shm: not tested");
            return;
        };
        let long = || IoKind::Read {
            offset: 0,
            skip: 0,
            buffer: Buffer::zeroed(LONG_READ / 4096),
        };
        let mut start = |id, has_next| {
            let kind = long();
            driver.start(Io { id, kind }, has_next)
        };
        assert!(matches!(start(1, false), Started::Done(1, ..)), "alone");
        assert!(matches!(start(1, true), Started::Entry(_, 1)));
        assert!(matches!(start(2, false), Started::Entry(_, 2)));
        for id in [1, 2] {
            driver.finish(id, 0).expect("is under way");
        }
        let alone = Io {
            id: 1,
            kind: long(),
        };
        assert!(matches!(driver.start(alone, false), Started::Done(1, ..)));
    }
}
