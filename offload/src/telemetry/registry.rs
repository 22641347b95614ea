//! Names and labels for counters, and the two forms in which they are shown.
//!
//! JSON for our own tools: `{"<name>": [{"labels": {..}, "value": n}, ..]}`, histograms with
//! their quantiles in nanoseconds in place of `value`. Prometheus text (version 0.0.4) for
//! everyone else: counters as `<prefix>_<name>_total`, gauges as `<prefix>_<name>`, histograms as
//! summaries `<prefix>_<name>_seconds`, since that is the base unit there.
//!
//! Not the `metrics` crate: its recorder is global to the process, and tests run many cards in one.

use std::fmt::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Map, Value, json};

use super::histogram::Histogram;
use super::stats::{Counter, ErrorKind, QueueStats};

/// Label names and values, e.g. `[("queue", "0".into())]`.
pub type Labels = Vec<(&'static str, String)>;

/// All that a process shows of itself. Clones show the same.
#[derive(Clone, Debug)]
pub struct Registry {
    prefix: &'static str,
    metrics: Arc<Mutex<Vec<Metric>>>,
}

#[derive(Clone, Debug)]
struct Metric {
    name: &'static str,
    help: &'static str,
    labels: Labels,
    source: Source,
}

#[derive(Clone)]
enum Source {
    Counter(Arc<dyn Fn() -> u64 + Send + Sync>),
    Gauge(Arc<dyn Fn() -> u64 + Send + Sync>),
    Histogram(Arc<Histogram>),
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Counter(_) => "Counter",
            Self::Gauge(_) => "Gauge",
            Self::Histogram(_) => "Histogram",
        })
    }
}

impl Registry {
    /// An empty registry. `prefix` is the namespace in Prometheus names, e.g. `vhost_blk`.
    #[must_use]
    pub fn new(prefix: &'static str) -> Self {
        debug_assert!(is_name(prefix));
        Self {
            prefix,
            metrics: Arc::default(),
        }
    }

    /// Shows a counter.
    pub fn counter(
        &self,
        name: &'static str,
        help: &'static str,
        labels: Labels,
        counter: Arc<Counter>,
    ) {
        self.add(
            name,
            help,
            labels,
            Source::Counter(Arc::new(move || counter.get())),
        );
    }

    /// Shows a number that goes up and down, computed when asked for.
    pub fn gauge(
        &self,
        name: &'static str,
        help: &'static str,
        labels: Labels,
        read: impl Fn() -> u64 + Send + Sync + 'static,
    ) {
        self.add(name, help, labels, Source::Gauge(Arc::new(read)));
    }

    /// Shows a latency histogram.
    pub fn histogram(
        &self,
        name: &'static str,
        help: &'static str,
        labels: Labels,
        histogram: Arc<Histogram>,
    ) {
        self.add(name, help, labels, Source::Histogram(histogram));
    }

    /// Shows all counters of virtqueue `index`, labelled `queue="index"`.
    pub fn queue(&self, index: u16, stats: &Arc<QueueStats>) {
        self.labelled_queue(&vec![("queue", index.to_string())], stats);
    }

    /// Shows all counters of a virtqueue under labels that tell it from all others.
    pub fn labelled_queue(&self, labels: &Labels, stats: &Arc<QueueStats>) {
        for (slot, name, help) in QUEUE_COUNTERS {
            let stats = Arc::clone(stats);
            let source = Source::Counter(Arc::new(move || slot(&stats).get()));
            self.add(name, help, labels.clone(), source);
        }
        for kind in ErrorKind::ALL {
            let mut labels = labels.clone();
            labels.push(("kind", kind.name().to_owned()));
            let stats = Arc::clone(stats);
            let source = Source::Counter(Arc::new(move || stats.errors(kind)));
            self.add("errors", "Requests answered with an error", labels, source);
        }
        let stats = Arc::clone(stats);
        self.gauge(
            "in_flight",
            "Chains popped and not yet returned",
            labels.clone(),
            move || stats.in_flight(),
        );
    }

    /// The same name with the same labels replaces what was there: a queue that was made again.
    fn add(&self, name: &'static str, help: &'static str, labels: Labels, source: Source) {
        debug_assert!(is_name(name) && labels.iter().all(|(label, _)| is_name(label)));
        let metric = Metric {
            name,
            help,
            labels,
            source,
        };
        let mut metrics = self.lock();
        debug_assert!(
            metrics.iter().filter(|old| old.name == name).all(|old| {
                std::mem::discriminant(&old.source) == std::mem::discriminant(&metric.source)
            }),
            "{name} is of two kinds",
        );
        match metrics
            .iter_mut()
            .find(|old| old.name == name && old.labels == metric.labels)
        {
            Some(old) => *old = metric,
            None => metrics.push(metric),
        }
    }

