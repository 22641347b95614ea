//! What an interface may carry: [`offload::limit`] with frames and a real clock, one limit for each
//! direction, over all queue pairs.
//!
//! A frame costs its bytes and the packets that it would be on a wire: a super-segment as many as
//! it is to be cut into. Nothing is dropped to keep a limit; who is too fast is made to wait:
//!
//! - From the guest: the chain stays with the card, so the transmit ring fills up and the guest's
//!   queueing discipline holds the rest. A ring that stops gets them sent at once.
//! - To the guest: the first frame that has to wait makes the wire say that it has no room. Then
//!   TCP reads no more from the host's sockets, whose windows close, and datagrams stay in the
//!   host's socket buffers, where the kernel drops what is too much.
//!
//! What the card itself says (DHCP, ARP) counts like everything else on the link. The driver's
//! header is read once more for the price; a guest that changes it in between is charged for what
//! it said first and sends at most as many bytes.

use std::time::Instant;

use offload::device::Chain;
use offload::limit::{Burst, Cost, RateError, Rates, TimedGate, TimedLimit};
use offload::memory::GuestMemory;
use offload::telemetry::Registry;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::rings::gather_front;
use crate::frame::header::{GSO_NONE, HEADER_LEN, NetHeader};

/// Least bytes a second: a frame of 64 KiB then waits for a second.
pub const BPS_MIN: u64 = 64 << 10;

/// Why limits are refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum LimitsError {
    /// The numbers make no sense.
    #[error(transparent)]
    Rate(#[from] RateError),
    /// One frame would take seconds.
    #[error("{0} bytes a second are less than one frame; an interface needs at least {BPS_MIN}")]
    TooSlow(u64),
}

/// One direction's limits as the control socket shows and takes them: what is left out or null is
/// not limited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DirectionSpec {
    /// Packets a second.
    pub pps: Option<u64>,
    /// `{"rate": N, "seconds": N}`.
    pub pps_burst: Option<Burst>,
    /// Bytes a second.
    pub bps: Option<u64>,
    /// `{"rate": BYTES, "seconds": N}`.
    pub bps_burst: Option<Burst>,
}

/// Both directions' limits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsSpec {
    /// To the guest.
    pub rx: DirectionSpec,
    /// From the guest.
    pub tx: DirectionSpec,
}

impl DirectionSpec {
    fn rates(self) -> Result<Rates, LimitsError> {
        let rates = Rates {
            ops: self.pps,
            ops_burst: self.pps_burst,
            bytes: self.bps,
            bytes_burst: self.bps_burst,
            op_len: None,
        };
        rates.check()?;
        match self.bps {
            Some(slow) if slow < BPS_MIN => Err(LimitsError::TooSlow(slow)),
            _ => Ok(rates),
        }
    }
}

impl From<Rates> for DirectionSpec {
    fn from(rates: Rates) -> Self {
        Self {
            pps: rates.ops,
            pps_burst: rates.ops_burst,
            bps: rates.bytes,
            bps_burst: rates.bytes_burst,
        }
    }
}

/// The limits of an interface, shared by its queue pairs.
#[derive(Debug, Default)]
pub struct Limits {
    rx: TimedLimit,
    tx: TimedLimit,
}

impl Limits {
    /// What is in force.
    #[must_use]
    pub fn spec(&self) -> LimitsSpec {
        LimitsSpec {
            rx: self.rx.rates().into(),
            tx: self.tx.rates().into(),
        }
    }

    /// Changes all of them. Queues that wait have to be woken.
    ///
    /// # Errors
    /// They cannot be kept; nothing has changed.
    pub fn set(&self, spec: LimitsSpec) -> Result<(), LimitsError> {
        let (rx, tx) = (spec.rx.rates()?, spec.tx.rates()?);
        self.rx.set(rx)?;
        self.tx.set(tx)?;
        Ok(())
    }

    /// Shows how many frames waited, and for how long.
    pub fn register(&self, registry: &Registry) {
        for (direction, limit) in [("rx", &self.rx), ("tx", &self.tx)] {
            registry.histogram(
                "throttled",
                "How long frames waited for the interface's limits, if they did",
                vec![("direction", direction.to_owned())],
                limit.waited(),
            );
        }
    }

