//! `host-shim run` and its processes: how they end.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};

use offload_tests::guest::{Disk, PATIENCE, Vm, echo_on};
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
    let end = std::time::Instant::now() + PATIENCE;
    while children.iter().any(offload_tests::guest::Process::lives) {
        assert!(std::time::Instant::now() < end, "orphans: {children:?}");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    Vm::boot(&lab, &[Disk::of(&volume)]).power_off();
    volume.assert_clean();
}

/// Answers every request with `body`, on a port of the host's loopback.
fn web(body: &'static str) -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let port = listener.local_addr().expect("bound").port();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let _ = stream.read(&mut [0; 4096]);
            let length = body.len();
            let _ = write!(
                stream,
                "HTTP/1.0 200 OK\r\nContent-Length: {length}\r\n\r\n{body}"
            );
        }
    });
    port
}

fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    listener.local_addr().expect("bound").port()
}

#[test]
fn a_network_card_gives_the_guest_a_network_and_comes_back_when_it_is_killed() {
    let lab = Lab::new();
    let volume = lab.volume("a.vol", "16M");
    let web = web("fetched through the card");
    let published = free_port();
    let nic = format!(
        "[[nic]]\nmac = '52:54:00:0f:f1:0a'\nhostname = 'guest7'\n\
         publish = ['{published}:7777']\nmap-host-loopback = ['10.0.2.2']\n"
    );
    let mut vm = Vm::start(&lab, &[Disk::of(&volume)], &nic);
    vm.wait_ready();
    assert_eq!(vm.children().len(), 3, "two cards and QEMU");
    if rustix::process::geteuid().is_root() {
        let status = format!("/proc/{}/status", vm.nic(0).pid);
        let status = std::fs::read_to_string(status).expect("it lives");
        assert!(!status.contains("\nUid:\t0"), "{status}");
    }

    vm.ok("ip link set lo up; ip link set eth0 up");
    assert_eq!(
        vm.ok("cat /sys/class/net/eth0/address").trim(),
        "52:54:00:0f:f1:0a"
    );
    let lease = vm.ok("udhcpc -i eth0 -n -q -s /sbin/lease -O hostname");
    let right = "lease 10.0.2.15/24 router 10.0.2.2 hostname guest7";
    assert!(lease.contains(right), "{lease}");
    let fetch = format!("wget -q -O - http://10.0.2.2:{web}/; echo");
    assert_eq!(vm.ok(&fetch).trim(), "fetched through the card");

    // From outside.
    vm.ok(&echo_on(7777));
    let mut client = TcpStream::connect((Ipv4Addr::LOCALHOST, published)).expect("a listener");
    client.set_read_timeout(Some(PATIENCE)).expect("a socket");
    client.write_all(b"echo").expect("it takes");
    client.shutdown(std::net::Shutdown::Write).expect("open");
    let mut answer = String::new();
    client.read_to_string(&mut answer).expect("to the end");
    assert_eq!(answer, "echo");

    let killed = vm.nic(0);
    killed.kill();
    vm.wait_for_log("nic0 is back");
    assert_ne!(vm.nic(0).pid, killed.pid);
    assert_eq!(vm.ok(&fetch).trim(), "fetched through the card");
    vm.ok("/sbin/stamper fill /dev/vda");

    vm.power_off();
    assert!(!lab.path("run/nic0").exists(), "nic0 is left");
    volume.assert_clean();
}
