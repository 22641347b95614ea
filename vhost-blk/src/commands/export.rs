//! `export`: a volume's contents as a raw image, holes kept.
//!
//! What cannot be read, because it does not authenticate or the backing fails, reads as zeros in
//! the image; the command then says where and fails, for an image that is not what the volume was
//! must not look like one that is.

use std::collections::VecDeque;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use indicatif::ProgressBar;
use offload::cli::format_size;
use rustix::fs::{FallocateFlags, SeekFrom};
use tempfile::NamedTempFile;

use super::open::{serial_text, spare_the_key, volume};
use super::progress;
use super::pump::{Bytes, CHUNK, DEPTH, Pump};
use crate::args::ExportArgs;
use crate::device::report::LogReporter;
use crate::volume::backing::{Access, Backing};
use crate::volume::engine::{Op, Volume};
use crate::volume::geometry::{BLOCK_LEN, FANOUT};

/// Places that are listed; the rest is counted.
const LISTED: usize = 20;

pub(super) fn run(args: &ExportArgs) -> anyhow::Result<()> {
    spare_the_key(&args.key, &args.image)?;
    let (backing, recovered) = volume(&args.volume, args.key.source(), Access::Read)?;
    let source = std::fs::metadata(&args.volume)?;
    let len = recovered.superblock.geometry.volume_len();
    let target = Target::open(&args.image, len, args.force, (source.dev(), source.ino()))?;
    let blocks = recovered.superblock.geometry.blocks;
    let total = recovered.used_count() * BLOCK_LEN as u64;
    let mut missing = Missing::default();
    let reporter = Box::new(LogReporter::new(serial_text(&recovered.superblock.serial)));
    let volume = Volume::new(
        recovered,
        Arc::clone(&backing) as Arc<dyn Backing>,
        reporter,
    );
    let mut pump = Pump::new(&volume, backing).context("cannot set up io_uring")?;
    let bar = progress::bytes(total, "exporting");
    let mut written = 0;
    let mut next = Some(0);
    while let Some(from) = next {
        let runs;
        (runs, next) = volume.mapped(from, (CHUNK / BLOCK_LEN) as u64, &mut |leaves| {
            let end = |leaf: u64| leaf.saturating_mul(FANOUT).min(blocks);
            missing.add(end(leaves.start)..end(leaves.end));
        });
        written += copy(&mut pump, runs, &target, &bar, &mut missing)?;
    }
    bar.finish_and_clear();
    target
        .keep(args.force)
        .with_context(|| format!("cannot make {} durable", args.image.display()))?;
    say!(
        "{}: {} with {} of data, decrypted; keep it safe",
        args.image.display(),
        format_size(len),
        format_size(written),
    );
    if missing.count == 0 {
        return Ok(());
    }
    missing.listed.sort_unstable();
    for block in &missing.listed {
        let offset = block * BLOCK_LEN as u64;
        eprintln!(
            "unreadable: block {block}, bytes {offset} to {}",
            offset + BLOCK_LEN as u64
        );
    }
    bail!(
        "{} blocks of the volume could not be read and are zeros in the image; `vhost-blk check` \
         says why",
        missing.count,
    );
}

/// Blocks that could not be read: the first ones, and how many.
#[derive(Default)]
struct Missing {
    listed: Vec<u64>,
    count: u64,
}

impl Missing {
    fn add(&mut self, blocks: Range<u64>) {
        self.count += blocks.end.saturating_sub(blocks.start);
        let room = LISTED.saturating_sub(self.listed.len());
        self.listed.extend(blocks.take(room));
    }
}

/// A file is written under another name, for its owner only (it is plaintext), and takes its place when
/// it is complete: what was there before stays until then, and a full disk leaves nothing behind.
struct Target {
    file: File,
    /// The file and the place that it will have; none for a device.
    unnamed: Option<(NamedTempFile, PathBuf)>,
}

