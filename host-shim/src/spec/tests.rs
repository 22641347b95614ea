use super::*;

const GOOD: &str = r#"
[vm]
name = "web1"
memory = "512M"
cpus = 2
kernel = "vmlinuz"
initrd = "/abs/initrd"
cmdline = "console=ttyS0"

[[disk]]
volume = "root.vol"
key-file = "root.key"
serial = "vol0123456789abcdef0"

[[disk]]
volume = "data.vol"
passphrase-file = "data.pass"
read-only = true
queues = 1
queue-size = 256

[[nic]]

[[nic]]
mac = "52:54:00:AB:cd:ef"
ipv4 = "192.168.7.200/25"
gateway = "192.168.7.129"
no-ipv6 = true
mtu = 1500
hostname = "two.example"
dns-upstream = ["9.9.9.9", "2620:fe::fe"]
publish = ["8080:80", "[::]:53:53/udp"]
map-host-loopback = ["192.168.7.130"]
security-groups = "groups.toml"
metadata = "/abs/metadata.toml"
user-data = "user-data"

[run]
dir = "run"
user = "nobody"
stop-timeout = 5
"#;

fn parse_text(text: &str) -> Result<VmSpec, Box<SpecError>> {
    parse(text, Path::new("/etc/offload/web1.toml"))
}

/// The spec with one piece of text replaced: its error, and the text the error points at.
fn refused(from: &str, to: &str) -> (String, String) {
    assert!(GOOD.contains(from), "the test replaces nothing");
    let text = GOOD.replacen(from, to, 1);
    let error = parse_text(&text).expect_err("must be refused");
    let at = error.span().map(|s| text[s].to_owned()).unwrap_or_default();
    (error.to_string(), at)
}

#[test]
fn a_full_spec_is_read_and_paths_start_at_its_folder() {
    let spec = parse_text(GOOD).unwrap();
    assert_eq!(spec.memory_bytes, 512 << 20);
    assert_eq!(
        spec.boot,
        Boot::Kernel {
            kernel: "/etc/offload/vmlinuz".into(),
            initrd: Some("/abs/initrd".into()),
            cmdline: "console=ttyS0".into()
        }
    );
    assert_eq!(spec.disks[0].volume, Path::new("/etc/offload/root.vol"));
    assert_eq!(
        spec.disks[0].queues, 2,
        "a queue a vCPU when nothing is said"
    );
    assert_eq!(
        spec.disks[1].key,
        KeySource::PassphraseFile("/etc/offload/data.pass".into())
    );
    assert_eq!(spec.disks[1].queue_size, Some(256));
    assert!(spec.disks[1].read_only);
    assert_eq!(spec.run_dir.as_deref(), Some(Path::new("/etc/offload/run")));
    assert_eq!(spec.stop_timeout_s, 5);
}

#[test]
fn a_misspelt_field_is_refused_where_it_stands() {
    let (message, at) = refused("read-only = true", "readonly = true");
    assert!(message.contains("unknown field `readonly`"), "{message}");
    assert_eq!(at, "readonly");
    let (message, _) = refused("[run]", "[runn]");
    assert!(message.contains("unknown field `runn`"), "{message}");
}

#[test]
fn broken_toml_is_refused_where_it_breaks() {
    let (_, at) = refused("cpus = 2", "cpus = = 2");
    assert!(at.contains('='), "{at:?}");
}

#[test]
fn a_missing_name_is_named() {
    let (message, _) = refused("name = \"web1\"", "");
    assert!(message.contains("missing field `name`"), "{message}");
}

#[test]
fn names_that_would_leave_the_run_directory_are_refused() {
    for name in ["../x", "a/b", "", ".hidden", "-x", "a b"] {
        let (message, at) = refused("\"web1\"", &format!("\"{name}\""));
        assert!(message.contains("cannot name a VM"), "{message}");
        assert_eq!(at, format!("\"{name}\""));
    }
}

