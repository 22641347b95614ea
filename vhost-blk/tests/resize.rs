//! Volumes that grow: under a guest, and while nobody serves them.

#![allow(clippy::unwrap_used)]

mod common;
mod loops;

use std::fs::{File, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::Command;

use common::*;
use loops::Loop;
use offload::control::{ClientError, ControlClient, ControlErrorKind};
use serde_json::json;

const MIB: u64 = 1 << 20;

/// Bytes of the disk, as the guest's driver reads them.
fn capacity(guest: &mut Guest) -> u64 {
    let bytes = guest.frontend.config(0, 8);
    u64::from_le_bytes(bytes.try_into().unwrap()) * 512
}

fn resize(files: &Files, rest: &[&str]) -> std::process::Output {
    let (volume, key) = (files.text("volume"), files.text("key"));
    run(&[&["resize", "--volume", &volume, "--key-file", &key], rest].concat())
}

/// The card refuses; what the command says.
#[track_caller]
fn refused(control: &str, size: &str) -> String {
    fails(&["resize", "--control-socket", control, "--size", size], 1)
}

#[test]
fn a_served_volume_grows_under_its_guest_which_is_told_and_a_kill_leaves_it_grown() {
    let files = Files::with_volume("16M");
    let control = files.text("control");
    let card = files.serve(&["--control-socket", &control]);
    let mut guest = Guest::new(&card);
    let mut channel = guest.frontend.backend_channel();
    let old = pattern(1, 65536);
    guest.write(0, &old);
    let far = (40 * MIB / 512, pattern(2, 65536));
    assert_eq!(guest.request(OUT, far.0, &far.1, 0).status, IOERR);

    let said = succeeds(&["resize", "--control-socket", &control, "--size", "48M"]);
    assert_eq!(said, "16 MiB → 48 MiB\n");
    assert_eq!(channel.receive(), (2, 1), "CONFIG_CHANGE_MSG");
    assert_eq!(capacity(&mut guest), 48 * MIB);
    guest.write(far.0, &far.1);
    let said = succeeds(&["resize", "--control-socket", &control, "--size", "48M"]);
    assert_eq!(said, "the volume has 48 MiB already\n");

    let said = refused(&control, "32M");
    assert!(said.contains("cannot shrink"), "{said}");
    let said = refused(&control, "129T");
    assert!(said.contains("128 TiB"), "{said}");
    assert_eq!(capacity(&mut guest), 48 * MIB);

    // Neither flushed nor closed.
    card.kill();
    let card = files.serve(&["--control-socket", &control]);
    guest.reconnect(&card);
    assert_eq!(capacity(&mut guest), 48 * MIB);
    assert!(guest.read(0, 65536) == old && guest.read(far.0, 65536) == far.1);
    drop(guest);
    card.stop();
    let checked = files.on_volume("check", &[]);
    assert!(checked.status.success(), "{}", stdout(&checked));
    let meta = std::fs::metadata(files.path("volume")).unwrap();
    assert!(
        meta.len() > 48 * MIB && meta.blocks() * 512 < 12 * MIB,
        "it is thin"
    );
}

#[test]
fn a_volume_grows_many_times_while_its_guest_writes() {
    let files = Files::with_volume("8M");
    let control = files.path("control");
    let card = files.serve(&["--control-socket", control.to_str().unwrap()]);
    let mut guest = Guest::new(&card);
    let resizing = std::thread::spawn(move || {
        let mut client = ControlClient::connect(&control).unwrap();
        for mib in (9..60).step_by(3) {
            let answer = client.call("resize", json!({ "size": mib * MIB })).unwrap();
            assert_eq!(answer["state"], "done", "{answer}");
        }
    });
    let mut written = Vec::new();
    let mut round = 0;
    while !resizing.is_finished() || round < 50 {
        let block = round * 37 % (8 * MIB / 4096 - 4);
        guest.write(block * 8, &pattern(round, 16384));
        written.push((block, round));
        // To the very end of what there is now.
        let end = capacity(&mut guest) / 512;
        guest.write(end - 8, &pattern(end, 4096));
        assert!(guest.read(end - 8, 4096) == pattern(end, 4096));
        if round % 7 == 0 {
            guest.flush();
        }
        round += 1;
    }
    resizing.join().unwrap();
    assert_eq!(capacity(&mut guest), 57 * MIB);
    let (block, round) = *written.last().unwrap();
    assert!(guest.read(block * 8, 16384) == pattern(round, 16384));
    drop(guest);
    card.stop();
    assert!(files.on_volume("check", &[]).status.success());
}

#[test]
fn a_volume_that_nobody_serves_grows_and_only_grows() {
    let files = Files::with_volume("16M");
    let card = files.serve(&[]);
    let mut guest = Guest::new(&card);
    let data = pattern(3, 65536);
    guest.write(0, &data);
    drop(guest);
    card.stop();

    let output = resize(&files, &["--size", "64M"]);
    assert_eq!(stdout(&output), "16 MiB → 64 MiB\n", "{}", stderr(&output));
    for (size, hint) in [
        ("63M", "cannot shrink"),
        ("200T", "from 1 MiB to 128 TiB"),
        ("67108865", "multiple of 4096"),
        ("0", "1 MiB"),
    ] {
        let output = resize(&files, &["--size", size]);
        let said = stderr(&output);
        assert!(
            output.status.code() == Some(1) && said.contains(hint),
            "{size}: {said}"
        );
    }
    let output = resize(&files, &[]);
    assert!(
        stderr(&output).contains("give --size"),
        "{}",
        stderr(&output)
    );

    let checked = files.on_volume("check", &[]);
    assert!(checked.status.success(), "{}", stdout(&checked));
    assert!(stdout(&files.on_volume("info", &[])).contains("64 MiB"));
    let card = files.serve(&[]);
    let mut guest = Guest::new(&card);
    assert_eq!(capacity(&mut guest), 64 * MIB);
    assert!(guest.read(0, 65536) == data);
    assert!(guest.read(60 * 2048, 65536).iter().all(|byte| *byte == 0));
    drop(guest);
    card.stop();
}

#[test]
fn volumes_that_are_missing_foreign_locked_or_in_use_do_not_grow() {
    let files = Files::with_volume("16M");
    files.private("other key", &[8; 32]);
    files.private("foreign", &[0x5a; 8 << 20]);
    let (volume, key) = (files.text("volume"), files.text("key"));
    let at = |volume: &str, key: &str| {
        fails(
            &[
                "resize",
                "--volume",
                volume,
                "--key-file",
                key,
                "--size",
                "32M",
            ],
            1,
        )
    };
    for (volume, key, hint) in [
        (files.text("nothing"), key.clone(), "No such file"),
        (files.text("foreign"), key.clone(), "no offload volume"),
        (volume.clone(), files.text("other key"), "key"),
    ] {
        let said = at(&volume, &key);
        assert!(said.contains(hint), "{said}");
    }
    assert_eq!(
        std::fs::read(files.path("foreign")).unwrap(),
        [0x5a; 8 << 20]
    );
    let said = fails(&["resize", "--volume", &volume, "--size", "32M"], 1);
    assert!(said.contains("--key-file"), "{said}");

    let control = files.text("control");
    let said = refused(&control, "32M");
    assert!(said.contains("is the card running"), "{said}");
    let card = files.serve(&["--control-socket", &control]);
    let said = at(&volume, &key);
    assert!(said.contains("give --control-socket"), "{said}");
    let said = refused(&control, "32M");
    assert!(said.contains("no guest has connected"), "{said}");
    card.stop();
    let card = files.serve(&["--control-socket", &control, "--read-only"]);
    let guest = Guest::new(&card);
    let said = refused(&control, "32M");
    assert!(said.contains("read-only"), "{said}");
    drop(guest);
    card.stop();
    assert!(stdout(&files.on_volume("info", &[])).contains("16 MiB"));
}

#[test]
fn a_volume_that_was_not_closed_waits_for_its_guest_unless_forced() {
    let files = Files::with_volume("16M");
    let card = files.serve(&[]);
    let mut guest = Guest::new(&card);
    let data = pattern(5, 65536);
    guest.write(0, &data);
    guest.flush();
    card.kill();
    let output = resize(&files, &["--size", "32M"]);
    let said = stderr(&output);
    assert!(
        said.contains("was not closed") && said.contains("--force"),
        "{said}"
    );

    // The guest goes on as if nothing had been tried.
    let card = files.serve(&[]);
    guest.reconnect(&card);
    assert!(guest.read(0, 65536) == data);
    drop(guest);
    card.kill();
    let output = resize(&files, &["--size", "32M", "--force"]);
    assert_eq!(stdout(&output), "16 MiB → 32 MiB\n", "{}", stderr(&output));
    assert!(files.on_volume("check", &[]).status.success());
}

#[test]
fn other_users_are_refused_by_their_credentials_even_if_the_socket_is_open_to_them() {
    let files = Files::with_volume("16M");
    let control = files.path("control");
    let card = files.serve(&["--control-socket", control.to_str().unwrap()]);
    let mut guest = Guest::new(&card);
    let folder = control.parent().unwrap();
    std::fs::set_permissions(folder, Permissions::from_mode(0o755)).unwrap();
    std::fs::set_permissions(&control, Permissions::from_mode(0o777)).unwrap();
    let stranger = std::thread::spawn(move || {
        // This thread only.
        let nobody = rustix::process::Uid::from_raw(65534);
        rustix::thread::set_thread_res_uid(nobody, nobody, nobody).expect("this test needs root");
        let mut client = ControlClient::connect(&control)?;
        client.call("resize", json!({ "size": 32 * MIB }))
    });
    match stranger.join().unwrap() {
        Err(ClientError::Remote(error)) => {
            assert_eq!(error.kind, ControlErrorKind::Refused, "{error}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(capacity(&mut guest), 16 * MIB);
    drop(guest);
    card.stop();
}

#[test]
fn on_a_device_a_volume_grows_as_far_as_the_device_has() {
    let files = Files::new();
    let device = Loop::new(&files, "disk", 128 * MIB, &[]);
    let (key, control) = (files.text("key"), files.text("control"));
    succeeds(&["create", "--key-file", &key, &device.0]);
    let card = Card::start(&files, &device.0, &["--control-socket", &control]);
    let mut guest = Guest::new(&card);
    let before = capacity(&mut guest);
    let said = refused(&control, "256M");
    assert!(said.contains("the backing has"), "{said}");
    let said = succeeds(&["resize", "--control-socket", &control]);
    assert!(said.contains("already"), "{said}");

    // Somebody gives the device more room while the card runs.
    let disk = File::options().write(true).open(files.path("disk"));
    disk.unwrap().set_len(512 * MIB).unwrap();
    let grown = Command::new("losetup")
        .args(["--set-capacity", &device.0])
        .status();
    assert!(grown.unwrap().success());
    succeeds(&["resize", "--control-socket", &control, "--size", "256M"]);
    assert_eq!(capacity(&mut guest), 256 * MIB);
    let data = pattern(9, 65536);
    guest.write(255 * 2048, &data);
    assert!(guest.read(255 * 2048, 65536) == data);
    drop(guest);
    card.stop();
    let said = succeeds(&["resize", "--volume", &device.0, "--key-file", &key]);
    assert!(said.starts_with("256 MiB → "), "{said}");
    let said = fails(
        &[
            "resize",
            "--volume",
            &device.0,
            "--key-file",
            &key,
            "--size",
            "1G",
        ],
        1,
    );
    assert!(said.contains("the backing has"), "{said}");
    let card = Card::start(&files, &device.0, &[]);
    let mut guest = Guest::new(&card);
    assert!(capacity(&mut guest) > 256 * MIB && before < 128 * MIB);
    assert!(guest.read(255 * 2048, 65536) == data);
    drop(guest);
    card.stop();
    succeeds(&["check", "--key-file", &key, &device.0]);
}
