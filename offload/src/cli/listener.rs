//! Where a card's frontends come from: a path of our own, or a descriptor that was inherited.

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, FdFlags, fcntl_getfd, fcntl_setfd, ioctl_fionbio};
use rustix::net::sockopt::{socket_acceptconn, socket_domain, socket_type};
use rustix::net::{AddressFamily, SocketType, getpeername};

use super::socket::{SocketError, SocketFile, bind_socket};
use crate::stop::StopSignal;

/// Why there is no listener.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The path could not be bound.
    #[error(transparent)]
    Path(#[from] SocketError),
    /// The descriptor cannot be used.
    #[error(transparent)]
    Fd(#[from] FdError),
    /// Neither or both were given.
    #[error("give either --socket-path or --fd")]
    NotOne,
    /// This card has one frontend.
    #[error("only one --socket-path can be served here")]
    Several,
}

/// What is wrong with the descriptor given with `--fd`.
#[derive(Debug, thiserror::Error)]
pub enum FdError {
    /// Standard input, output, error, or negative.
    #[error("--fd {0}: descriptors from 3 on can be handed over")]
    Reserved(RawFd),
    /// Nothing is open there.
    #[error(
        "--fd {0} is not open; whoever starts this program has to let it inherit the descriptor (no close-on-exec)"
    )]
    NotOpen(RawFd),
    /// Open, but no Unix stream socket.
    #[error("the descriptor is {0}, but has to be a listening or connected Unix stream socket")]
    WrongType(&'static str),
    /// Neither listening nor connected.
    #[error(
        "the socket is neither listening nor connected; call listen() or connect() before it is handed over"
    )]
    Idle,
    /// The kernel refused.
    #[error("cannot examine the descriptor")]
    Io(#[source] io::Error),
}

impl From<Errno> for FdError {
    fn from(error: Errno) -> Self {
        Self::Io(error.into())
    }
}

/// A source of frontends.
#[derive(Debug)]
pub enum Listener {
    /// One after the other.
    Listening {
        /// Does not block; [`Listener::accept`] waits.
        listener: UnixListener,
        /// The file to remove in the end; `None` when whoever opened the socket owns it.
        file: Option<SocketFile>,
    },
    /// A single one; `None` once it was accepted.
    Connected(Option<UnixStream>),
}

impl Listener {
    /// Listens on `path`; see [`bind_socket`].
    ///
    /// # Errors
    /// See [`SocketError`].
    pub fn bind(path: &Path, mode: u32) -> Result<Self, SocketError> {
        let (listener, file) = bind_socket(path, mode)?;
        listener
            .set_nonblocking(true)
            .map_err(|source| SocketError::Io {
                action: "set up",
                path: path.to_owned(),
                source,
            })?;
        Ok(Self::Listening {
            listener,
            file: Some(file),
        })
    }

