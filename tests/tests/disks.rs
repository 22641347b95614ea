//! What a guest's kernel does with disks: two of them, read-only ones, several queues, single
//! sectors, discards, a reset.

use std::os::unix::fs::MetadataExt as _;

use offload_tests::guest::{Disk, Vm};
use offload_tests::lab::Lab;
use offload_tests::stamp::Random;

#[test]
fn a_read_only_disk_beside_a_writable_one_is_read_and_stays_as_it_is() {
    let lab = Lab::new();
    let source = lab.volume("source.vol", "32M");
    let target = lab.volume("target.vol", "32M");
    let mut vm = Vm::boot(&lab, &[Disk::of(&source), Disk::of(&target)]);
    vm.ok("for d in vda vdb; do /sbin/mke2fs -q -t ext4 /dev/$d; done");
    vm.ok("mount /dev/vda /mnt && head -c 3000000 /dev/urandom > /mnt/file && umount /mnt");
    vm.power_off();

    let before = source.backing();
    let disks = [Disk::with(&source, "read-only = true"), Disk::of(&target)];
    let mut vm = Vm::boot(&lab, &disks);
    assert_eq!(vm.ok("cat /sys/block/vda/ro /sys/block/vdb/ro"), "1\n0\n");
    let (printed, status) = vm.run("/sbin/dd if=/dev/zero of=/dev/vda bs=4k count=1");
    assert!(
        status != 0 && printed.contains("not permitted"),
        "{printed}"
    );
    vm.ok("mkdir /tmp/to && mount -o ro,noload /dev/vda /mnt && mount /dev/vdb /tmp/to");
    vm.ok("cp /mnt/file /tmp/to/ && sync && cmp /mnt/file /tmp/to/file");
    vm.ok("umount /mnt /tmp/to");
    vm.power_off();
    assert!(before == source.backing(), "the read-only backing changed");
    source.assert_clean();
    target.assert_clean();
}

#[test]
fn two_cpus_use_two_queues_and_single_sectors_do_not_disturb_their_neighbours() {
    let lab = Lab::new();
    let volume = lab.volume("data.vol", "8M");
    let disk = Disk::with(&volume, "queues = 2\nqueue-size = 64");
    let mut vm = Vm::start(&lab, &[disk], "cpus = 2");
    vm.wait_ready();
    assert_eq!(vm.ok("ls -1 /sys/block/vda/mq"), "0\n1\n");
    vm.ok("/sbin/stamper fill /dev/vda");
    // Each CPU has a queue of its own. Both write every other sector of the same blocks.
    vm.ok("head -c 8192 /dev/urandom > /tmp/new");
    for (cpu, first) in [(0, 1), (1, 2)] {
        vm.ok(&format!(
            "for i in $(seq {first} 2 15); do taskset {mask} /sbin/dd if=/tmp/new of=/dev/vda bs=512 \
             skip=$i seek=$((i+800)) count=1 oflag=direct 2>/dev/null || echo FAILED; done",
            mask = 1 << cpu
        ));
    }
    vm.ok("/sbin/dd if=/dev/vda bs=512 skip=801 count=15 iflag=direct of=/tmp/old 2>/dev/null");
    vm.ok("tail -c +513 /tmp/new | cmp - /tmp/old");
    let (scanned, _) = vm.run("/sbin/stamper scan /dev/vda");
    assert!(scanned.contains("SCANNED bad=0 wrong=15"), "{scanned}");
    vm.power_off();
    volume.assert_clean();
}

#[test]
fn trimmed_space_goes_back_to_the_host_and_reads_as_zeros() {
    let lab = Lab::new();
    let volume = lab.volume("data.vol", "64M");
    let allocated = || {
        std::fs::metadata(&volume.path)
            .expect("the backing")
            .blocks()
            * 512
    };
    let disks = [Disk::of(&volume)];
    let mut vm = Vm::boot(&lab, &disks);
    vm.ok("/sbin/mke2fs -q -t ext4 /dev/vda && mount /dev/vda /mnt");
    vm.ok("head -c 20000000 /dev/urandom > /mnt/big && echo kept > /mnt/small && sync");
    vm.power_off();
    let full = allocated();
    assert!(full > 20_000_000, "{full}");

    let mut vm = Vm::boot(&lab, &disks);
    vm.ok("mount /dev/vda /mnt && rm /mnt/big && sync && /sbin/fstrim -v /mnt && umount /mnt");
    vm.power_off();
    let trimmed = allocated();
    assert!(trimmed + 15_000_000 < full, "{trimmed} of {full}");
    volume.assert_clean();

    let mut vm = Vm::boot(&lab, &disks);
    vm.ok(
        "/sbin/e2fsck -f -n /dev/vda && mount /dev/vda /mnt && grep kept /mnt/small && umount /mnt",
    );
    vm.ok("/sbin/blkdiscard /dev/vda");
    vm.ok("cmp -n 67108864 /dev/vda /dev/zero");
    vm.power_off();
    volume.assert_clean();
    assert!(allocated() < trimmed);
}

#[test]
fn a_guest_that_is_reset_under_load_finds_what_it_synced_when_it_boots_again() {
    const WORKERS: usize = 4;
    let lab = Lab::new();
    let mut random = Random::new(lab.seed);
    let volume = lab.volume("data.vol", "16M");
    let seed = random.below(1 << 30);
    let mut vm = Vm::boot(&lab, &[Disk::of(&volume)]);
    let card = vm.card(0);
    vm.type_command(&format!("/sbin/stamper sync /dev/vda {seed} {WORKERS} &"));
    let least = 5 + random.below(20);
    vm.wait_for_line(|line| line.ends_with(&format!("SYNCED 0 {least}")).then_some(()));
    vm.type_command("reboot -f");
    vm.wait_ready();
    let mut epochs = [0_u64; WORKERS];
    for line in vm.console().lines() {
        if let ["SYNCED", worker, epoch] = line.split_ascii_whitespace().collect::<Vec<_>>()[..]
            && let (Ok(worker), Ok(epoch)) = (worker.parse::<usize>(), epoch.parse())
            && worker < WORKERS
        {
            epochs[worker] = epoch;
        }
    }
    assert!(epochs[0] >= least);
    let epochs = epochs.map(|epoch| epoch.to_string()).join(",");
    let checked = vm.ok(&format!(
        "/sbin/stamper check /dev/vda {seed} {WORKERS} {epochs}"
    ));
    assert!(checked.contains("CHECKED "), "{checked}");
    assert_eq!(vm.card(0), card, "one card served both lives");
    vm.power_off();
    volume.assert_clean();
}
