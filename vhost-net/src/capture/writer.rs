//! The thread of one capture: from its buffer to its client.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::os::unix::net::UnixStream;

use offload::stop::StopSignal;
use rustix::event::{PollFd, PollFlags, poll};

use super::{BUFFER_MAX, Capture, Running};
use crate::policy::pcap;

/// Sends a capture to `stream`, which does not block, until its client says that it has enough (it
/// shuts down its half) or is gone, or until `stop`. `interface` is its name in the stream.
pub fn spawn(running: Running, stream: UnixStream, interface: &str, stop: StopSignal) {
    let header = pcap::header(interface, running.capture.snaplen);
    let thread = std::thread::Builder::new().name("capture".to_owned());
    // An error of `send`: the client is gone, and knows. One of `spawn` drops the stream, so that
    // the client is hung up on.
    let made = thread.spawn(move || send(&running, &stream, header, &stop));
    if let Err(error) = made {
        tracing::error!(%error, "there is no thread for a capture");
    }
}

fn send(
    running: &Running,
    mut stream: &UnixStream,
    header: Vec<u8>,
    stop: &StopSignal,
) -> io::Result<()> {
    let capture = &running.capture;
    let mut out = header;
    out.reserve(BUFFER_MAX);
    let mut sent = 0;
    let mut is_ended = false;
    let mut is_concluded = false;
    loop {
        if sent == out.len() {
            out.clear();
            sent = 0;
            capture.take(&mut out);
            if out.is_empty() && is_ended {
                if is_concluded {
                    return Ok(());
                }
                is_concluded = true;
                out = capture.conclusion();
            }
        }
        match stream.write(out.get(sent..).unwrap_or_default()) {
            Ok(n) => sent += n,
            Err(error) if is_not_yet(&error) => {}
            Err(error) => return Err(error),
        }
        if sent == out.len() && is_ended {
            continue;
        }
        let (is_asked, is_over) = wait(capture, stream, stop, sent < out.len(), is_ended)?;
        if is_asked && !is_ended {
            match stream.read(&mut [0; 64]) {
                Ok(0) => is_ended = true,
                // It has nothing to say.
                Ok(_) => {}
                Err(error) if is_not_yet(&error) => {}
                Err(error) => return Err(error),
            }
        }
        if is_over {
            is_ended = true;
        }
        if is_ended {
            running.end();
        }
    }
}

/// Sleeps until there is something to do. Whether the client wants something, and whether it is
/// time to end.
fn wait(
    capture: &Capture,
    stream: &UnixStream,
    stop: &StopSignal,
    has_output: bool,
    is_ended: bool,
) -> io::Result<(bool, bool)> {
    let (bell, stop_fd) = (capture.bell(), stop.fd());
    let mut flags = PollFlags::empty();
    if has_output {
        flags |= PollFlags::OUT;
    }
    if !is_ended {
        flags |= PollFlags::IN;
    }
    let mut fds = Vec::with_capacity(3);
    fds.push(PollFd::new(stream, flags));
    // What is ended or has a full pipe waits for the client only.
    if !is_ended {
        fds.push(PollFd::new(&stop_fd, PollFlags::IN));
        if !has_output {
            fds.push(PollFd::new(&bell, PollFlags::IN));
        }
    }
    match poll(&mut fds, None) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    let events = fds.first().map_or(PollFlags::empty(), PollFd::revents);
    if events.intersects(PollFlags::HUP | PollFlags::ERR) && !events.contains(PollFlags::IN) {
        return Err(ErrorKind::BrokenPipe.into());
    }
    Ok((events.contains(PollFlags::IN), stop.is_stopped()))
}

fn is_not_yet(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}