    /// Takes over the inherited descriptor `fd`. Call it before anything else opens files: what
    /// is at that number belongs to this listener from here on.
    ///
    /// # Errors
    /// See [`FdError`].
    pub fn inherit(fd: RawFd) -> Result<Self, FdError> {
        if fd < 3 {
            return Err(FdError::Reserved(fd));
        }
        // SAFETY: the borrow ends with the next statement, in which no other code of ours runs
        // that could close `fd`; if nothing is open there the kernel says EBADF, no more. `fd` is
        // not -1.
        let open = fcntl_getfd(unsafe { BorrowedFd::borrow_raw(fd) });
        open.map_err(|_| FdError::NotOpen(fd))?;
        // SAFETY: it is open (just tested), and by the convention of `--fd` the starter opened it
        // for us: nothing in this process has it, because the caller has opened nothing yet.
        Self::from_fd(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// A listening or a connected socket.
    ///
    /// # Errors
    /// See [`FdError`].
    pub fn from_fd(fd: OwnedFd) -> Result<Self, FdError> {
        match socket_domain(&fd) {
            Ok(AddressFamily::UNIX) => {}
            Ok(_) => return Err(FdError::WrongType("a socket of another family")),
            Err(Errno::NOTSOCK) => return Err(FdError::WrongType("no socket")),
            Err(error) => return Err(error.into()),
        }
        if socket_type(&fd)? != SocketType::STREAM {
            return Err(FdError::WrongType("a datagram or packet socket"));
        }
        fcntl_setfd(&fd, fcntl_getfd(&fd)? | FdFlags::CLOEXEC)?;
        if socket_acceptconn(&fd)? {
            ioctl_fionbio(&fd, true)?;
            return Ok(Self::Listening {
                listener: fd.into(),
                file: None,
            });
        }
        match getpeername(&fd) {
            Ok(_) => {
                ioctl_fionbio(&fd, false)?;
                Ok(Self::Connected(Some(fd.into())))
            }
            Err(Errno::NOTCONN) => Err(FdError::Idle),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for the next frontend; the stream blocks. `None`: the stop came, or the one
    /// connected socket was given out before.
    ///
    /// # Errors
    /// The listening socket is of no use any more.
    pub fn accept(&mut self, stop: &StopSignal) -> io::Result<Option<UnixStream>> {
        let listener = match self {
            Self::Connected(stream) => return Ok(stream.take()),
            Self::Listening { listener, .. } => listener,
        };
        loop {
            if stop.is_stopped() {
                return Ok(None);
            }
            let stop_fd = stop.fd();
            let mut fds = [
                PollFd::new(listener, PollFlags::IN),
                PollFd::new(&stop_fd, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            match listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false)?;
                    return Ok(Some(stream));
                }
                // It went away again while it was waiting.
                Err(error) if is_passing(&error) => {}
                // Out of descriptors or memory: others may give some back. Sleeping (with an eye
                // on the stop) keeps the loop from spinning on a socket that stays readable.
                Err(error) if is_shortage(&error) => {
                    tracing::warn!(%error, "cannot accept a frontend now; trying again");
                    let _ = stop.wait(Some(std::time::Duration::from_secs(1)));
                }
                Err(error) => return Err(error),
            }
        }
    }
}

fn is_passing(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
    matches!(error.kind(), WouldBlock | Interrupted | ConnectionAborted)
}

fn is_shortage(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    matches!(
        errno,
        Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::NOBUFS)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixDatagram;
    use std::time::Duration;

    #[test]
    fn a_bound_path_accepts_one_frontend_after_the_other_until_the_stop() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let stop = StopSignal::new().unwrap();
        let mut listener = Listener::bind(&path, 0o600).unwrap();
        for _ in 0..2 {
            let mut client = UnixStream::connect(&path).unwrap();
            let mut server = listener.accept(&stop).unwrap().unwrap();
            client.write_all(b"x").unwrap();
            server.read_exact(&mut [0]).unwrap();
        }
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| listener.accept(&stop).unwrap().is_none());
            std::thread::sleep(Duration::from_millis(20));
            stop.stop();
            assert!(waiting.join().unwrap());
        });
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn a_listening_descriptor_is_told_from_a_connected_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let stop = StopSignal::new().unwrap();
        let inherited = UnixListener::bind(&path).unwrap();
        let mut listener = Listener::from_fd(inherited.into()).unwrap();
        assert!(matches!(listener, Listener::Listening { file: None, .. }));
        let _client = UnixStream::connect(&path).unwrap();
        assert!(listener.accept(&stop).unwrap().is_some());
        drop(listener);
        assert!(
            path.exists(),
            "the file belongs to whoever opened the socket"
        );

        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut listener = Listener::from_fd(ours.into()).unwrap();
        assert!(matches!(listener, Listener::Connected(Some(_))));
        assert!(listener.accept(&stop).unwrap().is_some());
        assert!(listener.accept(&stop).unwrap().is_none());
    }

    #[test]
    fn descriptors_of_the_wrong_kind_are_refused_with_the_kind() {
        let text = |fd: OwnedFd| Listener::from_fd(fd).unwrap_err().to_string();
        assert!(text(std::fs::File::open("/dev/null").unwrap().into()).contains("no socket"));
        assert!(text(UnixDatagram::unbound().unwrap().into()).contains("datagram"));
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert!(text(tcp.into()).contains("another family"));
        let idle = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        assert!(text(idle).contains("neither listening nor connected"));
    }

    #[test]
    fn numbers_that_cannot_be_inherited_are_refused() {
        for fd in [-1, 0, 2, RawFd::MIN] {
            assert!(matches!(Listener::inherit(fd), Err(FdError::Reserved(n)) if n == fd));
        }
        assert!(matches!(
            Listener::inherit(987_654),
            Err(FdError::NotOpen(987_654))
        ));
    }
}