    /// All metrics as `{"<name>": [{"labels": {..}, "value": n}, ..]}`.
    #[must_use]
    pub fn snapshot(&self) -> Value {
        let mut families = Map::new();
        for metric in self.metrics() {
            let labels: Map<String, Value> = metric
                .labels
                .into_iter()
                .map(|(label, value)| (label.to_owned(), Value::String(value)))
                .collect();
            let mut entry = match &metric.source {
                Source::Counter(read) | Source::Gauge(read) => json!({ "value": read() }),
                Source::Histogram(histogram) => histogram.snapshot().to_json(),
            };
            if let Value::Object(entry) = &mut entry {
                entry.insert("labels".to_owned(), Value::Object(labels));
            }
            let family = families.entry(metric.name).or_insert_with(|| json!([]));
            if let Value::Array(family) = family {
                family.push(entry);
            }
        }
        Value::Object(families)
    }

    /// All metrics in Prometheus' text format.
    #[must_use]
    pub fn prometheus(&self) -> String {
        let mut metrics = self.metrics();
        // A family must be in one piece. The sort is stable, so labels keep their order.
        metrics.sort_by_key(|metric| metric.name);
        let mut text = String::new();
        for family in metrics.chunk_by(|a, b| a.name == b.name) {
            self.family(&mut text, family);
        }
        text
    }

    fn family(&self, text: &mut String, family: &[Metric]) {
        let Some(first) = family.first() else { return };
        let (name, kind) = match first.source {
            Source::Counter(_) => (format!("{}_{}_total", self.prefix, first.name), "counter"),
            Source::Gauge(_) => (format!("{}_{}", self.prefix, first.name), "gauge"),
            Source::Histogram(_) => (format!("{}_{}_seconds", self.prefix, first.name), "summary"),
        };
        let help = first.help.replace('\\', "\\\\").replace('\n', "\\n");
        // Writing to a String cannot fail.
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for Metric { labels, source, .. } in family {
            match source {
                Source::Counter(read) | Source::Gauge(read) => {
                    let _ = writeln!(text, "{name}{} {}", label_set(labels, None), read());
                }
                Source::Histogram(histogram) => {
                    let snapshot = histogram.snapshot();
                    for (label, quantile) in [
                        ("0.5", 0.5),
                        ("0.9", 0.9),
                        ("0.99", 0.99),
                        ("0.999", 0.999),
                        ("1", 1.0),
                    ] {
                        let value = seconds(snapshot.quantile_ns(quantile));
                        let set = label_set(labels, Some(("quantile", label)));
                        let _ = writeln!(text, "{name}{set} {value}");
                    }
                    let set = label_set(labels, None);
                    let _ = writeln!(text, "{name}_sum{set} {}", seconds(snapshot.sum_ns()));
                    let _ = writeln!(text, "{name}_count{set} {}", snapshot.count());
                }
            }
        }
    }

