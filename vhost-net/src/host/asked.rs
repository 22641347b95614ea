//! A question of the card's own to a server: a socket for each, so that the kernel chooses a random
//! port and drops what others send.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll::EventFlags;
use rustix::net::{RecvFlags, SendFlags, SocketType, ipproto};

use super::{FLAGS, WATCHED, family};
use crate::local::Outgoing;

/// A length and the longest message behind it.
const STREAM_MAX: usize = 2 + u16::MAX as usize;

/// See the module.
#[derive(Debug)]
pub(super) struct Asked {
    fd: OwnedFd,
    stream: Option<Stream>,
}

/// What is on its way over TCP.
#[derive(Debug)]
struct Stream {
    unsent: Vec<u8>,
    got: Vec<u8>,
}

impl Asked {
    /// Asks, or begins to.
    pub(super) fn new(question: &Outgoing) -> io::Result<Self> {
        let (kind, protocol) = if question.is_stream {
            (SocketType::STREAM, ipproto::TCP)
        } else {
            (SocketType::DGRAM, ipproto::UDP)
        };
        let fd = rustix::net::socket_with(family(&question.to), kind, FLAGS, Some(protocol))?;
        match rustix::net::connect(&fd, &question.to) {
            Ok(()) => {}
            Err(rustix::io::Errno::INPROGRESS) if question.is_stream => {}
            Err(errno) => return Err(errno.into()),
        }
        if !question.is_stream {
            rustix::net::send(&fd, &question.payload, SendFlags::NOSIGNAL)?;
            return Ok(Self { fd, stream: None });
        }
        let too_long = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let len = u16::try_from(question.payload.len()).map_err(too_long)?;
        let stream = Stream {
            unsent: [&len.to_be_bytes()[..], &question.payload].concat(),
            got: Vec::new(),
        };
        Ok(Self {
            fd,
            stream: Some(stream),
        })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// What to watch it for. A stream is taken to the end at each event.
    pub(super) fn watched(&self) -> EventFlags {
        match self.stream {
            Some(_) => WATCHED,
            None => EventFlags::IN,
        }
    }

    /// Takes an answer that is whole.
    pub(super) fn answer(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(stream) = &mut self.stream else {
            let (len, _) = rustix::net::recv(&self.fd, buffer, RecvFlags::empty())?;
            return Ok(len);
        };
        while !stream.unsent.is_empty() {
            let sent = rustix::net::send(&self.fd, &stream.unsent, SendFlags::NOSIGNAL)?;
            stream.unsent.drain(..sent);
        }
        loop {
            if let Some((len, message)) = stream.got.split_first_chunk::<2>() {
                let len = usize::from(u16::from_be_bytes(*len));
                if let (Some(message), Some(place)) = (message.get(..len), buffer.get_mut(..len)) {
                    place.copy_from_slice(message);
                    stream.got.drain(..2 + len);
                    return Ok(len);
                }
            }
            let room = STREAM_MAX
                .saturating_sub(stream.got.len())
                .min(buffer.len());
            let place = buffer.get_mut(..room).unwrap_or_default();
            if place.is_empty() {
                return Err(io::ErrorKind::InvalidData.into());
            }
            let (len, _) = rustix::net::recv(&self.fd, &mut *place, RecvFlags::empty())?;
            if len == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            stream.got.extend(place.iter().take(len));
        }
    }
}
