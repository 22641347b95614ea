//! DNS over TCP (RFC 7766): each message behind its length.
//!
//! ```text
//!  guest ─► stack ─► Connection ──questions──► Streams ──► Dns
//!  guest ◄─ stack ◄─ Connection ◄──answers──── Streams ◄───┘
//! ```
//!
//! A connection is the stack's, the resolver the services'; both belong to one queue's thread, so
//! the lock between them is never waited for. Questions may follow each other without waiting and
//! are answered in the order in which the answers come.
//!
//! # What a guest can hold
//! [`STREAMS_MAX`] connections, each with [`UNDER_WAY_MAX`] questions that were not answered and an
//! answer of 64 KiB for each; while it has as many, nothing more is taken. One that says nothing for
//! [`IDLE_TIME`], or dribbles a question for longer than [`QUESTION_TIME`], is cut.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::local::{FlowKey, TcpService};

/// Connections at once.
pub const STREAMS_MAX: usize = 32;
/// Questions of one connection that wait for their answers.
pub const UNDER_WAY_MAX: usize = 16;
/// Longest question, in bytes; one with every option there is has a few hundred.
pub const QUESTION_MAX: usize = 2048;
/// Between one question, or answer, and the next. Longer than a question may take.
pub const IDLE_TIME: Duration = Duration::from_secs(15);
/// From a question's first byte to its last.
pub const QUESTION_TIME: Duration = Duration::from_secs(5);

/// Bytes that wait to be taken: one question that is not whole, or that there is no room for.
const INPUT_MAX: usize = 2 * (2 + QUESTION_MAX);
/// A question's header.
const QUESTION_MIN: usize = 12;

/// A question from a stream.
#[derive(Debug)]
pub(crate) struct Question {
    pub(crate) stream: u64,
    pub(crate) key: FlowKey,
    pub(crate) message: Vec<u8>,
    at: Instant,
}

#[derive(Debug)]
struct Line {
    key: FlowKey,
    answers: VecDeque<u8>,
    under_way: usize,
}

#[derive(Debug, Default)]
struct Shared {
    lines: HashMap<u64, Line>,
    questions: VecDeque<Question>,
    last: u64,
}

/// The connections to one resolver.
#[derive(Debug, Default)]
pub struct Streams(Arc<Mutex<Shared>>);

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Streams {
    /// A new connection; none when there are too many.
    #[must_use]
    pub fn connect(&self, key: FlowKey, now: Instant) -> Option<Connection> {
        let mut shared = lock(&self.0);
        if shared.lines.len() >= STREAMS_MAX {
            return None;
        }
        shared.last += 1;
        let stream = shared.last;
        let line = Line {
            key,
            answers: VecDeque::new(),
            under_way: 0,
        };
        shared.lines.insert(stream, line);
        Some(Connection {
            shared: Arc::clone(&self.0),
            stream,
            key,
            input: Vec::new(),
            output: VecDeque::new(),
            began: None,
            active: now,
            is_ended: false,
            is_closing: false,
        })
    }

    /// When the oldest question that [`Self::take`] gives was asked.
    pub(crate) fn waiting_since(&self) -> Option<Instant> {
        lock(&self.0).questions.front().map(|question| question.at)
    }

    pub(crate) fn take(&self) -> Option<Question> {
        lock(&self.0).questions.pop_front()
    }

    /// Answers a question of a stream, or, with nothing, does not: whose turn it is then. `None`: it is
    /// gone.
    pub(crate) fn answer(&self, stream: u64, message: &[u8]) -> Option<FlowKey> {
        let mut shared = lock(&self.0);
        let line = shared.lines.get_mut(&stream)?;
        line.under_way = line.under_way.saturating_sub(1);
        if let Ok(len @ 1..) = u16::try_from(message.len()) {
            line.answers.extend(len.to_be_bytes());
            line.answers.extend(message);
        }
        Some(line.key)
    }
}

