//! The key slot: 256 bytes in a volume's superblock that hold its key, sealed.
//!
//! ```text
//!  offset  bytes
//!       0      2  kind: 1 = key file, 2 = passphrase
//!       2      2  version: 1
//!       4      4  Argon2id memory in KiB   \
//!       8      4  Argon2id passes           } zero for a key file
//!      12      4  Argon2id lanes           /
//!      16     32  salt
//!      48     60  wrapped DEK (nonce, encrypted key, tag)
//!     108    148  zero
//! ```
//!
//! Integers are little-endian. A slot of zeros is empty.
//!
//! The KEK is HKDF-SHA256(salt, key file) or HKDF-SHA256(salt, Argon2id(salt, passphrase)), with a label each;
//! Argon2 is version 0x13 (RFC 9106) with a 32-byte output and neither secret nor associated data.
//! The wrapped DEK authenticates the first 48 bytes and the caller's context, so no bit of a slot changes
//! unnoticed, and a slot cannot be moved to another place or volume.
//!
//! # What a stranger's disk can do
//!
//! The parameters are used before anything is authenticated; it cannot be otherwise. They are bounded here,
//! by [`Argon2Params::MAX`], so that a hostile slot costs at most 1 GiB and some seconds. Lowering
//! them on disk does not help an attacker: the KEK comes out different, and the slot does not open.

use argon2::{Algorithm, Argon2, Block, Params, Version};
use zeroize::Zeroize;

use crate::keys::{Dek, Kek, RandomError, Secret32, WRAPPED_LEN, Wrapped, label, random};
use crate::source::KeyMaterial;

/// Length of a slot in bytes.
pub const SLOT_LEN: usize = 256;

const KIND_KEY_FILE: u16 = 1;
const KIND_PASSPHRASE: u16 = 2;
const VERSION: u16 = 1;
const SALT_LEN: usize = 32;
const HEADER_LEN: usize = 16 + SALT_LEN;
const REST_LEN: usize = SLOT_LEN - HEADER_LEN - WRAPPED_LEN;

const _: () = assert!(HEADER_LEN == 48 && WRAPPED_LEN == 60 && REST_LEN == 148);

/// The cost of turning a passphrase into a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Argon2Params {
    /// Memory in KiB.
    pub memory_kib: u32,
    /// Passes over the memory.
    pub passes: u32,
    /// Lanes.
    pub lanes: u32,
}

impl Argon2Params {
    /// The most that a slot may ask for: 1 GiB, 16 passes, 8 lanes.
    pub const MAX: Self = Self {
        memory_kib: 1024 * 1024,
        passes: 16,
        lanes: 8,
    };

    /// The least that Argon2 can do, for tests and benches: instant, and worthless against guessing.
    #[must_use]
    pub const fn fast_for_tests() -> Self {
        Self {
            memory_kib: 32,
            passes: 1,
            lanes: 1,
        }
    }

    /// Within Argon2's own lower limits (RFC 9106, 3.1) and our upper ones?
    const fn is_bearable(&self) -> bool {
        self.lanes >= 1
            && self.lanes <= Self::MAX.lanes
            && self.passes >= 1
            && self.passes <= Self::MAX.passes
            && self.memory_kib >= 8 * self.lanes
            && self.memory_kib <= Self::MAX.memory_kib
    }
}

/// RFC 9106, section 4, the second recommended option (64 MiB, 3 passes), but with one lane instead of four:
/// lanes are computed one after the other here, and they would only help a guesser with many cores.
impl Default for Argon2Params {
    fn default() -> Self {
        Self {
            memory_kib: 64 * 1024,
            passes: 3,
            lanes: 1,
        }
    }
}

/// What opens a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotKind {
    /// A key file.
    KeyFile,
    /// A passphrase.
    Passphrase,
}

impl SlotKind {
    fn of(material: &KeyMaterial) -> Self {
        match material {
            KeyMaterial::File(_) => Self::KeyFile,
            KeyMaterial::Passphrase(_) => Self::Passphrase,
        }
    }

    const fn code(self) -> u16 {
        match self {
            Self::KeyFile => KIND_KEY_FILE,
            Self::Passphrase => KIND_PASSPHRASE,
        }
    }
}

impl std::fmt::Display for SlotKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::KeyFile => "key file",
            Self::Passphrase => "passphrase",
        })
    }
}

/// What a slot says about itself. Not authenticated: for people to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotInfo {
    /// What opens it.
    pub kind: SlotKind,
    /// Version of the layout.
    pub version: u16,
    /// The passphrase's cost; `None` for a key file.
    pub argon2: Option<Argon2Params>,
}

