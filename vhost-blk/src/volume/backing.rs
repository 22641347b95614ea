//! What a volume is stored in: a regular file or a block device, opened for direct I/O.
//!
//! The running card moves data with io_uring on [`FileBacking::file`]; opening, recovery and the
//! command-line tools use the blocking calls of [`Backing`], which the crash tests implement
//! with a simulated disk.
//!
//! The lock is `flock` on the same open file description that all I/O goes through. The kernel
//! keeps that description as long as a request on it is under way, also when the process is
//! already killed: so the lock is free only when nothing of a dead process can land any more.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, FlockOperation, Mode, OFlags};
use thiserror::Error;

use super::geometry::{BLOCK_LEN, Slot};
use super::read_many::{Each, in_order, in_parallel};
use super::write_many::{Make, write_in_parallel};

/// Blocking access to a backing. Offsets, lengths and buffers are multiples of 4 KiB, buffers
/// aligned to it.
pub trait Backing: Send + Sync {
    /// Reads all of `into`.
    ///
    /// # Errors
    /// The backing fails or ends before.
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;
    /// Reads many slots, each 4 KiB. `each` is told every one of them once, by its index in
    /// `slots`, in any order; what it is given it may change.
    fn read_many(&self, slots: &[Slot], each: Each<'_>) {
        in_order(slots, &|offset, into| self.read_at(offset, into), each);
    }
    /// Writes all of `from`. Not durable before [`Backing::sync`].
    ///
    /// # Errors
    /// The backing fails.
    fn write_at(&self, offset: u64, from: &[u8]) -> io::Result<()>;
    /// Writes all that `make` gives, in any order. When this returns all of it has completed.
    ///
    /// # Errors
    /// One of the writes failed; what became of the others is not told.
    fn write_many(&self, make: Make<'_>) -> io::Result<()> {
        let mut outcome = Ok(());
        make(&mut |offset, buffer| {
            if outcome.is_ok() {
                outcome = self.write_at(offset, &buffer);
            }
        });
        outcome
    }
    /// Makes completed writes durable.
    ///
    /// # Errors
    /// The backing fails; whether earlier writes are durable is then unknown, for good.
    fn sync(&self) -> io::Result<()>;
    /// Makes sure that writes to the range will find room.
    ///
    /// # Errors
    /// There is none.
    fn allocate(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Gives the room of a range back; it reads as anything afterwards.
    ///
    /// # Errors
    /// The backing cannot do that.
    fn punch(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Makes it at least `len` bytes long where that can be done; a device has the length that
    /// somebody else gave it. Not durable before [`Backing::sync`]. Returns the length that it has now.
    ///
    /// # Errors
    /// It cannot be lengthened.
    fn extend(&self, len: u64) -> io::Result<u64>;
    /// Bytes that it has.
    fn len(&self) -> u64;
    /// Whether it has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Why a backing cannot be opened.
#[derive(Debug, Error)]
pub enum OpenError {
    /// The system said no.
    #[error("cannot open {}: {source}", path.display())]
    Open {
        /// Which.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// Neither a regular file nor a block device.
    #[error("{} is neither a regular file nor a block device", .0.display())]
    Kind(PathBuf),
    /// Somebody else has it.
    #[error(
        "{} is in use by another process (a running card, check or export); stop it first", .0.display()
    )]
    InUse(PathBuf),
    /// A device that takes no writes.
    #[error(
        "{} is a read-only device (`blockdev --getro`); make it writable, or serve with --read-only", .0.display()
    )]
    ReadOnlyDevice(PathBuf),
    /// A device that the kernel uses.
    #[error("{} is mounted or otherwise in use by the kernel; unmount it first", .0.display())]
    Mounted(PathBuf),
    /// Something is there that an ephemeral volume must not take.
    #[error(
        "{} is there already, and an ephemeral volume makes its own file: name a folder, or a device that is \
         blank (blkdiscard or wipefs makes it so)", .0.display()
    )]
    NotForEphemeral(PathBuf),
    /// The file is there and was not to be overwritten.
    #[error("{} is there already; give --force to overwrite it and lose what it holds", .0.display())]
    Exists(PathBuf),
}

/// Room that is there, and how much of it is free, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Free.
    pub free: u64,
    /// All.
    pub total: u64,
}

impl Room {
    /// How full it is, rounded down.
    pub fn percent_used(self) -> u64 {
        let used = u128::from(self.total.saturating_sub(self.free));
        match u128::from(self.total) {
            0 => 100,
            total => (used * 100 / total) as u64,
        }
    }
}

