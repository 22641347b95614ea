//! `compact`: moves everything together, and gives free room back to the file system. On a volume
//! that nobody uses by itself, on a served one through the card's control socket.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use offload::cli::format_size;
use offload::control::ControlClient;
use offload::stop::StopSignal;
use serde_json::{Value, json};

use super::open::{serial_text, volume};
use super::progress;
use super::rehome::{self, Progress};
use crate::args::CompactArgs;
use crate::device::report::LogReporter;
use crate::volume::backing::{Access, Backing, FileBacking};
use crate::volume::engine::{PART_BLOCKS, Volume};
use crate::volume::geometry::{BLOCK_LEN, CHUNK_SLOTS, Slot};
use crate::volume::recover::Recovered;

const PART_LEN: u64 = PART_BLOCKS * BLOCK_LEN as u64;
/// How often a card is asked how far it is.
const ASK: Duration = Duration::from_millis(100);

pub(super) fn run(args: &CompactArgs) -> anyhow::Result<()> {
    let progress = match (&args.control_socket, &args.volume) {
        (Some(socket), _) => served(socket)?,
        (None, Some(path)) => {
            let (backing, recovered) = volume(path, args.key.source(), Access::Write)?;
            offline(&backing, recovered)?
        }
        (None, None) => {
            bail!("give the volume, or the --control-socket of the card that serves it")
        }
    };
    if let Some(error) = progress.error {
        bail!("{error}");
    }
    say!(
        "moved {}; takes {} of the backing, {} before",
        format_size(progress.moved * BLOCK_LEN as u64),
        format_size(progress.after),
        format_size(progress.before),
    );
    if progress.is_cut_short {
        bail!(
            "not all of the volume could be moved together: the backing is full, or the command was stopped"
        );
    }
    Ok(())
}

fn offline(backing: &Arc<FileBacking>, recovered: Recovered) -> anyhow::Result<Progress> {
    let stop = StopSignal::from_signals().context("cannot wait for signals")?;
    let serial = serial_text(&recovered.superblock.serial);
    // What lies behind the last slot in use was never used, or given up in an earlier life.
    let geometry = recovered.superblock.geometry;
    let volume = Volume::new(
        recovered,
        Arc::clone(backing) as Arc<dyn Backing>,
        Box::new(LogReporter::new(serial)),
    );
    volume.attach(None)?;
    let from = volume.shared().end_of_use() * CHUNK_SLOTS;
    let len = geometry.backing_len() - Slot(from).offset();
    if len > 0 && !backing.is_device() {
        // Not every file system can; then nothing is given back.
        let _ = backing.punch(Slot(from).offset(), len);
    }
    let bar = progress::bytes(volume.shared().volume_len(), "compacting");
    let compacted = rehome::compact(
        &volume,
        Arc::clone(backing),
        &|| !stop.is_stopped(),
        &|done| bar.set_position(done * PART_LEN),
    );
    bar.finish_and_clear();
    // Also when it failed: what was moved so far stays.
    let closed = volume.close();
    let progress = compacted?;
    closed.context("the volume could not be closed")?;
    Ok(progress)
}

fn served(socket: &Path) -> anyhow::Result<Progress> {
    let mut client = ControlClient::connect(socket)?;
    let told = |value: Value| {
        serde_json::from_value::<Progress>(value).context("the card's answer is not understood")
    };
    let mut progress = told(client.call("compact", json!({"start": true}))?)?;
    let bar = progress::bytes(0, "compacting");
    while progress.is_running {
        bar.set_length(progress.parts * PART_LEN);
        bar.set_position(progress.done * PART_LEN);
        std::thread::sleep(ASK);
        progress = told(client.call("compact", Value::Null)?)?;
    }
    bar.finish_and_clear();
    Ok(progress)
}
