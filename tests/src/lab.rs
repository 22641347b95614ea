//! A temporary folder with keys, volumes and a guest's files; commands on volumes.

use std::fs::{File, Permissions};
use std::io::Write as _;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use host_shim::guest::{self, Initrd};
use tempfile::TempDir;

use crate::binaries::binary;
use crate::stamp::mix;

/// Runs in the guest: reads commands on the console, one a line with a number before it, and answers
/// with what they print and their status. The kernel is silenced, so that answers stay whole.
const AGENT: &str = r#"
dmesg -n 1
stty -echo -opost
echo '@@ready'
while read -r number line; do
    eval "$line" </dev/null 2>&1
    echo "@@$number $?"
done
"#;

/// What the guest's DHCP client calls: takes the lease, and prints it.
const LEASE: &str = r#"#!/bin/sh
[ "$1" = bound ] || exit 0
ip addr add "$ip/$mask" dev "$interface"
ip route add default via "$router"
echo "lease $ip/$mask router $router hostname $hostname"
"#;

/// A folder of one test, removed in the end.
pub struct Lab {
    dir: TempDir,
    /// Decides what is random in this test.
    pub seed: u64,
}

/// A volume and its key.
#[derive(Debug, Clone)]
pub struct Volume {
    /// The backing.
    pub path: PathBuf,
    /// The key file.
    pub key: PathBuf,
}

impl Lab {
    /// A new one, with a guest in it.
    ///
    /// # Panics
    /// When it cannot be had.
    #[must_use]
    pub fn new() -> Self {
        let lab = Self::without_guest();
        let kernel = guest::kernel(&guest::cache_dir()).expect("Debian's cloud kernel");
        let stamper = std::fs::read(binary("stamper")).expect("the stamper");
        let libgcc = library("libgcc_s.so.1");
        let initrd = Initrd {
            modules: &["virtio_pci", "virtio_blk", "ext4", "virtio_net"],
            programs: &[
                "mke2fs",
                "e2fsck",
                "resize2fs",
                "blkdiscard",
                "fstrim",
                "dd",
            ],
            files: &[
                ("/sbin/stamper", &stamper),
                (&libgcc.0, &libgcc.1),
                ("/sbin/lease", LEASE.as_bytes()),
            ],
            script: AGENT,
        };
        let archive = initrd.build(&kernel).expect("a RAM disk");
        std::fs::write(lab.path("initrd"), archive).expect("room");
        std::os::unix::fs::symlink(&kernel.image, lab.path("vmlinuz")).expect("a link");
        lab
    }

    /// A new one for what needs no guest.
    ///
    /// # Panics
    /// When it cannot be had.
    #[must_use]
    pub fn without_guest() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("offload-e2e-")
            .tempdir()
            .expect("a temporary folder");
        // Like /run/offload: others may pass, not look.
        let open = Permissions::from_mode(0o711);
        std::fs::set_permissions(dir.path(), open).expect("it is ours");
        Self { dir, seed: seed() }
    }

    /// A path in it.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A key file with a random key.
    ///
    /// # Panics
    /// When it cannot be written.
    #[must_use]
    pub fn key(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        let salt = name.bytes().fold(self.seed, |a, b| mix(a ^ u64::from(b)));
        let key: Vec<u8> = (0..4).flat_map(|i| mix(salt ^ i).to_le_bytes()).collect();
        let mut file = File::create_new(&path).expect("a new key");
        file.set_permissions(Permissions::from_mode(0o600))
            .expect("it is ours");
        file.write_all(&key).expect("room");
        path
    }

    /// A new volume of `size`, as `vhost-blk create` takes it, with a key of its own.
    #[must_use]
    pub fn volume(&self, name: &str, size: &str) -> Volume {
        let key = self.key(&format!("{name}.key"));
        let volume = Volume {
            path: self.path(name),
            key,
        };
        let key = text(&volume.key);
        blk_ok(&[
            "create",
            "--size",
            size,
            "--key-file",
            key,
            text(&volume.path),
        ]);
        volume
    }

    /// Processes that have this folder in their command line.
    #[must_use]
    pub fn processes(&self) -> Vec<String> {
        let needle = text(self.dir.path());
        crate::guest::processes()
            .into_iter()
            .filter(|process| process.command.contains(needle))
            .map(|process| format!("{} {}", process.pid, process.command))
            .collect()
    }
}

