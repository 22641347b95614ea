//! The binaries under test.
//!
//! Cargo gives an integration test the path of its own package's binaries only, so the others are
//! built here: with the profile of the test itself and into its target folder, which costs nothing
//! if they are there. With `OFFLOAD_BINARIES_BUILT` they are taken to be there (`cargo test` on the
//! whole workspace builds all binaries first, with features that a build of these alone would not
//! share); `OFFLOAD_BIN_DIR` names another folder of finished ones.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Path of `host-shim`, `vhost-blk`, `vhost-net` or `stamper`.
///
/// # Panics
/// When they cannot be built.
#[must_use]
pub fn binary(name: &str) -> PathBuf {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    let dir = DIR.get_or_init(|| match std::env::var_os("OFFLOAD_BIN_DIR") {
        Some(dir) => PathBuf::from(dir),
        None => build(),
    });
    let path = dir.join(name);
    assert!(path.is_file(), "there is no {}", path.display());
    path
}

fn build() -> PathBuf {
    let me = std::env::current_exe().expect("a test knows its own path");
    // target/PROFILE/deps/test-0123
    let dir = me.ancestors().nth(2).expect("in a target folder");
    if std::env::var_os("OFFLOAD_BINARIES_BUILT").is_some() {
        return dir.to_owned();
    }
    let target = dir.parent().expect("in a target folder");
    let profile = match dir.file_name().and_then(|name| name.to_str()) {
        Some("debug") => "dev",
        Some(name) => name,
        None => panic!("{} is no profile's folder", dir.display()),
    };
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("in the workspace");
    let output = Command::new(cargo)
        .current_dir(root)
        .args(["build", "--locked", "--profile", profile])
        .args(["-p", "host-shim", "-p", "vhost-blk", "-p", "vhost-net"])
        .args(["-p", "offload-tests", "--bins"])
        .arg("--target-dir")
        .arg(target)
        .output()
        .expect("cargo runs");
    assert!(
        output.status.success(),
        "the binaries under test cannot be built:\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    dir.to_owned()
}
