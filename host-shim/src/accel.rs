//! Does /dev/kvm really run a guest?
//!
//! That it opens proves nothing. There are hosts, themselves guests without hardware nesting, whose
//! KVM emulates every privileged-mode instruction in software: the ioctls answer, a stock kernel
//! crawls a hundred to a thousand times too slowly and looks like a hang. So the probe runs a guest
//! of a few bytes, a counting loop, once in real mode and once in long mode at privilege level 0
//! with paging on (what firmware and kernel spend their lives in), and measures instructions per
//! second.
//!
//! Measured: hardware, nested or not, runs the loop at a thousand million instructions per second
//! or more; a KVM that emulates needs about 400 ns for each, 2.5 million per second. The threshold
//! of [`THRESHOLD_PER_S`] lies a factor of ten and more from both. Exits (`cpuid`, port I/O) are not
//! measured: they tell nesting from no nesting, not running from crawling.
//!
//! The loop starts short and grows only while it stays fast, so a slow host is known in
//! milliseconds. A hang inside the kernel is still thinkable, so [`probe`] lets a child process do
//! it and kills that at a deadline.

use std::fmt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

mod tiny_vm;

pub use tiny_vm::{MeasureError, Mode};

/// Instructions per second below which KVM counts as unusable.
pub const THRESHOLD_PER_S: f64 = 50.0e6;
/// How long the child process may take.
pub const DEADLINE: Duration = Duration::from_millis(1500);

/// What was found out about /dev/kvm.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "verdict")]
pub enum KvmVerdict {
    /// A guest was run; this is how fast its slower mode was.
    Measured {
        /// Instructions per second in real mode.
        real_mode_per_s: f64,
        /// Instructions per second in long mode.
        long_mode_per_s: f64,
    },
    /// It did not answer in time.
    Hung {
        /// The deadline in milliseconds.
        after_ms: u64,
    },
    /// It cannot be used at all.
    Unavailable {
        /// Why.
        reason: String,
    },
}

impl Eq for KvmVerdict {}

impl KvmVerdict {
    /// Whether guests run at a speed that deserves the name.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        match self {
            Self::Measured {
                real_mode_per_s,
                long_mode_per_s,
            } => real_mode_per_s.min(*long_mode_per_s) >= THRESHOLD_PER_S,
            Self::Hung { .. } | Self::Unavailable { .. } => false,
        }
    }

    #[cfg(test)]
    pub(crate) fn fast(per_s: f64) -> Self {
        Self::Measured {
            real_mode_per_s: per_s,
            long_mode_per_s: per_s,
        }
    }

    #[cfg(test)]
    pub(crate) fn slow(long_mode_per_s: f64) -> Self {
        Self::Measured {
            real_mode_per_s: 1.0e9,
            long_mode_per_s,
        }
    }
}

impl fmt::Display for KvmVerdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Measured {
                real_mode_per_s,
                long_mode_per_s,
            } => {
                let judgement = if self.is_usable() {
                    "it runs guests at native speed"
                } else {
                    "it emulates instead of running them"
                };
                write!(
                    f,
                    "/dev/kvm ran {:.1} million instructions/s in real mode and {:.1} in long mode: \
                     {judgement}",
                    real_mode_per_s / 1e6,
                    long_mode_per_s / 1e6
                )
            }
            Self::Hung { after_ms } => {
                write!(
                    f,
                    "/dev/kvm did not finish a loop of a few instructions in {after_ms} ms"
                )
            }
            Self::Unavailable { reason } => write!(f, "/dev/kvm cannot be used: {reason}"),
        }
    }
}

/// Measures in this process. May hang where KVM does: see [`probe`].
#[must_use]
pub fn measure() -> KvmVerdict {
    let rates = tiny_vm::rate(Mode::Real).and_then(|real| Ok((real, tiny_vm::rate(Mode::Long)?)));
    match rates {
        Ok((real_mode_per_s, long_mode_per_s)) => KvmVerdict::Measured {
            real_mode_per_s,
            long_mode_per_s,
        },
        Err(e) => KvmVerdict::Unavailable {
            reason: e.to_string(),
        },
    }
}

/// Lets a child process (`shim` with the argument `probe-kvm --json`) measure, with a deadline.
#[must_use]
pub fn probe(shim: &Path, deadline: Duration) -> KvmVerdict {
    let unavailable = |what: String| KvmVerdict::Unavailable { reason: what };
    let child = Command::new(shim)
        .args(["probe-kvm", "--json"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let mut child = match child {
        Ok(child) => child,
        Err(e) => return unavailable(format!("cannot start {}: {e}", shim.display())),
    };
    let end = Instant::now() + deadline;
    loop {
        match child.try_wait() {
            Ok(Some(_)) => break,
            Ok(None) if Instant::now() >= end => {
                // The verdict stands whether or not the kill succeeds.
                let _ = child.kill();
                let _ = child.wait();
                return KvmVerdict::Hung {
                    after_ms: u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX),
                };
            }
            Ok(None) => std::thread::sleep(Duration::from_millis(2)),
            Err(e) => return unavailable(format!("the probe cannot be waited for: {e}")),
        }
    }
    let mut text = String::new();
    if let Some(mut out) = child.stdout.take() {
        use std::io::Read as _;
        if let Err(e) = out.read_to_string(&mut text) {
            return unavailable(format!("the probe's answer cannot be read: {e}"));
        }
    }
    serde_json::from_str(&text)
        .unwrap_or_else(|_| unavailable("the probe died without an answer".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_slow_mode_is_enough_to_refuse() {
        assert!(KvmVerdict::fast(2.0e9).is_usable());
        assert!(!KvmVerdict::slow(2.5e6).is_usable());
        let real_slow = KvmVerdict::Measured {
            real_mode_per_s: 3.0e6,
            long_mode_per_s: 2.0e9,
        };
        assert!(!real_slow.is_usable());
    }

    #[test]
    fn a_probe_that_hangs_is_killed_at_its_deadline() {
        let dir = tempfile::tempdir().unwrap();
        let script = dir.path().join("hang");
        std::fs::write(&script, "#!/bin/sh\nexec sleep 60\n").unwrap();
        make_executable(&script);
        let start = Instant::now();
        let verdict = probe(&script, Duration::from_millis(50));
        assert_eq!(verdict, KvmVerdict::Hung { after_ms: 50 });
        assert!(start.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn a_probe_that_dies_or_is_missing_means_no_kvm() {
        for shim in ["/bin/false", "/nonexistent"] {
            let verdict = probe(Path::new(shim), Duration::from_secs(5));
            assert!(
                matches!(verdict, KvmVerdict::Unavailable { .. }),
                "{verdict}"
            );
        }
    }

    #[test]
    fn measuring_ends_quickly_whatever_this_host_has() {
        let start = Instant::now();
        let verdict = measure();
        assert!(start.elapsed() < Duration::from_secs(5), "{verdict}");
        if let KvmVerdict::Measured {
            real_mode_per_s,
            long_mode_per_s,
        } = verdict
        {
            assert!(real_mode_per_s > 0.0 && long_mode_per_s > 0.0);
        }
    }

    fn make_executable(path: &Path) {
        use std::os::unix::fs::PermissionsExt as _;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
}
