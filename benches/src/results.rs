//! What came out: samples, and the comparison that is told.

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::job::Job;
use crate::stats::Spread;

/// Latencies of a run, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Latency {
    /// Mean.
    pub mean_us: f64,
    /// Median.
    pub p50_us: f64,
    /// 99th percentile.
    pub p99_us: f64,
    /// 99.9th percentile.
    pub p999_us: f64,
}

impl Latency {
    /// Of a histogram of nanoseconds.
    #[must_use]
    pub fn of(histogram: &Histogram<u64>) -> Self {
        #[allow(clippy::cast_precision_loss)]
        let at = |quantile| histogram.value_at_quantile(quantile) as f64 / 1e3;
        Self {
            mean_us: histogram.mean() / 1e3,
            p50_us: at(0.5),
            p99_us: at(0.99),
            p999_us: at(0.999),
        }
    }
}

/// One run of one job on one target.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Sample {
    /// Requests a second.
    pub iops: f64,
    /// MiB a second.
    pub mib_s: f64,
    /// Processor time of the server for a request, in microseconds.
    pub cpu_us: f64,
    /// Part of a core that the server used.
    pub server_load: f64,
    /// Part of a core that the client used: near 1, the client is what is measured.
    pub client_load: Option<f64>,
    /// Latencies, where they can be compared.
    pub latency: Option<Latency>,
}

impl Sample {
    /// From totals: `cpu` and `client_cpu` are processor seconds.
    #[must_use]
    pub fn new(
        job: &Job,
        requests: f64,
        seconds: f64,
        cpu: f64,
        client_cpu: Option<f64>,
        latency: Option<Latency>,
    ) -> Self {
        let iops = requests / seconds;
        Self {
            iops,
            mib_s: iops * f64::from(job.block) / f64::from(1 << 20),
            cpu_us: cpu / requests.max(1.0) * 1e6,
            server_load: cpu / seconds,
            client_load: client_cpu.map(|cpu| cpu / seconds),
            latency,
        }
    }
}

/// A server, or the baseline.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TargetInfo {
    /// Short name, for columns.
    pub name: String,
    /// What it is.
    pub about: String,
}

/// All runs of one job.
#[derive(Clone, Debug, Serialize)]
pub struct JobResults {
    /// Job.
    pub job: Job,
    /// For each target, its sample of each round.
    pub samples: Vec<Vec<Sample>>,
}

/// Names of targets that others are compared with, and how their columns are headed.
pub const REFERENCES: [&str; 2] = ["qsd raw", "qsd LUKS"];
/// Name of the target that is compared.
pub const OURS: &str = "offload";

/// Everything measured on one file system.
#[derive(Clone, Debug, Serialize)]
pub struct Results {
    /// Directory.
    pub directory: String,
    /// Bytes of the disk.
    pub disk_len: u64,
    /// Rounds.
    pub rounds: u32,
    /// Seconds of a run.
    pub seconds: f64,
    /// Targets, in the order of the samples.
    pub targets: Vec<TargetInfo>,
    /// Jobs.
    pub jobs: Vec<JobResults>,
    /// For each target, part of a core that it uses attached and idle, if it has a process.
    pub idle_load: Vec<Option<f64>>,
    /// What a reader has to know: peers left out, a busy machine.
    pub notes: Vec<String>,
}

impl Results {
    /// Where the target of this name is.
    #[must_use]
    pub fn target(&self, name: &str) -> Option<usize> {
        self.targets.iter().position(|target| target.name == name)
    }
}

impl JobResults {
    /// Spread of a value over the rounds.
    #[must_use]
    pub fn spread(&self, target: usize, value: impl Fn(&Sample) -> f64) -> Option<Spread> {
        Spread::of(self.samples.get(target)?.iter().map(value))
    }

    /// Throughput of a target as a multiple of another's, round by round.
    #[must_use]
    pub fn ratio(&self, target: usize, reference: usize) -> Option<Spread> {
        let rates = |target: usize| -> Option<Vec<f64>> {
            Some(self.samples.get(target)?.iter().map(|s| s.iops).collect())
        };
        Spread::of_ratios(&rates(target)?, &rates(reference)?)
    }

    /// Median of a latency over the rounds.
    #[must_use]
    pub fn latency(&self, target: usize, value: impl Fn(&Latency) -> f64) -> Option<f64> {
        let samples = self.samples.get(target)?;
        let values = samples.iter().filter_map(|s| s.latency.as_ref());
        Some(Spread::of(values.map(value))?.median)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Results with these rates of offload, qsd raw and qsd LUKS.
    pub(crate) fn example(rates: [&[f64]; 3]) -> Results {
        let job: Job = "randread-4k-qd32".parse().unwrap();
        let latency = Latency {
            mean_us: 12.0,
            p50_us: 10.0,
            p99_us: 250.0,
            p999_us: 1500.0,
        };
        let sample = |rate: &f64| Sample::new(&job, rate * 2.0, 2.0, 0.5, Some(1.0), Some(latency));
        let names = ["offload", "qsd raw", "qsd LUKS"];
        Results {
            directory: "/var/tmp".into(),
            disk_len: 2 << 30,
            rounds: 3,
            seconds: 2.0,
            targets: names
                .map(|name| TargetInfo {
                    name: name.into(),
                    about: format!("the {name} server"),
                })
                .into(),
            jobs: vec![JobResults {
                job,
                samples: rates.map(|r| r.iter().map(sample).collect()).into(),
            }],
            idle_load: vec![Some(0.0004), Some(0.002), None],
            notes: vec!["fio is not on PATH: skipped".into()],
        }
    }

    #[test]
    fn a_sample_divides_totals() {
        let job: Job = "seqread-128k-qd16".parse().unwrap();
        let sample = Sample::new(&job, 8000.0, 2.0, 1.0, Some(0.5), None);
        assert_eq!((sample.iops, sample.mib_s), (4000.0, 500.0));
        assert_eq!((sample.cpu_us, sample.server_load), (125.0, 0.5));
        assert_eq!(sample.client_load, Some(0.25));
    }

    #[test]
    fn latencies_are_told_in_microseconds() {
        let mut histogram = crate::client::histogram();
        for us in 1..=1000_u64 {
            histogram.record(us * 1000).unwrap();
        }
        let latency = Latency::of(&histogram);
        assert!((latency.p50_us - 500.0).abs() < 2.0, "{latency:?}");
        assert!((latency.p99_us - 990.0).abs() < 2.0, "{latency:?}");
        assert!((latency.p999_us - 999.0).abs() < 2.0, "{latency:?}");
    }

    #[test]
    fn a_peer_that_was_left_out_has_no_ratio() {
        let results = example([&[100.0, 110.0], &[200.0, 220.0], &[]]);
        let job = &results.jobs[0];
        assert_eq!(job.ratio(0, 1).unwrap().median, 0.5);
        assert_eq!(job.ratio(0, 2), None);
        assert_eq!(results.target("fio"), None);
    }
}
