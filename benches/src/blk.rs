//! `blk`: all of a comparison of the block card, in order.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use nix::unistd::Pid;
use offload::control::ControlClient;
use serde_json::{Value, json};
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::client::{Client, ClientError, Outcome};
use crate::job::Job;
use crate::results::{JobResults, Latency, OURS, Results, Sample, TargetInfo};
use crate::server::{self, Server};
use crate::target::{FIO, Kind, Place, is_on_path};
use crate::{chart, fio, table};

/// Blocks that are read back before measuring.
const VERIFY_BLOCKS: u32 = 256;
/// What runs before a measurement counts, as a part of it.
const WARM_UP: u32 = 8;
/// After the last request, before idle time is measured.
const SETTLE: Duration = Duration::from_secs(2);
const IDLE: Duration = Duration::from_secs(5);
/// Load of the machine above which the report warns.
pub(crate) const BUSY_LOAD: f64 = 0.7;

/// What `blk` takes.
#[derive(Debug, Args)]
pub struct Options {
    /// Fewer and shorter rounds on a smaller disk: about two minutes, good for a first look
    #[arg(long)]
    pub quick: bool,
    /// Where results go: blk.md, blk.json and blk-*.svg
    #[arg(long, value_name = "DIR", default_value = "bench-results")]
    pub out: PathBuf,
    /// File system to measure, several times for several; /dev/shm leaves out the disk
    #[arg(long, value_name = "DIR", default_values = ["/var/tmp", "/dev/shm"])]
    pub dir: Vec<PathBuf>,
    /// Size of a disk in MiB [default: 1024, quick: 512]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(64..=1 << 20))]
    pub size: Option<u64>,
    /// Rounds [default: 5, quick: 3]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100))]
    pub rounds: Option<u32>,
    /// Seconds of a run [default: 1, quick: 0.3]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub time: Option<f64>,
    /// Queues of every server and fio's threads; each has a job's whole depth
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=16))]
    pub queues: u16,
    /// Only these jobs, like randread-4k-qd32,seqwrite-128k-qd16
    #[arg(long, value_name = "JOBS", value_delimiter = ',')]
    pub jobs: Vec<Job>,
    /// Measure only these, for profiling; ratios need the others
    #[arg(long, value_name = "NAMES", value_delimiter = ',', value_enum)]
    pub only: Vec<Pick>,
    /// The card's program [default: vhost-blk next to this program, built by cargo if that runs it]
    #[arg(long, value_name = "FILE")]
    pub card: Option<PathBuf>,
}

/// A target, as named on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Pick {
    /// The card
    Offload,
    /// qemu-storage-daemon on a raw file
    Raw,
    /// qemu-storage-daemon on a LUKS file
    Luks,
    /// fio on the raw file, without a server; needs raw, which fills it
    Fio,
}

impl Pick {
    const ALL: [Self; 4] = [Self::Offload, Self::Raw, Self::Luks, Self::Fio];

    const fn kind(self) -> Option<Kind> {
        match self {
            Self::Offload => Some(Kind::Offload),
            Self::Raw => Some(Kind::QsdRaw),
            Self::Luks => Some(Kind::QsdLuks),
            Self::Fio => None,
        }
    }
}

pub(crate) fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.05..=600.0).contains(&seconds) => Ok(seconds),
        _ => Err("a run takes 0.05 to 600 seconds".to_owned()),
    }
}

/// [`Options`] with everything decided.
#[derive(Debug)]
struct Settings {
    disk_len: u64,
    rounds: u32,
    time: Duration,
    queues: u16,
    jobs: Vec<Job>,
    picks: Vec<Pick>,
}

impl Settings {
    fn new(options: &Options) -> Self {
        let quick = options.quick;
        let seconds = options.time.unwrap_or(if quick { 0.3 } else { 1.0 });
        Self {
            disk_len: options.size.unwrap_or(if quick { 512 } else { 1024 }) << 20,
            rounds: options.rounds.unwrap_or(if quick { 3 } else { 5 }),
            time: Duration::from_secs_f64(seconds),
            queues: options.queues,
            jobs: if options.jobs.is_empty() {
                Job::standard().into()
            } else {
                options.jobs.clone()
            },
            picks: if options.only.is_empty() {
                Pick::ALL.into()
            } else {
                options.only.clone()
            },
        }
    }
}

