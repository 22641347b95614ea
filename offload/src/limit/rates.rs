//! What a limit is set to: numbers that people chose, checked.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::bucket::RATE_MAX;

/// Longest burst, in seconds.
pub const BURST_SECONDS_MAX: u32 = 86_400;
/// How long a burst lasts if nothing else is said, in seconds.
pub const BURST_SECONDS: u32 = 60;
/// Smallest and largest accounting unit for operations, in bytes.
const OP_LEN: std::ops::RangeInclusive<u32> = 512..=1 << 24;

/// Why limits are refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RateError {
    /// Nothing would ever pass.
    #[error("a limit of 0 {0} a second would let nothing pass; leave it out to have no limit")]
    Zero(&'static str),
    /// More than can be counted.
    #[error("{rate} {unit} a second is too large; limits end at {RATE_MAX}")]
    TooLarge {
        /// What was asked for.
        rate: u64,
        /// Of what.
        unit: &'static str,
    },
    /// A burst that is none.
    #[error(
        "a burst of {burst} {unit} a second is not above the limit of {rate}; raise it or leave it out"
    )]
    NoBurst {
        /// Asked for as burst.
        burst: u64,
        /// The limit.
        rate: u64,
        /// Of what.
        unit: &'static str,
    },
    /// A burst of no or endless time.
    #[error("a burst lasts 1 to {BURST_SECONDS_MAX} seconds, not {0}")]
    BurstSeconds(u32),
    /// An accounting unit that makes no sense.
    #[error("operations are counted in powers of two from 512 bytes to 16 MiB, not in {0} bytes")]
    OpLen(u32),
    /// An accounting unit without anything to count.
    #[error("a size of operations means nothing without a limit on operations")]
    OpLenAlone,
    /// `N:SECONDS` that is not.
    #[error("{0:?} is not a burst; write RATE or RATE:SECONDS, like 3000:60")]
    BurstForm(String),
}

/// A higher rate for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Burst {
    /// Units a second while it lasts.
    pub rate: u64,
    /// How long it lasts from full credit at that rate, in seconds.
    #[serde(default = "burst_seconds")]
    pub seconds: u32,
}

const fn burst_seconds() -> u32 {
    BURST_SECONDS
}

impl Burst {
    /// Reads `RATE` or `RATE:SECONDS`, where `rate` reads the first.
    ///
    /// # Errors
    /// It is neither; what `rate` says.
    pub fn parse(
        text: &str,
        rate: impl FnOnce(&str) -> Result<u64, String>,
    ) -> Result<Self, String> {
        let (number, seconds) = match text.split_once(':') {
            None => (text, BURST_SECONDS),
            Some((number, seconds)) => {
                let wrong = |_| RateError::BurstForm(text.to_owned()).to_string();
                (number, seconds.parse().map_err(wrong)?)
            }
        };
        let rate = rate(number)?;
        Ok(Self { rate, seconds })
    }
}

/// A limit in words; `show` has the unit.
pub fn in_words(rate: Option<u64>, burst: Option<Burst>, show: impl Fn(u64) -> String) -> String {
    let mut text = rate.map_or_else(|| "no limit".to_owned(), &show);
    if let Some(burst) = burst {
        text += &format!(", burst {} for {} s", show(burst.rate), burst.seconds);
    }
    text
}

/// Limits that go together. Nothing set means no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rates {
    /// Operations a second.
    pub ops: Option<u64>,
    /// A higher rate of operations for a while.
    pub ops_burst: Option<Burst>,
    /// Bytes a second.
    pub bytes: Option<u64>,
    /// A higher rate of bytes for a while.
    pub bytes_burst: Option<Burst>,
    /// Bytes that count as one operation: longer requests count as several. Without it a request
    /// is one, however long.
    pub op_len: Option<u32>,
}

impl Rates {
    /// Whether anything is limited.
    #[must_use]
    pub const fn is_limited(&self) -> bool {
        self.ops.is_some() || self.bytes.is_some()
    }

