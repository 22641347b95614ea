//! Volumes that change under a running guest.

use std::os::unix::fs::MetadataExt as _;
use std::process::Command;

use offload_tests::binaries::binary;
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
fn a_disk_of_a_running_vm_grows_by_the_shims_own_command() {
    let lab = Lab::new();
    let root = lab.volume("root.vol", "16M");
    let data = lab.volume("data.vol", "64M");
    let shared = lab.volume("shared.vol", "16M");
    let shim = |args: &[&str]| {
        let output = Command::new(binary("host-shim")).args(args).output();
        let output = output.expect("host-shim starts");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let said = text(&output.stdout) + &text(&output.stderr);
        (output.status.code(), said)
    };
    let disks = [
        Disk::of(&root),
        Disk::with(
            &data,
            "bps = \"200M\"\niops = 9000\niops-burst = \"20000:5\"",
        ),
        Disk::with(&shared, "read-only = true"),
    ];
    let mut vm = Vm::boot(&lab, &disks);
    let spec = lab.path("vm.toml");
    let spec = text(&spec);
    vm.ok("/sbin/mke2fs -q -t ext4 /dev/vdb && mount /dev/vdb /mnt");
    vm.ok("head -c 20000000 /dev/urandom > /mnt/first && sync && sha256sum /mnt/first > /tmp/sums");

    // What was asked for in the spec holds.
    let control = lab.path("run/disk1/control.sock");
    let limits = blk_ok(&["limits", "--control-socket", text(&control)]);
    for told in ["9000", "20000", "for 5 s", "200 MiB"] {
        assert!(limits.contains(told), "{told}: {limits}");
    }

    let grown = (Some(0), "64 MiB → 256 MiB\n".to_owned());
    assert_eq!(shim(&["resize", spec, "disk1", "256M"]), grown);
    vm.ok("for i in $(seq 100); do grep -q 524288 /sys/block/vdb/size && break; sleep 0.1; done");
    let sizes = vm.ok("cat /sys/block/vda/size /sys/block/vdb/size");
    assert_eq!(sizes, "32768\n524288\n", "one disk grew, the other did not");
    vm.ok("/sbin/resize2fs /dev/vdb");
    vm.ok("head -c 150000000 /dev/zero > /mnt/second && sync");
    vm.ok("echo 3 > /proc/sys/vm/drop_caches; sha256sum -c /tmp/sums");

    // What cannot be is refused, and says what to do.
    for (args, status, says) in [
        ([spec, "1", "64M"], 1, "shrink"),
        ([spec, "1", "max"], 0, "256 MiB already"),
        ([spec, "2", "64M"], 2, "read-only"),
        ([spec, "3", "64M"], 2, "has 3 disks"),
        ([spec, "x", "64M"], 2, "from 0"),
        ([spec, "1", "64MB"], 2, "like 20G"),
        (["no-such-vm", "1", "64M"], 2, "vhost-blk resize --volume"),
        (["./vm/none.toml", "1", "64M"], 2, "cannot read"),
        (["a b", "1", "64M"], 2, "neither a spec"),
    ] {
        let (code, said) = shim(&[&["resize"][..], &args].concat());
        assert_eq!(code, Some(status), "{args:?}: {said}");
        assert!(said.contains(says), "{args:?}: {said}");
    }
    assert_eq!(vm.ok("cat /sys/block/vdb/size"), "524288\n");
    vm.ok("umount /mnt && /sbin/e2fsck -f -n /dev/vdb");
    vm.power_off();

    let (code, said) = shim(&["resize", spec, "1", "512M"]);
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("vhost-blk resize --volume"), "{said}");
    data.assert_clean();
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
