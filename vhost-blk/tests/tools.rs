//! The subcommands that move and examine volumes, on files and on devices.

#![allow(clippy::unwrap_used)]

mod common;
mod loops;

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use common::*;
use loops::Loop;

/// A raw image with data here and there: `len` bytes, `MiB -> data` for each of `places`.
fn image(path: &Path, len: u64, places: &[(u64, usize)]) {
    let file = File::create(path).unwrap();
    file.set_len(len).unwrap();
    for (at, bytes) in places {
        file.write_all_at(&pattern(*at, *bytes), *at).unwrap();
    }
}

fn same(a: &Path, b: &Path) -> bool {
    std::fs::read(a).unwrap() == std::fs::read(b).unwrap()
}

fn allocated(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn an_image_comes_back_as_it_was_and_stays_sparse() {
    let files = Files::new();
    let raw = files.path("disk.raw");
    // Aligned, unaligned, at both ends, longer than a chunk.
    let places = [
        (0, 4096),
        (5 << 20, 700_000),
        ((20 << 20) + 123, 5),
        ((64 << 20) - 4096, 4096),
    ];
    image(&raw, 64 << 20, &places);
    let (key, raw_text) = (files.text("key"), files.text("disk.raw"));
    let (volume, back) = (files.text("volume"), files.text("back.raw"));
    let said = succeeds(&["import", "--key-file", &key, &raw_text, &volume]);
    assert!(said.contains("64 MiB"), "{said}");
    assert!(allocated(&files.path("volume")) < 12 << 20);
    assert!(files.on_volume("check", &[]).status.success());

    succeeds(&["export", "--key-file", &key, &volume, &back]);
    assert!(same(&raw, &files.path("back.raw")));
    assert!(allocated(&files.path("back.raw")) < 2 << 20);
    let mode = std::fs::metadata(files.path("back.raw")).unwrap().mode();
    assert_eq!(mode & 0o777, 0o600, "plaintext is for its owner");

    // Neither overwrites without being told to.
    let said = fails(&["export", "--key-file", &key, &volume, &back], 1);
    assert!(said.contains("--force"), "{said}");
    let said = fails(&["import", "--key-file", &key, &raw_text, &volume], 1);
    assert!(said.contains("--force"), "{said}");
    std::fs::write(files.path("back.raw"), vec![1; 1000]).unwrap();
    succeeds(&["export", "--force", "--key-file", &key, &volume, &back]);
    assert!(same(&raw, &files.path("back.raw")));
    let said = fails(
        &["export", "--force", "--key-file", &key, &volume, &volume],
        1,
    );
    assert!(said.contains("same file"), "{said}");
    let said = fails(
        &["import", "--force", "--key-file", &key, &volume, &volume],
        1,
    );
    assert!(said.contains("same file"), "{said}");
}

#[test]
fn a_sealed_volume_is_no_image_unless_it_is_said_to_be() {
    let files = Files::with_volume("16M");
    let (key, volume, into) = (files.text("key"), files.text("volume"), files.text("into"));
    let refused = || {
        let said = fails(&["import", "--key-file", &key, &volume, &into], 1);
        for part in ["sealed volume", "vhost-blk export", "--format raw"] {
            assert!(said.contains(part), "{said}");
        }
        assert!(!files.path("into").exists());
    };
    refused();
    // Overwriting is another thing to be sure of.
    let said = fails(
        &["import", "--force", "--key-file", &key, &volume, &into],
        1,
    );
    assert!(said.contains("sealed volume"), "{said}");

    // One copy of the header is enough to know it by.
    let file = File::options()
        .write(true)
        .open(files.path("volume"))
        .unwrap();
    file.write_all_at(&[0; 4096], 0).unwrap();
    refused();

    let raw = [
        "import",
        "--format",
        "raw",
        "--key-file",
        &key,
        &volume,
        &into,
    ];
    succeeds(&raw);
    succeeds(&["export", "--key-file", &key, &into, &files.text("back")]);
    assert!(same(&files.path("volume"), &files.path("back")));
}

#[test]
fn an_image_of_an_odd_size_is_rounded_up_and_says_so() {
    let files = Files::new();
    image(&files.path("odd"), (3 << 20) + 700, &[(3 << 20, 700)]);
    let (key, odd) = (files.text("key"), files.text("odd"));
    let (volume, back) = (files.text("volume"), files.text("back"));
    let said = succeeds(&["import", "--key-file", &key, &odd, &volume]);
    assert!(said.contains("rounded up to 3149824"), "{said}");
    succeeds(&["export", "--key-file", &key, &volume, &back]);
    let (mut expected, back) = (std::fs::read(&odd).unwrap(), std::fs::read(&back).unwrap());
    expected.resize((3 << 20) + 4096, 0);
    assert!(back == expected);
}

#[test]
fn a_qcow2_image_is_converted_and_one_that_names_other_files_is_not_followed() {
    let files = Files::new();
    let raw = files.path("disk.raw");
    image(&raw, 32 << 20, &[(1 << 20, 300_000), (30 << 20, 8192)]);
    let qemu_img = |args: &[&str]| {
        let status = Command::new("qemu-img").args(args).output().unwrap();
        assert!(status.status.success(), "{}", stderr(&status));
    };
    let (key, raw_text, qcow2) = (files.text("key"), files.text("disk.raw"), files.text("q"));
    let (volume, back) = (files.text("volume"), files.text("back"));
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", &raw_text, &qcow2]);
    succeeds(&["import", "--key-file", &key, &qcow2, &volume]);
    succeeds(&["export", "--key-file", &key, &volume, &back]);
    assert!(same(&raw, &files.path("back")));
    assert!(allocated(&files.path("volume")) < 12 << 20);
    let left = std::fs::read_dir(files.path("")).unwrap();
    let left = left.filter(|entry| {
        let name = entry.as_ref().unwrap().file_name();
        name.to_string_lossy().contains("import")
    });
    assert_eq!(left.count(), 0, "no plaintext is left behind");

    let (overlay, second) = (files.text("overlay"), files.text("second"));
    qemu_img(&[
        "create", "-f", "qcow2", "-F", "raw", "-b", &raw_text, &overlay,
    ]);
    let said = fails(&["import", "--key-file", &key, &overlay, &second], 1);
    assert!(said.contains("other files"), "{said}");
    assert!(!files.path("second").exists());
    let followed = [
        "import",
        "--format",
        "qcow2",
        "--key-file",
        &key,
        &overlay,
        &second,
    ];
    succeeds(&followed);
    succeeds(&["export", "--force", "--key-file", &key, &second, &back]);
    assert!(same(&raw, &files.path("back")));

    std::fs::write(files.path("bad"), b"QFI\xfb and no more").unwrap();
    let said = fails(
        &[
            "import",
            "--key-file",
            &key,
            &files.text("bad"),
            &files.text("third"),
        ],
        1,
    );
    assert!(said.contains("--format raw"), "{said}");
    assert!(!files.path("third").exists());
}

#[test]
fn volumes_live_on_devices_with_sectors_of_512_and_of_4096_bytes() {
    for sector in [512, 4096] {
        let files = Files::new();
        let device = Loop::new(
            &files,
            "disk",
            96 << 20,
            &["--sector-size", &sector.to_string()],
        );
        let key = files.text("key");
        let create = ["create", "--key-file", &key, &device.0];
        let said = succeeds(&create);
        assert!(said.contains("new volume of"), "{said}");
        let said = fails(&create, 1);
        assert!(said.contains("--force"), "{said}");

        let card = Card::start(&files, &device.0, &[]);
        let mut guest = Guest::new(&card);
        let sectors = u64::from_le_bytes(*guest.frontend.config(0, 8).first_chunk().unwrap());
        // Most of the device, and its capacity is the device's, not that of its node.
        assert!(
            sectors * 512 > 50 << 20 && sectors * 512 < 96 << 20,
            "{sectors}"
        );
        let data = pattern(1, 100_352);
        guest.write(3, &data);
        guest.write(sectors - 1, &data[..512]);
        guest.flush();
        assert_eq!(guest.request(DISCARD, 0, &segment(8, 64, 0), 0).status, OK);
        drop(guest);
        card.stop();

        let check = ["check", "--key-file", &key, &device.0];
        assert!(succeeds(&check).ends_with("clean\n"));
        let second = Loop::new(
            &files,
            "second",
            96 << 20,
            &["--sector-size", &sector.to_string()],
        );
        let target = File::options().write(true).open(&second.0).unwrap();
        target.write_all_at(&[0xff; 1 << 20], 0).unwrap();
        drop(target);
        let export = [
            "export",
            "--force",
            "--key-file",
            &key,
            &device.0,
            &second.0,
        ];
        succeeds(&export);
        let exported = std::fs::read(&second.0).unwrap();
        let mut expected = vec![0; sectors as usize * 512];
        expected[3 * 512..3 * 512 + data.len()].copy_from_slice(&data);
        expected[8 * 512..72 * 512].fill(0);
        expected[(sectors as usize - 1) * 512..].copy_from_slice(&data[..512]);
        assert!(exported[..expected.len()] == expected);

        // And from a device into a file.
        let from_device = files.text("from-device");
        succeeds(&["import", "--key-file", &key, &second.0, &from_device]);
        succeeds(&[
            "export",
            "--key-file",
            &key,
            &from_device,
            &files.text("back"),
        ]);
        assert!(std::fs::read(files.path("back")).unwrap() == exported);
    }
}

#[test]
fn a_size_that_does_not_fit_is_refused_before_anything_is_touched() {
    let files = Files::new();
    let device = Loop::new(&files, "disk", 64 << 20, &[]);
    let key = files.text("key");
    let said = fails(
        &["create", "--size", "1G", "--key-file", &key, &device.0],
        1,
    );
    assert!(said.contains("smaller --size"), "{said}");
    let bytes = std::fs::read(files.path("disk")).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 0));

    let volume = files.text("volume");
    for size in ["100", "4097", "200T"] {
        let said = fails(&["create", "--size", size, "--key-file", &key, &volume], 1);
        assert!(said.contains("4096"), "{said}");
    }
    let said = fails(&["create", "--key-file", &key, &volume], 1);
    assert!(said.contains("--size"), "{said}");
    let said = fails(
        &["create", "--size", "1G", "--key-file", "/no/such", &volume],
        1,
    );
    assert!(said.contains("/no/such"), "{said}");
    assert!(!files.path("volume").exists());
}

