use std::os::fd::OwnedFd;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::Bytes;

use super::*;

fn memfd(len: u64) -> OwnedFd {
    let fd = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, len).unwrap();
    fd
}

fn info(guest_phys_addr: u64, size: u64) -> RegionInfo {
    RegionInfo {
        guest_phys_addr,
        size,
        userspace_addr: 0x7000_0000_0000 + guest_phys_addr,
        mmap_offset: 0,
    }
}

#[test]
fn frontend_addresses_translate_to_guest_physical_ones() {
    let map = MemoryMap::from_regions([
        (info(0, 0x10000), memfd(0x10000)),
        (info(0x10_0000, 0x1000), memfd(0x1000)),
    ])
    .unwrap();
    assert_eq!(map.user_to_guest(0x7000_0000_0000), Some(0));
    assert_eq!(map.user_to_guest(0x7000_0010_0fff), Some(0x10_0fff));
    assert_eq!(map.user_to_guest(0x7000_0010_1000), None);
    assert_eq!(map.user_to_guest(0x6fff_ffff_ffff), None);
}

#[test]
fn a_short_file_asks_for_share_on() {
    let error = MemoryMap::from_regions([(info(0, 0x2000), memfd(0x1000))]).unwrap_err();
    assert!(error.to_string().contains("share=on"), "{error}");
    let mut behind = info(0, 0x1000);
    behind.mmap_offset = 0x1000;
    let error = MemoryMap::from_regions([(behind, memfd(0x1000))]).unwrap_err();
    assert!(matches!(
        error,
        MemoryError::FileTooShort { needed: 0x2000, .. }
    ));
}

#[test]
fn unsound_regions_are_refused_and_the_map_stays_as_it_was() {
    let mut map = MemoryMap::from_regions([(info(0x1000, 0x2000), memfd(0x2000))]).unwrap();
    let mut wrapping_user = info(0x10000, 0x1000);
    wrapping_user.userspace_addr = u64::MAX - 0xfff;
    let mut same_user = info(0x10000, 0x1000);
    same_user.userspace_addr = 0x7000_0000_2000;
    let mut huge_offset = info(0x10000, 0x1000);
    huge_offset.mmap_offset = u64::MAX - 0x1000;
    for (bad, what) in [
        (info(0, 0), "Empty"),
        (info(u64::MAX - 0x7000_0000_0000 - 0xfff, 0x1000), "Wraps"),
        (wrapping_user, "Wraps"),
        (huge_offset, "Wraps"),
        (info(0, 0x1001), "Overlaps"),
        (info(0x2fff, 0x1000), "Overlaps"),
        (same_user, "Overlaps"),
    ] {
        let error = map.add(bad, memfd(0x2000)).unwrap_err();
        assert!(
            format!("{error:?}").starts_with(what),
            "{error:?} for {bad:?}"
        );
    }
    assert_eq!(map.regions().len(), 1);
    map.add(info(0x3000, 0x1000), memfd(0x1000)).unwrap();
}

#[test]
fn a_removed_region_stays_usable_for_whoever_still_holds_it() {
    let mut map = MemoryMap::new();
    map.add(info(0, 0x1000), memfd(0x1000)).unwrap();
    map.add(info(0x1000, 0x1000), memfd(0x1000)).unwrap();
    let old = Arc::clone(map.memory());
    let gone = info(0x1000, 0x1000);
    assert!(map.remove(0x1000, 0x2000, gone.userspace_addr).is_err());
    assert!(map.remove(0x1000, 0x1000, 0).is_err());
    map.remove(0x1000, 0x1000, gone.userspace_addr).unwrap();
    assert!(map.memory().write_obj(1u8, GuestAddress(0x1000)).is_err());
    old.write_obj(7u8, GuestAddress(0x1000)).unwrap();
    assert_eq!(old.read_obj::<u8>(GuestAddress(0x1000)).unwrap(), 7);
    assert_eq!(map.user_to_guest(gone.userspace_addr), None);
}

#[test]
fn what_was_removed_is_known_until_it_comes_back_and_not_for_ever() {
    let mut map = MemoryMap::new();
    let fd = memfd(0x1000);
    let add = |map: &mut MemoryMap, at: u64| {
        map.add(info(at, 0x1000), fd.try_clone().unwrap()).unwrap();
    };
    let remove = |map: &mut MemoryMap, at: u64| {
        let gone = info(at, 0x1000);
        map.remove(at, 0x1000, gone.userspace_addr).unwrap();
    };
    add(&mut map, 0);
    assert!(!map.was_removed(&info(0, 0x1000)));
    remove(&mut map, 0);
    let elsewhere_in_its_file = RegionInfo {
        mmap_offset: 0x1000,
        ..info(0, 0x1000)
    };
    assert!(map.was_removed(&info(0, 0x1000)) && map.was_removed(&elsewhere_in_its_file));
    assert!(!map.was_removed(&info(0, 0x2000)));
    add(&mut map, 0);
    assert!(!map.was_removed(&info(0, 0x1000)));
    remove(&mut map, 0);
    for at in 1..=REGIONS_MAX as u64 {
        assert!(map.was_removed(&info(0, 0x1000)));
        add(&mut map, at * 0x1000);
        remove(&mut map, at * 0x1000);
    }
    assert!(!map.was_removed(&info(0, 0x1000)));
}

#[test]
fn a_region_shows_what_the_file_holds_at_its_offset() {
    let fd = memfd(0x3000);
    rustix::io::pwrite(&fd, b"hello", 0x2000).unwrap();
    let mut at = info(0x8000, 0x1000);
    at.mmap_offset = 0x2000;
    let map = MemoryMap::from_regions([(at, fd)]).unwrap();
    let mut seen = [0u8; 5];
    map.memory()
        .read_slice(&mut seen, GuestAddress(0x8000))
        .unwrap();
    assert_eq!(&seen, b"hello");
}

#[test]
fn guest_memory_is_left_out_of_core_dumps() {
    let map = MemoryMap::from_regions([(info(0, 0x5000), memfd(0x5000))]).unwrap();
    let region = map.memory().find_region(GuestAddress(0)).unwrap();
    let start = format!("{:x}-", region.as_ptr() as usize);
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let flags = smaps
        .lines()
        .skip_while(|line| !line.starts_with(&start))
        .find(|line| line.starts_with("VmFlags:"))
        .unwrap();
    assert!(flags.split_whitespace().any(|flag| flag == "dd"), "{flags}");
}

#[test]
fn too_many_regions_are_refused() {
    let mut map = MemoryMap::new();
    let fd = memfd(0x1000);
    for i in 0..REGIONS_MAX as u64 {
        map.add(info(i * 0x1000, 0x1000), fd.try_clone().unwrap())
            .unwrap();
    }
    let one_more = info(0x1000_0000, 0x1000);
    assert!(matches!(map.add(one_more, fd), Err(MemoryError::TooMany)));
}
