//! `--iops`, `--bps` and what belongs to them.

use clap::Args;
use offload::cli::parse_size;
use offload::limit::{Burst, Rates};

/// Provisioned performance: what the volume may use, reads and writes together, over all of its
/// queues and sockets.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Limits")]
pub struct LimitArgs {
    /// Operations a second, reads and writes together; no limit if left out
    #[arg(long, value_name = "N")]
    pub iops: Option<u64>,
    /// More operations a second for a while, like 10000:60. From full credit the higher rate lasts
    /// for SECONDS (60 if left out); credit is earned by using less than --iops
    #[arg(long, value_name = "N[:SECONDS]", requires = "iops", value_parser = iops_burst)]
    pub iops_burst: Option<Burst>,
    /// Bytes a second, like 100M (powers of 1024), reads and writes together; no limit if left out
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub bps: Option<u64>,
    /// More bytes a second for a while, as with --iops-burst
    #[arg(long, value_name = "SIZE[:SECONDS]", requires = "bps", value_parser = bps_burst)]
    pub bps_burst: Option<Burst>,
    /// What counts as one operation, like 16K: a longer request counts as several. A request is
    /// one operation if left out
    #[arg(long, value_name = "SIZE", requires = "iops", value_parser = io_size)]
    pub io_size: Option<u32>,
}

impl LimitArgs {
    /// The limits, unchecked.
    pub fn rates(&self) -> Rates {
        Rates {
            ops: self.iops,
            ops_burst: self.iops_burst,
            bytes: self.bps,
            bytes_burst: self.bps_burst,
            op_len: self.io_size,
        }
    }
}

fn size(text: &str) -> Result<u64, String> {
    parse_size(text).map_err(|error| error.to_string())
}

fn io_size(text: &str) -> Result<u32, String> {
    u32::try_from(size(text)?).map_err(|_| format!("{text} is too large for one operation"))
}

fn bps_burst(text: &str) -> Result<Burst, String> {
    Burst::parse(text, size)
}

fn iops_burst(text: &str) -> Result<Burst, String> {
    Burst::parse(text, |number| {
        let wrong = |_| format!("{number:?} is not a number of operations; write N or N:SECONDS");
        number.parse().map_err(wrong)
    })
}