#[test]
fn sizes_need_a_known_unit_and_whole_mebibytes() {
    assert!(refused("\"512M\"", "\"much\"").0.contains("not a size"));
    assert!(refused("\"512M\"", "\"16M\"").0.contains("cannot be given"));
    assert!(
        refused("\"512M\"", "\"536870913\"")
            .0
            .contains("cannot be given")
    );
    assert!(
        refused("\"512M\"", "\"99999999999T\"")
            .0
            .contains("not a size")
    );
    assert_eq!(parse_size("2GiB"), Some(2 << 30));
    assert_eq!(parse_size("64k"), Some(64 << 10));
    assert_eq!(parse_size("-1M"), None);
    assert_eq!(parse_size("M"), None);
}

#[test]
fn a_disk_needs_exactly_one_key() {
    let (message, at) = refused("key-file = \"root.key\"", "");
    assert_eq!(
        (message.as_str(), at.as_str()),
        ("this disk has no key", "\"root.vol\"")
    );
    let (message, _) = refused("key-file", "passphrase-file = \"p\"\nkey-file");
    assert_eq!(message, "this disk has two keys");
}

#[test]
fn an_ephemeral_disk_has_a_size_and_no_key_and_shares_its_folder() {
    let key = "key-file = \"root.key\"";
    let ephemeral = GOOD.replace(key, "ephemeral = \"10G\"");
    let second = "\n[[disk]]\nvolume = \"root.vol\"\nephemeral = \"1M\"\n";
    let spec = parse_text(&(ephemeral + second)).unwrap();
    assert_eq!(spec.disks[0].key, KeySource::Ephemeral(10 << 30));
    assert_eq!(spec.disks[2].key, KeySource::Ephemeral(1 << 20));
    for wrong in ["much", "0", "1000", "1048577"] {
        let (message, at) = refused(key, &format!("ephemeral = \"{wrong}\""));
        assert!(message.contains("cannot be had"), "{message}");
        assert_eq!(at, format!("\"{wrong}\""));
    }
    let (message, _) = refused(key, &format!("{key}\nephemeral = \"1G\""));
    assert!(message.contains("no key of yours"), "{message}");
    let (message, _) = refused(key, "read-only = true\nephemeral = \"1G\"");
    assert!(message.contains("holds nothing"), "{message}");
}

#[test]
fn one_volume_is_not_served_twice() {
    let (message, at) = refused("\"data.vol\"", "\"root.vol\"");
    assert_eq!(
        (message.as_str(), at.as_str()),
        ("this volume is named twice", "\"root.vol\"")
    );
}

#[test]
fn numbers_out_of_range_are_refused() {
    assert!(refused("cpus = 2", "cpus = 0").0.contains("cpus = 0"));
    assert!(refused("cpus = 2", "cpus = 70000").0.contains("70000"));
    assert!(refused("queues = 1", "queues = 0").0.contains("queues = 0"));
    assert!(
        refused("queue-size = 256", "queue-size = 100")
            .0
            .contains("queue-size = 100")
    );
}

#[test]
fn serials_that_virtio_cannot_carry_are_refused() {
    let (message, _) = refused("vol0123456789abcdef0", "vol0123456789abcdef01");
    assert!(message.contains("cannot be a serial"));
    assert!(
        refused("vol0123456789abcdef0", "with space")
            .0
            .contains("cannot be a serial")
    );
}

#[test]
fn what_can_never_boot_is_refused() {
    let nothing = "[vm]\nname = \"x\"\nmemory = \"64M\"\n";
    assert_eq!(
        parse_text(nothing).unwrap_err().to_string(),
        "there is nothing to boot from"
    );
    let (message, _) = refused("kernel = \"vmlinuz\"", "");
    assert_eq!(message, "initrd needs a kernel");
    let (message, _) = refused("cpus = 2", "firmware = \"bios.bin\"");
    assert_eq!(message, "kernel and firmware exclude each other");
}

