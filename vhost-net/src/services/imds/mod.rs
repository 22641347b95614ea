//! The instance metadata service, as EC2 has it: version 2, with version 1 off unless asked for.
//!
//! ```text
//!  PUT /latest/api/token        X-aws-ec2-metadata-token-ttl-seconds: 1..21600  ─► a token
//!  GET /latest/meta-data/...    X-aws-ec2-metadata-token: ...                   ─► text
//! ```
//!
//! What version 2 is for: a request that an open proxy, a careless web application or a
//! misconfigured firewall was talked into cannot get at the metadata. It cannot be a PUT with a
//! header of its choice, a proxy adds `X-Forwarded-For` (403), and the answer to the PUT leaves
//! with a TTL of [`MetadataSpec::hop_limit`], 1 by default, so that it does not pass another router
//! such as a container's bridge.
//!
//! | request | answer |
//! |---|---|
//! | metadata disabled | 403 |
//! | PUT token: no, wrong or too long a time | 400 |
//! | PUT token with `X-Forwarded-For` | 403 |
//! | GET without a token, version 1 off; GET with a wrong or old token | 401 |
//! | GET of what is not there | 404 |
//! | other methods, PUT elsewhere, GET of the token | 405 |
//! | what HTTP does not know; a body with GET; transfer codings | 400 |
//! | header of more than [`connection::HEAD_MAX`] bytes | 431 |
//!
//! [`connection::Connection`] is one TCP connection as a state machine without I/O; the stack
//! carries its bytes. [`tree`] is what the paths name, [`token`] how tokens are made.
//!
//! One guest can hold [`CONNECTIONS_MAX`] connections of bounded buffers, each with a deadline for
//! the request that it began, so a guest that dribbles (slow loris) loses the connection, and it
//! harms only its own machine.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use crate::spec::Spec;

pub mod connection;
pub mod token;
pub mod tree;

pub use connection::Connection;
pub use tree::{MetadataError, MetadataSpec, interface_id};

use token::Tokens;
use tree::Node;

/// Connections at once.
pub const CONNECTIONS_MAX: usize = 64;
/// The port.
pub const PORT: u16 = 80;

/// What was answered.
#[derive(Debug, Default)]
pub struct ImdsStats {
    /// Tokens given.
    pub tokens: AtomicU64,
    /// Answers with 200 but for tokens.
    pub found: AtomicU64,
    /// Answers with 401 and 403.
    pub refused: AtomicU64,
    /// Other answers from 400 on.
    pub failed: AtomicU64,
    /// Connections beyond [`CONNECTIONS_MAX`].
    pub crowded: AtomicU64,
}

/// The service of one interface; its queues share it.
#[derive(Debug)]
pub struct Imds {
    is_enabled: bool,
    has_version_1: bool,
    hop_limit: u8,
    tree: Node,
    tokens: Tokens,
    connections: AtomicUsize,
    stats: ImdsStats,
}

impl Imds {
    /// `key` is fresh random bytes: tokens are good for as long as this object lives.
    ///
    /// # Errors
    ///
    /// What is wrong with the metadata.
    pub fn new(
        metadata: &MetadataSpec,
        spec: &Spec,
        key: [u8; 32],
        now: Instant,
    ) -> Result<Self, MetadataError> {
        Ok(Self {
            is_enabled: metadata.enabled,
            has_version_1: metadata.version_1,
            hop_limit: metadata.hop_limit,
            tree: metadata.tree(spec)?,
            tokens: Tokens::new(key, now),
            connections: AtomicUsize::new(0),
            stats: ImdsStats::default(),
        })
    }

    /// Counters.
    #[must_use]
    pub fn stats(&self) -> &ImdsStats {
        &self.stats
    }

    /// A new connection; none when there are too many.
    #[must_use]
    pub fn connect(self: &Arc<Self>, now: Instant) -> Option<Connection> {
        if self.connections.fetch_add(1, Ordering::Relaxed) >= CONNECTIONS_MAX {
            self.connections.fetch_sub(1, Ordering::Relaxed);
            self.stats.crowded.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        Some(Connection::new(Arc::clone(self), now))
    }
}
