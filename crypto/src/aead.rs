//! AES-256-GCM under one key, by two independent engines.
//!
//! # Nonces
//!
//! A nonce is 96 bits: four zero bytes, then a 64-bit sequence number, little-endian. It is the "fixed
//! field, invocation field" construction of NIST SP 800-38D, 8.2.1, with the fixed field empty, because
//! each key belongs to one writer: the key is derived from a session key that this activation drew itself.
//! **The caller owns the counter and must not give one number twice to [`AeadKey::seal`]**: a
//! repeated nonce reveals the XOR of two plaintexts and lets an attacker forge. Random nonces were
//! rejected: 96 bits collide too early (a limit of 2^32 messages), and they would have to be stored.
//!
//! # Limits
//!
//! With counter nonces SP 800-38D leaves 2^64 messages of up to 64 GiB. Indistinguishability bounds under
//! AES's 128-bit block are tighter: 2^36 blocks of 4 KiB (256 TiB) under one key keep an attacker's advantage
//! below 2^-40 or so, and that is where the volume starts a new session. Tags are full length.
//!
//! # On failure
//!
//! Plaintext that was not authenticated never reaches the caller: the output buffer is zeroed.

use std::fmt;

use aes_gcm::aead::inout::InOutBuf;
use aes_gcm::{AeadInOut, Aes256Gcm, KeyInit};
use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use zeroize::Zeroize;

use crate::keys::Secret32;
use crate::locked::{Locked, Wipe, scrub_stack};

/// Length of a [`Tag`] in bytes.
pub const TAG_LEN: usize = 16;
/// Length of a nonce in bytes.
pub(crate) const NONCE_LEN: usize = 12;

/// The authentication tag of one sealed message, always full length.
pub type Tag = [u8; TAG_LEN];

/// Which implementation of AES-256-GCM runs. Both compute the same bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Engine {
    /// AWS-LC by way of `aws-lc-rs`: assembly, for data.
    #[default]
    AwsLc,
    /// RustCrypto's `aes-gcm`: pure Rust, for keys and as a cross-check.
    Portable,
}

/// What was opened is not what was sealed under this key, sequence number and associated data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("authentication failed: the data or its place is not what was sealed")]
pub struct AuthError;

#[expect(
    clippy::large_enum_variant,
    reason = "it has a page of its own; a box would put the schedule on an unlocked page"
)]
enum Cipher {
    AwsLc(LessSafeKey),
    Portable(Aes256Gcm),
}

impl Cipher {
    fn new(engine: Engine, key: &[u8; 32]) -> Self {
        match engine {
            Engine::AwsLc => Self::AwsLc(LessSafeKey::new(
                UnboundKey::new(&AES_256_GCM, key).expect("a 32 byte key suits AES-256"),
            )),
            Engine::Portable => Self::Portable(Aes256Gcm::new(key.into())),
        }
    }

    fn engine(&self) -> Engine {
        match self {
            Self::AwsLc(_) => Engine::AwsLc,
            Self::Portable(_) => Engine::Portable,
        }
    }
}

impl Wipe for Cipher {
    // The assignment drops the old state, which its library wipes (AWS-LC in `OPENSSL_free`, `aes-gcm` by its
    // feature `zeroize`); the schedule of a public key takes its place.
    fn wipe(&mut self) {
        *self = Self::new(Engine::Portable, &[0; 32]);
    }
}

/// AES-256-GCM under one derived key.
///
/// `Send` and `Sync`: queues share one key without a lock. Neither call allocates.
pub struct AeadKey {
    cipher: Locked<Cipher>,
}

impl AeadKey {
    /// Expands `key` for `engine`. `key` itself is not kept.
    #[must_use]
    pub fn new(engine: Engine, key: &Secret32) -> Self {
        let mut cipher = Locked::new(Cipher::new(Engine::Portable, &[0; 32]));
        *cipher.get_mut() = Cipher::new(engine, key.expose());
        scrub_stack();
        Self { cipher }
    }

    /// Encrypts `data` in place and authenticates it together with `aad` (which must say what the data is
    /// and where it belongs). `seq` must be fresh under this key.
    ///
    /// # Panics
    ///
    /// If `data` is longer than 64 GiB - 32 bytes, the limit of GCM. Nothing else can fail.
    #[must_use = "without its tag the data can never be opened"]
    pub fn seal(&self, seq: u64, aad: &[u8], data: &mut [u8]) -> Tag {
        self.seal_nonce(nonce(seq), aad, data)
    }

