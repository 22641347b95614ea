//! A stock guest's network on the card: QEMU, Debian's kernel and its virtio_net, busybox's clients.
//!
//! The servers are this test's, on the host's loopback, which the guest reaches where the card maps
//! it. No privilege is needed and nothing leaves the machine.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use host_shim::guest::{self, Initrd};
use host_shim::qemu::Version;
use offload::control::ControlClient;
use offload_tests::binaries::binary;
use offload_tests::guest::echo_on;
use serde_json::json;
use tempfile::TempDir;

/// Far more than is needed: machines that run tests are slow and shared.
const PATIENCE: Duration = Duration::from_secs(180);

/// What udhcpc calls.
const LEASE: &str = r#"#!/bin/sh
[ "$1" = bound ] || exit 0
ip addr add "$ip/$mask" dev "$interface"
ip route add default via "$router"
echo "lease $ip/$mask router $router dns $dns mtu $mtu hostname $hostname"
"#;

const AGENT: &str = r#"
dmesg -n 1
stty -echo -opost
ip link set lo up
ip link set eth0 up
echo '@@ready'
while read -r number line; do
    eval "$line" </dev/null 2>&1
    echo "@@$number $?"
done
"#;

struct Card {
    child: Child,
    socket: PathBuf,
    more: Vec<String>,
}

impl Card {
    fn start(socket: &Path, more: &[&str]) -> Self {
        let more: Vec<String> = more.iter().map(|&arg| arg.to_owned()).collect();
        Self {
            child: Self::spawn(socket, &more),
            socket: socket.to_owned(),
            more,
        }
    }

