//! Streams whose bytes stay in the kernel until they are dropped: see [`crate::stack::Host::keep`].

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::ptr;

use libc::{MSG_DONTWAIT, MSG_PEEK, MSG_TRUNC};
use smallvec::SmallVec;
use vm_memory::VolatileSlice;

fn result(value: isize) -> io::Result<usize> {
    usize::try_from(value).map_err(|_| io::Error::last_os_error())
}

fn set_option(fd: BorrowedFd<'_>, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let len = size_of::<libc::c_int>() as libc::socklen_t;
    let value = ptr::from_ref(&value).cast();
    // SAFETY: the descriptor is open, and the option's value is the int that `value` points to.
    let done = unsafe { libc::setsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, option, value, len) };
    result(done as isize).map(drop)
}

/// Leaves out the first `count` bytes.
fn advance(parts: &mut [libc::iovec], mut count: usize) {
    for part in parts {
        let len = part.iov_len.min(count);
        // Within the part, or just behind it, where nothing is left to be written.
        part.iov_base = part.iov_base.wrapping_byte_add(len);
        part.iov_len -= len;
        count -= len;
    }
}

/// A socket that keeps its bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Peeking {
    /// From where on the kernel looks next (`SO_PEEK_OFF`): it moves on with each look and back with
    /// what is dropped.
    at: usize,
}

impl Peeking {
    /// `None`: the kernel cannot do it for this kind of socket.
    pub(super) fn begin(fd: &OwnedFd) -> Option<Self> {
        set_option(fd.as_fd(), libc::SO_PEEK_OFF, 0).ok()?;
        // Urgent bytes are part of the stream (RFC 6093, 6): else the kernel would leave them out, and
        // what follows would be one place off.
        set_option(fd.as_fd(), libc::SO_OOBINLINE, 1).ok()?;
        Some(Self::default())
    }

    pub(super) fn peek(
        &mut self,
        fd: &OwnedFd,
        at: usize,
        into: &[VolatileSlice<'_>],
    ) -> io::Result<usize> {
        if self.at != at {
            let offset = libc::c_int::try_from(at).map_err(io::Error::other)?;
            set_option(fd.as_fd(), libc::SO_PEEK_OFF, offset)?;
            self.at = at;
        }
        let guards: SmallVec<[_; 24]> = into.iter().map(VolatileSlice::ptr_guard_mut).collect();
        let mut parts: SmallVec<[libc::iovec; 24]> = guards
            .iter()
            .map(|guard| libc::iovec {
                iov_base: guard.as_ptr().cast(),
                iov_len: guard.len(),
            })
            .collect();
        let wanted: usize = parts.iter().map(|part| part.iov_len).sum();
        let mut found = self.peek_once(fd, &mut parts)?;
        let mut read = found;
        // The kernel ends a read in front of an urgent byte, even of one that is part of the stream, and
        // does so for as long as the byte is only looked at.
        while found > 0 && read < wanted {
            advance(&mut parts, found);
            found = match self.peek_once(fd, &mut parts) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                found => found?,
            };
            read += found;
        }
        Ok(read)
    }

    /// Looks from where the kernel looks next.
    fn peek_once(&mut self, fd: &OwnedFd, parts: &mut [libc::iovec]) -> io::Result<usize> {
        // SAFETY: all-zero bytes are a valid `msghdr`: numbers, and pointers that are null.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = parts.as_mut_ptr();
        message.msg_iovlen = parts.len() as _;
        // SAFETY: the descriptor is open; the message has no name and no control part, and its parts
        // are what is left of the slices of `peek`, our only caller, which are valid for writing as
        // long as its guards live. Who else writes to them writes to memory that is shared anyway, and
        // no reference to it exists.
        let read =
            unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, MSG_PEEK | MSG_DONTWAIT) };
        let read = result(read)?;
        self.at += read;
        Ok(read)
    }

    pub(super) fn discard(&mut self, fd: &OwnedFd, count: usize) -> io::Result<usize> {
        // SAFETY: the descriptor is open; with MSG_TRUNC a stream's bytes are dropped and the buffer is
        // not touched (tcp(7)).
        let dropped = unsafe {
            let flags = MSG_TRUNC | MSG_DONTWAIT;
            libc::recv(fd.as_raw_fd(), ptr::null_mut(), count, flags)
        };
        let dropped = result(dropped)?;
        self.at = self.at.saturating_sub(dropped);
        Ok(dropped)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::net::{TcpListener, TcpStream};

    use super::*;

    fn pair() -> (TcpStream, OwnedFd) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (far, _) = listener.accept().unwrap();
        (far, near.into())
    }

    fn look(peeking: &mut Peeking, fd: &OwnedFd, at: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let (front, rest) = bytes.split_at_mut(len / 3);
        let parts = [VolatileSlice::from(front), VolatileSlice::from(rest)];
        let read = peeking.peek(fd, at, &parts).unwrap();
        bytes.truncate(read);
        bytes
    }

    #[test]
    fn bytes_are_found_wherever_they_are_looked_for_until_they_are_dropped() {
        let (mut far, fd) = pair();
        let Some(mut peeking) = Peeking::begin(&fd) else {
            eprintln!("skipped: this kernel has no SO_PEEK_OFF for TCP");
            return;
        };
        let text: Vec<u8> = (0..=255).collect();
        far.write_all(&text).unwrap();
        while rustix::io::ioctl_fionread(&fd).unwrap() < 256 {
            std::thread::yield_now();
        }
        assert_eq!(look(&mut peeking, &fd, 0, 100), text[..100]);
        assert_eq!(look(&mut peeking, &fd, 100, 100), text[100..200]);
        assert_eq!(look(&mut peeking, &fd, 50, 10), text[50..60]);
        assert_eq!(peeking.discard(&fd, 60).unwrap(), 60);
        assert_eq!(look(&mut peeking, &fd, 0, 40), text[60..100]);
        assert_eq!(look(&mut peeking, &fd, 40, 1000), text[100..]);
        assert_eq!(peeking.discard(&fd, 100).unwrap(), 100);
        assert_eq!(look(&mut peeking, &fd, 1, 3), text[161..164]);
        let error = peeking.peek(&fd, 96, &[VolatileSlice::from(&mut [0][..])]);
        assert_eq!(error.unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(far);
        rustix::event::poll(
            &mut [rustix::event::PollFd::new(
                &fd,
                rustix::event::PollFlags::RDHUP,
            )],
            None,
        )
        .unwrap();
        assert_eq!(look(&mut peeking, &fd, 96, 3), b"");
    }

    #[test]
    fn an_urgent_byte_is_one_of_the_stream() {
        let (far, fd) = pair();
        let Some(mut peeking) = Peeking::begin(&fd) else {
            eprintln!("skipped: this kernel has no SO_PEEK_OFF for TCP");
            return;
        };
        use rustix::net::{SendFlags, send};
        send(&far, b"ab", SendFlags::empty()).unwrap();
        send(&far, b"c", SendFlags::OOB).unwrap();
        send(&far, b"de", SendFlags::empty()).unwrap();
        while rustix::io::ioctl_fionread(&fd).unwrap() < 5 {
            std::thread::yield_now();
        }
        // As often as they are looked at; what is not there is not waited for.
        for len in [5, 5, 4, 9] {
            assert_eq!(look(&mut peeking, &fd, 0, len), b"abcde"[..len.min(5)]);
        }
        assert_eq!(look(&mut peeking, &fd, 2, 3), b"cde");
        assert_eq!(peeking.discard(&fd, 2).unwrap(), 2);
        assert_eq!(look(&mut peeking, &fd, 0, 3), b"cde");
    }
}
