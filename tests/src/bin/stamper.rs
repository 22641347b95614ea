//! Stamps sectors of a disk and verifies them, inside a guest. All I/O is direct: what a write call
//! returned for was acknowledged by the card.
//!
//! ```text
//! stamper load DEV SEED WORKERS STOP      random writes, reads and discards until the file STOP is
//!                                         there, then reads everything back; a line of progress
//!                                         four times a second
//! stamper sync DEV SEED WORKERS           writes and fsyncs for ever, saying after each fsync what
//!                                         is durable: "SYNCED worker epoch"
//! stamper check DEV SEED WORKERS EPOCHS   holds a disk to those lines; EPOCHS is e0,e1,...
//! stamper fill DEV                        version 1 everywhere
//! stamper scan DEV                        reads block by block and says which fail: "BAD block"
//! stamper digest DEV                      a number for the content
//! ```
//!
//! Exit status: 0 all as it should be, 1 wrong data, 2 an I/O error or wrong use.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek as _, SeekFrom, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use offload_tests::stamp::{
    Digest, Found, Random, SECTOR_LEN, epoch_runs, fill, find, mix, region,
};

const ALIGN: usize = 4096;
/// Of `linux/fs.h`: discard, and write zeroes.
const BLKDISCARD: libc::c_ulong = 0x1277;
const BLKZEROOUT: libc::c_ulong = 0x127f;
/// Largest request.
const RUN_MAX: u64 = 64;
const PROGRESS: Duration = Duration::from_millis(250);

/// What went wrong, and the exit status for it.
struct Wrong(u8, String);

impl From<io::Error> for Wrong {
    fn from(error: io::Error) -> Self {
        Self(2, error.to_string())
    }
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = match args[..] {
        ["load", dev, seed, workers, stop] => number(seed)
            .and_then(|seed| Ok((seed, number(workers)?)))
            .and_then(|(seed, workers)| load(Path::new(dev), seed, workers, Path::new(stop))),
        ["sync", dev, seed, workers] => number(seed)
            .and_then(|seed| Ok((seed, number(workers)?)))
            .and_then(|(seed, workers)| sync(Path::new(dev), seed, workers)),
        ["check", dev, seed, workers, epochs] => number(seed)
            .and_then(|seed| Ok((seed, number(workers)?)))
            .and_then(|(seed, workers)| check(Path::new(dev), seed, workers, epochs)),
        ["fill", dev] => fill_all(Path::new(dev)),
        ["scan", dev] => scan(Path::new(dev)),
        ["digest", dev] => digest(Path::new(dev)),
        _ => Err(Wrong(2, "wrong use".to_owned())),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Wrong(status, text)) => {
            say(&format!("FAILED {text}"));
            ExitCode::from(status)
        }
    }
}

fn number(text: &str) -> Result<u64, Wrong> {
    text.parse()
        .map_err(|_| Wrong(2, format!("{text} is no number")))
}

/// One line in one write, so that lines of workers do not mix.
fn say(line: &str) {
    let mut out = io::stdout().lock();
    // A console that is gone leaves nobody to tell.
    let _ = out.write_all(format!("{line}\n").as_bytes());
    let _ = out.flush();
}

/// A disk, and a buffer aligned for it.
struct Disk {
    path: PathBuf,
    file: File,
    sectors: u64,
}