    /// Finds what cannot be kept.
    ///
    /// # Errors
    /// See [`RateError`].
    pub fn check(&self) -> Result<(), RateError> {
        check_one(self.ops, self.ops_burst, "operations")?;
        check_one(self.bytes, self.bytes_burst, "bytes")?;
        match self.op_len {
            Some(len) if !OP_LEN.contains(&len) || !len.is_power_of_two() => {
                Err(RateError::OpLen(len))
            }
            Some(_) if self.ops.is_none() => Err(RateError::OpLenAlone),
            _ => Ok(()),
        }
    }
}

fn check_one(rate: Option<u64>, burst: Option<Burst>, unit: &'static str) -> Result<(), RateError> {
    let too_large = |rate| Err(RateError::TooLarge { rate, unit });
    match (rate, burst) {
        (Some(0), _) => Err(RateError::Zero(unit)),
        (Some(rate), _) if rate > RATE_MAX => too_large(rate),
        (_, Some(burst)) if burst.rate > RATE_MAX => too_large(burst.rate),
        (_, Some(burst)) if !(1..=BURST_SECONDS_MAX).contains(&burst.seconds) => {
            Err(RateError::BurstSeconds(burst.seconds))
        }
        // Without a limit there is nothing that it would be above.
        (rate, Some(burst)) if rate.is_none_or(|rate| burst.rate <= rate) => {
            Err(RateError::NoBurst {
                burst: burst.rate,
                rate: rate.unwrap_or(RATE_MAX),
                unit,
            })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_that_cannot_be_kept_are_refused_with_the_reason() {
        let burst = |rate, seconds| Some(Burst { rate, seconds });
        let none = Rates::default();
        let of = |ops, ops_burst| Rates {
            ops,
            ops_burst,
            ..none
        };
        for (rates, hint) in [
            (of(Some(0), None), "let nothing pass"),
            (of(Some(u64::MAX), None), "too large"),
            (of(Some(10), burst(u64::MAX, 1)), "too large"),
            (of(Some(10), burst(10, 1)), "not above"),
            (of(None, burst(10, 1)), "not above"),
            (of(Some(10), burst(20, 0)), "1 to 86400"),
            (of(Some(10), burst(20, u32::MAX)), "1 to 86400"),
            (
                Rates {
                    bytes: Some(0),
                    ..none
                },
                "0 bytes",
            ),
            (
                Rates {
                    op_len: Some(4096),
                    ..none
                },
                "without a limit",
            ),
            (
                Rates {
                    op_len: Some(3000),
                    ..of(Some(1), None)
                },
                "powers of two",
            ),
            (
                Rates {
                    op_len: Some(0),
                    ..of(Some(1), None)
                },
                "powers of two",
            ),
        ] {
            let error = rates.check().unwrap_err().to_string();
            assert!(error.contains(hint), "{rates:?}: {error}");
        }
        for fine in [
            none,
            of(Some(1), None),
            of(Some(RATE_MAX), None),
            of(Some(1), burst(RATE_MAX, 86_400)),
        ] {
            assert_eq!(fine.check(), Ok(()), "{fine:?}");
        }
    }

    #[test]
    fn a_burst_is_a_rate_and_perhaps_how_long() {
        let parse = |text| Burst::parse(text, |n| n.parse().map_err(|_| format!("no number: {n}")));
        let of = |rate, seconds| Ok(Burst { rate, seconds });
        assert_eq!(parse("3000"), of(3000, 60));
        assert_eq!(parse("3000:5"), of(3000, 5));
        for (wrong, hint) in [
            ("3000:", "RATE:SECONDS"),
            ("1:x", "RATE"),
            (":5", "no number"),
        ] {
            let error = parse(wrong).unwrap_err();
            assert!(error.contains(hint), "{wrong}: {error}");
        }
    }
}
