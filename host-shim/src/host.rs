//! What this host offers: binaries, users, a run directory, an accelerator.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::accel::{self, KvmVerdict};
use crate::plan::{Env, UserId};
use crate::qemu::{Qemu, SANDBOX, Version};
use crate::spec::{AccelChoice, VmSpec};

/// Name of QEMU's binary.
pub const QEMU: &str = "qemu-system-x86_64";
/// Name of the block card's binary.
pub const BLOCK_CARD: &str = "vhost-blk";
/// Name of the network card's binary.
pub const NET_CARD: &str = "vhost-net";
/// Whom cards become under root when the spec names nobody.
pub const CARD_USER_DEFAULT: &str = "nobody";

/// What this host lacks.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// A binary is nowhere.
    #[error("there is no {name} {looked_in}; {help}")]
    NoBinary {
        /// Its name.
        name: String,
        /// Where was looked.
        looked_in: String,
        /// What to do.
        help: String,
    },
    /// QEMU cannot be run.
    #[error("cannot run {path}")]
    Qemu {
        /// The binary.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// QEMU's `--version` is not understood.
    #[error("{path} does not say its version as QEMU does: {output}")]
    QemuVersion {
        /// The binary.
        path: PathBuf,
        /// What it printed.
        output: String,
    },
    /// There is no such user.
    #[error("there is no user {0:?} for the cards; set [run] user to a name or UID:GID")]
    NoUser(String),
    /// Cards would run as root.
    #[error("cards do not run as root; set [run] user to somebody else")]
    RootUser,
    /// There is no place for sockets.
    #[error("XDG_RUNTIME_DIR is not set; set it, or [run] dir")]
    NoRuntimeDir,
}

/// Where binaries are looked for.
#[derive(Debug, Clone, Default)]
pub struct Binaries {
    /// QEMU; from PATH without it.
    pub qemu: Option<PathBuf>,
    /// QEMU's firmware folders.
    pub qemu_data: Vec<PathBuf>,
    /// Folder of the cards; the shim's own, then PATH, without it.
    pub card_dir: Option<PathBuf>,
}

/// Finds out what `spec` needs to know. Runs QEMU for its version, and the probe of /dev/kvm if the
/// spec leaves the accelerator open.
///
/// # Errors
/// See [`HostError`].
pub fn look_around(spec: &VmSpec, binaries: &Binaries) -> Result<Env, HostError> {
    Ok(Env {
        qemu: find_qemu(binaries)?,
        card: match spec.disks.as_slice() {
            [] => None,
            _ => Some(find_card(binaries.card_dir.as_deref(), BLOCK_CARD)?),
        },
        net_card: match spec.nics.as_slice() {
            [] => None,
            _ => Some(find_card(binaries.card_dir.as_deref(), NET_CARD)?),
        },
        run_dir: run_dir(spec)?,
        networks_dir: networks_dir(spec)?,
        kvm: (spec.accel == AccelChoice::Auto).then(probe_kvm),
        card_user: card_user(spec.user.as_deref())?,
    })
}

/// Asks the probe, as a child of its own.
#[must_use]
pub fn probe_kvm() -> KvmVerdict {
    match own_binary() {
        Some(shim) => accel::probe(&shim, accel::DEADLINE),
        None => KvmVerdict::Unavailable {
            reason: "the host-shim binary that probes it was not found".to_owned(),
        },
    }
}

/// The host-shim binary: this one, or the one beside a test binary.
fn own_binary() -> Option<PathBuf> {
    let me = std::env::current_exe().ok()?;
    if me.file_name()? == "host-shim" {
        return Some(me);
    }
    binary_dirs()
        .into_iter()
        .map(|dir| dir.join("host-shim"))
        .find(|path| path.is_file())
}

/// Folder of this binary, and the one above it: Cargo puts test binaries into `deps/`.
fn binary_dirs() -> Vec<PathBuf> {
    let me = std::env::current_exe().unwrap_or_default();
    me.ancestors().skip(1).take(2).map(Path::to_owned).collect()
}

