//! What people see: a spinner for the step under way, lines from the guest, a table in the end.

use std::io::Write as _;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

struct Row {
    name: &'static str,
    took: Duration,
    /// What was shown, or what went wrong.
    result: Result<String, String>,
}

/// The demonstration's output.
pub(super) struct Show {
    bar: ProgressBar,
    rows: Vec<Row>,
    start: Instant,
    pub(super) is_verbose: bool,
}

impl Show {
    pub(super) fn new(is_verbose: bool) -> Self {
        let bar = ProgressBar::new_spinner();
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed}") {
            bar.set_style(style);
        }
        Self {
            bar,
            rows: Vec::new(),
            start: Instant::now(),
            is_verbose,
        }
    }

    /// Runs a step and remembers how it went.
    pub(super) fn step(
        &mut self,
        name: &'static str,
        body: impl FnOnce(&Self) -> anyhow::Result<String>,
    ) -> anyhow::Result<()> {
        self.say(&format!("== {name}"));
        self.bar.set_message(name);
        self.bar.enable_steady_tick(Duration::from_millis(100));
        let start = Instant::now();
        let result = body(self);
        let shown = match &result {
            Ok(text) => Ok(text.clone()),
            Err(error) => Err(format!("{error:#}")),
        };
        if let Ok(text) = &shown {
            self.line(text);
        }
        self.rows.push(Row {
            name,
            took: start.elapsed(),
            result: shown,
        });
        result.map(drop)
    }

    /// A line below the step under way.
    pub(super) fn line(&self, text: &str) {
        self.say(&format!("   {text}"));
    }

    fn say(&self, text: &str) {
        self.bar.suspend(|| {
            // A demonstration nobody looks at goes on to its exit status.
            let _ = writeln!(std::io::stdout(), "{text}");
        });
    }

    /// A function that shows lines from other threads.
    pub(super) fn line_sink(&self) -> impl Fn(&str) + Send + Sync + use<> {
        let bar = self.bar.clone();
        move |text| {
            bar.suspend(|| {
                // As above.
                let _ = writeln!(std::io::stdout(), "   {text}");
            });
        }
    }

    /// The table.
    pub(super) fn summary(&self, result: &anyhow::Result<()>) {
        self.bar.finish_and_clear();
        let mut text = String::from("\n");
        for row in &self.rows {
            let (mark, what) = match &row.result {
                Ok(what) => ("ok    ", what),
                Err(what) => ("FAILED", what),
            };
            let took = row.took.as_secs_f64();
            text.push_str(&format!(
                "  {mark}  {:<12} {took:>6.1} s   {what}\n",
                row.name
            ));
        }
        let end = if result.is_ok() {
            "all claims hold"
        } else {
            "NOT all claims hold"
        };
        text.push_str(&format!(
            "\n  {end}, {:.1} s\n",
            self.start.elapsed().as_secs_f64()
        ));
        // As above.
        let _ = write!(std::io::stdout(), "{text}");
    }
}
