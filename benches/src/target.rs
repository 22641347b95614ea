//! The servers that are compared: how each makes its disk and is started.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use thiserror::Error;

use crate::job::QUEUE_SIZE;
use crate::results::{OURS, REFERENCES, TargetInfo};
use crate::server::{Server, ServerError};

/// The peers' program.
pub const QSD: &str = "qemu-storage-daemon";
/// What makes the LUKS file.
pub const QEMU_IMG: &str = "qemu-img";
/// The baseline.
pub const FIO: &str = "fio";

/// What went wrong before measuring.
#[derive(Debug, Error)]
pub enum TargetError {
    /// A file of ours.
    #[error("{path} cannot be written")]
    Write {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A program that makes a disk does not start.
    #[error("{program} does not start")]
    Start {
        /// Which.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// A program that makes a disk failed.
    #[error("{program} failed: {text}")]
    Failed {
        /// Which.
        program: String,
        /// What it said.
        text: String,
    },
    /// The server.
    #[error(transparent)]
    Server(#[from] ServerError),
}

/// A vhost-user server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The block card on an encrypted volume.
    Offload,
    /// `qemu-storage-daemon` on a plain file.
    QsdRaw,
    /// `qemu-storage-daemon` on the same kind of file as LUKS.
    QsdLuks,
}

/// Where programs and files are.
#[derive(Clone, Debug)]
pub struct Place {
    /// The card's program.
    pub card: PathBuf,
    /// A directory of ours on the file system that is measured.
    pub dir: PathBuf,
    /// Bytes of a disk.
    pub disk_len: u64,
    /// Queues of a server.
    pub queues: u16,
}

impl Kind {
    /// All, in the order of the columns.
    pub const ALL: [Self; 3] = [Self::Offload, Self::QsdRaw, Self::QsdLuks];

    /// Programs that have to be on PATH.
    #[must_use]
    pub const fn needs(self) -> &'static [&'static str] {
        match self {
            Self::Offload => &[],
            Self::QsdRaw => &[QSD],
            Self::QsdLuks => &[QSD, QEMU_IMG],
        }
    }

    /// Name and description.
    #[must_use]
    pub fn info(self) -> TargetInfo {
        let [raw, luks] = REFERENCES;
        let (name, about) = match self {
            Self::Offload => (
                OURS,
                "vhost-blk, a thread a queue, on a volume file; AES-256-GCM, authenticated. It writes out of \
                 place: what a round's random writes scatter is moved together between the rounds, \
                 as it would be while a guest is idle, and not while anything is measured",
            ),
            Self::QsdRaw => (
                raw,
                "qemu-storage-daemon vhost-user-blk with an iothread on a raw file, cache.direct=on, \
                 aio=io_uring; no encryption",
            ),
            Self::QsdLuks => (
                luks,
                "the same on a LUKS file; AES-256-XTS, not authenticated",
            ),
        };
        TargetInfo {
            name: name.to_owned(),
            about: about.to_owned(),
        }
    }

    const fn stem(self) -> &'static str {
        match self {
            Self::Offload => "offload",
            Self::QsdRaw => "raw",
            Self::QsdLuks => "luks",
        }
    }

    /// The file that holds the disk.
    #[must_use]
    pub fn file(self, place: &Place) -> PathBuf {
        place.dir.join(self.stem()).with_extension("disk")
    }

    /// Where it listens.
    #[must_use]
    pub fn socket(self, place: &Place) -> PathBuf {
        place.dir.join(self.stem()).with_extension("sock")
    }

    /// Where it answers questions; only the card does.
    #[must_use]
    pub fn control(self, place: &Place) -> PathBuf {
        place.dir.join(self.stem()).with_extension("ctl")
    }

    fn key(self, place: &Place) -> PathBuf {
        place.dir.join(self.stem()).with_extension("key")
    }

    /// Makes the disk.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn create(self, place: &Place) -> Result<(), TargetError> {
        let (file, key) = (self.file(place), self.key(place));
        // Of no worth: the volumes are deleted with it.
        write_private(&key, &[b'k'; 32])?;
        match self {
            Self::Offload => run(
                &place.card,
                args([
                    "create",
                    "--size",
                    &place.disk_len.to_string(),
                    "--key-file",
                ])
                .chain([key.into(), file.into()]),
            ),
            Self::QsdRaw => File::create(&file)
                .and_then(|f| f.set_len(place.disk_len))
                .map_err(|source| TargetError::Write { path: file, source }),
            Self::QsdLuks => again_when_too_quick(|| {
                run(
                    Path::new(QEMU_IMG),
                    args(["create", "-q", "-f", "luks", "--object"])
                        .chain([secret(&key), "-o".into()])
                        .chain(args([
                            "key-secret=k,cipher-alg=aes-256,cipher-mode=xts,iter-time=100",
                        ]))
                        .chain([file.clone().into(), place.disk_len.to_string().into()]),
                )
            }),
        }
    }

    /// Serves the disk.
    ///
    /// # Errors
    /// The server does not start or does not listen.
    pub fn serve(self, place: &Place) -> Result<Server, TargetError> {
        let socket = self.socket(place);
        let log = place.dir.join(self.stem()).with_extension("log");
        let args = self.serve_args(place);
        let program = match self {
            Self::Offload => place.card.as_path(),
            Self::QsdRaw | Self::QsdLuks => Path::new(QSD),
        };
        Ok(Server::start(program, &args, &socket, log)?)
    }

    fn serve_args(self, place: &Place) -> Vec<OsString> {
        let (file, key, socket) = (self.file(place), self.key(place), self.socket(place));
        let protocol = join(
            "driver=file,node-name=file,cache.direct=on,aio=io_uring,filename=",
            &file,
        );
        // An iothread polls for a while before it sleeps. Without it the export is slower.
        let export = join(
            "type=vhost-user-blk,id=e,node-name=disk,writable=on,iothread=t,addr.type=unix,\
             addr.path=",
            &socket,
        );
        let queues = place.queues.to_string();
        let format = match self {
            Self::Offload => {
                return args(["serve", "--queues", &queues, "--queue-size"])
                    .chain([QUEUE_SIZE.to_string().into(), "--socket-path".into()])
                    .chain([socket.into(), "--volume".into(), file.into()])
                    .chain(["--key-file".into(), key.into()])
                    .chain(["--control-socket".into(), self.control(place).into()])
                    .chain(args(["--rehome-rate", "0"]))
                    .collect();
            }
            Self::QsdRaw => "driver=raw,node-name=disk,file=file,cache.direct=on",
            Self::QsdLuks => "driver=luks,node-name=disk,file=file,key-secret=k,cache.direct=on",
        };
        args(["--object", "iothread,id=t", "--object"])
            .chain([secret(&key), "--blockdev".into(), protocol])
            .chain(args(["--blockdev", format, "--export"]))
            .chain([join(&format!("num-queues={queues},"), Path::new(&export))])
            .collect()
    }
}

