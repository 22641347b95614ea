//! Results as a picture: bars of throughput as a multiple of a reference.
//!
//! One group of bars a job, lying, so that their titles can be read. The reference is the plain
//! file's server: its bar is always 1, and how far the encrypted ones fall short (or not) is what
//! the picture is for. Whiskers show the smallest and the largest round.

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use thiserror::Error;

use crate::results::{JobResults, REFERENCES, Results};

/// The picture could not be drawn.
#[derive(Debug, Error)]
#[error("the chart cannot be drawn: {0}")]
pub struct ChartError(String);

const WIDTH: i32 = 1080;
const BAR: i32 = 15;
const GAP: i32 = 16;
const TOP: i32 = 92;
const BOTTOM: i32 = 56;
const LEFT: i32 = 250;
const RIGHT: i32 = 190;
const FONT: &str = "sans-serif";
const COLORS: [RGBColor; 4] = [
    RGBColor(0x1b, 0x6c, 0xa8),
    RGBColor(0x9a, 0xa5, 0xb1),
    RGBColor(0xe0, 0x8e, 0x2b),
    RGBColor(0xc9, 0xd3, 0xdc),
];
const INK: RGBColor = RGBColor(0x22, 0x2b, 0x33);
const FAINT: RGBColor = RGBColor(0xdd, 0xe2, 0xe7);

/// Draws results as SVG.
///
/// # Errors
/// Plotting fails.
pub fn svg(results: &Results) -> Result<String, ChartError> {
    let bars = i32::try_from(results.targets.len()).unwrap_or(1);
    let groups = i32::try_from(results.jobs.len()).unwrap_or(1);
    let height = TOP + groups * (bars * BAR + GAP) + BOTTOM;
    drawing(WIDTH, height, |root| draw(root, results, height))
}