    /// Authenticates and decrypts `data` in place.
    ///
    /// # Errors
    ///
    /// [`AuthError`] if key, `seq`, `aad`, `data` and `tag` do not all match what was sealed. `data` is
    /// then zeroed.
    pub fn open(&self, seq: u64, aad: &[u8], data: &mut [u8], tag: &Tag) -> Result<(), AuthError> {
        self.open_nonce(nonce(seq), aad, data, tag)
    }

    /// Authenticates `sealed` and decrypts it to `out`, without touching `sealed`.
    ///
    /// # Errors
    ///
    /// [`AuthError`] as for [`AeadKey::open`], and if `out` is not as long as `sealed`. `out` is then zeroed.
    pub fn open_into(
        &self,
        seq: u64,
        aad: &[u8],
        sealed: &[u8],
        tag: &Tag,
        out: &mut [u8],
    ) -> Result<(), AuthError> {
        self.open_into_nonce(nonce(seq), aad, sealed, tag, out)
    }

    /// The engine at work.
    #[must_use]
    pub fn engine(&self) -> Engine {
        self.cipher.get().engine()
    }

    pub(crate) fn seal_nonce(&self, nonce: [u8; NONCE_LEN], aad: &[u8], data: &mut [u8]) -> Tag {
        match self.cipher.get() {
            Cipher::AwsLc(key) => key
                .seal_in_place_separate_tag(
                    Nonce::assume_unique_for_key(nonce),
                    Aad::from(aad),
                    data,
                )
                .ok()
                .and_then(|tag| Tag::try_from(tag.as_ref()).ok())
                .expect("the message is within the limit of GCM"),
            Cipher::Portable(key) => key
                .encrypt_inout_detached(&nonce.into(), aad, data.into())
                .expect("the message is within the limit of GCM")
                .into(),
        }
    }

    pub(crate) fn open_nonce(
        &self,
        nonce: [u8; NONCE_LEN],
        aad: &[u8],
        data: &mut [u8],
        tag: &Tag,
    ) -> Result<(), AuthError> {
        let opened = match self.cipher.get() {
            Cipher::AwsLc(key) => key
                .open_in_place_separate_tag(
                    Nonce::assume_unique_for_key(nonce),
                    Aad::from(aad),
                    tag,
                    data,
                )
                .is_ok(),
            Cipher::Portable(key) => key
                .decrypt_inout_detached(&nonce.into(), aad, (&mut *data).into(), tag.into())
                .is_ok(),
        };
        accept(opened, data)
    }

    pub(crate) fn open_into_nonce(
        &self,
        nonce: [u8; NONCE_LEN],
        aad: &[u8],
        sealed: &[u8],
        tag: &Tag,
        out: &mut [u8],
    ) -> Result<(), AuthError> {
        let opened = sealed.len() == out.len()
            && match self.cipher.get() {
                Cipher::AwsLc(key) => key
                    .open_separate_gather(
                        Nonce::assume_unique_for_key(nonce),
                        Aad::from(aad),
                        sealed,
                        tag,
                        out,
                    )
                    .is_ok(),
                Cipher::Portable(key) => InOutBuf::new(sealed, out).is_ok_and(|buffer| {
                    key.decrypt_inout_detached(&nonce.into(), aad, buffer, tag.into())
                        .is_ok()
                }),
            };
        accept(opened, out)
    }
}

impl fmt::Debug for AeadKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AeadKey({:?}, [REDACTED])", self.engine())
    }
}

/// The nonce of sequence number `seq`: four zero bytes, then `seq` little-endian.
///
/// Made in one 16-byte value: written as four bytes and eight, it would be read back as eight and
/// four, a load that waits until every store before it, such as the copy of the block to be
/// sealed, has left the processor's store buffer. That was a third of the time of sealing.
fn nonce(seq: u64) -> [u8; NONCE_LEN] {
    let wide = (u128::from(seq) << 32).to_le_bytes();
    *wide.first_chunk().expect("16 bytes hold 12")
}

/// The engines wipe on failure, each in its own way or not at all; here it is made certain.
fn accept(opened: bool, out: &mut [u8]) -> Result<(), AuthError> {
    if opened {
        Ok(())
    } else {
        out.zeroize();
        Err(AuthError)
    }
}

#[cfg(test)]
mod tests;