impl Disk {
    fn open(path: &Path, write: bool) -> Result<Self, Wrong> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(write)
            .custom_flags(libc::O_DIRECT)
            .open(path)
            .map_err(|e| Wrong(2, format!("open: {e}")))?;
        let len = file.seek(SeekFrom::End(0))?;
        Ok(Self {
            path: path.to_owned(),
            file,
            sectors: len / SECTOR_LEN as u64,
        })
    }

    fn failed(&self, what: &str, (first, count): (u64, u64), error: &io::Error) -> Wrong {
        let disk = self.path.display();
        Wrong(
            2,
            format!("{what} of {disk} at sector {first}, {count} sectors: {error}"),
        )
    }

    fn read(&self, run: (u64, u64), buffer: &mut Buffer) -> Result<(), Wrong> {
        self.file
            .read_exact_at(buffer.take(run.1), run.0 * SECTOR_LEN as u64)
            .map_err(|e| self.failed("read", run, &e))
    }

    fn write(&self, run: (u64, u64), version: u32, buffer: &mut Buffer) -> Result<(), Wrong> {
        fill(buffer.take(run.1), run.0, version);
        self.file
            .write_all_at(buffer.take(run.1), run.0 * SECTOR_LEN as u64)
            .map_err(|e| self.failed("write", run, &e))
    }

    fn discard(&self, run: (u64, u64), is_zeroing: bool) -> Result<(), Wrong> {
        let range = [run.0 * SECTOR_LEN as u64, run.1 * SECTOR_LEN as u64];
        let request = if is_zeroing { BLKZEROOUT } else { BLKDISCARD };
        // SAFETY: both requests read a start and a length in bytes, two u64, from the pointer, which
        // is valid for the call; neither writes through it, and the descriptor is open.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), request, range.as_ptr()) };
        if result == 0 {
            return Ok(());
        }
        Err(self.failed("discard", run, &io::Error::last_os_error()))
    }

    fn sync(&self) -> Result<(), Wrong> {
        self.file
            .sync_data()
            .map_err(|e| self.failed("fsync", (0, 0), &e))
    }

    /// Reads everything in large pieces: first sector, bytes.
    fn each(&self, mut take: impl FnMut(u64, &[u8])) -> Result<(), Wrong> {
        let mut buffer = Buffer::new(2048);
        let mut at = 0;
        while at < self.sectors {
            let count = (self.sectors - at).min(2048);
            self.read((at, count), &mut buffer)?;
            take(at, buffer.take(count));
            at += count;
        }
        Ok(())
    }
}

/// Memory that direct I/O takes.
struct Buffer {
    bytes: Vec<u8>,
    start: usize,
}

impl Buffer {
    fn new(sectors: u64) -> Self {
        let len = usize::try_from(sectors).unwrap_or(0) * SECTOR_LEN;
        let bytes = vec![0; len + ALIGN];
        let start = bytes.as_ptr().align_offset(ALIGN);
        Self { bytes, start }
    }

    fn take(&mut self, sectors: u64) -> &mut [u8] {
        let len = usize::try_from(sectors).unwrap_or(0) * SECTOR_LEN;
        &mut self.bytes[self.start..self.start + len]
    }
}

/// What the workers of `load` did.
#[derive(Default)]
struct Tally {
    ops: AtomicU64,
    longest_ms: AtomicU64,
    stop: AtomicBool,
}

fn load(dev: &Path, seed: u64, workers: u64, stop: &Path) -> Result<(), Wrong> {
    let disk = Arc::new(Disk::open(dev, true)?);
    let tally = Arc::new(Tally::default());
    let threads: Vec<_> = (0..workers)
        .map(|index| {
            let (disk, tally) = (Arc::clone(&disk), Arc::clone(&tally));
            let region = region(disk.sectors, workers, index);
            std::thread::spawn(move || {
                let result = load_region(&disk, region, mix(seed ^ index), &tally);
                // Wrong data now is not to be overwritten by others.
                if result.is_err() {
                    tally.stop.store(true, Ordering::Relaxed);
                }
                result
            })
        })
        .collect();
    while !tally.stop.load(Ordering::Relaxed) {
        say(&format!("OPS {}", tally.ops.load(Ordering::Relaxed)));
        std::thread::sleep(PROGRESS);
        if stop.exists() {
            tally.stop.store(true, Ordering::Relaxed);
        }
    }
    for thread in threads {
        thread
            .join()
            .map_err(|_| Wrong(1, "a worker panicked".to_owned()))??;
    }
    let (ops, longest) = (&tally.ops, &tally.longest_ms);
    say(&format!(
        "VERIFIED ops={} longest_ms={}",
        ops.load(Ordering::Relaxed),
        longest.load(Ordering::Relaxed)
    ));
    Ok(())
}

