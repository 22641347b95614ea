use super::*;
use crate::qemu::Version;

const SPEC: &str = r#"
[vm]
name = "web1"
memory = "512M"
cpus = 2
kernel = "vmlinuz"
initrd = "initrd.img"
cmdline = "root=/dev/vda console=ttyS0"

[[disk]]
volume = "root.vol"
key-file = "root.key"
serial = "vol0123456789abcdef0"

[[disk]]
volume = "data, old.vol"
passphrase-file = "data.pass"
read-only = true
queues = 1
queue-size = 256
"#;

fn spec(text: &str) -> VmSpec {
    crate::spec::parse(text, Path::new("/srv/web1/vm.toml")).unwrap()
}

fn env(major: u16, minor: u16) -> Env {
    Env {
        qemu: Qemu {
            path: "/usr/bin/qemu-system-x86_64".into(),
            version: Version { major, minor },
            has_sandbox: true,
            data_dirs: Vec::new(),
        },
        card: Some("/opt/offload/vhost-blk".into()),
        net_card: Some("/opt/offload/vhost-net".into()),
        run_dir: "/run/offload/web1".into(),
        networks_dir: Some("/run/offload-networks".into()),
        kvm: Some(KvmVerdict::fast(1.0e9)),
        card_user: Some(UserId {
            uid: 65534,
            gid: 65534,
        }),
    }
}

/// Compares with a committed file; `UPDATE_SNAPSHOTS=1` writes it instead.
fn assert_snapshot(name: &str, actual: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/snapshots")
        .join(name);
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
        std::fs::write(&path, actual).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(
        actual,
        expected,
        "{} differs; UPDATE_SNAPSHOTS=1 accepts",
        path.display()
    );
}

#[test]
fn the_plan_for_qemu_7_2_is_as_recorded() {
    assert_snapshot(
        "qemu-7.2.txt",
        &plan(&spec(SPEC), &env(7, 2)).unwrap().to_string(),
    );
}

#[test]
fn the_plan_for_qemu_10_0_is_as_recorded() {
    let text = SPEC.replace("cpus = 2", "cpus = 2\naccel = \"tcg\"");
    assert_snapshot(
        "qemu-10.0.txt",
        &plan(&spec(&text), &env(10, 0)).unwrap().to_string(),
    );
}

#[test]
fn the_plan_for_a_disk_boot_without_root_is_as_recorded() {
    let text = "[vm]\nname = \"fw\"\nmemory = \"1G\"\nexit-on-reboot = true\n\
                [[disk]]\nvolume = \"a.vol\"\nkey-file = \"a.key\"\n";
    let mut env = env(10, 0);
    env.card_user = None;
    env.qemu.has_sandbox = false;
    env.kvm = Some(KvmVerdict::slow(2.5e6));
    let plan = plan(&spec(text), &env).unwrap();
    assert_snapshot(
        "disk-boot.json",
        &(serde_json::to_string_pretty(&plan).unwrap() + "\n"),
    );
}

#[test]
fn what_a_disk_may_use_and_an_interfaces_ipv6_address_are_told_to_their_cards() {
    let text = SPEC.replace(
        "queues = 1",
        "queues = 1\niops = 3000\niops-burst = '9000:5'\nbps = '125M'\nio-size = '16K'",
    ) + "[[nic]]\nipv6-address = 'fd00:0:0:2::15'\n";
    let plan = plan(&spec(&text), &env(7, 2)).unwrap();
    let line = |card: usize| plan.cards[card].process.args.join(" ");
    assert!(!line(0).contains("--iops"), "{}", line(0));
    let limits = "--iops 3000 --iops-burst 9000:5 --bps 125M --io-size 16K";
    assert!(line(1).contains(limits), "{}", line(1));
    let address = "--ipv6-address fd00:0:0:2::15";
    assert!(line(2).contains(address), "{}", line(2));
}

