//! A small guest: Debian's cloud kernel, unmodified, and an initial RAM disk with busybox, a few
//! programs of the host and a script.
//!
//! The kernel comes from the Debian package, fetched with `apt-get download` (which checks its
//! signature), unpacked into a cache, never installed. Modules that the kernel does not have built
//! in are put into the RAM disk with what they depend on. The RAM disk is not compressed: it lives
//! for seconds, and under TCG unpacking costs more than reading.
//!
//! `/init` mounts what a program expects, loads the modules in order, runs the script given, and
//! powers the machine off. Kernel parameters of the form `name=value` that the kernel does not know
//! reach the script as environment variables: that is how one RAM disk does different things.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

pub mod cpio;
mod fetch;
mod modules;

pub use fetch::{Kernel, cache_dir, kernel};

/// Modules that a guest needs for a virtio disk and a file system on it.
pub const MODULES: [&str; 3] = ["virtio_pci", "virtio_blk", "ext4"];

/// Kernel parameters: serial console, quiet, and nothing that only costs time in a throw-away guest.
pub const CMDLINE: &str = "console=ttyS0 quiet loglevel=4 panic=-1 nokaslr mitigations=off \
    random.trust_cpu=on no_timer_check 8250.nr_uarts=1";

/// Why there is no guest.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// A file or folder.
    #[error("cannot {action} {path}")]
    File {
        /// What was tried.
        action: &'static str,
        /// The path.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A program cannot be run.
    #[error("cannot run {program}; {help}")]
    Run {
        /// The program.
        program: String,
        /// What to do.
        help: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// A program failed.
    #[error("`{command}` failed: {output}")]
    Failed {
        /// Its command line.
        command: String,
        /// The last of what it printed.
        output: String,
    },
    /// A package does not look as it should.
    #[error("{what}; was the archive changed?")]
    Unexpected {
        /// What is missing.
        what: String,
    },
    /// The kernel has no such module.
    #[error("the kernel {release} has no module {module}")]
    NoModule {
        /// Kernel release.
        release: String,
        /// Module.
        module: String,
    },
    /// A program of the host is missing.
    #[error("there is no program {0}; install its Debian package")]
    NoProgram(String),
    /// A file is too large for the archive format.
    #[error(transparent)]
    Archive(#[from] cpio::CpioError),
}

/// What goes into a RAM disk besides busybox and `/init`.
#[derive(Debug, Clone, Default)]
pub struct Initrd<'a> {
    /// Modules, loaded in this order, each after what it depends on.
    pub modules: &'a [&'a str],
    /// Programs of the host by name, with the libraries they need; found in PATH and `/sbin`. Call
    /// them `/sbin/NAME` in the guest: its shell takes busybox's program of a bare name first.
    pub programs: &'a [&'a str],
    /// Other files: path in the guest, content.
    pub files: &'a [(&'a str, &'a [u8])],
    /// Shell script that the guest runs; it is powered off afterwards.
    pub script: &'a str,
}

const INIT: &str = "#!/bin/busybox sh
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/ TERM=dumb
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /tmp
while read -r module; do insmod \"$module\"; done < /modules
sh /script
sync
poweroff -f
";

impl Initrd<'_> {
    /// Builds the archive, uncompressed.
    ///
    /// # Errors
    /// See [`GuestError`].
    pub fn build(&self, kernel: &Kernel) -> Result<Vec<u8>, GuestError> {
        let busybox = find_program("busybox")?;
        let mut tree = Tree::default();
        for dir in ["proc", "sys", "dev", "tmp", "mnt", "root"] {
            tree.dir(dir);
        }
        tree.file("bin/busybox", read(&busybox)?, 0o755);
        let applets = output(
            Command::new(&busybox).arg("--list"),
            "apt-get install busybox-static",
        )?;
        for &name in self.programs {
            let path = find_program(name)?;
            for library in libraries(&path)? {
                tree.file(&relative(&library), read(&library)?, 0o755);
            }
            tree.file(&format!("sbin/{name}"), read(&path)?, 0o755);
        }
        for applet in applets.lines().filter(|a| *a != "busybox") {
            tree.link(&format!("bin/{applet}"), "/bin/busybox");
        }
        let mut order = String::new();
        for module in modules::closure(kernel, self.modules)? {
            let at = format!("lib/modules/{}.ko", module.name);
            order.push_str(&format!("/{at}\n"));
            tree.file(&at, module.content, 0o644);
        }
        tree.file("modules", order.into_bytes(), 0o644);
        for (path, content) in self.files {
            tree.file(path.trim_start_matches('/'), content.to_vec(), 0o755);
        }
        tree.file("script", self.script.as_bytes().to_vec(), 0o755);
        tree.file("init", INIT.as_bytes().to_vec(), 0o755);
        Ok(cpio::write(
            &tree.entries.into_values().collect::<Vec<_>>(),
        )?)
    }
}