/// Whose barrier it is. There is at most one of each under way, but one of each there may be. A kernel that
/// has to report a failed writeback reports it once for each open file (`errseq_t`): were both on the
/// same one, one of them would be told, and the other acknowledge what is lost. So each kind has an
/// open file of its own, and is told whatever the other is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Barrier {
    /// A commit's.
    Commit,
    /// A checkpoint's.
    Checkpoint,
}

/// How a backing is to be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Shared with other readers.
    Read,
    /// Alone.
    Write,
}

/// A file or device.
#[derive(Debug)]
pub struct FileBacking {
    file: File,
    /// The same file, opened once more: see [`Barrier`].
    again: Option<File>,
    len: AtomicU64,
    is_device: bool,
    is_direct: bool,
    is_memory: bool,
}

/// `f_type` of file systems whose files are memory (statfs(2)).
const TMPFS_MAGIC: i64 = 0x0102_1994;
const RAMFS_MAGIC: i64 = 0x8584_58f6;

/// How long a lock is waited for: the last requests of a process that was just killed are still
/// landing.
const LOCK_PATIENCE: Duration = Duration::from_secs(3);

impl FileBacking {
    /// Opens and locks an existing backing.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(path: &Path, access: Access) -> Result<Self, OpenError> {
        let flags = match access {
            Access::Read => OFlags::RDONLY,
            Access::Write => OFlags::RDWR,
        };
        Self::open_with(path, flags, access)
    }

    /// Opens a backing for a new volume, making a regular file if nothing is there.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn create(path: &Path, may_overwrite: bool) -> Result<Self, OpenError> {
        let create = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL;
        match Self::open_with(path, create, Access::Write) {
            Err(OpenError::Open { source, .. })
                if source.kind() == io::ErrorKind::AlreadyExists => {}
            other => return other,
        }
        let is_device = std::fs::metadata(path).is_ok_and(|m| m.file_type().is_block_device());
        // Exclusive: the kernel refuses a device that it has mounted (open(2), O_EXCL).
        let flags = if is_device {
            OFlags::RDWR | OFlags::EXCL
        } else {
            OFlags::RDWR
        };
        let backing = match Self::open_with(path, flags, Access::Write) {
            Err(OpenError::Open { path, source })
                if source.kind() == io::ErrorKind::ResourceBusy =>
            {
                return Err(OpenError::Mounted(path));
            }
            other => other?,
        };
        let is_blank = backing.is_device && {
            let mut first = super::buffer::Buffer::zeroed(1);
            backing
                .read_at(0, &mut first)
                .map_err(|source| OpenError::Open {
                    path: path.into(),
                    source,
                })?;
            first.iter().all(|byte| *byte == 0)
        };
        if may_overwrite || is_blank || (!backing.is_device && backing.is_empty()) {
            Ok(backing)
        } else {
            Err(OpenError::Exists(path.into()))
        }
    }

    /// Opens a backing for a volume that nobody will ever open again. At a folder, or at a name that is
    /// not taken, that is a file without a name, whose room goes back to its file system when this
    /// process ends, however it ends.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn ephemeral(path: &Path) -> Result<Self, OpenError> {
        let failed = |source: io::Error| OpenError::Open {
            path: path.into(),
            source,
        };
        let folder = match std::fs::metadata(path) {
            Ok(meta) if meta.file_type().is_block_device() => return Self::left_over(path),
            Ok(meta) if meta.is_dir() => path,
            Ok(_) => return Err(OpenError::NotForEphemeral(path.into())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => match path.parent() {
                Some(folder) if !folder.as_os_str().is_empty() => folder,
                _ => Path::new("."),
            },
            Err(error) => return Err(failed(error)),
        };
        match Self::open_with(folder, OFlags::RDWR | OFlags::TMPFILE, Access::Write) {
            // A file system that cannot make files without names.
            Err(OpenError::Open { source, .. })
                if source.kind() == io::ErrorKind::Unsupported
                    || source.kind() == io::ErrorKind::IsADirectory => {}
            other => return other,
        }
        let named = tempfile::Builder::new()
            .prefix(".vhost-blk-ephemeral-")
            .tempfile_in(folder)
            .map_err(failed)?;
        // Its name goes with `named`.
        Self::open_with(named.path(), OFlags::RDWR, Access::Write)
    }

    /// A device that is blank, or holds what nobody can open any more.
    fn left_over(path: &Path) -> Result<Self, OpenError> {
        match Self::create(path, false) {
            Err(OpenError::Exists(_)) => {}
            other => return other,
        }
        let backing = Self::create(path, true)?;
        let mut first = super::buffer::Buffer::zeroed(1);
        backing
            .read_at(0, &mut first)
            .map_err(|source| OpenError::Open {
                path: path.into(),
                source,
            })?;
        match super::superblock::Superblock::peek(&first) {
            Ok((_, slots)) if slots.iter().flatten().all(|byte| *byte == 0) => Ok(backing),
            _ => Err(OpenError::NotForEphemeral(path.into())),
        }
    }

    /// Takes what was stored away, as well as the backing can: its headers, then all of it. Files
    /// without a name need none of this.
    ///
    /// # Errors
    /// The headers could not be overwritten.
    pub fn wipe(&self) -> io::Result<()> {
        let blank = super::buffer::Buffer::zeroed(1);
        for offset in super::superblock::COPIES {
            self.write_at(offset, &blank)?;
        }
        self.sync()?;
        if let Err(error) = self.punch(0, self.len()) {
            tracing::debug!(%error, "the backing keeps what was written: nobody has the key");
        }
        Ok(())
    }

    fn open_with(path: &Path, flags: OFlags, access: Access) -> Result<Self, OpenError> {
        let failed = |source: io::Error| OpenError::Open {
            path: path.into(),
            source,
        };
        // Type first: opening a FIFO would wait for its other end.
        if let Ok(meta) = std::fs::metadata(path) {
            let kind = meta.file_type();
            let is_folder = kind.is_dir() && flags.contains(OFlags::TMPFILE);
            if !kind.is_file() && !kind.is_block_device() && !is_folder {
                return Err(OpenError::Kind(path.into()));
            }
        }
        let flags = flags | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        let (fd, is_direct) = match rustix::fs::open(path, flags | OFlags::DIRECT, mode) {
            Ok(fd) => (fd, true),
            // tmpfs before Linux 6.6 has no direct I/O; it has no disk below either.
            Err(rustix::io::Errno::INVAL) => {
                let flags = flags.difference(OFlags::EXCL);
                (
                    rustix::fs::open(path, flags, mode).map_err(|e| failed(e.into()))?,
                    false,
                )
            }
            Err(errno) => return Err(failed(errno.into())),
        };
        let file = File::from(fd);
        lock(&file, path, access)?;
        let meta = file.metadata().map_err(failed)?;
        let is_device = meta.file_type().is_block_device();
        // The kernel opens such a device for writing, and refuses the writes.
        if is_device && access == Access::Write && is_read_only(meta.rdev()) {
            return Err(OpenError::ReadOnlyDevice(path.into()));
        }
        let len = if is_device {
            // A device's metadata have no length; its end has.
            (&file).seek(SeekFrom::End(0)).map_err(failed)?
        } else {
            meta.len()
        };
        let is_memory = !is_device
            && rustix::fs::fstatfs(&file)
                .is_ok_and(|fs| matches!(fs.f_type, TMPFS_MAGIC | RAMFS_MAGIC));
        let again = match access {
            Access::Read => None,
            Access::Write => open_again(&file, is_direct),
        };
        Ok(Self {
            file,
            again,
            len: AtomicU64::new(len),
            is_device,
            is_direct,
            is_memory,
        })
    }

    /// Makes a regular file `len` bytes long, all holes; a device stays as it is.
    ///
    /// # Errors
    /// The file system refuses; what the file held is then still there.
    pub fn set_len(&mut self, len: u64) -> io::Result<()> {
        if !self.is_device {
            // The length that may be refused comes first.
            if len > self.len() {
                self.file.set_len(len)?;
            }
            self.file.set_len(0)?;
            self.file.set_len(len)?;
            *self.len.get_mut() = len;
        }
        Ok(())
    }

    /// Whether its size is given by a device.
    pub const fn is_device(&self) -> bool {
        self.is_device
    }

    /// Whether I/O goes around the page cache.
    pub const fn is_direct(&self) -> bool {
        self.is_direct
    }

    /// Whether it is a file of tmpfs or ramfs: then a transfer is a copy between two places of memory.
    pub const fn is_memory(&self) -> bool {
        self.is_memory
    }

    /// For I/O by io_uring. Its open file description carries the lock.
    pub const fn file(&self) -> &File {
        &self.file
    }

    /// For a barrier by io_uring: commits and checkpoints each have an open file of their own. Which of
    /// them carries the lock does not matter to a barrier: one of a dead process changes nothing.
    pub fn barrier(&self, whose: Barrier) -> &File {
        match (whose, &self.again) {
            (Barrier::Checkpoint, Some(again)) => again,
            _ => &self.file,
        }
    }

    /// Room in the file system that a file is on, for those who are not root; a device has all of
    /// itself.
    ///
    /// # Errors
    /// The system says no.
    pub fn room(&self) -> io::Result<Room> {
        if self.is_device {
            let total = self.len();
            return Ok(Room { free: total, total });
        }
        let found = rustix::fs::fstatvfs(&self.file)?;
        let bytes = |blocks: u64| blocks.saturating_mul(found.f_frsize);
        let used = found.f_blocks.saturating_sub(found.f_bfree);
        Ok(Room {
            free: bytes(found.f_bavail),
            total: bytes(used.saturating_add(found.f_bavail)),
        })
    }

    /// Bytes of the file system that it takes; a device takes all of itself.
    ///
    /// # Errors
    /// The system says no.
    pub fn allocated(&self) -> io::Result<u64> {
        use std::os::unix::fs::MetadataExt;
        Ok(if self.is_device {
            self.len()
        } else {
            self.file.metadata()?.blocks() * 512
        })
    }
}

