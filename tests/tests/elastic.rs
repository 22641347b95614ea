//! Volumes that change under a running guest.

use std::os::unix::fs::MetadataExt as _;

use offload_tests::guest::{Disk, Vm};
use offload_tests::lab::{Lab, blk_ok, text};

#[test]
fn a_mounted_file_system_grows_with_its_disk_and_uses_the_new_room() {
    let lab = Lab::new();
    let volume = lab.volume("data.vol", "64M");
    let mut vm = Vm::boot(&lab, &[Disk::of(&volume)]);
    vm.ok("/sbin/mke2fs -q -t ext4 /dev/vda && mount /dev/vda /mnt");
    vm.ok("head -c 20000000 /dev/urandom > /mnt/first && sync");
    vm.ok("cd /mnt && sha256sum first > sums; cd /");
    assert_eq!(vm.ok("cat /sys/block/vda/size"), "131072\n");
    let (_, full) = vm.run("head -c 150000000 /dev/zero > /mnt/second");
    assert_ne!(full, 0, "there is no room yet");
    vm.ok("rm /mnt/second");

    let control = lab.path("run/disk0/control.sock");
    let resize = |size| blk_ok(&["resize", "--control-socket", text(&control), "--size", size]);
    assert_eq!(resize("256M"), "64 MiB → 256 MiB\n");
    vm.ok("for i in $(seq 100); do grep -q 524288 /sys/block/vda/size && break; sleep 0.1; done");
    assert_eq!(vm.ok("cat /sys/block/vda/size"), "524288\n");
    vm.ok("/sbin/resize2fs /dev/vda");
    vm.ok("head -c 150000000 /dev/urandom > /mnt/second && sync");
    vm.ok("cd /mnt && sha256sum second >> sums; cd /");

    // Killed right behind a further growth; the guest goes on.
    assert_eq!(resize("320M"), "256 MiB → 320 MiB\n");
    vm.card(0).kill();
    vm.ok("/sbin/resize2fs /dev/vda && sync");
    assert_eq!(vm.ok("cat /sys/block/vda/size"), "655360\n");
    vm.ok("echo 3 > /proc/sys/vm/drop_caches; cd /mnt && sha256sum -c sums; cd /");
    vm.ok("umount /mnt && /sbin/e2fsck -f -n /dev/vda");
    vm.power_off();
    volume.assert_clean();
    let meta = std::fs::metadata(&volume.path).expect("the backing");
    assert!(meta.len() > 320 << 20 && meta.blocks() * 512 < 300 << 20);

    // The next guest finds all of it.
    let mut vm = Vm::boot(&lab, &[Disk::of(&volume)]);
    assert_eq!(vm.ok("cat /sys/block/vda/size"), "655360\n");
    vm.ok("/sbin/e2fsck -f -n /dev/vda && mount -o ro /dev/vda /mnt");
    vm.ok("cd /mnt && sha256sum -c sums; cd /; umount /mnt");
    vm.power_off();
}

#[test]
fn an_ephemeral_disk_is_empty_for_each_guest_and_leaves_nothing() {
    let lab = Lab::new();
    let folder = lab.path("scratch");
    std::fs::create_dir(&folder).expect("a new folder");
    let root = lab.volume("root.vol", "32M");
    let disks = [
        Disk::of(&root),
        Disk::ephemeral(&folder, "ephemeral = \"128M\""),
        Disk::ephemeral(&folder, "ephemeral = \"64M\""),
    ];
    for _ in 0..2 {
        let mut vm = Vm::boot(&lab, &disks);
        vm.ok("cmp -n 67108864 /dev/vdb /dev/zero && cmp -n 67108864 /dev/vdc /dev/zero");
        vm.ok("/sbin/mke2fs -q -t ext4 /dev/vdb && mount /dev/vdb /mnt");
        vm.ok("head -c 30000000 /dev/urandom > /mnt/scratch && sync && umount /mnt");
        vm.ok("/sbin/e2fsck -f -n /dev/vdb");
        let names = std::fs::read_dir(&folder).expect("the folder").count();
        assert_eq!(names, 0);
        vm.power_off();
    }
    assert_eq!(std::fs::read_dir(&folder).expect("the folder").count(), 0);
    assert_eq!(lab.processes(), Vec::<String>::new());
}
