use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use super::*;

/// The page as it lies in memory, read the way a debugger would.
pub(crate) fn page_bytes<T: Wipe>(locked: &Locked<T>) -> Vec<u8> {
    let mut bytes = vec![0; size_of::<Page<T>>()];
    let address = std::ptr::from_ref(locked.get()).addr() as u64;
    File::open("/proc/self/mem")
        .and_then(|mem| mem.read_exact_at(&mut bytes, address))
        .unwrap();
    bytes
}

/// Whether the kernel lists the mapping of this value as locked.
fn kernel_says_locked<T: Wipe>(locked: &Locked<T>) -> bool {
    let address = std::ptr::from_ref(locked.get()).addr();
    let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
    let mut inside = false;
    for line in smaps.lines() {
        let range = line.split(' ').next().and_then(|word| word.split_once('-'));
        if let Some((from, to)) = range
            && let (Ok(from), Ok(to)) = (
                usize::from_str_radix(from, 16),
                usize::from_str_radix(to, 16),
            )
        {
            inside = (from..to).contains(&address);
        }
        if inside && let Some(flags) = line.strip_prefix("VmFlags:") {
            return flags.split_whitespace().any(|flag| flag == "lo");
        }
    }
    panic!("{address:x} is not mapped");
}

#[test]
fn a_secret_is_alone_on_its_page() {
    let secrets = [Locked::new([1; 32]), Locked::new([2; 32])];
    let pages = secrets
        .each_ref()
        .map(|secret| std::ptr::from_ref(secret.get()).addr());
    assert!(pages.iter().all(|address| address % PAGE == 0));
    assert_ne!(pages[0], pages[1]);
}

#[test]
fn the_kernel_locks_the_page_when_we_say_so() {
    let secret = Locked::new([1; 32]);
    assert_eq!(kernel_says_locked(&secret), secret.is_locked());
}

#[test]
fn dropping_a_secret_does_not_unlock_another() {
    let (gone, stays) = (Locked::new([1; 32]), Locked::new([2; 32]));
    let before = kernel_says_locked(&stays);
    drop(gone);
    assert_eq!(kernel_says_locked(&stays), before);
}

#[test]
fn wiping_overwrites_the_secret_in_memory() {
    let mut secret = Locked::new([0; 32]);
    secret.get_mut().copy_from_slice(&[0x9c; 32]);
    // The rest of the page is padding: it may hold what others left on the heap, but never this secret.
    assert_eq!(page_bytes(&secret)[..32], [0x9c; 32]);
    secret.get_mut().wipe();
    assert_eq!(page_bytes(&secret)[..32], [0; 32]);
}

/// Notes that it was wiped.
struct Witness<'a>(&'a std::cell::Cell<u32>);

impl Wipe for Witness<'_> {
    fn wipe(&mut self) {
        self.0.set(self.0.get() + 1);
    }
}

#[test]
fn dropping_wipes_once() {
    let wipes = std::cell::Cell::new(0);
    drop(Locked::new(Witness(&wipes)));
    assert_eq!(wipes.get(), 1);
}
