//! Rates that a card keeps, with bursts: of disks and of interfaces alike.
//!
//! What ends in `bps` is a size a second, like `"100M"`; everything else is a number a second, like
//! `20000`. A burst is a rate above the limit's own, and for how many seconds it lasts from full
//! credit: `"1G:60"`. The card reads the same texts, so they are handed on as they are; what it would
//! refuse is refused here, where the place can be shown.

use std::fmt;

use serde::Deserialize;
use toml::Spanned;

use super::{Checker, SpecError, parse_size};

/// Longest burst, in seconds: the cards'.
const BURST_SECONDS: std::ops::RangeInclusive<u32> = 1..=86_400;
/// How long a burst lasts when it does not say, in seconds: the cards'.
const BURST_SECONDS_DEFAULT: &str = "60";
/// Largest rate a second: the cards'.
const RATE_MAX: u64 = 1 << 34;
/// Bytes that may count as one operation: the block card's.
const IO_SIZE: std::ops::RangeInclusive<u64> = 512..=1 << 24;

type Checked<T> = Result<T, Box<SpecError>>;

/// A number, or a text like `100M` or `1G:60`.
#[derive(Clone, Debug, Deserialize)]
#[serde(
    untagged,
    expecting = "expected a number, or a text like \"100M\" or \"1G:60\""
)]
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

/// One limit as the file has it.
pub(super) struct Limit<'a> {
    /// Its option's name, which says what it counts.
    pub(super) name: &'static str,
    pub(super) amount: &'a Option<Spanned<Amount>>,
    pub(super) burst_name: &'static str,
    pub(super) burst: &'a Option<Spanned<Amount>>,
}

impl Limit<'_> {
    fn is_size(&self) -> bool {
        self.name.ends_with("bps")
    }

    /// What it counts, and a number of it.
    fn example(&self) -> (&'static str, &'static str) {
        if self.is_size() {
            ("a size", "100M")
        } else {
            ("a number", "20000")
        }
    }

    fn rate(&self, text: &str) -> Option<u64> {
        let rate = if self.is_size() {
            parse_size(text)
        } else {
            text.parse().ok()
        };
        rate.filter(|rate| (1..=RATE_MAX).contains(rate))
    }
}

impl Checker<'_> {
    /// Options of limits and their values, as a card takes them.
    pub(super) fn limits(&self, limits: &[Limit<'_>]) -> Checked<Vec<(&'static str, String)>> {
        let mut options = Vec::new();
        for limit in limits {
            let Some(amount) = limit.amount else {
                if let Some(burst) = limit.burst {
                    return Err(self.error(
                        Some(burst.span()),
                        format!("{} needs {}", limit.burst_name, limit.name),
                        "above which rate?",
                        Some("credit for a burst is earned by using less than the limit"),
                    ));
                }
                continue;
            };
            let text = amount.get_ref().to_string();
            let Some(rate) = limit.rate(&text) else {
                let (what, example) = limit.example();
                return Err(self.error(
                    Some(amount.span()),
                    format!("`{text}` is not {what} a second, from 1 to {RATE_MAX}"),
                    "here",
                    Some(&format!(
                        "for example {} = \"{example}\"; leave it out to have no limit",
                        limit.name
                    )),
                ));
            };
            options.push((limit.name, text));
            if let Some(burst) = limit.burst {
                options.push((limit.burst_name, self.burst(limit, rate, burst)?));
            }
        }
        Ok(options)
    }

    fn burst(&self, limit: &Limit<'_>, rate: u64, burst: &Spanned<Amount>) -> Checked<String> {
        let text = burst.get_ref().to_string();
        let (number, seconds) = text
            .split_once(':')
            .unwrap_or((&text, BURST_SECONDS_DEFAULT));
        let seconds = seconds.parse().ok().filter(|n| BURST_SECONDS.contains(n));
        let (_, example) = limit.example();
        let name = limit.burst_name;
        match limit.rate(number).zip(seconds) {
            Some((higher, _)) if higher > rate => Ok(text),
            Some(_) => Err(self.error(
                Some(burst.span()),
                format!("the burst `{text}` is not above {}", limit.name),
                "a higher rate, for a while",
                Some("raise it or leave it out"),
            )),
            None => Err(self.error(
                Some(burst.span()),
                format!("`{text}` is not a burst"),
                "a rate, and for how many seconds",
                Some(&format!(
                    "for example {name} = \"{example}:60\", for up to {} seconds",
                    BURST_SECONDS.end()
                )),
            )),
        }
    }

    /// What counts as one operation; `iops` is whether there is a limit that counts any.
    pub(super) fn io_size(&self, size: &Spanned<Amount>, iops: bool) -> Checked<String> {
        let text = size.get_ref().to_string();
        let is_good = |bytes: &u64| IO_SIZE.contains(bytes) && bytes.is_power_of_two();
        if parse_size(&text).filter(is_good).is_none() {
            return Err(self.error(
                Some(size.span()),
                format!("io-size = `{text}` cannot be had"),
                "a power of two from 512 to 16M",
                Some("for example io-size = \"16K\""),
            ));
        }
        if !iops {
            return Err(self.error(
                Some(size.span()),
                "io-size needs iops".to_owned(),
                "nothing counts operations",
                Some("add iops = 3000, or leave it out"),
            ));
        }
        Ok(text)
    }

    /// A size without a rate, whose bounds are the card's to check.
    pub(super) fn size(&self, size: &Spanned<Amount>) -> Checked<String> {
        let text = size.get_ref().to_string();
        if parse_size(&text).is_some_and(|bytes| bytes > 0) {
            return Ok(text);
        }
        Err(self.error(
            Some(size.span()),
            format!("`{text}` is not a size"),
            "here",
            Some("bytes are like \"100M\" (powers of 1024)"),
        ))
    }
}
