//! `net`: the network card against its peers, without a guest.
//!
//! ```text
//!  guest's namespace                                host's namespace
//!  iperf3 ── kernel's TCP ── TAP ══ pump ══ vhost-user ══ card or peer ── sockets ── iperf3 -s
//! ```
//!
//! The kernel's own TCP and an unmodified iperf3 stand for the guest, through the same client for every
//! backend; each gets a guest of its own. Modules, from the pure to the impure: [`load`] what is
//! measured, [`report`] how it is shown, [`peer`] command lines, [`pump`] the frontend, [`tap`] and
//! [`space`] the kernel's side.

pub mod load;
pub mod peer;
pub mod pump;
pub mod report;
pub mod space;
pub mod tap;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Args;

use self::load::{Load, Servers};
use self::peer::Peer;
use self::pump::Pump;
use self::report::{Report, Row, Silent};
use self::space::Space;
use crate::blk::{bar, find_program, machine_load, write};
use crate::server::Server;
use crate::target::is_on_path;

/// What `net` takes.
#[derive(Debug, Args)]
pub struct Options {
    /// Where results go: net.md, net.json and net.svg
    #[arg(long, value_name = "DIR", default_value = "bench-results")]
    pub out: PathBuf,
    /// Rounds
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub rounds: u32,
    /// Seconds of a run
    #[arg(long, value_name = "SECONDS", default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=600))]
    pub time: u64,
    /// passt's program, 2025 or newer [default: as found on PATH]
    #[arg(long, value_name = "FILE")]
    pub passt: Option<PathBuf>,
    /// The card's program [default: vhost-net next to this program, built by cargo if that runs it]
    #[arg(long, value_name = "FILE")]
    pub card: Option<PathBuf>,
    /// Measure only these: offload, "offload 1500", passt
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub only: Vec<String>,
    /// Loads, by name, like tcp-in-8; any other name says which there are [default: all]
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub load: Vec<Load>,
}

/// Processes that want to run, per minute, above which rates are not to be trusted.
const BUSY_LOAD: f64 = 0.8;
/// Flows whose memory is looked at.
const SILENT_FLOWS: u16 = 1000;

/// A backend with its guest.
struct Running {
    peer: Peer,
    guest: Space,
    _pump: Pump,
    server: Server,
}

impl Running {
    /// Descriptors that the backend has open.
    fn descriptors(&self) -> usize {
        let dir = format!("/proc/{}/fd", self.server.pid());
        fs::read_dir(dir).map_or(0, Iterator::count)
    }
}

/// What an open, silent TCP flow adds to a backend's memory, in KiB.
fn flow_memory(target: &Running) -> Result<f64> {
    let before = target.server.memory()?.resident;
    let open = target.guest.run(|| load::open_idle(SILENT_FLOWS))?;
    let more = target.server.memory()?.resident.saturating_sub(before);
    drop(open);
    // Until the backend has seen them end.
    std::thread::sleep(Duration::from_secs(3));
    #[allow(clippy::cast_precision_loss)]
    Ok(more as f64 / 1024.0 / f64::from(SILENT_FLOWS))
}

