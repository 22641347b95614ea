//! `capture`: frames of a running card, into a file.
//!
//! The card streams, this writes whole blocks only: a capture that is cut off is a file that can be
//! read. In the end the card says how many frames it had to leave out, which is told.

use std::fs::File;
use std::io::{self, Read as _, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use offload::control::ControlClient;
use offload::stop::StopSignal;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::to_value;

use crate::args::CaptureArgs;
use crate::capture::Wanted;
use crate::policy::pcap::{self, Block};

/// How long the card is waited for once it was told to end.
const PATIENCE: Duration = Duration::from_secs(10);

pub(super) fn run(args: &CaptureArgs) -> anyhow::Result<()> {
    let wanted = Wanted {
        snaplen: args.snaplen,
    };
    // First the card, so that one that refuses leaves no file.
    let client = ControlClient::connect(&args.control.control_socket)?;
    let wanted = to_value(wanted).context("what is wanted, as JSON")?;
    let (_, stream) = client.upgrade("capture", wanted)?;
    let mut file = open(&args.write)?;
    let stop = StopSignal::from_signals().context("cannot wait for signals")?;
    let begun = stream.buffer().to_vec();
    let mut capture = Capture {
        stream: stream.into_inner(),
        limit: args.count,
        written: 0,
        told: None,
        deadline: args.duration.map(|duration| Instant::now() + duration),
        is_ending: false,
    };
    let pumped = capture.pump(begun, file.as_mut(), &stop);
    let told = match capture.told {
        Some((frames, dropped)) => format!("of {frames}; {dropped} lost for want of room"),
        None => "the card did not say how many were lost".to_owned(),
    };
    eprintln!("{} frames written, {told}", capture.written);
    match pumped {
        // Whoever read them has seen enough, like `tshark -c 10`.
        Err(error) if is_stdout(&args.write) && is_broken_pipe(&error) => Ok(()),
        pumped => pumped,
    }
}

fn is_stdout(path: &Path) -> bool {
    path.as_os_str() == "-"
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<io::Error>();
    io.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

fn open(path: &Path) -> anyhow::Result<Box<dyn Write>> {
    if is_stdout(path) {
        return Ok(Box::new(io::stdout().lock()));
    }
    let file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(Box::new(file))
}

struct Capture {
    stream: UnixStream,
    limit: Option<u64>,
    written: u64,
    /// Frames and losses, as the card counts them.
    told: Option<(u64, u64)>,
    deadline: Option<Instant>,
    is_ending: bool,
}

impl Capture {
    /// Copies block after block until the end.
    fn pump(
        &mut self,
        begun: Vec<u8>,
        file: &mut dyn Write,
        stop: &StopSignal,
    ) -> anyhow::Result<()> {
        let mut bytes = begun;
        let mut buffer = vec![0; 1 << 20];
        loop {
            let used = self
                .blocks(&bytes, file)
                .context("cannot write the frames")?;
            bytes.drain(..used);
            if self.told.is_some() {
                return Ok(());
            }
            let is_enough = self.limit.is_some_and(|limit| self.written >= limit);
            let is_over = self.deadline.is_some_and(|end| Instant::now() >= end);
            if is_enough || is_over || stop.is_stopped() {
                if self.is_ending && is_over {
                    bail!("the card does not end the capture");
                }
                self.end();
            }
            if !self.wait(stop)? {
                continue;
            }
            match self.stream.read(&mut buffer) {
                Ok(0) => bail!("the card has hung up"),
                Ok(n) => bytes.extend_from_slice(buffer.get(..n).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("the connection to the card broke"),
            }
        }
    }

    /// Tells the card that it is enough.
    fn end(&mut self) {
        if !std::mem::replace(&mut self.is_ending, true) {
            self.deadline = Some(Instant::now() + PATIENCE);
            // One that is gone is found out by reading.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
    }

    /// Writes the whole blocks at the front. Bytes that were used.
    fn blocks(&mut self, bytes: &[u8], file: &mut dyn Write) -> anyhow::Result<usize> {
        let mut used = 0;
        let mut wanted = 0;
        // Frames behind the limit are left out, but not what the card has to say in the end.
        while let Some(block) = Block::read(bytes.get(used..).unwrap_or_default())? {
            let Some(whole) = bytes.get(used..used + block.len) else {
                break;
            };
            match block.kind {
                pcap::PACKET if self.limit.is_some_and(|limit| self.written >= limit) => {
                    file.write_all(bytes.get(wanted..used).unwrap_or_default())?;
                    wanted = used + block.len;
                }
                pcap::PACKET => self.written += 1,
                pcap::STATISTICS => self.told = pcap::told(whole),
                _ => {}
            }
            used += block.len;
        }
        file.write_all(bytes.get(wanted..used).unwrap_or_default())?;
        file.flush()?;
        Ok(used)
    }

    /// Sleeps until there is something to read (true), or something else to do.
    fn wait(&self, stop: &StopSignal) -> anyhow::Result<bool> {
        let left = self
            .deadline
            .map(|end| end.saturating_duration_since(Instant::now()));
        // One that is too long for the kernel is as good as none.
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        let stop_fd = stop.fd();
        let mut fds = Vec::with_capacity(2);
        fds.push(PollFd::new(&self.stream, PollFlags::IN));
        if !self.is_ending {
            fds.push(PollFd::new(&stop_fd, PollFlags::IN));
        }
        match poll(&mut fds, left.as_ref()) {
            Ok(_) => Ok(fds.first().is_some_and(|fd| !fd.revents().is_empty())),
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(error) => Err(error).context("cannot wait for the card"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::local::Direction;

    fn stream(frames: u8) -> Vec<u8> {
        let mut stream = pcap::header("eni-0", pcap::SNAPLEN);
        for n in 0..frames {
            pcap::packet(&mut stream, Direction::In, Duration::ZERO, &[n; 60], 96);
        }
        pcap::statistics(&mut stream, Duration::ZERO, frames.into(), 1);
        stream
    }

    fn capture(limit: Option<u64>) -> (Capture, UnixStream) {
        let (ours, card) = UnixStream::pair().unwrap();
        let capture = Capture {
            stream: ours,
            limit,
            written: 0,
            told: None,
            deadline: None,
            is_ending: false,
        };
        (capture, card)
    }

    #[test]
    fn a_stream_that_comes_in_pieces_is_written_whole() {
        let wanted = stream(7);
        let (mut capture, mut card) = capture(None);
        let begun = wanted[..10].to_vec();
        let rest = wanted[10..].to_vec();
        let sender = std::thread::spawn(move || {
            for piece in rest.chunks(37) {
                card.write_all(piece).unwrap();
            }
            card
        });
        let mut file = Vec::new();
        let stop = StopSignal::new().unwrap();
        capture.pump(begun, &mut file, &stop).unwrap();
        assert_eq!((capture.written, capture.told), (7, Some((7, 1))));
        assert_eq!(file, wanted);
        drop(sender.join().unwrap());
    }

    #[test]
    fn frames_behind_the_limit_are_left_out_and_the_losses_are_told_nevertheless() {
        let (mut capture, mut card) = capture(Some(2));
        card.write_all(&stream(5)).unwrap();
        let mut file = Vec::new();
        capture
            .pump(Vec::new(), &mut file, &StopSignal::new().unwrap())
            .unwrap();
        assert_eq!((capture.written, capture.told), (2, Some((5, 1))));
        let mut wanted = pcap::header("eni-0", pcap::SNAPLEN);
        for n in 0..2 {
            pcap::packet(&mut wanted, Direction::In, Duration::ZERO, &[n; 60], 96);
        }
        pcap::statistics(&mut wanted, Duration::ZERO, 5, 1);
        assert_eq!(file, wanted);
    }

    #[test]
    fn a_card_that_dies_leaves_whole_blocks_and_is_an_error() {
        let all = stream(3);
        let whole = pcap::header("eni-0", pcap::SNAPLEN).len() + pcap::OVERHEAD + 60;
        let (mut capture, mut card) = capture(None);
        card.write_all(&all[..whole + 20]).unwrap();
        drop(card);
        let mut file = Vec::new();
        let ended = capture.pump(Vec::new(), &mut file, &StopSignal::new().unwrap());
        assert!(ended.unwrap_err().to_string().contains("hung up"));
        assert_eq!(file, all[..whole]);
    }
}
