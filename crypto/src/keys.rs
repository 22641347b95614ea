//! Key types, key derivation, and wrapping one key under another.
//!
//! # Derivation
//!
//! HKDF-SHA256 (RFC 5869), one label per use (module `label`, private; the bytes are pinned by tests because
//! changing one makes every volume unreadable). The input keys are uniformly random, so HKDF's extract
//! step without salt is sound (RFC 5869, 3.1); the key slot gives its salt where a person chose the key.
//!
//! # Wrapping
//!
//! ```text
//!  0          12                        44              60
//!  +----------+--------------------------+---------------+
//!  |  nonce   |      encrypted key       |      tag      |     Wrapped
//!  +----------+--------------------------+---------------+
//! ```
//!
//! AES-256-GCM under a key derived from the wrapping key with a label that says what may be wrapped, so
//! that a wrapped session key never opens as a volume key. The nonce is random: wraps are rare (once per
//! volume, once per activation), far from the 2^32 of NIST SP 800-38D, 8.3. `context` is authenticated
//! and not stored: it says where the wrapped key belongs (volume id, slot number), so that it cannot be moved.
//! AES-KW was rejected for having no associated data.

use std::fmt;

use hkdf::Hkdf;
use sha2::Sha256;
use subtle::{Choice, ConstantTimeEq};
use zeroize::Zeroize;

use crate::aead::{AeadKey, Engine, NONCE_LEN, TAG_LEN};
use crate::locked::Locked;

/// Length of every key in bytes.
pub const KEY_LEN: usize = 32;
/// Length of a [`Wrapped`] key in bytes: nonce, encrypted key, tag.
pub const WRAPPED_LEN: usize = NONCE_LEN + KEY_LEN + TAG_LEN;

/// What each derived key is for. Part of the volume format.
pub(crate) mod label {
    pub(crate) const KEK_FROM_KEY_FILE: &str = "offload v1 kek from key file";
    pub(crate) const KEK_FROM_PASSPHRASE: &str = "offload v1 kek from passphrase";
    pub(crate) const WRAP_DEK: &str = "offload v1 kek wraps dek";
    pub(crate) const WRAP_SESSION: &str = "offload v1 dek wraps session key";
    pub(crate) const SESSION_DATA: &str = "offload v1 session data";
    pub(crate) const SESSION_PAGE: &str = "offload v1 session page";
    pub(crate) const SESSION_LOG: &str = "offload v1 session log";
    pub(crate) const SESSION_RING: &str = "offload v1 session ring";
    pub(crate) const SESSION_SUPERBLOCK: &str = "offload v1 session superblock";
}

/// The operating system gave no randomness. No key is made of anything else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the operating system gave no random bytes (getrandom); no key was made")]
pub struct RandomError(#[source] getrandom::Error);

/// A wrapped key does not open: another wrapping key, another context, or damaged bytes. Which of them
/// cannot be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the wrapped key does not open: wrong key, wrong place, or damaged")]
pub struct UnwrapError;

/// Fills `out` from the operating system.
pub(crate) fn random(out: &mut [u8]) -> Result<(), RandomError> {
    getrandom::fill(out).map_err(RandomError)
}

/// 32 secret bytes on a memory page of their own: locked where the system lets us, wiped on drop, compared
/// in constant time, never printed, never cloned.
pub struct Secret32(Locked<[u8; KEY_LEN]>);

impl Secret32 {
    fn zeroed() -> Self {
        Self(Locked::new([0; KEY_LEN]))
    }

    /// Draws 32 bytes from the operating system.
    ///
    /// # Errors
    ///
    /// [`RandomError`] if it gives none; never a key of zeros.
    pub fn generate() -> Result<Self, RandomError> {
        let mut secret = Self::zeroed();
        random(secret.0.get_mut())?;
        Ok(secret)
    }

    /// Takes the bytes over: copies them and wipes `bytes`.
    #[must_use]
    pub fn take(bytes: &mut [u8; KEY_LEN]) -> Self {
        let mut secret = Self::zeroed();
        secret.0.get_mut().copy_from_slice(bytes);
        bytes.zeroize();
        secret
    }

    /// The bytes. Whoever copies them wipes the copy.
    #[must_use]
    pub fn expose(&self) -> &[u8; KEY_LEN] {
        self.0.get()
    }

    /// Whether the page is locked against swapping.
    #[must_use]
    pub fn is_locked(&self) -> bool {
        self.0.is_locked()
    }

    /// HKDF-SHA256 of this secret under `salt` for the use that `label` names.
    pub(crate) fn derive(&self, salt: Option<&[u8]>, label: &str) -> Self {
        let mut derived = Self::zeroed();
        Hkdf::<Sha256>::new(salt, self.expose())
            .expand(label.as_bytes(), derived.0.get_mut())
            .expect("32 bytes are within HKDF's limit of 255 blocks");
        derived
    }

    /// Lets `fill` write the secret on its page.
    pub(crate) fn try_fill<E>(
        fill: impl FnOnce(&mut [u8; KEY_LEN]) -> Result<(), E>,
    ) -> Result<Self, E> {
        let mut secret = Self::zeroed();
        fill(secret.0.get_mut())?;
        Ok(secret)
    }
}

impl fmt::Debug for Secret32 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[REDACTED]")
    }
}