/// QEMU: which, what release, what it can do.
///
/// # Errors
/// See [`HostError`].
pub fn find_qemu(binaries: &Binaries) -> Result<Qemu, HostError> {
    let path = match &binaries.qemu {
        Some(path) => path.clone(),
        None => in_path(QEMU).ok_or_else(|| HostError::NoBinary {
            name: QEMU.to_owned(),
            looked_in: "in PATH".to_owned(),
            help: "on Debian: apt-get install qemu-system-x86".to_owned(),
        })?,
    };
    let run = |args: &[&str]| {
        Command::new(&path)
            .args(args)
            .stdin(Stdio::null())
            .output()
            .map_err(|source| HostError::Qemu {
                path: path.clone(),
                source,
            })
    };
    let output = run(&["--version"])?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = Version::parse(&text).ok_or_else(|| HostError::QemuVersion {
        path: path.clone(),
        output: text.lines().next().unwrap_or("nothing").to_owned(),
    })?;
    // Options are carried out before help is given, so a QEMU without seccomp fails here.
    let has_sandbox = run(&["-sandbox", SANDBOX, "-machine", "help"])?
        .status
        .success();
    Ok(Qemu {
        path,
        version,
        has_sandbox,
        data_dirs: binaries.qemu_data.clone(),
    })
}

/// A card's binary: in `card_dir` if given, else beside the shim, else in PATH.
///
/// # Errors
/// [`HostError::NoBinary`].
pub fn find_card(card_dir: Option<&Path>, name: &str) -> Result<PathBuf, HostError> {
    let dirs = match card_dir {
        Some(dir) => vec![dir.to_owned()],
        None => binary_dirs(),
    };
    let beside = dirs
        .iter()
        .map(|dir| dir.join(name))
        .find(|path| path.is_file());
    let found = beside.or_else(|| {
        if card_dir.is_none() {
            in_path(name)
        } else {
            None
        }
    });
    found.ok_or_else(|| HostError::NoBinary {
        name: name.to_owned(),
        looked_in: match card_dir {
            Some(dir) => format!("in {}", dir.display()),
            None => "beside this binary or in PATH".to_owned(),
        },
        help: format!("build it with: cargo build --release -p {name}"),
    })
}

fn in_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The run directory of a VM.
///
/// # Errors
/// [`HostError::NoRuntimeDir`].
pub fn run_dir(spec: &VmSpec) -> Result<PathBuf, HostError> {
    match &spec.run_dir {
        Some(dir) => Ok(dir.clone()),
        None => default_run_dir(&spec.name),
    }
}

/// The run directory of a VM of this name whose spec names none.
///
/// # Errors
/// [`HostError::NoRuntimeDir`].
pub fn default_run_dir(name: &str) -> Result<PathBuf, HostError> {
    Ok(runtime_dir()?.join("offload").join(name))
}

/// Not in the run directory, which is one VM's.
fn networks_dir(spec: &VmSpec) -> Result<Option<PathBuf>, HostError> {
    let mut networks = spec.nics.iter().filter_map(|nic| nic.network.as_ref());
    let dir = || Ok(runtime_dir()?.join("offload-networks"));
    networks.next().map(|_| dir()).transpose()
}

fn runtime_dir() -> Result<PathBuf, HostError> {
    if is_root() {
        return Ok(PathBuf::from("/run"));
    }
    std::env::var_os("XDG_RUNTIME_DIR")
        .map(PathBuf::from)
        .ok_or(HostError::NoRuntimeDir)
}

