//! Results of the network card and its peers, as Markdown and as a picture.

use std::fmt::Write as _;
use std::time::Duration;

use plotters::prelude::*;
use plotters::style::text_anchor::HPos;
use serde::Serialize;

use super::load::Load;
use super::peer::Peer;
use crate::chart::{ChartError, Drawn, Root, color, drawing, text, whisker};
use crate::results::TargetInfo;
use crate::stats::Spread;
use crate::table::{number, table};

/// All runs of one load.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What was done.
    pub load: Load,
    /// Unit of the figures.
    pub unit: &'static str,
    /// For each target: the figure of each round.
    pub figures: Vec<Vec<f64>>,
    /// For each target: part of a core that the backend used.
    pub cpu: Vec<Vec<f64>>,
    /// For each target: nanoseconds of a core for a KiB, where the load is about bytes.
    pub bits: Vec<Vec<f64>>,
}

impl Row {
    /// Takes a run: its figure, and the processor seconds that the backend used in `elapsed` ones, of
    /// which it carried bytes for `time`.
    pub fn push(&mut self, target: usize, figure: f64, used: f64, elapsed: f64, time: Duration) {
        let (Some(figures), Some(cpu), Some(bits)) = (
            self.figures.get_mut(target),
            self.cpu.get_mut(target),
            self.bits.get_mut(target),
        ) else {
            return;
        };
        figures.push(figure);
        cpu.push(used / elapsed);
        if let Some(moved) = self.load.bits(figure, time.as_secs_f64()) {
            bits.push(used * 1e9 / (moved / 8192.0).max(1.0));
        }
    }
}

/// A target without anything to do.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Silent {
    /// Part of a core that it uses.
    pub load: f64,
    /// KiB of memory that an open, silent TCP flow takes.
    pub flow_kib: f64,
    /// Descriptors that are open after all the runs, and were not before.
    pub left: usize,
}

/// Everything that was measured.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Targets, in the order of the figures.
    pub targets: Vec<TargetInfo>,
    /// Rounds.
    pub rounds: u32,
    /// Seconds of a run.
    pub seconds: u64,
    /// Loads.
    pub rows: Vec<Row>,
    /// For each target.
    pub silent: Vec<Silent>,
    /// What a reader has to know.
    pub notes: Vec<String>,
}

impl Report {
    fn position(&self, peer: Peer) -> Option<usize> {
        let name = peer.info().name;
        self.targets.iter().position(|target| target.name == name)
    }

    /// Figures of a target as a multiple of passt's, round by round.
    fn ratio(&self, row: &Row, target: usize) -> Option<Spread> {
        let theirs = self.position(Peer::Passt)?;
        Spread::of_ratios(row.figures.get(target)?, row.figures.get(theirs)?)
    }
}

/// As Markdown.
#[must_use]
pub fn markdown(report: &Report) -> String {
    let mut out = String::from("## Network card against its peers\n\n");
    let _ = writeln!(
        out,
        "The kernel's TCP and iperf3 over one vhost-user client; {} rounds of {} s\n",
        report.rounds, report.seconds
    );
    for target in &report.targets {
        let _ = writeln!(out, "- **{}**: {}", target.name, target.about);
    }
    for note in &report.notes {
        let _ = writeln!(out, "- *{note}*");
    }
    out.push_str("\n### Rates: median (min – max), ratios of the same round\n\n");
    let names = || report.targets.iter().map(|target| target.name.clone());
    let mut header = vec!["Load".to_owned(), "Unit".to_owned()];
    header.extend(names());
    let cards = [Peer::Offload, Peer::Offload1500].map(|peer| report.position(peer));
    let cards: Vec<usize> = cards.into_iter().flatten().collect();
    header.extend(cards.iter().map(|card| {
        let name = report.targets.get(*card).map_or("", |info| &info.name);
        format!("{name} / passt")
    }));
    let rows = report.rows.iter().map(|row| {
        let mut cells = vec![row.load.to_string(), row.unit.to_owned()];
        cells.extend(row.figures.iter().map(|figures| spread(figures)));
        cells.extend(cards.iter().map(|card| ratio(report.ratio(row, *card))));
        cells
    });
    table(&mut out, &header, rows);
    costs(&mut out, report);
    idle(&mut out, report);
    out
}

