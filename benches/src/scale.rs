//! `scale`: what a volume costs that is far larger than the memory for its map.
//!
//! A thin volume of 1 TiB gets 4 KiB blocks written all over it, each in another leaf of the map
//! where there are that many: the worst case for a cache of map pages. Then: how much memory the card
//! holds, how fast random reads are whose map pages are not there, and how long opening takes after
//! a `kill -9`, after a clean end, and after a death with a full log (see [`fill`](crate::fill)).
//!
//! The card is measured alone: no peer keeps a map that it could be compared with (a raw file has
//! none, qcow2's is a table whose cache is not authenticated).

use std::collections::HashSet;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::Args;
use serde::Serialize;
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::blk::{bar, find_card, write};
use crate::client::{Client, Outcome};
use crate::fill::{LEAF, fill_log};
use crate::job::{BLOCK_MIN, QUEUE_SIZE};
use crate::results::Latency;
use crate::server::{Memory, Server};
use crate::target::{args, run as run_program, write_private};
use offload::cli::parse_size;

const BLOCK: u64 = BLOCK_MIN as u64;
/// Writes that are acknowledged and in no commit when the card is killed, among others.
const OVERWRITES: u64 = 200_000;
const READS: u64 = 20_000;
/// Blocks between two looks at the progress bar.
const STEP: u64 = 65_536;

/// What `scale` takes.
#[derive(Debug, Args)]
pub struct Options {
    /// Size of the volume in GiB
    #[arg(long, value_name = "GIB", default_value_t = 1024, value_parser = clap::value_parser!(u64).range(1..=1 << 17))]
    pub size: u64,
    /// Data written to it in MiB, 4 KiB at a time all over the volume; the disk needs half as much again
    #[arg(long, value_name = "MIB", default_value_t = 16 << 10, value_parser = clap::value_parser!(u64).range(1..=1 << 22))]
    pub data: u64,
    /// The card's --metadata-cache
    #[arg(long, value_name = "SIZE", default_value = "64M")]
    pub cache: String,
    /// Directory for the volume
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    pub dir: PathBuf,
    /// Where results go: scale.md and scale.json
    #[arg(long, value_name = "DIR", default_value = "bench-results")]
    pub out: PathBuf,
    /// The card's program [default: as for blk]
    #[arg(long, value_name = "FILE")]
    pub card: Option<PathBuf>,
}

/// Requests of one kind.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Rate {
    /// Requests a second.
    pub iops: f64,
    /// Latencies.
    pub latency: Latency,
}

impl Rate {
    #[allow(clippy::cast_precision_loss)]
    fn of(outcome: &Outcome) -> Self {
        Self {
            iops: outcome.requests as f64 / outcome.elapsed.as_secs_f64(),
            latency: Latency::of(&outcome.latency),
        }
    }
}

/// How long opening took, in milliseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Opening {
    /// From starting the process to its socket.
    pub listening_ms: f64,
    /// From starting the process to the answer of the first read.
    pub first_read_ms: f64,
}

/// What came out.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// GiB of the volume.
    pub size_gib: u64,
    /// MiB written.
    pub data_mib: u64,
    /// The card's --metadata-cache.
    pub cache: String,
    /// Opening it empty.
    pub empty: Opening,
    /// Scattered writes.
    pub writes: Rate,
    /// Bytes resident after writing, and at most.
    pub written_memory: (u64, u64),
    /// Random reads of what was written, one at a time.
    pub reads_qd1: Rate,
    /// The same, 32 at a time.
    pub reads_qd32: Rate,
    /// Bytes resident after reading, and at most.
    pub read_memory: (u64, u64),
    /// Opening after `kill -9` while writing.
    pub killed: Opening,
    /// Bytes resident after that, and at most.
    pub killed_memory: (u64, u64),
    /// Opening after a clean end.
    pub clean: Opening,
    /// Blocks changed in the log that was filled, and leaves of the map that they are in.
    pub logged: (u64, u64),
    /// Opening after a kill with a full log.
    pub full: Opening,
    /// Bytes resident after that, and at most.
    pub full_memory: (u64, u64),
    /// Bytes that the volume's file takes.
    pub backing: u64,
}

/// The blocks of the working set in the order in which they are written: all over the volume, each
/// once.
#[derive(Clone, Copy, Debug)]
struct Scatter {
    blocks: u64,
    stride: u64,
}

impl Scatter {
    fn new(blocks: u64) -> Self {
        // Near the golden section of the volume, and prime to its length: every block once.
        let mut stride = (blocks / 1000 * 618).max(1) | 1;
        while gcd(stride, blocks) != 1 {
            stride += 2;
        }
        Self { blocks, stride }
    }

    /// Byte offset of the `index`th block.
    fn offset(&self, index: u64) -> u64 {
        let block = u128::from(index) * u128::from(self.stride) % u128::from(self.blocks);
        u64::try_from(block).unwrap_or(0) * BLOCK
    }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

struct Bench<'a> {
    options: &'a Options,
    card: PathBuf,
    home: PathBuf,
    stop: Arc<AtomicBool>,
}