    fn spawn(socket: &Path, more: &[String]) -> Child {
        let child = Command::new(binary("vhost-net"))
            .args(["serve", "--socket-path"])
            .arg(socket)
            .args(["--seccomp", "kill", "--hostname", "guest7"])
            .args(["--map-host-loopback", "10.0.2.2"])
            .args(more)
            .spawn()
            .expect("the card starts");
        let end = Instant::now() + PATIENCE;
        while !socket.exists() {
            assert!(Instant::now() < end, "the card does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        child
    }

    /// Dies without a word, and another one takes its place.
    fn kill_and_restart(&mut self) {
        self.child.kill().expect("it lives");
        self.child.wait().expect("it dies");
        let _ = std::fs::remove_file(&self.socket);
        self.child = Self::spawn(&self.socket, &self.more);
    }
}

impl Drop for Card {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Guest {
    qemu: Child,
    keyboard: ChildStdin,
    lines: Receiver<String>,
    commands: u32,
}

impl Guest {
    fn boot(dir: &Path, socket: &Path) -> Self {
        Self::boot_with(dir, socket, &[], 1)
    }

    /// With programs of the host's besides, and so many queue pairs and processors.
    fn boot_with(dir: &Path, socket: &Path, programs: &[&str], pairs: u16) -> Self {
        let kernel = guest::kernel(&guest::cache_dir()).expect("Debian's cloud kernel");
        let initrd = Initrd {
            modules: &["virtio_pci", "virtio_net"],
            programs,
            files: &[
                ("/lease", LEASE.as_bytes()),
                ("/metadata", METADATA.as_bytes()),
            ],
            script: AGENT,
        };
        let initrd_path = dir.join("initrd");
        let archive = initrd.build(&kernel).expect("a RAM disk");
        std::fs::write(&initrd_path, archive).expect("room");
        let qemu = std::env::var_os("OFFLOAD_QEMU").unwrap_or("qemu-system-x86_64".into());
        let said = Command::new(&qemu).arg("--version").output().expect("QEMU");
        let version = Version::parse(&String::from_utf8_lossy(&said.stdout)).expect("a release");
        let is_new = version >= (Version { major: 9, minor: 2 });
        let reconnect = if is_new {
            "reconnect-ms=100"
        } else {
            "reconnect=1"
        };
        let chardev = format!("socket,id=card,path={},{reconnect}", socket.display());
        let cmdline = format!("{} net.ifnames=0", guest::CMDLINE);
        let mut qemu = Command::new(qemu)
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-machine", "q35,usb=off,vmport=off,memory-backend=mem"])
            .args(["-accel", "tcg,thread=multi", "-cpu", "max", "-m", "256M"])
            .args(["-object", "memory-backend-memfd,id=mem,size=256M,share=on"])
            .arg("-kernel")
            .arg(&kernel.image)
            .arg("-initrd")
            .arg(&initrd_path)
            .args([
                "-append", &cmdline, "-serial", "stdio", "-chardev", &chardev,
            ])
            .args(["-smp", &pairs.to_string()])
            .arg("-netdev")
            .arg(format!("vhost-user,id=net0,chardev=card,queues={pairs}"))
            // No MSI-X: QEMU 7.2 dies with it when a vhost device starts under TCG.
            .arg("-device")
            .arg(format!(
                "virtio-net-pci,netdev=net0,host_mtu=9001,vectors=0,mq={}",
                if pairs > 1 { "on" } else { "off" }
            ))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("QEMU starts");
        let (sender, lines) = channel();
        let console = BufReader::new(qemu.stdout.take().expect("piped"));
        std::thread::spawn(move || {
            for line in console.split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let mut guest = Self {
            keyboard: qemu.stdin.take().expect("piped"),
            qemu,
            lines,
            commands: 0,
        };
        guest.until("@@ready");
        guest
    }

    /// Lines up to one that has `mark`, and that one.
    fn until(&mut self, mark: &str) -> (Vec<String>, String) {
        let mut seen = Vec::new();
        let end = Instant::now() + PATIENCE;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) if line.contains(mark) => return (seen, line),
                Ok(line) => seen.push(line),
                Err(error) => panic!("no `{mark}` ({error}):\n{}", seen.join("\n")),
            }
        }
    }

    fn run(&mut self, command: &str) -> (String, i32) {
        self.type_command(command);
        self.answer()
    }

    fn type_command(&mut self, command: &str) {
        self.commands += 1;
        writeln!(self.keyboard, "{} {command}", self.commands).expect("QEMU lives");
    }

    fn answer(&mut self) -> (String, i32) {
        let mark = format!("@@{} ", self.commands);
        let (seen, line) = self.until(&mark);
        let status = line.rsplit(' ').next().and_then(|text| text.parse().ok());
        (seen.join("\n"), status.unwrap_or(-1))
    }

    fn ok(&mut self, command: &str) -> String {
        let (printed, status) = self.run(command);
        assert_eq!(status, 0, "`{command}`: {printed}");
        printed
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

fn listen() -> (TcpListener, u16) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let port = listener.local_addr().expect("bound").port();
    (listener, port)
}

/// Answers HTTP requests with `body`, and takes what is posted.
fn web(body: Vec<u8>) -> u16 {
    web_at("127.0.0.1", body)
}

fn web_at(address: &str, body: Vec<u8>) -> u16 {
    let listener = TcpListener::bind((address, 0)).expect("a port");
    let port = listener.local_addr().expect("bound").port();
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let mut reader = BufReader::new(stream);
            let mut line = String::new();
            while reader.read_line(&mut line).is_ok_and(|n| n > 2) {
                line.clear();
            }
            let mut stream = reader.into_inner();
            let head = format!("HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
            let _ = stream.write_all(head.as_bytes());
            let _ = stream.write_all(&body);
        }
    });
    port
}

/// Serves one short file over TFTP (RFC 1350): the one client of UDP that every busybox has.
fn tftp(content: &'static [u8]) -> u16 {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let port = socket.local_addr().expect("bound").port();
    std::thread::spawn(move || {
        let mut buffer = [0; 2048];
        while let Ok((_, peer)) = socket.recv_from(&mut buffer) {
            if buffer.starts_with(&[0, 1]) {
                let _ = socket.send_to(&[&[0, 3, 0, 1], content].concat(), peer);
            }
        }
    });
    port
}

fn free_port() -> u16 {
    listen().1
}

#[test]
fn a_stock_guest_has_a_network_with_nothing_configured_on_the_host() {
    let dir = TempDir::new().expect("a folder");
    let socket = dir.path().join("net.sock");
    let forwarded = free_port();
    let mut card = Card::start(&socket, &["--publish", &format!("{forwarded}:7777")]);
    let mut guest = Guest::boot(dir.path(), &socket);

    let lease = guest.ok("udhcpc -i eth0 -n -q -s /lease -O mtu -O hostname");
    assert!(
        lease.contains("lease 10.0.2.15/24 router 10.0.2.2"),
        "{lease}"
    );
    assert!(lease.contains("hostname guest7"), "{lease}");
    let link = guest.ok("ip link show eth0");
    assert!(link.contains("mtu 9001"), "{link}");
    guest.ok("ping -c 2 -W 5 10.0.2.2");

    // Down: whole, and in the size that super-segments have.
    let body: Vec<u8> = (0..20_000_000_u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let sum = md5_of(&body);
    let web_port = web(body);
    let got = guest.ok(&format!(
        "wget -q -O - http://10.0.2.2:{web_port}/ | md5sum"
    ));
    assert!(got.contains(&sum), "{got}, not {sum}");

    // Up.
    let (sink, sink_port) = listen();
    let taken = std::thread::spawn(move || {
        let mut stream = sink.accept().expect("a connection").0;
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).expect("to the end");
        bytes
    });
    guest.ok(&format!(
        "dd if=/dev/zero bs=1M count=10 2>/dev/null | nc 10.0.2.2 {sink_port}"
    ));
    let bytes = taken.join().expect("the sink");
    assert_eq!(bytes.len(), 10 << 20);

    // A port where nobody listens refuses, at once.
    let closed = free_port();
    let (printed, status) = guest.run(&format!("wget -O - http://10.0.2.2:{closed}/"));
    assert!(status != 0 && printed.contains("refused"), "{printed}");

    // Datagrams.
    let tftp_port = tftp(b"hello over udp");
    guest.ok(&format!("tftp -g -r x -l /tmp/x 10.0.2.2 {tftp_port}"));
    assert_eq!(guest.ok("cat /tmp/x; echo").trim(), "hello over udp");

    // From outside, and back.
    guest.ok(&echo_on(7777));
    let mut client = connect(forwarded);
    client.write_all(b"through the card").expect("it takes");
    client.shutdown(std::net::Shutdown::Write).expect("open");
    let mut answer = String::new();
    client.read_to_string(&mut answer).expect("to the end");
    assert_eq!(answer, "through the card");

    // Another card: open connections are reset, addresses are the same, new ones work.
    let (holder, holder_port) = listen();
    guest.ok(&format!(
        "(while true; do echo still here; sleep 1; done | nc 10.0.2.2 {holder_port} >/dev/null 2>&1; \
         echo over > /tmp/over) & true"
    ));
    let mut held = holder.accept().expect("a connection").0;
    held.set_read_timeout(Some(PATIENCE)).expect("a socket");
    // The card connects before the guest is told: one that is killed in between leaves a guest that still
    // asks, and is then connected by the next one.
    let mut first = [0; 10];
    held.read_exact(&mut first).expect("a line");
    assert_eq!(&first, b"still here");
    card.kill_and_restart();
    let mut rest = Vec::new();
    // An end or a reset, not silence.
    match held.read_to_end(&mut rest) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
    }
    // Not by `exit`, which would end the agent: what the guest has to say then is worth knowing.
    guest.ok(
        "n=0; while [ ! -e /tmp/over ] && [ $n -lt 40 ]; do n=$((n+1)); sleep 1; done; \
         [ -e /tmp/over ] || { cat /sys/class/net/eth0/carrier; ip neigh; netstat -tn; false; }",
    );
    let again = guest.ok(&format!(
        "wget -q -O - http://10.0.2.2:{web_port}/ | md5sum"
    ));
    assert!(again.contains(&sum), "{again}");
}

