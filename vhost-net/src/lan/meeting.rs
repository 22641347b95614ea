//! Where cards of one network find each other: a directory, a socket for each card in it.
//!
//! A card's socket is called after its guest's hardware address, as twelve digits. Of two cards the
//! one with the higher address connects to the other, so that there is one connection between them;
//! a card looks into the directory when the kernel says that something in it has changed (inotify),
//! and now and then besides.
//!
//! Everything that needs a path opened is opened here, before the sandbox: afterwards the card reads
//! the open directory and the watch on it, and connects to sockets by name, which needs search
//! permission and no more. Who is let in: root and the card's own user (SO_PEERCRED), as everywhere;
//! sockets have the mode 0600, and a directory that others could write to is refused.

use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, chown};
use std::path::{Path, PathBuf};

use offload::cli::{SocketError, SocketFile, bind_packet_socket};
use offload::sandbox::User;
use rustix::fs::{Mode, OFlags, RawDir, SeekFrom, inotify};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};
use smoltcp::wire::EthernetAddress;

/// Names looked at in the directory.
const NAMES_MAX: usize = 1024;
/// What the kernel may hold for a peer. It gives what `net.core.wmem_max` allows.
const SEND_BUFFER: usize = 1 << 20;

/// A card on the network, by its guest's hardware address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id([u8; 6]);

impl Id {
    /// Of a guest.
    #[must_use]
    pub fn new(mac: EthernetAddress) -> Self {
        Self(mac.0)
    }

    /// The guest's hardware address.
    #[must_use]
    pub fn mac(self) -> EthernetAddress {
        EthernetAddress(self.0)
    }

    fn from_name(name: &[u8]) -> Option<Self> {
        let digits: &[u8; 12] = name.try_into().ok()?;
        let mut id = [0; 6];
        for (byte, [high, low]) in id.iter_mut().zip(digits.as_chunks::<2>().0) {
            let digit = |digit: u8| match digit {
                b'0'..=b'9' => Some(digit - b'0'),
                b'a'..=b'f' => Some(digit - b'a' + 10),
                _ => None,
            };
            *byte = digit(*high)? << 4 | digit(*low)?;
        }
        Some(Self(id))
    }
}