/// Runs it and writes its results.
///
/// # Errors
/// The card fails, there is no room, results cannot be written, or the user interrupts.
pub fn run(options: &Options) -> Result<()> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&stop)).context("signals")?;
    }
    let card = find_card(options.card.as_deref())?;
    fs::create_dir_all(&options.out)
        .with_context(|| format!("{} cannot be made", options.out.display()))?;
    let home = tempfile::Builder::new()
        .prefix("offload-scale-")
        .tempdir_in(&options.dir)
        .with_context(|| format!("no directory can be made in {}", options.dir.display()))?;
    let bench = Bench {
        options,
        card,
        home: home.path().to_owned(),
        stop,
    };
    let report = bench.measure()?;
    let text = markdown(&report);
    println!("{text}");
    write(&options.out.join("scale.md"), &text)?;
    let json = serde_json::to_string_pretty(&report).context("results as JSON")?;
    write(&options.out.join("scale.json"), &json)?;
    println!("table and JSON: {}", options.out.display());
    Ok(())
}

impl Bench<'_> {
    fn volume(&self) -> PathBuf {
        self.home.join("volume")
    }

    fn create(&self) -> Result<()> {
        let key = self.home.join("key");
        // Of no worth: the volume is deleted with it.
        write_private(&key, &[b'k'; 32])?;
        let size = format!("{}G", self.options.size);
        let all = args(["create", "--size", &size, "--key-file"])
            .chain([key.into(), self.volume().into()]);
        Ok(run_program(&self.card, all)?)
    }

    /// Starts the card; when it began, and how long until it listened.
    fn start(&self) -> Result<(Server, Client, Opening)> {
        let socket = self.home.join("socket");
        let _ = fs::remove_file(&socket);
        let all: Vec<OsString> = args(["serve", "--queues", "1", "--queue-size"])
            .chain([QUEUE_SIZE.to_string().into(), "--socket-path".into()])
            .chain([socket.clone().into(), "--volume".into()])
            .chain([self.volume().into(), "--key-file".into()])
            .chain([self.home.join("key").into(), "--metadata-cache".into()])
            .chain([OsString::from(&self.options.cache)])
            .collect();
        let begin = Instant::now();
        let server = Server::start(&self.card, &all, &socket, self.home.join("log"))?;
        let listening = begin.elapsed();
        let mut client = Client::connect(&socket, 1, Arc::clone(&self.stop))
            .with_context(|| format!("the card says:\n{}", server.tail()))?;
        client.each(true, 1, std::iter::once(0))?;
        let opening = Opening {
            listening_ms: milliseconds(listening),
            first_read_ms: milliseconds(begin.elapsed()),
        };
        Ok((server, client, opening))
    }

    fn measure(&self) -> Result<Report> {
        let blocks = self.options.size << 18;
        let count = (self.options.data << 8).min(blocks / 2);
        let scatter = Scatter::new(blocks);
        self.create()?;
        let (server, mut client, empty) = self.start()?;
        let progress = bar(count, "{pos}/{len} blocks, {eta} left");
        progress.set_message("writing");
        let offsets = (0..count).map(|index| {
            if index % STEP == 0 {
                progress.set_position(index);
            }
            scatter.offset(index)
        });
        let writes = Rate::of(&client.each(false, 32, offsets)?);
        client.flush()?;
        progress.finish_and_clear();
        let written_memory = figures(server.memory()?);
        let mut random = fastrand::Rng::with_seed(7);
        let mut some = |count: u64, reads: u64| -> Vec<u64> {
            (0..reads)
                .map(|_| scatter.offset(random.u64(0..count)))
                .collect()
        };
        let reads_qd1 = Rate::of(&client.each(true, 1, some(count, READS / 4).into_iter())?);
        let reads_qd32 = Rate::of(&client.each(true, 32, some(count, READS * 4).into_iter())?);
        let read_memory = figures(server.memory()?);
        client.each(false, 128, some(count, OVERWRITES).into_iter())?;
        server.kill();
        drop(client);

        let (server, client, killed) = self.start()?;
        let killed_memory = figures(server.memory()?);
        drop(client);
        drop(server);
        let (server, client, clean) = self.start()?;
        drop(client);
        drop(server);
        let cache = parse_size(&self.options.cache).context("--cache")?;
        let mut leaves = HashSet::new();
        let all = (0..count).map(|index| scatter.offset(index) / LEAF);
        let each_once = all.filter(|leaf| leaves.insert(*leaf));
        let key = self.home.join("key");
        let logged = fill_log(&self.volume(), &key, cache, each_once)?;
        let (server, client, full) = self.start()?;
        let full_memory = figures(server.memory()?);
        drop(client);
        drop(server);
        let backing = allocated(&self.volume())?;
        Ok(Report {
            size_gib: self.options.size,
            data_mib: count >> 8,
            cache: self.options.cache.clone(),
            empty,
            writes,
            written_memory,
            reads_qd1,
            reads_qd32,
            read_memory,
            killed,
            killed_memory,
            clean,
            logged: (logged.writes, logged.leaves),
            full,
            full_memory,
            backing,
        })
    }
}