fn costs(out: &mut String, report: &Report) {
    let mut header = vec!["Load".to_owned()];
    for target in &report.targets {
        header.push(format!("{}, load of a core", target.name));
        header.push(format!("{}, ns a KiB", target.name));
    }
    out.push_str("### Processor time of the backend, medians\n\n");
    let rows = report.rows.iter().map(|row| {
        let mut cells = vec![row.load.to_string()];
        for (cpu, bits) in row.cpu.iter().zip(&row.bits) {
            let load = Spread::of(cpu.iter().copied());
            cells.push(load.map_or_else(missing, |s| format!("{:.0} %", s.median * 100.0)));
            let cost = Spread::of(bits.iter().copied());
            cells.push(cost.map_or_else(missing, |s| number(Some(s.median))));
        }
        cells
    });
    table(out, &header, rows);
}

fn idle(out: &mut String, report: &Report) {
    let mut header = vec!["Attached and silent".to_owned()];
    header.extend(report.targets.iter().map(|target| target.name.clone()));
    let row = |title: &str, show: &dyn Fn(usize, &Silent) -> String| {
        let mut row = vec![title.to_owned()];
        row.extend(report.silent.iter().enumerate().map(|(n, s)| show(n, s)));
        row
    };
    let is = |row: &&Row, wanted: fn(&Load) -> bool| wanted(&row.load);
    let alone = |row: &&Row| is(row, |load| matches!(load, Load::TcpOut { flows: 1 }));
    let beside = |row: &&Row| is(row, |load| matches!(load, Load::TcpBesideIdle { .. }));
    let pair = report.rows.iter().find(alone);
    let pair = pair.zip(report.rows.iter().find(beside));
    let kept = |target: usize, _: &Silent| {
        let rates = pair.and_then(|(alone, beside)| {
            Spread::of_ratios(beside.figures.get(target)?, alone.figures.get(target)?)
        });
        rates.map_or_else(missing, |s| format!("{:.0} %", s.median * 100.0))
    };
    let rows = [
        row("CPU, % of a core", &|_, s| format!("{:.3}", s.load * 100.0)),
        row("Memory of an idle TCP flow, KiB", &|_, s| {
            number(Some(s.flow_kib))
        }),
        row("Descriptors left open after all runs", &|_, s| {
            s.left.to_string()
        }),
        row(
            "Rate of a flow beside 1000 idle ones, of its rate alone",
            &kept,
        ),
    ];
    out.push_str("### At rest\n\n");
    table(out, &header, rows.into_iter());
}

fn missing() -> String {
    "–".to_owned()
}

fn spread(figures: &[f64]) -> String {
    Spread::of(figures.iter().copied()).map_or_else(missing, |s| {
        let [median, min, max] = [s.median, s.min, s.max].map(|value| number(Some(value)));
        format!("{median} ({min} – {max})")
    })
}

fn ratio(ratio: Option<Spread>) -> String {
    ratio.map_or_else(missing, |s| {
        format!("**{:.2}** ({:.2} – {:.2})", s.median, s.min, s.max)
    })
}

const WIDTH: i32 = 1080;
const BAR: i32 = 15;
const GAP: i32 = 16;
const TOP: i32 = 92;
const BOTTOM: i32 = 48;
const LEFT: i32 = 370;
const RIGHT: i32 = 210;
/// Longer bars are cut off: a peer that stands still at one thing would hide all others.
const RATIO_MAX: f64 = 4.0;

/// As SVG: what a load reaches, as a multiple of passt's.
///
/// # Errors
/// Plotting fails.
pub fn svg(report: &Report) -> Result<String, ChartError> {
    let bars = i32::try_from(report.targets.len()).unwrap_or(1);
    let groups = i32::try_from(report.rows.len()).unwrap_or(1);
    let height = TOP + groups * (bars * BAR + GAP) + BOTTOM;
    drawing(WIDTH, height, |root| draw(root, report, bars, height))
}

fn x(ratio: f64) -> i32 {
    let room = f64::from(WIDTH - LEFT - RIGHT);
    #[allow(clippy::cast_possible_truncation)]
    let x = (ratio / RATIO_MAX * room).clamp(0.0, room).round() as i32;
    LEFT + x
}

