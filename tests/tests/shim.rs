//! `host-shim run` and its processes: how they end.

use offload_tests::guest::{Disk, Vm};
use offload_tests::lab::Lab;
use rustix::process::Signal;

fn ends_all_in_order(signal: Signal) {
    let lab = Lab::new();
    let disks = [
        Disk::of(&lab.volume("a.vol", "16M")),
        Disk::of(&lab.volume("b.vol", "16M")),
    ];
    let mut vm = Vm::boot(&lab, &disks);
    let children = vm.children();
    assert_eq!(children.len(), 3, "two cards and QEMU: {children:?}");
    vm.ok("/sbin/stamper fill /dev/vda");
    let shim = offload_tests::guest::processes()
        .into_iter()
        .find(|p| p.pid == vm.shim())
        .expect("the shim runs");
    shim.signal(signal);
    let ended = vm.wait();
    assert_eq!(ended.status, Some(0), "{}", ended.log);
    assert!(ended.log.ends_with("[shim] stopped\n"), "{}", ended.log);
    assert_eq!(ended.log.matches("is closed").count(), 2, "{}", ended.log);
    assert!(children.iter().all(|child| !child.lives()));
    assert_eq!(lab.processes(), Vec::<String>::new());
    for left in ["disk0", "disk1", "qmp.sock"] {
        assert!(!lab.path("run").join(left).exists(), "{left} is left");
    }
    for disk in &disks {
        disk.volume.assert_clean();
    }
}

#[test]
fn sigterm_ends_guest_and_cards_in_order() {
    ends_all_in_order(Signal::TERM);
}

#[test]
fn sigint_ends_guest_and_cards_in_order() {
    ends_all_in_order(Signal::INT);
}

#[test]
fn a_wrong_key_is_said_of_the_disk_it_is_for_and_nothing_is_left_running() {
    let lab = Lab::new();
    let good = lab.volume("good.vol", "16M");
    let mut bad = lab.volume("bad.vol", "16M");
    bad.key = good.key.clone();
    let ended = Vm::start(&lab, &[Disk::of(&good), Disk::of(&bad)], "").wait();
    assert_eq!(ended.status, Some(1), "{}", ended.log);
    let said = ended
        .log
        .lines()
        .find(|l| l.starts_with("[disk1]") && l.contains("key"));
    assert!(
        said.is_some_and(|line| line.contains("bad.vol")),
        "{}",
        ended.log
    );
    assert!(
        ended.log.contains("[shim] disk1 exited with status"),
        "{}",
        ended.log
    );
    assert_eq!(ended.console, "", "no guest was started");
    assert_eq!(lab.processes(), Vec::<String>::new());
    good.assert_clean();
}

#[test]
fn a_shim_that_is_killed_takes_card_and_qemu_along_and_the_next_one_starts() {
    let lab = Lab::new();
    let volume = lab.volume("a.vol", "16M");
    let vm = Vm::boot(&lab, &[Disk::of(&volume)]);
    let children = vm.children();
    assert_eq!(children.len(), 2, "{children:?}");
    drop(vm);
    let end = std::time::Instant::now() + offload_tests::guest::PATIENCE;
    while children.iter().any(offload_tests::guest::Process::lives) {
        assert!(std::time::Instant::now() < end, "orphans: {children:?}");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    Vm::boot(&lab, &[Disk::of(&volume)]).power_off();
    volume.assert_clean();
}
