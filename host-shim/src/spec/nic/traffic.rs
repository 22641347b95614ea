//! What an interface may carry, how its flows are followed, and what is written down of them.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use serde::Serialize;
use toml::Spanned;

use super::super::Checker;
use super::super::limits::Limit;
use super::{Checked, RawNic, parse_name};

/// Most flows that may be tracked.
const TRACKED: std::ops::RangeInclusive<u32> = 64..=4_000_000;
/// Seconds of a flow's timeout: up to a year.
const TIMEOUT: std::ops::RangeInclusive<u32> = 1..=31_536_000;
/// Older files of a flow log.
const KEPT: std::ops::RangeInclusive<u32> = 0..=64;
/// The kinds of flows that have a timeout.
const KINDS: [&str; 8] = [
    "tcp-opening",
    "tcp-established",
    "tcp-half-closed",
    "tcp-closed",
    "udp",
    "udp-stream",
    "icmp",
    "other",
];

/// Where a flow log goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FlowLog {
    /// The file.
    pub path: PathBuf,
    /// Seconds of a line; the card's own without it.
    pub interval: Option<u32>,
    /// How long the file may get, as a size; the card's own without it.
    pub size: Option<String>,
    /// Older files kept; the card's own without it.
    pub keep: Option<u32>,
}

/// See the module.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Traffic {
    /// Options of limits and their values, as the card takes them: `rx-bps`, `100M`.
    pub limits: Vec<(&'static str, String)>,
    /// Seconds of silence after which flows of a kind are forgotten.
    pub flow_timeouts: BTreeMap<String, u32>,
    /// Most flows tracked; the card's own without it.
    pub tracked_flows: Option<u32>,
    /// Names of other machines.
    pub neighbors: BTreeMap<String, Vec<IpAddr>>,
    /// The flow log.
    pub flow_log: Option<FlowLog>,
}

impl Checker<'_> {
    pub(super) fn traffic(&self, raw: &RawNic) -> Checked<Traffic> {
        let limit = |name, amount, burst_name, burst| Limit {
            name,
            amount,
            burst_name,
            burst,
        };
        let limits = self.limits(&[
            limit("rx-bps", &raw.rx_bps, "rx-bps-burst", &raw.rx_bps_burst),
            limit("rx-pps", &raw.rx_pps, "rx-pps-burst", &raw.rx_pps_burst),
            limit("tx-bps", &raw.tx_bps, "tx-bps-burst", &raw.tx_bps_burst),
            limit("tx-pps", &raw.tx_pps, "tx-pps-burst", &raw.tx_pps_burst),
        ])?;
        let mut flow_timeouts = BTreeMap::new();
        for (kind, seconds) in &raw.flow_timeouts {
            if !KINDS.contains(&kind.as_str()) {
                let help = format!("kinds are {}", KINDS.join(", "));
                return Err(self.error(
                    Some(seconds.span()),
                    format!("there is no kind of flows `{kind}`"),
                    "here",
                    Some(&help),
                ));
            }
            if let Some(seconds) = self.ranged(Some(seconds), kind, &TIMEOUT)? {
                flow_timeouts.insert(kind.clone(), seconds);
            }
        }
        let mut neighbors = BTreeMap::new();
        for (name, addresses) in &raw.neighbors {
            if parse_name(name).is_none() || addresses.is_empty() {
                return Err(self.error(
                    addresses.first().map(Spanned::span),
                    format!("`{name}` is not a neighbor with its addresses"),
                    "here",
                    Some("for example neighbors = { db = [\"10.0.2.20\"] }"),
                ));
            }
            neighbors.insert(name.clone(), self.addresses(addresses)?);
        }
        Ok(Traffic {
            limits,
            flow_timeouts,
            tracked_flows: self.ranged(raw.tracked_flows.as_ref(), "tracked-flows", &TRACKED)?,
            neighbors,
            flow_log: self.flow_log(raw)?,
        })
    }

    fn flow_log(&self, raw: &RawNic) -> Checked<Option<FlowLog>> {
        let Some(path) = &raw.flow_log else {
            let more = [
                raw.flow_log_interval.as_ref().map(Spanned::span),
                raw.flow_log_size.as_ref().map(Spanned::span),
                raw.flow_log_keep.as_ref().map(Spanned::span),
            ];
            return match more.into_iter().flatten().next() {
                None => Ok(None),
                span => Err(self.error(
                    span,
                    "there is no flow log that this could be of".to_owned(),
                    "of flow-log",
                    Some("for example flow-log = \"web1-flows.log\""),
                )),
            };
        };
        let interval = raw.flow_log_interval.as_ref();
        if let Some(wrong) = interval.filter(|it| !matches!(it.get_ref(), 60 | 600)) {
            return Err(self.error(
                Some(wrong.span()),
                format!("flow-log-interval = {} cannot be had", wrong.get_ref()),
                "60 or 600 seconds",
                None,
            ));
        }
        let size = raw.flow_log_size.as_ref();
        Ok(Some(FlowLog {
            path: self.path(path),
            interval: interval.map(|it| *it.get_ref()),
            size: size.map(|size| self.size(size)).transpose()?,
            keep: self.ranged(raw.flow_log_keep.as_ref(), "flow-log-keep", &KEPT)?,
        }))
    }
}
