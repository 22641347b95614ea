//! Sealed 4 KiB pages: the nodes of the map tree and of the space tree.
//!
//! A page's entry (where it is, what it authenticates as) stands in its parent, the root's in
//! the superblock. So an old version of a page, or a page of another place, does not fit what
//! its parent says: that is what detects replay. Its associated data is the volume, the tree, the
//! level and the index, so it fits only where it belongs.
//!
//! Map leaves hold [`Entry`]s of blocks, space leaves 32-byte bitmaps of chunks, pages above
//! hold [`Entry`]s of pages.

use crypto::aead::AuthError;
use crypto::session::Session;

use super::entry::{ENTRY_LEN, Entry};
use super::geometry::{BLOCK_LEN, FANOUT, MAP_LEVELS, SPACE_LEVELS};
use super::superblock::VolumeId;

/// Which tree a page belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TreeKind {
    /// Block to entry.
    Map,
    /// Chunk to bitmap of its used data slots.
    Space,
}

impl TreeKind {
    /// Levels, leaves included.
    pub const fn levels(self) -> usize {
        match self {
            Self::Map => MAP_LEVELS,
            Self::Space => SPACE_LEVELS,
        }
    }
}

/// Where in its tree a page belongs. Level 0 is the leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PagePlace {
    /// Its tree.
    pub tree: TreeKind,
    /// Its level.
    pub level: usize,
    /// Its index in the level.
    pub index: u64,
}

impl PagePlace {
    fn associated(self, id: &VolumeId) -> [u8; 28] {
        let mut data = [0; 28];
        data[..16].copy_from_slice(id);
        data[16] = match self.tree {
            TreeKind::Map => 1,
            TreeKind::Space => 2,
        };
        data[17] = self.level as u8;
        data[20..].copy_from_slice(&self.index.to_le_bytes());
        data
    }
}

impl std::fmt::Display for PagePlace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let tree = match self.tree {
            TreeKind::Map => "map",
            TreeKind::Space => "space",
        };
        write!(f, "{tree} page {} of level {}", self.index, self.level)
    }
}

/// 4 KiB of 128 entries or bitmaps.
#[derive(Clone, PartialEq, Eq)]
pub struct Page(pub(crate) Box<[u8; BLOCK_LEN]>);

impl Page {
    /// All holes.
    pub fn empty() -> Self {
        Self(Box::new([0; BLOCK_LEN]))
    }

    /// Whether every entry is a hole: such a page is not stored.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|byte| *byte == 0)
    }

    /// Field `index % 128`.
    pub fn field(&self, index: u64) -> &[u8; ENTRY_LEN] {
        let at = (index % FANOUT) as usize * ENTRY_LEN;
        self.0[at..at + ENTRY_LEN]
            .first_chunk()
            .expect("a field is as long as an entry")
    }

    /// Field `index % 128`.
    pub fn field_mut(&mut self, index: u64) -> &mut [u8; ENTRY_LEN] {
        let at = (index % FANOUT) as usize * ENTRY_LEN;
        self.0[at..at + ENTRY_LEN]
            .first_chunk_mut()
            .expect("a field is as long as an entry")
    }

    /// Entry `index % 128`.
    pub fn entry(&self, index: u64) -> Entry {
        Entry::from_bytes(self.field(index))
    }

    /// Replaces entry `index % 128`.
    pub fn set_entry(&mut self, index: u64, entry: Entry) {
        *self.field_mut(index) = entry.to_bytes();
    }

    /// Writes the sealed page into `out` and returns its tag.
    pub fn seal_into(
        &self,
        out: &mut [u8],
        place: PagePlace,
        id: &VolumeId,
        session: &Session,
        sequence: u64,
    ) -> crypto::aead::Tag {
        out.copy_from_slice(&self.0[..]);
        session.page.seal(sequence, &place.associated(id), out)
    }

    /// Opens a stored page as what `entry` says it is.
    ///
    /// # Errors
    /// It is not that page in that version.
    pub fn open(
        stored: &[u8],
        place: PagePlace,
        id: &VolumeId,
        session: &Session,
        entry: &Entry,
    ) -> Result<Self, AuthError> {
        let mut page = Self::empty();
        let stored = stored.get(..BLOCK_LEN).ok_or(AuthError)?;
        page.0.copy_from_slice(stored);
        Self::open_in_place(&mut page.0[..], place, id, session, entry)?;
        Ok(page)
    }

    /// As [`Page::open`], where the stored page lies. On failure it is wiped.
    ///
    /// # Errors
    /// It is not that page in that version.
    pub fn open_in_place(
        stored: &mut [u8],
        place: PagePlace,
        id: &VolumeId,
        session: &Session,
        entry: &Entry,
    ) -> Result<(), AuthError> {
        session
            .page
            .open(entry.sequence(), &place.associated(id), stored, &entry.tag)
    }

    /// The entries of an opened page's bytes.
    pub fn entries(bytes: &[u8]) -> impl Iterator<Item = Entry> {
        bytes
            .chunks_exact(ENTRY_LEN)
            .filter_map(|field| field.first_chunk().map(Entry::from_bytes))
    }
}

impl std::fmt::Debug for Page {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Page")
    }
}