/// Why a slot was not made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// No randomness for salt or nonce.
    #[error(transparent)]
    Random(#[from] RandomError),
    /// The cost is outside what [`open`] accepts.
    #[error(
        "Argon2 parameters out of bounds: {0:?}; at least 8 KiB per lane and 1 pass, at most {max:?}",
        max = Argon2Params::MAX
    )]
    Params(Argon2Params),
    /// Argon2's memory could not be allocated.
    #[error("no memory for Argon2: {0} KiB are needed; choose a smaller cost")]
    NoMemory(u32),
}

/// Why a slot was not opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SlotError {
    /// The slot is all zeros.
    #[error("this key slot is empty")]
    Empty,
    /// The key does not fit, or the slot was changed. Which of them cannot be told.
    #[error("wrong key or passphrase for this volume (or its key slot is damaged)")]
    WrongKey,
    /// The slot wants the other kind of key.
    #[error("{}", match .sealed_with {
        SlotKind::KeyFile => "this volume was sealed with a key file; give --key-file",
        SlotKind::Passphrase => "this volume was sealed with a passphrase; give --passphrase-file",
    })]
    KindMismatch {
        /// What the slot was sealed with.
        sealed_with: SlotKind,
    },
    /// A kind or version from the future, or damage.
    #[error(
        "key slot of kind {kind}, version {version} is not known here: \
         it was made by a newer program, or is damaged"
    )]
    Unsupported {
        /// The kind found.
        kind: u16,
        /// The version found.
        version: u16,
    },
    /// Bytes that must be zero are not.
    #[error("the key slot is damaged: bytes that must be zero are not")]
    Damaged,
    /// The slot asks for less than Argon2 can do or for more than we grant.
    #[error(
        "the key slot asks for a passphrase cost out of bounds ({0:?}; at most {max:?}): \
         it is damaged or hostile",
        max = Argon2Params::MAX
    )]
    Params(Argon2Params),
    /// Argon2's memory could not be allocated.
    #[error("no memory to check the passphrase: {0} KiB are needed")]
    NoMemory(u32),
}

/// The slot taken apart; nothing in it is authenticated yet.
struct Parsed {
    info: SlotInfo,
    header: [u8; HEADER_LEN],
    salt: [u8; SALT_LEN],
    wrapped: Wrapped,
}

/// Seals `dek` under `material` for the place that `context` names (volume id, slot number).
/// `params` is the cost of a passphrase; a key file ignores it.
///
/// # Errors
///
/// [`SealError`].
pub fn seal(
    material: &KeyMaterial,
    dek: &Dek,
    context: &[u8],
    params: Argon2Params,
) -> Result<[u8; SLOT_LEN], SealError> {
    let mut salt = [0; SALT_LEN];
    random(&mut salt)?;
    let kind = SlotKind::of(material);
    let argon2 = (kind == SlotKind::Passphrase).then_some(params);
    if argon2.is_some_and(|params| !params.is_bearable()) {
        return Err(SealError::Params(params));
    }
    let header = header(kind, argon2, &salt);
    let kek =
        kek(material, argon2.as_ref(), &salt).map_err(|NoMemory(kib)| SealError::NoMemory(kib))?;
    let wrapped = kek.wrap(dek, &bound(&header, context))?;

    let mut slot = [0; SLOT_LEN];
    let (head, rest) = slot.split_at_mut(HEADER_LEN);
    head.copy_from_slice(&header);
    let (body, _zero) = rest.split_at_mut(WRAPPED_LEN);
    body.copy_from_slice(wrapped.as_bytes());
    Ok(slot)
}

/// Opens a slot that [`seal`] made for the same `context`. With a passphrase this takes as long as the slot's
/// Argon2 cost says, within [`Argon2Params::MAX`].
///
/// # Errors
///
/// [`SlotError`], which says what to do about it.
pub fn open(
    bytes: &[u8; SLOT_LEN],
    material: &KeyMaterial,
    context: &[u8],
) -> Result<Dek, SlotError> {
    let slot = parse(bytes)?;
    if slot.info.kind != SlotKind::of(material) {
        return Err(SlotError::KindMismatch {
            sealed_with: slot.info.kind,
        });
    }
    let kek = kek(material, slot.info.argon2.as_ref(), &slot.salt)
        .map_err(|NoMemory(kib)| SlotError::NoMemory(kib))?;
    kek.unwrap_dek(&slot.wrapped, &bound(&slot.header, context))
        .map_err(|_| SlotError::WrongKey)
}

/// What a slot says about itself, or `None` if it is empty or not sound.
#[must_use]
pub fn describe(bytes: &[u8; SLOT_LEN]) -> Option<SlotInfo> {
    parse(bytes).ok().map(|slot| slot.info)
}

