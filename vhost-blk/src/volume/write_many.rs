//! Blocking writes that follow each other quickly, on a file by some threads: an activation's checkpoint
//! after a kill writes all pages that a full log changes. What makes them seals the next
//! meanwhile, and only a few are in memory at a time: what is sealed ahead of the disk is memory that
//! has to be got, and zeroed, first.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError, mpsc};

use super::buffer::Buffer;

/// Writes under way at a time.
const THREADS: usize = 4;

/// Gives writes, byte offset and contents, to whom it is given.
pub type Make<'m> = &'m mut dyn FnMut(&mut dyn FnMut(u64, Buffer));

/// Writes to `file` what `make` makes, some of it at a time.
///
/// # Errors
/// The first that any of them met.
pub fn write_in_parallel(file: &File, make: Make<'_>) -> io::Result<()> {
    let outcome = Mutex::new(Ok(()));
    let write = |offset: u64, buffer: &Buffer| {
        if let Err(error) = file.write_all_at(buffer, offset) {
            let mut outcome = outcome.lock().unwrap_or_else(PoisonError::into_inner);
            if outcome.is_ok() {
                *outcome = Err(error);
            }
        }
    };
    let write = &write;
    let (give, take) = mpsc::sync_channel::<(u64, Buffer)>(THREADS);
    let take = &Mutex::new(take);
    std::thread::scope(|scope| {
        let next = move || take.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let work = move || {
            while let Ok((offset, buffer)) = next() {
                write(offset, &buffer);
            }
        };
        let mut started = 0;
        for _ in 0..THREADS {
            let thread = std::thread::Builder::new().name("writer".to_owned());
            // Fewer do as well.
            started += usize::from(thread.spawn_scoped(scope, work).is_ok());
        }
        make(&mut |offset, buffer| {
            if started == 0 {
                write(offset, &buffer);
            } else {
                // The receiver outlives this.
                let _ = give.send((offset, buffer));
            }
        });
        drop(give);
    });
    outcome.into_inner().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::geometry::BLOCK_LEN;

    #[test]
    fn everything_is_written_when_it_returns() {
        let file = tempfile::tempfile().expect("a file");
        let made = write_in_parallel(&file, &mut |write| {
            for index in 0..500_u64 {
                let fill = [index as u8; BLOCK_LEN];
                write((index * 7 % 500) * BLOCK_LEN as u64, Buffer::copy_of(&fill));
            }
        });
        assert!(made.is_ok());
        for index in 0..500_u64 {
            let mut block = [0; BLOCK_LEN];
            let at = (index * 7 % 500) * BLOCK_LEN as u64;
            file.read_exact_at(&mut block, at).expect("reads");
            assert_eq!(block, [index as u8; BLOCK_LEN]);
        }
    }

    #[test]
    fn a_write_that_fails_is_told_and_ends_nothing_else() {
        let named = tempfile::NamedTempFile::new().expect("a file");
        let read_only = File::open(named.path()).expect("opens");
        let failed = write_in_parallel(&read_only, &mut |write| {
            for index in 0..100 {
                write(index * BLOCK_LEN as u64, Buffer::zeroed(1));
            }
        });
        assert_eq!(failed.map_err(|e| e.raw_os_error()), Err(Some(9)));
    }
}
