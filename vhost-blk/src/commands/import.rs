//! `import`: a volume with the contents of a disk image.
//!
//! Raw images are read as they are: holes are skipped, and so are blocks of zeros, for in a new
//! volume every block reads as zeros. What is not raw goes through `qemu-img convert` into a
//! sparse temporary file first, since qemu-img cannot write a disk to a pipe.
//!
//! An image may come from a stranger, and an image's header can name another file to take data
//! from: a guest that writes such a header to the start of its raw disk would have the host's
//! files imported. So a format that is only guessed from the image's first bytes is not followed
//! to other files.
//!
//! A sealed volume has the length and the looks of a raw image too. Nobody who imports one wants its
//! ciphertext for a disk, so that is only taken when the format is said to be raw.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use anyhow::{Context, bail};
use indicatif::ProgressBar;
use offload::cli::format_size;
use rustix::fs::SeekFrom;
use tempfile::NamedTempFile;

use super::create::make;
use super::open::{id_text, key, serial_text, spare_the_key};
use super::progress;
use super::pump::{Bytes, CHUNK, DEPTH, Pump};
use crate::args::ImportArgs;
use crate::device::report::LogReporter;
use crate::volume::backing::Backing;
use crate::volume::create::Fills;
use crate::volume::engine::{Op, Volume};
use crate::volume::geometry::SPARE_PERCENT;
use crate::volume::geometry::{BLOCK_LEN, MIN_VOLUME_LEN};
use crate::volume::recover::recover;
use crate::volume::superblock::{COPIES, Superblock, SuperblockError};

pub(super) fn run(args: &ImportArgs) -> anyhow::Result<()> {
    spare_the_key(&args.key, &args.volume)?;
    let material = key(args.key.source())?;
    refuse_what_is_no_image(&args.image)?;
    refuse_the_same(&args.image, &args.volume)?;
    let source = Source::open(args)?;
    let size = source
        .len
        .next_multiple_of(BLOCK_LEN as u64)
        .max(MIN_VOLUME_LEN);
    let (backing, superblock, unfinished) = make(
        &args.volume,
        Some(size),
        SPARE_PERCENT,
        &material,
        args.force,
        Fills::Import,
    )?;
    let backing = Arc::new(backing);
    let recovered = recover(&*backing, &material)?;
    let reporter = Box::new(LogReporter::new(serial_text(&superblock.serial)));
    let volume = Volume::new(
        recovered,
        Arc::clone(&backing) as Arc<dyn Backing>,
        reporter,
    );
    volume.attach(None)?;
    let copied = copy(&source, &volume, &backing)?;
    volume.complete()?;
    volume.close()?;
    unfinished.keep()?;

    say!(
        "{}: a new volume of {}, {} of it data, from {}\n  id      {}\n  serial  {}",
        args.volume.display(),
        format_size(size),
        format_size(copied),
        args.image.display(),
        id_text(&superblock.id),
        serial_text(&superblock.serial),
    );
    if size != source.len {
        say!(
            "  note    the image has {} bytes; the volume was rounded up to {size}",
            source.len
        );
    }
    Ok(())
}

/// Opening a FIFO would wait for its other end.
fn refuse_what_is_no_image(image: &Path) -> anyhow::Result<()> {
    let meta = std::fs::metadata(image);
    let kind = meta
        .with_context(|| format!("cannot open {}", image.display()))?
        .file_type();
    if !kind.is_file() && !kind.is_block_device() {
        bail!(
            "{} is neither a regular file nor a block device",
            image.display()
        );
    }
    Ok(())
}

fn refuse_the_same(image: &Path, volume: &Path) -> anyhow::Result<()> {
    let identity = |path: &Path| std::fs::metadata(path).map(|m| (m.dev(), m.ino(), m.rdev()));
    let from = identity(image).with_context(|| format!("cannot open {}", image.display()))?;
    if identity(volume).is_ok_and(|to| to == from) {
        bail!("image and volume are the same file; give the volume another name");
    }
    Ok(())
}

/// A raw image.
struct Source {
    file: File,
    len: u64,
    /// Removed when the source is dropped.
    _converted: Option<NamedTempFile>,
}