/// Whom cards become: nobody else if the shim is not root.
///
/// # Errors
/// [`HostError::NoUser`], [`HostError::RootUser`].
pub fn card_user(user: Option<&str>) -> Result<Option<UserId>, HostError> {
    if !is_root() {
        return Ok(None);
    }
    let wanted = user.unwrap_or(CARD_USER_DEFAULT);
    let id = numeric(wanted).or_else(|| {
        let user = nix::unistd::User::from_name(wanted).ok()??;
        Some(UserId {
            uid: user.uid.as_raw(),
            gid: user.gid.as_raw(),
        })
    });
    match id {
        None => Err(HostError::NoUser(wanted.to_owned())),
        Some(UserId { uid: 0, .. } | UserId { gid: 0, .. }) => Err(HostError::RootUser),
        Some(id) => Ok(Some(id)),
    }
}

fn numeric(text: &str) -> Option<UserId> {
    let (uid, gid) = text.split_once(':')?;
    Some(UserId {
        uid: uid.parse().ok()?,
        gid: gid.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_taken_by_name_or_number_and_root_is_refused() {
        assert_eq!(numeric("12:34"), Some(UserId { uid: 12, gid: 34 }));
        assert_eq!(numeric("12"), None);
        if is_root() {
            assert_eq!(
                card_user(Some("12:34")).unwrap(),
                Some(UserId { uid: 12, gid: 34 })
            );
            assert!(card_user(None).unwrap().is_some_and(|u| u.uid != 0));
            assert!(matches!(card_user(Some("root")), Err(HostError::RootUser)));
            assert!(matches!(
                card_user(Some("no such user")),
                Err(HostError::NoUser(_))
            ));
        } else {
            assert_eq!(card_user(Some("no such user")).unwrap(), None);
        }
    }

    #[test]
    fn a_qemu_that_is_none_is_named() {
        let of = |path: &str| {
            find_qemu(&Binaries {
                qemu: Some(path.into()),
                ..Binaries::default()
            })
            .unwrap_err()
        };
        assert!(matches!(of("/nonexistent"), HostError::Qemu { .. }));
        assert!(matches!(of("/bin/true"), HostError::QemuVersion { .. }));
    }

    #[test]
    fn a_machine_needs_only_the_cards_that_it_has() {
        let dir = tempfile::tempdir().unwrap();
        let qemu = dir.path().join("qemu");
        let script = "#!/bin/sh\necho QEMU emulator version 7.2.22\n";
        std::fs::write(&qemu, script).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&qemu, mode).unwrap();
        std::fs::write(dir.path().join(NET_CARD), "").unwrap();
        let binaries = Binaries {
            qemu: Some(qemu),
            card_dir: Some(dir.path().to_owned()),
            ..Binaries::default()
        };
        let look = |sections: &str| {
            let text = format!(
                "[vm]\nname = 'x'\nmemory = '64M'\naccel = 'tcg'\nkernel = 'k'\n{sections}\n\
                 [run]\ndir = '/run/x'\n"
            );
            let spec = crate::spec::parse(&text, Path::new("/vm.toml")).unwrap();
            look_around(&spec, &binaries)
        };
        let env = look("[[nic]]").unwrap();
        assert_eq!((env.card, env.net_card.is_some()), (None, true));
        let error = look("[[nic]]\n[[disk]]\nvolume = 'v'\nkey-file = 'k'").unwrap_err();
        assert!(error.to_string().contains(BLOCK_CARD), "{error}");
    }

    #[test]
    fn a_card_is_looked_for_only_where_it_was_said_to_be() {
        let dir = tempfile::tempdir().unwrap();
        let error = find_card(Some(dir.path()), "vhost-blk")
            .unwrap_err()
            .to_string();
        assert!(error.contains(&dir.path().display().to_string()), "{error}");
        let error = find_card(Some(dir.path()), NET_CARD).unwrap_err();
        assert!(error.to_string().ends_with("-p vhost-net"), "{error}");
        std::fs::write(dir.path().join("vhost-blk"), "").unwrap();
        assert!(find_card(Some(dir.path()), "vhost-blk").is_ok());
    }
}
