//! One connection to the metadata service: HTTP/1.1 without I/O.
//!
//! Bytes come in by [`TcpService::receive`], answers lie in [`TcpService::output`]. Requests are
//! taken one after the other (pipelining), as long as less than [`OUTPUT_MAX`] waits for the guest;
//! input that waits meanwhile is bounded too, and a guest that sends more than that is cut off.
//!
//! A request has [`REQUEST_TIME`] from its first byte to its last, however it dribbles, a kept
//! connection may idle for [`IDLE_TIME`], and output that the guest does not take counts as idling.
//!
//! No transfer codings and no bodies but short ones with PUT, so there are no two opinions on where
//! a request ends; what is unclear is answered with 400 and the end of the connection.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::Imds;
use super::token::TTL_MAX;
use super::tree::{Found, VERSIONS};
use crate::local::TcpService;

/// Longest head of a request, in bytes.
pub const HEAD_MAX: usize = 8 << 10;
/// Most header fields of a request.
pub const FIELDS_MAX: usize = 64;
/// Longest body of a PUT, which is read and forgotten.
pub const BODY_MAX: usize = 1 << 10;
/// While this much waits for the guest, no further request is taken.
pub const OUTPUT_MAX: usize = 64 << 10;
/// From the first byte of a request to its last.
pub const REQUEST_TIME: Duration = Duration::from_secs(10);
/// Between requests.
pub const IDLE_TIME: Duration = Duration::from_secs(30);

/// Input that may wait: what one head needs, twice, for pipelined requests.
const INPUT_MAX: usize = 2 * HEAD_MAX;
/// TTL of ordinary answers.
const HOP_LIMIT: u8 = 64;

/// A connection.
#[derive(Debug)]
pub struct Connection {
    imds: Arc<Imds>,
    input: Vec<u8>,
    output: VecDeque<u8>,
    /// When the first byte of the request came that is not complete.
    began: Option<Instant>,
    /// When anything last happened.
    active: Instant,
    /// The guest has closed its half.
    is_ended: bool,
    /// No further request is taken.
    is_closing: bool,
    /// A PUT was seen: from then on answers go out with the short TTL.
    has_put: bool,
}

/// What matters of a request once it is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Method {
    Put,
    Head,
    Other,
}

/// What is sent back.
struct Answer {
    status: &'static str,
    body: String,
    kind: &'static str,
    /// Seconds that the token is good for.
    ttl: Option<u32>,
    /// For 405.
    allow: Option<&'static str>,
}

/// A request that is complete.
struct Request<'a> {
    method: &'a str,
    path: &'a str,
    token: Option<&'a [u8]>,
    ttl: Option<&'a [u8]>,
    is_forwarded: bool,
    keeps: bool,
    /// Bytes of head and body.
    length: usize,
}

