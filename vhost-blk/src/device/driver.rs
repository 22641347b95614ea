//! What the engine wants done to the backing, as io_uring operations.
//!
//! An operation's buffer is the kernel's until its completion: it is kept here, not in the engine,
//! and handed back with the result.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use io_uring::{opcode, squeue, types};

use crate::volume::backing::FileBacking;
use crate::volume::buffer::Buffer;
use crate::volume::engine::{Io, IoKind};

const FALLOC_FL_KEEP_SIZE: i32 = 1;
const FALLOC_FL_PUNCH_HOLE: i32 = 2;

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

    /// Takes an operation over. The entry, and what its `user_data` has to be.
    ///
    /// The entry points into a buffer that this driver owns until [`Driver::finish`], and at a
    /// descriptor that is open as long as the driver lives: whoever submits it must finish it, or
    /// see that the driver is never dropped.
    pub fn start(&mut self, io: Io) -> (squeue::Entry, u64) {
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
            IoKind::Sync => opcode::Fsync::new(fd)
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
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
        (entry, io.id.into())
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

const EOPNOTSUPP: i32 = rustix::io::Errno::OPNOTSUPP.raw_os_error();