impl Source {
    fn open(args: &ImportArgs) -> anyhow::Result<Self> {
        let image = &args.image;
        let failed = || format!("cannot read {}", image.display());
        let file = File::open(image).with_context(failed)?;
        let kind = file.metadata().with_context(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            bail!("{} is neither a file nor a block device", image.display());
        }
        let mut start = [0; 64];
        let got = read_start(&file, &mut start).with_context(failed)?;
        let guessed = guess_format(start.get(..got).unwrap_or_default());
        let format = args.format.as_deref().unwrap_or(guessed);
        if format == "raw" {
            if args.format.is_none() {
                refuse_sealed(&file, image)?;
            }
            return Self::raw(file, None).with_context(failed);
        }
        if args.format.is_none() {
            refuse_other_files(image, format)?;
        }
        if format == "qcow2" {
            refuse_damaged(image, format)?;
        }
        let converted = convert(image, format, &args.volume)?;
        let file = converted
            .reopen()
            .context("cannot reopen the converted image")?;
        Self::raw(file, Some(converted)).with_context(failed)
    }

    fn raw(file: File, converted: Option<NamedTempFile>) -> io::Result<Self> {
        // A device has no length in its metadata; its end has.
        let len = rustix::fs::seek(&file, SeekFrom::End(0))?;
        Ok(Self {
            file,
            len,
            _converted: converted,
        })
    }

    /// The first stretch of data at or behind `from`.
    fn next_data(&self, from: u64) -> io::Result<Option<(u64, u64)>> {
        if from >= self.len {
            return Ok(None);
        }
        let start = match rustix::fs::seek(&self.file, SeekFrom::Data(from)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => return Ok(None),
            // No idea of holes here: all of it is data.
            Err(rustix::io::Errno::INVAL) => return Ok(Some((from, self.len))),
            Err(errno) => return Err(errno.into()),
        };
        let end = rustix::fs::seek(&self.file, SeekFrom::Hole(start))?;
        Ok(Some((start, end.min(self.len))))
    }
}

/// A copy of a volume's header, of a version that is known or not, in either place.
fn refuse_sealed(file: &File, image: &Path) -> anyhow::Result<()> {
    for at in COPIES {
        let mut block = [0; BLOCK_LEN];
        let got = read_at(file, &mut block, at);
        let got = got.with_context(|| format!("cannot read {}", image.display()))?;
        let found = Superblock::claims(&block);
        if got < BLOCK_LEN || matches!(found, Err(SuperblockError::NoMagic)) {
            continue;
        }
        bail!(
            "{} is a sealed volume, not a disk image. For another volume with its contents, `vhost-blk \
             export` it with its key and import what that writes; for a copy under the same key, copy \
             the file. If the disk is really to hold these sealed bytes, give --format raw",
            image.display(),
        );
    }
    Ok(())
}

fn read_start(file: &File, into: &mut [u8]) -> io::Result<usize> {
    read_at(file, into, 0)
}

/// Reads until `into` is full or the file ends: how much there was.
fn read_at(file: &File, into: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut got = 0;
    while let Some(rest) = into.get_mut(got..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, offset + got as u64)? {
            0 => break,
            n => got += n,
        }
    }
    Ok(got)
}

/// The format by an image's first bytes, under qemu-img's name for it.
fn guess_format(start: &[u8]) -> &'static str {
    const MAGICS: [(&[u8], &str); 7] = [
        (b"QFI\xfb", "qcow2"),
        (b"KDMV", "vmdk"),
        (b"COWD", "vmdk"),
        (b"# Disk DescriptorFile", "vmdk"),
        (b"vhdxfile", "vhdx"),
        (b"conectix", "vpc"),
        (b"QED\0", "qed"),
    ];
    if start.get(0x40 - 4..).is_some() && start.starts_with(b"<<< ") {
        return "vdi";
    }
    MAGICS
        .iter()
        .find(|(magic, _)| start.starts_with(magic))
        .map_or("raw", |(_, format)| format)
}

