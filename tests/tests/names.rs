//! The guest's resolver before real name servers: one that behaves, one that is silent, one that lies.

use std::path::Path;

use offload::control::ControlClient;
use offload_tests::guest::{Disk, Vm};
use offload_tests::lab::Lab;
use offload_tests::names::{self, Dnsmasq};
use serde_json::json;

fn ask(control: &Path, servers: &[std::net::SocketAddr]) {
    let mut client = ControlClient::connect(control).expect("the control socket");
    let shown = client
        .call("set_dns_upstream", json!({ "servers": servers }))
        .expect("an answer");
    assert_eq!(shown["servers"], json!(servers));
}

#[test]
fn names_come_from_the_hosts_servers_also_over_tcp_and_when_a_server_is_silent_or_lies() {
    let lab = Lab::new();
    let volume = lab.volume("a.vol", "16M");
    let server = Dnsmasq::start();
    let mut vm = Vm::start(&lab, &[Disk::of(&volume)], "[[nic]]\nhostname = 'guest7'\n");
    vm.wait_ready();
    let control = lab.path("run/nic0/control.sock");
    ask(&control, &[server.address]);
    vm.ok("ip link set lo up; ip link set eth0 up");
    vm.ok("udhcpc -i eth0 -n -q -s /sbin/lease -O hostname");

    let files = names::FILES.to_string();
    let found = vm.ok("nslookup files.example.internal 10.0.2.3");
    assert!(found.contains(&files), "{found}");
    let (nothing, _) = vm.run("nslookup nowhere.example.internal 10.0.2.3");
    assert!(nothing.contains("NXDOMAIN"), "{nothing}");

    // By UDP an answer of 8 KB is cut; over TCP it comes whole, also from the server.
    let question = names::question(*b"large", 16);
    let escaped: String = question
        .iter()
        .map(|byte| format!("\\{byte:03o}"))
        .collect();
    let len = question.len();
    let got = vm.ok(&format!(
        "printf '\\000\\{len:03o}{escaped}' | nc 10.0.2.3 53 > /tmp/large; wc -c < /tmp/large"
    ));
    let got: usize = got.trim().parse().expect("a number");
    assert!(got > names::TEXTS * 200, "{got} bytes");
    let last = format!("{:0>200}", names::TEXTS - 1);
    vm.ok(&format!("grep -a -q {last} /tmp/large"));

    // Over IPv6, too: the router says where the resolver is.
    vm.ok(
        "n=0; until ip -6 route | grep -q default || [ $n -gt 50 ]; do n=$((n+1)); sleep 0.2; done",
    );
    let found = vm.ok("nslookup files.example.internal fd00:0:0:2::3");
    assert!(found.contains(&files), "{found}");

    // A silent server is followed by the next; what an earlier one said is forgotten.
    let (_silent, silent) = names::silent();
    ask(&control, &[silent, server.address]);
    let found = vm
        .ok("nslookup files.example.internal 10.0.2.3 || nslookup files.example.internal 10.0.2.3");
    assert!(found.contains(&files), "{found}");

    // Forged answers are not believed.
    ask(&control, &[names::liar()]);
    let (found, _) = vm.run("nslookup anything.example 10.0.2.3");
    assert!(found.contains(&names::TRUE.to_string()), "{found}");
    assert!(!found.contains(&names::FORGED.to_string()), "{found}");
    vm.power_off();
}
