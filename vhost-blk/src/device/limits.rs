//! Provisioned performance of a volume: [`offload::limit`] with block requests and a real clock.
//!
//! | request | operations | bytes |
//! |---|---|---|
//! | IN, OUT | 1, or one for each started `io_size` bytes | its data |
//! | FLUSH | 1: it makes the disk below wait, which a neighbour feels | 0 |
//! | DISCARD, WRITE_ZEROES | 1 a segment: they change the map, and move no data | 0 |
//! | GET_ID, what is refused, requests without data, FLUSH of a read-only volume | 0 | 0 |
//!
//! Requests that lie side by side are not merged into one before they are counted (EBS does so up
//! to 256 KiB): a guest's block layer has merged what it wanted to.
//!
//! A request that has to wait stays in its queue's backlog as a chain that is out: a frontend that
//! stops the ring gets it served at once ([`TimedGate::next_unlimited`]), a card that is
//! killed leaves it in the in-flight region for its successor. A new process starts with full
//! credit.

use offload::limit::{Burst, Cost, RateError, Rates, TimedGate, TimedLimit};
use offload::telemetry::Registry;
use offload::worker::Waker;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::request::Request;
use crate::volume::geometry::BLOCK_LEN;

/// Why limits are refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum LimitsError {
    /// The numbers make no sense.
    #[error(transparent)]
    Rate(#[from] RateError),
    /// A block would take seconds.
    #[error("{0} bytes a second are less than one block; a volume needs at least {BLOCK_LEN}")]
    TooSlow(u64),
}

/// Limits as the control socket shows and takes them: what is left out or null is not limited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Wire {
    /// Operations a second.
    pub iops: Option<u64>,
    /// `{"rate": N, "seconds": N}`.
    pub iops_burst: Option<Burst>,
    /// Bytes a second.
    pub bps: Option<u64>,
    /// `{"rate": BYTES, "seconds": N}`.
    pub bps_burst: Option<Burst>,
    /// Bytes that count as one operation.
    pub io_size: Option<u32>,
}

impl From<Rates> for Wire {
    fn from(rates: Rates) -> Self {
        Self {
            iops: rates.ops,
            iops_burst: rates.ops_burst,
            bps: rates.bytes,
            bps_burst: rates.bytes_burst,
            io_size: rates.op_len,
        }
    }
}

impl From<Wire> for Rates {
    fn from(wire: Wire) -> Self {
        Self {
            ops: wire.iops,
            ops_burst: wire.iops_burst,
            bytes: wire.bps,
            bytes_burst: wire.bps_burst,
            op_len: wire.io_size,
        }
    }
}

/// The limits of a volume. Clones are the same limits: one for all queues of all sockets.
#[derive(Clone, Debug, Default)]
pub struct Limits(TimedLimit);

impl Limits {
    /// Limits from the start.
    ///
    /// # Errors
    /// They cannot be kept.
    pub fn new(rates: Rates) -> Result<Self, LimitsError> {
        let limits = Self::default();
        limits.set(rates)?;
        Ok(limits)
    }

    /// What is in force.
    pub fn rates(&self) -> Rates {
        self.0.rates()
    }

    /// Changes all of them at once, also for requests that wait.
    ///
    /// # Errors
    /// They cannot be kept; nothing has changed.
    pub fn set(&self, rates: Rates) -> Result<(), LimitsError> {
        match rates.bytes {
            Some(slow) if (1..BLOCK_LEN as u64).contains(&slow) => Err(LimitsError::TooSlow(slow)),
            _ => Ok(self.0.set(rates)?),
        }
    }

    /// Shows how many requests waited, and for how long.
    pub fn register(&self, registry: &Registry) {
        registry.histogram(
            "throttled",
            "How long requests waited for the volume's limits, if they did",
            vec![],
            self.0.waited(),
        );
    }

    /// The gate of a queue, which `waker` wakes.
    pub(super) fn gate<T>(&self, waker: Waker) -> TimedGate<T> {
        self.0.watch(move || waker.wake());
        self.0.gate()
    }
}

/// What a request takes of the limits; `None`: nothing.
pub(super) fn cost(request: &Request, is_read_only: bool) -> Option<Cost> {
    let cost = |ops, bytes| Some(Cost { ops, bytes });
    match *request {
        Request::In { len: 0, .. } | Request::Out { len: 0, .. } | Request::GetId { .. } => None,
        Request::In { len, .. } | Request::Out { len, .. } => cost(1, len),
        Request::Flush if is_read_only => None,
        Request::Flush => cost(1, 0),
        Request::Discard { ranges } | Request::WriteZeroes { ranges } => cost(ranges as u64, 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_request_costs_what_the_table_says() {
        let of = |ops, bytes| Some(Cost { ops, bytes });
        for (request, expected) in [
            (Request::In { offset: 0, len: 0 }, None),
            (
                Request::In {
                    offset: 0,
                    len: 512,
                },
                of(1, 512),
            ),
            (
                Request::Out {
                    offset: 512,
                    len: 1 << 20,
                },
                of(1, 1 << 20),
            ),
            (Request::Flush, of(1, 0)),
            (Request::GetId { room: 20 }, None),
            (Request::Discard { ranges: 3 }, of(3, 0)),
            (Request::WriteZeroes { ranges: 16 }, of(16, 0)),
        ] {
            assert_eq!(cost(&request, false), expected, "{request:?}");
        }
        assert_eq!(cost(&Request::Flush, true), None);
    }

    #[test]
    fn what_the_control_socket_shows_can_be_sent_back() {
        let rates = Rates {
            ops: Some(1000),
            ops_burst: Some(Burst {
                rate: 3000,
                seconds: 30,
            }),
            bytes: Some(1 << 20),
            bytes_burst: None,
            op_len: Some(16384),
        };
        let shown = serde_json::to_value(Wire::from(rates)).unwrap();
        let back: Wire = serde_json::from_value(shown).unwrap();
        assert_eq!(Rates::from(back), rates);
        assert!(serde_json::from_str::<Wire>(r#"{"iop": 1}"#).is_err());
        assert!(serde_json::from_str::<Wire>(r#"{"iops": -1}"#).is_err());
    }

    #[test]
    fn a_volume_slower_than_a_block_a_second_is_refused() {
        let of = |bytes| Rates {
            bytes: Some(bytes),
            ..Rates::default()
        };
        assert_eq!(
            Limits::new(of(4095)).unwrap_err(),
            LimitsError::TooSlow(4095)
        );
        assert!(matches!(Limits::new(of(0)), Err(LimitsError::Rate(_))));
        assert!(Limits::new(of(4096)).is_ok());
    }
}