pub(crate) fn args<const N: usize>(texts: [&str; N]) -> impl Iterator<Item = OsString> {
    texts.map(OsString::from).into_iter()
}

fn join(text: &str, path: &Path) -> OsString {
    let mut joined = OsString::from(text);
    joined.push(path);
    joined
}

fn secret(key: &Path) -> OsString {
    join("secret,id=k,file=", key)
}

pub(crate) fn write_private(path: &Path, bytes: &[u8]) -> Result<(), TargetError> {
    File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut file| file.write_all(bytes))
        .map_err(|source| TargetError::Write {
            path: path.to_owned(),
            source,
        })
}

pub(crate) fn run(program: &Path, args: impl Iterator<Item = OsString>) -> Result<(), TargetError> {
    let name = program.display().to_string();
    let output = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .map_err(|source| TargetError::Start {
            program: name.clone(),
            source,
        })?;
    if output.status.success() {
        return Ok(());
    }
    Err(TargetError::Failed {
        program: name,
        text: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}

/// `qemu-img` measures how much key derivation fits into its `iter-time`, and gives up when the first
/// piece of it took less than a tick of its clock: chance, so it is asked again.
fn again_when_too_quick(create: impl Fn() -> Result<(), TargetError>) -> Result<(), TargetError> {
    const TRIES: u32 = 8;
    for _ in 1..TRIES {
        match create() {
            Err(TargetError::Failed { text, .. }) if text.contains(TOO_QUICK) => {}
            done => return done,
        }
    }
    create()
}

/// What it says then.
const TOO_QUICK: &str = "Unable to get accurate CPU usage";

/// Whether a program is on this PATH.
#[must_use]
pub fn is_on_path(program: &str, path: Option<OsString>) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.is_some_and(|path| {
        std::env::split_paths(&path).any(|dir| {
            dir.join(program)
                .metadata()
                .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place() -> Place {
        Place {
            card: "/bin/card".into(),
            dir: "/dir".into(),
            disk_len: 1 << 30,
            queues: 3,
        }
    }

    #[test]
    fn both_peers_go_around_the_page_cache_and_use_io_uring() {
        for kind in [Kind::QsdRaw, Kind::QsdLuks] {
            let args = kind.serve_args(&place());
            let text = args.join(&OsString::from(" ")).into_string().unwrap();
            assert_eq!(text.matches("cache.direct=on").count(), 2, "{text}");
            assert!(text.contains("aio=io_uring"), "{text}");
            assert!(text.contains("num-queues=3,"), "{text}");
            assert!(
                text.contains(&format!("addr.path=/dir/{}.sock", kind.stem())),
                "{text}"
            );
            assert_eq!(text.contains("driver=luks"), kind == Kind::QsdLuks);
        }
    }

    #[test]
    fn no_two_targets_share_a_file() {
        let files = Kind::ALL.map(|kind| kind.file(&place()));
        assert_ne!(files[0], files[1]);
        assert_ne!(files[1], files[2]);
        assert_ne!(files[0], files[2]);
    }

    #[test]
    fn only_programs_that_can_be_run_count_as_there() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("note"), "").unwrap();
        let path = || Some(dir.path().as_os_str().to_owned());
        assert!(!is_on_path("note", path()));
        assert!(!is_on_path("nothing", path()));
        assert!(is_on_path("sh", Some("/nowhere:/bin".into())));
        assert!(!is_on_path("sh", None));
    }

    #[test]
    fn only_a_measurement_that_was_too_quick_is_tried_again() {
        let tries = std::cell::Cell::new(0);
        let fails = |until: u32, text: &str| {
            tries.set(tries.get() + 1);
            if tries.get() > until {
                return Ok(());
            }
            Err(TargetError::Failed {
                program: QEMU_IMG.into(),
                text: text.into(),
            })
        };
        assert!(again_when_too_quick(|| fails(3, TOO_QUICK)).is_ok());
        assert_eq!(tries.replace(0), 4);
        assert!(again_when_too_quick(|| fails(99, TOO_QUICK)).is_err());
        assert!(tries.replace(0) < 20);
        assert!(again_when_too_quick(|| fails(1, "No space left on device")).is_err());
        assert_eq!(tries.get(), 1);
    }

    #[test]
    fn a_failing_program_is_quoted() {
        let error = run(
            Path::new("/bin/sh"),
            args(["-c", "echo disk full >&2; exit 1"]),
        );
        assert!(error.unwrap_err().to_string().contains("disk full"));
    }
}
