//! Unix sockets with a name in the file system: made with the right permissions from the first
//! moment, replacing what a killed process left, removed in the end.
//!
//! Permissions: Linux gives a socket's file the mode of the socket's inode less the umask
//! (`unix_bind`), so `fchmod` *before* `bind` closes the window in which others could connect,
//! without touching the umask, which belongs to all threads. A `chmod` after it widens the mode
//! to what was asked for where the umask took bits away.
//!
//! Stale files: only connecting tells a live socket from a dead one. Between that test and the
//! removal another starter could do the same; two starters for one path at one moment are a
//! mistake above us (the shim starts each card once), and a lock file next to each socket, or a
//! name longer than the given one, would be the greater nuisance.
//!
//! In the end: removing a file takes the right to write to its folder. A card that became another
//! user has that only where the folder is that user's, and it says so when it had to leave a file
//! behind. Nobody is misled by one: connecting to it is refused at once, a frontend that reconnects
//! tries again, and the next card replaces it, since it binds before it gives root up. Rejected: a
//! process that stays root to clean up, which is what a card gives root up not to have; to remove
//! the name before that, which is where frontends find the card.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};

/// Longest socket path in bytes: `sun_path` has 108 with the terminating zero.
const PATH_MAX: usize = 107;
const BACKLOG: i32 = 16;

/// Why a socket could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The kernel's limit.
    #[error("the socket path {} has {} bytes, but a Unix socket's may have {PATH_MAX} at most; use a shorter directory or a relative path", path.display(), path.as_os_str().len())]
    PathTooLong {
        /// The path.
        path: PathBuf,
    },
    /// An empty path, or one with a zero byte in it.
    #[error("{path:?} cannot be a socket path")]
    BadPath {
        /// The path.
        path: PathBuf,
    },
    /// A process answers there.
    #[error("the socket {} is in use by a running process; stop that or choose another path", path.display())]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// A file of another type has the name. It is left alone.
    #[error("{} exists and is not a socket; move it away or choose another path", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// Anything else, such as a missing directory or no permission.
    #[error("cannot {action} the socket {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// The file of a listening socket. Dropping it removes the file, if it is still ours.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Opened with O_PATH. As long as it is held no other file can get the same inode number.
    file: fs::File,
}

impl SocketFile {
    /// Where it is, as it was given.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let (named, ours) = (fs::symlink_metadata(&self.path), self.file.metadata());
        let same = |named: &fs::Metadata, ours: &fs::Metadata| {
            (named.dev(), named.ino()) == (ours.dev(), ours.ino())
        };
        if matches!((&named, &ours), (Ok(named), Ok(ours)) if same(named, ours)) {
            match fs::remove_file(&self.path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => tracing::warn!(
                    "the socket {} stays behind, and the next card there will replace it ({error}). Give \
                     cards a folder that is theirs (--user), and they remove it themselves",
                    self.path.display()
                ),
                _ => {}
            }
        }
    }
}

/// Listens on `path` with the permissions `mode`. A socket file that nobody answers on is
/// replaced.
///
/// # Errors
/// See [`SocketError`].
pub fn bind_socket(path: &Path, mode: u32) -> Result<(UnixListener, SocketFile), SocketError> {
    let (fd, file) = bind_as(path, mode, SocketType::STREAM)?;
    Ok((fd.into(), file))
}

/// Like [`bind_socket`], with messages instead of a stream (`SOCK_SEQPACKET`); it does not block.
///
/// # Errors
/// See [`SocketError`].
pub fn bind_packet_socket(path: &Path, mode: u32) -> Result<(OwnedFd, SocketFile), SocketError> {
    let (fd, file) = bind_as(path, mode, SocketType::SEQPACKET)?;
    rustix::io::ioctl_fionbio(&fd, true).map_err(|errno| SocketError::Io {
        action: "set up",
        path: path.to_owned(),
        source: errno.into(),
    })?;
    Ok((fd, file))
}

fn bind_as(path: &Path, mode: u32, kind: SocketType) -> Result<(OwnedFd, SocketFile), SocketError> {
    if path.as_os_str().len() > PATH_MAX {
        return Err(SocketError::PathTooLong {
            path: path.to_owned(),
        });
    }
    if path.as_os_str().is_empty() {
        // The kernel would choose an abstract name.
        return Err(SocketError::BadPath {
            path: path.to_owned(),
        });
    }
    let address = SocketAddrUnix::new(path).map_err(|_| SocketError::BadPath {
        path: path.to_owned(),
    })?;
    let failed = |action| {
        move |source: Errno| SocketError::Io {
            action,
            path: path.to_owned(),
            source: source.into(),
        }
    };
    let fd = socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)
        .map_err(failed("make"))?;
    rustix::fs::fchmod(&fd, Mode::from_raw_mode(mode)).map_err(failed("set the permissions of"))?;
    match bind(&fd, &address) {
        Err(Errno::ADDRINUSE) => {
            remove_stale(path, &address)?;
            bind(&fd, &address).map_err(failed("bind"))?;
        }
        result => result.map_err(failed("bind"))?,
    }
    let io_failed = |action| {
        move |source: io::Error| SocketError::Io {
            action,
            path: path.to_owned(),
            source,
        }
    };
    let opened = fs::OpenOptions::new()
        .read(true)
        .custom_flags((OFlags::PATH | OFlags::NOFOLLOW).bits().cast_signed())
        .open(path)
        .map_err(io_failed("look at"))?;
    let file = SocketFile {
        path: path.to_owned(),
        file: opened,
    };
    let meta = file.file.metadata().map_err(io_failed("look at"))?;
    if meta.mode() & 0o777 != mode {
        fs::set_permissions(path, fs::Permissions::from_mode(mode))
            .map_err(io_failed("set the permissions of"))?;
    }
    listen(&fd, BACKLOG).map_err(failed("listen on"))?;
    Ok((fd, file))
}

