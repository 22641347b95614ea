//! Somebody changes the backing while a guest uses it.

use offload_tests::guest::{Disk, Vm};
use offload_tests::lab::{Lab, Volume};
use offload_tests::stamp::Random;

const SLOT: usize = 4096;

/// Blocks that `stamper scan` could not read.
fn bad_blocks(vm: &mut Vm) -> Vec<u64> {
    let scanned = vm.ok("/sbin/stamper scan /dev/vda");
    let bad = scanned.lines().filter_map(|line| {
        let (block, error) = line.strip_prefix("BAD ")?.split_once(' ')?;
        assert!(error.ends_with("(os error 5)"), "{error}");
        block.parse().ok()
    });
    let bad: Vec<u64> = bad.collect();
    let summary = format!("SCANNED bad={} wrong=0\n", bad.len());
    assert!(scanned.ends_with(&summary), "{scanned}");
    bad
}

/// Flips a bit in some slot in use, such that it is one of data: the map's pages are in memory and
/// not read again while the card runs. Where it is, and the block that the guest cannot read.
fn flip_some_data(volume: &Volume, vm: &mut Vm, random: &mut Random) -> (u64, u64) {
    let backing = volume.backing();
    let slots = backing.chunks_exact(SLOT).enumerate();
    // The first two MiB are headers.
    let used = slots.filter(|(i, slot)| *i >= (2 << 20) / SLOT && slot.iter().any(|&b| b != 0));
    let used: Vec<usize> = used.map(|(index, _)| index).collect();
    for _ in 0..20 {
        let slot = used[random.below(used.len() as u64) as usize];
        let at = (slot * SLOT) as u64 + random.below(SLOT as u64);
        volume.flip(at);
        match bad_blocks(vm)[..] {
            [] => volume.flip(at),
            [block] => return (at, block),
            ref many => panic!("one flipped bit took {many:?}"),
        }
    }
    panic!("hardly any slot holds data")
}

#[test]
fn a_flipped_bit_is_an_io_error_for_its_block_alone_and_the_log_names_it() {
    let lab = Lab::new();
    let mut random = Random::new(lab.seed);
    let volume = lab.volume("data.vol", "8M");
    let mut vm = Vm::boot(&lab, &[Disk::of(&volume)]);
    assert_eq!(vm.ok("/sbin/stamper fill /dev/vda"), "FILLED\n");
    assert_eq!(bad_blocks(&mut vm), [0_u64; 0]);
    assert!(!vm.log().contains("does not authenticate"), "{}", vm.log());

    let (at, block) = flip_some_data(&volume, &mut vm, &mut random);
    vm.wait_for_log(&format!("block {block} (byte offset {})", block * 4096));
    // Reading it again is no better, and nothing of it is given away on the way.
    let (printed, status) = vm.run(&format!(
        "/sbin/dd if=/dev/vda iflag=direct bs=4096 skip={block} count=1 2>/dev/null | wc -c"
    ));
    assert_eq!((printed.trim(), status), ("0", 0));
    // Who writes the block anew gets it back.
    vm.ok(&format!(
        "/sbin/dd if=/dev/zero of=/dev/vda oflag=direct bs=4096 seek={block} count=1 2>/dev/null"
    ));
    let read =
        format!("/sbin/dd if=/dev/vda iflag=direct bs=4096 skip={block} count=1 2>/dev/null");
    vm.ok(&format!("{read} | cmp -n 4096 - /dev/zero"));
    vm.power_off();
    let (is_clean, printed) = volume.check();
    assert!(
        is_clean,
        "the slot at {at} is not in use any more: {printed}"
    );
}

#[test]
fn check_finds_the_block_that_a_guest_cannot_read() {
    let lab = Lab::new();
    let mut random = Random::new(lab.seed);
    let volume = lab.volume("data.vol", "8M");
    let mut vm = Vm::boot(&lab, &[Disk::of(&volume)]);
    vm.ok("/sbin/stamper fill /dev/vda");
    let (at, block) = flip_some_data(&volume, &mut vm, &mut random);
    vm.power_off();
    let (is_clean, printed) = volume.check();
    assert!(!is_clean, "{printed}");
    assert!(printed.contains(&format!("block {block}")), "{printed}");
    volume.flip(at);
    volume.assert_clean();
}
