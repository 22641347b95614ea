//! Name servers of the host's: Debian's dnsmasq with a zone of its own, and ones that do not behave.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// What `files.example.internal` is.
pub const FILES: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 33);
/// What a liar's victim believes.
pub const FORGED: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 66);
/// What a liar says in the end.
pub const TRUE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 44);
/// Texts of `large.example.internal`, of 200 letters each: more than fits a datagram.
pub const TEXTS: usize = 40;

/// A running dnsmasq.
pub struct Dnsmasq {
    child: Child,
    /// Where it listens, over UDP and TCP.
    pub address: SocketAddr,
}

impl Dnsmasq {
    /// Starts one on a port of the loopback, and waits until it answers.
    ///
    /// # Panics
    /// When it does not; `.ci/install-packages` installs it.
    #[must_use]
    pub fn start() -> Self {
        // A port that is free for datagrams may be somebody's for TCP.
        let started = (0..10).find_map(|_| Self::try_start());
        started.expect("a dnsmasq that stays")
    }

    /// None if it gave up.
    fn try_start() -> Option<Self> {
        let free = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let address = free.local_addr().expect("bound");
        drop(free);
        let mut command = Command::new("dnsmasq");
        command.args(["--keep-in-foreground", "--no-resolv", "--no-hosts"]);
        command.args(["--conf-file=/dev/null", "--pid-file", "--bind-interfaces"]);
        command.args(["--listen-address=127.0.0.1", "--local=/example.internal/"]);
        command.arg(format!("--port={}", address.port()));
        command.arg(format!("--host-record=files.example.internal,{FILES}"));
        for n in 0..TEXTS {
            let text = format!("{n:0>200}");
            command.arg(format!("--txt-record=large.example.internal,{text}"));
        }
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
        let child = command.stdout(Stdio::null()).spawn().expect("dnsmasq");
        let mut server = Self { child, address };
        let asker = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let wait = Some(Duration::from_millis(200));
        asker.set_read_timeout(wait).expect("a socket");
        let end = Instant::now() + Duration::from_secs(60);
        let question = question(*b"files", 1);
        loop {
            let _ = asker.send_to(&question, address);
            if asker.recv(&mut [0; 512]).is_ok() {
                return Some(server);
            }
            if let Ok(Some(_)) = server.child.try_wait() {
                return None;
            }
            assert!(Instant::now() < end, "dnsmasq does not answer");
        }
    }
}

impl Drop for Dnsmasq {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A question about `name.example.internal`.
#[must_use]
pub fn question(name: [u8; 5], kind: u8) -> Vec<u8> {
    let mut bytes = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 5];
    bytes.extend(name);
    bytes.extend(b"\x07example\x08internal\0\0");
    bytes.extend([kind, 0, 1]);
    bytes
}

/// A server that takes questions and never answers.
///
/// # Panics
/// When there is no port.
#[must_use]
pub fn silent() -> (UdpSocket, SocketAddr) {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let address = socket.local_addr().expect("bound");
    (socket, address)
}

/// A server whose answers are preceded by forged ones: of another number, about another name, from
/// another port. The right one says [`TRUE`].
///
/// # Panics
/// When there is no port.
#[must_use]
pub fn liar() -> SocketAddr {
    let (socket, address) = silent();
    let other = silent().0;
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok((len, peer)) = socket.recv_from(&mut buffer) {
            let Some(asked) = buffer.get(..len) else {
                continue;
            };
            let Some(name) = asked
                .get(12..)
                .and_then(|it| it.iter().position(|b| *b == 0))
            else {
                continue;
            };
            // Header and question, without what follows.
            let end = 12 + name + 5;
            let answer = |change: usize, to: Ipv4Addr| {
                let mut bytes = asked.get(..end).unwrap_or_default().to_vec();
                bytes[2] |= 0x80;
                bytes[6..12].copy_from_slice(&[0, 1, 0, 0, 0, 0]);
                if change > 0 {
                    bytes[change] ^= 1;
                }
                bytes.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
                bytes.extend(to.octets());
                bytes
            };
            let _ = socket.send_to(&answer(1, FORGED), peer);
            let _ = socket.send_to(&answer(13, FORGED), peer);
            let _ = other.send_to(&answer(0, FORGED), peer);
            std::thread::sleep(Duration::from_millis(100));
            let _ = socket.send_to(&answer(0, TRUE), peer);
        }
    });
    address
}
