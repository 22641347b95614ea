//! The sealed volume.
//!
//! | module | holds |
//! |---|---|
//! | [`geometry`] | sizes, blocks, slots, chunks |
//! | [`superblock`], [`page`], [`log`], [`ring`], [`entry`] | the stored formats, pure |
//! | [`map`], [`tree`], `space`, `ranges` | map, space tree, allocator, write ranges, in memory |
//! | [`page_reader`], `read_many`, `write_many` | parallel reads of pages and slots, and writes |
//! | [`recover`] | from a backing to an open volume |
//! | [`repair`] | an opened volume with damage to a sound one |
//! | [`engine`] | the running volume: a state machine without I/O |
//! | [`backing`] | files and devices |
//!
//! What it guarantees, against whom, and which test shows it, is in `docs/volume-format.md`.

pub mod backing;
pub mod buffer;
pub mod create;
pub mod engine;
pub mod entry;
pub mod geometry;
pub mod log;
pub mod map;
mod mutant;
pub mod page;
pub mod page_reader;
mod ranges;
mod read_many;
pub mod recover;
pub mod repair;
pub mod ring;
pub mod sealing;
mod slot_reader;
mod space;
pub mod superblock;
pub mod tree;
mod write_many;

#[cfg(test)]
mod format_tests;
#[cfg(test)]
mod sim;