/// Runs the comparison and writes its results.
///
/// # Errors
/// The card or a peer that is there fails, results cannot be written, or the user interrupts. A peer
/// that is not installed is no error.
pub fn run(options: &Options) -> Result<()> {
    let settings = Settings::new(options);
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&stop)).context("signals")?;
    }
    let card = find_card(options.card.as_deref())?;
    fs::create_dir_all(&options.out)
        .with_context(|| format!("{} cannot be made", options.out.display()))?;
    let mut all = Vec::new();
    let mut text = String::from("# Block card against its peers\n\n");
    for dir in &options.dir {
        let results = measure(dir, &card, &settings, &stop)
            .with_context(|| format!("measuring on {}", dir.display()))?;
        let part = table::markdown(&results);
        println!("{part}");
        let picture = format!("blk{}.svg", dir.display().to_string().replace('/', "-"));
        write(&options.out.join(&picture), &chart::svg(&results)?)?;
        text += &part;
        text += &format!("![Throughput on {}]({picture})\n\n", dir.display());
        all.push(results);
    }
    write(&options.out.join("blk.md"), &text)?;
    let json = serde_json::to_string_pretty(&all).context("results as JSON")?;
    write(&options.out.join("blk.json"), &json)?;
    println!("table, charts and JSON: {}", options.out.display());
    Ok(())
}

pub(crate) fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("{} cannot be written", path.display()))
}

/// A card's program. Under `cargo run`, cargo has built only the benchmarks: it is asked to build
/// the card the same way, so that old code is never measured by mistake.
pub(crate) fn find_program(name: &str, given: Option<&Path>) -> Result<PathBuf> {
    if let Some(card) = given {
        if !card.is_file() {
            bail!(
                "{} is not there: build it, or leave out --card",
                card.display()
            );
        }
        return card.canonicalize().context("the card's path");
    }
    let own = std::env::current_exe().context("where this program is")?;
    let dir = own.parent().context("where this program is")?;
    if let (Some(cargo), Some(target)) = (std::env::var_os("CARGO"), dir.parent()) {
        let mut build = Command::new(cargo);
        build.args(["build", "--quiet", "--package", name, "--target-dir"]);
        build.arg(target);
        build.arg("--manifest-path");
        build.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml"));
        if dir.ends_with("release") {
            build.arg("--release");
        }
        println!("building the card");
        if !build.status().context("cargo does not start")?.success() {
            bail!("the card does not build");
        }
    }
    let card = dir.join(name);
    if !card.is_file() {
        bail!(
            "{} is not there: cargo build --release -p {name}",
            card.display()
        );
    }
    Ok(card)
}

pub(crate) fn find_card(given: Option<&Path>) -> Result<PathBuf> {
    find_program("vhost-blk", given)
}

/// A server under measurement. Its client goes first.
struct Running {
    kind: Kind,
    /// The card's control socket.
    control: Option<PathBuf>,
    client: Client,
    server: Server,
}