fn load_region(disk: &Disk, own: (u64, u64), seed: u64, tally: &Tally) -> Result<(), Wrong> {
    let mut random = Random::new(seed);
    let mut buffer = Buffer::new(RUN_MAX);
    let len = usize::try_from(own.1).unwrap_or(0);
    let mut versions = vec![None; len];
    let mut next = 1;
    while !tally.stop.load(Ordering::Relaxed) {
        let start = Instant::now();
        let run = some_run(&mut random, own);
        let index = usize::try_from(run.0 - own.0).unwrap_or(0);
        let touched = index..index + usize::try_from(run.1).unwrap_or(0);
        match random.below(100) {
            0..60 => {
                disk.write(run, next, &mut buffer)?;
                versions[touched].fill(Some(next));
                next += 1;
            }
            60..92 => {
                disk.read(run, &mut buffer)?;
                verify(run, &versions[touched], buffer.take(run.1))?;
            }
            92..96 => disk.sync()?,
            op => {
                let is_zeroing = op < 98;
                disk.discard(run, is_zeroing)?;
                versions[touched.clone()].fill(if is_zeroing { Some(0) } else { None });
                // Of a discard nothing is promised in general; this card gives zeros for whole blocks.
                for at in touched.filter(|at| !is_zeroing && is_in_whole_block(*at, own, run)) {
                    versions[at] = Some(0);
                }
            }
        }
        let took = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
        tally.longest_ms.fetch_max(took, Ordering::Relaxed);
        tally.ops.fetch_add(1, Ordering::Relaxed);
    }
    for (number, expected) in (own.0..)
        .zip(versions.chunks(64))
        .map(|(i, v)| (own.0 + (i - own.0) * 64, v))
    {
        let run = (number, expected.len() as u64);
        disk.read(run, &mut buffer)?;
        verify(run, expected, buffer.take(run.1))?;
    }
    Ok(())
}

/// Whether the sector at `at` of the region is in a 4 KiB block that is all within `run`.
fn is_in_whole_block(at: usize, own: (u64, u64), run: (u64, u64)) -> bool {
    let block = (own.0 + at as u64) / 8 * 8;
    block >= run.0 && block + 8 <= run.0 + run.1
}

/// Half of the runs are whole 4 KiB blocks, the others anything.
fn some_run(random: &mut Random, (start, len): (u64, u64)) -> (u64, u64) {
    let count = 1 + random.below(RUN_MAX);
    let at = start + random.below(len - RUN_MAX);
    if random.below(2) == 0 {
        return (at, count);
    }
    let aligned = at.next_multiple_of(8);
    let count = count.next_multiple_of(8).min(start + len - aligned);
    (aligned, count)
}

/// `None` is a sector nobody wrote yet: what was there before is not known.
fn verify(run: (u64, u64), expected: &[Option<u32>], bytes: &[u8]) -> Result<(), Wrong> {
    let sectors = (run.0..).zip(bytes.chunks_exact(SECTOR_LEN));
    for ((number, bytes), expected) in sectors.zip(expected) {
        let Some(expected) = *expected else { continue };
        let found = find(bytes, number);
        if found != Found::Version(expected) {
            let text = format!("sector {number} is {found:?}, should be version {expected}");
            return Err(Wrong(1, text));
        }
    }
    Ok(())
}

fn sync(dev: &Path, seed: u64, workers: u64) -> Result<(), Wrong> {
    let disk = Arc::new(Disk::open(dev, true)?);
    let threads: Vec<_> = (0..workers)
        .map(|index| {
            let disk = Arc::clone(&disk);
            let own = region(disk.sectors, workers, index);
            std::thread::spawn(move || -> Result<(), Wrong> {
                let mut buffer = Buffer::new(RUN_MAX);
                for epoch in 1.. {
                    for run in epoch_runs(seed, own, epoch) {
                        disk.write(run, epoch, &mut buffer)?;
                    }
                    disk.sync()?;
                    say(&format!("SYNCED {index} {epoch}"));
                }
                Ok(())
            })
        })
        .collect();
    for thread in threads {
        thread
            .join()
            .map_err(|_| Wrong(1, "a worker panicked".to_owned()))??;
    }
    Ok(())
}

