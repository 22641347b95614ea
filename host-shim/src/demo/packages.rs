//! What the demonstration needs of Debian. One script and one list serve CI too; they are built in,
//! so that an installed binary has them.

use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};

use super::show::Show;

const SCRIPT: &str = include_str!("../../../.ci/install-packages");
const LIST: &str = include_str!("../../../.ci/debian-packages");

/// Installs what is missing, after saying what that is.
pub(super) fn install(show: &Show) -> anyhow::Result<String> {
    let missing = missing()?;
    if missing.is_empty() {
        return Ok("all there".to_owned());
    }
    show.line(&format!(
        "about to install from Debian: {}",
        missing.join(" ")
    ));
    let dir = tempfile::tempdir()?;
    std::fs::write(dir.path().join("debian-packages"), LIST)?;
    let script = dir.path().join("install-packages");
    std::fs::write(&script, SCRIPT)?;
    let log = dir.path().join("log");
    let out = std::fs::File::create(&log)?;
    let status = Command::new("bash")
        .arg(&script)
        .stdin(Stdio::null())
        .stdout(out.try_clone()?)
        .stderr(out)
        .status()
        .context("cannot run bash")?;
    let printed = std::fs::read_to_string(&log).unwrap_or_default();
    let last: Vec<_> = printed.lines().rev().take(15).collect();
    let last: Vec<_> = last.into_iter().rev().collect();
    ensure!(
        status.success(),
        "installing packages failed:\n{}",
        last.join("\n")
    );
    Ok(format!("installed {}", missing.len()))
}

fn missing() -> anyhow::Result<Vec<&'static str>> {
    let output = Command::new("dpkg-query")
        .args(["--show", "--showformat=${Package} ${db:Status-Status}\n"])
        .output()
        .context("cannot run dpkg-query: the demonstration needs Debian, or --offline")?;
    let installed = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(absent(&wanted(LIST), &installed))
}

/// One package a line, `#` starts a comment.
fn wanted(list: &str) -> Vec<&str> {
    let package = |line| str::split(line, '#').next().unwrap_or_default().trim();
    list.lines()
        .map(package)
        .filter(|name| !name.is_empty())
        .collect()
}

fn absent<'a>(wanted: &[&'a str], installed: &str) -> Vec<&'a str> {
    let is_there = |name: &str| installed.lines().any(|l| l == format!("{name} installed"));
    wanted
        .iter()
        .copied()
        .filter(|name| !is_there(name))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_packages_that_are_wholly_installed_count() {
        let list = "# comment\nqemu-utils # tool\n\ncpio\nfio\n";
        let installed = "qemu-utils installed\ncpio config-files\nlibfio installed\n";
        assert_eq!(wanted(list), ["qemu-utils", "cpio", "fio"]);
        assert_eq!(absent(&wanted(list), installed), ["cpio", "fio"]);
    }

    #[test]
    fn the_list_has_what_the_demonstration_runs() {
        for name in ["qemu-system-x86", "busybox-static", "e2fsprogs"] {
            assert!(wanted(LIST).contains(&name), "{name}");
        }
    }
}
