//! Debian's cloud kernel, from the archive into a cache.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::FlockOperation;

use super::{GuestError, file_error, output};

/// The package that depends on the current cloud kernel.
const META_PACKAGE: &str = "linux-image-cloud-amd64";

/// An unpacked kernel.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// The bzImage.
    pub image: PathBuf,
    /// For example `6.1.0-56-cloud-amd64`.
    pub release: String,
    /// Folder of its modules.
    pub modules: PathBuf,
}

/// Where unpacked kernels are kept: `$XDG_CACHE_HOME/offload` or `~/.cache/offload`.
#[must_use]
pub fn cache_dir() -> PathBuf {
    let base = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")));
    base.unwrap_or_else(|| PathBuf::from("/var/tmp"))
        .join("offload")
}

/// The kernel in `cache`, fetched if there is none. Safe to call from several processes at once.
///
/// # Errors
/// See [`GuestError`].
pub fn kernel(cache: &Path) -> Result<Kernel, GuestError> {
    fs::create_dir_all(cache).map_err(file_error("make", cache))?;
    let lock_path = cache.join("lock");
    let lock = File::create(&lock_path).map_err(file_error("open", &lock_path))?;
    rustix::fs::flock(&lock, FlockOperation::LockExclusive)
        .map_err(|e| file_error("lock", &lock_path)(e.into()))?;
    if let Some(kernel) = cached(cache)? {
        return Ok(kernel);
    }
    fetch(cache)?;
    cached(cache)?.ok_or_else(|| GuestError::Unexpected {
        what: format!("{META_PACKAGE} holds no kernel"),
    })
}

/// The newest kernel that is unpacked whole: folders get their name only once they are.
fn cached(cache: &Path) -> Result<Option<Kernel>, GuestError> {
    let mut dirs: Vec<PathBuf> = fs::read_dir(cache)
        .map_err(file_error("list", cache))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            path.file_name()
                .is_some_and(|n| n.to_string_lossy().starts_with("linux-"))
        })
        .collect();
    dirs.sort();
    Ok(dirs.iter().rev().find_map(|dir| unpacked(dir)))
}

fn unpacked(dir: &Path) -> Option<Kernel> {
    let modules = ["lib/modules", "usr/lib/modules"]
        .iter()
        .find_map(|at| fs::read_dir(dir.join(at)).ok()?.next()?.ok())?
        .path();
    let release = modules.file_name()?.to_str()?.to_owned();
    let image = dir.join("boot").join(format!("vmlinuz-{release}"));
    image.is_file().then_some(Kernel {
        image,
        release,
        modules,
    })
}

fn fetch(cache: &Path) -> Result<(), GuestError> {
    let work = cache.join("unpacking");
    if work.exists() {
        fs::remove_dir_all(&work).map_err(file_error("remove", &work))?;
    }
    let tree = work.join("tree");
    fs::create_dir_all(&tree).map_err(file_error("make", &tree))?;
    let package = resolve()?;
    // Unsandboxed, since apt's own user may not enter the cache of this one.
    let mut download = Command::new("apt-get");
    download.args([
        "-q",
        "-o",
        "APT::Sandbox::User=root",
        "-o",
        "Acquire::Retries=3",
        "download",
    ]);
    output(
        download.arg(&package).current_dir(&work),
        "this needs Debian",
    )?;
    let archive = fs::read_dir(&work)
        .map_err(file_error("list", &work))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|e| e == "deb"))
        .ok_or_else(|| GuestError::Unexpected {
            what: format!("apt-get brought no {package}"),
        })?;
    output(
        Command::new("dpkg-deb").arg("-x").arg(&archive).arg(&tree),
        "this needs Debian",
    )?;
    let named = cache.join(&package);
    fs::rename(&tree, &named).map_err(file_error("rename to", &named))?;
    fs::remove_dir_all(&work).map_err(file_error("remove", &work))
}

/// The package with the kernel itself, whose name has the release in it.
fn resolve() -> Result<String, GuestError> {
    let query = || {
        let mut command = Command::new("apt-cache");
        output(
            command.args(["depends", META_PACKAGE]).env("LC_ALL", "C"),
            "this needs Debian",
        )
    };
    if let Some(package) = query().ok().and_then(|text| parse_depends(&text)) {
        return Ok(package);
    }
    // A fresh image has no package lists.
    output(
        Command::new("apt-get").args(["-q", "update"]),
        "this needs Debian",
    )?;
    let text = query()?;
    parse_depends(&text).ok_or_else(|| GuestError::Unexpected {
        what: format!("{META_PACKAGE} depends on no kernel"),
    })
}

fn parse_depends(text: &str) -> Option<String> {
    text.lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with("linux-image-") && name.ends_with("-cloud-amd64"))
        .map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_real_package_is_read_from_apt() {
        let text = "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-56-cloud-amd64\n";
        assert_eq!(
            parse_depends(text).as_deref(),
            Some("linux-image-6.1.0-56-cloud-amd64")
        );
        assert_eq!(parse_depends("linux-image-cloud-amd64\n"), None);
    }

    #[test]
    fn half_unpacked_kernels_are_not_used() {
        let cache = tempfile::tempdir().unwrap();
        let dir = cache.path().join("linux-image-6.1.0-1-cloud-amd64");
        fs::create_dir_all(dir.join("lib/modules/6.1.0-1-cloud-amd64")).unwrap();
        assert!(cached(cache.path()).unwrap().is_none());
        fs::create_dir_all(dir.join("boot")).unwrap();
        fs::write(dir.join("boot/vmlinuz-6.1.0-1-cloud-amd64"), "").unwrap();
        assert_eq!(
            cached(cache.path()).unwrap().unwrap().release,
            "6.1.0-1-cloud-amd64"
        );
    }
}
