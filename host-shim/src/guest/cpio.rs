//! Writes the archive format that Linux unpacks as its initial RAM disk: cpio "newc", as in the
//! kernel's `Documentation/driver-api/early-userspace/buffer-format.rst`.
//!
//! ```text
//! header   "070701" and 13 fields of 8 hex digits: inode, mode, uid, gid, links, mtime, size,
//!          device major, minor, rdev major, minor, length of the name with its zero, check (0)
//! name     with a zero, padded so that what follows starts at a multiple of 4
//! content  padded likewise; a symbolic link's content is its target
//! ...      and last an entry named TRAILER!!!
//! ```
//!
//! Everything belongs to root, and times are zero: the same input gives the same bytes.

use std::io::Write as _;

const TRAILER: &str = "TRAILER!!!";

/// What cannot be archived.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CpioError {
    /// A size does not fit into 32 bits.
    #[error("{0} is too large for a cpio archive")]
    TooLarge(String),
    /// A name is empty, absolute, or has a zero in it.
    #[error("{0:?} cannot name an entry of a cpio archive")]
    BadName(String),
}

/// One entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Relative path.
    pub path: String,
    /// What it is.
    pub kind: Kind,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A folder.
    Dir,
    /// A file.
    File {
        /// Content.
        content: Vec<u8>,
        /// Permissions.
        mode: u32,
    },
    /// A symbolic link.
    Link {
        /// Where it points.
        target: String,
    },
}

/// The archive of `entries`, in their order. A folder must come before what is in it.
///
/// # Errors
/// See [`CpioError`].
pub fn write(entries: &[Entry]) -> Result<Vec<u8>, CpioError> {
    let mut out = Vec::new();
    for (index, entry) in entries.iter().enumerate() {
        let name = &entry.path;
        if name.is_empty() || name.starts_with('/') || name.contains('\0') || name == TRAILER {
            return Err(CpioError::BadName(name.clone()));
        }
        let (mode, links, content) = match &entry.kind {
            Kind::Dir => (0o040_755, 2, &[][..]),
            Kind::File { content, mode } => (0o100_000 | (mode & 0o7777), 1, &content[..]),
            Kind::Link { target } => (0o120_777, 1, target.as_bytes()),
        };
        // Numbers of inodes only have to differ.
        let inode = u32::try_from(index + 1).map_err(|_| CpioError::TooLarge(name.clone()))?;
        write_entry(&mut out, name, inode, mode, links, content)?;
    }
    write_entry(&mut out, TRAILER, 0, 0, 1, &[])?;
    Ok(out)
}

fn write_entry(
    out: &mut Vec<u8>,
    name: &str,
    inode: u32,
    mode: u32,
    links: u32,
    content: &[u8],
) -> Result<(), CpioError> {
    let fit = |n: usize| u32::try_from(n).map_err(|_| CpioError::TooLarge(name.to_owned()));
    let (size, name_size) = (fit(content.len())?, fit(name.len() + 1)?);
    out.extend_from_slice(b"070701");
    for field in [inode, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0] {
        // Writing to a vector does not fail.
        let _ = write!(out, "{field:08x}");
    }
    out.extend_from_slice(name.as_bytes());
    out.push(0);
    pad(out);
    out.extend_from_slice(content);
    pad(out);
    Ok(())
}

fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::path::Path;
    use std::process::{Command, Stdio};

    use super::*;

    fn entries() -> Vec<Entry> {
        let entry = |path: &str, kind| Entry {
            path: path.to_owned(),
            kind,
        };
        let file = |content: &[u8], mode| Kind::File {
            content: content.to_vec(),
            mode,
        };
        vec![
            entry("a", Kind::Dir),
            entry("a/empty", file(b"", 0o644)),
            entry("a/one", file(b"1", 0o600)),
            entry("a/program", file(&[7; 4097], 0o755)),
            entry(
                "link",
                Kind::Link {
                    target: "/a/one".to_owned(),
                },
            ),
        ]
    }

    #[test]
    fn one_entry_is_laid_out_as_the_format_says() {
        let archive = write(&entries()[2..3]).unwrap();
        let header = "070701000000010000818000000000000000000000000100000000000000010000000000000000000000000000000000000006\
                      00000000";
        assert_eq!(&archive[..110], header.as_bytes());
        assert_eq!(
            &archive[110..120],
            b"a/one\x001\0\0\0",
            "padded to 4 after name and content"
        );
        assert!(archive[120..].starts_with(b"070701"));
        assert_eq!(archive.len() % 4, 0);
    }

    #[test]
    fn names_that_would_end_or_escape_the_archive_are_refused() {
        for name in ["", "/etc/passwd", "TRAILER!!!", "a\0b"] {
            let entry = Entry {
                path: name.to_owned(),
                kind: Kind::Dir,
            };
            assert_eq!(write(&[entry]), Err(CpioError::BadName(name.to_owned())));
        }
    }

    /// cpio itself, or busybox's.
    fn cpio(args: &[&str], dir: &Path, archive: &[u8]) -> String {
        let (program, first) = if Command::new("cpio").arg("--version").output().is_ok() {
            ("cpio", vec![])
        } else {
            ("busybox", vec!["cpio"])
        };
        let mut child = Command::new(program)
            .args(first)
            .args(args)
            .current_dir(dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("cpio or busybox is needed: see .ci/debian-packages");
        child.stdin.take().unwrap().write_all(archive).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    }

    #[test]
    fn cpio_lists_and_unpacks_what_was_written() {
        let archive = write(&entries()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let listed = cpio(&["-t"], dir.path(), &archive);
        assert_eq!(
            listed.lines().collect::<Vec<_>>(),
            ["a", "a/empty", "a/one", "a/program", "link"]
        );
        cpio(&["-i", "-d"], dir.path(), &archive);
        assert_eq!(
            std::fs::read(dir.path().join("a/program")).unwrap(),
            [7; 4097]
        );
        let mode = std::fs::metadata(dir.path().join("a/program"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o755);
        let target = std::fs::read_link(dir.path().join("link")).unwrap();
        assert_eq!(target, Path::new("/a/one"));
    }
}
