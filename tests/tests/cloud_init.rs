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
                map-host-loopback = ['10.0.2.2']\nmetadata = 'metadata.toml'\nuser-data = 'user-data'\n";
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

    // Word for word as AWS documents it.
    let listing = in_root(
        "TOKEN=`curl -s -X PUT \"http://169.254.169.254/latest/api/token\" \
         -H \"X-aws-ec2-metadata-token-ttl-seconds: 21600\"` && \
         curl -s -H \"X-aws-ec2-metadata-token: $TOKEN\" http://169.254.169.254/latest/meta-data/",
    );
    assert!(listing.contains("instance-id\n"), "{listing}");
    let statuses = in_root(
        "status() { curl -s -o /dev/null -w \"%{http_code} \" \"$@\"; }; imds=http://169.254.169.254/latest; \
         ttl=X-aws-ec2-metadata-token-ttl-seconds; \
         status $imds/meta-data/; status -X PUT $imds/api/token; status -X PUT -H \"$ttl: 21601\" $imds/api/token; \
         status -X PUT -H \"$ttl: 60\" -H \"X-Forwarded-For: 192.0.2.1\" $imds/api/token; \
         status -X PUT -H \"$ttl: 60\" \"http://[fd00:ec2::254]/latest/api/token\"",
    );
    assert_eq!(statuses.trim(), "401 400 400 403 200");

    // The host's clock, which is the guest's too.
    for server in ["169.254.169.123", "fd00:ec2::123"] {
        let said = in_root(&format!(
            "chronyd -Q -t 60 \"server {server} iburst maxsamples 1\" 2>&1"
        ));
        let off = said
            .split_once("System clock wrong by ")
            .and_then(|(_, rest)| rest.split_once(" seconds"))
            .and_then(|(seconds, _)| seconds.parse::<f64>().ok())
            .unwrap_or_else(|| panic!("{said}"));
        assert!(off.abs() < 5.0, "{said}");
    }

    let repository = repository();
    in_root(&format!(
        "echo deb [trusted=yes] http://10.0.2.2:{}/ ./ > /etc/apt/sources.list; \
         rm -rf /etc/apt/sources.list.d/* /var/lib/apt/lists/*; \
         apt-get update && apt-get install -y hello-card",
        repository.port
    ));
    let sum = in_root("sha256sum < /usr/share/hello-card/content");
    assert!(sum.contains(&repository.sum), "{sum}");
}

/// A repository of one package, served over HTTP on the host's loopback.
struct Repository {
    port: u16,
    /// Of the package's file.
    sum: String,
    _dir: tempfile::TempDir,
}

fn repository() -> Repository {
    let dir = tempfile::tempdir().expect("a folder");
    let tree = dir.path().join("tree");
    let files = [
        (
            "DEBIAN/control",
            b"Package: hello-card\nVersion: 1\nArchitecture: all\nMaintainer: nobody <n@example>\n\
              Description: a file\n"
                .to_vec(),
        ),
        (
            "usr/share/hello-card/content",
            (0..12_000_000_u32)
                .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
                .collect(),
        ),
    ];
    for (name, content) in &files {
        let path = tree.join(name);
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("room");
        std::fs::write(path, content).expect("room");
    }
    let run = |command: &str| {
        let mut shell = std::process::Command::new("sh");
        let output = shell
            .args(["-ec", command])
            .current_dir(dir.path())
            .output();
        let output = output.expect("a shell");
        assert!(output.status.success(), "{command}: {output:?}");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    };
    // Without compression, so that it is as large as it looks.
    run("chmod -R u=rwX,go=rX tree; dpkg-deb -Znone --root-owner-group --build tree hello.deb");
    let sum = run("sha256sum < tree/usr/share/hello-card/content | cut -d ' ' -f 1");
    let index = run(
        "cat tree/DEBIAN/control; echo Filename: ./hello.deb; echo Size: $(stat -c %s hello.deb); \
         echo SHA256: $(sha256sum < hello.deb | cut -d ' ' -f 1)",
    );
    let package = std::fs::read(dir.path().join("hello.deb")).expect("built");
    let port = serve(vec![
        ("/./Packages", index.into_bytes()),
        ("/./hello.deb", package),
    ]);
    Repository {
        port,
        sum,
        _dir: dir,
    }
}

/// Answers HTTP requests for these, by the end of their paths, and says that there is nothing else.
fn serve(files: Vec<(&'static str, Vec<u8>)>) -> u16 {
    use std::io::{BufRead as _, Write as _};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("bound").port();
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let mut reader = std::io::BufReader::new(stream);
            let (mut first, mut line) = (String::new(), String::new());
            let _ = reader.read_line(&mut first);
            while reader.read_line(&mut line).is_ok_and(|n| n > 2) {
                line.clear();
            }
            let path = first.split(' ').nth(1).unwrap_or_default();
            let found = files.iter().find(|(name, _)| path.ends_with(name));
            let (status, body) = match found {
                Some((_, body)) => ("200 OK", &body[..]),
                None => ("404 Not Found", &[][..]),
            };
            let head = format!(
                "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                body.len()
            );
            let mut stream = reader.into_inner();
            let _ = stream.write_all(head.as_bytes());
            let _ = stream.write_all(body);
        }
    });
    port
}
