//! CONFIG_CHANGE_MSG: telling the frontend that the configuration space has changed (a volume was
//! resized, a link went down).
//!
//! The message goes over the backend channel, a second socket that the frontend gives with
//! SET_BACKEND_REQ_FD. It is a bare header without NEED_REPLY, so nothing comes back and nobody has
//! to read. The frontend answers by reading the configuration over the main socket, which is why
//! the message must be sent after [`crate::device::Device::config`] gives the new one.
//!
//! Sending never blocks. If the socket is full, then older notices of the same content have not
//! been read yet, and one more would say nothing new.

use std::io::IoSlice;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};
use vhost::vhost_user::message::BackendReq;

use super::message::encode_request;

/// What became of a notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notified {
    /// It is on its way.
    Sent,
    /// Earlier notices wait to be read; the frontend will see the configuration as it is now.
    AlreadyPending,
    /// No frontend is connected, or it has no backend channel (libblkio). It learns of the change
    /// when it reads the configuration the next time.
    NobodyListens,
}

/// Tells the frontend, if there is one, that the configuration has changed. From any thread;
/// clones are the same.
#[derive(Clone, Debug, Default)]
pub struct ConfigChangeNotifier(Arc<Mutex<Option<OwnedFd>>>);

impl ConfigChangeNotifier {
    /// Sends CONFIG_CHANGE_MSG. Never blocks.
    #[must_use = "whether anybody was told"]
    pub fn notify(&self) -> Notified {
        let mut channel = self.channel();
        let Some(socket) = channel.as_ref() else {
            return Notified::NobodyListens;
        };
        let message = encode_request(BackendReq::CONFIG_CHANGE_MSG.into(), &[]);
        let sent = loop {
            let sent = sendmsg(
                socket,
                &[IoSlice::new(&message)],
                &mut SendAncillaryBuffer::default(),
                SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
            );
            if sent != Err(Errno::INTR) {
                break sent;
            }
        };
        match sent {
            Ok(length) if length == message.len() => Notified::Sent,
            Err(Errno::AGAIN) => Notified::AlreadyPending,
            // Closed, not a socket, or cut in the middle of a header: of no use any more.
            Ok(_) | Err(_) => {
                *channel = None;
                Notified::NobodyListens
            }
        }
    }

    /// From now on, over this socket.
    pub(super) fn connect(&self, socket: OwnedFd) {
        *self.channel() = Some(socket);
    }

    /// The frontend has left.
    pub(super) fn disconnect(&self) {
        *self.channel() = None;
    }

    fn channel(&self) -> MutexGuard<'_, Option<OwnedFd>> {
        // An Option is sound whatever the thread that panicked was doing.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn without_a_channel_nobody_listens() {
        assert_eq!(
            ConfigChangeNotifier::default().notify(),
            Notified::NobodyListens
        );
    }

    #[test]
    fn a_notice_is_a_bare_header() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let notifier = ConfigChangeNotifier::default();
        notifier.connect(ours.into());
        assert_eq!(notifier.clone().notify(), Notified::Sent);
        let mut header = [0; 12];
        theirs.read_exact(&mut header).unwrap();
        let words: Vec<u32> = header
            .chunks(4)
            .map(|word| u32::from_ne_bytes(word.try_into().unwrap()))
            .collect();
        assert_eq!(words, [2, 1, 0]);
    }

    #[test]
    fn a_frontend_that_never_reads_blocks_nobody() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let notifier = ConfigChangeNotifier::default();
        notifier.connect(ours.into());
        let notices = (0..1_000_000).take_while(|_| notifier.notify() == Notified::Sent);
        assert!(notices.count() > 0);
        assert_eq!(notifier.notify(), Notified::AlreadyPending);
        drop(theirs);
        assert_eq!(notifier.notify(), Notified::NobodyListens);
    }

    #[test]
    fn a_channel_that_is_no_socket_is_dropped() {
        let notifier = ConfigChangeNotifier::default();
        notifier.connect(std::fs::File::open("/dev/null").unwrap().into());
        assert_eq!(notifier.notify(), Notified::NobodyListens);
    }
}