impl Target {
    /// Opens the image, all of it reading as zeros.
    fn open(
        path: &Path,
        len: u64,
        may_overwrite: bool,
        source: (u64, u64),
    ) -> anyhow::Result<Self> {
        let failed = || format!("cannot write {}", path.display());
        let existing = std::fs::metadata(path).ok();
        if let Some(meta) = &existing {
            let kind = meta.file_type();
            if (meta.dev(), meta.ino()) == source {
                bail!("image and volume are the same file");
            }
            if !kind.is_file() && !kind.is_block_device() {
                bail!("{} is neither a file nor a block device", path.display());
            }
            if !may_overwrite {
                bail!(
                    "{} is there already; give --force to overwrite it",
                    path.display()
                );
            }
        }
        if existing.is_some_and(|meta| meta.file_type().is_block_device()) {
            let file = File::options()
                .read(true)
                .write(true)
                .open(path)
                .with_context(failed)?;
            let room = rustix::fs::seek(&file, SeekFrom::End(0)).with_context(failed)?;
            if room < len {
                bail!(
                    "{} has {room} bytes, the volume {len}: use a larger device",
                    path.display()
                );
            }
            zero_device(&file, len).with_context(failed)?;
            return Ok(Self {
                file,
                unnamed: None,
            });
        }
        // Through a link, to the file that it means.
        let place = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let named = NamedTempFile::with_prefix_in(".vhost-blk-export-", folder(&place))
            .with_context(failed)?;
        let file = named.as_file().try_clone().with_context(failed)?;
        file.set_len(len).with_context(failed)?;
        Ok(Self {
            file,
            unnamed: Some((named, place)),
        })
    }

    /// It is complete: makes it durable, and gives it its name.
    fn keep(self, may_overwrite: bool) -> std::io::Result<()> {
        self.file.sync_all()?;
        let Some((named, place)) = self.unnamed else {
            return Ok(());
        };
        if may_overwrite {
            named.persist(&place)?;
        } else {
            named.persist_noclobber(&place)?;
        }
        File::open(folder(&place))?.sync_all()
    }
}

fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// Makes the first `len` bytes of a device zeros.
fn zero_device(file: &File, len: u64) -> std::io::Result<()> {
    let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
    match rustix::fs::fallocate(file, flags, 0, len) {
        Ok(()) => return Ok(()),
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::INVAL) => {}
        Err(errno) => return Err(errno.into()),
    }
    let zeros = vec![0; 1 << 20];
    let mut at = 0;
    while at < len {
        let part = (len - at).min(zeros.len() as u64);
        let bytes = zeros.get(..part as usize).unwrap_or_default();
        file.write_all_at(bytes, at)?;
        at += part;
    }
    Ok(())
}

/// Copies all stretches. Bytes written.
fn copy(
    pump: &mut Pump,
    mut runs: VecDeque<(u64, u64)>,
    target: &Target,
    bar: &ProgressBar,
    missing: &mut Missing,
) -> anyhow::Result<u64> {
    let mut written = 0;
    loop {
        while pump.count() < DEPTH
            && let Some((first, count)) = runs.pop_front()
        {
            let (offset, len) = (first * BLOCK_LEN as u64, count * BLOCK_LEN as u64);
            let data = vec![0; len as usize];
            pump.submit(Op::Read { offset, len }, Bytes { offset, data });
        }
        let Some(done) = pump.next().context("io_uring failed")? else {
            break;
        };
        let Bytes { offset, data } = done.payload;
        let (first, count) = (offset / BLOCK_LEN as u64, (data.len() / BLOCK_LEN) as u64);
        match done.result {
            Ok(()) => {
                target
                    .file
                    .write_all_at(&data, offset)
                    .with_context(|| format!("cannot write the image at byte {offset}"))?;
                written += data.len() as u64;
            }
            // One bad block must not cost its neighbours.
            Err(_) if count > 1 => {
                runs.extend((first..first + count).map(|block| (block, 1)));
                continue;
            }
            Err(_) => missing.add(first..first + 1),
        }
        bar.inc(data.len() as u64);
    }
    Ok(written)
}
