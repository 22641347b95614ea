//! `noisy`: what a neighbour costs, and what its limit spares.
//!
//! Two cards serve two volumes on one file system. The *victim* is measured alone, beside a neighbour
//! that takes what it can get, and beside the same neighbour when its volume has a limit. Two kinds of
//! victim, because a limit hides a neighbour in two ways:
//!
//! * **provisioned**: it asks for more than its own limit gives, so its requests wait for that limit
//!   and not for the machine, as long as the machine has as much to give. Its latency is
//!   `depth / limit`, whatever the neighbour does with the rest.
//! * **one at a time**: no limit, one request after the other: what is seen is the bare time of a
//!   request, and with it every queue that the neighbour fills in the disk and every core that it
//!   keeps busy.
//!
//! Everything runs on one machine, the neighbour's client too: on few cores, processor time is a part
//! of what neighbours take from each other.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use offload::control::ControlClient;
use plotters::prelude::*;
use plotters::style::text_anchor::HPos;
use serde::Serialize;
use serde_json::{Value, json};
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::blk::{bar, find_card, machine_load, pause, seconds, write};
use crate::chart::{self, ChartError, Drawn, Root, text};
use crate::client::{Client, ClientError};
use crate::job::Job;
use crate::results::Latency;
use crate::server::Server;
use crate::stats::Spread;
use crate::table::{number, table};
use crate::target::{Kind, Place};

/// The neighbour looks at this distance whether it should go on.
const NOISE_STEP: Duration = Duration::from_millis(500);
/// Between the start of the neighbour and that of the measurement.
const SETTLE: Duration = Duration::from_millis(700);

/// What `noisy` takes.
#[derive(Debug, Args)]
pub struct Options {
    /// Limit of the provisioned victim, in operations a second
    #[arg(long, value_name = "N", default_value_t = 2000, value_parser = clap::value_parser!(u64).range(1..))]
    pub victim_iops: u64,
    /// Limit of the neighbour where it has one, in operations a second
    #[arg(long, value_name = "N", default_value_t = 2000, value_parser = clap::value_parser!(u64).range(1..))]
    pub noise_iops: u64,
    /// What the provisioned victim does
    #[arg(long, value_name = "JOB", default_value = "randread-4k-qd8")]
    pub job: Job,
    /// What the neighbour does
    #[arg(long, value_name = "JOB", default_value = "randwrite-4k-qd64")]
    pub noise: Job,
    /// Rounds
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub rounds: u32,
    /// Seconds of a run
    #[arg(long, value_name = "SECONDS", default_value = "3", value_parser = seconds)]
    pub time: f64,
    /// Size of each volume in MiB
    #[arg(long, value_name = "MIB", default_value_t = 1024, value_parser = clap::value_parser!(u64).range(64..=1 << 20))]
    pub size: u64,
    /// Directory for the volumes
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    pub dir: PathBuf,
    /// Where results go: noisy.md, noisy.json and noisy.svg
    #[arg(long, value_name = "DIR", default_value = "bench-results")]
    pub out: PathBuf,
    /// The card's program [default: as for blk]
    #[arg(long, value_name = "FILE")]
    pub card: Option<PathBuf>,
}

/// What is beside the victim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Scene {
    Alone,
    Unlimited,
    Limited,
}

impl Scene {
    const ALL: [Self; 3] = [Self::Alone, Self::Unlimited, Self::Limited];

    const fn name(self) -> &'static str {
        match self {
            Self::Alone => "alone",
            Self::Unlimited => "beside an unlimited neighbour",
            Self::Limited => "beside a limited neighbour",
        }
    }
}

/// One measurement of the victim.
#[derive(Clone, Copy, Debug, Serialize)]
struct Run {
    iops: f64,
    latency: Latency,
    /// What the neighbour got meanwhile, in operations a second.
    noise_iops: f64,
}

/// A victim in one scene, in all rounds.
#[derive(Clone, Debug, Serialize)]
struct Part {
    scene: Scene,
    runs: Vec<Run>,
}