fn check(dev: &Path, seed: u64, workers: u64, epochs: &str) -> Result<(), Wrong> {
    let disk = Disk::open(dev, false)?;
    let epochs: Vec<u64> = epochs.split(',').map(number).collect::<Result<_, _>>()?;
    let mut found = Vec::new();
    disk.each(|first, bytes| {
        let sectors = (first..).zip(bytes.chunks_exact(SECTOR_LEN));
        found.extend(sectors.map(|(number, bytes)| find(bytes, number)));
    })?;
    let mut written = 0;
    for (index, &synced) in (0..workers).zip(&epochs) {
        let own = region(disk.sectors, workers, index);
        let place = |sector: u64| usize::try_from(sector).unwrap_or(usize::MAX);
        let mine = &found[place(own.0)..place(own.0 + own.1)];
        let newest = mine.iter().map(|f| match f {
            Found::Version(version) => *version,
            Found::Garbage => 0,
        });
        let newest = newest
            .max()
            .unwrap_or(0)
            .max(u32::try_from(synced).unwrap_or(0));
        // Per sector: the last version that is durable, and whether what was found was ever written.
        let mut least = vec![0; mine.len()];
        let mut known: Vec<bool> = mine.iter().map(|f| *f == Found::Version(0)).collect();
        for epoch in 1..=newest {
            for run in epoch_runs(seed, own, epoch) {
                for sector in run.0..run.0 + run.1 {
                    let at = place(sector - own.0);
                    if u64::from(epoch) <= synced {
                        least[at] = epoch;
                    }
                    known[at] |= mine[at] == Found::Version(epoch);
                }
            }
        }
        for (at, found) in mine.iter().enumerate() {
            let number = own.0 + at as u64;
            match *found {
                Found::Version(version) if version >= least[at] && known[at] => {
                    written += u64::from(version > 0);
                }
                found => {
                    let text = format!(
                        "sector {number} is {found:?}, should be at least version {} of worker \
                         {index}, which synced {synced}",
                        least[at]
                    );
                    return Err(Wrong(1, text));
                }
            }
        }
    }
    say(&format!("CHECKED {written}"));
    Ok(())
}

fn fill_all(dev: &Path) -> Result<(), Wrong> {
    let disk = Disk::open(dev, true)?;
    let mut buffer = Buffer::new(2048);
    let mut at = 0;
    while at < disk.sectors {
        let count = (disk.sectors - at).min(2048);
        disk.write((at, count), 1, &mut buffer)?;
        at += count;
    }
    disk.sync()?;
    say("FILLED");
    Ok(())
}

fn scan(dev: &Path) -> Result<(), Wrong> {
    let disk = Disk::open(dev, false)?;
    let mut buffer = Buffer::new(8);
    let (mut bad, mut wrong) = (0, 0);
    for block in 0..disk.sectors / 8 {
        if let Err(Wrong(_, text)) = disk.read((block * 8, 8), &mut buffer) {
            say(&format!("BAD {block} {text}"));
            bad += 1;
            continue;
        }
        let sectors = (block * 8..).zip(buffer.take(8).chunks_exact(SECTOR_LEN));
        wrong += sectors
            .filter(|(number, bytes)| find(bytes, *number) != Found::Version(1))
            .count();
    }
    say(&format!("SCANNED bad={bad} wrong={wrong}"));
    if wrong > 0 {
        return Err(Wrong(1, format!("{wrong} sectors")));
    }
    Ok(())
}

fn digest(dev: &Path) -> Result<(), Wrong> {
    let mut digest = Digest::default();
    Disk::open(dev, false)?.each(|_, bytes| digest.update(bytes))?;
    say(&format!("DIGEST {}", digest.text()));
    Ok(())
}
