//! Opening a volume with its key, as every subcommand does it.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail};
use crypto::keys::Dek;
use crypto::source::{KeyMaterial, KeySource};

use crate::args::KeyArgs;
use crate::volume::backing::{Access, FileBacking};
use crate::volume::create::create_ephemeral;
use crate::volume::geometry::Geometry;
use crate::volume::recover::{Recovered, recover_with};
use crate::volume::superblock::{SERIAL_LEN, VolumeId};

/// Reads the key.
///
/// # Errors
/// No source, or one that is refused.
pub fn key(source: Option<KeySource>) -> anyhow::Result<KeyMaterial> {
    // clap asks for one; this is for callers that are not clap.
    let source = source.context("give --key-file or --passphrase-file")?;
    Ok(source.load()?)
}

/// Opens and recovers a volume. The key is read first: waiting for a lock, or a long recovery,
/// only to find that the key is missing would be a nuisance.
///
/// # Errors
/// The key, the backing or what it holds is not as it should be.
pub fn volume(
    path: &Path,
    source: Option<KeySource>,
    access: Access,
) -> anyhow::Result<(Arc<FileBacking>, Recovered)> {
    volume_with(path, source, access, None)
}

/// As [`volume`], with `cache` bytes of memory for the map.
///
/// # Errors
/// As [`volume`], or the memory is too little.
pub fn volume_with(
    path: &Path,
    source: Option<KeySource>,
    access: Access,
    cache: Option<u64>,
) -> anyhow::Result<(Arc<FileBacking>, Recovered)> {
    let (backing, recovered) = any_volume(path, source, access, cache)?;
    if recovered.superblock.incomplete {
        bail!(
            "{}: the import into this volume has not ended, so parts of the image are missing; run \
             `vhost-blk import --force` again",
            path.display()
        );
    }
    Ok((backing, recovered))
}

/// As [`volume`], also one that an import did not finish.
///
/// # Errors
/// The key, the backing or what it holds is not as it should be.
pub fn any_volume(
    path: &Path,
    source: Option<KeySource>,
    access: Access,
    cache: Option<u64>,
) -> anyhow::Result<(Arc<FileBacking>, Recovered)> {
    let material = key(source)?;
    let backing = FileBacking::open(path, access)?;
    let recovered = recover_with(&backing, &material, cache)
        .with_context(|| format!("cannot open the volume {}", path.display()))?;
    Ok((Arc::new(backing), recovered))
}

/// Makes a volume of `size` bytes at `path` whose key only this process has.
///
/// # Errors
/// The size is impossible, the place is taken, or the backing fails.
pub(super) fn ephemeral(
    path: &Path,
    size: u64,
    cache: Option<u64>,
) -> anyhow::Result<(Arc<FileBacking>, Recovered)> {
    // Before anything is made.
    let geometry = Geometry::for_volume(size)?;
    let failed = || format!("cannot make an ephemeral volume in {}", path.display());
    let mut backing = FileBacking::ephemeral(path)?;
    backing
        .set_len(geometry.backing_len())
        .with_context(failed)?;
    let key = Dek::generate()?;
    create_ephemeral(&backing, geometry, &key).with_context(failed)?;
    let recovered = recover_with(&backing, &key, cache).with_context(failed)?;
    Ok((Arc::new(backing), recovered))
}

/// A volume's id as people see it.
pub fn id_text(id: &VolumeId) -> String {
    uuid::Uuid::from_bytes(*id).to_string()
}

/// A serial number without its padding. It may be a stranger's, and goes to terminals and logs: what
/// is not printable ASCII is shown as `?`.
pub fn serial_text(serial: &[u8; SERIAL_LEN]) -> String {
    let text = serial.iter().take_while(|byte| **byte != 0);
    text.map(|byte| match byte {
        b' '..=b'~' => char::from(*byte),
        _ => '?',
    })
    .collect()
}

/// Refuses to write over the key that the command was given.
pub(super) fn spare_the_key(key: &KeyArgs, target: &Path) -> anyhow::Result<()> {
    let identity = |path: &Path| std::fs::metadata(path).map(|m| (m.dev(), m.ino()));
    let Ok(target_is) = identity(target) else {
        return Ok(());
    };
    for file in [&key.key_file, &key.passphrase_file].into_iter().flatten() {
        if identity(file).is_ok_and(|key_is| key_is == target_is) {
            bail!(
                "{} is the key itself, which would be lost; give another name",
                target.display()
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_serial_number_cannot_write_to_a_terminal() {
        assert_eq!(serial_text(b"vol-0123456789abcdef"), "vol-0123456789abcdef");
        assert_eq!(serial_text(b"v\0lost\0\0\0\0\0\0\0\0\0\0\0\0\0\0"), "v");
        let hostile = serial_text(b"\x1b]0;owned\x07\r\n\xff\x9b2J \x7f~~");
        assert_eq!(hostile, "?]0;owned?????2J ?~~");
    }
}