/// A victim in all scenes.
#[derive(Clone, Debug, Serialize)]
struct Case {
    title: String,
    iops_limit: Option<u64>,
    job: Job,
    parts: Vec<Part>,
}

impl Case {
    fn new(title: String, iops_limit: Option<u64>, job: Job) -> Self {
        Self {
            title,
            iops_limit,
            job,
            parts: Scene::ALL
                .map(|scene| Part {
                    scene,
                    runs: Vec::new(),
                })
                .into(),
        }
    }

    fn p99s(&self, scene: Scene) -> Vec<f64> {
        let parts = self.parts.iter().filter(|part| part.scene == scene);
        let runs = parts.flat_map(|part| &part.runs);
        runs.map(|run| run.latency.p99_us).collect()
    }

    /// How much the 99th percentile has moved from that alone, round by round, as a part of it.
    fn moved(&self, scene: Scene) -> Option<Spread> {
        let ratios = Spread::of_ratios(&self.p99s(scene), &self.p99s(Scene::Alone))?;
        Some(Spread {
            median: ratios.median - 1.0,
            min: ratios.min - 1.0,
            max: ratios.max - 1.0,
        })
    }
}

/// What came out.
#[derive(Debug, Serialize)]
struct Report {
    directory: String,
    disk_len: u64,
    rounds: u32,
    seconds: f64,
    noise: Job,
    noise_iops_limit: u64,
    cases: Vec<Case>,
    notes: Vec<String>,
}

/// Runs the benchmark and writes its results.
///
/// # Errors
/// A card fails, results cannot be written, or the user interrupts.
pub fn run(options: &Options) -> Result<()> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&stop)).context("signals")?;
    }
    let card = find_card(options.card.as_deref())?;
    fs::create_dir_all(&options.out)
        .with_context(|| format!("{} cannot be made", options.out.display()))?;
    let report = measure(options, &card, &stop)?;
    let text = markdown(&report);
    println!("{text}");
    write(&options.out.join("noisy.md"), &text)?;
    write(&options.out.join("noisy.svg"), &svg(&report)?)?;
    let json = serde_json::to_string_pretty(&report).context("results as JSON")?;
    write(&options.out.join("noisy.json"), &json)?;
    println!("table, chart and JSON: {}", options.out.display());
    Ok(())
}

/// A card and where its volume is.
struct Card {
    server: Server,
    socket: PathBuf,
    control: PathBuf,
}

impl Card {
    fn start(card: &Path, dir: PathBuf, disk_len: u64) -> Result<Self> {
        fs::create_dir(&dir).context("a directory for the volume")?;
        let place = Place {
            card: card.to_owned(),
            dir,
            disk_len,
            queues: 1,
        };
        Kind::Offload.create(&place)?;
        Ok(Self {
            server: Kind::Offload.serve(&place)?,
            socket: Kind::Offload.socket(&place),
            control: Kind::Offload.control(&place),
        })
    }

    /// Puts a limit in force, or lifts it.
    fn limit(&self, iops: Option<u64>) -> Result<()> {
        let mut client = ControlClient::connect(&self.control).context("the control socket")?;
        let told = client.call("limits", json!({ "iops": iops }))?;
        if told.get("iops") != Some(&iops.map_or(Value::Null, Value::from)) {
            bail!("the card has limits that it was not told: {told}");
        }
        Ok(())
    }

    fn fill(&self, name: &str, stop: &Arc<AtomicBool>) -> Result<Client> {
        let mut client = Client::connect(&self.socket, 1, Arc::clone(stop))
            .with_context(|| format!("the card says:\n{}", self.server.tail()))?;
        let bar = bar(client.capacity(), "{bytes}/{total_bytes}");
        bar.set_message(format!("filling {name}"));
        client.fill(|done| bar.set_position(done))?;
        bar.finish_and_clear();
        Ok(client)
    }
}

/// The neighbour's client, on a thread of its own.
struct Noise {
    orders: Option<Sender<Order>>,
    requests: Arc<AtomicU64>,
    is_quiet: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<(), ClientError>>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    Make,
    Stop,
}