/// Runs qemu-img.
fn qemu_img(args: &[&str], paths: &[&Path]) -> anyhow::Result<Command> {
    let mut command = Command::new("qemu-img");
    command.args(args);
    for path in paths {
        // Never to be taken for an option or, by a colon in it, for a protocol.
        command.arg(std::path::absolute(path)?);
    }
    command.stdin(Stdio::null());
    Ok(command)
}

const NO_QEMU_IMG: &str =
    "cannot run qemu-img, which reads images that are not raw; install qemu-utils";

fn refuse_other_files(image: &Path, format: &str) -> anyhow::Result<()> {
    let output = qemu_img(&["info", "--output=json", "-f", format], &[image])?
        .output()
        .context(NO_QEMU_IMG)?;
    if !output.status.success() {
        bail!(
            "{} begins like a {format} image, but qemu-img cannot read it: {}\nIf it is a raw \
             disk, give --format raw",
            image.display(),
            String::from_utf8_lossy(&output.stderr).trim(),
        );
    }
    let info: serde_json::Value =
        serde_json::from_slice(&output.stdout).context("qemu-img info gave no JSON")?;
    let data_file = info.pointer("/format-specific/data/data-file");
    let extents = info.pointer("/format-specific/data/extents");
    let has_many = extents
        .and_then(|list| list.as_array())
        .is_some_and(|list| list.len() > 1);
    if info.get("backing-filename").is_some() || data_file.is_some() || has_many {
        bail!(
            "{} takes data from other files. If you know where it comes from, give --format {format} \
             to follow it; if it is a raw disk, --format raw",
            image.display(),
        );
    }
    Ok(())
}

/// `qemu-img convert` reads what is behind the end of a truncated image as zeros and succeeds.
fn refuse_damaged(image: &Path, format: &str) -> anyhow::Result<()> {
    let output = qemu_img(&["check", "-q", "-f", format], &[image])?
        .output()
        .context(NO_QEMU_IMG)?;
    // 3: clusters that nothing uses, which cost room and no data.
    if matches!(output.status.code(), Some(0 | 3)) {
        return Ok(());
    }
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    let first: Vec<&str> = said
        .lines()
        .filter(|line| !line.is_empty())
        .take(3)
        .collect();
    bail!(
        "{} is damaged or cut off: {}\nSee `qemu-img check`; copy it again from where it came from",
        image.display(),
        first.join("; "),
    );
}

/// Converts an image to a raw, sparse temporary file beside the volume.
fn convert(image: &Path, format: &str, volume: &Path) -> anyhow::Result<NamedTempFile> {
    let is_device = std::fs::metadata(volume).is_ok_and(|m| m.file_type().is_block_device());
    let folder = match volume.parent() {
        _ if is_device => std::env::temp_dir(),
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
        _ => PathBuf::from("."),
    };
    let target = NamedTempFile::with_prefix_in(".vhost-blk-import-", &folder)
        .with_context(|| format!("cannot make a temporary file in {}", folder.display()))?;
    let args = ["convert", "-p", "-f", format, "-O", "raw", "-S", "4k"];
    let mut child = qemu_img(&args, &[image, target.path()])?
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context(NO_QEMU_IMG)?;
    let bar = progress::bytes(100, "converting, percent");
    if let Some(mut out) = child.stdout.take() {
        follow(&mut out, &bar);
    }
    let output = child
        .wait_with_output()
        .context("cannot wait for qemu-img")?;
    bar.finish_and_clear();
    if !output.status.success() {
        bail!(
            "qemu-img cannot convert {}: {}",
            image.display(),
            String::from_utf8_lossy(&output.stderr).trim(),
        );
    }
    Ok(target)
}

/// Reads `    (12.34/100%)\r` until the end.
fn follow(out: &mut impl Read, bar: &ProgressBar) {
    let mut bytes = [0; 256];
    while let Ok(got @ 1..) = out.read(&mut bytes) {
        let text = String::from_utf8_lossy(bytes.get(..got).unwrap_or_default()).into_owned();
        let last = text
            .rsplit('(')
            .next()
            .and_then(|rest| rest.split('.').next());
        if let Some(percent) = last.and_then(|number| number.parse().ok()) {
            bar.set_position(percent);
        }
    }
}

