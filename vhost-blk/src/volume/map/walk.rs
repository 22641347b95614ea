//! Going through all leaves in order, in bounded memory: what is here as it is, what is not read
//! and forgotten again.

use std::collections::HashMap;
use std::ops::{ControlFlow, Range};

use super::load::leaves_below;
use super::{MapTree, TOP, Want, key, place};
use crate::volume::geometry::{BLOCK_LEN, FANOUT};
use crate::volume::page::{Page, PagePlace};
use crate::volume::page_reader::{PageFault, PageReader};

/// What [`each_leaf`] comes to.
pub enum Visit<'p> {
    /// A page above the leaves, before what is below it.
    Upper(PagePlace, &'p Page),
    /// A leaf that is not all holes.
    Leaf(u64, &'p Page),
    /// A page that cannot be had, and with it these leaves.
    Lost(PagePlace, Range<u64>, PageFault),
}

/// Visits all leaves from `from` on in order, changes that are not stored yet included, until
/// `visit` says that it is enough.
pub fn each_leaf(
    map: &MapTree,
    reader: &PageReader<'_>,
    from: u64,
    visit: &mut dyn FnMut(Visit<'_>) -> ControlFlow<()>,
) -> ControlFlow<()> {
    Walk { map, reader, from }.go(place(key(TOP, 0)), &mut Fetched::default(), visit)
}

struct Walk<'w> {
    map: &'w MapTree,
    reader: &'w PageReader<'w>,
    from: u64,
}

/// Pages that were read for the walk alone, by their index.
#[derive(Default)]
struct Fetched(HashMap<u64, Result<Page, PageFault>>);

type Visitor<'v> = &'v mut dyn FnMut(Visit<'_>) -> ControlFlow<()>;

impl Walk<'_> {
    fn fetch(&self, wants: &[Want]) -> Fetched {
        let mut pages = HashMap::new();
        self.reader.read(wants, &mut |want, outcome| {
            let page = outcome.map(|bytes| {
                let mut page = Page::empty();
                if bytes.len() == BLOCK_LEN {
                    page.0.copy_from_slice(bytes);
                }
                page
            });
            pages.insert(want.place.index, page);
        });
        Fetched(pages)
    }

    /// Visits what is at and below `at`, which is here, among `fetched`, stored, or nothing.
    fn go(&self, at: PagePlace, fetched: &mut Fetched, visit: Visitor<'_>) -> ControlFlow<()> {
        if at.level == 0 && self.map.lost.contains(&at.index) {
            return visit(Visit::Lost(at, leaves_below(&at), PageFault::Damaged));
        }
        if let Some(page) = self.map.page(at) {
            return self.inside(at, page, visit);
        }
        if at.level == TOP && !self.map.root().is_hole() {
            *fetched = self.fetch(&[Want {
                place: at,
                entry: self.map.root(),
            }]);
        }
        match fetched.0.remove(&at.index) {
            Some(Ok(page)) => self.inside(at, &page, visit),
            Some(Err(fault)) => visit(Visit::Lost(at, leaves_below(&at), fault)),
            None => ControlFlow::Continue(()),
        }
    }

    fn inside(&self, at: PagePlace, page: &Page, visit: Visitor<'_>) -> ControlFlow<()> {
        if at.level == 0 {
            return visit(Visit::Leaf(at.index, page));
        }
        visit(Visit::Upper(at, page))?;
        let children: Vec<PagePlace> = (at.index * FANOUT..(at.index + 1) * FANOUT)
            .map(|index| place(key(at.level - 1, index)))
            .filter(|child| leaves_below(child).end > self.from)
            .collect();
        let wants: Vec<Want> = children
            .iter()
            .filter(|child| self.map.page(**child).is_none())
            .map(|child| Want {
                place: *child,
                entry: page.entry(child.index),
            })
            .filter(|want| !want.entry.is_hole())
            .collect();
        let mut fetched = self.fetch(&wants);
        for child in children {
            self.go(child, &mut fetched, visit)?;
        }
        ControlFlow::Continue(())
    }
}