impl Noise {
    /// Makes no noise yet.
    fn new(socket: &Path, job: Job, stop: &Arc<AtomicBool>) -> Self {
        let (orders, inbox) = channel();
        let requests = Arc::new(AtomicU64::new(0));
        let is_quiet = Arc::new(AtomicBool::new(true));
        let (count, quiet) = (Arc::clone(&requests), Arc::clone(&is_quiet));
        let (socket, stop) = (socket.to_owned(), Arc::clone(stop));
        let thread = std::thread::spawn(move || {
            let mut client = Client::connect(&socket, 1, stop)?;
            let mut order = Order::Stop;
            loop {
                let new = match order {
                    Order::Stop => {
                        quiet.store(true, Ordering::SeqCst);
                        match inbox.recv() {
                            Ok(order) => Some(order),
                            Err(_) => return Ok(()),
                        }
                    }
                    Order::Make => inbox.try_recv().ok(),
                };
                order = new.unwrap_or(order);
                if order == Order::Make {
                    let outcome = client.run(&job, NOISE_STEP)?;
                    count.fetch_add(outcome.requests, Ordering::SeqCst);
                }
            }
        });
        Self {
            orders: Some(orders),
            requests,
            is_quiet,
            thread: Some(thread),
        }
    }

    fn tell(&self, order: Order) -> Result<()> {
        if order == Order::Make {
            self.is_quiet.store(false, Ordering::SeqCst);
        }
        let told = self.orders.as_ref().map(|orders| orders.send(order));
        match told {
            Some(Ok(())) => Ok(()),
            _ => bail!("the neighbour's client has ended"),
        }
    }

    /// Stops it and waits until nothing of it is under way.
    fn hush(&self, stop: &AtomicBool) -> Result<()> {
        self.tell(Order::Stop)?;
        while !self.is_quiet.load(Ordering::SeqCst) {
            if self.thread.as_ref().is_none_or(JoinHandle::is_finished) {
                bail!("the neighbour's client has ended");
            }
            pause(Duration::from_millis(10), stop)?;
        }
        Ok(())
    }

    fn end(mut self) -> Result<()> {
        self.orders = None;
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => Ok(result?),
            _ => bail!("the neighbour's client panicked"),
        }
    }
}

fn measure(options: &Options, card: &Path, stop: &Arc<AtomicBool>) -> Result<Report> {
    let home = tempfile::Builder::new()
        .prefix("offload-bench-")
        .tempdir_in(&options.dir)
        .context("no directory can be made there")?;
    let disk_len = options.size << 20;
    let mut notes = Vec::new();
    if cfg!(debug_assertions) {
        notes.push("not an optimised build: run with --release".to_owned());
    }
    if let Some(load) = machine_load().filter(|load| *load > crate::blk::BUSY_LOAD) {
        notes.push(format!("the machine is busy (load {load})"));
    }
    let victim = Card::start(card, home.path().join("victim"), disk_len)?;
    let neighbour = Card::start(card, home.path().join("neighbour"), disk_len)?;
    drop(neighbour.fill("the neighbour", stop)?);
    let mut client = victim.fill("the victim", stop)?;
    let noise = Noise::new(&neighbour.socket, options.noise, stop);

    let one: Job = "randread-4k-qd1".parse().context("a job of ours")?;
    let mut cases = vec![
        Case::new(
            format!(
                "provisioned: {} IOPS, {}",
                options.victim_iops,
                options.job.title()
            ),
            Some(options.victim_iops),
            options.job,
        ),
        Case::new(format!("one at a time: {}", one.title()), None, one),
    ];
    let time = Duration::from_secs_f64(options.time);
    let steps = options.rounds as usize * cases.len() * Scene::ALL.len();
    let bar = bar(steps as u64, "{pos}/{len}, {eta} left");
    for round in 0..options.rounds as usize {
        for case in &mut cases {
            victim.limit(case.iops_limit)?;
            for step in 0..Scene::ALL.len() {
                let at = (round + step) % Scene::ALL.len();
                let Some(part) = case.parts.get_mut(at) else {
                    continue;
                };
                bar.set_message(format!("{}, {}", case.title, part.scene.name()));
                neighbour.limit((part.scene == Scene::Limited).then_some(options.noise_iops))?;
                if part.scene != Scene::Alone {
                    noise.tell(Order::Make)?;
                }
                // Also the slack of new limits is spent then.
                client.run(&case.job, SETTLE)?;
                let (before, begin) = (noise.requests.load(Ordering::SeqCst), Instant::now());
                let outcome = client.run(&case.job, time)?;
                if part.scene != Scene::Alone {
                    // What the neighbour is just doing is counted at its end.
                    noise.hush(stop)?;
                }
                let made = noise.requests.load(Ordering::SeqCst) - before;
                #[allow(clippy::cast_precision_loss)]
                part.runs.push(Run {
                    iops: outcome.requests as f64 / outcome.elapsed.as_secs_f64(),
                    latency: Latency::of(&outcome.latency),
                    noise_iops: made as f64 / begin.elapsed().as_secs_f64(),
                });
                bar.inc(1);
                sleep(Duration::from_millis(100));
            }
        }
    }
    bar.finish_and_clear();
    noise.end()?;
    Ok(Report {
        directory: options.dir.display().to_string(),
        disk_len,
        rounds: options.rounds,
        seconds: options.time,
        noise: options.noise,
        noise_iops_limit: options.noise_iops,
        cases,
        notes,
    })
}

