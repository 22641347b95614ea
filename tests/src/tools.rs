//! A disk with a program of the host and all its libraries, for programs that are too large for a RAM
//! disk: Debian's fio brings 60 MiB of them.

use std::path::Path;
use std::process::{Command, Output};

use crate::lab::{Lab, Volume, blk_ok, text};

/// What the folder is called in the guest.
pub const MOUNT: &str = "/mnt";

/// A sealed volume with an ext4 file system that holds `program`, or `None` if this host has none.
/// [`run_line`] says how to run it.
///
/// # Panics
/// When it cannot be made.
#[must_use]
pub fn disk_with(lab: &Lab, program: &str) -> Option<Volume> {
    let found = Command::new("sh")
        .args(["-c", "command -v -- \"$0\"", program])
        .output()
        .expect("sh runs");
    if !found.status.success() {
        return None;
    }
    let path = String::from_utf8_lossy(&found.stdout).trim().to_owned();
    let tree = lab.path("tools");
    std::fs::create_dir(&tree).expect("a new folder");
    copy(Path::new(&path), &tree.join(program));
    let list = Command::new("ldd").arg(&path).output().expect("ldd runs");
    let list = String::from_utf8_lossy(&list.stdout).into_owned();
    // Lines are `name => /path (address)` or `/path (address)`.
    for library in list
        .split_ascii_whitespace()
        .filter(|word| word.starts_with('/'))
    {
        let library = Path::new(library);
        let name = library.file_name().expect("a library has a name");
        copy(library, &tree.join(name));
    }
    let volume = volume_with(lab, "tools", &tree, "160M");
    std::fs::remove_dir_all(&tree).expect("it is ours");
    Some(volume)
}

/// A sealed volume `NAME.vol` with an ext4 file system of `size`, as mke2fs takes it, that holds what is
/// in the folder `tree`.
///
/// # Panics
/// When it cannot be made.
#[must_use]
pub fn volume_with(lab: &Lab, name: &str, tree: &Path, size: &str) -> Volume {
    let image = lab.path(&format!("{name}.raw"));
    let mut mke2fs = Command::new("mke2fs");
    let path = std::env::var("PATH").unwrap_or_default();
    mke2fs.env("PATH", format!("{path}:/sbin:/usr/sbin"));
    mke2fs.args(["-q", "-t", "ext4", "-O", "^has_journal", "-d"]);
    mke2fs.arg(tree).arg(&image).arg(size);
    succeeds(mke2fs.output().expect("mke2fs runs"));
    let volume = Volume {
        path: lab.path(&format!("{name}.vol")),
        key: lab.key(&format!("{name}.key")),
    };
    let (key, path) = (text(&volume.key), text(&volume.path));
    blk_ok(&["import", "--key-file", key, text(&image), path]);
    std::fs::remove_file(&image).expect("it is ours");
    volume
}

/// The command line that runs `program` of the disk mounted at [`MOUNT`].
#[must_use]
pub fn run_line(program: &str) -> String {
    format!("{MOUNT}/ld-linux-x86-64.so.2 --library-path {MOUNT} {MOUNT}/{program}")
}

fn copy(from: &Path, to: &Path) {
    std::fs::copy(from, to).unwrap_or_else(|error| panic!("{}: {error}", from.display()));
}

fn succeeds(output: Output) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
}