#[test]
fn create_keeps_what_is_there_unless_forced() {
    let files = Files::with_volume("16M");
    let before = std::fs::read(files.path("volume")).unwrap();
    let (key, volume) = (files.text("key"), files.text("volume"));
    let said = fails(&["create", "--size", "16M", "--key-file", &key, &volume], 1);
    assert!(said.contains("--force"), "{said}");
    assert!(std::fs::read(files.path("volume")).unwrap() == before);
    succeeds(&[
        "create",
        "--force",
        "--size",
        "32M",
        "--key-file",
        &key,
        &volume,
    ]);
    let said = files.on_volume("info", &["--json"]);
    let info: serde_json::Value = serde_json::from_slice(&said.stdout).unwrap();
    assert_eq!(info["size_bytes"], 32 << 20);
}

#[test]
fn info_tells_what_is_known_with_and_without_a_key() {
    let files = Files::with_volume("16M");
    let card = files.serve(&[]);
    let mut guest = Guest::new(&card);
    guest.write(0, &pattern(1, 40960));
    drop(guest);
    card.stop();
    let info = |key: bool| -> serde_json::Value {
        let output = if key {
            files.on_volume("info", &["--json"])
        } else {
            run(&["info", "--json", &files.text("volume")])
        };
        assert!(output.status.success(), "{}", stderr(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let (with, without) = (info(true), info(false));
    assert_eq!(with["authenticated"], true);
    assert_eq!(with["data_bytes"], 40960);
    assert_eq!(with["clean"], true);
    assert_eq!(with["key_slots"], serde_json::json!(["key file"]));
    assert_eq!(without["authenticated"], false);
    assert!(without["note"].as_str().unwrap().contains("anybody"));
    for field in ["id", "serial", "size_bytes", "generation", "format_version"] {
        assert_eq!(with[field], without[field], "{field}");
    }
    let text = stdout(&files.on_volume("info", &[]));
    assert!(text.contains("16 MiB") && text.contains("sound"), "{text}");
}

#[test]
fn what_is_no_volume_is_named_with_the_reason() {
    let files = Files::new();
    for (name, len, reason) in [
        ("short", 32, "it has 32 bytes"),
        ("blank", 8 << 20, "header"),
    ] {
        let path = files.private(name, &vec![0; len]);
        for key in [&[][..], &["--key-file", &files.text("key")]] {
            let said = fails(&[&["info"], key, &[path.to_str().unwrap()]].concat(), 1);
            let words = [name, "no offload volume", reason];
            assert!(words.iter().all(|word| said.contains(word)), "{said}");
        }
    }
}

#[test]
fn a_passphrase_opens_what_it_made_and_nothing_else_does() {
    let files = Files::new();
    files.private("phrase", b"correct horse\nsecond line\n");
    files.private("wrong", b"correct house\n");
    let (volume, phrase, wrong) = (
        files.text("volume"),
        files.text("phrase"),
        files.text("wrong"),
    );
    succeeds(&[
        "create",
        "--size",
        "16M",
        "--passphrase-file",
        &phrase,
        &volume,
    ]);
    succeeds(&["check", "--passphrase-file", &phrase, &volume]);
    let said = fails(&["check", "--passphrase-file", &wrong, &volume], 2);
    assert!(said.contains("wrong key or passphrase"), "{said}");
    let said = fails(&["check", "--key-file", &files.text("key"), &volume], 2);
    assert!(said.contains("--passphrase-file"), "{said}");
    let said = succeeds(&["info", &volume]);
    assert!(said.contains("Argon2id"), "{said}");
}

#[test]
fn the_key_itself_is_never_written_over() {
    let files = Files::with_volume("16M");
    let key = files.text("key");
    let before = std::fs::read(&key).unwrap();
    let raw = files.private("raw", &[7; 8192]);
    let raw = raw.to_str().unwrap();
    let volume = files.text("volume");
    for args in [
        &[
            "create",
            "--force",
            "--size",
            "16M",
            "--key-file",
            &key,
            &key,
        ][..],
        &["import", "--force", "--key-file", &key, raw, &key],
        &["export", "--force", "--key-file", &key, &volume, &key],
    ] {
        let said = fails(args, 1);
        assert!(said.contains("is the key itself"), "{said}");
        assert_eq!(std::fs::read(&key).unwrap(), before);
    }
}

#[test]
fn a_fifo_is_no_image() {
    let files = Files::with_volume("16M");
    let fifo = files.text("fifo");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status();
    assert!(made.unwrap().success());
    let said = fails(
        &[
            "import",
            "--key-file",
            &files.text("key"),
            &fifo,
            &files.text("new"),
        ],
        1,
    );
    assert!(
        said.contains("neither a regular file nor a block device"),
        "{said}"
    );
    assert!(!files.path("new").exists());
}

#[test]
fn a_mounted_device_is_not_made_into_a_volume() {
    let files = Files::new();
    let key = files.private("key", &[3; 32]);
    let device = Loop::new(&files, "image", 64 << 20, &[]);
    let runs = |program: &str, args: &[&str]| {
        let status = Command::new(program).args(args).status().unwrap();
        assert!(status.success(), "{program} {args:?}");
    };
    runs("mkfs.ext4", &["-q", &device.0]);
    let folder = files.path("mounted");
    std::fs::create_dir(&folder).unwrap();
    let folder = folder.to_str().unwrap();
    runs("mount", &[&device.0, folder]);
    let key = key.to_str().unwrap();
    let output = run(&["create", "--force", "--key-file", key, &device.0]);
    runs("umount", &[folder]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("mounted"), "{}", stderr(&output));
    runs("e2fsck", &["-fn", &device.0]);
    succeeds(&["create", "--force", "--key-file", key, &device.0]);
}

#[test]
fn a_read_only_device_is_refused_at_the_start_and_served_read_only() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can make loop devices");
        return;
    }
    let files = Files::new();
    files.create("16M");
    // Not `blockdev --setro`: a loop device keeps that for whoever gets it next.
    let device = Loop::attach(&files.path("volume"), &["--read-only"]);
    let key = files.text("key");
    let socket = files.text("sock");
    let serve = ["serve", "--volume", &device.0, "--key-file", &key];
    let said = fails(&[&serve[..], &["--socket-path", &socket]].concat(), 1);
    assert!(said.contains("read-only device"), "{said}");
    assert!(said.contains("--read-only"), "{said}");
    assert!(!files.path("sock").exists());
    let card = Card::start(&files, &device.0, &["--read-only"]);
    let mut guest = Guest::new(&card);
    assert_eq!(guest.read(0, 4096), vec![0; 4096]);
    drop(guest);
    card.stop();
}
