//! QEMU's control protocol: a small client.
//!
//! QMP is one JSON object a line in each direction: a greeting, then replies to commands, with
//! events in between at any time. Five commands are needed here, so this is a client of our own
//! over `serde_json`: the `qapi` crates generate a type for every one of QEMU's hundreds of commands,
//! and refuse events that they do not know; here an unknown event is its name and its raw JSON.
//!
//! [`wire`] reads lines (pure); [`Client`] owns the socket. Every wait has a deadline: a QEMU that
//! hangs must not hang the shim.

use std::collections::VecDeque;
use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

pub mod wire;

use wire::{Event, LineSplitter, Message};

#[cfg(test)]
mod tests;

/// Events kept while a command waits for its reply; the oldest are dropped beyond that.
const EVENTS_KEPT: usize = 256;

/// Why a conversation with QEMU failed.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The socket cannot be reached.
    #[error("cannot connect to QEMU's control socket")]
    Connect(#[source] io::Error),
    /// Reading or writing failed.
    #[error("QEMU's control socket failed")]
    Io(#[from] io::Error),
    /// QEMU is gone.
    #[error("QEMU hung up its control socket")]
    HungUp,
    /// What came is not QMP.
    #[error("QEMU's control socket speaks something else than QMP")]
    NotQmp(#[from] wire::WireError),
    /// No answer in time.
    #[error("QEMU did not answer `{command}` within {timeout_ms} ms")]
    Timeout {
        /// The command.
        command: String,
        /// How long was waited.
        timeout_ms: u128,
    },
    /// QEMU answered with an error.
    #[error("QEMU refuses `{command}`: {description}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's error class.
        class: String,
        /// QEMU's words.
        description: String,
    },
}

/// A connection in command mode.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    lines: LineSplitter,
    events: VecDeque<Event>,
    next_id: u64,
}

impl Client {
    /// Connects and negotiates; `timeout` is for both together. A socket that is not there yet is
    /// waited for: QEMU makes it while it starts.
    ///
    /// # Errors
    /// [`QmpError::Connect`] when nobody listens in time, or what the negotiation met.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self, QmpError> {
        let deadline = Instant::now() + timeout;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(e) if Instant::now() >= deadline => return Err(QmpError::Connect(e)),
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        };
        Self::negotiate(stream, deadline.saturating_duration_since(Instant::now()))
    }

    /// Negotiates over a connected socket.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub fn negotiate(stream: UnixStream, timeout: Duration) -> Result<Self, QmpError> {
        stream.set_write_timeout(Some(timeout.max(Duration::from_millis(1))))?;
        let mut client = Self {
            stream,
            lines: LineSplitter::default(),
            events: VecDeque::new(),
            next_id: 0,
        };
        let deadline = Instant::now() + timeout;
        loop {
            match client.receive(deadline)? {
                Some(Message::Greeting) => break,
                Some(Message::Event(event)) => client.keep(event),
                Some(_) => {}
                None => return Err(timed_out("greeting", timeout)),
            }
        }
        client.execute("qmp_capabilities", None, timeout)?;
        Ok(client)
    }

    /// Runs a command and returns what it returned. Events that come first are kept for
    /// [`Client::next_event`].
    ///
    /// # Errors
    /// See [`QmpError`].
    pub fn execute(
        &mut self,
        command: &str,
        arguments: Option<Value>,
        timeout: Duration,
    ) -> Result<Value, QmpError> {
        let id = self.next_id;
        self.next_id += 1;
        let mut request = json!({ "execute": command, "id": id });
        if let (Some(arguments), Some(object)) = (arguments, request.as_object_mut()) {
            object.insert("arguments".to_owned(), arguments);
        }
        let mut line = request.to_string();
        line.push('\n');
        self.stream
            .write_all(line.as_bytes())
            .map_err(|e| match e.kind() {
                io::ErrorKind::BrokenPipe => QmpError::HungUp,
                io::ErrorKind::WouldBlock => timed_out(command, timeout),
                _ => QmpError::Io(e),
            })?;
        let deadline = Instant::now() + timeout;
        loop {
            match self.receive(deadline)? {
                None => return Err(timed_out(command, timeout)),
                Some(Message::Event(event)) => self.keep(event),
                Some(Message::Return {
                    id: Some(of),
                    value,
                }) if of == id => return Ok(value),
                Some(Message::Error {
                    id: of,
                    class,
                    description,
                }) if of.is_none_or(|of| of == id) => {
                    return Err(QmpError::Refused {
                        command: command.to_owned(),
                        class,
                        description,
                    });
                }
                // The reply to a command that was given up on, or a greeting out of turn.
                Some(_) => {}
            }
        }
    }

    /// The next event, or `None` if none comes within `timeout`.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub fn next_event(&mut self, timeout: Duration) -> Result<Option<Event>, QmpError> {
        if let Some(event) = self.events.pop_front() {
            return Ok(Some(event));
        }
        let deadline = Instant::now() + timeout;
        loop {
            match self.receive(deadline)? {
                None => return Ok(None),
                Some(Message::Event(event)) => return Ok(Some(event)),
                Some(_) => {}
            }
        }
    }

    /// Presses the guest's power button.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub fn system_powerdown(&mut self, timeout: Duration) -> Result<(), QmpError> {
        self.execute("system_powerdown", None, timeout).map(drop)
    }

    /// Ends QEMU. That it hangs up instead of answering is a yes too.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub fn quit(&mut self, timeout: Duration) -> Result<(), QmpError> {
        match self.execute("quit", None, timeout) {
            Ok(_) | Err(QmpError::HungUp) => Ok(()),
            Err(e) => Err(e),
        }
    }

    /// `query-status`: for example `running`.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub fn status(&mut self, timeout: Duration) -> Result<String, QmpError> {
        let value = self.execute("query-status", None, timeout)?;
        Ok(value
            .get("status")
            .and_then(Value::as_str)
            .unwrap_or("unknown")
            .to_owned())
    }

    /// `query-chardev`: label and whether its peer is connected.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub fn chardevs(&mut self, timeout: Duration) -> Result<Vec<(String, bool)>, QmpError> {
        let value = self.execute("query-chardev", None, timeout)?;
        let devices = value.as_array().map(Vec::as_slice).unwrap_or_default();
        Ok(devices
            .iter()
            .filter_map(|device| {
                let label = device.get("label")?.as_str()?.to_owned();
                Some((label, device.get("frontend-open")?.as_bool()?))
            })
            .collect())
    }

    fn keep(&mut self, event: Event) {
        if self.events.len() == EVENTS_KEPT {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    /// The next message, or `None` at the deadline. Messages that are already there are returned
    /// even then.
    fn receive(&mut self, deadline: Instant) -> Result<Option<Message>, QmpError> {
        loop {
            if let Some(line) = self.lines.next_line() {
                return Ok(Some(wire::parse(&line)?));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.stream.set_read_timeout(Some(left))?;
            let mut buffer = [0; 4096];
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err(QmpError::HungUp),
                Ok(n) => self.lines.push(&buffer[..n])?,
                Err(e) => match e.kind() {
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => {}
                    io::ErrorKind::ConnectionReset => return Err(QmpError::HungUp),
                    _ => return Err(e.into()),
                },
            }
        }
    }
}

fn timed_out(command: &str, timeout: Duration) -> QmpError {
    QmpError::Timeout {
        command: command.to_owned(),
        timeout_ms: timeout.as_millis(),
    }
}