/// What cloud-init's EC2 data source does, in a shell: the token, then the walk.
const METADATA: &str = r#"#!/bin/sh
imds=169.254.169.254
token=$(printf 'PUT /latest/api/token HTTP/1.1\r\nHost: %s\r\nX-aws-ec2-metadata-token-ttl-seconds: 60\r\nConnection: close\r\n\r\n' $imds |
    nc $imds 80 | tail -n 1)
get() { wget -q -O - --header "X-aws-ec2-metadata-token: $token" "http://$imds/2021-03-23/$1"; }
walk() {
    for name in $(get "$1"); do
        case $name in
        */) walk "$1$name" ;;
        [0-9]*=*) echo "$1${name%%=*}/openssh-key=$(get "$1${name%%=*}/openssh-key")" ;;
        *) echo "$1$name=$(get "$1$name")" ;;
        esac
    done
}
walk meta-data/
echo "user-data=$(get user-data)"
get dynamic/instance-identity/document
"#;

#[test]
fn a_stock_guest_finds_names_and_metadata_and_its_security_groups_change_under_it() {
    let dir = TempDir::new().expect("a folder");
    let socket = dir.path().join("net.sock");
    let control = dir.path().join("control.sock");
    let metadata = dir.path().join("metadata.toml");
    let text = "instance-id = 'i-0abc'\npublic-keys = ['ssh-ed25519 AAAAkey alice']\n\
                user-data = '#cloud-config'\n";
    std::fs::write(&metadata, text).expect("room");
    let _card = Card::start(
        &socket,
        &[
            "--metadata",
            metadata.to_str().expect("UTF-8"),
            "--control-socket",
            control.to_str().expect("UTF-8"),
        ],
    );
    let mut guest = Guest::boot(dir.path(), &socket);
    guest.ok("udhcpc -i eth0 -n -q -s /lease -O mtu -O hostname");

    let names = guest.ok("nslookup guest7 10.0.2.3; nslookup instance-data 10.0.2.3");
    assert!(names.contains("10.0.2.15"), "{names}");
    assert!(names.contains("169.254.169.254"), "{names}");

    let (refused, status) = guest.run("wget -O - http://169.254.169.254/latest/meta-data/");
    assert!(status != 0 && refused.contains("401"), "{refused}");
    let found = guest.ok("sh /metadata");
    for line in [
        "meta-data/instance-id=i-0abc",
        "meta-data/local-ipv4=10.0.2.15",
        "meta-data/local-hostname=guest7",
        "meta-data/public-keys/0/openssh-key=ssh-ed25519 AAAAkey alice",
        "meta-data/network/interfaces/macs/52:54:00:12:34:56/subnet-ipv4-cidr-block=10.0.2.0/24",
        "user-data=#cloud-config",
        "\"instanceId\": \"i-0abc\"",
    ] {
        assert!(found.contains(line), "no {line} in:\n{found}");
    }

    // A connection goes on when the rules that let it begin are gone; another one cannot begin.
    let (listener, port) = listen();
    guest.ok(&format!(
        "(while true; do echo tick; sleep 1; done | nc 10.0.2.2 {port}) >/dev/null 2>&1 & sleep 1"
    ));
    let mut held = BufReader::new(listener.accept().expect("a connection").0);
    held.get_ref()
        .set_read_timeout(Some(PATIENCE))
        .expect("a socket");
    let mut client = ControlClient::connect(&control).expect("the control socket");
    let report = client
        .call("security_groups", json!(null))
        .expect("an answer");
    assert_eq!(report["spec"]["interface"], json!(["default"]));
    let none = json!({"interface": ["shut"], "group": [{"id": "shut"}]});
    client.call("set_security_groups", none).expect("an answer");
    let wrong = json!({"interface": ["nobody"], "group": []});
    let error = client
        .call("set_security_groups", wrong)
        .expect_err("a mistake");
    assert!(error.to_string().contains("nobody"), "{error}");
    let mut line = String::new();
    for _ in 0..5 {
        line.clear();
        held.read_line(&mut line).expect("still there");
        assert_eq!(line, "tick\n");
    }
    let (_, status) = guest.run(&format!("echo x | timeout 5 nc 10.0.2.2 {port}"));
    assert_ne!(status, 0);
    listener.set_nonblocking(true).expect("a socket");
    assert!(listener.accept().is_err(), "the rules let it through");
    // The card's own services are not filtered.
    let found = guest.ok("sh /metadata");
    assert!(found.contains("meta-data/instance-id=i-0abc"), "{found}");
}

