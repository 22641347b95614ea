//! Results as Markdown.

use std::fmt::Write as _;

use crate::results::{JobResults, Latency, OURS, REFERENCES, Results};
use crate::stats::Spread;

const MISSING: &str = "–";

/// Renders the results of one file system.
#[must_use]
pub fn markdown(results: &Results) -> String {
    let mut out = String::new();
    heading(&mut out, results);
    throughput(&mut out, results);
    details(&mut out, results);
    idle(&mut out, results);
    out
}

fn heading(out: &mut String, results: &Results) {
    let mib = results.disk_len >> 20;
    let _ = writeln!(
        out,
        "## Block I/O on {}: {mib} MiB filled, {} rounds of {} s\n",
        results.directory, results.rounds, results.seconds
    );
    for target in &results.targets {
        let _ = writeln!(out, "- **{}**: {}", target.name, target.about);
    }
    for note in &results.notes {
        let _ = writeln!(out, "- *{note}*");
    }
    out.push('\n');
}

fn throughput(out: &mut String, results: &Results) {
    let references = REFERENCES.map(|name| (name, results.target(name)));
    let ours = results.target(OURS);
    let mut header = vec!["Job".to_owned(), "Unit".to_owned()];
    header.extend(results.targets.iter().map(|t| t.name.clone()));
    header.extend(references.map(|(name, _)| format!("{OURS} / {name}")));
    let rows = results.jobs.iter().map(|job| {
        let unit = if job.job.is_about_bandwidth() {
            "MiB/s"
        } else {
            "kIOPS"
        };
        let mut row = vec![job.job.title(), unit.to_owned()];
        let rate = |target| job.spread(target, |sample| shown_rate(job, sample));
        row.extend((0..results.targets.len()).map(|target| spread(rate(target))));
        row.extend(references.map(|(_, reference)| {
            let ratio = ours.zip(reference).and_then(|(a, b)| job.ratio(a, b));
            ratio.map_or_else(|| MISSING.to_owned(), ratio_text)
        }));
        row
    });
    out.push_str("### Throughput: median (min – max), ratios of the same round\n\n");
    table(out, &header, rows);
}

fn shown_rate(job: &JobResults, sample: &crate::results::Sample) -> f64 {
    if job.job.is_about_bandwidth() {
        sample.mib_s
    } else {
        sample.iops / 1e3
    }
}

fn details(out: &mut String, results: &Results) {
    let header = [
        "Job",
        "Target",
        "p50 µs",
        "p99 µs",
        "p99.9 µs",
        "Server µs of CPU a request",
        "Server load",
        "Client load",
    ];
    let mut rows = Vec::new();
    for job in &results.jobs {
        for (index, target) in results.targets.iter().enumerate() {
            let median = |value: fn(&crate::results::Sample) -> f64| {
                number(job.spread(index, value).map(|spread| spread.median))
            };
            let latency = |value: fn(&Latency) -> f64| number(job.latency(index, value));
            rows.push(vec![
                job.job.title(),
                target.name.clone(),
                latency(|l| l.p50_us),
                latency(|l| l.p99_us),
                latency(|l| l.p999_us),
                median(|s| s.cpu_us),
                percent(job.spread(index, |s| s.server_load)),
                percent(job.spread(index, |s| s.client_load.unwrap_or(f64::NAN))),
            ]);
        }
    }
    out.push_str("### Latency and processor time, medians of the rounds\n\n");
    table(out, &header.map(str::to_owned), rows.into_iter());
}

fn idle(out: &mut String, results: &Results) {
    let mut header = vec!["Attached, no requests".to_owned()];
    let mut row = vec!["CPU, % of a core".to_owned()];
    for (target, load) in results.targets.iter().zip(&results.idle_load) {
        if let Some(load) = load {
            header.push(target.name.clone());
            row.push(format!("{:.3}", load * 100.0));
        }
    }
    if row.len() > 1 {
        out.push_str("### Idle\n\n");
        table(out, &header, std::iter::once(row));
    }
}

pub(crate) fn table(out: &mut String, header: &[String], rows: impl Iterator<Item = Vec<String>>) {
    let line = |out: &mut String, cells: &[String]| {
        let _ = writeln!(out, "| {} |", cells.join(" | "));
    };
    line(out, header);
    let rule: Vec<String> = (0..header.len())
        .map(|n| if n == 0 { "---" } else { "---:" }.to_owned())
        .collect();
    line(out, &rule);
    for row in rows {
        line(out, &row);
    }
    out.push('\n');
}

fn spread(spread: Option<Spread>) -> String {
    let digits = |value| number(Some(value));
    spread.map_or_else(
        || MISSING.to_owned(),
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

fn ratio_text(ratio: Spread) -> String {
    format!(
        "**{:.2}** ({:.2} – {:.2})",
        ratio.median, ratio.min, ratio.max
    )
}

fn percent(spread: Option<Spread>) -> String {
    match spread {
        Some(spread) if spread.median.is_finite() => format!("{:.0} %", spread.median * 100.0),
        _ => MISSING.to_owned(),
    }
}

/// Three digits that matter.
pub(crate) fn number(value: Option<f64>) -> String {
    match value {
        None => MISSING.to_owned(),
        Some(value) if value.abs() >= 100.0 => format!("{value:.0}"),
        Some(value) if value.abs() >= 10.0 => format!("{value:.1}"),
        Some(value) => format!("{value:.2}"),
    }
}

/// Each row of each table in `text` is as wide as its header.
#[cfg(test)]
pub(crate) fn assert_rows_fit(text: &str) {
    let mut width = None;
    for line in text.lines() {
        if !line.starts_with('|') {
            width = None;
            continue;
        }
        let cells = line.matches('|').count();
        assert_eq!(*width.get_or_insert(cells), cells, "{line}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::example;

    #[test]
    fn numbers_keep_three_digits() {
        let texts = [0.1234, 9.876, 45.67, 678.9, 12345.6].map(|n| number(Some(n)));
        assert_eq!(texts, ["0.12", "9.88", "45.7", "679", "12346"]);
        assert_eq!(number(None), MISSING);
    }

    #[test]
    fn a_row_has_median_spread_and_ratios() {
        let rates: [&[f64]; 3] = [
            &[90e3, 80e3, 100e3],
            &[180e3, 160e3, 200e3],
            &[45e3, 40e3, 50e3],
        ];
        let text = markdown(&example(rates));
        let row = text.lines().find(|l| l.starts_with("| 4 KiB random read"));
        assert_eq!(
            row.unwrap(),
            "| 4 KiB random read, QD 32 | kIOPS | 90.0 (80.0 – 100) | 180 (160 – 200) \
             | 45.0 (40.0 – 50.0) | **0.50** (0.50 – 0.50) | **2.00** (2.00 – 2.00) |"
        );
        assert!(text.contains("fio is not on PATH: skipped"));
        assert!(
            text.contains("| CPU, % of a core | 0.040 | 0.200 |"),
            "{text}"
        );
    }

    #[test]
    fn a_peer_without_samples_is_a_dash_and_every_row_is_as_wide_as_its_header() {
        let text = markdown(&example([&[90e3], &[180e3], &[]]));
        assert!(text.contains(MISSING));
        assert_rows_fit(&text);
    }
}
