//! One card, one volume, two guests at once.

use std::process::Command;
use std::time::{Duration, Instant};

use offload_tests::card::Card;
use offload_tests::guest::Vm;
use offload_tests::lab::{Lab, blk_ok, text};
use offload_tests::stamp::Random;
use offload_tests::tools;

/// Bytes of the file that both read.
const LEN: usize = 24 << 20;
/// Bytes a second that both may have together.
const BPS: usize = 6 << 20;

#[test]
fn two_guests_read_one_volume_under_one_limit_and_neither_minds_the_others_end() {
    let lab = Lab::new();
    let tree = lab.path("tree");
    std::fs::create_dir(&tree).expect("a new folder");
    let mut random = Random::new(lab.seed);
    let data: Vec<u8> = (0..LEN / 8)
        .flat_map(|_| random.below(u64::MAX).to_le_bytes())
        .collect();
    std::fs::write(tree.join("file"), &data).expect("room");
    let output = Command::new("md5sum").arg(tree.join("file")).output();
    let printed = output.expect("md5sum runs").stdout;
    let sum = String::from_utf8_lossy(printed.get(..32).expect("a sum")).into_owned();
    let volume = tools::volume_with(&lab, "shared", &tree, "64M");
    let before = volume.backing();

    let control = lab.path("card").join("control");
    let card = Card::start(
        &lab,
        &volume,
        &["one", "two"],
        &["--read-only", "--control-socket", text(&control)],
    );
    card.wait_for(&card.socket("one"));
    card.wait_for(&card.socket("two"));
    card.wait_for(&control);
    let limits = |more: &[&str]| {
        let target = ["limits", "--control-socket", text(&control)];
        blk_ok(&[&target, more].concat())
    };
    let mut one = Vm::on_card(&lab, &card.socket("one"));
    let mut two = Vm::on_card(&lab, &card.socket("two"));
    for vm in [&mut one, &mut two] {
        vm.wait_ready();
        assert_eq!(vm.ok("cat /sys/block/vda/ro"), "1\n");
        let (printed, status) = vm.run("/sbin/dd if=/dev/zero of=/dev/vda bs=4k count=1");
        assert!(
            status != 0 && printed.contains("not permitted"),
            "{printed}"
        );
        let (printed, status) = vm.run("/sbin/blkdiscard /dev/vda");
        assert_ne!(status, 0, "{printed}");
        vm.ok("mount -t ext4 -o ro /dev/vda /mnt");
    }

    // Both at once, with nothing in their caches, from the same credit.
    limits(&["--bps", &BPS.to_string()]);
    let start = Instant::now();
    one.type_command("md5sum /mnt/file");
    two.type_command("md5sum /mnt/file");
    for vm in [&mut one, &mut two] {
        let (printed, status) = vm.answer();
        assert!(status == 0 && printed.starts_with(&sum), "{printed}");
    }
    let took = start.elapsed();
    // A limit of each guest's own would let them through in half of it. A full credit is a second's.
    let least = Duration::from_secs_f64((2 * LEN - BPS) as f64 / BPS as f64);
    assert!(took > least.mul_f64(0.95), "{took:?} of {least:?}");

    // One is killed while it reads, the other goes on; and so it does when another one comes and goes.
    let drop_caches = "echo 3 > /proc/sys/vm/drop_caches";
    for vm in [&mut one, &mut two] {
        vm.ok(drop_caches);
        vm.type_command("md5sum /mnt/file");
    }
    std::thread::sleep(Duration::from_millis(500));
    drop(one);
    limits(&["--none"]);
    let (printed, status) = two.answer();
    assert!(status == 0 && printed.starts_with(&sum), "{printed}");

    let mut again = Vm::on_card(&lab, &card.socket("one"));
    again.wait_ready();
    again.ok("mount -t ext4 -o ro /dev/vda /mnt");
    for vm in [&mut again, &mut two] {
        vm.ok(drop_caches);
        assert!(vm.ok("md5sum /mnt/file").starts_with(&sum));
    }
    again.type_command("umount /mnt; poweroff -f");
    assert_eq!(again.wait().status, Some(0));
    two.ok(drop_caches);
    assert!(two.ok("md5sum /mnt/file").starts_with(&sum));
    assert_eq!(two.ok("dmesg | grep -i 'I/O error' || true"), "");
    two.type_command("umount /mnt; poweroff -f");
    assert_eq!(two.wait().status, Some(0));
    card.terminate();
    assert!(before == volume.backing(), "the backing changed");
    volume.assert_clean();
}
