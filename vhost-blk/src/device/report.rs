//! What the engine reports, as log lines: at a rate that neither a guest nor a broken disk
//! chooses.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use offload::telemetry::{RateLimited, shown};

use crate::volume::engine::Reporter;
use crate::volume::geometry::BLOCK_LEN;

/// Lines at once, and how often after that.
const BURST: u32 = 10;
const INTERVAL: Duration = Duration::from_secs(5);

/// Writes reports of one volume to the log.
#[derive(Debug)]
pub struct LogReporter {
    volume: String,
    damage: Mutex<RateLimited>,
    failures: Mutex<RateLimited>,
}

impl LogReporter {
    /// For the volume that people know as `volume`.
    pub fn new(volume: String) -> Self {
        let limit = || Mutex::new(RateLimited::new(BURST, INTERVAL));
        Self {
            volume,
            damage: limit(),
            failures: limit(),
        }
    }
}

fn allow(limit: &Mutex<RateLimited>) -> Option<u64> {
    let mut limit = limit.lock().unwrap_or_else(PoisonError::into_inner);
    limit.allow(Instant::now())
}

impl Reporter for LogReporter {
    fn not_authentic(&self, block: u64) {
        if let Some(suppressed) = allow(&self.damage) {
            tracing::error!(
                suppressed = shown(suppressed),
                "block {block} (byte offset {}) of volume {} does not authenticate: the backing \
                 was changed; the guest gets an I/O error",
                block.saturating_mul(BLOCK_LEN as u64),
                self.volume,
            );
        }
    }

    fn backing_failed(&self, what: &'static str, errno: i32) {
        if let Some(suppressed) = allow(&self.failures) {
            let error = std::io::Error::from_raw_os_error(errno);
            tracing::error!(
                suppressed = shown(suppressed),
                "the backing of volume {} failed while {what}: {error}",
                self.volume,
            );
        }
    }

    fn poisoned(&self, what: &'static str) {
        tracing::error!(
            "volume {} takes no more writes: {what} failed, so what is durable is unknown. Look \
             after the backing, then restart the card",
            self.volume,
        );
    }
}
