//! Network namespaces: where traffic stays.
//!
//! Two are made: the *guest's*, which has nothing but the TAP, and the *host's*, where the backend and
//! the servers live. Neither reaches the machine's own network.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;

use nix::sched::{CloneFlags, setns, unshare};
use thiserror::Error;

/// What went wrong with a namespace.
#[derive(Debug, Error)]
pub enum SpaceError {
    /// It could not be made.
    #[error("no network namespace can be made: run this as root")]
    Make(#[source] io::Error),
    /// A command in it failed.
    #[error("{command} failed: {text}")]
    Command {
        /// Which.
        command: String,
        /// What it said.
        text: String,
    },
}

/// A network namespace. It goes when the last process in it and this handle are gone.
#[derive(Debug)]
pub struct Space {
    file: File,
}

impl Space {
    /// A new namespace with only a loopback, which is up.
    ///
    /// # Errors
    /// No permission.
    pub fn new() -> Result<Self, SpaceError> {
        let make = || -> io::Result<File> {
            unshare(CloneFlags::CLONE_NEWNET)?;
            File::open("/proc/thread-self/ns/net")
        };
        let made = thread::spawn(make).join();
        let file = made
            .unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
            .map_err(SpaceError::Make)?;
        let space = Self { file };
        space.ip("link set lo up")?;
        Ok(space)
    }

    /// Runs something on a thread that is in the namespace.
    ///
    /// # Errors
    /// The namespace cannot be entered, or `work` fails.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                setns(&self.file, CloneFlags::CLONE_NEWNET)?;
                work()
            });
            inside
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
        })
    }

    /// Program and first arguments of a command that runs in it.
    #[must_use]
    pub fn enter(&self) -> (&'static Path, String) {
        let own = std::process::id();
        let fd = self.file.as_raw_fd();
        (
            Path::new("/usr/bin/nsenter"),
            format!("--net=/proc/{own}/fd/{fd}"),
        )
    }

    /// A command that runs in it.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let (nsenter, net) = self.enter();
        let mut command = Command::new(nsenter);
        command.arg(net).arg("--").arg(program).stdin(Stdio::null());
        command
    }

    /// Runs `ip` in it with these arguments.
    ///
    /// # Errors
    /// It fails.
    pub fn ip(&self, arguments: &str) -> Result<(), SpaceError> {
        let mut command = self.command("ip");
        command.args(arguments.split(' '));
        output(&mut command).map(drop)
    }

    /// Sets a kernel parameter of the namespace.
    ///
    /// # Errors
    /// There is none of this name.
    pub fn set(&self, name: &str, value: &str) -> io::Result<()> {
        let path = format!("/proc/sys/net/{name}");
        self.run(|| std::fs::write(path, value))
    }
}

/// Runs a command to its end.
///
/// # Errors
/// It does not start or fails.
pub fn output(command: &mut Command) -> Result<Output, SpaceError> {
    let failed = |text| SpaceError::Command {
        command: format!("{command:?}"),
        text,
    };
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    let mut command = Command::new(command.get_program())
        .args(command.get_args())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .and_then(std::process::Child::wait_with_output)
        .map_err(|error| failed(error.to_string()))?;
    if command.status.success() {
        return Ok(command);
    }
    command.stderr.extend_from_slice(&command.stdout);
    Err(failed(text(&command.stderr)))
}