#[test]
fn auto_without_a_probe_is_an_error_and_not_a_guess() {
    let mut env = env(7, 2);
    env.kvm = None;
    assert_eq!(plan(&spec(SPEC), &env), Err(PlanError::NotProbed));
}

#[test]
fn a_run_directory_too_deep_for_sockets_is_refused() {
    let mut env = env(7, 2);
    env.run_dir = format!("/run/{}", "x".repeat(100)).into();
    assert!(matches!(
        plan(&spec(SPEC), &env),
        Err(PlanError::SocketPathTooLong { .. })
    ));
}

const NICS: &str = r#"
[[nic]]

[[nic]]
mac = "52:54:00:12:34:56"
no-ipv6 = true
mtu = 1500
queue-pairs = 2
publish = ["8080:80", "0.0.0.0:53:53/udp"]
map-host-loopback = ["10.0.3.2"]
security-groups = "groups.toml"
metadata = "metadata.toml"
user-data = "user data"
"#;

#[test]
fn the_plan_for_two_network_interfaces_is_as_recorded() {
    let text = SPEC.to_owned() + NICS;
    let plan = plan(&spec(&text), &env(7, 2)).unwrap();
    assert_snapshot("nics.txt", &plan.to_string());
}

#[test]
fn cards_of_two_vms_on_one_network_meet_in_one_directory_with_one_prefix_and_two_addresses() {
    let on = |vm: &str| {
        let text = SPEC.replace("web1", vm) + "[[nic]]\nnetwork = \"backend\"\n";
        plan(&spec(&text), &env(7, 2)).unwrap().cards.pop().unwrap()
    };
    let value = |vm: &str, option: &str| {
        let args = on(vm).process.args;
        let at = args.iter().position(|arg| arg == option).unwrap();
        args[at + 1].clone()
    };
    for vm in ["web1", "web2"] {
        assert_eq!(value(vm, "--network"), "/run/offload-networks/backend");
    }
    assert_eq!(
        value("web1", "--ipv6-prefix"),
        value("web2", "--ipv6-prefix")
    );
    let (one, two) = (value("web1", "--ipv4"), value("web2", "--ipv4"));
    assert_ne!(one, two);
    let network = |text: &str| text.split('.').take(2).collect::<Vec<_>>().join(".");
    assert_eq!(network(&one), network(&two));
    assert!(one.starts_with("10.") && one.ends_with("/16"), "{one}");
    let mut env = env(7, 2);
    env.networks_dir = None;
    let text = SPEC.to_owned() + "[[nic]]\nnetwork = \"backend\"\n";
    assert_eq!(plan(&spec(&text), &env), Err(PlanError::NoNetworks));
}

#[test]
fn interrupts_of_an_interface_are_msi_x_only_where_kvm_delivers_them() {
    for (accel, is_legacy) in [("tcg", true), ("kvm", false)] {
        let accel = format!("cpus = 2\naccel = \"{accel}\"");
        let text = SPEC.replace("cpus = 2", &accel) + NICS;
        let args = plan(&spec(&text), &env(7, 2)).unwrap().qemu.args;
        let nics = args.iter().filter(|arg| arg.starts_with("virtio-net-pci"));
        let legacy = nics.map(|arg| arg.ends_with(",vectors=0"));
        assert_eq!(legacy.collect::<Vec<_>>(), [is_legacy; 2], "{args:?}");
        let last = args.iter().rfind(|arg| arg.starts_with("virtio-net-pci"));
        let vectors = if is_legacy { 0 } else { 6 };
        let wanted = format!(",mq=on,vectors={vectors}");
        assert!(last.unwrap().ends_with(&wanted), "{last:?}");
        assert!(
            args.iter().any(|arg| arg.ends_with(",queues=2")),
            "{args:?}"
        );
    }
}

#[test]
fn an_interface_without_a_network_card_on_the_host_is_no_plan() {
    let mut env = env(7, 2);
    env.net_card = None;
    let text = SPEC.to_owned() + NICS;
    assert_eq!(plan(&spec(&text), &env), Err(PlanError::NoNetCard));
}
