//! Session tokens: a keyed hash over when they end.
//!
//! ```text
//!  base64url( ends: u64 seconds | number: u64 | HMAC-SHA256(key, ends | number)[..24] )   54 characters
//! ```
//!
//! So the card remembers none, whatever number a guest asks for, and a token is checked without a
//! look-up, in constant time. The key is random and lives in memory: tokens end with the card's
//! process, and a client that gets 401 asks for another, as SDKs and cloud-init do. Rejected: a
//! table of tokens, which a guest fills; a key on disk, for no use but tokens that outlive a crash.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use data_encoding::BASE64URL_NOPAD;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

/// Longest life of a token, in seconds: six hours.
pub const TTL_MAX: u32 = 21_600;

const MAC_LEN: usize = 24;

/// Makes and checks tokens.
pub struct Tokens {
    hmac: Hmac<Sha256>,
    start: Instant,
    number: AtomicU64,
}

impl std::fmt::Debug for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tokens([REDACTED])")
    }
}

impl Tokens {
    /// `key` is random bytes.
    #[must_use]
    pub fn new(key: [u8; 32], now: Instant) -> Self {
        // RFC 2104, 2: a key shorter than a block is padded with zeros.
        let mut block = [0; 64];
        block[..32].copy_from_slice(&key);
        Self {
            hmac: Hmac::new(&block.into()),
            start: now,
            number: AtomicU64::new(0),
        }
    }

    /// A token for that many seconds.
    #[must_use]
    pub fn issue(&self, ttl_seconds: u32, now: Instant) -> String {
        let ends = self.elapsed(now) + Duration::from_secs(ttl_seconds.into());
        let number = self.number.fetch_add(1, Ordering::Relaxed);
        // Milliseconds, so that a token lives as long as it says.
        let ends = u64::try_from(ends.as_millis()).unwrap_or(u64::MAX);
        let mut bytes = Vec::with_capacity(16 + MAC_LEN);
        bytes.extend(ends.to_be_bytes());
        bytes.extend(number.to_be_bytes());
        let mac = self
            .hmac
            .clone()
            .chain_update(&bytes)
            .finalize()
            .into_bytes();
        bytes.extend(mac.iter().take(MAC_LEN));
        BASE64URL_NOPAD.encode(&bytes)
    }

    /// How many seconds a token is still good for; `None` when it is not.
    #[must_use]
    pub fn check(&self, token: &[u8], now: Instant) -> Option<u32> {
        if token.len() != BASE64URL_NOPAD.encode_len(16 + MAC_LEN) {
            return None;
        }
        let bytes = BASE64URL_NOPAD.decode(token).ok()?;
        let (signed, mac) = bytes.split_at_checked(16)?;
        let hmac = self.hmac.clone().chain_update(signed);
        hmac.verify_truncated_left(mac).ok()?;
        let ends = u64::from_be_bytes(signed.get(..8)?.try_into().ok()?);
        let left = Duration::from_millis(ends).checked_sub(self.elapsed(now))?;
        if left.is_zero() {
            return None;
        }
        u32::try_from(left.as_millis().div_ceil(1000)).ok()
    }

    fn elapsed(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_good_for_its_time_and_not_longer() {
        let now = Instant::now();
        let tokens = Tokens::new([7; 32], now);
        let token = tokens.issue(60, now + Duration::from_secs(5));
        assert_eq!(token.len(), 54);
        let check = |seconds| tokens.check(token.as_bytes(), now + Duration::from_secs(seconds));
        assert_eq!(check(5), Some(60));
        assert_eq!(check(64), Some(1));
        assert_eq!(check(65), None);
        assert_eq!(check(1_000_000), None);
    }

    #[test]
    fn no_two_tokens_are_the_same_and_another_key_takes_neither() {
        let now = Instant::now();
        let (ours, theirs) = (Tokens::new([1; 32], now), Tokens::new([2; 32], now));
        let (one, two) = (ours.issue(60, now), ours.issue(60, now));
        assert_ne!(one, two);
        assert!(ours.check(one.as_bytes(), now).is_some());
        assert!(theirs.check(one.as_bytes(), now).is_none());
    }

    #[test]
    fn every_changed_bit_makes_it_wrong() {
        let now = Instant::now();
        let tokens = Tokens::new([3; 32], now);
        let good = BASE64URL_NOPAD
            .decode(tokens.issue(60, now).as_bytes())
            .unwrap();
        for bit in 0..good.len() * 8 {
            let mut bytes = good.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let token = BASE64URL_NOPAD.encode(&bytes);
            assert_eq!(tokens.check(token.as_bytes(), now), None, "bit {bit}");
        }
        for length in 0..80 {
            assert_eq!(tokens.check(&vec![b'A'; length], now), None);
        }
    }
}