/// What `draw` draws, as SVG.
pub(crate) fn drawing(
    width: i32,
    height: i32,
    draw: impl FnOnce(&Root<'_>) -> Drawn,
) -> Result<String, ChartError> {
    let mut out = String::new();
    {
        let root = SVGBackend::with_string(&mut out, (width.unsigned_abs(), height.unsigned_abs()))
            .into_drawing_area();
        let failed = |error: DrawingAreaErrorKind<std::io::Error>| ChartError(error.to_string());
        draw(&root).map_err(failed)?;
        root.present().map_err(failed)?;
    }
    Ok(out)
}

pub(crate) type Root<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
pub(crate) type Drawn = Result<(), DrawingAreaErrorKind<std::io::Error>>;

/// Bars of a target are relative to this one.
fn reference(results: &Results) -> usize {
    results.target(REFERENCES[0]).unwrap_or(0)
}

fn draw(root: &Root<'_>, results: &Results, height: i32) -> Drawn {
    root.fill(&WHITE)?;
    let reference = reference(results);
    let largest = results.jobs.iter().flat_map(|job| {
        (0..results.targets.len()).filter_map(move |t| Some(job.ratio(t, reference)?.max))
    });
    let scale = Scale::up_to(largest.fold(1.0, f64::max));
    frame(root, results, &scale, height)?;
    for (row, job) in (0..).zip(&results.jobs) {
        let bars = i32::try_from(results.targets.len()).unwrap_or(1);
        let y = TOP + row * (bars * BAR + GAP) + GAP / 2;
        text(
            root,
            &job.job.title(),
            (LEFT - 12, y + bars * BAR / 2),
            14,
            HPos::Right,
        )?;
        for (index, n) in (0..results.targets.len()).zip(0..) {
            bar(root, job, index, reference, &scale, y + n * BAR)?;
        }
    }
    Ok(())
}

fn bar(
    root: &Root<'_>,
    job: &JobResults,
    target: usize,
    reference: usize,
    scale: &Scale,
    y: i32,
) -> Drawn {
    let Some(ratio) = job.ratio(target, reference) else {
        return text(
            root,
            "not measured",
            (LEFT + 6, y + BAR / 2),
            11,
            HPos::Left,
        );
    };
    let color = color(target);
    let end = scale.x(ratio.median);
    root.draw(&Rectangle::new(
        [(LEFT, y + 1), (end, y + BAR - 1)],
        color.filled(),
    ))?;
    let middle = y + BAR / 2;
    let (low, high) = (scale.x(ratio.min), scale.x(ratio.max));
    whisker(root, low, high, middle)?;
    let Some(rate) = job.spread(target, |s| s.iops) else {
        return Ok(());
    };
    let absolute = if job.job.is_about_bandwidth() {
        let mib = rate.median * f64::from(job.job.block) / f64::from(1 << 20);
        format!("{mib:.0} MiB/s")
    } else {
        format!("{:.1} kIOPS", rate.median / 1e3)
    };
    let label = format!("{:.2}×  {absolute}", ratio.median);
    text(root, &label, (high.max(end) + 8, middle), 11, HPos::Left)
}

fn frame(root: &Root<'_>, results: &Results, scale: &Scale, height: i32) -> Drawn {
    let name = |t: usize| results.targets.get(t).map_or("?", |t| t.name.as_str());
    let title = format!("Throughput as a multiple of {}", name(reference(results)));
    text(root, &title, (24, 26), 20, HPos::Left)?;
    let about = format!(
        "{}, {} MiB filled; median of {} rounds of {} s, whiskers: smallest and largest; longer is faster",
        results.directory,
        results.disk_len >> 20,
        results.rounds,
        results.seconds
    );
    text(root, &about, (24, 50), 12, HPos::Left)?;
    let bottom = height - BOTTOM + 4;
    for mark in scale.marks() {
        let x = scale.x(mark);
        let color = if (mark - 1.0).abs() < 1e-9 {
            INK.mix(0.6)
        } else {
            FAINT.to_rgba()
        };
        let line = vec![(x, TOP - 8), (x, bottom)];
        root.draw(&PathElement::new(line, color.stroke_width(1)))?;
        text(root, &format!("{mark}×"), (x, TOP - 18), 11, HPos::Center)?;
    }
    let mut x = LEFT;
    for (n, target) in results.targets.iter().enumerate() {
        let y = height - BOTTOM / 2;
        let color = color(n);
        root.draw(&Rectangle::new(
            [(x, y - 6), (x + 12, y + 6)],
            color.filled(),
        ))?;
        text(root, &target.name, (x + 18, y), 13, HPos::Left)?;
        x += 50 + 8 * i32::try_from(target.name.len()).unwrap_or(10);
    }
    Ok(())
}

/// The colour of the bar of this number.
pub(crate) fn color(n: usize) -> RGBColor {
    COLORS[n % COLORS.len()]
}

/// From the smallest to the largest value, if they differ.
pub(crate) fn whisker(root: &Root<'_>, low: i32, high: i32, y: i32) -> Drawn {
    if high <= low {
        return Ok(());
    }
    let style = INK.mix(0.7).stroke_width(1);
    root.draw(&PathElement::new(vec![(low, y), (high, y)], style))?;
    for x in [low, high] {
        let tick = vec![(x, y - 3), (x, y + 3)];
        root.draw(&PathElement::new(tick, style))?;
    }
    Ok(())
}

pub(crate) fn text(root: &Root<'_>, text: &str, at: (i32, i32), size: i32, side: HPos) -> Drawn {
    let style = TextStyle::from((FONT, size).into_font())
        .color(&INK)
        .pos(Pos::new(side, VPos::Center));
    root.draw_text(text, &style, at)
}

/// The axis.
struct Scale {
    end: f64,
    step: f64,
}

impl Scale {
    fn up_to(largest: f64) -> Self {
        let step = [0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 50.0]
            .into_iter()
            .find(|step| largest / step <= 8.0)
            .unwrap_or(200.0);
        Self {
            end: (largest / step).ceil() * step,
            step,
        }
    }

    fn x(&self, ratio: f64) -> i32 {
        let room = f64::from(WIDTH - LEFT - RIGHT);
        #[allow(clippy::cast_possible_truncation)]
        let x = (ratio / self.end * room).clamp(0.0, room).round() as i32;
        LEFT + x
    }

    fn marks(&self) -> impl Iterator<Item = f64> {
        let (end, step) = (self.end, self.step);
        (0..=64_i32)
            .map(move |n| f64::from(n) * step)
            .take_while(move |mark| *mark <= end + 1e-9)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::example;

    #[test]
    fn the_axis_holds_the_longest_bar_and_has_few_marks() {
        for largest in [1.0, 1.2, 3.9, 17.0, 300.0] {
            let scale = Scale::up_to(largest);
            assert!(scale.end >= largest);
            assert!((3..=10).contains(&scale.marks().count()), "{largest}");
            assert_eq!(scale.x(0.0), LEFT);
            assert_eq!(scale.x(scale.end), WIDTH - RIGHT);
        }
    }

    #[test]
    fn every_job_and_target_has_its_bar() {
        let results = example([&[90e3], &[180e3], &[45e3]]);
        let picture = svg(&results).unwrap();
        for text in [
            "4 KiB random read, QD 32",
            "0.50×",
            "0.25×",
            "45.0 kIOPS",
            "qsd LUKS",
        ] {
            assert!(picture.contains(text), "{text} is missing");
        }
        assert!(picture.starts_with("<svg"));
    }

    #[test]
    fn a_target_without_samples_is_said_to_be_missing() {
        let picture = svg(&example([&[90e3], &[180e3], &[]])).unwrap();
        assert!(picture.contains("not measured"));
    }
}
