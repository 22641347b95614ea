//! One client's connection, without its socket: bytes and the time in, lines out, bytes back.
//!
//! A client costs at most [`MAX_LINE`] bytes of input and one response. While a response waits
//! no further request is taken, so a client that does not read cannot make the output grow. Each
//! state has a deadline that progress in small steps does not move:
//!
//! | state | ends by |
//! |---|---|
//! | nothing sent, nothing waiting | [`IDLE`] after the last response |
//! | half a request | [`REQUEST`] after its first byte |
//! | response or event not taken | [`RESPONSE`] after it was made |
//! | subscribed, nothing sent, nothing waiting | never |

use std::time::{Duration, Instant};

use super::protocol::{ControlError, ControlErrorKind, MAX_LINE, Response};

pub(super) const IDLE: Duration = Duration::from_secs(300);
pub(super) const REQUEST: Duration = Duration::from_secs(5);
pub(super) const RESPONSE: Duration = Duration::from_secs(5);

/// Bytes of events and responses that may wait for a client.
pub const MAX_EVENT_BYTES: usize = 64 * 1024;
/// As good as never, and near enough for an `Instant`.
const NEVER: Duration = Duration::from_secs(10 * 365 * 86400);

#[derive(Debug)]
pub(super) struct Session {
    input: Vec<u8>,
    /// Bytes of `input` known to hold no newline.
    scanned: usize,
    output: Vec<u8>,
    sent: usize,
    deadline: Instant,
    closing: bool,
    is_subscribed: bool,
}

impl Session {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            input: Vec::new(),
            scanned: 0,
            output: Vec::new(),
            sent: 0,
            deadline: now + IDLE,
            closing: false,
            is_subscribed: false,
        }
    }

    /// A session that gets one error and ends.
    pub(super) fn refused(error: ControlError, now: Instant) -> Self {
        let mut session = Self::new(now);
        session.respond(&Response::Error(error), now);
        session.closing = true;
        session
    }

    /// From now on the client gets events.
    pub(super) fn subscribe(&mut self) {
        self.is_subscribed = true;
    }

    /// Queues an event, if the client subscribed. An error: too much waits for it already.
    pub(super) fn tell(&mut self, line: &[u8], now: Instant) -> Result<(), TooSlow> {
        if !self.is_subscribed || self.closing {
            return Ok(());
        }
        if self.output().len() + line.len() > MAX_EVENT_BYTES {
            return Err(TooSlow);
        }
        if !self.wants_output() {
            self.deadline = now + RESPONSE;
        }
        self.output.extend_from_slice(line);
        Ok(())
    }

    fn idle(&self) -> Duration {
        if self.is_subscribed { NEVER } else { IDLE }
    }

    /// Should more be read now?
    pub(super) fn wants_input(&self) -> bool {
        !self.closing && !self.wants_output()
    }

    /// Bytes to send now; empty when none wait.
    pub(super) fn output(&self) -> &[u8] {
        self.output.get(self.sent..).unwrap_or_default()
    }

    pub(super) fn wants_output(&self) -> bool {
        !self.output().is_empty()
    }

    /// Nothing is to be done any more.
    pub(super) fn is_over(&self, now: Instant) -> bool {
        (self.closing && !self.wants_output()) || now >= self.deadline
    }

    pub(super) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Takes bytes from the client. Call only after [`Session::wants_input`].
    pub(super) fn feed(&mut self, bytes: &[u8], now: Instant) {
        if self.input.is_empty() {
            self.deadline = now + REQUEST;
        }
        self.input.extend_from_slice(bytes);
    }

    /// The next whole line, without its newline, if no response waits. Answers lines that are too
    /// long by itself.
    pub(super) fn next_line(&mut self, now: Instant) -> Option<Vec<u8>> {
        while self.wants_input() {
            let fresh = self.input.get(self.scanned..).unwrap_or_default();
            let newline = fresh
                .iter()
                .position(|&b| b == b'\n')
                .map(|at| at + self.scanned);
            if newline.unwrap_or(self.input.len()) > MAX_LINE {
                let error = ControlError::new(
                    ControlErrorKind::BadRequest,
                    format!("the request is longer than {MAX_LINE} bytes"),
                );
                self.respond(&Response::Error(error), now);
                self.closing = true;
                self.input = Vec::new();
                return None;
            }
            let Some(newline) = newline else {
                self.scanned = self.input.len();
                return None;
            };
            let mut line: Vec<u8> = self.input.drain(..=newline).collect();
            self.scanned = 0;
            line.pop();
            if line.last() == Some(&b'\r') {
                line.pop();
            }
            if !line.is_empty() {
                return Some(line);
            }
            if self.input.is_empty() {
                self.deadline = now + self.idle();
            }
        }
        None
    }

    pub(super) fn respond(&mut self, response: &Response, now: Instant) {
        self.output = response.to_line();
        self.sent = 0;
        self.deadline = now + RESPONSE;
    }

    /// The client took `n` bytes of [`Session::output`].
    pub(super) fn sent(&mut self, n: usize, now: Instant) {
        self.sent += n;
        if !self.wants_output() {
            self.output = Vec::new();
            self.sent = 0;
            self.deadline = now
                + if self.input.is_empty() {
                    self.idle()
                } else {
                    REQUEST
                };
        }
    }
}