fn measure(
    dir: &Path,
    card: &Path,
    settings: &Settings,
    stop: &Arc<AtomicBool>,
) -> Result<Results> {
    let home = tempfile::Builder::new()
        .prefix("offload-bench-")
        .tempdir_in(dir)
        .context("no directory can be made there")?;
    let place = Place {
        card: card.to_owned(),
        dir: home.path().to_owned(),
        disk_len: settings.disk_len,
        queues: settings.queues,
    };
    let mut notes = Vec::new();
    if settings.queues > 1 {
        notes.push(format!(
            "{} queues, each with the depth given",
            settings.queues
        ));
    }
    if cfg!(debug_assertions) {
        notes.push("not an optimised build: run with --release".to_owned());
    }
    if let Some(load) = machine_load().filter(|load| *load > BUSY_LOAD) {
        notes.push(format!(
            "the machine is busy (load {load}): trust ratios, not rates"
        ));
    }
    let mut running = Vec::new();
    for kind in settings.picks.iter().filter_map(|pick| pick.kind()) {
        match missing(kind.needs()) {
            Some(program) => notes.push(format!(
                "{}: {program} is not on PATH: skipped",
                kind.info().name
            )),
            None => running.push(prepare(kind, &place, stop).with_context(|| kind.info().name)?),
        }
    }
    let has_raw = running.iter().any(|r| r.kind == Kind::QsdRaw);
    let is_wanted = settings.picks.contains(&Pick::Fio) && has_raw;
    let baseline = match missing(&[FIO]) {
        _ if !is_wanted => None,
        None => Some(Kind::QsdRaw.file(&place)),
        Some(_) => {
            notes.push(format!("{FIO} is not on PATH: skipped"));
            None
        }
    };
    let (jobs, rest) = rounds(&mut running, baseline.as_deref(), settings, stop)?;
    if rest.moved > 0 {
        #[allow(clippy::cast_precision_loss)]
        let mib = (rest.moved >> 8) as f64;
        let (seconds, rounds) = (rest.time.as_secs_f64(), f64::from(settings.rounds));
        notes.push(format!(
            "between rounds {OURS} moved {:.0} MiB together, in {:.1} s ({:.0} MiB/s)",
            mib / rounds,
            seconds / rounds,
            mib / seconds.max(0.001),
        ));
    }
    resume(&running)?;
    let mut idle_load = idle(&running, stop)?;
    let mut targets: Vec<TargetInfo> = running.iter().map(|r| r.kind.info()).collect();
    if baseline.is_some() {
        idle_load.push(None);
        targets.push(TargetInfo {
            name: FIO.to_owned(),
            about:
                "no server at all: fio with io_uring and O_DIRECT on the raw file; its processor \
                    time is client and server in one"
                    .to_owned(),
        });
    }
    Ok(Results {
        directory: dir.display().to_string(),
        disk_len: settings.disk_len,
        rounds: settings.rounds,
        seconds: settings.time.as_secs_f64(),
        targets,
        jobs,
        idle_load,
        notes,
    })
}

