//! The other end, for the shim and for command lines.

use std::borrow::Cow;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::protocol::{ControlError, Request, Response};
use crate::stop::StopSignal;

/// Longest response taken, in bytes.
const MAX_RESPONSE: u64 = 16 * 1024 * 1024;
const TIMEOUT: Duration = Duration::from_secs(10);
/// Pause between attempts to connect to a card that is still starting.
const RETRY: Duration = Duration::from_millis(20);

/// Why a call gave no result.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody answers at the path.
    #[error("cannot connect to the control socket {}; is the card running?", path.display())]
    Connect {
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The stop came while waiting for the card.
    #[error("stopped while waiting for the control socket {}", path.display())]
    Stopped {
        /// The path.
        path: PathBuf,
    },
    /// No answer in time.
    #[error("the card did not answer within {} s", TIMEOUT.as_secs())]
    Timeout,
    /// The connection broke.
    #[error("the connection to the card broke")]
    Io(#[source] io::Error),
    /// The server hung up.
    #[error("the card closed the connection without an answer")]
    Closed,
    /// The answer has no end.
    #[error("the card's answer is longer than {MAX_RESPONSE} bytes")]
    TooLong,
    /// The answer cannot be read.
    #[error("the card's answer is not understood")]
    Malformed(#[source] serde_json::Error),
    /// The card says no.
    #[error("the card refuses: {0}")]
    Remote(ControlError),
}

/// A connection to a card's control socket. After an error other than [`ClientError::Remote`] it
/// is of no more use.
#[derive(Debug)]
pub struct ControlClient {
    stream: BufReader<UnixStream>,
}

impl ControlClient {
    /// Connects now.
    ///
    /// # Errors
    /// Nobody listens at `path`, or this user may not.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let connect = || {
            let stream = UnixStream::connect(path)?;
            stream.set_read_timeout(Some(TIMEOUT))?;
            stream.set_write_timeout(Some(TIMEOUT))?;
            Ok(stream)
        };
        match connect() {
            Ok(stream) => Ok(Self {
                stream: BufReader::new(stream),
            }),
            Err(source) => Err(ClientError::Connect {
                path: path.to_owned(),
                source,
            }),
        }
    }

    /// Connects as soon as someone listens, for a card that was just started.
    ///
    /// # Errors
    /// `timeout` passed (the last attempt's error) or `stop` came.
    pub fn connect_within(
        path: &Path,
        timeout: Duration,
        stop: &StopSignal,
    ) -> Result<Self, ClientError> {
        let start = Instant::now();
        loop {
            let error = match Self::connect(path) {
                Ok(client) => return Ok(client),
                Err(error) => error,
            };
            if start.elapsed() >= timeout {
                return Err(error);
            }
            if stop.wait(Some(RETRY)) {
                return Err(ClientError::Stopped {
                    path: path.to_owned(),
                });
            }
        }
    }

    /// Calls a method and waits for its result; [`Value::Null`] for no parameters.
    ///
    /// # Errors
    /// [`ClientError::Remote`] when the card refuses; else the connection is lost.
    pub fn call(&mut self, method: &str, params: Value) -> Result<Value, ClientError> {
        let request = Request {
            method: Cow::Borrowed(method),
            params,
        };
        let mut line = serde_json::to_vec(&request).map_err(ClientError::Malformed)?;
        line.push(b'\n');
        let sent = self.stream.get_mut().write_all(&line);
        // A server that refuses has said why before it hung up, so look for that first.
        let answer = self.read_line();
        let line = match (sent, answer) {
            (Err(error), Err(ClientError::Closed | ClientError::Io(_))) => {
                return Err(io_error(error));
            }
            (_, answer) => answer?,
        };
        match serde_json::from_slice(&line).map_err(ClientError::Malformed)? {
            Response::Ok(value) => Ok(value),
            Response::Error(error) => Err(ClientError::Remote(error)),
        }
    }

    /// Asks for events: the connection is for those from now on.
    ///
    /// # Errors
    /// As for [`ControlClient::call`].
    pub fn subscribe(mut self) -> Result<EventStream, ClientError> {
        self.call("events", Value::Null)?;
        Ok(EventStream {
            stream: self.stream,
            line: Vec::new(),
        })
    }

    /// Calls a method that takes the connection over: its result, and the stream behind it, which
    /// waits for ever unless told otherwise.
    ///
    /// # Errors
    /// As for [`ControlClient::call`].
    pub fn upgrade(
        mut self,
        method: &str,
        params: Value,
    ) -> Result<(Value, BufReader<UnixStream>), ClientError> {
        let told = self.call(method, params)?;
        let socket = self.stream.get_ref();
        socket.set_read_timeout(None).map_err(io_error)?;
        socket.set_write_timeout(None).map_err(io_error)?;
        Ok((told, self.stream))
    }

    fn read_line(&mut self) -> Result<Vec<u8>, ClientError> {
        let mut line = Vec::new();
        let n = (&mut self.stream)
            .take(MAX_RESPONSE)
            .read_until(b'\n', &mut line)
            .map_err(io_error)?;
        if line.last() == Some(&b'\n') {
            return Ok(line);
        }
        Err(if n as u64 == MAX_RESPONSE {
            ClientError::TooLong
        } else {
            ClientError::Closed
        })
    }
}

/// What a card tells without being asked.
#[derive(Debug)]
pub struct EventStream {
    stream: BufReader<UnixStream>,
    /// What has come of the next event.
    line: Vec<u8>,
}

impl EventStream {
    /// The next event's fields, `kind` among them. `None`: none came within `timeout`.
    ///
    /// # Errors
    /// The card is gone, or dropped this client for being slow.
    pub fn next(&mut self, timeout: Duration) -> Result<Option<Value>, ClientError> {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let socket = self.stream.get_ref();
            socket.set_read_timeout(Some(left)).map_err(io_error)?;
            let room = MAX_RESPONSE.saturating_sub(self.line.len() as u64);
            let got = (&mut self.stream)
                .take(room)
                .read_until(b'\n', &mut self.line);
            match got.map_err(io_error) {
                Err(ClientError::Timeout) => continue,
                Err(error) => return Err(error),
                Ok(0) if room == 0 => return Err(ClientError::TooLong),
                Ok(0) => return Err(ClientError::Closed),
                Ok(_) if self.line.last() != Some(&b'\n') => continue,
                Ok(_) => {}
            }
            let line = std::mem::take(&mut self.line);
            let mut message: Value =
                serde_json::from_slice(&line).map_err(ClientError::Malformed)?;
            if let Some(event) = message.get_mut("event") {
                return Ok(Some(event.take()));
            }
        }
    }
}

fn io_error(error: io::Error) -> ClientError {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => ClientError::Timeout,
        ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => ClientError::Closed,
        _ => ClientError::Io(error),
    }
}
