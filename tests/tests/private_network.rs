//! Two VMs of `host-shim run` on one private network: QEMU, Debian's kernel and its virtio_net, busybox.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use offload::control::ControlClient;
use offload_tests::guest::{PATIENCE, Vm};
use offload_tests::lab::Lab;
use serde_json::json;

/// A network of this test's own; its directory is removed in the end.
struct Network(String);

impl Network {
    fn new() -> Self {
        Self(format!("test-{}", std::process::id()))
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let base = if rustix::process::geteuid().is_root() {
            Some(PathBuf::from("/run"))
        } else {
            std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from)
        };
        if let Some(base) = base {
            let _ = std::fs::remove_dir_all(base.join("offload-networks").join(&self.0));
        }
    }
}

fn start(lab: &Lab, network: &Network, name: &str, last: u8) -> Vm {
    let nic = format!(
        "[[nic]]\nnetwork = '{}'\nhostname = '{name}'\nmac = '52:54:00:0f:f2:{last:02x}'\n\
         ipv4 = '10.9.0.{last}/24'\n",
        network.0
    );
    Vm::start(lab, &[], &nic)
}

/// Addresses on, by DHCP and by what the router advertises.
fn configure(vm: &mut Vm) {
    vm.wait_ready();
    vm.ok("ip link set lo up; ip link set eth0 up");
    vm.ok("udhcpc -i eth0 -n -q -s /sbin/lease -O hostname");
    vm.ok("mkdir -p /etc; echo nameserver 10.9.0.3 > /etc/resolv.conf");
}

/// Runs a command until it succeeds.
fn soon(vm: &mut Vm, command: &str) -> Duration {
    let start = Instant::now();
    loop {
        let (printed, status) = vm.run(command);
        if status == 0 {
            return start.elapsed();
        }
        assert!(start.elapsed() < PATIENCE, "`{command}`: {printed}");
    }
}

fn send_and_compare(from: &mut Vm, to: &mut Vm, name: &str) {
    // Its input stays open: at the end of that the sender would take the answer for finished.
    to.ok("rm -f /tmp/got; sleep 200 | nc -l -p 9000 > /tmp/got 2>/dev/null & sleep 1");
    from.ok(&format!("nc {name} 9000 < /tmp/data"));
    soon(to, "[ $(stat -c %s /tmp/got) = 8388608 ]");
    let (sent, got) = (from.ok("md5sum < /tmp/data"), to.ok("md5sum < /tmp/got"));
    assert_eq!(sent, got);
}

#[test]
fn guests_of_two_vms_reach_each_other_by_name_and_a_killed_card_is_back_in_no_time() {
    let network = Network::new();
    let (lab_a, lab_b) = (Lab::new(), Lab::new());
    let mut a = start(&lab_a, &network, "alpha", 10);
    let mut b = start(&lab_b, &network, "beta", 11);
    configure(&mut a);
    configure(&mut b);

    // By address, by name, and both ways.
    a.ok("ping -c 2 -W 5 10.9.0.11");
    a.ok("ping -c 2 -W 5 beta");
    b.ok("ping -c 2 -W 5 alpha.internal");
    let names = b.ok("nslookup alpha 10.9.0.3; nslookup 10.9.0.10 10.9.0.3");
    assert!(names.contains("10.9.0.10"), "{names}");
    assert!(names.contains("alpha.internal"), "{names}");
    // IPv6: link-local addresses are the guests' own choice.
    let own = b.ok("ip -6 addr show dev eth0 scope link | sed -n 's/.*inet6 \\([^/]*\\).*/\\1/p'");
    soon(&mut a, &format!("ping -6 -c 1 -W 5 {}%eth0", own.trim()));
    // Longer than the MTU: in fragments, both families.
    a.ok("ping -c 2 -W 5 -s 12000 beta");
    b.ok("ping -c 1 -W 5 -s 60000 alpha");
    a.ok(&format!("ping -6 -c 2 -W 5 -s 12000 {}%eth0", own.trim()));
    // A name that nobody has, and an address that nobody has.
    assert_ne!(a.run("ping -c 1 -W 2 10.9.0.99").1, 0);

    // Megabytes, both ways, in super-segments.
    a.ok("dd if=/dev/urandom of=/tmp/data bs=1M count=8 2>/dev/null");
    b.ok("dd if=/dev/urandom of=/tmp/data bs=1M count=8 2>/dev/null");
    send_and_compare(&mut a, &mut b, "beta");
    send_and_compare(&mut b, &mut a, "alpha");
    let control = |lab: &Lab| {
        let path = lab.path("run/nic0/control.sock");
        ControlClient::connect(&path).expect("the control socket")
    };
    let report = control(&lab_a)
        .call("network", json!(null))
        .expect("an answer");
    let beta = &report["members"][0];
    assert_eq!(beta["name"], "beta", "{report}");
    let counter = |name: &str| beta["counters"][name].as_u64().expect("a count");
    let mean = counter("bytes_out") / counter("frames_out");
    assert!(
        mean > 3000,
        "frames of {mean} bytes are no super-segments: {report}"
    );
    for none in ["malformed", "spoofed", "denied_in", "unfit"] {
        assert_eq!(counter(none), 0, "{report}");
    }

    // A guest that uses another one's address gets nothing through.
    a.ok("ip addr add 10.9.0.77/24 dev eth0");
    assert_ne!(a.run("ping -c 1 -W 2 -I 10.9.0.77 10.9.0.11").1, 0);
    a.ok("ip addr del 10.9.0.77/24 dev eth0");

    // Security groups hold between guests: beta is taken out of the group that lets members in.
    let shut = json!({"interface": ["shut"], "group": [{"id": "shut"}]});
    control(&lab_b)
        .call("set_security_groups", shut)
        .expect("an answer");
    assert_ne!(a.run("echo x | timeout 3 nc 10.9.0.11 9001").1, 0);
    let report = control(&lab_b)
        .call("network", json!(null))
        .expect("an answer");
    let denied = report["members"][0]["counters"]["denied_in"].as_u64();
    assert!(denied > Some(0), "{report}");

    // Each card is killed once: one connects, the other is connected to. Beta's is the first: it is
    // shut, and started anew it has the groups of its command line again.
    for victim in [false, true] {
        let (vm, other) = if victim {
            (&mut a, &mut b)
        } else {
            (&mut b, &mut a)
        };
        let killed = vm.nic(0);
        killed.kill();
        vm.wait_for_log("nic0 is back");
        assert_ne!(vm.nic(0).pid, killed.pid);
        let address = if victim { "10.9.0.10" } else { "10.9.0.11" };
        let took = soon(other, &format!("ping -c 1 -W 1 {address}"));
        println!("reached {took:?} after the card was back");
        let back = if victim { "10.9.0.11" } else { "10.9.0.10" };
        soon(vm, &format!("ping -c 1 -W 1 {back}"));
    }
    send_and_compare(&mut a, &mut b, "beta");
    a.power_off();
    assert_ne!(b.run("ping -c 1 -W 2 10.9.0.10").1, 0);
    let gone = control(&lab_b)
        .call("network", json!(null))
        .expect("an answer");
    assert_eq!(gone["members"], json!([]));
    b.power_off();
}
