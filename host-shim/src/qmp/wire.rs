//! Lines and messages of QMP, without a socket.

use std::collections::VecDeque;

use serde_json::Value;

/// Longest line accepted, in bytes. QEMU's longest answers (`query-qmp-schema`) are far shorter.
pub const LINE_MAX_BYTES: usize = 4 << 20;

/// What came is not QMP.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// A line is not JSON.
    #[error("a line is not JSON")]
    NotJson(#[from] serde_json::Error),
    /// JSON, but none of QMP's messages.
    #[error("a line is neither greeting, reply nor event: {0}")]
    NotAMessage(String),
    /// No end of line in sight.
    #[error("a line is longer than {LINE_MAX_BYTES} bytes")]
    LineTooLong,
}

/// An event, known or not.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// For example `SHUTDOWN`.
    pub name: String,
    /// What it carries, as it came; null without anything.
    pub data: Value,
}

/// One line from QEMU.
#[derive(Debug, Clone, PartialEq)]
pub enum Message {
    /// `{"QMP": ...}`, once, first.
    Greeting,
    /// A command succeeded.
    Return {
        /// The command's id.
        id: Option<u64>,
        /// What it returned.
        value: Value,
    },
    /// A command failed.
    Error {
        /// The command's id; absent if QEMU could not read the command.
        id: Option<u64>,
        /// Error class.
        class: String,
        /// For people.
        description: String,
    },
    /// Something happened.
    Event(Event),
}

/// Reads one line.
///
/// # Errors
/// [`WireError`] if it is not a QMP message.
pub fn parse(line: &[u8]) -> Result<Message, WireError> {
    let value: Value = serde_json::from_slice(line)?;
    let text = |value: Option<&Value>| value.and_then(Value::as_str).unwrap_or("").to_owned();
    let id = value.get("id").and_then(Value::as_u64);
    if value.get("QMP").is_some() {
        Ok(Message::Greeting)
    } else if let Some(returned) = value.get("return") {
        Ok(Message::Return {
            id,
            value: returned.clone(),
        })
    } else if let Some(error) = value.get("error") {
        Ok(Message::Error {
            id,
            class: text(error.get("class")),
            description: text(error.get("desc")),
        })
    } else if let Some(name) = value.get("event").and_then(Value::as_str) {
        let data = value.get("data").cloned().unwrap_or(Value::Null);
        Ok(Message::Event(Event {
            name: name.to_owned(),
            data,
        }))
    } else {
        let line = String::from_utf8_lossy(line);
        Err(WireError::NotAMessage(line.chars().take(200).collect()))
    }
}

/// Cuts a byte stream into lines, empty ones left out.
#[derive(Debug, Default)]
pub struct LineSplitter {
    partial: Vec<u8>,
    lines: VecDeque<Vec<u8>>,
}

impl LineSplitter {
    /// Takes the next bytes.
    ///
    /// # Errors
    /// [`WireError::LineTooLong`].
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), WireError> {
        for piece in bytes.split_inclusive(|&b| b == b'\n') {
            self.partial.extend_from_slice(piece);
            if self.partial.len() > LINE_MAX_BYTES {
                return Err(WireError::LineTooLong);
            }
            if piece.ends_with(b"\n") {
                let line = std::mem::take(&mut self.partial);
                if !line.trim_ascii().is_empty() {
                    self.lines.push_back(line);
                }
            }
        }
        Ok(())
    }

    /// The next whole line.
    pub fn next_line(&mut self) -> Option<Vec<u8>> {
        self.lines.pop_front()
    }
}