    /// A copy, so that no reader callback runs under the lock.
    fn metrics(&self) -> Vec<Metric> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Metric>> {
        // Nothing panics between a change and its end, so a poisoned list is still whole.
        self.metrics.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type Slot = fn(&QueueStats) -> &Counter;

/// Field, name and help of each plain counter of a queue.
const QUEUE_COUNTERS: [(Slot, &str, &str); 8] = [
    (|s| &s.requests, "requests", "Descriptor chains popped"),
    (
        |s| &s.completions,
        "completions",
        "Chains put on the used ring",
    ),
    (|s| &s.kicks, "kicks", "Kicks taken from the guest"),
    (
        |s| &s.notifications,
        "notifications",
        "Interrupts sent to the guest",
    ),
    (
        |s| &s.malformed_chains,
        "malformed_chains",
        "Descriptor chains that could not be walked",
    ),
    (
        |s| &s.broken,
        "broken",
        "Times that the guest broke the ring",
    ),
    (
        |s| &s.bytes_read,
        "bytes_read",
        "Payload bytes handed to the guest",
    ),
    (
        |s| &s.bytes_written,
        "bytes_written",
        "Payload bytes taken from the guest",
    ),
];

/// Nanoseconds as decimal seconds, exactly.
fn seconds(ns: u64) -> String {
    format!("{}.{:09}", ns / 1_000_000_000, ns % 1_000_000_000)
}

fn label_set(labels: &Labels, extra: Option<(&str, &str)>) -> String {
    let pairs: Vec<String> = labels
        .iter()
        .map(|(label, value)| (*label, value.as_str()))
        .chain(extra)
        .map(|(label, value)| {
            let value = value
                .replace('\\', "\\\\")
                .replace('"', "\\\"")
                .replace('\n', "\\n");
            format!("{label}=\"{value}\"")
        })
        .collect();
    if pairs.is_empty() {
        String::new()
    } else {
        format!("{{{}}}", pairs.join(","))
    }
}

fn is_name(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with(|c: char| c.is_ascii_digit())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_shows_every_counter_under_its_own_name() {
        let stats = Arc::new(QueueStats::new());
        let registry = Registry::new("card");
        registry.queue(3, &stats);
        let slots: [(&Counter, &str); 8] = [
            (&stats.requests, "requests"),
            (&stats.completions, "completions"),
            (&stats.kicks, "kicks"),
            (&stats.notifications, "notifications"),
            (&stats.malformed_chains, "malformed_chains"),
            (&stats.broken, "broken"),
            (&stats.bytes_read, "bytes_read"),
            (&stats.bytes_written, "bytes_written"),
        ];
        for (n, (counter, _)) in slots.iter().enumerate() {
            counter.add(100 - n as u64);
        }
        stats.error(ErrorKind::Integrity);
        let snapshot = registry.snapshot();
        for (n, (_, name)) in slots.iter().enumerate() {
            assert_eq!(snapshot[name][0]["value"], 100 - n, "{name}");
            assert_eq!(snapshot[name][0]["labels"]["queue"], "3");
        }
        assert_eq!(snapshot["in_flight"][0]["value"], 1);
        let errors = snapshot["errors"].as_array().unwrap();
        assert_eq!(errors.len(), ErrorKind::ALL.len());
        for error in errors {
            let expected = u64::from(error["labels"]["kind"] == "integrity");
            assert_eq!(error["value"], expected, "{error}");
        }
    }

    #[test]
    fn prometheus_families_are_in_one_piece_with_escaped_labels() {
        let registry = Registry::new("card");
        let counter = Arc::new(Counter::new());
        counter.add(7);
        registry.counter(
            "hits",
            "Hits\nof all",
            vec![("who", "a\"b\\\n".into())],
            counter,
        );
        registry.gauge("free_bytes", "Free", vec![], || 12);
        registry.counter("hits", "Hits", vec![("who", "c".into())], Arc::default());
        assert_eq!(
            registry.prometheus(),
            "# HELP card_free_bytes Free\n\
             # TYPE card_free_bytes gauge\n\
             card_free_bytes 12\n\
             # HELP card_hits_total Hits\\nof all\n\
             # TYPE card_hits_total counter\n\
             card_hits_total{who=\"a\\\"b\\\\\\n\"} 7\n\
             card_hits_total{who=\"c\"} 0\n"
        );
    }

    #[test]
    fn a_histogram_is_a_summary_in_seconds() {
        let registry = Registry::new("card");
        let histogram = Arc::new(Histogram::new());
        histogram.record_ns(1_500_000_000);
        registry.histogram("read", "Reads", vec![("queue", "0".into())], histogram);
        let text = registry.prometheus();
        assert!(
            text.contains("# TYPE card_read_seconds summary\n"),
            "{text}"
        );
        assert!(
            text.contains("card_read_seconds{queue=\"0\",quantile=\"1\"} 1.500000000\n"),
            "{text}"
        );
        assert!(
            text.contains("card_read_seconds_sum{queue=\"0\"} 1.500000000\n"),
            "{text}"
        );
        assert!(
            text.contains("card_read_seconds_count{queue=\"0\"} 1\n"),
            "{text}"
        );
        assert_eq!(registry.snapshot()["read"][0]["max_ns"], 1_500_000_000_u64);
    }

    #[test]
    fn registering_again_replaces_and_clones_share() {
        let registry = Registry::new("card");
        let clone = registry.clone();
        registry.gauge("size", "Size", vec![], || 1);
        clone.gauge("size", "Size", vec![], || 2);
        assert_eq!(
            registry.snapshot(),
            json!({"size": [{"labels": {}, "value": 2}]})
        );
    }
}