/// Another open file of the same file, whatever its name leads to by now. `None`: there is no /proc.
fn open_again(file: &File, is_direct: bool) -> Option<File> {
    let mut flags = OFlags::RDWR | OFlags::CLOEXEC;
    flags.set(OFlags::DIRECT, is_direct);
    let own = format!("/proc/self/fd/{}", file.as_raw_fd());
    match rustix::fs::open(own, flags, Mode::empty()) {
        Ok(fd) => Some(File::from(fd)),
        Err(error) => {
            tracing::debug!(%error, "commits and checkpoints share an open file");
            None
        }
    }
}

/// Whether the kernel lets nobody write to a device.
fn is_read_only(device: u64) -> bool {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    // Without sysfs the first write tells.
    std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/ro"))
        .is_ok_and(|flag| flag.trim() == "1")
}

fn lock(file: &File, path: &Path, access: Access) -> Result<(), OpenError> {
    let operation = match access {
        Access::Read => FlockOperation::NonBlockingLockShared,
        Access::Write => FlockOperation::NonBlockingLockExclusive,
    };
    let deadline = Instant::now() + LOCK_PATIENCE;
    let mut patience = Duration::from_millis(1);
    loop {
        match rustix::fs::flock(file, operation) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < deadline => {
                std::thread::sleep(patience);
                patience = (patience * 2).min(Duration::from_millis(100));
            }
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(OpenError::InUse(path.into())),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => {
                return Err(OpenError::Open {
                    path: path.into(),
                    source: errno.into(),
                });
            }
        }
    }
}