/// Copies all data. How many bytes of it there were.
fn copy(
    source: &Source,
    volume: &Volume,
    backing: &Arc<crate::volume::backing::FileBacking>,
) -> anyhow::Result<u64> {
    let mut pump = Pump::new(volume, Arc::clone(backing)).context("cannot set up io_uring")?;
    let bar = progress::bytes(source.len, "importing");
    let mut copied = 0;
    let mut position = 0;
    while let Some((start, end)) = source
        .next_data(position)
        .context("cannot read the image")?
    {
        // Whole blocks; what a hole adds to them reads as zeros.
        let mut at = start - start % BLOCK_LEN as u64;
        while at < end {
            let len = (end - at).min(CHUNK as u64) as usize;
            let mut chunk = vec![0; len.next_multiple_of(BLOCK_LEN)];
            let there = (source.len - at).min(chunk.len() as u64) as usize;
            let part = chunk.get_mut(..there).unwrap_or_default();
            source
                .file
                .read_exact_at(part, at)
                .context("cannot read the image")?;
            for (offset, data) in runs_of_data(at, &chunk) {
                copied += data.len() as u64;
                let len = data.len() as u64;
                let op = Op::Write {
                    offset,
                    len,
                    durable: false,
                };
                let data = data.to_vec();
                pump.submit(op, Bytes { offset, data });
                while pump.count() >= DEPTH {
                    finish_one(&mut pump)?;
                }
            }
            at += chunk.len() as u64;
            bar.set_position(at.min(source.len));
        }
        position = at.max(end);
    }
    while finish_one(&mut pump)? {}
    bar.finish_and_clear();
    Ok(copied)
}

fn finish_one(pump: &mut Pump) -> anyhow::Result<bool> {
    let Some(done) = pump.next().context("io_uring failed")? else {
        return Ok(false);
    };
    done.result
        .with_context(|| format!("cannot write at byte {}", done.payload.offset))?;
    Ok(true)
}

/// The stretches of blocks that are not all zeros.
fn runs_of_data(at: u64, chunk: &[u8]) -> Vec<(u64, &[u8])> {
    let mut runs = Vec::new();
    let mut first = None;
    let blocks = chunk.chunks(BLOCK_LEN);
    let count = blocks.len();
    for (index, block) in blocks.enumerate() {
        let is_data = block.iter().any(|byte| *byte != 0);
        match (is_data, first) {
            (true, None) => first = Some(index),
            (false, Some(_)) => runs.extend(first.take().map(|from| (from, index))),
            _ => {}
        }
    }
    runs.extend(first.map(|from| (from, count)));
    let cut = |(from, to): (usize, usize)| {
        let bytes = chunk.get(from * BLOCK_LEN..(to * BLOCK_LEN).min(chunk.len()));
        (at + (from * BLOCK_LEN) as u64, bytes.unwrap_or_default())
    };
    runs.into_iter().map(cut).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_guessed_by_their_magic() {
        assert_eq!(guess_format(b"QFI\xfb\0\0\0\x03"), "qcow2");
        assert_eq!(guess_format(b"vhdxfile"), "vhdx");
        let mut vdi = b"<<< Oracle VM VirtualBox Disk Image >>>\n".to_vec();
        vdi.resize(64, 0);
        assert_eq!(guess_format(&vdi), "vdi");
        for raw in [&b""[..], b"QF", &[0; 64], b"<<< x"] {
            assert_eq!(guess_format(raw), "raw");
        }
    }

    #[test]
    fn only_blocks_with_data_are_copied() {
        let mut chunk = vec![0; 6 * BLOCK_LEN];
        for block in [1, 2, 5] {
            chunk[block * BLOCK_LEN + 4095] = 1;
        }
        let runs: Vec<(u64, usize)> = runs_of_data(1 << 20, &chunk)
            .into_iter()
            .map(|(offset, data)| (offset - (1 << 20), data.len()))
            .collect();
        assert_eq!(runs, [(4096, 8192), (5 * 4096, 4096)]);
        assert!(runs_of_data(0, &[0; 8192]).is_empty());
        assert_eq!(runs_of_data(0, &[1; 8192]), [(0, &[1; 8192][..])]);
    }
}
