//! Commands that are interrupted, refused or read in part leave what was there, or say what is missing.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs::{File, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use common::*;

/// A small file system of its own; needs root.
struct Mounted(PathBuf);

impl Mounted {
    fn new(files: &Files, kind: &str) -> Self {
        let path = files.path("small");
        std::fs::create_dir(&path).unwrap();
        let mut mount = Command::new("mount");
        if kind == "tmpfs" {
            mount.args(["-t", "tmpfs", "-o", "size=24m", "none"]);
        } else {
            let disk = files.path("small-disk");
            File::create(&disk).unwrap().set_len(32 << 20).unwrap();
            let mut mkfs = Command::new(format!("mkfs.{kind}"));
            assert!(mkfs.arg("-q").arg(&disk).status().unwrap().success());
            mount.args(["-o", "loop"]).arg(&disk);
        }
        assert!(mount.arg(&path).status().unwrap().success(), "needs root");
        Self(path)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

fn image(files: &Files, name: &str, len: usize) -> String {
    files.private(name, &pattern(len as u64, len));
    files.text(name)
}

#[test]
fn a_volume_whose_import_did_not_end_is_not_taken_for_one_that_did() {
    let files = Files::new();
    let _mounted = Mounted::new(&files, "tmpfs");
    let (key, volume) = (files.text("key"), files.text("small/volume"));
    let (large, small) = (
        image(&files, "large", 40 << 20),
        image(&files, "little", 2 << 20),
    );
    // A file that was there before is not removed.
    File::create(files.path("small/volume")).unwrap();
    let said = fails(&["import", "--key-file", &key, &large, &volume], 1);
    assert!(
        said.contains("cannot write") || said.contains("No space"),
        "{said}"
    );

    let check = run(&["check", "--key-file", &key, &volume]);
    assert_eq!(check.status.code(), Some(1), "{}", stdout(&check));
    assert!(
        stdout(&check).contains("import into it has not ended"),
        "{}",
        stdout(&check)
    );
    let info = succeeds(&["info", &volume]);
    let line = info.lines().find(|line| line.contains("import incomplete"));
    assert!(line.is_some_and(|line| line.ends_with("yes")), "{info}");
    let socket = files.text("sock");
    let serve = [
        "serve",
        "--socket-path",
        &socket,
        "--key-file",
        &key,
        "--volume",
        &volume,
    ];
    let out = files.text("out");
    let export = ["export", "--key-file", &key, &volume, &out];
    let resize = [
        "resize",
        "--key-file",
        &key,
        "--volume",
        &volume,
        "--size",
        "80M",
    ];
    for args in [&serve[..], &export, &resize] {
        let said = fails(args, 1);
        assert!(said.contains("import --force"), "{said}");
    }

    succeeds(&["import", "--force", "--key-file", &key, &small, &volume]);
    assert!(succeeds(&["check", "--key-file", &key, &volume]).ends_with("clean\n"));
    succeeds(&["export", "--key-file", &key, &volume, &out]);
    assert!(std::fs::read(&out).unwrap() == std::fs::read(&small).unwrap());
}

#[test]
fn a_size_that_the_file_system_refuses_leaves_the_volume_that_was_there() {
    let files = Files::new();
    let _mounted = Mounted::new(&files, "ext4");
    let (key, volume) = (files.text("key"), files.text("small/volume"));
    succeeds(&["create", "--size", "16M", "--key-file", &key, &volume]);
    let args = [
        "create",
        "--force",
        "--size",
        "100T",
        "--key-file",
        &key,
        &volume,
    ];
    let said = fails(&args, 1);
    assert!(said.contains("long enough"), "{said}");
    assert!(succeeds(&["check", "--key-file", &key, &volume]).ends_with("clean\n"));
}

#[test]
fn an_export_takes_the_old_images_place_only_when_it_is_complete_and_for_its_owner_only() {
    let files = Files::new();
    let _mounted = Mounted::new(&files, "tmpfs");
    let (key, volume) = (files.text("key"), files.text("volume"));
    let raw = image(&files, "raw", 40 << 20);
    succeeds(&["import", "--key-file", &key, &raw, &volume]);
    let (old, out) = (files.path("small/out"), files.text("small/out"));
    std::fs::write(&old, b"precious").unwrap();
    std::fs::set_permissions(&old, Permissions::from_mode(0o644)).unwrap();
    fails(&["export", "--key-file", &key, &volume, &out], 1);
    let said = fails(&["export", "--force", "--key-file", &key, &volume, &out], 1);
    assert!(said.contains("cannot write"), "{said}");
    assert_eq!(std::fs::read(&old).unwrap(), b"precious");
    let names = std::fs::read_dir(files.path("small")).unwrap().count();
    assert_eq!(names, 1, "nothing of it is left behind");

    let (place, out) = (files.path("out"), files.text("out"));
    std::fs::write(&place, b"old").unwrap();
    std::fs::set_permissions(&place, Permissions::from_mode(0o644)).unwrap();
    let reader = File::open(&place).unwrap();
    succeeds(&["export", "--force", "--key-file", &key, &volume, &out]);
    assert_eq!(std::fs::metadata(&place).unwrap().mode() & 0o777, 0o600);
    assert!(std::fs::read(&place).unwrap() == std::fs::read(&raw).unwrap());
    // Who had opened the old file does not get to see the plaintext.
    let mut seen = [0; 8];
    assert_eq!(reader.read_at(&mut seen, 0).unwrap(), 3);
}

#[test]
fn whoever_reads_the_output_may_leave_early() {
    let files = Files::with_volume("16M");
    let (key, volume, control) = (
        files.text("key"),
        files.text("volume"),
        files.text("control"),
    );
    let unread = |args: &[&str]| {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = Command::new(env!("CARGO_BIN_EXE_vhost-blk"))
            .args(args)
            .stdin(Stdio::null())
            .stdout(writer)
            .output()
            .unwrap();
        let said = stderr(&output);
        assert!(
            output.status.success() && said.is_empty(),
            "{args:?}: {said}"
        );
    };
    let with_key = ["--key-file", &key];
    unread(&["info", &volume]);
    unread(&["info", "--json", &volume]);
    unread(&[&["check", &volume], &with_key[..]].concat());
    unread(&[&["check", "--json", &volume], &with_key[..]].concat());
    unread(&[&["compact", &volume], &with_key[..]].concat());
    let card = files.serve(&["--control-socket", &control]);
    unread(&["limits", "--control-socket", &control]);
    unread(&["limits", "--json", "--control-socket", &control]);
    unread(&["resize", "--size", "16M", "--control-socket", &control]);
    card.stop();
    unread(
        &[
            &["create", "--force", "--size", "1M", &volume],
            &with_key[..],
        ]
        .concat(),
    );
}

#[test]
fn a_truncated_volume_says_so_also_to_those_without_a_key() {
    let files = Files::with_volume("16M");
    let line = |info: &str| {
        let line = info.lines().find(|line| line.contains("truncated"));
        line.map(|line| line.split_whitespace().last().unwrap().to_owned())
    };
    let volume = files.text("volume");
    assert_eq!(line(&succeeds(&["info", &volume])).as_deref(), Some("no"));
    files.raw().set_len(7 << 20).unwrap();
    assert_eq!(line(&succeeds(&["info", &volume])).as_deref(), Some("yes"));
}

#[test]
fn a_qcow2_image_that_was_cut_off_is_not_imported_as_zeros() {
    let files = Files::new();
    let raw = image(&files, "raw", 8 << 20);
    let (key, volume, qcow2) = (
        files.text("key"),
        files.text("volume"),
        files.text("q.qcow2"),
    );
    let status = Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", "qcow2", &raw, &qcow2])
        .status();
    assert!(status.expect("qemu-img").success());
    succeeds(&["import", "--key-file", &key, &qcow2, &volume]);
    let file = File::options()
        .write(true)
        .open(files.path("q.qcow2"))
        .unwrap();
    file.set_len(5 << 20).unwrap();
    std::fs::remove_file(files.path("volume")).unwrap();
    for format in [&[][..], &["--format", "qcow2"]] {
        let args = [&["import", "--key-file", &key], format, &[&qcow2, &volume]].concat();
        let said = fails(&args, 1);
        assert!(said.contains("damaged or cut off"), "{said}");
        assert!(!files.path("volume").exists());
    }
}
