//! The volume's backing file as an attacker sees it: bytes.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use anyhow::Context as _;

/// What a volume reads and writes at once.
const SLOT_BYTES: u64 = 4096;
/// Headers and log come before it.
const DATA_START: u64 = 3 << 20;
const CHUNK_BYTES: usize = 1 << 20;

/// See the module.
pub(super) struct Backing {
    file: File,
}

impl Backing {
    pub(super) fn open(path: &Path) -> anyhow::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .with_context(|| format!("cannot open {}", path.display()))?;
        Ok(Self { file })
    }

    /// Bytes that are not zero blocks, and how often `needle` is among all.
    pub(super) fn count(&self, needle: &[u8]) -> anyhow::Result<(u64, usize)> {
        let overlap = needle.len().saturating_sub(1);
        let len = self.file.metadata()?.len();
        let (mut used, mut found, mut at) = (0, 0, 0);
        let mut buffer = vec![0; CHUNK_BYTES + overlap];
        while at < len {
            let got = read_full(&self.file, &mut buffer, at)?;
            let bytes = &buffer[..got];
            found += bytes
                .windows(needle.len().max(1))
                .filter(|w| *w == needle)
                .count();
            let fresh = &bytes[..got.min(CHUNK_BYTES)];
            for slot in fresh.chunks(SLOT_BYTES as usize) {
                used += if slot.iter().any(|&b| b != 0) {
                    slot.len() as u64
                } else {
                    0
                };
            }
            at += CHUNK_BYTES as u64;
        }
        Ok((used, found))
    }

    /// Offsets in the middle of slots that hold something, spread over the data.
    pub(super) fn candidates(&self, count: usize) -> anyhow::Result<Vec<u64>> {
        let len = self.file.metadata()?.len();
        let mut slots = Vec::new();
        let mut buffer = vec![0; SLOT_BYTES as usize];
        let mut at = DATA_START;
        while at + SLOT_BYTES <= len {
            self.file.read_exact_at(&mut buffer, at)?;
            if buffer.iter().any(|&b| b != 0) {
                slots.push(at + SLOT_BYTES / 2);
            }
            at += SLOT_BYTES;
        }
        let step = (slots.len() / count.max(1)).max(1);
        Ok(slots
            .into_iter()
            .skip(step / 2)
            .step_by(step)
            .take(count)
            .collect())
    }

    /// Flips the lowest bit of the byte at `at`.
    pub(super) fn flip(&self, at: u64) -> anyhow::Result<()> {
        let mut byte = [0];
        self.file.read_exact_at(&mut byte, at)?;
        byte[0] ^= 1;
        self.file.write_all_at(&byte, at)?;
        // The card reads around the page cache.
        self.file.sync_data()?;
        Ok(())
    }
}

fn read_full(file: &File, buffer: &mut [u8], at: u64) -> std::io::Result<usize> {
    let mut got = 0;
    while got < buffer.len() {
        match file.read_at(&mut buffer[got..], at + got as u64)? {
            0 => break,
            n => got += n,
        }
    }
    Ok(got)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backing(content: &[(u64, &[u8])], len: u64) -> (tempfile::TempDir, Backing) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let file = File::create(&path).unwrap();
        file.set_len(len).unwrap();
        for (at, bytes) in content {
            file.write_all_at(bytes, *at).unwrap();
        }
        (dir, Backing::open(&path).unwrap())
    }

    #[test]
    fn a_text_is_found_once_wherever_it_lies() {
        let border = CHUNK_BYTES as u64;
        for at in [
            0,
            5,
            border - 6,
            border - 5,
            border - 1,
            border,
            3 * border - 6,
        ] {
            let (_dir, backing) = backing(&[(at, b"secret")], 3 * border);
            assert_eq!(backing.count(b"secret").unwrap().1, 1, "at {at}");
        }
        let (_dir, backing) = backing(&[(1, b"secre")], 3 * border);
        assert_eq!(backing.count(b"secret").unwrap(), (SLOT_BYTES, 0));
    }

    #[test]
    fn only_slots_with_something_in_them_are_candidates() {
        let used: Vec<(u64, &[u8])> = (0..100)
            .map(|i| (DATA_START + i * 2 * SLOT_BYTES, &b"x"[..]))
            .collect();
        let (_dir, backing) = backing(&used, DATA_START + 300 * SLOT_BYTES);
        let candidates = backing.candidates(5).unwrap();
        assert_eq!(candidates.len(), 5);
        assert!(
            candidates
                .iter()
                .all(|at| (at - DATA_START) % (2 * SLOT_BYTES) == 2048)
        );
        assert!(candidates.windows(2).all(|w| w[0] < w[1]));
    }

    #[test]
    fn flipping_twice_changes_nothing() {
        let (_dir, backing) = backing(&[(7, b"a")], 4096);
        backing.flip(7).unwrap();
        assert_eq!(backing.count(b"a").unwrap().1, 0);
        backing.flip(7).unwrap();
        assert_eq!(backing.count(b"a").unwrap().1, 1);
    }
}