#[test]
fn the_printed_diagnostic_shows_the_line_of_the_file() {
    let text = GOOD.replace("\"512M\"", "\"lots\"");
    let report = miette::Report::new(*parse_text(&text).unwrap_err());
    let shown = format!("{report:?}");
    assert!(shown.contains("memory = \"lots\""), "{shown}");
    assert!(shown.contains("web1.toml"), "{shown}");
    assert!(shown.contains("a number with K, M, G or T"), "{shown}");
}

#[test]
fn what_an_interface_may_carry_and_what_is_logged_is_taken() {
    let text = GOOD.replace(
        "mtu = 1500",
        "mtu = 1500\nrx-bps = '100M'\nrx-bps-burst = '1G:5'\ntx-pps = 20000\n\
         flow-log = 'flows.log'\nflow-log-interval = 600\nflow-log-size = '1M'\n\
         flow-timeouts = { tcp-established = 3600 }\ntracked-flows = 1000\n\
         neighbors = { db = ['10.0.2.20'] }",
    );
    let traffic = parse_text(&text).unwrap().nics.swap_remove(1).traffic;
    let limits = [
        ("rx-bps", "100M"),
        ("rx-bps-burst", "1G:5"),
        ("tx-pps", "20000"),
    ];
    assert_eq!(
        traffic.limits,
        limits.map(|(name, it)| (name, it.to_owned()))
    );
    assert_eq!(traffic.flow_timeouts["tcp-established"], 3600);
    assert_eq!(traffic.tracked_flows, Some(1000));
    assert_eq!(traffic.neighbors["db"].len(), 1);
    let log = traffic.flow_log.unwrap();
    assert_eq!(log.path, Path::new("/etc/offload/flows.log"));
    assert_eq!(
        (log.interval, log.size.as_deref(), log.keep),
        (Some(600), Some("1M"), None)
    );
}

#[test]
fn what_a_disk_may_use_is_taken_as_the_card_takes_it() {
    let disks = |text: &str| parse_text(text).unwrap().disks;
    assert!(disks(GOOD).iter().all(|disk| disk.limits.is_empty()));
    let text = GOOD.replace(
        "queues = 1",
        "queues = 1\niops = 3000\niops-burst = '10000:5'\nbps = '125M'\nbps-burst = '1G'\nio-size = '16K'",
    );
    let limits = [
        ("iops", "3000"),
        ("iops-burst", "10000:5"),
        ("bps", "125M"),
        ("bps-burst", "1G"),
        ("io-size", "16K"),
    ];
    assert_eq!(
        disks(&text)[1].limits,
        limits.map(|(name, it)| (name, it.to_owned()))
    );
}

#[test]
fn what_a_disk_cannot_keep_to_is_refused_where_it_stands() {
    for (to, says, at) in [
        ("iops = 0", "not a number a second", "0"),
        ("iops = '3K'", "not a number a second", "'3K'"),
        ("iops = 20000000000", "to 17179869184", "20000000000"),
        ("bps = '10MB'", "not a size a second", "'10MB'"),
        ("bps = '0'", "not a size a second", "'0'"),
        ("iops-burst = 10", "needs iops", "10"),
        ("bps-burst = '1M'", "needs bps", "'1M'"),
        ("iops = 10\niops-burst = 10", "not above iops", "10"),
        (
            "bps = '2M'\nbps-burst = '1024K:9'",
            "not above bps",
            "'1024K:9'",
        ),
        ("iops = 10\niops-burst = '20:0'", "not a burst", "'20:0'"),
        ("iops = 10\niops-burst = '20:x'", "not a burst", "'20:x'"),
        (
            "iops = 10\niops-burst = '20:86401'",
            "not a burst",
            "'20:86401'",
        ),
        ("io-size = '16K'", "io-size needs iops", "'16K'"),
        ("iops = 10\nio-size = 5000", "io-size = `5000`", "5000"),
        ("iops = 10\nio-size = '32M'", "cannot be had", "'32M'"),
        ("iops = -1", "expected a number, or a text", "-1"),
        ("iop = 1", "unknown field", "iop"),
    ] {
        let (message, place) = refused("queues = 1", &format!("queues = 1\n{to}"));
        assert!(message.contains(says), "{to}: {message}");
        assert_eq!(place, at, "{to}: {message}");
    }
}