    /// One pair's frames from the guest: see [`offer`].
    pub(super) fn tx_gate(&self) -> TimedGate<Chain> {
        self.tx.gate()
    }

    /// One pair's frames to the guest.
    pub(super) fn rx_gate(&self) -> RxGate {
        RxGate {
            gate: self.rx.gate(),
            is_paid: false,
        }
    }
}

/// What a frame of `len` bytes takes.
pub(super) fn cost(header: &NetHeader, len: usize) -> Cost {
    let size = usize::from(header.gso_size);
    let packets = if header.gso_type == GSO_NONE || size == 0 {
        1
    } else {
        // All but the headers is cut; a hint that claims more than is there is ignored.
        let headers = usize::from(header.hdr_len);
        let payload = len.checked_sub(headers).unwrap_or(len);
        payload.div_ceil(size).max(1)
    };
    Cost {
        ops: packets as u64,
        bytes: len as u64,
    }
}

/// What a chain of the guest's takes.
fn chain_cost(chain: &Chain, memory: &GuestMemory, header_len: usize) -> Cost {
    let mut bytes = [0; HEADER_LEN];
    let front = bytes.get_mut(..header_len).unwrap_or_default();
    let read = gather_front(&chain.readable, memory, front);
    // What cannot be read is refused when its turn comes.
    let header = read.and_then(NetHeader::from_bytes).unwrap_or_default();
    let len = chain.readable.iter().map(|s| s.len as usize).sum::<usize>();
    cost(&header, len.saturating_sub(header_len))
}

/// Gives a frame of the guest's back if it may go now, else keeps it.
#[inline]
pub(super) fn offer(
    gate: &mut TimedGate<Chain>,
    chain: Chain,
    memory: &GuestMemory,
    header_len: usize,
) -> Option<Chain> {
    if gate.is_open() {
        return Some(chain);
    }
    let cost = chain_cost(&chain, memory, header_len);
    gate.offer(chain, cost)
}

/// The turn of the frame that is the next to go to the guest. The frame itself waits elsewhere, as
/// it may have to wait for buffers, too.
#[derive(Debug)]
pub(super) struct RxGate {
    gate: TimedGate<()>,
    /// Its turn has come, and it waits for buffers.
    is_paid: bool,
}

impl RxGate {
    /// Whether the next frame may go now. If not, it is the next one that is to be asked for again.
    #[inline]
    pub(super) fn may_send(&mut self, header: &NetHeader, len: usize) -> bool {
        if self.is_paid || self.gate.is_open() {
            return true;
        }
        self.is_paid = if self.gate.is_empty() {
            self.gate.offer((), cost(header, len)).is_some()
        } else {
            self.gate.next().is_some()
        };
        self.is_paid
    }

    /// It has gone.
    #[inline]
    pub(super) fn sent(&mut self) {
        self.is_paid = false;
    }

    /// It is lost, or goes another way. What it took of the limit stays taken.
    pub(super) fn forget(&mut self) {
        while self.gate.next_unlimited().is_some() {}
        self.is_paid = false;
    }

    #[cfg(test)]
    pub(super) fn is_paid(&self) -> bool {
        self.is_paid
    }

    /// When [`Self::may_send`] is to be asked again.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.gate.deadline()
    }
}

