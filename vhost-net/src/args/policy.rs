//! `--flow-timeout`, `--tracked-flows`, `--neighbor`: what policy and services are told besides
//! their files.

use std::net::IpAddr;

use clap::Args;

use super::name;
use crate::policy::PolicyOptions;
use crate::policy::conntrack::Timeouts;

/// Connection tracking, and names.
#[derive(Clone, Debug, Default, Args)]
pub struct PolicyArgs {
    /// After how many seconds of silence a flow is forgotten: `tcp-opening`, `tcp-established`,
    /// `tcp-half-closed`, `tcp-closed`, `udp`, `udp-stream`, `icmp` or `other`, like
    /// tcp-established=3600. May be given more than once
    #[arg(long, value_name = "KIND=SECONDS", value_parser = timeout)]
    pub flow_timeout: Vec<(String, u32)>,
    /// Most flows that each queue pair tracks; further ones are refused
    #[arg(long, value_name = "N", default_value_t = 65_536,
        value_parser = clap::value_parser!(u32).range(64..=4_000_000))]
    pub tracked_flows: u32,
    /// Another machine that the card's resolver knows, like db=10.0.2.20,fd00::20. May be given
    /// more than once
    #[arg(long, value_name = "NAME=ADDRESS[,ADDRESS]", value_parser = neighbor)]
    pub neighbor: Vec<(String, Vec<IpAddr>)>,
}

impl PolicyArgs {
    /// How policy behaves.
    #[must_use]
    pub fn options(&self) -> PolicyOptions {
        let mut timeouts = Timeouts::default();
        for (kind, seconds) in &self.flow_timeout {
            if let Some(place) = timeouts.of(kind) {
                *place = *seconds;
            }
        }
        PolicyOptions {
            flows: self.tracked_flows as usize,
            timeouts,
            ..PolicyOptions::default()
        }
    }
}

fn timeout(text: &str) -> Result<(String, u32), String> {
    let (kind, seconds) = text
        .split_once('=')
        .ok_or("write KIND=SECONDS, like udp=30")?;
    if Timeouts::default().of(kind).is_none() {
        let kinds = Timeouts::KINDS.join(", ");
        return Err(format!("there is no kind {kind:?}; there are {kinds}"));
    }
    let seconds = seconds
        .parse()
        .ok()
        .filter(|n| (1..=31_536_000).contains(n));
    let seconds = seconds.ok_or("a timeout is 1 to 31536000 seconds")?;
    Ok((kind.to_owned(), seconds))
}

fn neighbor(text: &str) -> Result<(String, Vec<IpAddr>), String> {
    let wrong = "write NAME=ADDRESS[,ADDRESS], like db=10.0.2.20";
    let (host, addresses) = text.split_once('=').ok_or(wrong)?;
    let addresses: Result<Vec<IpAddr>, _> = addresses.split(',').map(str::parse).collect();
    Ok((name(host)?, addresses.map_err(|_| wrong)?))
}
