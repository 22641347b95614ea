//! Debian's cloud-init, unmodified, takes what the VM's spec says from the card's metadata service.
//!
//! No systemd: under TCG it would take longer than all else. What its units would run is run in their
//! order by hand: `ds-identify`, which finds the data source by what the firmware says, and the four
//! stages.

use std::fs::OpenOptions;

use offload::control::ControlClient;
use offload_tests::guest::{Disk, Vm};
use offload_tests::lab::{Lab, Volume, blk_ok, text};
use offload_tests::names::{self, Dnsmasq};
use offload_tests::rootfs;

const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl alice@example";

/// Without a locale, which takes a compiler.
const USER_DATA: &str = "#cloud-config
locale: false
write_files:
  - path: /etc/written
    content: by cloud-init
runcmd:
  - echo \"ran on $(hostname)\" > /etc/ran
";

/// The archive as a sealed volume, from which the guest reads it.
fn archive(lab: &Lab) -> Volume {
    let raw = lab.path("rootfs.raw");
    std::fs::copy(rootfs::with_cloud_init(), &raw).expect("room");
    let file = OpenOptions::new().write(true).open(&raw).expect("ours");
    let len = file.metadata().expect("a file").len();
    file.set_len(len.next_multiple_of(1 << 20)).expect("room");
    let volume = Volume {
        path: lab.path("rootfs.vol"),
        key: lab.key("rootfs.key"),
    };
    let key = text(&volume.key);
    blk_ok(&["import", "--key-file", key, text(&raw), text(&volume.path)]);
    std::fs::remove_file(&raw).expect("ours");
    volume
}

#[test]
fn a_stock_cloud_init_takes_name_key_and_user_data_from_the_spec_of_the_vm() {
    let lab = Lab::new();
    let volume = archive(&lab);
    let metadata = format!("instance-id = 'i-0c10d'\npublic-keys = ['{KEY}']\n");
    std::fs::write(lab.path("metadata.toml"), metadata).expect("room");
    std::fs::write(lab.path("user-data"), USER_DATA).expect("room");
    let more = "memory = '1G'\ncpus = 2\n[[nic]]\nhostname = 'web7'\ndomain = 'example.internal'\n\
                metadata = 'metadata.toml'\nuser-data = 'user-data'\n";
    let mut vm = Vm::start(&lab, &[Disk::of(&volume)], more);
    vm.wait_ready();
    vm.ok("mkdir /root2; mount -t tmpfs -o size=700M tmpfs /root2; tar x -f /dev/vda -C /root2");
    vm.ok("cd /root2; mount -t proc proc proc; mount -t sysfs sysfs sys; mount -t devtmpfs dev dev; mount -t tmpfs tmpfs run");
    vm.ok("ip link set lo up");
    let mut in_root = |command: &str| vm.ok(&format!("chroot /root2 /bin/sh -c '{command}'"));

    let found = in_root("/usr/lib/cloud-init/ds-identify --force; cat /run/cloud-init/cloud.cfg");
    assert!(found.contains("datasource_list: [ Ec2, None ]"), "{found}");
    in_root("cloud-init init --local");
    // What it made of the metadata brings the interface up: DHCP, and DHCPv6.
    let network = in_root("cat /etc/network/interfaces.d/50-cloud-init");
    assert!(network.contains("iface eth0 inet dhcp"), "{network}");
    in_root("ifup -a");
    in_root("cloud-init init");
    in_root("cloud-init modules --mode=config");
    in_root("cloud-init modules --mode=final");

    let result = in_root("cat /run/cloud-init/result.json");
    assert!(result.contains("DataSourceEc2"), "{result}");
    assert!(result.contains("\"errors\": []"), "{result}");
    assert_eq!(in_root("hostname").trim(), "web7");
    assert_eq!(in_root("hostname -f").trim(), "web7.example.internal");
    let id = in_root("cat /var/lib/cloud/data/instance-id");
    assert_eq!(id.trim(), "i-0c10d");
    let keys = in_root("cat /home/debian/.ssh/authorized_keys");
    assert!(keys.contains(KEY), "{keys}");
    assert_eq!(in_root("cat /etc/written").trim(), "by cloud-init");
    assert_eq!(in_root("cat /etc/ran").trim(), "ran on web7");
    let addresses = in_root("ip addr show dev eth0");
    assert!(addresses.contains("inet 10.0.2.15/24"), "{addresses}");
    let leases = in_root("cat /var/lib/dhcp/dhclient6.eth0.leases");
    let leased = leases
        .split_once("iaaddr ")
        .and_then(|(_, rest)| rest.split_once(' '))
        .map_or_else(
            || panic!("no address by DHCPv6: {leases}"),
            |(address, _)| address,
        );
    assert!(leased.starts_with("fd00::2:5054:ff:fe"), "{leased}");
    assert!(addresses.contains(leased), "{leased}: {addresses}");

    // A C library finds names in the search domain that the lease has.
    let server = Dnsmasq::start();
    let mut client = ControlClient::connect(&lab.path("run/nic0/control.sock")).expect("a card");
    let servers = serde_json::json!({ "servers": [server.address] });
    client.call("set_dns_upstream", servers).expect("an answer");
    let found = in_root("getent ahostsv4 files");
    assert!(found.contains(&names::FILES.to_string()), "{found}");
}