/// Entries by path: parents sort before their children.
#[derive(Default)]
struct Tree {
    entries: BTreeMap<String, cpio::Entry>,
}

impl Tree {
    fn dir(&mut self, path: &str) {
        let entry = cpio::Entry {
            path: path.to_owned(),
            kind: cpio::Kind::Dir,
        };
        self.entries.entry(path.to_owned()).or_insert(entry);
    }

    fn add(&mut self, path: &str, kind: cpio::Kind) {
        for (at, _) in path.match_indices('/') {
            self.dir(&path[..at]);
        }
        self.entries.insert(
            path.to_owned(),
            cpio::Entry {
                path: path.to_owned(),
                kind,
            },
        );
    }

    fn file(&mut self, path: &str, content: Vec<u8>, mode: u32) {
        self.add(path, cpio::Kind::File { content, mode });
    }

    fn link(&mut self, path: &str, target: &str) {
        self.add(
            path,
            cpio::Kind::Link {
                target: target.to_owned(),
            },
        );
    }
}

fn relative(path: &Path) -> String {
    path.to_string_lossy().trim_start_matches('/').to_owned()
}

fn find_program(name: &str) -> Result<PathBuf, GuestError> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut dirs: Vec<PathBuf> = std::env::split_paths(&path).collect();
    dirs.extend(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from));
    dirs.into_iter()
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
        .ok_or_else(|| GuestError::NoProgram(name.to_owned()))
}

/// Shared libraries and the loader that a program needs, as `ldd` tells.
fn libraries(program: &Path) -> Result<Vec<PathBuf>, GuestError> {
    let mut command = Command::new("ldd");
    command.arg(program).env("LC_ALL", "C");
    let text = match output(&mut command, "apt-get install libc-bin") {
        Err(GuestError::Failed { output, .. }) if output.contains("not a dynamic executable") => {
            return Ok(Vec::new());
        }
        result => result?,
    };
    Ok(parse_ldd(&text))
}

/// Lines are `name => /path (address)`, `/path (address)` or `linux-vdso.so.1 (address)`.
fn parse_ldd(text: &str) -> Vec<PathBuf> {
    text.lines()
        .filter_map(|line| {
            let words = line.split_ascii_whitespace();
            words
                .into_iter()
                .find(|word| word.starts_with('/'))
                .map(PathBuf::from)
        })
        .collect()
}

fn read(path: &Path) -> Result<Vec<u8>, GuestError> {
    std::fs::read(path).map_err(file_error("read", path))
}

fn file_error<'a>(
    action: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> GuestError + use<'a> {
    move |source| GuestError::File {
        action,
        path: path.to_owned(),
        source,
    }
}

/// Runs a program to its end and returns what it printed.
fn output(command: &mut Command, help: &'static str) -> Result<String, GuestError> {
    let result = command.output().map_err(|source| GuestError::Run {
        program: command.get_program().to_string_lossy().into_owned(),
        help,
        source,
    })?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if result.status.success() {
        return Ok(text(&result.stdout));
    }
    let printed = text(&result.stdout) + &text(&result.stderr);
    let last = printed.lines().rev().take(5).collect::<Vec<_>>();
    Err(GuestError::Failed {
        command: format!("{command:?}"),
        output: last.into_iter().rev().collect::<Vec<_>>().join("; "),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ldd_is_read_without_the_vdso() {
        let text = "\tlinux-vdso.so.1 (0x00007ffd2a9e2000)\n\
            \tlibext2fs.so.2 => /lib/x86_64-linux-gnu/libext2fs.so.2 (0x00007f4ab1a5d000)\n\
            \t/lib64/ld-linux-x86-64.so.2 (0x00007f4ab1b4c000)\n";
        let expected = [
            "/lib/x86_64-linux-gnu/libext2fs.so.2",
            "/lib64/ld-linux-x86-64.so.2",
        ];
        assert_eq!(parse_ldd(text), expected.map(PathBuf::from));
    }

    #[test]
    fn parents_come_before_their_children() {
        let mut tree = Tree::default();
        tree.file("a/b/c", vec![1], 0o644);
        tree.link("a/b-link", "b");
        let paths: Vec<_> = tree.entries.keys().map(String::as_str).collect();
        assert_eq!(paths, ["a", "a/b", "a/b-link", "a/b/c"]);
    }
}
