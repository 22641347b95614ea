//! Others' eyes: fio writes, reads back and verifies while cards die; and a guest that is reset in the
//! middle of its work.

use std::time::Duration;

use offload_tests::guest::{Disk, Vm};
use offload_tests::lab::Lab;
use offload_tests::stamp::Random;
use offload_tests::tools;

/// What one run of fio lasts, in seconds, and how many cards die during it: the shim gives a card up
/// that dies more often than five times a minute.
const SECONDS: u64 = 24;
const KILLS: u64 = 4;

/// Every block carries a checksum and its own offset, which fio verifies some writes later and again
/// when all are done. `OFFLOAD_FIO_ROUNDS` runs it so often.
#[test]
fn fio_verifies_all_it_wrote_over_several_deaths_of_the_card() {
    let lab = Lab::new();
    let Some(fio) = tools::disk_with(&lab, "fio") else {
        panic!("fio is missing; .ci/install-packages brings it");
    };
    let rounds = std::env::var("OFFLOAD_FIO_ROUNDS").ok();
    let rounds: u64 = rounds.map_or(1, |text| text.parse().expect("a number"));
    let volume = lab.volume("data.vol", "96M");
    let mut random = Random::new(lab.seed);
    let disks = [
        Disk::with(&volume, "queues = 2"),
        Disk::with(&fio, "read-only = true"),
    ];
    let mut vm = Vm::start(&lab, &disks, "cpus = 2");
    vm.wait_ready();
    vm.ok("mount -t ext4 -o ro /dev/vdb /mnt");
    let fio = tools::run_line("fio");
    // Brings its libraries into the guest's cache: what is measured in seconds below is work.
    vm.ok(&format!("{fio} --version"));
    let seed = random.below(1 << 30);
    let common = format!(
        "--filename=/dev/vda --direct=1 --ioengine=libaio --verify=crc32c --verify_fatal=1 \
         --verify_backlog=64 --time_based --runtime={SECONDS} --randseed={seed} --eta=never \
         --clocksource=clock_gettime"
    );
    let jobs = "--name=small --rw=randwrite --bs=4k --iodepth=16 --size=32M --fsync=50 \
                --name=mixed --rw=randrw --bs=16k --iodepth=8 --offset=32M --size=32M \
                --name=large --rw=write --bs=128k --iodepth=4 --offset=64M --size=32M";
    for round in 0..rounds {
        vm.skip_console();
        vm.type_command(&format!("{fio} {common} {jobs} > /tmp/fio 2>&1"));
        for kill in 0..KILLS {
            // In a quarter of the run each, and some of them early in a card's life.
            let pause = SECONDS * 1000 / KILLS;
            let bound = if kill % 2 == 0 { pause } else { 300 };
            let before = random.below(bound);
            std::thread::sleep(Duration::from_millis(before));
            vm.card(0).kill();
            if kill % 2 == 0 {
                std::thread::sleep(Duration::from_millis(pause - before));
            }
        }
        let (_, status) = vm.answer();
        let printed = vm.ok("cat /tmp/fio");
        assert_eq!(status, 0, "round {round}: {printed}\n{}", vm.log());
        assert_eq!(printed.matches("err= 0").count(), 3, "{printed}");
        // Otherwise nothing was verified.
        assert!(
            printed.contains("READ:") || printed.contains("read:"),
            "{printed}"
        );
        println!("{printed}");
        if round + 1 < rounds {
            std::thread::sleep(Duration::from_secs(60 - SECONDS));
        }
    }
    assert_eq!(vm.ok("dmesg | grep -iE 'error|hung|reset' || true"), "");
    let restarts = vm.log().matches("starting it again").count() as u64;
    assert_eq!(restarts, KILLS * rounds, "{}", vm.log());
    vm.ok("umount /mnt");
    vm.power_off();
    volume.assert_clean();
}

/// No shutdown, no flush: the machine starts anew while requests are under way. QEMU stops the rings,
/// frees the in-flight region and asks for a new one.
#[test]
fn a_guest_that_is_reset_under_load_finds_all_it_had_synced() {
    const WORKERS: usize = 6;
    let lab = Lab::new();
    let mut random = Random::new(lab.seed);
    let volume = lab.volume("data.vol", "32M");
    let mut vm = Vm::start(&lab, &[Disk::with(&volume, "queues = 2")], "cpus = 2");
    vm.wait_ready();
    let seed = random.below(1 << 30);
    vm.type_command(&format!("/sbin/stamper sync /dev/vda {seed} {WORKERS} &"));
    let mut epochs = [0_u64; WORKERS];
    let take = |line: &str, epochs: &mut [u64; WORKERS]| {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        if let ["SYNCED", worker, epoch] = words[..] {
            let worker: usize = worker.parse().expect("a number");
            epochs[worker] = epoch.parse().expect("a number");
        }
    };
    vm.wait_for_line(|line| {
        take(line, &mut epochs);
        epochs.iter().all(|epoch| *epoch >= 2).then_some(())
    });
    std::thread::sleep(Duration::from_millis(random.below(300)));
    vm.type_command("echo b > /proc/sysrq-trigger");
    vm.wait_for_line(|line| {
        take(line, &mut epochs);
        line.ends_with("@@ready").then_some(())
    });
    let epochs = epochs.map(|epoch| epoch.to_string()).join(",");
    let checked = vm.ok(&format!(
        "/sbin/stamper check /dev/vda {seed} {WORKERS} {epochs}"
    ));
    assert!(checked.starts_with("CHECKED "), "{checked}");
    assert_ne!(checked, "CHECKED 0\n");
    assert_eq!(
        vm.log().matches("starting it again").count(),
        0,
        "{}",
        vm.log()
    );
    vm.power_off();
    volume.assert_clean();
}