impl ConstantTimeEq for Secret32 {
    fn ct_eq(&self, other: &Self) -> Choice {
        self.expose().ct_eq(other.expose())
    }
}

impl PartialEq for Secret32 {
    fn eq(&self, other: &Self) -> bool {
        self.ct_eq(other).into()
    }
}

impl Eq for Secret32 {}

/// A wrapped key as it lies on disk. Not secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wrapped([u8; WRAPPED_LEN]);

impl Wrapped {
    /// The bytes to store.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; WRAPPED_LEN] {
        &self.0
    }

    /// Bytes that were stored. Nothing is checked until the key is unwrapped.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; WRAPPED_LEN]) -> Self {
        Self(bytes)
    }
}

macro_rules! key_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(PartialEq, Eq)]
        pub struct $name(Secret32);

        impl $name {
            /// Draws a fresh key.
            ///
            /// # Errors
            ///
            /// [`RandomError`] if the operating system gives no randomness.
            pub fn generate() -> Result<Self, RandomError> {
                Secret32::generate().map(Self)
            }

            /// Makes `secret` a key of this kind.
            #[must_use]
            pub fn from_secret(secret: Secret32) -> Self {
                Self(secret)
            }

            /// The key's bytes.
            #[must_use]
            pub fn secret(&self) -> &Secret32 {
                &self.0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(concat!(stringify!($name), "([REDACTED])"))
            }
        }
    };
}

key_type! {
    /// Key-encryption key: comes from outside (key file, passphrase), wraps the [`Dek`].
    Kek
}
key_type! {
    /// Data-encryption key of one volume, for its whole life. Wraps [`SessionKey`]s.
    Dek
}
key_type! {
    /// Key of one activation of a volume. See [`Session`](crate::session::Session).
    SessionKey
}

impl Kek {
    /// Wraps `dek` for the place that `context` names.
    ///
    /// # Errors
    ///
    /// [`RandomError`] if there is no randomness for the nonce.
    pub fn wrap(&self, dek: &Dek, context: &[u8]) -> Result<Wrapped, RandomError> {
        wrap(&self.0, label::WRAP_DEK, &dek.0, context)
    }

    /// Unwraps what [`Kek::wrap`] made for the same `context`.
    ///
    /// # Errors
    ///
    /// [`UnwrapError`] if anything differs.
    pub fn unwrap_dek(&self, wrapped: &Wrapped, context: &[u8]) -> Result<Dek, UnwrapError> {
        unwrap(&self.0, label::WRAP_DEK, wrapped, context).map(Dek)
    }
}

impl Dek {
    /// Wraps a session key for the place that `context` names.
    ///
    /// # Errors
    ///
    /// [`RandomError`] if there is no randomness for the nonce.
    pub fn wrap_session(&self, key: &SessionKey, context: &[u8]) -> Result<Wrapped, RandomError> {
        wrap(&self.0, label::WRAP_SESSION, &key.0, context)
    }

    /// Unwraps what [`Dek::wrap_session`] made for the same `context`.
    ///
    /// # Errors
    ///
    /// [`UnwrapError`] if anything differs.
    pub fn unwrap_session(
        &self,
        wrapped: &Wrapped,
        context: &[u8],
    ) -> Result<SessionKey, UnwrapError> {
        unwrap(&self.0, label::WRAP_SESSION, wrapped, context).map(SessionKey)
    }
}

fn wrap(
    with: &Secret32,
    label: &str,
    key: &Secret32,
    context: &[u8],
) -> Result<Wrapped, RandomError> {
    let mut nonce = [0; NONCE_LEN];
    random(&mut nonce)?;
    let aead = AeadKey::new(Engine::Portable, &with.derive(None, label));
    // Encrypted on a page of its own: between copying and encrypting, the copy is as secret as the key.
    let mut copy = Locked::new([0; KEY_LEN]);
    copy.get_mut().copy_from_slice(key.expose());
    let tag = aead.seal_nonce(nonce, context, copy.get_mut());

    let mut bytes = [0; WRAPPED_LEN];
    let (head, rest) = bytes.split_at_mut(NONCE_LEN);
    let (body, tail) = rest.split_at_mut(KEY_LEN);
    head.copy_from_slice(&nonce);
    body.copy_from_slice(copy.get());
    tail.copy_from_slice(&tag);
    Ok(Wrapped(bytes))
}

fn unwrap(
    with: &Secret32,
    label: &str,
    wrapped: &Wrapped,
    context: &[u8],
) -> Result<Secret32, UnwrapError> {
    let (nonce, rest) = wrapped.0.split_first_chunk().ok_or(UnwrapError)?;
    let (body, rest) = rest.split_first_chunk::<KEY_LEN>().ok_or(UnwrapError)?;
    let (tag, _) = rest.split_first_chunk().ok_or(UnwrapError)?;
    let aead = AeadKey::new(Engine::Portable, &with.derive(None, label));
    Secret32::try_fill(|key| {
        key.copy_from_slice(body);
        aead.open_nonce(*nonce, context, key, tag)
            .map_err(|_| UnwrapError)
    })
}

#[cfg(test)]
mod tests;