#[cfg(test)]
mod pair_tests;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn segment(gso_size: u16, hdr_len: u16) -> NetHeader {
        NetHeader {
            gso_type: 1,
            gso_size,
            hdr_len,
            ..NetHeader::default()
        }
    }

    #[test]
    fn a_frame_costs_its_bytes_and_the_packets_that_it_would_be() {
        let of = |ops, bytes| Cost { ops, bytes };
        for (header, len, expected) in [
            (NetHeader::default(), 60, of(1, 60)),
            (NetHeader::default(), 9014, of(1, 9014)),
            (segment(1000, 54), 10_054, of(10, 10_054)),
            (segment(1000, 54), 10_055, of(11, 10_055)),
            // Nonsense is not free.
            (segment(1000, u16::MAX), 10_000, of(10, 10_000)),
            (segment(1000, 100), 100, of(1, 100)),
            (segment(0, 54), 100, of(1, 100)),
        ] {
            assert_eq!(cost(&header, len), expected, "{header:?}");
        }
    }

    fn limited(rx: DirectionSpec) -> Limits {
        let limits = Limits::default();
        let spec = LimitsSpec {
            rx,
            ..LimitsSpec::default()
        };
        limits.set(spec).unwrap();
        assert_eq!(limits.spec(), spec);
        limits
    }

    #[test]
    fn frames_to_the_guest_keep_to_the_rate_and_lifting_it_lets_them_go() {
        let limits = limited(DirectionSpec {
            bps: Some(1_000_000),
            ..DirectionSpec::default()
        });
        let mut gate = limits.rx_gate();
        let header = NetHeader::default();
        let (begin, mut sent) = (Instant::now(), 0);
        while begin.elapsed() < Duration::from_millis(300) {
            if gate.may_send(&header, 1000) {
                gate.sent();
                sent += 1000;
            } else {
                let at = gate.deadline().expect("it waits for its time");
                std::thread::sleep(at.saturating_duration_since(Instant::now()));
            }
        }
        // 20 ms of the rate, and one frame, may pass besides.
        let most = begin.elapsed().as_micros() as u64 + 21_000;
        assert!((100_000..=most).contains(&sent), "{sent} of {most}");

        while gate.may_send(&header, 1_000_000) {
            gate.sent();
        }
        limits.set(LimitsSpec::default()).unwrap();
        for _ in 0..100 {
            assert!(gate.may_send(&header, 1_000_000));
            gate.sent();
        }
        assert_eq!(gate.deadline(), None);
    }

    #[test]
    fn two_queue_pairs_have_one_limit_together() {
        let limits = limited(DirectionSpec {
            pps: Some(1000),
            ..DirectionSpec::default()
        });
        let mut gates = [limits.rx_gate(), limits.rx_gate()];
        let (begin, mut sent) = (Instant::now(), [0; 2]);
        while begin.elapsed() < Duration::from_millis(200) {
            for (gate, sent) in gates.iter_mut().zip(&mut sent) {
                if gate.may_send(&NetHeader::default(), 60) {
                    gate.sent();
                    *sent += 1;
                }
            }
        }
        // 20 ms of the rate, and one frame each, may pass besides.
        let most = begin.elapsed().as_millis() as u64 + 22;
        assert!(sent[0] + sent[1] <= most, "{sent:?} of {most}");
        assert!(sent[0] > 20 && sent[1] > 20, "they take turns: {sent:?}");
    }

    #[test]
    fn a_frame_that_waits_for_buffers_pays_once() {
        let limits = limited(DirectionSpec {
            pps: Some(1),
            ..DirectionSpec::default()
        });
        let mut gate = limits.rx_gate();
        for _ in 0..1000 {
            assert!(gate.may_send(&NetHeader::default(), 60));
        }
        gate.sent();
        while gate.may_send(&NetHeader::default(), 60) {
            gate.sent();
        }
        assert!(gate.deadline().is_some());
    }

    #[test]
    fn a_frame_that_is_forgotten_is_not_waited_for_nor_has_it_paid_for_the_next() {
        let limits = limited(DirectionSpec {
            pps: Some(1),
            ..DirectionSpec::default()
        });
        let mut gate = limits.rx_gate();
        let header = NetHeader::default();
        // Its turn has come.
        assert!(gate.may_send(&header, 60));
        gate.forget();
        while gate.may_send(&header, 60) {
            gate.sent();
        }
        assert!(gate.deadline().is_some());
        gate.forget();
        assert_eq!(gate.deadline(), None);
        assert!(!gate.may_send(&header, 60));
    }

    #[test]
    fn limits_that_cannot_be_kept_change_nothing() {
        let slow = DirectionSpec {
            bps: Some(1000),
            ..DirectionSpec::default()
        };
        let fine = DirectionSpec {
            pps: Some(10),
            ..DirectionSpec::default()
        };
        let limits = Limits::default();
        let (rx, tx) = (fine, slow);
        let error = limits.set(LimitsSpec { rx, tx }).unwrap_err();
        assert!(error.to_string().contains("one frame"), "{error}");
        assert_eq!(limits.spec(), LimitsSpec::default());
    }
}