fn missing(programs: &[&'static str]) -> Option<&'static str> {
    let is_there = |program: &&str| is_on_path(program, std::env::var_os("PATH"));
    programs.iter().copied().find(|program| !is_there(program))
}

pub(crate) fn machine_load() -> Option<f64> {
    let text = fs::read_to_string("/proc/loadavg").ok()?;
    text.split(' ').next()?.parse().ok()
}

/// Creates, serves, fills and verifies a disk.
fn prepare(kind: Kind, place: &Place, stop: &Arc<AtomicBool>) -> Result<Running> {
    kind.create(place)?;
    let server = kind.serve(place)?;
    let mut running = Running {
        kind,
        control: (kind == Kind::Offload).then(|| kind.control(place)),
        client: Client::connect(&kind.socket(place), place.queues, Arc::clone(stop))
            .with_context(|| format!("the server says:\n{}", server.tail()))?,
        server,
    };
    if running.client.capacity() != place.disk_len {
        bail!("the disk has {} bytes", running.client.capacity());
    }
    let bar = bar(place.disk_len, "{bytes}/{total_bytes}, {bytes_per_sec}");
    bar.set_message(format!("filling {}", kind.info().name));
    let filled = running.client.fill(|done| bar.set_position(done));
    running.explain(filled)?;
    let verified = running.client.verify(VERIFY_BLOCKS);
    running.explain(verified)?;
    bar.finish_and_clear();
    Ok(running)
}

impl Running {
    /// A client's error is often the server's end: then that is what is told.
    fn explain<T>(&mut self, result: Result<T, ClientError>) -> Result<T> {
        match result {
            Ok(value) => Ok(value),
            Err(ClientError::Interrupted) => Err(ClientError::Interrupted.into()),
            Err(error) => {
                self.server.check()?;
                let tail = self.server.tail();
                Err(error)
                    .with_context(|| format!("{}; the server says:\n{tail}", self.kind.info().name))
            }
        }
    }

    fn sample(&mut self, job: &Job, time: Duration) -> Result<Sample> {
        let warm = self.client.run(job, time / WARM_UP);
        self.explain(warm)?;
        let (server_before, client_before) = (self.server.cpu_time()?, own_cpu_time()?);
        let outcome = self.client.run(job, time);
        let Outcome {
            requests,
            elapsed,
            latency,
        } = self.explain(outcome)?;
        let server = self.server.cpu_time()?.saturating_sub(server_before);
        let client = own_cpu_time()?.saturating_sub(client_before);
        #[allow(clippy::cast_precision_loss)]
        let requests = requests as f64;
        Ok(Sample::new(
            job,
            requests,
            elapsed.as_secs_f64(),
            server.as_secs_f64(),
            Some(client.as_secs_f64()),
            Some(Latency::of(&latency)),
        ))
    }
}

/// How long a card may take to move together what a round has scattered.
const REST_LIMIT: Duration = Duration::from_secs(60);
/// As fast as it goes.
const NO_LIMIT: u64 = 1 << 40;
/// The card's default, in bytes a second.
const USUAL_RATE: u64 = 200 << 20;

/// What a card did between rounds.
#[derive(Clone, Copy, Debug, Default)]
struct Rest {
    moved: u64,
    time: Duration,
}

/// Lets cards move together what was scattered, as they do while a guest asks for nothing; then stops
/// them from doing so while others are measured.
fn rest(running: &[Running], stop: &AtomicBool) -> Result<Rest> {
    let mut total = Rest::default();
    for control in running.iter().filter_map(|r| r.control.as_deref()) {
        let mut client = ControlClient::connect(control).context("the card's control socket")?;
        let mut ask = |rate: Option<u64>| -> Result<(u64, u64)> {
            let params = rate.map_or(Value::Null, |rate| json!({ "rate": rate }));
            let answer = client.call("rehome", params).context("the card's answer")?;
            let field = |name: &str| answer.get(name).and_then(Value::as_u64).unwrap_or(0);
            Ok((field("moved_blocks"), field("scattered_parts")))
        };
        let (before, _) = ask(Some(NO_LIMIT))?;
        let begin = Instant::now();
        let (mut moved, mut moving) = (before, None);
        while begin.elapsed() < REST_LIMIT {
            pause(Duration::from_millis(50), stop)?;
            let (now, scattered) = ask(None)?;
            if now > moved {
                moving.get_or_insert_with(Instant::now);
                total.time = moving.map_or(total.time, |from: Instant| from.elapsed());
            }
            moved = now;
            if scattered == 0 {
                break;
            }
        }
        total.moved += moved - before;
        ask(Some(0))?;
    }
    Ok(total)
}

/// Gives cards their usual behaviour back.
fn resume(running: &[Running]) -> Result<()> {
    for control in running.iter().filter_map(|r| r.control.as_deref()) {
        let mut client = ControlClient::connect(control).context("the card's control socket")?;
        client.call("rehome", json!({ "rate": USUAL_RATE }))?;
    }
    Ok(())
}

fn own_cpu_time() -> Result<Duration> {
    server::cpu_time(Pid::this()).context("own processor time")
}

/// All rounds of all jobs. Each round starts with the next target.
fn rounds(
    running: &mut [Running],
    baseline: Option<&Path>,
    settings: &Settings,
    stop: &AtomicBool,
) -> Result<(Vec<JobResults>, Rest)> {
    let mut rested = Rest::default();
    let count = running.len() + usize::from(baseline.is_some());
    let mut results: Vec<JobResults> = settings
        .jobs
        .iter()
        .map(|&job| JobResults {
            job,
            samples: vec![Vec::new(); count],
        })
        .collect();
    let steps = settings.jobs.len() * count * settings.rounds as usize;
    let bar = bar(steps as u64, "{pos}/{len}, {eta} left");
    for round in 0..settings.rounds {
        for JobResults { job, samples } in &mut results {
            for step in 0..count {
                let target = (step + round as usize) % count;
                let name = running
                    .get(target)
                    .map_or(FIO.to_owned(), |r| r.kind.info().name);
                bar.set_message(format!("{job}, {name}"));
                let sample = match (running.get_mut(target), baseline) {
                    (Some(server), _) => server.sample(job, settings.time)?,
                    (None, Some(file)) => {
                        fio::run(file, settings.disk_len, settings.queues, job, settings.time)?
                    }
                    (None, None) => continue,
                };
                if stop.load(Ordering::Relaxed) {
                    return Err(ClientError::Interrupted.into());
                }
                if let Some(samples) = samples.get_mut(target) {
                    samples.push(sample);
                }
                bar.inc(1);
            }
        }
        bar.set_message("moving scattered blocks together");
        let Rest { moved, time } = rest(running, stop)?;
        rested.moved += moved;
        rested.time += time;
    }
    bar.finish_and_clear();
    Ok((results, rested))
}

/// What each server uses while its client is connected and asks nothing.
fn idle(running: &[Running], stop: &AtomicBool) -> Result<Vec<Option<f64>>> {
    let bar = bar(1, "");
    bar.set_message("idle");
    pause(SETTLE, stop)?;
    let times =
        || -> Result<Vec<Duration>> { running.iter().map(|r| Ok(r.server.cpu_time()?)).collect() };
    let (before, begin) = (times()?, Instant::now());
    pause(IDLE, stop)?;
    let (after, elapsed) = (times()?, begin.elapsed().as_secs_f64());
    bar.finish_and_clear();
    let pairs = before.iter().zip(after);
    Ok(pairs
        .map(|(before, after)| Some(after.saturating_sub(*before).as_secs_f64() / elapsed))
        .collect())
}

pub(crate) fn pause(time: Duration, stop: &AtomicBool) -> Result<()> {
    let end = Instant::now() + time;
    while Instant::now() < end {
        if stop.load(Ordering::Relaxed) {
            return Err(ClientError::Interrupted.into());
        }
        sleep(Duration::from_millis(100).min(end.saturating_duration_since(Instant::now())));
    }
    Ok(())
}

pub(crate) fn bar(len: u64, numbers: &str) -> ProgressBar {
    let template = format!("{{bar:32}} {{msg}} ({numbers})");
    let style = ProgressStyle::with_template(&template);
    ProgressBar::new(len).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        options: Options,
    }

    fn settings(args: &str) -> Result<Settings, clap::Error> {
        let args = std::iter::once("blk").chain(args.split_whitespace());
        Ok(Settings::new(&Cli::try_parse_from(args)?.options))
    }

    #[test]
    fn quick_means_less_of_everything_and_can_be_overruled() {
        let (full, quick) = (settings("").unwrap(), settings("--quick").unwrap());
        assert!(full.rounds >= 5 && quick.rounds >= 3);
        assert!(quick.disk_len < full.disk_len && quick.time < full.time);
        let own = settings("--quick --rounds 7 --size 128 --time 1.5").unwrap();
        assert_eq!((own.rounds, own.disk_len), (7, 128 << 20));
        assert_eq!(own.time, Duration::from_millis(1500));
    }

    #[test]
    fn a_full_run_stays_under_ten_minutes() {
        let full = settings("").unwrap();
        // Both directories, all four targets.
        let runs = u32::try_from(full.jobs.len()).unwrap() * 4 * 2 * full.rounds;
        let measuring = runs * (full.time + full.time / WARM_UP);
        assert!(measuring < Duration::from_secs(8 * 60), "{measuring:?}");
    }

    #[test]
    fn jobs_are_taken_from_the_command_line() {
        let some = settings("--jobs randread-4k-qd1,seqwrite-128k-qd16").unwrap();
        assert_eq!(some.jobs.len(), 2);
        let error = settings("--jobs randread-4k-qd999")
            .unwrap_err()
            .to_string();
        assert!(error.contains("qd128"), "{error}");
        assert!(settings("--rounds 0").is_err());
        assert!(settings("--time 0").is_err());
    }

    #[test]
    fn all_targets_are_measured_unless_some_are_named() {
        assert_eq!(settings("").unwrap().picks, Pick::ALL);
        let picks = settings("--only offload,luks").unwrap().picks;
        assert_eq!(picks, [Pick::Offload, Pick::Luks]);
        assert!(settings("--only nvme").is_err());
    }

    #[test]
    fn a_missing_card_is_named() {
        let error = find_card(Some(Path::new("/no/card"))).unwrap_err();
        assert!(error.to_string().contains("/no/card"));
    }
}
