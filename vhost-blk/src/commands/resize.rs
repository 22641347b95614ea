//! `resize`: a volume grows, served or not.
//!
//! A card that serves a volume has it for itself, so growing it then is asked of the card, over its
//! control socket; the guest sees the new size at once. A volume that nobody serves is opened here.
//!
//! A volume that was not closed is left alone: a guest may still live that keeps, in its own memory,
//! writes that only a new card can put in. Opening the volume for writing ends that session.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use offload::cli::format_size;
use offload::control::ControlClient;
use serde_json::{Value, json};

use super::open::{serial_text, volume};
use crate::args::ResizeArgs;
use crate::device::report::LogReporter;
use crate::volume::backing::{Access, Backing, OpenError};
use crate::volume::engine::Volume;

/// Between two looks at a resize that takes its time.
const POLL: Duration = Duration::from_millis(200);

pub(super) fn run(args: &ResizeArgs) -> anyhow::Result<()> {
    let (before, after) = match (&args.target.volume, &args.target.control_socket) {
        (Some(path), _) => unserved(path, args)?,
        (None, Some(socket)) => served(socket, args.size)?,
        // clap asks for one; this is for callers that are not clap.
        (None, None) => bail!("give --volume, or --control-socket if a card serves it"),
    };
    if before == after {
        say!("the volume has {} already", format_size(after));
    } else {
        say!("{} → {}", format_size(before), format_size(after));
    }
    Ok(())
}

fn unserved(path: &Path, args: &ResizeArgs) -> anyhow::Result<(u64, u64)> {
    let opened = volume(path, args.key.source(), Access::Write);
    let (backing, recovered) = opened.map_err(|error| {
        let is_served = matches!(error.downcast_ref(), Some(OpenError::InUse(_)));
        if is_served {
            error.context(
                "a volume that is being served is resized through its card: give --control-socket PATH \
                 (the card's own --control-socket) instead of --volume",
            )
        } else {
            error
        }
    })?;
    let superblock = &recovered.superblock;
    if !superblock.clean && !args.force {
        bail!(
            "{} was not closed: its card was killed, or the power failed. Should its guest still run, \
             start the card and give --control-socket; if no guest is left, give --force",
            path.display()
        );
    }
    let before = superblock.geometry.volume_len();
    if let Some(size) = args.size {
        // Before anything is written.
        superblock.geometry.grown(size)?;
    } else if !backing.is_device() {
        bail!("{} is a file: give --size", path.display());
    }
    let reporter = Box::new(LogReporter::new(serial_text(&superblock.serial)));
    let as_backing = Arc::clone(&backing) as Arc<dyn Backing>;
    let volume = Volume::new(recovered, as_backing, reporter);
    let size = match args.size {
        Some(size) => size,
        None => volume.largest_len()?,
    };
    volume.attach(None)?;
    let grown = volume.grow(size);
    // Also when it did not grow: what was opened is closed again.
    volume.close()?;
    grown?;
    Ok((before, size))
}

fn served(socket: &Path, size: Option<u64>) -> anyhow::Result<(u64, u64)> {
    let mut client = ControlClient::connect(socket)?;
    let size = size.map_or(json!("max"), |size| json!(size));
    let mut answer = client.call("resize", json!({ "size": size }))?;
    loop {
        let number = |name: &str| answer.get(name).and_then(Value::as_u64);
        match answer.get("state").and_then(Value::as_str) {
            Some("done") => {
                let sizes = number("before_bytes").zip(number("size_bytes"));
                return sizes.context("the card's answer is not understood");
            }
            Some("running") => {}
            Some("failed") => {
                let why = answer.get("error").and_then(Value::as_str);
                bail!("the card refuses: {}", why.unwrap_or("it does not say why"));
            }
            _ => bail!("the card's answer is not understood: {answer}"),
        }
        std::thread::sleep(POLL);
        answer = client.call("resize", Value::Null)?;
    }
}
