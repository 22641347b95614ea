//! Conventions of the command line, as QEMU's `docs/interop/vhost-user.rst` ("Backend program
//! conventions") and `vhost-user.json` want them.
//!
//! - `--socket-path PATH` xor `--fd N`; PATH is used as it is, never made absolute, never
//!   shortened. N is a listening or a connected socket; SO_ACCEPTCONN tells which.
//! - `--print-capabilities` prints JSON and exits with 0, whatever else the command line says.
//! - Never daemonise; SIGTERM ends fast and clean ([`crate::stop`]); fail early, with a status
//!   that is not 0 and a text that says what to do.
//!
//! Sizes on command lines and in configuration files are read by [`parse_size`] everywhere, so
//! that `10G` means the same to every program.

mod args;
mod capabilities;
mod listener;
mod size;
mod socket;
mod user;

pub use args::{SocketArgs, parse_mode};
pub use capabilities::{Capabilities, capabilities_asked};
pub use listener::{FdError, ListenError, Listener};
pub use size::{SizeError, format_size, parse_size};
pub use socket::{SocketError, SocketFile, bind_packet_socket, bind_socket};
pub use user::parse_user;
