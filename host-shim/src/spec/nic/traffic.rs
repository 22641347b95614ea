//! What an interface may carry, how its flows are followed, and what is written down of them.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use toml::Spanned;

use super::super::{Checker, parse_size};
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

/// A number, or a text like `100M` or `1G:60`.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Amount {
    Number(u64),
    Text(String),
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => number.fmt(f),
            Self::Text(text) => text.fmt(f),
        }
    }
}

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
        let mut limits = Vec::new();
        for (name, amount, burst_name, burst) in [
            ("rx-bps", &raw.rx_bps, "rx-bps-burst", &raw.rx_bps_burst),
            ("rx-pps", &raw.rx_pps, "rx-pps-burst", &raw.rx_pps_burst),
            ("tx-bps", &raw.tx_bps, "tx-bps-burst", &raw.tx_bps_burst),
            ("tx-pps", &raw.tx_pps, "tx-pps-burst", &raw.tx_pps_burst),
        ] {
            let is_size = name.ends_with("bps");
            if let Some(amount) = amount {
                limits.push((name, self.amount(amount, is_size)?));
            }
            let Some(burst) = burst else { continue };
            if amount.is_none() {
                return Err(self.error(
                    Some(burst.span()),
                    format!("{burst_name} needs {name}"),
                    "above which rate?",
                    Some("credit for a burst is earned by using less than the limit"),
                ));
            }
            limits.push((burst_name, self.burst(burst, is_size)?));
        }
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
            size: size.map(|size| self.amount(size, true)).transpose()?,
            keep: self.ranged(raw.flow_log_keep.as_ref(), "flow-log-keep", &KEPT)?,
        }))
    }

    /// A rate, whose bounds are the card's to check.
    fn amount(&self, amount: &Spanned<Amount>, is_size: bool) -> Checked<String> {
        let text = amount.get_ref().to_string();
        if is_rate(&text, is_size) {
            return Ok(text);
        }
        let what = if is_size { "a size" } else { "a number" };
        Err(self.error(
            Some(amount.span()),
            format!("`{text}` is not {what}"),
            "here",
            Some("bytes are like \"100M\" (powers of 1024), packets like 20000"),
        ))
    }

    fn burst(&self, burst: &Spanned<Amount>, is_size: bool) -> Checked<String> {
        let text = burst.get_ref().to_string();
        let (rate, seconds) = text.split_once(':').unwrap_or((&text, "60"));
        if is_rate(rate, is_size) && seconds.parse::<u32>().is_ok_and(|n| n > 0) {
            return Ok(text);
        }
        Err(self.error(
            Some(burst.span()),
            format!("`{text}` is not a burst"),
            "a rate, and for how many seconds",
            Some("for example rx-bps-burst = \"1G:60\" or rx-pps-burst = \"50000:10\""),
        ))
    }
}

fn is_rate(text: &str, is_size: bool) -> bool {
    let rate = if is_size {
        parse_size(text)
    } else {
        text.parse().ok()
    };
    rate.is_some_and(|rate| rate > 0)
}
