//! `create`.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::Context;
use crypto::slot::Argon2Params;
use crypto::source::KeyMaterial;
use offload::cli::format_size;

use super::open::{id_text, key, serial_text, spare_the_key};
use crate::args::CreateArgs;
use crate::volume::backing::{Backing, FileBacking};
use crate::volume::create::{Fills, create_for};
use crate::volume::geometry::Geometry;
use crate::volume::superblock::Superblock;

pub(super) fn run(args: &CreateArgs) -> anyhow::Result<()> {
    spare_the_key(&args.key, &args.volume)?;
    let material = key(args.key.source())?;
    let (_, superblock, unfinished) = make(
        &args.volume,
        args.size,
        args.spare,
        &material,
        args.force,
        Fills::Guest,
    )?;
    unfinished.keep()?;
    say!(
        "{}: a new volume of {}\n  id      {}\n  serial  {}",
        args.volume.display(),
        format_size(superblock.geometry.volume_len()),
        id_text(&superblock.id),
        serial_text(&superblock.serial),
    );
    Ok(())
}

/// A file that did not exist before: removed again when it is dropped, unless it is kept.
#[derive(Debug)]
pub(super) struct Unfinished {
    path: PathBuf,
    is_new: bool,
}

impl Unfinished {
    /// For what is about to be made at `path`.
    pub(super) fn at(path: &Path) -> Self {
        Self {
            path: path.into(),
            is_new: !path.exists(),
        }
    }

    /// It is finished: its name is to survive a power cut as well.
    pub(super) fn keep(mut self) -> anyhow::Result<()> {
        if !std::mem::replace(&mut self.is_new, false) {
            return Ok(());
        }
        let folder = match self.path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        File::open(folder)
            .and_then(|folder| folder.sync_all())
            .with_context(|| format!("cannot make {} durable", folder.display()))
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if self.is_new {
            // What failed before is what the user has to know.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Makes an empty volume of `size` bytes; `None`: of all that the device has.
///
/// # Errors
/// The size is impossible, something is there already, or the backing fails.
pub(super) fn make(
    path: &Path,
    size: Option<u64>,
    spare: u64,
    material: &KeyMaterial,
    may_overwrite: bool,
    fills: Fills,
) -> anyhow::Result<(FileBacking, Superblock, Unfinished)> {
    // Before anything is touched.
    let asked = size
        .map(|len| Geometry::with_spare(len, spare))
        .transpose()?;
    if asked.is_none() && !path.exists() {
        anyhow::bail!(
            "{} is not there: give --size to make a file",
            path.display()
        );
    }
    let unfinished = Unfinished::at(path);
    let mut backing = FileBacking::create(path, may_overwrite)?;
    let geometry = match asked {
        Some(geometry) => geometry,
        None if backing.is_device() => Geometry::largest_in(backing.len(), spare)?,
        None => anyhow::bail!("{} is a file: give --size", path.display()),
    };
    backing
        .set_len(geometry.backing_len())
        .with_context(|| format!("cannot make {} long enough", path.display()))?;
    let superblock = create_for(&backing, geometry, material, Argon2Params::default(), fills)
        .with_context(|| format!("cannot make a volume in {}", path.display()))?;
    Ok((backing, superblock, unfinished))
}
