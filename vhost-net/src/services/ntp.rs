//! The time of day (NTP version 4, RFC 5905), as Amazon's time sync service gives it on the link.
//!
//! A client's question (mode 3) is answered from the host's clock at once, with no state at all: the
//! answer is a function of the question and of the time. It is as long as the question, or shorter, and
//! other modes, the control messages (6 and 7) above all, get nothing.
//!
//! What the host's clock is worth, nobody tells the card: it may be disciplined by an NTP daemon, by its own
//! hypervisor, or by nobody. So the stratum is modest, [`STRATUM`], as chrony has it for a clock that nobody
//! vouches for: a guest that has better sources prefers them, and one that has none follows its host. Leap
//! seconds come as the host's clock has them.
//!
//! Authentication is not offered: what follows the header of a question (extension fields, a code) is let be,
//! and the answer has none, which a client that insists on it refuses.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The server's port.
pub const PORT: u16 = 123;
/// How far from a reference clock the host says it is.
pub const STRATUM: u8 = 10;

/// Bytes of a header.
const HEADER_LEN: usize = 48;
/// From 1900, where NTP's first era begins, to 1970 (RFC 5905, figure 4).
const EPOCH: u64 = 2_208_988_800;
const CLIENT: u8 = 3;
const SERVER: u8 = 4;
/// The clock's resolution: 2^-20 s.
const PRECISION: i8 = -20;
/// The most that the clock may be off, in units of 2^-16 s: 10 ms.
const DISPERSION: u32 = 655;
/// A clock of the machine's own (RFC 5905, 7.3: an address, if the stratum is above 1).
const REFERENCE: [u8; 4] = [127, 127, 1, 1];

/// What was seen and done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NtpStats {
    /// Questions answered.
    pub answered: u64,
    /// What is no question of a client's.
    pub ignored: u64,
}

/// The server.
#[derive(Debug)]
pub struct Ntp {
    clock: fn() -> SystemTime,
    stats: NtpStats,
}

impl Default for Ntp {
    fn default() -> Self {
        Self {
            clock: SystemTime::now,
            stats: NtpStats::default(),
        }
    }
}

impl Ntp {
    /// Counters.
    #[must_use]
    pub fn stats(&self) -> NtpStats {
        self.stats
    }

    /// Takes a datagram that came to [`PORT`]; gives the one that goes back.
    pub fn handle(&mut self, question: &[u8]) -> Option<Vec<u8>> {
        // A clock before 1970 is worth nothing.
        let unix = (self.clock)().duration_since(UNIX_EPOCH).ok();
        let answer = unix.and_then(|unix| answer(question, unix));
        match &answer {
            Some(_) => self.stats.answered += 1,
            None => self.stats.ignored += 1,
        }
        answer.map(Into::into)
    }
}

/// A time since 1970 as NTP has it: seconds of the era and 2^-32 of them (RFC 5905, 6). Eras wrap, which
/// clients know.
fn timestamp(unix: Duration) -> [u8; 8] {
    let seconds = unix.as_secs().wrapping_add(EPOCH) as u32;
    // Below 2^62.
    let fraction = (u64::from(unix.subsec_nanos()) << 32) / 1_000_000_000;
    ((u64::from(seconds) << 32) | fraction).to_be_bytes()
}

/// The answer to a client's question that came at a time since 1970.
fn answer(question: &[u8], unix: Duration) -> Option<[u8; HEADER_LEN]> {
    let question: &[u8; HEADER_LEN] = question.first_chunk()?;
    let (version, mode) = ((question[0] >> 3) & 7, question[0] & 7);
    if mode != CLIENT || !(1..=4).contains(&version) {
        return None;
    }
    let now = timestamp(unix);
    let mut answer = [0; HEADER_LEN];
    answer[0] = (version << 3) | SERVER;
    answer[1] = STRATUM;
    // The client's interval comes back to it.
    answer[2] = question[2];
    answer[3] = PRECISION.to_be_bytes()[0];
    // The way to the clock is none: root delay 0.
    answer[8..12].copy_from_slice(&DISPERSION.to_be_bytes());
    answer[12..16].copy_from_slice(&REFERENCE);
    // The clock was looked at just now.
    answer[16..24].copy_from_slice(&now);
    // The time at which the client asked, by its own clock.
    answer[24..32].copy_from_slice(&question[40..48]);
    answer[32..40].copy_from_slice(&now);
    answer[40..48].copy_from_slice(&now);
    Some(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What chrony sends: version 4, mode 3, and a random number in place of the time.
    fn question() -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0] = 0x23;
        bytes[2] = 6;
        bytes[40..].copy_from_slice(b"\xe1random!");
        bytes
    }

    #[test]
    fn a_time_of_day_is_counted_from_1900() {
        // RFC 5905, figure 4.
        for (unix, ntp) in [
            (0, 2_208_988_800_u32),
            (63_072_000, 2_272_060_800),
            (946_684_800 - 86_400, 3_155_587_200),
            // The last second of the era and the first of the next one.
            (2_085_978_495, u32::MAX),
            (2_085_978_496, 0),
        ] {
            let bytes = timestamp(Duration::from_secs(unix));
            assert_eq!(bytes[..4], ntp.to_be_bytes());
            assert_eq!(bytes[4..], [0; 4]);
        }
        let half = timestamp(Duration::from_millis(500));
        assert_eq!(half[4..], [0x80, 0, 0, 0]);
        let last = timestamp(Duration::from_nanos(999_999_999));
        assert_eq!(last[4..7], [0xff; 3]);
    }

    #[test]
    fn a_clients_question_gets_the_time_and_its_own_number_back() {
        let unix = Duration::new(1_700_000_000, 250_000_000);
        let reply = answer(&question(), unix).unwrap();
        // No leap second, version 4, mode 4.
        assert_eq!(reply[..4], [0x24, STRATUM, 6, 0xec]);
        assert_eq!(reply[24..32], *b"\xe1random!");
        let now = timestamp(unix);
        for at in [16, 32, 40] {
            assert_eq!(reply[at..at + 8], now);
        }
        // An older client is answered in its own version; what follows the header is let be.
        let mut old = question().to_vec();
        old[0] = 0x1b;
        old.extend([7; 20]);
        assert_eq!(answer(&old, unix).unwrap()[0], 0x1c);
    }

    #[test]
    fn what_is_no_clients_question_is_counted_and_not_answered() {
        let mut ntp = Ntp::default();
        let mut bad: Vec<Vec<u8>> = vec![vec![], question()[..47].to_vec()];
        // Servers, peers, broadcasts and control messages; versions that there are not.
        for first in [0x24, 0x21, 0x22, 0x25, 0x26, 0x27, 0x20, 0x03, 0x2b, 0x3b] {
            let mut bytes = question().to_vec();
            bytes[0] = first;
            bad.push(bytes);
        }
        for question in &bad {
            assert_eq!(ntp.handle(question), None, "{question:?}");
        }
        assert_eq!(ntp.stats().ignored, bad.len() as u64);
        assert_eq!(ntp.stats().answered, 0);
    }

    #[test]
    fn the_hosts_clock_is_what_counts_and_one_before_1970_does_not() {
        let mut ntp = Ntp::default();
        let before = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let reply = ntp.handle(&question()).unwrap();
        let after = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let said = &reply[40..];
        assert!((&timestamp(before)[..]..=&timestamp(after)[..]).contains(&said));
        assert_eq!(ntp.stats().answered, 1);
        ntp.clock = || UNIX_EPOCH - Duration::from_secs(1);
        assert_eq!(ntp.handle(&question()), None);
    }
}
