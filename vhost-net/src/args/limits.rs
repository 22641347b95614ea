//! `--rx-bps`, `--tx-pps` and what belongs to them.

use clap::Args;
use offload::cli::parse_size;
use offload::limit::Burst;

use crate::device::limits::{DirectionSpec, LimitsSpec};

/// What the interface may carry, over all of its queue pairs. Who is faster has to wait.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Limits")]
pub struct LimitArgs {
    /// Bytes a second to the guest, like 100M (powers of 1024); no limit if left out
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub rx_bps: Option<u64>,
    /// More bytes a second to the guest for a while, like 1G:60. From full credit the higher rate
    /// lasts for SECONDS (60 if left out); credit is earned by using less than --rx-bps
    #[arg(long, value_name = "SIZE[:SECONDS]", requires = "rx_bps", value_parser = bps_burst)]
    pub rx_bps_burst: Option<Burst>,
    /// Packets a second to the guest, as they would be on a wire; no limit if left out
    #[arg(long, value_name = "N")]
    pub rx_pps: Option<u64>,
    /// More packets a second to the guest for a while, as with --rx-bps-burst
    #[arg(long, value_name = "N[:SECONDS]", requires = "rx_pps", value_parser = pps_burst)]
    pub rx_pps_burst: Option<Burst>,
    /// Bytes a second from the guest, as with --rx-bps
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub tx_bps: Option<u64>,
    /// More bytes a second from the guest for a while, as with --rx-bps-burst
    #[arg(long, value_name = "SIZE[:SECONDS]", requires = "tx_bps", value_parser = bps_burst)]
    pub tx_bps_burst: Option<Burst>,
    /// Packets a second from the guest, as with --rx-pps
    #[arg(long, value_name = "N")]
    pub tx_pps: Option<u64>,
    /// More packets a second from the guest for a while, as with --rx-bps-burst
    #[arg(long, value_name = "N[:SECONDS]", requires = "tx_pps", value_parser = pps_burst)]
    pub tx_pps_burst: Option<Burst>,
}

impl LimitArgs {
    /// The limits, unchecked.
    #[must_use]
    pub fn spec(&self) -> LimitsSpec {
        LimitsSpec {
            rx: DirectionSpec {
                pps: self.rx_pps,
                pps_burst: self.rx_pps_burst,
                bps: self.rx_bps,
                bps_burst: self.rx_bps_burst,
            },
            tx: DirectionSpec {
                pps: self.tx_pps,
                pps_burst: self.tx_pps_burst,
                bps: self.tx_bps,
                bps_burst: self.tx_bps_burst,
            },
        }
    }
}

fn size(text: &str) -> Result<u64, String> {
    parse_size(text).map_err(|error| error.to_string())
}

fn bps_burst(text: &str) -> Result<Burst, String> {
    Burst::parse(text, size)
}

fn pps_burst(text: &str) -> Result<Burst, String> {
    Burst::parse(text, |number| {
        let wrong = |_| format!("{number:?} is not a number of packets; write N or N:SECONDS");
        number.parse().map_err(wrong)
    })
}