/// The one place where a slot's bytes are looked at.
fn parse(bytes: &[u8; SLOT_LEN]) -> Result<Parsed, SlotError> {
    if bytes.iter().all(|byte| *byte == 0) {
        return Err(SlotError::Empty);
    }
    let mut rest = bytes.as_slice();
    let kind = u16::from_le_bytes(take(&mut rest)?);
    let version = u16::from_le_bytes(take(&mut rest)?);
    let params = Argon2Params {
        memory_kib: u32::from_le_bytes(take(&mut rest)?),
        passes: u32::from_le_bytes(take(&mut rest)?),
        lanes: u32::from_le_bytes(take(&mut rest)?),
    };
    let salt = take(&mut rest)?;
    let wrapped = Wrapped::from_bytes(take(&mut rest)?);

    let (kind, argon2) = match (kind, version) {
        (KIND_KEY_FILE, VERSION) => (SlotKind::KeyFile, None),
        (KIND_PASSPHRASE, VERSION) => (SlotKind::Passphrase, Some(params)),
        (kind, version) => return Err(SlotError::Unsupported { kind, version }),
    };
    let unused = Argon2Params {
        memory_kib: 0,
        passes: 0,
        lanes: 0,
    };
    if rest.iter().any(|byte| *byte != 0) || (argon2.is_none() && params != unused) {
        return Err(SlotError::Damaged);
    }
    if argon2.is_some_and(|params| !params.is_bearable()) {
        return Err(SlotError::Params(params));
    }
    Ok(Parsed {
        info: SlotInfo {
            kind,
            version,
            argon2,
        },
        header: header(kind, argon2, &salt),
        salt,
        wrapped,
    })
}

/// Cuts the next `N` bytes off `rest`.
fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], SlotError> {
    let (head, tail) = rest.split_first_chunk().ok_or(SlotError::Damaged)?;
    *rest = tail;
    Ok(*head)
}

/// The first 48 bytes of a slot.
fn header(kind: SlotKind, argon2: Option<Argon2Params>, salt: &[u8; SALT_LEN]) -> [u8; HEADER_LEN] {
    let mut header = [0; HEADER_LEN];
    header[0..2].copy_from_slice(&kind.code().to_le_bytes());
    header[2..4].copy_from_slice(&VERSION.to_le_bytes());
    if let Some(params) = argon2 {
        header[4..8].copy_from_slice(&params.memory_kib.to_le_bytes());
        header[8..12].copy_from_slice(&params.passes.to_le_bytes());
        header[12..16].copy_from_slice(&params.lanes.to_le_bytes());
    }
    header[16..].copy_from_slice(salt);
    header
}

/// What the wrapped DEK authenticates besides itself. The header has a fixed length, so this is unambiguous.
fn bound(header: &[u8; HEADER_LEN], context: &[u8]) -> Vec<u8> {
    [header.as_slice(), context].concat()
}

struct NoMemory(u32);

fn kek(
    material: &KeyMaterial,
    argon2: Option<&Argon2Params>,
    salt: &[u8; SALT_LEN],
) -> Result<Kek, NoMemory> {
    let derived = match material {
        KeyMaterial::File(key) => key.derive(Some(salt), label::KEK_FROM_KEY_FILE),
        KeyMaterial::Passphrase(passphrase) => {
            // Callers pair a passphrase with parameters.
            let params = argon2.copied().unwrap_or_default();
            stretch(passphrase, salt, params)?.derive(Some(salt), label::KEK_FROM_PASSPHRASE)
        }
    };
    Ok(Kek::from_secret(derived))
}

/// Argon2id with memory of our own, so that a lack of it is an error and not an abort, and it is wiped.
fn stretch(passphrase: &[u8], salt: &[u8], params: Argon2Params) -> Result<Secret32, NoMemory> {
    let Argon2Params {
        memory_kib,
        passes,
        lanes,
    } = params;
    let params = Params::new(memory_kib, passes, lanes, Some(32))
        .expect("is_bearable keeps within Argon2's limits");
    let mut memory = Vec::new();
    memory
        .try_reserve_exact(params.block_count())
        .map_err(|_| NoMemory(memory_kib))?;
    memory.resize(params.block_count(), Block::new());
    let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
    let stretched = Secret32::try_fill(|key| {
        argon2.hash_password_into_with_memory(passphrase, salt, key, &mut memory)
    });
    memory.iter_mut().for_each(Zeroize::zeroize);
    Ok(stretched
        .expect("a passphrase of at most 4 KiB and a 32 byte salt are within Argon2's limits"))
}

#[cfg(test)]
mod tests;