#[test]
fn an_interface_has_the_ipv6_address_of_its_prefix_that_it_is_given() {
    let first = |more: &str| {
        let text = GOOD.replacen("[[nic]]\n", &format!("[[nic]]\n{more}\n"), 1);
        parse_text(&text).map(|spec| spec.nics[0].ipv6_address)
    };
    assert_eq!(first("").unwrap(), None);
    let address = first("ipv6-address = 'fd00:0:0:2::15'").unwrap().unwrap();
    assert_eq!(address.to_string(), "fd00:0:0:2::15");
    let own = "ipv6-prefix = '2001:db8:1:2::'\nipv6-address = '2001:db8:1:2::f'";
    assert!(first(own).unwrap().is_some());
    for (more, says) in [
        ("ipv6-address = '10.0.2.15'", "not an IPv6 address"),
        ("ipv6-address = 'fd00:0:0:3::15'", "cannot have the address"),
        ("ipv6-address = 'fd00:0:0:2::2'", "cannot have the address"),
        ("ipv6-address = 'fd00:0:0:2::'", "cannot have the address"),
        (
            "no-ipv6 = true\nipv6-address = 'fd00:0:0:2::15'",
            "ipv6-address and no-ipv6 exclude each other",
        ),
    ] {
        let error = first(more).unwrap_err();
        assert!(error.to_string().contains(says), "{more}: {error}");
    }
}

#[test]
fn an_interface_that_says_nothing_gets_what_is_its_own_and_the_same_each_time() {
    let nics = parse_text(GOOD).unwrap().nics;
    let first = &nics[0];
    assert_eq!(first.hostname.as_deref(), Some("web1"));
    assert_eq!(first.ipv4.address.to_string(), "10.0.2.15");
    assert_eq!(first.ipv6_prefix.unwrap().to_string(), "fd00:0:0:2::");
    assert_eq!(first.mtu, 9001);
    assert!(first.mac.starts_with("52:54:00:"), "{}", first.mac);
    assert_eq!(parse_text(GOOD).unwrap().nics, nics);
    let other = parse_text(&GOOD.replace("\"web1\"", "\"web_2\"")).unwrap();
    assert_ne!(other.nics[0].mac, first.mac);
    assert_eq!(other.nics[0].hostname, None, "web_2 names no host");

    let three = GOOD.replacen("[[nic]]", "[[nic]]\n[[nic]]", 1);
    let three = parse_text(&three).unwrap().nics;
    assert_ne!(three[0].mac, three[1].mac);
    assert_eq!(three[1].ipv4.address.to_string(), "10.0.3.15");
}

#[test]
fn an_interface_that_says_all_has_all() {
    let nic = parse_text(GOOD).unwrap().nics.swap_remove(1);
    assert_eq!(nic.mac, "52:54:00:ab:cd:ef");
    assert_eq!((nic.ipv4.prefix_len, nic.ipv6_prefix), (25, None));
    assert_eq!(nic.gateway.unwrap().to_string(), "192.168.7.129");
    assert_eq!(nic.publish, ["8080:80", "[::]:53:53/udp"]);
    assert_eq!(nic.dns_upstream.len(), 2);
    let folder = Path::new("/etc/offload");
    assert_eq!(nic.security_groups, Some(folder.join("groups.toml")));
    assert_eq!(nic.metadata, Some("/abs/metadata.toml".into()));
    assert_eq!(nic.user_data, Some(folder.join("user-data")));
}

