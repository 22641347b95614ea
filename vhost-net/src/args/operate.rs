//! The subcommands that talk to a running card over its control socket.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::LimitArgs;
use crate::capture::SNAPLEN_MIN;
use crate::host::publish::Rule;
use crate::policy::pcap::SNAPLEN;

/// Which card.
#[derive(Clone, Debug, Args)]
pub struct ControlArgs {
    /// Control socket of the card
    #[arg(long, value_name = "PATH")]
    pub control_socket: PathBuf,
}

/// `capture`.
#[derive(Debug, Args)]
pub struct CaptureArgs {
    /// The card.
    #[command(flatten)]
    pub control: ControlArgs,
    /// Where the frames go, as pcapng; `-` for standard output, like `| tshark -r -`
    #[arg(long, short, value_name = "FILE")]
    pub write: PathBuf,
    /// Bytes of each frame that are kept
    #[arg(long, short, value_name = "BYTES", default_value_t = SNAPLEN,
        value_parser = clap::value_parser!(u32).range(i64::from(SNAPLEN_MIN)..=i64::from(SNAPLEN)))]
    pub snaplen: u32,
    /// End after so many frames
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// End after so many seconds, like 10 or 0.5
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub duration: Option<Duration>,
}

/// `publish`.
#[derive(Debug, Args)]
pub struct PublishArgs {
    /// The card.
    #[command(flatten)]
    pub control: ControlArgs,
    /// Ports to lead into the guest: `[ADDRESS:]HOSTPORT:GUESTPORT[/udp]`; without any, those
    /// that are published are told
    #[arg(value_name = "RULE")]
    pub rules: Vec<Rule>,
    /// Publish these no longer. Connections through them go on
    #[arg(long)]
    pub remove: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `limits`.
#[derive(Debug, Args)]
pub struct LimitsArgs {
    /// The card.
    #[command(flatten)]
    pub control: ControlArgs,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Lift all limits
    #[arg(long)]
    pub none: bool,
    /// New limits in place of all that there are; without any, they are told.
    #[command(flatten)]
    pub limits: LimitArgs,
}

/// `groups`.
#[derive(Debug, Args)]
pub struct GroupsArgs {
    /// The card.
    #[command(flatten)]
    pub control: ControlArgs,
    /// Put the security groups of this file (TOML) in force, for flows that begin from now on
    #[arg(long, value_name = "FILE")]
    pub set: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// The card.
    #[command(flatten)]
    pub control: ControlArgs,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let parsed = text.parse().ok().filter(|seconds: &f64| *seconds > 0.0);
    parsed
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or_else(|| "a duration is a number of seconds, like 10 or 0.5".to_owned())
}
