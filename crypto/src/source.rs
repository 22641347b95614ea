//! Key files and passphrase files.
//!
//! Checked on the open file, not on its name, so that nothing changes between the check and the read: it is a
//! regular file (a FIFO or device is refused without waiting for it), it belongs to us or to root, and
//! nobody else can read it. Symbolic links are followed: what counts is the file they lead to.
//! At most 4096 bytes are read.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, fstat, open};
use zeroize::Zeroizing;

use crate::keys::{KEY_LEN, Secret32};

/// Longest key or passphrase file in bytes.
pub const MAX_FILE_LEN: usize = 4096;

/// Where the user keeps what unlocks a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeySource {
    /// A file of 32 raw bytes or 64 hex digits.
    File(PathBuf),
    /// A file whose first line is a passphrase.
    Passphrase(PathBuf),
}

/// What unlocks a volume. Never printed, wiped on drop.
pub enum KeyMaterial {
    /// A key from a key file.
    File(Secret32),
    /// A passphrase, in bytes.
    Passphrase(Zeroizing<Vec<u8>>),
}

// By hand, as `Zeroizing` prints what it holds.
impl fmt::Debug for KeyMaterial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::File(_) => "File([REDACTED])",
            Self::Passphrase(_) => "Passphrase([REDACTED])",
        })
    }
}

/// Why a key or passphrase file was refused.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The file cannot be opened or read.
    #[error("cannot read {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A directory, FIFO, socket or device.
    #[error("{} is not a regular file; give a file that holds the key", .0.display())]
    NotAFile(PathBuf),
    /// Group or others have some permission on it.
    #[error(
        "{} can be accessed by others (mode {mode:03o}); run: chmod 600 {}",
        path.display(), path.display()
    )]
    TooOpen {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// It belongs to a user who is neither us nor root.
    #[error(
        "{} belongs to user {owner}, who is neither this user nor root; run: chown {us} {}",
        path.display(), path.display()
    )]
    WrongOwner {
        /// The file.
        path: PathBuf,
        /// Its owner's user id.
        owner: u32,
        /// Our effective user id.
        us: u32,
    },
    /// Neither 32 bytes nor 64 hex digits.
    #[error(
        "{} does not hold a key: it must be 32 raw bytes or 64 hex digits \
         (make one with: head -c 32 /dev/urandom > FILE)",
        .0.display()
    )]
    NotAKey(PathBuf),
    /// The first line is empty.
    #[error("{} has an empty first line; the passphrase goes there", .0.display())]
    NoPassphrase(PathBuf),
    /// Longer than [`MAX_FILE_LEN`].
    #[error("{} is longer than {MAX_FILE_LEN} bytes; this is not a key or passphrase file", .0.display())]
    TooLong(PathBuf),
}

impl KeySource {
    /// Reads and checks the file.
    ///
    /// # Errors
    ///
    /// [`SourceError`], which says what to do about it. No error shows a byte of the file.
    pub fn load(&self) -> Result<KeyMaterial, SourceError> {
        match self {
            Self::File(path) => {
                let bytes = read_private(path)?;
                parse_key(&bytes)
                    .map(KeyMaterial::File)
                    .ok_or_else(|| SourceError::NotAKey(path.clone()))
            }
            Self::Passphrase(path) => {
                let bytes = read_private(path)?;
                let line = first_line(&bytes);
                if line.is_empty() {
                    return Err(SourceError::NoPassphrase(path.clone()));
                }
                Ok(KeyMaterial::Passphrase(Zeroizing::new(line.to_vec())))
            }
        }
    }
}

/// The whole file, if it is a private regular file of bearable length.
fn read_private(path: &Path) -> Result<Zeroizing<Vec<u8>>, SourceError> {
    let io = |source: io::Error| SourceError::Io {
        path: path.to_owned(),
        source,
    };
    // NONBLOCK: opening a FIFO nobody writes to must not wait. NOCTTY: a terminal must not become ours.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let fd = match open(path, flags, Mode::empty()) {
        Ok(fd) => fd,
        // What opening a socket gives.
        Err(rustix::io::Errno::NXIO) => return Err(SourceError::NotAFile(path.to_owned())),
        Err(errno) => return Err(io(errno.into())),
    };
    let stat = fstat(&fd).map_err(|errno| io(errno.into()))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(SourceError::NotAFile(path.to_owned()));
    }
    check_private(
        path,
        stat.st_uid,
        stat.st_mode,
        rustix::process::geteuid().as_raw(),
    )?;

    // Reserved at once: growing would leave copies in freed memory.
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_FILE_LEN + 1));
    let mut limited = File::from(fd).take(MAX_FILE_LEN as u64 + 1);
    let mut chunk = Zeroizing::new([0u8; 512]);
    loop {
        match limited.read(&mut chunk[..]) {
            Ok(0) => break,
            Ok(n) => bytes.extend_from_slice(chunk.get(..n).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(io(error)),
        }
    }
    if bytes.len() > MAX_FILE_LEN {
        return Err(SourceError::TooLong(path.to_owned()));
    }
    Ok(bytes)
}

/// Refuses a file of somebody else, or one that others can get at. With an access control list the group bits
/// show its mask, so that this covers lists as well.
fn check_private(path: &Path, owner: u32, mode: u32, us: u32) -> Result<(), SourceError> {
    if mode & 0o077 != 0 {
        return Err(SourceError::TooOpen {
            path: path.to_owned(),
            mode: mode & 0o7777,
        });
    }
    if owner != us && owner != 0 {
        return Err(SourceError::WrongOwner {
            path: path.to_owned(),
            owner,
            us,
        });
    }
    Ok(())
}

/// A key file's content: 32 raw bytes, or 64 hex digits and perhaps a newline.
fn parse_key(bytes: &[u8]) -> Option<Secret32> {
    if let Ok(raw) = <&[u8; KEY_LEN]>::try_from(bytes) {
        return Secret32::try_fill(|key| {
            key.copy_from_slice(raw);
            Ok::<_, std::convert::Infallible>(())
        })
        .ok();
    }
    let digits: &[u8; 2 * KEY_LEN] = strip_newline(bytes).try_into().ok()?;
    Secret32::try_fill(|key| {
        for (byte, pair) in key.iter_mut().zip(digits.as_chunks::<2>().0) {
            let [high, low] = pair.map(hex_digit);
            *byte = high.ok_or(())? << 4 | low.ok_or(())?;
        }
        Ok::<_, ()>(())
    })
    .ok()
}

fn hex_digit(digit: u8) -> Option<u8> {
    char::from(digit)
        .to_digit(16)
        .and_then(|value| u8::try_from(value).ok())
}

fn first_line(bytes: &[u8]) -> &[u8] {
    let end = bytes.iter().position(|byte| *byte == b'\n');
    let line = end.and_then(|end| bytes.get(..end)).unwrap_or(bytes);
    line.strip_suffix(b"\r").unwrap_or(line)
}

fn strip_newline(bytes: &[u8]) -> &[u8] {
    let line = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    line.strip_suffix(b"\r").unwrap_or(line)
}

#[cfg(test)]
mod tests;