/// What is at the front of the input.
enum Parsed<'a> {
    Partial,
    Request(Request<'a>),
    Bad(&'static str),
}

impl Connection {
    pub(super) fn new(imds: Arc<Imds>, now: Instant) -> Self {
        Self {
            imds,
            input: Vec::new(),
            output: VecDeque::new(),
            began: None,
            active: now,
            is_ended: false,
            is_closing: false,
            has_put: false,
        }
    }

    /// Takes requests as long as there are complete ones and room for answers.
    fn work(&mut self, now: Instant) {
        while !self.is_closing && self.output.len() < OUTPUT_MAX {
            let (answer, method, keeps, length) = match parse(&self.input) {
                Parsed::Partial => {
                    self.is_closing = self.is_ended;
                    break;
                }
                Parsed::Bad(status) => (
                    Answer::error(status),
                    Method::Other,
                    false,
                    self.input.len(),
                ),
                Parsed::Request(request) => {
                    let answer = self.imds.answer(&request, now);
                    let method = match request.method {
                        "PUT" => Method::Put,
                        "HEAD" => Method::Head,
                        _ => Method::Other,
                    };
                    (answer, method, request.keeps, request.length)
                }
            };
            self.has_put |= method == Method::Put;
            self.imds.count(&answer, method == Method::Put);
            self.is_closing = !keeps;
            self.output.extend(answer.head(keeps).bytes());
            if method != Method::Head {
                self.output.extend(answer.body.bytes());
            }
            self.input.drain(..length.min(self.input.len()));
            self.began = (!self.input.is_empty()).then_some(now);
        }
        if self.is_closing {
            self.input = Vec::new();
            self.began = None;
        } else if self.input.len() > INPUT_MAX {
            // It sends and does not read.
            self.output.clear();
            self.input = Vec::new();
            self.is_closing = true;
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.imds.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

impl TcpService for Connection {
    fn receive(&mut self, data: &[u8], now: Instant) {
        self.active = now;
        if self.is_closing {
            return;
        }
        self.began = self.began.or(Some(now));
        // What is above the bound ends the connection in any case.
        let room = (INPUT_MAX + 1).saturating_sub(self.input.len());
        self.input.extend(data.iter().take(room));
        self.work(now);
    }

    fn end(&mut self, now: Instant) {
        self.is_ended = true;
        self.work(now);
    }

    fn output(&mut self) -> &mut VecDeque<u8> {
        // The data path comes by here whenever it has taken something: what waited for room goes on.
        if self.output.len() < OUTPUT_MAX && !self.input.is_empty() {
            self.work(self.active);
        }
        &mut self.output
    }

    fn is_done(&self) -> bool {
        self.is_closing
    }

    fn deadline(&self) -> Option<Instant> {
        let idle = self.active.checked_add(IDLE_TIME);
        let request = self.began.and_then(|began| began.checked_add(REQUEST_TIME));
        idle.into_iter().chain(request).min()
    }

    fn hop_limit(&self) -> u8 {
        if self.has_put {
            self.imds.hop_limit
        } else {
            HOP_LIMIT
        }
    }
}

fn parse(input: &[u8]) -> Parsed<'_> {
    const BAD: Parsed<'static> = Parsed::Bad("400 Bad Request");
    let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let mut parsed = httparse::Request::new(&mut fields);
    let head = match parsed.parse(input) {
        Ok(httparse::Status::Complete(length)) if length <= HEAD_MAX => length,
        Ok(httparse::Status::Partial) if input.len() <= HEAD_MAX => return Parsed::Partial,
        Ok(_) | Err(httparse::Error::TooManyHeaders) => {
            return Parsed::Bad("431 Request Header Fields Too Large");
        }
        Err(_) => return BAD,
    };
    let (Some(method), Some(path), Some(version)) = (parsed.method, parsed.path, parsed.version)
    else {
        return BAD;
    };
    let mut request = Request {
        method,
        path,
        token: None,
        ttl: None,
        is_forwarded: false,
        keeps: version == 1,
        length: head,
    };
    let mut body: Option<usize> = None;
    for field in parsed.headers.iter() {
        let is = |name: &str| field.name.eq_ignore_ascii_case(name);
        if is("X-aws-ec2-metadata-token") {
            request.token = Some(field.value);
        } else if is("X-aws-ec2-metadata-token-ttl-seconds") {
            request.ttl = Some(field.value);
        } else if is("X-Forwarded-For") {
            request.is_forwarded = true;
        } else if is("Connection") {
            let says = |word: &[u8]| {
                let mut words = field.value.split(|byte| *byte == b',');
                words.any(|it| it.trim_ascii().eq_ignore_ascii_case(word))
            };
            request.keeps = !says(b"close") && (request.keeps || says(b"keep-alive"));
        } else if is("Transfer-Encoding") {
            return BAD;
        } else if is("Content-Length") {
            let length = number(field.value).and_then(|length| usize::try_from(length).ok());
            match (length, body) {
                (Some(length), None) => body = Some(length),
                // RFC 9112, 6.3: several lengths are an attack or a mistake.
                _ => return BAD,
            }
        }
    }
    let body = body.unwrap_or(0);
    if body > 0 && method != "PUT" {
        return BAD;
    }
    if body > BODY_MAX {
        return Parsed::Bad("413 Content Too Large");
    }
    request.length = head + body;
    if input.len() < request.length {
        return Parsed::Partial;
    }
    Parsed::Request(request)
}

/// A number of nothing but digits.
fn number(text: &[u8]) -> Option<u32> {
    let text = text.trim_ascii();
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

impl Imds {
    fn answer(&self, request: &Request<'_>, now: Instant) -> Answer {
        const TOKEN: &str = "latest/api/token";
        if !self.is_enabled {
            return Answer::error("403 Forbidden");
        }
        let path = request.path.split(['?', '#']).next().unwrap_or_default();
        let is_token = path.trim_matches('/') == TOKEN;
        match request.method {
            "PUT" if is_token => self.issue(request, now),
            "GET" | "HEAD" if !is_token => self.read(request, path, now),
            _ => Answer {
                allow: Some(if is_token { "PUT" } else { "GET, HEAD" }),
                ..Answer::error("405 Method Not Allowed")
            },
        }
    }

    fn issue(&self, request: &Request<'_>, now: Instant) -> Answer {
        if request.is_forwarded {
            return Answer::error("403 Forbidden");
        }
        match request.ttl.and_then(number) {
            Some(ttl @ 1..=TTL_MAX) => Answer {
                ttl: Some(ttl),
                ..Answer::text(self.tokens.issue(ttl, now))
            },
            _ => Answer::error("400 Bad Request"),
        }
    }

    fn read(&self, request: &Request<'_>, path: &str, now: Instant) -> Answer {
        let ttl = match request.token {
            Some(token) => match self.tokens.check(token.trim_ascii(), now) {
                Some(left) => Some(left),
                None => return Answer::error("401 Unauthorized"),
            },
            None if self.has_version_1 => None,
            None => return Answer::error("401 Unauthorized"),
        };
        let mut names = path.split('/').filter(|name| !name.is_empty());
        let answer = match names.next() {
            None => Answer::text(VERSIONS.join("\n")),
            Some(version) if VERSIONS.contains(&version) => match self.tree.find(names) {
                Some(Found::Listing(text)) => Answer::text(text),
                Some(Found::Text(text)) => Answer::text(text.to_owned()),
                None => Answer::error("404 Not Found"),
            },
            Some(_) => Answer::error("404 Not Found"),
        };
        Answer { ttl, ..answer }
    }

    fn count(&self, answer: &Answer, is_token: bool) {
        let stats = &self.stats;
        let counter: &AtomicU64 = match answer.status.get(..3) {
            Some("200") if is_token => &stats.tokens,
            Some("200") => &stats.found,
            Some("401" | "403") => &stats.refused,
            _ => &stats.failed,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

impl Answer {
    fn text(body: String) -> Self {
        Self {
            status: "200 OK",
            body,
            kind: "text/plain",
            ttl: None,
            allow: None,
        }
    }

    fn error(status: &'static str) -> Self {
        let (code, reason) = status.split_once(' ').unwrap_or((status, ""));
        Self {
            status,
            body: format!(
                "<?xml version=\"1.0\" encoding=\"iso-8859-1\"?>\n\
                 <html><head><title>{code} - {reason}</title></head>\
                 <body><h1>{code} - {reason}</h1></body></html>\n"
            ),
            kind: "text/html",
            ttl: None,
            allow: None,
        }
    }

    fn head(&self, keeps: bool) -> String {
        let mut head = format!(
            "HTTP/1.1 {}\r\nServer: EC2ws\r\nContent-Type: {}\r\nContent-Length: {}\r\n",
            self.status,
            self.kind,
            self.body.len()
        );
        // Writing to a string does not fail.
        if let Some(ttl) = self.ttl {
            let _ = write!(head, "X-Aws-Ec2-Metadata-Token-Ttl-Seconds: {ttl}\r\n");
        }
        if let Some(allow) = self.allow {
            let _ = write!(head, "Allow: {allow}\r\n");
        }
        let connection = if keeps { "keep-alive" } else { "close" };
        let _ = write!(head, "Connection: {connection}\r\n\r\n");
        head
    }
}

#[cfg(test)]
mod tests;
