//! The run directory: sockets of one VM, and the lock that keeps a second shim away.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::fs::{
    DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _,
};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

use crate::plan::{CardPlan, Plan};

/// Why there is no run directory.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    /// It cannot be made.
    #[error("cannot prepare the run directory {path}")]
    Prepare {
        /// The directory, or what in it.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Somebody else could replace what is in it.
    #[error("{path} {problem}; choose another [run] dir")]
    NotOurs {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Another shim runs this VM.
    #[error("another host-shim runs this VM already (it holds {lock})")]
    Busy {
        /// The lock file.
        lock: PathBuf,
    },
}

/// A run directory that is ours until this is dropped.
#[derive(Debug)]
pub struct RunDir {
    cards: Vec<CardPlan>,
    qmp: PathBuf,
    // Held, never read. The file stays: removing a lock file lets two shims lock two files.
    _lock: File,
}

impl RunDir {
    /// Makes the directory and those of the cards, takes the lock, clears sockets that a killed
    /// shim left.
    ///
    /// # Errors
    /// See [`RunDirError`].
    pub fn prepare(plan: &Plan) -> Result<Self, RunDirError> {
        let dir = &plan.run_dir;
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| RunDirError::Prepare { path, source }
        };
        if let Some(parent) = dir.parent() {
            DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(parent)
                .map_err(failed(parent))?;
        }
        make_own(dir)?;
        let lock_path = dir.join("lock");
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&lock_path)
            .map_err(failed(&lock_path))?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(RunDirError::Busy { lock: lock_path });
            }
            Err(e) => return Err(failed(&lock_path)(e.into())),
        }
        let others_pass = plan.cards.iter().any(|c| c.owner.is_some());
        let mode = if others_pass { 0o711 } else { 0o700 };
        fs::set_permissions(dir, fs::Permissions::from_mode(mode)).map_err(failed(dir))?;
        for card in &plan.cards {
            // A directory left by another user's card is made anew, so that its owner is right.
            remove_card_dir(card).map_err(failed(&card.dir))?;
            make_own(&card.dir)?;
            if let Some(owner) = card.owner {
                std::os::unix::fs::lchown(&card.dir, Some(owner.uid), Some(owner.gid))
                    .map_err(failed(&card.dir))?;
            }
        }
        remove_socket(&plan.qmp).map_err(failed(&plan.qmp))?;
        Ok(Self {
            cards: plan.cards.clone(),
            qmp: plan.qmp.clone(),
            _lock: lock,
        })
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        // What stays behind is cleared by the next start.
        for card in &self.cards {
            let _ = remove_card_dir(card);
        }
        let _ = remove_socket(&self.qmp);
    }
}

/// Removes a socket if it is there and is one.
pub(super) fn remove_socket(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.file_type().is_socket() => fs::remove_file(path),
        Ok(_) => Err(io::Error::other("there is something that is not a socket")),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    }
}

fn remove_card_dir(card: &CardPlan) -> io::Result<()> {
    remove_socket(&card.socket)?;
    remove_socket(&card.control_socket)?;
    match fs::remove_dir(&card.dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Makes a directory of mode 0700, or takes one that is there, ours, and writable by us alone.
fn make_own(dir: &Path) -> Result<(), RunDirError> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Ok(()) => return Ok(()),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        Err(source) => {
            return Err(RunDirError::Prepare {
                path: dir.to_owned(),
                source,
            });
        }
    }
    let meta = fs::symlink_metadata(dir).map_err(|source| RunDirError::Prepare {
        path: dir.to_owned(),
        source,
    })?;
    let problem = if !meta.is_dir() {
        "is not a directory"
    } else if meta.uid() != rustix::process::geteuid().as_raw() {
        "belongs to another user"
    } else if meta.mode() & 0o022 != 0 {
        "can be written by other users"
    } else {
        return Ok(());
    };
    Err(RunDirError::NotOurs {
        path: dir.to_owned(),
        problem,
    })
}
