//! Files, TCP and signals, by Landlock.

use std::fmt;
use std::path::PathBuf;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope,
};

use super::SandboxError;

/// Rules are written for this version (Linux 6.12). Older kernels enforce what they know.
const VERSION: ABI = ABI::V6;

/// How much of the rules the kernel enforces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LandlockLevel {
    /// All of it.
    Fully,
    /// What this older kernel knows.
    Partly,
    /// Nothing: Landlock is not built in, or not switched on.
    NotAtAll,
}

impl fmt::Display for LandlockLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fully => "fully",
            Self::Partly => "partly",
            Self::NotAtAll => "not at all",
        })
    }
}

#[derive(Debug, Default)]
pub(super) struct FileRules {
    pub(super) read: Vec<PathBuf>,
    pub(super) read_write: Vec<PathBuf>,
    pub(super) remove: Vec<PathBuf>,
    /// TCP ports stay in reach.
    pub(super) network: bool,
}

/// Rules whose paths are open.
#[derive(Debug)]
pub(super) struct OpenRules {
    rules: Vec<(PathFd, BitFlags<AccessFs>)>,
    opens: bool,
    removes: bool,
    network: bool,
}

impl FileRules {
    pub(super) fn open(self) -> Result<OpenRules, SandboxError> {
        let read = AccessFs::ReadFile | AccessFs::ReadDir;
        let read_write = read | AccessFs::WriteFile | AccessFs::Truncate | AccessFs::IoctlDev;
        let (opens, removes) = (
            !self.read.is_empty() || !self.read_write.is_empty(),
            !self.remove.is_empty(),
        );
        let mut rules = Vec::new();
        for (paths, access) in [
            (self.read, read),
            (self.read_write, read_write),
            (self.remove, AccessFs::RemoveFile.into()),
        ] {
            for path in paths {
                let refused =
                    |source: Box<dyn std::error::Error + Send + Sync>| SandboxError::Path {
                        path: path.clone(),
                        source,
                    };
                let directory = std::fs::metadata(&path)
                    .map_err(|error| refused(error.into()))?
                    .is_dir();
                let fd = PathFd::new(&path).map_err(|error| refused(error.into()))?;
                let access = if directory {
                    access
                } else {
                    access & AccessFs::from_file(VERSION)
                };
                rules.push((fd, access));
            }
        }
        Ok(OpenRules {
            rules,
            opens,
            removes,
            network: self.network,
        })
    }
}

impl OpenRules {
    /// Families of system calls that the rules make sense of.
    pub(super) fn calls(&self) -> super::seccomp::FileCalls {
        super::seccomp::FileCalls {
            open: self.opens,
            remove: self.removes,
        }
    }

    pub(super) fn enforce(self) -> Result<LandlockLevel, SandboxError> {
        self.restrict()
            .map_err(|error| SandboxError::Landlock(error.into()))
    }

    fn restrict(self) -> Result<LandlockLevel, landlock::RulesetError> {
        let ruleset = Ruleset::default()
            .handle_access(AccessFs::from_all(VERSION))?
            .scope(Scope::from_all(VERSION))?;
        let ruleset = if self.network {
            ruleset
        } else {
            ruleset.handle_access(AccessNet::from_all(VERSION))?
        };
        let mut ruleset = ruleset.create()?;
        for (fd, access) in self.rules {
            ruleset = ruleset.add_rule(PathBeneath::new(fd, access))?;
        }
        Ok(match ruleset.restrict_self()?.ruleset {
            RulesetStatus::FullyEnforced => LandlockLevel::Fully,
            RulesetStatus::PartiallyEnforced => LandlockLevel::Partly,
            RulesetStatus::NotEnforced => LandlockLevel::NotAtAll,
        })
    }
}