impl Default for Lab {
    fn default() -> Self {
        Self::new()
    }
}

impl Volume {
    /// `vhost-blk check`: whether it is clean, and what it printed.
    ///
    /// # Panics
    /// When it could not be checked.
    #[must_use]
    pub fn check(&self) -> (bool, String) {
        let output = blk(&["check", "--key-file", text(&self.key), text(&self.path)]);
        let printed = printed(&output);
        match output.status.code() {
            Some(0) => (true, printed),
            Some(1) => (false, printed),
            other => panic!("check ended with {other:?}: {printed}"),
        }
    }

    /// Panics unless it is clean.
    pub fn assert_clean(&self) {
        let (is_clean, printed) = self.check();
        assert!(is_clean, "{printed}");
    }

    /// Its contents, decrypted by `vhost-blk export`.
    ///
    /// # Panics
    /// When there is no reading what it wrote.
    #[must_use]
    pub fn export(&self) -> Vec<u8> {
        let image = self.path.with_extension("raw");
        let key = text(&self.key);
        blk_ok(&[
            "export",
            "--force",
            "--key-file",
            key,
            text(&self.path),
            text(&image),
        ]);
        let bytes = std::fs::read(&image).expect("the exported image");
        std::fs::remove_file(&image).expect("it is ours");
        bytes
    }

    /// What a thief of the backing would have.
    ///
    /// # Panics
    /// When it cannot be read.
    #[must_use]
    pub fn backing(&self) -> Vec<u8> {
        std::fs::read(&self.path).expect("the backing")
    }

    /// Flips the lowest bit of the byte at `offset` of the backing, durably.
    ///
    /// # Panics
    /// When it cannot.
    pub fn flip(&self, offset: u64) {
        let file = File::options()
            .read(true)
            .write(true)
            .open(&self.path)
            .expect("the backing");
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).expect("inside");
        file.write_all_at(&[byte[0] ^ 1], offset).expect("inside");
        file.sync_all().expect("a working disk");
    }
}

/// Runs `vhost-blk` to its end.
///
/// # Panics
/// When it does not start.
#[must_use]
pub fn blk(args: &[&str]) -> Output {
    Command::new(binary("vhost-blk"))
        .args(args)
        .output()
        .expect("vhost-blk starts")
}

/// Runs `vhost-blk`, which must succeed; what it printed.
pub fn blk_ok(args: &[&str]) -> String {
    let output = blk(args);
    let printed = printed(&output);
    assert!(output.status.success(), "vhost-blk {args:?}: {printed}");
    printed
}

fn printed(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    text(&output.stdout) + &text(&output.stderr)
}

/// A path as text: those of tests are UTF-8.
///
/// # Panics
/// When it is not.
#[must_use]
pub fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// A library of the host: its path and content.
fn library(name: &str) -> (String, Vec<u8>) {
    let output = Command::new("ldd")
        .arg(binary("stamper"))
        .output()
        .expect("ldd runs");
    let list = String::from_utf8_lossy(&output.stdout).into_owned();
    let path = list
        .split_ascii_whitespace()
        .find(|word| word.starts_with('/') && word.ends_with(name))
        .unwrap_or_else(|| panic!("no {name} in {list}"));
    (path.to_owned(), std::fs::read(path).expect("a library"))
}

fn seed() -> u64 {
    let seed = match std::env::var("OFFLOAD_SEED") {
        Ok(text) => text.parse().expect("OFFLOAD_SEED is a number"),
        Err(_) => {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            mix(now.map_or(0, |d| d.as_nanos() as u64))
        }
    };
    // Shown with the output of a test that failed.
    println!("OFFLOAD_SEED={seed}");
    seed
}