/// Runs the comparison and writes its results.
///
/// # Errors
/// No permission for namespaces, a backend fails, or results cannot be written.
pub fn run(options: &Options) -> Result<()> {
    fs::create_dir_all(&options.out)
        .with_context(|| format!("{} cannot be made", options.out.display()))?;
    let mut notes = Vec::new();
    let card = find_program("vhost-net", options.card.as_deref())?;
    let passt = match &options.passt {
        Some(passt) => Some(passt.clone()),
        None if is_on_path(peer::PASST, std::env::var_os("PATH")) => Some(peer::PASST.into()),
        None => None,
    };
    if passt.is_none() {
        notes.push("passt is not on PATH: skipped".to_owned());
    }
    if let Some(load) = machine_load().filter(|load| *load > BUSY_LOAD) {
        notes.push(format!(
            "the machine is busy (load {load}): trust ratios, not rates"
        ));
    }
    let is_wanted = |peer: &Peer| {
        (peer.is_card() || passt.is_some())
            && (options.only.is_empty() || options.only.contains(&peer.info().name))
    };
    let peers: Vec<Peer> = Peer::ALL.into_iter().filter(is_wanted).collect();
    let dir = tempfile::Builder::new()
        .prefix("offload-net-")
        .tempdir_in("/tmp")
        .context("no directory can be made in /tmp")?;
    // passt gives up its rights before it makes its socket.
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777))?;
    let host = peer::host()?;
    let servers = Servers::start(&host)?;
    let passt = passt.unwrap_or_default();
    let running: Vec<Running> = peers
        .iter()
        .map(|peer| start(*peer, &host, &card, &passt, dir.path()))
        .collect::<Result<_>>()?;
    let before: Vec<usize> = running.iter().map(Running::descriptors).collect();
    let rows = measure(&running, options)?;
    let mut silent: Vec<Silent> = Vec::new();
    // A choice of loads is for looking at them.
    let loads = match options.load.as_slice() {
        [] => idle(&running)?,
        _ => Vec::new(),
    };
    for (target, (before, load)) in running.iter().zip(before.into_iter().zip(loads)) {
        silent.push(Silent {
            load,
            flow_kib: flow_memory(target).with_context(|| target.peer.info().name)?,
            left: target.descriptors().saturating_sub(before),
        });
    }
    drop(running);
    drop(servers);
    let report = Report {
        targets: peers.iter().map(|peer| peer.info()).collect(),
        rounds: options.rounds,
        seconds: options.time,
        rows,
        silent,
        notes,
    };
    let text = report::markdown(&report);
    println!("{text}");
    write(&options.out.join("net.md"), &text)?;
    write(&options.out.join("net.svg"), &report::svg(&report)?)?;
    let json = serde_json::to_string_pretty(&report).context("results as JSON")?;
    write(&options.out.join("net.json"), &json)?;
    println!("table, picture and JSON: {}", options.out.display());
    Ok(())
}

fn start(peer: Peer, host: &Space, card: &Path, passt: &Path, dir: &Path) -> Result<Running> {
    let guest = Space::new()?;
    let (server, socket) = peer.serve(host, card, passt, dir)?;
    let pump = Pump::start(&socket, &guest, peer.interface())
        .with_context(|| format!("{} says:\n{}", peer.info().name, server.tail()))?;
    peer::configure(&guest, peer)?;
    Ok(Running {
        peer,
        guest,
        _pump: pump,
        server,
    })
}

fn measure(running: &[Running], options: &Options) -> Result<Vec<Row>> {
    let time = Duration::from_secs(options.time);
    let loads = if options.load.is_empty() {
        Load::ALL.to_vec()
    } else {
        options.load.clone()
    };
    let steps = loads.len() * running.len() * options.rounds as usize;
    let progress = bar(steps as u64, "{pos}/{len}, {eta} left");
    let empty = vec![Vec::new(); running.len()];
    let mut rows: Vec<Row> = loads
        .into_iter()
        .map(|load| Row {
            load,
            unit: load.unit(),
            figures: empty.clone(),
            cpu: empty.clone(),
            bits: empty.clone(),
        })
        .collect();
    for round in 0..options.rounds as usize {
        for row in &mut rows {
            for step in 0..running.len() {
                let index = (step + round) % running.len();
                let Some(target) = running.get(index) else {
                    continue;
                };
                let name = target.peer.info().name;
                progress.set_message(format!("{}, {name}", row.load));
                let (before, begin) = (target.server.cpu_time()?, std::time::Instant::now());
                let figure = load::run(row.load, &target.guest, time).with_context(|| {
                    let tail = target.server.tail();
                    format!("{}, {name}, which says:\n{tail}", row.load)
                })?;
                let used = target.server.cpu_time()?.saturating_sub(before);
                let used = used.as_secs_f64();
                row.push(index, figure, used, begin.elapsed().as_secs_f64(), time);
                progress.inc(1);
            }
        }
    }
    progress.finish_and_clear();
    Ok(rows)
}

fn idle(running: &[Running]) -> Result<Vec<f64>> {
    let time = Duration::from_secs(5);
    std::thread::sleep(Duration::from_secs(2));
    let times = || -> Result<Vec<Duration>> {
        running
            .iter()
            .map(|target| Ok(target.server.cpu_time()?))
            .collect()
    };
    let before = times()?;
    std::thread::sleep(time);
    let pairs = times()?.into_iter().zip(before);
    Ok(pairs
        .map(|(after, before)| after.saturating_sub(before).as_secs_f64() / time.as_secs_f64())
        .collect())
}
