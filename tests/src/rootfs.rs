//! Debian with a stock cloud-init: what a cloud's image is made of, without what only boots it.
//!
//! `mmdebstrap` takes the packages from Debian's archive and checks their signatures. The result is a
//! tar archive that is kept in the cache, as the guests' kernel is; a guest unpacks it itself, so that
//! neither making nor using it needs root.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Command;

use host_shim::guest::cache_dir;

/// What is in it besides the essential: what Debian's cloud images have, as far as this is about it, and
/// clients of what a card serves.
const PACKAGES: &str = "cloud-init,ifupdown,isc-dhcp-client,iproute2,openssh-server,sudo,\
     curl,chrony";
/// Where the release of this host says its name; the guest is of the same, so that the keys fit.
const RELEASE: &str = "/etc/os-release";
/// What an archive's name ends with; to be changed when what is in it does.
const VERSION: &str = "2";

/// The archive. Made when it is not in the cache, which takes a minute or two.
///
/// # Panics
/// When it cannot be made: there is no mmdebstrap, or no archive to fetch from.
#[must_use]
pub fn with_cloud_init() -> PathBuf {
    let cache = cache_dir();
    fs::create_dir_all(&cache).expect("a cache");
    let release = fs::read_to_string(RELEASE).expect("a Debian");
    let release = release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .expect("a release with a name");
    let path = cache.join(format!("rootfs-{release}-{VERSION}.tar"));
    let lock = File::create(cache.join("rootfs.lock")).expect("a lock");
    lock.lock().expect("the lock");
    if path.exists() {
        return path;
    }
    let fresh = path.with_extension("new");
    let mut mmdebstrap = Command::new("mmdebstrap");
    mmdebstrap.args(["--quiet", "--variant=minbase", "--format=tar"]);
    mmdebstrap.arg(format!("--include={PACKAGES}"));
    for folder in ["man", "locale", "doc", "info", "i18n"] {
        mmdebstrap.arg(format!("--dpkgopt=path-exclude=/usr/share/{folder}/*"));
    }
    mmdebstrap.args([
        "--dpkgopt=force-unsafe-io",
        "--aptopt=Acquire::Retries \"3\"",
    ]);
    let output = mmdebstrap.arg(release).arg(&fresh).output();
    let output = output.expect("mmdebstrap, which .ci/install-packages installs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "mmdebstrap: {said}");
    fs::rename(&fresh, &path).expect("it is ours");
    path
}