/// A subcommand of the card's program, on a running one.
fn ask(control: &Path, args: &[&str]) -> (bool, String) {
    let output = Command::new(binary("vhost-net"))
        .args(&args[..1])
        .arg("--control-socket")
        .arg(control)
        .args(&args[1..])
        .output()
        .expect("it runs");
    let mut said = String::from_utf8_lossy(&output.stdout).into_owned();
    said += &String::from_utf8_lossy(&output.stderr);
    (output.status.success(), said)
}

/// The frames of a pcapng file with their directions (1 to the guest, 2 from it), as another's parser
/// reads them.
fn frames(path: &Path) -> Vec<(u8, Vec<u8>)> {
    use pcap_parser::traits::PcapReaderIterator as _;
    use pcap_parser::{Block, PcapBlockOwned, PcapError, PcapNGReader};
    let file = std::fs::File::open(path).expect("the capture");
    let mut reader = PcapNGReader::new(1 << 20, file).expect("a section");
    let mut frames = Vec::new();
    loop {
        let (used, block) = match reader.next() {
            Ok(block) => block,
            Err(PcapError::Eof) => return frames,
            Err(PcapError::Incomplete(_)) => {
                reader.refill().expect("more");
                continue;
            }
            Err(error) => panic!("{error:?}"),
        };
        if let PcapBlockOwned::NG(Block::EnhancedPacket(packet)) = block {
            let flags = packet.options.iter().find(|it| it.code.0 == 2);
            let flags = flags.expect("a direction").value[0];
            frames.push((flags, packet.data[..packet.caplen as usize].to_vec()));
        }
        reader.consume(used);
    }
}

