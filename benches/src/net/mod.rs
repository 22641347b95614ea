//! `net`: the network card against its peers, without a guest.
//!
//! ```text
//!  guest's namespace                                host's namespace
//!  iperf3 ── kernel's TCP ── TAP ══ pump ══ vhost-user ══ card or peer ── sockets ── iperf3 -s
//! ```
//!
//! The kernel's own TCP and an unmodified iperf3 stand for the guest, through the same client for every
//! backend; each gets a guest of its own. Modules, from the pure to the impure: [`load`] what is
//! measured, [`peer`] command lines, [`pump`] the frontend, [`tap`] and [`space`] the kernel's side.

pub mod load;
pub mod peer;
pub mod pump;
pub mod space;
pub mod tap;

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Args;
use serde::Serialize;

use self::load::{Load, Servers};
use self::peer::Peer;
use self::pump::Pump;
use self::space::Space;
use crate::blk::{bar, find_program, write};
use crate::results::TargetInfo;
use crate::server::Server;
use crate::stats::Spread;
use crate::target::is_on_path;

/// What `net` takes.
#[derive(Debug, Args)]
pub struct Options {
    /// Where results go: net.md and net.json
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
    /// Measure only passt, for trying the client out
    #[arg(long)]
    pub only_passt: bool,
}

/// All runs of one load.
#[derive(Clone, Debug, Serialize)]
struct Row {
    load: Load,
    unit: &'static str,
    /// For each target: the figure of each round.
    figures: Vec<Vec<f64>>,
    /// For each target: part of a core that the backend used.
    cpu: Vec<Vec<f64>>,
}

#[derive(Clone, Debug, Serialize)]
struct Report {
    targets: Vec<TargetInfo>,
    rounds: u32,
    seconds: u64,
    rows: Vec<Row>,
    /// Part of a core that each uses attached and silent.
    idle: Vec<f64>,
    notes: Vec<String>,
}

/// A backend with its guest.
struct Running {
    peer: Peer,
    guest: Space,
    _pump: Pump,
    server: Server,
}

/// Runs the comparison and writes its results.
///
/// # Errors
/// No permission for namespaces, a backend fails, or results cannot be written.
pub fn run(options: &Options) -> Result<()> {
    fs::create_dir_all(&options.out)
        .with_context(|| format!("{} cannot be made", options.out.display()))?;
    let mut notes = Vec::new();
    let mut peers = vec![];
    let mut card = PathBuf::new();
    if !options.only_passt {
        card = find_program("vhost-net", options.card.as_deref())?;
        peers.push(Peer::Offload);
    }
    let passt = match &options.passt {
        Some(passt) => Some(passt.clone()),
        None if is_on_path(peer::PASST, std::env::var_os("PATH")) => Some(peer::PASST.into()),
        None => None,
    };
    match &passt {
        Some(_) => peers.push(Peer::Passt),
        None => notes.push("passt is not on PATH: skipped".to_owned()),
    }
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
    let rows = measure(&running, options)?;
    let idle = idle(&running)?;
    drop(running);
    drop(servers);
    let report = Report {
        targets: peers.iter().map(|peer| peer.info()).collect(),
        rounds: options.rounds,
        seconds: options.time,
        rows,
        idle,
        notes,
    };
    let text = markdown(&report);
    println!("{text}");
    write(&options.out.join("net.md"), &text)?;
    let json = serde_json::to_string_pretty(&report).context("results as JSON")?;
    write(&options.out.join("net.json"), &json)?;
    println!("table and JSON: {}", options.out.display());
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
    let steps = Load::ALL.len() * running.len() * options.rounds as usize;
    let progress = bar(steps as u64, "{pos}/{len}, {eta} left");
    let empty = vec![Vec::new(); running.len()];
    let mut rows: Vec<Row> = Load::ALL
        .iter()
        .map(|&load| Row {
            load,
            unit: load.unit(),
            figures: empty.clone(),
            cpu: empty.clone(),
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
                let cpu = used.as_secs_f64() / begin.elapsed().as_secs_f64();
                if let (Some(figures), Some(loads)) =
                    (row.figures.get_mut(index), row.cpu.get_mut(index))
                {
                    figures.push(figure);
                    loads.push(cpu);
                }
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

fn markdown(report: &Report) -> String {
    let mut out = String::from("# Network card against its peers\n\n");
    let _ = writeln!(
        out,
        "The kernel's TCP and iperf3 over one vhost-user client; {} rounds of {} s, median (min – max)\n",
        report.rounds, report.seconds
    );
    for target in &report.targets {
        let _ = writeln!(out, "- **{}**: {}", target.name, target.about);
    }
    for note in &report.notes {
        let _ = writeln!(out, "- *{note}*");
    }
    out.push_str("\n| Load | Unit |");
    for target in &report.targets {
        let _ = write!(out, " {} | load of a core |", target.name);
    }
    out.push_str(" offload / passt |\n| --- | --- |");
    for _ in &report.targets {
        out.push_str(" ---: | ---: |");
    }
    out.push_str(" ---: |\n");
    for row in &report.rows {
        let _ = write!(out, "| {} | {} |", row.load, row.unit);
        for (figures, cpu) in row.figures.iter().zip(&row.cpu) {
            let _ = write!(out, " {} | {} |", spread(figures), percent(cpu));
        }
        let ratio = match row.figures.as_slice() {
            [ours, theirs] => Spread::of_ratios(ours, theirs),
            _ => None,
        };
        match ratio {
            Some(ratio) => {
                let _ = writeln!(
                    out,
                    " **{:.2}** ({:.2} – {:.2}) |",
                    ratio.median, ratio.min, ratio.max
                );
            }
            None => out.push_str(" – |\n"),
        }
    }
    out.push_str("| Attached and silent | % of a core |");
    for idle in &report.idle {
        let _ = write!(out, " {:.3} | |", idle * 100.0);
    }
    out.push_str(" – |\n");
    out
}

fn spread(figures: &[f64]) -> String {
    let digits = |value: f64| {
        if value >= 100.0 {
            format!("{value:.0}")
        } else {
            format!("{value:.2}")
        }
    };
    Spread::of(figures.iter().copied()).map_or_else(
        || "–".to_owned(),
        |s| {
            format!(
                "{} ({} – {})",
                digits(s.median),
                digits(s.min),
                digits(s.max)
            )
        },
    )
}

fn percent(values: &[f64]) -> String {
    let spread = Spread::of(values.iter().copied());
    spread.map_or_else(|| "–".to_owned(), |s| format!("{:.0} %", s.median * 100.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_as_wide_as_its_header() {
        for targets in [1, 2] {
            let report = Report {
                targets: Peer::ALL.iter().take(targets).map(|p| p.info()).collect(),
                rounds: 1,
                seconds: 1,
                rows: vec![Row {
                    load: Load::UdpOut,
                    unit: Load::UdpOut.unit(),
                    figures: vec![vec![1.0]; targets],
                    cpu: vec![vec![0.5]; targets],
                }],
                idle: vec![0.0; targets],
                notes: vec![],
            };
            let text = markdown(&report);
            let mut widths = text
                .lines()
                .filter(|line| line.starts_with('|'))
                .map(|line| line.matches('|').count());
            let first = widths.next().unwrap();
            assert!(widths.all(|width| width == first), "{text}");
        }
    }
}
