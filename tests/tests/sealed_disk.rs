//! A stock kernel in a stock QEMU on sealed volumes: what a user does first.

use offload_tests::guest::{Disk, Vm};
use offload_tests::lab::Lab;

/// 16 bytes that are not in anything by chance.
const SECRET: &str = "PLAIN-7f3a9c51e8";

#[test]
fn files_survive_a_power_cycle_and_the_backing_shows_nothing_of_them() {
    let lab = Lab::new();
    let volume = lab.volume("root.vol", "256M");
    let disks = [Disk::with(&volume, "serial = \"vol0123456789abcdef0\"")];

    let mut vm = Vm::boot(&lab, &disks);
    assert_eq!(vm.ok("cat /sys/block/vda/serial"), "vol0123456789abcdef0");
    let queue = "/sys/block/vda/queue";
    let sizes = vm.ok(&format!(
        "cat {queue}/logical_block_size {queue}/physical_block_size"
    ));
    assert_eq!(sizes, "512\n4096\n");
    vm.ok("/sbin/mke2fs -q -t ext4 /dev/vda && mount -t ext4 /dev/vda /mnt");
    vm.ok(&format!(
        "yes '{SECRET}' | head -c 3000000 > /mnt/{SECRET}.txt"
    ));
    vm.ok("head -c 5000000 /dev/urandom > /mnt/random && sync");
    let sums = vm.ok("cd /mnt && sha256sum * | tee sums; cd /");
    assert!(sums.contains(SECRET), "{sums}");
    vm.ok("umount /mnt");
    vm.power_off();

    volume.assert_clean();
    let backing = volume.backing();
    for needle in [
        SECRET.as_bytes(),
        b"lost+found",
        &[0x53, 0xef, 1, 0, 1, 0, 0, 0],
    ] {
        let found = backing.windows(needle.len()).position(|w| w == needle);
        assert_eq!(found, None, "the backing holds {needle:?}");
    }

    let mut vm = Vm::boot(&lab, &disks);
    vm.ok("/sbin/e2fsck -f -n /dev/vda");
    vm.ok("mount -t ext4 -o ro /dev/vda /mnt && cd /mnt && sha256sum -c sums; cd /; umount /mnt");
    assert_eq!(vm.ok("dmesg | grep -i 'error' || true"), "");
    vm.power_off();
    volume.assert_clean();
    assert_eq!(lab.processes(), Vec::<String>::new());
}