#[test]
fn a_running_card_is_captured_published_limited_and_asked() {
    let dir = TempDir::new().expect("a folder");
    let socket = dir.path().join("net.sock");
    let control = dir.path().join("control.sock");
    let _card = Card::start(
        &socket,
        &["--control-socket", control.to_str().expect("UTF-8")],
    );
    let mut guest = Guest::boot_with(dir.path(), &socket, &["socat"], 1);
    guest.ok("udhcpc -i eth0 -n -q -s /lease -O mtu -O hostname");
    let (is_ok, status) = ask(&control, &["status"]);
    assert!(is_ok && status.contains("ipv4       10.0.2.15"), "{status}");

    // A capture of a download, ended as by a user.
    let file = dir.path().join("download.pcapng");
    let capture = Command::new(binary("vhost-net"))
        .args(["capture", "--control-socket"])
        .arg(&control)
        .arg("--write")
        .arg(&file)
        .stderr(Stdio::piped())
        .spawn()
        .expect("it runs");
    let end = Instant::now() + PATIENCE;
    while !file.exists() {
        assert!(Instant::now() < end, "no capture begins");
        std::thread::sleep(Duration::from_millis(10));
    }
    let web_port = web(vec![7; 3_000_000]);
    guest.ok(&format!("wget -q -O /dev/null http://10.0.2.2:{web_port}/"));
    let pid = rustix::process::Pid::from_child(&capture);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("it lives");
    let output = capture.wait_with_output().expect("it ends");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("0 lost"), "{said}");
    // The usual reader agrees, where it is installed.
    if let Ok(output) = Command::new("tshark").arg("-r").arg(&file).output() {
        let told = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && told.contains("GET / HTTP/1"),
            "{told}"
        );
        assert!(!told.contains("Malformed"), "{told}");
    }
    let frames = frames(&file);
    // IPv4, TCP, of that port: bytes of the body, and the question.
    let segments = |direction: u8, port_at: usize| {
        let is_of = |frame: &&(u8, Vec<u8>)| {
            let bytes = &frame.1;
            frame.0 == direction
                && bytes.len() > 54
                && bytes[12..14] == [8, 0]
                && bytes[23] == 6
                && bytes[port_at..port_at + 2] == web_port.to_be_bytes()
        };
        frames.iter().filter(is_of).collect::<Vec<_>>()
    };
    let down = segments(1, 34);
    let bytes: usize = down.iter().map(|(_, frame)| frame.len() - 54).sum();
    assert!(bytes > 3_000_000, "{bytes} of the body");
    // As the ring has it: one segment for many.
    let longest = down.iter().map(|(_, frame)| frame.len()).max();
    assert!(longest > Some(9015), "{longest:?}");
    let up = segments(2, 36);
    let is_question = |(_, frame): &&(u8, Vec<u8>)| frame.windows(6).any(|part| part == b"GET / ");
    assert_eq!(up.into_iter().filter(is_question).count(), 1);

    // Another one, that ends by itself.
    let few = dir.path().join("few.pcapng");
    let few_text = few.to_str().expect("UTF-8");
    guest.ok("ping -i 0.2 -c 300 10.0.2.2 >/dev/null 2>&1 & true");
    let args = ["capture", "-w", few_text, "--count", "4", "--snaplen", "64"];
    let (is_ok, said) = ask(&control, &args);
    assert!(is_ok && said.contains("4 frames written"), "{said}");
    let pings = self::frames(&few);
    assert!(pings.len() == 4 && pings.iter().all(|(_, frame)| frame.len() <= 64));
    let args = ["capture", "-w", few_text, "--duration", "0.3"];
    assert!(ask(&control, &args).0);

    // Ports that come and go, of both kinds; the groups follow.
    guest.ok("nc -ll -p 7777 -e cat >/dev/null 2>&1 & \
              /sbin/socat UDP4-LISTEN:7000,fork EXEC:cat >/dev/null 2>&1 & sleep 2");
    let (port, udp_port) = (free_port(), free_port());
    let rules = [format!("{port}:7777"), format!("{udp_port}:7000/udp")];
    let (is_ok, said) = ask(&control, &["publish", &rules[0], &rules[1]]);
    assert!(
        is_ok && said.contains(&format!("127.0.0.1:{port}:7777")),
        "{said}"
    );
    let mut client = connect(port);
    client.write_all(b"run time").expect("it takes");
    let mut answer = [0; 8];
    client.read_exact(&mut answer).expect("an echo");
    assert_eq!(&answer, b"run time");
    let datagrams = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    datagrams
        .connect((Ipv4Addr::LOCALHOST, udp_port))
        .expect("local");
    datagrams
        .set_read_timeout(Some(PATIENCE))
        .expect("a socket");
    for question in [&b"one"[..], b"another"] {
        datagrams.send(question).expect("it takes");
        let mut answer = [0; 64];
        let len = datagrams.recv(&mut answer).expect("an echo");
        assert_eq!(&answer[..len], question);
    }
    let (is_ok, again) = ask(&control, &["publish", &rules[0]]);
    assert!(!is_ok && again.contains("already"), "{again}");
    let (is_ok, low) = ask(&control, &["publish", "80:7777"]);
    assert!(
        !is_ok && low.contains("ip_unprivileged_port_start"),
        "{low}"
    );
    let (is_ok, said) = ask(&control, &["publish", "--remove", &rules[0]]);
    assert!(is_ok && !said.contains(":7777"), "{said}");
    let refused = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect_err("it is gone");
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    // What was open goes on.
    client.write_all(b"still on").expect("it takes");
    client.read_exact(&mut answer).expect("an echo");
    assert_eq!(&answer, b"still on");

    let (is_ok, limits) = ask(&control, &["limits", "--rx-bps", "10M", "--tx-pps", "5000"]);
    assert!(is_ok && limits.contains("10 MiB a second"), "{limits}");
    let (is_ok, limits) = ask(&control, &["limits", "--none"]);
    assert!(is_ok && !limits.contains("MiB"), "{limits}");
    let groups = dir.path().join("groups.toml");
    let text = "interface = ['in']\n[[group]]\nid = 'in'\n[[group.ingress]]\nprotocol = 'tcp'\n\
                ports = '22'\npeers = ['0.0.0.0/0']\n";
    std::fs::write(&groups, text).expect("room");
    let (is_ok, said) = ask(&control, &["groups"]);
    assert!(is_ok && said.contains("udp 7000"), "{said}");
    let set = ["groups", "--set", groups.to_str().expect("UTF-8")];
    let (is_ok, said) = ask(&control, &set);
    assert!(is_ok && said.contains("tcp 22"), "{said}");
    let (is_ok, said) = ask(&control, &["publish", &format!("{}:9", free_port())]);
    assert!(is_ok && said.contains("security groups"), "{said}");
}

