//! The conventions of vhost-user backends, kept by the binary.

#![allow(clippy::unwrap_used)]

mod common;

use std::io::Read as _;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::chown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::*;
use offload::testing::frontend::TestFrontend;
use rustix::io::{FdFlags, fcntl_setfd};

#[test]
fn capabilities_are_printed_whatever_else_is_asked() {
    for args in [
        &["--print-capabilities"][..],
        &["serve", "--print-capabilities", "--fd=nonsense"],
    ] {
        let said = succeeds(args);
        let value: serde_json::Value = serde_json::from_str(&said).unwrap();
        assert_eq!(value["type"], "block");
        assert_eq!(
            value["features"],
            serde_json::json!(["read-only", "blk-file"])
        );
    }
}

#[test]
fn the_discovery_file_says_what_the_binary_says() {
    // For /usr/share/qemu/vhost-user (QEMU, docs/interop/vhost-user.json).
    let file = include_str!("../packaging/50-offload-vhost-blk.json");
    let file: serde_json::Value = serde_json::from_str(file).unwrap();
    let said: serde_json::Value =
        serde_json::from_str(&succeeds(&["--print-capabilities"])).unwrap();
    assert_eq!(file["type"], said["type"]);
    assert!(
        file["binary"]
            .as_str()
            .is_some_and(|path| path.starts_with('/'))
    );
    assert!(file["description"].is_string());
}

/// A card, ended when dropped.
struct Ended(std::process::Child);

impl Ended {
    /// With `--fd`.
    fn inheriting(files: &Files, fd: impl AsFd) -> Self {
        fcntl_setfd(&fd, FdFlags::empty()).unwrap();
        let number = fd.as_fd().as_raw_fd().to_string();
        let child = Command::new(env!("CARGO_BIN_EXE_vhost-blk"))
            .args(["serve", "--fd", &number, "--volume", &files.text("volume")])
            .args(["--key-file", &files.text("key")])
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        fcntl_setfd(&fd, FdFlags::CLOEXEC).unwrap();
        Self(child)
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn an_inherited_socket_serves_whether_it_listens_or_is_connected() {
    let files = Files::with_volume("16M");
    let path = files.path("inherited");
    let listener = UnixListener::bind(&path).unwrap();
    let card = Ended::inheriting(&files, &listener);
    for _ in 0..2 {
        let mut frontend = TestFrontend::connect(&path, 1);
        assert_ne!(frontend.negotiate(u64::MAX) & F_FLUSH, 0);
        assert_eq!(frontend.config(0, 8), 32768_u64.to_le_bytes());
    }
    drop(card);

    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut card = Ended::inheriting(&files, &theirs);
    drop(theirs);
    let mut frontend = TestFrontend::new(ours, 1);
    assert_ne!(frontend.negotiate(u64::MAX) & F_FLUSH, 0);
    drop(frontend);
    // There will be no other frontend, so the card is done.
    let end = Instant::now() + PATIENCE;
    while card.0.try_wait().unwrap().is_none() {
        assert!(Instant::now() < end, "it does not end");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(card.0.wait().unwrap().success());
}

#[test]
fn a_card_gives_root_up_and_serves_all_the_same() {
    let files = Files::with_volume("16M");
    // The folder of the sockets belongs to the card's user, volume and key do not.
    chown(files.path(""), Some(65534), Some(65534)).unwrap();
    let card = files.serve(&["--user", "65534:65533"]);
    let pid = card.pid();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace()
            .skip(1)
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    assert_eq!(field("Uid:"), ["65534"; 4]);
    assert_eq!(field("Gid:"), ["65533"; 4]);
    assert_eq!(field("CapEff:"), ["0000000000000000"]);
    assert_eq!(field("NoNewPrivs:"), ["1"]);
    assert_eq!(field("Seccomp:"), ["2"]);
    assert!(field("Groups:").is_empty());
    let mut guest = Guest::new(&card);
    guest.write(0, &[1; 4096]);
    guest.flush();
    assert_eq!(guest.request(DISCARD, 0, &segment(0, 8, 0), 0).status, OK);
    assert_eq!(guest.read(0, 4096), [0; 4096]);
    drop(guest);
    card.stop();
    assert!(!files.path("sock").exists(), "its socket is removed");
}

#[test]
fn a_socket_that_a_card_may_not_remove_is_told_of_and_the_next_card_replaces_it() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let files = Files::with_volume("16M");
    // Root's, as /run is; others may pass.
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(files.path(""), open).unwrap();
    let (key, volume) = (files.text("key"), files.text("volume"));
    let (socket, control) = (files.text("sock"), files.text("control"));
    for byte in 1..=3 {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-blk"));
        command.args(["serve", "--volume", &volume, "--key-file", &key]);
        command.args(["--socket-path", &socket, "--control-socket", &control]);
        let child = command
            .args(["--user", "65534:65534"])
            .stderr(Stdio::piped());
        let mut card = Ended(child.spawn().unwrap());
        // A stale file refuses, so this waits for the card that was just started.
        let end = Instant::now() + Duration::from_secs(20);
        while UnixStream::connect(&control).is_err() {
            assert!(Instant::now() < end, "nobody listens");
            std::thread::sleep(Duration::from_millis(5));
        }
        let mut guest = Guest::at(&files.path("sock"), Options::default());
        guest.write(0, &[byte; 4096]);
        guest.flush();
        drop(guest);
        let pid = rustix::process::Pid::from_child(&card.0);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let mut said = String::new();
        card.0
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut said)
            .unwrap();
        assert!(card.0.wait().unwrap().success(), "{said}");
        for path in [&socket, &control] {
            let told = format!("the socket {path} stays behind");
            assert_eq!(said.matches(&told).count(), 1, "{said}");
            let refused = UnixStream::connect(path).unwrap_err();
            assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
        }
    }
    assert!(files.on_volume("check", &[]).status.success());
}

#[test]
fn a_socket_in_use_is_refused() {
    let files = Files::with_volume("16M");
    let card = files.serve(&[]);
    let second = files.text("second");
    let (key, socket) = (files.text("key"), files.text("sock"));
    succeeds(&["create", "--size", "16M", "--key-file", &key, &second]);
    let serve = [
        "serve",
        "--socket-path",
        &socket,
        "--volume",
        &second,
        "--key-file",
        &key,
    ];
    let said = fails(&serve, 1);
    assert!(said.contains("in use by a running process"), "{said}");
    card.stop();
}
