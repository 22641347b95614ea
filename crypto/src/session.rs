//! The AEAD keys of one activation of a volume.

use crate::aead::{AeadKey, Engine};
use crate::keys::{SessionKey, label};

/// One activation's keys, HKDF-SHA256 of its [`SessionKey`] with a label each. The counters that make their
/// nonces are independent of each other.
#[derive(Debug)]
pub struct Session {
    /// Seals data blocks.
    pub data: AeadKey,
    /// Seals pages of the map.
    pub page: AeadKey,
    /// Seals records of the metadata log.
    pub log: AeadKey,
    /// Seals the in-flight ring.
    pub ring: AeadKey,
    /// Seals superblocks.
    pub superblock: AeadKey,
}

impl Session {
    /// Derives all keys for `engine`.
    #[must_use]
    pub fn derive(engine: Engine, key: &SessionKey) -> Self {
        let derive = |label| AeadKey::new(engine, &key.secret().derive(None, label));
        Self {
            data: derive(label::SESSION_DATA),
            page: derive(label::SESSION_PAGE),
            log: derive(label::SESSION_LOG),
            ring: derive(label::SESSION_RING),
            superblock: derive(label::SESSION_SUPERBLOCK),
        }
    }
}

#[cfg(test)]
mod tests;