/// A network of two: the card's end, and a router's. Prints what enters the router's.
const NEIGHBORHOOD: &str = r#"
set -e
ip link set lo up
ip link add vcard type veth peer name vrouter
unshare -n sleep 3600 & router=$!
trap 'kill $router' EXIT
while [ "$(readlink /proc/$router/ns/net)" = "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
ip link set vrouter netns $router
ip addr add 192.0.2.1/24 dev vcard
ip -6 addr add 2001:db8:1::1/64 dev vcard nodad
ip link set vcard up
nsenter -t $router -n sh -e -c '
    ip addr add 192.0.2.2/24 dev vrouter
    ip -6 addr add 2001:db8:1::2/64 dev vrouter nodad
    ip link set vrouter up
    echo 1 > /proc/sys/net/ipv4/ip_forward
    echo 1 > /proc/sys/net/ipv6/conf/all/forwarding
    ip route add 203.0.113.0/24 dev vrouter
    ip route add unreachable 198.51.100.0/24
    ip route add blackhole 198.18.1.0/24
    ip route add 198.18.2.0/24 dev vrouter mtu lock 1300
    ip -6 route add 2001:db8:2::/64 dev vrouter
'
ip route add default via 192.0.2.2
ip -6 route add default via 2001:db8:1::2
"$@" &
echo "card $!"
# Until nobody listens any more.
cat >/dev/null
kill $!
"#;

#[test]
fn ping_and_traceroute_go_beyond_the_card_and_say_who_refuses() {
    let dir = TempDir::new().expect("a folder");
    let socket = dir.path().join("net.sock");
    let control = dir.path().join("control.sock");
    let mut outside = Command::new("unshare")
        .args(["--user", "--map-root-user", "--net", "sh", "-c"])
        .args([NEIGHBORHOOD, "sh"])
        .arg(binary("vhost-net"))
        .args(["serve", "--seccomp", "kill", "--socket-path"])
        .arg(&socket)
        .arg("--control-socket")
        .arg(&control)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("unshare");
    let mut said = BufReader::new(outside.stdout.take().expect("piped"));
    let mut line = String::new();
    said.read_line(&mut line).expect("the card's number");
    let pid = line
        .trim()
        .strip_prefix("card ")
        .expect("no namespaces here");
    let pid = pid.to_owned();
    let end = Instant::now() + PATIENCE;
    while !socket.exists() {
        assert!(Instant::now() < end, "the card does not listen");
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut guest = Guest::boot(dir.path(), &socket);
    guest.ok("udhcpc -i eth0 -n -q -s /lease -O mtu -O hostname");
    // A new network's kernel lets nobody ping: the guest is told, and so is whoever asks the card.
    let (_, status) = guest.run("ping -c 1 -W 5 192.0.2.2");
    assert_ne!(status, 0);
    guest.ok("ping -c 1 -W 5 10.0.2.2");
    let (_, status) = ask(&control, &["status"]);
    assert!(status.contains("ping_group_range"), "{status}");
    let mut client = ControlClient::connect(&control).expect("the control socket");
    let stats = client.call("stats", json!(null)).expect("an answer");
    assert_eq!(stats["pings_forbidden"][0]["value"], json!(1), "{stats}");
    assert_eq!(stats["ping_allowed"][0]["value"], json!(0), "{stats}");
    let allow = "echo '0 0' > /proc/sys/net/ipv4/ping_group_range";
    let done = Command::new("nsenter")
        .args(["--user", "--net", "--preserve-credentials", "-t", &pid])
        .args(["sh", "-c", allow])
        .status();
    assert!(done.expect("nsenter").success());

    guest.ok("ping -c 2 -W 5 192.0.2.2");
    guest.ok("ping -c 1 -W 5 -s 4000 192.0.2.2");
    // The address comes by DHCPv6 or advertisement in its own time.
    guest.ok("echo 0 > /proc/sys/net/ipv6/conf/eth0/accept_dad; \
         n=0; until ip -6 route | grep -q default && ip -6 addr show dev eth0 scope global | grep -q fd00; do \
         n=$((n+1)); [ $n -lt 60 ] || break; sleep 1; done; [ $n -lt 60 ]");
    guest.ok("ping6 -c 2 -W 5 2001:db8:1::2");

    // The router says so, and the guest knows who that is.
    let trace = guest.ok("traceroute -n -w 5 -q 1 -m 2 203.0.113.9");
    assert!(trace.contains(" 1  10.0.2.2 "), "{trace}");
    assert!(trace.contains(" 2  192.0.2.2 "), "{trace}");
    let trace = guest.ok("traceroute -n -I -w 5 -q 1 -m 2 203.0.113.9");
    assert!(trace.contains(" 2  192.0.2.2 "), "{trace}");
    // busybox's ping says nothing of errors; its traceroute does.
    let no_way = guest.ok("traceroute -n -I -w 5 -q 1 -m 3 198.51.100.1");
    assert!(
        no_way.contains(" 2  192.0.2.2 ") && no_way.contains("!H"),
        "{no_way}"
    );
    let trace6 = guest.ok("traceroute6 -n -w 5 -q 1 -m 2 2001:db8:2::9");
    assert!(trace6.contains(" 2  2001:db8:1::2 "), "{trace6}");

    // Who refuses, and who says nothing. (Who says that there is no way is a unit test's: Linux limits how
    // often a router says so, and does not hear it while it is still in the call that asks.)
    let ended = |guest: &mut Guest, address: &str, patience: u32| {
        let begin = Instant::now();
        let (said, status) = guest.run(&format!("timeout {patience} nc {address} 81 </dev/null"));
        assert_ne!(status, 0, "{address}: {said}");
        (said, status == 143, begin.elapsed())
    };
    let (said, is_silent, _) = ended(&mut guest, "192.0.2.2", 30);
    assert!(!is_silent && said.contains("refused"), "{said}");
    let (said, is_silent, took) = ended(&mut guest, "198.18.1.1", 5);
    assert!(
        is_silent && took > Duration::from_secs(4),
        "{took:?} {said}"
    );

    // A narrow place behind the router, which the guest is told of.
    let trace = guest.ok("traceroute -n -F -w 5 -q 2 -f 3 -m 3 198.18.2.9 1400");
    assert!(trace.contains("!F-1300"), "{trace}");

    drop(outside.stdin.take());
    assert!(outside.wait().expect("it ends").success());
}

fn connect(port: u16) -> TcpStream {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let stream = TcpStream::connect_timeout(&address, PATIENCE).expect("the published port");
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
    stream
}

fn md5_of(bytes: &[u8]) -> String {
    let mut child = Command::new("md5sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("md5sum");
    child
        .stdin
        .take()
        .expect("piped")
        .write_all(bytes)
        .expect("it reads");
    let output = child.wait_with_output().expect("it ends").stdout;
    String::from_utf8_lossy(&output)
        .split(' ')
        .next()
        .unwrap_or_default()
        .to_owned()
}

/// Takes one file over TFTP with the block size that the client wants (RFC 2348), at both loopbacks.
fn tftp_sink(address: &str) -> (u16, std::thread::JoinHandle<Vec<u8>>) {
    let socket = UdpSocket::bind((address, 0)).expect("a port");
    let port = socket.local_addr().expect("bound").port();
    let thread = std::thread::spawn(move || {
        let mut buffer = vec![0; 1 << 16];
        let (mut file, mut block) = (Vec::new(), 0_u16);
        loop {
            let (len, peer) = socket.recv_from(&mut buffer).expect("a packet");
            let packet = &buffer[..len];
            let answer = match packet {
                [0, 2, ..] => b"\0\x06blksize\x0030000\0".to_vec(),
                [0, 3, high, low, data @ ..] => {
                    if u16::from_be_bytes([*high, *low]) == block.wrapping_add(1) {
                        block += 1;
                        file.extend_from_slice(data);
                    }
                    vec![0, 4, *high, *low]
                }
                _ => continue,
            };
            socket.send_to(&answer, peer).expect("sent");
            if packet[1] == 3 && len < 30_004 {
                return file;
            }
        }
    });
    (port, thread)
}

#[test]
fn a_guest_of_two_processors_uses_both_queue_pairs_over_ipv4_and_ipv6() {
    let dir = TempDir::new().expect("a folder");
    let socket = dir.path().join("net.sock");
    let control = dir.path().join("control.sock");
    let control_path = control.display().to_string();
    let more = [
        ["--queue-pairs", "2"],
        ["--map-host-loopback", "fd00:ffff::1"],
        ["--control-socket", &control_path],
    ];
    let _card = Card::start(&socket, more.as_flattened());
    let mut guest = Guest::boot_with(dir.path(), &socket, &[], 2);
    let queues = guest.ok("ls /sys/class/net/eth0/queues");
    for queue in ["rx-0", "rx-1", "tx-0", "tx-1"] {
        assert!(queues.contains(queue), "{queues}");
    }
    guest.ok("udhcpc -i eth0 -n -q -s /lease");
    // SLAAC from the router's advertisement, which also says where the router is.
    guest.ok(
        "n=0; until ip -6 addr show dev eth0 scope global | grep -v tentative | grep -q \
         'inet6 fd00:' && ip -6 route | grep -q 'default via fe80::2'; do \
         sleep 0.2; n=$((n+1)); [ $n -lt 300 ] || { ip -6 addr; ip -6 route; break; }; done; \
         [ $n -lt 300 ]",
    );

    // Each processor sends through its own queue; down in the size that super-segments have.
    let body: Vec<u8> = (0..5_000_000_u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let sum = md5_of(&body);
    let web6 = web_at("::1", body.clone());
    let web4 = web(body);
    for processor in ["1", "2"] {
        for url in [
            format!("http://10.0.2.2:{web4}/"),
            format!("http://[fd00:ffff::1]:{web6}/"),
        ] {
            let got = guest.ok(&format!("taskset {processor} wget -q -O - {url} | md5sum"));
            assert!(got.contains(&sum), "{url}: {got}, not {sum}");
        }
    }
    // Up, from both at once.
    let sinks: Vec<_> = ["127.0.0.1", "::1"].map(sink).into();
    let ports: Vec<u16> = sinks.iter().map(|(port, _)| *port).collect();
    guest.ok(&format!(
        "dd if=/dev/zero bs=1M count=5 2>/dev/null | taskset 1 nc 10.0.2.2 {} & \
         dd if=/dev/zero bs=1M count=5 2>/dev/null | taskset 2 nc fd00:ffff::1 {}; wait",
        ports[0], ports[1]
    ));
    for (_, thread) in sinks {
        assert_eq!(thread.join().expect("the sink"), 5 << 20);
    }

    // Datagrams above the MTU leave in fragments.
    guest.ok("head -c 70000 /dev/urandom > /tmp/file");
    let sum = guest.ok("md5sum < /tmp/file");
    for (address, seen) in [("127.0.0.1", "10.0.2.2"), ("::1", "fd00:ffff::1")] {
        let (port, taken) = tftp_sink(address);
        guest.ok(&format!(
            "tftp -b 30000 -p -l /tmp/file -r file {seen} {port}"
        ));
        let file = taken.join().expect("the sink");
        assert!(sum.contains(&md5_of(&file)), "{} bytes", file.len());
    }

    let mut client = ControlClient::connect(&control).expect("the control socket");
    let stats = client.call("stats", json!(null)).expect("counters");
    let value = |name: &str, queue: Option<&str>| {
        let all = stats[name].as_array().expect("a counter").iter();
        let mut of = all.filter(|one| queue.is_none_or(|queue| one["labels"]["queue"] == queue));
        of.next().expect("the queue's")["value"]
            .as_u64()
            .unwrap_or(0)
    };
    for queue in ["0", "1", "2", "3"] {
        assert!(value("requests", Some(queue)) > 20, "{queue}: {stats}");
    }
    // Three blocks of the file, twice, of which the last may fit the MTU.
    assert!(value("reassembled_packets", None) >= 4, "{stats}");
    assert_eq!(value("overruns", None), 0, "{stats}");
}

/// Takes one connection to its end; how many bytes came.
fn sink(address: &str) -> (u16, std::thread::JoinHandle<usize>) {
    let listener = TcpListener::bind((address, 0)).expect("a port");
    let port = listener.local_addr().expect("bound").port();
    let thread = std::thread::spawn(move || {
        let mut stream = listener.accept().expect("a connection").0;
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).expect("to the end")
    });
    (port, thread)
}
