//! The binary itself: exit status and what people see.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

use std::path::Path;
use std::process::{Command, Output};

fn shim(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_host-shim"))
        .args(args)
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A spec in a folder of its own, with a file that passes for a card.
fn spec(content: &str) -> (tempfile::TempDir, String) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm.toml");
    std::fs::write(&path, content).unwrap();
    std::fs::write(dir.path().join("vhost-blk"), "").unwrap();
    (dir, path.to_str().unwrap().to_owned())
}

const GOOD: &str = "[vm]\nname = \"cl\"\nmemory = \"64M\"\naccel = \"tcg\"\n\
    [[disk]]\nvolume = \"a.vol\"\nkey-file = \"a.key\"\n[run]\ndir = \"run\"\n";

#[test]
fn a_wrong_spec_is_shown_with_its_line_and_status_2() {
    let (_dir, path) = spec(&GOOD.replace("key-file", "keyfile"));
    let output = shim(&["run", &path]);
    assert_eq!(output.status.code(), Some(2));
    let shown = text(&output.stderr);
    assert!(shown.contains("unknown field `keyfile`"), "{shown}");
    assert!(shown.contains("keyfile = \"a.key\""), "{shown}");
}

#[test]
fn a_missing_spec_is_named() {
    let output = shim(&["run", "/nonexistent.toml"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("cannot read /nonexistent.toml: No such file"));
}

#[test]
fn a_dry_run_prints_the_plan_and_starts_nothing() {
    let (dir, path) = spec(GOOD);
    let card_dir = dir.path().to_str().unwrap();
    let output = shim(&["run", &path, "--dry-run", "--card-dir", card_dir]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let shown = text(&output.stdout);
    assert!(shown.contains("vhost-blk serve"), "{shown}");
    assert!(shown.contains("-sandbox on,"), "{shown}");
    let output = shim(&["run", &path, "--dry-run", "--json", "--card-dir", card_dir]);
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(value["accel"], "tcg");
    assert!(!dir.path().join("run").exists());
}

#[test]
fn a_card_that_cannot_be_executed_fails_the_run_with_status_1() {
    let (dir, path) = spec(GOOD);
    let card_dir = dir.path().to_str().unwrap();
    let output = shim(&["run", &path, "--card-dir", card_dir]);
    assert_eq!(output.status.code(), Some(1));
    let shown = text(&output.stderr);
    assert!(shown.contains("disk0 could not be started"), "{shown}");
    assert!(!Path::new(&format!("{card_dir}/run/disk0")).exists());
}

#[test]
fn the_probe_answers_in_json_whatever_it_finds() {
    let output = shim(&["probe-kvm", "--json"]);
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(value["verdict"].is_string(), "{value}");
    assert!(matches!(output.status.code(), Some(0 | 1)));
    let output = shim(&["probe-kvm"]);
    assert!(text(&output.stdout).contains("/dev/kvm"));
}