fn markdown(report: &Report) -> String {
    let mut out = String::from("# A noisy neighbour, and its limit\n\n");
    let _ = writeln!(
        out,
        "Two cards, two volumes of {} MiB on {}; {} rounds of {} s, scenes in turn. The neighbour: {}, \
         limited to {} IOPS where it is. Medians; what p99 has moved is taken within a round.\n",
        report.disk_len >> 20,
        report.directory,
        report.rounds,
        report.seconds,
        report.noise.title(),
        report.noise_iops_limit
    );
    for note in &report.notes {
        let _ = writeln!(out, "- *{note}*\n");
    }
    let header = [
        "Victim",
        "Scene",
        "IOPS",
        "p50 µs",
        "p99 µs",
        "p99.9 µs",
        "p99 moved by, median (min – max)",
        "Neighbour's IOPS",
    ];
    let mut rows = Vec::new();
    for case in &report.cases {
        for part in &case.parts {
            let median = |value: &dyn Fn(&Run) -> f64| {
                number(Spread::of(part.runs.iter().map(value)).map(|spread| spread.median))
            };
            let moved = case
                .moved(part.scene)
                .filter(|_| part.scene != Scene::Alone);
            rows.push(vec![
                case.title.clone(),
                part.scene.name().to_owned(),
                median(&|run| run.iops),
                median(&|run| run.latency.p50_us),
                median(&|run| run.latency.p99_us),
                median(&|run| run.latency.p999_us),
                moved.map_or_else(|| "–".to_owned(), moved_text),
                median(&|run| run.noise_iops),
            ]);
        }
    }
    table(&mut out, &header.map(str::to_owned), rows.into_iter());
    out.push_str("![p99 of the victims](noisy.svg)\n");
    out
}

fn moved_text(moved: Spread) -> String {
    let percent = |part: f64| format!("{:+.0} %", part * 100.0);
    format!(
        "**{}** ({} – {})",
        percent(moved.median),
        percent(moved.min),
        percent(moved.max)
    )
}

const WIDTH: i32 = 1080;
const LEFT: i32 = 230;
const ROW: i32 = 22;
const HEAD: i32 = 34;
const TOP: i32 = 76;

/// The victims' 99th percentiles as bars. Each victim has a scale of its own: they differ by their
/// depth, not by how well they are served.
fn svg(report: &Report) -> Result<String, ChartError> {
    let rows = i32::try_from(Scene::ALL.len()).unwrap_or(3);
    let groups = i32::try_from(report.cases.len()).unwrap_or(2);
    let height = TOP + groups * (HEAD + rows * ROW + 12);
    chart::drawing(WIDTH, height, |root| draw(root, report))
}

