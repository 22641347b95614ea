//! A new volume.

use std::io;

use crypto::aead::Engine;
use crypto::keys::{Dek, SessionKey};
use crypto::session::Session;
use crypto::slot::{Argon2Params, SLOT_LEN};
use crypto::source::KeyMaterial;
use thiserror::Error;

use super::backing::Backing;
use super::buffer::Buffer;
use super::engine::unix_seconds;
use super::entry::Entry;
use super::geometry::{BLOCK_LEN, CHUNK_LEN, Geometry, GeometryError, LOG_START_CHUNK};
use super::superblock::{
    COPIES, KEY_SLOTS, KeyEntry, SERIAL_LEN, Superblock, VolumeId, session_context, volume_context,
};

/// Why a volume cannot be made.
#[derive(Debug, Error)]
pub enum CreateError {
    /// The backing failed.
    #[error("writing the new volume failed: {0}")]
    Io(#[from] io::Error),
    /// The sizes do not fit.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// Randomness or key wrapping failed.
    #[error("no key could be made: {0}")]
    Key(String),
}

/// The serial that a volume gets if none is chosen: `vol` and 17 hex digits of its id, the form
/// of an EBS volume id without its dash, which is just the 20 bytes that GET_ID has.
pub fn default_serial(id: &VolumeId) -> [u8; SERIAL_LEN] {
    let hex = id
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect::<String>();
    let mut serial = [0; SERIAL_LEN];
    serial[..3].copy_from_slice(b"vol");
    serial[3..].copy_from_slice(&hex.as_bytes()[..SERIAL_LEN - 3]);
    serial
}

/// Writes an empty volume of `geometry` to a backing that is at least as long. What was there is
/// lost: first the old headers, so that a half-made volume is none.
///
/// # Errors
/// See [`CreateError`].
pub fn create(
    backing: &dyn Backing,
    geometry: Geometry,
    material: &KeyMaterial,
    params: Argon2Params,
) -> Result<Superblock, CreateError> {
    create_for(backing, geometry, material, params, Fills::Guest)
}

/// As [`create`], for whoever fills it.
///
/// # Errors
/// See [`CreateError`].
pub fn create_for(
    backing: &dyn Backing,
    geometry: Geometry,
    material: &KeyMaterial,
    params: Argon2Params,
    fills: Fills,
) -> Result<Superblock, CreateError> {
    let random = |error: &dyn std::fmt::Display| CreateError::Key(error.to_string());
    let dek = Dek::generate().map_err(|error| random(&error))?;
    write(backing, geometry, &dek, fills, &|id| {
        let slot = crypto::slot::seal(material, &dek, &volume_context(id), params);
        slot.map(Some).map_err(|error| random(&error))
    })
}

/// What becomes of a new volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fills {
    /// A guest fills it: it is complete as it is.
    Guest,
    /// An import fills it: until that has ended, nobody shall take it for what it is to be.
    Import,
}

/// As [`create`], but of a key that only the caller has: no key slot is written, so whoever lost the key
/// has lost the volume.
///
/// # Errors
/// See [`CreateError`].
pub fn create_ephemeral(
    backing: &dyn Backing,
    geometry: Geometry,
    key: &Dek,
) -> Result<Superblock, CreateError> {
    write(backing, geometry, key, Fills::Guest, &|_| Ok(None))
}

type SealSlot<'a> = &'a dyn Fn(&VolumeId) -> Result<Option<[u8; SLOT_LEN]>, CreateError>;

fn write(
    backing: &dyn Backing,
    geometry: Geometry,
    dek: &Dek,
    fills: Fills,
    seal_slot: SealSlot<'_>,
) -> Result<Superblock, CreateError> {
    let need = geometry.backing_len();
    if backing.len() < need {
        let volume = geometry.volume_len();
        return Err(GeometryError::BackingTooSmall {
            have: backing.len(),
            volume,
            need,
        }
        .into());
    }
    let key_error = |error: &dyn std::fmt::Display| CreateError::Key(error.to_string());
    let mut id = VolumeId::default();
    getrandom::fill(&mut id).map_err(|error| key_error(&error))?;
    let mut chain = [0; 16];
    getrandom::fill(&mut chain).map_err(|error| key_error(&error))?;
    let key = SessionKey::generate().map_err(|error| key_error(&error))?;
    let wrapped = dek
        .wrap_session(&key, &session_context(&id, 1))
        .map_err(|error| key_error(&error))?;
    let mut key_slots = [[0; SLOT_LEN]; KEY_SLOTS];
    if let (Some(place), Some(slot)) = (key_slots.first_mut(), seal_slot(&id)?) {
        *place = slot;
    }
    let superblock = Superblock {
        id,
        generation: 1,
        clean: true,
        incomplete: fills == Fills::Import,
        session: 1,
        sequence: 1,
        geometry,
        log_position: 0,
        batch: 0,
        chain,
        map_root: Entry::HOLE,
        space_root: Entry::HOLE,
        adopted: 0,
        created: unix_seconds(),
        serial: default_serial(&id),
        key_slots,
        table: vec![KeyEntry {
            id: 1,
            live: 0,
            created: unix_seconds(),
            wrapped,
        }],
    };
    let blank = Buffer::zeroed(1);
    for offset in COPIES {
        backing.write_at(offset, &blank)?;
    }
    backing.sync()?;
    // Both headers and the log have their room from the start: a full file system must not
    // keep a commit from being written.
    backing.allocate(0, (LOG_START_CHUNK + geometry.log_chunks) * CHUNK_LEN)?;
    let image = superblock.seal(&Session::derive(Engine::default(), &key));
    debug_assert!(image.len().is_multiple_of(BLOCK_LEN));
    for offset in COPIES {
        backing.write_at(offset, &Buffer::copy_of(&image))?;
    }
    backing.sync()?;
    Ok(superblock)
}
