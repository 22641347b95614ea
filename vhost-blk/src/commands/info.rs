//! `info`: what a volume is.

use anyhow::{Context, anyhow};
use crypto::slot::{SlotInfo, describe};
use offload::cli::format_size;
use serde_json::{Value, json};

use super::open::{id_text, key, serial_text};
use crate::args::InfoArgs;
use crate::volume::backing::{Access, Backing, FileBacking};
use crate::volume::buffer::Buffer;
use crate::volume::geometry::BLOCK_LEN;
use crate::volume::recover::{RecoverError, Recovered, recover};
use crate::volume::superblock::{COPIES, Claims, Superblock, SuperblockError};

pub(super) fn run(args: &InfoArgs) -> anyhow::Result<()> {
    let material = args
        .key
        .source()
        .map(|source| key(Some(source)))
        .transpose()?;
    let backing = FileBacking::open(&args.volume, Access::Read)?;
    let info = match material {
        Some(material) => recover(&backing, &material)
            .map_err(anyhow::Error::from)
            .and_then(|recovered| verified(&recovered, &backing)),
        None => unverified(&backing),
    };
    let info = info.with_context(|| format!("cannot read the volume {}", args.volume.display()))?;
    if args.json {
        say!("{info:#}");
    } else {
        say!("{}", args.volume.display());
        print(&info, 1);
    }
    Ok(())
}

fn verified(recovered: &Recovered, backing: &FileBacking) -> anyhow::Result<Value> {
    let superblock = &recovered.superblock;
    let blocks = recovered.used_count();
    let health = recovered.copies.each_ref().map(|copy| match copy {
        Ok(generation) => format!("sound, generation {generation}"),
        Err(error) => format!("not usable: {error}"),
    });
    Ok(json!({
        "authenticated": true,
        "id": id_text(&superblock.id),
        "serial": serial_text(&superblock.serial),
        "format_version": crate::volume::superblock::VERSION,
        "size_bytes": superblock.geometry.volume_len(),
        "data_bytes": blocks * BLOCK_LEN as u64,
        "backing_bytes": backing.len(),
        "allocated_bytes": backing.allocated()?,
        "generation": superblock.generation,
        "clean": superblock.clean,
        "import_incomplete": superblock.incomplete,
        "replayed_batches": recovered.replayed,
        "damaged_pages": recovered.missing_pages(),
        "created_unix_s": superblock.created,
        "sessions": superblock.table.len(),
        "key_slots": slots(&superblock.key_slots),
        "header_copies": health,
    }))
}

/// What can be read without a key. Nobody vouches for it.
fn unverified(backing: &FileBacking) -> anyhow::Result<Value> {
    let read = |offset: u64| -> Result<Claims, String> {
        let mut block = Buffer::zeroed(1);
        backing
            .read_at(offset, &mut block)
            .map_err(|error| error.to_string())?;
        Superblock::claims(&block).map_err(|error: SuperblockError| error.to_string())
    };
    let copies = COPIES.map(read);
    let newest = copies
        .iter()
        .flatten()
        .max_by_key(|claims| claims.generation)
        .ok_or_else(|| {
            if backing.len() < COPIES[1] {
                return RecoverError::TooShort(backing.len()).into();
            }
            let text = copies[0].as_ref().err().cloned().unwrap_or_default();
            anyhow!("this is no offload volume that could be read: {text}")
        })?;
    Ok(json!({
        "authenticated": false,
        "note": "read without a key: anybody could have written this",
        "id": id_text(&newest.id),
        "serial": serial_text(&newest.serial),
        "format_version": newest.version,
        "size_bytes": newest.volume_len,
        "backing_bytes": backing.len(),
        "allocated_bytes": backing.allocated()?,
        "generation": newest.generation,
        "clean": newest.is_clean,
        "import_incomplete": newest.is_incomplete,
        "truncated": backing.len() < newest.backing_len,
        "created_unix_s": newest.created,
        "key_slots": slots(&newest.key_slots),
        "header_copies": copies.each_ref().map(|copy| match copy {
            Ok(claims) => format!("present, generation {}", claims.generation),
            Err(error) => format!("not usable: {error}"),
        }),
    }))
}

fn slots(all: &[[u8; crypto::slot::SLOT_LEN]]) -> Vec<Value> {
    let used = |slot: &&[u8; crypto::slot::SLOT_LEN]| slot.iter().any(|byte| *byte != 0);
    all.iter()
        .filter(used)
        .map(|slot| match describe(slot) {
            Some(SlotInfo {
                kind,
                argon2: Some(cost),
                ..
            }) => Value::String(format!(
                "{kind} (Argon2id, {} MiB, {} passes)",
                cost.memory_kib / 1024,
                cost.passes
            )),
            Some(SlotInfo { kind, .. }) => Value::String(kind.to_string()),
            None => Value::String("damaged".to_owned()),
        })
        .collect()
}

/// Prints JSON for people: a line a field, bytes with units.
fn print(value: &Value, depth: usize) {
    let Some(fields) = value.as_object() else {
        return;
    };
    for (name, value) in fields {
        let label = name.trim_end_matches("_bytes").replace('_', " ");
        let text = match value {
            Value::Number(number) if name.ends_with("_bytes") => {
                format_size(number.as_u64().unwrap_or(0))
            }
            Value::Bool(is_so) => if *is_so { "yes" } else { "no" }.to_owned(),
            Value::String(text) => text.clone(),
            Value::Array(list) => list
                .iter()
                .map(|item| item.as_str().unwrap_or_default())
                .collect::<Vec<_>>()
                .join("; "),
            other => other.to_string(),
        };
        say!("{:depth$}{label:20}{text}", "", depth = depth * 2);
    }
}