impl std::fmt::Display for Id {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Why a card cannot be on a network.
#[derive(Debug, thiserror::Error)]
pub enum MeetingError {
    /// The directory cannot be made or opened.
    #[error("cannot {action} the network's directory {}", path.display())]
    Directory {
        /// What was tried.
        action: &'static str,
        /// The directory.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Somebody else could put cards there.
    #[error("the network's directory {} {problem}; choose another, or let the card make it", path.display())]
    NotOurs {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Another card has the hardware address.
    #[error(
        "a card with the hardware address {mac} is on the network {} already; give each guest its own --mac and --ipv4",
        path.display()
    )]
    Taken {
        /// The hardware address.
        mac: EthernetAddress,
        /// The directory.
        path: PathBuf,
    },
    /// The card's own socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
}

/// See the module.
#[derive(Debug)]
pub struct Meeting {
    id: Id,
    path: PathBuf,
    directory: OwnedFd,
    /// `None`: the kernel has no more of them for this user.
    watch: Option<OwnedFd>,
    listener: OwnedFd,
    _file: SocketFile,
}

impl Meeting {
    /// Goes to a network. The directory is made if it is missing, and belongs to `user` then.
    ///
    /// # Errors
    /// See [`MeetingError`].
    pub fn open(path: &Path, id: Id, user: Option<User>) -> Result<Self, MeetingError> {
        let failed = |action| {
            let path = path.to_owned();
            move |source| MeetingError::Directory {
                action,
                path,
                source,
            }
        };
        let own = |path: &Path| match user {
            Some(user) => chown(path, Some(user.uid), Some(user.gid)),
            None => Ok(()),
        };
        // Whoever passes may pass through those above it.
        if let Some(parent) = path.parent().filter(|it| !it.as_os_str().is_empty()) {
            fs::create_dir_all(parent).map_err(failed("make what is above"))?;
        }
        match fs::DirBuilder::new().mode(0o700).create(path) {
            Ok(()) => own(path).map_err(failed("give away"))?,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(failed("make")(error)),
        }
        let meta = fs::metadata(path).map_err(failed("look at"))?;
        let is_owner = |uid| meta.uid() == uid;
        let problem = if !meta.is_dir() {
            Some("is not a directory")
        } else if meta.mode() & 0o022 != 0 {
            Some("can be written to by others")
        } else if !is_owner(0) && !is_owner(own_uid()) && !user.is_some_and(|u| is_owner(u.uid)) {
            Some("belongs to somebody else")
        } else {
            None
        };
        if let Some(problem) = problem {
            let path = path.to_owned();
            return Err(MeetingError::NotOurs { path, problem });
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(path, flags, Mode::empty())
            .map_err(|errno| failed("open")(errno.into()))?;
        // Before the own socket is there: nobody who comes afterwards is missed.
        let watch = watch(path)
            .inspect_err(|error| {
                tracing::warn!(%error, "no watch on the network's directory: it is looked at again and again");
            })
            .ok();
        let socket = path.join(id.to_string());
        let (listener, file) = match bind_packet_socket(&socket, 0o600) {
            Err(SocketError::InUse { .. }) => {
                return Err(MeetingError::Taken {
                    mac: id.mac(),
                    path: path.to_owned(),
                });
            }
            bound => bound?,
        };
        own(&socket).map_err(failed("give away a socket in"))?;
        Ok(Self {
            id,
            path: path.to_owned(),
            directory,
            watch,
            listener,
            _file: file,
        })
    }

    /// The own card.
    #[must_use]
    pub fn id(&self) -> Id {
        self.id
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Readable when [`Self::accept`] has somebody.
    #[must_use]
    pub fn listener(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// Readable when [`Self::has_changed`]. `None`: nobody will say.
    #[must_use]
    pub fn watch(&self) -> Option<BorrowedFd<'_>> {
        self.watch.as_ref().map(AsFd::as_fd)
    }

    /// Whether the directory has changed since the last time, as far as the kernel says.
    #[must_use]
    pub fn has_changed(&self) -> bool {
        let Some(watch) = &self.watch else {
            return false;
        };
        let mut buffer = [0; 4096];
        let mut has_changed = false;
        // What changes is looked up in the directory, so nobody reads the events. Bounded: what is
        // left makes the descriptor readable again.
        for _ in 0..16 {
            match rustix::io::read(watch, &mut buffer) {
                Ok(1..) => has_changed = true,
                _ => break,
            }
        }
        has_changed
    }

    /// The other cards whose sockets are there; of some of them nothing may be left but that.
    ///
    /// # Errors
    /// The kernel's.
    pub fn present(&self) -> io::Result<Vec<Id>> {
        rustix::fs::seek(&self.directory, SeekFrom::Start(0))?;
        let mut buffer = [const { MaybeUninit::<u8>::uninit() }; 4096];
        let mut entries = RawDir::new(&self.directory, &mut buffer);
        let mut ids = Vec::new();
        let mut seen = 0;
        while let Some(entry) = entries.next() {
            let entry = entry?;
            ids.extend(Id::from_name(entry.file_name().to_bytes()).filter(|id| *id != self.id));
            seen += 1;
            if seen == NAMES_MAX {
                break;
            }
        }
        Ok(ids)
    }

    /// Takes somebody who has come. `Ok(None)`: nobody, or a stranger, who is counted in `strangers`.
    ///
    /// # Errors
    /// The kernel's; `WouldBlock`: nobody is there.
    pub fn accept(&self) -> io::Result<Option<OwnedFd>> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let fd = rustix::net::accept_with(&self.listener, flags)?;
        admit(fd)
    }

    /// Connects to a card. `Ok(None)`: a stranger listens there.
    ///
    /// # Errors
    /// The kernel's.
    pub fn connect(&self, id: Id) -> io::Result<Option<OwnedFd>> {
        let address = SocketAddrUnix::new(self.path.join(id.to_string()))?;
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let kind = SocketType::SEQPACKET;
        let fd = rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None)?;
        rustix::net::connect(&fd, &address)?;
        admit(fd)
    }
}

/// Lets root and the own user in.
fn admit(fd: OwnedFd) -> io::Result<Option<OwnedFd>> {
    let uid = sockopt::socket_peercred(&fd)?.uid.as_raw();
    if uid != 0 && uid != own_uid() {
        return Ok(None);
    }
    let _ = sockopt::set_socket_send_buffer_size(&fd, SEND_BUFFER);
    Ok(Some(fd))
}

fn own_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

fn watch(path: &Path) -> Result<OwnedFd, Errno> {
    use inotify::{CreateFlags, WatchFlags};
    let fd = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
    let changes = WatchFlags::CREATE | WatchFlags::DELETE | WatchFlags::MOVED_TO;
    inotify::add_watch(&fd, path, changes | WatchFlags::ONLYDIR)?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn id(last: u8) -> Id {
        Id::new(EthernetAddress([0x52, 0x54, 0, 0, 0, last]))
    }

    #[test]
    fn cards_see_who_else_is_there_and_meet() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("network");
        let first = Meeting::open(&path, id(1), None).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
        assert!(first.has_changed(), "the own socket came");
        fs::write(path.join("README"), "not a card").unwrap();
        let second = Meeting::open(&path, id(0xab), None).unwrap();
        assert!(first.has_changed() && !first.has_changed());
        assert_eq!(first.present().unwrap(), [id(0xab)]);
        assert_eq!(first.present().unwrap(), [id(0xab)], "and again");
        assert_eq!(second.present().unwrap(), [id(1)]);
        let error = first.accept().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        let ours = second.connect(id(1)).unwrap().unwrap();
        let theirs = first.accept().unwrap().unwrap();
        rustix::io::write(&ours, b"one").unwrap();
        rustix::io::write(&ours, b"message").unwrap();
        let mut buffer = [0; 64];
        assert_eq!(rustix::io::read(&theirs, &mut buffer).unwrap(), 3);
        drop(first);
        assert!(second.has_changed());
        assert_eq!(second.present().unwrap(), []);
        assert!(second.connect(id(1)).is_err());
    }

    #[test]
    fn a_hardware_address_is_on_a_network_once_and_the_error_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("network");
        let _first = Meeting::open(&path, id(1), None).unwrap();
        let error = Meeting::open(&path, id(1), None).unwrap_err().to_string();
        assert!(error.contains("52-54-00-00-00-01") || error.contains("52:54:00:00:00:01"));
        assert!(error.contains("--mac"), "{error}");
    }

    #[test]
    fn a_directory_that_others_can_write_to_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("network");
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o770)).unwrap();
        let error = Meeting::open(&path, id(1), None).unwrap_err().to_string();
        assert!(error.contains("written to by others"), "{error}");
        fs::remove_dir(&path).unwrap();
        fs::write(&path, "").unwrap();
        let error = Meeting::open(&path, id(1), None).unwrap_err().to_string();
        assert!(error.contains("not a directory"), "{error}");
    }

    #[test]
    fn a_name_is_twelve_small_digits_and_nothing_else() {
        let known = id(0xab);
        assert_eq!(Id::from_name(known.to_string().as_bytes()), Some(known));
        for other in ["", "5254000000a", "5254000000AB", "5254000000abc", "lock"] {
            assert_eq!(Id::from_name(other.as_bytes()), None, "{other}");
        }
    }
}
