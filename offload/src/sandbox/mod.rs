//! What a card gives up once it is set up.
//!
//! A card reads bytes that a guest wrote. Should one of them find a hole, this is what is left:
//! the descriptors that are open, memory, threads, and an io_uring. In order, because each step
//! needs what a later one takes away:
//!
//! 1. Limits: no core file (it would hold keys), a cap on open descriptors.
//! 2. The bounding set of capabilities (root can; for others 5 does as much), then user and group,
//!    when asked for, with no supplementary groups.
//! 3. All capabilities: ambient, effective, permitted, inheritable.
//! 4. Not dumpable: no other process of the same user can attach or read the memory. After 2,
//!    which resets it.
//! 5. `no_new_privs`: nothing executed later gets more. Needed by 6 and 7 without root.
//! 6. Landlock: no file but those named, no TCP, no signals to others. As much of it as the
//!    kernel has; the [`Report`] says how much that is.
//! 7. seccomp: system calls from a list, several of them with certain arguments only; see
//!    [`Seccomp`]. Last, since the steps before make calls that the list does not have.
//!
//! Apply it after files, sockets and guest-independent memory are set up and *before* the first
//! thread starts: steps 2 to 6 concern the calling thread and its children only, so
//! [`SandboxBuilder::apply`] refuses to run beside other threads rather than leave them outside. The kernel's io_uring
//! workers count as threads too: make rings afterwards.
//!
//! What it does not do: seccomp does not see what an io_uring does. An attacker in the process
//! can open files through a ring, within Landlock and the user's permissions. Where the kernel
//! has no Landlock, that leaves the user's permissions; cards should have a user of their own.

mod landlock;
mod privileges;
mod seccomp;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use self::landlock::FileRules;
pub use self::landlock::LandlockLevel;
pub use self::privileges::User;
pub use self::seccomp::Seccomp;

/// Open descriptors that a card may have unless told otherwise.
const MAX_OPEN_FILES: u64 = 1024;

/// Why the sandbox was not applied. Steps before the failed one have been; end the process.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// There are threads already.
    #[error("the sandbox must be applied before threads start, but the process has {0}")]
    Threads(usize),
    /// A step failed.
    #[error("cannot {step}")]
    Step {
        /// What was tried.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// Another user was asked for by a process that is not root.
    #[error("cannot become another user: the program was not started by root")]
    NotRoot,
    /// A path that is to stay in reach cannot be opened.
    #[error("cannot keep {} in reach", path.display())]
    Path {
        /// The path.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Landlock failed, other than by being absent.
    #[error("cannot set up Landlock")]
    Landlock(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Landlock was required, and this kernel has not all of it.
    #[error("Landlock is required, but this kernel enforces it {0}")]
    LandlockMissing(LandlockLevel),
    /// The filter could not be made or installed.
    #[error("cannot set up the seccomp filter")]
    Seccomp(#[source] seccompiler::Error),
}

/// What was enforced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// User and group changed to, if any.
    pub user: Option<User>,
    /// Could the bounding set be emptied too? Only with CAP_SETPCAP; `no_new_privs` makes it
    /// matter little.
    pub bounding_set_emptied: bool,
    /// How much of Landlock this kernel has.
    pub landlock: LandlockLevel,
    /// The filter's mode.
    pub seccomp: Seccomp,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.user {
            Some(user) => write!(f, "user {}, group {}", user.uid, user.gid)?,
            None => f.write_str("user unchanged")?,
        }
        write!(
            f,
            ", no capabilities, Landlock {}, seccomp {}",
            self.landlock, self.seccomp
        )
    }
}

/// The sandbox; see the module's text.
#[derive(Debug)]
pub struct Sandbox;

impl Sandbox {
    /// Nothing but the open descriptors, with seccomp enforced.
    pub fn builder() -> SandboxBuilder {
        SandboxBuilder {
            user: None,
            max_open_files: MAX_OPEN_FILES,
            files: FileRules::default(),
            require_landlock: false,
            seccomp: Seccomp::Enforce,
            extra_calls: Vec::new(),
        }
    }
}

/// What is to stay in reach.
#[derive(Debug)]
#[must_use = "nothing is given up until `apply`"]
pub struct SandboxBuilder {
    user: Option<User>,
    max_open_files: u64,
    files: FileRules,
    require_landlock: bool,
    seccomp: Seccomp,
    extra_calls: Vec<i64>,
}

impl SandboxBuilder {
    /// Becomes this user and group. The program must run as root until then.
    pub fn user(mut self, user: User) -> Self {
        self.user = Some(user);
        self
    }

    /// Caps the number of open descriptors; the default is 1024.
    pub fn max_open_files(mut self, n: u64) -> Self {
        self.max_open_files = n;
        self
    }

    /// Leaves TCP ports in reach of Landlock; the system calls for sockets have to be allowed
    /// besides ([`Self::allow_calls`]).
    pub fn network(mut self) -> Self {
        self.files.network = true;
        self
    }

    /// Lets files be opened for reading at or below `path`.
    pub fn read(mut self, path: impl Into<PathBuf>) -> Self {
        self.files.read.push(path.into());
        self
    }

    /// Lets existing files be opened for reading and writing at or below `path`.
    pub fn read_write(mut self, path: impl Into<PathBuf>) -> Self {
        self.files.read_write.push(path.into());
        self
    }

    /// Lets files directly or further below `directory` be removed: a socket's own file, in the end.
    pub fn remove_in(mut self, directory: impl Into<PathBuf>) -> Self {
        self.files.remove.push(directory.into());
        self
    }

    /// Lets the file at `path`, a socket's own, be removed in the end. What is asked for is its
    /// folder: see [`Self::remove_in`].
    pub fn remove_file(self, path: &Path) -> Self {
        match path.parent() {
            Some(folder) if folder.as_os_str().is_empty() => self.remove_in("."),
            Some(folder) => self.remove_in(folder),
            None => self,
        }
    }

    /// Fails when the kernel cannot enforce all Landlock rules.
    pub fn require_landlock(mut self, required: bool) -> Self {
        self.require_landlock = required;
        self
    }

    /// What happens at a system call that is not on the list.
    pub fn seccomp(mut self, mode: Seccomp) -> Self {
        self.seccomp = mode;
        self
    }

    /// Adds system calls (`libc::SYS_*`) to the list.
    pub fn allow_calls(mut self, calls: &[i64]) -> Self {
        self.extra_calls.extend_from_slice(calls);
        self
    }

    /// Gives up the rest, for good.
    ///
    /// # Errors
    /// See [`SandboxError`]. Some steps may have been taken: the process should end.
    pub fn apply(self) -> Result<Report, SandboxError> {
        let threads = privileges::thread_count()?;
        if threads != 1 {
            return Err(SandboxError::Threads(threads));
        }
        // Paths are opened while the process still may.
        let files = self.files.open()?;
        let filters = seccomp::compile(self.seccomp, files.calls(), &self.extra_calls)?;

        privileges::limit_resources(self.max_open_files)?;
        let bounding_set_emptied = privileges::empty_bounding_set();
        if let Some(user) = self.user {
            privileges::become_user(user)?;
        }
        privileges::drop_capabilities()?;
        privileges::forbid_dumps()?;
        privileges::forbid_new_privileges()?;
        let landlock = files.enforce()?;
        if self.require_landlock && landlock != LandlockLevel::Fully {
            return Err(SandboxError::LandlockMissing(landlock));
        }
        seccomp::install(&filters)?;
        Ok(Report {
            user: self.user,
            bounding_set_emptied,
            landlock,
            seccomp: self.seccomp,
        })
    }
}

#[cfg(test)]
mod tests;