fn remove_stale(path: &Path, address: &SocketAddrUnix) -> Result<(), SocketError> {
    let failed = |action, source| SocketError::Io {
        action,
        path: path.to_owned(),
        source,
    };
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.file_type().is_socket() => {}
        Ok(_) => {
            return Err(SocketError::NotASocket {
                path: path.to_owned(),
            });
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("look at", error)),
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let probe = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .map_err(|error| failed("probe", error.into()))?;
    match connect(&probe, address) {
        Err(Errno::CONNREFUSED) => match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(failed("remove the stale file of", error))
            }
            _ => Ok(()),
        },
        // Bound by a socket of another type (datagrams, say): alive, whoever it is. A full backlog
        // is alive too.
        Ok(()) | Err(Errno::PROTOTYPE | Errno::AGAIN) => Err(SocketError::InUse {
            path: path.to_owned(),
        }),
        Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(failed("probe", error.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    fn mode_of(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().mode() & 0o777
    }

    #[test]
    fn the_file_has_exactly_the_mode_asked_for_and_goes_away_in_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        for mode in [0o600, 0o660, 0o666] {
            let (_listener, file) = bind_socket(&path, mode).unwrap();
            assert_eq!(mode_of(&path), mode);
            UnixStream::connect(file.path()).unwrap();
            drop(file);
            assert!(!path.exists());
        }
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let (_listener, _file) = bind_socket(&path, 0o600).unwrap();
        assert_eq!(mode_of(&path), 0o600);
        let error = bind_socket(&path, 0o600).unwrap_err();
        assert!(matches!(error, SocketError::InUse { .. }), "{error:?}");
        assert!(error.to_string().contains("in use"), "{error}");
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_socket_of_messages_has_its_mode_and_replaces_a_stale_one_but_no_live_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (listener, file) = bind_packet_socket(&path, 0o600).unwrap();
        assert_eq!(mode_of(&path), 0o600);
        let error = bind_packet_socket(&path, 0o600).unwrap_err();
        assert!(matches!(error, SocketError::InUse { .. }), "{error:?}");
        drop(listener);
        std::mem::forget(file);
        let (listener, _file) = bind_packet_socket(&path, 0o600).unwrap();
        let address = SocketAddrUnix::new(&path).unwrap();
        let kind = SocketType::SEQPACKET;
        let client = socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
        let nobody = rustix::net::accept(&listener).unwrap_err();
        assert_eq!(nobody, Errno::WOULDBLOCK);
        connect(&client, &address).unwrap();
        rustix::net::accept(&listener).unwrap();
    }

    #[test]
    fn a_live_socket_with_a_full_backlog_is_in_use() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (_listener, _file) = bind_socket(&path, 0o600).unwrap();
        let address = SocketAddrUnix::new(&path).unwrap();
        let mut held = Vec::new();
        loop {
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
            if connect(&fd, &address).is_err() {
                break;
            }
            held.push(fd);
        }
        assert!(matches!(
            bind_socket(&path, 0o600),
            Err(SocketError::InUse { .. })
        ));
    }

    #[test]
    fn a_file_that_is_no_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        fs::write(&path, "data").unwrap();
        assert!(matches!(
            bind_socket(&path, 0o600),
            Err(SocketError::NotASocket { .. })
        ));
        assert_eq!(fs::read(&path).unwrap(), b"data");
    }

    #[test]
    fn paths_beyond_the_limit_of_the_kernel_are_refused_and_those_at_it_work() {
        let dir = tempfile::tempdir().unwrap();
        let room = PATH_MAX - dir.path().as_os_str().len() - 1;
        bind_socket(&dir.path().join("x".repeat(room)), 0o600).unwrap();
        let error = bind_socket(&dir.path().join("x".repeat(room + 1)), 0o600).unwrap_err();
        assert!(
            matches!(error, SocketError::PathTooLong { .. }),
            "{error:?}"
        );
        assert!(error.to_string().contains("108 bytes"), "{error}");
    }

    #[test]
    fn empty_paths_zero_bytes_and_missing_directories_are_errors() {
        assert!(matches!(
            bind_socket(Path::new(""), 0o600),
            Err(SocketError::BadPath { .. })
        ));
        assert!(matches!(
            bind_socket(Path::new("a\0b"), 0o600),
            Err(SocketError::BadPath { .. })
        ));
        let error = bind_socket(Path::new("/no/such/directory/s"), 0o600).unwrap_err();
        assert!(matches!(error, SocketError::Io { .. }), "{error:?}");
    }

    #[test]
    fn a_socket_that_a_successor_put_in_place_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (first, first_file) = bind_socket(&path, 0o600).unwrap();
        drop(first);
        let (_second, _second_file) = bind_socket(&path, 0o600).unwrap();
        drop(first_file);
        UnixStream::connect(&path).unwrap();
    }
}