fn draw(root: &Root<'_>, report: &Report) -> Drawn {
    root.fill(&WHITE)?;
    let title = "99th percentile of a volume's latency beside a neighbour";
    text(root, title, (24, 26), 20, HPos::Left)?;
    let about = format!(
        "{}; the neighbour: {}, limited to {} IOPS; median of {} rounds, whiskers: smallest and largest; \
         shorter is better",
        report.directory,
        report.noise.title(),
        report.noise_iops_limit,
        report.rounds
    );
    text(root, &about, (24, 50), 12, HPos::Left)?;
    let mut y = TOP;
    for case in &report.cases {
        text(root, &case.title, (24, y + HEAD / 2), 14, HPos::Left)?;
        y += HEAD;
        let spreads = Scene::ALL.map(|scene| Spread::of(case.p99s(scene)));
        let largest = spreads.iter().flatten().map(|spread| spread.max);
        let largest = largest.fold(1.0, f64::max);
        #[allow(clippy::cast_possible_truncation)]
        let x = |value: f64| LEFT + (value / largest * f64::from(WIDTH - LEFT - 200)) as i32;
        for (n, (scene, spread)) in Scene::ALL.into_iter().zip(spreads).enumerate() {
            let middle = y + ROW / 2;
            text(root, scene.name(), (LEFT - 10, middle), 12, HPos::Right)?;
            y += ROW;
            let Some(spread) = spread else { continue };
            let corners = [(LEFT, middle - 7), (x(spread.median), middle + 7)];
            root.draw(&Rectangle::new(corners, chart::color(n).filled()))?;
            chart::whisker(root, x(spread.min), x(spread.max), middle)?;
            let moved = case.moved(scene).filter(|_| scene != Scene::Alone);
            let moved = moved.map_or_else(String::new, |moved| {
                format!("  ({:+.0} %)", moved.median * 100.0)
            });
            let label = format!("{:.2} ms{moved}", spread.median / 1e3);
            text(root, &label, (x(spread.max) + 8, middle), 11, HPos::Left)?;
        }
        y += 12;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let job: Job = "randread-4k-qd8".parse().unwrap();
        let mut case = Case::new("provisioned".into(), Some(2000), job);
        for (part, p99s) in case.parts.iter_mut().zip([
            [4000.0, 5000.0, 4000.0],
            [8000.0, 6000.0, 20_000.0],
            [4200.0, 5000.0, 4100.0],
        ]) {
            part.runs = p99s
                .map(|p99_us| Run {
                    iops: 2000.0,
                    latency: Latency {
                        mean_us: p99_us / 2.0,
                        p50_us: p99_us / 2.0,
                        p99_us,
                        p999_us: p99_us * 2.0,
                    },
                    noise_iops: 1234.0,
                })
                .into();
        }
        Report {
            directory: "/var/tmp".into(),
            disk_len: 1 << 30,
            rounds: 3,
            seconds: 3.0,
            noise: "randwrite-4k-qd64".parse().unwrap(),
            noise_iops_limit: 2000,
            cases: vec![case],
            notes: Vec::new(),
        }
    }

    #[test]
    fn how_far_p99_moves_is_taken_within_a_round() {
        let report = report();
        let moved = |scene| report.cases[0].moved(scene).unwrap();
        let noisy = moved(Scene::Unlimited);
        assert!((noisy.median - 1.0).abs() < 1e-9, "{noisy:?}");
        assert!((noisy.max - 4.0).abs() < 1e-9, "{noisy:?}");
        let limited = moved(Scene::Limited);
        assert!((limited.median - 0.025).abs() < 1e-9, "{limited:?}");
        assert!(moved(Scene::Alone).max.abs() < 1e-9);
    }

    #[test]
    fn table_and_picture_have_all_scenes() {
        let report = report();
        let (table, picture) = (markdown(&report), svg(&report).unwrap());
        for scene in Scene::ALL {
            assert!(table.contains(scene.name()), "{table}");
            assert!(picture.contains(scene.name()));
        }
        assert!(table.contains("**+100 %** (+20 % – +400 %)"), "{table}");
        assert!(picture.contains("(+100 %)") && picture.starts_with("<svg"));
    }
}