/// One connection.
#[derive(Debug)]
pub struct Connection {
    shared: Arc<Mutex<Shared>>,
    stream: u64,
    key: FlowKey,
    input: Vec<u8>,
    output: VecDeque<u8>,
    /// When the first byte of a question came that is not whole.
    began: Option<Instant>,
    /// When anything last happened.
    active: Instant,
    is_ended: bool,
    is_closing: bool,
}

impl Connection {
    /// Hands over the questions that are whole, as many as may be under way, and takes answers.
    fn work(&mut self) {
        let mut shared = lock(&self.shared);
        let Shared {
            lines, questions, ..
        } = &mut *shared;
        let Some(line) = lines.get_mut(&self.stream) else {
            self.is_closing = true;
            return;
        };
        self.output.append(&mut line.answers);
        let mut at = 0;
        while !self.is_closing && line.under_way < UNDER_WAY_MAX && self.output.len() < INPUT_MAX {
            let rest = self.input.get(at..).unwrap_or_default();
            let Some((len, rest)) = rest.split_first_chunk::<2>() else {
                break;
            };
            let len = usize::from(u16::from_be_bytes(*len));
            if !(QUESTION_MIN..=QUESTION_MAX).contains(&len) {
                // Not DNS: where the next message begins is anyone's guess.
                self.is_closing = true;
                break;
            }
            let Some(message) = rest.get(..len) else {
                break;
            };
            line.under_way += 1;
            questions.push_back(Question {
                stream: self.stream,
                key: self.key,
                message: message.to_vec(),
                at: self.active,
            });
            at += 2 + len;
        }
        if at > 0 {
            self.input.drain(..at);
            self.began = (!self.input.is_empty()).then_some(self.active);
        }
        let waits = line.under_way > 0;
        if self.input.len() > INPUT_MAX {
            self.is_closing = true;
        }
        if self.is_ended && !waits && line.under_way < UNDER_WAY_MAX {
            self.is_closing = true;
        }
        if self.is_closing {
            self.input = Vec::new();
            self.began = None;
        } else if waits {
            // Not the guest's fault.
            self.began = None;
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let mut shared = lock(&self.shared);
        shared.lines.remove(&self.stream);
        let stream = self.stream;
        shared
            .questions
            .retain(|question| question.stream != stream);
    }
}

impl TcpService for Connection {
    fn receive(&mut self, data: &[u8], now: Instant) {
        if self.is_closing {
            return;
        }
        self.active = now;
        self.began = self.began.or(Some(now));
        // What is above the bound ends the connection in any case.
        let room = (INPUT_MAX + 1).saturating_sub(self.input.len());
        self.input.extend(data.iter().take(room));
        self.work();
    }

    fn end(&mut self, now: Instant) {
        self.active = now;
        self.is_ended = true;
        self.work();
    }

    fn output(&mut self) -> &mut VecDeque<u8> {
        // The data path comes by here whenever it has taken something, and when there is an answer.
        if !self.is_closing {
            self.work();
        }
        &mut self.output
    }

    fn is_done(&self) -> bool {
        self.is_closing
    }

