//! Messages on the socket: exactly one header and one body at a time, file descriptors with them,
//! and an ear for the stop signal whenever there is nothing to read or no room to write.
//!
//! All calls are non-blocking (MSG_DONTWAIT, so that the mode of a descriptor that was handed to us
//! is left alone) and followed by a poll without time limit: a frontend may be silent for as long as
//! it likes, in the middle of a message too; it keeps only its own connection waiting.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use thiserror::Error;

use super::message::{HEADER_LEN, Header, HeaderError, MAX_MESSAGE_FDS};
use crate::stop::StopSignal;

/// A message as it came: its header is checked, its body is not.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) header: Header,
    pub(super) body: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

/// Why there is no next message.
#[derive(Debug, Error)]
pub(super) enum SocketError {
    /// The frontend closed the socket, or died. The normal end.
    #[error("the frontend has left")]
    Left,
    /// [`StopSignal`].
    #[error("stopped")]
    Stopped,
    #[error(transparent)]
    Header(#[from] HeaderError),
    #[error(
        "a message came with more than {MAX_MESSAGE_FDS} file descriptors, or we are out of them"
    )]
    TooManyFds,
    #[error("the vhost-user socket failed")]
    Io(#[source] io::Error),
}

impl From<Errno> for SocketError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::CONNRESET | Errno::PIPE => Self::Left,
            other => Self::Io(other.into()),
        }
    }
}

/// The connected socket.
#[derive(Debug)]
pub(super) struct Socket<'a> {
    stream: UnixStream,
    stop: &'a StopSignal,
}

impl<'a> Socket<'a> {
    pub(super) fn new(stream: UnixStream, stop: &'a StopSignal) -> Self {
        Self { stream, stop }
    }

    /// Waits for the next message.
    pub(super) fn receive(&self) -> Result<Message, SocketError> {
        let mut fds = Vec::new();
        let mut header = [0; HEADER_LEN];
        self.fill(&mut header, &mut fds)?;
        let header = Header::parse(&header)?;
        // Bounded by Header::parse.
        let mut body = vec![0; header.body_len];
        self.fill(&mut body, &mut fds)?;
        Ok(Message { header, body, fds })
    }

    /// Sends all of `bytes`, with at most one file descriptor.
    pub(super) fn send(&self, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> Result<(), SocketError> {
        let mut fd = fd;
        let mut rest = bytes;
        while !rest.is_empty() {
            match self.send_some(rest, fd) {
                Ok(sent) => {
                    fd = None;
                    rest = rest.get(sent..).unwrap_or_default();
                }
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT)?,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    fn send_some(&self, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> Result<usize, Errno> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = fd.map(|fd| [fd]);
        if let Some(fds) = &fds {
            // Room for exactly one was reserved.
            control.push(SendAncillaryMessage::ScmRights(fds));
        }
        sendmsg(
            &self.stream,
            &[IoSlice::new(bytes)],
            &mut control,
            SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
        )
    }

    fn fill(&self, buffer: &mut [u8], fds: &mut Vec<OwnedFd>) -> Result<(), SocketError> {
        let mut rest = buffer;
        // Looked at also when data never runs out: a chatty frontend does not delay a stop.
        while !rest.is_empty() {
            if self.stop.is_stopped() {
                return Err(SocketError::Stopped);
            }
            match self.receive_some(rest, fds) {
                Ok(0) => return Err(SocketError::Left),
                Ok(received) => rest = rest.get_mut(received..).unwrap_or_default(),
                Err(SocketError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.wait(PollFlags::IN)?;
                }
                Err(SocketError::Io(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn receive_some(
        &self,
        buffer: &mut [u8],
        fds: &mut Vec<OwnedFd>,
    ) -> Result<usize, SocketError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_MESSAGE_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(
            &self.stream,
            &mut [IoSliceMut::new(buffer)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
        )?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received);
            }
        }
        // A body may come in many pieces, each with descriptors of its own.
        if received.flags.contains(ReturnFlags::CTRUNC) || fds.len() > MAX_MESSAGE_FDS {
            return Err(SocketError::TooManyFds);
        }
        Ok(received.bytes)
    }

    /// Waits until the socket is ready or has ended, or until the stop.
    fn wait(&self, flags: PollFlags) -> Result<(), SocketError> {
        let stop = self.stop.fd();
        let mut fds = [
            PollFd::from_borrowed_fd(self.stream.as_fd(), flags),
            PollFd::from_borrowed_fd(stop, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        if self.stop.is_stopped() {
            return Err(SocketError::Stopped);
        }
        Ok(())
    }
}
