//! Runs a plan: cards, then QEMU, then whatever happens, until nothing is left running.
//!
//! ```text
//!            events                        actions
//! wait threads ─┐                        ┌─ start, signal (pidfd)
//! QMP thread   ─┼─► [`Machine`] (pure) ──┼─ QMP commands
//! signals      ─┤   given a `now`        ├─ notes for people
//! clock        ─┘                        └─ the outcome
//! ```
//!
//! [`machine`] decides; [`Vm`] carries out. One thread, the supervisor, starts every process and
//! lives until all of them are gone. That is not a matter of taste: `PR_SET_PDEATHSIG`, which takes
//! the children along when the shim is killed with SIGKILL, is tied to the *thread* that forked.
//!
//! A card is ready when its socket listens, which is looked up in `/proc/net/unix`. Connecting to it
//! would tell as well, but a vhost-user backend takes a connection for its frontend.
//!
//! A card that dies while the guest lives is started again, with growing pauses and a limit: QEMU
//! reconnects, the guest sees a pause. A card that dies before the guest was ever started is an
//! error: nobody is helped by trying a wrong key five times.

mod console;
pub mod machine;
mod process;
mod run_dir;
mod vm;

pub use console::{Console, EscapeReader, RawTerminal};
pub use machine::{End, Ending, Failure, Limits, Outcome};
pub use run_dir::{RunDir, RunDirError};
pub use vm::{LogSink, Options, StartError, Stopper, Vm};