    fn deadline(&self) -> Option<Instant> {
        let idle = self.active.checked_add(IDLE_TIME);
        let question = self
            .began
            .and_then(|began| began.checked_add(QUESTION_TIME));
        idle.into_iter().chain(question).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(port: u16) -> FlowKey {
        FlowKey {
            protocol: 6,
            guest: ([10, 0, 2, 15], port).into(),
            peer: ([10, 0, 2, 3], 53).into(),
        }
    }

    fn framed(message: &[u8]) -> Vec<u8> {
        let len = u16::try_from(message.len()).unwrap();
        [&len.to_be_bytes()[..], message].concat()
    }

    fn said(connection: &mut Connection) -> Vec<u8> {
        connection.output().drain(..).collect()
    }

    #[test]
    fn questions_in_any_pieces_come_out_whole_and_answers_go_back_as_they_come() {
        let (streams, now) = (Streams::default(), Instant::now());
        let mut connection = streams.connect(key(1), now).unwrap();
        let both = [framed(&[1; 20]), framed(&[2; 30])].concat();
        for byte in &both {
            connection.receive(&[*byte], now);
        }
        assert_eq!(streams.waiting_since(), Some(now));
        let (one, two) = (streams.take().unwrap(), streams.take().unwrap());
        assert_eq!((one.message, two.message), (vec![1; 20], vec![2; 30]));
        assert!(streams.take().is_none() && streams.waiting_since().is_none());
        assert_eq!(streams.answer(two.stream, &[4; 3]), Some(key(1)));
        assert_eq!(streams.answer(one.stream, &[3; 2]), Some(key(1)));
        let wanted = [framed(&[4; 3]), framed(&[3; 2])].concat();
        assert_eq!(said(&mut connection), wanted);
        assert!(!connection.is_done());
    }

    #[test]
    fn a_half_closed_connection_is_answered_and_then_closed() {
        let (streams, now) = (Streams::default(), Instant::now());
        let mut connection = streams.connect(key(1), now).unwrap();
        connection.receive(&framed(&[1; 20]), now);
        connection.end(now);
        assert!(said(&mut connection).is_empty() && !connection.is_done());
        let question = streams.take().unwrap();
        streams.answer(question.stream, &[5; 12]);
        assert_eq!(said(&mut connection), framed(&[5; 12]));
        assert!(connection.is_done());
    }

    #[test]
    fn what_is_no_question_ends_the_connection() {
        for message in [&[0, 0][..], &[0, 11], &[0xff, 0xff], b"GET / HTTP/1.1\r\n"] {
            let (streams, now) = (Streams::default(), Instant::now());
            let mut connection = streams.connect(key(1), now).unwrap();
            connection.receive(message, now);
            assert!(connection.is_done(), "{message:?}");
            assert!(streams.take().is_none());
        }
    }

    #[test]
    fn a_guest_that_only_asks_is_stopped_and_then_cut_off() {
        let (streams, now) = (Streams::default(), Instant::now());
        let mut connection = streams.connect(key(1), now).unwrap();
        let mut sent = 0;
        while !connection.is_done() {
            connection.receive(&framed(&[1; 100]), now);
            sent += 1;
            assert!(sent < 1000);
        }
        let taken = std::iter::from_fn(|| streams.take()).count();
        assert_eq!(taken, UNDER_WAY_MAX);
    }

    #[test]
    fn what_waited_for_room_is_asked_when_answers_have_come() {
        let (streams, now) = (Streams::default(), Instant::now());
        let mut connection = streams.connect(key(1), now).unwrap();
        connection.receive(&framed(&[1; 12]).repeat(40), now);
        let mut answered = 0;
        while let Some(question) = streams.take() {
            streams.answer(question.stream, &[2; 12]);
            said(&mut connection);
            answered += 1;
        }
        assert_eq!(answered, 40);
        assert!(!connection.is_done());
    }

    #[test]
    fn connections_are_bounded_and_leave_nothing_behind() {
        let (streams, now) = (Streams::default(), Instant::now());
        let connect = |port| streams.connect(key(port), now);
        let mut all: Vec<_> = (0..STREAMS_MAX as u16)
            .map(|n| connect(n).unwrap())
            .collect();
        assert!(connect(99).is_none());
        all[0].receive(&framed(&[1; 12]), now);
        let stream = all[0].stream;
        drop(all);
        assert!(streams.take().is_none());
        assert_eq!(streams.answer(stream, &[1; 12]), None);
        assert!(connect(99).is_some());
    }

    #[test]
    fn a_dribbled_question_is_cut_off_and_an_idle_connection_too() {
        let (streams, start) = (Streams::default(), Instant::now());
        let mut connection = streams.connect(key(1), start).unwrap();
        assert_eq!(connection.deadline(), Some(start + IDLE_TIME));
        for second in 0..4 {
            connection.receive(&[0], start + Duration::from_secs(second));
            if second == 1 {
                assert!(connection.is_done(), "a length of 0");
            }
        }
        let mut connection = streams.connect(key(1), start).unwrap();
        for second in 1..4 {
            connection.receive(&[1], start + Duration::from_secs(second));
            let begun = start + Duration::from_secs(1);
            assert_eq!(connection.deadline(), Some(begun + QUESTION_TIME));
        }
    }
}
