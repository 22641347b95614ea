//! Sealing of data blocks and the sessions that do it.

use std::collections::HashMap;
use std::sync::Arc;

use crypto::aead::AuthError;
use crypto::session::Session;

use super::entry::Entry;
use super::geometry::{Block, Slot};

/// The sessions of a volume by their id.
#[derive(Clone, Debug, Default)]
pub struct Keyring {
    sessions: HashMap<u16, Arc<Session>>,
}

impl Keyring {
    /// Adds a session.
    pub fn insert(&mut self, id: u16, session: Arc<Session>) {
        self.sessions.insert(id, session);
    }

    /// A session's keys.
    pub fn get(&self, id: u16) -> Option<&Arc<Session>> {
        self.sessions.get(&id)
    }

    /// Opens a stored block in place as what `entry` says that `block` is. On failure the
    /// buffer is wiped.
    ///
    /// # Errors
    /// It is not that block in that version, or its session is unknown.
    pub fn open_block(
        &self,
        block: Block,
        entry: &Entry,
        data: &mut [u8],
    ) -> Result<(), AuthError> {
        let session = self.get(entry.session()).ok_or(AuthError)?;
        let aad = associated(block, entry.session());
        session.data.open(entry.sequence(), &aad, data, &entry.tag)
    }
}

/// Domain and volume are in the key; session and sequence select it and its nonce. The slot is
/// not part of it, so that ciphertext can move.
fn associated(block: Block, session: u16) -> [u8; 10] {
    let mut data = [0; 10];
    data[..8].copy_from_slice(&block.0.to_le_bytes());
    data[8..].copy_from_slice(&session.to_le_bytes());
    data
}

/// Seals a block in place. `sequence` must never have been used with `session`.
pub fn seal_block(
    block: Block,
    slot: Slot,
    (session_id, session): (u16, &Session),
    sequence: u64,
    data: &mut [u8],
) -> Entry {
    let tag = session
        .data
        .seal(sequence, &associated(block, session_id), data);
    Entry::new(slot, session_id, sequence, tag)
}
