//! Loop devices, which need root.

#![allow(dead_code)] // each test program uses a part

use std::fs::File;
use std::path::Path;
use std::process::Command;

use super::common::{Files, stderr, stdout};

/// A loop device; its path.
pub struct Loop(pub String);

impl Loop {
    /// Over a file of its own.
    pub fn new(files: &Files, name: &str, len: u64, options: &[&str]) -> Self {
        let path = files.path(name);
        File::create(&path).unwrap().set_len(len).unwrap();
        Self::attach(&path, options)
    }

    /// Over a file that is there, with options of losetup.
    pub fn attach(path: &Path, options: &[&str]) -> Self {
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .args(options)
            .arg(path)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        Self(stdout(&output).trim().to_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}
