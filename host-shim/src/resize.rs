//! `host-shim resize`: a disk of a VM that runs becomes larger.
//!
//! The card that serves the disk does it, asked over its control socket by `vhost-blk resize`, which
//! knows that conversation. What is found out here is where that socket is.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, bail};
use clap::Args;
use host_shim::host::{self, BLOCK_CARD};
use host_shim::plan::{CONTROL_SOCKET, disk_label};
use host_shim::spec;

/// Arguments of `resize`.
#[derive(Args)]
pub(crate) struct ResizeArgs {
    /// The VM: its spec, or its name if its run directory is where it is without [run] dir.
    #[arg(value_name = "VM|SPEC")]
    vm: String,
    /// The disk: its place in the spec, from 0.
    #[arg(value_name = "DISK", value_parser = disk)]
    disk: usize,
    /// New size that the guest sees, like 20G; or max, on a block device, for all that it has.
    #[arg(value_name = "SIZE", value_parser = size)]
    size: String,
    /// Folder of the cards' binaries, when they are not beside this one or in PATH.
    #[arg(long, value_name = "DIR")]
    card_dir: Option<PathBuf>,
}

/// `max`, which the card's command says by leaving the size out.
const MAX: &str = "max";

pub(crate) fn resize(args: &ResizeArgs) -> anyhow::Result<ExitCode> {
    let run_dir = run_dir(&args.vm, args.disk)?;
    let control = run_dir.join(disk_label(args.disk)).join(CONTROL_SOCKET);
    let is_there = control.try_exists();
    if !is_there.with_context(|| format!("cannot look for {}", control.display()))? {
        bail!(
            "{} has no disk {} that is served: there is no {}. While the VM runs, count its disks from 0; \
             the volume of one that does not run grows with: vhost-blk resize --volume VOLUME --size {}",
            args.vm,
            args.disk,
            control.display(),
            args.size
        );
    }
    let card = host::find_card(args.card_dir.as_deref(), BLOCK_CARD)?;
    let mut command = Command::new(&card);
    command.arg("resize").arg("--control-socket").arg(&control);
    if args.size != MAX {
        command.args(["--size", &args.size]);
    }
    let status = command
        .status()
        .with_context(|| format!("cannot run {}", card.display()))?;
    Ok(if status.success() {
        ExitCode::SUCCESS
    } else {
        // It has said why.
        ExitCode::FAILURE
    })
}

/// Where the sockets of a VM are. A path, or what is there as a file, is a spec.
fn run_dir(vm: &str, disk: usize) -> anyhow::Result<PathBuf> {
    let path = Path::new(vm);
    if !vm.contains('/') && !path.is_file() {
        if !spec::is_name(vm) {
            bail!("`{vm}` is neither a spec that is there nor the name of a VM");
        }
        return Ok(host::default_run_dir(vm)?);
    }
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {vm}"))?;
    let spec =
        spec::parse(&text, &std::path::absolute(path)?).map_err(|e| anyhow::Error::new(*e))?;
    match spec.disks.get(disk) {
        Some(disk) if disk.read_only => bail!(
            "{} is served read-only; resize it where it can be written",
            disk.volume.display()
        ),
        Some(_) => Ok(host::run_dir(&spec)?),
        None => bail!(
            "{vm} has {} disks, counted from 0; there is no disk {disk}",
            spec.disks.len()
        ),
    }
}

/// `0`, or `disk0` as logs call it.
fn disk(text: &str) -> Result<usize, String> {
    let number = text.strip_prefix("disk").unwrap_or(text);
    let is_number = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
    let parsed = is_number.then(|| number.parse().ok()).flatten();
    parsed.ok_or_else(|| "a disk is the number of its place in the spec, from 0".to_owned())
}

fn size(text: &str) -> Result<String, String> {
    let is_size = text == MAX || spec::parse_size(text).is_some_and(|bytes| bytes > 0);
    let wrong = || "a size is a number with K, M, G or T, like 20G; or max".to_owned();
    is_size.then(|| text.to_owned()).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_its_number_with_or_without_the_word() {
        assert_eq!((disk("0"), disk("disk12")), (Ok(0), Ok(12)));
        for wrong in [
            "",
            "disk",
            "+1",
            "-1",
            "vda",
            "disk1x",
            "99999999999999999999",
        ] {
            assert!(disk(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_size_is_one_that_the_card_takes() {
        for good in ["20G", "1024", "max", "3TiB"] {
            assert_eq!(size(good).as_deref(), Ok(good));
        }
        for wrong in ["", "0", "20GB", "-1G", "MAX", "--force"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }
}