fn figures(memory: Memory) -> (u64, u64) {
    (memory.resident, memory.peak)
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn allocated(path: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(fs::metadata(path).context("the volume's file")?.blocks() * 512)
}

/// Renders a report.
fn markdown(report: &Report) -> String {
    let mut out = String::new();
    let _ = writeln!(
        out,
        "# A volume of {} GiB with {} MiB written all over it, `--metadata-cache {}`\n",
        report.size_gib, report.data_mib, report.cache
    );
    let _ = writeln!(
        out,
        "4 KiB blocks; every read's map pages are of a random place. The file takes {} MiB. Resident is the card's own \
         memory; the peak counts the client's shared memory, too.\n",
        report.backing >> 20
    );
    out.push_str("| Requests | kIOPS | p50 µs | p99 µs | resident MiB after it | peak |\n");
    out.push_str("| --- | ---: | ---: | ---: | ---: | ---: |\n");
    for (name, rate, memory) in [
        (
            "scattered writes, QD 32",
            report.writes,
            Some(report.written_memory),
        ),
        ("random reads, QD 1", report.reads_qd1, None),
        (
            "random reads, QD 32",
            report.reads_qd32,
            Some(report.read_memory),
        ),
    ] {
        let (resident, peak) = memory
            .map_or(("–".to_owned(), "–".to_owned()), |(now, peak)| {
                ((now >> 20).to_string(), (peak >> 20).to_string())
            });
        let _ = writeln!(
            out,
            "| {name} | {:.1} | {:.0} | {:.0} | {resident} | {peak} |",
            rate.iops / 1e3,
            rate.latency.p50_us,
            rate.latency.p99_us
        );
    }
    out.push_str(
        "\n| Opening | listens after ms | first read answered after ms | resident MiB | peak |\n",
    );
    out.push_str("| --- | ---: | ---: | ---: | ---: |\n");
    for (name, opening, memory) in [
        ("empty", report.empty, None),
        (
            "after kill -9 while writing",
            report.killed,
            Some(report.killed_memory),
        ),
        ("after a clean end", report.clean, None),
        (
            "after a kill with a full log",
            report.full,
            Some(report.full_memory),
        ),
    ] {
        let (resident, peak) = memory
            .map_or(("–".to_owned(), "–".to_owned()), |(now, peak)| {
                ((now >> 20).to_string(), (peak >> 20).to_string())
            });
        let _ = writeln!(
            out,
            "| {name} | {:.0} | {:.0} | {resident} | {peak} |",
            opening.listening_ms, opening.first_read_ms
        );
    }
    let (writes, leaves) = report.logged;
    let _ = writeln!(
        out,
        "\nThe full log holds {writes} changed blocks in {leaves} leaves of the map."
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_scattered_and_none_comes_twice() {
        for blocks in [1 << 18, 3 << 18, 1000 << 18] {
            let scatter = Scatter::new(blocks);
            let some: HashSet<u64> = (0..100_000).map(|index| scatter.offset(index)).collect();
            assert_eq!(some.len(), 100_000);
            assert!(
                some.iter()
                    .all(|offset| offset % BLOCK == 0 && offset / BLOCK < blocks)
            );
            let near = (1..100_000)
                .filter(|index| {
                    scatter.offset(*index).abs_diff(scatter.offset(index - 1)) < 128 * BLOCK
                })
                .count();
            assert!(near < 100, "{near} of {blocks} lie in the leaf before");
        }
    }

    #[test]
    fn every_row_is_as_wide_as_its_header() {
        let latency = Latency {
            mean_us: 1.0,
            p50_us: 1.0,
            p99_us: 2.0,
            p999_us: 3.0,
        };
        let rate = Rate {
            iops: 1000.0,
            latency,
        };
        let opening = Opening {
            listening_ms: 10.0,
            first_read_ms: 20.0,
        };
        let report = Report {
            size_gib: 1024,
            data_mib: 16,
            cache: "64M".into(),
            empty: opening,
            writes: rate,
            written_memory: (1 << 20, 2 << 20),
            reads_qd1: rate,
            reads_qd32: rate,
            read_memory: (1 << 20, 2 << 20),
            killed: opening,
            killed_memory: (1 << 20, 2 << 20),
            clean: opening,
            logged: (1 << 20, 1 << 12),
            full: opening,
            full_memory: (1 << 20, 2 << 20),
            backing: 1 << 30,
        };
        let text = markdown(&report);
        crate::table::assert_rows_fit(&text);
    }
}