impl Backing for FileBacking {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        debug_assert!(into.len().is_multiple_of(BLOCK_LEN));
        self.file.read_exact_at(into, offset)
    }

    fn read_many(&self, slots: &[Slot], each: Each<'_>) {
        in_parallel(&self.file, slots, each);
    }

    fn write_at(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        debug_assert!(from.len().is_multiple_of(BLOCK_LEN));
        self.file.write_all_at(from, offset)
    }

    fn write_many(&self, make: Make<'_>) -> io::Result<()> {
        write_in_parallel(&self.file, make)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.is_device {
            return Ok(());
        }
        match rustix::fs::fallocate(&self.file, FallocateFlags::KEEP_SIZE, offset, len) {
            // A file system without fallocate gives room as it is written.
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(&self.file, flags, offset, len)?)
    }

    fn extend(&self, len: u64) -> io::Result<u64> {
        let now = if self.is_device {
            // The position is nobody's: all I/O names its own.
            (&self.file).seek(SeekFrom::End(0))?
        } else {
            let now = self.file.metadata()?.len();
            if now < len {
                self.file.set_len(len)?;
            }
            now.max(len)
        };
        self.len.store(now, Ordering::Relaxed);
        Ok(now)
    }

    fn len(&self) -> u64 {
        // Relaxed: it only grows, and whoever needs the new length is told by the engine's lock.
        self.len.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lock_lives_as_long_as_the_open_file_that_io_goes_through() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("volume");
        let mut backing = FileBacking::create(&path, false).expect("creates");
        backing.set_len(1 << 20).expect("grows");
        for access in [Access::Write, Access::Read] {
            let second = FileBacking::open(&path, access);
            assert!(matches!(second, Err(OpenError::InUse(_))), "{second:?}");
        }
        // What a request of a dead process holds: the open file, not the process's descriptor.
        let under_way = backing.file().try_clone().expect("duplicates");
        drop(backing);
        let second = FileBacking::open(&path, Access::Write);
        assert!(matches!(second, Err(OpenError::InUse(_))), "{second:?}");
        drop(under_way);
        let first = FileBacking::open(&path, Access::Read).expect("opens");
        let second = FileBacking::open(&path, Access::Read).expect("readers share");
        assert_eq!(first.len(), second.len());
        let writer = FileBacking::open(&path, Access::Write);
        assert!(matches!(writer, Err(OpenError::InUse(_))), "{writer:?}");
    }
}
