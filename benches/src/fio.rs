//! The baseline without virtio: `fio` with io_uring and O_DIRECT on the plain file.

use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use serde::Deserialize;
use thiserror::Error;

use crate::job::{Job, Pattern};
use crate::results::{Latency, Sample};

/// What went wrong with `fio`.
#[derive(Debug, Error)]
pub enum FioError {
    /// Does not start.
    #[error("fio does not start")]
    Start(#[source] std::io::Error),
    /// Failed.
    #[error("fio failed: {0}")]
    Failed(String),
    /// Its report is not what it should be.
    #[error("fio's report cannot be read")]
    Report(#[source] serde_json::Error),
    /// Its report has no job.
    #[error("fio's report has no job in it")]
    Empty,
}

#[derive(Debug, Deserialize)]
struct Report {
    jobs: Vec<JobReport>,
}

#[derive(Debug, Deserialize)]
struct JobReport {
    read: Side,
    write: Side,
    usr_cpu: f64,
    sys_cpu: f64,
}

#[derive(Debug, Deserialize)]
struct Side {
    total_ios: u64,
    /// Milliseconds.
    runtime: f64,
    lat_ns: Mean,
    clat_ns: Completion,
}

#[derive(Debug, Deserialize)]
struct Mean {
    mean: f64,
}

#[derive(Debug, Deserialize)]
struct Completion {
    #[serde(default)]
    percentile: std::collections::BTreeMap<String, f64>,
}

/// Runs a job on the first `len` bytes of a file, in each of `threads` threads.
///
/// # Errors
/// `fio` is missing, fails or says something else than it used to.
pub fn run(
    file: &Path,
    len: u64,
    threads: u16,
    job: &Job,
    time: Duration,
) -> Result<Sample, FioError> {
    let output = command(file, len, threads, job, time)
        .output()
        .map_err(FioError::Start)?;
    read(job, threads, &output)
}

fn command(file: &Path, len: u64, threads: u16, job: &Job, time: Duration) -> Command {
    let rw = match job.pattern {
        Pattern::RandRead => "randread",
        Pattern::RandWrite | Pattern::WriteFlush => "randwrite",
        Pattern::SeqRead | Pattern::ScatteredRead => "read",
        Pattern::SeqWrite => "write",
    };
    let mut command = Command::new("fio");
    // A process of its own group: an interrupt from the terminal reaches the benchmark first.
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    command
        .args(["--name=bench", "--ioengine=io_uring", "--direct=1"])
        .args(["--thread", "--time_based", "--output-format=json"])
        .args(["--randrepeat=0", "--norandommap", "--refill_buffers=0"])
        .arg(format!("--filename={}", file.display()))
        .arg(format!("--size={len}"))
        .arg(format!("--rw={rw}"))
        .args([
            "--group_reporting".to_owned(),
            format!("--numjobs={threads}"),
        ])
        .arg(format!("--bs={}", job.block))
        .arg(format!("--iodepth={}", job.depth))
        .arg(format!("--runtime={}ms", time.as_millis()));
    if job.pattern == Pattern::WriteFlush {
        command.arg("--fdatasync=1");
    }
    command
}

fn read(job: &Job, threads: u16, output: &Output) -> Result<Sample, FioError> {
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(FioError::Failed(text));
    }
    let report: Report = serde_json::from_slice(&output.stdout).map_err(FioError::Report)?;
    let report = report.jobs.into_iter().next().ok_or(FioError::Empty)?;
    let side = if job.pattern.is_read() {
        &report.read
    } else {
        &report.write
    };
    let seconds = side.runtime / 1e3;
    // In percent of the time of all threads together.
    let cpu = (report.usr_cpu + report.sys_cpu) / 100.0 * seconds * f64::from(threads);
    // What it calls latency of a write leaves out the flush, so there it says nothing.
    let latency = (job.pattern != Pattern::WriteFlush).then(|| {
        let at = |key: &str| side.clat_ns.percentile.get(key).map_or(0.0, |ns| ns / 1e3);
        Latency {
            mean_us: side.lat_ns.mean / 1e3,
            p50_us: at("50.000000"),
            p99_us: at("99.000000"),
            p999_us: at("99.900000"),
        }
    });
    #[allow(clippy::cast_precision_loss)]
    let requests = side.total_ios as f64;
    Ok(Sample::new(job, requests, seconds, cpu, None, latency))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;
    use std::process::ExitStatus;

    fn output(code: i32, stdout: &str, stderr: &str) -> Output {
        Output {
            status: ExitStatus::from_raw(code << 8),
            stdout: stdout.into(),
            stderr: stderr.into(),
        }
    }

    const REPORT: &str = r#"{"jobs": [{"usr_cpu": 10.0, "sys_cpu": 30.0,
        "read": {"total_ios": 40000, "runtime": 2000, "lat_ns": {"mean": 50000.0},
            "clat_ns": {"percentile": {"50.000000": 40000, "99.000000": 90000, "99.900000": 99000}}},
        "write": {"total_ios": 0, "runtime": 0, "lat_ns": {"mean": 0.0}, "clat_ns": {}}}]}"#;

    #[test]
    fn its_report_becomes_a_sample() {
        let job: Job = "randread-4k-qd32".parse().unwrap();
        let sample = read(&job, 1, &output(0, REPORT, "")).unwrap();
        assert_eq!(sample.iops, 20_000.0);
        assert_eq!(sample.cpu_us, 20.0);
        assert_eq!(sample.latency.unwrap().p99_us, 90.0);
    }

    #[test]
    fn its_complaint_is_repeated() {
        let job: Job = "randread-4k-qd32".parse().unwrap();
        let error = read(&job, 1, &output(1, "", "no io_uring here")).unwrap_err();
        assert!(error.to_string().contains("no io_uring here"));
        let error = read(&job, 1, &output(0, "{}", "")).unwrap_err();
        assert!(matches!(error, FioError::Report(_)));
    }
}
