//! The control socket of a card: a Unix socket that speaks JSON lines.
//!
//! ```text
//! -> {"method":"stats"}
//! <- {"ok":{"requests":[{"labels":{"queue":"0"},"value":12}]}}
//! -> {"method":"resize","params":{"size":1}}
//! <- {"error":{"kind":"bad_params","message":"a volume cannot shrink"}}
//! ```
//!
//! One request a line, one response a line, in order. Every server answers `ping`, `version`,
//! `methods`, `stats` (JSON) and `metrics` (Prometheus text); a card adds its own methods.
//!
//! `events` subscribes: from then on the client gets what the card has to tell, a line each, between
//! the responses to whatever else it asks. It may stay silent for as long as it likes.
//!
//! ```text
//! -> {"method":"events"}
//! <- {"ok":{"subscribed":true}}
//! <- {"event":{"kind":"low_space","free_bytes":1048576}}
//! ```
//!
//! Events say that something changed, and what is so now stands in `stats`: a client that connects
//! late asks there. One that does not read is dropped once [`MAX_EVENT_BYTES`] wait for it, or after
//! the deadline of any response; the card does not wait for it.
//!
//! A method may also take the connection over ([`ControlServer::upgrade`]): behind its one response
//! line the stream is its own, for what is no JSON, like captured frames.
//!
//! Who may: the socket has mode 0600, and SO_PEERCRED must name root or the card's own user, also
//! when the file's mode was widened or the descriptor passed on. What they may cost: one thread,
//! [`MAX_CONNECTIONS`], [`MAX_LINE`] bytes a request, a deadline for each half-sent request and each
//! response not taken. Nothing blocks the thread but a method itself, which must be quick: long
//! work belongs in the card's own thread, with a method that asks how far it is.
//!
//! Rejected: HTTP (a parser more, for no client that we have), gRPC, D-Bus (a daemon more),
//! binary formats (people type into this socket with `socat`).

mod client;
mod events;
mod protocol;
mod server;
mod session;

pub use client::{ClientError, ControlClient, EventStream};
pub use events::EventSender;
pub use protocol::{ControlError, ControlErrorKind, MAX_LINE};
pub use server::{ControlServer, ControlThread, MAX_CONNECTIONS, ServeError, Takeover};
pub use session::MAX_EVENT_BYTES;

#[cfg(test)]
mod tests;
