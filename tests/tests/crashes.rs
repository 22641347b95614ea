//! Cards, and whole hosts, that die under load.

use std::time::Duration;

use offload_tests::guest::{Disk, Vm};
use offload_tests::lab::Lab;
use offload_tests::stamp::Random;
use rustix::process::Signal;

const KILLS: usize = 5;

/// Waits until the load in the guest has done `more` operations on top of those it has now.
fn wait_for_progress(vm: &mut Vm, more: u64) {
    vm.skip_console();
    let ops = |line: &str| {
        assert!(!line.starts_with("FAILED"), "{line}");
        line.strip_prefix("OPS ")?.parse::<u64>().ok()
    };
    let start = vm.wait_for_line(ops);
    vm.wait_for_line(|line| ops(line).filter(|&now| now >= start + more));
}

/// Kills the card again and again under a guest that stamps sectors and remembers each acknowledged
/// write, whether flushed or not. Every other kill comes early: into recovery, into the connection
/// being taken up again, or into the first of the requests left over.
fn kill_the_card_under_load(disk: &'static str, vm_lines: &str) {
    let lab = Lab::new();
    let volume = lab.volume("data.vol", "64M");
    let mut random = Random::new(lab.seed);
    let mut vm = Vm::start(&lab, &[Disk::with(&volume, disk)], vm_lines);
    vm.wait_ready();
    let seed = random.below(1 << 30);
    vm.type_command(&format!(
        "/sbin/stamper load /dev/vda {seed} 24 /tmp/stop & true"
    ));
    for kill in 0..KILLS {
        if kill % 2 == 0 {
            wait_for_progress(&mut vm, 50);
            std::thread::sleep(Duration::from_millis(random.below(400)));
        } else {
            let bound = [10, 100, 1500][random.below(3) as usize];
            std::thread::sleep(Duration::from_millis(random.below(bound)));
        }
        vm.card(0).kill();
    }
    wait_for_progress(&mut vm, 50);
    vm.ok("touch /tmp/stop; wait");
    let console = vm.console();
    let verdict = console.lines().find(|line| line.starts_with("VERIFIED"));
    println!("{verdict:?}");
    assert!(verdict.is_some(), "{console}\n{}", vm.log());
    assert_eq!(vm.ok("dmesg | grep -iE 'error|hung|reset' || true"), "");
    let digest = vm.ok("/sbin/stamper digest /dev/vda");
    let restarts = vm.log().matches("starting it again").count();
    assert_eq!(restarts, KILLS, "{}", vm.log());
    vm.power_off();
    volume.assert_clean();
    let mut exported = offload_tests::stamp::Digest::default();
    exported.update(&volume.export());
    assert_eq!(digest, format!("DIGEST {}\n", exported.text()));
}

#[test]
fn a_card_killed_under_load_loses_no_acknowledged_write_and_the_guest_sees_no_error() {
    kill_the_card_under_load("", "");
}

#[test]
fn a_card_killed_under_load_on_two_queues_and_cpus_loses_nothing_either() {
    kill_the_card_under_load("queues = 2", "cpus = 2");
}

/// The host loses power: card and QEMU are gone at once. What was fsynced before is there, on the raw
/// disk and in a file system, and nothing else than what was written ever appears.
#[test]
fn what_was_fsynced_survives_the_death_of_card_and_qemu_together() {
    const WORKERS: usize = 6;
    let lab = Lab::new();
    let mut random = Random::new(lab.seed);
    let raw = lab.volume("raw.vol", "32M");
    let files = lab.volume("files.vol", "64M");
    let disks = [Disk::of(&raw), Disk::of(&files)];
    let seed = random.below(1 << 30);

    let mut vm = Vm::boot(&lab, &disks);
    vm.ok("/sbin/mke2fs -q -t ext4 /dev/vdb && mount -t ext4 /dev/vdb /mnt");
    vm.type_command(&format!("/sbin/stamper sync /dev/vda {seed} {WORKERS} &"));
    vm.type_command(
        "i=0; while i=$((i+1)); do yes $i | head -c 20000 > /mnt/$i; sync /mnt/$i /mnt || break; \
         echo FILE $i; done",
    );
    let least = 15 + random.below(15);
    // Each worker has synced once by then, on a machine of whatever speed.
    let (mut files_done, mut synced) = (0, [false; WORKERS]);
    vm.wait_for_line(|line| {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        match words[..] {
            ["SYNCED", worker, _] => synced[worker.parse::<usize>().expect("a number")] = true,
            ["FILE", number] => files_done = number.parse().expect("a number"),
            _ => {}
        }
        (files_done >= least && synced.iter().all(|synced| *synced)).then_some(())
    });
    std::thread::sleep(Duration::from_millis(random.below(300)));
    let children = vm.children();
    assert_eq!(children.len(), 3, "two cards and QEMU: {children:?}");
    // The shim first, stopped, so that it starts nothing again; its children die before it goes on.
    let shim = children.first().map(|c| c.parent).expect("three");
    let shim = offload_tests::guest::processes()
        .into_iter()
        .find(|p| p.pid == shim)
        .expect("the shim runs");
    shim.signal(Signal::STOP);
    for child in &children {
        child.signal(Signal::KILL);
    }
    for child in &children {
        child.kill();
    }
    shim.kill();
    let ended = vm.wait();
    assert_eq!(ended.status, None);

    // The console tells what the guest knew to be durable.
    let mut epochs = [0_u64; WORKERS];
    let mut last_file = 0;
    for line in ended
        .console
        .split_inclusive('\n')
        .filter(|l| l.ends_with('\n'))
    {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        match words[..] {
            ["SYNCED", worker, epoch] => {
                let worker: usize = worker.parse().expect("a number");
                epochs[worker] = epoch.parse().expect("a number");
            }
            ["FILE", number] => last_file = number.parse().expect("a number"),
            _ => {}
        }
    }
    println!("synced {epochs:?}, {last_file} files");
    assert!(epochs.iter().all(|&epoch| epoch > 0) && last_file >= least);

    let mut vm = Vm::boot(&lab, &disks);
    let epochs = epochs.map(|epoch| epoch.to_string()).join(",");
    let checked = vm.ok(&format!(
        "/sbin/stamper check /dev/vda {seed} {WORKERS} {epochs}"
    ));
    assert!(checked.starts_with("CHECKED "), "{checked}");
    assert_ne!(checked, "CHECKED 0\n");
    // Mounting replays the journal, as after any loss of power; then nothing is left to repair.
    vm.ok("mount -t ext4 /dev/vdb /mnt");
    vm.ok(&format!(
        "i=0; while [ $i -lt {last_file} ]; do i=$((i+1)); \
         yes $i | head -c 20000 | cmp - /mnt/$i || break; done; [ $i -eq {last_file} ]"
    ));
    vm.ok("umount /mnt && /sbin/e2fsck -f -n /dev/vdb");
    assert_eq!(vm.ok("dmesg | grep -i 'i/o error' || true"), "");
    vm.power_off();
    raw.assert_clean();
    files.assert_clean();
}