/// A client does not take its events.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TooSlow;

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn lines_come_out_one_by_one_and_only_when_the_answer_was_taken() {
        let now = Instant::now();
        let mut session = Session::new(now);
        session.feed(b"\n\r\none\r\ntw", now);
        assert_eq!(session.next_line(now), Some(b"one".to_vec()));
        session.respond(&Response::Ok(Value::Null), now);
        session.feed(b"o\n", now);
        assert_eq!(session.next_line(now), None);
        session.sent(3, now);
        assert_eq!(session.next_line(now), None);
        session.sent(session.output().len(), now);
        assert_eq!(session.next_line(now), Some(b"two".to_vec()));
    }

    #[test]
    fn a_line_of_the_limit_passes_and_one_byte_more_ends_the_session() {
        let now = Instant::now();
        let mut session = Session::new(now);
        session.feed(&vec![b'x'; MAX_LINE], now);
        assert_eq!(session.next_line(now), None);
        session.feed(b"\n", now);
        assert_eq!(session.next_line(now).unwrap().len(), MAX_LINE);
        session.feed(&vec![b'x'; MAX_LINE + 1], now);
        assert_eq!(session.next_line(now), None);
        assert!(
            session
                .output()
                .starts_with(b"{\"error\":{\"kind\":\"bad_request\"")
        );
        assert!(!session.wants_input());
        session.sent(session.output().len(), now);
        assert!(session.is_over(now));
    }

    #[test]
    fn a_client_that_drips_bytes_is_cut_off() {
        let start = Instant::now();
        let mut session = Session::new(start);
        for second in 0..5 {
            let now = start + second * SECOND;
            assert!(!session.is_over(now));
            session.feed(b"x", now);
            session.next_line(now);
        }
        assert!(session.is_over(start + REQUEST));
    }

    #[test]
    fn a_client_that_does_not_read_is_cut_off() {
        let start = Instant::now();
        let mut session = Session::new(start);
        session.respond(&Response::Ok(Value::Null), start);
        session.sent(1, start + 4 * SECOND);
        assert!(!session.is_over(start + 4 * SECOND));
        assert!(session.is_over(start + RESPONSE));
    }

    #[test]
    fn a_subscriber_may_be_silent_for_days_but_has_to_take_what_it_gets() {
        let start = Instant::now();
        let mut session = Session::new(start);
        assert_eq!(session.tell(b"early\n", start), Ok(()));
        assert!(!session.wants_output());
        session.subscribe();
        session.respond(&Response::Ok(Value::Null), start);
        assert_eq!(session.tell(b"event\n", start), Ok(()));
        assert_eq!(session.output(), b"{\"ok\":null}\nevent\n");
        session.sent(session.output().len(), start);
        let later = start + 100_000 * SECOND;
        assert!(!session.is_over(later));
        assert_eq!(session.tell(b"event\n", later), Ok(()));
        assert!(!session.is_over(later) && session.is_over(later + RESPONSE));
        let flood = vec![b'x'; MAX_EVENT_BYTES - 6];
        assert_eq!(session.tell(&flood, later), Ok(()));
        assert_eq!(session.tell(b"x", later), Err(TooSlow));
    }

    #[test]
    fn an_idle_client_may_stay_for_a_while() {
        let start = Instant::now();
        let mut session = Session::new(start);
        session.feed(b"\n", start);
        session.next_line(start);
        assert!(!session.is_over(start + IDLE - SECOND));
        assert!(session.is_over(start + IDLE));
    }
}