fn draw(root: &Root<'_>, report: &Report, bars: i32, height: i32) -> Drawn {
    root.fill(&WHITE)?;
    text(
        root,
        "Network: as a multiple of passt",
        (24, 26),
        20,
        HPos::Left,
    )?;
    let about = format!(
        "median of {} rounds of {} s, whiskers: smallest and largest; longer is better, except for the \
         round trip",
        report.rounds, report.seconds
    );
    text(root, &about, (24, 50), 12, HPos::Left)?;
    for mark in (0_i32..=8).map(|n| f64::from(n) * RATIO_MAX / 8.0) {
        let line = vec![(x(mark), TOP - 8), (x(mark), height - BOTTOM + 4)];
        let strength = if (mark - 1.0).abs() < 1e-9 { 0.6 } else { 0.12 };
        root.draw(&PathElement::new(line, BLACK.mix(strength).stroke_width(1)))?;
        let at = (x(mark), TOP - 18);
        text(root, &format!("{mark}×"), at, 11, HPos::Center)?;
    }
    for (n, row) in (0..).zip(&report.rows) {
        let y = TOP + n * (bars * BAR + GAP) + GAP / 2;
        let title = row.load.to_string();
        text(
            root,
            &title,
            (LEFT - 12, y + bars * BAR / 2),
            13,
            HPos::Right,
        )?;
        for (target, n) in (0..report.targets.len()).zip(0..) {
            bar(root, report, row, target, y + n * BAR)?;
        }
    }
    let mut at = LEFT;
    for (n, target) in report.targets.iter().enumerate() {
        let y = height - BOTTOM / 2;
        let place = [(at, y - 6), (at + 12, y + 6)];
        root.draw(&Rectangle::new(place, color(n).filled()))?;
        text(root, &target.name, (at + 18, y), 13, HPos::Left)?;
        at += 50 + 8 * i32::try_from(target.name.len()).unwrap_or(10);
    }
    Ok(())
}

fn bar(root: &Root<'_>, report: &Report, row: &Row, target: usize, y: i32) -> Drawn {
    let middle = y + BAR / 2;
    let figures = row.figures.get(target);
    let figure = figures.and_then(|figures| Spread::of(figures.iter().copied()));
    let (Some(ratio), Some(figure)) = (report.ratio(row, target), figure) else {
        return text(
            root,
            "nothing to compare",
            (LEFT + 6, middle),
            11,
            HPos::Left,
        );
    };
    let end = x(ratio.median);
    let place = [(LEFT, y + 1), (end, y + BAR - 1)];
    root.draw(&Rectangle::new(place, color(target).filled()))?;
    let (low, high) = (x(ratio.min), x(ratio.max));
    whisker(root, low, high, middle)?;
    let absolute = number(Some(figure.median));
    let label = format!("{:.2}×  {absolute} {}", ratio.median, row.unit);
    text(root, &label, (high.max(end) + 8, middle), 11, HPos::Left)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(peers: &[Peer]) -> Report {
        let mut rows: Vec<Row> = Load::ALL
            .iter()
            .map(|&load| Row {
                load,
                unit: load.unit(),
                figures: vec![vec![]; peers.len()],
                cpu: vec![vec![]; peers.len()],
                bits: vec![vec![]; peers.len()],
            })
            .collect();
        for (target, peer) in peers.iter().enumerate() {
            let figure = if peer.is_card() { 6.0 } else { 4.0 };
            for row in &mut rows {
                row.push(target, figure, 1.5, 3.0, Duration::from_secs(2));
            }
        }
        let silent = Silent {
            load: 0.0005,
            flow_kib: 12.0,
            left: 0,
        };
        Report {
            targets: peers.iter().map(|peer| peer.info()).collect(),
            rounds: 1,
            seconds: 2,
            rows,
            silent: vec![silent; peers.len()],
            notes: vec![],
        }
    }

    #[test]
    fn every_row_is_as_wide_as_its_header_whoever_is_there() {
        for peers in [&Peer::ALL[..], &Peer::ALL[..1], &Peer::ALL[2..]] {
            crate::table::assert_rows_fit(&markdown(&example(peers)));
        }
    }

    #[test]
    fn a_row_has_rates_ratios_and_what_a_byte_costs() {
        let text = markdown(&example(&Peer::ALL));
        let row = |of: &str| {
            text.lines()
                .filter(|l| l.starts_with(of))
                .collect::<Vec<_>>()
        };
        let rows = row("| TCP to the guest, 8 flows");
        assert!(rows[0].contains("| **1.50** (1.50 – 1.50) | **1.50** (1.50 – 1.50) |"));
        // 1.5 s for 12 Gbit are 1024 ns for each KiB.
        assert!(
            rows[1].contains("| 50 % | 1024 | 50 % | 1024 | 50 % | 1536 |"),
            "{rows:?}"
        );
        assert!(row("| UDP round trip")[1].contains("| 50 % | – |"));
        assert!(row("| CPU, % of a core")[0].contains("| 0.050 |"));
    }

    #[test]
    fn the_picture_shows_every_load_and_says_what_cannot_be_compared() {
        let picture = svg(&example(&Peer::ALL)).unwrap();
        assert!(picture.contains("1.50×  6.00 Gbit/s") && picture.contains("TCP to the guest, 8"));
        let alone = svg(&example(&Peer::ALL[..1])).unwrap();
        assert!(alone.contains("nothing to compare"));
    }
}
