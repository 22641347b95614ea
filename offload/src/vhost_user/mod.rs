//! The vhost-user control plane: what a frontend (QEMU, libblkio) says over its socket, and what
//! becomes of it.
//!
//! ```text
//!   socket       exactly one message at a time, file descriptors, the stop signal
//!     │ bytes, fds
//!   message      header and body ──► Request: every field and the number of descriptors checked
//!     │
//!   protocol     the state machine, without I/O ──► Actions and a Reply, or a Refusal
//!     │            └─ ring: when a ring runs
//!   connection   carries actions out on memory, in-flight region, queue threads and device;
//!     │          holds the error policy
//!   backend      queue threads for the life of the process, one frontend after the other
//!
//!   config_change   CONFIG_CHANGE_MSG, from any thread
//! ```
//!
//! Why this is our own and not a loop around `vhost`'s `BackendReqHandler`: see
//! `docs/control-plane.md` of this crate.

mod backend;
mod config_change;
mod connection;
pub mod message;
pub mod protocol;
pub mod ring;
mod socket;

pub use backend::{Backend, BackendError};
pub use config_change::{ConfigChangeNotifier, Notified};
