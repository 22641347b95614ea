//! The conventions of vhost-user backends, kept by the binary.

#![allow(clippy::unwrap_used)]

use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use offload::testing::frontend::TestFrontend;
use rustix::process::{Pid, Signal, kill_process};

fn card(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vhost-net"))
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn capabilities_are_printed_and_are_what_the_discovery_file_says() {
    let output = card(&["--print-capabilities"]);
    assert!(output.status.success());
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    // For /usr/share/qemu/vhost-user (QEMU, docs/interop/vhost-user.json).
    let file = include_str!("../packaging/50-offload-vhost-net.json");
    let file: serde_json::Value = serde_json::from_str(file).unwrap();
    assert_eq!(said["type"], "net");
    assert_eq!(file["type"], said["type"]);
}

#[test]
fn what_a_user_got_wrong_is_named_and_no_socket_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(path("groups"), "nonsense = 1").unwrap();
    let socket = path("socket");
    let groups = path("groups");
    for (wrong, expected) in [
        (&["--mtu", "99"][..], "1280"),
        (&["--security-groups", &groups], "nonsense"),
        (&["--publish", "80"], "--publish"),
    ] {
        let output = card(&[&["serve", "--socket-path", &socket], wrong].concat());
        assert!(!output.status.success(), "{wrong:?}");
        assert!(said(&output).contains(expected), "{}", said(&output));
        assert!(!std::path::Path::new(&socket).exists(), "{wrong:?}");
    }
    let output = card(&["serve"]);
    assert!(said(&output).contains("--socket-path"), "{}", said(&output));
}

#[test]
fn a_card_with_a_frontend_ends_clean_when_told_and_removes_its_socket() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let mut child = Command::new(env!("CARGO_BIN_EXE_vhost-net"))
        .args(["serve", "--seccomp", "kill"])
        .args(["--socket-path", socket.to_str().unwrap()])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut frontend = TestFrontend::connect(&socket, 2);
    let version_1 = 1 << 32;
    assert_ne!(frontend.negotiate(version_1) & version_1, 0);
    let pid = Pid::from_child(&child);
    kill_process(pid, Signal::TERM).unwrap();
    let end = Instant::now() + Duration::from_secs(20);
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > end {
            child.kill().unwrap();
            panic!("it does not end");
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    assert!(status.success(), "{status}");
    assert!(!socket.exists());
}
