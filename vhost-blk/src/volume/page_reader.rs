//! Blocking reads of pages, many at a time: for opening, replay, activation and the tools.

use super::backing::Backing;
use super::geometry::{Geometry, Slot};
use super::map::Want;
use super::page::Page;
use super::sealing::Keyring;
use super::superblock::VolumeId;

/// Why a page could not be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageFault {
    /// It does not authenticate, or its entry names an impossible place.
    Damaged,
    /// The backing failed: nothing can be said of the page.
    Unreadable,
}

impl std::fmt::Display for PageFault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Damaged => "does not authenticate",
            Self::Unreadable => "cannot be read from the backing",
        })
    }
}

/// What is to be told of each page: its opened bytes, or why there are none.
pub type EachPage<'e> = &'e mut dyn FnMut(&Want, Result<&[u8], PageFault>);

/// Reads pages of a volume that nobody writes to meanwhile.
#[derive(Clone, Copy)]
pub struct PageReader<'b> {
    /// Where from.
    pub backing: &'b dyn Backing,
    /// The volume's sessions.
    pub keyring: &'b Keyring,
    /// The volume.
    pub id: VolumeId,
    /// Its sizes.
    pub geometry: Geometry,
}

impl PageReader<'_> {
    /// Reads and authenticates pages. `each` is given every one of them once, in any order.
    pub fn read(&self, wants: &[Want], each: EachPage<'_>) {
        let mut possible = Vec::with_capacity(wants.len());
        for want in wants {
            let has_session = self.keyring.get(want.entry.session()).is_some();
            if has_session && self.geometry.is_data_slot(want.entry.slot()) {
                possible.push(want);
            } else {
                each(want, Err(PageFault::Damaged));
            }
        }
        let slots: Vec<Slot> = possible.iter().map(|want| want.entry.slot()).collect();
        self.backing.read_many(&slots, &mut |index, outcome| {
            let Some(want) = possible.get(index) else {
                return;
            };
            let session = self.keyring.get(want.entry.session());
            match (outcome, session) {
                (Ok(bytes), Some(session)) => {
                    let opened =
                        Page::open_in_place(bytes, want.place, &self.id, session, &want.entry);
                    match opened {
                        Ok(()) => each(want, Ok(bytes)),
                        Err(_) => each(want, Err(PageFault::Damaged)),
                    }
                }
                (Err(_), _) => each(want, Err(PageFault::Unreadable)),
                (_, None) => each(want, Err(PageFault::Damaged)),
            }
        });
    }
}