#[test]
fn what_an_interface_cannot_be_is_refused_where_it_stands() {
    for (from, to, says, at) in [
        (
            "52:54:00:AB:cd:ef",
            "01:00:5e:00:00:01",
            "hardware address",
            "\"01:00:5e:00:00:01\"",
        ),
        (
            "52:54:00:AB:cd:ef",
            "52:54:00:12:34",
            "hardware address",
            "\"52:54:00:12:34\"",
        ),
        (
            "200/25",
            "200/31",
            "network's prefix",
            "\"192.168.7.200/31\"",
        ),
        ("7.129", "7.1", "cannot have the address", "\"192.168.7.1\""),
        (
            "7.129",
            "7.200",
            "cannot have the address",
            "\"192.168.7.200\"",
        ),
        ("mtu = 1500", "mtu = 1000", "mtu = 1000", "1000"),
        ("two.example", "two_", "host's name", "\"two_\""),
        ("9.9.9.9", "9.9.9", "IP address", "\"9.9.9\""),
        ("8080:80", "80", "port forward", "\"80\""),
        ("8080:80", "8080:0", "port forward", "\"8080:0\""),
        (
            "8080:80",
            "8080:80/sctp",
            "port forward",
            "\"8080:80/sctp\"",
        ),
        (
            "no-ipv6 = true",
            "no-ipv6 = true\nipv6-prefix = 'fd00::'",
            "exclude",
            "'fd00::'",
        ),
        (
            "publish = [",
            "publish = ['127.0.0.1:8080:1', ",
            "a second time",
            "\"8080:80\"",
        ),
        ("mtu = 1500", "queue = 1", "unknown field", "queue"),
        ("mtu = 1500", "rx-bps = 'fast'", "not a size", "'fast'"),
        ("mtu = 1500", "rx-pps = '1M'", "not a number", "'1M'"),
        (
            "mtu = 1500",
            "tx-pps-burst = '9:9'",
            "needs tx-pps",
            "'9:9'",
        ),
        (
            "mtu = 1500",
            "tx-bps = '1M'\ntx-bps-burst = '9:x'",
            "not a burst",
            "'9:x'",
        ),
        ("mtu = 1500", "flow-log-keep = 3", "no flow log", "3"),
        (
            "mtu = 1500",
            "flow-log = 'l'\nflow-log-interval = 61",
            "cannot be had",
            "61",
        ),
        (
            "mtu = 1500",
            "flow-timeouts = { tcp = 3 }",
            "no kind of flows `tcp`",
            "3",
        ),
        (
            "mtu = 1500",
            "neighbors = { db = ['x'] }",
            "IP address",
            "'x'",
        ),
        ("mtu = 1500", "queue-pairs = 9", "queue-pairs = 9", "9"),
        (
            "mtu = 1500",
            "network = '../x'",
            "not the name of a network",
            "'../x'",
        ),
    ] {
        let (message, place) = refused(from, to);
        assert!(message.contains(says), "{to}: {message}");
        assert_eq!(place, at, "{to}: {message}");
    }
    for to in ["10.0.2.200/25", "10.0.99.1/8"] {
        let text = GOOD.replace("gateway = \"192.168.7.129\"\n", "");
        let text = text.replace("192.168.7.200/25", to);
        let error = parse_text(&text).unwrap_err();
        let says = format!("10.0.2.15/24 and {to} of two interfaces overlap");
        assert!(error.to_string().contains(&says), "{to}: {error}");
        assert_eq!(&text[error.span().unwrap()], format!("\"{to}\""));
    }
    let same = GOOD.replace("no-ipv6 = true", "ipv6-prefix = 'fd00:0:0:2::'");
    let error = parse_text(&same).unwrap_err().to_string();
    assert!(error.contains("fd00:0:0:2::/64 and"), "{error}");
    let twice = "[[nic]]\nmac = '52:54:00:ab:cd:ef'\n";
    let (message, at) = refused("[[nic]]", twice);
    assert!(message.contains("two interfaces"), "{message}");
    assert_eq!(at, "\"52:54:00:AB:cd:ef\"");
}
